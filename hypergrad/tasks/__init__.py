"""Ready problems with real data, one file a system."""

from types import ModuleType

from . import cleaning, few_shot, unsupervised
from .task import Task

TASKS: dict[str, ModuleType] = {
    "cleaning": cleaning,
    "few_shot": few_shot,
    "unsupervised": unsupervised,
}

__all__ = ["TASKS", "Task", "cleaning", "few_shot", "unsupervised"]
