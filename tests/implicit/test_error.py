"""The estimated error of implicit differentiation, as it is computed."""

import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.implicit.differentiation import Point, scaled_hypergradient
from hypergrad.implicit.error import (
    CORRECTION_FACTOR,
    correction_targets,
    correction_terms,
    estimate_error,
)
from hypergrad.linear.equilibration import no_scaling


@pytest.mark.parametrize(
    ("num_alpha", "factor"), [(1, 1.0), (2, 1.0), (3, CORRECTION_FACTOR)]
)
def test_two_directions_of_more_hyperparameters_bound_an_error_by_a_factor(
    num_alpha, factor
):
    """Two directions span up to two hyperparameters, so that nothing is hidden."""
    inner = lambda w, alpha, batch: jnp.sum(jnp.cosh(w - jnp.sum(alpha)))
    outer = lambda w, alpha, batch: jnp.sum(w**2) + jnp.sum(alpha)
    w, alpha = jnp.array([0.3, -0.1]), jnp.zeros(num_alpha)
    point, scaling = (
        Point(hg.Bilevel(inner, outer), w, alpha, None, None),
        no_scaling(w),
    )
    result, solution = scaled_hypergradient(
        point, scaling, jnp.zeros((1, 2)), targets=correction_targets(point)
    )
    terms = correction_terms(point.matvec, solution, scaling)
    error, _ = estimate_error(point, scaling, result, terms)
    assert CORRECTION_FACTOR > 1
    assert error.correction > 1e-3
    np.testing.assert_allclose(error.correction_bound, factor * error.correction)
