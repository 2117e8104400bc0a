"""Poisoned training images of MNIST that are learned against logistic regression.

*Question.* How much do 10, 30 or 60 poisoned images, added to 1,000 training images,
lower the accuracy of a linear classifier, or make it read an 8 as a 3? Do the attacks
of Mehra & Hamm 2021 reach their numbers, and what do exact hypergradients reach?

*Problem*, of the authors' code (`applications/data_poisoning/data_augmentation_attacks`
of hammlab/bilevel-penalty). The victim is softmax regression on pixels in [0, 1]
without a bias. The outer variable is the pixels of N poisons with fixed wrong labels:

    L(w, a) = mean CE over 1,000 training images and N poisons + 0.0025 ||w||^2.

*Untargeted*: M = -mean CE of 1,000 validation images; the number is the accuracy on
8,000 further images. All are training images of MNIST, in a random order for each seed.
The poisons start as copies of the first N training images, each with a random wrong
label. *Targeted*: 100 images of each digit of the first 2,000 training images; M is the
mean CE of 400 other training images of an 8, with the label 3; the number is the
percentage of 500 test images of an 8 that are read as a 3. The poisons start as copies
of N/2 training images of a 3 with the label 8 and N/2 of an 8 with the label 3. In both
attacks the victim is trained again, from nothing, on the poisoned data.

*Code and text differ.* The text has a penalty of 0.05. The code's
``0.5 * 0.01 * l2_loss(w)`` is 0.0025 ||w||^2, with which the clean accuracy is 86.8% in
a trial (0.05 has 83.6%); the paper has 87%. The text has rates of 0.1 for poisons and
0.001 for w, the code 1e-4 for w in targeted attacks. The code has no label flipping: we
take its first poisons. In a trial they have a success of 2, 5 and 10%, and images of an
8 alone 6, 14 and 26%, so that the targeted row of the paper may be of the latter.

*Rows.* *clean* has no poison. *label flipping* adds the first poisons as they are, and
*label flipping, 8 as 3* copies of N images of an 8 with the label 3 (targeted only).
*random noise* keeps the labels and has uniform pixels. *approximate gradient*: in an
outer step 20 steps of Adam on L, 20 on the squared residual of the adjoint system with
damping 1e-3, and one of Adam on the poisons. Rates of w, adjoint and poisons: 1e-3,
1e-2 and 1e-2, targeted 1e-4, 1e-3 and 1e-3. *penalty*: 20 steps of Adam on
``M + nu . g + rho ||g||^2 / 2 + lam L`` with ``g = dL/dw``, and one of Adam with rate
0.1 on the poisons without the last term; then updates of rho (first 10), lam (100,
targeted 1), eps (1), nu (0) and the rates if the gradients are small; the rate of w is
1e-3, targeted 1e-4. *Implicit*: `hg.Implicit` with L-BFGS to 1e-3 and conjugate
gradients to 1e-6, and Adam with rate 0.1, until 6,000 gradient-equivalents are used up.
*random search* trains on new label flips at the same cost, by chance images and wrong
labels, and takes those with the lowest M. All poisons are clipped to [0, 1].

*Deviations.* The authors make 5,000 outer steps. For lack of time ours are the first
250 of the untargeted attacks and the first 500 of the targeted ones; their rates are
halved only after step 1,000. In a trial on a split outside of this table the untargeted
accuracies were nearly constant after step 200, the targeted successes still rose, so
that those of the approximate gradient will be too low. Victims are trained by L-BFGS
and not by 10,001 epochs of Adam; the row *clean, Adam* has the authors' training. The
three values of N share a split and their first poisons. Pixels that are 0 in all
training and validation images are left out: their weights, adjoints and gradients are
exactly 0. Everything is float32. The rate of *Implicit* is that of the penalty method
and was not tuned.

*Measured.* Accuracies and successes of the victim in percent. `grad-eq` and `HVPs` are
those of one attack at one N, means over both attacks; the victim is not counted.

*Published.* The paper's tables of both attacks, five runs. Tolerance: two standard
deviations of the difference, ``2 sqrt(s_p^2 + s_o^2)``, at least 0.5 points. The
verdicts of the table take our deviation ``s_o`` to be the paper's ``s_p``, so that they
are fixed before the run; a line under the table has those with the measured ``s_o``.
Clean accuracy: 0.5 points.
The rows of reverse mode (RMD) are quoted by the authors without deviations and not run.

*Not reproduced.* Nothing was tried after the run. Label flipping, targeted: the authors
probably have other flips; those of an 8 alone are nearer, 5.1 and 6.1 points below at 3
and 6%. Approximate gradient, targeted: at rates of 1e-3 the successes still rise; from
step 250 to 500 that of its own model on validation images goes from 27 to 57% at 6%.
Penalty: its own model is far from the minimum of L, with 65% on validation images where
the victim has 39% on test images (targeted, 6%). Only 5,000 steps could decide these
rows. They were to be judged when the protocol was committed (4 of 12 are within), and a
review took that back: a number is reproduced only at the paper's own length. Claims on
the approximate gradient are on runs of 250 and 500 steps: the authors' full run has a
higher targeted success than *Implicit* here.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array

import hypergrad as hg
from hypergrad.bench import (
    Cell,
    Check,
    Claim,
    Column,
    Finding,
    MeasurementTable,
    Published,
    Resplits,
    Row,
    select,
)

from .shared.plots import make_figure
from .shared.poisoning_data import (
    ATTACKS,
    COUNTS,
    NUM_CLASSES,
    NUM_TRAIN,
    OUTER_LOSSES,
    PAPER,
    QUOTED,
    SOURCE_CLASS,
    TARGET_CLASS,
    Data,
    Images,
    flipped,
    inner_loss,
    load_split,
    mean_losses,
    no_poisons,
    order_images,
    percent_right,
    train_by_adam,
    train_models,
    wrong_labels,
)
from .shared.poisoning_methods import ApproximateGradient, GradientPenalty
from .shared.split_claims import evaluate_split_claims
from .shared.task_runs import implicit_by_cg
from .shared.tuning import cells_of

PERCENTS = (1, 3, 6)
NUM_STEPS = {"untargeted": 250, "targeted": 500}
NUM_INNER, RECORD_EVERY, BUDGET = 20, 25, 6_000.0
NUM_IMAGES = 8  # of the figure

# Methods: each returns the victims ``w``, the cost of one attack, and further fields.

Result = tuple[Array, float, Row]


def percent_metric(i: int) -> Callable[..., Array]:
    """Returns the metric of an attack: the percentage of its model on given data."""
    return lambda data, w, alpha, key: percent_right(w, data)[i]


METRICS = {f"val_{p}": percent_metric(i) for i, p in enumerate(PERCENTS)}


@functools.cache
def make_methods(attack: str) -> dict[str, tuple[Any, optax.GradientTransformation]]:
    """Returns the estimator and the outer optimizer of each bilevel method."""
    is_targeted = attack == "targeted"
    inner = optax.adam(1e-4 if is_targeted else 1e-3)
    outer = optax.adam(1e-3 if is_targeted else 1e-2)
    lam = 1.0 if is_targeted else 100.0
    return {
        "approximate gradient": (
            ApproximateGradient(inner, outer, NUM_INNER, 1e-3),
            outer,
        ),
        "penalty": (
            GradientPenalty(inner, optax.adam(0.1), NUM_INNER, 10.0, lam, 1.0),
            optax.sgd(1.0),
        ),
        "Implicit": (
            implicit_by_cg(hg.LBFGS(tolerance=1e-3), rtol=1e-6),
            optax.adam(0.1),
        ),
    }


def clip_pixels(alpha: Images) -> Images:
    """Returns the images with pixels in [0, 1]."""
    return tuple(jnp.clip(x, 0, 1) for x in alpha)


def run_bilevel(
    method: str, attack: str, train: Data, val: Data, **limits: Any
) -> hg.Trace:
    """Returns the trace of a bilevel method, from the label flips."""
    estimator, optimizer = make_methods(attack)[method]
    loop = hg.OuterLoop(
        hg.Bilevel(inner_loss, OUTER_LOSSES[attack], train, val),
        estimator,
        optimizer,
        project=clip_pixels,
        metrics={name: Partial(fn, val) for name, fn in METRICS.items()},
        eval_every=limits.get("record_every", 1),
    )
    clean, _ = train_models(no_poisons(train), train)
    state = loop.init(jnp.repeat(clean, len(COUNTS), axis=0), flipped(train))
    return loop.run(state, **limits)


def bilevel(method: str, attack: str, train: Data, val: Data, key: Array) -> Result:
    """Returns the victims of the images that a bilevel method learns."""
    del key
    limits: dict[str, Any] = {
        "num_steps": NUM_STEPS[attack], "record_every": RECORD_EVERY
    }  # fmt: skip
    if method == "Implicit":
        limits = {"budget": BUDGET}
    trace = run_bilevel(method, attack, train, val, **limits)
    costs = np.asarray(trace.cost, float)
    curve = {name: np.round(trace.metrics[name], 2).tolist() for name in METRICS}
    num_hvps = float(np.nansum(np.asarray(trace.stats["num_hvps"], float)))
    fields = {f"curve_{attack}": curve | {"cost": costs.tolist()}}
    fields |= {"num_hvps": num_hvps, f"steps_{attack}": int(trace.state.step)}
    fields["images"] = trace.alpha[-1]
    return train_models(trace.alpha, train)[0], float(costs[-1]), fields


def clean(attack: str, train: Data, val: Data, key: Array) -> Result:
    """Returns one model that is trained without poisons."""
    return train_models(no_poisons(train), train)[0], 0.0, {}


def clean_by_adam(attack: str, train: Data, val: Data, key: Array) -> Result:
    """Returns the same model after the authors' training."""
    return train_by_adam(train, key), 0.0, {}


