"""`Implicit` against closed forms and dense solves."""

import functools

import chex
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks.shared.reference_problems import (
    cast,
    dense,
    error,
    get_reference,
    quadratic,
)
from tests.estimator_cases import (
    GRAZZI_ERRORS,
    LINEAR_SOLVERS,
    RIDGE,
    RIDGE_DATA,
    batch_hypergradient,
    converging_descent,
    counted,
    counting_problem,
    failed_checks,
    gradient_equivalents,
    grazzi,
    quadratic_solution,
    ridge_of_five_examples,
    ridge_outer,
    ridge_penalty,
    ridge_with_few_outer_examples,
    run_estimator,
    saddle_inner,
    saddle_outer,
)

LOGISTIC = get_reference("logistic per-weight")
QUADRATIC = quadratic("30", seed=2)
QUADRATIC_FORMULA = hg.ClosedForm(quadratic_solution)


@pytest.mark.parametrize(
    ("name", "linear_solver"),
    [
        ("ridge per-example", "GMRES"),
        ("ridge per-weight", "LU"),
        ("logistic scalar", "NystromCG"),
        ("quadratic nested", "BiCGStab"),
        ("smd 1", "CG"),
        ("smd 5 tilted", "CG"),
    ],
)
def test_estimate_equals_the_closed_form(name, linear_solver):
    """Closed forms, or a dense solve where Newton's method in NumPy ends."""
    reference = get_reference(name)
    solver = converging_descent(reference, 3000 if name.startswith("smd") else 300)
    estimate = run_estimator(
        reference, hg.Implicit(solver, LINEAR_SOLVERS[linear_solver])
    )
    assert error(estimate.hypergradient, reference.exact(reference.alpha)) < 1e-9
    assert error(estimate.w, reference.solution(reference.alpha)) < 1e-9
    assert estimate.trusted
    assert estimate.reasons == ()


@pytest.mark.parametrize("structure", ["0-d", "1", "cI"])
def test_one_eigenvalue_needs_one_product(structure):
    """CG solves ``H = c I`` in one step; the final product makes two."""
    reference = quadratic(structure)
    solver = converging_descent(reference)
    linear_solver = hg.CG(preconditioner=None)
    estimator = hg.Implicit(solver, linear_solver, estimate_error=False)
    estimate = run_estimator(reference, estimator)
    assert estimate.stats["num_hvps"] <= 2
    assert error(estimate.hypergradient, reference.exact(reference.alpha)) < 1e-9


@pytest.mark.parametrize("linear_solver", [hg.CG(), hg.CG(rtol=1e-3)], ids=str)
def test_the_error_estimate_of_cg_costs_five_products(linear_solver):
    """A tolerance, which every user of CG may set, makes it no more expensive."""
    reference = quadratic("30", 0, 19.0)

    def num_hvps(estimate_error):
        estimator = hg.Implicit(
            QUADRATIC_FORMULA, linear_solver, estimate_error=estimate_error
        )
        return run_estimator(reference, estimator).stats["num_hvps"]

    assert num_hvps(True) == num_hvps(False) + 5


def test_outer_loss_without_w_has_only_the_direct_term():
    """``M = sum(alpha^2)`` is exact and trusted wherever the inner solver stops."""
    outer = lambda w, alpha, batch: jnp.sum(alpha**2)
    problem = hg.Bilevel(ridge_penalty, outer, RIDGE_DATA[0])
    estimator = hg.Implicit(hg.Descent(optax.sgd(0.3), 3))
    estimate = hg.hypergradient(problem, estimator)(RIDGE.w, RIDGE.alpha)
    chex.assert_trees_all_close(estimate.hypergradient, 2 * RIDGE.alpha, rtol=1e-14)
    assert estimate.trusted


# The linear system.


