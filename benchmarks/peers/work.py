"""What every contender is given, in NumPy: data, starts, and what is to be computed.

Imported in every peer's environment, so NumPy alone is imported here.
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
    """Logistic regression with one log-penalty a feature.

    inner = mean(softplus(-y x.w)) + 0.5 sum(exp(alpha) w^2), outer = the mean over as
    many validation examples, or as many as are given. Inner run: `steps` of gradient
    descent from 0 by `rate` and heavy-ball `momentum` (v <- momentum v + gradient,
    w <- w - rate v).

    Returns:
      ``x, x_val``: (examples, features); ``y, y_val``: 1 or -1; ``alpha``: (features,);
      ``w``: the minimiser of inner, for solves alone; numbers. With more `losses`
      ``y_val`` has one row each.
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
    """The minimiser of `logistic`'s inner loss, in float64."""
    x, y, penalty = x.astype(float), y.astype(float), np.exp(alpha.astype(float))
    w = np.zeros(x.shape[1])
    for _ in range(30):
        off = 1 / (1 + np.exp(y * (x @ w)))
        gradient = -x.T @ (y * off) / len(x) + penalty * w
        hessian = (x.T * (off * (1 - off))) @ x / len(x) + np.diag(penalty)
        w = w - np.linalg.solve(hessian, gradient)
    return w


