"""Conformance: what every estimator must do, checked on problems with known answers."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from .estimators.base import STATS, Estimate, Estimator, get_target
from .hypergradient import hypergradient
from .minimize import minimize
from .problem import Bilevel

SMALLEST, LARGEST = 0.5, 1.5
STEPS = 300  # after which a single loop at one alpha has settled


def quadratic(key: Array, structure: str) -> tuple[Bilevel, PyTree, PyTree, PyTree]:
    """A quadratic problem with spectrum in [1/2, 3/2] and its exact hypergradient.

    ``L = w'H w/2 - w'(C alpha)`` and ``M = |w - t|^2/2 + |alpha|^2/2``, so that
    ``w* = H^-1 C alpha`` and ``dM/dalpha = alpha + C'H^-1 (w* - t)``, here by a dense
    solve.

    Args:
      key: of the random problem.
      structure: of ``w``: 'scalar' (0-d), 'vector' (8) or 'tree' (nested dicts and a
        list, 9 numbers). ``alpha`` has as many numbers.

    Returns:
      ``(problem, w, alpha, hypergradient)``.
    """
    shapes = {
        "scalar": jnp.zeros(()),
        "vector": jnp.zeros(8),
        "tree": {"a": [jnp.zeros((2, 3)), jnp.zeros(())], "b": {"c": jnp.zeros(2)}},
    }
    if structure not in shapes:
        raise ValueError(
            f"structure must be one of {sorted(shapes)}; got {structure!r}"
        )
    w, unravel = ravel_pytree(shapes[structure])
    size = w.size
    keys = jax.random.split(key, 4)
    basis, _ = jnp.linalg.qr(jax.random.normal(keys[0], (size, size)))
    spectrum = jnp.linspace(SMALLEST, LARGEST, size)
    hessian = basis @ jnp.diag(spectrum) @ basis.T
    coupling, _ = jnp.linalg.qr(jax.random.normal(keys[1], (size, size)))
    target, alpha = jax.random.normal(keys[2], (2, size))
    data = {"H": hessian, "C": coupling, "t": target}
    flat = lambda tree: ravel_pytree(tree)[0]

    def inner_loss(w, alpha, batch):
        w, alpha = flat(w), flat(alpha)
        return 0.5 * w @ (batch["H"] @ w) - w @ (batch["C"] @ alpha)

    def outer_loss(w, alpha, batch):
        w, alpha = flat(w), flat(alpha)
        return 0.5 * jnp.sum((w - batch["t"]) ** 2) + 0.5 * jnp.sum(alpha**2)

    best = jnp.linalg.solve(hessian, coupling @ alpha)
    exact = alpha + coupling.T @ jnp.linalg.solve(hessian, best - target)
    problem = Bilevel(inner_loss, outer_loss, data, data)
    return problem, unravel(w), unravel(alpha), unravel(exact)


class Settled(eqx.Module):
    """A single-loop estimator's last estimate of many at one ``alpha``.

    Makes a double-loop estimator of it, to be checked as one.

    >>> import optax, hypergrad as hg
    >>> hg.testing.Settled(hg.SOBA(optax.sgd(0.5)), num_steps=200).target
    'argmin'
    """

    estimator: Any
    num_steps: int = eqx.field(static=True)

    @property
    def target(self) -> str:
        """The estimator's."""
        return self.estimator.target

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """The estimator's."""
        return self.estimator.error_bound(eig_min, eig_max)

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> Any:
        """The estimator's."""
        return self.estimator.init(problem, w, alpha, key)

    def estimate(
        self, problem: Bilevel, state: Any, alpha: PyTree, key: Array
    ) -> tuple[Estimate, Any]:
        """All but the last estimate go into the state alone."""
        first, *_ = keys = jax.random.split(key, self.num_steps)
        step = lambda state, key: self.estimator.estimate(problem, state, alpha, key)
        state, _ = jax.lax.scan(lambda s, key: (step(s, key)[1], None), state, keys[1:])
        return step(state, first)


def check_estimator(estimator: Estimator) -> None:
    """Raises AssertionError unless ``estimator`` keeps the estimators' promises.

    On quadratics with spectra in [1/2, 3/2] (where 200 steps of ``optax.sgd(0.5)``
    converge) and ``w`` a scalar, a vector and a nested tree, it checks:

    - structure, shapes and dtypes of value, hypergradient and ``w``; all stats there;
    - the error against a dense solve: within rounding where ``error_bound`` says 0,
      within the declared factor of the indirect term where it declares one, and at
      least a descent direction where it declares NaN;
    - an exact estimate is trusted, a NaN in the data is not, and is seen in the value;
    - the same once more from a state that an estimate elsewhere has left;
    - equal results with and without ``jit``, under ``vmap`` and in a loop;
    - 20 steps of `minimize` lower the outer value.

    A single-loop estimator is asked after 300 steps at one ``alpha``, and need not be
    trusted.

    Args:
      estimator: with ``init``, ``estimate``, ``target`` and
        ``error_bound(smallest, largest)``, the relative error that it admits in the
        adjoint for that spectrum.

    >>> import optax, hypergrad as hg
    >>> solver = hg.Descent(optax.sgd(0.5), 200)
    >>> hg.testing.check_estimator(hg.Implicit(solver))
    """
    for name in ("init", "estimate", "error_bound"):
        _require(hasattr(estimator, name), f"an estimator needs {name}")
    target = get_target(estimator)
    _require(target in ("argmin", "solver"), f"target is {target!r}")
    alone = Settled(estimator, STEPS) if _single_loop(estimator) else estimator
    for structure in ("scalar", "vector", "tree"):
        _check_on(alone, structure)
    _check_flags(alone)
    _check_descent(estimator)


