"""Certificates against dense solutions of random problems, stopped anywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks.shared.reference_problems import (
    error,
    quadratic,
    two_losses,
)
from hypergrad.implicit.differentiation import (
    Point,
    implicit_hypergradient,
    zero_adjoint,
)
from hypergrad.trees import relative_error
from tests.estimator_cases import (
    RIDGE,
    counting_problem,
    saddle_inner,
    saddle_outer,
)
from tests.loops import run_loop
from tests.random_problems import (
    LOSSES,
    dense_hypergradient,
    gradient_descent,
    random_problem,
)


def differentiate(problem, w, alpha, linear_solver=hg.CG()):  # noqa: B008 - CG is frozen
    """Returns the hypergradient by implicit differentiation at a given ``w``."""
    point = Point(problem, w, alpha, problem.inner_data, problem.outer_data)
    init_adjoint = zero_adjoint(problem, w)
    return implicit_hypergradient(point, linear_solver, init_adjoint).hypergradient


jitted_differentiate = jax.jit(differentiate)

# Batches of random problems. All tests share the programs of these functions.

make_problems = jax.jit(jax.vmap(random_problem, in_axes=(0, None)), static_argnums=1)
descend = jax.jit(jax.vmap(gradient_descent))
solve_densely = jax.jit(jax.vmap(dense_hypergradient))
differentiate_all = jax.jit(jax.vmap(differentiate))
relative_errors = jax.jit(jax.vmap(relative_error))


@jax.jit
@jax.vmap
def certify_all(problem, w, alpha, hypergradient, key):
    return hg.certify(problem, w, alpha, hypergradient, key=key)


def certify_random_problems(kind, num_problems):
    """Certifies problems whose inner loops stopped after 1 to 3000 steps."""
    keys = jax.random.split(jax.random.key(0), (2, num_problems))
    problems, w, alpha = make_problems(keys[0], kind)
    num_steps = np.logspace(0, np.log10(3000), num_problems).astype(int)
    w = descend(problems, w, alpha, num_steps)
    is_minimum, exact = solve_densely(problems, w, alpha)
    hypergradient = differentiate_all(problems, w, alpha)
    certificate = certify_all(problems, w, alpha, hypergradient, keys[1])
    corrected = certificate.corrected_hypergradient
    return {
        "is_minimum": is_minimum,
        "error": relative_errors(hypergradient, exact),
        "error_estimate": certificate.error_estimate,
        "trusted": certificate.trusted,
        "corrected": relative_errors(corrected, exact),
    }


@pytest.mark.parametrize(
    ("kinds", "num_problems"),
    [
        pytest.param(("logistic",), 60, id="60 logistic problems"),
        pytest.param(tuple(LOSSES), 250, id="1000", marks=pytest.mark.slow),
    ],
)
def test_certificates_hold_on_random_problems(kinds, num_problems):
    """What is trusted is right, what is right is trusted, and estimates are sharp."""
    results = [certify_random_problems(kind, num_problems) for kind in kinds]
    results = jax.tree.map(lambda *columns: np.concatenate(columns), *results)
    is_minimum = results["is_minimum"]
    results = {name: column[is_minimum] for name, column in results.items()}
    true, trusted = results["error"], results["trusted"]
    is_near = (true < 0.3) & (true > 1e-11)  # below, both are rounding
    factor = results["error_estimate"][is_near] / true[is_near]
    assert np.mean(is_minimum) > 0.6
    assert np.mean(true[trusted] < 2e-2) >= 0.99
    assert np.mean(trusted[true < 2e-3]) >= 0.9
    assert np.mean((factor > 0.5) & (factor < 2)) >= 0.95
    assert np.median(results["corrected"][is_near] / true[is_near]) < 1e-2


def test_saddles_are_not_trusted():
    """40 quadratics with one eigenvalue between -1 and -0.05, at their saddle."""

    @jax.jit
    @jax.vmap
    def run(key):
        keys, size = jax.random.split(key, 5), 12
        basis, _ = jnp.linalg.qr(jax.random.normal(keys[0], (size, size)))
        lowest = -jax.random.uniform(keys[1], minval=0.05)
        spectrum = jnp.linspace(0.1, 1.0, size).at[0].set(lowest)
        H = basis @ jnp.diag(spectrum) @ basis.T
        data = {"H": H, "t": jax.random.normal(keys[2], (size,))}
        alpha = jax.random.normal(keys[3], (size,))
        w = jnp.linalg.solve(H, alpha)
        exact = jnp.linalg.solve(H, w - data["t"])
        problem = hg.Bilevel(saddle_inner, saddle_outer, data, data)
        certificate = hg.certify(problem, w, alpha, exact, key=keys[4])
        return certificate.trusted, certificate.negative_curvature

    trusted, negative_curvature = run(jax.random.split(jax.random.key(1), 40))
    assert not np.any(trusted)
    assert np.all(negative_curvature)


def test_error_along_a_flat_direction_is_measured():
    """Curvatures 300 and 1: an error of w along the second one, where b is small."""
    inner = lambda w, alpha, batch: (
        0.5 * jnp.sum((batch["h"] + alpha) * w**2) - jnp.sum(w)
    )
    outer = lambda w, alpha, batch: w @ batch["c"]
    problem = hg.Bilevel(
        inner, outer, {"h": jnp.array([300.0, 1.0])}, {"c": jnp.array([1.0, 0.01])}
    )
    w = jnp.array([1 / 300, 2.0])
    hypergradient = jitted_differentiate(problem, w, jnp.zeros(2))
    certificate = hg.certify(problem, w, jnp.zeros(2), hypergradient)
    exact = -jnp.array([1 / 300, 1.0]) * jnp.array([1 / 300, 0.01])
    expected = relative_error(hypergradient, exact)
    np.testing.assert_allclose(certificate.error_estimate, expected, rtol=1e-2)
    assert not certificate.trusted


# Fields.


def test_a_certificate_that_has_not_converged_is_not_trusted():
    """Two Newton steps on cosh end at 0.26, where a third one matters."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: jnp.cosh(w - alpha), lambda w, alpha, batch: w**3
    )
    first = hg.certify(problem, jnp.asarray(3.0), jnp.asarray(1.0))
    second = hg.certify(
        problem, jnp.asarray(3.0), jnp.asarray(1.0), first.corrected_hypergradient
    )
    assert second.error_estimate < 1e-9  # it compares with the same correction
    assert {name for name, flag in second.flags.items() if flag} == {"last_change"}
    assert not second.trusted


