"""Error estimates of sequences and random samples."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from ..certificate import TRUST_RTOL
from ..trees import divide, norm, power_of_two_scale, ratio

#: Fewer samples hardly show how much they differ, and are trusted only if they agree.
MIN_SAMPLES = 4
MAX_ERROR_OF_FEW = 1e-5


def remaining_change(changes: Float[Array, " n"], eps: float) -> Scalar:
    """Estimates how much a sequence that converges linearly will still change.

    Let ``p`` be the sum of the last ``s = n // 4`` changes, and ``R`` the factor by
    which such sums contract. All later changes sum to

        p (R + R^2 + ...) = p R / (1 - R).

    ``R`` is the larger one of two observations: the last s changes over the s before,
    and the root of the last 2 s over the 2 s before. Because lengths are added, an
    oscillation of the sequence does not cancel.

    Args:
      changes: Lengths of the successive changes of the sequence.
      eps: Machine epsilon of the sequence. Rounding hides a contraction by less than
        ``sqrt(eps)`` per change, so that ``R`` is at most ``(1 - sqrt(eps))^s``.

    Returns:
      The estimate; 0 for a single change, which shows no contraction.
    """
    num_changes = changes.size
    if num_changes < 2:
        return jnp.zeros((), changes.dtype)
    s = max(1, num_changes // 4)
    path = jnp.sum(changes[-s:])
    R = ratio(path, jnp.sum(changes[-2 * s : -s]))
    if num_changes >= 4 * s:
        earlier, later = changes[-4 * s : -2 * s], changes[-2 * s :]
        R = jnp.maximum(R, jnp.sqrt(ratio(jnp.sum(later), jnp.sum(earlier))))
    R = jnp.minimum(R, (1 - eps**0.5) ** s)
    return jnp.where(path == 0, 0.0, path * R / (1 - R))


def max_standard_error(num_samples: int) -> float:
    """Returns the relative standard error up to which a mean of samples is trusted.

    It is ``TRUST_RTOL`` for many samples. The deviation of few may be small by chance:
    the half-width ``t s`` of a 95% interval, with Student's t, is then compared.
    """
    if num_samples < MIN_SAMPLES:
        return MAX_ERROR_OF_FEW
    from scipy import special  # it takes long to import

    quantile = 0.975
    t = special.stdtrit(num_samples - 1, quantile)
    return TRUST_RTOL * float(special.ndtri(quantile) / t)


def standard_error(samples: PyTree, mean: PyTree, is_multi_objective: bool) -> Scalar:
    """Returns ``sqrt(sum_i ||h_i - h||^2 / (n (n - 1))) / ||h||``.

    Args:
      samples: Hypergradients ``h_i``; each leaf has a leading axis of size n.
      mean: Their mean ``h``.
      is_multi_objective: Whether leaves have the axes ``[n, K, ...]``; the maximum over
        the K losses is returned.

    Returns:
      The relative standard error of the mean: 0 for equal samples, NaN for one.
    """
    if is_multi_objective:
        per_objective = lambda samples, mean: standard_error(samples, mean, False)
        return jnp.max(jax.vmap(per_objective, in_axes=(1, 0))(samples, mean))
    deviations = jax.tree.map(lambda sample, m: sample - m[None], samples, mean)
    num_samples = jax.tree.leaves(samples)[0].shape[0]
    if num_samples == 1:
        return jnp.asarray(jnp.nan)
    unit = power_of_two_scale(mean)
    deviation = norm(divide(deviations, unit))
    error = deviation / (num_samples * (num_samples - 1)) ** 0.5
    return ratio(error, norm(divide(mean, unit)))