def _single_loop(estimator: Any) -> bool:
    return getattr(estimator, "is_single_loop", False)


def _require(kept: Any, what: str) -> None:
    if not kept:
        raise AssertionError(what)


def _close(found: PyTree, expected: PyTree, tolerance: float, what: str) -> None:
    flat = lambda tree: np.asarray(ravel_pytree(tree)[0])
    found, expected = flat(found), flat(expected)
    scale = max(np.linalg.norm(expected), 1e-30)
    error = np.linalg.norm(found - expected) / scale
    _require(
        error <= tolerance,
        f"{what}: relative error {error:.2e}, allowed {tolerance:.2e}",
    )


def _rounding(tree: PyTree) -> float:
    """1e-9 in float64, 1e-4 in float32."""
    return 1e-9 if jax.tree.leaves(tree)[0].dtype == jnp.float64 else 1e-4


def _check_on(estimator: Any, structure: str) -> None:
    problem, w, alpha, exact = quadratic(jax.random.key(1), structure)
    estimate = hypergradient(problem, estimator)(w, alpha)

    shape = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    _require(shape(estimate.w) == shape(w), "Estimate.w must be structured like w")
    _require(
        shape(estimate.hypergradient) == shape(alpha),
        "Estimate.hypergradient must be structured like alpha",
    )
    _require(estimate.value.shape == (), "Estimate.value must be a scalar")
    _require(
        set(STATS) | {"trusted"} <= set(estimate.stats), "Estimate.stats lacks keys"
    )

    _check_error(estimator, estimate, alpha, exact, structure)
    # The same from where an estimate elsewhere has left the state.
    state = estimator.init(problem, w, alpha, jax.random.key(0))
    twice = jax.tree.map(lambda leaf: 2 * leaf, alpha)
    _, state = estimator.estimate(problem, state, twice, jax.random.key(1))
    warm, _ = estimator.estimate(problem, state, alpha, jax.random.key(2))
    _check_error(estimator, warm, alpha, exact, f"{structure}, with a carried state")

    rounding = _rounding(alpha)
    eager = lambda w, alpha: _estimate(problem, estimator, w, alpha)
    tolerance = 10 * rounding
    expected = estimate.hypergradient
    _close(eager(w, alpha), expected, tolerance, "without jit")
    _close(jax.jit(eager)(w, alpha), expected, tolerance, "under jit")
    alphas = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), alpha)
    batched = jax.vmap(eager, in_axes=(None, 0))(w, alphas)
    for i, scale in enumerate((1, 2)):
        one = eager(w, jax.tree.map(lambda leaf, scale=scale: scale * leaf, alpha))
        found = jax.tree.map(lambda leaf, i=i: leaf[i], batched)
        _close(found, one, tolerance, "under vmap")


def _check_error(
    estimator: Any, estimate: Estimate, alpha: PyTree, exact: PyTree, structure: str
) -> None:
    factor = estimator.error_bound(SMALLEST, LARGEST)
    rounding = _rounding(alpha)
    if factor == 0:
        what = f"hypergradient on {structure}, declared exact"
        _close(estimate.hypergradient, exact, rounding, what)
        if not isinstance(estimator, Settled):
            _require(estimate.stats["trusted"], "an exact estimate must be trusted")
    elif np.isfinite(factor):
        indirect = jax.tree.map(jnp.subtract, exact, alpha)  # direct term is alpha
        found = jax.tree.map(jnp.subtract, estimate.hypergradient, alpha)
        what = f"indirect term on {structure}, declared within {factor:.2e}"
        _close(found, indirect, factor + rounding, what)
    else:
        flat = lambda tree: ravel_pytree(tree)[0]
        slope = float(flat(estimate.hypergradient) @ flat(exact))
        _require(slope > 0, f"on {structure} the estimate is no ascent direction")


def _estimate(problem: Bilevel, estimator: Any, w: PyTree, alpha: PyTree) -> PyTree:
    key = jax.random.split(jax.random.key(0))
    state = estimator.init(problem, w, alpha, key[0])
    return estimator.estimate(problem, state, alpha, key[1])[0].hypergradient


def _check_flags(estimator: Any) -> None:
    problem, w, alpha, _ = quadratic(jax.random.key(2), "vector")
    poisoned = jax.tree.map(lambda leaf: leaf.at[..., 0].set(jnp.nan), problem)
    estimate = hypergradient(poisoned, estimator)(w, alpha)
    _require(not estimate.stats["trusted"], "NaN in the data must not be trusted")
    _require(not np.isfinite(estimate.value), "NaN in the data must show in the value")


def _check_descent(estimator: Any) -> None:
    problem, w, alpha, _ = quadratic(jax.random.key(3), "vector")
    trace = minimize(
        problem, estimator, optax.sgd(0.05), w, alpha, num_steps=20,
        key=jax.random.key(0),
    )  # fmt: skip
    _require(trace.status == "completed", f"minimize stopped: {trace.status}")
    _require(trace.value[-1] < trace.value[0], "20 steps did not lower the outer value")
