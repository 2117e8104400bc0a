"""Tests of implicit differentiation of the update map."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import hypergrad as hg
from benchmarks.shared.reference_problems import (
    dense,
    error,
    get_reference,
    hypertorch,
    quadratic,
)
from hypergrad.estimators.error_estimates import remaining_change
from tests.estimator_cases import failed_checks, run_estimator
from tests.loops import TO_ZERO


@pytest.mark.parametrize(("num_terms", "momentum"), [(1, None), (7, 0.3)])
def test_k_terms_are_the_last_k_steps(num_terms, momentum):
    """At the fixed point, K terms equal reverse mode through the last K steps."""
    reference = get_reference("ridge per-weight")
    solution = reference.solution(reference.alpha)
    solver = hg.Descent(optax.sgd(reference.step, momentum), 30)
    truncated = hg.Unrolled(solver, truncation_length=num_terms)
    actual = run_estimator(reference, hg.FixedPoint(solver, num_terms), solution)
    expected = run_estimator(reference, truncated, solution)
    assert error(actual.hypergradient, expected.hypergradient) < 1e-12


def test_warm_started_terms_have_the_published_errors():
    """Errors of AID-FP with 5, 10 and 25 terms on hypertorch's logistic problem.

    Each estimate adds five terms to the adjoint of the previous one, and checks it by
    six further steps.
    """
    reference = hypertorch()
    estimator = hg.FixedPoint(hg.Descent(optax.sgd(0.1), 100), num_terms=5)
    state = estimator.init(reference.problem, reference.w, reference.alpha)
    estimate_fn = jax.jit(estimator.estimate)
    exact, errors = reference.exact(reference.alpha), []
    for _ in range(5):
        estimate, state = estimate_fn(
            reference.problem, state, reference.alpha, jax.random.key(0)
        )
        errors.append(error(estimate.hypergradient, exact))
    published = [5.16e-1, 2.67e-1, 3.72e-2]
    assert [errors[0], errors[1], errors[4]] == pytest.approx(published, rel=5e-3)
    assert estimate.stats["num_grads"] == 102 + 6
    assert estimate.stats["num_hvps"] == 6 + 6
    assert estimate.stats["num_outer_grads"] == 1 + 6


@pytest.mark.parametrize(
    ("num_steps", "num_terms", "failed"),
    [
        pytest.param(2, 300, "inner_error", id="inner run"),
        pytest.param(300, 2, "adjoint_residual", id="adjoint"),
    ],
)
def test_an_early_stop_is_flagged(num_steps, num_terms, failed):
    """An estimate is not trusted if the inner run or the adjoint stops early."""
    reference = quadratic("30", seed=4)
    solver = hg.Descent(optax.sgd(reference.step), num_steps)
    estimate = run_estimator(reference, hg.FixedPoint(solver, num_terms))
    assert error(estimate.hypergradient, reference.exact(reference.alpha)) > 0.02
    assert failed_checks(estimate) == {failed}


@pytest.mark.parametrize(("num_steps", "num_terms"), [(20, 200), (200, 40), (60, 60)])
def test_the_error_is_estimated(num_steps, num_terms):
    """The estimate is within a factor of three of errors by the run and the adjoint."""
    reference = quadratic("30", seed=4)
    solver = hg.Descent(optax.sgd(reference.step), num_steps)
    estimate = run_estimator(reference, hg.FixedPoint(solver, num_terms))
    actual = error(estimate.hypergradient, reference.exact(reference.alpha))
    assert actual > 1e-9
    assert actual / 3 < estimate.stats["error_estimate"] < 3 * actual
    assert estimate.trusted == (estimate.stats["error_estimate"] <= 1e-2)


@pytest.mark.parametrize("ratio", [0.1, 0.9])
def test_the_remaining_change_of_a_geometric_sequence_is_exact(ratio):
    """After changes ``r^k`` for k < 12 the later ones sum to ``r^12 / (1 - r)``."""
    actual = remaining_change(ratio ** jnp.arange(12.0), eps=1e-16)
    assert actual == pytest.approx(ratio**12 / (1 - ratio), rel=1e-9)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_sequence_that_does_not_contract_will_still_change(dtype):
    """However many changes there are, the bound of the contraction stays positive."""
    eps = float(jnp.finfo(dtype).eps)
    assert remaining_change(jnp.ones(200), eps) > 0.1


def test_a_large_parameter_without_influence_hides_nothing():
    """One of 2000 beside an error of 10%, which the remaining steps show exactly."""
    inner = lambda w, alpha, batch: (
        0.5 * jnp.sum((w["a"] - alpha) ** 2) + 0.5 * (w["large"] - 2000.0) ** 2
    )
    outer = lambda w, alpha, batch: 0.5 * jnp.sum(w["a"] ** 2)
    estimator = hg.FixedPoint(hg.Descent(optax.sgd(0.5), 1), num_terms=60)
    w = {"a": 0.8 * jnp.ones(3), "large": jnp.asarray(2000.0)}
    estimate = hg.hypergradient(hg.Bilevel(inner, outer), estimator)(w, jnp.ones(3))
    assert estimate.flags["inner_error"]
    assert estimate.stats["error_estimate"] == pytest.approx(0.1 / 0.9, rel=1e-3)


def test_slow_steps_are_not_trusted():
    """A direction that converges in 1e8 steps is noticed in both precisions."""
    rates = jnp.array([1.0, 1e-8])
    inner = lambda w, alpha, batch: 0.5 * jnp.sum(rates * (w - alpha) ** 2)
    outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 3.0) ** 2)
    estimator = hg.FixedPoint(hg.Descent(optax.sgd(0.5), 60), num_terms=60)
    hypergradient_fn = hg.hypergradient(hg.Bilevel(inner, outer), estimator)
    for dtype in ("float32", "float64"):
        args = jnp.array([1.0, 2.0], dtype), jnp.ones(2, dtype)
        assert hypergradient_fn(*args).flags["adjoint_residual"]
        # Also if the slow entry stays at 0, while the other moves.
        args = jnp.zeros(2, dtype), jnp.array([1.0, 0.0], dtype)
        assert hypergradient_fn(*args).flags["adjoint_residual"]


FADING = optax.sgd(optax.cosine_decay_schedule(0.1, 100))


@pytest.mark.parametrize(
    ("optimizer", "a", "is_trusted"),
    [
        pytest.param(optax.sgd(0.1), 0.0, True, id="constant rate"),
        pytest.param(FADING, 0.0, False, id="rate that ends at 0"),
        pytest.param(
            optax.multi_transform(
                {"constant": optax.sgd(0.1), "fading": FADING},
                {"a": "constant", "b": "fading"},
            ),
            1.0,
            False,
            id="rate of one leaf ends at 0",
        ),
    ],
)
def test_weights_that_stay_at_zero_hide_no_wrong_adjoint(optimizer, a, is_trusted):
    """``w_T = alpha`` for every optimizer, so that the derivative is -4 everywhere.

    A step without a rate depends on nothing, and weights of 0 have no size to compare
    the residual of the adjoint with.
    """
    inner = lambda w, alpha, batch: 0.5 * sum(jnp.sum((w[k] - alpha) ** 2) for k in w)
    outer = lambda w, alpha, batch: sum(jnp.sum((w[k] - 1) ** 2) for k in w)
    estimator = hg.FixedPoint(hg.Descent(optimizer, 100), num_terms=200)
    w = {"a": jnp.full(2, a), "b": jnp.zeros(2)}
    estimate = hg.hypergradient(hg.Bilevel(inner, outer), estimator)(w, jnp.zeros(2))
    assert estimate.trusted == is_trusted
    is_right = error(estimate.hypergradient, jnp.full(2, -4.0)) < 1e-2
    assert is_right == is_trusted


def test_several_losses_and_keyed_batches():
    """K losses give a leading axis; the map uses all data of keyed batches.

    The noise that the key determines has no derivative.
    """
    reference = get_reference("ridge per-weight")
    data, outer_data = reference.problem.inner_data, reference.problem.outer_data
    inner_loss = reference.problem.inner_loss
    losses = (reference.problem.outer_loss, lambda w, alpha, batch: jnp.sum(w))
    problem = hg.Bilevel(
        lambda w, alpha, batch: (
            inner_loss(w, alpha, batch[0]) + jax.random.uniform(batch[1])
        ),
        losses,
        hg.Batches(data, with_key=True),
        outer_data,
    )
    solver = hg.Descent(optax.sgd(reference.step), 300)
    estimate = hg.hypergradient(problem, hg.FixedPoint(solver, 300))(
        reference.w, reference.alpha
    )
    unkeyed = hg.Bilevel(inner_loss, losses, data, outer_data)
    expected = dense(unkeyed, reference.w, reference.alpha)["hypergradient"]
    assert error(estimate.hypergradient, expected) < 1e-9
    assert estimate.trusted


def test_an_adjoint_that_stalls_in_rounding_is_not_trusted():
    """Steps below half a unit in the last place move nothing: 3% are missing here."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: 0.5 * (w - alpha) ** 2, lambda w, alpha, batch: w
    )
    one = jnp.float32(1.0)
    estimator = hg.FixedPoint(hg.Descent(optax.sgd(1e-6), 1), num_terms=60)
    state = estimator.init(problem, one, one)
    stalled = jax.tree.map(lambda x: jnp.full_like(x, 970_000), state.adjoint)
    state = eqx.tree_at(lambda state: state.adjoint, state, stalled)
    estimate, _ = estimator.estimate(problem, state, one, jax.random.key(0))
    assert abs(float(estimate.hypergradient) - 1) > 0.02
    assert not estimate.trusted
    assert estimate.stats["adjoint_residual"] > 0.02


