"""TTSA: a step of ``w``, a randomly truncated series, a slower step of ``alpha``."""

import equinox as eqx
import jax
import optax
from jaxtyping import Array, PyTree

from ...method_summary import MethodSummary
from ...problem import Bilevel, EstimateData, sample_batch
from ...validation import check_optimizer, check_positive_int, non_negative
from ..base import Estimate
from .inner_loops import Series, descend, total_direction
from .shared import report, start
from .stocbio import WState
from .variance_reduction import fractions


class TTSA(eqx.Module):
    """One step of ``w``, then ``dM/dalpha - Jᵀ v`` there with ``v`` of random length.

    ``v = K step_size prod_{i <= p} (I - step_size H_i) b`` with p drawn uniformly from
    0 to K - 1, every ``H_i`` on a fresh batch: in expectation the series of K terms.

    Args:
      optimizer: optax transformation that moves ``w``, on the faster timescale; the
        optimizer given to `minimize` is on the slower one.
      num_terms: K, static.
      step_size: of the series, at most ``1 / lambda_max``; data.

    Cost: one gradient, ``(K + 1) / 2`` Hessian-vector products on average (the cross
    term counts as one) and an outer gradient, on a batch each. Memory: two vectors like
    ``w``.

    Target: argmin. Bias: what ``w`` lags behind, and of the adjoint
    ``(1 - step_size lambda)^K``; the random length adds noise. Never trusted of
    itself: `minimize`'s ``certify_every`` judges.

    Raises:
      TypeError: from `hypergradient`: one step says nothing; use `minimize`.

    Source: Hong, Wai, Wang & Yang 2023 (arXiv 2007.05170); its series is
    Ghadimi & Wang 2018's.

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1.0) ** 2)
    >>> trace = hg.minimize(
    ...     hg.Bilevel(inner, outer), hg.TTSA(optax.sgd(0.5), 10, step_size=0.5),
    ...     optax.sgd(0.02), 0.0, 3.0, num_steps=1000,
    ... )
    >>> round(float(trace.alpha), 2)
    1.0
    """

    optimizer: optax.GradientTransformation = eqx.field(static=True)
    num_terms: int = eqx.field(static=True)
    step_size: Array | float = eqx.field(
        kw_only=True, converter=non_negative("step_size")
    )

    target = "argmin"
    is_single_loop = True
    citations = ("hong2023",)
    summary = (
        MethodSummary(
            "TTSA(optimizer, K)",
            num_grads="1",
            num_hvps="(K + 1) / 2",
            memory="2 w and the optimizer's",
            bias="what w lags behind, q^K",
            alpha_in=("losses",),
            recommended_for="a baseline: the first single loop with a rate",
            not_recommended_for="anything else: its series is noisy",
            reason="two timescales, nothing kept but w",
        ),
    )

    def __check_init__(self):
        check_optimizer("optimizer", self.optimizer)
        check_positive_int("num_terms", self.num_terms)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """NaN: a single estimate is as noisy as its length is random."""
        return float("nan")

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> WState:
        """From ``w``, or the start made of it."""
        del key
        w = start("TTSA", problem, w, alpha)
        return WState(w, self.optimizer.init(w))

    def estimate(
        self, problem: Bilevel, state: WState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, WState]:
        """A step, then the direction there."""
        data = EstimateData.sample(problem, key)
        w, w_optimizer, gradient = descend(
            problem, self.optimizer, state.w, state.w_optimizer, alpha,
            data.inner_data, data.solver_key, 1,
        )  # fmt: skip
        cross_key, series_key = jax.random.split(data.inner_key)
        outer_batch = sample_batch(data.outer_data, data.outer_key)
        value, b, direct = problem.outer_value_and_grads(w, alpha, outer_batch)
        series = Series(self.step_size, self.num_terms, random=True)
        v, products = series(problem, w, alpha, b, data.inner_data, series_key)
        batch = sample_batch(data.inner_data, cross_key)
        direction = total_direction(problem, w, v, alpha, direct, batch)
        inner, outer = fractions(data)
        estimate = report(
            data, value, direction, w,
            gradient=gradient,
            num_grads=inner, num_hvps=inner * (products + 1), num_outer_grads=outer,
        )  # fmt: skip
        return estimate, WState(w, w_optimizer)
