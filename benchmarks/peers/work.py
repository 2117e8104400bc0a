"""The works of the table `peer_speed`, in NumPy: data, initial values and results.

Every peer's environment imports this module, so that it imports NumPy alone.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Data = dict[str, Any]  # arrays of float32 and int32, numbers, lists of arrays

STEPS, RATE, MOMENTUM, PENALTY = 500, 0.5, 0.9, 1e-2  # of logistic regression
PRODUCTS = 20
WAYS, SHOTS, QUERIES, CHANNELS = 5, 5, 15, 64  # of a few-shot task


def logistic(
    examples: int = 10_000,
    features: int = 500,
    losses: int = 1,
    seed: int = 0,
    validation: int | None = None,
    steps: int = STEPS,
    products: int = PRODUCTS,
) -> Data:
    """Returns logistic regression with one log-penalty per feature.

    The inner loss is mean(softplus(-y x.w)) + 0.5 sum(exp(alpha) w^2), and the outer
    loss mean(softplus(-y x.w)) over ``validation`` examples, by default as many.
    The inner run makes ``steps`` steps of gradient descent from 0 with heavy-ball
    momentum: v <- momentum v + gradient, w <- w - rate v.

    Returns:
      ``x`` and ``x_val`` (examples, features); ``y`` and ``y_val``, 1 or -1; ``alpha``
      (features,); ``w``, the minimizer of the inner loss, for the works that solve the
      adjoint system alone; and numbers. With several losses ``y_val`` has a row each.
    """
    rng = np.random.default_rng(seed)
    x, x_val = (
        rng.standard_normal((number, features)).astype(np.float32)
        for number in (examples, validation or examples)
    )
    true = rng.standard_normal(features) * (rng.random(features) < 0.3)
    label = lambda x: np.where(
        x @ true + rng.logistic(size=len(x)) > 0, 1.0, -1.0
    ).astype(np.float32)
    y, y_val = label(x), np.stack([label(x_val) for _ in range(losses)])
    alpha = np.full(features, np.log(PENALTY), np.float32)
    return {
        "x": x,
        "y": y,
        "x_val": x_val,
        "y_val": y_val[0] if losses == 1 else y_val,
        "alpha": alpha,
        "w": newton(x, y, alpha).astype(np.float32),
        "steps": steps,
        "rate": RATE,
        "momentum": MOMENTUM,
        "products": products,
    }


def newton(x: np.ndarray, y: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Returns the minimizer of the inner loss of `logistic`, in float64."""
    x, y, penalty = x.astype(float), y.astype(float), np.exp(alpha.astype(float))
    w = np.zeros(x.shape[1])
    for _ in range(30):
        p = 1 / (1 + np.exp(y * (x @ w)))
        gradient = -x.T @ (y * p) / len(x) + penalty * w
        hessian = (x.T * (p * (1 - p))) @ x / len(x) + np.diag(penalty)
        w = w - np.linalg.solve(hessian, gradient)
    return w


def cleaning(examples: int = 5_000, hidden: int = 300) -> Data:
    """Returns hyper-cleaning: a 784-hidden-10 ReLU network, one weight per example.

    The inner loss is mean(sigmoid(alpha) * cross-entropy) + 0.5 * penalty * sum(w^2)
    over all parameters, and the outer loss is the mean cross-entropy over as many
    validation examples. The inner run is that of `logistic`, on the full batch. An
    implicit result is computed at the end of this run (`trained_cleaning`), by
    ``products`` steps of conjugate gradients from 0 on the Hessian.

    Returns:
      ``x``, ``x_val``, ``y``, ``y_val`` (40% of ``y`` are random), ``alpha``
      (examples,), ``init`` as ``[W1 (784, hidden), b1, W2 (hidden, 10), b2]``, and
      numbers.
    """
    rng = np.random.default_rng(0)
    centres = rng.random((10, 784)) * (rng.random((10, 784)) < 0.2)
    y, y_val = rng.integers(10, size=(2, examples)).astype(np.int32)
    image = lambda y: np.clip(
        centres[y] + 0.3 * rng.standard_normal((len(y), 784)), 0, 1
    ).astype(np.float32)
    x, x_val = image(y), image(y_val)
    noisy = rng.random(examples) < 0.4
    y = np.where(noisy, rng.integers(10, size=examples), y).astype(np.int32)
    return {
        "x": x,
        "y": y,
        "x_val": x_val,
        "y_val": y_val,
        "alpha": np.zeros(examples, np.float32),
        "init": layers(rng, [784, hidden, 10]),
        "penalty": 1e-3,
        "steps": 100,
        "rate": 0.1,
        "momentum": MOMENTUM,
        "products": 10,
    }


