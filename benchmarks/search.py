"""The saving of hypergradients over searches that only use values.

Question: What does a hypergradient save against searches that only see values, with 2,
20 and 500 hyperparameters?

Data: scikit-learn's digits, by a permutation drawn from the seed: 200 to train on, 800
to validate, 797 to test, the 50 pixels that vary most on the training digits, less
their means there. Two fifths of the training labels are replaced by another class at
random: a setting made for penalties to matter. The test split is read once, by the last
`alpha` of a run.

Model: Softmax regression without bias, 500 weights; log-penalties in [-6, 0], all -3 at
first: one a half of the pixels (the more varying and the rest; 2), one a half and class
(20), or one a weight (500); outer loss the cross-entropy on validation.

Target: `h(alpha)` is the outer loss at the training's minimum; `h*` where L-BFGS on the
exact hypergradient ends (Newton's method to 1e-7, CG to 1e-6, float64, at most 100
iterations from the start). A run is *there* at its first `alpha` with `h <= h* + 0.01
(h(start) - h*)`, 1% of the way back.

Cost: Gradient-equivalents up to and including the estimate, or the trial, at that
`alpha`, and those of the training at the start, from whose `w` every method goes on. A
black box sees the value of its trial, trained by Newton's method to 1e-4; a run with
hypergradients is evaluated outside the ledger, at some 125 of its steps, by training
from zero to 1e-5. A run that is never there has a lower bound: what was spent.

Rows: With hypergradients, Adam in the unconstrained coordinates of an interval:
*implicit* (Newton to 1e-3, CG to 0.1, both warm), *implicit, 10 steps* (of momentum,
rate 0.5, warm; 5 products), *unrolled* (20 such steps, warm), *SOBA* (on all data, rate
0.5). Without: the product grid (2 only), GaussianProcess (2), Sobol and TPE (2 and 20),
Random, CMAES (the same library as `hg.searchers.CMAES`; a draw outside the box is
repeated 100 times, with 500 axes 4 times, then clipped: at 100 no run with 500 axes had
ended after 12 minutes, and its three settings were tuned anew with 4). What is left out
at a size has proposals too slow for it. `PopulationBased` is not among them: its `w`
belongs to a course of `alpha`, not to one.

Budget: 8,000 gradient-equivalents with hypergradients. *Best* is the row with
hypergradients that tuned best. Black boxes have 20 times what the best needed on that
seed with 2 and 20 hyperparameters, 60 times with 500, not the 200 that would take
hours; TPE at most 100 trials, GaussianProcess 40, as their proposals are slow: their
bounds are lower.

Tuning, the same for every row (stage `tuning`): Seeds 100 and 101, three settings,
8,000 gradient-equivalents a run: the one with the least mean of log cost, where a run
that is not there counts as 8,000 times what is left of the way over 1%. Settings:
Adam's rate in {0.1, 0.3, 1}, of SOBA {0.01, 0.03, 0.1}; the half-width of the box about
the start in {1, 2, 3}; of the grid 5, 9 or 13 points an axis; of CMAES a first step of
{0.02, 0.05, 0.1} of the box.

Criterion, seeds 0..4. (o) With 500 hyperparameters the best row with hypergradients is
there with at least 50 times fewer gradient-equivalents than each black box that has 60
times: geometric mean of the ratio paired by seed, its 95% interval at or above 50, a
black box that is never there counting with its bound, and none where the row with
hypergradients is not there on every seed. With 2 and 20 the lines say who is first, by
geometric means, and by how much; nothing is claimed.

Intervals: They are of costs until a value of the outer loss is reached, and not of test
errors, so that the correction for re-splits of one data set (Nadeau and Bengio 2003)
does not apply: they are about further splits of these digits.
"""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad.bench import (
    Cell,
    Finding,
    MeasurementTable,
    Row,
    Stage,
    geometric_mean,
    ratio_interval,
    select,
)
from hypergrad.bench.report import markdown_table

from .shared import plots
from .shared.cost_ratios import costs_or_bounds, rank_by_cost
from .shared.outcomes import conclude
from .shared.row_columns import column
from .shared.searching import (
    BUDGET,
    CLASSES,
    DESCENTS,
    METHODS,
    NEAR,
    PIXELS,
    REFERENCES,
    SCORED,
    SEARCHING,
    SIZES,
    SOURCE,
    START,
    arrays,
    cells_at,
    known,
    run,
    score,
    settings_of,
)
from .shared.stages import tuning_row
from .shared.tuning import DIGITS, choose_on_seeds, digits

