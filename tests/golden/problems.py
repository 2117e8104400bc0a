"""Small bilevel problems of the golden cases, with data from NumPy's generator."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hypergrad as hg

NUM_EXAMPLES, NUM_FEATURES = 24, 4


class Setup(NamedTuple):
    """A problem, and where the inner and the outer variables start."""

    problem: hg.Bilevel
    w: Any
    alpha: Any


def regression_data(seed: int, dtype: Any = float) -> dict[str, np.ndarray]:
    """Returns features ``x`` of shape ``[24, 4]`` and linear targets ``y`` with noise.

    All seeds share the coefficients, so that one seed validates what another trains.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(NUM_EXAMPLES, NUM_FEATURES))
    y = x @ np.array([1.0, -0.5, 0.25, 0.0]) + 0.3 * rng.normal(size=NUM_EXAMPLES)
    return {"x": x.astype(dtype), "y": y.astype(dtype)}


def classification_data(seed: int) -> dict[str, np.ndarray]:
    """Returns the regression data with targets -1 and 1."""
    data = regression_data(seed)
    return {"x": data["x"], "y": np.sign(data["y"])}


# Least squares with an L2 penalty per weight.


def squared_loss(w, alpha, batch):
    """Returns the mean squared residual, halved."""
    return 0.5 * jnp.mean((batch["x"] @ w - batch["y"]) ** 2)


def ridge_loss(w, alpha, batch):
    """Returns the squared loss plus ``sum(exp(alpha) w**2) / 2``."""
    return squared_loss(w, alpha, batch) + 0.5 * jnp.sum(jnp.exp(alpha) * w**2)


def ridge_objective(w, alpha, batch):
    """Returns the squared loss plus a term that only depends on alpha."""
    return squared_loss(w, alpha, batch) + 0.01 * jnp.sum(alpha**2)


def size_objective(w, alpha, batch):
    """Returns the size of ``w``, the second of two outer losses."""
    return jnp.sum(jnp.tanh(w**2)) + 0.02 * jnp.sum((alpha + 1) ** 2)


def ridge(
    *,
    batch_size: int | None = None,
    num_losses: int = 1,
    dtype: Any = float,
    **options: Any,
) -> Setup:
    """Least squares; a batch size makes `hypergrad.Batches` of both data sets."""
    data = [regression_data(seed, dtype) for seed in (0, 1)]
    if batch_size is not None:
        data = [hg.Batches(examples, batch_size) for examples in data]
    losses = (ridge_objective, size_objective)[:num_losses]
    outer_loss = losses if num_losses > 1 else losses[0]
    problem = hg.Bilevel(ridge_loss, outer_loss, *data, **options)
    alpha = jnp.array([-1.0, -1.5, -2.0, -0.5], dtype)
    return Setup(problem, jnp.array([0.1, 0.0, -0.1, 0.2], dtype), alpha)


def shifted_init(w, alpha):
    """Returns an initial ``w`` of the inner solver that depends on alpha."""
    return w + jnp.tanh(alpha)


def sample_episode(data, key):
    """Returns inner and outer data with noise that the key determines."""
    keys = jax.random.split(key)
    residual = lambda key: 0.1 * jax.random.normal(key, data["y"].shape)
    return tuple({"x": data["x"], "y": data["y"] + residual(key)} for key in keys)


def episodes() -> Setup:
    """Least squares on data that is sampled once per estimate."""
    data = jax.tree.map(jnp.asarray, regression_data(0))
    sample_fn = jax.tree_util.Partial(sample_episode, data)
    problem = hg.Bilevel(ridge_loss, ridge_objective, data_fn=sample_fn)
    return Setup(problem, *ridge()[1:])


def noisy_ridge_loss(w, alpha, batch):
    """Returns the ridge loss on features with additive noise from the batch's key."""
    examples, key = batch
    x = examples["x"] + 0.1 * jax.random.normal(key, examples["x"].shape)
    return ridge_loss(w, alpha, {"x": x, "y": examples["y"]})


def keyed_batches(batch_size: int | None = 6) -> Setup:
    """Least squares whose inner batches come with a PRNG key."""
    batches = hg.Batches(regression_data(0), batch_size, with_key=True)
    problem = hg.Bilevel(noisy_ridge_loss, ridge_objective, batches, regression_data(1))
    return Setup(problem, *ridge()[1:])


# Logistic regression whose w and alpha are dicts.


def logistic_objective(w, alpha, batch):
    """Returns the mean logistic loss."""
    margins = batch["y"] * (batch["x"] @ w["weights"] + w["bias"])
    return jnp.mean(jax.nn.softplus(-margins))


