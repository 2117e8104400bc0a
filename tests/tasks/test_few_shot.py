"""Tests of few-shot learning: hypergradients, closed forms and tasks."""

import functools
import os
from fractions import Fraction
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from hypergrad import datasets
from hypergrad.tasks import few_shot

KEY = jax.random.key(0)
# Ten characters with twenty drawings of 3 by 3 pixels.
IMAGES = np.random.default_rng(0).uniform(size=(10, 20, 3, 3))
LONG_DESCENT = hg.Descent(optax.sgd(0.3), 400)
ESTIMATORS = {
    "maml": hg.Unrolled(few_shot.SOLVERS["maml"]),
    "imaml": hg.Implicit(LONG_DESCENT, hg.CG(rtol=1e-13)),
}


def make_small(variant: str, hidden: tuple[int, ...] = (2,)) -> hg.tasks.Task:
    return few_shot.make(
        key=KEY, variant=variant, images=IMAGES, num_ways=3, num_tasks=2, hidden=hidden
    )


def run_estimator(task, estimator, key):
    state = estimator.init(task.problem, task.w, task.alpha, key)
    return jax.jit(estimator.estimate)(task.problem, state, task.alpha, key)[0]


@pytest.mark.parametrize(
    "variant", ["maml", "ridge", pytest.param("imaml", marks=pytest.mark.slow)]
)
def test_hypergradients_equal_central_differences(variant, key):
    """Adaptation and query loss are differentiated on the tasks of one key."""
    task = make_small(variant)
    default = hg.Implicit(task.solver, hg.CG(rtol=1e-12))
    estimator = ESTIMATORS.get(variant, default)
    estimate = run_estimator(task, estimator, key)
    expected = run_estimator(task, hg.CentralDifference(estimator.solver), key)
    assert optax.tree.norm(expected.hypergradient) > 1e-3
    chex.assert_trees_all_close(
        estimate.hypergradient, expected.hypergradient, rtol=1e-5, atol=1e-8
    )


def imaml_closed_form(problem, w, alpha, support, query):
    """Returns ``sum_t (I + H_t / penalty)^-1 dM/dw_t`` with dense matrices."""
    alpha_vector, unravel = ravel_pytree(alpha)
    outer_grad = jax.grad(lambda w: problem.outer_loss(w, alpha, query))(w)
    hypergradient = jnp.zeros_like(alpha_vector)
    for t in range(support["y"].shape[1]):
        select = lambda tree, t=t: ravel_pytree(jax.tree.map(lambda x: x[t], tree))[0]
        task_loss = lambda w, t=t: few_shot.cross_entropy(
            few_shot.scores(unravel(w), support["x"][:, t]), support["y"][:, t]
        )
        H = jax.hessian(task_loss)(select(w))
        matrix = jnp.eye(len(H)) + H / support["penalty"]
        hypergradient += jnp.linalg.solve(matrix, select(outer_grad))
    return hypergradient


@pytest.mark.parametrize(
    "hidden",
    [
        pytest.param((), id="linear"),
        pytest.param((2,), id="network", marks=pytest.mark.slow),
    ],
)
def test_imaml_equals_its_closed_form(hidden, key):
    """At the inner minimum, the estimate equals dense linear algebra to 1e-8."""
    task = make_small("imaml", hidden)
    estimate = run_estimator(task, ESTIMATORS["imaml"], key)
    # The estimate samples its tasks with the first of four keys.
    support, query = task.problem.sample_data(jax.random.split(key, 4)[0])
    closed_form = jax.jit(functools.partial(imaml_closed_form, task.problem))
    expected = closed_form(estimate.w, task.alpha, support, query)
    assert estimate.trusted
    actual = ravel_pytree(estimate.hypergradient)[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-8, atol=1e-12)


