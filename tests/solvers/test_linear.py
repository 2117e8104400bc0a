"""Tests that all linear solvers share, and tests of `Neumann` and `Identity`."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from hypergrad.linear.base import relative_residual, solve_linear
from hypergrad.runtime.compat import NORMAL_CHOLESKY_FORMS_H_ONCE
from hypergrad.trees import divide, hash_normal, power_of_two_scale
from tests.estimator_cases import counted
from tests.solvers.systems import (
    BALANCED,
    EIGENVECTORS,
    SPD,
    B,
    N,
    compute,
    relative_error,
    solve,
    symmetric_matrix,
)

SOLVERS = {
    "CG": hg.CG(),
    "MINRES": hg.MINRES(),
    "NystromCG": hg.NystromCG(rank=4),
    "Neumann": hg.Neumann(num_terms=600),
    "Nystrom": hg.Nystrom(rank=N, damping=0.0),
}
every_solver = pytest.mark.parametrize("name", SOLVERS)


# Solutions.


@every_solver
def test_lineax_can_batch_and_differentiate_a_solve(name):
    """With ``l = H^-1 cos(v)``, ``sin(v)`` has the derivatives ``-l v'`` and ``l``."""
    structure = jax.ShapeDtypeStruct((N,), jnp.float64)

    def solution(H, b):
        operator = lx.FunctionLinearOperator(
            lambda v: H @ v, structure, lx.symmetric_tag
        )
        return lx.linear_solve(operator, b, SOLVERS[name]).value

    @jax.jit
    def run(H, b, scales):
        v, pullback = jax.vjp(solution, H, b)
        batch = jax.vmap(lambda s: solution(s * H, s**2 * b))(scales)
        return v, batch, pullback(jnp.cos(v))

    scales = np.array([1.0, 0.7, 0.4])
    actual, batch, (by_H, by_b) = run(SPD, B, scales)
    v = np.linalg.solve(SPD, B)
    adjoint = np.linalg.solve(SPD, np.cos(v))
    assert relative_error(actual, v) < 1e-9
    assert relative_error(batch, np.outer(scales, v)) < 1e-9
    assert relative_error(by_b, adjoint) < 1e-9
    assert relative_error(by_H, -np.outer(adjoint, v)) < 1e-9


@pytest.mark.parametrize("argument", ["b", "H"])
@every_solver
def test_a_nan_never_leads_to_a_finite_solution(name, argument):
    H, b = SPD.copy(), B.copy()
    if argument == "b":
        b[3] = np.nan
    else:
        H[2, 2] = np.nan
    v, _ = solve(SOLVERS[name], H, b, np.zeros(N))
    assert not np.isfinite(v).all()


@pytest.mark.parametrize("name", ["CG", "MINRES", "NystromCG", "Nystrom"])
def test_the_solution_for_zero_is_zero(name):
    """Also from a warm start, and without a report of negative curvature."""
    for y0 in (np.zeros(N), B):
        v, stats = solve(SOLVERS[name], SPD, np.zeros(N), y0)
        assert np.linalg.norm(v) < 1e-9
        assert not stats["negative_curvature"]


