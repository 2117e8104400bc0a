"""The cost of one step of SOBA on a network of 10 million parameters, in gradients.

*Question.* What does one step of SOBA cost on a large network, in gradients of its
inner loss?

*System.* A network 784-3000-2400-200-10 with tanh and 10,034,000 parameters, one
log-penalty per layer, squared error on 1,000 random examples, batches of 256, float32,
gradient descent on ``w``, the adjoint and ``alpha``.

*Timing.* The compiled step of SOBA, the same step written in plain JAX (a test checks
that both are equal), and one gradient on a batch run in turns, nine turns after one to
warm up; the ratio is the median over the turns. There are five repeats, which take the
place of seeds. Nothing else may run on the machine. Memory is that of the compiler's
analysis: temporary buffers and arguments, less the data.

*Claims.* A step costs at most 5 gradients: the 95% interval of the geometric mean of
the ratio over the repeats lies below 5. It holds at most 8 copies of ``w``, which must
be so on every run, because memory is not measured but planned by the compiler.
"""

import functools
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.bench import Cell, Finding, MeasurementTable, Row, ratio_interval
from hypergrad.bench.report import markdown_table

from .shared import plots
from .shared.outcomes import conclude
from .shared.program import timed
from .shared.tuning import cells_of

SIZES = (784, 3000, 2400, 200, 10)
NUM_EXAMPLES, BATCH = 1000, 256
RATE = 1e-3
REPEATS = 9
MAX_GRADIENTS, MAX_COPIES = 5.0, 8.0
NUM_PARAMETERS = sum(a * b for a, b in itertools.pairwise(SIZES))


def scores(w: PyTree, x: Array) -> Array:
    """Returns the outputs of a network with tanh."""
    for layer in w[:-1]:
        x = jnp.tanh(x @ layer)
    return x @ w[-1]


def inner_loss(w: PyTree, alpha: Array, batch: PyTree) -> Array:
    """Returns the squared error with one log-penalty per layer."""
    squares = jnp.stack([jnp.sum(layer**2) for layer in w])
    return outer_loss(w, alpha, batch) + jnp.vdot(jnp.exp(alpha), squares)


def outer_loss(w: PyTree, alpha: Array, batch: PyTree) -> Array:
    """Returns the squared error."""
    del alpha
    return jnp.mean((scores(w, batch["x"]) - batch["y"]) ** 2)


SOBA = hg.SOBA(optax.sgd(RATE))


def step(state: Any, alpha: Array, data: PyTree, key: Array) -> tuple[Any, Array]:
    """Makes one step of ``w``, the adjoint and ``alpha``; returns state and alpha."""
    batches = hg.Batches(data, BATCH)
    problem = hg.Bilevel(inner_loss, outer_loss, batches, batches)
    estimate, state = SOBA.estimate(problem, state, alpha, key)
    return state, alpha - RATE * estimate.hypergradient


def plain_step(
    state: tuple, alpha: Array, data: PyTree, key: Array
) -> tuple[tuple, Array]:
    """Makes the same step: a gradient, its vector-Jacobian product, a gradient."""
    w, v = state
    num_examples = len(data["y"])
    sample = lambda key: jax.tree.map(
        lambda x: x[jax.random.randint(key, (BATCH,), 0, num_examples)], data
    )
    batch, outer_batch = map(sample, jax.random.split(key))
    inner_grad = lambda w, alpha: jax.grad(inner_loss)(w, alpha, batch)
    grad, pull_back = jax.vjp(inner_grad, w, alpha)
    product, cross = pull_back(v)
    b = jax.grad(outer_loss)(w, alpha, outer_batch)
    descend = lambda x, *directions: x - RATE * sum(directions)
    w = jax.tree.map(descend, w, grad)
    v = jax.tree.map(lambda v, p, b: v - RATE * (p - b), v, product, b)
    return (w, v), alpha + RATE * cross


def gradient(w: PyTree, alpha: Array, data: PyTree, key: Array) -> PyTree:
    """Returns the gradient of the inner loss on one batch."""
    return jax.grad(inner_loss)(w, alpha, hg.Batches(data, BATCH).sample(key))


def sample_arrays() -> tuple[PyTree, Array, PyTree, Array]:
    """Returns random ``(w, alpha, data, key)``."""
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


def init_state(w: PyTree, alpha: Array, data: PyTree) -> Any:
    """Returns the initial state of SOBA."""
    batches = hg.Batches(data, BATCH)
    return SOBA.init(hg.Bilevel(inner_loss, outer_loss, batches, batches), w, alpha)


