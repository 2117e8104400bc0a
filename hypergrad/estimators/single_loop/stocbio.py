"""StocBiO: some steps of ``w``, a truncated series, and one step of ``alpha``."""

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
from .variance_reduction import fractions


class WState(eqx.Module):
    """``w`` and its optimizer's state."""

    w: PyTree
    w_optimizer: PyTree


class StocBiO(eqx.Module):
    """``num_steps`` of ``w``, then ``dM/dalpha - Jᵀ v`` with ``v`` of ``num_terms``.

    ``v = step_size sum_{k < K} prod_{i <= k} (I - step_size H_i) b``, every ``H_i``
    on a fresh batch; ``w`` goes on from where it was.

    Args:
      optimizer: optax transformation that moves ``w``.
      num_steps: m, inner steps of an outer one, static.
      num_terms: K, static.
      step_size: eta of the series, at most ``1 / lambda_max``; data.

    Cost: m gradients, K Hessian-vector products with the cross term (which counts as
    one) and an outer gradient, on a batch each. Memory: three vectors like ``w``.

    Target: argmin. Bias: what m steps leave, and ``(1 - step_size lambda)^K`` of the
    adjoint along an eigenvector of H. Never trusted of itself: `minimize`'s
    ``certify_every`` judges.

    Raises:
      TypeError: from `hypergradient`: one step says nothing; use `minimize`.

    Source: Ji, Yang & Liang 2021 (arXiv 2010.07962).

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1.0) ** 2)
    >>> trace = hg.minimize(
    ...     hg.Bilevel(inner, outer), hg.StocBiO(optax.sgd(0.5), 5, 10, step_size=0.5),
    ...     optax.sgd(0.2), 0.0, 3.0, num_steps=100,
    ... )
    >>> round(float(trace.alpha), 3)
    1.0
    """

    optimizer: optax.GradientTransformation = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    num_terms: int = eqx.field(static=True)
    step_size: Array | float = eqx.field(
        kw_only=True, converter=non_negative("step_size")
    )

    target = "argmin"
    is_single_loop = True
    citations = ("ji2021",)
    summary = (
        MethodSummary(
            "StocBiO(optimizer, m, K)",
            num_grads="m",
            num_hvps="K",
            memory="3 w and the optimizer's",
            bias="what m steps leave, q^K",
            alpha_in=("losses",),
            recommended_for="a robust start: w stays close to the argmin",
            not_recommended_for="tight budgets: m + 2 K a step",
            reason="a series on fresh batches, forgotten after each step",
        ),
    )

    def __check_init__(self):
        check_optimizer("optimizer", self.optimizer)
        check_positive_int("num_steps", self.num_steps)
        check_positive_int("num_terms", self.num_terms)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """``q^K``: what K terms leave of the adjoint."""
        series = Series(self.step_size, self.num_terms)
        return series.error_bound(eig_min, eig_max)

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> WState:
        """From ``w``, or the start made of it."""
        del key
        w = start("StocBiO", problem, w, alpha)
        return WState(w, self.optimizer.init(w))

    def estimate(
        self, problem: Bilevel, state: WState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, WState]:
        """Inner steps, then the direction at their end."""
        data = EstimateData.sample(problem, key)
        w, w_optimizer, gradient = descend(
            problem, self.optimizer, state.w, state.w_optimizer, alpha,
            data.inner_data, data.solver_key, self.num_steps,
        )  # fmt: skip
        cross_key, series_key = jax.random.split(data.inner_key)
        outer_batch = sample_batch(data.outer_data, data.outer_key)
        value, b, direct = problem.outer_value_and_grads(w, alpha, outer_batch)
        series = Series(self.step_size, self.num_terms)
        v, products = series(problem, w, alpha, b, data.inner_data, series_key)
        batch = sample_batch(data.inner_data, cross_key)
        direction = total_direction(problem, w, v, alpha, direct, batch)
        inner, outer = fractions(data)
        estimate = report(
            data, value, direction, w,
            gradient=gradient, num_inner_steps=self.num_steps,
            num_grads=inner * self.num_steps,
            num_hvps=inner * (products + 1),
            num_outer_grads=outer,
        )  # fmt: skip
        return estimate, WState(w, w_optimizer)
