"""The network, the tasks and the two adaptations of `omniglot`, by definition."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks import omniglot as table
from benchmarks.shared import omniglot_tasks as omniglot
from hypergrad.problem import EstimateData
from tests.parameters import slow_except

NUM_CHARACTERS, NUM_DRAWINGS = 8, 20


@pytest.fixture(scope="module")
def characters():
    """Returns drawings whose pixels say which character and drawing they are."""
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(NUM_CHARACTERS, NUM_DRAWINGS, 28, 28))
    return omniglot.Characters(jnp.asarray(x, jnp.float32))


def test_features_are_those_of_strided_convolutions_as_in_tensorflow():
    """TensorFlow calls its padding SAME, as XLA does."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.uniform(keys[0], (5, 28, 28))
    filters = omniglot.init_filters(keys[1])
    shifts = [0.1 * jax.random.normal(keys[2], (64,)) for _ in filters]
    h = x[..., None]
    for W, shift in zip(filters, shifts, strict=True):
        h = jax.lax.conv_general_dilated(
            h, W.reshape(3, 3, -1, 64), (2, 2), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        h = np.asarray(h)
        h = (h - h.mean((0, 1, 2))) / np.sqrt(h.var((0, 1, 2)) + 1e-3)
        h = jnp.asarray(np.maximum(h + np.asarray(shift), 0))
    assert h.shape == (5, 2, 2, 64)
    actual = omniglot.features(filters, shifts, x)
    np.testing.assert_allclose(actual, h.mean((1, 2)), rtol=1e-5, atol=1e-6)


def test_filters_have_the_bounds_of_glorot():
    """The fans of 3 by 3 filters are nine times the numbers of channels."""
    filters = omniglot.init_filters(jax.random.key(0))
    for W, channels in zip(filters, (1, 64, 64, 64), strict=True):
        bound = np.sqrt(6 / (9 * channels + 9 * 64))
        assert 0.95 * bound < np.max(np.abs(W)) <= bound


def test_a_task_has_five_characters_that_are_turned_alike(characters):
    support, query = omniglot.sample_tasks(characters, jax.random.key(3))
    turned = np.stack([np.rot90(characters.images, k, (2, 3)) for k in range(4)])

    def identify(x):
        """Returns the turn, the character and the drawing of an image."""
        match = np.all(turned == np.asarray(x), axis=(3, 4))
        assert match.sum() == 1
        return [int(i[0]) for i in np.nonzero(match)]

    all_turns = set()
    for t in range(omniglot.NUM_TASKS):
        both = [
            [identify(part["x"][i, t]) for i in range(5)] for part in (support, query)
        ]
        (turns, names, drawings), (other_turns, other_names, other_drawings) = (
            np.transpose(part) for part in both
        )
        assert len(set(names)) == 5
        np.testing.assert_array_equal(names, other_names)
        np.testing.assert_array_equal(turns, other_turns)
        assert np.all(drawings != other_drawings)
        all_turns |= set(turns.tolist())
    assert all_turns == {0, 1, 2, 3}
    for part in (support, query):
        np.testing.assert_array_equal(part["y"], np.arange(5)[:, None] * np.ones(32))


def test_ridge_fit_is_the_minimum_of_its_loss(characters):
    support, _ = omniglot.sample_tasks(characters, jax.random.key(0))
    _, alpha = omniglot.init_ridge(jax.random.key(1), 784)
    alpha |= {"log_penalty": jnp.log(0.3)}
    w = omniglot.ridge_fit(omniglot.pixel_features, alpha, support)
    X = np.asarray(support["x"], float)[:, 4].reshape(5, -1)
    expected = np.linalg.solve(X.T @ X + 0.3 * np.eye(784), X.T @ np.eye(5))
    np.testing.assert_allclose(w[4], expected, atol=1e-4)
    gradient = jax.grad(omniglot.ridge_loss, argnums=1)(
        omniglot.pixel_features, w, alpha, support
    )
    assert np.max(np.abs(gradient)) < 1e-3


@pytest.mark.slow
def test_the_hypergradient_of_maml_is_that_of_its_definition(characters):
    """One step of descent per task, differentiated by JAX as a whole."""
    w, alpha = omniglot.init_maml(jax.random.key(0))
    data_fn = jax.tree_util.Partial(omniglot.sample_tasks, characters)
    problem = hg.Bilevel(
        omniglot.adaptation_loss, omniglot.query_loss,
        init_fn=omniglot.shared_start, data_fn=data_fn,
    )  # fmt: skip
    key = jax.random.key(5)
    estimate = hg.hypergradient(problem, hg.Unrolled(table.SOLVER))(w, alpha, key=key)
    data = EstimateData.sample(problem, estimate.key)
    support, query = data.inner_batch(), data.outer_batch()

    def meta_loss(alpha, support, query):
        def of_task(xs, ys, xq, yq):
            loss = lambda v, x, y: jnp.sum(
                optax.softmax_cross_entropy_with_integer_labels(
                    omniglot.task_scores(v, alpha["shifts"], x), y
                )
            )
            grads = jax.grad(loss)(alpha["start"], xs, ys)
            v = jax.tree.map(lambda v, g: v - 0.4 * g, alpha["start"], grads)
            return loss(v, xq, yq) / 5

        parts = support["x"], support["y"], query["x"], query["y"]
        return jnp.mean(jax.vmap(of_task, in_axes=1)(*parts))

    value, expected = jax.value_and_grad(meta_loss)(alpha, support, query)
    np.testing.assert_allclose(estimate.value, value, rtol=1e-5)
    for actual, leaf in zip(
        jax.tree.leaves(estimate.hypergradient), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(actual, leaf, rtol=1e-3, atol=1e-5)


@pytest.fixture
def small_table(monkeypatch):
    """Returns the table with few random images and two test batches."""
    rng = np.random.default_rng(1)
    images = rng.uniform(size=(60, NUM_DRAWINGS, 28, 28)).astype(np.float32)
    monkeypatch.setattr(omniglot.datasets, "load", lambda name: {"x": images})
    monkeypatch.setattr(omniglot, "NUM_TRAIN", 40)
    monkeypatch.setattr(omniglot, "NUM_VAL", 10)
    monkeypatch.setattr(table, "NUM_TEST_BATCHES", 2)
    return images


def test_the_parts_share_no_character_and_differ_between_seeds(small_table):
    parts = [omniglot.split_characters(jax.random.key(seed)) for seed in range(2)]
    assert [len(parts[0][x].images) for x in ("train", "val", "test")] == [40, 10, 10]
    first_pixels = lambda part: set(np.asarray(part.images)[:, 0, 0, 0].tolist())
    of_seeds = [[first_pixels(part) for part in x.values()] for x in parts]
    assert set.union(*of_seeds[0]) == set(small_table[:, 0, 0, 0].tolist())
    assert sum(map(len, of_seeds[0])) == 60
    assert of_seeds[0] != of_seeds[1]


@pytest.mark.parametrize("variant", slow_except(["maml", "ridge"], ["ridge"]))
def test_a_step_costs_five_gradients_and_moves_all_that_tasks_share(
    small_table, variant
):
    """The paper's scale is then 60,000 steps; metrics read their own characters."""
    task = table.make_task(jax.random.key(0), variant=variant)
    trace = table.learn(task, budget=10.0, key=jax.random.key(1))
    np.testing.assert_allclose(trace.cost, [5.0, 10.0])
    assert table.BUDGET["paper"] == 5 * 60_000
    changed = jax.tree.map(lambda x, y: bool(np.any(x != y)), task.alpha, trace.alpha)
    assert all(jax.tree.leaves(changed))
    solver = table.TEST_SOLVER if variant == "maml" else task.solver
    for name in ("val", "test"):
        _, solver_of_metric, problem, _ = task.metrics[f"{name}_accuracy"].args
        assert solver_of_metric is solver
        part = omniglot.split_characters(jax.random.split(jax.random.key(0))[0])[name]
        np.testing.assert_array_equal(problem.data_fn.args[0].images, part.images)


def test_the_figure_is_drawn_from_any_rows(tmp_path):
    losses = [None, *np.linspace(2, 1, table.NUM_BLOCKS - 1).tolist()]
    rows = [
        {"method": "pixels", "seed": 0, "test_accuracy": 0.5},
        {"method": "maml", "seed": 0, "test_accuracy": 0.9}
        | {"mean_losses": losses, "num_steps": 1000},
    ]
    for i in range(len(rows)):
        path = tmp_path / f"{i}.png"
        table.table.plot(rows[: i + 1], path)
        assert path.stat().st_size > 1000
