"""How operations and bytes of a hypergradient grow, beside what theory says.

Programs are compiled and not run, so that every number is the same on every run. See
README.md for the protocol. `python -m benchmarks.growth METHOD` counts what one device
of several does, in a process that is told that it has so many.
"""

import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.studies.record import Row
from hypergrad.studies.table import Table, cell_by_cell
from hypergrad.studies.verdict import Verdict

from .shared import plots

PRODUCTS = 4  # of a linear solve
RATE, MOMENTUM = 0.1, 0.9
OPTIMIZER = optax.sgd(RATE, momentum=MOMENTUM)
DECADES = 100  # by which the sizes of a fit differ at the most
TOLERANCE, SAME_SCRATCH, SAME_OPERATIONS = 0.1, 1.1, 1.5
DEVICES = [2, 4, 8, 16]
FORCED = "--xla_force_host_platform_device_count"


class Sizes(NamedTuple):
    """Of a problem and its inner run, of how many at once, on how many devices."""

    steps: int = 10
    parameters: int = 10**4
    hyperparameters: int = 10
    examples: int = 8
    population: int = 1
    devices: int = 1


def decades(low: int, high: int) -> list[int]:
    """Powers of ten."""
    return [10**i for i in range(low, high + 1)]


#: What varies -> its sizes, and what else is not as in `Sizes`.
AXES: dict[str, tuple[list[int], dict[str, int]]] = {
    "steps": (decades(1, 6), {"parameters": 10**5}),
    "parameters": (decades(3, 7), {}),
    "hyperparameters": (decades(0, 7), {"parameters": 10**7}),
    "examples": (decades(2, 6), {"parameters": 100}),
    "population": (decades(0, 3), {}),
    "devices": (DEVICES, {"parameters": 100, "examples": 1000}),  # on each
}
COLUMNS = ("operations", "scratch")
#: What grows with what, by theory, in no estimator but those that say so.
FLAT = {
    ("scratch", "steps"),
    *itertools.product(COLUMNS, ("hyperparameters", "devices")),
}


