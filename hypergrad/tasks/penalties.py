"""L2 penalties: one for all weights, one per input of a layer, or one per weight.

Pedregosa 2016 (arXiv 1602.02355, HOAG) learns one penalty, and Lorraine et al. 2020
(arXiv 1911.02590) one per weight. The inner problem is a classifier with Gaussian
priors, whose log-precisions are the hyperparameters,

    L(w, alpha) = mean_i CE_i(w) + 1/2 sum_j exp(alpha_j) w_j^2,

and the outer loss is the cross-entropy on a validation set.

The variant ``hoag`` differs from the code of HOAG, which adds ``exp(alpha) |w|^2 / 2``
to the sum of the losses of the examples, has no intercept and starts at alpha = 0: here
the losses are averaged, the intercept is penalized too, and alpha starts at -4.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, PyTree

from .. import spaces
from ..inner import Descent
from ..problem import Bilevel
from ..validation import as_key, is_traced
from .classifier import (
    ScoreFn,
    bind_score_fn,
    check_square,
    cross_entropy,
    load_data,
    make_metrics,
    make_score_fn,
    mask_held_out,
    mean_and_deviation,
    split,
    val_loss,
)
from .networks import CNN, MLP, split_module
from .task import Task, check_booleans, check_choice, check_finite

LOW, HIGH = -12.0, 1.0  # bounds of a log-penalty
INIT_LOG_PENALTY = -4.0
MIN_SIDE = 4  # of images for a convolution and a pooling without padding
SOLVER = Descent(optax.sgd(0.3, momentum=0.9), num_steps=50)


def penalty(w: PyTree, alpha: PyTree) -> Array:
    """Returns ``1/2 sum_j exp(alpha_j) w_j^2``.

    Args:
      w: Weights.
      alpha: Log-penalties: a prefix of ``w`` whose leaves broadcast to the weights.
    """
    weighted_squares = lambda alpha, weights: jax.tree.map(
        lambda leaf: jnp.sum(jnp.exp(alpha) * leaf**2), weights
    )
    return 0.5 * jax.tree.reduce(jnp.add, jax.tree.map(weighted_squares, alpha, w))


def train_loss(score_fn: ScoreFn, w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Returns the cross-entropy plus the penalties."""
    return cross_entropy(score_fn, w, batch) + penalty(w, alpha)


class Variant(eqx.Module):
    """A network, its data, and the sizes of the splits at both scales.

    Attributes:
      network: ``(num_features, num_outputs, rngs) -> module``.
      data: Name of the data set at scale 'small'.
      small, paper: Numbers of training, validation and test examples.
      granularity: Default granularity of the penalties, as in `log_penalties`.
    """

    network: Callable[[int, int, nnx.Rngs], nnx.Module]
    data: str
    small: tuple[int, int, int]
    paper: tuple[int, int, int]
    granularity: str = "feature"


def linear(num_features: int, num_outputs: int, rngs: nnx.Rngs) -> nnx.Module:
    """Returns a logistic or softmax regression."""
    return MLP((num_features, num_outputs), rngs)


def mlp(num_features: int, num_outputs: int, rngs: nnx.Rngs) -> nnx.Module:
    """Returns a network with one hidden layer of 16 units."""
    return MLP((num_features, 16, num_outputs), rngs)


def cnn(num_features: int, num_outputs: int, rngs: nnx.Rngs) -> nnx.Module:
    """Returns a convolutional network with four filters."""
    return CNN(round(num_features**0.5), 4, num_outputs, rngs)


TUMORS = (200, 150, 219)
DIGITS, MNIST = (200, 400, 1197), (10_000, 10_000, 10_000)
VARIANTS = {
    "hoag": Variant(linear, "breast_cancer", TUMORS, TUMORS, granularity="model"),
    "logistic": Variant(linear, "breast_cancer", TUMORS, TUMORS),
    "softmax": Variant(linear, "digits", DIGITS, MNIST),
    "mlp": Variant(mlp, "digits", DIGITS, MNIST),
    "cnn": Variant(cnn, "digits", DIGITS, MNIST),
    "overfit": Variant(
        mlp, "digits", (50, 50, 1197), (50, 50, 10_000), granularity="parameter"
    ),
}


def dataset_name(variant: str, scale: str) -> str:
    """Returns the name of the data set; scale 'paper' replaces the digits by MNIST."""
    name = VARIANTS[variant].data
    return "mnist" if scale == "paper" and name == "digits" else name


def standardize(splits: PyTree) -> PyTree:
    """Returns the splits with features of mean 0 and standard deviation 1.

    The training features determine the map. A constant feature becomes 0.
    """
    mean, deviation = mean_and_deviation(splits["train"]["x"])
    rescale = lambda x: (x - mean) / deviation
    return {name: batch | {"x": rescale(batch["x"])} for name, batch in splits.items()}


def log_penalties(w: PyTree, granularity: str, value: float | Array) -> PyTree:
    """Returns log-penalties for ``w`` that all have the same value.

    Args:
      w: Weights.
      granularity: 'model' for a scalar, 'feature' for one log-penalty per row of each
        leaf, that is, per input of each layer, or 'parameter' for one per weight.
      value: The value.
    """
    if granularity == "model":
        return jnp.asarray(value, float)
    shape = (lambda s: (*s[:-1], 1)) if granularity == "feature" else lambda s: s
    return jax.tree.map(lambda leaf: jnp.full(shape(leaf.shape), value, float), w)


