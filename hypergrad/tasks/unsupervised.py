"""Unsupervised learning: density models with hyperparameters of held-out likelihood.

Three models p(x | w, alpha): ``w`` is fitted to training examples, and ``alpha``
minimizes the mean of ``-log p`` over held-out examples. Labels are only used by one
metric.

``kde`` is a kernel density estimate with one bandwidth per feature (Parzen 1962; chosen
by likelihood as in Habbema et al. 1974 and Duin 1976). Its parameters are the training
examples in units of the bandwidth, ``w = x / alpha``:

    L(w, alpha) = mean_i |alpha w_i - x_i|² / 2,
    p(x) = mean_i N(x / alpha; w_i, I) / prod_j alpha_j.

``ppca`` is probabilistic principal component analysis (Tipping & Bishop 1999) with the
noise variance ``alpha``; L is the mean of ``-log p`` over the training examples,

    p(x) = N(x; 0, W W' + alpha I),   W* = U (Lambda - alpha I)^(1/2)   (equation 7).

``kmeans`` is soft k-means (Bezdek 1981; MacKay 2003, chapter 22) with a diagonal metric
``alpha``: the mixture of Gaussians with equal weights, means ``w`` and precision
``alpha_j`` in feature j; L is as in ``ppca``.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, PyTree

from .. import datasets, spaces
from ..inner import ClosedForm, Newton
from ..problem import Bilevel
from ..validation import as_key, is_traced
from .classifier import (
    as_arrays,
    check_data,
    check_test_marks,
    mean_and_deviation,
    random_order,
)
from .task import Task, check_choice, loss_metric

# Three eigenvalues of the correlation matrix of wine are above 1.
NUM_COMPONENTS = 3
MAX_NOISE = 1.0  # variance; must be below that of the last component
NUM_CLUSTERS = 3
LOG_2PI = 1.8378770664093453


def kde_loss(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Returns half of the mean squared error of ``alpha w`` as a copy of the data."""
    error = alpha[None, :] * w - batch["x"]
    return jnp.mean(jnp.sum(error**2, axis=1)) / 2


def kde_fit(alpha: Array, batch: PyTree) -> Array:
    """Returns the examples in units of the bandwidth, the argmin of `kde_loss`."""
    return batch["x"] / alpha[None, :]


