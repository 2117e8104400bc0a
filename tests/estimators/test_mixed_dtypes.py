"""Leaves of different precision in ``w`` and ``alpha``, for every estimator."""

import functools

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax
import pytest

import hypergrad as hg
from tests.parameters import slow_except

KEYS = jax.random.split(jax.random.key(0))
COEFFICIENTS = jnp.array([1.0, -2.0, 1.5, 0.5])


def regression_data(key):
    x = jax.random.normal(key, (20, 4))
    return x, x @ COEFFICIENTS + 0.1


def residuals(w, batch):
    x, y = batch
    wide = jax.tree.map(lambda leaf: leaf.astype(float), w)
    return x[:, :2] @ wide["a"] + x[:, 2:] @ wide["b"] - y


def inner_loss(w, alpha, batch):
    penalty = sum(
        jnp.sum(jnp.exp(alpha[name].astype(float)) * w[name].astype(float) ** 2)
        for name in ("a", "b")
    )
    return 0.5 * jnp.mean(residuals(w, batch) ** 2) + 0.5 * penalty


def outer_loss(w, alpha, batch):
    return 0.5 * jnp.mean(residuals(w, batch) ** 2)


PROBLEM = hg.Bilevel(inner_loss, outer_loss, *map(regression_data, KEYS))
SOLVER = hg.Descent(optax.sgd(0.2), 30)
#: The default tolerance is that of the coarsest leaf, at which the leaves in float64
#: would be compared with a solution in float64 that went further.
NEWTON = hg.Newton(tolerance=1e-6)
EXACT = {
    "Implicit": hg.Implicit(SOLVER),
    "Implicit, certified": hg.Implicit(SOLVER, certify=True),
    "Implicit, Newton": hg.Implicit(NEWTON, hg.Neumann(30)),
    "Implicit, LU of lineax": hg.Implicit(SOLVER, lineax.LU()),
    "Implicit, CG of lineax": hg.Implicit(SOLVER, lineax.CG(rtol=1e-8, atol=0)),
    "Unrolled": hg.Unrolled(SOLVER),
    "Unrolled, Adam": hg.Unrolled(hg.Descent(optax.adam(0.1), 30), checkpoint=True),
    "Forward": hg.Forward(SOLVER),
    "Reversible": hg.Reversible(0.2, 0.5, 30),
    "FixedPoint": hg.FixedPoint(SOLVER, 30),
    "Penalty": hg.Penalty(SOLVER, 2.0, symmetric=True),
    "Average": hg.Average(hg.Implicit(SOLVER), num_samples=2),
}
DIFFERENCES = {
    "FiniteDifference": hg.FiniteDifference(SOLVER, step_size=0.3),
    "CentralDifference": hg.CentralDifference(SOLVER),
    "Evolution": hg.Evolution(SOLVER, 0.3, 8),
}
DOUBLE = "float32 beside float64"
DTYPES = {
    DOUBLE: ({"a": "float32"}, {"b": "float32"}),
    "bfloat16 beside wider": ({"a": "bfloat16", "b": "float32"}, {"a": "bfloat16"}),
}


def run_estimator(estimator, w_dtypes, alpha_dtypes):
    """Returns the estimate; leaves whose dtype is not named are float64."""
    zeros = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    alpha = {"a": jnp.array([-0.5, 0.25]), "b": jnp.array([0.125, -0.75])}
    cast = lambda tree, dtypes: {
        name: leaf.astype(dtypes.get(name, "float64")) for name, leaf in tree.items()
    }
    gradient_fn = hg.hypergradient(PROBLEM, estimator)
    return gradient_fn(cast(zeros, w_dtypes), cast(alpha, alpha_dtypes))


@functools.cache
def double_precision_hypergradient(name):
    return run_estimator(ALL[name], {}, {}).hypergradient


