"""The table `rq4`: its encoders and losses, certificates, tuning and findings."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.linear_model import Ridge

import hypergrad as hg
from benchmarks import rq4
from benchmarks.shared import rq4_running, rq4_tasks
from benchmarks.shared.rq4_running import (
    AUGMENTATIONS,
    HAND,
    LEARNED,
    NONE,
    RANDOM,
    VALIDATION,
)
from benchmarks.shared.rq4_tasks import ARCHITECTURES, FIXED, HEADS, OBJECTIVES, WIDTH
from hypergrad.bench import Finding, select
from hypergrad.trees import relative_error

# Encoders.


def images(num, seed=0):
    return np.random.default_rng(seed).uniform(size=(num, 8, 8))


def weights(name, objective="autoencoder"):
    """Of an encoder, none of them zero."""
    w = rq4_tasks.init_w(name, objective, 3)
    return jax.tree.map(lambda leaf: leaf + 0.1, w["encoder"])


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_features_of_a_network_fit_its_head(name, objective):
    """Sixteen of them; softmax regression reads the pixels."""
    w, x = rq4_tasks.init_w(name, objective, 0), jnp.asarray(images(3))
    regression = (name, objective) == ("linear", "supervised")
    f = ARCHITECTURES[name].features(w["encoder"], x)
    assert f.shape == (3, 64 if regression else WIDTH)
    outputs = {"supervised": 10, "self-supervised": None, "autoencoder": 64}[objective]
    assert ("head" in w) == (outputs is not None)
    if outputs:
        assert w["head"]["W"].shape == (f.shape[1], outputs)


def test_attention_is_the_formula_head_by_head():
    """``softmax(Q K' / sqrt(d)) V`` by loops."""
    w, rng = weights("ViT")["attention"], np.random.default_rng(1)
    h, d = rng.normal(size=(3, 4, WIDTH)), WIDTH // HEADS
    expected = np.empty_like(h)
    for n in range(3):
        for head in range(HEADS):
            its = slice(head * d, (head + 1) * d)
            q, k, v = (
                h[n] @ np.asarray(w[x])[:, its] for x in ("query", "key", "value")
            )
            weight = np.exp(q @ k.T / np.sqrt(d))
            expected[n, :, its] = weight / weight.sum(axis=1, keepdims=True) @ v
    result = rq4_tasks.attention(w, jnp.asarray(h))
    np.testing.assert_allclose(result, expected @ np.asarray(w["out"]), rtol=1e-12)


def test_patches_are_the_four_quarters_of_an_image():
    """Where attention and the hidden layer add nothing, the mean of their layers."""
    w = jax.tree.map(jnp.zeros_like, weights("ViT"))
    w["first"]["W"], x = jnp.eye(16), images(2)
    quarters = [x[:, i : i + 4, j : j + 4] for i in (0, 4) for j in (0, 4)]
    h = np.stack(quarters, axis=1).reshape(2, 4, 16)
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
    result = rq4_tasks.vit(w, jnp.asarray(x))
    np.testing.assert_allclose(result, np.tanh(h.mean(axis=1)), rtol=1e-12)


def test_places_tell_patches_apart():
    """An image and one whose quarters changed places have other features."""
    w, x = weights("ViT"), jnp.asarray(images(1))
    turned = jnp.concatenate([x[:, 4:], x[:, :4]], axis=1)
    away = lambda w: float(
        jnp.abs(rq4_tasks.vit(w, x) - rq4_tasks.vit(w, turned)).max()
    )
    w["place"] = jax.random.normal(jax.random.key(0), w["place"].shape)
    assert away(w) > 1e-3
    assert away(w | {"place": jnp.zeros_like(w["place"])}) < 1e-12


def test_the_convolution_is_xlas():
    """Then tanh, means over 2 by 2, and a layer of tanh."""
    w, x = weights("CNN"), images(2)
    kernel = np.asarray(w["filters"]["W"]).reshape(3, 3, 1, -1)
    dims = ("NHWC", "HWIO", "NHWC")
    maps = jax.lax.conv_general_dilated(
        jnp.asarray(x)[..., None], kernel, (1, 1), "VALID", dimension_numbers=dims
    )
    maps = np.tanh(np.asarray(maps) + np.asarray(w["filters"]["b"]))
    pooled = maps.reshape(2, 3, 2, 3, 2, -1).mean(axis=(2, 4)).reshape(2, -1)
    last = jax.tree.map(np.asarray, w["last"])
    expected = np.tanh(pooled @ last["W"] + last["b"])
    np.testing.assert_allclose(rq4_tasks.cnn(w, jnp.asarray(x)), expected, rtol=1e-12)


# Losses.


def tiny(objective, num=6):
    """Data of a few random images."""
    part = lambda seed: {"x": images(num, seed), "y": np.arange(num) % 10}
    train, val = part(1), part(2)
    train = jax.tree.map(jnp.asarray, train)
    data = (
        rq4_tasks.training_batch(train, 0.1, 0),
        rq4_tasks.evaluation_batch(train, val),
    )
    return jax.tree.map(jnp.asarray, data)


def test_magnitudes_of_zero_leave_an_image_as_it_is():
    """So that both views of it are the same, and contrast tells images apart."""
    train, _ = tiny("self-supervised")
    x = rq4_tasks.transformed(jnp.zeros(7), train)
    np.testing.assert_allclose(x, train["x"], atol=1e-12)
    np.testing.assert_array_equal(*jnp.split(train["x"], 2))


@pytest.mark.parametrize("name", ["linear", "MLP"])
def test_the_probe_is_scikit_learns_ridge(name):
    """On features and a constant, fitted where ``fit``; errors are on the others."""
    _, val = tiny("autoencoder", 12)
    w = rq4_tasks.init_w(name, "autoencoder", 0)
    f = ARCHITECTURES[name].features(w["encoder"], val["x"])
    f = np.concatenate([np.asarray(f), np.ones((len(f), 1))], axis=1)
    y, fit = np.eye(10)[np.asarray(val["y"])], np.asarray(val["fit"]) == 1
    ridge = Ridge(rq4_tasks.RIDGE, fit_intercept=False, solver="cholesky")
    expected = ridge.fit(f[fit], y[fit]).predict(f)
    names = name, "autoencoder"
    result = rq4_tasks.scores_of(*names, w, val)
    np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-12)
    error = ((expected - y) ** 2).sum(axis=1)[~fit].mean() / 2
    value = rq4_tasks.outer_loss(*names, w, jnp.zeros(7), val)
    np.testing.assert_allclose(value, error, rtol=1e-9)
    hits = (expected.argmax(axis=1) == np.asarray(val["y"]))[~fit].mean()
    assert float(rq4_tasks.accuracy(*names, w, val)) == pytest.approx(hits)


