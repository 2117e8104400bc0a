"""Random bilevel problems with badly scaled features, and their dense solutions.

Four kinds of inner losses: logistic, ridge and softmax regression, and a small network.
Losses are module-level functions, so that problems of one kind share compiled programs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import hypergrad as hg

NUM_TRAIN, NUM_VAL, NUM_FEATURES, NUM_CLASSES, NUM_HIDDEN = 40, 30, 6, 3, 4


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def logistic_loss(w, alpha, batch):
    return jnp.mean(jax.nn.softplus(-batch["y"] * (batch["x"] @ w)))


def squared_loss(w, alpha, batch):
    return 0.5 * jnp.mean((batch["x"] @ w - batch["y"]) ** 2)


def softmax_loss(w, alpha, batch):
    return cross_entropy(batch["x"] @ w, batch["y"])


def network_loss(w, alpha, batch):
    hidden = jnp.tanh(batch["x"] @ w["in"] + w["bias"][None])
    return cross_entropy(hidden @ w["out"], batch["y"])


def add_penalty(loss):
    """Adds one penalty per feature, or per layer of a network."""

    def penalized_loss(w, alpha, batch):
        squares = jnp.stack([jnp.sum(leaf**2) for leaf in jax.tree.leaves(w)])
        if squares.size == 1:
            rows = jax.tree.leaves(w)[0].reshape(NUM_FEATURES, -1)
            squares = jnp.sum(rows**2, axis=1)
        return loss(w, alpha, batch) + 0.5 * jnp.sum(jnp.exp(alpha) * squares)

    return penalized_loss


OUTER_LOSSES = {
    "logistic": logistic_loss,
    "ridge": squared_loss,
    "softmax": softmax_loss,
    "network": network_loss,
}
LOSSES = {kind: (add_penalty(loss), loss) for kind, loss in OUTER_LOSSES.items()}


def random_problem(key, kind):
    """Returns ``(problem, w, alpha)``; the features differ in scale."""
    keys = jax.random.split(key, 8)
    spread = 1.5 * jax.random.uniform(keys[0])
    scale = jnp.exp(spread * jax.random.normal(keys[1], (NUM_FEATURES,)))
    num_examples = NUM_TRAIN + NUM_VAL
    x = jax.random.normal(keys[2], (num_examples, NUM_FEATURES)) * scale[None]
    true_w = jax.random.normal(keys[3], (NUM_FEATURES, NUM_CLASSES)) / scale[:, None]
    noise = 0.5 * jax.random.normal(keys[4], (num_examples, NUM_CLASSES))
    scores = x @ true_w + noise
    y = {
        "logistic": jnp.sign(scores[:, 0]),
        "ridge": scores[:, 0],
        "softmax": jnp.argmax(scores, axis=1),
        "network": jnp.argmax(scores, axis=1),
    }[kind]
    if kind == "network":
        w = {
            "in": jax.random.normal(keys[5], (NUM_FEATURES, NUM_HIDDEN)) / 2,
            "bias": jnp.zeros(NUM_HIDDEN),
            "out": jax.random.normal(keys[6], (NUM_HIDDEN, NUM_CLASSES)) / 2,
        }
        alpha = jax.random.uniform(keys[7], (3,), minval=-3.0, maxval=-1.0)
    else:
        is_softmax = kind == "softmax"
        shape = (NUM_FEATURES, NUM_CLASSES) if is_softmax else (NUM_FEATURES,)
        w = jax.random.normal(keys[5], shape)
        alpha = jax.random.uniform(keys[7], (NUM_FEATURES,), minval=-6.0, maxval=-1.0)
    train = {"x": x[:NUM_TRAIN], "y": y[:NUM_TRAIN]}
    val = {"x": x[NUM_TRAIN:], "y": y[NUM_TRAIN:]}
    return hg.Bilevel(*LOSSES[kind], train, val), w, alpha


def random_matrix(eigenvalues, seed=0):
    """Returns a symmetric matrix with these eigenvalues."""
    size = len(eigenvalues)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
    return jnp.asarray(basis @ np.diag(eigenvalues) @ basis.T)


def flat_inner_loss(problem, w, alpha):
    """Returns ``(flat w, flat w -> L, unravel)``."""
    flat_w, unravel = ravel_pytree(w)
    loss = lambda w: problem.inner_loss(unravel(w), alpha, problem.inner_data)
    return flat_w, loss, unravel


def max_curvature(problem, w, alpha):
    """Returns the largest eigenvalue of ``H`` at ``w = 0``."""
    flat_w, loss, _ = flat_inner_loss(problem, w, alpha)
    return jnp.linalg.eigvalsh(jax.hessian(loss)(0 * flat_w))[-1]


def gradient_descent(problem, w, alpha, num_steps):
    """Returns ``w`` after steps of the size ``1 / max_curvature``."""
    flat_w, loss, unravel = flat_inner_loss(problem, w, alpha)
    rate = 1 / max_curvature(problem, w, alpha)
    step = lambda _, w: w - rate * jax.grad(loss)(w)
    return unravel(jax.lax.fori_loop(0, num_steps, step, flat_w))


def dense_hypergradient(problem, w, alpha):
    """Returns ``(is_minimum, hypergradient)`` at the end of Newton's method from ``w``.

    All derivatives are dense. ``is_minimum`` is False if Newton's method does not
    converge or ``H`` is not positive definite where it ends.
    """
    flat_w, unravel = ravel_pytree(w)
    inner = lambda w, alpha: problem.inner_loss(unravel(w), alpha, problem.inner_data)
    outer = lambda w, alpha: problem.outer_loss(unravel(w), alpha, problem.outer_data)
    grad, hessian = jax.grad(inner), jax.hessian(inner)
    newton = lambda _, w: w - jnp.linalg.solve(hessian(w, alpha), grad(w, alpha))
    w_star = jax.lax.fori_loop(0, 50, newton, flat_w)
    H = hessian(w_star, alpha)
    J = jax.jacobian(grad, argnums=1)(w_star, alpha)
    b, direct = jax.grad(outer, argnums=(0, 1))(w_star, alpha)
    is_stationary = jnp.linalg.norm(grad(w_star, alpha)) < 1e-12
    is_minimum = is_stationary & (jnp.linalg.eigvalsh(H)[0] > 0)
    return is_minimum, direct - J.T @ jnp.linalg.solve(H, b)
