"""Tests of adapted solvers against dense solutions and against their libraries."""

import dataclasses
import functools
import sys
import warnings

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from benchmarks.shared.reference_problems import cast, error, get_reference
from hypergrad.inner.descent import run_inner_steps
from hypergrad.runtime.compat import enable_x64

with warnings.catch_warnings(action="ignore"):
    import jaxopt
    from jaxopt.implicit_diff import root_vjp

KEY = jax.random.key(0)


def unused_loss(w, alpha, batch):
    raise AssertionError("The fun of a jaxopt solver must not be called.")


LOOPS = {
    "gd": jaxopt.GradientDescent(unused_loss, stepsize=0.7, maxiter=400),
    "gd schedule": jaxopt.GradientDescent(
        unused_loss, stepsize=lambda k: 0.7 - 0.2 / (1 + k), maxiter=400
    ),
    "gd plain": jaxopt.GradientDescent(
        unused_loss, stepsize=0.7, maxiter=800, acceleration=False
    ),
    "optax": jaxopt.OptaxSolver(unused_loss, optax.sgd(0.5, momentum=0.8), maxiter=400),
}
RUNS = {
    "gd search": jaxopt.GradientDescent(unused_loss, tol=1e-7, maxiter=3000),
    "lbfgs": jaxopt.LBFGS(unused_loss, tol=1e-9),
    "lbfgs python": jaxopt.LBFGS(unused_loss, tol=1e-9, jit=False),
    "bfgs": jaxopt.BFGS(unused_loss, tol=1e-9, linesearch="backtracking"),
    "ncg": jaxopt.NonlinearCG(unused_loss, tol=1e-9, maxiter=500),
    "optax lbfgs": jaxopt.OptaxSolver(
        unused_loss, optax.lbfgs(0.5, linesearch=None), tol=1e-9
    ),
    "polyak": jaxopt.PolyakSGD(unused_loss, max_stepsize=0.5, tol=1e-9, maxiter=3000),
    "armijo": jaxopt.ArmijoSGD(unused_loss, max_stepsize=0.5, tol=1e-7, maxiter=3000),
}
OPTIMISTIX = {
    "bfgs": optx.BFGS(1e-10, 1e-10),
    "lbfgs": optx.LBFGS(1e-10, 1e-10),
    "ncg": optx.NonlinearCG(1e-10, 1e-10),
    "gd": optx.GradientDescent(0.7, 1e-11, 1e-11),
    "optax": optx.OptaxMinimiser(optax.sgd(0.5, momentum=0.8), 1e-12, 1e-12),
    "best so far": optx.BestSoFarMinimiser(optx.DFP(1e-10, 1e-10)),
}
SOLVERS = {
    f"jaxopt {name}": hg.from_jaxopt(solver) for name, solver in (LOOPS | RUNS).items()
} | {
    f"optimistix {name}": hg.from_optimistix(solver, max_steps=3000)
    for name, solver in OPTIMISTIX.items()
}


def ridge(w, alpha, batch):
    x, y = batch
    penalty = jnp.exp(alpha) * (jnp.sum(w["slope"] ** 2) + w["offset"] ** 2)
    return 0.5 * jnp.mean((x @ w["slope"] + w["offset"] - y) ** 2) + 0.5 * penalty


def logistic(w, alpha, batch):
    x, y = batch
    margin = jnp.sign(y) * (x @ w["slope"] + w["offset"])
    penalty = jnp.exp(alpha) * (jnp.sum(w["slope"] ** 2) + w["offset"] ** 2)
    return jnp.mean(jax.nn.softplus(-margin)) + 0.5 * penalty


def scalar_loss(w, alpha, batch):
    return jnp.cosh(w - alpha) + 0.1 * w**2


def mse(w, alpha, batch):
    return ridge(w, -50.0, batch)


def make_data(key, dtype=jnp.float64):
    x_key, y_key = jax.random.split(key)
    x = 0.6 * jax.random.normal(x_key, (40, 3), dtype)
    return x, x @ jnp.arange(1, 4, dtype=dtype) + jax.random.normal(y_key, (40,), dtype)


