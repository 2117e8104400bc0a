"""Forward mode against reverse mode, closed forms and central differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from benchmarks.known import any_known, central, error, quadratic, two_losses

RATES = lambda alpha: optax.sgd(jnp.exp(alpha["rate"]), momentum=alpha["momentum"])


@functools.cache
def sgd(step: float) -> optax.GradientTransformation:
    return optax.sgd(step)


@pytest.mark.parametrize(
    "name", ["ridge per-weight", "logistic scalar", "quadratic nested", "quadratic 0-d"]
)
def test_equals_the_closed_form(name: str):
    """At convergence, where reverse mode and implicit differentiation are as well."""
    known = any_known(name)
    estimator = hg.Forward(hg.Descent(sgd(known.step), 300))
    found = hg.hypergradient(known.problem, estimator)(known.w, known.alpha)
    assert error(found.hypergradient, known.exact(known.alpha)) < 1e-9
    assert found.stats["trusted"]
    assert found.stats["error_estimate"] == 0


def noisy():
    """Mini-batches, a start and an optimizer that read alpha."""
    known = any_known("ridge per-weight")
    inner = lambda w, alpha, batch: known.problem.inner_loss(w, alpha["l2"], batch)
    outer = lambda w, alpha, batch: (
        known.problem.outer_loss(w, alpha["l2"], batch) + jnp.sum(alpha["start"] ** 2)
    )
    problem = hg.Bilevel(
        inner,
        outer,
        hg.Batches(known.problem.inner_data, 8),
        known.problem.outer_data,
        init_fn=lambda w, alpha: w + alpha["start"],
    )
    alpha = {
        "l2": known.alpha,
        "start": jnp.linspace(-1, 1, 6),
        "rate": jnp.asarray(-2.0),
        "momentum": jnp.asarray(0.7),
    }
    return problem, known.w, alpha


@pytest.mark.parametrize("kind", [hg.Forward, hg.Unrolled])
def test_rates_momenta_and_starts_equal_central_differences(kind):
    """Seven steps on mini-batches, the same key throughout."""
    problem, w, alpha = noisy()
    estimator = kind(hg.Descent(RATES, 7))
    gradient = hg.hypergradient(problem, estimator)
    key = jax.random.key(5)
    found = gradient(w, alpha, key)
    value = lambda alpha: gradient(w, alpha, key).value
    assert error(found.hypergradient, central(value, alpha)) < 1e-9


def test_equals_reverse_mode():
    """The same procedure, the other way round; same value, same w."""
    problem, w, alpha = noisy()
    solver = hg.Descent(RATES, 20)
    key = jax.random.key(3)
    forward = hg.hypergradient(problem, hg.Forward(solver))(w, alpha, key)
    reverse = hg.hypergradient(problem, hg.Unrolled(solver))(w, alpha, key)
    assert error(forward.hypergradient, reverse.hypergradient) < 1e-12
    assert error(forward.w, reverse.w) < 1e-13
    np.testing.assert_allclose(forward.value, reverse.value, rtol=1e-13)


def test_a_tuple_of_losses_leads_with_k():
    """Each that of its loss alone."""
    known = quadratic("nested", seed=3)
    problem = two_losses(known, lambda w, alpha, batch: jnp.sum(w["b"]["c"]))
    data = known.problem.inner_data, known.problem.outer_data
    estimator = hg.Forward(hg.Descent(sgd(known.step), 100))
    ask = lambda problem: hg.hypergradient(problem, estimator)(known.w, known.alpha)
    both = ask(problem)
    for i, loss in enumerate(problem.outer_loss):
        alone = ask(hg.Bilevel(known.problem.inner_loss, loss, *data))
        part = jax.tree.map(lambda x, i=i: x[i], both.hypergradient)
        assert error(part, alone.hypergradient) < 1e-12


def test_memory_is_flat_in_the_steps():
    """A hundred steps and ten thousand: the same temporaries, up to the keys."""

    def planned(num_steps):
        problem = hg.Bilevel(
            lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2),
            lambda w, alpha, batch: jnp.sum(w**2),
        )
        estimator = hg.Forward(hg.Descent(sgd(0.1), num_steps))
        gradient = hg.hypergradient(problem, estimator)
        w, alpha = jnp.zeros(10_000), jnp.zeros(())
        lowered = jax.jit(lambda w, alpha: gradient(w, alpha).hypergradient)
        compiled = lowered.lower(w, alpha).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert planned(10_000) <= planned(100) + 16 * 10_000


def test_windows_share_a_rate():
    """The derivative by a shared rate is the sum over its steps' own."""
    known = any_known("ridge scalar")
    num_steps, num_windows = 12, 3
    data = known.problem.inner_data, known.problem.outer_data
    inner = lambda w, alpha, batch: known.problem.inner_loss(w, -1.0, batch)
    outer = lambda w, alpha, batch: known.problem.outer_loss(w, alpha, batch)
    problem = hg.Bilevel(inner, outer, *data)
    shared = hg.Descent(
        lambda rates: optax.sgd(hg.piecewise_constant_schedule(rates, num_steps)),
        num_steps,
    )
    free = hg.Descent(lambda rates: optax.sgd(lambda count: rates[count]), num_steps)
    rates = jnp.array([0.1, 0.2, 0.05])
    found = hg.hypergradient(problem, hg.Forward(shared))(known.w, rates)
    each = hg.hypergradient(problem, hg.Unrolled(free))(known.w, jnp.repeat(rates, 4))
    summed = each.hypergradient.reshape(num_windows, 4).sum(axis=1)
    assert error(found.hypergradient, summed) < 1e-12
    np.testing.assert_allclose(found.value, each.value, rtol=1e-13)


