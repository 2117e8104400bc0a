"""Ready problems with real data, one file a system."""

from types import ModuleType

from . import cleaning, penalties
from .task import Task

TASKS: dict[str, ModuleType] = {
    "cleaning": cleaning,
    "penalties": penalties,
}

__all__ = ["TASKS", "Task", "cleaning", "penalties"]
