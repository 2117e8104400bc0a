"""Which way through the inner loop is cheaper."""

from typing import Any

from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from ..inner.protocol import IterativeSolver
from .forward import Forward
from .unrolled import Unrolled

FEW = 3


def through(
    solver: IterativeSolver, alpha: PyTree, **settings: Any
) -> Forward | Unrolled:
    """The derivative through all of the solver's steps, by the mode that costs less.

    Args:
      solver: an inner solver whose iterations may be differentiated.
      alpha: hyperparameters like those to come; N numbers in all.
      **settings: ``warm_start``, ``certify``, ``outer_batch_size``, as in `Unrolled`.

    Returns:
      `Forward`, about 1 + N inner runs in memory flat in the steps, for N up to three;
      else `Unrolled`, about four inner runs whatever N. Both are exact.

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> solver = hg.Descent(optax.sgd(0.1), 1000)
    >>> type(hg.through(solver, {"log_rate": 0.0})).__name__
    'Forward'
    >>> type(hg.through(solver, jnp.zeros(50))).__name__
    'Unrolled'
    """
    size = ravel_pytree(alpha)[0].size
    estimator = Forward if size <= FEW else Unrolled
    return estimator(solver, **settings)
