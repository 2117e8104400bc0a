"""Bilevel problems whose hypergradient follows from a formula or a dense solve.

Losses are module-level functions, so that problems of one shape share a program. Exact
values come from NumPy in float64 or from `dense`, which uses only the losses.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.flatten_util import ravel_pytree

import hypergrad as hg

flat = lambda tree: ravel_pytree(tree)[0]


class ReferenceProblem(NamedTuple):
    """A problem with its exact hypergradient and inner solution.

    Attributes:
      problem: The bilevel problem.
      w, alpha: Initial values.
      exact: ``alpha -> hypergradient``, structured like ``alpha``.
      solution: ``alpha -> w*``, structured like ``w``.
      hessian: Hessian of the inner loss at ``w*(alpha)``.
    """

    problem: hg.Bilevel
    w: Any
    alpha: Any
    exact: Callable[[Any], Any]
    solution: Callable[[Any], Any]
    hessian: np.ndarray

    @property
    def step(self) -> float:
        """Step size with which gradient descent contracts fastest."""
        eigenvalues = np.linalg.eigvalsh(self.hessian)[[0, -1]]
        return float(2 / eigenvalues.sum())


def error(actual: Any, expected: Any) -> float:
    """Returns the relative distance of two pytrees in the Euclidean norm."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    actual = np.concatenate([np.ravel(x) for x in jax.tree.leaves(actual)])
    expected = np.concatenate([np.ravel(x) for x in jax.tree.leaves(expected)])
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def central(fn: Callable[[Any], Any], point: Any, epsilon: float = 1e-3) -> Any:
    """Returns the gradient of a scalar function by fourth-order differences."""
    x, unravel = ravel_pytree(point)
    value = lambda x: float(fn(unravel(x)))
    derivatives = []
    for direction in np.eye(x.size):
        e = epsilon * direction
        narrow = value(x + e) - value(x - e)
        wide = value(x + 2 * e) - value(x - 2 * e)
        derivatives.append((8 * narrow - wide) / (12 * epsilon))
    return unravel(jnp.array(derivatives))


def dense(problem: hg.Bilevel, w: Any, alpha: Any, damping: float = 0.0) -> dict:
    """Returns values and derivatives at ``w*`` by Newton's method and dense solves.

    The keys are ``w``, ``value``, ``hypergradient``, the inner gradient ``g``, its
    derivatives ``H`` and ``J`` in w and alpha, and the derivatives of the outer losses
    ``b`` in w and ``direct`` in alpha.
    """
    w_flat, unravel = ravel_pytree(w)
    a_flat, unravel_alpha = ravel_pytree(alpha)
    losses = problem.outer_loss
    losses = losses if isinstance(losses, tuple) else (losses,)

    @jax.jit
    def derivatives(w, a):
        inner = lambda w, a: problem.inner_loss(
            unravel(w), unravel_alpha(a), problem.inner_data
        )
        outer = lambda w, a: jnp.stack(
            [loss(unravel(w), unravel_alpha(a), problem.outer_data) for loss in losses]
        )
        inner_grad = jax.grad(inner)
        return {
            "g": inner_grad(w, a),
            "H": jax.jacrev(inner_grad)(w, a),
            "J": jax.jacrev(inner_grad, argnums=1)(w, a),
            "b": jax.jacrev(outer)(w, a),
            "direct": jax.jacrev(outer, argnums=1)(w, a),
            "value": outer(w, a),
        }

    for _ in range(60):
        matrices = derivatives(w_flat, a_flat)
        w_flat = w_flat - jnp.linalg.solve(matrices["H"], matrices["g"])
        if float(jnp.linalg.norm(matrices["g"])) < 1e-14:
            break
    matrices = {name: np.asarray(x) for name, x in derivatives(w_flat, a_flat).items()}
    assert np.linalg.norm(matrices["g"]) < 1e-12
    H = matrices["H"] + damping * np.eye(len(matrices["H"]))
    adjoint = np.linalg.solve(H, matrices["b"].T)
    rows = jnp.asarray(matrices["direct"] - adjoint.T @ matrices["J"])
    if isinstance(problem.outer_loss, tuple):
        matrices["hypergradient"] = jax.vmap(unravel_alpha)(rows)
    else:
        matrices["value"] = matrices["value"][0]
        matrices["hypergradient"] = unravel_alpha(rows[0])
    matrices["w"] = unravel(w_flat)
    return matrices


