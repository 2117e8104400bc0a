"""The base class of single-loop methods, which never solve the inner problem."""

import abc
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ...batches import batch_fraction, is_keyed, sample_in_pass
from ...certificate import NO_GRADIENT_ADVICE
from ...checks.problem import check_alpha_has_gradient, check_problem
from ...cost import cost_stats
from ...inner.descent import LINE_SEARCH_STATES, contains_state
from ...problem import Bilevel, EstimateData
from ...runtime.equal_optimizers import first_equal
from ...trees import cast_like, norm, norm_ratio
from ...validation import check_optimizer, raise_with_context
from ..base import Estimate, make_estimate


class SingleLoopState(eqx.Module):
    """State of a single-loop method between two outer steps.

    Attributes:
      w: Inner variable.
      w_opt_state: State of the optimizer of ``w``.
      v: Adjoint, structured like ``w``; None for a method without an adjoint.
      v_opt_state: State of the optimizer of ``v``, or None.
      memory: Further state of the method, from `SingleLoop.init_memory`.
      num_steps: Number of outer steps made, which `SingleLoop.estimate` counts.
    """

    w: PyTree
    w_opt_state: PyTree
    v: PyTree = None
    v_opt_state: PyTree = None
    memory: Any = None
    num_steps: Any = eqx.field(default_factory=lambda: jnp.asarray(0))


class Step(eqx.Module):
    """Result of one step of a single-loop method, without the next state.

    Attributes:
      value: Outer value; a scalar.
      direction: Estimate of the hypergradient, structured like ``alpha``.
      w: Inner variable at which ``value`` and ``direction`` were evaluated.
      inner_grad: ``dL/dw`` before the first step of ``w``, or an estimate of it; its
        norm is reported as ``inner_grad_norm``.
      counts: Cost of the step in passes over the data, as keyword arguments of
        `hypergrad.cost.cost_stats`, such as ``{"num_hvps": 0.1}``.
      residual: ``H v - b`` of a method with an adjoint, before its first step of ``v``;
        its relative norm is reported as ``adjoint_residual``.
      b: ``dM/dw``, to which ``residual`` is relative.
      num_inner_steps: Number of steps of ``w``.
      standard_error: Relative standard error of a direction that is a mean of samples.
      flags: Further reasons not to trust the direction, as in `Estimate.flags`.
    """

    value: Array
    direction: PyTree
    w: PyTree
    inner_grad: PyTree
    counts: dict[str, Any]
    residual: PyTree = None
    b: PyTree = None
    num_inner_steps: Array | int = 1
    standard_error: Array | float = jnp.nan
    flags: dict[str, Array] = eqx.field(default_factory=dict)


