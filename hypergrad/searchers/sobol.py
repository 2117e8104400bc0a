"""Quasi-random search."""

import equinox as eqx
from jaxtyping import Array, PyTree

from .. import spaces
from .base import seed_from_key


class Sobol(eqx.Module):
    """Draws that keep out of each other's way: a scrambled Sobol sequence.

    Each trial alone is distributed as one of `Random`; together they fill the space
    more evenly, best at powers of two. The sequence is SciPy's, scrambled by the key of
    `init`.

    Budget: 256 trials, for a value within 0.01 (see `hypergrad.searchers`).

    Cost: a point. Source: Sobol 1967; Bergstra & Bengio 2012, for search.

    >>> import jax, hypergrad as hg
    >>> searcher = hg.searchers.Sobol()
    >>> state = searcher.init(hg.spaces.Unit(), jax.random.key(0))
    >>> cells = []
    >>> for _ in range(4):
    ...     alpha, state = searcher.ask(state, jax.random.key(0))
    ...     cells.append(int(4 * alpha))
    >>> sorted(cells)
    [0, 1, 2, 3]
    """

    citations = ("sobol1967", "bergstra2012")
    is_multi_objective = True

    def init(self, space: PyTree, key: Array) -> dict:
        """The space, the seed of the scramble, and how many points were asked for."""
        spaces.axes(space)
        return {"space": space, "seed": seed_from_key(key), "index": 0}

    def ask(self, state: dict, key: Array) -> tuple[PyTree, dict]:
        """The next point of the sequence."""
        from scipy.stats import qmc  # jax brings SciPy along

        del key
        num_axes, index = len(spaces.axes(state["space"])), int(state["index"])
        seed = int(state["seed"])  # SciPy 1.15 calls it rng, and takes either name
        sequence = qmc.Sobol(num_axes, seed=seed)  # pyright: ignore[reportCallIssue]
        if index:
            sequence.fast_forward(index)
        alpha = spaces.from_unit(state["space"], sequence.random(1)[0])
        return alpha, {**state, "index": index + 1}

    def tell(self, state: dict, alpha: PyTree, value: Array) -> dict:
        """Learns nothing."""
        del alpha, value
        return state
