"""Weights of several outer losses against closed forms, SciPy and KKT conditions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import linprog, lsq_linear

import hypergrad as hg
from hypergrad import objectives
from tests.objectives.quadratics import assert_close, gram_matrices, random_pairs

COMMON_DESCENT = [
    pytest.param(objectives.MGDA(), id="MGDA"),
    pytest.param(objectives.UPGrad(), id="UPGrad"),
]
DTYPES = pytest.mark.parametrize("dtype", ["float64", "float32"])


def directions(aggregator, gradients):
    """Returns the vectors ``[cases, n]`` for gradients ``[cases, K, n]``."""
    cases, num, _ = gradients.shape
    value, state = jnp.zeros(num, gradients.dtype), aggregator.init(num)
    weights = jax.vmap(lambda gram: aggregator.compute_weights(value, gram, state)[0])(
        gram_matrices(gradients)
    )
    assert weights.dtype == gradients.dtype
    assert weights.shape == (cases, num)
    return np.asarray(jnp.einsum("ck,ckn->cn", weights, gradients))


@DTYPES
def test_mgda_is_the_closed_form_for_two(dtype: str, key: jax.Array):
    """a = clip((g2 - g1)'g2 / |g1 - g2|^2, 0, 1), the direction a g1 + (1 - a) g2."""
    pairs = random_pairs(key)
    g1, g2 = np.moveaxis(np.asarray(pairs), 1, 0)
    a = np.sum((g2 - g1) * g2, 1) / np.sum((g1 - g2) ** 2, 1)
    a = np.clip(a, 0, 1)[:, None]
    assert 5 < np.sum((a > 0) & (a < 1)) < 50
    actual = directions(objectives.MGDA(), pairs.astype(dtype))
    scale = np.min(np.linalg.norm(pairs, axis=-1), 1)[:, None]
    assert_close(actual, a * g1 + (1 - a) * g2, scale)


@DTYPES
def test_upgrad_is_the_closed_form_for_two(dtype: str, key: jax.Array):
    """Conflicting gradients lose their part along the other before the mean."""
    pairs = random_pairs(key)
    g1, g2 = np.moveaxis(np.asarray(pairs), 1, 0)
    product = np.minimum(np.sum(g1 * g2, 1), 0)
    assert 5 < np.sum(product < 0) < 45
    projection = lambda g: (product / np.sum(g**2, 1))[:, None] * g
    expected = (g1 - projection(g2) + g2 - projection(g1)) / 2
    actual = directions(objectives.UPGrad(), pairs.astype(dtype))
    assert_close(actual, expected, np.max(np.linalg.norm(pairs, axis=-1), 1)[:, None])


def shortest_in_hull(gradients):
    """Returns the shortest vector of the hull: the best stationary point of a face."""
    candidates = []
    for size in range(1, len(gradients) + 1):
        for face in itertools.combinations(range(len(gradients)), size):
            g = gradients[list(face)]
            kkt = np.block([[g @ g.T, np.ones((size, 1))], [np.ones((1, size)), 0]])
            a = np.linalg.lstsq(kkt, np.eye(size + 1)[-1], rcond=None)[0][:-1]
            if np.all(a >= -1e-12):
                candidates.append(a @ g)
    return min(candidates, key=np.linalg.norm)


def mean_projection(gradients):
    """Returns the mean of the projections g + J'x, x >= 0, onto the dual cone."""
    solve = lambda g: lsq_linear(
        gradients.T, -g, bounds=(0, np.inf), method="bvls", tol=1e-15
    )
    return np.mean([g + gradients.T @ solve(g).x for g in gradients], 0)


def awkward_gradients(key, num, size):
    """Returns random gradients, also with a copy, an opposite or a zero among them."""
    gradients = jax.random.normal(key, (10, num, size))
    cases = [gradients] + [
        gradients.at[:, -1].set(factor * gradients[:, 0]) for factor in (1, -0.5, 0)
    ]
    return jnp.concatenate(cases)


@pytest.mark.parametrize(
    ("aggregator", "expected_fn"),
    [(objectives.MGDA(), shortest_in_hull), (objectives.UPGrad(), mean_projection)],
    ids=["MGDA", "UPGrad"],
)
@pytest.mark.parametrize(("num", "size"), [(3, 2), (4, 3)])
def test_directions_of_several_gradients(aggregator, expected_fn, num, size, key):
    """MGDA is compared with every face, UPGrad with projections by SciPy."""
    gradients = awkward_gradients(key, num, size)
    expected = np.array(list(map(expected_fn, np.asarray(gradients))))
    np.testing.assert_allclose(directions(aggregator, gradients), expected, atol=1e-8)


@pytest.mark.parametrize("aggregator", COMMON_DESCENT)
def test_directions_conflict_with_no_gradient(aggregator, key: jax.Array):
    """The inner products are negative by rounding errors at most, in float32."""
    gradients = random_pairs(key).astype(jnp.float32)
    actual = directions(aggregator, gradients)
    products = np.einsum("ckn,cn->ck", gradients, actual)
    lengths = np.linalg.norm(actual, axis=-1)[:, None]
    assert np.all(products >= -1e-4 * lengths * np.linalg.norm(gradients, axis=-1))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("num", "size"), [(3, 2), (5, 3)])
