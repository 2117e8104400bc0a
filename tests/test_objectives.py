"""Several outer losses against closed forms, KKT points and analytic Pareto fronts."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from scipy.optimize import linprog, minimize_scalar, nnls
from scipy.special import logsumexp

import hypergrad as hg
from hypergrad import objectives
from tests.loops import run_loop

BEST = hg.ClosedForm(lambda alpha, batch: alpha)
IMPLICIT = hg.Implicit(BEST)
QUARTER, TENTH = optax.sgd(0.25), optax.sgd(0.1)
CENTRES = jnp.array([[1.0, 0.0, -1.0], [-1.0, 2.0, 0.5]])
START = jnp.array([2.0, 3.0, 1.0])


def inner_loss(w, alpha, batch):
    """w* = alpha, with curvatures that differ."""
    return 0.5 * jnp.sum(batch["h"] * (w - alpha) ** 2)


def distance_to(k):
    return lambda w, alpha, batch: jnp.sum((w - batch["centres"][k]) ** 2)


DISTANCES = tuple(map(distance_to, range(2)))


def biquadratic(outer=DISTANCES, dtype=float):
    data = {"h": jnp.array([1.0, 2.0, 4.0], dtype), "centres": CENTRES.astype(dtype)}
    return hg.Bilevel(inner_loss, outer, data, data)


def minimize(combine, *, problem=None, optimizer=QUARTER, alpha=START, **options):
    problem = biquadratic() if problem is None else problem
    options = {"num_steps": 100} | options
    w = jnp.zeros_like(alpha)
    return run_loop(
        problem, IMPLICIT, optimizer, w, alpha, aggregator=combine, **options
    )


def directions(combine, gradients):
    """As vectors ``[cases, n]``, from ``[cases, K, n]``."""
    cases, num, _ = gradients.shape
    value, state = jnp.zeros(num, gradients.dtype), combine.init(num)
    gram = jnp.einsum("ckn,cln->ckl", gradients, gradients)
    weights = jax.vmap(lambda gram: combine.compute_weights(value, gram, state)[0])(
        gram
    )
    assert weights.dtype == gradients.dtype
    assert weights.shape == (cases, num)
    return np.asarray(jnp.einsum("ck,ckn->cn", weights, gradients))


# Directions.


def pairs(key):
    """Pairs of gradients, half of them conflicting, of lengths 1e-3 to 1e3."""
    keys = jax.random.split(key, 2)
    pair = jax.random.normal(keys[0], (50, 2, 3))
    return pair * 10 ** jax.random.uniform(keys[1], (50, 2, 1), minval=-3, maxval=3)


def close(found, exact, dtype, scale):
    tolerance = {"float64": 1e-8, "float32": 1e-4}[dtype]
    assert np.all(np.abs(found - exact) <= tolerance * scale)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_mgda_is_the_closed_form_for_two(dtype: str, key: jax.Array):
    """a = clip((g2 - g1)'g2 / |g1 - g2|², 0, 1), the direction a g1 + (1 - a) g2."""
    pair = pairs(key)
    g1, g2 = np.moveaxis(np.asarray(pair), 1, 0)
    a = np.sum((g2 - g1) * g2, 1) / np.sum((g1 - g2) ** 2, 1)
    a = np.clip(a, 0, 1)[:, None]
    assert 5 < np.sum((a > 0) & (a < 1)) < 50
    found = directions(objectives.MGDA(), pair.astype(dtype))
    scale = np.min(np.linalg.norm(pair, axis=-1), 1)[:, None]
    close(found, a * g1 + (1 - a) * g2, dtype, scale)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_upgrad_is_the_closed_form_for_two(dtype: str, key: jax.Array):
    """The mean of both, each without its part along the other where they conflict."""
    pair = pairs(key)
    g1, g2 = np.moveaxis(np.asarray(pair), 1, 0)
    dot, of = np.minimum(np.sum(g1 * g2, 1), 0), lambda g: np.sum(g**2, 1)
    assert 5 < np.sum(dot < 0) < 45
    part = lambda g: (dot / of(g))[:, None] * g
    found = directions(objectives.UPGrad(), pair.astype(dtype))
    scale = np.max(np.linalg.norm(pair, axis=-1), 1)[:, None]
    close(found, (g1 - part(g2) + g2 - part(g1)) / 2, dtype, scale)


def shortest(gradients):
    """The shortest of the hull, by the nearest point of every face's plane."""
    best = None
    for size in range(1, len(gradients) + 1):
        for face in itertools.combinations(range(len(gradients)), size):
            g = gradients[list(face)]
            kkt = np.block([[g @ g.T, np.ones((size, 1))], [np.ones((1, size)), 0]])
            a = np.linalg.lstsq(kkt, np.eye(size + 1)[-1], rcond=None)[0][:-1]
            if np.all(a >= -1e-12):
                found = a @ g
                if best is None or np.linalg.norm(found) < np.linalg.norm(best):
                    best = found
    return best


def projected(gradients):
    """The mean of the projections onto the dual cone: g + J'x, x >= 0, nearest to 0."""
    return np.mean([g + gradients.T @ nnls(gradients.T, -g)[0] for g in gradients], 0)


def awkward(key, num, size):
    """Random gradients, then with a copy, an opposite and a zero among them."""
    gradients = jax.random.normal(key, (10, num, size))
    cases = [gradients] + [
        gradients.at[:, -1].set(factor * gradients[:, 0]) for factor in (1, -0.5, 0)
    ]
    return jnp.concatenate(cases)


@pytest.mark.parametrize(
    ("combine", "exact"),
    [(objectives.MGDA(), shortest), (objectives.UPGrad(), projected)],
)
@pytest.mark.parametrize(("num", "size"), [(3, 2), (3, 5), (4, 3), (5, 8)])
def test_more_than_two_gradients(combine, exact, num, size, key: jax.Array):
    """MGDA against every face, UPGrad against SciPy's projections."""
    gradients = awkward(key, num, size)
    found = directions(combine, gradients)
    expected = np.array(list(map(exact, np.asarray(gradients))))
    np.testing.assert_allclose(found, expected, atol=1e-8)


@pytest.mark.parametrize("combine", [objectives.MGDA(), objectives.UPGrad()])
def test_directions_conflict_with_no_gradient(combine, key: jax.Array):
    """In float32 to rounding, of gradients of very different lengths."""
    gradients = pairs(key).astype(jnp.float32)
    found = directions(combine, gradients)
    inner = np.einsum("ckn,cn->ck", gradients, found)
    lengths = (
        np.linalg.norm(gradients, axis=-1) * np.linalg.norm(found, axis=-1)[:, None]
    )
    assert np.all(inner >= -1e-4 * lengths)


@pytest.mark.parametrize("combine", [objectives.MGDA(), objectives.UPGrad()])
def test_a_gradient_that_is_not_finite_shows(combine):
    """As NaN, at once: no endless loop, no zero."""
    gradients = jnp.array([[[1.0, jnp.nan], [1.0, 2.0]]])
    assert np.isnan(directions(combine, gradients)).any()


# Exact preference.


def anchored(value, weights):
    """``mu`` and ``a`` of EPO, by the definition."""
    r = weights / weights.sum()
    share = r * value / (r @ value)
    mu = share @ np.log(value.size * share)
    return mu, r * (np.log(value.size * share) - mu)


def by_linprog(value, gram, weights):
    """The weights of EPO by SciPy's HiGHS, programs as their authors publish them."""
    mu, a = anchored(value, weights)
    along, size = gram @ a, value.size
    least, objective = np.zeros(size), gram.sum(0)
    if mu > 1e-6:
        objective = along
        if np.any(along > 0):
            least = np.where(along > 0, -np.inf, along)
            least[np.argmax(weights * value)] = 0
    rows = np.isfinite(least)
    # HiGHS keeps constraints to 1e-7: let the gradients be of order one.
    found = linprog(
        -objective, -gram[rows], -least[rows], np.ones((1, size)), [1.0], (0, 1)
    )
    assert found.success
    return found.x


@pytest.mark.parametrize("num", [2, 3, 4, 6])
def test_epo_solves_the_linear_programs_of_its_authors(num: int, key: jax.Array):
    """As SciPy does: half the cases off the ray, half on it, where they lower all."""
    keys = jax.random.split(key, 3)
    weights = jax.random.uniform(keys[0], (num,), minval=0.2)
    gradients = jax.random.normal(keys[1], (20, num, num + 1))
    values = jax.random.uniform(keys[2], (20, num), minval=0.1)
    values = values.at[::2].set(1 / weights[None])
    gram = jnp.einsum("ckn,cln->ckl", gradients, gradients)
    combine = objectives.EPO(weights)
    found = jax.vmap(lambda v, g: combine.compute_weights(v, g, None)[0])(values, gram)
    exact = [by_linprog(*map(np.asarray, (*case, weights)))
             for case in zip(values, gram, strict=True)]  # fmt: skip
    np.testing.assert_allclose(found, np.array(exact), atol=1e-6)
    assert np.all(np.einsum("ck,ckl->cl", found, gram)[::2] >= -1e-9)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_epo_is_the_closed_form_for_two_that_conflict(dtype: str, key: jax.Array):
    """Off the ray all of the value above it, as far as the other may rise.

    With 1 above and g_1 . g_2 < 0, (G a)_1 > 0 > (G a)_2: the largest share t of g_1 at
    which t g_1 . g_2 + (1 - t) |g_2|² >= (G a)_2.
    """
    pair = pairs(key)
    value, weights = np.array([3.0, 1.0]), np.array([2.0, 1.0])
    gram = np.einsum("ckn,cln->ckl", pair, pair)
    gram = gram[gram[:, 0, 1] < 0]
    mu, a = anchored(value, weights)
    assert mu > 0.1
    rise = gram[:, 1] @ a
    c, d = gram[:, 0, 1], gram[:, 1, 1]
    t = np.clip((d - rise) / (d - c), 0, 1)
    assert 5 < np.sum(t < 1) < len(t)
    combine = objectives.EPO(jnp.array(weights, dtype))
    of = lambda gram: combine.compute_weights(jnp.array(value, dtype), gram, None)[0]
    found = jax.vmap(of)(jnp.array(gram, dtype))
    assert found.dtype == dtype
    close(found, np.stack([t, 1 - t], 1), dtype, 1.0)


def test_epo_shows_values_that_are_on_no_ray():
    """Not above the ideal, or not finite: NaN, at once."""
    below = [-1.0, 1.0], [0.0, 1.0], [-1.0, -3.0]
    for value in (*below, [jnp.nan, 1.0], [jnp.inf, 1.0]):
        weights, _ = objectives.EPO(jnp.ones(2)).compute_weights(
            jnp.array(value), jnp.eye(2), None
        )
        assert np.isnan(weights).all()


def test_a_run_of_epo_below_the_ideal_ends_and_says_why():
    """The second loss is a square less its first value, and less 1: -1 at the start.

    With an ideal below the least that it can be the same run goes on.
    """
    square = lambda w, batch: DISTANCES[1](w, None, batch)
    shifted = lambda w, alpha, batch: square(w, batch) - square(START, batch) - 1
    problem = biquadratic((DISTANCES[0], shifted))
    trace = minimize(objectives.EPO(jnp.ones(2)), problem=problem, num_steps=3)
    assert trace.status == "stopped: combine's weights of the losses are not finite"
    np.testing.assert_allclose(trace.value[0, 1], -1, atol=1e-6)
    np.testing.assert_array_equal(trace.alpha, START)
    least = -float(square(START, problem.outer_data)) - 1
    above = objectives.EPO(jnp.ones(2), ideal=least - 0.1)
    assert minimize(above, problem=problem, num_steps=3).status == "completed"


# Scalarizations.


@pytest.mark.parametrize(
    "combine",
    [
        objectives.WeightedSum(jnp.array([0.2, 3.0, 0.0])),
        objectives.SmoothTchebycheff(jnp.array([0.2, 3.0, 1.0]), 0.3, -1.0),
        objectives.SmoothTchebycheff(jnp.ones(3), 0.3, jnp.array([0.0, -1.0, 0.5])),
    ],
)
def test_the_weights_are_the_gradient_of_the_score(combine):
    value = jnp.array([1.0, 0.3, 0.7])
    weights, _ = combine.compute_weights(value, jnp.eye(3), combine.init(3))
    np.testing.assert_allclose(weights, jax.grad(combine.score)(value), rtol=1e-12)


def test_smooth_tchebycheff_is_within_t_log_k_of_the_maximum():
    weights, value = jnp.array([1.0, 2.0, 0.5]), jnp.array([1.0, 0.4, 1.5])
    largest = float(jnp.max(weights * value))
    for temperature in (1.0, 0.1, 0.001):
        score = objectives.SmoothTchebycheff(weights, temperature).score(value)
        assert largest <= score <= largest + temperature * np.log(3) + 1e-12


# In minimize.


def on_segment(point):
    """Distance to the segment between the centres, and where along it."""
    along = CENTRES[1] - CENTRES[0]
    t = jnp.clip((point - CENTRES[0]) @ along / (along @ along), 0, 1)
    return float(jnp.linalg.norm(point - CENTRES[0] - t * along)), float(t)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_mgda_ends_at_the_projection_of_its_start(dtype: str):
    """Its direction is 2 (alpha - the nearest point of the segment)."""
    along = CENTRES[1] - CENTRES[0]
    t = (START - CENTRES[0]) @ along / (along @ along)
    assert 0.1 < t < 0.9
    alpha = START.astype(dtype)
    trace = minimize(objectives.MGDA(), problem=biquadratic(dtype=dtype), alpha=alpha)
    assert trace.alpha.dtype == trace.value.dtype == dtype
    exact = CENTRES[0] + t * along
    close(trace.alpha, exact, dtype, 1.0)
    assert trace.status == "completed"
    assert trace.value.shape == trace.stats["objective_weights"].shape == (100, 2)
    np.testing.assert_allclose(
        trace.stats["objective_weights"][-1], [1 - t, t], atol=1e-3
    )


@pytest.mark.parametrize("combine", [objectives.MGDA(), objectives.UPGrad()])
def test_points_of_the_segment_are_fixed(combine):
    """Pareto stationary: to rounding, they stay where they are."""
    for t in (0.3, 0.7):
        alpha = CENTRES[0] + t * (CENTRES[1] - CENTRES[0])
        trace = minimize(combine, alpha=alpha, num_steps=20)
        np.testing.assert_allclose(trace.alpha, alpha, atol=1e-8)


def test_upgrad_lowers_both_to_a_point_of_the_segment():
    trace = minimize(objectives.UPGrad(), optimizer=TENTH, num_steps=300)
    away, t = on_segment(trace.alpha)
    assert away < 1e-6
    assert 0.05 < t < 0.95
    assert np.all(np.diff(trace.value, axis=0) <= 1e-12)


def test_upgrad_from_equal_distances_ends_in_the_middle():
    """By symmetry."""
    middle, along = jnp.mean(CENTRES, 0), CENTRES[1] - CENTRES[0]
    across = jnp.cross(along, jnp.array([0.0, 0.0, 1.0]))
    trace = minimize(objectives.UPGrad(), alpha=middle + across)
    np.testing.assert_allclose(trace.alpha, middle, atol=1e-8)


NEAR = {"first": 0.02, "second": 0.98}


@pytest.mark.parametrize("start", ["first", "second", "aside"])
@pytest.mark.parametrize("ratio", [0.25, 1.0, 9.0])
def test_epo_ends_where_the_ray_meets_the_front(start: str, ratio: float):
    """r_1 t² = r_2 (1 - t)² on the segment, from either end of it and from aside.

    From an end it climbs along the front, one of the two values rises all the way.
    """
    along = CENTRES[1] - CENTRES[0]
    alpha = CENTRES[0] + NEAR[start] * along if start in NEAR else START
    weights = jnp.array([ratio, 1.0])
    trace = minimize(
        objectives.EPO(weights), alpha=alpha, optimizer=TENTH, num_steps=400
    )
    t = 1 / (1 + ratio**0.5)
    exact = float(along @ along) * np.array([t**2, (1 - t) ** 2])
    np.testing.assert_allclose(trace.value[-1], exact, rtol=0.01)
    np.testing.assert_allclose(ratio * trace.value[-1, 0], trace.value[-1, 1], 0.01)
    if start in NEAR:
        rising = 0 if start == "first" else 1
        assert float(trace.value[-1, rising]) > 10 * float(trace.value[0, rising])


def test_epo_of_three_ends_at_the_point_of_equal_distances():
    """The circumcentre, where it lies within the triangle; with ideals taken off."""
    corners = jnp.array([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.6, 1.8, 0.0]])
    outer = tuple(
        lambda w, alpha, batch, c=c, k=k: jnp.sum((w - c) ** 2) - k
        for k, c in enumerate(corners)
    )
    trace = minimize(
        objectives.EPO(jnp.ones(3), ideal=-jnp.arange(3.0)),
        problem=biquadratic(outer), optimizer=optax.sgd(0.05), num_steps=400,
        alpha=jnp.array([1.5, 0.3, 0.7]),
    )  # fmt: skip
    y = (0.6**2 + 1.8**2 - 2 * 0.6) / (2 * 1.8)  # equal distances to all three
    np.testing.assert_allclose(trace.value[-1] + jnp.arange(3), 1 + y**2, rtol=0.01)


