"""Tests of data sets and of the batches that losses see."""

import dataclasses
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix
import pytest

import hypergrad as hg
from hypergrad.batches import num_examples, sample_fixed_batch
from hypergrad.problem import EstimateData
from hypergrad.runtime.compat import enable_x64
from tests.parameters import slow_except

with warnings.catch_warnings(action="ignore"):
    import jaxopt

KEY = jax.random.key(0)
DATA = {"x": np.arange(12.0).reshape(6, 2), "y": np.arange(6)}


def inner_loss(w, alpha, batch):
    return jnp.sum((w - alpha) ** 2)


def outer_loss(w, alpha, batch):
    return jnp.sum((w - 0.5) ** 2)


def test_take_returns_the_examples_at_the_indices():
    batch = hg.Batches(DATA, 2).take(jnp.array([4, 0, 4]))
    np.testing.assert_array_equal(batch["x"], DATA["x"][[4, 0, 4]])
    np.testing.assert_array_equal(batch["y"], [4, 0, 4])


@pytest.mark.parametrize("batch_size", [5, None])
def test_a_field_of_batches_can_be_replaced(batch_size):
    batches = dataclasses.replace(
        hg.Batches(DATA, 2, order="epoch"), batch_size=batch_size
    )
    chex.assert_trees_all_equal(batches, hg.Batches(DATA, batch_size, order="epoch"))


class DoubledBatches(hg.Batches):
    """Batches of three times the given data, whose examples are twice these."""

    def __init__(self, data, *args, **options):
        super().__init__(3 * data, *args, **options)

    def take(self, indices):
        return jax.tree.map(lambda x: 2 * x, super().take(indices))

    def full_batch(self, key=None):
        return jax.tree.map(lambda x: 2 * x, super().full_batch(key))


def test_a_full_batch_of_an_estimate_is_that_of_a_subclass():
    data = DoubledBatches(np.ones(6))
    data = EstimateData.sample(hg.Bilevel(inner_loss, outer_loss, data, data), KEY)
    for batch in (data.inner_data.sample(KEY), data.inner_batch(), data.outer_batch()):
        np.testing.assert_array_equal(batch, np.full(6, 6.0))


@pytest.mark.parametrize("with_key", [False, True], ids=["plain", "keyed"])
def test_the_batches_of_an_estimate_are_those_of_a_subclass(with_key):
    data = DoubledBatches(np.ones(6), 2, with_key=with_key)
    sample = EstimateData.sample(hg.Bilevel(inner_loss, outer_loss, data, data), KEY)
    batches = (
        sample.inner_data.sample(KEY),
        sample.inner_batch(3),
        sample.outer_batch(3),
    )
    for batch, size in zip(batches, (2, 3, 3), strict=True):
        examples = batch[0] if with_key else batch
        np.testing.assert_array_equal(examples, np.full(size, 6.0))


class Tensor:
    """An array of a library with dtypes of its own, as torch has them."""

    dtype = "torch.int64"

    def __init__(self, values):
        self.values = np.asarray(values)

    def __array__(self, dtype=None, copy=None):
        return self.values


def test_arrays_of_other_libraries_are_data():
    """Their integers are checked like those of NumPy."""
    np.testing.assert_array_equal(hg.Batches(Tensor([2, 3]), 1).data, [2, 3])
    with enable_x64(False), pytest.raises(ValueError, match="cannot hold"):
        hg.Batches(Tensor([2**40, 3]), 1)


def test_examples_may_have_keys_of_their_own():
    """A batch holds the keys of its examples, such as seeds of their noise."""
    keys = jax.random.split(KEY, 6)

    def noisy(w, alpha, batch):
        noise = jax.vmap(jax.random.normal)(batch[1])
        return 0.5 * jnp.mean((w - alpha - noise) ** 2)

    data = hg.Batches((DATA["x"], keys), 3)
    problem = hg.Bilevel(noisy, outer_loss, data)
    soba = hg.SOBA(optax.sgd(0.1))
    trace = hg.minimize(problem, soba, optax.sgd(0.1), 0.5, 1.0, num_steps=2)
    assert jnp.isfinite(trace.alpha)


def test_full_batch_is_the_data_whatever_the_batch_size():
    """Without a batch size it is also every sample."""
    batches = hg.Batches(DATA, 2)
    full = batches.full_batch()
    assert batches.num_examples == 6
    np.testing.assert_array_equal(full["x"], DATA["x"])
    assert jnp.issubdtype(full["y"].dtype, jnp.integer)
    np.testing.assert_array_equal(hg.Batches(DATA).sample(KEY)["y"], np.arange(6))


