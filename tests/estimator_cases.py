"""Problems, solvers and helpers that the tests of estimators share.

Functions and optimizers are module-level objects, because JAX compares them by
identity: estimators made of the same ones share compiled programs.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax

import hypergrad as hg
from benchmarks.shared.reference_problems import (
    ReferenceProblem,
    flat,
    get_reference,
    hypertorch,
    ridge,
    ridge_outer,
    ridge_penalty,
    ridge_weights,
)

RIDGE = get_reference("ridge per-weight")
RIDGE_DATA = RIDGE.problem.inner_data, RIDGE.problem.outer_data
LINEAR_SOLVERS = {
    "CG": hg.CG(),
    "MINRES": hg.MINRES(),
    "GMRES": lx.GMRES(rtol=1e-12, atol=1e-12),
    "BiCGStab": lx.BiCGStab(rtol=1e-12, atol=1e-12),
    "LU": lx.LU(),
    "NystromCG": hg.NystromCG(rank=3),
}


def converging_descent(reference: ReferenceProblem, num_steps: int = 300) -> hg.Descent:
    return hg.Descent(optax.sgd(reference.step), num_steps)


def run_estimator(reference: ReferenceProblem, estimator, w=None) -> hg.Estimate:
    """Returns the estimate at the starting point of a problem, or at another ``w``."""
    gradient_fn = hg.hypergradient(reference.problem, estimator)
    return gradient_fn(reference.w if w is None else w, reference.alpha)


def failed_checks(estimate: hg.Estimate) -> set[str]:
    return {name for name, flag in estimate.flags.items() if flag}


# Solvers with a formula.


def quadratic_solution(alpha, batch):
    return jnp.linalg.solve(batch["H"], batch["C"] @ flat(alpha))


def ridge_solution(alpha, batch):
    x, y = batch["x"], batch["y"]
    H = x.T @ x / len(y) + jnp.diag(jnp.broadcast_to(jnp.exp(alpha), x.shape[1:]))
    return jnp.linalg.solve(H, x.T @ y / len(y))


# A quadratic for the data H and t, whose stationary point may be a saddle.


def saddle_inner(w, alpha, batch):
    return 0.5 * w @ (batch["H"] @ w) - w @ alpha


def saddle_outer(w, alpha, batch):
    return 0.5 * jnp.sum((w - batch["t"]) ** 2)


# Random data.


def noisy_ridge(w, alpha, batch):
    """Ridge regression with multiplicative noise, for batches with a key."""
    data, key = batch
    noise = 1 + 0.3 * jax.random.normal(key, data["x"].shape)
    return ridge_penalty(w, alpha, data | {"x": data["x"] * noise})


def problem_of_episodes(
    num_episodes: int = 3,
) -> tuple[hg.Bilevel, list[ReferenceProblem]]:
    """Returns a problem whose ``data_fn`` samples one of several ridge problems."""
    episodes = [ridge("per-weight", seed) for seed in range(num_episodes)]
    data = [
        (reference.problem.inner_data, reference.problem.outer_data)
        for reference in episodes
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *data)
    sample = lambda data, key: jax.tree.map(
        lambda leaf: leaf[jax.random.randint(key, (), 0, num_episodes)], data
    )
    data_fn = jax.tree_util.Partial(sample, stacked)
    return hg.Bilevel(ridge_penalty, ridge_outer, data_fn=data_fn), episodes


NUM_EXAMPLES = 5


def ridge_of_five_examples() -> tuple[hg.Bilevel, ReferenceProblem]:
    """Returns ridge regression with one weight per example, in batches.

    A hypergradient is nonzero exactly for the examples of its batch.
    """
    reference = ridge("per-example", seed=1, n=NUM_EXAMPLES, d=3)
    train, val = reference.problem.inner_data, reference.problem.outer_data
    data = hg.Batches(train), hg.Batches(val)
    return hg.Bilevel(ridge_weights, ridge_outer, *data), reference


def batch_hypergradient(
    reference: ReferenceProblem, inner: int | None = None, outer: int | None = None
) -> np.ndarray:
    """Returns the exact hypergradient with ``H`` and ``J`` of one inner example.

    ``b`` is that of one outer example; None stands for all examples.
    """
    alpha, w = (
        np.asarray(reference.alpha),
        np.asarray(reference.solution(reference.alpha)),
    )
    rows = np.arange(NUM_EXAMPLES)
    inner_rows = rows if inner is None else np.array([inner])
    outer_rows = rows if outer is None else np.array([outer])
    x, y = (np.asarray(reference.problem.inner_data[name])[inner_rows] for name in "xy")
    x_val, y_val = (
        np.asarray(reference.problem.outer_data[name])[outer_rows] for name in "xy"
    )
    b = x_val.T @ (x_val @ w - y_val) / len(outer_rows)
    H = (x.T * alpha[inner_rows]) @ x / len(inner_rows) + 0.1 * np.eye(3)
    hypergradient = np.zeros(NUM_EXAMPLES)
    v = np.linalg.solve(H, b)
    hypergradient[inner_rows] = (y - x @ w) * (x @ v) / len(inner_rows)
    return hypergradient


# Cost.


def ridge_with_few_outer_examples(batch_size: int | None) -> hg.Bilevel:
    """Returns ridge regression on 40 training and 20 validation examples."""
    train, val = RIDGE_DATA
    val = hg.Batches(jax.tree.map(lambda x: x[:20], val))
    return hg.Bilevel(ridge_penalty, ridge_outer, hg.Batches(train, batch_size), val)


def gradient_equivalents(stats, outer_fraction: float = 20 / 40) -> float:
    """Returns the price of the counts, in full inner gradients."""
    outer = stats["num_outer_grads"] + stats["num_outer_values"] / 3
    inner = stats["num_grads"] + 2 * stats["num_hvps"] + stats["num_values"] / 3
    return float(inner + outer_fraction * outer)


def counted(fn: Callable, *, per_point: bool = False) -> tuple[Callable, list]:
    """Returns the function and a list to which it appends as it runs.

    A batch of points counts once, or with ``per_point`` each of its points.
    """
    calls = []

    def counted_fn(first, *others):
        points = (first,) if per_point else ()
        jax.debug.callback(lambda *_: calls.append(1), *points)
        return fn(first, *others)

    return counted_fn, calls


def counting_problem(reference: ReferenceProblem) -> tuple[hg.Bilevel, list]:
    """Returns the problem with an inner loss that is counted, and its calls."""
    problem = reference.problem
    inner, calls = counted(problem.inner_loss)
    data = problem.inner_data, problem.outer_data
    return hg.Bilevel(inner, problem.outer_loss, *data), calls


# Errors published in the notebook of hypertorch (Grazzi et al. 2020), at T = 100.

GRAZZI_ERRORS = {
    ("CG", 1): 3.33e-2,
    ("CG", 5): 1.71e-6,
    ("Neumann", 1): 8.76e-1,
    ("Neumann", 10): 2.67e-1,
    ("Neumann", 50): 1.45e-3,
    ("truncated", 1): 8.76e-1,
    ("truncated", 10): 2.67e-1,
    ("truncated", 50): 1.46e-3,
}


@functools.cache
def grazzi() -> tuple[ReferenceProblem, jax.Array]:
    """Returns the logistic problem of Grazzi et al. 2020 and its hypergradient."""
    reference = hypertorch()
    exact = reference.exact(reference.alpha)
    np.testing.assert_allclose(np.linalg.norm(exact), 0.0285658, rtol=1e-5)
    return reference, exact
