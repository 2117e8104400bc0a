"""Runs the outer loop in compiled blocks; progress, checkpoints and limits between them.

How a run is cut into blocks changes no bit of it.
"""

import contextlib
import math
import time
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .checkpoint import (
    CheckpointFolder,
    Checkpoints,
    RunFingerprint,
    check_checkpoints,
    open_checkpoints,
    runtime_environment,
)
from .cost.memory import resident_bytes
from .outer_step import NEVER, OuterState, StepRecord, jitted_alpha, run_block
from .problem import full_batch, sample_batch
from .recording import Progress, check_progress
from .runtime.devices import process_max
from .runtime.fingerprint import digest, digest_program
from .trace import OUT_OF_MEMORY, OUT_OF_TIME, Trace
from .trees import to_numpy
from .validation import check_positive_int, is_traced

if TYPE_CHECKING:
    from .minimize import OuterLoop

BLOCK_SIZE = 256  # steps per compiled block
NUM_CALLS = 20  # calls of `progress` per run
UNLIMITED = 2**62  # number of steps of a run that only a budget ends


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
) -> Trace:
    """Returns the trace of a run; see `hypergrad.OuterLoop.run`."""
    if num_steps is None and budget is None:
        raise ValueError("num_steps or budget must be given.")
    check_positive_int("num_steps", num_steps, optional=True)
    _check_positive("budget", budget, "number of gradient-equivalents")
    check_progress(progress)
    check_checkpoints(checkpoints)
    _check_positive("time_limit", time_limit, "number of seconds")
    _check_positive("memory_limit", memory_limit, "number of bytes")
    if memory_limit is not None and resident_bytes() is None:
        raise ValueError(
            "memory_limit needs a system that reports the memory of a process, as "
            "Linux does in /proc/self/statm. Leave it out on this system."
        )
    on_host = {
        "progress": progress,
        "checkpoints": checkpoints,
        "time_limit": time_limit,
        "memory_limit": memory_limit,
        "budget without num_steps": budget if num_steps is None else None,
    }
    on_host = [name for name, value in on_host.items() if value is not None]
    if is_traced(loop, state):
        if on_host:
            raise TypeError(
                f"{on_host[0]} is handled on the host, so it cannot be used inside "
                "jax.jit or jax.vmap. Leave it out there."
            )
        assert num_steps is not None  # else it is in `on_host`
        return _run_traced(loop, state, num_steps, budget)
    if int(state.status):
        raise ValueError(
            "state must not be that of a failed run, whose warm starts may be lost. "
            "Start a new run from trace.alpha and trace.w."
        )
    run = _HostRun(loop, state, num_steps, budget)
    if not on_host and budget is None:
        return run.without_interruption()
    with contextlib.ExitStack() as stack:
        folder = None
        if checkpoints is not None:
            fingerprint = _fingerprint(loop, state)
            folder = stack.enter_context(open_checkpoints(checkpoints, fingerprint))
            run.load(folder)
        limits = _Limits(time_limit, memory_limit)
        every = None if checkpoints is None else checkpoints.every
        return run.in_chunks(progress, folder, every, limits)


def _run_traced(
    loop: "OuterLoop", state: OuterState, num_steps: int, budget: float | None
) -> Trace:
    """Returns the trace of a run inside ``jit`` or ``vmap``: one block of all steps."""
    stop = state.step + num_steps
    max_cost = jnp.asarray(jnp.inf if budget is None else budget, float)
    end, rows, _, _ = run_block(
        loop, state, jnp.asarray(num_steps), stop, max_cost, num_steps
    )
    return _make_trace(loop, end, rows, state.step, end.status)