def zeros(dtype=jnp.float64):
    return {"slope": jnp.zeros(3, dtype), "offset": jnp.zeros((), dtype)}


DATA, VAL_DATA = make_data(KEY), make_data(jax.random.key(1))
ALPHA = jnp.asarray(-1.5)
FLOAT32_ALPHA = ALPHA.astype(jnp.float32)


@eqx.filter_jit
def solve(solver, loss, w, alpha, data, key=KEY):
    return solver.solve(loss, w, alpha, data, key)


@functools.partial(jax.jit, static_argnums=0)
def dense_newton(loss, w, *args):
    """Returns the minimum by dense Newton steps, exact after one for a quadratic."""
    flat_w, unravel = ravel_pytree(w)
    flat_loss = lambda flat_w: loss(unravel(flat_w), *args)
    step = lambda _, v: (
        v - jnp.linalg.solve(jax.hessian(flat_loss)(v), jax.grad(flat_loss)(v))
    )
    return unravel(jax.lax.fori_loop(0, 20, step, flat_w))


# Solutions.


TESTED_BELOW = {"jaxopt gd schedule", "jaxopt gd plain", "jaxopt lbfgs python"}


@pytest.mark.parametrize("name", sorted(SOLVERS.keys() - TESTED_BELOW))
def test_an_adapted_solver_finds_the_minima_of_a_batch_of_problems(name):
    """Penalties and labels are mapped; the statistics have a number for each."""
    x, y = DATA
    alphas, ys = jnp.array([-2.0, -1.5, 0.0]), jnp.stack([y, -y, y[::-1]])
    run = lambda alpha, y: SOLVERS[name].solve(logistic, zeros(), alpha, (x, y), KEY)
    w, stats = jax.jit(jax.vmap(run))(alphas, ys)
    expected = jax.vmap(lambda a, y: dense_newton(logistic, zeros(), a, (x, y)))
    chex.assert_trees_all_close(w, expected(alphas, ys), rtol=1e-5, atol=1e-6)
    names = {"num_steps", "num_grads", "num_hvps", "num_values"}
    # A solver that makes a fixed number of steps has no tolerance to meet.
    has_tolerance = not SOLVERS[name].differentiable
    assert set(stats) == names | ({"converged"} if has_tolerance else set())
    chex.assert_shape(list(stats.values()), (3,))
    chex.assert_tree_all_finite(stats)


@pytest.mark.parametrize(
    "name", ["jaxopt gd", "jaxopt bfgs", "jaxopt lbfgs python", "optimistix bfgs"]
)
def test_w_can_be_a_number(name):
    w, _ = SOLVERS[name].solve(scalar_loss, 0.0, 0.8, None, KEY)
    expected = dense_newton(scalar_loss, jnp.zeros(()), 0.8, None)
    np.testing.assert_allclose(w, expected, rtol=1e-5)
    assert w.dtype == jnp.float64
    assert not w.weak_type


@pytest.mark.parametrize("name", ["jaxopt gd", "jaxopt lbfgs", "optimistix gd"])
def test_float32_stays_float32(name):
    data = make_data(KEY, jnp.float32)
    w, _ = solve(SOLVERS[name], ridge, zeros(jnp.float32), FLOAT32_ALPHA, data)
    expected = cast(dense_newton(ridge, zeros(), ALPHA, data), jnp.float32)
    chex.assert_trees_all_equal_dtypes(w, expected)
    chex.assert_trees_all_close(w, expected, rtol=2e-2, atol=2e-3)


def test_a_solver_that_mixes_dtypes_explains_its_error():
    """optimistix 0.1 mixes float64 into these if w is float32 and x64 is on."""
    solver = SOLVERS["optimistix lbfgs"]
    args = ridge, zeros(jnp.float32), FLOAT32_ALPHA, make_data(KEY, jnp.float32)
    with pytest.raises((TypeError, ValueError)) as raised:
        solver.solve(*args, KEY)
    assert "float64" in raised.value.__notes__[-1]
    with enable_x64(False):
        w, _ = solver.solve(*args, KEY)
    expected = cast(dense_newton(ridge, zeros(), ALPHA, args[-1]), jnp.float32)
    chex.assert_trees_all_close(w, expected, rtol=2e-2, atol=2e-3)