def label_flipping(attack: str, train: Data, val: Data, key: Array) -> Result:
    """Returns the victims of the first poisons."""
    return train_models(flipped(train), train)[0], 0.0, {}


def flip_eights(attack: str, train: Data, val: Data, key: Array) -> Result:
    """Returns the victims of images of an 8 with the label 3."""
    x = train["x"][np.flatnonzero(np.asarray(train["y"])[:, SOURCE_CLASS])]
    target = jnp.zeros_like(train["y"]).at[:, TARGET_CLASS].set(1.0)
    images = tuple(x[:num] for num in COUNTS)
    return train_models(images, train | {"wrong_y": target})[0], 0.0, {}


def random_noise(attack: str, train: Data, val: Data, key: Array) -> Result:
    """Returns the victims of uniform pixels with the wrong labels."""
    noise = jax.random.uniform(key, (COUNTS[-1], train["x"].shape[1]))
    return train_models(tuple(noise[:num] for num in COUNTS), train)[0], 0.0, {}


def random_search(
    attack: str, train: Data, val: Data, key: Array, budget: float | None = None
) -> Result:
    """Returns the victims with the lowest outer loss of all label flips."""
    labels = np.argmax(np.asarray(train["y"]), axis=1)
    rng = np.random.default_rng(int(jax.random.randint(key, (), 0, 2**31 - 1)))
    sign = 1 if attack == "targeted" else -1
    best_w: Any = None
    best_loss, cost, num_trials = np.full(len(COUNTS), np.inf), 0.0, 0
    while cost < (BUDGET if budget is None else budget):
        order = order_images(attack, labels, rng)
        wrong = wrong_labels(attack, labels[order], rng)
        batch = train | {"wrong_y": jax.nn.one_hot(wrong, NUM_CLASSES)}
        images = tuple(train["x"][order[:num]] for num in COUNTS)
        w, num_grads = train_models(images, batch)
        loss = sign * np.asarray(mean_losses(w, val))
        is_better = loss < best_loss
        best_loss = np.where(is_better, loss, best_loss)
        best_w = w if best_w is None else jnp.where(is_better[:, None, None], w, best_w)
        cost += float(num_grads) + len(val["y"]) / NUM_TRAIN / 3
        num_trials += 1
    return best_w, cost, {f"trials_{attack}": num_trials}


