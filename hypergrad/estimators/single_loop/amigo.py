"""AmIGO: some steps of ``w``, some of the adjoint, each from where they were."""

import equinox as eqx
import jax
import optax
from jaxtyping import Array, PyTree

from ...method_summary import MethodSummary
from ...problem import Bilevel, EstimateData, sample_batch
from ...validation import check_optimizer, check_positive_int
from ..base import Estimate
from .inner_loops import descend, follow, total_direction
from .joint import JointState, begin, optimizers
from .shared import report
from .variance_reduction import fractions


class AmIGO(eqx.Module):
    """Steps of ``w``, steps of ``v``, and ``dM/dalpha - Jᵀ v`` at their end.

    ``w <- w - rho dL/dw`` and then ``v <- v - rho (H v - b)``, each step on a fresh
    batch but for ``b = dM/dw``, which one outer batch gives.

    Args:
      optimizer: optax transformation that moves ``w``.
      num_steps: m, of ``w``, static.
      num_adjoint_steps: n, of ``v``, static.
      adjoint_optimizer: that moves ``v``; None means the same kind as ``optimizer``.

    Cost: m gradients, n + 1 Hessian-vector products (the last for the cross term) and
    an outer gradient, on a batch each. Memory: SOBA's.

    Target: argmin. Bias: what ``w`` and ``v`` lag behind ``alpha``. Never trusted of
    itself: `minimize`'s ``certify_every`` judges.

    Raises:
      TypeError: from `hypergradient`: one step says nothing; use `minimize`.

    Source: Arbel & Mairal 2022 (arXiv 2111.14580).

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1.0) ** 2)
    >>> trace = hg.minimize(
    ...     hg.Bilevel(inner, outer), hg.AmIGO(optax.sgd(0.5), 5, 5), optax.sgd(0.2),
    ...     0.0, 3.0, num_steps=100,
    ... )
    >>> round(float(trace.alpha), 3)
    1.0
    """

    optimizer: optax.GradientTransformation = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    num_adjoint_steps: int = eqx.field(static=True)
    adjoint_optimizer: optax.GradientTransformation | None = eqx.field(
        static=True, default=None
    )

    target = "argmin"
    is_single_loop = True
    citations = ("arbel2022",)
    summary = (
        MethodSummary(
            "AmIGO(optimizer, m, n)",
            num_grads="m",
            num_hvps="n + 1",
            memory="2 w and the optimizers'",
            bias="what w and v lag behind",
            alpha_in=("losses",),
            recommended_for="ill-conditioned problems where one step of w and v each is too few",
            not_recommended_for="tight budgets: m + 2 n a step",
            reason="SOBA with several steps, warm in w and in the adjoint",
        ),
    )

    def __check_init__(self):
        check_optimizer("optimizer", self.optimizer)
        check_optimizer("adjoint_optimizer", self.adjoint_optimizer, optional=True)
        check_positive_int("num_steps", self.num_steps)
        check_positive_int("num_adjoint_steps", self.num_adjoint_steps)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """0: exact where a run at one ``alpha`` settles."""
        return 0.0

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> JointState:
        """From ``w``, or the start made of it, and a zero adjoint."""
        del key
        return begin("AmIGO", optimizers(self), problem, w, alpha)

    def estimate(
        self, problem: Bilevel, state: JointState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, JointState]:
        """Both loops, then the direction at their end."""
        data = EstimateData.sample(problem, key)
        of_w, of_v = optimizers(self)
        w, w_optimizer, gradient = descend(
            problem, of_w, state.w, state.w_optimizer, alpha,
            data.inner_data, data.solver_key, self.num_steps,
        )  # fmt: skip
        cross_key, adjoint_key = jax.random.split(data.inner_key)
        outer_batch = sample_batch(data.outer_data, data.outer_key)
        value, b, direct = problem.outer_value_and_grads(w, alpha, outer_batch)
        v, v_optimizer, residual = follow(
            problem, of_v, w, state.v, state.v_optimizer, alpha, b,
            data.inner_data, adjoint_key, self.num_adjoint_steps,
        )  # fmt: skip
        batch = sample_batch(data.inner_data, cross_key)
        direction = total_direction(problem, w, v, alpha, direct, batch)
        inner, outer = fractions(data)
        estimate = report(
            data, value, direction, w,
            gradient=gradient, residual=residual, b=b, num_inner_steps=self.num_steps,
            num_grads=inner * self.num_steps,
            num_hvps=inner * (self.num_adjoint_steps + 1),
            num_outer_grads=outer,
        )  # fmt: skip
        return estimate, JointState(w, v, w_optimizer, v_optimizer, None)
