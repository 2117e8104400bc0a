"""Shared parts of the estimators of a finite inner run.

An inner run is T steps of the inner solver from a given ``w``. The outer loss at the
end of the run is the function ``F(alpha) = M(w_T(alpha), alpha)``.
"""

import abc
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ..batches import fixed_batch_fraction
from ..checks.lost_derivatives import lost_derivative_flags, lost_in_init_flags
from ..checks.problem import (
    check_alpha_has_gradient,
    check_alpha_is_used,
    check_problem,
    init_has_gradient,
    solver_uses_alpha,
)
from ..cost import cost_stats
from ..inner.base import InnerSolver, InnerStats, IterativeSolver, step_fraction
from ..inner.descent import NON_DIFFERENTIABLE_STATES, contains_state, run_inner_steps
from ..number_checks import boolean, check_positive_int
from ..problem import Bilevel, EstimateData
from ..trees import safe_norm
from ..validation import KEY_SHAPE, check_solver
from .base import Estimate, make_estimate
from .rounding import perturb_iterate


class InnerRunState(eqx.Module):
    """State of an estimator that warm-starts its inner runs.

    Attributes:
      w: Where the next inner run starts.
    """

    w: PyTree


class RunDerivative(NamedTuple):
    """The derivative of the outer value through one inner run.

    Attributes:
      value: Outer value at ``w``: a scalar, or ``[K]`` for K outer losses.
      hypergradient: Structured like ``alpha``; with K outer losses each leaf has a
        leading axis of size K.
      w: Inner variables after the last step.
      flags: The failed checks, as in `make_estimate`.
      num_steps: Number of inner steps.
      num_grads, num_hvps: Number of inner gradients and of Hessian-vector products,
        each on the batch of one inner step.
      error_estimate: Estimated relative error as the derivative of the run.
    """

    value: Array
    hypergradient: PyTree
    w: PyTree
    flags: dict[str, Any]
    num_steps: int
    num_grads: int
    num_hvps: int
    error_estimate: Array | float


class RunEstimator(eqx.Module):
    """An estimator that differentiates a finite inner run.

    A subclass implements `differentiate`, and `optimizer_uses_alpha` if it has no
    ``solver``. If its derivative does not reach the starting point, it sets
    ``differentiates_init`` to False.

    Args:
      warm_start, outer_batch_size: As in `Unrolled`.
    """

    warm_start: bool | None = eqx.field(
        static=True,
        default=None,
        kw_only=True,
        converter=boolean("warm_start", optional=True),
    )
    outer_batch_size: int | None = eqx.field(static=True, default=None, kw_only=True)

    target = "solver"
    differentiates_init = True

    def __check_init__(self):
        check_positive_int("outer_batch_size", self.outer_batch_size, optional=True)

    @abc.abstractmethod
    def differentiate(
        self, problem: Bilevel, data: EstimateData, w: PyTree, alpha: PyTree
    ) -> RunDerivative:
        """Returns the derivative of a run from ``w``."""

    def optimizer_uses_alpha(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, inner_data: PyTree
    ) -> Sequence[bool]:
        """Returns which leaves of ``alpha`` the steps use besides the inner loss."""
        solver = self.solver  # pyright: ignore[reportAttributeAccessIssue]
        return solver_uses_alpha(solver, problem, w, alpha, inner_data)

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> InnerRunState:
        """Returns the state in which the first run starts from ``w``."""
        del key
        inner_data, _ = problem.sample_data(jax.random.key(0))
        has_gradient = self.optimizer_uses_alpha(problem, w, alpha, inner_data)
        advice = "and neither does the optimizer. Remove it from alpha"
        if self.differentiates_init:
            in_init = init_has_gradient(problem, w, alpha)
            has_gradient = list(map(operator.or_, has_gradient, in_init))
            advice = "and neither do the optimizer and init_fn. Remove it from alpha"
        check_alpha_has_gradient(problem, w, alpha, has_gradient, advice)
        return InnerRunState(w)

    def estimate(
        self, problem: Bilevel, state: InnerRunState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, InnerRunState]:
        """Returns the derivative of one inner run, and the next state."""
        data = EstimateData.sample(problem, key)
        run = self.differentiate(problem, data, state.w, alpha)
        in_optimizer = self.optimizer_uses_alpha(problem, run.w, alpha, data.inner_data)
        # An estimator that makes its own steps has no solver.
        fraction = step_fraction(getattr(self, "solver", None), data.inner_data)
        outer_fraction = fixed_batch_fraction(data.outer_data, self.outer_batch_size)
        costs = cost_stats(
            data.inner_data,
            data.outer_data,
            num_grads=run.num_grads * fraction + 1,  # one for inner_grad_norm
            num_hvps=run.num_hvps * fraction,
            num_outer_grads=run.value.size * outer_fraction,
        )
        flags = run.flags | lost_derivative_flags(problem, run.w, alpha)
        if self.differentiates_init:
            flags |= lost_in_init_flags(problem, run.w, alpha)
        estimate = make_estimate(
            run.value,
            run.hypergradient,
            run.w,
            flags,
            inner_grad_norm=inner_grad_norm(problem, data, run.w, alpha),
            num_inner_steps=run.num_steps,
            error_estimate=run.error_estimate,
            **costs,
        )
        warm_start = self.warm_start
        if warm_start is None:
            warm_start = not any(in_optimizer)
        return estimate, next_state(problem, state, run.w, warm_start)


def next_state(
    problem: Bilevel, state: InnerRunState, w: PyTree, warm_start: bool
) -> InnerRunState:
    """Returns the state after a run that ended at ``w``.

    With ``init_fn`` every run starts from the point that ``init_fn`` returns.
    """
    return InnerRunState(w) if warm_start and problem.init_fn is None else state


