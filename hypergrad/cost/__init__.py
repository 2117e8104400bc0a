"""What a computation costs: calls, operations, bytes, seconds, energy.

The ledger counts calls as a run goes and is in the stats of every estimate. The rest is
measured from outside, on a function and its arguments.
"""

from .energy import Energy, Spent, energy, measured
from .flops import Flops, Loop, flops
from .ledger import HVP, VALUE, ledger, outer_weight
from .memory import Memory, memory

__all__ = [
    "HVP",
    "VALUE",
    "Energy",
    "Flops",
    "Loop",
    "Memory",
    "Spent",
    "energy",
    "flops",
    "ledger",
    "measured",
    "memory",
    "outer_weight",
]
