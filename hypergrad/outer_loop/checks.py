"""Checks of the arguments of an outer loop and of its runs."""

import math
from typing import TYPE_CHECKING, Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..checkpoint import check_checkpoints
from ..number_checks import check_positive_int, positive
from ..problem import Bilevel
from ..progress import check_progress
from ..validation import (
    as_input_arrays,
    check_no_class,
    check_same_structure,
    is_traced,
)
from .step import OuterState, init_state

if TYPE_CHECKING:
    from .loop import OuterLoop

OnUntrusted = Literal["record", "skip", "refine", "stop"]


def check_state_fits(state: Any, w: PyTree, alpha: PyTree) -> None:
    """Raises an error unless ``w`` and ``alpha`` have the structure of a state."""
    if not isinstance(state, OuterState):
        raise TypeError(
            "state must be the state of an earlier run, trace.state; got "
            f"{type(state).__name__}."
        )
    w, alpha = as_input_arrays(w, alpha)
    source = "the run that state continues"
    check_same_structure("w", w, state.w, source, "have")
    # best_alpha is used because alpha itself is stored in unconstrained coordinates.
    check_same_structure("alpha", alpha, state.best_alpha, source, "have")


def check_aggregator(aggregator: Any, problem: Bilevel) -> None:
    """Raises an error unless the aggregator fits the number of outer losses."""
    num_objectives = problem.num_objectives
    if num_objectives is None:
        if aggregator is not None:
            raise ValueError(
                "aggregator must be None for a problem with a single outer loss. Pass "
                "a tuple of losses as outer_loss for several."
            )
        return
    if aggregator is None:
        raise ValueError(
            f"aggregator must be given for a problem with {num_objectives} outer "
            "losses: loop = hg.OuterLoop(problem, estimator, optimizer, "
            "aggregator=hg.objectives.UPGrad()), then "
            "loop.run(loop.init(w, alpha), num_steps=...)."
        )
    check_no_class("aggregator", aggregator)
    if not (hasattr(aggregator, "init") and hasattr(aggregator, "compute_weights")):
        raise TypeError(
            "aggregator must have the methods init and compute_weights, as "
            f"hg.objectives.UPGrad() does; got {type(aggregator).__name__}."
        )
    aggregator.init(num_objectives)


def check_outer_data_fn(outer_data_fn: Any, problem: Bilevel, estimator: Any) -> None:
    """Raises an error unless the function keeps the structure of the outer data."""
    if outer_data_fn is None:
        return
    method = getattr(estimator, "estimator", estimator)  # of an average
    if getattr(method, "adds_differences", False):
        name = type(method).__name__
        raise ValueError(
            f"outer_data_fn must be None for {name}, which adds differences at the "
            "data of this step to directions of earlier data. Use hg.SABA or hg.SOBA."
        )
    if not callable(outer_data_fn):
        raise TypeError(
            "outer_data_fn must be a function (step, outer_data) -> outer_data; got "
            f"{outer_data_fn!r}."
        )
    if problem.data_fn is not None:
        raise ValueError(
            "outer_data_fn must be None for a problem with data_fn, which has no "
            "outer_data."
        )
    data = eqx.filter_eval_shape(outer_data_fn, jnp.asarray(0), problem.outer_data)
    check_same_structure("outer_data_fn", data, problem.outer_data, "outer_data")


def check_on_untrusted(on_untrusted: Any, estimator: Any) -> None:
    """Raises ValueError unless the estimator can do what the name says."""
    if on_untrusted not in get_args(OnUntrusted):
        raise ValueError(
            f"on_untrusted must be one of {', '.join(get_args(OnUntrusted))}; got "
            f"{on_untrusted!r}."
        )
    if on_untrusted == "refine" and not hasattr(estimator, "refine"):
        raise ValueError(
            'on_untrusted="refine" needs an estimator with a method refine, such as '
            f'hg.Implicit; got {type(estimator).__name__}. Use "skip" or "stop".'
        )


