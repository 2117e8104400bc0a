"""Hypergradients by differences: of gradients (DARTS), and of whole runs."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from ..certificate import NO_GRADIENT_ADVICE
from ..cost import cost_stats
from ..inner.base import InnerSolver
from ..method_summary import MethodSummary
from ..problem import Bilevel, EstimateData, fixed_batch_fraction
from ..problem_checks import check_alpha_has_gradient, check_problem
from ..trees import add_scale, norm
from ..validation import check_positive_int, float_converter
from .base import Estimate, make_stats
from .inner_run import (
    InnerRunState,
    check_run_uses_alpha,
    inner_grad_norm,
    make_run_fn,
    next_state,
)


class FiniteDifference(eqx.Module):
    """``dM/dalpha - s [dL/dalpha(w + e b) - dL/dalpha(w - e b)] / 2e``, ``b = dM/dw``.

    The cross term by a difference of gradients, the Hessian taken for ``I / s``: with
    one inner step of size ``s``, the second-order update of DARTS.

    Args:
      solver: the inner solver.
      epsilon: length of the step ``e b``; DARTS takes 0.01. None means the cube root
        of the dtype's eps times ``max(1, ||w||)``.
      step_size: ``s``.
      warm_start: begin each inner solve where the last ended.
      adjoint_batch_size: examples for the two gradients and the residual, drawn once an
        estimate; None means all.
      outer_batch_size: examples for the outer gradient, likewise.

    Cost: the inner solve, three inner gradients, one outer gradient. Memory: two
    vectors like ``w``.

    Target: argmin. Bias: takes ``H`` for ``I / s``; the difference adds
    ``O(epsilon²)``. Never trusted of itself: use ``minimize(certify_every=...)``.

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
        default=None, converter=float_converter("epsilon")
    )
    step_size: float | Array = eqx.field(
        default=1.0, converter=float_converter("step_size", optional=False)
    )
    warm_start: bool = eqx.field(static=True, default=True, kw_only=True)
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
            recommended_for="architecture search as in DARTS, without second derivatives",
            not_recommended_for="wherever the length of the hypergradient matters",
            reason="two gradients stand for the cross term, and nothing is solved",
        ),
    )

    def __check_init__(self):
        check_positive_int("adjoint_batch_size", self.adjoint_batch_size, optional=True)
        check_positive_int("outer_batch_size", self.outer_batch_size, optional=True)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """``max |1 - s lambda|``, up to the difference's own error."""
        step_size = float(self.step_size)
        slack = 1e-3
        return max(abs(1 - step_size * eig_min), abs(1 - step_size * eig_max)) + slack

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> InnerRunState:
        """Starts from ``w``."""
        del key
        check_problem(problem, w, alpha, self.solver)
        check_alpha_has_gradient(problem, w, alpha, None, NO_GRADIENT_ADVICE)
        data = EstimateData.sample(problem, jax.random.key(0))
        jax.eval_shape(lambda: data.inner_batch(self.adjoint_batch_size))
        return InnerRunState(w)

    def estimate(
        self, problem: Bilevel, state: InnerRunState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, InnerRunState]:
        """One inner solve and a difference of two gradients."""
        data, loss = EstimateData.sample(problem, key), problem.inner_loss
        start = problem.init_inner(state.w, alpha)
        w, spent = self.solver.solve(
            loss, start, alpha, data.inner_data, data.solver_key
        )
        batch = data.inner_batch(self.adjoint_batch_size)
        outer_batch = data.outer_batch(self.outer_batch_size)
        value, b, direct = problem.outer_value_and_grads(w, alpha, outer_batch)
        slope = lambda w: jax.grad(loss, argnums=1)(w, alpha, batch)
        length = self.epsilon
        if length is None:
            eps = float(jnp.finfo(norm(w).dtype).eps)
            length = eps ** (1 / 3) * jnp.maximum(1.0, norm(w))

        def cross(b):
            step = length / jnp.where(norm(b) == 0, 1.0, norm(b))
            ahead, behind = (
                slope(add_scale(w, step, b)),
                slope(add_scale(w, -step, b)),
            )
            return jax.tree.map(lambda x, y: (x - y) / (2 * step), ahead, behind)

        if problem.num_objectives is not None:
            cross = jax.vmap(cross)
        hypergradient = add_scale(direct, -self.step_size, cross(b))
        part = fixed_batch_fraction(data.inner_data, self.adjoint_batch_size)
        outer_part = fixed_batch_fraction(data.outer_data, self.outer_batch_size)
        costs = cost_stats(
            data.inner_data,
            data.outer_data,
            num_grads=spent["num_grads"] + part * (2 * value.size + 1),
            num_hvps=spent["num_hvps"],
            num_values=spent["num_values"],
            num_outer_grads=outer_part * value.size,
        )
        stats = make_stats(
            jnp.asarray(False),
            inner_grad_norm=norm(jax.grad(loss)(w, alpha, batch)),
            num_inner_steps=spent["num_steps"],
            **costs,
        )
        estimate = Estimate(value, hypergradient, w, stats)
        return estimate, next_state(problem, state, w, self.warm_start)