def kde_nll(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Returns the mean of ``-log p`` under the kernel density estimate."""
    z = kde_fit(alpha, batch)
    squared_distance = jnp.sum((z[:, None, :] - w[None, :, :]) ** 2, axis=2)
    log_p = logsumexp(-squared_distance / 2, axis=1) - jnp.log(len(w))
    return -jnp.mean(log_p) + jnp.sum(jnp.log(alpha)) + z.shape[1] * LOG_2PI / 2


def kde_hypergradient(train: PyTree, val: PyTree, alpha: Array) -> Array:
    """Returns ``mean_x [1 - sum_i r_i(x) (x_j - x_ij)² / alpha_j²] / alpha_j``.

    ``r_i(x)`` is the fraction of the density at x that training example i contributes.
    """
    z, w = kde_fit(alpha, val), kde_fit(alpha, train)
    squares = (z[:, None, :] - w[None, :, :]) ** 2
    responsibility = jax.nn.softmax(-jnp.sum(squares, axis=2) / 2, axis=1)
    mean_square = jnp.sum(responsibility[:, :, None] * squares, axis=1)
    return jnp.mean(1 - mean_square, axis=0) / alpha


def covariance(batch: PyTree) -> Array:
    """Returns the covariance ``[d, d]`` around zero, the mean of training examples."""
    return batch["x"].T @ batch["x"] / len(batch["x"])


def ppca_nll(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Returns the mean of ``-log N(x; 0, W W' + alpha I)``."""
    d = len(w)
    model_covariance = w @ w.T + alpha * jnp.eye(d)
    _, log_determinant = jnp.linalg.slogdet(model_covariance)
    trace = jnp.trace(jnp.linalg.solve(model_covariance, covariance(batch)))
    return (d * LOG_2PI + log_determinant + trace) / 2


def ppca_fit(alpha: Array, batch: PyTree) -> Array:
    """Returns the loadings ``[d, q]`` of highest likelihood (equation 7).

    Rotations of them have the same likelihood; the identity is used.
    """
    values, vectors = jnp.linalg.eigh(covariance(batch))
    values, vectors = values[-NUM_COMPONENTS:], vectors[:, -NUM_COMPONENTS:]
    return vectors * jnp.sqrt(values - alpha)[None, :]


def check_components(train: PyTree) -> None:
    """Checks that all components stand out of the largest noise that is tried.

    Raises:
      ValueError: The variance of a component is not above it, so that `ppca_fit` would
        be NaN.
    """
    value = jnp.linalg.eigvalsh(covariance(train))[-NUM_COMPONENTS]
    if not is_traced(value) and not value > MAX_NOISE:
        raise ValueError(
            f"data['x'] must have {NUM_COMPONENTS} components with a variance above "
            f"{MAX_NOISE:g} for 'ppca', in units of one standardized feature; that of "
            f"the last is {value:.3g}. Use data with more features, or another variant."
        )


def ppca_hypergradient(train: PyTree, val: PyTree, alpha: Array) -> Array:
    """Returns ``(d - q) / (2 alpha) - sum_{i > q} u_i' S_val u_i / (2 alpha²)``.

    ``u_i`` are the eigenvectors of the training covariance that are not components.
    """
    _, vectors = jnp.linalg.eigh(covariance(train))
    noise_vectors = vectors[:, :-NUM_COMPONENTS]
    variance = jnp.trace(noise_vectors.T @ covariance(val) @ noise_vectors)
    return (noise_vectors.shape[1] - variance / alpha) / (2 * alpha)


def ppca_ml_noise(train: PyTree) -> Array:
    """Returns the noise variance of highest training likelihood (equation 8).

    It is the mean of the eigenvalues that are not components.
    """
    return jnp.mean(jnp.linalg.eigvalsh(covariance(train))[:-NUM_COMPONENTS])


def squared_distances(w: Array, alpha: Array, x: Array) -> Array:
    """Returns the squared distances ``[n, k]`` of examples and centroids."""
    return ((x[:, None, :] - w[None, :, :]) ** 2) @ alpha


def kmeans_nll(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Returns the mean of ``-log p`` under the mixture with equal weights."""
    exponents = -squared_distances(w, alpha, batch["x"]) / 2
    log_p = logsumexp(exponents, axis=1) - jnp.log(len(w))
    log_volume = (w.shape[1] * LOG_2PI - jnp.sum(jnp.log(alpha))) / 2
    return log_volume - jnp.mean(log_p)


def init_centroids(x: Array) -> Array:
    """Returns the means of equal groups along the first principal axis."""
    _, vectors = jnp.linalg.eigh(covariance({"x": x}))
    groups = jnp.array_split(x[jnp.argsort(x @ vectors[:, -1])], NUM_CLUSTERS)
    return jnp.stack([jnp.mean(group, axis=0) for group in groups])


def adjusted_rand(labels: Array, clusters: Array) -> Array:
    """Returns the adjusted Rand index: 0 by chance, 1 if equal (Hubert 1985)."""
    num_pairs = lambda n: jnp.sum(n * (n - 1)) / 2
    one_hot = lambda x: jax.nn.one_hot(x, NUM_CLUSTERS, dtype=float)
    table = one_hot(labels).T @ one_hot(clusters)
    label_pairs = num_pairs(jnp.sum(table, axis=1))
    cluster_pairs = num_pairs(jnp.sum(table, axis=0))
    expected = label_pairs * cluster_pairs / num_pairs(jnp.sum(table))
    maximum = (label_pairs + cluster_pairs) / 2
    # Both partitions are one group, or all single: they are equal.
    is_trivial = maximum == expected
    ratio = (num_pairs(table) - expected) / jnp.where(is_trivial, 1, maximum - expected)
    return jnp.where(is_trivial, 1.0, ratio)


def agreement(batch: PyTree, w: Array, alpha: Array, key: Array) -> Array:
    """Returns the adjusted Rand index of the nearest centroids and the classes."""
    del key
    clusters = jnp.argmin(squared_distances(w, alpha, batch["x"]), axis=1)
    return adjusted_rand(batch["y"], clusters)


def select_arrays(data: PyTree, names: tuple[str, ...]) -> dict[str, Array]:
    """Returns arrays of the data, and its marks of test examples if there are any.

    Raises:
      ValueError: Too few examples are without the mark ``test``.
    """
    if "test" in data:
        num_examples = len(data["x"])
        check_test_marks(data["test"], num_examples, 3 * num_examples // 4)
    return as_arrays(data, names)


def split(data: PyTree, key: Array) -> dict[str, PyTree]:
    """Splits the data into halves and quarters by a random permutation.

    Half of the examples is for training, a quarter for validation and a quarter for
    testing, to which those with the mark ``test`` belong. Features are standardized by
    the statistics of the training examples.
    """
    n = len(data["x"])
    order = random_order(data, key)
    shuffled = {name: leaf[order] for name, leaf in data.items() if name != "test"}
    x = jnp.asarray(shuffled["x"], float)
    mean, deviation = mean_and_deviation(x[: n // 2])
    shuffled["x"] = (x - mean) / deviation
    select = lambda rows: jax.tree.map(lambda leaf: leaf[rows], shuffled)
    return {
        "train": select(slice(n // 2)),
        "val": select(slice(n // 2, 3 * n // 4)),
        "test": select(slice(3 * n // 4, None)),
    }


def make(
    *,
    key: Array,
    scale: str = "small",
    variant: str = "kde",
    data: PyTree = None,
) -> Task:
    """Returns a density model of scikit-learn's wine: 178 wines with 13 features.

    Args:
      key: PRNG key of the split.
      scale: 'small' is the only one, because no paper defines another.
      variant: 'kde' or 'ppca', whose hypergradients have a closed form, or 'kmeans'.
      data: ``{"x": [n, features]}``, such as iris. With ``"y"``, [n] in three classes,
        'kmeans' has the metric ``agreement`` of clusters and classes. Defaults to wine.

    Raises:
      TypeError: data has a wrong type.
      ValueError: The scale or the variant is unknown, or data has a wrong shape or a
        wrong label.
    """
    key = as_key(key)
    check_choice("scale", scale, ("small",))
    check_choice("variant", variant, ("kde", "ppca", "kmeans"))
    data = datasets.load("wine") if data is None else data
    has_labels = variant == "kmeans" and isinstance(data, Mapping) and "y" in data
    names = ("x", "y") if has_labels else ("x",)
    check_data(data, 8, NUM_CLUSTERS, names)
    if variant == "ppca" and data["x"].shape[1] <= NUM_COMPONENTS:
        raise ValueError(
            f"data['x'] must have more than {NUM_COMPONENTS} features for 'ppca'; got "
            f"{data['x'].shape[1]}."
        )
    splits = split(select_arrays(data, names), key)
    train, val = ({"x": splits[name]["x"]} for name in ("train", "val"))
    d = train["x"].shape[1]
    shape = (d,)
    if variant == "kde":
        losses = kde_loss, kde_nll
        solver, w, alpha = ClosedForm(kde_fit), train["x"], jnp.ones(d)
        space = spaces.Interval(0.05, 5.0, log=True, shape=shape)
        exact = jax.tree_util.Partial(kde_hypergradient, train, val)
    elif variant == "ppca":
        check_components(train)
        losses = ppca_nll, ppca_nll
        solver, w = ClosedForm(ppca_fit), jnp.zeros((d, NUM_COMPONENTS))
        space, alpha = spaces.Interval(0.05, MAX_NOISE, log=True), jnp.asarray(0.3)
        exact = jax.tree_util.Partial(ppca_hypergradient, train, val)
    else:
        losses = kmeans_nll, kmeans_nll
        solver, w, alpha = Newton(), init_centroids(train["x"]), jnp.full(d, 2.0)
        space = spaces.Interval(0.1, 10.0, log=True, shape=shape)
        exact = None
    metrics = {"test_nll": loss_metric(losses[1], {"x": splits["test"]["x"]})}
    if has_labels:
        metrics["agreement"] = jax.tree_util.Partial(agreement, splits["test"])
    return Task(
        paradigm="unsupervised",
        problem=Bilevel(*losses, train, val),
        solver=solver,
        w=w,
        alpha=alpha,
        space=space,
        metrics=metrics,
        exact=exact,
    )
