"""`Implicit(rtol=)`: what it asks for, what it spends, what it says."""

import bisect
import functools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits
from test_certificate import LOSSES, make, off, truth

import hypergrad as hg
from benchmarks.known import (
    any_known,
    cast,
    dense,
    error,
    hypertorch,
    quadratic,
    two_losses,
)
from hypergrad.implicit_diff import implicit_hypergradient
from hypergrad.problem import EstimateData

STEPS = 3000


def rated(problem):
    """The problem with the inner solver's rate beside its alpha."""
    inner, outer = problem.inner_loss, problem.outer_loss
    return hg.Bilevel(
        lambda w, alpha, batch: inner(w, alpha["alpha"], batch),
        lambda w, alpha, batch: outer(w, alpha["alpha"], batch) + 0 * alpha["rate"],
        problem.inner_data,
        problem.outer_data,
    )


SOLVER = hg.Descent(lambda alpha: optax.sgd(alpha["rate"]), STEPS)


@functools.partial(jax.jit, static_argnums=(1, 2))
@functools.partial(jax.vmap, in_axes=(0, None, None, None))
def pursued(key, kind, num_newton_steps, rtol):
    """(known, true error, error_estimate, trusted, steps) of one random problem."""
    problem, w, alpha = make(key, kind)
    flat, unravel = ravel_pytree(w)
    inner = lambda w: problem.inner_loss(unravel(w), alpha, problem.inner_data)
    rate = 1 / jnp.linalg.eigvalsh(jax.hessian(inner)(0 * flat))[-1]
    estimator = hg.Implicit(SOLVER, num_newton_steps=num_newton_steps, rtol=rtol)
    found = hg.hypergradient(rated(problem), estimator)(
        w, {"alpha": alpha, "rate": rate}, key
    )
    known, exact = truth(problem, found.w, alpha)
    true = off(found.hypergradient["alpha"], exact)
    stats = found.stats
    return (
        known,
        true,
        stats["error_estimate"],
        stats["trusted"],
        stats["num_inner_steps"],
    )


