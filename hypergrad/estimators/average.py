"""The mean of several samples of an estimate, and its standard error."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..batches import Data
from ..cost.counts import CALLS, COST_STATS, cost_stats, count_batch
from ..number_checks import check_positive_int
from ..problem import Bilevel, with_own_order
from ..trees import all_finite
from ..validation import check_estimator_type
from .base import Estimate, get_target, keys_of_samples, normalize_estimate
from .error_estimates import max_standard_error, standard_error

#: How a statistic of the mean is made from its samples; all others are summed.
REDUCTIONS = dict.fromkeys(COST_STATS, count_batch) | {
    "num_inner_steps": jnp.max,
    "inner_grad_norm": jnp.max,
    "adjoint_residual": jnp.max,
    "ritz_min": jnp.min,
    "ritz_max": jnp.max,
    "error_estimate": jnp.max,
    "distance_to_implicit": jnp.max,
}
TOTAL = "gradient_equivalents"


class Average(eqx.Module):
    """The mean ``h`` over n samples ``h_i`` of an estimate, with its standard error.

        h = 1/n sum_i h_i
        standard_error = sqrt(sum_i ||h_i - h||^2 / (n (n - 1))) / ||h||

    Each sample has its own key, and thus its own batches, data and noise, and its own
    warm start. ``value`` and ``w`` are means over the samples.

    Args:
      estimator: An estimator whose estimates depend on the key: `Implicit` with batch
        sizes, `Unrolled` with a stochastic inner loop, `Evolution`, or any estimator of
        a problem with ``data_fn``.
      num_samples: Number of samples (n), at least 2.

    Cost: n estimates, as one batch: of each kind of call n times the largest number
      that a sample makes.
    Memory: that of n estimates.
    Target: that of the estimator.
    Bias: that of the estimator. The average reduces the standard error as
      ``1 / sqrt(n)``, not the bias: the mean of solutions on batches is not the
      solution on all data, which no number of samples reveals. An estimate is trusted
      if every sample is, and the standard error is at most 1e-2, or so much less as
      Student's t distribution of n - 1 degrees of freedom is wider than a normal one:
      0.006 with four samples, 0.008 with eight. Two or three samples are trusted if
      they agree, with a standard error of at most 1e-5.

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
    def is_single_loop(self) -> bool:
        """True if the estimator is a single-loop method."""
        return getattr(self.estimator, "is_single_loop", False)

    @property
    def target(self) -> str:
        """The target of the estimator."""
        return get_target(self.estimator)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """Returns the bound of the estimator, or NaN if it has none."""
        error_bound = getattr(self.estimator, "error_bound", lambda *_: math.nan)
        return error_bound(eig_min, eig_max)

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> Any:
        """Returns a state of the estimator for each sample."""
        key = jax.random.key(0) if key is None else key
        init_sample = lambda key: self.estimator.init(problem, w, alpha, key)
        return jax.vmap(init_sample)(jax.random.split(key, self.num_samples))

    def estimate(
        self, problem: Bilevel, state: Any, alpha: PyTree, key: Array
    ) -> tuple[Estimate, Any]:
        """Returns the mean of n estimates, and the next states."""

        def sample(state, key, number):
            estimate, state = self.estimator.estimate(
                with_own_order(problem, number), state, alpha, key
            )
            return normalize_estimate(estimate), state

        keys, numbers = keys_of_samples(self, key), jnp.arange(self.num_samples)
        samples, state = jax.vmap(sample)(state, keys, numbers)
        data = eqx.filter_eval_shape(problem.sample_data, key)
        mean = lambda tree: jax.tree.map(lambda x: jnp.mean(x, axis=0), tree)
        hypergradient = mean(samples.hypergradient)
        is_multi_objective = problem.num_objectives is not None
        error = standard_error(samples.hypergradient, hypergradient, is_multi_objective)
        stats = {
            name: REDUCTIONS.get(name, jnp.sum)(column)
            for name, column in samples.stats.items()
            if name != "trusted"
        } | _cost_of_samples(samples.stats, *data)
        flags = {name: jnp.any(flag) for name, flag in samples.flags.items()}
        # A mean of finite samples may overflow.
        flags["not_finite"] = flags.get("not_finite", False) | ~all_finite(
            hypergradient
        )
        flags["standard_error"] = ~(error <= max_standard_error(self.num_samples))
        estimate = Estimate(
            mean(samples.value),
            hypergradient,
            mean(samples.w),
            stats | {"standard_error": error},
            flags,
        )
        return normalize_estimate(estimate), state


def _cost_of_samples(
    stats: dict[str, Array], inner_data: Data, outer_data: Data
) -> dict[str, Array]:
    """Returns the cost of the calls that are executed for a batch of estimates."""
    cost_of = lambda calls: cost_stats(inner_data, outer_data, **calls)[TOTAL]
    calls, charged = {name: stats[name] for name in CALLS}, stats[TOTAL]
    executed = {name: count_batch(column) for name, column in calls.items()}
    # An estimator of third parties may count no calls, or charge more than these.
    is_sum = jnp.all(jnp.abs(charged - cost_of(calls)) <= 1e-5 * charged)
    return {TOTAL: jnp.where(is_sum, cost_of(executed), count_batch(charged))}
