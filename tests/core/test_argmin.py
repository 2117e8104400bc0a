"""Derivatives of `hg.argmin`, of every kind and order, against formulas."""

import chex
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from jax import lax

import hypergrad as hg
from benchmarks.shared.reference_problems import (
    cast,
    ridge_outer,
    ridge_penalty,
)
from hypergrad.extend import without_derivative
from tests.estimator_cases import RIDGE, RIDGE_DATA, ridge_solution

(DATA, VAL), ALPHA, W0 = RIDGE_DATA, RIDGE.alpha, jnp.zeros(6)


def outer_value(w, val=VAL):
    """Curved in ``w``, so that second derivatives do not come from squares only."""
    return ridge_outer(w, None, val) + jnp.sum(jnp.sin(w))


newton_argmin = hg.argmin(ridge_penalty, hg.Newton())
formula_argmin = hg.argmin(ridge_penalty, hg.ClosedForm(ridge_solution), lx.LU())
exact_solution = lambda alpha: ridge_solution(alpha, DATA)
exact_value = lambda alpha: outer_value(exact_solution(alpha))

DERIVATIVES = {
    "grad": jax.grad,
    "jacfwd": jax.jacfwd,
    "jacrev": jax.jacrev,
    "forward over reverse": jax.hessian,
    "reverse over reverse": lambda f: jax.jacrev(jax.jacrev(f)),
    "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(f)),
    "reverse over forward": lambda f: jax.jacrev(jax.jacfwd(f)),
}


def assert_close(actual, expected, rtol=1e-9):
    """Compares trees whose small entries are sums of large ones."""
    size = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_equal_shapes(actual, expected)
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=rtol * size)


def rate_of_alpha(alpha):
    return optax.sgd(RIDGE.step / (1 + 1e-3 * alpha[0] ** 2))


@pytest.mark.parametrize(
    ("solver", "linear_solver"),
    [
        pytest.param(hg.Newton(), hg.NystromCG(rank=2), id="Newton, NystromCG"),
        pytest.param(hg.LBFGS(), lx.GMRES(rtol=1e-12, atol=1e-12), id="LBFGS, GMRES"),
        pytest.param(hg.Descent(rate_of_alpha, 400), None, id="rate of alpha, CG"),
        pytest.param(hg.ClosedForm(ridge_solution), lx.LU(), id="formula, LU"),
    ],
)
def test_gradient_is_exact_with_every_solver(solver, linear_solver):
    """A solver that itself depends on alpha or the batch is not differentiated."""
    solution_fn = hg.argmin(ridge_penalty, solver, linear_solver)
    value = lambda alpha: outer_value(solution_fn(W0, alpha, DATA))
    assert_close(jax.jit(jax.grad(value))(ALPHA), jax.grad(exact_value)(ALPHA))


@pytest.mark.parametrize(
    ("kind", "solution_fn"),
    [
        *(pytest.param(kind, formula_argmin, id=kind) for kind in DERIVATIVES),
        pytest.param("forward over reverse", newton_argmin, id="Newton, CG"),
    ],
)
def test_every_mode_of_differentiation(kind, solution_fn):
    """First and second derivatives of the outer value of ridge regression."""
    derivative = DERIVATIVES[kind]
    value = lambda alpha: outer_value(solution_fn(W0, alpha, DATA))
    assert_close(jax.jit(derivative(value))(ALPHA), derivative(exact_value)(ALPHA))


def test_derivatives_of_order_up_to_four():
    """``cosh(w) - alpha w`` has the minimum ``arcsinh(alpha)``."""
    solver = hg.ClosedForm(lambda alpha, batch: jnp.arcsinh(alpha))
    loss = lambda w, alpha, batch: jnp.cosh(w) - alpha * w
    solution_fn = hg.argmin(loss, solver, lx.LU())
    f, exact = lambda alpha: solution_fn(0.0, alpha), jnp.arcsinh
    alpha = jnp.array(0.7)
    for order in range(5):
        np.testing.assert_allclose(jax.jit(f)(alpha), exact(alpha), rtol=1e-9)
        f, exact = jax.jacfwd(f) if order % 2 else jax.grad(f), jax.grad(exact)


