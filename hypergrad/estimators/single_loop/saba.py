"""SABA: SOBA with SAGA's memory, so that its noise vanishes."""

import equinox as eqx
import jax
import optax
from jaxtyping import Array, PyTree

from ...method_summary import MethodSummary
from ...problem import Bilevel, EstimateData
from ...validation import check_optimizer
from ..base import Estimate
from .directions import inner, outer
from .joint import JointState, advance, begin, optimizers, point
from .shared import check_lasting
from .variance_reduction import empty, fractions, saga


class SABA(eqx.Module):
    """SOBA's three steps along SAGA estimates of its directions.

    Of every example the parts last seen of ``dL/dw``, ``H v``, ``Jᵀ v`` and of
    ``dM/dw``, ``dM/dalpha`` are kept: ``mean_k (new_k - old_k) + mean of all old``,
    unbiased, and without noise where the run settles, so that rates stay constant.

    Args:
      optimizer: optax transformation that moves ``w``; ``optax.sgd(rho)``, constant.
      adjoint_optimizer: that moves ``v``; None means the same kind as ``optimizer``.

    The loss of a batch must be the mean of the losses of its examples, penalties
    included in each. Plain data, and `Batches` of all, are one example.

    The tables begin empty, without a pass over the data: what was last seen of an
    example is zero until it is first drawn, so that the first step is SOBA's.

    Cost: SOBA's. Memory: beside SOBA's, ``n_inner`` times two vectors like ``w`` and
    one like ``alpha``, ``n_outer`` times one of each.

    Target: argmin. Bias: what ``w`` and ``v`` lag behind ``alpha``. Never trusted of
    itself: `minimize`'s ``certify_every`` judges.

    Raises:
      TypeError: from `hypergradient`: one step says nothing; use `minimize`.
      ValueError: keyed batches or ``draw``, whose examples are other ones each time.

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

    optimizer: optax.GradientTransformation = eqx.field(static=True)
    adjoint_optimizer: optax.GradientTransformation | None = eqx.field(
        static=True, default=None
    )

    target = "argmin"
    is_single_loop = True
    citations = ("dagreou2022", "defazio2014")
    summary = (
        MethodSummary(
            "SABA(optimizer)",
            num_grads="0",
            num_hvps="1",
            memory="2 w, 2 n w + n N numbers",
            bias="what w and v lag behind",
            alpha_in=("losses",),
            recommended_for="finite data and small models, where SOBA's noise is the limit",
            not_recommended_for="networks: the table holds a gradient of every example",
            reason="its noise vanishes, so that rates need not fall",
        ),
    )

    def __check_init__(self):
        check_optimizer("optimizer", self.optimizer)
        check_optimizer("adjoint_optimizer", self.adjoint_optimizer, optional=True)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """0: exact where a run at one ``alpha`` settles."""
        return 0.0

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> JointState:
        """From ``w``, or the start made of it, a zero adjoint and empty tables."""
        del key
        why = "keeps what it saw of every example"
        check_lasting("SABA", why, "hg.SOBA", problem)
        state = begin("SABA", optimizers(self), problem, w, alpha)
        at = point(state, alpha)
        parts = jax.eval_shape(
            lambda key: (
                inner(
                    problem.inner_loss,
                    at,
                    EstimateData.sample(problem, key).inner_batch(),
                ),
                outer(problem, at, EstimateData.sample(problem, key).outer_batch()),
            ),
            jax.random.key(0),
        )
        data = problem.inner_data, problem.outer_data
        tables = tuple(map(empty, parts, data))
        return eqx.tree_at(
            lambda s: s.memory, state, tables, is_leaf=lambda x: x is None
        )

    def estimate(
        self, problem: Bilevel, state: JointState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, JointState]:
        """The three directions by both tables, and a step along the first two."""
        data, at = EstimateData.sample(problem, key), point(state, alpha)
        of_inner, of_outer = state.memory
        look = lambda batch: inner(problem.inner_loss, at, batch)
        inner_parts, of_inner = saga(look, of_inner, data.inner_data, data.inner_key)
        look = lambda batch: outer(problem, at, batch)
        outer_parts, of_outer = saga(look, of_outer, data.outer_data, data.outer_key)
        fraction, outer_fraction = fractions(data)
        return advance(
            optimizers(self),
            state,
            (of_inner, of_outer),
            data,
            (inner_parts, outer_parts),
            num_hvps=fraction,
            num_outer_grads=outer_fraction,
        )