def test_max_steps_is_a_limit_and_no_error():
    solver = hg.from_optimistix(OPTIMISTIX["bfgs"], max_steps=3)
    w, stats = solver.solve(scalar_loss, 5.0, 0.8, None, KEY)
    assert stats["num_steps"] == 3
    assert jnp.isfinite(w)


# Derivatives.


def test_only_loops_without_line_search_are_differentiable():
    assert all(hg.from_jaxopt(solver).differentiable for solver in LOOPS.values())
    assert not any(hg.from_jaxopt(solver).differentiable for solver in RUNS.values())
    assert not any(
        hg.from_optimistix(solver).differentiable for solver in OPTIMISTIX.values()
    )
    for stepsize in (0.0, -1):
        solver = jaxopt.GradientDescent(unused_loss, stepsize=stepsize)
        assert not hg.from_jaxopt(solver).differentiable


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("gd", "float32"), ("gd schedule", "float64"), ("optax", "float64")],
)
def test_a_loop_equals_the_run_of_jaxopt_without_a_tolerance(name, dtype):
    w, alpha, data = zeros(dtype), ALPHA.astype(dtype), make_data(KEY, dtype)
    solver = dataclasses.replace(LOOPS[name], maxiter=7)
    own = dataclasses.replace(solver, fun=ridge, tol=0.0, implicit_diff=False)
    expected = own.run(w, alpha, data).params
    new_w, stats = solve(hg.from_jaxopt(solver), ridge, w, alpha, data)
    rtol = 1e-5 if dtype == "float32" else 1e-12
    chex.assert_trees_all_close(new_w, expected, rtol=rtol)
    assert (stats["num_steps"], stats["num_grads"]) == (7, 7)


def test_an_unrolled_loop_equals_central_differences():
    """The loop is accelerated gradient descent.

    It is trusted: no step depends on its stopping criterion, which has no derivative.
    """
    solver = hg.from_jaxopt(dataclasses.replace(LOOPS["gd"], maxiter=20))
    problem = hg.Bilevel(ridge, mse, DATA, VAL_DATA)
    estimate = hg.hypergradient(problem, hg.Unrolled(solver))(zeros(), ALPHA)
    value = lambda alpha: mse(
        solve(solver, ridge, zeros(), alpha, DATA)[0], alpha, VAL_DATA
    )
    step = 1e-5
    expected = (value(ALPHA + step) - value(ALPHA - step)) / (2 * step)
    np.testing.assert_allclose(estimate.hypergradient, expected, rtol=1e-7)
    assert estimate.trusted, estimate.reasons


@pytest.mark.parametrize("batch_size", [None, 8])
def test_plain_gradient_descent_equals_descent(batch_size):
    """Checks the Jacobian, on the same mini-batches."""
    data = hg.Batches(DATA, batch_size=batch_size)
    solver = dataclasses.replace(LOOPS["gd plain"], stepsize=0.5, maxiter=9)
    adapted, descent = hg.from_jaxopt(solver), hg.Descent(optax.sgd(0.5), 9)
    jacobian = lambda solver: jax.jit(
        jax.jacrev(lambda alpha: solver.solve(ridge, zeros(), alpha, data, KEY)[0])
    )(ALPHA)
    chex.assert_trees_all_close(jacobian(adapted), jacobian(descent), rtol=1e-10)
    _, stats = solve(adapted, ridge, zeros(), ALPHA, data)
    assert stats["num_grads"] == pytest.approx(9 * (batch_size or 40) / 40)


def test_exact_convergence_leaves_the_derivative_finite():
    """The norm in jaxopt's stopping criterion has the derivative NaN at 0."""
    loss = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    solver = hg.from_jaxopt(
        jaxopt.GradientDescent(unused_loss, stepsize=1.0, maxiter=5)
    )

    def response(alpha):
        w, state = run_inner_steps(solver, loss, jnp.zeros(2), alpha, None, KEY)
        return jnp.sum(w) + 0 * state.error

    for derivative in (jax.grad, jax.jacfwd):
        assert jax.jit(derivative(response))(jnp.ones(2)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["jaxopt gd search", "optimistix bfgs"])
