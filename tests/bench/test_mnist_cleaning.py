"""The split, the final training and the penalty method of `mnist_cleaning`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from benchmarks import mnist_cleaning as table
from benchmarks.shared import importance_penalty as method
from benchmarks.shared import noisy_mnist

NUM_FEATURES = 3


@pytest.fixture(scope="module")
def batches():
    """Returns two batches of random examples."""
    rng = np.random.default_rng(0)

    def batch(num_examples):
        x = jnp.asarray(rng.normal(size=(num_examples, NUM_FEATURES)))
        return {"x": x, "y": jnp.asarray(rng.integers(0, 10, num_examples))}

    return batch(8), batch(6)


def make_state(num_examples):
    """Returns a model, a state with random multipliers, and ``u``."""
    rng = np.random.default_rng(1)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape))
    w = {"W": array(NUM_FEATURES, 10), "b": array(10)}
    state = method.init_state(w, num_examples)
    nu = {"W": array(NUM_FEATURES, 10), "b": array(10)}
    numbers = {"rho": 0.7, "lam": 0.3, "eps": 1e9, "rate": 0.5}
    numbers = {name: jnp.asarray(x) for name, x in numbers.items()}
    return state._replace(nu=nu, **numbers), array(num_examples)


def losses_by_definition(w, batch):
    """Returns the cross-entropies of a flat model, without the code under test."""
    W, b = w[:-10].reshape(NUM_FEATURES, 10), w[-10:]
    scores = batch["x"] @ W + b[None]
    log_p = scores - jax.scipy.special.logsumexp(scores, axis=1, keepdims=True)
    return -jnp.take_along_axis(log_p, batch["y"][:, None], axis=1)[:, 0]


def g_by_definition(w, u, batch):
    importances = 1 / (1 + jnp.exp(-2 * u))  # (tanh u + 1) / 2
    losses = losses_by_definition(w, batch)
    return jnp.sum(importances * losses) / jnp.sum(importances)


def f_by_definition(w, batch):
    return jnp.mean(losses_by_definition(w, batch))


@jax.jit
def dense_gradients(w, u, state, batch, val_batch):
    """Returns ``dh/du`` and ``d(h + lam g)/dw`` by dense matrices."""
    nu, _ = ravel_pytree(state.nu)
    g_w = jax.grad(g_by_definition)(w, u, batch)
    H = jax.hessian(g_by_definition)(w, u, batch)
    J = jax.jacfwd(jax.grad(g_by_definition), argnums=1)(w, u, batch)
    c = nu + state.rho * g_w
    w_grad = jax.grad(f_by_definition)(w, val_batch) + H @ c + state.lam * g_w
    return J.T @ c, w_grad


def adam(moments, grad, rate, count):
    """Returns an update of Adam, by its formulas."""
    m = 0.9 * moments[0] + 0.1 * grad
    v = 0.999 * moments[1] + 0.001 * grad**2
    m_hat, v_hat = m / (1 - 0.9**count), v / (1 - 0.999**count)
    return (m, v), -rate * m_hat / (np.sqrt(v_hat) + 1e-8)


def test_a_step_is_that_of_the_formulas(batches, monkeypatch):
    """Three steps of the model, then one of u, with gradients by dense matrices."""
    monkeypatch.setattr(method, "NUM_STEPS", 3)
    batch, val_batch = batches
    state, u = make_state(len(batch["y"]))
    w, _ = ravel_pytree(state.w)
    gradients = lambda w, u: dense_gradients(w, u, state, batch, val_batch)
    moments = (np.zeros(w.size), np.zeros(w.size))
    for count in (1, 2, 3):
        moments, update = adam(moments, gradients(w, u)[1], 1e-4, count)
        w = w + 0.5 * update
    zeros = (np.zeros(u.size), np.zeros(u.size))
    _, update = adam(zeros, gradients(w, u)[0], 3.0, 1)
    step = jax.jit(lambda *args: method.step(*args))  # traced with this NUM_STEPS
    new_state, new_u = step(state, u, batch, val_batch)
    np.testing.assert_allclose(ravel_pytree(new_state.w)[0], w, rtol=1e-9)
    np.testing.assert_allclose(new_u, u + 0.5 * update, rtol=1e-6)
    # eps is large, so that the numbers of the penalty change at the new point.
    g_w = jax.grad(g_by_definition)(w, new_u, batch)
    rho = 1.1 * state.rho
    nu = ravel_pytree(state.nu)[0] + rho * g_w
    np.testing.assert_allclose(ravel_pytree(new_state.nu)[0], nu, rtol=1e-9)
    actual = [new_state.rho, new_state.lam, new_state.eps, new_state.rate]
    expected = [rho, 0.9 * state.lam, 0.9 * state.eps, 0.9 * state.rate]
    np.testing.assert_allclose(actual, expected, rtol=1e-9)


def test_the_penalty_changes_where_both_squared_gradients_are_below_eps(
    batches, monkeypatch
):
    monkeypatch.setattr(method, "NUM_STEPS", 1)
    batch, val_batch = batches
    state, u = make_state(len(batch["y"]))
    step = jax.jit(lambda *args: method.step(*args))  # traced with this NUM_STEPS
    new_state, new_u = step(state, u, batch, val_batch)
    w, _ = ravel_pytree(new_state.w)
    u_grad, w_grad = dense_gradients(w, new_u, state, batch, val_batch)
    measure = jnp.sqrt(jnp.sum(u_grad**2) ** 2 + jnp.sum(w_grad**2) ** 2)
    for factor in (0.9, 1.1):
        state = state._replace(eps=factor * measure)
        new_state, _ = step(state, u, batch, val_batch)
        assert (new_state.rho > state.rho) == (factor > 1)


def test_normalized_importances_have_mean_one_half_unless_they_are_clipped():
    importances = jnp.asarray([0.2, 0.4, 0.6])
    u = jnp.arctanh(2 * importances - 1)
    expected = importances * 0.5 / 0.4
    actual = method.importances_of(method.normalize(u))
    np.testing.assert_allclose(actual, expected, rtol=1e-9)
    u = jnp.arctanh(2 * jnp.asarray([1e-8, 1e-8, 1e-8, 0.9]) - 1)
    actual = method.importances_of(method.normalize(u))
    np.testing.assert_allclose(actual, [1e-5, 1e-5, 1e-5, 1 - 1e-5], rtol=1e-6)


def test_counted_calls_are_those_of_the_loops():
    """2,500 steps on a 25th of the data: 24 gradients of g, 23 products, 21 of f."""
    data = {"x": jnp.zeros((5000, 2)), "y": jnp.zeros(5000, int)}
    counts = method.count_calls(data, data)
    assert counts["num_hvps"] == 100 * 23
    assert counts["gradient_equivalents"] == 100 * (24 + 2 * 23 + 21) + 100


def clusters(num_examples, key):
    """Returns examples of ten classes that are far apart."""
    y = jnp.arange(num_examples) % 10
    x = 4.0 * jax.nn.one_hot(y, 10) + jax.random.normal(key, (num_examples, 10))
    return {"x": x, "y": y}


def test_final_training_is_adam_on_the_examples_that_are_kept():
    """One batch per epoch, so that the order does not matter; the others are NaN."""
    data = clusters(230, jax.random.key(0))
    is_kept = jnp.arange(230) < 200
    data["x"] = jnp.where(is_kept[:, None], data["x"], jnp.nan)
    train = lambda num_epochs: noisy_mnist.train_model(
        data, is_kept, jax.random.key(1), num_epochs
    )
    tree = train(0)
    w, unravel = ravel_pytree({"W": tree["W"], "b": tree["b"]})
    x, labels = np.asarray(data["x"][:200]), np.eye(10)[np.asarray(data["y"][:200])]
    moments = (np.zeros(w.size), np.zeros(w.size))
    for count in (1, 2, 3, 4):
        model = unravel(jnp.asarray(w))
        scores = x @ np.asarray(model["W"]) + np.asarray(model["b"])
        residual = np.asarray(jax.nn.softmax(scores)) - labels
        grads = {"W": x.T @ residual / 200, "b": residual.mean(0)}
        grad = np.asarray(ravel_pytree(jax.tree.map(jnp.asarray, grads))[0])
        moments, update = adam(moments, grad, 1e-4, count)
        w = w + update
    np.testing.assert_allclose(ravel_pytree(train(4))[0], w, rtol=1e-5, atol=1e-8)


def test_an_epoch_visits_each_kept_example_once(monkeypatch):
    """The loss records the labels of its batch, which are the numbers of examples."""
    visited = []

    def record_labels(w, batch):
        jax.debug.callback(lambda y: visited.append(np.asarray(y)), batch["y"])
        return jnp.sum(w["b"] ** 2)

    monkeypatch.setattr(noisy_mnist, "mean_loss", record_labels)
    data = {"x": jnp.zeros((1000, 2)), "y": jnp.arange(1000)}
    is_kept = data["y"] >= 600  # two batches
    noisy_mnist.train_model.clear_cache()
    noisy_mnist.train_model(data, is_kept, jax.random.key(1), 1)
    jax.effects_barrier()
    noisy_mnist.train_model.clear_cache()
    assert [len(labels) for labels in visited] == [200, 200]
    assert sorted(np.concatenate(visited).tolist()) == list(range(600, 1000))


def test_half_of_the_training_labels_are_wrong_and_nothing_else_changes():
    y = lambda n: jnp.arange(n) % 10
    data = {
        "train": {"x": jnp.zeros((5000, 2)), "y": y(5000)},
        "val": {"x": jnp.zeros((5000, 2)), "y": y(5000)},
        "test": {"x": jnp.zeros((30, 2)), "y": y(30)},
    }
    for hold_out in (False, True):
        splits = noisy_mnist.split(data, jax.random.key(0), hold_out)
        is_changed = np.asarray(splits["train"]["y"] != data["train"]["y"])
        np.testing.assert_array_equal(is_changed, np.arange(5000) < 2500)
        np.testing.assert_array_equal(splits["train"]["wrong"], is_changed)
        for name in ("val", "test"):
            np.testing.assert_array_equal(splits[name]["y"], data[name]["y"])
        assert np.sum(splits["val"]["use"]) == (4000 if hold_out else 5000)
        assert np.sum(splits["held_out"]["use"]) == (1000 if hold_out else 0)
        assert np.all(splits["held_out"]["use"] + splits["val"]["use"] == 1)
    counts = np.bincount(np.asarray(splits["train"]["y"][:2500]), minlength=10)
    assert np.all(counts > 200)  # every class occurs, about 250 times


def test_the_penalty_method_keeps_examples_with_right_labels(monkeypatch):
    """Few examples need a higher rate of the model than the authors' 5,000."""
    for module, name in ((noisy_mnist, "OPTIMIZER"), (method, "W_OPTIMIZER")):
        monkeypatch.setattr(module, name, optax.adam(1e-2))
    noisy_mnist.train_model.clear_cache()
    train, val = (clusters(400, jax.random.key(i)) for i in (0, 1))
    wrong = np.arange(400) >= 200
    noisy = train | {"y": jnp.where(wrong, (train["y"] + 3) % 10, train["y"])}
    _, importances = method.learn_importances(noisy, val, jax.random.key(2))
    noisy_mnist.train_model.clear_cache()
    kept = np.asarray(importances) > table.MIN_IMPORTANCE
    assert np.mean(kept[~wrong]) > 0.9
    assert np.mean(kept[wrong]) < 0.1


