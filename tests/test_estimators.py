"""Estimators against closed forms, dense solves and central differences in float64."""

import functools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hypergrad as hg
from benchmarks.known import (
    SHAPES,
    Known,
    any_known,
    cast,
    central,
    dense,
    error,
    flat,
    hypertorch,
    logistic_outer,
    quadratic,
    ridge,
    ridge_outer,
    ridge_penalty,
    ridge_weights,
)

PRODUCTS = ("num_hvps", "num_grads", "num_values")

LINEAR = {
    "CG": hg.CG(),
    "GMRES": lx.GMRES(rtol=1e-12, atol=1e-12),
    "LU": lx.LU(),
    "NystromCG": hg.NystromCG(rank=3),
}
FAMILIES = [
    *(f"ridge {kind}" for kind in ("scalar", "per-weight", "per-example")),
    *(f"logistic {kind}" for kind in ("scalar", "per-weight")),
    *(f"quadratic {structure}" for structure in SHAPES),
]
SMD = [f"smd {number}" for number in range(1, 6)]
TILTED = [f"smd {number} tilted" for number in range(1, 6)]


@functools.cache
def sgd(step: float) -> optax.GradientTransformation:
    """One object a step size, since optax compares by identity."""
    return optax.sgd(step)


def converged(known: Known, num_steps: int = 300) -> hg.Descent:
    return hg.Descent(sgd(known.step), num_steps)


def quadratic_best(alpha, batch):
    return jnp.linalg.solve(batch["H"], batch["C"] @ alpha)


def ridge_best(alpha, batch):
    x, y = batch["x"], batch["y"]
    H = x.T @ x / len(y) + jnp.diag(jnp.broadcast_to(jnp.exp(alpha), x.shape[1:]))
    return jnp.linalg.solve(H, x.T @ y / len(y))


def given_w(alpha, batch):
    """For an inner solver that stands wherever the data says."""
    return batch["w"]


def estimate(known: Known, estimator, alpha=None, key=None) -> hg.Estimate:
    alpha = known.alpha if alpha is None else alpha
    return hg.hypergradient(known.problem, estimator)(known.w, alpha, key)


def spent(found: hg.Estimate, *names: str) -> list[float]:
    return [float(found.stats[name]) for name in names]


# Exactness.


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in FAMILIES for method in (*LINEAR, "Unrolled")]
    + [(name, method) for name in SMD for method in ("CG", "Unrolled")]
    + [(name, method) for name in TILTED for method in ("CG", "LU", "Unrolled")],
)
def test_equals_the_closed_form(name: str, method: str):
    """Closed form, or a dense solve at a NumPy Newton point (logistic); SMD1-5: 2x."""
    known = any_known(name)
    solver = converged(known, 3000 if name.startswith("smd") else 300)
    if method == "Unrolled":
        estimator = hg.Unrolled(solver, checkpoint=False)
    else:
        estimator = hg.Implicit(solver, LINEAR[method])
    found = estimate(known, estimator)
    exact = known.exact(known.alpha)
    assert error(found.hypergradient, exact) < 1e-9
    assert error(found.w, known.best(known.alpha)) < 1e-9
    assert found.stats["trusted"]
    partials = np.sort(flat(exact))
    assert np.all(np.diff(partials) > 1e-6)  # a sum of partials would be seen


@pytest.mark.parametrize(
    "solver",
    [hg.Newton(), hg.LBFGS(), hg.ClosedForm(ridge_best)],
    ids=["Newton", "LBFGS", "ClosedForm"],
)
def test_every_inner_solver_reaches_the_closed_form(solver):
    """Ridge with a penalty a weight: closed form."""
    known = any_known("ridge per-weight")
    found = estimate(known, hg.Implicit(solver))
    assert error(found.hypergradient, known.exact(known.alpha)) < 1e-9
    assert found.stats["trusted"]


def test_unrolled_through_a_formula_is_the_total_derivative():
    """Ridge: closed form, and no second derivative of the loss is needed."""
    known = any_known("ridge per-weight")
    found = estimate(known, hg.Unrolled(hg.ClosedForm(ridge_best)))
    assert error(found.hypergradient, known.exact(known.alpha)) < 1e-12


@pytest.mark.parametrize("method", ["implicit", "unrolled"])
def test_equals_central_differences(method: str):
    """Fourth-order differences of the outer value at a NumPy Newton point."""
    known = any_known("logistic per-weight")
    value = lambda a: logistic_outer(known.best(a), a, known.problem.outer_data)
    solver = converged(known)
    estimator = hg.Implicit(solver) if method == "implicit" else hg.Unrolled(solver)
    found = estimate(known, estimator).hypergradient
    assert error(found, central(value, known.alpha, 1e-2)) < 1e-7


@pytest.mark.parametrize("structure", ["0-d", "1", "30", "nested", "cI"])
def test_a_formula_leaves_only_the_adjoint_to_solve(structure: str):
    """0-d, 1-d and H = cI are where conjugate gradients of others returned zero."""
    known = quadratic(structure, seed=5)
    best = lambda alpha, batch: quadratic_like(structure, alpha, batch)
    found = estimate(known, hg.Implicit(hg.ClosedForm(best)))
    assert error(found.hypergradient, known.exact(known.alpha)) < 1e-9


def quadratic_like(structure, alpha, batch):
    _, unravel = jax.flatten_util.ravel_pytree(SHAPES[structure])
    return unravel(quadratic_best(flat(alpha), batch))


# Cost of the linear solve.


@pytest.mark.parametrize("structure", ["0-d", "1", "cI"])
def test_one_eigenvalue_takes_one_step(structure: str):
    """CG ends after one step on H = cI: one product, and the final one that counts."""
    known = quadratic(structure)
    found = estimate(known, hg.Implicit(converged(known)))
    assert found.stats["num_hvps"] <= 2


@given(seed=st.integers(0, 10_000), condition=st.sampled_from([1.5, 5.0, 19.0]))
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("structure", ["2", "30"])
def test_products_stay_near_the_dimension(structure, seed, condition):
    """CG ends within dim + 3 steps for a condition below 20; one final product more."""
    known = quadratic(structure, seed, condition)
    found = estimate(known, FROM_FORMULA)
    assert found.stats["num_hvps"] <= known.w.size + 3 + 1
    assert error(found.hypergradient, known.exact(known.alpha)) < 1e-9


FROM_FORMULA = hg.Implicit(hg.ClosedForm(quadratic_best))


# What alpha enters.


def test_alpha_read_only_by_the_outer_loss_is_the_direct_term():
    """M = M_0(w) + b^2 + 3b: dM/db = 2b + 3 exactly; the other leaf as without b."""
    known = any_known("ridge per-weight")
    inner = lambda w, alpha, batch: ridge_penalty(w, alpha["a"], batch)
    outer = lambda w, alpha, batch: (
        ridge_outer(w, None, batch) + alpha["b"] ** 2 + 3 * alpha["b"]
    )
    data = known.problem.inner_data, known.problem.outer_data
    alpha = {"a": known.alpha, "b": jnp.array(0.7)}
    for estimator in (
        hg.Implicit(converged(known)),
        hg.Unrolled(converged(known)),
    ):
        gradient = hg.hypergradient(hg.Bilevel(inner, outer, *data), estimator)
        found = gradient(known.w, alpha).hypergradient
        assert error(found["a"], known.exact(known.alpha)) < 1e-9
        np.testing.assert_allclose(found["b"], 2 * 0.7 + 3, rtol=1e-14)


