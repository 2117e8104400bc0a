"""What one step of SOBA costs on a network of 10 million parameters, in gradients.

Each cell times the step, a step written in plain JAX, and one gradient of the inner
loss on as many examples, in turns, in one process. See README.md for the protocol.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.studies.record import Row
from hypergrad.studies.table import Table, cell_by_cell
from hypergrad.studies.verdict import Verdict, conclude, paired_ratio

from .shared import plots

SIZES = (784, 3000, 2400, 200, 10)
NUM_EXAMPLES, BATCH = 1000, 256
RATE = 1e-3
REPEATS = 9
MOST_GRADIENTS, MOST_COPIES = 5.0, 8.0
NUM_PARAMETERS = sum(a * b for a, b in itertools.pairwise(SIZES))


def scores(w: PyTree, x: Array) -> Array:
    """A network with tanh."""
    for layer in w[:-1]:
        x = jnp.tanh(x @ layer)
    return x @ w[-1]


def inner_loss(w: PyTree, alpha: Array, batch: PyTree) -> Array:
    """Squared error, and a log-penalty a layer."""
    squares = jnp.stack([jnp.sum(layer**2) for layer in w])
    return outer_loss(w, alpha, batch) + jnp.vdot(jnp.exp(alpha), squares)


def outer_loss(w: PyTree, alpha: Array, batch: PyTree) -> Array:
    """Squared error."""
    del alpha
    return jnp.mean((scores(w, batch["x"]) - batch["y"]) ** 2)


SOBA = hg.SOBA(optax.sgd(RATE))


def step(state: Any, alpha: Array, data: PyTree, key: Array) -> tuple[Any, Array]:
    """One step of ``w``, the adjoint and ``alpha``."""
    batches = hg.Batches(data, BATCH)
    problem = hg.Bilevel(inner_loss, outer_loss, batches, batches)
    estimate, state = SOBA.estimate(problem, state, alpha, key)
    return state, alpha - RATE * estimate.hypergradient


def plain_step(
    state: tuple, alpha: Array, data: PyTree, key: Array
) -> tuple[tuple, Array]:
    """The same, written out: a gradient, its product with v in reverse, a gradient."""
    w, v = state
    num = len(data["y"])
    draw = lambda key: jax.tree.map(
        lambda x: x[jax.random.randint(key, (BATCH,), 0, num)], data
    )
    batch, outer_batch = map(draw, jax.random.split(key))
    slope = lambda w, alpha: jax.grad(inner_loss)(w, alpha, batch)
    gradient, pull = jax.vjp(slope, w, alpha)
    product, cross = pull(v)
    b = jax.grad(outer_loss)(w, alpha, outer_batch)
    move = lambda x, *directions: x - RATE * sum(directions)
    w = jax.tree.map(move, w, gradient)
    v = jax.tree.map(lambda v, p, b: v - RATE * (p - b), v, product, b)
    return (w, v), alpha + RATE * cross


def gradient(w: PyTree, alpha: Array, data: PyTree, key: Array) -> PyTree:
    """Of the inner loss, on one batch."""
    return jax.grad(inner_loss)(w, alpha, hg.Batches(data, BATCH).sample(key))


def shapes() -> tuple[PyTree, Array, PyTree, Array]:
    """``(w, alpha, data, key)``, drawn."""
    keys = jax.random.split(jax.random.key(0), len(SIZES) + 1)
    w = [
        jax.random.normal(key, size) / size[0] ** 0.5
        for key, size in zip(keys, itertools.pairwise(SIZES), strict=False)
    ]
    data = {
        "x": jax.random.normal(keys[-2], (NUM_EXAMPLES, SIZES[0])),
        "y": jax.random.normal(keys[-1], (NUM_EXAMPLES, SIZES[-1])),
    }
    return w, jnp.full(len(w), -9.0), data, keys[0]


def begin(w: PyTree, alpha: Array, data: PyTree) -> Any:
    """SOBA's state."""
    batches = hg.Batches(data, BATCH)
    return SOBA.init(hg.Bilevel(inner_loss, outer_loss, batches, batches), w, alpha)


@functools.cache
def program(function: Callable, donate: bool) -> Any:
    """Compiled, not run; steps take their state over."""
    w, alpha, data, key = jax.eval_shape(shapes)
    state = {step: lambda: jax.eval_shape(begin, w, alpha, data)}.get(
        function, lambda: (w, w) if function is plain_step else w
    )()
    jitted = jax.jit(function, donate_argnums=(0,) if donate else ())
    return jitted.lower(state, alpha, data, key).compile()


