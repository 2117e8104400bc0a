"""Conformance tests of estimators, on problems whose hypergradients are known."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from ..estimators.base import STATS, Estimate, Estimator, get_target
from ..hypergradient import hypergradient
from ..minimize import minimize
from ..problem import Bilevel, with_own_order

EIG_MIN, EIG_MAX = 0.5, 1.5
NUM_SINGLE_LOOP_STEPS = 300
NUM_OUTER_STEPS = 20
STRUCTURES = ("scalar", "vector", "tree")


def quadratic(key: Array, structure: str) -> tuple[Bilevel, PyTree, PyTree, PyTree]:
    """Returns a random quadratic problem with its exact hypergradient.

    The losses are ``L = w'H w / 2 - w'C alpha`` and ``M = |w - t|² / 2 + |alpha|² / 2``
    with eigenvalues of ``H`` in [1/2, 3/2] and an orthogonal ``C``, so that

        w* = H^-1 C alpha,    dM/dalpha = alpha + C' H^-1 (w* - t).

    Args:
      key: PRNG key of the problem.
      structure: Structure of ``w`` and ``alpha``: 'scalar' (0-d), 'vector' (8 numbers)
        or 'tree' (nested dictionaries and a list, 9 numbers).

    Returns:
      ``(problem, w, alpha, hypergradient)``.

    Raises:
      ValueError: ``structure`` is another word.

    >>> import jax, hypergrad as hg
    >>> problem, w, alpha, exact = hg.testing.quadratic(jax.random.key(0), "vector")
    >>> estimate = hg.hypergradient(problem, hg.Implicit(hg.Newton()))(w, alpha)
    >>> bool(jnp.allclose(estimate.hypergradient, exact, rtol=1e-3))
    True
    """
    if structure not in STRUCTURES:
        raise ValueError(
            f"structure must be one of {', '.join(STRUCTURES)}; got {structure!r}."
        )
    zeros = {
        "scalar": jnp.zeros(()),
        "vector": jnp.zeros(8),
        "tree": {"a": [jnp.zeros((2, 3)), jnp.zeros(())], "b": {"c": jnp.zeros(2)}},
    }
    w, unravel = ravel_pytree(zeros[structure])
    size = w.size
    keys = jax.random.split(key, 4)
    eigenvectors, _ = jnp.linalg.qr(jax.random.normal(keys[0], (size, size)))
    eigenvalues = jnp.linspace(EIG_MIN, EIG_MAX, size)
    H = eigenvectors @ jnp.diag(eigenvalues) @ eigenvectors.T
    C, _ = jnp.linalg.qr(jax.random.normal(keys[1], (size, size)))
    t, alpha = jax.random.normal(keys[2], (2, size))
    data = {"H": H, "C": C, "t": t}

    def inner_loss(w, alpha, batch):
        w, alpha = _ravel(w), _ravel(alpha)
        return 0.5 * w @ (batch["H"] @ w) - w @ (batch["C"] @ alpha)

    def outer_loss(w, alpha, batch):
        w, alpha = _ravel(w), _ravel(alpha)
        return 0.5 * jnp.sum((w - batch["t"]) ** 2) + 0.5 * jnp.sum(alpha**2)

    w_star = jnp.linalg.solve(H, C @ alpha)
    exact = alpha + C.T @ jnp.linalg.solve(H, w_star - t)
    problem = Bilevel(inner_loss, outer_loss, data, data)
    return problem, unravel(w), unravel(alpha), unravel(exact)


class RepeatedSteps(eqx.Module):
    """A single-loop estimator that makes many steps per estimate, at one ``alpha``.

    It can be used and checked like a double-loop estimator.

    Args:
      estimator: The single-loop estimator.
      num_steps: Number of steps per estimate, of which the last is returned.

    Cost: ``num_steps`` estimates, of which the statistics count the last.

    >>> import optax, hypergrad as hg
    >>> repeated = hg.testing.RepeatedSteps(hg.SOBA(optax.sgd(0.5)), num_steps=200)
    >>> inner = lambda w, alpha, batch: (w - alpha) ** 2
    >>> outer = lambda w, alpha, batch: w**2
    >>> estimate = hg.hypergradient(hg.Bilevel(inner, outer), repeated)(0.0, 3.0)
    >>> round(float(estimate.hypergradient), 3)
    6.0
    """

    estimator: Any
    num_steps: int = eqx.field(static=True)

    @property
    def num_samples(self) -> int:
        """Number of samples of the data, one of each step."""
        return self.num_steps

    @property
    def target(self) -> str:
        """Target of the single-loop estimator."""
        return get_target(self.estimator)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """Returns the error bound of the single-loop estimator."""
        return self.estimator.error_bound(eig_min, eig_max)

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> Any:
        """Returns the first state of the single-loop estimator."""
        return self.estimator.init(problem, w, alpha, key)

    def estimate(
        self, problem: Bilevel, state: Any, alpha: PyTree, key: Array
    ) -> tuple[Estimate, Any]:
        """Returns the estimate of the last step and the state after it."""
        keys = jax.random.split(key, self.num_steps)

        def step(state, number):
            # In shuffled passes over the data each step has an order of its own.
            return self.estimator.estimate(
                with_own_order(problem, number), state, alpha, keys[number]
            )

        numbers = jnp.arange(1, self.num_steps)
        state, _ = jax.lax.scan(lambda s, i: (step(s, i)[1], None), state, numbers)
        return step(state, 0)


def check_estimator(estimator: Estimator) -> None:
    """Raises AssertionError unless an estimator keeps what the library relies on.

    The checks use quadratic problems with eigenvalues in [1/2, 3/2], on which 200 steps
    of ``optax.sgd(0.5)`` converge, and ``w`` as a scalar, a vector and a nested tree:

    - Value, hypergradient and ``w`` have the right structures, shapes and dtypes.
    - The error against the exact hypergradient is at most rounding if ``error_bound``
      is 0. If it is another number, the error of the indirect term is within it. If it
      is NaN, the estimate is at least an ascent direction.
    - An exact estimate is trusted. An estimate on data with a NaN is not, and its value
      is not finite.
    - The error is the same from a state that an estimate at another ``alpha`` returned.
    - Results are equal under ``jit`` and ``vmap``, and for a vector without ``jit``.
    - 20 steps of `minimize` lower the outer value.

    A single-loop estimator is checked after 300 steps at one ``alpha``, as
    `RepeatedSteps`, and need not be trusted.

    Args:
      estimator: The estimator. Besides ``init`` and ``estimate`` it must have
        ``error_bound(eig_min, eig_max)``, the relative error that it admits in the
        adjoint for that spectrum; see `hypergrad.Estimator`.

    Raises:
      AssertionError: A check failed; the message states which, and by how much.

    >>> import optax, hypergrad as hg
    >>> solver = hg.Descent(optax.sgd(0.5), 200)
    >>> hg.testing.check_estimator(hg.Unrolled(solver))
    """
    for name in ("init", "estimate", "error_bound"):
        _check(hasattr(estimator, name), f"estimator must have the method {name}.")
    target = get_target(estimator)
    _check(
        target in ("argmin", "solver"),
        f"target must be 'argmin' or 'solver'; got {target!r}.",
    )
    is_single_loop = getattr(estimator, "is_single_loop", False)
    double_loop = (
        RepeatedSteps(estimator, NUM_SINGLE_LOOP_STEPS) if is_single_loop else estimator
    )
    for structure in STRUCTURES:
        problem, w, alpha, exact = quadratic(jax.random.key(1), structure)
        estimate = hypergradient(problem, double_loop)(w, alpha)
        _check_structure(estimate, w, alpha, structure)
        _check_error(double_loop, estimate, alpha, exact, structure)
        _check_exact_is_trusted(double_loop, estimate, structure)
        warm_estimate = _estimate_from_other_state(problem, double_loop, w, alpha)
        _check_error(
            double_loop, warm_estimate, alpha, exact, f"{structure} with a used state"
        )
        _check_transformations(problem, double_loop, estimate, w, alpha, structure)
    _check_nan(double_loop)
    _check_descent(estimator)


def _check(condition: Any, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _check_structure(
    estimate: Estimate, w: PyTree, alpha: PyTree, structure: str
) -> None:
    describe = lambda tree: jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree)
    for name, tree, like_name, like in (
        ("w", estimate.w, "w", w),
        ("hypergradient", estimate.hypergradient, "alpha", alpha),
    ):
        _check(
            describe(tree) == describe(like),
            f"Estimate.{name} must have the structure, shapes and dtypes of "
            f"{like_name} ({structure}), {describe(like)}; got {describe(tree)}.",
        )
    _check(
        estimate.value.shape == (),
        f"Estimate.value must be a scalar; got shape {estimate.value.shape}.",
    )
    for name in STATS:
        shape = jnp.shape(estimate.stats[name])
        _check(
            shape == (),
            f"Estimate.stats[{name!r}] must be a scalar; got shape {shape}.",
        )


def _check_error(
    estimator: Any, estimate: Estimate, alpha: PyTree, exact: PyTree, structure: str
) -> None:
    """Checks the error of a hypergradient against what ``error_bound`` declares."""
    error_bound = estimator.error_bound(EIG_MIN, EIG_MAX)
    rounding = _rounding_tolerance(alpha)
    actual, exact = _ravel(estimate.hypergradient), _ravel(exact)
    direct_term = _ravel(alpha)  # dM/dalpha of the outer loss of `quadratic`
    if error_bound == 0:
        name = f"hypergradient ({structure}), whose error_bound is 0,"
        _check_close(actual, exact, rounding, name)
    elif np.isfinite(error_bound):
        name = f"indirect term ({structure}), whose error_bound is {error_bound:.2e},"
        tolerance = error_bound + rounding
        _check_close(actual - direct_term, exact - direct_term, tolerance, name)
    else:
        norms = np.linalg.norm(actual) * np.linalg.norm(exact)
        cosine = float(actual @ exact) / max(norms, 1e-30)
        _check(
            cosine > 0,
            f"hypergradient ({structure}) must be an ascent direction of the outer "
            f"value; got a cosine of {cosine:.2f} to the exact one.",
        )


def _check_exact_is_trusted(estimator: Any, estimate: Estimate, structure: str) -> None:
    is_exact = estimator.error_bound(EIG_MIN, EIG_MAX) == 0
    if is_exact and not isinstance(estimator, RepeatedSteps):
        reasons = "; ".join(estimate.reasons)
        _check(
            estimate.trusted,
            f"an estimate ({structure}) whose error_bound is 0 must be trusted; got "
            f"trusted=False, because {reasons}.",
        )


def _estimate_from_other_state(
    problem: Bilevel, estimator: Any, w: PyTree, alpha: PyTree
) -> Estimate:
    """Returns an estimate whose state comes from an estimate at another ``alpha``."""

    @eqx.filter_jit
    def run(state, alpha, key):
        return estimator.estimate(problem, state, alpha, key)

    state = estimator.init(problem, w, alpha, jax.random.key(0))
    other_alpha = jax.tree.map(lambda leaf: 2 * leaf, alpha)
    _, state = run(state, other_alpha, jax.random.key(1))
    return run(state, alpha, jax.random.key(2))[0]


def _check_transformations(
    problem: Bilevel,
    estimator: Any,
    estimate: Estimate,
    w: PyTree,
    alpha: PyTree,
    structure: str,
) -> None:
    """Checks that results do not depend on ``jit`` and ``vmap``."""
    tolerance = 10 * _rounding_tolerance(alpha)

    def hypergradient_fn(w, alpha):
        init_key, estimate_key = jax.random.split(jax.random.key(0))
        state = estimator.init(problem, w, alpha, init_key)
        return estimator.estimate(problem, state, alpha, estimate_key)[0].hypergradient

    expected = estimate.hypergradient
    jitted = jax.jit(hypergradient_fn)
    fns: dict[str, Callable[..., Any]] = {"under": jitted}
    if structure == "vector":  # slow: each operation is compiled by itself
        fns["without"] = hypergradient_fn
    for name, fn in fns.items():
        label = f"hypergradient ({structure}) {name} jit"
        _check_close(fn(w, alpha), expected, tolerance, label)
    scales = (1, 2)
    alphas = [jax.tree.map(lambda leaf, a=a: a * leaf, alpha) for a in scales]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alphas)
    batched = jax.jit(jax.vmap(hypergradient_fn, in_axes=(None, 0)))(w, stacked)
    for i, alpha in enumerate(alphas):
        actual = jax.tree.map(lambda leaf, i=i: leaf[i], batched)
        expected = jitted(w, alpha)
        label = f"hypergradient ({structure}) under vmap"
        _check_close(actual, expected, tolerance, label)


def _check_nan(estimator: Any) -> None:
    """Checks that a NaN in the data is not hidden."""
    problem, w, alpha, _ = quadratic(jax.random.key(2), "vector")
    problem = jax.tree.map(lambda leaf: leaf.at[..., 0].set(jnp.nan), problem)
    # `hypergradient` would add a check for NaN to an estimator that has none.
    key = jax.random.key(0)
    state = estimator.init(problem, w, alpha, key)
    run = eqx.filter_jit(lambda state: estimator.estimate(problem, state, alpha, key))
    estimate, _ = run(state)
    _check(
        not estimate.trusted,
        "an estimate on data with a NaN must not be trusted; got trusted=True.",
    )
    _check(
        not np.isfinite(estimate.value),
        f"Estimate.value on data with a NaN must not be finite; got {estimate.value}.",
    )


def _check_descent(estimator: Any) -> None:
    """Checks that a short run of `minimize` lowers the outer value."""
    problem, w, alpha, _ = quadratic(jax.random.key(3), "vector")
    trace = minimize(
        problem, estimator, optax.sgd(0.05), w, alpha, num_steps=NUM_OUTER_STEPS,
        key=jax.random.key(0),
    )  # fmt: skip
    _check(trace.status == "completed", f"minimize must complete; it {trace.status}.")
    _check(
        trace.value[-1] < trace.value[0],
        f"{NUM_OUTER_STEPS} steps of minimize must lower the outer value; it went from "
        f"{trace.value[0]:.4g} to {trace.value[-1]:.4g}.",
    )


def _check_close(actual: PyTree, expected: PyTree, tolerance: float, name: str) -> None:
    actual, expected = _ravel(actual), _ravel(expected)
    scale = max(np.linalg.norm(expected), 1e-30)
    error = np.linalg.norm(actual - expected) / scale
    _check(
        error <= tolerance,
        f"{name} must have a relative error of at most {tolerance:.2e}; got "
        f"{error:.2e}.",
    )


def _ravel(tree: PyTree) -> Array:
    return ravel_pytree(tree)[0]


def _rounding_tolerance(tree: PyTree) -> float:
    """Returns 1e-9 for float64 and 1e-4 for float32."""
    return 1e-9 if jax.tree.leaves(tree)[0].dtype == jnp.float64 else 1e-4
