"""Runs that are kept: what each was made of, two lined up, a page of one."""

from .compare import Difference, compare, same_numbers
from .manifest import Run, again, find, load, start
from .report import report

__all__ = [
    "Difference",
    "Run",
    "again",
    "compare",
    "find",
    "load",
    "report",
    "same_numbers",
    "start",
]
