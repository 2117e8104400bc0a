"""Methods that every table can use as baselines.

A method is measured at the ``w`` where it ends or, in a table with ``retrain``, after
training with the ``alpha`` that it learned. A baseline that trains on other data has
the attribute ``keeps_w``: its own ``w`` is measured.
"""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ..batches import full_batch
from ..cost.counts import cost_stats
from ..estimators import Implicit
from ..estimators.base import make_stats
from ..minimize import minimize
from ..search import search
from ..searchers import Random
from ..tasks.task import Task
from ..trace import Trace
from .methods import Method, with_options


def no_hyperparameters(task: Task, *, budget: float, key: Array) -> Trace:
    """Trains at the initial ``alpha`` and learns nothing about it."""
    del budget
    data, _ = task.problem.sample_data(key)
    w = task.problem.init_inner(task.w, task.alpha)
    w, stats = task.solver.solve(task.problem.inner_loss, w, task.alpha, data, key)
    counts = {name: stats[name] for name in ("num_grads", "num_hvps", "num_values")}
    return trace_of_point(task, w, task.alpha, key, **counts)


def keeps_w(method: Method) -> Method:
    """Returns a method whose own ``w`` is measured, without training once more."""
    return with_options(method, keeps_w=True)


def random_search(task: Task, *, budget: float, key: Array) -> Trace:
    """Samples ``alpha`` from the space until the budget is spent."""
    return search(
        task.problem,
        task.solver,
        Random(),
        task.w,
        space=task.space,
        budget=budget,
        key=key,
    )


def _implicit(task: Task, *, budget: float, key: Array, learning_rate: float) -> Trace:
    """Moves ``alpha`` by Adam along implicit hypergradients with the task's solver."""
    return minimize(
        task.problem,
        Implicit(task.solver),
        optax.adam(learning_rate),
        task.w,
        task.alpha,
        space=task.space,
        budget=budget,
        key=key,
    )


#: The method with Adam's learning rate as its one setting.
implicit = with_options(_implicit, grid={"learning_rate": (0.03, 0.1, 0.3)})


def trace_of_point(
    task: Task, w: PyTree, alpha: PyTree, key: Array, **counts: Any
) -> Trace:
    """Returns the trace of a method that ends at ``(w, alpha)`` without any step.

    Args:
      task, w, alpha, key: The problem, and where the method ends.
      counts: Calls of the losses by which it came there, as `cost_stats` takes them.
    """
    data, outer_data = task.problem.sample_data(key)
    value = jnp.mean(task.problem.outer_value(w, alpha, full_batch(outer_data, key)))
    stats = make_stats(**cost_stats(data, outer_data, **counts))
    stats["trusted"] = jnp.asarray(True)
    return Trace(
        alpha=alpha,
        w=w,
        best_alpha=alpha,
        value=value[None],
        stats={name: x[None] for name, x in stats.items()},
        metrics={},
        status_code=jnp.asarray(0),
    )