METHODS: dict[str, Callable[..., Result]] = {
    "clean": clean,
    "clean, Adam": clean_by_adam,
    "label flipping": label_flipping,
    "label flipping, 8 as 3": flip_eights,
    "random noise": random_noise,
    "random search": random_search,
    **{
        name: functools.partial(bilevel, name)
        for name in ("approximate gradient", "penalty", "Implicit")
    },
}
ONLY = {"clean, Adam": ATTACKS[:1], "label flipping, 8 as 3": ATTACKS[1:]}


def measure(cell: Cell, rows: list[Row]) -> Row:
    """Returns the percentages of a method on test images, and its cost."""
    del rows
    method, seed = cell["method"], cell["seed"]
    attacks, row, totals = ONLY.get(method, ATTACKS), {}, []
    for i, attack in enumerate(attacks):
        train, val, test, pixels = load_split(attack, seed)
        key = jax.random.fold_in(jax.random.key(seed), i)
        w, cost, fields = METHODS[method](attack, train, val, key)
        images = fields.pop("images", None)
        if method == "Implicit" and seed == 0:
            full = np.zeros((NUM_IMAGES, 784))
            full[:, pixels] = np.asarray(images)[:NUM_IMAGES]
            fields[f"images_{attack}"] = np.round(full, 1).tolist()
        percents = PERCENTS if len(w) > 1 else (0,)
        values = np.asarray(percent_right(w, test), float)
        row |= {
            f"{attack}_{percent}": float(value)
            for percent, value in zip(percents, values, strict=True)
        }
        totals.append((cost, fields.pop("num_hvps", 0.0)))
        row |= fields
    cost, num_hvps = np.mean(totals, axis=0)
    return row | {"gradient_equivalents": float(cost), "num_hvps": float(num_hvps)}


