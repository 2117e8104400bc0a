"""Tests of `Newton` and `LBFGS` against closed forms, scipy and counted calls."""

import dataclasses

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import hypergrad as hg
from benchmarks.shared.reference_problems import cast
from hypergrad.inner.stopping import has_progressed

KEY = jax.random.key(0)
RNG = np.random.default_rng(11)
DIM = 6
X, Y = RNG.normal(size=(40, DIM)), np.sign(RNG.normal(size=40))
SOLVERS = {"Newton": hg.Newton(), "LBFGS": hg.LBFGS()}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


@eqx.filter_jit
def solve(solver, loss, w, alpha):
    return solver.solve(loss, w, alpha, None, KEY)


def ridge(w, alpha, batch):
    return 0.5 * jnp.mean((X @ w - Y) ** 2) + 0.5 * jnp.exp(alpha) * jnp.sum(w**2)


def logistic(w, alpha, batch):
    x, y = X.astype(w["bias"].dtype), Y.astype(w["bias"].dtype)
    margin = y * (x @ w["weights"] + w["bias"])
    penalty = 0.5 * jnp.exp(alpha) * jnp.sum(w["weights"] ** 2)
    return jnp.mean(jax.nn.softplus(-margin)) + penalty


def rosenbrock(w, alpha, batch):
    valley = 100 * (w[1:] - alpha * w[:-1] ** 2) ** 2
    return jnp.sum(valley + (1 - w[:-1]) ** 2)


def hyperbolic(w, alpha, batch):
    return jnp.cosh(w - alpha) + 0.1 * w


def ridge_solution(alpha):
    matrix = X.T @ X / 40 + np.exp(alpha) * np.eye(DIM)
    return np.linalg.solve(matrix, X.T @ Y / 40)


def logistic_solution():
    """Returns the minimum that scipy finds for a loss written in NumPy."""

    def value_and_grad(w):
        margin = Y * (X @ w[:DIM] + w[DIM])
        value = np.mean(np.logaddexp(0, -margin)) + 0.5 * np.exp(-2) * w[:DIM] @ w[:DIM]
        slopes = -Y / (1 + np.exp(margin)) / 40
        return value, np.append(X.T @ slopes + np.exp(-2) * w[:DIM], slopes.sum())

    result = scipy.optimize.minimize(
        value_and_grad, np.zeros(DIM + 1), jac=True, options={"gtol": 1e-9}
    )
    return {"weights": result.x[:DIM], "bias": result.x[DIM]}


LOGISTIC_W = {"weights": np.zeros(DIM), "bias": np.zeros(())}
ROSENBROCK_W = np.full(5, -1.2)
PROBLEMS = {
    "ridge": (ridge, np.zeros(DIM), -2.0, lambda: ridge_solution(-2.0)),
    "logistic": (logistic, LOGISTIC_W, -2.0, logistic_solution),
    "rosenbrock": (rosenbrock, ROSENBROCK_W, 1.0, lambda: np.ones(5)),
    "0-d": (hyperbolic, np.array(4.0), 1.0, lambda: 1.0 - np.arcsinh(0.1)),
}


def reference_grad_norm(loss, w, alpha):
    """Returns ``max(||g||, ||H w||)``."""
    grad_fn = lambda w: jax.grad(loss)(w, alpha, None)
    grad, change = jax.jit(lambda w: jax.jvp(grad_fn, (w,), (w,)))(w)
    return max(float(optax.tree.norm(grad)), float(optax.tree.norm(change)))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float64") for name in PROBLEMS), ("logistic", "float32")],
)
@every_solver
def test_a_minimizer_reaches_the_minimum(name, dtype, solver):
    """The gradient is as small as the default tolerance promises, up to rounding."""
    loss, w, alpha, solution = PROBLEMS[name]
    w = jax.tree.map(lambda x: jnp.asarray(x, dtype), w)
    alpha = jnp.asarray(alpha, dtype)
    new_w, stats = solve(solver, loss, w, alpha)
    final_norm = optax.tree.norm(jax.jit(jax.grad(loss))(new_w, alpha, None))
    eps = float(jnp.finfo(dtype).eps)
    assert final_norm <= eps**0.75 * reference_grad_norm(loss, w, alpha) + 1e3 * eps
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(new_w))
    tolerance = 1e-6 if dtype == "float64" else 1e-2
    for actual, expected in zip(
        jax.tree.leaves(new_w), jax.tree.leaves(solution()), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)
    assert stats["num_steps"] < 100


