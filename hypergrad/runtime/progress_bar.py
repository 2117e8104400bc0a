"""Progress bars: live in a terminal or a notebook, otherwise about ten lines."""

import contextlib
import html
from collections.abc import Callable, Iterator

from .compat import import_optional
from .console import printable

Update = Callable[[float, float, str], None]


@contextlib.contextmanager
def progress_bar(*, is_percentage: bool = False) -> Iterator[Update]:
    """Shows a bar on the standard error; ten lines if the output cannot change.

    The cursor stays visible, because a process that is killed could not show it again.

    Args:
      is_percentage: Whether the amount that is done is shown in percent, before the
        label. Defaults to False: as two numbers with the time left, after the label.

    Yields:
      A function ``(done, total, label)`` that updates the bar.

    Raises:
      ImportError: Rich is not installed.
    """
    import_optional("rich", "a progress bar needs rich", "display")
    from rich import progress as columns
    from rich.console import Console

    class CursorConsole(Console):
        def show_cursor(self, show: bool = True) -> bool:
            """Leaves the cursor as it is."""
            del show
            return False

    console = CursorConsole(stderr=True)
    if console.is_jupyter:
        yield notebook_bar(is_percentage=is_percentage)
        return
    # Environment variables such as FORCE_COLOR make any output a terminal for rich.
    is_live = console.is_terminal and console.file.isatty()
    if not is_live or console.is_dumb_terminal:
        show = lambda text: console.print(
            printable(text), markup=False, highlight=False, soft_wrap=True
        )
        yield tenth_printer(show, is_percentage=is_percentage)
        return
    label = lambda text: columns.TextColumn(text, markup=False)
    if is_percentage:
        layout = (
            columns.BarColumn(bar_width=20),
            columns.TaskProgressColumn(),
            label("{task.description}"),
        )
    else:
        layout = (
            label("{task.description:24}"),
            columns.BarColumn(),
            columns.MofNCompleteColumn(),
            columns.TimeElapsedColumn(),
            columns.TimeRemainingColumn(),
        )
    bar = columns.Progress(*layout, console=console)
    with bar:
        job = bar.add_task("", total=None)
        yield lambda done, total, label: bar.update(
            job, completed=done, total=total, description=printable(label)
        )


def tenth_printer(
    show: Callable[[str], object], *, is_percentage: bool = False
) -> Update:
    """Returns a function that shows a line whenever another tenth is done."""
    num_shown = 0

    def update(done: float, total: float, label: str) -> None:
        nonlocal num_shown
        tenth = int(10 * done / max(total, 1))
        if tenth > num_shown:
            num_shown = tenth
            show(_describe(done, total, label, is_percentage))

    return update


def notebook_bar(*, is_percentage: bool = False) -> Update:
    """Returns a function that changes a bar in the output of a notebook's cell.

    The bar of rich would need ipywidgets there.
    """
    from IPython.display import HTML, DisplayHandle

    handle = DisplayHandle()
    handle.display(HTML(""))

    def update(done: float, total: float, label: str) -> None:
        text = html.escape(_describe(done, total, label, is_percentage))
        bar = f'<progress value="{done:g}" max="{total:g}"></progress>'
        handle.update(HTML(f"{bar} {text}"))

    return update


def _describe(done: float, total: float, label: str, is_percentage: bool) -> str:
    amount = f"{100 * done / total:.0f}%" if is_percentage else f"{done} of {total}"
    return f"{amount}: {label}" if label else amount
