"""Tests of the checks of ``w`` and ``alpha`` that precede all tracing."""

import jax
import jax.numpy as jnp
import optax
import pytest

import hypergrad as hg
from hypergrad import validation
from hypergrad.runtime.devices import is_on_host

PROBLEM = hg.Bilevel(
    lambda w, alpha, batch: jnp.sum((w["x"] - alpha["x"]) ** 2),
    lambda w, alpha, batch: jnp.sum(w["x"] ** 2),
)
ESTIMATOR = hg.Unrolled(hg.Descent(optax.sgd(0.1), 2))

ENTRY_POINTS = {
    "hypergradient": lambda w, alpha: hg.hypergradient(PROBLEM, ESTIMATOR)(w, alpha),
    "minimize": lambda w, alpha: hg.minimize(
        PROBLEM, ESTIMATOR, optax.sgd(0.1), w, alpha, num_steps=1
    ),
    "certify": lambda w, alpha: hg.certify(PROBLEM, w, alpha),
}
LEAVES = {
    "key": jax.random.key(0),
    "keys": jax.random.split(jax.random.key(0)),
    "integers": jnp.arange(2),
    "booleans": jnp.array([True, False]),
    "function": jax.nn.relu,
    "text": "relu",
}


@pytest.mark.parametrize("leaf", LEAVES.values(), ids=LEAVES)
@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_leaf_of_alpha_without_derivative_is_named(name, leaf):
    """Where its derivative is needed; `test_fuzz` has such leaves of ``w``."""
    alpha = {"x": jnp.zeros(2), "other": leaf}
    with pytest.raises(TypeError, match=r"alpha\['other'\]"):
        ENTRY_POINTS[name]({"x": jnp.ones(2)}, alpha)


def test_argmin_takes_a_key_in_alpha():
    """The minimum for a key of the noise has a derivative by all other leaves."""

    def inner_loss(w, alpha, batch):
        noise = jax.random.normal(alpha["key"], w.shape)
        return 0.5 * jnp.sum((w - alpha["scale"] * noise) ** 2)

    key = jax.random.key(3)
    solution_fn = hg.argmin(inner_loss, hg.Newton())
    fn = lambda scale: solution_fn(jnp.zeros(4), {"scale": scale, "key": key})
    expected = jax.random.normal(key, (4,))
    assert jnp.allclose(jax.jacrev(fn)(2.0), expected, rtol=1e-9)
    assert jnp.allclose(jax.jacfwd(fn)(2.0), expected, rtol=1e-9)


KEYED_DATA = {
    "key": lambda key: key,
    "leaf": lambda key: {"scale": jnp.ones(()), "key": key},
}


@pytest.mark.parametrize("name", KEYED_DATA)
def test_a_key_is_a_leaf_of_data(name):
    """The noise of a loss may have its key from ``data_fn``."""
    make_data = KEYED_DATA[name]

    def inner_loss(w, alpha, batch):
        key = batch["key"] if isinstance(batch, dict) else batch
        return (w - alpha - jax.random.normal(key)) ** 2

    problem = hg.Bilevel(
        inner_loss,
        lambda w, alpha, batch: w**2,
        data_fn=lambda key: (make_data(key), make_data(key)),
    )
    estimate = hg.hypergradient(problem, hg.Implicit(hg.Newton()))(0.0, 1.0)
    assert estimate.hypergradient == pytest.approx(2 * estimate.w)


class TrainState:
    """What flax makes of a model and its optimizer."""

    tx = optax.adam(0.1)


OPTIMIZERS = {
    "factory": (optax.adam, r"the factory optax\.adam\. Call it first, .*adam\(0\.1\)"),
    "class": (TrainState, r"got the class TrainState\.$"),
    "object with an optimizer": (TrainState(), r"got TrainState\. Pass its \.tx\."),
    "number": (0.1, r"got float\.$"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_no_optimizer_gets_its_remedy(name):
    optimizer, message = OPTIMIZERS[name]
    make_loop = lambda: hg.OuterLoop(PROBLEM, ESTIMATOR, optimizer)
    for make in (make_loop, lambda: hg.SOBA(optimizer)):
        with pytest.raises(TypeError, match=r"^optimizer must be .*" + message):
            make()


def test_a_module_gets_the_names_of_both_libraries_that_split_it():
    with pytest.raises(TypeError, match=r"split w \(equinox\.partition, nnx\.split\)"):
        ENTRY_POINTS["hypergradient"]({"x": jax.nn.relu}, {"x": jnp.zeros(2)})


@pytest.mark.parametrize("on_host", [True, False])
def test_nan_is_found_by_numpy_and_on_the_device(monkeypatch, on_host):
    """An array on an accelerator is not transferred, but compared there."""
    monkeypatch.setattr(validation, "is_on_host", lambda x: on_host)
    w, alpha = {"x": jnp.zeros(2)}, {"x": jnp.array([0.0, jnp.nan])}
    with pytest.raises(ValueError, match=r"^alpha\['x'\] must not contain NaN"):
        validation.check_no_nan(w, alpha)
    validation.check_no_nan(w, w)


def test_arrays_of_the_cpu_are_on_the_host():
    assert is_on_host(jnp.zeros(2))
