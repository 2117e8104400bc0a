"""Adapted solvers against dense and Newton solutions, and against their libraries."""

import dataclasses
import functools
import subprocess
import sys
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from hypergrad.inner.adapters import from_jaxopt, from_optimistix
from hypergrad.inner.adapters.jaxopt import JAXOPT
from hypergrad.inner.descent import run_inner_steps
from hypergrad.problem import Batches

with warnings.catch_warnings(action="ignore"):
    import jaxopt

KEY = jax.random.key(0)


def unused(w, alpha, batch):
    raise AssertionError("jaxopt's own fun was called")


LOOPS = {
    "gd": jaxopt.GradientDescent(unused, stepsize=0.7, maxiter=400),
    "optax": jaxopt.OptaxSolver(unused, optax.sgd(0.5, momentum=0.8), maxiter=400),
}
MORE_LOOPS = {
    "gd-plain": jaxopt.GradientDescent(
        unused, stepsize=0.7, maxiter=800, acceleration=False
    ),
    "gd-schedule": jaxopt.GradientDescent(
        unused, stepsize=lambda k: 0.7 - 0.2 / (1 + k), maxiter=400
    ),
}
RUNS = {
    "gd-search": jaxopt.GradientDescent(unused, tol=1e-7, maxiter=3000),
    "lbfgs": jaxopt.LBFGS(unused, tol=1e-9),
    "bfgs": jaxopt.BFGS(unused, tol=1e-9, linesearch="backtracking"),
    "ncg": jaxopt.NonlinearCG(unused, tol=1e-9, maxiter=500),
    "optax-lbfgs": jaxopt.OptaxSolver(
        unused, optax.lbfgs(0.5, linesearch=None), tol=1e-9
    ),
    "polyak": jaxopt.PolyakSGD(unused, max_stepsize=0.5, tol=1e-9, maxiter=3000),
    "armijo": jaxopt.ArmijoSGD(unused, max_stepsize=0.5, tol=1e-7, maxiter=3000),
}
MORE_RUNS = {
    "lbfgs-backtracking": jaxopt.LBFGS(unused, tol=1e-9, linesearch="backtracking"),
    "lbfgs-fixed": jaxopt.LBFGS(unused, tol=1e-9, stepsize=0.5),
    "lbfgs-python": jaxopt.LBFGS(unused, tol=1e-9, jit=False),
}
MINIMISERS = {
    "bfgs": optx.BFGS(1e-10, 1e-10),
    "lbfgs": optx.LBFGS(1e-10, 1e-10),
    "ncg": optx.NonlinearCG(1e-10, 1e-10),
    "gd": optx.GradientDescent(0.7, 1e-11, 1e-11),
    "optax": optx.OptaxMinimiser(optax.sgd(0.5, momentum=0.8), 1e-12, 1e-12),
    "best-so-far": optx.BestSoFarMinimiser(optx.DFP(1e-10, 1e-10)),
}
# optimistix 0.1 mixes float64 into these where w is float32 and x64 is on.
MIXING = {"optx-lbfgs", "optx-best-so-far"}
SOLVERS: dict[str, Any] = {
    f"jaxopt-{name}": from_jaxopt(solver) for name, solver in (LOOPS | RUNS).items()
} | {f"optx-{k}": from_optimistix(s, max_steps=3000) for k, s in MINIMISERS.items()}
every = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def ridge(w, alpha, batch):
    x, y = batch
    penalty = jnp.exp(alpha) * (jnp.sum(w["slope"] ** 2) + w["offset"] ** 2)
    return 0.5 * jnp.mean((x @ w["slope"] + w["offset"] - y) ** 2) + 0.5 * penalty


def logistic(w, alpha, batch):
    x, y = batch
    margin = jnp.sign(y) * (x @ w["slope"] + w["offset"])
    penalty = jnp.exp(alpha) * (jnp.sum(w["slope"] ** 2) + w["offset"] ** 2)
    return jnp.mean(jax.nn.softplus(-margin)) + 0.5 * penalty


def cosh(w, alpha, batch):
    return jnp.cosh(w - alpha) + 0.1 * w**2


def data(key, dtype=jnp.float64):
    x_key, y_key = jax.random.split(key)
    x = 0.6 * jax.random.normal(x_key, (40, 3), dtype)
    return x, x @ jnp.arange(1, 4, dtype=dtype) + jax.random.normal(y_key, (40,), dtype)


