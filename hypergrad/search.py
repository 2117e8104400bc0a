"""The outer loop without gradients."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from . import spaces
from .cost import cost_stats
from .estimators.base import make_stats
from .inner.base import InnerSolver
from .problem import Bilevel, full_batch
from .problem_checks import check_alpha_is_used, check_problem, check_problem_type
from .recording import Metric, Progress, check_metrics, check_progress
from .runtime.executors import Executor, LostError, Remote
from .runtime.fingerprint import digest, digest_function, fingerprint
from .searchers import Searcher, populations
from .trace import FAILED, Trace
from .trees import all_finite
from .validation import (
    as_input_arrays,
    as_key,
    check_positive_int,
    float_converter,
    floats_to_arrays,
    is_traced,
)


def search(
    problem: Bilevel,
    solver: InnerSolver,
    searcher: Searcher | populations.PopulationSearcher,
    w: PyTree,
    *,
    space: PyTree,
    budget: float,
    key: Array | None = None,
    metrics: dict[str, Metric] | None = None,
    progress: Progress | None = None,
    trial_callback: Callable[[dict], None] | None = None,
    previous_trials: Sequence[dict] = (),
    trials_per_batch: int = 1,
    executor: Executor | Literal["vmap"] | None = None,
) -> Trace:
    """Trials ``alpha -> M(w*(alpha), alpha)`` until ``budget`` is spent.

    Or until the searcher has no more to propose, as at the end of a grid.

    Args:
      problem: the two losses and their data; several outer losses where the searcher
        takes them, as `NSGA2`, `Random`, `Sobol` and `Grid` do.
      solver: trains each trial, from ``w``.
      searcher: proposes.
      w: the inner starting point of every trial.
      space: pytree of `hypergrad.spaces` shaped like ``alpha``.
      budget: gradient-equivalents; a trial that would exceed it, judged by the cost of
        the one before, is not begun. At least one is made, or the first batch; of a
        population a round, all members' steps.
      key: PRNG key; None means ``jax.random.key(0)``.
      metrics: ``{name: fn(w, alpha, key) -> scalar}``, evaluated for every trial
        outside the ledger.
      progress: ``(trials_done, best_value)``, called after each trial; the value is a
        float, or an array ``[K]``. Of a population after each round, of which it counts
        rounds; the value is that of the best of the members that were trained longest.
      trial_callback: called after each trial with all there is to know of it, a dict of plain
        numbers and lists: ``json.dumps`` makes it a line of a file, of strict JSON: NaN
        is None, and an infinity its name. Under ``trial`` is its number; of a batch
        they come as they are done. Under ``alpha`` are its leaves, in the order
        of ``jax.tree.leaves``: of a dict by sorted keys; under ``search`` a fingerprint
        by which trials of another problem, solver, ``w`` or metric are refused: of
        their numbers, data included, and of the program of a trial with its constants,
        such as rates of optax and what losses close over. So are those of another
        version of jax or kind of device, which may compile it to other numbers.
        A searcher of a population calls it after each round, with a dict of arrays, all
        that there is to know of the search so far: keep the latest,
        ``np.savez(file, **it)``, and replace the file before only once it is written.
      previous_trials: those of an earlier search with the same arguments, all that it recorded.
        They are told to the searcher, not run again, and count against the budget: a
        search that was killed goes on as if it had not been, to the same trace. Of a
        population the latest is enough, ``[dict(np.load(file))]``; it is kept whole,
        also where the budget is less than what it spent.
      trials_per_batch: trials that the searcher is asked for before it is told of any of
        them; it is told in the order asked. `Random`, `Sobol` and `Grid` make the same
        trials whatever it is. Those that learn know less of each: of `CMAES` and
        `NSGA2` let it divide a generation, with which a batch of `Evolution` ends; a
        batch of `GaussianProcess` lies close together.
      executor: who runs the trials of a batch. None: this process, one after the other.
        "vmap": this process, side by side in one program, of as many steps as its
        longest trial; values differ by rounding. Anything with ``submit(fn, *args)``
        that returns what has ``done()`` and ``result()``: a `ProcessPoolExecutor` of
        `concurrent.futures` whose ``mp_context`` is
        ``multiprocessing.get_context("spawn")``, an executor of submitit. Its workers
        are sent the program of a trial and its numbers, data included, but no code, so
        that losses may be lambdas; they need this package, the same jax and the same
        kind of device, and the trace is that of one process to the bit.

    Returns:
      A `Trace` with a row a trial; ``alpha`` and ``w`` are those of the best trial. One
      whose value is not finite failed, ``-inf`` too, and is worse than any other. Of K
      outer losses, ``trace.value`` is ``[trials, K]`` and the best has the lowest
      first value, of equal ones the lowest second, and so on, so that no other
      dominates it. `hypergrad.objectives.non_dominated` tells all such trials;
      ``record`` is given their ``alpha``.

    Cost: one inner solve and K outer values a trial; if a recorded trial stays the
    best, one more, outside the ledger, for its ``w``.

    Raises:
      TypeError, ValueError: bad input, before anything is traced, such as a leaf of
        ``alpha`` that nothing reads; ``trials`` that this searcher would not have asked
        for, more of them than it makes within the budget, or with other metrics.
      RuntimeError: trials came to nothing, as their workers died or could not begin.
        They are named; all others of the batch were recorded, to be gone on with.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> inner = lambda w, alpha, batch: jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: jnp.sum((w - 0.5) ** 2)
    >>> trace = hg.search(
    ...     hg.Bilevel(inner, outer), hg.Newton(), hg.searchers.Random(), 0.0,
    ...     space=hg.spaces.Unit(), budget=500, key=jax.random.key(0),
    ... )
    >>> bool(abs(trace.best_alpha - 0.5) < 0.1)
    True
    """
    check_problem_type(problem)
    trains = hasattr(searcher, "round") and hasattr(searcher, "cost")
    if isinstance(searcher, type) or not (trains or isinstance(searcher, Searcher)):
        raise TypeError(
            "searcher must have init, ask and tell, such as hg.searchers.Random(); got "
            f"{searcher!r}"
        )
    float_converter("budget", optional=False)(budget)
    check_progress(progress)
    if trial_callback is not None and not callable(trial_callback):
        raise TypeError(
            f"trial_callback must be a function of one row; got {trial_callback!r}"
        )
    _check_trials(previous_trials)
    if len(previous_trials) and getattr(searcher, "journal", None) is not None:
        raise ValueError(
            "trials are told by the searcher's journal, which would be told of them "
            "once more; leave out one of the two"
        )
    check_positive_int("trials_per_batch", trials_per_batch)
    _check_executor(executor)
    if not 0 < budget < math.inf:
        raise ValueError(
            f"budget must be positive gradient-equivalents, and finite; got {budget!r}"
        )
    several = problem.num_objectives is not None
    if several and not getattr(searcher, "is_multi_objective", False):
        raise ValueError(
            f"the problem has {problem.num_objectives} outer losses, "
            f"{type(searcher).__name__} takes one; search by hg.searchers.NSGA2(), "
            "Random(), Sobol() or Grid(num), or make one loss of them"
        )
    key = as_key(key)
    if is_traced(problem, w, space, key):
        raise TypeError(
            "search runs on the host, trial by trial, so it does not work within "
            "jax.jit or jax.vmap; call it in a loop"
        )
    if not isinstance(searcher, Searcher):
        if executor is not None or trials_per_batch > 1:
            raise ValueError(
                f"{type(searcher).__name__} trains its members side by side in one "
                "program; leave executor and trials_per_batch out, its own size says how many"
            )
        setting = _setting(problem, solver, w, space, metrics)
        return populations.run_rounds(
            searcher, setting, budget, key, progress, trial_callback, previous_trials
        )
    init_key, run_key = jax.random.split(key)
    state = searcher.init(space, init_key)
    problem = floats_to_arrays(problem)
    metrics = check_metrics(metrics)

    inputs = lambda alpha, key: (problem, solver, w, alpha, metrics, key)
    run = lambda alpha, key: _trial(*inputs(alpha, key))
    run_batch = _batches(executor, inputs)
    known = _numbered(previous_trials)
    name, rows, spent, last = "", [], 0.0, 0.0
    best: tuple[Any, ...] = (None, None, None, None)
    while not rows or spent + last <= budget:
        batch, ahead = [], spent
        while len(batch) < trials_per_batch and (not rows or ahead + last <= budget):
            next_key, ask_key, trial_key = jax.random.split(run_key, 3)
            try:
                alpha, state = searcher.ask(state, ask_key)
            except StopIteration:
                break
            w, alpha = as_input_arrays(w, alpha, differentiable=False)
            batch.append((alpha, trial_key))
            run_key, ahead = next_key, ahead + last
        if not batch:
            break
        if not rows:
            alpha, trial_key = batch[0]
            _check(problem, w, alpha, solver)
            check_metrics(metrics, w, alpha)
            if trial_callback is not None or len(previous_trials):
                name = _name(problem, solver, w, alpha, metrics, trial_key)
                if executor == "vmap":  # whose bits are others
                    name = fingerprint(name, f"vmap of {trials_per_batch}")
        numbers = range(len(rows), len(rows) + len(batch))
        results: dict[int, tuple[Any, Any]] = {}
        for i, (alpha, trial_key) in enumerate(batch):
            if (place := known.get(numbers[i])) is not None:
                _, form = eqx.filter_eval_shape(run, alpha, trial_key)
                alpha, row = _restored(previous_trials[place], place, name, alpha, form)
                batch[i], results[i] = (alpha, trial_key), (None, row)
        new = [i for i in range(len(batch)) if i not in results]
        if new:
            _check_none_beyond(numbers, known, previous_trials)
            try:
                for i, found in run_batch(batch, new):
                    results[i] = found
                    if trial_callback is not None:
                        row = _plain(batch[i][0], found[1])
                        trial_callback({"search": name, "trial": numbers[i], **row})
            except LostError as lost:
                raise _named(lost, batch, numbers, trial_callback) from lost
        for i, (alpha, trial_key) in enumerate(batch):
            found, row = results[i]
            value = row["value"]
            state = searcher.tell(state, alpha, value)
            if not rows or _before(value, best[0]):
                best = (np.asarray(value), alpha, found, trial_key)
            rows.append(jax.tree.map(np.asarray, row))
            last = float(row["stats"]["gradient_equivalents"])
            spent += last
            if progress is not None and i in new:
                progress(len(rows), best[0] if several else best[0].item())

    if not rows:
        raise ValueError(f"searcher proposed nothing: {searcher!r}")
    if len(rows) < len(previous_trials):
        raise ValueError(
            f"trials holds {len(previous_trials)}, of which this search makes {len(rows)}: its "
            f"budget is {budget}, and these spent {spent:g}; pass the searcher and "
            f"budget that they were recorded with, or trials[:{len(rows)}]"
        )
    columns = jax.tree.map(lambda *cells: jnp.stack(cells), *rows)
    _, alpha, found, trial_key = best
    if found is None:
        found, _ = run(alpha, trial_key)
    status = 0 if np.isfinite(best[0]).all() else FAILED
    return Trace(alpha, found, alpha, status_code=jnp.asarray(status), **columns)


def _batches(executor, inputs) -> Callable[..., Iterator[tuple[int, Any]]]:
    """How trials of a batch are run: which one and what it returned, as it is done.

    Of ``(batch, new)`` those in ``new`` are; but by "vmap" it is the whole batch, since
    in a program of another size their bits might be others.
    """
    if executor is None:
        return lambda batch, new: ((i, _trial(*inputs(*batch[i]))) for i in new)
    if executor == "vmap":

        def side_by_side(batch, new):
            found = _trials(*inputs(*jax.tree.map(lambda *x: jnp.stack(x), *batch)))
            return ((i, jax.tree.map(lambda x, i=i: x[i], found)) for i in new)

        return side_by_side
    remote = Remote(executor, _trial)
    return lambda batch, new: remote({i: inputs(*batch[i]) for i in new})


def _named(lost: LostError, batch, numbers, trial_callback) -> RuntimeError:
    """Which trials came to nothing, and what to do."""
    named = "; ".join(
        f"number {numbers[i]} at alpha {_plain(batch[i][0], {})['alpha']} by "
        f"{type(error).__name__}: {error}"
        for i, error in sorted(lost.errors.items())
    )
    advice = (
        "give trial_callback= to keep those that end well"
        if trial_callback is None
        else "all others are recorded, and by previous_trials= the same search goes on from them"
    )
    return RuntimeError(f"trials came to nothing, {named}; {advice}")


def _check_executor(executor):
    """Refuses what can run no trial, and a search that several processes make."""
    if executor is None:
        return
    submits = callable(getattr(executor, "submit", None))
    if not (executor == "vmap" if isinstance(executor, str) else submits):
        raise TypeError(
            'executor must be "vmap", or have a method submit, such as '
            "concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing."
            f'get_context("spawn")); got {executor!r}'
        )
    if isinstance(executor, type):
        name = executor.__name__
        raise TypeError(f"executor is the class {name}; write {name}(...)")
    if jax.process_count() > 1:
        raise ValueError(
            f"executor is for a search by one process, this one is by "
            f"{jax.process_count()}, each of which would run all trials; leave it out"
        )


def _check_trials(trials):
    """Refuses what is no list of what ``record`` was given."""
    if not isinstance(trials, Sequence) or isinstance(trials, str):
        raise TypeError(
            "trials must be a list of dicts, as record was given them; got "
            f"{type(trials).__name__}"
        )
    for index, trial in enumerate(trials):
        if not isinstance(trial, Mapping):
            raise TypeError(
                f"trials[{index}] must be a dict, as record was given it; got {trial!r}"
            )


def _numbered(trials) -> dict[int, int]:
    """Where each trial is, by its number; one without has that of its place."""
    known = {}
    for place, trial in enumerate(trials):
        index = trial.get("trial", place)
        if not isinstance(index, int) or index < 0:
            raise ValueError(
                f"trials[{place}] is no trial of this search: its number is {index!r}"
            )
        if index in known:
            raise ValueError(
                f"trials[{place}] was recorded at alpha {trial.get('alpha')} as number "
                f"{index}, as was trials[{known[index]}]; pass each of them once"
            )
        known[index] = place
    return known


def _check_none_beyond(numbers, known, trials):
    """Refuses trials of batches after one that is not whole, which never began."""
    beyond = sorted(index for index in known if index >= numbers.stop)
    if beyond:
        place = known[beyond[0]]
        lacking = next(index for index in numbers if index not in known)
        raise ValueError(
            f"trials[{place}] was recorded at alpha {trials[place].get('alpha')} as "
            f"number {beyond[0]}, but number {lacking} of a batch before is not there; "
            "pass the searcher, batch_size and key that they were recorded with, and "
            "all trials"
        )


def _check(problem, w, alpha, solver):
    """As of any problem, and that every leaf of ``alpha`` makes a difference."""
    check_problem(problem, w, alpha, solver)
    key = jax.random.key(0)
    trial = lambda alpha: _trial(problem, solver, w, alpha, {}, key)[1]["value"]
    check_alpha_is_used(trial, alpha)


def _setting(problem, solver, w, space, metrics) -> populations.PopulationConfig:
    """What a population shares, checked as a first trial is."""
    populations.check_solver_steps(solver)
    alpha = spaces.sample(space, jax.random.key(0))
    w, alpha = as_input_arrays(w, alpha, differentiable=False)
    _check(problem, w, alpha, solver)
    metrics = check_metrics(metrics, w, alpha)
    if taken := sorted({"steps", "parent"} & metrics.keys()):
        raise ValueError(
            f"metrics cannot be called {taken[0]!r} where a population is trained, "
            "whose trace has metrics steps and parent of its own; choose another name"
        )
    step_cost = populations.step_cost(problem, solver, w, alpha)
    costs = step_cost, populations.equivalents(problem, step_cost)
    return populations.PopulationConfig(
        floats_to_arrays(problem), solver, metrics, w, space, *costs
    )


def _name(problem, solver, w, alpha, metrics, key):
    """Whose trials they are: of its numbers and its program, not of alpha or key."""
    program = digest_function(_trial, problem, solver, w, alpha, metrics, key)
    return fingerprint(digest((problem, solver, w)), program)


def _before(value, best):
    """Whether a trial is better; of several values by the first that differ.

    One with a value that is not finite failed.
    """
    if not np.isfinite(value).all():
        return False
    lower = np.ravel(value).tolist() < np.ravel(best).tolist()
    return lower or not np.isfinite(best).all()


def _plain(alpha, row):
    """A trial as numbers, lists and dicts."""
    leaves = [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(alpha)]
    strict = lambda x: jax.tree.map(_strict, x.tolist())
    return {"alpha": leaves, **jax.tree.map(strict, row)}


def _strict(x):
    """A number as JSON may hold it."""
    return x if math.isfinite(x) else None if math.isnan(x) else str(x)


def _number(x):
    """What `_strict` was given."""
    return math.nan if x is None else float(x) if isinstance(x, str) else x


def _restored(recorded, index, name, alpha, form):
    """``alpha`` and the row of a recorded trial, in the dtypes of a new one."""
    missing = lambda x: x is None
    plain = lambda x: jax.tree.map(_number, x, is_leaf=missing)
    cast = lambda like, x: jnp.asarray(plain(x), like.dtype)
    asked, structure = jax.tree.flatten(alpha)
    measured = recorded.get("metrics")
    if isinstance(measured, Mapping) and set(measured) != set(form["metrics"]):
        raise ValueError(
            f"trials[{index}] was recorded with metrics {sorted(measured)}, this "
            f"search has {sorted(form['metrics'])}; pass those it was recorded with"
        )
    try:
        known = jax.tree.map(cast, asked, recorded["alpha"])
        row = {name: recorded[name] for name in form}
        row = jax.tree.map(lambda x, y: cast(x, y).reshape(x.shape), form, row)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"trials[{index}] is no trial of this search, pass what record was given: "
            f"{error}"
        ) from error
    if recorded.get("search") != name:
        raise ValueError(
            f"trials[{index}] was recorded with another problem, solver, w or metric, "
            "data and numbers that functions close over included, or by another "
            f"version of jax: it says {recorded.get('search')}, and this search is "
            f"{name}; pass those that it was recorded with"
        )
    near = lambda x, y: x.shape == y.shape and np.allclose(x, y, 1e-5, 1e-12)
    if not all(map(near, known, asked)):
        raise ValueError(
            f"trials[{index}] was recorded at alpha {recorded['alpha']}, but this "
            f"search asks for {_plain(alpha, {})['alpha']}; pass the searcher, space "
            "and key that it was recorded with, and all trials in order"
        )
    return structure.unflatten(known), row


@eqx.filter_jit
def _trial(problem, solver, w, alpha, metrics, key):
    data_key, solver_key, outer_key, metric_key = jax.random.split(key, 4)
    inner_data, outer_data = problem.sample_data(data_key)
    start = problem.init_inner(w, alpha)
    w, spent = solver.solve(problem.inner_loss, start, alpha, inner_data, solver_key)
    value = problem.outer_value(w, alpha, full_batch(outer_data, outer_key))
    costs = cost_stats(
        inner_data,
        outer_data,
        num_grads=spent["num_grads"],
        num_hvps=spent["num_hvps"],
        num_values=spent["num_values"],
        num_outer_values=value.size,
    )
    stats = make_stats(
        all_finite(value, w), num_inner_steps=spent["num_steps"], **costs
    )
    measured = {
        name: jnp.asarray(metric(w, alpha, metric_key), dtype=float)
        for name, metric in metrics.items()
    }
    return w, {"value": value, "stats": stats, "metrics": measured}


@eqx.filter_jit
def _trials(problem, solver, w, alphas, metrics, keys):
    """Those of a batch, side by side; outputs have a leading axis."""
    one = lambda alpha, key: _trial(problem, solver, w, alpha, metrics, key)
    return jax.vmap(one)(alphas, keys)
