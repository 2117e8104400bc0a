"""Baselines of data cleaning on MNIST, as the authors of BOME saved them.

*Question.* BOME (Liu et al. 2022) learns one weight per training example where half of
the labels were drawn anew. The paper shows curves; the only numbers are those of three
models without a bilevel problem, in `hpo/save_data_cleaning/mnist_pretrained.stats` of
Cranial-XIX/BOME. Are they right, and what do learned weights add to them?

*Data*, by the authors' code: `torch.manual_seed(1)`; `torch.randperm(60000)` divides
the training images of MNIST into 50,000 for training, 5,000 for validation (the outer
loss) and 5,000 for selection; the 10,000 test images are untouched. Then the labels of
the first 25,000 of `torch.randperm(50000)` become `torch.randint(10, (25000,))`, so
that 45% of the training labels are wrong. Pixels in [0, 1] minus one mean, divided by
one standard deviation plus 1e-4, both of the training images. All draws are those of
PyTorch. The authors also saved the three models: on our arrays their test loss and
accuracy are 0.81421 and 84.00, 0.31519 and 91.06, 0.26643 and 92.53, and the second one
has 94.5% on our validation set and 90.4% on our selection set.

*Model.* Softmax regression with a matrix ``[10, 784]``; the code decides: the column of
the last pixel is also the bias. It starts uniform in [-1/28, 1/28], from the same
generator.

*Protocol.* 5,000 epochs of gradient descent on all examples at once, rate 0.01 and
momentum 0.9. Of the models after each epoch, the one with the lowest cross-entropy on
the selection set is reported. *noisy + validation* trains on the training set with the
noisy labels and the validation set, with the penalty 0.001 times the squared norm;
*validation only* and *clean + validation*, which has the original labels, have no
penalty. Deviations: none known; float32 as in the code. Both rows on all images are
trained by one program, which the first of them pays for in seconds.

*Rows without a published number.* Inner loss: mean over the training set of the weight,
clipped to [0, 1], times the cross-entropy, plus the same penalty; outer loss: mean
cross-entropy of the validation set. As in the code, both rows start at the model of
*noisy + validation*, whose 5,000 epochs are not in their cost, and at weights of
0.5. They spend 2,000 gradient-equivalents, and of their outer steps the model with the
lowest selection loss is reported. *BOME* has 10 inner steps, rates 0.01 for the model
and 1,000 for the weights, both with momentum 0.9, and eta 0.1; apart from the second
rate, which is in the authors' range of 10 to 1,000, these are the code's defaults. It
differs from the code where `hypergrad.BOME` follows the text: the barrier is eta times
the squared norm of the gradient of q (in the code eta times q), and the inner descent
has no momentum. Steps of a single-loop method are never trusted. *reverse mode*
differentiates 10 warm-started steps of the protocol's descent and moves the weights by
Adam with rate 0.2.

Settings come from trials on 5,000 training images with 1,000 gradient-equivalents, by
the selection loss: for BOME rates of 100 and 1,000 (there divided by ten, as the mean
is over fewer images), eta 0.1 and 0.5, one and 10 inner steps; for gradients of an
estimator three settings of `Unrolled` and four of `Implicit` with conjugate gradients.
Left out: the authors' full grid, their 5,000 outer steps (about 60,000
gradient-equivalents), and random search, which 50,000 weights make pointless.

*Columns.* `epoch` is the epoch, or outer step, that was selected. `F1, right` is the
score of the code, of "the weight is above one half" as a detector of right labels, and
`F1, wrong` that of the opposite as a detector of wrong ones; a weight of 1 for every
image has 0.71 and 0. One seed, because the draws are those of the authors.

*Tolerances.* 0.3 points of accuracy, 2% of the loss.

*Added after the first run.* `grad-eq` counts gradients of all 50,000 training images:
an epoch is 1.1 of them, and 0.1 for *validation only*. The 5,000 epochs of *noisy +
validation* that the rows with weights do not count are 18 up to the selected model. Its
test accuracy after every 50th epoch, which a finding quotes, selects nothing.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad import datasets
from hypergrad.bench import (
    Column,
    Finding,
    MeasurementTable,
    Published,
    Row,
    select,
)

from .shared.plots import make_panels
from .shared.torch_random import TorchGenerator
from .shared.tuning import cells_with_seeds, with_seconds

SOURCE = "hpo/save_data_cleaning/mnist_pretrained.stats"
NOISY, VALIDATION, CLEAN = (
    "noisy + validation",
    "validation only",
    "clean + validation",
)
NUM_EPOCHS, EPOCHS_PER_POINT = 5000, 50
BUDGET = 2000.0
PENALTY = 1e-3
DESCENT = optax.sgd(0.01, momentum=0.9)
LEARNED = {
    "BOME": (
        hg.BOME(DESCENT, 10, step_size=0.01, eta=0.1),
        optax.sgd(1000.0, momentum=0.9),
    ),
    "reverse mode": (
        hg.Unrolled(hg.Descent(DESCENT, 10), warm_start=True),
        optax.adam(0.2),
    ),
}
METHODS = (NOISY, VALIDATION, CLEAN, *LEARNED)
SIZES = (50_000, 5_000, 5_000)

Data = dict[str, Array]  # images [784, n] and labels [10, n]


@functools.cache
def load_data(sizes: tuple[int, int, int] = SIZES) -> tuple[dict[str, Data], Array]:
    """Returns the data sets by name, and the first weights of the model."""
    arrays, generator = datasets.load("mnist"), TorchGenerator(1)
    is_test = arrays["test"]
    images, labels = arrays["x"][~is_test], arrays["y"][~is_test]
    parts = np.split(generator.randperm(60_000), np.cumsum(sizes))[:3]
    train, val, selection = parts
    noisy, num_noisy = labels[train], sizes[0] // 2
    position = generator.randperm(sizes[0])[:num_noisy]
    noisy[position] = generator.randint(10, num_noisy)
    w = jnp.asarray(generator.uniform(10, 784, low=-1 / 28, high=1 / 28))

    pixels = images[train].astype(np.float64)
    mean, scale = pixels.mean(), pixels.std(ddof=1) + 1e-4

    def data_set(images: np.ndarray, labels: np.ndarray) -> Data:
        normalized = ((images - mean) / scale).T.astype(np.float32)
        one_hot = jax.nn.one_hot(labels, 10, axis=0)
        return {"x": jnp.asarray(normalized), "y": one_hot}

    return {
        NOISY: data_set(images[train], noisy),
        CLEAN: data_set(images[train], labels[train]),
        "validation": data_set(images[val], labels[val]),
        "selection": data_set(images[selection], labels[selection]),
        "test": data_set(arrays["x"][is_test], arrays["y"][is_test]),
    }, w


def losses(w: Array, data: Data) -> Array:
    """Returns the cross-entropy of each example; the last column is also the bias."""
    logits = w @ data["x"] + w[:, -1:]
    return optax.softmax_cross_entropy(logits, data["y"], axis=0)


def mean_loss(w: Array, data: Data) -> Array:
    """Returns the mean cross-entropy."""
    return jnp.mean(losses(w, data))


def accuracy(w: Array, data: Data) -> Array:
    """Returns the fraction of right answers."""
    logits = w @ data["x"] + w[:, -1:]
    return jnp.mean(jnp.argmax(logits, 0) == jnp.argmax(data["y"], 0))


def weighted_loss(w: Array, alpha: Array, data: Data) -> Array:
    """Returns the inner loss, with weights clipped to [0, 1] and a penalty."""
    weighted = jnp.clip(alpha, 0, 1) * losses(w, data)
    return jnp.mean(weighted) + PENALTY * jnp.sum(w**2)


# Models without a bilevel problem.


@jax.jit
def train(
    w: Array, images: Array, labels: Array, penalties: Array, held: dict[str, Data]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Trains K models on the same images.

    Args:
      w: First weights of all models.
      images: Images, ``[784, n]``.
      labels: Labels of each model, ``[K, 10, n]``.
      penalties: Penalty of each model, ``[K]``.
      held: The selection set and the test set.

    Returns:
      The best weights, their selection loss and epoch, ``[K, ...]``; and test accuracy
      and test loss at evenly spaced epochs, ``[points, K]``.
    """

    def loss(w: Array, labels: Array, penalty: Array) -> Array:
        data = {"x": images, "y": labels}
        return mean_loss(w, data) + penalty * jnp.sum(w**2)

    def run_epoch(carry: PyTree, epoch: Array) -> tuple[PyTree, None]:
        w, state, best = carry
        grads = jax.vmap(jax.grad(loss))(w, labels, penalties)
        updates, state = DESCENT.update(grads, state)
        w = optax.apply_updates(w, updates)
        value = jax.vmap(lambda w: mean_loss(w, held["selection"]))(w)
        new = {"w": w, "loss": value, "epoch": jnp.full(value.shape, epoch)}
        is_better = value <= best["loss"]
        choose = jax.vmap(jnp.where)
        best = {name: choose(is_better, new[name], best[name]) for name in new}
        return (w, state, best), None

    def run_epochs(carry: PyTree, epochs: Array) -> tuple[PyTree, dict[str, Array]]:
        carry, _ = jax.lax.scan(run_epoch, carry, epochs)
        test = held["test"]
        evaluate = lambda w: {
            "accuracy": accuracy(w, test), "loss": mean_loss(w, test)
        }  # fmt: skip
        return carry, jax.vmap(evaluate)(carry[0])

    ws = jnp.broadcast_to(w, (len(penalties), *w.shape))
    worst = jnp.full(len(penalties), jnp.inf)
    best = {"w": ws, "loss": worst, "epoch": jnp.zeros(len(penalties), int)}
    epochs = jnp.arange(NUM_EPOCHS).reshape(-1, EPOCHS_PER_POINT) + 1
    carry, curves = jax.lax.scan(run_epochs, (ws, DESCENT.init(ws), best), epochs)
    return carry[2], curves


