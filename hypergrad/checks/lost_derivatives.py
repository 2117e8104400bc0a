"""Checks of losses, steps and starting points for derivatives that they lose."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..batches import full_batch, sample_batch
from ..jaxprs.dependence import LostDerivative
from ..jaxprs.lost_derivatives import find_lost_derivatives
from ..problem import Bilevel
from ..products import Loss
from ..trees import vdot

USE_SMOOTH = (
    "Use a smooth function, such as a surrogate of hg.surrogates, or state with "
    "hypergrad.extend.without_derivative that a constant is meant."
)


def check_no_lost_derivative(
    name: str,
    loss: Loss,
    w: PyTree,
    args: tuple[PyTree, ...],
    differentiated: Sequence[bool],
) -> None:
    """Raises ValueError for a loss that loses a part of a derivative.

    Args:
      name: Name of the loss.
      loss: ``(w, *args) -> scalar``.
      w, args: Its arguments; only their shapes are used.
      differentiated: For each leaf of ``args``, whether a derivative by it is needed.
    """
    leaves, structure = jax.tree.flatten(args)
    needed = [i for i, is_needed in enumerate(differentiated) if is_needed]

    def loss_of_needed(w: PyTree, values: list[Any]) -> Array:
        # The other leaves are constants: what w selects from them has no derivative.
        new_leaves = dict(enumerate(leaves)) | dict(zip(needed, values, strict=True))
        return loss(w, *jax.tree.unflatten(structure, new_leaves.values()))

    _, lost = find_lost_derivatives(loss_of_needed, w, [leaves[i] for i in needed])
    if lost:
        raise ValueError(
            f"{name} must have a complete derivative; got a loss that depends on its "
            f"arguments through {describe_places(lost)}, whose derivative is zero. "
            f"{USE_SMOOTH}"
        )


def lost_derivative_flags(
    problem: Bilevel, w: PyTree, alpha: PyTree
) -> dict[str, Array]:
    """Returns a failed check if a loss loses a derivative by ``w`` or ``alpha``.

    The dictionary is empty otherwise, so that the check costs nothing in a program.
    """
    return _lost_flags(any(_lost_in_losses(problem, w, alpha).values()))


def lost_in_step_flags(
    solver: Any, problem: Bilevel, w: PyTree, alpha: PyTree
) -> dict[str, Array]:
    """Returns a failed check if a step of a solver loses a derivative."""
    return _lost_flags(_lost_in_step(solver, problem, w, alpha))


def lost_in_init_flags(problem: Bilevel, w: PyTree, alpha: PyTree) -> dict[str, Array]:
    """Returns a failed check if ``init_fn`` loses a derivative by ``alpha``."""
    return _lost_flags(_lost_in_init(problem, w, alpha))


def lost_in_rates_flags(estimator: Any, alpha: PyTree) -> dict[str, Array]:
    """Returns a failed check if rate or momentum of `Reversible` lose a derivative."""
    return _lost_flags(_lost_in_rates(estimator, alpha))


def describe_lost_derivatives(
    problem: Bilevel, estimator: Any, w: PyTree, alpha: PyTree
) -> Iterator[str]:
    """Yields sentences that name the places where an estimator loses derivatives.

    These are the losses and, if the estimator differentiates an inner run, ``init_fn``,
    the steps of its solver, and the rate and momentum of `Reversible`.
    """
    places = _lost_in_losses(problem, w, alpha)
    differentiates_init = getattr(estimator, "differentiates_init", None)
    # Implicit differentiation needs no derivative of a step, so that it has the flag
    # only if a loss has such a place.
    differentiates_steps = differentiates_init is not None or not any(places.values())
    if differentiates_init:
        places["init_fn"] = _lost_in_init(problem, w, alpha)
    if hasattr(estimator, "rate_and_momentum"):
        places["learning_rate or momentum"] = _lost_in_rates(estimator, alpha)
    for name, lost in places.items():
        if lost:
            yield f"{name} loses derivatives in {describe_places(lost)}. {USE_SMOOTH}"
    solver = getattr(estimator, "solver", None)
    if not (differentiates_steps and hasattr(solver, "step")):
        return
    if lost := _lost_in_step(solver, problem, w, alpha):
        yield (
            f"a step of {type(solver).__name__} loses derivatives in "
            f"{describe_places(lost)}. Use another optimizer."
        )


def check_losses_for_certificates(
    problem: Bilevel, w: PyTree, alpha: PyTree, message: str
) -> None:
    """Raises ValueError if no certificate can be trusted, as a loss loses a derivative.

    Args:
      problem, w, alpha: The problem and its variables; only shapes are used.
      message: First sentences of the error.
    """
    if sentences := tuple(describe_lost_derivatives(problem, None, w, alpha)):
        raise ValueError(" ".join([message, *sentences]))


def describe_flagged_losses(
    problem: Bilevel, estimator: Any, w: PyTree, alpha: PyTree
) -> Iterator[str]:
    """Yields sentences that name lost derivatives if estimates have a flag for them.

    These are the sentences of `describe_lost_derivatives`.
    """

    def flags_fn(problem, w, alpha, key):
        state = estimator.init(problem, w, alpha, key)
        return estimator.estimate(problem, state, alpha, key)[0].flags

    flags = eqx.filter_eval_shape(flags_fn, problem, w, alpha, jax.random.key(0))
    if "lost_derivative" in flags:
        yield from describe_lost_derivatives(problem, estimator, w, alpha)


def _lost_flags(is_lost: Any) -> dict[str, Array]:
    return {"lost_derivative": jnp.asarray(True)} if is_lost else {}


def _lost_in_losses(
    problem: Bilevel, w: PyTree, alpha: PyTree
) -> dict[str, frozenset[LostDerivative]]:
    """Returns the derivatives by ``w`` and ``alpha`` that each loss loses."""
    places = {}
    for name, loss, batch in losses_with_batches(problem):
        # The batch is a constant: what w selects from it has no derivative.
        on_batch = lambda w, alpha, loss=loss, batch=batch: loss(w, alpha, batch)
        _, places[name] = find_lost_derivatives(on_batch, w, alpha)
    return places


def _lost_in_step(
    solver: Any, problem: Bilevel, w: PyTree, alpha: PyTree
) -> frozenset[LostDerivative]:
    """Returns the derivatives that a step of a solver loses.

    A linear loss replaces the inner loss, so that its gradient is an input. Lion, for
    example, uses only the sign of it.
    """
    inner_data, _ = problem.sample_data(jax.random.key(0))
    init_key, step_key = jax.random.split(jax.random.key(0))

    def step(w, alpha, grad):
        loss = lambda w, alpha, batch: vdot(grad, w)
        carry = solver.init(loss, w, alpha, inner_data, init_key)
        carry = solver.step(loss, carry, alpha, inner_data, step_key)
        return eqx.filter(carry, eqx.is_inexact_array)

    _, lost = find_lost_derivatives(step, w, alpha, w)
    return lost


def _lost_in_init(
    problem: Bilevel, w: PyTree, alpha: PyTree
) -> frozenset[LostDerivative]:
    """Returns the derivatives by ``alpha`` that ``init_fn`` loses."""
    _, lost = find_lost_derivatives(lambda a: problem.init_inner(w, a), alpha)
    return lost


def _lost_in_rates(estimator: Any, alpha: PyTree) -> frozenset[LostDerivative]:
    """Returns the derivatives by ``alpha`` that rate and momentum lose."""
    rates = lambda alpha: estimator.rate_and_momentum(alpha, jnp.asarray(0))
    _, lost = find_lost_derivatives(rates, alpha)
    return lost


def losses_with_batches(
    problem: Bilevel,
) -> list[tuple[str, Callable[..., Any], PyTree]]:
    """Returns name, function and batch of both losses."""
    key = jax.random.key(0)
    inner_data, outer_data = problem.sample_data(key)
    outer_value = lambda w, alpha, batch: problem.outer_value(w, alpha, batch)
    return [
        ("inner_loss", problem.inner_loss, sample_batch(inner_data, key)),
        ("outer_loss", outer_value, full_batch(outer_data, key)),
    ]


def describe_places(lost: Iterable[LostDerivative]) -> str:
    """Returns the operations with their file, line and function."""
    places = {f"{x.operation} ({x.location})" for x in lost}
    return ", ".join(sorted(places))
