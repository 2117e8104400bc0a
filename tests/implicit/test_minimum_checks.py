"""When a gradient is at the level of rounding, against matrices."""

import jax.numpy as jnp
import numpy as np
import pytest

from hypergrad.implicit.minimum import gradient_scale, is_stationary
from tests.random_problems import random_matrix


def test_gradient_scale_is_the_root_of_the_squares_in_any_units():
    """Eight probes, of a matrix whose entries differ by up to 1e6."""
    rng = np.random.default_rng(0)
    units, w = 10.0 ** rng.uniform(-3, 3, 40), jnp.asarray(rng.normal(size=40))
    H = random_matrix(np.linspace(0.1, 1.0, 40))
    scale = gradient_scale(lambda v: H @ v, w)
    ratio = scale / np.sqrt((H**2) @ (w**2))
    assert np.all((ratio > 0.3) & (ratio < 2))
    scaled = gradient_scale(lambda v: (H @ (v / units)) / units, w * units)
    np.testing.assert_allclose(scaled * units, scale, rtol=1e-10)


@pytest.mark.parametrize(("distance", "expected"), [(0.0, True), (1e-8, False)])
def test_a_gradient_is_rounding_if_no_entry_is_larger(distance, expected):
    """One entry of w is off by a relative ``distance``; another one is 1e8 times it."""
    H = random_matrix(np.linspace(0.1, 1.0, 20))
    minimum = jnp.ones(20).at[0].set(1e8)
    H = H.at[0].set(0.0).at[:, 0].set(0.0).at[0, 0].set(1.0)  # the large one is alone
    w = minimum.at[3].multiply(1 + distance)
    grad = H @ w - H @ minimum + 1e-16 * H @ w
    assert is_stationary(grad, gradient_scale(lambda v: H @ v, w)) == expected


def test_an_infinite_scale_hides_no_gradient():
    """A product that overflows says nothing."""
    assert not is_stationary(jnp.ones(2), jnp.array([jnp.inf, 1e20]))