@pytest.mark.parametrize(
    ("solver", "expected"),
    [
        (hg.Nystrom(3, damping=0.1), 10.0),
        (hg.Nystrom(N, damping=0.1), 10.0),
        (hg.Neumann(4, step_size=0.5), 2.0),
    ],
    ids=["Nystrom", "Nystrom of full rank", "Neumann"],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_hessian_of_zero_has_the_formula_of_the_solver(solver, expected, dtype):
    """``b / rho``, and the sum of K equal terms."""
    b = jnp.ones(N, dtype)
    v, stats = solve_linear(solver, jnp.zeros_like, b, jnp.zeros_like(b))
    np.testing.assert_allclose(v, expected, rtol=1e-5)
    ritz_max = float(stats["ritz_max"])
    assert np.isnan(ritz_max) or abs(ritz_max) < 1e-6


@pytest.mark.parametrize("name", ["CG", "MINRES", "NystromCG", "Neumann"])
def test_a_pytree_is_solved_like_the_flat_vector(name):
    """The tree has leaves of 0 and 2 dimensions."""
    tree = {"a": [np.zeros((2, 4)), np.zeros(())], "b": {"c": np.zeros(3)}}
    _, unravel = ravel_pytree(tree)
    matvec = lambda v: unravel(SPD @ ravel_pytree(v)[0])
    run = jax.jit(lambda b, y0: solve_linear(SOLVERS[name], matvec, b, y0))
    actual, stats = run(unravel(jnp.asarray(B)), tree)
    v, flat_stats = solve(SOLVERS[name], SPD, B, np.zeros(N))
    assert jax.tree.structure(actual) == jax.tree.structure(tree)
    np.testing.assert_allclose(ravel_pytree(actual)[0], v, rtol=1e-9)
    # The order of a sum may cost CG one step.
    assert abs(stats["num_products"] - flat_stats["num_products"]) <= 1


@pytest.mark.parametrize("size", [1e-25, 1e-17, 1.0, 1e25])
@every_solver
def test_float32_is_solved_at_any_scale(name, size):
    """The squares of some of the right-hand sides underflow or overflow."""
    solver = {**SOLVERS, "Neumann": hg.Neumann(num_terms=200)}[name]
    to_float32 = lambda x: np.asarray(x, np.float32)
    b = to_float32(size) * to_float32(B)
    for y0 in (np.zeros(N), BALANCED):
        v, stats = solve(solver, to_float32(SPD), b, to_float32(y0))
        assert v.dtype == jnp.float32
        assert relative_error(v / to_float32(size), np.linalg.solve(SPD, B)) < 2e-4
        assert stats["is_solved"]
        assert not stats["negative_curvature"]


@pytest.mark.parametrize(
    "dtypes",
    [("float32", "float64"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")],
    ids="-".join,
)
def test_every_leaf_keeps_its_dtype(dtypes):
    """``H = diag(1, 2)``."""
    b = {"a": jnp.ones(2, dtypes[0]), "b": jnp.ones(3, dtypes[1])}
    matvec = lambda v: {"a": v["a"], "b": 2 * v["b"]}
    zeros = jax.tree.map(jnp.zeros_like, b)
    v, _ = jax.jit(lambda b: solve_linear(hg.CG(), matvec, b, zeros))(b)
    assert [str(x.dtype) for x in jax.tree.leaves(v)] == list(dtypes)
    np.testing.assert_allclose(v["a"].astype(float), np.ones(2), rtol=2e-2)
    np.testing.assert_allclose(v["b"].astype(float), np.full(3, 0.5), rtol=2e-2)


def test_an_untagged_operator_is_an_error():
    operator = lx.MatrixLinearOperator(jnp.eye(2))
    with pytest.raises(ValueError, match="operator"):
        lx.linear_solve(operator, jnp.ones(2), hg.CG())


# Counted products.

LINEAX = {
    "GMRES": lx.GMRES(rtol=1e-12, atol=1e-12),
    "BiCGStab": lx.BiCGStab(rtol=1e-12, atol=1e-12),
    "lineax.CG": lx.CG(rtol=1e-12, atol=1e-12),
    "lineax.CG without stabilisation": lx.CG(
        rtol=1e-12, atol=1e-12, stabilise_every=None
    ),
    "LSMR": lx.LSMR(rtol=1e-12, atol=1e-12),
    "Normal": lx.Normal(lx.CG(rtol=1e-12, atol=1e-12)),
    "LU": lx.LU(),
    "Cholesky": lx.Cholesky(),
}
ITERATIVE = [name for name in LINEAX if name not in ("LU", "Cholesky")]
STATS = {
    "is_solved",
    "num_products",
    "num_shared",
    "ritz_min",
    "ritz_max",
    "negative_curvature",
}


@pytest.mark.parametrize(
    ("solver", "num_own_products"),
    [(lx.Cholesky(), int(not NORMAL_CHOLESKY_FORMS_H_ONCE)), (lx.LU(), 1)],
    ids=["Cholesky", "LU"],
)
def test_normal_equations_with_a_dense_solver_count_evaluated_products(
    solver, num_own_products
):
    """`lineax.Cholesky` forms ``H`` once; others form both factors of ``H'H``."""
    matvec, calls = counted(lambda v: SPD @ v, per_point=True)
    run = jax.jit(lambda b: solve_linear(lx.Normal(solver), matvec, b, np.zeros(N)))
    v, stats = jax.block_until_ready(run(B))
    jax.effects_barrier()
    assert relative_error(v, np.linalg.solve(SPD, B)) < 1e-9
    assert stats["num_products"] == len(calls)
    assert stats["num_products"] - stats["num_shared"] == num_own_products


@pytest.mark.parametrize("name", ["LU", "Cholesky"])
def test_a_dense_solver_of_lineax_shares_all_of_its_products(name):
    v, stats = solve(LINEAX[name], SPD, B, np.zeros(N))
    assert relative_error(v, np.linalg.solve(SPD, B)) < 1e-9
    assert stats.keys() == STATS
    assert stats["num_products"] == stats["num_shared"] == N


@pytest.mark.parametrize("name", [*SOLVERS, *ITERATIVE])
def test_counted_products_are_those_evaluated(name):
    """The matrix reports each product to the host; GMRES counts whole cycles."""
    matvec, calls = counted(lambda v: SPD @ v)
    solver = {**SOLVERS, **LINEAX, "Neumann": hg.Neumann(7)}[name]
    run = jax.jit(lambda b, y0: solve_linear(solver, matvec, b, y0))
    for y0 in (np.zeros(N), BALANCED):
        calls.clear()
        v, stats = jax.block_until_ready(run(B, y0))
        jax.effects_barrier()
        assert stats.keys() == STATS
        assert not stats["negative_curvature"]
        if name != "Neumann":
            assert relative_error(v, np.linalg.solve(SPD, B)) < 1e-9
        # A sketch evaluates `rank` products in one call.
        rank = solver.rank if name in ("Nystrom", "NystromCG") else 1
        excess = stats["num_products"] - (len(calls) - 1 + rank)
        assert 0 <= excess <= 2 if name == "GMRES" else excess == 0


# Residuals.


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_a_residual_does_not_depend_on_the_scale(size):
    b = {"a": jnp.float32(size), "b": jnp.full(3, size, jnp.float32)}
    half = jax.tree.map(lambda x: x / 2, b)
    assert relative_residual(b, half) == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [3e-30, 0.7, 5e30])
def test_division_by_the_power_of_two_scale_rounds_nothing(size, dtype):
    x = jnp.asarray(size * np.random.default_rng(0).normal(size=50), dtype)
    unit = power_of_two_scale(x)
    scaled = divide(x, unit)
    np.testing.assert_array_equal(scaled * unit, x)
    assert 1 <= float(jnp.max(jnp.abs(scaled))) < 2


@pytest.mark.parametrize("x", [0.0, np.inf, np.nan])
def test_the_scale_of_a_vector_without_a_size_is_one(x):
    assert power_of_two_scale(jnp.array([x, 0.0])) == 1.0


# The truncated series and the identity.


@pytest.mark.parametrize("num_terms", [1, 9])
def test_neumann_is_the_explicit_sum(num_terms):
    """``s sum_{k<K} (I - s H)^k b`` by matrix powers."""
    step_size = 0.12
    v, stats = compute(hg.Neumann(num_terms, step_size), SPD, B)
    contraction = np.eye(N) - step_size * SPD
    powers = [np.linalg.matrix_power(contraction, k) for k in range(num_terms)]
    np.testing.assert_allclose(v, step_size * sum(powers) @ B, rtol=1e-11)
    assert stats["num_products"] == num_terms - 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_long_series_reaches_the_solution_in_a_short_dtype(dtype):
    """A sum in bfloat16 stalls where a term is below half a unit in its last place."""
    H, b = jnp.diag(jnp.array([1.0, 0.01], dtype)), jnp.ones(2, dtype)
    v, _ = compute(hg.Neumann(1000, 1.0), H, b)
    assert v.dtype == dtype
    np.testing.assert_allclose(np.asarray(v, float), [1, 100], rtol=0.01)


@pytest.mark.parametrize(
    ("step_size", "q"), [(0.1, 1 - 0.1 * 0.5), (0.199, abs(1 - 0.199 * 10.0))],
    ids=["smallest eigenvalue", "largest eigenvalue"],
)  # fmt: skip
def test_the_error_of_neumann_falls_as_q_to_the_k(step_size, q):
    """``q = max |1 - s lambda|``."""
    expected = np.linalg.solve(SPD, BALANCED)
    first, second = (
        relative_error(
            compute(hg.Neumann(K, jnp.asarray(step_size)), SPD, BALANCED)[0], expected
        )
        for K in (160, 280)
    )
    np.testing.assert_allclose(np.log(second / first) / 120, np.log(q), rtol=0.01)


def test_neumann_estimates_its_step_size():
    """Ten power iterations approach the largest eigenvalue from below."""
    H = symmetric_matrix(np.append(np.linspace(0.5, 5.0, N - 1), 10.0))
    v, stats = compute(SOLVERS["Neumann"], H, B)
    assert 10.0 * (1 - 1e-3) <= stats["ritz_max"] <= 10.0 * (1 + 1e-9)
    assert stats["num_products"] == 599 + 10
    assert relative_error(v, np.linalg.solve(H, B)) < 1e-9


def test_identity_returns_the_right_hand_side():
    v, stats = compute(hg.Identity(), SPD, B)
    np.testing.assert_array_equal(v, B)
    assert stats["num_products"] == 0


# Declared errors.

DECLARED = {
    "Identity": hg.Identity(),
    "CG": SOLVERS["CG"],
    "NystromCG": SOLVERS["NystromCG"],
    "Neumann with step_size": hg.Neumann(8, 0.8),
    "Neumann": hg.Neumann(8),
}


@pytest.mark.parametrize("name", DECLARED)
@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(0.1, 1.99), min_size=N, max_size=N), st.integers(0, 1000))
def test_the_error_is_within_the_declared_bound(name, eigenvalues, seed):
    solver, H = DECLARED[name], symmetric_matrix(eigenvalues)
    b = np.random.default_rng(seed).normal(size=N)
    bound = solver.error_bound(min(eigenvalues), max(eigenvalues))
    error = relative_error(compute(solver, H, b)[0], np.linalg.solve(H, b))
    assert error <= bound * (1 + 1e-6) + 1e-9
    assert solver.exact == (bound == 0) or max(eigenvalues) == min(eigenvalues)


