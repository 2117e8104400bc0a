"""Ready problems with real data, one file a system."""

from types import ModuleType

from . import cleaning, few_shot, self_supervised, unsupervised
from .task import Task

TASKS: dict[str, ModuleType] = {
    "cleaning": cleaning,
    "few_shot": few_shot,
    "self_supervised": self_supervised,
    "unsupervised": unsupervised,
}

__all__ = ["TASKS", "Task", "cleaning", "few_shot", "self_supervised", "unsupervised"]
