"""Tests of Nyström approximations, as solvers and as reused preconditioners."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.linear.base import solve_linear
from tests.solvers.systems import (
    RNG,
    SPD,
    B,
    N,
    compute,
    relative_error,
    symmetric_matrix,
)


def dense_approximation(H, rank):
    """Returns ``(H O)(O' H O)^+ (H O)'`` for the documented ``O``."""
    normal = jax.random.normal(jax.random.key(0), (N, min(rank, N)))
    test_matrix, _ = np.linalg.qr(np.asarray(normal))
    sketch = H @ test_matrix
    core = np.linalg.pinv(test_matrix.T @ sketch, rcond=1e-12, hermitian=True)
    return sketch @ core @ sketch.T


@pytest.mark.parametrize("rank", [4, N + 5], ids=["low", "full"])
@pytest.mark.parametrize("damping", [1e-2, 1.0])
def test_nystrom_equals_its_dense_formula(rank, damping):
    """``(H_r + rho I)^-1 b``; at full rank ``H_r = H``."""
    H_r = dense_approximation(SPD, rank)
    assert rank < N or relative_error(H_r, SPD) < 1e-9
    v, stats = compute(hg.Nystrom(rank, jnp.asarray(damping)), SPD, B)
    assert relative_error(v, np.linalg.solve(H_r + damping * np.eye(N), B)) < 1e-9
    assert stats["num_products"] == min(rank, N)
    eig_max = np.linalg.eigvalsh(H_r)[-1]
    np.testing.assert_allclose(stats["ritz_max"], eig_max, rtol=1e-9)


@pytest.mark.parametrize("rank", [4, N + 5], ids=["low", "full"])
def test_a_singular_hessian_of_lower_rank_is_exact(rank):
    """``H`` has rank 3, as with fewer examples than weights."""
    H = symmetric_matrix(np.append(np.zeros(N - 3), [1.0, 2.0, 5.0]))
    v, _ = compute(hg.Nystrom(rank, jnp.asarray(0.1)), H, B)
    assert relative_error(v, np.linalg.solve(H + 0.1 * np.eye(N), B)) < 1e-9
    b = H @ B
    v, stats = compute(hg.NystromCG(rank), H, b)
    assert relative_error(H @ v, b) < 1e-9
    assert not stats["negative_curvature"]


def test_an_indefinite_matrix_gives_nan():
    """The Cholesky factor does not exist, and any number would be wrong."""
    H = symmetric_matrix(np.linspace(-1.0, 3.0, N))
    v, _ = compute(hg.Nystrom(N + 5, jnp.asarray(0.1)), H, B)
    assert not np.isfinite(v).any()


def test_the_preconditioner_removes_outliers():
    """Each of the five large eigenvalues would cost CG at least one step."""
    size = 60
    basis = np.linalg.qr(RNG.normal(size=(size, size)))[0]
    outliers = np.geomspace(1e3, 1e5, 5)
    eigenvalues = np.append(np.linspace(1.0, 2.0, size - 5), outliers)
    H, b = (basis * eigenvalues) @ basis.T, RNG.normal(size=size)
    plain, plain_stats = compute(hg.CG(rtol=1e-10, preconditioner=None), H, b)
    v, stats = compute(hg.NystromCG(10, rtol=1e-10), H, b)
    expected = np.linalg.solve(H, b)
    assert relative_error(plain, expected) < 1e-8
    assert relative_error(v, expected) < 1e-8
    assert stats["num_steps"] <= 0.7 * plain_stats["num_steps"]
    assert stats["num_products"] == stats["num_steps"] + 1 + 10


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_damping_and_key_of_the_preconditioner_do_not_change_the_solution(damping):
    key = jax.random.key(7)
    v, _ = compute(hg.NystromCG(4, damping=jnp.asarray(damping), key=key), SPD, B)
    assert relative_error(v, np.linalg.solve(SPD, B)) < 1e-9


@pytest.mark.parametrize(
    "solver", [hg.Nystrom(N, 1e-2), hg.NystromCG(3)], ids=["Nystrom", "NystromCG"]
)
def test_a_half_precision_system_is_factorized_in_float32(solver):
    """The result has the dtype of the vector."""
    matvec = lambda v: (SPD @ v.astype(float)).astype(jnp.bfloat16)
    b = jnp.asarray(B, jnp.bfloat16)
    run = jax.jit(lambda b: solve_linear(solver, matvec, b, jnp.zeros_like(b))[0])
    v = run(b)
    assert v.dtype == jnp.bfloat16
    assert relative_error(v.astype(float), np.linalg.solve(SPD, B)) < 0.1


# One sketch for several estimates of Implicit.

DIM, RANK, NUM_ESTIMATES = 30, 6, 7
EIGENVALUES = np.append(10.0 ** np.arange(4, 4 - RANK, -1), np.ones(DIM - RANK))
TARGET = np.linspace(-1.0, 2.0, DIM)


def solution(alpha, batch):
    """Returns ``w* = alpha`` if the Hessian is fixed, else ``exp(-alpha) / lambda``."""
    return jnp.where(batch["moves"], jnp.exp(-alpha) / batch["eigenvalues"], alpha)


def inner_loss(w, alpha, batch):
    """A loss with ``H = diag(lambda)``, or ``diag(lambda exp(alpha))`` if it moves."""
    fixed = 0.5 * jnp.vdot(batch["eigenvalues"], (w - alpha) ** 2)
    moving = 0.5 * jnp.vdot(batch["eigenvalues"] * jnp.exp(alpha), w**2) - jnp.sum(w)
    return jnp.where(batch["moves"], moving, fixed)


def outer_loss(w, alpha, batch):
    return 0.5 * jnp.sum((w - TARGET) ** 2)


def quartic_outer_loss(w, alpha, batch):
    return jnp.sum(w**4)


def make_problem(moves, outer=outer_loss):
    data = {"eigenvalues": jnp.asarray(EIGENVALUES), "moves": jnp.asarray(moves)}
    return hg.Bilevel(inner_loss, outer, data)


def make_estimator(refresh_every, **options):
    linear_solver = hg.NystromCG(RANK, rtol=1e-12, refresh_every=refresh_every)
    return hg.Implicit(hg.ClosedForm(solution), linear_solver, **options)


@eqx.filter_jit
def estimate(estimator, problem, state, alpha):
    return estimator.estimate(problem, state, alpha, jax.random.key(0))


def run_estimates(problem, refresh_every, alphas, **options):
    """Returns the estimates along a path of alpha, and the states after them."""
    estimator = make_estimator(refresh_every, **options)
    state = estimator.init(problem, jnp.zeros(DIM), jnp.zeros(DIM))
    results = []
    for alpha in alphas:
        result, state = estimate(estimator, problem, state, alpha)
        results.append((result, state))
    return results


ALPHAS = [0.1 * i * jnp.sin(jnp.arange(DIM)) for i in range(NUM_ESTIMATES)]


@pytest.mark.parametrize(
    "outer", [outer_loss, (outer_loss, quartic_outer_loss)], ids=["one loss", "two"]
)
def test_a_reused_sketch_saves_its_products_if_the_hessian_is_fixed(outer):
    problem = make_problem(False, outer)
    # The steps that estimate an error differ by one with the rounding of the sketch.
    run = lambda n: run_estimates(problem, n, ALPHAS, estimate_error=False)
    reused, fresh = run(3), run(1)
    for i, ((actual, _), (expected, _)) in enumerate(zip(reused, fresh, strict=True)):
        np.testing.assert_allclose(
            actual.hypergradient, expected.hypergradient, rtol=1e-9, atol=1e-9
        )
        saved = float(expected.stats["num_hvps"] - actual.stats["num_hvps"])
        assert saved == (0 if i % 3 == 0 else RANK)


def test_an_old_sketch_of_a_moving_hessian_is_cheaper_and_without_bias():
    """The hypergradient is ``-(w* - target) w*``."""
    problem = make_problem(True)
    reused, fresh = (run_estimates(problem, n, ALPHAS) for n in (3, 1))
    for alpha, (actual, _) in zip(ALPHAS, reused, strict=True):
        w = np.exp(-alpha) / EIGENVALUES
        np.testing.assert_allclose(actual.hypergradient, -(w - TARGET) * w, rtol=1e-9)
        assert actual.trusted
    num_hvps = lambda results: sum(float(x.stats["num_hvps"]) for x, _ in results)
    assert num_hvps(reused) < num_hvps(fresh)


NUM_SKETCHES = []


class CountedSketch(hg.NystromCG):
    """Counts how often a sketch is made while a program runs."""

    def prepare(self, matvec, like):
        jax.debug.callback(lambda x: NUM_SKETCHES.append(1), like)
        return super().prepare(matvec, like)


def test_a_batch_of_estimates_reuses_its_sketches():
    """In a batch `jax.lax.cond` would make a new sketch every time and drop it."""
    linear_solver = CountedSketch(RANK, refresh_every=3)
    implicit = hg.Implicit(hg.ClosedForm(solution), linear_solver, estimate_error=False)
    problem, average = make_problem(False), hg.Average(implicit, 2)
    state = average.init(problem, jnp.zeros(DIM), jnp.zeros(DIM))
    NUM_SKETCHES.clear()
    counts = []
    for alpha in ALPHAS:
        _, state = estimate(average, problem, state, alpha)
        jax.effects_barrier()
        counts.append(len(NUM_SKETCHES))
    is_new = np.diff(counts, prepend=0) > 0
    assert is_new.tolist() == [i % 3 == 0 for i in range(NUM_ESTIMATES)]


def test_a_sketch_that_is_not_finite_is_replaced_at_once():
    """The next refresh would be due two estimates later."""
    alphas = [jnp.nan * ALPHAS[1], ALPHAS[1]]
    results = run_estimates(make_problem(True), 3, alphas)
    for (result, state), is_finite in zip(results, (False, True), strict=True):
        assert bool(jnp.all(jnp.isfinite(result.hypergradient))) == is_finite
        assert bool(jnp.all(jnp.isfinite(state.prepared[0]))) == is_finite


def test_refresh_every_must_be_positive_and_excludes_rtol():
    with pytest.raises(ValueError, match="refresh_every"):
        hg.NystromCG(3, refresh_every=0)
    descent = hg.Descent(optax.sgd(0.1), 10)
    with pytest.raises(ValueError, match="rtol"):
        hg.Implicit(descent, hg.NystromCG(3, refresh_every=2), rtol=1e-2)


@pytest.mark.parametrize("make", [hg.Nystrom, hg.NystromCG])
def test_an_invalid_key_is_refused(make):
    with pytest.raises(TypeError, match=r"key must be.*jax\.random\.key\(0\)"):
        make(2, key=0)
    with pytest.raises(ValueError, match="key must be a single PRNG key"):
        make(2, key=jax.random.split(jax.random.key(0)))
    jax.jit(jax.vmap(lambda key: make(2, key=key)))(jax.random.split(jax.random.key(0)))
