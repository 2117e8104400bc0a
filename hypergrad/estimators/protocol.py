"""What an estimator is, and what it returns."""

from typing import Any, Protocol

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..problem import Bilevel
from ..shown import Shown

STATS = (
    "inner_residual",
    "inner_steps",
    "adjoint_residual",
    "ritz_min",
    "ritz_max",
    "error_estimate",
    "standard_error",
    "distance_to_implicit",
    "num_grads",
    "num_hvps",
    "num_values",
    "num_outer_grads",
    "num_outer_values",
    "num_examples",
    "gradient_equivalents",
)


class Estimate(Shown):
    """A hypergradient, and what it says of itself.

    Attributes:
      value: the outer value at ``w``, a scalar, or ``[K]`` for K outer losses.
      hypergradient: same structure as ``alpha``; leaves lead with K for K losses.
      w: the inner solution that was used; same structure as ``w``.
      stats: scalars, the same keys from every estimator, NaN where one does not apply:
        ``inner_residual`` is ``||dL/dw||`` at ``w``; ``inner_steps``;
        ``adjoint_residual`` is ``||b - H v|| / ||b||``, the largest of K;
        ``ritz_min`` and ``ritz_max`` estimate the ends of the spectrum of ``H``;
        ``error_estimate`` is the relative error of the hypergradient, and
        ``standard_error`` its relative spread where it was sampled;
        ``distance_to_implicit``; the ledger ``num_grads``, ``num_hvps``,
        ``num_values``, ``num_outer_grads``, ``num_outer_values``, ``num_examples``,
        ``gradient_equivalents``; and the bool ``trusted``.

    >>> import hypergrad as hg
    >>> inner = lambda w, alpha, batch: (w - alpha) ** 2
    >>> outer = lambda w, alpha, batch: w**2
    >>> estimator = hg.Implicit(hg.Newton())
    >>> estimate = hg.hypergradient(hg.Bilevel(inner, outer), estimator)(0.0, 3.0)
    >>> float(estimate.value), float(estimate.hypergradient)
    (9.0, 6.0)
    """

    value: Array
    hypergradient: PyTree
    w: PyTree
    stats: dict[str, Array]


class Estimator(Protocol):
    """Turns a problem into hypergradients; what it carries between calls is a state.

    One with an attribute ``single_loop = True`` makes a step at a time, and only a run
    of them, `minimize`'s, means anything.

    ``target`` names the derivative that is estimated: 'argmin', at the stationary point
    of the inner loss, or 'solver', of the finite procedure that the inner solver is.
    """

    @property
    def target(self) -> str:
        """What is estimated."""
        ...

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> Any:
        """The first state; refuses what the estimator cannot do."""
        ...

    def estimate(
        self, problem: Bilevel, state: Any, alpha: PyTree, key: Array
    ) -> tuple[Estimate, Any]:
        """``(estimate, next state)``; pure and jit-able."""
        ...


def make_stats(trusted: Array | bool, **known: Any) -> dict[str, Array]:
    """All of `STATS` and ``trusted``, NaN where not known."""
    unknown = set(known) - set(STATS)
    if unknown:
        raise KeyError(f"no such statistic: {sorted(unknown)}")
    stats = {name: jnp.asarray(known.get(name, jnp.nan), dtype=float) for name in STATS}
    return stats | {"trusted": jnp.asarray(trusted)}
