"""``w*(alpha)`` as a differentiable function."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from .batches import Batches
from .inner.base import InnerSolver
from .linear import MINRES
from .linear.base import check_linear_solver, solve_linear
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
    """Returns ``f(w0, alpha, batch=None, key=None) -> w*``, a differentiable function.

    The derivative of ``w*`` with respect to ``alpha`` and ``batch`` is that of the
    implicit function theorem,

        dw* = -H^-1 d(dL/dw)    with    H = d2L/dw2,

    a rule for forward mode whose linear solve can be transposed. `jax.grad`, `jacfwd`,
    `jacrev`, `hessian`, `vmap` and `jit` work to any order, and one argmin nests in
    another. The solver itself is never differentiated.

    Args:
      inner_loss: ``(w, alpha, batch) -> scalar``. Traced values that it closes over are
        differentiated too.
      solver: Finds the minimum from ``w0``. Let it converge, because the rule holds
        only at a stationary point. A saddle is one, and a singular minimum is if the
        system has a solution.
      linear_solver: Solver of the linear system. Defaults to `MINRES` with a diagonal
        preconditioner, which needs no minimum and for which the units of ``w`` do not
        matter. Where the solver does not reach its tolerance, the derivative is NaN.

    Returns:
      A function of ``w0``, ``alpha``, an optional ``batch`` and an optional PRNG key.
      Its derivative with respect to ``w0`` is zero, because the minimum does not depend
      on where the solver starts.

    Raises:
      TypeError, ValueError: An argument is invalid; raised before anything is compiled.

    Cost:
      One linear solve per derivative, in forward and in reverse mode.

    Source: Blondel et al. 2022 (arXiv 2105.15183), equation 3.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> loss = lambda w, alpha, batch: jnp.sum((w - jnp.exp(alpha)) ** 2)
    >>> solution = hg.argmin(loss, hg.Newton())
    >>> gradient = jax.grad(lambda alpha: solution(0.0, alpha))(0.0)
    >>> round(float(gradient), 4)
    1.0
    """
    if not callable(inner_loss):
        raise TypeError(
            "inner_loss must be a function (w, alpha, batch) -> scalar; got "
            f"{inner_loss!r}."
        )
    check_hashable("inner_loss", inner_loss)
    check_solver(solver)
    if linear_solver is None:
        linear_solver = MINRES(preconditioner="diagonal")
    check_linear_solver(linear_solver)

    def solution_fn(
        w0: PyTree, alpha: PyTree, batch: PyTree = None, key: Array | None = None
    ) -> PyTree:
        w0, _ = as_input_arrays(w0, alpha, differentiable=False)
        key = as_key(key)
        if isinstance(batch, Batches):
            raise TypeError(
                "batch must be a pytree of arrays, which argmin uses whole; got "
                "Batches. Pass its full_batch()."
            )
        check_scalar_loss("inner_loss", inner_loss, w0, alpha, batch)
        solve = lambda w0: solver.solve(inner_loss, w0, alpha, batch, key)[0]
        solution = jax.eval_shape(solve, w0)
        check_same_structure(f"{type(solver).__name__}.solve", solution, w0)
        loss, closed_over = jax.closure_convert(inner_loss, w0, alpha, batch)
        solve = _make_differentiable_solve(loss, solver, linear_solver, key)
        return solve(w0, (alpha, batch, *closed_over))

    return solution_fn


def _make_differentiable_solve(loss, solver, linear_solver, key):
    """Returns ``(w0, (alpha, batch, *closed_over)) -> w*`` with its derivative."""

    @jax.custom_jvp
    def solve(w0, args):
        alpha, batch, *closed_over = args
        inner_loss = lambda w, alpha, batch: loss(w, alpha, batch, *closed_over)
        return solver.solve(inner_loss, w0, alpha, batch, key)[0]

    @solve.defjvp
    def solve_jvp(primals, tangents):
        (w0, args), (_, args_dot) = primals, tangents
        w = solve(w0, args)
        # H dw* = -d(dL/dw)
        grad_dot = cross_jvp(loss, w, args, args_dot)
        # Ravel first: JAX cannot transpose a solve in which some leaves are constant.
        b, unravel = ravel_pytree(grad_dot)
        inner_loss = lambda w, args, _: loss(w, *args)
        product = lambda v: hvp(inner_loss, w, args, None, v)
        matvec = lambda v: ravel_pytree(product(unravel(v)))[0]
        zeros = jnp.zeros_like(b)

        def apply_inverse(matvec, b):
            v, linear_stats = solve_linear(linear_solver, matvec, b, zeros)
            # A truncated iterate would be a wrong derivative without any sign of it.
            return jnp.where(linear_stats["is_solved"], v, jnp.nan)

        x = jax.lax.custom_linear_solve(matvec, b, apply_inverse, symmetric=True)
        return w, scale(-1, unravel(x))

    return solve
