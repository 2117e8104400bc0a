"""Units change neither a decision nor a statistic that judges, for any estimator.

The problem has five parameters, so that the scaling of `Implicit` is exact. Descent is
not invariant by itself: its learning rates are given in the units of ``w``.
"""

import dataclasses
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.checks.problem import can_be_trusted
from hypergrad.inner.base import inner_stats
from hypergrad.inner.descent import run_inner_steps
from tests.estimators.single_loop.problems import METHODS
from tests.parameters import slow_except

KEYS = jax.random.split(jax.random.key(0), 3)
X = jax.random.normal(KEYS[0], (2, 40, 5))
Y = jnp.sign(X @ jnp.arange(1.0, 6.0) + jax.random.normal(KEYS[1], (2, 40)))
ALPHA = jnp.array([-3.0, -1.0])
DISTANCES = jnp.array([0.0, 1e-4, 1e-2, 0.3])  # of starting points from the minimum
#: The statistics that some estimators compare with a tolerance.
STATISTICS = "error_estimate", "standard_error"


class Coordinates(eqx.Module):
    """The coordinates ``w`` of the parameters ``theta``, and factors of both losses.

    Attributes:
      units: ``theta / w``.
      inner_factor, outer_factor: Factors of the losses.
      is_nested: Whether ``w`` is a dictionary with another order instead of a vector.
    """

    units: jax.Array
    inner_factor: jax.Array
    outer_factor: jax.Array
    is_nested: bool = eqx.field(static=True, default=False)

    def arrange(self, x):
        """Returns a vector with the structure of ``w``."""
        return {"z": x[2], "a": x[3:][None], "m": x[:2]} if self.is_nested else x

    def to_theta(self, w):
        if self.is_nested:
            w = jnp.concatenate([w["m"], w["z"][None], w["a"][0]])
        return self.units * w


def make_coordinates(units=1.0, inner_factor=1.0, outer_factor=1.0, is_nested=False):
    factors = jnp.asarray(inner_factor), jnp.asarray(outer_factor)
    return Coordinates(units * jnp.ones(5), *factors, is_nested)


UNITS = 10.0 ** jnp.array([-6.0, 3.0, 0.0, 6.0, -2.0])
ORIGINAL = make_coordinates()
CHANGED = {
    "units": make_coordinates(UNITS),
    "inner loss": make_coordinates(inner_factor=1e6),
    "outer loss": make_coordinates(outer_factor=1e-6),
    "order": make_coordinates(is_nested=True),
    "all": make_coordinates(UNITS, 1e-6, 1e6, is_nested=True),
}


def logistic_loss(w, batch):
    theta = batch["coordinates"].to_theta(w)
    return jnp.mean(jax.nn.softplus(-batch["y"] * (batch["x"] @ theta)))


def inner_loss(w, alpha, batch):
    coordinates = batch["coordinates"]
    squares = coordinates.to_theta(w) ** 2
    penalty = (
        jnp.exp(alpha[0]) * squares[:3].sum() + jnp.exp(alpha[1]) * squares[3:].sum()
    )
    return coordinates.inner_factor * (logistic_loss(w, batch) + penalty)


def outer_loss(w, alpha, batch):
    return batch["coordinates"].outer_factor * logistic_loss(w, batch)


def sample_data(data, key):
    """Returns the inner and the outer data, whose features have noise unless no key."""
    x, y, coordinates = data
    if key is not None:
        x = x + 0.01 * jax.random.normal(key, x.shape)
    return tuple({"x": x[i], "y": y[i], "coordinates": coordinates} for i in range(2))


def make_problem(coordinates, *, is_noisy=False):
    data = X, Y, coordinates
    if is_noisy:
        data_fn = jax.tree_util.Partial(sample_data, data)
        return hg.Bilevel(inner_loss, outer_loss, data_fn=data_fn)
    return hg.Bilevel(inner_loss, outer_loss, *sample_data(data, None))


class UnitDescent(eqx.Module):
    """Descent with momentum, in the coordinates ``theta``."""

    num_steps: int = eqx.field(static=True)
    rate: float = eqx.field(static=True, default=1.0)
    momentum: float = eqx.field(static=True, default=0.0)
    differentiable = True

    def init(self, inner_loss, w, alpha, data, key):
        return w, optax.tree.zeros_like(w)

    def step(self, inner_loss, carry, alpha, data, key):
        w, velocity = carry
        coordinates = data["coordinates"]
        scales = coordinates.arrange(coordinates.inner_factor * coordinates.units**2)
        grad = jax.grad(inner_loss)(w, alpha, data)
        velocity = jax.tree.map(
            lambda v, g, s: self.momentum * v - self.rate * g / s,
            velocity,
            grad,
            scales,
        )
        return optax.tree.add(w, velocity), velocity

    def solve(self, inner_loss, w, alpha, data, key):
        w, _ = run_inner_steps(self, inner_loss, w, alpha, data, key)
        return w, inner_stats(self.num_steps, num_grads=self.num_steps)


