"""Short loops on fresh mini-batches: steps of ``w``, and the Neumann series."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from ...batches import Data, in_own_order, sample_in_pass
from ...linear.neumann import Neumann
from ...problem import Bilevel, EstimateData
from ...products import cross_vjp, hvp
from ...runtime.all_cores import loss_on_all_cores
from ...trees import add_scale, cast_like, scale, widen
from .base import SingleLoop, SingleLoopState

#: One or more pairs ``(w, alpha)``.
Points = tuple[tuple[PyTree, PyTree], ...]


def run_w_steps(
    method: SingleLoop,
    problem: Bilevel,
    state: SingleLoopState,
    alpha: PyTree,
    data: EstimateData,
    num_steps: int,
) -> tuple[SingleLoopState, PyTree]:
    """Makes ``num_steps`` steps of ``w`` along ``dL/dw``, each on a fresh batch.

    Returns:
      The state after the steps, and the gradient before the first step, on its batch.
    """

    def make_step(state, key, k):
        batch = sample_in_pass(data.inner_data, key, k, num_steps, stream="w")
        loss = loss_on_all_cores(problem.inner_loss)
        inner_grad = jax.grad(loss)(state.w, alpha, batch)
        # w <- w - rho dL/dw
        return method.move_w(state, inner_grad), inner_grad

    keys = jax.random.split(data.solver_key, num_steps)
    return scan_with_first_output(make_step, state, keys, state.w)


def sample_streams(data: Data, key: Array, *streams: str) -> list[PyTree]:
    """Returns a batch for each name, each independent of the others."""
    keys = jax.random.split(key, len(streams))
    return [
        sample_in_pass(data, key, stream=stream)
        for key, stream in zip(keys, streams, strict=True)
    ]


def scan_with_first_output(
    step: Callable[[PyTree, Array, Array], tuple[PyTree, PyTree]],
    carry: PyTree,
    keys: Array,
    like: PyTree,
) -> tuple[PyTree, PyTree]:
    """Returns the last carry and the first output of a scan.

    The outputs of further steps, each as large as ``w``, are not stored.

    Args:
      step: ``(carry, key, index) -> (carry, output)``.
      carry: First carry.
      keys: PRNG keys of the steps.
      like: Pytree with the structure, shapes and dtypes of an output.
    """

    def body_fun(carry_and_first, key_and_index):
        (carry, first_output), (key, index) = carry_and_first, key_and_index
        carry, output = step(carry, key, index)
        return (carry, optax.tree.where(index == 0, output, first_output)), None

    init = carry, optax.tree.zeros_like(like)
    return jax.lax.scan(body_fun, init, (keys, jnp.arange(len(keys))))[0]


class StochasticNeumann(eqx.Module):
    """The truncated Neumann series for ``v = H^-1 b``, with a fresh batch per product.

    With K terms, step size ``eta`` and Hessians ``H_i`` of independent batches

        v = eta sum_{k < K} prod_{i <= k} (I - eta H_i) b.

    A series of random length evaluates one of its terms,

        v = K eta prod_{i <= p} (I - eta H_i) b,   p uniform on {0, ..., K - 1},

    which has the same mean and needs half of the products.

    Args:
      step_size: ``eta``, at most ``1 / lambda_max``.
      num_terms: K.
      has_random_length: Whether the series has a random length.

    Source: Ghadimi & Wang 2018 for the random length.
    """

    step_size: Array | float
    num_terms: int = eqx.field(static=True)
    has_random_length: bool = eqx.field(static=True, default=False)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """Returns ``q^K``, ``q = max |1 - eta lambda|``: the error of the mean."""
        series = Neumann(self.num_terms, float(self.step_size))
        return series.error_bound(eig_min, eig_max)

    def solve(
        self,
        problem: Bilevel,
        points: Points,
        bs: tuple[PyTree, ...],
        data: Data,
        key: Array,
    ) -> tuple[tuple[PyTree, ...], Int[Array, ""]]:
        """Returns ``v`` at each point and the number of products for each of them.

        One loop makes the series of all points, on the same batches. XLA then evaluates
        only once what depends on the batch alone, such as a mean of matrices.

        Args:
          problem: The bilevel problem.
          points: One or more ``(w, alpha)`` at which the Hessians are evaluated.
          bs: The right-hand side of each point.
          data, key: Data of the inner loss, and PRNG key of the batches.
        """
        product_key, length_key = jax.random.split(key)
        keys = jax.random.split(product_key, self.num_terms)

        # In bfloat16 the small terms of a long series would not change the sum.
        init_ps = widen(bs)

        def next_term(point, p, batch):
            w, alpha = point
            # p <- (I - eta H_k) p
            Hp = hvp(problem.inner_loss, w, alpha, batch, cast_like(p, w))
            return add_scale(p, -self.step_size, Hp)

        def next_terms(k, ps):
            # Passes of their own keep the batches of a series independent.
            batch = sample_in_pass(in_own_order(data, k), keys[k], stream="v")
            pairs = zip(points, ps, strict=True)
            return tuple(next_term(point, p, batch) for point, p in pairs)

        if self.has_random_length:
            num_products = jax.random.randint(length_key, (), 0, self.num_terms)
            ps = jax.lax.fori_loop(0, num_products, next_terms, init_ps)
            # v = K eta prod_{i <= p} (I - eta H_i) b
            factor = self.num_terms * self.step_size
            vs = tuple(scale(factor, p) for p in ps)
            return cast_like(vs, bs), num_products

        def add_terms(k, carry):
            ps, totals = carry
            ps = next_terms(k, ps)
            return ps, optax.tree.add(totals, ps)

        num_products = self.num_terms - 1
        init = init_ps, init_ps
        _, totals = jax.lax.fori_loop(0, num_products, add_terms, init)
        # v = eta sum_{k < K} prod_{i <= k} (I - eta H_i) b
        vs = tuple(scale(self.step_size, total) for total in totals)
        return cast_like(vs, bs), jnp.asarray(num_products)


def alpha_direction(
    problem: Bilevel, w: PyTree, v: PyTree, alpha: PyTree, direct: PyTree, batch: PyTree
) -> PyTree:
    """Returns ``dM/dalpha - J' v``, the hypergradient if ``w`` and ``v`` are exact.

    Args:
      problem: The bilevel problem.
      w, v, alpha: Inner variable, adjoint and outer variable.
      direct: The direct term ``dM/dalpha``.
      batch: Batch of the inner loss.
    """
    return optax.tree.sub(direct, cross_vjp(problem.inner_loss, w, alpha, batch, v))


def evaluate_directions(
    problem: Bilevel, series: StochasticNeumann, points: Points, data: EstimateData
) -> tuple[list[Array], list[tuple[PyTree, PyTree]], Int[Array, ""]]:
    """Returns the directions of ``w`` and ``alpha`` at each point, on the same batches.

    They are ``dL/dw``, and ``dM/dalpha - J' v`` with ``v`` of a Neumann series.

    Returns:
      The outer value and the two directions at each ``(w, alpha)``, and the number of
      Hessian-vector products of the series at each of them.
    """
    batch_key, series_key = jax.random.split(data.inner_key)
    batch = sample_in_pass(data.inner_data, batch_key)
    outer_batch = sample_in_pass(data.outer_data, data.outer_key)
    outer = [problem.outer_value_and_grads(*point, outer_batch) for point in points]
    bs = tuple(b for _, b, _ in outer)
    # v = H^-1 b, approximately
    vs, num_products = series.solve(problem, points, bs, data.inner_data, series_key)

    def directions_at(w, alpha, v, direct):
        inner_grad = jax.grad(problem.inner_loss)(w, alpha, batch)
        # dM/dalpha - J' v
        return inner_grad, alpha_direction(problem, w, v, alpha, direct, batch)

    directions = [
        directions_at(*point, v, direct)
        for point, v, (_, _, direct) in zip(points, vs, outer, strict=True)
    ]
    return [value for value, _, _ in outer], directions, num_products
