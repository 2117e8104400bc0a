"""Populations: many ``w`` that are trained side by side, round by round.

The base class of the searchers that train populations, and the `Trainer` that `search`
gives them. Their inner solver makes one step at a time, as `Descent` does.
"""

from abc import abstractmethod
from dataclasses import replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from .. import spaces
from ..batches import Data, at_draw
from ..cost import cost_stats
from ..number_checks import check_positive_int
from ..runtime.devices import shard
from ..trials.trial import TrialRecord, TrialSetup, make_record
from ..validation import check_solver


class Members(eqx.Module):
    """The members of a population; each leaf has a leading axis of members.

    Attributes:
      carry: Carries of the solver, which are pairs ``(w, solver state)``.
      alpha: The ``alpha`` of each member.
    """

    carry: tuple[PyTree, PyTree]
    alpha: PyTree

    def take(self, index: Array) -> "Members":
        """Returns the members at an index, bit for bit."""
        return jax.tree.map(lambda x: x[index], self)


class Round(NamedTuple):
    """The result of a round.

    Attributes:
      members: An object with the method ``take(index)``, such as `Members`.
      records: Record of each member. The metric ``steps`` is the number of steps that
        led to its ``w``, in all rounds together.
    """

    members: Any
    records: TrialRecord


class Rung(NamedTuple):
    """The size of a round: ``num_members`` are trained to ``stop_step`` steps."""

    num_members: int
    start_step: int
    stop_step: int

    @property
    def num_steps(self) -> int:
        """Number of steps that each member makes in the round."""
        return self.stop_step - self.start_step


class Trainer(eqx.Module):
    """Trains the members of a population.

    Attributes:
      setup: Problem, solver, starting point and metrics, which all members share.
      space: The space of ``alpha``.
      step_counts: Numbers of inner gradients, Hessian-vector products and values per
        step of a member.
      step_cost, value_cost: Gradient-equivalents of a step and of an outer value.
      data_key: PRNG key of the data, and of their passes, of all members. Rounds that
        train the same members must have the same one: otherwise a ``data_fn`` would let
        them train on examples on which they are evaluated later.
    """

    setup: TrialSetup
    space: PyTree
    step_counts: dict[str, float] = eqx.field(static=True)
    step_cost: float = eqx.field(static=True)
    value_cost: float = eqx.field(static=True)
    data_key: Array = eqx.field(default_factory=lambda: jax.random.key(0))

    def sample_data(self) -> tuple[Data, Data]:
        """Returns the inner and outer data of all members."""
        data_key, _ = jax.random.split(self.data_key)
        return self.setup.problem.sample_data(data_key)

    @property
    def num_steps(self) -> int:
        """Number of steps of the solver."""
        return self.solver.num_steps

    @property
    def solver(self) -> Any:
        """The inner solver, which has the methods of an `IterativeSolver`."""
        return self.setup.solver

    def cost(self, num_members: int, num_steps: int) -> float:
        """Returns the gradient-equivalents of a round."""
        return num_members * (num_steps * self.step_cost + self.value_cost)

    @eqx.filter_jit
    def init_members(self, num_members: int, key: Array) -> Members:
        """Samples members from the space, before their first step."""
        problem = self.setup.problem
        data, _ = self.sample_data()

        def init_member(key: Array) -> Members:
            # The middle key is unused, so that members stay those of earlier runs.
            alpha_key, _, init_key = jax.random.split(key, 3)
            alpha = spaces.sample(self.space, alpha_key)
            w = problem.init_inner(self.setup.w, alpha)
            carry = self.solver.init(problem.inner_loss, w, alpha, data, init_key)
            return Members(carry, alpha)

        return jax.vmap(init_member)(jax.random.split(key, num_members))

    def train_rung(
        self, members: Members, rung: Rung, key: Array, **labels: Array
    ) -> Round:
        """Trains the members to the end of a rung; labels are added to the metrics."""
        members, records = self.train(
            shard_members(members), rung.num_steps, key, np.asarray(rung.start_step)
        )
        steps = jnp.full(records.value.shape, float(rung.stop_step))
        metrics = records.metrics | {"steps": steps, **labels}
        return Round(members, records._replace(metrics=metrics))

    @eqx.filter_jit
    def train(
        self,
        members: Members,
        num_steps: int,
        key: Array,
        start_step: ArrayLike = 0,
    ) -> tuple[Members, TrialRecord]:
        """Makes ``num_steps`` steps of each member and evaluates it.

        ``start_step`` is the number of steps that the members have made before, at
        which their passes over the data go on.
        """
        problem = self.setup.problem
        data = self.sample_data()
        _, passes_key = jax.random.split(self.data_key)

        def train_member(member: Members, key: Array) -> tuple[Members, TrialRecord]:
            _, steps_key, record_key = jax.random.split(key, 3)  # as above

            def step(carry, key_and_number):
                key, k = key_and_number
                number = start_step + k
                step_data = at_draw(data[0], passes_key, number, num_steps, stream="w")
                args = carry, member.alpha, step_data, key
                return self.solver.step(problem.inner_loss, *args), None

            steps = jax.random.split(steps_key, num_steps), jnp.arange(num_steps)
            carry, _ = jax.lax.scan(step, member.carry, steps)
            record = self.record(carry[0], member.alpha, data, num_steps, record_key)
            return Members(carry, member.alpha), record

        num_members = len(jax.tree.leaves(members)[0])
        return jax.vmap(train_member)(members, jax.random.split(key, num_members))

    def record(
        self,
        parameters: PyTree,
        alpha: PyTree,
        data: tuple[Data, Data],
        num_steps: int,
        key: Array,
    ) -> TrialRecord:
        """Returns the record of a member that has just made ``num_steps`` steps."""
        outer_key, metric_key = jax.random.split(key)
        counts = {name: num_steps * count for name, count in self.step_counts.items()}
        keys = outer_key, metric_key
        return make_record(self.setup, parameters, alpha, data, keys, num_steps, counts)