def exponential(w, alpha, batch):
    return jnp.exp(w) - alpha * w


def test_newton_makes_the_steps_of_newtons_method():
    """For ``exp(w) - a w`` the step is ``w - 1 + a exp(-w)``; errors are squared."""
    expected, w, errors = 1.5, jnp.asarray(1.5), []
    for _ in range(4):
        expected = expected - 1 + 3.0 * np.exp(-expected)
        w, stats = solve(hg.Newton(max_steps=1), exponential, w, 3.0)
        np.testing.assert_allclose(w, expected, rtol=1e-14)
        assert stats["num_steps"] == 1
        errors.append(abs(float(w) - np.log(3.0)))
    ratios = [errors[k + 1] / errors[k] ** 2 for k in range(2)]
    np.testing.assert_allclose(ratios, 0.5, rtol=0.2)  # f''' / (2 f'')


def test_newton_is_superlinear_in_many_dimensions():
    """The tolerance ``sqrt(||g|| / G)`` gives order 3/2 (Dembo et al. 1982)."""
    scales = np.geomspace(1.0, 100.0, 20)
    loss = lambda w, alpha, batch: jnp.sum(scales * (jnp.exp(w) - w))
    init_w = jnp.full(20, 0.8)
    grad_norm = lambda w: np.linalg.norm(scales * np.expm1(w))
    first, second = (
        grad_norm(solve(hg.Newton(max_steps=k), loss, init_w, 0.0)[0])
        / grad_norm(init_w)
        for k in (5, 6)
    )
    assert first < 1e-3
    assert second <= 2 * first**1.5


def double_well(w, scale, batch):
    return scale * jnp.mean((w**2 - 1) ** 2)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@every_solver
def test_a_minimizer_leaves_negative_curvature_at_any_scale(scale, solver):
    """It starts between the wells, where the Hessian is negative definite."""
    w = jnp.asarray(np.linspace(-0.32, 0.3, 8))
    assert np.all(3 * w**2 < 1)
    new_w, _ = solve(solver, double_well, w, jnp.asarray(scale))
    np.testing.assert_allclose(np.abs(new_w), 1.0, rtol=1e-5)


def quartic(w, alpha, batch):
    return w**4 - w


@pytest.mark.parametrize("w", [1e-3, 1e-6, 0.0])
@every_solver
def test_a_minimizer_leaves_a_nearly_flat_start(w, solver):
    """The first Newton step is ``1 / (12 w^2)``, and the minimum ``4^(-1/3)``."""
    new_w, _ = solve(solver, quartic, jnp.asarray(w), 0.0)
    np.testing.assert_allclose(new_w, 4 ** (-1 / 3), rtol=1e-6)


def test_newton_passes_a_saddle():
    """From the stable side of ``x^2 - y^2 + y^4`` to a minimum at ``y^2 = 1/2``."""
    saddle = lambda w, alpha, batch: w[0] ** 2 - w[1] ** 2 + w[1] ** 4
    w, _ = solve(hg.Newton(), saddle, jnp.array([1.0, 1e-3]), 0.0)
    np.testing.assert_allclose([w[0], w[1] ** 2], [0.0, 0.5], atol=1e-6)


@every_solver
def test_a_tolerance_is_kept_and_saves_steps(solver):
    """``||g|| <= tolerance max(||g||, ||H w||)``, the latter at the start."""
    w, alpha = jnp.asarray(ROSENBROCK_W), jnp.asarray(1.0)
    coarse = eqx.tree_at(
        lambda s: s.tolerance, solver, jnp.asarray(1e-2), is_leaf=lambda x: x is None
    )
    coarse_w, coarse_stats = solve(coarse, rosenbrock, w, alpha)
    _, fine_stats = solve(solver, rosenbrock, w, alpha)
    grad_norm = jnp.linalg.norm(jax.grad(rosenbrock)(coarse_w, 1.0, None))
    assert grad_norm <= 1.01e-2 * reference_grad_norm(rosenbrock, w, alpha)
    assert coarse_stats["num_steps"] < fine_stats["num_steps"]


def test_newton_leaves_a_saddle_that_the_precision_of_the_loss_hides():
    """The first steps down change the loss by less than its rounding error in float32.

    They double the distance from the saddle, while the gradient grows. The default
    tolerance on the gradient is eps^(3/4), 6.4e-6; the curvature at w[1] = 0.1 is 0.02.
    """
    saddle = lambda w, alpha, batch: (
        1 + w[0] ** 2 / 2 - 0.005 * w[1] ** 2 + w[1] ** 4 / 4
    )
    w, stats = solve(hg.Newton(), saddle, jnp.array([1.0, 1e-3], "float32"), 0.0)
    assert stats["converged"]
    np.testing.assert_allclose(w, [0.0, 0.1], atol=6.4e-6 / 0.02)


