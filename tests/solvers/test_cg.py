"""Tests of conjugate gradients against dense solves and optima in Krylov spaces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hypergrad as hg
from hypergrad.linear.base import solve_linear
from tests.solvers.systems import (
    BALANCED,
    EIGENVECTORS,
    SPD,
    B,
    N,
    compute,
    relative_error,
    symmetric_matrix,
)

CG = hg.CG(preconditioner=None)


def krylov_solution(H, b, k):
    """Returns the optimum in the k-th Krylov space in the H-norm, and Ritz values."""
    basis = np.zeros((len(b), 0))
    v = b
    for _ in range(k):
        for _ in range(2):
            v = v - basis @ (basis.T @ v)
        basis = np.column_stack([basis, v / np.linalg.norm(v)])
        v = H @ basis[:, -1]
    T = basis.T @ H @ basis
    return basis @ np.linalg.solve(T, basis.T @ b), np.linalg.eigvalsh(T)


@pytest.mark.parametrize("k", [1, 3, N])
def test_every_iterate_is_optimal(k):
    """Checks also the Ritz values, the rate in sqrt(kappa), cost and residual."""
    eigenvalues = np.linspace(0.1, 10.0, N)
    H = symmetric_matrix(eigenvalues)
    v, stats = compute(hg.CG(max_steps=k, preconditioner=None), H, B)
    expected, ritz_values = krylov_solution(H, B, k)
    assert relative_error(v, expected) < 1e-8
    np.testing.assert_allclose(stats["ritz_min"], ritz_values[0], rtol=1e-7)
    np.testing.assert_allclose(stats["ritz_max"], ritz_values[-1], rtol=1e-9)
    exact = np.linalg.solve(H, B)
    h_norm = lambda e: np.sqrt(e @ H @ e)
    sqrt_kappa = np.sqrt(100.0)
    rate = (sqrt_kappa - 1) / (sqrt_kappa + 1)
    assert h_norm(v - exact) <= 2 * rate**k * h_norm(exact) + 1e-9
    assert stats["num_products"] == k + 1
    assert bool(stats["is_successful"]) == (k == N)
    residual = relative_error(H @ v, B)
    np.testing.assert_allclose(stats["residual"], residual, rtol=1e-3, atol=1e-11)


@pytest.mark.parametrize("num_distinct", [1, 3])
def test_convergence_at_the_last_allowed_step_is_a_success(num_distinct):
    """The number of steps is that of distinct eigenvalues."""
    eigenvalues = np.array([1.0, 2.5, 7.0])[:num_distinct].repeat(N // num_distinct)
    H = symmetric_matrix(eigenvalues)
    v, stats = compute(hg.CG(max_steps=num_distinct, preconditioner=None), H, B)
    assert stats["is_successful"]
    assert relative_error(v, np.linalg.solve(H, B)) < 1e-9


@pytest.mark.parametrize("shape", [(), (1,), (7,)], ids=str)
def test_a_multiple_of_the_identity_takes_one_step(shape):
    """``(c I)^-1 b = b / c``; the products are that step and its residual."""
    b = jnp.asarray(np.random.default_rng(1).normal(size=shape))
    run = jax.jit(lambda c: solve_linear(CG, lambda v: c * v, b, jnp.zeros_like(b)))
    for c in (1e-6, 1.0, 3e5):
        v, stats = run(c)
        np.testing.assert_allclose(v, b / c, rtol=1e-12)
        assert stats["num_products"] <= 2
        np.testing.assert_allclose(stats["ritz_min"], c, rtol=1e-9)
        np.testing.assert_allclose(stats["ritz_max"], c, rtol=1e-9)


eigenvalue_lists = st.lists(st.floats(0.1, 1.99), min_size=N, max_size=N)


@settings(deadline=None, max_examples=60)
@given(eigenvalue_lists)
def test_a_well_conditioned_system_takes_at_most_its_dimension(eigenvalues):
    """At most 3 more products; the Ritz values approach the extreme eigenvalues."""
    H = symmetric_matrix(eigenvalues)
    v, stats = compute(CG, H, BALANCED)
    assert relative_error(v, np.linalg.solve(H, BALANCED)) < 1e-9
    assert stats["num_products"] <= N + 3
    assert not stats["negative_curvature"]
    eig_min, eig_max = np.linalg.eigvalsh(H)[[0, -1]]
    assert eig_min * (1 - 1e-7) <= stats["ritz_min"]
    assert stats["ritz_max"] <= eig_max * (1 + 1e-7)
    np.testing.assert_allclose(stats["ritz_min"], eig_min, rtol=1e-2)
    np.testing.assert_allclose(stats["ritz_max"], eig_max, rtol=1e-2)


@settings(deadline=None, max_examples=60)
@given(eigenvalue_lists, st.lists(st.booleans(), min_size=N, max_size=N))
def test_negative_curvature_is_reported_exactly_if_it_exists(eigenvalues, is_positive):
    """``b`` has a component along every eigenvector."""
    signed = np.where(is_positive, eigenvalues, -np.asarray(eigenvalues))
    v, stats = compute(CG, symmetric_matrix(signed), BALANCED)
    assert bool(stats["negative_curvature"]) == (not all(is_positive))
    assert np.isfinite(v).all()
    if not all(is_positive):
        assert stats["ritz_min"] <= 0
        assert not stats["is_successful"]


def test_a_direction_without_curvature_is_not_negative():
    """``b`` lies outside the range of ``H``: the solver stops and has no solution."""
    v, stats = compute(CG, np.diag([1.0, 0.0]), np.array([0.0, 1.0]))
    assert not stats["negative_curvature"]
    assert not stats["is_successful"]
    assert stats["ritz_min"] <= 0 or np.isnan(stats["ritz_min"])
    np.testing.assert_array_equal(v, 0.0)


def test_negative_curvature_returns_the_iterate_before():
    """That iterate is optimal in its Krylov space."""
    H = symmetric_matrix(np.append(np.linspace(1.0, 2.0, N - 1), -0.05))
    v, stats = compute(CG, H, BALANCED)
    assert stats["negative_curvature"]
    num_steps = int(stats["num_steps"]) - 1  # the last one met the curvature
    assert num_steps >= 1
    np.testing.assert_allclose(v, krylov_solution(H, BALANCED, num_steps)[0], rtol=1e-9)


@pytest.mark.parametrize("bounds", [(1e-6, 1.0), (1e-3, 1e-2)], ids=str)
@pytest.mark.parametrize("rtol", [None, 0.0], ids=str)
def test_rounding_is_not_mistaken_for_negative_curvature(rtol, bounds):
    """The system is solved to the limits of rounding, where ``p'Hp`` is noise."""
    H = symmetric_matrix(np.geomspace(*bounds, N))
    solver = hg.CG(rtol=rtol, max_steps=400, preconditioner=None)
    v, stats = compute(solver, H, BALANCED)
    assert not stats["negative_curvature"]
    assert relative_error(H @ v, BALANCED) < 1e-9