def test_damping_is_added_to_the_hessian():
    """``dM/dalpha - J'(H + damping I)^-1 b``; the residual is that of ``H``."""
    for damping in (0.0, 1e-3, 0.1, 30.0):
        estimator = hg.Implicit(QUADRATIC_FORMULA, damping=damping)
        estimate = run_estimator(QUADRATIC, estimator)
        parts = dense(QUADRATIC.problem, QUADRATIC.w, QUADRATIC.alpha, damping)
        assert error(estimate.hypergradient, parts["hypergradient"]) < 1e-9
        H, b = parts["H"], parts["b"][0]
        v = np.linalg.solve(H + damping * np.eye(30), b)
        residual = np.linalg.norm(b - H @ v) / np.linalg.norm(b)
        np.testing.assert_allclose(
            estimate.stats["adjoint_residual"], residual, rtol=1e-6, atol=1e-8
        )
        assert bool(estimate.trusted) == (residual < 0.01)


@pytest.mark.parametrize(("method", "number"), GRAZZI_ERRORS)
def test_published_errors_on_the_logistic_problem_of_grazzi(method, number):
    """Errors at T = 100 of a NumPy re-run of hypertorch's notebook, within 2%."""
    reference, exact = grazzi()
    solver = hg.Descent(optax.sgd(0.1), 100)
    estimator = {
        "CG": hg.Implicit(solver, hg.CG(max_steps=number, preconditioner=None)),
        "Neumann": hg.Implicit(solver, hg.Neumann(number, 0.1)),
        "truncated": hg.Unrolled(solver, truncation_length=number),
    }[method]
    estimate = run_estimator(reference, estimator)
    assert float(estimate.value) == pytest.approx(0.574399, rel=1e-6)
    expected = GRAZZI_ERRORS[method, number]
    assert error(estimate.hypergradient, exact) == pytest.approx(expected, rel=0.02)


# Newton steps.


def test_newton_steps_reduce_the_error():
    """After a logistic loop that stopped at 20%, each step leaves a tenth at most."""
    solver = hg.Descent(optax.sgd(LOGISTIC.step), 8)
    exact, errors = LOGISTIC.exact(LOGISTIC.alpha), []
    for num_newton_steps in (0, 1, 2):
        estimator = hg.Implicit(solver, num_newton_steps=num_newton_steps)
        estimate = run_estimator(LOGISTIC, estimator)
        errors.append(error(estimate.hypergradient, exact))
    assert errors[1] < 0.1 * errors[0]
    assert errors[2] < 0.1 * errors[1]


def distance_from_alpha(alpha, batch):
    return alpha + batch


def test_newton_step_that_increases_the_gradient_is_rejected():
    """Newton's method on log cosh diverges from w = 3 and converges from 0.5."""
    inner = lambda w, alpha, batch: jnp.log(jnp.cosh(w - alpha))
    outer = lambda w, alpha, batch: w**2
    estimator = hg.Implicit(hg.ClosedForm(distance_from_alpha), num_newton_steps=1)
    run = lambda distance: hg.hypergradient(
        hg.Bilevel(inner, outer, distance), estimator
    )(0.0, 0.0)
    assert run(3.0).w == 3.0
    assert abs(run(0.5).w) < 0.1


# Trust.


@pytest.mark.parametrize("name", ["CG", "LU", "BiCGStab"])
def test_early_stop_of_the_inner_loop_is_not_trusted(name):
    """Five steps leave an error of more than 10%, and the reason is the inner error."""
    solver = hg.Descent(optax.sgd(0.1 * RIDGE.step), 5)
    estimate = run_estimator(RIDGE, hg.Implicit(solver, LINEAR_SOLVERS[name]))
    assert error(estimate.hypergradient, RIDGE.exact(RIDGE.alpha)) > 0.1
    assert failed_checks(estimate) == {"inner_error"}


def test_small_error_of_w_near_the_outer_optimum_is_not_trusted():
    """w is off by 0.4%, but ``dM/dw = w - 1`` has the wrong sign there."""
    inner = lambda w, alpha, batch: 0.5 * (w - alpha) ** 2
    outer = lambda w, alpha, batch: 0.5 * (w - 1) ** 2
    estimator = hg.Implicit(hg.Descent(optax.sgd(0.5), 8))
    estimate = hg.hypergradient(hg.Bilevel(inner, outer), estimator)(0.0, 1.001)
    assert estimate.hypergradient < 0
    assert failed_checks(estimate) == {"inner_error"}


