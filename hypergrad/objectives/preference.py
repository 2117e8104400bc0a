"""A Pareto optimum on a given ray, from either side of it."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from ..validation import float_converter
from .base import check_positive, check_size, check_weights
from .common_descent import MGDA
from .linear_program import solve_vertex_lp

LARGEST = 6


class EPO(eqx.Module):
    """Exact preference: to the Pareto optimum where all ``weights_k M_k`` are equal.

    With ``s_k = r_k M_k / sum_j r_j M_j`` the imbalance is ``mu = sum_k s_k log(K
    s_k)``, 0 on the ray, and ``a_k = r_k (log(K s_k) - mu)`` weighs the gradients
    towards it. Let ``G = [g_i . g_j]``. The weights x of a step are on the simplex; off
    the ray they make the step agree most with that direction, largest ``x'G a``, where
    no value rises faster than along it: ``(G x)_k >= (G a)_k`` where ``(G a)_k <= 0``,
    and the value farthest above the ray not at all: ``(G x)_k >= 0``; none rises where
    no ``(G a)_k`` is above 0. On the ray they lower all values: largest ``sum_k (G
    x)_k`` with ``G x >= 0``.

    So it climbs where it must, along the front too, which neither a weighted sum nor
    MGDA does. A front that the ray does not meet is left on the way to it.

    Args:
      weights: ``[K]``, each above 0, of which the ratios matter: r is ``weights`` over
        their sum. K is at most 6.
      tolerance: the imbalance up to which the values count as on the ray; about half
        the mean of the squared relative differences of ``weights_k M_k``.
      ideal: ``[K]`` or a number, taken from the values, which must stay above it; one
        that does not makes the weights NaN, which ends the run, and ``trace.status``
        says so. A loss that may fall below 0, such as the seconds of a `LatencyTable`
        beyond its knots, needs an ``ideal`` below all that it can be, or a space.

    Cost: K² inner products and a linear program of K variables, solved to rounding by
    trying its vertices, ``(2K choose K - 1)`` of them.

    No score: ``trace.best_alpha`` is the last.

    Source: Mahapatra & Rajan 2020, the linear programs of the code they published; on
    the ray the one that they call relaxed, which is always feasible.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> aggregator = hg.objectives.EPO(jnp.array([1.0, 1.0]))
    >>> opposed = jnp.array([[4.0, -4.0], [-4.0, 4.0]])  # at a point of the front
    >>> weights, _ = aggregator.compute_weights(jnp.array([3.0, 1.0]), opposed, None)
    >>> bool(weights[0] > weights[1])
    True
    """

    weights: Array = eqx.field(converter=float_converter("weights", optional=False))
    tolerance: float | Array = eqx.field(
        converter=float_converter("tolerance", optional=False), default=1e-6
    )
    ideal: float | Array = eqx.field(
        converter=float_converter("ideal", optional=False), default=0.0
    )

    citations = ("mahapatra2020",)

    def __check_init__(self):
        check_weights(self.weights, positive=True)
        check_positive("tolerance", self.tolerance)

    def init(self, num_objectives: int) -> None:
        """No state; K weights."""
        check_size("weights", self.weights, num_objectives, num_objectives)
        check_size("ideal", self.ideal, num_objectives, num_objectives)
        if num_objectives > LARGEST:
            raise ValueError(
                f"EPO tries all vertices, which are too many beyond {LARGEST} outer "
                f"losses; the problem has {num_objectives}: take SmoothTchebycheff"
            )

    def compute_weights(
        self, value: Array, gram: Array, state: None
    ) -> tuple[Array, None]:
        """By one of two linear programs, off the ray and on it."""
        r = (self.weights / jnp.sum(self.weights)).astype(gram.dtype)
        share = r * jnp.asarray(value - self.ideal, gram.dtype)
        share = share / jnp.sum(share)
        above = jnp.log(share.size * share)
        imbalance = share @ above
        a = r * (above - imbalance)
        along = gram @ a

        free = (along > 0) & (share < jnp.max(share))
        least = jnp.where(free, -jnp.inf, jnp.minimum(along, 0))
        highest = (share == jnp.max(share)) | ~jnp.any(along > 0)
        least = jnp.where(highest, 0, least)
        off = imbalance > self.tolerance
        x, found = solve_vertex_lp(
            jnp.where(off, along, jnp.sum(gram, axis=0)),
            gram,
            jnp.where(off, least, 0),
        )
        # The shortest vector satisfies both, also where rounding leaves no vertex.
        shortest, _ = MGDA().compute_weights(value, gram, None)
        x = jnp.where(found, x, shortest)
        on_a_ray = jnp.all(value > self.ideal) & jnp.isfinite(imbalance)
        return jnp.where(on_a_ray, x, jnp.nan), state