@functools.cache
def train_baselines(methods: tuple[str, ...]) -> dict[str, tuple[Array, Row]]:
    """Returns the selected model of each method, and its row."""
    sets, w = load_data()
    val, parts = sets["validation"], [sets["validation"]]
    if VALIDATION not in methods:
        parts = [sets[NOISY], val]
    images = jnp.concatenate([part["x"] for part in parts], 1)
    labels = [
        jnp.concatenate(
            [*([sets[method]["y"]] if method in sets else []), val["y"]], axis=1
        )
        for method in methods
    ]
    penalties = jnp.array([PENALTY * (method == NOISY) for method in methods])
    held = {name: sets[name] for name in ("selection", "test")}
    best, curves = train(w, images, jnp.stack(labels), penalties, held)
    epochs = range(EPOCHS_PER_POINT, NUM_EPOCHS + 1, EPOCHS_PER_POINT)
    epoch_cost = images.shape[1] / SIZES[0]  # in gradients of all training images
    return {
        method: (
            best["w"][i],
            {
                "epoch": int(best["epoch"][i]),
                "gradient_equivalents": NUM_EPOCHS * epoch_cost,
                "curve_cost": [epoch * epoch_cost for epoch in epochs],
                "curve_accuracy": np.asarray(curves["accuracy"][:, i]).tolist(),
                "curve_loss": np.asarray(curves["loss"][:, i]).tolist(),
            },
        )
        for i, method in enumerate(methods)
    }


