"""Implicit differentiation: the implicit function theorem and a linear solve."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jaxtyping import Array, PyTree

from ..adjoint import (
    At,
    differentiate,
    newton_step,
    total_products,
    usable,
    zero_adjoint,
)
from ..certificate import NEWTON, TRUST, UNSEEN, certificate
from ..checks import check_problem, check_seen
from ..cost import ledger
from ..drawn import drawn
from ..guide import Guide
from ..inner.protocol import InnerSolver
from ..linear import CG
from ..linear.operator import check as check_linear_solver
from ..problem import Bilevel, held_fraction
from ..products import Loss
from ..settings import check_steps, number
from ..trees import all_finite, norm, scale
from .protocol import Estimate, make_stats
from .trust import steady


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
      correct: Newton steps on ``w`` after the inner solve, each a solve by `CG`; one
        that does not make ``dL/dw`` smaller is not taken.
      certify: let a certificate judge each estimate (`hypergrad.certify`):
        ``error_estimate`` and ``trusted`` are its; it costs two solves for each of two
        corrections and a probe, counted.
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
    correct: int = eqx.field(static=True)
    certify: bool = eqx.field(static=True)
    warm_start: bool = eqx.field(static=True)
    adjoint_batch_size: int | None = eqx.field(static=True)
    outer_batch_size: int | None = eqx.field(static=True)

    target = "argmin"
    citations = ("pedregosa2016",)
    guide = (
        Guide(
            "Implicit(solver, lineax.LU())",
            gradients="T",
            hvps="d + 1",
            memory="d^2 numbers",
            bias="none if solved",
            sees=("losses",),
            use="a small w on which CG stalls; any solver of lineax may stand here",
            avoid="a large w",
            why="the matrix H is made, one product a column",
        ),
    )

    def __init__(
        self,
        solver: InnerSolver,
        linear_solver: lx.AbstractLinearSolver | None = None,
        damping: float | Array = 0.0,
        *,
        correct: int = 0,
        certify: bool = False,
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
        check_steps("correct", correct, least=0)
        self.correct = correct
        self.certify = certify
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
        check_seen(problem, w, alpha, None, UNSEEN)
        data = drawn(problem, jax.random.key(0))
        jax.eval_shape(lambda: data.inner_batch(self.adjoint_batch_size))
        jax.eval_shape(lambda: data.outer_batch(self.outer_batch_size))
        return ImplicitState(w, zero_adjoint(problem, w))

    def estimate(
        self, problem: Bilevel, state: ImplicitState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, ImplicitState]:
        """One inner solve, one adjoint solve, one cross term."""
        data, loss = drawn(problem, key), problem.inner_loss
        start = problem.initial(state.w, alpha)
        w, spent = self.solver.solve(
            loss, start, alpha, data.inner_data, data.solver_key
        )

        batch = data.inner_batch(self.adjoint_batch_size)
        outer_batch = data.outer_batch(self.outer_batch_size)
        w, num_products, num_grads = self._corrected(loss, w, alpha, batch)
        v = usable(state.adjoint)
        at = differentiate(
            problem, self.linear_solver, w, alpha, batch, outer_batch, v, self.damping
        )
        part = held_fraction(data.inner_data, self.adjoint_batch_size)
        outer_part = held_fraction(data.outer_data, self.outer_batch_size)
        num_products += total_products(at.solved)
        costs = ledger(
            data.inner_data,
            data.outer_data,
            num_grads=spent["num_grads"] + part * num_grads,
            num_hvps=spent["num_hvps"] + part * num_products,
            num_values=spent["num_values"],
            num_outer_grads=(1 if self.certify else 2) * outer_part * at.value.size,
        )
        if not self.certify:
            trusted = self._judge(problem, w, alpha, at, outer_batch)
            error_estimate = jnp.nan
        else:
            found = certificate(
                problem, data, w, alpha, at.hypergradient, adjoint=at.adjoint
            )
            trusted, error_estimate = found.trusted, found.error_estimate
            costs = jax.tree.map(jnp.add, costs, found.stats)
        stats = make_stats(
            trusted,
            inner_residual=norm(at.gradient),
            inner_steps=spent["num_steps"],
            adjoint_residual=jnp.max(at.adjoint_residual),
            ritz_min=jnp.min(at.solved["ritz_min"]),
            ritz_max=jnp.max(at.solved["ritz_max"]),
            error_estimate=error_estimate,
            **costs,
        )
        estimate = Estimate(at.value, at.hypergradient, w, stats)
        if self.warm_start:
            # A start that depends on alpha begins each inner solve anew.
            warm = w if problem.start is None else state.w
            state = ImplicitState(warm, at.adjoint)
        return estimate, state

    def _corrected(
        self, loss: Loss, w: PyTree, alpha: PyTree, batch: PyTree
    ) -> tuple[PyTree, Array, int]:
        """``w`` after ``correct`` Newton steps, and the products and gradients of it.

        A step that does not make the gradient smaller is not taken.
        """
        num_products = jnp.zeros(())
        if not self.correct:
            return w, num_products, 0
        slope = lambda w: jax.grad(loss)(w, alpha, batch)
        gradient = slope(w)
        for _ in range(self.correct):
            there, solved = newton_step(
                loss, w, alpha, batch, gradient, CG(rtol=NEWTON)
            )
            slope_there = slope(there)
            closer = norm(slope_there) < norm(gradient)
            w = optax.tree.where(closer, there, w)
            gradient = optax.tree.where(closer, slope_there, gradient)
            num_products += solved["num_products"]
        return w, num_products, self.correct + 1

    def _judge(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, at: At, outer_batch: PyTree
    ) -> Array:
        """Whether what the solves saw speaks for the estimate."""
        near = steady(
            problem,
            w,
            alpha,
            outer_batch,
            at.b,
            at.cross,
            at.hypergradient,
            scale(-1, at.gradient),
            jnp.fmin(at.mean_curvature, at.solved["ritz_min"]),
        )
        return (
            all_finite(at.value, at.hypergradient, at.gradient, at.adjoint_residual)
            & jnp.all(at.adjoint_residual <= TRUST)
            & near
            & ~jnp.any(at.solved["negative_curvature"])
        )