def cleaning(examples: int = 5_000, hidden: int = 300) -> Data:
    """Hyper-cleaning: a 784-hidden-10 ReLU network, one weight an example.

    inner = mean(sigmoid(alpha) * cross-entropy) + 0.5 * penalty * sum(w^2) over all
    parameters, outer = mean cross-entropy over as many validation examples. Inner run:
    `steps` as in `logistic`, full batch. An implicit answer is at ``w``, where that run
    ends (`converged`), by `products` of conjugate gradients from 0 on the Hessian.

    Returns:
      ``x, x_val, y, y_val`` (40% of ``y`` drawn anew), ``alpha``: (examples,),
      ``init``: ``[W1 (784, hidden), b1, W2 (hidden, 10), b2]``, numbers.
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
    """Weights of scale sqrt(2 / inputs), biases of 0, in turns."""
    found = []
    for inputs, outputs in itertools.pairwise(sizes):
        weights = rng.standard_normal((inputs, outputs)) * np.sqrt(2 / inputs)
        found += [weights.astype(np.float32), np.zeros(outputs, np.float32)]
    return found


def schedule(steps: int = 1_000, hidden: int = 128, batches: int = 100) -> Data:
    """A long inner run: a 784-hidden-10 tanh network on batches of 128, in turn.

    Hyperparameters ``alpha = [log rate, log p1, log p2]``; step t takes batch t modulo
    `batches`; its loss is mean cross-entropy + 0.5 (exp(log p1) sum(W1^2) + exp(log p2)
    sum(W2^2)), its update the heavy ball of `logistic` with rate exp(log rate). Outer
    loss: mean cross-entropy over the validation examples. Smooth, so that float32 stays
    beside float64 over many steps.

    Returns:
      ``x``: (batches, 128, 784), ``y``: (batches, 128), ``x_val, y_val``: 1,000,
      ``alpha``: (3,), ``init`` as in `cleaning`, numbers.
    """
    rng = np.random.default_rng(0)
    given = cleaning(batches * 128, hidden)
    return {
        "x": given["x"].reshape(batches, 128, 784),
        "y": given["y"].reshape(batches, 128),
        "x_val": given["x_val"][:1_000],
        "y_val": given["y_val"][:1_000],
        "alpha": np.log([0.02, 1e-3, 1e-3]).astype(np.float32),
        "init": layers(rng, [784, hidden, 10]),
        "steps": steps,
        "momentum": MOMENTUM,
    }


def few_shot(tasks: int = 16, channels: int = CHANNELS) -> Data:
    """MAML: the gradient of the mean query loss over tasks at the initialisation.

    Network: four times (3x3 convolution without bias, same padding; batch norm by the
    batch's mean and variance over examples and places, eps 1e-5, with scale and shift;
    ReLU; 2x2 max-pool, odd edges dropped), then a linear layer. Each task takes `steps`
    of gradient descent by `rate` on its support examples from the initialisation.

    Returns:
      ``x``: (tasks, 25, 28, 28, 1), ``y``, ``x_val``: (tasks, 75, 28, 28, 1),
      ``y_val``, ``init``: four times ``kernel (3, 3, in, out), scale (out,), shift
      (out,)``, then ``weights (channels, 5), biases (5,)``; the answer is in this
      order. Numbers.
    """
    rng = np.random.default_rng(0)
    image = lambda number: rng.random((tasks, number, 28, 28, 1)).astype(np.float32)
    labels = lambda each: np.tile(
        np.repeat(np.arange(WAYS, dtype=np.int32), each), (tasks, 1)
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


def descended(given: Data) -> list[np.ndarray]:
    """Where the inner run of `cleaning` ends, in float64."""
    x = given["x"].astype(float)
    kind = np.eye(10)[given["y"]]
    share = 1 / (1 + np.exp(-given["alpha"].astype(float)))[:, None] / len(x)
    w = [part.astype(float) for part in given["init"]]
    speed = [np.zeros_like(part) for part in w]
    for _ in range(given["steps"]):
        hidden = np.maximum(x @ w[0] + w[1], 0)
        score = hidden @ w[2] + w[3]
        chance = np.exp(score - score.max(1, keepdims=True))
        off = share * (chance / chance.sum(1, keepdims=True) - kind)
        back = (off @ w[2].T) * (hidden > 0)
        slopes = [x.T @ back, back.sum(0), hidden.T @ off, off.sum(0)]
        for part, v, slope in zip(w, speed, slopes, strict=True):
            v *= given["momentum"]
            v += slope + given["penalty"] * part
            part -= given["rate"] * v
    return w


def converged(products: int = 10, **sizes: int) -> Data:
    """`cleaning` with ``w``, where its inner run ends, and so many products."""
    given = cleaning(**sizes)
    w = [part.astype(np.float32) for part in descended(given)]
    return given | {"w": w, "products": products}


class Work(NamedTuple):
    """One thing to compute; the answer is dM/dalpha unless its text says another.

    Attributes:
      text: what is computed.
      data: what contenders are given.
      small: the same of a size for tests.
      error: relative, to the same in float64, above which it is not the same work.
    """

    text: str
    data: Callable[[], Data]
    small: Callable[[], Data]
    error: float


def of(make: Callable[..., Data], small: dict[str, int], **full: int) -> tuple:
    """``(data, small)``."""
    return functools.partial(make, **full), functools.partial(make, **small)


LOGISTIC = of(logistic, {"examples": 40, "features": 6})
EIGHT = of(logistic, {"examples": 40, "features": 6, "losses": 8}, losses=8)
TRAINING = of(
    logistic, {"examples": 40, "features": 6}, examples=600, validation=2_000,
    steps=300, products=30,
)  # fmt: skip
TINY = of(logistic, {"examples": 40, "features": 6}, examples=32, features=8)
IMAGES = {"examples": 30, "hidden": 8}
CLEANING = of(cleaning, IMAGES)
# At the small size float32 is 3% away from float64 after 10 products on the indefinite
# Hessian, and 3e-5 after 5: so many are asked for.
STEADY = of(converged, IMAGES | {"products": 5})
FEW = {"steps": 20, "hidden": 4, "batches": 3}
SCHEDULE, LONG = of(schedule, FEW), of(schedule, FEW, steps=10_000)
TASKS = of(few_shot, {"tasks": 2, "channels": 4})

WORKS = {
    "w1-unrolled": Work("reverse through 500 steps", *LOGISTIC, 1e-4),
    "w1-forward": Work("forward, one derivative: along ones", *LOGISTIC, 1e-4),
    "w1-solve": Work("implicit at the given w, 20 CG products", *LOGISTIC, 1e-3),
    "w1-whole": Work("implicit from 0; error to the exact one", *LOGISTIC, 1e-4),
    "w2-unrolled": Work("reverse through 100 steps", *CLEANING, 1e-2),
    "w2-lowmem": Work("the same in little memory", *CLEANING, 1e-2),
    "w2-implicit": Work("implicit at the given w, 10 CG products", *STEADY, 1e-2),
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
    "w3-10000": Work("reverse through 10,000 steps", *LONG, 1e-3),  # the longest last
}
