"""Self-supervised learning, three levels: augment and contrast, encode, probe.

Chen et al. 2020 (SimCLR, arXiv 2002.05709); the temperature and the strengths of the
augmentation are usually tuned by the accuracy of a linear probe, and are learned here.
The encoder ``w`` maps two views a, b of the same images to unit vectors z, and learns
to tell which belong together (van den Oord et al. 2018, arXiv 1807.03748, equation 4):

    L(w, alpha) = -tau mean_i log [exp(a_i'b_i / tau) / sum_j exp(a_i'b_j / tau)],

and the same with a and b exchanged; the factor tau (Chen et al. 2021, arXiv 2104.02057,
algorithm 1) keeps the steps of low temperatures from growing as 1 / tau. A view is a
crop, moved, with noise: output pixel i shows the place ``c + (i - c)(1 - crop u) +
shift v``, u in [0, 1] and v in [-1, 1] at random, c the middle; then ``+ noise e``, e
normal. Below the encoder's loss stands the probe, ridge regression on a few labelled
examples' features f, in closed form; above it the outer loss, the probe's squared error
on validation examples:

    M(w) = mean_val |f'V - y|² / 2,   V = argmin sum_fit |f'V - y|² + penalty |V|².
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from .. import datasets as datasets
from .. import spaces
from ..inner import Descent
from ..problem import Batches, Bilevel
from ..validation import as_key
from .classifier import check_data
from .task import Task

NUM_TRAIN, NUM_FIT, NUM_VAL = 800, 100, 300
SIZE, NUM_CLASSES = 8, 10
BATCH = 128
SOLVER = Descent(optax.sgd(0.5, momentum=0.9), num_steps=100)
DEFAULT = {"temperature": 0.1, "noise": 0.1, "crop": 0.2, "shift": 0.5}
SPACE = {
    "temperature": spaces.Interval(0.02, 2.0, log=True),
    "noise": spaces.Interval(0.01, 1.0, log=True),
    "crop": spaces.Interval(0.01, 0.8, log=True),
    "shift": spaces.Interval(0.05, 3.0, log=True),
}


def hidden(w: PyTree, x: Array) -> Array:
    """Features ``[n, width]`` of images ``[n, 8, 8]``, what the probe reads."""
    return jnp.tanh(x.reshape(len(x), -1) @ w["W"] + w["b"][None, :])


def embedding(w: PyTree, x: Array) -> Array:
    """Unit vectors ``[n, dimension]`` to contrast."""
    z = hidden(w, x) @ w["projection"]
    return z / jnp.sqrt(jnp.sum(z**2, axis=1, keepdims=True) + 1e-6)


def resample(place: Array, x: Array) -> Array:
    """Rows of ``x`` at real-valued places, linearly interpolated, zero outside."""
    weight = jnp.maximum(1 - jnp.abs(place[:, None] - jnp.arange(len(x))[None, :]), 0)
    return weight @ x


def augment(alpha: PyTree, x: Array, key: Array) -> Array:
    """A random view of one image ``[8, 8]``."""
    crop_key, shift_key, noise_key = jax.random.split(key, 3)
    middle = (SIZE - 1) / 2
    zoom = 1 - alpha["crop"] * jax.random.uniform(crop_key)
    shift = alpha["shift"] * jax.random.uniform(shift_key, (2,), minval=-1)
    place = middle + (jnp.arange(SIZE) - middle) * zoom
    view = resample(place + shift[0], resample(place + shift[1], x.T).T)
    return view + alpha["noise"] * jax.random.normal(noise_key, x.shape)


def info_nce(a: Array, b: Array, temperature: Array) -> Array:
    """Which view belongs to which, by cross-entropy, both ways."""
    similarity = a @ b.T / temperature
    own = jnp.diagonal(similarity)
    one_way = lambda axis: jnp.mean(jax.nn.logsumexp(similarity, axis=axis) - own)
    return (one_way(0) + one_way(1)) / 2


def contrastive_loss(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """``tau`` times InfoNCE between two views of each image."""
    batch, key = batch
    views = [
        jax.vmap(augment, in_axes=(None, 0, 0))(
            alpha, batch["x"], jax.random.split(key, len(batch["x"]))
        )
        for key in jax.random.split(key)
    ]
    a, b = (embedding(w, view) for view in views)
    temperature = alpha["temperature"]
    return temperature * info_nce(a, b, temperature)


def with_one(f: Array) -> Array:
    """The features and a constant."""
    return jnp.concatenate([f, jnp.ones((len(f), 1), f.dtype)], axis=1)


def probe_loss(v: Array, f: Array, batch: PyTree) -> Array:
    """The probe's own loss, half of it: squared error where ``fit``, and a penalty."""
    y = jax.nn.one_hot(batch["y"], NUM_CLASSES)
    error = jnp.sum((with_one(f) @ v - y) ** 2, axis=1)
    return (jnp.sum(batch["fit"] * error) + batch["penalty"] * jnp.sum(v**2)) / 2


