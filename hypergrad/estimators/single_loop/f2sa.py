"""F2SA: first derivatives only, of two inner variables and a growing penalty."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ...method_summary import MethodSummary
from ...problem import Bilevel, EstimateData, sample_batch
from ...trees import add_scale, scale
from ...validation import check_optimizer, check_positive_int, or_schedule, positive
from ..base import Estimate
from .shared import move, report, start
from .variance_reduction import at_step, fractions


class F2SAState(eqx.Module):
    """``y`` and ``z`` like ``w``, their optimizers' states, and steps made."""

    y: PyTree
    z: PyTree
    y_optimizer: PyTree
    z_optimizer: PyTree
    step: Array


class F2SA(eqx.Module):
    """``dM/dalpha(y) + penalty (dL/dalpha(y) - dL/dalpha(z))``.

    ``num_steps`` of ``y <- y - rho (dL/dw + dM/dw / penalty)``, which rest where
    ``M + penalty L`` is least, and of ``z <- z - rho dL/dw``; then the direction. Each
    term sees a fresh batch.

    Args:
      optimizer: optax transformation that moves ``y`` and ``z``.
      num_steps: m, static.
      penalty: lambda > 0, a number or a schedule of the step; it has no default. The
        paper's grows as ``k^(1/7)``: ``lambda k: 10 * (1 + k) ** (1 / 7)``, say.

    Cost: ``2 m + 2`` gradients and ``m + 1`` outer ones, on a batch each; no product.
    Memory: two vectors like ``w``, and the optimizers' states.

    Target: argmin. Bias: ``O(1 / penalty)``, and what ``y`` and ``z`` lag behind. Never
    trusted of itself: `minimize`'s ``certify_every`` judges.

    Raises:
      TypeError: from `hypergradient`: one step says nothing; use `minimize`.

    Source: Kwon, Kwon, Wright & Nowak 2023 (arXiv 2301.10945); there ``y``
    moves by ``M + penalty L`` at a rate that falls as the penalty grows.

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1.0) ** 2)
    >>> trace = hg.minimize(
    ...     hg.Bilevel(inner, outer), hg.F2SA(optax.sgd(0.5), 5, penalty=10.0),
    ...     optax.sgd(0.2), 0.0, 3.0, num_steps=100,
    ... )
    >>> round(float(trace.alpha), 3)
    1.0
    """

    optimizer: optax.GradientTransformation = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    penalty: Array | float | Callable = eqx.field(
        kw_only=True, converter=or_schedule(positive("penalty"))
    )

    target = "argmin"
    is_single_loop = True
    citations = ("kwon2023",)
    summary = (
        MethodSummary(
            "F2SA(optimizer, m, l)",
            num_grads="2 * m + 2",
            num_hvps="0",
            memory="2 w and the optimizers'",
            bias="1/l, and what y and z lag behind",
            alpha_in=("losses",),
            recommended_for="networks whose second derivatives are too dear",
            not_recommended_for="high accuracy: the difference is as noisy as the penalty is large",
            reason="a difference of two gradients in place of the adjoint",
        ),
    )

    def __check_init__(self):
        check_optimizer("optimizer", self.optimizer)
        check_positive_int("num_steps", self.num_steps)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """NaN: ``O(1 / penalty)``, with a constant that the spectrum does not tell."""
        return float("nan")

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> F2SAState:
        """Both from ``w``, or the start made of it."""
        del key
        w = start("F2SA", problem, w, alpha)
        state = self.optimizer.init(w)
        return F2SAState(w, w, state, state, jnp.asarray(0))

    def estimate(
        self, problem: Bilevel, state: F2SAState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, F2SAState]:
        """Both loops, and the direction at their end."""
        data = EstimateData.sample(problem, key)
        penalty = at_step(self.penalty, state.step)
        inner_gradient = jax.grad(problem.inner_loss, argnums=(0, 1))

        def step(carry, key):
            y, z, of_y, of_z = carry
            for_y, for_z, for_outer = jax.random.split(key, 3)
            _, b, _ = problem.outer_value_and_grads(
                y, alpha, sample_batch(data.outer_data, for_outer)
            )
            pull, _ = inner_gradient(y, alpha, sample_batch(data.inner_data, for_y))
            y, of_y = move(self.optimizer, add_scale(pull, 1 / penalty, b), of_y, y)
            gradient, _ = inner_gradient(z, alpha, sample_batch(data.inner_data, for_z))
            z, of_z = move(self.optimizer, gradient, of_z, z)
            return (y, z, of_y, of_z), gradient

        carry = state.y, state.z, state.y_optimizer, state.z_optimizer
        keys = jax.random.split(data.solver_key, self.num_steps)
        (y, z, of_y, of_z), gradients = jax.lax.scan(step, carry, keys)

        keys = jax.random.split(data.inner_key)
        value, _, direct = problem.outer_value_and_grads(
            y, alpha, sample_batch(data.outer_data, data.outer_key)
        )
        of_alpha = [
            inner_gradient(x, alpha, sample_batch(data.inner_data, key))[1]
            for x, key in zip((y, z), keys, strict=True)
        ]
        pull = scale(penalty, optax.tree.sub(*of_alpha))
        inner, outer = fractions(data)
        estimate = report(
            data, value, optax.tree.add(direct, pull), y,
            gradient=jax.tree.map(lambda g: g[0], gradients),
            num_inner_steps=self.num_steps,
            num_grads=inner * (2 * self.num_steps + 2),
            num_outer_grads=outer * (self.num_steps + 1),
        )  # fmt: skip
        return estimate, F2SAState(y, z, of_y, of_z, state.step + 1)
