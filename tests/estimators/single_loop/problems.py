"""Problems and helpers that the tests of the single-loop methods share."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg

NUM_EXAMPLES = 3
W, V, OTHER_W, OTHER_V = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
ALPHA, OTHER_ALPHA = jnp.array([0.1, -0.4, 0.3]), jnp.array([0.3, -0.1, 0.2])

SGD = optax.sgd(0.05)
METHODS = {
    "SOBA": hg.SOBA(SGD),
    "SABA": hg.SABA(SGD),
    "SRBA": hg.SRBA(SGD, period=3),
    "FSLA": hg.FSLA(SGD),
    "StocBiO": hg.StocBiO(SGD, 3, 4, step_size=0.1),
    "AmIGO": hg.AmIGO(SGD, 3, 2),
    "TTSA": hg.TTSA(SGD, 3, step_size=0.1),
    "MRBO": hg.MRBO(SGD, 4, step_size=0.1),
    "SUSTAIN": hg.SUSTAIN(SGD, 3, step_size=0.1),
    "VRBO": hg.VRBO(SGD, 3, 4, period=2, step_size=0.1),
    "F2SA": hg.F2SA(SGD, 3, penalty=10.0),
    "BOME": hg.BOME(SGD, 3, step_size=0.1),
    "PZOBO": hg.PZOBO(SGD, 3, 2),
    "DARTS": hg.DARTS(SGD, step_size=0.1),
    "DARTS, first order": hg.DARTS(SGD),
}


def examples(seed: int, num_examples: int = NUM_EXAMPLES) -> dict[str, np.ndarray]:
    """Returns features ``x`` and ``z`` of shape ``[n, 3]`` and targets ``y``."""
    x, z = np.random.default_rng(seed).normal(size=(2, num_examples, 3))
    return {"x": x, "z": z, "y": x @ np.ones(3) + z[:, 0]}


TRAIN, VAL = examples(1), examples(2)


def inner_loss(w, alpha, batch):
    """Returns a smooth absolute error, whose targets alpha shifts, and a penalty."""
    residual = batch["x"] @ w - batch["y"] - batch["z"] @ alpha
    return jnp.mean(jnp.logaddexp(residual, -residual)) + 0.1 * jnp.sum(w**2)


def outer_loss(w, alpha, batch):
    """Returns a smooth absolute error, to which alpha contributes directly."""
    residual = batch["x"] @ w - batch["y"] + 0.5 * batch["z"] @ alpha
    return jnp.mean(jnp.logaddexp(residual, -residual))


FULL = hg.Bilevel(inner_loss, outer_loss, TRAIN, VAL)


def with_batches(
    inner_size: int | None = 1, outer_size: int | None = 1, problem: hg.Bilevel = FULL
) -> hg.Bilevel:
    """Returns a problem with mini-batches of these sizes; None means the full data."""
    sizes = (problem.inner_data, inner_size), (problem.outer_data, outer_size)
    data = [data if size is None else hg.Batches(data, size) for data, size in sizes]
    return hg.Bilevel(problem.inner_loss, problem.outer_loss, *data)


def state_at(
    method: Any, problem: hg.Bilevel = FULL, w: Any = W, **fields: Any
) -> hg.estimators.single_loop.SingleLoopState:
    """Returns the first state of a method with other fields, such as ``v``."""
    return replace(method.init(problem, w, ALPHA), **fields)


def run_steps(
    method: Any,
    problem: hg.Bilevel,
    w: Any,
    alpha: Any,
    rate: float,
    keys: jax.Array,
    look: Callable = lambda estimate: (),
) -> tuple[Any, Any]:
    """Makes one outer step per key, with gradient descent in ``alpha``.

    Returns:
      ``alpha`` after the steps, and per step ``(estimate.w, alpha, look(estimate))``
      before the step of alpha, with a leading axis of steps.
    """

    def body_fun(carry, key):
        state, alpha = carry
        estimate, state = method.estimate(problem, state, alpha, key)
        new_alpha = jax.tree.map(
            lambda a, h: a - rate * h, alpha, estimate.hypergradient
        )
        return (state, new_alpha), (estimate.w, alpha, look(estimate))

    @jax.jit
    def run(w, alpha, keys):
        carry = method.init(problem, w, alpha), alpha
        (_, alpha), records = jax.lax.scan(body_fun, carry, keys)
        return alpha, records

    return run(w, alpha, keys)
