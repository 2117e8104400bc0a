"""The estimator protocol, its estimates, and the reasons not to trust an estimate."""

from typing import Any, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..cost import COST_STATS
from ..display.tables import (
    ResultModule,
    Row,
    estimate_rows,
    holds_nonfinite,
    sentences_of_flags,
)
from ..problem import Bilevel
from ..trees import all_finite

STATS = (
    "inner_grad_norm",
    "num_inner_steps",
    "adjoint_residual",
    "ritz_min",
    "ritz_max",
    "error_estimate",
    "standard_error",
    "distance_to_implicit",
    *COST_STATS,
)

#: The sentence for each flag of the library, with a remedy in parentheses if there is
#: one. A flag that is not listed here, such as one of a third party's estimator, is its
#: own sentence.
REASONS = {
    "not_finite": (
        "a value or a derivative is not finite (hg.diagnose(problem, estimator, w, "
        "alpha) says where)"
    ),
    "not_converged": (
        "the inner solver stopped before it met its tolerance, after its last step or "
        "at the rounding of the loss (allow more steps or a larger tolerance, or use "
        "float64)"
    ),
    "adjoint_residual": (
        "the adjoint did not converge: adjoint_residual, or the last change of the "
        "hypergradient by its iterations, exceeds the tolerance (allow more steps or "
        "terms, or less damping; a series may need hg.CG() in its place, and a Hessian "
        "with negative curvature hg.MINRES())"
    ),
    "inner_error": (
        "w is too far from a stationary point of the inner loss: a Newton step, or "
        "further inner steps, change the hypergradient by more than the tolerance, or "
        "dL/dw does not change along it as the Hessian predicts (make more inner "
        "steps, or use hg.Newton() or num_newton_steps=1; smaller ones if the inner "
        "run diverges; smooth a kink of the loss)"
    ),
    "negative_curvature": (
        "the inner Hessian has negative curvature, so w is not a minimum (allow the "
        "inner solver more steps, start elsewhere, or add a penalty on w)"
    ),
    "ill_conditioned": (
        "rounding errors determine the adjoint, because the inner Hessian is "
        "ill-conditioned or dM/dw underflows in float16, or the hypergradient, because "
        "its parts cancel (use float64, center the data, or add a penalty on w)"
    ),
    "certificate": (
        "the certificate does not confirm the estimate (hg.certify at this w and alpha "
        "gives its reasons; judge a run of a single-loop method by its values)"
    ),
    "other_curvature": (
        "hvp_fn stands for the Hessian, whose spectrum is therefore unknown (use "
        "certify=True)"
    ),
    "no_error_estimate": (
        "the error was not estimated, by estimate_error=False (leave it out, or use "
        "certify=True)"
    ),
    "truncated": (
        "only the last inner steps were differentiated (for the whole run leave out "
        "truncation_length)"
    ),
    "out_of_range": (
        "a number is too large for the fixed-point integers, or the momentum is "
        "outside of its range (rescale w, or use hg.Unrolled)"
    ),
    "not_reversed": (
        "the reversed run did not return to its starting point (use hg.Unrolled)"
    ),
    "rounding_error": (
        "the run amplifies rounding errors, as a chaotic one does, its numbers do not "
        "resolve w, or the parts of the hypergradient cancel (lower the step size, or "
        "use a higher precision)"
    ),
    "difference_error": (
        "the errors of the differences are not measured (use hg.certify)"
    ),
    "unresolved_step": (
        "rounding changes the step epsilon by more than a tenth (choose a larger "
        "epsilon or other units for w, or use a higher precision)"
    ),
    "single_step": (
        "one step of a single-loop method does not solve the inner problem (use "
        "certify_every of hg.OuterLoop)"
    ),
    "random": "the estimate is a random sample whose bias is not measured",
    "standard_error": (
        "the samples differ too much: standard_error > 1e-2, or less for few samples "
        "(take more samples)"
    ),
    "biased": (
        "the bias of this estimator is not measured (use hg.certify, or certify_every "
        "of hg.OuterLoop)"
    ),
    "lost_derivative": (
        "a loss, the optimizer or init_fn uses stop_gradient, sign, round, a "
        "comparison or an integer made from w or alpha, whose derivative is treated as "
        "zero (use a smooth surrogate; hg.diagnose(problem, estimator, w, alpha) names "
        "the line)"
    ),
    "not_stated": "the estimator reports trusted=False and gives no reason",
    "unchecked": "the estimator does not check its estimates",
}


