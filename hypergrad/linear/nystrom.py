"""Low-rank approximations of the Hessian from random sketches, and their inverses."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ..method_summary import MethodSummary
from ..number_checks import check_positive_int, non_negative
from ..trees import scalar_dtype
from ..validation import as_key
from .base import MatVec, SymmetricSolver
from .cg import conjugate_gradients


def _to_key(key: Any) -> Array | None:
    return None if key is None else as_key(key)


def nystrom_approximation(
    matvec: MatVec, like: PyTree, rank: int, key: Array | None
) -> tuple[Float[Array, "n r"], Float[Array, " r"]]:
    """Returns ``(U, s)`` of the rank-r approximation ``H_r = U diag(s) U'``.

    With an orthonormal random matrix ``O`` of r columns,

        H_r = (H O) (O' H O)^+ (H O)'.

    Args:
      matvec: Function ``v -> H v`` with symmetric positive semidefinite ``H``.
      like: Vector whose structure ``matvec`` takes.
      rank: r; at most the dimension is used.
      key: PRNG key of ``O``. Defaults to ``jax.random.key(0)``.

    Cost: r products in one batch.
    Memory: ``2 r`` vectors.

    Source: Frangella, Tropp & Udell 2023, arXiv:2110.02820, algorithm 2.1.
    """
    flat, unravel = ravel_pytree(like)
    dtype = scalar_dtype(like)  # Factorizations do not exist in bfloat16.
    rank = min(rank, flat.size)
    key = jax.random.key(0) if key is None else key
    test_matrix, _ = jnp.linalg.qr(jax.random.normal(key, (flat.size, rank), dtype))
    flat_matvec = lambda v: ravel_pytree(matvec(unravel(v.astype(flat.dtype))))[0]
    column = lambda v: flat_matvec(v).astype(dtype)
    # Y = H O + shift O; the shift makes the Cholesky factorization stable.
    sketch = jax.vmap(column, in_axes=1, out_axes=1)(test_matrix)
    eps = jnp.finfo(flat.dtype).eps
    shift = jnp.sqrt(flat.size) * eps * jnp.linalg.norm(sketch)
    shift = jnp.where(jnp.any(sketch != 0), shift, 1.0)  # any number suits H = 0
    sketch = sketch + shift * test_matrix
    # B = Y C^-1 with C'C = O'Y, so that B B' = Y (O'Y)^-1 Y'
    core = test_matrix.T @ sketch
    factor = jnp.linalg.cholesky((core + core.T) / 2)
    b = jax.scipy.linalg.solve_triangular(factor, sketch.T, lower=True).T
    u, s, _ = jnp.linalg.svd(b, full_matrices=False)
    return u, jnp.maximum(s**2 - shift, 0.0)


class Nystrom(SymmetricSolver):
    """``v = (H_r + damping I)^-1 b`` with a rank-r Nyström approximation ``H_r``.

    ``H`` must be positive semidefinite. If the sketch meets a negative eigenvalue, its
    Cholesky factor does not exist, the result is NaN and the estimate is not trusted.

    Args:
      rank: r. At the full rank the result is exact up to the damping.
      damping: ``rho``, added to the spectrum; above 0 unless the rank is full.
      key: PRNG key of the random sketch. Defaults to ``jax.random.key(0)``.

    Cost: ``rank`` Hessian-vector products in one batch.
    Memory: ``2 rank`` vectors like ``w``.
    Bias: the error of the approximation and the effect of the damping; no known rate.

    Source: Hataya & Yamada 2023, equation 6, with the sketch of Frangella et al. 2023.

    >>> import hypergrad as hg
    >>> hg.Nystrom(rank=5).damping
    0.01
    """

    rank: int = eqx.field(static=True)
    damping: float | Array = eqx.field(default=1e-2, converter=non_negative("damping"))
    key: Array | None = eqx.field(default=None, converter=_to_key)

    citations = ("hataya2023", "frangella2023")
    summary = (
        MethodSummary(
            "Implicit(solver, hg.Nystrom(r))",
            num_grads="T",
            num_hvps="r + 1",
            memory="2 r w",
            bias="low rank and damping",
            alpha_in=("losses",),
            recommended_for="an H of low rank; the r products run as one batch",
            not_recommended_for="an indefinite H; a spectrum that decays slowly",
            reason="outside the sketch, H is replaced by the damping",
        ),
    )

    def __check_init__(self):
        check_positive_int("rank", self.rank)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """Returns NaN, because the error depends on the random sketch."""
        return float("nan")

    def compute(
        self, state: lx.AbstractLinearOperator, vector: PyTree, options: dict[str, Any]
    ) -> tuple[PyTree, lx.RESULTS, dict[str, Any]]:
        """Returns ``(v, result, stats)``.

        The statistic ``ritz_max`` is the largest eigenvalue of ``H_r``.
        """
        del options
        flat, unravel = ravel_pytree(vector)
        u, s = nystrom_approximation(state.mv, vector, self.rank, self.key)
        b = flat.astype(s.dtype)
        damping = jnp.asarray(self.damping, s.dtype)
        # v = U (S + rho I)^-1 U' b + (I - U U') b / rho
        c = u.T @ b
        v = u @ (c / (s + damping))
        if s.size < b.size:
            v = v + (b - u @ c) / damping
        stats = {"num_products": s.size, "num_shared": s.size, "ritz_max": s[0]}
        return unravel(v.astype(flat.dtype)), lx.RESULTS.successful, stats


class NystromCG(SymmetricSolver):
    """``v = H^-1 b`` by conjugate gradients with a Nyström preconditioner.

    With the rank-r approximation ``U diag(s) U'`` of ``H``, the preconditioner

        P^-1 = (s_r + damping) U (S + damping I)^-1 U' + (I - U U')

    maps the r largest eigenvalues of ``H`` to about the smallest of them, so that the
    number of steps depends on the rest of the spectrum.

    ``H`` must be positive definite. Otherwise the result may be NaN, and the estimate
    is not trusted.

    Args:
      rank: r, the rank of the approximation.
      rtol: The solver stops at ``||b - H v|| <= rtol ||b||``. The default is that of
        `CG`.
      max_steps: As in `CG`.
      damping: Added to ``s`` in the preconditioner; it does not change the solution.
      key: PRNG key of the random sketch. Defaults to ``jax.random.key(0)``.
      refresh_every: Number of estimates of `Implicit` that use the same sketch.

    Cost: ``rank`` Hessian-vector products in one batch, then one per step.
    Memory:
      ``2 rank + 5`` vectors like ``w``, and ``rank`` more with ``refresh_every`` above
      1, because the sketch is kept from one estimate to the next.
    Bias:
      None at convergence, whatever the age of the sketch. The number of steps grows as
      ``H`` moves away from the sketch.

    Source: Frangella, Tropp & Udell 2023, arXiv:2110.02820, equation 1.3.

    >>> import hypergrad as hg
    >>> hg.NystromCG(rank=10).exact
    True
    """

    rank: int = eqx.field(static=True)
    rtol: float | Array | None = eqx.field(
        default=None, converter=non_negative("rtol", optional=True)
    )
    max_steps: int | None = eqx.field(static=True, default=None)
    damping: float | Array = eqx.field(default=0.0, converter=non_negative("damping"))
    key: Array | None = eqx.field(default=None, converter=_to_key)
    refresh_every: int = eqx.field(static=True, default=1, kw_only=True)

    citations = ("frangella2023", "hestenes1952")
    exact = True
    summary = (
        MethodSummary(
            "Implicit(solver, hg.NystromCG(r))",
            num_grads="T",
            num_hvps="r + k + 1",
            memory="2 r + 5 w",
            bias="none if converged",
            alpha_in=("losses",),
            recommended_for="an H with a few large eigenvalues, for which CG is slow",
            not_recommended_for=(
                "an H for which CG converges in about r steps; an indefinite H"
            ),
            reason=(
                "the preconditioner removes the largest eigenvalues, so that k depends "
                "on the others"
            ),
        ),
    )

    def __check_init__(self):
        check_positive_int("rank", self.rank)
        check_positive_int("refresh_every", self.refresh_every)
        check_positive_int("max_steps", self.max_steps, optional=True)

    def prepare(self, matvec: MatVec, like: PyTree) -> tuple[PyTree, int]:
        """Returns the sketch that `compute` takes as ``options["prepared"]``.

        Returns:
          The sketch and the number of products, which run in one batch.
        """
        u, s = nystrom_approximation(matvec, like, self.rank, self.key)
        return (u, s), s.size

    def compute(
        self, state: lx.AbstractLinearOperator, vector: PyTree, options: dict[str, Any]
    ) -> tuple[PyTree, lx.RESULTS, dict[str, Any]]:
        """Returns ``(v, result, stats)``.

        The option ``y0`` is a starting point, and ``prepared`` a sketch of ``H`` or of
        a similar matrix. ``ritz_max`` is the largest eigenvalue of the sketch and
        ``ritz_min`` that of ``P^-1 H``; because ``P >= I`` up to the damping, it is at
        most the smallest eigenvalue of ``H``.
        """
        prepared = options.get("prepared")
        u, s = self.prepare(state.mv, vector)[0] if prepared is None else prepared
        spectrum = s + jnp.asarray(self.damping, s.dtype)
        # If H is singular, s_r is 0 up to rounding and must not be the target value.
        min_target = jnp.finfo(s.dtype).eps ** 0.5 * s[0]
        target = jnp.maximum(spectrum[-1], min_target)
        factors = jnp.where(spectrum > target, target / spectrum, 1.0)

        def preconditioner(r):
            # P^-1 r = U diag(factors) U' r + (I - U U') r
            flat, unravel = ravel_pytree(r)
            c = u.T @ flat
            z = u @ (factors * c) + (flat - u @ c)
            return unravel(z.astype(flat.dtype))

        v, result, stats = conjugate_gradients(
            state.mv,
            vector,
            rtol=self.rtol,
            max_steps=self.max_steps,
            options=options,
            preconditioner=preconditioner,
        )
        stats["num_shared"] = s.size if prepared is None else 0
        stats["num_products"] = stats["num_products"] + stats["num_shared"]
        stats["ritz_max"] = s[0]
        return v, result, stats
