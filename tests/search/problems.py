"""Problems with known optima for tests of searches, and helpers that run them."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg

KEY = jax.random.key(0)
SPACE = hg.spaces.Unit(shape=(2,))
BEST = np.array([0.3, 0.8])
TRIAL_COST = 4 / 3  # a gradient for the closed form, and an outer value


def inner_loss(w, alpha, batch):
    """Is smallest at ``w = 2 alpha``."""
    return jnp.sum((w - 2 * alpha) ** 2)


def outer_loss(w, alpha, batch):
    """Is smallest at ``alpha = BEST``."""
    return jnp.sum((w - 2 * BEST) ** 2)


PROBLEM = hg.Bilevel(inner_loss, outer_loss)
FORMULA = hg.ClosedForm(lambda alpha, batch: 2 * alpha)


def make_noisy_regression() -> hg.Bilevel:
    """Returns a problem with batches, keys and losses that cannot be imported."""
    factor, data = jnp.array(0.1), jnp.linspace(-1.0, 1.0, 24).reshape(12, 2)

    def loss(w, alpha, batch):
        x, key = batch
        noise = 0.01 * jax.random.normal(key) * jnp.sum(w)
        return jnp.mean((x @ w - x @ alpha) ** 2) + noise + factor * jnp.sum(w**2)

    batches = hg.Batches(data, 3, with_key=True)
    return hg.Bilevel(loss, lambda *args: outer_loss(*args), batches, data)


# A trial costs 7 steps on a quarter of the data and a value, so 17 buy 8 trials.
REGRESSION = {
    "problem": make_noisy_regression(),
    "solver": hg.Descent(optax.adam(0.1), 7),
    "budget": 17.0,
}


def search(
    problem: Any = PROBLEM, solver: Any = FORMULA, searcher: Any = None, w: Any = None,
    **options: Any,
) -> hg.Trace:  # fmt: skip
    """Returns the trace of a search, by default of 12 random trials."""
    searcher = hg.searchers.Random() if searcher is None else searcher
    w = jnp.zeros(2) if w is None else w
    options = {"space": SPACE, "budget": 12.1 * TRIAL_COST, "key": KEY} | options
    return hg.search(problem, solver, searcher, w, **options)


def record(**options: Any) -> tuple[list[dict], hg.Trace]:
    """Returns the trials as they come back from lines of strict JSON, and the trace."""
    lines = []
    write = lambda trial: lines.append(json.dumps(trial, allow_nan=False))
    trace = search(trial_callback=write, **options)
    return [json.loads(line) for line in lines], trace


class RecordingSearcher:
    """Random search that records what it is told; a user's own searcher."""

    def __init__(self):
        self.told: list[tuple[np.ndarray, float]] = []

    def init(self, space, key):
        return space

    def ask(self, state, key):
        return hg.spaces.sample(state, key), state

    def tell(self, state, alpha, value):
        self.told.append((np.asarray(alpha), float(value)))
        return state
