"""VRBO, the variance-reduced bilevel optimizer (Yang, Ji & Liang 2021)."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ...batches import at_draw, without_sampling
from ...method_summary import MethodSummary
from ...number_checks import check_positive_int, positive
from ...problem import Bilevel, EstimateData
from .base import SingleLoop, SingleLoopState, Step, batch_fractions
from .inner_loops import StochasticNeumann, evaluate_directions
from .variance_reduction import storm_estimate


class VRBO(SingleLoop):
    """Makes ``num_steps`` recursive steps of ``w`` per outer step.

    After ``alpha`` has moved, each inner step updates the directions of ``w`` and of
    ``alpha`` on one batch by

        d <- d + D(w, alpha) - D(previous point)

    and moves ``w`` along the first. Every ``period`` outer steps, both directions are
    evaluated on all data after the inner steps. ``D`` is as in `MRBO`.

    The previous point is where the directions were last evaluated: before the last
    step of ``w``, unless a pass over all data followed it, and in the first inner step
    before the step of ``alpha``. The authors' code (github.com/JunjieYang97/MRVRBO)
    takes the first difference between the two ``alpha`` at the same ``w``, and so
    leaves out that step of ``w``.

    The ``w`` of a step is that after its last step of ``w``; the direction of ``alpha``
    and the ``value``, on one batch or on all data like the direction, are those before
    it. One more evaluation, after the last step, would give both at the last ``w``, at
    the cost of another inner step.

    Args:
      optimizer: Optax transformation for ``w``.
      num_steps: Number m of inner steps per outer step. The first outer step makes none
        (``stats["num_inner_steps"]`` is 0), because ``alpha`` moves first.
      num_terms: Number K of terms of the Neumann series for the adjoint.
      period: Number of outer steps from one pass over all data to the next.
      step_size: Step size of the series, at most ``1 / lambda_max``.

    Cost: ``2 m`` gradients, ``2 m K`` Hessian-vector products (the cross term counts as
      one) and ``2 m`` outer gradients on a batch each; 1, K and 1 on all data every
      ``period`` steps.
    Memory: five vectors like ``w``.
    Bias: the lag of ``w`` behind ``alpha``, and the part ``(1 - step_size lambda)^K``
      of the adjoint along each eigenvector of ``H``. Target: argmin.

    Raises:
      ValueError: The problem has keyed batches or a ``data_fn``, so that its examples
        change.

    Source: Yang, Ji & Liang 2021 (arXiv 2106.04692).

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1.0) ** 2)
    >>> estimator = hg.VRBO(optax.sgd(0.5), 3, 10, period=5, step_size=0.5)
    >>> trace = hg.minimize(
    ...     hg.Bilevel(inner, outer), estimator, optax.sgd(0.2), 0.0, 3.0, num_steps=100
    ... )
    >>> round(float(trace.alpha), 3)
    1.0
    """

    num_steps: int = eqx.field(static=True)
    num_terms: int = eqx.field(static=True)
    period: int = eqx.field(static=True, kw_only=True)
    step_size: Array | float = eqx.field(kw_only=True, converter=positive("step_size"))

    adds_differences = True
    fixed_data_reason = (
        "VRBO evaluates all examples every `period` steps. Pass arrays or hg.Batches "
        "without with_key, or use hg.MRBO."
    )
    citations = ("yang2021", "nguyen2017", "fang2018")
    summary = (
        MethodSummary(
            "VRBO(optimizer, m, K, period)",
            num_grads="2 * m",
            num_hvps="2 * m * K",
            memory="5 w and the optimizer's",
            bias="what w lags behind, q^K",
            alpha_in=("losses",),
            recommended_for="high accuracy on finite data",
            not_recommended_for="tight budgets: the most expensive step of the family",
            reason="recursive directions (SARAH), restarted by full passes",
        ),
    )

    def __check_init__(self):
        for name in ("num_steps", "num_terms", "period"):
            check_positive_int(name, getattr(self, name))

    @property
    def series(self) -> StochasticNeumann:
        """The series that approximates the adjoint."""
        return StochasticNeumann(self.step_size, self.num_terms)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """Returns ``q^K``, ``q = max |1 - step_size lambda|``."""
        return self.series.error_bound(eig_min, eig_max)

    def init_memory(
        self, problem: Bilevel, state: SingleLoopState, alpha: PyTree
    ) -> tuple[tuple[PyTree, PyTree], tuple[PyTree, PyTree]]:
        """Returns zero directions, which the first step replaces, and their point.

        They stand for the last estimates of both directions and for the ``(w, alpha)``
        at which they were made.
        """
        point = state.w, alpha
        return optax.tree.zeros_like(point), point

    def step(
        self,
        problem: Bilevel,
        state: SingleLoopState,
        alpha: PyTree,
        data: EstimateData,
    ) -> tuple[Step, SingleLoopState]:
        """Makes the inner steps, and every ``period`` steps a pass over all data."""
        has_alpha_moved = state.num_steps > 0
        is_full_pass = state.num_steps % self.period == 0
        skip = lambda state, value: (state, value)
        inner_steps = lambda state, _: self._run_recursion(problem, state, alpha, data)
        full_pass = lambda state, _: self._use_all_data(problem, state, alpha, data)
        # The first step has no value before its full pass.
        outer_value = lambda: problem.outer_value(state.w, alpha, data.outer_batch())
        value = optax.tree.zeros_like(jax.eval_shape(outer_value))
        # Without a step of alpha, the differences of the recursion would be zero.
        state, value = jax.lax.cond(has_alpha_moved, inner_steps, skip, state, value)
        state, value = jax.lax.cond(is_full_pass, full_pass, skip, state, value)

        (w_direction, direction), _ = state.memory
        inner_fraction, outer_fraction = batch_fractions(data)
        # Each inner step evaluates the directions at two points.
        num_evaluations = jnp.where(has_alpha_moved, 2.0 * self.num_steps, 0.0)
        num_inner_passes = num_evaluations * inner_fraction + is_full_pass
        counts = {
            "num_grads": num_inner_passes,
            # K - 1 products of the series and the cross term.
            "num_hvps": self.num_terms * num_inner_passes,
            "num_outer_grads": num_evaluations * outer_fraction + is_full_pass,
        }
        num_inner_steps = jnp.where(has_alpha_moved, self.num_steps, 0)
        step = Step(
            value,
            direction,
            state.w,
            w_direction,
            counts,
            num_inner_steps=num_inner_steps,
        )
        return step, state

    def _run_recursion(
        self,
        problem: Bilevel,
        state: SingleLoopState,
        alpha: PyTree,
        data: EstimateData,
    ) -> tuple[SingleLoopState, Array]:
        """Makes the inner steps along recursive estimates (SARAH).

        Returns:
          The state after the steps, and the outer value on the last batch.
        """

        def body_fun(state, key_and_index):
            key, k = key_and_index
            inner_key, outer_key = jax.random.split(key)
            batch_data = replace(
                data,
                inner_data=at_draw(data.inner_data, inner_key, k, self.num_steps),
                outer_data=at_draw(data.outer_data, outer_key, k, self.num_steps),
                inner_key=inner_key,
                outer_key=outer_key,
            )
            (previous, previous_point), point = state.memory, (state.w, alpha)
            # d <- d + D(w, alpha) - D(previous point), on the same batches
            (value, _), (new, old), _ = evaluate_directions(
                problem, self.series, (point, previous_point), batch_data
            )
            directions = storm_estimate(new, old, previous, 1.0)
            # w <- w - rho d
            state = self.move_w(state, directions[0])
            return replace(state, memory=(directions, point)), value

        keys = jax.random.split(data.solver_key, self.num_steps)
        indices = jnp.arange(self.num_steps)
        state, values = jax.lax.scan(body_fun, state, (keys, indices))
        return state, values[-1]

    def _use_all_data(
        self,
        problem: Bilevel,
        state: SingleLoopState,
        alpha: PyTree,
        data: EstimateData,
    ) -> tuple[SingleLoopState, Array]:
        """Replaces both directions by those on all data, and returns the value."""
        all_data = replace(
            data,
            inner_data=without_sampling(data.inner_data),
            outer_data=without_sampling(data.outer_data),
        )
        point = state.w, alpha
        (value,), (directions,), _ = evaluate_directions(
            problem, self.series, (point,), all_data
        )
        return replace(state, memory=(directions, point)), value