def layers(rng: np.random.Generator, sizes: list[int]) -> list[np.ndarray]:
    """Returns weights of scale sqrt(2 / inputs), each followed by biases of 0."""
    parameters = []
    for inputs, outputs in itertools.pairwise(sizes):
        weights = rng.standard_normal((inputs, outputs)) * np.sqrt(2 / inputs)
        parameters += [weights.astype(np.float32), np.zeros(outputs, np.float32)]
    return parameters


def schedule(steps: int = 1_000, hidden: int = 128, batches: int = 100) -> Data:
    """Returns a long inner run: a 784-hidden-10 tanh network on batches of 128.

    The hyperparameters are ``alpha = [log rate, log p1, log p2]``. Step t uses batch t
    modulo ``batches``. Its loss is the mean cross-entropy + 0.5 (exp(log p1) sum(W1^2)
    + exp(log p2) sum(W2^2)), and its update that of `logistic` with the rate exp(log
    rate). The outer loss is the mean cross-entropy over the validation examples. All is
    smooth, so that float32 stays close to float64 over many steps.

    Returns:
      ``x`` (batches, 128, 784), ``y`` (batches, 128), 1,000 validation examples,
      ``alpha`` (3,), ``init`` as in `cleaning`, and numbers.
    """
    rng = np.random.default_rng(0)
    examples = cleaning(batches * 128, hidden)
    return {
        "x": examples["x"].reshape(batches, 128, 784),
        "y": examples["y"].reshape(batches, 128),
        "x_val": examples["x_val"][:1_000],
        "y_val": examples["y_val"][:1_000],
        "alpha": np.log([0.02, 1e-3, 1e-3]).astype(np.float32),
        "init": layers(rng, [784, hidden, 10]),
        "steps": steps,
        "momentum": MOMENTUM,
    }


def few_shot(tasks: int = 16, channels: int = CHANNELS) -> Data:
    """Returns MAML: the gradient of the mean query loss at the initial parameters.

    The network consists of four blocks (3x3 convolution without bias, same padding;
    batch norm by the mean and variance over examples and pixels, eps 1e-5, with scale
    and shift; ReLU; 2x2 max-pool that drops odd edges) and a linear layer. Each task
    makes ``steps`` steps of gradient descent on its support examples.

    Returns:
      ``x`` (tasks, 25, 28, 28, 1), ``y``, ``x_val`` (tasks, 75, 28, 28, 1), ``y_val``,
      ``init`` as four times ``kernel (3, 3, in, out), scale (out,), shift (out,)``,
      then ``weights (channels, 5), biases (5,)``, which is the order of the result; and
      numbers.
    """
    rng = np.random.default_rng(0)
    image = lambda number: rng.random((tasks, number, 28, 28, 1)).astype(np.float32)
    labels = lambda number: np.tile(
        np.repeat(np.arange(WAYS, dtype=np.int32), number), (tasks, 1)
    )
    init = []
    for inputs in (1, channels, channels, channels):
        kernel = rng.standard_normal((3, 3, inputs, channels)) / np.sqrt(9 * inputs)
        init += [
            kernel.astype(np.float32),
            np.ones(channels, np.float32),
            np.zeros(channels, np.float32),
        ]
    return {
        "x": image(WAYS * SHOTS),
        "y": labels(SHOTS),
        "x_val": image(WAYS * QUERIES),
        "y_val": labels(QUERIES),
        "init": init + layers(rng, [channels, WAYS]),
        "steps": 5,
        "rate": 0.01,
    }


def final_parameters(data: Data) -> list[np.ndarray]:
    """Returns the parameters after the inner run of `cleaning`, in float64."""
    x = data["x"].astype(float)
    targets = np.eye(10)[data["y"]]
    weights = 1 / (1 + np.exp(-data["alpha"].astype(float)))[:, None] / len(x)
    w = [leaf.astype(float) for leaf in data["init"]]
    velocity = [np.zeros_like(leaf) for leaf in w]
    for _ in range(data["steps"]):
        hidden = np.maximum(x @ w[0] + w[1], 0)
        scores = hidden @ w[2] + w[3]
        exp_scores = np.exp(scores - scores.max(1, keepdims=True))
        probabilities = exp_scores / exp_scores.sum(1, keepdims=True)
        score_grad = weights * (probabilities - targets)
        hidden_grad = (score_grad @ w[2].T) * (hidden > 0)
        gradient = [
            x.T @ hidden_grad,
            hidden_grad.sum(0),
            hidden.T @ score_grad,
            score_grad.sum(0),
        ]
        for leaf, v, g in zip(w, velocity, gradient, strict=True):
            v *= data["momentum"]
            v += g + data["penalty"] * leaf
            leaf -= data["rate"] * v
    return w


