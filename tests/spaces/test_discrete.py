"""Integers and choices, which only searches use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from hypergrad import spaces
from hypergrad.runtime import compat
from hypergrad.spaces import Box, Choice, Integer, Interval, Simplex

DISCRETE = {
    "integer": (Integer(-2, 5, shape=(40, 100)), range(-2, 6)),
    "choice": (Choice((0.1, 7, -3.5), shape=(40, 100)), (0.1, 7, -3.5)),
    "index": (Choice(4, shape=(40, 100)), range(4)),
}
for_each_space = pytest.mark.parametrize(
    ("space", "values"), DISCRETE.values(), ids=DISCRETE
)


@for_each_space
def test_samples_are_uniform_over_the_values(space, values):
    """A chi-square test of 4,000 samples at p = 1e-4; integers stay integers."""
    alpha = np.asarray(space.sample(jax.random.key(0)))
    kind = np.floating if 0.1 in values else np.integer
    assert np.issubdtype(alpha.dtype, kind)
    assert space.contains(alpha).all()
    counts = np.array([np.sum(alpha == value) for value in values])
    assert counts.sum() == 4000
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


def test_contains_by_hand():
    alpha = jnp.array([-2.0, 0.1, 5.0, 6.0, jnp.nan, jnp.inf])
    for space, expected in [
        (Integer(-2, 5), [True, False, True, False, False, False]),
        (Choice((0.1, 6)), [False, True, False, True, False, False]),
        (Choice(6), [False, False, True, False, False, False]),
    ]:
        for leaf in (alpha, alpha.astype(jnp.float32)):
            np.testing.assert_array_equal(space.contains(leaf), expected)
            np.testing.assert_array_equal(jax.jit(space.contains)(leaf), expected)
    assert Integer(0, 2**31 - 2).contains(jnp.int32(2**31 - 2))


@for_each_space
@pytest.mark.parametrize("map_name", ["forward", "inverse", "project"])
def test_discrete_spaces_have_no_unconstrained_variable(space, values, map_name):
    with pytest.raises(ValueError, match="space"):
        getattr(spaces, map_name)(space, float(values[1]))


def test_a_choice_of_booleans_has_cells():
    space = Choice([False, True])
    assert space.to_unit(jnp.array([False, True])).tolist() == [0.25, 0.75]
    assert space.from_unit(jnp.array([0.2, 0.9])).tolist() == [False, True]


@pytest.mark.parametrize(
    "values", [[[1.0, 2.0], [3.0]], ["a", "b"], [None, 1], [1j, 2]], ids=str
)
def test_values_that_are_no_numbers_are_refused_with_a_remedy(values):
    with pytest.raises(TypeError, match=r"values must be finite.*jax\.lax\.switch"):
        Choice(values)


def test_a_choice_is_counted_by_any_integer():
    assert Choice(np.int64(3)).values == (0, 1, 2)


@pytest.mark.parametrize(("low", "high"), [(0, 2**31 - 1), (-(2**40), 0)])
def test_integers_of_more_than_32_bits_are_an_error(low, high):
    with pytest.raises(ValueError, match="32 bits"):
        Integer(low, high)
    assert Integer(0, 2**31 - 2).sample(jax.random.key(0)) >= 0


def test_more_values_than_integers_of_32_bits_are_an_error():
    """Although each of them is such an integer; the cube divides by their number."""
    half = 2**30
    for low, high in ((-half, half - 1), (-half - 5, half)):
        with pytest.raises(ValueError, match="high"):
            Integer(low, high)
    space = Integer(-half, half - 2)
    assert space.num_values == 2**31 - 1
    for t, expected in ((0.0, space.low), (1.0, space.high)):
        assert space.from_unit(np.array(t)) == expected
        assert 0 <= space.to_unit(jnp.asarray(expected)) <= 1


def test_large_integers_are_told_apart():
    """As floats of 32 bits the two are equal."""
    space = Choice([2**24, 2**24 + 1])
    with compat.enable_x64(False):
        for t in (0.25, 0.75):
            assert space.to_unit(space.from_unit(t)) == t


@pytest.mark.parametrize(
    "values", [[1.0, 1e40], [0.1, 0.1 + 1e-12], [2.0**24, 2.0**24 + 1]], ids=str
)
def test_values_of_a_choice_are_different_numbers_of_its_dtype(values):
    space = Choice(values)
    with compat.enable_x64(False):
        for use in (lambda x: x.from_unit(0.5), lambda x: x.sample(jax.random.key(0))):
            with pytest.raises(ValueError, match=r"values.*float32"):
                use(space)
    assert space.from_unit(0.9) == values[1]
    assert jax.jit(space.from_unit)(0.9) == values[1]


def test_choices_of_more_than_32_bits_are_refused():
    with compat.enable_x64(False):
        for use in (lambda x: x.from_unit(0.5), lambda x: x.sample(jax.random.key(0))):
            with pytest.raises(ValueError, match="integers of 32 bits"):
                use(Choice([1, 2**40]))


@pytest.mark.parametrize(
    "make_space",
    [
        lambda shape: Choice(3, shape=shape),
        lambda shape: Integer(0, 2, shape=shape),
        lambda shape: Box(0.0, 1.0, shape=shape),
        lambda shape: Interval(0.0, 1.0, shape=shape),
        lambda shape: Simplex(shape=shape),
    ],
    ids=["choice", "integer", "box", "interval", "simplex"],
)
def test_an_integer_is_the_shape_of_a_vector(make_space):
    space = make_space(3)
    assert space == make_space((3,))
    assert space.sample(jax.random.key(0)).shape == space.shape == (3,)
