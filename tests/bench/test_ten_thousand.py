"""The data, losses and searches of the table `ten_thousand`, on small random images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, average_precision_score, f1_score

import hypergrad as hg
from benchmarks import ten_thousand
from benchmarks.shared import imbalanced_mnist, share_search
from hypergrad.runtime.compat import enable_x64

NUM_FEATURES = 6
NUM_IMAGES, NUM_SOURCE = 2100, 1800
SIZES = {"NUM_TRAIN": 120, "NUM_VAL": 60, "NUM_HELD_OUT": 20, "NUM_SOURCE": NUM_SOURCE}
METRICS = imbalanced_mnist.METRICS


@pytest.fixture(autouse=True)
def images(monkeypatch):
    """Random images in place of MNIST; the first feature is the number of the image."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, NUM_IMAGES)
    x = rng.uniform(size=(NUM_IMAGES, NUM_FEATURES)) + 0.1 * y[:, None]
    x[:, 0] = np.arange(NUM_IMAGES)
    data = {"x": x, "y": y}
    monkeypatch.setattr(imbalanced_mnist.datasets, "load", lambda name: data)
    for name, size in SIZES.items():
        monkeypatch.setattr(imbalanced_mnist, name, size)
    monkeypatch.setattr(imbalanced_mnist, "NUM_FEATURES", NUM_FEATURES)
    return data


@pytest.fixture
def scaled_images(images):
    """The same images with a first feature as small as the others."""
    images["x"][:, 0] /= NUM_IMAGES
    return images


def test_splits_are_disjoint_and_labels_are_those_of_the_images(images):
    splits = imbalanced_mnist.split(3)
    rows = {part: splits[part]["x"][:, 0].astype(int) for part in splits}
    assert len(rows["train"]) == SIZES["NUM_TRAIN"]
    assert len(rows["val"]) == SIZES["NUM_VAL"]
    all_rows = np.concatenate(list(rows.values()))
    assert len(np.unique(all_rows)) == len(all_rows)
    np.testing.assert_array_equal(rows["test"], np.arange(NUM_SOURCE, NUM_IMAGES))
    np.testing.assert_array_equal(splits["train"]["clean"], images["y"][rows["train"]])
    for part in ("val", "test"):
        np.testing.assert_array_equal(splits[part]["y"], images["y"][rows[part]])


def test_wrong_labels_are_marked_and_as_many_as_stated(monkeypatch):
    monkeypatch.setattr(imbalanced_mnist, "NUM_TRAIN", 500)
    shares = []
    for seed in range(20):
        train = imbalanced_mnist.split(seed)["train"]
        np.testing.assert_array_equal(train["wrong"], train["y"] != train["clean"])
        shares.append(np.mean(train["wrong"]))
    deviation = np.sqrt(0.4 * 0.6 / (20 * 500))
    assert abs(np.mean(shares) - 0.4) < 4 * deviation


def test_classes_are_kept_in_the_stated_shares(images):
    """Over seeds each class has each rank, so that shares are compared by rank."""
    test_labels = images["y"][NUM_SOURCE:]
    kept, total = np.zeros(10), np.zeros(10)
    for seed in range(40):
        ranks = np.random.default_rng(seed).permutation(10)
        use = imbalanced_mnist.split(seed)["test"]["use"]
        for label, rank in enumerate(ranks):
            kept[rank] += np.sum(use[test_labels == label])
            total[rank] += np.sum(test_labels == label)
    expected = 0.1 ** (np.arange(10) / 9)
    deviation = np.sqrt(expected * (1 - expected) / total)
    assert np.all(np.abs(kept / total - expected) <= 4 * deviation)


def random_model(seed=0):
    """Returns a model with random numbers."""
    rng = np.random.default_rng(seed)
    return {
        "W": jnp.asarray(rng.normal(size=(NUM_FEATURES, 10))),
        "b": jnp.asarray(rng.normal(size=10)),
    }


@pytest.mark.usefixtures("scaled_images")
def test_exact_metrics_equal_those_of_scikit_learn_on_the_images_in_use():
    task, w = imbalanced_mnist.make_task(jax.random.key(1)), random_model()
    batch = jax.tree.map(np.asarray, task.splits["test"])
    in_use = batch["use"] > 0
    scores = (batch["x"] @ np.asarray(w["W"]) + np.asarray(w["b"]))[in_use]
    y = batch["y"][in_use]
    expected = {
        "accuracy": accuracy_score(y, scores.argmax(axis=1)),
        "F1": f1_score(y, scores.argmax(axis=1), average="macro"),
        "mAP": average_precision_score(np.eye(10)[y], scores, average="macro"),
    }
    for metric, value in expected.items():
        got = task.metrics[f"test_{metric}"](w, task.alpha, jax.random.key(0))
        assert got == pytest.approx(value, abs=1e-6), metric


@pytest.mark.usefixtures("scaled_images")
@pytest.mark.parametrize("metric", METRICS)
def test_surrogates_tend_to_the_exact_metric(metric):
    w, val = random_model(), imbalanced_mnist.make_task(jax.random.key(1)).splits["val"]
    batch = val | {"temperature": jnp.full(len(val["y"]), 1e-6)}
    loss = imbalanced_mnist.surrogate_loss(metric)(w, None, batch)
    exact = imbalanced_mnist.exact_loss(metric)(w, None, val)
    assert loss == pytest.approx(float(exact), abs=1e-5)


