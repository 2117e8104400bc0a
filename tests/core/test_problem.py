"""Tests of the bilevel problem."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse
from flax import nnx

import hypergrad as hg

DATA = {"x": np.arange(12.0).reshape(6, 2), "y": np.arange(6)}


def inner_loss(w, alpha, batch):
    return jnp.sum((w - alpha) ** 2)


def outer_loss(w, alpha, batch):
    return jnp.sum((w - 0.5) ** 2)


def test_a_problem_is_a_pytree_of_its_data():
    """Losses are static; numbers and lists become arrays."""
    data = hg.Batches(DATA, 2), {"a": [1.0, 2.0], "b": np.ones(3), "c": 2.5}
    problem = hg.Bilevel(inner_loss, outer_loss, *data)
    leaves = jax.tree.leaves(problem)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert [leaf.shape for leaf in leaves] == [(6, 2), (6,), (), (), (3,), ()]
    assert jax.tree.leaves(hg.Bilevel(inner_loss, outer_loss)) == []
    structure = jax.tree.structure(problem)
    assert structure == jax.tree.structure(hg.Bilevel(inner_loss, outer_loss, *data))
    assert structure != jax.tree.structure(hg.Bilevel(inner_loss, inner_loss, *data))
    new_data = jax.tree.map(lambda x: x + 1, problem).inner_data
    np.testing.assert_array_equal(new_data.full_batch()["y"], np.arange(6) + 1)


def tree_loss(w, alpha, batch):
    """A loss with the minimum ``a = m``, ``b = 3 s``."""
    return jnp.sum((w["a"] - alpha["m"]) ** 2) + (w["b"] - 3 * alpha["s"]) ** 2


OUTER_LOSSES = (
    lambda w, alpha, batch: jnp.sum(w["a"]) + alpha["direct"],
    lambda w, alpha, batch: w["b"] ** 2 + 0 * alpha["direct"],
    lambda w, alpha, batch: jnp.sum(w["a"] ** 2) + w["b"],
)
TREE_W = {"a": jnp.zeros(2), "b": jnp.zeros(())}
TREE_ALPHA = {
    "m": jnp.array([1.0, -2.0]),
    "s": jnp.asarray(0.5),
    "direct": jnp.asarray(4.0),
}
# H = 2 I, so that one term of the series is exact.
IMPLICIT = hg.Implicit(
    hg.ClosedForm(lambda alpha, batch: {"a": alpha["m"], "b": 3 * alpha["s"]}),
    hg.Neumann(num_terms=1, step_size=0.5),
)
VALUES = jnp.array([-1 + 4, 1.5**2, 5 + 1.5])
HYPERGRADIENTS = {
    "m": jnp.array([[1.0, 1], [0, 0], [2, -4]]),
    "s": jnp.array([0.0, 2 * 1.5 * 3, 3]),
    "direct": jnp.array([1.0, 0, 0]),
}


@pytest.mark.parametrize(
    ("outer", "index"),
    [
        (list(OUTER_LOSSES), slice(3)),
        (OUTER_LOSSES[:1], slice(1)),
        (OUTER_LOSSES[1], 1),
    ],
    ids=["list of three", "tuple of one", "function"],
)
def test_only_a_sequence_of_losses_adds_an_axis(outer, index):
    """Values and hypergradients are those of the formulas."""
    problem = hg.Bilevel(tree_loss, outer)
    assert problem.num_objectives == (None if callable(outer) else len(outer))
    estimate = hg.hypergradient(problem, IMPLICIT)(TREE_W, TREE_ALPHA)
    expected = jax.tree.map(lambda x: x[index], (VALUES, HYPERGRADIENTS))
    chex.assert_trees_all_close(
        (estimate.value, estimate.hypergradient), expected, rtol=1e-9, atol=1e-12
    )


# Random data.


def sample_row(rows, key):
    """Returns one random row as the data of both losses."""
    row = rows[jax.random.randint(key, (), 0, rows.shape[0])]
    return row, hg.Batches(row[None], 1)


def episode_loss(w, alpha, batch):
    return jnp.sum((w - alpha - batch) ** 2)


def test_new_arrays_of_data_fn_trace_nothing():
    num_traces = 0

    def inner(w, alpha, batch):
        nonlocal num_traces
        num_traces += 1
        return episode_loss(w, alpha, batch)

    solver = hg.ClosedForm(lambda alpha, batch: alpha + batch)
    estimator = hg.Implicit(solver, hg.Identity())
    counts = []
    for scale in (1.0, 2.0):
        data_fn = jax.tree_util.Partial(sample_row, scale * jnp.ones((300, 1)))
        problem = hg.Bilevel(inner, outer_loss, data_fn=data_fn)
        estimate = hg.hypergradient(problem, estimator)(jnp.zeros(1), jnp.ones(1))
        np.testing.assert_allclose(estimate.value, (scale + 0.5) ** 2)
        counts.append(num_traces)
    assert counts[0] == counts[1]


X, Y = jnp.ones((4, 3)), jnp.ones(4)


class Linear(eqx.Module):
    kernel: jax.Array
    activation: str = eqx.field(static=True, default="tanh")


def score_loss(w, alpha, batch):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2) + jnp.sum(jnp.exp(alpha) * w**2)


def noisy_loss(w, alpha, batch):
    (x, y), key = batch
    return score_loss(w * jax.random.normal(key, w.shape), alpha, (x, y))


#: A mistake, and what its message says.
MISFITS = {
    "module": (
        (score_loss, (X, Y), Linear(X), Y),
        r"on w\.kernel: float64\[4,3\], alpha: float64\[4\], "
        r"batch\[0\]: float64\[4,3\], batch\[1\]: float64\[4\], which must fit",
    ),
    "list": (
        (score_loss, (X, Y), jnp.ones(3), [0.0, 0.0, 0.0]),
        r"alpha is a list of scalars; for an array pass jnp\.array\(\.\.\.\)\.",
    ),
    "list of layers": (
        (score_loss, (X, Y), [{"kernel": X}, (Y, Y)], jnp.ones(3)),
        r"on w\[0\]\['kernel'\]: float64\[4,3\], .*must fit each other\.",
    ),
    "no key": (
        (noisy_loss, hg.Batches((X, Y), 2), jnp.ones(3), jnp.ones(3)),
        r"bring keys only with hg\.Batches\(\.\.\., with_key=True\)\.",
    ),
    "key is not taken out": (
        (score_loss, hg.Batches((X, Y), with_key=True), jnp.ones(3), jnp.ones(3)),
        r"A batch is the pair \(examples, key\)\.",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_loss_that_fails_gets_the_leaves_and_a_remedy(name):
    """The leaves are named by path, without the static fields of a module."""
    (loss, data, w, alpha), message = MISFITS[name]
    problem = hg.Bilevel(loss, outer_loss, data)
    with pytest.raises(TypeError, match=message) as raised:
        hg.hypergradient(problem, hg.Implicit(hg.Newton()))(w, alpha)
    assert "tanh" not in str(raised.value)


def test_a_model_of_flax_that_is_merged_without_a_copy_gets_the_remedy():
    """The running averages, which a forward pass updates, belong to the first trace."""
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, alpha, batch):
        merged = nnx.merge(graph, params, rest)
        return jnp.mean(merged(batch) ** 2) + jnp.sum(alpha**2)

    x = X.astype(jnp.float32)  # as the layers of flax
    problem = hg.Bilevel(loss, loss, x, x)
    with pytest.raises(Exception, match="different trace level") as raised:
        hg.hypergradient(problem, hg.Implicit(hg.Newton()))(params, jnp.ones(2))
    assert "nnx.merge(..., copy=True)" in "".join(raised.value.__notes__)


def test_only_some_leaves_of_a_large_model_are_named():
    w = {f"layer {i}": jnp.ones(3) for i in range(50)}
    problem = hg.Bilevel(score_loss, outer_loss, (X, Y))
    with pytest.raises(TypeError, match=r"w: 38 further leaves, alpha: ") as raised:
        hg.hypergradient(problem, hg.Implicit(hg.Newton()))(w, Y)
    assert len(str(raised.value)) < 1000


def test_a_leaf_of_w_that_only_the_outer_loss_reads_gets_a_warning():
    """Such as the running averages of a model, which no training loss reads."""
    inner = lambda w, alpha, batch: jnp.sum((w["x"] - alpha) ** 2)
    outer = lambda w, alpha, batch: jnp.sum(w["x"] * w["mean"])
    w = {"x": jnp.zeros(2), "mean": jnp.ones(2), "unread": jnp.ones(2)}
    estimate_fn = hg.hypergradient(hg.Bilevel(inner, outer), hg.Implicit(hg.Newton()))
    message = r"^inner_loss does not depend on w\['mean'\], which outer_loss"
    with pytest.warns(UserWarning, match=message):
        estimate_fn(w, jnp.ones(2))
    start = lambda w, alpha: w | {"mean": alpha}  # a start that no training changes
    problem = hg.Bilevel(inner, outer, init_fn=start)
    estimator = hg.Unrolled(hg.Descent(optax.sgd(0.1), 2))
    hg.hypergradient(problem, estimator)(w, jnp.ones(2))


class Loader:
    """An iterable of batches, as PyTorch has it."""

    def __iter__(self):
        return iter([np.ones(3)])


NO_ARRAYS = {
    "sparse": (scipy.sparse.csr_matrix(np.eye(3)), r"csr_matrix .* Pass its toarray"),
    "loader": (Loader(), r"Loader of no numbers\. Read a loader into arrays"),
    "text": ("abc", "Encode text and categories as integers"),
}


@pytest.mark.parametrize(("data", "message"), NO_ARRAYS.values(), ids=NO_ARRAYS)
def test_data_that_are_no_arrays_get_their_own_remedy(data, message):
    with pytest.raises(TypeError, match=message):
        hg.Bilevel(inner_loss, outer_loss, data)


def test_targets_in_place_of_a_batch_size_are_named():
    with pytest.raises(ValueError, match=r"shape \(4,\)\. The data is one tuple"):
        hg.Batches(jnp.ones((4, 2)), jnp.ones(4))


def test_an_estimate_in_place_of_w_is_named():
    problem = hg.Bilevel(inner_loss, outer_loss)
    estimate = hg.hypergradient(problem, hg.Implicit(hg.Newton()))(0.0, 1.0)
    with pytest.raises(TypeError, match=r"^w must be .* got Estimate\. Pass its w\."):
        hg.certify(problem, estimate, 1.0)


def test_a_metric_that_returns_text_is_named():
    problem = hg.Bilevel(inner_loss, outer_loss)
    metrics = {"quality": lambda w, alpha, key: "good"}
    estimator = hg.Implicit(hg.Newton())
    loop = hg.OuterLoop(problem, estimator, optax.sgd(0.1), metrics=metrics)
    with pytest.raises(ValueError, match=r"metrics\['quality'\] must .* got str\."):
        loop.init(0.0, 1.0)


class ModelWithStats(eqx.Module):
    """A model whose leaves have the names of fields of an estimate."""

    w: jax.Array
    stats: jax.Array


def test_a_model_with_fields_of_the_same_names_is_no_estimate():
    loss = lambda model, alpha, batch: jnp.sum((model.w - model.stats - alpha) ** 2)
    model = ModelWithStats(jnp.zeros(2), jnp.ones(2))
    estimator = hg.Unrolled(hg.Descent(optax.sgd(0.1), 2))
    estimate = hg.hypergradient(hg.Bilevel(loss, loss), estimator)(model, jnp.ones(2))
    assert isinstance(estimate.w, ModelWithStats)