def lbfgs_of(alpha):
    return optax.lbfgs(alpha)


@pytest.mark.parametrize(
    "make_estimator",
    [hg.Unrolled, hg.Forward, lambda solver: hg.FixedPoint(solver, num_terms=3)],
    ids=["Unrolled", "Forward", "FixedPoint"],
)
def test_a_line_search_made_from_alpha_is_refused(make_estimator):
    """What an optimizer contains that is made from alpha shows in its state only."""
    estimator = make_estimator(hg.Descent(lbfgs_of, 3))
    with pytest.raises(ValueError, match="solver"):
        estimator.init(TO_ZERO, jnp.ones(2), jnp.asarray(0.1))


# Hyperparameters in the state of the optimizer.


def decay(weight_decay):
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(0.3))


def stored_decay(weight_decay):
    """Keeps a number in its state, and the last value of a schedule."""
    return optax.inject_hyperparams(decay)(weight_decay=weight_decay)


def init_momentum(alpha):
    """Heavy ball whose momentum starts from ``alpha``."""
    trace = optax.trace(0.5)
    init = lambda w: trace.init(w)._replace(trace=jnp.full_like(w, alpha))
    return optax.chain(
        optax.GradientTransformation(init, trace.update), optax.scale(-0.3)
    )


OPTIMIZERS = {
    "plain": decay,
    "stored": stored_decay,
    "stored and used": lambda alpha: optax.chain(
        stored_decay(alpha), optax.scale(1 + 0.1 * alpha)
    ),
    "schedule": lambda alpha: stored_decay(lambda count: alpha),
    "momentum": init_momentum,
}
ESTIMATORS = {
    "Unrolled": hg.Unrolled,
    "Forward": hg.Forward,
    "truncated": lambda solver: hg.Unrolled(solver, truncation_length=50),
    "FixedPoint": lambda solver: hg.FixedPoint(solver, 50),
}
STATE_OUTER = lambda w, alpha, batch: jnp.sum((w - 2) ** 2)
CONSTANT_LOSS = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1) ** 2)
ALPHA_LOSS = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1 - alpha) ** 2)