class SingleLoop(eqx.Module):
    """Base class of estimators that move ``w`` and ``alpha`` in the same loop.

    A subclass writes the mathematics of one step in `step`, and `init_memory` if it
    carries more than ``w`` and an adjoint ``v``. The class provides the rest of an
    `Estimator`: the checks and the first state (`init`), the data of a step and its
    statistics (`estimate`), and steps of ``w`` and ``v`` along given directions
    (`move_w`, `move_v`). Estimates are never `trusted`, because one step does not solve
    the inner problem; ``certify_every`` of `hypergrad.OuterLoop` checks them.
    `hypergrad.hypergradient` refuses these methods with a TypeError, because a single
    step from a start says nothing; use `minimize`.

    The statistic ``inner_grad_norm`` is the norm of ``Step.inner_grad``. No gradient is
    evaluated for it alone: `AmIGO`, `F2SA`, `PZOBO`, `StocBiO` and `TTSA` report the
    norm of ``dL/dw`` before the first inner step of an outer step, on its batch,
    `DARTS` and `FSLA` the norm before their step of ``w``, and `SOBA` and `BOME` the
    norm at the ``w`` of the estimate, on a batch. `MRBO`, `SABA`, `SRBA`, `SUSTAIN` and
    `VRBO` report the norm of the estimate of ``dL/dw`` along which they move ``w``.
    More inner steps in the same outer step do not change a norm before them, but over
    the outer steps it shows whether ``w`` keeps up with ``alpha``. The
    ``adjoint_residual`` is likewise that before the steps of ``v``.

    A subclass may add fields after ``optimizer``. A field ``adjoint_optimizer`` moves
    ``v``; without one, or if it is None, ``optimizer`` moves both.

    Args:
      optimizer: Optax transformation that moves ``w``. It must need the gradient alone,
        and not the loss, because the method does not evaluate the inner loss.

    Attributes:
      uses_adjoint: Whether the state has an adjoint ``v``. Defaults to False.
      fixed_data_reason: Reason why the method needs the same examples at every step;
        it ends the error message of `init` and should name an alternative. Defaults to
        None, which admits keyed batches and a ``data_fn``.
      adds_differences: Whether a step adds a difference at its data to a direction of
        earlier data, so that no ``outer_data_fn`` may change them. Defaults to False.

    A complete method, which is `hypergrad.SOBA`:

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> from hypergrad.estimators.single_loop import (
    ...     SingleLoop, Step, batch_fractions, sample_batches
    ... )
    >>> from hypergrad.products import hvp_and_cross_vjp
    >>> class MySOBA(SingleLoop):
    ...     uses_adjoint = True
    ...
    ...     def step(self, problem, state, alpha, data):
    ...         w, v = state.w, state.v
    ...         batch, outer_batch = sample_batches(data)
    ...         inner_grad, Hv, cross = hvp_and_cross_vjp(
    ...             problem.inner_loss, w, alpha, batch, v
    ...         )
    ...         value, b, direct = problem.outer_value_and_grads(w, alpha, outer_batch)
    ...         residual = optax.tree.sub(Hv, b)
    ...         direction = optax.tree.sub(direct, cross)
    ...         inner, outer = batch_fractions(data)
    ...         counts = {"num_hvps": inner, "num_outer_grads": outer}
    ...         step = Step(value, direction, w, inner_grad, counts, residual, b)
    ...         return step, self.move_v(self.move_w(state, inner_grad), residual)
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1.0) ** 2)
    >>> trace = hg.minimize(
    ...     hg.Bilevel(inner, outer), MySOBA(optax.sgd(0.5)), optax.sgd(0.2),
    ...     0.0, 3.0, num_steps=100,
    ... )
    >>> round(float(trace.alpha), 3)
    1.0
    """

    optimizer: optax.GradientTransformation = eqx.field(
        static=True, converter=first_equal
    )

    target: ClassVar[str] = "argmin"
    is_single_loop: ClassVar[bool] = True
    uses_adjoint: ClassVar[bool] = False
    fixed_data_reason: ClassVar[str | None] = None
    adds_differences: ClassVar[bool] = False

    @abc.abstractmethod
    def step(
        self,
        problem: Bilevel,
        state: SingleLoopState,
        alpha: PyTree,
        data: EstimateData,
    ) -> tuple[Step, SingleLoopState]:
        """Makes one step at the given ``alpha``, which `minimize` moves afterwards.

        Args:
          problem: The bilevel problem.
          state: State before the step.
          alpha: Outer variable.
          data: Data of the step and its keys. All randomness of a step comes from
            ``data.solver_key``, ``data.inner_key`` and ``data.outer_key``, and for data
            in shuffled passes from its position (`sample_in_pass`).

        Returns:
          The quantities of the step and the state after it; pure, usable inside
          ``jit``, ``vmap`` and ``scan``.
        """

    def init_memory(
        self, problem: Bilevel, state: SingleLoopState, alpha: PyTree
    ) -> Any:
        """Returns the first ``memory``, a pytree of arrays. Defaults to None.

        A step replaces it by ``dataclasses.replace(state, memory=...)``.
        """
        return None

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """Returns the relative error of the adjoint after many steps at one ``alpha``.

        The error of a method with an adjoint is 0, because the adjoint has converged on
        full batches at suitable rates.
        For any other method it is NaN, because no bound is known; methods with a
        known bound override this method.
        """
        return 0.0 if self.uses_adjoint else float("nan")

    def __check_init__(self):
        check_optimizer("optimizer", self.optimizer)
        check_optimizer("adjoint_optimizer", self.v_optimizer)

    @property
    def v_optimizer(self) -> optax.GradientTransformation:
        """The optimizer of ``v``: ``adjoint_optimizer`` if there is one."""
        adjoint_optimizer = getattr(self, "adjoint_optimizer", None)
        return self.optimizer if adjoint_optimizer is None else adjoint_optimizer

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> SingleLoopState:
        """Returns the first state: the inner starting point and a zero adjoint.

        Raises:
          TypeError: An optimizer needs more than the gradient, such as the loss.
          ValueError: The problem has several outer losses, samples data anew for a
            method that needs fixed data, or has a leaf of ``alpha`` that no loss uses,
            or an optimizer has a line search.
        """
        del key
        name = type(self).__name__
        _check_fixed_data(problem, self.fixed_data_reason)
        if problem.num_objectives is not None:
            raise ValueError(
                f"outer_loss must be a single function: {name} takes one outer loss; "
                f"got a tuple of {problem.num_objectives}. Pass one function, such as "
                "their weighted sum."
            )
        check_problem(problem, w, alpha)
        # A leaf of alpha that no loss uses would get a zero, not its derivative.
        check_alpha_has_gradient(problem, w, alpha, None, NO_GRADIENT_ADVICE)
        w = problem.init_inner(w, alpha)
        _check_update("optimizer", self.optimizer, w)
        if self.v_optimizer is not self.optimizer:
            _check_update("adjoint_optimizer", self.v_optimizer, w)
        state = SingleLoopState(w, self.optimizer.init(w))
        if self.uses_adjoint:
            v = optax.tree.zeros_like(w)
            state = replace(state, v=v, v_opt_state=self.v_optimizer.init(v))
        return replace(state, memory=self.init_memory(problem, state, alpha))

    def estimate(
        self, problem: Bilevel, state: SingleLoopState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, SingleLoopState]:
        """Samples the data of a step, makes the step and returns it as an estimate."""
        data = EstimateData.sample(problem, key)
        step, new_state = self.step(problem, state, alpha, data)
        new_state = replace(new_state, num_steps=state.num_steps + 1)
        stats = cost_stats(data.inner_data, data.outer_data, **step.counts)
        if step.residual is not None:
            # Where M does not depend on w, b = 0 and the adjoint v = 0 is exact.
            stats["adjoint_residual"] = norm_ratio(step.residual, step.b)
        estimate = make_estimate(
            step.value,
            step.direction,
            step.w,
            {"single_step": True, **step.flags},  # never trusted
            inner_grad_norm=norm(step.inner_grad),
            num_inner_steps=step.num_inner_steps,
            standard_error=step.standard_error,
            **stats,
        )
        return estimate, new_state

    def move_w(self, state: SingleLoopState, direction: PyTree) -> SingleLoopState:
        """Returns the state after one optimizer step of ``w`` against ``direction``."""
        w, opt_state = apply_optimizer(
            self.optimizer, direction, state.w_opt_state, state.w
        )
        return replace(state, w=w, w_opt_state=opt_state)

    def move_v(self, state: SingleLoopState, direction: PyTree) -> SingleLoopState:
        """Returns the state after one optimizer step of ``v`` against ``direction``."""
        v, opt_state = apply_optimizer(
            self.v_optimizer, direction, state.v_opt_state, state.v
        )
        return replace(state, v=v, v_opt_state=opt_state)


