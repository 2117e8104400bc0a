"""Implicit differentiation: the implicit function theorem and a linear solve."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jaxtyping import Array, PyTree

from ..checks import KEY, check_problem, check_seen, reads_w
from ..cost import ledger
from ..inner.protocol import InnerSolver
from ..linear import CG
from ..linear.operator import check as check_linear_solver
from ..linear.operator import relative_residual, solve
from ..problem import Bilevel, fraction, held, size
from ..products import hvp, hvp_and_cross
from ..settings import check_steps, number
from ..trees import add_scaled, dot, norm
from .protocol import Estimate, all_finite, make_stats

TRUST = 1e-2


class ImplicitState(eqx.Module):
    """The warm starts: ``w`` and the adjoint, like ``w`` (leaves lead with K)."""

    w: PyTree
    adjoint: PyTree


class Implicit(eqx.Module):
    """``dM/dalpha - Jᵀ v`` with ``(H + damping I) v = dM/dw`` at ``w ~ w*(alpha)``.

    ``H = d²L/dw²`` and ``J = d²L/dw dalpha`` are those of the inner loss on all inner
    data.

    Args:
      solver: the inner solver; it is never differentiated.
      linear_solver: any of lineax's, or `CG` (default), `Neumann`, `Nystrom`,
        `NystromCG`, `Identity`.
      damping: added to ``H`` in the solve. ``adjoint_residual`` is that of ``H``
        itself, so it shows the bias that damping brings.
      warm_start: begin each inner solve and each adjoint solve where the last ended.
      adjoint_batch_size: examples for ``H`` and ``J``, drawn once an estimate; None
        means all.
      outer_batch_size: examples for the outer gradient, likewise.

    Cost: the inner solve, two outer gradients, the linear solver's products and one
    more, which yields the cross term and the true residual together. Memory: the linear
    solver's vectors, flat in the number of inner steps.

    Target: argmin. Bias: first order in what the inner and the adjoint solve leave,
    both reported. What the optimizer or the start read of ``alpha`` is not seen: a leaf
    that neither loss reads is an error. ``trusted`` needs: all finite,
    ``adjoint_residual`` and ``inner_residual / (curvature ||w||)`` below 1e-2, no
    negative curvature, and a change of ``dM/dw`` over a step ``dL/dw / curvature`` that
    is worth less than 1e-2 of the hypergradient; the curvature is the smaller of
    ``ritz_min`` and ``||b|| / ||v||``. That is what the solve happened to see: warm
    solves of few steps and solvers other than `CG` may miss a flat or a negative
    direction. The noise that a batch size brings is not judged, and in bfloat16 the
    residual rarely gets below 1e-2.

    Source: Pedregosa 2016 (arXiv 1602.02355), algorithm 1; Lorraine et al. 2020 (arXiv
    1911.02590), equation 2.

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - 3 * alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum(w**2)
    >>> estimator = hg.Implicit(hg.Descent(optax.sgd(0.5), 100))
    >>> estimate = hg.hypergradient(hg.Bilevel(inner, outer), estimator)(0.0, 1.0)
    >>> round(float(estimate.hypergradient), 3)
    9.0
    """

    solver: InnerSolver
    linear_solver: lx.AbstractLinearSolver
    damping: float | Array
    warm_start: bool = eqx.field(static=True)
    adjoint_batch_size: int | None = eqx.field(static=True)
    outer_batch_size: int | None = eqx.field(static=True)

    target = "argmin"
    citations = ("pedregosa2016",)

    def __init__(
        self,
        solver: InnerSolver,
        linear_solver: lx.AbstractLinearSolver | None = None,
        damping: float | Array = 0.0,
        *,
        warm_start: bool = True,
        adjoint_batch_size: int | None = None,
        outer_batch_size: int | None = None,
    ):
        self.solver = solver
        self.linear_solver = CG() if linear_solver is None else linear_solver
        check_linear_solver(self.linear_solver)
        check_steps("adjoint_batch_size", adjoint_batch_size, optional=True)
        check_steps("outer_batch_size", outer_batch_size, optional=True)
        self.damping = number("damping", optional=False)(damping)
        self.warm_start = warm_start
        self.adjoint_batch_size = adjoint_batch_size
        self.outer_batch_size = outer_batch_size

    def error_factor(self, smallest: float, largest: float) -> float:
        """Relative error of the adjoint for a spectrum in [smallest, largest].

        The solver's on the damped spectrum, and what damping itself changes, at most
        ``damping / (smallest + damping)``.
        """
        damping = float(self.damping)
        factor = getattr(self.linear_solver, "error_factor", lambda *_: 0.0)
        solved = factor(smallest + damping, largest + damping)
        return solved + damping / (smallest + damping)

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> ImplicitState:
        """Starts from ``w`` and a zero adjoint."""
        del key
        check_problem(problem, w, alpha, self.solver)
        check_seen(
            problem,
            w,
            alpha,
            None,
            "so the implicit hypergradient cannot see it (it is not zero: it may enter "
            "the optimizer or the start); use hg.Unrolled, or take it out of alpha",
        )
        inner_data, outer_data = problem.data(jax.random.key(0))
        jax.eval_shape(lambda k: held(inner_data, self.adjoint_batch_size, k), KEY)
        jax.eval_shape(lambda k: held(outer_data, self.outer_batch_size, k), KEY)
        lead = () if problem.num_objectives is None else (problem.num_objectives,)
        zeros = lambda leaf: jnp.zeros(lead + leaf.shape, leaf.dtype)
        return ImplicitState(w, jax.tree.map(zeros, w))

    def estimate(
        self, problem: Bilevel, state: ImplicitState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, ImplicitState]:
        """One inner solve, one adjoint solve, one cross term."""
        data_key, solver_key, adjoint_key, outer_key = jax.random.split(key, 4)
        inner_data, outer_data = problem.data(data_key)
        loss = problem.inner_loss

        start = problem.initial(state.w, alpha)
        w, spent = self.solver.solve(loss, start, alpha, inner_data, solver_key)

        batch = held(inner_data, self.adjoint_batch_size, adjoint_key)
        outer_batch = held(outer_data, self.outer_batch_size, outer_key)
        value, b, direct = problem.outer_gradients(w, alpha, outer_batch)

        def adjoint(b, v):
            def damped(v):
                Hv = hvp(loss, w, alpha, batch, v)
                return add_scaled(Hv, self.damping, v)

            v, solved = solve(self.linear_solver, damped, b, v)
            gradient, Hv, cross = hvp_and_cross(loss, w, alpha, batch, v)
            residual = relative_residual(b, Hv)
            mean = norm(b) / norm(v)  # NaN for b = 0, which says nothing
            solved["curvature"] = jnp.fmin(mean, solved["ritz_min"])
            solved["negative_curvature"] |= dot(v, Hv) < 0
            return v, cross, gradient, residual, solved

        if problem.num_objectives is not None:
            adjoint = jax.vmap(adjoint, out_axes=(0, 0, None, 0, 0))
        # An adjoint that an earlier step spoilt is no start.
        zeros = optax.tree.zeros_like(state.adjoint)
        v = optax.tree.where(all_finite(state.adjoint), state.adjoint, zeros)
        v, cross, gradient, adjoint_residual, solved = adjoint(b, v)
        hypergradient = optax.tree.sub(direct, cross)

        inner_residual = norm(gradient)
        adjoint_residual = jnp.max(adjoint_residual)
        curvature = jnp.min(solved["curvature"])
        w_error = inner_residual / (curvature * norm(w))
        # dM/dw as far away as w* may be: where M is nearly flat, w alone tells nothing.
        away = add_scaled(w, -1 / curvature, gradient)
        _, b_away, _ = problem.outer_gradients(away, alpha, outer_batch)
        share = lambda b, b_away, cross, h: (
            relative_residual(b, b_away) * norm(cross) <= TRUST * norm(h)
        )
        if problem.num_objectives is not None:
            share = jax.vmap(share)
        steady = jnp.all(share(b, b_away, cross, hypergradient))
        near = (w_error <= TRUST) & steady
        outer = lambda w, alpha, batch: problem.outer(w, alpha, batch)
        w_matters = reads_w(outer, w, alpha, outer_batch)
        trusted = (
            all_finite(value, hypergradient, inner_residual, adjoint_residual)
            & (adjoint_residual <= TRUST)
            & ((inner_residual == 0) | near | (not w_matters))
            & ~jnp.any(solved["negative_curvature"])
        )
        part = fraction(inner_data, self.adjoint_batch_size or size(inner_data))
        outer_part = fraction(outer_data, self.outer_batch_size or size(outer_data))
        shared = solved["num_shared"]
        num_products = jnp.sum(solved["num_products"] - shared + 1) + jnp.max(shared)
        costs = ledger(
            inner_data,
            outer_data,
            num_grads=spent["num_grads"],
            num_hvps=spent["num_hvps"] + part * num_products,
            num_values=spent["num_values"],
            num_outer_grads=2 * outer_part * value.size,
        )
        stats = make_stats(
            trusted,
            inner_residual=inner_residual,
            inner_steps=spent["num_steps"],
            adjoint_residual=adjoint_residual,
            ritz_min=jnp.min(solved["ritz_min"]),
            ritz_max=jnp.max(solved["ritz_max"]),
            **costs,
        )
        estimate = Estimate(value, hypergradient, w, stats)
        if self.warm_start:
            # A start that depends on alpha begins each inner solve anew.
            warm = w if problem.start is None else state.w
            state = ImplicitState(warm, v)
        return estimate, state
