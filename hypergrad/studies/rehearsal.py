"""What a row would cost: its programs compiled and counted, and none of them run.

In place of a program's outputs the row goes on with zeros, but for the ledger: what an
outer step or a trial costs is worked out from the program where no number decides it.
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
    """A program and how often it is called.

    Attributes:
      calls: in one row; NaN where a tolerance decides how many trials a budget buys.
      flops, memory: of one call.
      steps: outer steps of the `Trace` that it returns; None where it returns none.
      outputs: what takes the place of its outputs.
    """

    calls: float
    flops: Flops
    memory: Memory
    steps: int | None
    outputs: PyTree

    @property
    def total(self) -> float | None:
        """Operations of one call; None where a tolerance ends one of its loops."""
        outer = [OUTER_LOOP in loop.location for loop in self.flops.loops]
        if not outer:
            return self.flops.total()
        if outer == [True] and self.steps is not None:
            return self.flops.total(self.steps)
        return None

    @property
    def by_iteration(self) -> str:
        """What to say where a tolerance ends a loop: an iteration of each."""
        steps = lambda loop: OUTER_LOOP in loop.location and self.steps
        place = lambda where: where.rpartition("/")[2].removeprefix("inside ")
        loops = "; ".join(
            f"{loop.flops:.3g} in {place(loop.location)}"
            + (f", {self.steps} times" if steps(loop) else "")
            for loop in self.flops.loops
        )
        return (
            "a tolerance decides how many FLOPs; an iteration of each of its loops has "
            f"{loops}; all else {self.flops.fixed:.3g}"
        )


Plans = dict[Any, Plan]


class Rehearsal(NamedTuple):
    """What was planned so far, and results that are made once."""

    plans: Plans
    results: dict[Any, Any]


_current: ContextVar[Rehearsal | None] = ContextVar("rehearsal", default=None)


@contextlib.contextmanager
def rehearsal() -> Iterator[Plans]:
    """Within it a `Program` is planned, not run; yields the plans as they grow."""
    plans: Plans = {}
    token = _current.set(Rehearsal(plans, {}))
    try:
        yield plans
    finally:
        _current.reset(token)


def is_rehearsed() -> bool:
    """Whether programs are planned and not run."""
    return _current.get() is not None


def current() -> Rehearsal:
    """The rehearsal within which this is called."""
    found = _current.get()
    assert found is not None
    return found


def planned(program: Any, known: Plan, calls: float = 1) -> PyTree:
    """So many more calls in the plans, and what stands for the program's outputs."""
    plans = current().plans
    before = plans[program].calls if program in plans else 0
    plans[program] = known._replace(calls=before + calls)
    return known.outputs


def kept(function: Callable, arguments: tuple[Any, ...]) -> Any:
    """What a function returned to its first such call in this rehearsal."""
    results, call = current().results, (function, arguments)
    if call not in results:
        results[call] = function(*arguments)
    return results[call]


class Trials(NamedTuple):
    """In place of a `Program`: a trial, by a digest of what is compiled."""

    digest: str
    name = "trial"


def searched(
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
    """In place of a search: as many trials as the budget buys, of equal cost."""
    del searcher
    alpha, key = spaces.sample(space, jax.random.key(0)), jax.random.key(0)
    w, metrics = jax.tree.map(jnp.asarray, w), metrics or {}
    setup = TrialSetup(settings_traced(problem), solver, w, metrics)
    inputs = setup, alpha, key
    arrays, static = eqx.partition(inputs, eqx.is_array)
    run = lambda arrays: run_trial(*eqx.combine(arrays, static))
    program = Trials(digest_function(run, arrays))
    known = current().plans.get(program) or plan(run, (arrays,))
    w, row = known.outputs
    cost, spent, count = float(row.stats["gradient_equivalents"]), 0.0, 0
    while not count or spent + cost <= budget:  # once where it is not known
        spent, count = spent + cost, count + 1
    planned(program, known, count if math.isfinite(cost) else math.nan)
    columns = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), row)
    alpha = jax.tree.map(jnp.zeros_like, alpha)
    return Trace(alpha, w, alpha, status_code=jnp.asarray(0), **columns._asdict())


def plan(function: Callable, arguments: PyTree) -> Plan:
    """Of a function that is traced and compiled."""
    traced = jax.jit(function).trace(*arguments)
    shapes, structure = jax.tree.flatten(traced.out_info)
    places = jax.tree.unflatten(structure, range(len(shapes)))
    is_trace = lambda x: isinstance(x, Trace)
    traces = [x for x in jax.tree.leaves(places, is_leaf=is_trace) if is_trace(x)]
    outputs, steps = [jnp.zeros(x.shape, x.dtype) for x in shapes], None
    for path, i in jax.tree.leaves_with_path(places):
        if getattr(path[-1] if path else None, "key", None) in COST_STATS:
            outputs[i] = ledger(traced.jaxpr, i)
    for trace in traces:
        steps = shapes[trace.stats["trusted"]].shape[-1]
    return Plan(
        0,
        count_jaxpr_flops(traced.jaxpr),
        memory_from_compiled(traced.lower().compile()),
        steps if len(traces) == 1 else None,
        jax.tree.unflatten(structure, outputs),
    )


