"""The cost of a computation: calls, operations, bytes, seconds and energy.

Calls are counted while a run makes them and are part of the statistics of every
estimate. The other costs are measured from outside, for a function and its arguments;
`compile_program` returns all of them but the energy.
"""

from .counts import COST_STATS, HVP_COST, VALUE_COST, cost_stats, outer_grad_cost
from .energy import Energy, Measurement, energy, measure
from .flops import Flops, WhileLoop, flops
from .memory import Memory, memory
from .program import CompiledProgram, compile_program

__all__ = [
    "COST_STATS",
    "HVP_COST",
    "VALUE_COST",
    "CompiledProgram",
    "Energy",
    "Flops",
    "Measurement",
    "Memory",
    "WhileLoop",
    "compile_program",
    "cost_stats",
    "energy",
    "flops",
    "measure",
    "memory",
    "outer_grad_cost",
]
