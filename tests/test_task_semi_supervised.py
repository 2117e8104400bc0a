"""Semi-supervised learning: hypergradients against differences and influence."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from sklearn.metrics import roc_auc_score

import hypergrad as hg
from hypergrad.studies import record
from hypergrad.studies import semi_supervised as study
from hypergrad.tasks import semi_supervised as task_file
from hypergrad.tasks.classifier import losses
from hypergrad.tasks.networks import softmax_regression

DIGITS = jax.tree.map(jnp.asarray, hg.datasets.load("digits"))
SIZES = (20, 20, 6)


@pytest.fixture(scope="module")
def task() -> hg.tasks.Task:
    """Six unlabelled digits, eight pixels each, distinct weights."""
    thin = {"x": DIGITS["x"][:300, 20:28].astype(float), "y": DIGITS["y"][:300]}
    key = jax.random.key(5)
    return task_file.make(key=key, data=thin, sizes=SIZES, penalty=0.05)


ALPHA = jnp.linspace(0.2, 0.9, 6)
DESCENT = hg.Descent(optax.sgd(0.5, momentum=0.9), num_steps=60)


@pytest.fixture(scope="module")
def implicit(task) -> hg.Estimate:
    """By Newton's method and conjugate gradients."""
    return hg.hypergradient(task.problem, hg.Implicit(hg.Newton()))(task.w, ALPHA)


def central_differences(task, solver, step=1e-5):
    """Of training from zero and validation loss, every weight apart."""
    problem, key = task.problem, jax.random.key(0)

    @jax.jit
    def pipeline(alpha):
        w, _ = solver.solve(problem.inner_loss, task.w, alpha, problem.inner_data, key)
        return problem.outer_loss(w, alpha, problem.outer_data)

    ahead = [pipeline(ALPHA + step * e) for e in np.eye(6)]
    behind = [pipeline(ALPHA - step * e) for e in np.eye(6)]
    return (np.array(ahead) - np.array(behind)) / (2 * step)


def test_the_implicit_hypergradient_is_that_of_the_whole_pipeline(task, implicit):
    """Training to convergence at the weights about each weight."""
    expected = central_differences(task, hg.Newton())
    assert np.abs(expected).min() > 1e-6
    np.testing.assert_allclose(implicit.hypergradient, expected, rtol=1e-5)


def test_the_unrolled_hypergradient_is_that_of_the_whole_pipeline(task):
    """Sixty steps are not converged: another number than the implicit one."""
    found = hg.hypergradient(task.problem, hg.Unrolled(DESCENT))(task.w, ALPHA)
    expected = central_differences(task, DESCENT)
    np.testing.assert_allclose(found.hypergradient, expected, rtol=1e-5)


def test_the_implicit_hypergradient_is_the_influence_function(task, implicit):
    """``-grad CE_u . H^-1 dM/dw / m`` by a dense solve: Ren 2020, equation 4."""
    batch = task.problem.inner_data
    flat, unravel = ravel_pytree(implicit.w)

    @jax.jit
    def influence(flat):
        at = lambda loss: lambda flat: loss(unravel(flat))
        train = at(lambda w: task_file.train_loss(w, ALPHA, batch))
        val = at(lambda w: task_file.val_loss(w, ALPHA, task.problem.outer_data))
        each = at(lambda w: losses(softmax_regression, w, batch["unlabelled"]))
        adjoint = jnp.linalg.solve(jax.hessian(train)(flat), jax.grad(val)(flat))
        return -jax.jacobian(each)(flat) @ adjoint / len(ALPHA)

    expected = influence(flat)
    np.testing.assert_allclose(implicit.hypergradient, expected, rtol=1e-8)


def test_without_weights_the_model_is_the_supervised_one(task):
    """At ``alpha = 0`` training is supervised, whose answers the pseudo-labels are."""
    batch = task.problem.inner_data
    solve = lambda loss, alpha: hg.Newton().solve(
        loss, task.w, alpha, batch, jax.random.key(0)
    )[0]
    plain = solve(task_file.supervised_loss, None)
    w = solve(task_file.train_loss, jnp.zeros(6))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-9), w, plain)
    named = jnp.argmax(softmax_regression(plain, batch["unlabelled"]["x"]), axis=-1)
    np.testing.assert_array_equal(batch["unlabelled"]["y"], named)


def test_the_split_is_a_partition():
    """50 + 100 + 1,000 + 647 distinct images, a third of validation held out."""
    marked = DIGITS | {"x": jnp.arange(1797)[:, None]}
    small = task_file.SIZES["small"]
    parts = task_file.split(marked, jax.random.key(3), small, True)
    names = ("labelled", "val", "unlabelled", "test")
    seen = [np.ravel(parts[name]["x"]) for name in names]
    assert [len(x) for x in seen] == [50, 100, 1000, 647]
    assert sorted(np.concatenate(seen)) == list(range(1797))
    assert jnp.sum(parts["held"]["use"]) == 33
    np.testing.assert_array_equal(parts["held"]["use"] + parts["val"]["use"], 1)


def test_the_auroc_is_scikit_learns(key):
    """Low weights detect wrong pseudo-labels; ties count half."""
    keys = jax.random.split(key)
    alpha = jnp.round(jax.random.uniform(keys[0], (200,)), 1)
    wrong = jax.random.bernoulli(keys[1], 0.3, (200,))
    found = task_file.auroc_of_wrong_labels(wrong, None, alpha, None)
    expected = roc_auc_score(np.asarray(wrong), -np.asarray(alpha))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_paper_scale_takes_the_papers_counts():
    """On shapes alone: 250 labels, 1,000 for validation, 48,750 unlabelled."""
    data = {"x": jnp.zeros((50100, 12)), "y": jnp.zeros(50100, int)}
    make = lambda: task_file.make(key=jax.random.key(0), scale="paper", data=data)
    alpha = jax.eval_shape(lambda: make().alpha)
    assert alpha.shape == (48750,)


def test_bad_sizes_and_scales_are_refused():
    """With what to do."""
    with pytest.raises(ValueError, match=r"'paper' needs data=.*50,001"):
        task_file.make(key=jax.random.key(0), scale="paper")
    with pytest.raises(ValueError, match="'small' or 'paper'; got 'large'"):
        task_file.make(key=jax.random.key(0), scale="large")
    with pytest.raises(ValueError, match="pass more data or smaller sizes"):
        task_file.make(key=jax.random.key(0), sizes=(50, 100, 1700))


def test_the_committed_runs_kept_their_budget():
    """And used most of it, but for conjugate gradients that stopped early."""
    folder = Path(__file__).parent.parent / "benchmarks" / "results"
    rows = record.read(folder / "semi_supervised.jsonl")
    spent = [row["gradient_equivalents"] for row in rows if "curve_cost" in row]
    assert study.BUDGET / 2 < min(spent) <= max(spent) <= study.BUDGET
