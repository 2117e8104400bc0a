"""Golden cases of the spaces, of their unit cubes, and of relaxed choices."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad import spaces

KEY = jax.random.key(37)
#: Continuous spaces, each with a leaf of shape [2, 3].
CONTINUOUS: dict[str, Any] = {
    "Real": spaces.Real(),
    "Positive": spaces.Positive(),
    "Interval": spaces.Interval(-2.0, 5.0, shape=(2, 3)),
    "Interval, arrays": spaces.Interval(
        np.array([-2.0, 0.0, 1.0]), np.array([0.0, 1.0, 5.0]), shape=(2, 3)
    ),
    "Interval, log": spaces.Interval(1e-4, 10.0, log=True, shape=(2, 3)),
    "Unit": spaces.Unit(shape=(2, 3)),
    "Simplex": spaces.Simplex(shape=(2, 3)),
    "Box": spaces.Box(-1.0, 2.0, shape=(2, 3)),
}
BOUNDED = [name for name in CONTINUOUS if name not in ("Real", "Positive")]
DISCRETE: dict[str, Any] = {
    "Integer": spaces.Integer(-2, 5, shape=(2, 3)),
    "Choice": spaces.Choice((0.5, 2.0, 8.0), shape=(2, 3)),
    "Choice, range": spaces.Choice(4, shape=(2, 3)),
}
TREE = {
    "rate": spaces.Interval(1e-4, 1.0, log=True),
    "mixture": spaces.Simplex(shape=(3,)),
    "depth": spaces.Integer(1, 8),
    "operation": spaces.Choice(3),
}


def unconstrained(dtype: Any) -> jax.Array:
    """Returns values of both signs, of which some are large."""
    values = np.random.default_rng(41).normal(size=(2, 3))
    return jnp.asarray(values * np.array([0.5, 2.0, 20.0]), dtype)


def run_maps(name: str) -> dict[str, Any]:
    """Returns the maps between a continuous space and its unconstrained variable."""
    space, results = CONTINUOUS[name], {}
    for dtype in ("float32", "float64"):
        u = unconstrained(dtype)
        alpha = jax.jit(partial(spaces.forward, space))(u)
        weights = jnp.arange(1, 7, dtype=dtype).reshape(2, 3)
        total = lambda u, weights=weights: jnp.sum(weights * spaces.forward(space, u))
        results[dtype] = {
            "forward": alpha,
            "gradient": jax.jit(jax.grad(total))(u),
            "inverse": jax.jit(partial(spaces.inverse, space))(alpha),
            "project": jax.jit(partial(spaces.project, space))(u),
            "contains": spaces.contains(space, alpha),
            "contains shifted": spaces.contains(space, alpha + 0.3),
        }
    return results


def run_cube(space: Any) -> dict[str, Any]:
    """Returns a sample and the coordinates of the unit cube behind a bounded space."""
    sample = jax.jit(partial(spaces.sample, space))(KEY)
    num_axes = len(spaces.axes(space))
    t = np.random.default_rng(43).random(num_axes)
    alpha = spaces.from_unit(space, t)
    return {
        "sample": sample,
        "num_values": [axis.num_values or 0 for axis in spaces.axes(space)],
        "ordered": [axis.ordered for axis in spaces.axes(space)],
        "from_unit": alpha,
        "to_unit": spaces.to_unit(space, alpha),
        "to_unit of sample": spaces.to_unit(space, sample),
        "contains": spaces.contains(space, alpha),
        "contains sample": spaces.contains(space, sample),
    }


def run_tree() -> dict[str, Any]:
    """Returns the maps of a pytree of spaces, of which one is a prefix."""
    space = {"penalty": spaces.Positive(), "weights": spaces.Unit(), "offset": None}
    u = {
        "penalty": {"a": jnp.array([0.3, -1.0]), "b": jnp.asarray(0.7)},
        "weights": jnp.array([-0.4, 2.0]),
        "offset": jnp.asarray(3.0),
    }
    alpha = spaces.forward(space, u)
    return {
        "forward": alpha,
        "inverse": spaces.inverse(space, alpha),
        "project": spaces.project(space, u),
        "contains": spaces.contains(space, alpha),
    }


# Relaxed choices.


def cubic(x):
    """Returns a loss that is not linear in a one-hot sample."""
    values = jnp.array([[1.0, -2.0, 0.5], [0.3, 2.0, -1.0]])
    return jnp.sum(values * x) ** 3 + jnp.sum(x[0] * x[1])


RELAXATIONS: dict[str, Callable] = {
    "gumbel_softmax": lambda logits, key: cubic(
        spaces.gumbel_softmax(logits, key, 0.5)
    ),
    "straight_through": lambda logits, key: cubic(spaces.straight_through(logits, key)),
    "score_function": lambda logits, key: spaces.score_function(cubic, logits, key),
    "score_function, baseline": lambda logits, key: spaces.score_function(
        cubic, logits, key, 0.7
    ),
}


def run_relaxation(loss: Callable) -> dict[str, Any]:
    """Returns values and derivatives of relaxed losses over several keys."""
    logits = jnp.array([[0.2, -0.5, 1.0], [0.0, 0.4, -0.3]])
    keys = jax.random.split(KEY, 6)
    value_and_grad = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0))
    value, gradient = jax.jit(value_and_grad)(logits, keys)
    hessian = jax.jit(jax.hessian(loss))(logits, keys[0])
    return {"value": value, "gradient": gradient, "hessian": hessian}


CASES: dict[str, Callable[[], Any]] = {
    f"spaces/{name}": partial(run_maps, name) for name in CONTINUOUS
}
CASES |= {
    f"spaces/{name}, unit cube": partial(run_cube, CONTINUOUS[name]) for name in BOUNDED
}
CASES |= {
    f"spaces/{name}, unit cube": partial(run_cube, space)
    for name, space in DISCRETE.items()
}
CASES |= {
    "spaces/pytree": run_tree,
    "spaces/pytree, unit cube": partial(run_cube, TREE),
}
CASES |= {
    f"spaces/{name}": partial(run_relaxation, loss)
    for name, loss in RELAXATIONS.items()
}
