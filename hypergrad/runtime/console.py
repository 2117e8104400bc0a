"""Output of the commands: Markdown, tables, and errors as one line."""

import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def print_markdown(text: str, console: "Console") -> None:
    """Prints Markdown: tables are drawn, all other lines are printed unchanged."""
    from rich.text import Text

    is_table_row = lambda line: line.startswith("|")
    for is_table, lines in itertools.groupby(text.splitlines(), is_table_row):
        if not is_table:
            for line in lines:
                console.print(Text(line))
            continue
        split = lambda line: [cell.strip() for cell in line[1:-1].split("|")]
        columns, _, *rows = map(split, lines)
        print_table(columns, rows, console)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], console: "Console"
) -> None:
    """Prints a table without breaking a word, or a name in the first column.

    The table becomes wider than the console if it would not fit otherwise.
    """
    from rich.table import Table
    from rich.text import Text

    rows, table, min_width = list(rows), Table(), 1
    for i, column in enumerate(columns):
        cells = [column, *(row[i] for row in rows)]
        width = max(map(len, cells if i == 0 else " ".join(cells).split()))
        table.add_column(Text(column), min_width=width)
        min_width += width + 3  # a blank on both sides and the border
    for row in rows:
        table.add_row(*map(Text, row))
    if min_width > console.width:
        table.width = min_width
    console.print(table, crop=False)


@contextlib.contextmanager
def exit_with_message() -> Iterator[None]:
    """Exits with one line instead of a traceback if the input is invalid."""
    try:
        yield
    except ValueError as error:
        sys.exit(f"hypergrad: {error}")
    except OSError as error:  # such as a full disk or a read-only folder
        sys.exit(
            f"hypergrad: {error}. Completed results are kept; the same command "
            "continues from them."
        )
