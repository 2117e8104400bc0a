"""Zero-order hypergradients: antithetic evolution strategies of the value function."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from ..cost import cost_stats
from ..inner.base import InnerSolver, IterativeSolver
from ..method_summary import MethodSummary
from ..problem import (
    Bilevel,
    EstimateData,
    batch_fraction,
    fixed_batch_fraction,
)
from ..problem_checks import check_problem
from ..validation import check_positive_int, float_converter
from .base import Estimate, make_stats
from .error_estimates import standard_error
from .inner_run import (
    InnerRunState,
    check_run_uses_alpha,
    inner_grad_norm,
    make_run_fn,
    next_state,
)


class Evolution(eqx.Module):
    """``sum_i e_i [F(alpha + e_i) - F(alpha - e_i)] / (2 n sigma²)``, e_i normal.

    ``F(alpha) = M(w(alpha), alpha)`` for a whole inner run. All runs share the key, so
    that a difference is due to ``alpha`` alone.

    Args:
      solver: any inner solver; nothing is differentiated, so ``M`` may be a metric.
      sigma: standard deviation of the perturbations of ``alpha``.
      num_pairs: ``n``.
      warm_start: begin each set of runs where the last run at ``alpha`` ended.
      outer_batch_size: examples of the outer loss, drawn once an estimate; None means
        all.

    Cost: 2 n + 1 inner runs and outer values. Memory: 2 n runs', as one batch.

    Target: solver. Bias: the derivative of ``F`` smoothed by ``sigma``,
    ``O(sigma²)``. ``standard_error`` is the relative spread of the mean over pairs,
    which falls as ``1 / sqrt(n)``. Never trusted.

    Source: Salimans et al. 2017 (arXiv 1703.03864), with antithetic pairs.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - 3 * alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum(w**2)
    >>> estimator = hg.Evolution(hg.Newton(), sigma=0.01, num_pairs=1000)
    >>> estimate = hg.hypergradient(hg.Bilevel(inner, outer), estimator)(0.0, 1.0)
    >>> bool(abs(estimate.hypergradient - 9.0) < 1.5)
    True
    """

    solver: InnerSolver
    sigma: float | Array = eqx.field(
        default=0.1, converter=float_converter("sigma", optional=False)
    )
    num_pairs: int = eqx.field(static=True, default=16)
    warm_start: bool = eqx.field(static=True, default=False, kw_only=True)
    outer_batch_size: int | None = eqx.field(static=True, default=None, kw_only=True)

    target = "solver"
    citations = ("salimans2017", "vicol2021")
    summary = (
        MethodSummary(
            "Evolution(solver, s, n)",
            num_grads="(2 * n + 1) * T + 1",
            num_hvps="0",
            memory="2 n runs",
            bias="smoothing by s, and noise",
            alpha_in=("losses", "optimizer", "start"),
            recommended_for="a metric or a run that has no derivative",
            not_recommended_for="many hyperparameters, or where a derivative exists",
            reason="the noise falls as 1/sqrt(n) and grows as sqrt(N + 1)",
        ),
    )

    def __check_init__(self):
        check_positive_int("num_pairs", self.num_pairs)
        check_positive_int("outer_batch_size", self.outer_batch_size, optional=True)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """NaN: the error is random."""
        return float("nan")

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
        """2 n + 1 inner runs."""
        data, noise_key = EstimateData.sample(problem, key), jax.random.fold_in(key, 4)
        outer_batch = data.outer_batch(self.outer_batch_size)
        whole = make_run_fn(self.solver, problem, data, state.w, outer_batch)
        flat, unravel = ravel_pytree(alpha)
        run = lambda flat: whole(unravel(flat))
        value, w, spent = run(flat)
        noise = jax.random.normal(noise_key, (self.num_pairs, flat.size), flat.dtype)
        noise = self.sigma * noise
        up, _, cost_up = jax.vmap(run)(flat[None] + noise)
        down, _, cost_down = jax.vmap(run)(flat[None] - noise)
        hypergradient, standard_error = _average(
            problem, noise, up - down, self.sigma, unravel
        )
        count = lambda name: (
            spent[name] + jnp.sum(cost_up[name]) + jnp.sum(cost_down[name])
        )
        stats = _stats(
            problem,
            data,
            w,
            alpha,
            standard_error,
            num_grads=count("num_grads"),
            num_hvps=count("num_hvps"),
            num_values=count("num_values"),
            num_outer_values=(2 * self.num_pairs + 1)
            * value.size
            * fixed_batch_fraction(data.outer_data, self.outer_batch_size),
            num_inner_steps=spent["num_steps"],
        )
        estimate = Estimate(value, hypergradient, w, stats)
        return estimate, next_state(problem, state, w, self.warm_start)


class PersistentState(eqx.Module):
    """Particles: carries ``[2, n, ...]``, the sums of their perturbations, the step."""

    w: PyTree
    carries: PyTree
    sums: Array
    index: Array


class PersistentEvolution(eqx.Module):
    """Evolution over windows of one unroll, without the bias of truncation.

    Each of 2 n particles keeps its own inner run from window to window and remembers
    the sum ``x_i`` of all perturbations that its run has seen:
    ``sum_i x_i [M(w_i+) - M(w_i-)] / (2 n sigma²)``, with ``M`` at the end of the
    window. Averaged over the windows of a run it estimates the derivative of the
    average of ``M`` over their ends.

    Args:
      solver: an inner solver that goes step by step; its T steps are one unroll, after
        which the particles start anew.
      sigma, num_pairs: as in `Evolution`.
      window: K, steps an estimate; T must be a multiple of it.
      outer_batch_size: examples of the outer loss, drawn once an estimate; None means
        all.

    Cost: 2 n K inner gradients and 2 n outer values. Memory: 2 n carries.

    Target: solver. Bias: that of smoothing by ``sigma``; the variance grows with the
    number of windows that a run has seen. ``standard_error`` is the relative spread of
    the mean over pairs. Never trusted.

    ``value`` and ``w`` are means over the particles.

    Source: Vicol, Metz & Sohl-Dickstein 2021 (arXiv 2112.13835).

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - 3 * alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 3.0) ** 2)
    >>> solver = hg.Descent(optax.sgd(0.5), 20)
    >>> estimator = hg.PersistentEvolution(solver, 0.1, 100, unroll_length=5)
    >>> trace = hg.minimize(
    ...     hg.Bilevel(inner, outer), estimator, optax.adam(0.05), 0.0, 0.0,
    ...     num_steps=200,
    ... )
    >>> bool(abs(trace.alpha - 1.0) < 0.1)
    True
    """

    solver: IterativeSolver
    sigma: float | Array = eqx.field(
        default=0.1, converter=float_converter("sigma", optional=False)
    )
    num_pairs: int = eqx.field(static=True, default=16)
    unroll_length: int = eqx.field(static=True, default=1)
    outer_batch_size: int | None = eqx.field(static=True, default=None, kw_only=True)

    target = "solver"
    citations = ("vicol2021",)
    summary = (
        MethodSummary(
            "PersistentEvolution(solver, s, n, K)",
            num_grads="2 * n * K + 1",
            num_hvps="0",
            memory="2 n carries",
            bias="smoothing by s, and noise",
            alpha_in=("losses", "optimizer", "start"),
            recommended_for="moving alpha every K steps of one long run",
            not_recommended_for="many hyperparameters, short runs",
            reason="runs remember what moved them: no bias of truncation, more noise",
        ),
    )

    def __check_init__(self):
        if not hasattr(self.solver, "step"):
            raise TypeError(
                f"{type(self.solver).__name__} does not go step by step (init, step, "
                "num_steps); use hg.Descent, or hg.Evolution with this solver"
            )
        check_positive_int("num_pairs", self.num_pairs)
        check_positive_int("unroll_length", self.unroll_length)
        check_positive_int("outer_batch_size", self.outer_batch_size, optional=True)
        if self.solver.num_steps % self.unroll_length:
            raise ValueError(
                f"window must divide the solver's num_steps; got {self.unroll_length} and "
                f"{self.solver.num_steps}"
            )

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """NaN: the error is random."""
        return float("nan")

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> PersistentState:
        """All particles at ``w``."""
        key = jax.random.key(0) if key is None else key
        check_problem(problem, w, alpha, self.solver)
        check_run_uses_alpha(self.solver, problem, w, alpha)
        inner_data, _ = problem.sample_data(key)
        flat, unravel = ravel_pytree(alpha)
        shape = (2, self.num_pairs, flat.size)
        alphas = jnp.broadcast_to(flat, shape)
        carries = self._begin(problem, w, alphas, unravel, inner_data, key)
        sums = jnp.zeros((self.num_pairs, flat.size), flat.dtype)
        return PersistentState(w, carries, sums, jnp.asarray(0))

    def _begin(self, problem, w, alphas, unravel, inner_data, key):
        def begin(flat):
            alpha = unravel(flat)
            start = problem.init_inner(w, alpha)
            return self.solver.init(problem.inner_loss, start, alpha, inner_data, key)

        return jax.vmap(jax.vmap(begin))(alphas)

    def estimate(
        self, problem: Bilevel, state: PersistentState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, PersistentState]:
        """A window of every particle."""
        data, noise_key = EstimateData.sample(problem, key), jax.random.fold_in(key, 4)
        outer_batch = data.outer_batch(self.outer_batch_size)
        flat, unravel = ravel_pytree(alpha)
        noise = jax.random.normal(noise_key, (self.num_pairs, flat.size), flat.dtype)
        noise = self.sigma * noise
        alphas = flat[None, None] + jnp.stack([noise, -noise])
        fresh = state.index == 0
        begun = self._begin(
            problem, state.w, alphas, unravel, data.inner_data, data.solver_key
        )
        pick = lambda new, old: jnp.where(fresh, new, old)
        carries = jax.tree.map(pick, begun, state.carries)
        sums = jnp.where(fresh, 0.0, state.sums) + noise
        keys = jax.random.split(data.solver_key, self.unroll_length)

        def run(carry, flat):
            alpha = unravel(flat)
            step = lambda carry, key: (
                self.solver.step(
                    problem.inner_loss, carry, alpha, data.inner_data, key
                ),
                None,
            )
            carry, _ = jax.lax.scan(step, carry, keys)
            return carry, problem.outer_value(carry[0], alpha, outer_batch)

        carries, values = jax.vmap(jax.vmap(run))(carries, alphas)
        hypergradient, standard_error = _average(
            problem, sums, values[0] - values[1], self.sigma, unravel
        )
        value = jnp.mean(values, axis=(0, 1))
        w = jax.tree.map(lambda x: jnp.mean(x, axis=(0, 1)), carries[0])
        stats = _stats(
            problem,
            data,
            w,
            alpha,
            standard_error,
            num_grads=2
            * self.num_pairs
            * self.unroll_length
            * batch_fraction(data.inner_data),
            num_outer_values=2
            * self.num_pairs
            * value.size
            * fixed_batch_fraction(data.outer_data, self.outer_batch_size),
            num_inner_steps=self.unroll_length,
        )
        index = (state.index + self.unroll_length) % self.solver.num_steps
        next_state = PersistentState(state.w, carries, sums, index)
        return Estimate(value, hypergradient, w, stats), next_state


def _average(problem, perturbations, differences, sigma, unravel):
    """The mean over pairs, shaped like ``alpha``, and its relative standard error."""
    several = problem.num_objectives is not None
    differences = differences if several else differences[:, None]
    weights = differences / (2 * sigma**2)
    each = weights[:, :, None] * perturbations[:, None, :]  # [n, K, N]
    each = each.astype(perturbations.dtype)  # of a loss that may be in another
    mean = jnp.mean(each, axis=0)
    relative = standard_error(each, mean, is_multi_objective=True)
    return (jax.vmap(unravel)(mean) if several else unravel(mean[0])), relative


def _stats(
    problem, data: EstimateData, w, alpha, standard_error, *, num_inner_steps, **counts
):
    counts["num_grads"] += 1
    return make_stats(
        jnp.asarray(False),
        inner_grad_norm=inner_grad_norm(problem, data, w, alpha),
        num_inner_steps=num_inner_steps,
        standard_error=standard_error,
        **cost_stats(data.inner_data, data.outer_data, **counts),
    )
