"""Tests of composite losses: Gauss-Newton products and the hypergradients they give.

Symbols: ``Z = dz/dw`` for the outputs ``z``, ``C`` is the Hessian of the loss in ``z``
and ``R`` that of the regularizer. The Gauss-Newton matrix is ``Z' C Z + R``.
"""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import hypergrad as hg

RNG = np.random.default_rng(0)
ALPHA = jnp.array([-1.0, -1.5])
W = {"first": jnp.asarray(RNG.normal(size=(3, 2))), "last": jnp.array([0.7, -1.1])}
FLAT_W, UNRAVEL = ravel_pytree(W)
BATCH = {
    "x": jnp.asarray(RNG.normal(size=(6, 3))),
    "y": jnp.asarray(RNG.normal(size=6)),
    "w": W,
}


def model_fn(w, alpha, batch):
    """A network of two layers, whose outputs are a pytree."""
    hidden = jnp.tanh(batch["x"] @ w["first"])
    return {"fit": hidden @ w["last"], "code": hidden}


def loss_fn(z, alpha, batch):
    fit = jnp.mean(jnp.cosh(z["fit"] - batch["y"]))
    return fit + jnp.exp(alpha[0]) * jnp.mean(z["code"] ** 2)


def regularizer(w, alpha):
    return jnp.exp(alpha[1]) * sum(jnp.sum(leaf**4) for leaf in jax.tree.leaves(w))


def outer_loss(w, alpha, batch):
    return jnp.sum(jnp.sin(ravel_pytree(w)[0])) + alpha[0]


LOSS = hg.CompositeLoss(model_fn, loss_fn, regularizer)
# The inner solver stands at W, which is not a minimum.
STANDING = hg.ClosedForm(lambda alpha, batch: batch["w"])
PROBLEM = hg.Bilevel(LOSS, outer_loss, BATCH, BATCH)
TIGHT_CG = hg.CG(rtol=1e-12)


@jax.jit
def dense_matrices():
    """Returns the Gauss-Newton matrix, ``H``, ``J`` and ``b = dM/dw`` at W."""
    flat_outputs = lambda w: ravel_pytree(model_fn(UNRAVEL(w), ALPHA, BATCH))[0]
    z, unravel_z = ravel_pytree(model_fn(W, ALPHA, BATCH))
    Z = jax.jacobian(flat_outputs)(FLAT_W)
    C = jax.hessian(lambda z: loss_fn(unravel_z(z), ALPHA, BATCH))(z)
    R = jax.hessian(lambda w: regularizer(UNRAVEL(w), ALPHA))(FLAT_W)
    flat_loss = lambda w, alpha: LOSS(UNRAVEL(w), alpha, BATCH)
    H = jax.hessian(flat_loss)(FLAT_W, ALPHA)
    J = jax.jacobian(jax.grad(flat_loss), argnums=1)(FLAT_W, ALPHA)
    b = jax.grad(lambda w: outer_loss(UNRAVEL(w), ALPHA, BATCH))(FLAT_W)
    return Z.T @ C @ Z + R, H, J, b


GAUSS_NEWTON, H, J, B = map(np.asarray, dense_matrices())


def expected_hypergradient(matrix):
    """Returns ``dM/dalpha - J' matrix^-1 dM/dw``."""
    return np.array([1.0, 0.0]) - J.T @ np.linalg.solve(matrix, B)


def test_the_loss_is_the_sum_of_its_parts():
    expected = loss_fn(model_fn(W, ALPHA, BATCH), ALPHA, BATCH)
    assert float(hg.CompositeLoss(model_fn, loss_fn)(W, ALPHA, BATCH)) == expected
    assert float(LOSS(W, ALPHA, BATCH)) == expected + regularizer(W, ALPHA)


def test_products_equal_the_dense_matrix_and_not_the_hessian():
    product = lambda v: ravel_pytree(LOSS.gauss_newton(W, ALPHA, BATCH, UNRAVEL(v)))[0]
    actual = jax.jit(jax.vmap(product, out_axes=1))(jnp.eye(FLAT_W.size))
    np.testing.assert_allclose(actual, GAUSS_NEWTON, rtol=0, atol=1e-12)
    assert np.abs(H - GAUSS_NEWTON).max() > 0.1


@pytest.mark.parametrize(
    "linear_solver",
    [hg.NystromCG(3, rtol=1e-12), hg.NystromCG(3, rtol=1e-12, refresh_every=2)],
    ids=["NystromCG", "prepared"],
)
def test_the_adjoint_solves_with_the_damped_matrix(linear_solver):
    estimator = hg.Implicit(
        STANDING, linear_solver, hvp_fn=LOSS.gauss_newton, damping=0.3
    )
    estimate = hg.hypergradient(PROBLEM, estimator)(W, ALPHA)
    expected = expected_hypergradient(GAUSS_NEWTON + 0.3 * np.eye(FLAT_W.size))
    np.testing.assert_allclose(estimate.hypergradient, expected, rtol=0, atol=1e-9)


