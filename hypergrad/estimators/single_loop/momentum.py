"""MRBO and SUSTAIN: momentum that corrects itself, in ``w`` and in ``alpha``."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ...method_summary import MethodSummary
from ...problem import Bilevel, EstimateData, sample_batch
from ...validation import (
    check_optimizer,
    check_positive_int,
    in_unit_interval,
    non_negative,
    or_schedule,
)
from ..base import Estimate
from .inner_loops import Series, total_direction
from .shared import move, report, start
from .variance_reduction import at_step, fractions, storm


class Seen(eqx.Module):
    """What a batch says of a place: value, ``dL/dw``, hypergradient, products made."""

    value: Array
    gradient: PyTree
    hypergradient: PyTree
    products: Array


def look(
    problem: Bilevel, series: Series, w: PyTree, alpha: PyTree, data: EstimateData
) -> Seen:
    """``dL/dw``, ``dM/dalpha - Jᵀ v`` with ``v`` by the series; a key, its batches."""
    batch_key, series_key = jax.random.split(data.inner_key)
    batch = sample_batch(data.inner_data, batch_key)
    outer_batch = sample_batch(data.outer_data, data.outer_key)
    gradient = jax.grad(problem.inner_loss)(w, alpha, batch)
    value, b, direct = problem.outer_value_and_grads(w, alpha, outer_batch)
    v, products = series(problem, w, alpha, b, data.inner_data, series_key)
    direction = total_direction(problem, w, v, alpha, direct, batch)
    return Seen(value, gradient, direction, products)


class MomentumState(eqx.Module):
    """Where it is, where it was, and the two directions there."""

    w: PyTree
    w_optimizer: PyTree
    last: tuple[PyTree, PyTree]
    directions: tuple[PyTree, PyTree]
    step: Array


def begin(
    name: str, estimator: Any, problem: Bilevel, w: PyTree, alpha: PyTree
) -> MomentumState:
    """From ``w``, or the start made of it, with no directions yet."""
    w = start(name, problem, w, alpha)
    zero = optax.tree.zeros_like((w, alpha))
    return MomentumState(
        w, estimator.optimizer.init(w), (w, alpha), zero, jnp.asarray(0)
    )


def advance(
    estimator: Any,
    series: Series,
    problem: Bilevel,
    state: MomentumState,
    alpha: PyTree,
    key: Array,
) -> tuple[Estimate, MomentumState]:
    """Both directions by STORM, the first one plain, and a step of ``w``."""
    data = EstimateData.sample(problem, key)
    new = look(problem, series, state.w, alpha, data)
    old = look(problem, series, *state.last, data)
    momentum = at_step(estimator.momentum, state.step)
    momentum = jnp.where(state.step == 0, 0.0, momentum)
    directions = storm(
        (new.gradient, new.hypergradient),
        (old.gradient, old.hypergradient),
        state.directions,
        momentum,
    )
    w, w_optimizer = move(
        estimator.optimizer, directions[0], state.w_optimizer, state.w
    )
    inner, outer = fractions(data)
    estimate = report(
        data, new.value, directions[1], state.w,
        gradient=directions[0],
        num_grads=2 * inner,
        num_hvps=2 * inner * (new.products + 1),
        num_outer_grads=2 * outer,
    )  # fmt: skip
    after = (state.w, alpha), directions, state.step + 1
    return estimate, MomentumState(w, w_optimizer, *after)


class MRBO(eqx.Module):
    """``d_t = D(t) + momentum (d_{t-1} - D(t-1))`` for ``w`` and for ``alpha``.

    ``D(t)`` and ``D(t-1)`` are ``dL/dw``, or ``dM/dalpha - Jᵀ v`` with ``v`` of a
    truncated series, on the same batches at this step's place and the last one's.

    Args:
      optimizer: optax transformation that moves ``w``.
      num_terms: K of the series, static.
      step_size: of the series, at most ``1 / lambda_max``; data.
      momentum: a number in [0, 1], or a schedule of the step; the paper's is
        ``1 - c (k + m)^(-2/3)``.

    Cost: two gradients, ``2 K`` Hessian-vector products (the cross term counts as one)
    and two outer gradients, on a batch each. Memory: five vectors like ``w``.

    Target: argmin. Bias: what ``w`` lags behind, and of the adjoint
    ``(1 - step_size lambda)^K``. Never trusted of itself: `minimize`'s
    ``certify_every`` judges.

    Raises:
      TypeError: from `hypergradient`: one step says nothing; use `minimize`.

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

    optimizer: optax.GradientTransformation = eqx.field(static=True)
    num_terms: int = eqx.field(static=True)
    step_size: Array | float = eqx.field(
        kw_only=True, converter=non_negative("step_size")
    )
    momentum: Array | float | Callable = eqx.field(
        default=0.9, kw_only=True, converter=or_schedule(in_unit_interval("momentum"))
    )

    target = "argmin"
    is_single_loop = True
    citations = ("yang2021", "cutkosky2019")
    summary = (
        MethodSummary(
            "MRBO(optimizer, K)",
            num_grads="2",
            num_hvps="2 * K",
            memory="5 w and the optimizer's",
            bias="what w lags behind, q^K",
            alpha_in=("losses",),
            recommended_for="noisy batches of data that has no end",
            not_recommended_for="tight budgets: everything is computed twice",
            reason="momentum whose lag is corrected on the same batch",
        ),
    )

    def __check_init__(self):
        check_optimizer("optimizer", self.optimizer)
        check_positive_int("num_terms", self.num_terms)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """``q^K``: what K terms leave of the adjoint."""
        series = Series(self.step_size, self.num_terms)
        return series.error_bound(eig_min, eig_max)

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> MomentumState:
        """From ``w``, or the start made of it."""
        del key
        return begin("MRBO", self, problem, w, alpha)

    def estimate(
        self, problem: Bilevel, state: MomentumState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, MomentumState]:
        """Both directions, and a step along the first."""
        series = Series(self.step_size, self.num_terms)
        return advance(self, series, problem, state, alpha, key)


