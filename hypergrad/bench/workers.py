"""Processes in which the cells of a table are measured."""

import concurrent.futures
import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any


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
            self._num_workers, mp_context=multiprocessing.get_context("spawn")
        )


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
