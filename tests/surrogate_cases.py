"""What the tests of all surrogates share: one program a surrogate, and hard input."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.known import central, error

N = 24


class Read(NamedTuple):
    """What one program says of a surrogate."""

    value: Any
    slopes: Any  # by scores, by temperature, by weights
    exact: Any


@eqx.filter_jit
def read(surrogate, scores, targets, temperature, where, weights) -> Read:
    smooth = lambda s, t, w: surrogate(
        s, targets, temperature=t, where=where, weights=w
    )
    slopes = jax.value_and_grad(smooth, (0, 1, 2))
    value, slopes = slopes(scores, temperature, weights)
    exact = surrogate.exact(scores, targets, where=where, weights=weights)
    return Read(value, slopes, exact)


def rng_of(key: jax.Array) -> np.random.Generator:
    return np.random.default_rng(int(jax.random.bits(key)))


#: Scores, targets, and which of the last axis count.
EXTREMES = {
    "large": lambda s, y: (1e4 * s, y, True),
    "refused": lambda s, y: (-1e4 - np.abs(s), y, True),
    "positives": lambda s, y: (s, np.ones_like(y), True),
    "negatives": lambda s, y: (s, np.zeros_like(y), True),
    "tied": lambda s, y: (np.zeros_like(s), y, True),
    "one": lambda s, y: (s, y, np.arange(N) == 3),
    "masked": lambda s, y: (s, y, False),
}


def check_extremes(run: Callable[..., Read], scores, targets, shape) -> None:
    """Finite in float32 at any temperature; masked out is 0."""
    for extreme, make in EXTREMES.items():
        s, y, where = make(scores, targets)
        for t in (1e-3, 0.5, 1e4):
            leaves = jax.tree.leaves(
                run(np.float32(s), y, t, where=np.broadcast_to(where, shape))
            )
            assert all(leaf.dtype == jnp.float32 for leaf in leaves)
            assert all(np.all(np.isfinite(leaf)) for leaf in leaves), extreme
            if extreme == "masked":
                assert not any(np.any(leaf) for leaf in leaves)


def check_unsound_scores(run: Callable[..., Read], scores, targets, shape) -> None:
    """NaN and infinity: flagged where they count, as good as dropped elsewhere."""
    one = np.broadcast_to(np.arange(N) == 1, shape)
    each = one.reshape(shape + (1,) * (scores.ndim - one.ndim))
    rest = run(scores, targets, where=~one)
    for bad in (np.nan, np.inf, -np.inf):
        for dirty in (np.where(each, bad, scores), np.full_like(scores, bad)):
            found = run(dirty, targets)
            assert np.isnan(found.value) & np.isnan(found.exact)
            assert np.any(np.isnan(found.slopes[0]))
        dirty = np.where(each, bad, scores)
        dropped = [run(dirty, targets, where=~one)]
        dropped += [run(dirty, targets, weights=1.0 - one)]
        for found in dropped:
            np.testing.assert_allclose(found.value, rest.value, rtol=1e-12)
            np.testing.assert_allclose(found.exact, rest.exact, rtol=1e-12)
            np.testing.assert_allclose(found.slopes[0], rest.slopes[0], atol=1e-12)


def check_slopes(run: Callable[..., Read], scores, targets, t, weights, step) -> None:
    """By scores, temperature and weights: central differences, to 1e-6 each."""
    at = {"s": jnp.asarray(scores), "t": jnp.asarray(t), "w": jnp.asarray(weights)}
    value = lambda at: run(at["s"], targets, at["t"], weights=at["w"])
    expected = central(lambda at: value(at).value, at, step)
    slopes = dict(zip("stw", value(at).slopes, strict=True))
    assert float(jnp.linalg.norm(slopes["s"])) > 1e-4
    assert error(slopes, expected) < 1e-6
    assert error(slopes["w"], expected["w"]) < 1e-6


def check_second_derivatives(surrogate, scores, targets, t) -> Any:
    """Reverse over reverse equals forward over reverse; gives it, along a direction."""
    slope = jax.grad(lambda s: surrogate(s, targets, temperature=t))
    direction = jnp.cos(jnp.arange(scores.size)).reshape(scores.shape)

    @jax.jit
    def products(s):
        forward = jax.jvp(slope, (s,), (direction,))[1]
        return forward, jax.grad(lambda s: jnp.vdot(slope(s), direction))(s)

    forward, reverse = products(jnp.asarray(scores))
    np.testing.assert_allclose(reverse, forward, rtol=1e-9, atol=1e-12)
    return forward, direction
