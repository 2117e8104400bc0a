"""The loop of a search in which every trial trains ``w`` at one ``alpha``."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .. import spaces
from ..progress import ProgressUpdate, ShowProgress
from ..runtime.executors import FailedCallsError
from ..runtime.user_warnings import warn_user
from ..searchers import Searcher
from ..trace import FAILED, Trace
from ..validation import as_proposed_alpha
from .records import (
    RecordedTrials,
    alpha_to_json,
    problem_fingerprint,
    trial_fingerprint,
    trial_to_dict,
)
from .trial import (
    Parallel,
    Runner,
    Trial,
    TrialRecord,
    TrialSetup,
    fits_budget,
    make_runner,
    run_trial,
)

TrialCallback = Callable[[dict], None]


def search_trials(
    searcher: Searcher,
    setup_fn: Callable[[PyTree], TrialSetup],
    space: PyTree,
    key: Array,
    *,
    budget: float,
    show_progress: ShowProgress | None,
    trial_callback: TrialCallback | None,
    previous_trials: Sequence[dict],
    parallel: Parallel,
) -> Trace:
    """Returns the trace of a search by trials; see `hypergrad.search`.

    ``setup_fn`` checks the problem at an ``alpha`` and returns what all trials share.
    """
    if getattr(searcher, "journal", None) is not None:
        searcher = _bind_journal(searcher, setup_fn, space)
    state = SearchState(searcher, space, budget, key)
    batch = state.ask(parallel.trials_per_batch)
    if not batch:
        raise ValueError(
            f"searcher must propose at least one alpha; got none from {searcher!r}."
        )
    alpha = batch[0].alpha
    setup, fingerprint = setup_fn(alpha), ""
    if trial_callback is not None or previous_trials:
        fingerprint = trial_fingerprint(setup, alpha, key, parallel)
    recorded = RecordedTrials(previous_trials, fingerprint)
    runner = make_runner(setup, parallel.executor)
    while batch:
        # Recorded alphas replace the proposed ones, which may differ by rounding.
        batch, old_records = recorded.restore(batch, setup)
        new_numbers = {trial.number for trial in batch} - old_records.keys()
        new_results = {}
        if new_numbers:
            # A later batch can be on record only if this one is complete.
            recorded.check_is_last_batch(batch)
            new_results = _run_new_trials(
                runner, batch, new_numbers, fingerprint, trial_callback
            )
        for trial in batch:
            if trial.number in old_records:
                state.tell(trial, old_records[trial.number])
                continue
            w, record = new_results[trial.number]
            state.tell(trial, record, w)
            if show_progress is not None:
                fraction = state.total_cost / budget
                value = state.best_value()
                show_progress(ProgressUpdate(len(state.records), value, fraction))
        batch = state.ask(parallel.trials_per_batch)
    recorded.check_all_were_used(len(state.records), budget, state.total_cost)
    return state.make_trace(setup, is_reproducible=parallel.executor != "vmap")


def _bind_journal(
    searcher: Any, setup_fn: Callable[[PyTree], TrialSetup], space: PyTree
) -> Searcher:
    """Returns the searcher, which reads only trials of this problem in its journal.

    A journal is a file that several searches share.
    """
    # Only the structure and the dtypes of alpha matter.
    alpha = spaces.sample(space, jax.random.key(0))
    return searcher.for_problem(problem_fingerprint(setup_fn(alpha), alpha))


class BestTrial(NamedTuple):
    """The best trial so far; ``w`` is None if an earlier search recorded the trial."""

    trial: Trial
    value: np.ndarray
    w: PyTree


class SearchState:
    """The state of a search.

    Attributes:
      searcher, budget: Arguments of the search.
      searcher_state: State of the searcher.
      key: PRNG key of the next trials.
      records: Records of all trials, as NumPy arrays.
      total_cost, last_cost: Gradient-equivalents of all trials, and of the last one.
      best: The best trial, or None before the first.
      is_last_batch: Whether the budget cut off the latest batch.
    """

    def __init__(
        self,
        searcher: Searcher,
        space: PyTree,
        budget: float,
        key: Array,
    ):
        self.searcher, self.budget = searcher, budget
        init_key, self.key = jax.random.split(key)
        self.searcher_state = searcher.init(space, init_key)
        self.records: list[TrialRecord] = []
        self.total_cost = self.last_cost = 0.0
        self.best: BestTrial | None = None
        self.is_last_batch = False

    def ask(self, max_trials: int) -> list[Trial]:
        """Returns the trials of the next batch, or an empty list at the end.

        A trial is expected to cost as much as the last one. The first batch is made
        whatever the budget is. No batch follows one that the budget cut off, even if
        its trials cost less than expected: a search with a larger budget, which
        continues this one, would have proposed later trials without their values.
        """
        batch: list[Trial] = []
        if self.is_last_batch:
            return batch
        expected_cost = self.total_cost
        while len(batch) < max_trials:
            next_cost = expected_cost + self.last_cost
            if self.records and not fits_budget(next_cost, self.budget):
                self.is_last_batch = True
                break
            next_key, ask_key, trial_key = jax.random.split(self.key, 3)
            try:
                alpha, state = self.searcher.ask(self.searcher_state, ask_key)
            except StopIteration:
                break
            alpha, number = as_proposed_alpha(alpha), len(self.records) + len(batch)
            batch.append(Trial(number, alpha, trial_key))
            self.searcher_state, self.key = state, next_key
            expected_cost += self.last_cost
        return batch

    def tell(self, trial: Trial, record: TrialRecord, w: PyTree = None) -> None:
        """Adds a trial to the records and tells the searcher its value."""
        record = jax.tree.map(np.asarray, record)
        self.searcher_state = self.searcher.tell(
            self.searcher_state, trial.alpha, record.value
        )
        value = np.asarray(record.value)
        if self.best is None or _is_better(value, self.best.value):
            self.best = BestTrial(trial, value, w)
        self.records.append(record)
        self.last_cost = float(record.stats["gradient_equivalents"])
        self.total_cost += self.last_cost

    def best_value(self) -> float | np.ndarray:
        """Returns the value of the best trial: a float, or an array ``[K]``."""
        assert self.best is not None
        return self.best.value if self.best.value.ndim else self.best.value.item()

    def make_trace(self, setup: TrialSetup, *, is_reproducible: bool) -> Trace:
        """Returns the trace; runs the best trial again if its ``w`` is not known.

        Args:
          setup: What all trials share.
          is_reproducible: Whether a trial that runs again alone must have its recorded
            value to the bit. If it has another one, a warning is issued.
        """
        assert self.best is not None
        (number, alpha, key), value, w = self.best
        if w is None:
            w, record = run_trial(setup, alpha, key)
            if is_reproducible and not _are_equal(record.value, value):
                warn_user(
                    f"the best trial, {number}, has the recorded value {value} but "
                    f"{record.value} when it runs again here. The returned w has the "
                    "latter value. Its record was changed, or made on another machine, "
                    "or the losses do not repeat their values."
                )
        # JAX would compile a program for each number of trials.
        columns = jax.tree.map(
            lambda *leaves: jnp.asarray(np.stack(leaves)), *self.records
        )
        status = 0 if np.isfinite(value).all() else FAILED
        return Trace(
            alpha=alpha,
            w=setup.restore_w(w),
            best_alpha=alpha,
            status_code=jnp.asarray(status),
            row_kind="trial",
            best_row=jnp.asarray(number),
            **columns._asdict(),
        )


def _is_better(value: np.ndarray, best_value: np.ndarray) -> bool:
    """Compares two values, with K outer losses by the first in which they differ.

    A trial whose value is not finite has failed and is worse than any other.
    """
    if not np.isfinite(value).all():
        return False
    is_lower = np.ravel(value).tolist() < np.ravel(best_value).tolist()
    return is_lower or not np.isfinite(best_value).all()


def _are_equal(x: Array, y: np.ndarray) -> bool:
    return np.array_equal(np.asarray(x), y, equal_nan=True)


def _run_new_trials(
    runner: Runner,
    batch: list[Trial],
    numbers: set[int],
    fingerprint: str,
    trial_callback: TrialCallback | None,
) -> dict[int, tuple[PyTree, TrialRecord]]:
    """Runs some trials of a batch and returns ``w`` and the record of each."""
    trials = {trial.number: trial for trial in batch}
    results = {}
    try:
        for number, w, record in runner(batch, numbers):
            results[number] = w, record
            if trial_callback is not None:
                trial_callback(trial_to_dict(fingerprint, trials[number], record))
    except FailedCallsError as error:
        causes = "; ".join(
            f"trial {number} at alpha {alpha_to_json(trials[number].alpha)} failed "
            f"with {type(cause).__name__}: {cause}"
            for number, cause in sorted(error.causes.items())
        )
        remedy = "Pass trial_callback to keep the trials that succeed"
        if trial_callback is not None:
            remedy = (
                "trial_callback received all other trials; pass them as "
                "previous_trials to continue the search"
            )
        raise RuntimeError(f"{causes}. {remedy}.") from error
    return results
