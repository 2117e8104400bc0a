"""Four real systems whose metrics disagree: what table `surrogates` trains and judges.

Each has hyperparameters of the kind that move a metric without being parameters:
weights and margins of classes, and penalties. Parts of all seeds have the same shapes;
examples that a seed leaves out have ``use`` False.
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

PARTS = ("train", "val", "test")
# A start, and bounds, for logarithms of weights, for margins, and for log-penalties.
FIRST_PENALTY = -6.0
WEIGHTS = hg.spaces.Interval(-2.0, 2.0)
MARGINS = hg.spaces.Interval(-2.0, 2.0)
PENALTIES = hg.spaces.Interval(-12.0, -1.0)
LEAST = 1e-4  # penalty on what has none of its own; without it H would be singular
NEIGHBOUR = 0.1  # temperature of the soft nearest neighbour


class View(NamedTuple):
    """What a metric is computed from."""

    scores: Array
    targets: Array
    where: Array


class System(NamedTuple):
    """A model, its data by seed, and its hyperparameters.

    load: the data, or an error that says what is missing.
    draw: ``(data, seed) -> {part: batch}``, batches of NumPy arrays with "use".
    start: ``seed -> w``, where training begins.
    alpha, space: hyperparameters at the start, and what they may be.
    train_loss, cross_entropy: losses ``(w, alpha, batch)``, the second without alpha's
        weights and margins.
    views: ``(w, batch) -> {metric: View}`` for accuracy, F1 and mAP.
    axis: along which mAP ranks.
    threshold: of accuracy and F1; None where the best class is predicted.
    """

    name: str
    load: Callable[[], Any]
    draw: Callable[[Any, int], dict[str, PyTree]]
    start: Callable[[int], PyTree]
    alpha: PyTree
    space: PyTree
    train_loss: Callable
    cross_entropy: Callable
    views: Callable[[PyTree, PyTree], dict[str, View]]
    axis: int
    threshold: float | None


def mean(values: Array, batch: PyTree) -> Array:
    """Over the examples in use."""
    use = batch["use"].astype(values.dtype)
    return jnp.sum(use * values) / jnp.maximum(jnp.sum(use), 1)


# Linear models of classes, or of labels that are there or not.


def scores(w: PyTree, batch: PyTree) -> Array:
    return batch["x"] @ w["W"] + w["b"][None, :]


def penalty(w: PyTree, alpha: PyTree) -> Array:
    """One a feature."""
    of_features = jnp.exp(alpha["penalties"])[:, None]
    return jnp.sum(of_features * w["W"] ** 2) + LEAST * jnp.sum(w["b"] ** 2)


def of_classes(s: Array, batch: PyTree) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(s, batch["y"])


def train_loss_of_classes(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """A weight for the examples of a class, a margin added to its score."""
    losses = of_classes(scores(w, batch) + alpha["margins"][None, :], batch)
    weights = jnp.exp(alpha["weights"])[batch["y"]]
    return mean(weights * losses, batch) + penalty(w, alpha)


def cross_entropy_of_classes(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    del alpha
    return mean(of_classes(scores(w, batch), batch), batch)


def views_of_classes(w: PyTree, batch: PyTree) -> dict[str, View]:
    """mAP: each class ranks the examples."""
    s, use = scores(w, batch), batch["use"]
    classes = View(s, batch["y"], use)
    ranked = View(s, jax.nn.one_hot(batch["y"], s.shape[1], dtype=int), columns(use, s))
    return {"accuracy": classes, "F1": classes, "mAP": ranked}


def columns(use: Array, s: Array) -> Array:
    return jnp.broadcast_to(use[:, None], s.shape)


def of_labels(s: Array, batch: PyTree) -> Array:
    return optax.sigmoid_binary_cross_entropy(s, batch["y"])


def train_loss_of_labels(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """A weight for a label's positives, a margin added to its score."""
    losses = of_labels(scores(w, batch) + alpha["margins"][None, :], batch)
    weights = jnp.where(batch["y"] > 0, jnp.exp(alpha["weights"])[None, :], 1)
    return mean(jnp.mean(weights * losses, axis=1), batch) + penalty(w, alpha)


