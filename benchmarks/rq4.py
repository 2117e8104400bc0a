"""The table `rq4`: who sets the augmentation, of which network, for which objective.

Magnitudes of seven operations are none, set by hand, learned by hypergradients, or
drawn at the cost of learning, for the encoders and objectives of rq4_tasks. See
README.md.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.certificate import TRUST_RTOL
from hypergrad.cost import outer_grad_cost
from hypergrad.studies.program import program
from hypergrad.studies.record import Row, fingerprint
from hypergrad.studies.study import DIGITS
from hypergrad.studies.table import Table, cell_by_cell
from hypergrad.studies.verdict import Claim, Verdict, paired
from hypergrad.tasks.augmentation import OPERATIONS, POSE_MAGNITUDES
from hypergrad.trees import relative_error

from .shared.rq4_tasks import (
    ARCHITECTURES,
    FIXED,
    OBJECTIVES,
    SPACE,
    accuracy,
    data_of,
    parts_of,
    problem_of,
    start,
)

SOURCE = (
    "Li et al. 2020; Dosovitskiy et al. 2021; Chen et al. 2020; Vincent et al. 2008"
)
NONE, HAND, LEARNED, RANDOM, VALIDATION = AUGMENTATIONS = (
    "none", "fixed", "learned", "random search", "validation-only"
)  # fmt: skip
BUDGET = 3000.0  # gradient-equivalents of whoever chooses
STEPS, TRIAL, TRAINING = 20, 100, 1000  # inner: of an estimate, a trial, a training
RATE = 0.1  # of Adam, on magnitudes
#: These, and penalties, as `rq4-grid` chose.
INNER_RATE = {"supervised": 0.01, "self-supervised": 0.03, "autoencoder": 0.03}
COLORS = ("#9a9a9a", "#3b6ea5", "#c0392b", "#e0a030", "#3b7a57")


# Running.


@functools.cache
def solver_of(objective: str, num_steps: int) -> hg.Descent:
    """The same object each time."""
    return hg.Descent(optax.sgd(INNER_RATE[objective], momentum=0.9), num_steps)


@functools.cache
def estimator_of(objective: str) -> hg.Unrolled:
    """Through all steps, from where the last estimate's ended."""
    return hg.Unrolled(solver_of(objective, STEPS), warm_start=True)


def outer_steps(problem: hg.Bilevel) -> int:
    """That the budget pays for: steps, twice, a product each, a gradient, an outer one.

    The gradient is that whose norm an estimate reports.
    """
    weight = outer_grad_cost(problem.inner_data, problem.outer_data)
    return int(BUDGET / (4 * STEPS + 1 + weight))


def learn(
    architecture: str, objective: str, data: PyTree, w: PyTree, alpha: Array
) -> hg.Trace:
    """Adam along hypergradients."""
    problem = problem_of(architecture, objective, *data)
    return hg.minimize(
        problem,
        estimator_of(objective),
        optax.adam(RATE),
        w,
        alpha,
        num_steps=outer_steps(problem),
        space=SPACE,
    )


def seek(
    architecture: str, objective: str, data: PyTree, w: PyTree, seed: int
) -> hg.Trace:
    """Magnitudes drawn uniformly, a training from the start for each."""
    return hg.search(
        problem_of(architecture, objective, *data),
        solver_of(objective, TRIAL),
        hg.searchers.Random(),
        w,
        space=SPACE,
        budget=BUDGET,
        key=jax.random.key(seed),
    )


def finish(
    architecture: str,
    objective: str,
    data: PyTree,
    test: PyTree,
    w: PyTree,
    alpha: Array,
) -> dict[str, Any]:
    """The training that every row ends in, and what it is worth."""
    problem, key = problem_of(architecture, objective, *data), jax.random.key(0)
    solver, train = solver_of(objective, TRAINING), problem.inner_data
    w, _ = solver.solve(problem.inner_loss, w, alpha, train, key)
    return {
        "w": w,
        "train_loss": problem.inner_loss(w, alpha, train),
        "val_loss": problem.outer_value(w, alpha, problem.outer_data),
        "accuracy": accuracy(architecture, objective, w, test),
    }


