"""Forward mode through the inner run."""

import functools
import math
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ..checks.lost_derivatives import lost_in_step_flags
from ..checks.problem import solver_uses_alpha
from ..inner.base import IterativeSolver, grads_per_step
from ..method_summary import MethodSummary
from ..problem import Bilevel, EstimateData
from ..products import pushforward
from ..trees import all_finite, vdot
from ..validation import check_positive_int
from .inner_run import (
    InnerRunState,
    RunDerivative,
    RunEstimator,
    check_differentiable,
    check_differentiable_run,
    make_final_w_fn,
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
      max_tangents: Largest number of tangents of one run, B. If N + 1 is larger, a
        run is made for each block of tangents. The blocks have one size b, the smallest
        for this number of runs. Defaults to a single run.
      warm_start, certify, outer_batch_size: As in `Unrolled`.

    Cost: T inner gradients and (N + 1) T Hessian-vector products, in one batch per
      step, and one outer gradient. With ``k = ceil((N + 1) / B)`` blocks of
      ``b = ceil((N + 1) / k)`` tangents, k T inner gradients, k b T products, and k
      outer gradients; the last block is padded with zeros.
    Memory: N + 2 carries of the solver, b + 2 with blocks, for any number of steps.
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
    max_tangents: int | None = eqx.field(static=True, default=None)

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
        check_positive_int("max_tangents", self.max_tangents, optional=True)

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
        final_w_fn = make_final_w_fn(self.solver, problem, data, w)

        def perturbed_run(x):
            perturbation = random_perturbation(w, size=x[-1])
            return final_w_fn(unravel(x[:-1]), relative=perturbation.relative)

        def differentiate_along(directions):
            final_w, tangents = pushforward(perturbed_run, x, directions)
            outer = problem.outer_value_and_grads(final_w, alpha, outer_batch)
            # Z' dM/dw, with K outer losses on the last axis
            contract = lambda b: jax.vmap(lambda z: vdot(z, b))(tangents)
            terms = problem.for_each_loss(contract)(outer[1])
            return (final_w, outer), jnp.moveaxis(terms, -1, 0), tangents

        x = jnp.append(flat_alpha, 0)
        num_blocks = math.ceil(x.size / (self.max_tangents or x.size))
        block_size = math.ceil(x.size / num_blocks)
        (final_w, outer), terms, tangent = _run_in_blocks(
            differentiate_along, x, block_size
        )
        value, outer_grad, direct = outer
        # dF/dalpha = dM/dalpha + Z_T' dM/dw
        indirect = unravel_derivatives(terms[:-1], flat_alpha, unravel)
        hypergradient = optax.tree.add(direct, indirect)
        check_fn = functools.partial(
            amplifies_rounding,
            tangent,
            init_w=problem.init_inner(w, alpha),
            final_w=final_w,
        )
        is_amplified = problem.for_each_loss(check_fn)(outer_grad)
        num_steps = self.solver.num_steps
        step_grads = grads_per_step(self.solver) * num_steps
        return RunDerivative(
            value,
            hypergradient,
            final_w,
            flags={
                "not_finite": ~all_finite(value, hypergradient, final_w),
                "rounding_error": jnp.any(is_amplified),
                **lost_in_step_flags(self.solver, problem, w, alpha),
            },
            num_steps=num_steps,
            num_grads=num_blocks * step_grads,
            num_hvps=num_blocks * block_size * step_grads,
            num_outer_grads=num_blocks,
            error_estimate=0.0,
        )


def _run_in_blocks(
    f: Callable[[Array], tuple[PyTree, Array, PyTree]],
    x: Float[Array, " n"],
    block_size: int,
) -> tuple[PyTree, Array, PyTree]:
    """Differentiates by the entries of ``x``, each block of them in one call of ``f``.

    Args:
      f: Function of directions ``[b, n]``, which returns outputs that do not depend on
        them, derivatives ``[b, ...]``, and tangents with the same leading axis.
      x: Point of evaluation.
      block_size: b.

    Returns:
      The outputs, the derivatives by all entries, and the tangent of the last entry.
    """
    if block_size == x.size:
        outputs, derivatives, tangents = f(jnp.eye(x.size, dtype=x.dtype))
        return outputs, derivatives, jax.tree.map(lambda leaf: leaf[-1], tangents)
    num_blocks = math.ceil(x.size / block_size)
    final_index = x.size - 1 - (num_blocks - 1) * block_size  # within its block

    def run_block(_, block: Array):
        indices = block * block_size + jnp.arange(block_size)
        # Indices beyond the last entry have a zero direction.
        directions = jax.nn.one_hot(indices, x.size, dtype=x.dtype)
        outputs, derivatives, tangents = f(directions)
        tangent = jax.tree.map(lambda leaf: leaf[final_index], tangents)
        return (outputs, tangent), derivatives

    # What is carried is what the last block returns.
    zeros = lambda y: jnp.zeros(y.shape, y.dtype)
    init_carry = jax.tree.map(
        zeros, jax.eval_shape(lambda: run_block(None, jnp.asarray(0))[0])
    )
    (outputs, tangent), blocks = jax.lax.scan(
        run_block, init_carry, jnp.arange(num_blocks)
    )
    derivatives = blocks.reshape(num_blocks * block_size, *blocks.shape[2:])
    return outputs, derivatives[: x.size], tangent