def test_sampled_tasks_have_distinct_classes_and_drawings():
    """Classes differ within a task; support and query share no drawing."""
    images = jnp.arange(8 * 20.0).reshape(8, 20, 1, 1)
    pool = few_shot.ClassPool(images, jnp.asarray(0.1), 5, 2, 15, 3)
    support, query = few_shot.sample_tasks(pool, KEY)
    assert support["x"].shape == (10, 3, 1, 1)
    assert query["x"].shape == (75, 3, 1, 1)
    for t in range(3):
        x, y = (
            np.concatenate([np.ravel(part[name][:, t]) for part in (support, query)])
            for name in ("x", "y")
        )
        pairs = set(zip(y, x // 20, strict=True))
        assert len(pairs) == len({character for _, character in pairs}) == 5
        assert len(set(x)) == 85
    assert support["penalty"] == pool.penalty
    other_support, _ = few_shot.sample_tasks(pool, jax.random.key(1))
    assert jnp.any(other_support["x"] != support["x"])


@pytest.mark.parametrize(("num_turns", "sizes"), [(4, (24, 8, 8)), (2, (8, 6, 6))])
def test_no_character_is_in_two_parts(num_turns, sizes):
    """Each part has all turns of its characters."""
    images = np.zeros((10, 20, 2, 2))
    images[:, :, 0, 0] = np.arange(1, 11)[:, None]  # A corner marks the character.
    parts = few_shot.split(jnp.asarray(images), KEY, num_turns)
    assert tuple(map(len, parts.values())) == sizes
    characters = [set(np.ravel(part.max(axis=(1, 2, 3)))) for part in parts.values()]
    assert sum(map(len, characters)) == len(set.union(*characters)) == 10
    corners = np.argmax(np.asarray(parts["test"])[:, 0].reshape(-1, 4), axis=1)
    _, counts = np.unique(corners, return_counts=True)
    np.testing.assert_array_equal(counts, [len(characters[2])] * num_turns)


def test_no_class_is_a_turned_class_of_another_part():
    """The digits 0, 1, 6, 8 and 9 are turned digits, so they have only two turns."""
    name, _, num_turns = few_shot.characters("small", "")
    assert "digits" in name
    images = np.random.default_rng(0).uniform(size=(10, 1, 3, 3))
    half_turn = lambda x: np.rot90(x, 2, (-2, -1))
    images[9] = half_turn(images[6])
    for digit in (0, 1, 8):
        images[digit] = images[digit] + half_turn(images[digit])
    for seed in range(5):
        parts = few_shot.split(jnp.asarray(images), jax.random.key(seed), num_turns)
        classes = [
            {np.asarray(image).round(6).tobytes() for image in part}
            for part in parts.values()
        ]
        assert tuple(map(len, classes)) == (8, 6, 6)
        assert len(set.union(*classes)) == 20


def test_paper_scale_has_the_published_network():
    """It has four convolutions and 32 tasks; checked on shapes only."""

    def make_parameters():
        images = jnp.zeros((10, 20, 28, 28))
        task = few_shot.make(key=KEY, scale="paper", images=images)
        return task.w, task.alpha

    w, alpha = jax.eval_shape(make_parameters)
    shapes = [layer["W"].shape for layer in alpha["body"]["convolutions"]]
    assert shapes == [(9, 64), (576, 64), (576, 64), (576, 64)]
    assert w["head"]["W"].shape == (32, 256, 5)


def test_strided_convolution_equals_lax(key):
    """It is `jax.lax.conv_general_dilated` with stride 2 and padding 1."""
    x_key, filter_key = jax.random.split(key)
    x = jax.random.normal(x_key, (2, 7, 7, 3))
    filters = jax.random.normal(filter_key, (3, 3, 3, 4))
    padding, names = [(1, 1), (1, 1)], ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(
        x, filters, (2, 2), padding, dimension_numbers=names
    )
    actual = few_shot.strided_convolution({"W": filters.reshape(27, 4)}, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.data
def test_omniglot_has_its_published_size_and_ink():
    """It has 1,623 characters of 20 drawings; smaller images keep the mean ink."""
    name, images, num_turns = few_shot.characters("small")
    if not name.startswith("Omniglot"):
        # Without the folder the characters are scikit-learn's digits.
        pytest.skip(f"{datasets.VARIABLE} names no folder with omniglot/")
    assert images.shape == (1623, 20, 14, 14)
    assert num_turns == 4
    assert (images.min(), images.max()) == (0, 1)
    folder = Path(os.environ[datasets.VARIABLE]) / "omniglot"
    with np.load(folder / datasets.OMNIGLOT.file) as file:
        bits = file["images"][file["char_id"] == 1000]
    ink = np.unpackbits(bits, axis=1)[:, : 105 * 105].mean(axis=1)
    np.testing.assert_allclose(images[1000].mean(axis=(1, 2)), ink, rtol=1e-5)


@pytest.mark.data
def test_omniglot_is_averaged_without_rounding_errors():
    """Each pixel is a number of 105^2 parts, rounded once, whatever the processor."""
    if not os.environ.get(datasets.VARIABLE):
        pytest.skip(f"{datasets.VARIABLE} names no folder with omniglot/")
    pixels = datasets.load("omniglot")["x"][::100]
    parts = np.round(pixels.astype(float) * 105**2)
    np.testing.assert_array_equal(pixels, (parts / 105**2).astype(np.float32))


def test_overlaps_are_those_of_intervals():
    """Intervals of length 1 on a line of 105, and of length 105 / 28, as fractions."""
    pixel, new_pixel = Fraction(1), Fraction(105, 28)

    def overlap(i, j):
        low = max(i * new_pixel, j * pixel)
        high = min((i + 1) * new_pixel, (j + 1) * pixel)
        return 28 * max(high - low, 0)

    expected = [[overlap(i, j) for j in range(105)] for i in range(28)]
    np.testing.assert_array_equal(datasets._overlaps(105, 28), np.array(expected, int))


def test_digits_replace_omniglot_only_at_the_small_scale(monkeypatch, tmp_path):
    """They are used without a folder, and always if the folder's name is empty."""
    monkeypatch.delenv(datasets.VARIABLE, raising=False)
    assert "digits" in few_shot.characters("small")[0]
    with pytest.raises(FileNotFoundError, match=datasets.VARIABLE):
        few_shot.make(key=KEY, scale="paper")
    with pytest.raises(FileNotFoundError, match="omniglot"):
        few_shot.make(key=KEY, data_dir=str(tmp_path))
    monkeypatch.setenv(datasets.VARIABLE, "a folder")
    monkeypatch.setattr(datasets, "load", {"digits": datasets.load("digits")}.get)
    assert "digits" in few_shot.characters("small", "")[0]
