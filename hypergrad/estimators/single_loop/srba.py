"""SRBA: SOBA along recursive estimates, begun anew by full passes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ...method_summary import MethodSummary
from ...problem import Bilevel, EstimateData
from ...validation import check_optimizer, check_positive_int
from ..base import Estimate
from .joint import JointState, advance, begin, optimizers, point
from .shared import check_lasting
from .variance_reduction import Recursion, fractions, plain, spider


class SRBA(eqx.Module):
    """SOBA's three steps along SARAH estimates: ``d_t = d_{t-1} + D(t) - D(t-1)``.

    Both directions of a step see the same batch; every ``period`` steps the directions
    are those of all data.

    Args:
      optimizer: optax transformation that moves ``w``; ``optax.sgd(rho)``, constant.
      period: q, steps from one full pass to the next, static.
      adjoint_optimizer: that moves ``v``; None means the same kind as ``optimizer``.

    Cost: two Hessian-vector products and two outer gradients, on a batch each; on all
    data, one each, every ``period`` steps. Memory: twice SOBA's, and the directions.

    Target: argmin. Bias: what ``w`` and ``v`` lag behind ``alpha``; between full passes
    the directions are unbiased only given the last one's error. Never trusted of
    itself: `minimize`'s ``certify_every`` judges.

    Raises:
      TypeError: from `hypergradient`: one step says nothing; use `minimize`.
      ValueError: keyed batches or ``draw``, whose examples are other ones each time.

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

    optimizer: optax.GradientTransformation = eqx.field(static=True)
    period: int = eqx.field(static=True)
    adjoint_optimizer: optax.GradientTransformation | None = eqx.field(
        static=True, default=None
    )

    target = "argmin"
    is_single_loop = True
    citations = ("dagreou2024", "nguyen2017", "fang2018")
    summary = (
        MethodSummary(
            "SRBA(optimizer, period)",
            num_grads="0",
            num_hvps="2",
            memory="4 w and the optimizers'",
            bias="what w and v lag behind",
            alpha_in=("losses",),
            recommended_for="finite data, where SABA's table is too large",
            not_recommended_for="data of which a full pass is not affordable",
            reason="its noise stays as small as its steps",
        ),
    )

    def __check_init__(self):
        check_optimizer("optimizer", self.optimizer)
        check_optimizer("adjoint_optimizer", self.adjoint_optimizer, optional=True)
        check_positive_int("period", self.period)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """0: exact where a run at one ``alpha`` settles."""
        return 0.0

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> JointState:
        """From ``w``, or the start made of it, and a zero adjoint."""
        del key
        why = "sees all data every period steps"
        check_lasting("SRBA", why, "hg.SOBA", problem)
        state = begin("SRBA", optimizers(self), problem, w, alpha)
        at = point(state, alpha)
        parts = jax.eval_shape(
            lambda key: plain(problem, at, EstimateData.sample(problem, key)),
            jax.random.key(0),
        )
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), parts)
        memory = Recursion(blank, at, jnp.asarray(0))
        return eqx.tree_at(
            lambda s: s.memory, state, memory, is_leaf=lambda x: x is None
        )

    def estimate(
        self, problem: Bilevel, state: JointState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, JointState]:
        """The three directions, and a step along the first two."""
        data, at = EstimateData.sample(problem, key), point(state, alpha)
        parts, memory, full = spider(problem, at, state.memory, data, self.period)
        inner, outer = fractions(data)
        return advance(
            optimizers(self),
            state,
            memory,
            data,
            parts,
            num_hvps=jnp.where(full, 1.0, 2 * inner),
            num_outer_grads=jnp.where(full, 1.0, 2 * outer),
        )
