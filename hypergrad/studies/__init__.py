"""Tables that the command line runs: methods by seeds, tuned by one rule."""

from . import (
    augmentation,
    cleaning,
    penalties,
    semi_supervised,
)
from .study import Study, table

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        augmentation.STUDY,
        cleaning.STUDY,
        penalties.STUDY,
        semi_supervised.STUDY,
    )
}

__all__ = ["STUDIES", "Study", "table"]
