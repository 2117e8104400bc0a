"""Forward mode through the inner run."""

import math
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ..inner.base import IterativeSolver, grads_per_step
from ..method_summary import MethodSummary
from ..problem import Bilevel, EstimateData
from ..problem_checks import lost_in_step_flags, solver_uses_alpha
from ..products import pushforward
from ..trees import all_finite
from ..validation import check_positive_int
from .inner_run import (
    InnerRunState,
    RunDerivative,
    RunEstimator,
    check_differentiable,
    check_differentiable_run,
    make_response_fn,
    unravel_derivatives,
)


class Forward(RunEstimator):
    """The derivative of ``M(w_T(alpha), alpha)`` by forward mode along the run.

    With the N numbers of ``alpha`` the steps carry the N columns of ``Z = dw/dalpha``:

        Z_{t+1} = (dw_{t+1}/dw_t) Z_t + dw_{t+1}/dalpha
        dF/dalpha = dM/dalpha + Z_T' dM/dw

    Use it for few hyperparameters over many steps, such as learning rates that are
    shared by many steps (`hypergrad.piecewise_constant_schedule`).

    Args:
      solver: Inner solver with differentiable iterations.
      max_tangents: Largest number of columns of one run, B. If N is larger, a run is
        made for each block of at most B columns. Defaults to N, a single run.
      warm_start, certify, outer_batch_size: As in `Unrolled`.

    Cost: T inner gradients and N T Hessian-vector products, in one batch per step. With
      blocks ``ceil(N / B) T`` gradients, and as many products.
    Memory: N + 1 carries of the solver, B + 1 with blocks, for any number of steps.
    Target: solver. The derivative includes every dependence of the optimizer, the
      losses and ``init_fn`` on ``alpha``.
    Bias: none for the finite run.

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
            num_hvps="N * T",
            memory="N + 1 carries",
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
        """Returns the derivative by one run that carries N tangents."""
        flat_alpha, unravel = ravel_pytree(alpha)
        outer_batch = data.outer_batch(self.outer_batch_size)
        response_fn = make_response_fn(self.solver, problem, data, w, outer_batch)
        response_of_vector = lambda flat: response_fn(unravel(flat))
        num_blocks = 1
        if self.max_tangents is not None:
            num_blocks = math.ceil(flat_alpha.size / self.max_tangents)
        (value, final_w), derivatives = _differentiate_in_blocks(
            response_of_vector, flat_alpha, num_blocks
        )
        hypergradient = unravel_derivatives(derivatives, flat_alpha, unravel)
        num_steps = self.solver.num_steps
        step_grads = grads_per_step(self.solver) * num_steps
        return RunDerivative(
            value,
            hypergradient,
            final_w,
            flags={
                "not_finite": ~all_finite(value, hypergradient, final_w),
                **lost_in_step_flags(self.solver, problem, w, alpha),
            },
            num_steps=num_steps,
            num_grads=num_blocks * step_grads,
            num_hvps=flat_alpha.size * step_grads,
            error_estimate=0.0,
        )


def _differentiate_in_blocks(
    f: Callable[[Array], tuple[Array, PyTree]], x: Float[Array, " n"], num_blocks: int
) -> tuple[tuple[Array, PyTree], Array]:
    """Returns ``f(x)`` and the derivatives of its first result by the entries of ``x``.

    Each block evaluates ``f`` once, with its tangents in one batch.
    """
    if num_blocks == 1:
        outputs, (derivatives, _) = pushforward(f, x, jnp.eye(x.size, dtype=x.dtype))
        return outputs, derivatives
    block_size = math.ceil(x.size / num_blocks)

    def run_block(_, block: Array) -> tuple[tuple[Array, PyTree], Array]:
        indices = block * block_size + jnp.arange(block_size)
        # Indices beyond the last entry have a zero direction.
        directions = jax.nn.one_hot(indices, x.size, dtype=x.dtype)
        outputs, (derivatives, _) = pushforward(f, x, directions)
        return outputs, derivatives

    # The outputs are carried, because they are the same for all blocks.
    init_outputs = jax.tree.map(
        lambda y: jnp.zeros(y.shape, y.dtype), jax.eval_shape(f, x)
    )
    outputs, blocks = jax.lax.scan(run_block, init_outputs, jnp.arange(num_blocks))
    derivatives = blocks.reshape(num_blocks * block_size, *blocks.shape[2:])
    return outputs, derivatives[: x.size]
