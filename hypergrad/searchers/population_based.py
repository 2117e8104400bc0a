"""Populations whose poor members are replaced: training and search in one."""

import functools

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .. import spaces
from ..validation import check_positive_int, float_converter
from .populations import Members, PopulationConfig, RoundResult, rank_by_value


class PopulationBasedTraining(eqx.Module):
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
        default=0.2, converter=float_converter("perturbation", optional=False)
    )

    citations = ("jaderberg2017",)

    def __check_init__(self):
        check_positive_int("size", self.size, minimum=2)
        if not 0 < self.share <= 0.5:
            raise ValueError(f"share must be in (0, 1/2]; got {self.share!r}")

    def cost(self, setting: PopulationConfig, index: int) -> float:
        """That of any other."""
        del index
        return setting.cost(self.size, setting.solver.num_steps)

    def round(
        self,
        setting: PopulationConfig,
        index: int,
        before: RoundResult | None,
        key: Array,
    ) -> RoundResult:
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
        order, count = rank_by_value(value), max(1, int(self.share * self.size))
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
