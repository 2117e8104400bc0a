"""Few-shot classification: parameters that many small tasks share.

A task has N classes with K drawings each for adaptation (the support S) and further
drawings for evaluation (the query Q). ``w`` contains the adapted parameters of a batch
of tasks, with a leading axis for the tasks; ``alpha`` contains the shared parameters.
The outer loss is ``M = mean_t CE(w_t; Q_t)``.

``maml`` (Finn et al. 2017, arXiv 1703.03400) makes steps from a shared starting point,

    L(w) = sum_t CE(w_t; S_t),   w_t(0) = alpha.

``imaml`` (Rajeswaran et al. 2019, arXiv 1909.04630) finds a minimum near the shared
starting point. Its derivative in alpha is ``(I + H_t / penalty)^-1`` and does not
depend on the steps of the solver,

    L(w, alpha) = sum_t [CE(w_t; S_t) + penalty |w_t - alpha|² / 2].

``ridge`` (Bertinetto et al. 2019, arXiv 1805.08136) fits a linear head on shared
features ``f`` in closed form,

    L(w, alpha) = sum_t [|f(x_t) w_t - y_t|² + penalty |w_t|²] / 2.

Each estimate samples its own tasks. Examples are the first axis of the data and tasks
the second one, so that the cost counts examples.

For five classes with one drawing each, ``maml`` with the sizes of scale 'paper' differs
from the code of Finn et al. for Omniglot: it makes five inner steps of size 0.4 instead
of one; its head has 256 inputs, the flattened last 2 x 2 maps, instead of their means
over the pixels, 64; it trains on 60% of the characters, 973 instead of 1,200; and it
has 15 queries per class instead of as many as shots, one. As in that code, each feature
is normalized over the images that are classified together, so that the scores of a
query depend on the other queries of its task.
"""

import os
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array, ArrayLike, Float, PyTree

from .. import datasets, spaces
from ..inner import ClosedForm, Descent
from ..inner.base import InnerSolver
from ..problem import Bilevel
from ..validation import as_key
from .classifier import check_features
from .networks import batch_norm, strided_convolution
from .task import (
    Task,
    check_at_least_zero,
    check_choice,
    check_counts,
    check_sequences,
)

NUM_QUERIES = 15  # Per class.
NUM_TEST_BATCHES = 25  # Batches of tasks per test accuracy.
# Tenths of the characters at which training and validation end, by the number of turns.
# Two turns of ten digits are eight, six and six classes.
SPLIT_TENTHS = {4: (6, 8), 2: (4, 7)}
PENALTY = 2.0
SOLVERS = {
    "maml": Descent(optax.sgd(0.4), 5),
    "imaml": Descent(optax.sgd(0.2), 16),
}


class ClassPool(eqx.Module):
    """The classes from which tasks are sampled, and the sizes of a task.

    Attributes:
      images: ``[classes, drawings, height, width]``.
      penalty: Inner penalty, part of the data of the inner problem.
      num_ways: Number of classes per task.
      num_shots: Number of support drawings per class.
      num_queries: Number of query drawings per class.
      num_tasks: Number of tasks per batch.
    """

    images: Array
    penalty: Array
    num_ways: int = eqx.field(static=True)
    num_shots: int = eqx.field(static=True)
    num_queries: int = eqx.field(static=True)
    num_tasks: int = eqx.field(static=True)


def sample_tasks(pool: ClassPool, key: Array) -> tuple[PyTree, PyTree]:
    """Samples the support and the query of a batch of tasks.

    In both, ``x`` is ``[n, tasks, height, width]`` and ``y`` is ``[n, tasks]``.
    """
    num_classes, num_drawings = pool.images.shape[:2]
    num_per_class = pool.num_shots + pool.num_queries

    def sample_task(key):
        class_key, key = jax.random.split(key)
        classes = jax.random.permutation(class_key, num_classes)[: pool.num_ways]
        permute = lambda key: jax.random.permutation(key, num_drawings)
        drawings = jax.vmap(permute)(jax.random.split(key, pool.num_ways))
        return pool.images[classes[:, None], drawings[:, :num_per_class]]

    x = jax.vmap(sample_task, out_axes=2)(jax.random.split(key, pool.num_tasks))

    def flatten_classes(x):
        n = x.shape[1]
        y = jnp.repeat(jnp.arange(pool.num_ways), n)
        y = jnp.broadcast_to(y[:, None], (len(y), pool.num_tasks))
        return {"x": x.reshape(pool.num_ways * n, *x.shape[2:]), "y": y}

    support = flatten_classes(x[:, : pool.num_shots])
    query = flatten_classes(x[:, pool.num_shots :])
    return support | {"penalty": pool.penalty}, query