def test_a_sample_consists_of_examples_and_depends_on_the_key_alone():
    batches = hg.Batches(DATA, 4)
    batch = batches.sample(KEY)
    assert batch["x"].shape == (4, 2)
    np.testing.assert_array_equal(batch["x"], DATA["x"][np.asarray(batch["y"])])
    jitted_batch = jax.jit(lambda batches, key: batches.sample(key))(batches, KEY)
    np.testing.assert_array_equal(jitted_batch["x"], batch["x"])
    samples = jax.vmap(batches.sample)(jax.random.split(KEY, 20))["y"]
    assert len({tuple(row) for row in samples.tolist()}) >= 15


@pytest.mark.parametrize("with_key", [False, True], ids=["plain", "keyed"])
def test_examples_are_sampled_uniformly_with_replacement(with_key):
    """Checks frequencies by a chi-square test, and the rate of repeated examples."""
    batches = hg.Batches(np.arange(6), 3, with_key=with_key)
    samples = jax.vmap(batches.sample)(jax.random.split(KEY, 4000))
    samples = np.asarray(samples[0] if with_key else samples)
    counts = np.bincount(samples.ravel(), minlength=6)
    assert np.sum((counts - 2000) ** 2 / 2000) < 25.7  # chi2(5): p = 1e-4
    repeated = np.mean([len(set(row)) < 3 for row in samples.tolist()])
    assert abs(repeated - (1 - 5 / 6 * 4 / 6)) < 4 * np.sqrt(0.25 / 4000)


@pytest.mark.parametrize("with_key", [False, True], ids=["plain", "keyed"])
def test_blocks_are_contiguous_and_equally_likely(with_key):
    """Checks frequencies by a chi-square test; the last block overlaps."""
    batches = hg.Batches(np.arange(7), 3, with_key=with_key, order="blocks")
    assert batches.num_blocks == 3
    samples = jax.vmap(batches.sample)(jax.random.split(KEY, 3000))
    samples = np.asarray(samples[0] if with_key else samples)
    np.testing.assert_array_equal(samples, samples[:, :1] + np.arange(3))
    starts, counts = np.unique(samples[:, 0], return_counts=True)
    assert starts.tolist() == [0, 3, 4]
    assert np.sum((counts - 1000) ** 2 / 1000) < 18.4  # chi2(2): p = 1e-4


def test_an_estimate_keeps_the_order_of_its_batches():
    """A smaller batch of the estimate is a block as well, also with a key."""
    data = hg.Batches(np.arange(100), 50, with_key=True, order="blocks")
    estimate_data = EstimateData.sample(hg.Bilevel(inner_loss, outer_loss, data), KEY)
    assert estimate_data.inner_data.order == "blocks"
    batch, _ = estimate_data.inner_batch(10)
    np.testing.assert_array_equal(batch, batch[0] + np.arange(10))
    assert batch[0] % 10 == 0


def test_the_examples_of_an_estimate_do_not_depend_on_what_a_loss_samples():
    """A loss that samples indices like `Batches` does not sample those of its batch."""
    data = hg.Batches(np.arange(16), 4, with_key=True)
    problem = hg.Bilevel(inner_loss, outer_loss, data)

    def indices(key):
        examples, loss_key = EstimateData.sample(problem, key).inner_batch(4)
        partners = jax.random.randint(jax.random.split(loss_key)[0], (4,), 0, 16)
        return examples, partners

    examples, partners = jax.vmap(indices)(jax.random.split(KEY, 1000))
    # Independent indices agree with probability 1/16: 250 of 4000, with sigma 15.3.
    assert abs(jnp.sum(examples == partners) - 250) < 62


def test_an_unknown_order_of_batches_is_an_error():
    with pytest.raises(ValueError, match="order"):
        hg.Batches(DATA, 2, order="sorted")


def test_a_scalar_leaf_is_part_of_every_batch():
    batches = hg.Batches({"x": jnp.arange(6.0), "T": 0.3}, 4)
    assert batches.num_examples == 6
    batch = batches.sample(KEY)
    assert batch["x"].shape == (4,)
    assert batch["T"] == jnp.asarray(0.3)
    assert batches.take(jnp.array([2]))["T"].shape == ()


