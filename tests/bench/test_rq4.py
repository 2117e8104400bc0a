"""The table `rq4`: its encoders and losses, what a row knows, and how it judges."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypergrad.studies import record
from hypergrad.studies.table import check
from sklearn.linear_model import Ridge

import hypergrad as hg
from benchmarks import rq4, rq4_grid, rq4_tasks
from benchmarks.rq4 import AUGMENTATIONS, HAND, LEARNED, NONE, RANDOM, VALIDATION, of
from benchmarks.shared.rq4_tasks import ARCHITECTURES, FIXED, HEADS, OBJECTIVES, WIDTH
from hypergrad.trees import relative_error

# Encoders.


def images(num, seed=0):
    return np.random.default_rng(seed).uniform(size=(num, 8, 8))


def weights(name, objective="autoencoder"):
    """Of an encoder, none of them zero."""
    w = rq4_tasks.start(name, objective, 3)
    return jax.tree.map(lambda leaf: leaf + 0.1, w["encoder"])


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_features_of_a_network_fit_its_head(name, objective):
    """Sixteen of them; softmax regression reads the pixels."""
    w, x = rq4_tasks.start(name, objective, 0), jnp.asarray(images(3))
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
    found = rq4_tasks.attention(w, jnp.asarray(h))
    np.testing.assert_allclose(found, expected @ np.asarray(w["out"]), rtol=1e-12)


def test_patches_are_the_four_quarters_of_an_image():
    """Where attention and the hidden layer add nothing, the mean of their layers."""
    w = jax.tree.map(jnp.zeros_like, weights("ViT"))
    w["first"]["W"], x = jnp.eye(16), images(2)
    quarters = [x[:, i : i + 4, j : j + 4] for i in (0, 4) for j in (0, 4)]
    h = np.stack(quarters, axis=1).reshape(2, 4, 16)
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
    found = rq4_tasks.vit(w, jnp.asarray(x))
    np.testing.assert_allclose(found, np.tanh(h.mean(axis=1)), rtol=1e-12)


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
    data = rq4_tasks.to_train(train, 0.1, 0), rq4_tasks.to_judge(train, val)
    return jax.tree.map(jnp.asarray, data)


def test_magnitudes_of_zero_leave_an_image_as_it_is():
    """So that both views of it are the same, and contrast tells images apart."""
    train, _ = tiny("self-supervised")
    x = rq4_tasks.transformed(jnp.zeros(7), train)
    np.testing.assert_allclose(x, train["x"], atol=1e-12)
    np.testing.assert_array_equal(*jnp.split(train["x"], 2))


@pytest.mark.parametrize("name", ["linear", "MLP"])
def test_the_probe_is_scikit_learns_ridge(name):
    """On features and a constant, fitted where ``fit``; errors are where ``judge``."""
    _, val = tiny("autoencoder", 12)
    w = rq4_tasks.start(name, "autoencoder", 0)
    f = ARCHITECTURES[name].features(w["encoder"], val["x"])
    f = np.concatenate([np.asarray(f), np.ones((len(f), 1))], axis=1)
    y, fit = np.eye(10)[np.asarray(val["y"])], np.asarray(val["fit"]) == 1
    ridge = Ridge(rq4_tasks.RIDGE, fit_intercept=False, solver="cholesky")
    expected = ridge.fit(f[fit], y[fit]).predict(f)
    names = name, "autoencoder"
    found = rq4_tasks.scores_of(*names, w, val)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
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
    monkeypatch.setattr(rq4, "STEPS", 4)
    data = tiny(objective)
    problem = rq4_tasks.problem_of(name, objective, *data)
    solver = hg.Descent(optax.sgd(0.05, momentum=0.9), 4)
    w, alpha = rq4_tasks.start(name, objective, 0), jnp.asarray(FIXED)

    @jax.jit
    def h(alpha):
        end, _ = solver.solve(problem.inner_loss, w, alpha, data[0], jax.random.key(0))
        return problem.outer_value(end, alpha, data[1])

    found = hg.hypergradient(problem, hg.Unrolled(solver))(w, alpha)
    sides = [(h(alpha + e), h(alpha - e)) for e in EPSILON * np.eye(7)]
    expected = [(up - down) / (2 * EPSILON) for up, down in sides]
    size = float(jnp.linalg.norm(found.hypergradient))
    assert size > 1e-6
    np.testing.assert_allclose(found.hypergradient, expected, atol=1e-6 * size)
    steps = rq4.outer_steps(problem)
    cost = float(found.stats["gradient_equivalents"])
    assert steps * cost <= rq4.BUDGET < (steps + 1) * cost


# What a row knows.


@pytest.mark.slow
def test_a_certified_error_is_the_true_one():
    """Softmax regression, by a dense solve at the minimum that Newton's method finds.

    A certificate trusts its truth to a hundredth, so that errors are known to that.
    """
    names = "linear", "supervised"
    data = tiny("supervised", 12)
    problem, w = rq4_tasks.problem_of(*names, *data), rq4_tasks.start(*names, 0)
    alpha = jnp.asarray(FIXED)
    solver = hg.Descent(optax.sgd(0.3, momentum=0.9), 20)
    found = hg.hypergradient(problem, hg.Unrolled(solver))(w, alpha)
    row = rq4.certified(problem, found.w, alpha, found.hypergradient)
    assert row["certified"]

    flat, unravel = jax.flatten_util.ravel_pytree(found.w)
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
    error = float(relative_error(found.hypergradient, truth))
    assert error > 0.05
    assert row["error"] == pytest.approx(error, abs=0.01 * (1 + error))
    error = float(relative_error(dense(flat), truth))
    assert row["implicit_error"] == pytest.approx(error, abs=0.01 * (1 + error))


@pytest.mark.slow
def test_a_network_that_is_not_trained_has_no_certificate():
    """Its Hessian is indefinite, and the row says so."""
    names = "linear", "autoencoder"
    problem = rq4_tasks.problem_of(*names, *tiny("autoencoder"))
    w = jax.tree.map(lambda leaf: 0.01 * leaf, rq4_tasks.start(*names, 0))
    row = rq4.certified(problem, w, jnp.asarray(FIXED), jnp.ones(7))
    assert row == {"certified": False, "reason": "negative curvature"}


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        ({"error_estimate": np.nan}, "corrections diverge"),
        ({"negative_curvature": True}, "negative curvature"),
        ({"adjoint_residual": 0.1}, "adjoint not solved"),
        ({"adjoint_residual": np.nan}, "adjoint not solved"),
        ({}, "corrections do not settle"),
    ],
)
def test_there_is_a_reason_for_every_lack(seen, said):
    """The first that holds."""
    well = {"error_estimate": 0.1, "negative_curvature": False, "adjoint_residual": 0.0}
    assert rq4.reason(types.SimpleNamespace(**(well | seen))) == said


def test_validation_only_trains_on_the_validation_images():
    """And has them in the probe; the test images are those of all rows."""
    parts = rq4_tasks.parts_of(0)
    usual, other = (rq4_tasks.data_of("autoencoder", 0, on) for on in ("train", "val"))
    num = rq4_tasks.NUM_VAL
    np.testing.assert_array_equal(other[0]["x"][:num], parts["val"]["x"])
    np.testing.assert_array_equal(other[2]["x"][:num], parts["val"]["x"])
    np.testing.assert_array_equal(usual[0]["x"][:num], parts["train"]["x"])
    np.testing.assert_array_equal(usual[2]["x"][num:], other[2]["x"][num:])
    assert float(jnp.sum(usual[2]["judge"])) == len(parts["test"]["y"]) == 1397


# The grid.


def test_a_training_of_the_grid_is_that_of_a_row(monkeypatch):
    """At the row's rate and penalty; five steps."""
    for module in (rq4, rq4_grid):
        monkeypatch.setattr(module, "TRAINING", 5)
    names = "linear", "supervised"
    data, w = tiny("supervised"), rq4_tasks.start("linear", "supervised", 0)
    data = data[0] | {"penalty": jnp.asarray(rq4_tasks.PENALTY["supervised"])}, data[1]
    pair = jnp.asarray([rq4.INNER_RATE["supervised"], rq4_tasks.PENALTY["supervised"]])
    row = rq4.finish(*names, data, data[1], w, jnp.asarray(FIXED))
    found = rq4_grid.end(*names, data, w, pair)
    np.testing.assert_allclose(found, row["val_loss"], rtol=1e-12)
    other = rq4_grid.end(*names, data, w, pair * jnp.array([1.0, 3.0]))
    assert abs(float(other - found)) > 1e-6


