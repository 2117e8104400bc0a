"""DARTS: ``w`` and ``alpha`` by turns, looking one step ahead."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ...method_summary import MethodSummary
from ...problem import Bilevel, EstimateData, sample_batch
from ...trees import add_scale, norm, scale
from ...validation import check_optimizer, non_negative
from ..base import Estimate
from .inner_loops import Series
from .shared import move, report, start
from .variance_reduction import fractions


class DARTSState(eqx.Module):
    """``w``, its optimizer's state, and steps made."""

    w: PyTree
    w_optimizer: PyTree
    step: Array


class DARTS(eqx.Module):
    """A step of ``w``, and ``dM(w - step_size dL/dw, alpha)/dalpha`` where it ends.

    The second-order direction, at ``w' = w - step_size dL/dw`` and with ``b = dM/dw``
    there, is

        dM/dalpha - step_size (dL/dalpha(w+) - dL/dalpha(w-)) / (2 epsilon),

    ``w± = w ± epsilon b``, ``epsilon = 0.01 / |b|``. With step size 0 it is of first
    order: ``dM/dalpha`` at ``w``, without the indirect term. At the first step ``w``
    rests (``stats["num_inner_steps"]`` is 0): there ``alpha`` moves first.

    Args:
      optimizer: optax transformation that moves ``w``.
      step_size: xi; the paper's is the rate of ``w``. None means first order.

    Cost: of second order four gradients and an outer one, on a batch each; of first
    order one and one. Memory: three vectors like ``w``.

    Target: argmin. Bias: takes ``H`` for ``1 / step_size``, and what ``w`` lags behind;
    of first order the whole indirect term. Never trusted of itself: `minimize`'s
    ``certify_every`` judges.

    Raises:
      TypeError: from `hypergradient`: one step says nothing; use `minimize`.

    Source: Liu, Simonyan & Yang 2019 (arXiv 1806.09055).

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1.0) ** 2)
    >>> trace = hg.minimize(
    ...     hg.Bilevel(inner, outer), hg.DARTS(optax.sgd(0.5), step_size=0.5),
    ...     optax.sgd(0.2), 0.0, 3.0, num_steps=100,
    ... )
    >>> round(float(trace.alpha), 3)
    1.0
    """

    optimizer: optax.GradientTransformation = eqx.field(static=True)
    step_size: Array | float | None = eqx.field(
        default=None, converter=non_negative("step_size", optional=True)
    )

    target = "argmin"
    is_single_loop = True
    citations = ("liu2019",)
    summary = (
        MethodSummary(
            "DARTS(optimizer, step_size)",
            num_grads="4",
            num_hvps="0",
            memory="3 w and the optimizer's",
            bias="takes H for I / step_size",
            alpha_in=("losses",),
            recommended_for="architecture search, as published",
            not_recommended_for="where the indirect term counts: its size is a guess",
            reason="one step ahead is cheap and often points the right way",
        ),
    )

    def __check_init__(self):
        check_optimizer("optimizer", self.optimizer)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """``|1 - step_size lambda|``: what a step leaves of the adjoint."""
        return Series(self.step_size or 0.0, 1).error_bound(eig_min, eig_max)

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> DARTSState:
        """From ``w``, or the start made of it."""
        del key
        w = start("DARTS", problem, w, alpha)
        return DARTSState(w, self.optimizer.init(w), jnp.asarray(0))

    def estimate(
        self, problem: Bilevel, state: DARTSState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, DARTSState]:
        """The step of ``w`` that follows the last of ``alpha``, and the direction."""
        data = EstimateData.sample(problem, key)
        gradient = jax.grad(problem.inner_loss, argnums=(0, 1))
        outer_batch = sample_batch(data.outer_data, data.outer_key)
        of_w, _ = gradient(
            state.w, alpha, sample_batch(data.inner_data, data.solver_key)
        )
        moved = move(self.optimizer, of_w, state.w_optimizer, state.w)
        begun = state.step > 0  # alpha moves first
        w, w_optimizer = optax.tree.where(begun, moved, (state.w, state.w_optimizer))

        batch = sample_batch(data.inner_data, data.inner_key)
        if self.step_size is None:
            value, _, direction = problem.outer_value_and_grads(w, alpha, outer_batch)
            num_grads = 1
        else:
            ahead = add_scale(w, -self.step_size, gradient(w, alpha, batch)[0])
            value, b, direct = problem.outer_value_and_grads(ahead, alpha, outer_batch)
            length = norm(b)
            epsilon = 0.01 / jnp.where(length > 0, length, 1)
            plus, minus = (
                gradient(add_scale(w, sign * epsilon, b), alpha, batch)[1]
                for sign in (1, -1)
            )
            difference = scale(0.5 / epsilon, optax.tree.sub(plus, minus))
            direction = add_scale(direct, -self.step_size, difference)
            num_grads = 4
        inner, outer = fractions(data)
        estimate = report(
            data, value, direction, w,
            gradient=of_w, num_inner_steps=jnp.where(begun, 1, 0),
            num_grads=inner * num_grads, num_outer_grads=outer,
        )  # fmt: skip
        return estimate, DARTSState(w, w_optimizer, state.step + 1)
