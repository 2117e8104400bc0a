"""Ready problems with real data, one file a system."""

from types import ModuleType

from . import augmentation, cleaning, semi_supervised
from .task import Task

TASKS: dict[str, ModuleType] = {
    "augmentation": augmentation,
    "cleaning": cleaning,
    "semi_supervised": semi_supervised,
}

__all__ = ["TASKS", "Task", "augmentation", "cleaning", "semi_supervised"]
