"""Gauss-Newton products and hypergradients, against dense ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import hypergrad as hg

RNG = np.random.default_rng(0)
ALPHA = jnp.array([-1.0, -1.5])
W = {"first": jnp.asarray(RNG.normal(size=(3, 2))), "last": jnp.array([0.7, -1.1])}
U, UNRAVEL = ravel_pytree(W)
BATCH = {
    "x": jnp.asarray(RNG.normal(size=(6, 3))),
    "y": jnp.asarray(RNG.normal(size=6)),
}


def outputs(w, alpha, batch):
    """A network in two parts, so that outputs are a tree."""
    hidden = jnp.tanh(batch["x"] @ w["first"])
    return {"fit": hidden @ w["last"], "code": hidden}


def cost(z, alpha, batch):
    fit = jnp.mean(jnp.cosh(z["fit"] - batch["y"]))
    return fit + jnp.exp(alpha[0]) * jnp.mean(z["code"] ** 2)


def penalty(w, alpha):
    return jnp.exp(alpha[1]) * sum(jnp.sum(leaf**4) for leaf in jax.tree.leaves(w))


LOSS = hg.CompositeLoss(outputs, cost, penalty)


def dense(w_flat):
    """``Zᵀ C Z + P`` from `jax.jacobian` and `jax.hessian`."""
    z, unravel = ravel_pytree(outputs(UNRAVEL(w_flat), ALPHA, BATCH))
    of_w = lambda u: ravel_pytree(outputs(UNRAVEL(u), ALPHA, BATCH))[0]
    Z = jax.jacobian(of_w)(w_flat)
    C = jax.hessian(lambda z: cost(unravel(z), ALPHA, BATCH))(z)
    P = jax.hessian(lambda u: penalty(UNRAVEL(u), ALPHA))(w_flat)
    return np.asarray(Z.T @ C @ Z + P)


def test_the_loss_is_its_parts():
    expected = cost(outputs(W, ALPHA, BATCH), ALPHA, BATCH) + penalty(W, ALPHA)
    assert float(LOSS(W, ALPHA, BATCH)) == float(expected)
    bare = hg.CompositeLoss(outputs, cost)
    assert float(bare(W, ALPHA, BATCH)) == float(expected - penalty(W, ALPHA))


def test_products_equal_the_dense_matrix():
    product = lambda v: ravel_pytree(LOSS.gauss_newton(W, ALPHA, BATCH, UNRAVEL(v)))[0]
    found = jax.jit(jax.vmap(product, out_axes=1))(jnp.eye(U.size))
    np.testing.assert_allclose(found, dense(U), rtol=0, atol=1e-12)
    H = jax.hessian(lambda u: LOSS(UNRAVEL(u), ALPHA, BATCH))(U)
    assert np.abs(H - dense(U)).max() > 0.1  # it is another matrix than the Hessian


def outer(w, alpha, batch):
    return jnp.sum(jnp.sin(ravel_pytree(w)[0])) + alpha[0]


def standing(batch, loss=LOSS):
    """A problem whose inner solver stands at the data's ``w``."""
    solver = hg.ClosedForm(lambda alpha, batch: batch["w"])
    return hg.Bilevel(loss, outer, batch, batch), solver


AT_W = BATCH | {"w": W}
TIGHT = hg.CG(rtol=1e-12)


def implicitly(curvature, linear_solver=TIGHT, batch=AT_W, loss=LOSS, **settings):
    problem, solver = standing(batch, loss)
    estimator = hg.Implicit(solver, linear_solver, hvp_fn=curvature, **settings)
    return hg.hypergradient(problem, estimator)(batch["w"], ALPHA)


def by_solving(matrix):
    """``dM/dalpha - Jᵀ matrix⁻¹ dM/dw`` in NumPy."""
    gradient = lambda a: ravel_pytree(jax.grad(LOSS)(W, a, BATCH))[0]
    J = np.asarray(jax.jacobian(gradient)(ALPHA))
    b = ravel_pytree(jax.grad(outer)(W, ALPHA, BATCH))[0]
    return np.array([1.0, 0.0]) - J.T @ np.linalg.solve(matrix, b)


@pytest.mark.parametrize(
    "linear_solver",
    [TIGHT, hg.NystromCG(3, rtol=1e-12), hg.NystromCG(3, rtol=1e-12, refresh_every=2)],
    ids=["CG", "NystromCG", "refresh"],
)
def test_the_adjoint_solves_the_dense_matrix(linear_solver):
    damping = 0.3
    found = implicitly(LOSS.gauss_newton, linear_solver, damping=damping)
    expected = by_solving(dense(U) + damping * np.eye(U.size))
    np.testing.assert_allclose(found.hypergradient, expected, rtol=0, atol=1e-9)


