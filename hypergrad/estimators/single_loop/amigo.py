"""AmIGO, amortized implicit gradient optimization (Arbel & Mairal 2022)."""

import equinox as eqx
import jax
import optax
from jaxtyping import PyTree

from ...batches import sample_in_pass
from ...method_summary import MethodSummary
from ...number_checks import check_positive_int
from ...problem import Bilevel, EstimateData
from ...products import hvp
from ...runtime.equal_optimizers import first_equal
from .base import SingleLoop, SingleLoopState, Step, batch_fractions
from .inner_loops import alpha_direction, run_w_steps, scan_with_first_output


class AmIGO(SingleLoop):
    """Makes several steps of ``w``, then several of ``v``, each from its last value.

    The steps are ``w <- w - rho dL/dw`` and then ``v <- v - rho (H v - b)``, each on a
    fresh batch, except for ``b = dM/dw``, which one outer batch determines. The
    direction for ``alpha`` is ``dM/dalpha - J' v`` after them.

    Args:
      optimizer: Optax transformation for ``w``. A schedule in it counts the steps of
        ``w``, ``num_steps`` of them per outer step.
      num_steps: Number m of steps of ``w`` per outer step.
      num_adjoint_steps: Number n of steps of ``v`` per outer step.
      adjoint_optimizer: Optax transformation for ``v``. Defaults to ``optimizer``.

    Cost: m gradients, n + 1 Hessian-vector products (the last one for the cross term)
      and one outer gradient; each on one batch.
    Memory: that of SOBA.
    Bias: the lag of ``w`` and ``v`` behind ``alpha``. Target: argmin.

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

    num_steps: int = eqx.field(static=True)
    num_adjoint_steps: int = eqx.field(static=True)
    adjoint_optimizer: optax.GradientTransformation | None = eqx.field(
        static=True, default=None, converter=first_equal
    )

    uses_adjoint = True
    citations = ("arbel2022",)
    summary = (
        MethodSummary(
            "AmIGO(optimizer, m, n)",
            num_grads="m",
            num_hvps="n + 1",
            memory="2 w and the optimizers'",
            bias="what w and v lag behind",
            alpha_in=("losses",),
            recommended_for="ill-conditioned problems: several steps of w and v each",
            not_recommended_for="tight budgets: m + 2 n gradients per step",
            reason="SOBA with several steps; w and the adjoint are warm-started",
        ),
    )

    def __check_init__(self):
        check_positive_int("num_steps", self.num_steps)
        check_positive_int("num_adjoint_steps", self.num_adjoint_steps)

    def step(
        self,
        problem: Bilevel,
        state: SingleLoopState,
        alpha: PyTree,
        data: EstimateData,
    ) -> tuple[Step, SingleLoopState]:
        """Runs both loops and evaluates the direction after them."""
        # w <- w - rho dL/dw, num_steps times
        state, inner_grad = run_w_steps(
            self, problem, state, alpha, data, self.num_steps
        )
        cross_key, adjoint_key = jax.random.split(data.inner_key)
        # All steps of v share b = dM/dw, which depends on w only.
        outer_batch = sample_in_pass(data.outer_data, data.outer_key)
        value, b, direct = problem.outer_value_and_grads(state.w, alpha, outer_batch)

        def move_adjoint(state, key, k):
            batch = sample_in_pass(
                data.inner_data, key, k, self.num_adjoint_steps, stream="v"
            )
            Hv = hvp(problem.inner_loss, state.w, alpha, batch, state.v)
            residual = optax.tree.sub(Hv, b)
            # v <- v - rho (H v - b)
            return self.move_v(state, residual), residual

        keys = jax.random.split(adjoint_key, self.num_adjoint_steps)
        state, residual = scan_with_first_output(move_adjoint, state, keys, b)
        # dM/dalpha - J' v
        batch = sample_in_pass(data.inner_data, cross_key)
        direction = alpha_direction(problem, state.w, state.v, alpha, direct, batch)
        inner_fraction, outer_fraction = batch_fractions(data)
        counts = {
            "num_grads": inner_fraction * self.num_steps,
            # One product more, for the cross term J' v.
            "num_hvps": inner_fraction * (self.num_adjoint_steps + 1),
            "num_outer_grads": outer_fraction,
        }
        step = Step(
            value, direction, state.w, inner_grad, counts, residual, b, self.num_steps
        )
        return step, state
