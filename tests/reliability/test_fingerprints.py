"""Digests of programs: equal if and only if a run can be resumed with the program."""

from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.runtime.fingerprint import digest_function, digest_program
from tests.loops import ExactEstimator, assert_same_bits, run_loop


@pytest.fixture(params=[False, True], ids=["in the text", "beside the text"])
def place_of_constants(request):
    """Sets where JAX keeps the arrays that a program closes over."""
    option = "jax_use_simplified_jaxpr_constants"
    previous = getattr(jax.config, option)
    jax.config.update(option, request.param)
    yield
    jax.config.update(option, previous)


def close_over(array):
    """Returns functions that use an array in the ways in which a program can."""
    times = lambda x: x * array
    with_own_rule = jax.custom_vjp(times)
    with_own_rule.defvjp(lambda x: (x * array, None), lambda _, g: (g * array,))
    return {
        "plain": times,
        "jit": jax.jit(times),
        "scan": lambda x: jax.lax.scan(lambda x, _: (times(x), None), x, length=2)[0],
        "cond": lambda x: jax.lax.cond(x[0] > 0, times, jnp.sin, x),
        "own rule": jax.grad(lambda x: jnp.sum(with_own_rule(x))),
        "remat": jax.grad(lambda x: jnp.sum(jax.checkpoint(times)(x))),
        "vmap": lambda x: jax.vmap(times)(x[None])[0],
    }


@pytest.mark.usefixtures("place_of_constants")
@pytest.mark.parametrize("size", [3, 3000])
@pytest.mark.parametrize("to_array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("name", close_over(np.ones(3)))
def test_programs_are_told_apart_by_the_arrays_that_they_close_over(
    name, to_array, size
):
    """JAX passes large arrays as arguments, of which the text has only the shape."""
    array = np.linspace(1.0, 2.0, size)
    programs = [close_over(to_array(x))[name] for x in (array, array.copy(), array + 1)]
    first, equal, other = (digest_function(x, jnp.ones(size)) for x in programs)
    assert first == equal != other
    wrapped = [
        digest_program(eqx.filter_jit(x).lower(jnp.ones(size))) for x in programs
    ]
    assert wrapped[0] == wrapped[1] != wrapped[2]


@pytest.mark.usefixtures("place_of_constants")
def test_a_run_with_other_data_in_its_loss_is_not_resumed(tmp_path):
    array = np.linspace(0.0, 1.0, 3000)

    def run_on(array):
        problem = hg.Bilevel(
            lambda w, alpha, _: 0.5 * jnp.sum((w - alpha) ** 2),
            lambda w, alpha, _: jnp.mean((w[0] - array) ** 2),
        )
        return run_loop(
            num_steps=2,
            problem=problem,
            estimator=ExactEstimator(),
            optimizer=optax.sgd(0.1),
            w=jnp.zeros(2),
            alpha=jnp.ones(2),
            checkpoints=hg.Checkpoints(tmp_path, 100),
        )

    assert_same_bits(run_on(array), run_on(array.copy()))
    with pytest.raises(ValueError, match="outer_loss"):
        run_on(array + 1)


def test_arrays_that_jax_does_not_show_are_an_error():
    """Two programs with other data would have one digest."""
    lowered = jax.jit(jnp.sin).lower(1.0)
    expected = digest_program(lowered)
    lowering = SimpleNamespace(as_text=lowered.as_text, _lowering=None)
    option = "jax_use_simplified_jaxpr_constants"
    previous = getattr(jax.config, option)
    try:
        jax.config.update(option, False)
        assert digest_program(lowering) == expected
        jax.config.update(option, True)
        with pytest.raises(ValueError, match=f"Set {option.upper()}=0"):
            digest_program(lowering)
    finally:
        jax.config.update(option, previous)