#: Budget of a black box, as a multiple of the cost of the best row with hypergradients.
BUDGET_FACTORS = {2: 20, 20: 20, 500: 60}
MIN_RATIO, LARGE = 50.0, 500

# Tuning.


def tune(cell: Cell, rows: list[Row]) -> Row:
    """Returns the scores of a method at each of its settings, on both seeds."""
    del rows
    method, size = cell["method"], cell["size"]
    settings = settings_of(method)
    run_on = lambda setting, seed: run(method, seed, size, setting, BUDGET)
    choice = choose_on_seeds(run_on, settings, score, cost=lambda row: row["spent"])
    return {
        "settings": list(settings),
        "scores": choice.scores,
        "setting": choice.setting,
        "tuning_cost": choice.tuning_cost,
    }


def tuning_body(rows: list[Row]) -> list[str]:
    """Returns the settings with their scores, and which chosen ones lie at an edge."""
    cells = []
    for row in rows:
        pairs = zip(row["settings"], row["scores"], strict=True)
        tried = ", ".join(f"{x:g} ({y:.2f})" for x, y in pairs)
        chosen, cost = f"{row['setting']:g}", f"{row['tuning_cost']:,.0f}"
        cells.append([str(row["size"]), row["method"], tried, chosen, cost])
    edge = [
        f"{row['method']} ({row['size']})"
        for row in rows
        if row["setting"] in (row["settings"][0], row["settings"][-1])
    ]
    line = f"- {len(edge)} of {len(rows)} chose a setting at an edge of their three"
    headings = (
        "hyperparameters", "method", "settings (score)", "chosen", "tuning grad-eq"
    )  # fmt: skip
    return [
        "In brackets the mean of log cost until within 1%, beyond the budget by what "
        "is left; the smallest is chosen.",
        "",
        *markdown_table(headings, cells),
        "",
        line + (f": {', '.join(edge)}" if edge else ""),
    ]


# Measuring.


def best_descent(size: int, rows: list[Row]) -> str:
    """Returns the method with hypergradients that tuned best."""
    min_score = lambda method: min(tuning_row(rows, method=method, size=size)["scores"])
    return min(DESCENTS, key=min_score)


def budget_of(
    method: str, seed: int, size: int, rows: list[Row]
) -> tuple[float, float | None]:
    """Returns a run's budget, and the cost of the best with hypergradients, or None."""
    best = best_descent(size, rows)
    setting = tuning_row(rows, method=best, size=size)["setting"]
    best_cost = run(best, seed, size, setting, BUDGET)["cost"]
    if method in DESCENTS:
        return BUDGET, best_cost
    return BUDGET_FACTORS[size] * (
        BUDGET if best_cost is None else best_cost
    ), best_cost


def measure(cell: Cell, rows: list[Row]) -> Row:
    """Returns one run at its chosen setting; the test digits by its last ``alpha``."""
    method, seed, size = cell["method"], cell["seed"], cell["size"]
    target = known(seed, size)
    if method in REFERENCES:
        is_target = method == REFERENCES[1]
        alpha = target.alpha if is_target else np.full(size, START)
        row: Row = {"cost": None, "left": 0.0 if is_target else 1.0}
    else:
        tuning = tuning_row(rows, method=method, size=size)
        budget, best_cost = budget_of(method, seed, size, rows)
        row = run(method, seed, size, tuning["setting"], budget) | {
            "setting": tuning["setting"], "run_budget": budget, "best_cost": best_cost,
            "best": best_descent(size, rows), "tuning_cost": tuning["tuning_cost"],
        }  # fmt: skip
        alpha = np.array(row.pop("alpha"))
    splits = arrays(seed)
    zero, key = jnp.zeros((PIXELS, CLASSES)), jax.random.key(0)
    args = zero, jnp.asarray(alpha, jnp.float32), key
    test_loss, test_error = SCORED(splits["train"], splits["test"], *args)
    value, _ = SCORED(splits["train"], splits["val"], *args)
    return row | {
        "start": target.start, "target": target.target, "end": float(value),
        "test_loss": float(test_loss), "test_error": float(test_error),
    }  # fmt: skip


# Findings.


def costs_to_target(rows: list[Row], method: str, size: int) -> tuple[np.ndarray, int]:
    """Returns costs by seed, and how many are bounds of runs that miss the target."""
    values = lambda name: column(rows, name, method=method, size=size)
    return costs_or_bounds(values("cost"), values("spent"))


