"""The mean of several draws of an estimate, and how far they scatter."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..certificate import TRUST_RTOL
from ..problem import Bilevel
from ..trees import all_finite
from ..validation import check_estimator_type, check_positive_int
from .base import Estimate
from .error_estimates import standard_error

# How a statistic of the mean is made from those of its draws; all others are summed.
REDUCED = {
    "num_inner_steps": jnp.max,
    "inner_grad_norm": jnp.max,
    "adjoint_residual": jnp.max,
    "ritz_min": jnp.min,
    "ritz_max": jnp.max,
    "error_estimate": jnp.max,
    "distance_to_implicit": jnp.max,
}


class Average(eqx.Module):
    """``h = mean_i h_i`` over n draws of an estimate, with its standard error.

    Each draw has its own key, so its own batches, episodes and noise, and its own warm
    start. ``standard_error`` is ``sqrt(sum_i ||h_i - h||² / (n (n - 1))) / ||h||``.

    Args:
      estimator: any whose estimates depend on the key: `Implicit` with batch sizes, a
        stochastic inner loop under `Unrolled`, a problem with ``draw``, `Evolution`.
      num_samples: n, at least 2.

    Cost: n estimates, as one batch. Memory: n estimates'.

    Target: the estimator's. Bias: the estimator's own; averaging makes the spread
    smaller as ``1 / sqrt(n)``, not the bias: the mean of solutions on batches is not
    the solution on all data, and no number of draws shows that. Trusted where every
    draw is and the standard error is at most 1e-2, which judges the spread alone. Value
    and ``w`` are means over the draws.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> inner = lambda w, alpha, batch: jnp.mean((w - alpha * batch) ** 2)
    >>> outer = lambda w, alpha, batch: (w - 1.0) ** 2
    >>> data = hg.Batches(jnp.arange(1.0, 101.0) / 50)
    >>> estimator = hg.Implicit(hg.Newton(), adjoint_batch_size=10)
    >>> average = hg.Average(estimator, num_samples=8)
    >>> problem = hg.Bilevel(inner, outer, data)
    >>> estimate = hg.hypergradient(problem, average)(0.0, 2.0)
    >>> bool(0.01 < estimate.stats["standard_error"] < 0.2)
    True
    """

    estimator: Any
    num_samples: int = eqx.field(static=True, default=8)

    citations = ()

    def __check_init__(self):
        check_estimator_type(self.estimator)
        check_positive_int("num_samples", self.num_samples, minimum=2)

    @property
    def single_loop(self) -> bool:
        """The estimator's."""
        return getattr(self.estimator, "is_single_loop", False)

    @property
    def target(self) -> str:
        """The estimator's."""
        return self.estimator.target

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """The estimator's."""
        return self.estimator.error_bound(eig_min, eig_max)

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> Any:
        """A state for each draw."""
        keys = jax.random.split(
            jax.random.key(0) if key is None else key, self.num_samples
        )
        first = lambda key: self.estimator.init(problem, w, alpha, key)
        return jax.vmap(first)(keys)

    def estimate(
        self, problem: Bilevel, state: Any, alpha: PyTree, key: Array
    ) -> tuple[Estimate, Any]:
        """The estimate of each draw, and their mean."""
        keys = jax.random.split(key, self.num_samples)
        one = lambda state, key: self.estimator.estimate(problem, state, alpha, key)
        draws, state = jax.vmap(one)(state, keys)
        mean = lambda tree: jax.tree.map(lambda x: jnp.mean(x, axis=0), tree)
        hypergradient = mean(draws.hypergradient)
        several = problem.num_objectives is not None
        spread = standard_error(draws.hypergradient, hypergradient, several)
        stats = {
            name: REDUCED.get(name, jnp.sum)(column)
            for name, column in draws.stats.items()
        }
        stats["standard_error"] = spread
        stats["trusted"] = (
            jnp.all(draws.stats["trusted"])
            & (spread <= TRUST_RTOL)
            & all_finite(hypergradient)
        )
        estimate = Estimate(mean(draws.value), hypergradient, mean(draws.w), stats)
        return estimate, state
