"""Logistic regressions with learned penalties: of 22 features, and of 10 classes.

    L(w, a) = mean CE(w) + sum_k exp(a_k) ||w_k||² / 2,   M(w) = CE on other samples

`logistic` has one penalty a feature (ijcnn1), `multinomial` one a class (MNIST). What
``h(a) = M(w*(a))`` is at its least is found by L-BFGS on the exact hypergradient, in
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
from hypergrad.studies.record import Row
from hypergrad.studies.verdict import Verdict

from . import single_loop_grid, single_loop_table
from .shared.single_loop import Drawn, System
from .shared.single_loop_table import first_there, lower_end

BATCH = 64
LOW, HIGH = -12.0, 2.0
START = -2.0  # of every log-penalty
FLOOR = 1e-7  # what float32 can tell of a difference of losses


class Samples(NamedTuple):
    """``x`` [n, features] and ``y``; ``size`` to train on, as many to validate."""

    about: str
    x: np.ndarray
    y: np.ndarray
    size: int


def binary_loss(w: Array, batch: PyTree) -> Array:
    """Mean cross-entropy; ``w`` [features], ``y`` in {0, 1}."""
    scores = batch["x"] @ w
    return jnp.mean(jax.nn.softplus(scores) - batch["y"] * scores)


def class_loss(w: Array, batch: PyTree) -> Array:
    """Mean cross-entropy; ``w`` [features, classes]."""
    scores = batch["x"] @ w
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"]))


def inner_loss(loss: Callable, w: Array, alpha: Array, batch: PyTree) -> Array:
    """One penalty for each entry of the last axis."""
    squares = jnp.sum(w**2, axis=tuple(range(w.ndim - 1)))
    return loss(w, batch) + 0.5 * jnp.vdot(jnp.exp(alpha), squares)


def outer_loss(loss: Callable, w: Array, alpha: Array, batch: PyTree) -> Array:
    """Does not read the penalties."""
    del alpha
    return loss(w, batch)


@functools.cache
def bilevel(loss: Callable) -> Callable[..., hg.Bilevel]:
    """One pair of functions a loss, so that programs are traced once."""
    inner, outer = (functools.partial(f, loss) for f in (inner_loss, outer_loss))
    return functools.partial(hg.Bilevel, inner, outer)


def split(samples: Samples, seed: int) -> dict[str, PyTree]:
    """A permutation drawn from the seed."""
    order = np.random.default_rng(seed).permutation(len(samples.y))
    part = lambda rows: {"x": samples.x[rows], "y": samples.y[rows]}
    size = samples.size
    return {"inner": part(order[:size]), "outer": part(order[size : 2 * size])}


def best(loss: Callable, parts: PyTree, w: np.ndarray, alpha: np.ndarray) -> float:
    """``min h`` over the box: the lower of two ends of L-BFGS."""
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(
            lambda x: (
                jnp.asarray(x, float) if x.dtype == np.float32 else jnp.asarray(x)
            ),
            tree,
        )
        problem = bilevel(loss)(wide(parts["inner"]), wide(parts["outer"]))
        look = hg.hypergradient(problem, hg.Implicit(hg.Newton(), hg.CG()))

        def at(alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            found = look(wide(w), jnp.asarray(alpha))
            return np.asarray(found.value), np.asarray(found.hypergradient)

        ends = [
            scipy.optimize.minimize(
                *(at, np.full(alpha.shape, first, float)),
                jac=True,
                bounds=[(LOW, HIGH)] * alpha.size,
                options={"maxiter": 200, "ftol": 1e-14, "gtol": 1e-9},
            ).fun
            for first in (START, -6.0)
        ]
    return float(min(ends))


def suboptimality(
    loss: Callable, parts: PyTree, least: Array, w: Array, alpha: Array, key: Array
) -> Array:
    """``M(w*(alpha)) - h*``, no smaller than float32 can tell.

    Trained from zero, whatever the run's ``w``; NaN where that does not converge.
    """
    problem, start = bilevel(loss)(parts["inner"], parts["outer"]), jnp.zeros_like(w)
    w, _ = hg.Newton().solve(problem.inner_loss, start, alpha, parts["inner"], key)
    slope = jax.grad(problem.inner_loss)
    size = lambda w: jnp.linalg.norm(slope(w, alpha, parts["inner"]))
    value = jnp.maximum(loss(w, parts["outer"]) - least, FLOOR)
    return jnp.where(size(w) < 1e-3 * size(start), value, jnp.nan)


def system(
    load: Callable[[], Samples], loss: Callable, classes: tuple[int, ...], **fields: Any
) -> System:
    """A `System` of one of the two losses; ``classes`` is () or (their number,)."""

    def shapes() -> tuple[np.ndarray, np.ndarray]:
        w = np.zeros((load().x.shape[1], *classes), np.float32)
        return w, np.full(w.shape[-1], START, np.float32)

    @functools.cache
    def prepare(seed: int) -> PyTree:
        parts = split(load(), seed)
        return parts | {"least": np.float32(best(loss, parts, *shapes()))}

    def draw(arrays: PyTree) -> Drawn:
        inner, outer = (hg.Batches(arrays[name], BATCH) for name in ("inner", "outer"))
        parts = {name: arrays[name] for name in ("inner", "outer")}
        metric = jax.tree_util.Partial(
            functools.partial(suboptimality, loss), parts, arrays["least"]
        )
        w, alpha = map(jnp.asarray, shapes())
        return Drawn(bilevel(loss)(inner, outer), w, alpha, metric)

    return System(
        about=lambda: load().about,
        prepare=prepare,
        draw=draw,
        low=LOW,
        high=HIGH,
        source="Dagréou et al. 2022 (arXiv 2201.13409)",
        **fields,
    )


@functools.cache
def ijcnn1() -> Samples:
    """Every feature divided by its standard deviation; ten of them sum to one."""
    size = 8192
    try:
        data = hg.datasets.load("ijcnn1")
    except FileNotFoundError:
        return synthetic(size)
    x, y = data["x"], data["y"]
    about = f"ijcnn1, {size:,} and {size:,} of its 141,691 samples"
    return Samples(about, (x / x.std(axis=0)).astype(np.float32), y, size)


def synthetic(size: int) -> Samples:
    """What stands in for ijcnn1 where its files are not: half of the features count."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4 * size, 22)).astype(np.float32)
    true = np.where(np.arange(22) < 11, rng.normal(size=22), 0.0)
    y = (rng.random(4 * size) < 1 / (1 + np.exp(2 - x @ true))).astype(np.int32)
    about = (
        f"synthetic, not ijcnn1: {size:,} and {size:,} samples of 22 normal features"
    )
    return Samples(about, x, y, size)


