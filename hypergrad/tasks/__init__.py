"""Ready problems with real data, one file a system."""

from types import ModuleType

from . import cleaning, unsupervised
from .task import Task

TASKS: dict[str, ModuleType] = {
    "cleaning": cleaning,
    "unsupervised": unsupervised,
}

__all__ = ["TASKS", "Task", "cleaning", "unsupervised"]