def test_fields_equal_their_formulas_on_a_quadratic():
    """A quadratic with spectrum [1, 10], at a distance of 0.1 from its minimum."""
    reference = quadratic("30", seed=2)
    w = reference.solution(reference.alpha) + 0.1
    certificate = hg.certify(
        reference.problem, w, reference.alpha, strong_convexity=2.0
    )
    exact = reference.exact(reference.alpha)
    # Each solve leaves at most 1e-6 of its right-hand side.
    assert error(certificate.corrected_hypergradient, exact) < 1e-6
    assert error(certificate.corrected_w, reference.solution(reference.alpha)) < 1e-6
    hypergradient = jitted_differentiate(reference.problem, w, reference.alpha)
    inner_grad_norm = np.linalg.norm(reference.hessian @ np.full(30, 0.1))
    np.testing.assert_allclose(
        certificate.error_estimate, relative_error(hypergradient, exact), rtol=1e-5
    )
    np.testing.assert_allclose(certificate.inner_grad_norm, inner_grad_norm)
    assert certificate.corrected_grad_norm < 1e-6 * inner_grad_norm
    assert not certificate.negative_curvature
    np.testing.assert_allclose(certificate.distance_bound, inner_grad_norm / 2)
    np.testing.assert_allclose(
        certificate.adjoint_error_bound, certificate.adjoint_residual / 2
    )


def test_cost_equals_the_evaluations_of_the_inner_loss():
    """A callback counts the evaluations of the inner loss as the program runs."""
    problem, calls = counting_problem(RIDGE)
    jax.block_until_ready(hg.certify(problem, RIDGE.w, RIDGE.alpha))
    jax.effects_barrier()
    calls.clear()
    certificate = jax.block_until_ready(hg.certify(problem, RIDGE.w, RIDGE.alpha))
    jax.effects_barrier()
    counted = certificate.stats["num_grads"] + certificate.stats["num_hvps"]
    # The products for the diagonal of H are one batch, which evaluates the loss once.
    assert counted == len(calls) + RIDGE.w.size - 1
    # The first result, those after two Newton steps, and one for rounding.
    assert certificate.stats["num_outer_grads"] == 4


