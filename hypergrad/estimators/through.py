"""Which way through the inner loop to take."""

import jax
import numpy as np
from jaxtyping import PyTree

from ..inner.protocol import IterativeSolver
from .forward import Forward
from .unrolled import Unrolled

FEW = 3


def through(
    solver: IterativeSolver,
    alpha: PyTree,
    *,
    warm_start: bool | None = None,
    certify: bool = False,
    outer_batch_size: int | None = None,
) -> Forward | Unrolled:
    """The derivative through all of the solver's steps, by the mode that suits alpha.

    Args:
      solver: an inner solver whose iterations may be differentiated.
      alpha: hyperparameters like those to come, or their shapes; N numbers in all.
      warm_start, certify, outer_batch_size: as in `Unrolled`.

    Returns:
      `Forward` for N up to three: T gradients and N T products, batched, in memory
      that is flat in the steps. Else `Unrolled`: 2 T gradients and T products, whatever
      N. Both are exact.

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> solver = hg.Descent(optax.sgd(0.1), 1000)
    >>> type(hg.through(solver, {"log_rate": 0.0})).__name__
    'Forward'
    >>> type(hg.through(solver, jnp.zeros(50))).__name__
    'Unrolled'
    """
    count = sum(map(np.size, jax.tree.leaves(alpha)))
    estimator = Forward if count <= FEW else Unrolled
    return estimator(
        solver,
        warm_start=warm_start,
        certify=certify,
        outer_batch_size=outer_batch_size,
    )
