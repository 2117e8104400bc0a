"""Second derivatives against dense ones, closed forms and central differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from hypergrad.products import cross_jvp, cross_vjp, hvp, hvp_and_cross_vjp

RNG = np.random.default_rng(3)
W = {
    "layers": [jnp.asarray(RNG.normal(size=(3, 2))), {"bias": jnp.array([0.3, -0.7])}],
    "scale": jnp.asarray(0.8),
}
ALPHA = ({"penalty": jnp.array([-0.5, 0.4])}, jnp.asarray(RNG.normal(size=3)))
BATCH = {
    "x": jnp.asarray(RNG.normal(size=(5, 3))),
    "label": jnp.array([0, 1, 1, 0, 1]),
}
U, UNRAVEL_W = ravel_pytree(W)
A, UNRAVEL_ALPHA = ravel_pytree(ALPHA)
FLAT = lambda tree: ravel_pytree(tree)[0]


def loss(w, alpha, batch):
    """Every leaf of ``w`` and ``alpha`` meets every other in a nonlinear way."""
    weights, bias = w["layers"][0], w["layers"][1]["bias"]
    penalty, shift = alpha[0]["penalty"], alpha[1]
    features = jnp.tanh((batch["x"] + jnp.sin(shift)[None, :]) @ weights)
    logits = w["scale"] ** 3 * features + bias[None, :]
    picked = jnp.take_along_axis(logits, batch["label"][:, None], axis=1)[:, 0]
    nll = jnp.mean(jax.nn.logsumexp(logits, axis=1) - picked)
    return nll + jnp.sum(jnp.exp(penalty)[None, :] * weights**4) + jnp.sum(bias**4)


def flat_loss(u, a):
    return loss(UNRAVEL_W(u), UNRAVEL_ALPHA(a), BATCH)


@jax.jit
def gradients(u, a):
    return jax.grad(flat_loss, argnums=(0, 1))(u, a)


DENSE_H, DENSE_J = jax.jit(
    lambda u, a: (
        jax.hessian(flat_loss)(u, a),
        jax.jacfwd(jax.grad(flat_loss), argnums=1)(u, a),
    )
)(U, A)


@jax.jit
def products(v, d):
    """``H v``, ``J' v``, ``J d``, and all at once, in flat coordinates."""
    v_tree, d_tree = UNRAVEL_W(v), UNRAVEL_ALPHA(d)
    both = hvp_and_cross_vjp(loss, W, ALPHA, BATCH, v_tree)
    alone = (
        hvp(loss, W, ALPHA, BATCH, v_tree),
        cross_vjp(loss, W, ALPHA, BATCH, v_tree),
        cross_jvp(lambda w, alpha: loss(w, alpha, BATCH), W, (ALPHA,), (d_tree,)),
    )
    return tuple(FLAT(tree) for tree in (*alone, *both))


def vectors(seed):
    generator = np.random.default_rng(seed)
    return generator.normal(size=U.size), generator.normal(size=A.size)