def trained_cleaning(products: int = 10, **sizes: int) -> Data:
    """Returns `cleaning` with ``w`` after its inner run, and the number of products."""
    data = cleaning(**sizes)
    w = [leaf.astype(np.float32) for leaf in final_parameters(data)]
    return data | {"w": w, "products": products}


class Work(NamedTuple):
    """A computation, whose result is dM/dalpha unless its text states another.

    Attributes:
      text: Description of the computation.
      data: Function that returns the data.
      small: The same at the size of tests.
      error: Maximum relative error against float64; a larger one is a wrong result.
    """

    text: str
    data: Callable[[], Data]
    small: Callable[[], Data]
    error: float


def data_functions(
    make: Callable[..., Data], small: dict[str, int], **full: int
) -> tuple:
    """Returns the fields ``data`` and ``small`` of a `Work`."""
    return functools.partial(make, **full), functools.partial(make, **small)


LOGISTIC = data_functions(logistic, {"examples": 40, "features": 6})
EIGHT = data_functions(logistic, {"examples": 40, "features": 6, "losses": 8}, losses=8)
TRAINING = data_functions(
    logistic, {"examples": 40, "features": 6}, examples=600, validation=2_000,
    steps=300, products=30,
)  # fmt: skip
TINY = data_functions(
    logistic, {"examples": 40, "features": 6}, examples=32, features=8
)
IMAGES = {"examples": 30, "hidden": 8}
CLEANING = data_functions(cleaning, IMAGES)
# At the small size float32 differs from float64 by 3% after 10 products on the
# indefinite Hessian, and by 3e-5 after 5.
TRAINED_CLEANING = data_functions(trained_cleaning, IMAGES | {"products": 5})
SMALL_SCHEDULE = {"steps": 20, "hidden": 4, "batches": 3}
SCHEDULE = data_functions(schedule, SMALL_SCHEDULE)
LONG_SCHEDULE = data_functions(schedule, SMALL_SCHEDULE, steps=10_000)
TASKS = data_functions(few_shot, {"tasks": 2, "channels": 4})

WORKS = {
    "w1-unrolled": Work("reverse through 500 steps", *LOGISTIC, 1e-4),
    "w1-forward": Work("forward, one derivative: along ones", *LOGISTIC, 1e-4),
    "w1-solve": Work("implicit at the given w, 20 CG products", *LOGISTIC, 1e-3),
    "w1-whole": Work("implicit from 0; error to the exact one", *LOGISTIC, 1e-4),
    "w2-unrolled": Work("reverse through 100 steps", *CLEANING, 1e-2),
    "w2-lowmem": Work("the same in little memory", *CLEANING, 1e-2),
    "w2-implicit": Work(
        "implicit at the given w, 10 CG products", *TRAINED_CLEANING, 1e-2
    ),
    "w2-indefinite": Work("w2-implicit at the initialisation", *CLEANING, np.inf),
    "w3-1000": Work("reverse through 1,000 steps", *SCHEDULE, 1e-3),
    "w3-forward": Work("forward through 1,000 steps", *SCHEDULE, 1e-3),
    "w4": Work("MAML, dM/dinit", *TASKS, 5e-2),
    "overhead": Work("w1-unrolled, 32 examples, 8 features", *TINY, 1e-4),
    "overhead-solve": Work("w1-solve, 32 examples, 8 features", *TINY, 1e-3),
    "dispatch": Work("overhead-solve by a ready hypergradient", *TINY, 1e-3),
    "eight": Work("w1-solve for 8 validation losses", *EIGHT, 1e-3),
    "w6": Work("implicit after 300 steps, 30 CG products", *TRAINING, 1e-3),
    "compile": Work("overhead, compiled anew at every call", *TINY, 1e-4),
    "w3-10000": Work(
        "reverse through 10,000 steps", *LONG_SCHEDULE, 1e-3
    ),  # the longest last
}
