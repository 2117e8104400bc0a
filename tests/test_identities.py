"""Estimators against each other: where theory says equal, equal; and the rates."""

import functools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks.known import (
    Known,
    any_known,
    cast,
    dense,
    error,
    flat,
    quadratic,
    quadratic_inner,
    quadratic_outer,
)


@functools.cache
def sgd(step: float) -> optax.GradientTransformation:
    return optax.sgd(step)


def gradient(known: Known, estimator, w=None) -> jax.Array:
    w = known.w if w is None else w
    found = hg.hypergradient(known.problem, estimator)(w, known.alpha)
    return found.hypergradient


@pytest.mark.parametrize(
    "name",
    ["ridge per-weight", "logistic per-weight", "smd 3 tilted", "quadratic nested"],
)
def test_all_roads_lead_to_the_closed_form(name: str):
    """CG, GMRES, dense, a long series, full unroll, argmin: pairwise and the truth."""
    known = any_known(name)
    solver = hg.Descent(sgd(known.step), 600)
    solution = hg.argmin(known.problem.inner_loss, solver)

    def value(alpha):
        w = solution(known.w, alpha, known.problem.inner_data)
        return known.problem.outer_value(w, alpha, known.problem.outer_data)

    roads = {
        "closed form": known.exact(known.alpha),
        "CG": gradient(known, hg.Implicit(solver)),
        "GMRES": gradient(known, hg.Implicit(solver, lx.GMRES(rtol=1e-13, atol=1e-13))),
        "dense": gradient(known, hg.Implicit(solver, lx.LU())),
        "series": gradient(known, hg.Implicit(solver, hg.Neumann(600, known.step))),
        "unroll": gradient(known, hg.Unrolled(solver)),
        "argmin": jax.jit(jax.grad(value))(known.alpha),
    }
    for one in roads:
        for other in roads:
            assert error(roads[one], roads[other]) < 1e-10, (one, other)


@pytest.mark.parametrize("num_terms", [1, 2, 5, 17])
@pytest.mark.parametrize(
    "name", ["quadratic 30", "quadratic nested", "logistic per-weight"]
)
def test_a_series_is_the_truncated_unroll(name: str, num_terms: int):
    """At a stationary point K terms are the last K steps of gradient descent there."""
    known = any_known(name)
    best = dense(known.problem, known.w, known.alpha)["w"]
    for step in (known.step, 0.3 * known.step):
        solver = hg.Descent(sgd(step), num_terms + 3)
        series = gradient(known, hg.Implicit(solver, hg.Neumann(num_terms, step)), best)
        for checkpoint in (True, False):
            estimator = hg.Unrolled(
                solver, truncation_length=num_terms, checkpoint=checkpoint
            )
            assert error(gradient(known, estimator, best), series) < 1e-12
        if num_terms < 5:  # and neither is the full derivative yet
            assert error(series, known.exact(known.alpha)) > 1e-6


@pytest.mark.parametrize("num_steps", [1, 3, 4, 16, 50, 97])
@pytest.mark.parametrize("last", [None, 7])
def test_checkpoints_change_nothing(num_steps: int, last: int | None):
    """The same derivative with and without, at squares, primes and short runs."""
    known = any_known("logistic per-weight")
    solver = hg.Descent(optax.sgd(0.05, momentum=0.9), num_steps)
    w = jnp.linspace(-1, 1, 6)
    found = [
        gradient(
            known, hg.Unrolled(solver, truncation_length=last, checkpoint=checkpoint), w
        )
        for checkpoint in (True, False)
    ]
    assert error(*found) < 1e-12


@pytest.mark.parametrize("last", [40, 100])
def test_last_beyond_the_run_is_the_full_unroll(last: int):
    """And is trusted as such."""
    known = any_known("ridge scalar")
    solver = hg.Descent(sgd(0.1), 40)
    full = hg.hypergradient(known.problem, hg.Unrolled(solver))
    cut = hg.hypergradient(known.problem, hg.Unrolled(solver, truncation_length=last))
    one, other = (f(known.w, known.alpha) for f in (full, cut))
    assert error(one.hypergradient, other.hypergradient) < 1e-14
    assert one.stats["trusted"]
    assert other.stats["trusted"]


def test_no_steps_leave_the_direct_term():
    """T = 0: w does not depend on alpha."""
    known = quadratic("2")
    estimator = hg.Unrolled(hg.Descent(sgd(0.1), 0))
    found = gradient(known, estimator)
    exact = jax.grad(quadratic_outer, argnums=1)(
        known.w, known.alpha, known.problem.outer_data
    )
    assert error(found, exact) < 1e-15


