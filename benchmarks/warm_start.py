"""Warm starts: what they save on the way to the same target, and their memory.

Question. What does it save to continue from the last w, and from the last adjoint, and
how much memory does it need? The second part asks the same about weights that
candidates share.

Problem. That of the table search with 500 hyperparameters (softmax regression on the
digits with one log-penalty per weight) and the same start. The target is reached within
5% of the way from the minimum that L-BFGS finds back to the start.

Rows. Implicit with Newton's method to 1e-4 of the gradient at its start, and CG to
1e-3: "cold" (w and adjoint start at zero in every estimate), "warm w", and "warm w and
adjoint" (the default). In addition "unrolled, cold" (100 steps of momentum from zero,
with checkpoints), "unrolled, warm" (20 steps), and SOBA (w, adjoint and alpha make one
step each). Adam has rate 0.3, for SOBA 0.03, and makes 150 steps, for SOBA 2,000. These
are the rates that the table search chose on seeds 100 and 101.

Measured. Gradient-equivalents (grad-eq) and outer steps until the target is reached;
the peak bytes, by the compiler's memory analysis, of one outer step that is compiled
alone, with data, alpha, the carried state and Adam's state; and the bytes of the state
carried between two steps. A run that never reached the target counts with its total
cost, which is marked by ">".

Claim, on seeds 0 to 4. Warm w and adjoint need at least 1.5 times fewer
gradient-equivalents than cold (geometric mean, the paired 95% interval above one), at
no more than 1.1 times the bytes. Lines without a claim compare warm w with cold, and
report what the adjoint adds. A claim about a run that never reached the target is not
supported.

Weights that candidates share. What does it save to train one supernet and to compare
all candidates by its weights instead of training each, how much memory does it need,
and how much worse is the candidate that is chosen? The candidates are the 125 cells of
the table architecture, sampled uniformly with replacement; split and training loss are
the same, and the cross-entropy on all 400 validation images chooses. The chosen cell,
that with the lowest value, is evaluated by the mean test accuracy of eight trainings of
its own, whose starts and batches are those of no seed here.

"each of 65 from scratch" is random search: each training makes 300 steps from a start
that depends on the seed (momentum 0.9, the rate falls as a cosine, batches of 50).
"supernet" is the searcher OneShot: as many steps as one training and ten times as many,
each with a newly sampled cell, then 65 samples are evaluated with its weights, one at a
time or 16 at once. "each of 10 from scratch" costs as much as the longer supernet. The
first rate was chosen from 0.025, 0.05, 0.1, 0.2 and 0.4 by the lowest regret on seeds
100 and 101, with 64 samples: 0.05 for both supernets (0.025 to 0.2 were tried; 0.025
was no better), 0.2 from scratch (0.05 to 0.4).

Measured are the gradient-equivalents of the whole search, the regret (points of
accuracy below the best of the 125 cells), the rank, Spearman's correlation of the
values with the true errors of the sampled cells, and the peak bytes of a step of
training or of the values computed at once, whichever is larger, with the data. The
arrays of every row hold the kernels of all operations, though a single cell needs only
its own. For several cells at once all operations are computed for each cell and one is
kept, which gradient-equivalents do not count. From scratch a cell is trained again if
it is sampled again; lines report the number of different cells, which depends only on
the seed, and the saving if each were trained once. Nothing is claimed: lines report
what is saved, the memory, and the added regret, paired by seed.

The rows were made while each step of Newton's method computed a value in addition to
its gradient, a third of a gradient-equivalent. A row of Implicit that is measured again
costs slightly less.

Intervals. They are of costs until a value of the outer loss is reached, and of regrets
on one split that all seeds share, so that the correction for re-splits of one data set
(Nadeau and Bengio 2003) does not apply.
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
from hypergrad.bench import (
    Finding,
    MeasurementTable,
    Row,
    geometric_mean,
    ratio_interval,
)
from hypergrad.bench.report import markdown_table
from hypergrad.estimators.implicit import ImplicitState

from .shared import plots, sharing
from .shared.cost_ratios import costs_or_bounds
from .shared.outcomes import conclude
from .shared.program import Program
from .shared.row_columns import column, mean_text, rows_by_seed
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
from .shared.task_runs import implicit_by_cg
from .shared.tuning import DIGITS, cells_of, digits

SIZE = 500  # number of hyperparameters
TOLERANCE = 0.05  # of the way from the target back to the start
MIN_SAVING, MAX_MEMORY = 1.5, 1.1  # claimed ratios of costs and of bytes
SPACE = hg.spaces.Interval(LOW, HIGH)


class PartlyWarm(eqx.Module):
    """`Implicit` that carries only some parts of its state; the others start at zero.

    The other parts are not in the carried state, so that its bytes are not counted.

    Attributes:
      estimator: The estimator.
      names: Fields of `ImplicitState` that are carried, of "w" and "adjoint".
    """

    estimator: hg.Implicit
    names: tuple[str, ...] = eqx.field(static=True)
    target = "argmin"

    def init(
        self, problem: hg.Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> dict[str, PyTree]:
        """Returns the carried parts of the initial state."""
        return self._select(self.estimator.init(problem, w, alpha, key))

    def estimate(
        self, problem: hg.Bilevel, state: dict, alpha: PyTree, key: Array
    ) -> tuple[hg.Estimate, dict]:
        """Returns the estimate and the carried parts of the next state."""
        zero = jnp.zeros((PIXELS, CLASSES))
        full_state = ImplicitState(
            **{"w": zero, "adjoint": zero} | state,
            num_estimates=jnp.asarray(0),
            grad_tol=jnp.asarray(jnp.nan),
        )
        estimate, full_state = self.estimator.estimate(problem, full_state, alpha, key)
        return estimate, self._select(full_state)

    def _select(self, state: ImplicitState) -> dict[str, PyTree]:
        return {name: getattr(state, name) for name in self.names}


class MethodConfig(NamedTuple):
    """An estimator, Adam's rate, and the number of outer steps."""

    estimator: Any
    rate: float = 0.3
    num_steps: int = 150


