"""FSLA: a step of ``w``, then of the adjoint, then a direction with momentum."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ...method_summary import MethodSummary
from ...problem import Bilevel, EstimateData, sample_batch
from ...products import hvp
from ...validation import check_optimizer, in_unit_interval, or_schedule
from ..base import Estimate
from .directions import Point
from .inner_loops import total_direction
from .joint import JointState, begin, optimizers
from .shared import move, report
from .variance_reduction import at_step, fractions, storm


class Memory(eqx.Module):
    """The last direction, where it was taken, and how many there were."""

    direction: PyTree
    at: Point
    step: Array


class FSLA(eqx.Module):
    """``w``, then ``v``, then ``alpha`` by ``D(t) + momentum (d_{t-1} - D(t-1))``.

    Each reads what the one before has reached, on batches of its own; ``D`` is
    ``dM/dalpha - Jᵀ v``, and ``D(t-1)`` that of the last step's end, on ``D(t)``'s
    batches.

    Args:
      optimizer: optax transformation that moves ``w``.
      adjoint_optimizer: that moves ``v``; None means the same kind as ``optimizer``.
      momentum: a number in [0, 1], or a schedule of the step.

    Cost: a gradient, three Hessian-vector products (two for cross terms) and three
    outer gradients, on a batch each. Memory: SOBA's, and what it was a step before.

    Target: argmin. Bias: what ``w`` and ``v`` lag behind ``alpha``. Never trusted of
    itself: `minimize`'s ``certify_every`` judges.

    Raises:
      TypeError: from `hypergradient`: one step says nothing; use `minimize`.

    Source: Li, Gu & Huang 2022 (arXiv 2112.04660).

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1.0) ** 2)
    >>> trace = hg.minimize(
    ...     hg.Bilevel(inner, outer), hg.FSLA(optax.sgd(0.5)), optax.sgd(0.2),
    ...     0.0, 3.0, num_steps=100,
    ... )
    >>> round(float(trace.alpha), 3)
    1.0
    """

    optimizer: optax.GradientTransformation = eqx.field(static=True)
    adjoint_optimizer: optax.GradientTransformation | None = eqx.field(
        static=True, default=None
    )
    momentum: Array | float | Callable = eqx.field(
        default=0.9, kw_only=True, converter=or_schedule(in_unit_interval("momentum"))
    )

    target = "argmin"
    is_single_loop = True
    citations = ("li2022", "cutkosky2019")
    summary = (
        MethodSummary(
            "FSLA(optimizer)",
            num_grads="1",
            num_hvps="3",
            memory="4 w and the optimizers'",
            bias="what w and v lag behind",
            alpha_in=("losses",),
            recommended_for="noisy batches, where SOBA's alpha is restless",
            not_recommended_for="tight budgets: SOBA's step costs a third",
            reason="SOBA one after the other, with momentum in alpha",
        ),
    )

    def __check_init__(self):
        check_optimizer("optimizer", self.optimizer)
        check_optimizer("adjoint_optimizer", self.adjoint_optimizer, optional=True)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """0: exact where a run at one ``alpha`` settles."""
        return 0.0

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> JointState:
        """From ``w``, or the start made of it, and a zero adjoint."""
        del key
        state = begin("FSLA", optimizers(self), problem, w, alpha)
        at = Point(state.w, state.v, alpha)
        memory = Memory(optax.tree.zeros_like(alpha), at, jnp.asarray(0))
        return eqx.tree_at(
            lambda s: s.memory, state, memory, is_leaf=lambda x: x is None
        )

    def estimate(
        self, problem: Bilevel, state: JointState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, JointState]:
        """Three steps, one after the other."""
        data = EstimateData.sample(problem, key)
        of_w, of_v = optimizers(self)
        keys = jax.random.split(data.inner_key, 3)
        batches = [sample_batch(data.inner_data, key) for key in keys]
        keys = jax.random.split(data.outer_key)
        outer_batches = [sample_batch(data.outer_data, key) for key in keys]
        memory = state.memory

        gradient = jax.grad(problem.inner_loss)(state.w, alpha, batches[0])
        w, w_optimizer = move(of_w, gradient, state.w_optimizer, state.w)

        _, b, _ = problem.outer_value_and_grads(w, alpha, outer_batches[0])
        Hv = hvp(problem.inner_loss, w, alpha, batches[1], state.v)
        residual = optax.tree.sub(Hv, b)
        v, v_optimizer = move(of_v, residual, state.v_optimizer, state.v)

        def direction(at):
            value, _, direct = problem.outer_value_and_grads(
                at.w, at.alpha, outer_batches[1]
            )
            return value, total_direction(
                problem, at.w, at.v, at.alpha, direct, batches[2]
            )

        value, new = direction(Point(w, v, alpha))
        _, old = direction(memory.at)
        momentum = at_step(self.momentum, memory.step)
        momentum = jnp.where(memory.step == 0, 0.0, momentum)
        found = storm(new, old, memory.direction, momentum)

        inner, outer = fractions(data)
        estimate = report(
            data, value, found, w,
            gradient=gradient, residual=residual, b=b,
            num_grads=inner, num_hvps=3 * inner, num_outer_grads=3 * outer,
        )  # fmt: skip
        memory = Memory(found, Point(w, v, alpha), memory.step + 1)
        return estimate, JointState(w, v, w_optimizer, v_optimizer, memory)
