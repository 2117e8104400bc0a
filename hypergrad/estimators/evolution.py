"""Zero-order hypergradients by evolution strategies with antithetic pairs."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from ..batches import at_draw, fixed_batch_fraction
from ..checks.problem import check_problem
from ..cost import cost_stats
from ..cost.counts import count_batch
from ..inner.base import InnerSolver, IterativeSolver, grads_per_step, step_fraction
from ..method_summary import MethodSummary
from ..number_checks import boolean, check_positive_int, positive
from ..problem import Bilevel, EstimateData
from ..trees import widen
from .base import Estimate, make_estimate
from .error_estimates import standard_error
from .inner_run import (
    InnerRunState,
    check_run_uses_alpha,
    inner_grad_norm_or_nan,
    make_run_fn,
    next_state,
)

MAX_SHIFT_ERROR = 0.1  # of a perturbed entry of alpha by rounding, in units of sigma


class Evolution(eqx.Module):
    """An evolution strategy with antithetic pairs of whole inner runs.

    With ``F(alpha) = M(w_T(alpha), alpha)`` and ``e_i ~ N(0, sigma^2 I)``:

        h = 1/n sum_i e_i [F(alpha + e_i) - F(alpha - e_i)] / (2 sigma^2)

    All runs have the same key, so that they differ by ``alpha`` only.

    Args:
      solver: Any inner solver. Nothing is differentiated, so ``M`` may be a metric.
      sigma: Standard deviation of the perturbations of ``alpha``. It must be well above
        the rounding of ``alpha``, and change ``w`` by well more than the rounding of
        ``w``.
      num_pairs: Number of pairs (n).
      warm_start: Whether the runs start where the previous run at ``alpha`` ended.
      outer_batch_size: Number of examples for the outer loss, sampled once per
        estimate. Defaults to all examples.

    Cost: 2 n + 1 inner runs and outer values. In each batch of n runs all cost as much
      as the longest.
    Memory: at most that of 2 n runs, which are made as two batches of n.
    Target: solver.
    Bias: ``O(sigma^2)``, because the expectation is the derivative of ``F`` smoothed by
      ``sigma``. ``standard_error`` is the relative standard error of the mean over
      pairs and falls as ``1 / sqrt(n)``. It is NaN if rounding changes the
      perturbation of an entry of ``alpha`` by more than ``sigma / 10``, and it does not
      contain the rounding errors of ``w`` and of the outer value. The estimates are
      never trusted.

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
    sigma: float | Array = eqx.field(default=0.1, converter=positive("sigma"))
    num_pairs: int = eqx.field(static=True, default=16)
    warm_start: bool = eqx.field(
        static=True, default=False, kw_only=True, converter=boolean("warm_start")
    )
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
        """Returns NaN, because the error is random."""
        return float("nan")

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
        """Makes 2 n + 1 inner runs."""
        data, noise_key = EstimateData.sample(problem, key), jax.random.fold_in(key, 4)
        outer_batch = data.outer_batch(self.outer_batch_size)
        run_fn = make_run_fn(self.solver, problem, data, state.w, outer_batch)
        flat_alpha, unravel = ravel_pytree(alpha)
        flat_run_fn = lambda flat: run_fn(unravel(flat))
        value, w, solver_stats = flat_run_fn(flat_alpha)
        # e_i ~ N(0, sigma^2 I), and F at alpha + e_i and at alpha - e_i
        noise = _sample_noise(noise_key, self.sigma, self.num_pairs, flat_alpha)
        plus, _, plus_stats = jax.vmap(flat_run_fn)(flat_alpha[None] + noise)
        minus, _, minus_stats = jax.vmap(flat_run_fn)(flat_alpha[None] - noise)
        hypergradient, error = _mean_over_pairs(
            problem, noise, plus - minus, self.sigma, unravel
        )
        error = _nan_if_rounded(error, flat_alpha, noise, self.sigma, unravel)
        total = lambda name: (
            solver_stats[name]
            + count_batch(plus_stats[name])
            + count_batch(minus_stats[name])
        )
        num_runs = 2 * self.num_pairs + 1
        grad_norm, num_grads = inner_grad_norm_or_nan(problem, data, w, alpha)
        outer_fraction = fixed_batch_fraction(data.outer_data, self.outer_batch_size)
        costs = cost_stats(
            data.inner_data,
            data.outer_data,
            num_grads=total("num_grads") + num_grads,
            num_hvps=total("num_hvps"),
            num_values=total("num_values"),
            num_outer_values=num_runs * value.size * outer_fraction,
        )
        estimate = make_estimate(
            value,
            hypergradient,
            w,
            flags={"random": True},
            inner_grad_norm=grad_norm,
            num_inner_steps=solver_stats["num_steps"],
            standard_error=error,
            **costs,
        )
        return estimate, next_state(problem, state, w, self.warm_start)


class PersistentState(eqx.Module):
    """The particles of `PersistentEvolution`, in n pairs.

    Attributes:
      w: Where each unroll starts.
      carries: Carries of the solver, leaves ``[2, n, ...]``.
      perturbation_sums: Sums of the perturbations since the start of the unroll; those
        of the second particle of a pair have the opposite sign.
      step: Number of inner steps made in the current unroll.
    """

    w: PyTree
    carries: PyTree
    perturbation_sums: Float[Array, "n N"]
    step: Int[Array, ""]


