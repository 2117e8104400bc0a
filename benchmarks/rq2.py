"""The metric itself as the outer objective: three kinds of hypergradients, or search.

Reuters is read from the folder that HYPERGRAD_DATA_DIR names; without it its rows are
skipped with the reason.

Question: Where the metric itself is what counts, does its smooth surrogate as the outer
loss, by hypergradients of three kinds, end higher than black-box search on the exact
metric at the same cost, and is it there sooner?

Systems (`metric_tasks.py`), with few hyperparameters, which favours search. The parts
are drawn by the seed.

- *noisy digits*: scikit-learn's digits, drawn without replacement with odds of their
  class between 0.1 and 1, log-uniform: 200 to train on, of whose labels two fifths are
  replaced by another class's, 150 to validate, 300 to test. Softmax regression; 21
  hyperparameters: a log-weight and a margin a class, in [-2, 2], and one log-penalty in
  [-12, -1].
- *few words*: is a story about money-fx (6.9%)? Reuters as in the table `surrogates`,
  by the 300 words that most of the training stories have. Logistic regression; 3
  hyperparameters: weight and margin of the positives, and one log-penalty.

Start: The *baseline*: no weights, no margins, the penalty in {e^-11, ..., e^-2} with
the least cross-entropy on validation. Every run begins at its hyperparameters and at
its `w`; the training that makes this `w` (Newton's method to 1e-3) is charged, the
choice of the penalty is charged to none.

Rows: {cross-entropy, smooth accuracy, sigmoid F1, Smooth-AP} by

- *converged*: `Implicit` from Newton's method to 1e-3 and CG to 1e-2 or 100 products,
  both warm;
- *truncated*: `Unrolled` through 10 steps of heavy ball (0.3, 0.9) from the last `w`;
- *joint*: `SOBA` on all data, one loop, rate 0.1 of `w` and adjoint;

all with Adam on the hyperparameters. *random* and *TPE* on exact accuracy, F1 or mAP of
validation: trials are trained from the `w` at the start to 1e-3, in a box about the
start that is cut to the one above. *untuned* (no weights, no margins, e^-6),
*baseline*, *validation-only* and *train + validation* (one penalty, tuned on a third of
validation) learn no other hyperparameters.

Temperature, the rule of the table `surrogates`: `temperature_from_scores` of the scores
of the start's model on validation, with a gap of 0.05 (of pairs for AP, times twice the
share of positives), constant through a run.

Budget: 6,000 gradient-equivalents a run on noisy digits, 1,000 on few words, some 50
and 70 trials. A descent returns the model that it has in hand, the last that was
evaluated within the budget; it is evaluated at some 50 steps, outside the ledger. A
search returns the model of the trial that is best on validation, or the start's where
none is better. The test metrics of a row are those of this model. A truncated or joint
`w` is not the argmin at its `alpha`: *retrained* are the metrics of a model that is
trained to convergence with that `alpha`.

Cost to equal metric: The target of a metric, by seed: the exact value on validation at
which the search on it that tuned best ends. A descent is there at the first evaluation
that is as good; one that never is has a lower bound, what it spent. The search itself
is there at the trial that it returns. All costs are up to and including the estimate,
or trial, that is judged.

Tuning, the same for every row: Seeds 100 and 101, of whose validation a third is held
out: of four settings that with the best mean of the row's own exact metric on the
third, for cross-entropy of the mean of all three; what the row learns from and chooses
by are the other two. Adam's rate in {0.01, 0.03, 0.1, 0.3} converged, {0.003, 0.01,
0.03, 0.1} truncated, {0.001, 0.003, 0.01, 0.03} joint; half of a box's width in {0.25,
0.5, 1, 2} on noisy digits, {0.5, 1, 2, 4} on few words. The *best* way of a loss, or
search of a metric, is the row with the best such mean. Sizes, budgets, sets of
settings, steps and the rate of `w` were chosen by trials on seeds 100 and 101.

Criteria, seeds 0..4. They are hypotheses and may lose: then the line says *not
supported*.

- (o) On each system, for each metric: its own surrogate by its best way is above the
  best search on the metric at equal cost: exact metric on test, the 95% interval of the
  difference paired by seed (Student's t) above zero.
- (o) On each system, the own surrogates by their best ways reach the searches' targets
  with at least 3 times fewer gradient-equivalents: geometric mean over the three
  metrics, paired by seed, its 95% interval above one; not supported where one is never
  there on a seed.

Lines without a claim: the second, metric by metric; the best way against the other two,
against cross-entropy by its best way, and against the rows that learn nothing; what
training anew changes.

Intervals of the six claims on test metrics are corrected for their number by Holm's
method, those of a comparison for the number of other rows; those of costs are single
intervals of 95%. On noisy digits, whose seeds are re-splits with 350 digits to learn
from and 300 to test, the intervals of test metrics are wider (Nadeau and Bengio 2003;
this correction came after the run). The test stories of few words are the same on every
seed and more than those to learn from, where it does not apply, nor does it for costs,
which read no test split.
"""

