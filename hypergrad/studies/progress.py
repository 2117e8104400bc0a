"""A progress bar on the standard error; rich is imported when one is shown."""

import contextlib
from collections.abc import Callable, Iterator

Tick = Callable[[str], None]


@contextlib.contextmanager
def progress(total: int) -> Iterator[Tick]:
    """A bar over ``total`` ticks; each says what was done: ``tick("Neumann")``."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    bar = Progress(
        TextColumn("{task.description:16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
    with bar:
        job = bar.add_task("compiling", total=total)
        yield lambda what: bar.update(job, advance=1, description=what)