def zeros(dtype=jnp.float64):
    return {"slope": jnp.zeros(3, dtype), "offset": jnp.zeros((), dtype)}


@functools.partial(jax.jit, static_argnums=0)
def newton(loss, w, *args):
    """The minimiser by dense Newton steps, exact after one for a quadratic."""
    flat, unravel = ravel_pytree(w)
    f = lambda flat: loss(unravel(flat), *args)
    step = lambda _, v: v - jnp.linalg.solve(jax.hessian(f)(v), jax.grad(f)(v))
    return unravel(jax.lax.fori_loop(0, 20, step, flat))


def assert_close(found, expected, **tolerances):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, **tolerances)


@every
@pytest.mark.parametrize("loss", [ridge, logistic])
def test_finds_the_minimiser(solver, loss, key):
    batch, alpha = data(key), jnp.asarray(-1.5)
    w, stats = solver.solve(loss, zeros(), alpha, batch, key)
    assert_close(w, newton(loss, zeros(), alpha, batch), rtol=1e-5, atol=1e-6)
    assert set(stats) == {"num_steps", "num_grads", "num_hvps", "num_values"}
    assert all(value.shape == () for value in stats.values())


def test_ridge_is_the_normal_equations(key):
    x, y = data(key)
    x1 = jnp.concatenate([x, jnp.ones((40, 1))], 1)
    best = jnp.linalg.solve(x1.T @ x1 / 40 + jnp.exp(-1.5) * jnp.eye(4), x1.T @ y / 40)
    best = {"slope": best[:3], "offset": best[3]}
    assert_close(newton(ridge, zeros(), jnp.asarray(-1.5), (x, y)), best, rtol=1e-10)
    for solver in (MORE_LOOPS | MORE_RUNS).values():
        args = (ridge, zeros(), jnp.asarray(-1.5), (x, y), key)
        assert_close(from_jaxopt(solver).solve(*args)[0], best, rtol=1e-6)


@every
def test_scalar_w_given_as_a_number(solver):
    w, _ = solver.solve(cosh, 0.0, 0.8, None, KEY)
    assert_close(w, newton(cosh, jnp.zeros(()), 0.8, None), rtol=1e-5)
    assert not w.weak_type


@every
def test_jit_and_vmap_equal_a_loop(solver, key):
    x, y = data(key)
    alphas, ys = jnp.array([-2.0, -1.0, 0.0]), jnp.stack([y, -y, 2 * y])

    def solve(alpha, y):
        return solver.solve(ridge, zeros(), alpha, (x, y), key)

    eager = solve(alphas[0], ys[0])
    looped = [jax.jit(solve)(alpha, y) for alpha, y in zip(alphas, ys, strict=True)]
    assert_close(looped[0], eager, rtol=1e-5, atol=1e-6)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *looped)
    w, stats = jax.vmap(solve)(alphas, ys)
    assert_close(w, stacked[0], rtol=1e-5, atol=1e-6)
    # The counts themselves depend on rounding, through the last line searches.
    assert jax.tree.map(jnp.shape, stats) == jax.tree.map(jnp.shape, stacked[1])
    assert all(bool(jnp.isfinite(count).all()) for count in stats.values())


@pytest.mark.parametrize("name", SOLVERS)
def test_float32_stays_float32(name, key):
    solver, batch = SOLVERS[name], data(key, jnp.float32)
    alpha = jnp.asarray(-1.5, jnp.float32)
    args = (ridge, zeros(jnp.float32), alpha, batch, key)
    if name in MIXING:
        with pytest.raises((TypeError, ValueError)) as caught:
            solver.solve(*args)
        assert "default is float64" in caught.value.__notes__[-1]
        with jax.enable_x64(False):
            w, _ = solver.solve(*args)
    else:
        w, _ = solver.solve(*args)
    exact = newton(ridge, zeros(), jnp.asarray(-1.5), batch)
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), exact)
    assert_close(w, exact, rtol=2e-2, atol=2e-3)


SOME = pytest.mark.parametrize("name", ["jaxopt-gd", "jaxopt-bfgs", "optx-bfgs"])