def estimate(
    architecture: str, objective: str, data: PyTree, w: PyTree, alpha: Array
) -> tuple[PyTree, Array]:
    """One more as they were made in learning: its ``w`` and hypergradient."""
    problem = problem_of(architecture, objective, *data)
    found = hg.hypergradient(problem, estimator_of(objective))(w, alpha)
    return found.w, found.hypergradient


def certified(
    problem: hg.Bilevel, w: PyTree, alpha: Array, hypergradient: Array
) -> Row:
    """Errors as derivatives at the argmin, or why nothing is known of them.

    A first certificate corrects ``w`` and implicit differentiation there; a second,
    asked about what the first came to, says whether that can be trusted to a hundredth,
    and so be the truth for both.
    """
    first = hg.certify(problem, w, alpha)
    second = hg.certify(problem, first.corrected_w, alpha)
    if not bool(second.trusted):
        return {"certified": False, "reason": reason(second)}
    return {
        "certified": True,
        "reason": None,
        "error": float(relative_error(hypergradient, second.corrected_hypergradient)),
        "implicit_error": float(first.error_estimate),
    }


def reason(certificate: hg.Certificate) -> str:
    """The first thing that is wrong with one."""
    if not np.isfinite(float(certificate.error_estimate)):
        return "corrections diverge"
    if bool(certificate.negative_curvature):
        return "negative curvature"
    if not float(certificate.adjoint_residual) <= TRUST_RTOL / 10:
        return "adjoint not solved"
    return "corrections do not settle"


def chosen(architecture: str, objective: str, augmentation: str, seed: int) -> Row:
    """The magnitudes of a row, and what it spent on them.

    best: the outer step or trial whose value was the lowest, from 1.
    """
    *data, _ = data_of(objective, seed)
    w = start(architecture, objective, seed)
    if augmentation == LEARNED:
        run = program(learn, architecture, objective)
        trace = run(data, w, jnp.asarray(FIXED))
    elif augmentation == RANDOM:
        trace = seek(architecture, objective, data, w, seed)
    else:
        alpha = FIXED if augmentation == HAND else np.zeros_like(FIXED)
        return {"alpha": alpha.tolist(), "cost": 0.0, "steps": 0, "best": 0}
    value = np.asarray(trace.value)
    return {
        "alpha": np.asarray(trace.best_alpha).tolist(),
        "cost": float(trace.cost[-1]),
        "steps": len(value),
        "best": 1 + int(np.nanargmin(value)),
    }


def measure(cell: Row) -> Row:
    """A row, in float64: magnitudes, a training, and of learning the certificate."""
    names = cell["architecture"], cell["objective"]
    objective, augmentation, seed = (
        cell[name] for name in ("objective", "augmentation", "seed")
    )
    with jax.enable_x64(True):
        row = chosen(*names, augmentation, seed)
        on = "val" if augmentation == VALIDATION else "train"
        *data, test = data_of(objective, seed, on)
        alpha = jnp.asarray(row["alpha"])
        found = program(finish, *names)(data, test, start(*names, seed), alpha)
        w = found.pop("w")
        row |= {name: float(x) for name, x in found.items()}
        if augmentation == LEARNED:
            w, hypergradient = program(estimate, *names)(data, w, alpha)
            row |= certified(problem_of(*names, *data), w, alpha, hypergradient)
        parts = parts_of(seed)
        read = {f"{a} {b}": parts[a][b] for a in ("train", "val", "test") for b in "xy"}
        return row | {"data": DIGITS, "data_sha256": fingerprint(read)}


# Judging.


def of(rows: list[Row], **names: str) -> list[Row]:
    """Those with these names, by seed."""
    mine = [row for row in rows if all(row[k] == name for k, name in names.items())]
    return sorted(mine, key=lambda row: row["seed"])


