"""Augmentation that is learned, set by hand or searched, by network and objective.

Question: Is augmentation that is learned by hypergradients better than none, than one
set by hand, and than one that random search finds at the same cost? For which networks
and which objectives, and how right is the hypergradient that learned it?

Data: scikit-learn's digits, by a permutation drawn from the seed: 200 upright ones to
train on; 200 to validate and 1,397 to test, turned by up to 45 degrees and moved by up
to a pixel, as in *augmentation*. The test split is read once, by the final model of a
row.

Augmentation: The seven operations of *augmentation*: moves along both axes, rotation,
scale, shear, contrast, noise. `alpha` holds how far each goes at most, between 0 and 2
pixels, 2 pixels, 90 degrees, 0.5, 0.7, 0.9 and 0.5; how far it goes on an image is that
times a number drawn uniformly from (-1, 1). Every image is there twice, with draws that
stay through all trainings, so that the inner loss is a function of `w` and `alpha` with
a minimum, and the hypergradient there can be certified.

- *none*: all zero. In contrastive learning both views of an image are then the same,
  and what is left to learn is to tell images apart.
- *fixed*: set by hand before the first run: a pixel, a pixel, 15 degrees, and 0.1 of
  the rest.
- *learned*: from *fixed*, by Adam along the hypergradients of the validation loss in
  the unconstrained coordinates of the box: `Unrolled`, 20 inner steps from the last
  `w`.
- *random search*: magnitudes drawn uniformly from the box, each trained 100 steps from
  the start.
- *validation-only*: none, on the 200 validation images in place of the training images,
  a probe's too.

Learned and random search keep the magnitudes with the lowest validation loss that they
saw.

Networks (`rq4_tasks.py`), of 16 features: *linear*; *MLP*, one hidden layer of 32;
*CNN*, four filters of 3 by 3, means over 2 by 2, an affine layer; *ViT*, four patches
of 4 by 4, one block of attention with two heads of 8 and a hidden layer of 32, the mean
over patches. Tanh throughout, last layers included but for *linear*.

Objectives: *supervised*: cross-entropy of an affine head; with *linear* it reads the
pixels, which is softmax regression. *self-supervised*: InfoNCE of both views,
temperature 0.2, without a projection. *autoencoder*: half the squared error of an
affine head on the transformed image against the image as it was. Each has an L2 penalty
on all of `w`: 1e-2, 3e-3 and 1e-3 in this order. The outer loss is the cross-entropy of
the head on validation; of the other two half the squared error there of a ridge probe
(penalty 1) on the features of the 200 training images as they are. The metric is the
test accuracy of head or probe.

Budget: 3,000 gradient-equivalents for whoever chooses, learned or random search: 36
outer steps of about 83, or 29 trials of 100 and a value. Every row ends in the same
training with its magnitudes, outside the ledger: 1,000 steps from the seed's start.
Inner training is descent on all images with momentum 0.9, rate 0.01 (supervised), 0.03
(self-supervised) and 0.03 (autoencoder). All in float64. By 100 steps at these rates
training is not at its end, so that trials judge magnitudes earlier than the last
training uses them.

Tuning, the same for every row (stage `tuning`): Rate and penalty of the inner training,
once an objective for all networks and augmentations: of rates {0.01, 0.03, 0.1, 0.3} by
penalties {0.001, 0.003, 0.01, 0.03} the pair with the least validation loss after the
last training with *fixed* magnitudes, mean over the four networks and seeds 100 and
101. (They were first set by hand on seed 100, with test accuracies in view; what is
chosen here replaces that.) Numbers of steps and Adam's rate, 0.1, are given. Nothing
was tuned for a cell. What is chosen in a row is chosen by validation loss.

Certified hypergradient error: Of *learned*: after its final training one more estimate
is made as in learning. `hg.certify` corrects its `w` by two Newton steps; a second
certificate at that point says whether implicit differentiation there is right to a
hundredth. If so, it is the truth, and the error is the distance of the estimate from
it: that of `Unrolled`, which differentiates 20 steps, as the derivative at the argmin
(its own target is the derivative of those steps, which it has to rounding). Else there
is *no certificate*, with the first reason that holds: corrections diverge, negative
curvature, adjoint not solved, corrections do not settle. Rows also hold the error of
implicit differentiation at that `w`. A certificate speaks of the stationary point to
which the corrections lead. Where features can be rotated at no cost, those of *linear*
but for softmax regression, queries and keys of *ViT*, the Hessian is singular, rounding
decides on its sign, and no certificate is to be expected.

Criteria (o), seeds 0..4, for each objective: the test accuracy of learned, a mean over
the four networks, is above that of fixed, above that of none, and above that of random
search: any gain, the 95% interval of the difference paired by seed above zero. Lines
without a claim compare it to validation-only, set the magnitudes that were learned
beside those of the test images, and say on how many seeds there is a certificate, with
its errors, and why on others there is none. A last training that diverges is reported,
and counts with the accuracy of the model in which it ends.

Intervals: The seeds re-split one data set, but the 1,397 digits to test are more than
the 400 to learn from, where the correction of Nadeau and Bengio (2003) does not apply:
the intervals are about further splits of these digits.
"""

