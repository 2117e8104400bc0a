"""Open problems, what was tried on each, and what the committed tables say of it.

The research questions of the source paper (arXiv 2301.11316), as far as they are about
the iteration process; see README.md for the protocol.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

from hypergrad.studies.record import Row
from hypergrad.studies.table import Table, cell_by_cell, check
from hypergrad.studies.verdict import Verdict

from .shared import plots

RESULTS = Path(__file__).parent / "results"
#: How lines end; a bound that is broken is no outcome, but fails its table.
ENDINGS = {
    "reproduced": (": reproduced", ": kept"),
    "not reproduced": (": not reproduced",),
}


class Problem(NamedTuple):
    """What is open, what was tried, the tables that measure it, and what stays open."""

    tried: str
    tables: tuple[str, ...]
    stays: str


PROBLEMS = {
    "Is a hypergradient right, and how would one know?": Problem(
        "residuals and curvature with each estimate, a `trusted` flag, Newton "
        "corrections; in no table: certificates by these",
        ("conformance",),
        "a certificate speaks of one stationary point; that training ended in the "
        "minimum one means, and not in another, it cannot tell",
    ),
    "The metric has no derivative": Problem(
        "smooth surrogates of accuracy, F1 and mean average precision as outer losses",
        ("surrogates", "average-precision", "rq2"),
        "where labels are noisy a metric's surrogate beats cross-entropy and search, "
        "and training on the clean validation examples alone beats it; elsewhere on "
        "small data it is no better than cross-entropy; whether it is on large or very "
        "unbalanced data is not known from here",
    ),
    "Inner training is the bottleneck": Problem(
        "warm starts of `w` and of the adjoint, Newton's method on the products of the "
        "adjoint, one supernet for all candidates, populations in one program",
        ("rq1", "search", "trainings", "warmstart", "population"),
        "with two hyperparameters a search, or one with shared weights, needs least in "
        "each of eight paradigms; with 500 no method was there on every seed of "
        "`search`, and one of seven on those of `trainings`",
    ),
    "One loop instead of two": Problem(
        "the stochastic single-loop family, with and without variance reduction",
        ("quadratics", "logistic", "multinomial", "corruption", "soba-step"),
        "rates are tuned by grids that cost more than the runs, and theory's order of "
        "the methods is not the order that was measured",
    ),
    "Long training does not fit into memory": Problem(
        "two static levels of checkpoints, forward and reversible modes, an adjoint by "
        "products",
        ("growth", "growth-seconds", "adjoint", "schedules"),
        "an adjoint by products saves memory and costs operations; schedules learned "
        "for long runs gain nothing over a constant rate that was tuned",
    ),
    "Many hyperparameters overfit the validation set": Problem(
        "a validation-only row beside each method, test data read once",
        ("penalties", "cleaning", "federated"),
        "one penalty a weight gets every validation image right, and what it does to "
        "others is not in its rows; nothing here says beforehand how many "
        "hyperparameters data can bear",
    ),
    "Choices that are not continuous": Problem(
        "softmax relaxation, DARTS, a supernet; in no table: straight-through "
        "estimators",
        ("architecture", "warmstart"),
        "on this small space of cells the best single operation is level, and random "
        "search nearly so",
    ),
    "Several objectives at once": Problem(
        "exact preferences and weighted sums, with differentiable models of "
        "operations, latency and memory; in no table: Tchebycheff, MGDA, UPGrad and "
        "constraints",
        ("pareto",),
        "pruning what least passes through is level at a quarter of the budget, and "
        "level or ahead at the same; measured latency is that of one machine",
    ),
    "Augmentation by gradients": Problem(
        "magnitudes and probabilities learned through differentiable transformations",
        ("augmentation", "self_supervised", "rq4"),
        "one magnitude for all, tuned, is level, and so are magnitudes set by hand but "
        "in contrastive learning; where networks are trained to the end of their "
        "budget, and not to a minimum, no certificate says how right it is",
    ),
    "Few labels, few shots": Problem(
        "per-example weights of unlabelled data, learned initialisations and heads",
        ("semi_supervised", "few_shot"),
        "on these small tasks ridge regression on each task alone is level with "
        "learning to learn, or ahead of it; training on the validation labels is worth "
        "more than weights learned by them",
    ),
    "Which metric is legitimate without labels?": Problem(
        "likelihood of held-out data for density models and their dimensions",
        ("unsupervised",),
        "clusterings and representations have no such measure",
    ),
    "Data that stay with their clients": Problem(
        "global hypergradients by products that clients make, against local ones",
        ("federated",),
        "what a global hypergradient gains is not shown to grow with the difference of "
        "clients",
    ),
    "Outer losses that are themselves estimates": Problem(
        "returns of fresh rollouts, differentiated through the policy's update",
        ("reinforcement",),
        "a grid of the same few settings ends as high or higher; the Hessian of such a "
        "loss is indefinite, and implicit differentiation is not trusted",
    ),
    "Losses that balance each other": Problem(
        "weights of residuals and boundaries in physics-informed training",
        ("physics",),
        "gains over equal weights are within noise; random search is level",
    ),
}


def source(name: str) -> str:
    """What the rows of a table are, by their sha256."""
    return hashlib.sha256((RESULTS / f"{name}.jsonl").read_bytes()).hexdigest()


def outcome(text: str) -> str | None:
    """Which of `ENDINGS` a line has; ValueError where it stands elsewhere."""
    for name, ends in ENDINGS.items():
        if text.endswith(ends):
            return name
    if "reproduced" in text:
        raise ValueError(f"'{text}' does not end with its outcome, as it is counted")
    return None


def measure(cell: Row) -> Row:
    """How many claims of a table came out which way, by its committed rows."""
    from .tables import TABLES  # which holds this one

    verdicts = check(TABLES[cell["of"]], RESULTS)
    found = [outcome(verdict.text) for verdict in verdicts]
    counts = {name: found.count(name) for name in ENDINGS}
    failed = sum(verdict.failed for verdict in verdicts)
    return counts | {"failed": failed, "rows_sha256": source(cell["of"])}


def judge(rows: list[Row]) -> list[Verdict]:
    """Fails where a table was made anew, or does not pass its own check."""
    verdicts = []
    for row in rows:
        if row["rows_sha256"] != source(row["of"]):
            text = f"{row['of']} has other rows by now; run rq5 again"
            verdicts.append(Verdict(text, failed=True))
        if row["failed"]:
            verdicts.append(Verdict(f"{row['of']} fails its own check", failed=True))
    once = {row["of"]: row for row in rows}.values()
    total = {name: sum(row[name] for row in once) for name in ENDINGS}
    text = f"{len(once)} tables, claims reproduced {total['reproduced']}, "
    return [*verdicts, Verdict(f"{text}not reproduced {total['not reproduced']}")]


def markdown(table: Table, rows: list[Row], command: str) -> str:
    """A line a problem."""
    lines = [
        f"# {table.name}",
        "",
        "Claims reproduced and not reproduced, by table, and what stays open. "
        f"Command: `{command}`",
        "",
        "| problem | tried | table: reproduced, not | stays open |",
        "|---|---|---|---|",
    ]
    for name, problem in PROBLEMS.items():
        of = ", ".join(
            f"`{row['of']}`: {row['reproduced']}, {row['not reproduced']}"
            for row in rows
            if row["problem"] == name
        )
        lines.append(f"| {name} | {problem.tried} | {of} | {problem.stays} |")
    return "\n".join([*lines, "", *(v.line for v in judge(rows))])


def draw(rows: list[Row], path: Path) -> None:
    """Claims by problem."""
    plots.claims(
        {
            name: {
                end: sum(row[end] for row in rows if row["problem"] == name)
                for end in ENDINGS
            }
            for name in PROBLEMS
        },
        path,
    )


def plan(scale: str, seeds: int) -> list[Row]:
    """A cell a problem and table."""
    del scale, seeds
    return [
        {"problem": name, "of": of, "seed": 0}
        for name, problem in PROBLEMS.items()
        for of in problem.tables
    ]


TABLE = Table(
    name="rq5",
    source="the committed tables",
    minutes=1,
    seeds=1,
    plan=plan,
    run=cell_by_cell(measure, markdown, draw),
    judge=judge,
)
