"""Studies: tables of methods by seeds, with claims about the methods."""

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
    """A column of a table: mean and standard deviation over seeds.

    Attributes:
      title: Title in the table.
      name: Name of the column in the rows.
      form: Format of mean and deviation; for one seed the part before " ±" is used.
      scale: Factor by which numbers are multiplied.
      largest: Whether the maximum over the seeds replaces the mean.
    """

    title: str
    name: str
    form: str = "{:.1f} ± {:.1f}"
    scale: float = 1.0
    largest: bool = False

    def cell(self, rows: Sequence[Row]) -> str:
        """Returns the text of a cell; a dash if no row has a number."""
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


MODEL = "model"  # entry of a row that is not written to the file of rows


@dataclass(frozen=True)
class Study:
    """The definition of a table.

    Attributes:
      name, paradigm, source: Name, paradigm and publication of the task.
      about: Paragraph above the table.
      data: ``() -> (name, {name: array})``.
      methods: ``{name: seed -> row}`` in the order of the table. A row is a dict of
        numbers and, for the figure, lists. Its costs are gradient_equivalents and
        num_hvps of the run, tuning_cost of the tuning, compile_seconds and run_seconds.
        The entry `MODEL` may contain the ``(w, alpha)`` that was measured, which is
        saved beside the rows. It is missing if the numbers are means over several
        ``w`` or no ``w`` was trained.
      columns: Columns of the table in addition to `COSTS`.
      claims: Claims, which are evaluated over the seeds.
      draw: ``(rows, path)``, which draws the figure.
      minutes: Expected minutes on two cores with tuning, rounded up.
      judge: ``rows -> verdicts`` in addition to the claims.
      seeds: Default number of seeds.
      split: ``key -> data`` for training, validation and test, for the key of a seed.
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


def task_data(*tasks: Task) -> PyTree:
    """Returns the problems and metrics of tasks, which contain the split data."""
    return [(task.problem, task.metrics) for task in tasks]


SaveModel = Callable[[Row, Row, tuple[PyTree, PyTree]], object]


def table(study: Study, save_model: SaveModel = lambda cell, row, model: None) -> Table:
    """Returns a study as a table that can be run and checked.

    Args:
      study: The study.
      save_model: ``(cell, row, (w, alpha))``, called before the row is written.
    """

    @functools.cache
    def data() -> Row:
        name, arrays = study.data()
        return {"data": name, "data_sha256": record.fingerprint(arrays)}

    def measure(cell: Row) -> Row:
        row = dict(study.methods[cell["method"]](cell["seed"]))  # it may be cached
        model = row.pop(MODEL, None)
        if model is not None:
            save_model(cell, row, model)
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
    """Returns the verdicts on claims about methods in the rows, and the study's own."""
    methods = {row["method"] for row in rows}
    verdicts = [c.judge(rows) for c in study.claims if {c.first, c.second} <= methods]
    return verdicts + (study.judge(rows) if methods == set(study.methods) else [])


def markdown(study: Study, rows: list[Row], command: str) -> str:
    """Returns the table with its command and the verdicts."""
    rows_by_method = {
        method: method_rows
        for method in study.methods
        if (method_rows := [row for row in rows if row["method"] == method])
    }
    has_values = lambda column: any(row.get(column.name) is not None for row in rows)
    columns = [c for c in (*study.columns, *COSTS) if has_values(c)]
    num_seeds = len({row["seed"] for row in rows})
    seeds = number_of_seeds(num_seeds) + ", mean ± standard deviation" * (num_seeds > 1)
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
    for method, method_rows in rows_by_method.items():
        cells = [column.cell(method_rows) for column in columns]
        lines.append("| " + " | ".join([method, *cells]) + " |")
    lines.append("")
    lines += [verdict.line for verdict in judge(study, rows)]
    return "\n".join(lines)


def trace_columns(trace: Trace) -> Row:
    """Returns the cost of a run and the curve of its outer value as columns."""
    return {
        "gradient_equivalents": float(trace.cost[-1]),
        "num_hvps": float(jnp.nansum(trace.stats["num_hvps"])),
        "curve_value": np.asarray(trace.value, float).tolist(),
        "curve_cost": np.asarray(trace.cost, float).tolist(),
    }


DIGITS = "scikit-learn digits (1,797 real 8x8 images)"


@functools.cache
def digits() -> dict[str, np.ndarray]:
    """Returns the digits, which are loaded once per process."""
    return datasets.load("digits")


def tune_and_run(run: Callable[[Any, bool], Row], settings: Sequence[Any]) -> Row:
    """Returns the row of the best setting; every row of a study is tuned by this rule.

    Args:
      run: ``(setting, hold_out) -> row``. With ``hold_out`` a part of the validation
        data is held out, and the entry "selection" of the row, a number or a tuple of
        numbers, is the score on that part; higher is better.
      settings: Settings to try. The best one is run again without ``hold_out``; a
        single setting is run only once.
    """

    def score(row: Row) -> tuple[float, ...]:
        replace_nan = lambda x: -math.inf if math.isnan(x) else float(x)
        return tuple(replace_nan(x) for x in np.ravel(row["selection"]))

    trials = [run(setting, True) for setting in settings] if len(settings) > 1 else []
    best = max(range(len(trials)), key=lambda i: score(trials[i]), default=0)
    setting = settings[best]
    row = run(setting, False)
    row.pop("selection", None)
    if isinstance(setting, int | float | str):
        row = row | {"setting": setting}
    tuning_cost = sum(trial.get("gradient_equivalents", 0.0) for trial in trials)
    return row | ({"tuning_cost": tuning_cost} if tuning_cost else {})
