"""Bayesian optimization with a Gaussian process of scikit-learn."""

from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, ArrayLike, PyTree

from .. import spaces
from ..validation import check_positive_int, float_converter
from .base import Trials, replace_nonfinite, seed_from_key


class GaussianProcess(eqx.Module):
    """Tries what is expected to improve most on the best value.

    A Gaussian process is fitted to all trials: kernel ``c Matern_{5/2}`` with a length
    scale an axis, ``c`` and the scales by maximum likelihood. Of ``num_candidates``
    points, half of them drawn from the space and half near the best trial, the one
    with the largest *expected improvement* is next,

        EI(alpha) = (best - mu) Phi(z) + sigma phi(z),     z = (best - mu) / sigma.

    The coordinates are those of `hypergrad.spaces.axes`; a choice counts as one axis
    for each value, 0 or 1. A trial that failed is given the worst finite value.

    Args:
      num_initial: random trials at first. Static.
      num_candidates: points whose expected improvement is compared. Static.
      noise: variance of a value around the process, in units of the variance of all
        values so far: 1e-6 where a trial repeats to the bit, more where it does not.

    Raises:
      ValueError: ``num_initial`` below 2, ``num_candidates`` below 2; at `init`, an
        unbounded space.

    Budget: 30 trials, for a value within 1e-4 (see `hypergrad.searchers`); 40 for one
    within 0.01 with an integer of 8 and a choice of 3 values beside.

    Cost: an ask is O(trials^3), and slow beyond some hundreds. Source: Jones, Schonlau
    & Welch 1998; Snoek, Larochelle & Adams 2012, arXiv:1206.2944.

    >>> import jax, hypergrad as hg
    >>> searcher, key = hg.searchers.GaussianProcess(num_initial=3), jax.random.key(0)
    >>> state = searcher.init(hg.spaces.Unit(), key)
    >>> for key in jax.random.split(key, 8):
    ...     alpha, state = searcher.ask(state, key)
    ...     state = searcher.tell(state, alpha, (alpha - 0.3) ** 2)
    >>> bool(state.values.min() < 1e-3)
    True
    """

    num_initial: int = eqx.field(static=True, default=10)
    num_candidates: int = eqx.field(static=True, default=2000)
    noise: ArrayLike = eqx.field(default=1e-6, converter=float_converter("noise"))

    citations = ("jones1998", "snoek2012", "scikit2011")

    def __check_init__(self):
        check_positive_int("num_initial", self.num_initial, 2)
        check_positive_int("num_candidates", self.num_candidates, 2)

    def init(self, space: PyTree, key: Array) -> Trials:
        """No trial yet."""
        del key
        return Trials.none(space)

    def ask(self, state: Trials, key: Array) -> tuple[PyTree, Trials]:
        """The candidate of most expected improvement; the state is as it was."""
        draw_key, seed_key = jax.random.split(key)
        if len(state.values) < self.num_initial:
            return spaces.sample(state.space, draw_key), state
        axes = spaces.axes(state.space)
        values = replace_nonfinite(state.values)
        best = state.t[np.argmin(values)]
        t = _candidates(axes, best, self.num_candidates, seed_from_key(seed_key))
        process = _fitted(_features(axes, state.t), values, self.noise)
        prediction = process.predict(_features(axes, t), return_std=True)
        improvement = _expected_improvement(values.min(), *prediction)
        return spaces.from_unit(state.space, t[np.argmax(improvement)]), state

    def tell(self, state: Trials, alpha: PyTree, value: Array) -> Trials:
        """Remembers the trial."""
        return state.told(alpha, value)


def _candidates(
    axes: list[spaces.Axis], best: np.ndarray, num: int, seed: int
) -> np.ndarray:
    """[num, axes]: half uniform, half around ``best`` at scales from 1/1000 to 1."""
    rng = np.random.default_rng(seed)
    uniform = rng.uniform(size=(num - num // 2, len(axes)))
    scale = 10.0 ** rng.uniform(-3, 0, size=(num // 2, 1))
    near = best[None] + scale * rng.normal(size=(num // 2, len(axes)))
    t = np.vstack([uniform, np.clip(near, 0, 1)])
    for i, axis in enumerate(axes):
        if (n := axis.num_values) is not None:  # the middle of its cell
            t[:, i] = (np.minimum(np.floor(t[:, i] * n), n - 1) + 0.5) / n
    return t


def _features(axes: list[spaces.Axis], t: np.ndarray) -> np.ndarray:
    """Coordinates, with a choice spread over as many columns as it has values."""
    columns = []
    for axis, column in zip(axes, t.T, strict=True):
        if axis.ordered or axis.num_values is None:
            columns.append(column[:, None])
        else:
            cell = (column * axis.num_values).astype(int)
            columns.append(np.eye(axis.num_values)[cell])
    return np.hstack(columns)


def _fitted(x: np.ndarray, values: np.ndarray, noise: Any) -> Any:
    """A process whose kernel maximizes the likelihood of the values."""
    from scipy.optimize import minimize
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern

    scales: Any = np.full(x.shape[1], 0.5)
    kernel = ConstantKernel(1.0, (0.01, 100.0)) * Matern(scales, (0.01, 100.0), nu=2.5)
    given = {"alpha": float(noise), "normalize_y": True, "optimizer": None}
    first: Any = GaussianProcessRegressor(kernel, **given).fit(x, values)

    def loss(theta):
        likelihood, gradient = first.log_marginal_likelihood(theta, True)
        return -likelihood, -gradient

    # Not by scikit-learn's own call, which warns of a scale at its bound: an axis that
    # the value does not depend on.
    found = minimize(
        loss, kernel.theta, jac=True, method="L-BFGS-B", bounds=kernel.bounds
    )
    kernel = kernel.clone_with_theta(found.x)
    return GaussianProcessRegressor(kernel, **given).fit(x, values)


def _expected_improvement(
    best: float, mean: np.ndarray, deviation: np.ndarray
) -> np.ndarray:
    """Jones et al. 1998, for a minimum."""
    from scipy.stats import norm

    z = (best - mean) / np.maximum(deviation, np.finfo(float).tiny)
    z = np.clip(z, -40, 40)  # phi and 1 - Phi are 0 beyond, in floating point
    return (best - mean) * norm.cdf(z) + deviation * norm.pdf(z)
