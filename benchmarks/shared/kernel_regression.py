"""Kernel ridge regression with the tangent kernel of a wide network.

The outer variable is ``{"x": images, "y": labels}``.
"""

import math

import jax.numpy as jnp
from jax.scipy.linalg import cholesky, solve_triangular
from jaxtyping import Array, Float, PyTree

import hypergrad as hg

RIDGE = 1e-6  # relative to the mean of the diagonal of the kernel

WEIGHT_VARIANCE, BIAS_VARIANCE = 2.0, 0.01
MIN_SQUARED_SINE = 1e-14  # below it, two inputs have the same direction


def tangent_kernel(
    x: Float[Array, "n d"], y: Float[Array, "m d"]
) -> Float[Array, "n m"]:
    """Returns the neural tangent kernel of one infinitely wide hidden layer of ReLUs.

    Both layers have weights of variance 2 over their number of inputs, and biases of
    variance 0.01, in the parametrization of the tangent kernel (Jacot et al. 2018).
    With ``s(x, y) = 2 x . y / d + 0.01`` and the angle ``theta`` whose cosine is
    ``s(x, y) / sqrt(s(x, x) s(y, y))``, it is

        2 r(x, y) + 0.01 + 2 s(x, y) (pi - theta) / (2 pi),
        r(x, y) = sqrt(s(x, x) s(y, y)) (sin theta + (pi - theta) cos theta) / (2 pi)

    by the arc-cosine kernels of Cho & Saul 2009. Needs float64 for gradients of ``x``
    that are exact where ``x`` and ``y`` are equal.
    """
    scale = WEIGHT_VARIANCE / x.shape[1]
    covariance = scale * (x @ y.T) + BIAS_VARIANCE
    variance = lambda z: scale * jnp.sum(z**2, axis=1) + BIAS_VARIANCE
    product = variance(x)[:, None] * variance(y)[None]
    squared_sine = product - covariance**2
    differs = squared_sine > MIN_SQUARED_SINE * product
    sine = jnp.where(differs, jnp.sqrt(jnp.where(differs, squared_sine, 1.0)), 0.0)
    angle = math.pi - jnp.arctan2(sine, covariance)
    values = (sine + 2 * angle * covariance) / (2 * math.pi)
    return WEIGHT_VARIANCE * values + BIAS_VARIANCE


def factor(x: Array) -> Array:
    """Returns the Cholesky factor of the kernel of the images with its ridge."""
    kernel = tangent_kernel(x, x)
    ridge = RIDGE * jnp.trace(kernel) / len(x)
    return cholesky(kernel + ridge * jnp.eye(len(x)), lower=True)


def solution(alpha: PyTree, batch: PyTree = None) -> Array:
    """Returns the minimum of the inner loss."""
    del batch
    return solve_triangular(factor(alpha["x"]), alpha["y"], lower=True)


def inner_loss(w: Array, alpha: PyTree, batch: PyTree) -> Array:
    """Returns the dual loss of ridge regression, in whitened coordinates."""
    return 0.5 * jnp.vdot(w, w) - jnp.vdot(w, solution(alpha, batch))


def predict(w: Array, alpha: PyTree, x: Array) -> Array:
    """Returns the predictions of the trained regression."""
    dual = solve_triangular(factor(alpha["x"]), w, lower=True, trans=1)
    return tangent_kernel(x, alpha["x"]) @ dual


def squared_error(w: Array, alpha: PyTree, x: Array, y: Array) -> Array:
    """Returns half the mean squared error of the predictions."""
    return 0.5 * jnp.mean((predict(w, alpha, x) - y) ** 2)


def make_estimator() -> hg.Implicit:
    """Returns the exact estimator: the Hessian of the inner loss is the identity."""
    solver = hg.ClosedForm(solution)
    return hg.Implicit(solver, hg.Identity(), estimate_error=False)
