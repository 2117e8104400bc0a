"""Counts of calls, and their sum in one unit of cost for every method.

A *gradient-equivalent* is one gradient of the inner loss on all inner data. A
Hessian-vector product with its cross term counts 2 (1.83 by operation count on a
four-layer MLP), an outer gradient ``n_outer / n_inner``, and a value a third of its
gradient. Mini-batches count in proportion.

Counts are those of the calls that are executed. Under `jax.vmap` every solve of a batch
makes as many calls as the slowest one, so that n solves count n times the slowest
(`count_batch`). Solves that are made one after the other add up. The trials of a search
by ``Parallel(n, "vmap")`` count as if made alone, whatever runs them.
"""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from ..batches import Data, num_examples

HVP_COST = 2.0
VALUE_COST = 1.0 / 3.0

#: The counts of calls.
CALLS = ("num_grads", "num_hvps", "num_values", "num_outer_grads", "num_outer_values")
#: The statistics of an estimate that add up over estimates.
COST_STATS = (*CALLS, "num_examples", "gradient_equivalents")


def outer_grad_cost(inner_data: Data, outer_data: Data) -> float:
    """Returns the cost of an outer gradient in gradient-equivalents.

    It is ``n_outer / n_inner``, or 1 if the data have no number of examples.
    """
    n_inner, n_outer = num_examples(inner_data), num_examples(outer_data)
    return 1.0 if n_inner is None or n_outer is None else n_outer / n_inner


def count_batch(calls: Array) -> Array:
    """Returns the calls that are executed for a batch of solves under `jax.vmap`.

    Args:
      calls: Number of calls that each solve needs by itself.
    """
    return calls.size * jnp.max(calls)


def cost_stats(
    inner_data: Data,
    outer_data: Data,
    *,
    num_grads: Any = 0.0,
    num_hvps: Any = 0.0,
    num_values: Any = 0.0,
    num_outer_grads: Any = 0.0,
    num_outer_values: Any = 0.0,
) -> dict[str, Array]:
    """Returns `COST_STATS` as float scalars.

    Args:
      inner_data, outer_data: Data of the losses, of which only the sizes are used.
      num_grads, num_hvps, num_values: Calls of the inner loss, in passes over all inner
        data.
      num_outer_grads, num_outer_values: Calls of the outer loss, in passes over all
        outer data.

    Returns:
      The counts, ``gradient_equivalents``, their weighted sum, and ``num_examples``,
      the number of examples that all calls use, with repetitions. A Hessian-vector
      product uses those of its batch once. The number is NaN if the data have no
      number of examples.
    """
    outer_cost = outer_grad_cost(inner_data, outer_data)
    counts = {
        "num_grads": num_grads,
        "num_hvps": num_hvps,
        "num_values": num_values,
        "num_outer_grads": num_outer_grads,
        "num_outer_values": num_outer_values,
    }
    counts = {name: jnp.asarray(n, dtype=float) for name, n in counts.items()}
    inner_passes = counts["num_grads"] + counts["num_hvps"] + counts["num_values"]
    outer_passes = counts["num_outer_grads"] + counts["num_outer_values"]
    num_inner_examples = _num_examples_or_nan(inner_data) * inner_passes
    num_outer_examples = _num_examples_or_nan(outer_data) * outer_passes
    # Batches are fractions of the data, so their sum is an integer up to rounding.
    counts["num_examples"] = jnp.round(num_inner_examples + num_outer_examples)
    outer_calls = counts["num_outer_grads"] + VALUE_COST * counts["num_outer_values"]
    total = counts["num_grads"] + HVP_COST * counts["num_hvps"]
    total = total + VALUE_COST * counts["num_values"] + outer_cost * outer_calls
    return counts | {"gradient_equivalents": total}


def _num_examples_or_nan(data: Data) -> float:
    n = num_examples(data)
    return math.nan if n is None else n