def outer_loss(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Mean cross-entropy of a logistic regression."""
    del alpha
    scores = batch["x"] @ w
    return jnp.mean(jax.nn.softplus(scores) - batch["y"] * scores)


def inner_loss(w: Array, alpha: Array, batch: PyTree) -> Array:
    """With a log-penalty for as many weights as each of them has."""
    squares = jnp.sum(w.reshape(alpha.size, -1) ** 2, axis=1)
    return outer_loss(w, alpha, batch) + jnp.vdot(jnp.exp(alpha), squares)


def descent(steps: int) -> hg.Descent:
    """The inner solver of all."""
    return hg.Descent(OPTIMIZER, steps)


def once(
    make: Callable[[int], Any],
    steps: int,
    problem: hg.Bilevel,
    w: Array,
    alpha: Array,
    key: Array,
) -> PyTree:
    """One estimate."""
    found = hg.hypergradient(problem, make(steps))(w, alpha, key)
    return found.value, found.hypergradient, found.w


def jointly(
    make: Callable[[int], Any],
    steps: int,
    problem: hg.Bilevel,
    w: Array,
    alpha: Array,
    key: Array,
) -> PyTree:
    """As many joint steps as others make inner ones."""
    estimator = make(steps)

    def step(carry: tuple, key: Array) -> tuple[tuple, None]:
        state, alpha = carry
        found, state = estimator.estimate(problem, state, alpha, key)
        return (state, alpha - RATE * found.hypergradient), None

    carry = estimator.init(problem, w, alpha, key), alpha
    return jax.lax.scan(step, carry, jax.random.split(key, steps))[0]


class Method(NamedTuple):
    """An estimator, and how it grows where not as most do.

    Attributes:
      make: number of steps -> estimator.
      grows: (column, axis, exponent) where that is not `theory` of most.
      most: hyperparameters.
      run: of the estimator.
    """

    make: Callable[[int], Any]
    grows: tuple[tuple[str, str, float], ...] = ()
    most: int = 10**7
    run: Callable = once


EVERY = tuple((column, "hyperparameters", 1.0) for column in COLUMNS)
ROOT, ALL = ((("scratch", "steps", power),) for power in (0.5, 1.0))
METHODS = {
    "Implicit, CG": Method(
        lambda T: hg.Implicit(descent(T), hg.CG(rtol=0.0, max_steps=PRODUCTS))
    ),
    "Implicit, Neumann": Method(
        lambda T: hg.Implicit(descent(T), hg.Neumann(PRODUCTS, step_size=RATE))
    ),
    "Unrolled": Method(lambda T: hg.Unrolled(descent(T)), ROOT),
    "Unrolled, stored": Method(
        lambda T: hg.Unrolled(descent(T), checkpoint=False), ALL
    ),
    "Unrolled, last 10": Method(
        lambda T: hg.Unrolled(descent(T), truncation_length=10)
    ),
    "Forward": Method(lambda T: hg.Forward(descent(T)), EVERY, 10**3),
    "Reversible": Method(lambda T: hg.Reversible(RATE, MOMENTUM, T), ALL),
    "FixedPoint": Method(lambda T: hg.FixedPoint(descent(T), PRODUCTS)),
    "FiniteDifference": Method(lambda T: hg.FiniteDifference(descent(T))),
    "Penalty": Method(lambda T: hg.Penalty(descent(T), 10.0)),
    "CentralDifference": Method(
        lambda T: hg.CentralDifference(descent(T)),
        (("operations", "hyperparameters", 1.0),),
        10**3,
    ),
    "Evolution": Method(lambda T: hg.Evolution(descent(T), num_pairs=2)),
    "SOBA": Method(lambda T: hg.SOBA(OPTIMIZER), run=jointly),
}


def theory(method: str, column: str, axis: str) -> float:
    """1, but 0 where flat, unless given."""
    own = {(c, a): power for c, a, power in METHODS[method].grows}
    return own.get((column, axis), 0.0 if (column, axis) in FLAT else 1.0)


IMPLICIT = [name for name in METHODS if name.startswith("Implicit")]
#: Whose operations are not to grow with hyperparameters.
BLIND = [m for m in METHODS if theory(m, "operations", "hyperparameters") == 0]


def sizes_of(cell: Row) -> Sizes:
    """The axis at the size of the cell, the rest at what goes with the axis."""
    axis = cell["axis"]
    return Sizes(**AXES[axis][1] | {axis: cell["size"]})


def shapes(sizes: Sizes) -> tuple[PyTree, Array, Array, Array]:
    """``(data, w, alpha, key)``; the last three lead with the population, if any."""
    data = {
        "x": jnp.zeros((sizes.examples, sizes.parameters)),
        "y": jnp.zeros(sizes.examples),
    }
    each = () if sizes.population == 1 else (sizes.population,)
    w = jnp.zeros((*each, sizes.parameters))
    alpha = jnp.zeros((*each, sizes.hyperparameters))
    return data, w, alpha, jnp.broadcast_to(jax.random.key(0), each)


def run(method: str, sizes: Sizes, train: PyTree, val: PyTree, *each: Any) -> PyTree:
    """The program that is counted, of ``w, alpha, key`` or a population of them."""
    found = METHODS[method]

    def one(w: Array, alpha: Array, key: Array) -> PyTree:
        problem = hg.Bilevel(inner_loss, outer_loss, train, val)
        return found.run(found.make, sizes.steps, problem, w, alpha, key)

    return one(*each) if sizes.population == 1 else jax.vmap(one)(*each)


def measure(cell: Row) -> Row:
    """Of the compiled program."""
    sizes = sizes_of(cell)
    if cell["axis"] == "devices":
        return sizes._asdict() | on_devices(cell["method"])[sizes.devices]
    data, *each = jax.eval_shape(functools.partial(shapes, sizes))
    counted = functools.partial(run, cell["method"], sizes)
    program = hg.cost.compile_program(counted, data, data, *each)
    loops = [PRODUCTS] * len(program.flops.loops)
    return {
        **sizes._asdict(),
        "operations": program.flops.total(*loops),
        "scratch": program.memory.temporaries,
        "unknown": list(program.flops.unknown),
    }


# One device of several, each of which has as many examples.


@functools.cache
def on_devices(method: str) -> dict[int, Row]:
    """`of_one_device` by how many there are, from a process that has them."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FORCED}={max(DEVICES)}"
    command = [sys.executable, "-m", "benchmarks.growth", method]
    done = subprocess.run(
        command,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return dict(zip(DEVICES, json.loads(done.stdout), strict=True))


def of_one_device(method: str, devices: int) -> Row:
    """Of its part of the program, by the compiler: bodies of loops count once."""
    sizes = sizes_of({"axis": "devices", "size": devices})
    sizes = sizes._replace(examples=sizes.examples * devices)
    mesh = jax.make_mesh(
        (devices,),
        ("data",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:devices],
    )
    parts = NamedSharding(mesh, PartitionSpec("data"))
    data, *each = jax.eval_shape(functools.partial(shapes, sizes))
    data = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=parts), data
    )
    program = jax.jit(functools.partial(run, method, sizes))
    compiled: Any = program.lower(data, data, *each).compile()
    return {
        "operations": compiled.cost_analysis()["flops"],
        "scratch": compiled.memory_analysis().temp_size_in_bytes,
        "unknown": [],
    }


def exponent(sizes: Any, values: Any) -> float:
    """Slope of log values over the sizes within two decades of the largest."""
    sizes, values = np.asarray(sizes, float), np.asarray(values, float)
    last = sizes * DECADES >= sizes.max()
    return slope(sizes[last], values[last])


