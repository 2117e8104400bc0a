"""Dry runs: the cost of a row from its compiled programs, none of which is run.

The outputs of a program are replaced by zeros, except its costs: the cost of an outer
step or a trial is computed from the program if it does not depend on data.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jax.interpreters import partial_eval
from jaxtyping import Array, PyTree

from .. import spaces
from ..cost import COST_STATS
from ..cost.flops import Flops, called_jaxpr, count_jaxpr_flops
from ..cost.memory import Memory, memory_from_compiled
from ..problem import Bilevel
from ..recording import Metric
from ..runtime.fingerprint import digest_function
from ..search_trial import TrialSetup, run_trial
from ..trace import Trace
from ..validation import floats_to_arrays as settings_traced
from .study import Study

OUTER_LOOP = "outer_step.py"


class Plan(NamedTuple):
    """A program and the number of its calls.

    Attributes:
      calls: Number of calls in one row; NaN if it depends on a tolerance.
      flops, memory: Operations and memory of one call.
      steps: Number of outer steps of the `Trace` that it returns; None if it returns
        no trace.
      outputs: Replacement of its outputs.
    """

    calls: float
    flops: Flops
    memory: Memory
    steps: int | None
    outputs: PyTree

    @property
    def total(self) -> float | None:
        """Operations of one call; None if a tolerance ends one of its loops."""
        outer = [OUTER_LOOP in loop.location for loop in self.flops.loops]
        if not outer:
            return self.flops.total()
        if outer == [True] and self.steps is not None:
            return self.flops.total(self.steps)
        return None

    @property
    def by_iteration(self) -> str:
        """Text with the operations of an iteration of each loop."""
        get_steps = lambda loop: OUTER_LOOP in loop.location and self.steps
        shorten = lambda location: location.rpartition("/")[2].removeprefix("inside ")
        loops = "; ".join(
            f"{loop.flops:.3g} in {shorten(loop.location)}"
            + (f", {self.steps} times" if get_steps(loop) else "")
            for loop in self.flops.loops
        )
        return (
            "a tolerance decides how many FLOPs; an iteration of each of its loops has "
            f"{loops}; all else {self.flops.fixed:.3g}"
        )


Plans = dict[Any, Plan]


class Rehearsal(NamedTuple):
    """Plans so far, and cached results."""

    plans: Plans
    results: dict[Any, Any]


_current: ContextVar[Rehearsal | None] = ContextVar("rehearsal", default=None)


@contextlib.contextmanager
def rehearsal() -> Iterator[Plans]:
    """Context in which programs are planned, not run; yields the plans so far."""
    plans: Plans = {}
    token = _current.set(Rehearsal(plans, {}))
    try:
        yield plans
    finally:
        _current.reset(token)


def is_rehearsed() -> bool:
    """Returns True inside of `rehearsal`."""
    return _current.get() is not None


def current_rehearsal() -> Rehearsal:
    """Returns the current plans and cached results."""
    result = _current.get()
    assert result is not None
    return result


def record_calls(program: Any, plan: Plan, num_calls: float = 1) -> PyTree:
    """Adds calls to the plans and returns the replacement of the program's outputs."""
    plans = current_rehearsal().plans
    num_recorded = plans[program].calls if program in plans else 0
    plans[program] = plan._replace(calls=num_recorded + num_calls)
    return plan.outputs


def cached_result(function: Callable, args: tuple[Any, ...]) -> Any:
    """Returns the result of the first call with these arguments in this dry run."""
    results, call = current_rehearsal().results, (function, args)
    if call not in results:
        results[call] = function(*args)
    return results[call]


class Trials(NamedTuple):
    """Key of a trial in the plans: the digest of its program."""

    digest: str
    name = "trial"


def plan_search(
    problem: Bilevel,
    solver: Any,
    searcher: Any,
    w: PyTree,
    *,
    space: PyTree,
    budget: float,
    key: Array | None = None,
    metrics: dict[str, Metric] | None = None,
) -> Trace:
    """Returns the trace of a search that spends its budget on trials of equal cost."""
    del searcher
    alpha, key = spaces.sample(space, jax.random.key(0)), jax.random.key(0)
    w, metrics = jax.tree.map(jnp.asarray, w), metrics or {}
    setup = TrialSetup(settings_traced(problem), solver, w, metrics)
    inputs = setup, alpha, key
    arrays, static = eqx.partition(inputs, eqx.is_array)
    run = lambda arrays: run_trial(*eqx.combine(arrays, static))
    program = Trials(digest_function(run, arrays))
    trial_plan = current_rehearsal().plans.get(program) or plan(run, (arrays,))
    w, row = trial_plan.outputs
    cost, total_cost, num_trials = float(row.stats["gradient_equivalents"]), 0.0, 0
    while not num_trials or total_cost + cost <= budget:  # once if the cost is unknown
        total_cost, num_trials = total_cost + cost, num_trials + 1
    num_calls = num_trials if math.isfinite(cost) else math.nan
    record_calls(program, trial_plan, num_calls)
    columns = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_trials, *x.shape)), row)
    alpha = jax.tree.map(jnp.zeros_like, alpha)
    return Trace(alpha, w, alpha, status_code=jnp.asarray(0), **columns._asdict())


def plan(function: Callable, args: PyTree) -> Plan:
    """Returns the plan of a function, which is traced and compiled."""
    traced = jax.jit(function).trace(*args)
    shapes, structure = jax.tree.flatten(traced.out_info)
    indices = jax.tree.unflatten(structure, range(len(shapes)))
    is_trace = lambda x: isinstance(x, Trace)
    traces = [x for x in jax.tree.leaves(indices, is_leaf=is_trace) if is_trace(x)]
    outputs, steps = [jnp.zeros(x.shape, x.dtype) for x in shapes], None
    for path, i in jax.tree.leaves_with_path(indices):
        if getattr(path[-1] if path else None, "key", None) in COST_STATS:
            outputs[i] = predict_cost(traced.jaxpr, i)
    for trace in traces:
        steps = shapes[trace.stats["trusted"]].shape[-1]
    return Plan(
        0,
        count_jaxpr_flops(traced.jaxpr),
        memory_from_compiled(traced.lower().compile()),
        steps if len(traces) == 1 else None,
        jax.tree.unflatten(structure, outputs),
    )


