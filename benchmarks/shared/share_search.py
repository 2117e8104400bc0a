"""Random search over the share of training examples that a filter by losses keeps."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

import hypergrad as hg
from hypergrad.tasks import cleaning
from hypergrad.tasks.task import Task

from .task_runs import search_task


def loss_of_share(w: PyTree, share: Array, batch: PyTree) -> Array:
    """Returns the inner loss of the share of the examples that comes first."""
    kept = (batch["place"] < share).astype(float)
    return cleaning.train_loss(w, kept, batch)


def search_share(
    task: Task,
    losses: Float[Array, " n"],
    filter_cost: float,
    *,
    budget: float,
    key: Array,
) -> hg.Trace:
    """Samples the share of the examples, those with the lowest losses, that are kept.

    The trace has weights of 1 and of 0 in place of the share.

    Args:
      task: Task with the losses of `hypergrad.tasks.cleaning`, or another outer loss.
      losses: Losses of the training examples by a model that is known.
      filter_cost: Gradient-equivalents of this model, a part of the budget.
      budget: Gradient-equivalents in all.
      key: Key of the search.
    """
    place = jnp.argsort(jnp.argsort(losses)) / len(losses)
    problem = hg.Bilevel(
        loss_of_share,
        task.problem.outer_loss,
        task.problem.inner_data | {"place": place},
        task.problem.outer_data,
    )
    space = hg.spaces.Interval(0.0, 1.0)
    trace = search_task(task, budget - filter_cost, key, problem=problem, space=space)
    kept = (place < trace.best_alpha).astype(float)
    stats = dict(trace.stats)
    for name in ("num_grads", "gradient_equivalents"):
        stats[name] = stats[name].at[0].add(filter_cost)
    return dataclasses.replace(trace, alpha=kept, best_alpha=kept, stats=stats)