def test_projections_of_nearly_dependent_gradients(num, size, dtype):
    """Near the Pareto set a gradient is minus a combination of the others."""
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(400, num, size))
    factors = rng.uniform(size=(400, 1, num - 1)) * rng.choice([1, 1e-2], (400, 1, 1))
    # The inner products would not resolve a smaller part that is independent.
    noise = rng.normal(size=(400, 1, size)) * rng.choice(
        [0, 30 * np.finfo(dtype).eps ** 0.5], (400, 1, 1)
    )
    gradients[:, -1:] = noise - factors @ gradients[:, :-1]
    gradients = gradients.astype(dtype)
    actual = directions(objectives.UPGrad(), jnp.asarray(gradients))
    expected = np.array(list(map(mean_projection, gradients.astype(float))))
    errors = np.linalg.norm(actual - expected, axis=1)
    errors /= np.max(np.linalg.norm(gradients, axis=2), axis=1)
    # Their condition number is up to 1 / (900 eps), which leaves two or three digits.
    assert np.max(errors) < 1e-2
    assert np.median(errors) < 5 * np.finfo(dtype).eps


@pytest.mark.parametrize("aggregator", COMMON_DESCENT)
def test_gradients_that_are_not_finite_give_nan(aggregator):
    """The weights do, so that a run stops for this reason."""
    for entry in (jnp.nan, jnp.inf):
        gram = jnp.array([[entry, 1.0], [1.0, 2.0]])
        weights, _ = aggregator.compute_weights(jnp.zeros(2), gram, None)
        assert np.isnan(weights).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("length", [1.0, 1e-2, 1e-4, 1e-8])
def test_opposing_gradients_beside_a_short_one_have_no_common_descent(dtype, length):
    """The direction is 0 up to rounding of the long ones, whatever the short one is."""
    gradients = jnp.array([[0.0, length], [1.0, 0.0], [-1.0, 0.0]], dtype)
    for aggregator in (objectives.MGDA(), objectives.UPGrad()):
        weights, _ = aggregator.compute_weights(
            jnp.zeros(3, dtype), gradients @ gradients.T, None
        )
        assert np.all(np.isfinite(weights))
        # Along the short one at most, which conflicts with none of the others.
        x, y = weights @ gradients
        assert abs(x) < 1e-6
        assert 0 <= y <= length
    mgda_weights, _ = objectives.MGDA().compute_weights(
        jnp.zeros(3, dtype), gradients @ gradients.T, None
    )
    np.testing.assert_allclose(mgda_weights, [0.0, 0.5, 0.5], atol=1e-6)


def test_rounding_of_a_long_gradient_does_not_hide_a_short_one():
    """The cone of common descent of these four is a point."""
    gradients = jnp.array(
        [[5.0, 4.0], [5.0, 4.0], [4 * 2.0**-28, -5 * 2.0**-28], [-1.0, 1.0]],
        jnp.float32,
    )
    gram = gradients @ gradients.T
    weights, _ = objectives.UPGrad().compute_weights(jnp.zeros(4), gram, None)
    direction = weights @ gradients
    products = gradients @ direction
    lengths = np.linalg.norm(gradients, axis=1)
    assert np.all(products >= -1e-5 * lengths)


