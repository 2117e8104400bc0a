"""SRBA, which is SOBA with the variance reduction of SPIDER (Dagréou et al. 2024)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from ...batches import full_batch
from ...method_summary import MethodSummary
from ...number_checks import check_positive_int
from ...problem import Bilevel, EstimateData
from ...runtime.all_cores import on_all_cores
from ...runtime.equal_optimizers import first_equal
from .base import SingleLoop, SingleLoopState, Step, batch_fractions, sample_batches
from .soba import soba_step
from .variance_reduction import Parts, Point, value_and_parts, zero_parts


class SRBA(SingleLoop):
    """Makes the steps of `SOBA` along recursive estimates of its three directions.

    The estimates are ``d_t = d_{t-1} + D(t) - D(t-1)``, where the directions ``D`` of
    the current and of the previous point are evaluated on the same batch. Every
    ``period`` steps, ``d_t`` is the direction on all data. The ``value`` of a step is
    that of its batch, or of all data.

    Args:
      optimizer: Optax transformation for ``w``, such as ``optax.sgd(rho)`` with a
        constant ``rho``.
      period: Number of steps from one pass over all data to the next.
      adjoint_optimizer: Optax transformation for ``v``. Defaults to ``optimizer``.

    Cost: two Hessian-vector products and two outer gradients on a batch each; every
      ``period`` steps, one of each on all data instead.
    Memory: twice that of SOBA, and the directions.
    Bias: the lag of ``w`` and ``v`` behind ``alpha``. Between passes over all data, an
      estimate also carries the error of the previous one. Target: argmin.

    Raises:
      ValueError: The problem has keyed batches or a ``data_fn``, so that its examples
        change.

    Source: Dagréou, Moreau, Vaiter & Ablin 2024 (arXiv 2302.08766).

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1.0) ** 2)
    >>> trace = hg.minimize(
    ...     hg.Bilevel(inner, outer), hg.SRBA(optax.sgd(0.5), period=10),
    ...     optax.sgd(0.2), 0.0, 3.0, num_steps=100,
    ... )
    >>> round(float(trace.alpha), 3)
    1.0
    """

    period: int = eqx.field(static=True)
    adjoint_optimizer: optax.GradientTransformation | None = eqx.field(
        static=True, default=None, converter=first_equal
    )

    uses_adjoint = True
    adds_differences = True
    fixed_data_reason = (
        "SRBA evaluates all examples every `period` steps. Pass arrays or hg.Batches "
        "without with_key, or use hg.SOBA."
    )
    citations = ("dagreou2024", "nguyen2017", "fang2018")
    summary = (
        MethodSummary(
            "SRBA(optimizer, period)",
            num_grads="0",
            num_hvps="2",
            memory="4 w and the optimizers'",
            bias="what w and v lag behind",
            alpha_in=("losses",),
            recommended_for="finite data, if the tables of SABA are too large",
            not_recommended_for="data for which a full pass is too expensive",
            reason="the noise is as small as the steps",
        ),
    )

    def __check_init__(self):
        check_positive_int("period", self.period)

    def init_memory(
        self, problem: Bilevel, state: SingleLoopState, alpha: PyTree
    ) -> tuple[Parts, Point]:
        """Returns zeros, which the first step replaces by a pass over all data.

        They stand for the previous estimate, and the point for where it was made.
        """
        return zero_parts(state.w, alpha), Point(state.w, state.v, alpha)

    def step(
        self,
        problem: Bilevel,
        state: SingleLoopState,
        alpha: PyTree,
        data: EstimateData,
    ) -> tuple[Step, SingleLoopState]:
        """Makes a step of SOBA along recursive estimates (SPIDER)."""
        previous, previous_point = state.memory
        point = Point(state.w, state.v, alpha)

        def full_pass():
            batch = full_batch(data.inner_data, data.inner_key)
            return value_and_parts(problem, point, (batch, data.outer_batch()))

        def recursion():
            batches = sample_batches(data)
            # Not in the rare full pass: its size says nothing of a usual step.
            points = on_all_cores((point, previous_point), batches)
            evaluate = lambda p: value_and_parts(problem, p, batches)
            (value, new), (_, old) = map(evaluate, points)
            # d_t = d_{t-1} + D(t) - D(t-1)
            return value, jax.tree.map(lambda d, x, y: d + x - y, previous, new, old)

        is_full_pass = state.num_steps % self.period == 0
        value, parts = jax.lax.cond(is_full_pass, full_pass, recursion)
        inner, outer = parts
        inner_fraction, outer_fraction = batch_fractions(data)
        # A recursive estimate evaluates two points.
        counts = {
            "num_hvps": jnp.where(is_full_pass, 1.0, 2 * inner_fraction),
            "num_outer_grads": jnp.where(is_full_pass, 1.0, 2 * outer_fraction),
        }
        return soba_step(self, state, value, inner, outer, counts, (parts, point))
