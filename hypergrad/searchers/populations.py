"""Searchers that train many ``w`` side by side: who is poor is replaced, or dropped.

`search` hands them the problem, since what a trial costs depends on where it goes on
from. They take `Descent` solvers, step by step.
"""

import functools
import math
from collections.abc import Generator
from typing import Any, NamedTuple, Protocol

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from .. import spaces
from ..cost import ledger
from ..estimators.protocol import make_stats
from ..inner.descent import Descent
from ..metrics import Metric, Progress
from ..problem import Bilevel, Data, fraction, whole
from ..settings import check_steps, number
from ..trace import Trace
from ..trees import all_finite


class Members(eqx.Module):
    """Carries of the solver, ``w`` first, and their ``alpha``: a leading axis."""

    carry: tuple[PyTree, PyTree]
    alpha: PyTree

    def take(self, index: Array) -> "Members":
        """Some of them, bit for bit."""
        return jax.tree.map(lambda x: x[index], self)


class Round(NamedTuple):
    """What is to be trained next.

    Attributes:
      members, num_steps, key: for `Setting.train`.
      made: steps that these members will have made in all.
      labels: further metrics of theirs.
    """

    members: Members
    num_steps: int
    key: Array
    made: int
    labels: dict[str, Array]


class Trained(NamedTuple):
    """Members after a round, and a row of the trace for each of them."""

    members: Members
    value: Array
    stats: dict[str, Array]
    metrics: dict[str, Array]


class Setting(eqx.Module):
    """What all members share."""

    problem: Bilevel
    solver: Descent
    metrics: dict[str, Metric] = eqx.field(static=True)
    w: PyTree
    space: PyTree

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

    @eqx.filter_jit
    def train(self, members: Members, num_steps: int, key: Array) -> Trained:
        """So many steps of every member, and its outer value then."""
        size = len(jax.tree.leaves(members)[0])
        keys = jax.random.split(key, size)
        return jax.vmap(functools.partial(self._train, num_steps))(members, keys)

    def _train(self, num_steps: int, member: Members, key: Array) -> Trained:
        data_key, steps_key, outer_key, metric_key = jax.random.split(key, 4)
        data, outer_data = self.problem.data(data_key)
        alpha, loss = member.alpha, self.problem.inner_loss
        step = lambda carry, key: (
            self.solver.step(loss, carry, alpha, data, key),
            None,
        )
        keys = jax.random.split(steps_key, num_steps)
        carry, _ = jax.lax.scan(step, member.carry, keys)
        value = self.problem.outer(carry[0], alpha, whole(outer_data, outer_key))
        costs = _costs(data, outer_data, num_steps)
        stats = make_stats(all_finite(value, carry[0]), inner_steps=num_steps, **costs)
        metrics = {
            name: jnp.asarray(metric(carry[0], alpha, metric_key), dtype=float)
            for name, metric in self.metrics.items()
        }
        return Trained(Members(carry, alpha), value, stats, metrics)

    def cost(self, size: int, num_steps: int) -> float:
        """Gradient-equivalents of training so many members."""
        costs = _costs(*self.problem.data(jax.random.key(0)), num_steps)
        return size * float(costs["gradient_equivalents"])


def _costs(data: Data, outer_data: Data, num_steps: int) -> dict[str, Array]:
    """A gradient a step, and one outer value."""
    num_grads = num_steps * fraction(data)
    return ledger(data, outer_data, num_grads=num_grads, num_outer_values=1.0)


def run(
    searcher: "Populations",
    setting: Setting,
    budget: float,
    key: Array,
    progress: Progress | None,
) -> Trace:
    """Rounds while the budget pays for them; at least one.

    ``alpha``, ``best_alpha`` and ``w`` of the trace are those of the lowest value among
    the members that were trained longest.
    """
    rounds = searcher.rounds(setting, key)
    due, rows, spent = next(rounds), [], 0.0
    longest, lowest, best = 0, math.inf, due.members
    while True:
        found = setting.train(due.members, due.num_steps, due.key)
        labels = {"steps": jnp.full(found.value.shape, float(due.made))} | due.labels
        first = ranked(found.value)[0]
        value = float(jnp.nan_to_num(found.value[first], nan=math.inf))
        if (due.made, -value) > (longest, -lowest):
            longest, lowest, best = due.made, value, found.members.take(first)
        rows.append(found._replace(members=None, metrics=found.metrics | labels))
        spent += setting.cost(len(found.value), due.num_steps)
        if progress is not None:
            progress(len(rows), lowest)
        due = rounds.send(found)
        size = len(jax.tree.leaves(due.members)[0])
        if spent + setting.cost(size, due.num_steps) > budget:
            break
    columns = jax.tree.map(lambda *cells: jnp.concatenate(cells), *rows)
    return Trace(
        best.alpha, best.carry[0], best.alpha,
        value=columns.value, stats=columns.stats, metrics=columns.metrics,
        status_code=jnp.asarray(0),
    )  # fmt: skip


def check_solver_steps(solver: Any) -> None:
    """They go on from an optimizer's state, and count a gradient a step."""
    if not isinstance(solver, Descent):
        raise TypeError(
            "searchers that train a population take hg.Descent(optimizer, num_steps); "
            f"got {type(solver).__name__}"
        )


