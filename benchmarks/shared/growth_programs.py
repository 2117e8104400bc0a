"""Programs whose growth is measured, and the exponents of theory.

The table `growth` counts their operations and bytes, `growth_seconds` their seconds.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.bench import Finding

PRODUCTS = 4  # of a linear solve
RATE, MOMENTUM = 0.1, 0.9
OPTIMIZER = optax.sgd(RATE, momentum=MOMENTUM)
TOLERANCE = 0.1  # of an exponent
COLUMNS = ("operations", "scratch")
#: (column, axis) along which theory predicts no growth for most estimators.
FLAT = {
    ("scratch", "steps"),
    *itertools.product(COLUMNS, ("hyperparameters", "devices")),
}


class Sizes(NamedTuple):
    """Sizes of a problem and its inner run, of a population, and number of devices."""

    steps: int = 10
    parameters: int = 10**4
    hyperparameters: int = 10
    examples: int = 8
    population: int = 1
    devices: int = 1


def outer_loss(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Returns the mean cross-entropy of logistic regression."""
    del alpha
    scores = batch["x"] @ w
    return jnp.mean(jax.nn.softplus(scores) - batch["y"] * scores)


def inner_loss(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Returns the loss with log-penalties, each of equally many consecutive weights."""
    squares = jnp.sum(w.reshape(alpha.size, -1) ** 2, axis=1)
    return outer_loss(w, alpha, batch) + jnp.vdot(jnp.exp(alpha), squares)


def descent(steps: int) -> hg.Descent:
    """Returns the inner solver of all estimators."""
    return hg.Descent(OPTIMIZER, steps)


def estimate_once(
    make: Callable[[int], Any],
    steps: int,
    problem: hg.Bilevel,
    w: Array,
    alpha: Array,
    key: Array,
) -> PyTree:
    """Returns one estimate."""
    estimate = hg.hypergradient(problem, make(steps))(w, alpha, key)
    return estimate.value, estimate.hypergradient, estimate.w


def run_joint_steps(
    make: Callable[[int], Any],
    steps: int,
    problem: hg.Bilevel,
    w: Array,
    alpha: Array,
    key: Array,
) -> PyTree:
    """Makes as many joint steps as other estimators make inner steps."""
    estimator = make(steps)

    def step(carry: tuple, key: Array) -> tuple[tuple, None]:
        state, alpha = carry
        estimate, state = estimator.estimate(problem, state, alpha, key)
        return (state, alpha - RATE * estimate.hypergradient), None

    carry = estimator.init(problem, w, alpha, key), alpha
    return jax.lax.scan(step, carry, jax.random.split(key, steps))[0]


class Method(NamedTuple):
    """An estimator, and where its cost grows unlike that of most estimators.

    Attributes:
      make: ``number of steps -> estimator``.
      powers: ``(column, axis, exponent)`` where the exponent is not that of most.
      max_hyperparameters: Largest number of hyperparameters.
      run: Runs the estimator.
    """

    make: Callable[[int], Any]
    powers: tuple[tuple[str, str, float], ...] = ()
    max_hyperparameters: int = 10**7
    run: Callable = estimate_once


PER_HYPERPARAMETER = tuple((column, "hyperparameters", 1.0) for column in COLUMNS)
ROOT_OF_STEPS, ALL_STEPS = ((("scratch", "steps", power),) for power in (0.5, 1.0))
METHODS = {
    "Implicit, CG": Method(
        lambda T: hg.Implicit(
            descent(T), hg.CG(rtol=0.0, max_steps=PRODUCTS, preconditioner=None)
        )
    ),
    "Implicit, Neumann": Method(
        lambda T: hg.Implicit(descent(T), hg.Neumann(PRODUCTS, step_size=RATE))
    ),
    "Unrolled": Method(
        lambda T: hg.Unrolled(descent(T), checkpoint=True), ROOT_OF_STEPS
    ),
    "Unrolled, stored": Method(
        lambda T: hg.Unrolled(descent(T), checkpoint=False), ALL_STEPS
    ),
    "Unrolled, last 10": Method(
        lambda T: hg.Unrolled(descent(T), truncation_length=10)
    ),
    "Forward": Method(lambda T: hg.Forward(descent(T)), PER_HYPERPARAMETER, 10**3),
    "Reversible": Method(lambda T: hg.Reversible(RATE, MOMENTUM, T), ALL_STEPS),
    "FixedPoint": Method(lambda T: hg.FixedPoint(descent(T), PRODUCTS)),
    "FiniteDifference": Method(lambda T: hg.FiniteDifference(descent(T))),
    "Penalty": Method(lambda T: hg.Penalty(descent(T), 10.0)),
    "CentralDifference": Method(
        lambda T: hg.CentralDifference(descent(T)),
        (("operations", "hyperparameters", 1.0),),
        10**3,
    ),
    "Evolution": Method(lambda T: hg.Evolution(descent(T), num_pairs=2)),
    "SOBA": Method(lambda T: hg.SOBA(OPTIMIZER), run=run_joint_steps),
}


def theory(method: str, column: str, axis: str) -> float:
    """Returns the exponent by theory: that of the method, else 0 if flat, else 1."""
    powers = {(c, a): power for c, a, power in METHODS[method].powers}
    return powers.get((column, axis), 0.0 if (column, axis) in FLAT else 1.0)


IMPLICIT = [name for name in METHODS if name.startswith("Implicit")]
#: Methods whose operations do not grow with the hyperparameters, by theory.
BLIND = [m for m in METHODS if theory(m, "operations", "hyperparameters") == 0]


def init_arrays(sizes: Sizes) -> tuple[PyTree, Array, Array, Array]:
    """Returns ``(data, w, alpha, key)``; a population is a first axis of the latter."""
    data = {
        "x": jnp.zeros((sizes.examples, sizes.parameters)),
        "y": jnp.zeros(sizes.examples),
    }
    shape = () if sizes.population == 1 else (sizes.population,)
    w = jnp.zeros((*shape, sizes.parameters))
    alpha = jnp.zeros((*shape, sizes.hyperparameters))
    return data, w, alpha, jnp.broadcast_to(jax.random.key(0), shape)


def run(method: str, sizes: Sizes, train: PyTree, val: PyTree, *args: Any) -> PyTree:
    """Runs a method; ``args`` are ``w, alpha, key`` or a population of them."""
    config = METHODS[method]

    def run_once(w: Array, alpha: Array, key: Array) -> PyTree:
        problem = hg.Bilevel(inner_loss, outer_loss, train, val)
        return config.run(config.make, sizes.steps, problem, w, alpha, key)

    return run_once(*args) if sizes.population == 1 else jax.vmap(run_once)(*args)


# Findings.


def fit_power(sizes: Any, values: Any) -> float:
    """Returns the exponent of the power law fitted by least squares in logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def compare_exponents(
    label: str, actual: dict[str, float], expected: dict[str, float]
) -> Finding:
    """Returns whether all exponents are within 0.1 of theory; names the others."""
    deviating = [
        f"{method} {power:.2f} for {expected[method]:g}"
        for method, power in actual.items()
        if not abs(power - expected[method]) <= TOLERANCE
    ]
    text = f"{label}: {len(actual) - len(deviating)} of {len(actual)} exponents "
    text += f"within {TOLERANCE:g} of theory"
    return supported_if(not deviating, "; ".join([text, *deviating]))


def compare_spread(
    label: str, lines: dict[str, tuple[list, list]], max_ratio: float
) -> Finding:
    """Returns whether no line's largest value exceeds its smallest one too much."""
    ratios = {name: max(values) / min(values) for name, (_, values) in lines.items()}
    worst = max(ratios, key=lambda name: ratios[name])
    text = f"{label}: {ratios[worst]:.2f} times the least, {worst}, the most of "
    return supported_if(
        ratios[worst] <= max_ratio, f"{text}{len(ratios)}; {max_ratio:g} claimed"
    )


def supported_if(is_met: bool, text: str) -> Finding:
    """Returns how a hypothesis about numbers without noise ends."""
    return Finding(text, "supported" if is_met else "not supported")
