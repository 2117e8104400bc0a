"""Many ``w`` trained side by side, round by round: what such searchers share.

`search` hands them the problem, since what a trial costs depends on where it goes on
from. Their solver is one that goes step by step, such as `Descent`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .. import spaces
from ..cost import cost_stats
from ..estimators.base import make_stats
from ..inner.base import IterativeSolver
from ..problem import Bilevel, Data, full_batch
from ..recording import Metric, Progress
from ..runtime.devices import replicate, shard
from ..runtime.fingerprint import digest, digest_function, fingerprint
from ..trace import FAILED, Trace
from ..trees import all_finite, is_key, to_numpy
from ..validation import check_positive_int, check_solver


class Members(eqx.Module):
    """Carries of the solver, ``w`` first, and their ``alpha``: a leading axis."""

    carry: tuple[PyTree, PyTree]
    alpha: PyTree

    def take(self, index: Array) -> "Members":
        """Some of them, bit for bit."""
        return jax.tree.map(lambda x: x[index], self)


class MemberRecords(NamedTuple):
    """What the trace holds of each member of a round, a leading axis."""

    value: Array
    stats: dict[str, Array]
    metrics: dict[str, Array]


class RoundResult(NamedTuple):
    """What a round leaves: its members, with ``take``, and a row for each of them.

    The metric ``steps`` says how many steps were made for a member in all.
    """

    members: Any
    rows: MemberRecords


class PopulationConfig(eqx.Module):
    """What all members share.

    ``step_cost`` holds the calls of one step: what ``solve`` reports, over its steps;
    ``equivalents`` those of a step and of an outer value in gradients.
    """

    problem: Bilevel
    solver: IterativeSolver
    metrics: dict[str, Metric] = eqx.field(static=True)
    w: PyTree
    space: PyTree
    step_cost: dict[str, float] = eqx.field(static=True)
    equivalents: tuple[float, float] = eqx.field(static=True)

    @eqx.filter_jit
    def start(self, size: int, key: Array) -> Members:
        """Draws from the space, each before its first step."""

        def one(key: Array) -> Members:
            alpha_key, data_key, init_key = jax.random.split(key, 3)
            alpha = spaces.sample(self.space, alpha_key)
            data, _ = self.problem.sample_data(data_key)
            w = self.problem.init_inner(self.w, alpha)
            loss = self.problem.inner_loss
            return Members(self.solver.init(loss, w, alpha, data, init_key), alpha)

        return jax.vmap(one)(jax.random.split(key, size))

    def trained(
        self, members: Members, num_steps: int, key: Array, made: int, **labels: Array
    ) -> RoundResult:
        """So many steps of every member, which will have made ``made`` in all."""
        members, rows = self.train(shard_members(members), num_steps, key)
        labels = {"steps": jnp.full(rows.value.shape, float(made)), **labels}
        return RoundResult(members, rows._replace(metrics=rows.metrics | labels))

    @eqx.filter_jit
    def train(
        self, members: Members, num_steps: int, key: Array
    ) -> tuple[Members, MemberRecords]:
        """So many steps of every member, and its outer value then."""

        def one(member: Members, key: Array) -> tuple[Members, MemberRecords]:
            data_key, steps_key, judge_key = jax.random.split(key, 3)
            data, outer_data = self.problem.sample_data(data_key)
            alpha, loss = member.alpha, self.problem.inner_loss
            step = lambda carry, key: (
                self.solver.step(loss, carry, alpha, data, key),
                None,
            )
            keys = jax.random.split(steps_key, num_steps)
            carry, _ = jax.lax.scan(step, member.carry, keys)
            rows = self.judged(carry[0], alpha, num_steps, data, outer_data, judge_key)
            return Members(carry, alpha), rows

        size = len(jax.tree.leaves(members)[0])
        return jax.vmap(one)(members, jax.random.split(key, size))

    def judged(
        self,
        w: PyTree,
        alpha: PyTree,
        num_steps: int,
        data: Data,
        outer_data: Data,
        key: Array,
    ) -> MemberRecords:
        """The row of one member that has just made so many steps."""
        outer_key, metric_key = jax.random.split(key)
        value = self.problem.outer_value(w, alpha, full_batch(outer_data, outer_key))
        costs = self._costs(data, outer_data, num_steps)
        stats = make_stats(all_finite(value, w), num_inner_steps=num_steps, **costs)
        metrics = {
            name: jnp.asarray(metric(w, alpha, metric_key), dtype=float)
            for name, metric in self.metrics.items()
        }
        return MemberRecords(value, stats, metrics)

    def cost(self, size: int, num_steps: int) -> float:
        """Gradient-equivalents of training so many members."""
        step, value = self.equivalents
        return size * (num_steps * step + value)

    def _costs(self, data: Data, outer_data: Data, num_steps: int) -> dict[str, Array]:
        """The steps, and one outer value."""
        calls = {name: num_steps * each for name, each in self.step_cost.items()}
        return cost_stats(data, outer_data, num_outer_values=1.0, **calls)


def step_cost(
    problem: Bilevel, solver: IterativeSolver, w: PyTree, alpha: PyTree
) -> dict[str, float]:
    """Calls a step, in passes over all inner data."""
    calls = _solve_cost(problem, solver, w, alpha, jax.random.key(0))
    names = ("num_grads", "num_hvps", "num_values")
    return {name: float(calls[name]) / solver.num_steps for name in names}


def equivalents(problem: Bilevel, step_cost: dict[str, float]) -> tuple[float, float]:
    """Gradient-equivalents of a step and of an outer value; shapes are read alone."""
    shapes = eqx.filter_eval_shape(
        lambda key: problem.sample_data(key), jax.random.key(0)
    )
    of = lambda **calls: float(cost_stats(*shapes, **calls)["gradient_equivalents"])
    return of(**step_cost), of(num_outer_values=1.0)


@eqx.filter_jit
def _solve_cost(problem, solver, w, alpha, key):
    """Stats of a solve; where they are constants, nothing is solved."""
    data, _ = problem.sample_data(key)
    start = problem.init_inner(w, alpha)
    return solver.solve(problem.inner_loss, start, alpha, data, key)[1]


def check_solver_steps(solver: Any) -> None:
    """Refuses a solver that cannot go on from a carry, step by step."""
    check_solver(solver)
    parts = ("init", "step", "num_steps")
    lacking = [name for name in parts if not hasattr(solver, name)]
    if lacking:
        raise TypeError(
            "searchers that train a population go on step by step, so that their "
            "solver needs init, step and num_steps, as hg.Descent(optimizer, "
            f"num_steps) has; {type(solver).__name__} lacks {', '.join(lacking)}"
        )
    check_positive_int("num_steps", solver.num_steps)


class PopulationSearcher(Protocol):
    """Rounds of members trained side by side, each a function of the one before it."""

    def cost(self, setting: PopulationConfig, index: int) -> float:
        """Gradient-equivalents of round number ``index``."""
        ...

    def round(
        self,
        setting: PopulationConfig,
        index: int,
        before: RoundResult | None,
        key: Array,
    ) -> RoundResult:
        """Round number ``index``; the first one has none before it.

        The key is that of the search: the same one in all of its rounds.
        """
        ...


class Best(NamedTuple):
    """Of members with a finite value one that was trained longest, then the lowest."""

    steps: Array
    value: Array
    w: PyTree
    alpha: PyTree

    def merit(self) -> tuple[bool, float, float]:
        """A failed one comes last, however long it was trained."""
        value = float(self.value)
        return math.isfinite(value), float(self.steps), -value


class PopulationState(NamedTuple):
    """A search so far: all that it leaves, and all that it takes to go on."""

    rounds: int
    spent: float
    best: Best
    last: RoundResult
    rows: MemberRecords

    @classmethod
    def begun(cls, found: RoundResult, cost: float) -> "PopulationState":
        """After the first round."""
        return cls(1, cost, best_member(found), found, found.rows)

    def after(self, found: RoundResult, cost: float) -> "PopulationState":
        """After one more round."""
        new = best_member(found)
        better = new.merit() > self.best.merit()
        rows = jax.tree.map(lambda *x: np.concatenate(x), self.rows, found.rows)
        best = new if better else self.best
        return PopulationState(self.rounds + 1, self.spent + cost, best, found, rows)


def best_member(found: RoundResult) -> Best:
    """Of one round; a value that is not finite counts as infinite."""
    first = rank_by_value(found.rows.value)[0]
    value, member = found.rows.value[first], found.members.take(first)
    value = jnp.where(jnp.isfinite(value), value, jnp.inf)
    steps = found.rows.metrics["steps"][first]
    return Best(steps, value, member.carry[0], member.alpha)


def run_rounds(
    searcher: PopulationSearcher,
    setting: PopulationConfig,
    budget: float,
    key: Array,
    progress: Progress | None,
    record: Callable[[dict], None] | None,
    trials: Sequence[dict],
) -> Trace:
    """Rounds while the budget pays for them; at least one."""
    name, course = "", None
    if record is not None or len(trials):
        name = describe_run(searcher, setting, key)
    searcher, setting, key = replicate_shared((searcher, setting, key))
    if len(trials):
        first = lambda: PopulationState.begun(
            searcher.round(setting, 0, None, key), 0.0
        )
        form = eqx.filter_eval_shape(first)
        course = state_from_dict(trials[-1], form, name)
    while True:
        index, spent = (course.rounds, course.spent) if course else (0, 0.0)
        cost = searcher.cost(setting, index)
        if course and spent + cost > budget:
            break
        found = searcher.round(setting, index, course.last if course else None, key)
        found = found._replace(rows=replicate(found.rows))
        course = (
            course.after(found, cost) if course else PopulationState.begun(found, cost)
        )
        if record is not None:
            record(state_to_dict(course, name))
        if progress is not None:
            progress(course.rounds, float(course.best.value))
    best, rows = course.best, jax.tree.map(jnp.asarray, course.rows)
    status = jnp.where(jnp.isfinite(best.value), 0, FAILED)
    return Trace(best.alpha, best.w, best.alpha, *rows, status_code=status)


def describe_run(
    searcher: PopulationSearcher, setting: PopulationConfig, key: Array
) -> str:
    """Whose rounds they are: of the numbers and of a member's program fingerprints."""
    first = lambda setting, key: setting.train(setting.start(1, key), 1, key)
    program = digest_function(first, setting, key)
    numbers = searcher, setting.problem, setting.solver, setting.w, setting.space
    space = eqx.tree_pformat(setting.space, width=10**6)
    return (
        f"{searcher} of {setting.solver.num_steps} steps in {space}, key "
        f"{to_numpy(key).tolist()}, metrics {sorted(setting.metrics)}, numbers, w and "
        f"data {fingerprint(digest(numbers))}, program {fingerprint(program)}"
    )


