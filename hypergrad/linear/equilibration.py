"""Diagonal scaling of a symmetric matrix, found by products with random vectors."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jaxtyping import PyTree

from ..trees import random_like
from .base import MatVec

NUM_PROBES = 8

Solution = tuple[PyTree, lx.RESULTS, dict[str, Any]]


def solve_equilibrated(
    solve: Callable[[MatVec, PyTree, PyTree | None], Solution],
    matvec: MatVec,
    b: PyTree,
    y0: PyTree | None,
) -> Solution:
    """Solves ``(S H S) x = S b`` and returns ``v = S x`` with the statistics.

    Args:
      solve: ``(matvec, b, y0) -> (v, result, stats)``, a linear solver.
      matvec: Function ``v -> H v`` with symmetric ``H``.
      b: Right-hand side.
      y0: Starting point, or None.
    """
    s = equilibrate(matvec, b)
    multiply_by_s = lambda x: jax.tree.map(jnp.multiply, s, x)
    x0 = None if y0 is None else jax.tree.map(jnp.divide, y0, s)
    scaled_matvec = lambda x: multiply_by_s(matvec(multiply_by_s(x)))
    x, result, stats = solve(scaled_matvec, multiply_by_s(b), x0)
    stats["num_products"] = stats["num_products"] + NUM_PROBES
    stats["num_shared"] = NUM_PROBES
    return multiply_by_s(x), result, stats


def equilibrate(matvec: MatVec, like: PyTree) -> PyTree:
    """Returns ``s > 0`` for which the rows of ``S H S`` have about equal norms.

    With ``S = diag(s)`` and a standard normal ``z``, the entries of ``S H S z`` have
    the norms of the rows as standard deviations. Each probe divides ``s`` by the root
    of their absolute values, which halves the exponents of the units. The result is the
    geometric mean over the second half of the probes, with a maximum of 1. A row of
    zeros keeps its factor.

    Args:
      matvec: Function ``v -> H v`` with symmetric ``H``.
      like: Vector whose structure ``matvec`` takes.

    Cost: `NUM_PROBES` products.

    Source: after Bradley & Murray 2011 (arXiv 1110.2805), section 3.
    """
    multiply = lambda x, y: jax.tree.map(jnp.multiply, x, y)
    max_entry = lambda x: jnp.max(
        jnp.stack([jnp.max(jnp.abs(leaf), initial=0) for leaf in jax.tree.leaves(x)])
    )

    def probe(log_s, key):
        # x = |S H S z|,  s <- s (x / max x)^(-1/2)
        s = jax.tree.map(jnp.exp, log_s)
        z = random_like(key, like)
        x = multiply(s, matvec(multiply(s, z)))
        max_x = max_entry(x)

        def per_leaf(log_s, x):
            is_used = (x != 0) & jnp.isfinite(x)
            change = jnp.log(jnp.abs(jnp.where(is_used, x, 1))) - jnp.log(max_x)
            return log_s - jnp.where(is_used, 0.5 * change, 0).astype(log_s.dtype)

        log_s = jax.tree.map(per_leaf, log_s, x)
        # Without this the products would underflow in small units.
        max_log = jnp.max(jnp.stack([jnp.max(v) for v in jax.tree.leaves(log_s)]))
        log_s = jax.tree.map(lambda v: v - max_log.astype(v.dtype), log_s)
        return log_s, log_s

    keys = jax.random.split(jax.random.key(0), NUM_PROBES)
    _, history = jax.lax.scan(probe, optax.tree.zeros_like(like), keys)
    log_s = jax.tree.map(lambda v: jnp.mean(v[NUM_PROBES // 2 :], axis=0), history)
    return jax.tree.map(jnp.exp, log_s)
