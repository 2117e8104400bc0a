"""Tests of the second-derivative products against dense derivatives and differences.

Symbols: ``H = d2L/dw2`` and ``J = d2L/dw dalpha``. ``v`` is a vector like ``w``, and
``d`` is a vector like ``alpha``.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from hypergrad.products import (
    cross_jvp,
    cross_vjp,
    hvp,
    hvp_and_cross_vjp,
    with_mixed_mode,
)

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
FLAT_W, UNRAVEL_W = ravel_pytree(W)
FLAT_ALPHA, UNRAVEL_ALPHA = ravel_pytree(ALPHA)
flatten = lambda tree: ravel_pytree(tree)[0]


def loss(w, alpha, batch):
    """A loss in which every leaf of ``w`` and ``alpha`` interacts with every other."""
    weights, bias = w["layers"][0], w["layers"][1]["bias"]
    penalty, shift = alpha[0]["penalty"], alpha[1]
    features = jnp.tanh((batch["x"] + jnp.sin(shift)[None, :]) @ weights)
    logits = w["scale"] ** 3 * features + bias[None, :]
    true_logits = jnp.take_along_axis(logits, batch["label"][:, None], axis=1)[:, 0]
    nll = jnp.mean(jax.nn.logsumexp(logits, axis=1) - true_logits)
    return nll + jnp.sum(jnp.exp(penalty)[None, :] * weights**4) + jnp.sum(bias**4)


def flat_loss(flat_w, flat_alpha):
    return loss(UNRAVEL_W(flat_w), UNRAVEL_ALPHA(flat_alpha), BATCH)


gradients = jax.jit(jax.grad(flat_loss, argnums=(0, 1)))
H, J = jax.jit(
    lambda w, alpha: (
        jax.hessian(flat_loss)(w, alpha),
        jax.jacfwd(jax.grad(flat_loss), argnums=1)(w, alpha),
    )
)(FLAT_W, FLAT_ALPHA)


@jax.jit
def products(v, d):
    """Returns ``H v``, ``J' v`` and ``J d``, then ``dL/dw``, ``H v`` and ``J' v``."""
    v_tree, d_tree = UNRAVEL_W(v), UNRAVEL_ALPHA(d)
    results = (
        hvp(loss, W, ALPHA, BATCH, v_tree),
        cross_vjp(loss, W, ALPHA, BATCH, v_tree),
        cross_jvp(lambda w, alpha: loss(w, alpha, BATCH), W, (ALPHA,), (d_tree,)),
        *hvp_and_cross_vjp(loss, W, ALPHA, BATCH, v_tree),
    )
    return tuple(map(flatten, results))


def random_vectors(seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=FLAT_W.size), rng.normal(size=FLAT_ALPHA.size)


def assert_close(actual, expected, tolerance=1e-12):
    """Compares relative to the largest entry, or to 1."""
    scale = max(float(np.abs(expected).max()), 1.0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def test_products_with_unit_vectors_are_the_columns_of_the_dense_matrices():
    """All columns are one batch under vmap."""
    v_zero, d_zero = jnp.zeros(FLAT_W.size), jnp.zeros(FLAT_ALPHA.size)
    by_v = jax.vmap(products, in_axes=(0, None))(jnp.eye(FLAT_W.size), d_zero)
    by_d = jax.vmap(products, in_axes=(None, 0))(v_zero, jnp.eye(FLAT_ALPHA.size))
    grad = gradients(FLAT_W, FLAT_ALPHA)[0]
    assert_close(by_v[0], H)
    assert_close(by_v[1], J)
    assert_close(by_d[2], J.T)
    assert_close(by_v[3], np.broadcast_to(grad, H.shape))
    assert_close(by_v[4], H)
    assert_close(by_v[5], J)


def test_cross_jvp_differentiates_every_argument_and_skips_integers():
    """The tangents of labels are float0."""
    _, d = random_vectors(2)
    dx = np.random.default_rng(4).normal(size=BATCH["x"].shape)
    labels = np.zeros(BATCH["label"].shape, jax.dtypes.float0)
    product = lambda d, dx: cross_jvp(
        loss, W, (ALPHA, BATCH), (UNRAVEL_ALPHA(d), {"x": dx, "label": labels})
    )
    actual = jax.jit(product)(d, dx)
    grad_fn = lambda x: flatten(jax.grad(loss)(W, ALPHA, {**BATCH, "x": x}))
    jacobian = jax.jit(jax.jacfwd(grad_fn))(BATCH["x"])
    assert_close(flatten(actual), J @ d + jnp.tensordot(jacobian, dx, 2))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((), "float64"), ((1,), "float64"), ((4,), "float64"), ((4,), "float32")],
    ids=str,
)
def test_products_of_a_cubic_loss_are_its_formulas(shape, dtype):
    """For ``L = sum exp(a) w^3``: ``H = 6 w exp(a)`` and ``J = 3 w^2 exp(a)``."""
    cubic = lambda w, a, batch: jnp.sum(jnp.exp(a) * w**3)
    rng = np.random.default_rng(0)
    w, a, v = (rng.normal(size=shape).astype(dtype) for _ in range(3))
    actual = jax.jit(lambda *args: hvp_and_cross_vjp(cubic, *args))(w, a, None, v)
    factor = np.exp(a)
    expected = 3 * w**2 * factor, 6 * w * factor * v, 3 * w**2 * factor * v
    expected = jax.tree.map(lambda x: jnp.asarray(x, dtype), expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    tolerance = 20 * float(jnp.finfo(dtype).eps)
    chex.assert_trees_all_close(actual, expected, rtol=tolerance)


def test_the_cross_term_of_a_loss_without_alpha_is_zero():
    quartic = lambda w, alpha, batch: jnp.sum(w**4)
    w, v = jnp.array([1.0, 2.0]), jnp.array([1.0, -1.0])
    _, Hv, JTv = hvp_and_cross_vjp(quartic, w, ALPHA, None, v)
    chex.assert_trees_all_equal(JTv, jax.tree.map(jnp.zeros_like, ALPHA))
    assert_close(Hv, np.array([12.0, -48.0]))


# Mixed mode.


def update(loss_fn, w, alpha, batch):
    """Returns a function of the value and of the gradient of a loss."""
    value, grad = jax.value_and_grad(loss_fn)(w, alpha, batch)
    terms = jax.tree.map(lambda u, g: jnp.vdot(jnp.sin(u), g**2), w, grad)
    return value**2 + sum(jax.tree.leaves(terms))


@pytest.mark.parametrize("argnum", range(3), ids=["w", "alpha", "batch"])
def test_mixed_mode_has_the_derivatives_of_autodiff(argnum):
    """Also by the floats of the batch, which has integers beside them."""

    @jax.jit
    def run(x):
        args = [W, ALPHA, BATCH]
        args[argnum] = args[argnum] | {"x": x} if argnum == 2 else x
        return [update(f, *args) for f in (loss, with_mixed_mode(loss))]

    x = (W, ALPHA, BATCH["x"])[argnum]
    expected, actual = jax.jit(jax.jacrev(run))(x)
    chex.assert_trees_all_close(actual, expected, rtol=1e-10)
    chex.assert_trees_all_equal(*run(x))


def test_mixed_mode_differentiates_what_the_loss_closes_over():
    """By both modes, from outside of the reverse pass through the gradient."""

    def alpha_grad(factor, wrap):
        closing_loss = wrap(lambda w, alpha, batch: factor * loss(w, alpha, batch))
        grad_fn = jax.grad(lambda alpha: update(closing_loss, W, alpha, BATCH))
        return flatten(grad_fn(ALPHA))

    for derivative in (jax.jacfwd, jax.jacrev):
        actual, expected = (
            jax.jit(derivative(partial(alpha_grad, wrap=wrap)))(2.0)
            for wrap in (with_mixed_mode, lambda f: f)
        )
        np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_mixed_mode_keeps_short_dtypes():
    w = jnp.asarray([0.5, 2.0], jnp.bfloat16)
    cubic = with_mixed_mode(lambda w, alpha, batch: jnp.sum(alpha * w**3))
    grad_fn = lambda w, alpha: jnp.sum(jax.grad(cubic)(w, alpha, None))
    by_w, by_alpha = jax.grad(grad_fn, argnums=(0, 1))(w, jnp.asarray(2.0, jnp.float32))
    assert (by_w.dtype, by_alpha.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(by_w.astype(float), [6.0, 24.0])
    assert by_alpha == 3 * (0.25 + 4.0)


def test_mixed_mode_has_no_forward_derivative():
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda w: with_mixed_mode(loss)(w, ALPHA, BATCH), (W,), (W,))
