"""What a computation costs: calls, operations, bytes, seconds, energy.

The ledger counts calls as a run goes and is in the stats of every estimate. The rest is
measured from outside, on a function and its arguments: `compiled` tells all of it.
"""

from .counts import COST_STATS, HVP_COST, VALUE_COST, cost_stats, outer_grad_cost
from .energy import Energy, Measurement, energy, measure
from .flops import Flops, Loop, flops
from .memory import Memory, memory
from .program import CompiledProgram, compile_program

__all__ = [
    "COST_STATS",
    "HVP_COST",
    "VALUE_COST",
    "Energy",
    "Flops",
    "Loop",
    "Memory",
    "CompiledProgram",
    "Measurement",
    "compile_program",
    "energy",
    "flops",
    "cost_stats",
    "measure",
    "memory",
    "outer_grad_cost",
]
