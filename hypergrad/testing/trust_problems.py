"""Random problems with known hypergradients, on which `check_trust` tests ``trusted``.

Each family draws a problem in parameters ``theta`` of order one. `make_trial` then
measures ``theta = D w`` in units ``D``, multiplies the losses by factors, adds a large
parameter that has no influence on the hypergradient, and moves ``w`` away from the
minimum.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from ..problem import Bilevel
from ..products import Loss, hvp, pushforward

NUM_FEATURES, NUM_EXAMPLES, NUM_DIRECTIONS = 15, 40, 24
NUM_LOGISTIC_FEATURES, NUM_RIDGE_FEATURES = 60, 100  # of the wide families
IRRELEVANT_SIZE = 5000.0
UNIT_EXPONENTS = (0.0, 2.0, 4.0, 6.0)
FACTOR_EXPONENTS = (-6.0, 0.0, 6.0)
RANK_TOLERANCE = 1e-10  # of a Hessian in the parameters theta
NUM_TRUTH_STEPS = 40  # of Newton's method, by default
NUM_START_STEPS = 60  # of the search for a first minimum, by default


class Family(NamedTuple):
    """A family of bilevel problems.

    Attributes:
      sample: ``key -> (theta, alpha, batch)``. ``theta`` is stationary, or is where the
        search for a minimum starts.
      inner_loss, outer_loss: ``(theta, alpha, batch) -> scalar``.
      num_start_steps: Number of steps of the search for a first minimum.
      num_newton_steps: Number of steps of Newton's method that follow, and of those
        from ``w`` to the stationary point whose hypergradient is the answer.
    """

    sample: Callable[[Array], tuple[Array, Array, PyTree]]
    inner_loss: Loss
    outer_loss: Loss
    num_start_steps: int = NUM_START_STEPS
    num_newton_steps: int = NUM_TRUTH_STEPS


class Trial(NamedTuple):
    """A problem in random units, and the right answer.

    Attributes:
      problem: The problem, whose two data sets are the same pytree.
      w, alpha: Where an estimate is made.
      hypergradient: The derivative at the stationary point that Newton's method reaches
        from ``w``, in float64.
      is_minimum: Whether this point is a minimum, strict or not.
    """

    problem: Bilevel
    w: Array
    alpha: Array
    hypergradient: Array
    is_minimum: Scalar


# Linear models.


def _sample_regression(key: Array) -> tuple[Array, Array, PyTree]:
    keys = jax.random.split(key, 5)
    x = jax.random.normal(keys[0], (2, NUM_EXAMPLES, NUM_FEATURES))
    true_theta = jax.random.normal(keys[1], (NUM_FEATURES,))
    noise = 0.5 * jax.random.normal(keys[2], (2, NUM_EXAMPLES))
    alpha = jax.random.uniform(keys[3], (NUM_FEATURES,), minval=-6.0, maxval=-1.0)
    theta = jax.random.normal(keys[4], (NUM_FEATURES,))
    return theta, alpha, {"x": x, "y": x @ true_theta + noise}


def _ridge_loss(theta, alpha, batch, row):
    return 0.5 * jnp.mean((batch["x"][row] @ theta - batch["y"][row]) ** 2)


def _logistic_loss(theta, alpha, batch, row):
    margins = jnp.sign(batch["y"][row]) * (batch["x"][row] @ theta)
    return jnp.mean(jax.nn.softplus(-margins))


def _softmax_loss(theta, alpha, batch, row):
    logits = batch["x"][row][:, :7] @ theta.reshape(7, 3)
    labels = jnp.digitize(batch["y"][row], jnp.array([-2.0, 2.0]))
    return _cross_entropy(logits, labels)


def _sample_softmax(key: Array) -> tuple[Array, Array, PyTree]:
    theta_key, data_key = jax.random.split(key)
    _, alpha, batch = _sample_regression(data_key)
    return jax.random.normal(theta_key, (21,)), alpha[:7], batch


def _cross_entropy(logits: Array, labels: Array) -> Array:
    log_probabilities = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_probabilities, labels[:, None], axis=1))


def _sample_wide(key: Array, num_features: int) -> tuple[Array, Array, PyTree]:
    """Returns a linear problem with correlated features and a single penalty."""
    keys = jax.random.split(key, 6)
    exponent = jax.random.uniform(keys[0], minval=1.0, maxval=3.0)
    deviations = 10 ** (-exponent / 2 * jnp.linspace(0.0, 1.0, num_features))
    q = jnp.linalg.qr(jax.random.normal(keys[1], (num_features, num_features)))[0]
    x = jax.random.normal(keys[2], (2, 2 * num_features, num_features))
    x = x @ (deviations[:, None] * q.T)
    true_theta = jax.random.normal(keys[3], (num_features,))
    y = x @ true_theta + 0.5 * jax.random.normal(keys[4], x.shape[:2])
    alpha = jax.random.uniform(keys[5], (1,), minval=-8.0, maxval=-3.0)
    return jnp.zeros(num_features), alpha, {"x": x, "y": y}


# A network, and three problems whose minima form circles or surfaces.


def _network_loss(theta, alpha, batch, row):
    w_in, w_out = theta[:24].reshape(6, 4), theta[24:].reshape(5, 3)
    x = batch["x"][row][:, :5]
    ones = jnp.ones_like(x[:, :1])
    hidden = jnp.tanh(jnp.concatenate([x, ones], axis=1) @ w_in)
    logits = jnp.concatenate([hidden, ones], axis=1) @ w_out
    return _cross_entropy(logits, jnp.digitize(batch["y"][row], jnp.array([-2.0, 2.0])))


def _sample_network(key: Array) -> tuple[Array, Array, PyTree]:
    theta_key, data_key = jax.random.split(key)
    _, alpha, batch = _sample_regression(data_key)
    return 0.7 * jax.random.normal(theta_key, (39,)), alpha[:13] / 2 - 1, batch


def _factorization_loss(theta, alpha, batch, row):
    u, v = theta.reshape(2, 6, 2)
    return 0.5 * jnp.mean((u @ v.T - batch["y"][row]) ** 2)


def _sample_factorization(key: Array) -> tuple[Array, Array, PyTree]:
    keys = jax.random.split(key, 4)
    factors = jax.random.normal(keys[0], (2, 6, 2))
    noise = 0.3 * jax.random.normal(keys[1], (2, 6, 6))
    y = jnp.broadcast_to(factors[0] @ factors[1].T, noise.shape) + noise
    theta = jnp.ravel(factors) + 0.1 * jax.random.normal(keys[2], (24,))
    alpha = jax.random.uniform(keys[3], (2,), minval=-5.0, maxval=-3.0)
    return theta, alpha, {"y": y}


def _distance_loss(theta, alpha, batch, row):
    # A rotation of the points about zero changes neither loss.
    squares = _squared_distances(theta.reshape(8, 2))
    return 0.5 * jnp.mean((squares - batch["squares"][row]) ** 2)


def _squared_distances(points: Float[Array, "n 2"]) -> Float[Array, "n n"]:
    return jnp.sum((points[:, None] - points[None]) ** 2, axis=-1)


def _sample_distances(key: Array) -> tuple[Array, Array, PyTree]:
    keys = jax.random.split(key, 4)
    points = jax.random.normal(keys[0], (8, 2))
    squares = _squared_distances(points)
    noise = 0.3 * jax.random.normal(keys[1], (2, 8, 8))
    theta = jnp.ravel(points) + 0.1 * jax.random.normal(keys[2], (16,))
    alpha = jax.random.uniform(keys[3], (2,), minval=-5.0, maxval=-3.0)
    return theta, alpha, {"squares": squares[None] + noise}


def _sample_diagonal_network(key: Array) -> tuple[Array, Array, PyTree]:
    theta_key, data_key = jax.random.split(key)
    _, alpha, batch = _sample_regression(data_key)
    return jax.random.normal(theta_key, (2 * NUM_FEATURES,)), alpha, batch


def _of_products(loss: Loss) -> Loss:
    """Returns the loss of a linear model whose weights are ``u_i v_i``.

    With ``u_i`` times and ``v_i`` divided by a number it is the same.
    """

    def loss_of_products(theta, alpha, batch):
        u, v = theta.reshape(2, NUM_FEATURES)
        return loss(u * v, alpha, batch)

    return loss_of_products


def _with_penalty(loss: Callable) -> tuple[Loss, Loss]:
    """Returns the training loss with a penalty per group, and the validation loss."""

    def inner_loss(theta, alpha, batch):
        squares = jnp.sum(theta.reshape(alpha.size, -1) ** 2, axis=1)
        return loss(theta, alpha, batch, 0) + 0.5 * jnp.sum(jnp.exp(alpha) * squares)

    return inner_loss, lambda theta, alpha, batch: loss(theta, alpha, batch, 1)


# Smooth problems with a given spectrum at the minimum ``theta = Q B alpha``.


def _spectral_inner_loss(theta, alpha, batch):
    # L = sum_i lambda_i (z_i^2 / 2 + z_i^4 / (10 + 10 z_i^2)) with z = Q' theta - B a
    z = batch["q"].T @ theta - batch["b"] @ alpha
    return jnp.sum(batch["eigenvalues"] * (0.5 * z**2 + 0.1 * z**4 / (1 + z**2)))


def _spectral_outer_loss(theta, alpha, batch):
    distance = batch["visible"] * (batch["q"].T @ theta) - batch["t"]
    return 0.5 * jnp.sum(distance**2) + 0.05 * jnp.sum(alpha**2)


def _spectral_family(sample_eigenvalues: Callable[[Array], Array]) -> Family:
    def sample(key):
        keys = jax.random.split(key, 5)
        n = NUM_DIRECTIONS
        eigenvalues = sample_eigenvalues(keys[0])
        batch = {
            "eigenvalues": eigenvalues,
            "q": jnp.linalg.qr(jax.random.normal(keys[1], (n, n)))[0],
            "b": jax.random.normal(keys[2], (n, 5)),
            "t": jax.random.normal(keys[3], (n,)) * (eigenvalues != 0),
            # Singular directions do not matter to the outer loss.
            "visible": (eigenvalues != 0).astype(float),
        }
        alpha = jax.random.normal(keys[4], (5,))
        return batch["q"] @ (batch["b"] @ alpha), alpha, batch

    return Family(sample, _spectral_inner_loss, _spectral_outer_loss)


def _clustered(key: Array) -> Float[Array, " n"]:
    keys = jax.random.split(key)
    centers = 10 ** jax.random.uniform(keys[0], (3,), minval=-3.0, maxval=0.0)
    jitter = 1 + 0.01 * jax.random.normal(keys[1], (NUM_DIRECTIONS,))
    return jnp.repeat(centers, NUM_DIRECTIONS // 3) * jitter


def _stretched(key: Array) -> Float[Array, " n"]:
    exponent = jax.random.uniform(key, minval=1.0, maxval=6.0)
    return 10 ** -(exponent * jnp.linspace(0.0, 1.0, NUM_DIRECTIONS))


def _one_slow(key: Array) -> Float[Array, " n"]:
    keys = jax.random.split(key)
    eigenvalues = jax.random.uniform(keys[0], (NUM_DIRECTIONS,), minval=0.1)
    return eigenvalues.at[0].set(
        10 ** jax.random.uniform(keys[1], minval=-8.0, maxval=-2.0)
    )


def _saddle(key: Array) -> Float[Array, " n"]:
    keys = jax.random.split(key)
    eigenvalues = jax.random.uniform(keys[0], (NUM_DIRECTIONS,), minval=0.1)
    lowest = -(10 ** jax.random.uniform(keys[1], minval=-4.0, maxval=-0.5))
    return eigenvalues.at[0].set(lowest)


def _singular(key: Array) -> Float[Array, " n"]:
    eigenvalues = jax.random.uniform(key, (NUM_DIRECTIONS,), minval=0.01)
    return eigenvalues.at[:3].set(0.0)


FAMILIES = {
    "ridge": Family(_sample_regression, *_with_penalty(_ridge_loss)),
    "logistic": Family(_sample_regression, *_with_penalty(_logistic_loss)),
    "softmax": Family(_sample_softmax, *_with_penalty(_softmax_loss)),
    "network": Family(_sample_network, *_with_penalty(_network_loss)),
    "factorization": Family(_sample_factorization, *_with_penalty(_factorization_loss)),
    "distances": Family(_sample_distances, *_with_penalty(_distance_loss)),
    "diagonal network": Family(
        _sample_diagonal_network,
        _of_products(_with_penalty(_ridge_loss)[0]),
        _of_products(_with_penalty(_ridge_loss)[1]),
    ),
    "clustered": _spectral_family(_clustered),
    "stretched": _spectral_family(_stretched),
    "one slow direction": _spectral_family(_one_slow),
    "saddle": _spectral_family(_saddle),
    "singular": _spectral_family(_singular),
    "wide logistic": Family(
        functools.partial(_sample_wide, num_features=NUM_LOGISTIC_FEATURES),
        *_with_penalty(_logistic_loss),
        num_start_steps=0,
        num_newton_steps=15,
    ),
    "wide ridge": Family(
        functools.partial(_sample_wide, num_features=NUM_RIDGE_FEATURES),
        *_with_penalty(_ridge_loss),
        num_start_steps=0,
        num_newton_steps=2,  # the second one removes rounding
    ),
}


# Trials.


def make_trial(family: Family, key: Array, unit_exponent: float | None = None) -> Trial:
    """Returns a random problem of a family in random units.

    The units reach from ``10^-e`` to ``10^e``, where ``e`` is ``unit_exponent`` or, by
    default, one of 0, 2, 4 and 6. Nothing else depends on ``unit_exponent``.

    Half of the time ``theta`` starts at the minimum plus noise of a random size, along
    random directions or along those of small curvature; else it is where a random
    number of steps of gradient descent leaves it.
    """
    keys = jax.random.split(key, 8)
    init_theta, alpha, batch = family.sample(keys[0])
    minimum = newton(
        family, approach_minimum(family, init_theta, alpha, batch), alpha, batch
    )
    theta = jnp.where(
        jax.random.bernoulli(keys[1]),
        minimum + _noise(family, minimum, alpha, batch, keys[2]),
        _descend(family, init_theta, alpha, batch, keys[3]),
    )
    hypergradient, is_minimum = dense_hypergradient(family, theta, alpha, batch)
    is_present = jax.random.bernoulli(keys[4], 0.3)
    theta = jnp.append(theta, jnp.where(is_present, IRRELEVANT_SIZE, 0.0))
    exponent = jax.random.choice(keys[5], jnp.asarray(UNIT_EXPONENTS))
    exponent = exponent if unit_exponent is None else unit_exponent
    units = 10 ** (exponent * jax.random.uniform(keys[6], theta.shape, minval=-1.0))
    exponents = jax.random.choice(keys[7], jnp.asarray(FACTOR_EXPONENTS), (2,))
    factors = 10.0**exponents
    data = {"batch": batch, "units": units, "factors": factors}
    problem = Bilevel(*_losses_in_units(family), data, data)
    return Trial(problem, theta / units, alpha, factors[1] * hypergradient, is_minimum)


def _losses_in_units(family: Family) -> tuple[Loss, Loss]:
    def inner_loss(w, alpha, batch):
        theta = batch["units"] * w
        irrelevant = 0.5 * theta[-1] ** 2 - IRRELEVANT_SIZE * theta[-1]
        loss = family.inner_loss(theta[:-1], alpha, batch["batch"])
        is_present = jnp.abs(theta[-1]) > IRRELEVANT_SIZE / 2
        irrelevant = jnp.where(is_present, irrelevant, 0.5 * theta[-1] ** 2)
        return batch["factors"][0] * (loss + 1e-3 * irrelevant)

    def outer_loss(w, alpha, batch):
        theta = batch["units"] * w
        return batch["factors"][1] * family.outer_loss(
            theta[:-1], alpha, batch["batch"]
        )

    return inner_loss, outer_loss


def _noise(
    family: Family, theta: Array, alpha: Array, batch: PyTree, key: Array
) -> Array:
    """Returns noise along ``H^0``, ``H^(-1/2)`` or ``H^-1``."""
    keys = jax.random.split(key, 3)
    eigenvalues, q = jnp.linalg.eigh(_hessian(family, theta, alpha, batch))
    power = jax.random.choice(keys[0], jnp.array([0.0, 0.5, 1.0]))
    is_regular = jnp.abs(eigenvalues) > RANK_TOLERANCE * jnp.max(eigenvalues)
    weights = jnp.where(is_regular, jnp.abs(eigenvalues), 1.0) ** -power
    noise = q @ (weights * jax.random.normal(keys[1], theta.shape))
    size = 10 ** jax.random.uniform(keys[2], minval=-7.0, maxval=0.5)
    return size * noise / jnp.linalg.norm(noise) * (1 + jnp.linalg.norm(theta))


def _descend(
    family: Family, theta: Array, alpha: Array, batch: PyTree, key: Array
) -> Array:
    """Returns ``theta`` after 1 to 1,000 steps of gradient descent."""
    keys = jax.random.split(key)
    theta = theta + 0.5 * jax.random.normal(keys[0], theta.shape)
    eigenvalues = jnp.linalg.eigvalsh(_hessian(family, theta, alpha, batch))
    rate = 1 / jnp.max(jnp.abs(eigenvalues))
    step = lambda _, theta: (
        theta - rate * jax.grad(family.inner_loss)(theta, alpha, batch)
    )
    num_steps = (10 ** jax.random.uniform(keys[1], maxval=3.0)).astype(int)
    return jax.lax.fori_loop(0, num_steps, step, theta)


def approach_minimum(
    family: Family, theta: Array, alpha: Array, batch: PyTree
) -> Array:
    """Returns ``theta`` after Newton steps of at most unit length with ``|H|``.

    A stationary point, even a saddle, is left unchanged.
    """

    def step(_, theta):
        grad = jax.grad(family.inner_loss)(theta, alpha, batch)
        eigenvalues, q = jnp.linalg.eigh(_hessian(family, theta, alpha, batch))
        magnitude = jnp.maximum(jnp.abs(eigenvalues), 1e-6 * jnp.max(eigenvalues))
        direction = q @ ((q.T @ grad) / magnitude)
        length = jnp.maximum(jnp.linalg.norm(direction), 1.0)
        is_stationary = jnp.linalg.norm(grad) <= 1e-12 * jnp.max(magnitude)
        return theta - jnp.where(is_stationary, 0.0, direction / length)

    return jax.lax.fori_loop(0, family.num_start_steps, step, theta)


def newton(family: Family, theta: Array, alpha: Array, batch: PyTree) -> Array:
    """Returns where Newton's method with dense derivatives ends."""

    def step(_, theta):
        grad = jax.grad(family.inner_loss)(theta, alpha, batch)
        hessian = _hessian(family, theta, alpha, batch)
        return theta - _pseudo_inverse(hessian) @ grad

    return jax.lax.fori_loop(0, family.num_newton_steps, step, theta)