def cast(tree: Any, dtype: Any) -> Any:
    """Returns the tree with its floating leaves in another dtype."""
    is_floating = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype) if is_floating(x) else x, tree)


# Quadratic: L = w'H w/2 - w'C alpha,  M = |w - t|^2/2 + k'alpha^2/2,
# w* = H^-1 C alpha,  dM/dalpha = k alpha + C'H^-1 (w* - t).

# NumPy arrays, because JAX would fix their precision when this module is imported.
SHAPES = {
    "0-d": np.zeros(()),
    "1": np.zeros(1),
    "2": np.zeros(2),
    "30": np.zeros(30),
    "nested": {"a": [np.zeros((2, 3)), np.zeros(())], "b": {"c": np.zeros(2)}},
    "cI": np.zeros(30),
}


def quadratic_inner(w, alpha, batch):
    w, alpha = flat(w), flat(alpha)
    return 0.5 * w @ (batch["H"] @ w) - w @ (batch["C"] @ alpha)


def quadratic_outer(w, alpha, batch):
    w, alpha = flat(w), flat(alpha)
    penalty = jnp.sum(batch["k"] * alpha**2)
    return 0.5 * jnp.sum((w - batch["t"]) ** 2) + 0.5 * penalty


def quadratic(
    structure: str = "30", seed: int = 0, condition: float = 10.0
) -> ReferenceProblem:
    """Returns a quadratic problem with an ``alpha`` of 4 numbers.

    The eigenvalues of its Hessian lie in [1, condition]; all are 3 for "cI".
    """
    rng = np.random.default_rng(seed)
    w, unravel = ravel_pytree(SHAPES[structure])
    alpha = rng.normal(size=4)
    alpha = {"a": jnp.array(alpha[0]), "b": [jnp.array(alpha[1:])]}
    if structure != "nested":
        alpha = flat(alpha)
    unravel_alpha = ravel_pytree(alpha)[1]
    basis, _ = np.linalg.qr(rng.normal(size=(w.size, w.size)))
    spectrum = np.full(w.size, 3.0)
    if structure != "cI":
        spectrum = rng.uniform(1, condition, size=w.size)
        spectrum[-1], spectrum[0] = condition, 1.0
    H = basis * spectrum @ basis.T
    C, t, k = rng.normal(size=(w.size, 4)), rng.normal(size=w.size), rng.random(4)
    solution = lambda a: np.linalg.solve(H, C @ np.asarray(flat(a)))
    gradient = lambda a: (
        k * np.asarray(flat(a)) + C.T @ np.linalg.solve(H, solution(a) - t)
    )
    data = {"H": H, "C": C, "t": t, "k": k}
    return ReferenceProblem(
        hg.Bilevel(quadratic_inner, quadratic_outer, data, data),
        unravel(w), alpha, lambda a: unravel_alpha(jnp.array(gradient(a))),
        lambda a: unravel(jnp.array(solution(a))), H,
    )  # fmt: skip


# Ridge: L = mean(s r^2)/2 + sum(e^l w^2)/2,  M = mean(r^2)/2 on other data,
# dM/dl_j = -e^{l_j} w_j (H^-1 g)_j,  dM/ds_i = r_i x_i'H^-1 g / n.


def ridge_outer(w, alpha, batch):
    return 0.5 * jnp.mean((batch["x"] @ w - batch["y"]) ** 2)


def ridge_penalty(w, alpha, batch):
    return ridge_outer(w, alpha, batch) + 0.5 * jnp.sum(jnp.exp(alpha) * w**2)


def ridge_weights(w, alpha, batch):
    residual = batch["x"] @ w - batch["y"]
    weights = alpha[batch["index"]]
    return 0.5 * jnp.mean(weights * residual**2) + 0.05 * jnp.sum(w**2)


def _linear_data(seed, n, d):
    rng = np.random.default_rng(seed)
    x, true_w = rng.normal(size=(2 * n, d)), rng.normal(size=d)
    return rng, x, x @ true_w + 0.5 * rng.normal(size=2 * n)