@pytest.mark.parametrize("space", [None, hg.spaces.Positive()])
def test_a_weighted_sum_is_the_run_of_one_loss(space):
    """Step for step, in a space too; also the best alpha, and what the cost is not."""
    weights = jnp.array([0.7, 0.2])
    total = lambda w, alpha, batch: (
        0.7 * DISTANCES[0](w, alpha, batch) + 0.2 * DISTANCES[1](w, alpha, batch)
    )
    options = {"optimizer": optax.adam(0.1), "space": space, "num_steps": 60}
    several = minimize(objectives.WeightedSum(weights), **options)
    one = minimize(None, problem=biquadratic(total), **options)
    np.testing.assert_allclose(several.alpha, one.alpha, rtol=1e-9)
    np.testing.assert_allclose(several.best_alpha, one.best_alpha, rtol=1e-9)
    np.testing.assert_allclose(several.value @ weights, one.value, rtol=1e-9)
    for name in ("num_grads", "num_inner_steps"):  # one inner solve for both
        assert jnp.array_equal(several.stats[name], one.stats[name])
    assert jnp.all(one.stats["num_hvps"] < several.stats["num_hvps"])
    assert jnp.all(one.cost < several.cost)


@pytest.mark.parametrize(
    "combine", [objectives.SmoothTchebycheff(jnp.ones(2)), objectives.MGDA()]
)
def test_the_gradients_are_those_in_the_space(combine):
    """As a run of losses that map alpha themselves, on the unconstrained variable."""
    space = hg.spaces.Positive()
    through = lambda loss: lambda w, u, batch: loss(w, space.forward(u), batch)
    data = biquadratic().inner_data
    by_hand = hg.Bilevel(
        through(inner_loss), tuple(map(through, DISTANCES)), data, data
    )
    estimator = hg.Implicit(hg.ClosedForm(lambda u, batch: space.forward(u)))
    inside = minimize(combine, space=space, optimizer=TENTH, num_steps=20)
    outside = run_loop(
        by_hand, estimator, TENTH, START, space.inverse(START), num_steps=20,
        aggregator=combine,
    )  # fmt: skip
    np.testing.assert_allclose(inside.alpha, space.forward(outside.alpha), rtol=1e-8)


