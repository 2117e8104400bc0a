"""What tasks that classify share: checks of data, losses, accuracy, the split."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, PyTree

from ..validation import is_traced

Score = Callable[[PyTree, Array], Array]


# Arguments, refused before anything is computed with them.


def check_scale(scale: str, data: Any, least: int) -> None:
    """Refuses another scale than 'small', or 'paper' with data, ``least`` examples."""
    if scale not in ("small", "paper"):
        raise ValueError(f"scale must be 'small' or 'paper'; got {scale!r}")
    if scale == "paper" and data is None:
        raise ValueError(
            f"scale 'paper' needs data=, {{'x': ..., 'y': ...}} of at least {least:,} "
            "examples: none comes with the package"
        )


def check_data(
    data: Any, least: int, num_classes: int = 10, names: tuple[str, ...] = ("x", "y")
) -> None:
    """Refuses what is no ``{"x": [n, features], "y": [n]}`` to learn from.

    Args:
      data: of a user.
      least: how many examples the parts take, one for testing included.
      num_classes: labels are 0 to one less. Numbers are read unless traced.
      names: ("x",) where no label is needed.

    Raises:
      TypeError: no dict of arrays, features that are no floats, labels no integers.
      ValueError: a missing name, other shapes, too few examples, features that are not
        finite, other labels.
    """
    wanted = "data must be a dict {'x': array [n, features], 'y': array [n]}"
    if not isinstance(data, Mapping):
        raise TypeError(f"{wanted}; got {type(data).__name__}")
    if lacking := [name for name in names if name not in data]:
        raise ValueError(f"{wanted}; {lacking} is missing in {sorted(data)}")
    if any(not hasattr(leaf, "shape") for leaf in data.values()):
        raise TypeError(f"{wanted}; not all are arrays, use np.asarray")
    shapes = {name: tuple(data[name].shape) for name in names}
    if any(
        len(shape) != {"x": 2, "y": 1}[name] or shape[0] != shapes["x"][0]
        for name, shape in shapes.items()
    ):
        raise ValueError(f"{wanted}; got shapes {shapes}")
    if shapes["x"][0] < least:
        raise ValueError(
            f"data has {shapes['x'][0]} examples; {least - 1} are to learn from, and "
            "testing needs one at least: pass more data or smaller sizes"
        )
    check_features(data["x"])
    if "y" in names:
        check_labels(data["y"], num_classes)


def check_features(x: Array) -> None:
    """Refuses integers, of whose type penalties would be, and what is not finite."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"data['x'] must be floats, of pixels in [0, 1]; got {x.dtype}: divide, or "
            "use astype"
        )
    if not is_traced(x) and not np.isfinite(np.asarray(x)).all():
        raise ValueError("data['x'] holds NaN or infinity; give finite features")


def check_labels(y: Array, num_classes: int) -> None:
    """Refuses other labels than ``0 .. num_classes - 1``, which would give NaN."""
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"data['y'] must be integers, one a class; got {y.dtype}")
    if is_traced(y):
        return
    found = np.asarray(y)
    low, high = found.min(), found.max()
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"data['y'] must be in 0..{num_classes - 1}, {num_classes} classes; got "
            f"{low}..{high}"
        )


def check_square(x: Array, *, even: bool = False) -> None:
    """Refuses ``x`` ``[n, features]`` that are no images ``[n, side²]``."""
    side = math.isqrt(x.shape[1])
    if side**2 != x.shape[1] or (even and side % 2):
        raise ValueError(
            "data['x'] must be flat square images, [n, side * side]"
            f"{', side even' * even}; got {x.shape[1]} features"
        )


# The network, its losses and its accuracy.


@functools.cache
def scorer(graph: Any) -> Callable[[PyTree, Array], Array]:
    """``(w, x) -> scores``; the same function for an equal graph, so traced once."""
    return lambda w, x: nnx.merge(graph, w)(x)


@functools.cache
def bound(function: Callable, score: Score) -> Callable:
    """The function of one network; the same object each time, so traced once."""
    return functools.partial(function, score)


def losses(score: Score, w: PyTree, batch: PyTree) -> Array:
    """Cross-entropy of each example; one score alone is class 1's, and class 0's 0."""
    return optax.softmax_cross_entropy_with_integer_labels(
        all_scores(score(w, batch["x"])), batch["y"]
    )


def cross_entropy(score: Score, w: PyTree, batch: PyTree) -> Array:
    """Mean over the examples in use."""
    return mean(losses(score, w, batch), batch["use"])


def mean(values: Array, use: Array) -> Array:
    """Over the examples in use."""
    return jnp.sum(use * values) / jnp.sum(use)


def all_scores(scores: Array) -> Array:
    """``[n, classes]``: two from the one of a binary classifier."""
    return jnp.pad(scores, ((0, 0), (1, 0))) if scores.shape[1] == 1 else scores


def val_loss(score: Score, w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Cross-entropy alone."""
    del alpha
    return cross_entropy(score, w, batch)


def accuracy(
    score: Score, batch: PyTree, w: PyTree, alpha: PyTree, key: Array
) -> Array:
    """Share of the examples in use whose highest score is their class."""
    del alpha, key
    found = jnp.argmax(all_scores(score(w, batch["x"])), axis=1)
    return mean(found == batch["y"], batch["use"])


def loss_on(score: Score, batch: PyTree, w: PyTree, alpha: PyTree, key: Array) -> Array:
    """`val_loss` on other data."""
    del key
    return val_loss(score, w, alpha, batch)


def split(
    data: PyTree, key: Array, sizes: tuple[int, int, int]
) -> dict[str, dict[str, Array]]:
    """Train, validation and test examples by a seeded permutation.

    Examples that the data set marks as ``test`` come last.
    """
    order = jax.random.permutation(key, len(data["y"]))
    if "test" in data:
        order = order[jnp.argsort(data["test"][order], stable=True)]
    num_train, num_val, num_test = sizes
    places = {
        "train": order[:num_train],
        "val": order[num_train : num_train + num_val],
        "test": order[max(num_train + num_val, len(order) - num_test) :],
    }
    return {
        name: {
            "x": data["x"][where],
            "y": data["y"][where],
            "use": jnp.ones(where.shape),
        }
        for name, where in places.items()
    }


def held_out(val: PyTree, hold_out: Array | bool, which: slice | None = None) -> PyTree:
    """The validation part, the last third or ``which`` out of use if ``hold_out``."""
    num_val = len(val["y"])
    which = slice(num_val - num_val // 3, None) if which is None else which
    out = jnp.zeros(num_val, bool).at[which].set(True)
    return val | {"use": jnp.where(out & jnp.asarray(hold_out), 0, val["use"])}


def others(val: PyTree) -> PyTree:
    """The examples that are out of use, to choose by."""
    return val | {"use": 1 - val["use"]}
