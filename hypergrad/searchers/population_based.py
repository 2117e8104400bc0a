"""Population-based training: search and training in a single run."""

import functools
import math

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .. import spaces
from ..checks.problem import check_state_without_alpha
from ..jaxprs.inspection import unused_leaves
from ..number_checks import check_positive_int, non_negative, positive_up_to
from ..spaces.pytree import flatten_space
from .populations import (
    Members,
    PopulationSearcher,
    Round,
    Rung,
    Trainer,
    rank_by_value,
)


class PopulationBasedTraining(PopulationSearcher):
    """Replaces the worst members of a population by perturbed copies of the best.

    In each round every member makes the solver's ``num_steps`` steps from its present
    ``w`` and optimizer state. Then each member of the worst quantile copies ``w``, the
    optimizer state and ``alpha`` of a random member of the best quantile, and every
    number of its ``alpha`` moves by ``perturbation``, up or down, in the unconstrained
    coordinates ``u`` of the space. In an `Interval` ``u`` is the logit of the position
    ``t`` between the bounds (on a logarithmic scale if ``log``), so ``t`` moves by
    about ``perturbation t (1 - t)``: by default a twentieth of the interval in its
    middle, and less towards the bounds. In a `Box` ``u`` is ``alpha`` itself: prefer an
    `Interval`, whose steps do not depend on the units. In a row of a `Simplex` not all
    numbers move in the same direction, which would leave ``alpha`` as it is. The paper
    multiplies by 1.2 or 0.8 instead.

    A row of the trace is a member in a round. The metric ``parent`` is the member of
    the previous round from which it continued, and ``steps`` the number of its steps in
    all rounds. ``best_alpha`` is the best of the last round that has a finite value.
    Since ``alpha`` changes during the run, ``w`` depends on its whole history: a new
    training at ``best_alpha`` may give a worse value. The data of a ``data_fn`` are
    sampled once, and passes over the data go on from round to round.

    Args:
      population_size: Number of members, static.
      quantile_fraction: Fraction of the members that is replaced in each round, in
        (0, 1/2], static.
      perturbation: Change of ``u``.

    Raises:
      ValueError: The space has an `Integer` or a `Choice`, or ``alpha`` has a leaf that
        only ``init_fn`` or the initial state of the optimizer uses, as with
        ``optax.inject_hyperparams``; raised before the first round.

    Budget: 200 gradient-equivalents for a value within 0.01, with 16 members and rounds
      of 5 steps (see `hypergrad.searchers`).
    Cost: ``population_size`` times the steps and an outer value, per round.
    Memory: ``population_size`` carries; one program under ``vmap``, distributed over
      the devices if their number divides ``population_size``.

    Source: Jaderberg et al. 2017 (arXiv:1711.09846).

    >>> import jax, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: (w - alpha) ** 2
    >>> outer = lambda w, alpha, batch: (w - 0.5) ** 2
    >>> trace = hg.search(
    ...     hg.Bilevel(inner, outer), hg.Descent(optax.sgd(0.5), 1),
    ...     hg.searchers.PopulationBasedTraining(8), 0.0,
    ...     space=hg.spaces.Unit(), budget=200, key=jax.random.key(0),
    ... )
    >>> bool(abs(trace.best_alpha - 0.5) < 0.1)
    True
    """

    population_size: int = eqx.field(static=True)
    quantile_fraction: float = eqx.field(
        default=0.25, static=True, converter=positive_up_to("quantile_fraction", 0.5)
    )
    perturbation: Array | float = eqx.field(
        default=0.2, converter=non_negative("perturbation")
    )

    citations = ("jaderberg2017",)

    def __check_init__(self):
        check_positive_int("population_size", self.population_size, minimum=2)

    def rung(self, num_steps: int, index: int) -> Rung:
        """Returns a round of ``num_steps`` further steps of all members."""
        return Rung(self.population_size, index * num_steps, (index + 1) * num_steps)

    def init_round(self, num_steps: int, index: int) -> int:
        """Returns 0, because all rounds train one population."""
        del num_steps, index
        return 0

    def next_members(
        self, trainer: Trainer, rung: Rung, previous: Round | None, key: Array
    ) -> tuple[Members, dict[str, Array]]:
        """Returns the members after the replacement, labeled with their parents."""
        if previous is None:
            _check_is_continuous(trainer.space)
            members = trainer.init_members(rung.num_members, key)
            _check_members_use_alpha(trainer, members)
            return members, {"parent": jnp.arange(rung.num_members)}
        members, parents = self.replace_worst(
            trainer.space, previous.members, previous.records.value, key
        )
        return members, {"parent": parents}

    @eqx.filter_jit
    def replace_worst(
        self, space: PyTree, members: Members, value: Array, key: Array
    ) -> tuple[Members, Array]:
        """Returns the members after the replacement, and the parent of each of them.

        Failed members are no parents, unless all of the best quantile failed.
        """
        parent_key, perturbation_key = jax.random.split(key)
        num_members = self.population_size
        # 0.29 * 100 is 28.999999999999996.
        num_replaced = max(1, math.floor(self.quantile_fraction * num_members + 1e-9))
        ranking = rank_by_value(value)
        best, worst = ranking[:num_replaced], ranking[-num_replaced:]
        num_finite = jnp.sum(jnp.isfinite(value[best]))
        num_candidates = jnp.where(num_finite > 0, num_finite, num_replaced)
        # Failed members are the end of the ranking.
        index = jax.random.randint(parent_key, (num_replaced,), 0, num_candidates)
        parents = jnp.arange(num_members).at[worst].set(best[index])
        members = members.take(parents)
        perturbed = jax.vmap(functools.partial(self.perturb, space))(
            members.take(worst).alpha, jax.random.split(perturbation_key, num_replaced)
        )
        alpha = jax.tree.map(
            lambda x, new: x.at[worst].set(new), members.alpha, perturbed
        )
        return Members(members.carry, alpha), parents

    def perturb(self, space: PyTree, alpha: PyTree, key: Array) -> PyTree:
        """Moves each number of ``u`` by ``perturbation`` in a random direction."""
        u, unravel = jax.flatten_util.ravel_pytree(spaces.inverse(space, alpha))
        sign = jax.random.rademacher(key, u.shape, u.dtype)
        sign, _ = jax.flatten_util.ravel_pytree(_mix_signs(space, unravel(sign)))
        u = unravel(u + jnp.asarray(self.perturbation, u.dtype) * sign)
        return spaces.forward(space, spaces.project(space, u))


