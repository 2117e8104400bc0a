"""The cost of 16 trainings side by side, over that of one after the other.

Question: what do 16 trainings side by side cost, as `PopulationBased` and
`SuccessiveHalving` make them, over 16 trainings one after the other?

Systems: networks with tanh and without biases, 64-14-10 (1,036 parameters, 1,000
steps), 64-256-320-10 (101,504 parameters, 100 steps) and 64-920-1000-10 (988,880
parameters, 10 steps), with squared error on 1,000 random examples and a log-penalty
from -9 to -5 over the members; batches of 64, float32, gradient descent with rate 0.1
and momentum 0.9; then one outer value on all examples. The seed of a row is the number
of a repetition and decides data, starting points and batches.

Programs: *one by one* is a compiled program that trains one member, called 16 times.
*vmap* trains all members in one program under `jax.vmap`. *lax.map* trains all in one
program, in a loop within it.

Timing: the three run in turns, five turns after one for compilation and warm-up; a
ratio is that of each turn, and a row holds the median over turns. There are five
repetitions; the table shows medians and quartiles over them. Compilation is timed
apart, once per process. The seconds of one by one are the sum of its 16 calls. Run the
table with nothing else running and without a persistent compilation cache.

Nothing is claimed: the ratios are printed with their 95% intervals. The three programs
must agree: outer values within ten rounding errors per step, or the check fails.
"""

import functools
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.bench import Cell, Finding, MeasurementTable, Row, ratio_interval
from hypergrad.bench.report import markdown_table

from .shared import plots
from .shared.program import program
from .shared.row_columns import column, quartiles_text

#: Approximate number of parameters -> sizes of the layers, and steps of a training.
SIZES = {
    "1e3": ((64, 14, 10), 1000),
    "1e5": ((64, 256, 320, 10), 100),
    "1e6": ((64, 920, 1000, 10), 10),
}
NUM_MEMBERS, NUM_EXAMPLES, BATCH = 16, 1000, 64
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
NUM_TURNS = 5


def outer_loss(w: PyTree, alpha: Array, batch: PyTree) -> Array:
    """Returns the squared error of a network with tanh."""
    del alpha
    x = batch["x"]
    for layer in w[:-1]:
        x = jnp.tanh(x @ layer)
    return jnp.mean((x @ w[-1] - batch["y"]) ** 2)


def inner_loss(w: PyTree, alpha: Array, batch: PyTree) -> Array:
    """Returns the outer loss plus the squares of ``w`` with a log-penalty."""
    squares = sum(jnp.sum(layer**2) for layer in w)
    return outer_loss(w, alpha, batch) + jnp.exp(alpha) * squares


def train(
    num_steps: int, w: PyTree, alpha: Array, data: PyTree, key: Array
) -> tuple[PyTree, Array]:
    """Returns the trained ``w`` of one member, and its outer value."""
    solver = hg.Descent(OPTIMIZER, num_steps)
    w, _ = solver.solve(inner_loss, w, alpha, hg.Batches(data, BATCH), key)
    return w, outer_loss(w, alpha, data)


def train_by_vmap(
    num_steps: int, w: PyTree, alpha: Array, data: PyTree, key: Array
) -> tuple[PyTree, Array]:
    """Returns what `train` returns of all members, under `jax.vmap`."""
    train_member = functools.partial(train, num_steps)
    return jax.vmap(train_member, (0, 0, None, 0))(w, alpha, data, key)


def train_by_map(
    num_steps: int, w: PyTree, alpha: Array, data: PyTree, key: Array
) -> tuple[PyTree, Array]:
    """Returns what `train` returns of all members, under `jax.lax.map`."""
    train_member = lambda member: train(
        num_steps, member[0], member[1], data, member[2]
    )
    return jax.lax.map(train_member, (w, alpha, key))


