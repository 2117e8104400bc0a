"""Spaces against closed forms, central differences and scipy's distributions."""

import types
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

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

BIJECTIONS = {
    "real": Real(),
    "positive": Positive(),
    "interval": Interval(-2.0, 5.0),
    "interval-array": Interval(np.array([-2.0, 0.0, 1.0]), 5.0),
    "log": Interval(1e-6, 10.0, log=True),
    "unit": Unit(),
    "simplex": Simplex(),
}
EVERY = {**BIJECTIONS, "box": Box(-1.0, 2.0)}
DTYPES = [jnp.float32, jnp.float64]
bijections = pytest.mark.parametrize("space", BIJECTIONS.values(), ids=BIJECTIONS)
every = pytest.mark.parametrize("space", EVERY.values(), ids=EVERY)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64"])


def draws(dtype=jnp.float64, shape=(40, 3), scale=3.0):
    return scale * jax.random.normal(jax.random.key(7), shape, dtype)


def closed_form(space, u):
    """What ``forward`` must be, in NumPy."""
    u = np.asarray(u, np.float64)
    match space:
        case Real() | Box():
            return u
        case Positive():
            return np.exp(u)
        case Simplex():
            powers = np.exp(u)
            return powers / powers.sum(-1, keepdims=True)
    low, high = np.asarray(space.low), np.asarray(space.high)
    fraction = 1 / (1 + np.exp(-u))
    if space.log:
        return low * (high / low) ** fraction
    return low + (high - low) * fraction


@every
@dtypes
def test_forward_is_the_formula(space, dtype):
    u = draws(dtype)
    alpha = space.forward(u)
    assert alpha.dtype == dtype
    np.testing.assert_allclose(
        alpha, closed_form(space, u), rtol=40 * float(jnp.finfo(dtype).eps), atol=1e-7
    )


