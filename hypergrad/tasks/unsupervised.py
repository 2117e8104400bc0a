"""Unsupervised learning: density models, and what held-out likelihood makes of them.

Three models p(x | w, alpha); ``w`` is fitted to training examples, ``alpha`` lowers the
mean of ``-log p`` over held-out ones. No label is read but by one metric.

``kde``, a kernel density estimate with one bandwidth per feature (Parzen 1962; chosen
by likelihood as in Habbema et al. 1974, Duin 1976). To fit it is to keep the examples;
here they are kept in units of the bandwidth, ``w = x / alpha``:

    L(w, alpha) = mean_i |alpha w_i - x_i|² / 2,
    p(x) = mean_i N(x / alpha; w_i, I) / prod_j alpha_j.

``ppca``, probabilistic principal components (Tipping & Bishop 1999) with the noise
variance ``alpha``; L is the mean of ``-log p`` over the training examples,

    p(x) = N(x; 0, W W' + alpha I),   W* = U (Lambda - alpha I)^(1/2)   (equation 7).

``kmeans``, soft k-means with a learned diagonal metric ``alpha``: the equal mixture of
Gaussians around centroids ``w`` with precision ``alpha_j`` in feature j; L as before.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, PyTree

from .. import datasets as datasets
from .. import spaces
from ..inner import ClosedForm, Newton
from ..problem import Bilevel
from ..validation import as_key
from .classifier import check_data
from .task import Task

NUM_COMPONENTS = 3  # of wine; of its correlations three eigenvalues are above 1
NUM_CLUSTERS = 3
LOG_2PI = 1.8378770664093453


def kde_loss(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Half the mean square distance of what is kept from the examples."""
    distance = alpha[None, :] * w - batch["x"]
    return jnp.mean(jnp.sum(distance**2, axis=1)) / 2


def kde_fit(alpha: Array, batch: PyTree) -> Array:
    """The examples in units of the bandwidth, ``[n, d]``."""
    return batch["x"] / alpha[None, :]


