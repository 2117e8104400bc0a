"""Logistic regressions with learned penalties, for the single-loop methods.

    L(w, a) = mean CE(w) + sum_k exp(a_k) ||w_k||² / 2,   M(w) = CE on other samples

The minimum of ``h(a) = M(w*(a))`` is that of L-BFGS on the exact hypergradient, in
float64.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.runtime.compat import enable_x64

from .single_loop import SeedProblem, System

BATCH = 64
LOW, HIGH = -12.0, 2.0
INIT_ALPHA = -2.0  # of every log-penalty
RESOLUTION = 1e-7  # of a difference of losses in float32


class Samples(NamedTuple):
    """A data set: ``x`` [n, features] and ``y``.

    Attributes:
      name: Description of the data, which may be a stand-in.
      x, y: Inputs and labels.
      size: Number of samples to train on, and number of samples to validate on.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    size: int


def binary_loss(w: Array, batch: PyTree) -> Array:
    """Returns the mean cross-entropy; ``w`` [features], ``y`` in {0, 1}."""
    scores = batch["x"] @ w
    return jnp.mean(jax.nn.softplus(scores) - batch["y"] * scores)


def class_loss(w: Array, batch: PyTree) -> Array:
    """Returns the mean cross-entropy; ``w`` [features, classes]."""
    scores = batch["x"] @ w
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"]))


def inner_loss(loss: Callable, w: Array, alpha: Array, batch: PyTree) -> Array:
    """Returns the loss with a log-penalty for each entry of the last axis of ``w``."""
    squares = jnp.sum(w**2, axis=tuple(range(w.ndim - 1)))
    return loss(w, batch) + 0.5 * jnp.vdot(jnp.exp(alpha), squares)


def outer_loss(loss: Callable, w: Array, alpha: Array, batch: PyTree) -> Array:
    """Returns the loss without penalties."""
    del alpha
    return loss(w, batch)


@functools.cache
def bilevel(loss: Callable) -> Callable[..., hg.Bilevel]:
    """Returns the problem of given data; equal functions, so that it is traced once."""
    inner, outer = (functools.partial(f, loss) for f in (inner_loss, outer_loss))
    return functools.partial(hg.Bilevel, inner, outer)


def split(samples: Samples, seed: int) -> dict[str, PyTree]:
    """Returns inner and outer samples by a permutation that depends on the seed."""
    order = np.random.default_rng(seed).permutation(len(samples.y))
    take = lambda rows: {"x": samples.x[rows], "y": samples.y[rows]}
    size = samples.size
    return {"inner": take(order[:size]), "outer": take(order[size : 2 * size])}


def minimum(loss: Callable, splits: PyTree, w: np.ndarray, alpha: np.ndarray) -> float:
    """Returns ``min h`` over the box: the lower result of two runs of L-BFGS."""
    with enable_x64(True):
        to_float64 = lambda tree: jax.tree.map(
            lambda x: (
                jnp.asarray(x, float) if x.dtype == np.float32 else jnp.asarray(x)
            ),
            tree,
        )
        problem = bilevel(loss)(*map(to_float64, (splits["inner"], splits["outer"])))
        gradient_fn = hg.hypergradient(
            problem, hg.Implicit(hg.Newton(), hg.CG(preconditioner=None))
        )

        def value_and_grad(alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            estimate = gradient_fn(to_float64(w), jnp.asarray(alpha))
            return np.asarray(estimate.value), np.asarray(estimate.hypergradient)

        values = [
            scipy.optimize.minimize(
                *(value_and_grad, np.full(alpha.shape, init, float)),
                jac=True,
                bounds=[(LOW, HIGH)] * alpha.size,
                options={"maxiter": 200, "ftol": 1e-14, "gtol": 1e-9},
            ).fun
            for init in (INIT_ALPHA, -6.0)
        ]
    return float(min(values))


def suboptimality(
    loss: Callable, splits: PyTree, best: Array, w: Array, alpha: Array, key: Array
) -> Array:
    """Returns ``M(w*(alpha)) - h*``, but at least what float32 can resolve.

    ``w*`` is trained from zero, whatever the run's ``w`` is; NaN if the training does
    not converge.
    """
    problem, init_w = bilevel(loss)(splits["inner"], splits["outer"]), jnp.zeros_like(w)
    w, _ = hg.Newton().solve(problem.inner_loss, init_w, alpha, splits["inner"], key)
    inner_grad = jax.grad(problem.inner_loss)
    grad_norm = lambda w: jnp.linalg.norm(inner_grad(w, alpha, splits["inner"]))
    value = jnp.maximum(loss(w, splits["outer"]) - best, RESOLUTION)
    return jnp.where(grad_norm(w) < 1e-3 * grad_norm(init_w), value, jnp.nan)


def make_system(
    load: Callable[[], Samples], loss: Callable, classes: tuple[int, ...], **fields: Any
) -> System:
    """Returns the system of a loss; ``classes`` is () or the number of classes."""

    def init_values() -> tuple[np.ndarray, np.ndarray]:
        w = np.zeros((load().x.shape[1], *classes), np.float32)
        return w, np.full(w.shape[-1], INIT_ALPHA, np.float32)

    @functools.cache
    def prepare(seed: int) -> PyTree:
        splits = split(load(), seed)
        best = minimum(loss, splits, *init_values())
        return splits | {"least": np.float32(best)}

    def make_problem(arrays: PyTree) -> SeedProblem:
        inner, outer = (hg.Batches(arrays[name], BATCH) for name in ("inner", "outer"))
        splits = {name: arrays[name] for name in ("inner", "outer")}
        metric = jax.tree_util.Partial(
            functools.partial(suboptimality, loss), splits, arrays["least"]
        )
        w, alpha = map(jnp.asarray, init_values())
        return SeedProblem(bilevel(loss)(inner, outer), w, alpha, metric)

    return System(
        data_name=lambda: load().name,
        prepare=prepare,
        make_problem=make_problem,
        low=LOW,
        high=HIGH,
        **fields,
    )