# Learned weights.


def f1(is_found: Array, is_true: Array) -> Array:
    """Returns the F1 score of a detector."""
    return 2 * jnp.sum(is_found & is_true) / (jnp.sum(is_found) + jnp.sum(is_true))


def learn(method: str, w: Array, sets: dict[str, Data], budget: float) -> Row:
    """Returns the row of the selected model of a bilevel method."""
    estimator, optimizer = LEARNED[method]
    train, test = sets[NOISY], sets["test"]
    is_right = jnp.all(train["y"] == sets[CLEAN]["y"], axis=0)
    problem = hg.Bilevel(
        weighted_loss,
        lambda w, alpha, batch: mean_loss(w, batch),
        train,
        sets["validation"],
    )
    metrics = {
        "selection": lambda w, alpha, key: mean_loss(w, sets["selection"]),
        "accuracy": lambda w, alpha, key: accuracy(w, test),
        "loss": lambda w, alpha, key: mean_loss(w, test),
        "f1_right": lambda w, alpha, key: f1(alpha > 0.5, is_right),
        "f1_wrong": lambda w, alpha, key: f1(alpha <= 0.5, ~is_right),
    }
    loop = hg.OuterLoop(
        problem,
        estimator,
        optimizer,
        metrics=metrics,
        project=lambda alpha: jnp.clip(alpha, 0, 1),
    )
    trace = loop.run(loop.init(w, jnp.full(is_right.shape, 0.5)), budget=budget)
    series = {name: np.asarray(x, float) for name, x in trace.metrics.items()}
    best = int(np.nanargmin(series["selection"]))
    total = lambda name: float(np.nansum(np.asarray(trace.stats[name], float)))
    costs = np.asarray(trace.cost, float)
    return {
        "epoch": best + 1,
        "test_loss": series["loss"][best],
        "test_accuracy": series["accuracy"][best],
        "f1_right": series["f1_right"][best],
        "f1_wrong": series["f1_wrong"][best],
        "best_selection": series["selection"][best],
        "num_steps": len(costs),
        "gradient_equivalents": costs[-1],
        "num_hvps": total("num_hvps"),
        "num_untrusted": float(np.sum(~np.asarray(trace.stats["trusted"], bool))),
        "curve_cost": costs.tolist(),
        "curve_accuracy": series["accuracy"].tolist(),
        "curve_loss": series["loss"].tolist(),
    }


