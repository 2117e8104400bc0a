"""Admissible values of ``alpha``, declared once for `minimize` and `search`.

A space maps an unconstrained variable ``u``, which the optimizer moves, to ``alpha``. A
pytree of spaces is structured like ``alpha`` or is a prefix of it, and None stands for
``Real()``. `Integer` and `Choice` have no unconstrained variable: only `search` takes
them. Write your own as in `Space`.
"""

from .base import Space
from .continuous import Box, Interval, Positive, Real, Simplex, Unit
from .discrete import Choice, Integer
from .pytree import check, contains, forward, inverse, project, sample
from .relaxations import gumbel_softmax, score_function, straight_through
from .unit_cube import Axis, axes, from_unit, to_unit

__all__ = [
    "Axis",
    "Box",
    "Choice",
    "Integer",
    "Interval",
    "Positive",
    "Real",
    "Simplex",
    "Space",
    "Unit",
    "axes",
    "check",
    "contains",
    "forward",
    "from_unit",
    "gumbel_softmax",
    "inverse",
    "project",
    "sample",
    "score_function",
    "straight_through",
    "to_unit",
]
