"""Output of the commands: Markdown, tables, and errors as one line."""

import contextlib
import itertools
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


#: Control characters except newline and tab, and those that change the direction of
#: text. A terminal obeys them: they move its cursor, set its title or hide text.
CONTROL_CHARACTER = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def printable(text: object) -> str:
    r"""Returns a text in which control characters are written as escape sequences.

    Text that comes from files may contain such characters; see `CONTROL_CHARACTER`.

    >>> printable("a red \x1b[31mword")
    'a red \\x1b[31mword'
    """
    escape = lambda match: match[0].encode("unicode_escape").decode()
    return CONTROL_CHARACTER.sub(escape, str(text))


def print_line(text: object, file: IO[str] | None = None) -> None:
    """Prints a line without control characters, by default to the standard output."""
    print(printable(text), file=file)


def escape_warnings() -> None:
    """Escapes control characters in all warnings of this process."""
    format_warning = warnings.formatwarning

    def format_printable(*args, **options) -> str:
        return printable(format_warning(*args, **options))

    warnings.formatwarning = format_printable


def print_markdown(text: str, console: "Console") -> None:
    """Prints Markdown: tables are drawn, all other lines are printed unchanged."""
    from rich.text import Text

    starts_with_bar = lambda line: line.startswith("|")
    all_lines = printable(text).splitlines()
    for has_bar, group in itertools.groupby(all_lines, starts_with_bar):
        lines = list(group)
        if not (has_bar and len(lines) > 1 and set(lines[1]) <= set("|-: ")):
            for line in lines:
                console.print(Text(line))
            continue
        columns, _, *rows = map(split_cells, lines)
        print_table(columns, rows, console)


def split_cells(line: str) -> list[str]:
    r"""Returns the cells of a line of a table in Markdown.

    >>> split_cells(r"| p(y\|x) | 0.5 |")
    ['p(y|x)', '0.5']
    """
    cells = re.split(r"(?<!\\)\|", line.strip()[1:-1])
    return [cell.strip().replace(r"\|", "|") for cell in cells]


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], console: "Console"
) -> None:
    """Prints a table without breaking a word, or a name in the first column.

    The table becomes wider than the console if it would not fit otherwise.
    """
    from rich.table import Table
    from rich.text import Text

    rows = [list(map(printable, row)) for row in rows]
    table, min_width = Table(), 1
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


def print_entries(
    columns: Sequence[str], rows: Iterable[Sequence[str]], console: "Console"
) -> None:
    """Prints each row as its first cell and a line per column, for a narrow console."""
    from rich.padding import Padding
    from rich.text import Text

    for name, *cells in (list(map(printable, row)) for row in rows):
        console.print(Text(name, style="bold"))
        for column, cell in zip(columns[1:], cells, strict=True):
            if cell:
                console.print(Padding(Text(f"{column}: {cell}"), (0, 0, 0, 2)))
        console.print()


def exit_with_errors(errors: Mapping[str, str]) -> None:
    """Prints errors by the names of what failed, and exits with 1 if there are any."""
    for name, message in errors.items():
        print_line(f"hypergrad: {name} failed: {message}", file=sys.stderr)
    if errors:
        sys.exit(1)


@contextlib.contextmanager
def exit_quietly() -> Iterator[None]:
    """Exits without a traceback after Ctrl-C, and if the reader of a pipe is gone.

    The statuses are 130 and, as of a command that SIGPIPE ends, 141; rich itself ends
    a command with 1 if it prints to a closed pipe.
    """
    try:
        try:
            yield
        finally:  # a command may end by SystemExit
            sys.stdout.flush()
    except KeyboardInterrupt:
        print_line("hypergrad: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # as of `hypergrad ... | head`
        # What the interpreter still writes as it exits must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


@contextlib.contextmanager
def exit_with_message() -> Iterator[None]:
    """Exits with one line instead of a traceback if the input is invalid."""
    try:
        yield
    except ValueError as error:
        sys.exit(printable(f"hypergrad: {error}"))
    except BrokenPipeError:
        raise  # `exit_quietly` handles it
    except OSError as error:  # such as a full disk or a read-only folder
        message = (
            f"hypergrad: {error}. Completed results are kept; the same command "
            "continues from them."
        )
        sys.exit(printable(message))