def test_an_indefinite_hessian_is_solved_and_not_trusted():
    """Gauss-Newton's matrix is definite there; what H has beside it shows."""
    H = np.asarray(jax.hessian(lambda u: LOSS(UNRAVEL(u), ALPHA, BATCH))(U))
    assert np.linalg.eigvalsh(H)[0] < -0.05 < 0.05 < np.linalg.eigvalsh(dense(U))[0]
    found = implicitly(LOSS.gauss_newton)
    b = ravel_pytree(jax.grad(outer)(W, ALPHA, BATCH))[0]
    v = np.linalg.solve(dense(U), b)
    residual = np.linalg.norm(b - H @ v) / np.linalg.norm(b)
    np.testing.assert_allclose(found.stats["adjoint_residual"], residual, rtol=1e-6)
    np.testing.assert_allclose(found.hypergradient, by_solving(dense(U)), atol=1e-9)
    assert np.isnan(found.stats["ritz_min"])  # of H nothing is known


@pytest.mark.parametrize("certify", [False, True])
def test_a_saddle_is_not_trusted_however_small_the_residual(certify: bool):
    """H = diag(1, -1), Gauss-Newton's matrix is I, the adjoint is nearly [1, 0]."""
    loss = hg.CompositeLoss(
        lambda w, alpha, batch: jnp.array([w[0] - alpha, w[1], w[1] ** 2]),
        lambda z, alpha, batch: 0.5 * z[0] ** 2 + 0.5 * z[1] ** 2 - z[2],
    )
    problem = hg.Bilevel(loss, lambda w, alpha, batch: w[0] + 0.004 * w[1])
    solver = hg.ClosedForm(lambda alpha, batch: jnp.array([alpha, 0.0]))
    estimator = hg.Implicit(solver, TIGHT, hvp_fn=loss.gauss_newton, certify=certify)
    found = hg.hypergradient(problem, estimator)(jnp.zeros(2), 0.7)
    assert found.stats["adjoint_residual"] < 1e-2
    assert found.stats["inner_grad_norm"] < 1e-12
    assert not found.stats["trusted"]


def test_a_linear_model_has_no_other_curvature():
    linear = lambda w, alpha, batch: batch["x"] @ w["first"] @ jnp.ones(2)
    fit = lambda z, alpha, batch: jnp.mean((z - batch["y"]) ** 2)
    ridge = lambda w, alpha: jnp.exp(alpha[0]) * jnp.sum(ravel_pytree(w)[0] ** 2)
    loss = hg.CompositeLoss(linear, fit, ridge)
    problem = hg.Bilevel(loss, outer, BATCH, BATCH)
    one, other = (
        hg.hypergradient(
            problem, hg.Implicit(hg.Newton(), hvp_fn=curvature, certify=True)
        )(W, ALPHA)
        for curvature in (loss.gauss_newton, None)
    )
    np.testing.assert_allclose(one.hypergradient, other.hypergradient, rtol=1e-9)
    assert one.stats["trusted"]


def test_refining_returns_to_the_hessian():
    """On a convex loss, where that is right; from an answer that is not."""
    curved = hg.CompositeLoss(
        lambda w, alpha, batch: jnp.sinh(w),
        lambda z, alpha, batch: jnp.sum((z - 1) ** 2),
        lambda w, alpha: jnp.sum((w - alpha) ** 2),
    )
    problem = hg.Bilevel(curved, lambda w, alpha, batch: jnp.sum(w**2), None, None)
    estimator = hg.Implicit(hg.Newton(), TIGHT, hvp_fn=curved.gauss_newton)
    start, key = jnp.array([0.2, 0.5]), jax.random.key(0)
    biased, state = estimator.estimate(
        problem, estimator.init(problem, start, ALPHA), ALPHA, key
    )
    refined, _ = estimator.refine(problem, state, ALPHA, key)
    right = hg.hypergradient(problem, hg.Implicit(hg.Newton(), TIGHT))(start, ALPHA)
    off = lambda found: float(
        jnp.linalg.norm(found.hypergradient - right.hypergradient)
        / jnp.linalg.norm(right.hypergradient)
    )
    assert off(biased) > 1e-2
    assert off(refined) < 1e-8


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: hg.CompositeLoss("z", cost), TypeError, "outputs must be a function"),
        (lambda: hg.CompositeLoss(outputs, None), TypeError, "cost must be a function"),
        (lambda: hg.CompositeLoss(outputs, cost, 1.0), TypeError, "penalty must be"),
        (
            lambda: hg.Implicit(hg.Newton(), hvp_fn=0.5),
            TypeError,
            "curvature must be a function",
        ),
        (
            lambda: hg.Implicit(
                hg.Descent(optax.sgd(0.1), 3),
                hvp_fn=LOSS.gauss_newton,
                rtol=0.1,
            ),
            ValueError,
            "does not go with rtol",
        ),
    ],
)
def test_what_is_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()