@SOME
def test_float32_parameters_on_float64_keyed_data(name, key):
    loss = lambda w, alpha, batch: ridge(w, alpha, batch[0])
    batches = Batches(data(key), with_key=True)
    start, alpha = zeros(jnp.float32), jnp.asarray(-1.5)
    w, _ = SOLVERS[name].solve(loss, start, alpha, batches, key)
    exact = newton(ridge, zeros(), jnp.asarray(-1.5), data(key))
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), exact)
    assert_close(w, exact, rtol=1e-2, atol=1e-3)


def test_which_iterations_may_be_differentiated():
    loops, runs = (LOOPS | MORE_LOOPS).values(), (RUNS | MORE_RUNS).values()
    assert all(from_jaxopt(solver).differentiable for solver in loops)
    assert not any(from_jaxopt(solver).differentiable for solver in runs)
    assert not any(from_optimistix(s).differentiable for s in MINIMISERS.values())
    assert not from_jaxopt(jaxopt.GradientDescent(unused)).differentiable
    assert not from_jaxopt(jaxopt.GradientDescent(unused, stepsize=-1)).differentiable


@pytest.mark.parametrize("name", LOOPS | MORE_LOOPS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_loop_is_jaxopt_run_without_tolerance(name, dtype, key):
    start, alpha, batch = zeros(dtype), jnp.asarray(-1.5, dtype), data(key, dtype)
    short = dataclasses.replace((LOOPS | MORE_LOOPS)[name], maxiter=7)
    own = dataclasses.replace(short, fun=ridge, tol=0.0, implicit_diff=False)
    expected = own.run(start, alpha, batch).params
    w, stats = from_jaxopt(short).solve(ridge, start, alpha, batch, key)
    assert_close(w, expected, rtol=1e-5 if dtype == jnp.float32 else 1e-12)
    assert (stats["num_steps"], stats["num_grads"]) == (7, 7)


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_may_be_unrolled(name, key):
    """Reverse mode through the loop is a central difference of it."""
    train, val = data(key), data(jax.random.key(1))
    fit = lambda w, alpha, batch: ridge(w, -50.0, batch)
    problem = hg.Bilevel(ridge, fit, train, val)
    solver = from_jaxopt(dataclasses.replace(LOOPS[name], maxiter=20))
    unrolled = hg.hypergradient(problem, hg.Unrolled(solver))
    found = unrolled(zeros(), jnp.asarray(-1.5)).hypergradient
    value = lambda alpha: fit(
        solver.solve(ridge, zeros(), alpha, train, key)[0], alpha, val
    )
    step = 1e-5
    expected = (value(-1.5 + step) - value(-1.5 - step)) / (2 * step)
    np.testing.assert_allclose(found, expected, rtol=1e-7)


def test_plain_gradient_descent_is_descent(key):
    train = data(key)
    solver = from_jaxopt(
        jaxopt.GradientDescent(unused, stepsize=0.5, maxiter=9, acceleration=False)
    )
    descent = hg.Descent(optax.sgd(0.5), 9)
    batches = Batches(train, batch_size=8)
    alpha = jnp.asarray(-1.5)
    for inner_data in (train, batches):
        response = lambda solver, d=inner_data: jax.jacrev(
            lambda alpha: solver.solve(ridge, zeros(), alpha, d, key)[0]
        )(alpha)
        assert_close(response(solver), response(descent), rtol=1e-10)
    _, stats = solver.solve(ridge, zeros(), alpha, batches, key)
    assert stats["num_grads"] == pytest.approx(9 * 8 / 40)


@pytest.mark.parametrize(
    "solver",
    [
        jaxopt.GradientDescent(unused, stepsize=1.0, maxiter=5),
        jaxopt.OptaxSolver(unused, optax.sgd(1.0), maxiter=5),
    ],
    ids=["gd", "optax"],
)
def test_exact_convergence_leaves_the_derivative_finite(solver):
    loss = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)

    def response(alpha):  # a zero cotangent for jaxopt's norm, whose derivative is NaN
        args = (loss, jnp.zeros(2), alpha, None, KEY)
        w, state = run_inner_steps(from_jaxopt(solver), *args)
        return jnp.sum(w) + 0 * state.error

    assert jax.grad(response)(jnp.ones(2)).tolist() == [1.0, 1.0]
    assert jax.jacfwd(response)(jnp.ones(2)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["jaxopt-bfgs", "jaxopt-optax", "optx-bfgs"])
