"""Ready problems with real data, one file a system."""

from types import ModuleType

from . import cleaning, penalties, schedules
from .task import Task

TASKS: dict[str, ModuleType] = {
    "cleaning": cleaning,
    "penalties": penalties,
    "schedules": schedules,
}

__all__ = ["TASKS", "Task", "cleaning", "penalties", "schedules"]