@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        (hg.Unrolled(hg.Descent(optax.sgd(0.1), 5)), {"with_key": True}),
        (
            hg.Implicit(
                hg.Descent(optax.sgd(0.1), 5), adjoint_batch_size=3, outer_batch_size=2
            ),
            {"with_key": True, "order": "blocks"},
        ),
        (hg.SABA(optax.sgd(0.1)), {}),
        (hg.SABA(optax.sgd(0.1)), {"order": "blocks"}),
    ],
    ids=["Unrolled", "Implicit", "SABA", "SABA of blocks"],
)
def test_shared_arrays_equal_the_same_arrays_closed_over(estimator, options):
    """To the bit: no method samples rows of them or loses them."""
    mix = jnp.arange(4.0).reshape(2, 2) / 4
    rows = {"x": jnp.asarray(DATA["x"]) / 12, "y": jnp.asarray(DATA["y"], float)}
    has_key = options.get("with_key", False)
    examples_of = lambda batch: batch[0] if has_key else batch

    noise_of = lambda batch: 0.1 * jax.random.normal(batch[1]) if has_key else 0.0

    def loss(w, alpha, noise, examples, mix):
        residual = examples["x"] @ mix @ w - examples["y"] + noise
        return jnp.mean(residual**2) + jnp.exp(alpha) * jnp.sum(w**2)

    closed = lambda w, alpha, batch: loss(
        w, alpha, noise_of(batch), examples_of(batch), mix
    )
    paired = lambda w, alpha, batch: loss(
        w, alpha, noise_of(batch), *examples_of(batch)
    )
    traces = [
        hg.minimize(
            hg.Bilevel(function, function, data, data), estimator, optax.sgd(0.1),
            jnp.ones(2), jnp.array(-1.0), num_steps=3,
        )
        for function, data in (
            (closed, hg.Batches(rows, 4, **options)),
            (paired, hg.Batches(rows, 4, shared=mix, **options)),
        )
    ]  # fmt: skip
    expected, actual = traces
    assert expected.alpha != -1
    for name in ("alpha", "w", "value", "stats"):
        chex.assert_trees_all_equal(getattr(actual, name), getattr(expected, name))


def test_an_array_that_is_no_example_names_the_argument_for_it():
    with pytest.raises(ValueError, match="shared="):
        hg.Batches((DATA, np.ones(7)), 2)


def make_problem_on(data):
    loss = lambda w, alpha, batch: (w - alpha) ** 2
    return hg.Bilevel(loss, loss, data)


@pytest.mark.parametrize(
    ("numbers", "fits"),
    [([0, 2**31 - 1], True), ([0, 2**31], False), ([-(2**31) - 1, 0], False)],
    ids=["the largest", "too large", "too low"],
)
def test_integers_that_would_wrap_around_are_refused(numbers, fits):
    rows = np.array(numbers, np.int64)
    with enable_x64(False):
        if fits:
            assert hg.Batches({"rows": rows}, 1).data["rows"].tolist() == numbers
            return
        for make in (lambda x: hg.Batches(x, 1), make_problem_on):
            with pytest.raises(ValueError, match=r"\['rows'\] holds .*int32"):
                make({"rows": rows})
    assert hg.Batches(rows, 1).data.tolist() == numbers


def test_keyed_batches_carry_a_fresh_key():
    """The key of a batch is independent of the indices and of other batches."""
    batches = hg.Batches(DATA, 4, with_key=True)
    batch, batch_key = batches.sample(KEY)
    same_batch, same_key = batches.sample(KEY)
    _, other_key = batches.sample(jax.random.key(1))
    bits = lambda key: jax.random.key_data(key).tolist()
    assert bits(batch_key) == bits(same_key)
    assert bits(batch_key) not in (bits(other_key), bits(KEY))
    np.testing.assert_array_equal(batch["y"], same_batch["y"])
    full, full_key = batches.full_batch()
    assert bits(full_key) == bits(jax.random.key(0))
    assert full["x"].shape == (6, 2)
    np.testing.assert_array_equal(batches.take(jnp.array([1]))["y"], [1])


def test_a_batch_without_data_is_a_key():
    batches = hg.Batches(None, with_key=True)
    for batch in (batches.sample(KEY), batches.full_batch()):
        assert jnp.issubdtype(batch.dtype, jax.dtypes.prng_key)
    assert batches.num_examples == 1


