"""Tables that the command line runs: methods by seeds, tuned by one rule."""

from . import report
from .cleaning import STUDY as cleaning
from .study import Study, run, write

STUDIES = {"cleaning": cleaning}

__all__ = ["STUDIES", "Study", "report", "run", "write"]
