"""Hypergradients from first derivatives only, by two inner solutions."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ..batches import fixed_batch_fraction
from ..certificate import NO_GRADIENT_ADVICE
from ..checks.lost_derivatives import lost_derivative_flags
from ..checks.problem import check_alpha_has_gradient, check_problem
from ..cost import HVP_COST, cost_stats
from ..implicit.differentiation import zero_adjoint
from ..inner.base import InnerSolver, InnerStats
from ..method_summary import MethodSummary
from ..number_checks import boolean, check_positive_int, positive
from ..problem import Bilevel, EstimateData
from ..products import Loss
from ..trees import add_scale, all_finite, scale
from .base import Estimate, make_estimate
from .inner_run import inner_grad_norm, make_run_fn


class PenaltyState(eqx.Module):
    """Warm-start state of `Penalty`.

    Attributes:
      w: Inner solution of the previous estimate.
      plus_w: Solution with ``+M / l``; with K outer losses each leaf has a leading axis
        of size K.
      minus_w: The same with ``-M / l`` if ``symmetric``, else None.
    """

    w: PyTree
    plus_w: PyTree
    minus_w: PyTree | None


class NudgedSolution(NamedTuple):
    """A minimizer of ``L +- M / l``; with K outer losses each leaf leads with K.

    Attributes:
      w: The minimizer.
      inner_alpha_grad: ``dL/dalpha`` at ``w``.
      outer_alpha_grad: ``dM/dalpha`` at ``w``.
      solver_stats: Statistics of the solver.
    """

    w: PyTree
    inner_alpha_grad: PyTree
    outer_alpha_grad: PyTree
    solver_stats: InnerStats


class Penalty(eqx.Module):
    """The derivative of the outer problem with the inner problem as a penalty.

    ``w_l`` minimizes ``M + l (L - min L)``, or equivalently ``L`` nudged by ``M / l``:

        h = dM/dalpha(w_l) + l [dL/dalpha(w_l) - dL/dalpha(w*)]

    No second derivatives are needed.

    Args:
      solver: The inner solver, which solves both problems.
      strength: The number ``l > 0``.
      symmetric: Whether to nudge by ``+M / l`` and by ``-M / l``, as in equilibrium
        propagation. With the two minimizers the first term of ``h`` is the mean of
        ``dM/dalpha``, the second ``l / 2`` times the difference of ``dL/dalpha``.
      warm_start: Whether each solve starts where its previous one ended.
      outer_batch_size: Number of examples for the outer loss, sampled once per
        estimate. Defaults to all examples.

    Cost: two inner solves, three if symmetric; the nudged ones need an outer gradient
      per step. Three more inner gradients. With K outer losses each nudged solve is
      made K times, one after the other and each with one of the losses.
    Memory: three vectors like ``w``, and that of the solver.
    Target: argmin.
    Bias: falls as ``1 / l``, or as ``1 / l^2`` if symmetric. The errors of the solves
      are multiplied by ``l``. The estimates are never trusted; use ``certify_every`` of
      `OuterLoop`.

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
    strength: float | Array = eqx.field(converter=positive("strength"))
    symmetric: bool = eqx.field(
        static=True, default=False, kw_only=True, converter=boolean("symmetric")
    )
    warm_start: bool = eqx.field(
        static=True, default=True, kw_only=True, converter=boolean("warm_start")
    )
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
            reason="two solutions are compared, and l multiplies their errors",
        ),
    )

    def __check_init__(self):
        if getattr(self.solver, "ignores_loss", False):
            raise TypeError(
                "solver must minimize the loss that it is given, to which Penalty adds "
                f"the outer loss; got {type(self.solver).__name__}, which ignores it. "
                "Use hg.Implicit with it, or an iterative solver."
            )
        check_positive_int("outer_batch_size", self.outer_batch_size, optional=True)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """Returns NaN, because the bias also depends on third derivatives."""
        return float("nan")

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> PenaltyState:
        """Returns the state in which every solve starts from ``w``."""
        del key
        check_problem(problem, w, alpha, self.solver)
        check_alpha_has_gradient(problem, w, alpha, None, NO_GRADIENT_ADVICE)
        nudged_w = jax.tree.map(
            lambda zero, x: jnp.broadcast_to(x, zero.shape), zero_adjoint(problem, w), w
        )
        return PenaltyState(w, nudged_w, nudged_w if self.symmetric else None)

    def estimate(
        self, problem: Bilevel, state: PenaltyState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, PenaltyState]:
        """Solves the inner problem and the nudged ones."""
        data = EstimateData.sample(problem, key)
        outer_batch = data.outer_batch(self.outer_batch_size)
        run_fn = make_run_fn(self.solver, problem, data, state.w, outer_batch)
        value, w, solver_stats = run_fn(alpha)
        solve = lambda init_w, sign: self._solve_nudged(
            problem, data, outer_batch, init_w, alpha, sign
        )
        plus = solve(state.plus_w, 1.0)
        nudged_stats = [plus.solver_stats]
        if self.symmetric:
            minus = solve(state.minus_w, -1.0)
            minus_w, minus_grad = minus.w, minus.inner_alpha_grad
            nudged_stats.append(minus.solver_stats)
            direct = jax.tree.map(
                lambda x, y: (x + y) / 2, plus.outer_alpha_grad, minus.outer_alpha_grad
            )
            factor, num_alpha_grads = self.strength / 2, 2 * value.size
        else:
            minus_w, direct = None, plus.outer_alpha_grad
            minus_grad = jax.grad(problem.inner_loss, argnums=1)(
                w, alpha, data.inner_batch()
            )
            if problem.num_objectives is not None:  # shared by the outer losses
                minus_grad = jax.tree.map(lambda x: x[None], minus_grad)
            factor, num_alpha_grads = self.strength, value.size + 1
        # h = dM/dalpha(w_l) + l [dL/dalpha(w_l) - dL/dalpha(w*)]
        difference = jax.tree.map(jnp.subtract, plus.inner_alpha_grad, minus_grad)
        indirect = scale(factor, difference)
        hypergradient = add_scale(indirect, 1, direct)
        num_grads = num_alpha_grads + 1  # one for inner_grad_norm
        estimate = make_estimate(
            value,
            hypergradient,
            w,
            flags={"biased": True}
            | _convergence_flags([solver_stats, *nudged_stats])
            | lost_derivative_flags(problem, w, alpha),
            inner_grad_norm=inner_grad_norm(problem, data, w, alpha),
            num_inner_steps=solver_stats["num_steps"],
            **self._costs(data, solver_stats, nudged_stats, num_grads, value.size),
        )
        if self.warm_start and problem.init_fn is None:
            # A nudged loss may have no minimum. Do not start from what diverged.
            is_good = all_finite(w, plus.w, minus_w)
            new_state = PenaltyState(w, plus.w, minus_w)
            state = optax.tree.where(is_good, new_state, state)
        return estimate, state

    def _solve_nudged(
        self,
        problem: Bilevel,
        data: EstimateData,
        outer_batch: PyTree,
        init_w: PyTree,
        alpha: PyTree,
        sign: float,
    ) -> NudgedSolution:
        """Minimizes ``L + sign M / l`` for each of the outer losses."""
        loss, batch = problem.inner_loss, data.inner_batch()

        def solve(init_w: PyTree, outer_loss: Loss) -> NudgedSolution:
            outer_value = lambda w, alpha: jnp.asarray(
                outer_loss(w, alpha, outer_batch), dtype=float
            )
            nudged_loss = lambda w, alpha, batch: (
                loss(w, alpha, batch) + sign / self.strength * outer_value(w, alpha)
            )
            w0 = problem.init_inner(init_w, alpha)
            w, solver_stats = self.solver.solve(
                nudged_loss, w0, alpha, data.inner_data, data.solver_key
            )
            return NudgedSolution(
                w,
                jax.grad(loss, argnums=1)(w, alpha, batch),
                jax.grad(outer_value, argnums=1)(w, alpha),
                solver_stats,
            )

        if problem.num_objectives is None:
            return solve(init_w, problem.outer_losses[0])
        # In a sum with weights 0 and 1 a NaN of one loss would reach the others.
        solutions = [
            solve(jax.tree.map(lambda x, k=k: x[k], init_w), outer_loss)
            for k, outer_loss in enumerate(problem.outer_losses)
        ]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *solutions)

    def _costs(
        self,
        data: EstimateData,
        solver_stats: InnerStats,
        nudged_stats: list[InnerStats],
        num_grads: int,
        num_objectives: int,
    ) -> dict[str, Array]:
        """Returns the cost of an estimate.

        Every call of the inner loss in a nudged solve also calls the outer loss.
        """
        total = lambda name: sum(jnp.sum(stats[name]) for stats in nudged_stats)
        # Counts are passes over the data, but a mini-batch step needs a whole gradient
        # of the outer loss.
        num_nudged_grads = sum(
            jnp.sum(jnp.maximum(stats["num_grads"], stats["num_steps"]))
            for stats in nudged_stats
        )
        fraction = fixed_batch_fraction(data.outer_data, self.outer_batch_size)
        num_direct = len(nudged_stats) * num_objectives
        return cost_stats(
            data.inner_data,
            data.outer_data,
            num_grads=solver_stats["num_grads"] + total("num_grads") + num_grads,
            num_hvps=solver_stats["num_hvps"] + total("num_hvps"),
            num_values=solver_stats["num_values"] + total("num_values"),
            num_outer_grads=fraction
            * (num_nudged_grads + HVP_COST * total("num_hvps") + num_direct),
            num_outer_values=fraction * (total("num_values") + num_objectives),
        )


def _convergence_flags(stats_of_solves: list[InnerStats]) -> dict[str, Array]:
    """Returns the flag ``not_converged`` of a solver that reports its convergence."""
    if "converged" not in stats_of_solves[0]:
        return {}
    has_stopped_early = [jnp.any(stats["converged"] == 0) for stats in stats_of_solves]
    return {"not_converged": jnp.any(jnp.stack(has_stopped_early))}