def ridge(
    kind: str = "scalar", seed: int = 0, n: int = 40, d: int = 6
) -> ReferenceProblem:
    """Returns ridge regression with learned penalties or example weights.

    ``kind`` is "scalar" for one log-penalty, "per-weight" or "per-example".
    """
    rng, x, y = _linear_data(seed, n, d)
    train, val = {"x": x[:n], "y": y[:n]}, {"x": x[n:], "y": y[n:]}
    if kind == "per-example":
        alpha = jnp.array(rng.uniform(0.5, 1.5, size=n))
        data = train | {"index": np.arange(n)}
        problem = hg.Bilevel(ridge_weights, ridge_outer, data, val)
    else:
        shape = () if kind == "scalar" else (d,)
        alpha = jnp.array(rng.uniform(-2, -1, size=shape))
        problem = hg.Bilevel(ridge_penalty, ridge_outer, train, val)

    def solve(a):
        a = np.asarray(a)
        weights = a if kind == "per-example" else np.ones(n)
        penalty = 0.1 if kind == "per-example" else np.exp(a)
        H = (train["x"].T * weights) @ train["x"] / n + penalty * np.eye(d)
        w = np.linalg.solve(H, train["x"].T @ (weights * train["y"]) / n)
        g = val["x"].T @ (val["x"] @ w - val["y"]) / n
        return H, w, np.linalg.solve(H, g)

    def exact(a):
        _, w, v = solve(a)
        if kind == "per-example":
            return (train["y"] - train["x"] @ w) * (train["x"] @ v) / n
        gradient = -np.exp(np.asarray(a)) * w * v
        return gradient.sum() if kind == "scalar" else gradient

    return ReferenceProblem(
        problem, jnp.zeros(d), alpha, lambda a: jnp.array(exact(a)),
        lambda a: jnp.array(solve(a)[1]), solve(alpha)[0],
    )  # fmt: skip


# Logistic: L = mean(log(1 + exp(-y x'w))) + sum(e^l w^2)/2; the point by Newton.


def logistic_outer(w, alpha, batch):
    return jnp.mean(jax.nn.softplus(-batch["y"] * (batch["x"] @ w)))


def logistic_inner(w, alpha, batch):
    return logistic_outer(w, alpha, batch) + 0.5 * jnp.sum(jnp.exp(alpha) * w**2)


def logistic(
    kind: str = "per-weight", seed: int = 0, n: int = 40, d: int = 6
) -> ReferenceProblem:
    """Returns logistic regression with one log-penalty ("scalar") or one per weight."""
    rng, x, y = _linear_data(seed, n, d)
    y = np.sign(y)
    train, val = {"x": x[:n], "y": y[:n]}, {"x": x[n:], "y": y[n:]}
    alpha = jnp.array(rng.uniform(-3, -2, size=() if kind == "scalar" else (d,)))

    def solve(a):
        a, w, g, H = np.asarray(a), np.zeros(d), np.ones(d), np.eye(d)
        for _ in range(50):
            p = 1 / (1 + np.exp(train["y"] * (train["x"] @ w)))
            g = -train["x"].T @ (train["y"] * p) / n + np.exp(a) * w
            H = (train["x"].T * (p * (1 - p))) @ train["x"] / n
            H = H + np.exp(a) * np.eye(d)
            w = w - np.linalg.solve(H, g)
        assert np.linalg.norm(g) < 1e-14
        p = 1 / (1 + np.exp(val["y"] * (val["x"] @ w)))
        return H, w, np.linalg.solve(H, -val["x"].T @ (val["y"] * p) / n)

    def exact(a):
        _, w, v = solve(a)
        gradient = -np.exp(np.asarray(a)) * w * v
        return gradient.sum() if kind == "scalar" else gradient

    return ReferenceProblem(
        hg.Bilevel(logistic_inner, logistic_outer, train, val),
        jnp.zeros(d),
        alpha,
        lambda a: jnp.array(exact(a)),
        lambda a: jnp.array(solve(a)[1]),
        solve(alpha)[0],
    )  # fmt: skip