import itertools
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from hypergrad.bench import (
    Cell,
    Check,
    Claim,
    Comparison,
    Finding,
    MeasurementTable,
    Row,
    Stage,
    mean_interval,
    select,
)
from hypergrad.bench.claims import evaluate_claims
from hypergrad.bench.report import markdown_table
from hypergrad.runtime.compat import enable_x64
from hypergrad.tasks.augmentation import OPERATIONS, POSE_MAGNITUDES

from .shared.outcomes import stays_within
from .shared.plots import add_grid, make_panels
from .shared.program import program
from .shared.rq4_running import (
    AUGMENTATIONS,
    BUDGET,
    HAND,
    LEARNED,
    NONE,
    NUM_TRAINING_STEPS,
    PAIRS,
    PENALTIES,
    RANDOM,
    RATES,
    VALIDATION,
    certificate_row,
    choose_magnitudes,
    estimate,
    finish,
    tune,
)
from .shared.rq4_tasks import (
    ARCHITECTURES,
    OBJECTIVES,
    data_of,
    init_w,
    problem_of,
    splits_of,
)
from .shared.stages import fingerprint, tuning_row
from .shared.tuning import DIGITS, grid_cells

COLORS = ("#9a9a9a", "#3b6ea5", "#c0392b", "#e0a030", "#3b7a57")

# Tuning.


def tuning_body(rows: list[Row]) -> list[str]:
    """Returns the loss at every pair, and what is chosen at an edge."""
    cells, edges = [], []
    for row in rows:
        ends = dict(zip(PAIRS, row["ends"], strict=True))
        for penalty in PENALTIES:
            texts = []
            for rate in RATES:
                loss = ends[rate, penalty]
                text = "-" if loss is None else f"{loss:.4f}"
                is_chosen = (rate, penalty) == (row["rate"], row["penalty"])
                texts.append(f"**{text}**" if is_chosen else text)
            cells.append([row["objective"], f"{penalty:g}", *texts])
        for name, tried in (("rate", RATES), ("penalty", PENALTIES)):
            if row[name] in (min(tried), max(tried)):
                edges.append(f"- {row['objective']}: the {name} is at an edge")
    headings = ["objective", "penalty", *(f"rate {x:g}" for x in RATES)]
    return [
        f"Validation loss after {NUM_TRAINING_STEPS:,} steps with magnitudes set by "
        f"hand, mean over {len(ARCHITECTURES)} networks and both seeds; the lowest is "
        "chosen; - diverges.",
        "",
        *markdown_table(headings, cells),
        *([""] if edges else []),
        *edges,
    ]


# Measuring.


def measure(cell: Cell, rows: list[Row]) -> Row:
    """Returns magnitudes, the final training and, of learning, the certificate."""
    names = cell["architecture"], cell["objective"]
    objective, augmentation, seed = cell["objective"], cell["method"], cell["seed"]
    tuning = tuning_row(rows, objective=objective)
    rate, penalty = tuning["rate"], tuning["penalty"]
    with enable_x64(True):
        row = choose_magnitudes(*names, augmentation, seed, rate, penalty)
        on = "val" if augmentation == VALIDATION else "train"
        *data, test = data_of(penalty, seed, on)
        alpha, w = jnp.asarray(row["alpha"]), init_w(*names, seed)
        result = program(finish, *names, rate)(data, test, w, alpha)
        w = result.pop("w")
        row |= {name: float(x) for name, x in result.items()}
        if augmentation == LEARNED:
            w, hypergradient = program(estimate, *names, rate)(data, w, alpha)
            problem = problem_of(*names, *data)
            row |= certificate_row(problem, w, alpha, hypergradient)
        splits = splits_of(seed)
        parts = [(part, x) for part in ("train", "val", "test") for x in "xy"]
        arrays = {f"{part} {x}": splits[part][x] for part, x in parts}
        return row | {"data_sha256": fingerprint(arrays)}