@pytest.mark.parametrize("name", ["Identity", "Neumann with step_size"])
def test_the_declared_bound_is_attained(name):
    """At the eigenvector of one of the extreme eigenvalues."""
    solver, eigenvalues = DECLARED[name], np.linspace(0.1, 1.9, N)
    H = symmetric_matrix(eigenvalues)
    errors = [
        relative_error(compute(solver, H, q)[0], q / eigenvalue)
        for q, eigenvalue in (
            (EIGENVECTORS[:, 0], eigenvalues[0]),
            (EIGENVECTORS[:, -1], eigenvalues[-1]),
        )
    ]
    np.testing.assert_allclose(max(errors), solver.error_bound(0.1, 1.9), rtol=1e-9)


def test_nystrom_declares_no_bound():
    assert np.isnan(hg.Nystrom(3).error_bound(0.5, 1.5))


def test_hashed_normal_vectors_are_standard_normal_and_uncorrelated():
    """Moments, quantiles, and the correlations of seeds, leaves and neighbours."""
    like = {"a": jnp.zeros((100, 100)), "b": jnp.zeros(10_000)}
    vectors = [hash_normal(seed, like) for seed in (0, 1, jnp.asarray(2), -1)]
    columns = [np.asarray(leaf).ravel() for z in vectors for leaf in z.values()]
    neighbours = [np.roll(column, 1) for column in columns]
    correlations = np.corrcoef(np.stack(columns + neighbours)) - np.eye(16)
    assert np.abs(correlations).max() < 0.04  # four standard deviations
    for column in columns:
        assert abs(np.mean(column)) < 0.04
        np.testing.assert_allclose(np.std(column), 1, atol=0.03)
        assert abs(np.mean(np.abs(column) < 0.6745) - 0.5) < 0.02
        assert np.isfinite(column).all()
    assert np.isfinite(hash_normal(0, jnp.zeros(2**20, jnp.float32))).all()


