"""Cost of a reverse pass in mixed mode and of one by autodiff.

*Question.* How many operations does mixed mode exchange for how much memory in
`Unrolled`?

*Method.* A step is a gradient ``g`` and an elementwise update of the form ``u(g, w,
state, alpha)``, whatever the optimizer. Autodiff goes back through the update and
yields the cotangent ``v`` of ``g``. In mixed mode one derivative of one gradient then
yields ``H v`` and ``Jᵀ v``, and a step has to store only ``w`` and what the update
needs, nothing of the network. This takes six products with the matrices of a layer, as
many as autodiff; but those of the forward pass and of the backward signals of the
gradient are computed a second time.

*Problems.* Logistic regression with 500 features and penalties, 10,000 examples and 500
steps; a ReLU network 784-300-10 with a weight for each of 5,000 examples, 100 steps on
all examples; a tanh network 784-128-10, batches of 128, 1,000 steps of momentum or
Adam; one 256-256-256-256-10, batches of 256, 1,000 steps. The rate is a hyperparameter
of all, and so is one penalty per layer of the networks.

*Measured.* Programs are compiled and not run, so that every number is the same on every
run: operations, in gradients of a batch per step, and scratch memory. Both are given
with checkpoints and with all steps stored.

*Claims.* None: a forward pass is made once more, so that it cannot take fewer
operations. The lines below the table state the exchange of operations for scratch
memory. `Unrolled` uses autodiff while the values of all steps fit its limit, then mixed
mode with all steps stored, then mixed mode with checkpoints.
"""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.bench import Cell, Finding, MeasurementTable, Row
from hypergrad.bench.report import markdown_table
from hypergrad.estimators.inner_run import make_final_w_fn
from hypergrad.problem import EstimateData
from hypergrad.products import Loss

from .shared import plots


def scores(act: Callable, w: PyTree, x: Array) -> Array:
    """Returns the outputs of a network without biases."""
    for layer in w[:-1]:
        x = act(x @ layer)
    return x @ w[-1]