class _HostRun:
    """A run outside of ``jit``, of which the records are collected on the host.

    Attributes:
      state: The state so far.
      num_made: Number of steps made in this run.
      spent: Their cost, accumulated in double precision.
    """

    def __init__(
        self,
        loop: "OuterLoop",
        state: OuterState,
        num_steps: int | None,
        budget: float | None,
    ):
        self.loop, self.state = loop, state
        self.num_steps = UNLIMITED if num_steps is None else num_steps
        self.budget = math.inf if budget is None else float(budget)
        self.first_step = int(state.step)
        self.stop = NEVER if num_steps is None else self.first_step + num_steps
        self.num_made, self.spent = 0, 0.0
        self.blocks: list[tuple[StepRecord, int]] = []

    def without_interruption(self) -> Trace:
        """Dispatches all blocks without waiting for any of them."""
        num_started = 0
        while num_started < self.num_steps:
            size = min(BLOCK_SIZE, self.num_steps - num_started)
            self.state, rows, _, _ = self._run_block(size)
            self.blocks.append((rows, size))
            num_started += size
        return self._finish(self.state.status)

    def in_chunks(
        self,
        progress: Progress | None,
        folder: CheckpointFolder | None,
        every: int | None,
        limits: "_Limits",
    ) -> Trace:
        """Runs in chunks, between which the host reports, saves and checks limits."""
        exceeded = 0
        while not (self._is_finished() or exceeded):
            self._run_chunk(self._chunk_size(progress, every))
            exceeded = limits.exceeded()
            is_end = self._is_finished() or exceeded
            if folder is not None and (is_end or self.num_made % (every or 1) == 0):
                folder.save(self.num_made, (self.state, self._collect()))
            if progress is not None and self._should_report(is_end):
                value = to_numpy(self._last_value())
                progress(self.num_made, value if value.ndim else value.item())
        status = int(self.state.status)
        return self._finish(status or (0 if self._is_finished() else exceeded))

    def load(self, folder: CheckpointFolder) -> None:
        """Continues from the newest checkpoint, if there is one."""
        saved = folder.load(lambda num_rows: (self.state, self._blank_rows(num_rows)))
        if saved is None:
            return
        self.state, rows = saved
        self.num_made = int(self.state.step) - self.first_step
        if self.num_made > self.num_steps:
            raise ValueError(
                f"num_steps must be at least {self.num_made}, the number of steps in "
                f"the checkpoints of {folder.path}; got {self.num_steps}."
            )
        costs = to_numpy(rows.stats["gradient_equivalents"]).astype(np.float64)
        self.spent = float(costs.sum())
        self.blocks = [(rows, self.num_made)]

    def _run_block(self, size: int) -> tuple[OuterState, StepRecord, Any, Any]:
        budget = jnp.asarray(self.budget - self.spent, float)
        return run_block(
            self.loop,
            self.state,
            jnp.asarray(size),
            jnp.asarray(self.stop),
            budget,
            BLOCK_SIZE,
        )

    def _run_chunk(self, size: int) -> None:
        """Makes up to ``size`` steps and waits for them."""
        while size > 0 and not self._is_finished():
            self.state, rows, num_made, cost = self._run_block(min(size, BLOCK_SIZE))
            num_made = int(num_made)
            self.blocks.append((rows, num_made))
            self.num_made += num_made
            self.spent += float(cost)
            size -= BLOCK_SIZE

    def _is_finished(self) -> bool:
        is_done = self.num_made >= self.num_steps or not self.spent < self.budget
        return is_done or int(self.state.status) > 0

    def _chunk_size(self, progress: Progress | None, every: int | None) -> int:
        """Returns the number of steps until the host is needed again."""
        sizes = [self.num_steps - self.num_made]
        if every is not None:
            sizes.append(every - self.num_made % every)
        if progress is not None or every is None:
            report_every = self._report_every()
            sizes.append(report_every - self.num_made % report_every)
        return min(sizes)

    def _report_every(self) -> int:
        """Returns a twentieth of the run in steps, estimated if only a budget is known."""
        if self.num_steps != UNLIMITED:
            return -(-self.num_steps // NUM_CALLS)
        if not self.num_made:
            return 1
        expected = self.budget / (self.spent / self.num_made)
        return max(1, min(BLOCK_SIZE, math.ceil(expected / NUM_CALLS)))

    def _should_report(self, is_end: bool | int) -> bool:
        return bool(is_end) or self.num_made % self._report_every() == 0

    def _last_value(self) -> Any:
        rows, num_made = next(block for block in reversed(self.blocks) if block[1])
        return rows.value[num_made - 1]

    def _collect(self) -> StepRecord:
        """Returns the records of all steps made so far as NumPy arrays."""

        def concatenate(*columns):
            sizes = [size for _, size in self.blocks]
            parts = [to_numpy(x)[:n] for x, n in zip(columns, sizes, strict=True)]
            return np.concatenate(parts)

        rows = jax.tree.map(concatenate, *(rows for rows, _ in self.blocks))
        self.blocks = [(rows, sum(size for _, size in self.blocks))]
        return rows

    def _blank_rows(self, num_rows: int) -> StepRecord:
        """Returns the records of steps that were not made."""
        _, rows, _, _ = self._run_block(0)
        repeat = lambda x: np.repeat(to_numpy(x)[:1], num_rows, axis=0)
        return jax.tree.map(repeat, rows)

    def _finish(self, status: Any) -> Trace:
        rows = self._collect()
        num_rows = len(rows.value)
        if self.num_steps != UNLIMITED and self.spent < self.budget:
            blank = self._blank_rows(self.num_steps - num_rows)
            rows = jax.tree.map(lambda *x: np.concatenate(x), rows, blank)
        rows = jax.tree.map(jnp.asarray, rows)
        return _make_trace(
            self.loop, self.state, rows, jnp.asarray(self.first_step), status
        )


class _Limits:
    """Limits that are checked on the host between chunks of steps."""

    def __init__(self, time_limit: float | None, memory_limit: float | None):
        self.time_limit, self.memory_limit = time_limit, memory_limit
        self.start_time = time.monotonic()

    def exceeded(self) -> int:
        """Returns the status code of an exceeded limit, or 0; equal on all processes."""
        if self.time_limit is None and self.memory_limit is None:
            return 0
        elapsed = time.monotonic() - self.start_time
        code = 0
        if (
            self.memory_limit is not None
            and (resident_bytes() or 0) > self.memory_limit
        ):
            code = OUT_OF_MEMORY
        if self.time_limit is not None and elapsed > self.time_limit:
            code = OUT_OF_TIME
        return process_max(code)


def _make_trace(
    loop: "OuterLoop", state: OuterState, rows: StepRecord, first_step: Any, status: Any
) -> Trace:
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
        state=state,
    )


