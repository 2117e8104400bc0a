"""Saved runs of studies: loading, comparison, repetition, reports and export."""

from .compare import Difference, compare, have_equal_numbers
from .export import (
    ExportedRun,
    to_exported_runs,
    to_mlflow,
    to_tensorboard,
    trace_to_exported_run,
)
from .manifest import MODELS, Run, find, load, rerun, start_run
from .report import write_report

__all__ = [
    "MODELS",
    "Difference",
    "ExportedRun",
    "Run",
    "compare",
    "find",
    "have_equal_numbers",
    "load",
    "rerun",
    "start_run",
    "to_exported_runs",
    "to_mlflow",
    "to_tensorboard",
    "trace_to_exported_run",
    "write_report",
]