def test_gradients_whose_squares_underflow_are_combined_as_their_multiples(key):
    """Weights of the aggregators do not change with a common factor, a power of two."""

    def make_step(factor):
        outer = [
            lambda w, alpha, x, k=k: factor * jnp.vdot(x[k], alpha) + 0.0 * w
            for k in range(2)
        ]
        x = jnp.array([[1.0, 0.0], [-1.0, 0.1]], jnp.float32)
        inner = lambda w, alpha, x: (w - jnp.sum(alpha)) ** 2
        problem = hg.Bilevel(inner, tuple(outer), x, x)
        loop = hg.OuterLoop(
            problem, hg.Implicit(hg.Newton()), optax.sgd(0.1),
            aggregator=objectives.MGDA(),
        )  # fmt: skip
        state = loop.init(jnp.float32(0.0), jnp.ones(2, jnp.float32))
        return loop.run(state, num_steps=1).stats["objective_weights"]

    np.testing.assert_array_equal(make_step(1.0), make_step(2.0**-76))


def epo_anchor(value, weights):
    """Returns ``mu`` and ``a`` of EPO by their definitions."""
    r = weights / weights.sum()
    fraction = r * value / (r @ value)
    mu = fraction @ np.log(value.size * fraction)
    return mu, r * (np.log(value.size * fraction) - mu)


def epo_by_linear_program(value, gram, weights):
    """Returns the weights of EPO by SciPy's HiGHS, from the authors' programs."""
    mu, a = epo_anchor(value, weights)
    anchored, size = gram @ a, value.size
    lower, objective = np.zeros(size), gram.sum(0)
    if mu > 1e-6:
        objective = anchored
        if np.any(anchored > 0):
            lower = np.where(anchored > 0, -np.inf, anchored)
            lower[np.argmax(weights * value)] = 0
    rows = np.isfinite(lower)
    # HiGHS satisfies constraints to 1e-7, so the gradients must be of order one.
    result = linprog(
        -objective, -gram[rows], -lower[rows], np.ones((1, size)), [1.0], (0, 1)
    )
    assert result.success
    return result.x


@pytest.mark.parametrize("num", [2, 4])
def test_epo_solves_the_linear_programs_of_its_authors(num: int, key: jax.Array):
    """Half of the cases are off the ray; the others are on it and lower all losses."""
    keys = jax.random.split(key, 3)
    weights = jax.random.uniform(keys[0], (num,), minval=0.2)
    gram = gram_matrices(jax.random.normal(keys[1], (20, num, num + 1)))
    values = jax.random.uniform(keys[2], (20, num), minval=0.1)
    values = values.at[::2].set(1 / weights[None])
    epo = objectives.EPO(weights)
    actual = jax.vmap(lambda v, g: epo.compute_weights(v, g, None)[0])(values, gram)
    expected = [epo_by_linear_program(*map(np.asarray, (*case, weights)))
                for case in zip(values, gram, strict=True)]  # fmt: skip
    np.testing.assert_allclose(actual, np.array(expected), atol=1e-6)
    assert np.all(np.einsum("ck,ckl->cl", actual, gram)[::2] >= -1e-9)


@DTYPES
def test_epo_is_the_closed_form_for_two_that_conflict(dtype: str, key: jax.Array):
    """With g1'g2 < 0 and loss 1 above the ray, loss 2 rises as far as it may.

    The weight of g1 is the largest t with t g1'g2 + (1 - t) |g2|^2 >= (G a)_2.
    """
    value, weights = np.array([3.0, 1.0]), np.array([2.0, 1.0])
    gram = np.asarray(gram_matrices(random_pairs(key)))
    gram = gram[gram[:, 0, 1] < 0]
    mu, a = epo_anchor(value, weights)
    assert mu > 0.1
    c, d = gram[:, 0, 1], gram[:, 1, 1]
    t = np.clip((d - gram[:, 1] @ a) / (d - c), 0, 1)
    assert 5 < np.sum(t < 1) < len(t)
    epo = objectives.EPO(jnp.array(weights, dtype))
    value = jnp.array(value, dtype)
    compute_weights = lambda gram: epo.compute_weights(value, gram, None)[0]
    actual = jax.vmap(compute_weights)(jnp.array(gram, dtype))
    assert actual.dtype == dtype
    assert_close(actual, np.stack([t, 1 - t], 1))