def _check_members_use_alpha(trainer: Trainer, members: Members) -> None:
    """Raises ValueError for a leaf of ``alpha`` whose changes members do not see."""
    setup, alpha = trainer.setup, jax.tree.map(lambda x: x[0], members.alpha)
    check_state_without_alpha(setup.solver, setup.problem, setup.w, alpha)

    def train(alpha):
        key = jax.random.key(0)
        members_after, records = trainer.train(Members(members.carry, alpha), 1, key)
        return members_after.carry, records.value

    if names := unused_leaves(train, members.alpha):
        raise ValueError(
            "alpha must be used by the losses or by the solver's steps in "
            f"PopulationBasedTraining, which changes it between steps; "
            f"{names} sets only where the training starts. Use "
            "hg.searchers.SuccessiveHalving(num_candidates) or Hyperband()."
        )


def _mix_signs(space: PyTree, sign: PyTree) -> PyTree:
    """Returns the signs, changed so that each row of a `Simplex` has both of them.

    A softmax stays the same if one number is added to a whole row. The first sign is
    flipped where all signs of a row are equal.
    """
    leaf_spaces, structure = flatten_space(space)
    signs = []
    for leaf, rows in zip(leaf_spaces, structure.flatten_up_to(sign), strict=True):
        if isinstance(leaf, spaces.Simplex):
            is_uniform = jnp.all(rows == rows[..., :1], axis=-1)
            rows = rows.at[..., 0].multiply(jnp.where(is_uniform, -1, 1))
        signs.append(rows)
    return structure.unflatten(signs)


def _check_is_continuous(space: PyTree) -> None:
    """Raises ValueError for an integer or a choice, which has no small perturbation."""
    leaf_spaces, _ = flatten_space(space)
    # A Box may have equal bounds here, which `spaces.axes` refuses.
    if any(getattr(leaf, "num_values", None) is not None for leaf in leaf_spaces):
        raise ValueError(
            "space must be continuous for PopulationBasedTraining, which perturbs "
            "alpha; got an Integer or a Choice. Use "
            "hg.searchers.SuccessiveHalving(num_candidates), Hyperband(), "
            "OneShot(eval_batch_size) or TPE()."
        )
