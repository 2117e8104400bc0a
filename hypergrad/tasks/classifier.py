"""Data checks, losses, metrics and the data split shared by the classification tasks.

A task binds the losses and metrics to the scores of its own model,
``score_fn(w, x) -> [n, classes]``. A batch is a dict of the features ``x``, the labels
``y`` and the weights ``use``, which are 0 for examples that do not count.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Num, PyTree

from .. import datasets
from ..metrics import Metric
from ..validation import is_traced
from .task import check_choice, has_held_out, loss_metric

ScoreFn = Callable[[PyTree, Array], Array]

# Checks of arguments, made before anything is computed.


def check_scale(scale: str, data: Any, min_examples: int) -> None:
    """Checks the scale of a task whose 'paper' scale needs data of the user.

    Raises:
      ValueError: The scale is neither 'small' nor 'paper', or it is 'paper' and
        ``data`` is None.
    """
    check_choice("scale", scale, ("small", "paper"))
    if scale == "paper" and data is None:
        raise ValueError(
            "data must be given for scale 'paper', because the package does not "
            "contain it; got None. Pass {'x': ..., 'y': ...} with at least "
            f"{min_examples:,} examples."
        )


def check_data(
    data: Any,
    min_examples: int,
    num_classes: int = 10,
    names: tuple[str, ...] = ("x", "y"),
) -> None:
    """Checks that data is ``{"x": [n, features], "y": [n]}`` and large enough.

    Args:
      data: Data passed by the user.
      min_examples: Number of examples that the splits need, including one test example.
      num_classes: Number of classes; labels are integers from 0 to ``num_classes - 1``.
        Values are checked unless they are traced.
      names: Required arrays; ``("x",)`` where labels are not needed.

    Raises:
      TypeError: ``data`` is not a dict of arrays, the features are not floating-point
        or the labels are not integers.
      ValueError: An array is missing or has another shape, the examples are too few, or
        too few without the mark ``test``; a feature is not finite or a label is out of
        range.
    """
    expected = "data must be a dict {'x': array [n, features], 'y': array [n]}"
    if not isinstance(data, Mapping):
        raise TypeError(f"{expected}; got {type(data).__name__}.")
    if missing := [name for name in names if name not in data]:
        raise ValueError(f"{expected}; got {sorted(data)} without {missing}.")
    if any(not hasattr(leaf, "shape") for leaf in data.values()):
        types = {name: type(leaf).__name__ for name, leaf in data.items()}
        raise TypeError(f"{expected}; got {types}. Convert the values by np.asarray.")
    shapes = {name: tuple(data[name].shape) for name in names}
    num_axes = {"x": 2, "y": 1}
    num_examples = shapes["x"][0] if shapes["x"] else 0
    if any(
        len(shape) != num_axes[name] or shape[0] != num_examples
        for name, shape in shapes.items()
    ):
        raise ValueError(f"{expected}; got shapes {shapes}.")
    if num_examples < min_examples:
        raise ValueError(
            f"data must have at least {min_examples} examples, one of them for "
            f"testing; got {num_examples}. Pass more data or smaller sizes."
        )
    check_features(data["x"])
    if "y" in names:
        check_labels(data["y"], num_classes)
    if "test" in data:
        check_test_marks(data["test"], num_examples, min_examples - 1)


def check_test_marks(marks: Any, num_examples: int, num_unmarked: int) -> None:
    """Checks the marks of test examples, which no other split may contain.

    Raises:
      ValueError: They are not boolean of shape ``[n]``, or too few are False.
    """
    if marks.shape != (num_examples,) or marks.dtype != bool:
        raise ValueError(
            f"data['test'] must be boolean of shape [{num_examples}]; got "
            f"{marks.dtype} of shape {marks.shape}."
        )
    if (
        not is_traced(marks)
        and (count := int(np.sum(~np.asarray(marks)))) < num_unmarked
    ):
        raise ValueError(
            f"data['test'] must leave {num_unmarked} examples for training and "
            f"validation; got {count}. Pass more data or smaller sizes."
        )


def check_features(x: Num[Array, "n ..."], name: str = "data['x']") -> None:
    """Checks that features are floating-point and, unless traced, finite.

    Raises:
      TypeError: The features have another type, which the hyperparameters would adopt.
      ValueError: A feature is NaN or infinite.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be floating-point; got {x.dtype}. Divide pixels by their "
            "maximum or use astype."
        )
    if not is_traced(x) and not np.isfinite(np.asarray(x)).all():
        raise ValueError(
            f"{name} must be finite; got NaN or infinity. Remove these examples."
        )


