"""Linear solvers against dense solves, explicit series and the Krylov optimum."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from hypergrad.linear.base import relative_residual
from hypergrad.linear.base import solve_linear as solve_by_products
from hypergrad.trees import divide, power_of_two_scale

N = 12
RNG = np.random.default_rng(5)
Q = np.linalg.qr(RNG.normal(size=(N, N)))[0]
B = RNG.normal(size=N)
ONES = Q @ np.sign(RNG.normal(size=N))  # a part of equal size in each eigenvector


def dense(spectrum):
    """The symmetric matrix with this spectrum and the eigenvectors ``Q``."""
    return (Q * np.asarray(spectrum)) @ Q.T


SPD = dense(np.geomspace(0.5, 10.0, N))
OURS = {
    "CG": hg.CG(),
    "NystromCG": hg.NystromCG(rank=4),
    "Neumann": hg.Neumann(num_terms=600),
    "Nystrom": hg.Nystrom(rank=N, damping=0.0),
}
LINEAX = {
    "GMRES": lx.GMRES(rtol=1e-12, atol=1e-12),
    "BiCGStab": lx.BiCGStab(rtol=1e-12, atol=1e-12),
    "lineax.CG": lx.CG(rtol=1e-12, atol=1e-12),
    "LU": lx.LU(),
    "Cholesky": lx.Cholesky(),
}


@eqx.filter_jit
def run(solver, H, b, y0=None):
    """``(v, stats)`` straight from a solver of ours, on a dense matrix."""
    options = {} if y0 is None else {"y0": y0}
    operator = lx.MatrixLinearOperator(jnp.asarray(H), lx.symmetric_tag)
    v, result, stats = solver.compute(solver.init(operator, options), b, options)
    return v, stats | {"successful": result == lx.RESULTS.successful}


@eqx.filter_jit
def run_by_products(solver, H, b, start):
    """The path that estimators take."""
    return solve_by_products(solver, lambda v: H @ v, b, start)


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def krylov(H, b, k):
    """The minimiser of the H-norm error over the k-th Krylov space, and Ritz values."""
    V = np.zeros((len(b), 0))
    v = b
    for _ in range(k):
        for _ in range(2):
            v = v - V @ (V.T @ v)
        V = np.column_stack([V, v / np.linalg.norm(v)])
        v = H @ V[:, -1]
    T = V.T @ H @ V
    return V @ np.linalg.solve(T, V.T @ b), np.linalg.eigvalsh(T)


# Every solver.


@pytest.mark.parametrize("name", OURS)
def test_linear_solve_its_batches_and_its_derivatives(name):
    """numpy's dense solve, a loop, and ``-l v'``, ``l`` with ``l = H^-1 cos(v)``."""
    structure = jax.ShapeDtypeStruct((N,), jnp.float64)

    def solution(H, b):
        operator = lx.FunctionLinearOperator(
            lambda v: H @ v, structure, lx.symmetric_tag
        )
        return lx.linear_solve(operator, b, OURS[name]).value

    @jax.jit
    def everything(H, b):
        value, pullback = jax.vjp(solution, H, b)
        forward = jax.jvp(solution, (H, b), (jnp.eye(N), jnp.ones(N)))[1]
        scales = jnp.array([1.0, 0.7, 0.4])
        batch = jax.vmap(lambda s: solution(s * H, s**2 * b))(scales)
        return value, batch, pullback(jnp.cos(value)), forward

    value, batch, (by_H, by_b), forward = everything(SPD, B)
    v = np.linalg.solve(SPD, B)
    adjoint = np.linalg.solve(SPD, np.cos(v))
    assert relative(value, v) < 1e-9
    for scale, one in zip((1.0, 0.7, 0.4), batch, strict=True):
        assert relative(one, scale * v) < 1e-9
    assert relative(by_b, adjoint) < 1e-9
    assert relative(by_H, -np.outer(adjoint, v)) < 1e-9
    assert relative(forward, np.linalg.solve(SPD, np.ones(N) - v)) < 1e-9


@pytest.mark.parametrize("name", [*OURS, *LINEAX])
def test_solve_by_products_equals_the_dense_solve(name):
    """numpy's dense solve; stats are the same four keys for every solver."""
    solver = {**OURS, **LINEAX}[name]
    v, stats = run_by_products(solver, SPD, B, np.zeros(N))
    assert relative(v, np.linalg.solve(SPD, B)) < 1e-9
    assert set(stats) == {
        "num_products",
        "num_shared",
        "ritz_min",
        "ritz_max",
        "negative_curvature",
    }
    assert stats["num_products"] >= 1
    assert not stats["negative_curvature"]


