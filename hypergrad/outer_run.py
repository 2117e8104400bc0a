"""Runs of the outer loop in compiled blocks of steps.

Between blocks the host reports progress, saves checkpoints and checks limits. How a run
is cut into blocks changes no bit of its result.
"""

import contextlib
import dataclasses
import math
import time
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from .checkpoint import (
    CheckpointFolder,
    Checkpoints,
    RunFingerprint,
    check_checkpoints,
    open_checkpoints,
    runtime_environment,
)
from .cost.memory import resident_bytes
from .outer_step import (
    NEVER,
    Budget,
    OuterState,
    StepRecord,
    init_state,
    jitted_alpha,
    run_block,
)
from .problem import full_batch, sample_batch
from .recording import Progress, check_progress
from .runtime.devices import process_max
from .runtime.fingerprint import digest, digest_program
from .trace import OUT_OF_MEMORY, OUT_OF_TIME, Trace
from .trees import to_numpy
from .validation import check_positive_int, is_traced, positive

if TYPE_CHECKING:
    from .minimize import OuterLoop

BLOCK_SIZE = 256  # steps per compiled block
MAX_ALPHA_BYTES = 2**24  # of the alphas that a block records
NUM_CALLS = 20  # calls of `progress` per run


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
    check_positive_int("num_steps", num_steps, optional=True)
    budget = positive("budget", optional=True)(budget)
    if np.ndim(budget):
        raise ValueError(f"budget must be a number; got shape {np.shape(budget)}.")
    check_progress(progress)
    check_checkpoints(checkpoints)
    limits = _Limits(time_limit, memory_limit)
    _check_state(loop, state)
    host_options = {
        "progress": progress,
        "checkpoints": checkpoints,
        "time_limit": time_limit,
        "memory_limit": memory_limit,
        "budget without num_steps": budget if num_steps is None else None,
    }
    host_options = [name for name, value in host_options.items() if value is not None]
    if is_traced(loop, state, budget):
        if host_options:
            raise TypeError(
                f"{host_options[0]} is handled on the host, so it cannot be used "
                "inside jax.jit or jax.vmap. Leave it out there."
            )
    elif int(state.status):
        raise ValueError(
            "state must not be the state of a failed run, whose warm starts may be "
            "lost. Start a new run from trace.alpha and trace.w."
        )
    if num_steps is None and (budget is None or budget == math.inf):
        raise ValueError("num_steps or a finite budget must be given; got neither.")
    if not is_traced(budget) and budget == math.inf:
        budget = None
    if num_steps is not None and not host_options:
        # A budget alone gives no bound on the number of blocks: the host counts them.
        return _run_without_host(loop, state, num_steps, budget)
    with contextlib.ExitStack() as stack:
        folder = None
        if checkpoints is not None:
            fingerprint = _fingerprint(loop, state)
            folder = stack.enter_context(open_checkpoints(checkpoints, fingerprint))
        run = _HostRun(loop, state, num_steps, budget, progress, folder, limits)
        if folder is not None:
            run.load(folder)
        return run.run()