@pytest.mark.parametrize("method", [*LINEAR, "Unrolled"])
def test_an_outer_loss_that_ignores_w_has_only_the_direct_term(method: str):
    """M = sum(alpha^2): 2 alpha, exact whatever the inner solver leaves: trusted."""
    known = any_known("ridge per-weight")
    outer = lambda w, alpha, batch: jnp.sum(alpha**2)
    problem = hg.Bilevel(ridge_penalty, outer, known.problem.inner_data)
    solver = converged(known, 30)
    if method == "Unrolled":
        estimator = hg.Unrolled(solver)
    else:
        estimator = hg.Implicit(solver, LINEAR[method])
    found = hg.hypergradient(problem, estimator)(known.w, known.alpha)
    np.testing.assert_allclose(found.hypergradient, 2 * known.alpha, rtol=1e-14)
    assert found.stats["trusted"]


@pytest.mark.parametrize("method", ["implicit", "unrolled", "LU"])
def test_a_tuple_of_losses_is_that_many_runs(method: str):
    """Each row equals its own run, and the dense solve."""
    known = any_known("ridge per-weight")
    lift = lambda w, alpha, batch: jnp.sum(jnp.cos(w)) * jnp.sum(alpha**2)
    losses = (ridge_outer, lift, ridge_penalty)
    data = known.problem.inner_data, known.problem.outer_data
    solver = converged(known)
    estimator = {
        "implicit": hg.Implicit(solver),
        "unrolled": hg.Unrolled(solver),
        "LU": hg.Implicit(solver, lx.LU()),
    }[method]
    together = hg.Bilevel(ridge_penalty, losses, *data)
    found = hg.hypergradient(together, estimator)(known.w, known.alpha)
    exact = dense(together, known.w, known.alpha)
    assert found.value.shape == (3,)
    assert error(found.hypergradient, exact["hypergradient"]) < 1e-9
    assert error(found.value, jnp.array(exact["value"])) < 1e-12
    assert found.stats["trusted"]
    for k, loss in enumerate(losses):
        alone = hg.Bilevel(ridge_penalty, loss, *data)
        one = hg.hypergradient(alone, estimator)(known.w, known.alpha)
        assert error(found.hypergradient[k], one.hypergradient) < 1e-10
        np.testing.assert_allclose(found.value[k], one.value, rtol=1e-13)


def test_a_tuple_of_losses_on_a_tree():
    """Leaves of a nested alpha lead with K; each row equals the dense solve."""
    known = any_known("quadratic nested")
    second = lambda w, alpha, batch: jnp.sum(jnp.sin(flat(w))) * alpha["a"]
    losses = (known.problem.outer_loss, second)
    data = known.problem.inner_data
    problem = hg.Bilevel(known.problem.inner_loss, losses, data, data)
    exact = dense(problem, known.w, known.alpha)["hypergradient"]
    for estimator in (hg.Implicit(hg.Newton()), hg.Unrolled(converged(known))):
        found = hg.hypergradient(problem, estimator)(known.w, known.alpha)
        assert found.hypergradient["a"].shape == (2,)
        assert error(found.hypergradient, exact) < 1e-9


# Damping and step size.


@pytest.mark.parametrize("method", [*LINEAR, "Neumann"])
def test_damping_is_added_to_the_hessian(method: str):
    """dM/dalpha - J'(H + damping I)^-1 b by a dense solve, for five dampings."""
    known = quadratic("30", seed=2)
    linear = LINEAR.get(method, hg.Neumann(300))
    for damping in (0.0, 1e-3, 0.1, 1.0, 30.0):
        estimator = hg.Implicit(hg.ClosedForm(quadratic_best), linear, damping)
        found = estimate(known, estimator)
        at = dense(known.problem, known.w, known.alpha, damping)
        assert error(found.hypergradient, at["hypergradient"]) < 1e-9
        # The residual is that of H itself: it shows the bias that damping brings.
        H, b = at["H"], at["b"][0]
        v = np.linalg.solve(H + damping * np.eye(30), b)
        residual = np.linalg.norm(b - H @ v) / np.linalg.norm(b)
        assert float(found.stats["adjoint_residual"]) == pytest.approx(
            residual, rel=1e-6, abs=1e-8
        )
        assert bool(found.stats["trusted"]) == (residual < 0.01)


def test_a_full_rank_sketch_is_the_damped_inverse():
    """Nyström of rank dim: (H + damping I)^-1 by a dense solve."""
    known = quadratic("30", seed=3)
    for damping in (1e-3, 0.1, 1.0):
        linear = hg.Nystrom(rank=30, damping=damping)
        found = estimate(known, hg.Implicit(hg.ClosedForm(quadratic_best), linear))
        exact = dense(known.problem, known.w, known.alpha, damping)["hypergradient"]
        assert error(found.hypergradient, exact) < 1e-9


@pytest.mark.parametrize("num_terms", [1, 2, 7])
def test_step_size_swept(num_terms: int):
    """step_size sum_k (I - step_size H)^k b, summed with dense matrices."""
    known = quadratic("30", seed=4)
    at = dense(known.problem, known.w, known.alpha)
    for step_size in (1.0, 0.5, 0.1, 0.01):
        linear = hg.Neumann(num_terms, step_size)
        found = estimate(known, hg.Implicit(hg.ClosedForm(quadratic_best), linear))
        shrink = np.eye(30) - step_size * at["H"]
        powers = [np.linalg.matrix_power(shrink, k) for k in range(num_terms)]
        v = step_size * sum(powers) @ at["b"][0]
        exact = jnp.array(at["direct"][0] - v @ at["J"])
        assert error(found.hypergradient, exact) < 1e-12
        residual = np.linalg.norm(at["b"][0] - at["H"] @ v) / np.linalg.norm(at["b"])
        np.testing.assert_allclose(found.stats["adjoint_residual"], residual, rtol=1e-9)
        assert found.stats["num_hvps"] == num_terms - 1 + 1  # the last: cross term


def test_the_identity_takes_the_adjoint_for_the_outer_gradient():
    """dM/dalpha - J'b (T1-T2), with dense matrices."""
    known = quadratic("30", seed=4)
    at = dense(known.problem, known.w, known.alpha)
    solver = hg.ClosedForm(quadratic_best)
    found = estimate(known, hg.Implicit(solver, hg.Identity()))
    exact = jnp.array(at["direct"][0] - at["b"][0] @ at["J"])
    assert error(found.hypergradient, exact) < 1e-12
    assert not found.stats["trusted"]


# Trust.


@pytest.mark.parametrize(
    "linear",
    [*LINEAR.values(), lx.BiCGStab(rtol=1e-12, atol=1e-12), hg.Neumann(200)],
    ids=[*LINEAR, "BiCGStab", "Neumann"],
)
@pytest.mark.parametrize(
    "name", ["ridge scalar", "ridge per-weight", "logistic scalar"]
)
def test_an_inner_loop_stopped_early_is_flagged(name: str, linear):
    """jaxopt returns an implicit gradient 86% off after five steps without a word."""
    known = any_known(name)
    early = hg.Descent(sgd(0.1 * known.step), 5)
    found = estimate(known, hg.Implicit(early, linear))
    assert error(found.hypergradient, known.exact(known.alpha)) > 0.1
    assert not found.stats["trusted"]


