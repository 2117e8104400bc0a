"""The ledger: one unit of cost for every method.

A *gradient-equivalent* is one gradient of the inner loss over all inner data. A
Hessian-vector product with its cross term counts 2 (1.83 by operation count on a
four-layer MLP), an outer gradient ``n_outer / n_inner``, a value a third of its
gradient; mini-batches count in proportion.
"""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from ..problem import Data, num_examples

HVP_COST = 2.0
VALUE_COST = 1.0 / 3.0

#: The statistics of an estimate that add up over estimates.
COST_STATS = (
    "num_grads",
    "num_hvps",
    "num_values",
    "num_outer_grads",
    "num_outer_values",
    "num_examples",
    "gradient_equivalents",
)


def outer_grad_cost(inner_data: Data, outer_data: Data) -> float:
    """Cost of an outer gradient: ``n_outer / n_inner``, 1 where either is unknown."""
    n_inner, n_outer = num_examples(inner_data), num_examples(outer_data)
    return 1.0 if n_inner is None or n_outer is None else n_outer / n_inner


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
    """Counts of full-data calls and their sum in gradient-equivalents, as scalars.

    ``num_examples`` is how many examples all of these calls saw, each time anew; a
    Hessian-vector product sees those of its batch once. NaN where the data has no size.
    """
    weight = outer_grad_cost(inner_data, outer_data)
    counts = {
        "num_grads": num_grads,
        "num_hvps": num_hvps,
        "num_values": num_values,
        "num_outer_grads": num_outer_grads,
        "num_outer_values": num_outer_values,
    }
    counts = {name: jnp.asarray(n, dtype=float) for name, n in counts.items()}
    inner_calls = counts["num_grads"] + counts["num_hvps"] + counts["num_values"]
    inner_seen = _examples(inner_data) * inner_calls
    outer_calls = counts["num_outer_grads"] + counts["num_outer_values"]
    outer_seen = _examples(outer_data) * outer_calls
    # Batches are fractions of the data, so that their sum is whole but for rounding.
    counts["num_examples"] = jnp.round(inner_seen + outer_seen)
    outer_cost = counts["num_outer_grads"] + VALUE_COST * counts["num_outer_values"]
    total = counts["num_grads"] + HVP_COST * counts["num_hvps"]
    total = total + VALUE_COST * counts["num_values"] + weight * outer_cost
    return counts | {"gradient_equivalents": total}


def _examples(data: Data) -> float:
    n = num_examples(data)
    return math.nan if n is None else n