def test_zero_outer_gradient_does_not_hide_the_inner_error():
    """``dM/dw`` vanishes at w = 1, where the solver starts and stops; ``w* = 3``."""
    inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1.0) ** 2)
    for linear_solver in (hg.CG(), lx.LU()):
        estimator = hg.Implicit(hg.Descent(optax.sgd(0.1), 0), linear_solver)
        gradient_fn = hg.hypergradient(hg.Bilevel(inner, outer), estimator)
        estimate = gradient_fn(jnp.ones(2), jnp.full(2, 3.0))
        assert not np.any(estimate.hypergradient)
        assert not estimate.trusted


def run_at_stationary_point(spectrum, target, estimator):
    """Returns the estimate at ``w = alpha = 0``, where ``dL/dw = 0``.

    ``target`` holds the components of ``b`` along the eigenvectors.
    """
    rng, size = np.random.default_rng(0), len(spectrum)
    basis, _ = np.linalg.qr(rng.normal(size=(size, size)))
    data = {"H": basis * np.array(spectrum) @ basis.T, "t": basis @ np.array(target)}
    problem = hg.Bilevel(saddle_inner, saddle_outer, data, data)
    return hg.hypergradient(problem, estimator)(jnp.zeros(size), jnp.zeros(size))


ONE_STEP = hg.Descent(optax.sgd(0.1), 1)


@pytest.mark.parametrize(
    ("name", "target", "certify"),
    [
        # With this b the curvature along v is negative, which every solver shows.
        ("LU", [0.3, 0.3, 2.0], False),
        ("GMRES", [0.3, 0.3, 2.0], False),
        # With this b it is positive: only solvers that visit other directions find it.
        ("CG", [1.0, 1.0, 1.0], False),
        ("NystromCG", [1.0, 1.0, 1.0], False),
        ("BiCGStab", [1.0, 1.0, 1.0], True),
        ("MINRES", [1.0, 1.0, 1.0], False),
        # This b has no part along it: only the random probe of a certificate does.
        ("LU", [1.0, 1.0, 0.0], True),
    ],
)
def test_saddle_is_not_trusted(name, target, certify):
    """Spectrum (3, 1, -1) at a stationary point."""
    estimator = hg.Implicit(ONE_STEP, LINEAR_SOLVERS[name], certify=certify)
    estimate = run_at_stationary_point([3.0, 1.0, -1.0], target, estimator)
    assert estimate.stats["inner_grad_norm"] == 0
    expected = {"certificate"} if certify else {"negative_curvature"}
    if name == "NystromCG":  # an indefinite sketch may have no Cholesky factor
        expected |= {"not_finite"}
    assert failed_checks(estimate) & expected


@pytest.mark.parametrize("name", ["CG", "LU"])
def test_singular_hessian_is_not_trusted(name):
    """Spectrum (3, 1, 0), and a ``b`` outside the range of ``H``."""
    estimator = hg.Implicit(ONE_STEP, LINEAR_SOLVERS[name])
    estimate = run_at_stationary_point([3.0, 1.0, 0.0], [1.0] * 3, estimator)
    assert not estimate.trusted


@pytest.mark.parametrize(
    "linear_solver",
    [
        hg.CG(max_steps=1),
        hg.Neumann(100, 0.3),
        hg.Neumann(2, 0.1),
        hg.Neumann(2),
        hg.Nystrom(rank=3),
        hg.Identity(),
    ],
    ids=[
        *("truncated CG", "diverging Neumann", "short Neumann"),
        *("Neumann that finds its step size", "Nystrom", "Identity"),
    ],
)
def test_inaccurate_adjoint_is_not_trusted(linear_solver):
    """Spectrum [1, 10]: one CG step, a step size above 2/10, two terms, a sketch.

    At the exact argmin the adjoint is the only reason.
    """
    estimate = run_estimator(QUADRATIC, hg.Implicit(QUADRATIC_FORMULA, linear_solver))
    exact = QUADRATIC.exact(QUADRATIC.alpha)
    assert not error(estimate.hypergradient, exact) < 0.1
    assert estimate.stats["adjoint_residual"] > 0.1
    assert failed_checks(estimate) == {"adjoint_residual"}