def test_the_best_alpha_is_the_last_without_a_score():
    """In runs of too long steps, all values rise; the last is before the last step."""
    seen = {"alpha": lambda w, alpha, key: alpha[0]}
    options = {"optimizer": optax.sgd(1.2), "num_steps": 5, "metrics": seen}
    unscored = minimize(objectives.MGDA(), **options)
    scored = minimize(objectives.WeightedSum(jnp.ones(2)), **options)
    for trace in (unscored, scored):
        assert np.all(np.diff(trace.value, axis=0) > 0)
    assert float(unscored.best_alpha[0]) == float(unscored.metrics["alpha"][-1])
    np.testing.assert_array_equal(scored.best_alpha, START)


def test_the_optimizer_is_given_the_score():
    """Else the weighted sum of the values, with the weights of the step."""

    def update(updates, state, params=None, *, value, **extra):
        del updates, state, extra
        return jnp.full_like(params, value), optax.EmptyState()

    told = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    for combine in (
        objectives.SmoothTchebycheff(jnp.ones(2)),
        objectives.AugmentedLagrangian(1.0),
    ):
        trace = minimize(combine, optimizer=told, num_steps=1)
        score = getattr(
            combine, "score", lambda v, t=trace: t.stats["objective_weights"][0] @ v
        )
        expected = START + score(trace.value[0])
        np.testing.assert_allclose(trace.alpha, expected, rtol=1e-12)


