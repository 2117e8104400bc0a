"""`Average`: means over draws, and a standard error that is the scatter's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from benchmarks.known import any_known, error, ridge, two_losses
from tests.loops import run_loop


def batched(known):
    """The problem with its data in batches."""
    problem = known.problem
    return hg.Bilevel(
        problem.inner_loss,
        problem.outer_loss,
        hg.Batches(problem.inner_data),
        hg.Batches(problem.outer_data),
    )


def test_the_mean_and_its_standard_error_are_those_of_its_draws():
    """Four estimates with the keys that the average hands out, by NumPy."""
    known = any_known("ridge per-weight")
    problem = batched(known)
    one = hg.Implicit(hg.Newton(), adjoint_batch_size=10, outer_batch_size=10)
    average = hg.Average(one, num_samples=4)
    key = jax.random.key(5)
    found = hg.hypergradient(problem, average)(known.w, known.alpha, key)
    state = one.init(problem, known.w, known.alpha)
    keys = jax.random.split(jax.random.split(key)[1], 4)
    draws = [one.estimate(problem, state, known.alpha, k)[0] for k in keys]
    each = np.stack([draw.hypergradient for draw in draws])
    np.testing.assert_allclose(found.hypergradient, each.mean(0), rtol=1e-9)
    spread = np.sqrt(each.var(0, ddof=1).sum() / 4) / np.linalg.norm(each.mean(0))
    np.testing.assert_allclose(found.stats["standard_error"], spread, rtol=1e-9)
    costs = sum(float(draw.stats["gradient_equivalents"]) for draw in draws)
    np.testing.assert_allclose(found.stats["gradient_equivalents"], costs)


def test_the_standard_error_is_what_means_scatter_by():
    """Over 400 keys the mean of its square is the mean squared deviation, to 15%."""
    known = ridge("per-weight", n=200)
    problem = batched(known)
    one = hg.Implicit(
        hg.ClosedForm(lambda alpha, batch: known.best(known.alpha)),
        adjoint_batch_size=40,
        outer_batch_size=40,
    )
    average = hg.Average(one, num_samples=8)
    ask = jax.vmap(hg.hypergradient(problem, average), in_axes=(None, None, 0))
    found = ask(known.w, known.alpha, jax.random.split(jax.random.key(0), 400))
    h = np.asarray(found.hypergradient)
    absolute = found.stats["standard_error"] * np.linalg.norm(h, axis=1)
    scatter = np.sum((h - h.mean(0)) ** 2, axis=1).mean()
    np.testing.assert_allclose(np.mean(absolute**2), scatter, rtol=0.15)


def test_more_draws_scatter_less():
    """As one over the square root, the slope within a tenth."""
    known = any_known("logistic per-weight")
    problem = batched(known)
    one = hg.Unrolled(hg.Descent(optax.sgd(known.step), 30), outer_batch_size=10)
    counts, spreads = (4, 16, 64), []
    for count in counts:
        ask = jax.vmap(
            hg.hypergradient(problem, hg.Average(one, count)), in_axes=(None, None, 0)
        )
        found = ask(known.w, known.alpha, jax.random.split(jax.random.key(1), 50))
        spreads.append(np.sqrt(np.mean(found.stats["standard_error"] ** 2)))
    slope = np.polyfit(np.log(counts), np.log(spreads), 1)[0]
    assert abs(slope + 0.5) < 0.05


def test_equal_draws_are_one_estimate():
    """All data: no spread, trusted; structure kept; K losses."""
    known = any_known("quadratic nested")
    problem = two_losses(known, lambda w, alpha, batch: jnp.sum(w["b"]["c"]))
    one = hg.Implicit(hg.Newton())
    found = hg.hypergradient(problem, hg.Average(one, 3))(known.w, known.alpha)
    alone = hg.hypergradient(problem, one)(known.w, known.alpha)
    assert error(found.hypergradient, alone.hypergradient) < 1e-12
    assert found.stats["standard_error"] < 1e-12
    assert found.stats["trusted"]
    assert found.value.shape == (2,)


def test_noise_turns_trust_off():
    """Batches of 4 of 40 scatter by more than 1e-2."""
    known = any_known("ridge per-weight")
    one = hg.Implicit(hg.Newton(), adjoint_batch_size=4)
    ask = hg.hypergradient(batched(known), hg.Average(one, 8))
    found = ask(known.w, known.alpha)
    assert found.stats["standard_error"] > 1e-2
    assert not found.stats["trusted"]


def test_each_draw_has_its_own_warm_start():
    """Ten outer steps on mini-batches; every lane's w goes on from its own."""
    known = any_known("ridge per-weight")
    one = hg.Implicit(hg.Descent(optax.sgd(known.step), 5), outer_batch_size=10)
    average = hg.Average(one, 4)
    problem = batched(known)
    trace = hg.minimize(
        problem, average, optax.sgd(0.1), known.w, known.alpha, num_steps=10
    )
    assert trace.status == "completed"
    residual = trace.stats["inner_grad_norm"]
    assert residual[-1] < residual[0]


@pytest.mark.parametrize("num_samples", [1, 0, 2.5])
def test_one_draw_has_no_spread(num_samples):
    """At least two, a whole number."""
    with pytest.raises(
        ValueError, match="num_samples must be an integer of at least 2"
    ):
        hg.Average(hg.Implicit(hg.Newton()), num_samples)


def test_what_is_no_estimator_is_refused():
    """And an average's own draws of the problem's data, which are several."""
    with pytest.raises(TypeError, match="estimator must have init and estimate"):
        hg.Average(hg.Newton())
    with pytest.raises(TypeError, match="is the class Implicit"):
        hg.Average(hg.Implicit)
    known = any_known("ridge scalar")
    with pytest.raises(TypeError, match="Average makes one step"):
        hg.hypergradient(known.problem, hg.Average(hg.SOBA(optax.sgd(0.1))))
    problem = hg.Bilevel(
        lambda w, alpha, batch: jnp.sum((w - alpha) ** 2),
        lambda w, alpha, batch: jnp.sum(w**2),
        data_fn=lambda key: (jnp.ones(1), jnp.ones(1)),
    )
    with pytest.raises(ValueError, match="several"):
        run_loop(
            problem, hg.Average(hg.Implicit(hg.Newton())), optax.sgd(0.1), 0.0, 1.0,
            num_steps=1, certify_every=1,
        )  # fmt: skip


@pytest.mark.slow
def test_conformance():
    """What every estimator must do."""
    average = hg.Average(hg.Implicit(hg.Descent(optax.sgd(0.5), 200)), 2)
    hg.testing.check_estimator(average)
    assert ravel_pytree(average)[0].size == 1  # damping: num_samples is static
