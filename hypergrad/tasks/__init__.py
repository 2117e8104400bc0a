"""Ready problems with real data, one file a system."""

from types import ModuleType

from . import cleaning, semi_supervised
from .task import Task

TASKS: dict[str, ModuleType] = {
    "cleaning": cleaning,
    "semi_supervised": semi_supervised,
}

__all__ = ["TASKS", "Task", "cleaning", "semi_supervised"]
