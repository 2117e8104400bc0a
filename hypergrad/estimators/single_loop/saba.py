"""SABA, which is SOBA with the variance reduction of SAGA (Dagréou et al. 2022)."""

import equinox as eqx
import optax
from jaxtyping import PyTree

from ...method_summary import MethodSummary
from ...problem import Bilevel, EstimateData
from ...runtime.all_cores import on_all_cores
from ...runtime.equal_optimizers import first_equal
from .base import SingleLoop, SingleLoopState, Step, batch_fractions
from .soba import soba_step
from .variance_reduction import (
    Point,
    SagaTable,
    empty_table,
    inner_parts,
    outer_value_and_parts,
    saga_estimate,
    zero_parts,
)


class SABA(SingleLoop):
    """Makes the steps of `SOBA` along SAGA estimates of its three directions.

    The method stores the latest ``dL/dw``, ``H v``, ``J' v`` of each inner example and
    the latest ``dM/dw``, ``dM/dalpha`` of each outer example. The mean over a batch is
    replaced by ``mean_k (new_k - old_k) + mean of all old``, which is unbiased and
    whose noise vanishes as the run converges. Rates can therefore stay constant. The
    ``value`` of a step is that of its batch.

    The tables start empty, without a pass over the data: the stored derivatives of an
    example are zero until the example is first sampled, so that the first step is that
    of SOBA.

    Args:
      optimizer: Optax transformation for ``w``, such as ``optax.sgd(rho)`` with a
        constant ``rho``.
      adjoint_optimizer: Optax transformation for ``v``. Defaults to ``optimizer``.

    The loss of a batch must be the mean of the losses of its examples, each of which
    includes the penalties. Data that is used whole counts as one example.

    Cost: that of SOBA.
    Memory: in addition to SOBA, ``n_inner`` times two vectors like ``w`` and one like
      ``alpha``, and ``n_outer`` times one of each. With batches of ``order="blocks"`` a
      row stands for a block of ``batch_size`` examples, which divides the memory by
      that number and evaluates derivatives once per batch instead of once per example.
    Bias: the lag of ``w`` and ``v`` behind ``alpha``. With blocks and a batch size that
      does not divide the number of examples, the last block overlaps the one before it,
      and the run converges for data in which the examples of both count twice. Target:
      argmin.

    Raises:
      ValueError: The problem has keyed batches or a ``data_fn``, so that its examples
        change.

    Source: Dagréou, Ablin, Vaiter & Moreau 2022 (arXiv 2201.13409).

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, x: 0.5 * jnp.mean((w - alpha - x) ** 2)
    >>> outer = lambda w, alpha, x: 0.5 * jnp.mean((w - x) ** 2)
    >>> problem = hg.Bilevel(
    ...     inner, outer, hg.Batches(jnp.arange(4.0), 1), hg.Batches(jnp.ones(4), 1)
    ... )
    >>> trace = hg.minimize(
    ...     problem, hg.SABA(optax.sgd(0.2)), optax.sgd(0.1), 0.0, 3.0, num_steps=1000
    ... )
    >>> round(float(trace.alpha), 3), round(float(trace.w), 3)
    (-0.5, 1.0)
    """

    adjoint_optimizer: optax.GradientTransformation | None = eqx.field(
        static=True, default=None, converter=first_equal
    )

    uses_adjoint = True
    fixed_data_reason = (
        "SABA stores the derivatives of every example. Pass arrays or hg.Batches "
        "without with_key, or use hg.SOBA."
    )
    citations = ("dagreou2022", "defazio2014")
    summary = (
        MethodSummary(
            "SABA(optimizer)",
            num_grads="0",
            num_hvps="1",
            memory="2 w, 2 n w + n N numbers",
            bias="what w and v lag behind",
            alpha_in=("losses",),
            recommended_for="finite data and small models, if SOBA is too noisy",
            not_recommended_for="networks: the tables hold a gradient of every example",
            reason="the noise vanishes, so the rates can stay constant",
        ),
    )

    def init_memory(
        self, problem: Bilevel, state: SingleLoopState, alpha: PyTree
    ) -> tuple[SagaTable, SagaTable]:
        """Returns an empty table for each loss."""
        inner, outer = zero_parts(state.w, alpha)
        inner_table = empty_table(inner, problem.inner_data)
        return inner_table, empty_table(outer, problem.outer_data)

    def step(
        self,
        problem: Bilevel,
        state: SingleLoopState,
        alpha: PyTree,
        data: EstimateData,
    ) -> tuple[Step, SingleLoopState]:
        """Makes a step of SOBA, with the derivatives estimated by both tables."""
        point = Point(state.w, state.v, alpha)
        inner_table, outer_table = state.memory
        # dL/dw, H v and J' v
        parts = lambda batch: inner_parts(
            problem.inner_loss, on_all_cores(point, batch), batch
        )
        inner_fn = lambda batch: (None, parts(batch))
        _, inner, inner_table = saga_estimate(
            inner_fn, inner_table, data.inner_data, data.inner_key
        )
        # dM/dw and dM/dalpha
        outer_fn = lambda batch: outer_value_and_parts(problem, point, batch)
        value, outer, outer_table = saga_estimate(
            outer_fn, outer_table, data.outer_data, data.outer_key
        )
        inner_fraction, outer_fraction = batch_fractions(data)
        counts = {"num_hvps": inner_fraction, "num_outer_grads": outer_fraction}
        tables = inner_table, outer_table
        return soba_step(self, state, value, inner, outer, counts, tables)
