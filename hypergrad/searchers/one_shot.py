"""A supernet: one ``w`` for all choices, trained once, by which they are compared."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .. import spaces
from ..validation import check_positive_int
from .populations import (
    MemberRecords,
    Members,
    PopulationConfig,
    RoundResult,
    shard_members,
)


class Shared(eqx.Module):
    """One carry of the solver for many ``alpha``, which have a leading axis."""

    shared: tuple[PyTree, PyTree]
    alpha: PyTree

    def take(self, index: Array) -> Members:
        """Some of them, each with that carry."""
        return Members(self.shared, jax.tree.map(lambda x: x[index], self.alpha))


class OneShot(eqx.Module):
    """Trains a single ``w`` under choices drawn anew at every step; then only compares.

    ``w`` holds the weights of all choices, such as a table with a row for each, of
    which the losses read those of ``alpha``. It makes the solver's ``num_steps`` steps,
    each at an ``alpha`` drawn uniformly from the space. Then draws from the space are
    evaluated with that ``w``, as many as the budget pays for, and all of them on the
    same data: that of one key, where the problem draws. Of a ``start(w, alpha)`` only
    the value at one draw is used, since there is one ``w``.

    Args:
      size: draws that are evaluated side by side, static.

    The first row of the trace is the training and one draw, the others a draw each. The
    lowest value is the best; ``w`` of the trace is the shared one: train anew at
    ``best_alpha``, or let another searcher compare, with ``hg.ClosedForm(lambda alpha,
    batch: trace.w)`` for a solver; each of its trials is charged as a training, by a
    gradient.

    Bias: a value by shared weights is not that of a training of its own, and need not
    rank as it does, unless each choice has weights of its own that no other choice
    moves.

    Budget: the training and four draws a choice, to find the best of 12 (see
    `hypergrad.searchers`).

    Cost: ``num_steps`` gradients once, an outer value a draw. Memory: one carry, and
    what ``size`` outer values need.

    Source: Bender et al. 2018; steps at a single choice each, drawn uniformly, Guo et
    al. 2020 (arXiv 1904.00420).

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> target = jnp.array([3.0, 1.0, 2.0])
    >>> inner = lambda w, alpha, batch: 0.5 * (w[alpha] - target[alpha]) ** 2
    >>> outer = lambda w, alpha, batch: w[alpha]
    >>> trace = hg.search(
    ...     hg.Bilevel(inner, outer), hg.Descent(optax.sgd(0.5), 60),
    ...     hg.searchers.OneShot(4), jnp.zeros(3),
    ...     space=hg.spaces.Choice(3), budget=70, key=jax.random.key(0),
    ... )
    >>> int(trace.best_alpha), bool(jnp.allclose(trace.w, target, atol=0.01))
    (1, True)
    """

    size: int = eqx.field(static=True)

    citations = ("bender2018", "guo2020")

    def __check_init__(self):
        check_positive_int("size", self.size)

    def cost(self, setting: PopulationConfig, index: int) -> float:
        """The training in the first, values alone in the others."""
        if index == 0:
            return setting.cost(1, setting.solver.num_steps)
        return setting.cost(self.size, 0)

    def round(
        self,
        setting: PopulationConfig,
        index: int,
        before: RoundResult | None,
        key: Array,
    ) -> RoundResult:
        """The training and its first draw; then draws alone."""
        key, judge_key = jax.random.split(key)
        draw_key, train_key = jax.random.split(jax.random.fold_in(key, index))
        keys = draw_key, judge_key
        if before is None:
            carry = _supernet(setting, train_key)
            return _compared(setting, carry, 1, setting.solver.num_steps, *keys)
        return _compared(setting, before.members.shared, self.size, 0, *keys)


@eqx.filter_jit
def _supernet(setting: PopulationConfig, key: Array) -> tuple[PyTree, PyTree]:
    """The carry after all steps, each at a draw of its own."""
    start_key, data_key, steps_key = jax.random.split(key, 3)
    data, _ = setting.problem.sample_data(data_key)
    loss = setting.problem.inner_loss

    def step(carry, key):
        alpha_key, step_key = jax.random.split(key)
        alpha = spaces.sample(setting.space, alpha_key)
        return setting.solver.step(loss, carry, alpha, data, step_key), None

    begin = jax.tree.map(lambda x: x[0], setting.start(1, start_key).carry)
    keys = jax.random.split(steps_key, setting.solver.num_steps)
    return jax.lax.scan(step, begin, keys)[0]


def _compared(
    setting: PopulationConfig,
    carry: tuple[PyTree, PyTree],
    size: int,
    num_steps: int,
    draw_key: Array,
    judge_key: Array,
) -> RoundResult:
    """So many draws with the shared weights; the steps are charged to each."""
    alpha = _draws(setting.space, size, draw_key)
    rows = _judged(setting, carry[0], shard_members(alpha), num_steps, judge_key)
    made = jnp.full(rows.value.shape, float(setting.solver.num_steps))
    rows = rows._replace(metrics=rows.metrics | {"steps": made})
    return RoundResult(Shared(carry, alpha), rows)


@eqx.filter_jit
def _draws(space: PyTree, size: int, key: Array) -> PyTree:
    keys = jax.random.split(key, size)
    return jax.vmap(lambda key: spaces.sample(space, key))(keys)


@eqx.filter_jit
def _judged(
    setting: PopulationConfig, w: PyTree, alpha: PyTree, num_steps: int, key: Array
) -> MemberRecords:
    """On the same data, with the same key: only ``alpha`` tells one from another."""
    data_key, key = jax.random.split(key)
    data = setting.problem.sample_data(data_key)
    return jax.vmap(lambda alpha: setting.judged(w, alpha, num_steps, *data, key))(
        alpha
    )
