"""Proposed temperatures, and the gap of surrogate and metric along a run."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.metrics as skm
from hypothesis import given, settings
from hypothesis import strategies as st

import hypergrad as hg
from hypergrad import surrogates as sg
from tests.loops import run_loop
from tests.surrogates.surrogate_cases import N, make_rng, sample

SIZE = 300
FAMILIES = {
    "normal": lambda rng, y: rng.normal(size=y.size) + rng.uniform(0, 4) * y,
    "cauchy": lambda rng, y: rng.standard_cauchy(size=y.size) + 3 * y,
    "log-normal": lambda rng, y: np.exp(1.5 * rng.normal(size=y.size)) * (2 * y - 1),
    "uniform": lambda rng, y: rng.uniform(0, 1, size=y.size) * (2 * y - 1),
    "separated": lambda rng, y: 10 * (2 * y - 1) + 0.01 * rng.normal(size=y.size),
    "near ties": lambda rng, y: rng.normal(size=y.size) ** 5 + 0.1 * (2 * y - 1),
}
seeds = st.integers(0, 2**32 - 1)
propose = eqx.filter_jit(sg.temperature_from_scores)


@eqx.filter_jit
def gaps_and_slopes(scores, targets):
    """Returns temperature, gap and mean slope for accuracy, AUC and F1.

    Slopes are at the examples, at pairs of opposite classes, and at the examples for
    each example of the rarer class.
    """
    opposite = (targets == 1)[:, None] & (targets == 0)[None, :]
    rarer = jnp.minimum(jnp.mean(targets), jnp.mean(1 - targets))
    mean, pairs = jnp.full(SIZE, 1 / SIZE), scores[:, None] - scores[None, :]
    rows = []
    for surrogate, settings_, differences, mass in (
        (sg.Accuracy(), {"threshold": 0.0}, scores, mean),
        (sg.AUC(), {"targets": targets}, pairs, opposite / opposite.sum()),
        (
            sg.FBeta(),
            {"targets": targets, "threshold": 0.0},
            scores,
            mean / (2 * rarer),
        ),
    ):
        temperature = sg.temperature_from_scores(scores, **settings_)
        sigmoid = jax.nn.sigmoid(differences / temperature)
        value = surrogate(scores, targets, temperature=temperature)
        gap = jnp.abs(value - surrogate.exact(scores, targets))
        rows.append([temperature, gap, jnp.sum(mass * sigmoid * (1 - sigmoid))])
    return jnp.array(rows)


@settings(deadline=None, max_examples=80)
@given(
    family=st.sampled_from(list(FAMILIES)),
    seed=seeds,
    exponent=st.floats(-3, 3),
    positive_fraction=st.sampled_from([0.5, 0.2, 0.03]),
)
def test_the_gap_is_small_and_the_slope_does_not_vanish(
    family, seed, exponent, positive_fraction
):
    """Over six orders of scale, for separated, overlapping, common and rare classes.

    The gap is 0.05 (three times that for F1), and the mean slope at least half of it,
    to a tenth because quantiles stand for pairs.
    """
    rng = np.random.default_rng(seed)
    targets = (rng.random(SIZE) < positive_fraction).astype(int)
    targets[:2] = 0, 1
    scores = 10**exponent * FAMILIES[family](rng, targets)
    temperatures, gaps, slopes = np.asarray(gaps_and_slopes(scores, targets)).T
    assert np.all(gaps <= np.array([0.05, 0.055, 0.15]) + 1e-9)
    assert np.all(slopes >= 0.9 * 0.025)
    assert np.all(temperatures > 0)


def test_temperatures_scale_with_the_scores_and_resist_outliers(key):
    """A fraction e of huge scores takes at most e / 2 from the mean that is the gap.

    It takes nearly e for pairs, to a tenth of the gap because quantiles stand for them.
    """
    rng = make_rng(key)
    targets = np.arange(SIZE) % 2
    scores = rng.normal(size=SIZE) + targets
    wild = np.where(np.arange(SIZE) % 80 < 2, 1e6, 1) * scores
    for options, bounds in (
        ({"threshold": 0.0}, (0.05, 0.0635)),
        ({"targets": targets}, (0.045, 0.08)),
    ):
        run = lambda s, gap=0.05, o=options: float(
            propose(s, gap=jnp.asarray(gap), **o)
        )
        np.testing.assert_allclose(run(1e3 * scores), 1e3 * run(scores))
        lower, upper = (run(scores, gap) for gap in bounds)
        assert lower <= run(wild) <= upper


def test_a_temperature_is_a_constant_with_masks_labels_and_ties(key):
    rng = make_rng(key)
    scores, targets = sample("classes", rng)
    accuracy = lambda y, t: sg.Accuracy()(scores, y, temperature=t)
    value = accuracy(scores.argmax(1), propose(scores))
    np.testing.assert_allclose(1 - value, 0.05, rtol=1e-6)
    gap = accuracy(targets, propose(scores, targets)) - sg.Accuracy().exact(
        scores, targets
    )
    assert abs(gap) <= 0.05
    assert not np.any(jax.grad(lambda s: propose(s, targets))(scores))
    assert propose(np.zeros((N, 5), np.float32)) == 1
    where = np.arange(N) < N // 2
    dirty, kept = np.where(where[:, None], scores, np.nan), scores[: N // 2]
    np.testing.assert_allclose(propose(dirty, where=where), propose(kept))
    labels = rng.integers(0, 2, size=(N, 5))
    masked = propose(dirty, labels, threshold=0.0, where=where)
    expected = propose(kept.ravel(), labels[: N // 2].ravel(), threshold=0.0)
    np.testing.assert_allclose(masked, expected)
    one_class = propose(scores[:, 0], np.ones(N, int), threshold=0.0)
    np.testing.assert_allclose(one_class, propose(scores[:, 0], threshold=0.0))


def test_gap_metrics_follow_the_temperature_of_a_run():
    """Exact metric, surrogate and gap at each step of a falling temperature."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, 2))
    y = (x[:, 0] + 0.5 * rng.normal(size=N) > 0).astype(int)
    predict = lambda w, alpha, batch: batch @ w
    f1, schedule = sg.FBeta(), optax.exponential_decay(0.5, 1, 0.7)

    def inner(w, alpha, batch):
        loss = jnp.mean(jax.nn.softplus((1 - 2 * batch[1]) * (batch[0] @ w)))
        return loss + 0.5 * jnp.sum(jnp.exp(alpha) * w**2)

    def outer(w, alpha, batch):
        return -f1(batch[0] @ w, batch[1], temperature=batch[2])

    metrics = sg.gap_metrics(
        "f1", f1, predict, x, y, temperature=1.0, schedule=schedule
    )
    trace = run_loop(
        hg.Bilevel(inner, outer, (x, y), (x, y, 0.5)), hg.Implicit(hg.Newton()),
        optax.sgd(0.5), jnp.zeros(2), jnp.zeros(2), num_steps=3, metrics=metrics,
        outer_data_fn=lambda step, data: (x, y, schedule(step).astype(float)),
    )  # fmt: skip
    smooth, exact = trace.metrics["f1_surrogate"], trace.metrics["f1"]
    np.testing.assert_allclose(-smooth, trace.value)
    np.testing.assert_allclose(trace.metrics["f1_gap"], smooth - exact)
    assert np.all(smooth != exact)
    np.testing.assert_allclose(exact[-1], skm.f1_score(y, x @ trace.w > 0))


