"""Data hyper-cleaning: learns one weight per training example from clean examples.

Franceschi et al. 2017 (arXiv 1703.01785), section 5.1; Shaban et al. 2019 (arXiv
1810.10667), section 5.2. Half of the training labels are wrong. The inner problem is a
softmax regression on the weighted training examples,

    L(w, alpha) = mean_i alpha_i CE_i(w) + penalty ||W||^2,   alpha in [0, 1]^n,

and the outer loss is the cross-entropy on a small clean validation set.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PyTree

from .. import spaces
from ..batches import Batches
from ..inner import Descent
from ..problem import Bilevel
from ..validation import as_key, is_traced
from . import classifier
from .classifier import (
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
    check_at_least_zero,
    check_booleans,
    check_choice,
    check_finite,
    has_held_out,
    loss_metric,
)

NUM_TRAIN, NUM_VAL, NUM_CLASSES = 1000, 150, 10
NUM_HELD_OUT = 50
CORRUPTION = 0.5
SOLVER = Descent(optax.sgd(0.5, momentum=0.9), num_steps=50)


val_loss = classifier.bind_score_fn(classifier.val_loss, softmax_regression)
accuracy = classifier.bind_score_fn(classifier.accuracy, softmax_regression)


def train_loss(w: PyTree, alpha: Float[Array, " n"], batch: PyTree) -> Array:
    """Returns the weighted cross-entropy plus an L2 penalty on the matrix ``W``."""
    penalty = batch["penalty"] * jnp.sum(w["W"] ** 2)
    return jnp.mean(alpha * losses(softmax_regression, w, batch)) + penalty


def minibatch_train_loss(
    w: PyTree, alpha: Float[Array, " num_train"], batch: PyTree
) -> Array:
    """Returns `train_loss` on the training examples with the numbers ``index``."""
    return train_loss(w, alpha[batch["index"]], batch)


def minibatch_val_loss(w: PyTree, alpha: Array, batch: PyTree) -> Array:
    """Returns an unbiased estimate of `val_loss`; the mean of all ``use`` must be 1."""
    del alpha
    return jnp.mean(batch["use"] * losses(softmax_regression, w, batch))


def f1_of_wrong_labels(
    wrong: Bool[Array, " n"], w: PyTree, alpha: Float[Array, " n"], key: Array
) -> Array:
    """Returns the F1 score of ``alpha < 1/2`` as a detector of wrong labels.

    It is 0 if no label is wrong and none is called wrong.
    """
    del w, key
    predicted = alpha < 0.5
    total = jnp.sum(predicted) + jnp.sum(wrong)
    return 2 * jnp.sum(predicted & wrong) / jnp.maximum(total, 1)


@jax.jit
def split(
    data: PyTree,
    key: Array,
    hold_out: Array | bool,
    corruption: Array | float = CORRUPTION,
) -> dict[str, PyTree]:
    """Returns training, validation, held-out and test examples.

    Args:
      data: ``{"x": [n, features], "y": [n]}``.
      key: PRNG key of the permutation and of the wrong labels.
      hold_out: Whether 50 of the 150 validation examples have ``use`` 0; these
        examples are the held-out split.
      corruption: Probability that a training label is replaced by another class.
    """
    order_key, wrong_key, class_key = jax.random.split(key, 3)
    # The labels depend on the value of corruption, not on its type.
    corruption = jnp.asarray(corruption, float)
    order = random_order(data, order_key)
    x, y = data["x"][order], data["y"][order]
    wrong = jax.random.bernoulli(wrong_key, corruption, (NUM_TRAIN,))
    shift = jax.random.randint(class_key, (NUM_TRAIN,), 1, NUM_CLASSES)
    clean = y[:NUM_TRAIN]
    noisy = jnp.where(wrong, (clean + shift) % NUM_CLASSES, clean)
    with_use = lambda x, y: {"x": x, "y": y, "use": jnp.ones(len(y), x.dtype)}
    num_learned = NUM_TRAIN + NUM_VAL
    val = with_use(x[NUM_TRAIN:num_learned], y[NUM_TRAIN:num_learned])
    val = mask_held_out(val, hold_out, slice(NUM_HELD_OUT))
    return {
        "train": {"x": x[:NUM_TRAIN], "y": noisy, "clean": clean, "wrong": wrong},
        "val": val,
        "held_out": held_out_examples(val),
        "test": with_use(x[num_learned:], y[num_learned:]),
    }


def make(
    *,
    key: Array,
    scale: str = "small",
    penalty: float | Array = 1e-3,
    hold_out: Array | bool = False,
    corruption: Array | float = CORRUPTION,
    batch_size: int | None = None,
    data: PyTree = None,
) -> Task:
    """Returns hyper-cleaning of images with wrong labels.

    On the digits 1,000 images are for training, 150 for validation and 647 for testing.

    Args:
      key: PRNG key of the split and of the wrong labels. With ``jax_enable_x64`` JAX
        draws other wrong labels from the same key.
      scale: 'small', the only scale.
      penalty: Factor of the inner L2 penalty.
      hold_out: Whether 50 validation examples are excluded from the outer loss, for
        choosing settings by the metrics ``held_out_accuracy`` and ``held_out_loss``. If
        it is traced and False, these metrics are NaN.
      corruption: Probability that a training label is wrong.
      batch_size: Batch size of the inner loss, and of the outer loss up to its 150
        examples. Defaults to all examples.
      data: ``{"x": [n, features], "y": [n]}`` with classes 0 to 9 and more than 1,150
        examples. Defaults to the digits.

    Raises:
      TypeError: A number, ``hold_out`` or an array of ``data`` has another type.
      ValueError: ``scale`` is unknown, ``penalty`` is negative or not finite,
        ``corruption`` is not a probability, or ``data`` has another shape, too few
        examples or other labels.
    """
    key = as_key(key)
    check_choice("scale", scale, ("small",))
    check_booleans(hold_out=hold_out)
    check_at_least_zero(penalty=penalty)
    check_finite(corruption=corruption)
    if not is_traced(corruption) and not 0 <= np.asarray(corruption) <= 1:
        raise ValueError(
            f"corruption must be in [0, 1]; got {corruption}. Pass the probability of "
            "a wrong label."
        )
    data = load_data(data, "digits", NUM_TRAIN + NUM_VAL + 1, NUM_CLASSES)
    splits = split(data, key, hold_out, corruption)
    train = {"x": splits["train"]["x"], "y": splits["train"]["y"]}
    train |= {"penalty": as_coefficient(penalty, train["x"].dtype)}
    problem = Bilevel(train_loss, val_loss, train, splits["val"])
    if batch_size is not None:
        problem = _minibatch_problem(train, splits["val"], batch_size)
    num_features = data["x"].shape[1]
    metrics = {
        "test_accuracy": jax.tree_util.Partial(accuracy, splits["test"]),
        "f1": jax.tree_util.Partial(f1_of_wrong_labels, splits["train"]["wrong"]),
    }
    if has_held_out(hold_out, NUM_HELD_OUT, NUM_VAL):
        metrics |= {
            "held_out_accuracy": jax.tree_util.Partial(accuracy, splits["held_out"]),
            "held_out_loss": loss_metric(val_loss, splits["held_out"]),
        }
    return Task(
        paradigm="supervised",
        problem=problem,
        solver=SOLVER,
        w={"W": jnp.zeros((num_features, NUM_CLASSES)), "b": jnp.zeros(NUM_CLASSES)},
        alpha=jnp.full(NUM_TRAIN, 0.5),
        space=spaces.Unit(shape=(NUM_TRAIN,)),
        metrics=metrics,
        splits=splits,
    )


def _minibatch_problem(train: PyTree, val: PyTree, batch_size: int) -> Bilevel:
    """Returns the problem with both losses on batches of examples."""
    train = train | {"index": jnp.arange(NUM_TRAIN)}
    val = val | {"use": val["use"] / jnp.mean(val["use"])}
    return Bilevel(
        minibatch_train_loss,
        minibatch_val_loss,
        Batches(train, batch_size),
        Batches(val, min(batch_size, NUM_VAL)),
    )
