"""One call for every linear solver: ``v = H^-1 b`` by products ``H v``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree

from ..trees import add_scale, divide, norm, power_of_two_scale

MatVec = Callable[[PyTree], PyTree]
LinearStats = dict[str, Array]

_HESSIAN = frozenset({lx.symmetric_tag, lx.positive_semidefinite_tag})


def hessian_operator(matvec: MatVec, like: PyTree) -> lx.AbstractLinearOperator:
    """``matvec`` as a lineax operator on vectors shaped ``like``.

    Tagged positive semidefinite, as Hessians at a minimum are; where one is not, the
    residual and `CG`'s curvature flag tell.
    """
    structure = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
    return lx.FunctionLinearOperator(matvec, structure, _HESSIAN)


def solve_linear(
    solver: lx.AbstractLinearSolver,
    matvec: MatVec,
    b: PyTree,
    start: PyTree,
    prepared: PyTree = None,
) -> tuple[PyTree, LinearStats]:
    """``v`` with ``H v = b``, from ``start`` where the solver is iterative.

    Args:
      solver: any lineax solver, ours included.
      matvec: ``v -> H v``, symmetric.
      b, start: right-hand side and starting point, same structure.
      prepared: by the solver's ``prepare``, for those that have one.

    Returns:
      ``v`` and stats, NaN where the solver has none: ``num_products``, and how many of
      them (``num_shared``) several right-hand sides share under ``vmap``; ``ritz_min``,
      ``ritz_max``, ``negative_curvature``. The residual is left to the caller, who has
      a use for that last product.
    """
    operator = hessian_operator(matvec, b)
    options = {"y0": start, "true_residual": False, "prepared": prepared}
    state = solver.init(operator, options)
    v, _, stats = solver.compute(state, b, options)
    number = lambda x: jnp.asarray(x, dtype=float)
    num_products = _num_products(solver, b, stats)
    dense = "num_products" not in stats and "num_steps" not in stats
    return v, {
        "num_products": number(num_products),
        "num_shared": number(num_products if dense else stats.get("num_shared", 0)),
        "ritz_min": number(stats.get("ritz_min", jnp.nan)),
        "ritz_max": number(stats.get("ritz_max", jnp.nan)),
        "negative_curvature": jnp.asarray(stats.get("negative_curvature", False)),
    }


def _num_products(solver: lx.AbstractLinearSolver, b: PyTree, stats: dict) -> Any:
    """Ours count their products; lineax's tell their steps, dense ones nothing."""
    dimension = sum(leaf.size for leaf in jax.tree.leaves(b))
    if "num_products" in stats:
        return stats["num_products"]
    if isinstance(solver, lx.Normal):  # of H'H, two products each, and H'b
        return 2 * _num_products(solver.inner_solver, b, stats) + 1
    if "num_steps" not in stats:
        return dimension
    steps = stats["num_steps"]
    match solver:
        case lx.CG(stabilise_every=None):
            return steps + 1
        case lx.CG(stabilise_every=every):
            return steps + 1 + steps // every
        case lx.GMRES(restart=restart):  # a step after the first is a cycle, at most
            return steps + (steps - 1) * min(restart, dimension)
        case lx.BiCGStab():
            return 2 * steps + 1
        case lx.LSMR():
            return 2 * steps + 2
    return steps


def relative_residual(b: PyTree, Hv: PyTree) -> Array:
    """``||b - H v|| / ||b||``; 0 for ``b = 0 = H v``."""
    unit = power_of_two_scale(b)
    b, Hv = divide(b, unit), divide(Hv, unit)
    residual, scale = norm(add_scale(b, -1, Hv)), norm(b)
    return jnp.where(residual == 0, 0.0, residual / jnp.where(scale == 0, 1.0, scale))


def check_linear_solver(solver: Any, name: str = "linear_solver") -> None:
    """Refuses what is no linear solver, before anything is traced."""
    if isinstance(solver, lx.AbstractLinearSolver):
        return
    if isinstance(solver, type) and issubclass(solver, lx.AbstractLinearSolver):
        hint = f"got the class {solver.__name__}; write {solver.__name__}(...)"
    else:
        hint = f"got {type(solver).__name__}"
    raise TypeError(
        f"{name} must be a linear solver: hg.CG(), hg.Neumann(num_terms), "
        "hg.Nystrom(rank), hg.NystromCG(rank), hg.Identity() or one of lineax's, such "
        f"as lineax.GMRES(rtol, atol) or lineax.LU(); {hint}"
    )


class SymmetricSolver(lx.AbstractLinearSolver):
    """lineax's interface for a solver of ``H v = b`` with real symmetric ``H``.

    Subclasses write ``compute``; the state is the operator, its own transpose.
    """

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> Any:
        """Keeps the operator; raises ValueError unless it is tagged symmetric."""
        del options
        if not lx.is_symmetric(operator):
            raise ValueError(
                f"{type(self).__name__} needs a symmetric operator; tag it with "
                "lineax.symmetric_tag or lineax.positive_semidefinite_tag"
            )
        return operator

    def transpose(self, state: Any, options: dict[str, Any]) -> tuple[Any, dict]:
        """A symmetric operator is its own transpose."""
        return state, options

    def conj(self, state: Any, options: dict[str, Any]) -> tuple[Any, dict]:
        """A real operator is its own conjugate."""
        return state, options

    def assume_full_rank(self) -> bool:
        """A Hessian at a strict minimum is invertible."""
        return True
