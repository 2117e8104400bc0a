"""The Neumann series of benchmark_bilevel's code of 2022, whose terms are doubled.

That code (`benchmark_utils/hessian_approximation.py` at 58c75ee) sums the series by

    s = v
    for _ in range(n_step):
        v -= step_size * hvp
        s += v

in NumPy and Numba, where ``s`` and ``v`` are one array. Each pass of the loop therefore
doubles ``v``, and the result is ``eta prod_i 2 (I - eta H_i) b`` in place of the sum
``eta sum_k prod_{i <= k} (I - eta H_i) b``: with ten products, its last term times
1,024.
"""

import jax
import optax
from jaxtyping import Array, Int, PyTree

import hypergrad as hg
from hypergrad.batches import Data
from hypergrad.estimators.single_loop.inner_loops import Points, StochasticNeumann
from hypergrad.extend import hvp, sample_in_pass


class DoubledSeries(StochasticNeumann):
    """Returns ``eta prod_i 2 (I - eta H_i) b``, with ``num_terms - 1`` products."""

    def solve(
        self,
        problem: hg.Bilevel,
        points: Points,
        bs: tuple[PyTree, ...],
        data: Data,
        key: Array,
    ) -> tuple[tuple[PyTree, ...], Int[Array, ""]]:
        """Returns the product at each point, and the number of its factors."""
        num_products = self.num_terms - 1
        keys = jax.random.split(key, num_products)

        def double(p: PyTree, Hp: PyTree) -> PyTree:
            return jax.tree.map(lambda x, y: 2 * (x - self.step_size * y), p, Hp)

        def multiply(k, ps):
            batch = sample_in_pass(data, keys[k], k, num_products, stream="v")
            product = lambda point, p: hvp(problem.inner_loss, *point, batch, p)
            pairs = zip(points, ps, strict=True)
            return tuple(double(p, product(point, p)) for point, p in pairs)

        ps = jax.lax.fori_loop(0, num_products, multiply, bs)
        vs = tuple(optax.tree.scale(self.step_size, p) for p in ps)
        return vs, jax.numpy.asarray(num_products)


class DoubledStocBiO(hg.StocBiO):
    """StocBiO with the doubled series."""

    @property
    def series(self) -> DoubledSeries:
        """The series in place of the adjoint."""
        return DoubledSeries(self.step_size, self.num_terms)
