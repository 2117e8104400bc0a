"""The interface of inner solvers, and the statistics that they report."""

from typing import Any, Protocol

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..batches import Data, batch_fraction
from ..products import Loss

#: The scalars made by `inner_stats`.
InnerStats = dict[str, Array]


class InnerSolver(Protocol):
    """Finds ``w*(alpha)``, the minimum of the inner loss.

    A solver is a hashable object or a pytree, such as an `equinox.Module`, and needs
    `solve` only. It does not deal with derivatives: `Implicit` and `argmin` use the
    stationarity of its result, and estimators that differentiate the iterations
    themselves need an `IterativeSolver`. The library uses these further attributes if
    they exist:

    - ``differentiable``: Whether the iterations may be differentiated. Defaults to
      False. If True, the solver must be an `IterativeSolver`.
    - ``ignores_loss``: Whether `solve` returns a result that does not depend on
      ``inner_loss``, such as a formula. Defaults to False. If True, `Penalty`, which
      adds the outer loss to it, raises TypeError.
    - ``citations``: Keys of ``references.bib``, for `hypergrad.citation`. Defaults to
      none.
    """

    def solve(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, InnerStats]:
        """Returns the solution and the cost of finding it; pure and jit-able.

        Args:
          inner_loss: ``(w, alpha, batch) -> scalar``.
          w: Starting point.
          alpha: Outer variable.
          data: Inner data. `hypergrad.batches.sample_batch` and
            `hypergrad.batches.full_batch` take batches from it. If batches have a key,
            each sample has its own, and the full batch has that of the estimate.
          key: PRNG key. The same key gives the same result to the bit.

        Returns:
          The solution, with the structure, shapes and dtypes of ``w``, and the
          statistics made by `inner_stats`.
        """
        ...


class IterativeSolver(InnerSolver, Protocol):
    """An inner solver whose iterations may be differentiated.

    Its ``solve`` is `run_inner_steps`: ``num_steps`` times `step`, from the carry that
    `init` returns. The library uses these attributes in addition to those of
    `InnerSolver`:

    - ``num_steps``: T, the number of steps, a static integer. Required.
    - ``differentiable``: Must be True.
    - ``grads_per_step``: Number of inner gradients per step, for the cost of estimators
      that make steps themselves. Defaults to 1.
    - ``uses_all_data``: Whether these gradients are on all inner data even if that has
      a batch size. Defaults to False.
    """

    @property
    def num_steps(self) -> int:
        """Number of steps, static."""
        ...

    @property
    def differentiable(self) -> bool:
        """True."""
        ...

    def init(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, PyTree]:
        """Returns the first carry, a pair ``(w, state)``.

        `step` should read ``alpha`` from its argument and not from ``state``, because
        `FixedPoint` and truncated runs differentiate steps from a constant carry. They
        raise ValueError for a leaf of ``alpha`` that `init` stores in ``state`` if
        `step` keeps it there or updates it without ``w``. If it is updated with ``w``,
        as an initial momentum is, its contribution is dropped like those of the steps
        before the constant carry.
        """
        ...

    def step(
        self,
        inner_loss: Loss,
        carry: tuple[PyTree, PyTree],
        alpha: PyTree,
        data: Data,
        key: Array,
    ) -> tuple[PyTree, PyTree]:
        """Returns the next carry ``(w, state)``; ``key`` differs from step to step."""
        ...


def grads_per_step(solver: IterativeSolver) -> int:
    """Returns the number of gradients per step of a solver; 1 if it states none."""
    return getattr(solver, "grads_per_step", 1)


def step_fraction(solver: Any, data: Data) -> float:
    """Returns the fraction of the inner data that a step of a solver uses."""
    return 1.0 if getattr(solver, "uses_all_data", False) else batch_fraction(data)


def inner_stats(
    num_steps: Any,
    num_grads: Any = 0.0,
    num_hvps: Any = 0.0,
    num_values: Any = 0.0,
    *,
    converged: Any = None,
) -> InnerStats:
    """Returns the statistics of a solve as float scalars.

    Args:
      num_steps: Number of steps.
      num_grads: Number of gradients on all inner data; a gradient on a mini-batch
        counts as the fraction of the data that it uses. A value and a gradient that are
        evaluated together count as one gradient.
      num_hvps: Number of Hessian-vector products, counted likewise.
      num_values: Number of values without a gradient, counted likewise.
      converged: Whether the solver met its own tolerance, which becomes 1 or 0. None,
        of a solver without a tolerance, leaves the statistic out.
    """
    stats = {
        "num_steps": num_steps,
        "num_grads": num_grads,
        "num_hvps": num_hvps,
        "num_values": num_values,
    }
    if converged is not None:
        stats["converged"] = converged
    return {name: jnp.asarray(value, dtype=float) for name, value in stats.items()}
