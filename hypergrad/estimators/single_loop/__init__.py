"""Single-loop estimators, which move ``w`` and ``alpha`` in the same loop.

`SingleLoop` is their base class; its docstring shows how to write a method.
"""

from .amigo import AmIGO
from .base import (
    SingleLoop,
    SingleLoopState,
    Step,
    batch_fractions,
    sample_batches,
    value_at_step,
)
from .bome import BOME
from .darts import DARTS
from .f2sa import F2SA
from .fsla import FSLA
from .mrbo import MRBO
from .pzobo import PZOBO
from .saba import SABA
from .soba import SOBA
from .srba import SRBA
from .stocbio import StocBiO
from .sustain import SUSTAIN
from .ttsa import TTSA
from .vrbo import VRBO

__all__ = [
    "BOME",
    "DARTS",
    "F2SA",
    "FSLA",
    "MRBO",
    "PZOBO",
    "SABA",
    "SOBA",
    "SRBA",
    "SUSTAIN",
    "TTSA",
    "VRBO",
    "AmIGO",
    "SingleLoop",
    "SingleLoopState",
    "Step",
    "StocBiO",
    "batch_fractions",
    "sample_batches",
    "value_at_step",
]