def check_labels(y: Num[Array, " n"], num_classes: int) -> None:
    """Checks that labels are integers and, unless traced, in ``0..num_classes - 1``.

    Raises:
      TypeError: The labels are not integers.
      ValueError: A label is out of range, which would make the cross-entropy NaN.
    """
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(
            f"data['y'] must be integers; got {y.dtype}. Number the classes from 0."
        )
    if is_traced(y):
        return
    labels = np.asarray(y)
    min_label, max_label = labels.min(), labels.max()
    if min_label < 0 or max_label >= num_classes:
        raise ValueError(
            f"data['y'] must be in 0..{num_classes - 1}; got labels from {min_label} "
            f"to {max_label}. Number the classes from 0."
        )


def check_square(x: Array, *, even: bool = False, min_side: int = 1) -> None:
    """Checks that ``x`` has shape ``[n, side * side]``.

    Args:
      x: Features.
      even: Whether ``side`` must be even.
      min_side: Smallest ``side``.

    Raises:
      ValueError: ``x`` has another number of features.
    """
    side = math.isqrt(x.shape[1])
    if side**2 != x.shape[1] or (even and side % 2) or side < min_side:
        kind = "even" if even else "integer"
        expected = f"square images of an {kind} side of at least {min_side}"
        raise ValueError(
            f"data['x'] must be flat {expected}, [n, side * side]; got {x.shape[1]} "
            "features. Crop or pad the images."
        )


# Losses and metrics of a model, which is given by its score function.


@functools.cache
def make_score_fn(graph: nnx.GraphDef) -> ScoreFn:
    """Returns ``(w, x) -> scores`` of a module.

    Equal graphs give the same function, so that JAX traces it once.
    """
    return lambda w, x: nnx.merge(graph, w)(x)


@functools.cache
def bind_score_fn(function: Callable, score_fn: ScoreFn) -> Callable:
    """Returns ``functools.partial(function, score_fn)``.

    Equal arguments give the same object, so that JAX traces it once.
    """
    return functools.partial(function, score_fn)


def losses(score_fn: ScoreFn, w: PyTree, batch: PyTree) -> Float[Array, " n"]:
    """Returns the cross-entropy of each example."""
    return optax.softmax_cross_entropy_with_integer_labels(
        class_scores(score_fn(w, batch["x"])), batch["y"]
    )


def cross_entropy(score_fn: ScoreFn, w: PyTree, batch: PyTree) -> Array:
    """Returns the mean cross-entropy of the examples in use."""
    return weighted_mean(losses(score_fn, w, batch), batch["use"])


def weighted_mean(values: Num[Array, " n"], weights: Float[Array, " n"]) -> Array:
    """Returns the weighted mean of the values, by sums of at least single precision.

    The sum of 2,049 half-precision ones is 2,048, and that of 65,536 is infinite.
    """
    weights = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
    return jnp.sum(weights * values) / jnp.sum(weights)


def class_scores(scores: Float[Array, "n k"]) -> Float[Array, "n classes"]:
    """Returns one score per class; a single score belongs to class 1 of two."""
    return jnp.pad(scores, ((0, 0), (1, 0))) if scores.shape[1] == 1 else scores