def test_rows_progress_and_certificates_of_several_losses():
    """A row's value is a list; progress is told all values."""
    calls = []
    trace = minimize(
        objectives.UPGrad(), num_steps=3, certify_every=2,
        progress=lambda done, value: calls.append((done, value.tolist())),
    )  # fmt: skip
    rows = trace.rows()
    assert [row["value"] for row in rows] == trace.value.tolist()
    assert rows[0]["weights"] == trace.stats["objective_weights"][0].tolist()
    assert calls == [(i + 1, row["value"]) for i, row in enumerate(rows)]
    assert float(trace.stats["error_estimate"][0]) < 1e-6
    assert np.isnan(trace.stats["error_estimate"][1])


def test_a_loss_that_is_not_finite_freezes_the_run():
    """Even one of weight 0."""
    bad = lambda w, alpha, batch: jnp.log(alpha[0] - 1.9)
    problem = biquadratic((DISTANCES[0], bad))
    combine = objectives.WeightedSum(jnp.array([1.0, 0.0]))
    trace = minimize(combine, problem=problem, num_steps=5)
    assert "outer value" in trace.status
    assert np.isnan(trace.stats["objective_weights"][-1]).all()
    np.testing.assert_array_equal(trace.alpha, START)


def test_an_estimator_of_one_loss_still_refuses():
    with pytest.raises(ValueError, match="takes one outer loss"):
        run_loop(
            biquadratic(), hg.SOBA(TENTH), TENTH, START, START, num_steps=2,
            aggregator=objectives.UPGrad(),
        )  # fmt: skip


def test_an_unrolled_estimator_gives_the_same_run():
    unrolled = hg.Unrolled(hg.Descent(optax.sgd(0.3), 60))
    run = lambda estimator: run_loop(
        biquadratic(), estimator, TENTH, START, START, num_steps=10,
        aggregator=objectives.UPGrad(),
    )  # fmt: skip
    np.testing.assert_allclose(run(unrolled).alpha, run(IMPLICIT).alpha, atol=1e-6)


# Constraints.


def lagrangian(limits, problem=None, **options):
    combine = objectives.AugmentedLagrangian(limits, **options)
    optimizer = optax.sgd(0.02)
    return minimize(combine, problem=problem, optimizer=optimizer, num_steps=2000)


@pytest.mark.parametrize("options", [{}, {"penalty": 0.3}, {"period": 10}])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_limit_holds_and_the_multiplier_is_that_of_the_kkt_point(options, dtype):
    """|w - c1|² subject to |w - c2|² <= r²: on the segment, r from c2.

    (w - c1) + m (w - c2) = 0 there, so that m = |c1 - c2| / r - 1.
    """
    apart = float(jnp.linalg.norm(CENTRES[0] - CENTRES[1]))
    radius = 0.4 * apart
    trace = lagrangian(radius**2, biquadratic(dtype=dtype), **options)
    exact = CENTRES[1] + 0.4 * (CENTRES[0] - CENTRES[1])
    close(trace.alpha, exact, dtype, 100)
    assert float(trace.value[-1, 1]) <= 1.01 * radius**2
    np.testing.assert_allclose(
        trace.stats["objective_weights"][-1], [1, 1.5], rtol=1e-4
    )


def test_a_slack_limit_changes_nothing_and_has_no_multiplier():
    trace = lagrangian(100.0)
    np.testing.assert_allclose(trace.alpha, CENTRES[0], atol=1e-8)
    assert float(trace.stats["objective_weights"][-1, 1]) == 0


def test_two_limits_of_which_one_binds():
    """w_0 <= -1/2 binds, w_1 <= 5 does not; the multiplier is 2 (c_0 + 1/2)."""
    outer = (
        DISTANCES[0],
        lambda w, alpha, batch: w[0],
        lambda w, alpha, batch: w[1],
    )
    trace = lagrangian(jnp.array([-0.5, 5.0]), biquadratic(outer))
    np.testing.assert_allclose(trace.alpha, CENTRES[0].at[0].set(-0.5), atol=1e-6)
    np.testing.assert_allclose(
        trace.stats["objective_weights"][-1], [1, 3, 0], atol=1e-5
    )


def test_at_most_two_million_flops():
    """A hidden layer as wide as they allow, where the loss asks for a wider one."""
    wide = lambda w, alpha, batch: jnp.sum((w - 10.0) ** 2)
    flops = lambda w, alpha, batch: (
        objectives.num_flops([784.0, jnp.exp(alpha[0]), 10.0]) / 2e6
    )
    inner = lambda w, alpha, batch: jnp.sum((w - alpha) ** 2)
    trace = run_loop(
        hg.Bilevel(inner, (wide, flops)), IMPLICIT, optax.sgd(0.03), jnp.zeros(1),
        jnp.array([3.0]), num_steps=600,
        aggregator=objectives.AugmentedLagrangian(1.0, penalty=5.0),
    )  # fmt: skip
    width = 2e6 / (2 * 794)
    np.testing.assert_allclose(jnp.exp(trace.alpha[0]), width, rtol=1e-3)
    np.testing.assert_allclose(trace.value[-1, 1], 1.0, rtol=1e-3)


# Fronts.