# The table.


def run(method: str) -> Row:
    """Returns the numbers of a method."""
    sets, _ = load_data()
    group = (VALIDATION,) if method == VALIDATION else (NOISY, CLEAN)
    if method in LEARNED:
        start, _ = train_baselines((NOISY, CLEAN))[NOISY]
        return learn(method, start, sets, BUDGET)
    w, row = train_baselines(group)[method]
    return row | {
        "test_loss": float(mean_loss(w, sets["test"])),
        "test_accuracy": float(accuracy(w, sets["test"])),
        "best_selection": float(mean_loss(w, sets["selection"])),
    }


def findings(rows: list[Row]) -> list[Finding]:
    """Returns the order of the rows, and what the selection of an epoch decides."""
    percent = lambda row: 100 * row["test_accuracy"]
    names = ", ".join(
        f"{row['method']} {percent(row):.2f}"
        for row in sorted(rows, key=percent, reverse=True)
    )
    noisy = select(rows, method=NOISY)[0]
    best = int(np.argmax(noisy["curve_accuracy"]))
    last = 100 * noisy["curve_accuracy"][-1]
    return [
        Finding(f"Test accuracy in %, from the highest: {names}"),
        Finding(
            f"*{NOISY}* is selected at epoch {noisy['epoch']} of {NUM_EPOCHS} with "
            f"{percent(noisy):.2f}%. The same training has "
            f"{100 * noisy['curve_accuracy'][best]:.2f}% at epoch "
            f"{EPOCHS_PER_POINT * (best + 1)} and {last:.2f}% at the end, with a "
            "higher loss."
        ),
    ]


PUBLISHED = {
    (method, name): number
    for method, loss, percent in (
        (NOISY, 0.81418, 83.99),
        (VALIDATION, 0.31519, 91.06),
        (CLEAN, 0.26643, 92.52),
    )
    for name, number in (
        ("test_loss", Published(loss, 0.02, "verified", source=SOURCE, relative=True)),
        ("test_accuracy", Published(percent, 0.3, "verified", source=SOURCE)),
    )
}


def plot(rows: list[Row], path: Path) -> None:
    """Plots test accuracy and test loss by cost, with the numbers of the authors."""
    figure, axes = make_panels(1, 2, (12, 4.8))
    panels = (("accuracy", 100, "test accuracy, %"), ("loss", 1, "test loss"))
    for axis, (name, scale, label) in zip(axes, panels, strict=True):
        for i, row in enumerate(rows):
            values = scale * np.asarray(row[f"curve_{name}"], float)
            axis.plot(row["curve_cost"], values, color=f"C{i}", label=row["method"])
            number = PUBLISHED.get((row["method"], f"test_{name}"))
            if number is not None:  # at the cost of the epoch that was selected
                cost = row["epoch"] * row["gradient_equivalents"] / NUM_EPOCHS
                axis.plot(
                    cost, number.value, "o", markersize=8,
                    markerfacecolor="none", color=f"C{i}",
                )  # fmt: skip
        axis.plot([], [], "o", markerfacecolor="none", color="black", label="authors")
        axis.set(
            xlabel="gradients of all training images",
            ylabel=label,
            xscale="log",
        )
        axis.grid(alpha=0.2)
    axes[1].set_yscale("log")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


table = MeasurementTable(
    cells=cells_with_seeds(dict.fromkeys(METHODS, 1)),
    measure_cell=with_seconds(lambda cell: run(cell["method"])),
    seeds=1,
    columns=(
        Column("test_loss", form=".5f"),
        Column("test_accuracy", "test accuracy %", ".2f", scale=100),
        Column("best_selection", "selection loss", ".5f"),
        Column("f1_right", "F1, right", ".4f"),
        Column("f1_wrong", "F1, wrong", ".4f"),
        Column("epoch", form=".0f"),
    ),
    published=PUBLISHED,
    findings=findings,
    plot=plot,
    paradigm="supervised",
    source="Liu et al. 2022 (arXiv 2209.08709), statistics saved by the authors",
    data="MNIST (50,000 + 5,000 + 5,000 + 10,000 images)",
    arrays=lambda: datasets.load("mnist"),
    minutes=15,
    scales=("paper",),
)