def check(total: int, num_newton_steps: int, rtol: float, kinds=tuple(LOSSES)) -> None:
    """What is trusted is right, and most are; the estimate errs upwards."""
    keys = jax.random.split(jax.random.key(0), total // len(kinds))
    columns = [pursued(keys, kind, num_newton_steps, rtol) for kind in kinds]
    columns = [np.concatenate(column) for column in zip(*columns, strict=True)]
    known = columns[0]
    _, true, estimate, trusted, steps = (column[known] for column in columns)
    said = (
        f"{total} problems, {np.sum(~known)} excluded, {trusted.sum()} trusted, "
        f"{np.mean(true[trusted] < 2 * rtol):.1%} of them right, "
        f"{np.mean(steps[~trusted] == STEPS):.1%} of the others out of steps"
    )
    assert np.sum(~known) < 0.4 * total, said
    assert np.mean(true[trusted] < 2 * rtol) >= 0.99, said
    assert np.mean(trusted[true < rtol / 5]) >= 0.9, said
    assert np.mean(trusted) >= 0.9, said
    assert np.median(estimate[trusted] / true[trusted]) > 1, said


def test_what_is_asked_for_is_met():
    """30 random logistic problems at 1e-2."""
    check(30, 1, 1e-2, ("logistic",))


@pytest.mark.slow
@pytest.mark.parametrize("num_newton_steps", [1, 2])
@pytest.mark.parametrize("rtol", [1e-2, 1e-4])
def test_what_is_asked_for_is_met_on_a_thousand_problems(num_newton_steps, rtol):
    """Logistic, ridge, softmax and small networks, badly scaled."""
    check(1000, num_newton_steps, rtol)


# What it costs, beside as many steps and products as reach the same error.


def softmax_on_digits():
    """1,000 digits, softmax regression with an L2 penalty for each pixel."""
    bunch = load_digits()
    x, y = bunch.data / 16, bunch.target
    train, val = ({"x": x[i], "y": y[i]} for i in (slice(1000), slice(1000, 1500)))

    def outer(w, alpha, batch):
        logits = batch["x"] @ w
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return jnp.mean(losses)

    def inner(w, alpha, batch):
        penalty = 0.5 * jnp.sum(jnp.exp(alpha)[:, None] * w**2)
        return outer(w, alpha, batch) + penalty

    return hg.Bilevel(inner, outer, train, val), jnp.zeros((64, 10)), jnp.full(64, -4.0)


def logistic_of_hypertorch():
    known = hypertorch()
    return known.problem, known.w, known.alpha


def exact_hypergradient(problem, w, alpha):
    """By a dense solve; by Newton's method and CG to rounding where w is large."""
    if w.size < 100:
        return dense(problem, w, alpha)["hypergradient"]
    tight = hg.Implicit(
        hg.Newton(tolerance=1e-15), hg.CG(rtol=1e-15), num_newton_steps=1
    )
    return hg.hypergradient(problem, tight)(w, alpha).hypergradient


def cheapest(problem, w, alpha, optimizer, exact, goal):
    """Gradient-equivalents of `Implicit` at its cheapest with an error below a goal.

    Any number of steps, any tolerance of the adjoint.
    """
    part = problem.outer_data["y"].size / problem.inner_data["y"].size

    @jax.jit
    def trajectory():
        def step(carry, _):
            w, state = carry
            gradient = jax.grad(problem.inner_loss)(w, alpha, problem.inner_data)
            updates, state = optimizer.update(gradient, state, w)
            w = optax.apply_updates(w, updates)
            return (w, state), w

        return jax.lax.scan(step, (w, optimizer.init(w)), length=STEPS)[1]

    @jax.jit
    def at(w, rtol):
        found = implicit_hypergradient(
            problem, hg.CG(rtol), w, alpha, problem.inner_data, problem.outer_data,
            jnp.zeros_like(w),
        )  # fmt: skip
        return found.hypergradient, found.solved["num_products"]

    points, costs = trajectory(), []
    for rtol in 10.0 ** -np.arange(5, 12):
        enough = lambda i, rtol=rtol: error(at(points[i], rtol)[0], exact) <= goal
        if enough(STEPS - 1):
            i = bisect.bisect_left(range(STEPS), True, key=enough)
            products = float(at(points[i], rtol)[1])
            costs.append(i + 1 + 2 * products + 2 * part)
    return min(costs)


@pytest.mark.parametrize(
    ("start", "optimizer", "num_newton_steps"),
    [
        (logistic_of_hypertorch, optax.sgd(0.1), 1),
        (softmax_on_digits, optax.sgd(1.0), 1),
        (softmax_on_digits, optax.sgd(0.5, momentum=0.9), 2),
    ],
)
def test_a_relative_error_costs_less_than_steps_alone(
    start, optimizer, num_newton_steps
):
    """At most 0.7 of plain `Implicit` at the same true error, all solves counted."""
    problem, w, alpha = start()
    exact = exact_hypergradient(problem, w, alpha)
    estimator = hg.Implicit(
        hg.Descent(optimizer, STEPS), num_newton_steps=num_newton_steps, rtol=1e-6
    )
    found = hg.hypergradient(problem, estimator)(w, alpha)
    reached = error(found.hypergradient, exact)
    assert found.stats["trusted"]
    assert reached <= found.stats["error_estimate"] <= 1e-6
    cost = float(found.stats["gradient_equivalents"])
    assert cost <= 0.7 * cheapest(problem, w, alpha, optimizer, exact, reached)


def test_what_it_costs_is_counted():
    """Evaluations of the inner loss on the host, against the ledger."""
    calls = []
    known = any_known("logistic per-weight")

    def loss(w, alpha, batch):
        jax.debug.callback(lambda: calls.append(1))
        return known.problem.inner_loss(w, alpha, batch)

    problem = hg.Bilevel(
        loss,
        known.problem.outer_loss,
        known.problem.inner_data,
        known.problem.outer_data,
    )
    estimator = hg.Implicit(
        hg.Descent(optax.sgd(known.step), 100), num_newton_steps=1, rtol=1e-4
    )
    ask = hg.hypergradient(problem, estimator)
    jax.block_until_ready(ask(known.w, known.alpha))
    calls.clear()
    found = jax.block_until_ready(ask(known.w, known.alpha))
    jax.effects_barrier()
    stats = found.stats
    assert len(calls) == stats["num_grads"] + stats["num_hvps"]


def test_steps_are_those_of_a_whole_run():
    """Mini-batches and momentum: cut short, the run is the beginning of a whole one."""
    known = any_known("ridge per-weight")
    data = hg.Batches(known.problem.inner_data, batch_size=20)
    problem = hg.Bilevel(
        known.problem.inner_loss, known.problem.outer_loss, data,
        known.problem.outer_data,
    )  # fmt: skip
    optimizer, key = optax.sgd(0.05, momentum=0.5), jax.random.key(3)
    estimator = hg.Implicit(hg.Descent(optimizer, 500), rtol=0.5)
    found = hg.hypergradient(problem, estimator)(known.w, known.alpha, key)
    steps = int(found.stats["num_inner_steps"])
    assert 0 < steps < 500
    data_key = EstimateData.sample(problem, jax.random.split(key)[1]).solver_key
    _, steps_key = jax.random.split(data_key)
    w, state = known.w, optimizer.init(known.w)
    for step_key in jax.random.split(steps_key, 500)[:steps]:
        gradient = jax.grad(known.problem.inner_loss)(
            w, known.alpha, data.sample(step_key)
        )
        updates, state = optimizer.update(gradient, state)
        w = optax.apply_updates(w, updates)
    np.testing.assert_allclose(found.w, w, rtol=1e-9)


def test_hoags_schedules_spend_less():
    """1e-2 / k² against 1e-10 throughout, both to a suboptimality of 1e-3.

    Half the inner steps, as in HOAG's own comparison.
    """
    known = any_known("logistic per-weight")
    solver = hg.Descent(optax.sgd(known.step), 1000)
    schedule = 1e-2 / jnp.arange(1.0, 31.0) ** 2

    def run(rtol):
        estimator = hg.Implicit(solver, rtol=rtol)
        return hg.minimize(
            known.problem, estimator, optax.sgd(3.0), known.w, known.alpha,
            num_steps=30,
        )  # fmt: skip

    inexact, exact = run(schedule), run(jnp.full(30, 1e-10))
    for trace, asked in ((inexact, schedule), (exact, 1e-10)):
        assert np.all(trace.stats["error_estimate"] <= asked)
    best = exact.value.min()

    def steps(trace):
        gap = (trace.value - best) / (exact.value[0] - best)
        reached = int(np.argmax(np.asarray(gap) < 1e-3))
        assert reached > 3
        return float(np.sum(trace.stats["num_inner_steps"][: reached + 1]))

    assert steps(inexact) <= 0.5 * steps(exact)


def test_a_carried_goal_keeps_what_is_asked():
    """Every estimate of a run is within rtol of a dense solve, and is trusted."""
    known = hypertorch()
    solver = hg.Descent(optax.sgd(0.1), 1000)
    estimator = hg.Implicit(solver, num_newton_steps=1, rtol=1e-3)
    problem, state = known.problem, estimator.init(known.problem, known.w, known.alpha)
    estimate = jax.jit(estimator.estimate)
    alpha, steps = known.alpha, []
    for k in range(6):
        found, state = estimate(problem, state, alpha, jax.random.key(k))
        assert found.stats["trusted"]
        assert error(found.hypergradient, known.exact(alpha)) <= 1e-3
        steps.append(float(found.stats["num_inner_steps"]))
        alpha = alpha - found.hypergradient
    assert max(steps[1:]) < steps[0]


def test_out_of_steps_is_not_trusted():
    """Five steps are too few for 1e-6; without Newton's there is no more to do."""
    known = any_known("logistic per-weight")
    estimator = hg.Implicit(hg.Descent(optax.sgd(known.step), 5), rtol=1e-6)
    found = hg.hypergradient(known.problem, estimator)(known.w, known.alpha)
    assert not found.stats["trusted"]
    assert found.stats["num_inner_steps"] == 5
    assert found.stats["error_estimate"] > 1e-6


def test_a_saddle_is_not_trusted():
    """Descent that starts on the ridge of w² (w² - 2) / 4 stays there."""
    inner = lambda w, alpha, batch: 0.25 * (w - alpha) ** 4 - 0.5 * (w - alpha) ** 2
    problem = hg.Bilevel(inner, lambda w, alpha, batch: (w - 3.0) ** 2)
    estimator = hg.Implicit(
        hg.Descent(optax.sgd(0.1), 50), num_newton_steps=1, rtol=1e-2
    )
    ask = hg.hypergradient(problem, estimator)
    assert not ask(1.0, 1.0).stats["trusted"]
    away = ask(1.1, 1.0)
    assert away.stats["trusted"]
    np.testing.assert_allclose(away.w, 2.0, rtol=1e-2)


def test_nan_ends_the_rounds():
    """At once, and is not trusted."""
    inner = lambda w, alpha, batch: jnp.sqrt(w - 10.0) * alpha
    problem = hg.Bilevel(inner, lambda w, alpha, batch: w**2)
    estimator = hg.Implicit(
        hg.Descent(optax.sgd(0.1), 50), num_newton_steps=1, rtol=1e-2
    )
    found = hg.hypergradient(problem, estimator)(1.0, 1.0)
    assert not found.stats["trusted"]
    assert found.stats["num_inner_steps"] <= 10


def test_several_losses_trees_and_solvers_that_run_once():
    """Newton's method, whose own tolerance is loose, corrected to 1e-8."""
    known = quadratic("nested", seed=1)
    problem = two_losses(known, lambda w, alpha, batch: jnp.sum(w["b"]["c"]))
    loose = hg.Newton(tolerance=0.1)
    found = hg.hypergradient(
        problem, hg.Implicit(loose, num_newton_steps=1, rtol=1e-8)
    )(known.w, known.alpha)
    assert found.stats["trusted"]
    first = jax.tree.map(lambda leaf: leaf[0], found.hypergradient)
    assert error(first, known.exact(known.alpha)) <= 1e-8


def test_single_precision():
    """Float32 data under x64: dtypes are kept, 1e-3 is met."""
    known = any_known("logistic per-weight")
    problem, w, alpha = cast((known.problem, known.w, known.alpha), jnp.float32)
    solver = hg.Descent(optax.sgd(known.step), 200)
    found = hg.hypergradient(
        problem, hg.Implicit(solver, num_newton_steps=1, rtol=1e-3)
    )(w, alpha)
    assert found.hypergradient.dtype == jnp.float32
    assert found.stats["trusted"]
    assert error(found.hypergradient, known.exact(known.alpha)) <= 1e-3


@pytest.mark.slow
def test_conformance():
    """What every estimator must do, at the error that is asked for."""
    solver = hg.Descent(optax.sgd(0.5), 200)
    hg.testing.check_estimator(hg.Implicit(solver, rtol=1e-4))


# What the eye could miss.


def blocks(rates):
    """Two parts of w, one far from the start and unread, with a rate each."""
    inner = lambda w, alpha, batch: (
        0.5 * (w["far"] - 1e3) ** 2 + 0.5 * (w["near"] - alpha) ** 2
    )
    problem = hg.Bilevel(inner, lambda w, alpha, batch: 0.5 * (w["near"] - 5.0) ** 2)
    groups = {name: optax.sgd(rate) for name, rate in rates.items()}
    labels = {"far": "far", "near": "near"}
    return problem, optax.multi_transform(groups, labels)


@pytest.mark.parametrize("near", [1e-4, 0.0, 0.01])
def test_parts_that_lag_behind_are_not_overlooked(near):
    """``near`` = 1 - (1 - rate)^t is far from alpha = 1 when ``far`` has arrived."""
    problem, optimizer = blocks({"far": 0.05, "near": near})
    estimator = hg.Implicit(hg.Descent(optimizer, 2000), rtol=1e-2)
    w = {"far": 0.0, "near": 0.0}
    found = hg.hypergradient(problem, estimator)(w, 1.0)
    true = abs(float(found.hypergradient) + 4.0) / 4.0
    assert true <= 1e-2 or not found.stats["trusted"]
    assert (near == 0.01) == bool(found.stats["trusted"])


@pytest.mark.parametrize("rtol", [1e-2, 1e-4])
def test_flat_directions_are_waited_for(rtol):
    """Curvatures 1 and 1e-3, the outer loss reads the flat one through alpha only."""
    inner = lambda w, alpha, batch: (
        0.5 * (w[0] - alpha[0]) ** 2 + 0.5e-3 * (w[1] - alpha[1]) ** 2
    )
    outer = lambda w, alpha, batch: 0.5 * (w[0] - 3.0) ** 2 + alpha[2] * w[1]
    estimator = hg.Implicit(hg.Descent(optax.sgd(0.5), 20_000), rtol=rtol)
    alpha = jnp.array([1.0, 1.0, 0.0])
    found = hg.hypergradient(hg.Bilevel(inner, outer), estimator)(jnp.zeros(2), alpha)
    exact = jnp.array([-2.0, 0.0, 1.0])
    assert found.stats["trusted"]
    assert off(found.hypergradient, exact) <= rtol


@pytest.mark.parametrize("linear_solver", [hg.CG(), hg.NystromCG(5)])
def test_an_ill_conditioned_adjoint_is_not_overlooked(linear_solver):
    """Condition 1e4: b grows, J falls with the curvature; ``w`` is exact."""
    h = jnp.logspace(-4, 0, 30)
    inner = lambda w, alpha, batch: 0.5 * w @ (h * w) - w @ (alpha / h**0.5)
    outer = lambda w, alpha, batch: w @ h**0.5
    problem = hg.Bilevel(inner, outer)
    best = hg.ClosedForm(lambda alpha, batch: alpha / h**1.5)
    estimator = hg.Implicit(best, linear_solver, rtol=1e-3)
    found = hg.hypergradient(problem, estimator)(jnp.zeros(30), jnp.ones(30))
    assert off(found.hypergradient, 1 / h) <= 1e-3 or not found.stats["trusted"]


def test_a_warm_chain_of_adam_is_right_where_trusted():
    """Ten estimates, each from where the last ended, alpha moving."""
    known = hypertorch()
    estimator = hg.Implicit(hg.Descent(optax.adam(0.03), 1000), rtol=1e-2)
    state = estimator.init(known.problem, known.w, known.alpha)
    estimate, alpha, trusted = jax.jit(estimator.estimate), known.alpha, 0
    for k in range(10):
        found, state = estimate(known.problem, state, alpha, jax.random.key(k))
        if found.stats["trusted"]:
            trusted += 1
            assert error(found.hypergradient, known.exact(alpha)) <= 1e-2
        alpha = alpha - 5 * found.hypergradient
    assert trusted > 5


@pytest.mark.parametrize("several", [False, True])
def test_an_outer_loss_that_reads_no_w_is_trusted(several):
    """Alone, or among others."""
    known = any_known("ridge per-weight")
    own = lambda w, alpha, batch: 0.5 * jnp.sum((alpha - 3.0) ** 2)
    outer = (known.problem.outer_loss, own) if several else own
    problem = hg.Bilevel(
        known.problem.inner_loss, outer, known.problem.inner_data,
        known.problem.outer_data,
    )  # fmt: skip
    solver = hg.Descent(optax.sgd(known.step), 500)
    for estimator in (hg.Implicit(solver, rtol=1e-3), hg.Implicit(solver)):
        found = hg.hypergradient(problem, estimator)(known.w, known.alpha)
        assert found.stats["trusted"]


def test_an_exact_landing_leaves_a_goal_to_go_on_with():
    """One step of size 1 on H = I arrives; the next problem is met in few steps."""
    inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2) * batch
    outer = lambda w, alpha, batch: 0.5 * jnp.sum(w**2)
    estimator = hg.Implicit(hg.Descent(optax.sgd(1.0), 2000), rtol=1e-2)
    state = estimator.init(hg.Bilevel(inner, outer, 1.0), jnp.ones(2), jnp.ones(2))
    for scale in (1.0, 0.9, 0.8):
        problem = hg.Bilevel(inner, outer, scale)
        found, state = estimator.estimate(
            problem, state, jnp.ones(2) * scale, jax.random.key(0)
        )
        assert found.stats["trusted"]
        assert found.stats["num_inner_steps"] <= 60