FIRST = jnp.linspace(0.1, 0.9, 5)
PREFERENCES = jnp.stack([FIRST, 1 - FIRST], 1)
SMOOTH = lambda p: objectives.SmoothTchebycheff(p, 0.05)


def front(problem, preferences, combine, optimizer=QUARTER, **options):
    return objectives.pareto_front(
        problem, IMPLICIT, optimizer, jnp.zeros(3), START, preferences,
        aggregator=combine, **options,
    )  # fmt: skip


def weighted_share(p):
    """Where p_1 t² + p_2 (1 - t)² is least: how far along the segment, as a part."""
    return p[1] / (p[0] + p[1])


def exact_share(p):
    """Where p_1 t² = p_2 (1 - t)²."""
    return 1 / (1 + (p[0] / p[1]) ** 0.5)


def smooth_share(p):
    """Where the smooth maximum of both is least, by SciPy."""
    apart = np.sum((CENTRES[0] - CENTRES[1]) ** 2)
    score = lambda t: logsumexp(apart * p * np.array([t**2, (1 - t) ** 2]) / 0.05)
    return minimize_scalar(score, bounds=(0, 1), method="bounded",
                           options={"xatol": 1e-10}).x  # fmt: skip


@pytest.mark.parametrize(
    ("combine", "share", "optimizer", "num_steps"),
    [
        (objectives.WeightedSum, weighted_share, QUARTER, 100),
        (SMOOTH, smooth_share, optax.sgd(0.02), 1000),
        (lambda p: objectives.EPO(p, 1e-8), exact_share, TENTH, 200),
    ],
)
def test_the_front_of_two_quadratics(combine, share, optimizer, num_steps):
    """sqrt(M_1) + sqrt(M_2) = |c_1 - c_2|, and each point where it should be."""
    problem = biquadratic()
    trace = front(problem, PREFERENCES, combine, optimizer, num_steps=num_steps)
    apart = float(jnp.linalg.norm(CENTRES[0] - CENTRES[1]))
    found = np.sqrt(trace.value[:, -1])
    np.testing.assert_allclose(found.sum(1), apart, rtol=0.01)
    t = np.array(list(map(share, np.asarray(PREFERENCES))))
    np.testing.assert_allclose(found, apart * np.stack([t, 1 - t], 1), rtol=1e-3)
    np.testing.assert_allclose(
        trace.alpha,
        CENTRES[:1] + t[:, None] * (CENTRES[1] - CENTRES[0])[None],
        atol=1e-3,
    )


def concave(k):
    """Fonseca and Fleming's: 1 - exp(-|w - c_k|²), two unit vectors' halves apart."""
    sign = (-1) ** k
    return lambda w, alpha, batch: 1 - jnp.exp(-jnp.sum((w - sign / 3**0.5) ** 2))


def test_only_tchebycheff_reaches_a_concave_front():
    """On the analytic front within 1%, where weighted sums end at its ends."""
    problem = biquadratic((concave(0), concave(1)))
    start = jnp.array([0.2, -0.1, 0.1])
    run = lambda combine: objectives.pareto_front(
        problem, IMPLICIT, optax.sgd(0.05), start, start, PREFERENCES,
        aggregator=combine, num_steps=1000,
    ).value[:, -1]  # fmt: skip
    smooth, summed = run(SMOOTH), run(objectives.WeightedSum)
    # At t from -1 to 1 along the diagonal: 1 - exp(-(t -+ 1)²).
    t = 1 - jnp.sqrt(-jnp.log1p(-smooth[:, 0]))
    np.testing.assert_allclose(smooth[:, 1], 1 - jnp.exp(-((t + 1) ** 2)), rtol=0.01)
    middle = smooth[2]
    np.testing.assert_allclose(middle, jnp.full(2, 1 - jnp.exp(-1.0)), rtol=1e-3)
    assert np.all(np.min(summed, 1) < 0.1)


def test_a_front_is_a_loop_of_runs_in_one_program():
    """And twice as many preferences trace the losses no more often."""
    traces = []

    def counted(w, alpha, batch):
        traces.append(1)
        return DISTANCES[0](w, alpha, batch)

    problem = biquadratic((counted, DISTANCES[1]))
    together = front(problem, PREFERENCES, objectives.WeightedSum, num_steps=20)
    count = len(traces)
    traces.clear()
    fresh = biquadratic((lambda *a: counted(*a), DISTANCES[1]))
    front(fresh, jnp.tile(PREFERENCES, (2, 1)), objectives.WeightedSum, num_steps=20)
    assert len(traces) == count
    for i, preference in enumerate(PREFERENCES):
        alone = minimize(objectives.WeightedSum(preference), num_steps=20)
        one = jax.tree.map(lambda x, i=i: x[i], together)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-9), one, alone)


def test_all_losses_share_one_inner_and_one_adjoint_solve():
    """With a dense solver the products are those of one loss."""
    estimator = hg.Implicit(BEST, lx.LU())
    spent = {}
    for outer, combine in ((DISTANCES, objectives.UPGrad()), (DISTANCES[0], None)):
        trace = run_loop(
            biquadratic(outer), estimator, TENTH, START, START, num_steps=3,
            aggregator=combine,
        )  # fmt: skip
        spent[combine is None] = trace.stats
    assert jnp.array_equal(spent[True]["num_grads"], spent[False]["num_grads"])
    more = spent[False]["num_hvps"] - spent[True]["num_hvps"]
    assert jnp.array_equal(more, jnp.ones(3))  # each residual is a product of its own


def adjoint_loops(of, *args):
    """The loops of conjugate gradients in a program; equal ones count once."""
    return [
        loop for loop in hg.cost.flops(of, *args).loops if "linear/cg" in loop.location
    ]


def test_the_adjoints_of_all_losses_are_columns_of_one_loop():
    """However many, they share the primal pass: as many tanh as one loss has.

    So a product of eight columns costs less than eight; the ledger counts eight.
    """
    x = jax.random.normal(jax.random.key(0), (20, 4))
    w = {"a": jnp.full((4, 5), 0.1), "b": jnp.full(5, 0.2)}
    out = lambda w: jnp.tanh(x @ w["a"]) @ w["b"]
    inner = lambda w, alpha, batch: (
        jnp.mean((out(w) - 1) ** 2) + jnp.exp(alpha) * jnp.sum(w["a"] ** 2)
        + jnp.sum(w["b"] ** 2)
    )  # fmt: skip
    estimator = hg.Implicit(hg.ClosedForm(lambda alpha, batch: w))
    loops, spent = {}, {}
    for num in (1, 8):
        outer = tuple(
            lambda w, alpha, batch, k=k: jnp.mean((out(w) - k) ** 2) for k in range(num)
        )
        of = hg.hypergradient(hg.Bilevel(inner, outer), estimator)
        (loops[num],) = adjoint_loops(lambda alpha, of=of: of(w, alpha), 0.0)
        spent[num] = of(w, 0.0).stats["num_hvps"]
    assert loops[8].transcendentals == loops[1].transcendentals >= 100
    assert loops[1].flops < loops[8].flops < 8 * loops[1].flops
    assert spent[8] >= 8 * 2  # at least one step and the residual of each


