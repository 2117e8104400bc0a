"""Tables that the command line runs: methods by seeds, tuned by one rule."""

from . import (
    architecture,
    augmentation,
    cleaning,
    federated,
    few_shot,
    penalties,
    physics,
    reinforcement,
    schedules,
    self_supervised,
    semi_supervised,
    unsupervised,
)
from .study import Study, table

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        architecture.STUDY,
        augmentation.STUDY,
        cleaning.STUDY,
        federated.STUDY,
        few_shot.STUDY,
        penalties.STUDY,
        physics.STUDY,
        reinforcement.STUDY,
        schedules.STUDY,
        self_supervised.STUDY,
        semi_supervised.STUDY,
        unsupervised.STUDY,
    )
}

__all__ = ["STUDIES", "Study", "table"]
