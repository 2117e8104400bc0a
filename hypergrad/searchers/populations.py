"""Searchers that train many ``w`` side by side: who is poor is replaced, or dropped.

`search` hands them the problem, since what a trial costs depends on where it goes on
from. Their solver is one that goes step by step, such as `Descent`.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from .. import spaces
from ..checks import check_solver
from ..cost import ledger
from ..estimators.protocol import make_stats
from ..inner.protocol import IterativeSolver
from ..metrics import Metric, Progress
from ..problem import Bilevel, Data, whole
from ..settings import check_steps, number
from ..trace import FAILED, Trace
from ..trees import all_finite


class Members(eqx.Module):
    """Carries of the solver, ``w`` first, and their ``alpha``: a leading axis."""

    carry: tuple[PyTree, PyTree]
    alpha: PyTree

    def take(self, index: Array) -> "Members":
        """Some of them, bit for bit."""
        return jax.tree.map(lambda x: x[index], self)


class Rows(NamedTuple):
    """What the trace holds of each member of a round, a leading axis."""

    value: Array
    stats: dict[str, Array]
    metrics: dict[str, Array]


class Trained(NamedTuple):
    """What a round leaves: its members, with ``take``, and a row for each of them.

    The metric ``steps`` says how many steps were made for a member in all.
    """

    members: Any
    rows: Rows


class Setting(eqx.Module):
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
            data, _ = self.problem.data(data_key)
            w = self.problem.initial(self.w, alpha)
            loss = self.problem.inner_loss
            return Members(self.solver.init(loss, w, alpha, data, init_key), alpha)

        return jax.vmap(one)(jax.random.split(key, size))

    def trained(
        self, members: Members, num_steps: int, key: Array, made: int, **labels: Array
    ) -> Trained:
        """So many steps of every member, which will have made ``made`` in all."""
        members, rows = self.train(spread(members), num_steps, key)
        labels = {"steps": jnp.full(rows.value.shape, float(made)), **labels}
        return Trained(members, rows._replace(metrics=rows.metrics | labels))

    @eqx.filter_jit
    def train(
        self, members: Members, num_steps: int, key: Array
    ) -> tuple[Members, Rows]:
        """So many steps of every member, and its outer value then."""

        def one(member: Members, key: Array) -> tuple[Members, Rows]:
            data_key, steps_key, judge_key = jax.random.split(key, 3)
            data, outer_data = self.problem.data(data_key)
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
    ) -> Rows:
        """The row of one member that has just made so many steps."""
        outer_key, metric_key = jax.random.split(key)
        value = self.problem.outer(w, alpha, whole(outer_data, outer_key))
        costs = self._costs(data, outer_data, num_steps)
        stats = make_stats(all_finite(value, w), inner_steps=num_steps, **costs)
        metrics = {
            name: jnp.asarray(metric(w, alpha, metric_key), dtype=float)
            for name, metric in self.metrics.items()
        }
        return Rows(value, stats, metrics)

    def cost(self, size: int, num_steps: int) -> float:
        """Gradient-equivalents of training so many members."""
        step, value = self.equivalents
        return size * (num_steps * step + value)

    def _costs(self, data: Data, outer_data: Data, num_steps: int) -> dict[str, Array]:
        """The steps, and one outer value."""
        calls = {name: num_steps * each for name, each in self.step_cost.items()}
        return ledger(data, outer_data, num_outer_values=1.0, **calls)


def step_cost(
    problem: Bilevel, solver: IterativeSolver, w: PyTree, alpha: PyTree
) -> dict[str, float]:
    """Calls a step, in passes over all inner data."""
    calls = _solve_cost(problem, solver, w, alpha, jax.random.key(0))
    names = ("num_grads", "num_hvps", "num_values")
    return {name: float(calls[name]) / solver.num_steps for name in names}


def equivalents(problem: Bilevel, step_cost: dict[str, float]) -> tuple[float, float]:
    """Gradient-equivalents of a step and of an outer value; shapes are read alone."""
    shapes = eqx.filter_eval_shape(lambda key: problem.data(key), jax.random.key(0))
    of = lambda **calls: float(ledger(*shapes, **calls)["gradient_equivalents"])
    return of(**step_cost), of(num_outer_values=1.0)


@eqx.filter_jit
def _solve_cost(problem, solver, w, alpha, key):
    """Stats of a solve; where they are constants, nothing is solved."""
    data, _ = problem.data(key)
    start = problem.initial(w, alpha)
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
    check_steps("num_steps", solver.num_steps)


class Populations(Protocol):
    """Rounds of members trained side by side, each a function of the one before it."""

    def cost(self, setting: Setting, index: int) -> float:
        """Gradient-equivalents of round number ``index``."""
        ...

    def round(
        self, setting: Setting, index: int, before: Trained | None, key: Array
    ) -> Trained:
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


class Course(NamedTuple):
    """A search so far: all that it leaves, and all that it takes to go on."""

    rounds: int
    spent: float
    best: Best
    last: Trained
    rows: Rows

    @classmethod
    def begun(cls, found: Trained, cost: float) -> "Course":
        """After the first round."""
        return cls(1, cost, best_of(found), found, found.rows)

    def after(self, found: Trained, cost: float) -> "Course":
        """After one more round."""
        new = best_of(found)
        better = new.merit() > self.best.merit()
        rows = jax.tree.map(lambda *x: np.concatenate(x), self.rows, found.rows)
        best = new if better else self.best
        return Course(self.rounds + 1, self.spent + cost, best, found, rows)


def best_of(found: Trained) -> Best:
    """Of one round; a value that is not finite counts as infinite."""
    first = ranked(found.rows.value)[0]
    value, member = found.rows.value[first], found.members.take(first)
    value = jnp.where(jnp.isfinite(value), value, jnp.inf)
    steps = found.rows.metrics["steps"][first]
    return Best(steps, value, member.carry[0], member.alpha)


def run(
    searcher: Populations,
    setting: Setting,
    budget: float,
    key: Array,
    progress: Progress | None,
    record: Callable[[dict], None] | None,
    trials: Sequence[dict],
) -> Trace:
    """Rounds while the budget pays for them; at least one."""
    name, course = described(searcher, setting, key), None
    searcher, setting, key = replicated((searcher, setting, key))
    if len(trials):
        first = lambda: Course.begun(searcher.round(setting, 0, None, key), 0.0)
        form = eqx.filter_eval_shape(first)
        course = restored(trials[-1], form, name)
    while True:
        index, spent = (course.rounds, course.spent) if course else (0, 0.0)
        cost = searcher.cost(setting, index)
        if course and spent + cost > budget:
            break
        found = searcher.round(setting, index, course.last if course else None, key)
        course = course.after(found, cost) if course else Course.begun(found, cost)
        if record is not None:
            record(recorded(course, name))
        if progress is not None:
            progress(course.rounds, float(course.best.value))
    best, rows = course.best, jax.tree.map(jnp.asarray, course.rows)
    status = jnp.where(jnp.isfinite(best.value), 0, FAILED)
    return Trace(best.alpha, best.w, best.alpha, *rows, status_code=status)


def described(searcher: Populations, setting: Setting, key: Array) -> str:
    """Whose rounds they are; of its numbers and those of space and ``w`` a digest."""
    digest = hashlib.sha256()
    for x in map(_plain, jax.tree.leaves((searcher, setting.space, setting.w))):
        digest.update(f"{x.dtype} {x.shape} ".encode() + x.tobytes())
    space = eqx.tree_pformat(setting.space, width=10**6)
    return (
        f"{searcher} of {setting.solver.num_steps} steps in {space}, key "
        f"{_plain(key).tolist()}, numbers and w {digest.hexdigest()[:16]}"
    )


# What of a `Course` has a leading axis of as many as there were.
ROW_A_MEMBER = ("rows", "last.rows", "last.members.alpha", "last.members.carry")


def recorded(course: Course, name: str) -> dict:
    """A course as a dict of arrays, ``name`` saying whose it is."""
    leaves = jax.tree.leaves_with_path(course)
    return {"search": np.asarray(name)} | {_name(path): _plain(x) for path, x in leaves}


def restored(known: dict, form: Course, name: str) -> Course:
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
    found = [_like(x, known[_name(path)], _name(path)) for path, x in leaves]
    return structure.unflatten(found)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(getattr(x, "dtype", float), jax.dtypes.prng_key)


def _plain(x: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if _is_key(x) else x)


def _like(form: Any, known: Any, name: str) -> Any:
    """What was recorded of a leaf; where it has a row a member, how many may differ."""
    if isinstance(form, int | float):
        return type(form)(known)
    known = np.asarray(known)
    if _is_key(form):
        implementation = jax.random.key_impl(jnp.empty((), form.dtype))
        known = jax.random.wrap_key_data(jnp.asarray(known), impl=implementation)
    free = known.ndim > 0 and name.startswith(ROW_A_MEMBER)
    if known.shape != (known.shape[:1] + form.shape[1:] if free else form.shape):
        raise ValueError(
            f"trials[-1] holds a {name} of shape {known.shape}, but that of this "
            f"search is {form.shape}; pass the same problem, solver and space"
        )
    if _is_key(form):
        return known
    # np.load knows no bfloat16, and gives the bytes of one.
    known = known.view(form.dtype) if known.dtype.kind == "V" else known
    return jnp.asarray(known, form.dtype)


def ranked(value: Array) -> Array:
    """Indices from the lowest value to the highest; last what is not finite."""
    return jnp.argsort(jnp.where(jnp.isfinite(value), value, jnp.inf))


def spread(members: PyTree) -> PyTree:
    """Over the devices, where they divide the members; one program all the same."""
    size, devices = len(jax.tree.leaves(members)[0]), jax.devices()
    if len(devices) == 1 or size % len(devices):
        return members
    mesh = Mesh(np.array(devices), ("members",))
    return jax.device_put(members, NamedSharding(mesh, PartitionSpec("members")))


def replicated(shared: PyTree) -> PyTree:
    """On all devices, as what members share; what lies on all already stays there."""
    devices = jax.devices()
    if len(devices) == 1:
        return shared
    everywhere = NamedSharding(Mesh(np.array(devices), ("members",)), PartitionSpec())

    def place(x: Any) -> Any:
        whole = not eqx.is_array(x) or len(x.devices()) == len(devices)
        return x if whole else jax.device_put(x, everywhere)

    return jax.tree.map(place, shared)


class PopulationBased(eqx.Module):
    """Population-based training: the worst go on from the best, and vary ``alpha``.

    In a round every member makes the solver's ``num_steps`` steps from where it was,
    the optimizer's state included. Each of the worst ``share`` then takes ``w``, that
    state and ``alpha`` of one of the best ``share``, drawn at random, and every number
    of its ``alpha`` moves by ``perturbation``, up or down, in the space's unconstrained
    ``u``. In an `Interval`, of logarithms if ``log``, ``u`` is the logit of the place
    ``t``, which moves by about ``perturbation t (1 - t)`` of the length: a twentieth in
    the middle, less towards the bounds, which are never passed. The paper's is a factor
    of 1.2 or 0.8, the same anywhere.

    Args:
      size: of the population, static.
      share: of it that is replaced, in (0, 1/2], static.
      perturbation: of ``u``.

    Raises:
      ValueError: `Integer` or `Choice` in the space, before the first round.

    A row of the trace is a member of a round; the metric ``parent`` says from which
    member of the round before it went on, ``steps`` how many were made by then.
    ``best_alpha`` is the best of the last round in which a value is finite. ``alpha``
    changes along a run, so that ``w`` belongs to all of its course: trained anew at
    ``best_alpha`` it may be worse.

    Budget: 200 gradient-equivalents for a value within 0.01, of 16 members and rounds
    of 5 steps (see `hypergrad.searchers`).

    Cost: ``size`` times the steps and an outer value a round. Memory: ``size`` carries;
    one program under ``vmap``, spread over the devices where they divide ``size``.

    Source: Jaderberg et al. 2017 (arXiv 1711.09846).

    >>> import jax, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: (w - alpha) ** 2
    >>> outer = lambda w, alpha, batch: (w - 0.5) ** 2
    >>> trace = hg.search(
    ...     hg.Bilevel(inner, outer), hg.Descent(optax.sgd(0.5), 1),
    ...     hg.searchers.PopulationBased(8), 0.0,
    ...     space=hg.spaces.Unit(), budget=200, key=jax.random.key(0),
    ... )
    >>> bool(abs(trace.best_alpha - 0.5) < 0.1)
    True
    """

    size: int = eqx.field(static=True)
    share: float = eqx.field(default=0.25, static=True)
    perturbation: Array | float = eqx.field(
        default=0.2, converter=number("perturbation", optional=False)
    )

    citations = ("jaderberg2017",)

    def __check_init__(self):
        check_steps("size", self.size, least=2)
        if not 0 < self.share <= 0.5:
            raise ValueError(f"share must be in (0, 1/2]; got {self.share!r}")

    def cost(self, setting: Setting, index: int) -> float:
        """That of any other."""
        del index
        return setting.cost(self.size, setting.solver.num_steps)

    def round(
        self, setting: Setting, index: int, before: Trained | None, key: Array
    ) -> Trained:
        """All members, the poor of the round before replaced."""
        begin_key, train_key = jax.random.split(jax.random.fold_in(key, index))
        if before is None:
            _refuse_cells(setting.space)
            members = setting.start(self.size, begin_key)
            parents = jnp.arange(self.size)
        else:
            members, parents = self.replaced(
                setting.space, before.members, before.rows.value, begin_key
            )
        num_steps = setting.solver.num_steps
        made = (index + 1) * num_steps
        return setting.trained(members, num_steps, train_key, made, parent=parents)

    @eqx.filter_jit
    def replaced(
        self, space: PyTree, members: Members, value: Array, key: Array
    ) -> tuple[Members, Array]:
        """Where the next round begins, and from whom each member goes on."""
        draw_key, move_key = jax.random.split(key)
        order, count = ranked(value), max(1, int(self.share * self.size))
        best, worst = order[:count], order[-count:]
        parents = jnp.arange(self.size)
        parents = parents.at[worst].set(jax.random.choice(draw_key, best, (count,)))
        members, poor = members.take(parents), members.take(parents).alpha
        moved = jax.vmap(functools.partial(self._moved, space))(
            jax.tree.map(lambda x: x[worst], poor), jax.random.split(move_key, count)
        )
        alpha = jax.tree.map(lambda x, y: x.at[worst].set(y), members.alpha, moved)
        return Members(members.carry, alpha), parents

    def _moved(self, space: PyTree, alpha: PyTree, key: Array) -> PyTree:
        u, unravel = jax.flatten_util.ravel_pytree(spaces.inverse(space, alpha))
        sign = jax.random.rademacher(key, u.shape, u.dtype)
        u = unravel(u + jnp.asarray(self.perturbation, u.dtype) * sign)
        return spaces.forward(space, spaces.project(space, u))


def _refuse_cells(space: PyTree) -> None:
    """An integer or a choice does not move by a little."""
    if any(axis.num_values is not None for axis in spaces.axes(space)):
        raise ValueError(
            "PopulationBased moves alpha by a little, which Integer and Choice cannot; "
            "use hg.searchers.SuccessiveHalving(size), Hyperband(), OneShot(size) or "
            "TPE()"
        )


class SuccessiveHalving(eqx.Module):
    """Train ``size`` draws a little, keep the best ``1 / eta``, train those further.

    The last rung reaches the solver's ``num_steps``, each one before it ``1 / eta`` of
    the next; those that are kept go on from where they were, the optimizer's state
    included. Another ``size`` draws follow while the budget lasts.

    Args:
      size: of the first rung, static; ``1 + floor(log_eta(size))`` rungs,
        but for those that would make no step.
      eta: static, at least 2.

    A row of the trace is a member of a rung; ``inner_steps`` are those it made there,
    the metric ``steps`` those it had made by then. ``best_alpha`` is the best of those
    that were trained longest, of all whose value is finite.

    Budget: 600 gradient-equivalents for a value within 0.01, of 27 draws and at most 27
    steps (see `hypergrad.searchers`).

    Cost: about ``num_steps * size / eta^k`` gradients a rung, the first of ``k + 1``
    rungs included. Memory: ``size`` carries; one program a rung under ``vmap``.

    Source: Jamieson & Talwalkar 2016.

    >>> import jax, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: (w - alpha) ** 2
    >>> outer = lambda w, alpha, batch: (w - 0.5) ** 2
    >>> trace = hg.search(
    ...     hg.Bilevel(inner, outer), hg.Descent(optax.sgd(0.5), 16),
    ...     hg.searchers.SuccessiveHalving(16, eta=2), 0.0,
    ...     space=hg.spaces.Unit(), budget=100, key=jax.random.key(0),
    ... )
    >>> trace.metrics["steps"].max().item(), bool(abs(trace.best_alpha - 0.5) < 0.1)
    (16.0, True)
    """

    size: int = eqx.field(static=True)
    eta: int = eqx.field(default=3, static=True)

    citations = ("jamieson2016",)

    def __check_init__(self):
        check_steps("size", self.size)
        check_steps("eta", self.eta, least=2)

    def rungs(self, num_steps: int) -> list["Rung"]:
        """Those of a bracket."""
        last = whole_log(self.size, self.eta)
        return bracket(self.size, last, self.eta, num_steps)

    def cost(self, setting: Setting, index: int) -> float:
        """That of a rung."""
        return rung_cost(self.rungs(setting.solver.num_steps), setting, index)

    def round(
        self, setting: Setting, index: int, before: Trained | None, key: Array
    ) -> Trained:
        """A rung, bracket by bracket."""
        rungs = self.rungs(setting.solver.num_steps)
        return climb(rungs, setting, index, before, key)


class Hyperband(eqx.Module):
    """Successive halving at every trade of draws for steps, in turns.

    With ``R`` the solver's ``num_steps`` and ``s = floor(log_eta R), ..., 1, 0``, a
    bracket of ``ceil((s_max + 1) eta^s / (s + 1))`` draws begins with ``R / eta^s``
    steps; the last is random search. They begin anew while the budget lasts.

    Args:
      eta: static, at least 2.

    Budget: 1000 gradient-equivalents for a value within 0.01, of at most 27 steps (see
    `hypergrad.searchers`).

    Cost, memory and rows: those of `SuccessiveHalving`; all brackets once are about
    ``(s_max + 1)² R`` gradients.

    Source: Li et al. 2018 (arXiv 1603.06560).

    >>> import jax, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: (w - alpha) ** 2
    >>> outer = lambda w, alpha, batch: (w - 0.5) ** 2
    >>> trace = hg.search(
    ...     hg.Bilevel(inner, outer), hg.Descent(optax.sgd(0.25), 9),
    ...     hg.searchers.Hyperband(), 0.0,
    ...     space=hg.spaces.Unit(), budget=250, key=jax.random.key(0),
    ... )
    >>> bool(abs(trace.best_alpha - 0.5) < 0.1)
    True
    """

    eta: int = eqx.field(default=3, static=True)

    citations = ("li2018",)

    def __check_init__(self):
        check_steps("eta", self.eta, least=2)

    def rungs(self, num_steps: int) -> list["Rung"]:
        """Those of all brackets, one after the other."""
        most = whole_log(num_steps, self.eta)
        sizes = {
            last: math.ceil((most + 1) * self.eta**last / (last + 1))
            for last in range(most, -1, -1)
        }
        return [
            rung
            for last, size in sizes.items()
            for rung in bracket(size, last, self.eta, num_steps)
        ]

    def cost(self, setting: Setting, index: int) -> float:
        """That of a rung."""
        return rung_cost(self.rungs(setting.solver.num_steps), setting, index)

    def round(
        self, setting: Setting, index: int, before: Trained | None, key: Array
    ) -> Trained:
        """A rung, bracket by bracket."""
        rungs = self.rungs(setting.solver.num_steps)
        return climb(rungs, setting, index, before, key)


def whole_log(number: int, base: int) -> int:
    """``floor(log_base(number))``, without rounding."""
    power = 0
    while base ** (power + 1) <= number:
        power += 1
    return power


class Rung(NamedTuple):
    """``size`` members go on from ``begin`` steps to ``end``."""

    size: int
    begin: int
    end: int


def bracket(size: int, last: int, eta: int, num_steps: int) -> list[Rung]:
    """Rungs 0 to ``last``; a member of rung ``i`` has made ``R / eta^(last - i)``.

    At least one, and none is a rung that would make no step.

    >>> [tuple(rung) for rung in bracket(9, 2, 3, 27)]
    [(9, 0, 3), (3, 3, 9), (1, 9, 27)]
    >>> [tuple(rung) for rung in bracket(81, 4, 3, 5)]
    [(81, 0, 1), (1, 1, 5)]
    """
    ends = [max(1, num_steps // eta ** (last - i)) for i in range(last + 1)]
    sizes = [max(1, size // eta**i) for i in range(last + 1)]
    rungs = map(Rung, sizes, [0, *ends], ends)
    return [rung for rung in rungs if rung.end > rung.begin]


def rung_cost(rungs: list[Rung], setting: Setting, index: int) -> float:
    """Of round number ``index``; after the last rung comes the first."""
    rung = rungs[index % len(rungs)]
    return setting.cost(rung.size, rung.end - rung.begin)


def climb(
    rungs: list[Rung],
    setting: Setting,
    index: int,
    before: Trained | None,
    key: Array,
) -> Trained:
    """Trains fresh draws, or the best of the rung before, to the end of their rung."""
    rung = rungs[index % len(rungs)]
    start_key, train_key = jax.random.split(jax.random.fold_in(key, index))
    if before is None or not rung.begin:
        members = setting.start(rung.size, start_key)
    else:
        members = before.members.take(ranked(before.rows.value)[: rung.size])
    return setting.trained(members, rung.end - rung.begin, train_key, rung.end)