def features(body: PyTree, x: Float[Array, "n h w"]) -> Float[Array, "n p"]:
    """Returns the features of images: convolutions, if any, and then tanh layers."""
    x = x[..., None]
    for layer in body["convolutions"]:
        x = jax.nn.relu(batch_norm(strided_convolution(layer, x)) + layer["b"])
    x = x.reshape(len(x), -1)
    for layer in body["dense"]:
        x = jnp.tanh(x @ layer["W"] + layer["b"][None, :])
    return x


def scores(w: PyTree, x: Float[Array, "n h w"]) -> Float[Array, "n ways"]:
    """Returns the class scores of the network of one task."""
    return features(w["body"], x) @ w["head"]["W"] + w["head"]["b"][None, :]


def cross_entropy(scores: Array, y: Array) -> Array:
    """Returns the mean cross-entropy of examples."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, y))


def adaptation_loss(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Returns ``sum_t CE(w_t; S_t)``; as a sum, it does not couple the tasks."""
    del alpha
    task_loss = lambda w, x, y: cross_entropy(scores(w, x), y)
    return jnp.sum(jax.vmap(task_loss, (0, 1, 1))(w, batch["x"], batch["y"]))


def proximal_term(w: PyTree, alpha: PyTree) -> Array:
    """Returns ``sum_t |w_t - alpha|² / 2``."""
    per_leaf = lambda w, alpha: jnp.sum((w - alpha[None]) ** 2) / 2
    return jax.tree.reduce(jnp.add, jax.tree.map(per_leaf, w, alpha))


