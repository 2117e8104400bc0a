"""Runs of the outer loop with several outer losses against closed forms."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import objectives
from tests.loops import run_loop
from tests.objectives.quadratics import (
    ALPHA0,
    CENTERS,
    DISTANCES,
    TENTH,
    assert_close,
    biquadratic,
    inner_loss,
    minimize,
)

SEGMENT = CENTERS[1] - CENTERS[0]
LENGTH = float(jnp.linalg.norm(SEGMENT))


def project_on_segment(point):
    """Returns the distance to the segment of centers, and the fraction along it."""
    t = jnp.clip((point - CENTERS[0]) @ SEGMENT / LENGTH**2, 0, 1)
    return float(jnp.linalg.norm(point - CENTERS[0] - t * SEGMENT)), float(t)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_mgda_ends_at_the_projection_of_its_start(dtype: str):
    """Its direction is 2 (alpha - nearest point of the segment)."""
    _, t = project_on_segment(ALPHA0)
    assert 0.1 < t < 0.9
    trace = minimize(
        objectives.MGDA(), biquadratic(dtype=dtype), alpha=ALPHA0.astype(dtype)
    )
    assert trace.alpha.dtype == trace.value.dtype == dtype
    assert_close(trace.alpha, CENTERS[0] + t * SEGMENT)
    assert trace.status == "completed"
    weights = trace.stats["objective_weights"]
    assert trace.value.shape == weights.shape == (100, 2)
    np.testing.assert_allclose(weights[-1], [1 - t, t], atol=1e-3)


def test_upgrad_lowers_both_losses_to_a_point_of_the_segment():
    trace = minimize(objectives.UPGrad(), optimizer=TENTH, num_steps=300)
    distance, t = project_on_segment(trace.alpha)
    assert distance < 1e-6
    assert 0.05 < t < 0.95
    assert np.all(np.diff(trace.value, axis=0) <= 1e-12)


FRACTIONS = {"first center": 0.02, "second center": 0.98}


@pytest.mark.parametrize("position", FRACTIONS)
@pytest.mark.parametrize("ratio", [0.25, 1.0, 9.0])
def test_epo_ends_where_the_ray_meets_the_front(position: str, ratio: float):
    """r_1 t^2 = r_2 (1 - t)^2 on the segment.

    From near a center the run moves along the front, and one of the values rises.
    `test_pareto_front.py` has runs from outside of the front.
    """
    alpha = CENTERS[0] + FRACTIONS[position] * SEGMENT
    epo = objectives.EPO(jnp.array([ratio, 1.0]))
    trace = minimize(epo, alpha=alpha, optimizer=TENTH, num_steps=400)
    t = 1 / (1 + ratio**0.5)
    exact = LENGTH**2 * np.array([t**2, (1 - t) ** 2])
    np.testing.assert_allclose(trace.value[-1], exact, rtol=0.01)
    rising = list(FRACTIONS).index(position)
    assert float(trace.value[-1, rising]) > 10 * float(trace.value[0, rising])


@pytest.mark.slow
def test_epo_of_three_ends_at_the_point_of_equal_distances():
    """The point is the circumcenter of a triangle; each loss has its own ideal."""
    corners = jnp.array([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.6, 1.8, 0.0]])
    outer = tuple(
        lambda w, alpha, batch, c=c, k=k: jnp.sum((w - c) ** 2) - k
        for k, c in enumerate(corners)
    )
    trace = minimize(
        objectives.EPO(jnp.ones(3), ideal=-jnp.arange(3.0)),
        biquadratic(outer), optimizer=optax.sgd(0.05), num_steps=400,
        alpha=jnp.array([1.5, 0.3, 0.7]),
    )  # fmt: skip
    y = (0.6**2 + 1.8**2 - 2 * 0.6) / (2 * 1.8)  # equal distances to all three
    np.testing.assert_allclose(trace.value[-1] + jnp.arange(3), 1 + y**2, rtol=0.01)


def test_a_run_of_epo_below_the_ideal_stops_with_a_reason():
    """The second value is -1 at the start; with a lower ideal the run completes."""
    square = lambda w, batch: DISTANCES[1](w, None, batch)
    shifted = lambda w, alpha, batch: square(w, batch) - square(ALPHA0, batch) - 1
    problem = biquadratic((DISTANCES[0], shifted))
    trace = minimize(objectives.EPO(jnp.ones(2)), problem, num_steps=3)
    assert trace.status.startswith("stopped: the weights")
    np.testing.assert_allclose(trace.value[0, 1], -1, atol=1e-6)
    np.testing.assert_array_equal(trace.alpha, ALPHA0)
    minimum = -float(square(ALPHA0, problem.outer_data)) - 1
    epo = objectives.EPO(jnp.ones(2), ideal=minimum - 0.1)
    assert minimize(epo, problem, num_steps=3).status == "completed"


def test_a_weighted_sum_is_the_run_of_a_single_loss():
    """The runs agree in every step, in a space too; the adjoints cost more."""
    weights = jnp.array([0.7, 0.2])
    total = lambda w, alpha, batch: (
        0.7 * DISTANCES[0](w, alpha, batch) + 0.2 * DISTANCES[1](w, alpha, batch)
    )
    options = {"optimizer": optax.adam(0.1), "num_steps": 60}
    options["space"] = hg.spaces.Positive()
    several = minimize(objectives.WeightedSum(weights), **options)
    single = minimize(None, biquadratic(total), **options)
    for actual, expected in (
        (several.alpha, single.alpha),
        (several.best_alpha, single.best_alpha),
        (several.value @ weights, single.value),
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-9)
    for name in ("num_grads", "num_inner_steps"):  # one inner solve for both losses
        np.testing.assert_array_equal(several.stats[name], single.stats[name])
    assert jnp.all(single.stats["num_hvps"] < several.stats["num_hvps"])
    assert jnp.all(single.cost < several.cost)


def test_gradients_are_those_of_the_unconstrained_variable():
    """A run in a space equals a run of losses that map the variable themselves."""
    space, aggregator = hg.spaces.Positive(), objectives.MGDA()
    transform = lambda loss: lambda w, u, batch: loss(w, space.forward(u), batch)
    data = biquadratic().inner_data
    transformed = hg.Bilevel(
        transform(inner_loss), tuple(map(transform, DISTANCES)), data, data
    )
    estimator = hg.Implicit(hg.ClosedForm(lambda u, batch: space.forward(u)))
    actual = minimize(aggregator, space=space, optimizer=TENTH, num_steps=20)
    expected = run_loop(
        transformed, estimator, TENTH, ALPHA0, space.inverse(ALPHA0), num_steps=20,
        aggregator=aggregator,
    )  # fmt: skip
    np.testing.assert_allclose(actual.alpha, space.forward(expected.alpha), rtol=1e-8)


def test_without_a_score_the_last_alpha_is_the_best():
    """All values rise in these runs, whose steps are too long."""
    metrics = {"alpha": lambda w, alpha, key: alpha[0]}
    options = {"optimizer": optax.sgd(1.2), "num_steps": 5, "metrics": metrics}
    unscored = minimize(objectives.MGDA(), **options)
    scored = minimize(objectives.WeightedSum(jnp.ones(2)), **options)
    for trace in (unscored, scored):
        assert np.all(np.diff(trace.value, axis=0) > 0)
    assert float(unscored.best_alpha[0]) == float(unscored.metrics["alpha"][-1])
    np.testing.assert_array_equal(scored.best_alpha, ALPHA0)


def _set_to_value(updates, state, params=None, *, value, **extra_args):
    del updates, extra_args
    return jnp.full_like(params, value), state


@pytest.mark.parametrize(
    "aggregator",
    [objectives.SmoothTchebycheff(jnp.ones(2)), objectives.AugmentedLagrangian(1.0)],
    ids=["with score", "without score"],
)
def test_the_optimizer_receives_the_score(aggregator):
    """Without a score it receives the values weighted as in this step."""
    init_fn = lambda params: optax.EmptyState()
    optimizer = optax.GradientTransformationExtraArgs(init_fn, _set_to_value)
    trace = minimize(aggregator, optimizer=optimizer, num_steps=1)
    weighted = lambda value: trace.stats["objective_weights"][0] @ value
    score = getattr(aggregator, "score", weighted)(trace.value[0])
    np.testing.assert_allclose(trace.alpha, ALPHA0 + score, rtol=1e-12)


def test_rows_progress_and_certificates_hold_all_losses():
    calls = []
    trace = minimize(
        objectives.UPGrad(), num_steps=3, certify_every=2,
        progress=lambda num_steps, value: calls.append((num_steps, value.tolist())),
    )  # fmt: skip
    rows = trace.rows()
    assert [row["value"] for row in rows] == trace.value.tolist()
    weights = trace.stats["objective_weights"]
    assert [row["objective_weights"] for row in rows] == weights.tolist()
    assert calls == [(i + 1, row["value"]) for i, row in enumerate(rows)]
    assert float(trace.stats["error_estimate"][0]) < 1e-6
    assert float(trace.flags["certificate"].sum()) == 0


def test_a_loss_that_is_not_finite_stops_the_run():
    """A weight of 0 does not hide it."""
    is_nan = lambda w, alpha, batch: jnp.log(alpha[0] - 1.9)
    problem = biquadratic((DISTANCES[0], is_nan))
    aggregator = objectives.WeightedSum(jnp.array([1.0, 0.0]))
    trace = minimize(aggregator, problem, num_steps=5)
    assert "outer value" in trace.status
    assert np.isnan(trace.stats["objective_weights"][-1]).all()
    np.testing.assert_array_equal(trace.alpha, ALPHA0)


def minimize_within(limits, problem=None, **options):
    aggregator = objectives.AugmentedLagrangian(limits, **options)
    optimizer = optax.sgd(0.02)
    return minimize(aggregator, problem, optimizer=optimizer, num_steps=2000)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [({}, "float64"), ({"penalty": 0.3}, "float64"), ({"period": 10}, "float32")],
    ids=["defaults", "penalty", "period, float32"],
)
def test_a_limit_holds_and_its_multiplier_is_that_of_the_kkt_point(options, dtype):
    """|w - c1|^2 subject to |w - c2|^2 <= r^2 has its minimum at distance r from c2.

    There (w - c1) + m (w - c2) = 0, so that m = |c1 - c2| / r - 1.
    """
    limit = (0.4 * LENGTH) ** 2
    trace = minimize_within(limit, biquadratic(dtype=dtype), **options)
    assert_close(trace.alpha, CENTERS[1] - 0.4 * SEGMENT, scale=100)
    assert float(trace.value[-1, 1]) <= 1.01 * limit
    weights = trace.stats["objective_weights"][-1]
    np.testing.assert_allclose(weights, [1, 1.5], rtol=1e-4)


def test_two_limits_of_which_the_first_is_active():
    """w_0 <= -1/2 is active, w_1 <= 5 is not; the multiplier is 2 (c_0 + 1/2)."""
    coordinate = lambda i: lambda w, alpha, batch: w[i]
    outer = DISTANCES[0], coordinate(0), coordinate(1)
    trace = minimize_within(jnp.array([-0.5, 5.0]), biquadratic(outer))
    np.testing.assert_allclose(trace.alpha, CENTERS[0].at[0].set(-0.5), atol=1e-6)
    weights = trace.stats["objective_weights"][-1]
    np.testing.assert_allclose(weights, [1, 3, 0], atol=1e-5)
    assert weights[2] == 0


def test_all_losses_share_an_inner_solve():
    """With a dense solver each further loss costs only the product of its residual."""
    solver = hg.ClosedForm(lambda alpha, batch: alpha)
    estimator = hg.Implicit(solver, lx.LU(), estimate_error=False)
    single, several = (
        run_loop(
            biquadratic(outer), estimator, TENTH, ALPHA0, ALPHA0, num_steps=3,
            aggregator=aggregator,
        ).stats
        for outer, aggregator in (
            (DISTANCES[0], None), (DISTANCES, objectives.UPGrad())
        )
    )  # fmt: skip
    np.testing.assert_array_equal(several["num_grads"], single["num_grads"])
    extra_hvps = several["num_hvps"] - single["num_hvps"]
    np.testing.assert_array_equal(extra_hvps, jnp.ones(3))


def test_aggregators_of_another_size_are_named():
    SmoothTchebycheff, Lagrangian = (
        objectives.SmoothTchebycheff, objectives.AugmentedLagrangian
    )  # fmt: skip
    for aggregator, name in (
        (objectives.MGDA, "aggregator"),
        (jnp.mean, "aggregator"),
        (objectives.WeightedSum(jnp.ones(3)), "weights"),
        (SmoothTchebycheff(jnp.ones(3)), "weights"),
        (SmoothTchebycheff(jnp.ones(2), ideal=jnp.zeros(3)), "ideal"),
        (objectives.EPO(jnp.ones(3)), "weights"),
        (Lagrangian(jnp.ones(2)), "limits"),
    ):
        with pytest.raises((TypeError, ValueError), match=name):
            minimize(aggregator)
    with pytest.raises(ValueError, match="aggregator"):
        minimize(objectives.MGDA(), biquadratic(DISTANCES[0]))
    with pytest.raises(ValueError, match="outer_loss"):
        minimize(Lagrangian(1.0), biquadratic(DISTANCES[:1]))


def middle_loss(alpha, weights, batch):
    """Returns the weighted sum of the distances of the inner solution at ``alpha``."""
    w = hg.argmin(inner_loss, hg.Newton())(jnp.zeros(3), alpha, batch)
    values = jnp.stack([loss(w, alpha, batch) for loss in DISTANCES])
    return objectives.WeightedSum(weights).score(values)


def test_weights_of_objectives_by_nested_argmin():
    """T = |alpha* - t|^2 with alpha* = sum_k p_k c_k / sum_k p_k."""
    data, weights = biquadratic().inner_data, jnp.array([0.7, 0.6])
    best_alpha = hg.argmin(middle_loss, hg.Newton())
    target = jnp.array([0.3, 0.7, 0.1])
    value = lambda p: jnp.sum((best_alpha(jnp.zeros(3), p, data) - target) ** 2)
    alpha = weights @ CENTERS / jnp.sum(weights)
    exact = (CENTERS - alpha[None]) @ (2 * (alpha - target)) / jnp.sum(weights)
    np.testing.assert_allclose(jax.grad(value)(weights), exact, rtol=1e-8)
