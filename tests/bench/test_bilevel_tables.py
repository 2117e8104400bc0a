"""The tables of benchmark_bilevel: their data, starting points and stored numbers."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import hypergrad as hg
from benchmarks import bilevel_ijcnn1
from benchmarks.shared import hyper_cleaning, ijcnn1_runs
from benchmarks.shared.benchmark_bilevel_2022 import summed_series
from benchmarks.shared.doubled_series import DoubledSeries
from hypergrad import datasets
from hypergrad.extend import at_draw


@pytest.fixture
def arrays():
    """Returns MNIST, or skips the test."""
    try:
        return datasets.load("mnist")
    except FileNotFoundError:
        # It is neither in the package nor on PyPI, and tests load nothing by network.
        pytest.skip("MNIST is not at hand")


def test_the_images_and_labels_are_those_of_benchmark_bilevel(arrays):
    """The lines of its ``datasets/mnist.py``."""
    is_test = arrays["test"]
    pixels = np.round(255.0 * arrays["x"].astype(float)).astype(np.uint8)
    rng = np.random.RandomState(32)
    parts = train_test_split(
        pixels[~is_test],
        arrays["y"][~is_test],
        test_size=5000,
        train_size=20_000,
        random_state=rng,
    )
    train, val, y_train, y_val = (np.asarray(part) for part in parts)
    corrupted = rng.rand(20_000) < 0.7
    right = y_train.copy()
    y_train[corrupted] = rng.randint(0, 10, np.sum(corrupted))
    scaler = StandardScaler().fit(train)
    sets = hyper_cleaning.load_data(0.7)
    for name, x, y in (
        ("inner", train, y_train),
        ("outer", val, y_val),
        ("right labels", train, right),
        ("test", pixels[is_test], arrays["y"][is_test]),
    ):
        expected = np.asarray(scaler.transform(np.asarray(x)))
        np.testing.assert_allclose(sets[name]["x"], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(np.argmax(sets[name]["y"], -1), np.asarray(y))


def test_the_start_has_the_stored_error(arrays):
    """The first evaluation of the stored runs is 0.902."""
    test = hyper_cleaning.load_data(0.5)["test"]
    w = jnp.zeros(7840)
    start = hyper_cleaning.error(test, w, w, jax.random.key(0))
    np.testing.assert_allclose(start, 0.902, atol=1e-6)


def test_steps_of_a_run_have_the_stored_sizes(arrays):
    """The first step moves no logit, the second one at most those of its batch.

    The adjoint is zero at the start, so that ``lambda`` moves from the second step on.
    """
    loop = hyper_cleaning.make_loop("SOBA", 0.9)
    state = loop.init(jnp.zeros(7840), jnp.full(20_000, -2.0))
    first = loop.run(state, num_steps=1)
    np.testing.assert_array_equal(first.alpha, -2.0)
    two = loop.run(state, num_steps=2)
    assert np.sum(np.asarray(two.alpha) != -2.0) <= 64
    assert np.max(np.abs(two.alpha + 2.0)) > 0


@pytest.fixture
def ijcnn1():
    """Loads ijcnn1, or skips the test."""
    try:
        datasets.load("ijcnn1")
    except FileNotFoundError:
        # It is neither in the package nor on PyPI, and tests load nothing by network.
        pytest.skip("ijcnn1 is not at hand")


def test_value_function_and_gradient_at_the_stored_start(ijcnn1):
    estimate = ijcnn1_runs.estimate(ijcnn1_runs.problem().alpha)
    for name, value in (
        ("start", float(estimate.value)),
        ("start_grad", float(np.sum(np.asarray(estimate.hypergradient) ** 2))),
    ):
        number = bilevel_ijcnn1.PUBLISHED[bilevel_ijcnn1.LBFGS, name]
        assert number.is_reproduced(value, "paper"), (name, value)


def test_full_batches_follow_the_stored_run(ijcnn1, monkeypatch):
    method = ijcnn1_runs.FULL_BATCH
    setting = ijcnn1_runs.SETTINGS[method]._replace(num_evaluations=2)
    monkeypatch.setitem(ijcnn1_runs.SETTINGS, method, setting)
    row = ijcnn1_runs.run_loop(method, 0)
    for name in ("step_4", "step_8"):
        number = bilevel_ijcnn1.PUBLISHED[method, name]
        assert abs(row[name] - number.value) < 1e-4, (name, row[name])


def test_the_first_pass_is_in_the_order_of_the_data_and_later_ones_are_shuffled():
    data = ijcnn1_runs.Passes(jnp.arange(12), 3, order="epoch_blocks")
    key = jax.random.key(0)
    blocks = [at_draw(data, key, k, 12).sample(key)[0] // 3 for k in range(12)]
    passes = np.array(blocks).reshape(3, 4)
    np.testing.assert_array_equal(passes[0], np.arange(4))
    np.testing.assert_array_equal(np.sort(passes), [np.arange(4)] * 3)
    assert not np.array_equal(passes[1], passes[0])


def aliased_series(hessian, b, num_products, step_size):
    """Returns the result of the lines of benchmark_bilevel's code of 2022."""
    v = b.copy()
    s = v
    for _ in range(num_products):
        v -= step_size * hessian @ v
        s += v
    return step_size * s


