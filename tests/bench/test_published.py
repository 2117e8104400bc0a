"""Runs whose numbers were published, to the digits that were printed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks import hypertorch, pzobo, pzobo_deep
from benchmarks.shared import published_traces as traces
from benchmarks.shared import random_directions
from benchmarks.shared.torch_random import TorchGenerator


def test_the_numbers_of_the_notebook_of_hypertorch():
    """All 16: T = 100, reverse mode over the last 10, 1,000 steps."""
    trace = hypertorch.descend(hypertorch.NOTEBOOK)
    row = hypertorch.inner_losses() | traces.trace_row(trace, hypertorch.OUTER)
    assert len(hypertorch.PUBLISHED) == 16
    for (_, name), number in hypertorch.PUBLISHED.items():
        assert abs(row[name] - number.value) <= number.max_difference, name


def test_a_row_of_a_trace_has_its_losses_and_costs():
    """Losses at the printed steps, costs of all steps, and a curve with both ends."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: (w - alpha) ** 2, lambda w, alpha, batch: w**2
    )
    trace = hg.minimize(
        problem, hg.Implicit(hg.Newton()), optax.sgd(0.1), 0.0, 3.0, num_steps=300
    )
    row = traces.trace_row(trace, (0, 7, 299, 300))
    assert [row[f"step_{step}"] for step in (0, 7, 299)] == [
        float(trace.value[step]) for step in (0, 7, 299)
    ]
    assert "step_300" not in row
    assert row["final"] == float(trace.value[-1])
    assert row["gradient_equivalents"] == float(trace.cost[-1])
    assert row["num_hvps"] == float(trace.stats["num_hvps"].sum())
    steps = row["curve_step"]
    assert steps[0] == 0
    assert steps[-1] == 299
    assert len(steps) <= traces.NUM_POINTS
    assert row["curve_value"] == [float(trace.value[step]) for step in steps]
    assert row["curve_cost"] == [float(trace.cost[step]) for step in steps]


def test_the_first_cost_below_a_bound():
    values, costs = np.array([3.0, 1.0, 2.0, 0.0]), np.arange(1.0, 5.0)
    assert traces.first_cost_below(values, costs, 1.0) == 2.0
    assert np.isnan(traces.first_cost_below(values, costs, -1.0))


def test_published_steps_are_columns_with_relative_tolerances():
    published = traces.published_steps("m", {10: 4.0}, 0.25, "verified", "somewhere")
    assert list(published) == [("m", traces.step_columns([10])[0].name)]
    assert published["m", "step_10"].max_difference == 1.0


# Random numbers of PyTorch.

# Printed by tutorial_scalar.ipynb of BILO (Zhang et al., arXiv 2404.17789): seed 0.
BILO = [1.5410, -0.2934, -2.1788, 0.5684, -1.0845, -1.3986, 0.4033, 0.8380]
BILO += [-0.7193, -0.4033, -0.5966]


def test_fewer_than_16_numbers_of_pytorch():
    samples = TorchGenerator(0).randn(11)
    np.testing.assert_allclose(samples, BILO, atol=6e-5)
    assert samples.dtype == np.float32
    generator = TorchGenerator(0)
    assert generator.randn(3, 3).shape == (3, 3)
    with pytest.raises(ValueError, match="odd"):
        generator.randn(2)


def test_shapes_do_not_matter_and_the_last_16_numbers_are_sampled_anew():
    """Of 24 numbers the first eight are those of 32; the rest has other raw bits."""
    samples = TorchGenerator(0).randn(4, 8)
    flat = TorchGenerator(0).randn(32)
    np.testing.assert_array_equal(samples.ravel(), flat)
    uneven = TorchGenerator(0).randn(24)
    np.testing.assert_array_equal(uneven[:8], flat[:8])
    assert not np.any(uneven[8:] == flat[8:24])


def test_integers_and_uniform_numbers_of_pytorch():
    """Outputs of PyTorch for seed 0; one raw number is used each.

    They are printed in the documentation of kornia (`RandomSharpness`) and in
    ExecuTorch's tests of `view_copy`; permutations by several projects.
    """
    generator = TorchGenerator(0)
    assert generator.randperm(10).tolist() == [4, 1, 7, 5, 3, 9, 0, 8, 6, 2]
    assert TorchGenerator(42).randperm(10).tolist() == [2, 6, 1, 8, 4, 5, 0, 9, 3, 7]
    assert TorchGenerator(0).randint(17, 5).tolist() == [7, 3, 12, 16, 2]
    after_nine = TorchGenerator(0).randint(10, 10)
    assert after_nine.tolist() == [4, 9, 3, 0, 3, 9, 7, 3, 7, 3]
    assert generator.randint(10, 1) == after_nine[9]
    np.testing.assert_allclose(
        TorchGenerator(0).uniform(3), [0.4963, 0.7682, 0.0885], atol=5e-5
    )
    samples = TorchGenerator(0).uniform(3, 1, low=-1.0, high=3.0)
    np.testing.assert_allclose(
        samples, 4 * TorchGenerator(0).uniform(3, 1) - 1, atol=1e-6
    )