def test_a_front_has_one_adjoint_loop_for_all_preferences():
    """P runs of K losses are P K columns of the loop of one run of one loss."""
    run = lambda preferences: (
        front(biquadratic(), preferences, objectives.WeightedSum, num_steps=3).value
    )
    (alone,) = adjoint_loops(run, PREFERENCES[:1])
    (together,) = adjoint_loops(run, PREFERENCES)
    assert alone.flops < together.flops <= len(PREFERENCES) * alone.flops


# Hypervolume.

AREAS = {
    "one": ([[1, 1]], [3, 4], 6),
    "staircase": ([[1, 3], [2, 2], [3, 1]], [4, 4], 6),
    "dominated": ([[1, 3], [2, 2], [3, 1], [3, 3], [2, 2]], [4, 4], 6),
    "outside": ([[1, 3], [2, 2], [3, 1], [0, 5], [5, 0]], [4, 4], 6),
    "ties": ([[1, 2], [1, 3]], [2, 4], 2),
    "nothing": ([[5, 5], [4, 1]], [4, 4], 0),
    "a box": ([[1, 2, 3]], [2, 4, 6], 6),
    "two boxes": ([[0, 0, 1], [1, 1, 0]], [2, 2, 2], 5),
    "one number": ([[3], [1]], [4], 3),
}


@pytest.mark.parametrize("name", AREAS)
def test_hypervolumes_by_hand(name: str):
    points, reference, exact = AREAS[name]
    points, reference = jnp.array(points, float), jnp.array(reference, float)
    for order in itertools.islice(itertools.permutations(range(len(points))), 24):
        found = jax.jit(objectives.hypervolume)(points[jnp.array(order)], reference)
        assert float(found) == exact


@pytest.mark.parametrize("num", [2, 3, 4])
def test_hypervolume_is_the_part_of_a_box_that_is_dominated(num: int, key: jax.Array):
    """By 200,000 random points of the unit box, within four standard errors."""
    keys = jax.random.split(key)
    points = jax.random.uniform(keys[0], (12, num), maxval=1.2)
    samples = jax.random.uniform(keys[1], (200_000, num))
    dominated = jnp.any(jnp.all(points[:, None] <= samples[None], -1), 0)
    share = float(jnp.mean(dominated))
    exact = float(objectives.hypervolume(points, jnp.ones(num)))
    assert 0.1 < share < 0.99
    assert abs(exact - share) < 4 * (share * (1 - share) / 200_000) ** 0.5


@pytest.mark.parametrize(
    ("points", "on_front"),
    [
        ([[1, 3], [2, 2], [3, 1], [3, 3], [2, 3]], [1, 1, 1, 0, 0]),
        ([[1, 1], [1, 1], [1, 2]], [1, 1, 0]),
        ([[jnp.nan, 0], [1, 1], [0, jnp.nan]], [0, 1, 0]),
        ([[jnp.inf, 0], [1, 1], [jnp.inf, 1]], [1, 1, 0]),
        ([[1, 2, 3], [1, 2, 4], [3, 2, 1]], [1, 0, 1]),
        ([[3], [1], [2]], [0, 1, 0]),
    ],
)
def test_which_points_no_other_dominates(points, on_front):
    found = jax.jit(objectives.non_dominated)(jnp.array(points, float))
    assert found.tolist() == [bool(x) for x in on_front]


# Efficiency.

WIDTHS = [7, 5, 3, 2]


def dense(parameters, x):
    for weights, bias in parameters:
        x = x @ weights + bias[None]
    return x


def layers(widths):
    ones = functools.partial(jnp.ones, dtype=jnp.float32)
    return [(ones((n, m)), ones(m)) for n, m in itertools.pairwise(widths)]


def test_costs_of_dense_layers_are_those_of_a_network():
    """Its leaves, XLA's count of its operations, the bytes of each layer's input."""
    parameters = layers(WIDTHS)
    count = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    assert float(objectives.num_parameters(WIDTHS)) == count
    x = jnp.ones((8, WIDTHS[0]), jnp.float32)
    compiled = jax.jit(dense).lower(parameters, x).compile()
    # XLA counts n additions a sum of n terms, and those of the bias apart.
    flops = compiled.cost_analysis()["flops"] - 8 * sum(WIDTHS[1:])
    assert 8 * float(objectives.num_flops(WIDTHS)) == flops
    kept, inputs = x, 0
    for weights, bias in parameters:
        inputs += kept.nbytes
        kept = kept @ weights + bias[None]
    assert float(objectives.activation_bytes(WIDTHS, batch_size=8)) == inputs


@pytest.mark.parametrize(
    "cost",
    [objectives.num_parameters, objectives.num_flops, objectives.activation_bytes],
)
def test_costs_are_differentiable_in_widths(cost):
    """They are linear in each, so a difference of one is the derivative."""
    widths = jnp.array(WIDTHS, jnp.float32)
    gradient = jax.grad(cost)(widths)
    assert gradient.dtype == jnp.float32
    for i in range(len(WIDTHS)):
        step = cost(widths.at[i].add(1)) - cost(widths)
        np.testing.assert_allclose(gradient[i], step, rtol=1e-6)


def test_an_expected_cost_is_the_mean_over_all_networks(key: jax.Array):
    """Two edges, three operations: each of nine networks with its probability."""
    keys = jax.random.split(key)
    logits = jax.random.normal(keys[0], (2, 3))
    costs = jax.random.uniform(keys[1], (2, 3))
    p = np.asarray(jax.nn.softmax(logits))
    mean = sum(p[0, i] * p[1, j] * (costs[0, i] + costs[1, j])
               for i in range(3) for j in range(3))  # fmt: skip
    np.testing.assert_allclose(objectives.expected_cost(logits, costs), mean)
    same = objectives.expected_cost(logits, costs[0])
    np.testing.assert_allclose(same, np.sum(p @ np.asarray(costs[0])), rtol=1e-12)


def test_labels_bought_are_the_sum_of_their_weights():
    weights = jnp.array([0.0, 1.0, 0.25])
    assert float(objectives.num_labelled(weights)) == 1.25
    assert jnp.array_equal(jax.grad(objectives.num_labelled)(weights), jnp.ones(3))


