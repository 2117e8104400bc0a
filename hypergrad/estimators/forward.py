"""Forward mode through the inner run."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from ..checks.lost_derivatives import lost_in_step_flags
from ..implicit.minimum import is_cancelled
from ..inner.base import IterativeSolver, grads_per_step
from ..method_summary import MethodSummary
from ..problem import Bilevel, EstimateData
from ..products import pushforward
from ..trees import all_finite, vdot
from .inner_run import (
    InnerRunState,
    RunDerivative,
    RunEstimator,
    check_differentiable,
    check_differentiable_run,
    make_final_w_fn,
    unravel_derivatives,
)
from .rounding import amplifies_rounding_in_forward_mode, random_perturbation


class Forward(RunEstimator):
    """The derivative of ``M(w_T(alpha), alpha)`` by forward mode along the run.

    With the N numbers of ``alpha`` the steps carry the N columns of ``Z = dw/dalpha``:

        Z_{t+1} = (dw_{t+1}/dw_t) Z_t + dw_{t+1}/dalpha
        dF/dalpha = dM/dalpha + Z_T' dM/dw

    Use it for few hyperparameters over many steps, such as learning rates that are
    shared by many steps (`hypergrad.piecewise_constant_schedule`).

    Args:
      solver: Inner solver with differentiable iterations.
      warm_start, outer_batch_size: As in `Unrolled`.

    Cost: T inner gradients and (N + 1) T Hessian-vector products, in one batch per
      step, and one outer gradient.
    Memory: N + 2 carries of the solver, for any number of steps.
    Target: solver. The derivative includes every dependence of the optimizer, the
      losses and ``init_fn`` on ``alpha``.
    Bias: none for the finite run.
    Trust: values are finite, no derivative is lost, and the steps do not amplify
      rounding errors, so that a chaotic run is not trusted. A further column ``z`` of
      ``Z`` is the change of ``w_T`` if each iterate is rounded, with random signs. The
      norm of ``z dM/dw`` must be at most 1% of that of ``(|w_0| + |w_T|) dM/dw``, and
      at most the root of the rounding error of a number, which is half of its digits.
      In bfloat16 and float16 the signs are equal in all steps. The two parts of the
      hypergradient must not cancel up to rounding. The units of ``w`` do not matter.

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

    def differentiate(
        self, problem: Bilevel, data: EstimateData, w: PyTree, alpha: PyTree
    ) -> RunDerivative:
        """Returns the derivative by one run that carries N + 1 tangents."""
        flat_alpha, unravel = ravel_pytree(alpha)
        final_w_fn = make_final_w_fn(self.solver, problem, data, w)

        def perturbed_run(x):
            relative_change = random_perturbation(w, size=x[-1])
            return final_w_fn(unravel(x[:-1]), relative_change=relative_change)

        x = jnp.append(flat_alpha, 0)
        directions = jnp.eye(x.size, dtype=x.dtype)
        final_w, tangents = pushforward(perturbed_run, x, directions)
        value, outer_grad, direct = problem.outer_value_and_grads(
            final_w, alpha, data.outer_batch(self.outer_batch_size)
        )
        # Z' dM/dw, with K outer losses on the last axis
        contract = lambda b: jax.vmap(lambda z: vdot(z, b))(tangents)
        terms = jnp.moveaxis(problem.for_each_loss(contract)(outer_grad), -1, 0)
        # dF/dalpha = dM/dalpha + Z_T' dM/dw
        indirect = unravel_derivatives(terms[:-1], flat_alpha, unravel)
        hypergradient = optax.tree.add(direct, indirect)
        check_fn = functools.partial(
            amplifies_rounding_in_forward_mode,
            jax.tree.map(lambda leaf: leaf[-1], tangents),
            init_w=problem.init_inner(w, alpha),
            final_w=final_w,
        )
        is_amplified = problem.for_each_loss(check_fn)(outer_grad)
        cancels = functools.partial(is_cancelled, adjoint=final_w)
        is_lost = problem.for_each_loss(cancels)(hypergradient, indirect)
        num_steps = self.solver.num_steps
        num_grads = grads_per_step(self.solver) * num_steps
        return RunDerivative(
            value,
            hypergradient,
            final_w,
            flags={
                "not_finite": ~all_finite(value, hypergradient, final_w),
                "rounding_error": jnp.any(is_amplified | is_lost),
                **lost_in_step_flags(self.solver, problem, w, alpha),
            },
            num_steps=num_steps,
            num_grads=num_grads,
            num_hvps=x.size * num_grads,
            error_estimate=0.0,
        )
