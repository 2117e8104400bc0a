"""A progress bar on the standard error; rich is imported when one is shown."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator

Tick = Callable[[str], None]


@contextlib.contextmanager
def progress(total: int) -> Iterator[Tick]:
    """A bar over ``total`` ticks; each says what was done: ``tick("Neumann")``.

    Where no terminal shows it, as in a log, ten lines.
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
        yield lines(total, functools.partial(console.print, markup=False))
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
        yield lambda what: bar.update(job, advance=1, description=what)


def lines(total: int, show: Callable[[str], None]) -> Tick:
    """Shows one at each tenth of ``total`` ticks."""
    count = itertools.count(1)

    def tick(what: str) -> None:
        done = next(count)
        if 10 * done // total > 10 * (done - 1) // total:
            show(f"{done} of {total}: {what}")

    return tick
