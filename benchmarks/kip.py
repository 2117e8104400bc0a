"""KIP: images and labels that are learned through exact kernel ridge regression.

*Question.* How accurate are one or ten learned images per class, beside the paper's
numbers, real images, centres and learned labels?

*Problem*, of the authors' notebook (`kip/KIP.ipynb` of google-research). MNIST, all
60,000 training images; pixels minus their mean over their deviation; targets are
one-hot labels minus 1/10. The kernel K is the tangent kernel of one infinitely wide
hidden layer of ReLUs with weight variance 2 and bias variance 0.01. The outer variable
is n images x with n labels y; the regression on them has the ridge
``r = 1e-6 tr K / n``. With the Cholesky factor ``C C' = K(x, x) + r I`` the inner
problem is the dual of the regression in the coordinates ``w = C' dual``,

    L(w) = ||w||^2 / 2 - w . C^-1 y,    M = mean (K(t, x) C'^-1 w - y_t)^2 / 2.

Its Hessian is the identity, so that `hg.ClosedForm` with the adjoint solver
`hg.Identity` gives the exact hypergradient. M is on 5,000 class-balanced training
images t, sampled at every step; 500 steps of Adam with rate 0.04, in float64, from
class-balanced real images with their own targets. The notebook makes 300 steps and
names about 1,000 for full convergence; more were too slow here, so that these runs are
not fully converged. The earlier paper has 0.01 as the rate for MNIST; in trials of 300
steps without augmentation its test accuracy was lower (88.4 against 89.3%).

*Rows.* *KIP* learns images and labels on targets that are augmented, as the printed row
does: rotated by up to 10 degrees and shifted by up to 10% in each direction, uniformly,
with bilinear interpolation. The notebook has the code of the augmentation without its
strength: these two numbers are ours, fixed before the first trial and kept after trials
of 400 steps showed that the result depends on them. *KIP, rotated* only rotates; *KIP,
not augmented* does neither. *random images* are those from which KIP starts, *random
search* is the best of 100 such sets on 5,000 targets; *k-means* has the centres of each
class. *label solve* has the labels that are best for all training images, by least
squares, on random images or centres. No row chooses anything on test images; rate and
number of steps were fixed after trials that had no other metric.

*Measured.* Accuracy of the regression, not of a network, on the 10,000 test images
after the last step. A gradient of M counts 1, a value a third, for each size.

*Published.* Within 1 and 0.5 points. Not run: 50 images per class, ConvNet kernel, DC.

*Not reproduced.* With our augmentation both numbers are lower, by 9.0 and 2.7 points.
At one image per class the strength of the augmentation decides: without it the number
is 4.1 points above the paper's, rotations cost 0.6 of it, and the shifts take the rest;
a trial outside of this table, one seed with shifts of 5%, ended at 87.4. With shifts of
10% the accuracy falls after step 150 at the latest. At ten per class no strength
reaches 97.2 in 500 steps: 94.6 with shifts of 10%, 96.6 with 5% in that trial, 96.4
with none, where it still rises by 0.1 points in the last 100 steps. No strength was
fitted to the published numbers.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.bench import Cell, Column, MeasurementTable, Published, Row, select
from hypergrad.runtime.compat import enable_x64

from .shared.kernel_regression import (
    inner_loss,
    make_estimator,
    predict,
    solution,
    squared_error,
)
from .shared.mnist import (
    NUM_CLASSES,
    NUM_TRAIN,
    SIDE,
    augment,
    balanced_indices,
    load,
    standardize,
    targets_of,
)
from .shared.plots import make_figure
from .shared.tuning import cells_of

NUM_TARGETS, NUM_STEPS, EVAL_EVERY = 5_000, 500, 50
SIZES, RATE, NUM_DRAWS = (1, 10), 0.04, 100
SHOWN = ("KIP", "KIP, not augmented", "k-means")  # whose images are in the figure
ROTATION, SHIFT = np.pi / 18, 0.1 * SIDE
#: Largest angle and shift of the targets, and the sizes that are run.
KIP = {
    "KIP": (ROTATION, SHIFT, SIZES),
    "KIP, rotated": (ROTATION, 0.0, SIZES[:1]),
    "KIP, not augmented": (0.0, 0.0, SIZES),
}


def sample_targets(
    train: PyTree, key: Array, max_angle: float = 0.0, max_shift: float = 0.0
) -> tuple[Array, Array]:
    """Returns class-balanced training images, standardized, and their targets."""
    sample_key, augment_key = jax.random.split(key)
    indices = balanced_indices(sample_key, NUM_TARGETS // NUM_CLASSES)
    x = train["x"][indices]
    if max_angle or max_shift:
        x = augment(x, augment_key, max_angle, max_shift)
    return standardize(x), targets_of(train["y"][indices])


@functools.cache
def make_loop(max_angle: float, max_shift: float) -> hg.OuterLoop:
    """Returns the loop of KIP; needs float64."""

    def outer_loss(w: Array, alpha: PyTree, batch: PyTree) -> Array:
        train, key = batch
        x, y = sample_targets(train, key, max_angle, max_shift)
        return squared_error(w, alpha, x, y)

    train, test, _ = load()
    problem = hg.Bilevel(inner_loss, outer_loss, None, hg.Batches(train, with_key=True))
    metric = jax.tree_util.Partial(accuracy, test)
    return hg.OuterLoop(
        problem,
        make_estimator(),
        optax.adam(RATE),
        metrics={"accuracy": metric},
        eval_every=EVAL_EVERY,
    )


def accuracy(test: PyTree, w: Array, alpha: PyTree, key: Array | None = None) -> Array:
    """Returns the accuracy on images in percent."""
    del key
    scores = predict(w, alpha, standardize(test["x"]))
    return 100 * jnp.mean(jnp.argmax(scores, axis=1) == test["y"])


# Methods: each returns the learned images and labels, the cost, and further fields.


def kip(method: str, size: int, key: Array) -> tuple[PyTree, float, Row]:
    """Returns what KIP learns, and its accuracies on the way."""
    max_angle, max_shift, _ = KIP[method]
    alpha, _, _ = random_images(size, key)
    loop = make_loop(max_angle, max_shift)
    trace = loop.run(loop.init(solution(alpha), alpha, key=key), num_steps=NUM_STEPS)
    curve = trace.metrics["accuracy"][::EVAL_EVERY]
    return trace.alpha, NUM_STEPS, {f"curve_{size}": np.round(curve, 2).tolist()}


def random_images(size: int, key: Array) -> tuple[PyTree, float, Row]:
    """Returns training images of each class with their targets."""
    train, _, _ = load()
    indices = np.asarray(balanced_indices(key, size))
    alpha = {"x": standardize(train["x"][indices])}
    return alpha | {"y": targets_of(train["y"][indices])}, 0.0, {}


def random_search(size: int, key: Array) -> tuple[PyTree, float, Row]:
    """Returns the sets of images with the largest accuracy on 5,000 targets."""
    train, _, _ = load()
    key, target_key = jax.random.split(key)
    indices = balanced_indices(target_key, NUM_TARGETS // NUM_CLASSES)
    targets = {name: x[np.asarray(indices)] for name, x in train.items()}
    score = jax.jit(lambda alpha: accuracy(targets, solution(alpha), alpha))
    keys = jax.random.split(key, NUM_DRAWS)
    sets = [random_images(size, key)[0] for key in keys]
    return max(sets, key=lambda alpha: float(score(alpha))), NUM_DRAWS / 3, {}


def centers(size: int, key: Array) -> tuple[PyTree, float, Row]:
    """Returns the k-means centres of each class with its target."""
    from sklearn.cluster import KMeans

    train, _, _ = load()
    seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
    options: dict[str, Any] = {"n_init": 1, "random_state": seed}
    x = [
        KMeans(size, **options).fit(train["x"][train["y"] == c]).cluster_centers_
        for c in range(NUM_CLASSES)
    ]
    x, y = np.concatenate(x), jnp.repeat(jnp.arange(NUM_CLASSES), size)
    return {"x": standardize(x), "y": targets_of(y)}, 0.0, {}


def solve_labels(alpha: PyTree) -> PyTree:
    """Returns the images with the best labels for all training images."""
    train, _, _ = load()
    identity = alpha | {"y": jnp.eye(len(alpha["x"]))}
    predict_all = jax.jit(lambda x: predict(solution(identity), alpha, standardize(x)))
    parts = np.split(train["x"], NUM_TRAIN // NUM_TARGETS)
    design = np.concatenate([np.asarray(predict_all(x)) for x in parts])
    y, *_ = np.linalg.lstsq(design, np.asarray(targets_of(train["y"])))
    return alpha | {"y": jnp.asarray(y)}


def with_labels(method: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a method with solved labels, at the cost of a value on all images."""
    cost = NUM_TRAIN / NUM_TARGETS / 3
    return lambda size, key: (solve_labels(method(size, key)[0]), cost, {})