# What of a `Course` has a leading axis of as many as there were.
PER_MEMBER_FIELDS = ("rows", "last.rows", "last.members.alpha", "last.members.carry")


def state_to_dict(course: PopulationState, name: str) -> dict:
    """A course as a dict of arrays, ``name`` saying whose it is."""
    leaves = jax.tree.leaves_with_path(course)
    return {"search": np.asarray(name)} | {
        _name(path): to_numpy(x) for path, x in leaves
    }


def state_from_dict(known: dict, form: PopulationState, name: str) -> PopulationState:
    """The course from its dict, in the dtypes of a new one."""
    if str(known.get("search")) != name:
        raise ValueError(
            f"trials[-1] was recorded by {known.get('search')}, but this search is "
            f"{name}; pass what record was given by the same search"
        )
    leaves, structure = jax.tree.flatten_with_path(form)
    lacking = {_name(path) for path, _ in leaves} ^ (known.keys() - {"search"})
    if lacking:
        raise ValueError(
            "trials[-1] is no round of this search, which differs from it in "
            f"{', '.join(sorted(lacking))}; pass the same problem, solver and metrics"
        )
    found = {
        _name(path): _like(x, known[_name(path)], _name(path)) for path, x in leaves
    }
    for part in ("rows.", "last."):
        of = {n: len(x) for n, x in found.items() if n.startswith(part) and _free(n, x)}
        if len(set(of.values())) > 1:
            raise ValueError(
                f"trials[-1] is cut short: its arrays hold {of} members; pass what "
                "record was given"
            )
    return structure.unflatten(found.values())


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _free(name: str, known: Any) -> bool:
    """Whether a recorded leaf has a row a member."""
    return np.ndim(known) > 0 and name.startswith(PER_MEMBER_FIELDS)