def test_gap_metrics_take_a_rule_of_the_temperature_masks_and_any_surrogate(key):
    """The rule receives mask and weights; a surrogate needs `__call__` and `exact`."""

    class Duck:
        exact = staticmethod(sg.FBeta().exact)
        __call__ = lambda self, *args, **kwargs: sg.FBeta()(*args, **kwargs)

    scores, targets = sample("binary", make_rng(key))
    where, weights = np.arange(N) % 3 > 0, np.arange(N) % 4 + 0.5
    rule = functools.partial(propose, threshold=0.0)
    predict = lambda w, alpha, batch: batch * w
    dirty = np.where(where, scores, np.nan), np.where(where, targets, -1)
    options = {"temperature": rule, "where": where, "weights": weights}
    metrics = sg.gap_metrics("f1", Duck(), predict, *dirty, **options)
    kept, options = (scores[where], targets[where]), {"weights": weights[where]}
    temperature = rule(*kept, **options)
    expected = sg.FBeta()(*kept, temperature=temperature, **options)
    value = metrics["f1_surrogate"](jnp.ones(()), None, key)
    np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_gains_above_zero_are_positive():
    """As data of a metric, whose targets are traced, and outside of any program."""
    scores, gains = jax.random.normal(jax.random.key(0), (12,)), jnp.arange(12) % 4
    expected = sg.temperature_from_scores(scores, gains > 0)
    assert sg.temperature_from_scores(scores, gains) == expected
    predict = lambda w, alpha, batch: batch * w
    metrics = sg.gap_metrics(
        "ndcg", sg.NDCG(5), predict, scores, gains,
        temperature=sg.temperature_from_scores,
    )  # fmt: skip
    value = eqx.filter_jit(metrics["ndcg_surrogate"])(jnp.ones(()), None, None)
    smooth = sg.NDCG(5)(scores, gains, temperature=expected)
    np.testing.assert_allclose(value, smooth, rtol=1e-6)
