"""What values ``alpha`` may take: one declaration for ``minimize`` and ``search``.

A space maps an unconstrained ``u``, on which the optimizer steps, to ``alpha``. A
pytree of spaces is shaped like ``alpha`` or is a prefix of it; None is ``Real()``.
``Integer`` and ``Choice`` have no ``u``: they are for ``search`` alone.
"""

from .continuous import Box, Interval, Positive, Real, Simplex, Space, Unit
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