from pathlib import Path

import numpy as np

from hypergrad.bench import (
    Cell,
    Claim,
    Comparison,
    Finding,
    MeasurementTable,
    Resplits,
    Row,
    geometric_mean,
    ratio_interval,
    select,
)
from hypergrad.bench.report import markdown_table

from .shared import rq2_plot
from .shared.cost_ratios import (
    costs_or_bounds,
    mean_over_tasks,
    miss_texts,
    saving_claim,
)
from .shared.metric_learning import METRICS, PENALTY_ROWS, splits_of
from .shared.row_columns import column, mean_text, rows_by_seed
from .shared.rq2_running import (
    BUDGETS,
    DESCENTS,
    LEARNED,
    METHODS,
    METRIC_TOL,
    SEARCHES,
    TASKS,
    Method,
    retrained,
    run,
    run_baseline,
    tune,
)
from .shared.split_claims import evaluate_split_claims
from .shared.stages import fingerprint_splits
from .shared.tuning import grid_cells

MIN_SAVING = 3.0  # claimed ratio of costs
RESPLITS = {"noisy digits": Resplits(test_to_train=300 / 350)}


def measure(cell: Cell, rows: list[Row]) -> Row:
    """Returns one run at its chosen setting, or the reason why data are missing."""
    del rows
    task, method, seed = cell["task"], cell["method"], cell["seed"]
    try:
        splits = splits_of(task, seed)
    except FileNotFoundError as error:
        return {"reason": str(error)}
    row: Row = {"reason": None, "data_sha256": fingerprint_splits(splits)}
    if method not in LEARNED:
        return row | run_baseline(task, method, seed)
    tuning = tune(task, method)
    row |= run(task, method, seed, tuning["setting"]) | tuning
    return row | retrained(task, seed, row["alpha"])


# Findings.


def best_of(rows: list[Row], task: str, methods: list[Method], metric: str) -> str:
    """Returns the method for a metric that tuned best."""
    names = [method.name for method in methods if method.metric == metric]
    scores = {name: column(rows, "score", task=task, method=name) for name in names}
    return max(names, key=lambda name: scores[name][0])


def cost_to_reach(row: Row, metric: str, target: float) -> float:
    """Returns the cost of the first evaluation at the target, or NaN."""
    curve = zip(row["curve"][metric], row["curve_cost"], strict=True)
    return next((cost for value, cost in curve if value >= target - METRIC_TOL), np.nan)


def costs_to_search(
    rows: list[Row], task: str, method: str, metric: str
) -> tuple[np.ndarray, int]:
    """Returns costs until a run is as good as the best search, and how many never are.

    A run that never is as good counts with its whole cost, a lower bound.
    """
    search = best_of(rows, task, SEARCHES, metric)
    pairs = zip(
        rows_by_seed(rows, task=task, method=method),
        rows_by_seed(rows, task=task, method=search),
        strict=True,
    )
    cost = np.array(
        [cost_to_reach(row, metric, other[f"val {metric}"]) for row, other in pairs]
    )
    total = column(rows, "gradient_equivalents", task=task, method=method)
    return costs_or_bounds(cost, total)


