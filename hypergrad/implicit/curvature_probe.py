"""The search for negative curvature from a random vector."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Scalar

from ..linear.cg import extreme_ritz_values, run_recurrence
from ..linear.equilibration import Scaling
from ..trees import (
    add_scale,
    divide,
    machine_eps,
    norm,
    power_of_two_below,
    random_like,
    vdot,
)
from .differentiation import Point

MAX_PROBE_STEPS = 1000
MISS_PROBABILITY = 0.01  # of `Probe.resolution`


class Probe(NamedTuple):
    """The part of the spectrum of ``S H S`` that a run from a random vector shows.

    Attributes:
      ritz_min, ritz_max, resolution: ``ritz_min``, ``ritz_max`` and
        ``curvature_resolution`` of `Certificate`.
      is_negative: Whether negative curvature was met.
      num_products: Number of products.
    """

    ritz_min: Scalar
    ritz_max: Scalar
    resolution: Scalar
    is_negative: Scalar
    num_products: Scalar


def probe_curvature(
    point: Point,
    scaling: Scaling,
    key: Array,
    num_steps: Array | int,
    curvature_max: Array | float = 0.0,
) -> Probe:
    """Returns the part of the spectrum that steps from a random vector show.

    The adjoint solve meets negative curvature only along directions that ``b``
    contains; a random vector contains all of them. With n parameters, k Lanczos steps
    miss the smallest eigenvalue by more than ``eps`` times the width of the spectrum
    with a probability of at most ``1.648 sqrt(n) exp(-sqrt(eps) (2 k - 1))``.

    A minimum that is not strict, such as that of a matrix factorization, has zero
    eigenvalues, whose sign in floating point is that of a rounding error. The steps
    therefore work with ``S H S + delta I``, where ``delta`` is 4 eps times
    ``curvature_max``: the curvature must be below ``-delta`` to count as negative.

    Args:
      point: Where the curvature is probed.
      scaling: ``S``.
      key: PRNG key of the random vector.
      num_steps: Maximum number of steps.
      curvature_max: A large curvature of ``S H S``, as the solves met it.

    Source: Kuczynski & Wozniakowski 1992, theorem 4.2.
    """
    scaled_hvp = scaling.matvec(point.matvec)
    z = random_like(key, point.w)
    dimension = optax.tree.size(point.w)
    eps = machine_eps(point.w)
    curvature_max = jnp.asarray(curvature_max)
    # Curvatures along residuals that are as small as rounding would underflow.
    unit = power_of_two_below(curvature_max)
    shift = 4 * eps * jnp.where(jnp.isfinite(curvature_max), curvature_max / unit, 0.0)
    matvec = lambda v: add_scale(divide(scaled_hvp(v), unit), shift, v)
    squared_tol = (4 * eps * norm(z)) ** 2
    zeros = optax.tree.zeros_like(z)
    num_coefficients = min(dimension, MAX_PROBE_STEPS)
    num_steps = jnp.minimum(num_steps, MAX_PROBE_STEPS)
    _, r, _, k, curvature, step_sizes, ratios = run_recurrence(
        matvec, lambda r: r, zeros, z, squared_tol, num_steps, num_coefficients
    )
    is_negative = curvature <= 0
    ritz_min, ritz_max = extreme_ritz_values(step_sizes, ratios, k - is_negative)
    ritz_min, ritz_max = unit * (ritz_min - shift), unit * (ritz_max - shift)
    # Both ends of the spectrum are missed with a probability of 1/2% each.
    log_probability = jnp.log(1.648 * dimension**0.5 / (0.5 * MISS_PROBABILITY))
    resolution = (log_probability / jnp.maximum(2.0 * k - 1, 1)) ** 2
    is_exhausted = vdot(r, r) <= squared_tol
    return Probe(
        ritz_min=jnp.where(is_negative, jnp.fmin(ritz_min, 0.0), ritz_min),
        ritz_max=ritz_max,
        resolution=jnp.where(is_exhausted, 0.0, resolution),
        is_negative=is_negative,
        num_products=k,
    )
