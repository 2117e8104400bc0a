"""Continuous spaces against closed forms, central differences and distributions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from hypergrad.runtime import compat
from hypergrad.spaces import Box, Interval, Positive, Real, Simplex, Unit

BIJECTIONS = {
    "real": Real(),
    "positive": Positive(),
    "interval": Interval(-2.0, 5.0),
    "interval with arrays": Interval(np.array([-2.0, 0.0, 1.0]), 5.0),
    "log interval": Interval(1e-6, 10.0, log=True),
    "unit": Unit(),
    "simplex": Simplex(),
}
SPACES = BIJECTIONS | {"box": Box(-1.0, 2.0)}
for_each_bijection = pytest.mark.parametrize(
    "space", BIJECTIONS.values(), ids=BIJECTIONS
)
for_each_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
for_each_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])


def sample_u(dtype=jnp.float64, shape=(40, 3), scale=3.0):
    return scale * jax.random.normal(jax.random.key(7), shape, dtype)


def closed_form(space, u):
    """Returns ``forward(u)`` computed by NumPy."""
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


@for_each_space
@for_each_dtype
def test_forward_equals_the_closed_form_and_inverse_undoes_it(space, dtype):
    """Both keep the dtype, and are the same under ``jit`` and ``vmap``."""
    eps = float(jnp.finfo(dtype).eps)
    u = sample_u(dtype, scale=2.0)
    if isinstance(space, Simplex):
        u = u - u.mean(-1, keepdims=True)
    alpha = space.forward(u)
    chex.assert_trees_all_close(
        alpha, closed_form(space, u).astype(dtype), rtol=40 * eps, atol=1e-7
    )
    new_u = space.inverse(alpha)
    chex.assert_trees_all_close(new_u, u, rtol=2e3 * eps, atol=2e3 * eps)
    for fn, x in ((space.forward, u), (space.inverse, alpha)):
        expected = jnp.stack([fn(row) for row in x[:3]])
        call = lambda x, fn=fn: fn(x)  # bounds that are arrays cannot be hashed
        for transformed in (jax.jit(call), jax.jit(jax.vmap(call))):
            chex.assert_trees_all_close(
                transformed(x)[:3], expected, rtol=20 * eps, atol=20 * eps
            )


def test_simplex_inverse_has_rows_of_sum_zero():
    u = Simplex().inverse(jax.nn.softmax(sample_u()))
    np.testing.assert_allclose(u.sum(-1), 0.0, atol=1e-13)


@for_each_space
def test_jacobians_equal_central_differences(space):
    """The Jacobian of ``inverse`` is the inverse matrix (simplex: up to a shift)."""
    jacobian = jax.jit(jax.vmap(jax.jacrev(space.forward)))
    u = jnp.concatenate([sample_u(shape=(5, 3)), jnp.zeros((1, 3))])
    step = 1e-5 * jnp.eye(3)[:, None]
    plus, minus = space.forward(u[None] + step), space.forward(u[None] - step)
    expected = np.moveaxis((plus - minus) / 2e-5, 0, -1)
    np.testing.assert_allclose(jacobian(u), expected, rtol=1e-8, atol=1e-9)
    inverse_jacobian = jax.jit(jax.vmap(jax.jacfwd(space.inverse)))(space.forward(u))
    expected = np.eye(3) - (1 / 3 if isinstance(space, Simplex) else 0)
    product = inverse_jacobian @ jacobian(u)
    np.testing.assert_allclose(product, np.tile(expected, (6, 1, 1)), atol=1e-12)


@for_each_space
@for_each_dtype
@pytest.mark.parametrize("scale", [50.0, 1e3])
def test_extreme_values_stay_in_the_space_with_finite_derivatives(space, dtype, scale):
    if isinstance(space, Positive | Box) and scale > 50.0:
        # exp(1e3) is infinite in any dtype, and a number of Box is its own image.
        pytest.skip("exp overflows, and Box has no bijection")
    u = scale * jnp.array([[-1.0, 1.0, 0.3], [1.0, -1.0, -1.0]], dtype)
    alpha = space.forward(space.project(u))
    assert space.contains(alpha).all()
    weights = jnp.arange(1, 4, dtype=dtype)[None]
    total = lambda fn: lambda x: jnp.sum(fn(x) * weights)
    new_u = space.inverse(alpha)
    derivatives = (
        jax.jit(jax.grad(total(space.forward)))(u),
        jax.jit(jax.hessian(total(space.forward)))(u),
        jax.jit(jax.grad(total(space.inverse)))(alpha),
    )
    chex.assert_tree_all_finite((new_u, derivatives))
    chex.assert_trees_all_close(space.forward(new_u), alpha, rtol=1e-4, atol=1e-20)


def test_gradient_of_an_interval_keeps_its_digits_near_the_upper_bound():
    """The derivative is width * sigmoid'(50), although 1 - sigmoid(50) rounds to 0."""
    gradient = jax.grad(Interval(0.0, 2.0).forward)(jnp.array(50.0))
    np.testing.assert_allclose(gradient, 2 * np.exp(-50.0), rtol=1e-12)


