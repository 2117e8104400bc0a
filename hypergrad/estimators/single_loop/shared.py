"""What single-loop estimators share: their input, their steps, what they report."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, PyTree

from ...certificate import UNSEEN
from ...checks import check_problem, check_seen
from ...cost import ledger
from ...drawn import Drawn
from ...problem import Bilevel, is_keyed
from ...settings import number
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


def positive(name: str, *, optional: bool = False) -> Callable[[Any], Any]:
    """A converter for a number above 0."""
    return _within(name, "above 0", lambda x: x > 0, optional=optional)


def not_negative(name: str, *, optional: bool = False) -> Callable[[Any], Any]:
    """A converter for a number of at least 0."""
    return _within(name, "at least 0", lambda x: x >= 0, optional=optional)


def scheduled(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The converter, for a number or a schedule of the step, which is kept as it is."""
    return lambda value: value if callable(value) else convert(value)


def _within(
    name: str, said: str, holds: Callable, *, optional: bool = False
) -> Callable[[Any], Any]:
    to_number = number(name, optional=optional)

    def convert(value: Any) -> Any:
        value = to_number(value)
        known = value is not None and not isinstance(value, Tracer)
        if known and not np.all(holds(np.asarray(value))):
            raise ValueError(f"{name} must be {said}; got {value!r}")
        return value

    return convert


momentum = scheduled(_within("momentum", "in [0, 1]", lambda x: (x >= 0) & (x <= 1)))


def check_lasting(name: str, why: str, instead: str, problem: Bilevel) -> None:
    """Refuses examples that are other ones at each draw."""
    for data in ("inner_data", "outer_data"):
        if is_keyed(getattr(problem, data)):
            raise ValueError(
                f"{name} {why}, and keyed {data} are other examples at each draw; pass "
                f"arrays, or hg.Batches without keyed, or use {instead}"
            )
    if problem.draw is not None:
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
    inner_steps: Array | int = 1,
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