# Findings.


def mean_over_architectures(rows: list[Row]) -> list[Row]:
    """Returns the mean accuracy per objective, augmentation and seed."""
    cells = dict.fromkeys((x["objective"], x["method"], x["seed"]) for x in rows)
    names = "objective", "method", "seed"
    means = []
    for cell in cells:
        fields = dict(zip(names, cell, strict=True))
        values = [row["accuracy"] for row in select(rows, **fields)]
        means.append(fields | {"accuracy": float(np.mean(np.array(values, float)))})
    return means


def divergence_findings(rows: list[Row], objective: str) -> list[Finding]:
    """Returns final trainings without a finite loss; they count by their accuracy."""
    lines = []
    for architecture in ARCHITECTURES:
        for augmentation in AUGMENTATIONS:
            cell_rows = select(
                rows,
                objective=objective,
                architecture=architecture,
                method=augmentation,
            )
            losses = np.array([row["val_loss"] for row in cell_rows], float)
            if num_diverged := int(np.sum(~np.isfinite(losses))):
                lines.append(
                    Finding(
                        f"{objective}: training {architecture} diverges, "
                        f"{augmentation}, on {num_diverged} of {len(cell_rows)} seeds"
                    )
                )
    return lines


def magnitude_finding(rows: list[Row], objective: str) -> Finding:
    """Returns what was learned, and how far validation and test images were moved."""
    learned_rows = select(rows, objective=objective, method=LEARNED)
    mean = np.mean([row["alpha"] for row in learned_rows], axis=0)
    magnitudes = [
        f"{name} {learned:.2f} ({true:.2g})"
        for name, learned, true in zip(OPERATIONS, mean, POSE_MAGNITUDES, strict=True)
    ]
    return Finding(
        f"{objective}, learned on average (and what the test images have): "
        f"{', '.join(magnitudes)}"
    )


def certificate_finding(rows: list[Row], objective: str) -> Finding:
    """Returns where the last hypergradient has a certificate, and its error there."""
    learned_rows = select(rows, objective=objective, method=LEARNED)
    texts = [
        f"{name} {certificate_text(select(learned_rows, architecture=name))}"
        for name in ARCHITECTURES
    ]
    return Finding(f"{objective}, certificates: {'; '.join(texts)}")


def certificate_text(rows: list[Row]) -> str:
    """Returns the number of certificates, their errors, and why others are missing."""
    errors = [row["error"] for row in rows if row["certified"]]
    text = f"{len(errors)} of {len(rows)}"
    if errors:
        low, high = min(errors), max(errors)
        text += f", error {low:.1e}" + f" to {high:.1e}" * (high > low)
    missing = [row["reason"] for row in rows if not row["certified"]]
    reasons = [f"{x} ({missing.count(x)})" for x in sorted(set(missing))]
    return ", ".join([text, *reasons])


def findings(rows: list[Row]) -> list[Finding]:
    """Returns the claims, what was learned, and the certificates, by objective."""
    means = mean_over_architectures(rows)
    where = {objective: (("objective", objective),) for objective in OBJECTIVES}
    claims = [
        Claim(LEARNED, baseline, "accuracy", where=where[objective])
        for objective in OBJECTIVES
        for baseline in (HAND, NONE, RANDOM)
    ]
    lines = evaluate_claims(claims, means)
    for objective in OBJECTIVES:
        comparison = Comparison(
            LEARNED, (VALIDATION,), "accuracy", where=where[objective]
        )
        lines += comparison.evaluate(means) + divergence_findings(rows, objective)
        if select(rows, objective=objective, method=LEARNED):
            lines.append(magnitude_finding(rows, objective))
            lines.append(certificate_finding(rows, objective))
    return lines