class Estimate(ResultModule):
    """A hypergradient estimate and its diagnostics.

    Attributes:
      value: Outer value at ``w``: a scalar, or ``[K]`` for K outer losses.
      hypergradient: Structured like ``alpha``; with K outer losses each leaf has a
        leading axis of size K.
      w: Inner solution at which the hypergradient was evaluated.
      stats: Scalar diagnostics, with the same keys for every estimator of this package;
        a statistic that does not apply is NaN.

        - ``inner_grad_norm``: ``||dL/dw||`` at ``w``; of most single-loop methods that
          before the inner steps (`SingleLoop`).
        - ``num_inner_steps``: Number of inner steps.
        - ``adjoint_residual``: ``||b - H v|| / ||b||``, the maximum over K losses; of
          ``S (b - H v)`` and ``S b`` where `Implicit` solves by the default `CG`; of a
          single-loop method before its steps of ``v``.
        - ``ritz_min``, ``ritz_max``: Estimates of the extreme eigenvalues of ``H``,
          or of the scaled ``S H S`` with the default `CG` or `MINRES`; the default `CG`
          in `Implicit` gives the extreme curvatures along its search directions.
        - ``error_estimate``: Estimated relative error of the hypergradient.
        - ``standard_error``: Relative standard error of a hypergradient that was
          sampled.
        - ``distance_to_implicit``: Relative distance of a derivative of the run from
          that at the argmin, by ``certify_every``; NaN if the certificate fails.
        - ``num_grads``, ``num_hvps``, ``num_values``, ``num_outer_grads``,
          ``num_outer_values``, ``num_examples``, ``gradient_equivalents``: The cost.
        - ``trusted``: The same as the attribute.
      flags: ``{name: bool}``, one per check of the estimator; True if it failed.
      key: PRNG key of the sample that the estimate saw, by which `certify` sees the
        same one; None if it is unknown, or a mean over several.

    >>> import hypergrad as hg
    >>> inner = lambda w, alpha, batch: (w - alpha) ** 2
    >>> outer = lambda w, alpha, batch: w**2
    >>> estimator = hg.Implicit(hg.Newton())
    >>> estimate = hg.hypergradient(hg.Bilevel(inner, outer), estimator)(0.0, 3.0)
    >>> float(estimate.value), float(estimate.hypergradient)
    (9.0, 6.0)
    >>> bool(estimate.trusted), estimate.reasons
    (True, ())
    """

    value: Array
    hypergradient: PyTree
    w: PyTree
    stats: dict[str, Array] = eqx.field(default_factory=dict)
    flags: dict[str, Array] = eqx.field(default_factory=dict)
    key: Array | None = None

    @property
    def trusted(self) -> Array:
        """True if no flag is; without flags ``stats["trusted"]``, or else False."""
        if self.flags:
            return ~jnp.any(jnp.stack(jnp.broadcast_arrays(*self.flags.values())), 0)
        return jnp.asarray(self.stats.get("trusted", False))

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the estimate is not trusted, in words; empty if it is trusted."""
        flags = normalize_flags(self.stats, self.flags)
        # An estimator that never trusts its estimates does not check this.
        if holds_nonfinite((self.value, self.hypergradient)):
            flags["not_finite"] = jnp.asarray(True)
        return sentences_of_flags(flags, REASONS, "estimate")

    def _rows(self) -> list[Row] | None:
        return estimate_rows(self)


class Estimator(Protocol):
    """Turns a problem into hypergradients, carrying an explicit state between calls.

    An estimator needs `init` and `estimate`. An `Estimate` needs ``value``,
    ``hypergradient`` and ``w``; missing statistics become NaN, and an estimate without
    ``flags`` or ``stats["trusted"]`` is not trusted. The library uses these further
    attributes if they exist:

    - ``target``: The derivative that is estimated: 'argmin' (default), at the
      stationary point of the inner loss, or 'solver', of the finite procedure that the
      inner solver is.
    - ``is_single_loop``: True if an estimate makes one step of ``w`` and only a run of
      them in `minimize` is meaningful. Defaults to False.
    - ``error_bound(eig_min, eig_max) -> float``: Relative error of the adjoint that the
      method admits on a Hessian with eigenvalues in that interval, or NaN if unknown.
      `hypergrad.testing.check_estimator` requires it.
    - ``refine(problem, state, alpha, key)``: Like `estimate`, but repeats the estimate
      that left ``state`` with more work, for ``on_untrusted="refine"``.
    - ``num_samples``: Number of samples of the problem's data in one estimate, whose
      keys are then ``jax.random.split(key, num_samples)``. Defaults to one, of ``key``.
    - ``citations``: Keys of ``references.bib``, for `hypergrad.citation`.
    - ``summary``: Tuple of `MethodSummary`, its rows in the guide.
    """

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> Any:
        """Returns the first state; raises an error for a problem it cannot handle."""
        ...

    def estimate(
        self, problem: Bilevel, state: Any, alpha: PyTree, key: Array
    ) -> tuple[Estimate, Any]:
        """Returns ``(estimate, next_state)``; pure, and usable inside ``jit``."""
        ...


def keys_of_samples(estimator: Any, key: Array) -> Array:
    """Returns the keys of the samples of an estimate, ``[num_samples]``."""
    num_samples = getattr(estimator, "num_samples", None) or 1
    return key[None] if num_samples == 1 else jax.random.split(key, num_samples)


def get_target(estimator: Any) -> str:
    """Returns what an estimator differentiates: 'argmin' or 'solver'."""
    return getattr(estimator, "target", "argmin")


def make_estimate(
    value: Array,
    hypergradient: PyTree,
    w: PyTree,
    flags: dict[str, Any],
    **stats: Any,
) -> Estimate:
    """Returns an estimate with all of `STATS`, NaN for those that are not given.

    Args:
      value, hypergradient, w: As in `Estimate`.
      flags: ``{name: bool}``, True if a check failed. Write a check as
        ``~(statistic <= tolerance)``, so that it fails for NaN.
      stats: Some of `STATS`.
    """
    flags = {name: jnp.asarray(flag) for name, flag in flags.items()}
    estimate = Estimate(value, hypergradient, w, make_stats(**stats), flags)
    estimate.stats["trusted"] = estimate.trusted
    return estimate


def make_stats(**stats: Any) -> dict[str, Array]:
    """Returns all of `STATS` as float scalars, NaN for those that are not given."""
    if unknown := set(stats) - set(STATS):
        raise KeyError(f"stats must be among {STATS}; got {sorted(unknown)}.")
    return {name: jnp.asarray(stats.get(name, jnp.nan), dtype=float) for name in STATS}


def normalize_estimate(estimate: Estimate) -> Estimate:
    """Returns the estimate with all statistics, flags and a finite-value check.

    Estimates of third parties may lack any of them. Statistics of their own are kept.
    """
    flags = normalize_flags(estimate.stats, estimate.flags)
    is_finite = all_finite(estimate.value, estimate.hypergradient)
    flags["not_finite"] = flags.get("not_finite", False) | ~is_finite
    standard_stats = {name: x for name, x in estimate.stats.items() if name in STATS}
    extra_stats = {
        name: jnp.asarray(x)
        for name, x in estimate.stats.items()
        if name not in STATS and name != "trusted"
    }
    flags = {name: jnp.asarray(flag, dtype=bool) for name, flag in flags.items()}
    estimate = Estimate(
        jnp.asarray(estimate.value),
        jax.tree.map(jnp.asarray, estimate.hypergradient),
        jax.tree.map(jnp.asarray, estimate.w),
        make_stats(**standard_stats) | extra_stats,
        flags,
        estimate.key,
    )
    estimate.stats["trusted"] = estimate.trusted
    return estimate


def normalize_flags(
    stats: dict[str, Array], flags: dict[str, Array]
) -> dict[str, Array]:
    """Returns the flags, or the one that stands for an estimator that sets none."""
    if flags:
        return dict(flags)
    if "trusted" in stats:
        return {"not_stated": ~jnp.asarray(stats["trusted"], dtype=bool)}
    return {"unchecked": jnp.asarray(True)}
