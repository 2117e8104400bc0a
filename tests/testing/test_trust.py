"""What is trusted is right, in whatever units ``w`` and the losses are measured."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.implicit.curvature_probe import probe_curvature
from hypergrad.implicit.differentiation import Point
from hypergrad.inner.base import inner_stats
from hypergrad.inner.descent import run_inner_steps
from hypergrad.linear.equilibration import no_scaling
from hypergrad.testing import unit_counts
from hypergrad.testing.trust import DEFAULT_FAMILIES
from hypergrad.testing.trust_problems import (
    FAMILIES,
    approach_minimum,
    dense_hypergradient,
    make_trial,
    newton,
)
from hypergrad.trees import relative_error
from tests.estimator_cases import failed_checks

NO_STEPS = hg.Descent(optax.sgd(0.0), 0)  # leaves w where it is
DEFAULT = hg.Implicit(NO_STEPS)
CERTIFIED = hg.Implicit(NO_STEPS, certify=True)
SEVERAL = "stretched", "one slow direction", "saddle"


class UnitDescent(eqx.Module):
    """Gradient descent on a problem of `check_trust` whose steps have its units.

    The learning rate is the power of two below the reciprocal of the largest eigenvalue
    where the steps begin. It is an integer in the state, so that it is a constant.
    """

    num_steps: int = eqx.field(static=True)
    differentiable = True

    def init(self, inner_loss, w, alpha, data, key):
        units = data["units"].astype(w.dtype)

        def grad_fn(theta):
            grad = jax.grad(inner_loss)(theta / units, alpha, data)
            return (grad / units / data["factors"][0]).astype(float)

        column = lambda v: jax.jvp(grad_fn, (units * w,), (v,))[1]
        eigenvalues = jnp.linalg.eigvalsh(
            jax.vmap(column)(jnp.eye(w.size, dtype=w.dtype))
        )
        exponent = jnp.ceil(jnp.log2(jnp.max(jnp.abs(eigenvalues))))
        return w, exponent.astype(int)

    def step(self, inner_loss, carry, alpha, data, key):
        w, exponent = carry
        grad = jax.grad(inner_loss)(w, alpha, data)
        step = grad / data["units"] / data["units"] / data["factors"][0]
        rate = jnp.exp2(-exponent.astype(w.dtype))
        return w - rate * step.astype(w.dtype), exponent

    def solve(self, inner_loss, w, alpha, data, key):
        w, _ = run_inner_steps(self, inner_loss, w, alpha, data, key)
        return w, inner_stats(self.num_steps, num_grads=self.num_steps)


OTHERS = {
    "FixedPoint": hg.FixedPoint(UnitDescent(100), 200),
    "MINRES": hg.Implicit(NO_STEPS, hg.MINRES()),
    "LU": hg.Implicit(NO_STEPS, lx.LU()),
    "tolerance": hg.Implicit(NO_STEPS, num_newton_steps=1, rtol=1e-2),
}


# Random problems.


@pytest.mark.parametrize(
    ("estimator", "families", "dtype"),
    [
        pytest.param(DEFAULT, SEVERAL, "float64", id="default"),
        pytest.param(CERTIFIED, ("one slow direction",), "float64", id="certified"),
        *(
            pytest.param(
                estimator, DEFAULT_FAMILIES, dtype, id=name, marks=pytest.mark.slow
            )
            for name, estimator, dtype in (
                ("default, all", DEFAULT, "float64"),
                ("default, all, f32", DEFAULT, "float32"),
                ("certified, all", CERTIFIED, "float64"),
                ("certified, all, f32", CERTIFIED, "float32"),
            )
        ),
        *(
            pytest.param(
                estimator,
                ("ridge", "clustered"),
                "float64",
                id=name,
                marks=() if name == "LU" else pytest.mark.slow,
            )
            for name, estimator in OTHERS.items()
        ),
    ],
)
def test_trust_can_be_relied_on(estimator, families, dtype):
    num_problems = 100 if families == DEFAULT_FAMILIES else 40
    counts = hg.testing.check_trust(
        estimator, families=families, num_problems=num_problems, dtype=dtype
    )
    assert counts.num_trusted > 0.2 * counts.num_accurate > 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_floats_are_not_trusted_if_wrong(dtype):
    """In these units short floats resolve almost no problem."""
    counts = hg.testing.check_trust(
        DEFAULT, families=("ridge", "clustered"), num_problems=40, dtype=dtype
    )
    assert counts.num_false == 0 < counts.num_problems


class AlwaysTrusted:
    """An estimator that trusts everything that `Implicit` returns."""

    def init(self, problem, w, alpha, key=None):
        return DEFAULT.init(problem, w, alpha, key)

    def estimate(self, problem, state, alpha, key):
        estimate, state = DEFAULT.estimate(problem, state, alpha, key)
        flags = {"none": jnp.asarray(False)}
        return hg.Estimate(
            estimate.value, estimate.hypergradient, estimate.w, estimate.stats, flags
        ), state


def test_false_trust_and_too_little_trust_are_errors():
    options = {"families": ["ridge"], "num_problems": 30}
    with pytest.raises(AssertionError, match="trusted estimates may be off"):
        hg.testing.check_trust(AlwaysTrusted(), **options)
    timid = hg.Implicit(NO_STEPS, estimate_error=False)
    with pytest.raises(AssertionError, match="must be trusted"):
        hg.testing.check_trust(timid, **options)
    with pytest.raises(ValueError, match="families"):
        hg.testing.check_trust(DEFAULT, families=["cubic"])


class TrustedIfSmall(AlwaysTrusted):
    """An estimator that trusts what it finds where no entry of ``w`` is above 1e3."""

    def estimate(self, problem, state, alpha, key):
        estimate, state = super().estimate(problem, state, alpha, key)
        flags = {"large": jnp.max(jnp.abs(estimate.w)) > 1e3}
        return eqx.tree_at(lambda e: e.flags, estimate, flags), state


def test_decisions_that_depend_on_units_are_counted():
    """An estimator whose trust is the size of ``w``, and one that trusts always."""
    key = jax.random.key(0)
    args, options = ("ridge", 40), {"dtype": "float64", "key": key}
    counts = unit_counts(TrustedIfSmall(), *args, **options)
    sample = jax.vmap(lambda key, e: make_trial(FAMILIES["ridge"], key, e))
    keys = jax.random.split(key, 40)
    narrow, wide = (
        np.max(np.abs(sample(keys, jnp.full(40, exponent)).w), axis=1) < 1e3
        for exponent in (0.0, 6.0)
    )
    assert counts.num_problems == 40
    assert counts.num_changed == np.sum(narrow != wide) > 20
    assert unit_counts(AlwaysTrusted(), *args, **options).num_changed == 0


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in ("ridge", "saddle")))
        for name in FAMILIES
    ],
)
def test_truth_of_a_family_is_a_central_difference(family):
    """The exact hypergradient is the slope of the outer value at the argmin."""
    family = FAMILIES[family]
    start, alpha, batch = family.sample(jax.random.key(3))
    start = approach_minimum(family, start, alpha, batch)

    @jax.jit
    def outer_value(alpha):
        theta = newton(family, start, alpha, batch)
        return family.outer_loss(theta, alpha, batch)

    @jax.jit
    def exact(alpha):
        return dense_hypergradient(family, start, alpha, batch)[0]

    h, direction = 1e-5, jnp.cos(jnp.arange(alpha.size))
    slope = (
        outer_value(alpha + h * direction) - outer_value(alpha - h * direction)
    ) / (2 * h)
    np.testing.assert_allclose(exact(alpha) @ direction, slope, rtol=1e-5, atol=1e-8)


# Units.


def small_problem(start, factors=(1.0, 1.0)):
    """Returns a logistic problem with 6 parameters, near its minimum."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 40, 6))
    y = jnp.sign(x @ jnp.arange(1.0, 7.0) + jax.random.normal(keys[1], (2, 40)))

    def loss(w, batch):
        x, y = batch
        return jnp.mean(jax.nn.softplus(-y * (x @ w)))

    def inner(w, alpha, batch):
        penalty = 0.5 * jnp.sum(jnp.exp(alpha) * w**2)
        return factors[0] * (loss(w, batch) + penalty)

    outer = lambda w, alpha, batch: factors[1] * loss(w, batch)
    problem = hg.Bilevel(inner, outer, (x[0], y[0]), (x[1], y[1]))
    alpha = jnp.linspace(-4.0, -1.0, 6)
    solve = hg.argmin(lambda w, a, b: inner(w, a, b) / factors[0], hg.Newton())
    w = solve(jnp.zeros(6), alpha, (x[0], y[0]))
    return problem, w * (1 + start * jax.random.normal(keys[2], (6,))), alpha


