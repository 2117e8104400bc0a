"""Hypergradients from inner gradients alone: two solutions, no linear solve."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ..certificate import NO_GRADIENT_ADVICE
from ..cost import HVP_COST, cost_stats
from ..implicit_diff import zero_adjoint
from ..inner.base import InnerSolver, InnerStats
from ..method_summary import MethodSummary
from ..problem import Bilevel, EstimateData, fixed_batch_fraction
from ..problem_checks import check_alpha_has_gradient, check_problem
from ..trees import add_scale, all_finite
from ..validation import check_positive_int, float_converter
from .base import Estimate, make_stats
from .inner_run import inner_grad_norm, make_run_fn


class PenaltyState(eqx.Module):
    """Where the next solves begin: for ``L``, and for the nudged losses (K leads)."""

    w: PyTree
    nudged: PyTree
    opposite: PyTree | None


class Penalty(eqx.Module):
    """``dM/dalpha(w_l) + l [dL/dalpha(w_l) - dL/dalpha(w*)]``, no second derivatives.

    ``w_l`` minimises ``M + l (L - L*)``, the outer loss with the inner problem as a
    penalty of strength ``l``; equivalently ``L`` nudged by ``M / l``.

    Args:
      solver: the inner solver; it solves both problems.
      strength: ``l > 0``.
      symmetric: nudge by ``+M / l`` and ``-M / l`` (equilibrium propagation):
        ``[dL/dalpha(w_+) - dL/dalpha(w_-)] l / 2`` and the mean direct term.
      warm_start: begin each solve where the last ended.
      outer_batch_size: examples of the outer loss, drawn once an estimate; None means
        all.

    Cost: two inner solves, three if symmetric, the nudged ones with an outer gradient a
    step; three inner gradients more. Memory: three vectors like ``w`` and the solver's.

    Target: argmin. Bias: falls as ``1 / l``, as ``1 / l²`` if symmetric; what the
    solves leave is multiplied by ``l``. Never trusted of itself: use
    ``minimize(certify_every=...)``.

    Source: Shen & Chen 2023 (arXiv 2302.05185), V-PBGD; symmetric: Scellier & Bengio
    2017 (arXiv 1602.05179).

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - 3 * alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum(w**2)
    >>> estimator = hg.Penalty(hg.Newton(), strength=100.0, symmetric=True)
    >>> estimate = hg.hypergradient(hg.Bilevel(inner, outer), estimator)(0.0, 1.0)
    >>> round(float(estimate.hypergradient), 2)
    9.0
    """

    solver: InnerSolver
    strength: float | Array = eqx.field(
        converter=float_converter("strength", optional=False)
    )
    symmetric: bool = eqx.field(static=True, default=False, kw_only=True)
    warm_start: bool = eqx.field(static=True, default=True, kw_only=True)
    outer_batch_size: int | None = eqx.field(static=True, default=None, kw_only=True)

    target = "argmin"
    citations = ("shen2023", "scellier2017")
    summary = (
        MethodSummary(
            "Penalty(solver, l)",
            num_grads="2 * T + 3",
            num_hvps="0",
            memory="3 w",
            bias="1/l, or 1/l^2 if symmetric",
            alpha_in=("losses",),
            recommended_for="inner losses without second derivatives",
            not_recommended_for="inner solves that stop early",
            reason="two solutions are compared, and l multiplies what the solves leave",
        ),
    )

    def __check_init__(self):
        check_positive_int("outer_batch_size", self.outer_batch_size, optional=True)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """NaN: the bias depends on third derivatives too."""
        return float("nan")

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> PenaltyState:
        """Starts every solve from ``w``."""
        del key
        check_problem(problem, w, alpha, self.solver)
        check_alpha_has_gradient(problem, w, alpha, None, NO_GRADIENT_ADVICE)
        many = jax.tree.map(
            lambda zero, x: jnp.broadcast_to(x, zero.shape), zero_adjoint(problem, w), w
        )
        return PenaltyState(w, many, many if self.symmetric else None)

    def estimate(
        self, problem: Bilevel, state: PenaltyState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, PenaltyState]:
        """A solve of the inner loss, and one of it nudged."""
        data, loss = EstimateData.sample(problem, key), problem.inner_loss
        batch, outer_batch = data.inner_batch(), data.outer_batch(self.outer_batch_size)
        value, w, spent = make_run_fn(self.solver, problem, data, state.w, outer_batch)(
            alpha
        )
        slope = lambda w: jax.grad(loss, argnums=1)(w, alpha, batch)

        def at(start: PyTree, weights: Array, sign: float) -> tuple[Any, ...]:
            """``w_l``, ``dL/dalpha`` and ``dM/dalpha`` there, and the cost."""
            outer = lambda w, alpha: jnp.sum(
                weights * problem.outer_value(w, alpha, outer_batch)
            )
            nudged = lambda w, alpha, batch: (
                loss(w, alpha, batch) + sign / self.strength * outer(w, alpha)
            )
            begin = problem.init_inner(start, alpha)
            w, spent = self.solver.solve(
                nudged, begin, alpha, data.inner_data, data.solver_key
            )
            return w, slope(w), jax.grad(outer, argnums=1)(w, alpha), spent

        several = problem.num_objectives is not None
        each = lambda f: jax.vmap(f, in_axes=(0, 0, None)) if several else f
        weights = jnp.eye(value.size) if several else jnp.ones(())
        up, slope_up, direct, spent_up = each(at)(state.nudged, weights, 1.0)
        nudges = [spent_up]
        if self.symmetric:
            down, slope_down, other, spent_down = each(at)(
                state.opposite, weights, -1.0
            )
            direct = jax.tree.map(lambda x, y: (x + y) / 2, direct, other)
            nudges.append(spent_down)
            factor, num_slopes = self.strength / 2, 2 * value.size
        else:
            down, slope_down = None, slope(w)
            if several:  # one for all
                slope_down = jax.tree.map(lambda x: x[None], slope_down)
            factor, num_slopes = self.strength, value.size + 1
        difference = jax.tree.map(lambda x, y: factor * (x - y), slope_up, slope_down)
        hypergradient = add_scale(difference, 1, direct)

        stats = make_stats(
            jnp.asarray(False),
            inner_grad_norm=inner_grad_norm(problem, data, w, alpha),
            num_inner_steps=spent["num_steps"],
            **self._costs(data, spent, nudges, num_slopes + 1, value.size),
        )
        estimate = Estimate(value, hypergradient, w, stats)
        if self.warm_start and problem.init_fn is None:
            # A nudged loss need not have a minimum: what it spoilt is no start.
            good = all_finite(w, up, down)
            state = optax.tree.where(good, PenaltyState(w, up, down), state)
        return estimate, state

    def _costs(
        self,
        data: EstimateData,
        spent: InnerStats,
        nudges: list[InnerStats],
        num_grads: int,
        num_objectives: int,
    ) -> dict[str, Array]:
        """A step of a nudged solve calls the outer loss as often as the inner one."""
        total = lambda name: sum(jnp.sum(nudge[name]) for nudge in nudges)
        # Counts are passes over the data, and a mini-batch step is less than one.
        calls = sum(
            jnp.sum(jnp.maximum(nudge["num_grads"], nudge["num_steps"]))
            for nudge in nudges
        )
        part = fixed_batch_fraction(data.outer_data, self.outer_batch_size)
        direct = len(nudges) * num_objectives
        return cost_stats(
            data.inner_data,
            data.outer_data,
            num_grads=spent["num_grads"] + total("num_grads") + num_grads,
            num_hvps=spent["num_hvps"] + total("num_hvps"),
            num_values=spent["num_values"] + total("num_values"),
            num_outer_grads=part * (calls + HVP_COST * total("num_hvps") + direct),
            num_outer_values=part * (total("num_values") + num_objectives),
        )
