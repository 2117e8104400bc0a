"""Bilevel problems with real data, one module per task."""

from types import ModuleType

from . import (
    architecture,
    augmentation,
    cleaning,
    federated,
    few_shot,
    penalties,
    physics,
    reinforcement,
    schedules,
    self_supervised,
    semi_supervised,
    unsupervised,
)
from .task import Task

TASKS: dict[str, ModuleType] = {
    "architecture": architecture,
    "augmentation": augmentation,
    "cleaning": cleaning,
    "federated": federated,
    "few_shot": few_shot,
    "penalties": penalties,
    "physics": physics,
    "reinforcement": reinforcement,
    "schedules": schedules,
    "self_supervised": self_supervised,
    "semi_supervised": semi_supervised,
    "unsupervised": unsupervised,
}

__all__ = [
    "TASKS",
    "Task",
    "architecture",
    "augmentation",
    "cleaning",
    "federated",
    "few_shot",
    "penalties",
    "physics",
    "reinforcement",
    "schedules",
    "self_supervised",
    "semi_supervised",
    "unsupervised",
]