def network(w, alpha, batch):
    x, y = X.astype(w["inner"].dtype), Y.astype(w["inner"].dtype)
    margin = y * (jnp.tanh(x @ w["inner"]) @ w["outer"])
    penalty = 0.5 * jnp.exp(alpha) * sum(jnp.sum(leaf**2) for leaf in w.values())
    return jnp.mean(jax.nn.softplus(-margin)) + penalty


@pytest.mark.parametrize("seed", range(6))
def test_lbfgs_converges_on_networks_in_single_precision(seed):
    """The loss is level for many steps before the gradient meets its tolerance.

    The gradient of the result is checked in double precision.
    """
    shapes = {"inner": (DIM, 8), "outer": (8,)}
    rng = np.random.default_rng(seed)
    w = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    alpha = np.float32(-4)
    new_w, stats = solve(hg.LBFGS(), network, cast(w, jnp.float32), alpha)
    assert stats["converged"]
    final_norm = optax.tree.norm(
        jax.grad(network)(cast(new_w, jnp.float64), alpha, None)
    )
    eps = float(jnp.finfo(jnp.float32).eps)
    tolerance = 1.1 * eps**0.75 + 10 * eps
    assert final_norm <= tolerance * reference_grad_norm(network, w, alpha)


@pytest.mark.parametrize(
    "solver",
    [*SOLVERS.values(), hg.Descent(optax.sgd(0.3, momentum=0.2), 30)],
    ids=[*SOLVERS, "Descent"],
)
@pytest.mark.parametrize(
    ("w_dtypes", "alpha_dtype"),
    [(("float32", "float64"), "float64"), (("bfloat16", "bfloat16"), "float32")],
    ids=["mixed", "bfloat16"],
)
def test_w_keeps_its_dtypes_if_alpha_is_wider(solver, w_dtypes, alpha_dtype):
    w = {"a": jnp.zeros(2, w_dtypes[0]), "b": jnp.zeros((), w_dtypes[1])}
    loss = lambda w, alpha, batch: (
        jnp.sum((w["a"] - alpha) ** 2) + (w["b"] - alpha) ** 2
    )
    new_w, _ = solve(solver, loss, w, jnp.asarray(0.5, alpha_dtype))
    assert [str(x.dtype) for x in jax.tree.leaves(new_w)] == list(w_dtypes)
    for leaf in jax.tree.leaves(new_w):
        np.testing.assert_allclose(leaf.astype(float), 0.5, rtol=2e-2)


@every_solver
def test_a_minimizer_can_be_batched(solver):
    """Starts and penalties are mapped."""
    w, alpha = RNG.normal(size=(3, DIM)), np.array([-2.0, 0.0, 2.0])
    run = lambda w, alpha: solver.solve(ridge, w, alpha, None, KEY)[0]
    expected = [ridge_solution(a) for a in alpha]
    np.testing.assert_allclose(jax.jit(jax.vmap(run))(w, alpha), expected, rtol=1e-7)


@pytest.mark.parametrize(
    ("new_value", "new_grad", "expected"),
    [(0.9, 3.0, True), (1.0, 1.0, True), (1.0, 2.0, False), (1.1, 1.0, False)],
    ids=["lower", "flatter", "unchanged", "flatter but higher"],
)
def test_progress_is_a_decrease_of_the_loss_or_of_its_gradient(
    new_value, new_grad, expected
):
    """The step starts at the value 1 and the gradient 2."""
    value, grad, new_value, new_grad = map(jnp.asarray, (1.0, 2.0, new_value, new_grad))
    assert has_progressed(value, grad, new_value, new_grad) == expected


# Units.


@eqx.filter_jit
def solve_scaled(solver, loss, factor, w, alpha):
    """Solves with the factor times the loss."""
    scaled_loss = lambda w, alpha, batch: factor * loss(w, alpha, batch)
    return solver.solve(scaled_loss, w, alpha, None, KEY)