def test_a_run_cannot_be_differentiated(name):
    solver = SOLVERS[name]
    value = lambda alpha: solver.solve(scalar_loss, 0.0, alpha, None, KEY)[0]
    with pytest.raises(ValueError, match="Reverse-mode differentiation"):
        jax.grad(value)(0.8)
    with pytest.raises(ValueError, match=type(solver).__name__):
        hg.Unrolled(solver)


# Hypergradients of jaxopt.


def losses_of(reference):
    """Returns the inner and the outer loss as functions of ``(w, alpha)``."""
    problem = reference.problem
    return (
        lambda w, alpha: problem.inner_loss(w, alpha, problem.inner_data),
        lambda w, alpha: problem.outer_value(w, alpha, problem.outer_data),
    )


def test_a_hypergradient_is_that_of_jaxopt():
    """By `root_vjp` of ``dL/dw = 0`` at the exact solution."""
    reference = get_reference("logistic per-weight")
    problem, init_w, alpha = reference.problem, reference.w, reference.alpha
    inner, outer = losses_of(reference)
    w = reference.solution(alpha)
    b, direct = jax.grad(outer, argnums=(0, 1))(w, alpha)
    linear_solve = functools.partial(jaxopt.linear_solve.solve_cg, tol=1e-13)
    (indirect,) = root_vjp(jax.grad(inner), w, (alpha,), b, solve=linear_solve)
    estimate = hg.hypergradient(problem, hg.Implicit(hg.Newton()))(init_w, alpha)
    assert error(estimate.hypergradient, direct + indirect) < 1e-9
    solution_fn = hg.argmin(problem.inner_loss, hg.LBFGS())
    value = lambda alpha: outer(solution_fn(init_w, alpha, problem.inner_data), alpha)
    assert error(jax.jit(jax.grad(value))(alpha), direct + indirect) < 1e-9


def test_early_stop_is_wrong_in_jaxopt_and_untrusted_here():
    """After five steps both return the same number, off by more than 10%."""
    reference = get_reference("ridge scalar")
    inner, outer = losses_of(reference)
    settings = {"stepsize": 0.05, "acceleration": False, "maxiter": 5, "tol": 0.0}
    solver = jaxopt.GradientDescent(inner, **settings)
    value = lambda alpha: outer(solver.run(reference.w, alpha).params, alpha)
    jaxopt_gradient = jax.grad(value)(reference.alpha)
    estimator = hg.Implicit(hg.from_jaxopt(solver))
    gradient_fn = hg.hypergradient(reference.problem, estimator)
    estimate = gradient_fn(reference.w, reference.alpha)
    assert error(estimate.hypergradient, jaxopt_gradient) < 1e-4
    assert error(jaxopt_gradient, reference.exact(reference.alpha)) > 0.1
    assert not estimate.trusted


# Cost.


def count_evaluations(solver):
    """Returns the statistics of a solve and how often it evaluated the loss."""
    calls = []

    def loss(w, alpha, batch):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sum((1 - w[:-1]) ** 2) + 9 * jnp.sum((w[1:] - w[:-1] ** 2) ** 2)

    w = jnp.array([-1.2, 1.0, 0.5])
    _, stats = jax.block_until_ready(solver.solve(loss, w, None, None, KEY))
    jax.effects_barrier()
    return {name: float(count) for name, count in stats.items()}, len(calls)


@pytest.mark.parametrize("name", ["bfgs", "ncg", "gd"])
def test_optimistix_evaluates_one_gradient_per_step(name):
    solver = (
        optx.GradientDescent(1e-3, 1e-6, 1e-6) if name == "gd" else OPTIMISTIX[name]
    )
    stats, num_calls = count_evaluations(hg.from_optimistix(solver))
    assert stats["num_grads"] == stats["num_steps"] == num_calls
    assert stats["num_values"] == stats["num_hvps"] == 0


