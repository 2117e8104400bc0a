"""Tests of the examples on the page *Write your own*, and of `hypergrad.extend`."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from sklearn.metrics import balanced_accuracy_score

import hypergrad as hg
from hypergrad import extend

pytestmark = pytest.mark.page

PAGE = Path(__file__).parents[2] / "docs/extending.md"
EIGENVALUES = 0.5, 1.5  # of `hypergrad.testing.quadratic`


def read_examples():
    """Returns the code of each example by its heading."""
    examples = {}
    for section in re.split(r"\n###? ", PAGE.read_text())[1:]:
        for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
            examples[section.splitlines()[0]] = code
    return examples


EXAMPLES = read_examples()
CHECKED = [name for name, code in EXAMPLES.items() if "check_estimator" in code]


def run_example(heading):
    """Runs an example by itself and returns its names."""
    names = {}
    exec(compile(EXAMPLES[heading], str(PAGE), "exec"), names)
    return names


def ravel(tree):
    return ravel_pytree(tree)[0]


@pytest.fixture
def checked(monkeypatch):
    """Returns the list of estimators that an example passes to `check_estimator`."""
    estimators = []
    monkeypatch.setattr(hg.testing, "check_estimator", estimators.append)
    return estimators


def test_every_kind_of_extension_has_an_example():
    assert list(EXAMPLES) == [
        "The smallest estimator",
        "An estimator with checks and cost",
        "A single-loop method",
        "An inner solver",
        "A linear solver",
        "A searcher",
        "An aggregator",
        "A surrogate",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("heading", CHECKED)
def test_examples_run_as_printed(heading):
    run_example(heading)


@pytest.mark.parametrize("heading", CHECKED)
def test_examples_keep_their_error_bound(heading, checked):
    """A part of `check_estimator`, on the problem whose variables are trees."""
    run_example(heading)
    assert checked
    problem, w, alpha, exact = hg.testing.quadratic(jax.random.key(0), "tree")
    direct_term = ravel(alpha)
    for estimator in checked:
        bound = estimator.error_bound(*EIGENVALUES)
        if getattr(estimator, "is_single_loop", False):
            estimator = hg.testing.RepeatedSteps(estimator, 300)
        estimate = hg.hypergradient(problem, estimator)(w, alpha)
        actual, expected = ravel(estimate.hypergradient), ravel(exact)
        if np.isnan(bound):
            assert actual @ expected > 0
            continue
        error = jnp.linalg.norm(actual - expected)
        assert error <= (bound + 1e-9) * jnp.linalg.norm(expected - direct_term)


def test_the_smallest_estimator_is_completed(checked):
    """Statistics are NaN, and the estimate is not trusted for a stated reason."""
    one_step = run_example("The smallest estimator")["one_step"]
    problem, w, alpha, _ = hg.testing.quadratic(jax.random.key(0), "scalar")
    estimate = hg.hypergradient(problem, one_step)(w, alpha)
    assert set(estimate.stats) == {*extend.STATS, "trusted"}
    assert jnp.isnan(estimate.stats["gradient_equivalents"])
    assert not estimate.trusted
    assert len(estimate.reasons) == 1


def test_the_forward_gradient_is_unbiased(checked):
    """The mean over 2,000 directions is within three standard errors."""
    forward_gradient = run_example("An estimator with checks and cost")
    forward_gradient = forward_gradient["forward_gradient"]
    problem, w, alpha, exact = hg.testing.quadratic(jax.random.key(0), "vector")
    state = forward_gradient.init(problem, w, alpha)
    sample = lambda key: forward_gradient.estimate(problem, state, alpha, key)[0]
    keys = jax.random.split(jax.random.key(1), 2000)
    mean = jax.jit(jax.vmap(sample))(keys).hypergradient.mean(0)
    # The covariance of d (d'g) is |g|^2 I + g g', whose trace is (n + 1) |g|^2.
    standard_error = (9 / 2000) ** 0.5 * jnp.linalg.norm(exact)
    assert jnp.linalg.norm(mean - exact) < 3 * standard_error
    stats = sample(keys[0]).stats
    assert (stats["num_hvps"], stats["num_outer_grads"]) == (200, 1)


def test_the_linear_solver_counts_its_products(checked):
    """20 steps, the cross term, and none for the residual."""
    run_example("A linear solver")
    problem, w, alpha, _ = hg.testing.quadratic(jax.random.key(0), "vector")
    num_hvps = lambda solver: hg.hypergradient(
        problem, hg.Implicit(hg.Newton(), solver)
    )(w, alpha).stats["num_hvps"]
    (estimator,) = checked
    assert num_hvps(estimator.linear_solver) == num_hvps(hg.Identity()) + 20


def test_the_searcher_converges():
    """To the optimum 0.7 of each axis, closer than random search by the same budget."""
    names = run_example("A searcher")
    error = jnp.max(jnp.abs(names["trace"].best_alpha - 0.7))
    problem = hg.Bilevel(names["inner"], names["outer"])
    space = hg.spaces.Interval(-1.0, 1.0, shape=(3,))
    random = hg.search(
        problem, hg.Newton(), hg.searchers.Random(), jnp.zeros(3), space=space,
        budget=500,
    )  # fmt: skip
    assert error < 0.1
    assert error < jnp.max(jnp.abs(random.best_alpha - 0.7))


def test_the_aggregator_divides_by_lengths():
    """The first hypergradients are 2 alpha and 200 (alpha - 1) at alpha = (2, 3)."""
    equal = run_example("An aggregator")["equal"]
    lengths = jnp.array([2 * 13**0.5, 200 * 5**0.5])
    weights = equal.stats["objective_weights"]
    np.testing.assert_allclose(weights[0], 1 / lengths, rtol=1e-6)
    assert (equal.value[-1] < equal.value[0]).all()


def test_the_surrogate_approaches_the_exact_metric():
    names = run_example("A surrogate")
    surrogate, scores = names["balanced_accuracy"], names["scores"]
    targets = names["targets"]
    exact = balanced_accuracy_score(targets, scores > 0)
    assert surrogate.exact(scores, targets) == pytest.approx(exact)
    smooth = surrogate(scores, targets, temperature=1e-3)
    assert smooth == pytest.approx(exact, abs=1e-6)
    gradient = jax.grad(lambda s: surrogate(s, targets, temperature=1.0))(scores)
    assert (jnp.sign(gradient) == 2 * targets - 1).all()


def test_all_names_exist_once():
    assert all(hasattr(extend, name) for name in extend.__all__)
    assert len(set(extend.__all__)) == len(extend.__all__)