@pytest.mark.parametrize("linear", [hg.CG(), lx.LU()], ids=["CG", "LU"])
@pytest.mark.parametrize(
    "name", ["ridge scalar", "ridge per-weight", "logistic scalar"]
)
def test_no_trusted_estimate_is_far_off(name: str, linear):
    """A solver that stands at w* plus a random error, from 1e-6 to 1 of its norm."""
    known = any_known(name)
    best = known.best(known.alpha)
    exact = known.exact(known.alpha)
    estimator = hg.Implicit(hg.ClosedForm(given_w), linear)
    rng = np.random.default_rng(0)
    verdicts = []
    for size in np.logspace(-6, 0, 25):
        offset = rng.normal(size=best.shape)
        offset *= size * np.linalg.norm(best) / np.linalg.norm(offset)
        data = known.problem.inner_data | {"w": best + offset}
        problem = hg.Bilevel(
            known.problem.inner_loss,
            known.problem.outer_loss,
            data,
            known.problem.outer_data,
        )
        found = hg.hypergradient(problem, estimator)(known.w, known.alpha)
        off = error(found.hypergradient, exact)
        verdicts.append((bool(found.stats["trusted"]), off))
    assert all(off < 0.1 for trusted, off in verdicts if trusted)
    assert all(trusted for trusted, off in verdicts if off < 1e-4)


BICGSTAB = lx.BiCGStab(rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("linear", "certify"),
    [
        (LINEAR["CG"], False),
        # what no solver but CG sees of itself
        (LINEAR["GMRES"], True),
        (LINEAR["LU"], True),
        (LINEAR["NystromCG"], True),
        (BICGSTAB, True),
        (hg.Neumann(5000), True),
    ],
)
def test_an_error_along_a_flat_direction_is_seen(linear, certify: bool):
    """Curvatures 300 and 1, b along the first: w off along the second is 100% off."""
    inner = lambda w, alpha, batch: (
        0.5 * jnp.sum((batch["h"] + alpha) * w**2) - jnp.sum(w)
    )
    outer = lambda w, alpha, batch: w @ batch["c"]
    best = jnp.array([1 / 300, 1.0])
    data = {"h": jnp.array([300.0, 1.0]), "w": best + jnp.array([0.0, 1.0])}
    problem = hg.Bilevel(inner, outer, data, {"c": jnp.array([1.0, 0.01])})
    estimator = hg.Implicit(hg.ClosedForm(given_w), linear, certify=certify)
    found = hg.hypergradient(problem, estimator)(jnp.zeros(2), jnp.zeros(2))
    exact = -best * jnp.array([1 / 300, 0.01])
    assert error(found.hypergradient, exact) > 0.9
    assert not found.stats["trusted"]


@pytest.mark.parametrize("linear", [hg.CG(), lx.LU(), hg.Neumann(50)])
def test_near_an_optimum_of_the_outer_loss_a_small_error_of_w_is_large(linear):
    """w is 0.4% off; dM/dw = w - 1 there has the wrong sign."""
    inner = lambda w, alpha, batch: 0.5 * (w - alpha) ** 2
    outer = lambda w, alpha, batch: 0.5 * (w - 1) ** 2
    estimator = hg.Implicit(hg.Descent(sgd(0.5), 8), linear)
    found = hg.hypergradient(hg.Bilevel(inner, outer), estimator)(0.0, 1.001)
    assert found.hypergradient < 0
    assert not found.stats["trusted"]


@pytest.mark.parametrize("linear", [hg.CG(), lx.LU(), hg.Neumann(50)])
def test_a_large_part_of_w_hides_no_error_of_a_small_one(linear):
    """An offset of 1e4 that nothing reads; what is read is 99% off."""
    inner = lambda w, alpha, batch: 0.5 * (w[0] - 1e4) ** 2 + 0.5 * (w[1] - alpha) ** 2
    outer = lambda w, alpha, batch: 0.5 * w[1] ** 2
    estimator = hg.Implicit(hg.Descent(sgd(0.01), 1), linear)
    start = jnp.array([1e4, 0.0])
    found = hg.hypergradient(hg.Bilevel(inner, outer), estimator)(start, 1.0)
    assert not found.stats["trusted"]


@pytest.mark.parametrize("method", ["CG", "LU", "Unrolled"])
def test_a_flat_point_of_the_outer_loss_proves_nothing(method: str):
    """No inner step from w = 1 = t: dM/dw happens to be 0 there, but not at w* = 3."""
    inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1.0) ** 2)
    solver = hg.Descent(sgd(0.1), 0)
    if method == "Unrolled":  # whose target is the derivative of no step: 0
        estimator = hg.Unrolled(solver)
    else:
        estimator = hg.Implicit(solver, LINEAR[method])
    gradient = hg.hypergradient(hg.Bilevel(inner, outer), estimator)
    found = gradient(jnp.ones(2), jnp.full(2, 3.0))
    assert not np.any(found.hypergradient)
    assert bool(found.stats["trusted"]) == (method == "Unrolled")


def saddle_inner(w, alpha, batch):
    return 0.5 * w @ (batch["H"] @ w) - w @ alpha


def saddle_outer(w, alpha, batch):
    return 0.5 * jnp.sum((w - batch["t"]) ** 2)


