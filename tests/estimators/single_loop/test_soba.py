"""SOBA: the memory of its compiled step, and the step that the benchmark times."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import soba_step


def test_step_holds_few_copies_of_w():
    """A step on 10 million parameters holds at most 8 copies of ``w``."""
    assert soba_step.NUM_PARAMETERS > 10e6
    assert 3 < soba_step.copies(soba_step.step) <= 8


def test_timed_step_equals_the_step_in_plain_jax(monkeypatch):
    """The step of the benchmark and the plain one agree on equal examples."""
    monkeypatch.setattr(soba_step, "SIZES", (20, 30, 10))
    w, alpha, data, key = soba_step.sample_arrays()
    state = soba_step.init_state(w, alpha, data)
    data = jax.tree.map(lambda x: jnp.tile(x[:1], (len(x), 1)), data)
    v = jax.tree.map(jnp.ones_like, w)
    state = eqx.tree_at(lambda s: s.v, state, v)
    new_state, new_alpha = jax.jit(soba_step.step)(state, alpha, data, key)
    plain_step = jax.jit(soba_step.plain_step)
    (plain_w, plain_v), plain_alpha = plain_step((w, v), alpha, data, key)
    for actual, expected in ((new_state.w, plain_w), (new_state.v, plain_v)):
        difference = optax.tree.norm(optax.tree.sub(actual, expected))
        assert difference < 1e-5 * optax.tree.norm(expected)
    np.testing.assert_allclose(new_alpha, plain_alpha, rtol=1e-5)
    assert np.any(new_alpha != alpha)
