"""``w`` as one vector gives the same estimates as ``w`` in leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.one_vector import MAX_SIZE, Layout

KEYS = jax.random.split(jax.random.key(0), 3)
LEAVES = {
    "matrix": jax.random.normal(KEYS[0], (3, 2)),
    "nothing": jnp.zeros((0, 4)),
    "scalar": jnp.asarray(0.5),
    "vector": jax.random.normal(KEYS[1], (4,)),
}
EMPTY = hg.Bilevel(lambda w, a, b: 0.0, lambda w, a, b: 0.0)


def test_the_leaves_follow_each_other():
    layout = Layout.from_w(EMPTY, LEAVES)
    expected = np.concatenate([np.ravel(LEAVES[name]) for name in sorted(LEAVES)])
    np.testing.assert_array_equal(layout.join(LEAVES), expected)
    restored = layout.split(layout.join(LEAVES))
    assert jax.tree.structure(restored) == jax.tree.structure(LEAVES)
    jax.tree.map(np.testing.assert_array_equal, restored, LEAVES)


def test_leading_axes_stay():
    """As those of K outer losses, and of the duals of each."""
    layout = Layout.from_w(EMPTY, LEAVES)
    stacked = jax.tree.map(
        lambda x: jnp.stack([jnp.stack([x, 2 * x, 3 * x])] * 2), LEAVES
    )
    vectors = layout.join(stacked)
    assert vectors.shape == (2, 3, 11)
    np.testing.assert_array_equal(vectors[1, 2], 3 * layout.join(LEAVES))
    jax.tree.map(np.testing.assert_array_equal, layout.split(vectors), stacked)


@pytest.mark.parametrize(
    "w",
    [
        jnp.ones(3),
        {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(2, jnp.bfloat16)},
        {"a": jax.ShapeDtypeStruct((MAX_SIZE,), jnp.float32), "b": jnp.ones(1, "f4")},
    ],
    ids=["one leaf", "two dtypes", "large"],
)
def test_these_leaves_stay_apart(w):
    layout = Layout.from_w(EMPTY, w)
    assert layout.join(w) is w
    assert layout.split(w) is w
    assert layout.with_vector(EMPTY) is EMPTY


def inner_loss(w, alpha, batch):
    hidden = jnp.tanh(batch @ w["matrix"].T) @ w["vector"][:3] + w["scalar"]
    penalty = sum(jnp.sum(x**2) for x in jax.tree.leaves(w))
    return jnp.mean((hidden - jnp.sin(batch[:, 0])) ** 2) + jnp.exp(alpha) * penalty


def outer_loss(w, alpha, batch):
    return jnp.mean((jnp.tanh(batch @ w["matrix"].T) @ w["vector"][:3] - 1.0) ** 2)


@pytest.mark.parametrize("num_losses", [1, 2])
def test_an_estimate_and_its_certificate_do_not_depend_on_the_leaves(num_losses):
    """A problem that takes the vector itself is the oracle."""
    layout = Layout.from_w(EMPTY, LEAVES)
    of_vector = lambda loss: lambda v, a, b: loss(layout.split(v), a, b)
    data = jax.random.normal(KEYS[2], (20, 2))
    losses = (outer_loss, lambda w, a, b: inner_loss(w, 0.5 * a, b))[:num_losses]
    wrap = lambda losses: losses[0] if num_losses == 1 else tuple(losses)
    problem = hg.Bilevel(inner_loss, wrap(losses), data, data)
    vector_problem = hg.Bilevel(
        of_vector(inner_loss), wrap([*map(of_vector, losses)]), data, data
    )
    solver = hg.Descent(optax.sgd(0.2), 3000)
    estimator = hg.Implicit(solver, num_newton_steps=2, certify=num_losses == 2)
    actual = hg.hypergradient(problem, estimator)(LEAVES, -3.0)
    expected = hg.hypergradient(vector_problem, estimator)(layout.join(LEAVES), -3.0)
    np.testing.assert_allclose(actual.hypergradient, expected.hypergradient, rtol=1e-8)
    np.testing.assert_allclose(layout.join(actual.w), expected.w, rtol=1e-8)
    for name in ("trusted", "num_hvps", "num_outer_grads"):
        np.testing.assert_array_equal(actual.stats[name], expected.stats[name])
    assert actual.trusted