def check_log_penalty(value: float | Array) -> None:
    """Checks that a log-penalty is in its space, unless it is traced.

    Raises:
      TypeError: It is not a number.
      ValueError: It is NaN, no scalar or out of the range.
    """
    if is_traced(value):
        return
    check_finite(init_log_penalty=value)
    if not LOW <= value <= HIGH:
        raise ValueError(
            f"init_log_penalty must be in [{LOW:g}, {HIGH:g}]; got {value}."
        )


def tolerances(
    schedule: str, num_steps: int, init_tol: float = 0.1, min_tol: float = 1e-4
) -> Float[Array, " num_steps"]:
    """Returns the decreasing tolerances of HOAG, one per outer step.

    Args:
      schedule: 'quadratic' (``1/k^2`` at step k), 'cubic' (``1/k^3``) or 'exponential'
        (``0.9^(k - 1)``), times ``init_tol``.
      num_steps: Number of outer steps.
      init_tol: Tolerance of the first step.
      min_tol: Lower bound of all tolerances.

    Raises:
      ValueError: ``schedule`` is unknown.
    """
    k = jnp.arange(1.0, num_steps + 1)
    factors = {"quadratic": k**-2, "cubic": k**-3, "exponential": 0.9 ** (k - 1)}
    check_choice("schedule", schedule, factors)
    return jnp.maximum(init_tol * factors[schedule], min_tol)


def make(
    *,
    key: Array,
    scale: str = "small",
    data_dir: str | None = None,
    variant: str = "softmax",
    granularity: str | None = None,
    init_log_penalty: float | Array = INIT_LOG_PENALTY,
    hold_out: Array | bool = False,
    data: PyTree = None,
) -> Task:
    """Returns a classifier whose L2 penalties are the hyperparameters.

    Args:
      key: PRNG key of the split and of the initial network.
      scale: 'small' for scikit-learn's breast cancer and digits, or 'paper', which
        replaces the digits by MNIST.
      data_dir: Folder that contains MNIST, see `hypergrad.datasets.load`.
      variant: 'hoag' (logistic regression, breast cancer, one penalty), 'logistic' (the
        same with one penalty per feature), 'softmax', 'mlp' or 'cnn' (digits, one
        penalty per input of each layer), or 'overfit' (50 training and 50 validation
        digits, an MLP, one penalty per weight).
      granularity: 'model', 'feature' or 'parameter'. Defaults to the granularity of the
        variant.
      init_log_penalty: Initial value of every log-penalty, between -12 and 1.
      hold_out: Whether the last third of the validation examples is excluded from the
        outer loss, for choosing settings. Unless it is traced, their metrics are
        ``held_out_accuracy`` and ``held_out_loss``.
      data: ``{"x": [n, features], "y": [n]}`` with two classes for 'hoag' and
        'logistic', otherwise ten, and with square images of at least 4 by 4 pixels for
        'cnn'. Defaults to the data of the variant.

    Raises:
      TypeError: ``init_log_penalty`` is not a number, or ``hold_out`` or an array of
        ``data`` has another type.
      ValueError: ``scale``, ``variant`` or ``granularity`` is unknown,
        ``init_log_penalty`` is out of range, or ``data`` has another shape, too few
        examples or other labels.
    """
    key = as_key(key)
    check_choice("scale", scale, ("small", "paper"))
    check_booleans(hold_out=hold_out)
    check_choice("variant", variant, VARIANTS)
    check_choice("granularity", granularity, (None, "model", "feature", "parameter"))
    check_log_penalty(init_log_penalty)
    config, data_name = VARIANTS[variant], dataset_name(variant, scale)
    sizes = config.small if scale == "small" else config.paper
    num_outputs = 1 if data_name == "breast_cancer" else 10
    num_needed, num_classes = sizes[0] + sizes[1] + 1, max(num_outputs, 2)
    data = load_data(data, data_name, num_needed, num_classes, data_dir)
    if variant == "cnn":
        check_square(data["x"], min_side=MIN_SIDE)
    split_key, init_key = jax.random.split(key)
    splits = split(data, split_key, sizes)
    if data_name == "breast_cancer":
        splits = standardize(splits)
    val = mask_held_out(splits["val"], hold_out)
    rngs = nnx.Rngs(init_key)
    graph, w = split_module(config.network(data["x"].shape[1], num_outputs, rngs))
    score_fn = make_score_fn(graph)
    alpha = log_penalties(w, granularity or config.granularity, init_log_penalty)
    return Task(
        paradigm="supervised",
        problem=Bilevel(
            bind_score_fn(train_loss, score_fn),
            bind_score_fn(val_loss, score_fn),
            splits["train"],
            val,
        ),
        solver=SOLVER,
        w=w,
        alpha=alpha,
        space=jax.tree.map(lambda leaf: spaces.Box(LOW, HIGH, shape=leaf.shape), alpha),
        metrics=make_metrics(score_fn, splits["test"], val, hold_out),
    )
