"""Hypergradients from inner gradients alone: two solutions, no linear solve."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..certificate import UNSEEN
from ..checks import check_problem, check_seen
from ..cost import ledger
from ..inner.protocol import InnerSolver
from ..problem import Bilevel, fraction, held, size, whole
from ..settings import check_steps, number
from ..trees import add_scaled, all_finite, norm
from .procedure import drawn
from .protocol import Estimate, make_stats


class PenaltyState(eqx.Module):
    """Where the next solves begin: for ``L``, and for the nudged losses (K leads)."""

    w: PyTree
    nudged: PyTree
    opposite: PyTree


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
    step. Memory: ``w``, flat in the number of steps.

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
    strength: float | Array = eqx.field(converter=number("strength", optional=False))
    symmetric: bool = eqx.field(static=True, default=False, kw_only=True)
    warm_start: bool = eqx.field(static=True, default=True, kw_only=True)
    outer_batch_size: int | None = eqx.field(static=True, default=None, kw_only=True)

    target = "argmin"
    citations = ("shen2023", "scellier2017")

    def __check_init__(self):
        check_steps("outer_batch_size", self.outer_batch_size, optional=True)

    def error_factor(self, smallest: float, largest: float) -> float:
        """NaN: the bias depends on third derivatives too."""
        return float("nan")

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> PenaltyState:
        """Starts every solve from ``w``."""
        del key
        check_problem(problem, w, alpha, self.solver)
        check_seen(problem, w, alpha, None, UNSEEN)
        count = problem.num_objectives
        lead = () if count is None else (count,)
        many = jax.tree.map(lambda x: jnp.broadcast_to(x, lead + x.shape), w)
        return PenaltyState(w, many, many)

    def estimate(
        self, problem: Bilevel, state: PenaltyState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, PenaltyState]:
        """A solve of the inner loss, and one of it nudged."""
        data = drawn(problem, key)
        loss, inner_data = problem.inner_loss, data.inner_data
        batch = whole(inner_data, data.residual_key)
        outer_batch = held(data.outer_data, self.outer_batch_size, data.outer_key)
        begin = lambda w: problem.initial(w, alpha)
        w, spent = self.solver.solve(
            loss, begin(state.w), alpha, inner_data, data.solver_key
        )
        value = problem.outer(w, alpha, outer_batch)
        slope = lambda w: jax.grad(loss, argnums=1)(w, alpha, batch)

        def at(start: PyTree, weights: Array, sign: float) -> tuple[Any, ...]:
            """``w_l``, ``dL/dalpha`` and ``dM/dalpha`` there, and the cost."""
            outer = lambda w, alpha: jnp.sum(
                weights * problem.outer(w, alpha, outer_batch)
            )
            nudged = lambda w, alpha, batch: (
                loss(w, alpha, batch) + sign / self.strength * outer(w, alpha)
            )
            w, spent = self.solver.solve(
                nudged, begin(start), alpha, inner_data, data.solver_key
            )
            return w, slope(w), jax.grad(outer, argnums=1)(w, alpha), spent

        several = problem.num_objectives is not None
        each = lambda f: jax.vmap(f, in_axes=(0, 0, None)) if several else f
        weights = jnp.eye(value.size) if several else jnp.ones(())
        up, slope_up, direct, spent_up = each(at)(state.nudged, weights, 1.0)
        if self.symmetric:
            down, slope_down, other, spent_down = each(at)(
                state.opposite, weights, -1.0
            )
            direct = jax.tree.map(lambda x, y: (x + y) / 2, direct, other)
            solves, factor = (spent, spent_up, spent_down), self.strength / 2
        else:
            down, slope_down = state.opposite, slope(w)
            solves, factor = (spent, spent_up), self.strength
        difference = jax.tree.map(lambda x, y: factor * (x - y), slope_up, slope_down)
        hypergradient = add_scaled(difference, 1, direct)

        count = lambda name: sum(jnp.sum(spent[name]) for spent in solves)
        nudges = sum(jnp.sum(spent["num_grads"]) for spent in solves[1:])
        outer_part = fraction(
            data.outer_data, self.outer_batch_size or size(data.outer_data)
        )
        costs = ledger(
            inner_data,
            data.outer_data,
            num_grads=count("num_grads") + len(solves) * value.size,
            num_hvps=count("num_hvps"),
            num_values=count("num_values"),
            num_outer_grads=outer_part * (nudges + len(solves[1:]) * value.size),
            num_outer_values=outer_part * value.size,
        )
        stats = make_stats(
            jnp.asarray(False),
            inner_residual=norm(jax.grad(loss)(w, alpha, batch)),
            inner_steps=spent["num_steps"],
            **costs,
        )
        estimate = Estimate(value, hypergradient, w, stats)
        good = all_finite(w, up, down)
        if self.warm_start and problem.start is None:
            keep = lambda new, old: jax.tree.map(
                lambda n, o: jnp.where(good, n, o), new, old
            )
            state = keep(PenaltyState(w, up, down), state)
        return estimate, state