class SUSTAIN(eqx.Module):
    """MRBO's steps, with a series of random length.

    ``v = K step_size prod_{i <= p} (I - step_size H_i) b`` with p drawn uniformly from
    0 to K - 1, the same p and batches at both places.

    Args:
      optimizer: optax transformation that moves ``w``.
      num_terms: K of the series, static.
      step_size: of the series, at most ``1 / lambda_max``; data.
      momentum: a number in [0, 1], or a schedule of the step; the paper's is
        ``1 - c (k + m)^(-2/3)``.

    Cost: two gradients, ``K + 1`` Hessian-vector products on average (the cross term
    counts as one) and two outer gradients, on a batch each. Memory: five vectors like
    ``w``.

    Target: argmin. Bias: what ``w`` lags behind, and of the adjoint
    ``(1 - step_size lambda)^K``; the random length adds noise. Never trusted of
    itself: `minimize`'s ``certify_every`` judges.

    Raises:
      TypeError: from `hypergradient`: one step says nothing; use `minimize`.

    Source: Khanduri et al. 2021 (arXiv 2102.07367).

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1.0) ** 2)
    >>> trace = hg.minimize(
    ...     hg.Bilevel(inner, outer), hg.SUSTAIN(optax.sgd(0.5), 5, step_size=0.5),
    ...     optax.sgd(0.05), 0.0, 3.0, num_steps=1000,
    ... )
    >>> abs(float(trace.alpha) - 1) < 0.05
    True
    """

    optimizer: optax.GradientTransformation = eqx.field(static=True)
    num_terms: int = eqx.field(static=True)
    step_size: Array | float = eqx.field(
        kw_only=True, converter=non_negative("step_size")
    )
    momentum: Array | float | Callable = eqx.field(
        default=0.9, kw_only=True, converter=or_schedule(in_unit_interval("momentum"))
    )

    target = "argmin"
    is_single_loop = True
    citations = ("khanduri2021", "cutkosky2019")
    summary = (
        MethodSummary(
            "SUSTAIN(optimizer, K)",
            num_grads="2",
            num_hvps="K + 1",
            memory="5 w and the optimizer's",
            bias="what w lags behind, q^K",
            alpha_in=("losses",),
            recommended_for="noisy batches, where MRBO's series is too dear",
            not_recommended_for="small noise: the random length adds its own",
            reason="MRBO with half the products",
        ),
    )

    def __check_init__(self):
        check_optimizer("optimizer", self.optimizer)
        check_positive_int("num_terms", self.num_terms)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """NaN: a single estimate is as noisy as its length is random."""
        return float("nan")

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> MomentumState:
        """From ``w``, or the start made of it."""
        del key
        return begin("SUSTAIN", self, problem, w, alpha)

    def estimate(
        self, problem: Bilevel, state: MomentumState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, MomentumState]:
        """Both directions, and a step along the first."""
        series = Series(self.step_size, self.num_terms, random=True)
        return advance(self, series, problem, state, alpha, key)