@for_each_dtype
@pytest.mark.parametrize("log", [False, True], ids=["linear", "log"])
def test_forward_never_leaves_the_interval_and_increases(dtype, log):
    u = jnp.linspace(-60.0, 60.0, 200_001, dtype=dtype)
    for low, high in [(0.1, 0.7), (1e-6, 3.3), (0.3, 0.3 + 1e-6), (7.0, 1e6)]:
        space = Interval(low, high, log)
        for forward in (space.forward, jax.jit(space.forward)):
            alpha = np.asarray(forward(u))
            assert alpha.min() >= dtype(low)
            assert alpha.max() <= dtype(high)
            assert np.diff(alpha).min() >= -np.spacing(alpha).max() * 8


@for_each_dtype
@pytest.mark.parametrize("log", [False, True], ids=["linear", "log"])
def test_inverse_is_finite_at_the_bounds(dtype, log):
    space = Interval(0.5, 2.0, log)
    bounds = np.array([0.5, 2.0], dtype)
    for alpha in (bounds, np.nextafter(bounds, np.ones(2, dtype))):
        u = space.inverse(alpha)
        chex.assert_tree_all_finite(u)
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(space.forward(u), alpha, rtol=eps)


@for_each_space
def test_inverse_is_nan_outside_the_space(space):
    outside, nan = jnp.full((3,), -7.0), jnp.full((3,), jnp.nan)
    assert bool(space.contains(outside).all()) == isinstance(space, Real)
    assert not space.contains(nan).any()
    if not isinstance(space, Real | Box):
        assert np.isnan(space.inverse(outside)).all()
        assert np.isnan(space.inverse(nan)).all()


def test_contains_and_is_interior_by_hand():
    """A closed set contains its boundary, from which no run may start."""
    alpha = jnp.array([-1.0, 0.0, 1.0, 3.0, jnp.inf])
    for space, contains, is_interior in [
        (Real(), [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]),
        (Positive(), [0, 1, 1, 1, 0], [0, 0, 1, 1, 0]),
        (Unit(), [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]),
        (Interval(1.0, 4.0, log=True), [0, 0, 1, 1, 0], [0, 0, 0, 1, 0]),
        (Box(0.0, jnp.inf), [0, 1, 1, 1, 0], [0, 1, 1, 1, 0]),
    ]:
        np.testing.assert_array_equal(space.contains(alpha), np.array(contains, bool))
        expected = np.array(is_interior, bool)
        np.testing.assert_array_equal(space.is_interior(alpha), expected)
    rows = jnp.array([[0.5, 0.5], [0.5, 0.6], [1.5, -0.5], [1.0, 0.0]])
    expected = np.array([True, False, False, True])[:, None].repeat(2, 1)
    np.testing.assert_array_equal(Simplex().contains(rows), expected)
    expected[2, 0], expected[3, 1] = True, False
    np.testing.assert_array_equal(Simplex().is_interior(rows), expected)


def test_only_a_box_projects():
    u = sample_u(jnp.float32)
    low, high = np.array([-1.0, 0.0, 2.0]), np.array([1.0, np.inf, 2.0])
    box = Box(low, high)
    expected = np.clip(u, low, high).astype(np.float32)
    chex.assert_trees_all_equal(box.project(u), expected)
    assert box.forward(u) is u
    assert box.inverse(u) is u
    for space in BIJECTIONS.values():
        assert space.project(u) is u


def test_bounds_are_data():
    """They can be swept by ``vmap`` and differentiated, and new ones trace nothing."""
    low, u = jnp.array([-1.0, 0.0, 1.0]), sample_u(shape=(3,))
    swept = jax.vmap(lambda low, u: Interval(low, 2.0).forward(u))(low, u)
    np.testing.assert_allclose(swept, closed_form(Interval(low, 2.0), u), rtol=1e-14)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def forward(space, u):
        return space.forward(u)

    for high in (2.0, 3.0, 4.0):
        forward(Interval(0.0, high), u)
    gradient = jax.grad(lambda high: Interval(0.0, high).forward(jnp.array(0.0)))(2.0)
    np.testing.assert_allclose(gradient, 0.5)


