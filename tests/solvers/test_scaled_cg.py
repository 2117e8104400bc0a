"""Conjugate gradients in scaled coordinates, against dense solutions in any units."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from hypergrad.linear import scaled_cg as scaled_cg_module
from hypergrad.linear.equilibration import Scaling, equilibrate, no_scaling
from hypergrad.linear.scaled_cg import add_gradient_step, scaled_cg


def random_system(size, exponent, lowest=1e-2):
    """Returns ``(H, b, targets, D)`` for ``D^-1 A D^-1`` with a well-scaled ``A``."""
    rng = np.random.default_rng(5)
    basis, _ = np.linalg.qr(rng.normal(size=(size, size)))
    eigenvalues = np.logspace(np.log10(abs(lowest)), 0, size)
    eigenvalues[0] = lowest
    units = 10.0 ** rng.uniform(-exponent, exponent, size)
    H = basis @ np.diag(eigenvalues) @ basis.T / np.outer(units, units)
    b, *targets = rng.normal(size=(4, size)) / np.outer(np.ones(4), units)
    return map(jnp.asarray, (H, b, np.stack(targets), units))


def relative(actual, expected, units):
    """Returns the relative error in the coordinates of ``A``."""
    return np.linalg.norm((actual - expected) / units) / np.linalg.norm(
        expected / units
    )


def matvec_of(H):
    return functools.partial(jnp.matmul, H)


@pytest.mark.parametrize("exponent", [0, 4, 6])
@pytest.mark.parametrize("size", [5, 30])
def test_equilibration_removes_the_units(size, exponent):
    """The condition number of ``S H S`` is at most 30 times that of ``A``."""
    H, b, _, units = random_system(size, exponent)
    s = equilibrate(matvec_of(H), b).s
    condition = np.linalg.cond(np.asarray(s)[:, None] * H * np.asarray(s)[None])
    assert condition < 30 * np.linalg.cond(H * np.outer(units, units))
    assert np.max(s) == pytest.approx(1.0, abs=0.5)


def test_equilibration_of_few_parameters_is_exact():
    """Rows of ``S H S`` have equal norms, and units multiply ``s``."""
    H, b, _, units = random_system(6, 5)
    scaled = equilibrate(matvec_of(H), b)
    s = np.asarray(scaled.s)
    norms = np.linalg.norm(s[:, None] * H * s[None], axis=1)
    np.testing.assert_allclose(norms, norms[0], rtol=1e-6)
    base = equilibrate(matvec_of(H * np.outer(units, units)), b)
    ratio = s / units / np.asarray(base.s)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)
    assert scaled.num_products == 6


def test_a_scaling_is_continued_with_two_products():
    H, b, _, _ = random_system(30, 4)
    first = equilibrate(matvec_of(H), b)
    second = equilibrate(matvec_of(1.1 * H), b, init_s=first.s, seed=1)
    fresh = equilibrate(matvec_of(H), b, init_s=jnp.zeros(30))
    assert (first.num_products, second.num_products) == (8, 2)
    np.testing.assert_allclose(fresh.s, first.s)
    change = np.log10(second.s / first.s)
    assert np.std(change) < 0.5


def test_rows_of_zeros_keep_their_factor():
    H = jnp.diag(jnp.array([4.0, 0.0, 1e-8]))
    s = equilibrate(matvec_of(H), jnp.ones(3)).s
    np.testing.assert_allclose(s[0] / s[2], 1e-4 / 2, rtol=1e-6)
    assert np.all(np.isfinite(s))
    assert s[1] == 1.0


@pytest.mark.parametrize("exponent", [0, 4])
def test_solutions_and_projections_equal_dense_ones(exponent):
    """All of the Krylov space is used, so that targets are solved as well."""
    H, b, targets, units = random_system(12, exponent, lowest=0.1)
    matvec = matvec_of(H)
    solution = scaled_cg(matvec, b, equilibrate(matvec, b), rtol=1e-13, targets=targets)
    assert solution.is_solved
    assert not solution.is_negative
    assert relative(solution.v, np.linalg.solve(H, b), units) < 1e-9
    for actual, target, rest in zip(
        solution.target_solutions, targets, solution.target_residuals, strict=True
    ):
        assert relative(actual, np.linalg.solve(H, target), units) < 1e-6
        np.testing.assert_allclose(
            rest * units, (target - H @ actual) * units, atol=1e-9
        )


def test_a_projection_is_the_best_in_the_norm_of_h():
    """After k steps ``H^-1 z - y`` is H-orthogonal to the Krylov space of b."""
    H, b, targets, _ = random_system(20, 0)
    solution = scaled_cg(
        matvec_of(H), b, no_scaling(b), rtol=0.0, max_steps=4, targets=targets
    )
    krylov = np.stack([np.linalg.matrix_power(H, k) @ b for k in range(4)])
    krylov = np.linalg.qr(krylov.T)[0]
    for y, z in zip(solution.target_solutions, targets, strict=True):
        coefficients = np.linalg.solve(krylov.T @ H @ krylov, krylov.T @ z)
        np.testing.assert_allclose(y, krylov @ coefficients, rtol=1e-8, atol=1e-10)


def test_earlier_solutions_stay_in_the_search_space():
    """Started from the solutions, nothing but two steps is left to do."""
    H, b, targets, units = random_system(30, 3)
    matvec = matvec_of(H)
    scaling = equilibrate(matvec, b)
    cold = scaled_cg(matvec, b, scaling, rtol=1e-10, targets=targets)
    subspace = jnp.concatenate([cold.v[None], cold.target_solutions])
    warm = scaled_cg(matvec, b, scaling, rtol=1e-10, targets=targets, subspace=subspace)
    assert warm.num_steps <= 3 < cold.num_steps
    assert warm.num_products == warm.num_steps + 4 + 1
    assert relative(warm.v, np.linalg.solve(H, b), units) < 1e-6
    zeros = scaled_cg(
        matvec, b, scaling, rtol=1e-10, targets=targets, subspace=0 * subspace
    )
    assert zeros.num_products == cold.num_products
    np.testing.assert_allclose(zeros.v, cold.v)


def test_the_expected_error_is_the_change_in_two_steps_times_the_pairs_to_come():
    H, b, _, _ = random_system(20, 0)
    run = lambda k: scaled_cg(matvec_of(H), b, no_scaling(b), rtol=0.0, max_steps=k)
    for num_steps, num_pairs in (6, 6 / 4), (18, 1):
        change = run(num_steps).v - run(num_steps - 2).v
        np.testing.assert_allclose(
            run(num_steps).expected_error, num_pairs * change, rtol=1e-6, atol=1e-12
        )
    exact = scaled_cg(matvec_of(jnp.eye(20)), b, no_scaling(b), rtol=1e-12)
    np.testing.assert_array_equal(exact.expected_error, 0)


@pytest.mark.parametrize(
    ("residual", "num_steps", "num_changes"), [(5e-6, 9, 0), (5e-6, 8, 1), (1e-5, 9, 1)]
)
def test_no_change_is_left_after_as_many_steps_as_dimensions_that_solve_the_system(
    residual, num_steps, num_changes
):
    """In float32 ``eps^(3/4)`` is 6.4e-6; two steps before, the residual was 1e-2."""
    b = jnp.ones(9, jnp.float32)
    state, _ = scaled_cg_module._init_state(lambda x: x, b[None], None)
    state = state._replace(
        rr=jnp.float32(residual**2),
        earlier_rr=jnp.float32(1e-4),
        num_steps=jnp.asarray(num_steps),
        change=b,
    )
    eps = float(jnp.finfo(jnp.float32).eps)
    change = scaled_cg_module._expected_error(state, 9, jnp.float32(1.0), eps)
    np.testing.assert_array_equal(change, num_changes * b)


@pytest.mark.parametrize("exponent", [0, 4])
def test_negative_curvature_is_met(exponent):
    H, b, _, _ = random_system(30, exponent, lowest=-0.1)
    matvec = matvec_of(H)
    solution = scaled_cg(matvec, b, equilibrate(matvec, b), rtol=1e-12)
    assert solution.is_negative
    assert not solution.is_solved
    assert solution.curvature_min < 0
    p = equilibrate(matvec, b).multiply(solution.last_direction)
    scaled_p = solution.last_direction
    np.testing.assert_allclose(
        p @ H @ p / (scaled_p @ scaled_p), solution.curvature_min, rtol=1e-10
    )
    negative = jnp.linalg.eigh(H)[1][:, :1].T
    from_space = scaled_cg(
        matvec, b, equilibrate(matvec, b), rtol=1e-12, subspace=negative
    )
    assert from_space.is_negative
    assert from_space.num_steps == 0


@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_factors_at_the_edge_of_float32_change_nothing(factor):
    H, b, targets, _ = random_system(10, 0)
    H, b, targets = (x.astype(jnp.float32) for x in (H, b, targets))
    factor = jnp.float32(factor)
    solve = lambda c: scaled_cg(
        matvec_of(c * H), b, equilibrate(matvec_of(c * H), b), rtol=1e-5,
        targets=targets,
    )  # fmt: skip
    expected, actual = solve(jnp.float32(1.0)), solve(factor)
    assert actual.is_solved
    np.testing.assert_allclose(actual.v * factor, expected.v, rtol=1e-2, atol=1e-3)


def test_a_gradient_step_adds_a_missing_direction():
    """``b`` and the first target have no direction in common; the second has both."""
    H = jnp.diag(jnp.array([2.0, 5.0]))
    b, targets = jnp.array([1.0, 0.0]), jnp.array([[0.0, 1.0], [1.0, 3.0]])
    scaling = Scaling(jnp.ones(2), 0)
    solution = scaled_cg(matvec_of(H), b, scaling, targets=targets)
    np.testing.assert_allclose(solution.target_solutions, [[0.0, 0.0], [0.5, 0.0]])
    step = lambda H, curvature_max: add_gradient_step(
        matvec_of(H),
        solution.target_solutions,
        solution.target_residuals,
        scaling,
        jnp.asarray(curvature_max),
    )
    solutions, residuals = step(H, 2.0)
    np.testing.assert_allclose(solutions, [[0.0, 0.2], [0.5, 0.6]])
    np.testing.assert_allclose(residuals, targets - solutions @ H, atol=1e-15)
    # A curvature that is rounding beside the largest makes no step.
    noise = jnp.diag(jnp.array([2.0, 1e-17]))
    np.testing.assert_array_equal(step(noise, 2.0)[0], solution.target_solutions)


def test_a_nan_in_h_is_returned():
    b = jnp.ones(3)
    solution = scaled_cg(matvec_of(jnp.full((3, 3), jnp.nan)), b, no_scaling(b))
    assert np.all(np.isnan(solution.v))
    assert not solution.is_solved


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_nearly_dependent_subspace_does_no_harm(dtype):
    """Three vectors that differ by rounding, as duals of alike directions do."""
    H, b, targets, _ = random_system(12, 0, lowest=0.1)
    H, b, targets = (x.astype(dtype) for x in (H, b, targets))
    noise = np.random.default_rng(0).normal(size=(3, 12)).astype(dtype)
    exact = jnp.asarray(np.linalg.solve(H, b), dtype)
    subspace = exact[None] * (1 + 10 * jnp.finfo(dtype).eps * noise)
    solution = scaled_cg(
        matvec_of(H), 1.3 * b + targets[0], no_scaling(b), subspace=subspace
    )
    expected = np.linalg.solve(H, 1.3 * b + targets[0])
    error = np.linalg.norm(solution.v - expected) / np.linalg.norm(expected)
    assert solution.is_solved
    assert error < (1e-4 if dtype == "float32" else 1e-10)