class CentralDifference(eqx.Module):
    """``[M(w(alpha + e), alpha + e) - M(w(alpha - e), alpha - e)] / 2e``, each number.

    Whole inner runs, with the same key, from the same start: right for whatever the
    solver does, and slow. The oracle of the others.

    Args:
      solver: any inner solver.
      epsilon: relative to ``max(1, |alpha_i|)``; None means the cube root of eps.
      warm_start: begin each set of runs where the last run at ``alpha`` ended.
      outer_batch_size: examples of the outer loss, drawn once an estimate; None means
        all.

    Cost: 2 N + 1 inner solves and outer values for N numbers in ``alpha``. Memory: one
    run's, as they are made one after the other.

    Target: solver. Bias: ``O(epsilon²)``, and rounding over ``epsilon``; float64 is
    advised. Never trusted: it does not know its own error.

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
        default=None, converter=float_converter("epsilon")
    )
    warm_start: bool = eqx.field(static=True, default=False, kw_only=True)
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
            not_recommended_for="more than a handful of hyperparameters, float32, jumps",
            reason="whole runs are compared, whatever the solver does in them",
        ),
    )

    def __check_init__(self):
        check_positive_int("outer_batch_size", self.outer_batch_size, optional=True)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """The difference's own error: a few times the square root of eps."""
        return 1e-3

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> InnerRunState:
        """Starts from ``w``."""
        del key
        check_problem(problem, w, alpha, self.solver)
        check_run_uses_alpha(self.solver, problem, w, alpha)
        return InnerRunState(w)

    def estimate(
        self, problem: Bilevel, state: InnerRunState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, InnerRunState]:
        """2 N + 1 inner solves."""
        data = EstimateData.sample(problem, key)
        outer_batch = data.outer_batch(self.outer_batch_size)
        whole = make_run_fn(self.solver, problem, data, state.w, outer_batch)
        flat, unravel = ravel_pytree(alpha)
        eps = self.epsilon
        if eps is None:
            eps = float(jnp.finfo(flat.dtype).eps) ** (1 / 3)

        run = lambda flat: whole(unravel(flat))

        def slope(i):
            step = eps * jnp.maximum(1.0, jnp.abs(flat[i]))
            ahead, behind = flat.at[i].add(step), flat.at[i].add(-step)
            up, _, cost_up = run(ahead)
            down, _, cost_down = run(behind)
            costs = jax.tree.map(jnp.add, cost_up, cost_down)
            return (up - down) / (ahead[i] - behind[i]), costs

        value, w, spent = run(flat)
        slopes, costs = jax.lax.map(slope, jnp.arange(flat.size))
        slopes = slopes.astype(flat.dtype)  # of a loss that may be in another
        several = problem.num_objectives is not None
        hypergradient = (
            jax.vmap(unravel, in_axes=1)(slopes) if several else unravel(slopes)
        )
        count = lambda name: spent[name] + jnp.sum(costs[name])
        outer_part = fixed_batch_fraction(data.outer_data, self.outer_batch_size)
        counted = cost_stats(
            data.inner_data,
            data.outer_data,
            num_grads=count("num_grads") + 1,
            num_hvps=count("num_hvps"),
            num_values=count("num_values"),
            num_outer_values=(2 * flat.size + 1) * outer_part * value.size,
        )
        stats = make_stats(
            jnp.asarray(False),
            inner_grad_norm=inner_grad_norm(problem, data, w, alpha),
            num_inner_steps=spent["num_steps"],
            **counted,
        )
        estimate = Estimate(value, hypergradient, w, stats)
        return estimate, next_state(problem, state, w, self.warm_start)