def test_worst_of_several_losses_decides():
    """One right-hand side is solved, the other one is not."""
    inner = lambda w, alpha, batch: 0.5 * w @ (batch["h"] * w) - w @ alpha
    solver = hg.ClosedForm(lambda alpha, batch: alpha / batch["h"])
    first = lambda w, alpha, batch: w[0]
    both = lambda w, alpha, batch: jnp.sum(w)

    def run(h, losses, linear_solver):
        problem = hg.Bilevel(inner, losses, {"h": jnp.array(h)})
        gradient_fn = hg.hypergradient(problem, hg.Implicit(solver, linear_solver))
        return gradient_fn(jnp.zeros(2), jnp.ones(2))

    # One CG step solves b = e_0, but not e_0 + e_1.
    one_step = hg.CG(max_steps=1, preconditioner=None)
    for losses in ((first, both), (both, first)):
        estimate = run([1.0, 5.0], losses, one_step)
        assert estimate.stats["adjoint_residual"] > 0.1
        assert "adjoint_residual" in failed_checks(estimate)
        # The curvature is negative along e_1.
        estimate = run([1.0, -5.0], losses, hg.CG())
        assert "negative_curvature" in failed_checks(estimate)
    assert run([1.0, 5.0], (first, first), one_step).trusted


@pytest.mark.parametrize("name", ["CG", "LU", "NystromCG", "Neumann"])
def test_estimate_recovers_from_a_bad_one(name):
    """After a saddle, a flat direction or a NaN the next estimates are exact."""
    inner = lambda w, alpha, batch: (
        1.5 * w[0] ** 2 + 0.5 * alpha * w[1] ** 2 - jnp.sum(w)
    )
    outer = lambda w, alpha, batch: jnp.sum((w - 2) ** 2)
    problem = hg.Bilevel(inner, outer)
    solver = hg.ClosedForm(lambda alpha, batch: jnp.stack([1 / 3, 1 / alpha]))
    linear_solver = LINEAR_SOLVERS.get(name, hg.Neumann(60, 0.4))
    estimator = hg.Implicit(solver, linear_solver)
    step = jax.jit(functools.partial(estimator.estimate, problem))
    for bad_alpha in (-1.0, 0.0, 1e-9, jnp.nan):
        state = estimator.init(problem, jnp.zeros(2), jnp.array(1.0))
        _, state = step(state, jnp.asarray(bad_alpha), jax.random.key(0))
        for alpha in (1.0, 1.1):
            estimate, state = step(state, jnp.array(alpha), jax.random.key(0))
            exact = 2 * (1 / alpha - 2) * (-1 / alpha**2)
            np.testing.assert_allclose(estimate.hypergradient, exact, rtol=1e-8)
            assert estimate.trusted


# Precision.


@pytest.mark.parametrize(
    "make_estimator",
    [
        pytest.param(lambda x: hg.Implicit(hg.Newton(), damping=x), id="damping"),
        pytest.param(
            lambda x: hg.Implicit(hg.Newton(), hg.CG(rtol=1e-5 * x)), id="rtol"
        ),
        pytest.param(
            lambda x: hg.Implicit(hg.Newton(), hg.NystromCG(3, damping=x)),
            id="NystromCG",
        ),
    ],
)
def test_double_precision_settings_serve_single_precision(make_estimator):
    """A setting of ``jnp.logspace`` under x64 acts like the Python float."""
    problem, w, alpha = cast((RIDGE.problem, RIDGE.w, RIDGE.alpha), jnp.float32)
    swept, plain = (
        hg.hypergradient(problem, make_estimator(x))(w, alpha).hypergradient
        for x in (jnp.asarray(0.1, jnp.float64), 0.1)
    )
    assert swept.dtype == jnp.float32
    assert error(swept, plain) < 1e-5


# Batches.


