"""Implicit differentiation of the update map."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks.known import any_known, error, hypertorch, quadratic


@functools.cache
def sgd(step: float, momentum: float | None = None) -> optax.GradientTransformation:
    return optax.sgd(step, momentum=momentum)


def ask(known, estimator):
    return hg.hypergradient(known.problem, estimator)(known.w, known.alpha)


@pytest.mark.parametrize(
    "name", ["ridge per-weight", "logistic scalar", "quadratic nested", "quadratic 0-d"]
)
@pytest.mark.parametrize("momentum", [None, 0.3])
def test_equals_the_closed_form(name: str, momentum):
    """Many terms at convergence, for gradient descent and for heavy ball."""
    known = any_known(name)
    solver = hg.Descent(sgd(known.step, momentum), 600)
    found = ask(known, hg.FixedPoint(solver, num_terms=600))
    assert error(found.hypergradient, known.exact(known.alpha)) < 1e-9
    assert found.stats["trusted"]
    assert found.stats["adjoint_residual"] < 1e-9


@pytest.mark.parametrize("num_terms", [1, 2, 7, 20])
def test_k_terms_are_the_last_k_steps(num_terms: int):
    """At the fixed point, to rounding: of gradient descent, and of a Neumann series."""
    known = any_known("ridge per-weight")
    best = known.best(known.alpha)
    solver = hg.Descent(sgd(known.step), 30)
    ask = lambda estimator: (
        hg.hypergradient(known.problem, estimator)(best, known.alpha).hypergradient
    )
    found = ask(hg.FixedPoint(solver, num_terms))
    assert error(found, ask(hg.Unrolled(solver, truncation_length=num_terms))) < 1e-12
    series = hg.Implicit(solver, hg.Neumann(num_terms, known.step))
    assert error(found, ask(series)) < 1e-12


def test_the_error_falls_as_the_contraction():
    """Spectrum [1, 10], the best step: q = 9/11, slope of log error within 2%."""
    known = quadratic("30", seed=4)
    solver = hg.Descent(sgd(known.step), 400)
    exact = known.exact(known.alpha)
    terms = np.array([20, 30, 40, 50, 60])
    errors = [
        error(ask(known, hg.FixedPoint(solver, int(k))).hypergradient, exact)
        for k in terms
    ]
    slope = np.polyfit(terms, np.log(errors), 1)[0]
    assert slope == pytest.approx(np.log(9 / 11), rel=0.02)


def test_published_errors():
    """hypertorch's logistic problem at lambda = 1: the errors of AID-FP."""
    known = hypertorch()
    solver = hg.Descent(sgd(0.1), 100)
    exact = known.exact(known.alpha)
    for num_terms, published in (
        (1, 8.76e-1),
        (5, 5.16e-1),
        (10, 2.67e-1),
        (25, 3.72e-2),
    ):
        found = ask(known, hg.FixedPoint(solver, num_terms))
        assert error(found.hypergradient, exact) == pytest.approx(published, rel=5e-3)


def test_a_warm_adjoint_is_nearer():
    """Ten terms, again from where they ended."""
    known = any_known("ridge per-weight")
    estimator = hg.FixedPoint(hg.Descent(sgd(known.step), 200), 10)
    state = estimator.init(known.problem, known.w, known.alpha)
    errors = []
    for _ in range(3):
        found, state = estimator.estimate(
            known.problem, state, known.alpha, jax.random.key(0)
        )
        errors.append(error(found.hypergradient, known.exact(known.alpha)))
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.5 * errors[1]


@pytest.mark.parametrize(("num_steps", "num_terms"), [(2, 300), (300, 2)])
def test_an_early_stop_of_either_loop_is_flagged(num_steps: int, num_terms: int):
    """The inner run, and the adjoint's."""
    known = quadratic("30", seed=4)
    estimator = hg.FixedPoint(hg.Descent(sgd(known.step), num_steps), num_terms)
    found = ask(known, estimator)
    assert error(found.hypergradient, known.exact(known.alpha)) > 0.02
    assert not found.stats["trusted"]


def test_several_losses_and_keyed_batches():
    """K leads; the map is that of all data."""
    known = any_known("ridge per-weight")
    data, outer_data = known.problem.inner_data, known.problem.outer_data
    loss = known.problem.inner_loss
    keyed = lambda w, alpha, batch: loss(w, alpha, batch[0])
    losses = (known.problem.outer_loss, lambda w, alpha, batch: jnp.sum(w))
    problem = hg.Bilevel(keyed, losses, hg.Batches(data, with_key=True), outer_data)
    solver = hg.Descent(sgd(known.step), 300)
    both = hg.hypergradient(problem, hg.FixedPoint(solver, 300))(known.w, known.alpha)
    assert error(both.hypergradient[0], known.exact(known.alpha)) < 1e-9
    implicit = hg.hypergradient(problem, hg.Implicit(solver))(known.w, known.alpha)
    assert error(both.hypergradient, implicit.hypergradient) < 1e-9
    assert both.stats["trusted"]


def test_what_it_costs_is_counted():
    """T steps, one more and the residual's gradient; K + 1 products."""
    known = any_known("ridge per-weight")
    stats = ask(known, hg.FixedPoint(hg.Descent(sgd(0.3), 12), 5)).stats
    assert stats["num_grads"] == 14
    assert stats["num_hvps"] == 6
    assert stats["num_outer_grads"] == 2
