"""Pytrees of spaces: prefixes, structures, and values from which a run may start."""

from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import spaces
from hypergrad.spaces import (
    Box,
    Choice,
    Integer,
    Interval,
    Positive,
    Real,
    Simplex,
    Unit,
)

ALPHA = {
    "rate": jnp.array(0.1),
    "layers": [jnp.array([1.0, 2.0]), jnp.array([[3.0]])],
    "mixture": jnp.array([0.25, 0.75]),
}
RATE = Interval(1e-4, 1.0, log=True)
SPACE = {"rate": RATE, "layers": Positive(), "mixture": None}


def test_a_space_may_stand_for_a_subtree_and_none_for_real():
    u = jax.jit(spaces.inverse)(SPACE, ALPHA)
    expected = {
        "rate": RATE.inverse(ALPHA["rate"]),
        "layers": jax.tree.map(jnp.log, ALPHA["layers"]),
        "mixture": ALPHA["mixture"],
    }
    chex.assert_trees_all_close(u, expected, rtol=1e-14)
    alpha = jax.jit(spaces.forward)(SPACE, u)
    chex.assert_trees_all_close(alpha, ALPHA, rtol=1e-14)
    chex.assert_trees_all_equal(spaces.project(SPACE, u), u)
    assert all(x.all() for x in jax.tree.leaves(spaces.contains(SPACE, ALPHA)))
    u = spaces.inverse(Positive(), ALPHA)
    chex.assert_trees_all_close(u, jax.tree.map(jnp.log, ALPHA), rtol=1e-14)
    for space in (None, Real()):
        chex.assert_trees_all_equal(spaces.forward(space, ALPHA), ALPHA)


def test_trees_may_contain_modules_and_none():
    class Weights(eqx.Module):
        scale: Any
        bias: Any

    alpha = {"w": Weights(jnp.array(2.0), None)}
    assert spaces.inverse({"w": Positive()}, alpha)["w"].bias is None
    u = spaces.inverse({"w": Weights(Positive(), None)}, alpha)
    np.testing.assert_allclose(u["w"].scale, np.log(2.0))


class Doubled:
    """A stranger's space: ``alpha = 2 u``."""

    requirement = "finite"

    def forward(self, u):
        return 2 * u

    def inverse(self, alpha):
        return alpha / 2

    def project(self, u):
        return u

    def contains(self, alpha):
        return jnp.isfinite(alpha)

    is_interior = contains

    def sample(self, key):
        return jax.random.normal(key)


def test_a_space_of_a_stranger_works_in_a_run_and_in_a_search():
    """A step of ``u`` along ``dM/du = 2 dM/dalpha`` moves ``alpha`` four times more."""
    assert isinstance(Doubled(), spaces.Space)
    inner = lambda w, alpha, batch: (w - alpha["a"]) ** 2
    problem = hg.Bilevel(inner, lambda w, alpha, batch: w**2)
    space, alpha = {"a": Doubled()}, {"a": 3.0}
    trace = hg.minimize(
        problem, hg.Implicit(hg.Newton()), optax.sgd(0.1), 0.0, alpha, num_steps=1,
        space=space,
    )  # fmt: skip
    np.testing.assert_allclose(trace.alpha["a"], 3.0 - 4 * 0.1 * 6.0, rtol=1e-12)
    trace = hg.search(
        problem, hg.Newton(), hg.searchers.Random(), 0.0, space=space, budget=10.0
    )
    assert trace.status == "completed"


def test_samples_have_the_shapes_of_their_spaces():
    """Equal spaces get different samples; ``jit`` does not change them."""
    space = {
        "a": Interval(1e-3, 1.0, log=True, shape=(3,)),
        "b": [Unit(shape=(3,)), Unit(shape=(3,)), Simplex(shape=(2, 4))],
        "c": Box(-1.0, 1.0),
        "depth": Integer(1, 9),
        "op": Choice(3, shape=(5,)),
    }
    shapes = {"a": (3,), "b": [(3,), (3,), (2, 4)], "c": (), "depth": (), "op": (5,)}
    alpha = spaces.sample(space, jax.random.key(0))
    assert jax.tree.map(jnp.shape, alpha) == shapes
    assert all(x.all() for x in jax.tree.leaves(spaces.contains(space, alpha)))
    assert not np.allclose(alpha["b"][0], alpha["b"][1])
    jitted = jax.jit(lambda key: spaces.sample(space, key))(jax.random.key(0))
    chex.assert_trees_all_close(jitted, alpha, rtol=1e-6)
    spaces.check(space, alpha)
    for leaf, value in (("op", jnp.array([0, 1, 2, 0, 3])), ("depth", 2.5)):
        with pytest.raises(ValueError, match=rf"alpha\['{leaf}'\]"):
            spaces.check(space, alpha | {leaf: value})