def test_the_residual_is_that_of_the_indefinite_hessian():
    """The Gauss-Newton matrix is definite, so its solve cannot reveal this."""
    assert np.linalg.eigvalsh(H)[0] < -0.05 < 0.05 < np.linalg.eigvalsh(GAUSS_NEWTON)[0]
    estimator = hg.Implicit(STANDING, TIGHT_CG, hvp_fn=LOSS.gauss_newton)
    estimate = hg.hypergradient(PROBLEM, estimator)(W, ALPHA)
    np.testing.assert_allclose(
        estimate.hypergradient, expected_hypergradient(GAUSS_NEWTON), atol=1e-9
    )
    residual = B - H @ np.linalg.solve(GAUSS_NEWTON, B)
    expected = np.linalg.norm(residual) / np.linalg.norm(B)
    np.testing.assert_allclose(estimate.stats["adjoint_residual"], expected, rtol=1e-6)
    assert np.isnan(estimate.stats["ritz_min"])  # the spectrum of H is unknown
    assert set(estimate.flags) == {"not_finite", "other_curvature"}
    assert not estimate.trusted


def curved_outputs(w, alpha, batch):
    return jnp.array([w[0] - alpha, w[1], w[1] ** 2])


def nearly_first_entry(w, alpha, batch):
    return w[0] + 0.004 * w[1]


# H = diag(1, c) for the data c. The Gauss-Newton matrix is I, whatever c is.
CURVED = hg.CompositeLoss(
    curved_outputs,
    lambda z, alpha, batch: 0.5 * (z[0] ** 2 + z[1] ** 2 + (batch - 1) * z[2]),
)
AT_STATIONARY_POINT = hg.ClosedForm(lambda alpha, batch: jnp.array([alpha, 0.0]))


@pytest.mark.parametrize("curvature", [-1.0, 1.0], ids=["saddle", "minimum"])
@pytest.mark.parametrize("certify", [False, True], ids=["plain", "certified"])
def test_only_a_certified_minimum_is_trusted(certify, curvature):
    """The adjoint is nearly ``[1, 0]``, so the residual is small at a saddle too."""
    problem = hg.Bilevel(CURVED, nearly_first_entry, jnp.asarray(curvature))
    estimator = hg.Implicit(
        AT_STATIONARY_POINT, TIGHT_CG, hvp_fn=CURVED.gauss_newton, certify=certify
    )
    estimate = hg.hypergradient(problem, estimator)(jnp.zeros(2), 0.7)
    assert estimate.stats["adjoint_residual"] < 1e-2
    assert estimate.stats["inner_grad_norm"] < 1e-12
    assert estimate.trusted == (certify and curvature > 0)


def test_outputs_that_are_not_floating_point_are_constants():
    """Such as predictions and masks; products are those of the other outputs."""

    def outputs(w, alpha, batch):
        fit = jnp.sin(w)
        return {"fit": fit, "class": jnp.arange(2), "is_high": fit > 0, "none": None}

    weighted_mse = lambda z, alpha, batch: jnp.sum(
        jnp.where(z["is_high"], 2.0, 1.0) * (1 + z["class"]) * z["fit"] ** 2
    )
    loss = hg.CompositeLoss(outputs, weighted_mse)
    w, v = jnp.array([0.5, -1.0]), jnp.array([1.0, 2.0])
    product = jax.jit(loss.gauss_newton)(w, None, None, v)
    np.testing.assert_allclose(product, 4 * jnp.cos(w) ** 2 * v)


def test_a_refined_estimate_uses_the_hessian():
    """Starts from a biased estimate of a convex problem."""
    loss = hg.CompositeLoss(
        lambda w, alpha, batch: jnp.sinh(w),
        lambda z, alpha, batch: jnp.sum((z - 1) ** 2),
        lambda w, alpha: jnp.sum((w - alpha) ** 2),
    )
    problem = hg.Bilevel(loss, lambda w, alpha, batch: jnp.sum(w**2))
    estimator = hg.Implicit(hg.Newton(), TIGHT_CG, hvp_fn=loss.gauss_newton)
    w, key = jnp.array([0.2, 0.5]), jax.random.key(0)

    @jax.jit
    def estimate_and_refine(w):
        state = estimator.init(problem, w, ALPHA)
        biased, state = estimator.estimate(problem, state, ALPHA, key)
        refined, _ = estimator.refine(problem, state, ALPHA, key)
        return biased.hypergradient, refined.hypergradient

    biased, refined = estimate_and_refine(w)
    exact = hg.hypergradient(problem, hg.Implicit(hg.Newton(), lx.LU()))(w, ALPHA)
    relative_error = lambda h: float(
        jnp.linalg.norm(h - exact.hypergradient) / jnp.linalg.norm(exact.hypergradient)
    )
    assert relative_error(biased) > 1e-2
    assert relative_error(refined) < 1e-8
