"""MRBO, the momentum-based recursive bilevel optimizer (Yang, Ji & Liang 2021)."""

import abc
from collections.abc import Callable
from dataclasses import replace

import equinox as eqx
import optax
from jaxtyping import Array, PyTree

from ...method_summary import MethodSummary
from ...number_checks import below_one, check_positive_int, or_schedule, positive
from ...problem import Bilevel, EstimateData
from .base import SingleLoop, SingleLoopState, Step, batch_fractions
from .inner_loops import StochasticNeumann, evaluate_directions
from .variance_reduction import storm_estimate, storm_momentum


class StormMethod(SingleLoop):
    """Base class of methods with estimates by STORM of the directions of both loops.

    `MRBO` says what a step does. A subclass chooses the Neumann series of the adjoint.
    """

    num_terms: int = eqx.field(static=True)
    step_size: Array | float = eqx.field(kw_only=True, converter=positive("step_size"))
    momentum: Array | float | Callable = eqx.field(
        default=0.9, kw_only=True, converter=or_schedule(below_one("momentum"))
    )

    def __check_init__(self):
        check_positive_int("num_terms", self.num_terms)

    @property
    @abc.abstractmethod
    def series(self) -> StochasticNeumann:
        """The series that approximates the adjoint."""

    def init_memory(
        self, problem: Bilevel, state: SingleLoopState, alpha: PyTree
    ) -> tuple[tuple[PyTree, PyTree], tuple[PyTree, PyTree]]:
        """Returns zero directions, which the first step does not use, and their point.

        They stand for the previous estimates of both directions and for the
        ``(w, alpha)`` at which they were made.
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
        """Estimates both directions by STORM and moves ``w`` along the first."""
        (previous, previous_point), point = state.memory, (state.w, alpha)
        # D(t) and D(t-1) on the same batches, so that their noise cancels
        (value, _), (new, old), num_products = evaluate_directions(
            problem, self.series, (point, previous_point), data
        )
        # d_t = D(t) + momentum (d_{t-1} - D(t-1))
        momentum = storm_momentum(self.momentum, state.num_steps)
        directions = storm_estimate(new, old, previous, momentum)
        w_direction, direction = directions
        inner_fraction, outer_fraction = batch_fractions(data)
        counts = {
            "num_grads": 2 * inner_fraction,
            # One product more per point, for the cross term J' v.
            "num_hvps": 2 * inner_fraction * (num_products + 1),
            "num_outer_grads": 2 * outer_fraction,
        }
        step = Step(value, direction, state.w, w_direction, counts)
        # w <- w - rho d_t
        new_state = self.move_w(state, w_direction)
        return step, replace(new_state, memory=(directions, point))


class MRBO(StormMethod):
    """Moves ``w`` and ``alpha`` along directions with corrected momentum (STORM).

    For ``w`` and for ``alpha``,

        d_t = D(t) + momentum (d_{t-1} - D(t-1)),

    where ``D(t)`` and ``D(t-1)`` are evaluated on the same batches at the current and
    at the previous ``(w, alpha)``. ``D`` is ``dL/dw`` for ``w``, and
    ``dM/dalpha - J' v`` for ``alpha``, with ``v`` of a truncated Neumann series.

    Args:
      optimizer: Optax transformation for ``w``.
      num_terms: Number K of terms of the series.
      step_size: Step size of the series, at most ``1 / lambda_max``.
      momentum: A number in [0, 1), or a schedule of the outer step with such values.
        With 1 the error of the initial batch would remain. The paper uses
        ``1 - c (k + m)^(-2/3)``. Defaults to 0.9.

    Cost: two gradients, ``2 K`` Hessian-vector products (the cross term counts as one)
      and two outer gradients; each on one batch.
    Memory: five vectors like ``w``.
    Bias: the lag of ``w`` behind ``alpha``, and the part ``(1 - step_size lambda)^K``
      of the adjoint along each eigenvector of ``H``. Target: argmin.

    Source: Yang, Ji & Liang 2021 (arXiv 2106.04692).

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1.0) ** 2)
    >>> trace = hg.minimize(
    ...     hg.Bilevel(inner, outer), hg.MRBO(optax.sgd(0.5), 10, step_size=0.5),
    ...     optax.sgd(0.2), 0.0, 3.0, num_steps=100,
    ... )
    >>> round(float(trace.alpha), 3)
    1.0
    """

    citations = ("yang2021", "cutkosky2019")
    summary = (
        MethodSummary(
            "MRBO(optimizer, K)",
            num_grads="2",
            num_hvps="2 * K",
            memory="5 w and the optimizer's",
            bias="what w lags behind, q^K",
            alpha_in=("losses",),
            recommended_for="noisy batches of an unlimited stream of data",
            not_recommended_for="tight budgets: everything is computed twice",
            reason="momentum whose lag is corrected on the same batch",
        ),
    )

    @property
    def series(self) -> StochasticNeumann:
        """The series that approximates the adjoint."""
        return StochasticNeumann(self.step_size, self.num_terms)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """Returns ``q^K``, ``q = max |1 - step_size lambda|``."""
        return self.series.error_bound(eig_min, eig_max)