def test_batches_are_a_pytree_of_their_arrays():
    """Equal settings and shapes share a compiled program."""
    batches = hg.Batches(DATA, 4)
    assert [leaf.shape for leaf in jax.tree.leaves(batches)] == [(6, 2), (6,)]
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def sample(batches):
        return batches.sample(KEY)["x"]

    first = sample(batches)
    second = sample(hg.Batches({"x": -DATA["x"], "y": DATA["y"]}, 4))
    np.testing.assert_array_equal(first, -second)
    assert jax.tree.structure(batches) != jax.tree.structure(hg.Batches(DATA, 3))


def test_num_examples_is_the_common_length_of_the_leaves():
    """Scalar leaves are ignored; different lengths and keys have none."""
    x = jnp.ones((6, 2))
    assert num_examples(hg.Batches(DATA, 2)) == num_examples({"x": x}) == 6
    assert num_examples({"x": x, "scale": jnp.ones(())}) == 6
    assert num_examples({"x": x, "y": jnp.ones(5)}) is None
    assert num_examples(None) is num_examples(hg.Batches(None, with_key=True)) is None


def test_a_fixed_batch_has_the_given_size():
    assert sample_fixed_batch(hg.Batches(DATA, 2), 5, KEY)["x"].shape == (5, 2)
    assert sample_fixed_batch(hg.Batches(DATA, 2), None, KEY)["x"].shape == (6, 2)
    assert sample_fixed_batch(DATA, None, KEY) is DATA
    with pytest.raises(ValueError, match=r"hg\.Batches"):
        sample_fixed_batch(DATA, 5, KEY)


def noisy_loss(w, alpha, batch):
    """A loss with ``H = diag(1 + u)``, where ``u`` depends on the key of the batch."""
    examples, key = batch
    u = jax.random.uniform(key, (2,)) + 0.1 * jnp.mean(examples)
    return 0.5 * jnp.sum((1 + u) * w**2) - jnp.sum(alpha * w)


NOISY = hg.Bilevel(noisy_loss, outer_loss, hg.Batches(np.arange(6.0), 2, with_key=True))


def noisy_solution(alpha, batch):
    examples, key = batch
    return alpha / (1 + jax.random.uniform(key, (2,)) + 0.1 * jnp.mean(examples))


def noisy_data(key):
    """Returns equal examples, so that every mini-batch has the same mean."""
    return hg.Batches(jax.random.uniform(key) * jnp.ones(6), with_key=True), None


WHOLE_BATCH_SOLVERS = {
    "Newton": hg.Newton(),
    "LBFGS": hg.LBFGS(),
    "ClosedForm": hg.ClosedForm(noisy_solution),
    "jaxopt": hg.from_jaxopt(jaxopt.BFGS(noisy_loss, tol=1e-10)),
    "optimistix": hg.from_optimistix(optimistix.BFGS(rtol=1e-10, atol=1e-10)),
}
ESTIMATORS_OF_A_SAMPLE = {
    name: hg.Implicit(solver) for name, solver in WHOLE_BATCH_SOLVERS.items()
} | {
    "mini-batch": hg.Implicit(hg.Newton(), adjoint_batch_size=4),
    "certified": hg.Implicit(hg.LBFGS(), certify=True),
    "unrolled formula": hg.Unrolled(hg.ClosedForm(noisy_solution)),
    "fixed point": hg.FixedPoint(hg.ClosedForm(noisy_solution), num_terms=1),
    "differences": hg.CentralDifference(hg.Newton()),
    "penalty": hg.Penalty(hg.Newton(), 1e3, symmetric=True),
}
NOISY_PROBLEMS = {
    "data": hg.Bilevel(noisy_loss, outer_loss, noisy_data(KEY)[0]),
    "data_fn": hg.Bilevel(noisy_loss, outer_loss, data_fn=noisy_data),
}