@pytest.mark.parametrize("name", OURS)
def test_a_pytree_is_the_flat_vector(name):
    """The flat solve of the same numbers, 0-d and 2-d leaves included."""
    tree = {"a": [np.zeros((2, 4)), np.zeros(())], "b": {"c": np.zeros(3)}}
    _, unravel = ravel_pytree(tree)
    matvec = lambda v: unravel(SPD @ ravel_pytree(v)[0])
    solver = OURS[name]
    found, stats = jax.jit(
        lambda b: solve_by_products(solver, matvec, b, jax.tree.map(jnp.zeros_like, b))
    )(unravel(jnp.asarray(B)))
    v, flat_stats = run_by_products(solver, SPD, B, np.zeros(N))
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    # The order of a sum may cost CG one step.
    np.testing.assert_allclose(ravel_pytree(found)[0], v, rtol=1e-9)
    assert abs(stats["num_products"] - flat_stats["num_products"]) <= 1


@pytest.mark.parametrize("name", OURS)
def test_float32(name):
    """numpy's float64 solve to 2e-4 at condition 20, in the right dtype."""
    solver = {**OURS, "Neumann": hg.Neumann(num_terms=200)}[name]
    v, stats = run_by_products(
        solver, SPD.astype(np.float32), B.astype(np.float32), np.zeros(N, np.float32)
    )
    assert v.dtype == jnp.float32
    assert relative(v, np.linalg.solve(SPD, B)) < 2e-4
    assert not stats["negative_curvature"]