def network(act: Callable, w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Returns the cross-entropy with example weights and one log-penalty per layer."""
    s = scores(act, w, batch["x"])
    losses = optax.softmax_cross_entropy_with_integer_labels(s, batch["y"])
    if "weights" in alpha:
        losses = jax.nn.sigmoid(alpha["weights"]) * losses
    squares = jnp.stack([jnp.sum(layer**2) for layer in w])
    return jnp.mean(losses) + jnp.vdot(jnp.exp(alpha["penalties"]), squares)


def logistic(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Returns the loss of logistic regression with one log-penalty per weight."""
    s = batch["x"] @ w[0][:, 0]
    fit = jnp.mean(jax.nn.softplus(s) - batch["y"] * s)
    return fit + jnp.vdot(jnp.exp(alpha["penalties"]), w[0][:, 0] ** 2)


def momentum(alpha: PyTree) -> optax.GradientTransformation:
    """Returns gradient descent with momentum at a learned rate."""
    return optax.sgd(jnp.exp(alpha["rate"]), momentum=0.9)


def adam(alpha: PyTree) -> optax.GradientTransformation:
    """Returns Adam at a learned rate."""
    return optax.adam(jnp.exp(alpha["rate"]))


relu_network, tanh_network = (
    functools.partial(network, act) for act in (jax.nn.relu, jnp.tanh)
)


class Workload(NamedTuple):
    """An inner problem with its optimizer.

    Attributes:
      loss: Inner loss; without penalties it is the outer loss.
      layers: Widths of the network.
      examples: Number of examples.
      batch: Batch size, or None for all examples.
      steps: Number of inner steps.
      penalties: Number of penalties.
      weights: Whether each example has a weight.
      optimizer: ``alpha -> optimizer``.
    """

    loss: Loss
    layers: tuple[int, ...]
    examples: int
    batch: int | None
    steps: int
    penalties: int
    weights: bool = False
    optimizer: Callable = momentum


WORKLOADS = {
    "logistic, full batch": Workload(logistic, (500, 1), 10_000, None, 500, 500),
    "784-300-10, full batch": Workload(
        relu_network, (784, 300, 10), 5_000, None, 100, 2, weights=True
    ),
    "784-128-10, batches of 128": Workload(
        tanh_network, (784, 128, 10), 5_000, 128, 1_000, 2
    ),
    "the same, Adam": Workload(
        tanh_network, (784, 128, 10), 5_000, 128, 1_000, 2, optimizer=adam
    ),
    "256-256-256-256-10, batches of 256": Workload(
        tanh_network, (256, 256, 256, 256, 10), 5_000, 256, 1_000, 4
    ),
}
STORES = {"checkpoints": True, "all steps": False}
METHODS = {"autodiff": False, "adjoint": True}  # whether in mixed mode


def sample_arrays(work: Workload, key: Array) -> tuple[PyTree, PyTree, PyTree]:
    """Returns random ``(data, w, alpha)``."""
    keys = jax.random.split(key, 1 + len(work.layers))
    n, classes = work.examples, max(work.layers[-1], 2)
    data = {
        "x": jax.random.normal(keys[0], (n, work.layers[0])),
        "y": jax.random.randint(keys[1], (n,), 0, classes),
    }
    w = [
        jax.random.normal(k, pair) / pair[0] ** 0.5
        for k, pair in zip(keys[2:], itertools.pairwise(work.layers), strict=False)
    ]
    alpha = {"rate": jnp.asarray(-3.0), "penalties": jnp.full(work.penalties, -7.0)}
    if work.weights:
        alpha["weights"] = jnp.zeros(n)
    return data, w, alpha


def hypergradient(
    work: Workload,
    method: str,
    checkpoint: bool,
    data: PyTree,
    w: PyTree,
    alpha: PyTree,
    key: Array,
) -> tuple[Array, PyTree]:
    """Returns value and hypergradient of a run; the outer loss has no penalty."""
    no_penalty = {"penalties": jnp.full(work.penalties, -jnp.inf)}
    outer = lambda w, alpha, batch: work.loss(w, no_penalty, batch)
    problem = hg.Bilevel(work.loss, outer, hg.Batches(data, work.batch), data)
    final_w_fn = make_final_w_fn(
        hg.Descent(work.optimizer, work.steps),
        problem,
        EstimateData.sample(problem, key),
        w,
        checkpoint=checkpoint,
        mixed_mode=METHODS[method],
    )
    value_fn = lambda alpha: problem.outer_value(final_w_fn(alpha), alpha, data)
    return jax.value_and_grad(value_fn)(alpha)


def measure(cell: Cell, rows: list[Row]) -> Row:
    """Returns operations, in gradients of one batch per step, and scratch of both."""
    del rows
    work, row = WORKLOADS[cell["method"]], {}
    key = jax.random.key(0)
    data, w, alpha = jax.eval_shape(functools.partial(sample_arrays, work), key)
    one_batch = work._replace(examples=work.batch or work.examples)
    batch, _, _ = jax.eval_shape(functools.partial(sample_arrays, one_batch), key)
    gradient = hg.cost.flops(jax.grad(work.loss), w, alpha, batch).total()
    for method in METHODS:
        is_checkpointed = STORES[cell["stores"]]
        run = functools.partial(hypergradient, work, method, is_checkpointed)
        program = hg.cost.compile_program(run, data, w, alpha, key)
        operations: Any = program.flops.total()
        row[f"{method}_gradients"] = operations / gradient / work.steps
        row[f"{method}_scratch"] = program.memory.temporaries
    return row


def ratios(row: Row) -> tuple[float, float]:
    """Returns operations and scratch of the adjoint over those of autodiff."""
    return (
        row["adjoint_gradients"] / row["autodiff_gradients"],
        row["adjoint_scratch"] / row["autodiff_scratch"],
    )


def findings(rows: list[Row]) -> list[Finding]:
    """Returns both ratios of each workload; nothing is claimed."""
    lines = []
    for row in rows:
        operations, scratch = ratios(row)
        text = f"{row['method']}, {row['stores']}: {operations:.2f} of autodiff's "
        lines.append(Finding(f"{text}operations, {scratch:.2f} of its scratch"))
    return lines


def body(rows: list[Row]) -> list[str]:
    """Returns a line per workload with both methods side by side."""
    text = (
        "Operations of one hypergradient, in gradients per step, and its scratch "
        "memory, in megabytes: autodiff, the adjoint, their ratio."
    )
    cells = []
    for row in rows:
        operations, scratch = ratios(row)
        autodiff, adjoint = (row[f"{method}_scratch"] / 1e6 for method in METHODS)
        gradients = (row[f"{method}_gradients"] for method in METHODS)
        counts = ", ".join(f"{x:.2f}" for x in (*gradients, operations))
        megabytes = f"{autodiff:.3g}, {adjoint:.3g}, {scratch:.2f}"
        cells.append([row["method"], row["stores"], counts, megabytes])
    headings = "inner problem", "stores", "gradients per step", "scratch, MB"
    return [text, "", *markdown_table(headings, cells)]


def plot(rows: list[Row], path: Path) -> None:
    """Plots the ratios of operations and of scratch."""
    panels = {
        name: {f"{row['method']}, {row['stores']}": [ratios(row)[i]] for row in rows}
        for i, name in enumerate(("operations", "scratch"))
    }
    plots.strips(panels, path, "adjoint over autodiff", lines=())


def cells(scale: str, seeds: int) -> list[Cell]:
    """Returns a cell per workload and storage; counts do not depend on the seed."""
    del scale, seeds
    return [
        {"method": name, "stores": stores, "seed": 0}
        for name in WORKLOADS
        for stores in STORES
    ]


table = MeasurementTable(
    cells=cells,
    measure_cell=measure,
    findings=findings,
    body=body,
    plot=plot,
    source="Franceschi et al. 2017 (arXiv 1703.01785), algorithm 1",
    data="programs are counted, not run",
    minutes=2,
    seeds=1,
)