CELLS = [
    ("linear", "supervised"),
    *(
        pytest.param(*names, marks=pytest.mark.slow)
        for names in (
            ("MLP", "self-supervised"),
            ("CNN", "autoencoder"),
            ("ViT", "supervised"),
        )
    ),
]
EPSILON = 1e-5  # errors of its square, and of rounding over it, 1e-10 and 1e-11


@pytest.mark.parametrize(("name", "objective"), CELLS)
def test_the_hypergradient_of_magnitudes_is_that_of_central_differences(
    name, objective, monkeypatch
):
    """Through four inner steps; its costs are those that the budget counts."""
    monkeypatch.setattr(rq4_running, "NUM_STEPS", 4)
    data = tiny(objective)
    problem = rq4_tasks.problem_of(name, objective, *data)
    solver = hg.Descent(optax.sgd(0.05, momentum=0.9), 4)
    w, alpha = rq4_tasks.init_w(name, objective, 0), jnp.asarray(FIXED)

    @jax.jit
    def h(alpha):
        end, _ = solver.solve(problem.inner_loss, w, alpha, data[0], jax.random.key(0))
        return problem.outer_value(end, alpha, data[1])

    unrolled = hg.Unrolled(solver, checkpoint=True)
    result = hg.hypergradient(problem, unrolled)(w, alpha)
    sides = [(h(alpha + e), h(alpha - e)) for e in EPSILON * np.eye(7)]
    expected = [(up - down) / (2 * EPSILON) for up, down in sides]
    size = float(jnp.linalg.norm(result.hypergradient))
    assert size > 1e-6
    np.testing.assert_allclose(result.hypergradient, expected, atol=1e-6 * size)
    steps = rq4_running.num_outer_steps(problem)
    cost = float(result.stats["gradient_equivalents"])
    assert steps * cost <= rq4_running.BUDGET < (steps + 1) * cost