def test_jit_and_vmap_change_nothing():
    """Without ``jit``, and batched over alphas and over batches of data."""
    value = lambda alpha, batch: outer_value(formula_argmin(W0, alpha, batch))
    gradient = jax.jit(jax.grad(value))
    assert_close(jax.grad(value)(ALPHA, DATA), gradient(ALPHA, DATA))
    alphas = jnp.stack([ALPHA, 0.5 * ALPHA, ALPHA - 1])
    batches = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x, 0.9 * x]), DATA)
    batched = jax.jit(jax.vmap(gradient))(alphas, batches)
    for i in range(3):
        batch = jax.tree.map(lambda x, i=i: x[i], batches)
        assert_close(batched[i], gradient(alphas[i], batch))


# Arguments that are, or are not, differentiated.


def test_starting_point_has_no_derivative():
    """The derivative by ``w0`` is exactly zero, also if ``alpha`` is the same array."""
    f = lambda w0, alpha: outer_value(formula_argmin(w0, alpha, DATA))
    w0 = jnp.linspace(-1, 1, 6)
    assert not np.any(jax.jit(jax.jacfwd(f))(w0, ALPHA))
    by_w0, by_alpha = jax.jit(jax.grad(f, argnums=(0, 1)))(w0, ALPHA)
    assert not np.any(by_w0)
    expected = jax.grad(exact_value)(ALPHA)
    assert_close(by_alpha, expected)
    assert_close(jax.jit(jax.grad(lambda x: f(x, x)))(ALPHA), expected)


def grouped_loss(w, alpha, batch):
    """Integer groups in the batch choose the example weight."""
    residual = batch["x"] @ w - batch["y"]
    weights = alpha["weights"][batch["group"]]
    penalty = jnp.sum(jnp.exp(alpha["penalty"]) * w**2)
    return 0.5 * jnp.mean(weights * residual**2) + 0.5 * penalty


def grouped_solution(alpha, batch):
    x, y = batch["x"], batch["y"]
    weights = alpha["weights"][batch["group"]]
    H = (x.T * weights[None]) @ x / len(y) + jnp.diag(jnp.exp(alpha["penalty"]))
    return jnp.linalg.solve(H, x.T @ (weights * y) / len(y))


GROUPED_DATA = DATA | {"group": jnp.arange(40) % 3}
GROUPED_ALPHA = {"weights": jnp.array([0.5, 1.0, 2.0]), "penalty": ALPHA}


def test_batch_is_differentiated_next_to_integer_labels():
    """Float leaves have the derivative of the formula, integer leaves float0."""
    solution_fn = hg.argmin(grouped_loss, hg.ClosedForm(grouped_solution))
    value = lambda batch: outer_value(solution_fn(W0, GROUPED_ALPHA, batch))
    exact = lambda batch: outer_value(grouped_solution(GROUPED_ALPHA, batch))

    def gradient(f):
        def by_floats(batch):
            by_leaf = jax.grad(f, allow_int=True)(batch)
            assert by_leaf.pop("group").dtype == jax.dtypes.float0
            return by_leaf

        return jax.jit(by_floats)(GROUPED_DATA)

    assert_close(gradient(value), gradient(exact))


def test_integer_leaf_of_alpha_is_a_constant():
    """An index in alpha has no derivative; the table that it reads has one."""
    loss = lambda w, alpha, batch: jnp.sum((w - alpha["table"][alpha["index"]]) ** 2)
    solution_fn = hg.argmin(loss, hg.Newton())

    def value(table):
        w = solution_fn(jnp.zeros(2), {"table": table, "index": jnp.array([2, 0])})
        return w @ jnp.array([1.0, 10.0])

    gradient = jax.jit(jax.grad(value))(jnp.arange(3.0))
    np.testing.assert_allclose(gradient, [10.0, 0.0, 1.0], rtol=1e-9)