# Runs as functions of alpha.


def make_run_fn(
    solver: InnerSolver,
    problem: Bilevel,
    data: EstimateData,
    w: PyTree,
    outer_batch: PyTree,
) -> Callable[[PyTree], tuple[Array, PyTree, InnerStats]]:
    """Returns the function ``alpha -> (M(w_T, alpha), w_T, solver_stats)``.

    Each call makes a run from ``w`` with the same data and key.
    """

    def run_fn(alpha: PyTree) -> tuple[Array, PyTree, InnerStats]:
        final_w, solver_stats = solver.solve(
            problem.inner_loss,
            problem.init_inner(w, alpha),
            alpha,
            data.inner_data,
            data.solver_key,
        )
        return problem.outer_value(final_w, alpha, outer_batch), final_w, solver_stats

    return run_fn


def make_final_w_fn(
    solver: IterativeSolver,
    problem: Bilevel,
    data: EstimateData,
    w: PyTree,
    *,
    truncation_length: int | None = None,
    checkpoint: bool = False,
    mixed_mode: bool = False,
) -> Callable[..., PyTree]:
    """Returns the function ``(alpha, halves=None, relative_change=None) -> w_T``.

    It is differentiable by each of its arguments: ``halves`` as in `run_inner_steps`,
    and the ``relative_change`` of the iterates, as in `perturb_iterate`.

    Args:
      solver, problem, data, w: As in `make_run_fn`.
      truncation_length, checkpoint, mixed_mode: As in `run_inner_steps`.
    """

    def final_w_fn(
        alpha: PyTree,
        halves: tuple[PyTree, PyTree] | None = None,
        relative_change: PyTree | None = None,
    ) -> PyTree:
        before_step = None
        if relative_change is not None:
            before_step = lambda w, key: perturb_iterate(w, key, relative_change)
        final_w, _ = run_inner_steps(
            solver,
            problem.inner_loss,
            problem.init_inner(w, alpha),
            alpha,
            data.inner_data,
            data.solver_key,
            truncation_length=truncation_length,
            halves=halves,
            checkpoint=checkpoint,
            mixed_mode=mixed_mode,
            before_step=before_step,
        )
        return final_w

    return final_w_fn


def inner_grad_norm(
    problem: Bilevel, data: EstimateData, w: PyTree, alpha: PyTree
) -> Array:
    """Returns ``||dL/dw||`` on all inner data.

    Cost: one gradient.
    """
    return safe_norm(jax.grad(problem.inner_loss)(w, alpha, data.inner_batch()))


def inner_grad_norm_or_nan(
    problem: Bilevel, data: EstimateData, w: PyTree, alpha: PyTree
) -> tuple[Array, int]:
    """Returns `inner_grad_norm` and 1 gradient, or NaN and 0 for a loss without any.

    For estimators that work without derivatives: a callback or a loop of unknown length
    has none in reverse mode.
    """
    # An error of the loss itself is raised here, so that only its gradient may fail.
    jax.eval_shape(problem.inner_loss, w, alpha, data.inner_batch())
    try:
        return inner_grad_norm(problem, data, w, alpha), 1
    # JAX has these types for a primitive or a loop without a reverse-mode derivative.
    except (TypeError, ValueError, NotImplementedError):
        return jnp.asarray(jnp.nan, float), 0


def unravel_derivatives(
    derivatives: Float[Array, "N ..."],
    flat_alpha: Float[Array, " N"],
    unravel: Callable[[Array], PyTree],
) -> PyTree:
    """Returns derivatives with respect to N entries of ``alpha`` as a hypergradient.

    Args:
      derivatives: ``[N]``, or ``[N, K]`` for K outer losses.
      flat_alpha, unravel: Result of `jax.flatten_util.ravel_pytree` for ``alpha``.
    """
    # The outer loss may return another dtype than that of alpha.
    derivatives = derivatives.astype(flat_alpha.dtype)
    if derivatives.ndim == 1:
        return unravel(derivatives)
    return jax.vmap(unravel, in_axes=1)(derivatives)


# Checks.


def check_differentiable(solver: Any) -> None:
    """Raises ValueError for a solver whose iterations have no derivative."""
    check_solver(solver)
    if not getattr(solver, "differentiable", False):
        raise _not_differentiable_error(solver)


def check_differentiable_run(
    solver: IterativeSolver, problem: Bilevel, w: PyTree, alpha: PyTree
) -> None:
    """Checks the losses and the solver, and that its steps can be differentiated."""
    inner_data, _ = problem.sample_data(jax.random.key(0))
    # What an optimizer made from alpha contains is visible only in its state.
    carry = jax.eval_shape(
        lambda w, alpha, key: solver.init(
            problem.inner_loss, w, alpha, inner_data, key
        ),
        w,
        alpha,
        KEY_SHAPE,
    )
    if contains_state(carry, NON_DIFFERENTIABLE_STATES):
        raise _not_differentiable_error(solver)
    check_problem(problem, w, alpha, solver)


def check_run_uses_alpha(
    solver: InnerSolver, problem: Bilevel, w: PyTree, alpha: PyTree
) -> None:
    """Raises ValueError for a leaf of ``alpha`` that no part of a run uses.

    This is the check of estimators that need no derivative.
    """
    data = EstimateData.sample(problem, jax.random.key(0))
    run_fn = make_run_fn(solver, problem, data, w, data.outer_batch())
    check_alpha_is_used(lambda alpha: run_fn(alpha)[0], alpha)


def _not_differentiable_error(solver: Any) -> ValueError:
    return ValueError(
        f"solver must have differentiable iterations; got {solver}. Line searches and "
        "L-BFGS give NaN or wrong derivatives when unrolled. Use hg.Implicit with this "
        "solver, or hg.Descent with an optimizer without them."
    )
