"""Forward mode through the inner loop."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from ..inner.base import IterativeSolver, grads_per_step
from ..method_summary import MethodSummary
from ..problem import Bilevel, EstimateData
from ..problem_checks import solver_uses_alpha
from ..products import pushforward
from ..validation import check_positive_int
from .base import Estimate
from .inner_run import (
    InnerRunState,
    check_differentiable,
    check_inner_run,
    make_response_fn,
    make_run_estimate,
)


class Forward(eqx.Module):
    """The derivative of ``M(w_T(alpha), alpha)``, carried forward with the steps.

    ``Z_{t+1} = (dw_{t+1}/dw_t) Z_t + dw_{t+1}/dalpha``, a column for each of the N
    numbers of ``alpha``; then ``dM/dalpha + Zᵀ dM/dw``.

    Args:
      solver: an inner solver whose iterations may be differentiated.
      warm_start: begin each run where the last ended, as in `Unrolled`.
      certify: measure ``distance_to_implicit``, as in `Unrolled`.
      outer_batch_size: examples for the outer loss, drawn once an estimate; None means
        all.

    For few hyperparameters over many steps, such as rates that windows of steps share
    (`hypergrad.windows`).

    Cost: T inner gradients and N T Hessian-vector products, batched. Memory: N + 1 of
    the solver's carries, flat in the number of steps.

    Target: solver. Bias: none for the finite procedure. Everything the optimizer, the
    losses and the start read of ``alpha`` is seen.

    Source: Franceschi et al. 2017 (arXiv 1703.01785), algorithm 2; shared
    hyperparameters from Micaelli & Storkey 2021 (arXiv 2007.07869).

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - 3 * alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum(w**2)
    >>> estimator = hg.Forward(hg.Descent(optax.sgd(0.5), 100))
    >>> estimate = hg.hypergradient(hg.Bilevel(inner, outer), estimator)(0.0, 1.0)
    >>> round(float(estimate.hypergradient), 3)
    9.0
    """

    solver: IterativeSolver
    warm_start: bool | None = eqx.field(static=True, default=None, kw_only=True)
    certify: bool = eqx.field(static=True, default=False, kw_only=True)
    outer_batch_size: int | None = eqx.field(static=True, default=None, kw_only=True)

    target = "solver"
    citations = ("franceschi2017", "micaelli2021")
    summary = (
        MethodSummary(
            "Forward(solver)",
            num_grads="T + 1",
            num_hvps="N * T",
            memory="N + 1 carries",
            bias="none",
            alpha_in=("losses", "optimizer", "start"),
            recommended_for="a handful of hyperparameters over very many steps",
            not_recommended_for="more than a handful",
            reason="one tangent a hyperparameter goes along, and no step is stored",
        ),
    )

    def __check_init__(self):
        check_differentiable(self.solver)
        check_positive_int("outer_batch_size", self.outer_batch_size, optional=True)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """0: exact for the procedure."""
        return 0.0

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> InnerRunState:
        """Starts from ``w``."""
        del key
        check_inner_run(self.solver, problem, w, alpha)
        return InnerRunState(w)

    def estimate(
        self, problem: Bilevel, state: InnerRunState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, InnerRunState]:
        """One inner run with N tangents."""
        data = EstimateData.sample(problem, key)
        flat, unravel = ravel_pytree(alpha)
        outer_batch = data.outer_batch(self.outer_batch_size)
        run = make_response_fn(self.solver, problem, data, state.w, outer_batch)
        basis = jnp.eye(flat.size, dtype=flat.dtype)
        (value, w), (slopes, _) = pushforward(lambda x: run(unravel(x)), flat, basis)
        slopes = slopes.astype(flat.dtype)  # of a loss that may be in another
        if problem.num_objectives is None:
            hypergradient = unravel(slopes)
        else:
            hypergradient = jax.vmap(unravel, in_axes=1)(slopes)
        steps = self.solver.num_steps
        num_grads = grads_per_step(self.solver) * steps
        reads = solver_uses_alpha(self.solver, problem, w, alpha, data.inner_data)
        return make_run_estimate(
            problem,
            data,
            state,
            alpha,
            value,
            hypergradient,
            w,
            num_steps=steps,
            num_grads=num_grads,
            num_hvps=flat.size * num_grads,
            reads_alpha=any(reads),
            error_estimate=0.0,
            trusted=True,
            outer_batch_size=self.outer_batch_size,
            warm_start=self.warm_start,
            certify=self.certify,
        )
