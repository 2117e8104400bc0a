"""VRBO: several recursive steps of ``w`` for each of ``alpha``."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ...method_summary import MethodSummary
from ...problem import Bilevel, EstimateData, without_sampling
from ...validation import check_optimizer, check_positive_int, non_negative
from ..base import Estimate
from .inner_loops import Series
from .momentum import look
from .shared import check_lasting, move, report, start
from .variance_reduction import fractions, storm


class VRBOState(eqx.Module):
    """Where it is, where the last directions were taken, and these."""

    w: PyTree
    w_optimizer: PyTree
    last: tuple[PyTree, PyTree]
    directions: tuple[PyTree, PyTree]
    step: Array


class VRBO(eqx.Module):
    """``num_steps`` of ``w`` along SARAH estimates, which also move ``alpha``'s.

    After ``alpha`` has moved, each inner step adds ``D(here) - D(there)`` on one batch
    to both directions and moves ``w`` by the first. Every ``period`` steps of ``alpha``
    the directions are those of all data, where the inner steps end.

    ``there`` is where the directions were last taken: before the last move of ``w``,
    unless a full pass came after it, and, in the first inner step, before that of
    ``alpha``. The authors' code (github.com/JunjieYang97/MRVRBO) takes the first
    difference between the two ``alpha`` at one ``w``, and so leaves that move of ``w``
    out.

    Args:
      optimizer: optax transformation that moves ``w``.
      num_steps: m, inner steps of an outer one, static. The first outer step makes
        none (``stats["num_inner_steps"]`` is 0): there ``alpha`` moves first.
      num_terms: K of the series, static.
      period: q, steps from one full pass to the next, static.
      step_size: of the series, at most ``1 / lambda_max``; data.

    Cost: ``2 m`` gradients, ``2 m K`` Hessian-vector products (the cross term counts as
    one) and ``2 m`` outer gradients, on a batch each; 1, K and 1 of all data every
    ``period`` steps; an outer value of all data. Memory: five vectors like ``w``.

    Target: argmin. Bias: what ``w`` lags behind, and of the adjoint
    ``(1 - step_size lambda)^K``. Never trusted of itself: `minimize`'s
    ``certify_every`` judges.

    Raises:
      TypeError: from `hypergradient`: one step says nothing; use `minimize`.
      ValueError: keyed batches or ``draw``, whose examples are other ones each time.

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

    optimizer: optax.GradientTransformation = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    num_terms: int = eqx.field(static=True)
    period: int = eqx.field(static=True, kw_only=True)
    step_size: Array | float = eqx.field(
        kw_only=True, converter=non_negative("step_size")
    )

    target = "argmin"
    is_single_loop = True
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
            not_recommended_for="tight budgets: the dearest step of its family",
            reason="SARAH's recursion in w and alpha, begun anew by full passes",
        ),
    )

    def __check_init__(self):
        check_optimizer("optimizer", self.optimizer)
        for name in ("num_steps", "num_terms", "period"):
            check_positive_int(name, getattr(self, name))

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """``q^K``: what K terms leave of the adjoint."""
        series = Series(self.step_size, self.num_terms)
        return series.error_bound(eig_min, eig_max)

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> VRBOState:
        """From ``w``, or the start made of it, with no directions yet."""
        del key
        why = "sees all data every period steps"
        check_lasting("VRBO", why, "hg.MRBO", problem)
        w = start("VRBO", problem, w, alpha)
        zero = optax.tree.zeros_like((w, alpha))
        return VRBOState(w, self.optimizer.init(w), (w, alpha), zero, jnp.asarray(0))

    def estimate(
        self, problem: Bilevel, state: VRBOState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, VRBOState]:
        """Inner steps at ``alpha``, but for the first time, and the last direction."""
        data = EstimateData.sample(problem, key)
        series = Series(self.step_size, self.num_terms)

        def full(state: VRBOState) -> VRBOState:
            every = EstimateData(
                without_sampling(data.inner_data), without_sampling(data.outer_data),
                data.solver_key, data.inner_key, data.outer_key,
            )  # fmt: skip
            seen = look(problem, series, state.w, alpha, every)
            directions = seen.gradient, seen.hypergradient
            return eqx.tree_at(
                lambda s: (s.directions, s.last),
                state,
                (directions, (state.w, alpha)),
            )

        def num_inner_steps(state: VRBOState) -> VRBOState:
            def step(state, key):
                inner_key, outer_key = jax.random.split(key)
                keys = lambda d: (d.inner_key, d.outer_key)
                here = eqx.tree_at(keys, data, (inner_key, outer_key))
                new = look(problem, series, state.w, alpha, here)
                w_last, alpha_last = state.last
                old = look(problem, series, w_last, alpha_last, here)
                directions = storm(
                    (new.gradient, new.hypergradient),
                    (old.gradient, old.hypergradient),
                    state.directions,
                    1.0,
                )
                w, w_optimizer = move(
                    self.optimizer, directions[0], state.w_optimizer, state.w
                )
                at = state.w, alpha
                return VRBOState(w, w_optimizer, at, directions, state.step), None

            keys = jax.random.split(data.solver_key, self.num_steps)
            return jax.lax.scan(step, state, keys)[0]

        begun, due = state.step > 0, state.step % self.period == 0
        state = jax.lax.cond(begun, num_inner_steps, lambda state: state, state)
        state = jax.lax.cond(due, full, lambda state: state, state)
        value = problem.outer_value(state.w, alpha, data.outer_batch())
        inner, outer = fractions(data)
        many = jnp.where(begun, 2.0 * self.num_steps, 0.0)
        estimate = report(
            data, value, state.directions[1], state.w,
            gradient=state.directions[0],
            num_inner_steps=jnp.where(begun, self.num_steps, 0),
            num_grads=many * inner + due,
            num_hvps=self.num_terms * (many * inner + due),
            num_outer_grads=many * outer + due,
            num_outer_values=1.0,
        )  # fmt: skip
        return estimate, eqx.tree_at(lambda s: s.step, state, state.step + 1)