@bijections
@dtypes
def test_round_trips(space, dtype):
    tolerance = 2e3 * float(jnp.finfo(dtype).eps)
    u = draws(dtype, scale=2.0)
    if isinstance(space, Simplex):
        u = u - u.mean(-1, keepdims=True)
    alpha = space.forward(u)
    back = space.inverse(alpha)
    assert back.dtype == dtype
    np.testing.assert_allclose(back, u, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(space.forward(back), alpha, rtol=tolerance)


def test_simplex_inverse_sums_to_zero():
    u = Simplex().inverse(jax.nn.softmax(draws()))
    np.testing.assert_allclose(u.sum(-1), 0.0, atol=1e-13)


@every
def test_jacobian_is_the_central_difference(space):
    for u in jnp.concatenate([draws(shape=(5, 3)), jnp.zeros((1, 3))]):
        step = 1e-5
        columns = [
            (space.forward(u + d) - space.forward(u - d)) / (2 * step)
            for d in step * jnp.eye(3)
        ]
        expected = np.stack(columns, axis=-1)
        for jacobian in (jax.jacfwd, jax.jacrev):
            np.testing.assert_allclose(
                jacobian(space.forward)(u), expected, rtol=1e-8, atol=1e-9
            )


@bijections
def test_inverse_jacobian_inverts_the_jacobian(space):
    u = draws(shape=(3,))
    product = jax.jacrev(space.inverse)(space.forward(u)) @ jax.jacfwd(space.forward)(u)
    expected = np.eye(3) - (1 / 3 if isinstance(space, Simplex) else 0)
    np.testing.assert_allclose(product, expected, atol=1e-12)


@every
@dtypes
@pytest.mark.parametrize("scale", [50.0, 1e3])
def test_far_out_stays_in_the_set_with_finite_gradients(space, dtype, scale):
    if isinstance(space, Positive | Box) and scale > 50.0:
        pytest.skip("exp overflows, and Box has no bijection")
    u = scale * jnp.array([[-1.0, 1.0, 0.3], [1.0, -1.0, -1.0]], dtype)
    alpha = space.forward(space.project(u))
    assert space.contains(alpha).all()
    total = lambda f: lambda x: (f(x) * jnp.arange(1, 4, dtype=dtype)[None]).sum()
    assert np.isfinite(jax.grad(total(space.forward))(u)).all()
    assert np.isfinite(jax.hessian(total(space.forward))(u)).all()
    back = space.inverse(alpha)
    assert np.isfinite(back).all()
    assert np.isfinite(jax.grad(total(space.inverse))(alpha)).all()
    np.testing.assert_allclose(space.forward(back), alpha, rtol=1e-4, atol=1e-20)


def test_gradient_keeps_its_relative_accuracy_far_out():
    # width * sigmoid'(50) by hand: 1 - sigmoid(50) rounds to zero.
    slope = jax.grad(Interval(0.0, 2.0).forward)(jnp.array(50.0))
    np.testing.assert_allclose(slope, 2 * np.exp(-50.0), rtol=1e-12)


@dtypes
@pytest.mark.parametrize("log", [False, True])
def test_forward_never_leaves_the_interval(dtype, log):
    u = jnp.linspace(-60.0, 60.0, 200_001, dtype=dtype)
    for low, high in [(0.1, 0.7), (1e-6, 3.3), (0.3, 0.3 + 1e-6), (7.0, 1e6)]:
        space = Interval(low, high, log)
        for forward in (space.forward, jax.jit(space.forward)):
            alpha = np.asarray(forward(u))
            assert alpha.min() >= dtype(low)
            assert alpha.max() <= dtype(high)
            assert np.diff(alpha).min() >= -np.spacing(alpha).max() * 8


@dtypes
@pytest.mark.parametrize("log", [False, True])
def test_inverse_is_finite_up_to_the_bounds(dtype, log):
    space = Interval(0.5, 2.0, log)
    ends = np.array([0.5, 2.0], dtype)
    nearest = np.nextafter(ends, np.ones(2, dtype))
    for alpha in (ends, nearest):
        u = space.inverse(alpha)
        assert np.isfinite(u).all()
        np.testing.assert_allclose(
            space.forward(u), alpha, rtol=float(jnp.finfo(dtype).eps)
        )


@every
def test_outside_is_nan_not_a_wrong_number(space):
    outside = jnp.full((3,), -7.0)
    inside = bool(space.contains(outside).all())
    assert inside == isinstance(space, Real)
    if not isinstance(space, Real | Box):
        assert np.isnan(space.inverse(outside)).all()
        assert np.isnan(space.inverse(jnp.full((3,), jnp.nan))).all()
    assert not space.contains(jnp.full((3,), jnp.nan)).any()


def test_contains_by_hand():
    alpha = jnp.array([-1.0, 0.0, 1.0, 3.0, jnp.inf])
    for space, expected in [
        (Real(), [True, True, True, True, False]),
        (Positive(), [False, True, True, True, False]),
        (Unit(), [False, True, True, False, False]),
        (Interval(1.0, 4.0, log=True), [False, False, True, True, False]),
        (Box(0.0, jnp.inf), [False, True, True, True, False]),
    ]:
        inside = space.contains(alpha)
        assert inside.dtype == bool
        np.testing.assert_array_equal(inside, expected)
    rows = jnp.array([[0.5, 0.5], [0.5, 0.6], [1.5, -0.5], [1.0, 0.0]])
    expected = np.array([True, False, False, True])[:, None].repeat(2, 1)
    np.testing.assert_array_equal(Simplex().contains(rows), expected)


@dtypes
def test_box_project_is_clip(dtype):
    u = draws(dtype)
    low, high = np.array([-1.0, 0.0, 2.0]), np.array([1.0, np.inf, 2.0])
    projected = Box(low, high).project(u)
    assert projected.dtype == dtype
    np.testing.assert_array_equal(projected, np.clip(u, low, high))
    assert Box(low, high).forward(u) is u
    assert Box(low, high).inverse(u) is u


@bijections
def test_other_projections_are_the_identity(space):
    u = draws()
    assert space.project(u) is u


@every
def test_jit_vmap_and_loops_agree(space):
    u = draws()
    alpha = space.forward(space.project(u))
    operations = [(name, u) for name in ("forward", "project")]
    for name, x in [*operations, ("inverse", alpha), ("contains", alpha)]:
        call = lambda x, name=name: getattr(space, name)(x)
        expected = np.stack([call(row) for row in x])
        for other in (jax.jit(call), jax.vmap(call), jax.jit(jax.vmap(call))):
            np.testing.assert_allclose(other(x), expected, rtol=1e-13, atol=1e-15)


def test_bounds_are_data():
    low = jnp.array([-1.0, 0.0, 1.0])
    u = draws(shape=(3,))
    space = jax.vmap(lambda low: Interval(low, 2.0))(low)
    swept = jax.vmap(lambda space, u: space.forward(u))(
        Interval(low, jnp.full(3, 2.0)), u
    )
    np.testing.assert_allclose(swept, closed_form(Interval(low, 2.0), u), rtol=1e-14)
    np.testing.assert_array_equal(space.low, low)

    traces = []

    @jax.jit
    def forward(space, u):
        traces.append(1)
        return spaces.forward(space, u)

    for high in (2.0, 3.0, 4.0):
        forward(Interval(0.0, high), u)
    assert len(traces) == 1
    slope = jax.grad(lambda high: Interval(0.0, high).forward(jnp.array(0.0)))(2.0)
    np.testing.assert_allclose(slope, 0.5)


@dtypes
@pytest.mark.parametrize(
    ("space", "distribution"),
    [
        (Interval(-2.0, 5.0), scipy.stats.uniform(-2.0, 7.0)),
        (Box(-2.0, 5.0), scipy.stats.uniform(-2.0, 7.0)),
        (Unit(), scipy.stats.uniform()),
        (Interval(1e-5, 10.0, log=True), scipy.stats.loguniform(1e-5, 10.0)),
    ],
    ids=["interval", "box", "unit", "log"],
)
def test_samples_follow_the_distribution(space, distribution, dtype):
    alpha = space.sample(jax.random.key(0), (50, 100), dtype)
    assert alpha.shape == (50, 100)
    assert alpha.dtype == dtype
    assert space.contains(alpha).all()
    test = scipy.stats.kstest(np.asarray(alpha, np.float64).ravel(), distribution.cdf)
    assert test.pvalue > 0.01


@dtypes
def test_simplex_samples_are_dirichlet(dtype):
    alpha = Simplex().sample(jax.random.key(0), (5000, 4), dtype)
    assert alpha.dtype == dtype
    assert Simplex().contains(alpha).all()
    for column in np.asarray(alpha, np.float64).T:  # marginals are Beta(1, n - 1)
        assert scipy.stats.kstest(column, scipy.stats.beta(1, 3).cdf).pvalue > 0.01


def test_samples_with_array_bounds():
    space = Interval(np.array([0.0, 10.0]), np.array([1.0, 20.0]))
    alpha = space.sample(jax.random.key(0), (1000, 2))
    assert alpha.dtype == jnp.result_type(float)
    np.testing.assert_allclose(alpha.mean(0), [0.5, 15.0], rtol=0.05)


@pytest.mark.parametrize("space", [Real(), Positive(), Box(0.0, np.inf)], ids=repr)
def test_unbounded_spaces_do_not_sample(space):
    with pytest.raises(ValueError, match="Interval"):
        space.sample(jax.random.key(0), (2,))


DISCRETE = {
    "integer": (Integer(-2, 5), range(-2, 6)),
    "choice": (Choice((0.1, 7, -3.5)), (0.1, 7, -3.5)),
    "index": (Choice(4), range(4)),
}
discrete = pytest.mark.parametrize(
    ("space", "values"), DISCRETE.values(), ids=DISCRETE.keys()
)


@discrete
def test_discrete_samples_are_uniform(space, values):
    """chi-square of 4000 draws, at p = 1e-4; integers stay integers."""
    alpha = np.asarray(space.sample(jax.random.key(0), (40, 100)))
    kind = np.floating if 0.1 in values else np.integer
    assert np.issubdtype(alpha.dtype, kind)
    assert space.contains(alpha).all()
    counts = np.array([np.sum(alpha == value) for value in values])
    assert counts.sum() == 4000
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


def test_discrete_contains_by_hand():
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


def test_discrete_spaces_in_a_tree():
    space = {"depth": Integer(1, 9), "op": Choice(3, shape=(5,)), "rate": Unit()}
    drawn = spaces.sample(space, jax.random.key(0))
    assert jax.tree.map(jnp.shape, drawn) == {"depth": (), "op": (5,), "rate": ()}
    assert all(x.all() for x in jax.tree.leaves(spaces.contains(space, drawn)))
    assert spaces.check(space, drawn) is None
    with pytest.raises(ValueError, match=r"alpha\['op'\]\[4\] is 3, .*its values"):
        spaces.check(space, drawn | {"op": jnp.array([0, 1, 2, 0, 3])})
    with pytest.raises(ValueError, match=r"alpha\['depth'\] is 2.5.*from low to high"):
        spaces.check(space, drawn | {"depth": 2.5})


@discrete
def test_discrete_spaces_have_no_unconstrained_variable(space, values):
    alpha = float(values[1])
    for call in (spaces.forward, spaces.inverse, spaces.project):
        with pytest.raises(ValueError, match=r"hg\.search.*Simplex.*score_function"):
            call(space, alpha)
    loss = lambda w, alpha, batch: jnp.sum((w - alpha) ** 2)
    with pytest.raises(ValueError, match=r"hg\.search.*Simplex.*score_function"):
        hg.minimize(
            hg.Bilevel(loss, loss), hg.Implicit(hg.Newton()), optax.sgd(0.1),
            0.0, alpha, num_steps=1, space=space,
        )  # fmt: skip


CUBE = {
    "interval": (Interval(-2.0, 5.0), scipy.stats.uniform(-2.0, 7.0).ppf),
    "log": (Interval(1e-5, 10.0, log=True), scipy.stats.loguniform(1e-5, 10.0).ppf),
    "box": (Box(-2.0, 5.0), scipy.stats.uniform(-2.0, 7.0).ppf),
    "integer": (Integer(-2, 5), scipy.stats.randint(-2, 6).ppf),
    "index": (Choice(4), scipy.stats.randint(0, 4).ppf),
    "choice": (Choice((7, 1)), lambda t: np.where(t < 0.5, 7, 1)),
}


@pytest.mark.parametrize("name", CUBE)
def test_from_unit_is_the_quantile_of_the_distribution_sampled(name):
    """Of scipy's distributions, which the samples above follow."""
    space, quantile = CUBE[name]
    t = np.random.default_rng(0).uniform(size=1000)
    np.testing.assert_allclose(space.from_unit(t), quantile(t), rtol=1e-12, atol=1e-12)
    ends = space.from_unit(np.array([0.0, 1.0]))
    assert space.contains(ends).all()
    np.testing.assert_allclose(ends, quantile(np.array([1e-12, 1 - 1e-12])), rtol=1e-9)


def test_from_unit_of_a_simplex_has_the_marginals_of_a_dirichlet():
    """Beta(1, n - 1) each, in every order of the weights; rows sum to 1."""
    t = np.random.default_rng(0).uniform(size=(5000, 3))
    alpha = np.asarray(Simplex().from_unit(t))
    assert alpha.shape == (5000, 4)
    np.testing.assert_allclose(alpha.sum(-1), 1.0, rtol=1e-14)
    for column in alpha.T:
        assert scipy.stats.kstest(column, scipy.stats.beta(1, 3).cdf).pvalue > 1e-4
    # A pair of weights together: the sum of two is Beta(2, 2).
    for pair in ([0, 1], [1, 3], [2, 3]):
        total = alpha[:, pair].sum(-1)
        assert scipy.stats.kstest(total, scipy.stats.beta(2, 2).cdf).pvalue > 1e-4


@dtypes
def test_to_unit_undoes_from_unit(dtype):
    tolerance = 200 * float(jnp.finfo(dtype).eps)
    t = jnp.asarray(np.random.default_rng(0).uniform(size=(50, 3)), dtype)
    for space in (Unit(), Interval(1e-5, 10.0, log=True), Box(-2.0, 5.0), Simplex()):
        alpha = space.from_unit(t)
        assert alpha.dtype == dtype
        np.testing.assert_allclose(space.to_unit(alpha), t, atol=tolerance)
    for space, _ in DISCRETE.values():
        alpha, n = space.from_unit(t), space.num_values
        np.testing.assert_allclose(space.to_unit(alpha), (np.floor(t * n) + 0.5) / n)
    corners = jnp.eye(3, dtype=dtype)
    back = Simplex().from_unit(Simplex().to_unit(corners))
    np.testing.assert_allclose(back, corners, atol=tolerance)
    assert Box(1.0, 1.0).to_unit(1.0) == 0


def test_the_cube_of_a_tree():
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
    back = spaces.to_unit(space, alpha)
    # Of a row that is broken off at once, the second coordinate is lost.
    lost = np.array([0.5, 0.25, 2.5 / 3, 0.0, 0.5, 1.0, 0.0, 2.5 / 4])
    np.testing.assert_allclose(back, lost, atol=1e-15)
    for wrong in (t[:-1], t[None], 0.5):
        with pytest.raises(ValueError, match=r"shape \(8,\)"):
            spaces.from_unit(space, wrong)


def test_spaces_without_a_cube():
    for space in (None, Positive(), Box(0.0, np.inf)):
        with pytest.raises(ValueError, match="Interval"):
            spaces.axes({"a": space})
    with pytest.raises(TypeError, match="unit_shape"):
        spaces.axes(types.SimpleNamespace(**dict.fromkeys(METHODS, abs)))


METHODS = (
    "allowed", "forward", "inverse", "project", "contains", "interior", "sample",
)  # fmt: skip

ALPHA = {
    "rate": jnp.array(0.1),
    "layers": [jnp.array([1.0, 2.0]), jnp.array([[3.0]])],
    "mixture": jnp.array([0.25, 0.75]),
}
SPACE = {"rate": Interval(1e-4, 1.0, log=True), "layers": Positive(), "mixture": None}


def test_prefix_trees():
    u = spaces.inverse(SPACE, ALPHA)
    expected = {
        "rate": Interval(1e-4, 1.0, log=True).inverse(ALPHA["rate"]),
        "layers": [jnp.log(x) for x in ALPHA["layers"]],
        "mixture": ALPHA["mixture"],
    }
    assert eqx.tree_equal(u, expected, rtol=1e-14)
    assert eqx.tree_equal(spaces.forward(SPACE, u), ALPHA, rtol=1e-14)
    assert eqx.tree_equal(spaces.project(SPACE, u), u)
    assert all(x.all() for x in jax.tree.leaves(spaces.contains(SPACE, ALPHA)))
    assert eqx.tree_equal(jax.jit(spaces.forward)(SPACE, u), ALPHA, rtol=1e-14)


@pytest.mark.parametrize("space", [None, Real()], ids=repr)
def test_none_is_real_everywhere(space):
    for call in (spaces.forward, spaces.inverse, spaces.project):
        assert eqx.tree_equal(call(space, ALPHA), ALPHA)
    assert spaces.check(space, ALPHA) is None


def test_one_space_for_everything():
    u = spaces.inverse(Positive(), ALPHA)
    assert eqx.tree_equal(u, jax.tree.map(jnp.log, ALPHA), rtol=1e-14)
    assert jax.tree.structure(u) == jax.tree.structure(ALPHA)


def test_modules_none_nodes_and_bare_arrays():
    class Weights(eqx.Module):
        scale: Any
        bias: Any

    alpha = {"w": Weights(jnp.array(2.0), None)}
    assert spaces.inverse({"w": Positive()}, alpha)["w"].bias is None
    mapped = spaces.inverse({"w": Weights(Positive(), None)}, alpha)
    np.testing.assert_allclose(mapped["w"].scale, np.log(2.0))
    np.testing.assert_allclose(spaces.forward(Positive(), jnp.zeros(2)), 1.0)


def test_a_space_of_ones_own():
    double = types.SimpleNamespace(
        forward=lambda u: 2 * u,
        inverse=lambda alpha: alpha / 2,
        project=lambda u: u,
        contains=lambda alpha: alpha == alpha,
        interior=lambda alpha: alpha == alpha,
        allowed=lambda: "anything",
        sample=lambda key, shape=(), dtype=None: jnp.zeros(shape, dtype),
    )
    assert isinstance(double, spaces.Space)
    assert spaces.forward({"a": double}, {"a": 3.0}) == {"a": 6.0}


def test_sample_tree():
    space = {
        "a": Interval(1e-3, 1.0, log=True, shape=(3,)),
        "b": [Unit(shape=(3,)), Unit(shape=(3,)), Simplex(shape=(2, 4))],
        "c": Box(-1.0, 1.0),
    }
    shapes = {"a": (3,), "b": [(3,), (3,), (2, 4)], "c": ()}
    drawn = spaces.sample(space, jax.random.key(0))
    assert jax.tree.map(jnp.shape, drawn) == shapes
    assert all(x.all() for x in jax.tree.leaves(spaces.contains(space, drawn)))
    assert not np.allclose(drawn["b"][0], drawn["b"][1])
    again = jax.jit(lambda key: spaces.sample(space, key))(jax.random.key(0))
    assert eqx.tree_equal(again, drawn, rtol=1e-6)
    with pytest.raises(TypeError, match=r"write Simplex\(\)"):
        spaces.sample({"a": Simplex}, jax.random.key(0))


@pytest.mark.parametrize(
    "space",
    [
        {"rate": Positive()},
        {**SPACE, "extra": Real()},
        [Positive()],
        {**SPACE, "layers": [Positive()]},
        {**SPACE, "rate": [Positive()]},
    ],
    ids=["missing", "extra", "list", "shorter", "deeper"],
)
def test_mismatch_names_both_structures(space):
    with pytest.raises(ValueError, match=r"space must have .* alpha") as error:
        spaces.forward(space, ALPHA)
    assert str(jax.tree.structure(ALPHA)) in str(error.value)
    assert "rate" in str(error.value)


@pytest.mark.parametrize(
    ("space", "match"),
    [
        ({**SPACE, "rate": Positive}, r"space\['rate'\].*Positive\(\)"),
        ({**SPACE, "rate": (0.0, 1.0)}, r"space\['rate'\]\[0\].*float"),
        ("positive", "str"),
    ],
    ids=["class", "tuple", "name"],
)
def test_leaves_must_be_spaces(space, match):
    with pytest.raises(TypeError, match=match):
        spaces.check(space, ALPHA)


@pytest.mark.parametrize(
    ("space", "alpha", "match"),
    [
        (Positive(), [1.0, 0.0], r"alpha\['p'\]\[1\] is 0\.0.*above 0"),
        (Positive(), [1.0, -2.0], r"alpha\['p'\]\[1\] is -2\.0.*above 0"),
        (Positive(), np.inf, r"alpha\['p'\] is inf"),
        (Unit(), 1.0, r"alpha\['p'\] is 1\.0.*high=1\.0.*strictly between"),
        (Unit(), [[0.5], [0.0]], r"alpha\['p'\]\[1, 0\] is 0\.0"),
        (Interval(1.0, 2.0, log=True), 2.0, r"is 2\.0.*high=2\.0.*strictly between"),
        (Box(0.0, 1.0), [0.0, 1.5], r"alpha\['p'\]\[1\] is 1\.5.*from low to high"),
        (Simplex(), [1.0, 0.0], r"alpha\['p'\]\[1\] is 0\.0.*sum to 1"),
        (Simplex(), [1.5, -0.5], r"alpha\['p'\]\[1\] is -0\.5"),
        (Simplex(), [0.5, 0.6], r"alpha\['p'\]\[0\] is 0\.5.*sum to 1"),
        (Real(), np.nan, r"alpha\['p'\] is nan"),
        (None, np.nan, r"alpha\['p'\] is nan"),
    ],
)
def test_check_names_leaf_value_and_remedy(space, alpha, match):
    with pytest.raises(ValueError, match=match) as error:
        spaces.check({"p": space}, {"p": jnp.array(alpha)})
    assert "start" in str(error.value)


def test_check_passes_what_is_inside_and_skips_tracers():
    assert spaces.check(SPACE, ALPHA) is None
    assert spaces.check(Box(0.0, 1.0), jnp.array([0.0, 1.0])) is None
    assert spaces.check(Simplex(), np.full(3, 1 / 3, np.float32)) is None
    assert spaces.check(Unit(), 0.5) is None
    jax.jit(lambda x: spaces.check(Positive(), x))(-1.0)
    jax.jit(lambda space: spaces.check(space, -1.0))(Interval(0.0, 1.0))
    jax.jit(lambda low: Interval(low, 0.0))(1.0)


LISTED: Any = ([0.0], 1.0)
HALF: Any = (0.5, 2)
WORDS: Any = ["adam", "sgd"]
NAMED: Any = ("a", 1.0)
OPEN: Any = (0.0, None)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Interval(1.0, 1.0), ValueError, r"low.*below high"),
        (lambda: Interval(2.0, 1.0), ValueError, r"low=2\.0.*high=1\.0"),
        (lambda: Interval(np.nan, 1.0), ValueError, "finite"),
        (lambda: Interval(np.array([0, 1]), 1), ValueError, "below high"),
        (lambda: Interval(*LISTED), TypeError, r"low .*array.*\[0\.0\]"),
        (lambda: Interval(0.0, np.inf), ValueError, r"finite.*Positive\(\)"),
        (lambda: Interval(0.0, 1.0, log=True), ValueError, r"low > 0.*0\.0"),
        (lambda: Interval(*NAMED), TypeError, r"low .*number.*'a'"),
        (lambda: Interval(*OPEN), TypeError, r"high .*number.*None"),
        (lambda: Box(2.0, 1.0), ValueError, r"low.*above high"),
        (lambda: Box(np.zeros(2), np.zeros(3)), ValueError, r"\(2,\).*\(3,\)"),
        (lambda: Integer(*HALF), TypeError, r"low .*integer.*0\.5"),
        (lambda: Integer(3, 3), ValueError, "below high"),
        (lambda: Choice(WORDS), TypeError, r"'adam'.*Choice\(n\).*switch"),
        (lambda: Choice([1.0, np.inf]), TypeError, "finite"),
        (lambda: Choice(1), ValueError, r"at least two.*\[0\]"),
        (lambda: Choice([1, 2, 1]), ValueError, "all different"),
    ],
)
def test_bad_bounds_are_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_bounds_that_do_not_fit_the_leaf():
    for space in (Interval(np.zeros(2), 1.0), Box(np.zeros(2), 1.0)):
        with pytest.raises(ValueError, match=r"low has shape \(2,\).*\(3,\)"):
            space.contains(jnp.zeros(3))
        with pytest.raises(ValueError, match=r"alpha\['p'\].*\(2,\).*\(3,\)"):
            spaces.check({"p": space}, {"p": jnp.full(3, 0.5)})
    with pytest.raises(ValueError, match="Simplex"):
        Simplex().forward(jnp.array(1.0))


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [
        (1e-60, 1.0, True),
        (1e-30, 1e10, True),
        (1.0, 1e60, False),
        (-3e38, 3e38, False),
        (1, 1 + 1e-9, False),
    ],
)
def test_bounds_that_the_dtype_cannot_hold(low, high, log):
    space = Interval(low, high, log)
    assert np.isfinite(space.forward(jnp.zeros((), jnp.float64)))
    with pytest.raises(ValueError, match="float32"):
        space.forward(jnp.zeros((), jnp.float32))


def test_half_precision():
    u = draws(jnp.bfloat16)
    for space in EVERY.values():
        alpha = space.forward(space.project(u))
        assert alpha.dtype == jnp.bfloat16
        assert space.contains(alpha).all()
        assert np.isfinite(space.inverse(alpha).astype(float)).all()


def test_a_space_of_another_shape_than_alpha_is_refused():
    """One without a shape stands for any."""
    spaces.check(Interval(-1.0, 1.0), jnp.zeros(20))
    spaces.check({"a": Interval(-1.0, 1.0, shape=(20,))}, {"a": jnp.zeros(20)})
    said = r"alpha\['a'\] has shape \(20,\), and its space .* is of shape \(3,\)"
    with pytest.raises(ValueError, match=said):
        spaces.check({"a": Interval(-1.0, 1.0, shape=(3,))}, {"a": jnp.zeros(20)})
