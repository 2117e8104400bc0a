"""Reverse mode through the inner run, and the choice between both modes."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from ..checks.lost_derivatives import lost_in_step_flags
from ..checks.problem import check_steps_use_alpha
from ..implicit.minimum import is_cancelled
from ..inner.base import IterativeSolver, grads_per_step
from ..inner.descent import has_segments, split_steps
from ..inner.storage import StepSizes, Storage, choose_storage
from ..keys_in_w import bind_keys
from ..losses_with_w import losses_with_w, pull_back_losses
from ..method_summary import MethodSummary
from ..number_checks import boolean, check_positive_int
from ..problem import Bilevel, EstimateData
from ..trees import all_finite, safe_norm
from ..validation import KEY_SHAPE
from .forward import Forward
from .inner_run import (
    InnerRunState,
    RunDerivative,
    RunEstimator,
    check_differentiable,
    check_differentiable_run,
    make_final_w_fn,
)
from .rounding import (
    amplifies_rounding_in_reverse_mode,
    perturb_iterate,
    zero_perturbation,
)

MAX_FORWARD_PARAMS = 3
MAX_STORED_BYTES = 1_500_000_000


class Unrolled(RunEstimator):
    """The derivative of ``M(w_T(alpha), alpha)`` by reverse mode through the run.

    Args:
      solver: Inner solver with differentiable iterations: `Descent`, `ClosedForm`, a
        constant-step solver from jaxopt, or your own.
      truncation_length: Number of last steps that are differentiated (K). Defaults to
        all steps.
      checkpoint: True to store only ``2 sqrt(T)`` carries and to repeat the steps
        between them in the reverse pass, False to store all values that the reverse
        pass of every step needs. Defaults to None, which chooses the storage with the
        fewest operations in ``max_stored_bytes``.
      max_stored_bytes: Number of bytes that the choice may store of one run, without
        the data. Defaults to 1.5e9. A batch of estimates by `jax.vmap` stores as many
        for each of them.
      warm_start: Whether each run starts where the previous run ended, so that the
        differentiated procedure is T more steps. Defaults to None, which means True
        unless the solver depends on ``alpha``: learning rates and schedules are
        compared from the same starting point. The starting point is a constant of the
        derivative, unless the problem's ``init_fn`` computes it from ``alpha``.
      outer_batch_size: Number of examples for the outer gradient, sampled once per
        estimate. Defaults to all examples.

    Cost: T inner gradients forward; one Hessian-vector product with its cross term per
      differentiated step in the reverse pass, for each outer loss that uses ``w``; with
      checkpoints one more gradient each.
    Memory: `storage` states the bytes. Stored are, in this order of choice, the
      intermediate values of T steps; T carries, with the gradients if the update is not
      linear in them; ``2 sqrt(T)`` carries. Where only carries are stored, the product
      is one forward derivative of one gradient (`hypergrad.products.with_mixed_mode`),
      which takes half a gradient more than a reverse pass through stored values.
    Target: solver. The derivative includes every dependence of the optimizer, the
      losses and ``init_fn`` on ``alpha``.
    Bias: none for the finite run, which does not reach the stationary point if it stops
      early. ``truncation_length=K`` drops the contributions of older steps, a relative
      ``q^K`` if each step contracts by ``q``; such an estimate is never trusted. Its
      ``error_estimate`` extrapolates the contributions of the last K steps as a
      geometric series. It misses steps that contribute only earlier, and
      contributions that grow. A leaf of ``alpha`` that the state of the optimizer
      holds, as with `optax.inject_hyperparams`, raises ValueError if K < T, because the
      state before the last K steps is a constant.
    Trust: values are finite, no derivative is lost, and the steps do not amplify
      rounding errors, so that a chaotic run is not trusted: the rounding of the
      iterates must not change the outer value by more than 1%, or in more than half of
      its digits. In bfloat16 and float16 the errors of all steps are taken to add up,
      so that few runs of more than some ten steps are trusted.
      The reverse pass yields this for one product of vectors like ``w`` per step. The
      two parts of the hypergradient must not cancel up to rounding. Rounding that
      changes ``dM/dw`` more than ``M`` is not seen; the page on trust has examples.

    Source: Franceschi et al. 2017 (arXiv 1703.01785), algorithm 1; truncation from
    Shaban et al. 2019 (arXiv 1810.10667); checkpoints from Griewank & Walther 2000;
    mixed mode from Kemaev et al. 2025 (arXiv 2505.00793).

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - 3 * alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum(w**2)
    >>> estimator = hg.Unrolled(hg.Descent(optax.sgd(0.5), 100))
    >>> estimate = hg.hypergradient(hg.Bilevel(inner, outer), estimator)(0.0, 1.0)
    >>> round(float(estimate.hypergradient), 3)
    9.0
    """

    solver: IterativeSolver
    truncation_length: int | None = eqx.field(static=True, default=None)
    checkpoint: bool | None = eqx.field(
        static=True, default=None, converter=boolean("checkpoint", optional=True)
    )
    max_stored_bytes: int = eqx.field(static=True, default=MAX_STORED_BYTES)

    citations = ("franceschi2017", "shaban2019", "griewank2000", "kemaev2025")
    summary = (
        MethodSummary(
            "Unrolled(solver)",
            num_grads="T + 1",
            num_hvps="T",
            memory="T steps, T carries or 2 sqrt(T) carries",
            bias="none",
            alpha_in=("losses", "optimizer", "start"),
            recommended_for=(
                "alpha in the optimizer or start, a loop that stops early on purpose"
            ),
            not_recommended_for="very long runs, solvers with a line search",
            reason=(
                "the derivative of the run itself; of the three memories the first "
                "that fits into 1.5 GB, and only the last makes steps twice"
            ),
        ),
        MethodSummary(
            "Unrolled(solver, truncation_length=K)",
            num_grads="T + 1",
            num_hvps="K",
            memory="K steps, K carries or 2 sqrt(K) carries",
            bias="q^K",
            alpha_in=("losses", "optimizer"),
            recommended_for="long runs that end near a minimum",
            not_recommended_for="learning rates and schedules, decided by early steps",
            reason="older steps are dropped: without contraction the sign may be wrong",
        ),
    )

    def __check_init__(self):
        check_differentiable(self.solver)
        check_positive_int("truncation_length", self.truncation_length, optional=True)
        check_positive_int("max_stored_bytes", self.max_stored_bytes, minimum=0)

    @property
    def num_backward_steps(self) -> int:
        """Number of steps that are differentiated."""
        num_steps = self.solver.num_steps
        if self.truncation_length is None:
            return num_steps
        return min(self.truncation_length, num_steps)

    @property
    def is_truncated(self) -> bool:
        """True if some steps are not differentiated."""
        return self.num_backward_steps < self.solver.num_steps

    @property
    def differentiates_init(self) -> bool:
        """True if the derivative reaches the starting point of the run."""
        return not self.is_truncated

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """Returns 0, or NaN if truncated, as only the solver knows its step size."""
        return 0.0 if self.truncation_length is None else float("nan")

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> InnerRunState:
        """Returns the state in which the first run starts from ``w``."""
        check_differentiable_run(self.solver, problem, w, alpha)
        if self.is_truncated:
            advice = (
                "and neither do the last steps of the optimizer, which are the ones "
                "that are differentiated. Remove it from alpha"
            )
            check_steps_use_alpha(self.solver, problem, w, alpha, advice)
        return super().init(problem, w, alpha, key)

    def storage(self, problem: Bilevel, w: PyTree, alpha: PyTree) -> Storage:
        """Returns what the reverse pass of an estimate stores, and its bytes.

        Args:
          problem: The problem.
          w, alpha: Arguments of the estimate, or their shapes.

        >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
        >>> loss = lambda w, alpha, batch: jnp.sum(jnp.cosh(w - alpha))
        >>> problem = hg.Bilevel(loss, loss)
        >>> w = jax.ShapeDtypeStruct((10**6,), jnp.float32)
        >>> for num_steps in (10, 300, 10_000):
        ...     estimator = hg.Unrolled(hg.Descent(optax.sgd(0.1), num_steps))
        ...     print(estimator.storage(problem, w, w))
        Storage(checkpoint=False, mixed_mode=False, num_bytes=80000040)
        Storage(checkpoint=False, mixed_mode=True, num_bytes=1200002400)
        Storage(checkpoint=True, mixed_mode=True, num_bytes=800001600)
        """
        problem, w = bind_keys(problem, w)
        inner_data, _ = eqx.filter_eval_shape(Bilevel.sample_data, problem, KEY_SHAPE)
        storage_fn = lambda *args: self._choose_storage(*args)
        return eqx.filter_eval_shape(storage_fn, problem, w, alpha, inner_data)

    def _choose_storage(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, inner_data: PyTree
    ) -> Storage:
        args = self.solver, problem.inner_loss, w, alpha, inner_data
        sizes = StepSizes(*args)
        if not self.is_truncated:
            # The perturbation of a step, a factor of its iterate, stores the iterate.
            sizes = StepSizes(*args, perturb_iterate, zero_perturbation(w))
        return choose_storage(
            sizes, self.num_backward_steps, self.checkpoint, self.max_stored_bytes
        )

    def differentiate(
        self, problem: Bilevel, data: EstimateData, w: PyTree, alpha: PyTree
    ) -> RunDerivative:
        """Returns the derivative by one run forward and one reverse pass."""
        storage = self._choose_storage(problem, w, alpha, data.inner_data)
        final_w_fn = make_final_w_fn(
            self.solver,
            problem,
            data,
            w,
            truncation_length=self.truncation_length,
            checkpoint=storage.checkpoint,
            mixed_mode=storage.mixed_mode,
        )
        # The two halves of the steps of a truncated run have copies of alpha, so that
        # their contributions are known separately.
        halves = (alpha, alpha) if self.is_truncated else None
        relative_change = None if self.is_truncated else zero_perturbation(w)
        final_w, pullback = jax.vjp(final_w_fn, alpha, halves, relative_change)
        outer_batch = data.outer_batch(self.outer_batch_size)
        value, outer_grad, direct = problem.outer_value_and_grads(
            final_w, alpha, outer_batch
        )
        reversed_losses = losses_with_w(problem, final_w, alpha, outer_batch)
        indirect, halves, derivative = pull_back_losses(
            problem, pullback, outer_grad, reversed_losses
        )
        # dF/dalpha = dM/dalpha + (dw_T/dalpha)' dM/dw
        hypergradient = optax.tree.add(direct, indirect)
        num_steps, num_backward = self.solver.num_steps, self.num_backward_steps
        lost = lost_in_step_flags(self.solver, problem, w, alpha)
        if self.is_truncated:
            hypergradient = functools.reduce(optax.tree.add, halves, hypergradient)
            error_fn = functools.partial(truncation_error, num_backward, num_steps)
            errors = problem.for_each_loss(error_fn)(hypergradient, *halves)
            error_estimate = jnp.max(errors)
            # Constants, so that the estimate can be known to be untrusted.
            flags = {"truncated": True, **lost}
            segments = split_steps(num_backward)
        else:
            check_fn = functools.partial(
                amplifies_rounding_in_reverse_mode,
                init_w=problem.init_inner(w, alpha),
                final_w=final_w,
            )
            is_amplified = problem.for_each_loss(check_fn)(derivative, outer_grad)
            cancels = functools.partial(is_cancelled, adjoint=final_w)
            is_lost = problem.for_each_loss(cancels)(hypergradient, indirect)
            error_estimate = 0.0
            flags = {
                "not_finite": ~all_finite(value, hypergradient, final_w),
                "rounding_error": jnp.any(is_amplified | is_lost),
                **lost,
            }
            segments = (num_backward,)
        num_recomputed = sum(
            n for n in segments if storage.checkpoint and has_segments(n)
        )
        num_grads = grads_per_step(self.solver)
        return RunDerivative(
            value,
            hypergradient,
            final_w,
            flags,
            num_steps=num_steps,
            num_grads=num_grads * (num_steps + num_recomputed),
            num_hvps=num_grads * num_backward * len(reversed_losses),
            error_estimate=error_estimate,
        )


def truncation_error(
    truncation_length: int,
    num_steps: int,
    hypergradient: PyTree,
    older: PyTree,
    newer: PyTree,
) -> Array:
    """Estimates the relative contribution of the steps that truncation drops.

    Let each step contribute ``q`` times as much as the step after it. If ``older`` is
    the sum of n contributions, the T - K dropped steps before these contribute

        ||older|| q^n (1 - q^(T - K)) / (1 - q^n).

    Args:
      truncation_length: Number of differentiated steps (K).
      num_steps: Number of all steps (T).
      hypergradient: Sum of the contributions of the differentiated steps.
      older, newer: Contributions of the older and of the newer half of these steps.

    Returns:
      A scalar; NaN for a single step, which has no halves to compare.
    """
    n, num_between, _ = split_steps(truncation_length)
    if n == 0:
        return jnp.asarray(jnp.nan)
    # ||older|| / ||newer|| = q^(n + num_between), the distance between the halves.
    older_norm = safe_norm(older)
    q = (older_norm / safe_norm(newer)) ** (1 / (n + num_between))
    num_dropped = num_steps - truncation_length
    series = q**n * (1 - q**num_dropped) / (1 - q**n)
    series = jnp.where(q == 1, num_dropped / n, series)
    error = older_norm * series / safe_norm(hypergradient)
    return jnp.where(older_norm == 0, 0.0, error)


def unrolled_estimator(
    solver: IterativeSolver,
    alpha: PyTree,
    *,
    warm_start: bool | None = None,
    outer_batch_size: int | None = None,
) -> Forward | Unrolled:
    """Returns the estimator through all steps, in the mode that suits ``alpha``.

    Args:
      solver: Inner solver with differentiable iterations.
      alpha: Hyperparameters of the intended structure, or their shapes; N numbers in
        total.
      warm_start, outer_batch_size: As in `Unrolled`.

    Returns:
      `Forward` if N is at most 3: T gradients and (N + 1) T products, batched, in
      memory that does not grow with T. Else `Unrolled`: T gradients and T products for
      any N, and T gradients more with checkpoints. Both are exact.

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> solver = hg.Descent(optax.sgd(0.1), 1000)
    >>> type(hg.unrolled_estimator(solver, {"log_rate": 0.0})).__name__
    'Forward'
    >>> type(hg.unrolled_estimator(solver, jnp.zeros(50))).__name__
    'Unrolled'
    """
    num_params = sum(map(np.size, jax.tree.leaves(alpha)))
    estimator = Forward if num_params <= MAX_FORWARD_PARAMS else Unrolled
    return estimator(solver, warm_start=warm_start, outer_batch_size=outer_batch_size)