NO_STEPS = UnitDescent(0)
SHORT, LONG = UnitDescent(20), UnitDescent(40, 0.5, 0.5)
ESTIMATORS = {
    "Implicit": hg.Implicit(NO_STEPS),
    "Implicit, MINRES": hg.Implicit(NO_STEPS, hg.MINRES()),
    "Implicit, LU": hg.Implicit(NO_STEPS, lx.LU()),
    "Implicit, Newton step": hg.Implicit(NO_STEPS, num_newton_steps=1),
    "Implicit, tolerance": hg.Implicit(NO_STEPS, num_newton_steps=1, rtol=1e-3),
    "Implicit, certified": hg.Implicit(NO_STEPS, certify=True),
    "FixedPoint": hg.FixedPoint(NO_STEPS, 40),
    "FixedPoint, few terms": hg.FixedPoint(SHORT, 6),
    "FixedPoint, momentum": hg.FixedPoint(UnitDescent(0, 0.5, 0.5), 60),
    "Unrolled": hg.Unrolled(LONG),
    "Unrolled, truncated": hg.Unrolled(LONG, truncation_length=8),
    "Forward": hg.Forward(LONG),
    "Reversible": hg.Reversible(0.5, 0.5, 40),
    "Average": hg.Average(hg.Implicit(NO_STEPS), 4),
}
#: Those whose flags compare the statistic ``adjoint_residual``; others report it only.
RESIDUAL_DECIDES = {name for name in ESTIMATORS if name.startswith("FixedPoint")} | {
    "Implicit",
    "Implicit, tolerance",
}
NOT_ACCURATE = "FixedPoint, few terms", "Unrolled, truncated"
#: The fixed-point integers of `Reversible` have units of their own.
COORDINATES = {"Reversible": ("outer loss", "order")}
SOLVER = hg.Descent(optax.sgd(0.1), 4)
NEVER_TRUSTED = (
    hg.FiniteDifference(SOLVER),
    hg.CentralDifference(SOLVER),
    hg.Penalty(SOLVER, 9.0),
    hg.Penalty(hg.Newton(), 9.0),
    hg.Evolution(SOLVER, 0.1, 2),
    hg.PersistentEvolution(SOLVER, 0.1, 2, 2),
    # DARTS of first order refuses an outer loss that does not depend on alpha.
    *(method for name, method in METHODS.items() if name != "DARTS, first order"),
)


def minimum():
    """Returns the argmin in the original coordinates."""
    solve = hg.argmin(inner_loss, hg.Newton())
    batch = {"x": X[0], "y": Y[0], "coordinates": ORIGINAL}
    return solve(jnp.zeros(5), ALPHA, batch)


def make_run_fn(estimator):
    """Returns the function that makes estimates at all distances from the minimum."""
    is_noisy = isinstance(estimator, hg.Average)
    theta = minimum()

    @jax.jit
    def run(coordinates):
        problem = make_problem(coordinates, is_noisy=is_noisy)

        def run_from(distance):
            shifted = theta + distance * jax.random.normal(KEYS[2], theta.shape)
            w = coordinates.arrange(shifted / coordinates.units)
            estimate = hg.hypergradient(problem, estimator)(w, ALPHA)
            scaled = estimate.hypergradient / coordinates.outer_factor
            return estimate.flags, estimate.stats | {"hypergradient": scaled}

        return jax.vmap(run_from)(DISTANCES)

    return run


@pytest.mark.parametrize(
    "name",
    slow_except(
        ESTIMATORS, ["Implicit", "Implicit, certified", "FixedPoint", "Unrolled"]
    ),
)
def test_units_change_neither_flags_nor_statistics(name):
    run = make_run_fn(ESTIMATORS[name])
    expected_flags, expected_statistics = run(ORIGINAL)
    is_trusted = ~jnp.any(jnp.stack([*expected_flags.values()]), axis=0)
    assert is_trusted[0] == (name not in NOT_ACCURATE)
    names = [*STATISTICS, "hypergradient"]
    names += ["adjoint_residual"] * (name in RESIDUAL_DECIDES)
    for change in COORDINATES.get(name, CHANGED):
        flags, statistics = run(CHANGED[change])
        if name == "Implicit":
            # At the minimum itself the gradient is the rounding error of the program.
            num_hvps, expected = statistics["num_hvps"], expected_statistics["num_hvps"]
            np.testing.assert_array_equal(num_hvps[1:], expected[1:], change)
        for flag in expected_flags:
            np.testing.assert_array_equal(flags[flag], expected_flags[flag], flag)
        for statistic in names:
            np.testing.assert_allclose(
                statistics[statistic],
                expected_statistics[statistic],
                rtol=1e-6,
                atol=1e-9,
                err_msg=f"{statistic}, {change}",
            )


@pytest.mark.parametrize(
    "estimator", NEVER_TRUSTED, ids=lambda estimator: type(estimator).__name__
)
def test_statistics_of_other_estimators_do_not_judge(estimator):
    """The jaxpr shows that ``trusted`` is False whatever the inputs are."""
    problem = make_problem(ORIGINAL)
    assert not can_be_trusted(estimator, problem, jnp.ones(5), ALPHA)


class Judged(eqx.Module):
    """`FiniteDifference` with a flag of one's own in place of its flags."""

    is_refused: bool | None = None

    def init(self, *args):
        return hg.FiniteDifference(hg.Newton()).init(*args)

    def estimate(self, *args):
        estimate, state = hg.FiniteDifference(hg.Newton()).estimate(*args)
        flag = ~(estimate.stats["inner_grad_norm"] < 1e-3)
        if self.is_refused is not None:
            flag = jnp.asarray(self.is_refused)
        return dataclasses.replace(estimate, flags={"far": flag}), state


@pytest.mark.parametrize(
    ("is_refused", "expected"), [(None, True), (False, True), (True, False)]
)
def test_an_estimator_is_recognized_by_its_flags(is_refused, expected):
    """Whatever its statistics say: they may be those of another estimator."""
    problem, estimator = make_problem(ORIGINAL), Judged(is_refused)
    assert can_be_trusted(estimator, problem, jnp.ones(5), ALPHA) == expected


def test_every_estimator_is_tested():
    methods = {
        method
        for method in map(hg.__dict__.get, hg.__all__)
        if inspect.isclass(method)
        and hasattr(method, "error_bound")
        and hasattr(method, "estimate")
    }
    assert methods == {type(x) for x in (*ESTIMATORS.values(), *NEVER_TRUSTED)}