def slope(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.polyfit(x, y, 1)[0])


@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.95])
def test_the_error_of_the_series_falls_as_q_to_the_k(fraction: float):
    """q = max |1 - step lambda|, by the slope of log error over K = 20..60."""
    known = quadratic("30", seed=1)
    ends = np.linalg.eigvalsh(known.hessian)[[0, -1]]
    step = fraction * 2 / ends.sum()
    q = np.abs(1 - step * ends).max()
    exact = known.exact(known.alpha)
    solver = hg.ClosedForm(
        lambda a, batch: jnp.linalg.solve(batch["H"], batch["C"] @ a)
    )
    terms = np.array([20, 40, 60])
    errors = [
        error(gradient(known, hg.Implicit(solver, hg.Neumann(int(k), step))), exact)
        for k in terms
    ]
    assert slope(terms, np.log(errors)) == pytest.approx(np.log(q), rel=0.05)


def test_the_error_of_truncation_falls_as_q_to_the_k():
    """The same rate for the last K steps at a converged point."""
    known = quadratic("30", seed=1)
    ends = np.linalg.eigvalsh(known.hessian)[[0, -1]]
    step = 1.2 / ends.sum()
    q = np.abs(1 - step * ends).max()
    exact, best = known.exact(known.alpha), known.best(known.alpha)
    terms = np.array([20, 40, 60])
    errors = [
        error(
            gradient(
                known,
                hg.Unrolled(hg.Descent(sgd(step), 70), truncation_length=int(k)),
                best,
            ),
            exact,
        )
        for k in terms
    ]
    assert slope(terms, np.log(errors)) == pytest.approx(np.log(q), rel=0.05)


def test_the_bias_of_an_early_stop_is_linear_in_the_inner_error():
    """Implicit is first order in ||w - w*||: slope 1 of log error over log distance."""
    known = any_known("logistic per-weight")
    best, exact = known.best(known.alpha), known.exact(known.alpha)
    estimator = hg.Implicit(hg.ClosedForm(lambda alpha, batch: batch["w"]))
    direction = np.random.default_rng(0).normal(size=best.shape)
    sizes, errors = np.logspace(-6, -3, 4), []
    for size in sizes:
        data = known.problem.inner_data | {"w": best + size * direction}
        problem = hg.Bilevel(
            known.problem.inner_loss,
            known.problem.outer_loss,
            data,
            known.problem.outer_data,
        )
        found = hg.hypergradient(problem, estimator)(known.w, known.alpha)
        errors.append(error(found.hypergradient, exact))
    assert slope(np.log(sizes), np.log(errors)) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("bound", [3, 6, 10])
def test_conjugate_gradients_keep_their_bound(bound: int):
    """||v_k - v||_H <= 2 ((sqrt kappa - 1)/(sqrt kappa + 1))^k ||v||_H, J = -H.

    With C = H the adjoint itself is read off the hypergradient: dM/dalpha = H v.
    """
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(40, 40)))
    H = basis * np.linspace(1, 50, 40) @ basis.T
    data = {"H": H, "C": np.eye(40), "t": rng.normal(size=40), "k": np.zeros(40)}
    problem = hg.Bilevel(quadratic_inner, quadratic_outer, data, data)
    solver = hg.ClosedForm(lambda a, batch: jnp.linalg.solve(batch["H"], a))
    alpha = jnp.array(rng.normal(size=40))
    estimator = hg.Implicit(solver, hg.CG(max_steps=bound))
    v = hg.hypergradient(problem, estimator)(jnp.zeros(40), alpha).hypergradient
    exact = np.linalg.solve(H, np.linalg.solve(H, alpha) - data["t"])
    norm = lambda x: np.sqrt(x @ H @ x)
    root = np.sqrt(50)
    rate = (root - 1) / (root + 1)
    assert norm(v - exact) <= 2 * rate**bound * norm(exact)


@pytest.mark.parametrize(
    "linear", [hg.CG(1e-8), hg.NystromCG(rank=2, rtol=1e-8)], ids=["CG", "NystromCG"]
)
def test_a_warm_start_takes_fewer_products_than_a_cold_one(linear):
    """A second estimate nearby; one at the same alpha needs its residual only."""
    known = quadratic("30", seed=7)
    solver = hg.ClosedForm(
        lambda a, batch: jnp.linalg.solve(batch["H"], batch["C"] @ a)
    )
    products = {}
    for warm in (True, False):
        estimator = hg.Implicit(solver, linear, warm_start=warm)
        state = estimator.init(known.problem, known.w, known.alpha)
        step = jax.jit(functools.partial(estimator.estimate, known.problem))
        counts = []
        for alpha in (known.alpha, known.alpha * (1 + 1e-4), known.alpha * (1 + 1e-4)):
            found, state = step(state, alpha, jax.random.key(0))
            counts.append(float(found.stats["num_hvps"]))
            assert error(found.hypergradient, known.exact(alpha)) < 1e-6
        products[warm] = counts
    rank = getattr(linear, "rank", 0)
    assert products[True][1] < products[False][1] - 5
    assert products[True][2] == rank + 2  # the start's residual and the cross term
    assert products[False][0] == products[False][1] == products[False][2]


