"""Momentum descent reversed: every bit comes back, and reverse mode agrees."""

import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import any_known, error, quadratic

import hypergrad as hg

MOMENTUM = 3686 / 4096  # the fraction nearest to 0.9


def pair(num_steps, rate=0.3, momentum=MOMENTUM, **least):
    """Reversible, and Unrolled over the same steps."""
    as_function = lambda x: x if callable(x) else lambda alpha: x
    make = lambda alpha: optax.sgd(
        as_function(rate)(alpha), momentum=as_function(momentum)(alpha)
    )
    return (
        hg.Reversible(rate, momentum, num_steps, **least),
        hg.Unrolled(hg.Descent(make, num_steps)),
    )


@pytest.mark.parametrize("num_steps", [2, 7, 100, 1000])
@pytest.mark.parametrize("name", ["logistic per-weight", "quadratic nested"])
def test_equals_reverse_mode(name: str, num_steps: int):
    """To the resolution of the velocities, 2^-34."""
    known = any_known(name)
    ask = lambda estimator: hg.hypergradient(known.problem, estimator)(
        known.w, known.alpha
    )
    rate = 0.3 if name.startswith("logistic") else 0.05
    found, expected = map(ask, pair(num_steps, rate))
    assert found.stats["trusted"]
    assert error(found.hypergradient, expected.hypergradient) < 1e-8
    assert error(found.w, expected.w) < 1e-8


def test_rates_momenta_and_starts_are_seen():
    """A schedule, a momentum and a start from alpha, on mini-batches."""
    known = any_known("ridge per-weight")
    inner = lambda w, alpha, batch: known.problem.inner_loss(w, alpha["l2"], batch)
    problem = hg.Bilevel(
        inner,
        lambda w, alpha, batch: known.problem.outer_loss(w, alpha["l2"], batch),
        hg.Batches(known.problem.inner_data, 8),
        known.problem.outer_data,
        start=lambda w, alpha: w + alpha["start"],
    )
    alpha = {
        "l2": known.alpha,
        "start": jnp.linspace(-1, 1, 6),
        "rates": jnp.linspace(0.05, 0.2, 12),
        "momentum": jnp.asarray(0.75),
    }
    rate = lambda alpha: lambda count: alpha["rates"][count]
    momentum = lambda alpha: alpha["momentum"]
    estimators = (
        hg.Reversible(rate, momentum, 12, least_momentum=0.5),
        hg.Unrolled(
            hg.Descent(
                lambda alpha: optax.chain(
                    optax.trace(alpha["momentum"]),
                    optax.scale_by_learning_rate(rate(alpha)),
                ),
                12,
            )
        ),
    )
    key = jax.random.key(4)
    found, expected = (
        hg.hypergradient(problem, estimator)(known.w, alpha, key)
        for estimator in estimators
    )
    assert found.stats["trusted"]
    assert set(found.hypergradient) == set(alpha)
    # the keys of the steps differ by how the two split theirs: compare where they agree
    assert found.value.shape == expected.value.shape
    whole = hg.Bilevel(
        inner,
        problem.outer_loss,
        known.problem.inner_data,
        known.problem.outer_data,
        start=lambda w, alpha: w + alpha["start"],
    )
    found, expected = (
        hg.hypergradient(whole, estimator)(known.w, alpha) for estimator in estimators
    )
    for name in alpha:
        part, exact = found.hypergradient[name], expected.hypergradient[name]
        assert error(part, exact) < 1e-7, name


def test_mini_batches_equal_central_differences():
    """The same key throughout, by the loss's own alpha."""
    known = any_known("ridge per-weight")
    problem = hg.Bilevel(
        known.problem.inner_loss,
        known.problem.outer_loss,
        hg.Batches(known.problem.inner_data, 8),
        known.problem.outer_data,
    )
    estimator = hg.Reversible(0.2, 0.75, 20)
    gradient = hg.hypergradient(problem, estimator)
    key = jax.random.key(1)
    found = gradient(known.w, known.alpha, key)
    e = 1e-4 * jnp.eye(known.alpha.size)
    value = lambda alpha: float(gradient(known.w, alpha, key).value)
    slopes = [(value(known.alpha + d) - value(known.alpha - d)) / 2e-4 for d in e]
    assert error(found.hypergradient, jnp.array(slopes)) < 1e-4


