"""Checks of a problem by its shapes and jaxprs, made before anything is compiled."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from ..batches import full_batch, is_keyed, sample_batch
from ..display.tables import describe_leaves
from ..jaxprs.inspection import (
    alpha_has_gradient,
    constant_outputs,
    leaf_names,
    unused_leaves,
    used_inputs,
)
from ..jaxprs.lost_derivatives import find_lost_derivatives
from ..problem import Bilevel
from ..products import Loss
from ..runtime.user_warnings import warn_user
from ..trees import is_key
from ..validation import (
    KEY_SHAPE,
    check_same_structure,
    check_solver,
    raise_with_context,
)
from .lost_derivatives import describe_places, losses_with_batches

SOLVER_STATS = {"num_steps", "num_grads", "num_hvps", "num_values"}


def check_problem_type(problem: Any) -> None:
    """Raises TypeError unless the object is a `Bilevel`."""
    if not isinstance(problem, Bilevel):
        raise TypeError(
            "problem must be hg.Bilevel(inner_loss, outer_loss, inner_data, "
            f"outer_data); got {type(problem).__name__}."
        )


def check_problem(problem: Bilevel, w: PyTree, alpha: PyTree, *solvers: Any) -> None:
    """Checks that losses return scalars and that solvers keep the structure of ``w``.

    Args:
      problem: The problem.
      w, alpha: Inner and outer variables as given to an estimator; only their shapes
        are used.
      solvers: The inner solver, if there is one.
    """
    key = jax.random.key(0)
    inner_data, outer_data = problem.sample_data(key)
    # A lambda, because JAX compares bound methods by value, data included.
    init = jax.eval_shape(lambda w, alpha: problem.init_inner(w, alpha), w, alpha)
    check_same_structure("init_fn", init, w)
    inner_batch = jax.eval_shape(lambda: sample_batch(inner_data, key))
    outer_batch = jax.eval_shape(lambda: full_batch(outer_data, key))
    check_scalar_loss("inner_loss", problem.inner_loss, w, alpha, inner_batch)
    for loss in problem.outer_losses:
        check_scalar_loss("outer_loss", loss, w, alpha, outer_batch)
    outer_value = lambda w, alpha, batch: problem.outer_value(w, alpha, batch)
    if problem.init_fn is None and len(jax.tree.leaves(w)) > 1:
        in_inner = used_inputs(problem.inner_loss, w, alpha, inner_batch)
        in_outer = used_inputs(outer_value, w, alpha, outer_batch)
        _warn_of_untrained_leaves(w, in_inner, in_outer)
    if is_keyed(inner_data):
        _warn_of_unread_key("inner_loss", problem.inner_loss, w, alpha, inner_batch)
    if is_keyed(outer_data):
        _warn_of_unread_key("outer_loss", outer_value, w, alpha, outer_batch)
    for solver in solvers:
        _check_solve(problem, init, w, alpha, solver, inner_data, key)


def check_scalar_loss(
    name: str, loss: Any, w: PyTree, alpha: PyTree, batch: PyTree
) -> None:
    """Raises ValueError or TypeError unless a loss returns one float."""
    try:
        out = jax.eval_shape(loss, w, alpha, batch)
    except Exception as error:
        args = {"w": w, "alpha": alpha, "batch": batch}
        shapes = ", ".join(describe_leaves(*item) for item in args.items())
        if isinstance(error, KeyError):
            raise ValueError(
                f"{name} reads the key {error}, which its arguments lack: {shapes}."
            ) from error
        context = (
            f"It was raised in {name}(w, alpha, batch) on {shapes}, which must fit "
            "each other."
        )
        if remedy := _remedy_of_misfit(error, w, alpha, batch):
            context += f" {remedy}."
        raise_with_context(error, context)
    if not (hasattr(out, "shape") and out.shape == ()):
        shape = jax.tree.map(lambda x: tuple(x.shape), out)
        remedy = "Take a mean or a sum"
        if out is None:
            remedy = "Its return statement is missing"
        elif not hasattr(out, "shape"):
            remedy = "Return the loss alone; further outputs are metrics of a run"
        elif name == "outer_loss":
            remedy += ", or pass a tuple of functions for several outer losses"
        raise ValueError(f"{name} must return a scalar; got shape {shape}. {remedy}.")
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(
            f"{name} must return a float; got {out.dtype}, which has no derivative. "
            "Use a smooth surrogate for an accuracy that is counted with ==."
        )


def _remedy_of_misfit(error: Exception, w: PyTree, alpha: PyTree, batch: PyTree) -> str:
    """Returns the likely remedy for an error of a loss, or an empty text."""
    is_scalar = lambda x: getattr(x, "shape", None) == ()
    for name, tree in (("w", w), ("alpha", alpha)):
        if isinstance(tree, list | tuple) and tree and all(map(is_scalar, tree)):
            kind = type(tree).__name__
            return f"{name} is a {kind} of scalars; for an array pass jnp.array(...)"
    if batch is None:
        return "No data was given; hg.Bilevel takes it after the losses"
    if isinstance(batch, tuple) and len(batch) == 2 and is_key(batch[1]):
        return "A batch is the pair (examples, key)"
    if "'key<" in str(error):
        return (
            "Leave the keys of w out of sums over its leaves, as "
            "nnx.filter_state(state, nnx.Param) does"
        )
    if "PRNG key data" in str(error):
        return "Batches bring keys only with hg.Batches(..., with_key=True)"
    if "values to unpack" in str(error):
        return (
            "If the loss expects a pair (examples, key), batches bring keys with "
            "hg.Batches(..., with_key=True)"
        )
    if "different trace level" in str(error):  # flax nnx
        return "Merge the model with nnx.merge(..., copy=True)"
    return ""


def _warn_of_untrained_leaves(
    w: PyTree, in_inner: Sequence[bool], in_outer: Sequence[bool]
) -> None:
    """Issues a warning for leaves of ``w`` that only the outer loss reads.

    The leaves of ``w`` are the first ones of both lists.
    """
    pairs = list(zip(in_inner, in_outer, strict=False))[: len(jax.tree.leaves(w))]
    if names := leaf_names("w", w, [outer and not inner for inner, outer in pairs]):
        warn_user(
            f"inner_loss does not depend on {names}, which outer_loss "
            "reads. Nothing trains such a leaf, and the inner Hessian is singular. "
            "Take it out of w, and close over it in the losses."
        )


def _warn_of_unread_key(
    name: str, loss: Loss, w: PyTree, alpha: PyTree, batch: PyTree
) -> None:
    """Issues a warning if a loss does not use the key, the last leaf of its batch."""
    if not used_inputs(loss, w, alpha, batch)[-1]:
        warn_user(
            f"{name} never reads the key of its batches, so that a dropout in it has "
            "the same mask in every step. Give it the key (with flax nnx: "
            "nnx.reseed(model, default=key)), or leave out with_key=True."
        )


def _check_solve(problem, init, w, alpha, solver, inner_data, key) -> None:
    check_solver(solver)
    solve = lambda w, alpha, data: solver.solve(problem.inner_loss, w, alpha, data, key)
    name = f"{type(solver).__name__}.solve"
    result = eqx.filter_eval_shape(solve, init, alpha, inner_data)
    remedy = (
        "Make the statistics with hypergrad.inner.inner_stats(num_steps, num_grads, "
        "num_hvps, num_values)."
    )
    if not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(
            f"{name} must return the pair (w, stats); got {result}. {remedy}"
        )
    new_w, stats = result
    check_same_structure(name, new_w, w)
    if not isinstance(stats, dict):
        raise TypeError(
            f"{name} must return a dictionary of statistics as the second output; got "
            f"{type(stats).__name__}. {remedy}"
        )
    if missing := SOLVER_STATS - set(stats):
        raise ValueError(
            f"{name} must report the statistics {sorted(SOLVER_STATS)}; "
            f"{sorted(missing)} are missing. {remedy}"
        )


def check_sample_is_known(problem: Bilevel, key: Array | None) -> None:
    """Raises ValueError if an estimate does not say which sample it saw."""
    if key is None and problem.is_sampled:
        raise ValueError(
            "hypergradient must be an estimate of one sample of the data, whose key it "
            "has; that of an average has none. Use certify=True of the averaged "
            "hg.Implicit, or pass hypergradient=estimate.hypergradient and a key."
        )


# Hyperparameters on which a result cannot depend.


def check_alpha_has_gradient(
    problem: Bilevel,
    w: PyTree,
    alpha: PyTree,
    has_other_gradient: Sequence[bool] | None,
    advice: str,
) -> None:
    """Raises ValueError for a leaf of ``alpha`` that no derivative can reach.

    The hypergradient by such a leaf is unknown to the estimator; it is not zero.

    Args:
      problem: The problem.
      w, alpha: Inner and outer variables; only their shapes are used.
      has_other_gradient: For each leaf of ``alpha``, whether the estimator
        differentiates it by another way than the losses. None means that it does not.
      advice: Continues the error message.
    """
    num_leaves = len(jax.tree.leaves(alpha))
    has_gradient = tuple(map(bool, has_other_gradient or [False] * num_leaves))
    # The losses are not traced again when the first state is computed after the check.
    check_on_shapes(_check_gradients, problem, w, alpha, has_gradient, advice)


def _check_gradients(
    problem: Bilevel,
    w: PyTree,
    alpha: PyTree,
    has_gradient: Sequence[bool],
    advice: str,
) -> None:
    """Raises the errors of `check_alpha_has_gradient`."""
    for _, loss, batch in losses_with_batches(problem):
        in_loss = alpha_has_gradient(loss, w, alpha, batch)
        has_gradient = list(map(operator.or_, has_gradient, in_loss))
    if unreached := leaf_names("alpha", alpha, map(operator.not_, has_gradient)):
        raise ValueError(
            f"neither loss depends on {unreached} (or only through stop_gradient), "
            f"{advice}."
        )
    _check_w_has_gradient(problem, w, alpha)


def _check_w_has_gradient(problem: Bilevel, w: PyTree, alpha: PyTree) -> None:
    """Raises ValueError for a loss that uses ``w`` without a derivative by it."""
    for name, loss, batch in losses_with_batches(problem):
        on_batch = lambda w, loss=loss, batch=batch: loss(w, alpha, batch)
        leaves, lost = find_lost_derivatives(on_batch, w)
        if lost and not leaves:
            raise ValueError(
                f"{name} must have a derivative with respect to w; got a loss that "
                f"depends on w only through {describe_places(lost)}, whose derivative "
                "is zero. Use a smooth function, such as a surrogate of hg.surrogates."
            )


def check_alpha_is_used(value_fn: Any, alpha: PyTree) -> None:
    """Raises ValueError for a leaf of ``alpha`` that ``value_fn(alpha)`` ignores."""
    if names := unused_leaves(value_fn, alpha):
        raise ValueError(
            f"neither the losses nor the solver nor init_fn depend on {names}, so that "
            "all of its values are equally good. Remove it, or use it."
        )


def solver_uses_alpha(
    solver: Any, problem: Bilevel, w: PyTree, alpha: PyTree, data: PyTree
) -> Sequence[bool]:
    """Returns which leaves an iterative solver uses besides the loss, such as rates."""
    init, step = _calls_without_alpha_in_loss(solver, problem, alpha, data)
    return used_inputs(lambda alpha: step(init(w, alpha), alpha), alpha)


def check_steps_use_alpha(
    solver: Any, problem: Bilevel, w: PyTree, alpha: PyTree, advice: str
) -> None:
    """Raises ValueError for a leaf of ``alpha`` that no derivative of steps reaches.

    This is the check of estimators that differentiate steps from a constant carry. A
    leaf that the steps read from the state of the optimizer is an error, even if it
    enters a loss, because its derivative would be incomplete.

    Args:
      solver: An `IterativeSolver`.
      problem, w, alpha: As in `check_alpha_has_gradient`.
      advice: Continues the message for a leaf that neither losses nor steps use.
    """
    check_state_without_alpha(solver, problem, w, alpha)
    inner_data, _ = problem.sample_data(jax.random.key(0))
    init, step = _calls_without_alpha_in_loss(solver, problem, alpha, inner_data)
    carry = jax.eval_shape(init, w, alpha)
    is_used = used_inputs(step, carry, alpha)[-len(jax.tree.leaves(alpha)) :]
    check_alpha_has_gradient(problem, w, alpha, is_used, advice)


def check_state_without_alpha(
    solver: Any, problem: Bilevel, w: PyTree, alpha: PyTree
) -> None:
    """Raises ValueError for leaves of ``alpha`` that steps read from the state only."""
    check_on_shapes(_check_state_without_alpha, solver, problem, w, alpha)


def _check_state_without_alpha(
    solver: Any, problem: Bilevel, w: PyTree, alpha: PyTree
) -> None:
    inner_data, _ = problem.sample_data(jax.random.key(0))
    init, step = _calls_without_alpha_in_loss(solver, problem, alpha, inner_data)
    init_leaves = lambda alpha: jax.tree.leaves(init(w, alpha)[1])
    if not any(used_inputs(init_leaves, alpha)):
        return
    _, state = jax.eval_shape(init, w, alpha)
    leaves, structure = jax.tree.flatten(state)
    num_w = len(jax.tree.leaves(w))
    is_stored = [False] * len(jax.tree.leaves(alpha))
    for i in range(len(leaves)):
        in_leaf = used_inputs(lambda alpha, i=i: init_leaves(alpha)[i], alpha)

        def next_leaf(w, leaves, i=i):
            carry = w, jax.tree.unflatten(structure, leaves)
            return jax.tree.leaves(step(carry, alpha)[1])[i]

        # A momentum depends on w, and forgets its initial value.
        used = used_inputs(next_leaf, w, leaves) if any(in_leaf) else ()
        if any(used[num_w + i : num_w + i + 1]) and not any(used[:num_w]):
            is_stored = list(map(operator.or_, is_stored, in_leaf))
    if names := leaf_names("alpha", alpha, is_stored):
        raise ValueError(
            f"solver must use {names} in each step; got {type(solver).__name__}, whose "
            "init stores it in the state, so that its steps do not depend on a later "
            "alpha. Build the transformation from alpha without "
            "optax.inject_hyperparams, as in hg.Descent(lambda alpha: "
            "optax.sgd(alpha), num_steps)."
        )


def _calls_without_alpha_in_loss(
    solver: Any, problem: Bilevel, alpha: PyTree, data: PyTree
) -> tuple[Callable[[PyTree, PyTree], PyTree], Callable[[PyTree, PyTree], PyTree]]:
    """Returns ``(w, alpha) -> carry`` and ``(carry, alpha) -> next carry``.

    The inner loss has a constant in place of ``alpha``.
    """
    constant = jax.tree.map(jnp.zeros_like, alpha)
    loss = lambda w, _, batch: problem.inner_loss(w, constant, batch)
    init_key, step_key = jax.random.split(jax.random.key(0))
    init = lambda w, alpha: solver.init(loss, w, alpha, data, init_key)
    step = lambda carry, alpha: solver.step(loss, carry, alpha, data, step_key)
    return init, step


def init_has_gradient(problem: Bilevel, w: PyTree, alpha: PyTree) -> Sequence[bool]:
    """Returns which leaves of ``alpha`` have a derivative of the starting point."""
    init_fn = lambda alpha: problem.init_inner(w, alpha)
    leaves, _ = find_lost_derivatives(init_fn, alpha)
    return [i in leaves for i in range(len(jax.tree.leaves(alpha)))]


# Checks on shapes.


def check_on_shapes(check: Callable[..., Any], *args: PyTree) -> Any:
    """Returns ``check(*args)`` on shapes, once per structure of the arguments."""
    arrays, static = eqx.partition((check, *args), eqx.is_array)
    leaves, structure = jax.tree.flatten(arrays)
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
    static_leaves, static_structure = jax.tree.flatten(static)
    cache_key = (structure, shapes, static_structure, tuple(static_leaves))
    try:
        hash(cache_key)
    except TypeError:
        return _check_on_shapes.__wrapped__(*cache_key)
    return _check_on_shapes(*cache_key)


@functools.lru_cache(maxsize=256)
def _check_on_shapes(structure, shapes, static_structure, static_leaves) -> Any:
    static, results = jax.tree.unflatten(static_structure, static_leaves), []

    def run(leaves):
        check, *args = eqx.combine(jax.tree.unflatten(structure, leaves), static)
        results.append(check(*args))

    jax.eval_shape(run, shapes)
    return results[0]


def check_init(estimator: Any, problem: Bilevel, w: PyTree, alpha: PyTree) -> None:
    """Runs ``estimator.init`` on shapes, once per structure of its arguments."""
    check_on_shapes(_init, estimator, problem, w, alpha)


def _init(estimator: Any, problem: Bilevel, w: PyTree, alpha: PyTree) -> None:
    estimator.init(problem, w, alpha, jax.random.key(0))


def can_be_trusted(estimator: Any, problem: Bilevel, w: PyTree, alpha: PyTree) -> bool:
    """Returns False if an estimator reports ``trusted=False`` whatever its inputs are.

    The answer is read from the jaxpr of an estimate.
    """
    return check_on_shapes(_can_be_trusted, estimator, problem, w, alpha)


def _can_be_trusted(*args: PyTree) -> bool:
    arrays, static = eqx.partition(args, eqx.is_array)

    def flags_of_estimate(arrays, key):
        estimator, problem, w, alpha = eqx.combine(arrays, static)
        state = estimator.init(problem, w, alpha, key)
        estimate, _ = estimator.estimate(problem, state, alpha, key)
        # An estimate has this flag only if the check fails, whatever the inputs are.
        is_lost = "lost_derivative" in estimate.flags
        flags = estimate.flags or {"untrusted": ~estimate.trusted}
        return flags | {"lost_derivative": jnp.asarray(is_lost)}

    flags = constant_outputs(flags_of_estimate, arrays, KEY_SHAPE)
    return not any(flag is not None and np.all(flag) for flag in flags)