# SMD1-5 of Sinha, Malo & Deb 2014: phi(x) = |a|^2 + |b|^2, so the hypergradient is 2x.
# x = (a, b) with 2 + 2 numbers, w = (c, d) with 3 + 2; F = |a|^2 + |b|^2 + terms.


def _rosenbrock(c):
    return jnp.sum((c[1:] - c[:-1] ** 2) ** 2 + (c[:-1] - 1) ** 2)


def _ripples(c):
    return c.size + jnp.sum(c**2 - jnp.cos(2 * jnp.pi * c))


_SQUARE = lambda c: jnp.sum(c**2)
# First term of f, first term of F, their sign in F, and the residual of the last term.
_SMD = {
    1: (_SQUARE, _SQUARE, 1, lambda b, d: b - jnp.tan(d)),
    2: (_SQUARE, _SQUARE, -1, lambda b, d: b - jnp.log(d)),
    3: (_ripples, _SQUARE, 1, lambda b, d: b**2 - jnp.tan(d)),
    4: (_ripples, _SQUARE, -1, lambda b, d: jnp.abs(b) - jnp.log(1 + d)),
    5: (_rosenbrock, _rosenbrock, -1, lambda b, d: jnp.abs(b) - d**2),
}
# x_l2 as a function of b, and its derivative.
_SMD_SOLUTIONS = {
    1: (np.arctan, lambda b: 1 / (1 + b**2)),
    2: (np.exp, np.exp),
    3: (lambda b: np.arctan(b**2), lambda b: 2 * b / (1 + b**4)),
    4: (lambda b: np.expm1(np.abs(b)), lambda b: np.sign(b) * np.exp(np.abs(b))),
    5: (lambda b: np.sqrt(np.abs(b)), lambda b: 0.5 * np.sign(b) / np.abs(b) ** 0.5),
}


def smd(number: int, tilt: float = 0.0, seed: int = 0) -> ReferenceProblem:
    """Returns SMD1-5, starting near the lower optimum and off the kinks at b = 0.

    Their outer loss is flat in ``w`` at the lower optimum, so that the hypergradient is
    the direct term alone; ``tilt`` times the sum of ``w``, added to the outer loss,
    makes the adjoint matter.
    """
    rng = np.random.default_rng(seed)
    lower, upper, sign, residual = _SMD[number]

    def inner(w, alpha, batch):
        terms = lower(w["c"]) + jnp.sum(residual(alpha["b"], w["d"]) ** 2)
        return jnp.sum(alpha["a"] ** 2) + terms

    def outer(w, alpha, batch):
        terms = upper(w["c"]) + jnp.sum(residual(alpha["b"], w["d"]) ** 2)
        return jnp.sum(flat(alpha) ** 2) + sign * terms + tilt * jnp.sum(flat(w))

    def solution(alpha):
        c = np.ones(3) if number == 5 else np.zeros(3)
        return {
            "c": jnp.array(c),
            "d": jnp.array(_SMD_SOLUTIONS[number][0](alpha["b"])),
        }

    def exact(alpha):
        derivative = jnp.array(_SMD_SOLUTIONS[number][1](np.asarray(alpha["b"])))
        return {"a": 2 * alpha["a"], "b": 2 * alpha["b"] + tilt * derivative}

    b = rng.uniform(0.3, 1.2, size=2) * np.array([1, -1])
    alpha = {"a": jnp.array(rng.normal(size=2)), "b": jnp.array(b)}
    w = jax.tree.map(lambda x: x + 0.05 * rng.random(x.shape), solution(alpha))
    problem = hg.Bilevel(inner, outer)
    hessian = dense(problem, w, alpha)["H"]
    return ReferenceProblem(problem, w, alpha, exact, solution, hessian)


# A tanh network, 3-4-1: L = mean(r^2)/2 + sum(e^l w^2)/2, M = mean(r^2)/2 elsewhere.


def mlp_outer(w, alpha, batch):
    hidden = jnp.tanh(batch["x"] @ w["in"] + w["bias"][None])
    return 0.5 * jnp.mean((hidden @ w["out"] - batch["y"]) ** 2)