@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [
        *(("float32", exponent) for exponent in (-100, -65, -20, 20, 65, 100)),
        *(("float64", exponent) for exponent in (-900, -40, 20, 900)),
    ],
)
@pytest.mark.parametrize("name", ["ridge", "logistic", "rosenbrock"])
@every_solver
def test_a_factor_of_the_loss_changes_no_bit_of_the_result(
    name, dtype, exponent, solver
):
    """The factor is a power of two, which changes no rounding."""
    loss, w, alpha, _ = PROBLEMS[name]
    noise = np.random.default_rng(3)
    w = jax.tree.map(lambda x: x + 0.5 * noise.normal(size=np.shape(x)), w)
    w, alpha, one = cast((w, alpha, 1.0), dtype)
    expected, expected_stats = solve_scaled(solver, loss, one, w, alpha)
    actual, stats = solve_scaled(solver, loss, one * 2.0**exponent, w, alpha)
    chex.assert_trees_all_equal(actual, expected)
    assert stats == expected_stats
    assert stats["num_steps"] > 1


@pytest.mark.parametrize("factor", [1e-30, 0.01, 1.5, 1.9, 1e30])
@every_solver
def test_a_factor_of_a_piecewise_linear_loss_changes_no_step(factor, solver):
    """Far from its minimum the curvature is zero, which gives a step no length."""
    loss = lambda w, alpha, batch: jnp.sum(optax.losses.huber_loss(w, alpha))
    w, alpha, factor = cast((np.full(2, 4.6), 1.0, factor), "float32")
    one = jnp.ones_like(factor)
    expected, expected_stats = solve_scaled(solver, loss, one, w, alpha)
    actual, stats = solve_scaled(solver, loss, factor, w, alpha)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert stats["num_steps"] == expected_stats["num_steps"] > 1
    np.testing.assert_allclose(actual, 1.0, rtol=1e-5)


@every_solver
def test_a_nearly_flat_start_hides_no_later_gradient(solver):
    """In float32 the gradient grows from 6e-26 to 0.6 before it vanishes."""
    loss = lambda w, alpha, batch: -jnp.exp(-0.5 * jnp.sum((w - alpha) ** 2))
    w, alpha = cast((np.array([11.0]), 0.0), "float32")
    w, stats = solve(solver, loss, w, alpha)
    np.testing.assert_allclose(w, 0.0, atol=1e-5)
    assert stats["num_steps"] < solver.max_steps


@pytest.mark.parametrize("factor", [1e-12, 1.0, 1e6])
@pytest.mark.parametrize("name", ["ridge", "logistic"])
@every_solver
def test_a_start_at_the_minimum_makes_no_step(name, factor, solver):
    """The gradient is rounding; neither solver may work for its digits."""
    loss, w, alpha, _ = PROBLEMS[name]
    w, alpha = jax.tree.map(jnp.asarray, w), jnp.asarray(alpha)
    w, _ = solve(hg.Newton(tolerance=1e-15), loss, w, alpha)
    _, stats = solve_scaled(solver, loss, jnp.asarray(factor), w, alpha)
    assert stats["num_steps"] == 0
    assert stats["num_grads"] == 2


@every_solver
def test_a_large_parameter_does_not_hide_the_gradient_of_others(solver):
    """In float32 a parameter of 2,000 at its minimum stands beside slow directions."""
    curvatures = np.array([1.0, 0.1, 0.01, 0.003], np.float32)

    def loss(w, alpha, batch):
        slow = 0.5 * jnp.sum(curvatures * (w["slow"] - alpha) ** 2)
        return slow + 0.5 * (w["large"] - 2000.0) ** 2

    w0 = {"slow": np.zeros(4, np.float32), "large": np.float32(2000.0)}
    w, stats = solve(solver, loss, w0, np.float32(1.0))
    assert stats["converged"] == 1
    # The tolerance of 6e-6 bounds the error by itself over the smallest curvature.
    np.testing.assert_allclose(w["slow"], 1.0, atol=6e-6 / 0.003)


@every_solver
def test_a_warm_start_makes_fewer_steps(solver):
    """Its tolerance is not relative to its own small gradient."""
    loss, w, alpha, _ = PROBLEMS["logistic"]
    w, alpha = jax.tree.map(jnp.asarray, w), jnp.asarray(alpha)
    solution, cold = solve(solver, loss, w, alpha)
    nearby = jax.tree.map(lambda x: x * (1 + 1e-5), solution)
    _, warm = solve(solver, loss, nearby, alpha)
    assert warm["num_steps"] < cold["num_steps"]


