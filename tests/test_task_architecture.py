"""Architecture search: the network against plain loops, hypergradients, the ranking."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.signal

import hypergrad as hg
from hypergrad.studies import architecture as study
from hypergrad.studies import record
from hypergrad.tasks import architecture as task_file
from hypergrad.tasks.architecture import CELLS, OPERATIONS

DIGITS = jax.tree.map(jnp.asarray, hg.datasets.load("digits"))


@pytest.fixture(scope="module")
def task() -> hg.tasks.Task:
    """Twelve images of 4 x 4 pixels, two channels."""
    x = DIGITS["x"][:60].reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16)
    data = {"x": x.astype(float), "y": DIGITS["y"][:60]}
    key = jax.random.key(2)
    return task_file.make(key=key, data=data, sizes=(12, 20, 2), price=0.3)


ALPHA = jnp.linspace(0.05, 0.5, 15).reshape(3, 5) ** 2


def convolved(x, kernel):
    """Images [n, side, side, c] by SciPy, one channel after the other; then tanh."""
    size = 3 if kernel.shape[1] == 9 else 1
    k = np.asarray(kernel).reshape(len(kernel), size, size, -1)
    one = lambda image, k: scipy.signal.correlate(image, k, "same", "direct")
    return np.tanh(
        [
            np.stack(
                [sum(one(image[..., c], k[..., c]) for c in range(k.shape[-1]))
                 for k in k], -1,
            )
            for image in x
        ]
    )  # fmt: skip


def mixed(x, w, mix):
    """Equation 2 of DARTS on one edge."""
    ninth = np.eye(x.shape[-1])[:, None] * np.ones((9, 1)) / 9
    average = np.arctanh(convolved(x, ninth))
    parts = [0 * x, x, average, convolved(x, w["conv1"]), convolved(x, w["conv3"])]
    return sum(m * part for m, part in zip(np.asarray(mix), parts, strict=True))


def test_the_network_is_that_of_plain_loops(task):
    """Stem, three mixed edges, quarters, head: against SciPy's correlations."""
    w = jax.tree.map(np.asarray, task.w)
    x = np.asarray(task.problem.inner_data.data["x"])
    first = convolved(x[..., None], w["stem"])
    edges = [jax.tree.map(lambda leaf, e=e: leaf[e], w["edges"]) for e in range(3)]
    second = mixed(first, edges[0], ALPHA[0])
    third = mixed(first, edges[1], ALPHA[1]) + mixed(second, edges[2], ALPHA[2])
    halves = third.reshape(len(x), 2, 2, 2, 2, 2).mean((2, 4))  # n, 2, 2, channels
    features = np.moveaxis(halves, -1, 1).reshape(len(x), -1)
    found = jax.jit(task_file.scores)(task.w, ALPHA, x)
    np.testing.assert_allclose(found, features @ w["W"] + w["b"], rtol=1e-9)


def test_a_cell_sees_only_its_operations(task):
    """With a one-hot alpha, the kernels of what it does not hold have no gradient."""
    cell = [OPERATIONS.index(name) for name in ("conv3", "skip", "conv1")]
    batch = task.problem.inner_data.data
    loss = jax.jit(jax.grad(task_file.cross_entropy))
    found = loss(task.w, task_file.one_hot(cell), batch)["edges"]
    used = lambda leaf: np.any(np.asarray(leaf) != 0, axis=(1, 2, 3)).tolist()
    assert used(found["conv3"]) == [True, False, False]
    assert used(found["conv1"]) == [False, False, True]
    assert task_file.most_likely_cell(task_file.one_hot(cell)).tolist() == cell


@pytest.mark.parametrize("names", ["conv3 skip conv1", "none average conv3"])
def test_a_cell_is_its_one_hot_mixture(task, names: str):
    """Scores and losses of the operations alone, and of all with weights 0 and 1."""
    cell = jnp.array([OPERATIONS.index(name) for name in names.split()])
    for loss, batch in (
        (task_file.train_loss, task.problem.inner_data.data),
        (task_file.val_loss, task.problem.outer_data.data),
    ):
        alone = jax.jit(loss)(task.w, cell, batch)
        mixed = jax.jit(loss)(task.w, task_file.one_hot(cell), batch)
        np.testing.assert_allclose(alone, mixed, rtol=1e-12)


def test_held_out_images_do_not_count(task):
    """The outer loss is that of the first two thirds."""
    x = DIGITS["x"][:60].reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16)
    data = {"x": x.astype(float), "y": DIGITS["y"][:60]}
    held = task_file.make(
        key=jax.random.key(2), data=data, sizes=(12, 20, 2), hold_out=True
    )
    val = task.problem.outer_data.data
    kept = {name: leaf[:14] for name, leaf in val.items()} | {"price": jnp.zeros(14)}
    loss = jax.jit(task_file.val_loss)
    found = loss(task.w, ALPHA, held.problem.outer_data.data)
    np.testing.assert_allclose(found, loss(task.w, ALPHA, kept), rtol=1e-12)


def test_the_ranking_is_of_these_cells_as_the_study_trains_them():
    """A line a cell, in order; made of these digits by as many steps."""
    path = Path(task_file.__file__).with_name(task_file.RANKING)
    rows = record.read(path)
    names = [" ".join(OPERATIONS[o] for o in cell) for cell in CELLS]
    assert [row["cell"] for row in rows] == names
    assert {row["steps"] for row in rows} == {study.STEPS}
    fingerprint = record.fingerprint(hg.datasets.load("digits"))
    assert {row["data_sha256"] for row in rows} == {fingerprint}
    ranking = task_file.ranking()
    assert {array.shape for array in ranking.values()} == {(125, 8)}
    nothing = ranking["test_accuracy"][CELLS.index((0, 0, 0))]
    assert np.all(nothing < 0.15)