@functools.cache
def mnist() -> Samples:
    """Means of 4x4 pixels and a constant; the digits of scikit-learn stand in."""
    try:
        data = hg.datasets.load("mnist")
        images = data["x"].reshape(-1, 7, 4, 7, 4).mean(axis=(2, 4)).reshape(-1, 49)
        size, of = 1024, "MNIST's 70,000 images, 7x7 means of their pixels"
    except FileNotFoundError:
        data = hg.datasets.load("digits")
        images, size, of = data["x"], 896, "scikit-learn's 1,797 digits, not MNIST"
    ones = np.ones((len(images), 1))
    x = np.concatenate([images / images.std(), ones], axis=1).astype(np.float32)
    about = f"{size:,} and {size:,} of {of}"
    return Samples(about, x, data["y"], size)


def judge(rows: list[Row]) -> list[Verdict]:
    """SABA below SOBA; SOBA first at its plateau."""
    return [
        lower_end(rows, "SABA", "SOBA", 1, "(o) "),
        lower_end(rows, "SRBA", "SOBA"),
        lower_end(rows, "AmIGO", "SOBA"),
        first_there(rows, "SOBA"),
    ]


LOGISTIC = system(
    ijcnn1, binary_loss, (),
    name="logistic", minutes=4, budget=100, points=40, batches=8192 // BATCH,
    rates=(3.0, 1.0, 0.3, 0.1, 0.03),
    ratios=(1e5, 3e4, 1e4, 3e3, 1e3, 300.0, 100.0, 30.0, 10.0),
)  # fmt: skip
MULTINOMIAL = system(
    mnist, class_loss, (10,),
    name="multinomial", minutes=6, budget=200, points=40, batches=1024 // BATCH,
    rates=(1.0, 0.3, 0.1, 0.03, 0.01),
    ratios=(1e4, 3e3, 1e3, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0),
)  # fmt: skip

LOGISTIC_GRID, MULTINOMIAL_GRID = map(single_loop_grid.grid, (LOGISTIC, MULTINOMIAL))
LOGISTIC_TABLE, MULTINOMIAL_TABLE = (
    single_loop_table.table(each, judge) for each in (LOGISTIC, MULTINOMIAL)
)