def logistic_loss(w, alpha, batch):
    """Returns the logistic loss with one penalty per weight and one of the bias."""
    squares = jnp.sum(jnp.exp(alpha["weights"]) * w["weights"] ** 2)
    penalty = squares + jnp.exp(alpha["bias"]) * w["bias"] ** 2
    return logistic_objective(w, alpha, batch) + 0.5 * penalty


def logistic(batch_size: int | None = None) -> Setup:
    """Logistic regression; a batch size makes `hypergrad.Batches` of both data sets."""
    data = [classification_data(seed) for seed in (0, 1)]
    if batch_size is not None:
        data = [hg.Batches(examples, batch_size) for examples in data]
    problem = hg.Bilevel(logistic_loss, logistic_objective, *data)
    w = {"weights": jnp.zeros(NUM_FEATURES), "bias": jnp.zeros(())}
    alpha = {"weights": jnp.linspace(-2.0, -1.0, 4), "bias": jnp.asarray(-1.0)}
    return Setup(problem, w, alpha)


# Least squares whose optimizer depends on alpha.


def tuned_loss(w, alpha, batch):
    """Returns the ridge loss with one penalty for all weights."""
    return ridge_loss(w, alpha["penalty"], batch)


def tuned(outer_loss: Callable | tuple[Callable, ...] = squared_loss) -> Setup:
    """Least squares with a log-penalty, a learning rate and a momentum in alpha."""
    problem = hg.Bilevel(tuned_loss, outer_loss, regression_data(0), regression_data(1))
    alpha = {
        "penalty": jnp.asarray(-1.5),
        "rate": jnp.asarray(0.2),
        "momentum": jnp.asarray(0.5),
    }
    return Setup(problem, ridge().w, alpha)


# Problems for runs with a space, with annealing, and of runs that stop.


def positive_penalty_loss(w, alpha, batch):
    """Returns the logistic loss with penalties instead of their logarithms."""
    return logistic_loss(w, jax.tree.map(jnp.log, alpha), batch)


def positive_penalties() -> Setup:
    """Logistic regression whose penalties are not logarithms."""
    problem, w, alpha = logistic()
    data = problem.inner_data, problem.outer_data
    problem = hg.Bilevel(positive_penalty_loss, logistic_objective, *data)
    return Setup(problem, w, jax.tree.map(jnp.exp, alpha))


def mixture_loss(w, alpha, batch):
    """Returns the squared loss of features that alpha mixes, with a penalty."""
    mixed = batch["x"] * alpha[None]
    return squared_loss(w, None, batch | {"x": mixed}) + 0.1 * jnp.sum(w**2)


def mixture_objective(w, alpha, batch):
    """Returns the squared loss of features that alpha mixes."""
    return squared_loss(w, None, batch | {"x": batch["x"] * alpha[None]})


def feature_mixture() -> Setup:
    """Least squares on features with weights on the simplex."""
    data = regression_data(0), regression_data(1)
    problem = hg.Bilevel(mixture_loss, mixture_objective, *data)
    return Setup(problem, jnp.zeros(4), jnp.full(4, 0.25))


def smooth_error_rate(w, alpha, batch):
    """Returns a smooth error rate whose temperature is part of the data."""
    margins = batch["y"] * (batch["x"] @ w["weights"] + w["bias"])
    return jnp.mean(jax.nn.sigmoid(-margins / batch["temperature"]))


def smooth_error(batch_size: int | None = None) -> Setup:
    """Logistic regression whose outer data contains a temperature."""
    problem, w, alpha = logistic()
    data = {**problem.outer_data, "temperature": jnp.asarray(1.0)}
    if batch_size is not None:
        data = hg.Batches(data, batch_size)
    problem = hg.Bilevel(logistic_loss, smooth_error_rate, problem.inner_data, data)
    return Setup(problem, w, alpha)


def diverging() -> Setup:
    """A problem whose outer value overflows after some steps."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2),
        lambda w, alpha, batch: -jnp.sum(jnp.exp(w**2)),
    )
    return Setup(problem, jnp.zeros(2), jnp.array([1.0, -0.5]))


def nan_gradient() -> Setup:
    """A problem whose hypergradient is NaN where its value is finite."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2),
        lambda w, alpha, batch: jnp.sum(jnp.sqrt(jnp.maximum(alpha, 0.0)) + w),
    )
    return Setup(problem, jnp.zeros(2), jnp.array([0.1, 0.3]))
