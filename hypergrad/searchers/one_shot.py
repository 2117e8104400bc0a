"""One-shot search: a supernet whose ``w`` serves all choices and is trained once."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .. import spaces
from ..batches import at_draw
from ..checks.problem import check_state_without_alpha
from ..number_checks import check_positive_int
from ..trials.trial import TrialRecord
from .populations import (
    Members,
    PopulationSearcher,
    Round,
    Rung,
    Trainer,
    shard_members,
)


class SharedMembers(eqx.Module):
    """Members that share a single carry; ``alpha`` has a leading axis of members."""

    shared_carry: tuple[PyTree, PyTree]
    alpha: PyTree

    def take(self, index: Array) -> Members:
        """Returns the member at an index, with the shared carry."""
        return Members(self.shared_carry, jax.tree.map(lambda x: x[index], self.alpha))


class OneShot(PopulationSearcher):
    """Trains one ``w`` at random choices and then compares choices with this ``w``.

    ``w`` holds the weights of all choices, such as a table with a row for each, and the
    losses read only the weights of ``alpha``. The training makes the solver's
    ``num_steps`` steps, each at an ``alpha`` that is sampled uniformly from the space.
    Afterwards samples from the space are evaluated with the trained ``w`` while the
    budget lasts. The training and all evaluations have the same data, even if the
    problem has a ``data_fn``.
    An ``init_fn`` is evaluated at a single sample, because there is only one ``w``.

    The first row of the trace is the training with the evaluation of one sample; each
    further row is one sample. The lowest value is the best, and ``w`` of the trace is
    the shared one. Train again at ``best_alpha``, or let another searcher compare with
    the shared ``w``: ``hg.ClosedForm(lambda alpha, batch: trace.w)`` as the solver,
    whose trials are charged one gradient each.

    Args:
      eval_batch_size: Number of samples that are evaluated side by side, static.

    Raises:
      ValueError: The initial state of the optimizer holds a leaf of ``alpha``, as with
        ``optax.inject_hyperparams``, so that all steps would have that of one sample.

    Budget: the training and four samples per choice, to find the best of 12 (see
      `hypergrad.searchers`).
    Cost: ``num_steps`` gradients once, an outer value per sample.
    Memory: one carry, and the memory of ``eval_batch_size`` outer values.
    Bias: values with shared weights need not rank choices as separate trainings do,
      unless each choice has weights that no other choice changes.

    Source: Bender et al. 2018; uniform sampling of one choice per step: Guo et al. 2020
      (arXiv:1904.00420).

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

    eval_batch_size: int = eqx.field(static=True)

    citations = ("bender2018", "guo2020")

    def __check_init__(self):
        check_positive_int("eval_batch_size", self.eval_batch_size)

    def rung(self, num_steps: int, index: int) -> Rung:
        """Returns the training in the first round, and evaluations in all others."""
        if index == 0:
            return Rung(1, 0, num_steps)
        return Rung(self.eval_batch_size, num_steps, num_steps)

    def round(
        self, trainer: Trainer, index: int, previous: Round | None, key: Array
    ) -> Round:
        """Trains the supernet in the first round; evaluates samples in every round."""
        # The keys of the data and of the evaluations are the same in all rounds.
        key, record_key = jax.random.split(key)
        data_key, record_key = jax.random.split(record_key)
        trainer = replace(trainer, data_key=data_key)
        alpha_key, train_key = jax.random.split(jax.random.fold_in(key, index))
        rung = self.rung(trainer.num_steps, index)
        if previous is None:
            setup, alpha = trainer.setup, spaces.sample(trainer.space, alpha_key)
            check_state_without_alpha(setup.solver, setup.problem, setup.w, alpha)
            carry = _train_supernet(trainer, train_key)
        else:
            carry = previous.members.shared_carry
        alpha = _sample(trainer.space, rung.num_members, alpha_key)
        records = _evaluate(
            trainer, carry[0], shard_members(alpha), rung.num_steps, record_key
        )
        steps = jnp.full(records.value.shape, float(rung.stop_step))
        records = records._replace(metrics=records.metrics | {"steps": steps})
        return Round(SharedMembers(carry, alpha), records)


@eqx.filter_jit
def _train_supernet(trainer: Trainer, key: Array) -> tuple[PyTree, PyTree]:
    """Returns the carry after all steps, each at a new sample of ``alpha``."""
    init_key, _, steps_key = jax.random.split(key, 3)
    problem = trainer.setup.problem
    data, _ = trainer.sample_data()
    num_steps = trainer.num_steps

    def step(carry, key_and_number):
        key, k = key_and_number
        alpha_key, step_key = jax.random.split(key)
        alpha = spaces.sample(trainer.space, alpha_key)
        step_data = at_draw(data, steps_key, k, num_steps, stream="w")
        args = carry, alpha, step_data, step_key
        return trainer.solver.step(problem.inner_loss, *args), None

    carry = jax.tree.map(lambda x: x[0], trainer.init_members(1, init_key).carry)
    steps = jax.random.split(steps_key, num_steps), jnp.arange(num_steps)
    return jax.lax.scan(step, carry, steps)[0]


@eqx.filter_jit
def _sample(space: PyTree, num_samples: int, key: Array) -> PyTree:
    keys = jax.random.split(key, num_samples)
    return jax.vmap(lambda key: spaces.sample(space, key))(keys)


@eqx.filter_jit
def _evaluate(
    trainer: Trainer, parameters: PyTree, alpha: PyTree, num_steps: int, key: Array
) -> TrialRecord:
    """Returns the record of each ``alpha`` on the same data and with the same key."""
    data = trainer.sample_data()
    record = lambda alpha: trainer.record(parameters, alpha, data, num_steps, key)
    return jax.vmap(record)(alpha)