def probe(f: Array, batch: PyTree) -> Array:
    """``V = (F' D F + penalty I)^-1 F' D y``, D the diagonal of ``fit``."""
    f = with_one(f)
    y = jax.nn.one_hot(batch["y"], NUM_CLASSES)
    chosen = f * batch["fit"][:, None]
    gram = chosen.T @ f + batch["penalty"] * jnp.eye(f.shape[1])
    return jnp.linalg.solve(gram, chosen.T @ y)


def probe_scores(w: PyTree, batch: PyTree) -> Array:
    """Class scores ``[n, 10]`` of every example, by the probe of those to fit."""
    f = hidden(w, batch["x"])
    return with_one(f) @ probe(f, batch)


def probe_error(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Half the mean squared error of the probe where ``judge``."""
    del alpha
    y = jax.nn.one_hot(batch["y"], NUM_CLASSES)
    error = jnp.sum((probe_scores(w, batch) - y) ** 2, axis=1) / 2
    return jnp.sum(batch["judge"] * error) / jnp.sum(batch["judge"])


def accuracy(batch: PyTree, w: PyTree, alpha: PyTree, key: Array) -> Array:
    """Share of the examples to judge whose class the probe scores highest."""
    del alpha, key
    hits = jnp.argmax(probe_scores(w, batch), axis=1) == batch["y"]
    return jnp.sum(batch["judge"] * hits) / jnp.sum(batch["judge"])


def split(data: PyTree, key: Array, penalty: Array) -> dict[str, PyTree]:
    """Images without labels, and two sets with: the probe's own with val or test.

    A seeded permutation: 800 to contrast, 100 to fit the probe, 300 to validate, the
    rest to test.
    """
    order = jax.random.permutation(key, len(data["y"]))
    x = jnp.asarray(data["x"], float)[order].reshape(-1, SIZE, SIZE)
    y = data["y"][order]
    first, second = NUM_TRAIN + NUM_FIT, NUM_TRAIN + NUM_FIT + NUM_VAL

    def labelled(part):
        join = lambda leaf: jnp.concatenate([leaf[NUM_TRAIN:first], leaf[part]])
        joined = {"x": join(x), "y": join(y), "penalty": penalty}
        fit = jnp.arange(len(joined["y"])) < NUM_FIT
        return joined | {"fit": fit.astype(x.dtype), "judge": (~fit).astype(x.dtype)}

    return {
        "train": {"x": x[:NUM_TRAIN]},
        "val": labelled(slice(first, second)),
        "test": labelled(slice(second, None)),
    }


def make(
    *,
    key: Array,
    scale: str = "small",
    data_dir: str | None = None,
    penalty: float | Array = 1.0,
    width: int = 64,
    dimension: int = 32,
    data: PyTree = None,
) -> Task:
    """A contrastive encoder of scikit-learn's digits and its ridge probe.

    Args:
      key: of the split, and of the encoder to begin with.
      scale: 'small' is the only one: no paper sets another.
      data_dir: not read: the digits come with scikit-learn.
      penalty: of the probe.
      width, dimension: of the features, and of what is contrasted.
      data: ``{"x": [n, 64], "y": [n]}`` in place of the digits, classes 0 to 9, more
        than 1,200 examples.

    Raises:
      TypeError: data of another kind.
      ValueError: another scale, data of another shape, too few, or with other labels.
    """
    key = as_key(key)
    del data_dir
    if scale != "small":
        raise ValueError(f"self_supervised has scale 'small' only; got {scale!r}")
    data = datasets.load("digits") if data is None else data
    check_data(data, NUM_TRAIN + NUM_FIT + NUM_VAL + 1, NUM_CLASSES)
    if data["x"].shape[1] != SIZE**2:
        raise ValueError(
            f"data['x'] must be flat images of {SIZE} by {SIZE} pixels, [n, {SIZE**2}]"
            f"; got {data['x'].shape[1]} features"
        )
    split_key, first_key, second_key = jax.random.split(key, 3)
    penalty = jnp.asarray(penalty, float)
    parts = split(jax.tree.map(jnp.asarray, data), split_key, penalty)
    n = SIZE * SIZE
    w = {
        "W": jax.random.normal(first_key, (n, width)) / jnp.sqrt(n),
        "b": jnp.zeros(width),
        "projection": jax.random.normal(second_key, (width, dimension))
        / jnp.sqrt(width),
    }
    test = parts["test"]
    return Task(
        name="self_supervised",
        paradigm="self-supervised",
        source="Chen et al. 2020 (arXiv 2002.05709)",
        problem=Bilevel(
            contrastive_loss,
            probe_error,
            Batches(parts["train"], BATCH, with_key=True),
            parts["val"],
        ),
        solver=SOLVER,
        w=w,
        alpha={name: jnp.asarray(value, float) for name, value in DEFAULT.items()},
        space=SPACE,
        metrics={
            "test_accuracy": jax.tree_util.Partial(accuracy, test),
            "test_error": jax.tree_util.Partial(error, test),
        },
    )


def error(batch: PyTree, w: PyTree, alpha: PyTree, key: Array) -> Array:
    """The outer loss on the test examples."""
    del key
    return probe_error(w, alpha, batch)
