"""Whether a reverse step by one derivative of one gradient pays, against autodiff.

A step is a gradient ``g`` and an update ``u(g, w, state, alpha)`` of each number by
itself, whatever the optimizer. With the cotangent ``v`` of ``g``, that autodiff finds
through ``u``, what goes back through the gradient is ``H v`` and ``Jᵀ v``, one
forward derivative of it: nothing of the network need be stored. See README.md.
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
from hypergrad.estimators.inner_run import InnerRunState
from hypergrad.products import Loss, hvp_and_cross_vjp
from hypergrad.studies.record import Row
from hypergrad.studies.table import Table, cell_by_cell
from hypergrad.studies.verdict import Verdict

from .shared import plots


@functools.cache
def with_adjoint(loss: Loss) -> Loss:
    """``loss``, whose gradient in ``w`` has that derivative in reverse."""

    @jax.custom_vjp
    def gradient(w, alpha, batch):
        return jax.grad(loss)(w, alpha, batch)

    def back(given, v):
        w, alpha, batch = given
        _, Hv, JTv = hvp_and_cross_vjp(loss, w, alpha, batch, v)
        return Hv, JTv, None

    def keep(f: Callable) -> Callable:
        return lambda *given: (f(*given), given)

    gradient.defvjp(keep(gradient), back)
    value = jax.custom_vjp(lambda w, alpha, batch: loss(w, alpha, batch))
    scaled = lambda given, y: (optax.tree.scale(y, gradient(*given)), None, None)
    value.defvjp(keep(loss), scaled)
    return value


def scores(act: Callable, w: PyTree, x: Array) -> Array:
    """Of a network without biases."""
    for layer in w[:-1]:
        x = act(x @ layer)
    return x @ w[-1]


def network(act: Callable, w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Cross-entropy, with a weight an example, and a log-penalty a layer."""
    s = scores(act, w, batch["x"])
    each = optax.softmax_cross_entropy_with_integer_labels(s, batch["y"])
    if "weights" in alpha:
        each = jax.nn.sigmoid(alpha["weights"]) * each
    squares = jnp.stack([jnp.sum(layer**2) for layer in w])
    return jnp.mean(each) + jnp.vdot(jnp.exp(alpha["penalties"]), squares)