@pytest.fixture(scope="module")
def task():
    """Returns the task on clusters in place of images."""
    sizes = {"train": 5000, "val": 5000, "test": 100}
    data = {
        name: clusters(n, jax.random.key(seed))
        for seed, (name, n) in enumerate(sizes.items())
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noisy_mnist, "load_data", lambda: data)
        patch.setattr(noisy_mnist, "NUM_FEATURES", 10)
        yield noisy_mnist.make_task(jax.random.key(0))


def run_method(task, label, budget):
    return table.table.methods[label](task, budget=budget, key=jax.random.key(1))


def test_rows_that_keep_a_fixed_set_say_which(task):
    is_right = np.arange(5000) >= 2500
    expected = {table.NOISY: 1, table.VALIDATION: 0, table.ORACLE: is_right}
    for label, kept in expected.items():
        actual = run_method(task, label, 0).alpha
        np.testing.assert_array_equal(actual, np.broadcast_to(kept, 5000))


def test_the_filter_keeps_right_labels_and_counts_its_model(task):
    trace = run_method(task, table.FILTER, 0)
    kept, is_right = np.asarray(trace.alpha), np.arange(5000) >= 2500
    assert np.mean(kept[is_right]) > 0.98
    assert np.mean(kept[~is_right]) < 0.02
    assert trace.cost[-1] == 500


