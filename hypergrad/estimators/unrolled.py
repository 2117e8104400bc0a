"""Reverse mode through the inner loop."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from ..inner.base import IterativeSolver, grads_per_step
from ..inner.descent import split_steps, uses_checkpoints
from ..method_summary import MethodSummary
from ..problem import Bilevel, EstimateData
from ..problem_checks import solver_uses_alpha
from ..trees import norm
from ..validation import check_positive_int
from .base import Estimate
from .forward import Forward
from .inner_run import (
    InnerRunState,
    check_differentiable,
    check_inner_run,
    make_response_fn,
    make_run_estimate,
)


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
    point where the steps stop early; ``truncation_length=K`` drops what older steps contribute, a
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
    truncation_length: int | None = eqx.field(static=True, default=None)
    checkpoint: bool = eqx.field(static=True, default=True)
    warm_start: bool | None = eqx.field(static=True, default=None, kw_only=True)
    certify: bool = eqx.field(static=True, default=False, kw_only=True)
    outer_batch_size: int | None = eqx.field(static=True, default=None, kw_only=True)

    target = "solver"
    citations = ("franceschi2017", "shaban2019", "griewank2000")
    summary = (
        MethodSummary(
            "Unrolled(solver)",
            num_grads="2 * T + 1",
            num_hvps="T",
            memory="2 sqrt(T) carries",
            bias="none",
            alpha_in=("losses", "optimizer", "start"),
            recommended_for="alpha in the optimizer or start, a loop that stops early on purpose",
            not_recommended_for="very long runs, solvers that search along a line",
            reason="the derivative of the steps made; they run twice to save memory",
        ),
        MethodSummary(
            "Unrolled(solver, truncation_length=K)",
            num_grads="T + K + 1",
            num_hvps="K",
            memory="2 sqrt(K) carries",
            bias="q^K",
            alpha_in=("losses", "optimizer"),
            recommended_for="long runs that end near a minimum",
            not_recommended_for="learning rates and schedules, which early steps decide",
            reason="older steps are dropped: without contraction the sign may be wrong",
        ),
    )

    def __check_init__(self):
        check_differentiable(self.solver)
        check_positive_int("truncation_length", self.truncation_length, optional=True)
        check_positive_int("outer_batch_size", self.outer_batch_size, optional=True)

    @property
    def _is_full(self) -> bool:
        return (
            self.truncation_length is None
            or self.truncation_length >= self.solver.num_steps
        )

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """0 for all steps; NaN for ``last``, whose step size only the solver knows."""
        return 0.0 if self.truncation_length is None else float("nan")

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> InnerRunState:
        """Starts from ``w``."""
        del key
        check_inner_run(self.solver, problem, w, alpha, sees_start=self._is_full)
        return InnerRunState(w)

    def estimate(
        self, problem: Bilevel, state: InnerRunState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, InnerRunState]:
        """One inner run forward and one back."""
        data = EstimateData.sample(problem, key)
        run = make_response_fn(
            self.solver,
            problem,
            data,
            state.w,
            data.outer_batch(self.outer_batch_size),
            truncation_length=self.truncation_length,
            checkpoint=self.checkpoint,
        )
        forward = self.solver.num_steps
        backward = (
            forward
            if self.truncation_length is None
            else min(self.truncation_length, forward)
        )
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

        runs = (backward,) if self._is_full else split_steps(backward)
        again = sum(n for n in runs if self.checkpoint and uses_checkpoints(n))
        of_step = grads_per_step(self.solver)
        reads = solver_uses_alpha(self.solver, problem, w, alpha, data.inner_data)
        return make_run_estimate(
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
    half, between, _ = split_steps(last)
    if half == 0:
        return jnp.asarray(jnp.nan)
    q = (norm(older) / norm(newer)) ** (1 / (half + between))
    steps = num_steps - last
    series = q**half * (1 - q**steps) / (1 - q**half)
    series = jnp.where(q == 1, steps / half, series)
    tail = norm(older) * series
    return jnp.where(norm(older) == 0, 0.0, tail / norm(hypergradient))


MAX_FORWARD_PARAMS = 3


def unrolled_estimator(
    solver: IterativeSolver,
    alpha: PyTree,
    *,
    warm_start: bool | None = None,
    certify: bool = False,
    outer_batch_size: int | None = None,
) -> Forward | Unrolled:
    """The derivative through all of the solver's steps, by the mode that suits alpha.

    Args:
      solver: an inner solver whose iterations may be differentiated.
      alpha: hyperparameters like those to come, or their shapes; N numbers in all.
      warm_start, certify, outer_batch_size: as in `Unrolled`.

    Returns:
      `Forward` for N up to three: T gradients and N T products, batched, in memory
      that is flat in the steps. Else `Unrolled`: 2 T gradients and T products, whatever
      N. Both are exact.

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> solver = hg.Descent(optax.sgd(0.1), 1000)
    >>> type(hg.through(solver, {"log_rate": 0.0})).__name__
    'Forward'
    >>> type(hg.through(solver, jnp.zeros(50))).__name__
    'Unrolled'
    """
    count = sum(map(np.size, jax.tree.leaves(alpha)))
    estimator = Forward if count <= MAX_FORWARD_PARAMS else Unrolled
    return estimator(
        solver,
        warm_start=warm_start,
        certify=certify,
        outer_batch_size=outer_batch_size,
    )