def test_hashed_normal_vectors_keep_dtypes_and_repeat():
    """The vector depends on the seed and on the structure alone."""
    like = {"a": jnp.zeros((2, 3), jnp.bfloat16), "b": jnp.zeros((), jnp.float32)}
    first, second = hash_normal(3, like), jax.jit(hash_normal)(3, like)
    assert jax.tree.map(lambda x: x.dtype, first) == jax.tree.map(
        lambda x: x.dtype, like
    )
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), first, second))


@pytest.mark.parametrize("power", [-80, 0, 80])
def test_the_step_size_of_a_series_is_found_at_any_scale_in_float32(power):
    """The squares of its products would underflow or overflow."""
    factor = jnp.float32(2.0**power)
    eigs = jnp.array([0.5, 0.8, 1.0], jnp.float32)
    b = jnp.ones(3, jnp.float32)
    v, stats = solve_linear(
        hg.Neumann(60), lambda v: factor * eigs * v, b, jnp.zeros_like(b)
    )
    np.testing.assert_allclose(v, b / (factor * eigs), rtol=1e-3)
    assert stats["is_solved"]


@pytest.mark.parametrize("name", ["CG", "MINRES"])
def test_a_complex_system_is_refused(name):
    operator = lx.MatrixLinearOperator(
        jnp.array([[2.0, 1j], [1j, 3.0]]), lx.symmetric_tag
    )
    with pytest.raises(TypeError, match=f"operator must be real for {name}"):
        lx.linear_solve(operator, jnp.array([1 + 1j, 2.0]), SOLVERS[name])
