"""What a computation costs: calls, operations, bytes, seconds, energy.

The ledger counts calls as a run goes and is in the stats of every estimate. The rest is
measured from outside, on a function and its arguments: `compiled` tells all of it.
"""

from .energy import Energy, Spent, energy, measured
from .flops import Flops, Loop, flops
from .ledger import HVP, VALUE, ledger, outer_weight
from .memory import Memory, memory
from .program import Program, compiled

__all__ = [
    "HVP",
    "VALUE",
    "Energy",
    "Flops",
    "Loop",
    "Memory",
    "Program",
    "Spent",
    "compiled",
    "energy",
    "flops",
    "ledger",
    "measured",
    "memory",
    "outer_weight",
]
