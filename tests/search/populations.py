"""A problem and runs for tests of searchers that train populations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg

SPACE = {"center": hg.spaces.Interval(-2.0, 2.0, shape=(2,))}
CURVATURE = jnp.array([[3.0, 1.0], [1.0, 2.0]]) / 4
MOMENTUM = optax.sgd(0.3, momentum=0.5)


def inner_loss(w, alpha, batch):
    """Is smallest at ``w = alpha``."""
    deviation = w - alpha["center"]
    return 0.5 * deviation @ CURVATURE @ deviation


def outer_loss(w, alpha, batch):
    """Is smallest at ``w = (1, -1)``."""
    return jnp.sum((w - jnp.array([1.0, -1.0])) ** 2)


PROBLEM = hg.Bilevel(inner_loss, outer_loss)


def train_by_hand(alpha, num_steps: int) -> np.ndarray:
    """Returns ``w`` after steps of the heavy-ball method from 0."""
    w, v = np.zeros(2), np.zeros(2)
    for _ in range(num_steps):
        v = 0.5 * v + np.asarray(CURVATURE) @ (w - np.asarray(alpha["center"]))
        w = w - 0.3 * v
    return w


def search(
    searcher: Any,
    num_steps: int = 3,
    problem: hg.Bilevel = PROBLEM,
    w: Any = None,
    **options: Any,
) -> hg.Trace:
    """Returns the trace of a search whose solver makes so many steps."""
    solver = options.pop("solver", None) or hg.Descent(MOMENTUM, num_steps)
    w = jnp.zeros(2) if w is None else w
    options = {"space": SPACE, "budget": 40, "key": jax.random.key(0)} | options
    return hg.search(problem, solver, searcher, w, **options)


# A supernet: two choices, of three and of four, each with weights of its own.

NODES = {"first": hg.spaces.Choice(3), "second": hg.spaces.Choice((5, 7, 8, 9))}
FIRST, SECOND = jnp.array([0.5, -1.0, 2.0]), jnp.array([1.0, 0.2, -0.3, 0.7])
NODE_VALUES = np.add.outer(np.asarray(FIRST) ** 2, 3 * np.asarray(SECOND) ** 2)


def select(tables, alpha):
    """Returns the weights that ``alpha`` selects, one of each table."""
    second = jnp.argmax(jnp.array([5, 7, 8, 9]) == alpha["second"])
    return jnp.stack([tables[0][alpha["first"]], tables[1][second]])


SUPERNET = hg.Bilevel(
    lambda w, alpha, batch: (
        0.5 * jnp.sum((select(w, alpha) - select((FIRST, SECOND), alpha)) ** 2)
    ),
    lambda w, alpha, batch: jnp.sum(jnp.array([1.0, 3.0]) * select(w, alpha) ** 2),
)
SUPERNET_SOLVER = hg.Descent(optax.sgd(1.0), 60)
ALPHA_METRICS = {
    "first": lambda w, alpha, key: alpha["first"],
    "second": lambda w, alpha, key: alpha["second"],
}


def search_supernet(budget: float, solver: Any = SUPERNET_SOLVER, **options: Any):
    """Returns the trace of one-shot search with 16 evaluations per round."""
    return search(
        hg.searchers.OneShot(16), problem=SUPERNET, solver=solver,
        w=(jnp.zeros(3), jnp.zeros(4)), space=NODES, budget=budget,
        metrics=ALPHA_METRICS, **options,
    )  # fmt: skip
