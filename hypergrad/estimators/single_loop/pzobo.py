"""PZOBO: the response of ``w`` by random differences of a few inner steps."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ...method_summary import MethodSummary
from ...problem import Bilevel, EstimateData, sample_batch
from ...trees import add_scale, norm, random_like, scale, vdot
from ...validation import check_optimizer, check_positive_int, positive
from ..base import Estimate
from ..error_estimates import standard_error
from .inner_loops import descend
from .shared import report, start
from .stocbio import WState
from .variance_reduction import fractions


class PZOBO(eqx.Module):
    """``dM/dalpha + mean_j <(w_m(alpha + sigma u_j) - w_m(alpha)) / sigma, b> u_j``.

    ``w_m`` is ``num_steps`` from where ``w`` was, on the same batches for all
    ``alpha``; ``u_j`` are standard normal, ``b = dM/dw``.

    Args:
      optimizer: optax transformation that moves ``w``.
      num_steps: m, static.
      num_directions: n, of ``u``, static.
      sigma: of the shift of ``alpha``; data.

    Cost: ``(n + 1) m`` gradients and an outer one, on a batch each; no product. Memory:
    ``n + 1`` runs, side by side.

    Target: argmin, by the derivative of m steps. Bias: what steps before the last m
    would add, and ``O(sigma)``; noise of variance ``N / n``. Never trusted of itself:
    `minimize`'s ``certify_every`` judges; ``standard_error`` is that of
    the directions.

    Raises:
      TypeError: from `hypergradient`: one step says nothing; use `minimize`.

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

    optimizer: optax.GradientTransformation = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    num_directions: int = eqx.field(static=True)
    sigma: Array | float = eqx.field(
        default=0.01, kw_only=True, converter=positive("sigma")
    )

    target = "argmin"
    is_single_loop = True
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
        check_optimizer("optimizer", self.optimizer)
        check_positive_int("num_steps", self.num_steps)
        check_positive_int("num_directions", self.num_directions)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """NaN: a mean over random directions."""
        return float("nan")

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> WState:
        """From ``w``, or the start made of it."""
        del key
        w = start("PZOBO", problem, w, alpha)
        return WState(w, self.optimizer.init(w))

    def estimate(
        self, problem: Bilevel, state: WState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, WState]:
        """All runs, and the direction at the end of the middle one."""
        data = EstimateData.sample(problem, key)

        def run(alpha):
            return descend(
                problem, self.optimizer, state.w, state.w_optimizer, alpha,
                data.inner_data, data.solver_key, self.num_steps,
            )  # fmt: skip

        w, w_optimizer, gradient = run(alpha)
        outer_batch = sample_batch(data.outer_data, data.outer_key)
        value, b, direct = problem.outer_value_and_grads(w, alpha, outer_batch)

        def response(key):
            u = random_like(key, alpha)
            moved = run(add_scale(alpha, self.sigma, u))[0]
            slope = vdot(optax.tree.sub(moved, w), b) / self.sigma
            return scale(slope, u)

        keys = jax.random.split(data.inner_key, self.num_directions)
        responses = jax.vmap(response)(keys)
        indirect = jax.tree.map(lambda x: jnp.mean(x, axis=0), responses)
        direction = optax.tree.add(direct, indirect)
        scatter = standard_error(responses, indirect, is_multi_objective=False)
        scatter = scatter * norm(indirect) / norm(direction)
        inner, outer = fractions(data)
        estimate = report(
            data, value, direction, w,
            gradient=gradient, num_inner_steps=self.num_steps,
            num_grads=inner * self.num_steps * (self.num_directions + 1),
            num_outer_grads=outer,
            standard_error=scatter,
        )  # fmt: skip
        return estimate, WState(w, w_optimizer)
