"""Data hyper-cleaning: one weight per training example, learned on clean ones.

Franceschi et al. 2017 (arXiv 1703.01785), section 5.1; Shaban et al. 2019 (arXiv
1810.10667), section 5.2. Half of the training labels are wrong. The inner problem is a
softmax regression on the weighted training examples,

    L(w, alpha) = mean_i alpha_i CE_i(w) + penalty ||W||²,   alpha in [0, 1]^n,

and the outer loss is the cross-entropy on a small clean validation set.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from .. import data as datasets
from .. import spaces
from ..inner import Descent
from ..problem import Bilevel
from .task import Task

NUM_TRAIN, NUM_VAL, NUM_CLASSES = 1000, 150, 10
HELD_OUT = 50
CORRUPTION = 0.5
SOLVER = Descent(optax.sgd(0.5, momentum=0.9), num_steps=50)


def scores(w: PyTree, x: Array) -> Array:
    """Softmax regression's class scores, ``[n, 10]``."""
    return x @ w["W"] + w["b"][None, :]


def cross_entropy(w: PyTree, batch: PyTree) -> Array:
    """Loss of each example, ``[n]``."""
    return optax.softmax_cross_entropy_with_integer_labels(
        scores(w, batch["x"]), batch["y"]
    )


def train_loss(w: PyTree, alpha: Array, batch: PyTree) -> Array:
    """Weighted cross-entropy and an L2 penalty on the matrix."""
    penalty = batch["penalty"] * jnp.sum(w["W"] ** 2)
    return jnp.mean(alpha * cross_entropy(w, batch)) + penalty


def val_loss(w: PyTree, alpha: Array, batch: PyTree) -> Array:
    """Cross-entropy over the examples in use."""
    del alpha
    return jnp.sum(batch["use"] * cross_entropy(w, batch)) / jnp.sum(batch["use"])


def accuracy(batch: PyTree, w: PyTree, alpha: Array, key: Array) -> Array:
    """Share of the examples in use whose highest score is their class."""
    del alpha, key
    hits = jnp.argmax(scores(w, batch["x"]), axis=-1) == batch["y"]
    return jnp.sum(batch["use"] * hits) / jnp.sum(batch["use"])


def f1_of_wrong_labels(wrong: Array, w: PyTree, alpha: Array, key: Array) -> Array:
    """F1 of 'weight below 1/2' as a detector of wrong labels."""
    del w, key
    flagged = alpha < 0.5
    return 2 * jnp.sum(flagged & wrong) / (jnp.sum(flagged) + jnp.sum(wrong))


def split(data: PyTree, key: Array, hold_out: Array | bool) -> dict[str, PyTree]:
    """Train, validation, held-out and test examples, by a seeded permutation.

    Each training label is replaced by a different class with probability 1/2. With
    ``hold_out`` 50 of the 150 validation examples are out of use for learning and make
    the held-out set.
    """
    order_key, wrong_key, class_key = jax.random.split(key, 3)
    order = jax.random.permutation(order_key, len(data["y"]))
    x, y = data["x"][order], data["y"][order]
    wrong = jax.random.bernoulli(wrong_key, CORRUPTION, (NUM_TRAIN,))
    shift = jax.random.randint(class_key, (NUM_TRAIN,), 1, NUM_CLASSES)
    clean = y[:NUM_TRAIN]
    noisy = jnp.where(wrong, (clean + shift) % NUM_CLASSES, clean)
    held = (jnp.arange(NUM_VAL) < HELD_OUT) & hold_out
    val = slice(NUM_TRAIN, NUM_TRAIN + NUM_VAL)
    test = slice(NUM_TRAIN + NUM_VAL, None)
    part = lambda where, use: {"x": x[where], "y": y[where], "use": use.astype(x.dtype)}
    return {
        "train": {"x": x[:NUM_TRAIN], "y": noisy, "clean": clean, "wrong": wrong},
        "val": part(val, ~held),
        "held": part(val, held),
        "test": part(test, jnp.ones(len(y) - NUM_TRAIN - NUM_VAL)),
    }


def make(
    *,
    key: Array,
    scale: str = "small",
    data_dir: str | None = None,
    penalty: float | Array = 1e-3,
    hold_out: Array | bool = False,
    data: PyTree = None,
) -> Task:
    """Hyper-cleaning on scikit-learn's digits: 1,000 train, 150 validation, 647 test.

    Args:
      key: of the split and the corruption.
      scale: 'small' is the only one so far.
      data_dir: not read: the digits come with scikit-learn.
      penalty: of the inner L2 term.
      hold_out: keep 50 validation examples out of the outer loss, to choose by.
      data: ``{"x", "y"}`` in place of the digits.

    Raises:
      ValueError: another scale.
    """
    del data_dir
    if scale != "small":
        raise ValueError(f"cleaning has scale 'small' only; got {scale!r}")
    data = datasets.load("digits") if data is None else data
    data = jax.tree.map(jnp.asarray, data)
    parts = split(data, key, hold_out)
    train = {"x": parts["train"]["x"], "y": parts["train"]["y"]}
    problem = Bilevel(
        train_loss,
        val_loss,
        train | {"penalty": jnp.asarray(penalty, train["x"].dtype)},
        parts["val"],
    )
    num_features = data["x"].shape[1]
    wrong = parts["train"]["wrong"]
    return Task(
        name="cleaning",
        paradigm="supervised",
        source="Franceschi et al. 2017 (arXiv 1703.01785), section 5.1",
        problem=problem,
        solver=SOLVER,
        w={"W": jnp.zeros((num_features, NUM_CLASSES)), "b": jnp.zeros(NUM_CLASSES)},
        alpha=jnp.full(NUM_TRAIN, 0.5),
        space=spaces.Unit(shape=(NUM_TRAIN,)),
        metrics={
            "test_accuracy": jax.tree_util.Partial(accuracy, parts["test"]),
            "f1": jax.tree_util.Partial(f1_of_wrong_labels, wrong),
        },
    )