def ledger(closed: Any, output: int) -> Array:
    """A cost that no input moves, or a column of a trace, by the step's number alone.

    NaN where they depend on more, such as on the iterations that a solve made.
    """
    jaxpr = closed.jaxpr
    aval = jaxpr.outvars[output].aval
    unknown = jnp.full(aval.shape, jnp.nan, float)
    is_wanted = [i == output for i in range(len(jaxpr.outvars))]
    needed, used = partial_eval.dce_jaxpr(jaxpr, is_wanted)
    if not any(used):
        return jaxpr_as_fun(closed.replace(jaxpr=needed))()[0]
    found = origin(jaxpr, jaxpr.outvars[output])
    if isinstance(found, int) or found[0].primitive.name != "while":
        return unknown
    loop, place = found
    body, skipped = loop.params["body_jaxpr"], loop.params["body_nconsts"]
    wanted = [i == place for i in range(len(body.jaxpr.outvars))]
    needed, used = partial_eval.dce_jaxpr(body.jaxpr, wanted)
    counts = lambda variable: jnp.issubdtype(variable.aval.dtype, jnp.integer)
    own = body.jaxpr.invars[skipped + place]
    inputs = [x for x, is_used in zip(body.jaxpr.invars, used, strict=True) if is_used]
    if not all(variable is own or counts(variable) for variable in inputs):
        return unknown
    once = jaxpr_as_fun(body.replace(jaxpr=needed))

    def step(i: Array, column: Array) -> Array:
        values = [
            column if x is own else jnp.full(x.aval.shape, i, x.aval.dtype)
            for x in inputs
        ]
        return once(*values)[0]

    return jax.lax.fori_loop(0, aval.shape[-1], step, jnp.zeros(aval.shape, aval.dtype))


def origin(jaxpr: Any, variable: Any) -> int | tuple[Any, int]:
    """The equation that makes a variable, within calls, and as which of its outputs.

    An integer is the place of an input that it is, -1 if it is a constant.
    """
    for equation in jaxpr.eqns:
        if variable in equation.outvars:
            place, inner = equation.outvars.index(variable), called_jaxpr(equation)
            if equation.primitive.name == "device_put":
                return origin(jaxpr, equation.invars[place])
            if inner is None or equation.primitive.name == "while":
                return equation, place
            found = origin(inner, inner.outvars[place])
            if isinstance(found, int):
                return origin(jaxpr, equation.invars[found])
            return found
    return jaxpr.invars.index(variable) if variable in jaxpr.invars else -1


# What the command shows of it.

HEAD = ("method", "program", "calls", "FLOPs", "temporary bytes", "peak bytes")
COSTS = {"gradient_equivalents": "grad-eq", "tuning_cost": "tuning grad-eq"}
TOLERANCE, UNKNOWN = "by tolerance", "-"
NO_PROGRAM = "no program of its own"


def report(study: Study, methods: Sequence[str]) -> str:
    """Markdown: the programs of one row of each method, and what they would cost."""
    columns, rows = (*HEAD, *COSTS.values()), []
    notes: dict[str, list[str]] = {}  # each note, and the methods that it is about
    for method in methods:
        found, plans = rehearsed(study, method)
        if not plans:
            notes.setdefault(NO_PROGRAM, []).append(method)
        costs = [cost(found, name) for name in COSTS]
        for program, one in plans.items():
            name, total = program.name, one.total
            if total is None:
                notes.setdefault(f"{name}: {one.by_iteration}", []).append(method)
            if one.flops.unknown:
                unpriced = ", ".join(one.flops.unknown)
                note = f"{name}: not among the FLOPs: {unpriced}"
                notes.setdefault(note, []).append(method)
            rows.append(
                (
                    *(method, name),
                    TOLERANCE if math.isnan(one.calls) else f"{one.calls:.0f}",
                    TOLERANCE if total is None else f"{total:.3g}",
                    *(f"{n:,}" for n in (one.memory.temporaries, one.memory.peak)),
                    *costs,
                )
            )
            costs = [""] * len(costs)
    line = lambda cells: "| " + " | ".join(cells) + " |"
    table = [line(columns), "|" + "---|" * len(columns), *map(line, rows)]
    about = (
        f"{study.name}: one row of each method, seed 0, compiled and not run. FLOPs "
        "and bytes are those of one call; grad-eq are the gradient-equivalents that a "
        "run's ledger counts, of what chose its settings under 'tuning'."
    )
    below = [f"- {'; '.join(several)}: {note}" for note, several in notes.items()]
    return "\n".join([about, "", *table, "", *below])


def rehearsed(study: Study, method: str) -> tuple[dict[str, Any], Plans]:
    """The row, of zeros and its ledger."""
    with rehearsal() as plans:
        return study.methods[method](0), plans


def cost(found: dict[str, Any], name: str) -> str:
    """NaN is what a tolerance decides; a row that learns nothing has no cost."""
    value = found.get(name)
    if value is None:
        return UNKNOWN
    return TOLERANCE if math.isnan(value) else f"{value:.0f}"