def copies(function: Callable) -> float:
    """Memory of the compiled step over that of ``w``: what it is given, and holds."""
    w, _, data, _ = jax.eval_shape(shapes)
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    analysis = program(function, True).memory_analysis()
    held = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes
    return (held - size(data)) / size(w)


def measure(cell: Row) -> Row:
    """All three once to warm up, then in turns; ratios are those of each turn."""
    del cell
    w, alpha, data, key = shapes()
    copy = lambda tree: jax.tree.map(jnp.copy, tree)
    ours, plain = (
        begin(copy(w), alpha, data),
        (copy(w), jax.tree.map(jnp.zeros_like, w)),
    )
    turns = []
    for turn in range(1 + REPEATS):
        key = jax.random.fold_in(key, turn)
        (ours, _), ours_seconds = timed(program(step, True), ours, alpha, data, key)
        (plain, _), plain_seconds = timed(
            program(plain_step, True), plain, alpha, data, key
        )
        _, floor = timed(program(gradient, False), w, alpha, data, key)
        if turn:
            turns.append((ours_seconds, plain_seconds, floor))
    middle = lambda values: statistics.median(values)
    return {
        "gradient_seconds": middle(floor for *_, floor in turns),
        "soba": middle(ours / floor for ours, _, floor in turns),
        "plain": middle(plain / floor for _, plain, floor in turns),
        "copies": copies(step),
        "plain_copies": copies(plain_step),
        "moved": float(optax.tree.norm(ours.v)),
        "parameters": NUM_PARAMETERS,
    }


def timed(call: Any, *arguments: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    found = jax.block_until_ready(call(*arguments))
    return found, time.perf_counter() - started


def judge(rows: list[Row]) -> list[Verdict]:
    """At most five gradients, at most eight copies."""
    ratios = [row["soba"] for row in rows]
    mean, low, high = paired_ratio(ratios, 1.0)
    text = (
        "a step of SOBA in gradients, geometric mean: "
        f"{mean:.2f} [{low:.2f}, {high:.2f}], at most {MOST_GRADIENTS:g} claimed"
    )
    held = max(row["copies"] for row in rows)
    return [
        conclude(
            text, high <= MOST_GRADIENTS, len(rows), (high - low) / 2, MOST_GRADIENTS
        ),
        Verdict(
            f"it holds {held:.1f} copies of w, at most {MOST_COPIES:g} claimed: "
            + ("reproduced" if held <= MOST_COPIES else "not reproduced"),
            failed=held > MOST_COPIES,
        ),
    ]


def markdown(table: Table, rows: list[Row], command: str) -> str:
    mean = lambda name: np.mean([row[name] for row in rows])
    lines = [
        f"# {table.name}",
        "",
        f"{NUM_PARAMETERS:,} parameters, batches of {BATCH}, float32: seconds over "
        "those of one gradient of the inner loss, in turns; means over "
        f"{len(rows)} repeats of the median of {REPEATS} turns. Copies: memory of the "
        "compiled step, what it is given included, over that of w. "
        f"Source: {table.source}. Command: `{command}`",
        "",
        "| step | gradients | copies of w |",
        "|---|---|---|",
        f"| SOBA | {mean('soba'):.2f} | {mean('copies'):.1f} |",
        f"| plain JAX | {mean('plain'):.2f} | {mean('plain_copies'):.1f} |",
        "",
        *(v.line for v in judge(rows)),
    ]
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """Both steps, a dot a repeat, and what is claimed."""
    panels = {
        "one step": {
            "SOBA": [row["soba"] for row in rows],
            "plain JAX": [row["plain"] for row in rows],
        }
    }
    label = "seconds over those of one gradient"
    plots.strips(panels, path, label, lines=(), most=MOST_GRADIENTS)


TABLE = Table(
    name="soba-step",
    source="Dagréou et al. 2022 (arXiv 2201.13409)",
    minutes=2,
    seeds=5,
    plan=lambda scale, seeds: [{"method": "SOBA", "seed": i} for i in range(seeds)],
    run=cell_by_cell(measure, markdown, draw),
    judge=judge,
)