def equal_cost_claim(rows: list[Row], task: str, metric: str) -> Claim:
    """Returns the claim that the own surrogate is above the best search."""
    return Claim(
        best_of(rows, task, DESCENTS, metric),
        best_of(rows, task, SEARCHES, metric),
        f"test {metric}",
        where=(("task", task),),
    )


def saving_of_task(rows: list[Row], task: str) -> Finding:
    """Returns the claim that own surrogates reach the searches' values for less."""
    pairs, misses = [], {}
    for metric in METRICS:
        own = best_of(rows, task, DESCENTS, metric)
        search = best_of(rows, task, SEARCHES, metric)
        cost, num_misses = costs_to_search(rows, task, own, metric)
        pairs.append((costs_to_search(rows, task, search, metric)[0], cost))
        misses[own] = num_misses
    label = f"{task}, own surrogates until as good on validation as search ends"
    return saving_claim(label, mean_over_tasks(pairs), MIN_SAVING, miss_texts(misses))


def saving_of_metric(rows: list[Row], task: str, metric: str) -> Finding:
    """Returns the same for one metric, without a claim."""
    own = best_of(rows, task, DESCENTS, metric)
    search = best_of(rows, task, SEARCHES, metric)
    cost, num_misses = costs_to_search(rows, task, own, metric)
    ratio = ratio_interval(costs_to_search(rows, task, search, metric)[0], cost)
    bound = (
        f", at most, target not reached on {num_misses} of {cost.size} seeds"
        if num_misses
        else ""
    )
    return Finding(
        f"{task}, {metric}: {own} needs {ratio:.3g} times fewer than {search}{bound}"
    )


def comparison_with_others(rows: list[Row], task: str, metric: str) -> Comparison:
    """Returns the comparison of the own surrogate with all other kinds of rows."""
    own = best_of(rows, task, DESCENTS, metric)
    others = [m.name for m in DESCENTS if m.metric == metric and m.name != own]
    others += [best_of(rows, task, DESCENTS, "cross-entropy"), *PENALTY_ROWS]
    return Comparison(own, tuple(others), f"test {metric}", where=(("task", task),))


def effect_of_retraining(rows: list[Row], task: str, metric: str) -> Finding:
    """Returns how the test metric changes if a model is retrained with alpha."""
    changes = []
    for method in (m for m in DESCENTS if m.metric == metric):
        retrained_values, values = (
            column(rows, f"{name} {metric}", task=task, method=method.name)
            for name in ("retrained", "test")
        )
        change = 100 * np.mean(retrained_values - values)
        changes.append(f"{method.kind} {change:+.1f}")
    return Finding(f"{task}, test {metric}, retrained: {', '.join(changes)} points")


def findings(rows: list[Row]) -> list[Finding]:
    """Returns the claims, then comparisons without a claim."""
    skipped = {row["task"]: row["reason"] for row in rows if row["reason"]}
    tasks = [task for task in TASKS if task not in skipped]
    cells = [(task, metric) for task in tasks for metric in METRICS]
    lines = [Finding(f"{task} skipped: {reason}") for task, reason in skipped.items()]
    if not set(METHODS) <= {row["method"] for row in rows}:
        return lines
    claims = [
        (equal_cost_claim(rows, task, metric), RESPLITS.get(task))
        for task, metric in cells
    ]
    lines += evaluate_split_claims(claims, rows)
    lines += [saving_of_task(rows, task) for task in tasks]
    lines += [saving_of_metric(rows, *cell) for cell in cells]
    for cell in cells:
        comparison = comparison_with_others(rows, *cell)
        lines += comparison.evaluate(rows, RESPLITS.get(cell[0]))
    return lines + [effect_of_retraining(rows, *cell) for cell in cells]


# Report.


