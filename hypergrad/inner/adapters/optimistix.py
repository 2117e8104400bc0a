"""Inner solvers from optimistix."""

import functools
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from ...problem import Data, full_batch
from ...products import Loss
from ...validation import check_positive_int
from ..base import InnerStats, inner_stats
from .shared import BOUND, cast_like, explained

OPTIMISTIX = {
    "GoldenSearch": BOUND,
    "NelderMead": "starts from a degenerate simplex in several variables (as of "
    "0.1.0) and stops at points that are no minimisers",
}


def from_optimistix(solver: Any, max_steps: int | None = 256) -> "Optimistix":
    """An inner solver from an optimistix minimiser.

    Args:
      solver: an `optimistix.AbstractMinimiser`, such as
        ``optimistix.BFGS(rtol=1e-8, atol=1e-8)``.
      max_steps: steps at the most; None for no limit. Where they run out, or a step is
        not finite, the last iterate is returned and no error is raised.

    Raises:
      ImportError: optimistix is not installed.
      TypeError: what is no minimiser; ``GoldenSearch``, which keeps ``w`` in an
        interval; ``NelderMead``, which misses the minimum in several variables.
      ValueError: ``max_steps`` below 1.

    Cost, memory and bias: see `Optimistix`.

    Source: Rader, Lyons & Kidger 2024, arXiv:2402.09983.

    >>> import jax, jax.numpy as jnp, optimistix, hypergrad as hg
    >>> loss = lambda w, alpha, batch: jnp.sum(jnp.cosh(w - alpha))
    >>> solver = hg.from_optimistix(optimistix.BFGS(rtol=1e-6, atol=1e-6))
    >>> w, _ = solver.solve(loss, jnp.zeros(2), jnp.ones(2), None, jax.random.key(0))
    >>> bool(jnp.allclose(w, 1.0, atol=1e-3))
    True
    """
    optimistix = _optimistix()
    if isinstance(solver, type):
        raise TypeError(
            f"solver is the class {solver.__name__}; pass an instance, "
            f"optimistix.{solver.__name__}(rtol=1e-8, atol=1e-8)"
        )
    if not isinstance(solver, optimistix.AbstractMinimiser):
        raise TypeError(
            "solver must be a minimiser such as optimistix.BFGS or "
            "optimistix.NonlinearCG (a least-squares or root-finding solver needs a "
            "vector of residuals, and the inner loss is a scalar); "
            f"got {type(solver).__name__}"
        )
    inmost = solver
    while isinstance(inmost, optimistix.BestSoFarMinimiser):
        inmost = inmost.solver
    for name, why in OPTIMISTIX.items():
        if isinstance(inmost, getattr(optimistix, name)):
            raise TypeError(f"optimistix.{name} {why}; optimistix.BFGS will do")
    check_positive_int("max_steps", max_steps, optional=True)
    is_array = lambda leaf: isinstance(leaf, jax.Array | np.ndarray | np.generic)
    arrays, rest = eqx.partition(solver, is_array)
    return Optimistix(arrays, rest, max_steps)


class Optimistix(eqx.Module):
    """`optimistix.minimise`, which never differentiates here; see `from_optimistix`.

    Args:
      arrays: the solver's arrays (a learning rate), which are data.
      rest: the solver without them, static and compared by value.
      max_steps: steps at the most.

    Not differentiable step by step: a `lax.while_loop`, so reverse mode refuses it.
    Uses all of the data, never a mini-batch. Under ``jax_enable_x64``, optimistix 0.1
    refuses a float32 ``w`` in ``LBFGS`` and ``BestSoFarMinimiser``.

    Cost: one gradient a step, since each trial point of a line search is a step of its
    own; a lower bound for an `OptaxMinimiser`, the evaluations of whose optax line
    search are not visible. Memory: the solver's. Bias: none at small enough
    tolerances.

    Source: Rader, Lyons & Kidger 2024, arXiv:2402.09983.

    >>> import jax, jax.numpy as jnp, optimistix, hypergrad as hg
    >>> loss = lambda w, alpha, batch: jnp.sum(jnp.cosh(w - alpha))
    >>> solver = hg.from_optimistix(optimistix.NonlinearCG(rtol=1e-6, atol=1e-6))
    >>> w, _ = solver.solve(loss, jnp.zeros(2), jnp.ones(2), None, jax.random.key(0))
    >>> solver.differentiable, bool(jnp.allclose(w, 1.0, atol=1e-4))
    (False, True)
    """

    arrays: PyTree
    rest: PyTree = eqx.field(static=True)
    max_steps: int | None = eqx.field(static=True)

    citations = ("optimistix2024",)
    differentiable = False

    def solve(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, InnerStats]:
        """``(w*, stats)``; same structure and dtypes as ``w``."""
        w = jax.tree.map(jnp.asarray, w)
        with explained("optimistix", w):
            solution = _optimistix().minimise(
                _Objective(inner_loss),
                eqx.combine(self.arrays, self.rest),
                w,
                (alpha, full_batch(data, key)),
                max_steps=self.max_steps,
                adjoint=_undifferentiated(),
                throw=False,
            )
        steps = solution.stats["num_steps"]
        return cast_like(solution.value, w), inner_stats(steps, num_grads=steps)


class _Objective(eqx.Module):
    """``fn(w, (alpha, batch))``, equal for equal losses: optimistix's cache hits."""

    inner_loss: Loss = eqx.field(static=True)

    def __call__(self, w: PyTree, args: tuple[PyTree, PyTree]) -> Array:
        return self.inner_loss(w, *args)


def _optimistix() -> Any:
    try:
        import optimistix
    except ImportError as error:
        raise ImportError(
            "from_optimistix needs optimistix: pip install 'hypergrad-jax[solvers]'"
        ) from error
    return optimistix


@functools.cache
def _undifferentiated() -> Any:
    """An optimistix adjoint that is none: the bare loop."""

    class Undifferentiated(_optimistix().AbstractAdjoint):
        def apply(self, primal_fn, rewrite_fn, inputs, tags):
            del rewrite_fn, tags
            loop = functools.partial(eqxi.while_loop, kind="lax")
            return primal_fn((*inputs, loop))

    return Undifferentiated()
