"""Inner solvers from optimistix."""

import functools
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from ...batches import Data, full_batch
from ...number_checks import check_positive_int
from ...products import Loss
from ...runtime.compat import import_optional
from ...trees import cast_like
from ..base import InnerStats, inner_stats
from .shared import explain_dtype_errors

#: The reason why a minimizer is rejected, by the name of its class.
REJECTED = {
    "GoldenSearch": (
        "keeps w in a set, so that dL/dw is not 0 at a solution on the boundary of the "
        "set. Remove the constraint, or write it into the inner loss by a bijection "
        "such as softplus"
    ),
    "NelderMead": (
        "starts from a degenerate simplex in several variables (as of 0.1.0) and stops "
        "at points that are not minima. Use optimistix.BFGS"
    ),
}


def from_optimistix(solver: Any, max_steps: int | None = 256) -> "Optimistix":
    """Returns an inner solver from an optimistix minimizer.

    Args:
      solver: Instance of `optimistix.AbstractMinimiser`, such as
        ``optimistix.BFGS(rtol=1e-8, atol=1e-8)``.
      max_steps: Maximum number of steps, or None for no limit. If it is reached, or a
        step is not finite, the last iterate is returned and no error is raised.

    Raises:
      ImportError: optimistix is not installed.
      TypeError: The solver is not a minimizer. It is ``GoldenSearch``, which keeps
        ``w`` in an interval, or ``NelderMead``, which misses the minimum in several
        variables.
      ValueError: ``max_steps`` is less than 1.

    Cost, memory and bias: see `Optimistix`.

    Source: Rader, Lyons & Kidger 2024, arXiv:2402.09983.

    >>> import jax, jax.numpy as jnp, optimistix, hypergrad as hg
    >>> loss = lambda w, alpha, batch: jnp.sum(jnp.cosh(w - alpha))
    >>> solver = hg.from_optimistix(optimistix.BFGS(rtol=1e-6, atol=1e-6))
    >>> w, _ = solver.solve(loss, jnp.zeros(2), jnp.ones(2), None, jax.random.key(0))
    >>> bool(jnp.allclose(w, 1.0, atol=1e-3))
    True
    """
    optimistix = _import_optimistix()
    if isinstance(solver, type):
        name = solver.__name__
        raise TypeError(
            f"solver must be an instance; got the class {name}. Write "
            f"optimistix.{name}(rtol=1e-8, atol=1e-8)."
        )
    if not isinstance(solver, optimistix.AbstractMinimiser):
        raise TypeError(
            "solver must be a minimizer such as optimistix.BFGS or "
            f"optimistix.NonlinearCG; got {type(solver).__name__}. Least-squares and "
            "root-finding solvers need a vector of residuals, but the inner loss is a "
            "scalar."
        )
    innermost = solver
    while isinstance(innermost, optimistix.BestSoFarMinimiser):
        innermost = innermost.solver
    for name, reason in REJECTED.items():
        if isinstance(innermost, getattr(optimistix, name)):
            raise TypeError(
                "solver must find a minimum of the inner loss, at which dL/dw = 0; got "
                f"optimistix.{name}, which {reason}."
            )
    check_positive_int("max_steps", max_steps, optional=True)
    is_array = lambda leaf: isinstance(leaf, jax.Array | np.ndarray | np.generic)
    arrays, static = eqx.partition(solver, is_array)
    return Optimistix(arrays, static, max_steps)


class Optimistix(eqx.Module):
    """`optimistix.minimise` without its own differentiation; see `from_optimistix`.

    The iterations cannot be differentiated, because reverse mode does not work through
    their `jax.lax.while_loop`. The solver uses all of the data, never a mini-batch.
    Under ``jax_enable_x64``, ``LBFGS`` and ``BestSoFarMinimiser`` of optimistix 0.1
    raise an error for a float32 ``w``.

    Args:
      arrays: Arrays of the minimizer, such as a learning rate, which are data.
      static: The minimizer without its arrays, static and compared by value.
      max_steps: Maximum number of steps.

    Cost:
      One gradient per step, because each trial of a line search is a step. This is a
      lower bound for an ``OptaxMinimiser`` with a line search of optax, whose
      evaluations are not counted.
    Memory: that of the minimizer.
    Bias:
      None at small enough tolerances. The statistic ``converged`` is 0 if the minimizer
      stopped before it met them.

    Source: Rader, Lyons & Kidger 2024, arXiv:2402.09983.

    >>> import jax, jax.numpy as jnp, optimistix, hypergrad as hg
    >>> loss = lambda w, alpha, batch: jnp.sum(jnp.cosh(w - alpha))
    >>> solver = hg.from_optimistix(optimistix.NonlinearCG(rtol=1e-6, atol=1e-6))
    >>> w, _ = solver.solve(loss, jnp.zeros(2), jnp.ones(2), None, jax.random.key(0))
    >>> solver.differentiable, bool(jnp.allclose(w, 1.0, atol=1e-4))
    (False, True)
    """

    arrays: PyTree
    static: PyTree = eqx.field(static=True)
    max_steps: int | None = eqx.field(static=True)

    citations = ("optimistix2024",)
    differentiable = False

    def solve(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, InnerStats]:
        """Returns the minimum, in the dtypes of ``w``, and the cost of finding it."""
        w = jax.tree.map(jnp.asarray, w)
        with explain_dtype_errors("optimistix", w):
            solution = _import_optimistix().minimise(
                _Objective(inner_loss),
                eqx.combine(self.arrays, self.static),
                w,
                (alpha, full_batch(data, key)),
                max_steps=self.max_steps,
                adjoint=_no_adjoint(),
                throw=False,
            )
        num_steps = solution.stats["num_steps"]
        converged = solution.result == _import_optimistix().RESULTS.successful
        stats = inner_stats(num_steps, num_grads=num_steps, converged=converged)
        return cast_like(solution.value, w), stats


class _Objective(eqx.Module):
    """The function ``(w, (alpha, batch)) -> loss``; equal for equal losses.

    Equality lets optimistix reuse a compiled program.
    """

    inner_loss: Loss = eqx.field(static=True)

    def __call__(self, w: PyTree, args: tuple[PyTree, PyTree]) -> Array:
        return self.inner_loss(w, *args)


def _import_optimistix() -> Any:
    return import_optional("optimistix", "from_optimistix needs optimistix", "solvers")


@functools.cache
def _no_adjoint() -> Any:
    """Returns an optimistix adjoint that runs the loop and defines no derivative."""

    class NoAdjoint(_import_optimistix().AbstractAdjoint):
        def apply(self, primal_fn, rewrite_fn, inputs, tags):
            del rewrite_fn, tags
            loop = functools.partial(eqxi.while_loop, kind="lax")
            return primal_fn((*inputs, loop))

    return NoAdjoint()
