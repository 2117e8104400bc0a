"""Reverse mode through the inner loop."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ..checks import solver_reads_alpha
from ..drawn import drawn
from ..guide import Guide
from ..inner.descent import is_segmented, thirds
from ..inner.protocol import IterativeSolver, step_grads
from ..problem import Bilevel
from ..settings import check_steps
from ..trees import norm
from .procedure import (
    ProcedureState,
    check_differentiable,
    check_procedure,
    report,
    response,
)
from .protocol import Estimate


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
      certify: let a certificate measure ``distance_to_implicit``, the distance to the
        derivative at the argmin; NaN where the optimizer or the start reads ``alpha``.
      outer_batch_size: examples for the outer gradient, drawn once an estimate; None
        means all.

    Cost: T inner gradients forward, one Hessian-vector product with its cross term for
    each differentiated step back, and with checkpoints one more gradient each. Memory:
    ``2 sqrt(T)`` carries and one segment's intermediates; T steps' without checkpoints.

    Target: solver. Bias: none for the finite procedure, which is not the stationary
    point where the steps stop early; ``last=K`` drops what older steps contribute, a
    relative ``q^K`` under a contraction ``q``, and is not trusted. Its
    ``error_estimate`` continues the last K steps' contributions to the hypergradient as
    a geometric series: steps that matter only later, or grow, escape it. Everything the
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
    certify: bool = eqx.field(static=True, default=False, kw_only=True)
    outer_batch_size: int | None = eqx.field(static=True, default=None, kw_only=True)

    target = "solver"
    citations = ("franceschi2017", "shaban2019", "griewank2000")
    guide = (
        Guide(
            "Unrolled(solver)",
            gradients="2 * T + 1",
            hvps="T",
            memory="2 sqrt(T) carries",
            bias="none",
            sees=("losses", "optimizer", "start"),
            use="alpha in the optimizer or start, a loop that stops early on purpose",
            avoid="very long runs, solvers that search along a line",
            why="the derivative of the steps made; they run twice to save memory",
        ),
        Guide(
            "Unrolled(solver, last=K)",
            gradients="T + K + 1",
            hvps="K",
            memory="2 sqrt(K) carries",
            bias="q^K",
            sees=("losses", "optimizer"),
            use="long runs that end near a minimum",
            avoid="learning rates and schedules, which early steps decide",
            why="older steps are dropped: without contraction the sign may be wrong",
        ),
    )

    def __check_init__(self):
        check_differentiable(self.solver)
        check_steps("last", self.last, optional=True)
        check_steps("outer_batch_size", self.outer_batch_size, optional=True)

    @property
    def _is_full(self) -> bool:
        return self.last is None or self.last >= self.solver.num_steps

    def error_factor(self, smallest: float, largest: float) -> float:
        """0 for all steps; NaN for ``last``, whose step size only the solver knows."""
        return 0.0 if self.last is None else float("nan")

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> ProcedureState:
        """Starts from ``w``."""
        del key
        check_procedure(self.solver, problem, w, alpha, sees_start=self._is_full)
        return ProcedureState(w)

    def estimate(
        self, problem: Bilevel, state: ProcedureState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, ProcedureState]:
        """One inner run forward and one back."""
        data = drawn(problem, key)
        run = response(
            self.solver,
            problem,
            data,
            state.w,
            data.outer_batch(self.outer_batch_size),
            last=self.last,
            checkpoint=self.checkpoint,
        )
        forward = self.solver.num_steps
        backward = forward if self.last is None else min(self.last, forward)
        seen = (alpha,) if self._is_full else (alpha, alpha, alpha)
        value, pullback, w = jax.vjp(run, *seen, has_aux=True)
        if problem.num_objectives is None:
            parts = pullback(jnp.ones_like(value))
        else:
            parts = jax.vmap(pullback)(jnp.eye(value.size, dtype=value.dtype))
        hypergradient = functools.reduce(optax.tree.add, parts)
        error_estimate: Array | float = 0.0
        if not self._is_full:
            _, older, newer = parts
            one = functools.partial(truncated, backward, forward)
            one = one if problem.num_objectives is None else jax.vmap(one)
            error_estimate = jnp.max(one(hypergradient, older, newer))

        runs = (backward,) if self._is_full else thirds(backward)
        again = sum(n for n in runs if self.checkpoint and is_segmented(n))
        of_step = step_grads(self.solver)
        reads = solver_reads_alpha(self.solver, problem, w, alpha, data.inner_data)
        return report(
            problem,
            data,
            state,
            alpha,
            value,
            hypergradient,
            w,
            num_steps=forward,
            num_grads=of_step * (forward + again),
            num_hvps=of_step * backward * value.size,
            reads_alpha=any(reads),
            error_estimate=error_estimate,
            trusted=self._is_full,
            outer_batch_size=self.outer_batch_size,
            warm_start=self.warm_start,
            certify=self.certify,
        )


def truncated(
    last: int, num_steps: int, hypergradient: PyTree, older: PyTree, newer: PyTree
) -> Array:
    """Relative size of what all steps but the last would contribute; NaN for one step.

    ``q`` is the ratio of two steps' contributions, from those of the older and the
    newer half of the last; what lies before is ``||older||`` continued by it,
    ``q^n (1 - q^(T - K)) / (1 - q^n)`` for halves of n.
    """
    half, between, _ = thirds(last)
    if half == 0:
        return jnp.asarray(jnp.nan)
    q = (norm(older) / norm(newer)) ** (1 / (half + between))
    steps = num_steps - last
    series = q**half * (1 - q**steps) / (1 - q**half)
    series = jnp.where(q == 1, steps / half, series)
    tail = norm(older) * series
    return jnp.where(norm(older) == 0, 0.0, tail / norm(hypergradient))
