"""Forward mode through the inner run."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from ..inner.base import IterativeSolver, grads_per_step
from ..method_summary import MethodSummary
from ..problem import Bilevel, EstimateData
from ..problem_checks import lost_in_step_flags, solver_uses_alpha
from ..products import pushforward
from ..trees import all_finite
from .inner_run import (
    InnerRunState,
    RunDerivative,
    RunEstimator,
    check_differentiable,
    check_differentiable_run,
    make_response_fn,
    unravel_derivatives,
)
from .rounding import amplifies_rounding, random_perturbation


class Forward(RunEstimator):
    """The derivative of ``M(w_T(alpha), alpha)`` by forward mode along the run.

    With the N numbers of ``alpha`` the steps carry the N columns of ``Z = dw/dalpha``:

        Z_{t+1} = (dw_{t+1}/dw_t) Z_t + dw_{t+1}/dalpha
        dF/dalpha = dM/dalpha + Z_T' dM/dw

    Use it for few hyperparameters over many steps, such as learning rates that are
    shared by many steps (`hypergrad.piecewise_constant_schedule`).

    Args:
      solver: Inner solver with differentiable iterations.
      warm_start, certify, outer_batch_size: As in `Unrolled`.

    Cost: T inner gradients, (N + 1) T Hessian-vector products, batched, and two outer
      gradients.
    Memory: N + 2 carries of the solver, for any number of steps.
    Target: solver. The derivative includes every dependence of the optimizer, the
      losses and ``init_fn`` on ``alpha``.
    Bias: none for the finite run.
    Trust: values are finite, no derivative is lost, and the steps do not amplify
      rounding errors, so that a chaotic run is not trusted. A further column ``z`` of
      ``Z`` is the change of ``w_T`` if each iterate is rounded, with random signs. The
      entries of ``z dM/dw`` must leave those of ``(|w_0| + |w_T|) dM/dw`` half of their
      digits, and 1e-2 of them, in Euclidean norm and for any units of ``w``.

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

    citations = ("franceschi2017", "micaelli2021")
    summary = (
        MethodSummary(
            "Forward(solver)",
            num_grads="T + 1",
            num_hvps="(N + 1) * T",
            memory="N + 2 carries",
            bias="none",
            alpha_in=("losses", "optimizer", "start"),
            recommended_for="a handful of hyperparameters over very many steps",
            not_recommended_for="more than a handful",
            reason="one tangent per hyperparameter is carried, and no step is stored",
        ),
    )

    def __check_init__(self):
        check_differentiable(self.solver)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """Returns 0, because the derivative of the run is exact."""
        return 0.0

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> InnerRunState:
        """Returns the state in which the first run starts from ``w``."""
        check_differentiable_run(self.solver, problem, w, alpha)
        return super().init(problem, w, alpha, key)

    def optimizer_uses_alpha(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, inner_data: PyTree
    ) -> Sequence[bool]:
        """Returns which leaves of ``alpha`` the solver uses besides the inner loss."""
        return solver_uses_alpha(self.solver, problem, w, alpha, inner_data)

    def differentiate(
        self, problem: Bilevel, data: EstimateData, w: PyTree, alpha: PyTree
    ) -> RunDerivative:
        """Returns the derivative by one run that carries N + 1 tangents."""
        flat_alpha, unravel = ravel_pytree(alpha)
        outer_batch = data.outer_batch(self.outer_batch_size)
        response_fn = make_response_fn(self.solver, problem, data, w, outer_batch)

        def perturbed_response(x):
            perturbation = random_perturbation(w, size=x[-1])
            return response_fn(unravel(x[:-1]), perturbation=perturbation)

        (value, final_w), (derivatives, tangents) = pushforward(
            perturbed_response,
            jnp.append(flat_alpha, 0),
            jnp.eye(flat_alpha.size + 1, dtype=flat_alpha.dtype),
        )
        hypergradient = unravel_derivatives(derivatives[:-1], flat_alpha, unravel)
        _, outer_grad, _ = problem.outer_value_and_grads(final_w, alpha, outer_batch)
        check_fn = functools.partial(
            amplifies_rounding,
            jax.tree.map(lambda leaf: leaf[-1], tangents),
            init_w=problem.init_inner(w, alpha),
            final_w=final_w,
        )
        if problem.num_objectives is not None:
            check_fn = jax.vmap(check_fn)
        num_steps = self.solver.num_steps
        num_grads = grads_per_step(self.solver) * num_steps
        return RunDerivative(
            value,
            hypergradient,
            final_w,
            flags={
                "not_finite": ~all_finite(value, hypergradient, final_w),
                "rounding_error": jnp.any(check_fn(outer_grad)),
                **lost_in_step_flags(self.solver, problem, w, alpha),
            },
            num_steps=num_steps,
            num_grads=num_grads,
            num_hvps=(flat_alpha.size + 1) * num_grads,
            num_outer_grads=2,
            error_estimate=0.0,
        )
