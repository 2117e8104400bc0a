"""SOBA, the stochastic bilevel algorithm (Dagréou, Ablin, Vaiter & Moreau 2022)."""

from dataclasses import replace
from typing import Any

import equinox as eqx
import optax
from jaxtyping import Array, PyTree

from ...method_summary import MethodSummary
from ...problem import Bilevel, EstimateData
from ...runtime.all_cores import on_all_cores
from ...runtime.equal_optimizers import first_equal
from .base import SingleLoop, SingleLoopState, Step, batch_fractions, sample_batches
from .variance_reduction import InnerParts, OuterParts, Point, value_and_parts


class SOBA(SingleLoop):
    """Moves ``w``, the adjoint ``v`` and ``alpha`` by one stochastic step each.

    On one inner and one outer batch per step,

        w     <- w     - rho   dL/dw
        v     <- v     - rho   (H v - dM/dw)
        alpha <- alpha - gamma (dM/dalpha - J' v)

    with ``H = d2L/dw2`` and ``J = d2L/dw dalpha``. All three directions are evaluated
    at the same ``(w, v, alpha)``. `minimize` applies its optimizer to the third. With
    data that is not `Batches` the method is deterministic.

    ``w`` and ``v`` follow ``alpha`` only if it moves slowly. Begin with a rate ``rho``
    of about the inverse of the largest eigenvalue of ``H``, which ``ritz_max`` of
    ``Implicit(solver, CG(preconditioner=None))`` estimates, and with a rate of
    ``alpha`` at which ``certify_every`` reports a small ``error_estimate``; if that
    grows along the run, lower the rate of ``alpha``. If ``alpha`` has a weight per
    example, a step moves only the weights of its batch, so that ``error_estimate`` is
    large at any rate. Judge such runs by their values.

    Args:
      optimizer: Optax transformation for ``w``. The paper uses ``optax.sgd(rho)`` with
        a number or a schedule.
      adjoint_optimizer: Optax transformation for ``v``. Defaults to ``optimizer``.

    The statistic ``adjoint_residual`` is ``||H v - b|| / ||b||`` on the batches, with
    ``b = dM/dw``. ``value`` and ``w`` are those before the step.

    Cost: one Hessian-vector product, which also yields the inner gradient and the cross
      term, and one outer gradient; each on one batch.
    Memory: two vectors like ``w`` and the states of the optimizers.
    Bias: the lag of ``w`` and ``v`` behind ``alpha``, which vanishes as the run
      converges. Target: argmin.

    Source: Dagréou, Ablin, Vaiter & Moreau 2022 (arXiv 2201.13409), Algorithm 1.

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1.0) ** 2)
    >>> trace = hg.minimize(
    ...     hg.Bilevel(inner, outer), hg.SOBA(optax.sgd(0.5)), optax.sgd(0.2),
    ...     0.0, 3.0, num_steps=100,
    ... )
    >>> round(float(trace.alpha), 3), round(float(trace.w), 3)
    (1.0, 1.0)
    """

    adjoint_optimizer: optax.GradientTransformation | None = eqx.field(
        static=True, default=None, converter=first_equal
    )

    uses_adjoint = True
    citations = ("dagreou2022",)
    summary = (
        MethodSummary(
            "SOBA(optimizer)",
            num_grads="0",
            num_hvps="1",
            memory="2 w and the optimizers'",
            bias="what w and v lag behind",
            alpha_in=("losses",),
            recommended_for="large problems, mini-batches, w and alpha jointly",
            not_recommended_for="one accurate hypergradient; rates must be tuned",
            reason="w, the adjoint and alpha make one step each",
        ),
    )

    def step(
        self,
        problem: Bilevel,
        state: SingleLoopState,
        alpha: PyTree,
        data: EstimateData,
    ) -> tuple[Step, SingleLoopState]:
        """Makes one step on a batch of each loss."""
        batches = sample_batches(data)
        point = on_all_cores(Point(state.w, state.v, alpha), batches)
        value, (inner, outer) = value_and_parts(problem, point, batches)
        inner_fraction, outer_fraction = batch_fractions(data)
        counts = {"num_hvps": inner_fraction, "num_outer_grads": outer_fraction}
        return soba_step(self, state, value, inner, outer, counts)


def soba_step(
    method: SingleLoop,
    state: SingleLoopState,
    value: Array,
    inner: InnerParts,
    outer: OuterParts,
    counts: dict[str, Any],
    memory: Any = None,
) -> tuple[Step, SingleLoopState]:
    """Makes the three steps of SOBA along estimates of the derivatives.

    Args:
      method: The method, which has the optimizers of ``w`` and ``v``.
      state: State before the step, at which the derivatives were estimated.
      value: Outer value to report.
      inner, outer: Estimated derivatives of the two losses.
      counts: Cost of the estimates, as in `Step`.
      memory: Memory of the method after the step.
    """
    w_direction = inner.grad  # dL/dw
    v_direction = optax.tree.sub(inner.Hv, outer.b)  # H v - dM/dw
    alpha_direction = optax.tree.sub(outer.direct, inner.cross)  # dM/dalpha - J' v
    step = Step(
        value,
        alpha_direction,
        state.w,
        w_direction,
        counts,
        residual=v_direction,
        b=outer.b,
    )
    # w <- w - rho dL/dw and v <- v - rho (H v - dM/dw); minimize moves alpha.
    state = method.move_v(method.move_w(state, w_direction), v_direction)
    return step, replace(state, memory=memory)