@pytest.mark.parametrize(
    "space",
    [
        {"rate": Positive()},
        {**SPACE, "extra": Real()},
        [Positive()],
        {**SPACE, "layers": [Positive()]},
        {**SPACE, "rate": [Positive()]},
    ],
    ids=["missing leaf", "extra leaf", "list", "shorter list", "deeper leaf"],
)
def test_an_error_of_structure_names_both_structures(space):
    with pytest.raises(ValueError, match=r"^space .* alpha") as error:
        spaces.forward(space, ALPHA)
    assert str(jax.tree.structure(ALPHA)) in str(error.value)


@pytest.mark.parametrize(
    ("space", "name"),
    [
        ({**SPACE, "rate": Positive}, r"space\['rate'\]"),
        ({**SPACE, "rate": (0.0, 1.0)}, r"space\['rate'\]\[0\]"),
        ("positive", "space"),
    ],
    ids=["class", "tuple", "text"],
)
def test_leaves_must_be_spaces(space, name):
    for call in (spaces.check, spaces.forward, lambda s, a: spaces.sample(s, None)):
        with pytest.raises(TypeError, match=name):
            call(space, ALPHA)


@pytest.mark.parametrize(
    ("space", "alpha", "index", "number"),
    [
        (Positive(), [1.0, 0.0], r"\[1\]", 0.0),
        (Positive(), np.inf, "", np.inf),
        (Unit(), 1.0, "", 1.0),
        (Unit(), [[0.5], [0.0]], r"\[1, 0\]", 0.0),
        (Interval(1.0, 2.0, log=True), 2.0, "", 2.0),
        (Box(0.0, 1.0), [0.0, 1.5], r"\[1\]", 1.5),
        (Simplex(), [1.0, 0.0], r"\[1\]", 0.0),
        (Simplex(), [1.5, -0.5], r"\[1\]", -0.5),
        (Simplex(), [0.5, 0.6], r"\[0\]", 0.5),
        (Real(), np.nan, "", np.nan),
        (None, np.nan, "", np.nan),
    ],
    ids=lambda x: repr(x) if not isinstance(x, str) else "",
)
def test_check_names_the_entry_and_its_value(space, alpha, index, number):
    with pytest.raises(ValueError, match=rf"^alpha\['p'\]{index} .*got {number}"):
        spaces.check({"p": space}, {"p": jnp.array(alpha)})


def test_check_accepts_interior_values_and_tracers():
    for space, alpha in [
        (SPACE, ALPHA),
        (Box(0.0, 1.0), jnp.array([0.0, 1.0])),
        (Simplex(), np.full(3, 1 / 3, np.float32)),
        (Unit(), 0.5),
        (Interval(-1.0, 1.0), jnp.zeros(20)),
        ({"a": Interval(-1.0, 1.0, shape=(20,))}, {"a": jnp.zeros(20)}),
    ]:
        spaces.check(space, alpha)
    jax.jit(lambda x: spaces.check(Positive(), x))(-1.0)
    jax.jit(lambda space: spaces.check(space, -1.0))(Interval(0.0, 1.0))
    jax.jit(lambda low: Interval(low, 0.0))(1.0)


def test_check_compares_the_shapes_of_space_bounds_and_leaf():
    alpha = {"p": jnp.full(3, 0.5)}
    for space in (
        Interval(-1.0, 1.0, shape=(2,)),
        Interval(np.zeros(2), 1.0),
        Box(np.zeros(2), 1.0),
    ):
        with pytest.raises(ValueError, match=r"^alpha\['p'\].*\(\d,\).*\(\d,\)"):
            spaces.check({"p": space}, alpha)
    with pytest.raises(ValueError, match="Simplex"):
        Simplex().forward(jnp.array(1.0))