@pytest.mark.parametrize(
    ("problem", "estimator"),
    slow_except(
        [("data", name) for name in ESTIMATORS_OF_A_SAMPLE] + [("data_fn", "Newton")],
        [("data_fn", "Newton")]
        + [
            ("data", name)
            for name in ESTIMATORS_OF_A_SAMPLE
            if name not in ("LBFGS", "jaxopt", "optimistix", "certified")
        ],
    ),
)
def test_w_is_solved_on_the_sample_of_the_adjoint(problem, estimator):
    """The closed form at the noise that ``w`` reveals is the hypergradient.

    For ``w_i = alpha_i / (1 + u_i)`` the derivative of ``sum (w - 0.5)^2`` is
    ``2 (w_i - 0.5) / (1 + u_i)``.
    """
    alpha = jnp.array([1.0, 2.0])
    gradient_fn = hg.hypergradient(
        NOISY_PROBLEMS[problem], ESTIMATORS_OF_A_SAMPLE[estimator]
    )
    for seed in range(3):
        estimate = gradient_fn(jnp.ones(2), alpha, jax.random.key(seed))
        expected = 2 * (estimate.w - 0.5) * estimate.w / alpha
        np.testing.assert_allclose(estimate.hypergradient, expected, rtol=1e-5)
        assert estimate.stats["inner_grad_norm"] < 1e-6
        assert not estimate.stats["adjoint_residual"] > 1e-5  # NaN without an adjoint


def test_stochastic_steps_see_a_new_key_each():
    """One key per estimate is only for solvers that use the full batch."""
    solver = hg.Descent(optax.sgd(1.0), 1)
    tally = lambda w, alpha, key: -w * jax.random.uniform(key) + 0 * alpha
    problem = hg.Bilevel(tally, outer_loss, hg.Batches(None, with_key=True))
    data = EstimateData.sample(problem, KEY)
    solve = lambda key: solver.solve(tally, 0.0, 0.0, data.inner_data, key)[0]
    samples = [float(solve(key)) for key in jax.random.split(KEY, 5)]
    assert len(set(samples)) == 5


def noisy_outer_loss(w, alpha, batch):
    return outer_loss(w, alpha, batch) + 0.1 * w[0] * jax.random.uniform(batch[1])


KEYLESS_PROBLEMS = {
    "inner_loss": ("inner_loss", inner_loss, outer_loss, None),
    "outer_loss": ("outer_loss", noisy_loss, outer_loss, NOISY.inner_data),
}


@pytest.mark.parametrize(
    ("name", "inner", "outer", "outer_data"),
    KEYLESS_PROBLEMS.values(),
    ids=KEYLESS_PROBLEMS,
)
def test_a_key_that_a_loss_never_reads_gets_a_warning(name, inner, outer, outer_data):
    """A forgotten `nnx.reseed` leaves the mask of a dropout the same in every step."""
    problem = hg.Bilevel(inner, outer, NOISY.inner_data, outer_data)
    estimator = hg.Implicit(hg.Newton())
    with pytest.warns(UserWarning, match=f"{name} never reads the key") as issued:
        hg.hypergradient(problem, estimator)(jnp.ones(2), jnp.ones(2), KEY)
    assert "nnx.reseed" in str(issued[0].message)
    assert {warning.filename for warning in issued} == {__file__}


def test_a_key_that_one_of_several_losses_reads_is_no_mistake():
    problem = hg.Bilevel(
        noisy_loss, (outer_loss, noisy_outer_loss), NOISY.inner_data, NOISY.inner_data
    )
    estimate = hg.hypergradient(problem, hg.Implicit(hg.Newton()))(
        jnp.ones(2), jnp.ones(2), KEY
    )
    assert estimate.value.shape == (2,)


def test_a_batch_size_of_a_key_alone_is_refused():
    data = hg.Batches(None, with_key=True)
    with pytest.raises(ValueError, match="needs examples, and these"):
        sample_fixed_batch(data, 8, jax.random.key(0))


@pytest.mark.filterwarnings("ignore:A JAX array is being set as static")
def test_a_number_of_numpy_is_refused_with_a_remedy():
    """Static numbers are a part of the program, which an array cannot be."""
    with pytest.raises(ValueError, match="Write 4, a number of Python"):
        hg.Batches(jnp.arange(6.0), np.int64(4))
    with pytest.raises(ValueError, match=r"num_steps .* Write 3\."):
        hg.Descent(optax.sgd(0.1), np.int64(3))


def test_shared_arrays_may_be_empty_and_are_named_in_errors():
    """As the edges of a graph that has none."""
    edges = jnp.zeros((0, 2), int)
    batch = hg.Batches(jnp.arange(6.0), 2, shared=edges).full_batch()
    assert batch[1].shape == (0, 2)
    with enable_x64(False):
        hg.Batches(jnp.arange(6.0), 2, shared=np.zeros((0, 2), np.int64))
    with pytest.raises(TypeError, match="shared leaf"):
        hg.Batches(jnp.arange(6.0), 2, shared={"edges": "abc"})
