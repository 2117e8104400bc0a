"""Tests of hyper-cleaning: the split, wrong labels, metrics and batches."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import f1_score

from hypergrad.tasks import cleaning
from tests.tasks.task_cases import DIGITS

W = {"W": jnp.ones((64, 10)) * jnp.arange(10.0)[None] / 10, "b": jnp.zeros(10)}


def test_the_split_is_a_partition_and_wrong_labels_are_marked():
    """Half of 1,000 training labels are another class; no other label changes."""
    numbered = DIGITS | {"x": jnp.arange(1797)[:, None]}
    splits = cleaning.split(numbered, jax.random.key(3), False)
    numbers = [np.ravel(splits[name]["x"]) for name in ("train", "val", "test")]
    assert [len(x) for x in numbers] == [1000, 150, 647]
    assert sorted(np.concatenate(numbers)) == list(range(1797))
    train = splits["train"]
    for name, y in (("train", train["clean"]), ("val", splits["val"]["y"])):
        np.testing.assert_array_equal(y, DIGITS["y"][np.ravel(splits[name]["x"])])
    np.testing.assert_array_equal(train["y"] != train["clean"], train["wrong"])
    assert 0.45 < np.mean(train["wrong"]) < 0.55
    assert set(np.unique((train["y"] - train["clean"]) % 10)) == set(range(10))


@pytest.mark.parametrize("corruption", [0, 1, jnp.asarray(1), np.int64(0)])
def test_all_labels_or_none_are_wrong(corruption):
    splits = cleaning.make(key=jax.random.key(0), corruption=corruption).splits
    train = splits["train"]
    assert np.all((train["y"] != train["clean"]) == (corruption == 1))


def test_wrong_labels_depend_on_the_value_of_corruption_only():
    expected, *others = (
        cleaning.make(key=jax.random.key(0), corruption=x).splits["train"]["y"]
        for x in (0.25, np.float32(0.25), jnp.asarray(0.25, jnp.bfloat16))
    )
    for labels in others:
        np.testing.assert_array_equal(labels, expected)


def test_f1_is_zero_if_no_label_is_wrong_or_called_wrong():
    right, alpha = jnp.zeros(5, bool), jnp.full(5, 0.5)
    assert cleaning.f1_of_wrong_labels(right, None, alpha, None) == 0


def test_batches_larger_than_the_validation_set_are_of_the_inner_loss_only():
    problem = cleaning.make(key=jax.random.key(0), batch_size=400).problem
    assert problem.inner_data.batch_size == 400
    assert problem.outer_data.batch_size == 150


def test_f1_of_wrong_labels_equals_scikit_learn():
    alpha_key, wrong_key = jax.random.split(jax.random.key(0))
    alpha = jax.random.uniform(alpha_key, (1000,))
    wrong = jax.random.bernoulli(wrong_key, 0.3, (1000,))
    actual = cleaning.f1_of_wrong_labels(wrong, None, alpha, None)
    expected = f1_score(np.asarray(wrong), np.asarray(alpha) < 0.5)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_losses_on_a_batch_of_all_examples_equal_the_full_losses(key):
    """Each example keeps its own weight in a batch of another order."""
    make = lambda **arguments: (
        cleaning.make(key=jax.random.key(0), hold_out=True, **arguments).problem
    )
    full, batched = make(), make(batch_size=10)
    alpha = jax.random.uniform(key, (1000,))
    order = jax.random.permutation(key, 1000)
    train = batched.inner_data.data
    permuted = {
        name: leaf[order] if jnp.ndim(leaf) else leaf for name, leaf in train.items()
    }
    chex.assert_trees_all_close(
        batched.inner_loss(W, alpha, permuted),
        full.inner_loss(W, alpha, full.inner_data),
        rtol=1e-6,
    )
    chex.assert_trees_all_close(
        batched.outer_loss(W, alpha, batched.outer_data.data),
        full.outer_loss(W, alpha, full.outer_data),
        rtol=1e-6,
    )
