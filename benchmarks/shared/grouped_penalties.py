"""Logistic regression with grouped log-penalties, and the best penalties there are.

The losses are those of the table `trainings`; its protocol describes the data.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.runtime.compat import enable_x64

from .searching import in_double, lowest

SIZES: tuple[int, ...] = (10, 500)
NUM_FEATURES, NUM_TRAIN, NUM_VAL, NUM_STEPS = 500, 600, 2_000, 300
LOW, HIGH = -8.0, 1.5  # of a log-penalty
NUM_RIDGES = 25  # equal penalties, of which the best one is the start of the way
FRACTIONS = (0.5, 0.8, 0.95)  # of the way from there to the target

DESCENT = optax.sgd(0.5, momentum=0.9)
TRAINING = hg.Descent(DESCENT, NUM_STEPS)


def inner_loss(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Returns the outer loss of a batch plus the penalty."""
    penalties = jnp.repeat(jnp.exp(alpha), NUM_FEATURES // alpha.size)
    return outer_loss(w, alpha, batch) + 0.5 * jnp.sum(penalties * w**2)


def outer_loss(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Returns the logistic loss; ``x`` is (features, examples)."""
    del alpha
    return jnp.mean(jax.nn.softplus(-batch["y"] * (w @ batch["x"])))


@functools.cache
def split(seed: int) -> dict[str, PyTree]:
    """Returns the data of a seed: ten groups of 50 features of decreasing weight.

    True weights are normal, of scales from 1 to 0.01; labels are logistic.
    """
    rng = np.random.default_rng(seed)
    num_groups = SIZES[0]
    scale = np.repeat(np.geomspace(1.0, 0.01, num_groups), NUM_FEATURES // num_groups)
    true_w = scale * rng.standard_normal(NUM_FEATURES)

    def sample(num_examples: int) -> dict[str, np.ndarray]:
        x = rng.standard_normal((NUM_FEATURES, num_examples))
        y = np.where(true_w @ x + rng.logistic(size=num_examples) > 0, 1.0, -1.0)
        return {"x": x.astype(np.float32), "y": y.astype(np.float32)}

    return {"train": sample(NUM_TRAIN), "val": sample(NUM_VAL)}


def make_problem(train: PyTree, val: PyTree) -> hg.Bilevel:
    """Returns the problem of training and validation data."""
    return hg.Bilevel(inner_loss, outer_loss, train, val)


def trained_value(
    train: PyTree, val: PyTree, w: Array, alpha: Array, key: Array
) -> Array:
    """Returns ``h(alpha)``, the outer loss after a training."""
    w, _ = TRAINING.solve(inner_loss, jnp.zeros_like(w), alpha, train, key)
    return outer_loss(w, alpha, val)


class Reference(NamedTuple):
    """The values of h at the best of equal penalties, and at its minimum."""

    ridge: float
    target: float

    @property
    def bounds(self) -> list[float]:
        """The values of h at which each of `FRACTIONS` is covered."""
        return [
            self.ridge + fraction * (self.target - self.ridge) for fraction in FRACTIONS
        ]


@functools.cache
def reference(seed: int, size: int) -> Reference:
    """Returns the ends of the way, by L-BFGS in the box through all 300 steps.

    The computation is in float64.
    """
    splits = split(seed)
    with enable_x64(True):
        train, val = in_double(splits["train"]), in_double(splits["val"])
        estimator = hg.Unrolled(TRAINING, warm_start=False)
        hypergradient_fn = jax.jit(
            hg.hypergradient(make_problem(train, val), estimator)
        )
        w = jnp.zeros(NUM_FEATURES)

        def value_and_grad(alpha: np.ndarray) -> tuple[float, np.ndarray]:
            estimate = hypergradient_fn(w, jnp.asarray(alpha))
            return float(estimate.value), np.asarray(estimate.hypergradient)

        ridges = [np.full(size, a) for a in np.linspace(LOW, HIGH, NUM_RIDGES)]
        values = [value_and_grad(alpha)[0] for alpha in ridges]
        best = int(np.argmin(values))
        bounds = LOW, HIGH
        target, _ = lowest(value_and_grad, ridges[best], bounds, maxiter=200, ftol=1e-9)
    return Reference(values[best], target)