def percent(values: np.ndarray) -> str:
    """Returns mean and standard deviation in percent; a dash if a number is missing."""
    if not np.all(np.isfinite(values)):
        return "-"
    mean = f"{100 * values.mean():.1f}"
    return mean if values.size < 2 else f"{mean} ± {100 * values.std(ddof=1):.1f}"


def body(rows: list[Row]) -> list[str]:
    """Returns a table per task."""
    skipped = {row["task"]: row["reason"] for row in rows if row["reason"]}
    lines = [
        "Exact metrics in percent on the untouched test split, of the model at the end "
        "of the budget; bold is a metric's own surrogate or search. Retrained: the "
        "row's own metric of a model trained to convergence with its hyperparameters. "
        "To M: gradient-equivalents (grad-eq) until the exact M on validation at which "
        "the search for M that tuned best ends, geometric mean; > where a run does not "
        "reach it, on as many seeds as stand in brackets, and counts with its whole "
        "cost. Settings are Adam's rate or half the width of a box.",
        "",
    ]
    to = [f"to {metric}" for metric in METRICS]
    headings = ["row", *METRICS, "retrained", *to, "evaluations", "grad-eq", "setting"]
    headings.append("tuning grad-eq")
    labels = {row["method"] for row in rows}
    for task, budget in BUDGETS.items():
        lines += [f"**{task}**", ""]
        if task in skipped:
            lines += [f"Skipped: {skipped[task]}", ""]
            continue
        lines += [f"At most {budget:,.0f} gradient-equivalents per run.", ""]
        cells = [table_cells(rows, task, x) for x in METHODS if x in labels]
        lines += [*markdown_table(headings, cells), ""]
    return lines[:-1]


def table_cells(rows: list[Row], task: str, method: str) -> list[str]:
    """Returns a row of the printed table."""
    method_rows = rows_by_seed(rows, task=task, method=method)
    values = lambda name: column(method_rows, name)
    exact = {metric: percent(values(f"test {metric}")) for metric in METRICS}
    if method not in LEARNED:
        return [method, *exact.values(), *["-"] * 8]
    own = LEARNED[method].metric
    if own in exact:
        exact[own] = f"**{exact[own]}**"
    retrained_text = percent(values(f"retrained {own}")) if own in exact else "-"
    costs = []
    for metric in METRICS:
        cost, num_misses = costs_to_search(rows, task, method, metric)
        mean = f"{geometric_mean(cost):,.0f}"
        costs.append(f"> {mean} ({num_misses})" if num_misses else mean)
    return [
        method,
        *exact.values(),
        retrained_text,
        *costs,
        mean_text(method_rows, "evaluations", ".0f"),
        mean_text(method_rows, "gradient_equivalents", ",.0f"),
        f"{method_rows[0]['setting']:g}",
        f"{method_rows[0]['tuning_cost']:,.0f}",
    ]


def plot(rows: list[Row], path: Path) -> None:
    """Plots validation against cost, and test at the end: a row of panels per task."""
    panels = {}
    for task in TASKS:
        if any(row["reason"] for row in select(rows, task=task)):
            continue
        for metric in METRICS:
            names = [m.name for m in (*DESCENTS, *SEARCHES) if m.metric == metric]
            names.append(best_of(rows, task, DESCENTS, "cross-entropy"))
            panels[task, metric] = {
                name: [
                    (row["curve_cost"], row["curve"][metric], row[f"test {metric}"])
                    for row in rows_by_seed(rows, task=task, method=name)
                ]
                for name in names
            }
    rq2_plot.curves(panels, BUDGETS, METRICS, path)


table = MeasurementTable(
    cells=grid_cells(task=TASKS, method=METHODS),
    measure_cell=measure,
    findings=findings,
    body=body,
    plot=plot,
    seeds=5,
    minutes=15,
    paradigm="smooth metrics",
    source="Brown et al. 2020 (arXiv 2007.12163), Benedict et al. 2022 (arXiv "
    "2108.10566), Dagréou et al. 2022 (arXiv 2201.13409); Bergstra & Bengio 2012",
    data="scikit-learn digits (1,797 real 8x8 images) and Reuters-21578",
)