def test_a_warm_start_saves_products():
    """A start at zero costs no product, and a bad start is replaced by zero."""
    H = symmetric_matrix(np.geomspace(0.1, 10.0, N))
    solver = hg.CG(rtol=jnp.asarray(1e-6), preconditioner=None)
    exact = np.linalg.solve(H, B)
    _, cold = compute(solver, H, B, np.zeros(N))
    assert cold["num_products"] == cold["num_steps"] + 1
    v, at_solution = compute(solver, H, B, exact)
    assert relative_error(v, exact) < 1e-12
    assert at_solution["num_products"] <= 3
    v, nearby = compute(solver, H, B, exact + 1e-4 * BALANCED)
    assert relative_error(v, exact) < 1e-5
    assert nearby["num_products"] < cold["num_products"]
    _, bad = compute(solver, H, B, 1e3 * BALANCED)
    assert bad["num_products"] == cold["num_products"] + 1


def test_a_singular_system_is_solved_on_its_range():
    """The residual contains at least the part of ``b`` outside the range."""
    H = symmetric_matrix(np.append(np.zeros(3), np.linspace(1.0, 3.0, N - 3)))
    b = H @ B
    v, stats = compute(CG, H, b)
    assert relative_error(v, np.linalg.pinv(H) @ b) < 1e-9
    assert stats["residual"] < 1e-9
    outside = np.linalg.norm(EIGENVECTORS[:, :3].T @ B) / np.linalg.norm(B)
    _, stats = compute(CG, H, B)
    assert stats["residual"] >= outside * (1 - 1e-9) > 0.1
    assert not stats["is_successful"]


# Preconditioners.


@pytest.mark.parametrize("exponent", [2, 4])
def test_the_default_preconditioner_removes_the_units(exponent):
    """Units up to ``10^4`` apart; at most twice the products of a balanced system."""
    solver, balanced = hg.CG(), symmetric_matrix(np.linspace(0.5, 2.0, N))
    rng = np.random.default_rng(3)
    for _ in range(10):
        units = 10 ** rng.uniform(-exponent, exponent, N)
        H, b = units[:, None] * balanced * units[None], units * B
        expected = np.linalg.solve(balanced, B) / units
        v, stats = compute(solver, H, b)
        assert relative_error(units * v, units * expected) < 1e-9
        _, reference = compute(CG, balanced, B)
        assert stats["num_products"] <= 2 * reference["num_products"] + 8
        assert stats["num_shared"] == 8
        assert not stats["negative_curvature"]
        warm, at_solution = compute(solver, H, b, expected)
        assert relative_error(units * warm, units * expected) < 1e-9
        assert at_solution["num_products"] <= 8 + 4


def test_a_function_as_preconditioner():
    """The inverse of ``H`` itself takes one step; anything else is an error."""
    inverse = jnp.asarray(np.linalg.inv(SPD))
    solver = hg.CG(preconditioner=lambda r: inverse @ r)
    v, stats = compute(solver, SPD, B)
    assert relative_error(v, np.linalg.solve(SPD, B)) < 1e-9
    assert stats["num_products"] <= 3
    with pytest.raises(ValueError, match="preconditioner"):
        hg.CG(preconditioner="jacobi")
