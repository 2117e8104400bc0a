"""Ready problems with real data, one file a system."""

from types import ModuleType

from . import cleaning, federated, physics, reinforcement
from .task import Task

TASKS: dict[str, ModuleType] = {
    "cleaning": cleaning,
    "federated": federated,
    "physics": physics,
    "reinforcement": reinforcement,
}

__all__ = ["TASKS", "Task", "cleaning", "federated", "physics", "reinforcement"]
