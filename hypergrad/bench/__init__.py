"""Tables of methods: what a table is, how it is run, checked, printed and exported.

A table is one file that defines ``table = hypergrad.bench.Table(...)``; a method is one
function ``(task, *, budget, key, **settings) -> Trace``. Nothing is registered: the
command ``hypergrad run`` finds a table by its file.
"""

from . import baselines
from .claims import Check, Claim, Comparison, Finding, Published
from .columns import Column
from .methods import MethodError, with_options
from .rows import Cell, Row, select
from .statistics import (
    Interval,
    Resplits,
    difference_interval,
    geometric_mean,
    mean_interval,
    ratio_interval,
)
from .table import BaseTable, MeasurementTable, Stage, Table

__all__ = [
    "BaseTable",
    "Cell",
    "Check",
    "Claim",
    "Column",
    "Comparison",
    "Finding",
    "Interval",
    "MeasurementTable",
    "MethodError",
    "Published",
    "Resplits",
    "Row",
    "Stage",
    "Table",
    "baselines",
    "difference_interval",
    "geometric_mean",
    "mean_interval",
    "ratio_interval",
    "select",
    "with_options",
]
