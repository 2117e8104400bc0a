"""Data and numerical derivatives that the tests of tasks share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import hypergrad as hg

DIGITS = jax.tree.map(jnp.asarray, hg.datasets.load("digits"))


def central_differences(value_fn: Callable[[Any], Any], alpha: Any, step: float) -> Any:
    """Returns numerical derivatives of a scalar function for every number in ``alpha``.

    Args:
      value_fn: A jitted function, which is called twice per number.
      alpha: Point, a pytree.
      step: Distance of the two evaluations from the point.
    """
    flat, unravel = ravel_pytree(alpha)
    evaluate = lambda sign, i: value_fn(unravel(flat.at[i].add(sign * step)))
    differences = [evaluate(1, i) - evaluate(-1, i) for i in range(flat.size)]
    return unravel(jnp.array(differences) / (2 * step))


def assert_close(actual: Any, expected: Any, rtol: float) -> None:
    """Compares each leaf with a tolerance relative to its largest entry."""

    def compare(actual, expected):
        scale = np.abs(expected).max()
        assert scale > 0
        np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * scale)

    jax.tree.map(compare, actual, expected)