def test_implicit_hypergradient(name, key):
    train, val = data(key), data(jax.random.key(1))
    fit = lambda w, alpha, batch: ridge(w, -50.0, batch)
    problem = hg.Bilevel(ridge, fit, train, val)
    estimator = hg.Implicit(SOLVERS[name])
    found = hg.hypergradient(problem, estimator)(zeros(), jnp.asarray(-1.5))
    value = lambda alpha: fit(newton(ridge, zeros(), alpha, train), alpha, val)
    expected = jax.grad(value)(-1.5)
    np.testing.assert_allclose(found.hypergradient, expected, rtol=1e-6)
    assert found.stats["trusted"]


@pytest.mark.parametrize("name", ["jaxopt-bfgs", "optx-bfgs"])
def test_argmin_differentiates_around_the_solver(name, key):
    batch = data(key)
    solution = hg.argmin(ridge, SOLVERS[name])
    found = jax.jacrev(lambda alpha: solution(zeros(), alpha, batch))(-1.5)
    expected = jax.jacfwd(lambda alpha: newton(ridge, zeros(), alpha, batch))(-1.5)
    assert_close(found, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["jaxopt-bfgs", "jaxopt-gd-search", "optx-bfgs"])
def test_no_derivative_passes_through_a_run(name):
    solver = SOLVERS[name]
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.grad(lambda alpha: solver.solve(cosh, 0.0, alpha, None, KEY)[0])(0.8)
    with pytest.raises(ValueError, match="cannot be differentiated"):
        hg.Unrolled(solver)


def evaluations(solver):
    """The stats of a solve and how often it evaluated the loss."""
    calls = []

    def counted(w, alpha, batch):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sum((1 - w[:-1]) ** 2) + 9 * jnp.sum((w[1:] - w[:-1] ** 2) ** 2)

    start = jnp.array([-1.2, 1.0, 0.5])
    _, stats = jax.block_until_ready(solver.solve(counted, start, None, None, KEY))
    jax.effects_barrier()
    return {name: float(value) for name, value in stats.items()}, len(calls)


@pytest.mark.parametrize("name", ["bfgs", "lbfgs", "ncg", "gd", "optax"])
def test_optimistix_evaluates_one_gradient_a_step(name):
    solver = from_optimistix(
        optx.GradientDescent(1e-3, 1e-6, 1e-6) if name == "gd" else MINIMISERS[name]
    )
    stats, calls = evaluations(solver)
    assert stats["num_grads"] == stats["num_steps"] == calls
    assert stats["num_values"] == stats["num_hvps"] == 0


def test_max_steps_is_a_limit_and_no_error():
    solver = from_optimistix(MINIMISERS["bfgs"], max_steps=3)
    w, stats = solver.solve(cosh, 5.0, 0.8, None, KEY)
    assert stats["num_steps"] == 3
    assert jnp.isfinite(w)


def test_jaxopt_counts():
    stats, _ = evaluations(from_jaxopt(RUNS["lbfgs"]))
    assert stats["num_grads"] > stats["num_steps"] > 0
    assert stats["num_values"] == 0
    stats, _ = evaluations(from_jaxopt(MORE_RUNS["lbfgs-fixed"]))
    assert stats["num_grads"] == stats["num_steps"] + 1
    stats, _ = evaluations(from_jaxopt(RUNS["polyak"]))
    assert (stats["num_grads"], stats["num_values"]) == (stats["num_steps"], 1)
    stats, calls = evaluations(from_jaxopt(RUNS["gd-search"]))
    assert stats["num_grads"] == stats["num_values"] == stats["num_steps"]
    assert stats["num_grads"] + stats["num_values"] <= calls
    stats, _ = evaluations(from_jaxopt(RUNS["optax-lbfgs"]))
    assert (stats["num_grads"], stats["num_values"]) == (stats["num_steps"], 0)


@pytest.mark.parametrize("solver", [*LOOPS.values(), RUNS["lbfgs"]])
def test_no_steps_at_all(solver):
    solver = from_jaxopt(dataclasses.replace(solver, maxiter=0))
    w, _ = solver.solve(cosh, 0.3, 0.8, None, KEY)
    assert w == 0.3