@functools.cache
def program(function: Callable, donate: bool) -> Any:
    """Returns a compiled function; a step takes over the memory of its state."""
    w, alpha, data, key = jax.eval_shape(sample_arrays)
    if function is step:
        state = jax.eval_shape(init_state, w, alpha, data)
    else:
        state = (w, w) if function is plain_step else w
    jitted = jax.jit(function, donate_argnums=(0,) if donate else ())
    return jitted.lower(state, alpha, data, key).compile()


def copies(function: Callable) -> float:
    """Returns the memory of a compiled step, arguments included, over that of ``w``."""
    w, _, data, _ = jax.eval_shape(sample_arrays)
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    analysis = program(function, True).memory_analysis()
    num_bytes = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes
    return (num_bytes - size(data)) / size(w)


def measure(cell: Cell, rows: list[Row]) -> Row:
    """Returns the medians of the ratios of each turn, after one turn to warm up."""
    del cell, rows
    w, alpha, data, key = sample_arrays()
    copy = lambda tree: jax.tree.map(jnp.copy, tree)
    state = init_state(copy(w), alpha, data)
    plain_state = copy(w), jax.tree.map(jnp.zeros_like, w)
    soba, plain = program(step, True), program(plain_step, True)
    turns = []
    for turn in range(1 + REPEATS):
        key = jax.random.fold_in(key, turn)
        (state, _), soba_seconds = timed(soba, state, alpha, data, key)
        (plain_state, _), plain_seconds = timed(plain, plain_state, alpha, data, key)
        _, grad_seconds = timed(program(gradient, False), w, alpha, data, key)
        if turn:
            turns.append((soba_seconds, plain_seconds, grad_seconds))
    return {
        "gradient_seconds": statistics.median(grad for *_, grad in turns),
        "soba": statistics.median(soba / grad for soba, _, grad in turns),
        "plain": statistics.median(plain / grad for _, plain, grad in turns),
        "copies": copies(step),
        "plain_copies": copies(plain_step),
        "moved": float(optax.tree.norm(state.v)),
        "parameters": NUM_PARAMETERS,
    }


def findings(rows: list[Row]) -> list[Finding]:
    """Returns whether a step costs at most five gradients and eight copies of w."""
    mean, low, high = ratio_interval([row["soba"] for row in rows], 1.0)
    text = (
        "a step of SOBA in gradients, geometric mean: "
        f"{mean:.2f} [{low:.2f}, {high:.2f}], at most {MAX_GRADIENTS:g} claimed"
    )
    num_copies = max(row["copies"] for row in rows)
    return [
        conclude(
            text, high <= MAX_GRADIENTS, len(rows), (high - low) / 2, MAX_GRADIENTS
        ),
        Finding(
            f"a step holds {num_copies:.1f} copies of w, at most {MAX_COPIES:g}",
            "holds" if num_copies <= MAX_COPIES else "FAILED",
        ),
    ]


def body(rows: list[Row]) -> list[str]:
    """Returns a line per step: seconds in gradients and copies of w."""
    mean = lambda name: np.mean([row[name] for row in rows])
    text = (
        f"{NUM_PARAMETERS:,} parameters, batches of {BATCH}, float32: seconds over "
        "those of one gradient of the inner loss, measured in turns; means over "
        f"{len(rows)} repeats of the median of {REPEATS} turns. Copies: memory of the "
        "compiled step, including its arguments, over that of w."
    )
    cells = [
        ["SOBA", f"{mean('soba'):.2f}", f"{mean('copies'):.1f}"],
        ["plain JAX", f"{mean('plain'):.2f}", f"{mean('plain_copies'):.1f}"],
    ]
    return [text, "", *markdown_table(["step", "gradients", "copies of w"], cells)]


def plot(rows: list[Row], path: Path) -> None:
    """Plots both steps with a dot per repeat, and the claimed maximum."""
    panels = {
        "one step": {
            "SOBA": [row["soba"] for row in rows],
            "plain JAX": [row["plain"] for row in rows],
        }
    }
    label = "seconds over those of one gradient"
    plots.strips(panels, path, label, lines=(), most=MAX_GRADIENTS)


table = MeasurementTable(
    cells=cells_of(("SOBA",)),
    measure_cell=measure,
    findings=findings,
    body=body,
    plot=plot,
    source="Dagréou et al. 2022 (arXiv 2201.13409)",
    data="random examples",
    minutes=2,
    seeds=5,
)
