"""What 16 trainings cost side by side, over what they cost one after the other.

Each cell times three ways to the same 16 trainings in turns, in one process: a call a
member, one program under `jax.vmap`, as populations are trained, and one program under
`jax.lax.map`. See README.md for the protocol.
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
from hypergrad.studies.program import program
from hypergrad.studies.record import Row
from hypergrad.studies.table import Table, cell_by_cell
from hypergrad.studies.verdict import Verdict, paired_ratio

from .shared import plots

#: Parameters, about -> sizes of the layers, and steps of a training.
SIZES = {
    "1e3": ((64, 14, 10), 1000),
    "1e5": ((64, 256, 320, 10), 100),
    "1e6": ((64, 920, 1000, 10), 10),
}
MEMBERS, NUM_EXAMPLES, BATCH = 16, 1000, 64
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
TURNS = 5


def outer_loss(w: PyTree, alpha: Array, batch: PyTree) -> Array:
    """Squared error of a network with tanh."""
    del alpha
    x = batch["x"]
    for layer in w[:-1]:
        x = jnp.tanh(x @ layer)
    return jnp.mean((x @ w[-1] - batch["y"]) ** 2)


def inner_loss(w: PyTree, alpha: Array, batch: PyTree) -> Array:
    """With a log-penalty."""
    squares = sum(jnp.sum(layer**2) for layer in w)
    return outer_loss(w, alpha, batch) + jnp.exp(alpha) * squares


def train(
    num_steps: int, w: PyTree, alpha: Array, data: PyTree, key: Array
) -> tuple[PyTree, Array]:
    """``w`` of one member, and its outer value."""
    solver = hg.Descent(OPTIMIZER, num_steps)
    w, _ = solver.solve(inner_loss, w, alpha, hg.Batches(data, BATCH), key)
    return w, outer_loss(w, alpha, data)


def side_by_side(
    num_steps: int, w: PyTree, alpha: Array, data: PyTree, key: Array
) -> tuple[PyTree, Array]:
    """All members under `jax.vmap`."""
    one = functools.partial(train, num_steps)
    return jax.vmap(one, (0, 0, None, 0))(w, alpha, data, key)


def in_a_loop(
    num_steps: int, w: PyTree, alpha: Array, data: PyTree, key: Array
) -> tuple[PyTree, Array]:
    """All members under `jax.lax.map`."""
    one = lambda member: train(num_steps, member[0], member[1], data, member[2])
    return jax.lax.map(one, (w, alpha, key))


def members(sizes: tuple[int, ...], seed: int) -> tuple[PyTree, Array, PyTree, Array]:
    """``(w, alpha, data, key)``; all but the data have an axis of members in front."""
    keys = jax.random.split(jax.random.key(seed), 3 + MEMBERS)
    x_key, y_key, w_key = keys[:3]
    pairs = list(itertools.pairwise(sizes))
    w = [
        jax.random.normal(key, (MEMBERS, *pair)) / pair[0] ** 0.5
        for key, pair in zip(jax.random.split(w_key, len(pairs)), pairs, strict=True)
    ]
    data = {
        "x": jax.random.normal(x_key, (NUM_EXAMPLES, sizes[0])),
        "y": jax.random.normal(y_key, (NUM_EXAMPLES, sizes[-1])),
    }
    return w, jnp.linspace(-9.0, -5.0, MEMBERS), data, keys[3:]


def one_by_one(
    num_steps: int, w: PyTree, alpha: Array, data: PyTree, key: Array
) -> tuple[PyTree, Array]:
    """A call a member."""
    one = program(train, num_steps)
    found = [
        one(*jax.tree.map(lambda x, i=i: x[i], (w, alpha)), data, key[i])
        for i in range(MEMBERS)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


WAYS: dict[str, Callable] = {"vmap": side_by_side, "map": in_a_loop}


def measure(cell: Row) -> Row:
    """All three once to compile and to warm up, then in turns."""
    sizes, num_steps = SIZES[cell["method"]]
    given = members(sizes, cell["seed"])
    timed = {"each": program(train, num_steps)}
    timed |= {name: program(way, num_steps) for name, way in WAYS.items()}
    calls = {"each": functools.partial(one_by_one, num_steps)}
    calls |= {name: timed[name] for name in WAYS}
    turns: dict[str, list[float]] = {name: [] for name in calls}
    values: dict[str, np.ndarray] = {}
    for turn in range(1 + TURNS):
        for name, call in calls.items():
            before = timed[name].run_seconds
            values[name] = np.asarray(call(*given)[1])
            if turn:
                turns[name].append(timed[name].run_seconds - before)
    middle = {name: statistics.median(seconds) for name, seconds in turns.items()}
    off = [np.abs(values[name] / values["each"] - 1).max() for name in WAYS]
    return {
        "parameters": sum(a * b for a, b in itertools.pairwise(sizes)),
        "each_seconds": middle["each"],
        **{
            name: statistics.median(
                way / each for way, each in zip(turns[name], turns["each"], strict=True)
            )
            for name in WAYS
        },
        **{f"{name}_compile": timed[name].compile_seconds for name in timed},
        "difference": float(max(off)),
    }


def bound(size: str) -> float:
    """Ten rounding errors a step, relative."""
    return 10 * SIZES[size][1] * float(jnp.finfo(jnp.float32).eps)


def judge(rows: list[Row]) -> list[Verdict]:
    """What the ratios are, without a claim; the three ways must agree."""
    lines = []
    for size in SIZES:
        mine = [row for row in rows if row["method"] == size]
        for name in WAYS:
            ratios = np.array([row[name] for row in mine], float)
            mean, low, high = paired_ratio(ratios, 1.0)
            text = f"{size}, {name}: {mean:.2f} [{low:.2f}, {high:.2f}] of one by one"
            lines.append(Verdict(text))
        off = max((row["difference"] for row in mine), default=np.nan)
        agree = bool(off <= bound(size))
        text = f"{size}: outer values agree to {off:.1g}, {bound(size):.1g} allowed"
        lines.append(Verdict(text, failed=not agree))
    return lines


def markdown(table: Table, rows: list[Row], command: str) -> str:
    """Medians and quartiles over repeats."""
    lines = [
        f"# {table.name}",
        "",
        f"{MEMBERS} trainings in one program, over the seconds of {MEMBERS} calls of "
        "one that trains one: medians [quartiles] over repeats. Compilation is apart. "
        f"Command: `{command}`",
        "",
        "| parameters | steps | one by one, s | vmap | lax.map | compile: one, s "
        "| vmap, s | lax.map, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size, (_, num_steps) in SIZES.items():
        mine = [row for row in rows if row["method"] == size]
        if not mine:
            continue
        column = lambda name, mine=mine: _quartiles([row[name] for row in mine])
        seconds = "each_seconds", "vmap", "map"
        compiles = "each_compile", "vmap_compile", "map_compile"
        cells = [f"{mine[0]['parameters']:,}", f"{num_steps}"]
        cells += [column(name) for name in (*seconds, *compiles)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(v.line for v in judge(rows))])


def _quartiles(values: list[float]) -> str:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


def draw(rows: list[Row], path: Path) -> None:
    """A dot a repeat."""
    panels = {
        f"{size} parameters": {
            name: [row[name] for row in rows if row["method"] == size] for name in WAYS
        }
        for size in SIZES
        if any(row["method"] == size for row in rows)
    }
    plots.strips(panels, path, "seconds over those of one by one", lines=())


def plan(scale: str, seeds: int) -> list[Row]:
    """All sizes of a repeat, then the next."""
    del scale
    return [{"method": size, "seed": i} for i in range(seeds) for size in SIZES]


TABLE = Table(
    name="population",
    source="Jaderberg et al. 2017 (arXiv 1711.09846)",
    minutes=3,
    seeds=5,
    plan=plan,
    run=cell_by_cell(measure, markdown, draw),
    judge=judge,
)
