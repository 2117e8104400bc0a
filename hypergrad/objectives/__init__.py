"""Several outer losses: aggregators, Pareto fronts and costs of models.

``hg.Bilevel(inner_loss, (M_1, ..., M_K), ...)`` has K values and K hypergradients, from
one inner solve, and ``hg.OuterLoop(..., aggregator=...)`` combines them into one
direction.

- `WeightedSum` and `SmoothTchebycheff` minimize a function of the values.
- `MGDA` and `UPGrad` lower all values together.
- `EPO` finds the Pareto optimum on a given ray.
- `AugmentedLagrangian` minimizes the first loss within limits on the others.
- `pareto_front` computes a Pareto front, `non_dominated` finds it among given points,
  and `hypervolume` measures it.
- `num_parameters`, `num_flops`, `activation_bytes`, `expected_cost` and `LatencyTable`
  are costs of a model as differentiable functions.

The weights of a sum may be hyperparameters of a third level, because
`hypergrad.argmin` can be nested. Write your own aggregator as in `Aggregator`.
"""

from .base import Aggregator
from .common_descent import MGDA, UPGrad
from .constraints import AugmentedLagrangian
from .front_measures import hypervolume, non_dominated
from .latency import LatencyTable
from .model_cost import activation_bytes, expected_cost, num_flops, num_parameters
from .pareto_front import pareto_front
from .preference import EPO
from .scalarization import SmoothTchebycheff, WeightedSum

__all__ = [
    "EPO",
    "MGDA",
    "Aggregator",
    "AugmentedLagrangian",
    "LatencyTable",
    "SmoothTchebycheff",
    "UPGrad",
    "WeightedSum",
    "activation_bytes",
    "expected_cost",
    "hypervolume",
    "non_dominated",
    "num_flops",
    "num_parameters",
    "pareto_front",
]
