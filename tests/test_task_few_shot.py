"""Few-shot learning: hypergradients, iMAML's closed form, memory, tasks as drawn."""

import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from hypergrad import datasets as datasets
from hypergrad.tasks import few_shot

# Ten characters with twenty drawings each of 3 by 3 pixels.
TINY = np.random.default_rng(0).uniform(size=(10, 20, 3, 3))
LONG = hg.Descent(optax.sgd(0.3), 400)
ESTIMATORS = {
    "maml": hg.Unrolled(few_shot.SOLVERS["maml"]),
    "imaml": hg.Implicit(LONG, hg.CG(rtol=1e-12)),
}


def tiny(variant: str, **settings) -> few_shot.Task:
    settings = {"way": 3, "num_tasks": 2, "hidden": (2,)} | settings
    key = jax.random.key(0)
    return few_shot.make(key=key, variant=variant, images=TINY, **settings)


@pytest.mark.parametrize(
    "variant", ["maml", "ridge", pytest.param("imaml", marks=pytest.mark.slow)]
)
def test_hypergradients_equal_central_differences(variant, key):
    """Of adaptation and query loss together, on the tasks of one key."""
    task = tiny(variant)
    estimator = ESTIMATORS.get(variant, hg.Implicit(task.solver, hg.CG(rtol=1e-12)))
    state = estimator.init(task.problem, task.w, task.alpha, key)
    found, _ = jax.jit(estimator.estimate)(task.problem, state, task.alpha, key)
    oracle = hg.CentralDifference(estimator.solver)
    state = oracle.init(task.problem, task.w, task.alpha, key)
    expected, _ = jax.jit(oracle.estimate)(task.problem, state, task.alpha, key)
    found, expected = (ravel_pytree(e.hypergradient)[0] for e in (found, expected))
    assert jnp.linalg.norm(expected) > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)


def imaml_closed_form(problem, w, alpha, support, query):
    """``sum_t (I + H_t / penalty)^-1 dM/dw_t``, ``H_t`` of the task's own loss."""
    flat, unravel = ravel_pytree(alpha)
    total = jnp.zeros_like(flat)
    for t in range(support["y"].shape[1]):
        one = jax.tree.map(lambda leaf, t=t: leaf[t], w)
        loss = lambda flat, t=t: few_shot.cross_entropy(
            few_shot.scores(unravel(flat), support["x"][:, t]), support["y"][:, t]
        )
        outer = lambda w: problem.outer_loss(w, alpha, query)
        g = ravel_pytree(jax.tree.map(lambda leaf, t=t: leaf[t], jax.grad(outer)(w)))[0]
        hessian = jax.hessian(loss)(ravel_pytree(one)[0])
        scaled = jnp.eye(len(flat)) + hessian / support["penalty"]
        total = total + jnp.linalg.solve(scaled, g)
    return total


@pytest.mark.parametrize("hidden", [(), pytest.param((2,), marks=pytest.mark.slow)])
def test_imaml_equals_its_closed_form(hidden, key):
    """Of a linear model, and of a network, at the minimum, to 1e-8."""
    task = tiny("imaml", hidden=hidden)
    solver = hg.Descent(optax.sgd(0.3), 400)
    estimator = hg.Implicit(solver, hg.CG(rtol=1e-13))
    state = estimator.init(task.problem, task.w, task.alpha, key)
    # The tasks are those of the estimate's key.
    found, _ = jax.jit(estimator.estimate)(task.problem, state, task.alpha, key)
    support, query = task.problem.sample_data(jax.random.split(key, 4)[0])
    expected = jax.jit(functools.partial(imaml_closed_form, task.problem))(
        found.w, task.alpha, support, query
    )
    assert found.stats["trusted"]
    hypergradient = ravel_pytree(found.hypergradient)[0]
    np.testing.assert_allclose(hypergradient, expected, rtol=1e-8, atol=1e-12)