def _like(form: Any, known: Any, name: str) -> Any:
    """What was recorded of a leaf; where it has a row a member, how many may differ."""
    known = np.asarray(known)
    if known.dtype.kind not in "biufV":
        raise ValueError(
            f"trials[-1] holds a {name} that is no number but {known.dtype}; pass what "
            "record was given"
        )
    if is_key(form):
        implementation = jax.random.key_impl(jnp.empty((), form.dtype))
        known = jax.random.wrap_key_data(jnp.asarray(known), impl=implementation)
    shape = np.shape(form)
    if known.shape != (known.shape[:1] + shape[1:] if _free(name, known) else shape):
        raise ValueError(
            f"trials[-1] holds a {name} of shape {known.shape}, but that of this "
            f"search is {shape}; pass the same problem, solver and space"
        )
    if isinstance(form, int | float):
        return type(form)(known)
    if is_key(form):
        return known
    # np.load knows no bfloat16, and gives the bytes of one.
    known = known.view(form.dtype) if known.dtype.kind == "V" else known
    return jnp.asarray(known, form.dtype)


def rank_by_value(value: Array) -> Array:
    """Indices from the lowest value to the highest; last what is not finite."""
    return jnp.argsort(jnp.where(jnp.isfinite(value), value, jnp.inf))


def shard_members(members: PyTree) -> PyTree:
    """Over the devices, where they divide the members; one program all the same."""
    size, count = len(jax.tree.leaves(members)[0]), jax.device_count()
    return members if count == 1 or size % count else shard(members, "members")


def replicate_shared(shared: PyTree) -> PyTree:
    """On all devices, as what members share; what lies on all already stays there."""
    count = jax.device_count()
    whole = lambda x: not eqx.is_array(x) or len(x.devices()) == count
    return jax.tree.map(lambda x: x if whole(x) else shard(x), shared)
