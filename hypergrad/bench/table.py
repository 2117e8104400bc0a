"""Definitions of tables: their cells, how one is measured, and what they state.

`Table` compares methods on one task. `MeasurementTable` is the general form: any cells
and any measurement. The runner, the report and the checks use only what `BaseTable`
declares.
"""

import abc
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree

from ..tasks.task import Task
from ..trace import Trace
from .claims import (
    MISSING_ROWS,
    Check,
    Claim,
    Comparison,
    Finding,
    Published,
    evaluate_claims,
    evaluate_comparisons,
)
from .columns import COST_COLUMNS, Column
from .methods import Method, check_grid, check_names, run_method, settings_of
from .rows import Cell, Row, cell_key
from .statistics import Resplits
from .tuning import choose_setting, tuning_fields

Plot = Callable[[list[Row], Path], None]
Retrain = Callable[[Task, PyTree, Array], PyTree]
METHOD_SPLITS = ("train", "val")  # that every method gets


@dataclass(frozen=True)
class Stage:
    """The cells of a table that are measured before those of a later stage.

    Args:
      name: Value of the field ``stage`` in the rows, such as "tuning". The rows of the
        last stage, which are the result, have no such field.
      cells: ``(scale, seeds) -> cells``, dictionaries that identify the rows.
      measure: ``(cell, rows of earlier stages) -> fields of the row``.
      body: ``rows -> lines of Markdown`` that show the stage; nothing by default.
    """

    name: str
    cells: Callable[[str, int], list[Cell]]
    measure: Callable[[Cell, list[Row]], Row]
    body: Callable[[list[Row]], list[str]] = lambda rows: []


