"""A step of the outer loop.

The functions take a `hypergrad.OuterLoop`, which holds all that is constant in a run.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from .. import spaces
from ..estimators.base import Estimate, normalize_estimate
from ..keys_in_w import bind_keys, restore_keys
from ..metrics import metric_at_step
from ..problem import Bilevel, at_outer_step
from ..trace import (
    BAD_COST,
    BAD_HYPERGRADIENT,
    BAD_STEP,
    BAD_VALUE,
    NONFINITE_WEIGHTS,
    UNTRUSTED,
)
from ..trees import PrettyModule, all_finite, divide, power_of_two_scale, vdot
from .estimate import ADDITIVE_STATS, estimate_step, is_due

if TYPE_CHECKING:
    from .loop import OuterLoop

NEVER = -1  # a step number that no run reaches


class OuterState(PrettyModule):
    """Everything that changes during a run, and all that is needed to continue it.

    An estimate is good if neither it nor its cost fails a check. It stays good if only
    the step after it fails (BAD_STEP).

    Attributes:
      step: Number of outer steps made.
      status: 0, or the code of a numerical failure. A failed state stays failed: later
        steps change neither ``alpha`` nor ``w``.
      space: The space of ``alpha``, which says what ``u`` stands for.
      u: ``alpha`` in the unconstrained coordinates of the space.
      good_u: The ``u`` of the last good estimate.
      w: Inner solution of the last good estimate.
      best_value, best_alpha: The lowest score so far and its ``alpha``; the last good
        ones if values cannot be compared.
      aggregator_state, optimizer_state, estimator_state: States of these objects.
      key: PRNG key of the next step.
      pass_seed: Two words that determine shuffled passes over the batches of the run.
    """

    step: Array
    status: Array
    space: PyTree
    u: PyTree
    good_u: PyTree
    w: PyTree
    best_value: Array
    best_alpha: PyTree
    aggregator_state: PyTree
    optimizer_state: PyTree
    estimator_state: PyTree
    key: Array
    pass_seed: Array


class StepRecord(PrettyModule):
    """Record of one outer step; in a block each leaf has a leading axis of steps.

    Attributes:
      value: Outer value at the ``alpha`` of the step, before the step.
      stats, flags: Statistics and flags of the estimate.
      metrics: The user's metrics, NaN where not evaluated.
      alpha: The ``alpha`` of the step if ``record_alphas`` is set, else None.
    """

    value: Array
    stats: dict[str, Array]
    flags: dict[str, Array]
    metrics: dict[str, Array]
    alpha: PyTree


def compensated_sum(total: Array, error: Array, addend: Array) -> tuple[Array, Array]:
    """Returns the sum and its rounding error, which the next addition corrects.

    In float32 a plain sum of many small costs would drift (Kahan 1965).
    """
    addend = addend - error
    new_total = total + addend
    return new_total, (new_total - total) - addend


class Budget(eqx.Module):
    """Gradient-equivalents that a run may spend, and those that it has spent.

    Attributes:
      limit: The budget, infinite if there is none.
      total_cost: Cost of the steps made so far.
      error: Rounding error of ``total_cost``; see `compensated_sum`.
    """

    limit: Array
    total_cost: Array
    error: Array

    @classmethod
    def create(cls, limit: Array | float | None) -> "Budget":
        """Returns an unspent budget; None stands for no limit."""
        zero = jnp.zeros((), float)
        return cls(jnp.asarray(jnp.inf if limit is None else limit, float), zero, zero)

    @property
    def is_spent(self) -> Array:
        """True if no step may be made any more."""
        # Not `~(total_cost < limit)`, because a NaN must not end a run without limit.
        return self.total_cost >= self.limit

    def spend(self, cost: Array) -> "Budget":
        """Returns the budget after a step of this cost."""
        cost = cost.astype(self.total_cost.dtype)
        return Budget(self.limit, *compensated_sum(self.total_cost, self.error, cost))


@eqx.filter_jit
def init_state(loop: "OuterLoop", w: PyTree, alpha: PyTree, key: Array) -> OuterState:
    """Returns the state before the first step."""
    init_key, key = jax.random.split(key)
    pass_key = jax.random.fold_in(key, 3)  # each step splits its key in three
    pass_seed = jax.random.bits(pass_key, (2,), jnp.uint32)
    problem, parameters = bind_keys(loop.problem, w)
    u = spaces.inverse(loop.space, alpha)
    aggregator_state = None
    if loop.aggregator is not None:
        aggregator_state = loop.aggregator.init(loop.problem.num_objectives)
    # Scalars are weakly typed here, and take the dtype of what replaces them.
    state = OuterState(
        step=jnp.asarray(0),
        status=jnp.asarray(0),
        space=jax.tree.map(jnp.array, eqx.filter(loop.space, eqx.is_array)),
        u=u,
        good_u=u,
        w=w,
        best_value=jnp.asarray(jnp.inf),
        best_alpha=alpha,
        aggregator_state=aggregator_state,
        optimizer_state=loop.optimizer.init(u),
        estimator_state=loop.estimator.init(problem, parameters, alpha, init_key),
        key=key,
        pass_seed=pass_seed,
    )
    return _cast_to_next_state(loop, state)


def _cast_to_next_state(loop: "OuterLoop", state: OuterState) -> OuterState:
    """Casts the state to the types after a step, so that all blocks share a program."""
    next_state = jax.eval_shape(lambda state: step(loop, state)[0], state)

    def cast(leaf, like):
        if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
            return leaf
        return jax.lax.convert_element_type(leaf, like.dtype)  # drops weak types

    return jax.tree.map(cast, state, next_state)


def step(
    loop: "OuterLoop",
    state: OuterState,
    stop: Array | int = NEVER,
    budget: Budget | None = None,
    record_every: int = 1,
    unrecorded_cost: Array | float = 0.0,
) -> tuple[OuterState, StepRecord]:
    """Makes one outer step.

    Args:
      loop: The loop.
      state: The state before the step.
      stop: Value of ``state.step`` after the last step, which is always evaluated.
      budget: The budget before the step, which ends the run as well when it is spent.
      record_every: Number of steps from one record to the next.
      unrecorded_cost: Cost of the steps since the last record.

    Returns:
      The state after the step and its record. After a failure the state holds the last
      good ``alpha`` and ``w``, and ``status`` is the code of the failure.
    """
    key, estimate_key, metric_key = jax.random.split(state.key, 3)
    problem, alpha, pullback = _problem_and_alpha(loop, state)
    estimate, estimator_state = estimate_step(
        loop, problem, state, alpha, estimate_key, record_every
    )
    w = restore_keys(estimate.w, problem.keys_of_w)
    direction = _aggregate(loop.aggregator, estimate, pullback, state.aggregator_state)
    u, optimizer_state = _update(loop, state, direction)
    aggregator_state = direction.aggregator_state
    if loop.on_untrusted == "skip":
        u, optimizer_state, aggregator_state = optax.tree.where(
            ~estimate.stats["trusted"],
            (state.u, state.optimizer_state, state.aggregator_state),
            (u, optimizer_state, aggregator_state),
        )
    status = _get_status(loop, estimate, direction, u).astype(state.status.dtype)
    is_last = state.step + 1 == stop
    if budget is not None:
        cost = estimate.stats["gradient_equivalents"]
        is_last |= budget.spend(cost).is_spent
        # A budget that is never used up would make the run endless.
        is_endless = jnp.isfinite(budget.limit) & ~(cost + unrecorded_cost > 0)
        status = jnp.where(is_endless & (status == 0), BAD_COST, status)
    status = jnp.where(state.status > 0, state.status, status)
    should_evaluate = is_last | is_due(state.step, loop.eval_every, record_every)
    metrics = _evaluate_metrics(loop, state.step, should_evaluate, w, alpha, metric_key)
    record = StepRecord(
        value=estimate.value,
        stats=estimate.stats | direction.stats,
        flags=estimate.flags,
        metrics=metrics,
        alpha=alpha if loop.record_alphas else None,
    )
    failed = status > 0
    is_good, good_u = _last_good(state, status, alpha, record_every)
    # Where values cannot be compared, the last good alpha counts as the best one.
    is_better = (direction.score < state.best_value) | (not loop.has_comparable_values)
    is_better &= is_good
    # A failed run returns to the last alpha whose estimate was good. It ends there, so
    # the estimator's state, which only a next step would use, is not restored: a copy
    # of it at every step would cost more than a step of SABA.
    restored_u = optax.tree.where(status == BAD_STEP, good_u, state.good_u)
    next_state = dataclasses.replace(
        state,
        step=state.step + 1,
        status=status,
        u=optax.tree.where(failed, restored_u, u),
        good_u=optax.tree.where(failed, restored_u, state.u),
        w=optax.tree.where(is_good, w, state.w),
        best_value=jnp.where(is_better, direction.score, state.best_value),
        best_alpha=optax.tree.where(is_better, alpha, state.best_alpha),
        aggregator_state=aggregator_state,
        optimizer_state=optimizer_state,
        estimator_state=estimator_state,
        key=key,
    )
    return next_state, record


def _last_good(
    state: OuterState, status: Array, alpha: PyTree, record_every: int
) -> tuple[Array, PyTree]:
    """Returns whether the estimate at ``alpha`` was good, and the last good ``u``."""
    failed = status > 0
    # If only the new u is bad, the estimate was good, unless the run failed earlier.
    is_good = ~failed | ((status == BAD_STEP) & (state.status == 0))
    if record_every == 1:
        return is_good, state.u
    has_good_start = all_finite(state.u, alpha)  # the step to it was not checked
    is_good &= ~failed | has_good_start
    return is_good, optax.tree.where(has_good_start, state.u, state.good_u)


jitted_step = eqx.filter_jit(step)


@eqx.filter_jit
def jitted_alpha(loop: "OuterLoop", state: OuterState) -> PyTree:
    """Returns the ``alpha`` of a state."""
    return spaces.forward(loop.space, state.u)


def step_without_record(
    loop: "OuterLoop", state: OuterState
) -> tuple[OuterState, dict]:
    """Makes one outer step of which only the cost is recorded.

    Nothing is checked or compared here, and the compiled program computes no other
    statistic. A number that is not finite is noticed at the next recorded step if it
    has remained in ``alpha``, or if that step's estimate is not finite either.

    Returns:
      The state after the step, and the statistics that add up over steps.
    """
    key, estimate_key, _ = jax.random.split(state.key, 3)
    problem, alpha, pullback = _problem_and_alpha(loop, state)
    estimate, estimator_state = loop.estimator.estimate(
        problem, state.estimator_state, alpha, estimate_key
    )
    direction = _aggregate(loop.aggregator, estimate, pullback, state.aggregator_state)
    u, optimizer_state = _update(loop, state, direction)
    next_state = dataclasses.replace(
        state,
        step=state.step + 1,
        u=u,
        aggregator_state=direction.aggregator_state,
        optimizer_state=optimizer_state,
        estimator_state=estimator_state,
        key=key,
    )
    stats = normalize_estimate(estimate).stats
    return next_state, {name: stats[name] for name in ADDITIVE_STATS}


def _problem_and_alpha(
    loop: "OuterLoop", state: OuterState
) -> tuple[Bilevel, PyTree, Callable]:
    """Returns the problem of a step, its ``alpha``, and the pullback to ``u``."""
    alpha, pullback = jax.vjp(lambda u: spaces.forward(loop.space, u), state.u)
    problem, _ = bind_keys(loop.problem_at(state.step), state.w)
    return at_outer_step(problem, state.pass_seed, state.step), alpha, pullback


class _Direction(NamedTuple):
    """The direction of a step and what the aggregator computed with it.

    Attributes:
      gradient: Gradient by ``u``, ``sum_k weights[k] g_k`` for K outer losses.
      score: Scalar by which alphas are compared.
      weights: Weights of K outer losses, or None for a single one.
      has_bad_weights: Whether finite gradients led to weights that are not finite.
      aggregator_state: Next state of the aggregator.
    """

    gradient: PyTree
    score: Array
    weights: Array | None
    has_bad_weights: Array | bool
    aggregator_state: PyTree

    @property
    def stats(self) -> dict[str, Array]:
        """The weights as a statistic of the step, if there are several losses."""
        return {} if self.weights is None else {"objective_weights": self.weights}


def _aggregate(
    aggregator: Any, estimate: Estimate, pullback: Callable, state: PyTree
) -> _Direction:
    """Pulls hypergradients back to ``u`` and combines those of K outer losses."""
    # dM/du = (dalpha/du)' dM/dalpha
    if aggregator is None:
        (gradient,) = pullback(estimate.hypergradient)
        return _Direction(gradient, estimate.value, None, False, state)
    (gradients,) = jax.vmap(pullback)(estimate.hypergradient)
    scaled = divide(gradients, _gram_unit(gradients))
    row = lambda x: jax.vmap(lambda y: vdot(x, y))(scaled)
    gram = jax.vmap(row)(scaled)  # <g_k, g_l>, shape [K, K]
    weights, state = aggregator.compute_weights(estimate.value, gram, state)
    weighted_sum = lambda value: weights @ value
    score = getattr(aggregator, "score", weighted_sum)(estimate.value)
    combine = lambda g: jnp.tensordot(jnp.asarray(weights, g.dtype), g, 1)
    gradient = jax.tree.map(combine, gradients)
    weights = jnp.asarray(weights, float)
    has_bad_weights = all_finite(gradients) & ~all_finite(weights)
    score = score.astype(estimate.value.dtype)
    return _Direction(gradient, score, weights, has_bad_weights, state)


def _gram_unit(gradients: PyTree) -> Array:
    """Returns 1, or a power of two if squares of the gradients under- or overflow."""
    unit = power_of_two_scale(gradients)
    limits = jnp.finfo(unit.dtype)
    is_safe = (unit > float(limits.tiny) ** 0.25) & (unit < float(limits.max) ** 0.25)
    return jnp.where(is_safe, 1, unit)


def _update(
    loop: "OuterLoop", state: OuterState, direction: _Direction
) -> tuple[PyTree, PyTree]:
    """Returns ``u`` after a step of the optimizer, and the optimizer's next state."""
    # Optimizers such as Polyak's also need the outer value.
    optimizer = optax.with_extra_args_support(loop.optimizer)
    updates, optimizer_state = optimizer.update(
        direction.gradient, state.optimizer_state, state.u, value=direction.score
    )
    # The u of a Box is alpha itself, which is clipped to the bounds.
    u = spaces.project(loop.space, optax.apply_updates(state.u, updates))
    if loop.project is not None:  # there is no space, so that u is alpha
        u = loop.project(u)
    return u, optimizer_state


