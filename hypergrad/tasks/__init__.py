"""Ready problems with real data, one file a system."""

from types import ModuleType

from . import architecture, augmentation, cleaning, semi_supervised
from .task import Task

TASKS: dict[str, ModuleType] = {
    "architecture": architecture,
    "augmentation": augmentation,
    "cleaning": cleaning,
    "semi_supervised": semi_supervised,
}

__all__ = [
    "TASKS",
    "Task",
    "architecture",
    "augmentation",
    "cleaning",
    "semi_supervised",
]