def test_ten_thousand_steps_come_back():
    """At momentum 0.9: every bit, and no more than 10% over log2(1/0.9) bits."""
    known = quadratic("30", seed=1)
    estimator = hg.Reversible(0.05, 0.9, 10_000)
    found = hg.hypergradient(known.problem, estimator)(known.w, known.alpha)
    assert found.stats["trusted"]
    assert error(found.hypergradient, known.exact(known.alpha)) < 1e-7
    bits = 8 * estimator.num_words / 10_000
    assert 0.9 * np.log2(1 / 0.9) < bits < 1.1 * np.log2(1 / 0.9)


def test_too_small_a_buffer_is_flagged():
    """A momentum below the least that was promised loses bits."""
    known = quadratic("30", seed=1)
    momentum = lambda alpha: jnp.asarray(0.3)
    run = lambda least: hg.hypergradient(
        known.problem, hg.Reversible(0.05, momentum, 500, least)
    )(known.w, known.alpha)
    assert run(0.3).stats["trusted"]
    assert not run(0.95).stats["trusted"]


def test_leaving_the_range_is_flagged():
    """A rate that diverges runs over the integers."""
    known = quadratic("30", seed=1)
    estimator = hg.Reversible(1.0, 0.9, 60)
    found = hg.hypergradient(known.problem, estimator)(known.w, known.alpha)
    assert not found.stats["trusted"]


def test_memory_is_the_buffer():
    """Sixteen times the steps: 0.15 bits a number and step more, and the keys."""

    def planned(num_steps):
        problem = hg.Bilevel(
            lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2),
            lambda w, alpha, batch: jnp.sum(w**2),
        )
        gradient = hg.hypergradient(problem, hg.Reversible(0.1, 0.9, num_steps))
        f = jax.jit(lambda w, alpha: gradient(w, alpha).hypergradient)
        compiled = f.lower(jnp.zeros(10_000), jnp.zeros(())).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    more = planned(1600) - planned(100)
    buffer = 1500 * np.log2(1 / 0.9) / 8 * 10_000
    # the compiler may hold the stack twice, while it writes to it
    assert more < 2.2 * buffer + 1500 * 64


def test_a_run_in_float32_comes_back():
    """In a process without x64: coarser, and still every bit."""
    code = """
        import jax.numpy as jnp, optax, hypergrad as hg
        inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - jnp.sin(alpha)) ** 2)
        outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 0.5) ** 2)
        problem = hg.Bilevel(inner, outer)
        alpha = jnp.linspace(-1, 1, 50)
        estimator = hg.Reversible(0.1, 0.9, 3000)
        found = hg.hypergradient(problem, estimator)(jnp.zeros(50), alpha)
        exact = (jnp.sin(alpha) - 0.5) * jnp.cos(alpha)
        assert found.stats["trusted"]
        assert jnp.linalg.norm(found.hypergradient - exact) < 1e-3
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.1, 0.0, 5), "momentum must lie"),
        ((0.1, 1.0, 5), "momentum must lie"),
        ((0.1, lambda alpha: 0.9, 5), "least_momentum"),
        ((0.1, 0.9, 0), "num_steps"),
    ],
)
def test_wrong_settings_are_named(arguments, message: str):
    """Before anything runs."""
    with pytest.raises(ValueError, match=message):
        hg.Reversible(*arguments)


def test_alpha_that_nothing_reads_is_refused():
    """As everywhere."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: 0.5 * (w - alpha["a"]) ** 2,
        lambda w, alpha, batch: w**2,
    )
    with pytest.raises(ValueError, match=r"alpha\['b'\]"):
        hg.hypergradient(problem, hg.Reversible(0.1, 0.9, 5))(0.0, {"a": 1.0, "b": 1.0})