@for_each_dtype
@pytest.mark.parametrize(
    ("space", "distribution"),
    [
        (Interval(-2.0, 5.0, shape=(50, 100)), scipy.stats.uniform(-2.0, 7.0)),
        (Box(-2.0, 5.0, shape=(50, 100)), scipy.stats.uniform(-2.0, 7.0)),
        (
            Interval(1e-5, 10.0, log=True, shape=(50, 100)),
            scipy.stats.loguniform(1e-5, 10.0),
        ),
    ],
    ids=["interval", "box", "log interval"],
)
def test_samples_are_uniform_or_log_uniform(space, distribution, dtype):
    with compat.enable_x64(dtype == jnp.float64):
        alpha = space.sample(jax.random.key(0))
    assert (alpha.shape, alpha.dtype) == ((50, 100), dtype)
    assert space.contains(alpha).all()
    test = scipy.stats.kstest(np.asarray(alpha, np.float64).ravel(), distribution.cdf)
    assert test.pvalue > 0.01


@for_each_dtype
def test_samples_of_a_simplex_are_uniform(dtype):
    """The marginals of a uniform distribution over n weights are Beta(1, n - 1)."""
    with compat.enable_x64(dtype == jnp.float64):
        alpha = Simplex(shape=(5000, 4)).sample(jax.random.key(0))
    assert alpha.dtype == dtype
    assert Simplex().contains(alpha).all()
    for column in np.asarray(alpha, np.float64).T:
        assert scipy.stats.kstest(column, scipy.stats.beta(1, 3).cdf).pvalue > 0.01


def test_samples_have_the_bounds_of_their_entries():
    low, high = np.array([0.0, 10.0]), np.array([1.0, 20.0])
    alpha = Interval(low, high, shape=(1000, 2)).sample(jax.random.key(0))
    assert alpha.dtype == jnp.result_type(float)
    np.testing.assert_allclose(alpha.mean(0), [0.5, 15.0], rtol=0.05)


@for_each_space
def test_spaces_keep_half_precision(space):
    u = sample_u(jnp.bfloat16)
    alpha = space.forward(space.project(u))
    assert alpha.dtype == jnp.bfloat16
    assert space.contains(alpha).all()
    chex.assert_tree_all_finite(space.inverse(alpha).astype(float))


def test_messages_show_the_numbers_of_scalar_bounds():
    with pytest.raises(ValueError, match=r"got Interval\(low=2.5, high=1\)"):
        Interval(jnp.float32(2.5), 1)


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [
        (1e-60, 1.0, True),
        (1e-30, 1e10, True),
        (1.0, 1e60, False),
        (-3e38, 3e38, False),
        (1, 1 + 1e-9, False),
    ],
    ids=["low", "ratio", "high", "width", "distance"],
)
def test_bounds_must_be_representable_in_the_dtype_of_the_leaf(low, high, log):
    space = Interval(low, high, log)
    chex.assert_tree_all_finite(space.forward(jnp.zeros((), jnp.float64)))
    with pytest.raises(ValueError, match=r"low and high.*float32"):
        space.forward(jnp.zeros((), jnp.float32))


@pytest.mark.parametrize(
    ("low", "high", "remedy"),
    [(1e-30, 1e10, "ratio"), (1.0, 1e60, "range"), (1.0, 1 + 1e-9, "distinct")],
    ids=["ratio", "high", "distance"],
)
def test_errors_of_bounds_say_what_cannot_be_represented(low, high, remedy):
    with pytest.raises(ValueError, match=rf"low and high.*{remedy}"):
        Interval(low, high, log=True).forward(jnp.zeros((), jnp.float32))


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 1e40), (-1e40, 0.0), (-3e38, 3e38), (1.0, 1 + 1e-9)],
    ids=["high", "low", "width", "distance"],
)
def test_bounds_of_a_box_must_be_representable_to_sample_it(low, high):
    """Otherwise samples would be infinite, NaN or all equal."""
    space = Box(low, high)
    chex.assert_tree_all_finite(space.from_unit(jnp.full((), 0.5, jnp.float64)))
    with pytest.raises(ValueError, match=r"low and high.*float32"):
        space.from_unit(jnp.full((), 0.5, jnp.float32))


@pytest.mark.parametrize("make", [Interval, Box])
def test_bounds_are_real_numbers(make):
    with pytest.raises(TypeError, match="low"):
        make(jnp.array(1j), 2.0)


@pytest.mark.parametrize(
    "space", [Positive(), Interval(0.0, 1e-4), Interval(0.0, 5e-5)], ids=str
)
def test_numbers_of_float16_that_are_not_normal_are_kept(space):
    """A run starts at the given ``alpha``; the smallest normal number is 6.1e-5."""
    alpha = jnp.asarray(1e-5, jnp.float16)
    assert space.is_interior(alpha)
    np.testing.assert_allclose(space.forward(space.inverse(alpha)), alpha, rtol=2e-2)


def test_errors_of_searches_name_the_shape():
    for make in (Simplex, lambda: Interval(jnp.zeros(3), jnp.ones(3))):
        with pytest.raises(ValueError, match="shape="):
            make().sample(jax.random.key(0))
