"""The reference results in float64, from which errors are measured.

Each is that of `plain` in float64, except *w1-whole*: this one is the exact implicit
hypergradient, by a dense solve at the minimizer that Newton's method finds.
"""

from collections.abc import Callable

import jax
import numpy as np

from .. import problems
from ..work import Data, newton
from . import plain


def as_float64(data: Data) -> Data:
    """Returns the data in float64; raises RuntimeError unless JAX has float64."""
    if not jax.config.read("jax_enable_x64"):
        raise RuntimeError("the reference needs JAX_ENABLE_X64=1")

    def convert(value):
        if isinstance(value, list):
            return [convert(leaf) for leaf in value]
        is_float32 = isinstance(value, np.ndarray) and value.dtype == np.float32
        return value.astype(float) if is_float32 else value

    return {name: convert(value) for name, value in data.items()}


def exact_hypergradient(data: Data) -> Callable[[], np.ndarray]:
    """Returns a call of ``-exp(alpha) w (H^-1 dM/dw)``, with log-penalties alpha."""
    data = as_float64(data)
    x, x_val, y, y_val = (data[name] for name in ("x", "x_val", "y", "y_val"))
    penalty = np.exp(data["alpha"])

    def call():
        w = newton(x, y, data["alpha"])
        p = 1 / (1 + np.exp(y * (x @ w)))
        H = (x.T * (p * (1 - p))) @ x / len(x) + np.diag(penalty)
        b = -x_val.T @ (y_val / (1 + np.exp(y_val * (x_val @ w)))) / len(x_val)
        return -penalty * w * np.linalg.solve(H, b)

    return call


def several_losses(data: Data) -> Callable[[], np.ndarray]:
    """Returns a call that solves for one loss after the other."""
    calls = [
        plain.logistic_solve(as_float64(data | {"y_val": row})) for row in data["y_val"]
    ]
    return lambda: problems.flatten([call() for call in calls])


PLAIN_IN_FLOAT64 = {
    name: lambda data, prepare=prepare: prepare(as_float64(data))
    for name, prepare in plain.WORKS.items()
}
WORKS = PLAIN_IN_FLOAT64 | {
    "w1-whole": exact_hypergradient,
    "dispatch": PLAIN_IN_FLOAT64["overhead-solve"],
    "eight": several_losses,
}
