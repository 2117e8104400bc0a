"""A progress bar on the standard error; rich is imported when a bar is shown."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator

Tick = Callable[[str], None]


@contextlib.contextmanager
def progress(total: int) -> Iterator[Tick]:
    """Shows a bar and yields a function that advances it: ``tick("Neumann")``.

    Ten lines are printed instead if the output is not a terminal.

    Args:
      total: Number of ticks.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        yield line_ticker(total, functools.partial(console.print, markup=False))
        return
    bar = Progress(
        TextColumn("{task.description:16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    with bar:
        job = bar.add_task("compiling", total=total)
        yield lambda label: bar.update(job, advance=1, description=label)


def line_ticker(total: int, show: Callable[[str], None]) -> Tick:
    """Returns a function that shows a line at each tenth of ``total`` ticks."""
    count = itertools.count(1)

    def tick(label: str) -> None:
        num_done = next(count)
        if 10 * num_done // total > 10 * (num_done - 1) // total:
            show(f"{num_done} of {total}: {label}")

    return tick
