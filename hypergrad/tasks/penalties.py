"""L2 penalties: one for all weights, one per input of a layer, or one per weight.

Pedregosa 2016 (arXiv 1602.02355, HOAG) learns one; Lorraine et al. 2020 (arXiv
1911.02590) one per weight. The inner problem is a classifier with Gaussian priors whose
log-precisions are the hyperparameters,

    L(w, alpha) = mean_i CE_i(w) + 1/2 sum_j exp(alpha_j) w_j²,

and the outer loss is the cross-entropy on a validation set.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, PyTree

from .. import datasets as datasets
from .. import spaces
from ..inner import Descent
from ..problem import Bilevel
from ..validation import as_key
from .classifier import (
    Score,
    accuracy,
    bound,
    check_data,
    check_square,
    cross_entropy,
    held_out,
    loss_on,
    scorer,
    split,
    val_loss,
)
from .networks import CNN, MLP, parameters
from .task import Task

LOW, HIGH = -12.0, 1.0  # of a log-penalty
START = -4.0
SOLVER = Descent(optax.sgd(0.3, momentum=0.9), num_steps=50)


def penalty(w: PyTree, alpha: PyTree) -> Array:
    """``1/2 sum_j exp(alpha_j) w_j²``; a leaf of ``alpha`` may stand for several."""
    weigh = lambda alpha, part: jax.tree.map(
        lambda leaf: jnp.sum(jnp.exp(alpha) * leaf**2), part
    )
    return 0.5 * jax.tree.reduce(jnp.add, jax.tree.map(weigh, alpha, w))


def train_loss(score: Score, w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Cross-entropy and the penalties."""
    return cross_entropy(score, w, batch) + penalty(w, alpha)


class Variant(eqx.Module):
    """A network, its data, and the sizes of the parts at either scale."""

    network: Callable[[int, int, nnx.Rngs], nnx.Module]
    data: str
    small: tuple[int, int, int]  # train, validation, test
    paper: tuple[int, int, int]
    per: str = "feature"


def linear(num_features: int, num_outputs: int, rngs: nnx.Rngs) -> nnx.Module:
    """Logistic or softmax regression."""
    return MLP((num_features, num_outputs), rngs)


def mlp(num_features: int, num_outputs: int, rngs: nnx.Rngs) -> nnx.Module:
    """One hidden layer of 16."""
    return MLP((num_features, 16, num_outputs), rngs)


def cnn(num_features: int, num_outputs: int, rngs: nnx.Rngs) -> nnx.Module:
    """Four 3 by 3 filters."""
    return CNN(round(num_features**0.5), 4, num_outputs, rngs)


TUMOURS = (200, 150, 219)
DIGITS, MNIST = (200, 400, 1197), (10_000, 10_000, 10_000)
VARIANTS = {
    "hoag": Variant(linear, "breast_cancer", TUMOURS, TUMOURS, per="model"),
    "logistic": Variant(linear, "breast_cancer", TUMOURS, TUMOURS),
    "softmax": Variant(linear, "digits", DIGITS, MNIST),
    "mlp": Variant(mlp, "digits", DIGITS, MNIST),
    "cnn": Variant(cnn, "digits", DIGITS, MNIST),
    "overfit": Variant(
        mlp, "digits", (50, 50, 1197), (50, 50, 10_000), per="parameter"
    ),
}


def data_of(variant: str, scale: str) -> str:
    """Name of the data set: at the paper's scale digits are MNIST's."""
    name = VARIANTS[variant].data
    return "mnist" if scale == "paper" and name == "digits" else name


def standardized(parts: PyTree) -> PyTree:
    """Features with the mean and standard deviation of the training examples' out."""
    x = parts["train"]["x"]
    mean, spread = jnp.mean(x, axis=0), jnp.std(x, axis=0)
    spread = jnp.where(spread > 0, spread, 1)  # of a constant feature
    scaled = lambda x: (x - mean[None]) / spread[None]
    return {name: part | {"x": scaled(part["x"])} for name, part in parts.items()}