def test_batch_with_a_random_key():
    """The solution is that for the noise that the key determines."""
    key = jax.random.key(7)

    def keyed_loss(w, alpha, batch):
        data, key = batch
        noise = jax.random.normal(key, data["y"].shape)
        return ridge_penalty(w, alpha, data | {"y": data["y"] + noise})

    noisy = DATA | {"y": DATA["y"] + jax.random.normal(key, DATA["y"].shape)}
    solution_fn = hg.argmin(keyed_loss, hg.Newton())
    value = lambda alpha: outer_value(solution_fn(W0, alpha, (DATA, key)))
    expected = jax.grad(lambda alpha: outer_value(ridge_solution(alpha, noisy)))(ALPHA)
    assert_close(jax.jit(jax.grad(value))(ALPHA), expected)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["bare", "jit"])
def test_values_that_the_loss_closes_over_are_differentiated(wrap):
    """The derivative by a factor of the penalty that is no argument of the loss."""

    def value(factor):
        loss = lambda w, alpha, batch: ridge_penalty(w, alpha * factor, batch)
        return outer_value(hg.argmin(loss, hg.Newton())(W0, ALPHA, DATA)) * factor

    exact = lambda factor: exact_value(ALPHA * factor) * factor
    factor = jnp.array(0.8)
    assert_close(wrap(jax.grad(value))(factor), jax.grad(exact)(factor))


def test_closed_over_values_are_batched_by_vmap():
    """Floats and integers that the loss closes over, against the formula."""

    def penalized_alpha(factor):
        return GROUPED_ALPHA | {"penalty": ALPHA * factor}

    def value(factor, group):
        batch = DATA | {"group": group}
        loss = lambda w, alpha, _: grouped_loss(w, penalized_alpha(factor), batch)
        return outer_value(hg.argmin(loss, hg.Newton())(W0, ALPHA))

    def exact(factor, group):
        batch = DATA | {"group": group}
        return outer_value(grouped_solution(penalized_alpha(factor), batch))

    factors = jnp.array([0.5, 1.0, 1.5])
    groups = jnp.stack([(jnp.arange(40) + i) % 3 for i in range(3)])
    batched = lambda f: jax.jit(jax.vmap(jax.grad(f)))(factors, groups)
    assert_close(batched(value), batched(exact))


# Structures.


@pytest.mark.parametrize("kind", ["grad", "jacfwd"])
def test_leaf_of_w_whose_gradient_does_not_depend_on_alpha(kind):
    """Weights with a target in alpha, coupled to a bias without.

    ``d2L / dbias dalpha`` is zero, as for every bias without a penalty.
    """
    loss = lambda w, alpha, batch: (
        jnp.sum((w["weights"] - jnp.exp(alpha)) ** 2)
        + jnp.sum((w["bias"] - 3) ** 2)
        + 0.5 * jnp.sum(w["bias"]) * jnp.sum(w["weights"])
    )
    w0 = {"weights": jnp.zeros(3), "bias": jnp.zeros(2)}

    def exact(alpha):
        coupling = jnp.full((3, 2), 0.5)
        H = jnp.block([[2 * jnp.eye(3), coupling], [coupling.T, 2 * jnp.eye(2)]])
        rhs = jnp.concatenate([2 * jnp.exp(alpha), jnp.full(2, 6.0)])
        return jnp.sum(jnp.sin(jnp.linalg.solve(H, rhs)))

    solution_fn = hg.argmin(loss, hg.Newton())

    def value(alpha):
        w = solution_fn(w0, alpha)
        return jnp.sum(jnp.sin(w["weights"])) + jnp.sum(jnp.sin(w["bias"]))

    alpha, derivative = jnp.array([0.1, -0.2, 0.3]), DERIVATIVES[kind]
    assert_close(jax.jit(derivative(value))(alpha), derivative(exact)(alpha))


