"""Bayesian optimization with a Gaussian process of scikit-learn."""

from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from .. import spaces
from ..number_checks import check_positive_int, positive
from ..runtime.compat import import_optional
from .base import PendingTrials, replace_nonfinite, seed_from_key

#: Noise of a trial that repeats to the bit: there is no use in making it twice.
NO_NOISE = 1e-6


class GaussianProcess(eqx.Module):
    """Proposes the candidate with the largest expected improvement.

    A Gaussian process is fitted to all trials. Its kernel is ``c Matern_{5/2}`` with a
    length scale per axis; ``c`` and the length scales maximize the likelihood. Of
    ``num_candidates`` points, half of them sampled from the space and half near the
    best trial, the one with the largest expected improvement is proposed,

        EI(alpha) = (best - mu) Phi(z) + sigma phi(z),     z = (best - mu) / sigma.

    The coordinates are those of `hypergrad.spaces.axes`, with an indicator axis for
    each value of a choice. A failed trial counts as the worst finite value, or as worse
    by 1 if all finite values are equal. In a space of integers and choices only, no
    combination is proposed again after the initial trials while a candidate is left
    that was not tried, unless ``noise`` is raised. Proposals of a batch that have no
    value yet count as trials with the value that the process predicts ("kriging
    believer", Ginsbourger et al. 2010), so that a batch spreads out.

    Args:
      num_initial: Number of initial random trials, static.
      num_candidates: Number of candidates whose expected improvement is compared,
        static.
      noise: Variance of a value around the process in units of the variance of all
        values so far. Keep 1e-6 if a trial repeats to the bit.

    Raises:
      ImportError: scikit-learn is not installed (``pip install
        'hypergrad-jax[search]'``); raised by `init`.
      ValueError: ``num_initial`` or ``num_candidates`` is below 2, or ``noise`` is not
        above 0. In `init`: the space is unbounded.

    Budget: 30 trials for a value within 1e-4 (see `hypergrad.searchers`); 40 trials for
      a value within 0.01 with choices.
    Cost: O(trials^3) per proposal, which is slow beyond some hundreds of trials.

    Source: Jones, Schonlau & Welch 1998; Snoek, Larochelle & Adams 2012,
      arXiv:1206.2944; Ginsbourger, Le Riche & Carraro 2010.

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
    noise: ArrayLike = eqx.field(default=NO_NOISE, converter=positive("noise"))

    citations = ("jones1998", "snoek2012", "ginsbourger2010", "scikit2011")

    def __check_init__(self):
        check_positive_int("num_initial", self.num_initial, 2)
        check_positive_int("num_candidates", self.num_candidates, 2)

    def init(self, space: PyTree, key: Array) -> PendingTrials:
        """Returns the state without a trial."""
        del key
        import_gaussian_process()
        return PendingTrials.empty(space)

    def ask(self, state: PendingTrials, key: Array) -> tuple[PyTree, PendingTrials]:
        """Returns the proposal, and the state with it as pending."""
        sample_key, candidates_key = jax.random.split(key)
        if len(state.values) < self.num_initial:
            alpha = spaces.sample(state.space, sample_key)
            return alpha, state.propose(spaces.to_unit(state.space, alpha))
        axes = spaces.axes(state.space)
        values = replace_nonfinite(state.values)
        best_t = state.t[np.argmin(state.values)]  # a failure has the value infinity
        t = sample_candidates(
            axes, best_t, self.num_candidates, seed_from_key(candidates_key)
        )
        if np.asarray(self.noise).item() <= NO_NOISE:
            t = drop_tried_cells(axes, t, np.vstack([state.t, state.pending_t]))
        x = to_features(axes, state.t)
        process = fit_process(x, values, self.noise)
        if len(state.pending_t):
            pending_x = to_features(axes, state.pending_t)
            values = np.append(values, process.predict(pending_x))
            process.fit(np.vstack([x, pending_x]), values)
        mean, std = process.predict(to_features(axes, t), return_std=True)
        improvement = expected_improvement(values.min(), mean, std)
        best_t = t[np.argmax(improvement)]
        return spaces.from_unit(state.space, best_t), state.propose(best_t)

    def tell(self, state: PendingTrials, alpha: PyTree, value: Array) -> PendingTrials:
        """Returns the state with one more trial."""
        return state.add(alpha, value)


def sample_candidates(
    axes: list[spaces.Axis],
    best_t: Float[np.ndarray, " axes"],
    num_candidates: int,
    seed: int,
) -> Float[np.ndarray, "candidates axes"]:
    """Samples half of the candidates uniformly, half around the best trial.

    The scales around the best trial are log-uniform between 1/1000 and 1.
    """
    rng = np.random.default_rng(seed)
    num_near = num_candidates // 2
    uniform = rng.uniform(size=(num_candidates - num_near, len(axes)))
    scale = 10.0 ** rng.uniform(-3, 0, size=(num_near, 1))
    near = best_t[None] + scale * rng.normal(size=(num_near, len(axes)))
    t = np.vstack([uniform, np.clip(near, 0, 1)])
    for i, axis in enumerate(axes):
        if (n := axis.num_values) is not None:  # move to the middle of the cell
            t[:, i] = (np.minimum(np.floor(t[:, i] * n), n - 1) + 0.5) / n
    return t


def drop_tried_cells(
    axes: list[spaces.Axis],
    candidates: Float[np.ndarray, "candidates axes"],
    tried_t: Float[np.ndarray, "trials axes"],
) -> Float[np.ndarray, "candidates axes"]:
    """Returns the candidates in cells without a trial, or all if there are none.

    All candidates are returned as well if an axis is continuous.
    """
    num_values = [axis.num_values for axis in axes]
    if None in num_values:
        return candidates
    sizes = np.array([num_values])
    to_cells = lambda t: np.minimum(np.floor(t * sizes), sizes - 1).tolist()
    tried = set(map(tuple, to_cells(tried_t)))
    is_new = [tuple(cells) not in tried for cells in to_cells(candidates)]
    return candidates[is_new] if any(is_new) else candidates


def to_features(
    axes: list[spaces.Axis], t: Float[np.ndarray, "points axes"]
) -> Float[np.ndarray, "points features"]:
    """Returns coordinates in which a choice has an indicator column for each value."""
    columns = []
    for axis, column in zip(axes, t.T, strict=True):
        if axis.ordered or axis.num_values is None:
            columns.append(column[:, None])
        else:
            index = np.minimum(column * axis.num_values, axis.num_values - 1)
            index = index.astype(int)
            columns.append(np.eye(axis.num_values)[index])
    return np.hstack(columns)


def import_gaussian_process() -> Any:
    """Returns the module of scikit-learn; the error says how to install it."""
    need = "GaussianProcess needs scikit-learn"
    return import_optional("sklearn.gaussian_process", need, "search")


def fit_process(
    x: Float[np.ndarray, "points features"],
    values: Float[np.ndarray, " points"],
    noise: Any,
) -> Any:
    """Returns a process whose kernel maximizes the likelihood of the values."""
    from scipy.optimize import minimize

    gaussian_process = import_gaussian_process()
    regressor = gaussian_process.GaussianProcessRegressor
    kernels = gaussian_process.kernels
    length_scales: Any = np.full(x.shape[1], 0.5)
    bounds = 0.01, 100.0
    kernel = kernels.ConstantKernel(1.0, bounds)
    kernel *= kernels.Matern(length_scales, bounds, nu=2.5)
    settings = {"alpha": float(noise), "normalize_y": True, "optimizer": None}
    process: Any = regressor(kernel, **settings).fit(x, values)

    def negative_log_likelihood(theta):
        value, gradient = process.log_marginal_likelihood(theta, True)
        return -value, -gradient

    # scikit-learn's own optimization warns of a length scale at its bound, which is
    # normal here: the value need not depend on every axis.
    result = minimize(
        negative_log_likelihood,
        kernel.theta,
        jac=True,
        method="L-BFGS-B",
        bounds=kernel.bounds,
    )
    kernel = kernel.clone_with_theta(result.x)
    return regressor(kernel, **settings).fit(x, values)


def expected_improvement(
    best: float, mean: Float[np.ndarray, " points"], std: Float[np.ndarray, " points"]
) -> Float[np.ndarray, " points"]:
    """Returns ``E[max(best - y, 0)]`` for normal ``y`` (Jones et al. 1998)."""
    from scipy.stats import norm

    z = (best - mean) / np.maximum(std, np.finfo(float).tiny)
    z = np.clip(z, -40, 40)  # beyond, phi and 1 - Phi are 0 in floating point
    return (best - mean) * norm.cdf(z) + std * norm.pdf(z)
