"""PRNG keys and counters in `w` are constants: the losses see them, nothing moves them.

The right answer is that of the same problem whose losses close over the key.
"""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import hypergrad as hg

KEY = jax.random.key(3)
COUNT = np.uint32(5)
PARAMETERS = jnp.array([0.3, -0.2, 0.1])
W = {"scale": PARAMETERS, "key": KEY, "count": jnp.asarray(COUNT)}
ALPHA = jnp.array([0.5, -0.4])


def random_features(key, count):
    """Returns an input matrix that the key and the counter determine."""
    return jax.random.normal(jax.random.fold_in(key, count), (12, 3))


def inner_loss(w, alpha, batch):
    error = random_features(w["key"], w["count"]) @ w["scale"] - jnp.sin(alpha[0])
    return jnp.mean(error**2) + jnp.exp(alpha[1]) * jnp.sum(w["scale"] ** 2)


def outer_loss(w, alpha, batch):
    error = random_features(w["key"], w["count"])[:5] @ w["scale"] - 1.0
    return jnp.mean(error**2)


def init_fn(w, alpha):
    return w | {"scale": w["scale"] + alpha[0]}


def closed_over(fn):
    """Returns the function of the parameters that closes over key and counter."""
    return lambda scale, *args: fn({"scale": scale, "key": KEY, "count": COUNT}, *args)


COMPOSITE = hg.CompositeLoss(
    lambda w, alpha, batch: random_features(w["key"], w["count"]) @ w["scale"],
    lambda z, alpha, batch: jnp.mean((z - jnp.sin(alpha[0])) ** 2),
    lambda w, alpha: jnp.exp(alpha[1]) * jnp.sum(w["scale"] ** 2),
)
PROBLEM = hg.Bilevel(inner_loss, outer_loss)
REFERENCE = hg.Bilevel(closed_over(inner_loss), closed_over(outer_loss))
SGD = hg.Descent(optax.sgd(0.1, momentum=0.5), 10)


def assert_same_w(w, parameters):
    """Asserts that w has these parameters, and key and counter as at the start."""
    assert w["scale"].tolist() == parameters.tolist()
    assert (w["key"] == KEY).all()
    assert w["count"] == COUNT
    assert w.keys() == W.keys()


def assert_same_trace(trace, expected):
    """Asserts that a run with keys in w is the run of losses that close over them."""
    np.testing.assert_allclose(trace.value, expected.value, 1e-10)
    np.testing.assert_allclose(trace.metrics["error"], expected.metrics["error"], 1e-10)
    np.testing.assert_allclose(trace.w["scale"], expected.w, 1e-10)
    assert_same_w(trace.w, trace.w["scale"])