def test_batch_estimates_are_those_of_single_examples():
    """Batches of one: each pair of examples occurs equally often in 400 estimates.

    ``H`` and ``J`` are those of one inner example, ``b`` that of one outer example, so
    that the mean over outer examples is the full hypergradient.
    """
    problem, reference = ridge_of_five_examples()
    solver = hg.Descent(optax.sgd(reference.step), 400)
    estimator = hg.Implicit(solver, adjoint_batch_size=1, outer_batch_size=1)
    gradient_fn = hg.hypergradient(problem, estimator)
    num_keys, num_examples = 400, reference.alpha.size
    keys = jax.random.split(jax.random.key(3), num_keys)
    run = lambda key: gradient_fn(reference.w, reference.alpha, key).hypergradient
    actual = np.asarray(jax.vmap(run)(keys))
    pairs = [(i, j) for i in range(num_examples) for j in range(num_examples)]
    expected = np.array([batch_hypergradient(reference, *pair) for pair in pairs])
    distance = np.linalg.norm(actual[:, None] - expected[None], axis=-1)
    scale = np.linalg.norm(expected, axis=-1).max()
    assert np.all(distance.min(axis=1) < 1e-9 * scale)
    counts = np.bincount(distance.argmin(axis=1), minlength=len(pairs))
    probability = 1 / len(pairs)
    standard_deviation = np.sqrt(num_keys * probability * (1 - probability))
    assert np.all(np.abs(counts - num_keys * probability) < 4 * standard_deviation)
    by_outer = [batch_hypergradient(reference, None, j) for j in range(num_examples)]
    full = np.asarray(reference.exact(reference.alpha))
    np.testing.assert_allclose(np.mean(by_outer, axis=0), full, rtol=1e-9)


# Cost.


def test_a_warm_started_adjoint_costs_fewer_products():
    """The second estimate at the same alpha begins with the solution of the first."""
    estimator = hg.Implicit(QUADRATIC_FORMULA, estimate_error=False)
    problem, alpha = QUADRATIC.problem, QUADRATIC.alpha
    state = estimator.init(problem, QUADRATIC.w, alpha)
    estimate_fn, num_products = jax.jit(estimator.estimate), []
    for seed in range(2):
        result, state = estimate_fn(problem, state, alpha, jax.random.key(seed))
        num_products.append(float(result.stats["num_hvps"]))
    assert num_products[1] < num_products[0] / 2


@pytest.mark.parametrize(
    ("batch_size", "adjoint_batch_size", "outer_batch_size"),
    [(None, None, None), (10, 8, 5)],
    ids=["full", "batches"],
)
def test_cost_of_an_estimate(batch_size, adjoint_batch_size, outer_batch_size):
    """T gradients, the products of a series, and an outer gradient."""
    estimator = hg.Implicit(
        hg.Descent(optax.sgd(0.3), 12),
        hg.Neumann(5, 0.3),
        estimate_error=False,
        adjoint_batch_size=adjoint_batch_size,
        outer_batch_size=outer_batch_size,
    )
    problem = ridge_with_few_outer_examples(batch_size)
    stats = hg.hypergradient(problem, estimator)(RIDGE.w, RIDGE.alpha).stats
    assert stats["num_grads"] == pytest.approx(12 * (batch_size or 40) / 40)
    assert stats["num_hvps"] == pytest.approx(5 * (adjoint_batch_size or 40) / 40)
    assert stats["num_outer_grads"] == pytest.approx((outer_batch_size or 20) / 20)
    assert stats["num_values"] == stats["num_outer_values"] == 0
    expected = gradient_equivalents(stats)
    assert stats["gradient_equivalents"] == pytest.approx(expected)


SEVERAL_LOSSES = (ridge_outer, ridge_penalty, ridge_outer)
RIDGE_STEPS = hg.Descent(optax.sgd(0.3), 12)


@pytest.mark.parametrize(
    ("linear_solver", "num_products"),
    [
        pytest.param(hg.Neumann(5, 0.3), 3 * 4 + 3, id="Neumann, step_size"),
        # Ten power iterations are shared by the three right-hand sides.
        pytest.param(hg.Neumann(5), 10 + 3 * 4 + 3, id="Neumann"),
        pytest.param(hg.Nystrom(4), 4 + 3, id="Nystrom"),
        pytest.param(lx.LU(), 6 + 3, id="LU"),
    ],
)
def test_products_shared_by_several_losses_count_once(linear_solver, num_products):
    """A sketch, a step size and a dense matrix serve three right-hand sides."""
    data = ridge_with_few_outer_examples(None)
    problem = hg.Bilevel(
        ridge_penalty, SEVERAL_LOSSES, data.inner_data, data.outer_data
    )
    solver = hg.Descent(optax.sgd(0.3), 12)
    estimator = hg.Implicit(solver, linear_solver, estimate_error=False)
    stats = hg.hypergradient(problem, estimator)(RIDGE.w, RIDGE.alpha).stats
    assert stats["num_hvps"] == num_products
    assert stats["num_outer_grads"] == 3


