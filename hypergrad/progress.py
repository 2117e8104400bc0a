"""The progress of a run or of a search: a call of the user's function, or a bar."""

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from .display.tables import format_numbers
from .runtime.progress_bar import progress_bar

#: ``(num_done, value)``, or True for a bar; False and None stand for neither.
Progress = Callable[[int, Any], None] | bool

MAX_SECONDS_LEFT = 365 * 24 * 3600.0  # beyond which no time left is shown


class ProgressUpdate(NamedTuple):
    """The state of a run or of a search, as of now.

    Attributes:
      num_done: Number of steps, trials or rounds so far.
      value: The last or the best value: a float, or an array ``[K]``.
      fraction: Fraction of the run that is done.
      count_trusted: Function that returns the numbers of trusted and of all recorded
        estimates, or None if there are none.
    """

    num_done: int
    value: Any
    fraction: float
    count_trusted: Callable[[], tuple[int, int]] | None = None


ShowProgress = Callable[[ProgressUpdate], None]


def check_progress(progress: Any) -> None:
    """Raises TypeError unless ``progress`` is None, a bool or a function."""
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise TypeError(
            f"progress must be True or a function; got {type(progress).__name__}."
        )


@contextlib.contextmanager
def open_progress(
    progress: Progress | None, unit: str, value_name: str = "value"
) -> Iterator[ShowProgress | None]:
    """Yields the function that reports updates, or None if nothing is reported.

    Of several processes the first one shows the bar.

    Args:
      progress: The user's function, or True for a bar.
      unit: Noun of what is counted, such as "step".
      value_name: Name of the value.

    Raises:
      ImportError: A bar is to be shown and rich is not installed.
    """
    if progress is None or progress is False:
        yield None
    elif progress is not True:
        yield lambda update: progress(update.num_done, update.value)
    else:
        estimate_remaining = make_timer()
        # The other processes count as well, since counting may gather arrays of all.
        is_quiet = jax.process_index() > 0
        no_bar = contextlib.nullcontext(lambda done, total, label: None)
        bar = no_bar if is_quiet else progress_bar(is_percentage=True)
        with bar as update_bar:

            def show_progress(update: ProgressUpdate) -> None:
                text = f"{unit} {update.num_done}, "
                text += f"{value_name} {format_numbers(update.value)}"
                if update.count_trusted is not None:
                    text += ", trusted {} of {}".format(*update.count_trusted())
                # The cost of a trial, and so the fraction, may be NaN.
                fraction = min(update.fraction, 1.0) if update.fraction > 0 else 0.0
                if (seconds := estimate_remaining(fraction)) is not None:
                    text += f", {datetime.timedelta(seconds=round(seconds))} left"
                update_bar(100 * fraction, 100, text)

            yield show_progress


def make_timer(
    clock: Callable[[], float] = time.monotonic,
) -> Callable[[float], float | None]:
    """Returns a function that estimates the seconds left from the fraction done.

    The time before the first call, in which programs are compiled, does not count. The
    function returns None as long as it cannot estimate, or if more than a year is left,
    for example for a budget that is never reached.

    >>> seconds = iter([100.0, 103.0])
    >>> estimate_remaining = make_timer(lambda: next(seconds))
    >>> estimate_remaining(0.1), estimate_remaining(0.4)
    (None, 6.0)
    """
    init_call: tuple[float, float] | None = None

    def estimate_remaining(fraction: float) -> float | None:
        nonlocal init_call
        now = clock()
        if init_call is None:
            init_call = now, fraction
        init_time, init_fraction = init_call
        if not (fraction > init_fraction and now > init_time):
            return None
        seconds = (1 - fraction) * (now - init_time) / (fraction - init_fraction)
        return seconds if seconds < MAX_SECONDS_LEFT else None

    return estimate_remaining