@dataclass(frozen=True, kw_only=True)
class BaseTable(abc.ABC):
    """The interface that the runner and the report need from a table.

    Args:
      seeds: Number of seeds, starting at 0.
      columns: Columns that are printed after the label of the row.
      claims, checks: Statements about the rows; see `hypergrad.bench.claims`.
      comparisons: Pairs of methods that are compared without a claim.
      published: ``{(method, column): Published}``, numbers of papers.
      findings: ``rows -> list of Finding``, further lines under the table.
      resplits: Set if the seeds are re-splits of one data set.
      body: ``rows -> lines of Markdown``, printed in place of the table of columns.
      plot: ``(rows, path)`` draws the figure. Defaults to the values of the first
        column by method, beside the recorded curves; there is none without a column.
      paradigm: Learning paradigm, for the overview.
      source: The paper that the table follows.
      data: Name of the data set.
      arrays: ``() -> {name: array}``, the data whose fingerprint the rows carry.
      minutes: Expected minutes on two cores at the first scale, rounded up.
      scales: Names of the scales at which the table can be run.
      ranked_by: Column of the leaderboard, with "-" if lower is better; "" for none.
      protocol: The text of the protocol. Defaults to the docstring of the file.
    """

    seeds: int = 5
    columns: tuple[Column, ...] = ()
    claims: tuple[Claim, ...] = ()
    checks: tuple[Check, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    published: Mapping[tuple[str, str], Published] = field(default_factory=dict)
    findings: Callable[[list[Row]], list[Finding]] = lambda rows: []
    resplits: Resplits | None = None
    body: Callable[[list[Row]], list[str]] | None = None
    plot: Plot | None = None
    paradigm: str = ""
    source: str = ""
    data: str = ""
    arrays: Callable[[], Mapping[str, Any]] = dict
    minutes: float = 1
    scales: tuple[str, ...] = ("small",)
    ranked_by: str = ""
    protocol: str = ""

    @abc.abstractmethod
    def stages(self, scale: str, seeds: int) -> list[list[Cell]]:
        """Returns the cells of each stage; a stage needs the rows of earlier ones."""

    @abc.abstractmethod
    def measure(self, cell: Cell, scale: str, rows: list[Row]) -> Row:
        """Returns the fields of a cell's row, given the rows of earlier stages."""

    @property
    def key_fields(self) -> tuple[str, ...]:
        """Fields that identify a row: those of the cells."""
        cells = [cell for stage in self.stages(self.scales[0], 1) for cell in stage]
        return tuple(dict.fromkeys(name for cell in cells for name in cell))

    @property
    def printed_columns(self) -> tuple[Column, ...]:
        """The columns, then those of the costs."""
        named = {column.name for column in self.columns}
        return (*self.columns, *(x for x in COST_COLUMNS if x.name not in named))

    def stage_body(self, name: str, rows: list[Row]) -> list[str]:
        """Returns lines of Markdown that show the rows of an earlier stage."""
        del name, rows
        return []

    def evaluate(self, rows: Sequence[Row]) -> list[Finding]:
        """Returns the outcome of every check and claim, and the further findings.

        Rows of another protocol leave claims undecided. Further findings that raise an
        error have failed, unless rows are missing.
        """
        rows = result_rows(rows)
        outcomes = [check.evaluate(rows) for check in self.checks]
        outcomes += evaluate_claims(self.claims, rows, self.resplits)
        for comparison in self.comparisons:
            outcomes += comparison.evaluate(rows, self.resplits)
        try:
            outcomes += self.findings(rows)
        except MISSING_ROWS as error:
            is_complete = self._has_all_cells(rows)
            reason = "no row is missing, so change `findings` of the table"
            text = f"further findings cannot be evaluated ({error!r}): "
            text += reason if is_complete else "rows are missing"
            outcomes.append(Finding(text, "FAILED" if is_complete else "undecided"))
        deviations = self.deviations(rows)
        return [finding.undecided_if(deviations) for finding in outcomes]

    def deviations(self, rows: Sequence[Row], scale: str | None = None) -> list[str]:
        """Returns in what rows deviate from the protocol of the table, in words.

        Args:
          rows: Rows of the last stage.
          scale: The scale of the protocol. Defaults to the table's first one.
        """
        if not rows:
            return []
        scale = scale or self.scales[0]
        texts, used = [], rows[0].get("scale", scale)
        cells = self.stages(used, self.seeds)[-1]
        num_planned = len({cell.get("seed") for cell in cells}) or self.seeds
        num_seeds = len({row.get("seed") for row in rows})
        if num_seeds != num_planned:
            plural = "s" * (num_seeds != 1)
            texts.append(f"{num_seeds} seed{plural}; the table has {num_planned}")
        if used != scale:
            texts.append(f"made at the scale {used}; the claims are about {scale}")
        elif (budget := rows[0].get("budget")) is not None:
            own_budget = getattr(self, "budget_of", lambda scale: None)(scale)
            if budget != own_budget:
                texts.append(
                    f"made with the budget {budget}; the table has {own_budget}"
                )
        return texts

    def _has_all_cells(self, rows: Sequence[Row]) -> bool:
        """Returns whether each cell of the last stage has a row, of all seeds."""
        scale = rows[0].get("scale", self.scales[0]) if rows else self.scales[0]
        cells, names = self.stages(scale, self.seeds)[-1], self.key_fields
        planned = {cell_key(cell, names) for cell in cells}
        return planned <= {cell_key(row, names) for row in rows}


def result_rows(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows of the last stage, which are printed and evaluated."""
    return [row for row in rows if row.get("stage") is None]


@dataclass(frozen=True, kw_only=True)
class MeasurementTable(BaseTable):
    """A table of arbitrary measurements.

    Args:
      cells: ``(scale, seeds) -> cells``, dictionaries that identify the rows; each has
        at least ``method``, the label of the printed row, and ``seed``.
      measure_cell: ``(cell, rows of earlier stages) -> fields of the row``.
      earlier_stages: Stages such as a tuning run, in order.
    """

    cells: Callable[[str, int], list[Cell]]
    measure_cell: Callable[[Cell, list[Row]], Row]
    earlier_stages: tuple[Stage, ...] = ()

    def stages(self, scale: str, seeds: int) -> list[list[Cell]]:
        """Returns the cells of the earlier stages, then those of the result."""
        earlier = [
            [{"stage": stage.name, **cell} for cell in stage.cells(scale, seeds)]
            for stage in self.earlier_stages
        ]
        return [*earlier, self.cells(scale, seeds)]

    def measure(self, cell: Cell, scale: str, rows: list[Row]) -> Row:
        """Returns what the stage of the cell measures."""
        del scale  # cells that depend on it contain it
        for stage in self.earlier_stages:
            if cell.get("stage") == stage.name:
                return stage.measure(cell, rows)
        return self.measure_cell(cell, rows)

    def stage_body(self, name: str, rows: list[Row]) -> list[str]:
        """Returns what the stage prints of its rows."""
        bodies = {stage.name: stage.body for stage in self.earlier_stages}
        return bodies[name](rows) if name in bodies else []


@dataclass(frozen=True, kw_only=True)
class Table(BaseTable):
    """A comparison of methods on one task at equal budgets.

    Every method is tuned by one rule: for each seed, each setting of its grid is run
    with a part of the validation data held out, the setting that is best on that part
    is chosen, and the method is run again with it and with all validation data. The
    untouched test split is read only by the metrics of that last run.

    Args:
      task: ``(key, scale, **settings) -> Task`` with the settings of ``task_grid``. If
        anything is tuned it also takes ``hold_out``: then a part of the validation data
        is held out, on which the metrics of ``selection`` are measured.
      methods: ``{label: method}``; a method is a function
        ``(task, *, budget, key, **settings) -> Trace``. Optional attributes of it are
        ``grid = {setting: values}``; ``keeps_w``, see ``retrain``; ``budget_factor``, a
        multiple of the budget for this method; ``splits``, names of splits of the task
        that it gets besides "train" and "val", as an oracle does; and ``task_settings =
        {argument of task: value}`` for a row on another variant of the task.
      metrics: Names of the task's metrics that are measured at the end of a run.
      budget: Gradient-equivalents of one run, or ``{scale: budget}``.
      task_grid: ``{argument of task: values}``, settings of the task that are tuned
        together with each method's own.
      selection: Metrics of the task by which a setting is chosen: higher is better, or
        lower for a name that starts with "-"; ties are broken by the next name.
        Defaults to the outer value at the ``alpha`` that a method returns.
      method_key: ``key of the seed -> key`` that a method gets.
      selection_cost: Gradient-equivalents of the metrics of ``selection``, which are
        counted for each tuning run; 0 if they train nothing.
      retrain: ``(task, alpha, key) -> w``: trains the model that is measured with the
        learned ``alpha``. Defaults to the ``w`` where the method ended, which is also
        what is measured of a method whose attribute ``keeps_w`` is True.
      extra: ``(task, trace, w, key) -> fields``, further fields of the row.
      lower_is_better: Whether smaller values of the first metric are better.
    """

    task: Callable[..., Task]
    methods: Mapping[str, Method]
    metrics: tuple[str, ...]
    budget: float | Mapping[str, float]
    task_grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    selection: tuple[str, ...] = ()
    method_key: Callable[[Array], Array] = lambda key: jax.random.fold_in(key, 1)
    selection_cost: float = 0.0
    retrain: Retrain | None = None
    extra: Callable[[Task, Trace, PyTree, Array], Row] = lambda *_: {}
    lower_is_better: bool = False

    def __post_init__(self):
        """Uses the metrics as columns and the first one to rank, unless given.

        Raises:
          ValueError: A metric that is reported is also used to choose settings, the
            grid of the task is not one, or a method sets what it tunes.
        """
        check_grid("task_grid", self.task_grid)
        for label, method in self.methods.items():
            check_names(label, method, self.task_grid)
        selection = {name.removeprefix("-") for name in self.selection}
        if shared := selection & set(self.metrics):
            raise ValueError(
                f"selection and metrics must not share {sorted(shared)}: what is "
                "reported must not choose settings."
            )
        if not self.columns:
            object.__setattr__(self, "columns", tuple(map(Column, self.metrics)))
        sign = "-" if self.lower_is_better else ""
        object.__setattr__(self, "ranked_by", self.ranked_by or sign + self.metrics[0])

    @property
    def key_fields(self) -> tuple[str, ...]:
        """Fields that identify a row, also one that tunes an added method."""
        return ("stage", "method", "setting_index", "seed")

    def with_methods(self, methods: Mapping[str, Method]) -> "Table":
        """Returns the table with further methods.

        Raises:
          ValueError: A label is taken.
        """
        if taken := methods.keys() & self.methods.keys():
            raise ValueError(f"the table already has the rows {sorted(taken)}")
        return dataclasses.replace(self, methods={**self.methods, **methods})

    def evaluate(self, rows: Sequence[Row]) -> list[Finding]:
        """Returns the outcomes, and how each added method differs from each row.

        Two added methods are compared once.
        """
        findings, rows = super().evaluate(rows), result_rows(rows)
        rivals = list(dict.fromkeys(row["method"] for row in rows))
        added = dict.fromkeys(row["method"] for row in rows if "method_source" in row)
        comparisons = []
        for label in added:
            rivals.remove(label)
            comparisons.append(
                Comparison(label, tuple(rivals), self.metrics[0], self.lower_is_better)
            )
        # In one family, however many methods are added.
        return findings + evaluate_comparisons(comparisons, rows, self.resplits)

    def budget_of(self, scale: str) -> float:
        """Returns the budget of one run at a scale."""
        return self.budget[scale] if isinstance(self.budget, Mapping) else self.budget

    def stages(self, scale: str, seeds: int) -> list[list[Cell]]:
        """Returns the tuning runs, then the reported runs."""
        del scale
        tuning = [
            {"stage": "tuning", "method": label, "setting_index": i, "seed": seed}
            for label, method in self.methods.items()
            if len(settings := settings_of(method, self.task_grid)) > 1
            for seed in range(seeds)
            for i in range(len(settings))
        ]
        reported = [
            {"method": label, "seed": seed}
            for label in self.methods
            for seed in range(seeds)
        ]
        return [tuning, reported] if tuning else [reported]

    def measure(self, cell: Cell, scale: str, rows: list[Row]) -> Row:
        """Runs a method once and returns its metrics, costs and settings."""
        label, seed = cell["method"], cell["seed"]
        method, is_tuning = self.methods[label], cell.get("stage") == "tuning"
        all_settings = settings_of(method, self.task_grid)
        index = cell.get("setting_index")
        if index is None:
            index = choose_setting(label, seed, len(all_settings), rows)
        key = jax.random.key(seed)
        settings, factor = all_settings[index], getattr(method, "budget_factor", 1)
        task = self.make_task(key, scale, method, settings, hold_out=is_tuning)
        result = run_method(
            method,
            without_test_data(task, getattr(method, "splits", ())),
            budget=self.budget_of(scale) * factor,
            key=self.method_key(key),
            settings={k: x for k, x in settings.items() if k not in self.task_grid},
        )
        trace, w = result.trace, result.trace.w
        if self.retrain is not None and not getattr(method, "keeps_w", False):
            w = self.retrain(task, trace.alpha, key)
        row = {"settings": settings, **result.costs}
        if factor != 1:
            row["budget_factor"] = factor
        if is_tuning:
            row |= {k: x for k, x in result.record.items() if k == "stopped"}
            row["gradient_equivalents"] += self.selection_cost
            return row | {"selection": self.selection_scores(task, trace, w, key)}
        measure = lambda name: float(task.metrics[name](w, trace.alpha, key))
        row |= {name: measure(name) for name in self.metrics}
        row |= result.record | self.extra(task, trace, w, key)
        return row | tuning_fields(label, seed, rows, row["compile_seconds"])

    def selection_scores(
        self, task: Task, trace: Trace, w: PyTree, key: Array
    ) -> list[float]:
        """Returns the scores of a tuning run; higher is better."""
        scores = []
        for name in self.selection:
            sign = -1.0 if name.startswith("-") else 1.0
            metric = task.metrics[name.removeprefix("-")]
            scores.append(sign * float(metric(w, trace.alpha, key)))
        row = trace.last_row if trace.best_row is None else int(trace.best_row)
        return scores or [-float(np.mean(trace.value[row]))]

    def make_task(
        self,
        key: Array,
        scale: str,
        method: Method,
        settings: Mapping[str, Any],
        *,
        hold_out: bool,
    ) -> Task:
        """Returns the task of a seed, with the settings that are the task's own."""
        options = dict(getattr(method, "task_settings", {}))
        options |= {name: settings[name] for name in self.task_grid}
        parameters = inspect.signature(self.task).parameters.values()
        if any(x.name == "hold_out" or x.kind is x.VAR_KEYWORD for x in parameters):
            options["hold_out"] = hold_out
        return self.task(key, scale, **options)


def without_test_data(task: Task, further_splits: Sequence[str] = ()) -> Task:
    """Returns the task without metrics, with `METHOD_SPLITS` and further splits."""
    splits = task.splits
    if isinstance(splits, dict):
        names = (*METHOD_SPLITS, *further_splits)
        splits = {name: splits[name] for name in names if name in splits}
    return dataclasses.replace(task, metrics={}, splits=splits)