def over_architectures(rows: list[Row], objective: str) -> list[Row]:
    """The mean accuracy over architectures, a row an augmentation and seed."""
    found = []
    for augmentation in AUGMENTATIONS:
        mine = of(rows, objective=objective, augmentation=augmentation)
        for seed in sorted({row["seed"] for row in mine}):
            here = [row["accuracy"] for row in mine if row["seed"] == seed]
            mean = float(np.mean(np.array(here, float)))
            found.append({"method": augmentation, "seed": seed, "accuracy": mean})
    return found


def compared(rows: list[Row], objective: str) -> list[Verdict]:
    """What learning claims over the others, in points of accuracy."""
    mean = over_architectures(rows, objective)
    lines = []
    for second in (HAND, NONE, RANDOM, VALIDATION):
        least = None if second == VALIDATION else 0.0
        claim = Claim(LEARNED, second, "accuracy", least, scale=100, unit="points")
        text, failed = claim.judge(mean)
        mark = "" if least is None else "(o) "
        lines.append(Verdict(f"{mark}{objective}: {text}", failed))
    return lines


def diverged(rows: list[Row], objective: str) -> list[Verdict]:
    """Last trainings that end in no number; they count by their accuracy."""
    lines = []
    for architecture in ARCHITECTURES:
        for augmentation in AUGMENTATIONS:
            mine = of(
                rows,
                objective=objective,
                architecture=architecture,
                augmentation=augmentation,
            )
            losses = np.array([row["val_loss"] for row in mine], float)
            if lost := int(np.sum(~np.isfinite(losses))):
                text = f"{objective}: training {architecture} diverges, {augmentation}"
                lines.append(Verdict(f"{text}, on {lost} of {len(mine)} seeds"))
    return lines


def magnitudes(rows: list[Row], objective: str) -> Verdict:
    """What was learned, beside how far validation and test images were moved."""
    mine = of(rows, objective=objective, augmentation=LEARNED)
    mean = np.mean([row["alpha"] for row in mine], axis=0)
    told = [
        f"{name} {learned:.2f} ({true:.2g})"
        for name, learned, true in zip(OPERATIONS, mean, POSE_MAGNITUDES, strict=True)
    ]
    return Verdict(
        f"{objective}, learned on average (and what the images to test have): "
        f"{', '.join(told)}"
    )


def certificates(rows: list[Row], objective: str) -> Verdict:
    """Where the last hypergradient has a certificate, and its error there."""
    told = []
    for architecture in ARCHITECTURES:
        mine = of(
            rows, objective=objective, architecture=architecture, augmentation=LEARNED
        )
        told.append(f"{architecture} {certificate_of(mine)}")
    return Verdict(f"{objective}, certificates: {'; '.join(told)}")


def certificate_of(rows: list[Row]) -> str:
    """On how many seeds there is one, the errors there, and why not on the others."""
    errors = [row["error"] for row in rows if row["certified"]]
    text = f"{len(errors)} of {len(rows)}"
    if errors:
        low, high = min(errors), max(errors)
        text += f", error {low:.1e}" + f" to {high:.1e}" * (high > low)
    lacking = [row["reason"] for row in rows if not row["certified"]]
    reasons = [f"{why} ({lacking.count(why)})" for why in sorted(set(lacking))]
    return ", ".join([text, *reasons])


def flaws(rows: list[Row]) -> list[Verdict]:
    """Budgets that were exceeded."""
    over = [row for row in rows if row["cost"] > BUDGET]
    return [
        Verdict(f"{row['augmentation']} spent {row['cost']:,.0f}", True) for row in over
    ]


def judge(rows: list[Row]) -> list[Verdict]:
    """The claims, what was learned, and the certificates, by objective."""
    lines = flaws(rows)
    for objective in OBJECTIVES:
        lines += compared(rows, objective) + diverged(rows, objective)
        lines += [magnitudes(rows, objective), certificates(rows, objective)]
    return lines


