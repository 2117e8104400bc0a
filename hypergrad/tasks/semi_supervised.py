"""Semi-supervised learning: one weight per unlabeled example.

Ren, Yeh & Schwing 2020 (arXiv 2007.01293), equation 2. A model that was trained on a
few labels predicts pseudo-labels of the other examples. The inner problem is a softmax
regression on both,

    L(w, alpha) = mean_i CE_i(w) + mean_u alpha_u CE_u(w) + penalty ||w||²,

over labeled examples i and unlabeled examples u with their pseudo-labels; alpha is in
[0, 1]^m. The outer loss is the cross-entropy on a small labeled validation set. The
paper makes new pseudo-labels at every step (FixMatch). Here the supervised model makes
them once, so that the wrong ones are known.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from .. import spaces
from ..inner import Descent, Newton
from ..metrics import Metric
from ..problem import Bilevel
from ..surrogates import AUC
from ..validation import as_key
from . import classifier
from .classifier import (
    check_scale,
    held_out_examples,
    load_data,
    losses,
    mask_held_out,
    random_order,
)
from .networks import softmax_regression
from .task import (
    Task,
    as_coefficient,
    as_sizes,
    check_at_least_zero,
    check_booleans,
    check_choice,
    has_held_out,
    loss_metric,
)

NUM_CLASSES = 10
# Numbers of labeled, validation and unlabeled examples. The rest is for testing.
SIZES = {"small": (50, 100, 1000), "paper": (250, 1000, 48750)}
SOLVER = Descent(optax.sgd(0.5, momentum=0.9), num_steps=50)


val_loss = classifier.bind_score_fn(classifier.val_loss, softmax_regression)
accuracy = classifier.bind_score_fn(classifier.accuracy, softmax_regression)


def supervised_loss(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Returns the cross-entropy of the labeled examples and an L2 penalty.

    The penalty includes the bias, because the optimal bias of a class without labels is
    not finite.
    """
    del alpha
    penalty = batch["penalty"] * optax.tree.norm(w, squared=True)
    return jnp.mean(losses(softmax_regression, w, batch["labeled"])) + penalty


def train_loss(w: PyTree, alpha: Array, batch: PyTree) -> Array:
    """Returns the loss of equation 2, with one weight ``alpha`` per pseudo-label."""
    weighted_losses = alpha * losses(softmax_regression, w, batch["unlabeled"])
    return supervised_loss(w, alpha, batch) + jnp.mean(weighted_losses)


def auroc_of_wrong_labels(
    is_wrong: Array, w: PyTree, alpha: Array, key: Array
) -> Array:
    """Returns the area under the ROC curve of low weights as detectors of errors.

    It is 0 if every label is wrong, or none.
    """
    del w, key
    return AUC().exact(-alpha, is_wrong)


@jax.jit
def pseudo_labels(w: PyTree, splits: PyTree, penalty: Array) -> Array:
    """Returns the classes that the supervised model predicts for unlabeled examples."""
    batch = {"labeled": splits["labeled"], "penalty": penalty}
    w, _ = Newton().solve(supervised_loss, w, None, batch, jax.random.key(0))
    return jnp.argmax(softmax_regression(w, splits["unlabeled"]["x"]), axis=-1)


