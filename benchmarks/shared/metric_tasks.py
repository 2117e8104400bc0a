"""Systems on real data whose metrics disagree, with hyperparameters that move them.

The hyperparameters are weights and margins of classes, and penalties. The splits of all
seeds have the same shapes; examples that a seed leaves out have ``use`` False.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg

from .tuning import digits

SPLITS = ("train", "val", "test")
# A start, and bounds, for logarithms of weights, for margins, and for log-penalties.
FIRST_PENALTY = -6.0
WEIGHTS = hg.spaces.Interval(-2.0, 2.0)
MARGINS = hg.spaces.Interval(-2.0, 2.0)
PENALTIES = hg.spaces.Interval(-12.0, -1.0)
MIN_PENALTY = 1e-4  # on parameters without an own one; else H would be singular
NEIGHBOUR = 0.1  # temperature of the soft nearest neighbour


class View(NamedTuple):
    """The inputs of a metric."""

    scores: Array
    targets: Array
    where: Array


class System(NamedTuple):
    """A model, its data by seed, and its hyperparameters.

    Attributes:
      name: Name of the system.
      load: ``() -> data``, or FileNotFoundError with what is missing.
      split: ``(data, seed) -> {split: batch}``, NumPy arrays with "use".
      start: ``seed -> w``, where training starts.
      alpha, space: Initial hyperparameters, and their space.
      train_loss, cross_entropy: Losses ``(w, alpha, batch)``, the second without the
        weights and margins of alpha.
      views: ``(w, batch) -> {metric: View}`` for accuracy, F1 and mAP.
      axis: Axis along which mAP ranks.
      threshold: Threshold of accuracy and F1; None if the best class is predicted.
    """

    name: str
    load: Callable[[], Any]
    split: Callable[[Any, int], dict[str, PyTree]]
    start: Callable[[int], PyTree]
    alpha: PyTree
    space: PyTree
    train_loss: Callable
    cross_entropy: Callable
    views: Callable[[PyTree, PyTree], dict[str, View]]
    axis: int
    threshold: float | None


def mean(values: Array, batch: PyTree) -> Array:
    """Returns the mean over the examples in use."""
    use = batch["use"].astype(values.dtype)
    return jnp.sum(use * values) / jnp.maximum(jnp.sum(use), 1)


# Linear models of classes, or of binary labels.


def scores(w: PyTree, batch: PyTree) -> Array:
    """Returns the scores of a linear model."""
    return batch["x"] @ w["W"] + w["b"][None, :]


def penalty(w: PyTree, alpha: PyTree) -> Array:
    """Returns the L2 penalty with a factor per feature."""
    factors = jnp.exp(alpha["penalties"])[:, None]
    return jnp.sum(factors * w["W"] ** 2) + MIN_PENALTY * jnp.sum(w["b"] ** 2)


def class_losses(s: Array, batch: PyTree) -> Array:
    """Returns the cross-entropy of each example."""
    return optax.softmax_cross_entropy_with_integer_labels(s, batch["y"])


def train_loss_of_classes(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Returns the loss with a weight per class and a margin added to its score."""
    losses = class_losses(scores(w, batch) + alpha["margins"][None, :], batch)
    weights = jnp.exp(alpha["weights"])[batch["y"]]
    return mean(weights * losses, batch) + penalty(w, alpha)