@every_solver
def test_a_solve_states_whether_it_met_its_tolerance(solver):
    """Too few steps, and a loss whose rounding hides the tolerance, do not."""
    w, alpha = jnp.asarray(ROSENBROCK_W), jnp.asarray(1.0)
    _, stats = solve(solver, rosenbrock, w, alpha)
    assert stats["converged"] == 1
    early = dataclasses.replace(solver, max_steps=2)
    _, stats = solve(early, rosenbrock, w, alpha)
    assert stats["converged"] == 0
    # A constant of 1e12 hides the decrease of the loss.
    offset = lambda w, alpha, batch: 1e12 + rosenbrock(w, alpha, batch)
    new_w, stats = solve(solver, offset, w, alpha)
    grad_norm = np.linalg.norm(jax.grad(rosenbrock)(new_w, alpha, None))
    tol = np.finfo(float).eps ** 0.75 * reference_grad_norm(rosenbrock, w, alpha)
    assert (stats["converged"] == 1) == (grad_norm <= tol)
    not_a_number = lambda w, alpha, batch: jnp.sum(w) * jnp.nan
    assert solve(solver, not_a_number, w, alpha)[1]["converged"] == 0


@every_solver
@pytest.mark.parametrize("other_dtype", ["bfloat16", "float32"])
def test_a_solve_in_bfloat16_converges_to_its_precision(other_dtype, solver):
    """The default tolerance is that of the coarsest dtype of ``w``."""
    w = {"a": jnp.zeros(3, "bfloat16"), "b": jnp.zeros(3, other_dtype)}
    target = jnp.array([0.3, 0.7, 1.9], "float32")
    curvature = jnp.array([1.0, 2.0, 5.0], "float32")
    loss = lambda w, alpha, batch: sum(
        jnp.sum(curvature * (leaf.astype("float32") - target) ** 2)
        for leaf in jax.tree.leaves(w)
    )
    new_w, stats = solve(solver, loss, w, None)
    tol = float(jnp.finfo("bfloat16").eps) ** 0.75
    ratio = optax.tree.norm(jax.grad(loss)(new_w, None, None)) / optax.tree.norm(
        jax.grad(loss)(w, None, None)
    )
    assert ratio <= tol
    assert stats["converged"] == 1


@every_solver
def test_a_point_without_a_finite_gradient_is_not_converged(solver):
    """``sqrt(w^2)`` has the derivative 0 / 0 at its minimum, which a step may reach."""
    root = lambda w, alpha, batch: jnp.sqrt(w**2)
    _, stats = solve(solver, root, jnp.asarray(1.0), None)
    assert stats["converged"] == 0


# The cost of a solve.


def count_calls(loss):
    """Returns the loss, and the numbers of its evaluated values and derivatives.

    The derivative rules of an identity report each evaluation to the host.
    """
    calls = {"values": 0, "grads": 0, "hvps": 0}

    def report(name):
        calls[name] += 1

    @jax.custom_jvp
    def mark_hvp(x):
        return x

    @mark_hvp.defjvp
    def report_hvp(primals, tangents):
        jax.debug.callback(lambda: report("hvps"))
        return primals[0], tangents[0]

    @jax.custom_jvp
    def mark(x):
        jax.debug.callback(lambda: report("values"))
        return x

    @mark.defjvp
    def report_grad(primals, tangents):
        jax.debug.callback(lambda: report("grads"))
        return mark_hvp(primals[0]), tangents[0]

    return lambda w, alpha, batch: mark(loss(w, alpha, batch)), calls


@pytest.mark.parametrize(
    "solver",
    [*SOLVERS.values(), hg.Descent(optax.adam(0.01), 9)],
    ids=[*SOLVERS, "Descent"],
)
def test_the_counted_cost_is_what_was_evaluated(solver):
    loss, calls = count_calls(rosenbrock)
    _, stats = jax.block_until_ready(
        solve(solver, loss, jnp.asarray(ROSENBROCK_W), jnp.asarray(1.0))
    )
    jax.effects_barrier()
    assert stats["num_hvps"] == calls["hvps"]
    # A product also evaluates the gradient that it differentiates.
    assert stats["num_grads"] == calls["grads"] - calls["hvps"]
    assert stats["num_values"] == calls["values"]


def test_a_newton_step_of_full_length_costs_one_gradient():
    """The loss is convex, and no step from this start is too long."""
    w = jax.tree.map(jnp.asarray, LOGISTIC_W)
    _, stats = solve(hg.Newton(), logistic, w, jnp.asarray(-2.0))
    assert stats["num_steps"] >= 3
    assert stats["num_grads"] == stats["num_steps"] + 1
    assert stats["num_values"] == 0