METHODS: dict[str, Callable[..., Any]] = {
    **{name: functools.partial(kip, name) for name in KIP},
    "random images": random_images,
    "random search": random_search,
    "k-means": centers,
    "label solve": with_labels(random_images),
    "k-means, label solve": with_labels(centers),
}


def measure(cell: Cell, rows: list[Row]) -> Row:
    """Returns the accuracy of each size, and the learned images of the first seed."""
    del rows
    method, seed = cell["method"], cell["seed"]
    sizes = KIP[method][-1] if method in KIP else SIZES
    row: Row = {}
    with enable_x64(True):
        for size in sizes:
            key = jax.random.fold_in(jax.random.key(seed), size)
            alpha, cost, fields = METHODS[method](size, key)
            value = accuracy(load()[1], solution(alpha), alpha)
            row |= {f"accuracy_{size}": float(value), **fields}
            row["gradient_equivalents"] = cost
            if size == 1 and seed == 0 and method in SHOWN:
                row["images"] = np.round(np.asarray(alpha["x"]), 1).tolist()
    return row


def plot(rows: list[Row], path: Path) -> None:
    """Plots test accuracies against steps, and the images of one seed."""
    figure = make_figure((13, 8))
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 2))
    for axis, size in zip(top.subplots(1, 2), SIZES, strict=True):
        column, lines = f"accuracy_{size}", 0
        for i, method in enumerate(METHODS):
            runs = [row for row in select(rows, method=method) if row.get(column)]
            if not runs:
                continue
            mean = np.mean([row[column] for row in runs])
            curves = [row[f"curve_{size}"] for row in runs if method in KIP]
            if curves:
                steps = np.arange(0, NUM_STEPS + 1, EVAL_EVERY)
                axis.plot(steps, [*np.mean(curves, 0), mean], "o-", color=f"C{i}",
                          markersize=3, label=method)  # fmt: skip
            else:
                style = ("--", ":", "-.")[lines % 3]
                axis.axhline(mean, color=f"C{i}", linestyle=style, label=method)
                lines += 1
        number = PUBLISHED["KIP", column]
        axis.errorbar(NUM_STEPS * 1.04, number.value, number.deviation, fmt="kD",
                      capsize=3, label="KIP, published")  # fmt: skip
        axis.set(xlabel="outer steps", ylabel="MNIST test accuracy, %")
        axis.set_title(f"{size} image{'s' * (size > 1)} per class")
        axis.legend(fontsize=8, loc="lower right")
        axis.grid(alpha=0.3)
    rows_with_images = [row for row in rows if row.get("images")]
    axes = bottom.subplots(len(rows_with_images), NUM_CLASSES, squeeze=False)
    for line, row in zip(axes, rows_with_images, strict=True):
        for axis, image in zip(line, row["images"], strict=True):
            axis.imshow(np.reshape(image, (SIDE, SIDE)), cmap="gray")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(row["method"], rotation=0, ha="right", fontsize=8)
    figure.savefig(path, dpi=130)