@pytest.mark.parametrize("size", [1e-25, 1e-17, 1e25])
@pytest.mark.parametrize("name", OURS)
def test_a_right_hand_side_whose_square_is_out_of_range(name, size):
    """``H^-1 (size b) = size H^-1 b`` in float32, to the 2e-4 above."""
    solver = {**OURS, "Neumann": hg.Neumann(num_terms=200)}[name]
    b = B.astype(np.float32) * np.float32(size)
    H = SPD.astype(np.float32)
    for start in (np.zeros(N, np.float32), ONES.astype(np.float32)):
        v, stats = run_by_products(solver, H, b, start)
        assert relative(v / np.float32(size), np.linalg.solve(SPD, B)) < 2e-4
        assert not stats["negative_curvature"]


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_residuals_whose_squares_are_out_of_range(size):
    """``||b - b / 2|| / ||b|| = 1/2``, whatever the size of ``b``."""
    b = {"a": jnp.float32(size), "b": jnp.full(3, size, jnp.float32)}
    half = jax.tree.map(lambda x: x / 2, b)
    assert relative_residual(b, half) == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize(
    "leaves",
    [("float32", "float64"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")],
    ids="-".join,
)
def test_leaves_of_other_dtypes(leaves):
    """``H = diag(1, 2)``: ``v = b / H``, each leaf in its own dtype."""
    b = {"a": jnp.ones(2, leaves[0]), "b": jnp.ones(3, leaves[1])}
    matvec = lambda v: {"a": v["a"], "b": 2 * v["b"]}
    v, _ = solve_by_products(hg.CG(), matvec, b, jax.tree.map(jnp.zeros_like, b))
    assert [x.dtype for x in jax.tree.leaves(v)] == list(leaves)
    np.testing.assert_allclose(v["a"].astype(float), np.ones(2), rtol=2e-2)
    np.testing.assert_allclose(v["b"].astype(float), np.full(3, 0.5), rtol=2e-2)


@pytest.mark.parametrize("where", ["b", "H"])
@pytest.mark.parametrize("name", OURS)
def test_nan_is_never_a_finite_solution(name, where):
    """NaN in, NaN out: a finite answer would be a silently wrong gradient."""
    H, b = SPD.copy(), B.copy()
    if where == "b":
        b[3] = np.nan
    else:
        H[2, 2] = np.nan
    v, _ = run_by_products(OURS[name], H, b, np.zeros(N))
    assert not np.isfinite(v).all()


@pytest.mark.parametrize("name", [name for name in OURS if name != "Neumann"])
def test_a_zero_right_hand_side_gives_zero(name):
    """``H^-1 0 = 0``, from a warm start too, and no curvature is made up there."""
    for start in (np.zeros(N), B):
        v, stats = run_by_products(OURS[name], SPD, np.zeros(N), start)
        assert np.linalg.norm(v) < 1e-9
        assert not stats["negative_curvature"]


@pytest.mark.parametrize("name", OURS)
def test_an_untagged_operator_is_refused(name):
    """Ours see a symmetric matrix only, and the message says how to tag it."""
    operator = lx.MatrixLinearOperator(jnp.eye(2))
    with pytest.raises(ValueError, match="symmetric_tag"):
        lx.linear_solve(operator, jnp.ones(2), OURS[name])


COUNTED = {
    "GMRES": LINEAX["GMRES"],
    "BiCGStab": LINEAX["BiCGStab"],
    "lineax.CG": LINEAX["lineax.CG"],
    "never stabilised": lx.CG(rtol=1e-12, atol=1e-12, stabilise_every=None),
    "LSMR": lx.LSMR(rtol=1e-12, atol=1e-12),
    "Normal": lx.Normal(lx.CG(rtol=1e-12, atol=1e-12)),
}


@pytest.mark.parametrize("name", [*OURS, *COUNTED])
def test_counted_products_are_those_evaluated(name):
    """A matrix that reports each product to the host; GMRES counts whole cycles."""
    calls = []

    def matvec(v):
        jax.debug.callback(lambda: calls.append(1))
        return SPD @ v

    solver = {**OURS, **COUNTED, "Neumann": hg.Neumann(7)}[name]
    solved = jax.jit(lambda b, start: solve_by_products(solver, matvec, b, start))
    for start in (np.zeros(N), ONES):
        calls.clear()
        stats = jax.block_until_ready(solved(B, start))[1]
        jax.effects_barrier()
        batch = solver.rank if name in ("Nystrom", "NystromCG") else 1
        evaluated = len(calls) - 1 + batch  # the sketch calls back once
        off = stats["num_products"] - evaluated
        assert 0 <= off <= 2 if name == "GMRES" else off == 0


# Conjugate gradients.


@pytest.mark.parametrize("shape", [(), (1,), (7,)], ids=str)
def test_cg_takes_two_products_on_a_multiple_of_the_identity(shape):
    """``(c I)^-1 b = b / c`` after one step; a 1-d system does not return zero."""
    b = jnp.asarray(np.random.default_rng(1).normal(size=shape))
    solve_scaled = jax.jit(
        lambda c: solve_by_products(hg.CG(), lambda v: c * v, b, jnp.zeros_like(b))
    )
    for c in (1e-6, 1.0, 3e5):
        v, stats = solve_scaled(c)
        np.testing.assert_allclose(v, b / c, rtol=1e-12)
        assert stats["num_products"] <= 2
        np.testing.assert_allclose(stats["ritz_min"], c, rtol=1e-9)
        np.testing.assert_allclose(stats["ritz_max"], c, rtol=1e-9)


@pytest.mark.parametrize("distinct", [1, 3])
def test_cg_that_converges_at_the_last_allowed_step_returns_that_iterate(distinct):
    """CG ends after as many steps as there are distinct eigenvalues."""
    spectrum = np.array([1.0, 2.5, 7.0])[:distinct].repeat(N // distinct)
    solver = hg.CG(max_steps=distinct)
    operator = lx.MatrixLinearOperator(jnp.asarray(dense(spectrum)), lx.symmetric_tag)
    found = lx.linear_solve(operator, jnp.asarray(B), solver).value  # else it raises
    assert relative(found, np.linalg.solve(dense(spectrum), B)) < 1e-9


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8, N])
def test_cg_is_optimal_at_every_step(k):
    """The best point of the Krylov space, its Ritz values, and the sqrt(kappa) rate."""
    spectrum = np.linspace(0.1, 10.0, N)
    H = dense(spectrum)
    v, stats = run(hg.CG(max_steps=k), H, B)
    best, ritz = krylov(H, B, k)
    exact = np.linalg.solve(H, B)
    h_norm = lambda e: np.sqrt(e @ H @ e)
    assert relative(v, best) < 1e-8
    np.testing.assert_allclose(stats["ritz_min"], ritz[0], rtol=1e-7)
    np.testing.assert_allclose(stats["ritz_max"], ritz[-1], rtol=1e-9)
    assert spectrum[0] * (1 - 1e-9) <= stats["ritz_min"]
    assert stats["ritz_max"] <= spectrum[-1] * (1 + 1e-9)
    q = (np.sqrt(100.0) - 1) / (np.sqrt(100.0) + 1)
    assert h_norm(v - exact) <= 2 * q**k * h_norm(exact) + 1e-9
    assert stats["num_products"] == k + 1
    assert bool(stats["successful"]) == (k == N)
    np.testing.assert_allclose(
        stats["residual"], relative(H @ v, B), rtol=1e-3, atol=1e-11
    )


eigenvalues = st.lists(st.floats(0.1, 1.99), min_size=N, max_size=N)


@settings(deadline=None, max_examples=60)
@given(eigenvalues)
def test_cg_below_condition_twenty(spectrum):
    """Dense solve to 1e-9 in at most dim + 3 products; the ends of `eigvalsh`."""
    H = dense(spectrum)
    v, stats = run(hg.CG(), H, ONES)
    assert relative(v, np.linalg.solve(H, ONES)) < 1e-9
    assert stats["num_products"] <= N + 3
    assert not stats["negative_curvature"]
    ends = np.linalg.eigvalsh(H)[[0, -1]]
    assert ends[0] * (1 - 1e-7) <= stats["ritz_min"]
    assert stats["ritz_max"] <= ends[1] * (1 + 1e-7)
    np.testing.assert_allclose(stats["ritz_min"], ends[0], rtol=1e-2)
    np.testing.assert_allclose(stats["ritz_max"], ends[1], rtol=1e-2)


@settings(deadline=None, max_examples=60)
@given(eigenvalues, st.lists(st.booleans(), min_size=N, max_size=N))
def test_negative_curvature_is_flagged_exactly_where_there_is_some(spectrum, signs):
    """Inertia: with all of the spectrum in ``b``, some step meets the negative part."""
    signed = np.where(signs, spectrum, -np.asarray(spectrum))
    v, stats = run(hg.CG(), dense(signed), ONES)
    assert bool(stats["negative_curvature"]) == (not all(signs))
    assert np.isfinite(v).all()
    if not all(signs):
        assert stats["ritz_min"] <= 0
        assert not stats["successful"]


def test_cg_stops_at_negative_curvature_with_its_last_iterate():
    """``diag(2, 1, -1)``: the iterate before is the Krylov optimum of those steps."""
    H, b = np.diag([2.0, 1.0, -1.0]), np.array([3.0, 2.0, 0.5])
    v, stats = run(hg.CG(), H, b)
    assert stats["negative_curvature"]
    steps = int(stats["num_steps"]) - 1  # the last met the negative part
    assert steps >= 1
    np.testing.assert_allclose(v, krylov(H, b, steps)[0], rtol=1e-10)


@pytest.mark.parametrize("ends", [(1e-6, 1.0), (1e-3, 1e-2)], ids=str)
@pytest.mark.parametrize("rtol", [None, 0.0])
def test_cg_does_not_mistake_rounding_for_negative_curvature(rtol, ends):
    """A positive matrix solved to the floor and beyond, where ``p'Hp`` underflows."""
    H = dense(np.geomspace(*ends, N))
    solver = hg.CG(rtol=rtol, max_steps=400)
    v, stats = run(solver, H, ONES)
    assert not stats["negative_curvature"]
    assert relative(H @ v, ONES) < 1e-9


@pytest.mark.parametrize(("dtype", "scale"), [("float32", 1e-15), ("float64", 1e-140)])
def test_cg_does_not_depend_on_the_scale_of_the_right_hand_side(dtype, scale):
    """``H^-1 (s b) = s H^-1 b``, with ``|s b|^2`` within the range of the dtype."""
    H, b = SPD.astype(dtype), (scale * ONES).astype(dtype)
    v, stats = run(hg.CG(), H, b)
    exact = np.linalg.solve(SPD, ONES)
    assert relative(np.asarray(v, float) / scale, exact) < 1e-4
    assert not stats["negative_curvature"]
    assert stats["num_products"] <= 3 * N


def test_a_warm_start_costs_what_is_left():
    """At the solution two or three products; near it fewer than from zero."""
    H = dense(np.geomspace(0.1, 10.0, N))
    exact = np.linalg.solve(H, B)
    cold = run(hg.CG(rtol=1e-6), H, B, np.zeros(N))[1]
    assert cold["num_products"] == cold["num_steps"] + 1  # the start at 0 is free
    there, stats = run(hg.CG(rtol=1e-6), H, B, exact)
    assert relative(there, exact) < 1e-12
    assert stats["num_products"] <= 3
    near, stats = run(hg.CG(rtol=1e-6), H, B, exact + 1e-4 * ONES)
    assert relative(near, exact) < 1e-5
    assert stats["num_products"] < cold["num_products"]


def test_a_singular_matrix_is_solved_on_its_range_and_shows_what_lies_outside():
    """The pseudo-inverse where ``b`` is in the range, else at least the part outside"""
    H = dense(np.concatenate([np.zeros(3), np.linspace(1.0, 3.0, N - 3)]))
    inside = H @ B
    v, stats = run(hg.CG(), H, inside)
    assert relative(v, np.linalg.pinv(H) @ inside) < 1e-9
    assert stats["residual"] < 1e-9
    outside = np.linalg.norm(Q[:, :3].T @ B) / np.linalg.norm(B)
    _, stats = run(hg.CG(), H, B)
    assert stats["residual"] >= outside * (1 - 1e-9) > 0.1
    assert not stats["successful"]


def test_an_untrustworthy_solve_reaches_the_estimate():
    """Singular, indefinite, diverging: each is untrusted, and so is a NaN adjoint."""
    quadratic = lambda w, alpha, batch: 0.5 * w @ (batch["H"] @ w) - alpha @ w
    outer = lambda w, alpha, batch: batch["b"] @ w + 0.0 * jnp.sum(alpha)
    stay = hg.Descent(optax.sgd(0.0), 0)

    def trusted(spectrum, linear_solver=None, b=ONES):
        data = {"H": dense(spectrum)}, {"b": jnp.asarray(b)}
        problem = hg.Bilevel(quadratic, outer, *data)
        estimator = hg.Implicit(stay, linear_solver)
        w = jnp.asarray(np.full(N, 1e-300))
        estimate = hg.hypergradient(problem, estimator)(w, 1e-300 * jnp.ones(N))
        return bool(estimate.stats["trusted"]), estimate.stats["adjoint_residual"]

    well = np.linspace(1.0, 3.0, N)
    hole, saddle = well.copy(), well.copy()
    hole[0], saddle[0] = 0.0, -1.0
    slow = hg.Neumann(num_terms=20, step_size=0.4)
    assert trusted(well)[0]
    assert trusted(well, slow)[0]
    assert not trusted(hole)[0]
    assert not trusted(saddle)[0]
    flag, residual = trusted(well, hg.Neumann(num_terms=20, step_size=0.8))
    assert not flag
    assert residual > 1


# The truncated series.


@pytest.mark.parametrize("num_terms", [1, 2, 9])
def test_neumann_is_the_explicit_sum(num_terms):
    """``s sum_{k<K} (I - s H)^k b`` by matrix powers."""
    step = 0.12
    v, stats = run(hg.Neumann(num_terms, step), SPD, B)
    powers = [
        np.linalg.matrix_power(np.eye(N) - step * SPD, k) for k in range(num_terms)
    ]
    np.testing.assert_allclose(v, step * sum(powers) @ B, rtol=1e-11)
    assert stats["num_products"] == num_terms - 1


def test_neumann_error_falls_as_q_to_the_k():
    """The slope of ``log error`` in K is ``log q``, ``q = max |1 - s lambda|``."""
    exact = np.linalg.solve(SPD, ONES)
    counts = np.array([160, 200, 240, 280])
    for step, q in ((0.1, 1 - 0.1 * 0.5), (0.199, abs(1 - 0.199 * 10.0))):
        errors = [
            relative(run(hg.Neumann(int(K), jnp.asarray(step)), SPD, ONES)[0], exact)
            for K in counts
        ]
        slope = np.polyfit(counts, np.log(errors), 1)[0]
        np.testing.assert_allclose(slope, np.log(q), rtol=0.01)


def test_neumann_finds_its_step_size():
    """Ten power iterations come near ``lambda_max`` from below, and are counted."""
    H = dense(np.concatenate([np.linspace(0.5, 5.0, N - 1), [10.0]]))
    v, stats = run(hg.Neumann(600), H, B)
    assert 10.0 * (1 - 1e-3) <= stats["ritz_max"] <= 10.0 * (1 + 1e-9)
    assert stats["num_products"] == 599 + 10
    assert relative(v, np.linalg.solve(H, B)) < 1e-9


# Low-rank sketches.


def sketched(H, rank):
    """``(H O)(O' H O)^+ (H O)'`` from the documented draw, by pseudo-inverse."""
    omega = np.asarray(jax.random.normal(jax.random.key(0), (len(H), rank)))
    omega = np.linalg.qr(omega)[0]
    y = H @ omega
    return y @ np.linalg.pinv(omega.T @ y, rcond=1e-12, hermitian=True) @ y.T


@pytest.mark.parametrize("rank", [1, 4, N, N + 5])
@pytest.mark.parametrize("damping", [1e-2, 1.0])
def test_nystrom_is_its_dense_formula(rank, damping):
    """``(H_r + rho I)^-1 b`` by a dense solve; ``H_r = H`` at full rank."""
    H_r = SPD if rank >= N else sketched(SPD, rank)
    v, stats = run(hg.Nystrom(rank, damping), SPD, B)
    assert relative(v, np.linalg.solve(H_r + damping * np.eye(N), B)) < 1e-9
    assert stats["num_products"] == min(rank, N)
    np.testing.assert_allclose(
        stats["ritz_max"], np.linalg.eigvalsh(H_r)[-1], rtol=1e-9
    )


@pytest.mark.parametrize("rank", [3, 4, 8, N])
def test_nystrom_where_the_hessian_is_singular(rank):
    """Fewer examples than weights: ``H`` of rank 3, exact as soon as rank >= 3."""
    H = dense(np.concatenate([np.zeros(N - 3), [1.0, 2.0, 5.0]]))
    v, _ = run(hg.Nystrom(rank, 0.1), H, B)
    assert relative(v, np.linalg.solve(H + 0.1 * np.eye(N), B)) < 1e-9
    inside = H @ B
    v, stats = run(hg.NystromCG(rank), H, inside)
    assert relative(H @ v, inside) < 1e-9
    assert not stats["negative_curvature"]


def test_nystrom_of_an_indefinite_matrix_is_nan():
    """There is no Cholesky factor, and a wrong number would be silent."""
    v, _ = run(hg.Nystrom(N), dense(np.linspace(-1.0, 3.0, N)), B)
    assert not np.isfinite(v).any()


def test_the_preconditioner_flattens_outliers():
    """Five outliers cost CG five steps and more; sketched away, only the rest counts"""
    size = 60
    basis = np.linalg.qr(RNG.normal(size=(size, size)))[0]
    spectrum = np.concatenate(
        [np.linspace(1.0, 2.0, size - 5), np.geomspace(1e3, 1e5, 5)]
    )
    H, b = (basis * spectrum) @ basis.T, RNG.normal(size=size)
    plain, plain_stats = run(hg.CG(rtol=1e-10), H, b)
    found, stats = run(hg.NystromCG(10, rtol=1e-10), H, b)
    exact = np.linalg.solve(H, b)
    assert relative(plain, exact) < 1e-8
    assert relative(found, exact) < 1e-8
    assert stats["num_steps"] <= 0.7 * plain_stats["num_steps"]
    assert stats["num_products"] == stats["num_steps"] + 1 + 10


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_the_preconditioner_leaves_the_solution_alone(damping):
    """numpy's dense solve, whatever the sketch's damping and key."""
    solver = hg.NystromCG(4, damping=damping, key=jax.random.key(7))
    v, _ = run(solver, SPD, B)
    assert relative(v, np.linalg.solve(SPD, B)) < 1e-9


# What each declares.


def test_identity_returns_the_right_hand_side():
    """No product, no change."""
    v, stats = run(hg.Identity(), SPD, B)
    np.testing.assert_array_equal(v, B)
    assert stats["num_products"] == 0


DECLARED = {
    "Identity": hg.Identity(),
    "CG": hg.CG(),
    "NystromCG": hg.NystromCG(3),
    "Neumann-step": hg.Neumann(8, 0.8),
    "Neumann": hg.Neumann(8),
}


@pytest.mark.parametrize("name", DECLARED)
@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(0.1, 1.99), min_size=N, max_size=N), st.integers(0, 1000))
def test_the_measured_error_keeps_within_the_declared_factor(name, spectrum, seed):
    """A dense solve, over random spectra and right-hand sides."""
    solver, H = DECLARED[name], dense(spectrum)
    b = np.random.default_rng(seed).normal(size=N)
    declared = solver.error_bound(min(spectrum), max(spectrum))
    error = relative(run(solver, H, b)[0], np.linalg.solve(H, b))
    assert error <= declared * (1 + 1e-6) + 1e-9
    assert solver.exact == (declared == 0) or max(spectrum) == min(spectrum)