def test_the_doubled_series_is_a_sum_into_the_array_of_its_terms():
    hessian, b = np.diag([0.5, 1.0, 2.0]), np.array([1.0, -2.0, 3.0])
    loss = lambda w, alpha, batch: w @ jnp.asarray(hessian) @ w / 2
    problem = hg.Bilevel(loss, loss)
    series = DoubledSeries(0.4, num_terms=6)
    point = jnp.ones(3), jnp.ones(())
    (v,), num = series.solve(
        problem, (point,), (jnp.asarray(b),), None, jax.random.key(0)
    )
    assert num == 5
    np.testing.assert_allclose(v, aliased_series(hessian, b, 5, 0.4), rtol=1e-5)


def test_the_copied_series_is_the_neumann_series():
    hessian, b = np.diag([0.5, 1.0, 2.0]), np.array([1.0, -2.0, 3.0])
    oracle = types.SimpleNamespace(hvp=lambda w, alpha, v, rows: hessian @ v)
    sampler = types.SimpleNamespace(get_batch=lambda: (slice(None), None))
    v = summed_series(oracle, b, b, b, sampler, 200, 0.4)
    np.testing.assert_allclose(v, np.linalg.solve(hessian, b))


def test_log_penalties_are_clipped_after_the_step():
    clip = ijcnn1_runs.kept_within(-12.0, 12.0)
    alpha = jnp.array([-11.0, 0.0, 11.5])
    updates, _ = clip.update(jnp.array([-3.0, 1.0, 3.0]), clip.init(alpha), alpha)
    np.testing.assert_allclose(alpha + updates, [-12.0, 1.0, 12.0])


def rows_of_ijcnn1(last):
    """Returns two rows of each method, with the last value of its first seed."""
    steps = {f"step_{k * 131_072}": x for k, x in ((1, 0.3), (2, 0.2), (5, 0.1))}
    return [
        {"method": method, "seed": seed, "last": last.get(method, 0.2)} | steps
        for method in bilevel_ijcnn1.METHODS
        for seed in range(2)
    ]


def test_a_row_that_is_not_finite_is_counted():
    rows = rows_of_ijcnn1({})
    next(row for row in rows if row["method"] == "SOBA")["last"] = float("nan")
    texts = [finding.text for finding in bilevel_ijcnn1.findings(rows)]
    assert texts[-1] == "SOBA: 1 of 2 seeds end not finite"
    assert any("stored 0.20722, present code 0.30000, ours" in text for text in texts)


def test_the_order_of_the_methods_is_that_of_their_last_stored_values():
    stored = {method: x[-1] for method, x in bilevel_ijcnn1.STORED.items()}
    outcome = lambda last: bilevel_ijcnn1.order_of_methods(rows_of_ijcnn1(last)).outcome
    assert outcome(stored) == "supported"
    assert outcome({method: -x for method, x in stored.items()}) == "contradicted"
    assert outcome(stored | {"SABA": 0.3}) == "not supported"
    assert outcome(stored | {"SABA": float("nan")}) == "not supported"
    assert bilevel_ijcnn1.order_of_methods([]).outcome == "undecided"
