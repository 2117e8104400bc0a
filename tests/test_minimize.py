"""The outer loop against closed-form optima and loops written by hand."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize_scalar

import hypergrad as hg
from benchmarks.known import any_known, cast, error, flat, quadratic, ridge, ridge_outer
from tests.loops import run_loop

BEST = hg.ClosedForm(
    lambda alpha, batch: jnp.linalg.solve(batch["H"], batch["C"] @ alpha)
)
# The point at each step, seen through metrics.
SEE = {
    "alpha": lambda w, alpha, key: jnp.sum(flat(alpha)),
    "w": lambda w, alpha, key: jnp.sum(flat(w)),
    "key": lambda w, alpha, key: jax.random.uniform(key),
}


@functools.cache
def sgd(step: float) -> optax.GradientTransformation:
    return optax.sgd(step)


# Convergence.


def test_finds_the_best_ridge_penalty():
    """The minimum over one log-penalty of the closed-form validation loss (SciPy)."""
    known = ridge("scalar", seed=3, n=15)
    value = lambda a: float(ridge_outer(known.best(a), a, known.problem.outer_data))
    found = minimize_scalar(value, bounds=(-8, 4), method="bounded",
                            options={"xatol": 1e-10})  # fmt: skip
    trace = hg.minimize(
        known.problem, hg.Implicit(hg.Newton()), optax.adam(0.2), known.w, known.alpha,
        num_steps=300,
    )  # fmt: skip
    assert trace.status == "completed"
    assert -7 < found.x < 3
    np.testing.assert_allclose(trace.alpha, found.x, atol=1e-3)
    np.testing.assert_allclose(trace.value[-1], found.fun, rtol=1e-7)
    assert np.all(trace.stats["trusted"])


@pytest.mark.parametrize("method", ["implicit", "unrolled"])
def test_finds_the_optimum_of_a_quadratic(method: str):
    """(k + C'H^-2 C) alpha = C'H^-1 t, by a dense solve."""
    known = quadratic("30", seed=8)
    H, C, t, k = (np.asarray(known.problem.inner_data[name]) for name in "HCtk")
    A = np.linalg.solve(H, C)
    exact = np.linalg.solve(np.diag(k) + A.T @ A, A.T @ t)
    solver = hg.Descent(sgd(known.step), 300)
    estimator = hg.Implicit(solver) if method == "implicit" else hg.Unrolled(solver)
    trace = hg.minimize(
        known.problem, estimator, sgd(0.3), known.w, known.alpha, num_steps=400
    )
    assert error(trace.alpha, jnp.array(exact)) < 1e-8
    assert error(trace.best_alpha, jnp.array(exact)) < 1e-6


def by_hand(known, optimizer, alpha, num_steps, forward=None, after=lambda u: u):
    """Alphas and values of gradient steps on u, with the closed-form hypergradient."""
    forward = forward or (lambda u: u)
    u = alpha
    state = optimizer.init(u)
    alphas, values = [], []
    for _ in range(num_steps):
        alpha, pullback = jax.vjp(forward, u)
        alphas.append(alpha)
        best = known.best(alpha)
        values.append(known.problem.outer_value(best, alpha, known.problem.outer_data))
        (gradient,) = pullback(known.exact(alpha))
        updates, state = optimizer.update(gradient, state, u)
        u = after(optax.apply_updates(u, updates))
    return [*alphas, forward(u)], values


@pytest.mark.parametrize(
    "optimizer",
    [optax.adam(0.1), optax.adamw(0.1, weight_decay=0.3), optax.sgd(0.1, momentum=0.9)],
    ids=["adam", "adamw", "momentum"],
)
def test_equals_a_loop_by_hand(optimizer):
    """Ten steps with the exact hypergradient; weight decay needs alpha to be passed."""
    known = quadratic("30", seed=9)
    alphas, values = by_hand(known, optimizer, known.alpha, 10)
    trace = hg.minimize(
        known.problem, hg.Implicit(BEST), optimizer, known.w, known.alpha, num_steps=10,
        metrics=SEE,
    )  # fmt: skip
    assert error(trace.alpha, alphas[-1]) < 1e-9
    assert error(trace.value, jnp.stack(values)) < 1e-9
    seen = jnp.stack([jnp.sum(alpha) for alpha in alphas[:-1]])
    assert error(trace.metrics["alpha"], seen) < 1e-9  # before each step
    assert error(trace.w, known.best(alphas[-2])) < 1e-9


# Metrics.


def test_metrics_are_evaluated_when_due():
    """Steps 0, 3, 6 and the last of 8; NaN elsewhere; the values by hand."""
    known = quadratic("30", seed=9)
    run = functools.partial(
        run_loop, known.problem, hg.Implicit(BEST), sgd(0.1), known.w, known.alpha,
        num_steps=8, key=jax.random.key(1),
    )  # fmt: skip
    alphas, _ = by_hand(known, sgd(0.1), known.alpha, 8)
    trace, plain, every = run(metrics=SEE, eval_every=3), run(), run(metrics=SEE)
    due = [0, 3, 6, 7]
    seen = np.asarray(trace.metrics["alpha"])
    assert np.flatnonzero(~np.isnan(seen)).tolist() == due
    np.testing.assert_allclose(seen[due], [jnp.sum(alphas[i]) for i in due], rtol=1e-9)
    at = [jnp.sum(known.best(alphas[i])) for i in due]
    np.testing.assert_allclose(np.asarray(trace.metrics["w"])[due], at, rtol=1e-9)
    keys = np.asarray(every.metrics["key"])
    assert len(set(keys.tolist())) == 8  # a fresh key at each step
    # Outside the ledger, and without influence on the run.
    assert np.array_equal(trace.cost, plain.cost)
    assert np.array_equal(trace.alpha, plain.alpha)
    assert plain.metrics == {}


def test_a_metric_reads_its_arrays_as_data():
    """A Partial over held-out data; the value by NumPy."""
    known = any_known("ridge scalar")
    test = {"x": jnp.ones((5, 6)), "y": jnp.arange(5.0)}
    mse = lambda data, w, alpha, key: 2 * ridge_outer(w, alpha, data)
    trace = hg.minimize(
        known.problem, hg.Implicit(hg.Newton()), sgd(0.1), known.w, known.alpha,
        num_steps=2, metrics={"mse": jax.tree_util.Partial(mse, test)},
    )  # fmt: skip
    w = np.asarray(known.best(known.alpha))
    by_numpy = np.mean((np.ones((5, 6)) @ w - np.arange(5)) ** 2)
    np.testing.assert_allclose(trace.metrics["mse"][0], by_numpy, rtol=1e-9)


# Spaces and projections.

SPACES = {
    "Positive": (hg.spaces.Positive(), jnp.exp, jnp.log),
    "Interval": (
        hg.spaces.Interval(-1.0, 2.0),
        lambda u: -1 + 3 * jax.nn.sigmoid(u),
        lambda a: jnp.log((a + 1) / (2 - a)),
    ),
    "log Interval": (
        hg.spaces.Interval(1e-3, 10.0, log=True),
        lambda u: jnp.exp(jnp.log(1e-3) + jnp.log(1e4) * jax.nn.sigmoid(u)),
        lambda a: jnp.log(jnp.log(a / 1e-3) / jnp.log(10.0 / a)),
    ),
    "Simplex": (
        hg.spaces.Simplex(),
        jax.nn.softmax,
        lambda a: jnp.log(a) - jnp.mean(jnp.log(a)),
    ),
}
INSIDE = jnp.array([0.1, 0.2, 0.3, 0.4])  # in each of them


@pytest.mark.parametrize("name", SPACES)
def test_a_space_is_a_reparametrisation(name: str):
    """Fifteen steps of momentum on u written by hand; alpha stays inside throughout."""
    space, forward, inverse = SPACES[name]
    known = quadratic("30", seed=9)
    optimizer = optax.sgd(0.5, momentum=0.9)
    alphas, values = by_hand(known, optimizer, inverse(INSIDE), 15, forward)
    trace = hg.minimize(
        known.problem, hg.Implicit(BEST), optimizer, known.w, INSIDE, num_steps=15,
        space=space, metrics=SEE | {
            "inside": lambda w, alpha, key: jnp.all(space.contains(alpha))
        },
    )  # fmt: skip
    assert error(alphas[0], INSIDE) < 1e-12
    assert error(trace.alpha, alphas[-1]) < 1e-8
    assert error(trace.value, jnp.stack(values)) < 1e-8
    assert np.all(trace.metrics["inside"] == 1)
    assert np.all(space.contains(trace.alpha))
    best = alphas[int(np.argmin(values))]
    assert error(trace.best_alpha, best) < 1e-8


def test_a_box_is_projected_gradient_descent():
    """Clipping by hand after each step; some bounds are hit, some are not."""
    low, high = jnp.array([0.0, 0.15, -1.0, 0.3]), jnp.array([0.5, 0.25, 0.35, 0.9])
    known = quadratic("30", seed=9)
    optimizer = sgd(0.5)
    alphas, values = by_hand(
        known, optimizer, INSIDE, 15, after=lambda u: jnp.clip(u, low, high)
    )
    space = hg.spaces.Box(low, high)
    trace = hg.minimize(
        known.problem, hg.Implicit(BEST), optimizer, known.w, INSIDE, num_steps=15,
        space=space,
        metrics={"inside": lambda w, alpha, key: jnp.all(space.contains(alpha))},
    )  # fmt: skip
    assert error(trace.alpha, alphas[-1]) < 1e-9
    assert error(trace.value, jnp.stack(values)) < 1e-9
    assert np.all(trace.metrics["inside"] == 1)
    assert np.any((trace.alpha == low) | (trace.alpha == high))


def test_spaces_leaf_by_leaf():
    """A tree of spaces with None among them equals one reparametrisation by hand."""
    known = quadratic("nested", seed=9)
    alpha = {"a": jnp.array(0.5), "b": [jnp.array([0.2, 0.3, 0.5])]}
    space = {"a": hg.spaces.Positive(), "b": [hg.spaces.Simplex()]}
    forward = lambda u: {"a": jnp.exp(u["a"]), "b": [jax.nn.softmax(u["b"][0])]}
    u = {"a": jnp.log(0.5), "b": [jnp.log(alpha["b"][0])]}
    optimizer = sgd(0.2)
    alphas, _ = by_hand(known, optimizer, u, 6, forward)
    run = functools.partial(
        run_loop, known.problem, hg.Implicit(hg.Newton()), optimizer, known.w, alpha,
        num_steps=6,
    )  # fmt: skip
    assert error(run(space=space).alpha, alphas[-1]) < 1e-8
    free, _ = by_hand(known, optimizer, alpha, 6)
    assert error(run(space={"a": None, "b": None}).alpha, free[-1]) < 1e-8
    assert error(run().alpha, free[-1]) < 1e-8


@pytest.mark.parametrize(
    "project",
    [
        optax.projections.projection_simplex,
        optax.projections.projection_non_negative,
        functools.partial(optax.projections.projection_l2_ball, scale=0.5),
    ],
    ids=["simplex", "non-negative", "ball"],
)
def test_projections_of_optax(project):
    """Projected gradient descent by hand."""
    known = quadratic("30", seed=8)
    alphas, values = by_hand(known, sgd(0.5), INSIDE, 10, after=project)
    trace = run_loop(
        known.problem, hg.Implicit(BEST), sgd(0.5), known.w, INSIDE, num_steps=10,
        project=project,
    )  # fmt: skip
    assert error(trace.alpha, alphas[-1]) < 1e-9
    assert error(trace.value, jnp.stack(values)) < 1e-9
    assert error(project(trace.alpha), trace.alpha) < 1e-12


# Freezing. M = alpha^2 through w* = alpha; the run walks from 3 down to 0.

SQUARE = lambda w, alpha, batch: jnp.sum((w - alpha) ** 2)
STEPS = 15


def frozen(outer, optimizer=None, estimator=None):
    problem = hg.Bilevel(SQUARE, outer)
    estimator = hg.Implicit(hg.Newton()) if estimator is None else estimator
    optimizer = sgd(0.1) if optimizer is None else optimizer
    metrics = {"alpha": lambda w, alpha, key: alpha}
    return hg.minimize(
        problem, estimator, optimizer, 0.0, 3.0, num_steps=STEPS, metrics=metrics
    )


def check_frozen(trace: hg.Trace, last: int, rule: str):
    """Rows after ``last`` are blank and cost nothing; the end is the last good one."""
    assert rule in trace.status
    after = slice(last + 1, None)
    assert np.all(np.isfinite(trace.metrics["alpha"][: last + 1]))
    assert np.all(np.isnan(trace.value[after]))
    assert np.all(np.isnan(trace.metrics["alpha"][after]))
    for name, column in trace.stats.items():
        blank = np.asarray(column[after])
        if name == "trusted":
            assert not blank.any()
        elif name.startswith("num_") or name == "gradient_equivalents":
            assert not blank.any(), name
        else:
            assert np.all(np.isnan(blank)), name
    assert np.all(np.diff(trace.cost[last:]) == 0)
    assert np.all(np.diff(trace.cost[: last + 1]) > 0)
    assert all(np.isfinite(x) for x in (trace.alpha, trace.w, trace.best_alpha))


def test_a_value_that_is_not_finite_freezes_the_run():
    """log(alpha - 1) below 1: the value is NaN at the sixth step (3 x 0.8^5 = 0.98)."""
    outer = lambda w, alpha, batch: jnp.sum(w**2) + 0 * jnp.log(alpha - 1)
    trace = frozen(outer)
    check_frozen(trace, 5, "the outer value is not finite")
    assert np.isnan(trace.value[5])
    np.testing.assert_allclose(trace.w, 3 * 0.8**4, rtol=1e-6)
    np.testing.assert_allclose(trace.best_alpha, 3 * 0.8**4, rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_the_last_good_alpha_has_a_finite_value(bad):
    """Where alpha < 1 is forbidden, the run must not end below 1."""
    outer = lambda w, alpha, batch: jnp.sum(w**2) + jnp.where(alpha < 1, bad, 0.0)
    trace = frozen(outer)
    assert "the outer value is not finite" in trace.status
    assert trace.alpha >= 1
    np.testing.assert_allclose(trace.alpha, trace.w, rtol=1e-6)


def test_a_hypergradient_that_is_not_finite_freezes_the_run():
    """The classical where-trap: a finite value with a NaN derivative below 1."""
    outer = lambda w, alpha, batch: (
        jnp.sum(w**2) + jnp.where(alpha > 1, 0 * jnp.sqrt(alpha - 1), 0.0)
    )
    for estimator in (None, hg.Unrolled(hg.Descent(sgd(0.5), 5))):
        trace = frozen(outer, estimator=estimator)
        check_frozen(trace, 5, "the hypergradient is not finite")
        np.testing.assert_allclose(trace.value[5], (3 * 0.8**5) ** 2, rtol=1e-6)


def test_a_step_that_is_not_finite_freezes_the_run():
    """An optimizer whose third step is infinite: alpha stays where it was before it."""
    blow = optax.scale_by_schedule(lambda count: jnp.where(count == 2, -jnp.inf, -0.1))
    trace = frozen(lambda w, alpha, batch: jnp.sum(w**2), optimizer=blow)
    check_frozen(trace, 2, "the step left alpha not finite")
    np.testing.assert_allclose(trace.alpha, 3 * 0.8**2, rtol=1e-6)
    np.testing.assert_allclose(trace.value[2], (3 * 0.8**2) ** 2, rtol=1e-6)


def test_one_run_of_a_batch_freezes_alone():
    """vmap over starts: the one that meets the NaN stops, its neighbour goes on."""
    outer = lambda w, alpha, batch: jnp.sum(w**2) + 0 * jnp.log(alpha - 1)
    problem = hg.Bilevel(SQUARE, outer)
    run = lambda alpha: hg.minimize(
        problem, hg.Implicit(hg.Newton()), sgd(0.1), 0.0, alpha, num_steps=8
    )
    batch = jax.vmap(run)(jnp.array([3.0, 30.0]))
    assert batch.status_code.tolist() == [1, 0]
    for i, start in enumerate((3.0, 30.0)):
        alone = run(start)
        np.testing.assert_allclose(batch.value[i], alone.value, rtol=1e-9)
        np.testing.assert_allclose(batch.cost[i], alone.cost, rtol=1e-9)
        np.testing.assert_allclose(batch.alpha[i], alone.alpha, rtol=1e-9)


def test_a_frozen_run_under_progress_is_the_same():
    """Chunked or not: the same rows, the same status."""
    outer = lambda w, alpha, batch: jnp.sum(w**2) + 0 * jnp.log(alpha - 1)
    problem = hg.Bilevel(SQUARE, outer)
    run = functools.partial(
        run_loop, problem, hg.Implicit(hg.Newton()), sgd(0.1), 0.0, 3.0, num_steps=41
    )
    one, other = run(), run(progress=lambda done, value: None)
    np.testing.assert_array_equal(one.value, other.value)
    np.testing.assert_array_equal(one.cost, other.cost)
    assert one.status == other.status


# What a run leaves.


@pytest.mark.parametrize("num_steps", [1, 7, 20, 41])
def test_progress_changes_nothing(num_steps: int):
    """Bit for bit the same trace; called at most 20 times, at last with all done."""
    known = any_known("logistic per-weight")
    train = hg.Batches(known.problem.inner_data, 8)
    problem = hg.Bilevel(
        known.problem.inner_loss,
        known.problem.outer_loss,
        train,
        known.problem.outer_data,
    )
    run = functools.partial(
        run_loop, problem, hg.Implicit(hg.Descent(sgd(0.3), 5)), optax.adam(0.1),
        known.w, known.alpha, num_steps=num_steps, key=jax.random.key(2), metrics=SEE,
        eval_every=3,
    )  # fmt: skip
    calls = []
    plain = run()
    chunked = run(progress=lambda done, value: calls.append((done, value)))
    jax.tree.map(np.testing.assert_array_equal, chunked, plain)
    steps = [done for done, _ in calls]
    assert steps == sorted(set(steps))
    assert steps[-1] == num_steps
    assert len(calls) == num_steps or 10 < len(calls) <= 20
    for done, value in calls:
        assert value == float(plain.value[done - 1])


def test_rows_are_the_trace_step_by_step():
    """A dict a step: value, cumulated cost, stats; metrics where evaluated."""
    known = any_known("ridge scalar")
    trace = run_loop(
        known.problem, hg.Implicit(hg.Newton()), sgd(0.1), known.w, known.alpha,
        num_steps=5, metrics={"m": lambda w, alpha, key: alpha}, eval_every=2,
    )  # fmt: skip
    rows = trace.rows()
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert ["m" in row for row in rows] == [True, False, True, False, True]
    spent = 0.0
    for i, row in enumerate(rows):
        spent += float(trace.stats["gradient_equivalents"][i])
        assert row["value"] == float(trace.value[i])
        assert row["cost"] == pytest.approx(spent)
        assert row["trusted"] is True
        assert set(trace.stats) | {"step", "value", "cost"} == set(row) - {"m"}
        plain = (int, float, bool)
        assert all(isinstance(x, plain) for x in row.values())


def test_rows_of_a_batch_need_an_index():
    """A trace under vmap has the batch axes in front, and says how to index it."""
    known = any_known("ridge scalar")
    run = lambda alpha: hg.minimize(
        known.problem, hg.Implicit(hg.Newton()), sgd(0.1), known.w, alpha, num_steps=4
    )
    alphas = jnp.array([-1.0, 0.0, 1.0])
    batch = jax.vmap(run)(alphas)
    assert batch.alpha.shape == batch.best_alpha.shape == (3,)
    assert batch.w.shape == (3, 6)
    assert batch.value.shape == batch.cost.shape == (3, 4)
    assert all(column.shape == (3, 4) for column in batch.stats.values())
    with pytest.raises(ValueError, match="index it first"):
        batch.rows()
    one = jax.tree.map(lambda x: x[1], batch)
    assert one.status == "completed"
    alone = run(0.0).rows()
    for mine, theirs in zip(one.rows(), alone, strict=True):
        assert mine["value"] == pytest.approx(theirs["value"], rel=1e-9)
        assert mine["cost"] == pytest.approx(theirs["cost"])


def test_best_alpha_is_where_the_value_was_lowest():
    """Steps too long overshoot: the best is neither the first nor the last."""
    problem = hg.Bilevel(SQUARE, lambda w, alpha, batch: jnp.sum((w - 1) ** 2))
    grow = optax.scale_by_schedule(lambda count: -0.3 * 1.5**count)
    trace = hg.minimize(
        problem, hg.Implicit(hg.Newton()), grow, 0.0, 3.0, num_steps=12,
        metrics={"alpha": lambda w, alpha, key: alpha},
    )  # fmt: skip
    lowest = int(np.argmin(trace.value))
    assert 0 < lowest < 11
    np.testing.assert_allclose(trace.best_alpha, trace.metrics["alpha"][lowest])


@pytest.mark.parametrize("method", ["implicit", "unrolled"])
def test_w_is_carried_from_step_to_step(method: str):
    """With alpha held still, ten runs of 20 inner steps are one of 200."""
    known = any_known("ridge scalar")
    hold = optax.scale(0.0)
    solver = hg.Descent(sgd(0.02), 20)
    kind = hg.Implicit if method == "implicit" else hg.Unrolled
    for warm in (True, False):
        estimator = kind(solver, warm_start=warm)
        trace = hg.minimize(
            known.problem, estimator, hold, known.w, known.alpha, num_steps=10
        )
        steps = 200 if warm else 20
        w = known.w
        for _ in range(steps):
            g = jax.grad(known.problem.inner_loss)(
                w, known.alpha, known.problem.inner_data
            )
            w = w - 0.02 * g
        assert error(trace.w, w) < 1e-12


def test_the_adjoint_is_carried_from_step_to_step():
    """Warm adjoints take fewer products than cold ones over a run of small steps."""
    known = quadratic("30", seed=7)
    counts = {}
    for warm in (True, False):
        estimator = hg.Implicit(BEST, hg.CG(rtol=1e-6), warm_start=warm)
        trace = hg.minimize(
            known.problem, estimator, sgd(1e-4), known.w, known.alpha, num_steps=20
        )
        counts[warm] = np.asarray(trace.stats["num_hvps"])
    assert counts[True][0] == counts[False][0]
    assert counts[True][1:].mean() < 0.7 * counts[False][1:].mean()


def test_the_same_key_is_the_same_run():
    """Mini-batches: to the bit; no key is key 0; another key, another run."""
    known = any_known("logistic per-weight")
    train = hg.Batches(known.problem.inner_data, 8)
    problem = hg.Bilevel(
        known.problem.inner_loss,
        known.problem.outer_loss,
        train,
        known.problem.outer_data,
    )
    run = functools.partial(
        run_loop, problem, hg.Implicit(hg.Descent(sgd(0.3), 5)), sgd(0.1),
        known.w, known.alpha, num_steps=4,
    )  # fmt: skip
    zero, again, none, other = (
        run(key=key)
        for key in (jax.random.key(0), jax.random.key(0), None, jax.random.key(1))
    )
    jax.tree.map(np.testing.assert_array_equal, zero, again)
    jax.tree.map(np.testing.assert_array_equal, zero, none)
    assert not np.array_equal(zero.value, other.value)
    assert len(set(np.asarray(zero.value).tolist())) == 4  # fresh batches each step


def test_float32_stays_float32():
    """With x64 on, alpha, w and value keep single precision through spaces."""
    known = any_known("ridge per-weight")
    problem, w = cast(known.problem, jnp.float32), cast(known.w, jnp.float32)
    alpha = jnp.full(6, 0.5, jnp.float32)
    for space in (None, hg.spaces.Positive(), hg.spaces.Interval(0.1, 2.0)):
        trace = hg.minimize(
            problem, hg.Implicit(hg.Newton()), optax.adam(0.1), w, alpha, num_steps=3,
            space=space,
        )  # fmt: skip
        leaves = (trace.alpha, trace.best_alpha, trace.w, trace.value)
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
        assert trace.status == "completed"


@pytest.mark.parametrize("name", ["value", "cost", "step", "trusted", "num_hvps"])
def test_a_metric_does_not_overwrite_a_column(name: str):
    """Refused by name."""
    known = any_known("ridge scalar")
    with pytest.raises(ValueError, match="metrics cannot be called"):
        hg.minimize(
            known.problem, hg.Implicit(hg.Newton()), sgd(0.1), known.w, known.alpha,
            num_steps=2, metrics={name: lambda w, alpha, key: alpha},
        )  # fmt: skip


def test_an_optimizer_that_reads_the_value_gets_it():
    """Polyak's step (M - 0) / |h|^2 on M = alpha^2: halves alpha every time."""
    inner = lambda w, alpha, batch: 0.5 * (w - alpha) ** 2
    problem = hg.Bilevel(inner, lambda w, alpha, batch: w**2)
    trace = hg.minimize(
        problem, hg.Implicit(hg.Newton()), optax.polyak_sgd(max_learning_rate=9.0),
        0.0, 1.0, num_steps=4,
    )  # fmt: skip
    np.testing.assert_allclose(trace.value, [1, 1 / 4, 1 / 16, 1 / 64], rtol=1e-9)


def test_an_optimizer_that_searches_a_line_is_refused():
    """It would ask for values at other alphas."""
    known = any_known("ridge scalar")
    with pytest.raises(ValueError, match="searches along a line"):
        hg.minimize(
            known.problem, hg.Implicit(hg.Newton()), optax.lbfgs(), known.w,
            known.alpha, num_steps=2,
        )  # fmt: skip


def test_l_bfgs_without_a_line_search_is_newtons_method_in_few_axes():
    """On a quadratic it is there in a few steps, where gradients crawl."""
    stiffness = jnp.array([1.0, 10.0, 100.0])
    problem = hg.Bilevel(
        lambda w, alpha, batch: jnp.sum((w - alpha) ** 2),
        lambda w, alpha, batch: 0.5 * jnp.sum(stiffness * (w - 1.0) ** 2),
    )
    ends = [
        hg.minimize(
            problem, hg.Implicit(hg.Newton()), optimizer, jnp.zeros(3), jnp.zeros(3),
            num_steps=30,
        ).alpha
        for optimizer in (optax.lbfgs(1.0, linesearch=None), optax.sgd(0.01))
    ]  # fmt: skip
    quick, slow = (float(jnp.max(jnp.abs(alpha - 1.0))) for alpha in ends)
    assert quick < 1e-6
    assert slow > 0.5


def test_metrics_draw_from_a_key_of_their_own():
    """A metric's randomness is not that of the estimate it looks at."""
    seen = []

    class Spy(hg.Implicit):
        """Keeps the keys that it was given."""

        def estimate(self, problem, state, alpha, key):
            jax.debug.callback(lambda data: seen.append(tuple(data)), key_data(key))
            return hg.Implicit.estimate(self, problem, state, alpha, key)

    key_data = jax.random.key_data
    known = any_known("ridge scalar")
    trace = hg.minimize(
        known.problem, Spy(hg.Newton()), sgd(0.1), known.w, known.alpha, num_steps=3,
        metrics={"key": lambda w, alpha, key: key_data(key)[1].astype(float)},
    )  # fmt: skip
    assert len(seen) == 3
    assert not {float(data[1]) for data in seen} & set(trace.metrics["key"].tolist())


def test_the_first_of_equal_values_is_the_best():
    """M is 0 from the start: best_alpha is where it was first seen."""
    inner = lambda w, alpha, batch: 0.5 * (w - alpha) ** 2
    problem = hg.Bilevel(inner, lambda w, alpha, batch: 0 * w)
    estimator = hg.Implicit(hg.Newton())
    drift = optax.GradientTransformation(
        lambda u: optax.EmptyState(), lambda g, state, u=None: (g + 1.0, state)
    )
    trace = hg.minimize(problem, estimator, drift, 0.0, 3.0, num_steps=3)
    assert trace.alpha == 6.0
    assert trace.best_alpha == 3.0


# What the outer loss sees may change from step to step.


def tempered(w, alpha, batch):
    return batch["temperature"][0, 0] * jnp.sum((w[None] - batch["t"]) ** 2)


@pytest.mark.parametrize("wrap", [lambda data: data, hg.Batches])
def test_anneal_changes_the_outer_data_step_by_step(wrap):
    """The values and alphas of a loop by hand with another problem at each step.

    The best is the last, since the values of different losses do not compare.
    """
    known = any_known("quadratic 30")
    data = {"t": jnp.ones((1, 30)), "temperature": jnp.ones((1, 1))}
    schedule = optax.exponential_decay(1.0, 1, 1.3)

    def anneal(step, data):
        where = lambda d: d["temperature"]
        where = where if isinstance(data, dict) else lambda d: d.data["temperature"]
        return eqx.tree_at(where, data, schedule(step) * jnp.ones((1, 1)))

    def problem(temperature):
        at = data | {"temperature": jnp.full((1, 1), temperature)}
        inner, inner_data = known.problem.inner_loss, known.problem.inner_data
        return hg.Bilevel(inner, tempered, inner_data, wrap(at))

    estimator, optimizer = hg.Implicit(hg.Newton()), optax.sgd(0.01)
    trace = run_loop(
        problem(1.0), estimator, optimizer, known.w, known.alpha, num_steps=4,
        outer_data_fn=anneal,
    )  # fmt: skip
    alpha = known.alpha
    for step in range(4):
        found = hg.hypergradient(problem(1.3**step), estimator)(known.w, alpha)
        np.testing.assert_allclose(trace.value[step], found.value, rtol=1e-9)
        last, alpha = alpha, alpha - 0.01 * found.hypergradient
    np.testing.assert_allclose(trace.alpha, alpha, rtol=1e-9)
    assert trace.value[-1] > trace.value[0]
    np.testing.assert_allclose(trace.best_alpha, last, rtol=1e-9)


def test_anneal_must_keep_the_data_as_it_is_shaped():
    """And needs data to change."""
    known = any_known("ridge scalar")
    run = functools.partial(
        run_loop, w=known.w, alpha=known.alpha, num_steps=2,
        estimator=hg.Implicit(hg.Newton()), optimizer=optax.sgd(0.1),
    )  # fmt: skip
    with pytest.raises(ValueError, match="anneal returned"):
        run(known.problem, outer_data_fn=lambda step, data: data | {"more": step})
    with pytest.raises(TypeError, match="anneal must be a function"):
        run(known.problem, outer_data_fn=0.5)
    with pytest.raises(ValueError, match="anneal needs outer_data"):
        run_loop(
            hg.Bilevel(
                lambda w, alpha, batch: jnp.sum((w - alpha) ** 2),
                lambda w, alpha, batch: jnp.sum(w**2),
                data_fn=lambda key: (jnp.ones(1), jnp.ones(1)),
            ),
            hg.Implicit(hg.Newton()), optax.sgd(0.1), 0.0, 1.0, num_steps=2,
            outer_data_fn=lambda step, data: data,
        )  # fmt: skip