def test_a_warm_start_of_w_continues_the_inner_run():
    """Five estimates of 20 steps are one of 100; cold ones repeat the first."""
    known = any_known("ridge scalar")
    for kind in (hg.Implicit, hg.Unrolled):
        for warm in (True, False):
            estimator = kind(hg.Descent(sgd(0.05), 20), warm_start=warm)
            state = estimator.init(known.problem, known.w, known.alpha)
            step = jax.jit(functools.partial(estimator.estimate, known.problem))
            for _ in range(5):
                found, state = step(state, known.alpha, jax.random.key(0))
            long = kind(hg.Descent(sgd(0.05), 100 if warm else 20))
            alone = hg.hypergradient(known.problem, long)(known.w, known.alpha)
            assert error(found.w, alone.w) < 1e-12


def test_the_arrangement_of_the_pytree_does_not_matter():
    """w as nested dicts and lists, or as one vector: the same numbers."""
    nested = quadratic("nested", seed=3)
    data = nested.problem.inner_data
    vector = hg.Bilevel(quadratic_inner, quadratic_outer, data, data)
    w, alpha = flat(nested.w), flat(nested.alpha)
    solver = hg.Descent(sgd(nested.step), 20)
    for estimator in (
        hg.Implicit(solver),
        hg.Implicit(solver, lx.LU()),
        hg.Implicit(solver, hg.NystromCG(2)),
        hg.Implicit(solver, hg.Neumann(4)),
        hg.Unrolled(solver, truncation_length=5),
    ):
        tree = hg.hypergradient(nested.problem, estimator)(nested.w, nested.alpha)
        line = hg.hypergradient(vector, estimator)(w, alpha)
        if not isinstance(getattr(estimator, "linear_solver", None), hg.Neumann):
            assert error(flat(tree.hypergradient), line.hypergradient) < 1e-10
        np.testing.assert_allclose(tree.value, line.value, rtol=1e-13)


def test_float32_and_float64_agree():
    """The same estimate in both, to single precision, without a cast by the caller."""
    known = any_known("logistic per-weight")
    solver = hg.Descent(sgd(known.step), 50)
    for estimator in (hg.Implicit(solver), hg.Unrolled(solver)):
        double = hg.hypergradient(known.problem, estimator)(known.w, known.alpha)
        single = hg.hypergradient(cast(known.problem, jnp.float32), estimator)(
            cast(known.w, jnp.float32), cast(known.alpha, jnp.float32)
        )
        assert error(single.hypergradient, double.hypergradient) < 1e-4


# What truncation leaves out, as its error_estimate tells.


def truncated(known, num_steps, last):
    """(true relative error, error_estimate) of ``Unrolled(truncation_length=)``."""
    solver = hg.Descent(optax.sgd(0.7 * known.step), num_steps)
    found = hg.hypergradient(
        known.problem, hg.Unrolled(solver, truncation_length=last)
    )(known.w, known.alpha)
    whole = gradient(known, hg.Unrolled(solver), known.w)
    return error(found.hypergradient, whole), float(found.stats["error_estimate"])


@pytest.mark.parametrize("last", [2, 5, 8])
def test_the_truncation_estimate_is_exact_for_one_mode(last):
    """0-d, every step contributes 0.3 of the next: a geometric series, to the end."""
    true, estimate = truncated(any_known("quadratic 0-d"), 12, last)
    assert true > 1e-5
    # relative to the truncated hypergradient, and there to the whole one
    np.testing.assert_allclose(estimate / true, 1, atol=2 * true)


def test_the_truncation_estimate_falls_as_the_error():
    """30 modes: within a factor 10 of the truth, from 0.4 to 1e-4."""
    known = any_known("quadratic 30")
    for last in (4, 9, 16, 32, 64):
        true, estimate = truncated(known, 200, last)
        assert 0.1 < estimate / true < 10, (last, true, estimate)


def test_one_step_has_no_truncation_estimate():
    """NaN: there is nothing to compare."""
    assert np.isnan(truncated(any_known("quadratic 30"), 10, 1)[1])