def mlp_inner(w, alpha, batch):
    if isinstance(alpha, dict):
        squares = [jnp.exp(alpha[name]) * jnp.sum(w[name] ** 2) for name in w]
        return mlp_outer(w, None, batch) + 0.5 * sum(squares)
    return mlp_outer(w, None, batch) + 0.5 * jnp.exp(alpha) * jnp.sum(flat(w) ** 2)


def mlp(kind: str = "scalar", seed: int = 0, n: int = 40) -> ReferenceProblem:
    """Returns a small network with one log-penalty ("scalar") or one a layer ("tree").

    It starts near a minimum that BFGS finds from random weights. A network has many
    minima; the penalty makes this one strict.
    """
    rng, x, _ = _linear_data(seed, n, 3)
    y = np.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] + 0.1 * rng.normal(size=2 * n)
    train, val = {"x": x[:n], "y": y[:n]}, {"x": x[n:], "y": y[n:]}
    problem = hg.Bilevel(mlp_inner, mlp_outer, train, val)
    normal = lambda *shape: jnp.array(rng.normal(size=shape))
    w = {"in": normal(3, 4), "bias": normal(4), "out": normal(4)}
    alpha = {name: jnp.array(rng.uniform(-4, -3)) for name in w}
    if kind == "scalar":
        alpha = alpha["in"]
    init_w, unravel = ravel_pytree(w)
    loss = lambda w: mlp_inner(unravel(w), alpha, problem.inner_data)
    value_and_grad = jax.jit(jax.value_and_grad(loss))
    options = {"gtol": 1e-8}
    result = scipy.optimize.minimize(value_and_grad, init_w, jac=True, options=options)
    matrices = dense(problem, unravel(jnp.array(result.x)), alpha)
    assert np.linalg.eigvalsh(matrices["H"])[0] > 0
    solution = matrices["w"]
    w = jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape), solution)
    return ReferenceProblem(
        problem, w, alpha, lambda a: dense(problem, solution, a)["hypergradient"],
        lambda a: dense(problem, solution, a)["w"], matrices["H"],
    )  # fmt: skip


# The logistic problem of Grazzi et al. 2020 (hypertorch's notebook).


def hypertorch_outer(w, alpha, batch):
    logits = batch["x"] @ w
    return jnp.mean(jax.nn.softplus(logits) - batch["y"] * logits)


def hypertorch_inner(w, alpha, batch):
    return hypertorch_outer(w, alpha, batch) + 0.5 * jnp.sum(alpha * w**2)


def hypertorch() -> ReferenceProblem:
    """Returns the problem: 1000 points in 20 dimensions, a penalty of 1 per weight."""
    rng = np.random.RandomState(1)  # as published
    true_w, x = rng.randn(20), rng.randn(1000, 20)
    y = (x @ true_w + 0.1 * rng.randn(1000) > 0).astype(float)
    order = rng.permutation(1000)
    val, train = ({"x": x[i], "y": y[i]} for i in (order[:500], order[500:]))
    problem = hg.Bilevel(hypertorch_inner, hypertorch_outer, train, val)
    w, alpha = jnp.zeros(20), jnp.ones(20)
    matrices = dense(problem, w, alpha)
    return ReferenceProblem(
        problem, w, alpha, lambda a: dense(problem, w, a)["hypergradient"],
        lambda a: dense(problem, w, a)["w"], matrices["H"],
    )  # fmt: skip


def two_losses(reference: ReferenceProblem, second: Callable) -> hg.Bilevel:
    """Returns the problem with a second outer loss besides its own."""
    problem = reference.problem
    losses: Any = (problem.outer_loss, second)
    return hg.Bilevel(
        problem.inner_loss, losses, problem.inner_data, problem.outer_data
    )


@functools.cache
def get_reference(name: str) -> ReferenceProblem:
    """Returns a problem by its name, such as "ridge scalar" or "smd 3 tilted"."""
    family, _, kind = name.partition(" ")
    if family == "smd":
        number, _, tilted = kind.partition(" ")
        return smd(int(number), 1.0 if tilted else 0.0)
    families = {"ridge": ridge, "logistic": logistic, "quadratic": quadratic}
    return (families | {"mlp": mlp})[family](kind)