@pytest.mark.parametrize(
    "estimator",
    [
        pytest.param(hg.Implicit(RIDGE_STEPS), id="CG"),
        pytest.param(hg.Implicit(RIDGE_STEPS, estimate_error=False), id="no error"),
        pytest.param(hg.Implicit(RIDGE_STEPS, hg.Neumann(5)), id="Neumann"),
        pytest.param(hg.Implicit(RIDGE_STEPS, lx.LU()), id="LU"),
        pytest.param(hg.Implicit(RIDGE_STEPS, rtol=1e-6), id="rtol"),
    ],
)
def test_no_system_is_solved_for_a_loss_without_w(estimator):
    """Two warm estimates of three losses make the products of the only one with ``w``.

    The hypergradient of the others is their ``dM/dalpha``, and none is less trusted.
    """
    squares = lambda w, alpha, batch: jnp.sum(alpha**2)
    cubes = lambda w, alpha, batch: jnp.sum(alpha**3)
    data = ridge_with_few_outer_examples(None)

    def estimate_twice(outer_losses):
        problem = hg.Bilevel(
            ridge_penalty, outer_losses, data.inner_data, data.outer_data
        )
        state = estimator.init(problem, RIDGE.w, RIDGE.alpha)
        estimate = jax.jit(functools.partial(estimator.estimate, problem))
        _, state = estimate(state, RIDGE.alpha, jax.random.key(0))
        return estimate(state, 1.1 * RIDGE.alpha, jax.random.key(1))

    (alone, state), (joint, joint_state) = map(
        estimate_twice, (ridge_outer, (squares, ridge_outer, cubes))
    )
    assert joint.trusted == alone.trusted
    assert joint.stats["num_hvps"] == alone.stats["num_hvps"]
    assert joint.stats["num_outer_grads"] == alone.stats["num_outer_grads"] + 2
    alpha = 1.1 * RIDGE.alpha
    expected = jnp.stack([2 * alpha, alone.hypergradient, 3 * alpha**2])
    chex.assert_trees_all_close(joint.hypergradient, expected, rtol=1e-12)
    values = jnp.stack([jnp.sum(alpha**2), alone.value, jnp.sum(alpha**3)])
    chex.assert_trees_all_close(joint.value, values, rtol=1e-12)
    adjoints = jax.tree.map(lambda v: jnp.stack([0 * v, v, 0 * v]), state.adjoint)
    chex.assert_trees_all_close(joint_state.adjoint, adjoints, rtol=1e-12)


def test_losses_that_all_lack_w_cost_one_system():
    """It keeps the shapes, and its solution is zero."""
    squares = lambda w, alpha, batch: jnp.sum(alpha**2)
    estimators = hg.Implicit(RIDGE_STEPS), hg.Unrolled(RIDGE_STEPS)
    data = RIDGE.problem.inner_data, RIDGE.problem.outer_data
    for estimator in estimators:
        one, two = (
            hg.hypergradient(hg.Bilevel(ridge_penalty, losses, *data), estimator)(
                RIDGE.w, RIDGE.alpha
            )
            for losses in (squares, (squares, squares))
        )
        assert two.stats["num_hvps"] == one.stats["num_hvps"]
        expected = jnp.stack([one.hypergradient] * 2)
        chex.assert_trees_all_close(two.hypergradient, expected, rtol=1e-14)


def test_a_loss_without_w_hides_no_curvature():
    """It has no system to solve, and so no curvature of its own."""
    penalty = lambda w, alpha, batch: jnp.sum(alpha**2)
    data = RIDGE.problem.inner_data, RIDGE.problem.outer_data
    problem = hg.Bilevel(ridge_penalty, (ridge_outer, penalty), *data)
    stats = hg.hypergradient(problem, hg.Implicit(hg.Newton()))(
        RIDGE.w, RIDGE.alpha
    ).stats
    assert 0 < stats["ritz_min"] <= stats["ritz_max"] < jnp.inf


