"""Report of a run as a self-contained HTML page."""

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


def write_report(run: Run, path: Path) -> None:
    """Writes a page with the table, the claims, the figure and the metadata of a run.

    Raises:
      ValueError: The run was interrupted before its table was written.
    """
    table = run.file(".md")
    if not table.exists():
        raise ValueError(
            f"run must be complete; got {run.path}, which was interrupted. Continue it "
            f"with: {run.sessions[-1]['command']}"
        )
    name = html.escape(run.manifest["task"])
    figure = base64.b64encode(run.file(".png").read_bytes()).decode()
    path.write_text(
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<meta name='viewport' content='width=device-width'>"
        f"<title>{name}</title><style>{STYLE}</style></head><body>\n"
        f"{_markdown_to_html(table.read_text())}\n"
        f"<img alt='Figure of {name}' src='data:image/png;base64,{figure}'>\n"
        f"<h2>Metadata</h2>\n{_metadata_to_html(run)}</body></html>\n"
    )


def _markdown_to_html(text: str) -> str:
    """Returns HTML of the Markdown of tables: headings, tables, lists and code."""
    blocks = []
    markers = "|-#"
    get_kind = lambda line: line[0] if line and line[0] in markers else bool(line)
    for kind, lines in itertools.groupby(text.splitlines(), get_kind):
        if kind == "|":
            titles, _, *rows = (
                [cell.strip() for cell in line[1:-1].split("|")] for line in lines
            )
            blocks.append(_table_to_html(titles, rows))
        elif kind == "-":
            items = "".join(f"<li>{_inline_to_html(line[1:])}</li>" for line in lines)
            blocks.append(f"<ul>{items}</ul>")
        elif kind == "#":
            blocks += [f"<h1>{_inline_to_html(x.lstrip('# '))}</h1>" for x in lines]
        elif kind:
            blocks.append("<p>" + "<br>".join(map(_inline_to_html, lines)) + "</p>")
    return "\n".join(blocks)


def _inline_to_html(text: str) -> str:
    """Returns escaped text in which the pieces between backticks are code."""
    pieces = html.escape(text.strip()).split("`")
    return "".join(f"<code>{x}</code>" if i % 2 else x for i, x in enumerate(pieces))


def _table_to_html(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    to_cells = lambda tag, cells: "".join(
        f"<{tag}>{_inline_to_html(cell)}</{tag}>" for cell in cells
    )
    body = "".join(f"<tr>{to_cells('td', row)}</tr>" for row in rows)
    return (
        f"<div class='wide'><table><thead><tr>{to_cells('th', titles)}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _metadata_to_html(run: Run) -> str:
    """Returns the metadata as a list, with the packages in a block to unfold."""
    packages = run.packages
    package_list = ", ".join(f"{name} {version}" for name, version in packages.items())
    items = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{_inline_to_html(text)}</dd>"
        for name, text in run.metadata.items()
    )
    return (
        f"<dl>{items}</dl><details><summary>{len(packages)} packages</summary>"
        f"<p>{html.escape(package_list)}</p></details>"
    )
