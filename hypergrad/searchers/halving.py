"""Populations whose poor members are dropped: steps are the fidelity."""

import math
from typing import NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array

from ..validation import check_positive_int
from .populations import PopulationConfig, RoundResult, rank_by_value


class SuccessiveHalving(eqx.Module):
    """Train ``size`` draws a little, keep the best ``1 / eta``, train those further.

    The last rung reaches the solver's ``num_steps``, each one before it ``1 / eta`` of
    the next; those that are kept go on from where they were, the optimizer's state
    included. Another ``size`` draws follow while the budget lasts.

    Args:
      size: of the first rung, static; ``1 + floor(log_eta(size))`` rungs,
        but for those that would make no step.
      eta: static, at least 2.

    A row of the trace is a member of a rung; ``num_inner_steps`` are those it made there,
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
        check_positive_int("size", self.size)
        check_positive_int("eta", self.eta, minimum=2)

    def rungs(self, num_steps: int) -> list["Rung"]:
        """Those of a bracket."""
        last = whole_log(self.size, self.eta)
        return bracket(self.size, last, self.eta, num_steps)

    def cost(self, setting: PopulationConfig, index: int) -> float:
        """That of a rung."""
        return rung_cost(self.rungs(setting.solver.num_steps), setting, index)

    def round(
        self,
        setting: PopulationConfig,
        index: int,
        before: RoundResult | None,
        key: Array,
    ) -> RoundResult:
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
        check_positive_int("eta", self.eta, minimum=2)

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

    def cost(self, setting: PopulationConfig, index: int) -> float:
        """That of a rung."""
        return rung_cost(self.rungs(setting.solver.num_steps), setting, index)

    def round(
        self,
        setting: PopulationConfig,
        index: int,
        before: RoundResult | None,
        key: Array,
    ) -> RoundResult:
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


def rung_cost(rungs: list[Rung], setting: PopulationConfig, index: int) -> float:
    """Of round number ``index``; after the last rung comes the first."""
    rung = rungs[index % len(rungs)]
    return setting.cost(rung.size, rung.end - rung.begin)


def climb(
    rungs: list[Rung],
    setting: PopulationConfig,
    index: int,
    before: RoundResult | None,
    key: Array,
) -> RoundResult:
    """Trains fresh draws, or the best of the rung before, to the end of their rung."""
    rung = rungs[index % len(rungs)]
    start_key, train_key = jax.random.split(jax.random.fold_in(key, index))
    if before is None or not rung.begin:
        members = setting.start(rung.size, start_key)
    else:
        members = before.members.take(rank_by_value(before.rows.value)[: rung.size])
    return setting.trained(members, rung.end - rung.begin, train_key, rung.end)
