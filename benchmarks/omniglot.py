"""Omniglot, 5-way 1-shot: the network of MAML, at a sixtieth of its length.

*Question.* Finn et al. 2017 print 98.7% for MAML after 60,000 steps. What have MAML and
a ridge head on the same network learned after 1,000 steps, and what is that worth
beside the network as it is initialized and beside ridge regression on pixels?

*Data*, by the authors' code (cbfinn/maml): Omniglot at 28 by 28 pixels, 1,623
characters in a random order, of which 1,100 are for training, 100 for validation and
423 for testing. A task has five characters, each turned by a random multiple of 90
degrees, one drawing of each to learn from, and one of each to classify. Deviations: a
pixel is the average over its area (the code asks for Lanczos, for which the library
that it calls takes the nearest pixel of 1-bit images), training tasks are always new
(there they are from a list of 200,000), and each seed has an order of its own.

*Network*, by the same code: four convolutions with 64 filters of 3 by 3, stride 2, each
followed by standardization, a learned shift and ReLU; the mean over the last 2 by 2
pixels yields 64 features. Statistics are those of the five drawings to learn from, or
of the five to classify, one of each class, in training and in testing, as in the code;
`pixels` classifies each drawing alone. Filters start at uniform Glorot values, the head
of MAML at standard normal ones. The biases of the convolutions, which the
standardization removes, are left out.

*Methods.* A step samples 32 tasks; Adam has rate 0.001, the authors' default. `maml`
learns the start of filters and head, and the shifts, through one step of gradient
descent with rate 0.4 on the sum of five losses (`Unrolled`, with second derivatives);
it is measured after three such steps. `ridge head`, after Bertinetto et al. 2019,
learns filters, shifts, a penalty and a scale of the scores; its head is ridge
regression of the five drawings in closed form. Network and rate are those of `maml`,
and not tuned for it. `untrained` is the ridge head on initial filters, `pixels` ridge
regression on the pixels of a task: of both, the penalty in {0.1, 1, 10, 100} is taken
that classifies 608 validation tasks best. `random search` draws filters as they are
initialized, shifts up to 0.1, penalties in [exp(-3), exp(3)] and scales in [1, 100] for
the ridge head; each draw is judged on 32 training tasks of its own, and the lowest loss
wins, which favours draws whose tasks were easy.

*Budget.* 5,000 gradient-equivalents, which are 1,000 steps of `maml` or `ridge head`,
or 3,750 draws, and about an hour on two processor cores for five seeds; 300,000, the
authors' 60,000 steps, with `--scale paper`. A step counts 5 in both, although it takes
`ridge head` less time.

*Measured.* `accuracy` on 608 tasks of the test characters, which are read after the
last step alone; the authors' code has 600.

*Published.* 98.7 +- 0.4, the interval over the tasks, stands in Finn et al. as three
other papers quote it. It belongs to 60,000 steps, so that ours is printed beside it and
judged with `--scale paper` alone.

*Claims*, before the first full run: the ridge head is at least 15 points above pixels,
which was asked for when the table was planned; maml and the ridge head are each above
`untrained`; the ridge head is above maml. Before, there had been runs of 60 steps and
of 225 draws on seed 100, with a mean in place of the sum and a first scale of 1, and of
40 steps and 150 draws as stated here.

*Intervals.* The seeds are re-splits of one set of characters, of which 1,200 serve to
learn and 423 to test, so that the intervals are wider than those of independent seeds
(Nadeau and Bengio 2003). This correction came after the run.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

import hypergrad as hg
from hypergrad import datasets
from hypergrad.bench import (
    Claim,
    Column,
    Comparison,
    Published,
    Resplits,
    Row,
    Table,
    baselines,
    select,
    with_options,
)
from hypergrad.tasks.task import Task

from .shared import omniglot_tasks as omniglot
from .shared.omniglot_tasks import FeatureFn
from .shared.plots import make_panels
from .shared.task_runs import minimize_task, search_task

BUDGET = {"small": 5_000.0, "paper": 300_000.0}
PENALTIES = (0.1, 1.0, 10.0, 100.0)
NUM_TEST_BATCHES = 19  # of 32 tasks
NUM_BLOCKS = 60  # of steps, in the figure
SOLVER = hg.Descent(optax.sgd(0.4), num_steps=1)
TEST_SOLVER = hg.Descent(optax.sgd(0.4), num_steps=3)
OPTIMIZER = optax.adam(1e-3)
MIN_GAIN = 0.15
FEATURES = {
    "pixels": (omniglot.pixel_features, 28 * 28),
    "ridge": (omniglot.network_features, omniglot.NUM_FILTERS),
}


# The task and its variants.


def make_task(key: Array, scale: str = "small", *, variant: str = "maml") -> Task:
    """Returns tasks of five characters, for one of three models."""
    del scale
    split_key, init_key = jax.random.split(key)
    characters = omniglot.split_characters(split_key)
    sampler = lambda name: jax.tree_util.Partial(
        omniglot.sample_tasks, characters[name]
    )
    init_fn, test_solver = None, None
    if variant == "maml":
        w, alpha = omniglot.init_maml(init_key)
        losses = omniglot.adaptation_loss, omniglot.query_loss
        solver, test_solver = SOLVER, TEST_SOLVER
        init_fn, scores = omniglot.shared_start, adapted_scores
    else:
        f, num_features = FEATURES[variant]
        w, alpha = omniglot.init_ridge(init_key, num_features)
        losses, solver, scores = ridge_parts(f)
        test_solver = solver
    problem = lambda name: hg.Bilevel(*losses, init_fn=init_fn, data_fn=sampler(name))
    return Task(
        paradigm="few-shot",
        problem=problem("train"),
        solver=solver,
        w=w,
        alpha=alpha,
        space=jax.tree.map(lambda _: hg.spaces.Real(), alpha),
        metrics={
            f"{name}_accuracy": jax.tree_util.Partial(
                accuracy, scores, test_solver, problem(name), w
            )
            for name in ("val", "test")
        },
    )


@functools.cache
def ridge_parts(f: FeatureFn) -> tuple:
    """Returns the losses, the solver and the scores of ridge regression."""
    losses = (
        functools.partial(omniglot.ridge_loss, f),
        functools.partial(omniglot.ridge_query_loss, f),
    )
    solver = hg.ClosedForm(functools.partial(omniglot.ridge_fit, f))
    return losses, solver, functools.partial(omniglot.ridge_scores, f)


def adapted_scores(w: PyTree, alpha: PyTree, x: Array) -> Float[Array, "tasks n ways"]:
    """Returns the class scores of the networks of all tasks."""
    return jax.vmap(omniglot.task_scores, (0, None, 1))(w, alpha["shifts"], x)


@functools.partial(jax.jit, static_argnums=0)
def accuracy(scores, solver, problem, init_w, w, alpha, key):
    """Returns the accuracy on 608 new tasks, each of which is adapted to anew."""
    del w

    def batch_accuracy(key):
        support, query = problem.sample_data(key)
        start = problem.init_inner(init_w, alpha)
        w, _ = solver.solve(problem.inner_loss, start, alpha, support, key)
        classes = jnp.argmax(scores(w, alpha, query["x"]), axis=-1)
        return jnp.mean(classes == query["y"].T)

    keys = jax.random.split(jax.random.fold_in(key, 2), NUM_TEST_BATCHES)
    return jnp.mean(jax.lax.map(batch_accuracy, keys))


# Methods.


def learn(task: Task, *, budget: float, key: Array) -> hg.Trace:
    """Moves what tasks share along hypergradients of one task batch per step."""
    return minimize_task(
        task, hg.Unrolled(task.solver), OPTIMIZER, key, budget=budget, space=None
    )


def ridge(task: Task, *, budget: float, key: Array, penalty: float) -> hg.Trace:
    """Uses ridge regression on features that nothing was learned about."""
    del budget
    alpha = task.alpha | {"log_penalty": jnp.log(jnp.float32(penalty))}
    return baselines.trace_of_point(task, task.w, alpha, key)


def random_search(task: Task, *, budget: float, key: Array) -> hg.Trace:
    """Samples filters, shifts, a penalty and a scale until the budget is spent."""
    alpha = task.alpha
    around_zero = lambda bound, like: hg.spaces.Interval(
        -bound, bound, shape=like.shape
    )
    space = {
        "filters": [
            around_zero(omniglot.glorot_bound(len(W)), W) for W in alpha["filters"]
        ],
        "shifts": [around_zero(0.1, shift) for shift in alpha["shifts"]],
        "log_penalty": hg.spaces.Interval(-3.0, 3.0),
        "log_scale": hg.spaces.Interval(0.0, float(np.log(100.0))),
    }
    return search_task(task, budget, key, space=space)


METHODS = {
    **{
        label: with_options(
            ridge, grid={"penalty": PENALTIES}, task_settings={"variant": variant}
        )
        for label, variant in (("pixels", "pixels"), ("untrained", "ridge"))
    },
    "random search": with_options(random_search, task_settings={"variant": "ridge"}),
    "maml": with_options(learn, task_settings={"variant": "maml"}),
    "ridge head": with_options(learn, task_settings={"variant": "ridge"}),
}


# The printed form.


def learning_curve(task: Task, trace: hg.Trace, w: PyTree, key: Array) -> Row:
    """Returns the number of outer steps, and the mean loss over blocks of them."""
    del task, w, key
    losses = np.asarray(trace.value, float)
    if trace.row_kind != "step" or len(losses) < NUM_BLOCKS:
        return {}
    means = [float(np.mean(block)) for block in np.array_split(losses, NUM_BLOCKS)]
    return {"num_steps": len(losses), "mean_losses": means}


def plot(rows: list[Row], path: Path) -> None:
    """Plots the query losses of the methods that learn, and all accuracies."""
    figure, (left, right) = make_panels(1, 2, (11, 4))
    labels = list(dict.fromkeys(row["method"] for row in rows))
    for i, label in enumerate(labels):
        of_label = select(rows, method=label)
        for row in of_label:
            if "mean_losses" in row:
                step = (np.arange(NUM_BLOCKS) + 0.5) * row["num_steps"] / NUM_BLOCKS
                means = np.array(row["mean_losses"], float)
                left.plot(step, means, color=f"C{i}", alpha=0.6)
        if any("mean_losses" in row for row in of_label):
            left.plot([], [], color=f"C{i}", label=label)
        values = 100 * np.array([row["test_accuracy"] for row in of_label], float)
        right.plot(values, [i] * len(values), "o", color=f"C{i}", alpha=0.5)
        right.plot(np.nanmean(values), i, "k|", markersize=14)
        if label == "maml":
            right.plot(
                98.7, i, "D", color=f"C{i}", markerfacecolor="none",
                label="published, 60,000 steps",
            )  # fmt: skip
    left.set(xlabel="outer step", ylabel="loss of new tasks", yscale="log")
    if left.lines:
        left.legend(fontsize=9)
    right.plot([], [], "k|", markersize=14, label="mean of seeds")
    right.set_yticks(range(len(labels)), labels)
    right.invert_yaxis()
    right.set(xlabel="test accuracy, %")
    right.legend(fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


table = Table(
    task=make_task,
    methods=METHODS,
    budget=BUDGET,
    metrics=("test_accuracy",),
    selection=("val_accuracy",),
    extra=learning_curve,
    columns=(
        Column("test_accuracy", "accuracy %", ".2f", scale=100),
        Column("num_steps", "steps", ".0f"),
    ),
    claims=(
        Claim("ridge head", "pixels", "test_accuracy", min_effect=MIN_GAIN),
        Claim("ridge head", "untrained", "test_accuracy"),
        Claim("maml", "untrained", "test_accuracy"),
        Claim("ridge head", "maml", "test_accuracy"),
    ),
    comparisons=tuple(
        Comparison(label, ("random search",), "test_accuracy")
        for label in ("maml", "ridge head")
    ),
    published={
        ("maml", "test_accuracy"): Published(
            98.7, 0.4, "secondary", source="Finn et al. 2017, table 1, as quoted"
        )
    },
    resplits=Resplits(test_to_train=423 / 1200),
    plot=plot,
    seeds=5,
    scales=("small", "paper"),
    minutes=60,
    paradigm="few-shot",
    source=(
        "Finn et al. 2017 (arXiv 1703.03400), Bertinetto et al. 2019 (arXiv 1805.08136)"
    ),
    data="Omniglot (1,623 characters)",
    arrays=lambda: datasets.load("omniglot"),
)