def get_block_size(loop: "OuterLoop", state: OuterState) -> int:
    """Returns the number of rows of a block, fewer if it records large alphas."""
    if not loop.record_alphas:
        return BLOCK_SIZE
    leaves = jax.tree.leaves(state.best_alpha)
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return max(1, min(BLOCK_SIZE, MAX_ALPHA_BYTES // max(num_bytes, 1)))


def _check_state(loop: "OuterLoop", state: Any) -> None:
    """Raises an error unless a state belongs to a loop with these objects."""
    if not isinstance(state, OuterState):
        raise TypeError(
            "state must be an OuterState, from loop.init(w, alpha) or trace.state; got "
            f"{type(state).__name__}."
        )
    if state.step.shape:
        raise ValueError(
            f"state must be the state of a single run; got a batch {state.step.shape}. "
            "Continue it inside jax.vmap, or index it first."
        )
    # Nothing is computed: JAX has kept the trace of `init_state` for these types.
    w, alpha, key = state.w, state.best_alpha, state.key
    like = jax.eval_shape(lambda *args: init_state(loop, *args), w, alpha, key)
    has_same_structure = jax.tree.structure(state) == jax.tree.structure(like)
    if not has_same_structure or any(
        (x.shape, x.dtype) != (y.shape, y.dtype)
        for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True)
    ):
        raise ValueError(
            "state must come from a loop with the same estimator, optimizer, space and "
            "aggregator, for w and alpha of the same shapes; got one of another "
            "structure. Start a new run from trace.alpha and trace.w."
        )


def _run_without_host(
    loop: "OuterLoop", state: OuterState, num_steps: int, budget: float | None
) -> Trace:
    """Returns the trace of a run that needs nothing of the host, possibly traced.

    A tracer may also be hidden in a function, such as the optimizer. Therefore values
    are read from the device only if there is a budget, and then only concrete ones.
    """
    # Inside jit every further block would be another loop in the caller's program.
    is_inside_jit = is_traced(loop, state, budget)
    block_size = num_steps if is_inside_jit else get_block_size(loop, state)
    first_step, stop = state.step, state.step + num_steps
    account, blocks = Budget.create(budget), []
    for num_started in range(0, num_steps, block_size):
        size = min(block_size, num_steps - num_started)
        state, account, rows, num_made = run_block(
            loop, state, account, _to_array(size), stop, block_size
        )
        if budget is None or is_traced(account):
            blocks.append((rows, size))
            continue
        blocks.append((rows, int(num_made)))
        if account.is_spent or state.status > 0:
            break
    rows = _concatenate(blocks)
    return _make_trace(loop, state, rows, first_step, state.status)


class _HostRun:
    """A run that returns to the host to report, to save and to check limits.

    Attributes:
      loop: The loop.
      state, budget: State and budget after the steps made so far.
      num_steps: Number of steps to make; infinite if only a budget ends the run.
      num_made: Number of steps made so far.
      blocks: Their records, as pairs of rows and the number of rows that are steps.
      progress: The user's callback, or None.
      folder: Folder of the checkpoints, or None.
      limits: Limits of time and memory.
    """

    def __init__(
        self,
        loop: "OuterLoop",
        state: OuterState,
        num_steps: int | None,
        budget: float | None,
        progress: Progress | None,
        folder: CheckpointFolder | None,
        limits: "_Limits",
    ):
        self.loop, self.state, self.budget = loop, state, Budget.create(budget)
        self.num_steps = math.inf if num_steps is None else num_steps
        self.first_step = state.step
        self.block_size = get_block_size(loop, state)
        stop = NEVER if num_steps is None else int(state.step) + num_steps
        self.stop = _to_array(stop)
        self.num_made = 0
        self.blocks: list[tuple[StepRecord, int]] = []
        self.progress, self.folder, self.limits = progress, folder, limits

    def load(self, folder: CheckpointFolder) -> None:
        """Continues from the newest checkpoint, if the folder contains one.

        Raises:
          ValueError: The checkpoint is of a longer run than this one.
        """
        saved = folder.load(lambda step: self._to_checkpoint(self._blank_rows(step)))
        if saved is None:
            return
        self.state, budget, rows = saved
        # What was spent continues, while the limit may be larger than before.
        self.budget = dataclasses.replace(budget, limit=self.budget.limit)
        costs = rows.stats["gradient_equivalents"]
        self.num_made, self.blocks = len(costs), [(rows, len(costs))]
        for name, limit, minimum in (
            ("num_steps", self.num_steps, self.num_made),
            ("budget", float(self.budget.limit), float(costs[:-1].sum())),
        ):
            if limit < minimum:
                raise ValueError(
                    f"{name} must be at least {minimum:g} to continue the checkpoints "
                    f"of {folder.path}; got {limit:g}. Choose another folder for a "
                    "shorter run."
                )

    def run(self) -> Trace:
        """Makes the remaining steps in chunks and returns the trace."""
        limit_code = 0
        while not (self._is_finished() or limit_code):
            self._make_steps(self._steps_to_next_pause())
            limit_code = self.limits.get_exceeded()
            is_end = self._is_finished() or limit_code > 0
            if self.folder is not None and (is_end or self._is_due(self.folder.every)):
                rows = _concatenate(self.blocks)
                self.blocks = [(rows, self.num_made)]  # do not join them again
                self.folder.save(self.num_made, self._to_checkpoint(rows))
            if self.progress is not None and (
                is_end or self._is_due(self._report_every())
            ):
                value = self._last_value()
                self.progress(self.num_made, value if value.ndim else value.item())
        status = int(self.state.status)
        if not self._is_finished():  # a limit that the last step exceeds does not count
            status = limit_code
        rows = _concatenate(self.blocks)
        if math.isinf(self.budget.limit):
            num_left = int(self.num_steps) - self.num_made
            blank = self._blank_rows(num_left)
            rows = jax.tree.map(lambda *x: np.concatenate(x), rows, blank)
        return _make_trace(self.loop, self.state, rows, self.first_step, status)

    def _is_finished(self) -> bool:
        # On the host, because each operation on arrays would compile a program.
        is_spent = float(self.budget.total_cost) >= float(self.budget.limit)
        is_over = is_spent or int(self.state.status) > 0
        return is_over or self.num_made >= self.num_steps

    def _is_due(self, every: int) -> bool:
        return self.num_made % every == 0

    def _steps_to_next_pause(self) -> float:
        """Returns the number of steps until the host is needed again."""
        intervals = []
        if self.folder is not None:
            intervals.append(self.folder.every)
        if self.folder is None or self.progress is not None:
            intervals.append(self._report_every())
        to_next_multiple = [every - self.num_made % every for every in intervals]
        return min(self.num_steps - self.num_made, *to_next_multiple)

    def _report_every(self) -> int:
        """Returns a twentieth of the run in steps, rounded up.

        The length of a run that only a budget ends is estimated from the cost so far
        and rounded to a power of two, so that it seldom changes during the run.
        """
        if self.num_steps < math.inf:
            return math.ceil(self.num_steps / NUM_CALLS)
        if self.num_made == 0:
            return 1
        cost_per_step = float(self.budget.total_cost) / self.num_made
        interval = float(self.budget.limit) / cost_per_step / NUM_CALLS
        return 2 ** max(0, math.ceil(math.log2(interval)))

    def _make_steps(self, num_steps: float) -> None:
        """Makes up to ``num_steps`` steps and waits for them."""
        while num_steps > 0 and not self._is_finished():
            size = int(min(num_steps, self.block_size))
            self.state, self.budget, rows, num_made = self._run_block(size)
            self.blocks.append((rows, int(num_made)))
            self.num_made += int(num_made)
            num_steps -= size

    def _run_block(self, size: int) -> tuple[OuterState, Budget, StepRecord, Array]:
        return run_block(
            self.loop,
            self.state,
            self.budget,
            _to_array(size),
            self.stop,
            self.block_size,
        )

    def _blank_rows(self, num_rows: int) -> StepRecord:
        """Returns the records of steps that were not made."""
        _, _, rows, _ = self._run_block(0)
        repeat = lambda x: np.repeat(to_numpy(x)[:1], num_rows, axis=0)
        return jax.tree.map(repeat, rows)

    def _last_value(self) -> np.ndarray:
        rows, num_made = next(block for block in reversed(self.blocks) if block[1])
        return to_numpy(rows.value)[num_made - 1]

    def _to_checkpoint(self, rows: StepRecord) -> tuple[OuterState, Budget, StepRecord]:
        return self.state, self.budget, rows


def _to_array(number: int) -> Array:
    """Returns an integer as an array like ``state.step``, without a program for it."""
    return jnp.asarray(np.asarray(number))


class _Limits:
    """Limits of time and memory, which are checked between chunks of steps."""

    def __init__(self, time_limit: float | None, memory_limit: float | None):
        self.time_limit = positive("time_limit", optional=True)(time_limit)
        self.memory_limit = positive("memory_limit", optional=True)(memory_limit)
        for name in ("time_limit", "memory_limit"):
            if shape := np.shape(getattr(self, name)):
                raise ValueError(f"{name} must be a number; got shape {shape}.")
        self.start_time = time.monotonic()
        if memory_limit is not None and resident_bytes() is None:
            raise ValueError(
                "memory_limit needs a system that reports the memory of a process, as "
                "Linux does in /proc/self/statm. Leave it out on this system."
            )

    def get_exceeded(self) -> int:
        """Returns the status of an exceeded limit, or 0; equal on all processes."""
        if self.time_limit is None and self.memory_limit is None:
            return 0
        code = 0
        if self.memory_limit is not None and resident_bytes() > self.memory_limit:
            code = OUT_OF_MEMORY
        elapsed = time.monotonic() - self.start_time
        if self.time_limit is not None and elapsed > self.time_limit:
            code = OUT_OF_TIME
        # Clocks and memory differ, but all processes must stop after the same step.
        return process_max(code)


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
        state=state,
    )


def _fingerprint(loop: "OuterLoop", state: OuterState) -> RunFingerprint:
    """Returns digests of everything that determines a run, by name.

    The number of steps and the budget are left out, so that a run can be extended.
    """
    problem, optimizer = loop.problem, optax.with_extra_args_support(loop.optimizer)
    key = jax.random.key(0)
    inner_batch = jax.eval_shape(
        lambda key: sample_batch(problem.sample_data(key)[0], key), key
    )
    outer_batch = jax.eval_shape(
        lambda key: full_batch(problem.sample_data(key)[1], key), key
    )
    # The text of a program contains the constants that its functions close over. Parts
    # of the program are compared as well, because their names make a better message.
    digest_code = lambda f, *args: digest_program(jax.jit(f).lower(*args))
    w, alpha = state.w, state.best_alpha
    outer_value = lambda *args: problem.outer_value(*args)
    update = lambda g, opt_state, u: optimizer.update(
        g, opt_state, u, value=jnp.zeros(())
    )
    program = run_block.lower(  # pyright: ignore[reportFunctionMemberAccess] - filter_jit
        loop,
        state,
        Budget.create(None),
        jnp.asarray(0),
        state.step,
        get_block_size(loop, state),
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
