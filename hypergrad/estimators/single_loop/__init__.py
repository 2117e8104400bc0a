"""Estimators that never solve the inner problem: a few products a step, jointly."""

from .amigo import AmIGO
from .bome import BOME
from .darts import DARTS
from .f2sa import F2SA
from .fsla import FSLA
from .momentum import MRBO, SUSTAIN
from .pzobo import PZOBO
from .saba import SABA
from .soba import SOBA
from .srba import SRBA
from .stocbio import StocBiO
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
    "StocBiO",
]
