"""L2 penalties: their hypergradient, HOAG's grid optimum, fifty images overfitted."""

import os

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from hypergrad.tasks import penalties

SHORT = hg.Descent(optax.sgd(0.3, momentum=0.9), 12)
LONG = hg.Descent(optax.sgd(0.3, momentum=0.9), 5000)


def value(task, solver, alpha):
    """The whole pipeline: train with ``alpha``, then the validation loss."""
    problem, key = task.problem, jax.random.key(0)
    w, _ = solver.solve(problem.inner_loss, task.w, alpha, problem.inner_data, key)
    return problem.outer_value(w, alpha, problem.outer_data)


@pytest.mark.parametrize(
    ("variant", "estimator"),
    [
        ("logistic", hg.Implicit(LONG)),
        ("cnn", hg.Unrolled(SHORT)),
        pytest.param("softmax", hg.Implicit(LONG), marks=pytest.mark.slow),
        pytest.param("mlp", hg.Implicit(LONG), marks=pytest.mark.slow),
        pytest.param("cnn", hg.Implicit(LONG), marks=pytest.mark.slow),
        pytest.param("softmax", hg.Unrolled(SHORT), marks=pytest.mark.slow),
        pytest.param("mlp", hg.Unrolled(SHORT), marks=pytest.mark.slow),
    ],
    ids=lambda x: x if isinstance(x, str) else x.target,
)
def test_the_hypergradient_is_that_of_the_whole_pipeline(variant, estimator, key):
    """Along a random direction, by central differences.

    Thousands of steps converge under penalties this strong, for `Implicit`; twelve are
    the procedure that `Unrolled` differentiates.
    """
    task = penalties.make(key=key, variant=variant)
    flat, unravel = ravel_pytree(task.alpha)
    first, second = jax.random.split(key)
    flat = -2.0 + 0.3 * jax.random.normal(first, flat.shape)
    direction = jax.random.normal(second, flat.shape)
    direction = direction / jnp.linalg.norm(direction)
    found = hg.hypergradient(task.problem, estimator)(task.w, unravel(flat))
    assert found.stats["trusted"]
    along = ravel_pytree(found.hypergradient)[0] @ direction
    at = jax.jit(lambda t: value(task, estimator.solver, unravel(flat + t * direction)))
    expected = (at(1e-4) - at(-1e-4)) / 2e-4
    np.testing.assert_allclose(along, expected, rtol=1e-6)


@pytest.mark.slow
def test_hoag_ends_at_the_grid_optimum():
    """Within 0.5 in log-penalty, by each of its schedules, on five splits."""
    grid = jnp.arange(penalties.LOW, penalties.HIGH, 0.25)
    optimizer = optax.adam(0.3)

    @jax.jit
    @jax.vmap
    def both(seed):
        task = penalties.make(key=jax.random.key(seed), variant="hoag")
        best = grid[jnp.argmin(jax.vmap(lambda a: value(task, hg.Newton(), a))(grid))]
        return best, jax.vmap(lambda rtol: hoag(task, rtol))(schedules).alpha

    def hoag(task, rtol):
        estimator = hg.Implicit(task.solver, rtol=rtol)
        return hg.minimize(
            task.problem, estimator, optimizer, task.w, task.alpha, num_steps=60,
            space=task.space,
        )  # fmt: skip

    names = ("quadratic", "cubic", "exponential")
    schedules = jnp.stack([penalties.tolerances(name, 60) for name in names])
    best, found = both(jnp.arange(5))
    assert jnp.all((best > penalties.LOW) & (best < grid[-1]))
    np.testing.assert_allclose(found, jnp.stack([best] * 3, axis=1), atol=0.5)


def test_tolerances_are_hoags():
    """1/k² and 1/k³ and 0.9^(k-1) of the first, floored."""
    found = penalties.tolerances("quadratic", 4, init_tol=0.2, min_tol=0.03)
    np.testing.assert_allclose(found, [0.2, 0.05, 0.03, 0.03])
    found = penalties.tolerances("cubic", 3, init_tol=0.8)
    np.testing.assert_allclose(found, [0.8, 0.1, 0.8 / 27])
    found = penalties.tolerances("exponential", 3)
    np.testing.assert_allclose(found, [0.1, 0.09, 0.081])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "scale", ["small", pytest.param("paper", marks=pytest.mark.data)]
)
def test_fifty_validation_images_are_overfitted(scale, seed):
    """One penalty per weight classifies all of them, which one penalty does not."""
    if scale == "paper" and not os.environ.get(hg.datasets.VARIABLE):
        pytest.skip(f"{hg.datasets.VARIABLE} is not set")

    def run(per):
        task = penalties.make(
            key=jax.random.key(seed), scale=scale, variant="overfit", granularity=per
        )
        estimator = hg.Unrolled(task.solver, warm_start=True)
        trace = hg.minimize(
            task.problem, estimator, optax.adam(0.2), task.w, task.alpha, num_steps=40,
            space=task.space,
        )  # fmt: skip
        score = task.metrics["test_accuracy"].func
        return score(task.problem.outer_data, trace.w, trace.alpha, None)

    assert run("parameter") == 1.0
    assert run("model") < 0.95


