"""Few-shot classification: what many small tasks share, learned from them.

A task is N classes with K drawings each to learn from (the support, S) and further
drawings to be judged on (the query, Q). ``w`` holds the adapted parameters of a batch
of tasks, one leading axis; ``alpha`` is what they share. ``M = mean_t CE(w_t; Q_t)``.

``maml`` (Finn et al. 2017, arXiv 1703.03400): steps from a shared start,

    L(w) = sum_t CE(w_t; S_t),   w_t(0) = alpha.

``imaml`` (Rajeswaran et al. 2019, arXiv 1909.04630): a minimum near the shared start,
whose derivative is ``(I + H_t / penalty)^-1``, and needs no steps,

    L(w, alpha) = sum_t [CE(w_t; S_t) + penalty |w_t - alpha|² / 2].

``ridge`` (Bertinetto et al. 2019, arXiv 1805.08136): a linear head on shared features
``f``, in closed form,

    L(w, alpha) = sum_t [|f(x_t) w_t - y_t|² + penalty |w_t|²] / 2.

Each estimate draws its own tasks. Examples lead and tasks come second in the data, so
that the ledger counts examples.
"""

import os
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from .. import datasets as datasets
from .. import spaces
from ..inner import ClosedForm, Descent
from ..inner.base import InnerSolver
from ..problem import Bilevel
from ..validation import as_key
from .task import Task

NUM_QUERIES = 15  # of each class
NUM_TEST_DRAWS = 25  # batches of tasks in a test accuracy
# Tenths of the characters where training and validation end, by the number of turns.
# Two turns of ten digits make eight, six and six classes.
ENDS = {4: (6, 8), 2: (4, 7)}
PENALTY = 2.0
SOLVERS = {
    "maml": Descent(optax.sgd(0.4), 5),
    "imaml": Descent(optax.sgd(0.2), 16),
}


class Pool(eqx.Module):
    """Classes that tasks are made of, ``[classes, drawings, height, width]``.

    A task has ``way`` of them, with ``shots`` drawings of each to learn from and
    ``queries`` others. ``penalty`` travels with the data of the inner problem.
    """

    images: Array
    penalty: Array
    way: int = eqx.field(static=True)
    shots: int = eqx.field(static=True)
    queries: int = eqx.field(static=True)
    num_tasks: int = eqx.field(static=True)


def episodes(pool: Pool, key: Array) -> tuple[PyTree, PyTree]:
    """Support and query of a batch of tasks: ``x`` ``[n, tasks, height, width]``."""
    num_classes, num_drawings = pool.images.shape[:2]
    each = pool.shots + pool.queries

    def one(key):
        class_key, key = jax.random.split(key)
        classes = jax.random.permutation(class_key, num_classes)[: pool.way]
        pick = lambda key: jax.random.permutation(key, num_drawings)[:each]
        drawings = jax.vmap(pick)(jax.random.split(key, pool.way))
        return pool.images[classes[:, None], drawings]

    x = jax.vmap(one, out_axes=2)(jax.random.split(key, pool.num_tasks))

    def part(x):
        n = x.shape[1]
        y = jnp.repeat(jnp.arange(pool.way), n)
        y = jnp.broadcast_to(y[:, None], (len(y), pool.num_tasks))
        return {"x": x.reshape(pool.way * n, *x.shape[2:]), "y": y}

    support, query = part(x[:, : pool.shots]), part(x[:, pool.shots :])
    return support | {"penalty": pool.penalty}, query


def convolved(layer: PyTree, x: Array) -> Array:
    """3 by 3 filters at every second pixel, as one matrix product."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = [
        x[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)
    ]
    return jnp.concatenate(patches, axis=-1) @ layer["W"]


def normalised(x: Array) -> Array:
    """Each feature standardised over the batch and the places."""
    axes = tuple(range(x.ndim - 1))
    mean, variance = (f(x, axes, keepdims=True) for f in (jnp.mean, jnp.var))
    return (x - mean) / jnp.sqrt(variance + 1e-5)


def features(body: PyTree, x: Array) -> Array:
    """Of images ``[n, height, width]``: convolutions, if any, then tanh layers."""
    x = x[..., None]
    for layer in body["convolutions"]:
        x = jax.nn.relu(normalised(convolved(layer, x)) + layer["b"])
    x = x.reshape(len(x), -1)
    for layer in body["dense"]:
        x = jnp.tanh(x @ layer["W"] + layer["b"][None, :])
    return x


def scores(w: PyTree, x: Array) -> Array:
    """Class scores ``[n, way]`` of one task's network."""
    return features(w["body"], x) @ w["head"]["W"] + w["head"]["b"][None, :]