def test_windows_of_unequal_length():
    """Seven steps, three windows: every value has its steps, in order."""
    schedule = hg.piecewise_constant_schedule(jnp.arange(3.0), 7)
    assert [float(schedule(count)) for count in range(9)] == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    with pytest.raises(ValueError, match="one a window"):
        hg.piecewise_constant_schedule(jnp.ones((2, 2)), 4)


def test_the_ledger_is_n_tangents():
    """T gradients and one for the residual, N T products."""
    known = any_known("ridge per-weight")
    estimator = hg.Forward(hg.Descent(sgd(0.3), 12))
    stats = hg.hypergradient(known.problem, estimator)(known.w, known.alpha).stats
    assert stats["num_grads"] == 13
    assert stats["num_hvps"] == 12 * ravel_pytree(known.alpha)[0].size


@pytest.mark.parametrize("kind", [hg.Forward, hg.Unrolled])
def test_the_distance_to_implicit(kind):
    """Asked for: how far the procedure's derivative is from the argmin's."""
    known = any_known("ridge per-weight")
    solver = hg.Descent(sgd(known.step), 10)
    ask = lambda estimator: hg.hypergradient(known.problem, estimator)(
        known.w, known.alpha
    )
    plain, asked = ask(kind(solver)), ask(kind(solver, certify=True))
    assert np.isnan(plain.stats["distance_to_implicit"])
    exact = known.exact(known.alpha)
    np.testing.assert_allclose(
        asked.stats["distance_to_implicit"],
        error(asked.hypergradient, exact),
        rtol=1e-4,
    )
    assert asked.stats["num_hvps"] > plain.stats["num_hvps"]
    problem, w, alpha = noisy()
    found = hg.hypergradient(problem, kind(hg.Descent(RATES, 5), certify=True))(
        w, alpha
    )
    assert np.isnan(found.stats["distance_to_implicit"])


@pytest.mark.parametrize(("leaves", "kind"), [(3, hg.Forward), (4, hg.Unrolled)])
def test_through_takes_the_mode_by_the_numbers_in_alpha(leaves: int, kind):
    """Forward mode for three numbers, reverse mode for four; settings go along."""
    alpha = {"rate": jnp.asarray(-2.0), "rest": jnp.zeros(leaves - 1)}
    solver = hg.Descent(lambda alpha: optax.sgd(jnp.exp(alpha["rate"])), 7)
    for like in (alpha, jax.eval_shape(lambda: alpha)):
        found = hg.unrolled_estimator(
            solver, like, warm_start=False, outer_batch_size=2
        )
        assert found == kind(solver, warm_start=False, outer_batch_size=2)