def test_imaml_of_linear_regression_is_known_in_numpy(key):
    """``(I + H / penalty)^-1 dM/dw`` with ``H = X'X``, squared errors throughout."""
    x, y, x_val, y_val = jax.random.normal(key, (4, 7, 7))
    penalty, alpha = 1.7, y[1]

    def inner(w, alpha, batch):
        x, y = batch
        fit = jnp.sum((x @ w[0] - y) ** 2) / 2
        return fit + penalty * few_shot.proximal(w, alpha)

    def outer(w, alpha, batch):
        x, y = batch
        return jnp.sum((x @ w[0] - y) ** 2) / 2

    problem = hg.Bilevel(
        inner, outer, (x, y[0]), (x_val, y_val[0]), init_fn=few_shot.shared_start
    )
    estimator = hg.Implicit(hg.Newton(tolerance=1e-14), hg.CG(rtol=1e-14))
    found = hg.hypergradient(problem, estimator)(jnp.zeros((1, 7)), alpha)
    x, y, x_val, y_val = map(np.asarray, (x, y[0], x_val, y_val[0]))
    w = np.linalg.solve(x.T @ x + penalty * np.eye(7), x.T @ y + penalty * alpha)
    g = x_val.T @ (x_val @ w - y_val)
    expected = np.linalg.solve(np.eye(7) + x.T @ x / penalty, g)
    np.testing.assert_allclose(found.hypergradient, expected, rtol=1e-8)


def temporary(task, estimator) -> int:
    """Bytes that the compiled estimate needs beside its arguments and results."""
    state = estimator.init(task.problem, task.w, task.alpha, jax.random.key(0))
    compiled = jax.jit(estimator.estimate).lower(
        task.problem, state, task.alpha, jax.random.key(0)
    )
    return compiled.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_is_flat_for_imaml_and_linear_for_maml():
    """In the inner steps, all of which MAML stores without checkpoints."""
    steps = (16, 64, 128)
    maml, imaml = tiny("maml"), tiny("imaml")
    solvers = [hg.Descent(optax.sgd(0.1), n) for n in steps]
    flat = [temporary(imaml, hg.Implicit(s, hg.CG(max_steps=5))) for s in solvers[::2]]
    linear = [temporary(maml, hg.Unrolled(s, checkpoint=False)) for s in solvers]
    # What is scanned over, a key of 8 bytes a step, is all that may grow.
    assert flat[1] - flat[0] <= 20 * (128 - 16)
    slopes = np.diff(linear) / np.diff(steps)
    w_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(maml.w))
    assert slopes[0] > w_bytes  # a step stores at least its parameters
    np.testing.assert_allclose(slopes[1], slopes[0], rtol=0.05)


def test_tasks_are_what_they_say():
    """Classes differ within a task, drawings are not shared by support and query."""
    images = jnp.broadcast_to(jnp.arange(8 * 20.0).reshape(8, 20, 1, 1), (8, 20, 1, 1))
    pool = few_shot.Pool(images, jnp.asarray(0.1), 5, 2, 15, 3)
    support, query = few_shot.episodes(pool, jax.random.key(0))
    assert support["x"].shape == (10, 3, 1, 1)
    assert query["x"].shape == (75, 3, 1, 1)
    for t in range(3):
        x = [np.ravel(part["x"][:, t]) for part in (support, query)]
        y = [np.ravel(part["y"][:, t]) for part in (support, query)]
        classes = np.concatenate(x) // 20
        pairs = set(zip(np.concatenate(y), classes, strict=True))
        assert len(pairs) == len(set(classes)) == 5
        assert len(set(np.concatenate(x))) == 85
    assert support["penalty"] == pool.penalty
    other, _ = few_shot.episodes(pool, jax.random.key(1))
    assert jnp.any(other["x"] != support["x"])


@pytest.mark.parametrize(("num_turns", "sizes"), [(4, (24, 8, 8)), (2, (8, 6, 6))])
def test_no_character_is_in_two_parts(num_turns, sizes):
    """Characters are parted, each part with every turn of its own."""
    images = np.zeros((10, 20, 2, 2))
    images[:, :, 0, 0] = np.arange(1, 11)[:, None]  # a corner marks the character
    parts = few_shot.split(jnp.asarray(images), jax.random.key(0), num_turns)
    assert tuple(map(len, parts.values())) == sizes
    marks = [set(np.ravel(part.max(axis=(1, 2, 3)))) for part in parts.values()]
    assert sum(map(len, marks)) == len(set.union(*marks)) == 10
    corners = np.argmax(np.asarray(parts["test"])[:, 0].reshape(-1, 4), axis=1)
    assert len(set(corners)) == num_turns
    assert np.all(np.unique(corners, return_counts=True)[1] == len(marks[2]))