# The table.


def published() -> dict[tuple[str, str], Published]:
    """Returns the paper's numbers by row and column."""
    numbers = {
        ("clean, Adam", "untargeted_0"): Published(87.0, 0.5, "verified", source=TEXT)
    }
    for (method, attack), pairs in PAPER.items():
        for percent, (value, deviation) in zip(PERCENTS, pairs, strict=True):
            tolerance = max(0.5, 2 * np.sqrt(2) * (deviation or 0.0))
            numbers[method, f"{attack}_{percent}"] = Published(
                value,
                float(tolerance),
                "verified",
                deviation,
                f"table of {attack} attacks",
                scale="paper" if method == "label flipping" else "5,000 steps",
            )
    return numbers


# The images of a targeted attack are re-splits of few: 500 for the test, and 1,000 for
# training with 400 for validation.
TARGETED = Resplits(test_to_train=500 / 1400)
CLAIMS = (
    (Claim("approximate gradient", "penalty", "untargeted_6", True), None),
    (Claim("Implicit", "random search", "untargeted_6", True, min_effect=5.0), None),
    (Claim("Implicit", "random search", "targeted_6", min_effect=5.0), TARGETED),
    (Claim("Implicit", "approximate gradient", "targeted_6"), TARGETED),
)


def findings(rows: list[Row]) -> list[Finding]:
    """Returns the claims, the verdicts with our own deviations, and the run lengths."""
    lines = []
    for (method, name), number in published().items():
        values = [row[name] for row in select(rows, method=method) if name in row]
        if number.deviation is None or len(values) < 2:
            continue
        spread = np.hypot(number.deviation, np.std(values, ddof=1))
        difference = float(np.mean(values)) - number.value
        is_within = abs(difference) <= max(0.5, 2 * float(spread))
        verdict = "within" if is_within else "outside"
        lines.append(
            f"{method} {name.replace('_', ' ')}% {difference:+.2f} "
            f"({max(0.5, 2 * float(spread)):.2f}, {verdict})"
        )
    steps = [
        f"{row['method']} {row['steps_untargeted']} and {row['steps_targeted']}"
        for row in rows
        if row["seed"] == 0 and "steps_targeted" in row
    ]
    return [
        *evaluate_split_claims(CLAIMS, rows),
        Finding(
            "Differences from the paper, with twice the deviation of both: "
            + "; ".join(lines)
        ),
        Finding(f"Outer steps, untargeted and targeted: {', '.join(steps)}"),
    ]


