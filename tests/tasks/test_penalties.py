"""Tests of L2 penalties, of HOAG's schedules, and of the helpers of classifiers."""

import os

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.signal
from flax import nnx
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from hypergrad.tasks import classifier, networks, penalties

SHORT = hg.Descent(optax.sgd(0.3, momentum=0.9), 12)
LONG = hg.Descent(optax.sgd(0.3, momentum=0.9), 5000)


# Hypergradients and outer loops.


@pytest.mark.parametrize(
    ("variant", "estimator"),
    [
        pytest.param("logistic", hg.Implicit(LONG), id="logistic, implicit"),
        pytest.param(
            "mlp", hg.Implicit(LONG), marks=pytest.mark.slow, id="mlp, implicit"
        ),
        pytest.param(
            "cnn", hg.Unrolled(SHORT), marks=pytest.mark.slow, id="cnn, unrolled"
        ),
    ],
)
def test_the_hypergradient_equals_the_central_difference(variant, estimator, key):
    """The derivative of the whole pipeline is checked along a random direction.

    5,000 steps converge under penalties this strong, as `Implicit` requires.
    """
    task = penalties.make(key=key, variant=variant)
    problem = task.problem
    flat, unravel = ravel_pytree(task.alpha)
    alpha_key, direction_key = jax.random.split(key)
    flat = -2.0 + 0.3 * jax.random.normal(alpha_key, flat.shape)
    direction = jax.random.normal(direction_key, flat.shape)
    direction = direction / jnp.linalg.norm(direction)

    @jax.jit
    def value(t):
        alpha = unravel(flat + t * direction)
        w, _ = estimator.solver.solve(
            problem.inner_loss, task.w, alpha, problem.inner_data, jax.random.key(0)
        )
        return problem.outer_value(w, alpha, problem.outer_data)

    estimate = hg.hypergradient(problem, estimator)(task.w, unravel(flat))
    assert estimate.trusted
    actual = ravel_pytree(estimate.hypergradient)[0] @ direction
    expected = (value(1e-4) - value(-1e-4)) / 2e-4
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scale", ["small", pytest.param("paper", marks=pytest.mark.data)]
)
def test_one_penalty_per_weight_overfits_fifty_validation_images(scale: str):
    """One penalty per weight classifies all of them, one penalty for all does not."""
    if scale == "paper" and not os.environ.get(hg.datasets.VARIABLE):
        # This scale needs images that are not on PyPI.
        pytest.skip(f"{hg.datasets.VARIABLE} is not set")

    def val_accuracy(granularity):
        task = penalties.make(
            key=jax.random.key(0), scale=scale, variant="overfit",
            granularity=granularity,
        )  # fmt: skip
        estimator = hg.Unrolled(task.solver, warm_start=True)
        trace = hg.minimize(
            task.problem, estimator, optax.adam(0.2), task.w, task.alpha, num_steps=40,
            space=task.space,
        )  # fmt: skip
        accuracy_fn = task.metrics["test_accuracy"].func
        return accuracy_fn(task.problem.outer_data, trace.w, trace.alpha, None)

    assert val_accuracy("parameter") == 1.0
    assert val_accuracy("model") < 0.95


# Formulas.


@pytest.mark.parametrize(
    ("schedule", "num_steps", "arguments", "expected"),
    [
        ("quadratic", 4, {"init_tol": 0.2, "min_tol": 0.03}, [0.2, 0.05, 0.03, 0.03]),
        ("cubic", 3, {"init_tol": 0.8}, [0.8, 0.1, 0.8 / 27]),
        ("exponential", 3, {}, [0.1, 0.09, 0.081]),
    ],
    ids=["quadratic", "cubic", "exponential"],
)
def test_tolerances_follow_hoag(schedule, num_steps, arguments, expected):
    actual = penalties.tolerances(schedule, num_steps, **arguments)
    np.testing.assert_allclose(actual, expected)


def test_unknown_schedules_are_errors():
    with pytest.raises(ValueError, match="schedule"):
        penalties.tolerances("linear", 3)


def test_the_penalty_is_a_weighted_sum_of_squares(key):
    """All granularities agree if every log-penalty has the same value."""
    w = {"kernel": jax.random.normal(key, (3, 2)), "bias": jnp.array([1.0, -2.0])}
    squares = np.asarray(w["kernel"]) ** 2
    expected = 0.5 * np.exp(-1.5) * (np.sum(squares) + 5)
    for granularity in ("model", "feature", "parameter"):
        alpha = penalties.log_penalties(w, granularity, -1.5)
        np.testing.assert_allclose(penalties.penalty(w, alpha), expected, rtol=1e-12)
    alpha = {"kernel": jnp.log(jnp.array([[1.0], [2.0], [3.0]])), "bias": jnp.zeros(1)}
    expected = 0.5 * (np.sum(squares, axis=1) @ [1, 2, 3] + 5)
    np.testing.assert_allclose(penalties.penalty(w, alpha), expected, rtol=1e-12)