@functools.partial(jax.jit, static_argnames="sizes")
def split(
    data: PyTree, key: Array, sizes: tuple[int, ...], hold_out: Array | bool
) -> dict[str, PyTree]:
    """Splits the data by a random permutation.

    Args:
      data: ``{"x": [n, features], "y": [n]}``.
      key: PRNG key of the permutation.
      sizes: Numbers of labeled, validation and unlabeled examples.
      hold_out: Whether a third of the validation examples is removed from the part
        "val" by its weight ``use``. These examples are then the part "held_out".
    """
    order = random_order(data, key)
    x, y = data["x"][order], data["y"][order]
    num_labeled, num_val, num_unlabeled = sizes
    unlabeled_start = num_labeled + num_val
    test_start = unlabeled_start + num_unlabeled
    ones = jnp.ones(len(y), x.dtype)
    select = lambda indices: {"x": x[indices], "y": y[indices]}
    select_with_use = lambda indices: select(indices) | {"use": ones[indices]}
    val = select_with_use(slice(num_labeled, unlabeled_start))
    val = mask_held_out(val, hold_out, slice(num_val // 3))
    return {
        "labeled": select(slice(None, num_labeled)),
        "val": val,
        "held_out": held_out_examples(val),
        "unlabeled": select(slice(unlabeled_start, test_start)),
        "test": select_with_use(slice(test_start, None)),
    }


def make_metrics(
    splits: PyTree, predictions: Array, hold_out: Array | bool
) -> dict[str, Metric]:
    """Returns the metrics, and those of held-out examples if there are any.

    Args:
      splits: Result of `split`.
      predictions: Result of `pseudo_labels`.
      hold_out: Argument of `make`.
    """
    num_val = len(splits["val"]["y"])
    is_wrong = predictions != splits["unlabeled"]["y"]
    metrics = {
        "test_accuracy": jax.tree_util.Partial(accuracy, splits["test"]),
        "auroc": jax.tree_util.Partial(auroc_of_wrong_labels, is_wrong),
    }
    if has_held_out(hold_out, num_val // 3, num_val):
        metrics |= {
            "held_out_accuracy": jax.tree_util.Partial(accuracy, splits["held_out"]),
            "held_out_loss": loss_metric(val_loss, splits["held_out"]),
        }
    return metrics


def make(
    *,
    key: Array,
    scale: str = "small",
    penalty: float | Array = 1e-3,
    hold_out: Array | bool = False,
    data: PyTree = None,
    sizes: Sequence[int] | None = None,
) -> Task:
    """Returns the task on digits, of which 50 have labels.

    Of the others, 100 are for validation, 1,000 are unlabeled and 647 are for testing.

    Args:
      key: PRNG key of the split.
      scale: 'small', or 'paper': 250 labels, 1,000 validation and 48,750 unlabeled
        examples of the ``data``, which must be given. The paper uses the 50,000
        training images of CIFAR-10 and a wide ResNet, which this task does not have.
      penalty: Coefficient of the inner L2 penalty, also for the supervised model that
        makes the pseudo-labels.
      hold_out: Whether a third of the validation examples is not in the outer loss but
        in the metrics ``held_out_accuracy`` and ``held_out_loss``, for model selection.
        Defaults to False. If it is traced and False, these metrics are NaN.
      data: ``{"x": [n, features], "y": [n]}`` with classes 0 to 9. Defaults to
        scikit-learn's digits.
      sizes: Numbers of labeled, validation and unlabeled examples. Defaults to the
        sizes of the scale.

    Raises:
      TypeError: ``penalty``, ``sizes``, ``hold_out`` or data has a wrong type.
      ValueError: The scale is unknown, ``penalty`` is negative or not finite, the sizes
        are not three positive integers or too small for ``hold_out``, or data is
        missing, has a wrong shape or a wrong label, or is smaller than the sizes.

    >>> import jax, hypergrad as hg
    >>> task = hg.tasks.semi_supervised.make(key=jax.random.key(0))
    >>> task.alpha.shape
    (1000,)
    """
    key = as_key(key)
    check_choice("scale", scale, tuple(SIZES))
    check_booleans(hold_out=hold_out)
    check_at_least_zero(penalty=penalty)
    split_sizes = as_sizes(sizes, SIZES[scale])
    num_unlabeled = split_sizes[2]
    check_scale(scale, data, sum(split_sizes) + 1)
    data = load_data(data, "digits", sum(split_sizes) + 1, NUM_CLASSES)
    splits = split(data, key, split_sizes, hold_out)
    penalty = as_coefficient(penalty, data["x"].dtype)
    w = {"W": jnp.zeros((data["x"].shape[1], NUM_CLASSES)), "b": jnp.zeros(NUM_CLASSES)}
    predictions = pseudo_labels(w, splits, penalty)
    train = {
        "labeled": splits["labeled"],
        "unlabeled": {"x": splits["unlabeled"]["x"], "y": predictions},
        "penalty": penalty,
    }
    return Task(
        paradigm="semi-supervised",
        problem=Bilevel(train_loss, val_loss, train, splits["val"]),
        solver=SOLVER,
        w=w,
        alpha=jnp.full(num_unlabeled, 0.5),
        space=spaces.Unit(shape=(num_unlabeled,)),
        metrics=make_metrics(splits, predictions, hold_out),
    )
