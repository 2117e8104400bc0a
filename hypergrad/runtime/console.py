"""What the commands print: tables, lines, and errors in a line of words."""

import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def print_markdown(text: str, console: "Console") -> None:
    """A study's Markdown: its table drawn, and other lines as they are, wrapped."""
    from rich.text import Text

    is_row = lambda line: line.startswith("|")
    for drawn, lines in itertools.groupby(text.splitlines(), is_row):
        if drawn:
            head, _, *rows = ([c.strip() for c in x[1:-1].split("|")] for x in lines)
            print_table(head, rows, console)
        else:
            for line in lines:
                console.print(Text(line))


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], console: "Console"
) -> None:
    """A table in which no word and no name of a row is broken, if it is too wide."""
    from rich.table import Table
    from rich.text import Text

    rows, table, least = list(rows), Table(), 1
    for i, column in enumerate(columns):
        cells = [column, *(row[i] for row in rows)]
        width = max(map(len, cells if i == 0 else " ".join(cells).split()))
        table.add_column(Text(column), min_width=width)
        least += width + 3  # with a blank on either side and the border
    for row in rows:
        table.add_row(*map(Text, row))
    if least > console.width:
        table.width = least
    console.print(table, crop=False)


@contextlib.contextmanager
def exit_with_message() -> Iterator[None]:
    """What is wrong with the input is said in a line, not in a traceback."""
    try:
        yield
    except ValueError as error:
        sys.exit(f"hypergrad: {error}")
    except OSError as error:  # a full disk, a read-only folder
        sys.exit(
            f"hypergrad: {error}; what was written is kept, and the same command goes "
            "on from there"
        )
