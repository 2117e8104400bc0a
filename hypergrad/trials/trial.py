"""A trial of a search: ``w`` is trained at a fixed ``alpha`` and evaluated."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..batches import Data, full_batch
from ..cost import cost_stats
from ..estimators.base import make_stats
from ..inner.base import InnerSolver
from ..keys_in_w import restore_keys
from ..metrics import Metric
from ..number_checks import check_positive_int
from ..problem import Bilevel
from ..runtime.executors import Executor, RemoteFunction
from ..trees import all_finite
from ..validation import check_no_class


class TrialSetup(eqx.Module):
    """Everything that all trials of a search share.

    Attributes:
      problem: The problem of the parameters, which holds the keys of ``w``.
      solver: The inner solver.
      w: The parameters from which every trial starts.
      metrics: The user's metrics, of a ``w`` with its keys.
    """

    problem: Bilevel
    solver: InnerSolver
    w: PyTree
    metrics: dict[str, Metric]

    def restore_w(self, parameters: PyTree) -> PyTree:
        """Returns the ``w`` of these parameters, with the keys of the user's ``w``."""
        return restore_keys(parameters, self.problem.keys_of_w)


class TrialRecord(NamedTuple):
    """The record of a trial; with several trials each leaf has a leading axis.

    Attributes:
      value: Outer value, or ``[K]`` for K outer losses, by which trials are compared.
        NaN if it, or ``w``, is not finite.
      stats: Statistics of an estimate, as in `hypergrad.Estimate`.
      flags: ``{name: bool}``, True if a check failed: ``not_finite``, which makes the
        trial untrusted, and ``not_converged``, which does not, of a solver that reports
        whether it met its tolerance.
      metrics: The user's metrics.
    """

    value: Array
    stats: dict[str, Array]
    flags: dict[str, Array]
    metrics: dict[str, Array]


@eqx.filter_jit
def run_trial(
    setup: TrialSetup, alpha: PyTree, key: Array
) -> tuple[PyTree, TrialRecord]:
    """Trains ``w`` at ``alpha``; returns its parameters and the record of the trial."""
    problem = setup.problem
    data_key, solver_key, outer_key, metric_key = jax.random.split(key, 4)
    inner_data, outer_data = problem.sample_data(data_key)
    w0 = problem.init_inner(setup.w, alpha)
    w, solver_stats = setup.solver.solve(
        problem.inner_loss, w0, alpha, inner_data, solver_key
    )
    num_steps = solver_stats["num_steps"]
    counts = {
        name: solver_stats[name] for name in ("num_grads", "num_hvps", "num_values")
    }
    data, keys = (inner_data, outer_data), (outer_key, metric_key)
    record = make_record(setup, w, alpha, data, keys, num_steps, counts)
    if "converged" in solver_stats:  # a solver with a tolerance reports it
        flags = {"not_converged": solver_stats["converged"] == 0}
        record = record._replace(flags=record.flags | flags)
    return w, record


@eqx.filter_jit
def run_trials(
    setup: TrialSetup, alphas: PyTree, keys: Array
) -> tuple[PyTree, TrialRecord]:
    """Runs several trials in one program; inputs and outputs have a leading axis."""
    return jax.vmap(lambda alpha, key: run_trial(setup, alpha, key))(alphas, keys)


def make_record(
    setup: TrialSetup,
    parameters: PyTree,
    alpha: PyTree,
    data: tuple[Data, Data],
    keys: tuple[Array, Array],
    num_inner_steps: Array | int,
    counts: dict[str, Any],
) -> TrialRecord:
    """Evaluates the outer loss and the metrics at a trained ``w``.

    Args:
      setup: What all trials share.
      parameters: The trained parameters of ``w``.
      alpha: The ``alpha`` of the trial.
      data: The pair ``(inner_data, outer_data)``.
      keys: PRNG keys of the outer batch and of the metrics.
      num_inner_steps: Number of inner steps that the trial made.
      counts: Numbers of inner gradients, Hessian-vector products and values.
    """
    inner_data, outer_data = data
    outer_key, metric_key = keys
    w = setup.restore_w(parameters)
    batch = full_batch(outer_data, outer_key)
    value = setup.problem.outer_value(parameters, alpha, batch)
    is_finite = all_finite(value, parameters)
    costs = cost_stats(inner_data, outer_data, num_outer_values=value.size, **counts)
    flags = {"not_finite": ~is_finite}
    stats = make_stats(num_inner_steps=num_inner_steps, **costs)
    metrics = {
        name: jnp.asarray(metric(w, alpha, metric_key), dtype=float)
        for name, metric in setup.metrics.items()
    }
    stats["trusted"] = is_finite
    # The outer loss may leave out what is not finite in w.
    return TrialRecord(jnp.where(is_finite, value, jnp.nan), stats, flags, metrics)


