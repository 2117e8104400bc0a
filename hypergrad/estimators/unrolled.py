"""Reverse mode through the inner loop."""

import operator

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..checks import (
    KEY,
    check_problem,
    check_seen,
    check_solver,
    solver_reads_alpha,
    start_reads_alpha,
)
from ..cost import ledger
from ..inner.descent import is_segmented, iterate, searches_a_line
from ..inner.protocol import IterativeSolver
from ..problem import Bilevel, Data, fraction, held, size, whole
from ..settings import check_steps
from ..trees import all_finite, norm
from .protocol import Estimate, make_stats


class UnrolledState(eqx.Module):
    """Where the next inner run begins; same structure as ``w``."""

    w: PyTree


class Unrolled(eqx.Module):
    """The derivative of ``M(w_T(alpha), alpha)`` through the steps that made ``w_T``.

    Args:
      solver: an inner solver whose iterations may be differentiated: `Descent`,
        `ClosedForm`, a constant-step one from jaxopt, or your own.
      last: let the derivative see only the last so many steps; None means all.
      checkpoint: store ``2 sqrt(T)`` carries and run the steps once more in the reverse
        pass, instead of storing every step's intermediates.
      warm_start: begin each run where the last ended, so that the procedure is T more
        steps from there; False asks for T steps from the same ``w`` every time. None
        means True, unless the solver itself reads ``alpha``: rates and schedules are
        judged by what they make of one start. The start is not differentiated, save
        where the problem's ``start`` makes it from ``alpha``.
      outer_batch_size: examples for the outer gradient, drawn once an estimate; None
        means all.

    Cost: T inner gradients forward, one Hessian-vector product with its cross term for
    each differentiated step back, and with checkpoints one more gradient each. Memory:
    ``2 sqrt(T)`` carries and one segment's intermediates; T steps' without checkpoints.

    Target: solver. Bias: none for the finite procedure, which is not the stationary
    point where the steps stop early; ``last=K`` drops what older steps contribute, a
    relative ``q^K`` under a contraction ``q``, and is not trusted. Everything the
    optimizer, the losses and the start read of ``alpha`` is seen.

    Source: Franceschi et al. 2017 (arXiv 1703.01785), algorithm 1; truncation from
    Shaban et al. 2019 (arXiv 1810.10667); checkpoints from Griewank & Walther 2000.

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - 3 * alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum(w**2)
    >>> estimator = hg.Unrolled(hg.Descent(optax.sgd(0.5), 100))
    >>> estimate = hg.hypergradient(hg.Bilevel(inner, outer), estimator)(0.0, 1.0)
    >>> round(float(estimate.hypergradient), 3)
    9.0
    """

    solver: IterativeSolver
    last: int | None = eqx.field(static=True, default=None)
    checkpoint: bool = eqx.field(static=True, default=True)
    warm_start: bool | None = eqx.field(static=True, default=None, kw_only=True)
    outer_batch_size: int | None = eqx.field(static=True, default=None, kw_only=True)

    target = "solver"
    citations = ("franceschi2017", "shaban2019", "griewank2000")

    def __check_init__(self):
        check_solver(self.solver)
        check_steps("last", self.last, optional=True)
        check_steps("outer_batch_size", self.outer_batch_size, optional=True)
        if not self.solver.differentiable:
            raise self._not_differentiable()

    def _not_differentiable(self) -> ValueError:
        return ValueError(
            f"the iterations of {self.solver} cannot be differentiated (line searches "
            "and L-BFGS give NaN or wrong derivatives when unrolled); use hg.Implicit "
            "with this solver, or hg.Unrolled with hg.Descent and a plain optimizer"
        )

    def error_factor(self, smallest: float, largest: float) -> float:
        """0 for all steps; NaN for ``last``, whose step size only the solver knows."""
        return 0.0 if self.last is None else float("nan")

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> UnrolledState:
        """Starts from ``w``."""
        del key
        # What an optimizer made from alpha is, only its state tells.
        inner_data, _ = problem.data(jax.random.key(0))
        first = lambda w, alpha, key: self.solver.init(
            problem.inner_loss, w, alpha, inner_data, key
        )
        if searches_a_line(jax.eval_shape(first, w, alpha, KEY)):
            raise self._not_differentiable()
        check_problem(problem, w, alpha, self.solver)
        beside = solver_reads_alpha(self.solver, problem, w, alpha, inner_data)
        advice = "nor does the optimizer; take it out of alpha"
        if self._is_full:
            start = start_reads_alpha(problem, w, alpha)
            beside = list(map(operator.or_, beside, start))
            advice = "nor does the optimizer or the start; take it out of alpha"
        check_seen(problem, w, alpha, beside, advice)
        return UnrolledState(w)

    @property
    def _is_full(self) -> bool:
        return self.last is None or self.last >= self.solver.num_steps

    def _response(
        self,
        problem: Bilevel,
        data: tuple[Data, Data],
        w: PyTree,
        alpha: PyTree,
        solver_key: Array,
        outer_key: Array,
    ) -> tuple[Array, PyTree]:
        """``M(w_T(alpha), alpha)`` and ``w_T(alpha)``."""
        inner_data, outer_data = data
        w, _ = iterate(
            self.solver,
            problem.inner_loss,
            problem.initial(w, alpha),
            alpha,
            inner_data,
            solver_key,
            last=self.last,
            checkpoint=self.checkpoint,
        )
        outer_batch = held(outer_data, self.outer_batch_size, outer_key)
        return problem.outer(w, alpha, outer_batch), w

    def estimate(
        self, problem: Bilevel, state: UnrolledState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, UnrolledState]:
        """One inner run forward and one back."""
        data_key, solver_key, residual_key, outer_key = jax.random.split(key, 4)
        inner_data, outer_data = data = problem.data(data_key)
        response = lambda alpha: self._response(
            problem, data, state.w, alpha, solver_key, outer_key
        )
        value, pullback, w = jax.vjp(response, alpha, has_aux=True)
        if problem.num_objectives is None:
            (hypergradient,) = pullback(jnp.ones_like(value))
        else:
            basis = jnp.eye(value.size, dtype=value.dtype)
            (hypergradient,) = jax.vmap(pullback)(basis)

        batch = whole(inner_data, residual_key)
        residual = norm(jax.grad(problem.inner_loss)(w, alpha, batch))
        forward = self.solver.num_steps
        backward = forward if self.last is None else min(self.last, forward)
        again = backward if self.checkpoint and is_segmented(backward) else 0
        costs = ledger(
            inner_data,
            outer_data,
            num_grads=(forward + again) * fraction(inner_data) + 1,
            num_hvps=backward * fraction(inner_data) * value.size,
            num_outer_grads=value.size
            * fraction(outer_data, self.outer_batch_size or size(outer_data)),
        )
        stats = make_stats(
            all_finite(value, hypergradient, w) & self._is_full,
            inner_residual=residual,
            inner_steps=forward,
            error_estimate=0.0 if self._is_full else jnp.nan,
            **costs,
        )
        keep = self.warm_start
        if keep is None:
            reads = solver_reads_alpha(self.solver, problem, w, alpha, inner_data)
            keep = not any(reads)
        keep = keep and problem.start is None
        next_state = UnrolledState(w) if keep else state
        return Estimate(value, hypergradient, w, stats), next_state
