"""What a certificate concludes from its Newton steps, on problems solved by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.implicit.curvature_probe import probe_curvature
from hypergrad.implicit.differentiation import Point
from hypergrad.linear.equilibration import no_scaling
from hypergrad.testing.trust import MIN_RECALL
from tests.random_problems import random_matrix


def fourth_order(w, alpha, batch):
    return jnp.sum((w["slow"] - alpha) ** 4 + batch * (w["fast"] - alpha) ** 2)


def squares(w, alpha, batch):
    return w["slow"] ** 2 + batch * w["fast"] ** 2


@pytest.mark.parametrize("fast", [0.0, 1.0], ids=["slow alone", "beside a fast one"])
def test_linear_convergence_of_newton_steps_is_not_trusted(fast):
    """At a minimum of fourth order each step divides the distance by 3/2."""
    problem = hg.Bilevel(fourth_order, squares, jnp.asarray(1.0), jnp.asarray(fast))
    w = {"slow": 1.014, "fast": 1.002}
    certificate = hg.certify(problem, w, 1.0)
    # The hypergradient of the slow part is 2 w; two steps correct 5/9 of the distance.
    np.testing.assert_allclose(
        certificate.corrected_w["slow"], 1 + 0.014 * 4 / 9, rtol=1e-6
    )
    assert certificate.error_estimate < 1e-2
    assert {name for name, flag in certificate.flags.items() if flag} == {"last_change"}


@pytest.mark.parametrize(
    ("lowest", "expected"), [(0.0, False), (-1e-17, False), (-1e-12, True)]
)
def test_only_curvature_below_rounding_is_negative(lowest, expected):
    """Twenty matrices of size 30 with a largest eigenvalue of 1."""

    @jax.jit
    @jax.vmap
    def run(H, key):
        inner = lambda w, alpha, batch: 0.5 * w @ H @ w
        w = jnp.ones(30)
        point = Point(hg.Bilevel(inner, inner), w, w, None, None)
        return probe_curvature(point, no_scaling(w), key, 60, curvature_max=1.0)

    spectrum = np.linspace(0.1, 1.0, 30)
    spectrum[0] = lowest
    H = jnp.stack([random_matrix(spectrum, seed) for seed in range(20)])
    probe = run(H, jax.random.split(jax.random.key(0), 20))
    assert np.all(probe.is_negative == expected)
    np.testing.assert_allclose(probe.ritz_max, 1.0, rtol=1e-2)


# A minimum that a rotation of w moves along a circle.


def circle_inner(w, alpha, batch):
    """The squared radius approaches ``alpha``: minima form a circle."""
    return 0.25 * (jnp.sum(w**2) - alpha) ** 2


def circle_outer(w, alpha, batch):
    return (jnp.sum(w**2) - 1.0) ** 2


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_minima_that_form_a_circle_are_trusted(dtype):
    """A hundred points of an arc; the hypergradient is ``2 (alpha - 1)``.

    A point whose rounding errors happen to be large is refused, but at most 2%.
    """
    angles = jnp.linspace(0.2, jnp.pi / 2 - 0.2, 100)
    points = 2**0.5 * jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    problem = hg.Bilevel(circle_inner, circle_outer)
    alpha = jnp.asarray(2.0, dtype)
    certify = jax.jit(jax.vmap(lambda w: hg.certify(problem, w, alpha)))
    certificate = certify(points.astype(dtype))
    np.testing.assert_allclose(certificate.corrected_hypergradient, 2.0, rtol=1e-5)
    assert np.mean(certificate.trusted) >= MIN_RECALL


def test_a_maximum_in_the_middle_of_the_circle_is_not_trusted():
    """The Hessian at zero is ``-alpha I``."""
    problem = hg.Bilevel(circle_inner, circle_outer)
    certificate = hg.certify(problem, jnp.full(2, 1e-9), 2.0)
    assert certificate.negative_curvature
    assert not certificate.trusted
