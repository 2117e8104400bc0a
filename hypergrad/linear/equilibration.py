"""Diagonal scaling of a symmetric matrix, found by products with vectors."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree, Scalar

from ..trees import divide, hash_normal, power_of_two_scale
from .base import MatVec

NUM_PROBES = 8
NUM_WARM_PROBES = 2
MAX_DENSE_DIMENSION = 8  # up to which H costs no more than the probes
NUM_DENSE_STEPS = 40  # each halves the exponents of the units

Solution = tuple[PyTree, lx.RESULTS, dict[str, Any]]


class Scaling(NamedTuple):
    """A diagonal matrix ``S`` for which ``S H S`` does not depend on units.

    Attributes:
      s: The diagonal of ``S``, positive, structured like ``w``.
      num_products: Number of products that it took.
    """

    s: PyTree
    num_products: Scalar | int

    def multiply(self, x: PyTree) -> PyTree:
        """Returns ``S x``."""
        return jax.tree.map(lambda s, x: jnp.asarray(s * x, x.dtype), self.s, x)

    def divide(self, x: PyTree) -> PyTree:
        """Returns ``S^-1 x``."""
        return jax.tree.map(lambda s, x: jnp.asarray(x / s, x.dtype), self.s, x)

    def matvec(self, matvec: MatVec) -> MatVec:
        """Returns the function ``x -> S H S x``."""
        return lambda x: self.multiply(matvec(self.multiply(x)))


def solve_equilibrated(
    solve: Callable[[MatVec, PyTree, PyTree | None], Solution],
    matvec: MatVec,
    b: PyTree,
    y0: PyTree | None,
    scaling: Scaling | None = None,
) -> Solution:
    """Solves ``(S H S) x = S b`` and returns ``v = S x`` with the statistics.

    Args:
      solve: ``(matvec, b, y0) -> (v, result, stats)``, a linear solver.
      matvec: Function ``v -> H v`` with symmetric ``H``.
      b: Right-hand side.
      y0: Starting point, or None.
      scaling: ``S``. Defaults to that of `equilibrate`, whose products are counted.
    """
    num_shared = 0
    if scaling is None:
        scaling = equilibrate(matvec, b)
        num_shared = scaling.num_products
    x0 = None if y0 is None else scaling.divide(y0)
    x, result, stats = solve(scaling.matvec(matvec), scaling.multiply(b), x0)
    stats["num_products"] = stats["num_products"] + num_shared
    stats["num_shared"] = num_shared
    return scaling.multiply(x), result, stats


def no_scaling(like: PyTree) -> Scaling:
    """Returns ``S = I``."""
    return Scaling(optax.tree.ones_like(like), 0)


def equilibrate(
    matvec: MatVec,
    like: PyTree,
    *,
    init_s: PyTree | None = None,
    seed: Array | int = 0,
) -> Scaling:
    """Returns ``S = diag(s)`` for which the rows of ``S H S`` have about equal norms.

    With a standard normal ``z``, the entries of ``S H S z`` have the norms of the rows
    as standard deviations. Each probe divides ``s`` by the root of their absolute
    values, which halves the exponents of the units. The result is the geometric mean
    over the second half of the probes, at most 1. A row of zeros keeps its
    factor. Up to 8 parameters, ``H`` is formed and the norms of its rows are used.

    Args:
      matvec: Function ``v -> H v`` with symmetric ``H``.
      like: Vector whose structure ``matvec`` takes.
      init_s: The ``s`` of a similar matrix, from which `NUM_WARM_PROBES` suffice. Zeros
        stand for none.
      seed: Integer from which the probes are made. Where ``init_s`` comes from an
        earlier call, it should be another one than there.

    Cost: `NUM_PROBES` products, or fewer from ``init_s``; one per parameter up to 8.

    Source: after Bradley & Murray 2011 (arXiv 1110.2805), section 3.
    """
    dimension = optax.tree.size(like)
    if dimension <= MAX_DENSE_DIMENSION:
        return Scaling(_dense_scaling(matvec, like), dimension)
    log_s = optax.tree.zeros_like(like)
    num_probes: Array | int = NUM_PROBES
    if init_s is not None:
        leaves = jax.tree.leaves(init_s)
        has_init = jnp.all(jnp.stack([jnp.all(leaf > 0) for leaf in leaves]))
        num_probes = jnp.where(has_init, NUM_WARM_PROBES, NUM_PROBES)
        init_log = lambda s: jnp.log(jnp.where(has_init, s, 1))
        log_s = jax.tree.map(init_log, init_s)
    first_seed = jnp.asarray(seed) * NUM_PROBES
    num_averaged = num_probes - num_probes // 2

    def probe(i, carry):
        log_s, mean_log_s = carry
        # x = |S H S z|,  s <- s (x / max x)^(-1/2)
        scaling = Scaling(jax.tree.map(jnp.exp, log_s), 0)
        x = scaling.matvec(matvec)(hash_normal(first_seed + i, like))
        x = divide(x, power_of_two_scale(x))
        log_s = _shift_to_zero(jax.tree.map(_divide_by_root, log_s, x))
        weight = jnp.where(i >= num_probes // 2, 1 / num_averaged, 0)
        add = lambda mean, new: mean + (weight * new).astype(mean.dtype)
        return log_s, jax.tree.map(add, mean_log_s, log_s)

    init_carry = log_s, optax.tree.zeros_like(log_s)
    _, log_s = jax.lax.fori_loop(0, num_probes, probe, init_carry)
    return Scaling(jax.tree.map(jnp.exp, log_s), num_probes)


def _divide_by_root(log_s: Array, x: Array) -> Array:
    """Returns ``log(s |x|^(-1/2))``, and ``log s`` where ``x`` is 0 or not finite."""
    is_used = (x != 0) & jnp.isfinite(x)
    return log_s - 0.5 * jnp.log(jnp.abs(jnp.where(is_used, x, 1)))


def _shift_to_zero(log_s: PyTree) -> PyTree:
    """Returns ``log_s`` minus its largest entry, so that nothing overflows."""
    leaf_max = lambda leaf: jnp.max(leaf, initial=-jnp.inf)
    max_log = jnp.max(jnp.stack([leaf_max(leaf) for leaf in jax.tree.leaves(log_s)]))
    return jax.tree.map(lambda leaf: leaf - max_log.astype(leaf.dtype), log_s)


def _dense_scaling(matvec: MatVec, like: PyTree) -> PyTree:
    """Returns ``s`` with a maximum of 1 for which rows of ``S H S`` have equal norms.

    A row of zeros keeps the factor 1.
    """
    flat, unravel = ravel_pytree(like)
    row = lambda e: ravel_pytree(matvec(unravel(e)))[0]
    H = jax.vmap(row)(jnp.eye(flat.size, dtype=flat.dtype))
    H = jnp.abs(jnp.where(jnp.isfinite(H), H, 0))
    H = H / power_of_two_scale(H).astype(H.dtype)

    def update(_, log_s):
        # s <- s ||row of S H S||^(-1/2), with the largest entry of a row as its unit
        log_rows = jnp.log(H) + jnp.add.outer(log_s, log_s)
        norms = 0.5 * jax.nn.logsumexp(2 * log_rows, axis=1)
        return log_s - jnp.where(jnp.isfinite(norms), 0.5 * norms, 0)

    log_s = jax.lax.fori_loop(0, NUM_DENSE_STEPS, update, jnp.zeros_like(flat))
    is_used = jnp.any(H > 0, axis=1)
    max_log = jnp.max(jnp.where(is_used, log_s, -jnp.inf))
    return unravel(jnp.where(is_used, jnp.exp(log_s - max_log), 1).astype(flat.dtype))
