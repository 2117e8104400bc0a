"""The printed form of a table in Markdown."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..runtime.console import printable
from .claims import MISSING_ROWS, Finding, Published
from .columns import Column
from .methods import budget_factor_of, has_failed
from .rows import Row
from .table import BaseTable, result_rows

PUBLISHED_HEADINGS = ("paper", "tag", "measured", "difference", "reproduced")


@dataclass(frozen=True)
class TableResult:
    """The rows of a table together with the table.

    Attributes:
      name: Name of the table.
      table: The table, as its file defines it now.
      rows: All rows of its file.
    """

    name: str
    table: BaseTable
    rows: list[Row]

    @property
    def printed_rows(self) -> list[Row]:
        """The rows without those of tuning."""
        return result_rows(self.rows)

    @property
    def scale(self) -> str:
        """Scale of the rows."""
        return str(self.rows[0]["scale"])

    @property
    def deviations(self) -> list[str]:
        """Deviations of the rows from the protocol of the table, in words."""
        return self.table.deviations(self.printed_rows)

    @property
    def labels(self) -> list[str]:
        """Labels of the printed rows, in the order of the cells."""
        return list(dict.fromkeys(str(row["method"]) for row in self.printed_rows))

    @property
    def findings(self) -> list[Finding]:
        """Outcomes of the checks and claims, and the runs that were not completed."""
        return self.table.evaluate(self.rows) + self._stopped_runs()

    def _stopped_runs(self) -> list[Finding]:
        """Returns which runs of a method were not completed, and why."""
        findings = []
        for label in self.labels:
            rows = self.rows_of(label)
            stopped = [row for row in rows if isinstance(row.get("stopped"), str)]
            if stopped:
                seeds = ", ".join(str(row["seed"]) for row in stopped)
                reasons = "; ".join(dict.fromkeys(row["stopped"] for row in stopped))
                findings.append(
                    Finding(
                        f"{label}: {len(stopped)} of {len(rows)} runs were not "
                        f"completed, of seed{'s' * (len(stopped) > 1)} {seeds} "
                        f"({reasons})"
                    )
                )
        return findings

    def printed_label(self, label: str) -> str:
        """Returns a label, with a star if the method was added with ``--method``.

        A multiple of the budget is stated beside it.
        """
        rows = self.rows_of(label)
        if "method_source" not in rows[0]:
            return label
        factor = budget_factor_of(rows)
        return label + " *" + f" ({factor:g} times the budget)" * (factor != 1)

    def cell(self, column: Column, label: str) -> str:
        """Returns the printed text of a method in a column."""
        return column.text(self.rows_of(label), len(self.missing_seeds(label)))

    def missing_seeds(self, label: str) -> list[int]:
        """Returns seeds of which a method has no row, such as those whose run failed.

        Only seeds count that the table runs for this method, and of which another
        method has a row.
        """
        seeds = {row["seed"] for row in self.printed_rows}
        cells = self.table.stages(self.scale, max(seeds) + 1)[-1]
        by_label = {(cell["method"], cell["seed"]) for cell in cells}
        is_listed = any(label == listed for listed, _ in by_label)  # not one's own
        if is_listed:
            seeds &= {seed for listed, seed in by_label if listed == label}
        return sorted(seeds - {row["seed"] for row in self.rows_of(label)})

    def failed_seeds(self, label: str) -> list[int]:
        """Returns seeds without a row, or whose run ended with no finite number."""
        failed = [row["seed"] for row in self.rows_of(label) if has_failed(row)]
        return sorted([*self.missing_seeds(label), *failed])

    def finished_rows_of(self, label: str) -> list[Row]:
        """Returns the rows of a method without those of `failed_seeds`."""
        return [row for row in self.rows_of(label) if not has_failed(row)]

    def rows_of(self, label: str) -> list[Row]:
        """Returns the rows of a method, by seed."""
        rows = [row for row in self.printed_rows if row["method"] == label]
        return sorted(rows, key=lambda row: row["seed"])


def to_markdown(result: TableResult, failures: dict[str, str] | None = None) -> str:
    """Returns the table with its published numbers, findings and protocol."""
    table, row = result.table, result.printed_rows[0]
    num_seeds = len({row["seed"] for row in result.printed_rows})
    metadata = [
        f"{num_seeds} seed{'s' * (num_seeds != 1)}"
        + ", mean ± standard deviation" * (table.body is None and num_seeds > 1),
        f"scale `{result.scale}`",
        f"command {_distinct(result.printed_rows, 'command')}",
        f"commit {_distinct(result.printed_rows, 'commit', 'converted_from')}",
        f"device {row['device']}",
    ]
    metadata = [text for text in (table.data, table.source) if text] + metadata
    lines = [f"# {result.name}", "", ". ".join(metadata) + ".", ""]
    if result.deviations:
        text = "; ".join(result.deviations)
        lines += [f"**Not the protocol of the table**: {text}.", ""]
    if table.body is None:
        lines += markdown_table(*main_table(result))
        if any("method_source" in row for row in result.printed_rows):
            lines += ["", "A star marks a method that was added with `--method`."]
    else:
        lines += _body_lines(table.body, result.printed_rows)
    if table.published:
        lines += ["", "## Published numbers", ""]
        lines += markdown_table(*published_table(result))
    lines.append("")
    lines += [finding.markdown for finding in result.findings]
    lines += _legend(result)
    for stage in dict.fromkeys(row.get("stage") for row in result.rows):
        if not stage:
            continue
        stage_rows = [row for row in result.rows if row.get("stage") == stage]
        body = _body_lines(functools.partial(table.stage_body, stage), stage_rows)
        if body:
            lines += ["", f"## Stage: {stage}", "", *body]
    if failures:
        lines += ["", "## Rows that failed", ""]
        lines += [f"- {label}: {message}" for label, message in failures.items()]
    if table.protocol:
        lines += ["", "## Protocol", "", table.protocol]
    return printable("\n".join(lines) + "\n")


def _body_lines(body: Callable[[list[Row]], list[str]], rows: list[Row]) -> list[str]:
    """Returns what a table prints of its rows, or that some of them are missing."""
    try:
        return body(rows)
    except MISSING_ROWS as error:
        return [f"These rows are not printed: others are missing ({error!r})."]


def _legend(result: TableResult) -> list[str]:
    """Returns what the intervals below a table and its column of trust mean."""
    table, sentences = result.table, []
    is_added = any("method_source" in row for row in result.printed_rows)
    if table.claims or table.comparisons or is_added:
        sentences.append(
            "Intervals of claims and of comparisons are corrected for their number by "
            "Holm's method."
        )
        if table.resplits is not None:
            sentences.append(
                "The seeds are re-splits of one data set, for which the intervals are "
                "wider (Nadeau and Bengio 2003)."
            )
    if table.body is None and "untrusted" in main_table(result)[0]:
        sentences.append(
            "`untrusted` counts the steps whose hypergradient was not trusted: all "
            "steps of a method whose estimates have no check, such as a single loop."
        )
    return ["", " ".join(sentences)] if sentences else []


def _distinct(rows: Sequence[Row], *names: str) -> str:
    """Returns the different values of a field, or of the next one where it is empty."""
    values = (next((row[x] for x in names if row.get(x)), "unknown") for row in rows)
    return " and ".join(f"`{value}`" for value in dict.fromkeys(values))


def main_table(result: TableResult) -> tuple[list[str], list[list[str]]]:
    """Returns headings and cells of the table of methods.

    A method that was added with ``--method`` is marked with a star.
    """
    has_values = lambda column: any(
        row.get(column.name) is not None for row in result.printed_rows
    )
    columns = [x for x in result.table.printed_columns if has_values(x)]
    cells = []
    for label in result.labels:
        row = [result.cell(column, label) for column in columns]
        cells.append([result.printed_label(label), *row])
    return ["method", *(column.heading for column in columns)], cells


def published_table(result: TableResult) -> tuple[list[str], list[list[str]]]:
    """Returns headings and cells of the published numbers beside the measured ones."""
    columns = {column.name: column for column in result.table.printed_columns}
    cells = []
    for (label, name), number in result.table.published.items():
        column = columns[name]
        values = np.array([])
        if any(name in row for row in result.rows_of(label)):
            finished = [row for row in result.finished_rows_of(label) if name in row]
            # A seed without a row counts as one that did not stay finite.
            missing = np.full(len(result.failed_seeds(label)), np.nan)
            values = np.concatenate([column.values(finished), missing])
        cells.append(
            [
                f"{label}, {column.heading}",
                *_compare(number, values, column.form, result),
            ]
        )
    return ["number", *PUBLISHED_HEADINGS], cells


def _compare(
    number: Published, values: np.ndarray, form: str, result: TableResult
) -> list[str]:
    """Returns the cells of a number of a paper beside the ``[seeds]`` values of ours.

    Values are NaN for seeds whose run failed or did not stay finite, and nothing is
    reproduced by the others alone. Nothing is judged of another number of seeds than
    that of the table or of another budget.
    """
    paper = format(number.value, form)
    if number.deviation is not None:
        paper += f" ± {format(number.deviation, form)}"
    if not values.size:
        return [paper, number.tag, "not run", "-", "-"]
    # The scale is compared with that of the number.
    deviations = result.table.deviations(result.printed_rows, result.scale)
    judge_value = lambda mean: (
        None if deviations else number.is_reproduced(mean, result.scale)
    )
    finite = values[np.isfinite(values)]
    if not finite.size:
        can_be_judged = judge_value(number.value) is not None
        verdict = "no" if can_be_judged else "not judged"
        return [paper, number.tag, "not finite", "-", verdict]
    mean = float(np.mean(finite))
    measured = format(mean, form)
    if finite.size > 1:
        measured += f" ± {format(np.std(finite, ddof=1), form)}"
    is_reproduced = judge_value(mean)
    if finite.size < values.size:
        measured += f" ({finite.size} of {values.size} seeds)"
        is_reproduced = None if is_reproduced is None else False
    difference = format(mean - number.value, "+.3g")
    if is_reproduced is None:
        return [paper, number.tag, measured, difference, "not judged"]
    verdict = "yes" if is_reproduced else "no"
    tolerance = format(number.max_difference, ".2g")
    verdict += f" (within {tolerance})"
    return [paper, number.tag, measured, difference, verdict]


def markdown_table(
    headings: Sequence[str], cells: Iterable[Sequence[str]]
) -> list[str]:
    """Returns the lines of a Markdown table."""
    to_line = lambda row: "| " + " | ".join(x.replace("|", r"\|") for x in row) + " |"
    return [to_line(headings), "|" + "---|" * len(headings), *map(to_line, cells)]
