"""Golden cases of the tasks: losses, gradients and metrics where each one starts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import hypergrad as hg
from hypergrad import tasks
from hypergrad.tasks import random_walk
from tests.golden.results import estimate_to_dict, stats_to_dict

#: Case name -> task and the arguments of ``make`` other than the key.
TASKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "architecture": (tasks.architecture, {}),
    "architecture, price": (tasks.architecture, {"price": 0.3, "hold_out": True}),
    "augmentation": (tasks.augmentation, {}),
    "augmentation, held out": (tasks.augmentation, {"hold_out": True}),
    "cleaning": (tasks.cleaning, {}),
    "cleaning, batches": (tasks.cleaning, {"batch_size": 50, "hold_out": True}),
    "federated": (tasks.federated, {}),
    "federated, iid": (
        tasks.federated, {"iid": True, "drift_correction": False, "hold_out": True}
    ),
    "few_shot, maml": (tasks.few_shot, {"variant": "maml", "data_dir": ""}),
    "few_shot, imaml": (tasks.few_shot, {"variant": "imaml", "data_dir": ""}),
    "few_shot, ridge": (tasks.few_shot, {"variant": "ridge", "data_dir": ""}),
    "penalties, hoag": (tasks.penalties, {"variant": "hoag"}),
    "penalties, logistic": (tasks.penalties, {"variant": "logistic"}),
    "penalties, softmax": (tasks.penalties, {"variant": "softmax", "hold_out": True}),
    "penalties, mlp": (tasks.penalties, {"variant": "mlp"}),
    "penalties, cnn": (tasks.penalties, {"variant": "cnn"}),
    "penalties, overfit": (
        tasks.penalties, {"variant": "overfit", "granularity": "feature"}
    ),
    "physics, poisson": (tasks.physics, {"variant": "poisson"}),
    "physics, burgers": (
        tasks.physics, {"variant": "burgers", "hold_out": True, "data_dir": ""}
    ),
    "physics, control": (tasks.physics, {"variant": "control"}),
    "reinforcement, mrp": (tasks.reinforcement, {"variant": "mrp"}),
    "reinforcement, cartpole": (tasks.reinforcement, {"variant": "cartpole"}),
    "schedules": (tasks.schedules, {}),
    "self_supervised": (tasks.self_supervised, {}),
    "semi_supervised": (tasks.semi_supervised, {}),
    "unsupervised, kde": (tasks.unsupervised, {"variant": "kde"}),
    "unsupervised, ppca": (tasks.unsupervised, {"variant": "ppca"}),
    "unsupervised, kmeans": (tasks.unsupervised, {"variant": "kmeans"}),
}  # fmt: skip


KEY = jax.random.key(59)


def full_batch(data: Any) -> Any:
    """Returns all of the data as one batch."""
    return data.full_batch(KEY) if isinstance(data, hg.Batches) else data


def sample_batch(data: Any) -> Any:
    """Returns a batch that the key determines."""
    return data.sample(KEY) if isinstance(data, hg.Batches) else data


def leaf_norms(tree: Any) -> list[jax.Array]:
    """Returns the Euclidean norm of each leaf, in the order of the leaves."""
    return [optax.tree.norm(leaf) for leaf in jax.tree.leaves(tree)]


@eqx.filter_jit
def evaluate(problem, w, alpha) -> dict[str, Any]:
    """Returns values and norms of the gradients of both losses where a run starts."""
    inner_data, outer_data = problem.sample_data(KEY)
    w = problem.init_inner(w, alpha)
    inner_loss, batch = problem.inner_loss, full_batch(inner_data)
    value_and_grad = jax.value_and_grad(inner_loss, argnums=(0, 1))
    inner_value, (w_grad, alpha_grad) = value_and_grad(w, alpha, batch)
    outer_value, outer_w_grad, outer_alpha_grad = problem.outer_value_and_grads(
        w, alpha, full_batch(outer_data)
    )
    return {
        "w": leaf_norms(w),
        "alpha": leaf_norms(alpha),
        "inner value": inner_value,
        "inner w_grad": leaf_norms(w_grad),
        "inner alpha_grad": leaf_norms(alpha_grad),
        "sampled inner value": inner_loss(w, alpha, sample_batch(inner_data)),
        "outer value": outer_value,
        "outer w_grad": leaf_norms(outer_w_grad),
        "outer alpha_grad": leaf_norms(outer_alpha_grad),
        "sampled outer value": problem.outer_value(w, alpha, sample_batch(outer_data)),
    }


@eqx.filter_jit
def solve(solver, problem, w, alpha) -> dict[str, Any]:
    """Returns norms of the inner solution and the counts of the task's own solver."""
    inner_data, _ = problem.sample_data(KEY)
    w = problem.init_inner(w, alpha)
    w, stats = solver.solve(problem.inner_loss, w, alpha, inner_data, KEY)
    return {"w": leaf_norms(w), "stats": stats}


def run_task(module: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns losses, gradients, metrics and the exact hypergradient of a task.

    The solution is left out where thousands of L-BFGS steps amplify rounding errors.
    """
    task = module.make(key=jax.random.key(61), **arguments)
    w = task.problem.init_inner(task.w, task.alpha)
    results = {
        "start": evaluate(task.problem, task.w, task.alpha),
        "metrics": task.metric_values(w, task.alpha, KEY),
    }
    if not isinstance(task.solver, hg.LBFGS):
        results["solution"] = solve(task.solver, task.problem, task.w, task.alpha)
    if task.exact is not None:
        results["exact"] = task.exact(task.alpha)
    return results


def run_local_implicit() -> dict[str, Any]:
    """Returns the mean of the clients' own hypergradients of the federated task."""
    task = tasks.federated.make(key=jax.random.key(61))
    linear_solver = hg.CG(rtol=1e-3, max_steps=5, preconditioner=None)
    estimator = tasks.federated.LocalImplicit(task.solver, linear_solver)
    estimate = hg.hypergradient(task.problem, estimator)(task.w, task.alpha)
    return {
        "value": estimate.value,
        "hypergradient": estimate.hypergradient,
        "w": leaf_norms(estimate.w),
        "stats": stats_to_dict(estimate.stats),
    }


def run_temporal_differences() -> dict[str, Any]:
    """Returns estimates of the random walk by temporal differences."""
    task = tasks.reinforcement.make(key=jax.random.key(61), variant="mrp")
    alpha = jnp.linspace(0.8, 0.95, task.alpha.size)
    solver = random_walk.TD
    estimators = {
        "Unrolled": hg.Unrolled(solver),
        "FixedPoint": hg.FixedPoint(solver, num_terms=50),
    }
    return {
        name: estimate_to_dict(hg.hypergradient(task.problem, estimator)(task.w, alpha))
        for name, estimator in estimators.items()
    } | {"exact": task.exact(alpha)}


CASES: dict[str, Callable[[], Any]] = {
    f"tasks/{name}": partial(run_task, *arguments) for name, arguments in TASKS.items()
}
CASES |= {
    "tasks/federated, LocalImplicit": run_local_implicit,
    "tasks/reinforcement, temporal differences": run_temporal_differences,
}