def test_the_counts_of_jaxopt_are_reported():
    stats, _ = count_evaluations(hg.from_jaxopt(RUNS["lbfgs"]))
    assert stats["num_grads"] > stats["num_steps"] > 0
    assert stats["num_values"] == 0
    stats, _ = count_evaluations(hg.from_jaxopt(RUNS["polyak"]))
    assert (stats["num_grads"], stats["num_values"]) == (stats["num_steps"], 1)


def test_solvers_without_counts_report_their_steps():
    """A line search makes at least one value per step."""
    stats, num_calls = count_evaluations(hg.from_jaxopt(RUNS["gd search"]))
    assert stats["num_grads"] == stats["num_values"] == stats["num_steps"]
    assert stats["num_grads"] + stats["num_values"] <= num_calls
    stats, _ = count_evaluations(hg.from_jaxopt(RUNS["optax lbfgs"]))
    assert (stats["num_grads"], stats["num_values"]) == (stats["num_steps"], 0)


def test_equal_solvers_share_a_program():
    """A jaxopt solver is compared by identity, an optimistix solver by value."""
    num_traces = 0

    @eqx.filter_jit
    def run(solver, alpha):
        nonlocal num_traces
        num_traces += 1
        return solver.solve(scalar_loss, jnp.zeros(()), alpha, None, KEY)[0]

    for alpha in (0.1, 0.2):
        run(hg.from_jaxopt(RUNS["lbfgs"]), jnp.asarray(alpha))
    assert num_traces == 1
    for rate in (0.3, 0.6):
        minimizer = optx.GradientDescent(rate, 1e-10, 1e-10)
        run(hg.from_optimistix(minimizer), jnp.asarray(0.8))
    assert num_traces == 2


# Rejected solvers.


def residuals(w):
    return w


projection = lambda w, hyperparams: w
lasso = jaxopt.prox.prox_lasso
INVALID_JAXOPT = {
    "ProjectedGradient": lambda: jaxopt.ProjectedGradient(unused_loss, projection),
    "ProximalGradient": lambda: jaxopt.ProximalGradient(unused_loss, lasso),
    "BlockCoordinateDescent": lambda: jaxopt.BlockCoordinateDescent(
        jaxopt.objective.least_squares, lasso
    ),
    "MirrorDescent": lambda: jaxopt.MirrorDescent(unused_loss, projection, 0.1),
    "LBFGSB": lambda: jaxopt.LBFGSB(unused_loss),
    "ScipyBoundedMinimize": lambda: jaxopt.ScipyBoundedMinimize(fun=unused_loss),
    "ScipyMinimize": lambda: jaxopt.ScipyMinimize(fun=unused_loss),
    "OSQP": lambda: jaxopt.OSQP(),
    "GaussNewton": lambda: jaxopt.GaussNewton(residuals),
    "LevenbergMarquardt": lambda: jaxopt.LevenbergMarquardt(residuals),
    "Bisection": lambda: jaxopt.Bisection(residuals, 0.0, 1.0),
    "Broyden": lambda: jaxopt.Broyden(residuals),
    "FixedPointIteration": lambda: jaxopt.FixedPointIteration(residuals),
    "AndersonWrapper": lambda: jaxopt.AndersonWrapper(LOOPS["gd"]),
    "BacktrackingLineSearch": lambda: jaxopt.BacktrackingLineSearch(unused_loss),
    "has_aux": lambda: jaxopt.LBFGS(unused_loss, has_aux=True),
    "value_and_grad": lambda: jaxopt.BFGS(unused_loss, value_and_grad=True),
    "prox": lambda: jaxopt.GradientDescent(unused_loss, lasso, stepsize=0.1),
    "pre_update": lambda: jaxopt.OptaxSolver(
        unused_loss, optax.sgd(0.1), pre_update=lambda *args: args[:2]
    ),
    "line search": lambda: jaxopt.OptaxSolver(unused_loss, optax.lbfgs()),
    "class": lambda: jaxopt.LBFGS,
    "minimizers.*LBFGS": lambda: OPTIMISTIX["lbfgs"],
    "minimizers.*function": lambda: unused_loss,
}


