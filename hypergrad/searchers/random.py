"""Random search."""

import equinox as eqx
from jaxtyping import Array, PyTree

from .. import spaces


class Random(eqx.Module):
    """Samples from the space independently: uniformly, or log-uniformly if it says so.

    Budget: 70 trials for a value within 0.01 (see `hypergrad.searchers`).
    Cost: one sample per proposal.

    Source: Bergstra & Bengio 2012.

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
        """Returns the space, which is the whole state."""
        del key
        return space

    def ask(self, state: PyTree, key: Array) -> tuple[PyTree, PyTree]:
        """Returns a sample and the unchanged state."""
        return spaces.sample(state, key), state

    def tell(self, state: PyTree, alpha: PyTree, value: Array) -> PyTree:
        """Returns the unchanged state."""
        del alpha, value
        return state