def saddle(spectrum, target) -> tuple[hg.Bilevel, jax.Array]:
    """Stationary at w = 0 for alpha = 0, whatever the signs in ``spectrum``."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(len(spectrum), len(spectrum))))
    H = basis * np.array(spectrum) @ basis.T
    data = {"H": H, "t": basis @ np.array(target)}
    return hg.Bilevel(saddle_inner, saddle_outer, data, data), jnp.zeros(len(spectrum))


@pytest.mark.parametrize(
    ("linear", "target", "certify"),
    [
        # With this b the curvature along v is negative, which every solver shows.
        *[(solver, [0.3, 0.3, 2.0], False) for solver in [*LINEAR.values(), BICGSTAB]],
        # With this one it is positive: only who meets other directions can tell.
        (LINEAR["CG"], [1.0, 1.0, 1.0], False),
        (LINEAR["NystromCG"], [1.0, 1.0, 1.0], False),
        (hg.Neumann(50), [1.0, 1.0, 1.0], False),
        (hg.Neumann(50), [0.3, 0.3, 2.0], False),
        (LINEAR["GMRES"], [1.0, 1.0, 1.0], True),
        (LINEAR["LU"], [1.0, 1.0, 1.0], True),
        (BICGSTAB, [1.0, 1.0, 1.0], True),
    ],
)
def test_an_indefinite_hessian_is_not_trusted(linear, target, certify: bool):
    """Spectrum (3, 1, -1) at a stationary point: a saddle is no minimum."""
    problem, zeros = saddle([3.0, 1.0, -1.0], target)
    estimator = hg.Implicit(hg.Descent(sgd(0.1), 1), linear, certify=certify)
    found = hg.hypergradient(problem, estimator)(zeros, zeros)
    assert found.stats["inner_grad_norm"] == 0
    assert not found.stats["trusted"]


def test_damping_may_make_an_indefinite_hessian_definite():
    """Spectrum (3, 1, -1) + 2: H + damping I is positive, and is what is solved."""
    problem, zeros = saddle([3.0, 1.0, -1.0], [1.0, 1.0, 1.0])
    estimator = hg.Implicit(hg.Descent(sgd(0.1), 1), damping=2.0)
    found = hg.hypergradient(problem, estimator)(zeros, zeros)
    H, t = problem.inner_data["H"], problem.inner_data["t"]
    exact = -jnp.linalg.solve(H + 2 * jnp.eye(3), t)
    assert error(found.hypergradient, exact) < 1e-9


@pytest.mark.parametrize(
    "linear",
    [
        *LINEAR.values(),
        lx.BiCGStab(rtol=1e-12, atol=1e-12),
        hg.Neumann(50),
        hg.Nystrom(rank=2),
    ],
    ids=[*LINEAR, "BiCGStab", "Neumann", "Nystrom"],
)
def test_a_singular_hessian_is_not_trusted(linear):
    """Spectrum (3, 1, 0) with a right-hand side outside the range: no adjoint."""
    problem, zeros = saddle([3.0, 1.0, 0.0], [1.0, 1.0, 1.0])
    estimator = hg.Implicit(hg.Descent(sgd(0.1), 1), linear)
    found = hg.hypergradient(problem, estimator)(zeros, zeros)
    assert not found.stats["trusted"]


@pytest.mark.parametrize(
    "linear",
    [hg.CG(max_steps=1), hg.Neumann(100, 0.3), hg.Neumann(2, 0.1), hg.Nystrom(rank=3)],
    ids=["CG cut", "Neumann diverging", "Neumann short", "Nystrom"],
)
def test_an_adjoint_left_unsolved_is_flagged(linear):
    """Spectrum [1, 10]: one CG step, a step size above 2/10, two terms, a sketch."""
    known = quadratic("30", seed=6)
    found = estimate(known, hg.Implicit(hg.ClosedForm(quadratic_best), linear))
    assert not error(found.hypergradient, known.exact(known.alpha)) < 0.01
    assert found.stats["adjoint_residual"] > 0.01
    assert not found.stats["trusted"]


@pytest.mark.parametrize("bad", [-1.0, 0.0, 1e-9, jnp.nan])
@pytest.mark.parametrize("method", ["CG", "LU", "NystromCG", "Neumann", "GMRES"])
def test_one_bad_step_is_not_held_against_the_next(method: str, bad: float):
    """A saddle, a flat direction, a NaN on the way: what comes after is exact."""
    inner = lambda w, alpha, batch: (
        1.5 * w[0] ** 2 + 0.5 * alpha * w[1] ** 2 - jnp.sum(w)
    )
    outer = lambda w, alpha, batch: jnp.sum((w - 2) ** 2)
    problem = hg.Bilevel(inner, outer)
    solver = hg.ClosedForm(lambda alpha, batch: jnp.stack([1 / 3, 1 / alpha]))
    linear = LINEAR | {"Neumann": hg.Neumann(60, 0.4)}
    estimator = hg.Implicit(solver, linear[method], warm_start=True)
    estimate = jax.jit(functools.partial(estimator.estimate, problem))
    state = estimator.init(problem, jnp.zeros(2), jnp.array(1.0))
    _, state = estimate(state, jnp.asarray(bad), jax.random.key(0))
    for alpha in (1.0, 1.1):
        found, state = estimate(state, jnp.array(alpha), jax.random.key(0))
        exact = 2 * (1 / alpha - 2) * (-1 / alpha**2)
        np.testing.assert_allclose(found.hypergradient, exact, rtol=1e-8)
        assert found.stats["trusted"]


@pytest.mark.parametrize("where", ["inner", "outer"])
@pytest.mark.parametrize("method", [*LINEAR, "Neumann", "Nystrom", "Unrolled", "last"])
def test_nan_in_the_data_is_not_trusted(method: str, where: str):
    """One NaN in 40 examples."""
    known = any_known("ridge per-weight")
    poisoned = lambda batch: batch | {"y": batch["y"].at[3].set(jnp.nan)}
    inner, outer = known.problem.inner_data, known.problem.outer_data
    data = (poisoned(inner), outer) if where == "inner" else (inner, poisoned(outer))
    problem = hg.Bilevel(ridge_penalty, ridge_outer, *data)
    solver = converged(known, 20)
    linear = LINEAR | {"Neumann": hg.Neumann(5), "Nystrom": hg.Nystrom(rank=6)}
    estimator = {
        "Unrolled": hg.Unrolled(solver),
        "last": hg.Unrolled(solver, truncation_length=3),
    }.get(method) or hg.Implicit(solver, linear[method])
    found = hg.hypergradient(problem, estimator)(known.w, known.alpha)
    assert not found.stats["trusted"]


@pytest.mark.parametrize("method", ["implicit", "unrolled"])
def test_a_diverging_inner_loop_is_not_trusted(method: str):
    """Gradient descent with five times the largest stable step: overflow."""
    known = any_known("ridge per-weight")
    solver = hg.Descent(sgd(5 * known.step), 2000)
    estimator = hg.Implicit(solver) if method == "implicit" else hg.Unrolled(solver)
    assert not estimate(known, estimator).stats["trusted"]


def test_unrolled_is_trusted_for_its_own_target_only():
    """Stopped early it is the exact derivative of five steps; truncated it is not."""
    known = any_known("ridge per-weight")
    solver = hg.Descent(sgd(0.1 * known.step), 5)
    full, cut = (
        estimate(known, hg.Unrolled(solver, truncation_length=last)).stats
        for last in (None, 2)
    )
    assert full["trusted"]
    assert full["error_estimate"] == 0
    assert not cut["trusted"]
    assert cut["error_estimate"] > 0
    assert hg.Unrolled.target == "solver"
    assert hg.Implicit.target == "argmin"


def test_the_inner_residual_is_the_gradient_norm():
    """||dL/dw|| by NumPy where five steps of gradient descent stopped."""
    known = any_known("ridge scalar")
    x, y = (known.problem.inner_data[name] for name in "xy")
    for estimator in (hg.Implicit, hg.Unrolled):
        found = estimate(known, estimator(hg.Descent(sgd(0.1), 5)))
        w = found.w
        g = x.T @ (x @ w - y) / len(y) + jnp.exp(known.alpha) * w
        np.testing.assert_allclose(
            found.stats["inner_grad_norm"], jnp.linalg.norm(g), rtol=1e-12
        )


# float32.


@pytest.mark.parametrize("method", [*LINEAR, "Neumann", "Unrolled", "Newton", "LBFGS"])
@pytest.mark.parametrize("name", ["ridge per-weight", "quadratic nested"])
def test_float32_to_1e_4(name: str, method: str):
    """The float64 closed form; every result keeps float32 although x64 is on."""
    known = any_known(name)
    linear = LINEAR | {
        "GMRES": lx.GMRES(rtol=1e-6, atol=1e-6),
        "Neumann": hg.Neumann(200),
    }
    solver = converged(known)
    if method == "Unrolled":
        estimator = hg.Unrolled(solver)
    elif method in linear:
        estimator = hg.Implicit(solver, linear[method])
    else:
        estimator = hg.Implicit(hg.Newton() if method == "Newton" else hg.LBFGS())
    problem, w, alpha = (
        cast(x, jnp.float32) for x in (known.problem, known.w, known.alpha)
    )
    found = hg.hypergradient(problem, estimator)(w, alpha)
    assert error(found.hypergradient, known.exact(known.alpha)) < 1e-4
    assert found.stats["trusted"]
    leaves = jax.tree.leaves((found.value, found.hypergradient, found.w))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "estimator",
    [
        lambda x: hg.Implicit(hg.Newton(), damping=x),
        lambda x: hg.Implicit(hg.Newton(), hg.CG(rtol=1e-5 * x)),
        lambda x: hg.Implicit(hg.Newton(), hg.Neumann(5, x)),
        lambda x: hg.Implicit(hg.Newton(), hg.Nystrom(3, damping=x)),
        lambda x: hg.Implicit(hg.Newton(), hg.NystromCG(3, damping=x)),
        lambda x: hg.Implicit(hg.Newton(tolerance=1e-5 * x)),
    ],
    ids=["damping", "rtol", "step_size", "Nystrom", "NystromCG", "tolerance"],
)
def test_settings_of_double_precision_serve_a_problem_of_single(estimator):
    """A sweep over jnp.logspace with x64 on: as with a Python float, in float32."""
    known = any_known("ridge per-weight")
    problem, w, alpha = (
        cast(x, jnp.float32) for x in (known.problem, known.w, known.alpha)
    )
    swept = hg.hypergradient(problem, estimator(jnp.asarray(0.1, jnp.float64)))
    plain = hg.hypergradient(problem, estimator(0.1))
    found = swept(w, alpha).hypergradient
    assert found.dtype == jnp.float32
    assert error(found, plain(w, alpha).hypergradient) < 1e-5


@pytest.mark.parametrize(
    "kind",
    [
        hg.Unrolled,
        hg.Forward,
        hg.CentralDifference,
        lambda solver: hg.Evolution(solver, 0.1, 64),
    ],
    ids=["Unrolled", "Forward", "CentralDifference", "Evolution"],
)
def test_a_loss_of_double_precision_keeps_alpha_single(kind):
    """``w* = 3 alpha``, ``M = w²/2``: 9 alpha, in the dtype that alpha has."""
    wide = lambda loss: lambda *inputs: loss(*inputs).astype(jnp.float64)
    problem = hg.Bilevel(
        wide(lambda w, alpha, batch: 0.5 * (w - 3 * alpha["a"]) ** 2),
        wide(lambda w, alpha, batch: 0.5 * w**2),
    )
    w, alpha = jnp.float32(0.0), {"a": jnp.float32(1.0)}
    estimator = kind(hg.Descent(optax.sgd(0.5), 30))
    found = hg.hypergradient(problem, estimator)(w, alpha).hypergradient["a"]
    assert found.dtype == jnp.float32
    # Four standard errors of the mean of 64 squares of normal numbers.
    assert found == pytest.approx(9.0, rel=4 * (2 / 64) ** 0.5)
    hg.minimize(problem, estimator, optax.adam(0.1), w, alpha, num_steps=2)


# Where the inner loop begins, and what the optimizer reads.


def sgd_by_hand(problem, w, alpha, rates):
    """Plain gradient descent in a Python loop."""
    for rate in rates:
        g = jax.grad(problem.inner_loss)(w, alpha, problem.inner_data)
        w = jax.tree.map(lambda w, g, rate=rate: w - rate * g, w, g)
    return w


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_start_that_depends_on_alpha(checkpoint: bool):
    """MAML with five steps: central differences of a loop written by hand."""
    known = any_known("ridge per-weight")
    inner = lambda w, alpha, batch: ridge_penalty(w, alpha["penalty"], batch)
    outer = lambda w, alpha, batch: ridge_outer(w, alpha, batch)
    data = known.problem.inner_data, known.problem.outer_data
    begin = lambda w, alpha: w + jnp.tanh(alpha["start"])
    problem = hg.Bilevel(inner, outer, *data, init_fn=begin)
    alpha = {"penalty": known.alpha, "start": jnp.linspace(-1, 1, 6)}
    w = jnp.full(6, 0.1)

    @jax.jit
    def value(alpha):
        found = sgd_by_hand(problem, begin(w, alpha), alpha, [0.3] * 5)
        return outer(found, alpha, data[1])

    estimator = hg.Unrolled(hg.Descent(sgd(0.3), 5), checkpoint=checkpoint)
    found = hg.hypergradient(problem, estimator)(w, alpha)
    np.testing.assert_allclose(found.value, value(alpha), rtol=1e-13)
    assert error(found.hypergradient, central(value, alpha)) < 1e-9
    assert error(found.hypergradient["start"], central(value, alpha)["start"]) < 1e-9


def test_truncation_cuts_the_start_and_the_early_steps():
    """truncation_length=2 of 5: central differences of two steps from where the first three led."""
    known = any_known("ridge per-weight")
    inner = lambda w, alpha, batch: ridge_penalty(w, alpha["penalty"], batch)
    data = known.problem.inner_data, known.problem.outer_data
    begin = lambda w, alpha: w + jnp.tanh(alpha["penalty"])
    problem = hg.Bilevel(inner, ridge_outer, *data, init_fn=begin)
    alpha = {"penalty": known.alpha}
    third = sgd_by_hand(problem, begin(known.w, alpha), alpha, [0.3] * 3)

    @jax.jit
    def value(alpha):
        return ridge_outer(sgd_by_hand(problem, third, alpha, [0.3] * 2), None, data[1])

    for checkpoint in (True, False):
        solver = hg.Descent(sgd(0.3), 5)
        estimator = hg.Unrolled(solver, truncation_length=2, checkpoint=checkpoint)
        found = hg.hypergradient(problem, estimator)(known.w, alpha)
        np.testing.assert_allclose(found.value, value(alpha), rtol=1e-13)
        assert error(found.hypergradient, central(value, alpha)) < 1e-9


def test_a_start_is_made_anew_at_each_estimate():
    """With start=, the state of the second estimate is that of the first."""
    known = any_known("ridge per-weight")
    begin = lambda w, alpha: w + alpha
    problem = hg.Bilevel(
        ridge_penalty,
        ridge_outer,
        known.problem.inner_data,
        known.problem.outer_data,
        init_fn=begin,
    )
    key = jax.random.key(0)
    for estimator in (
        hg.Unrolled(hg.Descent(sgd(0.3), 5)),
        hg.Implicit(hg.Descent(sgd(0.3), 5)),
    ):
        estimate = jax.jit(functools.partial(estimator.estimate, problem))
        state = estimator.init(problem, known.w, known.alpha)
        first, state = estimate(state, known.alpha, key)
        second, _ = estimate(state, known.alpha, key)
        assert error(second.w, first.w) < 1e-15


RATES = {
    "rate and momentum": lambda alpha: optax.sgd(alpha["rate"], momentum=alpha["mu"]),
    "adam": lambda alpha: optax.adam(alpha["rate"], b1=alpha["mu"]),
    "callable schedule": lambda alpha: optax.sgd(
        lambda count: alpha["rate"] / (1 + alpha["mu"] * count)
    ),
}


@pytest.mark.parametrize("name", RATES)
def test_learning_rates_are_hyperparameters(name: str):
    """Central differences of the value that the same optimizer reaches in a loop."""
    known = any_known("ridge scalar")
    data = known.problem.inner_data
    inner = lambda w, alpha, batch: ridge_penalty(w, alpha["penalty"], batch)
    problem = hg.Bilevel(inner, ridge_outer, data, known.problem.outer_data)
    alpha = {
        "rate": jnp.array(0.2),
        "mu": jnp.array(0.5),
        "penalty": jnp.array(-1.0),
    }

    @jax.jit
    def value(alpha):
        optimizer, w = RATES[name](alpha), known.w
        state = optimizer.init(w)
        for _ in range(6):
            g = jax.grad(inner)(w, alpha, data)
            updates, state = optimizer.update(g, state, w)
            w = optax.apply_updates(w, updates)
        return ridge_outer(w, alpha, known.problem.outer_data)

    estimator = hg.Unrolled(hg.Descent(RATES[name], 6))
    found = hg.hypergradient(problem, estimator)(known.w, alpha)
    np.testing.assert_allclose(found.value, value(alpha), rtol=1e-12)
    assert error(found.hypergradient, central(value, alpha)) < 1e-6
    for leaf in ("rate", "mu"):
        slope = central(value, alpha)[leaf]
        np.testing.assert_allclose(found.hypergradient[leaf], slope, rtol=1e-6)


def test_a_schedule_with_a_rate_a_step():
    """dw_T/d eta_t = -h w_0 prod_{s != t} (1 - eta_s h) on h w^2/2."""
    h, w0 = 0.8, 1.5
    inner = lambda w, alpha, batch: 0.5 * h * w**2
    outer = lambda w, alpha, batch: w
    rates = jnp.array([0.3, 0.5, 0.1, 0.7, 0.2, 0.9, 0.4])
    optimizer = lambda alpha: optax.sgd(lambda count: alpha[count])
    estimator = hg.Unrolled(hg.Descent(optimizer, 7))
    found = hg.hypergradient(hg.Bilevel(inner, outer), estimator)(w0, rates)
    factors = 1 - np.asarray(rates) * h
    exact = jnp.array([-h * w0 * np.prod(np.delete(factors, t)) for t in range(7)])
    assert error(found.hypergradient, exact) < 1e-13


def test_what_no_loss_reads_is_refused_by_implicit():
    """A rate that enters only the optimizer has no implicit derivative; not a zero."""
    inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha["a"]) ** 2)
    outer = lambda w, alpha, batch: jnp.sum(w**2)
    solver = hg.Descent(lambda alpha: optax.sgd(alpha["rate"]), 50)
    alpha = {"a": jnp.ones(2), "rate": jnp.array(0.5)}
    problem = hg.Bilevel(inner, outer)
    with pytest.raises(ValueError, match=r"neither loss reads alpha\['rate'\]"):
        hg.hypergradient(problem, hg.Implicit(solver))(jnp.zeros(2), alpha)


# Random data.


def test_draw_gives_each_estimate_its_own_episode():
    """Three tasks: every estimate is one of their closed forms, and all occur."""
    tasks = [ridge("per-weight", seed) for seed in range(3)]
    stacked = jax.tree.map(
        lambda *leaves: jnp.stack(leaves),
        *[(task.problem.inner_data, task.problem.outer_data) for task in tasks],
    )
    sample = lambda tasks, key: jax.tree.map(
        lambda leaf: leaf[jax.random.randint(key, (), 0, 3)], tasks
    )
    draw = jax.tree_util.Partial(sample, stacked)
    problem = hg.Bilevel(ridge_penalty, ridge_outer, data_fn=draw)
    alpha = tasks[0].alpha
    closed_forms = [task.exact(alpha) for task in tasks]
    solver = converged(tasks[0], 600)
    for estimator in (hg.Implicit(solver), hg.Unrolled(solver)):
        gradient = hg.hypergradient(problem, estimator)
        seen = set()
        for seed in range(12):
            found = gradient(jnp.zeros(6), alpha, jax.random.key(seed)).hypergradient
            errors = [error(found, exact) for exact in closed_forms]
            assert min(errors) < 1e-9
            seen.add(int(np.argmin(errors)))
        assert seen == {0, 1, 2}


N_SMALL = 5


def small_ridge() -> tuple[hg.Bilevel, Known]:
    """Five examples with a weight each, so that an estimate shows whom it saw."""
    known = ridge("per-example", seed=1, n=N_SMALL, d=3)
    batched = lambda data: hg.Batches(data)
    problem = hg.Bilevel(
        ridge_weights,
        ridge_outer,
        batched(known.problem.inner_data),
        batched(known.problem.outer_data),
    )
    return problem, known


def by_example(known: Known, inner: int | None, outer: int | None) -> np.ndarray:
    """The hypergradient with H and J of one inner, b of one outer example."""
    alpha = np.asarray(known.alpha)
    w = np.asarray(known.best(known.alpha))
    rows = np.arange(N_SMALL)
    mine = rows if inner is None else np.array([inner])
    theirs = rows if outer is None else np.array([outer])
    x, y = (np.asarray(known.problem.inner_data[name]) for name in "xy")
    x_val, y_val = (np.asarray(known.problem.outer_data[name]) for name in "xy")
    g = x_val[theirs].T @ (x_val[theirs] @ w - y_val[theirs]) / len(theirs)
    H = (x[mine].T * alpha[mine]) @ x[mine] / len(mine) + 0.1 * np.eye(3)
    out = np.zeros(N_SMALL)
    out[mine] = (y[mine] - x[mine] @ w) * (x[mine] @ np.linalg.solve(H, g)) / len(mine)
    return out


@pytest.mark.parametrize("which", ["adjoint", "outer", "both"])
def test_held_batches_are_unbiased_over_all_draws(which: str):
    """Batches of one: each estimate is one example's closed form, all equally often.

    H and J come from one example, drawn once; for the outer batch the mean over
    examples is the full hypergradient, in which dM/dw enters linearly.
    """
    problem, known = small_ridge()
    solver = hg.Descent(sgd(known.step), 400)
    sizes = {
        "adjoint": {"adjoint_batch_size": 1},
        "outer": {"outer_batch_size": 1},
        "both": {"adjoint_batch_size": 1, "outer_batch_size": 1},
    }[which]
    gradient = hg.hypergradient(problem, hg.Implicit(solver, **sizes))
    num_keys = 400
    keys = jax.random.split(jax.random.key(3), num_keys)
    one = lambda key: gradient(known.w, known.alpha, key).hypergradient
    found = np.asarray(jax.vmap(one)(keys))
    examples = range(N_SMALL)
    cases = {
        "adjoint": [(i, None) for i in examples],
        "outer": [(None, j) for j in examples],
        "both": [(i, j) for i in examples for j in examples],
    }[which]
    forms = np.array([by_example(known, *case) for case in cases])
    distance = np.linalg.norm(found[:, None] - forms[None], axis=-1)
    assert np.all(distance.min(axis=1) < 1e-9 * np.linalg.norm(forms, axis=-1).max())
    counts = np.bincount(distance.argmin(axis=1), minlength=len(cases))
    share = 1 / len(cases)
    spread = np.sqrt(num_keys * share * (1 - share))
    assert np.all(np.abs(counts - num_keys * share) < 4 * spread)
    if which == "outer":
        full = np.asarray(known.exact(known.alpha))
        np.testing.assert_allclose(forms.mean(axis=0), full, rtol=1e-9)


def test_unrolled_outer_batch_is_unbiased_over_all_draws():
    """The mean over single outer examples is the full hypergradient."""
    problem, known = small_ridge()
    solver = hg.Descent(sgd(known.step), 400)
    gradient = hg.hypergradient(problem, hg.Unrolled(solver, outer_batch_size=1))
    keys = jax.random.split(jax.random.key(3), 60)
    one = lambda key: gradient(known.w, known.alpha, key).hypergradient
    found = np.asarray(jax.vmap(one)(keys))
    forms = np.array([by_example(known, None, j) for j in range(N_SMALL)])
    distance = np.linalg.norm(found[:, None] - forms[None], axis=-1)
    assert np.all(distance.min(axis=1) < 1e-9)
    assert set(distance.argmin(axis=1)) == set(range(N_SMALL))


@pytest.mark.parametrize("kind", [hg.Implicit, hg.Unrolled])
def test_every_inner_step_draws_afresh(kind):
    """Steps 1/(t+1) on |w - e_i|^2/2 leave in w how often each of five was drawn."""
    inner = lambda w, alpha, x: 0.5 * jnp.sum((w[None] - x) ** 2) + 0 * alpha
    outer = lambda w, alpha, x: jnp.sum(w)
    problem = hg.Bilevel(inner, outer, hg.Batches(jnp.eye(5), 1))
    solver = hg.Descent(optax.sgd(lambda count: 1 / (count + 1.0)), 90)
    gradient = hg.hypergradient(problem, kind(solver))
    drawn = []
    for seed in range(3):
        counts = 90 * np.asarray(gradient(jnp.zeros(5), 0.0, jax.random.key(seed)).w)
        np.testing.assert_allclose(counts, np.round(counts), atol=1e-3)
        assert np.sum(counts) == pytest.approx(90, abs=1e-3)
        assert np.all((counts > 4) & (counts < 36))  # 18 expected, spread 3.8
        drawn.append(tuple(np.round(counts)))
    assert len(set(drawn)) > 1


def noisy_inner(w, alpha, batch):
    """Keyed batches: multiplicative noise on the inputs, fresh in each batch."""
    data, key = batch
    noise = 1 + 0.3 * jax.random.normal(key, data["x"].shape)
    return ridge_penalty(w, alpha, data | {"x": data["x"] * noise})


@pytest.mark.parametrize("keyed", [False, True])
def test_same_key_same_estimate_to_the_bit(keyed: bool):
    """Mini-batches, keyed or not, in the inner loop, the adjoint, the outer loss."""
    known = any_known("ridge per-weight")
    loss = noisy_inner if keyed else ridge_penalty
    train = hg.Batches(known.problem.inner_data, 8, with_key=keyed)
    val = hg.Batches(known.problem.outer_data)
    problem = hg.Bilevel(loss, ridge_outer, train, val)
    solver = hg.Descent(sgd(0.1), 20)
    for estimator in (
        hg.Implicit(solver, adjoint_batch_size=30, outer_batch_size=7),
        hg.Unrolled(solver, outer_batch_size=7),
    ):
        gradient = hg.hypergradient(problem, estimator)
        first, again, other = (
            gradient(known.w, known.alpha, jax.random.key(seed)) for seed in (1, 1, 2)
        )
        assert np.array_equal(first.hypergradient, again.hypergradient)
        assert np.array_equal(first.w, again.w)
        assert not np.array_equal(first.w, other.w)
        assert not np.array_equal(first.hypergradient, other.hypergradient)


def test_every_product_of_a_solve_sees_one_batch_and_one_key():
    """Else conjugate gradients could not reach a residual of 1e-10."""
    known = any_known("ridge per-weight")
    train = hg.Batches(known.problem.inner_data, 8, with_key=True)
    problem = hg.Bilevel(noisy_inner, ridge_outer, train, known.problem.outer_data)
    for size in (None, 20):
        estimator = hg.Implicit(hg.Descent(sgd(0.1), 5), adjoint_batch_size=size)
        found = hg.hypergradient(problem, estimator)(known.w, known.alpha)
        assert found.stats["adjoint_residual"] < 1e-10


@pytest.mark.parametrize("keyed", [False, True])
def test_unrolled_differentiates_the_run_that_was_made(keyed: bool):
    """Mini-batches: central differences of the value, at the same key."""
    known = any_known("ridge scalar")
    loss = noisy_inner if keyed else ridge_penalty
    train = hg.Batches(known.problem.inner_data, 8, with_key=keyed)
    problem = hg.Bilevel(loss, ridge_outer, train, known.problem.outer_data)
    gradient = hg.hypergradient(problem, hg.Unrolled(hg.Descent(sgd(0.1), 20)))
    key = jax.random.key(5)
    value = lambda alpha: gradient(known.w, alpha, key).value
    found = gradient(known.w, known.alpha, key).hypergradient
    assert error(found, central(value, known.alpha, 1e-2)) < 1e-8


@pytest.mark.parametrize("kind", [hg.Implicit, hg.Unrolled])
def test_the_outer_loss_sees_all_examples_unless_told(kind):
    """A batch size of the outer data is for others: value and gradient are of all."""
    known = any_known("ridge per-weight")
    val = hg.Batches(known.problem.outer_data, 7)
    problem = hg.Bilevel(ridge_penalty, ridge_outer, known.problem.inner_data, val)
    found = hg.hypergradient(problem, kind(converged(known)))(known.w, known.alpha)
    assert error(found.hypergradient, known.exact(known.alpha)) < 1e-9


# The ledger.


def ledger_problem(batch_size: int | None) -> tuple[hg.Bilevel, Known]:
    known = any_known("ridge per-weight")
    train = hg.Batches(known.problem.inner_data, batch_size)
    half = jax.tree.map(lambda x: x[:20], known.problem.outer_data)
    return hg.Bilevel(ridge_penalty, ridge_outer, train, hg.Batches(half)), known


def total(stats, outer_share: float = 20 / 40) -> float:
    """Gradient-equivalents by hand from the counts."""
    outer = stats["num_outer_grads"] + stats["num_outer_values"] / 3
    inner = stats["num_grads"] + 2 * stats["num_hvps"] + stats["num_values"] / 3
    return float(inner + outer_share * outer)


@pytest.mark.parametrize("batch_size", [None, 10])
@pytest.mark.parametrize("adjoint", [None, 8])
@pytest.mark.parametrize("outer", [None, 5])
def test_the_ledger_of_implicit(batch_size, adjoint, outer):
    """T gradients, K - 1 + 1 products (a K-term series) and two outer gradients."""
    problem, known = ledger_problem(batch_size)
    estimator = hg.Implicit(
        hg.Descent(sgd(0.3), 12),
        hg.Neumann(5, 0.3),
        adjoint_batch_size=adjoint,
        outer_batch_size=outer,
    )
    stats = hg.hypergradient(problem, estimator)(known.w, known.alpha).stats
    stats = {name: float(x) for name, x in stats.items()}
    assert stats["num_grads"] == pytest.approx(12 * (batch_size or 40) / 40)
    assert stats["num_hvps"] == pytest.approx(5 * (adjoint or 40) / 40)
    assert stats["num_outer_grads"] == pytest.approx(2 * (outer or 20) / 20)
    assert stats["num_values"] == stats["num_outer_values"] == 0
    assert stats["gradient_equivalents"] == pytest.approx(total(stats))


@pytest.mark.parametrize(
    ("num_steps", "last", "checkpoint", "again"),
    [
        (16, None, False, 0),
        (16, None, True, 16),
        (16, 5, False, 0),
        (16, 8, True, 8),  # the early steps are not run again
        (16, 9, True, 8),  # two halves of four, and one step between
        (16, 5, True, 0),  # halves too short for a segment
        (16, 99, True, 16),
        (3, None, True, 0),  # too short for a segment
    ],
)
def test_the_ledger_of_unrolled(num_steps, last, checkpoint, again):
    """T gradients, those run again for checkpoints, one for the residual; K products.

    How many run again is counted in the program: a tanh marks each gradient.
    """
    problem, known = ledger_problem(10)
    marked = lambda w, alpha, batch: ridge_penalty(w, alpha, batch) + jnp.tanh(w[0])
    problem = hg.Bilevel(marked, ridge_outer, problem.inner_data, problem.outer_data)
    solver = hg.Descent(sgd(0.3), num_steps)
    estimator = hg.Unrolled(solver, truncation_length=last, checkpoint=checkpoint)
    gradient = hg.hypergradient(problem, estimator)
    program = jax.make_jaxpr(lambda w, a: gradient(w, a).hypergradient)
    in_program = count("tanh", program(known.w, known.alpha).jaxpr)
    assert in_program - 1 == num_steps + again
    stats = gradient(known.w, known.alpha).stats
    assert stats["num_grads"] == pytest.approx((num_steps + again) / 4 + 1)
    assert stats["num_hvps"] == pytest.approx(min(last or num_steps, num_steps) / 4)
    assert stats["num_outer_grads"] == 1
    assert stats["gradient_equivalents"] == pytest.approx(total(stats))


def count(primitive: str, jaxpr) -> int:
    """How often a program runs a primitive, each scan as often as it is long."""
    number = 0
    for equation in jaxpr.eqns:
        number += equation.primitive.name == primitive
        times = equation.params.get("length", 1)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    number += times * count(primitive, inner)
    return number


def counted(known: Known, calls: list[int]) -> hg.Bilevel:
    """The problem with an inner loss that counts its evaluations as they run."""

    def tick():
        calls[0] += 1

    def inner(w, alpha, batch):
        jax.debug.callback(tick)
        return known.problem.inner_loss(w, alpha, batch)

    data = known.problem.inner_data, known.problem.outer_data
    return hg.Bilevel(inner, known.problem.outer_loss, *data)


@pytest.mark.parametrize(
    ("solver", "linear"),
    [
        (hg.Descent(sgd(0.3), 9), hg.CG()),
        (hg.Newton(), hg.CG()),
        (hg.LBFGS(), hg.CG()),
        (hg.Descent(sgd(0.3), 9), hg.Neumann(7)),
        (hg.Descent(sgd(0.3), 9), hg.Neumann(7, 0.3)),
        (hg.Descent(sgd(0.3), 9), hg.Identity()),
        (hg.Descent(sgd(0.3), 9), lx.GMRES(rtol=1e-12, atol=1e-12)),
        (hg.Descent(sgd(0.3), 9), lx.BiCGStab(rtol=1e-12, atol=1e-12)),
    ],
    ids=[
        "CG",
        "Newton",
        "LBFGS",
        "Neumann",
        "Neumann step",
        "Identity",
        "GMRES",
        "BiCGStab",
    ],
)
def test_the_ledger_counts_what_runs(solver, linear):
    """Evaluations of the inner loss, counted by a callback as the program runs."""
    known = any_known("logistic per-weight")
    calls = [0]
    gradient = hg.hypergradient(counted(known, calls), hg.Implicit(solver, linear))
    jax.block_until_ready(gradient(known.w, known.alpha))
    jax.effects_barrier()
    calls[0] = 0
    found = jax.block_until_ready(gradient(known.w, known.alpha))
    jax.effects_barrier()
    counted_calls = sum(spent(found, *PRODUCTS))
    if isinstance(linear, lx.GMRES | lx.BiCGStab):  # from their steps: an upper bound
        assert calls[0] <= counted_calls <= 2 * calls[0]
    else:
        assert counted_calls == calls[0]


def test_the_ledger_of_a_warm_start():
    """Each warm solve pays one product for its starting residual, counted too."""
    known = any_known("logistic per-weight")
    calls = [0]
    problem = counted(known, calls)
    estimator = hg.Implicit(hg.Newton())
    step = jax.jit(lambda *state: estimator.estimate(problem, *state))
    state = estimator.init(problem, known.w, known.alpha)
    for shift in (0.0, 0.0, 0.1, 0.2):
        jax.effects_barrier()
        calls[0] = 0
        found, state = step(state, known.alpha + shift, jax.random.key(0))
        jax.block_until_ready(found)
        jax.effects_barrier()
        assert sum(spent(found, *PRODUCTS)) == calls[0]


def test_the_ledger_of_several_losses():
    """Three outer losses: three solves of 5 products; two gradients of each."""
    problem, known = ledger_problem(None)
    losses = (ridge_outer, ridge_penalty, ridge_outer)
    problem = hg.Bilevel(ridge_penalty, losses, problem.inner_data, problem.outer_data)
    solver = hg.Descent(sgd(0.3), 12)
    stats = hg.hypergradient(problem, hg.Implicit(solver, hg.Neumann(5, 0.3)))(
        known.w, known.alpha
    ).stats
    assert stats["num_hvps"] == 15
    assert stats["num_outer_grads"] == 6
    stats = hg.hypergradient(problem, hg.Unrolled(solver, checkpoint=False))(
        known.w, known.alpha
    ).stats
    assert stats["num_hvps"] == 36
    assert stats["num_outer_grads"] == 3


@pytest.mark.parametrize(
    ("linear", "products"),
    [
        (hg.Neumann(5), 10 + 3 * 4 + 3),  # power iterations once, 4 each, 1 each
        (hg.Nystrom(4), 4 + 3),
        (lx.LU(), 6 + 3),
    ],
)
def test_what_several_losses_share_counts_once(linear, products):
    """A sketch, a step size, a dense matrix: made once for three right-hand sides."""
    problem, known = ledger_problem(None)
    losses = (ridge_outer, ridge_penalty, ridge_outer)
    problem = hg.Bilevel(ridge_penalty, losses, problem.inner_data, problem.outer_data)
    estimator = hg.Implicit(hg.Descent(sgd(0.3), 12), linear)
    stats = hg.hypergradient(problem, estimator)(known.w, known.alpha).stats
    assert stats["num_hvps"] == products


def test_an_outer_gradient_costs_its_examples():
    """A penalty beside the examples counts for nothing, a batch that is a key for 1."""
    inner = lambda w, alpha, batch: 0.5 * jnp.mean((w - alpha - batch["x"]) ** 2)
    outer = lambda w, alpha, batch: 0.5 * jnp.mean((w - batch) ** 2)
    train, val = {"x": jnp.ones(100), "penalty": jnp.asarray(0.1)}, jnp.ones(20)
    estimator = hg.Implicit(hg.Descent(sgd(0.5), 10), hg.Identity())
    cost = lambda problem: float(
        hg.hypergradient(problem, estimator)(0.0, 0.0).stats["gradient_equivalents"]
    )
    assert cost(hg.Bilevel(inner, outer, train, val)) == 10 + 2 + 2 * 20 / 100
    rollout = lambda w, alpha, key: 0.5 * (w - alpha) ** 2
    simulated = hg.Bilevel(rollout, outer, hg.Batches(None, with_key=True), val)
    assert cost(simulated) == 10 + 2 + 2


def test_the_worst_of_several_losses_decides():
    """One b is solved, the other meets what its solver cannot: not trusted."""
    inner = lambda w, alpha, batch: 0.5 * w @ (batch["h"] * w) - w @ alpha
    first = lambda w, alpha, batch: w[0]
    both = lambda w, alpha, batch: jnp.sum(w)
    at = lambda h, losses, linear: hg.hypergradient(
        hg.Bilevel(inner, losses, {"h": jnp.array(h)}),
        hg.Implicit(hg.ClosedForm(lambda alpha, batch: alpha / batch["h"]), linear),
    )(jnp.zeros(2), jnp.ones(2))
    for losses in ((first, both), (both, first)):
        # one CG step solves e_0 but not e_0 + e_1; curvature is negative along e_1
        cut = at([1.0, 5.0], losses, hg.CG(max_steps=1))
        assert cut.stats["adjoint_residual"] > 0.1
        assert not cut.stats["trusted"]
        assert not at([1.0, -5.0], losses, hg.CG()).stats["trusted"]
    assert at([1.0, 5.0], (first, first), hg.CG(max_steps=1)).stats["trusted"]


# Published numbers.

GRAZZI = {
    ("CG", 1): 3.33e-2,
    ("CG", 5): 1.71e-6,
    ("Neumann", 1): 8.76e-1,
    ("Neumann", 5): 5.16e-1,
    ("Neumann", 10): 2.67e-1,
    ("Neumann", 25): 3.72e-2,
    ("Neumann", 50): 1.45e-3,
    ("last", 1): 8.76e-1,
    ("last", 5): 5.16e-1,
    ("last", 10): 2.67e-1,
    ("last", 25): 3.72e-2,
    ("last", 50): 1.46e-3,
}


@functools.cache
def grazzi() -> tuple[Known, jax.Array]:
    known = hypertorch()
    return known, known.exact(known.alpha)


@pytest.mark.parametrize(("method", "num"), GRAZZI)
def test_the_logistic_problem_of_grazzi_2020(method: str, num: int):
    """Errors at T = 100 from a NumPy re-run of hypertorch's notebook, within 2%."""
    known, exact = grazzi()
    solver = hg.Descent(sgd(0.1), 100)
    estimator = {
        "CG": lambda: hg.Implicit(solver, hg.CG(max_steps=num)),
        "Neumann": lambda: hg.Implicit(solver, hg.Neumann(num, 0.1)),
        "last": lambda: hg.Unrolled(solver, truncation_length=num),
    }[method]()
    found = estimate(known, estimator)
    assert np.linalg.norm(exact) == pytest.approx(0.0285658, rel=1e-5)
    assert float(found.value) == pytest.approx(0.574399, rel=1e-6)
    assert error(found.hypergradient, exact) == pytest.approx(
        GRAZZI[method, num], rel=0.02
    )
