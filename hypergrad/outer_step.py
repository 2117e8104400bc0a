"""One step of the outer loop, and the compiled block of steps that `minimize` repeats.

The functions take an `hypergrad.OuterLoop`, which holds all that is constant in a run.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from . import spaces
from .certificate import compute_certificate
from .cost import COST_STATS
from .estimators.base import Estimate, get_target, normalize_estimate
from .problem import Bilevel, EstimateData
from .recording import metric_at_step
from .trace import (
    BAD_COST,
    BAD_HYPERGRADIENT,
    BAD_STEP,
    BAD_VALUE,
    NONFINITE_WEIGHTS,
    UNTRUSTED,
)
from .trees import PrettyModule, all_finite, vdot

if TYPE_CHECKING:
    from .minimize import OuterLoop

NEVER = -1  # a step number that no run reaches


class OuterState(PrettyModule):
    """Everything that changes during a run, and all that is needed to continue it.

    Attributes:
      step: Number of outer steps made.
      status: 0, or the code of a numerical failure, after which no step is made.
      u: ``alpha`` in the unconstrained coordinates of the space.
      good_u: Where the last good estimate was made.
      w: Inner solution of the last good estimate.
      best_value, best_alpha: The lowest value so far and its ``alpha``.
      aggregator_state, optimizer_state, estimator_state: States of the parts.
      key: PRNG key of the next step.
    """

    step: Array
    status: Array
    u: PyTree
    good_u: PyTree
    w: PyTree
    best_value: Array
    best_alpha: PyTree
    aggregator_state: PyTree
    optimizer_state: PyTree
    estimator_state: PyTree
    key: Array


class StepRecord(PrettyModule):
    """What one outer step reports; in a block each leaf has a leading axis of steps.

    Attributes:
      value: Outer value at the ``alpha`` of the step, before the step.
      stats, flags: Those of the estimate.
      metrics: The user's metrics, NaN where not evaluated.
      alpha: The ``alpha`` of the step if ``record_alphas`` is set, else None.
    """

    value: Array
    stats: dict[str, Array]
    flags: dict[str, Array]
    metrics: dict[str, Array]
    alpha: PyTree


@eqx.filter_jit
def init_state(loop: "OuterLoop", w: PyTree, alpha: PyTree, key: Array) -> OuterState:
    """Returns the state before the first step."""
    init_key, key = jax.random.split(key)
    u = spaces.inverse(loop.space, alpha)
    estimator_state = loop.estimator.init(loop.problem, w, alpha, init_key)
    aggregator_state = None
    if loop.aggregator is not None:
        aggregator_state = loop.aggregator.init(loop.problem.num_objectives)
    estimate = lambda: loop.estimator.estimate(
        loop.problem, estimator_state, alpha, key
    )
    value = jax.eval_shape(lambda: jnp.asarray(estimate()[0].value))
    state = OuterState(
        step=jnp.asarray(0),
        status=jnp.asarray(0),
        u=u,
        good_u=u,
        w=w,
        best_value=jnp.asarray(jnp.inf, value.dtype),
        best_alpha=alpha,
        aggregator_state=aggregator_state,
        optimizer_state=loop.optimizer.init(u),
        estimator_state=estimator_state,
        key=key,
    )
    return _with_types_of_next_state(loop, state)


def _with_types_of_next_state(loop: "OuterLoop", state: OuterState) -> OuterState:
    """Casts the state to the types after a step, so that all blocks share a program."""
    next_state = jax.eval_shape(lambda state: step(loop, state)[0], state)

    def cast(leaf, like):
        if not eqx.is_array(leaf) or jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
            return leaf
        return jax.lax.convert_element_type(leaf, like.dtype)  # drops weak types

    return jax.tree.map(cast, state, next_state)


def step(
    loop: "OuterLoop",
    state: OuterState,
    stop: Array | int = NEVER,
    budget: Array | float = jnp.inf,
) -> tuple[OuterState, StepRecord]:
    """Makes one outer step.

    Args:
      loop: The loop.
      state: The state before the step.
      stop: Number of the step at which the run ends; its last step is always evaluated.
      budget: Gradient-equivalents left, after which the run ends as well.

    Returns:
      The state after the step and its record. After a failure the state holds the last
      good ``alpha`` and ``w``, and ``status`` says what failed.
    """
    key, estimate_key, metric_key = jax.random.split(state.key, 3)
    to_alpha = lambda u: spaces.forward(loop.space, u)
    alpha, pullback = jax.vjp(to_alpha, state.u)
    problem = loop.problem_at(state.step)
    estimate, estimator_state = _estimate(loop, problem, state, alpha, estimate_key)
    gradient, score, weights, has_bad_weights, aggregator_state = _aggregate(
        loop.aggregator, estimate, pullback, state.aggregator_state
    )
    optimizer = optax.with_extra_args_support(loop.optimizer)
    updates, optimizer_state = optimizer.update(
        gradient, state.optimizer_state, state.u, value=score
    )
    u = spaces.project(loop.space, optax.apply_updates(state.u, updates))
    if loop.project is not None:
        u = loop.project(u)

    is_untrusted = ~estimate.stats["trusted"]
    status = jnp.select(
        [
            ~all_finite(estimate.value),
            has_bad_weights,
            ~all_finite(gradient),
            is_untrusted & (loop.on_untrusted == "stop"),
            ~all_finite(u),
        ],
        [BAD_VALUE, NONFINITE_WEIGHTS, BAD_HYPERGRADIENT, UNTRUSTED, BAD_STEP],
        0,
    ).astype(state.status.dtype)
    if loop.on_untrusted == "skip":
        u, optimizer_state, aggregator_state = optax.tree.where(
            is_untrusted,
            (state.u, state.optimizer_state, state.aggregator_state),
            (u, optimizer_state, aggregator_state),
        )
    stats = estimate.stats
    if weights is not None:
        stats = stats | {"objective_weights": weights}
    cost = stats["gradient_equivalents"]
    # A budget that is never used up would make the run endless.
    has_budget = jnp.isfinite(budget)
    status = jnp.where(has_budget & ~(cost > 0) & (status == 0), BAD_COST, status)
    is_last = (state.step + 1 == stop) | (cost >= budget)
    record = StepRecord(
        value=estimate.value,
        stats=stats,
        flags=estimate.flags,
        metrics=_evaluate_metrics(
            loop, state.step, is_last, estimate.w, alpha, metric_key
        ),
        alpha=alpha if loop.record_alphas else None,
    )

    failed = status > 0
    is_better = (score < state.best_value) | (not loop.has_comparable_values)
    # A failed run returns to the last alpha whose estimate was good. It ends there, so
    # the estimator's state, which only a next step would use, is not restored: a copy
    # of it at every step would cost more than a step of SABA.
    restored_u = jax.tree.map(
        lambda u, good: jnp.where(status == BAD_STEP, u, good), state.u, state.good_u
    )
    select = lambda new, old: jax.tree.map(
        lambda x, y: jnp.where(failed, y, x), new, old
    )
    next_state = OuterState(
        step=state.step + 1,
        status=status,
        u=select(u, restored_u),
        good_u=state.u,
        w=select(estimate.w, state.w),
        best_value=jnp.where(is_better & ~failed, score, state.best_value),
        best_alpha=optax.tree.where(is_better & ~failed, alpha, state.best_alpha),
        aggregator_state=aggregator_state,
        optimizer_state=optimizer_state,
        estimator_state=estimator_state,
        key=key,
    )
    return next_state, record


jitted_step = eqx.filter_jit(step)


@eqx.filter_jit
def jitted_alpha(loop: "OuterLoop", state: OuterState) -> PyTree:
    """Returns the ``alpha`` of a state."""
    return spaces.forward(loop.space, state.u)


def _estimate(
    loop: "OuterLoop", problem: Bilevel, state: OuterState, alpha: PyTree, key: Array
) -> tuple[Estimate, PyTree]:
    """Returns the estimate of a step, certified if due and refined if not trusted."""

    def finish(estimate: Estimate) -> Estimate:
        estimate = normalize_estimate(estimate)
        if loop.certify_every is None:
            return estimate
        should_certify = state.step % loop.certify_every == 0
        return _attach_certificate(loop, problem, should_certify, estimate, alpha, key)

    estimate, estimator_state = loop.estimator.estimate(
        problem, state.estimator_state, alpha, key
    )
    estimate = finish(estimate)
    if loop.on_untrusted != "refine":
        return estimate, estimator_state

    estimator: Any = loop.estimator  # one with the optional method `refine`

    def refine():
        refined, refined_state = estimator.refine(problem, estimator_state, alpha, key)
        refined = finish(refined)
        counts = {
            name: estimate.stats[name] + refined.stats[name]
            for name in (*COST_STATS, "num_inner_steps")
        }
        stats = refined.stats | counts | {"refined": jnp.asarray(True)}
        return _replace(refined, stats, refined.flags), refined_state

    def keep():
        stats = estimate.stats | {"refined": jnp.asarray(False)}
        return _replace(estimate, stats, estimate.flags), estimator_state

    # The branches of a conditional must return the same flags.
    names = {*estimate.flags, *jax.eval_shape(refine)[0].flags}

    def with_all_flags(branch):
        estimate, state = branch()
        flags = {name: estimate.flags.get(name, jnp.asarray(False)) for name in names}
        return _replace(estimate, estimate.stats, flags), state

    return jax.lax.cond(
        estimate.stats["trusted"],
        lambda: with_all_flags(keep),
        lambda: with_all_flags(refine),
    )


def _attach_certificate(
    loop: "OuterLoop",
    problem: Bilevel,
    should_certify: Array,
    estimate: Estimate,
    alpha: PyTree,
    key: Array,
) -> Estimate:
    """Returns the estimate with a certificate in its statistics if one is due."""
    passed = {name: jnp.asarray(False) for name in (*estimate.flags, "certificate")}

    def certify():
        data = EstimateData.sample(problem, key)  # the data that the estimate saw
        certificate = compute_certificate(
            problem, data, estimate.w, alpha, estimate.hypergradient
        )
        stats = estimate.stats | {
            name: estimate.stats[name] + cost
            for name, cost in certificate.stats.items()
        }
        if get_target(loop.estimator) != "argmin":
            stats["distance_to_implicit"] = certificate.error_estimate
            return stats, passed | estimate.flags
        stats["error_estimate"] = certificate.error_estimate
        stats["trusted"] = certificate.trusted
        return stats, passed | {"certificate": ~certificate.trusted}

    keep = lambda: (estimate.stats, passed | estimate.flags)
    return _replace(estimate, *jax.lax.cond(should_certify, certify, keep))


def _replace(
    estimate: Estimate, stats: dict[str, Array], flags: dict[str, Array]
) -> Estimate:
    return Estimate(estimate.value, estimate.hypergradient, estimate.w, stats, flags)


def _aggregate(
    aggregator: Any, estimate: Estimate, pullback: Callable, state: PyTree
) -> tuple[PyTree, Array, Array | None, Array | bool, PyTree]:
    """Combines the hypergradients of K outer losses into ``sum_k weights[k] g_k``.

    Returns:
      The gradient by ``u``, a score by which alphas are compared, the weights (None for
      a single outer loss), whether finite gradients led to weights that are not
      finite, and the next state of the aggregator.
    """
    if aggregator is None:
        (gradient,) = pullback(estimate.hypergradient)
        return gradient, estimate.value, None, False, state
    (gradients,) = jax.vmap(pullback)(estimate.hypergradient)
    row = lambda x: jax.vmap(lambda y: vdot(x, y))(gradients)
    gram = jax.vmap(row)(gradients)  # <g_k, g_l>, shape [K, K]
    weights, state = aggregator.compute_weights(estimate.value, gram, state)
    weighted_sum = lambda value: weights @ value
    score = getattr(aggregator, "score", weighted_sum)(estimate.value)
    combine = lambda g: jnp.tensordot(jnp.asarray(weights, g.dtype), g, 1)
    gradient = jax.tree.map(combine, gradients)
    weights = jnp.asarray(weights, float)
    has_bad_weights = all_finite(gradients) & ~all_finite(weights)
    return gradient, score.astype(estimate.value.dtype), weights, has_bad_weights, state


def _evaluate_metrics(
    loop: "OuterLoop",
    step: Array,
    is_last: Array,
    w: PyTree,
    alpha: PyTree,
    key: Array,
) -> dict[str, Array]:
    """Returns the metrics of a step, NaN if it is not due."""
    should_evaluate = (step % loop.eval_every == 0) | is_last

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


# Blocks of steps.


@eqx.filter_jit
def run_block(
    loop: "OuterLoop",
    state: OuterState,
    num_steps: Array,
    stop: Array,
    budget: Array,
    block_size: int,
) -> tuple[OuterState, StepRecord, Array, Array]:
    """Makes up to ``num_steps`` steps; only ``block_size`` is static.

    Args:
      loop: The loop.
      state: The state before the block.
      num_steps: Number of steps to make, at most ``block_size``.
      stop, budget: As in `step`.
      block_size: Number of rows of the records.

    Returns:
      The state after the block, the records with a leading axis of size ``block_size``,
      the number of steps made, and their cost. Rows of steps that were not made are
      blank. No step is made after a failure or once the budget is spent.
    """
    rows = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (block_size, *x.shape)),
        blank_record(loop, state),
    )
    zero_cost = jnp.zeros_like(jnp.asarray(budget))

    def should_step(carry):
        state, _, num_made, spent = carry
        return (num_made < num_steps) & (state.status == 0) & (spent < budget)

    def make_step(carry):
        state, rows, num_made, spent = carry
        state, record = step(loop, state, stop, budget - spent)
        rows = jax.tree.map(lambda column, x: column.at[num_made].set(x), rows, record)
        cost = record.stats["gradient_equivalents"].astype(spent.dtype)
        return state, rows, num_made + 1, spent + cost

    init_carry = (state, rows, jnp.asarray(0), zero_cost)
    return jax.lax.while_loop(should_step, make_step, init_carry)


def blank_record(loop: "OuterLoop", state: OuterState) -> StepRecord:
    """Returns the record of a step that was not made: NaN, at no cost."""
    record = jax.eval_shape(lambda state: step(loop, state)[1], state)

    def blank(path, x):
        is_cost = path and getattr(path[-1], "key", None) in COST_STATS
        fill = 0 if is_cost or not jnp.issubdtype(x.dtype, jnp.floating) else jnp.nan
        return jnp.full(x.shape, fill, x.dtype)

    return jax.tree.map_with_path(blank, record)
