"""Reference problems with solvers that converge on them, and the growth of errors."""

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

from .reference_problems import ReferenceProblem, dense, flat


@dataclass(frozen=True)
class ProblemSetup:
    """A problem in NumPy arrays with exact values and solvers that converge on it.

    Attributes:
      problem, w, alpha: The problem and its initial values.
      exact: Its hypergradient as a matrix [K, N], for K losses and N numbers in alpha.
      truth: How ``exact`` was computed, in words.
      matrices: The result of `dense` at the stationary point.
      eig_min, eig_max: Extreme eigenvalues of the inner Hessian.
      amplification: Relative error of the hypergradient per relative error of the
        adjoint.
      condition: Relative error of the hypergradient per relative residual of the
        solves.
    """

    problem: hg.Bilevel
    w: Any
    alpha: Any
    exact: np.ndarray
    truth: str
    matrices: dict
    eig_min: float
    eig_max: float
    amplification: float
    condition: float

    @property
    def step(self) -> float:
        """Step size with which gradient descent contracts fastest."""
        return 2 / (self.eig_min + self.eig_max)

    @property
    def contraction(self) -> float:
        """Factor by which a step of that size reduces the error."""
        return (self.eig_max - self.eig_min) / (self.eig_max + self.eig_min)

    @property
    def steps(self) -> int:
        """Number of steps of gradient descent until the error is one of rounding."""
        return self.steps_to(1e-15)

    def steps_to(self, fraction: float) -> int:
        """Returns the number of steps that reduce the error to a fraction."""
        return count_to(self.contraction, fraction)

    @property
    def descent(self) -> hg.Descent:
        """Gradient descent with `steps` steps of size `step`."""
        return hg.Descent(optax.sgd(self.step), self.steps)

    @property
    def momentum(self) -> tuple[float, float, int]:
        """Rate, momentum and number of steps of the heavy-ball method.

        It contracts by ``sqrt(momentum)`` with rate ``1 / eig_max`` where
        ``sqrt(momentum) >= 1 - sqrt(rate eig_min)``.
        """
        root = max(0.5, 1 - math.sqrt(self.eig_min / self.eig_max))
        return 1 / self.eig_max, root**2, math.ceil(math.log(1e-15) / math.log(root))


def count_to(contraction: float, fraction: float) -> int:
    """Returns how many factors of ``contraction`` make at most ``fraction``."""
    if contraction == 0:
        return 2
    return math.ceil(math.log(fraction) / math.log(contraction))


def make_setup(reference: ReferenceProblem, formula: bool) -> ProblemSetup:
    """Returns the setup of a problem, in float64 NumPy arrays; needs x64.

    Args:
      reference: The problem.
      formula: Whether the exact hypergradient is that of the formula; else it is the
        one of a dense solve.
    """
    matrices = dense(
        reference.problem, reference.solution(reference.alpha), reference.alpha
    )
    exact = reference.exact(reference.alpha) if formula else matrices["hypergradient"]
    eigenvalues = np.linalg.eigvalsh(matrices["H"])[[0, -1]]
    amplification, condition = sensitivity(reference, matrices)
    return ProblemSetup(
        *jax.tree.map(np.asarray, (reference.problem, reference.w, reference.alpha)),
        exact=as_rows(exact, len(matrices["direct"])),
        truth="closed form" if formula else "dense solve at Newton's point",
        matrices=matrices,
        eig_min=float(eigenvalues[0]),
        eig_max=float(eigenvalues[1]),
        amplification=amplification,
        condition=condition,
    )


def as_rows(tree: Any, count: int) -> np.ndarray:
    """Returns leaves that lead with an axis of size count as a matrix [count, N]."""
    to_matrix = lambda leaf: np.reshape(np.asarray(leaf, float), (count, -1))
    return np.concatenate(list(map(to_matrix, jax.tree.leaves(tree))), axis=1)


def sensitivity(reference: ReferenceProblem, matrices: dict) -> tuple[float, float]:
    """Returns amplification and condition: how errors become errors of ``h``.

    The hypergradient is ``h = direct - J'v``. An adjoint that is off by ``e ||v||``
    costs at most ``||J|| ||v|| e / ||h||``: the amplification. Solves that leave
    relative residuals ``r`` are off by ``r kappa ||v||`` in v, and by
    ``r max(1, ||g0||) / eig_min`` in w, which ``dh/dw`` turns into an error of h;
    together that is ``condition r``. With several losses the largest values count.
    """
    problem, alpha = reference.problem, reference.alpha
    w, unravel = ravel_pytree(matrices["w"])
    a, unravel_alpha = ravel_pytree(alpha)
    losses = problem.outer_loss
    losses = losses if isinstance(losses, tuple) else (losses,)
    inner = lambda w, a: problem.inner_loss(
        unravel(w), unravel_alpha(a), problem.inner_data
    )
    inner_grad = jax.grad(inner)
    eig_min, eig_max = np.linalg.eigvalsh(matrices["H"])[[0, -1]]

    @functools.partial(jax.jit, static_argnums=1)
    def derivatives(w, loss):
        outer = lambda w, a: loss(unravel(w), unravel_alpha(a), problem.outer_data)

        def h(w):
            b, direct = jax.grad(outer, argnums=(0, 1))(w, a)
            v = jnp.linalg.solve(jax.jacfwd(inner_grad)(w, a), b)
            return direct - v @ jax.jacfwd(inner_grad, argnums=1)(w, a), v

        dh_dw, _ = jax.jacfwd(h)(w)
        return *h(w), dh_dw, inner_grad(flat(reference.w), a)

    amplification, condition = [], []
    for loss in losses:
        h, v, dh_dw, init_grad = map(np.asarray, derivatives(w, loss))
        h_norm, length = np.linalg.norm(h), max(1.0, np.linalg.norm(init_grad))
        amplified = np.linalg.norm(matrices["J"], 2) * np.linalg.norm(v) / h_norm
        w_term = np.linalg.norm(dh_dw, 2) * length / eig_min / h_norm
        amplification.append(amplified)
        condition.append(amplified * eig_max / eig_min + w_term)
    return float(max(amplification)), float(max(condition))