def close(found, expected, tolerance=1e-12):
    scale = max(float(np.abs(expected).max()), 1.0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


def test_products_equal_dense_derivatives_column_by_column():
    """`jax.hessian` and `jacfwd(grad)`; the columns are one batch under vmap."""
    columns = jax.vmap(products, in_axes=(0, None))
    Hv, JTv, _, g, Hv_too, JTv_too = columns(jnp.eye(U.size), jnp.zeros(A.size))
    close(Hv, DENSE_H)
    close(JTv, DENSE_J)
    close(Hv_too, DENSE_H)
    close(JTv_too, DENSE_J)
    Jd = jax.vmap(products, in_axes=(None, 0))(jnp.zeros(U.size), jnp.eye(A.size))[2]
    close(Jd, DENSE_J.T)
    close(g, np.broadcast_to(gradients(U, A)[0], g.shape))


def test_products_equal_central_differences():
    """Differences of first derivatives, which no second derivative has touched."""
    v, d = vectors(0)
    step = 1e-5
    along = lambda du, da: tuple(
        (up - down) / (2 * step)
        for up, down in zip(
            gradients(U + step * du, A + step * da),
            gradients(U - step * du, A - step * da),
            strict=True,
        )
    )
    Hv, JTv, Jd, *_ = products(v, d)
    expected_Hv, expected_JTv = along(v, np.zeros(A.size))
    expected_Jd, _ = along(np.zeros(U.size), d)
    close(Hv, expected_Hv, 1e-8)
    close(JTv, expected_JTv, 1e-8)
    close(Jd, expected_Jd, 1e-8)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_symmetry_adjointness_and_linearity(first, second):
    """``u'Hv = v'Hu`` and ``(J'v)'d = v'(Jd)``, and products are linear."""
    (v, d), (u, e) = vectors(first), vectors(second)
    Hv, JTv, Jd, *_ = products(v, d)
    Hu, JTu, Je, *_ = products(u, e)
    assert np.isclose(u @ Hv, v @ Hu, rtol=1e-10, atol=1e-9)
    assert np.isclose(JTv @ d, v @ Jd, rtol=1e-10, atol=1e-9)
    combined = products(2.0 * v - 3.0 * u, 2.0 * d - 3.0 * e)
    for found, a, b in zip(combined[:3], (Hv, JTv, Jd), (Hu, JTu, Je), strict=True):
        close(found, 2.0 * a - 3.0 * b, 1e-10)


ARRANGEMENTS = {
    "vector": (lambda u: u, lambda tree: tree),
    "list": (
        lambda u: [u[:6].reshape(2, 3), (u[6], u[7:])],
        lambda t: jnp.concatenate([t[0].ravel(), t[1][0][None], t[1][1]]),
    ),
    "dict out of order": (
        lambda u: {"z": u[:4], "a": {"q": u[4:].reshape(5, 1)}},
        lambda t: jnp.concatenate([t["z"], t["a"]["q"].ravel()]),
    ),
}


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_arrangement_of_the_pytree_does_not_matter(name):
    """The same loss of the same nine numbers, held in other containers."""
    arrange, flatten = ARRANGEMENTS[name]
    v, d = vectors(1)

    def arranged(w, alpha, batch):
        return loss(UNRAVEL_W(flatten(w)), UNRAVEL_ALPHA(alpha["all"]), batch)

    w, tangent, alpha = arrange(U), arrange(jnp.asarray(v)), {"all": A}
    both = jax.jit(lambda w, v: hvp_and_cross_vjp(arranged, w, alpha, BATCH, v)[1:])
    Hv, JTv = both(w, tangent)
    expected = products(v, d)
    assert jax.tree.structure(Hv) == jax.tree.structure(w)
    assert jax.tree.structure(JTv) == jax.tree.structure(alpha)
    close(flatten(Hv), expected[0])
    close(JTv["all"], expected[1])


def test_cross_jvp_takes_every_argument_and_passes_integers_by():
    """The dense Jacobians by ``alpha`` and by ``x``; labels have float0 tangents."""
    _, d = vectors(2)
    dx = np.random.default_rng(4).normal(size=BATCH["x"].shape)
    labels = np.zeros(BATCH["label"].shape, jax.dtypes.float0)
    found = jax.jit(
        lambda d, dx: cross_jvp(
            loss, W, (ALPHA, BATCH), (UNRAVEL_ALPHA(d), {"x": dx, "label": labels})
        )
    )(d, dx)
    by_x = jax.jit(
        jax.jacfwd(lambda x: FLAT(jax.grad(loss)(W, ALPHA, {**BATCH, "x": x})))
    )(BATCH["x"])
    close(FLAT(found), DENSE_J @ d + jnp.tensordot(by_x, dx, 2))


@pytest.mark.parametrize("shape", [(), (1,), (4,)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_closed_form(shape, dtype):
    """``L = sum exp(a) w^3``: ``H = 6 w exp(a)``, ``J = 3 w^2 exp(a)``, diagonal."""
    cubic = lambda w, a, batch: jnp.sum(jnp.exp(a) * w**3)
    draw = lambda seed: np.random.default_rng(seed).normal(size=shape).astype(dtype)
    w, a, v = draw(0), draw(1), draw(2)
    g, Hv, JTv = jax.jit(lambda *args: hvp_and_cross_vjp(cubic, *args))(w, a, None, v)
    tolerance = 20 * float(jnp.finfo(dtype).eps)
    assert g.dtype == Hv.dtype == JTv.dtype == dtype
    assert Hv.shape == JTv.shape == shape
    np.testing.assert_allclose(g, 3 * w**2 * np.exp(a), rtol=tolerance)
    np.testing.assert_allclose(Hv, 6 * w * np.exp(a) * v, rtol=tolerance)
    np.testing.assert_allclose(JTv, 3 * w**2 * np.exp(a) * v, rtol=tolerance)


def test_a_loss_that_ignores_alpha_has_no_cross_term():
    """Zeros shaped like ``alpha``, not an error, not None."""
    quartic = lambda w, alpha, batch: jnp.sum(w**4)
    _, Hv, JTv = hvp_and_cross_vjp(
        quartic, jnp.array([1.0, 2.0]), ALPHA, None, jnp.array([1.0, -1.0])
    )
    assert jax.tree.structure(JTv) == jax.tree.structure(ALPHA)
    close(FLAT(JTv), np.zeros(A.size))
    close(Hv, np.array([12.0, -48.0]))