# Latency.

WIDE, DEEP = np.array([4.0, 8.0, 20.0]), np.array([1.0, 3.0])
SECONDS = np.array([[1.0, 3.0], [2.0, 7.0], [5.0, 9.0]])


def stub(seconds):
    """A clock that a run moves on, and what makes runs of ``seconds(*widths)``."""
    now, calls = [0.0], []

    def make(*widths):
        def run():
            calls.append(widths)
            now[0] += seconds(*widths)
            return jnp.zeros(2)

        return run

    return make, lambda: now[0], calls


def test_a_table_is_exact_at_its_knots_and_has_the_slopes_between():
    """In one width: NumPy's interpolation; also its differences, outside too."""
    table = objectives.LatencyTable((jnp.array(WIDE),), jnp.array(SECONDS[:, 0]))
    assert [float(table(x)) for x in WIDE] == SECONDS[:, 0].tolist()
    x = np.linspace(4, 20, 33)
    np.testing.assert_allclose(jax.vmap(table)(x), np.interp(x, WIDE, SECONDS[:, 0]))
    slope = jax.vmap(jax.grad(table))
    inside = jnp.array([1.0, 4.0, 6.0, 8.0, 19.0, 20.0, 50.0])
    np.testing.assert_allclose(slope(inside), [0.25, 0.25, 0.25, *[0.25] * 4])
    np.testing.assert_allclose(table(24.0), 6.0)  # the last piece goes on
    other = objectives.LatencyTable((jnp.array(WIDE),), jnp.array(SECONDS[:, 1]))
    slopes = [1.0, 1.0, 1.0, 1 / 6, 1 / 6, 1 / 6, 1 / 6]
    np.testing.assert_allclose(jax.vmap(jax.grad(other))(inside), slopes)
    assert table(jnp.float32(6.0)).dtype == jnp.float32
    knots = jnp.array([256.0, 257.0])  # one number in bfloat16
    near = objectives.LatencyTable((knots,), knots)(jnp.bfloat16(256.0))
    assert (near, near.dtype) == (256.0, jnp.bfloat16)


def test_a_table_of_two_widths_is_bilinear():
    """Exact at the knots; within a cell the four corners by their areas."""
    table = objectives.LatencyTable((jnp.array(WIDE), jnp.array(DEEP)), SECONDS)
    for i, j in np.ndindex(3, 2):
        assert float(table(WIDE[i], DEEP[j])) == SECONDS[i, j]
    u, v = 0.25, 0.5  # at (5, 2), of the cell from (4, 1) to (8, 3)
    corners = np.array([(1 - u) * (1 - v), (1 - u) * v, u * (1 - v), u * v])
    np.testing.assert_allclose(table(5.0, 2.0), corners @ SECONDS[:2].ravel())
    slope = jax.grad(table, argnums=(0, 1))(5.0, 2.0)
    across = (SECONDS[1] - SECONDS[0]).mean() / 4
    along = (1 - u) * (3 - 1) / 2 + u * (7 - 2) / 2
    np.testing.assert_allclose(slope, [across, along])


def test_a_measured_table_is_what_the_clock_says():
    """The median of the runs after the first, at every pair of widths."""
    slow = iter([9.0, *[0.1, 0.1, 5.0]] * 6)  # the first compiles, one is held up
    make, clock, calls = stub(lambda n, m: next(slow) + n * m)
    table = objectives.LatencyTable.measure(
        make, [2, 4, 8], [1, 3], num_repeats=3, clock=clock
    )
    pairs = [(n, m) for n in (2, 4, 8) for m in (1, 3)]
    assert calls == [pair for pair in pairs for _ in range(4)]
    exact = 0.1 + np.outer([2, 4, 8], [1, 3])
    np.testing.assert_allclose(table.seconds, exact, rtol=1e-12)
    np.testing.assert_allclose(table(3.0, 2.0), 0.1 + 6.0)  # a product is bilinear


def test_a_table_of_rising_seconds_rises_everywhere():
    make, clock, _ = stub(lambda n: n**1.5)
    table = objectives.LatencyTable.measure(make, range(1, 9), clock=clock)
    x = jnp.linspace(0, 12, 200)
    assert np.all(np.diff(jax.vmap(table)(x)) > 0)
    assert np.all(jax.vmap(jax.grad(table))(x) > 0)


def test_a_latency_may_be_an_outer_loss():
    """Its hypergradient is the slope, of widths within one piece."""
    table = objectives.LatencyTable((jnp.array(WIDE),), jnp.array(SECONDS[:, 1]))
    latency = lambda w, alpha, batch: table(jnp.sum(w**2))
    problem = hg.Bilevel(inner_loss, latency, biquadratic().inner_data)
    estimate = hg.hypergradient(problem, IMPLICIT)(jnp.zeros(3), jnp.array([2.0, 1, 1]))
    np.testing.assert_allclose(estimate.hypergradient, [4.0, 2.0, 2.0])


# The weights as a third level.


def test_weights_of_objectives_by_nested_argmin():
    """T = |alpha* - t|², alpha* = sum_k p_k c_k / sum_k p_k for M_k = |w - c_k|²."""
    data = biquadratic().inner_data
    target = jnp.array([0.3, 0.7, 0.1])
    best_w = hg.argmin(inner_loss, hg.Newton())

    def middle(alpha, weights, batch):
        w = best_w(jnp.zeros(3), alpha, batch)
        values = jnp.stack([loss(w, alpha, batch) for loss in DISTANCES])
        return objectives.WeightedSum(weights).score(values)

    best_alpha = hg.argmin(middle, hg.Newton())

    def third(weights):
        return jnp.sum((best_alpha(jnp.zeros(3), weights, data) - target) ** 2)

    weights = jnp.array([0.7, 0.6])
    alpha = weights @ CENTRES / jnp.sum(weights)
    exact = (CENTRES - alpha[None]) @ (2 * (alpha - target)) / jnp.sum(weights)
    np.testing.assert_allclose(jax.grad(third)(weights), exact, rtol=1e-8)