def is_adam_equal(rows: Sequence[Row]) -> tuple[bool, str]:
    """Returns whether both trainings have the same clean accuracy."""
    values = [
        np.array([row["untargeted_0"] for row in select(rows, method=method)])
        for method in ("clean", "clean, Adam")
    ]
    difference = float(np.max(np.abs(values[0] - values[1])))
    return difference <= 0.1, f"largest difference {difference:.3f} points"


def plot(rows: list[Row], path: Path) -> None:
    """Plots the percentages against the number of poisons, and poisons of one seed."""
    figure = make_figure((13, 8))
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 1.3))
    axes = top.subplots(1, 2)
    labels = ("test accuracy, %", "8 read as 3, % of test images")
    for axis, attack, label in zip(axes, ATTACKS, labels, strict=True):
        for i, method in enumerate(METHODS):
            runs = [r for r in select(rows, method=method) if f"{attack}_6" in r]
            if not runs:
                continue
            values = np.array([[r[f"{attack}_{p}"] for p in PERCENTS] for r in runs])
            deviation = np.std(values, axis=0, ddof=1) if len(runs) > 1 else None
            axis.errorbar(PERCENTS, np.mean(values, 0), deviation, fmt="o-", capsize=3,
                          color=f"C{i}", label=method, markersize=4)  # fmt: skip
            if (method, attack) in PAPER:
                x, numbers = np.add(PERCENTS, 0.15), np.array(PAPER[method, attack])
                axis.errorbar(x, numbers[:, 0], numbers[:, 1], fmt="D", capsize=3,
                              color=f"C{i}", markerfacecolor="none")  # fmt: skip
        runs = [r[f"{attack}_0"] for r in select(rows, method="clean")]
        axis.axhline(np.mean(runs), color="gray", linestyle=":", label="clean")
        axis.plot([], [], "kD", markerfacecolor="none", label="paper")
        axis.set(xlabel="poisons, % of training images", ylabel=label, xticks=PERCENTS)
        axis.set_title(attack)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    rows_with_images = [row for row in rows if row.get("images_targeted")]
    axes = bottom.subplots(2, NUM_IMAGES, squeeze=False)
    for row in rows_with_images[:1]:
        for line, attack in zip(axes, ATTACKS, strict=True):
            for axis, image in zip(line, row[f"images_{attack}"], strict=True):
                axis.imshow(np.reshape(image, (28, 28)), cmap="gray", vmin=0, vmax=1)
                axis.set(xticks=[], yticks=[])
            line[0].set_ylabel(
                f"Implicit,\n{attack}", rotation=0, ha="right", fontsize=8
            )
    figure.savefig(path, dpi=130)


TEXT = "text of the experiments"

table = MeasurementTable(
    cells=cells_of(METHODS),
    measure_cell=measure,
    columns=tuple(
        Column(f"{attack}_{percent}", f"{attack} {percent}%", ".2f")
        for attack in ATTACKS
        for percent in (0, *PERCENTS)
    ),
    checks=(Check("L-BFGS and Adam train the same clean model", is_adam_equal),),
    published=published()
    | {
        ("RMD", f"{attack}_{percent}"): Published(value, 0.0, "secondary")
        for attack, values in QUOTED.items()
        for percent, value in zip(PERCENTS, values, strict=False)
    },
    findings=findings,
    plot=plot,
    scales=("paper",),
    minutes=45,
    paradigm="robustness",
    source="Mehra & Hamm 2021 (arXiv 1911.03432)",
    data="MNIST, 70,000 images",
    arrays=lambda: hg.datasets.load("mnist"),
)
