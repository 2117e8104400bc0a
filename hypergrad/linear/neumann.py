"""The truncated Neumann series."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jaxtyping import Array, PyTree

from ..method_summary import MethodSummary
from ..number_checks import check_positive_int, non_negative
from ..trees import (
    add_scale,
    cast_like,
    hash_normal,
    norm,
    safe_norm,
    scalar_dtype,
    scale,
    widen,
)
from .base import MatVec, SymmetricSolver

NUM_POWER_ITERATIONS = 10


class Neumann(SymmetricSolver):
    """``v = step_size * sum_{k < num_terms} (I - step_size H)^k b``.

    At a stationary point this is exactly the derivative of the last ``num_terms`` steps
    of gradient descent with that step size.

    Args:
      num_terms: K, the number of terms of the series.
      step_size: Step size. Defaults to ``1 / lambda_max``, estimated by ten power
        iterations.

    Cost:
      ``num_terms - 1`` Hessian-vector products, and ten more to estimate the step size.
    Memory: two vectors like ``w``, in float32 at least.
    Bias:
      The relative error falls as ``q^K`` with ``q = max |1 - step_size * lambda|``. For
      ``q >= 1`` the series diverges and its residual is large.

    Source: Lorraine, Vicol & Duvenaud 2020, arXiv:1911.02590, algorithm 3.

    >>> import hypergrad as hg
    >>> round(hg.Neumann(num_terms=10, step_size=1.0).error_bound(0.5, 1.5), 6)
    0.000977
    """

    num_terms: int = eqx.field(static=True)
    step_size: float | Array | None = eqx.field(
        default=None, converter=non_negative("step_size", optional=True)
    )

    citations = ("lorraine2020",)
    summary = (
        MethodSummary(
            "Implicit(solver, hg.Neumann(K))",
            num_grads="T",
            num_hvps="K + 10",
            memory="2 w",
            bias="q^K",
            alpha_in=("losses",),
            recommended_for="runs in which every estimate must cost the same (with "
            "estimate_error=False)",
            not_recommended_for="an ill-conditioned H",
            reason=(
                "the series converges as q^K with q = 1 - 1/condition; without "
                "step_size, 10 products estimate lambda_max"
            ),
        ),
    )

    def __check_init__(self):
        check_positive_int("num_terms", self.num_terms)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """Returns ``q^K`` for a spectrum in [eig_min, eig_max]."""
        step_size = 1 / eig_max if self.step_size is None else float(self.step_size)
        q = max(abs(1 - step_size * eig_min), abs(1 - step_size * eig_max))
        return q**self.num_terms

    def compute(
        self, state: lx.AbstractLinearOperator, vector: PyTree, options: dict[str, Any]
    ) -> tuple[PyTree, lx.RESULTS, dict[str, Any]]:
        """Returns ``(v, result, stats)``.

        The result is successful unless the last term is longer than the first one, as
        it is where the series diverges. The statistic ``ritz_max`` exists if the step
        size was estimated.
        """
        del options
        stats: dict[str, Any] = {"num_products": self.num_terms - 1}
        step_size = self.step_size
        if step_size is None:
            eig_max = estimate_largest_eigenvalue(state.mv, vector)
            step_size = 1.0 / eig_max
            stats["num_products"] += NUM_POWER_ITERATIONS
            stats["num_shared"] = NUM_POWER_ITERATIONS
            stats["ritz_max"] = eig_max

        # In bfloat16 the small terms of a long series would not change the sum.
        like, vector = vector, widen(vector)

        def add_term(carry, _):
            # (I - s H)^{k+1} b = (I - s H) (I - s H)^k b
            term, total = carry
            product = state.mv(cast_like(term, like))
            term = add_scale(term, -step_size, product)
            return (term, optax.tree.add(total, term)), None

        (last_term, total), _ = jax.lax.scan(
            add_term, (vector, vector), length=self.num_terms - 1
        )
        result = lx.RESULTS.where(
            safe_norm(last_term) <= safe_norm(vector),
            lx.RESULTS.successful,
            lx.RESULTS.max_steps_reached,
        )
        return cast_like(scale(step_size, total), like), result, stats


def estimate_largest_eigenvalue(matvec: MatVec, like: PyTree) -> Array:
    """Returns ``lambda_max`` of a positive definite matrix, approximated from below.

    The power iteration always starts at the same random vector and makes
    `NUM_POWER_ITERATIONS` products.
    """
    normalize = lambda v: scale(1.0 / norm(v), v)
    init_v = normalize(hash_normal(0, like))

    def iterate(carry, _):
        v, _ = carry
        Hv = matvec(v)
        Hv_norm = safe_norm(Hv)
        return (scale(1.0 / Hv_norm, Hv), Hv_norm), None

    init_carry = (init_v, jnp.zeros((), scalar_dtype(like)))
    (_, eig_max), _ = jax.lax.scan(iterate, init_carry, length=NUM_POWER_ITERATIONS)
    return eig_max
