"""What single-loop estimators share: their input, their steps, what they report."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ...certificate import UNSEEN
from ...checks import check_problem, check_seen
from ...cost import ledger
from ...drawn import Drawn
from ...problem import Bilevel
from ...trees import norm
from ..protocol import Estimate, make_stats


def check_optimizer(name: str, given: Any, *, optional: bool = False) -> None:
    """Refuses what is no optax transformation."""
    if not (
        (optional and given is None) or isinstance(given, optax.GradientTransformation)
    ):
        raise TypeError(
            f"{name} must be an optax.GradientTransformation such as "
            f"optax.sgd(0.1); got {type(given).__name__}"
        )


def start(name: str, problem: Bilevel, w: PyTree, alpha: PyTree) -> PyTree:
    """``w``, or the start made of it; refuses what no single loop can do."""
    if problem.num_objectives is not None:
        raise ValueError(
            f"{name} takes one outer loss, the problem has {problem.num_objectives}; "
            "combine them into one function, such as a weighted sum"
        )
    check_problem(problem, w, alpha, None)
    check_seen(problem, w, alpha, None, UNSEEN)
    return problem.initial(w, alpha)


def move(
    optimizer: optax.GradientTransformation, direction: PyTree, state: PyTree, x: PyTree
) -> tuple[PyTree, PyTree]:
    """``x`` one step along minus the direction, and the optimizer's next state."""
    step, state = optimizer.update(direction, state, x)
    return optax.apply_updates(x, step), state


def report(
    data: Drawn,
    value: Array,
    direction: PyTree,
    w: PyTree,
    *,
    gradient: PyTree,
    residual: PyTree = None,
    b: PyTree = None,
    inner_steps: int = 1,
    standard_error: Array | float = jnp.nan,
    **counts: Any,
) -> Estimate:
    """The estimate of a step that never judges itself.

    Args:
      data: of the estimate.
      value, direction, w: outer value, direction for ``alpha``, inner variable.
      gradient: ``dL/dw``, whose norm is reported.
      residual, b: ``H v - b`` and ``b = dM/dw``, of a step that has a ``v``.
      inner_steps: of ``w``.
      standard_error: of a direction that was sampled.
      counts: of the ledger.
    """
    costs = ledger(data.inner_data, data.outer_data, **counts)
    if residual is not None:
        left = norm(residual)
        costs["adjoint_residual"] = jnp.where(left == 0, 0.0, left / norm(b))
    stats = make_stats(
        jnp.asarray(False),
        inner_residual=norm(gradient),
        inner_steps=inner_steps,
        standard_error=standard_error,
        **costs,
    )
    return Estimate(value, direction, w, stats)
