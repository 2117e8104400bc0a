"""Tests of the choice of what the reverse pass through a run stores."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import optax
import pytest

import hypergrad as hg
from hypergrad.inner.base import inner_stats
from hypergrad.inner.descent import run_inner_steps
from hypergrad.inner.storage import StepSizes, Storage, choose_storage

SIZES = SimpleNamespace(all_values=100, mixed_mode=30, carry=20)


@pytest.mark.parametrize(
    ("max_bytes", "expected"),
    [
        (10_000, Storage(False, False, 10_000)),
        (9_999, Storage(False, True, 3_000)),
        (2_999, Storage(True, True, 10 * 20 + 10 * 30)),
        (0, Storage(True, True, 500)),
    ],
)
def test_the_fewest_operations_that_fit_are_chosen(max_bytes, expected):
    assert choose_storage(SIZES, 100, None, max_bytes) == expected


def test_the_choice_can_be_made_by_hand():
    """Whatever the limit; the last segment may be shorter than the others."""
    assert choose_storage(SIZES, 100, False, 0) == Storage(False, False, 10_000)
    assert choose_storage(SIZES, 100, True, 1e9) == Storage(True, True, 500)
    assert choose_storage(SIZES, 103, True, 0).num_bytes == 11 * 20 + 10 * 30


def test_fewer_than_four_steps_have_no_checkpoints():
    assert choose_storage(SIZES, 3, None, 299) == Storage(False, True, 90)
    assert choose_storage(SIZES, 3, True, 0) == Storage(False, True, 90)


def test_without_mixed_mode_checkpoints_store_all_values_of_a_segment():
    sizes = SimpleNamespace(all_values=100, mixed_mode=None, carry=20)
    assert choose_storage(sizes, 100, None, 9_999) == Storage(True, False, 1_200)


# Sizes of steps.

DIM, BATCH_SIZE, NUM_STEPS = 500, 40, 300
DATA = jax.ShapeDtypeStruct((200, DIM), jnp.float32)
W = jax.ShapeDtypeStruct((DIM,), jnp.float32)
ALPHA = jax.ShapeDtypeStruct((), jnp.float32)
OPTIMIZERS = {
    "constant rate": (optax.sgd(0.1), 0),
    "tuned rate": (lambda alpha: optax.sgd(jnp.exp(alpha)), 1),
    "Adam": (optax.adam(0.1), 1),
}


def loss(w, alpha, batch):
    return jnp.mean(jnp.cosh(batch @ w)) + jnp.exp(alpha) * jnp.sum(w**2)


def measure(solver, data, w=W, alpha=ALPHA) -> StepSizes:
    sizes = []
    jax.eval_shape(
        lambda data, w, alpha: sizes.append(
            StepSizes(solver, loss, w, alpha, hg.Batches(data, BATCH_SIZE))
        ),
        data, w, alpha,
    )  # fmt: skip
    return sizes[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("mixed_mode", [False, True], ids=["autodiff", "mixed"])
def test_sizes_are_those_of_the_compiled_program(name, mixed_mode):
    """Apart from the values that all steps share, which are counted once."""
    optimizer, _ = OPTIMIZERS[name]

    def scratch(num_steps):
        run = lambda alpha, w, data: jnp.sum(
            run_inner_steps(
                hg.Descent(optimizer, num_steps), loss, w, alpha,
                hg.Batches(data, BATCH_SIZE), jax.random.key(0), mixed_mode=mixed_mode,
            )[0]
        )  # fmt: skip
        return hg.cost.memory(jax.grad(run), ALPHA, W, DATA).temporaries

    sizes = measure(hg.Descent(optimizer, 1), DATA)
    planned = sizes.mixed_mode if mixed_mode else sizes.all_values
    per_step = (scratch(2 * NUM_STEPS) - scratch(NUM_STEPS)) / NUM_STEPS
    # XLA drops values that a later stored value contains.
    assert 0.6 * planned < per_step < 1.02 * planned + 20


@pytest.mark.parametrize(
    ("optimizer", "truncation_length"),
    [(optax.sgd(0.1), None), (optax.sgd(0.1), 99), (optax.adam(0.1), None)],
    ids=["sgd", "sgd truncated", "Adam"],
)
def test_an_estimate_stores_what_is_planned(optimizer, truncation_length):
    """With the check of its rounding errors, which a truncated run does not have.

    A few vectors like ``w`` are no values of the steps.
    """
    inner = lambda w, alpha, batch: jnp.sum(jnp.cosh(w - alpha))
    problem = hg.Bilevel(inner, lambda w, alpha, batch: jnp.sum(w**2))
    estimator = hg.Unrolled(
        hg.Descent(optimizer, 100), truncation_length, checkpoint=False
    )
    planned = estimator.storage(problem, W, W).num_bytes
    actual = hg.cost.memory(hg.hypergradient(problem, estimator), W, W).temporaries
    # XLA drops values that a later stored value contains.
    assert 0.95 * planned < actual < 1.02 * planned + 20 * 4 * DIM


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_mixed_mode_stores_the_carry_and_the_gradient_where_it_is_used(name):
    """And the key, but neither the batch nor the data."""
    optimizer, num_grads = OPTIMIZERS[name]
    sizes = measure(hg.Descent(optimizer, 1), DATA)
    assert sizes.mixed_mode - sizes.carry == num_grads * 4 * DIM
    assert sizes.all_values > sizes.mixed_mode + 4 * BATCH_SIZE * DIM


@dataclasses.dataclass(frozen=True)
class NewtonSteps:
    """Steps by the Hessian, a forward derivative of a gradient."""

    num_steps: int
    differentiable = True

    def init(self, inner_loss, w, alpha, data, key):
        return w, ()

    def step(self, inner_loss, carry, alpha, data, key):
        w, _ = carry
        grad = jax.grad(inner_loss)(w, alpha, data)
        hessian = jax.hessian(inner_loss)(w, alpha, data)
        return w - 0.5 * jnp.linalg.solve(hessian, grad), ()

    def solve(self, inner_loss, w, alpha, data, key):
        w, _ = run_inner_steps(self, inner_loss, w, alpha, data, key)
        return w, inner_stats(self.num_steps, num_grads=self.num_steps)


@pytest.mark.parametrize("solver", [NewtonSteps(9), hg.ClosedForm(lambda a, b: a * b)])
def test_steps_without_mixed_mode_have_no_size_in_it(solver):
    """A forward derivative of the loss, and a step that does not use the loss."""
    sizes = StepSizes(solver, loss, jnp.ones(3), jnp.asarray(0.1), jnp.ones((1, 3)))
    assert sizes.mixed_mode is None


def test_a_solver_with_second_derivatives_is_differentiated_with_checkpoints():
    inner = lambda w, alpha, batch: jnp.sum(jnp.cosh(w - alpha)) + jnp.sum(w**4)
    problem = hg.Bilevel(inner, lambda w, alpha, batch: jnp.sum(w**3))
    run = functools.partial(hg.Unrolled, NewtonSteps(9))
    stored, repeated = (
        hg.hypergradient(problem, run(checkpoint=checkpoint))(jnp.ones(3), jnp.ones(3))
        for checkpoint in (False, True)
    )
    assert repeated.stats["num_grads"] == stored.stats["num_grads"] + 9
    assert jnp.allclose(repeated.hypergradient, stored.hypergradient, rtol=1e-12)