def _get_status(
    loop: "OuterLoop", estimate: Estimate, direction: _Direction, u: PyTree
) -> Array:
    """Returns the code of the first check that a step fails, or 0."""
    should_stop = loop.on_untrusted == "stop"
    # The first condition that holds counts: a NaN in the value spreads to the others.
    return jnp.select(
        [
            ~all_finite(estimate.value),
            direction.has_bad_weights,
            ~all_finite(direction.gradient),
            ~estimate.stats["trusted"] & should_stop,
            ~all_finite(u, spaces.forward(loop.space, u)),
        ],
        [BAD_VALUE, NONFINITE_WEIGHTS, BAD_HYPERGRADIENT, UNTRUSTED, BAD_STEP],
        0,
    )


def _evaluate_metrics(
    loop: "OuterLoop",
    step: Array,
    should_evaluate: Array,
    w: PyTree,
    alpha: PyTree,
    key: Array,
) -> dict[str, Array]:
    """Returns the metrics of a step, NaN if they are not evaluated."""

    def evaluate(metric):
        value = metric_at_step(metric, step)(w, alpha, key)
        return jnp.asarray(value, dtype=float)

    skip = lambda: jnp.asarray(jnp.nan, dtype=float)
    return {
        name: jax.lax.cond(
            should_evaluate, lambda metric=metric: evaluate(metric), skip
        )
        for name, metric in loop.metrics.items()
    }