CARRIED = {
    "cold": (),
    "warm w": ("w",),
    "warm w and adjoint": ("w", "adjoint"),
}
IMPLICIT = implicit_by_cg(hg.Newton(tolerance=1e-4), rtol=1e-3)
CONFIGS = {
    label: MethodConfig(PartlyWarm(IMPLICIT, names)) for label, names in CARRIED.items()
} | {
    "unrolled, cold": MethodConfig(hg.Unrolled(hg.Descent(STEP, 100))),
    "unrolled, warm": MethodConfig(hg.Unrolled(hg.Descent(STEP, 20), warm_start=True)),
    "SOBA": MethodConfig(hg.SOBA(optax.sgd(0.5)), 0.03, 2000),
}


def problem_of(train: PyTree, val: PyTree) -> hg.Bilevel:
    """Returns the problem with the given splits."""
    return hg.Bilevel(inner_loss, outer_loss, train, val)


def optimize_alpha(method: str, train: PyTree, val: PyTree) -> dict[str, Array]:
    """Returns exact outer value and cost at up to 200 outer steps."""
    config = CONFIGS[method]
    loop = hg.OuterLoop(
        problem_of(train, val),
        config.estimator,
        optax.adam(config.rate),
        space=SPACE,
        metrics={"h": jax.tree_util.Partial(exact_value, train, val)},
        eval_every=max(1, config.num_steps // 200),
    )
    state = loop.init(jnp.zeros((PIXELS, CLASSES)), jnp.full(SIZE, START))
    trace = loop.run(state, num_steps=config.num_steps)
    return {"h": trace.metrics["h"], "cost": trace.cost}


def outer_step(
    method: str, train: PyTree, val: PyTree, state: PyTree, u: Array, opt_state: PyTree
) -> tuple[PyTree, Any, PyTree]:
    """Makes one outer step, as `minimize` makes it."""
    config, problem = CONFIGS[method], problem_of(train, val)
    alpha, pullback = jax.vjp(SPACE.forward, u)
    estimate, state = config.estimator.estimate(
        problem, state, alpha, jax.random.key(0)
    )
    (gradient,) = pullback(estimate.hypergradient)
    updates, opt_state = optax.adam(config.rate).update(gradient, opt_state)
    return state, optax.apply_updates(u, updates), opt_state


@functools.cache
def measure_bytes(method: str) -> tuple[int, int]:
    """Returns the peak bytes of an outer step, and the bytes of the carried state."""
    splits, alpha = arrays(0), jnp.full(SIZE, START)
    data = splits["train"], splits["val"]
    w = jnp.zeros((PIXELS, CLASSES))
    state = CONFIGS[method].estimator.init(
        problem_of(*data), w, alpha, jax.random.key(0)
    )
    opt_state = optax.adam(1.0).init(alpha)
    memory = hg.cost.memory(
        jax.jit(functools.partial(outer_step, method)), *data, state, alpha, opt_state
    )
    leaves = [x for x in jax.tree.leaves(state) if eqx.is_array(x)]
    return memory.peak, sum(leaf.nbytes for leaf in leaves)


@functools.cache
def program_of(method: str) -> Program:
    """Returns the compiled `optimize_alpha` of a method."""
    return Program(functools.partial(optimize_alpha, method))


def measure_cell(cell: Row, rows: list[Row]) -> Row:
    """Returns the measurements of one run."""
    del rows
    method, seed = cell["method"], cell["seed"]
    if method in sharing.CONFIGS:
        return sharing.measure_cell(method, seed)
    splits, reference = arrays(seed), known(seed, SIZE)
    result = program_of(method)(splits["train"], splits["val"])
    h, cost = (np.asarray(result[name], float) for name in ("h", "cost"))
    peak, carried = measure_bytes(method)
    bound = reference.target + TOLERANCE * (reference.start - reference.target)
    return cost_to_reach(h, cost, bound) | {
        "bytes": peak,
        "carried_bytes": carried,
        "start": reference.start,
        "target": reference.target,
    }


def cost_to_reach(h: np.ndarray, cost: np.ndarray, bound: float) -> Row:
    """Returns cost and outer steps until h is at most the bound; None if it never is.

    The field "spent" is the cost of the whole run.
    """
    indices = np.flatnonzero(h <= bound)
    return {
        "cost": float(cost[indices[0]]) if indices.size else None,
        "steps": int(indices[0]) + 1 if indices.size else None,
        "spent": float(np.nanmax(cost)),
    }


# Findings.


def compare_costs(
    rows: list[Row], first: str, second: str, is_claimed: bool = False
) -> Finding:
    """Returns how many times fewer gradient-equivalents the first method needs."""
    costs = {method: column(rows, "cost", method=method) for method in (first, second)}
    memory = (
        column(rows, "bytes", method=first).mean()
        / column(rows, "bytes", method=second).mean()
    )
    text = f"{first} against {second}"
    failed = [method for method, cost in costs.items() if np.isnan(cost).any()]
    if failed:
        text += f": the target was not reached on every seed by {', '.join(failed)}"
        return Finding(text, "not supported" if is_claimed else None)
    saving = ratio_interval(costs[second], costs[first])
    text += (
        f": {saving:.3g} times fewer gradient-equivalents, {memory:.3g} times the bytes"
    )
    if not is_claimed:
        return Finding(text)
    text += f", at least {MIN_SAVING:g} and at most {MAX_MEMORY:g} claimed"
    is_met = saving.mean >= MIN_SAVING and saving.low > 1 and memory <= MAX_MEMORY
    half_width = math.log(saving.high / saving.mean)
    num_seeds = costs[first].size
    return conclude(text, bool(is_met), num_seeds, half_width, math.log(MIN_SAVING))


def findings(rows: list[Row]) -> list[Finding]:
    """Returns what each warm start saves, and what shared weights save."""
    cold, warm, both = CARRIED
    pairs = ((both, cold, True), (warm, cold, False), (both, warm, False))
    labels = {row["method"] for row in rows}
    own = [compare_costs(rows, *pair) for pair in pairs if {*pair[:2]} <= labels]
    return own + sharing.findings(rows)


# The printed form.


def body(rows: list[Row]) -> list[str]:
    """Returns the tables of warm starts and of shared weights."""
    text = (
        f"**Warm starts.** {SIZE} penalties. grad-eq: geometric mean until within "
        f"{TOLERANCE:.0%} of L-BFGS. Peak: bytes of one compiled outer step. Carried: "
        "bytes of the state between two steps."
    )
    headings = (
        "method", "reached", "grad-eq", "range", "outer steps", "peak kB", "carried kB"
    )  # fmt: skip
    lines = []
    labels = {row["method"] for row in rows}
    for method in CONFIGS:
        if method not in labels:
            continue
        method_rows = rows_by_seed(rows, method=method)
        values = (column(method_rows, name) for name in ("cost", "spent"))
        cost, num_misses = costs_or_bounds(*values)
        cells = [
            method,
            f"{cost.size - num_misses} of {cost.size}",
            f"{'> ' if num_misses else ''}{geometric_mean(cost):,.0f}",
            f"{cost.min():,.0f} to {cost.max():,.0f}",
            mean_text(method_rows, "steps", ".0f"),
            mean_text(method_rows, "bytes", ".1f", 1e-3),
            mean_text(method_rows, "carried_bytes", ".1f", 1e-3),
        ]
        lines.append(cells)
    return [text, "", *markdown_table(headings, lines), "", *sharing.body(rows)]


def plot(rows: list[Row], path: Path) -> None:
    """Plots memory against cost, hollow where a run never reached the target."""
    points = {
        method: [
            (
                row["spent"] if row["cost"] is None else row["cost"],
                row["bytes"] / 1e3,
                row["cost"] is not None,
            )
            for row in rows
            if row["method"] == method
        ]
        for method in CONFIGS
    }
    panels = {
        f"{SIZE} penalties, until within {TOLERANCE:.0%}": points,
        "cells of an architecture; legend: points of regret": sharing.points(rows),
    }
    panels = {title: x for title, x in panels.items() if any(x.values())}
    plots.trade_off(panels, path)


table = MeasurementTable(
    cells=cells_of((*CONFIGS, *sharing.CONFIGS)),
    measure_cell=measure_cell,
    findings=findings,
    body=body,
    plot=plot,
    seeds=5,
    minutes=5,
    paradigm="supervised",
    source=f"{SOURCE}; Bender et al. 2018",
    data=DIGITS,
    arrays=digits,
)
