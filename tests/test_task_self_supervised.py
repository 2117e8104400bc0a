"""Contrastive learning: hypergradients through three levels, views, the probe."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.ndimage
from jax.flatten_util import ravel_pytree
from sklearn.linear_model import Ridge

import hypergrad as hg
from hypergrad import datasets as datasets
from hypergrad.studies import self_supervised as study
from hypergrad.tasks import self_supervised as task_file

SHORT = hg.Descent(optax.sgd(0.3, momentum=0.9), 5)


def small():
    return task_file.make(key=jax.random.key(0), width=3, dimension=2)


def estimate(problem, estimator, task, key):
    state = estimator.init(problem, task.w, task.alpha, key)
    found, _ = jax.jit(estimator.estimate)(problem, state, task.alpha, key)
    return found, ravel_pytree(found.hypergradient)[0]


@pytest.mark.parametrize(
    "mode", ["unrolled", pytest.param("forward", marks=pytest.mark.slow)]
)
def test_hypergradients_equal_central_differences(mode, key):
    """Of five steps on views drawn with one key, the probe, and its error."""
    task = small()
    estimator = {"unrolled": hg.Unrolled, "forward": hg.Forward}[mode](SHORT)
    _, found = estimate(task.problem, estimator, task, key)
    # So short a step that hardly one of 20,000 places passes a pixel on it.
    oracle = hg.CentralDifference(SHORT, 1e-7)
    _, expected = estimate(task.problem, oracle, task, key)
    assert jnp.min(jnp.abs(expected)) > 1e-6
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_the_probe_may_be_a_nested_argmin(key):
    """The third level by the implicit function theorem, not through its formula."""
    task = small()
    fitted = hg.ClosedForm(lambda f, batch: task_file.probe(f, batch))
    solution = hg.argmin(task_file.probe_loss, fitted, hg.CG(rtol=1e-13))

    def nested(w, alpha, batch):
        f = task_file.hidden(w, batch["x"])
        v = solution(jnp.zeros((f.shape[1] + 1, 10)), f, batch)
        y = jax.nn.one_hot(batch["y"], 10)
        error = jnp.sum((task_file.with_one(f) @ v - y) ** 2, axis=1) / 2
        return jnp.sum(batch["judge"] * error) / jnp.sum(batch["judge"])

    plain = task.problem
    problem = hg.Bilevel(plain.inner_loss, nested, plain.inner_data, plain.outer_data)
    estimator = hg.Unrolled(SHORT)
    one, expected = estimate(plain, estimator, task, key)
    other, found = estimate(problem, estimator, task, key)
    np.testing.assert_allclose(other.value, one.value, rtol=1e-10)
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_the_probe_is_scikit_learns_ridge(key):
    """On the examples to fit; the constant is penalised as any feature."""
    f = jax.random.normal(key, (60, 5))
    y = jnp.arange(60) % 10
    fit = (jnp.arange(60) < 40).astype(float)
    batch = {"y": y, "fit": fit, "penalty": jnp.asarray(0.3)}
    features = np.concatenate([f, np.ones((60, 1))], axis=1)[:40]
    ridge = Ridge(alpha=0.3, fit_intercept=False).fit(features, np.eye(10)[y[:40]])
    np.testing.assert_allclose(task_file.probe(f, batch), ridge.coef_.T, rtol=1e-8)


def test_views_are_what_the_strengths_say(key):
    """None: the image itself. A fixed crop and shift: scipy's interpolation."""
    x = jax.random.uniform(key, (8, 8))
    nothing = {"noise": 0.0, "crop": 0.0, "shift": 0.0}
    view = lambda alpha: task_file.augment(alpha, x, key)
    np.testing.assert_allclose(view(nothing), x, atol=1e-12)
    place = 3.5 + (np.arange(8) - 3.5) * 0.7 + 0.4
    found = task_file.resample(place, task_file.resample(place, x.T).T)
    grid = np.meshgrid(place, place, indexing="ij")
    expected = scipy.ndimage.map_coordinates(x, grid, order=1, mode="grid-constant")
    np.testing.assert_allclose(found, expected, atol=1e-12)
    noisy = view(nothing | {"noise": 2.0}) - x
    np.testing.assert_allclose(noisy, 2 * (view(nothing | {"noise": 1.0}) - x))
    assert 1 < jnp.std(noisy) < 3


def test_info_nce_is_the_papers():
    """Written out, pair by pair."""
    a, b = np.random.default_rng(0).normal(size=(2, 5, 3))
    a, b = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (a, b))
    total = 0.0
    for first, second in ((a, b), (b, a)):
        for i in range(5):
            scores = np.exp([first[i] @ second[j] / 0.3 for j in range(5)])
            total -= np.log(scores[i] / scores.sum()) / 10
    found = task_file.info_nce(jnp.asarray(a), jnp.asarray(b), 0.3)
    np.testing.assert_allclose(found, total, rtol=1e-10)


def test_the_split_is_a_partition():
    """800 images without labels; 100, 300 and 597 with; those fit are not judged."""
    digits = datasets.load("digits")
    marked = digits | {"x": np.repeat(np.arange(1797)[:, None], 64, axis=1)}
    parts = task_file.split(marked, jax.random.key(1), 1.0)
    first = lambda part: np.asarray(part["x"][:, 0, 0]).astype(int)
    train, val, test = (first(parts[name]) for name in ("train", "val", "test"))
    assert [len(train), len(val), len(test)] == [800, 400, 697]
    np.testing.assert_array_equal(val[:100], test[:100])
    assert sorted([*train, *val, *test[100:]]) == list(range(1797))
    for name, marks in (("val", val), ("test", test)):
        np.testing.assert_array_equal(parts[name]["y"], digits["y"][marks])
        np.testing.assert_array_equal(parts[name]["fit"], np.arange(len(marks)) < 100)
        np.testing.assert_array_equal(parts[name]["judge"], 1 - parts[name]["fit"])


def test_no_encoder_both_chooses_a_temperature_and_is_judged(monkeypatch):
    """The baseline's error is not that of the encoders that were best on validation."""
    numbers = lambda best: [
        {"val_error": float(i != best), "test_error": i / 12} for i in range(12)
    ]
    grids = {study.CHOSEN: numbers(3), study.JUDGED: numbers(0)}
    monkeypatch.setattr(study, "grid", lambda seed, purpose: grids[purpose])
    found = study.row("baseline", 0)
    assert found["temperature"] == study.TEMPERATURES[3]
    assert (found["test_error"], found["beaten_by"]) == (3 / 12, 3 / 12)
    assert study.CHOSEN != study.JUDGED


def test_another_scale_is_refused():
    """With what there is."""
    with pytest.raises(ValueError, match="'small' only"):
        task_file.make(key=jax.random.key(0), scale="paper")
