"""What is saved by going on from the last `w` and adjoint, and what that holds.

The 500 penalties of `search`: the same descent to the same target, begun anew in every
estimate, or carried on. What candidates save that share one `w` is in sharing.py, and
in the same table. See README.md.
"""

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.estimators.implicit import ImplicitState
from hypergrad.studies.program import Program
from hypergrad.studies.record import Row, fingerprint
from hypergrad.studies.study import DIGITS, digits
from hypergrad.studies.table import Table, cell_by_cell
from hypergrad.studies.verdict import Verdict, conclude, geometric_mean, paired_ratio

from . import plots, sharing
from .shared.searching import (
    CLASSES,
    HIGH,
    LOW,
    PIXELS,
    SOURCE,
    START,
    STEP,
    arrays,
    exact_value,
    inner_loss,
    known,
    outer_loss,
)

SIZE, NEAR = 500, 0.05
LESS, MORE = 1.5, 1.1  # the claim: times fewer gradient-equivalents, times the bytes
SPACE = hg.spaces.Interval(LOW, HIGH)


class Carried(eqx.Module):
    """`Implicit` that goes on from what is named; the rest begins at zero.

    What is not carried is in no state, so that memory tells.
    """

    estimator: hg.Implicit
    names: tuple[str, ...] = eqx.field(static=True)
    target = "argmin"

    def init(
        self, problem: hg.Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> dict[str, PyTree]:
        return self._kept(self.estimator.init(problem, w, alpha, key))

    def estimate(
        self, problem: hg.Bilevel, state: dict, alpha: PyTree, key: Array
    ) -> tuple[hg.Estimate, dict]:
        zero = jnp.zeros((PIXELS, CLASSES))
        first = {"w": zero, "adjoint": zero}
        whole = ImplicitState(
            **first | state, num_estimates=jnp.asarray(0), grad_tol=jnp.asarray(jnp.nan)
        )
        estimate, whole = self.estimator.estimate(problem, whole, alpha, key)
        return estimate, self._kept(whole)

    def _kept(self, state: ImplicitState) -> dict[str, PyTree]:
        return {name: getattr(state, name) for name in self.names}


class Way(NamedTuple):
    """An estimator, Adam's rate, and outer steps."""

    estimator: Any
    rate: float = 0.3
    num_steps: int = 150


STARTS = {
    "cold": (),
    "warm w": ("w",),
    "warm w and adjoint": ("w", "adjoint"),
}
SOLVED = hg.Implicit(hg.Newton(tolerance=1e-4), hg.CG(rtol=1e-3))
WAYS = {start: Way(Carried(SOLVED, names)) for start, names in STARTS.items()} | {
    "unrolled, cold": Way(hg.Unrolled(hg.Descent(STEP, 100))),
    "unrolled, warm": Way(hg.Unrolled(hg.Descent(STEP, 20), warm_start=True)),
    "SOBA": Way(hg.SOBA(optax.sgd(0.5)), 0.03, 2000),
}


def problem_of(train: PyTree, val: PyTree) -> hg.Bilevel:
    return hg.Bilevel(inner_loss, outer_loss, train, val)


def descend(method: str, train: PyTree, val: PyTree) -> dict[str, Array]:
    """The run, evaluated as it goes."""
    way = WAYS[method]
    loop = hg.OuterLoop(
        problem_of(train, val),
        way.estimator,
        optax.adam(way.rate),
        space=SPACE,
        metrics={"h": jax.tree_util.Partial(exact_value, train, val)},
        eval_every=max(1, way.num_steps // 200),
    )
    state = loop.init(jnp.zeros((PIXELS, CLASSES)), jnp.full(SIZE, START))
    trace = loop.run(state, num_steps=way.num_steps)
    return {"h": trace.metrics["h"], "cost": trace.cost}


def step(
    method: str, train: PyTree, val: PyTree, state: PyTree, u: Array, moments: PyTree
) -> tuple[PyTree, Array, PyTree]:
    """One outer step, as `minimize` makes it."""
    way, problem = WAYS[method], problem_of(train, val)
    alpha, pullback = jax.vjp(SPACE.forward, u)
    estimate, state = way.estimator.estimate(problem, state, alpha, jax.random.key(0))
    updates, moments = optax.adam(way.rate).update(
        *pullback(estimate.hypergradient), moments
    )
    return state, optax.apply_updates(u, updates), moments


@functools.cache
def bytes_of(method: str) -> tuple[int, int]:
    """Peak of a step by the compiler's account, and what is carried between steps."""
    parts, alpha = arrays(0), jnp.full(SIZE, START)
    given = parts["train"], parts["val"]
    w = jnp.zeros((PIXELS, CLASSES))
    state = WAYS[method].estimator.init(problem_of(*given), w, alpha, jax.random.key(0))
    moments = optax.adam(1.0).init(alpha)
    found = hg.cost.memory(
        jax.jit(functools.partial(step, method)), *given, state, alpha, moments
    )
    leaves = [x for x in jax.tree.leaves(state) if eqx.is_array(x)]
    return found.peak, sum(leaf.nbytes for leaf in leaves)


@functools.cache
def descent_of(method: str) -> Program:
    return Program(functools.partial(descend, method))


def measure(cell: Row) -> Row:
    """One run of one way."""
    method, seed = cell["method"], cell["seed"]
    if method in sharing.WAYS:
        return sharing.measure(cell)
    parts, of = arrays(seed), known(seed, SIZE)
    found = descent_of(method)(parts["train"], parts["val"])
    h, cost = (np.asarray(found[name], float) for name in ("h", "cost"))
    peak, carried = bytes_of(method)
    return reached(h, cost, of.target + NEAR * (of.start - of.target)) | {
        "bytes": peak,
        "carried_bytes": carried,
        "start": of.start,
        "target": of.target,
        "data": DIGITS,
        "data_sha256": fingerprint(digits()),
    }


def reached(h: np.ndarray, cost: np.ndarray, bound: float) -> Row:
    """Cost and outer steps until at the bound; None where a run never was."""
    there = np.flatnonzero(h <= bound)
    return {
        "cost": float(cost[there[0]]) if there.size else None,
        "steps": int(there[0]) + 1 if there.size else None,
        "spent": float(np.nanmax(cost)),
    }


# Judging.


def lane(rows: list[Row], method: str, name: str) -> np.ndarray:
    """A column by seed; NaN where a row has no number."""
    mine = sorted(
        (r for r in rows if r["method"] == method), key=lambda row: row["seed"]
    )
    return np.array([row[name] for row in mine], float)


def fewer(rows: list[Row], first: str, second: str, claimed: bool = False) -> Verdict:
    """How many times fewer gradient-equivalents the first needs than the second."""
    ours, theirs = (lane(rows, method, "cost") for method in (first, second))
    bytes_ = lane(rows, first, "bytes").mean() / lane(rows, second, "bytes").mean()
    what = f"{'(o) ' * claimed}{first} against {second}"
    lost = [m for m, x in ((first, ours), (second, theirs)) if np.isnan(x).any()]
    if lost:
        text = f"{what}: never there on every seed: {', '.join(lost)}"
        return Verdict(f"{text}: not reproduced" if claimed else text)
    mean, low, high = paired_ratio(theirs, ours)
    text = (
        f"{what}: {mean:.3g} [{low:.3g}, {high:.3g}] times fewer gradient-equivalents, "
        f"{bytes_:.3g} times the bytes"
    )
    if not claimed:
        return Verdict(text)
    text += f", at least {LESS:g} and at most {MORE:g} claimed"
    met = bool(mean >= LESS and low > 1 and bytes_ <= MORE)
    half = math.log(high / mean)
    return conclude(text, met, ours.size, half, math.log(LESS))


def judge(rows: list[Row]) -> list[Verdict]:
    """Both against cold, w against cold, what the adjoint adds; what sharing does."""
    cold, warm, both = STARTS
    return [
        fewer(rows, both, cold, claimed=True),
        fewer(rows, warm, cold),
        fewer(rows, both, warm),
        *sharing.judge(rows),
    ]


# Showing.


def markdown(table: Table, rows: list[Row], command: str) -> str:
    lines = [
        f"# {table.name}",
        "",
        f"{DIGITS}, as in [search](search.md): {SIZE} penalties, "
        f"{len({row['seed'] for row in rows})} seeds. Gradient-equivalents (grad-eq) "
        f"until within {NEAR:.0%} of L-BFGS, geometric mean and range; > where a run "
        "was never there and counts with what it spent. Peak: bytes of one compiled "
        f"outer step; carried: of the state between two. Command: `{command}`",
        "",
        "| method | there | grad-eq | range | outer steps | peak kB | carried kB |",
        "|" + "---|" * 7,
    ]
    for method in WAYS:
        cost, steps = (lane(rows, method, name) for name in ("cost", "steps"))
        lost = np.isnan(cost)
        cost = np.where(lost, lane(rows, method, "spent"), cost)
        cells = [
            method,
            f"{np.sum(~lost)} of {lost.size}",
            f"{'> ' if lost.any() else ''}{geometric_mean(cost):,.0f}",
            f"{cost.min():,.0f} to {cost.max():,.0f}",
            "-" if lost.all() else f"{np.nanmean(steps):.0f}",
            f"{lane(rows, method, 'bytes').mean() / 1e3:.1f}",
            f"{lane(rows, method, 'carried_bytes').mean() / 1e3:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *sharing.markdown(rows)]
    return "\n".join([*lines, "", *(v.line for v in judge(rows))])


def draw(rows: list[Row], path: Path) -> None:
    """Memory against cost: a dot a seed, hollow where a run was never there."""
    points = {
        method: [
            (row["spent"] if row["cost"] is None else row["cost"],
             row["bytes"] / 1e3, row["cost"] is not None)
            for row in rows
            if row["method"] == method
        ]
        for method in WAYS
    }  # fmt: skip
    panels = {
        f"{SIZE} penalties, until within {NEAR:.0%}": points,
        "cells of an architecture; in the key, points of regret": sharing.points(rows),
    }
    plots.trade_off(panels, path)


TABLE = Table(
    name="warmstart",
    source=f"{SOURCE}; Bender et al. 2018",
    minutes=5,
    seeds=5,
    plan=lambda scale, seeds: [
        {"method": method, "seed": seed}
        for method in (*WAYS, *sharing.WAYS)
        for seed in range(seeds)
    ],
    run=cell_by_cell(measure, markdown, draw),
    judge=judge,
)