def test_no_class_is_a_turned_class_of_another_part():
    """Of digits, where a 9 is a 6 upside down and others are their own half turn."""
    name, _, num_turns = few_shot.characters("small", "")
    assert "digits" in name
    images = np.random.default_rng(0).uniform(size=(10, 1, 3, 3))
    half = lambda x: np.rot90(x, 2, (-2, -1))
    images[9] = half(images[6])
    for k in (0, 1, 8):
        images[k] = images[k] + half(images[k])
    for seed in range(5):
        parts = few_shot.split(jnp.asarray(images), jax.random.key(seed), num_turns)
        seen = [
            {np.asarray(image).round(6).tobytes() for image in part}
            for part in parts.values()
        ]
        assert tuple(map(len, seen)) == (8, 6, 6)
        assert len(set.union(*seen)) == 20


def test_the_paper_scale_builds_and_convolves_as_lax_does(key):
    """Four strided convolutions; one layer against `lax.conv_general_dilated`."""
    make = lambda: few_shot.make(
        key=jax.random.key(0), scale="paper", images=jnp.zeros((10, 20, 28, 28))
    )
    task = jax.eval_shape(lambda: (lambda task: (task.w, task.alpha))(make()))
    shapes = [layer["W"].shape for layer in task[1]["body"]["convolutions"]]
    assert shapes == [(9, 64), (576, 64), (576, 64), (576, 64)]
    assert task[0]["head"]["W"].shape == (32, 256, 5)
    keys = jax.random.split(key)
    x = jax.random.normal(keys[0], (2, 7, 7, 3))
    w = jax.random.normal(keys[1], (3, 3, 3, 4))
    expected = jax.lax.conv_general_dilated(
        x, w, (2, 2), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    found = few_shot.convolved({"W": w.reshape(27, 4)}, x)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.data
def test_omniglot_is_what_its_source_says():
    """1,623 characters of 20 drawings; smaller images keep the share of ink."""
    name, images, num_turns = few_shot.characters("small")
    if not name.startswith("Omniglot"):
        pytest.skip(f"{datasets.VARIABLE} names no folder with omniglot/")
    assert images.shape == (1623, 20, 14, 14)
    assert num_turns == 4
    assert images.min() == 0
    assert images.max() == 1
    folder = Path(os.environ[datasets.VARIABLE]) / "omniglot"
    with np.load(folder / next(iter(datasets.OMNIGLOT))) as file:
        bits = file["images"][file["char_id"] == 1000]
    ink = np.unpackbits(bits, axis=1)[:, : 105 * 105].mean(axis=1)
    np.testing.assert_allclose(images[1000].mean(axis=(1, 2)), ink, rtol=1e-5)


def test_an_area_mean_keeps_the_ink():
    """Each of the smaller pixels covers 105 / 28 of the larger."""
    shrink = datasets._area_weights(105, 28)
    np.testing.assert_allclose(shrink.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(shrink.sum(axis=0), 28 / 105, rtol=1e-6)
    assert (shrink > 0).sum(axis=1).max() <= 5


def test_digits_stand_in_at_the_small_scale_alone(monkeypatch, tmp_path):
    """Where no folder is named; an empty name is no folder, whatever is set."""
    monkeypatch.delenv(datasets.VARIABLE, raising=False)
    assert "digits" in few_shot.characters("small")[0]
    with pytest.raises(FileNotFoundError, match=datasets.VARIABLE):
        few_shot.make(key=jax.random.key(0), scale="paper")
    with pytest.raises(FileNotFoundError, match="is missing"):
        few_shot.make(key=jax.random.key(0), data_dir=str(tmp_path))
    monkeypatch.setenv(datasets.VARIABLE, "a folder")
    monkeypatch.setattr(datasets, "load", {"digits": datasets.load("digits")}.get)
    assert "digits" in few_shot.characters("small", "")[0]


def test_another_scale_variant_or_number_of_turns_is_refused():
    """With what there is."""
    with pytest.raises(ValueError, match="'small' or 'paper'"):
        few_shot.make(key=jax.random.key(0), scale="large")
    with pytest.raises(ValueError, match="'maml', 'imaml' or 'ridge'"):
        few_shot.make(key=jax.random.key(0), variant="reptile")
    with pytest.raises(ValueError, match="2 or 4"):
        few_shot.make(key=jax.random.key(0), num_turns=3)