def test_argmin_nests_in_another():
    """``z* = A w`` inside ``w* = (I + A'A)^-1 alpha``; `hg.Implicit` agrees."""
    A = jnp.array([[1.0, 0.5], [-0.3, 2.0]])
    z_loss = lambda z, w, batch: 0.5 * jnp.sum((z - A @ w) ** 2)
    z_solver = hg.ClosedForm(lambda w, batch: A @ w)
    z_star = lambda w: hg.argmin(z_loss, z_solver)(jnp.zeros(2), w)
    inner = lambda w, alpha, batch: (
        0.5 * (jnp.sum((w - alpha) ** 2) + jnp.sum(z_star(w) ** 2))
    )
    outer = lambda w, alpha, batch: jnp.sum(jnp.sin(z_star(w)))
    w_star = lambda alpha: jnp.linalg.solve(jnp.eye(2) + A.T @ A, alpha)
    exact = lambda alpha: jnp.sum(jnp.sin(A @ w_star(alpha)))
    alpha = jnp.array([0.7, -1.2])
    expected = jax.grad(exact)(alpha)

    solver = hg.ClosedForm(lambda alpha, batch: w_star(alpha))
    gradient_fn = hg.hypergradient(hg.Bilevel(inner, outer), hg.Implicit(solver))
    estimate = gradient_fn(jnp.zeros(2), alpha)
    assert_close(estimate.hypergradient, expected)
    assert estimate.trusted
    solution_fn = hg.argmin(inner, solver)
    value = lambda alpha: outer(solution_fn(jnp.zeros(2), alpha), alpha, None)
    assert_close(jax.jit(jax.grad(value))(alpha), expected)


STAGED = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, length=1)[0],
}


@pytest.mark.parametrize("stage", STAGED.values(), ids=STAGED)
def test_the_key_of_the_solver_outlives_a_trace(stage):
    """`Descent` splits its key, which is made inside of the trace."""
    loss = lambda w, alpha, batch: jnp.sum((w - jnp.exp(alpha)) ** 2)
    f = stage(
        lambda alpha: hg.argmin(loss, hg.Descent(optax.sgd(0.3), 100))(0.0, alpha)
    )
    np.testing.assert_allclose(jax.grad(f)(0.1), np.exp(0.1), rtol=1e-6)


@pytest.mark.parametrize("stage", [jax.jit, jax.checkpoint])
@pytest.mark.parametrize(
    ("make_solvers", "setting"),
    [
        (lambda rate: (hg.Descent(optax.sgd(rate), 100),), 0.3),
        (lambda tol: (hg.Newton(tolerance=tol),), 1e-9),
        (lambda rtol: (hg.Newton(), hg.MINRES(rtol=rtol)), 1e-9),
    ],
    ids=["rate", "tolerance", "tolerance of the linear solver"],
)
def test_numbers_of_the_solvers_may_be_traced(stage, make_solvers, setting):
    loss = lambda w, alpha, batch: jnp.sum((w - jnp.exp(alpha)) ** 2)

    @stage
    def f(alpha, setting):
        return hg.argmin(loss, *make_solvers(setting))(0.0, alpha)

    np.testing.assert_allclose(jax.grad(f)(0.1, setting), np.exp(0.1), rtol=1e-6)


@pytest.mark.parametrize("stage", [jax.jit, jax.checkpoint])
def test_integers_that_the_loss_closes_over_may_be_traced(stage):
    """The derivative is that of the loss with labels that are constants."""

    def solve(alpha, labels):
        def loss(w, alpha, batch):
            logits = jnp.eye(6, 4) @ w
            cross_entropy = optax.softmax_cross_entropy_with_integer_labels
            penalty = jnp.exp(alpha) * jnp.sum(w**2)
            return cross_entropy(logits, labels).mean() + penalty

        w = hg.argmin(loss, hg.Newton())(jnp.zeros((4, 3)), alpha)
        return jnp.sum(w**2)

    labels = jnp.arange(6) % 3
    expected = jax.grad(lambda alpha: solve(alpha, labels))(0.1)
    actual = jax.grad(lambda alpha: stage(solve)(alpha, labels))(0.1)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert expected != 0


def test_inside_scan_and_checkpoint():
    """Ten outer steps, differentiated by their starting point."""

    def run(solve, alpha):
        def step(alpha, _):
            w = solve(alpha)
            return alpha - 0.3 * w * jnp.sum(w), outer_value(w)

        return jnp.sum(jax.lax.scan(jax.checkpoint(step), alpha, length=10)[1])

    value = lambda alpha: run(lambda a: formula_argmin(W0, a, DATA), alpha)
    exact = lambda alpha: run(exact_solution, alpha)
    assert_close(jax.jit(jax.grad(value))(ALPHA), jax.grad(exact)(ALPHA))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("solver", [hg.LBFGS(), hg.Newton()], ids=["LBFGS", "Newton"])