@pytest.mark.parametrize("exponent", [4, 6])
@pytest.mark.parametrize("certify", [False, True])
def test_small_features_do_not_hide_an_error(exponent, certify):
    """200 features with units from 1 to 10^-exponent, after 50 steps of descent."""

    def make_problem(units):
        keys = jax.random.split(jax.random.key(1), 3)
        features = jax.random.normal(keys[0], (2, 300, 200))
        y = features @ jax.random.normal(keys[1], (200,)) / 14
        y = y + 0.1 * jax.random.normal(keys[2], (2, 300))
        x = features @ jnp.diag(units)
        loss = lambda w, batch: 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)
        penalty = lambda w, alpha: 0.5 * jnp.sum(jnp.exp(alpha) * (units * w) ** 2)
        inner = lambda w, alpha, batch: loss(w, batch) + penalty(w, alpha)
        outer = lambda w, alpha, batch: loss(w, batch)
        return hg.Bilevel(inner, outer, (x[0], y[0]), (x[1], y[1]))

    w, alpha = jnp.zeros(200), jnp.full(200, -3.0)
    estimator = hg.Implicit(hg.Descent(optax.sgd(0.2), 50), certify=certify)
    problem = make_problem(jnp.logspace(0, -exponent, 200))
    estimate = hg.hypergradient(problem, estimator)(w, alpha)
    # The hypergradient does not depend on the units.
    same_units = make_problem(jnp.ones(200))
    exact = hg.hypergradient(same_units, hg.Implicit(hg.Newton()))(w, alpha)
    assert exact.trusted
    assert relative_error(estimate.hypergradient, exact.hypergradient) > 0.02
    assert not estimate.trusted