def predict_cost(closed: Any, output: int) -> Array:
    """Returns a cost, or a column of costs by step, without running the program.

    The result is NaN if the cost depends on more than the number of the step, such as
    on the iterations of a solve.
    """
    jaxpr = closed.jaxpr
    aval = jaxpr.outvars[output].aval
    unknown = jnp.full(aval.shape, jnp.nan, float)
    is_wanted = [i == output for i in range(len(jaxpr.outvars))]
    needed, used = partial_eval.dce_jaxpr(jaxpr, is_wanted)
    if not any(used):
        return jaxpr_as_fun(closed.replace(jaxpr=needed))()[0]
    source = find_equation(jaxpr, jaxpr.outvars[output])
    if isinstance(source, int) or source[0].primitive.name != "while":
        return unknown
    loop, index = source
    body, num_consts = loop.params["body_jaxpr"], loop.params["body_nconsts"]
    is_wanted = [i == index for i in range(len(body.jaxpr.outvars))]
    needed, used = partial_eval.dce_jaxpr(body.jaxpr, is_wanted)
    is_integer = lambda variable: jnp.issubdtype(variable.aval.dtype, jnp.integer)
    column_in = body.jaxpr.invars[num_consts + index]
    inputs = [x for x, is_used in zip(body.jaxpr.invars, used, strict=True) if is_used]
    if not all(x is column_in or is_integer(x) for x in inputs):
        return unknown
    update_column = jaxpr_as_fun(body.replace(jaxpr=needed))

    def step(i: Array, column: Array) -> Array:
        values = [
            column if x is column_in else jnp.full(x.aval.shape, i, x.aval.dtype)
            for x in inputs
        ]
        return update_column(*values)[0]

    return jax.lax.fori_loop(0, aval.shape[-1], step, jnp.zeros(aval.shape, aval.dtype))


def find_equation(jaxpr: Any, variable: Any) -> int | tuple[Any, int]:
    """Returns the equation, inside of calls, that computes a variable, and its output.

    The result is an integer if the variable is an input: its index, or -1 for a
    constant.
    """
    for equation in jaxpr.eqns:
        if variable in equation.outvars:
            index, inner = equation.outvars.index(variable), called_jaxpr(equation)
            if equation.primitive.name == "device_put":  # the rows of a trace
                return find_equation(jaxpr, equation.invars[index])
            if inner is None or equation.primitive.name == "while":
                return equation, index
            source = find_equation(inner, inner.outvars[index])
            if isinstance(source, int):
                return find_equation(jaxpr, equation.invars[source])
            return source
    return jaxpr.invars.index(variable) if variable in jaxpr.invars else -1


# Report.

HEAD = ("method", "program", "calls", "FLOPs", "temporary bytes", "peak bytes")
COSTS = {"gradient_equivalents": "grad-eq", "tuning_cost": "tuning grad-eq"}
TOLERANCE, UNKNOWN = "by tolerance", "-"
NO_PROGRAM = "no program of its own"


def report(study: Study, methods: Sequence[str]) -> str:
    """Returns Markdown with the programs of one row per method and their costs."""
    columns, rows = (*HEAD, *COSTS.values()), []
    notes: dict[str, list[str]] = {}  # the methods to which each note applies
    for method in methods:
        row, plans = plan_row(study, method)
        if not plans:
            notes.setdefault(NO_PROGRAM, []).append(method)
        costs = [cost_text(row, name) for name in COSTS]
        for program, plan in plans.items():
            name, total = program.name, plan.total
            if total is None:
                notes.setdefault(f"{name}: {plan.by_iteration}", []).append(method)
            if plan.flops.unknown:
                unpriced = ", ".join(plan.flops.unknown)
                note = f"{name}: not among the FLOPs: {unpriced}"
                notes.setdefault(note, []).append(method)
            rows.append(
                (
                    *(method, name),
                    TOLERANCE if math.isnan(plan.calls) else f"{plan.calls:.0f}",
                    TOLERANCE if total is None else f"{total:.3g}",
                    *(f"{n:,}" for n in (plan.memory.temporaries, plan.memory.peak)),
                    *costs,
                )
            )
            costs = [""] * len(costs)
    to_line = lambda cells: "| " + " | ".join(cells) + " |"
    table = [to_line(columns), "|" + "---|" * len(columns), *map(to_line, rows)]
    about = (
        f"{study.name}: one row of each method, seed 0, compiled and not run. FLOPs "
        "and bytes are those of one call; grad-eq are the gradient-equivalents that a "
        "run's ledger counts, of what chose its settings under 'tuning'."
    )
    note_lines = [f"- {'; '.join(several)}: {note}" for note, several in notes.items()]
    return "\n".join([about, "", *table, "", *note_lines])


def plan_row(study: Study, method: str) -> tuple[dict[str, Any], Plans]:
    """Returns a row of zeros with its costs, and the plans of its programs."""
    with rehearsal() as plans:
        return study.methods[method](0), plans


def cost_text(row: dict[str, Any], name: str) -> str:
    """Returns a cost as text; a cost that depends on a tolerance is NaN in the row."""
    value = row.get(name)
    if value is None:
        return UNKNOWN
    return TOLERANCE if math.isnan(value) else f"{value:.0f}"
