"""The interface of an aggregator, and checks that the aggregators share."""

from typing import Any, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..validation import is_traced


class Aggregator(Protocol):
    """Combines the hypergradients g_1, ..., g_K of K outer losses into one direction.

    The direction of a step is ``sum_k weights_k g_k``. `hypergrad.OuterLoop` calls
    `init` once and `compute_weights` at each step.

    An aggregator may also have the method ``score(value) -> scalar`` if it minimizes a
    function of the values. ``trace.best_alpha`` is then the ``alpha`` with the lowest
    score, and the optimizer receives the score. By default ``best_alpha`` is the last
    ``alpha``, and the optimizer receives ``sum_k weights_k M_k``. The attribute
    ``citations`` holds keys of ``references.bib`` for `hypergrad.citation`, and
    defaults to none.

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> class InverseValues:
    ...     # The direction of sum_k log(M_k).
    ...     def init(self, num_objectives):
    ...         return None
    ...
    ...     def compute_weights(self, value, gram, state):
    ...         return 1 / value, state
    ...
    ...     def score(self, value):
    ...         return jnp.sum(jnp.log(value))
    >>> inner = lambda w, alpha, batch: (w - alpha) ** 2
    >>> outer = (lambda w, alpha, batch: w**2, lambda w, alpha, batch: (w - 4.0) ** 2)
    >>> loop = hg.OuterLoop(
    ...     hg.Bilevel(inner, outer), hg.Implicit(hg.Newton()), optax.sgd(0.1),
    ...     aggregator=InverseValues(),
    ... )
    >>> trace = loop.run(loop.init(0.0, 1.0), num_steps=1)
    >>> trace.value.tolist(), trace.stats["objective_weights"].round(3).tolist()
    ([[1.0, 9.0]], [[1.0, 0.111]])
    """

    def init(self, num_objectives: int) -> Any:
        """Returns the first state: a pytree of arrays, or None.

        Raises:
          ValueError: The settings do not fit K = ``num_objectives`` losses.
        """
        ...

    def compute_weights(
        self, value: Float[Array, " K"], gram: Float[Array, "K K"], state: Any
    ) -> tuple[Float[Array, " K"], Any]:
        """Returns ``(weights, next_state)``; pure, and usable inside ``jit``.

        Args:
          value: Outer values M_1, ..., M_K.
          gram: Inner products ``g_i . g_j`` of the hypergradients, divided by a common
            power of two where squares of them under- or overflow.
          state: State from `init` or from the previous call.

        Returns:
          The weights, which may have any sign, and a state of the same structure. A
          weight that is not finite ends the run.
        """
        ...


def check_weights(weights: Any, *, positive: bool = False) -> None:
    """Raises ValueError unless the weights are a vector that is not negative.

    Args:
      weights: The weights; their values are checked only if they are concrete.
      positive: Whether each weight must be above 0. By default one of them must.
    """
    if jnp.ndim(weights) != 1:
        remedy = " Use hg.objectives.pareto_front for several settings."
        raise ValueError(
            "weights must have shape [K], one number per outer loss; got shape "
            f"{jnp.shape(weights)}.{remedy if jnp.ndim(weights) else ''}"
        )
    if is_traced(weights):
        return
    if positive and not bool(jnp.all(weights > 0)):
        raise ValueError(f"weights must all be above 0; got {weights}.")
    if not bool(jnp.all(weights >= 0) & jnp.any(weights > 0)):
        raise ValueError(
            f"weights must be at least 0 and not all of them 0; got {weights}."
        )


def check_size(name: str, array: Any, size: int, num_objectives: int) -> None:
    """Raises ValueError unless the array is a vector of that size, or one number."""
    if jnp.shape(array) not in ((), (size,)):
        raise ValueError(
            f"{name} must have shape ({size},) for {num_objectives} outer losses; got "
            f"{jnp.shape(array)}."
        )