def _check_positive(name: str, value: Any, unit: str) -> None:
    if value is None or is_traced(value):
        return
    is_number = isinstance(value, int | float | np.number) and not isinstance(
        value, bool
    )
    if not (is_number and 0 < value < math.inf):
        raise ValueError(f"{name} must be a positive {unit}; got {value!r}.")


def _fingerprint(loop: "OuterLoop", state: OuterState) -> RunFingerprint:
    """Returns what identifies a run, by name; see `Checkpoints`."""
    problem, optimizer = loop.problem, optax.with_extra_args_support(loop.optimizer)
    key = jax.random.key(0)
    inner_batch = jax.eval_shape(
        lambda key: sample_batch(problem.sample_data(key)[0], key), key
    )
    outer_batch = jax.eval_shape(
        lambda key: full_batch(problem.sample_data(key)[1], key), key
    )
    digest_code = lambda f, *args: digest_program(jax.jit(f).lower(*args))
    w, alpha = state.w, state.best_alpha
    outer_value = lambda *args: problem.outer_value(*args)
    update = lambda g, opt_state, u: optimizer.update(
        g, opt_state, u, value=jnp.zeros(())
    )
    zero = jnp.asarray(0)
    program = run_block.lower(  # pyright: ignore[reportFunctionMemberAccess] - filter_jit
        loop, state, zero, zero, jnp.asarray(0.0, float), BLOCK_SIZE
    )
    settings = ("eval_every", "certify_every", "on_untrusted", "record_alphas")
    trees = ("estimator", "aggregator", "space", "project", "outer_data_fn", "metrics")
    return (
        {name: str(getattr(loop, name)) for name in settings}
        | {name: digest(getattr(loop, name)) for name in trees}
        | {
            "w": digest(w),
            "alpha": digest(alpha),
            "key": digest(state.key),
            "inner_data": digest(problem.inner_data),
            "outer_data": digest(problem.outer_data),
            "inner_loss": digest_code(problem.inner_loss, w, alpha, inner_batch),
            "outer_loss": digest_code(outer_value, w, alpha, outer_batch),
            "optimizer": digest_code(update, state.u, state.optimizer_state, state.u),
            "program": digest_program(program),
            "initial state": digest(state),
        }
        | runtime_environment()
    )