ALL = EXACT | DIFFERENCES
CASES = [(name, kind) for name in ALL for kind in DTYPES]
LONG_PROGRAMS = "Implicit, certified", "Implicit, Newton", "Average"
FAST = [
    ("Implicit", "bfloat16 beside wider"),
    *((name, DOUBLE) for name in ALL if name not in LONG_PROGRAMS),
]


@pytest.mark.parametrize(("name", "kind"), slow_except(CASES, FAST))
def test_mixed_precision_has_the_error_of_the_coarsest_leaf(name, kind):
    """Each leaf equals that in float64 to ``4 eps`` of its norm.

    Differences over a step of ``eps^(1/3)`` have the rounding error ``eps^(2/3) M``.
    `Reversible` refuses float64 beside shorter leaves in ``w``.
    """
    w_dtypes, alpha_dtypes = DTYPES[kind]
    estimator = ALL[name]
    if name == "Reversible" and "b" not in w_dtypes:
        with pytest.raises(ValueError, match="one dtype"):
            run_estimator(estimator, w_dtypes, alpha_dtypes)
        return
    estimate = run_estimator(estimator, w_dtypes, alpha_dtypes)
    eps = float(jnp.finfo(w_dtypes["a"]).eps)
    rtol, atol = (4 * eps, 0) if name in EXACT else (0, eps ** (2 / 3) * estimate.value)
    for leaf, expected in double_precision_hypergradient(name).items():
        actual = estimate.hypergradient[leaf]
        assert actual.dtype == alpha_dtypes.get(leaf, "float64")
        error = np.linalg.norm(actual.astype(float) - expected)
        assert error <= atol + rtol * np.linalg.norm(expected), leaf


