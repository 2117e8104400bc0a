"""The unit cube behind a space: quantile functions and their inverses."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from hypergrad import spaces
from hypergrad.runtime.compat import enable_x64
from hypergrad.searchers import Grid
from hypergrad.spaces import Box, Choice, Integer, Interval, Positive, Simplex, Unit

QUANTILES = {
    "interval": (Interval(-2.0, 5.0), scipy.stats.uniform(-2.0, 7.0).ppf),
    "log interval": (
        Interval(1e-5, 10.0, log=True), scipy.stats.loguniform(1e-5, 10.0).ppf
    ),
    "box": (Box(-2.0, 5.0), scipy.stats.uniform(-2.0, 7.0).ppf),
    "integer": (Integer(-2, 5), scipy.stats.randint(-2, 6).ppf),
    "index": (Choice(4), scipy.stats.randint(0, 4).ppf),
    "choice": (Choice((7, 1)), lambda t: np.where(t < 0.5, 7, 1)),
}  # fmt: skip


@pytest.mark.parametrize(("space", "quantile"), QUANTILES.values(), ids=QUANTILES)
def test_from_unit_is_the_quantile_function_of_the_samples(space, quantile):
    t = np.random.default_rng(0).uniform(size=1000)
    np.testing.assert_allclose(space.from_unit(t), quantile(t), rtol=1e-12, atol=1e-12)
    corners = space.from_unit(np.array([0.0, 1.0]))
    assert space.contains(corners).all()
    expected = quantile(np.array([1e-12, 1 - 1e-12]))
    np.testing.assert_allclose(corners, expected, rtol=1e-9)


def test_from_unit_of_a_simplex_is_uniform():
    """Marginals are Beta(1, n - 1), sums of two weights Beta(2, n - 2)."""
    t = np.random.default_rng(0).uniform(size=(5000, 3))
    alpha = np.asarray(Simplex().from_unit(t))
    assert alpha.shape == (5000, 4)
    np.testing.assert_allclose(alpha.sum(-1), 1.0, rtol=1e-14)
    for column in alpha.T:
        assert scipy.stats.kstest(column, scipy.stats.beta(1, 3).cdf).pvalue > 1e-4
    for pair in ([0, 1], [1, 3], [2, 3]):
        total = alpha[:, pair].sum(-1)
        assert scipy.stats.kstest(total, scipy.stats.beta(2, 2).cdf).pvalue > 1e-4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_to_unit_undoes_from_unit(dtype):
    tolerance = 200 * float(jnp.finfo(dtype).eps)
    t = jnp.asarray(np.random.default_rng(0).uniform(size=(50, 3)), dtype)
    for space in (Unit(), Interval(1e-5, 10.0, log=True), Box(-2.0, 5.0), Simplex()):
        alpha = space.from_unit(t)
        assert alpha.dtype == dtype
        np.testing.assert_allclose(space.to_unit(alpha), t, atol=tolerance)
    for space in (Integer(-2, 5), Choice((0.1, 7, -3.5)), Choice(4)):
        centers = (np.floor(t * space.num_values) + 0.5) / space.num_values
        np.testing.assert_allclose(space.to_unit(space.from_unit(t)), centers)
    corners = jnp.eye(3, dtype=dtype)
    new_corners = Simplex().from_unit(Simplex().to_unit(corners))
    np.testing.assert_allclose(new_corners, corners, atol=tolerance)
    assert Box(1.0, 1.0).to_unit(1.0) == 0


def test_axes_of_a_tree_are_in_the_order_of_its_leaves():
    space = {
        "a": Interval(np.array([0.0, 10.0]), np.array([1.0, 20.0]), shape=(2,)),
        "b": [Choice((5, 6, 7)), Simplex(shape=(2, 3))],
        "c": Integer(1, 4),
    }
    expected = [(None, True)] * 2 + [(3, False)] + [(None, True)] * 4 + [(4, True)]
    assert spaces.axes(space) == expected
    t = np.array([0.5, 0.25, 0.9, 0.0, 0.5, 1.0, 0.3, 0.6])
    alpha = spaces.from_unit(space, t)
    np.testing.assert_allclose(alpha["a"], [0.5, 12.5])
    assert (alpha["b"][0], alpha["c"]) == (7, 3)
    np.testing.assert_allclose(alpha["b"][1], [[0, 0.5, 0.5], [1, 0, 0]])
    # The second coordinate of a row without a remainder is lost.
    expected = np.array([0.5, 0.25, 2.5 / 3, 0.0, 0.5, 1.0, 0.0, 2.5 / 4])
    np.testing.assert_allclose(spaces.to_unit(space, alpha), expected, atol=1e-15)
    for wrong_t in (t[:-1], t[None], 0.5):
        with pytest.raises(ValueError, match=r"^t .*\(8,\)"):
            spaces.from_unit(space, wrong_t)


@pytest.mark.parametrize("space", [None, Positive(), Box(0.0, np.inf)], ids=repr)
def test_unbounded_spaces_have_neither_axes_nor_samples(space):
    for call in (
        spaces.axes,
        lambda space: spaces.sample(space, jax.random.key(0)),
        lambda space: spaces.from_unit(space, [0.5]),
        lambda space: spaces.to_unit(space, {"a": 1.0}),
    ):
        with pytest.raises(ValueError, match="space"):
            call({"a": space})


@pytest.mark.parametrize("low", [1.0, np.array([0.0, 1.0])], ids=["all", "one"])
def test_a_number_that_is_fixed_has_no_coordinate(low):
    """Searchers of the unit cube would take its axis for a free one.

    A space with equal bounds can be sampled, which gives the bound.
    """
    box = Box(low, 1.0, shape=np.shape(low))
    for call in (spaces.axes, lambda space: spaces.from_unit(space, np.zeros(2))):
        with pytest.raises(ValueError, match="low"):
            call({"a": box, "b": Unit()})
    sample = np.ravel(spaces.sample({"a": box}, jax.random.key(0))["a"])
    assert sample[-1] == 1.0
    assert 0 < sample[0] <= 1


@pytest.mark.parametrize("is_double", [True, False], ids=["float64", "float32"])
def test_every_integer_is_reached_from_its_coordinate(is_double):
    """A float32 has no more than 2^24 numbers between 1/2 and 1."""
    high = 2**30
    space, n = Integer(-high + 1, high - 1), 2 * high - 1
    indices = [0, 1, n // 2, *range(n - 40, n)]
    with enable_x64(is_double):
        alphas = [spaces.from_unit(space, [(i + 0.5) / n]) for i in indices]
        inside = jax.jit(space.from_unit)(np.array(0.75))
    assert [int(alpha) - space.low for alpha in alphas] == indices
    assert abs(int(inside) - high // 2) <= 2**8


@pytest.mark.parametrize("high", [10**8, 2**31 - 2])
def test_the_last_integer_is_that_of_the_coordinate_one(high):
    """In float32 the number of cells is the next larger number."""
    space = Integer(0, high)
    with enable_x64(False):
        for one in (1.0, np.float32(1), jnp.ones(()), np.ones((), np.float32)):
            assert int(space.from_unit(one)) == high
        assert int(jax.jit(space.from_unit)(jnp.ones(()))) == high


def test_coordinates_may_be_traced():
    space = {"a": Interval(0.0, 2.0, shape=(2,)), "b": Choice(3)}
    t = jnp.array([[0.25, 0.5, 0.1], [0.75, 1.0, 0.9]])
    alphas = jax.vmap(lambda t: spaces.from_unit(space, t))(t)
    np.testing.assert_allclose(alphas["a"], [[0.5, 1.0], [1.5, 2.0]])
    assert alphas["b"].tolist() == [0, 2]


def test_a_space_without_coordinates_has_no_axes():
    attributes = (
        "requirement", "forward", "inverse", "project", "contains", "is_interior",
        "sample",
    )  # fmt: skip
    with pytest.raises(TypeError, match="unit_shape"):
        spaces.axes(types.SimpleNamespace(**dict.fromkeys(attributes, abs)))


def test_a_space_may_set_its_coordinates_in_its_instance():
    """As a dataclass does."""
    attributes = ("forward", "inverse", "project", "contains", "is_interior", "sample")
    space = types.SimpleNamespace(
        requirement="finite",
        unit_shape=(2,),
        from_unit=lambda t: 3 * t,
        to_unit=lambda alpha: alpha / 3,
        **dict.fromkeys(attributes, abs),
    )
    assert spaces.axes({"a": space}) == [(None, True)] * 2
    alpha = spaces.from_unit({"a": space}, [0.5, 1.0])
    np.testing.assert_array_equal(alpha["a"], [1.5, 3.0])
    np.testing.assert_array_equal(spaces.to_unit({"a": space}, alpha), [0.5, 1.0])
    grid = Grid(3)
    first, _ = grid.ask(grid.init({"a": space}, None), None)
    assert first["a"].tolist() == [0.0, 0.0]


def test_a_space_without_leaves_has_no_cube():
    for call in (spaces.axes, lambda space: spaces.from_unit(space, [])):
        with pytest.raises(ValueError, match="at least one leaf"):
            call({})