class PersistentEvolution(eqx.Module):
    """An evolution strategy on parts of one unroll, without truncation bias.

    Each of 2 n particles continues its own inner run from estimate to estimate, K steps
    at a time, each time with a new perturbation of ``alpha``. It remembers the sum
    ``xi_i`` of all perturbations since its run started:

        h = 1/n sum_i xi_i [M(w_i+) - M(w_i-)] / (2 sigma^2)

    with ``M`` at the end of the K steps. The average of ``h`` over an unroll estimates
    the derivative of the average of these ``M``.

    Args:
      solver: Inner solver with steps. Its T steps are one unroll, after which all
        particles start again.
      sigma, num_pairs: As in `Evolution`.
      unroll_length: Number of steps per estimate (K); T must be a multiple of it.
      outer_batch_size: Number of examples for the outer loss, sampled once per
        estimate. Defaults to all examples.

    Cost: 2 n K inner gradients and 2 n outer values.
    Memory: 2 n carries.
    Target: solver. ``value`` and ``w`` of an estimate are means over the particles.
    Bias: that of smoothing by ``sigma``. The variance grows with the number of
      estimates since the start of the unroll. ``standard_error`` is that of
      `Evolution`. The estimates are never trusted.

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
    sigma: float | Array = eqx.field(default=0.1, converter=positive("sigma"))
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
            reason="runs keep their perturbations: no truncation bias, more noise",
        ),
    )

    def __check_init__(self):
        if not hasattr(self.solver, "step"):
            raise TypeError(
                "solver must have the methods init and step and num_steps; got "
                f"{type(self.solver).__name__}. Use hg.Descent, or hg.Evolution with "
                "this solver."
            )
        check_positive_int("num_pairs", self.num_pairs)
        check_positive_int("unroll_length", self.unroll_length)
        check_positive_int("outer_batch_size", self.outer_batch_size, optional=True)
        if self.solver.num_steps % self.unroll_length:
            raise ValueError(
                "unroll_length must divide the solver's num_steps, "
                f"{self.solver.num_steps}; got {self.unroll_length}."
            )

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """Returns NaN, because the error is random."""
        return float("nan")

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> PersistentState:
        """Returns the state with all particles at ``w``."""
        key = jax.random.key(0) if key is None else key
        check_problem(problem, w, alpha, self.solver)
        check_run_uses_alpha(self.solver, problem, w, alpha)
        inner_data, _ = problem.sample_data(key)
        flat_alpha, unravel = ravel_pytree(alpha)
        alphas = jnp.broadcast_to(flat_alpha, (2, self.num_pairs, flat_alpha.size))
        carries = self._init_carries(problem, w, alphas, unravel, inner_data, key)
        sums = jnp.zeros((self.num_pairs, flat_alpha.size), flat_alpha.dtype)
        return PersistentState(w, carries, sums, jnp.asarray(0))

    def estimate(
        self, problem: Bilevel, state: PersistentState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, PersistentState]:
        """Makes K steps of every particle."""
        data, noise_key = EstimateData.sample(problem, key), jax.random.fold_in(key, 4)
        flat_alpha, unravel = ravel_pytree(alpha)
        noise = _sample_noise(noise_key, self.sigma, self.num_pairs, flat_alpha)
        alphas = flat_alpha[None, None] + jnp.stack([noise, -noise])
        is_new_unroll = state.step == 0
        init_carries = self._init_carries(
            problem, state.w, alphas, unravel, data.inner_data, data.solver_key
        )
        carries = jax.tree.map(
            lambda new, old: jnp.where(is_new_unroll, new, old),
            init_carries,
            state.carries,
        )
        # xi_i <- xi_i + e_i, which is -xi_i for the second particle of a pair
        sums = jnp.where(is_new_unroll, 0.0, state.perturbation_sums) + noise
        carries, values = self._run_particles(problem, data, carries, alphas, unravel)
        # h = 1/n sum_i xi_i [M(w_i+) - M(w_i-)] / (2 sigma^2)
        hypergradient, error = _mean_over_pairs(
            problem, sums, values[0] - values[1], self.sigma, unravel
        )
        error = _nan_if_rounded(error, flat_alpha, noise, self.sigma, unravel)
        value = jnp.mean(values, axis=(0, 1))
        w = jax.tree.map(lambda x: jnp.mean(x, axis=(0, 1)), carries[0])
        num_particles = 2 * self.num_pairs
        num_steps = num_particles * self.unroll_length * grads_per_step(self.solver)
        grad_norm, num_grads = inner_grad_norm_or_nan(problem, data, w, alpha)
        outer_fraction = fixed_batch_fraction(data.outer_data, self.outer_batch_size)
        costs = cost_stats(
            data.inner_data,
            data.outer_data,
            num_grads=num_steps * step_fraction(self.solver, data.inner_data)
            + num_grads,
            num_outer_values=num_particles * value.size * outer_fraction,
        )
        estimate = make_estimate(
            value,
            hypergradient,
            w,
            flags={"random": True},
            inner_grad_norm=grad_norm,
            num_inner_steps=self.unroll_length,
            standard_error=error,
            **costs,
        )
        step = (state.step + self.unroll_length) % self.solver.num_steps
        return estimate, PersistentState(state.w, carries, sums, step)

    def _init_carries(
        self,
        problem: Bilevel,
        w: PyTree,
        alphas: Float[Array, "2 n N"],
        unravel: Callable[[Array], PyTree],
        inner_data: PyTree,
        key: Array,
    ) -> PyTree:
        """Returns the carries of all particles before the first step."""

        def init_carry(flat):
            alpha = unravel(flat)
            init_w = problem.init_inner(w, alpha)
            return self.solver.init(problem.inner_loss, init_w, alpha, inner_data, key)

        return jax.vmap(jax.vmap(init_carry))(alphas)

    def _run_particles(
        self,
        problem: Bilevel,
        data: EstimateData,
        carries: PyTree,
        alphas: Float[Array, "2 n N"],
        unravel: Callable[[Array], PyTree],
    ) -> tuple[PyTree, Array]:
        """Returns the carries and the outer values after K steps of every particle."""
        outer_batch = data.outer_batch(self.outer_batch_size)
        num_steps = self.unroll_length
        keys = jax.random.split(data.solver_key, num_steps)

        def run_particle(carry, flat):
            alpha = unravel(flat)

            def step(carry, key_and_number):
                key, k = key_and_number
                step_data = at_draw(
                    data.inner_data, data.solver_key, k, num_steps, stream="w"
                )
                args = problem.inner_loss, carry, alpha, step_data, key
                return self.solver.step(*args), None

            carry, _ = jax.lax.scan(step, carry, (keys, jnp.arange(num_steps)))
            return carry, problem.outer_value(carry[0], alpha, outer_batch)

        return jax.vmap(jax.vmap(run_particle))(carries, alphas)


def is_resolved(
    shift: PyTree, alpha: PyTree, shifted_alpha: PyTree, sigma: Array | float
) -> Array:
    """Returns True if ``shifted_alpha - alpha`` is ``shift`` up to ``sigma / 10``.

    It is False if ``sigma`` is not well above the rounding of an entry of ``alpha``.
    """
    # Otherwise the compiler may omit the rounding of a sum that is widened afterwards.
    shifted_alpha = jax.lax.optimization_barrier(shifted_alpha)
    error = jax.tree.map(
        lambda s, x, shifted_x: jnp.abs(shifted_x - x - s),
        *widen((shift, alpha, shifted_alpha)),
    )
    is_small = lambda x: jnp.all(x <= MAX_SHIFT_ERROR * sigma)
    return jnp.all(jnp.stack([is_small(leaf) for leaf in jax.tree.leaves(error)]))


def _nan_if_rounded(
    error: Array,
    flat_alpha: Float[Array, " N"],
    noise: Float[Array, "n N"],
    sigma: Array | float,
    unravel: Callable[[Array], PyTree],
) -> Array:
    """Returns NaN in place of a standard error if ``alpha`` does not resolve sigma."""
    alpha = unravel(flat_alpha)
    is_shifted = jax.vmap(
        lambda e: is_resolved(unravel(e), alpha, unravel(flat_alpha + e), sigma)
    )(noise)
    return jnp.where(jnp.all(is_shifted), error, jnp.nan)


def _sample_noise(
    key: Array, sigma: Array | float, num_pairs: int, flat_alpha: Float[Array, " N"]
) -> Float[Array, "n N"]:
    """Returns n perturbations with standard deviation ``sigma``."""
    shape = (num_pairs, flat_alpha.size)
    noise = jax.random.normal(key, shape, flat_alpha.dtype)
    return jnp.asarray(sigma * noise, flat_alpha.dtype)


def _mean_over_pairs(
    problem: Bilevel,
    perturbations: Float[Array, "n N"],
    differences: Float[Array, "n ..."],
    sigma: Array | float,
    unravel: Callable[[Array], PyTree],
) -> tuple[PyTree, Array]:
    """Returns the mean of ``e_i difference_i / (2 sigma^2)`` and its standard error.

    Args:
      problem: The problem.
      perturbations: The perturbations ``e_i``, or their sums.
      differences: Outer value of the first minus that of the second particle of each
        pair, ``[n]``, or ``[n, K]`` for K outer losses.
      sigma: Standard deviation of the perturbations.
      unravel: Function from ``[N]`` to the structure of ``alpha``.
    """
    is_multi_objective = problem.num_objectives is not None
    differences = differences if is_multi_objective else differences[:, None]
    weights = differences / (2 * sigma**2)
    samples = weights[:, :, None] * perturbations[:, None, :]  # [n, K, N]
    # The outer loss may return another dtype than that of alpha.
    samples = samples.astype(perturbations.dtype)
    mean = jnp.mean(samples, axis=0)
    error = standard_error(samples, mean, is_multi_objective=True)
    return (jax.vmap(unravel)(mean) if is_multi_objective else unravel(mean[0])), error