SUM_ESTIMATORS = {
    "Unrolled": hg.Unrolled(hg.Descent(optax.sgd(1e-3), 3000)),
    "Unrolled, stored": hg.Unrolled(
        hg.Descent(optax.sgd(1e-3), 3000), checkpoint=False
    ),
    "Unrolled, truncated": hg.Unrolled(
        hg.Descent(optax.sgd(1e-3), 3100), truncation_length=3000
    ),
    "Forward": hg.Forward(hg.Descent(optax.sgd(1e-3), 3000)),
    "Reversible": hg.Reversible(5e-4, 0.5, 3000),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", SUM_ESTIMATORS)
def test_contributions_of_many_steps_are_summed_in_float32(name, dtype):
    """3,000 steps of size 1e-3 along alpha move ``w`` by ``3 alpha``.

    A sum in bfloat16 stalls at 0.5, where half a unit in the last place is 1e-3.
    """
    problem = hg.Bilevel(
        lambda w, alpha, batch: -jnp.sum(w * alpha.astype(float)),
        lambda w, alpha, batch: jnp.sum(w),
    )
    gradient_fn = hg.hypergradient(problem, SUM_ESTIMATORS[name])
    estimate = gradient_fn(jnp.zeros(1), jnp.ones(1, dtype))
    np.testing.assert_allclose(estimate.hypergradient.astype(float), 3.0, rtol=4e-3)


@pytest.mark.parametrize("make", [hg.Unrolled, hg.Forward, hg.Implicit])
@pytest.mark.parametrize(
    ("factor", "is_trusted"), [(1.0, True), (1e-6, False), (1e-8, False)]
)
def test_an_outer_gradient_that_underflows_is_not_trusted(make, factor, is_trusted):
    """The smallest number of float16 is 6e-8, and below 6e-5 digits are lost."""
    widen = lambda w: w.astype("float32")
    inner = lambda w, alpha, batch: 0.5 * jnp.sum((widen(w) - alpha) ** 2)
    outer = lambda w, alpha, batch: factor * jnp.sum((widen(w) - 2) ** 2)
    w, alpha = jnp.zeros(3, "float16"), jnp.ones(3, "float32")
    problem = hg.Bilevel(inner, outer)
    estimator = make(hg.Descent(optax.sgd(0.5), 20))
    estimate = hg.hypergradient(problem, estimator)(w, alpha)
    assert estimate.trusted == is_trusted
    certificate = hg.certify(problem, estimate.w, alpha, estimate.hypergradient)
    assert certificate.trusted == is_trusted


def test_an_outer_loss_without_w_is_trusted_in_float16():
    """Its gradient is zero, and nothing is lost."""
    inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    problem = hg.Bilevel(inner, lambda w, alpha, batch: jnp.sum(alpha**2))
    w = alpha = jnp.ones(3, "float16")
    estimate = hg.hypergradient(problem, hg.Implicit(SOLVER))(w, alpha)
    assert estimate.trusted
    assert hg.certify(problem, w, alpha, estimate).trusted


NO_STEPS = hg.Descent(optax.sgd(0.0), 0)


def test_parts_that_cancel_in_the_digits_of_w_are_not_trusted():
    """``h = dM/dalpha - J'v`` is ``difference``; ``v`` is 1/3 in float32."""
    difference = 1e-7
    inner = lambda w, alpha, batch: 0.5 * (w - alpha) ** 2
    outer = lambda w, alpha, batch: w / 3 - (1 / 3 - difference) * alpha
    problem = hg.Bilevel(inner, outer)
    w, alpha = jnp.ones((), "float32"), jnp.ones((), "float64")
    estimate = hg.hypergradient(problem, hg.Implicit(NO_STEPS))(w, alpha)
    assert abs(estimate.hypergradient / difference - 1) > 0.05
    assert estimate.flags["ill_conditioned"]
    assert not hg.certify(problem, w, alpha, estimate).trusted


def test_a_slow_direction_below_the_rounding_of_float16_is_seen():
    """After one step the residual is 4 eps, and 3/8 of the hypergradient are missing.

    H has the eigenvalue 1 - 2 ratio = 0.0098 along ``(1, 1, 1)``, and ``b`` is almost
    orthogonal to it. The truth is ``1 + 3 small / 0.0098``.
    """
    ratio, small = 507 / 1024, 2.0**-9
    H = ((1 + ratio) * jnp.eye(3) - ratio * jnp.ones((3, 3))).astype("float16")
    b = jnp.array([1 + small, -1 + small, small], "float16")
    inner = lambda w, alpha, batch: w @ H @ w / 2 - alpha * jnp.sum(w)
    problem = hg.Bilevel(inner, lambda w, alpha, batch: b @ w + alpha)
    w, alpha = jnp.zeros(3, "float16"), jnp.zeros((), "float16")
    estimate = hg.hypergradient(problem, hg.Implicit(NO_STEPS))(w, alpha)
    truth = 1 + 3 * small / (1 - 2 * ratio)
    is_right = abs(estimate.hypergradient / truth - 1) <= 0.02
    assert is_right or not estimate.trusted


def test_a_float64_leaf_does_not_hide_that_others_are_ill_conditioned():
    """The condition number of ``w["a"]`` in float32 is that of features around 1000."""
    key = jax.random.key(0)
    x = 1000 + jax.random.normal(key, (40, 10), "float32")
    y = x @ jnp.linspace(-1, 1, 10, dtype="float32")

    def fit(w):
        return 0.5 * jnp.mean((x @ w["a"] - y) ** 2)

    def inner(w, alpha, batch):
        penalty = 0.5 * jnp.sum(jnp.exp(alpha) * w["a"] ** 2)
        return fit(w) + penalty + 0.5 * (w["c"] - 1) ** 2

    problem = hg.Bilevel(inner, lambda w, alpha, batch: fit(w) + w["c"] ** 2)
    gradient_fn = hg.hypergradient(problem, hg.Implicit(NO_STEPS))
    w = {"a": jnp.zeros(10, "float32"), "c": jnp.ones((), "float64")}
    estimate = gradient_fn(w, jnp.full(10, -4.0, "float32"))
    assert estimate.flags["ill_conditioned"]
