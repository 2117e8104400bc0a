"""DARTS, differentiable architecture search (Liu, Simonyan & Yang 2019)."""

import operator

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ...batches import sample_in_pass
from ...checks.lost_derivatives import losses_with_batches
from ...checks.problem import check_on_shapes
from ...jaxprs.inspection import alpha_has_gradient, leaf_names
from ...linear.neumann import Neumann
from ...method_summary import MethodSummary
from ...number_checks import positive
from ...problem import Bilevel, EstimateData
from ...runtime.all_cores import loss_on_all_cores
from ...trees import add_scale, all_finite, safe_norm, scale, widen
from ...validation import raise_with_context
from ..finite_difference import is_step_rounded
from .base import SingleLoop, SingleLoopState, Step, batch_fractions


class DARTS(SingleLoop):
    """Moves ``alpha`` along the outer gradient after one virtual step of ``w``.

    An outer step first makes one step of ``w``. The second-order direction for
    ``alpha`` differentiates ``M(w', alpha)`` with ``w' = w - step_size dL/dw``,

        dM/dalpha - step_size (dL/dalpha(w+) - dL/dalpha(w-)) / (2 e),

    where ``w+`` and ``w-`` are ``w + e b`` and ``w - e b``, ``b = dM/dw(w')`` and
    ``e = epsilon / ||b||``. The first-order direction is
    ``dM/dalpha`` at ``w``, without an indirect term. In the first outer step ``w`` does
    not move (``stats["num_inner_steps"]`` is 0), because ``alpha`` moves first. The
    ``value`` of a second-order step is that of the virtual ``w'``, and not of ``w``;
    ``inner_grad_norm`` is that before the step of ``w``.

    In bfloat16 and float16, ``w + e b`` would often round to ``w``. The inner loss is
    therefore evaluated with ``w+``, ``w-`` and ``alpha`` in float32 at least. Where the
    same happens in float32, as it does where ``||w||`` is above 1e5, the estimate has
    the flag ``unresolved_step``.

    Args:
      optimizer: Optax transformation for ``w``.
      step_size: Size of the virtual step; the paper uses the rate of ``w``. Defaults to
        None, the first-order direction.
      epsilon: Length of the step ``e b``. Defaults to 0.01, as in the paper.

    Cost: second order, four gradients and one outer gradient; first order, one and one;
      each on one batch.
    Memory: three vectors like ``w``.
    Bias: ``1 / step_size`` in place of ``H``, and the lag of ``w`` behind ``alpha``;
      for the first order, the whole indirect term. Target: argmin.

    Raises:
      TypeError: With ``step_size``, the inner loss fails if leaves of ``w`` and
        ``alpha`` that are shorter than float32 are passed in float32.
      ValueError: ``step_size`` is None and the outer loss does not depend on a leaf of
        ``alpha``, whose direction would always be zero.

    Source: Liu, Simonyan & Yang 2019 (arXiv 1806.09055).

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1.0) ** 2)
    >>> trace = hg.minimize(
    ...     hg.Bilevel(inner, outer), hg.DARTS(optax.sgd(0.5), step_size=0.5),
    ...     optax.sgd(0.2), 0.0, 3.0, num_steps=100,
    ... )
    >>> round(float(trace.alpha), 3)
    1.0
    """

    step_size: Array | float | None = eqx.field(
        default=None, converter=positive("step_size", optional=True)
    )
    epsilon: Array | float = eqx.field(
        default=0.01, kw_only=True, converter=positive("epsilon")
    )

    citations = ("liu2019",)
    summary = (
        MethodSummary(
            "DARTS(optimizer, step_size)",
            num_grads="4",
            num_hvps="0",
            memory="3 w and the optimizer's",
            bias="takes H for I / step_size",
            alpha_in=("losses",),
            recommended_for="architecture search, as published",
            not_recommended_for="a large indirect term: its size is a guess",
            reason="a virtual step is cheap and often points the right way",
        ),
    )

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """Returns ``max |1 - step_size lambda|``: the adjoint is one Neumann term."""
        series = Neumann(num_terms=1, step_size=float(self.step_size or 0.0))
        return series.error_bound(eig_min, eig_max)

    def init_memory(
        self, problem: Bilevel, state: SingleLoopState, alpha: PyTree
    ) -> None:
        """Checks the losses; the method has no memory.

        Raises:
          TypeError: The inner loss does not accept in float32 what is shorter.
          ValueError: The direction of first order is zero in a leaf of ``alpha``,
            because the outer loss does not depend on it.
        """
        check = _check_direct_term if self.step_size is None else _check_wide_loss
        check_on_shapes(check, problem, state.w, alpha)

    def step(
        self,
        problem: Bilevel,
        state: SingleLoopState,
        alpha: PyTree,
        data: EstimateData,
    ) -> tuple[Step, SingleLoopState]:
        """Makes the step of ``w`` and evaluates the direction after it."""
        inner_loss = loss_on_all_cores(problem.inner_loss)
        inner_grads = jax.grad(inner_loss, argnums=(0, 1))
        outer_batch = sample_in_pass(data.outer_data, data.outer_key)
        batch = sample_in_pass(data.inner_data, data.solver_key, stream="w")
        # w <- w - rho dL/dw
        inner_grad, _ = inner_grads(state.w, alpha, batch)
        has_alpha_moved = state.num_steps > 0
        state = optax.tree.where(has_alpha_moved, self.move_w(state, inner_grad), state)
        w = state.w

        batch = sample_in_pass(data.inner_data, data.inner_key, stream="direction")
        if self.step_size is None:
            # dM/dalpha
            value, _, direction = problem.outer_value_and_grads(w, alpha, outer_batch)
            num_grads, flags = 1, {}
        else:
            # w' = w - step_size dL/dw
            virtual_w = add_scale(w, -self.step_size, inner_grads(w, alpha, batch)[0])
            value, b, direct = problem.outer_value_and_grads(
                virtual_w, alpha, outer_batch
            )
            # (dL/dalpha(w + e b) - dL/dalpha(w - e b)) / (2 e), ||e b|| = epsilon
            b_norm = safe_norm(b)
            e = self.epsilon / jnp.where(b_norm > 0, b_norm, 1)
            wide_w, wide_alpha = widen((w, alpha))
            plus_w, minus_w = (add_scale(wide_w, sign * e, b) for sign in (1, -1))
            plus, minus = (
                inner_grads(w, wide_alpha, batch)[1] for w in (plus_w, minus_w)
            )
            difference = scale(0.5 / e, optax.tree.sub(plus, minus))
            # dM/dalpha - step_size J' b
            direction = add_scale(direct, -self.step_size, difference)
            num_grads = 4
            is_rounded = is_step_rounded(plus_w, minus_w, 2 * e, b)
            flags = {"unresolved_step": all_finite(w, b) & is_rounded}

        inner_fraction, outer_fraction = batch_fractions(data)
        counts = {
            "num_grads": inner_fraction * num_grads,
            "num_outer_grads": outer_fraction,
        }
        num_inner_steps = jnp.where(has_alpha_moved, 1, 0)
        step = Step(
            value,
            direction,
            w,
            inner_grad,
            counts,
            num_inner_steps=num_inner_steps,
            flags=flags,
        )
        return step, state


def _check_direct_term(problem: Bilevel, w: PyTree, alpha: PyTree) -> None:
    """Raises ValueError for a leaf of ``alpha`` that the outer loss does not use."""
    _, (_, outer_loss, batch) = losses_with_batches(problem)
    has_gradient = alpha_has_gradient(outer_loss, w, alpha, batch)
    if unused := leaf_names("alpha", alpha, map(operator.not_, has_gradient)):
        raise ValueError(
            f"step_size must be given: the outer loss does not depend on {unused}, so "
            "that the direction of first order is zero there."
        )


def _check_wide_loss(problem: Bilevel, w: PyTree, alpha: PyTree) -> None:
    """Raises an error unless the inner loss accepts short leaves in float32."""
    (_, inner_loss, batch), _ = losses_with_batches(problem)
    try:
        jax.eval_shape(inner_loss, *widen((w, alpha)), batch)
    except Exception as error:
        raise_with_context(
            error,
            "It was raised in inner_loss, which DARTS of second order evaluates with "
            "w in float32, because differences of shorter numbers are inaccurate. "
            "Pass w and alpha in float32, and cast them in the loss if need be.",
        )
