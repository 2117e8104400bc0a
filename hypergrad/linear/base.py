"""The interface of linear solvers, and one function that calls any of them."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jaxtyping import Array, PyTree

from ..runtime.compat import NORMAL_CHOLESKY_FORMS_H_ONCE
from ..trees import (
    add_scale,
    cast_like,
    norm_ratio,
    scalar_dtype,
)
from ..validation import check_no_class

MatVec = Callable[[PyTree], PyTree]
LinearStats = dict[str, Array]

_HESSIAN_TAGS = frozenset({lx.symmetric_tag, lx.positive_semidefinite_tag})


class SymmetricSolver(lx.AbstractLinearSolver):
    """Base class of solvers of ``H v = b`` with a real symmetric ``H``.

    A subclass writes ``compute(state, vector, options) -> (v, result, stats)``, where
    ``state`` is the operator ``H``, ``vector`` is ``b`` and ``result`` a member of
    `lineax.RESULTS`. Any solver of lineax works in its place. All of the following is
    optional, for a subclass and for any other solver.

    Entries of ``options`` that `solve_linear` passes:

    - ``y0``: Starting point.
    - ``true_residual``: False, because the caller computes ``b - H v`` itself. A solver
      that is called without it may spend a product on its statistic ``residual``.
    - ``prepared``: The value that ``prepare`` returned for this or an earlier ``H``, or
      None.
    - ``scaling``: None, or an object with the diagonal ``s`` of a matrix ``S`` for
      which ``S H S`` does not depend on units, structured like ``b``. A solver that
      works in scaled coordinates then needs no products to find its own.

    Entries of ``stats`` that `solve_linear` reads:

    - ``num_products``: Number of Hessian-vector products. Defaults to the number that
      solvers of lineax make in ``num_steps`` steps, and to the dimension if there is no
      such entry, which stands for a dense solver. For `lineax.GMRES`, which reports
      cycles, it is the maximum number.
    - ``num_shared``: Number of these products that several right-hand sides share under
      ``vmap``. Defaults to 0, and to all of them for a dense solver.
    - ``ritz_min``, ``ritz_max``: Estimates of the extreme eigenvalues of ``H``. Default
      to NaN.
    - ``negative_curvature``: Whether ``p'Hp < 0`` was observed for some ``p``. Defaults
      to False.

    Attributes that the library uses if they exist:

    - ``error_bound(eig_min, eig_max) -> float``: Relative error ``||v - H^-1 b|| /
      ||H^-1 b||`` that the method admits if the eigenvalues of ``H`` lie in that
      interval, or NaN if unknown. Defaults to 0.
    - ``exact``: Whether the result is exact up to the tolerance ``rtol`` and the
      statistics contain ``ritz_min``. Defaults to False.
    - ``is_scaled``: Whether the solver is conjugate gradients in scaled coordinates.
      `Implicit` then calls `scaled_cg` in its place, with its ``rtol`` and
      ``max_steps``, which also yields the error estimate. Defaults to False.
    - ``rtol``: Tolerance of the relative residual ``||b - H v|| / ||b||``, in scaled
      coordinates if ``is_scaled``. `Implicit` with a tolerance of its own sets it, and
      needs a solver with ``exact``.
    - ``refresh_every``: Number of estimates of `Implicit` that share one prepared
      value. Defaults to 1, which prepares nothing.
    - ``prepare(matvec, like) -> (prepared, num_products)``: Required if
      ``refresh_every`` exceeds 1.
    - ``citations``: Keys of ``references.bib``, for `hypergrad.citation`.
    - ``summary``: Tuple of `MethodSummary`, its rows in the guide.
    """

    exact: ClassVar[bool] = False

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """Returns 0; a solver with an error beyond its tolerance overrides this."""
        return 0.0

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> Any:
        """Returns the operator.

        Raises:
          ValueError: The operator is not tagged symmetric.
          TypeError: It is complex.
        """
        del options
        if not lx.is_symmetric(operator):
            raise ValueError(
                f"operator must be symmetric for {type(self).__name__}. Tag it with "
                "lineax.symmetric_tag or lineax.positive_semidefinite_tag."
            )
        dtypes = [x.dtype for x in jax.tree.leaves(operator.in_structure())]
        if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
            raise TypeError(
                f"operator must be real for {type(self).__name__}; got {dtypes}. Use a "
                "solver of lineax, or solve for the real and the imaginary part."
            )
        return operator

    def transpose(self, state: Any, options: dict[str, Any]) -> tuple[Any, dict]:
        """Returns the arguments, because ``H' = H``."""
        return state, options

    def conj(self, state: Any, options: dict[str, Any]) -> tuple[Any, dict]:
        """Returns the arguments, because ``H`` is real."""
        return state, options

    def assume_full_rank(self) -> bool:
        """Returns True, because the Hessian at a strict minimum is invertible."""
        return True


