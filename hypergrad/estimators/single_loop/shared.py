"""What single-loop estimators share: their input, their steps, what they report."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ...certificate import NO_GRADIENT_ADVICE
from ...cost import cost_stats
from ...problem import Bilevel, EstimateData, is_keyed
from ...problem_checks import check_alpha_has_gradient, check_problem
from ...trees import norm
from ..base import Estimate, make_stats


def check_lasting(name: str, why: str, instead: str, problem: Bilevel) -> None:
    """Refuses examples that are other ones at each draw."""
    for data in ("inner_data", "outer_data"):
        if is_keyed(getattr(problem, data)):
            raise ValueError(
                f"{name} {why}, and keyed {data} are other examples at each draw; pass "
                f"arrays, or hg.Batches without keyed, or use {instead}"
            )
    if problem.data_fn is not None:
        raise ValueError(
            f"{name} {why}, and a problem with draw has other examples at each "
            f"estimate; pass arrays or hg.Batches as inner_data and outer_data, or use "
            f"{instead}"
        )


def start(name: str, problem: Bilevel, w: PyTree, alpha: PyTree) -> PyTree:
    """``w``, or the start made of it; refuses what no single loop can do."""
    if problem.num_objectives is not None:
        raise ValueError(
            f"{name} takes one outer loss, the problem has {problem.num_objectives}; "
            "combine them into one function, such as a weighted sum"
        )
    check_problem(problem, w, alpha)
    check_alpha_has_gradient(problem, w, alpha, None, NO_GRADIENT_ADVICE)
    return problem.init_inner(w, alpha)


def move(
    optimizer: optax.GradientTransformation, direction: PyTree, state: PyTree, x: PyTree
) -> tuple[PyTree, PyTree]:
    """``x`` one step along minus the direction, and the optimizer's next state."""
    step, state = optimizer.update(direction, state, x)
    return optax.apply_updates(x, step), state


def report(
    data: EstimateData,
    value: Array,
    direction: PyTree,
    w: PyTree,
    *,
    gradient: PyTree,
    residual: PyTree = None,
    b: PyTree = None,
    num_inner_steps: Array | int = 1,
    standard_error: Array | float = jnp.nan,
    **counts: Any,
) -> Estimate:
    """The estimate of a step that never judges itself.

    Args:
      data: of the estimate.
      value, direction, w: outer value, direction for ``alpha``, inner variable.
      gradient: ``dL/dw``, whose norm is reported.
      residual, b: ``H v - b`` and ``b = dM/dw``, of a step that has a ``v``.
      num_inner_steps: of ``w``.
      standard_error: of a direction that was sampled.
      counts: of the ledger.
    """
    costs = cost_stats(data.inner_data, data.outer_data, **counts)
    if residual is not None:
        left = norm(residual)
        costs["adjoint_residual"] = jnp.where(left == 0, 0.0, left / norm(b))
    stats = make_stats(
        jnp.asarray(False),
        inner_grad_norm=norm(gradient),
        num_inner_steps=num_inner_steps,
        standard_error=standard_error,
        **costs,
    )
    return Estimate(value, direction, w, stats)
