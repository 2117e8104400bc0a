"""One hypergradient, with no state to carry."""

from collections.abc import Callable

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from .checks import (
    as_inputs,
    as_key,
    check_estimator_is,
    check_problem_is,
    rehearse,
    traced,
)
from .estimators.protocol import Estimate, Estimator
from .problem import Bilevel


def hypergradient(problem: Bilevel, estimator: Estimator) -> Callable[..., Estimate]:
    """``(w, alpha, key=None) -> Estimate``, compiled, for one shot.

    Args:
      problem: the two losses and their data.
      estimator: how; one that only makes sense over many steps is a TypeError that
        points to `minimize`.

    The returned function starts the inner solver at ``w`` and may itself be jitted and
    vmapped. Calls with the same objects and shapes share one compiled program.

    Raises:
      TypeError, ValueError: bad input, before anything is traced.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> inner = lambda w, alpha, batch: jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: jnp.sum((w - 1.0) ** 2)
    >>> gradient = hg.hypergradient(hg.Bilevel(inner, outer), hg.Implicit(hg.Newton()))
    >>> gradient(jnp.zeros(2), jnp.array([2.0, 3.0])).hypergradient.tolist()
    [2.0, 4.0]
    """
    check_problem_is(problem)
    check_estimator_is(estimator)
    if getattr(estimator, "single_loop", False):
        raise TypeError(
            f"{type(estimator).__name__} makes one step of w, the adjoint and alpha at "
            "a time, and one alone says nothing; run it by hg.minimize(problem, "
            "estimator, optimizer, w, alpha, num_steps=...)"
        )
    estimator, problem = traced((estimator, problem))

    def one_shot(w: PyTree, alpha: PyTree, key: Array | None = None) -> Estimate:
        w, alpha = as_inputs(w, alpha)
        rehearse(estimator, problem, w, alpha)
        return _one_shot(problem, estimator, w, alpha, as_key(key))

    return one_shot


@eqx.filter_jit
def _one_shot(problem, estimator, w, alpha, key):
    init_key, estimate_key = jax.random.split(key)
    state = estimator.init(problem, w, alpha, init_key)
    return estimator.estimate(problem, state, alpha, estimate_key)[0]
