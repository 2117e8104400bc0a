"""Runs of the outer loop in compiled blocks of steps.

Between blocks the host reports progress, saves checkpoints and checks limits. How a run
is cut into blocks changes no bit of its result.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..checkpoint import (
    CheckpointFolder,
    Checkpoints,
    open_checkpoints,
)
from ..number_checks import positive
from ..progress import (
    Progress,
    ProgressUpdate,
    ShowProgress,
    open_progress,
)
from ..runtime.interrupts import deferred_interrupt
from ..runtime.user_warnings import warn_user
from ..trace import Trace
from ..trees import to_numpy
from ..validation import is_traced
from .block import get_block_size, run_block
from .checks import check_run_options, check_state
from .fingerprint import run_fingerprint
from .limits import Limits
from .step import NEVER, Budget, OuterState, StepRecord, jitted_alpha

if TYPE_CHECKING:
    from .loop import OuterLoop

NUM_REPORTS = 20  # calls of `progress` per run
MAX_BLANK_BYTES = 2**30  # of the rows of steps that a failed run does not make
MIN_SAVE_SECONDS = 5  # seconds of saving below which no warning is issued


def run_steps(
    loop: "OuterLoop",
    state: OuterState,
    *,
    num_steps: int | None,
    budget: float | None,
    progress: Progress | None,
    checkpoints: Checkpoints | None,
    time_limit: float | None,
    memory_limit: float | None,
    record_every: int,
) -> Trace:
    """Returns the trace of a run; see `hypergrad.OuterLoop.run`."""
    check_run_options(loop, num_steps, budget, progress, checkpoints, record_every)
    budget = positive("budget", optional=True, allow_inf=True)(budget)
    progress = None if progress is False else progress
    limits = Limits(time_limit, memory_limit)
    check_state(loop, state)
    host_options = {
        "progress": progress,
        "checkpoints": checkpoints,
        "time_limit": time_limit,
        "memory_limit": memory_limit,
        "budget without num_steps": budget if num_steps is None else None,
    }
    used_options = [name for name, value in host_options.items() if value is not None]
    if is_traced(loop, state, budget):
        if used_options:
            needs_num_steps = used_options == ["budget without num_steps"]
            remedy = "Pass num_steps too" if needs_num_steps else "Leave it out there"
            raise TypeError(
                f"{used_options[0]} is handled on the host, so it cannot be used "
                f"inside jax.jit or jax.vmap. {remedy}."
            )
    elif int(state.status):
        raise ValueError(
            "state must not be the state of a failed run, whose warm starts may be "
            "lost. Start a new run from trace.alpha and trace.w."
        )
    if not is_traced(budget) and budget == math.inf:
        budget = None
    if num_steps is not None and not used_options:
        # A budget alone gives no bound on the number of blocks: the host counts them.
        return _run_without_host(loop, state, num_steps, budget, record_every)
    with contextlib.ExitStack() as stack:
        folder = None
        if checkpoints is not None:
            fingerprint = run_fingerprint(loop, state, record_every)
            folder = stack.enter_context(open_checkpoints(checkpoints, fingerprint))
        show_progress = stack.enter_context(open_progress(progress, "step"))
        run = _HostRun(
            loop, state, num_steps, budget, show_progress, folder, limits, record_every
        )
        if folder is None:
            return run.run()
        run.load(folder)
        # Several processes save together, and may not all be interrupted.
        if jax.process_count() == 1:
            run.was_interrupted = stack.enter_context(deferred_interrupt())
        return run.run()


def _run_without_host(
    loop: "OuterLoop",
    state: OuterState,
    num_steps: int,
    budget: float | None,
    record_every: int,
) -> Trace:
    """Returns the trace of a run without progress, checkpoints or limits.

    The run may be traced.

    A tracer may also be hidden in a function, such as the optimizer. Therefore values
    are read from the device only if there is a budget, and then only concrete ones.
    """
    # Inside jit every further block would be another loop in the caller's program.
    is_inside_jit = is_traced(loop, state, budget)
    num_rows = num_steps // record_every
    block_size = num_rows if is_inside_jit else get_block_size(loop, state)
    first_step, stop = state.step, state.step + num_steps
    budget_so_far, blocks = Budget.create(budget), []
    for num_started in range(0, num_rows, block_size):
        size = min(block_size, num_rows - num_started)
        state, budget_so_far, rows, num_rows_made = run_block(
            loop, state, budget_so_far, _to_array(size), stop, block_size, record_every
        )
        if budget is None or is_traced(budget_so_far):
            blocks.append((rows, size))
            continue
        blocks.append((rows, int(num_rows_made)))
        if budget_so_far.is_spent or state.status > 0:
            break
    rows = _concatenate([(rows.unpack(), size) for rows, size in blocks])
    return _make_trace(loop, state, rows, first_step, state.status, record_every)


class _HostRun:
    """A run that returns to the host to report, to save and to check limits.

    Attributes:
      loop: The loop.
      state, budget: State and budget after the steps made so far.
      num_steps: Number of steps to make; infinite if only a budget ends the run.
      num_steps_made, num_steps_saved: Numbers of steps made and saved so far.
      blocks: Their records, as pairs of rows and the number of rows that were written.
      show_progress: Function of the progress, or None.
      folder: Folder of the checkpoints, or None.
      limits: Limits of time and memory.
      record_every: Number of steps per row.
      start_time, save_seconds: When the run began, and seconds spent on checkpoints.
      has_warned: Whether a warning of frequent checkpoints was issued.
      was_interrupted: Function that returns whether Ctrl-C was pressed.
    """

    def __init__(
        self,
        loop: "OuterLoop",
        state: OuterState,
        num_steps: int | None,
        budget: float | None,
        show_progress: ShowProgress | None,
        folder: CheckpointFolder | None,
        limits: Limits,
        record_every: int,
    ):
        self.loop, self.state, self.budget = loop, state, Budget.create(budget)
        self.num_steps = math.inf if num_steps is None else num_steps
        self.first_step = state.step
        self.block_size = get_block_size(loop, state)
        stop = NEVER if num_steps is None else int(state.step) + num_steps
        self.stop = _to_array(stop)
        self.num_steps_made = self.num_steps_saved = 0
        self.blocks: list[tuple[StepRecord, int]] = []
        self.show_progress, self.folder, self.limits = show_progress, folder, limits
        self.record_every = record_every
        self.start_time, self.save_seconds = time.monotonic(), 0.0
        self.has_warned = False
        self.was_interrupted: Callable[[], bool] = lambda: False

    def load(self, folder: CheckpointFolder) -> None:
        """Continues from the newest checkpoint, if the folder contains one.

        Raises:
          ValueError: The checkpoint is of a longer run than this one.
        """
        saved = folder.load(
            lambda step: self._to_checkpoint(
                self._blank_rows(step // self.record_every)
            )
        )
        if saved is None:
            return
        self.state, budget, rows = saved
        # What was spent continues, while the limit may be larger than before.
        self.budget = dataclasses.replace(budget, limit=self.budget.limit)
        costs = rows.stats["gradient_equivalents"]
        self.num_steps_made = len(costs) * self.record_every
        self.num_steps_saved = self.num_steps_made
        self.blocks = [(rows, len(costs))]
        if self.num_steps < self.num_steps_made:
            self._refuse("num_steps", f"at least {self.num_steps_made}", folder)
        # A smaller budget may have ended the run before its last row. For the budget of
        # the saved run the sum on the device has decided, and it is rounded
        # differently.
        limit, total_cost = float(self.budget.limit), math.fsum(costs[:-1].tolist())
        if limit < float(budget.limit) and limit <= total_cost:
            self._refuse("budget", f"above {total_cost:g}", folder)

    def _refuse(self, name: str, requirement: str, folder: CheckpointFolder) -> None:
        """Raises ValueError for a run that is shorter than its checkpoints."""
        limits = {"num_steps": self.num_steps, "budget": float(self.budget.limit)}
        raise ValueError(
            f"{name} must be {requirement} to continue the checkpoints of "
            f"{folder.path}; got {limits[name]:g}. Choose another folder for a shorter "
            "run."
        )

    def run(self) -> Trace:
        """Makes the remaining steps, with pauses for the host; returns the trace."""
        limit_code, is_interrupted = 0, False
        while not (self._is_finished() or limit_code or is_interrupted):
            self._make_steps(self._steps_to_next_pause())
            limit_code = self.limits.get_exceeded()
            is_interrupted = self.was_interrupted()
            is_end = self._is_finished() or limit_code > 0 or is_interrupted
            if self.folder is not None and (
                is_end or self._is_at_interval(self.folder.every)
            ):
                self._save(self.folder)
            if (
                self.show_progress is not None
                and self.num_steps_made > 0
                and (is_end or self._is_at_interval(self._report_interval()))
            ):
                with self._saved_if_it_fails():
                    self.show_progress(self._make_update())
        if self.folder is not None and self.was_interrupted():
            raise _interruption(self.folder)
        # A limit that is exceeded at the end of a run does not count.
        is_stopped = not self._is_finished()
        status = limit_code if is_stopped else int(self.state.status)
        rows = _concatenate(self.blocks)
        # A run that a limit or a budget ends has no rows for steps that were not made.
        if not is_stopped and math.isinf(self.budget.limit):
            num_left = (int(self.num_steps) - self.num_steps_made) // self.record_every
            # Of a run until a limit of time more may be left than there is memory for.
            num_bytes = num_left * sum(x[:1].nbytes for x in jax.tree.leaves(rows))
            blank = self._blank_rows(num_left if num_bytes <= MAX_BLANK_BYTES else 0)
            rows = jax.tree.map(lambda *x: np.concatenate(x), rows, blank)
        return _make_trace(
            self.loop, self.state, rows, self.first_step, status, self.record_every
        )

    @contextlib.contextmanager
    def _saved_if_it_fails(self) -> Iterator[None]:
        """Saves the steps made so far if the user's function raises an error.

        Several processes save together, but need not all fail.
        """
        try:
            yield
        except BaseException:
            if self.folder is not None and jax.process_count() == 1:
                self._save(self.folder)
            raise

    def _save(self, folder: CheckpointFolder) -> None:
        """Saves the steps made so far, unless they are saved, as after a Ctrl-C."""
        if self.num_steps_saved == self.num_steps_made:
            return
        rows = _concatenate(self.blocks)
        # They need not be joined again.
        self.blocks = [(rows, self.num_steps_made // self.record_every)]
        start_time = time.monotonic()
        folder.save(self.num_steps_made, self._to_checkpoint(rows))
        self.num_steps_saved = self.num_steps_made
        self.save_seconds += time.monotonic() - start_time
        self._warn_of_frequent_saves(folder)

    def _warn_of_frequent_saves(self, folder: CheckpointFolder) -> None:
        """Issues a warning, once, if saving takes longer than all else."""
        seconds = time.monotonic() - self.start_time
        other_seconds = max(seconds - self.save_seconds, 1e-3)
        if self.has_warned or self.save_seconds < max(other_seconds, MIN_SAVE_SECONDS):
            return
        self.has_warned = True
        # With this interval saving takes a tenth of the time, or less.
        every = folder.every * 9 * self.save_seconds / other_seconds
        every = 10 ** math.ceil(math.log10(every))
        warn_user(
            f"{self.save_seconds:.0f} of the {seconds:.0f} seconds of this run were "
            "spent on checkpoints. Save less often, as with hg.Checkpoints(folder, "
            f"every={every})."
        )

    def _is_finished(self) -> bool:
        # On the host, because each operation on arrays would compile a program.
        is_spent = float(self.budget.total_cost) >= float(self.budget.limit)
        is_over = is_spent or int(self.state.status) > 0
        return is_over or self.num_steps_made >= self.num_steps

    def _is_at_interval(self, every: int) -> bool:
        return self.num_steps_made % self._to_whole_rows(every) == 0

    def _to_whole_rows(self, num_steps: int) -> int:
        """Returns the number of steps, rounded up to a multiple of a row's."""
        return math.ceil(num_steps / self.record_every) * self.record_every

    def _steps_to_next_pause(self) -> float:
        """Returns the number of steps until the host is needed again."""
        intervals = []
        if self.folder is not None:
            intervals.append(self.folder.every)
        if self.folder is None or self.show_progress is not None:
            intervals.append(self._report_interval())
        intervals = map(self._to_whole_rows, intervals)
        to_next_multiple = [every - self.num_steps_made % every for every in intervals]
        return min(self.num_steps - self.num_steps_made, *to_next_multiple)

    def _report_interval(self) -> int:
        """Returns a twentieth of the run in steps, rounded up.

        The length of a run that only a budget ends is estimated from the cost so far
        and rounded to a power of two, so that it seldom changes during the run.
        """
        if self.num_steps < math.inf:
            return math.ceil(self.num_steps / NUM_REPORTS)
        if self.num_steps_made == 0:
            return 1
        cost_per_step = float(self.budget.total_cost) / self.num_steps_made
        interval = float(self.budget.limit) / cost_per_step / NUM_REPORTS
        return 2 ** max(0, math.ceil(math.log2(interval)))

    def _make_steps(self, num_steps: float) -> None:
        """Makes up to ``num_steps`` steps and waits for them."""
        while num_steps > 0 and not (self._is_finished() or self.was_interrupted()):
            num_rows = int(min(num_steps // self.record_every, self.block_size))
            self.state, self.budget, rows, num_rows_made = self._run_block(num_rows)
            self.blocks.append((rows, int(num_rows_made)))
            self.num_steps_made += int(num_rows_made) * self.record_every
            num_steps -= num_rows * self.record_every

    def _run_block(self, num_rows: int) -> tuple[OuterState, Budget, StepRecord, Array]:
        state, budget, rows, num_rows_made = run_block(
            self.loop,
            self.state,
            self.budget,
            _to_array(num_rows),
            self.stop,
            self.block_size,
            self.record_every,
        )
        return state, budget, rows.unpack(), num_rows_made

    def _blank_rows(self, num_rows: int) -> StepRecord:
        """Returns the records of steps that were not made."""
        _, _, rows, _ = self._run_block(0)
        repeat = lambda x: np.repeat(to_numpy(x)[:1], num_rows, axis=0)
        return jax.tree.map(repeat, rows)

    def _make_update(self) -> ProgressUpdate:
        rows, num_rows = next(block for block in reversed(self.blocks) if block[1])
        value = to_numpy(rows.value)[num_rows - 1]
        fraction = max(
            self.num_steps_made / self.num_steps,
            float(self.budget.total_cost) / float(self.budget.limit),
        )
        value = value if value.ndim else value.item()
        return ProgressUpdate(self.num_steps_made, value, fraction, self._count_trusted)

    def _count_trusted(self) -> tuple[int, int]:
        """Returns the numbers of rows that are trusted and of all rows so far."""
        trusted = [to_numpy(rows.stats["trusted"])[:n] for rows, n in self.blocks]
        return sum(int(x.sum()) for x in trusted), sum(map(len, trusted))

    def _to_checkpoint(self, rows: StepRecord) -> tuple[OuterState, Budget, StepRecord]:
        return self.state, self.budget, rows


def _interruption(folder: CheckpointFolder) -> KeyboardInterrupt:
    """Returns the error of a Ctrl-C, which says how many steps are saved."""
    if not folder.intact_steps:
        return KeyboardInterrupt("no step could be saved")
    return KeyboardInterrupt(
        f"{folder.intact_steps[-1]} steps are saved in {folder.path}; the same call "
        "continues from there"
    )


def _to_array(number: int) -> Array:
    """Returns an integer as an array like ``state.step``, without a program for it."""
    return jnp.asarray(np.asarray(number))


def _concatenate(blocks: list[tuple[StepRecord, int]]) -> StepRecord:
    """Returns the rows of the steps in all blocks.

    Concrete rows become NumPy arrays, because JAX would compile a program for each
    number of rows.
    """
    sizes = [size for _, size in blocks]

    def concatenate(*columns):
        if is_traced(columns):
            arrays = [x[:n] for x, n in zip(columns, sizes, strict=True)]
            return jnp.concatenate(arrays)
        arrays = [to_numpy(x)[:n] for x, n in zip(columns, sizes, strict=True)]
        return np.concatenate(arrays)

    return jax.tree.map(concatenate, *(rows for rows, _ in blocks))


def _make_trace(
    loop: "OuterLoop",
    state: OuterState,
    rows: StepRecord,
    first_step: Array,
    status: Array | int,
    record_every: int,
) -> Trace:
    rows = jax.device_put(rows)
    return Trace(
        alpha=jitted_alpha(loop, state),
        w=state.w,
        best_alpha=state.best_alpha,
        value=rows.value,
        stats=rows.stats,
        metrics=rows.metrics,
        status_code=jnp.asarray(status),
        flags=rows.flags,
        alphas=rows.alpha,
        first_step=first_step,
        record_every=record_every,
        state=state,
    )