def make_trainer(setup: TrialSetup, alpha: PyTree, space: PyTree) -> Trainer:
    """Returns the trainer for a population.

    Args:
      setup: What all members share.
      alpha: Any point of the space; only its shapes are used.
      space: The space of ``alpha``.

    Raises:
      ValueError: The name of a metric is one of those that populations add.
    """
    if reserved := sorted({"steps", "parent"} & setup.metrics.keys()):
        raise ValueError(
            f"metrics must not use the name {reserved[0]!r}, which the trace of a "
            "population has already. Choose another name."
        )
    # The counts of a solve are constants of its program if only its steps cause them,
    # in which case nothing is solved here.
    counts = _solve_counts(setup, alpha, jax.random.key(0))
    solver: Any = setup.solver
    step_counts = {
        name: float(counts[name]) / solver.num_steps
        for name in ("num_grads", "num_hvps", "num_values")
    }
    data = eqx.filter_eval_shape(
        lambda key: setup.problem.sample_data(key), jax.random.key(0)
    )
    cost = lambda **counts: float(cost_stats(*data, **counts)["gradient_equivalents"])
    return Trainer(
        setup, space, step_counts, cost(**step_counts), cost(num_outer_values=1.0)
    )


@eqx.filter_jit
def _solve_counts(setup: TrialSetup, alpha: PyTree, key: Array) -> dict[str, Array]:
    problem = setup.problem
    data, _ = problem.sample_data(key)
    w0 = problem.init_inner(setup.w, alpha)
    return setup.solver.solve(problem.inner_loss, w0, alpha, data, key)[1]


def check_iterative_solver(solver: Any) -> None:
    """Raises TypeError unless a solver can continue from a carry, step by step."""
    check_solver(solver)
    missing = [
        name for name in ("init", "step", "num_steps") if not hasattr(solver, name)
    ]
    if missing:
        raise TypeError(
            "solver must have init, step and num_steps to train a population, as "
            f"hg.Descent(optimizer, num_steps) has; got {type(solver).__name__}, which "
            f"lacks {', '.join(missing)}."
        )
    check_positive_int("num_steps", solver.num_steps)


class PopulationSearcher(eqx.Module):
    """Base class of searchers that train many ``w`` side by side, round by round.

    A subclass states the size of each round (`rung`). Unless it overrides
    `next_members`, a round that starts at step 0 samples new members, and any other
    continues with the best members of the previous round.
    """

    @abstractmethod
    def rung(self, num_steps: int, index: int) -> Rung:
        """Returns the size of round ``index``, for a solver of ``num_steps`` steps."""

    def init_round(self, num_steps: int, index: int) -> int:
        """Returns the index of the round that sampled the members of round ``index``.

        By default it is the latest one that starts at step 0.
        """
        while index > 0 and self.rung(num_steps, index).start_step > 0:
            index -= 1
        return index

    def next_members(
        self, trainer: Trainer, rung: Rung, previous: Round | None, key: Array
    ) -> tuple[Members, dict[str, Array]]:
        """Returns the members that a round trains, and metrics that label them.

        Args:
          trainer: Samples members.
          rung: The size of the round.
          previous: The previous round; None before the first.
          key: PRNG key.
        """
        if previous is None or rung.start_step == 0:
            return trainer.init_members(rung.num_members, key), {}
        best = rank_by_value(previous.records.value)[: rung.num_members]
        return previous.members.take(best), {}

    def cost(self, trainer: Trainer, index: int) -> float:
        """Returns the gradient-equivalents of round ``index``."""
        rung = self.rung(trainer.num_steps, index)
        return trainer.cost(rung.num_members, rung.num_steps)

    def round(
        self, trainer: Trainer, index: int, previous: Round | None, key: Array
    ) -> Round:
        """Makes round ``index``.

        The data of a ``data_fn`` are sampled when members are, and stay the same as
        long as these are trained.

        Args:
          trainer: Trains members.
          index: Number of the round.
          previous: The previous round; None before the first.
          key: PRNG key of the search, the same in all rounds.
        """
        members_key, train_key, _ = jax.random.split(jax.random.fold_in(key, index), 3)
        rung = self.rung(trainer.num_steps, index)
        init_index = self.init_round(trainer.num_steps, index)
        *_, data_key = jax.random.split(jax.random.fold_in(key, init_index), 3)
        trainer = replace(trainer, data_key=data_key)
        members, labels = self.next_members(trainer, rung, previous, members_key)
        return trainer.train_rung(members, rung, train_key, **labels)


def rank_by_value(value: Float[Array, " members"]) -> Int[Array, " members"]:
    """Returns indices in the order of the values; failed members come last."""
    return jnp.argsort(jnp.where(jnp.isfinite(value), value, jnp.inf))


def shard_members(members: PyTree) -> PyTree:
    """Distributes members over the devices if their number is divisible by these."""
    num_members, num_devices = len(jax.tree.leaves(members)[0]), jax.device_count()
    if num_devices == 1 or num_members % num_devices:
        return members
    return shard(members, "members")
