"""Names for authors of extensions: estimators, solvers, searchers and others.

The page *Write your own* of the documentation has a tested example of each kind:

- Estimator: `Estimator`, `Estimate`, `make_estimate`, `EstimateData`, `cost_stats`.
- Single-loop method: `SingleLoop`, `SingleLoopState`, `Step`, `sample_batches`,
  `sample_in_pass`, `batch_fractions`.
- Inner solver: `InnerSolver`, `IterativeSolver`, `inner_stats`, `run_inner_steps`.
- Linear solver: `SymmetricSolver`.
- Searcher: `Searcher`, `Trials`, `seed_from_key`.
- Aggregator: `Aggregator`.
- Surrogate: `Surrogate`, `Examples`, the functions ``*_examples`` that check input,
  `weighted_mean`, `safe_divide`.

The other names serve several kinds: batches of data, second-order products, checks of
arguments, and `MethodSummary`, the row of a method in the guide.
`hypergrad.testing.check_estimator` tests an estimator and the solvers within it.

>>> import jax.numpy as jnp, hypergrad as hg
>>> loss = lambda w, alpha, batch: jnp.sum(alpha * w**2)
>>> hg.extend.hvp(loss, jnp.ones(2), jnp.array([1.0, 3.0]), None, jnp.ones(2)).tolist()
[2.0, 6.0]
"""

from .batches import (
    Data,
    at_draw,
    batch_fraction,
    full_batch,
    is_sampled,
    num_examples,
    sample_batch,
    sample_fixed_batch,
    sample_in_pass,
)
from .checks.problem import check_alpha_has_gradient, check_problem
from .cost import cost_stats
from .estimators.base import STATS, Estimate, Estimator, make_estimate
from .estimators.single_loop import (
    SingleLoop,
    SingleLoopState,
    Step,
    batch_fractions,
    sample_batches,
)
from .inner.base import InnerSolver, IterativeSolver, inner_stats
from .inner.descent import run_inner_steps
from .linear.base import SymmetricSolver
from .method_summary import MethodSummary
from .number_checks import (
    check_positive_int,
    float_converter,
    in_unit_interval,
    non_negative,
    positive,
)
from .objectives.base import Aggregator
from .problem import EstimateData
from .products import (
    cross_jvp,
    cross_vjp,
    gauss_newton_product,
    hvp,
    hvp_and_cross_vjp,
    pushforward,
)
from .searchers.base import Searcher, Trials, seed_from_key
from .surrogates.base import Surrogate, safe_divide, weighted_mean
from .surrogates.inputs import (
    Examples,
    binary_examples,
    elementwise_examples,
    graded_examples,
    multiclass_examples,
    multilabel_examples,
)
from .trees import without_derivative
from .validation import check_hashable, check_optimizer, check_solver

__all__ = [
    "STATS",
    "Aggregator",
    "Data",
    "Estimate",
    "EstimateData",
    "Estimator",
    "Examples",
    "InnerSolver",
    "IterativeSolver",
    "MethodSummary",
    "Searcher",
    "SingleLoop",
    "SingleLoopState",
    "Step",
    "Surrogate",
    "SymmetricSolver",
    "Trials",
    "at_draw",
    "batch_fraction",
    "batch_fractions",
    "binary_examples",
    "check_alpha_has_gradient",
    "check_hashable",
    "check_optimizer",
    "check_positive_int",
    "check_problem",
    "check_solver",
    "cost_stats",
    "cross_jvp",
    "cross_vjp",
    "elementwise_examples",
    "float_converter",
    "full_batch",
    "gauss_newton_product",
    "graded_examples",
    "hvp",
    "hvp_and_cross_vjp",
    "in_unit_interval",
    "inner_stats",
    "is_sampled",
    "make_estimate",
    "multiclass_examples",
    "multilabel_examples",
    "non_negative",
    "num_examples",
    "positive",
    "pushforward",
    "run_inner_steps",
    "safe_divide",
    "sample_batch",
    "sample_batches",
    "sample_fixed_batch",
    "sample_in_pass",
    "seed_from_key",
    "weighted_mean",
    "without_derivative",
]
