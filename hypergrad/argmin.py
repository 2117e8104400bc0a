"""``w*(alpha)`` as a differentiable function."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from .inner.base import InnerSolver
from .linear import CG
from .linear.base import check_linear_solver as check_linear_solver
from .linear.base import solve_linear
from .problem import Batches
from .problem_checks import check_scalar_loss
from .products import Loss, cross_jvp, hvp
from .trees import scale
from .validation import (
    as_input_arrays,
    as_key,
    check_hashable,
    check_same_structure,
    check_solver,
)


def argmin(
    inner_loss: Loss,
    solver: InnerSolver,
    linear_solver: lx.AbstractLinearSolver | None = None,
) -> Callable[..., PyTree]:
    """``f(w0, alpha, batch=None) -> w*``, differentiable in ``alpha`` and ``batch``.

    ``dw* = -H^-1 d(dL/dw)`` by the implicit function theorem, as a rule for forward
    mode whose linear solve can be transposed: `jax.grad`, `jacfwd`, `jacrev`,
    `hessian`, `vmap` and `jit` all work, to any order, and one argmin nests in another.
    The solver itself is never differentiated.

    Args:
      inner_loss: ``(w, alpha, batch) -> scalar``. Values it closes over are
        differentiated too where they are being traced.
      solver: finds the minimum from ``w0``; run it to convergence, since the rule holds
        at the stationary point only.
      linear_solver: as in `Implicit`; default `CG`.

    Derivatives by ``w0`` are zero: the minimum does not remember where it was found.

    Cost: one linear solve a derivative; forward and reverse alike.

    Source: Blondel et al. 2022 (arXiv 2105.15183), equation 3.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> loss = lambda w, alpha, batch: jnp.sum((w - jnp.exp(alpha)) ** 2)
    >>> solution = hg.argmin(loss, hg.Newton())
    >>> gradient = jax.grad(lambda alpha: solution(0.0, alpha))(0.0)
    >>> round(float(gradient), 4)
    1.0
    """
    if not callable(inner_loss):
        raise TypeError(f"inner_loss must be a function; got {inner_loss!r}")
    check_hashable("inner_loss", inner_loss)
    check_solver(solver)
    linear_solver = CG() if linear_solver is None else linear_solver
    check_linear_solver(linear_solver)

    def solution(
        w0: PyTree, alpha: PyTree, batch: PyTree = None, key: Array | None = None
    ) -> PyTree:
        w0, _ = as_input_arrays(w0, alpha, differentiable=False)
        key = as_key(key)
        if isinstance(batch, Batches):
            raise TypeError(
                "batch must be a pytree of arrays, which argmin uses whole; got "
                "Batches: pass its .all"
            )
        check_scalar_loss("inner_loss", inner_loss, w0, alpha, batch)
        solve_for = lambda w0: solver.solve(inner_loss, w0, alpha, batch, key)[0]
        found = jax.eval_shape(solve_for, w0)
        check_same_structure(f"{type(solver).__name__}.solve", found, w0)
        loss, closed_over = jax.closure_convert(inner_loss, w0, alpha, batch)
        return _argmin(loss, solver, linear_solver, key)(
            w0, (alpha, batch, *closed_over)
        )

    return solution


def _argmin(loss, solver, linear_solver, key):
    @jax.custom_jvp
    def best(w0, args):
        alpha, batch, *closed_over = args
        inner_loss = lambda w, alpha, batch: loss(w, alpha, batch, *closed_over)
        return solver.solve(inner_loss, w0, alpha, batch, key)[0]

    @best.defjvp
    def rule(primals, tangents):
        (w0, args), (_, args_dot) = primals, tangents
        w = best(w0, args)
        # One vector: jax cannot transpose a solve of whose leaves some are constant.
        b, unravel = ravel_pytree(cross_jvp(loss, w, args, args_dot))
        inner_loss = lambda w, args, _: loss(w, *args)
        product = lambda v: hvp(inner_loss, w, args, None, v)
        matvec = lambda v: ravel_pytree(product(unravel(v)))[0]
        zero = jnp.zeros_like(b)
        inverse = lambda matvec, b: solve_linear(linear_solver, matvec, b, zero)[0]
        solved = jax.lax.custom_linear_solve(matvec, b, inverse, symmetric=True)
        return w, scale(-1, unravel(solved))

    return best
