"""Ready problems with real data, one file a system."""

from types import ModuleType

from . import cleaning
from .task import Task

TASKS: dict[str, ModuleType] = {"cleaning": cleaning}

__all__ = ["TASKS", "Task", "cleaning"]