def proximal_loss(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Returns ``sum_t [CE(w_t; S_t) + penalty |w_t - alpha|² / 2]``."""
    return adaptation_loss(w, alpha, batch) + batch["penalty"] * proximal_term(w, alpha)


def query_loss(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Returns ``mean_t CE(w_t; Q_t)``."""
    return adaptation_loss(w, alpha, batch) / batch["y"].shape[1]


def broadcast_alpha(w: PyTree, alpha: PyTree) -> PyTree:
    """Returns ``alpha`` as the starting point of every task."""
    return jax.tree.map(lambda w, alpha: jnp.broadcast_to(alpha, w.shape), w, alpha)


def shared_features(
    alpha: PyTree, x: Float[Array, "n tasks h w"]
) -> Float[Array, "tasks n p"]:
    """Returns the features of the images of all tasks."""
    return jax.vmap(lambda x: features(alpha["body"], x), in_axes=1)(x)


def ridge_loss(w: Float[Array, "tasks p ways"], alpha: PyTree, batch: PyTree) -> Array:
    """Returns ``sum_t [|f(x_t) w_t - y_t|² + penalty |w_t|²] / 2``."""
    y = jax.nn.one_hot(batch["y"].T, w.shape[2])
    error = shared_features(alpha, batch["x"]) @ w - y
    penalty = jnp.exp(alpha["log_penalty"])
    return (jnp.sum(error**2) + penalty * jnp.sum(w**2)) / 2


def ridge_fit(
    num_ways: int, alpha: PyTree, batch: PyTree
) -> Float[Array, "tasks p ways"]:
    """Returns ``w_t = F' (F F' + penalty I)^-1 y``, the argmin of `ridge_loss`.

    The system has one equation per example, fewer than there are features.
    """
    f = shared_features(alpha, batch["x"])
    y = jax.nn.one_hot(batch["y"].T, num_ways)
    penalty = jnp.exp(alpha["log_penalty"])
    gram = f @ f.mT + penalty * jnp.eye(f.shape[1])[None]
    return f.mT @ jnp.linalg.solve(gram, y)


def ridge_scores(w: Array, alpha: PyTree, x: Array) -> Float[Array, "tasks n ways"]:
    """Returns the class scores, with a learned scale for the cross-entropy."""
    return alpha["scale"] * shared_features(alpha, x) @ w


def ridge_query_loss(w: Array, alpha: PyTree, batch: PyTree) -> Array:
    """Returns ``mean_t CE(scale f(x) w_t; Q_t)``."""
    return cross_entropy(ridge_scores(w, alpha, batch["x"]), batch["y"].T)


LOSSES = {
    "maml": (adaptation_loss, query_loss),
    "imaml": (proximal_loss, query_loss),
    "ridge": (ridge_loss, ridge_query_loss),
}


def accuracy(
    solver: InnerSolver, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array
) -> Array:
    """Returns the query accuracy after adaptation, over newly sampled tasks."""

    def batch_accuracy(key):
        support, query = problem.sample_data(key)
        init_w = problem.init_inner(w, alpha)
        adapted_w, _ = solver.solve(problem.inner_loss, init_w, alpha, support, key)
        if problem.init_fn is None:
            class_scores = ridge_scores(adapted_w, alpha, query["x"])
        else:
            class_scores = jax.vmap(scores, (0, 1))(adapted_w, query["x"])
        return jnp.mean(jnp.argmax(class_scores, axis=-1) == query["y"].T)

    keys = jax.random.split(key, NUM_TEST_BATCHES)
    return jnp.mean(jax.lax.map(batch_accuracy, keys))


def init_body(
    key: Array,
    image_shape: tuple[int, ...],
    num_convolutions: int,
    hidden: tuple[int, ...],
) -> tuple[PyTree, int]:
    """Returns random parameters of `features` and the number of features.

    The weights are normal with variance 1 / fan-in. ``image_shape`` is height and
    width, each convolution has 64 filters, and ``hidden`` are the sizes of the tanh
    layers.
    """
    keys = iter(jax.random.split(key, num_convolutions + len(hidden)))

    def init_layer(n_in, n_out):
        w = jax.random.normal(next(keys), (n_in, n_out)) / jnp.sqrt(n_in)
        return {"W": w, "b": jnp.zeros(n_out)}

    body = {"convolutions": [], "dense": []}
    (height, width), channels = image_shape, 1
    for _ in range(num_convolutions):
        body["convolutions"].append(init_layer(9 * channels, 64))
        height, width, channels = -(-height // 2), -(-width // 2), 64
    size = height * width * channels
    for n in hidden:
        body["dense"].append(init_layer(size, n))
        size = n
    return body, size


def characters(
    scale: str, data_dir: str | os.PathLike[str] | None = None
) -> tuple[str, np.ndarray, int]:
    """Returns the name of the data, the images, and the number of turns.

    Images are ``[characters, drawings, height, width]``; each turn of one is a class.
    The data are Omniglot, with images of 28 by 28 pixels at the paper's scale and of 14
    by 14 at the small one, in four turns of 90 degrees. At the small scale they are 170
    drawings of each of scikit-learn's digits if ``data_dir`` is empty, or if it is None
    and the file is not found. Digits have only two turns: a 6 turned by 180 degrees is
    a 9, and a 0, 1 or 8 turned by 180 degrees is itself.

    Args:
      scale: 'small' or 'paper'.
      data_dir: Folder of Omniglot; see `hypergrad.datasets.load`.

    Raises:
      FileNotFoundError: The file is not in ``data_dir``, or is needed for the paper's
        scale.
    """
    is_small = scale == "small"
    if is_small and data_dir == "":
        return turned_digits()
    try:
        x = datasets.load("omniglot", data_dir)["x"]
    except FileNotFoundError:
        if is_small and data_dir is None:
            return turned_digits()
        raise
    if is_small:
        x = x.reshape(*x.shape[:2], 14, 2, 14, 2).mean(axis=(3, 5))
    return "Omniglot (1,623 characters, 4 rotations)", x, 4


def turned_digits() -> tuple[str, np.ndarray, int]:
    """Returns the same as `characters`, for scikit-learn's digits."""
    digits = datasets.load("digits")
    per_digit = [digits["x"][digits["y"] == label][:170] for label in range(10)]
    x = np.stack(per_digit).reshape(10, 170, 8, 8)
    return "rotated scikit-learn digits (10 digits, 2 rotations)", x, 2


def split_points(num_characters: int, num_turns: int) -> tuple[int, int]:
    """Returns the numbers of characters at which training and validation end."""
    train_end, val_end = SPLIT_TENTHS[num_turns]
    return train_end * num_characters // 10, val_end * num_characters // 10


def split(images: Array, key: Array, num_turns: int) -> dict[str, Array]:
    """Splits the characters at random and returns the classes of each part.

    Each turn of a character is a class of its own, and all turns of a character are in
    the same part. The parts "train", "val" and "test" have 60%, 20% and 20% of the
    characters for four turns, and 40%, 30% and 30% for two.
    """
    images = images[jax.random.permutation(key, len(images))]
    train_end, val_end = split_points(len(images), num_turns)

    def add_turns(x):
        return jnp.concatenate([jnp.rot90(x, k, (2, 3)) for k in range(num_turns)])

    return {
        "train": add_turns(images[:train_end]),
        "val": add_turns(images[train_end:val_end]),
        "test": add_turns(images[val_end:]),
    }


def as_images(
    images: ArrayLike, num_ways: int, min_drawings: int, num_turns: int
) -> Array:
    """Returns images as an array, if they are square and enough for tasks.

    Raises:
      TypeError: The images are not floating-point.
      ValueError: They have another shape, are too few, or are not finite.
    """
    images = jnp.asarray(images)
    expected = "images must have the shape [characters, drawings, side, side]"
    side = images.shape[-1] if images.ndim == 4 else 0
    if side == 0 or images.shape[2] != side:
        raise ValueError(f"{expected}; got {list(images.shape)}.")
    check_features(images, "images")
    if images.shape[1] < min_drawings:
        raise ValueError(
            f"{expected} with at least {min_drawings} drawings for support and query; "
            f"got {images.shape[1]}."
        )
    train_end, val_end = split_points(len(images), num_turns)
    num_characters = min(train_end, val_end - train_end, len(images) - val_end)
    if not 2 <= num_ways <= num_turns * num_characters:
        raise ValueError(
            f"num_ways must be from 2 to {num_turns * num_characters}, the number of "
            f"classes in the smallest part; got {num_ways}. Pass more characters or "
            "another num_ways."
        )
    return images.astype(float)


def make(
    *,
    key: Array,
    scale: str = "small",
    data_dir: str | None = None,
    variant: str = "maml",
    num_ways: int = 5,
    num_shots: int = 1,
    num_tasks: int | None = None,
    penalty: float | Array = PENALTY,
    hidden: tuple[int, ...] = (64,),
    images: ArrayLike | None = None,
    num_turns: int = 4,
) -> Task:
    """Returns the task of classification from few drawings of characters or digits.

    Args:
      key: PRNG key of the split and of the initial network.
      scale: 'small' has a tanh network and small images; 'paper' has the four
        convolutions with 64 filters of Finn et al., but see the module.
      data_dir: Folder of Omniglot. Defaults to the variable HYPERGRAD_DATA_DIR; without
        a file, the small scale uses scikit-learn's digits. See `characters`.
      variant: 'maml', 'imaml' or 'ridge'.
      num_ways: Number of classes per task.
      num_shots: Number of support drawings per class.
      num_tasks: Number of tasks per estimate. Defaults to 4, and to 32 at the paper's
        scale.
      penalty: Coefficient of the squared distance to alpha, for 'imaml'.
      hidden: Sizes of the tanh layers at the small scale; () is a linear model.
      images: ``[characters, drawings, side, side]``, floating-point, used instead of
        these data.
      num_turns: Number of turns of 90 degrees of ``images`` that are classes: 2 or 4.

    Raises:
      FileNotFoundError: Omniglot is not in ``data_dir``, or is needed for the paper's
        scale.
      TypeError: ``penalty`` is not a number, ``hidden`` not a sequence, or images are
        not floating-point.
      ValueError: The scale, the variant or the number of turns is unknown, a number is
        out of range, or images have a wrong shape, are too few or are not finite.
    """
    key = as_key(key)
    check_choice("scale", scale, ("small", "paper"))
    check_choice("variant", variant, LOSSES)
    check_choice("num_turns", num_turns, SPLIT_TENTHS)
    num_tasks = {"small": 4, "paper": 32}[scale] if num_tasks is None else num_tasks
    check_counts(num_ways=num_ways, num_shots=num_shots, num_tasks=num_tasks)
    check_sequences(hidden=hidden)
    check_at_least_zero(penalty=penalty)
    if images is None:
        _, images, num_turns = characters(scale, data_dir)
    images = as_images(images, num_ways, num_shots + NUM_QUERIES, num_turns)
    split_key, body_key, head_key = jax.random.split(key, 3)
    splits = split(images, split_key, num_turns)
    layers = (0, hidden) if scale == "small" else (4, ())
    body, num_features = init_body(body_key, images.shape[2:], *layers)
    alpha: Any = {"body": body}
    if variant == "ridge":
        alpha |= {"log_penalty": jnp.zeros(()), "scale": jnp.ones(())}
        solver, init_fn = ClosedForm(partial(ridge_fit, num_ways)), None
        w = jnp.zeros((num_tasks, num_features, num_ways))
    else:
        head = jax.random.normal(head_key, (num_features, num_ways))
        head = {"W": head / jnp.sqrt(num_features), "b": jnp.zeros(num_ways)}
        alpha |= {"head": head}
        solver, init_fn = SOLVERS[variant], broadcast_alpha
        w = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_tasks, *x.shape)), alpha)

    def make_problem(split_name):
        sizes = num_ways, num_shots, NUM_QUERIES, num_tasks
        pool = ClassPool(splits[split_name], jnp.asarray(penalty, float), *sizes)
        data_fn = Partial(sample_tasks, pool)
        return Bilevel(*LOSSES[variant], init_fn=init_fn, data_fn=data_fn)

    return Task(
        paradigm="few-shot",
        problem=make_problem("train"),
        solver=solver,
        w=w,
        alpha=alpha,
        space=jax.tree.map(lambda _: spaces.Real(), alpha),
        metrics={
            f"{name}_accuracy": Partial(accuracy, solver, make_problem(name))
            for name in ("val", "test")
        },
    )