def apply_optimizer(
    optimizer: optax.GradientTransformation,
    direction: PyTree,
    opt_state: PyTree,
    x: PyTree,
) -> tuple[PyTree, PyTree]:
    """Returns ``x`` after one step against ``direction`` and the optimizer state."""
    updates, new_state = optimizer.update(direction, opt_state, x)
    # A hyperparameter of a wider dtype than x widens the state that it mixes.
    return optax.apply_updates(x, updates), cast_like(new_state, opt_state)


def sample_batches(data: EstimateData) -> tuple[PyTree, PyTree]:
    """Returns one batch of the inner loss and one of the outer loss."""
    inner_batch = sample_in_pass(data.inner_data, data.inner_key)
    return inner_batch, sample_in_pass(data.outer_data, data.outer_key)


def batch_fractions(data: EstimateData) -> tuple[float, float]:
    """Returns the sizes of an inner and an outer batch as fractions of their data."""
    return batch_fraction(data.inner_data), batch_fraction(data.outer_data)


def value_at_step(value_or_schedule: Array | float | Callable, step: Array) -> Array:
    """Returns a number, or the value of a schedule at a step."""
    value = (
        value_or_schedule(step) if callable(value_or_schedule) else value_or_schedule
    )
    return jnp.asarray(value, dtype=float)


def _check_update(
    name: str, optimizer: optax.GradientTransformation, w: PyTree
) -> None:
    """Raises an error unless an optimizer needs no more than the gradient."""
    state = jax.eval_shape(optimizer.init, w)
    remedy = "Use e.g. optax.sgd(0.1) or optax.adam(0.1)."
    if contains_state(state, LINE_SEARCH_STATES):
        raise ValueError(
            f"{name} must not use a line search, because a single-loop method does not "
            f"evaluate the inner loss. {remedy}"
        )
    try:
        jax.eval_shape(optimizer.update, w, state, w)
    except Exception as error:
        raise_with_context(
            error,
            f"{name} must need the gradient alone, because a single-loop method does "
            f"not evaluate the inner loss. {remedy}",
        )


def _check_fixed_data(problem: Bilevel, reason: str | None) -> None:
    """Raises ValueError for data that is sampled anew, if a reason forbids it."""
    if reason is None:
        return
    for name in ("inner_data", "outer_data"):
        if is_keyed(getattr(problem, name)):
            raise ValueError(
                f"{name} must hold the same examples at every step; got batches "
                f"with_key=True. {reason}"
            )
    if problem.data_fn is not None:
        raise ValueError(
            "data_fn must be None, because the method needs the same examples at every "
            f"step; got {problem.data_fn!r}. {reason}"
        )