# Certificates.


@pytest.mark.slow
def test_a_certified_error_is_the_true_one():
    """Softmax regression, by a dense solve at the minimum that Newton's method finds.

    A certificate trusts its truth to a hundredth, so that errors are known to that.
    """
    names = "linear", "supervised"
    data = tiny("supervised", 12)
    problem, w = rq4_tasks.problem_of(*names, *data), rq4_tasks.init_w(*names, 0)
    alpha = jnp.asarray(FIXED)
    solver = hg.Descent(optax.sgd(0.3, momentum=0.9), 20)
    result = hg.hypergradient(problem, hg.Unrolled(solver))(w, alpha)
    row = rq4_running.certificate_row(problem, result.w, alpha, result.hypergradient)
    assert row["certified"]

    flat, unravel = jax.flatten_util.ravel_pytree(result.w)
    inner = lambda w, alpha: problem.inner_loss(unravel(w), alpha, data[0])
    outer = lambda w: problem.outer_loss(unravel(w), alpha, data[1])
    slope, hessian = jax.grad(inner), jax.jit(jax.hessian(inner))
    cross = jax.jit(jax.jacfwd(slope, argnums=1))

    def dense(w):
        return -cross(w, alpha).T @ jnp.linalg.solve(
            hessian(w, alpha), jax.grad(outer)(w)
        )

    best = flat
    for _ in range(8):
        best = best - jnp.linalg.solve(hessian(best, alpha), slope(best, alpha))
    assert float(jnp.linalg.norm(slope(best, alpha))) < 1e-12
    truth = dense(best)
    error = float(relative_error(result.hypergradient, truth))
    assert error > 0.05
    assert row["error"] == pytest.approx(error, abs=0.01 * (1 + error))
    error = float(relative_error(dense(flat), truth))
    assert row["implicit_error"] == pytest.approx(error, abs=0.01 * (1 + error))


@pytest.mark.slow
def test_a_network_that_is_not_trained_has_no_certificate():
    """Its Hessian is indefinite, and the row says so."""
    names = "linear", "autoencoder"
    problem = rq4_tasks.problem_of(*names, *tiny("autoencoder"))
    w = jax.tree.map(lambda leaf: 0.01 * leaf, rq4_tasks.init_w(*names, 0))
    row = rq4_running.certificate_row(problem, w, jnp.asarray(FIXED), jnp.ones(7))
    assert row == {"certified": False, "reason": "negative curvature"}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"error_estimate": np.nan}, "corrections diverge"),
        ({"negative_curvature": True}, "negative curvature"),
        ({"adjoint_residual": 0.1}, "adjoint not solved"),
        ({"adjoint_residual": np.nan}, "adjoint not solved"),
        ({}, "corrections do not settle"),
    ],
)
def test_there_is_a_reason_for_every_missing_certificate(changed, reason):
    """The first reason that applies is stated."""
    trusted = {
        "error_estimate": 0.1,
        "negative_curvature": False,
        "adjoint_residual": 0.0,
    }
    assert rq4_running.reason(types.SimpleNamespace(**(trusted | changed))) == reason