def test_low_precision(solver, dtype):
    """``w*`` and its derivative in the dtype of ``w``, under x64."""
    loss = lambda w, alpha, batch: jnp.sum(jnp.cosh(w - jnp.sin(alpha)))
    solution_fn = hg.argmin(loss, solver)
    w0, alpha = jnp.zeros(2, dtype), jnp.asarray([0.5, 1.0], dtype)
    # A line search on the rounded loss finds w to the root of the machine epsilon.
    tolerance = {"bfloat16": 0.2, "float16": 0.1, "float32": 1e-3}[dtype]
    w, jacobian = jax.jit(
        lambda alpha: (solution_fn(w0, alpha), jax.jacrev(solution_fn, 1)(w0, alpha))
    )(alpha)
    assert w.dtype == jacobian.dtype == dtype
    exact = np.array([0.5, 1.0])
    np.testing.assert_allclose(w.astype(float), np.sin(exact), rtol=tolerance)
    np.testing.assert_allclose(
        jacobian.astype(float), np.diag(np.cos(exact)), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("exponent", [-90, -65, 65, 100])
@pytest.mark.parametrize("solver", [hg.LBFGS(), hg.Newton()], ids=["LBFGS", "Newton"])
def test_a_factor_of_the_loss_changes_no_bit(solver, exponent):
    """Neither of the solution nor of its derivative, in float32."""

    @jax.jit
    def differentiate(factor):
        loss = lambda w, alpha, batch: factor * ridge_penalty(w, alpha, batch)
        w0, alpha, batch = cast((W0, ALPHA, DATA), jnp.float32)
        solution_fn = lambda alpha: hg.argmin(loss, solver)(w0, alpha, batch)
        return solution_fn(alpha), jax.jacrev(solution_fn)(alpha)

    one = jnp.ones((), jnp.float32)
    w, jacobian = differentiate(one)
    chex.assert_trees_all_equal(differentiate(one * 2.0**exponent), (w, jacobian))
    exact = jax.jacrev(exact_solution)(ALPHA)
    assert_close(jacobian.astype(float), exact, rtol=1e-4)


# Options and errors.


def test_linear_solver_is_used():
    """`hg.Identity` replaces ``H`` by 1, so that ``dw* = -J``."""
    solver = hg.ClosedForm(ridge_solution)
    solution_fn = hg.argmin(ridge_penalty, solver, hg.Identity())
    actual = jax.jacrev(lambda alpha: solution_fn(W0, alpha, DATA))(ALPHA)
    assert_close(actual, -jnp.diag(jnp.exp(ALPHA) * exact_solution(ALPHA)))


class RandomSolver:
    """Returns a random ``w``."""

    differentiable = False

    def solve(self, inner_loss, w, alpha, data, key):
        return jax.random.normal(key, w.shape, w.dtype), {}


def test_key_is_passed_to_the_solver():
    """The default key is ``jax.random.key(0)``."""
    solution_fn = hg.argmin(ridge_penalty, RandomSolver())
    run = lambda seed: solution_fn(W0, ALPHA, DATA, jax.random.key(seed))
    chex.assert_trees_all_equal(run(1), run(1))
    chex.assert_trees_all_equal(run(0), solution_fn(W0, ALPHA, DATA))
    assert not jnp.any(run(1) == run(2))


def test_invalid_calls_are_errors():
    """Batches, and a solution of another structure."""
    with pytest.raises(TypeError, match="batch"):
        newton_argmin(W0, ALPHA, hg.Batches(DATA))
    solver = hg.ClosedForm(lambda alpha, batch: (alpha, 0))
    with pytest.raises(ValueError, match="ClosedForm"):
        hg.argmin(ridge_penalty, solver)(W0, ALPHA, DATA)


# Losses and solvers without a right derivative.

LOSING_LOSSES = {
    "stop_gradient": lambda w, alpha, batch: w**2 / 2 - w * lax.stop_gradient(alpha),
    "round": lambda w, alpha, batch: (w - jnp.round(100 * alpha) / 100) ** 2 / 2,
    "sign": lambda w, alpha, batch: (w - alpha) ** 2 + 0.1 * w * jnp.sign(w),
    "gt": lambda w, alpha, batch: (w - alpha) ** 2 + jnp.where(w > 2, 1.0, 0.0),
}


@pytest.mark.parametrize("operation", LOSING_LOSSES)
def test_a_loss_that_loses_a_derivative_is_an_error(operation):
    """Also nested in a loss, where the rule of argmin would be taken at its word."""
    solution_fn = hg.argmin(LOSING_LOSSES[operation], hg.Newton())
    value = lambda alpha: solution_fn(0.0, alpha)
    for derivative in (jax.grad, jax.jacfwd, jax.hessian):
        with pytest.raises(ValueError, match=rf"inner_loss .* {operation}"):
            derivative(value)(0.7)
    outer = lambda w, alpha, batch: (value(alpha) - w - 1) ** 2
    inner = lambda w, alpha, batch: (w - alpha) ** 2
    gradient_fn = hg.hypergradient(hg.Bilevel(inner, outer), hg.Implicit(hg.Newton()))
    with pytest.raises(ValueError, match=rf"inner_loss .* {operation}"):
        gradient_fn(0.0, 0.7)


def test_a_derivative_that_is_lost_may_be_one_that_is_not_needed():
    """By labels that are compared, and by what is declared a constant."""

    def loss(w, alpha, batch):
        sign = jnp.where(batch["y"] > 0, 1.0, -1.0)
        half = without_derivative(alpha) / 2
        return jnp.sum(sign * batch["x"]) * w * alpha + w**2 / 2 + half

    batch = {"x": jnp.arange(3.0), "y": jnp.array([-1.0, 1.0, 1.0])}
    solution_fn = hg.argmin(loss, hg.Newton())
    value = lambda alpha, batch: solution_fn(0.0, alpha, batch)
    for wrap in (lambda f: f, jax.jit, jax.checkpoint):
        np.testing.assert_allclose(wrap(jax.grad(value))(0.7, batch), -3, rtol=1e-9)
    batched = jax.grad(lambda alpha: jax.vmap(value, (0, None))(alpha, batch).sum())
    np.testing.assert_allclose(batched(jnp.ones(2)), [-3, -3], rtol=1e-9)
    with pytest.raises(ValueError, match="gt"):
        jax.grad(value, argnums=1)(0.7, batch)


def test_a_count_among_leaves_that_are_not_differentiated_is_an_error():
    """The weights of a batch are constants, though the loss takes them."""

    def loss(w, alpha, batch):
        counted = jnp.where(batch["x"] * w > 0.5, batch["weights"], 0.0)
        return (w - alpha) ** 2 + jnp.sum(counted)

    batch = {"x": jnp.linspace(-1, 1, 9), "weights": jnp.ones(9)}
    solution_fn = hg.argmin(loss, hg.Newton())
    with pytest.raises(ValueError, match=r"inner_loss .* gt"):
        jax.grad(lambda alpha: solution_fn(0.0, alpha, batch))(0.3)


tilted_cosh = lambda w, alpha, batch: jnp.sum(jnp.cosh(w) - jnp.sinh(alpha) * w)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "solver",
    [
        hg.Descent(optax.sgd(0.05), 5),
        hg.LBFGS(max_steps=2),
        hg.Newton(max_steps=1),
        hg.Newton(max_steps=2),
        hg.ClosedForm(lambda alpha, batch: 0.9 * alpha),
    ],
    ids=["Descent", "LBFGS", "Newton(1)", "Newton(2)", "wrong formula"],
)
def test_a_solver_that_has_not_converged_gives_no_derivative(solver, dtype):
    """The minimum is ``alpha``. The value stays what the solver returns."""
    solution_fn = hg.argmin(tilted_cosh, solver)
    w0, alpha = jnp.zeros((), dtype), jnp.asarray(2.0, dtype)
    assert jnp.isfinite(solution_fn(w0, alpha))
    f = lambda alpha: solution_fn(w0, alpha)
    w, by_forward_mode = jax.jvp(f, (alpha,), (jnp.ones_like(alpha),))
    assert jnp.isfinite(w)
    assert jnp.isnan(by_forward_mode)
    assert jnp.isnan(jax.jit(jax.grad(f))(alpha))
    assert jnp.isnan(jax.hessian(f)(alpha))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("start", ["cold", "warm"])