# Losses before the first step that HyperRepresentation.ipynb of esjacobians prints.
# They depend on 8 arrays, two of 500 or 1,000 numbers, and the second one on 400 more.
@pytest.mark.parametrize(
    ("size", "printed"),
    [("first", 508.63787841796875), ("larger", 817.3919677734375)],
)
def test_data_of_a_notebook_in_pytorch(size: str, printed: float):
    setup, _ = pzobo.make_setup(size)
    descent = hg.Descent(optax.sgd(0.001), 20)
    data, key = setup.problem.inner_data, jax.random.key(0)
    w, _ = descent.solve(pzobo.inner_loss, setup.w, setup.alpha, data, key)
    value = pzobo.outer_loss(w, setup.alpha, setup.problem.outer_data)
    np.testing.assert_allclose(value, printed, rtol=1e-6)


# The same of DeepHyperRepresentation.ipynb.
@pytest.mark.parametrize(
    ("num_steps", "printed"),
    [(5, 46.34346008), (10, 37.43521881), (20, 31.71059036), (30, 30.49331474)],
)
def test_data_of_the_deep_notebook_in_pytorch(num_steps: int, printed: float):
    setup, _ = pzobo_deep.make_setup()
    descent = hg.Descent(optax.sgd(0.001), num_steps)
    data, key = setup.problem.inner_data, jax.random.key(0)
    w, _ = descent.solve(pzobo_deep.inner_loss, setup.w, setup.alpha, data, key)
    value = pzobo_deep.outer_loss(w, setup.alpha, setup.problem.outer_data)
    np.testing.assert_allclose(value, printed, rtol=1e-5)


def test_ridge_is_the_minimum_of_the_inner_loss():
    setup, _ = pzobo_deep.make_setup()
    batch = setup.problem.inner_data
    grad_fn = jax.jit(jax.grad(pzobo_deep.inner_loss))
    w = pzobo_deep.ridge(setup.alpha, batch)
    grad, init_grad = (grad_fn(x, setup.alpha, batch) for x in (w, setup.w))
    assert jnp.linalg.norm(grad) < 1e-4 * jnp.linalg.norm(init_grad)


# Directions.


def test_directions_have_length_1_and_follow_those_left_out():
    alpha = {"a": jnp.zeros((4, 4)), "b": jnp.zeros(20)}
    sample = lambda *args: random_directions.sample_directions(
        TorchGenerator(3), alpha, *args
    )
    directions = sample(0, 5)
    for leaf in jax.tree.leaves(directions):
        norms = np.linalg.norm(np.reshape(leaf, (5, -1)), axis=1)
        np.testing.assert_allclose(norms, 1.0, rtol=1e-12)
    np.testing.assert_array_equal(sample(2, 3)["b"], directions["b"][2:])


def test_differences_along_directions_are_derivatives_along_them():
    """On a quadratic, PZOBO and HOZOG are products with the exact derivatives."""
    reference = np.random.default_rng(0)
    A = jnp.asarray(reference.normal(size=(3, 3)))
    inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - A @ alpha["a"]) ** 2)
    outer = lambda w, alpha, batch: jnp.sum(w**2) + jnp.sum(alpha["a"] ** 3)
    problem = hg.Bilevel(inner, outer)
    solver, w = hg.Descent(optax.sgd(0.3), 4), jnp.ones(3)
    alpha = {"a": jnp.asarray(reference.normal(size=3))}
    u = {"a": jnp.asarray(reference.normal(size=(1, 3)))}

    def final_w(alpha):
        return 0.7**4 * w + (1 - 0.7**4) * A @ alpha["a"]

    value = lambda alpha: outer(final_w(alpha), alpha, None)
    direct = 3 * alpha["a"] ** 2
    total = jax.grad(value)(alpha)["a"]
    expected = {
        "direct": direct,
        "PZOBO": direct + jnp.vdot(total - direct, u["a"][0]) * u["a"][0],
        "HOZOG": jnp.vdot(total, u["a"][0]) * u["a"][0],
    }
    cost = {"direct": 5.0, "PZOBO": 9.0, "HOZOG": 8 + 2 / 3}
    for kind, hypergradient in expected.items():
        estimator = random_directions.AlongDirections(solver, u, 1e-6, kind)
        estimate = hg.hypergradient(problem, estimator)(w, alpha)
        np.testing.assert_allclose(estimate.hypergradient["a"], hypergradient, 1e-4)
        np.testing.assert_allclose(estimate.value, value(alpha), 1e-12)
        np.testing.assert_allclose(estimate.stats["gradient_equivalents"], cost[kind])