def val_loss(score_fn: ScoreFn, w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Returns the mean cross-entropy, as a loss."""
    del alpha
    return cross_entropy(score_fn, w, batch)


def accuracy(
    score_fn: ScoreFn, batch: PyTree, w: PyTree, alpha: PyTree, key: Array
) -> Array:
    """Returns the fraction of the examples in use that are classified correctly."""
    del alpha, key
    predicted = jnp.argmax(class_scores(score_fn(w, batch["x"])), axis=1)
    return weighted_mean(predicted == batch["y"], batch["use"])


def make_metrics(
    score_fn: ScoreFn, test: PyTree, val: PyTree, hold_out: Array | bool
) -> dict[str, Metric]:
    """Returns accuracy and loss of test examples, and of held-out ones if there are.

    Args:
      score_fn: ``(w, x) -> scores``.
      test: Test examples.
      val: Result of `mask_held_out`.
      hold_out: Argument of `mask_held_out`. If it is traced, there are no metrics of
        held-out examples, because those of no examples would be NaN.
    """
    examples, num_val = {"test": test}, len(val["y"])
    if has_held_out(hold_out, num_val // 3, num_val) and not is_traced(hold_out):
        examples["held_out"] = held_out_examples(val)
    accuracy_fn = bind_score_fn(accuracy, score_fn)
    loss = bind_score_fn(val_loss, score_fn)
    metrics: dict[str, Metric] = {}
    for split_name, batch in examples.items():
        metrics |= {
            f"{split_name}_accuracy": jax.tree_util.Partial(accuracy_fn, batch),
            f"{split_name}_loss": loss_metric(loss, batch),
        }
    return metrics


# Data.


def load_data(
    data: Any,
    name: str,
    min_examples: int,
    num_classes: int = 10,
    data_dir: str | None = None,
) -> dict[str, Array]:
    """Returns the arrays of the data of the user, or of a data set.

    Args:
      data: Data passed by the user, or None.
      name: Name of the data set that is used if ``data`` is None.
      min_examples, num_classes: As for `check_data`.
      data_dir: Folder of the data set; see `hypergrad.datasets.load`.

    Raises:
      FileNotFoundError: The data set is not found.
      TypeError, ValueError: As for `check_data`.
    """
    data = datasets.load(name, data_dir) if data is None else data
    check_data(data, min_examples, num_classes)
    return as_arrays(data)


def as_arrays(
    data: Mapping[str, Any], names: tuple[str, ...] = ("x", "y")
) -> dict[str, Array]:
    """Returns the named arrays and the marks ``test`` of data that `check_data` passes.

    The data may be a mapping that is no dict, such as an opened ``npz`` file, and may
    have further entries, which are dropped.
    """
    return {name: jnp.asarray(data[name]) for name in (*names, "test") if name in data}


def random_order(data: PyTree, key: Array) -> Int[Array, " n"]:
    """Returns the indices of all examples in random order, test examples last.

    Args:
      data: ``{"x": [n, features]}``. A boolean array ``test`` marks test examples.
      key: PRNG key of the permutation.
    """
    order = jax.random.permutation(key, len(data["x"]))
    if "test" in data:
        order = order[jnp.argsort(jnp.asarray(data["test"])[order], stable=True)]
    return order


def split(
    data: PyTree, key: Array, sizes: tuple[int, int, int]
) -> dict[str, dict[str, Array]]:
    """Returns training, validation and test examples, chosen by a random permutation.

    Args:
      data: ``{"x": [n, features], "y": [n]}``. A boolean array ``test`` marks examples
        that come last, that is, in the test split.
      key: PRNG key of the permutation.
      sizes: Numbers of training, validation and test examples. Fewer examples are left
        for testing if the data is small.
    """
    order = random_order(data, key)
    num_train, num_val, num_test = sizes
    indices = {
        "train": order[:num_train],
        "val": order[num_train : num_train + num_val],
        "test": order[max(num_train + num_val, len(order) - num_test) :],
    }
    return {
        name: {
            "x": data["x"][index],
            "y": data["y"][index],
            "use": jnp.ones(index.shape),
        }
        for name, index in indices.items()
    }


def mean_and_deviation(x: Float[Array, "n features"]) -> tuple[Array, Array]:
    """Returns mean and standard deviation of each feature, ``[1, features]``.

    A constant feature has its value as mean and deviation 1, so that it becomes 0. The
    mean of equal numbers may differ from them by rounding. Sums and squares neither
    overflow nor underflow, because powers of two, which are exact, scale them to 1.
    """
    is_constant = jnp.all(x == x[:1], axis=0, keepdims=True)
    max_exponent = lambda x: jnp.frexp(jnp.max(jnp.abs(x), axis=0, keepdims=True))[1]
    exponent = max_exponent(x)
    scaled = jnp.ldexp(x, -exponent)
    scaled_mean = jnp.mean(scaled, axis=0, keepdims=True)
    error_exponent = max_exponent(scaled - scaled_mean)
    scaled_deviation = jnp.std(
        jnp.ldexp(scaled, -error_exponent), axis=0, keepdims=True
    )
    deviation = jnp.ldexp(scaled_deviation, exponent + error_exponent)
    is_constant |= deviation == 0  # below the smallest normal number
    mean = jnp.where(is_constant, x[:1], jnp.ldexp(scaled_mean, exponent))
    return mean, jnp.where(is_constant, 1, deviation)


def mask_held_out(
    val: PyTree, hold_out: Bool[Array, ""] | bool, examples: slice | None = None
) -> PyTree:
    """Returns validation data without the held-out examples, whose ``use`` becomes 0.

    Args:
      val: Validation data.
      hold_out: Whether any example is held out; a traced value keeps all shapes.
      examples: Held-out examples. Defaults to the last third.
    """
    num_val = len(val["y"])
    examples = slice(num_val - num_val // 3, None) if examples is None else examples
    is_held_out = jnp.zeros(num_val, bool).at[examples].set(True)
    use = jnp.where(is_held_out & jnp.asarray(hold_out), 0, val["use"])
    return val | {"use": use}


def held_out_examples(val: PyTree) -> PyTree:
    """Returns the held-out examples of `mask_held_out`, for choosing settings."""
    return val | {"use": 1 - val["use"]}