def test_a_second_call_traces_nothing():
    """The carried state has the type of the first; numbers of any kind are data."""
    known, calls = any_known("ridge scalar"), []

    def loss(w, alpha, batch):
        calls.append(1)
        return known.problem.inner_loss(w, alpha, batch)

    problem = hg.Bilevel(
        loss, known.problem.outer_loss, known.problem.inner_data,
        known.problem.outer_data,
    )  # fmt: skip
    solver = hg.Descent(optax.sgd(known.step), 50)
    estimator = hg.Implicit(solver, rtol=1e-2)
    state = estimator.init(problem, known.w, known.alpha)
    estimate = jax.jit(estimator.estimate)
    _, state = estimate(problem, state, known.alpha, jax.random.key(0))
    calls.clear()
    estimate(problem, state, known.alpha, jax.random.key(1))
    assert not calls
    traced = []
    for rtol in (1e-3, np.float64(1e-4)):
        ask = hg.hypergradient(problem, hg.Implicit(solver, rtol=rtol))
        ask(known.w, known.alpha)
        traced.append(len(calls))
        calls.clear()
    assert traced[0] > 0
    assert traced[1] == 0


def test_the_certificate_is_asked_for_the_same_error():
    """``certify=True`` judges at rtol, not at its own default."""
    known = any_known("logistic per-weight")
    solver = hg.Descent(optax.sgd(0.05 * known.step), 2000)
    loose = hg.Implicit(solver, rtol=0.3, certify=True)
    found = hg.hypergradient(known.problem, loose)(known.w, known.alpha)
    assert found.stats["trusted"] == (found.stats["error_estimate"] <= 0.3)
    assert found.stats["error_estimate"] > 1e-2
    assert found.stats["trusted"]