# Report.


def body(rows: list[Row]) -> list[str]:
    """Returns a table per objective."""
    lines = [
        "Test accuracy of the head, or of a linear probe; cross-entropy on validation, "
        "of a probe half its squared error. Outer steps, or trials, and the number of "
        "that with the lowest validation loss; gradient-equivalents (grad-eq) of "
        f"choosing, {BUDGET:,.0f} at most. Certified: on how many seeds the last "
        "hypergradient has a certificate, its relative error as the derivative at the "
        "argmin there, and why there is none on the others.",
        "",
    ]
    headings = ("architecture", "augmentation", "accuracy %", "val loss", "steps",
                "best at", "grad-eq", "certified")  # fmt: skip
    for objective in OBJECTIVES:
        cells = []
        for architecture, augmentation in itertools.product(
            ARCHITECTURES, AUGMENTATIONS
        ):
            cell_rows = select(
                rows,
                objective=objective,
                architecture=architecture,
                method=augmentation,
            )
            if cell_rows:
                cells.append([architecture, augmentation, *table_cells(cell_rows)])
        lines += [f"**{objective}**", "", *markdown_table(headings, cells), ""]
    return lines[:-1]


def table_cells(rows: list[Row]) -> list[str]:
    """Returns the numbers of a row of the printed table."""
    column = lambda name: np.array([row[name] for row in rows], float)
    percent, steps = 100 * column("accuracy"), column("steps")
    has_chosen = bool(np.any(steps))
    return [
        f"{np.mean(percent):.1f} ± {np.std(percent, ddof=min(1, len(rows) - 1)):.1f}",
        f"{np.mean(column('val_loss')):.3f}",
        f"{np.mean(steps):.0f}" if has_chosen else "-",
        f"{np.mean(column('best')):.0f}" if has_chosen else "-",
        f"{np.mean(column('gradient_equivalents')):,.0f}" if has_chosen else "-",
        certificate_text(rows) if "certified" in rows[0] else "-",
    ]


def plot(rows: list[Row], path: Path) -> None:
    """Plots accuracies with their intervals: a panel per objective."""
    figure, axes = make_panels(1, len(OBJECTIVES), (13, 4.2))
    for axis, objective in zip(axes, OBJECTIVES, strict=True):
        for i, (name, color) in enumerate(zip(AUGMENTATIONS, COLORS, strict=True)):
            for position, architecture in enumerate(ARCHITECTURES):
                cell_rows = select(
                    rows, objective=objective, architecture=architecture, method=name
                )
                if not cell_rows:
                    continue
                percent = [100 * row["accuracy"] for row in cell_rows]
                x = position + 0.15 * (i - 2)
                mean, low, high = mean_interval(percent)
                if len(percent) > 1:
                    axis.plot([x, x], [low, high], color=color, lw=1.5, alpha=0.6)
                label = name if position == 0 else None
                axis.plot(x, mean, "o", ms=6, color=color, label=label)
        axis.set_xticks(range(len(ARCHITECTURES)), list(ARCHITECTURES))
        axis.set_title(objective)
        add_grid(axis, axis="y")
    axes[0].set_ylabel("test accuracy, %")
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle("Who sets the augmentation: mean over seeds, 95% interval")
    figure.savefig(path, dpi=120)


table = MeasurementTable(
    cells=grid_cells(
        objective=OBJECTIVES, architecture=ARCHITECTURES, method=AUGMENTATIONS
    ),
    measure_cell=measure,
    earlier_stages=(
        Stage(
            "tuning",
            lambda scale, seeds: [
                {"objective": name, "method": HAND, "seed": 0} for name in OBJECTIVES
            ],
            tune,
            tuning_body,
        ),
    ),
    checks=(
        Check(
            f"choosing magnitudes takes at most {BUDGET:,.0f} gradient-equivalents",
            stays_within(BUDGET),
        ),
    ),
    findings=findings,
    body=body,
    plot=plot,
    seeds=5,
    minutes=35,
    paradigm="augmentation",
    source="Li et al. 2020; Dosovitskiy et al. 2021; Chen et al. 2020; Vincent et al. "
    "2008",
    data=DIGITS,
)