@pytest.mark.parametrize(
    "estimator",
    [
        hg.Implicit(hg.Newton()),
        hg.Unrolled(SGD),
        pytest.param(hg.Unrolled(SGD, checkpoint=True), id="checkpoints"),
        hg.Forward(SGD),
        hg.FixedPoint(SGD, 5),
        hg.Average(hg.Implicit(hg.Newton()), 2),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_hypergradient_is_that_of_losses_that_close_over_the_key(estimator):
    estimate = hg.hypergradient(PROBLEM, estimator)(W, ALPHA)
    expected = hg.hypergradient(REFERENCE, estimator)(PARAMETERS, ALPHA)
    np.testing.assert_allclose(estimate.hypergradient, expected.hypergradient, 1e-12)
    np.testing.assert_allclose(estimate.value, expected.value, 1e-12)
    np.testing.assert_allclose(estimate.w["scale"], expected.w, 1e-12)
    assert_same_w(estimate.w, estimate.w["scale"])
    assert estimate.trusted == expected.trusted


def test_products_get_the_key():
    """The products of a composite loss, and those of the user, which sum over w."""

    def own_product(w, alpha, batch, v):
        loss = lambda scale: inner_loss(w | {"scale": scale}, alpha, batch)
        gradient = jax.grad(loss)
        _, product = jax.jvp(gradient, (w["scale"],), (v["scale"],))
        return jax.tree.map(lambda x: x, v) | {"scale": product}

    expected = hg.hypergradient(REFERENCE, hg.Implicit(hg.Newton()))(PARAMETERS, ALPHA)
    for hvp_fn in (COMPOSITE.gauss_newton, own_product):
        estimator = hg.Implicit(hg.Newton(), hg.CG(1e-12), hvp_fn=hvp_fn)
        estimate = hg.hypergradient(PROBLEM, estimator)(W, ALPHA)
        np.testing.assert_allclose(
            estimate.hypergradient, expected.hypergradient, 1e-10
        )
        assert_same_w(estimate.w, estimate.w["scale"])


def test_another_key_gives_another_hypergradient_by_the_same_program():
    estimate_fn = jax.jit(hg.hypergradient(PROBLEM, hg.Implicit(hg.Newton())))
    other = W | {"key": jax.random.key(4)}
    values = [estimate_fn(w, ALPHA).value for w in (W, other)]
    assert values[0] != values[1]
    assert estimate_fn._cache_size() == 1


def test_keys_are_mapped_by_vmap():
    estimate_fn = hg.hypergradient(PROBLEM, hg.Implicit(hg.Newton()))
    keys = jax.random.split(KEY, 3)
    on_key = lambda key: estimate_fn(W | {"key": key}, ALPHA).hypergradient
    expected = jnp.stack([on_key(key) for key in keys])
    np.testing.assert_allclose(jax.vmap(on_key)(keys), expected, 1e-10)


def test_init_fn_gets_and_returns_the_key():
    estimator = hg.Unrolled(SGD, warm_start=False)
    problem = hg.Bilevel(inner_loss, outer_loss, init_fn=init_fn)
    estimate = hg.hypergradient(problem, estimator)(W, ALPHA)

    def value_fn(alpha):
        loss = closed_over(inner_loss)
        w, _ = SGD.solve(loss, PARAMETERS + alpha[0], alpha, None, KEY)
        return closed_over(outer_loss)(w, alpha, None)

    expected = jax.grad(value_fn)(ALPHA)
    np.testing.assert_allclose(estimate.hypergradient, expected, 1e-10)


def test_two_outer_losses_see_the_key():
    second_loss = lambda w, alpha, batch: jax.random.normal(w["key"]) * w["scale"][0]
    losses = (outer_loss, second_loss)
    estimator = hg.Implicit(hg.Newton())
    problem = hg.Bilevel(inner_loss, losses)
    reference = hg.Bilevel(closed_over(inner_loss), tuple(map(closed_over, losses)))
    jacobian = hg.hypergradient(problem, estimator)(W, ALPHA).hypergradient
    expected = hg.hypergradient(reference, estimator)(PARAMETERS, ALPHA).hypergradient
    np.testing.assert_allclose(jacobian, expected, 1e-12)


@pytest.mark.parametrize(
    "estimator",
    [hg.Implicit(SGD), hg.SOBA(optax.sgd(0.1), optax.sgd(0.1))],
    ids=["Implicit", "SOBA"],
)
@pytest.mark.parametrize("record_every", [1, 3])
def test_run_is_that_of_losses_that_close_over_the_key(estimator, record_every):
    def run(problem, w, metric):
        loop = hg.OuterLoop(
            problem, estimator, optax.sgd(0.1), metrics={"error": metric}
        )
        return loop.run(loop.init(w, ALPHA), num_steps=6, record_every=record_every)

    metric = lambda w, alpha, key: outer_loss(w, alpha, None)
    trace = run(PROBLEM, W, metric)
    expected = run(REFERENCE, PARAMETERS, closed_over(metric))
    assert_same_trace(trace, expected)


def test_run_goes_on_from_its_state():
    loop = hg.OuterLoop(PROBLEM, hg.Implicit(SGD), optax.sgd(0.1))
    whole = loop.run(loop.init(W, ALPHA), num_steps=6)
    part = loop.run(loop.init(W, ALPHA), num_steps=2)
    rest = loop.run(part.state, num_steps=4)
    assert rest.alpha.tolist() == whole.alpha.tolist()
    assert_same_w(rest.w, whole.w["scale"])


def test_certificate_sees_the_key():
    w = jax.jit(hg.argmin(inner_loss, hg.Newton()))(W, ALPHA)
    certificate = hg.certify(PROBLEM, w, ALPHA)
    expected = hg.certify(REFERENCE, w["scale"], ALPHA)
    np.testing.assert_allclose(
        certificate.corrected_hypergradient, expected.corrected_hypergradient, 1e-10
    )
    assert bool(certificate.trusted) == bool(expected.trusted)
    assert_same_w(certificate.corrected_w, certificate.corrected_w["scale"])


def test_argmin_is_differentiable_beside_a_key():
    solution = hg.argmin(inner_loss, hg.Newton())
    reference = hg.argmin(closed_over(inner_loss), hg.Newton())
    expected = jax.jacobian(lambda alpha: reference(PARAMETERS, alpha))(ALPHA)
    derivative = jax.jacobian(lambda alpha: solution(W, alpha)["scale"])(ALPHA)
    np.testing.assert_allclose(derivative, expected, 1e-10)
    assert_same_w(solution(W, ALPHA), reference(PARAMETERS, ALPHA))


@pytest.mark.parametrize(
    "searcher",
    [
        hg.searchers.Random(),
        hg.searchers.PopulationBasedTraining(4),
        hg.searchers.SuccessiveHalving(4),
        hg.searchers.OneShot(4),
    ],
    ids=lambda searcher: type(searcher).__name__,
)
def test_search_gives_the_key_to_losses_and_metrics(searcher):
    def search(problem, w, metric):
        return hg.search(
            problem, SGD, searcher, w, budget=80, metrics={"error": metric},
            space=hg.spaces.Box(-1.0, 1.0, shape=(2,)),
        )  # fmt: skip

    metric = lambda w, alpha, key: outer_loss(w, alpha, None)
    trace = search(PROBLEM, W, metric)
    expected = search(REFERENCE, PARAMETERS, closed_over(metric))
    assert_same_trace(trace, expected)


def test_diagnosis_and_profile_see_the_key():
    estimator = hg.Implicit(hg.Newton())
    assert hg.diagnose(PROBLEM, estimator, W, ALPHA) == ()
    infinite = hg.Bilevel(
        lambda w, alpha, batch: inner_loss(w, alpha, batch) / (w["count"] - 5.0),
        outer_loss,
    )
    assert "inner_loss" in hg.diagnose(infinite, estimator, W, ALPHA)[0]
    assert hg.profile(PROBLEM, estimator, W, ALPHA, num_calls=1).seconds > 0


def test_whole_state_of_a_model_with_dropout_is_a_w():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 1, param_dtype=float, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.linear(self.dropout(x))[:, 0]

    graph, state = nnx.split(Network(nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (20, 3))

    def loss(state, alpha, batch):
        model = nnx.merge(graph, state, copy=True)
        parameters = jax.tree.leaves(nnx.filter_state(state, nnx.Param))
        penalty = sum(jnp.sum(leaf**2) for leaf in parameters)
        return jnp.mean((model(x) - x[:, 0]) ** 2) + jnp.exp(alpha) * penalty

    estimate_fn = hg.hypergradient(hg.Bilevel(loss, loss), hg.Unrolled(SGD))
    alpha, step = jnp.array(-1.0), 1e-4
    estimate = estimate_fn(state, alpha)
    assert jax.tree.structure(estimate.w) == jax.tree.structure(state)
    is_equal = lambda x, y: (x == y).all()
    equal = jax.tree.map(is_equal, estimate.w["dropout"], state["dropout"])
    assert all(jax.tree.leaves(equal))
    values = [estimate_fn(state, alpha + change).value for change in (-step, step)]
    difference = (values[1] - values[0]) / (2 * step)
    np.testing.assert_allclose(estimate.hypergradient, difference, 1e-5)


@pytest.mark.parametrize("w", [KEY, {"a": KEY, "b": COUNT}])
def test_w_without_parameters_is_refused(w):
    with pytest.raises(ValueError, match="w must hold at least one floating-point"):
        hg.hypergradient(PROBLEM, hg.Implicit(hg.Newton()))(w, ALPHA)


def test_other_integers_in_w_are_refused():
    with pytest.raises(TypeError, match=r"w\['scale'\] must be floating-point"):
        hg.hypergradient(PROBLEM, hg.Implicit(hg.Newton()))(
            W | {"scale": jnp.array([1, 2, 3])}, ALPHA
        )


def entry_points(problem, estimator, optimizer):
    """Returns functions of ``w`` that call what takes a problem and a ``w``."""
    return {
        "hypergradient": lambda w: hg.hypergradient(problem, estimator)(w, ALPHA),
        "minimize": lambda w: hg.minimize(
            problem, estimator, optimizer, w, ALPHA, num_steps=1
        ),
        "certify": lambda w: hg.certify(problem, w, ALPHA),
        "diagnose": lambda w: hg.diagnose(problem, estimator, w, ALPHA),
    }


@pytest.mark.parametrize("name", entry_points(None, None, None))
def test_a_second_call_with_another_key_traces_nothing_and_keeps_no_w(name):
    num_traces = []

    def counting_loss(w, alpha, batch):
        num_traces.append(1)
        return inner_loss(w, alpha, batch)

    problem = hg.Bilevel(counting_loss, outer_loss)
    call = entry_points(problem, hg.Implicit(hg.Newton()), optax.sgd(0.1))[name]
    call(W)
    num_traces.clear()
    other = W | {"scale": PARAMETERS + 1.0, "key": jax.random.key(4)}
    reference = weakref.ref(other["scale"])
    call(other)
    assert not num_traces
    del other
    gc.collect()
    assert reference() is None


def test_no_tracer_of_a_key_is_kept():
    estimate_fn = hg.hypergradient(PROBLEM, hg.Implicit(hg.Newton()))
    with jax.checking_leaks():
        value = jax.jit(lambda key: estimate_fn(W | {"key": key}, ALPHA).value)(KEY)
    assert value == estimate_fn(W, ALPHA).value


def test_results_are_printed_without_the_key():
    estimator = hg.Implicit(hg.Newton())
    estimate = hg.hypergradient(PROBLEM, estimator)(W, ALPHA)
    trace = hg.minimize(PROBLEM, estimator, optax.sgd(0.1), W, ALPHA, num_steps=2)
    certificate = hg.certify(PROBLEM, estimate.w, ALPHA, estimate)
    for result in (estimate, trace, certificate):
        assert "key" not in repr(result)
        assert "<table" in result._repr_html_()
    assert f"['scale']: [{float(estimate.w['scale'][0]):.6g}" in repr(estimate)


def test_storage_counts_the_parameters():
    estimator = hg.Unrolled(SGD)
    expected = estimator.storage(REFERENCE, PARAMETERS, ALPHA)
    assert estimator.storage(PROBLEM, W, ALPHA) == expected
    shapes = jax.eval_shape(lambda: W)
    assert estimator.storage(PROBLEM, shapes, ALPHA) == expected


def test_a_model_with_a_key_is_loaded_only_into_its_shapes(tmp_path):
    save = functools.partial(hg.models.save, folder=tmp_path)
    save("model", W, ALPHA)
    w, _ = hg.models.load("model", folder=tmp_path, like=(W, ALPHA))
    assert_same_w(w, PARAMETERS)
    other = W | {"scale": jnp.zeros(7)}
    with pytest.raises(ValueError, match="like must have the names and shapes"):
        hg.models.load("model", folder=tmp_path, like=(other, ALPHA))


@pytest.mark.parametrize("estimator", [hg.Implicit(hg.Newton()), hg.Unrolled(SGD)])
def test_diagnosis_names_a_derivative_that_is_lost_beside_a_key(estimator):
    def stopped_loss(w, alpha, batch):
        shift = jax.lax.stop_gradient(w["scale"])
        lossy = jnp.sum(shift * (w["scale"] - alpha[0]) ** 2)
        return lossy + inner_loss(w, alpha, batch)

    problem = hg.Bilevel(stopped_loss, outer_loss)
    (sentence,) = hg.diagnose(problem, estimator, W, ALPHA)
    assert sentence.startswith("inner_loss loses derivatives in stop_gradient")


def test_shapes_are_enough_to_load_a_model_with_a_key(tmp_path):
    hg.models.save("model", W, ALPHA, folder=tmp_path)
    shapes = jax.eval_shape(lambda: (W, ALPHA))
    w, _ = hg.models.load("model", folder=tmp_path, like=shapes)
    assert_same_w(w, PARAMETERS)