@pytest.mark.parametrize(
    ("estimator_name", "optimizer_name"),
    [
        *[(name, "plain") for name in ESTIMATORS],
        ("Unrolled", "stored"),
        ("Forward", "stored"),
        ("truncated", "schedule"),
        ("FixedPoint", "schedule"),
    ],
)
def test_a_setting_of_the_optimizer_has_its_derivative(estimator_name, optimizer_name):
    """It equals central differences wherever the optimizer has the setting from."""
    solver = hg.Descent(OPTIMIZERS[optimizer_name], 100)
    problem = hg.Bilevel(CONSTANT_LOSS, STATE_OUTER)
    w, alpha = jnp.zeros(2), jnp.asarray(0.5)
    estimator = ESTIMATORS[estimator_name](solver)
    actual = hg.hypergradient(problem, estimator)(w, alpha).hypergradient
    expected = hg.hypergradient(problem, hg.CentralDifference(solver))(w, alpha)
    assert error(actual, expected.hypergradient) < 1e-6


@pytest.mark.parametrize("loss", [CONSTANT_LOSS, ALPHA_LOSS], ids=["optimizer", "loss"])
@pytest.mark.parametrize("optimizer_name", ["stored", "stored and used"])
@pytest.mark.parametrize("estimator_name", ["truncated", "FixedPoint"])
def test_a_setting_in_a_constant_state_is_an_error(
    estimator_name, optimizer_name, loss
):
    """Its derivative would be zero, or lack a part if a loss uses it as well."""
    solver = hg.Descent(OPTIMIZERS[optimizer_name], 100)
    estimator = ESTIMATORS[estimator_name](solver)
    problem = hg.Bilevel(loss, STATE_OUTER)
    with pytest.raises(ValueError, match="solver must use alpha"):
        hg.hypergradient(problem, estimator)(jnp.zeros(2), jnp.asarray(0.5))


@pytest.mark.parametrize("estimator_name", ["truncated", "FixedPoint"])
def test_an_initial_momentum_is_forgotten(estimator_name):
    """It is an error as the only use of a leaf; next to a loss nothing is missing."""
    estimator = ESTIMATORS[estimator_name](hg.Descent(init_momentum, 100))
    args = jnp.zeros(2), jnp.asarray(0.5)
    estimate = hg.hypergradient(hg.Bilevel(ALPHA_LOSS, STATE_OUTER), estimator)(*args)
    assert float(estimate.hypergradient) == pytest.approx(-2.0, rel=1e-6)
    with pytest.raises(ValueError, match="alpha"):
        hg.hypergradient(hg.Bilevel(CONSTANT_LOSS, STATE_OUTER), estimator)(*args)
