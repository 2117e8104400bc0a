"""FSLA, a fully single-loop algorithm (Li, Gu & Huang 2022)."""

from collections.abc import Callable
from dataclasses import replace

import equinox as eqx
import jax
import optax
from jaxtyping import Array, PyTree

from ...method_summary import MethodSummary
from ...number_checks import below_one, or_schedule
from ...problem import Bilevel, EstimateData
from ...products import hvp
from ...runtime.equal_optimizers import first_equal
from .base import SingleLoop, SingleLoopState, Step, batch_fractions
from .inner_loops import alpha_direction, sample_streams
from .variance_reduction import Point, storm_estimate, storm_momentum


class FSLA(SingleLoop):
    """Moves ``w``, then ``v``, then ``alpha`` along a direction with momentum (STORM).

    Each update uses the result of the one before it, on batches of its own:

        w <- w - rho dL/dw
        v <- v - rho (H v - b),   b = dM/dw
        d_t = D(t) + momentum (d_{t-1} - D(t-1)),   D = dM/dalpha - J' v

    ``D(t-1)`` is evaluated at the end of the previous step on the batches of ``D(t)``.
    `minimize` moves ``alpha`` along ``d_t``. The statistics ``inner_grad_norm`` and
    ``adjoint_residual`` are those of ``dL/dw`` and ``H v - b`` in these lines, each
    before the step that is made along it.

    Args:
      optimizer: Optax transformation for ``w``.
      adjoint_optimizer: Optax transformation for ``v``. Defaults to ``optimizer``.
      momentum: A number in [0, 1), or a schedule of the outer step with such values.
        With 1 the error of the initial batch would remain. Defaults to 0.9.

    Cost: one gradient, three Hessian-vector products (two for cross terms) and three
      outer gradients; each on one batch.
    Memory: that of SOBA, and its values of the previous step.
    Bias: the lag of ``w`` and ``v`` behind ``alpha``. Target: argmin.

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

    adjoint_optimizer: optax.GradientTransformation | None = eqx.field(
        static=True, default=None, converter=first_equal
    )
    momentum: Array | float | Callable = eqx.field(
        default=0.9, kw_only=True, converter=or_schedule(below_one("momentum"))
    )

    uses_adjoint = True
    citations = ("li2022", "cutkosky2019")
    summary = (
        MethodSummary(
            "FSLA(optimizer)",
            num_grads="1",
            num_hvps="3",
            memory="4 w and the optimizers'",
            bias="what w and v lag behind",
            alpha_in=("losses",),
            recommended_for="noisy batches, if alpha of SOBA is too noisy",
            not_recommended_for="tight budgets: a step of SOBA costs a third",
            reason="SOBA with sequential updates and momentum in alpha",
        ),
    )

    def init_memory(
        self, problem: Bilevel, state: SingleLoopState, alpha: PyTree
    ) -> tuple[PyTree, Point]:
        """Returns a zero direction, which the first step does not use, and its point.

        They stand for the previous direction of ``alpha`` and where it was evaluated.
        """
        return optax.tree.zeros_like(alpha), Point(state.w, state.v, alpha)

    def step(
        self,
        problem: Bilevel,
        state: SingleLoopState,
        alpha: PyTree,
        data: EstimateData,
    ) -> tuple[Step, SingleLoopState]:
        """Makes the three steps, one after the other."""
        w_batch, v_batch, cross_batch = sample_streams(
            data.inner_data, data.inner_key, "w", "v", "direction"
        )
        b_batch, direct_batch = sample_streams(
            data.outer_data, data.outer_key, "v", "direction"
        )
        previous_direction, previous_point = state.memory

        # w <- w - rho dL/dw
        inner_grad = jax.grad(problem.inner_loss)(state.w, alpha, w_batch)
        state = self.move_w(state, inner_grad)

        # v <- v - rho (H v - b)
        _, b, _ = problem.outer_value_and_grads(state.w, alpha, b_batch)
        Hv = hvp(problem.inner_loss, state.w, alpha, v_batch, state.v)
        residual = optax.tree.sub(Hv, b)
        state = self.move_v(state, residual)

        def evaluate(p: Point) -> tuple[Array, PyTree]:
            """Returns the outer value and ``dM/dalpha - J' v`` at a point."""
            value, _, direct = problem.outer_value_and_grads(p.w, p.alpha, direct_batch)
            return value, alpha_direction(
                problem, p.w, p.v, p.alpha, direct, cross_batch
            )

        # d_t = D(t) + momentum (d_{t-1} - D(t-1))
        point = Point(state.w, state.v, alpha)
        value, new = evaluate(point)
        _, old = evaluate(previous_point)
        momentum = storm_momentum(self.momentum, state.num_steps)
        direction = storm_estimate(new, old, previous_direction, momentum)

        inner_fraction, outer_fraction = batch_fractions(data)
        counts = {
            "num_grads": inner_fraction,
            "num_hvps": 3 * inner_fraction,
            "num_outer_grads": 3 * outer_fraction,
        }
        step = Step(value, direction, state.w, inner_grad, counts, residual, b)
        return step, replace(state, memory=(direction, point))
