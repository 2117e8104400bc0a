"""Tests of weights of pseudo-labels: central differences, influence functions, data."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from sklearn.metrics import roc_auc_score

import hypergrad as hg
from hypergrad.tasks import semi_supervised
from hypergrad.tasks.classifier import losses
from hypergrad.tasks.networks import softmax_regression
from tests.tasks.task_cases import DIGITS

ALPHA = jnp.linspace(0.2, 0.9, 6)


@pytest.fixture(scope="module")
def task() -> hg.tasks.Task:
    """Returns a task with six unlabeled digits of eight pixels."""
    small = {"x": DIGITS["x"][:300, 20:28].astype(float), "y": DIGITS["y"][:300]}
    return semi_supervised.make(
        key=jax.random.key(5), data=small, sizes=(20, 20, 6), penalty=0.05
    )


@pytest.fixture(scope="module")
def implicit(task) -> hg.Estimate:
    """Returns the estimate of Newton's method and conjugate gradients at `ALPHA`."""
    return hg.hypergradient(task.problem, hg.Implicit(hg.Newton()))(task.w, ALPHA)


def test_implicit_hypergradient_equals_central_differences(task, implicit):
    """Training to convergence is differentiated in each weight."""
    oracle = hg.CentralDifference(hg.Newton(), 1e-5)
    expected = hg.hypergradient(task.problem, oracle)(task.w, ALPHA).hypergradient
    assert jnp.min(jnp.abs(expected)) > 1e-6
    np.testing.assert_allclose(implicit.hypergradient, expected, rtol=1e-5)


def test_implicit_hypergradient_is_the_influence_function(task, implicit):
    """It equals ``-grad CE_u' H^-1 dM/dw / m`` of dense matrices (Ren 2020, eq. 4)."""
    batch = task.problem.inner_data
    w, unravel = ravel_pytree(implicit.w)

    @jax.jit
    def influence(w):
        inner_loss = lambda w: semi_supervised.train_loss(unravel(w), ALPHA, batch)
        outer_loss = lambda w: semi_supervised.val_loss(
            unravel(w), ALPHA, task.problem.outer_data
        )
        example_losses = lambda w: losses(
            softmax_regression, unravel(w), batch["unlabeled"]
        )
        H, b = jax.hessian(inner_loss)(w), jax.grad(outer_loss)(w)
        return -jax.jacobian(example_losses)(w) @ jnp.linalg.solve(H, b) / len(ALPHA)

    np.testing.assert_allclose(implicit.hypergradient, influence(w), rtol=1e-8)


def test_zero_weights_give_the_supervised_model_that_made_the_labels(task):
    """At ``alpha = 0`` training is supervised, and predicts the pseudo-labels."""
    batch = task.problem.inner_data
    solve = jax.jit(hg.Newton().solve, static_argnums=0)
    train = lambda loss: solve(loss, task.w, jnp.zeros(6), batch, jax.random.key(0))[0]
    w = train(semi_supervised.train_loss)
    supervised_w = train(semi_supervised.supervised_loss)
    chex.assert_trees_all_close(w, supervised_w, atol=1e-9)
    scores = softmax_regression(supervised_w, batch["unlabeled"]["x"])
    np.testing.assert_array_equal(batch["unlabeled"]["y"], jnp.argmax(scores, axis=-1))


def test_split_is_a_partition():
    """50 + 100 + 1,000 + 647 images differ."""
    indexed = DIGITS | {"x": jnp.arange(1797)[:, None]}
    sizes = semi_supervised.SIZES["small"]
    parts = semi_supervised.split(indexed, jax.random.key(3), sizes, True)
    names = ("labeled", "val", "unlabeled", "test")
    indices = [np.ravel(parts[name]["x"]) for name in names]
    assert [len(x) for x in indices] == [50, 100, 1000, 647]
    assert sorted(np.concatenate(indices)) == list(range(1797))


def test_auroc_equals_scikit_learn(key):
    """Low weights detect wrong pseudo-labels, and ties count half."""
    keys = jax.random.split(key)
    alpha = jnp.round(jax.random.uniform(keys[0], (200,)), 1)
    is_wrong = jax.random.bernoulli(keys[1], 0.3, (200,))
    actual = semi_supervised.auroc_of_wrong_labels(is_wrong, None, alpha, None)
    expected = roc_auc_score(np.asarray(is_wrong), -np.asarray(alpha))
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_paper_scale_has_the_published_sizes():
    """It has 48,750 unlabeled examples; checked on shapes only."""
    data = {"x": jnp.zeros((50100, 12)), "y": jnp.zeros(50100, int)}
    make_alpha = lambda: (
        semi_supervised.make(key=jax.random.key(0), scale="paper", data=data).alpha
    )
    assert jax.eval_shape(make_alpha).shape == (48750,)
