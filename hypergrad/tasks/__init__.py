"""Ready problems with real data, one file a system."""

from types import ModuleType

from . import (
    architecture,
    augmentation,
    cleaning,
    penalties,
    schedules,
    semi_supervised,
)
from .task import Task

TASKS: dict[str, ModuleType] = {
    "architecture": architecture,
    "augmentation": augmentation,
    "cleaning": cleaning,
    "penalties": penalties,
    "schedules": schedules,
    "semi_supervised": semi_supervised,
}

__all__ = [
    "TASKS",
    "Task",
    "architecture",
    "augmentation",
    "cleaning",
    "penalties",
    "schedules",
    "semi_supervised",
]
