"""A study: a table of methods by seeds, and what it claims of them."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .. import datasets as datasets
from ..tasks.task import Task
from ..trace import Trace
from . import record
from .record import Row
from .table import Table, cell_by_cell
from .verdict import Claim, Verdict, number_of_seeds


class Column(NamedTuple):
    """A column as it is shown: mean and standard deviation over seeds.

    Attributes:
      title, name: in the table, and in the rows.
      form: of mean and deviation, or of the mean alone, as of one seed.
      scale: what the number is multiplied by.
      largest: over the seeds, in place of the mean.
    """

    title: str
    name: str
    form: str = "{:.1f} ± {:.1f}"
    scale: float = 1.0
    largest: bool = False

    def cell(self, rows: Sequence[Row]) -> str:
        """A dash where no row has a number."""
        values = np.array([row.get(self.name) for row in rows], float) * self.scale
        if np.all(np.isnan(values)):
            return "-"
        center = np.max(values) if self.largest else np.mean(values)
        if values.size == 1:
            return self.form.partition(" ±")[0].format(center)
        return self.form.format(center, np.std(values, ddof=1))


COSTS = (
    Column("grad-eq", "gradient_equivalents", "{:.0f}"),
    Column("HVPs", "num_hvps", "{:.0f}"),
    Column("tuning grad-eq", "tuning_cost", "{:.0f}"),
    Column("compile s", "compile_seconds", "{:.1f}", largest=True),
    Column("run s", "run_seconds", "{:.1f}"),
)


MODEL = "model"  # of what a row of a study returns, what goes into no file of rows


@dataclass(frozen=True)
class Study:
    """A table to run.

    Attributes:
      name, paradigm, source: of the task.
      about: the paragraph over its table.
      data: ``() -> (what was loaded, {name: array})``.
      methods: the rows, in order, ``{name: seed -> row}``: a row is a dict of
        numbers, and of lists where the figure wants them. The costs are
        gradient_equivalents and num_hvps of the run, tuning_cost of what chose its
        settings, compile_seconds, run_seconds. Under `MODEL` it may have the
        ``(w, alpha)`` that was measured, which is kept beside the rows; there is none
        where numbers are means over several ``w``, or of none that was trained.
      columns: beside `COSTS`.
      claims: lines under the table, judged over seeds.
      draw: ``(rows, path)`` draws the figure.
      minutes: expected on two cores with tuning, rounded up.
      judge: further lines: rows -> verdicts.
      seeds: how many, unless told.
      split: ``key -> what is trained, chosen and tested on``, of the key of a seed.
    """

    name: str
    paradigm: str
    source: str
    about: str
    data: Callable[[], tuple[str, dict[str, Any]]]
    methods: dict[str, Callable[[int], Row]]
    columns: tuple[Column, ...]
    claims: tuple[Claim, ...]
    draw: Callable[[list[Row], Path], None]
    minutes: float
    judge: Callable[[list[Row]], list[Verdict]] = lambda rows: []
    seeds: int = 5
    split: Callable[[Array], PyTree] = lambda key: ()


def parts_of(*tasks: Task) -> PyTree:
    """What tasks are trained, chosen and tested on."""
    return [(task.problem, task.metrics) for task in tasks]


Keep = Callable[[Row, Row, tuple[PyTree, PyTree]], object]


def table(study: Study, keep: Keep = lambda cell, row, model: None) -> Table:
    """The study as a table to run and check.

    ``keep(cell, row, (w, alpha))`` is told each model before its row is written.
    """

    @functools.cache
    def data() -> Row:
        name, arrays = study.data()
        return {"data": name, "data_sha256": record.fingerprint(arrays)}

    def measure(cell: Row) -> Row:
        row = dict(study.methods[cell["method"]](cell["seed"]))  # it may be cached
        model = row.pop(MODEL, None)
        if model is not None:
            keep(cell, row, model)
        return row | data()

    return Table(
        name=study.name,
        source=study.source,
        minutes=study.minutes,
        seeds=study.seeds,
        plan=lambda scale, seeds: [
            {"method": method, "seed": seed}
            for method in study.methods
            for seed in range(seeds)
        ],
        run=cell_by_cell(
            measure,
            lambda table, rows, command: markdown(study, rows, command),
            study.draw,
        ),
        judge=functools.partial(judge, study),
    )


def judge(study: Study, rows: list[Row]) -> list[Verdict]:
    """The claims on methods that are there, and the study's further lines."""
    there = {row["method"] for row in rows}
    lines = [c.judge(rows) for c in study.claims if {c.first, c.second} <= there]
    return lines + (study.judge(rows) if there == set(study.methods) else [])


def markdown(study: Study, rows: list[Row], command: str) -> str:
    """The table with its command, and the verdicts under it."""
    lanes = {m: [row for row in rows if row["method"] == m] for m in study.methods}
    lanes = {method: lane for method, lane in lanes.items() if lane}
    known = lambda column: any(row.get(column.name) is not None for row in rows)
    columns = [c for c in (*study.columns, *COSTS) if known(c)]
    count = len({row["seed"] for row in rows})
    seeds = number_of_seeds(count) + ", mean ± standard deviation" * (count > 1)
    lines = [
        f"# {study.name}",
        "",
        f"{rows[0]['data']}; {seeds}. {study.about} "
        f"Source: {study.source}. "
        f"Command: `{command}`",
        "",
        "| " + " | ".join(["method", *(column.title for column in columns)]) + " |",
        "|" + "---|" * (1 + len(columns)),
    ]
    for method, lane in lanes.items():
        cells = [column.cell(lane) for column in columns]
        lines.append("| " + " | ".join([method, *cells]) + " |")
    lines.append("")
    lines += [verdict.line for verdict in judge(study, rows)]
    return "\n".join(lines)


def of_trace(trace: Trace) -> Row:
    """What learning cost, and how the outer value fell."""
    return {
        "gradient_equivalents": float(trace.cost[-1]),
        "num_hvps": float(jnp.nansum(trace.stats["num_hvps"])),
        "curve_value": np.asarray(trace.value, float).tolist(),
        "curve_cost": np.asarray(trace.cost, float).tolist(),
    }


DIGITS = "scikit-learn digits (1,797 real 8x8 images)"


@functools.cache
def digits() -> dict[str, np.ndarray]:
    """Loaded once a process."""
    return datasets.load("digits")


def tuned(run: Callable[[Any, bool], Row], settings: Sequence[Any]) -> Row:
    """The rule by which every row of a study is tuned.

    ``run(setting, True)`` learns with a part of validation held out and says in
    "selection", a number or a tuple of them, how good that was on it: higher is
    better. The best setting then learns once more with all: ``run(setting, False)``.
    Where there is one setting there is nothing to choose.
    """

    def score(row: Row) -> tuple[float, ...]:
        worst = lambda x: -math.inf if math.isnan(x) else float(x)
        return tuple(worst(x) for x in np.ravel(row["selection"]))

    tries = [run(setting, True) for setting in settings] if len(settings) > 1 else []
    best = max(range(len(tries)), key=lambda i: score(tries[i]), default=0)
    row = run(settings[best], False)
    row.pop("selection", None)
    cost = sum(row.get("gradient_equivalents", 0.0) for row in tries)
    setting = settings[best]
    named = {"setting": setting} if isinstance(setting, int | float | str) else {}
    return row | named | ({"tuning_cost": cost} if cost else {})