def kde_nll(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Mean of ``-log p`` under the kernel density estimate."""
    z = kde_fit(alpha, batch)
    distance = jnp.sum((z[:, None, :] - w[None, :, :]) ** 2, axis=2)
    log_p = logsumexp(-distance / 2, axis=1) - jnp.log(len(w))
    return -jnp.mean(log_p) + jnp.sum(jnp.log(alpha)) + z.shape[1] * LOG_2PI / 2


def kde_hypergradient(train: PyTree, val: PyTree, alpha: Array) -> Array:
    """``mean_x [1 - sum_i r_i(x) (x_j - x_ij)² / alpha_j²] / alpha_j``.

    ``r_i(x)`` is the share of training example i in the density at x.
    """
    z, kept = kde_fit(alpha, val), kde_fit(alpha, train)
    square = (z[:, None, :] - kept[None, :, :]) ** 2
    share = jax.nn.softmax(-jnp.sum(square, axis=2) / 2, axis=1)
    spread = jnp.sum(share[:, :, None] * square, axis=1)
    return jnp.mean(1 - spread, axis=0) / alpha


def covariance(batch: PyTree) -> Array:
    """``[d, d]``, around the mean of the training examples, which is zero."""
    return batch["x"].T @ batch["x"] / len(batch["x"])


def ppca_nll(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Mean of ``-log N(x; 0, W W' + alpha I)``."""
    d = len(w)
    c = w @ w.T + alpha * jnp.eye(d)
    _, log_determinant = jnp.linalg.slogdet(c)
    fit = jnp.trace(jnp.linalg.solve(c, covariance(batch)))
    return (d * LOG_2PI + log_determinant + fit) / 2


def ppca_fit(alpha: Array, batch: PyTree) -> Array:
    """The loadings of highest likelihood, ``[d, q]``, of all rotations the first."""
    values, vectors = jnp.linalg.eigh(covariance(batch))
    values, vectors = values[-NUM_COMPONENTS:], vectors[:, -NUM_COMPONENTS:]
    return vectors * jnp.sqrt(values - alpha)[None, :]


def ppca_hypergradient(train: PyTree, val: PyTree, alpha: Array) -> Array:
    """``(d - q) / (2 alpha) - sum_{i > q} u_i' S_val u_i / (2 alpha²)``.

    ``u_i`` are the directions that the training examples leave to the noise.
    """
    _, vectors = jnp.linalg.eigh(covariance(train))
    noise = vectors[:, :-NUM_COMPONENTS]
    left = jnp.trace(noise.T @ covariance(val) @ noise)
    return (noise.shape[1] - left / alpha) / (2 * alpha)


def ppca_ml_noise(train: PyTree) -> Array:
    """The noise of highest training likelihood, the mean eigenvalue left (eq. 8)."""
    return jnp.mean(jnp.linalg.eigvalsh(covariance(train))[:-NUM_COMPONENTS])


def distances(w: Array, alpha: Array, x: Array) -> Array:
    """Squared distance of each example to each centroid in the metric, ``[n, k]``."""
    return ((x[:, None, :] - w[None, :, :]) ** 2) @ alpha


def kmeans_nll(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Mean of ``-log p`` under the equal mixture."""
    log_p = logsumexp(-distances(w, alpha, batch["x"]) / 2, axis=1) - jnp.log(len(w))
    log_volume = (w.shape[1] * LOG_2PI - jnp.sum(jnp.log(alpha))) / 2
    return log_volume - jnp.mean(log_p)


def thirds(x: Array) -> Array:
    """Centroids to begin with: means of parts along the first principal axis."""
    _, vectors = jnp.linalg.eigh(covariance({"x": x}))
    parts = jnp.array_split(x[jnp.argsort(x @ vectors[:, -1])], NUM_CLUSTERS)
    return jnp.stack([jnp.mean(part, axis=0) for part in parts])


def adjusted_rand(labels: Array, clusters: Array) -> Array:
    """Agreement of two partitions, 0 as by chance, 1 if equal (Hubert 1985)."""
    pairs = lambda n: jnp.sum(n * (n - 1)) / 2
    one_hot = lambda which: jax.nn.one_hot(which, NUM_CLUSTERS, dtype=float)
    table = one_hot(labels).T @ one_hot(clusters)
    rows, columns = pairs(jnp.sum(table, axis=1)), pairs(jnp.sum(table, axis=0))
    by_chance = rows * columns / pairs(jnp.sum(table))
    return (pairs(table) - by_chance) / ((rows + columns) / 2 - by_chance)


def nll_of(nll: Callable, batch: PyTree, w: PyTree, alpha: PyTree, key: Array) -> Any:
    """Mean of ``-log p`` over the test examples."""
    del key
    return nll(w, alpha, batch)


def agreement(batch: PyTree, w: Array, alpha: Array, key: Array) -> Array:
    """Adjusted Rand index of the nearest centroids and the test examples' classes."""
    del key
    return adjusted_rand(batch["y"], jnp.argmin(distances(w, alpha, batch["x"]), 1))


def split(data: PyTree, key: Array) -> dict[str, PyTree]:
    """Half train, a quarter validation, a quarter test, by a seeded permutation.

    Features are standardised by the mean and the deviation of the training examples.
    """
    n = len(data["x"])
    order = jax.random.permutation(key, n)
    shuffled = {name: leaf[order] for name, leaf in data.items()}
    x = jnp.asarray(shuffled["x"], float)
    train = x[: n // 2]
    spread = jnp.std(train, axis=0)
    spread = jnp.where(spread > 0, spread, 1)  # of a constant feature
    shuffled["x"] = (x - jnp.mean(train, axis=0)[None, :]) / spread[None, :]
    ends = {"train": (0, n // 2), "val": (n // 2, 3 * n // 4), "test": (3 * n // 4, n)}
    return {
        name: jax.tree.map(lambda leaf, a=a, b=b: leaf[a:b], shuffled)
        for name, (a, b) in ends.items()
    }


def make(
    *,
    key: Array,
    scale: str = "small",
    data_dir: str | None = None,
    variant: str = "kde",
    data: PyTree = None,
) -> Task:
    """One of three density models on scikit-learn's wine: 178 wines, 13 features.

    Args:
      key: of the split.
      scale: 'small' is the only one: no paper sets another.
      data_dir: not read: wine comes with scikit-learn.
      variant: 'kde' or 'ppca', whose hypergradients are known, or 'kmeans'.
      data: ``{"x": [n, features]}`` in place of wine, such as iris; with ``"y"``,
        [n] in three classes, 'kmeans' measures how its clusters agree with them.

    Raises:
      TypeError: data of another kind.
      ValueError: another scale or variant, data of another shape, or other labels.
    """
    key = as_key(key)
    del data_dir
    if scale != "small":
        raise ValueError(f"unsupervised has scale 'small' only; got {scale!r}")
    if variant not in ("kde", "ppca", "kmeans"):
        raise ValueError(f"variant must be 'kde', 'ppca' or 'kmeans'; got {variant!r}")
    data = datasets.load("wine") if data is None else data
    labelled = variant == "kmeans" and isinstance(data, Mapping) and "y" in data
    names = ("x", "y") if labelled else ("x",)
    check_data(data, 8, NUM_CLUSTERS, names)
    if variant == "ppca" and data["x"].shape[1] <= NUM_COMPONENTS:
        raise ValueError(
            f"ppca needs more than {NUM_COMPONENTS} features; got {data['x'].shape[1]}"
        )
    parts = split({name: jnp.asarray(data[name]) for name in names}, key)
    train, val = ({"x": parts[name]["x"]} for name in ("train", "val"))
    d = train["x"].shape[1]
    shape = (d,)
    if variant == "kde":
        losses = kde_loss, kde_nll
        solver, w, alpha = ClosedForm(kde_fit), train["x"], jnp.ones(d)
        space = spaces.Interval(0.05, 5.0, log=True, shape=shape)
        source = "Habbema, Hermans & van den Broek 1974; Duin 1976"
        exact = partial(kde_hypergradient, train, val)
    elif variant == "ppca":
        losses = ppca_nll, ppca_nll
        solver, w = ClosedForm(ppca_fit), jnp.zeros((d, NUM_COMPONENTS))
        # Above the last eigenvalue that is kept, its loading would be zero.
        space, alpha = spaces.Interval(0.05, 1.0, log=True), jnp.asarray(0.3)
        source = "Tipping & Bishop 1999, equations 7 and 8"
        exact = partial(ppca_hypergradient, train, val)
    else:
        losses = kmeans_nll, kmeans_nll
        solver, w, alpha = Newton(), thirds(train["x"]), jnp.full(d, 2.0)
        space = spaces.Interval(0.1, 10.0, log=True, shape=shape)
        source = "Bezdek 1981; MacKay 2003, chapter 22"
        exact = None
    metrics = {
        "test_nll": jax.tree_util.Partial(
            partial(nll_of, losses[1]), {"x": parts["test"]["x"]}
        )
    }
    if labelled:
        metrics["agreement"] = jax.tree_util.Partial(agreement, parts["test"])
    return Task(
        name="unsupervised",
        paradigm="unsupervised",
        source=source,
        problem=Bilevel(*losses, train, val),
        solver=solver,
        w=w,
        alpha=alpha,
        space=space,
        metrics=metrics,
        exact=exact,
    )
