"""Evolution strategies of the package evosax, and any that ask and tell as they do."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .. import spaces
from ..validation import check_positive_int
from .base import replace_nonfinite, seed_from_key


class EvolutionStrategy(eqx.Module):
    """Generations of ``size`` trials, by a strategy such as those of evosax.

    A strategy moves freely: its ``x`` is the logit of the coordinates ``t`` of
    `hypergrad.spaces.axes`, so that ``t = sigmoid(x)`` is uniform where ``x`` is
    logistic. One that moves a distribution begins at ``x = 0``, the middle of the
    space, with its own first deviation; one that keeps a population, such as
    differential evolution, with uniform draws. Everything else is the library's, with
    its default parameters.

    Args:
      strategy: ``(population_size, solution) -> strategy``, a class of
        ``evosax.algorithms``, or a `functools.partial` of one. Static.
      size: trials a generation. Static.

    A trial that failed counts as the worst of its generation. An integer or a choice
    is an axis of equal cells, which a narrow distribution may not leave any more; `TPE`
    is at home there.

    Raises:
      TypeError: ``strategy`` is no class or function.
      ValueError: ``size`` below 2; at `init`, an unbounded space.

    Budget: 150 trials of ``CMA_ES``, 160 of ``SNES`` and 250 of
    ``DifferentialEvolution``, eight a generation, for a value within 1e-4 (see
    `hypergrad.searchers`).

    Cost: an ask and a tell of the strategy a generation. Source: Lange 2022,
    arXiv:2212.04180 (evosax); the strategies have sources of their own.

    >>> import jax, hypergrad as hg
    >>> from evosax.algorithms import SNES
    >>> searcher = hg.searchers.Evolution(SNES, size=8)
    >>> state = searcher.init(hg.spaces.Unit(), jax.random.key(0))
    >>> for key in jax.random.split(jax.random.key(0), 80):
    ...     alpha, state = searcher.ask(state, key)
    ...     state = searcher.tell(state, alpha, (alpha - 0.3) ** 2)
    >>> alpha, state = searcher.ask(state, key)
    >>> bool(abs(alpha - 0.3) < 0.05)
    True
    """

    strategy: Callable[..., Any] = eqx.field(static=True)
    size: int = eqx.field(static=True)

    def __check_init__(self):
        if not callable(self.strategy):
            raise TypeError(
                "strategy must be a class such as evosax.algorithms.CMA_ES, or a "
                f"function (population_size, solution) -> strategy; got "
                f"{self.strategy!r}"
            )
        check_positive_int("size", self.size, 2)

    def init(self, space: PyTree, key: Array) -> "Generation":
        """Before the first generation."""
        nothing = jnp.zeros(len(spaces.axes(space)))
        strategy = _made(self.strategy, self.size, len(nothing), nothing.dtype.name)
        params = strategy.default_params
        if _keeps_a_population(strategy):
            population = jnp.zeros((self.size, len(nothing)))
            fitness = jnp.zeros(self.size)
            state = strategy.init(key, population, fitness, params)
        else:
            state = strategy.init(key, nothing, params)
        none = np.zeros((0, len(nothing)))
        return Generation(
            space, strategy, state, 0, seed_from_key(key), none, 0, none, none[:, 0]
        )

    def ask(self, state: "Generation", key: Array) -> tuple[PyTree, "Generation"]:
        """The next of its generation, which is drawn with the key of its first ask.

        StopIteration after its last, until all of it are told.
        """
        if not len(state.asked):
            state = state.drawn(seed_from_key(key))
        if (index := int(state.num_asked)) == self.size:
            raise StopIteration
        return state.alpha(index), replace(state, num_asked=index + 1)

    def tell(self, state: "Generation", alpha: PyTree, value: Array) -> "Generation":
        """The last of a generation moves the strategy on.

        An ``alpha`` that was not asked for takes the place of the one that was.
        """
        return state.told(alpha, float(value) if np.isfinite(value) else np.inf)


@functools.lru_cache(maxsize=64)
def _made(strategy: Callable[..., Any], size: int, num_axes: int, dtype: str) -> Any:
    """The one of its kind: an instance holds no state, but compiles its own methods."""
    return strategy(population_size=size, solution=jnp.zeros(num_axes, dtype))


class Generation(eqx.Module):
    """Where a strategy is, and its trials since; leaves can be stored as arrays.

    Attributes:
      space: what is searched.
      strategy: static; it holds no state.
      state: the strategy's.
      index: generations before this one.
      seed: of its random numbers.
      asked: [size, axes], its ``x``; empty before it is drawn.
      num_asked: how many of them were given out.
      x, values: [trials, axes] and [trials], those told.
    """

    space: PyTree
    strategy: Any = eqx.field(static=True)
    state: PyTree
    index: int
    seed: int
    asked: np.ndarray
    num_asked: int
    x: np.ndarray
    values: np.ndarray

    def drawn(self, seed: int) -> "Generation":
        """With its ``x``."""
        ask_key, _ = _keys(seed)
        strategy, state = self.strategy, self.state
        if int(self.index) == 0 and _keeps_a_population(strategy):
            shape = strategy.population_size, self.x.shape[1]
            x = jax.random.logistic(ask_key, shape)
        else:
            x, state = strategy.ask(ask_key, state, strategy.default_params)
        return replace(self, state=state, seed=seed, asked=np.asarray(x))

    def alpha(self, index: int) -> PyTree:
        """One of those asked."""
        t = jax.nn.sigmoid(self.asked[index])
        return spaces.from_unit(self.space, t)

    def told(self, alpha: PyTree, value: float) -> "Generation":
        """With one more trial; a new generation after the last."""
        x = np.vstack([self.x, self._x_of(alpha)])
        values = np.append(self.values, value)
        if len(values) < self.strategy.population_size:
            return replace(self, x=x, values=values)
        _, key = _keys(int(self.seed))
        strategy, params = self.strategy, self.strategy.default_params
        population, fitness = jnp.asarray(x), jnp.asarray(replace_nonfinite(values))
        if int(self.index) == 0 and _keeps_a_population(strategy):
            state = strategy.init(key, population, fitness, params)
        else:
            state, _ = strategy.tell(key, population, fitness, self.state, params)
        return replace(
            self, state=state, index=int(self.index) + 1,
            asked=self.asked[:0], num_asked=0, x=self.x[:0], values=self.values[:0],
        )  # fmt: skip

    def _x_of(self, alpha: PyTree) -> np.ndarray:
        """To the bit that of an ``alpha`` that was asked for."""
        same = lambda x, y: np.array_equal(np.asarray(x), np.asarray(y))
        index = len(self.values)
        if len(self.asked) and jax.tree.all(
            jax.tree.map(same, alpha, self.alpha(index))
        ):
            return self.asked[index]
        t = np.asarray(spaces.to_unit(self.space, alpha))
        least = np.finfo(t.dtype).eps
        t = np.clip(t, least, 1 - least)
        return np.log(t / (1 - t))


def _keeps_a_population(strategy: Any) -> bool:
    """Rather than a distribution: it begins with one that has been evaluated."""
    return "population" in inspect.signature(strategy.init).parameters


def _keys(seed: int) -> tuple[Array, Array]:
    """To ask and to tell with."""
    ask_key, tell_key = jax.random.split(jax.random.key(seed))
    return ask_key, tell_key
