"""The closed form of the table `saba_toy`, against exact hypergradients."""

import jax.numpy as jnp
import numpy as np

import hypergrad as hg
from benchmarks import saba_toy
from hypergrad.runtime.compat import enable_x64


def test_the_closed_form_has_the_exact_hypergradient_and_the_stated_curvature():
    with enable_x64(True):
        inner, outer, best, Q = saba_toy.make_data(3)
        problem = hg.Bilevel(saba_toy.inner_loss, saba_toy.outer_loss, inner, outer)
        gradient = hg.hypergradient(problem, hg.Implicit(hg.Newton()))
        alpha = np.random.default_rng(0).normal(size=saba_toy.NUM_ALPHA)
        actual = gradient(jnp.zeros(saba_toy.NUM_W), jnp.asarray(alpha)).hypergradient
    np.testing.assert_allclose(actual, Q @ (alpha - best), rtol=1e-6)
    smallest = np.linalg.eigvalsh(Q)[0]
    np.testing.assert_allclose(smallest, saba_toy.MIN_EIGENVALUE, rtol=1e-12)
    decades = -2000 * np.log10(1 - saba_toy.RATE / saba_toy.RATIO * smallest)
    np.testing.assert_allclose(decades, 3.2, atol=0.01)


def test_the_slope_is_in_decades_per_thousand_steps():
    assert saba_toy.decades_per_1000(-1.0, -10.0) == 3.0
