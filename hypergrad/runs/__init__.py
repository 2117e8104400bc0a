"""Runs that are kept: what each was made of, two lined up, a page of one."""

from .compare import Difference, compare, same_numbers
from .export import Shown, of_run, of_trace, to_mlflow, to_tensorboard
from .manifest import MODELS, Run, again, find, load, start
from .report import report

__all__ = [
    "MODELS",
    "Difference",
    "Run",
    "Shown",
    "again",
    "compare",
    "find",
    "load",
    "of_run",
    "of_trace",
    "report",
    "same_numbers",
    "start",
    "to_mlflow",
    "to_tensorboard",
]