def test_validation_only_trains_on_the_validation_images():
    """And has them in the probe; the test images are those of all rows."""
    parts = rq4_tasks.splits_of(0)
    usual, other = (rq4_tasks.data_of(1e-3, 0, on) for on in ("train", "val"))
    num = rq4_tasks.NUM_VAL
    np.testing.assert_array_equal(other[0]["x"][:num], parts["val"]["x"])
    np.testing.assert_array_equal(other[2]["x"][:num], parts["val"]["x"])
    np.testing.assert_array_equal(usual[0]["x"][:num], parts["train"]["x"])
    np.testing.assert_array_equal(usual[2]["x"][num:], other[2]["x"][num:])
    assert float(jnp.sum(usual[2]["is_evaluated"])) == len(parts["test"]["y"]) == 1397


# Tuning.


def test_a_training_of_the_tuning_is_that_of_a_row(monkeypatch):
    """At the row's rate and penalty both have the same loss after five steps."""
    monkeypatch.setattr(rq4_running, "NUM_TRAINING_STEPS", 5)
    names, rate, penalty = ("linear", "supervised"), 0.01, 0.02
    data, w = tiny("supervised"), rq4_tasks.init_w("linear", "supervised", 0)
    data = data[0] | {"penalty": jnp.asarray(penalty)}, data[1]
    row = rq4_running.finish(*names, rate, data, data[1], w, jnp.asarray(FIXED))
    pair = jnp.asarray([rate, penalty])
    loss = rq4_running.final_loss(*names, data, w, pair)
    np.testing.assert_allclose(loss, row["val_loss"], rtol=1e-12)
    other = rq4_running.final_loss(*names, data, w, pair * jnp.array([1.0, 3.0]))
    assert abs(float(other - loss)) > 1e-6


def test_tuning_takes_the_lowest_finite_loss(monkeypatch):
    """The loss is a bowl around rate 0.03 and penalty 0.01; rate 0.3 diverges."""

    def final_loss(architecture, objective, data, w, pair):
        squares = (jnp.log(pair) - jnp.log(jnp.array([0.03, 0.01]))) ** 2
        return jnp.where(pair[0] > 0.2, jnp.nan, jnp.sum(squares))

    monkeypatch.setattr(rq4_running, "final_loss", final_loss)
    monkeypatch.setattr(rq4_running, "TUNING_SEEDS", (0,))
    (cells, _) = rq4.table.stages("small", 1)
    rows = [cell | rq4.table.measure(cell, "small", []) for cell in cells]
    assert [(row["rate"], row["penalty"]) for row in rows] == [(0.03, 0.01)] * 3
    assert rows[0]["ends"][-4:] == [None] * 4
    text = "\n".join(rq4.table.stage_body("tuning", rows))
    assert text.count("**0.0000**") == len(OBJECTIVES)
    assert "| supervised | 0.001 |" in text
    assert "edge" not in text
    edge = rq4.tuning_body([rows[0] | {"rate": 0.01}])
    assert edge[-1] == "- supervised: the rate is at an edge"


# Findings.

NOISE = (0.004, -0.002, 0.001, 0.003, -0.001)


def make_rows(accuracy=None):
    """Returns all planned rows; ``accuracy`` is by (objective, augmentation)."""
    rows = []
    for cell in rq4.table.cells("small", 5):
        objective, augmentation = cell["objective"], cell["method"]
        mean = (accuracy or {}).get((objective, augmentation), 0.5)
        has_chosen = augmentation in (LEARNED, RANDOM)
        row = cell | {
            "accuracy": mean + NOISE[cell["seed"]] * (augmentation == LEARNED),
            "val_loss": 1.0, "gradient_equivalents": 2952.0 * has_chosen,
            "steps": 36 * has_chosen, "best": 30 * has_chosen,
            "alpha": [0.9 if cell["architecture"] == "ViT" else 0.5] * 7,
        }  # fmt: skip
        if augmentation == LEARNED:
            seed = cell["seed"]
            row |= {"certified": True, "reason": None, "error": 0.1 * (1 + seed)}
            if seed == 4:
                row |= {"certified": False, "reason": "negative curvature"}
        rows.append(row)
    return rows


