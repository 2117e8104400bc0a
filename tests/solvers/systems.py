"""Linear systems with known spectra, and compiled calls of the solvers on them."""

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
import numpy as np

from hypergrad.linear.base import solve_linear

N = 12
RNG = np.random.default_rng(5)
EIGENVECTORS = np.linalg.qr(RNG.normal(size=(N, N)))[0]
B = RNG.normal(size=N)
# A vector with a component of equal size along each eigenvector.
BALANCED = EIGENVECTORS @ np.sign(RNG.normal(size=N))


def symmetric_matrix(eigenvalues):
    """Returns the matrix with these eigenvalues and the common eigenvectors."""
    return (EIGENVECTORS * np.asarray(eigenvalues)) @ EIGENVECTORS.T


SPD = symmetric_matrix(np.geomspace(0.5, 10.0, N))


@eqx.filter_jit
def compute(solver, H, b, y0=None):
    """Returns ``v`` and the statistics of a solver, called through its interface."""
    options = {} if y0 is None else {"y0": y0}
    operator = lx.MatrixLinearOperator(jnp.asarray(H), lx.symmetric_tag)
    v, result, stats = solver.compute(solver.init(operator, options), b, options)
    return v, stats | {"is_successful": result == lx.RESULTS.successful}


@eqx.filter_jit
def solve(solver, H, b, y0):
    """Returns ``v`` and the statistics of `solve_linear`, which estimators call."""
    return solve_linear(solver, lambda v: H @ v, b, y0)


def relative_error(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)
