"""Tasks of five characters of Omniglot, and the network of Finn et al. 2017.

Their code is cbfinn/maml. A task has five characters, each turned by a random multiple
of 90 degrees, with one drawing of each to adapt to and one to classify. The network has
four convolutions with 64 filters of 3 by 3 pixels and stride 2, padded as by
TensorFlow; after each one the features are standardized over the drawings of the task
and their pixels, shifted, and passed through ReLU. The mean over the last 2 by 2 pixels
is mapped to the scores. The package's own task, `hypergrad.tasks.few_shot`, has other
padding, splits, features and numbers of drawings.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from hypergrad import datasets

NUM_WAYS = 5
NUM_TASKS = 32  # per step
NUM_FILTERS = 64
SIZES = (28, 14, 7, 4)  # of the images that the convolutions read
NUM_TRAIN, NUM_VAL = 1100, 100  # characters; 423 are left for testing
EPSILON = 1e-3  # of the standardization
INIT_SCALE = 10.0  # of the scores of ridge regression, which are near 0 and 1

FeatureFn = Callable[[PyTree, Array], Array]  # (alpha, x) -> features of each task


class Characters(eqx.Module):
    """Drawings ``[characters, 20, 28, 28]`` from which tasks are sampled."""

    images: Array


def split_characters(key: Array) -> dict[str, Characters]:
    """Returns a random split of the characters into three parts."""
    images = datasets.load("omniglot")["x"]
    order = np.asarray(jax.random.permutation(key, len(images)))
    ends = NUM_TRAIN, NUM_TRAIN + NUM_VAL
    parts = zip(("train", "val", "test"), np.split(order, ends), strict=True)
    return {name: Characters(jnp.asarray(images[index])) for name, index in parts}


def sample_tasks(characters: Characters, key: Array) -> tuple[PyTree, PyTree]:
    """Samples the support and the query of 32 tasks.

    In both, ``x`` is ``[5, tasks, 28, 28]`` and ``y`` is ``[5, tasks]``.
    """
    images = characters.images

    def sample_task(key):
        keys = jax.random.split(key, 3)
        choose = lambda key, n, k: jax.random.choice(key, n, (k,), replace=False)
        classes = choose(keys[0], len(images), NUM_WAYS)
        pairs = jax.vmap(lambda key: choose(key, images.shape[1], 2))(
            jax.random.split(keys[1], NUM_WAYS)
        )
        x = images[classes[:, None], pairs]
        turns = jnp.stack([jnp.rot90(x, k, (2, 3)) for k in range(4)])
        turn = jax.random.randint(keys[2], (NUM_WAYS,), 0, 4)
        return turns[turn, jnp.arange(NUM_WAYS)]

    x = jax.vmap(sample_task, out_axes=2)(jax.random.split(key, NUM_TASKS))
    y = jnp.broadcast_to(jnp.arange(NUM_WAYS)[:, None], (NUM_WAYS, NUM_TASKS))
    return {"x": x[:, 0], "y": y}, {"x": x[:, 1], "y": y}


def init_filters(key: Array) -> list[Array]:
    """Returns the filters ``[9 channels, 64]`` of each convolution, by Glorot."""
    keys, filters = jax.random.split(key, len(SIZES)), []
    for i, channels in enumerate((1, *[NUM_FILTERS] * (len(SIZES) - 1))):
        bound, shape = glorot_bound(9 * channels), (9 * channels, NUM_FILTERS)
        filters.append(jax.random.uniform(keys[i], shape, minval=-bound, maxval=bound))
    return filters


def glorot_bound(num_inputs: int) -> float:
    """Returns the largest initial value of a filter that reads so many numbers."""
    return (6 / (num_inputs + 9 * NUM_FILTERS)) ** 0.5


def features(
    filters: list[Array], shifts: list[Array], x: Float[Array, "n 28 28"]
) -> Float[Array, "n 64"]:
    """Returns the features of drawings, which are standardized together."""
    x = x[..., None]
    for W, shift, size in zip(filters, shifts, SIZES, strict=True):
        x = standardize(_strided_patches(x, size) @ W)
        x = jax.nn.relu(x + shift.reshape(1, 1, 1, -1))
    return jnp.mean(x, axis=(1, 2))


def _strided_patches(x: Float[Array, "n h w c"], size: int) -> Array:
    """Returns patches of 3 by 3 pixels with stride 2, ``[n, h / 2, w / 2, 9 c]``."""
    before = size % 2  # TensorFlow pads an even size at the end alone
    pad = (before, 1)
    x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
    num = -(-size // 2)
    patches = [
        x[:, i : i + 2 * num - 1 : 2, j : j + 2 * num - 1 : 2]
        for i in range(3)
        for j in range(3)
    ]
    return jnp.concatenate(patches, axis=-1)


def standardize(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """Returns each feature with mean 0 and variance 1 over drawings and pixels."""
    axes = (0, 1, 2)
    mean, variance = (f(x, axes, keepdims=True) for f in (jnp.mean, jnp.var))
    return (x - mean) * jax.lax.rsqrt(variance + EPSILON)


def cross_entropies(
    scores: Float[Array, "*tasks n ways"], y: Int[Array, "*tasks n"]
) -> Float[Array, "*tasks n"]:
    """Returns the cross-entropy of each drawing."""
    return optax.softmax_cross_entropy_with_integer_labels(scores, y)


# MAML: w holds filters and head of each task, alpha their common start and the shifts.


def task_scores(
    w: PyTree, shifts: list[Array], x: Float[Array, "n 28 28"]
) -> Float[Array, "n ways"]:
    """Returns the class scores of the network of one task."""
    head = w["head"]
    return features(w["filters"], shifts, x) @ head["W"] + head["b"][None]


def adaptation_loss(w: PyTree, alpha: PyTree, batch: PyTree) -> Float[Array, ""]:
    """Returns the sum of the cross-entropies of all drawings of all tasks.

    As a sum, it does not couple the tasks. The authors sum over the five drawings of a
    task as well, because TensorFlow differentiates the sum of a vector.
    """
    scores = jax.vmap(task_scores, (0, None, 1))(w, alpha["shifts"], batch["x"])
    return jnp.sum(cross_entropies(scores, batch["y"].T))


def query_loss(w: PyTree, alpha: PyTree, batch: PyTree) -> Float[Array, ""]:
    """Returns the mean cross-entropy of the drawings to classify."""
    return adaptation_loss(w, alpha, batch) / batch["y"].size


def shared_start(w: PyTree, alpha: PyTree) -> PyTree:
    """Returns the common start for each task."""
    repeat = lambda w, start: jnp.broadcast_to(start, w.shape)
    return jax.tree.map(repeat, w, alpha["start"])


def init_maml(key: Array) -> tuple[PyTree, PyTree]:
    """Returns the first ``w`` and ``alpha`` of MAML."""
    filters_key, head_key = jax.random.split(key)
    W = jax.random.normal(head_key, (NUM_FILTERS, NUM_WAYS))
    head = {"W": W, "b": jnp.zeros(NUM_WAYS)}
    start = {"filters": init_filters(filters_key), "head": head}
    w = jax.tree.map(lambda x: jnp.broadcast_to(x, (NUM_TASKS, *x.shape)), start)
    return w, {"start": start, "shifts": init_shifts()}


def init_shifts() -> list[Array]:
    """Returns the first shifts, zeros."""
    return [jnp.zeros(NUM_FILTERS) for _ in SIZES]


# Ridge head: w [tasks, p, ways] is the head of each task, alpha all that they share.


def class_codes(y: Int[Array, "n tasks"]) -> Float[Array, "tasks n ways"]:
    """Returns one-hot targets."""
    return jax.nn.one_hot(y.T, NUM_WAYS)


def network_features(
    alpha: PyTree, x: Float[Array, "n tasks 28 28"]
) -> Float[Array, "tasks n 64"]:
    """Returns the features of the drawings of each task."""
    of_task = lambda x: features(alpha["filters"], alpha["shifts"], x)
    return jax.vmap(of_task, in_axes=1)(x)


def pixel_features(
    alpha: PyTree, x: Float[Array, "n tasks 28 28"]
) -> Float[Array, "tasks n 784"]:
    """Returns the pixels of the drawings of each task."""
    del alpha
    return x.transpose(1, 0, 2, 3).reshape(x.shape[1], x.shape[0], -1)


def ridge_loss(f: FeatureFn, w: Array, alpha: PyTree, batch: PyTree) -> Array:
    """Returns ``sum_t [|f(x_t) w_t - y_t|^2 + penalty |w_t|^2] / 2``."""
    error = f(alpha, batch["x"]) @ w - class_codes(batch["y"])
    penalty = jnp.exp(alpha["log_penalty"])
    return (jnp.sum(error**2) + penalty * jnp.sum(w**2)) / 2


def ridge_fit(f: FeatureFn, alpha: PyTree, batch: PyTree) -> Array:
    """Returns ``w_t = F' (F F' + penalty I)^-1 y``, the argmin of `ridge_loss`.

    There are fewer drawings than features, so that this system is the smaller one.
    """
    F = f(alpha, batch["x"])
    gram = F @ F.mT + jnp.exp(alpha["log_penalty"]) * jnp.eye(F.shape[1])[None]
    return F.mT @ jnp.linalg.solve(gram, class_codes(batch["y"]))


def ridge_scores(f: FeatureFn, w: Array, alpha: PyTree, x: Array) -> Array:
    """Returns the class scores ``[tasks, n, ways]``, with a learned scale."""
    return jnp.exp(alpha["log_scale"]) * f(alpha, x) @ w


def ridge_query_loss(f: FeatureFn, w: Array, alpha: PyTree, batch: PyTree) -> Array:
    """Returns the mean cross-entropy of the drawings to classify."""
    scores = ridge_scores(f, w, alpha, batch["x"])
    return jnp.mean(cross_entropies(scores, batch["y"].T))


def init_ridge(key: Array, num_features: int) -> tuple[PyTree, PyTree]:
    """Returns the first ``w`` and ``alpha`` of the ridge head."""
    alpha = {
        "filters": init_filters(key),
        "shifts": init_shifts(),
        "log_penalty": jnp.zeros(()),
        "log_scale": jnp.log(INIT_SCALE),
    }
    return jnp.zeros((NUM_TASKS, num_features, NUM_WAYS)), alpha
