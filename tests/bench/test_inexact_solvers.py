"""The solvers with absolute tolerances of the table `inexact_hypergradients`."""

import jax
import jax.numpy as jnp
import lineax
import pytest

from benchmarks.shared.inexact_solvers import InexactSolver, ResidualSolver

MU, SMOOTHNESS, TOLERANCE = 0.5, 4.0, 1e-3
EIGENVALUES = jnp.array([[0.5, 1.0, 4.0], [2.0, 3.0, 0.7]])
B = jnp.array([[1.0, -2.0, 3.0], [0.5, 0.0, -1.0]])


def inner_loss(w, alpha, batch):
    del batch
    return 0.5 * jnp.sum(EIGENVALUES * w**2) - alpha * jnp.sum(B * w)


@pytest.mark.parametrize("method", ["GD", "HB", "FISTA"])
def test_inner_solvers_stop_within_their_distance_to_the_minimum(method):
    solver = InexactSolver(method, TOLERANCE, MU, jnp.asarray(SMOOTHNESS))
    alpha, key = jnp.asarray(1.0), jax.random.key(0)
    solve = lambda w: solver.solve(inner_loss, w, alpha, None, key)
    w, stats = solve(jnp.zeros_like(B))
    grad_norm = jnp.linalg.norm(EIGENVALUES * w - B)
    assert 0 < grad_norm <= TOLERANCE * MU
    assert jnp.linalg.norm(w - B / EIGENVALUES) <= TOLERANCE
    assert stats["num_steps"] > 5
    _, stats = solve(w)
    assert stats["num_steps"] == 1


@pytest.mark.parametrize("method", ["GD", "HB", "CG"])
def test_adjoint_solvers_stop_at_a_residual_within_the_tolerance(method):
    operator = lineax.FunctionLinearOperator(
        lambda v: EIGENVALUES * v,
        jax.ShapeDtypeStruct(B.shape, B.dtype),
        lineax.positive_semidefinite_tag,
    )
    residuals = []
    for tolerance in (1e-1, 1e-2, 1e-3):
        solver = ResidualSolver(method, tolerance, MU, jnp.asarray(SMOOTHNESS))
        v, _, stats = solver.compute(operator, B, {})
        residuals.append(jnp.linalg.norm(B - EIGENVALUES * v))
        assert residuals[-1] <= tolerance
    assert residuals[0] > 1e-3
    if method == "CG":
        assert stats["num_products"] <= B.size