def ranked(value: Array) -> Array:
    """Indices from the lowest value to the highest; NaN last."""
    return jnp.argsort(jnp.where(jnp.isnan(value), jnp.inf, value))


def spread(members: Members) -> Members:
    """Over the devices, where they divide the members; one program all the same."""
    size, devices = len(jax.tree.leaves(members)[0]), jax.devices()
    if len(devices) == 1 or size % len(devices):
        return members
    mesh = Mesh(np.array(devices), ("members",))
    return jax.device_put(members, NamedSharding(mesh, PartitionSpec("members")))


Rounds = Generator[Round, Trained, None]


class Populations(Protocol):
    """Rounds of members trained side by side."""

    def rounds(self, setting: Setting, key: Array) -> Rounds:
        """What to train next, from what was trained; without end."""
        ...


class PopulationBased(eqx.Module):
    """Population-based training: the worst go on from the best, and vary ``alpha``.

    In a round every member makes the solver's ``num_steps`` steps from where it was,
    the optimizer's state included. Each of the worst ``share`` then takes ``w``, that
    state and ``alpha`` of one of the best ``share``, drawn at random, and every number
    of its ``alpha`` moves by ``perturbation``, up or down, in the space's unconstrained
    ``u``: by a factor where it is positive.

    Args:
      size: of the population, static.
      share: of it that is replaced, in (0, 1/2], static.
      perturbation: of ``u``; the factors 1.2 and 0.8 of the paper are about 0.2.

    A row of the trace is a member of a round; the metric ``parent`` says from which
    member of the round before it went on, ``steps`` how many were made by then.
    ``best_alpha`` is the best of the last round. ``alpha`` changes along a run, so that
    ``w`` belongs to all of its course: trained anew at ``best_alpha`` it may be worse.

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

    def __check_init__(self):
        check_steps("size", self.size, least=2)
        if not 0 < self.share <= 0.5:
            raise ValueError(f"share must be in (0, 1/2]; got {self.share!r}")

    def rounds(self, setting: Setting, key: Array) -> Rounds:
        """One after the other, without end."""
        start_key, key = jax.random.split(key)
        members = spread(setting.start(self.size, start_key))
        parents, num_steps, made = jnp.arange(self.size), setting.solver.num_steps, 0
        while True:
            key, train_key, next_key = jax.random.split(key, 3)
            labels, made = {"parent": parents}, made + num_steps
            found = yield Round(members, num_steps, train_key, made, labels)
            members, parents = self.replaced(
                setting.space, found.members, found.value, next_key
            )

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


class SuccessiveHalving(eqx.Module):
    """Train ``size`` draws a little, keep the best ``1 / eta``, train those further.

    The last rung reaches the solver's ``num_steps``, each one before it ``1 / eta`` of
    the next; those that are kept go on from where they were, the optimizer's state
    included. Another ``size`` draws follow while the budget lasts.

    Args:
      size: of the first rung, static; ``1 + floor(log_eta(size))`` rungs.
      eta: static, at least 2.

    A row of the trace is a member of a rung; ``inner_steps`` are those it made there,
    the metric ``steps`` those it had made by then. ``best_alpha`` is the best of those
    that were trained longest.

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

    def __check_init__(self):
        check_steps("size", self.size)
        check_steps("eta", self.eta, least=2)

    def rounds(self, setting: Setting, key: Array) -> Rounds:
        """Rung by rung, bracket by bracket, without end."""
        while True:
            key, bracket_key = jax.random.split(key)
            last = whole_log(self.size, self.eta)
            yield from bracket(setting, self.size, self.eta, last, bracket_key)


class Hyperband(eqx.Module):
    """Successive halving at every trade of draws for steps, in turns.

    With ``R`` the solver's ``num_steps`` and ``s = floor(log_eta R), ..., 1, 0``, a
    bracket of ``ceil((s_max + 1) eta^s / (s + 1))`` draws begins with ``R / eta^s``
    steps; the last is random search. They begin anew while the budget lasts.

    Args:
      eta: static, at least 2.

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

    def __check_init__(self):
        check_steps("eta", self.eta, least=2)

    def rounds(self, setting: Setting, key: Array) -> Rounds:
        """Rung by rung, bracket by bracket, without end."""
        most = whole_log(setting.solver.num_steps, self.eta)
        while True:
            for last in range(most, -1, -1):
                key, bracket_key = jax.random.split(key)
                size = math.ceil((most + 1) * self.eta**last / (last + 1))
                yield from bracket(setting, size, self.eta, last, bracket_key)


def whole_log(number: int, base: int) -> int:
    """``floor(log_base(number))``, without rounding."""
    power = 0
    while base ** (power + 1) <= number:
        power += 1
    return power


def bracket(setting: Setting, size: int, eta: int, last: int, key: Array) -> Rounds:
    """Rungs 0 to ``last``; a member of rung ``i`` has made ``R / eta^(last - i)``."""
    start_key, *keys = jax.random.split(key, last + 2)
    members, made = setting.start(size, start_key), 0
    for rung, key in enumerate(keys):
        steps = max(1, setting.solver.num_steps // eta ** (last - rung))
        found = yield Round(spread(members), steps - made, key, steps, {})
        made, size = steps, max(1, size // eta)
        members = found.members.take(ranked(found.value)[:size])