def logistic(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Two classes, a log-penalty a weight."""
    s = batch["x"] @ w[0][:, 0]
    fit = jnp.mean(jax.nn.softplus(s) - batch["y"] * s)
    return fit + jnp.vdot(jnp.exp(alpha["penalties"]), w[0][:, 0] ** 2)


def momentum(alpha: PyTree) -> optax.GradientTransformation:
    return optax.sgd(jnp.exp(alpha["rate"]), momentum=0.9)


def adam(alpha: PyTree) -> optax.GradientTransformation:
    return optax.adam(jnp.exp(alpha["rate"]))


relu_network, tanh_network = (
    functools.partial(network, act) for act in (jax.nn.relu, jnp.tanh)
)


class Work(NamedTuple):
    """A workload; ``batch`` of None is all examples, ``weights`` one an example."""

    loss: Loss
    layers: tuple[int, ...]
    examples: int
    batch: int | None
    steps: int
    penalties: int
    weights: bool = False
    optimizer: Callable = momentum


WORK = {
    "logistic, full batch": Work(logistic, (500, 1), 10_000, None, 500, 500),
    "784-300-10, full batch": Work(
        relu_network, (784, 300, 10), 5_000, None, 100, 2, weights=True
    ),
    "784-128-10, batches of 128": Work(
        tanh_network, (784, 128, 10), 5_000, 128, 1_000, 2
    ),
    "the same, Adam": Work(
        tanh_network, (784, 128, 10), 5_000, 128, 1_000, 2, optimizer=adam
    ),
    "256-256-256-256-10, batches of 256": Work(
        tanh_network, (256, 256, 256, 256, 10), 5_000, 256, 1_000, 4
    ),
}
STORES = {"checkpoints": True, "all steps": False}
WAYS = {"autodiff": lambda loss: loss, "adjoint": with_adjoint}


def drawn(work: Work, key: Array) -> tuple[PyTree, PyTree, PyTree]:
    """``(data, w, alpha)``."""
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
    work: Work,
    way: str,
    checkpoint: bool,
    data: PyTree,
    w: PyTree,
    alpha: PyTree,
    key: Array,
) -> tuple[Array, PyTree]:
    """Value and hypergradient of `Unrolled`; the outer loss has no penalty."""
    without = {"penalties": jnp.full(work.penalties, -jnp.inf)}
    outer = lambda w, alpha, batch: work.loss(w, without, batch)
    inner = WAYS[way](work.loss)
    problem = hg.Bilevel(inner, outer, hg.Batches(data, work.batch), data)
    state = InnerRunState(w)  # `init` asks the loss for derivatives that it lacks here
    solver = hg.Descent(work.optimizer, work.steps)
    estimator = hg.Unrolled(solver, checkpoint=checkpoint)
    found, _ = estimator.estimate(problem, state, alpha, key)
    return found.value, found.hypergradient


def measure(cell: Row) -> Row:
    """Both ways; operations in gradients of one batch, a step."""
    work, row = WORK[cell["method"]], {}
    key = jax.random.key(0)
    data, w, alpha = jax.eval_shape(functools.partial(drawn, work), key)
    one = work._replace(examples=work.batch or work.examples)
    batch, _, _ = jax.eval_shape(functools.partial(drawn, one), key)
    gradient = hg.cost.flops(jax.grad(work.loss), w, alpha, batch).total()
    for way in WAYS:
        run = functools.partial(hypergradient, work, way, STORES[cell["stores"]])
        program = hg.cost.compile_program(run, data, w, alpha, key)
        operations: Any = program.flops.total()
        row[f"{way}_gradients"] = operations / gradient / work.steps
        row[f"{way}_scratch"] = program.memory.temporaries
    return row


def ratios(row: Row) -> tuple[float, float]:
    """Operations and scratch of the adjoint over those of autodiff."""
    return (
        row["adjoint_gradients"] / row["autodiff_gradients"],
        row["adjoint_scratch"] / row["autodiff_scratch"],
    )


def judge(rows: list[Row]) -> list[Verdict]:
    """What it takes of both, without a claim: a forward pass is made twice."""
    verdicts = []
    for row in rows:
        operations, scratch = ratios(row)
        text = f"{row['method']}, {row['stores']}: {operations:.2f} of autodiff's "
        verdicts.append(Verdict(f"{text}operations, {scratch:.2f} of its scratch"))
    return verdicts


def markdown(table: Table, rows: list[Row], command: str) -> str:
    """Both ways side by side."""
    lines = [
        f"# {table.name}",
        "",
        "Operations of one hypergradient, in gradients a step, and its scratch, in "
        f"megabytes: autodiff, the adjoint, their ratio. Command: `{command}`",
        "",
        "| inner problem | stores | gradients a step | scratch, MB |",
        "|---|---|---|---|",
    ]
    for row in rows:
        operations, scratch = ratios(row)
        first, second = (row[f"{way}_scratch"] / 1e6 for way in WAYS)
        lines.append(
            f"| {row['method']} | {row['stores']} "
            f"| {row['autodiff_gradients']:.2f}, {row['adjoint_gradients']:.2f}, "
            f"{operations:.2f} | {first:.3g}, {second:.3g}, {scratch:.2f} |"
        )
    return "\n".join([*lines, "", *(v.line for v in judge(rows))])


def draw(rows: list[Row], path: Path) -> None:
    """Ratios of operations and of scratch."""
    panels = {
        name: {f"{row['method']}, {row['stores']}": [ratios(row)[i]] for row in rows}
        for i, name in enumerate(("operations", "scratch"))
    }
    plots.strips(panels, path, "adjoint over autodiff", lines=())


def plan(scale: str, seeds: int) -> list[Row]:
    """What is counted is the same for every seed."""
    del scale, seeds
    return [
        {"method": name, "stores": stores, "seed": 0}
        for name in WORK
        for stores in STORES
    ]


TABLE = Table(
    name="adjoint",
    source="counted; Franceschi et al. 2017 (arXiv 1703.01785), algorithm 1",
    minutes=2,
    seeds=1,
    plan=plan,
    run=cell_by_cell(measure, markdown, draw),
    judge=judge,
)
