"""Semi-supervised learning: one weight per unlabelled example.

Ren, Yeh & Schwing 2020 (arXiv 2007.01293), equation 2. A model trained on a few labels
names the rest; the inner problem is a softmax regression on both,

    L(w, alpha) = mean_i CE_i(w) + mean_u alpha_u CE_u(w) + penalty ||w||²,

i over labelled examples and u over unlabelled ones with their pseudo-labels, alpha in
[0, 1]^m. The outer loss is the cross-entropy on a small labelled validation set. Where
the paper makes pseudo-labels anew at every step (FixMatch), they are made once here, by
the supervised model, so that it is known which are wrong.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from .. import datasets as datasets
from .. import spaces
from ..inner import Descent, Newton
from ..problem import Bilevel
from ..surrogates import AUC
from ..validation import as_key
from . import classifier
from .classifier import (
    check_data,
    check_scale,
    held_out_examples,
    losses,
    mask_held_out,
)
from .networks import softmax_regression
from .task import Task

NUM_CLASSES = 10
# Labelled, validation and unlabelled examples; the rest is for testing.
SIZES = {"small": (50, 100, 1000), "paper": (250, 1000, 48750)}
SOLVER = Descent(optax.sgd(0.5, momentum=0.9), num_steps=50)


val_loss = classifier.bind_score_fn(classifier.val_loss, softmax_regression)
accuracy = classifier.bind_score_fn(classifier.accuracy, softmax_regression)


def supervised_loss(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """The labelled examples and an L2 penalty.

    On the bias too: a class that no label names would have no finite one.
    """
    del alpha
    penalty = batch["penalty"] * optax.tree.norm(w, squared=True)
    return jnp.mean(losses(softmax_regression, w, batch["labelled"])) + penalty


def train_loss(w: PyTree, alpha: Array, batch: PyTree) -> Array:
    """Labelled examples, weighted pseudo-labelled ones, penalty: equation 2."""
    unlabelled = alpha * losses(softmax_regression, w, batch["unlabelled"])
    return supervised_loss(w, alpha, batch) + jnp.mean(unlabelled)


def auroc_of_wrong_labels(wrong: Array, w: PyTree, alpha: Array, key: Array) -> Array:
    """Area under the ROC curve of a low weight as detector of a wrong pseudo-label."""
    del w, key
    return AUC().exact(-alpha, wrong)


def pseudo_labels(w: PyTree, parts: PyTree, penalty: Array) -> Array:
    """The classes that the supervised model gives to the unlabelled examples."""
    batch = {"labelled": parts["labelled"], "penalty": penalty}
    w, _ = Newton().solve(supervised_loss, w, None, batch, jax.random.key(0))
    return jnp.argmax(softmax_regression(w, parts["unlabelled"]["x"]), axis=-1)


def split(
    data: PyTree, key: Array, sizes: tuple[int, int, int], hold_out: Array | bool
) -> dict[str, PyTree]:
    """Labelled, validation, unlabelled, held-out and test examples, by a permutation.

    With ``hold_out`` a third of the validation examples are out of use for learning and
    make the held-out set.
    """
    order = jax.random.permutation(key, len(data["y"]))
    x, y = data["x"][order], data["y"][order]
    labelled, val, unlabelled = sizes
    ends = labelled, labelled + val, labelled + val + unlabelled
    part = lambda where: {"x": x[where], "y": y[where]}
    ones = jnp.ones(len(y), x.dtype)
    used = lambda where: part(where) | {"use": ones[where]}
    val_part = mask_held_out(used(slice(ends[0], ends[1])), hold_out, slice(val // 3))
    return {
        "labelled": part(slice(None, ends[0])),
        "val": val_part,
        "held": held_out_examples(val_part),
        "unlabelled": part(slice(ends[1], ends[2])),
        "test": used(slice(ends[2], None)),
    }


def make(
    *,
    key: Array,
    scale: str = "small",
    data_dir: str | None = None,
    penalty: float | Array = 1e-3,
    hold_out: Array | bool = False,
    data: PyTree = None,
    sizes: tuple[int, int, int] | None = None,
) -> Task:
    """Digits with 50 labels: 100 for validation, 1,000 unlabelled, 647 for testing.

    Args:
      key: of the split.
      scale: 'small', or 'paper': 250 labels, 1,000 for validation, 48,750 unlabelled,
        of the ``data`` that is passed (the paper's are the 50,000 training images of
        CIFAR-10; its network is a wide ResNet, which this is not).
      data_dir: not read: the digits come with scikit-learn.
      penalty: of the inner L2 term, also where the pseudo-labels are made.
      hold_out: keep a third of validation out of the outer loss, to choose by.
      data: ``{"x": [n, features], "y": [n]}`` in place of the digits, classes 0 to 9.
      sizes: labelled, validation and unlabelled examples, in place of the scale's.

    Raises:
      TypeError: data of another kind.
      ValueError: another scale, 'paper' without data, fewer examples than sizes, other
        labels.

    >>> import jax, hypergrad as hg
    >>> task = hg.tasks.semi_supervised.make(key=jax.random.key(0))
    >>> task.alpha.shape
    (1000,)
    """
    key = as_key(key)
    del data_dir
    check_scale(scale, data, sum(SIZES["paper"]) + 1)
    sizes = SIZES[scale] if sizes is None else sizes
    data = datasets.load("digits") if data is None else data
    check_data(data, sum(sizes) + 1, NUM_CLASSES)
    data = jax.tree.map(jnp.asarray, data)
    parts = split(data, key, sizes, hold_out)
    penalty = jnp.asarray(penalty, data["x"].dtype)
    w = {"W": jnp.zeros((data["x"].shape[1], NUM_CLASSES)), "b": jnp.zeros(NUM_CLASSES)}
    pseudo = pseudo_labels(w, parts, penalty)
    train = {
        "labelled": parts["labelled"],
        "unlabelled": {"x": parts["unlabelled"]["x"], "y": pseudo},
        "penalty": penalty,
    }
    wrong = pseudo != parts["unlabelled"]["y"]
    num_unlabelled = sizes[2]
    return Task(
        name="semi_supervised",
        paradigm="semi-supervised",
        source="Ren, Yeh & Schwing 2020 (arXiv 2007.01293), equation 2",
        problem=Bilevel(train_loss, val_loss, train, parts["val"]),
        solver=SOLVER,
        w=w,
        alpha=jnp.full(num_unlabelled, 0.5),
        space=spaces.Unit(shape=(num_unlabelled,)),
        metrics={
            "test_accuracy": jax.tree_util.Partial(accuracy, parts["test"]),
            "auroc": jax.tree_util.Partial(auroc_of_wrong_labels, wrong),
        },
    )