def test_regret_and_objective_are_those_of_the_ranking():
    """The best cell has no regret, and rank 1; a price adds its operations."""
    accuracy = np.mean(task_file.ranking()["test_accuracy"], axis=1)
    best = study.judged(CELLS[int(np.argmax(accuracy))], 0.0)
    assert (best["regret"], best["rank"]) == (0.0, 1)
    largest = (4, 4, 4)
    free, priced = (study.judged(largest, price) for price in (0.0, 0.5))
    assert priced["objective"] - free["objective"] == pytest.approx(0.5)
    assert study.judged((1, 0, 1), 0.0)["flops"] == 0.0


def test_expected_flops_are_the_mean_over_cells():
    """Of all 125, each with its probability; the largest cell is the unit."""
    x = jnp.zeros((1, 8, 8))
    alpha = jax.nn.softmax(ALPHA * 9, axis=-1)
    cost = jax.vmap(lambda cell: task_file.expected_flops(task_file.one_hot(cell), x))
    probability = [np.prod([alpha[e, o] for e, o in enumerate(cell)]) for cell in CELLS]
    costs = np.asarray(cost(jnp.array(CELLS)))
    found = task_file.expected_flops(alpha, x)
    np.testing.assert_allclose(found, probability @ costs, rtol=1e-12)
    assert costs.max() == pytest.approx(1.0)
    assert OPERATIONS[np.argmax(task_file.flops(4, 8))] == "conv3"
    assert task_file.flops(4, 8)[4] == 2 * 64 * 36 * 4


def differences(value, alpha, step):
    """Of ``value(alpha)``, along every number."""
    moved = lambda s, i: value(alpha + s * jnp.zeros(15).at[i].set(1.0).reshape(3, 5))
    flat = [(moved(step, i) - moved(-step, i)) / (2 * step) for i in range(15)]
    return np.array(flat).reshape(3, 5)


def test_the_unrolled_hypergradient_is_that_of_the_whole_pipeline(task):
    """By the same key: the same batches at every step."""
    estimator, key = hg.Unrolled(hg.Descent(optax.sgd(0.2), 3)), jax.random.key(4)
    state = estimator.init(task.problem, task.w, ALPHA)

    @jax.jit
    def estimate(alpha):
        return estimator.estimate(task.problem, state, alpha, key)[0]

    found = estimate(ALPHA).hypergradient
    expected = differences(lambda alpha: estimate(alpha).value, ALPHA, 1e-5)
    size = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=1e-8 * size)


@pytest.mark.slow
def test_the_implicit_hypergradient_is_that_of_the_whole_pipeline(task):
    """With a penalty that makes the point a minimum, to which Newton converges."""
    problem = task.problem
    strong = lambda w, alpha, batch: (
        task_file.train_loss(w, alpha, batch) + 0.05 * optax.tree.norm(w, squared=True)
    )
    batch, val = problem.inner_data.data, problem.outer_data.data
    strict = hg.Bilevel(strong, task_file.val_loss, batch, val)
    solver = hg.Newton()
    train = jax.jit(
        lambda w, alpha: solver.solve(strong, w, alpha, batch, jax.random.key(0))[0]
    )
    w = train(task.w, ALPHA)
    found = hg.hypergradient(strict, hg.Implicit(solver))(w, ALPHA)
    assert found.stats["trusted"]
    value = lambda alpha: strict.outer_loss(train(w, alpha), alpha, val)
    expected = differences(value, ALPHA, 1e-4)
    size = np.abs(expected).max()
    np.testing.assert_allclose(found.hypergradient, expected, atol=1e-5 * size)


def test_first_order_darts_is_the_direct_term(task):
    """A step size of zero drops the second term."""
    estimator = hg.FiniteDifference(hg.Descent(optax.sgd(0.2), 1), step_size=0.0)
    found = hg.hypergradient(task.problem, estimator)(task.w, ALPHA)
    batch = task.problem.outer_data.data
    direct = jax.jit(jax.grad(task_file.val_loss, 1))(found.w, ALPHA, batch)
    np.testing.assert_allclose(found.hypergradient, direct, rtol=1e-9)


def test_the_paper_scale_builds():
    """On shapes alone: 25,000 images for training and as many for validation."""
    data = {"x": jnp.zeros((50001, 1024)), "y": jnp.zeros(50001, int)}
    make = lambda: task_file.make(key=jax.random.key(0), scale="paper", data=data)
    w = jax.eval_shape(lambda: make().w)
    assert w["edges"]["conv3"].shape == (3, 16, 9, 16)


def test_bad_sizes_and_scales_are_refused():
    """With what to do."""
    with pytest.raises(ValueError, match=r"'paper' needs data=.*50,001"):
        task_file.make(key=jax.random.key(0), scale="paper")
    with pytest.raises(ValueError, match="'small' or 'paper'; got 'large'"):
        task_file.make(key=jax.random.key(0), scale="large")
    with pytest.raises(ValueError, match="pass more data or smaller sizes"):
        task_file.make(key=jax.random.key(0), sizes=(1000, 797, 3))
