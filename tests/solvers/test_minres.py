"""Tests of the minimum residual method against dense solves and scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

import hypergrad as hg
from hypergrad.linear.base import solve_linear
from hypergrad.linear.equilibration import equilibrate
from tests.solvers.systems import (
    BALANCED,
    EIGENVECTORS,
    B,
    N,
    compute,
    relative_error,
    symmetric_matrix,
)

MINRES = hg.MINRES(preconditioner=None)
SIZE = 20


def random_spectrum(rng, condition=1e3):
    """Returns eigenvalues of both signs with absolute values in [1/condition, 1]."""
    sizes = condition ** -rng.uniform(size=SIZE)
    return sizes * rng.choice([-1.0, 1.0], size=SIZE)


def random_system(seed, eigenvalues):
    """Returns ``(H, b)`` with random eigenvectors and these eigenvalues."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
    return (q * eigenvalues[None]) @ q.T, rng.normal(size=SIZE)


def stack_systems(seeds, dtype, condition=1e3):
    systems = [
        random_system(seed, random_spectrum(np.random.default_rng(seed), condition))
        for seed in seeds
    ]
    H, b = map(np.stack, zip(*systems, strict=True))
    return H, b, jnp.asarray(H, dtype), jnp.asarray(b, dtype)


solve_batch = jax.jit(jax.vmap(lambda H, b: compute(MINRES, H, b)))


@pytest.mark.parametrize(
    ("dtype", "condition", "tolerance"),
    [("float64", 1e3, 1e-8), ("float32", 1e2, 2e-3)],
)
def test_random_indefinite_systems_under_vmap(dtype, condition, tolerance):
    """Against dense solves; all of 100 systems converge."""
    dense_H, dense_b, H, b = stack_systems(range(100), dtype, condition)
    v, stats = solve_batch(H, b)
    assert v.dtype == dtype
    assert np.all(stats["is_successful"])
    exact = np.linalg.solve(dense_H, dense_b[..., None])[..., 0]
    for actual, expected in zip(v, exact, strict=True):
        assert relative_error(np.asarray(actual, float), expected) < tolerance
    assert np.all(stats["negative_curvature"])


def test_iterates_are_those_of_scipy():
    """After the same number of steps, on indefinite systems."""
    for seed in range(3):
        H, b = random_system(seed, random_spectrum(np.random.default_rng(seed), 10.0))
        for k in (1, 2, 5, 12):
            v, stats = compute(hg.MINRES(max_steps=k, preconditioner=None), H, b)
            expected, _ = scipy.sparse.linalg.minres(H, b, rtol=1e-15, maxiter=k)
            assert relative_error(v, expected) < 1e-9
            assert stats["num_products"] == k + 1
            residual = np.linalg.norm(b - H @ v) / np.linalg.norm(b)
            np.testing.assert_allclose(stats["residual"], residual, rtol=1e-9)


def test_every_residual_is_minimal_in_its_krylov_space():
    """Over the space that ``b, H b, ...`` span."""
    H = symmetric_matrix(np.linspace(-2.0, 3.0, N))
    for k in (1, 3, 6):
        basis = np.linalg.qr(
            np.stack([np.linalg.matrix_power(H, i) @ B for i in range(k)], axis=1)
        )[0]
        coefficients, *_ = np.linalg.lstsq(H @ basis, B)
        v, _ = compute(hg.MINRES(max_steps=k, preconditioner=None), H, B)
        np.testing.assert_allclose(v, basis @ coefficients, rtol=1e-8, atol=1e-9)


def test_a_definite_system_takes_no_more_products_than_cg():
    """Both stop at the same relative residual."""
    for condition in (3.0, 30.0, 1e3):
        H = symmetric_matrix(np.geomspace(1.0, condition, N))
        v, stats = compute(MINRES, H, B)
        _, cg_stats = compute(hg.CG(preconditioner=None), H, B)
        assert relative_error(v, np.linalg.solve(H, B)) < 1e-9
        assert stats["num_products"] <= cg_stats["num_products"]
        assert not stats["negative_curvature"]
        assert stats["ritz_max"] <= condition * (1 + 1e-9)


def test_a_singular_consistent_system_has_the_solution_of_minimum_norm():
    H = symmetric_matrix(np.append(np.zeros(3), np.linspace(-2.0, 3.0, N - 3) - 0.11))
    v, stats = compute(MINRES, H, H @ B)
    assert stats["is_successful"]
    assert relative_error(v, np.linalg.pinv(H, rtol=1e-12) @ H @ B) < 1e-9