def test_a_large_parameter_without_influence_hides_nothing():
    """One of 2000 beside errors of 90%."""
    inner = lambda w, alpha, batch: (
        0.5 * jnp.sum((w["a"] - alpha) ** 2) + 0.5 * (w["large"] - 2000.0) ** 2
    )
    outer = lambda w, alpha, batch: 0.5 * jnp.sum(w["a"] ** 2)
    problem = hg.Bilevel(inner, outer)
    alpha = jnp.ones(3)
    w = {"a": 0.1 * jnp.ones(3), "large": jnp.asarray(2000.0)}
    estimate = hg.hypergradient(problem, DEFAULT)(w, alpha)
    assert not estimate.trusted
    assert estimate.stats["error_estimate"] > 1.0  # 0.9 / 0.1 in all directions


def test_stiff_noise_does_not_hide_a_slow_direction():
    """The certificate solves to 1e-6 of each right-hand side."""
    eigenvalues = jnp.ones(30).at[0].set(1e-5)
    basis, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (30, 30)))
    H = basis @ jnp.diag(eigenvalues) @ basis.T
    slow = basis[:, 0]
    inner = lambda w, alpha, batch: 0.5 * (w - alpha * slow) @ H @ (w - alpha * slow)
    outer = lambda w, alpha, batch: jnp.exp(w @ slow)
    noise = jax.random.normal(jax.random.key(1), (30,))
    noise = noise - slow * (noise @ slow)
    alpha = jnp.asarray(3.0)
    w = 1.0 * slow + 0.3 * noise  # 1 in place of 3 along the slow direction
    problem = hg.Bilevel(inner, outer)
    assert not hg.hypergradient(problem, DEFAULT)(w, alpha).trusted
    certificate = hg.certify(problem, w, alpha, jnp.exp(jnp.asarray(1.0)))
    assert not certificate.trusted
    assert certificate.error_estimate > 0.3


@pytest.mark.parametrize("factor", [1e-20, 1e20])
def test_a_loss_at_the_edge_of_float32_is_right_or_not_trusted(factor):
    factors = jnp.float32(factor), jnp.float32(1.0)
    problem, w, alpha = small_problem(1e-4)
    _, exact_w, _ = small_problem(0.0)
    exact = hg.hypergradient(problem, DEFAULT)(exact_w, alpha).hypergradient
    tiny, w, alpha = jax.tree.map(
        lambda x: x.astype(jnp.float32), small_problem(1e-4, factors)
    )
    estimate = hg.hypergradient(tiny, DEFAULT)(w, alpha)
    error = relative_error(estimate.hypergradient.astype(float), exact)
    assert estimate.trusted
    assert error < 2e-2


# What an estimate sees.


def test_the_certificate_sees_the_sample_of_the_estimate():
    """``data_fn`` draws the target; an estimate is exact for its own draw only."""
    inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha * batch) ** 2)
    outer = lambda w, alpha, batch: 0.5 * jnp.sum(w**2)

    def draw(key):
        return jax.random.normal(key, (4,)), jnp.zeros(())

    problem = hg.Bilevel(inner, outer, data_fn=draw)
    estimator = hg.Implicit(hg.Newton())
    w, alpha = jnp.zeros(4), jnp.asarray(2.0)
    for seed in range(3):
        key = jax.random.key(seed)
        estimate = hg.hypergradient(problem, estimator)(w, alpha, key)
        certificate = hg.certify(problem, estimate.w, alpha, estimate)
        assert certificate.trusted
        assert certificate.error_estimate < 1e-6
        # The hypergradient alone does not say which sample it saw.
        other = hg.certify(problem, estimate.w, alpha, estimate.hypergradient)
        assert other.error_estimate > 1e-2


