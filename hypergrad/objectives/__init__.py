"""Several outer losses at once.

``hg.Bilevel(inner_loss, (M_1, ..., M_K), ...)`` has K values and K hypergradients, from
one inner solve; ``hg.minimize(..., aggregator=...)`` makes one direction of them.
`WeightedSum` and `SmoothTchebycheff` minimise a function of the values, `MGDA` and
`UPGrad` lower all values together, `EPO` seeks the Pareto optimum on a given ray,
`AugmentedLagrangian` lowers the first within limits on the others. `front` traces a
Pareto front, `non_dominated` finds it among points, `hypervolume` measures it. What a
model costs, as a differentiable function: `num_parameters`, `num_flops`,
`activation_bytes`, `expected_cost`, `num_labelled`, and what was measured, a
`LatencyTable`.

The weights of a sum may be hyperparameters themselves, of a third level:
`hypergrad.argmin` nests.
"""

from .base import Aggregator
from .common_descent import MGDA, UPGrad
from .constraints import AugmentedLagrangian
from .latency import LatencyTable
from .model_cost import (
    activation_bytes,
    expected_cost,
    num_flops,
    num_labelled,
    num_parameters,
)
from .pareto_front import hypervolume, non_dominated, pareto_front
from .preference import EPO
from .scalarization import SmoothTchebycheff, WeightedSum

__all__ = [
    "EPO",
    "MGDA",
    "AugmentedLagrangian",
    "Aggregator",
    "LatencyTable",
    "SmoothTchebycheff",
    "UPGrad",
    "WeightedSum",
    "activation_bytes",
    "expected_cost",
    "pareto_front",
    "hypervolume",
    "non_dominated",
    "num_flops",
    "num_labelled",
    "num_parameters",
]
