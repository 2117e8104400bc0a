"""stocBiO, inner steps followed by a Neumann series (Ji, Yang & Liang 2021)."""

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from ...batches import sample_in_pass
from ...method_summary import MethodSummary
from ...number_checks import check_positive_int, positive
from ...problem import Bilevel, EstimateData
from .base import SingleLoop, SingleLoopState, Step, batch_fractions
from .inner_loops import StochasticNeumann, alpha_direction, run_w_steps


class StocBiO(SingleLoop):
    """Makes ``num_steps`` steps of ``w``, then approximates the adjoint by a series.

    The direction for ``alpha`` is ``dM/dalpha - J' v`` after the inner steps, with

        v = step_size sum_{k < K} prod_{i <= k} (I - step_size H_i) b,   b = dM/dw,

    where each ``H_i`` is the Hessian on a fresh batch. ``w`` continues from the
    previous outer step; ``v`` does not.

    Args:
      optimizer: Optax transformation for ``w``. A schedule in it counts the steps of
        ``w``, ``num_steps`` of them per outer step.
      num_steps: Number m of inner steps per outer step.
      num_terms: Number K of terms of the series.
      step_size: Step size of the series, at most ``1 / lambda_max``.

    Cost: m gradients, K Hessian-vector products (the cross term counts as one) and one
      outer gradient; each on one batch.
    Memory: three vectors like ``w``.
    Bias: the distance to the argmin that m steps leave, and the part
      ``(1 - step_size lambda)^K`` of the adjoint along each eigenvector of ``H``.
      Target: argmin.

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

    num_steps: int = eqx.field(static=True)
    num_terms: int = eqx.field(static=True)
    step_size: Array | float = eqx.field(kw_only=True, converter=positive("step_size"))

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
            not_recommended_for="tight budgets: m + 2 K gradients per step",
            reason="a series on fresh batches, recomputed at each step",
        ),
    )

    def __check_init__(self):
        check_positive_int("num_steps", self.num_steps)
        check_positive_int("num_terms", self.num_terms)

    @property
    def series(self) -> StochasticNeumann:
        """The series that approximates the adjoint."""
        return StochasticNeumann(self.step_size, self.num_terms)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """Returns ``q^K``, ``q = max |1 - step_size lambda|``."""
        return self.series.error_bound(eig_min, eig_max)

    def step(
        self,
        problem: Bilevel,
        state: SingleLoopState,
        alpha: PyTree,
        data: EstimateData,
    ) -> tuple[Step, SingleLoopState]:
        """Makes the inner steps and evaluates the direction after them."""
        return stocbio_step(
            self, self.num_steps, self.series, problem, state, alpha, data
        )


def stocbio_step(
    method: SingleLoop,
    num_steps: int,
    series: StochasticNeumann,
    problem: Bilevel,
    state: SingleLoopState,
    alpha: PyTree,
    data: EstimateData,
) -> tuple[Step, SingleLoopState]:
    """Makes ``num_steps`` steps of ``w``, then evaluates ``dM/dalpha - J' v`` there.

    Args:
      method: The method, which has the optimizer of ``w``.
      num_steps: Number of steps of ``w``.
      series: The series that approximates the adjoint ``v``.
      problem, state, alpha, data: As in `SingleLoop.step`.
    """
    # w <- w - rho dL/dw, num_steps times
    state, inner_grad = run_w_steps(method, problem, state, alpha, data, num_steps)
    w = state.w
    cross_key, series_key = jax.random.split(data.inner_key)
    outer_batch = sample_in_pass(data.outer_data, data.outer_key)
    value, b, direct = problem.outer_value_and_grads(w, alpha, outer_batch)
    # v = H^-1 b, approximately
    points, bs = ((w, alpha),), (b,)
    (v,), num_products = series.solve(problem, points, bs, data.inner_data, series_key)
    # dM/dalpha - J' v, with a batch that is independent of v
    batch = sample_in_pass(data.inner_data, cross_key)
    direction = alpha_direction(problem, w, v, alpha, direct, batch)
    inner_fraction, outer_fraction = batch_fractions(data)
    counts = {
        "num_grads": inner_fraction * num_steps,
        # One product more, for the cross term J' v.
        "num_hvps": inner_fraction * (num_products + 1),
        "num_outer_grads": outer_fraction,
    }
    step = Step(value, direction, w, inner_grad, counts, num_inner_steps=num_steps)
    return step, state
