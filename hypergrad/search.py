"""The outer loop without gradients."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from . import spaces
from .checks import (
    as_inputs,
    as_key,
    check_problem,
    check_problem_is,
    check_searched,
    is_traced,
    traced,
)
from .cost import ledger
from .estimators.protocol import make_stats
from .identity import digest, digest_function, fingerprint
from .inner.protocol import InnerSolver
from .metrics import Metric, Progress, check_metrics, check_progress
from .problem import Bilevel, whole
from .searchers import Searcher, populations
from .settings import number
from .trace import FAILED, Trace
from .trees import all_finite


def search(
    problem: Bilevel,
    solver: InnerSolver,
    searcher: Searcher | populations.Populations,
    w: PyTree,
    *,
    space: PyTree,
    budget: float,
    key: Array | None = None,
    metrics: dict[str, Metric] | None = None,
    progress: Progress | None = None,
    record: Callable[[dict], None] | None = None,
    trials: Sequence[dict] = (),
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
        the one before, is not begun. At least one is made; of a population a round, all
        members' steps.
      key: PRNG key; None means ``jax.random.key(0)``.
      metrics: ``{name: fn(w, alpha, key) -> scalar}``, evaluated for every trial
        outside the ledger.
      progress: ``(trials_done, best_value)``, called after each trial; the value is a
        float, or an array ``[K]``. Of a population after each round, of which it counts
        rounds; the value is that of the best of the members that were trained longest.
      record: called after each trial with all there is to know of it, a dict of plain
        numbers and lists: ``json.dumps`` makes it a line of a file, of strict JSON: NaN
        is None, and an infinity its name. Under ``alpha`` are its leaves, in the order
        of ``jax.tree.leaves``: of a dict by sorted keys; under ``search`` a fingerprint
        by which trials of another problem, solver, ``w`` or metric are refused: of
        their numbers, data included, and of the program of a trial with its constants,
        such as rates of optax and what losses close over. So are those of another
        version of jax or kind of device, which may compile it to other numbers.
        A searcher of a population calls it after each round, with a dict of arrays, all
        that there is to know of the search so far: keep the latest,
        ``np.savez(file, **it)``, and replace the file before only once it is written.
      trials: those of an earlier search with the same arguments, as recorded, in order.
        They are told to the searcher, not run again, and count against the budget: a
        search that was killed goes on as if it had not been, to the same trace. Of a
        population the latest is enough, ``[dict(np.load(file))]``; it is kept whole,
        also where the budget is less than what it spent.

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
    check_problem_is(problem)
    trains = hasattr(searcher, "round") and hasattr(searcher, "cost")
    if isinstance(searcher, type) or not (trains or isinstance(searcher, Searcher)):
        raise TypeError(
            "searcher must have init, ask and tell, such as hg.searchers.Random(); got "
            f"{searcher!r}"
        )
    number("budget", optional=False)(budget)
    check_progress(progress)
    if record is not None and not callable(record):
        raise TypeError(f"record must be a function of one row; got {record!r}")
    _check_trials(trials)
    if not 0 < budget < math.inf:
        raise ValueError(
            f"budget must be positive gradient-equivalents, and finite; got {budget!r}"
        )
    several = problem.num_objectives is not None
    if several and not getattr(searcher, "takes_several", False):
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
        setting = _setting(problem, solver, w, space, metrics)
        return populations.run(searcher, setting, budget, key, progress, record, trials)
    init_key, run_key = jax.random.split(key)
    state = searcher.init(space, init_key)
    problem = traced(problem)
    metrics = check_metrics(metrics)

    run = lambda alpha, key: _trial(problem, solver, w, alpha, metrics, key)
    name, rows, spent, last = "", [], 0.0, 0.0
    best: tuple[Any, ...] = (None, None, None, None)
    while not rows or spent + last <= budget:
        run_key, ask_key, trial_key = jax.random.split(run_key, 3)
        try:
            alpha, state = searcher.ask(state, ask_key)
        except StopIteration:
            break
        w, alpha = as_inputs(w, alpha, differentiable=False)
        if not rows:
            _check(problem, w, alpha, solver)
            check_metrics(metrics, w, alpha)
            if record is not None or len(trials):
                name = _name(problem, solver, w, alpha, metrics, trial_key)
        known, found = len(rows) < len(trials), None
        if known:
            _, form = eqx.filter_eval_shape(run, alpha, trial_key)
            alpha, row = _restored(trials[len(rows)], len(rows), name, alpha, form)
        else:
            found, row = run(alpha, trial_key)
        value = row["value"]
        state = searcher.tell(state, alpha, value)
        if not rows or _before(value, best[0]):
            best = (np.asarray(value), alpha, found, trial_key)
        rows.append(jax.tree.map(np.asarray, row))
        last = float(row["stats"]["gradient_equivalents"])
        spent += last
        if record is not None and not known:
            record({"search": name, **_plain(alpha, rows[-1])})
        if progress is not None and not known:
            progress(len(rows), best[0] if several else best[0].item())

    if not rows:
        raise ValueError(f"searcher proposed nothing: {searcher!r}")
    if len(rows) < len(trials):
        raise ValueError(
            f"trials holds {len(trials)}, of which this search makes {len(rows)}: its "
            f"budget is {budget}, and these spent {spent:g}; pass the searcher and "
            f"budget that they were recorded with, or trials[:{len(rows)}]"
        )
    columns = jax.tree.map(lambda *cells: jnp.stack(cells), *rows)
    _, alpha, found, trial_key = best
    if found is None:
        found, _ = run(alpha, trial_key)
    status = 0 if np.isfinite(best[0]).all() else FAILED
    return Trace(alpha, found, alpha, status_code=jnp.asarray(status), **columns)


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


def _check(problem, w, alpha, solver):
    """As of any problem, and that every leaf of ``alpha`` makes a difference."""
    check_problem(problem, w, alpha, solver)
    key = jax.random.key(0)
    trial = lambda alpha: _trial(problem, solver, w, alpha, {}, key)[1]["value"]
    check_searched(trial, alpha)


def _setting(problem, solver, w, space, metrics) -> populations.Setting:
    """What a population shares, checked as a first trial is."""
    populations.check_solver_steps(solver)
    alpha = spaces.sample(space, jax.random.key(0))
    w, alpha = as_inputs(w, alpha, differentiable=False)
    _check(problem, w, alpha, solver)
    metrics = check_metrics(metrics, w, alpha)
    if taken := sorted({"steps", "parent"} & metrics.keys()):
        raise ValueError(
            f"metrics cannot be called {taken[0]!r} where a population is trained, "
            "whose trace has metrics steps and parent of its own; choose another name"
        )
    step_cost = populations.step_cost(problem, solver, w, alpha)
    costs = step_cost, populations.equivalents(problem, step_cost)
    return populations.Setting(traced(problem), solver, metrics, w, space, *costs)


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
    inner_data, outer_data = problem.data(data_key)
    start = problem.initial(w, alpha)
    w, spent = solver.solve(problem.inner_loss, start, alpha, inner_data, solver_key)
    value = problem.outer(w, alpha, whole(outer_data, outer_key))
    costs = ledger(
        inner_data,
        outer_data,
        num_grads=spent["num_grads"],
        num_hvps=spent["num_hvps"],
        num_values=spent["num_values"],
        num_outer_values=value.size,
    )
    stats = make_stats(all_finite(value, w), inner_steps=spent["num_steps"], **costs)
    measured = {
        name: jnp.asarray(metric(w, alpha, metric_key), dtype=float)
        for name, metric in metrics.items()
    }
    return w, {"value": value, "stats": stats, "metrics": measured}
