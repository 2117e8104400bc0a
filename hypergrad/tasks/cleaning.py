"""Data hyper-cleaning: one weight per training example, learned on clean ones.

Franceschi et al. 2017 (arXiv 1703.01785), section 5.1; Shaban et al. 2019 (arXiv
1810.10667), section 5.2. Half of the training labels are wrong. The inner problem is a
softmax regression on the weighted training examples,

    L(w, alpha) = mean_i alpha_i CE_i(w) + penalty ||W||²,   alpha in [0, 1]^n,

and the outer loss is the cross-entropy on a small clean validation set.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from .. import datasets as datasets
from .. import spaces
from ..inner import Descent
from ..problem import Batches, Bilevel
from ..validation import as_key, is_traced
from . import classifier
from .classifier import check_data, held_out_examples, losses, mask_held_out
from .networks import softmax_regression
from .task import Task

NUM_TRAIN, NUM_VAL, NUM_CLASSES = 1000, 150, 10
HELD_OUT = 50
CORRUPTION = 0.5
SOLVER = Descent(optax.sgd(0.5, momentum=0.9), num_steps=50)


val_loss = classifier.bind_score_fn(classifier.val_loss, softmax_regression)
accuracy = classifier.bind_score_fn(classifier.accuracy, softmax_regression)


def train_loss(w: PyTree, alpha: Array, batch: PyTree) -> Array:
    """Weighted cross-entropy and an L2 penalty on the matrix."""
    penalty = batch["penalty"] * jnp.sum(w["W"] ** 2)
    return jnp.mean(alpha * losses(softmax_regression, w, batch)) + penalty


def train_loss_of_batch(w: PyTree, alpha: Array, batch: PyTree) -> Array:
    """`train_loss` of some examples, which say by ``index`` which they are."""
    return train_loss(w, alpha[batch["index"]], batch)


def val_loss_of_batch(w: PyTree, alpha: Array, batch: PyTree) -> Array:
    """`val_loss` of some examples, whose ``use`` is 1 on average over all of them."""
    del alpha
    return jnp.mean(batch["use"] * losses(softmax_regression, w, batch))


def f1_of_wrong_labels(wrong: Array, w: PyTree, alpha: Array, key: Array) -> Array:
    """F1 of 'weight below 1/2' as a detector of wrong labels."""
    del w, key
    flagged = alpha < 0.5
    return 2 * jnp.sum(flagged & wrong) / (jnp.sum(flagged) + jnp.sum(wrong))


def split(
    data: PyTree,
    key: Array,
    hold_out: Array | bool,
    corruption: Array | float = CORRUPTION,
) -> dict[str, PyTree]:
    """Train, validation, held-out and test examples, by a seeded permutation.

    Each training label is a wrong class with probability ``corruption``. With
    ``hold_out`` 50 of the 150 validation examples are out of use for learning and make
    the held-out set.
    """
    order_key, wrong_key, class_key = jax.random.split(key, 3)
    order = jax.random.permutation(order_key, len(data["y"]))
    x, y = data["x"][order], data["y"][order]
    wrong = jax.random.bernoulli(wrong_key, corruption, (NUM_TRAIN,))
    shift = jax.random.randint(class_key, (NUM_TRAIN,), 1, NUM_CLASSES)
    clean = y[:NUM_TRAIN]
    noisy = jnp.where(wrong, (clean + shift) % NUM_CLASSES, clean)
    part = lambda x, y: {"x": x, "y": y, "use": jnp.ones(len(y), x.dtype)}
    end = NUM_TRAIN + NUM_VAL
    val = part(x[NUM_TRAIN:end], y[NUM_TRAIN:end])
    val = mask_held_out(val, hold_out, slice(HELD_OUT))
    return {
        "train": {"x": x[:NUM_TRAIN], "y": noisy, "clean": clean, "wrong": wrong},
        "val": val,
        "held_out": held_out_examples(val),
        "test": part(x[end:], y[end:]),
    }


def make(
    *,
    key: Array,
    scale: str = "small",
    data_dir: str | None = None,
    penalty: float | Array = 1e-3,
    hold_out: Array | bool = False,
    corruption: Array | float = CORRUPTION,
    batch_size: int | None = None,
    data: PyTree = None,
) -> Task:
    """Hyper-cleaning on scikit-learn's digits: 1,000 train, 150 validation, 647 test.

    Args:
      key: of the split and the corruption.
      scale: 'small' is the only one so far.
      data_dir: not read: the digits come with scikit-learn.
      penalty: of the inner L2 term.
      hold_out: keep 50 validation examples out of the outer loss, to choose by.
      corruption: share of training labels that are wrong.
      batch_size: of both losses; None means all examples.
      data: ``{"x": [n, features], "y": [n]}`` in place of the digits, classes 0 to 9,
        more than 1,150 examples.

    Raises:
      TypeError: data of another kind.
      ValueError: another scale, a corruption that is no share, data of another shape,
        too few, or with other labels.
    """
    key = as_key(key)
    del data_dir
    if scale != "small":
        raise ValueError(f"cleaning has scale 'small' only; got {scale!r}")
    if not is_traced(corruption) and not 0 <= np.asarray(corruption) <= 1:
        raise ValueError(f"corruption must be a share in [0, 1]; got {corruption}")
    data = datasets.load("digits") if data is None else data
    check_data(data, NUM_TRAIN + NUM_VAL + 1, NUM_CLASSES)
    data = jax.tree.map(jnp.asarray, data)
    parts = split(data, key, hold_out, corruption)
    train = {"x": parts["train"]["x"], "y": parts["train"]["y"]}
    train |= {"penalty": jnp.asarray(penalty, train["x"].dtype)}
    problem = Bilevel(train_loss, val_loss, train, parts["val"])
    if batch_size is not None:
        train |= {"index": jnp.arange(NUM_TRAIN)}
        use = parts["val"]["use"]
        val = parts["val"] | {"use": use / jnp.mean(use)}
        batches = (Batches(each, batch_size) for each in (train, val))
        problem = Bilevel(train_loss_of_batch, val_loss_of_batch, *batches)
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