def cross_entropy_of_labels(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    del alpha
    return mean(jnp.mean(of_labels(scores(w, batch), batch), axis=1), batch)


def views_of_labels(w: PyTree, batch: PyTree) -> dict[str, View]:
    """Accuracy over all labels; F1 and mAP are means over labels."""
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
    draw: Callable,
    shape: tuple[int, int],
    labels: bool,
    num_penalties: int | None = None,
) -> System:
    """A penalty a feature, or one for all where there is to be one."""
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
        draw=draw,
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
    """For `minimize` and `search` alike; shapes, since a search draws."""
    of = {"weights": WEIGHTS, "margins": MARGINS, "penalties": penalties}
    shaped = lambda space, x: hg.spaces.Interval(space.low, space.high, shape=x.shape)
    return {name: shaped(of[name], x) for name, x in alpha.items()}


def split(order: np.ndarray, *sizes: int) -> dict[str, np.ndarray]:
    """The first examples for training, the next for validation, the rest to test."""
    return dict(zip(PARTS, np.split(order, np.cumsum(sizes)), strict=True))


# Digits with classes of different size.

THINNEST = 0.1


@functools.cache
def digits() -> dict[str, np.ndarray]:
    return hg.datasets.load("digits")


def thinned(data: dict[str, np.ndarray], seed: int) -> dict[str, PyTree]:
    """Of each class a share is kept, log-uniform from a tenth to all of it."""
    rng = np.random.default_rng(seed)
    shares = THINNEST ** rng.uniform(size=10)
    kept = rng.uniform(size=len(data["y"])) < shares[data["y"]]
    parts = split(rng.permutation(len(data["y"])), 600, 500)
    return {
        part: {"x": data["x"][rows], "y": data["y"][rows], "use": kept[rows]}
        for part, rows in parts.items()
    }


WRONG = 0.4  # of the training labels


def noisy(data: dict[str, np.ndarray], seed: int) -> dict[str, PyTree]:
    """Of each class drawn by its share; some are trained on under another's name."""
    rng = np.random.default_rng(seed)
    odds = (THINNEST ** rng.uniform(size=10))[data["y"]]
    order = rng.choice(len(odds), 650, replace=False, p=odds / odds.sum())
    parts = {}
    for part, rows in split(rng.permutation(order), 200, 150).items():
        y = data["y"][rows]
        parts[part] = {"x": data["x"][rows], "y": y, "use": np.ones(len(y), bool)}
    y = parts["train"]["y"]
    wrong = (rng.uniform(size=len(y)) < WRONG) * rng.integers(1, 10, len(y))
    parts["train"]["y"] = ((y + wrong) % 10).astype(y.dtype)
    return parts


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
    rng = np.random.default_rng(seed)
    y = np.stack([np.isin(data["y"], has) for has in ATTRIBUTES.values()], axis=1)
    parts = split(rng.permutation(len(y)), 300, 300)
    return {
        part: {
            "x": data["x"][rows],
            "y": y[rows].astype(np.int32),
            "use": np.ones(len(rows), bool),
        }
        for part, rows in parts.items()
    }


# Reuters: is a story about money-fx?

NUM_STORIES, NUM_WORDS, FEW_WORDS = 1000, 1000, 300
SCALE = 4.0  # rows have norm 1 at most; with it one range of penalties fits all systems


@functools.cache
def reuters() -> Any:
    import scipy.sparse

    data = hg.datasets.load("reuters")
    rows = data["values"], data["columns"], data["starts"]
    return scipy.sparse.csr_array(rows), data["y"], data["test"]


def stories(data: Any, seed: int, num_words: int = NUM_WORDS) -> dict[str, PyTree]:
    """The words that most of the training stories have; the test split is Reuters'."""
    x, y, is_test = data
    order = np.random.default_rng(seed).permutation(np.flatnonzero(~is_test))
    parts = split(order, NUM_STORIES, NUM_STORIES)
    parts["test"] = np.flatnonzero(is_test)
    in_stories = np.bincount(x[parts["train"]].indices, minlength=x.shape[1])
    words = np.sort(np.argsort(-in_stories, kind="stable")[:num_words])
    return {
        part: {
            "x": SCALE * x[rows][:, words].toarray(),
            "y": y[rows, None],
            "use": np.ones(len(rows), bool),
        }
        for part, rows in parts.items()
    }