def test_no_inner_steps_but_newtons():
    """``num_steps=0``: all is left to the corrections."""
    known = any_known("ridge per-weight")
    nothing = hg.Descent(optax.sgd(0.1), 0)
    found = hg.hypergradient(
        known.problem, hg.Implicit(nothing, num_newton_steps=1, rtol=1e-6)
    )(known.w, known.alpha)
    assert found.stats["trusted"]
    assert error(found.hypergradient, known.exact(known.alpha)) <= 1e-6


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: hg.Implicit(SOLVER, hg.Neumann(5), rtol=0.1), "tolerance"),
        (lambda: hg.Implicit(SOLVER, lx.CG(0.1, 0.1), rtol=0.1), "the spectrum"),
        (lambda: hg.Implicit(hg.Newton, rtol=0.1), "is the class Newton"),
        (
            lambda: hg.Implicit(SOLVER, num_newton_steps=1, adjoint_batch_size=5),
            "minimum of that batch",
        ),
        (lambda: hg.Implicit(hg.Newton(), rtol=0.1), "num_newton_steps=1"),
        (lambda: hg.Implicit(SOLVER, rtol=np.ones((2, 2))), r"shape \(2, 2\)"),
        (lambda: hg.Implicit(SOLVER, rtol=0.0), "between 0 and 1"),
        (lambda: hg.Implicit(SOLVER, rtol=[]), "number or an array"),
    ],
)
def test_what_cannot_be_met_is_refused(make, match):
    """When the estimator is made."""
    with pytest.raises((ValueError, TypeError), match=match):
        make()
