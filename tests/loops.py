"""The outer loop as one call, and an estimator that compiles in a moment."""

import inspect
from collections.abc import Callable
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import hypergrad as hg

RUN_OPTIONS = {*inspect.signature(hg.OuterLoop.run).parameters} - {"self", "state"}


def run_loop(problem, estimator, optimizer, w, alpha, *, key=None, **options: Any):
    """Returns the trace of an `hg.OuterLoop` with the options of it and of its run."""
    run_options = {name: options.pop(name) for name in RUN_OPTIONS & options.keys()}
    loop = hg.OuterLoop(problem, estimator, optimizer, **options)
    return loop.run(loop.init(w, alpha, key), **run_options)


# The inner solution is alpha, and the outer minimum at 0 or 1.


def square(w, alpha, batch):
    return jnp.sum((w - alpha) ** 2)


TO_ZERO = hg.Bilevel(square, lambda w, alpha, batch: jnp.sum(w**2))
TO_ONE = hg.Bilevel(square, lambda w, alpha, batch: jnp.sum((w - 1.0) ** 2))


def same_as_alpha(alpha, data):
    return alpha


class ExactEstimator(eqx.Module):
    """Differentiates the outer loss along a closed form of the inner solution.

    It is written as users write theirs: it returns only ``value``, ``hypergradient``,
    ``w`` and the statistics that it knows, and its state is a weakly typed counter.

    Args:
      solution_fn: ``(alpha, inner_data) -> w``. Defaults to ``alpha`` itself.
      cost: Gradient-equivalents of each estimate; of the i-th if it is an array.
      trusted: Whether the i-th estimate is trusted; else it points uphill.
      noise: Scale of a random perturbation of the hypergradient.
    """

    solution_fn: Callable = eqx.field(
        static=True, default_factory=lambda: same_as_alpha
    )
    cost: Any = 3.0
    trusted: Any = None
    noise: float = eqx.field(static=True, default=0.0)

    def init(self, problem, w, alpha, key=None):
        return jnp.asarray(0)

    def estimate(self, problem, index, alpha, key):
        def outer_value(alpha):
            w = self.solution_fn(alpha, problem.inner_data)
            value = problem.outer_value(w, alpha, problem.outer_data)
            return value, (value, w)

        hypergradient, (value, w) = jax.jacrev(outer_value, has_aux=True)(alpha)
        select = lambda x: jnp.asarray(x)[index] if jnp.ndim(x) else jnp.asarray(x)
        stats = {"gradient_equivalents": select(self.cost)}
        if self.trusted is not None:
            stats["trusted"] = select(self.trusted)
            factor = jnp.where(stats["trusted"], 1.0, -3.0)
            hypergradient = jax.tree.map(lambda g: factor * g, hypergradient)
        if self.noise:
            add_noise = lambda g: g + self.noise * jax.random.normal(key, g.shape)
            hypergradient = jax.tree.map(add_noise, hypergradient)
        return hg.Estimate(value, hypergradient, w, stats), index + 1

    def refine(self, problem, index, alpha, key):
        exact = ExactEstimator(self.solution_fn, self.cost)
        estimate, _ = exact.estimate(problem, index - 1, alpha, key)
        stats = estimate.stats | {"trusted": jnp.asarray(True)}
        return hg.Estimate(
            estimate.value, estimate.hypergradient, estimate.w, stats
        ), index


class Stateless(eqx.Module):
    """Returns ``fn(w, alpha, key)``, an `hg.Estimate`, always at the first ``w``."""

    fn: Callable = eqx.field(static=True)

    def init(self, problem, w, alpha, key=None):
        return w

    def estimate(self, problem, w, alpha, key):
        return self.fn(w, alpha, key), w


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Raises AssertionError unless two trees agree in structure, types and bits."""
    chex.assert_trees_all_equal_structs(actual, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    for (path, x), y in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        assert to_bytes(x) == to_bytes(y), jax.tree_util.keystr(path)


def to_bytes(leaf: Any) -> bytes:
    """Returns the bytes of an array or of the data of a PRNG key."""
    is_key = jnp.issubdtype(getattr(leaf, "dtype", float), jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()
