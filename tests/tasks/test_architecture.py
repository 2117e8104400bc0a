"""Tests of architecture search: the network, its cells and its hypergradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.signal

import hypergrad as hg
from hypergrad.tasks import architecture
from hypergrad.tasks.architecture import CELLS, OPERATIONS, one_hot
from tests.tasks.task_cases import DIGITS, assert_close, central_differences

# Sixty digits reduced to 4 x 4 pixels: 12 for training, 20 for validation.
POOLED = {
    "x": DIGITS["x"][:60].astype(float).reshape(-1, 4, 2, 4, 2).mean((2, 4)),
    "y": DIGITS["y"][:60],
}
POOLED["x"] = POOLED["x"].reshape(-1, 16)
ARGUMENTS = {"key": jax.random.key(2), "data": POOLED, "sizes": (12, 20, 2)}
TASK = architecture.make(**ARGUMENTS, price=0.3)
TRAIN, VAL = TASK.problem.inner_data.data, TASK.problem.outer_data.data
ALPHA = jnp.linspace(0.05, 0.5, 15).reshape(3, 5) ** 2
TRAIN_LOSS, VAL_LOSS = jax.jit(architecture.train_loss), jax.jit(architecture.val_loss)


def indices(names: str) -> jax.Array:
    return jnp.array([OPERATIONS.index(name) for name in names.split()])


# The network.


def correlate(images, kernel):
    """Returns tanh of SciPy's correlations, summed over the channels of the images."""
    size = 3 if kernel.shape[1] == 9 else 1
    kernel = np.asarray(kernel).reshape(len(kernel), size, size, -1)
    result = np.zeros((*images.shape[:-1], len(kernel)))
    for n, out, c in np.ndindex(len(images), len(kernel), images.shape[-1]):
        result[n, ..., out] += scipy.signal.correlate(
            images[n, ..., c], kernel[out, ..., c], "same", "direct"
        )
    return np.tanh(result)


def mix_operations(images, w, alpha):
    """Returns the mixture of equation 2 of DARTS on one edge."""
    mean_kernel = np.eye(images.shape[-1])[:, None] * np.ones((9, 1)) / 9
    outputs = [
        0 * images,
        images,
        np.arctanh(correlate(images, mean_kernel)),
        correlate(images, w["conv1"]),
        correlate(images, w["conv3"]),
    ]
    return np.tensordot(np.asarray(alpha), np.array(outputs), 1)


def test_scores_equal_those_of_loops_over_scipy_correlations():
    w, x = jax.tree.map(np.asarray, TASK.w), np.asarray(TRAIN["x"])
    edges = [jax.tree.map(lambda leaf, e=e: leaf[e], w["edges"]) for e in range(3)]
    node0 = correlate(x[..., None], w["stem"])
    node1 = mix_operations(node0, edges[0], ALPHA[0])
    node2 = mix_operations(node0, edges[1], ALPHA[1])
    node2 += mix_operations(node1, edges[2], ALPHA[2])
    quarters = node2.reshape(len(x), 2, 2, 2, 2, 2).mean((2, 4))  # [n, 2, 2, channels]
    features = np.moveaxis(quarters, -1, 1).reshape(len(x), -1)
    actual = jax.jit(architecture.scores)(TASK.w, ALPHA, x)
    np.testing.assert_allclose(actual, features @ w["W"] + w["b"], rtol=1e-9)


def test_a_one_hot_alpha_has_gradients_for_the_kernels_of_its_cell_only():
    cell = indices("conv3 skip conv1")
    gradient = jax.jit(jax.grad(architecture.cross_entropy))(
        TASK.w, one_hot(cell), TRAIN
    )
    is_used = {
        name: np.any(np.asarray(leaf) != 0, axis=(1, 2, 3)).tolist()
        for name, leaf in gradient["edges"].items()
    }
    assert is_used["conv3"] == [True, False, False]
    assert is_used["conv1"] == [False, False, True]