def tried(monkeypatch):
    """A bowl about rate 0.03 and penalty 0.01; rate 0.3 diverges."""

    def end(architecture, objective, data, w, pair):
        far = jnp.sum((jnp.log(pair) - jnp.log(jnp.array([0.03, 0.01]))) ** 2)
        return jnp.where(pair[0] > 0.2, jnp.nan, far)

    monkeypatch.setattr(rq4_grid, "end", end)
    monkeypatch.setattr(rq4_grid, "TUNING_SEEDS", (0,))
    cells = rq4_grid.TABLE.plan("small", 1)
    return [cell | rq4_grid.try_all(cell) for cell in cells]


def test_the_grid_takes_the_least_and_rq4_must_have_it(monkeypatch, tmp_path):
    """What diverges is told as such; where rq4 trains otherwise the check fails."""
    rows = tried(monkeypatch)
    assert [(row["rate"], row["penalty"]) for row in rows] == [(0.03, 0.01)] * 3
    assert rows[0]["ends"][-4:] == [None] * 4
    monkeypatch.setattr(rq4_grid, "INNER_RATE", dict.fromkeys(OBJECTIVES, 0.03))
    monkeypatch.setattr(rq4_grid, "PENALTY", dict.fromkeys(OBJECTIVES, 0.01))
    verdicts = rq4_grid.judge(rows)
    assert len(verdicts) == len(OBJECTIVES)
    assert not any(verdict.failed for verdict in verdicts)
    text = rq4_grid.markdown(rq4_grid.TABLE, rows, "the command")
    assert text.count("**0.0000**") == len(OBJECTIVES)
    assert "| supervised | 0.001 |" in text
    rq4_grid.plot(rows, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 10_000
    monkeypatch.setitem(rq4_grid.PENALTY, "autoencoder", 0.001)
    assert [verdict.failed for verdict in rq4_grid.judge(rows)] == [False, False, True]


def test_an_edge_of_the_grid_is_told():
    """Of the rate here."""
    row = {"method": "supervised", "rate": 0.01, "penalty": 0.01}
    assert any("rate is at an edge" in v.text for v in rq4_grid.judge([row]))


# Judging.

NOISE = (0.004, -0.002, 0.001, 0.003, -0.001)


def rows_of(accuracy=None, **changed):
    """All planned rows; those of ``(objective, augmentation)`` from ``accuracy``."""
    rows = []
    for cell in rq4.TABLE.plan("small", 5):
        objective, augmentation = cell["objective"], cell["augmentation"]
        mean = (accuracy or {}).get((objective, augmentation), 0.5)
        chose = augmentation in (LEARNED, RANDOM)
        row = cell | {
            "accuracy": mean + NOISE[cell["seed"]] * (augmentation == LEARNED),
            "val_loss": 1.0, "cost": 2952.0 * chose, "steps": 36 * chose,
            "best": 30 * chose,
            "alpha": [0.9 if cell["architecture"] == "ViT" else 0.5] * 7,
        }  # fmt: skip
        if augmentation == LEARNED:
            seed = cell["seed"]
            row |= {"certified": True, "reason": None, "error": 0.1 * (1 + seed)}
            if seed == 4:
                row |= {"certified": False, "reason": "negative curvature"}
        rows.append(row | changed)
    return rows


def said(rows, *words):
    """The one line with all of the words."""
    lines = [v for v in rq4.judge(rows) if all(word in v.text for word in words)]
    assert len(lines) == 1
    assert not lines[0].failed
    return lines[0].text


@pytest.mark.parametrize("second", [HAND, NONE, RANDOM])
def test_what_is_learned_must_be_better(second):
    """Two points are a gain, none is none, fewer are none; the mean of networks."""
    for mean, gain, end in ((0.48, "+2.1", True), (0.5, "+0.1", False)):
        rows = rows_of({("autoencoder", second): mean})
        text = said(
            rows, "(o) autoencoder: ", f"learned against {second}: {gain} points"
        )
        assert text.endswith(": reproduced" if end else ": not reproduced")
    rows = rows_of({("autoencoder", second): 0.6})
    text = said(rows, "(o) autoencoder: ", f"against {second}: -9.9")
    assert text.endswith(": not reproduced")


def test_one_network_moves_the_mean_by_a_quarter():
    """Of four."""
    rows = rows_of()
    for row in rows:
        if (row["architecture"], row["augmentation"]) == ("CNN", HAND):
            row["accuracy"] -= 0.04
    assert "+1.1 points" in said(rows, "(o) supervised: learned against fixed")


def test_a_training_that_diverges_is_told():
    """Where, and how often."""
    rows = rows_of()
    assert not any("diverges" in verdict.text for verdict in rq4.judge(rows))
    for row in of(rows, objective="autoencoder", augmentation=NONE):
        if row["architecture"] == "linear" and row["seed"] < 2:
            row["val_loss"] = None  # as a file has it
    text = said(rows, "diverges")
    assert text == "autoencoder: training linear diverges, none, on 2 of 5 seeds"


def test_training_on_validation_is_told_without_a_claim():
    """Who wins."""
    rows = rows_of({("supervised", VALIDATION): 0.6})
    text = said(rows, "loses to validation-only")
    assert text.startswith("supervised: learned loses to validation-only: -9.9")


def test_what_was_learned_stands_beside_what_the_images_have():
    """Means over networks and seeds."""
    text = said(rows_of(), "autoencoder, learned on average")
    assert "translate_y 0.60 (1), rotate 0.60 (0.79), scale 0.60 (0)" in text


def test_certificates_are_counted_with_their_errors_and_reasons():
    """Over the seeds of each network."""
    lines = [v.text for v in rq4.judge(rows_of()) if "certificates" in v.text]
    assert len(lines) == len(OBJECTIVES)
    text = "CNN 4 of 5, error 1.0e-01 to 4.0e-01, negative curvature (1)"
    assert all(text in line for line in lines)
    none = rq4.certificate_of([{"certified": False, "reason": "adjoint not solved"}])
    assert none == "0 of 1, adjoint not solved (1)"


def test_a_missing_row_few_seeds_and_an_excess_fail(tmp_path):
    """By `--check`; the report shows every row, and what has no hypergradient."""
    made = dict.fromkeys(("device", "python", *record.PACKAGES), "x")
    rows = [row | made for row in rows_of({("supervised", NONE): 0.4})]
    path = tmp_path / "rq4.jsonl"

    def verdicts(rows):
        path.write_text("".join(map(record.line, rows)))
        return check(rq4.TABLE, tmp_path)

    failed = lambda rows, word: any(v.failed and word in v.text for v in verdicts(rows))
    assert not any(verdict.failed for verdict in verdicts(rows))
    assert failed(rows[:-1], "missing")
    assert failed([row for row in rows if row["seed"] < 4], "too few seeds")
    assert failed([*rows[:-1], rows[-1] | {"cost": 3001.0}], "spent 3,001")
    lost = [row | {"accuracy": np.nan} if row is rows[10] else row for row in rows]
    assert failed(lost, "a row has no number")
    text = rq4.markdown(rq4.TABLE, rows, "the command")
    assert text.count("\n| ") == len(OBJECTIVES) * (
        1 + len(ARCHITECTURES) * len(AUGMENTATIONS)
    )
    assert "| linear | none | 40.0 ± 0.0 | 1.000 | - | - | - | - |" in text
    assert "| CNN | learned | 50.1 ± 0.3 | 1.000 | 36 | 30 | 2,952 | 4 of 5, " in text
    assert "FAILED" not in text
    rq4.plot(rows, tmp_path / "rq4.png")
    assert (tmp_path / "rq4.png").stat().st_size > 10_000
