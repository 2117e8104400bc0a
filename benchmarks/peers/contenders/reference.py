"""The same in float64, where JAX_ENABLE_X64 is set: what errors are measured against.

Each is `plain` on the data in float64, but `w1-whole`: there the exact implicit
hypergradient, by a dense solve at the minimiser to which Newton's method converges.
"""

from collections.abc import Callable

import jax
import numpy as np

from .. import problems
from ..work import Data, newton
from . import plain


def wide(data: Data) -> Data:
    """Numbers of float32 as float64; RuntimeError where JAX would narrow them."""
    if not jax.config.read("jax_enable_x64"):
        raise RuntimeError("the reference needs JAX_ENABLE_X64=1")

    def one(value):
        return value.astype(float) if value.dtype == np.float32 else value

    whole = lambda value: value if np.isscalar(value) else one(value)
    return {
        name: [one(part) for part in value] if isinstance(value, list) else whole(value)
        for name, value in data.items()
    }


def exact(data: Data) -> Callable[[], np.ndarray]:
    """``-exp(alpha) w (H^-1 dM/dw)`` for the log-penalty of each feature."""
    data = wide(data)
    x, x_val, y, y_val = (data[name] for name in ("x", "x_val", "y", "y_val"))
    penalty = np.exp(data["alpha"])

    def call():
        w = newton(x, y, data["alpha"])
        off = 1 / (1 + np.exp(y * (x @ w)))
        H = (x.T * (off * (1 - off))) @ x / len(x) + np.diag(penalty)
        b = -x_val.T @ (y_val / (1 + np.exp(y_val * (x_val @ w)))) / len(x_val)
        return -penalty * w * np.linalg.solve(H, b)

    return call


def several(data: Data) -> Callable[[], np.ndarray]:
    """One solve after the other."""
    calls = [plain.logistic_solve(wide(data | {"y_val": row})) for row in data["y_val"]]
    return lambda: problems.flat([call() for call in calls])


WIDE = {
    name: lambda data, prepare=prepare: prepare(wide(data))
    for name, prepare in plain.WORKS.items()
}
WORKS = WIDE | {
    "w1-whole": exact,
    "dispatch": WIDE["overhead-solve"],
    "eight": several,
}
