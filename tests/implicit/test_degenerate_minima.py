"""Negative curvature is judged near the argmin, not only where ``w`` is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.testing.trust_problems import (
    FAMILIES,
    approach_minimum,
    dense_hypergradient,
    newton,
)
from hypergrad.trees import relative_error
from tests.estimator_cases import failed_checks

IMPLICIT = hg.Implicit(hg.Descent(optax.sgd(0.0), 0))  # leaves w where it is
NUM_PROBLEMS = 60


def problem_of(family, batch):
    """Returns the problem of a family of `check_trust`, in its own units."""
    return hg.Bilevel(family.inner_loss, family.outer_loss, batch, batch)


@pytest.mark.parametrize("name", ["factorization", "distances"])
def test_accurate_estimates_near_circles_of_minima_are_trusted(name):
    """``w`` is off by a relative 1e-5; a rotation of it changes neither loss.

    The Hessian at ``w`` has a negative eigenvalue in about half of the cases. If its
    sign alone decided, none of these would be trusted. A few may still be refused,
    because the last steps of the adjoint solve changed the hypergradient.
    """
    family = FAMILIES[name]

    def trial(key):
        keys = jax.random.split(key)
        theta, alpha, batch = family.sample(keys[0])
        theta = approach_minimum(family, theta, alpha, batch)
        minimum = newton(family, theta, alpha, batch)
        w = minimum * (1 + 1e-5 * jax.random.normal(keys[1], minimum.shape))
        exact, is_minimum = dense_hypergradient(family, w, alpha, batch)
        problem = problem_of(family, batch)
        state = IMPLICIT.init(problem, w, alpha)
        estimate, _ = IMPLICIT.estimate(problem, state, alpha, key)
        error = relative_error(estimate.hypergradient, exact)
        eigenvalues = jnp.linalg.eigvalsh(
            jax.hessian(family.inner_loss)(w, alpha, batch)
        )
        return is_minimum, error, estimate.trusted, eigenvalues[0] < 0

    keys = jax.random.split(jax.random.key(0), NUM_PROBLEMS)
    is_minimum, error, trusted, is_indefinite = jax.jit(jax.vmap(trial))(keys)
    is_accurate = is_minimum & (error < 1e-3)
    assert np.sum(is_accurate & is_indefinite) > NUM_PROBLEMS / 4
    num_recalled = np.sum(is_accurate & is_indefinite & trusted)
    assert num_recalled >= 0.75 * np.sum(is_accurate & is_indefinite)
    assert not np.any(trusted & ~(error < 1e-2))


def curved_saddle(w, alpha, batch):
    """``sum_i lambda_i z_i^2 / 2 + z_i^3`` for ``z = w - alpha``."""
    z = batch["basis"].T @ (w - alpha)
    return jnp.sum(0.5 * batch["eigenvalues"] * z**2 + z**3)


def distance_from_one(w, alpha, batch):
    z = batch["basis"].T @ w
    return jnp.sum(batch["visible"] * (z - 1.0) ** 2)


@pytest.mark.parametrize("num_losses", [1, 2])
@pytest.mark.parametrize("visible", [1.0, 1e-6])
def test_a_saddle_is_not_trusted(visible, num_losses):
    """The outer loss sees the direction of negative curvature well, or hardly.

    If it hardly does, no other check fails. Third derivatives change the curvature by
    about a third between ``w`` and the saddle point.
    """
    eigenvalues = jnp.array([-1e-3, 1.0, 1.1, 1.2, 1.3])
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))
    batch = {
        "basis": jnp.asarray(basis),
        "eigenvalues": eigenvalues,
        "visible": jnp.ones(5).at[0].set(visible),
    }
    outer = (distance_from_one,) * num_losses
    problem = hg.Bilevel(
        curved_saddle, outer[0] if num_losses == 1 else outer, batch, batch
    )
    estimate_fn = hg.hypergradient(problem, IMPLICIT)
    for seed in range(20):
        z = 5e-5 * np.random.default_rng(seed).normal(size=5)
        estimate = estimate_fn(batch["basis"] @ z, jnp.zeros(5))
        if visible < 1:
            assert failed_checks(estimate) == {"negative_curvature"}
        else:
            assert "negative_curvature" in failed_checks(estimate)
