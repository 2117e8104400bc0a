"""The outer loop without gradients: `search`.

Recorded trials. ``trial_callback`` receives a dictionary after each trial. It is strict
JSON (NaN is None, an infinity is its name): a line of a file by ``json.dumps``. It
holds the number of the trial under ``trial``, the leaves of ``alpha`` in the order of
``jax.tree.leaves``, and under ``search`` a fingerprint of everything else that decides
the numbers of a trial: problem, data, solver, ``w``, metrics, key, numbers that
functions close over, version of jax and kind of device. ``sha256`` is a checksum of the
other entries, so that a trial that was changed or damaged is refused. Trials of one
batch arrive in the order in which they end. With all of these dictionaries as
``previous_trials``, a search that was killed continues to the same trace: the trials
are reported to the searcher and counted against the budget, but not run again. With
``Parallel(..., "vmap")`` the trace is the same up to rounding, because a program of
another size may compute the last short batch and the ``w`` of the best trial.

A population searcher calls it after each round with a dictionary of arrays that holds
the whole search so far. Keep only the latest: write it to another file, by
``np.savez("new.npz", **rounds)``, and replace the older one, by ``os.replace("new.npz",
"search.npz")``, so that a kill at any moment leaves a complete file. Continue from
``[dict(np.load("search.npz"))]``, which is kept even if it exceeds the budget.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree

from . import spaces
from .checks.problem import check_alpha_is_used, check_problem, check_problem_type
from .inner.base import InnerSolver
from .keys_in_w import bind_keys
from .metrics import Metric, check_metrics
from .number_checks import float_converter
from .problem import Bilevel
from .progress import Progress, check_progress, open_progress
from .searchers import Searcher
from .searchers.populations import (
    PopulationSearcher,
    Trainer,
    check_iterative_solver,
    make_trainer,
)
from .trace import Trace
from .trials.records import check_previous_trials
from .trials.rounds import search_rounds
from .trials.run import TrialCallback, search_trials
from .trials.trial import Parallel, TrialSetup, run_trial
from .validation import (
    as_input_arrays,
    as_key,
    check_no_class,
    floats_to_arrays,
    is_traced,
)


def search(
    problem: Bilevel,
    solver: InnerSolver,
    searcher: Searcher | PopulationSearcher,
    w: PyTree,
    *,
    space: PyTree,
    budget: float,
    key: Array | None = None,
    metrics: dict[str, Metric] | None = None,
    progress: Progress | None = None,
    trial_callback: TrialCallback | None = None,
    previous_trials: Sequence[dict] = (),
    parallel: Parallel | None = None,
) -> Trace:
    """Evaluates ``M(w*(alpha), alpha)`` at proposed ``alpha`` until a budget is spent.

    Args:
      problem: The problem. Several outer losses need a searcher that accepts them.
      solver: Trains ``w`` in each trial; iterative for population searchers.
      searcher: Proposes ``alpha``, until the end of a grid; see `hypergrad.searchers`.
      w: Inner starting point of every trial.
      space: Pytree of `hypergrad.spaces`, structured like ``alpha``.
      budget: Gradient-equivalents to spend. A trial after the first one, or after the
        first batch of ``parallel``, is started only if the cost of the one before fits
        into the rest of the budget. A batch that is shorter for this reason is the
        last.
      key: PRNG key. Defaults to ``jax.random.key(0)``.
      metrics: ``{name: fn(w, alpha, key) -> scalar}``, not counted as cost.
      progress: True shows a bar, which needs rich. A function ``(trials_done,
        best_value)`` is called after each trial or round.
      trial_callback: Called with a dictionary after each trial or round, to record the
        search; the page *Search* of the documentation shows how.
      previous_trials: All such dictionaries of an earlier search with the same
        arguments, which this search continues.
      parallel: How many trials run at once, and where. Defaults to one, here.

    Returns:
      A `Trace` with a row per trial, and ``alpha`` and ``w`` of the best one, which is
      the row ``best_row``: the one with the lowest value; of several values the lowest
      first, then second, and so on; of a population among the longest trained. A trial
      whose value or ``w`` is not finite is flagged ``not_finite``, worse than any other
      and NaN to the searcher. A trial whose solver has a tolerance and did not meet it
      is flagged ``not_converged``; its value counts like any other.

    Cost: one inner solve and K outer values per trial.

    Raises:
      TypeError, ValueError: An argument is invalid or belongs to another search.
      RuntimeError: Trials failed on their executor; the message names them.
      ImportError: ``progress`` is True and rich is not installed.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> inner = lambda w, alpha, batch: jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: jnp.sum((w - 0.5) ** 2)
    >>> problem, random = hg.Bilevel(inner, outer), hg.searchers.Random()
    >>> space = hg.spaces.Unit()
    >>> trace = hg.search(problem, hg.Newton(), random, 0.0, space=space, budget=500)
    >>> bool(abs(trace.best_alpha - 0.5) < 0.1)
    True
    """
    _check_arguments(problem, searcher, budget, progress, parallel)
    _check_records(searcher, trial_callback, previous_trials)
    key = as_key(key)
    _check_not_traced(problem, w, space, key)
    unit = "trial" if isinstance(searcher, Searcher) else "round"
    with open_progress(progress, unit, "best value") as show_progress:
        if isinstance(searcher, Searcher):
            setup_fn = lambda alpha: _make_setup(problem, solver, w, alpha, metrics)
            return search_trials(
                searcher, setup_fn, space, key, budget=budget,
                show_progress=show_progress, trial_callback=trial_callback,
                previous_trials=previous_trials, parallel=parallel or Parallel(1),
            )  # fmt: skip
        trainer = _make_trainer(problem, solver, w, space, metrics)
        return search_rounds(
            searcher, trainer, key, budget=budget, show_progress=show_progress,
            round_callback=trial_callback, previous_rounds=previous_trials,
        )  # fmt: skip


def _make_setup(
    problem: Bilevel, solver: Any, w: PyTree, alpha: PyTree, metrics: Any
) -> TrialSetup:
    """Returns what all trials share, after checks at an ``alpha`` of the space."""
    w, alpha = as_input_arrays(w, alpha, differentiable=False)
    metrics = check_metrics(metrics, w, alpha)
    problem, w = bind_keys(problem, w)
    check_problem(problem, w, alpha, solver)
    setup = TrialSetup(floats_to_arrays(problem), solver, w, metrics)
    value_fn = lambda alpha: run_trial(setup, alpha, jax.random.key(0))[1].value
    check_alpha_is_used(value_fn, alpha)
    return setup


def _make_trainer(
    problem: Bilevel, solver: Any, w: PyTree, space: PyTree, metrics: Any
) -> Trainer:
    """Returns the trainer of a population, after checks at a sampled ``alpha``."""
    check_iterative_solver(solver)
    alpha = spaces.sample(space, jax.random.key(0))
    setup = _make_setup(problem, floats_to_arrays(solver), w, alpha, metrics)
    return make_trainer(setup, alpha, space)


def _check_arguments(
    problem: Any, searcher: Any, budget: Any, progress: Any, parallel: Any
) -> None:
    check_problem_type(problem)
    _check_searcher(searcher, problem)
    _check_budget(budget)
    check_progress(progress)
    _check_parallel(parallel, searcher)


def _check_not_traced(*arguments: PyTree) -> None:
    if is_traced(*arguments):
        raise TypeError(
            "search must not be called inside jax.jit or jax.vmap, because it runs on "
            "the host. Call it in a Python loop."
        )


def _check_records(
    searcher: Any, trial_callback: Any, previous_trials: Sequence[dict]
) -> None:
    if not (trial_callback is None or callable(trial_callback)):
        raise TypeError(
            "trial_callback must be a function of a dictionary; got "
            f"{trial_callback!r}."
        )
    check_previous_trials(previous_trials)
    _check_journal(searcher, previous_trials)


def _check_searcher(searcher: Any, problem: Bilevel) -> None:
    check_no_class("searcher", searcher)
    has_rounds = hasattr(searcher, "round") and hasattr(searcher, "cost")
    if not (isinstance(searcher, Searcher) or has_rounds):
        raise TypeError(
            "searcher must have the methods init, ask and tell, as "
            f"hg.searchers.Random() does; got {searcher!r}."
        )
    num_objectives = problem.num_objectives
    if num_objectives and not getattr(searcher, "is_multi_objective", False):
        raise ValueError(
            f"searcher must accept the {num_objectives} outer losses of the problem; "
            f"got {type(searcher).__name__}. Use hg.searchers.NSGA2(), Random(), "
            "Sobol() or Grid(num), or make one loss of them."
        )


def _check_budget(budget: Any) -> None:
    float_converter("budget", optional=False)(budget)
    if np.ndim(budget) or not 0 < budget < math.inf:
        raise ValueError(
            "budget must be a positive, finite number of gradient-equivalents; got "
            f"{budget!r}."
        )


def _check_journal(searcher: Any, previous_trials: Sequence[dict]) -> None:
    """Raises an error if trials of another problem, or trials twice, would be told."""
    if getattr(searcher, "journal", None) is None:
        return
    if not callable(getattr(searcher, "for_problem", None)):
        raise TypeError(
            "searcher must have the method for_problem(problem) if it has a journal, "
            f"because the file may have trials of other problems; got {searcher!r}."
        )
    if len(previous_trials):
        raise ValueError(
            "previous_trials must be empty for a searcher with a journal, which holds "
            f"them already; got {len(previous_trials)} trials."
        )


def _check_parallel(parallel: Any, searcher: Any) -> None:
    if parallel is None:
        return
    if not (hasattr(parallel, "trials_per_batch") and hasattr(parallel, "executor")):
        raise TypeError(
            "parallel must be hg.Parallel(trials_per_batch, executor); got "
            f"{parallel!r}."
        )
    if not isinstance(searcher, Searcher):
        raise ValueError(
            f"parallel must be None for {type(searcher).__name__}, which trains its "
            "members side by side in one program."
        )
    if parallel.executor is not None and jax.process_count() > 1:
        raise ValueError(
            "parallel must not have an executor in a search that "
            f"{jax.process_count()} processes run together, because each of them would "
            "run all trials."
        )
