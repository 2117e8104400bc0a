"""Ready problems with real data, one file a system."""

from types import ModuleType

from . import cleaning, physics, reinforcement
from .task import Task

TASKS: dict[str, ModuleType] = {
    "cleaning": cleaning,
    "physics": physics,
    "reinforcement": reinforcement,
}

__all__ = ["TASKS", "Task", "cleaning", "physics", "reinforcement"]