def test_the_penalty_is_a_sum_over_weights(key):
    """One penalty, one a row and one a number agree where they hold the same value."""
    w = {"kernel": jax.random.normal(key, (3, 2)), "bias": jnp.array([1.0, -2.0])}
    expected = 0.5 * np.exp(-1.5) * (np.sum(np.asarray(w["kernel"]) ** 2) + 5)
    for per in ("model", "feature", "parameter"):
        alpha = penalties.log_penalties(w, per, -1.5)
        np.testing.assert_allclose(penalties.penalty(w, alpha), expected, rtol=1e-12)
    alpha = {"kernel": jnp.log(jnp.array([[1.0], [2.0], [3.0]])), "bias": jnp.zeros(1)}
    rows = np.sum(np.asarray(w["kernel"]) ** 2, axis=1)
    expected = 0.5 * (rows @ [1, 2, 3] + 5)
    np.testing.assert_allclose(penalties.penalty(w, alpha), expected, rtol=1e-12)


def test_one_score_is_logistic_regression():
    """Cross-entropy ``softplus(-s)`` for class 1, ``softplus(s)`` for class 0."""
    score = lambda w, x: w * x
    batch = {"x": jnp.array([[2.0], [-3.0]]), "y": jnp.array([1, 0])}
    batch |= {"use": jnp.ones(2)}
    found = penalties.cross_entropy(score, 0.5, batch)
    expected = np.mean(np.log1p(np.exp([-1.0, -1.5])))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert penalties.accuracy(score, batch, 0.5, None, None) == 1.0
    assert penalties.accuracy(score, batch, -0.5, None, None) == 0.0


def test_held_out_examples_are_out_of_use(key):
    """A third of validation counts for nothing in the outer loss."""
    kept, whole = (
        penalties.make(key=key, hold_out=hold_out).problem.outer_data
        for hold_out in (jnp.asarray(True), False)
    )
    assert (jnp.sum(kept["use"]), jnp.sum(whole["use"])) == (267, 400)
    used = jax.tree.map(lambda leaf: leaf[np.asarray(kept["use"]) == 1], whole)
    score = lambda w, x: x[:, :10] * w
    loss = lambda batch: penalties.cross_entropy(score, 2.0, batch)
    np.testing.assert_allclose(loss(kept), loss(used), rtol=1e-12)
    share = lambda batch: penalties.accuracy(score, batch, 2.0, None, None)
    np.testing.assert_allclose(share(kept), share(used), rtol=1e-12)


def test_the_split_is_a_partition_with_the_marked_examples_last(key):
    """Test examples are the marked ones; no example is in two parts."""
    data = {
        "x": jnp.arange(20.0)[:, None], "y": jnp.arange(20), "test": jnp.arange(20) < 6
    }  # fmt: skip
    parts = penalties.split(data, key, (9, 5, 6))
    assert sorted(parts["test"]["y"].tolist()) == list(range(6))
    seen = np.concatenate([part["y"] for part in parts.values()])
    assert sorted(seen) == list(range(20))
    for part in parts.values():
        np.testing.assert_array_equal(part["x"][:, 0], part["y"])


def test_tumours_are_standardized_by_the_training_part_alone(key):
    """Mean 0 and deviation 1 there, and the same map elsewhere."""
    x = jax.random.normal(key, (12, 2)) * 3 + 1
    parts = {"train": {"x": x[:8]}, "test": {"x": x[8:]}}
    found = penalties.standardize(parts)
    np.testing.assert_allclose(found["train"]["x"].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(found["train"]["x"].std(0), 1, rtol=1e-12)
    again = found["test"]["x"] * x[:8].std(0)[None] + x[:8].mean(0)[None]
    np.testing.assert_allclose(again, x[8:], rtol=1e-12)


@pytest.mark.parametrize("variant", list(penalties.VARIANTS))
def test_the_papers_size_builds(variant):
    """On shapes alone: 70,000 images, of which 10,000 are for testing."""
    name = penalties.dataset_name(variant, "paper")
    num, features = (569, 30) if name == "breast_cancer" else (70_000, 784)
    shape = jax.ShapeDtypeStruct
    data = {"x": shape((num, features), float), "y": shape((num,), int)}
    if name == "mnist":
        data["test"] = shape((num,), bool)
    make = lambda data: penalties.make(
        key=jax.random.key(0), scale="paper", variant=variant, data=data
    )
    task = eqx.filter_eval_shape(make, data)
    sizes = penalties.VARIANTS[variant].paper
    assert task.problem.inner_data["x"].shape == (sizes[0], features)
    assert task.problem.outer_data["y"].shape == (sizes[1],)


def test_an_unknown_setting_is_refused(key):
    """With those that are known."""
    with pytest.raises(ValueError, match=r"scale.*small"):
        penalties.make(key=key, scale="large")
    with pytest.raises(ValueError, match=r"variant.*softmax"):
        penalties.make(key=key, variant="forest")
    with pytest.raises(ValueError, match=r"granularity.*feature"):
        penalties.make(key=key, granularity="layer")