def test_weights_of_objectives_are_learned_at_a_third_level():
    """To those whose optimum is the target, 0.7 along the segment: (0.3, 0.7).

    The middle level's own inner solution is an argmin, its loss a weighted sum; the
    derivative of the value at the start is also the central difference of trainings.
    """
    data = biquadratic().inner_data
    target = CENTRES[0] + 0.7 * (CENTRES[1] - CENTRES[0])
    best_w = hg.argmin(inner_loss, hg.Newton())

    def middle(alpha, logit, batch):
        w = best_w(jnp.zeros(3), alpha, batch)
        values = jnp.stack([loss(w, alpha, batch) for loss in DISTANCES])
        share = jax.nn.sigmoid(logit)
        return objectives.WeightedSum(jnp.stack([1 - share, share])).score(values)

    third = lambda alpha, logit, batch: jnp.sum((alpha - target) ** 2)
    problem = hg.Bilevel(middle, third, data, data)
    estimator = hg.Implicit(hg.Newton())
    step, start = 1e-5, jnp.zeros(3)
    at = lambda logit: hg.hypergradient(problem, estimator)(start, jnp.array(logit))
    difference = (at(step).value - at(-step).value) / (2 * step)
    np.testing.assert_allclose(at(0.0).hypergradient, difference, rtol=1e-6)
    trace = hg.minimize(
        problem, estimator, QUARTER, start, jnp.array(0.0), num_steps=60
    )
    np.testing.assert_allclose(jax.nn.sigmoid(trace.alpha), 0.7, atol=1e-6)
    np.testing.assert_allclose(trace.w, target, atol=1e-5)


# Bad input.

BAD = {
    "none": (None, ValueError, "2 outer losses"),
    "class": (objectives.MGDA, TypeError, "write MGDA(...)"),
    "function": (jnp.mean, TypeError, "init and weigh"),
    "three weights": (objectives.WeightedSum(jnp.ones(3)), ValueError, "shape (2,)"),
    "three smooth": (
        objectives.SmoothTchebycheff(jnp.ones(3)),
        ValueError,
        "weights must have shape (2,)",
    ),
    "three ideals": (
        objectives.SmoothTchebycheff(jnp.ones(2), ideal=jnp.zeros(3)),
        ValueError,
        "ideal must have shape (2,)",
    ),
    "three rays": (objectives.EPO(jnp.ones(3)), ValueError, "shape (2,)"),
    "two limits": (
        objectives.AugmentedLagrangian(jnp.ones(2)),
        ValueError,
        "limits must have shape (1,)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_combiner_that_does_not_fit_is_refused(name: str):
    combine, error, message = BAD[name]
    with pytest.raises(error, match=re.escape(message)):
        minimize(combine)


def test_a_combiner_of_one_loss_is_refused():
    with pytest.raises(ValueError, match="several outer losses"):
        minimize(objectives.MGDA(), problem=biquadratic(DISTANCES[0]))
    with pytest.raises(ValueError, match="at least one more"):
        minimize(
            objectives.AugmentedLagrangian(1.0), problem=biquadratic(DISTANCES[:1])
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: objectives.WeightedSum([1.0, 2.0]), "write jnp.array"),
        (
            lambda: objectives.WeightedSum(jnp.ones((2, 2))),
            "must be [K], one number an outer loss; got shape (2, 2); for several "
            "settings use hg.objectives.front",
        ),
        (lambda: objectives.WeightedSum(jnp.array([1.0, -1.0])), "at least 0"),
        (lambda: objectives.WeightedSum(jnp.zeros(2)), "one above"),
        (lambda: objectives.WeightedSum(jnp.array([1.0, jnp.nan])), "at least 0"),
        (lambda: objectives.SmoothTchebycheff(jnp.ones(2), 0.0), "temperature"),
        (lambda: objectives.EPO(jnp.array([1.0, 0.0])), "each of them"),
        (lambda: objectives.EPO(jnp.ones(2), 0.0), "tolerance"),
        (lambda: objectives.EPO(jnp.ones(7)).init(7), "SmoothTchebycheff"),
        (lambda: objectives.AugmentedLagrangian(1.0, penalty=-1.0), "penalty"),
        (lambda: objectives.AugmentedLagrangian(1.0, period=0), "period"),
        (lambda: objectives.hypervolume(jnp.ones((2, 3)), jnp.ones(2)), "[P, K]"),
        (lambda: objectives.non_dominated(jnp.ones(2)), "[P, K]"),
        (lambda: objectives.LatencyTable(WIDE, WIDE), "a tuple"),
        (lambda: objectives.LatencyTable((WIDE[:1],), WIDE[:1]), "at least two"),
        (lambda: objectives.LatencyTable((WIDE[::-1],), WIDE), "must rise"),
        (lambda: objectives.LatencyTable((WIDE, DEEP), WIDE), "shape (3, 2)"),
        (lambda: objectives.LatencyTable((WIDE,), WIDE * np.nan), "finite"),
        (lambda: objectives.LatencyTable((WIDE,), WIDE)(1.0, 2.0), "2 widths"),
        (lambda: objectives.LatencyTable.measure(lambda n: n), "0 axes"),
        (lambda: objectives.num_flops([3.0]), "at least two numbers"),
        (
            lambda: front(biquadratic(), 1.0, objectives.WeightedSum, num_steps=1),
            "a row a run",
        ),
        (
            lambda: front(biquadratic(), jnp.ones(2), objectives.EPO, num_steps=1),
            "for weights they must be [P, K], a row a run: weights must be [K], one "
            "number an outer loss; got shape ()",
        ),
        (
            lambda: front(biquadratic(), jnp.eye(2), objectives.EPO, num_steps=1),
            "above 0, each of them",
        ),
        (
            lambda: front(
                biquadratic(), PREFERENCES, objectives.EPO(jnp.ones(2)), num_steps=1
            ),
            "a function of a preference",
        ),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        make()


def test_a_front_of_weights_is_not_sent_back_to_front():
    with pytest.raises(ValueError, match="each of preferences") as raised:
        front(biquadratic(), jnp.ones(2), objectives.EPO, num_steps=1)
    assert "hg.objectives.front" not in str(raised.value)


@pytest.mark.parametrize(
    ("combine", "keys"),
    [
        (objectives.WeightedSum(jnp.ones(2)), ["zadeh1963"]),
        (objectives.SmoothTchebycheff(jnp.ones(2)), ["lin2024"]),
        (objectives.MGDA(), ["desideri2012", "sener2018"]),
        (objectives.UPGrad(), ["quinton2024"]),
        (objectives.EPO(jnp.ones(2)), ["mahapatra2020"]),
        (objectives.AugmentedLagrangian(1.0), ["hestenes1969", "rockafellar1973"]),
        (objectives.hypervolume, ["zitzler1999"]),
    ],
)
def test_combiners_carry_their_citations(combine, keys):
    text = hg.citation(combine)
    assert all(f"{{{key}," in text for key in keys)


@pytest.mark.parametrize("name", objectives.__all__)
def test_every_name_has_a_docstring(name: str):
    """With a doctest, but for the protocol."""
    text = getattr(objectives, name).__doc__
    assert text
    assert ">>> " in text or name == "Combiner"