def number(value: float, deviation: float, tolerance: float) -> Published:
    """Returns a number of the paper's table 1."""
    return Published(value, tolerance, "verified", deviation, "table 1")


PUBLISHED = {
    ("KIP", "accuracy_1"): number(85.5, 0.1, 1.0),
    ("KIP", "accuracy_10"): number(97.2, 0.2, 0.5),
    ("KIP, ConvNet kernel", "accuracy_1"): number(96.5, 0.1, 1.0),
    ("KIP, ConvNet kernel", "accuracy_10"): number(99.1, 0.1, 0.5),
    ("DC, networks", "accuracy_1"): number(91.7, 0.5, 1.0),
    ("DC, networks", "accuracy_10"): number(97.4, 0.2, 0.5),
}

table = MeasurementTable(
    cells=cells_of(METHODS),
    measure_cell=measure,
    columns=(
        Column("accuracy_1", "1 per class, %", ".2f"),
        Column("accuracy_10", "10 per class, %", ".2f"),
    ),
    published=PUBLISHED,
    plot=plot,
    seeds=3,
    scales=("paper",),
    minutes=20,
    paradigm="distillation",
    source="Nguyen et al. 2021 (arXiv 2107.13034), table 1",
    data="MNIST, 70,000 images",
    arrays=lambda: hg.datasets.load("mnist"),
)