def cross_entropy_of_classes(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Returns the mean cross-entropy."""
    del alpha
    return mean(class_losses(scores(w, batch), batch), batch)


def views_of_classes(w: PyTree, batch: PyTree) -> dict[str, View]:
    """Returns the views; for mAP each class ranks the examples."""
    s, use = scores(w, batch), batch["use"]
    classes = View(s, batch["y"], use)
    ranked = View(s, jax.nn.one_hot(batch["y"], s.shape[1], dtype=int), columns(use, s))
    return {"accuracy": classes, "F1": classes, "mAP": ranked}


def columns(use: Array, s: Array) -> Array:
    """Returns the mask of the examples in the shape of the scores."""
    return jnp.broadcast_to(use[:, None], s.shape)


def label_losses(s: Array, batch: PyTree) -> Array:
    """Returns the binary cross-entropy of each label."""
    return optax.sigmoid_binary_cross_entropy(s, batch["y"])


def train_loss_of_labels(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Returns the loss with a weight of positives and a margin per label."""
    losses = label_losses(scores(w, batch) + alpha["margins"][None, :], batch)
    weights = jnp.where(batch["y"] > 0, jnp.exp(alpha["weights"])[None, :], 1)
    return mean(jnp.mean(weights * losses, axis=1), batch) + penalty(w, alpha)


def cross_entropy_of_labels(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Returns the mean binary cross-entropy."""
    del alpha
    return mean(jnp.mean(label_losses(scores(w, batch), batch), axis=1), batch)


def views_of_labels(w: PyTree, batch: PyTree) -> dict[str, View]:
    """Returns the views; accuracy is over all labels, F1 and mAP are means."""
    s, y, use = scores(w, batch), batch["y"], batch["use"]
    wide = columns(use, s)
    return {
        "accuracy": View(s.ravel(), y.ravel(), wide.ravel()),
        "F1": View(s, y, use),
        "mAP": View(s, y, wide),
    }


def linear(
    name: str,
    load: Callable,
    split: Callable,
    shape: tuple[int, int],
    labels: bool,
    num_penalties: int | None = None,
) -> System:
    """Returns a linear system with a penalty per feature, or ``num_penalties``."""
    features, outputs = shape
    w = {"W": jnp.zeros(shape), "b": jnp.zeros(outputs)}
    alpha = {
        "weights": jnp.zeros(outputs),
        "margins": jnp.zeros(outputs),
        "penalties": jnp.full(num_penalties or features, FIRST_PENALTY),
    }
    return System(
        name=name,
        load=load,
        split=split,
        start=lambda seed: w,
        alpha=alpha,
        space=bounds(alpha),
        train_loss=train_loss_of_labels if labels else train_loss_of_classes,
        cross_entropy=cross_entropy_of_labels if labels else cross_entropy_of_classes,
        views=views_of_labels if labels else views_of_classes,
        axis=0,
        threshold=0.0 if labels else None,
    )


def bounds(alpha: PyTree, penalties: hg.spaces.Interval = PENALTIES) -> PyTree:
    """Returns the space of hyperparameters, with the shapes that a search needs."""
    spaces = {"weights": WEIGHTS, "margins": MARGINS, "penalties": penalties}
    shaped = lambda space, x: hg.spaces.Interval(space.low, space.high, shape=x.shape)
    return {name: shaped(spaces[name], x) for name, x in alpha.items()}


def split_order(order: np.ndarray, *sizes: int) -> dict[str, np.ndarray]:
    """Returns the indices for training, validation and test, in this order."""
    return dict(zip(SPLITS, np.split(order, np.cumsum(sizes)), strict=True))


# Digits with classes of different size.

MIN_KEPT = 0.1


def thinned(data: dict[str, np.ndarray], seed: int) -> dict[str, PyTree]:
    """Returns splits with a fraction of each class, log-uniform from a tenth to one."""
    rng = np.random.default_rng(seed)
    fractions = MIN_KEPT ** rng.uniform(size=10)
    is_kept = rng.uniform(size=len(data["y"])) < fractions[data["y"]]
    splits = split_order(rng.permutation(len(data["y"])), 600, 500)
    return {
        part: {"x": data["x"][rows], "y": data["y"][rows], "use": is_kept[rows]}
        for part, rows in splits.items()
    }


NOISE = 0.4  # fraction of the training labels


def noisy(data: dict[str, np.ndarray], seed: int) -> dict[str, PyTree]:
    """Returns splits with classes of different size and wrong training labels."""
    rng = np.random.default_rng(seed)
    odds = (MIN_KEPT ** rng.uniform(size=10))[data["y"]]
    order = rng.choice(len(odds), 650, replace=False, p=odds / odds.sum())
    splits = {}
    for part, rows in split_order(rng.permutation(order), 200, 150).items():
        y = data["y"][rows]
        splits[part] = {"x": data["x"][rows], "y": y, "use": np.ones(len(y), bool)}
    y = splits["train"]["y"]
    wrong = (rng.uniform(size=len(y)) < NOISE) * rng.integers(1, 10, len(y))
    splits["train"]["y"] = ((y + wrong) % 10).astype(y.dtype)
    return splits


# Digits with six attributes each.

ATTRIBUTES = {
    "even": (0, 2, 4, 6, 8),
    "prime": (2, 3, 5, 7),
    "at least five": (5, 6, 7, 8, 9),
    "with a closed loop": (0, 6, 8, 9),
    "a multiple of three": (0, 3, 6, 9),
    "a power of two": (1, 2, 4, 8),
}


def attributes(data: dict[str, np.ndarray], seed: int) -> dict[str, PyTree]:
    """Returns splits of the digits with six attributes each."""
    rng = np.random.default_rng(seed)
    y = np.stack([np.isin(data["y"], has) for has in ATTRIBUTES.values()], axis=1)
    splits = split_order(rng.permutation(len(y)), 300, 300)
    return {
        part: {
            "x": data["x"][rows],
            "y": y[rows].astype(np.int32),
            "use": np.ones(len(rows), bool),
        }
        for part, rows in splits.items()
    }


# Reuters: is a story about money-fx?

NUM_STORIES, NUM_WORDS, FEW_WORDS = 1000, 1000, 300
SCALE = 4.0  # rows have norm 1; one range of penalties then fits all systems


@functools.cache
def reuters() -> Any:
    """Returns the features, labels and test mask of Reuters."""
    import scipy.sparse

    data = hg.datasets.load("reuters")
    rows = data["values"], data["columns"], data["starts"]
    return scipy.sparse.csr_array(rows), data["y"], data["test"]


def stories(data: Any, seed: int, num_words: int = NUM_WORDS) -> dict[str, PyTree]:
    """Returns splits of the most frequent words; the test split is that of Reuters."""
    x, y, is_test = data
    order = np.random.default_rng(seed).permutation(np.flatnonzero(~is_test))
    splits = split_order(order, NUM_STORIES, NUM_STORIES)
    splits["test"] = np.flatnonzero(is_test)
    in_stories = np.bincount(x[splits["train"]].indices, minlength=x.shape[1])
    words = np.sort(np.argsort(-in_stories, kind="stable")[:num_words])
    return {
        part: {
            "x": SCALE * x[rows][:, words].toarray(),
            "y": y[rows, None],
            "use": np.ones(len(rows), bool),
        }
        for part, rows in splits.items()
    }


# Retrieval of digits of other classes than those of training.

HIDDEN = 16
NETWORK_PENALTIES = hg.spaces.Interval(-8.0, -1.0)  # below, H is often indefinite
NUM_CLASSES = {"train": 4, "val": 3, "test": 3}
PER_CLASS = {"train": 60, "val": 40, "test": 100}


def disjoint(data: dict[str, np.ndarray], seed: int) -> dict[str, PyTree]:
    """Returns splits with four classes for training, three for each other split."""
    rng = np.random.default_rng(seed)
    splits, classes = {}, list(rng.permutation(10))
    for part in SPLITS:
        rows, y = [], []
        for label in range(NUM_CLASSES[part]):
            of_class = np.flatnonzero(data["y"] == classes.pop())
            rows.append(rng.permutation(of_class)[: PER_CLASS[part]])
            y.append(np.full(PER_CLASS[part], label, np.int32))
        rows, y = np.concatenate(rows), np.concatenate(y)
        splits[part] = {"x": data["x"][rows], "y": y, "use": np.ones(len(y), bool)}
    return splits


def network(seed: int) -> PyTree:
    """Returns the initial weights."""
    first, last = jax.random.split(jax.random.key(seed))
    return {
        "V": jax.random.normal(first, (64, HIDDEN)) / 8,
        "W": jax.random.normal(last, (HIDDEN, NUM_CLASSES["train"])) / 4,
        "b": jnp.zeros(NUM_CLASSES["train"]),
    }


def hidden(w: PyTree, batch: PyTree) -> Array:
    """Returns the hidden layer."""
    return jnp.tanh(batch["x"] @ w["V"])


def train_loss_of_network(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Returns the loss of classes, with penalties per pixel and of the last layer."""
    s = hidden(w, batch) @ w["W"] + w["b"][None, :] + alpha["margins"][None, :]
    weights = jnp.exp(alpha["weights"])[batch["y"]]
    penalties = jnp.exp(alpha["penalties"])
    decay = jnp.sum(penalties[:-1, None] * w["V"] ** 2)
    decay += penalties[-1] * jnp.sum(w["W"] ** 2) + MIN_PENALTY * jnp.sum(w["b"] ** 2)
    return mean(weights * class_losses(s, batch), batch) + decay


def views_of_network(w: PyTree, batch: PyTree) -> dict[str, View]:
    """Returns the views of retrieval: every image is a query among all others.

    Images are compared by the cosine of their embeddings. The score of a class is the
    soft maximum over its images, nearly that of the most similar one, so that accuracy
    and F1 are those of a nearest neighbour.
    """
    e = hidden(w, batch)
    e = e / jnp.sqrt(jnp.sum(e**2, axis=1, keepdims=True) + 1e-12)
    similar, y, use = e @ e.T, batch["y"], batch["use"]
    is_class = y[None, :] == jnp.arange(NUM_CLASSES["val"])[:, None]
    # A query out of use has finite scores too, because 0 times infinity is NaN.
    gallery = use[None, :] & ~jnp.eye(len(y), dtype=bool)
    counted = gallery[:, None, :] & is_class[None, :, :]
    similarity = jnp.where(counted, similar[:, None, :] / NEIGHBOUR, -jnp.inf)
    classes = View(NEIGHBOUR * jax.nn.logsumexp(similarity, axis=2), y, use)
    others = use[:, None] & gallery
    same = (y[:, None] == y[None, :]).astype(int)
    return {"accuracy": classes, "F1": classes, "mAP": View(similar, same, others)}


def cross_entropy_of_network(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Returns the cross-entropy of the soft nearest neighbour's classes."""
    del alpha
    s = views_of_network(w, batch)["accuracy"].scores / NEIGHBOUR
    return mean(class_losses(s, batch), batch)


def retrieval() -> System:
    """Returns the system of retrieval."""
    alpha = {
        "weights": jnp.zeros(NUM_CLASSES["train"]),
        "margins": jnp.zeros(NUM_CLASSES["train"]),
        "penalties": jnp.full(65, FIRST_PENALTY),
    }
    return System(
        name="retrieval",
        load=digits,
        split=disjoint,
        start=network,
        alpha=alpha,
        space=bounds(alpha, NETWORK_PENALTIES),
        train_loss=train_loss_of_network,
        cross_entropy=cross_entropy_of_network,
        views=views_of_network,
        axis=-1,
        threshold=None,
    )


SYSTEMS = {
    system.name: system
    for system in (
        linear("digits", digits, thinned, (64, 10), labels=False),
        linear("reuters", reuters, stories, (NUM_WORDS, 1), labels=True),
        linear("attributes", digits, attributes, (64, len(ATTRIBUTES)), labels=True),
        retrieval(),
        linear("noisy digits", digits, noisy, (64, 10), labels=False, num_penalties=1),
        linear(
            "few words",
            reuters,
            functools.partial(stories, num_words=FEW_WORDS),
            (FEW_WORDS, 1),
            labels=True,
            num_penalties=1,
        ),
    )
}
