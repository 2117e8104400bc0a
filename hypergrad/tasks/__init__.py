"""Ready problems with real data, one file a system."""

from types import ModuleType

from . import cleaning, reinforcement
from .task import Task

TASKS: dict[str, ModuleType] = {
    "cleaning": cleaning,
    "reinforcement": reinforcement,
}

__all__ = ["TASKS", "Task", "cleaning", "reinforcement"]
