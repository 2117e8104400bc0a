"""What one estimate sees: its data, and the keys of its parts."""

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from .problem import Bilevel, Data, held


class Drawn(eqx.Module):
    """The data of one estimate and the keys of its parts."""

    inner_data: Data
    outer_data: Data
    solver_key: Array
    inner_key: Array
    outer_key: Array

    def inner_batch(self, batch_size: int | None = None) -> PyTree:
        """The batch of all that follows the inner solver: all, or so many examples."""
        return held(self.inner_data, batch_size, self.inner_key)

    def outer_batch(self, batch_size: int | None = None) -> PyTree:
        """The batch of the outer loss."""
        return held(self.outer_data, batch_size, self.outer_key)


def drawn(problem: Bilevel, key: Array) -> Drawn:
    """Splits the key of an estimate and draws its data; same key, same data."""
    data_key, solver_key, inner_key, outer_key = jax.random.split(key, 4)
    return Drawn(*problem.data(data_key), solver_key, inner_key, outer_key)
