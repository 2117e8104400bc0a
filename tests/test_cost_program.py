"""The account of a compiled program, against counts by hand and what it returns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg

N, STEPS, OUTER = 20, 10, 7


def times(A, x):
    return A @ x


def test_a_program_returns_what_the_function_does():
    """And counts what `flops` and `memory` count."""
    A, x = jnp.arange(1.0 * N * N).reshape(N, N), jnp.ones(N)
    program = hg.cost.compile_program(times, A, x)
    np.testing.assert_array_equal(program(A, 2 * x), jax.jit(times)(A, 2 * x))
    assert program.flops == hg.cost.flops(times, A, x)
    assert program.flops.total() == 2 * N * N
    assert program.memory == hg.cost.memory(times, A, x)
    assert program.trace_seconds > 0
    assert program.compile_seconds > 0


def test_shapes_suffice_to_compile():
    """Nothing is run."""
    like = jax.ShapeDtypeStruct((N,), float)
    program = hg.cost.compile_program(jnp.vdot, like, like)
    assert program(jnp.ones(N), jnp.ones(N)) == N


def test_a_function_is_traced_once():
    """For its operations, its bytes and any number of calls."""
    traces = []

    def noted(x):
        traces.append(x)
        return jnp.sin(x)

    program = hg.cost.compile_program(noted, 1.0 + jnp.zeros(N))
    program(jnp.ones(N))
    program(jnp.zeros(N))
    assert len(traces) == 1


@pytest.fixture
def ridge(key):
    X = jax.random.normal(key, (50, N))
    loss = lambda w, alpha, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
    inner = lambda w, alpha, batch: loss(w, alpha, batch) + jnp.exp(alpha) * w @ w
    return hg.Bilevel(inner, loss, (X, X[:, 0]), (X, X[:, 1]))


def minimise(problem, w, alpha, key):
    estimator = hg.Unrolled(hg.Descent(optax.sgd(0.1), STEPS))
    return hg.minimize(
        problem, estimator, optax.sgd(0.1), w, alpha, num_steps=OUTER, key=key
    )


def test_a_whole_run_has_an_account(ridge, key):
    """Data among the arguments; the loop over outer steps is of unknown length."""
    args = ridge, jnp.zeros(N), jnp.zeros(()), key
    program = hg.cost.compile_program(minimise, *args)
    found, expected = program(*args), minimise(*args)
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-12)
    assert program.memory.arguments >= 8 * (2 * 50 * N + 2 * 50)
    (loop,) = program.flops.loops
    step = hg.hypergradient(ridge, hg.Unrolled(hg.Descent(optax.sgd(0.1), STEPS)))
    of_a_step = hg.cost.flops(step, *args[1:3]).total()
    total = program.flops.total(OUTER)
    assert total - program.flops.fixed == OUTER * loop.flops
    assert loop.flops == pytest.approx(of_a_step, rel=0.05)
    assert "an iteration: " in repr(program)
    assert "minimize.py" in repr(program)


def test_other_fixed_arguments_are_refused(ridge, key):
    """They are part of the program; so are shapes."""
    args = ridge, jnp.zeros(N), jnp.zeros(()), key
    program = hg.cost.compile_program(minimise, *args)
    other = hg.Bilevel(ridge.outer_loss, ridge.outer_loss, *ridge.sample_data(None))
    with pytest.raises(ValueError, match="compiled for other arguments"):
        program(other, *args[1:])
    with pytest.raises(TypeError, match="compiled"):
        program(ridge, jnp.zeros(N + 1), *args[2:])
