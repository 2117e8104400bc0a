"""``w*(alpha)`` as a differentiable function."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
from jax.custom_derivatives import SymbolicZero
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from .batches import Batches
from .checks.lost_derivatives import check_no_lost_derivative
from .checks.problem import check_scalar_loss
from .checks.shard_map import check_same_on_devices
from .implicit.minimum import gradient_scale, is_stationary
from .inner.base import InnerSolver
from .keys_in_w import bind_keys_to_function, keys_of, remove_keys, restore_keys
from .linear import MINRES
from .linear.base import MatVec, check_linear_solver, solve_linear
from .linear.equilibration import equilibrate
from .products import Loss, convert_closure, cross_jvp, hvp
from .trees import apply_unless, hash_normal, machine_eps, safe_norm, scale
from .validation import (
    as_input_arrays,
    as_key,
    check_hashable,
    check_same_structure,
    check_solver,
)

#: A gradient, and the Newton step for it, count as zero below this power of the machine
#: epsilon, times their scales. A line search on a rounded loss gets no further than the
#: power 1/2.
STATIONARY_POWER = 0.4


def argmin(
    inner_loss: Loss,
    solver: InnerSolver,
    linear_solver: lx.AbstractLinearSolver | None = None,
) -> Callable[..., PyTree]:
    """Returns ``f(w0, alpha, batch=None, key=None) -> w*``, a differentiable function.

    The derivative of ``w*`` with respect to ``alpha`` and ``batch`` is that of the
    implicit function theorem,

        dw* = -H^-1 d(dL/dw)    with    H = d2L/dw2,

    a rule for forward mode whose linear solve can be transposed. All derivatives of
    JAX, `vmap` and `jit` work to any order, and one argmin nests in another. The solver
    itself is never differentiated.

    Args:
      inner_loss: ``(w, alpha, batch) -> scalar``; what it closes over may be traced.
      solver: Finds the minimum from ``w0``. Let it converge, because the rule holds
        only at a stationary point, be it a saddle; elsewhere the derivative is NaN. A
        minimum with a singular ``H`` has a derivative if the system has a solution; in
        reverse mode its right-hand side is the cotangent.
        The tolerance is ``eps^0.4`` of the dtype, for ``dL/dw`` and for the Newton step
        ``H^-1 dL/dw`` relative to ``|w| + |w - w0|``, in norms of all parameters: a
        parameter that is a thousand times larger than the others may hide that they
        have not converged. The error of the derivative is the remaining distance times
        a factor of third derivatives.
      linear_solver: Solver of the linear system. Defaults to `MINRES`, which needs no
        minimum and for which the units of ``w`` do not matter. Where the solver does
        not reach its tolerance, the derivative is NaN.

    Returns:
      A function of ``w0``, ``alpha``, an optional ``batch`` and an optional PRNG key.
      Its derivative by ``w0`` is zero, because the minimum does not depend on it.

    Raises:
      TypeError, ValueError: An argument is invalid, or a derivative of ``inner_loss``
        that is needed is lost, as in a comparison; raised before compilation.

    Cost:
      One linear solve per derivative. The check that the solver has converged takes
      another one, a gradient, and at most 17 Hessian-vector and eight cross products.
      Outside of `jax.jit` every call compiles its programs again.

    Source: Blondel et al. 2022 (arXiv 2105.15183), equation 3.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> loss = lambda w, alpha, batch: jnp.sum((w - jnp.exp(alpha)) ** 2)
    >>> solution = hg.argmin(loss, hg.Newton())
    >>> gradient = jax.grad(lambda alpha: solution(0.0, alpha))(0.0)
    >>> round(float(gradient), 4)
    1.0
    """
    linear_solver = MINRES() if linear_solver is None else linear_solver
    _check_arguments(inner_loss, solver, linear_solver)

    def solution_fn(
        w0: PyTree, alpha: PyTree, batch: PyTree = None, key: Array | None = None
    ) -> PyTree:
        w0, _ = as_input_arrays(w0, alpha, differentiable=False)
        key = as_key(key)
        _check_batch(batch)
        init_w, loss = remove_keys(w0), bind_keys_to_function(inner_loss, keys_of(w0))
        check_scalar_loss("inner_loss", loss, init_w, alpha, batch)
        check_same_on_devices(
            (w0, alpha, batch),
            lambda: {"w0": w0, "inner_loss": loss(init_w, alpha, batch)},
        )
        loss, closed_over = convert_closure(
            loss, init_w, alpha, batch, with_floats=True
        )
        args = alpha, batch, *closed_over
        run_solver, arrays = _make_pure_solver(solver, loss, init_w, args, key)
        linear_arrays, static = eqx.partition(linear_solver, eqx.is_array)
        solve = _make_differentiable_solve(loss, run_solver, static)
        w = solve(init_w, args, (key, arrays, linear_arrays))
        return restore_keys(w, keys_of(w0))

    return solution_fn


def _check_batch(batch: PyTree) -> None:
    """Raises TypeError for `Batches` in place of arrays."""
    if isinstance(batch, Batches):
        raise TypeError(
            "batch must be a pytree of arrays, which argmin uses whole; got Batches. "
            "Pass its full_batch()."
        )


def _make_pure_solver(
    solver: InnerSolver, loss: Loss, w0: PyTree, args: PyTree, key: Array
) -> tuple[Callable[..., PyTree], list[Array]]:
    """Returns ``(w0, args, key, *arrays) -> w*`` and the arrays that a solver holds.

    Args:
      solver: The solver.
      loss: ``(w, alpha, batch, *closed_over) -> scalar``.
      w0, args, key: Arguments of the function; ``args = (alpha, batch, *closed_over)``.
    """

    def run_solver(w0, args, key):
        alpha, batch, *closed_over = args
        inner_loss = lambda w, alpha, batch: loss(w, alpha, batch, *closed_over)
        return solver.solve(inner_loss, w0, alpha, batch, key)[0]

    run_solver, arrays = convert_closure(run_solver, w0, args, key)
    shapes = jax.eval_shape(run_solver, w0, args, key, *arrays)
    check_same_structure(f"{type(solver).__name__}.solve", shapes, w0)
    return run_solver, arrays


def _check_arguments(
    inner_loss: Loss, solver: InnerSolver, linear_solver: lx.AbstractLinearSolver
) -> None:
    """Raises TypeError or ValueError if an argument of `argmin` is invalid."""
    if not callable(inner_loss):
        raise TypeError(
            "inner_loss must be a function (w, alpha, batch) -> scalar; got "
            f"{inner_loss!r}."
        )
    check_hashable("inner_loss", inner_loss)
    check_solver(solver)
    check_linear_solver(linear_solver)


def _make_differentiable_solve(loss, run_solver, static_linear_solver):
    """Returns ``(w0, (alpha, batch, *closed_over), constants) -> w*``, differentiable.

    The constants are the key and what the solvers hold. They are arguments, because JAX
    may apply the rule of the derivative when the trace of a traced number has ended.

    Args:
      loss: ``(w, alpha, batch, *closed_over) -> scalar``.
      run_solver: ``(w0, args, key, *solver_arrays) -> w*``.
      static_linear_solver: The linear solver without its arrays.
    """

    @jax.custom_jvp
    def solve(w0, args, constants):
        key, solver_arrays, _ = constants
        return run_solver(w0, args, key, *solver_arrays)

    def solve_jvp(primals, tangents):
        (w0, args, constants), (_, args_dot, _) = primals, tangents
        linear_solver = eqx.combine(constants[2], static_linear_solver)
        is_zero = lambda x: isinstance(x, SymbolicZero)
        differentiated = [not is_zero(x) for x in jax.tree.leaves(args_dot, is_zero)]
        check_no_lost_derivative("inner_loss", loss, w0, args, differentiated)
        args_dot = jax.tree.map(_instantiate, args_dot, is_leaf=is_zero)
        w = solve(w0, args, constants)
        # H dw* = -d(dL/dw)
        grad_dot = cross_jvp(loss, w, args, args_dot)
        # Ravel first: JAX cannot transpose a solve in which some leaves are constant.
        b, unravel = ravel_pytree(grad_dot)
        inner_loss = lambda w, args, _: loss(w, *args)
        product = lambda v: hvp(inner_loss, w, args, None, v)
        matvec = lambda v: ravel_pytree(product(unravel(v)))[0]
        has_converged = _stopped_at_stationary_point(loss, linear_solver, w0, w, args)

        def solve_in_own_dtypes(matvec, b):
            if len({leaf.dtype for leaf in jax.tree.leaves(w)}) <= 1:
                return solve_linear(linear_solver, matvec, b, jnp.zeros_like(b))
            # A vector of the widest dtype would ask for more digits than H v has.
            tree_matvec = lambda v: unravel(matvec(ravel_pytree(v)[0]))
            tree_b = unravel(b)
            zeros = optax.tree.zeros_like(tree_b)
            v, stats = solve_linear(linear_solver, tree_matvec, tree_b, zeros)
            return ravel_pytree(v)[0], stats

        def apply_inverse(matvec, b):
            v, linear_stats = solve_in_own_dtypes(matvec, b)
            # Anything else would be a wrong derivative without any sign of it.
            is_valid = linear_stats["is_solved"] & has_converged
            return jnp.where(is_valid, v, jnp.nan)

        x = jax.lax.custom_linear_solve(matvec, b, apply_inverse, symmetric=True)
        return w, scale(-1, unravel(x))

    solve.defjvp(solve_jvp, symbolic_zeros=True)
    return solve


def _instantiate(tangent: Any) -> Any:
    """Returns a tangent whose symbolic zeros are arrays."""
    if not isinstance(tangent, SymbolicZero):
        return tangent
    like: Any = tangent
    return np.zeros(like.shape, like.dtype)


def _stopped_at_stationary_point(loss, linear_solver, w0, w, args):
    """Returns whether the solver has stopped at a stationary point, up to rounding.

    Each entry of ``dL/dw`` must be at most ``eps^0.4`` times the change that random
    steps of the lengths ``|w| + |w - w0|`` make (5e-7 in float64, 2e-3 in float32), or
    at most ``eps^(3/4)`` of the change by random factors of the data: an entry that is
    zero at ``w0`` and at the minimum has no other scale. Directions of little curvature
    are checked by `_is_near_stationary_point`. Neither check depends on the units of
    ``w`` or of the loss.
    """
    w0, w, args = jax.lax.stop_gradient((w0, w, args))
    inner_loss = lambda w, args, _: loss(w, *args)
    grad = jax.grad(inner_loss)(w, args, None)
    matvec = lambda v: hvp(inner_loss, w, args, None, v)
    distances = jax.tree.map(lambda w, w0: jnp.abs(w) + jnp.abs(w - w0), w, w0)
    change = gradient_scale(matvec, distances)
    floats, non_floats = eqx.partition(args, eqx.is_inexact_array)
    loss_of_floats = lambda w, floats: loss(w, *eqx.combine(floats, non_floats))

    def change_by_data(zeros: PyTree) -> PyTree:
        cross_product = lambda v: cross_jvp(loss_of_floats, w, (floats,), (v,))
        data_change = gradient_scale(cross_product, floats, like=zeros)
        factor = lambda x: float(jnp.finfo(x.dtype).eps) ** (0.75 - STATIONARY_POWER)
        return jax.tree.map(lambda x: factor(x) * x, data_change)

    is_met = is_stationary(grad, change, STATIONARY_POWER)
    zeros = optax.tree.zeros_like(grad)
    data_change = apply_unless(is_met, change_by_data, zeros)
    change = optax.tree.add(change, data_change)
    is_met = is_stationary(grad, change, STATIONARY_POWER)
    is_near = lambda _: _is_near_stationary_point(
        linear_solver, matvec, grad, distances, data_change
    )
    return apply_unless(~is_met, is_near, is_met)


def _is_near_stationary_point(
    linear_solver: lx.AbstractLinearSolver,
    matvec: MatVec,
    grad: PyTree,
    distances: PyTree,
    data_change: PyTree,
) -> Array:
    """Returns whether a Newton step changes ``w`` by no more than the tolerance.

    With ``H d = dL/dw`` and the scaling ``S`` of ``H``, for which the rows of ``S H S``
    have the norm r, the condition is

        ||S^-1 d|| <= eps^0.4 (||S^-1 (|w| + |w - w0|)|| + ||S q|| / r),

    where q is the change of ``dL/dw`` that rounding of the data may cause.

    Args:
      linear_solver: Solver of the system.
      matvec: Function ``v -> H v``.
      grad: ``dL/dw``.
      distances: ``|w| + |w - w0|``.
      data_change: q.
    """
    scaling = equilibrate(matvec, grad)
    zeros = optax.tree.zeros_like(grad)
    d, _ = solve_linear(linear_solver, matvec, grad, zeros, scaling=scaling)
    z = hash_normal(0, grad)
    row_norm = safe_norm(scaling.matvec(matvec)(z)) / safe_norm(z)
    size = row_norm * safe_norm(scaling.divide(distances))
    size = size + safe_norm(scaling.multiply(data_change))
    tol = machine_eps(grad) ** STATIONARY_POWER
    return row_norm * safe_norm(scaling.divide(d)) <= tol * size
