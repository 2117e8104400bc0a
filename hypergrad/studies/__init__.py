"""Tables that the command line runs: methods by seeds, tuned by one rule."""

from . import cleaning, federated
from .study import Study, table

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        cleaning.STUDY,
        federated.STUDY,
    )
}

__all__ = ["STUDIES", "Study", "table"]