@pytest.mark.usefixtures("scaled_images")
def test_the_final_model_is_stationary():
    """The gradient is that of the protocol, by NumPy."""
    splits = imbalanced_mnist.split(2)
    train, weights = splits["train"], np.random.default_rng(5).uniform(size=120)
    w = imbalanced_mnist.train_model(jnp.asarray(weights), train)
    w = {name: np.asarray(value, float) for name, value in w.items()}

    def gradient(w):
        scores = train["x"] @ w["W"] + w["b"]
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        residual = weights[:, None] * (p - np.eye(10)[train["y"]]) / len(weights)
        return train["x"].T @ residual + 2e-3 * w["W"], residual.sum(axis=0)

    norm = lambda parts: np.sqrt(sum(np.sum(part**2) for part in parts))
    at_zero = norm(gradient({name: np.zeros_like(x) for name, x in w.items()}))
    assert norm(gradient(w)) <= 1.1e-4 * at_zero


@pytest.mark.usefixtures("scaled_images")
@pytest.mark.parametrize("metric", ["", *METRICS])
def test_hypergradients_of_each_outer_loss_equal_central_differences(metric):
    with enable_x64(True):
        task = imbalanced_mnist.make_task(jax.random.key(4), metric=metric)
        problem = jax.tree.map(
            lambda x: x.astype(float) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            task.problem,
        )
        w = jax.tree.map(lambda x: x.astype(float), task.w)
        newton = hg.Newton(tolerance=1e-10)
        estimator = hg.Implicit(newton, hg.CG(rtol=1e-10))
        alpha = jnp.asarray(np.random.default_rng(6).uniform(0.3, 0.7, 120))
        estimate = hg.hypergradient(problem, estimator)(w, alpha)

        def value(alpha):
            data, val = problem.inner_data, problem.outer_data
            solution, _ = newton.solve(
                problem.inner_loss, w, alpha, data, jax.random.key(0)
            )
            return problem.outer_loss(solution, alpha, val)

        direction = jnp.asarray(np.random.default_rng(7).normal(size=120))
        step = 1e-4
        ahead, behind = value(alpha + step * direction), value(alpha - step * direction)
        expected = (ahead - behind) / (2 * step)
        got = estimate.hypergradient @ direction
        assert got == pytest.approx(float(expected), rel=1e-4, abs=1e-9)


@pytest.mark.usefixtures("scaled_images")
@pytest.mark.parametrize("metric", ["", *METRICS])
def test_held_out_images_are_not_learned_from(metric):
    """The outer loss of a tuning run does not depend on their labels."""
    make = lambda hold_out: imbalanced_mnist.make_task(
        jax.random.key(4), metric=metric, hold_out=hold_out
    )
    w, task = random_model(), make(True)
    val = task.problem.outer_data
    changed = val | {"y": val["y"].at[: SIZES["NUM_HELD_OUT"]].set(0)}
    outer_loss = task.problem.outer_loss
    assert outer_loss(w, None, val) == outer_loss(w, None, changed)
    all_val = make(False).problem.outer_data
    assert np.all(np.asarray(all_val["use"]) == 1)
    assert int(np.sum(np.asarray(val["use"]))) == 40


@pytest.mark.usefixtures("scaled_images")
def test_share_keeps_the_images_with_the_lowest_losses():
    task = imbalanced_mnist.make_task(
        jax.random.key(4), metric="accuracy", is_exact=True
    )
    key = jax.random.key(8)
    trace = ten_thousand.search_kept_share(task, budget=400.0, key=key)
    kept = np.asarray(trace.alpha) > 0
    val = task.splits["val"]
    w = imbalanced_mnist.train_model(val["use"], val)
    scores = np.asarray(task.splits["train"]["x"] @ w["W"] + w["b"][None], float)
    y = np.asarray(task.splits["train"]["y"])
    losses = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(y)), y]
    assert 0 < kept.sum() < len(kept)
    assert losses[kept].max() <= losses[~kept].min()
    cost = np.asarray(trace.stats["gradient_equivalents"])
    assert cost[0] >= ten_thousand.FILTER_COST
    assert cost[:-1].sum() <= 400.0


def test_the_loss_of_a_share_is_that_of_the_examples_that_come_first():
    rng, w = np.random.default_rng(9), random_model()
    x, y = rng.normal(size=(10, NUM_FEATURES)), rng.integers(0, 10, 10)
    place = rng.permutation(10) / 10
    batch = {"x": x, "y": y, "penalty": 0.5, "place": place}
    loss = share_search.loss_of_share(w, 0.3, jax.tree.map(jnp.asarray, batch))
    scores = x @ np.asarray(w["W"], float) + np.asarray(w["b"], float)
    losses = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(10), y]
    expected = losses[place < 0.3].sum() / 10 + 0.5 * np.sum(np.square(w["W"]))
    assert loss == pytest.approx(float(expected), rel=1e-5)
