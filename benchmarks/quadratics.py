"""Quadratics of many samples, whose value, gradient and optimum are closed forms.

    L(w, a) = mean_i (x_i . w - z_i . a - y_i)² / 2 + mu ||w||² / 2
    M(w, a) = mean_j (x'_j . w - y'_j)² / 2 + delta ||a||² / 2

so that ``w*(a) = H^-1 (C a + c)`` with ``H = X'X / n + mu``, ``C = X'Z / n``,
``c = X'y / n``, and ``M(w*(a), a)`` is a quadratic: ``h(a) - h(a*)`` is
``(a - a*)' Q (a - a*) / 2`` with ``Q = (H^-1 C)' H' (H^-1 C) + delta``.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.studies.record import Row
from hypergrad.studies.verdict import Verdict

from . import single_loop_grid, single_loop_table
from .shared.single_loop import Drawn, System
from .shared.single_loop_table import first_there, lower_end

NUM_INNER, NUM_OUTER, NUM_W, NUM_ALPHA = 4096, 1024, 100, 10
MU, DELTA, BATCH = 0.1, 0.1, 64


def inner_loss(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Ridge regression on what ``alpha`` leaves."""
    left = batch["x"] @ w - batch["z"] @ alpha - batch["y"]
    return 0.5 * jnp.mean(left**2) + 0.5 * MU * jnp.vdot(w, w)


def outer_loss(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Squared error on other samples, and what ``alpha`` costs."""
    left = batch["x"] @ w - batch["y"]
    return 0.5 * jnp.mean(left**2) + 0.5 * DELTA * jnp.vdot(alpha, alpha)


def samples(seed: int) -> tuple[PyTree, PyTree]:
    """Inner and outer samples; the spectrum of the inputs falls from 1 to 0.01."""
    rng = np.random.default_rng(seed)
    inputs = lambda n: np.logspace(0, -1, NUM_W) * rng.normal(size=(n, NUM_W))
    true = rng.normal(size=NUM_W)
    inner = {"x": inputs(NUM_INNER)}
    inner["z"] = inner["x"][:, :NUM_ALPHA] + rng.normal(size=(NUM_INNER, NUM_ALPHA))
    inner["y"] = inner["x"] @ true + rng.normal(size=NUM_INNER)
    outer = {"x": inputs(NUM_OUTER)}
    outer["y"] = outer["x"] @ (true + 1) + rng.normal(size=NUM_OUTER)
    return inner, outer


def closed_form(inner: PyTree, outer: PyTree) -> tuple[np.ndarray, np.ndarray]:
    """``(a*, Q)``."""
    H = inner["x"].T @ inner["x"] / NUM_INNER + MU * np.eye(NUM_W)
    response = np.linalg.solve(H, inner["x"].T @ inner["z"] / NUM_INNER)
    start = np.linalg.solve(H, inner["x"].T @ inner["y"] / NUM_INNER)
    seen = outer["x"] @ response
    Q = seen.T @ seen / NUM_OUTER + DELTA * np.eye(NUM_ALPHA)
    left = outer["y"] - outer["x"] @ start
    return np.linalg.solve(Q, seen.T @ left / NUM_OUTER), Q


@functools.cache
def prepare(seed: int) -> PyTree:
    """Samples and closed form, in float32."""
    inner, outer = samples(seed)
    best, Q = closed_form(inner, outer)
    arrays = {"inner": inner, "outer": outer, "best": best, "Q": Q}
    return jax.tree.map(np.float32, arrays)


def suboptimality(best: Array, Q: Array, w: Array, alpha: Array, key: Array) -> Array:
    """``h(alpha) - h(a*)``."""
    del w, key
    off = alpha - best
    return 0.5 * jnp.vdot(off, Q @ off)


def draw(arrays: PyTree) -> Drawn:
    """A problem of its own for every seed, from zero."""
    data = (hg.Batches(arrays[name], BATCH) for name in ("inner", "outer"))
    return Drawn(
        hg.Bilevel(inner_loss, outer_loss, *data),
        jnp.zeros(NUM_W),
        jnp.zeros(NUM_ALPHA),
        jax.tree_util.Partial(suboptimality, arrays["best"], arrays["Q"]),
    )


SYSTEM = System(
    name="quadratics",
    source="after the quadratics of Dagréou et al. 2022 (arXiv 2201.13409)",
    minutes=4,
    about=lambda: f"simulated, {NUM_INNER:,} and {NUM_OUTER:,} samples of 100 numbers",
    prepare=prepare,
    draw=draw,
    budget=400,
    points=100,
    batches=NUM_INNER // BATCH,
    rates=(1.0, 0.3, 0.1, 0.03, 0.01),
    ratios=(3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003),
    low=-10.0,
    high=10.0,
)


def judge(rows: list[Row]) -> list[Verdict]:
    """SABA below SOBA; SOBA first at its plateau."""
    return [
        lower_end(rows, "SABA", "SOBA", 10),
        lower_end(rows, "SRBA", "SOBA"),
        lower_end(rows, "SOBA, falling", "SOBA"),
        first_there(rows, "SOBA"),
    ]


GRID = single_loop_grid.grid(SYSTEM)
TABLE = single_loop_table.table(SYSTEM, judge)