# Batches of trials.


class Trial(NamedTuple):
    """A trial that the searcher proposed: its number in the search, alpha and key."""

    number: int
    alpha: PyTree
    key: Array


def fits_budget(cost: float, budget: float) -> bool:
    """Returns whether a budget pays for a cost, up to rounding in float32.

    A cost that is NaN fits no budget.

    >>> fits_budget(4.0000001, 4.0), fits_budget(4.1, 4.0), fits_budget(jnp.nan, 4.0)
    (True, False, False)
    """
    return cost <= budget * (1 + 1e-6)


@dataclass(frozen=True)
class Parallel:
    """The number of trials of a search that run at the same time, and their executor.

    Args:
      trials_per_batch: Number of trials that the searcher proposes before it is told
        the value of any of them. The values are told in the order of the proposals.
        `Random`, `Sobol` and `Grid` propose the same trials for any number. Searchers
        that learn know less at each proposal: choose a divisor of the generation of
        `CMAES` and `NSGA2`; a batch of `EvolutionStrategy` ends with its generation.
      executor: What runs the trials of a batch.

        - None (default): This process, one trial after another.
        - "vmap": This process, all trials in one program, which makes as many steps as
          its longest trial; the costs are those of the same trials made alone. Values
          differ from those of single trials by rounding.
        - An object with a method ``submit(fn, *args)``, which returns an object with
          the methods ``done()`` and ``result()``: a `ProcessPoolExecutor` of
          `concurrent.futures` whose ``mp_context`` is
          ``multiprocessing.get_context("spawn")``, or an executor of submitit. Its
          workers receive the compiled program of a trial and arrays, data included,
          but no code, so losses may be lambdas, and must not call functions on the
          host. Workers need this package, the same version of jax and the same kind of
          device. The trace equals the trace of ``executor=None`` to the bit.

    Raises:
      TypeError: ``executor`` cannot run a trial.
      ValueError: ``trials_per_batch`` is not a positive integer.

    >>> import jax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: (w - alpha) ** 2
    >>> outer = lambda w, alpha, batch: (w - 0.5) ** 2
    >>> trace = hg.search(
    ...     hg.Bilevel(inner, outer), hg.Newton(), hg.searchers.Sobol(), 0.0,
    ...     space=hg.spaces.Unit(), budget=80, parallel=hg.Parallel(8, "vmap"),
    ... )
    >>> bool(abs(trace.best_alpha - 0.5) < 0.1)
    True
    """

    trials_per_batch: int
    executor: Executor | Literal["vmap"] | None = None

    def __post_init__(self):
        check_positive_int("trials_per_batch", self.trials_per_batch)
        executor = self.executor
        check_no_class("executor", executor)
        is_vmap = isinstance(executor, str) and executor == "vmap"
        can_submit = callable(getattr(executor, "submit", None))
        if not (executor is None or is_vmap or can_submit):
            raise TypeError(
                'executor must be None, "vmap" or have a method submit; got '
                f"{executor!r}. Use e.g. concurrent.futures.ProcessPoolExecutor("
                'mp_context=multiprocessing.get_context("spawn")).'
            )


#: Takes a batch and the numbers of its trials that are to be run. Yields the number,
#: ``w`` and the record of each of these trials as soon as it is done.
Runner = Callable[[list[Trial], set[int]], Iterator[tuple[int, PyTree, TrialRecord]]]


def make_runner(setup: TrialSetup, executor: Any) -> Runner:
    """Returns the function that runs the trials of a batch on an executor."""
    if executor is None:
        return partial(_run_one_by_one, setup)
    if executor == "vmap":
        return partial(_run_in_one_program, setup)
    return partial(_run_remotely, RemoteFunction(executor, run_trial), setup)


def _run_one_by_one(setup, batch, numbers):
    for trial in batch:
        if trial.number in numbers:
            yield trial.number, *run_trial(setup, trial.alpha, trial.key)


def _run_in_one_program(setup, batch, numbers):
    # The whole batch is run, because a program of another size may round differently.
    inputs = [(trial.alpha, trial.key) for trial in batch]
    alphas, keys = jax.tree.map(lambda *leaves: jnp.stack(leaves), *inputs)
    results = run_trials(setup, alphas, keys)
    for i, trial in enumerate(batch):
        if trial.number in numbers:
            yield trial.number, *jax.tree.map(lambda x, i=i: x[i], results)


def _run_remotely(remote_trial, setup, batch, numbers):
    inputs = {
        trial.number: (setup, trial.alpha, trial.key)
        for trial in batch
        if trial.number in numbers
    }
    for number, (w, record) in remote_trial(inputs):
        yield number, w, record