def test_random_search_keeps_the_share_of_the_best_trial_and_counts_its_model(task):
    trace = run_method(task, "random search", 700)
    kept, is_right = np.asarray(trace.alpha), np.arange(5000) >= 2500
    costs = np.asarray(trace.stats["gradient_equivalents"])
    assert len(trace.value) > 3
    assert costs[0] > 500 > np.max(costs[1:])
    assert 650 < np.sum(costs) < 700 + np.max(costs[1:])
    # Those with right labels have lower losses than any other.
    if np.sum(kept) <= 2500:
        assert np.mean(is_right[kept == 1]) > 0.98
    else:
        assert np.mean(kept[is_right]) > 0.98


def test_the_final_training_uses_no_example_that_is_held_out(task):
    splits = jax.tree.map(lambda x: x, task.splits)
    val = splits["val"]
    use = val["use"].at[:1000].set(0)
    x = val["x"].at[:1000].set(jnp.nan)
    splits["val"] = val | {"x": x, "use": use}
    held = dataclasses.replace(task, splits=splits)
    w = noisy_mnist.train_on_kept(held, jnp.full(5000, 0.5), jax.random.key(0))
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in w.values())
    metric = task.metrics["test_accuracy"]
    assert metric(w, task.alpha, jax.random.key(0)) > 0.9
