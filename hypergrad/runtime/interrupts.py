"""Ctrl-C that waits until a block of work is done and saved."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether Ctrl-C was pressed.

    The first Ctrl-C only sets what this function returns, so that nothing is
    interrupted in between; a second one raises KeyboardInterrupt at once. If the caller
    does not raise it, the end of the block does. Outside of the main thread, and where
    a program handles Ctrl-C in its own way, nothing changes and the function returns
    False.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    if not is_main_thread or handler is not signal.default_int_handler:
        yield lambda: False
        return
    was_pressed = False

    def remember(signum, frame):
        nonlocal was_pressed
        was_pressed = True
        signal.signal(signal.SIGINT, handler)

    signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: was_pressed
    finally:
        signal.signal(signal.SIGINT, handler)
    if was_pressed:
        raise KeyboardInterrupt
