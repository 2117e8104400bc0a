"""What an inner solver is."""

from typing import Any, Protocol

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..problem import Data
from ..products import Loss
from ..trees import norm

InnerStats = dict[str, Array]


class InnerSolver(Protocol):
    """Finds ``w*(alpha)``; knows nothing of how that is differentiated.

    ``differentiable`` says whether the iterations may be differentiated. A solver that
    says so is a loop, ``num_steps`` times ``step`` from ``init``, with the parameters
    first in its carry, and `Unrolled` runs that loop; `solve` runs the same one.
    """

    @property
    def differentiable(self) -> bool:
        """Whether the iterations may be differentiated."""
        ...

    def solve(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, InnerStats]:
        """``(w*, stats)`` from ``w``; pure and jit-able; stats by `inner_stats`."""
        ...


class IterativeSolver(InnerSolver, Protocol):
    """An inner solver whose iterations may be differentiated.

    A step that makes more gradients than one says how many in ``grads_per_step``.
    """

    @property
    def num_steps(self) -> int:
        """T, static."""
        ...

    def init(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, PyTree]:
        """``(w, the rest of the carry)``."""
        ...

    def step(
        self,
        inner_loss: Loss,
        carry: tuple[PyTree, PyTree],
        alpha: PyTree,
        data: Data,
        key: Array,
    ) -> tuple[PyTree, PyTree]:
        """The next carry."""
        ...


def grads_per_step(solver: IterativeSolver) -> int:
    """Gradients that a step makes: 1 unless the solver has ``grads_per_step``."""
    return getattr(solver, "grads_per_step", 1)


def inner_stats(
    num_steps: Any, num_grads: Any = 0.0, num_hvps: Any = 0.0, num_values: Any = 0.0
) -> InnerStats:
    """What a solve costs, in passes over all inner data: four scalars.

    A value and gradient evaluated together count as one gradient.
    """
    number = lambda x: jnp.asarray(x, dtype=float)
    return {
        "num_steps": number(num_steps),
        "num_grads": number(num_grads),
        "num_hvps": number(num_hvps),
        "num_values": number(num_values),
    }


def gradient_tolerance(tolerance: float | Array | None, gradient: PyTree) -> Array:
    """The gradient norm at which to stop, relative to the first."""
    first = norm(gradient)
    if tolerance is None:
        tolerance = float(jnp.finfo(first.dtype).eps) ** 0.75
    return jnp.asarray(tolerance, first.dtype) * jnp.maximum(first, 1.0)


def value_rounding_error(value: Array) -> Array:
    """How far a value can be off by rounding."""
    return 10 * jnp.finfo(value.dtype).eps * jnp.abs(value)


def is_progressing(before: tuple[Array, PyTree], after: tuple[Array, PyTree]) -> Array:
    """Whether a step did more than rounding: lowered the value, or the gradient.

    A step that did not ends the run: nothing is left to gain in this precision.
    """
    (value, gradient), (next_value, next_gradient) = before, after
    lower = next_value < value - value_rounding_error(value)
    flatter = norm(next_gradient) < norm(gradient)
    return lower | (flatter & (next_value <= value + value_rounding_error(value)))