def test_one_trace_for_one_solver():
    traces = []

    @eqx.filter_jit
    def solve(solver, alpha):
        traces.append(1)
        return solver.solve(cosh, jnp.zeros(()), alpha, None, KEY)[0]

    for alpha in (0.1, 0.2):
        solve(from_jaxopt(RUNS["lbfgs"]), jnp.asarray(alpha))
    assert len(traces) == 1
    for rate in (0.3, 0.6):  # equal by value, and a learning rate is data
        minimiser = optx.GradientDescent(rate, 1e-10, 1e-10)
        solve(from_optimistix(minimiser), jnp.asarray(0.8))
    assert len(traces) == 2


def test_learning_rate_of_optimistix_may_be_mapped():
    def steps(rate):
        solver = from_optimistix(optx.GradientDescent(rate, 1e-6, 1e-6))
        return solver.solve(cosh, 0.0, 0.8, None, KEY)[1]["num_steps"]

    rates = jnp.array([0.1, 0.3])
    assert jax.vmap(steps)(rates).tolist() == [float(steps(r)) for r in rates]


def squared(w):
    return w


identity_projection = lambda w, hyperparams: w
SGD = optax.sgd(0.1)
REFUSED = {
    "ProjectedGradient": (
        lambda: jaxopt.ProjectedGradient(unused, identity_projection),
        "ProjectedGradient keeps w in a set.* dL/dw = 0 .*would be wrong",
    ),
    "ProximalGradient": (
        lambda: jaxopt.ProximalGradient(unused, jaxopt.prox.prox_lasso),
        "ProximalGradient minimises the inner loss plus a term",
    ),
    "BlockCoordinateDescent": (
        lambda: jaxopt.BlockCoordinateDescent(
            jaxopt.objective.least_squares, jaxopt.prox.prox_lasso
        ),
        "BlockCoordinateDescent minimises the inner loss plus a term",
    ),
    "MirrorDescent": (
        lambda: jaxopt.MirrorDescent(unused, lambda x, g, t, h: x, 0.1),
        "MirrorDescent keeps w in a set",
    ),
    "LBFGSB": (lambda: jaxopt.LBFGSB(unused), "LBFGSB keeps w in a set"),
    "ScipyBoundedMinimize": (
        lambda: jaxopt.ScipyBoundedMinimize(fun=unused),
        "ScipyBoundedMinimize keeps w in a set",
    ),
    "ScipyMinimize": (
        lambda: jaxopt.ScipyMinimize(fun=unused),
        "ScipyMinimize runs on the host, outside jit and vmap",
    ),
    "OSQP": (lambda: jaxopt.OSQP(), "OSQP keeps w in a set"),
    "GaussNewton": (
        lambda: jaxopt.GaussNewton(squared),
        "GaussNewton needs the vector of residuals",
    ),
    "LevenbergMarquardt": (
        lambda: jaxopt.LevenbergMarquardt(squared),
        "LevenbergMarquardt needs the vector of residuals",
    ),
    "Bisection": (
        lambda: jaxopt.Bisection(squared, 0.0, 1.0),
        "Bisection solves an equation",
    ),
    "Broyden": (lambda: jaxopt.Broyden(squared), "Broyden solves an equation"),
    "FixedPointIteration": (
        lambda: jaxopt.FixedPointIteration(squared),
        "FixedPointIteration solves an equation",
    ),
    "AndersonWrapper": (
        lambda: jaxopt.AndersonWrapper(jaxopt.GradientDescent(unused)),
        "AndersonWrapper hides the solver",
    ),
    "line search": (
        lambda: jaxopt.BacktrackingLineSearch(unused),
        "one of jaxopt's minimisers GradientDescent, .*; got BacktrackingLineSearch",
    ),
    "has_aux": (lambda: jaxopt.LBFGS(unused, has_aux=True), "has_aux or value_and_"),
    "value_and_grad": (
        lambda: jaxopt.BFGS(unused, value_and_grad=True),
        "has_aux or value_and_grad set, but its fun is replaced",
    ),
    "value_and_grad function": (
        lambda: jaxopt.LBFGS(unused, value_and_grad=unused),  # pyright: ignore
        "has_aux or value_and_grad",
    ),
    "prox": (
        lambda: jaxopt.GradientDescent(unused, jaxopt.prox.prox_lasso, stepsize=0.1),
        "GradientDescent with a prox .*would be wrong",
    ),
    "pre_update": (
        lambda: jaxopt.OptaxSolver(unused, SGD, pre_update=lambda *args: args[:2]),
        "OptaxSolver with pre_update may move w",
    ),
    "optax line search": (
        lambda: jaxopt.OptaxSolver(unused, optax.lbfgs()),
        "does not pass the loss value that the line search",
    ),
    "a class": (lambda: jaxopt.LBFGS, r"the class LBFGS; pass an instance"),
    "an optimistix solver": (lambda: MINIMISERS["lbfgs"], "got LBFGS|got _?LBFGS"),
    "a function": (lambda: unused, "got function"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_jaxopt_refusals(make, message):
    with pytest.raises(TypeError, match=message):
        from_jaxopt(make())


def test_subclasses_are_judged_by_what_they_are():
    class Mine(jaxopt.LBFGS):
        pass

    class Bounded(jaxopt.ProjectedGradient):
        pass

    assert not from_jaxopt(Mine(unused)).differentiable
    with pytest.raises(TypeError, match="ProjectedGradient keeps w in a set"):
        from_jaxopt(Bounded(unused, identity_projection))


def test_every_jaxopt_solver_is_judged():
    names = {
        name
        for name, thing in vars(jaxopt).items()
        if isinstance(thing, type) and hasattr(thing, "run")
    }
    others = {n for n in names if n.endswith("LineSearch")} | {"IterativeRefinement"}
    assert names - others == set(JAXOPT)


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="maxiter must be an integer"):
        from_jaxopt(jaxopt.LBFGS(unused, maxiter=10.0))  # pyright: ignore
    with pytest.raises(ValueError, match="max_steps must be an integer"):
        from_optimistix(MINIMISERS["bfgs"], max_steps=0)
    mixed = {"slope": jnp.zeros(3, jnp.float32), "offset": jnp.zeros(())}
    for name in ("jaxopt-lbfgs", "jaxopt-gd"):
        with pytest.raises(ValueError, match="w has leaves of dtypes float32, float64"):
            SOLVERS[name].solve(ridge, mixed, 0.0, data(KEY), KEY)


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (optx.LevenbergMarquardt(1e-6, 1e-6), "must be a minimiser.*got Levenberg"),
        (optx.Newton(1e-6, 1e-6), "must be a minimiser.*got Newton"),
        (optx.FixedPointIteration(1e-6, 1e-6), "must be a minimiser"),
        (optx.BFGS, "the class BFGS; pass an instance"),
        (optx.GoldenSearch(1e-6, 1e-6), "GoldenSearch keeps w in a set"),
        (optx.BestSoFarMinimiser(optx.GoldenSearch(1e-6, 1e-6)), "GoldenSearch keeps"),
        (optx.NelderMead(1e-6, 1e-6), "NelderMead starts from a degenerate simplex"),
        (RUNS["bfgs"], "must be a minimiser.*got BFGS"),
    ],
)
def test_optimistix_refusals(solver, message):
    with pytest.raises(TypeError, match=message):
        from_optimistix(solver)


