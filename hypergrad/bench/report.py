"""The printed form of a table: Markdown, a page of HTML, and a page of all tables."""

import base64
import datetime
import html
import itertools
import urllib.parse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..runtime.console import printable
from .claims import Finding, Published
from .rows import Row
from .table import BaseTable, Column, result_rows

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto;
       padding: 0 1rem; color: #1b1f24; background: #fff;
       overflow-wrap: break-word; }
dd { overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #d0d7de; text-align: right;
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 2px solid #57606a; }
img { max-width: 100%; }
pre { white-space: pre-wrap; background: #f6f8fa; padding: 1rem; border-radius: 6px; }
code { font-size: .9em; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr));
         gap: 1.2rem; padding: 0; list-style: none; }
.cards li { border: 1px solid #d0d7de; border-radius: 8px; padding: 1rem; }
.cards img { width: 100%; height: 11rem; object-fit: contain; }
.bad { color: #b42318; font-weight: 600; }
"""
LEADERBOARD = (
    "Means over the seeds, best first; a seed that is not finite makes a method last. "
    "Rows differ in what they use (right labels, validation data in training) and in "
    "cost; the page of a table has its protocol and the outcomes of its claims."
)
LEADERBOARD_COSTS = ("gradient_equivalents", "tuning_cost")
PUBLISHED_HEADINGS = ("paper", "tag", "measured", "difference", "reproduced")


@dataclass(frozen=True)
class TableResult:
    """The rows of a table together with the table.

    Attributes:
      name: Name of the table.
      table: The table, or None if its file is not at hand.
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
            stopped = [row for row in rows if "stopped" in row]
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
    if table.body is None:
        lines += _markdown_table(*main_table(result))
        if any("method_source" in row for row in result.printed_rows):
            lines += ["", "A star marks a method that was added with `--method`."]
    else:
        lines += table.body(result.printed_rows)
    if table.published:
        lines += ["", "## Published numbers", ""]
        lines += _markdown_table(*published_table(result))
    lines.append("")
    lines += [finding.markdown for finding in result.findings]
    lines += _legend(result)
    for stage in dict.fromkeys(row.get("stage") for row in result.rows):
        stage_rows = [row for row in result.rows if row.get("stage") == stage]
        if stage and (body := table.stage_body(stage, stage_rows)):
            lines += ["", f"## Stage: {stage}", "", *body]
    if failures:
        lines += ["", "## Rows that failed", ""]
        lines += [f"- {label}: {message}" for label, message in failures.items()]
    if table.protocol:
        lines += ["", "## Protocol", "", table.protocol]
    return printable("\n".join(lines) + "\n")


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
        rows = result.rows_of(label)
        name = label + _star(rows)
        cells.append([name, *(column.text(rows) for column in columns)])
    return ["method", *(column.heading for column in columns)], cells


def published_table(result: TableResult) -> tuple[list[str], list[list[str]]]:
    """Returns headings and cells of the published numbers beside the measured ones."""
    columns = {column.name: column for column in result.table.printed_columns}
    cells = []
    for (label, name), number in result.table.published.items():
        column = columns[name]
        rows = [row for row in result.rows_of(label) if name in row]
        values = column.values(rows) if rows else np.array([])
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

    Values are NaN for seeds whose run did not stay finite, and nothing is reproduced
    by the others alone.
    """
    paper = format(number.value, form)
    if number.deviation is not None:
        paper += f" ± {format(number.deviation, form)}"
    if not values.size:
        return [paper, number.tag, "not run", "-", "-"]
    finite = values[np.isfinite(values)]
    if not finite.size:
        can_be_judged = number.is_reproduced(number.value, result.scale) is not None
        verdict = "no" if can_be_judged else "not judged"
        return [paper, number.tag, "not finite", "-", verdict]
    mean = float(np.mean(finite))
    measured = format(mean, form)
    if finite.size > 1:
        measured += f" ± {format(np.std(finite, ddof=1), form)}"
    is_reproduced = number.is_reproduced(mean, result.scale)
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


def _markdown_table(
    headings: Sequence[str], cells: Iterable[Sequence[str]]
) -> list[str]:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return lines + ["| " + " | ".join(row) + " |" for row in cells]


# HTML.


def to_html(result: TableResult, figure: bytes | None, markdown: str) -> str:
    """Returns a page that needs no other file: table, findings, figure, provenance."""
    row = result.printed_rows[0]
    metadata = {
        name: row.get(name)
        for name in ("commit", "device", "scale", "budget", "data", "command")
        if row.get(name) not in (None, "")
    }
    versions = ", ".join(f"{k} {v}" for k, v in row.get("versions", {}).items())
    items = [f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in metadata.items()]
    image = "" if figure is None else _image(figure, f"Figure of {result.name}")
    return _page(
        result.name,
        f"{markdown_to_html(markdown)}\n{image}\n<h2>Provenance</h2>"
        f"<dl>{''.join(items)}<dt>versions</dt><dd>{_text(versions)}</dd></dl>",
    )


def to_error_page(name: str, text: str) -> str:
    """Returns the page of a table whose rows cannot be shown."""
    body = f"<h1>{_text(name)}</h1><p class='bad'>{html.escape(text)}</p>"
    return _page(name, body)


def to_index(entries: Sequence["IndexEntry"]) -> str:
    """Returns a page of all tables with picture, status and age."""
    cards = "".join(entry.card() for entry in entries)
    link = "<p><a href='leaderboard.html'>The best methods of each task</a></p>"
    return _page("Results", f"<h1>Results</h1>{link}<ul class='cards'>{cards}</ul>")


def to_leaderboard(results: Sequence[TableResult]) -> str:
    """Returns a page with the methods of each task, best first, and their costs.

    The tables are those with `BaseTable.ranked_by`. A table whose labels are "task,
    method" has a list for each task.
    """
    parts = ["<h1>The best methods of each task</h1>"]
    parts.append(f"<p>{_text(LEADERBOARD)}</p>")
    for result in sorted(results, key=lambda result: result.name):
        if not result.table.ranked_by:
            continue
        parts.append(
            f"<h2><a href='{_href(result.name)}'>{_text(result.name)}</a></h2>"
        )
        for task, labels in _labels_by_task(result.labels).items():
            parts.append(f"<h3>{_text(task)}</h3>" if task else "")
            parts.append(_html_table(*_ranking(result, task, labels)))
    return _page("Leaderboard", "".join(parts))


def _labels_by_task(labels: Sequence[str]) -> dict[str, list[str]]:
    """Groups labels by what stands before the first comma, if all have one."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        task = label.split(", ")[0] if all(", " in x for x in labels) else ""
        groups.setdefault(task, []).append(label)
    return groups


def _star(rows: Sequence[Row]) -> str:
    """Returns the mark of a method that was added with ``--method``, or nothing."""
    return " *" if rows and "method_source" in rows[0] else ""


def _ranking(
    result: TableResult, task: str, labels: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Returns headings and rows of the methods of a task, best first.

    A method with a seed that is not finite is last, and one without any value is left
    out.
    """
    columns = {column.name: column for column in result.table.printed_columns}
    name = result.table.ranked_by.removeprefix("-")
    ranked_by = columns.get(name, Column(name))
    sign = 1 if result.table.ranked_by.startswith("-") else -1
    rows = {label: result.rows_of(label) for label in labels}
    means = {label: np.mean(ranked_by.values(rows[label])) for label in labels}
    best_first = sorted(
        (label for label in labels if ranked_by.text(rows[label]) != "-"),
        key=lambda x: (np.isnan(means[x]), sign * np.nan_to_num(means[x])),
    )
    printed = [ranked_by, *(columns[name] for name in LEADERBOARD_COSTS)]
    cells = [
        [
            label.removeprefix(f"{task}, ") + _star(rows[label]),
            *(x.text(rows[label]) for x in printed),
        ]
        for label in best_first
    ]
    return ["method", *(column.heading for column in printed)], cells


@dataclass(frozen=True)
class IndexEntry:
    """A table on the page of all tables.

    Attributes:
      name: Name of the table and of its page.
      status: Outcome of ``hypergrad check``.
      summary, paradigm: What the table is about.
      commit, time: When its rows were made.
      figure: The picture as PNG, if there is one.
    """

    name: str
    status: str
    summary: str = ""
    paradigm: str = ""
    commit: str = "unknown"
    time: str = ""
    figure: bytes | None = None

    def card(self) -> str:
        """Returns the entry as an item of the page."""
        image = "" if self.figure is None else _image(self.figure, self.name)
        status = _text(self.status)
        if "FAILED" in self.status:
            status = f"<span class='bad'>{status}</span>"
        commits = [x[:12] + "+" * x.endswith("+") for x in self.commit.split(" and ")]
        commit = f"commit {' and '.join(commits)}"
        origin = (self.paradigm, commit, _age(self.time))
        origin = ", ".join(map(_text, filter(None, origin)))
        return (
            f"<li><a href='{_href(self.name)}'>{image}"
            f"<h2>{_text(self.name)}</h2></a><p>{_text(self.summary)}</p>"
            f"<p>{status}<br>{origin}</p></li>"
        )


def _href(name: str) -> str:
    """Returns the address of the page of a table."""
    return html.escape(f"{urllib.parse.quote(name)}.html", quote=True)


def _age(time: str) -> str:
    try:
        created = datetime.datetime.fromisoformat(time)
    except ValueError:
        return "date unknown"
    return created.date().isoformat()


def markdown_to_html(text: str) -> str:
    """Returns the HTML of the Markdown that `to_markdown` writes."""
    blocks, protocol = [], ""
    if "\n## Protocol\n" in text:
        text, protocol = text.split("\n## Protocol\n", 1)
    kind = lambda line: (
        line[:1] if line[:1] in ("|", "-", "#") else ("" if line else " ")
    )
    for kind_of_line, lines in itertools.groupby(text.splitlines(), kind):
        if kind_of_line == "|":
            head, _, *rows = ([c.strip() for c in x[1:-1].split("|")] for x in lines)
            blocks.append(_html_table(head, rows))
        elif kind_of_line == "-":
            blocks.append("<ul>" + "".join(f"<li>{_text(x[2:])}</li>" for x in lines))
            blocks.append("</ul>")
        elif kind_of_line == "#":
            for line in lines:
                level = len(line) - len(line.lstrip("#"))
                blocks.append(f"<h{level}>{_text(line.lstrip('# '))}</h{level}>")
        elif kind_of_line == "":
            blocks.append("<p>" + " ".join(map(_text, lines)) + "</p>")
    if protocol:
        blocks.append(f"<h2>Protocol</h2><pre>{html.escape(protocol.strip())}</pre>")
    return "\n".join(blocks)


def _html_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    row = lambda tag, cells: "".join(f"<{tag}>{_text(c)}</{tag}>" for c in cells)
    body = "".join(f"<tr>{row('td', cells)}</tr>" for cells in rows)
    return (
        f"<div class='wide'><table><thead><tr>{row('th', head)}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _text(value: object) -> str:
    """Returns a value as HTML; text between backticks becomes code, ** becomes bold."""
    parts = html.escape(str(value)).split("`")
    text = "".join(f"<code>{x}</code>" if i % 2 else x for i, x in enumerate(parts))
    bold = text.split("**")
    return "".join(f"<b>{x}</b>" if i % 2 else x for i, x in enumerate(bold))


def _image(figure: bytes, label: str) -> str:
    data = base64.b64encode(figure).decode()
    label = html.escape(label, quote=True)
    return f"<img alt='{label}' src='data:image/png;base64,{data}'>"


def _page(title: str, body: str) -> str:
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>\n"
        f"{body}</body></html>\n"
    )
