"""Random search, the baseline of baselines."""

import equinox as eqx
from jaxtyping import Array, PyTree

from .. import spaces


class Random(eqx.Module):
    """Independent draws from the space: uniform, log-uniform where it says so.

    Budget: 300 trials, for a value within 0.01 (see `hypergrad.searchers`).

    Cost: a draw. Source: Bergstra & Bengio 2012.

    >>> import jax, hypergrad as hg
    >>> searcher = hg.searchers.Random()
    >>> state = searcher.init({"penalty": hg.spaces.Unit()}, jax.random.key(0))
    >>> alpha, state = searcher.ask(state, jax.random.key(1))
    >>> bool(0 <= alpha["penalty"] <= 1)
    True
    """

    citations = ("bergstra2012",)
    is_multi_objective = True

    def init(self, space: PyTree, key: Array) -> PyTree:
        """The space is all there is to remember."""
        del key
        return space

    def ask(self, state: PyTree, key: Array) -> tuple[PyTree, PyTree]:
        """A fresh draw."""
        return spaces.sample(state, key), state

    def tell(self, state: PyTree, alpha: PyTree, value: Array) -> PyTree:
        """Learns nothing."""
        del alpha, value
        return state
