"""The plan of a run, without running or compiling anything."""

from collections.abc import Sequence

from .loading import TableRef
from .rows import Row, cell_key
from .runner import RunOptions, check_options
from .table import Table


def plan(
    ref: TableRef,
    options: RunOptions,
    finished: Sequence[Row],
    committed: Sequence[Row],
) -> list[tuple[str, int, int, float | None, float | None]]:
    """Returns the cells that a run would measure, by label, and what they may cost.

    A row has the label of a method, its numbers of tuning runs and of reported runs,
    the gradient-equivalents of all of them if every run spends its budget, and the
    expected seconds by the committed rows of this scale and budget, if there are any.

    Args:
      ref: The table.
      options: What would be run.
      finished: Rows that the run would continue, whose cells are left out.
      committed: Rows of an earlier run, from which the seconds are estimated.
    """
    table = ref.load()
    check_options(table, options)
    stages = table.stages(options.scale, options.seeds)
    cells = [cell for stage in stages for cell in stage]
    labels = dict.fromkeys(str(cell["method"]) for cell in cells)
    budget = table.budget_of(options.scale) if isinstance(table, Table) else None
    key_fields = table.key_fields
    done = {cell_key(row, key_fields) for row in finished}
    cells = [cell for cell in cells if cell_key(cell, key_fields) not in done]
    planned = []
    for label in labels:
        if options.only and label not in options.only:
            continue
        method_cells = [cell for cell in cells if cell["method"] == label]
        num_tuning = sum(cell.get("stage") == "tuning" for cell in method_cells)
        max_cost = None
        if isinstance(table, Table):
            factor = getattr(table.methods[label], "budget_factor", 1)
            max_cost = table.budget_of(options.scale) * factor * len(method_cells)
            max_cost += table.selection_cost * num_tuning
        seconds = [
            row["run_seconds"]
            for row in committed
            if row["method"] == label
            and (row["scale"], row.get("budget")) == (options.scale, budget)
            and row.get("run_seconds") is not None
        ]
        total_seconds = None
        if seconds:
            total_seconds = sum(seconds) / len(seconds) * len(method_cells)
        num_runs = len(method_cells) - num_tuning
        planned.append((label, num_tuning, num_runs, max_cost, total_seconds))
    return planned