def slope(sizes: Any, values: Any) -> float:
    """Of least squares in logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def line(rows: list[Row], method: str, axis: str, column: str) -> tuple[list, list]:
    """Sizes and values, ascending."""
    mine = [row for row in rows if (row["method"], row["axis"]) == (method, axis)]
    mine.sort(key=lambda row: row["size"])
    return [row["size"] for row in mine], [row[column] for row in mine]


def judge(rows: list[Row]) -> list[Verdict]:
    """Exponents within 0.1, the two that are to be flat, and what is not counted."""
    values = lambda column, axis, methods: {
        method: line(rows, method, axis, column) for method in methods
    }
    verdicts = []
    for column, axis in itertools.product(COLUMNS, AXES):
        lines = values(column, axis, METHODS)
        found = {method: exponent(*pair) for method, pair in lines.items()}
        expected = {method: theory(method, column, axis) for method in METHODS}
        verdicts.append(as_expected(f"{column} against {axis}", found, expected))
    scratch = values("scratch", "steps", IMPLICIT)
    operations = values("operations", "hyperparameters", BLIND)
    return [
        *verdicts,
        flat("scratch over all steps", scratch, SAME_SCRATCH),
        flat("operations over all hyperparameters", operations, SAME_OPERATIONS),
        without_price(rows),
    ]


def as_expected(
    what: str, found: dict[str, float], expected: dict[str, float]
) -> Verdict:
    """Whether the exponent of every method is within 0.1; the others by name."""
    off = [
        f"{method} {power:.2f} for {expected[method]:g}"
        for method, power in found.items()
        if not abs(power - expected[method]) <= TOLERANCE
    ]
    text = f"{what}: {len(found) - len(off)} of {len(found)} exponents "
    text += f"within {TOLERANCE:g} of theory"
    return said("; ".join([text, *off]), not off)


def without_price(rows: list[Row]) -> Verdict:
    """Fails where a program does what `hypergrad.cost.flops` cannot count.

    Those of several devices are counted by XLA, which does not say what it leaves out.
    """
    ours = [row for row in rows if row["axis"] != "devices"]
    names = sorted({name for row in ours for name in row["unknown"]})
    number = sum(bool(row["unknown"]) for row in ours)
    text = f"{number} of {len(ours)} programs have operations that are not counted"
    return Verdict(text + (f": {', '.join(names)}" if names else ""), bool(names))


def flat(what: str, lines: dict[str, tuple[list, list]], most: float) -> Verdict:
    """The largest over the least of a line, of the method where that is most."""
    found = {name: max(values) / min(values) for name, (_, values) in lines.items()}
    worst = max(found, key=lambda name: found[name])
    text = f"{what}: {found[worst]:.2f} times the least, {worst}, the most of "
    return said(f"{text}{len(found)}; {most:g} claimed", found[worst] <= most)


def said(text: str, met: bool) -> Verdict:
    """A number without noise: reproduced or not."""
    return Verdict(f"{text}: {'reproduced' if met else 'not reproduced'}")


def markdown(table: Table, rows: list[Row], command: str) -> str:
    """Fitted exponents, theory's in brackets."""
    lines = [
        f"# {table.name}",
        "",
        "Fitted exponents of operations and of scratch bytes of one hypergradient, "
        f"compiled and not run; theory's in brackets. Command: `{command}`",
        "",
        "| estimator | "
        + " | ".join(f"{c}, {a}" for c in COLUMNS for a in AXES)
        + " |",
        "|---" * (1 + len(COLUMNS) * len(AXES)) + "|",
    ]
    for method in METHODS:
        cells = [
            f"{exponent(*line(rows, method, axis, column)):.2f} "
            f"[{theory(method, column, axis):g}]"
            for column in COLUMNS
            for axis in AXES
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(v.line for v in judge(rows))])


def draw(rows: list[Row], path: Path) -> None:
    """A panel a column and an axis, a line a method."""
    panels = {
        (column, axis): {method: line(rows, method, axis, column) for method in METHODS}
        for column in COLUMNS
        for axis in AXES
    }
    plots.growth(panels, path)


def plan(scale: str, seeds: int) -> list[Row]:
    """Axis by axis; what is counted is the same for every seed."""
    del scale, seeds
    return [
        {"method": name, "axis": axis, "size": size, "seed": 0}
        for axis, (sizes, _) in AXES.items()
        for name, method in METHODS.items()
        for size in sizes
        if axis != "hyperparameters" or size <= method.most
    ]


TABLE = Table(
    name="growth",
    source="counted; costs as each estimator's docstring states them",
    minutes=20,
    seeds=1,
    plan=plan,
    run=cell_by_cell(measure, markdown, draw),
    judge=judge,
)


if __name__ == "__main__":
    print(json.dumps([of_one_device(sys.argv[1], devices) for devices in DEVICES]))
