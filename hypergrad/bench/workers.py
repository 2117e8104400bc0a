"""Processes in which the cells of a table are measured."""

import concurrent.futures
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .rows import Cell, Row


class WorkerPool:
    """A pool of processes that is replaced once one of them has died.

    A method may end its process, as by ``os._exit`` or for want of memory. What was
    submitted before is lost; its futures raise ``BrokenExecutor``.

    Args:
      num_workers: Number of processes.
    """

    def __init__(self, num_workers: int):
        self._num_workers = num_workers
        self._other_processes = set(multiprocessing.active_children())
        self._pool = self._make_pool()

    def submit(self, fn: Callable, /, *args: Any) -> concurrent.futures.Future:
        """Returns the future of ``fn(*args)``."""
        try:
            return self._pool.submit(fn, *args)
        except concurrent.futures.BrokenExecutor:
            self.shutdown()
            self._pool = self._make_pool()
            return self._pool.submit(fn, *args)

    def shutdown(self) -> None:
        """Waits for the processes to end."""
        self._pool.shutdown()

    def abort(self) -> None:
        """Ends the processes at once, without the results of what they run."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - self._other_processes:
            process.terminate()

    def _make_pool(self) -> concurrent.futures.Executor:
        # A forked process would share the threads of JAX.
        return concurrent.futures.ProcessPoolExecutor(
            self._num_workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_exit_with_parent,
        )


def _exit_with_parent() -> None:
    """Ends this process at once when its parent ends, also if that was killed.

    Otherwise it would finish its cell, which may take an hour, for nobody.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait_and_exit() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()


@contextlib.contextmanager
def executor_of(workers: int) -> Iterator[WorkerPool | None]:
    """Yields a pool of processes, or None for one worker.

    Raises:
      ValueError: There are fewer than one worker.
    """
    if workers < 1:
        raise ValueError(f"--workers must be at least 1; got {workers}.")
    if workers == 1:
        yield None
        return
    pool = WorkerPool(workers)
    try:
        yield pool
    except BaseException:
        pool.abort()
        raise
    pool.shutdown()


def await_outcomes(
    submit: Callable[[Cell], Any],
    cells: Sequence[Cell],
    max_pending: int,
    failures: dict[str, str],
) -> Iterator[tuple[Cell, Row | str]]:
    """Yields each cell with its row fields or its error, as they are finished.

    A cell that ends its worker also interrupts the cells that wait beside it. They are
    measured once more, each alone, so that only the cell itself fails.

    Args:
      submit: Function that starts the measurement of a cell and returns its future.
      cells: The cells.
      max_pending: Number of cells that are submitted at once.
      failures: Errors of methods by label, whose further cells have this error and are
        not run. The caller may add to them.
    """
    interrupted = []
    for cell, outcome in _await_all(submit, cells, max_pending, failures):
        if isinstance(outcome, concurrent.futures.BrokenExecutor):
            interrupted.append(cell)
        else:
            yield cell, outcome
    for cell, outcome in _await_all(submit, interrupted, 1, failures):
        if isinstance(outcome, concurrent.futures.BrokenExecutor):
            outcome = _worker_message(outcome)
        yield cell, outcome


def _await_all(
    submit: Callable[[Cell], Any],
    cells: Sequence[Cell],
    max_pending: int,
    failures: dict[str, str],
) -> Iterator[tuple[Cell, Row | str | concurrent.futures.BrokenExecutor]]:
    """Yields each cell with its outcome, or with the error of a broken executor."""
    waiting, futures = list(reversed(cells)), {}
    while waiting or futures:
        while waiting and len(futures) < max_pending:
            cell = waiting.pop()
            if (message := failures.get(str(cell["method"]))) is not None:
                yield cell, message
                continue
            try:
                future = submit(cell)
            except concurrent.futures.BrokenExecutor as error:
                yield cell, error
                continue
            futures[future] = cell
        for future in _wait_for_some(list(futures)):
            yield futures.pop(future), _outcome(future)


def _wait_for_some(futures: list) -> list:
    """Returns futures that are done; waits for at least one."""
    if all(isinstance(x, concurrent.futures.Future) for x in futures):
        done, _ = concurrent.futures.wait(
            futures, return_when=concurrent.futures.FIRST_COMPLETED
        )
        return list(done)
    while not (done := [future for future in futures if future.done()]):
        time.sleep(0.05)  # futures of other libraries can only be asked
    return done


def _outcome(future: Any) -> Row | str | concurrent.futures.BrokenExecutor:
    try:
        return future.result()
    except concurrent.futures.BrokenExecutor as error:
        return error
    except (Exception, SystemExit) as error:  # the worker failed
        return _worker_message(error)


def _worker_message(error: BaseException) -> str:
    """Returns the error of a worker in words."""
    return f"{type(error).__name__} of the worker: {error}"