def cross_entropy(scores: Array, y: Array) -> Array:
    """Mean over one task's examples."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, y))


def adaptation_loss(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """``sum_t CE(w_t; S_t)``: each task's own loss, so that steps do not mix."""
    del alpha
    one = lambda w, x, y: cross_entropy(scores(w, x), y)
    return jnp.sum(jax.vmap(one, (0, 1, 1))(w, batch["x"], batch["y"]))


def proximal(w: PyTree, alpha: PyTree) -> Array:
    """``sum_t |w_t - alpha|² / 2``."""
    square = lambda w, alpha: jnp.sum((w - alpha[None]) ** 2) / 2
    return jax.tree.reduce(jnp.add, jax.tree.map(square, w, alpha))


def proximal_loss(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Each task's loss, and its distance from the shared start."""
    return adaptation_loss(w, alpha, batch) + batch["penalty"] * proximal(w, alpha)


def query_loss(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """``mean_t CE(w_t; Q_t)``."""
    return adaptation_loss(w, alpha, batch) / batch["y"].shape[1]


def shared_start(w: PyTree, alpha: PyTree) -> PyTree:
    """Every task begins at ``alpha``."""
    return jax.tree.map(lambda w, alpha: jnp.broadcast_to(alpha, w.shape), w, alpha)


def shared_features(alpha: PyTree, x: Array) -> Array:
    """``[tasks, n, p]``, of ``x`` ``[n, tasks, height, width]``."""
    return jax.vmap(lambda x: features(alpha["body"], x), in_axes=1)(x)


def ridge_loss(w: Array, alpha: PyTree, batch: PyTree) -> Array:
    """Half the squared error and penalty of each task's head, ``w`` [tasks, p, way]."""
    y = jax.nn.one_hot(batch["y"].T, w.shape[2])
    error = shared_features(alpha, batch["x"]) @ w - y
    penalty = jnp.exp(alpha["log_penalty"])
    return (jnp.sum(error**2) + penalty * jnp.sum(w**2)) / 2


def ridge_fit(way: int, alpha: PyTree, batch: PyTree) -> Array:
    """``w_t = F' (F F' + penalty I)^-1 y``: as many equations as examples."""
    f = shared_features(alpha, batch["x"])
    y = jax.nn.one_hot(batch["y"].T, way)
    penalty = jnp.exp(alpha["log_penalty"])
    gram = f @ f.mT + penalty * jnp.eye(f.shape[1])[None]
    return f.mT @ jnp.linalg.solve(gram, y)


def ridge_scores(w: Array, alpha: PyTree, x: Array) -> Array:
    """``[tasks, n, way]``, scaled for the cross-entropy."""
    return alpha["scale"] * shared_features(alpha, x) @ w


def ridge_query_loss(w: Array, alpha: PyTree, batch: PyTree) -> Array:
    """``mean_t CE(scale f(x) w_t; Q_t)``."""
    return cross_entropy(ridge_scores(w, alpha, batch["x"]), batch["y"].T)


def accuracy(
    solver: InnerSolver, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array
) -> Array:
    """Share of right answers to the queries of fresh tasks, each adapted to."""

    def one(key):
        support, query = problem.sample_data(key)
        start = problem.init_inner(w, alpha)
        adapted, _ = solver.solve(problem.inner_loss, start, alpha, support, key)
        if problem.init_fn is None:
            found = ridge_scores(adapted, alpha, query["x"])
        else:
            found = jax.vmap(scores, (0, 1))(adapted, query["x"])
        return jnp.mean(jnp.argmax(found, axis=-1) == query["y"].T)

    return jnp.mean(jax.lax.map(one, jax.random.split(key, NUM_TEST_DRAWS)))


def network(
    key: Array, shape: tuple[int, ...], convolutions: int, hidden: tuple[int, ...]
) -> tuple[PyTree, int]:
    """A body's parameters at random, of variance 1 / fan-in, and its width."""
    keys = iter(jax.random.split(key, convolutions + len(hidden)))

    def layer(n_in, n_out):
        w = jax.random.normal(next(keys), (n_in, n_out)) / jnp.sqrt(n_in)
        return {"W": w, "b": jnp.zeros(n_out)}

    body = {"convolutions": [], "dense": []}
    *_, height, width, channels = *shape, 1
    for _ in range(convolutions):
        body["convolutions"].append(layer(9 * channels, 64))
        height, width, channels = -(-height // 2), -(-width // 2), 64
    size = height * width * channels
    for n in hidden:
        body["dense"].append(layer(size, n))
        size = n
    return body, size


def characters(
    scale: str, data_dir: str | os.PathLike[str] | None = None
) -> tuple[str, np.ndarray, int]:
    """Name, ``[characters, drawings, height, width]``, and the turns that make classes.

    Omniglot, at 28 by 28 pixels for the paper's scale and at 14 by 14 for the small
    one, in four turns. The small scale does without where no folder is named and no
    file is found: it takes scikit-learn's digits, 170 drawings of each, in two turns,
    since a 6 turned by 180 degrees is a 9, and a 0, 1 or 8 itself. With an empty
    ``data_dir`` it always does.

    Raises:
      FileNotFoundError: no file in ``data_dir``, or none for the paper's scale.
    """
    small = scale == "small"
    if small and data_dir == "":
        return turned_digits()
    try:
        x = datasets.load("omniglot", data_dir)["x"]
    except FileNotFoundError:
        if small and data_dir is None:
            return turned_digits()
        raise
    if small:
        x = x.reshape(*x.shape[:2], 14, 2, 14, 2).mean(axis=(3, 5))
    return "Omniglot (1,623 characters, 4 rotations)", x, 4


def turned_digits() -> tuple[str, np.ndarray, int]:
    """`characters` of scikit-learn's digits."""
    digits = datasets.load("digits")
    each = [digits["x"][digits["y"] == label][:170] for label in range(10)]
    x = np.stack(each).reshape(10, 170, 8, 8)
    return "rotated scikit-learn digits (10 digits, 2 rotations)", x, 2


def split(images: Array, key: Array, num_turns: int) -> dict[str, Array]:
    """Train, validation and test classes: no character, however turned, in two parts.

    A seeded permutation of the characters, each then a class in each of ``num_turns``
    turns of 90 degrees: in four, 60%, 20% and 20% of them; in two, 40%, 30% and 30%.
    """
    images = images[jax.random.permutation(key, len(images))]
    first, second = (end * len(images) // 10 for end in ENDS[num_turns])

    def turned(x):
        return jnp.concatenate([jnp.rot90(x, k, (2, 3)) for k in range(num_turns)])

    parts = {
        "train": images[:first],
        "val": images[first:second],
        "test": images[second:],
    }
    return {name: turned(x) for name, x in parts.items()}


def check_images(images: Array, way: int, drawings: int, num_turns: int) -> None:
    """Refuses images that are not square, and too few to make tasks of."""
    wanted = "images must be [characters, drawings, side, side]"
    if images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(f"{wanted}; got {list(images.shape)}")
    if images.shape[1] < drawings:
        raise ValueError(
            f"{wanted}, {drawings} drawings of each to learn from and to be judged by; "
            f"got {images.shape[1]}"
        )
    first, second = (end * len(images) // 10 for end in ENDS[num_turns])
    fewest = num_turns * min(first, second - first, len(images) - second)
    if fewest < way:
        raise ValueError(
            f"way is {way}, but the smallest of the three parts has {fewest} classes: "
            "pass more characters or a smaller way"
        )


def make(
    *,
    key: Array,
    scale: str = "small",
    data_dir: str | None = None,
    variant: str = "maml",
    way: int = 5,
    shots: int = 1,
    num_tasks: int | None = None,
    penalty: float | Array = PENALTY,
    hidden: tuple[int, ...] = (64,),
    images: Array | None = None,
    num_turns: int = 4,
) -> Task:
    """Five-way one-shot tasks of Omniglot's characters, or of digits.

    Args:
      key: of the split, and of the network to begin with.
      scale: 'small' is a tanh network on small images; 'paper' Finn et al.'s four
        convolutions of 64 filters.
      data_dir: the folder with Omniglot's; None means what HYPERGRAD_DATA_DIR holds,
        and at the small scale scikit-learn's digits where no file is found.
      variant: 'maml', 'imaml' or 'ridge'.
      way, shots, num_tasks: classes of a task, drawings of each to learn from, and
        tasks of one estimate: 4, or 32 at the paper's scale.
      penalty: of the distance from the shared start, for 'imaml'.
      hidden: sizes of the tanh layers at the small scale; () is a linear model.
      images, num_turns: ``[characters, drawings, side, side]`` in place of these data,
        and how many turns of 90 degrees make classes of each, two or four.

    Raises:
      FileNotFoundError: no Omniglot in ``data_dir``, or none for the paper's scale.
      ValueError: another scale, variant or number of turns; images of another shape,
        or too few for the tasks.
    """
    key = as_key(key)
    if scale not in ("small", "paper"):
        raise ValueError(f"scale must be 'small' or 'paper'; got {scale!r}")
    if variant not in ("maml", "imaml", "ridge"):
        raise ValueError(f"variant must be 'maml', 'imaml' or 'ridge'; got {variant!r}")
    if num_turns not in ENDS:
        raise ValueError(f"num_turns must be 2 or 4; got {num_turns!r}")
    if images is None:
        _, found, num_turns = characters(scale, data_dir)
        images = jnp.asarray(found)
    images = jnp.asarray(images, float)
    check_images(images, way, shots + NUM_QUERIES, num_turns)
    num_tasks = num_tasks or {"small": 4, "paper": 32}[scale]
    split_key, body_key, head_key = jax.random.split(key, 3)
    parts = split(images, split_key, num_turns)
    convolutions, hidden = (0, hidden) if scale == "small" else (4, ())
    body, width = network(body_key, images.shape, convolutions, hidden)
    pool = lambda part: Pool(
        parts[part], jnp.asarray(penalty, float), way, shots, NUM_QUERIES, num_tasks
    )
    draw = lambda part: jax.tree_util.Partial(episodes, pool(part))
    many = lambda x: jnp.broadcast_to(x, (num_tasks, *x.shape))
    alpha: Any = {"body": body}
    if variant == "ridge":
        alpha |= {"log_penalty": jnp.zeros(()), "scale": jnp.ones(())}
        losses, start = (ridge_loss, ridge_query_loss), None
        solver = ClosedForm(partial(ridge_fit, way))
        w = jnp.zeros((num_tasks, width, way))
        source = "Bertinetto et al. 2019 (arXiv 1805.08136)"
    else:
        head = jax.random.normal(head_key, (width, way)) / jnp.sqrt(width)
        alpha |= {"head": {"W": head, "b": jnp.zeros(way)}}
        inner_loss = {"maml": adaptation_loss, "imaml": proximal_loss}[variant]
        losses, start = (inner_loss, query_loss), shared_start
        solver = SOLVERS[variant]
        w = jax.tree.map(many, alpha)
        source = {
            "maml": "Finn et al. 2017 (arXiv 1703.03400)",
            "imaml": "Rajeswaran et al. 2019 (arXiv 1909.04630)",
        }[variant]
    problem, val, test = (
        Bilevel(*losses, init_fn=start, data_fn=draw(part))
        for part in ("train", "val", "test")
    )
    metric = lambda problem: jax.tree_util.Partial(accuracy, solver, problem)
    return Task(
        name="few_shot",
        paradigm="few-shot",
        source=source,
        problem=problem,
        solver=solver,
        w=w,
        alpha=alpha,
        space=jax.tree.map(lambda _: spaces.Real(), alpha),
        metrics={"val_accuracy": metric(val), "test_accuracy": metric(test)},
    )
