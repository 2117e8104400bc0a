"""SOBA: ``w``, the adjoint and ``alpha`` move together, a stochastic step each."""

import equinox as eqx
import optax
from jaxtyping import Array, PyTree

from ...method_summary import MethodSummary
from ...problem import Bilevel, EstimateData
from ...validation import check_optimizer
from ..base import Estimate
from .joint import JointState, advance, begin, optimizers, point
from .variance_reduction import fractions, plain


class SOBA(eqx.Module):
    """``w <- w - rho dL/dw``, ``v <- v - rho (H v - dM/dw)``; ``dM/dalpha - Jᵀ v``.

    The three directions are taken at the same ``(w, v, alpha)``, on one inner and one
    outer batch, which the problem's `Batches` draw; `minimize`'s optimizer takes the
    third. With plain data it is the deterministic method.

    Args:
      optimizer: optax transformation that moves ``w``; ``optax.sgd(rho)`` is the
        paper's, with a number or a schedule.
      adjoint_optimizer: that moves ``v``; None means the same kind as ``optimizer``.

    ``w`` and ``v`` follow ``alpha`` only where it is slow: begin with ``rho`` about
    ``1 / lambda_max`` and a rate of ``alpha`` at which ``certify_every`` finds a small
    ``error_estimate``; where that grows along the run, lower the rate of ``alpha``.

    Cost: one Hessian-vector product, which yields the inner gradient and the cross term
    too, and one outer gradient, on a batch each. Memory: two vectors like ``w`` and
    the optimizers' states.

    Target: argmin. Bias: what ``w`` and ``v`` lag behind ``alpha``; it vanishes where
    the run settles. Never trusted of itself: `minimize`'s ``certify_every`` judges.
    ``adjoint_residual`` is ``||H v - b|| / ||b||`` on the batches. ``value`` and ``w``
    are those before the step.

    Raises:
      TypeError: from `hypergradient`: one step says nothing; use `minimize`.

    Source: Dagréou, Ablin, Vaiter & Moreau 2022 (arXiv 2201.13409).

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

    optimizer: optax.GradientTransformation = eqx.field(static=True)
    adjoint_optimizer: optax.GradientTransformation | None = eqx.field(
        static=True, default=None
    )

    target = "argmin"
    is_single_loop = True
    citations = ("dagreou2022",)
    summary = (
        MethodSummary(
            "SOBA(optimizer)",
            num_grads="0",
            num_hvps="1",
            memory="2 w and the optimizers'",
            bias="what w and v lag behind",
            alpha_in=("losses",),
            recommended_for="large problems under hg.minimize, mini-batches, w and alpha jointly",
            not_recommended_for="one accurate hypergradient, rates that are hard to choose",
            reason="nothing is solved: w, the adjoint and alpha make one step each",
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
        return begin("SOBA", optimizers(self), problem, w, alpha)

    def estimate(
        self, problem: Bilevel, state: JointState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, JointState]:
        """The three directions, and a step along the first two."""
        data = EstimateData.sample(problem, key)
        parts = plain(problem, point(state, alpha), data)
        inner, outer = fractions(data)
        counts = {"num_hvps": inner, "num_outer_grads": outer}
        return advance(optimizers(self), state, None, data, parts, **counts)