def log_penalties(w: PyTree, per: str, start: float | Array) -> PyTree:
    """All at ``start``: a scalar, one a row of each leaf, or one a number."""
    if per == "model":
        return jnp.asarray(start, float)
    shape = (lambda s: (*s[:-1], 1)) if per == "feature" else lambda s: s
    return jax.tree.map(lambda leaf: jnp.full(shape(leaf.shape), start, float), w)


def tolerances(
    schedule: str, num_steps: int, first: float = 0.1, least: float = 1e-4
) -> Array:
    """HOAG's decreasing ``rtol``, one an outer step: ``Implicit(rtol=...)``.

    From ``first``, at step k ``1/k²`` of it ('quadratic'), ``1/k³`` ('cubic') or
    ``0.9^(k-1)`` ('exponential'), and never below ``least``.
    """
    k = jnp.arange(1.0, num_steps + 1)
    part = {"quadratic": k**-2, "cubic": k**-3, "exponential": 0.9 ** (k - 1)}
    return jnp.maximum(first * part[schedule], least)


def make(
    *,
    key: Array,
    scale: str = "small",
    data_dir: str | None = None,
    variant: str = "softmax",
    per: str | None = None,
    start: float | Array = START,
    hold_out: Array | bool = False,
    data: PyTree = None,
) -> Task:
    """L2 penalties of a classifier.

    Args:
      key: of the split and the network's start.
      scale: 'small' for scikit-learn's breast cancer and digits, 'paper' for MNIST in
        place of the digits.
      data_dir: where MNIST is, see `hypergrad.data.load`.
      variant: 'hoag' (logistic regression, breast cancer, one penalty), 'logistic' (the
        same, one a feature), 'softmax', 'mlp', 'cnn' (digits, one an input of each
        layer), or 'overfit' (50 training and 50 validation digits, an MLP, one a
        weight).
      per: 'model', 'feature' or 'parameter', in place of the variant's own.
      start: every log-penalty, to begin with.
      hold_out: keep a third of validation out of the outer loss, to choose by.
      data: ``{"x": [n, features], "y": [n]}`` in place of the variant's: two classes
        for 'hoag' and 'logistic', else ten, and square images for 'cnn'.

    Raises:
      TypeError: data of another kind.
      ValueError: an unknown scale, variant or ``per``; data of another shape, too few,
        or with other labels.
    """
    key = as_key(key)
    for name, got, known in (
        ("scale", scale, ("small", "paper")),
        ("variant", variant, tuple(VARIANTS)),
        ("per", per, (None, "model", "feature", "parameter")),
    ):
        if got not in known:
            raise ValueError(f"penalties has {name} {known}; got {got!r}")
    chosen, data_name = VARIANTS[variant], data_of(variant, scale)
    data = datasets.load(data_name, data_dir) if data is None else data
    sizes = chosen.small if scale == "small" else chosen.paper
    num_outputs = 1 if data_name == "breast_cancer" else 10
    check_data(data, sizes[0] + sizes[1] + 1, max(num_outputs, 2))
    if variant == "cnn":
        check_square(data["x"])
    data = jax.tree.map(jnp.asarray, data)
    split_key, start_key = jax.random.split(key)
    parts = split(data, split_key, sizes)
    if data_name == "breast_cancer":
        parts = standardized(parts)
    rngs = nnx.Rngs(start_key)
    graph, w = parameters(chosen.network(data["x"].shape[1], num_outputs, rngs))
    score = scorer(graph)
    alpha = log_penalties(w, per or chosen.per, start)
    measure = lambda function: jax.tree_util.Partial(
        bound(function, score), parts["test"]
    )
    return Task(
        name="penalties",
        paradigm="supervised",
        source="Pedregosa 2016 (arXiv 1602.02355); Lorraine et al. 2020 (1911.02590)",
        problem=Bilevel(
            bound(train_loss, score),
            bound(val_loss, score),
            parts["train"],
            held_out(parts["val"], hold_out),
        ),
        solver=SOLVER,
        w=w,
        alpha=alpha,
        space=jax.tree.map(lambda leaf: spaces.Box(LOW, HIGH, shape=leaf.shape), alpha),
        metrics={
            "test_accuracy": measure(accuracy),
            "test_loss": measure(loss_on),
        },
    )