def ratio_finding(rows: list[Row], method: str, best: str, size: int) -> Finding:
    """Returns the cost of a black box over that of the best with hypergradients."""
    search_cost, num_misses = costs_to_target(rows, method, size)
    best_cost, best_misses = costs_to_target(rows, best, size)
    is_claimed = size == LARGE and SEARCHING[method].most[size] == math.inf
    claim = f", at least {MIN_RATIO:g} claimed" if is_claimed else ""
    text = f"{size} hyperparameters, {method} over {best}: "
    if best_misses:
        text += f"{best} misses the target on {best_misses} of {best_cost.size} seeds"
        return Finding(text + claim, "not supported" if is_claimed else None)
    ratio = ratio_interval(search_cost, best_cost)
    text += f"{ratio:.3g} times as many gradient-equivalents"
    if num_misses:
        text += f" at least, {num_misses} of {search_cost.size} seeds miss the target"
    if not is_claimed:
        return Finding(text)
    half_width, is_met = math.log(ratio.high / ratio.mean), bool(ratio.low >= MIN_RATIO)
    log_effect = math.log(MIN_RATIO)
    return conclude(text + claim, is_met, search_cost.size, half_width, log_effect)


def winner(rows: list[Row], size: int) -> Finding:
    """Returns the cheapest of the methods that reach the target on every seed."""
    labels = [method for method in METHODS if select(rows, method=method, size=size)]
    costs = {method: costs_to_target(rows, method, size) for method in labels}
    means, text = rank_by_cost(costs, ".0f")
    unit = " gradient-equivalents" if means else ""
    return Finding(f"{size} hyperparameters: {text}{unit}")


def findings(rows: list[Row]) -> list[Finding]:
    """Returns the winner at each size, and what black boxes need against the best."""
    lines = []
    for size in SIZES:
        best = next(
            (x["best"] for x in rows if x["size"] == size and x.get("best")), ""
        )
        if not select(rows, method=best, size=size):
            continue
        lines.append(winner(rows, size))
        lines += [
            ratio_finding(rows, method, best, size)
            for method in SEARCHING
            if select(rows, method=method, size=size)
        ]
    return lines


# Report.


def body(rows: list[Row]) -> list[str]:
    """Returns a table per size."""
    headings = (
        "method", "reached", "grad-eq", "range", "left", "test loss", "test error",
        "evaluations", "setting", "tuning grad-eq",
    )  # fmt: skip
    lines = [
        f"Gradient-equivalents (grad-eq) until within {NEAR:.0%} of L-BFGS, geometric "
        "mean and range; > where a run misses that and counts with its whole cost. "
        "Left: of the way to L-BFGS at the best evaluation, median. Test loss and "
        "error of the last alpha of a run, means.",
        "",
    ]
    for size in SIZES:
        cells = [
            table_cells(rows, method, size)
            for method in (*REFERENCES, *METHODS)
            if select(rows, method=method, size=size)
        ]
        lines += [
            f"**{size} hyperparameters**",
            "",
            *markdown_table(headings, cells),
            "",
        ]
    return lines[:-1]


def table_cells(rows: list[Row], method: str, size: int) -> list[str]:
    """Returns a row of the printed table."""
    values = lambda name: column(rows, name, method=method, size=size)
    tests = [f"{values('test_loss').mean():.3f}", f"{values('test_error').mean():.1%}"]
    left = f"{np.median(values('left')):.1%}"
    if method in REFERENCES:
        return [method, "-", "-", "-", left, *tests, "-", "-", "-"]
    cost, num_misses = costs_to_target(rows, method, size)
    return [
        method,
        f"{cost.size - num_misses} of {cost.size}",
        f"{'> ' if num_misses else ''}{geometric_mean(cost):,.0f}",
        f"{cost.min():,.0f} to {cost.max():,.0f}",
        left,
        *tests,
        f"{values('evaluations').mean():.0f}",
        f"{values('setting')[0]:g}",
        f"{values('tuning_cost')[0]:,.0f}",
    ]


def plot(rows: list[Row], path: Path) -> None:
    """Plots the remaining fraction of the way against cost, a panel per size."""
    panels = {
        f"{size} hyperparameters": {
            method: [
                (row["curve_cost"], row["curve"])
                for row in select(rows, method=method, size=size)
            ]
            for method in METHODS
            if select(rows, method=method, size=size)
        }
        for size in SIZES
    }
    plots.remaining(panels, tuple(SEARCHING), NEAR, path)


table = MeasurementTable(
    cells=lambda scale, seeds: cells_at(range(seeds), with_references=True),
    measure_cell=measure,
    earlier_stages=(
        Stage("tuning", lambda scale, seeds: cells_at([0]), tune, tuning_body),
    ),
    findings=findings,
    body=body,
    plot=plot,
    seeds=5,
    minutes=20,
    paradigm="search",
    source=SOURCE,
    data=DIGITS,
    arrays=digits,
)
