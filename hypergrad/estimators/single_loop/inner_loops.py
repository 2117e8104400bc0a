"""Short loops on fresh batches: descent in ``w``, and two ways to ``H^-1 b``."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ...linear.neumann import Neumann
from ...problem import Bilevel, Data, sample_batch
from ...products import cross_vjp, hvp
from ...trees import add_scale, scale
from .shared import move


def descend(
    problem: Bilevel,
    optimizer: optax.GradientTransformation,
    w: PyTree,
    state: PyTree,
    alpha: PyTree,
    data: Data,
    key: Array,
    num_steps: int,
) -> tuple[PyTree, PyTree, PyTree]:
    """``num_steps`` of ``w <- w - rho dL/dw``; also the first of the gradients."""

    def step(carry, key):
        w, state = carry
        gradient = jax.grad(problem.inner_loss)(w, alpha, sample_batch(data, key))
        return move(optimizer, gradient, state, w), gradient

    keys = jax.random.split(key, num_steps)
    (w, state), gradients = jax.lax.scan(step, (w, state), keys)
    return w, state, jax.tree.map(lambda g: g[0], gradients)


class Series(eqx.Module):
    """``H^-1 b`` by products with ``I - step_size H``, of a fresh batch each.

    ``num_terms`` is K. In full, ``step_size sum_{k < K} prod_{i <= k} (I - step_size
    H_i) b``. Of ``random`` length, ``K step_size prod_{i <= p} (I - step_size H_i) b``
    with p drawn from 0 to K - 1: the same in expectation, for half the products.
    """

    step_size: Array | float
    num_terms: int = eqx.field(static=True)
    random: bool = eqx.field(static=True, default=False)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """``q^K``, ``q = max |1 - step_size lambda|``: what K terms leave of ``v``."""
        series = Neumann(self.num_terms, float(self.step_size))
        return series.error_bound(eig_min, eig_max)

    def __call__(
        self,
        problem: Bilevel,
        w: PyTree,
        alpha: PyTree,
        b: PyTree,
        data: Data,
        key: Array,
    ) -> tuple[PyTree, Array]:
        """``(v, products made)``."""
        step_key, length_key = jax.random.split(key)
        keys = jax.random.split(step_key, self.num_terms)

        def contract(k, p):
            Hp = hvp(problem.inner_loss, w, alpha, sample_batch(data, keys[k]), p)
            return add_scale(p, -self.step_size, Hp)

        if self.random:
            length = jax.random.randint(length_key, (), 0, self.num_terms)
            p = jax.lax.fori_loop(0, length, contract, b)
            return scale(self.num_terms * self.step_size, p), length

        def add(k, carry):
            p, total = carry
            p = contract(k, p)
            return p, optax.tree.add(total, p)

        products = self.num_terms - 1
        _, total = jax.lax.fori_loop(0, products, add, (b, b))
        return scale(self.step_size, total), jnp.asarray(products)


def follow(
    problem: Bilevel,
    optimizer: optax.GradientTransformation,
    w: PyTree,
    v: PyTree,
    state: PyTree,
    alpha: PyTree,
    b: PyTree,
    data: Data,
    key: Array,
    num_steps: int,
) -> tuple[PyTree, PyTree, PyTree]:
    """``num_steps`` of ``v <- v - rho (H v - b)``; also the first of the residuals."""

    def step(carry, key):
        v, state = carry
        Hv = hvp(problem.inner_loss, w, alpha, sample_batch(data, key), v)
        residual = optax.tree.sub(Hv, b)
        return move(optimizer, residual, state, v), residual

    keys = jax.random.split(key, num_steps)
    (v, state), residuals = jax.lax.scan(step, (v, state), keys)
    return v, state, jax.tree.map(lambda r: r[0], residuals)


def total_direction(
    problem: Bilevel, w: PyTree, v: PyTree, alpha: PyTree, direct: PyTree, batch: PyTree
) -> PyTree:
    """``dM/dalpha - Jᵀ v``."""
    return optax.tree.sub(direct, cross_vjp(problem.inner_loss, w, alpha, batch, v))