def dense_hypergradient(
    family: Family, theta: Array, alpha: Array, batch: PyTree
) -> tuple[Array, Array]:
    """Returns the hypergradient where Newton's method ends, and if it is a minimum."""
    theta = newton(family, theta, alpha, batch)
    grad_fn = lambda alpha: jax.grad(family.inner_loss)(theta, alpha, batch)
    hessian = _hessian(family, theta, alpha, batch)
    grad, columns = pushforward(grad_fn, alpha, jnp.eye(alpha.size))
    b, direct = jax.grad(family.outer_loss, argnums=(0, 1))(theta, alpha, batch)
    eigenvalues = jnp.linalg.eigvalsh(hessian)
    grad_norm = jnp.linalg.norm(grad)
    is_stationary = grad_norm <= 1e-10 * eigenvalues[-1]
    is_minimum = eigenvalues[0] >= -RANK_TOLERANCE * eigenvalues[-1]
    hypergradient = direct - columns @ (_pseudo_inverse(hessian) @ b)
    return hypergradient, is_stationary & is_minimum


def _hessian(family: Family, theta: Array, alpha: Array, batch: PyTree) -> Array:
    column = lambda v: hvp(family.inner_loss, theta, alpha, batch, v)
    return jax.vmap(column)(jnp.eye(theta.size))


def _pseudo_inverse(hessian: Array) -> Array:
    return jnp.linalg.pinv(hessian, rtol=RANK_TOLERANCE, hermitian=True)


def cast_trial(trial: Trial, dtype: Any) -> Trial:
    """Returns the trial with problem and point in another dtype."""
    cast = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    problem, w, alpha = jax.tree.map(cast, (trial.problem, trial.w, trial.alpha))
    return trial._replace(problem=problem, w=w, alpha=alpha)
