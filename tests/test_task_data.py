"""Data of a user: refused with what is needed, where a task would give NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.tasks import TASKS

DIGITS = hg.datasets.load("digits")
# Tasks that take examples with labels, and how many of them at least.
LEAST = {
    "architecture": 1001,
    "augmentation": 301,
    "cleaning": 1151,
    "penalties": 601,
    "schedules": 1001,
    "self_supervised": 1201,
    "semi_supervised": 1151,
}


def make(name: str, data, **settings) -> hg.tasks.Task:
    return TASKS[name].make(key=jax.random.key(0), data=data, **settings)


def some(num: int, **others) -> dict:
    """The first digits."""
    return {name: leaf[:num] for name, leaf in DIGITS.items()} | others


@pytest.mark.parametrize("name", [*LEAST, "federated", "unsupervised"])
def test_data_is_a_dict_of_arrays(name: str):
    """Not a tuple, other names, lists, rows that do not match."""
    x, y = DIGITS["x"], DIGITS["y"]
    settings = {"variant": "kmeans"} if name == "unsupervised" else {}
    for error, wrong in (
        (TypeError, (x, y)),
        (ValueError, {"X": x, "y": y}),
        (TypeError, {"x": x.tolist(), "y": y}),
        (ValueError, {"x": x, "y": y[:-1]}),
        (ValueError, {"x": x.reshape(-1, 8, 8), "y": y}),
        (TypeError, {"x": (16 * x).astype(int), "y": y}),
        (ValueError, {"x": np.where(x == 0, np.nan, x), "y": y}),
        (TypeError, {"x": x, "y": y.astype(float)}),
        (ValueError, {"x": x, "y": y + 1}),
        (ValueError, {"x": x, "y": y - 1}),
    ):
        with pytest.raises(error, match="data"):
            make(name, wrong, **settings)


@pytest.mark.parametrize("name", TASKS)
def test_a_number_is_no_key(name: str):
    """With what to write in its place."""
    with pytest.raises(TypeError, match=r"write jax\.random\.key\(3\)"):
        TASKS[name].make(key=3)


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("federated", {"num_client": 4}, "no argument num_client;.*num_clients"),
        ("physics", {"senors": 5, "Noise": 0.5}, "no argument Noise, senors;.*sensors"),
        ("reinforcement", {"num_episode": 2}, "no argument num_episode;.*num_episodes"),
    ],
    ids=["federated", "physics", "reinforcement"],
)
def test_a_misspelt_size_is_refused(name: str, wrong, says: str):
    """With the names that there are."""
    with pytest.raises(TypeError, match=says):
        TASKS[name].make(key=jax.random.key(0), **wrong)


@pytest.mark.parametrize("name", LEAST)
def test_every_part_has_an_example(name: str):
    """One fewer than the least is refused; with the least, one is there to test by."""
    with pytest.raises(ValueError, match=f"has {LEAST[name] - 1} examples"):
        make(name, some(LEAST[name] - 1))
    task = make(name, some(LEAST[name]))
    found = task.metric_values(task.w, task.alpha, jax.random.key(0))
    assert all(jnp.isfinite(value) for value in found.values())


@pytest.mark.parametrize(
    ("name", "settings", "features", "says"),
    [
        ("architecture", {}, 60, "square images"),
        ("architecture", {}, 49, "side even"),
        ("augmentation", {}, 60, "square images"),
        ("penalties", {"variant": "cnn"}, 60, "square images"),
        ("self_supervised", {}, 49, "8 by 8 pixels"),
    ],
)
def test_images_have_the_pixels_that_a_task_needs(name, settings, features, says):
    """Square, with even sides, or digits' own."""
    with pytest.raises(ValueError, match=says):
        make(name, some(1797, x=DIGITS["x"][:, :features]), **settings)


@pytest.mark.parametrize(
    ("name", "data", "settings", "says"),
    [
        ("penalties", DIGITS, {"variant": "logistic"}, r"in 0\.\.1.*got 0\.\.9"),
        ("cleaning", DIGITS, {"corruption": 2.0}, "corruption.*2.0"),
        ("cleaning", hg.datasets.load("iris"), {}, "has 150 examples"),
        ("federated", hg.datasets.load("iris"), {}, "data must have"),
        ("federated", DIGITS, {"num_clients": 500}, "num_clients"),
        ("unsupervised", some(90, x=DIGITS["x"][:90, :3]), {"variant": "ppca"}, "data"),
    ],
)
def test_what_would_be_nan_is_refused(name: str, data, settings, says: str):
    """Classes, shares and sizes that do not fit."""
    with pytest.raises(ValueError, match=says):
        make(name, data, **settings)


def test_small_data_is_tested_on_what_nothing_was_learned_from():
    """Fewer examples than are usually for testing: the rest of them."""
    rows = np.arange(700.0)[:, None] + np.zeros((1, 64))
    task = make("penalties", some(700, x=rows))
    problem, test = task.problem, task.metrics["test_loss"].args[0]
    parts = (problem.inner_data, problem.outer_data, test)
    seen = [np.asarray(part["x"])[:, 0] for part in parts]
    assert [len(x) for x in seen] == [200, 400, 100]
    assert sorted(np.concatenate(seen)) == list(range(700))


@pytest.mark.parametrize("name", ["penalties", "unsupervised"])
def test_a_constant_feature_is_zero_when_standardised(name: str):
    """Not NaN."""
    variant = {"penalties": "hoag", "unsupervised": "kde"}[name]
    found = hg.datasets.load("breast_cancer")
    constant = found["x"] * (np.arange(30) > 0)[None]
    task = make(name, found | {"x": constant}, variant=variant)
    np.testing.assert_array_equal(task.problem.inner_data["x"][:, 0], 0)
    assert jnp.isfinite(
        task.problem.outer_value(task.w, task.alpha, task.problem.outer_data)
    )


def test_clusters_need_no_labels():
    """Without them their agreement with classes is no metric."""
    task = make("unsupervised", {"x": hg.datasets.load("iris")["x"]}, variant="kmeans")
    assert set(task.metrics) == {"test_nll"}


@pytest.mark.parametrize(
    ("shape", "settings", "says"),
    [
        ((10, 20, 64), {}, "side, side"),
        ((10, 20, 8, 6), {}, "side, side"),
        ((10, 15, 8, 8), {}, "images"),
        ((10, 20, 8, 8), {"num_ways": 9}, "num_ways"),
    ],
)
def test_images_make_tasks(shape, settings, says: str):
    """Square, drawn often enough, of enough characters."""
    with pytest.raises(ValueError, match=says):
        hg.tasks.few_shot.make(
            key=jax.random.key(0), images=jnp.zeros(shape), **settings
        )