# Retrieval of digits that were not among the classes trained on.

HIDDEN = 16
OF_NETWORK = hg.spaces.Interval(-8.0, -1.0)  # below, H is hardly ever definite
NUM_CLASSES = {"train": 4, "val": 3, "test": 3}
OF_EACH = {"train": 60, "val": 40, "test": 100}


def disjoint(data: dict[str, np.ndarray], seed: int) -> dict[str, PyTree]:
    """Four classes to train on, three to validate, three to test."""
    rng = np.random.default_rng(seed)
    parts, classes = {}, list(rng.permutation(10))
    for part in PARTS:
        rows, y = [], []
        for label in range(NUM_CLASSES[part]):
            of_class = np.flatnonzero(data["y"] == classes.pop())
            rows.append(rng.permutation(of_class)[: OF_EACH[part]])
            y.append(np.full(OF_EACH[part], label, np.int32))
        rows, y = np.concatenate(rows), np.concatenate(y)
        parts[part] = {"x": data["x"][rows], "y": y, "use": np.ones(len(y), bool)}
    return parts


def network(seed: int) -> PyTree:
    first, last = jax.random.split(jax.random.key(seed))
    return {
        "V": jax.random.normal(first, (64, HIDDEN)) / 8,
        "W": jax.random.normal(last, (HIDDEN, NUM_CLASSES["train"])) / 4,
        "b": jnp.zeros(NUM_CLASSES["train"]),
    }


def hidden(w: PyTree, batch: PyTree) -> Array:
    return jnp.tanh(batch["x"] @ w["V"])


def train_loss_of_network(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """As that of classes, with a penalty a pixel and one on the second layer."""
    s = hidden(w, batch) @ w["W"] + w["b"][None, :] + alpha["margins"][None, :]
    weights = jnp.exp(alpha["weights"])[batch["y"]]
    penalties = jnp.exp(alpha["penalties"])
    shrunk = jnp.sum(penalties[:-1, None] * w["V"] ** 2)
    shrunk += penalties[-1] * jnp.sum(w["W"] ** 2) + LEAST * jnp.sum(w["b"] ** 2)
    return mean(weights * of_classes(s, batch), batch) + shrunk


def views_of_network(w: PyTree, batch: PyTree) -> dict[str, View]:
    """Every image is a query, all others its gallery, by the cosine of embeddings.

    A class's score is that of its images' soft maximum: the most similar one's,
    nearly, so that accuracy and F1 are those of a nearest neighbour.
    """
    e = hidden(w, batch)
    e = e / jnp.sqrt(jnp.sum(e**2, axis=1, keepdims=True) + 1e-12)
    similar, y, use = e @ e.T, batch["y"], batch["use"]
    is_class = y[None, :] == jnp.arange(NUM_CLASSES["val"])[:, None]
    # A query out of use has scores too, since 0 times infinity is no 0.
    gallery = use[None, :] & ~jnp.eye(len(y), dtype=bool)
    counted = gallery[:, None, :] & is_class[None, :, :]
    among = jnp.where(counted, similar[:, None, :] / NEIGHBOUR, -jnp.inf)
    classes = View(NEIGHBOUR * jax.nn.logsumexp(among, axis=2), y, use)
    others = use[:, None] & gallery
    same = (y[:, None] == y[None, :]).astype(int)
    return {"accuracy": classes, "F1": classes, "mAP": View(similar, same, others)}


def cross_entropy_of_network(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Neighbourhood components: classes by the soft nearest neighbour."""
    del alpha
    s = views_of_network(w, batch)["accuracy"].scores / NEIGHBOUR
    return mean(of_classes(s, batch), batch)


def retrieval() -> System:
    alpha = {
        "weights": jnp.zeros(NUM_CLASSES["train"]),
        "margins": jnp.zeros(NUM_CLASSES["train"]),
        "penalties": jnp.full(65, FIRST_PENALTY),
    }
    return System(
        name="retrieval",
        load=digits,
        draw=disjoint,
        start=network,
        alpha=alpha,
        space=bounds(alpha, OF_NETWORK),
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
