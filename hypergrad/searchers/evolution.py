"""Evolution strategies of the package evosax, or of your own with its interface."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .. import spaces
from ..number_checks import check_positive_int
from .base import seed_from_key


class EvolutionStrategy(eqx.Module):
    """Proposes the generations of a strategy, such as a strategy of evosax.

    A strategy is unconstrained: its ``x`` is the logit of the coordinates ``t`` of
    `hypergrad.spaces.axes`, so ``t = sigmoid(x)`` is uniform if ``x`` is logistic. A
    strategy that adapts a distribution starts at ``x = 0``, the middle of the space,
    with its own initial deviation. A strategy that keeps a population, such as
    differential evolution, starts with uniform samples. Everything else is left to the
    library with its default parameters.

    A failed trial counts as worse than every finite value so far, so that it never
    displaces a good one, and a generation of failed trials only is sampled again. An
    integer or a choice is an axis of equal cells, which a narrow distribution may no
    longer leave; prefer `TPE` for them.

    Args:
      strategy: Function ``(population_size, solution) -> strategy``, such as a class of
        ``evosax.algorithms`` or a `functools.partial` of one. Static.
      population_size: Number of trials per generation, static.

    Raises:
      TypeError: ``strategy`` is not a class or function.
      ValueError: ``population_size`` is below 2. In `init`: the space is unbounded.

    Budget: 140 trials of ``CMA_ES``, 200 of ``SNES`` and 250 of
      ``DifferentialEvolution``, eight per generation, for a value within 1e-4 (see
      `hypergrad.searchers`).
    Cost: one ``ask`` and one ``tell`` of the strategy per generation.

    Source: Lange 2022, arXiv:2212.04180 (evosax); the strategies have their own
      sources.

    >>> import jax, hypergrad as hg
    >>> from evosax.algorithms import SNES
    >>> searcher = hg.searchers.EvolutionStrategy(SNES, population_size=8)
    >>> state = searcher.init(hg.spaces.Unit(), jax.random.key(0))
    >>> for key in jax.random.split(jax.random.key(0), 80):
    ...     alpha, state = searcher.ask(state, key)
    ...     state = searcher.tell(state, alpha, (alpha - 0.3) ** 2)
    >>> alpha, state = searcher.ask(state, key)
    >>> bool(abs(alpha - 0.3) < 0.05)
    True
    """

    strategy: Callable[..., Any] = eqx.field(static=True)
    population_size: int = eqx.field(static=True)

    def __check_init__(self):
        if not callable(self.strategy):
            raise TypeError(
                "strategy must be a class such as evosax.algorithms.CMA_ES, or a "
                f"function (population_size, solution) -> strategy; got "
                f"{self.strategy!r}."
            )
        check_positive_int("population_size", self.population_size, 2)

    def init(self, space: PyTree, key: Array) -> "Generation":
        """Returns the state before the first generation."""
        x0 = jnp.zeros(len(spaces.axes(space)))
        strategy = _make_strategy(
            self.strategy, self.population_size, len(x0), x0.dtype.name
        )
        params = strategy.default_params
        if _keeps_population(strategy):
            population = jnp.zeros((self.population_size, len(x0)))
            fitness = jnp.zeros(self.population_size)
            state = strategy.init(key, population, fitness, params)
        else:
            state = strategy.init(key, x0, params)
        empty = np.zeros((0, len(x0)))
        return Generation(
            space=space,
            strategy=strategy,
            state=state,
            index=0,
            seed=seed_from_key(key),
            proposals=empty,
            num_proposed=0,
            x=empty,
            values=empty[:, 0],
            largest_value=-np.inf,
        )

    def ask(self, state: "Generation", key: Array) -> tuple[PyTree, "Generation"]:
        """Returns the next ``alpha`` of the generation.

        The key of its first ``alpha`` samples the whole generation. Raises
        StopIteration after the last ``alpha`` until all values are told.
        """
        if not len(state.proposals):
            state = state.sample(seed_from_key(key))
        if (index := int(state.num_proposed)) == self.population_size:
            raise StopIteration
        return state.alpha(index), replace(state, num_proposed=index + 1)

    def tell(self, state: "Generation", alpha: PyTree, value: Array) -> "Generation":
        """Returns the state with one more trial; the last one updates the strategy.

        An ``alpha`` that was not proposed takes the place of the proposal in its order.
        """
        return state.add(alpha, float(value) if np.isfinite(value) else np.inf)


class Generation(eqx.Module):
    """The state of an `EvolutionStrategy`; its leaves can be saved as arrays.

    Attributes:
      space: The space that is searched.
      strategy: The strategy, which holds no state. Static.
      state: The state of the strategy.
      index: Number of generations before this one.
      seed: Seed of the random numbers of the generation.
      proposals: Proposed points, empty before they are sampled.
      num_proposed: Number of proposals that `ask` has returned.
      x, values: Points and values of the trials of the generation.
      largest_value: Largest finite value of all generations before this one; minus
        infinity in the first one.
    """

    space: PyTree
    strategy: Any = eqx.field(static=True)
    state: PyTree
    index: int
    seed: int
    proposals: Float[np.ndarray, "population axes"]
    num_proposed: int
    x: Float[np.ndarray, "trials axes"]
    values: Float[np.ndarray, " trials"]
    largest_value: float

    @property
    def is_initial_population(self) -> bool:
        """True if the strategy is still to be initialized with this generation."""
        return int(self.index) == 0 and _keeps_population(self.strategy)

    def sample(self, seed: int) -> "Generation":
        """Returns the generation with its proposals."""
        ask_key, _ = _keys_from_seed(seed)
        strategy, state = self.strategy, self.state
        if self.is_initial_population:
            shape = strategy.population_size, self.x.shape[1]
            x = jax.random.logistic(ask_key, shape)
        else:
            x, state = strategy.ask(ask_key, state, strategy.default_params)
        return replace(self, state=state, seed=seed, proposals=np.asarray(x))

    def alpha(self, index: int) -> PyTree:
        """Returns the ``alpha`` of a proposal."""
        return spaces.from_unit(self.space, jax.nn.sigmoid(self.proposals[index]))

    def add(self, alpha: PyTree, value: float) -> "Generation":
        """Returns the generation with one more trial, or the next generation.

        The strategy learns nothing from a generation in which every trial failed: any
        value would be better, or worse, than those of other generations.
        """
        x = np.vstack([self.x, self._to_x(alpha)])
        values = np.append(self.values, value)
        if len(values) < self.strategy.population_size:
            return replace(self, x=x, values=values)
        empty = replace(
            self,
            proposals=self.proposals[:0],
            num_proposed=0,
            x=self.x[:0],
            values=self.values[:0],
        )
        if not np.isfinite(values).any():
            return empty
        _, tell_key = _keys_from_seed(int(self.seed))
        strategy, params = self.strategy, self.strategy.default_params
        finite_values = values[np.isfinite(values)]
        largest_value = max(float(self.largest_value), finite_values.max().item())
        population, fitness = jnp.asarray(x), _to_fitness(values, largest_value)
        if self.is_initial_population:
            state = strategy.init(tell_key, population, fitness, params)
        else:
            state, _ = strategy.tell(tell_key, population, fitness, self.state, params)
        return replace(
            empty,
            state=state,
            index=int(self.index) + 1,
            largest_value=largest_value,
        )

    def _to_x(self, alpha: PyTree) -> np.ndarray:
        """Returns the point of an ``alpha``; equal to the bit for a proposed one."""
        index = len(self.values)
        is_equal = lambda x, y: np.array_equal(np.asarray(x), np.asarray(y))
        if len(self.proposals) and jax.tree.all(
            jax.tree.map(is_equal, alpha, self.alpha(index))
        ):
            return self.proposals[index]
        t = np.asarray(spaces.to_unit(self.space, alpha))
        eps = np.finfo(t.dtype).eps
        t = np.clip(t, eps, 1 - eps)
        return np.log(t / (1 - t))


def _to_fitness(values: Float[np.ndarray, " trials"], largest_value: float) -> Array:
    """Returns the values, with a number just above the largest one for failures.

    >>> (_to_fitness(np.array([1.0, np.inf]), 3.0) > 3.0).tolist()
    [False, True]
    """
    dtype = jnp.result_type(float)
    max_value = np.asarray(largest_value, dtype)
    next_number = np.nextafter(max_value, np.asarray(np.inf, dtype))
    # XLA takes a number below the smallest normal one for 0.
    failed = np.maximum(next_number, max_value + jnp.finfo(dtype).tiny)
    return jnp.asarray(np.where(np.isfinite(values), values, failed))


@functools.lru_cache(maxsize=64)
def _make_strategy(
    strategy: Callable[..., Any], population_size: int, num_axes: int, dtype: str
) -> Any:
    """Returns a strategy, the same object each time: each compiles its own methods."""
    return strategy(
        population_size=population_size, solution=jnp.zeros(num_axes, dtype)
    )


def _keeps_population(strategy: Any) -> bool:
    """Returns True if a strategy is initialized with an evaluated population."""
    return "population" in inspect.signature(strategy.init).parameters


def _keys_from_seed(seed: int) -> tuple[Array, Array]:
    """Returns the keys of ``ask`` and ``tell`` of a generation."""
    ask_key, tell_key = jax.random.split(jax.random.key(seed))
    return ask_key, tell_key
