"""Low-rank inverses from a random sketch of the Hessian."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ..method_summary import MethodSummary
from ..trees import scalar_dtype
from ..validation import check_positive_int, float_converter
from .base import MatVec, SymmetricSolver
from .cg import conjugate_gradients


def sketch(
    matvec: MatVec, like: PyTree, rank: int, key: Array | None
) -> tuple[Float[Array, "n r"], Float[Array, " r"]]:
    """Eigenpairs ``(U, s)`` of a rank-``r`` Nyström approximation ``U diag(s) U'``.

    ``H_r = (H O)(O' H O)^+ (H O)'`` for an orthonormal random ``O``: ``r`` products,
    done as one batch, and ``2 r`` vectors of memory.

    Source: Frangella, Tropp & Udell 2023 (arXiv 2110.02820), algorithm 2.1.
    """
    flat, unravel = ravel_pytree(like)
    dtype = scalar_dtype(like)  # no factorisation is defined in bfloat16
    rank = min(rank, flat.size)
    key = jax.random.key(0) if key is None else key
    omega, _ = jnp.linalg.qr(jax.random.normal(key, (flat.size, rank), dtype))
    product = lambda v: matvec(unravel(v.astype(flat.dtype)))
    column = lambda v: ravel_pytree(product(v))[0].astype(dtype)
    y = jax.vmap(column, in_axes=1, out_axes=1)(omega)
    shift = jnp.sqrt(flat.size) * jnp.finfo(flat.dtype).eps * jnp.linalg.norm(y)
    y = y + shift * omega
    core = omega.T @ y
    chol = jnp.linalg.cholesky((core + core.T) / 2)
    b = jax.scipy.linalg.solve_triangular(chol, y.T, lower=True).T
    u, s, _ = jnp.linalg.svd(b, full_matrices=False)
    return u, jnp.maximum(s**2 - shift, 0.0)


class Nystrom(SymmetricSolver):
    """``v = (H_r + damping I)^-1 b``, a rank-``r`` sketch inverted in closed form.

    Args:
      rank: ``r``; rank = dim is exact up to the damping.
      damping: ``rho > 0``, added to the spectrum.
      key: of the random sketch; None means ``jax.random.key(0)``.

    Cost: ``rank`` Hessian-vector products in one batch. Memory: ``2 rank`` vectors.

    Bias: what the sketch misses and what the damping adds; no rate is promised. Needs
    ``H`` positive semidefinite: otherwise the sketch has no Cholesky factor, the result
    is NaN, and the estimate untrusted.

    Source: Hataya & Yamada 2023, equation 6, with the sketch of Frangella et al. 2023.

    >>> import hypergrad as hg
    >>> hg.Nystrom(rank=5).damping
    0.01
    """

    rank: int = eqx.field(static=True)
    damping: float | Array = eqx.field(
        default=1e-2, converter=float_converter("damping", optional=False, minimum=0)
    )
    key: Array | None = None

    citations = ("hataya2023", "frangella2023")
    exact = False
    summary = (
        MethodSummary(
            "Implicit(solver, hg.Nystrom(r))",
            num_grads="T",
            num_hvps="r + 1",
            memory="2 r w",
            bias="sketch and damping",
            alpha_in=("losses",),
            recommended_for="an H of low rank; the r products run as one batch",
            not_recommended_for="an indefinite H, a slowly falling spectrum",
            reason="what the sketch misses is taken for the damping",
        ),
    )

    def __check_init__(self):
        check_positive_int("rank", self.rank)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """NaN: the error depends on what the sketch happens to miss."""
        return float("nan")

    def compute(
        self, state: lx.AbstractLinearOperator, vector: PyTree, options: dict[str, Any]
    ) -> tuple[PyTree, lx.RESULTS, dict[str, Any]]:
        """``(v, result, stats)``; ``ritz_max`` is the sketch's largest eigenvalue."""
        del options
        flat, unravel = ravel_pytree(vector)
        u, s = sketch(state.mv, vector, self.rank, self.key)
        b = flat.astype(s.dtype)
        c = u.T @ b
        damping = jnp.asarray(self.damping, s.dtype)
        v = u @ (c / (s + damping))
        if s.size < b.size:
            v = v + (b - u @ c) / damping
        stats = {"num_products": s.size, "num_shared": s.size, "ritz_max": s[0]}
        return unravel(v.astype(flat.dtype)), lx.RESULTS.successful, stats


class NystromCG(SymmetricSolver):
    """``v = H^-1 b`` by conjugate gradients preconditioned with a Nyström sketch.

    ``P^-1 = (s_r + damping) U (S + damping)^-1 U' + (I - U U')``: the sketched top of
    the spectrum is flattened to its smallest eigenvalue, so that the number of steps
    depends on what is left.

    Args:
      rank: of the sketch.
      rtol, max_steps: as in `CG`.
      damping: added to the sketched spectrum in the preconditioner; the solution does
        not depend on it.
      key: of the random sketch; None means ``jax.random.key(0)``.
      refresh: in how many estimates of `Implicit` one sketch serves; 1 makes each anew.

    Cost: ``rank`` products in one batch, then one a step. Memory: ``2 rank + 5``
    vectors; with ``refresh`` a sketch is carried from estimate to estimate, ``rank``
    more. Bias: none at convergence, however old the sketch: only the steps grow as
    ``H`` moves away from it. For a positive definite H: of another the answer may be
    NaN, and is not trusted.

    Source: Frangella, Tropp & Udell 2023 (arXiv 2110.02820), equation 1.3.

    >>> import hypergrad as hg
    >>> hg.NystromCG(rank=10).exact
    True
    """

    rank: int = eqx.field(static=True)
    rtol: float | Array | None = eqx.field(
        default=None, converter=float_converter("rtol", minimum=0)
    )
    max_steps: int | None = eqx.field(static=True, default=None)
    damping: float | Array = eqx.field(
        default=0.0, converter=float_converter("damping", optional=False, minimum=0)
    )
    key: Array | None = None
    refresh_every: int = eqx.field(static=True, default=1, kw_only=True)

    citations = ("frangella2023", "hestenes1952")
    exact = True
    summary = (
        MethodSummary(
            "Implicit(solver, hg.NystromCG(r))",
            num_grads="T",
            num_hvps="r + k + 1",
            memory="2 r + 5 w",
            bias="none if solved",
            alpha_in=("losses",),
            recommended_for="a few large eigenvalues that cost CG many steps",
            not_recommended_for="an H that CG solves in about r steps, an indefinite H",
            reason="the sketch flattens the largest, so k depends on the others",
        ),
    )

    def __check_init__(self):
        check_positive_int("rank", self.rank)
        check_positive_int("refresh_every", self.refresh_every)
        check_positive_int("max_steps", self.max_steps, optional=True)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """Exact up to its tolerance, on any spectrum."""
        return 0.0

    def prepare(self, matvec: MatVec, like: PyTree) -> PyTree:
        """What `compute` takes as ``options["prepared"]``, for ``rank`` products."""
        return sketch(matvec, like, self.rank, self.key)

    def compute(
        self, state: lx.AbstractLinearOperator, vector: PyTree, options: dict[str, Any]
    ) -> tuple[PyTree, lx.RESULTS, dict[str, Any]]:
        """``(v, result, stats)``; Ritz values of the preconditioned operator.

        Options: ``y0``, a starting point; ``prepared``, a sketch of ``H`` or of one
        like it.

        ``P >= I`` but for the damping, so that its smallest eigenvalue is at most that
        of ``H``; ``ritz_max`` is the sketch's largest.
        """
        prepared = options.get("prepared")
        u, s = self.prepare(state.mv, vector) if prepared is None else prepared
        # A singular H has s[-1] = 0 up to rounding, which is no level to flatten to.
        spectrum = s + jnp.asarray(self.damping, s.dtype)
        floor = jnp.maximum(spectrum[-1], jnp.finfo(s.dtype).eps ** 0.5 * s[0])
        scale = jnp.where(spectrum > floor, floor / spectrum, 1.0)

        def preconditioner(r):
            flat, unravel = ravel_pytree(r)
            c = u.T @ flat
            z = u @ (scale * c) + (flat - u @ c)
            return unravel(z.astype(flat.dtype))

        v, result, stats = conjugate_gradients(
            state.mv, vector, self.rtol, self.max_steps, options, preconditioner
        )
        stats["num_shared"] = s.size if prepared is None else 0
        stats["num_products"] = stats["num_products"] + stats["num_shared"]
        stats["ritz_max"] = s[0]
        return v, result, stats
