"""Leaves of ``w`` that are no parameters: PRNG keys and the counters of a model.

The state of a flax nnx model has both, beside its parameters. They have no derivative
and stay what they are in a whole run. Estimators and solvers never see them: they get
the parameters, with None in place of the other leaves, and losses that put them back.
"""

from collections.abc import Callable

import equinox as eqx
import jax
from jaxtyping import PyTree

from .problem import Bilevel
from .products import Loss
from .trees import is_key_or_counter

InitFn = Callable[[PyTree, PyTree], PyTree]


def bind_keys(problem: Bilevel, w: PyTree) -> tuple[Bilevel, PyTree]:
    """Returns the problem of the parameters alone, and the parameters.

    Its functions close over the keys and counters of ``w``, which may be tracers, and
    are new at each call: call it inside a compiled program or for checks on shapes, and
    do not pass its result to `jax.jit`, which would compile again. A ``w`` that has
    neither is returned as it is, with its problem.
    """
    if not _has_keys(w):
        return problem, w
    outer_losses = tuple(bind_keys_to_loss(loss, w) for loss in problem.outer_losses)
    bound = Bilevel(
        bind_keys_to_loss(problem.inner_loss, w),
        outer_losses[0] if problem.num_objectives is None else outer_losses,
        problem.inner_data,
        problem.outer_data,
        init_fn=None if problem.init_fn is None else _bind_init(problem.init_fn, w),
        data_fn=problem.data_fn,
    )
    return bound, remove_keys(w)


def bind_keys_to_loss(loss: Loss, w: PyTree) -> Loss:
    """Returns the loss as a function of the parameters alone."""
    if not _has_keys(w):
        return loss
    return lambda parameters, *args: loss(restore_keys(parameters, w), *args)


def _bind_init(init_fn: InitFn, w: PyTree) -> InitFn:
    return lambda parameters, alpha: remove_keys(
        init_fn(restore_keys(parameters, w), alpha)
    )


def remove_keys(w: PyTree) -> PyTree:
    """Returns ``w`` with None in place of keys and counters."""
    return jax.tree.map(lambda leaf: None if is_key_or_counter(leaf) else leaf, w)


def restore_keys(parameters: PyTree, w: PyTree) -> PyTree:
    """Returns the parameters together with the keys and counters of ``w``.

    >>> import jax
    >>> w = {"scale": 1.0, "key": jax.random.key(0)}
    >>> restore_keys({"scale": 2.0, "key": None}, w)["scale"]
    2.0
    """
    if not _has_keys(w):
        return parameters
    fixed = jax.tree.map(lambda leaf: leaf if is_key_or_counter(leaf) else None, w)
    return eqx.combine(parameters, fixed)


def _has_keys(w: PyTree) -> bool:
    return any(map(is_key_or_counter, jax.tree.leaves(w)))