@pytest.mark.parametrize("name", INVALID_JAXOPT)
def test_a_jaxopt_solver_of_another_problem_is_an_error(name):
    """The condition ``dL/dw = 0`` would not hold at its solution."""
    with pytest.raises(TypeError, match=f"solver.*{name}"):
        hg.from_jaxopt(INVALID_JAXOPT[name]())


def test_a_subclass_is_treated_like_its_base():
    class MyLBFGS(jaxopt.LBFGS):
        pass

    class MyProjectedGradient(jaxopt.ProjectedGradient):
        pass

    assert not hg.from_jaxopt(MyLBFGS(unused_loss)).differentiable
    with pytest.raises(TypeError, match="ProjectedGradient"):
        hg.from_jaxopt(MyProjectedGradient(unused_loss, projection))


INVALID_OPTIMISTIX = {
    "LevenbergMarquardt": optx.LevenbergMarquardt(1e-6, 1e-6),
    "Newton": optx.Newton(1e-6, 1e-6),
    "FixedPointIteration": optx.FixedPointIteration(1e-6, 1e-6),
    "class BFGS": optx.BFGS,
    "GoldenSearch": optx.GoldenSearch(1e-6, 1e-6),
    "GoldenSearch, ": optx.BestSoFarMinimiser(optx.GoldenSearch(1e-6, 1e-6)),
    "NelderMead": optx.NelderMead(1e-6, 1e-6),
    "got BFGS": RUNS["bfgs"],
}


@pytest.mark.parametrize("name", INVALID_OPTIMISTIX)
def test_an_optimistix_solver_of_another_problem_is_an_error(name):
    with pytest.raises(TypeError, match=f"solver.*{name}"):
        hg.from_optimistix(INVALID_OPTIMISTIX[name])


def test_an_invalid_number_of_steps_is_an_error():
    with pytest.raises(ValueError, match="maxiter"):
        hg.from_jaxopt(jaxopt.LBFGS(unused_loss, maxiter=10.0))
    with pytest.raises(ValueError, match="max_steps"):
        hg.from_optimistix(OPTIMISTIX["bfgs"], max_steps=0)


@pytest.mark.parametrize("name", ["jaxopt lbfgs", "jaxopt gd"])
def test_jaxopt_requires_a_single_dtype(name):
    w = {"slope": jnp.zeros(3, jnp.float32), "offset": jnp.zeros(())}
    with pytest.raises(ValueError, match="w must"):
        SOLVERS[name].solve(ridge, w, ALPHA, DATA, KEY)


def test_a_missing_optimistix_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optimistix", None)
    with pytest.raises(ImportError, match="optimistix"):
        hg.from_optimistix(OPTIMISTIX["bfgs"])


@pytest.mark.parametrize(
    "make",
    [
        lambda n: hg.from_jaxopt(jaxopt.BFGS(unused_loss, tol=1e-8, maxiter=n)),
        lambda n: hg.from_optimistix(optx.BFGS(1e-8, 1e-8), max_steps=n),
    ],
    ids=["jaxopt", "optimistix"],
)
@pytest.mark.parametrize(("max_steps", "converged"), [(2, 0), (100, 1)])
def test_an_adapted_solver_says_if_it_met_its_tolerance(make, max_steps, converged):
    loss = lambda w, alpha, batch: jnp.sum(jnp.cosh(w - alpha))
    _, stats = make(max_steps).solve(loss, jnp.zeros(2), jnp.ones(2), None, KEY)
    assert stats["converged"] == converged


def test_a_jaxopt_run_that_ends_at_nan_has_not_converged():
    """Its Polyak step is 0 / 0 where the loss and its gradient are 0."""
    solver = hg.from_jaxopt(jaxopt.PolyakSGD(unused_loss, max_stepsize=1.0, tol=1e-6))
    loss = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    w, stats = solve(solver, loss, jnp.ones(2), jnp.ones(2), None)
    assert np.isnan(w).all()
    assert stats["converged"] == 0
