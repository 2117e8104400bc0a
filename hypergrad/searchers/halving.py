"""Successive halving: many members train for a few steps, the best ones for more."""

import math

import equinox as eqx

from ..number_checks import check_positive_int
from .populations import PopulationSearcher, Rung


class SuccessiveHalving(PopulationSearcher):
    """Trains candidates for a few steps, keeps the best ``1 / eta`` and trains them on.

    The last rung reaches the solver's ``num_steps``, and each rung before it ``1 /
    eta`` of the steps of the next. Candidates that are kept continue from their ``w``
    and optimizer state. New brackets of ``num_candidates`` follow while the budget
    lasts. All members of a bracket have the same data, even if the problem has a
    ``data_fn``, and passes over them go on from rung to rung.

    A row of the trace is a member of a rung. The statistic ``num_inner_steps`` counts
    its steps in this rung, and the metric ``steps`` its steps in all rungs.
    ``best_alpha`` is the best of the longest trained members with a finite value.

    Args:
      num_candidates: Number of members of the first rung, static. A bracket has
        ``1 + floor(log_eta(min(num_candidates, num_steps)))`` rungs, so that each makes
        a step.
      eta: Factor between two rungs, at least 2, static.

    Budget: 700 gradient-equivalents for a value within 0.01, with 27 candidates and at
      most 27 steps (see `hypergrad.searchers`).
    Cost: about ``num_steps * num_candidates / eta^k`` gradients in the first of ``k +
      1`` rungs, and ``1 - 1 / eta`` of it in each other one, because members continue.
    Memory: ``num_candidates`` carries; one program per rung, under ``vmap``.

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

    num_candidates: int = eqx.field(static=True)
    eta: int = eqx.field(default=3, static=True)

    citations = ("jamieson2016",)

    def __check_init__(self):
        check_positive_int("num_candidates", self.num_candidates)
        check_positive_int("eta", self.eta, minimum=2)

    def rungs(self, num_steps: int) -> list[Rung]:
        """Returns the rungs of a bracket."""
        last_rung = floor_log(min(self.num_candidates, num_steps), self.eta)
        return bracket_rungs(self.num_candidates, last_rung, self.eta, num_steps)

    def rung(self, num_steps: int, index: int) -> Rung:
        """Returns the rung of round ``index``; the last is followed by the first."""
        rungs = self.rungs(num_steps)
        return rungs[index % len(rungs)]


class Hyperband(PopulationSearcher):
    """Runs successive halving with every ratio of candidates to steps in turn.

    With ``R`` the solver's ``num_steps`` and ``s_max = floor(log_eta R)``, the bracket
    of ``s = s_max, ..., 1, 0`` samples ``ceil((s_max + 1) eta^s / (s + 1))`` candidates
    and starts with ``R / eta^s`` steps; the last bracket is random search. The brackets
    are repeated while the budget lasts. Rows are as in `SuccessiveHalving`.

    Args:
      eta: Factor between two rungs, at least 2, static.

    Budget: 400 gradient-equivalents for a value within 0.01, with at most 27 steps
      (see `hypergrad.searchers`).
    Cost: 0.6 to 0.95 times ``(s_max + 1)² R`` gradients for all brackets, which is the
      cost in the paper, where members start again in each rung.
    Memory: as `SuccessiveHalving`.

    Source: Li et al. 2018 (arXiv:1603.06560).

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

    def rungs(self, num_steps: int) -> list[Rung]:
        """Returns the rungs of all brackets in their order."""
        s_max = floor_log(num_steps, self.eta)
        rungs = []
        for s in range(s_max, -1, -1):
            num_candidates = math.ceil((s_max + 1) * self.eta**s / (s + 1))
            rungs += bracket_rungs(num_candidates, s, self.eta, num_steps)
        return rungs

    def rung(self, num_steps: int, index: int) -> Rung:
        """Returns the rung of round ``index``; the last is followed by the first."""
        rungs = self.rungs(num_steps)
        return rungs[index % len(rungs)]


def floor_log(number: int, base: int) -> int:
    """Returns ``floor(log_base(number))`` without rounding errors."""
    power = 0
    while base ** (power + 1) <= number:
        power += 1
    return power


def bracket_rungs(
    num_candidates: int, last_rung: int, eta: int, num_steps: int
) -> list[Rung]:
    """Returns rungs 0 to ``last_rung`` of a bracket.

    In rung ``i`` the best ``num_candidates / eta^i`` members reach ``num_steps /
    eta^(last_rung - i)`` steps. ``eta^last_rung`` must not exceed either number.

    >>> [tuple(rung) for rung in bracket_rungs(9, 2, 3, 27)]
    [(9, 0, 3), (3, 3, 9), (1, 9, 27)]
    >>> [tuple(rung) for rung in bracket_rungs(81, 1, 3, 5)]
    [(81, 0, 1), (27, 1, 5)]
    """
    stops = [num_steps // eta ** (last_rung - i) for i in range(last_rung + 1)]
    sizes = [num_candidates // eta**i for i in range(last_rung + 1)]
    return list(map(Rung, sizes, [0, *stops], stops))
