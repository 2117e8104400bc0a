"""Judges committed rows again: damaged, missing or mixed rows, checks and claims."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from .claims import Finding
from .methods import MethodError
from .report import TableResult
from .rows import Cell, Row, cell_key, key_in_words, read_rows, repeated_keys, select
from .runner import COMMON_FIELDS, check_no_cell_is_repeated
from .table import BaseTable, Table
from .tuning import choose_setting, tuning_fields


def load_result(name: str, table: BaseTable, folder: Path) -> TableResult:
    """Returns the rows of a table in a folder.

    Raises:
      ValueError: The file is missing, empty or damaged, its rows are of several runs
        that do not belong together, or a cell has several rows.
    """
    result = _read_result(name, table, folder)
    if problems := mixed_fields(result.rows):
        raise ValueError(f"{folder / name}.jsonl mixes runs: {'; '.join(problems)}.")
    check_no_cell_is_repeated(result.rows, table, folder / f"{name}.jsonl")
    if not result.printed_rows:
        raise ValueError(
            f"{folder / name}.jsonl holds rows of tuning only. The same "
            "`hypergrad run` continues from them."
        )
    return result


def _read_result(name: str, table: BaseTable, folder: Path) -> TableResult:
    path = folder / f"{name}.jsonl"
    if not path.exists():
        raise ValueError(
            f"{path} does not exist. Run the table first, or give the folder of its "
            "rows: `hypergrad check FOLDER`."
        )
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    for field in ("method", "scale"):
        if not all(field in row for row in rows):
            raise ValueError(f"{path} holds a row without the field {field!r}.")
    return TableResult(name, table, rows)


def check_result(name: str, table: BaseTable, folder: Path) -> list[Finding]:
    """Returns what is wrong with the rows, or, if nothing is, all findings.

    The rows must be undamaged, of one source, of all planned cells and of no other.
    """
    try:
        result = _read_result(name, table, folder)
        problems = mixed_fields(result.rows) + cell_problems(result)
        problems += metric_problems(result)
        if problems := problems or tuning_problems(result):
            return [Finding(text, "FAILED") for text in problems]
        return result.findings + notes(result)
    except (ValueError, OSError) as error:
        return [Finding(str(error), "FAILED")]
    except Exception as error:  # of a check of the table, or of a row without a field
        text = f"the rows cannot be evaluated: {type(error).__name__}: {error}"
        return [Finding(text, "FAILED")]


def mixed_fields(rows: list[Row]) -> list[str]:
    """Returns the common fields that have several values, in words."""
    problems = []
    for name in COMMON_FIELDS:
        values: list[Any] = []  # 60 and 60.0 are equal
        for row in rows:
            if (value := row.get(name)) not in values:
                values.append(value)
        if len(values) > 1:
            texts = sorted(map(str, values))
            problems.append(f"rows were made with several values of {name}: {texts}")
    return problems


def notes(result: TableResult) -> list[Finding]:
    """Returns in what the rows differ from the table as its file defines it now."""
    row, texts = result.printed_rows[0], result.deviations
    num_machines = len({str(row.get("machine")) for row in result.rows})
    if num_machines > 1:
        texts.append(f"rows were made on {num_machines} machines")
    if "converted_from" in row:
        texts.append(f"converted from commit {row['converted_from'][:12]}")
    return [Finding(text) for text in texts]


def metric_problems(result: TableResult) -> list[str]:
    """Returns which metrics of claims and comparisons no row has, in words."""
    if not result.printed_rows:
        return []
    pairs = (*result.table.claims, *result.table.comparisons)
    names = {name for row in result.printed_rows for name in row}
    metrics = sorted({pair.metric for pair in pairs} - names)
    return [
        f"no row has {name!r}, which a claim or comparison names" for name in metrics
    ]


def cell_problems(result: TableResult) -> list[str]:
    """Returns missing, unplanned and repeated cells, in words.

    A method without any row, as after a run with ``--only``, is one problem.
    Rows that were converted from an older form need no rows of earlier stages.
    """
    table, rows = result.table, result.rows
    if not result.printed_rows:
        return [
            f"missing: all reported rows; {len(rows)} rows of tuning are there, and "
            "the same `hypergrad run` continues"
        ]
    key_fields = table.key_fields
    key_of = lambda row: cell_key(row, key_fields)
    seeds = sorted({row.get("seed", 0) for row in rows})
    stages = table.stages(result.scale, 1 + max(seeds))
    is_converted = all("converted_from" in row for row in rows)
    needed = stages[-1:] if is_converted else stages
    planned = {key_of(cell) for stage in stages for cell in stage}
    expected = {key_of(cell) for stage in needed for cell in stage}
    expected |= set(map(key_of, _cells_of_added_methods(rows, seeds)))
    of_added = {key_of(row) for row in rows if "method_source" in row}
    measured = set(map(key_of, rows))
    missing = expected - measured
    method_of = lambda key: key[key_fields.index("method")]
    num_expected = Counter(map(method_of, expected))
    num_missing = Counter(map(method_of, missing))
    without_rows = {
        name for name, count in num_missing.items() if 1 < count == num_expected[name]
    }
    texts = {
        "missing": {key for key in missing if method_of(key) not in without_rows},
        "not planned": measured - planned - of_added,
        "repeated": repeated_keys(rows, key_fields),
    }
    return [
        f"missing: {name}, all {num_expected[name]} cells"
        for name in sorted(without_rows)
    ] + [
        f"{kind}: {key_in_words(key)}"
        for kind, keys in texts.items()
        for key in sorted(keys, key=str)
    ]


def _cells_of_added_methods(rows: list[Row], seeds: list[int]) -> list[Cell]:
    """Returns the cells of added methods, as far as their rows tell.

    Their grids are known only to their files. A method whose reported rows state a cost
    of tuning had at least one setting that was tuned.
    """
    cells: list[Cell] = []
    for label in {row["method"] for row in rows if "method_source" in row}:
        rows_of_label = select(rows, method=label)
        num_settings = 1 + max(row.get("setting_index", -1) for row in rows_of_label)
        if any("tuning_cost" in row for row in rows_of_label):
            num_settings = max(1, num_settings)
        cells += [{"method": label, "seed": seed} for seed in seeds]
        cells += [
            {"stage": "tuning", "method": label, "setting_index": index, "seed": seed}
            for seed in seeds
            for index in range(num_settings)
        ]
    return cells


def tuning_problems(result: TableResult) -> list[str]:
    """Returns reported rows whose setting or cost is not that of their tuning runs."""
    if not isinstance(result.table, Table):
        return []
    return [
        f"{row['method']}, seed {row['seed']}: {problem}"
        for row in result.printed_rows
        for problem in _tuning_problems_of(row, result.rows)
    ]


def _tuning_problems_of(row: Row, rows: list[Row]) -> list[str]:
    label, seed = row["method"], row["seed"]
    tuning_rows = select(rows, stage="tuning", method=label, seed=seed)
    if not tuning_rows:
        return []
    num_settings = 1 + max(tuning_row["setting_index"] for tuning_row in tuning_rows)
    try:
        index = choose_setting(label, seed, num_settings, tuning_rows)
    except MethodError as error:
        return [str(error)]
    problems = []
    (chosen,) = select(tuning_rows, setting_index=index)
    if row["settings"] != chosen["settings"]:
        problems.append(
            f"reported with {row['settings']}, but the rows of tuning choose "
            f"{chosen['settings']}"
        )
    stated = row.get("tuning_cost", 0.0)
    cost = tuning_fields(label, seed, tuning_rows, 0.0).get("tuning_cost", 0.0)
    if not math.isclose(stated, cost, rel_tol=1e-9):
        problems.append(
            f"its tuning cost {stated:g} gradient-equivalents, but the rows of tuning "
            f"cost {cost:g}"
        )
    return problems