@pytest.mark.parametrize("num_null", [1, 3, N])
def test_a_singular_inconsistent_system_is_not_solved(num_null):
    """It stops at the least-squares solution after about as many steps as its rank."""
    eigenvalues = np.append(np.zeros(num_null), np.linspace(1.0, 3.0, N - num_null))
    v, stats = compute(MINRES, symmetric_matrix(eigenvalues), B)
    assert not stats["is_successful"]
    outside = np.linalg.norm(EIGENVECTORS[:, :num_null].T @ B) / np.linalg.norm(B)
    np.testing.assert_allclose(stats["residual"], outside, rtol=1e-6)
    assert stats["num_products"] <= 3 * N
    assert np.isfinite(v).all()


def test_a_warm_start_saves_products():
    H = symmetric_matrix(np.linspace(-2.0, 3.0, N))
    exact = np.linalg.solve(H, B)
    coarse = hg.MINRES(rtol=jnp.asarray(1e-4), preconditioner=None)
    _, cold = compute(coarse, H, B, np.zeros(N))
    v, at_solution = compute(MINRES, H, B, exact)
    assert relative_error(v, exact) < 1e-12
    assert at_solution["num_products"] <= 3
    v, nearby = compute(coarse, H, B, exact + 1e-3 * BALANCED)
    assert relative_error(v, exact) < 1e-3
    assert nearby["num_products"] < cold["num_products"]


def test_a_pytree_of_scalars_and_an_eigenvector():
    """``b`` is an eigenvector, so that one step solves the system."""
    b = {"a": jnp.asarray(2.0), "b": jnp.ones((2, 1))}
    run = jax.jit(
        lambda b: solve_linear(
            MINRES, lambda v: jax.tree.map(lambda x: -4 * x, v), b, b
        )
    )
    v, stats = run(b)
    for actual, expected in zip(jax.tree.leaves(v), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(actual, -expected / 4, rtol=1e-12)
    assert stats["negative_curvature"]


def test_the_default_preconditioner_removes_the_units():
    """Units up to ``10^8`` apart; at most twice the products of a balanced system."""
    solver = hg.MINRES()
    balanced = symmetric_matrix(np.linspace(-2.0, 3.0, N))
    _, reference = compute(MINRES, balanced, B)
    rng = np.random.default_rng(3)
    for _ in range(10):
        units = 10 ** rng.uniform(-4, 4, N)
        H = units[:, None] * balanced * units[None]
        v, stats = compute(solver, H, units * B)
        assert stats["is_successful"]
        assert relative_error(units * v, np.linalg.solve(balanced, B)) < 1e-8
        assert stats["num_products"] <= 2 * reference["num_products"] + 8
    with pytest.raises(ValueError, match="preconditioner"):
        hg.MINRES(preconditioner="jacobi")


def test_the_default_solves_a_singular_system_with_the_minimum_scaled_norm():
    """``S^-1 v`` is orthogonal to the null space of ``S H S``, whatever the units."""
    rng = np.random.default_rng(4)
    balanced = symmetric_matrix(np.append(np.zeros(3), np.linspace(1.0, 3.0, N - 3)))
    units = 10 ** rng.uniform(-3, 3, N)
    H = units[:, None] * balanced * units[None]
    b = H @ (rng.normal(size=N) / units)
    v, stats = compute(hg.MINRES(), H, b)
    assert stats["is_successful"]
    assert relative_error((H @ v) / units, b / units) < 1e-8
    s = np.asarray(equilibrate(lambda x: jnp.asarray(H) @ x, jnp.asarray(b)).s)
    x = np.asarray(v) / s
    eigenvalues, eigenvectors = np.linalg.eigh(s[:, None] * H * s[None])
    null_space = eigenvectors[:, np.argsort(abs(eigenvalues))[:3]]
    assert np.linalg.norm(null_space.T @ x) < 1e-6 * np.linalg.norm(x)


@pytest.mark.parametrize("exponent", [-100, -65, 65, 100])
@pytest.mark.parametrize("preconditioner", [None, "diagonal"])
def test_a_factor_of_the_matrix_changes_no_bit_of_the_solution(
    preconditioner, exponent
):
    """In float32, where the squares of its entries underflow or overflow."""
    solver = hg.MINRES(preconditioner=preconditioner)
    H = jnp.asarray(symmetric_matrix(np.linspace(-2.0, 3.0, N)), jnp.float32)
    b = jnp.asarray(B, jnp.float32)
    y0 = 0.1 * b
    factor = jnp.float32(2.0**exponent)
    expected, expected_stats = compute(solver, H, b, y0=y0)
    v, stats = compute(solver, factor * H, b, y0=y0 / factor)
    np.testing.assert_array_equal(v * factor, expected)
    assert stats["num_products"] == expected_stats["num_products"]
    assert stats["is_successful"]
    assert stats["ritz_max"] == factor * expected_stats["ritz_max"]
