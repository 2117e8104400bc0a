"""Optimizers with the same content are one object, and no others are."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hypergrad.runtime.equal_optimizers import first_equal

# Transformations of optax that need no more than a learning rate. `fromage` is not
# among them, because before optax 0.2.8 it contained an array.
ALIASES = """
    adabelief adadelta adagrad adam adamax adamaxw adamw adan amsgrad lars lamb
    lion nadam nadamw novograd radam rmsprop rprop sgd sign_sgd sm3 yogi
"""


def make(name, rate=0.125, **options):
    return first_equal(getattr(optax, name)(rate, **options))


@pytest.mark.parametrize("name", ALIASES.split())
def test_equal_arguments_give_one_object(name):
    assert make(name) is make(name)


@pytest.mark.parametrize("name", ALIASES.split())
def test_each_number_distinguishes(name):
    """The oracle is the signature: another value of any option is another optimizer."""
    assert make(name) is not make(name, 0.25)
    parameters = inspect.signature(getattr(optax, name)).parameters
    # Without momentum optax ignores whether it is Nesterov's.
    options = {"momentum": 0.5} if "momentum" in parameters else {}
    first = make(name, **options)
    for option in list(parameters.values())[1:]:  # The first one is the rate.
        if isinstance(option.default, bool):
            other = not option.default
        elif isinstance(option.default, float):
            other = option.default / 2 + 0.1
        else:
            continue
        assert make(name, **options | {option.name: other}) is not first, option.name


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda: optax.chain(
            optax.clip(1.0), optax.sgd(optax.cosine_decay_schedule(0.1, 9))
        ),
        lambda: optax.masked(optax.sgd(0.1), (True, False)),
        lambda: optax.adam(0.1, mu_dtype=jnp.bfloat16),
        lambda: optax.lbfgs(1.0, linesearch=None),
    ],
)
def test_composed_transformations(make_optimizer):
    assert first_equal(make_optimizer()) is first_equal(make_optimizer())


@pytest.mark.parametrize(
    "make_schedule",
    [
        lambda rate: optax.polynomial_schedule(rate, 0.0, 1, 9),
        lambda rate: optax.exponential_decay(rate, 9, 0.5),
        lambda rate: optax.exponential_decay(rate, 9, 0.5, end_value=0.1),
        lambda rate: optax.cosine_decay_schedule(rate, 9),
    ],
)
def test_schedules(make_schedule):
    first = first_equal(make_schedule(1.0))
    assert first_equal(make_schedule(1.0)) is first
    assert first_equal(make_schedule(0.5)) is not first
    # The cosine changes its closure when it is called.
    assert jax.jit(first)(3) == make_schedule(1.0)(3)
    assert first_equal(make_schedule(1.0)) is first


def test_equal_numbers_of_other_types_or_signs_are_different():
    pairs = [(0.0, -0.0), (1, 1.0), (0.5, np.float32(0.5))]
    for a, b in pairs:
        assert first_equal(optax.sgd(a)) is not first_equal(optax.sgd(b))
    assert first_equal(optax.trace(0.9, True)) is not first_equal(optax.trace(0.9, 1))


def test_numbers_of_numpy():
    """Grids of rates often come from `numpy.geomspace`."""
    make_optimizer = lambda rate: first_equal(optax.adam(np.float64(rate)))
    assert make_optimizer(0.1) is make_optimizer(0.1)
    assert make_optimizer(0.1) is not make_optimizer(0.2)


def test_functions_of_users_are_never_shared():
    """What they read may change after the first call, as in a cell of a notebook."""
    schedule = lambda count: 0.1
    optimizers = [optax.sgd(schedule), optax.sgd(schedule)]
    optimizers += [optax.stateless(lambda g, w: g), optax.masked(optax.sgd(0.1), len)]
    for optimizer in optimizers:
        assert first_equal(optimizer) is optimizer


class Scaled(optax.GradientTransformation):
    """A transformation that keeps its number outside of its fields."""

    def __new__(cls, factor):
        self = super().__new__(cls, *optax.identity())
        self.factor = factor
        return self


def test_transformations_with_attributes_are_never_shared():
    one, other = Scaled(0.1), Scaled(0.9)
    assert first_equal(one) is one
    assert first_equal(other) is other


def test_arrays_and_tracers_are_never_shared():
    rate = jnp.asarray(0.1)
    one, other = optax.sgd(rate), optax.sgd(rate)
    assert first_equal(one) is one
    assert first_equal(other) is other

    @jax.jit
    def step(rate):
        optimizer = optax.sgd(rate)
        assert first_equal(optimizer) is optimizer
        return optimizer.update(1.0, optimizer.init(1.0))[0]

    assert float(step(0.25)) == -0.25


def test_what_is_no_transformation_is_returned():
    function = lambda alpha: optax.sgd(alpha)
    assert first_equal(function) is function
    assert first_equal(None) is None


def test_containers_that_may_change_are_never_shared():
    """A change would reach the optimizer that was seen first, but not its key."""
    rules = {"a": optax.sgd(0.1)}
    first = optax.multi_transform(rules, "a")
    assert first_equal(first) is first
    rules["a"] = optax.sgd(0.2)
    second = optax.multi_transform({"a": optax.sgd(0.1)}, "a")
    assert first_equal(second) is second


def test_optimizer_that_refers_to_itself_is_returned():
    def update(updates, state, params=None):
        return updates, update

    own = optax.GradientTransformation(lambda params: (), update)
    assert first_equal(own) is own
