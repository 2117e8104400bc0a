"""What combines K hypergradients, and the checks that all of them share."""

from typing import Any, Protocol

import jax.numpy as jnp
from jaxtyping import Array

from ..validation import is_traced


class Aggregator(Protocol):
    """Weighs the K hypergradients of a step: the direction is ``sum_k weights_k g_k``.

    One that minimises a function of the values also has ``score(value) -> scalar``, by
    which `hypergrad.minimize` tells the best ``alpha``; without it that is the last.
    """

    def init(self, num_objectives: int) -> Any:
        """The first state; a ValueError where K does not fit."""
        ...

    def compute_weights(
        self, value: Array, gram: Array, state: Any
    ) -> tuple[Array, Any]:
        """``(weights [K], next state)``; pure and jit-able.

        Args:
          value: ``[K]``, the outer values.
          gram: ``[K, K]``, the inner products ``g_i . g_j`` of the hypergradients.
          state: as ``init`` or the last call returned it.
        """
        ...


def check_weights(weights: Any, *, positive: bool = False) -> None:
    """Numbers in a row, none negative, not all zero; or each above 0."""
    if jnp.ndim(weights) != 1:
        several = "; for several settings use hg.objectives.front"
        raise ValueError(
            "weights must be [K], one number an outer loss; got shape "
            f"{jnp.shape(weights)}{several if jnp.ndim(weights) else ''}"
        )
    if is_traced(weights):
        return
    if positive and not bool(jnp.all(weights > 0)):
        raise ValueError(f"weights must be above 0, each of them; got {weights}")
    if not bool(jnp.all(weights >= 0) & jnp.any(weights > 0)):
        raise ValueError(f"weights must be at least 0, and one above; got {weights}")


def check_positive(name: str, value: Any) -> None:
    """One number above 0."""
    if jnp.shape(value) != () or not (is_traced(value) or bool(value > 0)):
        raise ValueError(f"{name} must be a number above 0; got {value}")


def check_size(name: str, array: Any, size: int, num_objectives: int) -> None:
    """As many numbers as the problem asks for; one number stands for all."""
    if jnp.shape(array) not in ((), (size,)):
        raise ValueError(
            f"{name} must have shape ({size},) for {num_objectives} outer losses; got "
            f"{jnp.shape(array)}"
        )
