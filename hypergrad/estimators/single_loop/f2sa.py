"""F2SA, a fully first-order method (Kwon, Kwon, Wright & Nowak 2023)."""

from collections.abc import Callable
from dataclasses import replace

import equinox as eqx
import jax
import optax
from jaxtyping import Array, PyTree

from ...batches import sample_in_pass
from ...method_summary import MethodSummary
from ...number_checks import check_positive_int, or_schedule, positive
from ...problem import Bilevel, EstimateData
from ...runtime.all_cores import loss_on_all_cores
from ...trees import add_scale, scale
from .base import SingleLoop, SingleLoopState, Step, batch_fractions, value_at_step
from .inner_loops import sample_streams, scan_with_first_output


class F2SA(SingleLoop):
    """Replaces the adjoint by the difference of two gradients, times a penalty.

    An outer step makes ``num_steps`` steps of two inner variables,

        y <- y - rho (dL/dw(y) + dM/dw(y) / penalty)
        z <- z - rho  dL/dw(z)

    of which ``y`` follows the argmin of ``M + penalty L`` and ``z`` that of ``L``. The
    direction for ``alpha`` is then

        dM/dalpha(y) + penalty (dL/dalpha(y) - dL/dalpha(z)).

    Each term is evaluated on a fresh batch. In the paper, ``y`` moves along the
    gradient of ``M + penalty L`` at a rate that falls as the penalty grows.

    The ``value`` and the ``w`` of a step are those of ``y``, which also lowers ``M``,
    and the gradient norm is that of ``z``. Solve the inner problem at the final
    ``alpha`` before you use ``w``.

    Args:
      optimizer: Optax transformation for ``y`` and ``z``. A schedule in it counts their
        steps, ``num_steps`` of them per outer step.
      num_steps: Number m of inner steps per outer step.
      penalty: A number above 0, or a schedule of the outer step. The paper's penalty
        grows as ``k^(1/7)``, e.g. ``lambda k: 10 * (1 + k) ** (1 / 7)``.

    Cost: ``2 m + 2`` gradients and ``m + 1`` outer gradients on a batch each; no
      Hessian-vector product.
    Memory: two vectors like ``w`` and the states of the optimizers.
    Bias: ``O(1 / penalty)``, and the lag of ``y`` and ``z`` behind ``alpha``. Target:
      argmin.

    Source: Kwon, Kwon, Wright & Nowak 2023 (arXiv 2301.10945).

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1.0) ** 2)
    >>> trace = hg.minimize(
    ...     hg.Bilevel(inner, outer), hg.F2SA(optax.sgd(0.5), 5, penalty=10.0),
    ...     optax.sgd(0.2), 0.0, 3.0, num_steps=100,
    ... )
    >>> round(float(trace.alpha), 3)
    1.0
    """

    num_steps: int = eqx.field(static=True)
    penalty: Array | float | Callable = eqx.field(
        kw_only=True, converter=or_schedule(positive("penalty"))
    )

    citations = ("kwon2023",)
    summary = (
        MethodSummary(
            "F2SA(optimizer, m, l)",
            num_grads="2 * m + 2",
            num_hvps="0",
            memory="2 w and the optimizers'",
            bias="1/l, and what y and z lag behind",
            alpha_in=("losses",),
            recommended_for="networks whose second derivatives are too expensive",
            not_recommended_for="high accuracy: the penalty multiplies the noise",
            reason="a difference of two gradients in place of the adjoint",
        ),
    )

    def __check_init__(self):
        check_positive_int("num_steps", self.num_steps)

    def init_memory(
        self, problem: Bilevel, state: SingleLoopState, alpha: PyTree
    ) -> SingleLoopState:
        """Returns ``z`` at the starting point of ``y``, which is ``w`` of the state."""
        return SingleLoopState(state.w, state.w_opt_state)

    def step(
        self,
        problem: Bilevel,
        state: SingleLoopState,
        alpha: PyTree,
        data: EstimateData,
    ) -> tuple[Step, SingleLoopState]:
        """Makes the steps of ``y`` and ``z`` and evaluates the direction after them."""
        penalty = value_at_step(self.penalty, state.num_steps)
        inner_loss = loss_on_all_cores(problem.inner_loss)
        inner_grads = jax.grad(inner_loss, argnums=(0, 1))

        def body_fun(carry, key, k):
            y, z = carry
            y_key, z_key, outer_key = jax.random.split(key, 3)
            sample = lambda data, key, stream: sample_in_pass(
                data, key, k, self.num_steps, stream=stream
            )
            outer_batch = sample(data.outer_data, outer_key, "y")
            _, b, _ = problem.outer_value_and_grads(y.w, alpha, outer_batch)
            y_grad, _ = inner_grads(y.w, alpha, sample(data.inner_data, y_key, "y"))
            # y <- y - rho (dL/dw + dM/dw / penalty)
            y = self.move_w(y, add_scale(y_grad, 1 / penalty, b))
            # z <- z - rho dL/dw
            z_grad, _ = inner_grads(z.w, alpha, sample(data.inner_data, z_key, "z"))
            return (y, self.move_w(z, z_grad)), z_grad

        y = SingleLoopState(state.w, state.w_opt_state)
        keys = jax.random.split(data.solver_key, self.num_steps)
        (y, z), z_grad = scan_with_first_output(
            body_fun, (y, state.memory), keys, state.w
        )

        # dM/dalpha(y) + penalty (dL/dalpha(y) - dL/dalpha(z))
        outer_batch = sample_in_pass(data.outer_data, data.outer_key)
        value, _, direct = problem.outer_value_and_grads(y.w, alpha, outer_batch)
        y_batch, z_batch = sample_streams(
            data.inner_data, data.inner_key, "y direction", "z direction"
        )
        _, y_cross = inner_grads(y.w, alpha, y_batch)
        _, z_cross = inner_grads(z.w, alpha, z_batch)
        indirect = scale(penalty, optax.tree.sub(y_cross, z_cross))

        inner_fraction, outer_fraction = batch_fractions(data)
        counts = {
            "num_grads": inner_fraction * (2 * self.num_steps + 2),
            "num_outer_grads": outer_fraction * (self.num_steps + 1),
        }
        step = Step(
            value,
            optax.tree.add(direct, indirect),
            y.w,
            z_grad,
            counts,
            num_inner_steps=self.num_steps,
        )
        return step, replace(y, memory=z)
