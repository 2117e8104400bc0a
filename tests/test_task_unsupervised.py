"""Density models: hypergradients against closed forms and central differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from scipy.stats import gaussian_kde, multivariate_normal
from sklearn.metrics import adjusted_rand_score

import hypergrad as hg
from hypergrad import datasets as datasets
from hypergrad.tasks import unsupervised
from tests.loops import run_loop

DATA = {name: datasets.load(name) for name in ("iris", "wine")}
# What is left of a minimum is what the hypergradient is off by.
SOLVERS = {"kmeans": hg.Newton(tolerance=1e-13)}


def task_of(variant: str, name: str) -> tuple:
    """The task of one split, and its inner solver run to the end."""
    task = unsupervised.make(key=jax.random.key(0), variant=variant, data=DATA[name])
    return task, SOLVERS.get(variant, task.solver)


def central_differences(task, solver, alpha, epsilon=1e-5):
    """Of the whole pipeline: the inner solve, then the outer loss."""
    flat, unravel = ravel_pytree(alpha)
    problem = task.problem

    @jax.jit
    def value(flat):
        alpha = unravel(flat)
        w, _ = solver.solve(
            problem.inner_loss, task.w, alpha, problem.inner_data, jax.random.key(0)
        )
        return problem.outer_value(w, alpha, problem.outer_data)

    steps = epsilon * jnp.eye(flat.size)
    slope = lambda step: (value(flat + step) - value(flat - step)) / (2 * epsilon)
    return np.array([slope(step) for step in steps])


# Iris has four features, too few for three components and noise.
@pytest.mark.parametrize(
    ("variant", "name", "mode"),
    [
        ("kde", "wine", "implicit"),
        ("ppca", "wine", "implicit"),
        pytest.param("kde", "wine", "unrolled", marks=pytest.mark.slow),
        pytest.param("ppca", "wine", "unrolled", marks=pytest.mark.slow),
        pytest.param("kde", "iris", "implicit", marks=pytest.mark.slow),
    ],
)
def test_hypergradients_equal_their_closed_forms(variant, name, mode, key):
    """At random alphas, to 1e-8."""
    task, solver = task_of(variant, name)
    low, high = (0.3, 2.0) if variant == "kde" else (0.1, 0.9)
    alpha = jax.random.uniform(key, task.alpha.shape, float, low, high)
    estimator = hg.Unrolled(solver)
    if mode == "implicit":
        estimator = hg.Implicit(solver, hg.CG(rtol=1e-13))
    found = hg.hypergradient(task.problem, estimator)(task.w, alpha)
    np.testing.assert_allclose(found.hypergradient, task.exact(alpha), rtol=1e-8)
    assert found.stats["trusted"]


@pytest.mark.parametrize("variant", ["kde", "ppca"])
def test_closed_forms_equal_central_differences(variant):
    """Of the fit and the held-out likelihood together."""
    task, solver = task_of(variant, "wine")
    slopes = central_differences(task, solver, task.alpha)
    np.testing.assert_allclose(np.ravel(task.exact(task.alpha)), slopes, rtol=1e-7)


def test_hypergradient_of_the_metric_equals_central_differences():
    """Soft k-means by Newton's method, then the held-out likelihood."""
    task, solver = task_of("kmeans", "wine")
    estimator = hg.Implicit(solver, hg.CG(rtol=1e-12))
    found = hg.hypergradient(task.problem, estimator)(task.w, task.alpha)
    slopes = central_differences(task, solver, task.alpha)
    assert found.stats["trusted"]
    np.testing.assert_allclose(found.hypergradient, slopes, rtol=1e-6)


def test_densities_are_those_of_scipy(key):
    """The kernel density, and the Gaussian of PPCA, at held-out examples."""
    task, _ = task_of("kde", "iris")
    x, val = task.problem.inner_data["x"], task.problem.outer_data
    alpha = jnp.full(4, 0.37)
    # scipy scales the covariance of the data; of whitened data it is the identity.
    factor = np.linalg.cholesky(np.cov(x.T))
    white, white_val = (np.linalg.solve(factor, np.asarray(a).T) for a in (x, val["x"]))
    density = gaussian_kde(white, 0.37)(white_val)
    batch = {"x": jnp.asarray(white_val.T)}
    found = unsupervised.kde_nll(jnp.asarray(white.T) / 0.37, alpha, batch)
    np.testing.assert_allclose(found, -np.mean(np.log(density)), rtol=1e-9)

    w = jax.random.normal(key, (4, 3))
    gaussian = multivariate_normal(np.zeros(4), np.asarray(w @ w.T) + 0.2 * np.eye(4))
    found = unsupervised.ppca_nll(w, 0.2, val)
    np.testing.assert_allclose(found, -gaussian.logpdf(val["x"]).mean(), rtol=1e-9)


def test_fits_are_minima():
    """The formulas leave no gradient; PPCA's noise of highest likelihood neither."""
    for variant in ("kde", "ppca"):
        task, solver = task_of(variant, "wine")
        loss, batch = task.problem.inner_loss, task.problem.inner_data
        alpha = 0.7 * task.alpha
        fitted = lambda a, loss=loss, fit=solver.fn, batch=batch: jax.grad(
            loss, (0, 1)
        )(fit(a, batch), a, batch)
        by_w, _ = jax.jit(fitted)(alpha)
        assert jnp.max(jnp.abs(by_w)) < 1e-10
    _, by_alpha = jax.jit(fitted)(unsupervised.ppca_ml_noise(batch))
    assert abs(by_alpha) < 1e-10


def test_agreement_is_scikit_learns(key):
    """The adjusted Rand index of two random partitions, and of equal ones."""
    first, second = jax.random.randint(key, (2, 60), 0, 3)
    found = unsupervised.adjusted_rand(first, second)
    np.testing.assert_allclose(found, adjusted_rand_score(first, second), rtol=1e-12)
    np.testing.assert_allclose(unsupervised.adjusted_rand(first, 2 - first), 1.0)


def test_the_split_is_a_partition():
    """Half, a quarter, a quarter; the training part is standard."""
    for name, n in (("iris", 150), ("wine", 178)):
        marked = DATA[name] | {"y": jnp.arange(n)}
        parts = unsupervised.split(marked, jax.random.key(1))
        seen = np.concatenate([parts[part]["y"] for part in ("train", "val", "test")])
        assert sorted(seen) == list(range(n))
        assert len(parts["train"]["y"]) == n // 2
        np.testing.assert_allclose(parts["train"]["x"].mean(0), 0, atol=1e-9)
        np.testing.assert_allclose(parts["train"]["x"].std(0), 1, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["kde", "ppca", "kmeans"])
def test_learning_lowers_the_held_out_loss(variant):
    """A few steps of the task as it is made, within its space."""
    task, solver = task_of(variant, "wine")
    trace = run_loop(
        task.problem, hg.Implicit(solver), optax.adam(0.1), task.w, task.alpha,
        num_steps=20, space=task.space, metrics=task.metrics, eval_every=19,
    )  # fmt: skip
    assert trace.status == "completed"
    assert trace.value[-1] < trace.value[0] - 0.01
    assert np.isfinite(trace.metrics["test_nll"][-1])


def test_another_scale_or_variant_is_refused():
    """With what there is."""
    with pytest.raises(ValueError, match="'small' only"):
        unsupervised.make(key=jax.random.key(0), scale="paper")
    with pytest.raises(ValueError, match="'kde', 'ppca' or 'kmeans'"):
        unsupervised.make(key=jax.random.key(0), variant="vae")
