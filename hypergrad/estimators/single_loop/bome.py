"""BOME: the outer gradient, kept from spoiling the inner loss by a dynamic barrier."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ...method_summary import MethodSummary
from ...problem import Bilevel, EstimateData
from ...trees import add_scale, vdot
from ...validation import check_optimizer, check_positive_int, non_negative
from ..base import Estimate
from .shared import move, report, start
from .stocbio import WState
from .variance_reduction import fractions, plain_batches


class BOME(eqx.Module):
    """``(w, alpha)`` along ``grad M + mu grad q``, ``q = L(w, alpha) - L(w_m, alpha)``.

    ``w_m`` is ``num_steps`` of gradient descent from ``w``, held constant, and

        mu = max((eta |grad q|² - <grad M, grad q>) / |grad q|², 0),

    the least that makes ``q`` fall at the rate ``eta |grad q|²``.

    Args:
      optimizer: optax transformation that moves ``w``; the paper has one rate for ``w``
        and ``alpha``, which is `minimize`'s optimizer's.
      num_steps: m, static.
      step_size: of the descent to ``w_m``; data.
      eta: of the barrier, in (0, 1); data.

    Cost: ``m + 2`` gradients and an outer one, on a batch each; no product. Memory:
    three vectors like ``w``.

    Target: argmin. Bias: what ``w`` lags behind; the direction for ``alpha`` is no
    estimate of the hypergradient unless ``w`` moves as well. Never trusted of itself:
    `minimize`'s ``certify_every`` judges.

    Raises:
      TypeError: from `hypergradient`: one step says nothing; use `minimize`.

    Source: Liu, Ye, Wright, Stone & Liu 2022 (arXiv 2209.08709).

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1.0) ** 2)
    >>> trace = hg.minimize(
    ...     hg.Bilevel(inner, outer), hg.BOME(optax.sgd(0.1), 10, step_size=0.5),
    ...     optax.sgd(0.1), 0.0, 3.0, num_steps=1000,
    ... )
    >>> round(float(trace.alpha), 2)
    1.0
    """

    optimizer: optax.GradientTransformation = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    step_size: Array | float = eqx.field(
        kw_only=True, converter=non_negative("step_size")
    )
    eta: Array | float = eqx.field(
        default=0.5, kw_only=True, converter=non_negative("eta")
    )

    target = "argmin"
    is_single_loop = True
    citations = ("liu2022",)
    summary = (
        MethodSummary(
            "BOME(optimizer, m)",
            num_grads="m + 2",
            num_hvps="0",
            memory="3 w and the optimizer's",
            bias="what w lags behind",
            alpha_in=("losses",),
            recommended_for="inner problems with several minima, first derivatives only",
            not_recommended_for="noisy batches: the barrier is a ratio of what they show",
            reason="the value function's constraint as a barrier, nothing to invert",
        ),
    )

    def __check_init__(self):
        check_optimizer("optimizer", self.optimizer)
        check_positive_int("num_steps", self.num_steps)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """NaN: the direction belongs to a move of ``w``."""
        return float("nan")

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> WState:
        """From ``w``, or the start made of it."""
        del key
        w = start("BOME", problem, w, alpha)
        return WState(w, self.optimizer.init(w))

    def estimate(
        self, problem: Bilevel, state: WState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, WState]:
        """Both directions, on one batch of either loss, and a step along the first."""
        data = EstimateData.sample(problem, key)
        batch, outer_batch = plain_batches(data)
        gradient = jax.grad(problem.inner_loss, argnums=(0, 1))
        w = state.w

        descend = lambda _, y: add_scale(
            y, -self.step_size, gradient(y, alpha, batch)[0]
        )
        lower = jax.lax.fori_loop(0, self.num_steps, descend, w)
        of_w, of_alpha = gradient(w, alpha, batch)
        _, below = gradient(lower, alpha, batch)
        q = of_w, optax.tree.sub(of_alpha, below)
        value, *M = problem.outer_value_and_grads(w, alpha, outer_batch)

        square = vdot(q, q)
        excess = self.eta * square - vdot(tuple(M), q)
        mu = jnp.where(square > 0, excess / jnp.where(square > 0, square, 1), 0)
        for_w, for_alpha = add_scale(tuple(M), jnp.maximum(mu, 0), q)
        w, w_optimizer = move(self.optimizer, for_w, state.w_optimizer, w)
        inner, outer = fractions(data)
        estimate = report(
            data, value, for_alpha, state.w,
            gradient=of_w,
            num_grads=inner * (self.num_steps + 2), num_outer_grads=outer,
        )  # fmt: skip
        return estimate, WState(w, w_optimizer)
