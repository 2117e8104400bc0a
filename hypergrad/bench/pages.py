"""Tables as pages of HTML: one of a table, and two of all tables."""

import base64
import datetime
import html
import itertools
import urllib.parse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..runtime.console import split_cells
from .columns import Column
from .report import TableResult

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
    "Means over the seeds, best first; a seed that failed or is not finite makes a "
    "method last. Rows differ in what they use (right labels, validation data in "
    "training) and in cost; the page of a table has its protocol and the outcomes of "
    "its claims."
)
LEADERBOARD_COSTS = ("gradient_equivalents", "tuning_cost")


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


def _ranking(
    result: TableResult, task: str, labels: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Returns headings and rows of the methods of a task, best first.

    A method with a seed that failed or is not finite is last, and one without any value
    is left out.
    """
    columns = {column.name: column for column in result.table.printed_columns}
    name = result.table.ranked_by.removeprefix("-")
    ranked_by = columns.get(name, Column(name))
    sign = 1 if result.table.ranked_by.startswith("-") else -1
    rows = {label: result.finished_rows_of(label) for label in labels}
    rank_text = lambda label: ranked_by.text(
        rows[label], len(result.failed_seeds(label))
    )
    means = {
        label: np.nan
        if result.failed_seeds(label)
        else np.mean(ranked_by.values(rows[label]))
        for label in labels
    }
    best_first = sorted(
        (label for label in labels if rank_text(label) != "-"),
        key=lambda x: (np.isnan(means[x]), sign * np.nan_to_num(means[x])),
    )
    costs = [columns[name] for name in LEADERBOARD_COSTS]
    cells = [
        [
            result.printed_label(label).removeprefix(f"{task}, "),
            rank_text(label),
            *(result.cell(column, label) for column in costs),
        ]
        for label in best_first
    ]
    return ["method", *(column.heading for column in (ranked_by, *costs))], cells


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
            head, _, *rows = map(split_cells, lines)
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