# Showing.


def markdown(table: Table, rows: list[Row], command: str) -> str:
    seeds = len({row["seed"] for row in rows})
    lines = [
        f"# {table.name}",
        "",
        f"{DIGITS}; {seeds} seeds. Test accuracy of the head, or of a linear probe, "
        "in %, mean ± standard deviation; cross-entropy on validation, of a probe half "
        "its squared error (of validation-only, where it was trained). Outer steps, or "
        "trials, that were made, and the number of "
        "that with the lowest validation loss; gradient-equivalents (grad-eq) they "
        f"cost, {BUDGET:,.0f} at the most. Certified: on how many seeds the last "
        "hypergradient has a certificate, its relative error as the derivative at the "
        "argmin there, and why there is none on the others; of rows without "
        f"hypergradients -. Command: `{command}`",
    ]
    titles = ("architecture", "augmentation", "accuracy %", "val loss", "steps",
              "best at", "grad-eq", "certified")  # fmt: skip
    for objective in OBJECTIVES:
        lines += ["", f"**{objective}**", ""]
        lines += ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
        for architecture in ARCHITECTURES:
            for augmentation in AUGMENTATIONS:
                mine = of(
                    rows,
                    objective=objective,
                    architecture=architecture,
                    augmentation=augmentation,
                )
                names = architecture, augmentation
                lines.append("| " + " | ".join([*names, *cells_of(mine)]) + " |")
    return "\n".join([*lines, "", *(v.line for v in judge(rows))])


def cells_of(rows: list[Row]) -> list[str]:
    """Of one line of the table."""
    column = lambda name: np.array([row[name] for row in rows], float)
    percent, steps = 100 * column("accuracy"), column("steps")
    chose = bool(np.any(steps))
    return [
        f"{np.mean(percent):.1f} ± {np.std(percent, ddof=min(1, len(rows) - 1)):.1f}",
        f"{np.mean(column('val_loss')):.3f}",
        f"{np.mean(steps):.0f}" if chose else "-",
        f"{np.mean(column('best')):.0f}" if chose else "-",
        f"{np.mean(column('cost')):,.0f}" if chose else "-",
        certificate_of(rows) if "certified" in rows[0] else "-",
    ]


def draw(rows: list[Row], path: Path) -> None:
    """Accuracies with their intervals: a panel an objective, a group a network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(OBJECTIVES), figsize=(13, 4.2), layout="constrained"
    )
    for axis, objective in zip(axes, OBJECTIVES, strict=True):
        for i, (name, color) in enumerate(zip(AUGMENTATIONS, COLORS, strict=True)):
            for place, architecture in enumerate(ARCHITECTURES):
                mine = of(
                    rows,
                    objective=objective,
                    architecture=architecture,
                    augmentation=name,
                )
                percent = [100 * row["accuracy"] for row in mine]
                at = place + 0.15 * (i - 2)
                mean, low, high = paired(percent, 0.0)
                if len(percent) > 1:
                    axis.plot([at, at], [low, high], color=color, lw=1.5, alpha=0.6)
                label = name if place == 0 else None
                axis.plot(at, mean, "o", ms=6, color=color, label=label)
        axis.set_xticks(range(len(ARCHITECTURES)), list(ARCHITECTURES))
        axis.set_title(objective)
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test accuracy, %")
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle("Who sets the augmentation: mean over seeds, 95% interval")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


TABLE = Table(
    name="rq4",
    source=SOURCE,
    minutes=25,
    seeds=5,
    plan=lambda scale, seeds: [
        {
            "objective": objective,
            "architecture": architecture,
            "augmentation": augmentation,
            "seed": seed,
        }
        for objective in OBJECTIVES
        for architecture in ARCHITECTURES
        for augmentation in AUGMENTATIONS
        for seed in range(seeds)
    ],
    run=cell_by_cell(measure, markdown, draw),
    judge=judge,
)
