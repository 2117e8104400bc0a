"""Hypergradients by differences: of gradients as in DARTS, and of whole runs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from ..batches import fixed_batch_fraction
from ..certificate import NO_GRADIENT_ADVICE
from ..checks.lost_derivatives import lost_derivative_flags
from ..checks.problem import check_alpha_has_gradient, check_problem
from ..cost import cost_stats
from ..inner.base import InnerSolver
from ..method_summary import MethodSummary
from ..number_checks import boolean, check_positive_int, positive
from ..problem import Bilevel, EstimateData
from ..trees import add_scale, all_finite, machine_eps, safe_norm, scale, widen
from .base import Estimate, make_estimate
from .inner_run import (
    InnerRunState,
    check_run_uses_alpha,
    inner_grad_norm_or_nan,
    make_run_fn,
    next_state,
    unravel_derivatives,
)

#: Part of a step that rounding may change.
MAX_STEP_ERROR = 0.1


class FiniteDifference(eqx.Module):
    """Implicit differentiation with ``H = I / s`` and a difference for the cross term.

    With ``b = dM/dw`` at the inner solution ``w``:

        h = dM/dalpha - s [dL/dalpha(w + e b) - dL/dalpha(w - e b)] / (2 e)

    The second-order update of DARTS takes the difference around the ``w`` before its
    single inner step, and ``b`` after it; that is `hypergrad.DARTS`.

    Args:
      solver: The inner solver.
      epsilon: Length of the step ``e b``; DARTS uses 0.01. Defaults to the cube root of
        the machine epsilon times ``max(1, ||w||)``. If dtypes are mixed, that of the
        coarsest leaf of ``w`` and ``alpha`` counts. A step that ``w`` does not resolve,
        such as 0.01 in bfloat16, is flagged as ``unresolved_step``.
      step_size: The number ``s``.
      warm_start: Whether each inner solve starts where the previous one ended.
      adjoint_batch_size: Number of examples for the two gradients and the residual,
        sampled once per estimate. Defaults to all examples.
      outer_batch_size: The same for the outer gradient.

    Cost: the inner solve, three inner gradients and one outer gradient.
    Memory: two vectors like ``w``.
    Target: argmin.
    Bias: that of ``H = I / s``; the difference adds ``O(epsilon^2)``. Its estimates are
      never trusted; use ``certify_every`` of `OuterLoop`.

    Source: Liu, Simonyan & Yang 2019 (arXiv 1806.09055), section 2.3.

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - 3 * alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum(w**2)
    >>> estimator = hg.FiniteDifference(hg.Descent(optax.sgd(1.0), 1))
    >>> estimate = hg.hypergradient(hg.Bilevel(inner, outer), estimator)(0.0, 1.0)
    >>> round(float(estimate.hypergradient), 1)
    9.0
    """

    solver: InnerSolver
    epsilon: float | Array | None = eqx.field(
        default=None, converter=positive("epsilon", optional=True)
    )
    step_size: float | Array = eqx.field(default=1.0, converter=positive("step_size"))
    warm_start: bool = eqx.field(
        static=True, default=True, kw_only=True, converter=boolean("warm_start")
    )
    adjoint_batch_size: int | None = eqx.field(static=True, default=None, kw_only=True)
    outer_batch_size: int | None = eqx.field(static=True, default=None, kw_only=True)

    target = "argmin"
    citations = ("liu2019",)
    summary = (
        MethodSummary(
            "FiniteDifference(solver)",
            num_grads="T + 3",
            num_hvps="0",
            memory="2 w",
            bias="takes H for I / step_size",
            alpha_in=("losses",),
            recommended_for="architecture search as in DARTS, no second derivatives",
            not_recommended_for="wherever the length of the hypergradient matters",
            reason="two gradients stand for the cross term, and nothing is solved",
        ),
    )

    def __check_init__(self):
        check_positive_int("adjoint_batch_size", self.adjoint_batch_size, optional=True)
        check_positive_int("outer_batch_size", self.outer_batch_size, optional=True)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """Returns ``max |1 - s lambda|``, plus the error of the difference."""
        step_size = float(self.step_size)
        difference_error = 1e-3
        bias = max(abs(1 - step_size * eig_min), abs(1 - step_size * eig_max))
        return bias + difference_error

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> InnerRunState:
        """Returns the state in which the first solve starts from ``w``."""
        del key
        check_problem(problem, w, alpha, self.solver)
        check_alpha_has_gradient(problem, w, alpha, None, NO_GRADIENT_ADVICE)
        data = EstimateData.sample(problem, jax.random.key(0))
        jax.eval_shape(lambda: data.inner_batch(self.adjoint_batch_size))
        return InnerRunState(w)

    def estimate(
        self, problem: Bilevel, state: InnerRunState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, InnerRunState]:
        """Makes one inner solve and the difference of two gradients."""
        data, loss = EstimateData.sample(problem, key), problem.inner_loss
        init_w = problem.init_inner(state.w, alpha)
        w, solver_stats = self.solver.solve(
            loss, init_w, alpha, data.inner_data, data.solver_key
        )
        batch = data.inner_batch(self.adjoint_batch_size)
        outer_batch = data.outer_batch(self.outer_batch_size)
        value, b, direct = problem.outer_value_and_grads(w, alpha, outer_batch)
        alpha_grad_fn = lambda w: jax.grad(loss, argnums=1)(w, alpha, batch)
        length = self.epsilon
        if length is None:
            # Both gradients are rounded to the dtypes of alpha.
            eps = machine_eps(w, alpha)
            length = eps ** (1 / 3) * jnp.maximum(1.0, safe_norm(w))

        def cross_difference(b):
            # J' b = [dL/dalpha(w + e b) - dL/dalpha(w - e b)] / (2 e), ||e b|| = length
            b_norm = safe_norm(b)
            e = length / jnp.where(b_norm == 0, 1.0, b_norm)
            plus_w, minus_w = add_scale(w, e, b), add_scale(w, -e, b)
            plus, minus = alpha_grad_fn(plus_w), alpha_grad_fn(minus_w)
            difference = jax.tree.map(lambda x, y: (x - y) / (2 * e), plus, minus)
            return difference, is_step_rounded(plus_w, minus_w, 2 * e, b)

        cross, is_rounded = problem.for_each_loss(cross_difference)(b)
        # h = dM/dalpha - s J' b
        hypergradient = add_scale(direct, -self.step_size, cross)
        fraction = fixed_batch_fraction(data.inner_data, self.adjoint_batch_size)
        outer_fraction = fixed_batch_fraction(data.outer_data, self.outer_batch_size)
        costs = cost_stats(
            data.inner_data,
            data.outer_data,
            num_grads=solver_stats["num_grads"] + fraction * (2 * value.size + 1),
            num_hvps=solver_stats["num_hvps"],
            num_values=solver_stats["num_values"],
            num_outer_grads=outer_fraction * value.size,
        )
        estimate = make_estimate(
            value,
            hypergradient,
            w,
            flags={
                "biased": True,
                # Numbers that are not finite have a reason of their own.
                "unresolved_step": all_finite(w, b) & jnp.any(is_rounded),
                **lost_derivative_flags(problem, w, alpha),
            },
            inner_grad_norm=safe_norm(jax.grad(loss)(w, alpha, batch)),
            num_inner_steps=solver_stats["num_steps"],
            **costs,
        )
        return estimate, next_state(problem, state, w, self.warm_start)


def is_step_rounded(plus_w: PyTree, minus_w: PyTree, e: Array, b: PyTree) -> Array:
    """Returns True if rounding changes the step ``w+ - w- = e b`` by over a tenth."""
    # Otherwise the compiler may omit the rounding of a sum that is widened afterwards.
    plus_w, minus_w = jax.lax.optimization_barrier((plus_w, minus_w))
    difference = optax.tree.sub(widen(plus_w), widen(minus_w))
    step = scale(e, widen(b))
    error = safe_norm(optax.tree.sub(difference, step))
    return ~(error <= MAX_STEP_ERROR * safe_norm(step))


class CentralDifference(eqx.Module):
    """Central differences of whole inner runs, in each of the N numbers of ``alpha``.

        dF/dalpha_i = [F(alpha + e_i) - F(alpha - e_i)] / (2 |e_i|)

    with ``F(alpha) = M(w_T(alpha), alpha)``. All runs have the same key and starting
    point. The estimator is correct for any solver, and slow: a reference for the
    others. The runs may leave a space that is declared for ``alpha``, because they
    perturb ``alpha`` itself.

    Args:
      solver: Any inner solver.
      epsilon: Step relative to ``max(1, |alpha_i|)``. Defaults to the cube root of the
        machine epsilon. If dtypes are mixed, that of the coarsest one counts among
        ``alpha_i``, ``w`` and the value.
      warm_start: Whether the runs start where the previous run at ``alpha`` ended.
      outer_batch_size: Number of examples for the outer loss, sampled once per
        estimate. Defaults to all examples.

    Cost: 2 N + 1 inner solves and outer values.
    Memory: that of one run, as the runs are made one after the other.
    Target: solver.
    Bias: ``O(epsilon^2)``, and rounding errors divided by ``epsilon``; float64 is
      advised. Its estimates are never trusted, because neither error is measured.

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - 3 * alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum(w**2)
    >>> estimator = hg.CentralDifference(hg.Descent(optax.sgd(0.5), 100))
    >>> estimate = hg.hypergradient(hg.Bilevel(inner, outer), estimator)(0.0, 1.0)
    >>> round(float(estimate.hypergradient), 1)
    9.0
    """

    solver: InnerSolver
    epsilon: float | Array | None = eqx.field(
        default=None, converter=positive("epsilon", optional=True)
    )
    warm_start: bool = eqx.field(
        static=True, default=False, kw_only=True, converter=boolean("warm_start")
    )
    outer_batch_size: int | None = eqx.field(static=True, default=None, kw_only=True)

    target = "solver"
    citations = ()
    summary = (
        MethodSummary(
            "CentralDifference(solver)",
            num_grads="(2 * N + 1) * T + 1",
            num_hvps="0",
            memory="1 run",
            bias="epsilon^2",
            alpha_in=("losses", "optimizer", "start"),
            recommended_for="checking another estimator on a small copy of the problem",
            not_recommended_for="more than a few hyperparameters, float32, jumps",
            reason="whole runs are compared, whatever the solver does in them",
        ),
    )

    def __check_init__(self):
        check_positive_int("outer_batch_size", self.outer_batch_size, optional=True)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """Returns a bound on the error of the differences in either precision."""
        return 1e-3

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> InnerRunState:
        """Returns the state in which the first runs start from ``w``."""
        del key
        check_problem(problem, w, alpha, self.solver)
        check_run_uses_alpha(self.solver, problem, w, alpha)
        return InnerRunState(w)

    def estimate(
        self, problem: Bilevel, state: InnerRunState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, InnerRunState]:
        """Makes 2 N + 1 inner solves."""
        data = EstimateData.sample(problem, key)
        outer_batch = data.outer_batch(self.outer_batch_size)
        run_fn = make_run_fn(self.solver, problem, data, state.w, outer_batch)
        flat_alpha, unravel = ravel_pytree(alpha)
        value, w, solver_stats = run_fn(alpha)
        epsilons = self.epsilon
        if epsilons is None:
            values = [
                jax.eval_shape(loss, w, alpha, outer_batch)
                for loss in problem.outer_losses
            ]
            epsilons = _default_epsilons(alpha, (w, values))
        steps = epsilons * jnp.maximum(1.0, jnp.abs(flat_alpha))
        # A leaf may have a shorter dtype than flat_alpha.
        round_to_leaves = lambda flat: ravel_pytree(unravel(flat))[0]

        def derivative(i):
            plus = round_to_leaves(flat_alpha.at[i].add(steps[i]))
            minus = round_to_leaves(flat_alpha.at[i].add(-steps[i]))
            plus_value, _, plus_stats = run_fn(unravel(plus))
            minus_value, _, minus_stats = run_fn(unravel(minus))
            # Divide by the step that was made after rounding.
            slope = (plus_value - minus_value) / (plus[i] - minus[i])
            return slope, jax.tree.map(jnp.add, plus_stats, minus_stats)

        derivatives, pair_stats = jax.lax.map(derivative, jnp.arange(flat_alpha.size))
        total = lambda name: solver_stats[name] + jnp.sum(pair_stats[name])
        outer_fraction = fixed_batch_fraction(data.outer_data, self.outer_batch_size)
        num_runs = 2 * flat_alpha.size + 1
        grad_norm, num_grads = inner_grad_norm_or_nan(problem, data, w, alpha)
        costs = cost_stats(
            data.inner_data,
            data.outer_data,
            num_grads=total("num_grads") + num_grads,
            num_hvps=total("num_hvps"),
            num_values=total("num_values"),
            num_outer_values=num_runs * outer_fraction * value.size,
        )
        estimate = make_estimate(
            value,
            unravel_derivatives(derivatives, flat_alpha, unravel),
            w,
            flags={"difference_error": True},
            inner_grad_norm=grad_norm,
            num_inner_steps=solver_stats["num_steps"],
            **costs,
        )
        return estimate, next_state(problem, state, w, self.warm_start)


def _default_epsilons(alpha: PyTree, results: PyTree) -> Array:
    """Returns the relative step for each entry of the flattened ``alpha``.

    It is the cube root of the precision of a run, which is at most that of the entry
    and of the results.
    """
    epsilon = lambda leaf: machine_eps(leaf, results) ** (1 / 3)
    return ravel_pytree(jax.tree.map(lambda x: jnp.full_like(x, epsilon(x)), alpha))[0]