@pytest.mark.parametrize(
    "value",
    [[-1.0, 1.0], [0.0, 1.0], [-1.0, -3.0], [np.nan, 1.0], [np.inf, 1.0]],
    ids=str,
)
def test_epo_returns_nan_for_values_on_no_ray(value):
    epo = objectives.EPO(jnp.ones(2))
    weights, _ = epo.compute_weights(jnp.array(value), jnp.eye(2), None)
    assert np.isnan(weights).all()


@pytest.mark.parametrize(
    "aggregator",
    [
        objectives.WeightedSum(jnp.array([0.2, 3.0, 0.0])),
        objectives.SmoothTchebycheff(jnp.array([0.2, 3.0, 1.0]), 0.3, -1.0),
        objectives.SmoothTchebycheff(jnp.ones(3), 0.3, jnp.array([0.0, -1.0, 0.5])),
    ],
    ids=["weighted sum", "one ideal", "three ideals"],
)
def test_the_weights_are_the_gradient_of_the_score(aggregator):
    value = jnp.array([1.0, 0.3, 0.7])
    weights, _ = aggregator.compute_weights(value, jnp.eye(3), aggregator.init(3))
    np.testing.assert_allclose(weights, jax.grad(aggregator.score)(value), rtol=1e-12)


def test_smooth_tchebycheff_is_within_t_log_k_of_the_maximum():
    weights, value = jnp.array([1.0, 2.0, 0.5]), jnp.array([1.0, 0.4, 1.5])
    maximum = float(jnp.max(weights * value))
    for temperature in (1.0, 0.1, 0.001):
        score = objectives.SmoothTchebycheff(weights, temperature).score(value)
        assert maximum <= score <= maximum + temperature * np.log(3) + 1e-12


def test_multipliers_change_after_each_period():
    """A violation of 1 and a penalty of 2 add 2 to the multiplier every three steps."""
    lagrangian = objectives.AugmentedLagrangian(1.0, penalty=2.0, period=3)
    value, state, multipliers, weights = (
        jnp.array([5.0, 2.0]),
        lagrangian.init(2),
        [],
        [],
    )
    for _ in range(6):
        weight, state = lagrangian.compute_weights(value, jnp.eye(2), state)
        multipliers.append(float(state[0][0]))
        weights.append(weight.tolist())
    assert multipliers == [0, 0, 2, 2, 2, 4]
    assert weights == [[1, 2]] * 3 + [[1, 4]] * 3


CONSTRUCTORS = {
    "list": ("weights", lambda: objectives.WeightedSum([1.0, 2.0])),
    "matrix": ("weights", lambda: objectives.WeightedSum(jnp.ones((2, 2)))),
    "negative": ("weights", lambda: objectives.WeightedSum(jnp.array([1.0, -1.0]))),
    "zeros": ("weights", lambda: objectives.WeightedSum(jnp.zeros(2))),
    "NaN": ("weights", lambda: objectives.WeightedSum(jnp.array([1.0, jnp.nan]))),
    "zero": ("weights", lambda: objectives.EPO(jnp.array([1.0, 0.0]))),
    "temperature": (
        "temperature", lambda: objectives.SmoothTchebycheff(jnp.ones(2), 0.0),
    ),
    "tolerance": ("tolerance", lambda: objectives.EPO(jnp.ones(2), 0.0)),
    "seven losses": ("outer_loss", lambda: objectives.EPO(jnp.ones(7)).init(7)),
    "penalty": ("penalty", lambda: objectives.AugmentedLagrangian(1.0, penalty=-1.0)),
    "NaN limit": ("limits", lambda: objectives.AugmentedLagrangian(jnp.nan)),
    "limit below all": ("limits", lambda: objectives.AugmentedLagrangian(-jnp.inf)),
}  # fmt: skip


@pytest.mark.parametrize("case", CONSTRUCTORS)
def test_invalid_settings_are_named(case: str):
    name, make = CONSTRUCTORS[case]
    with pytest.raises((TypeError, ValueError), match=name):
        make()