def test_without_optimistix(monkeypatch):
    monkeypatch.setitem(sys.modules, "optimistix", None)
    with pytest.raises(ImportError, match=r"hypergrad-jax\[solvers\]"):
        from_optimistix(MINIMISERS["bfgs"])


def test_importing_hypergrad_imports_neither():
    code = (
        "import sys, hypergrad; "
        "print({'jaxopt', 'optimistix'} & set(sys.modules) or 'neither')"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "neither"


def test_no_warning_escapes():
    code = (
        "import warnings, jax, jax.numpy as jnp, optax, hypergrad as hg\n"
        "with warnings.catch_warnings(action='ignore'):\n"
        "    import jaxopt\n"
        "import optimistix\n"
        "f = lambda w, alpha, batch: jnp.sum((w - alpha) ** 2)\n"
        "for solver in (\n"
        "    hg.from_jaxopt(jaxopt.GradientDescent(f, stepsize=0.1)),\n"
        "    hg.from_jaxopt(jaxopt.LBFGS(f)),\n"
        "    hg.from_jaxopt(jaxopt.OptaxSolver(f, optax.adam(0.1))),\n"
        "    hg.from_optimistix(optimistix.BFGS(1e-6, 1e-6)),\n"
        "    hg.from_optimistix(optimistix.GradientDescent(0.1, 1e-6, 1e-6)),\n"
        "):\n"
        "    solver.solve(f, jnp.zeros(2), jnp.ones(2), None, jax.random.key(0))\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