@pytest.mark.parametrize("name", ["Identity", "Neumann-step"])
def test_the_declared_factor_is_attained(name):
    """On the eigenvector at the worse end of the spectrum there is no slack."""
    solver, spectrum = DECLARED[name], np.linspace(0.1, 1.9, N)
    errors = [
        relative(run(solver, dense(spectrum), q)[0], q / spectrum[i])
        for i, q in ((0, Q[:, 0]), (N - 1, Q[:, -1]))
    ]
    np.testing.assert_allclose(max(errors), solver.error_bound(0.1, 1.9), rtol=1e-9)


def test_nystrom_promises_no_factor():
    """NaN where the error depends on what the sketch happens to miss."""
    assert np.isnan(hg.Nystrom(3).error_bound(0.5, 1.5))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("solver", [hg.Nystrom(N, 1e-2), hg.NystromCG(3)])
def test_a_sketch_of_half_precision(solver, dtype):
    """Factorised in float32; the result is in the vector's dtype, near the solution."""
    matvec = lambda v: (SPD @ v.astype(float)).astype(dtype)
    b = jnp.asarray(B, dtype)
    found, _ = solve_by_products(solver, matvec, b, jnp.zeros_like(b))
    assert found.dtype == dtype
    exact = np.linalg.solve(SPD, B)
    assert np.linalg.norm(found.astype(float) - exact) < 0.1 * np.linalg.norm(exact)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [3e-30, 0.7, 5e30])
def test_the_unit_of_a_right_hand_side_rounds_nothing(size, dtype):
    """Divided by it and scaled back it has the same bits; its largest is in [1, 2)."""
    x = jnp.asarray(size * np.random.default_rng(0).normal(size=50), dtype)
    unit = power_of_two_scale(x)
    inside = divide(x, unit)
    np.testing.assert_array_equal(inside * unit, x)
    assert 1 <= float(jnp.max(jnp.abs(inside))) < 2


@pytest.mark.parametrize("x", [0.0, np.inf, np.nan])
def test_what_has_no_size_has_the_unit_one(x):
    """So that nothing is divided by it."""
    assert power_of_two_scale(jnp.array([x, 0.0])) == 1.0