def test_largest_error_of_several_losses_decides():
    """With K = 2 and a tree of parameters, only one of which the second loss reads."""
    reference = quadratic("nested", seed=1)
    problem = two_losses(reference, lambda w, alpha, batch: jnp.sum(w["b"]["c"]))
    w_star = reference.solution(reference.alpha)
    assert hg.certify(problem, w_star, reference.alpha).trusted
    w_star["a"][0] += 0.3
    wrong = hg.certify(problem, w_star, reference.alpha)
    assert not wrong.trusted
    assert wrong.error_estimate > 1e-2


def test_tiny_outer_loss_hides_no_error():
    """``dM/dalpha = 1e-22 alpha`` in float32, where its square underflows."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: 0.5 * (w - alpha) ** 2,
        lambda w, alpha, batch: 0.5 * batch * w**2,
        None,
        jnp.float32(1e-22),
    )
    one = jnp.float32(1.0)
    wrong = hg.certify(problem, one, one, jnp.float32(0.0))
    assert wrong.error_estimate == pytest.approx(1.0)
    assert not wrong.trusted
    right = hg.certify(problem, one, one, jnp.float32(1e-22))
    assert right.corrected_hypergradient == pytest.approx(1e-22)
    assert right.trusted


@pytest.mark.parametrize(
    "hypergradient",
    [1.5, np.float64(1.5), jnp.asarray(1.5)],
    ids=["float", "NumPy", "JAX"],
)
def test_numbers_are_certified_like_arrays(hypergradient):
    """``M = w^2/2`` at ``w* = alpha = 1`` has the derivative 1; 1.5 is off by 0.5."""
    inner = lambda w, alpha, batch: 0.5 * (w - alpha) ** 2
    outer = lambda w, alpha, batch: 0.5 * w**2
    certificate = hg.certify(hg.Bilevel(inner, outer), 1.0, 1.0, hypergradient)
    assert certificate.error_estimate == pytest.approx(0.5)
    # Bounds need the option `strong_convexity`.
    assert np.isnan(certificate.distance_bound)
    assert np.isnan(certificate.adjoint_error_bound)


# Certificates in a run.


def test_outer_loop_certifies_every_third_step():
    """A penalty method is trusted only by the certificate of steps 0, 3 and 6."""
    trace = run_loop(
        RIDGE.problem, hg.Penalty(hg.Newton(), 1e5), optax.sgd(0.01), RIDGE.w,
        RIDGE.alpha, num_steps=7, certify_every=3, record_alphas=True,
    )  # fmt: skip
    assert trace.stats["trusted"].tolist() == [True, False, False] * 2 + [True]
    error_estimate = trace.stats["error_estimate"]
    assert np.all(np.isnan(error_estimate[1:3]))
    assert np.all(error_estimate[::3] < 1e-3)
    assert trace.stats["num_hvps"][0] > trace.stats["num_hvps"][1]
    hypergradient = (trace.alphas[0] - trace.alphas[1]) / 0.01
    true = error(hypergradient, RIDGE.exact(RIDGE.alpha))
    np.testing.assert_allclose(error_estimate[0], true, rtol=1e-2)


def test_certificate_of_a_procedure_is_its_distance_to_implicit():
    """Unrolled differentiation stays trusted for its own target."""
    estimator = hg.Unrolled(hg.Descent(optax.sgd(RIDGE.step), 5), warm_start=False)
    trace = run_loop(
        RIDGE.problem, estimator, optax.sgd(0.01), RIDGE.w, RIDGE.alpha, num_steps=2,
        certify_every=1, record_alphas=True,
    )  # fmt: skip
    assert trace.stats["trusted"].all()
    hypergradient = (trace.alphas[0] - trace.alphas[1]) / 0.01
    expected = error(hypergradient, RIDGE.exact(RIDGE.alpha))
    distance = trace.stats["distance_to_implicit"]
    np.testing.assert_allclose(distance[0], expected, rtol=1e-4)
    assert np.all(distance > 1e-3)
    assert np.all(trace.stats["error_estimate"] == 0)


# Errors.


def test_unused_leaf_of_alpha_is_an_error():
    """The message names the leaf on which neither loss depends."""
    inner = lambda w, alpha, batch: RIDGE.problem.inner_loss(w, alpha["a"], batch)
    data = RIDGE.problem.inner_data, RIDGE.problem.outer_data
    problem = hg.Bilevel(inner, RIDGE.problem.outer_loss, *data)
    with pytest.raises(ValueError, match=r"alpha\['rate'\]"):
        hg.certify(problem, RIDGE.w, {"a": RIDGE.alpha, "rate": 0.1})


def test_hypergradient_must_be_structured_like_alpha():
    """Another shape is an error."""
    with pytest.raises(ValueError, match="hypergradient"):
        hg.certify(RIDGE.problem, RIDGE.w, RIDGE.alpha, jnp.ones(2))


def test_an_infinite_outer_value_is_not_trusted():
    """Its derivatives are finite, so that the certificate alone would trust them."""
    outer = lambda w, alpha, batch: 0.5 * jnp.sum(w**2) + batch
    problem = hg.Bilevel(
        lambda w, alpha, batch: jnp.sum((w - alpha) ** 2), outer, None, jnp.inf
    )
    estimator = hg.Implicit(hg.Newton(), certify=True)
    estimate = hg.hypergradient(problem, estimator)(jnp.zeros(2), jnp.ones(2))
    assert not estimate.trusted
    assert len(estimate.reasons) == 1
    assert "finite" in estimate.reasons[0]
    plain = hg.Implicit(hg.Newton(), estimate_error=False)
    loop = hg.OuterLoop(problem, plain, optax.sgd(0.1), certify_every=1)
    trace = loop.run(loop.init(jnp.zeros(2), jnp.ones(2)), num_steps=1)
    assert not trace.stats["trusted"].any()


def test_a_bound_does_not_underflow_with_the_square_of_the_gradient():
    """The distance is 0.5, of which the gradient is 4e-28 in float32."""
    factor = 2.0**-90
    problem = hg.Bilevel(
        lambda w, alpha, batch: factor * 0.5 * (w - alpha) ** 2,
        lambda w, alpha, batch: 0.5 * w**2,
    )
    w, alpha = jnp.float32(1.5), jnp.float32(1.0)
    certificate = hg.certify(problem, w, alpha, strong_convexity=factor)
    np.testing.assert_allclose(certificate.distance_bound, 0.5, rtol=1e-5)
    np.testing.assert_allclose(certificate.inner_grad_norm, 0.5 * factor, rtol=1e-5)


@pytest.mark.parametrize("exponent", [-90, 90])
def test_ritz_values_neither_underflow_nor_overflow(exponent):
    """Squares of the entries of the Lanczos matrix leave the range of float32."""
    H = jnp.asarray(0.1 * np.eye(6) + 0.9, jnp.float32)  # eigenvalues 0.1 and 5.5
    outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1) ** 2)

    def ritz_values(factor):
        loss = lambda w, alpha, batch: factor * 0.5 * (w - alpha) @ (H @ (w - alpha))
        w, alpha = jnp.zeros(6, jnp.float32), jnp.full(6, 0.3, jnp.float32)
        certificate = hg.certify(hg.Bilevel(loss, outer), w, alpha)
        return np.array([certificate.ritz_min, certificate.ritz_max]) / factor

    factor = np.float32(2.0**exponent)
    expected = ritz_values(np.float32(1))
    assert np.all(np.isfinite(expected))
    np.testing.assert_allclose(ritz_values(factor), expected, rtol=1e-4)


def test_a_failed_certificate_gives_no_distance():
    """The inner run stops at negative curvature, where there is no adjoint."""
    inner = lambda w, alpha, batch: (w**2 - 1) ** 2 / 4 - alpha * w
    outer = lambda w, alpha, batch: (w - 1) ** 2 + alpha**2
    problem = hg.Bilevel(inner, outer)
    estimator = hg.Unrolled(hg.Descent(optax.sgd(0.01), 5))
    trace = run_loop(
        problem, estimator, optax.sgd(0.01), 0.05, 0.3, num_steps=1, certify_every=1
    )
    assert trace.stats["trusted"].all()
    assert np.isnan(trace.stats["distance_to_implicit"]).all()