def test_without_an_error_estimate_nothing_is_trusted():
    problem, w, alpha = small_problem(1e-4)
    unchecked = hg.Implicit(NO_STEPS, estimate_error=False)
    estimate = hg.hypergradient(problem, unchecked)(w, alpha)
    checked = hg.hypergradient(problem, DEFAULT)(w, alpha)
    assert failed_checks(estimate) == {"no_error_estimate"}
    assert np.isnan(estimate.stats["error_estimate"])
    assert estimate.stats["num_outer_grads"] == 1
    assert estimate.stats["num_hvps"] <= checked.stats["num_hvps"] - 5
    np.testing.assert_allclose(estimate.hypergradient, checked.hypergradient, rtol=1e-9)
    with pytest.raises(ValueError, match="estimate_error"):
        hg.Implicit(NO_STEPS, num_newton_steps=1, rtol=1e-3, estimate_error=False)


# The certificate's statement about the spectrum.


@pytest.mark.parametrize("num_steps", [20, 40])
def test_the_smallest_eigenvalue_is_as_close_as_the_resolution_says(num_steps):
    """Of 40 random spectra at most 1% may break the statement; none does."""

    @jax.jit
    @jax.vmap
    def run(key):
        keys = jax.random.split(key, 3)
        basis, _ = jnp.linalg.qr(jax.random.normal(keys[0], (200, 200)))
        eigenvalues = jax.random.uniform(keys[1], (200,), minval=0.1)
        eigenvalues = eigenvalues.at[0].set(0.01)
        H = basis @ jnp.diag(eigenvalues) @ basis.T
        inner = lambda w, alpha, batch: 0.5 * w @ H @ w
        w = jnp.ones(200)
        point = Point(hg.Bilevel(inner, inner), w, w, None, None)
        return probe_curvature(point, no_scaling(w), keys[2], num_steps)

    probe = run(jax.random.split(jax.random.key(0), 40))
    width = probe.ritz_max - probe.ritz_min
    allowed = probe.resolution * width / (1 - 2 * probe.resolution)
    assert np.all(probe.ritz_min - 0.01 <= allowed)
    assert np.all(probe.ritz_min >= 0.01 * (1 - 1e-9))
    assert np.all((probe.resolution > 0) & (probe.resolution < 0.5))
    assert np.all(probe.num_products == num_steps)
    assert not np.any(probe.is_negative)


# Singular Hessians and minima at zero.


@pytest.mark.filterwarnings("ignore:inner_loss does not depend on w")
@pytest.mark.parametrize("outer_slope", [0.0, 1.0])
def test_a_direction_without_curvature_harms_only_what_depends_on_it(outer_slope):
    """The inner loss ignores ``w['free']``; the outer loss does or does not."""
    inner = lambda w, alpha, batch: 0.5 * jnp.sum((w["a"] - alpha) ** 2)
    outer = lambda w, alpha, batch: (
        0.5 * jnp.sum(w["a"] ** 2) + outer_slope * jnp.sum(w["free"])
    )
    w = {"a": jnp.full(3, 2.0), "free": jnp.ones(12)}
    problem, alpha = hg.Bilevel(inner, outer), jnp.full(3, 2.0)
    for estimator in (DEFAULT, CERTIFIED):
        estimate = hg.hypergradient(problem, estimator)(w, alpha)
        assert np.all(np.isfinite(estimate.hypergradient))
        assert bool(estimate.trusted) == (outer_slope == 0)
    if outer_slope == 0:
        np.testing.assert_allclose(estimate.hypergradient, alpha, rtol=1e-9)


def test_a_minimum_at_zero_raises_no_alarm():
    """``w`` is 1e-9 in place of 0, which is a large part of ``||w||``."""
    inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1.0) ** 2)
    problem, w = hg.Bilevel(inner, outer), jnp.full(3, 1e-9)
    for estimator in (DEFAULT, CERTIFIED):
        estimate = hg.hypergradient(problem, estimator)(w, jnp.zeros(3))
        assert estimate.trusted
        np.testing.assert_allclose(estimate.hypergradient, -1.0, rtol=1e-6)
