"""Runs on a task by hypergradients or random search, and `Implicit` by plain CG."""

import dataclasses
from typing import Any

import optax
from jaxtyping import Array

import hypergrad as hg
from hypergrad.bench import baselines
from hypergrad.inner.base import InnerSolver
from hypergrad.tasks.task import Task


def implicit_by_cg(
    solver: InnerSolver,
    rtol: Any = None,
    max_steps: int | None = None,
    **options: Any,
) -> hg.Implicit:
    """Returns `Implicit` by plain conjugate gradients, which estimates no error.

    Args:
      solver: Inner solver.
      rtol, max_steps: Options of `CG`.
      options: Options of `Implicit`.
    """
    cg = hg.CG(rtol=rtol, max_steps=max_steps, preconditioner=None)
    return hg.Implicit(solver, cg, estimate_error=False, **options)


def minimize_task(
    task: Task,
    estimator: hg.Estimator,
    optimizer: optax.GradientTransformation,
    key: Array,
    **options: Any,
) -> hg.Trace:
    """Returns the trace of `hypergrad.minimize` from the start of a task.

    The options are those of `hypergrad.minimize`; the space is by default the task's.
    """
    return hg.minimize(
        task.problem, estimator, optimizer, task.w, task.alpha,
        key=key, **{"space": task.space} | options,
    )  # fmt: skip


def search_task(task: Task, budget: float, key: Array, **changes: Any) -> hg.Trace:
    """Returns the trace of random search on a task.

    The changes replace attributes of the task, such as its solver or its space.
    """
    changed_task = dataclasses.replace(task, **changes)
    return baselines.random_search(changed_task, budget=budget, key=key)
