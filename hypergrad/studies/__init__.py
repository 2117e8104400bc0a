"""Tables that the command line runs: methods by seeds, tuned by one rule."""

from . import record, report
from .cleaning import STUDY as cleaning
from .progress import progress
from .study import Study, run, write

STUDIES = {"cleaning": cleaning}

__all__ = ["STUDIES", "Study", "progress", "record", "report", "run", "write"]