@pytest.mark.parametrize("names", ["conv3 skip conv1", "none average conv3"])
def test_losses_of_a_cell_equal_losses_of_its_one_hot_mixture(names: str):
    cell = indices(names)
    for loss, batch in ((TRAIN_LOSS, TRAIN), (VAL_LOSS, VAL)):
        expected = loss(TASK.w, one_hot(cell), batch)
        np.testing.assert_allclose(loss(TASK.w, cell, batch), expected, rtol=1e-12)


def test_held_out_images_do_not_contribute_to_the_outer_loss():
    """The loss equals the loss of the first two thirds; the default price is 0."""
    task = architecture.make(**ARGUMENTS, hold_out=True)
    kept = {name: leaf[:14] for name, leaf in VAL.items()} | {"price": jnp.zeros(14)}
    actual = VAL_LOSS(TASK.w, ALPHA, task.problem.outer_data.data)
    np.testing.assert_allclose(actual, VAL_LOSS(TASK.w, ALPHA, kept), rtol=1e-12)


def test_batches_of_held_out_images_estimate_the_outer_loss():
    """The mean over single images is the loss, though a third of them are held out."""
    task = architecture.make(**ARGUMENTS, hold_out=True)
    data = task.problem.outer_data.data
    single = lambda i: VAL_LOSS(TASK.w, ALPHA, jax.tree.map(lambda x: x[i, None], data))
    values = jax.vmap(single)(jnp.arange(len(data["y"])))
    np.testing.assert_allclose(
        jnp.mean(values), VAL_LOSS(TASK.w, ALPHA, data), rtol=1e-12
    )


# The cost of a cell and the ranking of all cells.


def test_expected_flops_are_the_mean_over_all_cells():
    """Each cell counts with its probability, and the largest cell is the unit."""
    x = jnp.zeros((1, 8, 8))
    alpha = jax.nn.softmax(ALPHA * 9, axis=-1)
    flops = jax.vmap(lambda cell: architecture.expected_flops(cell, x))(
        jnp.array(CELLS)
    )
    probability = [np.prod([alpha[e, o] for e, o in enumerate(cell)]) for cell in CELLS]
    actual = architecture.expected_flops(alpha, x)
    np.testing.assert_allclose(actual, probability @ np.asarray(flops), rtol=1e-12)
    assert flops.max() == pytest.approx(1.0)


def test_flops_of_a_3x3_convolution_count_two_operations_per_product():
    """A 3 x 3 convolution of 4 channels to 4 has 9 * 4 * 4 products per pixel."""
    flops = architecture.flops(4, 8)
    assert OPERATIONS[np.argmax(flops)] == "conv3"
    assert flops[4] == 2 * 64 * 9 * 4 * 4


def test_the_ranking_has_an_entry_per_cell_and_empty_cells_stay_at_chance():
    ranking = architecture.ranking()
    assert {array.shape for array in ranking.values()} == {(125, 8)}
    assert np.all(ranking["test_accuracy"][CELLS.index((0, 0, 0))] < 0.15)


# Hypergradients and sizes.


def test_the_unrolled_hypergradient_equals_central_differences():
    """The same key gives the same batches at every step."""
    estimator = hg.Unrolled(hg.Descent(optax.sgd(0.2), 3))
    state = estimator.init(TASK.problem, TASK.w, ALPHA)

    @jax.jit
    def estimate(alpha):
        return estimator.estimate(TASK.problem, state, alpha, jax.random.key(4))[0]

    expected = central_differences(lambda alpha: estimate(alpha).value, ALPHA, 1e-5)
    assert_close(estimate(ALPHA).hypergradient, expected, 1e-8)


def test_the_paper_scale_has_16_channels():
    """The task is built on shapes only."""
    data = {"x": jnp.zeros((50001, 1024)), "y": jnp.zeros(50001, int)}
    w = jax.eval_shape(
        lambda: architecture.make(key=jax.random.key(0), scale="paper", data=data).w
    )
    assert w["edges"]["conv3"].shape == (3, 16, 9, 16)
