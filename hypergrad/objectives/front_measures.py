"""Measures of Pareto fronts: which points belong to one, and how much it dominates."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..citation import cites


def non_dominated(points: Float[Array, "P K"]) -> Bool[Array, " P"]:
    """Returns True for each point that no other point dominates.

    A point dominates another if it is as low in every value and lower in one, so that
    equal points do not dominate each other.

    Args:
      points: Values to be minimized. A point with a NaN is dominated, and dominates no
        other.

    Cost: P² comparisons.

    Raises:
      ValueError: ``points`` is not a matrix.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> points = jnp.array([[1.0, 3.0], [2.0, 1.0], [2.0, 3.0]])
    >>> hg.objectives.non_dominated(points).tolist() == [True, True, False]
    True
    """
    points = jnp.asarray(points)
    if points.ndim != 2:
        raise ValueError(f"points must have shape [P, K]; got {points.shape}.")
    x, y = points[:, None], points[None]
    dominates = jnp.all(y <= x, axis=-1) & jnp.any(y < x, axis=-1)
    return ~jnp.any(dominates, axis=1) & ~jnp.any(jnp.isnan(points), axis=1)


@cites("zitzler1999")
def hypervolume(
    points: Float[Array, "P K"], reference: Float[Array, " K"]
) -> Float[Array, ""]:
    """Returns the volume that the points dominate, bounded by ``reference``; exact.

    Args:
      points: Values to be minimized. Dominated points, and points that are not below
        ``reference`` in every value, add nothing. The volume is NaN if a point is.
      reference: A bad value of each loss.

    Cost: ``P^(K-1) log P`` operations and about as much memory; for few losses.

    Raises:
      ValueError: The shapes do not match, or there is no point.

    Source: Zitzler & Thiele 1999.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> points = jnp.array([[1.0, 3.0], [2.0, 1.0]])
    >>> float(hg.objectives.hypervolume(points, jnp.array([4.0, 4.0])))
    7.0
    """
    # As floating-point numbers, because products of integers may wrap around.
    points, reference = 1.0 * jnp.asarray(points), 1.0 * jnp.asarray(reference)
    if points.ndim != 2 or points.size == 0 or reference.shape != points.shape[1:]:
        raise ValueError(
            "points must have shape [P, K], P >= 1, and reference [K]; got shapes "
            f"{points.shape} and {reference.shape}."
        )
    # A point that is not below the reference adds nothing; a NaN remains.
    is_above = jnp.any(points >= reference[None], axis=1)
    is_outside = is_above & ~jnp.any(jnp.isnan(points), axis=1)
    points = jnp.where(is_outside[:, None], reference[None], points)
    return _volume(points, reference)


def _volume(points: Array, reference: Array) -> Array:
    """Returns the dominated volume of points that are at most ``reference``.

    The volume is a sum of slices along the last value: between the last values of two
    consecutive points, a slice is the volume of the points below it in one dimension
    less.
    """
    if reference.size == 1:
        return reference[0] - jnp.min(points)
    points = points[jnp.argsort(points[:, -1])]
    upper = jnp.append(points[1:, -1], reference[-1])
    is_flat = upper == points[:, -1]  # infinities too, whose difference is NaN
    heights = jnp.where(is_flat, 0, upper - points[:, -1])
    points, reference = points[:, :-1], reference[:-1]
    if reference.size == 1:
        areas = reference - jax.lax.cummin(points[:, 0])
        return heights @ jnp.where(is_flat, 0, areas)
    # Slice i contains the points 0..i; the others are replaced by points of no volume.
    slice_volume = lambda mask: _volume(
        jnp.where(mask[:, None], points, reference[None]), reference
    )
    volumes = jax.vmap(slice_volume)(jnp.tri(len(points), dtype=bool))
    return heights @ jnp.where(is_flat, 0, volumes)
