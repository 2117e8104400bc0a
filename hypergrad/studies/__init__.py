"""Tables that the command line runs: methods by seeds, tuned by one rule."""

from . import cleaning, few_shot, self_supervised, unsupervised
from .study import Study, table

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        cleaning.STUDY,
        few_shot.STUDY,
        self_supervised.STUDY,
        unsupervised.STUDY,
    )
}

__all__ = ["STUDIES", "Study", "table"]