def train_one_by_one(
    num_steps: int, w: PyTree, alpha: Array, data: PyTree, key: Array
) -> tuple[PyTree, Array]:
    """Returns what `train` returns of all members, with one call per member."""
    train_member = program(train, num_steps)
    results = [
        train_member(*jax.tree.map(lambda x, i=i: x[i], (w, alpha)), data, key[i])
        for i in range(NUM_MEMBERS)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


def make_members(
    sizes: tuple[int, ...], seed: int
) -> tuple[PyTree, Array, PyTree, Array]:
    """Returns ``(w, alpha, data, key)``; all but the data have an axis of members."""
    keys = jax.random.split(jax.random.key(seed), 3 + NUM_MEMBERS)
    x_key, y_key, w_key = keys[:3]
    pairs = list(itertools.pairwise(sizes))
    w = [
        jax.random.normal(key, (NUM_MEMBERS, *pair)) / pair[0] ** 0.5
        for key, pair in zip(jax.random.split(w_key, len(pairs)), pairs, strict=True)
    ]
    data = {
        "x": jax.random.normal(x_key, (NUM_EXAMPLES, sizes[0])),
        "y": jax.random.normal(y_key, (NUM_EXAMPLES, sizes[-1])),
    }
    return w, jnp.linspace(-9.0, -5.0, NUM_MEMBERS), data, keys[3:]


PROGRAMS: dict[str, Callable] = {"vmap": train_by_vmap, "map": train_by_map}


def measure_cell(cell: Cell, rows: list[Row]) -> Row:
    """Returns the seconds of the three programs after one turn of warm-up."""
    del rows
    sizes, num_steps = SIZES[cell["method"]]
    members = make_members(sizes, cell["seed"])
    timed = {"each": program(train, num_steps)}
    timed |= {name: program(function, num_steps) for name, function in PROGRAMS.items()}
    calls = {"each": functools.partial(train_one_by_one, num_steps)}
    calls |= {name: timed[name] for name in PROGRAMS}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    values: dict[str, np.ndarray] = {}
    for turn in range(1 + NUM_TURNS):
        for name, call in calls.items():
            prev_seconds = timed[name].run_seconds
            values[name] = np.asarray(call(*members)[1])
            if turn:
                seconds[name].append(timed[name].run_seconds - prev_seconds)
    differences = [np.abs(values[name] / values["each"] - 1).max() for name in PROGRAMS]
    ratios = {
        name: np.divide(seconds[name], seconds["each"]).tolist() for name in PROGRAMS
    }
    return {
        "parameters": sum(a * b for a, b in itertools.pairwise(sizes)),
        "each_seconds": statistics.median(seconds["each"]),
        **{name: statistics.median(ratios[name]) for name in PROGRAMS},
        **{f"{name}_compile": timed[name].compile_seconds for name in timed},
        "difference": float(max(differences)),
    }


def max_difference(size: str) -> float:
    """Returns ten rounding errors per step, relative."""
    return 10 * SIZES[size][1] * float(jnp.finfo(jnp.float32).eps)


def findings(rows: list[Row]) -> list[Finding]:
    """Returns the ratios, without a claim, and whether the three programs agree."""
    lines = []
    for size in SIZES:
        size_rows = [row for row in rows if row["method"] == size]
        if not size_rows:
            continue
        for name in PROGRAMS:
            ratios = np.array([row[name] for row in size_rows], float)
            ratio = ratio_interval(ratios, 1.0)
            lines.append(Finding(f"{size}, {name}: {ratio:.2f} of one by one"))
        difference = np.max(np.array([row["difference"] for row in size_rows], float))
        bound = max_difference(size)
        text = f"{size}: outer values agree to {difference:.1g}, {bound:.1g} allowed"
        lines.append(Finding(text, "holds" if difference <= bound else "FAILED"))
    return lines


def body(rows: list[Row]) -> list[str]:
    """Returns the table of medians and quartiles over repetitions."""
    text = (
        "Seconds of one by one, ratios to them, and seconds of compilation: medians "
        "[quartiles] over repetitions."
    )
    columns = {
        "each_seconds": "one by one, s", "vmap": "vmap", "map": "lax.map",
        "each_compile": "compile: one, s", "vmap_compile": "vmap, s",
        "map_compile": "lax.map, s",
    }  # fmt: skip
    lines = []
    for size, (_, num_steps) in SIZES.items():
        size_rows = [row for row in rows if row["method"] == size]
        if size_rows:
            cells = [f"{size_rows[0]['parameters']:,}", f"{num_steps}"]
            cells += [quartiles_text(column(size_rows, x), ".3g") for x in columns]
            lines.append(cells)
    headings = ["parameters", "steps", *columns.values()]
    return [text, "", *markdown_table(headings, lines)]


def plot(rows: list[Row], path: Path) -> None:
    """Plots the ratios with a dot per repetition."""
    panels = {
        f"{size} parameters": {
            name: [row[name] for row in rows if row["method"] == size]
            for name in PROGRAMS
        }
        for size in SIZES
        if any(row["method"] == size for row in rows)
    }
    plots.strips(panels, path, "seconds over those of one by one", lines=())


def cells(scale: str, seeds: int) -> list[Cell]:
    """Returns all sizes of a repetition, then those of the next."""
    del scale
    return [{"method": size, "seed": i} for i in range(seeds) for size in SIZES]


table = MeasurementTable(
    cells=cells,
    measure_cell=measure_cell,
    body=body,
    findings=findings,
    plot=plot,
    minutes=3,
    paradigm="populations",
    source="Jaderberg et al. 2017 (arXiv 1711.09846)",
    data="random examples",
)
