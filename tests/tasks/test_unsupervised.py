"""Tests of density models against closed forms, central differences and scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import gaussian_kde, multivariate_normal
from sklearn.metrics import adjusted_rand_score

import hypergrad as hg
from hypergrad import datasets
from hypergrad.tasks import unsupervised

KEY = jax.random.key(0)
DATA = {name: datasets.load(name) for name in ("iris", "wine")}
TASKS = {
    variant: unsupervised.make(key=KEY, variant=variant)
    for variant in ("kde", "ppca", "kmeans")
}
# The error of the inner solution is an error of the hypergradient.
NEWTON = hg.Newton(tolerance=1e-13)


@pytest.mark.parametrize(
    ("variant", "estimator"),
    [
        ("kde", "implicit"),
        ("ppca", "implicit"),
        pytest.param("kde", "unrolled", marks=pytest.mark.slow),
        pytest.param("ppca", "unrolled", marks=pytest.mark.slow),
    ],
)
def test_hypergradients_equal_their_closed_forms(variant, estimator, key):
    """Estimates at random alphas agree with the formula to 1e-8."""
    task = TASKS[variant]
    low, high = {"kde": (0.3, 2.0), "ppca": (0.1, 0.9)}[variant]
    alpha = jax.random.uniform(key, task.alpha.shape, float, low, high)
    estimator = {
        "implicit": hg.Implicit(task.solver, hg.CG(rtol=1e-13)),
        "unrolled": hg.Unrolled(task.solver),
    }[estimator]
    estimate = hg.hypergradient(task.problem, estimator)(task.w, alpha)
    np.testing.assert_allclose(estimate.hypergradient, task.exact(alpha), rtol=1e-8)
    assert estimate.trusted


@pytest.mark.parametrize("variant", ["kde", "ppca"])
def test_closed_forms_equal_central_differences(variant):
    """The formula is the derivative of the fit and the held-out likelihood."""
    task = TASKS[variant]
    oracle = hg.CentralDifference(task.solver, 1e-5)
    estimate = hg.hypergradient(task.problem, oracle)(task.w, task.alpha)
    np.testing.assert_allclose(task.exact(task.alpha), estimate.hypergradient, 1e-7)


def test_hypergradient_of_the_kmeans_metric_equals_central_differences():
    """Newton's method and then the held-out likelihood are differentiated."""
    task = TASKS["kmeans"]
    run_estimator = lambda estimator: hg.hypergradient(task.problem, estimator)(
        task.w, task.alpha
    )
    estimate = run_estimator(hg.Implicit(NEWTON, hg.CG(rtol=1e-12)))
    expected = run_estimator(hg.CentralDifference(NEWTON, 1e-5))
    assert estimate.trusted
    np.testing.assert_allclose(
        estimate.hypergradient, expected.hypergradient, rtol=1e-6
    )


def test_densities_equal_those_of_scipy(key):
    """The kernel density and the Gaussian of PPCA agree at held-out examples."""
    task = unsupervised.make(key=KEY, data=DATA["iris"])
    x, val = task.problem.inner_data["x"], task.problem.outer_data
    bandwidth = 0.37
    # scipy multiplies the bandwidth by the covariance, which whitening makes 1.
    factor = np.linalg.cholesky(np.cov(x.T))
    white_x, white_val = (
        np.linalg.solve(factor, np.asarray(data).T) for data in (x, val["x"])
    )
    expected = -np.log(gaussian_kde(white_x, bandwidth)(white_val)).mean()
    batch = {"x": jnp.asarray(white_val.T)}
    w, alpha = jnp.asarray(white_x.T) / bandwidth, jnp.full(4, bandwidth)
    actual = unsupervised.kde_nll(w, alpha, batch)
    np.testing.assert_allclose(actual, expected, rtol=1e-9)

    w = jax.random.normal(key, (4, 3))
    gaussian = multivariate_normal(np.zeros(4), np.asarray(w @ w.T) + 0.2 * np.eye(4))
    actual = unsupervised.ppca_nll(w, 0.2, val)
    np.testing.assert_allclose(actual, -gaussian.logpdf(val["x"]).mean(), rtol=1e-9)


@pytest.mark.parametrize("variant", ["kde", "ppca"])
def test_closed_form_fits_are_minima(variant):
    """The inner gradient is zero, and so is that of PPCA's optimal noise variance."""
    task = TASKS[variant]
    batch = task.problem.inner_data

    @jax.jit
    def fitted_grads(alpha):
        w = task.solver.fn(alpha, batch)
        return jax.grad(task.problem.inner_loss, (0, 1))(w, alpha, batch)

    w_grad, _ = fitted_grads(0.7 * task.alpha)
    assert jnp.max(jnp.abs(w_grad)) < 1e-10
    if variant == "ppca":
        _, alpha_grad = fitted_grads(unsupervised.ppca_ml_noise(batch))
        assert abs(alpha_grad) < 1e-10


def test_agreement_is_the_adjusted_rand_index_of_scikit_learn(key):
    """It equals scikit-learn's for random partitions, and is 1 for equal ones."""
    labels, clusters = jax.random.randint(key, (2, 60), 0, 3)
    actual = unsupervised.adjusted_rand(labels, clusters)
    np.testing.assert_allclose(actual, adjusted_rand_score(labels, clusters), 1e-12)
    np.testing.assert_allclose(unsupervised.adjusted_rand(labels, 2 - labels), 1.0)
    one_group = jnp.zeros(9, int)
    assert adjusted_rand_score(one_group, one_group) == 1
    assert unsupervised.adjusted_rand(one_group, one_group) == 1


def test_components_below_the_noise_are_refused():
    """Iris has four features, of which three are nearly dependent."""
    with pytest.raises(ValueError, match="3 components with a variance above 1"):
        unsupervised.make(key=KEY, variant="ppca", data=DATA["iris"])


@pytest.mark.parametrize("name", DATA)
def test_split_is_a_partition(name):
    """Half of the examples is for training, whose features are standardized."""
    num_examples = len(DATA[name]["y"])
    indexed = DATA[name] | {"y": jnp.arange(num_examples)}
    parts = unsupervised.split(indexed, jax.random.key(1))
    indices = np.concatenate([parts[part]["y"] for part in ("train", "val", "test")])
    assert sorted(indices) == list(range(num_examples))
    assert len(parts["train"]["y"]) == num_examples // 2
    np.testing.assert_allclose(parts["train"]["x"].mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(parts["train"]["x"].std(0), 1, rtol=1e-9)
