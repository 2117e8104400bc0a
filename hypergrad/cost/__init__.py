"""What a computation costs: calls, floating-point operations, bytes, energy.

The ledger counts calls as a run goes and is in the stats of every estimate. The rest is
measured from outside, on a function and its arguments.
"""

from .flops import Flops, Loop, flops
from .ledger import HVP, VALUE, ledger, outer_weight

__all__ = ["HVP", "VALUE", "Flops", "Loop", "flops", "ledger", "outer_weight"]
