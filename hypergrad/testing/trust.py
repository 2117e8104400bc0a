"""Tests of ``trusted`` on random problems with known hypergradients."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..certificate import TRUST_RTOL
from ..estimators.base import Estimator
from ..hypergradient import hypergradient
from ..trees import relative_error
from .trust_problems import FAMILIES, UNIT_EXPONENTS, Trial, cast_trial, make_trial

MAX_FALSE_TRUST, MIN_RECALL = 6e-3, 0.98
#: Families whose minima are not points, so that the Hessian has zero eigenvalues there,
#: and negative ones nearby: `Implicit` refuses some accurate estimates of them.
DEGENERATE_FAMILIES = "factorization", "distances", "diagonal network"
DEFAULT_FAMILIES = tuple(name for name in FAMILIES if name not in DEGENERATE_FAMILIES)


class TrustCounts(NamedTuple):
    """The numbers of estimates that `trust_counts` found trusted, right and wrong.

    Attributes:
      num_problems: Number of problems with a known hypergradient.
      num_trusted: Number of estimates that were trusted.
      num_false: Number of trusted estimates with an error above 2e-2.
      num_accurate: Number of estimates at a minimum with an error below 1e-3.
      num_recalled: Number of these that were trusted.
      num_measurable: Number of estimates at a minimum with an error of 1e-6 to 1.
      num_sharp: Number of these whose ``error_estimate`` was within a factor of two of
        the error.
    """

    num_problems: int
    num_trusted: int
    num_false: int
    num_accurate: int
    num_recalled: int
    num_measurable: int
    num_sharp: int

    def __add__(self, other: Any) -> "TrustCounts":
        """Returns the counts of both sets of problems."""
        return TrustCounts(*(a + b for a, b in zip(self, other, strict=True)))


def check_trust(
    estimator: Estimator,
    *,
    families: Sequence[str] = DEFAULT_FAMILIES,
    num_problems: int = 100,
    dtype: Any = "float64",
    key: Array | None = None,
) -> TrustCounts:
    """Raises AssertionError unless ``trusted`` can be relied on, in any units.

    Each problem is drawn from one of eleven families: ridge, logistic and softmax
    regression, a network, smooth problems whose Hessians have clusters of eigenvalues,
    a wide range of them, one small, one negative or three zero ones, and logistic and
    ridge regression on 60 and 100 correlated features. ``w`` starts near the minimum or
    where gradient descent left it, in units of 1e-6 to 1e6; the losses have factors of
    up to 1e6, and a third of the problems have a large parameter without influence.

    Args:
      estimator: The estimator. Its inner solver starts from the ``w`` of the problem; a
        solver without steps leaves it there, which tests the rules of trust alone.
      families: Names of the families. There are three more, ``'factorization'`` of a
        matrix, points with given ``'distances'``, and ``'diagonal network'``, whose
        minima are not strict, so that accurate estimates may be refused.
      num_problems: Number of problems of each family.
      dtype: Precision of the estimates.
      key: PRNG key of the problems. Defaults to ``jax.random.key(0)``.

    Returns:
      The counts over all families.

    Raises:
      AssertionError: More than 6 of 1,000 trusted estimates are off by more than 2e-2,
        or fewer than 98% of those within 1e-3 are trusted.
      ValueError: A family has another name, or ``jax_enable_x64`` is off.

    >>> import optax, hypergrad as hg
    >>> from hypergrad.runtime import compat
    >>> estimator = hg.Implicit(hg.Descent(optax.sgd(0.0), 0))
    >>> with compat.enable_x64(True):
    ...     counts = hg.testing.check_trust(
    ...         estimator, families=["ridge"], num_problems=20
    ...     )
    >>> counts.num_false
    0
    """
    for family in families:
        _check_family(family)
    keys = jax.random.split(jax.random.key(0) if key is None else key, len(families))
    counts = [
        trust_counts(estimator, family, num_problems, dtype=dtype, key=family_key)
        for family, family_key in zip(families, keys, strict=True)
    ]
    total = sum(counts, TrustCounts(0, 0, 0, 0, 0, 0, 0))
    if total.num_false > MAX_FALSE_TRUST * total.num_trusted:
        raise AssertionError(
            f"at most {MAX_FALSE_TRUST:.1%} of the trusted estimates may be off by "
            f"more than 2e-2; {total.num_false} of {total.num_trusted} are."
        )
    if total.num_recalled < MIN_RECALL * total.num_accurate:
        raise AssertionError(
            f"at least {MIN_RECALL:.0%} of the estimates within 1e-3 must be trusted; "
            f"{total.num_recalled} of {total.num_accurate} are."
        )
    return total


def trust_counts(
    estimator: Estimator, family: str, num_problems: int, *, dtype: Any, key: Array
) -> TrustCounts:
    """Returns how often ``trusted`` is right on random problems of one family.

    Problems on which Newton's method with dense derivatives does not converge to a
    minimum are left out, except saddles, at which no estimate should be trusted unless
    it is accurate.

    Args:
      estimator, family, num_problems, dtype, key: As for `check_trust`.
    """
    _check_family(family)
    keys = jax.random.split(key, num_problems)
    sample = lambda key: make_trial(FAMILIES[family], key)
    trials = jax.jit(jax.vmap(sample))(keys)
    estimate_fn = _make_estimate_fn(estimator, dtype)
    actual, trusted, error_estimate = estimate_fn(trials)
    error = _errors(actual, trials)
    is_minimum = np.asarray(trials.is_minimum)
    has_answer = _has_answer(family, trials)
    trusted = has_answer & np.asarray(trusted)
    is_accurate = has_answer & is_minimum & (error < TRUST_RTOL / 10)
    is_measurable = has_answer & is_minimum & (error > 1e-6) & (error < 1)
    factor = np.asarray(error_estimate) / np.where(is_measurable, error, 1.0)
    is_sharp = is_measurable & (factor > 0.5) & (factor < 2)
    return TrustCounts(
        num_problems=int(np.sum(has_answer)),
        num_trusted=int(np.sum(trusted)),
        num_false=int(np.sum(trusted & ~(error <= 2 * TRUST_RTOL))),
        num_accurate=int(np.sum(is_accurate)),
        num_recalled=int(np.sum(is_accurate & trusted)),
        num_measurable=int(np.sum(is_measurable)),
        num_sharp=int(np.sum(is_sharp)),
    )


class UnitCounts(NamedTuple):
    """The number of decisions that depend on the units of ``w``.

    Attributes:
      num_problems: Number of problems with a known hypergradient.
      num_changed: Number of those trusted in one of two units and not in the other.
      num_false: Number of these with an error above 2e-2 where they were trusted.
    """

    num_problems: int
    num_changed: int
    num_false: int


def unit_counts(
    estimator: Estimator, family: str, num_problems: int, *, dtype: Any, key: Array
) -> UnitCounts:
    """Returns how many decisions change between equal units and units of 1e-6 to 1e6.

    Args:
      estimator, family, num_problems, dtype, key: As for `trust_counts`, with the same
        problems but for their units.
    """
    _check_family(family)
    keys = jnp.tile(jax.random.split(key, num_problems), 2)
    unit_exponents = jnp.repeat(jnp.array([0.0, max(UNIT_EXPONENTS)]), num_problems)
    sample = lambda key, exponent: make_trial(FAMILIES[family], key, exponent)
    trials = jax.jit(jax.vmap(sample))(keys, unit_exponents)
    estimate_fn = _make_estimate_fn(estimator, dtype)
    narrow, wide = (
        jax.tree.map(lambda leaf, rows=rows: leaf[rows], trials)
        for rows in (slice(num_problems), slice(num_problems, None))
    )
    has_answer = _has_answer(family, narrow)
    trusted, is_false = [], np.zeros(num_problems, bool)
    for in_units in (narrow, wide):
        actual, is_trusted, _ = estimate_fn(in_units)
        trusted.append(has_answer & np.asarray(is_trusted))
        is_false |= trusted[-1] & ~(_errors(actual, in_units) <= 2 * TRUST_RTOL)
    has_changed = trusted[0] != trusted[1]
    return UnitCounts(
        num_problems=int(np.sum(has_answer)),
        num_changed=int(np.sum(has_changed)),
        num_false=int(np.sum(has_changed & is_false)),
    )


def _check_family(family: str) -> None:
    """Raises an error unless a family exists and float64 is enabled."""
    if family not in FAMILIES:
        raise ValueError(
            f"families must be among {', '.join(FAMILIES)}; got {family!r}."
        )
    if jnp.result_type(float) != jnp.float64:
        raise ValueError(
            "jax_enable_x64 must be on, because the exact hypergradients are computed "
            "in float64. Call jax.config.update('jax_enable_x64', True) first."
        )


def _make_estimate_fn(
    estimator: Estimator, dtype: Any
) -> Callable[[Trial], tuple[Array, Array, Array]]:
    """Returns the function from trials to hypergradients, trust and error estimates."""

    def run(trial):
        estimate = hypergradient(trial.problem, estimator)(trial.w, trial.alpha)
        error_estimate = estimate.stats["error_estimate"]
        return estimate.hypergradient, estimate.trusted, error_estimate

    run_all = jax.jit(jax.vmap(run))
    return lambda trials: run_all(cast_trial(trials, dtype))


def _errors(actual: Array, trials: Trial) -> np.ndarray:
    """Returns the relative errors of hypergradients."""
    exact = trials.hypergradient
    return np.asarray(jax.vmap(relative_error)(actual.astype(exact.dtype), exact))


def _has_answer(family: str, trials: Trial) -> np.ndarray:
    """Returns for which problems the hypergradient is known."""
    is_finite = np.isfinite(trials.hypergradient).all(axis=1)
    return is_finite & (np.asarray(trials.is_minimum) | (family == "saddle"))
