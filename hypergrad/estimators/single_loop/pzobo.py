"""PZOBO, partial zeroth-order bilevel optimization (Sow, Ji & Liang 2022)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ...batches import sample_in_pass
from ...method_summary import MethodSummary
from ...number_checks import check_positive_int, positive
from ...problem import Bilevel, EstimateData
from ...trees import add_scale, norm_ratio, random_like, scale, vdot
from ..error_estimates import standard_error
from ..evolution import is_resolved
from .base import SingleLoop, SingleLoopState, Step, batch_fractions
from .inner_loops import run_w_steps


class PZOBO(SingleLoop):
    """Estimates the response of ``w`` to ``alpha`` by differences along random vectors.

    The direction for ``alpha`` is

        dM/dalpha + mean_j <(w_m(alpha + sigma u_j) - w_m(alpha)) / sigma, b> u_j,

    where ``w_m`` is the result of ``num_steps`` steps from the current ``w``, on the
    same batches for each ``alpha``, the ``u_j`` are standard normal, and ``b = dM/dw``.

    Args:
      optimizer: Optax transformation for ``w``. A schedule in it counts the steps of
        ``w``, ``num_steps`` of them per outer step.
      num_steps: Number m of inner steps per outer step.
      num_directions: Number n of random vectors.
      sigma: Size of the differences of ``alpha``. It must be well above the rounding of
        ``alpha``, and change ``w_m`` by well more than the rounding of ``w``. Defaults
        to 0.01.

    The statistic ``standard_error`` is the relative standard error over the random
    vectors; ``inner_grad_norm`` is that before the first of the m steps. The standard
    error is NaN if rounding changes the difference of an entry of ``alpha`` by
    more than ``sigma / 10``, and it does not contain the rounding errors of ``w``.

    Cost: ``(n + 1) m`` gradients and one outer gradient on a batch each; no
      Hessian-vector product.
    Memory: ``n + 1`` inner runs at once.
    Bias: relative to the derivative of the argmin, the contribution of steps before the
      last m, and ``O(sigma)``. The noise has the relative variance ``(N + 1) / n`` for
      N numbers in ``alpha``. Target: argmin.

    Source: Sow, Ji & Liang 2022 (arXiv 2110.07004).

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1.0) ** 2)
    >>> trace = hg.minimize(
    ...     hg.Bilevel(inner, outer), hg.PZOBO(optax.sgd(0.5), 5, 4), optax.sgd(0.1),
    ...     0.0, 3.0, num_steps=200,
    ... )
    >>> round(float(trace.alpha), 3)
    1.0
    """

    num_steps: int = eqx.field(static=True)
    num_directions: int = eqx.field(static=True)
    sigma: Array | float = eqx.field(
        default=0.01, kw_only=True, converter=positive("sigma")
    )

    citations = ("sow2022",)
    summary = (
        MethodSummary(
            "PZOBO(optimizer, m, n)",
            num_grads="(n + 1) * m",
            num_hvps="0",
            memory="n + 1 runs",
            bias="steps before the last m, sigma, and noise",
            alpha_in=("losses",),
            recommended_for="losses without second derivatives",
            not_recommended_for="many hyperparameters: the noise grows with them",
            reason="the outer loss is differentiated, only the response is sampled",
        ),
    )

    def __check_init__(self):
        check_positive_int("num_steps", self.num_steps)
        check_positive_int("num_directions", self.num_directions)

    def step(
        self,
        problem: Bilevel,
        state: SingleLoopState,
        alpha: PyTree,
        data: EstimateData,
    ) -> tuple[Step, SingleLoopState]:
        """Makes the inner steps at each ``alpha`` and evaluates the direction."""
        run = lambda alpha: run_w_steps(
            self, problem, state, alpha, data, self.num_steps
        )
        # w_m(alpha). All runs use the same batches, whose noise cancels in differences.
        new_state, inner_grad = run(alpha)
        w = new_state.w
        outer_batch = sample_in_pass(data.outer_data, data.outer_key)
        value, b, direct = problem.outer_value_and_grads(w, alpha, outer_batch)

        def response(key):
            # <(w_m(alpha + sigma u) - w_m(alpha)) / sigma, b> u
            u = random_like(key, alpha)
            shifted_alpha = add_scale(alpha, self.sigma, u)
            shifted_state, _ = run(shifted_alpha)
            change = optax.tree.sub(shifted_state.w, w)
            shift = scale(self.sigma, u)
            is_shifted = is_resolved(shift, alpha, shifted_alpha, self.sigma)
            return scale(vdot(change, b) / self.sigma, u), is_shifted

        keys = jax.random.split(data.inner_key, self.num_directions)
        responses, is_shifted = jax.vmap(response)(keys)
        indirect = jax.tree.map(lambda x: jnp.mean(x, axis=0), responses)
        # dM/dalpha + mean_j <...> u_j
        direction = optax.tree.add(direct, indirect)
        # The sampled part is the indirect term; the error is relative to the direction.
        relative_error = standard_error(responses, indirect, is_multi_objective=False)
        relative_error *= norm_ratio(indirect, direction)
        relative_error = jnp.where(jnp.all(is_shifted), relative_error, jnp.nan)

        inner_fraction, outer_fraction = batch_fractions(data)
        counts = {
            "num_grads": inner_fraction * self.num_steps * (self.num_directions + 1),
            "num_outer_grads": outer_fraction,
        }
        step = Step(
            value,
            direction,
            w,
            inner_grad,
            counts,
            num_inner_steps=self.num_steps,
            standard_error=relative_error,
        )
        return step, new_state
