"""Estimates of runs and of fixed points that rounding, kinks or chance spoil."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import hypergrad as hg
from hypergrad.estimators.error_estimates import max_standard_error

RUNS = {"Unrolled": hg.Unrolled, "Forward": hg.Forward}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", RUNS)
def test_lost_steps_of_short_floats_are_not_trusted(name, seed, dtype):
    """Steps below half a unit in the last place are lost, all in one direction.

    The same run in float64 tells how far they lead.
    """
    keys = jax.random.split(jax.random.key(seed), 2)
    x = jax.random.normal(keys[0], (40, 3))
    data = x, x @ jax.random.normal(keys[1], (3,))

    def inner(w, alpha, batch):
        x, y = (array.astype(w.dtype) for array in batch)
        return jnp.mean((x @ w - y) ** 2) + alpha * jnp.sum(w**2)

    outer = lambda w, alpha, batch: jnp.sum(w**2)
    estimator = RUNS[name](hg.Descent(optax.sgd(0.01), 200))
    gradient_fn = hg.hypergradient(hg.Bilevel(inner, outer, data), estimator)
    exact = gradient_fn(jnp.ones(3), jnp.asarray(0.5))
    short = gradient_fn(jnp.ones(3, dtype), jnp.asarray(0.5, dtype))
    error = abs(float(short.hypergradient / exact.hypergradient) - 1)
    assert exact.trusted
    assert error <= 0.02 or short.flags["rounding_error"]
    if dtype == "bfloat16":
        assert error > 0.02


@pytest.mark.parametrize("name", RUNS)
def test_a_short_run_in_bfloat16_is_trusted(name):
    """Steps that halve the distance forget the rounding of earlier ones."""
    loss = lambda w, alpha, batch: 0.5 * jnp.sum((w - 3 * alpha) ** 2)
    outer = lambda w, alpha, batch: 0.5 * jnp.sum(w**2)
    estimator = RUNS[name](hg.Descent(optax.sgd(0.5), 6))
    estimate = hg.hypergradient(hg.Bilevel(loss, outer), estimator)(
        jnp.zeros((), jnp.bfloat16), jnp.ones((), jnp.bfloat16)
    )
    assert estimate.trusted
    expected = (3 * (1 - 0.5**6)) ** 2
    np.testing.assert_allclose(float(estimate.hypergradient), expected, rtol=0.02)


@pytest.mark.parametrize(
    "estimator",
    [
        pytest.param(hg.Unrolled(hg.Descent(optax.sgd(0.3), 60)), id="Unrolled"),
        pytest.param(hg.Forward(hg.Descent(optax.sgd(0.3), 60)), id="Forward"),
        pytest.param(hg.Reversible(0.3, 0.5, 60), id="Reversible"),
        pytest.param(
            hg.FixedPoint(hg.Descent(optax.sgd(0.3), 60), 60), id="FixedPoint"
        ),
    ],
)
def test_parts_that_cancel_are_not_trusted(estimator):
    """``dM/dalpha = 0.1 - 1e6``, and ``dw/dalpha dM/dw = 1e6``."""
    inner = lambda w, alpha, batch: 0.5 * (w - alpha) ** 2
    outer = lambda w, alpha, batch: 1e6 * (w - alpha) + 0.1 * alpha
    gradient_fn = hg.hypergradient(hg.Bilevel(inner, outer), estimator)
    single = gradient_fn(jnp.float32(0), jnp.float32(1.3))
    double = gradient_fn(jnp.float64(0), jnp.float64(1.3))
    assert abs(single.hypergradient - 0.1) > 0.02 * 0.1
    assert single.flags["rounding_error"]
    assert double.trusted
    np.testing.assert_allclose(double.hypergradient, 0.1, rtol=0.02)


@pytest.mark.parametrize("rate", [1e-3, 5e-4])
def test_an_oscillation_around_a_kink_is_no_fixed_point(rate):
    """The minimum is ``(alpha - 1/2, 0)``, where the steps of ``w_2`` change sign."""
    inner_center, outer_center = jnp.array([1.0, 0.2]), jnp.array([0.4, -1.0])
    distance = lambda w, center: 0.5 * jnp.sum((w - center) ** 2)
    inner = lambda w, alpha, batch: (
        distance(w, alpha * inner_center) + 0.5 * jnp.sum(jnp.abs(w))
    )
    outer = lambda w, alpha, batch: distance(w, outer_center)
    solver = hg.Descent(optax.sgd(rate), int(10 / rate))
    estimator = hg.FixedPoint(solver, int(5 / rate))
    estimate = hg.hypergradient(hg.Bilevel(inner, outer), estimator)(
        jnp.array([0.3, 0.3]), 1.0
    )
    assert abs(estimate.hypergradient - 0.1) > 0.02 * 0.1
    assert estimate.stats["error_estimate"] <= 1e-2  # which does not see it
    assert estimate.flags["inner_error"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(optax.sgd(0.3), id="descent"),
        pytest.param(optax.sgd(0.1, momentum=0.9), id="oscillation"),
        pytest.param(optax.sgd(1.8), id="sign changes"),
    ],
)
def test_smooth_steps_are_those_that_their_derivative_predicts(optimizer, dtype):
    """Far from the end, and where only rounding errors are left of the steps."""
    inner = lambda w, alpha, batch: jnp.sum(jnp.log(jnp.cosh(w - alpha)))
    outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 0.3) ** 2)
    for num_steps in (30, 100, 1000):
        estimator = hg.FixedPoint(hg.Descent(optimizer, num_steps), 200)
        estimate = hg.hypergradient(hg.Bilevel(inner, outer), estimator)(
            jnp.linspace(-1, 1, 5, dtype=dtype), jnp.asarray(1.0, dtype)
        )
        error = abs(float(estimate.hypergradient) / (5 * 0.7) - 1)
        assert error <= 0.02 or not estimate.trusted
        assert error >= 1e-3 or estimate.trusted
    assert error < 1e-5


@pytest.mark.parametrize("num_samples", [4, 8, 30])
def test_few_samples_need_a_smaller_standard_error(num_samples):
    """The half-width of a 95% interval is that of many samples."""
    t = stats.t.ppf(0.975, num_samples - 1)
    half_width = t * max_standard_error(num_samples)
    np.testing.assert_allclose(half_width, stats.norm.ppf(0.975) * 1e-2, rtol=1e-12)


@pytest.mark.parametrize(("num_samples", "num_trusted"), [(2, 0), (3, 0), (4, 5)])
def test_few_samples_are_not_trusted_by_chance(num_samples, num_trusted):
    """Samples that deviate by half of their mean agree to 1% now and then."""
    inner = lambda w, alpha, batch: jnp.mean((w - alpha * batch) ** 2)
    outer = lambda w, alpha, batch: (w - 1.0) ** 2
    data = hg.Batches(jnp.arange(1.0, 101.0) / 50, batch_size=10)
    estimator = hg.Unrolled(hg.Descent(optax.sgd(0.2), 30))
    average = hg.Average(estimator, num_samples)
    estimate = hg.hypergradient(hg.Bilevel(inner, outer, data), average)
    keys = jax.random.split(jax.random.key(1), 2000)
    trusted = jax.vmap(lambda key: estimate(0.0, 2.0, key).trusted)(keys)
    assert jnp.sum(trusted) <= num_trusted
