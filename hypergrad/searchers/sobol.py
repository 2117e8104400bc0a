"""Quasi-random search."""

import equinox as eqx
from jaxtyping import Array, PyTree

from .. import spaces
from .base import seed_from_key


class Sobol(eqx.Module):
    """Proposes the points of a scrambled Sobol sequence.

    Each proposal is distributed as in `Random`. Together they fill the space more
    evenly, best at powers of two. The sequence is SciPy's, and the key of `init`
    scrambles it.

    Budget: 40 trials for a value within 0.01 (see `hypergrad.searchers`).
    Cost: O(axes) per earlier proposal, because the sequence is made anew and forwarded.

    Source: Sobol 1967; Bergstra & Bengio 2012, for search.

    >>> import jax, hypergrad as hg
    >>> searcher = hg.searchers.Sobol()
    >>> state = searcher.init(hg.spaces.Unit(), jax.random.key(0))
    >>> quarters = []
    >>> for _ in range(4):
    ...     alpha, state = searcher.ask(state, jax.random.key(0))
    ...     quarters.append(int(4 * alpha))
    >>> sorted(quarters)
    [0, 1, 2, 3]
    """

    citations = ("sobol1967", "bergstra2012")
    is_multi_objective = True

    def init(self, space: PyTree, key: Array) -> dict:
        """Returns the space, the seed of the scramble and the number of proposals."""
        spaces.axes(space)
        return {"space": space, "seed": seed_from_key(key), "index": 0}

    def ask(self, state: dict, key: Array) -> tuple[PyTree, dict]:
        """Returns the next point of the sequence."""
        from scipy.stats import qmc

        del key
        num_axes, index = len(spaces.axes(state["space"])), int(state["index"])
        seed = int(state["seed"])  # SciPy 1.15 renamed it to rng, and accepts both
        sequence = qmc.Sobol(num_axes, seed=seed)  # pyright: ignore[reportCallIssue]
        if index:
            sequence.fast_forward(index)
        alpha = spaces.from_unit(state["space"], sequence.random(1)[0])
        return alpha, {**state, "index": index + 1}

    def tell(self, state: dict, alpha: PyTree, value: Array) -> dict:
        """Returns the unchanged state."""
        del alpha, value
        return state