def solve_linear(
    solver: lx.AbstractLinearSolver,
    matvec: MatVec,
    b: PyTree,
    y0: PyTree,
    prepared: PyTree = None,
    scaling: Any = None,
) -> tuple[PyTree, LinearStats]:
    """Solves ``H v = b``.

    The residual is not computed: the caller needs the product ``H v`` anyway.

    Args:
      solver: Linear solver of lineax or of this package.
      matvec: Function ``v -> H v`` with symmetric ``H``.
      b: Right-hand side.
      y0: Starting point of an iterative solver, structured like ``b``.
      prepared: Value returned by the solver's ``prepare``, if it has one.
      scaling: Diagonal `Scaling` of ``H``, if it is known.

    Returns:
      ``v`` and the statistics ``num_products``, ``num_shared``, ``ritz_min``,
      ``ritz_max`` and ``negative_curvature`` of `SymmetricSolver`, and ``is_solved``,
      whether the solver reports success.
    """
    like = b
    if not isinstance(solver, SymmetricSolver):
        # Solvers of lineax need one dtype, and LAPACK has none below float32.
        matvec, b, y0 = _with_one_dtype(matvec, b, y0)
    structure = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), b)
    # Positive semidefinite, as the Hessian at a minimum is. For any other H the
    # residual is large or `CG` reports negative curvature.
    operator = lx.FunctionLinearOperator(matvec, structure, _HESSIAN_TAGS)
    options = {
        "y0": y0,
        "true_residual": False,
        "prepared": prepared,
        "scaling": scaling,
    }
    state = solver.init(operator, options)
    v, result, stats = solver.compute(state, b, options)
    v = cast_like(v, like)
    num_products, num_shared = _count_products(solver, b, stats)
    return v, {
        "num_products": jnp.asarray(num_products, dtype=float),
        "num_shared": jnp.asarray(num_shared, dtype=float),
        "ritz_min": jnp.asarray(stats.get("ritz_min", jnp.nan), dtype=float),
        "ritz_max": jnp.asarray(stats.get("ritz_max", jnp.nan), dtype=float),
        "negative_curvature": jnp.asarray(stats.get("negative_curvature", False)),
        "is_solved": jnp.asarray(result == lx.RESULTS.successful),
    }


def _with_one_dtype(
    matvec: MatVec, b: PyTree, y0: PyTree
) -> tuple[MatVec, PyTree, PyTree]:
    """Returns a system in the widest dtype of ``b``, which is float32 at least."""
    dtype = scalar_dtype(b)
    widen = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
    wide_matvec = lambda v: widen(matvec(cast_like(v, b)))
    return wide_matvec, widen(b), widen(y0)


def _count_products(
    solver: lx.AbstractLinearSolver, b: PyTree, stats: dict[str, Any]
) -> tuple[Any, Any]:
    """Returns the numbers of products with ``H`` and of shared ones among them.

    `SymmetricSolver` defines both.
    """
    dimension = optax.tree.size(b)
    num_shared = stats.get("num_shared", 0)
    if "num_products" in stats:
        return stats["num_products"], num_shared
    if isinstance(solver, lx.Normal):  # solves H'H v = H'b
        is_cholesky = isinstance(solver.inner_solver, lx.Cholesky)
        if is_cholesky and NORMAL_CHOLESKY_FORMS_H_ONCE:
            return dimension, dimension
        num_pairs, num_shared = _count_products(solver.inner_solver, b, stats)
        return 2 * num_pairs + 1, 2 * num_shared
    if "num_steps" not in stats:
        return dimension, dimension
    return _products_in_steps(solver, dimension, stats["num_steps"]), num_shared


def _products_in_steps(
    solver: lx.AbstractLinearSolver, dimension: int, num_steps: Any
) -> Any:
    """Returns the number of products that a solver of lineax makes in its steps."""
    match solver:
        case lx.CG(stabilise_every=None):
            return num_steps + 1
        case lx.CG(stabilise_every=period):
            return num_steps + 1 + num_steps // period
        case lx.GMRES(restart=restart):
            # Each step after the first is a cycle of at most `restart` products.
            return num_steps + (num_steps - 1) * min(restart, dimension)
        case lx.BiCGStab():
            return 2 * num_steps + 1
        case lx.LSMR():
            return 2 * num_steps + 2
    return num_steps


def relative_residual(b: PyTree, Hv: PyTree) -> Array:
    """Returns ``||b - H v|| / ||b||``; 0 if ``b`` and ``H v`` are both zero."""
    return norm_ratio(add_scale(b, -1, Hv), b)


def check_linear_solver(solver: Any, name: str = "linear_solver") -> None:
    """Raises TypeError unless the object is a linear solver."""
    if isinstance(solver, lx.AbstractLinearSolver):
        return
    check_no_class(name, solver)
    raise TypeError(
        f"{name} must be a linear solver; got {type(solver).__name__}. Use hg.CG(), "
        "hg.MINRES(), hg.Neumann(num_terms), hg.Nystrom(rank), hg.NystromCG(rank), "
        "hg.Identity() or a solver of lineax such as lineax.GMRES(rtol, atol) or "
        "lineax.LU()."
    )
