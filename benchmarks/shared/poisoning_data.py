"""The data, losses and victims of the table `poisoning`.

Models ``w [a, classes, pixels]`` are those of ``a`` independent attacks, which share
the training images; the outer variable has an array of images for each attack. Losses
are sums over attacks, so that all gradients are those of the single attacks.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.nn import logsumexp
from jaxtyping import Array, PyTree

import hypergrad as hg

ATTACKS = ("untargeted", "targeted")
COUNTS = (10, 30, 60)  # of poisons
NUM_TRAIN, NUM_CLASSES, NUM_PIXELS, NUM_EPOCHS = 1_000, 10, 656, 10_001
SOURCE_CLASS, TARGET_CLASS = 8, 3
PENALTY = 0.0025
SOLVER = hg.LBFGS(tolerance=1e-5)

Data = dict[str, Array]
Images = tuple[Array, ...]


# Data and model.


def order_images(attack: str, labels: np.ndarray, rng: np.random.Generator):
    """Returns an order of the training images; the first images become poisons."""
    order = rng.permutation(len(labels))
    if attack == "untargeted":
        return order
    pairs = [order[labels[order] == c][: COUNTS[-1] // 2] for c in (3, 8)]
    poisons = np.stack(pairs, axis=1).ravel()  # as many of both in each prefix
    return np.concatenate([poisons, order[~np.isin(order, poisons)]])


def wrong_labels(attack: str, labels: np.ndarray, rng: np.random.Generator):
    """Returns a wrong label of each image: any other digit, or 8 for 3 and 3 for 8."""
    if attack == "untargeted":
        return (labels + rng.integers(1, NUM_CLASSES, len(labels))) % NUM_CLASSES
    swapped = SOURCE_CLASS + TARGET_CLASS - labels
    return np.where(np.isin(labels, (SOURCE_CLASS, TARGET_CLASS)), swapped, labels)


def split_indices(
    attack: str, y: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, ...]:
    """Returns the indices of training, validation and test images."""
    if attack == "untargeted":
        return tuple(np.split(rng.permutation(60_000)[:10_000], [1_000, 2_000]))

    def sample(low: int, high: int, label: int, num: int) -> np.ndarray:
        indices = low + np.flatnonzero(y[low:high] == label)
        return rng.choice(indices, num, replace=False)

    train = [sample(0, 2_000, label, NUM_TRAIN // 10) for label in range(NUM_CLASSES)]
    val = sample(2_000, 60_000, SOURCE_CLASS, 400)
    return np.concatenate(train), val, sample(60_000, 70_000, SOURCE_CLASS, 500)


def load_split(attack: str, seed: int) -> tuple[Data, Data, Data, np.ndarray]:
    """Returns training, validation and test data, and the indices of the pixels."""
    arrays, rng = hg.datasets.load("mnist"), np.random.default_rng(seed)
    x, y = arrays["x"], arrays["y"].astype(int)
    train, val, test = split_indices(attack, y, rng)
    train = train[order_images(attack, y[train], rng)]
    is_used = np.any(x[np.concatenate([train, val])] > 0, axis=0)
    if np.sum(is_used) > NUM_PIXELS:
        raise ValueError(f"NUM_PIXELS must be at least {np.sum(is_used)}.")
    pixels = np.sort(np.argsort(~is_used, kind="stable")[:NUM_PIXELS])
    one_hot = lambda labels: jnp.asarray(np.eye(NUM_CLASSES, dtype=np.float32)[labels])

    def data_set(indices: np.ndarray) -> Data:
        is_target = attack == "targeted" and indices is not train
        labels = np.full(len(indices), TARGET_CLASS) if is_target else y[indices]
        return {"x": jnp.asarray(x[indices][:, pixels]), "y": one_hot(labels)}

    wrong = {"wrong_y": one_hot(wrong_labels(attack, y[train], rng))}
    return data_set(train) | wrong, data_set(val), data_set(test), pixels


def losses(w: Array, x: Array, y: Array) -> Array:
    """Returns the cross-entropy of each image; ``w`` is ``[classes, pixels]``."""
    logits = w @ x.T
    return logsumexp(logits, axis=0) - jnp.sum(logits * y.T, axis=0)


def inner_loss(w: Array, alpha: Images, batch: Data) -> Array:
    """Returns the training losses of all attacks, with their penalties."""
    sums = jnp.sum(jax.vmap(losses, (0, None, None))(w, batch["x"], batch["y"]), axis=1)
    total = PENALTY * jnp.sum(w**2)
    for i, images in enumerate(alpha):
        num = len(images)
        poison = jnp.sum(losses(w[i], images, batch["wrong_y"][:num]))
        total += (sums[i] + poison) / (len(batch["y"]) + num)
    return total


@jax.jit
def mean_losses(w: Array, data: Data) -> Array:
    """Returns the mean cross-entropy of each model."""
    return jnp.mean(jax.vmap(losses, (0, None, None))(w, data["x"], data["y"]), axis=1)


def targeted_loss(w: Array, alpha: Images, batch: Data) -> Array:
    """Returns the mean cross-entropies of all attacks with their target labels."""
    del alpha
    return jnp.sum(mean_losses(w, batch))


def untargeted_loss(w: Array, alpha: Images, batch: Data) -> Array:
    """Returns the negative mean cross-entropies of all attacks."""
    return -targeted_loss(w, alpha, batch)


OUTER_LOSSES = {"untargeted": untargeted_loss, "targeted": targeted_loss}


@jax.jit
def percent_right(w: Array, data: Data) -> Array:
    """Returns the percentage of images with their label, for each model."""
    scores = jnp.einsum("acd,nd->anc", w, data["x"])
    return 100 * jnp.mean(
        jnp.argmax(scores, axis=2) == jnp.argmax(data["y"], axis=1)[None], axis=1
    )


@jax.jit
def train_models(alpha: Images, train: Data) -> tuple[Array, Array]:
    """Returns the models that minimize the inner loss, and the number of gradients."""
    w = jnp.zeros((len(alpha), NUM_CLASSES, train["x"].shape[1]))
    w, stats = SOLVER.solve(inner_loss, w, alpha, train, jax.random.key(0))
    return w, stats["num_grads"]


@jax.jit
def train_by_adam(train: Data, key: Array) -> Array:
    """Returns the model after the protocol's epochs of Adam, without poisons."""
    bound = np.sqrt(6 / (784 + NUM_CLASSES))
    shape = (1, NUM_CLASSES, train["x"].shape[1])
    w = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
    optimizer, alpha = optax.adam(1e-3), no_poisons(train)

    def descend(_: int, carry: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        w, state = carry
        updates, state = optimizer.update(jax.grad(inner_loss)(w, alpha, train), state)
        return jnp.asarray(optax.apply_updates(w, updates)), state

    return jax.lax.fori_loop(0, NUM_EPOCHS, descend, (w, optimizer.init(w)))[0]


def no_poisons(train: Data) -> Images:
    """Returns the outer variable of one attack without an image."""
    return (train["x"][:0],)


def flipped(train: Data) -> Images:
    """Returns the first training images, to which the wrong labels belong."""
    return tuple(train["x"][:num] for num in COUNTS)


# Numbers of the paper: mean and deviation in percent, at 1, 3 and 6% of poisons.
PAPER: dict[tuple[str, str], tuple[tuple[float, float | None], ...]] = {
    ("label flipping", "untargeted"): ((86.71, 0.32), (85.17, 0.96), (84.64, 0.69)),
    ("approximate gradient", "untargeted"): (
        (82.09, 0.84), (74.41, 1.14), (66.91, 0.89)
    ),
    ("penalty", "untargeted"): ((83.29, 0.43), (75.14, 1.09), (67.59, 1.17)),
    ("label flipping", "targeted"): ((7.76, 1.07), (18.36, 1.23), (32.88, 3.47)),
    ("approximate gradient", "targeted"): ((18.84, 1.90), (52.76, 2.69), (71.48, 4.24)),
    ("penalty", "targeted"): ((17.40, 3.00), (51.40, 2.72), (70.01, 2.95)),
}  # fmt: skip
#: Numbers of reverse mode, which the paper quotes without deviations.
QUOTED = {"untargeted": (85.0, 82.0, 79.0), "targeted": (10.0, 25.0)}