@pytest.mark.parametrize(("target", "rate"), [(0.0, 0.5), (1e-9, 0.5), (2.0, 0.02)])
def test_descent_that_has_converged_gives_a_derivative(dtype, start, target, rate):
    """From far away and from the minimum, at zero and elsewhere, in various units.

    The minimum is ``(a, 1e3 a, 0)``, whose last entry has a gradient of rounding only.
    """
    x = jnp.asarray([[1, 0, 0.1], [-1, 0, 0.1], [0, 1e-3, 0.1], [0, -1e-3, 0.1]], dtype)
    y = lambda alpha: x @ (alpha * jnp.asarray([1, 1e3, 0], dtype))

    def loss(w, alpha, batch):
        H = jnp.asarray([1, 1e6, 10], dtype)
        return jnp.sum((x @ w - y(alpha)) ** 2 * 0.25) + jnp.sum(
            (w - alpha * jnp.asarray([1, 1e3, 0], dtype)) ** 2 / H
        )

    rates = optax.GradientTransformation(
        lambda w: (),
        lambda g, state, w: (-rate * g * jnp.asarray([1, 1e6, 10], dtype), state),
    )
    solver = hg.Descent(rates, int(30 / rate))
    alpha = jnp.asarray(target, dtype)
    solution = alpha * jnp.asarray([1, 1e3, 0], dtype)
    w0 = solution if start == "warm" else jnp.ones(3, dtype)
    jacobian = jax.jit(jax.jacfwd(lambda a: hg.argmin(loss, solver)(w0, a)))(alpha)
    np.testing.assert_allclose(jacobian, [1, 1e3, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_parameter_in_other_units_does_not_hide_one_that_has_not_converged(dtype):
    """``w[0]`` is at its minimum, and its curvature is 1e16 times that of ``w[1]``."""

    def loss(w, alpha, batch):
        return 0.5 * (1e8 * (w[0] - alpha)) ** 2 + 0.5 * (w[1] - alpha) ** 2

    solve = hg.argmin(loss, hg.Descent(optax.sgd(0.0), 0))
    alpha = jnp.asarray(1.0, dtype)
    derivative_at = lambda w1: jax.jacrev(
        lambda alpha: solve(jnp.array([1.0, w1], dtype), alpha)
    )(alpha)
    np.testing.assert_allclose(derivative_at(1.0), [1.0, 1.0], rtol=1e-5)
    assert np.all(np.isnan(derivative_at(2.0)))


def test_a_series_that_diverges_gives_no_derivative():
    """With a step size of 0.8 and H = 3 its terms grow by 1.4."""
    loss = lambda w, alpha, batch: 1.5 * w**2 - alpha * w
    derivative = lambda step_size: jax.grad(
        lambda alpha: hg.argmin(loss, hg.Newton(), hg.Neumann(20, step_size=step_size))(
            jnp.zeros(()), alpha
        )
    )(1.0)
    assert jnp.isnan(derivative(0.8))
    np.testing.assert_allclose(derivative(0.3), 1 / 3, rtol=1e-6)


@pytest.mark.parametrize("solver", [hg.Newton(), hg.LBFGS(50)], ids=["Newton", "LBFGS"])
def test_an_entry_that_is_zero_up_to_rounding_has_a_derivative(solver):
    """A weight of a symmetric feature, which starts at zero and should stay there."""
    batch = jnp.array([1.0, -1.0]), jnp.array(0.3), jnp.array([0.3, 0.1 + 0.2])

    def loss(w, alpha, batch):
        x, c, y = batch
        return 0.5 * (w[0] - alpha) ** 2 + 0.5 * jnp.sum((x * w[1] + c - y) ** 2)

    solution = hg.argmin(loss, solver)
    w0, alpha = jnp.zeros(2), jnp.asarray(0.7)
    jacobian = jax.jacrev(lambda alpha: solution(w0, alpha, batch))(alpha)
    np.testing.assert_allclose(jacobian, [1.0, 0.0], atol=1e-12)
    forward = jax.jacfwd(lambda alpha: solution(w0, alpha, batch))(alpha)
    np.testing.assert_array_equal(jacobian, forward)
    closed_over = hg.argmin(lambda w, alpha, _: loss(w, alpha, batch), solver)
    forward = jax.jacfwd(lambda alpha: closed_over(w0, alpha))(alpha)
    np.testing.assert_allclose(forward, [1.0, 0.0], atol=1e-12)


def test_an_entry_far_from_zero_beside_large_data_has_none():
    """The data excuse no more than rounding: 1e-8 of an offset of 1e6 is not that."""
    loss = lambda w, alpha, batch: 0.5 * (w - (alpha - batch)) ** 2
    stopped = hg.ClosedForm(lambda alpha, batch: alpha - batch + 1e-2)
    solution = hg.argmin(loss, stopped)
    alpha, offset = jnp.asarray(1e6 + 1.0), jnp.asarray(1e6)
    derivative = jax.grad(solution, argnums=1)(jnp.zeros(()), alpha, offset)
    assert jnp.isnan(derivative)


def test_leaves_of_two_precisions_have_a_derivative():
    """The residual of the float32 leaf cannot fall to a tolerance of float64."""
    c, t = jnp.float32(0.95), jnp.float32(15938356 / 2**24)

    def loss(w, alpha, batch):
        short = alpha.astype(jnp.float32)
        quadratic = 0.5 * c * w["a"] ** 2 - short * t * w["a"]
        return quadratic + 0.5 * (w["b"] - alpha) ** 2

    solver = hg.ClosedForm(
        lambda alpha, batch: {"a": alpha.astype(jnp.float32) * (t / c), "b": alpha}
    )
    w0 = {"a": jnp.zeros((), jnp.float32), "b": jnp.zeros(())}
    solution = hg.argmin(loss, solver)
    derivative = jax.jacfwd(lambda alpha: solution(w0, alpha))(jnp.asarray(1.0))
    assert derivative["a"].dtype == jnp.float32
    np.testing.assert_allclose(derivative["a"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(derivative["b"], 1.0, rtol=1e-6)


@pytest.mark.parametrize(("num_steps", "is_exact"), [(1000, False), (8000, True)])
def test_an_early_stop_along_little_curvature_gives_no_derivative(num_steps, is_exact):
    """The gradient is 2e-4 of its scale in float32, where 9% of the derivative miss."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 1)) + 0.01 * rng.normal(size=(200, 2))
    y = np.sign(x @ [3, -2] + 0.3 * rng.normal(size=200))
    batch = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)

    def loss(w, alpha, batch):
        x, y = batch
        losses = jax.nn.softplus(-y * (x @ w))
        return jnp.mean(losses) + 0.5 * jnp.exp(alpha) * jnp.sum(w**2)

    def derivative(solver):
        solution_fn = hg.argmin(loss, solver)
        f = lambda alpha: solution_fn(jnp.zeros(2, jnp.float32), alpha, batch)
        return jax.jit(jax.jacfwd(f))(jnp.asarray(-7.0, jnp.float32))

    actual = derivative(hg.Descent(optax.sgd(2.0), num_steps))
    if is_exact:
        np.testing.assert_allclose(actual, derivative(hg.Newton()), rtol=1e-2)
    else:
        assert np.isnan(actual).all()


def test_a_number_as_a_batch():
    """Outside of `jax.jit`, where the loss has the number as a constant."""
    loss = lambda w, alpha, batch: (w - alpha * batch) ** 2
    assert hg.argmin(loss, hg.Newton())(0.0, 1.5, 2.0) == pytest.approx(3.0)


def test_a_tangent_may_be_a_number_of_python():
    """The minimum is ``exp(alpha)``, as is its derivative."""
    loss = lambda w, alpha, batch: jnp.sum((w - jnp.exp(alpha)) ** 2)
    solution = hg.argmin(loss, hg.Newton())
    fn = lambda alpha: solution(jnp.zeros(2), alpha)
    w, tangent = jax.jvp(fn, (1.3,), (1.0,))
    np.testing.assert_allclose(w, np.exp([1.3, 1.3]), rtol=1e-9)
    np.testing.assert_allclose(tangent, np.exp([1.3, 1.3]), rtol=1e-9)
