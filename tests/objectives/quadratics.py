"""Two squared distances as outer losses, whose Pareto set is the segment of centers."""

import chex
import jax
import jax.numpy as jnp
import optax

import hypergrad as hg
from tests.loops import run_loop

IMPLICIT = hg.Implicit(hg.ClosedForm(lambda alpha, batch: alpha))
QUARTER, TENTH = optax.sgd(0.25), optax.sgd(0.1)
CENTERS = jnp.array([[1.0, 0.0, -1.0], [-1.0, 2.0, 0.5]])
ALPHA0 = jnp.array([2.0, 3.0, 1.0])


def inner_loss(w, alpha, batch):
    """Has the minimum ``w* = alpha``, with a different curvature for each entry."""
    return 0.5 * jnp.sum(batch["h"] * (w - alpha) ** 2)


def distance_to(k):
    return lambda w, alpha, batch: jnp.sum((w - batch["centers"][k]) ** 2)


DISTANCES = distance_to(0), distance_to(1)


def biquadratic(outer=DISTANCES, dtype=float):
    data = {"h": jnp.array([1.0, 2.0, 4.0], dtype), "centers": CENTERS.astype(dtype)}
    return hg.Bilevel(inner_loss, outer, data, data)


def minimize(aggregator, problem=None, *, optimizer=QUARTER, alpha=ALPHA0, **options):
    problem = biquadratic() if problem is None else problem
    options = {"num_steps": 100} | options
    w = jnp.zeros_like(alpha)
    return run_loop(
        problem, IMPLICIT, optimizer, w, alpha, aggregator=aggregator, **options
    )


def random_pairs(key):
    """Returns 50 pairs of gradients, half in conflict, with lengths of 1e-3 to 1e3."""
    keys = jax.random.split(key, 2)
    pairs = jax.random.normal(keys[0], (50, 2, 3))
    return pairs * 10 ** jax.random.uniform(keys[1], (50, 2, 1), minval=-3, maxval=3)


def gram_matrices(gradients):
    return jnp.einsum("ckn,cln->ckl", gradients, gradients)


def assert_close(actual, expected, scale=1.0):
    """Compares with a tolerance for the dtype of ``actual``, relative to ``scale``."""
    tolerance = 1e-8 if actual.dtype == jnp.float64 else 1e-4
    chex.assert_trees_all_close(
        jnp.asarray(actual / scale, float), jnp.asarray(expected / scale, float),
        rtol=0, atol=tolerance,
    )  # fmt: skip