class OwnScaling(hg.MINRES):
    """MINRES that finds its scaling itself, whatever it is given."""

    def compute(self, state, vector, options):
        return super().compute(state, vector, options | {"scaling": None})


@pytest.mark.parametrize(
    ("options", "num_saved"),
    [
        pytest.param({}, 6, id="error estimate"),
        pytest.param({"estimate_error": False}, 0, id="no error estimate"),
        pytest.param({"damping": 0.1}, 0, id="damping"),
    ],
)
def test_minres_uses_the_scaling_that_the_error_estimate_needs(options, num_saved):
    """It would find the same by the six columns of ``H``, unless ``H`` is damped."""
    solver = hg.Descent(optax.sgd(0.3), 12)
    given, own = (
        hg.hypergradient(LOGISTIC.problem, hg.Implicit(solver, minres, **options))(
            LOGISTIC.w, LOGISTIC.alpha
        )
        for minres in (hg.MINRES(), OwnScaling())
    )
    assert own.stats["num_hvps"] - given.stats["num_hvps"] == num_saved
    chex.assert_trees_all_close(given.hypergradient, own.hypergradient, rtol=1e-8)


@pytest.mark.parametrize("linear_solver", [hg.CG(), hg.Neumann(5)])
def test_each_of_several_outer_losses_is_evaluated_twice(linear_solver):
    """Once at ``w`` and once at the corrected point of its own."""
    data = ridge_with_few_outer_examples(None)
    pairs = [counted(loss, per_point=True) for loss in SEVERAL_LOSSES]
    losses, calls = zip(*pairs, strict=True)
    problem = hg.Bilevel(ridge_penalty, losses, data.inner_data, data.outer_data)
    estimator = hg.Implicit(hg.Descent(optax.sgd(0.3), 12), linear_solver)
    state = estimator.init(problem, RIDGE.w, RIDGE.alpha)
    estimate = jax.jit(functools.partial(estimator.estimate, problem))
    assert not any(calls)
    stats = estimate(state, RIDGE.alpha, jax.random.key(0))[0].stats
    jax.effects_barrier()
    assert [*map(len, calls)] == [2, 2, 2]
    assert stats["num_outer_grads"] == 2 * 3


@pytest.mark.parametrize(
    ("solver", "linear_solver"),
    [
        pytest.param(hg.Newton(), hg.CG(), id="Newton, CG"),
        pytest.param(hg.LBFGS(), hg.Neumann(7), id="LBFGS, Neumann"),
        pytest.param(
            hg.Descent(optax.sgd(0.3), 9), LINEAR_SOLVERS["GMRES"], id="Descent, GMRES"
        ),
    ],
)
def test_cost_equals_the_evaluations_of_the_inner_loss(solver, linear_solver):
    """A callback counts evaluations; a warm start's first residual is one of them.

    Products in one batch evaluate the loss once: six for the diagonal of ``H``, two
    columns of ``J``, two at the corrected point, and three for the previous solutions.
    """
    problem, calls = counting_problem(LOGISTIC)
    estimator = hg.Implicit(solver, linear_solver)
    step = jax.jit(functools.partial(estimator.estimate, problem))
    state = estimator.init(problem, LOGISTIC.w, LOGISTIC.alpha)
    for shift in (0.0, 0.1):
        jax.effects_barrier()
        calls.clear()
        estimate, state = step(state, LOGISTIC.alpha + shift, jax.random.key(0))
        jax.block_until_ready(estimate)
        jax.effects_barrier()
        stats = estimate.stats
        expected = stats["num_hvps"] + stats["num_grads"] + stats["num_values"]
        if isinstance(linear_solver, lx.GMRES):  # from its steps: an upper bound
            assert len(calls) <= expected <= 2 * len(calls)
        else:
            has_subspace = shift > 0 and isinstance(linear_solver, hg.CG)
            num_batched = (6 - 1) + (2 - 1) + (2 - 1) + has_subspace * (3 - 1)
            assert expected == len(calls) + num_batched
