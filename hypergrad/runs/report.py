"""A run as one page of HTML that needs nothing beside it."""

import base64
import html
import itertools
from collections.abc import Iterable
from pathlib import Path

from .manifest import Run

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; color: #1b1f24; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #d0d7de; text-align: right; }
th:first-child, td:first-child, dd { text-align: left; }
td { white-space: nowrap; }
dt { font-weight: 600; margin-top: .5rem; }
dd { margin: 0; overflow-wrap: anywhere; }
th { border-bottom: 2px solid #57606a; }
img { max-width: 100%; }
code { font-size: .9em; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
"""


def report(run: Run, path: Path) -> None:
    """Writes the page: table, verdicts and figure, and what the run was made of.

    Raises:
      ValueError: the run has no table yet, as it was interrupted.
    """
    table = run.file(".md")
    if not table.exists():
        raise ValueError(
            f"{run.path} was interrupted before its table; go on with it first: "
            f"{run.sessions[-1]['command']}"
        )
    name = html.escape(run.manifest["task"])
    picture = base64.b64encode(run.file(".png").read_bytes()).decode()
    path.write_text(
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<meta name='viewport' content='width=device-width'>"
        f"<title>{name}</title><style>{STYLE}</style></head><body>\n"
        f"{_markdown(table.read_text())}\n"
        f"<img alt='Figure of {name}' src='data:image/png;base64,{picture}'>\n"
        f"<h2>What it was made of</h2>\n{_made_of(run)}</body></html>\n"
    )


def _markdown(text: str) -> str:
    """Of the Markdown that a table is written in: headings, tables, lists, code."""
    blocks = []
    kind = lambda line: (line[:1] in "|-#" and line[:1]) or ("" if line else " ")
    for which, lines in itertools.groupby(text.splitlines(), kind):
        if which == "|":
            head, _, *rows = ([c.strip() for c in x[1:-1].split("|")] for x in lines)
            blocks.append(_table(head, rows))
        elif which == "-":
            items = "".join(f"<li>{_line(x[1:])}</li>" for x in lines)
            blocks.append(f"<ul>{items}</ul>")
        elif which == "#":
            blocks += [f"<h1>{_line(x.lstrip('# '))}</h1>" for x in lines]
        elif which == "":
            blocks.append("<p>" + "<br>".join(map(_line, lines)) + "</p>")
    return "\n".join(blocks)


def _line(text: str) -> str:
    """Every second piece between backticks is code."""
    pieces = html.escape(text.strip()).split("`")
    return "".join(f"<code>{x}</code>" if i % 2 else x for i, x in enumerate(pieces))


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    row = lambda tag, cells: "".join(f"<{tag}>{_line(c)}</{tag}>" for c in cells)
    body = "".join(f"<tr>{row('td', cells)}</tr>" for cells in rows)
    return (
        f"<div class='wide'><table><thead><tr>{row('th', head)}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _made_of(run: Run) -> str:
    """Its facts, and all packages under a fold."""
    packages = run.packages
    listed = ", ".join(f"{name} {version}" for name, version in packages.items())
    facts = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{_line(fact)}</dd>"
        for name, fact in run.facts.items()
    )
    return (
        f"<dl>{facts}</dl><details><summary>{len(packages)} packages</summary>"
        f"<p>{html.escape(listed)}</p></details>"
    )
