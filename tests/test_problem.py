"""Batches and Bilevel: what is drawn, what is static and what is data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.problem import batch_fraction, num_examples, sample_fixed_batch

KEY = jax.random.key(0)
ROWS = {"x": np.arange(12.0).reshape(6, 2), "y": np.arange(6)}


def inner(w, alpha, batch):
    return jnp.sum((w - alpha) ** 2)


def outer(w, alpha, batch):
    return jnp.sum((w - 0.5) ** 2)


# Batches.


def test_take_is_numpy_indexing():
    """Rows by index, repeated ones too, leaves kept together."""
    batch = hg.Batches(ROWS, 2).take(jnp.array([4, 0, 4]))
    np.testing.assert_array_equal(batch["x"], ROWS["x"][[4, 0, 4]])
    np.testing.assert_array_equal(batch["y"], [4, 0, 4])


def test_all_is_the_data_itself_whatever_the_batch_size():
    """Every row once, in order; integers stay integers."""
    batches = hg.Batches(ROWS, 2)
    assert batches.size == 6
    assert jax.tree.map(lambda x: x.shape, batches.full_batch()) == {
        "x": (6, 2),
        "y": (6,),
    }
    np.testing.assert_array_equal(batches.full_batch()["x"], ROWS["x"])
    assert jnp.issubdtype(batches.full_batch()["y"].dtype, jnp.integer)


def test_without_a_batch_size_a_draw_is_everything():
    """Full-batch descent sees each row once, not a resample."""
    np.testing.assert_array_equal(hg.Batches(ROWS).sample(KEY)["y"], np.arange(6))


def test_a_draw_is_rows_of_the_data_fixed_by_its_key():
    """Leaves agree on the rows, same key same bits, compiled or not, other key other"""
    batches = hg.Batches(ROWS, 4)
    batch = batches.sample(KEY)
    assert batch["x"].shape == (4, 2)
    np.testing.assert_array_equal(batch["x"], ROWS["x"][np.asarray(batch["y"])])
    again = jax.jit(lambda b, k: b.sample(k))(batches, KEY)
    np.testing.assert_array_equal(again["x"], batch["x"])
    keys = jax.random.split(KEY, 20)
    drawn = jax.vmap(batches.sample)(keys)["y"]
    assert len({tuple(row) for row in drawn.tolist()}) >= 15


@pytest.mark.parametrize("keyed", [False, True])
def test_frequencies_are_uniform_with_replacement(keyed):
    """chi-square over rows, and as many repeats within a batch as i.i.d. has."""
    batches = hg.Batches(np.arange(6), 3, with_key=keyed)
    drawn = jax.jit(jax.vmap(batches.sample))(jax.random.split(KEY, 4000))
    drawn = np.asarray(drawn[0] if keyed else drawn)
    counts = np.bincount(drawn.ravel(), minlength=6)
    assert np.sum((counts - 2000) ** 2 / 2000) < 25.7  # chi2(5): p = 1e-4
    repeated = np.mean([len(set(row)) < 3 for row in drawn.tolist()])
    assert abs(repeated - (1 - 5 / 6 * 4 / 6)) < 4 * np.sqrt(0.25 / 4000)


def test_scalars_beside_the_examples_are_in_every_batch(key):
    """As a temperature of a surrogate is."""
    batches = hg.Batches({"x": jnp.arange(6.0), "T": 0.3}, 4)
    assert batches.size == 6
    batch = batches.sample(key)
    assert batch["x"].shape == (4,)
    assert batch["T"] == jnp.asarray(0.3)
    assert batches.take(jnp.array([2]))["T"].shape == ()


def test_keyed_batches_carry_fresh_keys():
    """``(batch, key)``, a new key with each draw and one key for one draw."""
    batches = hg.Batches(ROWS, 4, with_key=True)
    first, key = batches.sample(KEY)
    again, same = batches.sample(KEY)
    _, other = batches.sample(jax.random.key(1))
    bits = lambda key: jax.random.key_data(key).tolist()
    assert bits(key) == bits(same) != bits(other)
    assert bits(key) != bits(KEY)  # or the batch and its noise would be dependent
    np.testing.assert_array_equal(first["y"], again["y"])
    everything, key = batches.full_batch()
    assert bits(key) == bits(jax.random.key(0))
    assert everything["x"].shape == (6, 2)
    np.testing.assert_array_equal(batches.take(jnp.array([1]))["y"], [1])


def test_a_batch_may_be_just_a_key():
    """Rollouts and collocation points need no data."""
    batches = hg.Batches(None, with_key=True)
    assert jnp.issubdtype(batches.sample(KEY).dtype, jax.dtypes.prng_key)
    assert jnp.issubdtype(batches.full_batch().dtype, jax.dtypes.prng_key)
    assert batches.size == 1


def test_batches_are_a_pytree_of_their_arrays():
    """Data are leaves, settings are static; equal settings share a compiled program."""
    batches = hg.Batches(ROWS, 4)
    assert [leaf.shape for leaf in jax.tree.leaves(batches)] == [(6, 2), (6,)]
    traces = []

    @jax.jit
    def read(batches):
        traces.append(None)
        return batches.sample(KEY)["x"]

    read(batches)
    read(hg.Batches({"x": -ROWS["x"], "y": ROWS["y"]}, 4))
    assert len(traces) == 1
    read(hg.Batches(ROWS, 3))
    assert len(traces) == 2


def test_sizes_and_fractions():
    """What costs are counted by: rows, and the part of them that a batch is."""
    assert (
        num_examples(hg.Batches(ROWS, 2)) == num_examples({"x": jnp.ones((6, 2))}) == 6
    )
    assert num_examples(None) is None
    assert num_examples({"x": jnp.ones((6, 2)), "scale": jnp.ones(())}) == 6
    assert num_examples({"x": jnp.ones((6, 2)), "y": jnp.ones(5)}) is None
    assert num_examples(hg.Batches(None, with_key=True)) is None
    assert batch_fraction(hg.Batches(ROWS, 2)) == pytest.approx(1 / 3)
    assert batch_fraction(hg.Batches(ROWS, 2), 3) == 0.5
    assert batch_fraction(hg.Batches(ROWS)) == batch_fraction(None) == 1.0


def test_a_held_batch():
    """One draw of the asked size; all without one; a plain pytree cannot be split."""
    assert sample_fixed_batch(hg.Batches(ROWS, 2), 5, KEY)["x"].shape == (5, 2)
    assert sample_fixed_batch(hg.Batches(ROWS, 2), None, KEY)["x"].shape == (6, 2)
    assert sample_fixed_batch(ROWS, None, KEY) is ROWS
    with pytest.raises(ValueError, match=r"hg\.Batches"):
        sample_fixed_batch(ROWS, 5, KEY)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_both_passes_see_the_same_noise(batch_size):
    """A loss with noise from its key: the adjoint residual is zero only if H is held.

    ``H = diag(1 + u)`` with u from the batch's key, and the cross term is -1, so that
    the hypergradient is ``2 (w - 1/2) / (1 + u)``: every part from one key.
    """

    def noisy(w, alpha, batch):
        rows, key = batch
        u = jax.random.uniform(key, (2,)) + 0.1 * jnp.mean(rows)
        return 0.5 * jnp.sum((1 + u) * w**2) - jnp.sum(alpha * w)

    data = hg.Batches(np.arange(6.0), 2, with_key=True)
    estimator = hg.Implicit(
        hg.Descent(optax.sgd(0.2), 3), adjoint_batch_size=batch_size
    )
    problem = hg.Bilevel(noisy, outer, data)
    estimate = hg.hypergradient(problem, estimator)(jnp.ones(2), jnp.ones(2), KEY)
    assert estimate.stats["adjoint_residual"] < 1e-12
    estimator = hg.Unrolled(hg.Descent(optax.sgd(0.2), 3))
    value = lambda a: hg.hypergradient(problem, estimator)(jnp.ones(2), a, KEY).value
    found = hg.hypergradient(problem, estimator)(jnp.ones(2), jnp.ones(2), KEY)
    step = 1e-5 * jnp.array([1.0, 0.0])
    difference = (value(1 + step) - value(1 - step)) / 2e-5
    np.testing.assert_allclose(found.hypergradient[0], difference, rtol=1e-8)


# Bilevel.


def test_the_arrays_are_the_leaves():
    """Losses are static, data is traced: equal shapes share one compiled program."""
    data = hg.Batches(ROWS, 2), {"x": jnp.ones((3, 2))}
    problem = hg.Bilevel(inner, outer, *data)
    leaves = jax.tree.leaves(problem)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert [leaf.shape for leaf in leaves] == [(6, 2), (6,), (3, 2)]
    assert jax.tree.leaves(hg.Bilevel(inner, outer)) == []
    structure = jax.tree.structure
    assert structure(problem) == structure(hg.Bilevel(inner, outer, *data))
    assert structure(problem) != structure(hg.Bilevel(inner, inner, *data))
    again = jax.tree.map(lambda x: x + 1, problem)
    assert isinstance(again, hg.Bilevel)
    assert isinstance(again.inner_data, hg.Batches)
    np.testing.assert_array_equal(again.inner_data.full_batch()["y"], np.arange(6) + 1)


def test_lists_of_numbers_become_arrays():
    """NumPy arrays, lists and numbers are data; None is none."""
    problem = hg.Bilevel(inner, outer, {"a": [1.0, 2.0], "b": np.ones(3)}, 2.5)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(problem))
    assert float(problem.outer_data) == 2.5


@pytest.mark.parametrize(
    "estimator",
    [
        hg.Implicit(hg.Newton()),
        hg.Unrolled(hg.Descent(optax.sgd(0.25), 60)),
    ],
    ids=["Implicit", "Unrolled"],
)
def test_several_outer_losses(estimator):
    """K values and K-leading leaves, each that of its loss alone and in closed form."""
    losses = (
        lambda w, alpha, batch: jnp.sum(w["a"]) + alpha["direct"],
        lambda w, alpha, batch: w["b"] ** 2 + 0 * alpha["direct"],
        lambda w, alpha, batch: jnp.sum(w["a"] ** 2) + w["b"],
    )
    fit = lambda w, alpha, batch: (
        jnp.sum((w["a"] - alpha["m"]) ** 2) + (w["b"] - 3 * alpha["s"]) ** 2
    )
    w = {"a": jnp.zeros(2), "b": jnp.zeros(())}
    alpha = {
        "m": jnp.array([1.0, -2.0]), "s": jnp.asarray(0.5), "direct": jnp.asarray(4.0)
    }  # fmt: skip
    problem = hg.Bilevel(fit, losses)
    assert problem.num_objectives == 3
    estimate = hg.hypergradient(problem, estimator)(w, alpha)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
    close(estimate.value, [-1 + 4, 1.5**2, 5 + 1.5])
    close(estimate.hypergradient["m"], [[1, 1], [0, 0], [2, -4]])
    close(estimate.hypergradient["s"], [0, 2 * 1.5 * 3, 3])
    close(estimate.hypergradient["direct"], [1, 0, 0])
    one = hg.hypergradient(hg.Bilevel(fit, losses[:1]), estimator)(w, alpha)
    assert one.value.shape == (1,)
    close(one.hypergradient["m"], [[1, 1]])
    alone = hg.hypergradient(hg.Bilevel(fit, losses[1]), estimator)(w, alpha)
    assert alone.value.shape == ()
    close(alone.hypergradient["s"], 9.0)


def test_a_list_of_losses_is_a_tuple():
    """Static fields must be hashable."""
    problem = hg.Bilevel(inner, [outer, inner])
    assert problem.num_objectives == 2
    hash(jax.tree.structure(problem))


def test_a_start_that_depends_on_alpha():
    """One step of descent from ``3 alpha``: ``w = alpha + (1 - 2 s) 2 alpha``."""
    problem = hg.Bilevel(inner, outer, init_fn=lambda w, alpha: 3 * alpha + 0 * w)
    estimator = hg.Unrolled(hg.Descent(optax.sgd(0.1), 1))
    estimate = hg.hypergradient(problem, estimator)(jnp.zeros(2), jnp.array([1.0, 2.0]))
    slope = 1 + 0.8 * 2
    np.testing.assert_allclose(estimate.w, slope * np.array([1.0, 2.0]), rtol=1e-12)
    expected = 2 * slope * (slope * np.array([1.0, 2.0]) - 0.5)
    np.testing.assert_allclose(estimate.hypergradient, expected, rtol=1e-12)


def sample(arrays, key):
    """An episode: a random centre for both losses, and which row it was."""
    row = jax.random.randint(key, (), 0, arrays.shape[0])
    return arrays[row], hg.Batches(arrays[row][None], 1)


def test_a_draw_is_made_once_an_estimate_and_held():
    """Both losses see one row: with ``w* = alpha + row`` the value is ``alpha^2``."""
    rows = jnp.arange(300.0)[:, None]
    fit = lambda w, alpha, batch: jnp.sum((w - alpha - batch) ** 2)
    test = lambda w, alpha, batch: jnp.mean((w - batch[0]) ** 2)
    problem = hg.Bilevel(fit, test, data_fn=jax.tree_util.Partial(sample, rows))
    assert [leaf.shape for leaf in jax.tree.leaves(problem)] == [(300, 1)]
    ask = hg.hypergradient(problem, hg.Implicit(hg.Newton()))
    seen = set()
    for seed in range(4):
        estimate = ask(jnp.zeros(1), jnp.ones(1), jax.random.key(seed))
        np.testing.assert_allclose(estimate.value, 1.0, rtol=1e-6)
        np.testing.assert_allclose(estimate.hypergradient, [2.0], rtol=1e-6)
        seen.add(float(estimate.w[0]))
    assert len(seen) > 1
    again = ask(jnp.zeros(1), jnp.ones(1), jax.random.key(0))
    assert float(again.w[0]) in seen


def test_other_data_in_a_draw_traces_nothing_more():
    """The arrays of a Partial are data."""
    traces = []

    def fit(w, alpha, batch):
        traces.append(None)
        return jnp.sum((w - alpha - batch) ** 2)

    estimator = hg.Implicit(hg.ClosedForm(lambda alpha, batch: alpha + batch))
    draws = [jax.tree_util.Partial(sample, s * jnp.ones((300, 1))) for s in (1.0, 2.0)]
    value = lambda draw: (
        hg.hypergradient(hg.Bilevel(fit, outer, data_fn=draw), estimator)(
            jnp.zeros(1), jnp.ones(1)
        ).value
    )
    np.testing.assert_allclose(value(draws[0]), 1.5**2)
    before = len(traces)
    np.testing.assert_allclose(value(draws[1]), 2.5**2)
    assert len(traces) == before


def test_losses_that_read_data_say_so_where_there_are_none():
    reads = lambda w, alpha, batch: jnp.sum((w - alpha) ** 2) + jnp.sum(batch["x"])
    problem = hg.Bilevel(reads, outer)
    with pytest.raises(TypeError, match=r"given no data, which hg\.Bilevel takes"):
        hg.hypergradient(problem, hg.Implicit(hg.Newton()))(jnp.zeros(2), jnp.ones(2))
