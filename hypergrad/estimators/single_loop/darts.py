"""DARTS: ``w`` and ``alpha`` by turns, looking one step ahead."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ...drawn import drawn
from ...guide import Guide
from ...problem import Bilevel, draw
from ...trees import add_scaled, norm, scale
from ..protocol import Estimate
from .reduction import fractions
from .shared import check_optimizer, move, not_negative, report, start
from .steps import Series


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
    rests (``stats["inner_steps"]`` is 0): there ``alpha`` moves first.

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
        default=None, converter=not_negative("step_size", optional=True)
    )

    target = "argmin"
    single_loop = True
    citations = ("liu2019",)
    guide = (
        Guide(
            "DARTS(optimizer, step_size)",
            gradients="4",
            hvps="0",
            memory="3 w and the optimizer's",
            bias="takes H for I / step_size",
            sees=("losses",),
            use="architecture search, as published",
            avoid="where the indirect term counts: its size is a guess",
            why="one step ahead is cheap and often points the right way",
        ),
    )

    def __check_init__(self):
        check_optimizer("optimizer", self.optimizer)

    def error_factor(self, smallest: float, largest: float) -> float:
        """``|1 - step_size lambda|``: what a step leaves of the adjoint."""
        return Series(self.step_size or 0.0, 1).error_factor(smallest, largest)

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
        data = drawn(problem, key)
        gradient = jax.grad(problem.inner_loss, argnums=(0, 1))
        outer_batch = draw(data.outer_data, data.outer_key)
        of_w, _ = gradient(state.w, alpha, draw(data.inner_data, data.solver_key))
        moved = move(self.optimizer, of_w, state.w_optimizer, state.w)
        begun = state.step > 0  # alpha moves first
        w, w_optimizer = optax.tree.where(begun, moved, (state.w, state.w_optimizer))

        batch = draw(data.inner_data, data.inner_key)
        if self.step_size is None:
            value, _, direction = problem.outer_gradients(w, alpha, outer_batch)
            num_grads = 1
        else:
            ahead = add_scaled(w, -self.step_size, gradient(w, alpha, batch)[0])
            value, b, direct = problem.outer_gradients(ahead, alpha, outer_batch)
            length = norm(b)
            epsilon = 0.01 / jnp.where(length > 0, length, 1)
            plus, minus = (
                gradient(add_scaled(w, sign * epsilon, b), alpha, batch)[1]
                for sign in (1, -1)
            )
            difference = scale(0.5 / epsilon, optax.tree.sub(plus, minus))
            direction = add_scaled(direct, -self.step_size, difference)
            num_grads = 4
        inner, outer = fractions(data)
        estimate = report(
            data, value, direction, w,
            gradient=of_w, inner_steps=jnp.where(begun, 1, 0),
            num_grads=inner * num_grads, num_outer_grads=outer,
        )  # fmt: skip
        return estimate, DARTSState(w, w_optimizer, state.step + 1)
