"""Ten networks that share weights, as in Maclaurin et al. 2015: losses and training."""

import itertools
from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg

from .rotated_alphabets import ALPHABETS, Examples

LAYERS = (784, 400, 200, 55)
NUM_LAYERS, NUM_NETWORKS = len(LAYERS) - 1, 2 * len(ALPHABETS)
LOG_L2, LOG_SCALE, NUM_STEPS = -4.0, -2.0, 50
OPTIMIZER = optax.sgd(0.1, momentum=58983 / 65536)


def weights_of(z: PyTree, transform: Array) -> list[PyTree]:
    """Returns the weights of each network."""

    def mix(matrix: Array, x: Array) -> list[Array]:
        # The derivative of a split is one concatenation, that of indices many sums.
        parts = jnp.split(jnp.tensordot(matrix, x, axes=1), NUM_NETWORKS)
        return [part[0] for part in parts]

    mixed = [
        {name: mix(transform[i], x) for name, x in layer.items()}
        for i, layer in enumerate(z)
    ]
    return [
        [{name: x[network] for name, x in layer.items()} for layer in mixed]
        for network in range(NUM_NETWORKS)
    ]


def logits_of(w: PyTree, x: Array) -> Array:
    """Returns the scores of a network."""
    for i, layer in enumerate(w):
        x = x @ layer["w"] + layer["b"]
        x = jnp.tanh(x) if i < len(w) - 1 else x
    return x


def cross_entropies(z: PyTree, alpha: PyTree, sets: list[PyTree]) -> Array:
    """Returns the mean cross-entropy of each network."""
    losses = [
        optax.softmax_cross_entropy_with_integer_labels(
            logits_of(w, data["x"]), data["y"]
        ).mean()
        for w, data in zip(weights_of(z, alpha["transform"]), sets, strict=True)
    ]
    return jnp.stack(losses)


def penalty(z: PyTree, alpha: PyTree) -> Array:
    """Returns the penalty of the weights."""
    return jnp.exp(alpha["log_l2"]) * sum(jnp.sum(x**2) for x in jax.tree.leaves(z))


def inner_loss(z: PyTree, alpha: PyTree, sets: list[PyTree]) -> Array:
    """Returns the loss of all networks with their penalty."""
    return jnp.sum(cross_entropies(z, alpha, sets)) + penalty(z, alpha)


def outer_loss(z: PyTree, alpha: PyTree, sets: list[PyTree]) -> Array:
    """Returns the mean loss of the networks."""
    return jnp.mean(cross_entropies(z, alpha, sets))


@jax.jit
def error(z: PyTree, alpha: PyTree, sets: list[PyTree]) -> Array:
    """Returns the mean error of the networks."""
    errors = [
        jnp.mean(jnp.argmax(logits_of(w, data["x"]), axis=1) != data["y"])
        for w, data in zip(weights_of(z, alpha["transform"]), sets, strict=True)
    ]
    return jnp.mean(jnp.stack(errors))


def make_transform(degrees: Iterable[float]) -> Array:
    """Returns matrices from the identity (0) to the mean of all networks (1)."""
    eye = np.eye(NUM_NETWORKS)
    return jnp.asarray([(1 - d) * eye + d / NUM_NETWORKS for d in degrees], jnp.float32)


def make_alpha(transform: Any, log_l2: float = LOG_L2) -> PyTree:
    """Returns the outer variables."""
    transform = jnp.asarray(transform, jnp.float32)
    return {"transform": transform, "log_l2": jnp.asarray(log_l2, jnp.float32)}


def to_device(alphabets: list[Examples]) -> list[PyTree]:
    """Returns the data as arrays of JAX."""
    return [
        {"x": jnp.asarray(data["x"], jnp.float32), "y": jnp.asarray(data["y"])}
        for data in alphabets
    ]


def sample_weights(random: np.random.RandomState) -> PyTree:
    """Returns starting weights in the authors' order: network, layer, weights, bias."""
    shapes = list(itertools.pairwise(LAYERS))
    num_weights = sum(a * b + b for a, b in shapes)
    vectors = random.randn(NUM_NETWORKS * num_weights).reshape(NUM_NETWORKS, -1)
    vectors = (vectors * np.exp(LOG_SCALE)).astype(np.float32)
    z, offset = [], 0
    for a, b in shapes:
        middle, stop = offset + a * b, offset + a * b + b
        w = vectors[:, offset:middle].reshape(NUM_NETWORKS, a, b)
        z.append({"w": jnp.asarray(w), "b": jnp.asarray(vectors[:, middle:stop])})
        offset = stop
    return z


@jax.jit
def train(
    z: PyTree,
    alpha: PyTree,
    sets: list[PyTree],
    held_out: list[PyTree] | None,
    num_steps: int | Array,
) -> tuple[PyTree, PyTree]:
    """Returns weights after ``num_steps``, and the losses before each step and then."""

    def losses(z: PyTree, value: Array) -> PyTree:
        curves = {"train": (value - penalty(z, alpha)) / NUM_NETWORKS}
        if held_out is not None:
            curves["held_out"] = outer_loss(z, alpha, held_out)
        return curves

    def record(curves: PyTree, i: int | Array, values: PyTree) -> PyTree:
        return {name: x.at[i].set(values[name]) for name, x in curves.items()}

    def step(i: Array, carry: PyTree) -> PyTree:
        z, state, curves = carry
        value, gradient = jax.value_and_grad(inner_loss)(z, alpha, sets)
        curves = record(curves, i, losses(z, value))
        updates, state = OPTIMIZER.update(gradient, state)
        return optax.apply_updates(z, updates), state, curves

    names = ("train",) if held_out is None else ("train", "held_out")
    curves = {name: jnp.full(NUM_STEPS + 1, jnp.nan) for name in names}
    carry = z, OPTIMIZER.init(z), curves
    z, _, curves = jax.lax.fori_loop(0, num_steps, step, carry)
    return z, record(curves, num_steps, losses(z, inner_loss(z, alpha, sets)))


def make_estimator() -> hg.Unrolled:
    """Returns the estimator: 0.8 GB hold the weights of all steps."""
    return hg.Unrolled(hg.Descent(OPTIMIZER, NUM_STEPS), max_stored_bytes=2_500_000_000)


@eqx.filter_jit
def estimate_hypergradient(
    problem: hg.Bilevel, z: PyTree, alpha: PyTree
) -> hg.Estimate:
    """Returns the hypergradient of an outer step."""
    return hg.hypergradient(problem, make_estimator())(z, alpha)
