"""Inner and adjoint solvers with a priori constants and a posteriori tolerances.

They are the solvers of Ehrhardt & Roberts 2023 (arXiv 2301.04764), as their code has
them: rates and momenta come from a strong convexity mu and a smoothness S, and a solve
ends at an absolute tolerance.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
from jaxtyping import Array, PyTree

from hypergrad.extend import SymmetricSolver, inner_stats

MAX_STEPS = 100_000


def rate_and_momentum(method: str, mu: float, smoothness: Array) -> tuple[Array, Array]:
    """Returns the constants of gradient descent (GD) or the heavy ball (HB)."""
    if method == "GD":
        return 2 / (smoothness + mu), jnp.zeros_like(smoothness)
    total = jnp.sqrt(smoothness) + mu**0.5
    return 4 / total**2, ((jnp.sqrt(smoothness) - mu**0.5) / total) ** 2


class InexactSolver(eqx.Module):
    """The authors' inner solvers: steps until ``||dL/dw|| <= tolerance * mu``.

    Args:
      method: "GD", "HB" or "FISTA"; FISTA takes two gradients per step.
      tolerance: Bound on the distance to the minimum.
      mu: Strong convexity, a lower bound on the eigenvalues of the Hessian.
      smoothness: S, an upper bound on them.
    """

    method: str = eqx.field(static=True)
    tolerance: float
    mu: float
    smoothness: Array

    def solve(
        self, inner_loss: Any, w: Array, alpha: Array, data: PyTree, key: Array
    ) -> tuple[Array, dict]:
        """Returns ``w`` after at least one step, and the counts."""
        del key
        grad_fn = lambda w: jax.grad(inner_loss)(w, alpha, data)
        q = self.mu / self.smoothness

        def accelerate(carry):
            w, prev_w, _, t, k = carry
            a = 1 - q * t**2
            next_t = (a + jnp.sqrt(a**2 + 4 * t**2)) / 2
            momentum = (t - 1) * (1 - q * next_t) / (next_t * (1 - q))
            z = w + momentum * (w - prev_w)
            new_w = z - grad_fn(z) / self.smoothness
            return new_w, w, grad_fn(new_w), next_t, k + 1

        def descend(carry):
            w, prev_w, grad, t, k = carry
            rate, momentum = rate_and_momentum(self.method, self.mu, self.smoothness)
            new_w = w - rate * grad + momentum * (w - prev_w)
            return new_w, w, grad_fn(new_w), t, k + 1

        def continues(carry):
            grad, k = carry[2], carry[-1]
            is_far = jnp.linalg.norm(grad) > self.tolerance * self.mu
            return (k == 0) | (is_far & (k < MAX_STEPS))

        is_fista = self.method == "FISTA"
        init = (w, w, grad_fn(w), jnp.zeros_like(q), jnp.asarray(0))
        body = accelerate if is_fista else descend
        w, *_, k = jax.lax.while_loop(continues, body, init)
        return w, inner_stats(k, num_grads=k * (2 if is_fista else 1) + 1)


class ResidualSolver(SymmetricSolver):
    """The authors' adjoint solvers: from zero until ``||b - H v|| <= tolerance``.

    Args:
      method: "GD", "HB" or "CG".
      tolerance: Bound on the residual.
      mu: Strong convexity, a lower bound on the eigenvalues of the Hessian.
      smoothness: S, an upper bound on them.
    """

    method: str = eqx.field(static=True)
    tolerance: float
    mu: float
    smoothness: Array

    def compute(
        self, state: Any, vector: Array, options: dict
    ) -> tuple[Array, Any, dict]:
        """Returns the solution, the result and the number of products."""
        del options

        def conjugate(carry):
            v, r, direction, k = carry
            product = state.mv(direction)
            squared = jnp.vdot(r, r)
            length = squared / jnp.vdot(direction, product)
            new_r = r - length * product
            ratio = jnp.vdot(new_r, new_r) / squared
            return v + length * direction, new_r, new_r + ratio * direction, k + 1

        def descend(carry):
            v, r, (prev_v, prev_r), k = carry
            rate, momentum = rate_and_momentum(self.method, self.mu, self.smoothness)
            new_v = v + rate * r + momentum * (v - prev_v)
            new_r = r - rate * state.mv(r) + momentum * (r - prev_r)
            return new_v, new_r, (v, r), k + 1

        def continues(carry):
            is_far = jnp.linalg.norm(carry[1]) > self.tolerance
            return is_far & (carry[-1] < MAX_STEPS)

        v = jnp.zeros_like(vector)
        is_cg = self.method == "CG"
        memory = vector if is_cg else (v, vector)
        carry = (v, vector, memory, jnp.asarray(0))
        body = conjugate if is_cg else descend
        v, *_, k = jax.lax.while_loop(continues, body, carry)
        return v, lineax.RESULTS.successful, {"num_products": k}