def test_a_single_score_is_logistic_regression():
    """The loss is ``softplus(-s)`` for class 1 and ``softplus(s)`` for class 0."""
    score_fn = lambda w, x: w * x
    batch = {"x": jnp.array([[2.0], [-3.0]]), "y": jnp.array([1, 0])}
    batch |= {"use": jnp.ones(2)}
    actual = classifier.cross_entropy(score_fn, 0.5, batch)
    expected = np.mean(np.log1p(np.exp([-1.0, -1.5])))
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
    assert classifier.accuracy(score_fn, batch, 0.5, None, None) == 1.0
    assert classifier.accuracy(score_fn, batch, -0.5, None, None) == 0.0


def test_cnn_scores_equal_those_of_scipy_correlations(key):
    """The odd last row and column of the 5 x 5 maps are dropped by the pooling."""
    module = networks.CNN(7, channels=2, num_outputs=3, rngs=nnx.Rngs(0))
    graph, w = networks.split_module(module)
    w = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.1, w)  # biases start at 0
    x = jax.random.normal(key, (4, 49))
    kernels = w["convolution"]["kernel"].T.reshape(2, 3, 3)
    maps = [
        [scipy.signal.correlate(image, kernel, "valid") for kernel in kernels]
        for image in np.asarray(x).reshape(4, 7, 7)
    ]
    hidden = np.tanh(np.moveaxis(maps, 1, -1) + w["convolution"]["bias"])[:, :4, :4]
    pooled = hidden.reshape(4, 2, 2, 2, 2, 2).mean((2, 4)).reshape(4, -1)
    expected = pooled @ w["head"]["kernel"] + w["head"]["bias"]
    actual = classifier.make_score_fn(graph)(w, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-9)


# Data.


def test_a_third_of_the_validation_examples_is_held_out(key):
    """Loss and accuracy equal those of the other two thirds."""
    masked, full = (
        penalties.make(key=key, hold_out=hold_out).problem.outer_data
        for hold_out in (jnp.asarray(True), False)
    )
    assert (jnp.sum(masked["use"]), jnp.sum(full["use"])) == (267, 400)
    used = jax.tree.map(lambda leaf: leaf[np.asarray(masked["use"]) == 1], full)
    score_fn = lambda w, x: x[:, :10] * w
    loss = lambda batch: classifier.cross_entropy(score_fn, 2.0, batch)
    np.testing.assert_allclose(loss(masked), loss(used), rtol=1e-12)
    accuracy = lambda batch: classifier.accuracy(score_fn, batch, 2.0, None, None)
    np.testing.assert_allclose(accuracy(masked), accuracy(used), rtol=1e-12)


def test_the_split_is_a_partition_with_the_marked_examples_for_testing(key):
    data = {
        "x": jnp.arange(20.0)[:, None], "y": jnp.arange(20), "test": jnp.arange(20) < 6
    }  # fmt: skip
    splits = classifier.split(data, key, (9, 5, 6))
    assert sorted(splits["test"]["y"].tolist()) == list(range(6))
    assert sorted(np.concatenate([s["y"] for s in splits.values()])) == list(range(20))
    for batch in splits.values():
        np.testing.assert_array_equal(batch["x"][:, 0], batch["y"])


def test_the_training_examples_alone_determine_the_standardization(key):
    x = jax.random.normal(key, (12, 2)) * 3 + 1
    splits = penalties.standardize({"train": {"x": x[:8]}, "test": {"x": x[8:]}})
    np.testing.assert_allclose(splits["train"]["x"].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(splits["train"]["x"].std(0), 1, rtol=1e-12)
    expected = (x[8:] - x[:8].mean(0)[None]) / x[:8].std(0)[None]
    np.testing.assert_allclose(splits["test"]["x"], expected, rtol=1e-12)


@pytest.mark.parametrize("variant", list(penalties.VARIANTS))
def test_the_paper_scale_has_the_sizes_of_the_paper(variant: str):
    """The task is built on shapes only; MNIST has 10,000 marked test images."""
    name = penalties.dataset_name(variant, "paper")
    num, num_features = (569, 30) if name == "breast_cancer" else (70_000, 784)
    shape = jax.ShapeDtypeStruct
    data = {"x": shape((num, num_features), float), "y": shape((num,), int)}
    if name == "mnist":
        data["test"] = shape((num,), bool)
    make = lambda data: penalties.make(
        key=jax.random.key(0), scale="paper", variant=variant, data=data
    )
    task = eqx.filter_eval_shape(make, data)
    num_train, num_val, _ = penalties.VARIANTS[variant].paper
    assert task.problem.inner_data["x"].shape == (num_train, num_features)
    assert task.problem.outer_data["y"].shape == (num_val,)