def check_one_sample(
    certify_every: int | None, problem: Bilevel, estimator: Any
) -> None:
    """Raises ValueError if a certificate would use other data than the estimate."""
    is_average = (getattr(estimator, "num_samples", None) or 1) > 1
    if certify_every is not None and problem.is_sampled and is_average:
        raise ValueError(
            "certify_every must be None for an average over samples of the data, as a "
            "certificate uses only one. Use certify=True of the averaged Implicit."
        )


def check_run_options(
    loop: "OuterLoop",
    num_steps: int | None,
    budget: Any,
    progress: Any,
    checkpoints: Any,
    record_every: int,
) -> None:
    """Raises an error for an option of a run that is invalid whatever its state is."""
    check_positive_int("num_steps", num_steps, optional=True)
    check_record_every(loop, record_every, num_steps)
    budget = positive("budget", optional=True, allow_inf=True)(budget)
    check_progress(progress)
    check_checkpoints(checkpoints)
    is_limited = budget is not None and (is_traced(budget) or budget < math.inf)
    if num_steps is None and not is_limited:
        raise ValueError("num_steps or a finite budget must be given; got neither.")


def check_record_every(
    loop: "OuterLoop", record_every: Any, num_steps: int | None
) -> None:
    """Raises ValueError unless all that happens at intervals happens at records."""
    check_positive_int("record_every", record_every)
    if num_steps is not None and num_steps % record_every:
        raise ValueError(
            f"num_steps must be a multiple of record_every = {record_every}, so that "
            f"the last step is recorded; got {num_steps}."
        )
    for name in ("eval_every", "certify_every"):
        every = getattr(loop, name)
        if every is not None and every > record_every and every % record_every:
            raise ValueError(
                f"{name} must be a multiple of record_every = {record_every}, because "
                f"only recorded steps are evaluated; got {every}."
            )
    if record_every > 1 and loop.on_untrusted != "record":
        raise ValueError(
            f'record_every must be 1 with on_untrusted="{loop.on_untrusted}", which '
            f"looks at every step; got {record_every}."
        )


def check_space_of_state(loop: "OuterLoop", state: Any) -> None:
    """Raises an error unless ``state.u`` stands for an ``alpha`` in the loop's space.

    Bounds are compared unless they are traced.
    """
    if not isinstance(state, OuterState):
        raise TypeError(
            "state must be an OuterState, from loop.init(w, alpha) or trace.state; got "
            f"{type(state).__name__}."
        )
    spaces = state.space, eqx.filter(loop.space, eqx.is_array)
    is_same = jax.tree.structure(spaces[0]) == jax.tree.structure(spaces[1])
    if is_same and not is_traced(spaces):
        # A state of several runs has leading axes.
        fits = lambda x, y: jnp.shape(x)[jnp.ndim(x) - jnp.ndim(y) :] == jnp.shape(y)
        equal = lambda x, y: fits(x, y) and bool(np.all(np.equal(x, y)))
        is_same = all(jax.tree.leaves(jax.tree.map(equal, *spaces)))
    if not is_same:
        raise ValueError(
            "state must come from a loop with the same space, because its numbers are "
            "the unconstrained coordinates of this space. Start a new run from "
            "trace.alpha and trace.w."
        )


def check_state(loop: "OuterLoop", state: Any) -> None:
    """Raises an error unless a state belongs to a loop with these objects."""
    check_space_of_state(loop, state)
    if state.step.shape:
        raise ValueError(
            f"state must be the state of a single run; got a batch {state.step.shape}. "
            "Continue it inside jax.vmap, or index it first."
        )
    # Nothing is computed: JAX has kept the trace of `init_state` for these types.
    w, alpha, key = state.w, state.best_alpha, state.key
    like = jax.eval_shape(lambda *args: init_state(loop, *args), w, alpha, key)
    has_same_structure = jax.tree.structure(state) == jax.tree.structure(like)
    if not has_same_structure or any(
        (x.shape, x.dtype) != (y.shape, y.dtype)
        for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True)
    ):
        raise ValueError(
            "state must come from a loop with the same estimator, optimizer, space and "
            "aggregator, for w and alpha of the same shapes; got one of another "
            "structure. Start a new run from trace.alpha and trace.w."
        )
