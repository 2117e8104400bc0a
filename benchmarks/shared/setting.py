"""A known problem ready to be solved, and how errors grow on it; needs x64."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import hypergrad as hg

from .known import Known, dense, flat


@dataclass(frozen=True)
class Setting:
    """A problem, what is known of it, and solvers that converge on it.

    exact: its hypergradient as a matrix [K, N], for K losses and N numbers in alpha.
    best: ``dense`` at the stationary point.
    amplification: relative error of the hypergradient a relative error of the adjoint.
    condition: relative error of the hypergradient a residual of the solves.
    """

    problem: hg.Bilevel
    w: Any
    alpha: Any
    exact: np.ndarray
    truth: str
    best: dict
    smallest: float
    largest: float
    amplification: float
    condition: float

    @property
    def step(self) -> float:
        """With which gradient descent contracts fastest."""
        return 2 / (self.smallest + self.largest)

    @property
    def contraction(self) -> float:
        return (self.largest - self.smallest) / (self.largest + self.smallest)

    @property
    def steps(self) -> int:
        """Of gradient descent, until what is left is a rounding error."""
        return self.steps_to(1e-15)

    def steps_to(self, left: float) -> int:
        return count_to(self.contraction, left)

    @property
    def descent(self) -> hg.Descent:
        return hg.Descent(sgd(self.step), self.steps)

    @property
    def momentum(self) -> tuple[float, float, int]:
        """Rate, momentum and steps of heavy ball: contracts by ``sqrt(momentum)``.

        With rate ``1 / largest`` where ``sqrt(momentum) >= 1 - sqrt(rate smallest)``.
        """
        root = max(0.5, 1 - math.sqrt(self.smallest / self.largest))
        return 1 / self.largest, root**2, math.ceil(math.log(1e-15) / math.log(root))


def count_to(contraction: float, left: float) -> int:
    """Factors of ``contraction`` that make ``left``."""
    if contraction == 0:
        return 2
    return math.ceil(math.log(left) / math.log(contraction))


@functools.cache
def sgd(step: float) -> optax.GradientTransformation:
    """One object a step size, since optax compares by identity."""
    return optax.sgd(step)


def describe(known: Known, formula: bool) -> Setting:
    """In float64 NumPy arrays; the truth is its formula, or a dense solve."""
    at = dense(known.problem, known.best(known.alpha), known.alpha)
    exact = known.exact(known.alpha) if formula else at["hypergradient"]
    ends = np.linalg.eigvalsh(at["H"])[[0, -1]]
    amplification, condition = sensitivity(known, at)
    return Setting(
        *jax.tree.map(np.asarray, (known.problem, known.w, known.alpha)),
        exact=as_rows(exact, len(at["direct"])),
        truth="closed form" if formula else "dense solve at Newton's point",
        best=at,
        smallest=float(ends[0]),
        largest=float(ends[1]),
        amplification=amplification,
        condition=condition,
    )


def as_rows(tree: Any, count: int) -> np.ndarray:
    """``[count, N]``: leaves side by side, which lead with count (or are for one)."""
    flat = lambda leaf: np.reshape(np.asarray(leaf, float), (count, -1))
    return np.concatenate(list(map(flat, jax.tree.leaves(tree))), axis=1)


def sensitivity(known: Known, at: dict) -> tuple[float, float]:
    """How errors become errors of the hypergradient ``h = direct - J'v``, relative.

    An adjoint that is off by ``e ||v||`` costs at most ``||J|| ||v|| e / ||h||``, the
    amplification. Solves that leave relative residuals ``r`` are off by
    ``r kappa ||v||`` in v, and by ``r max(1, ||g0||) / smallest`` in w, which ``dh/dw``
    turns into an error of h: together ``condition r``. The worst of several losses.
    """
    problem, alpha = known.problem, known.alpha
    w, unravel = ravel_pytree(at["w"])
    a, unravel_alpha = ravel_pytree(alpha)
    losses = problem.outer_loss
    losses = losses if isinstance(losses, tuple) else (losses,)
    inner = lambda w, a: problem.inner_loss(
        unravel(w), unravel_alpha(a), problem.inner_data
    )
    slope = jax.grad(inner)
    least, most = np.linalg.eigvalsh(at["H"])[[0, -1]]

    @functools.partial(jax.jit, static_argnums=1)
    def parts(w, loss):
        outer = lambda w, a: loss(unravel(w), unravel_alpha(a), problem.outer_data)

        def h(w):
            b, direct = jax.grad(outer, argnums=(0, 1))(w, a)
            v = jnp.linalg.solve(jax.jacfwd(slope)(w, a), b)
            return direct - v @ jax.jacfwd(slope, argnums=1)(w, a), v

        along, _ = jax.jacfwd(h)(w)
        return *h(w), along, slope(flat(known.w), a)

    amplification, condition = [], []
    for loss in losses:
        h, v, along, first = map(np.asarray, parts(w, loss))
        size, length = np.linalg.norm(h), max(1.0, np.linalg.norm(first))
        amplified = np.linalg.norm(at["J"], 2) * np.linalg.norm(v) / size
        moved = np.linalg.norm(along, 2) * length / least / size
        amplification.append(amplified)
        condition.append(amplified * most / least + moved)
    return float(max(amplification)), float(max(condition))