def line(rows, *words) -> Finding:
    """Returns the one finding with all of the words."""
    (finding,) = [x for x in rq4.findings(rows) if all(w in x.text for w in words)]
    return finding


@pytest.mark.parametrize("baseline", [HAND, NONE, RANDOM])
def test_learned_augmentation_must_be_better(baseline):
    """Two points are a gain; none and fewer are not. The mean is over networks."""
    words = f"learned over {baseline} in accuracy, objective autoencoder"
    for mean, outcome in (
        (0.48, "supported"), (0.5, "not supported"), (0.6, "contradicted")
    ):  # fmt: skip
        rows = make_rows({("autoencoder", baseline): mean})
        assert line(rows, words).outcome == outcome


def test_one_network_moves_the_mean_by_a_quarter():
    """The mean is over four networks."""
    rows = make_rows()
    for row in rows:
        if (row["architecture"], row["method"]) == ("CNN", HAND):
            row["accuracy"] -= 0.04
    finding = line(rows, "learned over fixed", "objective supervised")
    assert ": +0.011 [" in finding.text


def test_a_training_that_diverges_is_stated():
    """The finding names the network, the augmentation and the number of seeds."""
    rows = make_rows()
    assert not any("diverges" in x.text for x in rq4.findings(rows))
    for row in select(rows, objective="autoencoder", method=NONE):
        if row["architecture"] == "linear" and row["seed"] < 2:
            row["val_loss"] = None  # as in a file
    text = line(rows, "diverges").text
    assert text == "autoencoder: training linear diverges, none, on 2 of 5 seeds"


def test_training_on_validation_is_compared_without_a_claim():
    """A higher accuracy there is reported."""
    rows = make_rows({("supervised", VALIDATION): 0.6})
    finding = line(rows, "learned against validation-only", "objective supervised")
    assert ": worse, gain -0.099" in finding.text
    assert finding.outcome is None


def test_learned_magnitudes_stand_beside_those_of_the_images():
    """They are means over networks and seeds."""
    text = line(make_rows(), "autoencoder, learned on average").text
    assert "translate_x 0.60 (1), rotate 0.60 (0.79), scale 0.60 (0)" in text


def test_certificates_are_counted_with_their_errors_and_reasons():
    """They are counted over the seeds of each network."""
    lines = [x.text for x in rq4.findings(make_rows()) if "certificates" in x.text]
    assert len(lines) == len(OBJECTIVES)
    text = "CNN 4 of 5, error 1.0e-01 to 4.0e-01, negative curvature (1)"
    assert all(text in line for line in lines)
    none = rq4.certificate_text([{"certified": False, "reason": "adjoint not solved"}])
    assert none == "0 of 1, adjoint not solved (1)"


def test_an_exceeded_budget_fails_and_every_row_is_printed(tmp_path):
    """A row without hypergradients has no certificate."""
    rows = make_rows({("supervised", NONE): 0.4})
    (check,) = rq4.table.checks
    assert check.evaluate(rows).outcome == "holds"
    assert check.evaluate([rows[0] | {"gradient_equivalents": 3001.0}]).failed
    text = "\n".join(rq4.body(rows))
    assert text.count("\n| ") == len(OBJECTIVES) * (
        1 + len(ARCHITECTURES) * len(AUGMENTATIONS)
    )
    assert "| linear | none | 40.0 ± 0.0 | 1.000 | - | - | - | - |" in text
    assert "| CNN | learned | 50.1 ± 0.3 | 1.000 | 36 | 30 | 2,952 | 4 of 5, " in text
    rq4.plot(rows, tmp_path / "rq4.png")
    assert (tmp_path / "rq4.png").stat().st_size > 10_000
