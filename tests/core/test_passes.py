"""Tests of shuffled passes over the data, ``order="epoch"`` and ``"epoch_blocks"``."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.batches import at_draw, at_estimate, sample_in_pass
from hypergrad.diagnosis import _record_steps
from hypergrad.passes import PassPosition, index_shuffle
from hypergrad.problem import EstimateData, at_outer_step, with_own_order
from tests.parameters import slow_except

KEY = jax.random.key(0)
NUM_EXAMPLES, BATCH = 12, 3
SEED = jnp.array([1, 2], jnp.uint32)
ORDERS = ["epoch", "epoch_blocks"]


def permutations(size: int, num: int) -> np.ndarray:
    """Returns permutations of ``0 .. size - 1`` for random seeds, ``[num, size]``."""
    seeds = jax.random.bits(jax.random.key(size), (num, 2), jnp.uint32)
    entries = lambda seed: index_shuffle(jnp.arange(size), size, seed)
    return np.asarray(jax.jit(jax.vmap(entries))(seeds))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 16, 17, 100, 781, 4097])
def test_a_shuffle_is_a_permutation(size):
    entries = permutations(size, 20)
    expected = np.broadcast_to(np.arange(size), entries.shape)
    np.testing.assert_array_equal(np.sort(entries, axis=1), expected)


def test_all_short_permutations_are_equally_likely():
    """Checks the frequencies of all 120 permutations by a chi-square test."""
    num = 24_000
    entries = permutations(5, num)
    number = {p: i for i, p in enumerate(itertools.permutations(range(5)))}
    counts = np.bincount([number[tuple(row)] for row in entries.tolist()])
    assert counts.size == 120
    expected = num / 120
    assert np.sum((counts - expected) ** 2 / expected) < 184.4  # chi2(119): p = 1e-4


@pytest.mark.parametrize("size", [7, 8, 9, 25])
def test_half_of_all_permutations_are_odd(size):
    """The sign is the determinant of the matrix; a deviation of 5 sigma is an error."""
    num = 4000
    signs = np.linalg.det(np.eye(size)[permutations(size, num)])
    assert abs(np.mean(signs)) < 5 / num**0.5


@pytest.mark.parametrize(("i", "j"), [(0, 1), (0, 8), (31, 63)])
def test_all_pairs_of_entries_are_equally_likely(i, j):
    size, num = 64, 100_000
    entries = permutations(size, num)
    counts = np.zeros((size, size))
    np.add.at(counts, (entries[:, i], entries[:, j]), 1)
    assert np.all(np.diag(counts) == 0)
    expected = num / (size * (size - 1))
    counts = counts[~np.eye(size, dtype=bool)]
    # chi2(4031): p = 1e-4
    assert np.sum((counts - expected) ** 2 / expected) < 4372


def batches(order: str, num_examples: int = NUM_EXAMPLES, batch_size: int = BATCH):
    """Returns batches of the numbers of the examples."""
    return hg.Batches(jnp.arange(num_examples), batch_size, order=order)


def counting_loss(w, alpha, batch):
    """A loss whose step of size 1 adds to ``w`` how often each example was seen."""
    return -jnp.sum(w[batch]) + 0.0 * jnp.sum(w) * jnp.sum(alpha)


def outer_counting_loss(w, alpha, batch):
    """A loss whose step of size 1 adds to ``alpha`` how often each was seen."""
    return -jnp.sum(alpha[batch])


def counting_problem(order: str, **options: bool) -> hg.Bilevel:
    inner_loss, outer_loss = counting_loss, outer_counting_loss
    if options.get("with_key", False):
        zero = lambda key: 0.0 * jax.random.uniform(key)
        inner_loss = lambda w, alpha, x: counting_loss(w, alpha, x[0]) + zero(x[1])
        outer_loss = lambda w, alpha, x: (
            outer_counting_loss(w, alpha, x[0]) + zero(x[1])
        )
    data = hg.Batches(jnp.arange(NUM_EXAMPLES), BATCH, order=order, **options)
    return hg.Bilevel(inner_loss, outer_loss, data, data)


def run_counting(problem, estimator, num_steps, key=KEY, **options) -> hg.Trace:
    """Returns the trace of a run that begins without counts."""
    zeros = jnp.zeros(NUM_EXAMPLES)
    return hg.minimize(
        problem, estimator, optax.sgd(1.0), zeros, zeros, num_steps=num_steps, key=key,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_passes", [1, 3])
def test_an_inner_run_sees_every_example_once_per_pass(order, num_passes):
    num_steps = num_passes * NUM_EXAMPLES // BATCH
    solver = hg.Descent(optax.sgd(1.0), num_steps)
    w, _ = solver.solve(
        counting_loss, jnp.zeros(NUM_EXAMPLES), 1.0, batches(order), KEY
    )
    np.testing.assert_array_equal(w, num_passes)


def visits(data: hg.Batches, key: jax.Array, num: int, stream: str = "w") -> list[list]:
    """Returns the examples of the first ``num`` batches of a run."""
    draw = lambda k: sample_in_pass(at_key(data, key), KEY, k, num, stream=stream)
    return jax.jit(jax.vmap(draw))(jnp.arange(num)).tolist()


def at_key(data: hg.Batches, key: jax.Array) -> hg.Batches:
    """Returns the data at the first estimate of a run."""
    return at_estimate(data, PassPosition.from_key(key).seed, jnp.asarray(0))


@pytest.mark.parametrize("order", ORDERS)
def test_each_pass_key_and_stream_has_its_own_order(order):
    """Of 20 or 6 batches; equal orders have a probability below 1e-12."""
    data = batches(order, 60, 3)
    passes = visits(data, KEY, 40)
    other_key = visits(data, jax.random.key(1), 20)
    other_stream = visits(data, KEY, 20, stream="v")
    orders = [passes[:20], passes[20:], other_key, other_stream]
    for visited in orders:
        assert sorted(itertools.chain(*visited)) == list(range(60))
    for x, y in itertools.combinations(orders, 2):
        assert sum(a == b for a, b in zip(x, y, strict=True)) < 10
    assert visits(data, KEY, 40) == passes


def test_an_epoch_mixes_the_examples_of_its_batches_and_blocks_stay_together():
    for order, num_blocks in ("epoch", 0), ("epoch_blocks", 20):
        visited = visits(batches(order, 60, 3), KEY, 20)
        is_block = [row == list(range(row[0], row[0] + 3)) for row in visited]
        assert sum(is_block) == num_blocks


def test_a_pass_leaves_out_other_examples_in_each_pass():
    visited = visits(batches("epoch", 50, 8), KEY, 6 * 40)
    passes = [list(itertools.chain(*visited[6 * i : 6 * i + 6])) for i in range(40)]
    assert all(len(set(each)) == 48 for each in passes)
    left_out = [x for each in passes for x in set(range(50)) - set(each)]
    assert len(set(left_out)) > 30


def test_the_last_of_overlapping_blocks_is_visited_once_per_pass():
    visited = visits(batches("epoch_blocks", 7, 3), KEY, 3)
    assert sorted(visited) == [[0, 1, 2], [3, 4, 5], [4, 5, 6]]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("with_key", [False, True])
def test_a_batch_in_no_run_depends_on_its_key_alone(order, with_key):
    """Its examples differ, and all are equally likely (chi-square test)."""
    data = hg.Batches(jnp.arange(12), 3, order=order, with_key=with_key)
    samples = jax.vmap(data.sample)(jax.random.split(KEY, 4000))
    samples = np.asarray(samples[0] if with_key else samples)
    assert all(len(set(row)) == 3 for row in samples.tolist())
    counts = np.bincount(samples.ravel())
    scale = 3 if order == "epoch_blocks" else 1  # examples of a block come together
    assert np.sum((counts - 1000) ** 2 / 1000) / scale < 37.4  # chi2(11): p = 1e-4


@pytest.mark.parametrize("order", slow_except(ORDERS, ["epoch"]))
@pytest.mark.parametrize(
    ("estimator", "num_inner"),
    [
        (hg.SOBA(optax.sgd(1.0)), 1),
        (hg.TTSA(optax.sgd(1.0), 1, step_size=0.1), 1),
        (hg.FSLA(optax.sgd(1.0), momentum=0.0), 1),
        (hg.StocBiO(optax.sgd(1.0), 5, 2, step_size=0.1), 5),
        (hg.AmIGO(optax.sgd(1.0), 3, 2), 3),
        (hg.MRBO(optax.sgd(1.0), 2, step_size=0.1, momentum=0.0), 1),
        (hg.SUSTAIN(optax.sgd(1.0), 2, step_size=0.1, momentum=0.0), 1),
        (hg.F2SA(optax.sgd(1.0), 5, penalty=10.0), 5),
        (hg.PZOBO(optax.sgd(1.0), 5, 2, sigma=0.1), 5),
        (hg.Unrolled(hg.Descent(optax.sgd(1.0), 5), warm_start=True), 5),
    ],
    ids=lambda x: type(x).__name__,
)
def test_passes_go_on_over_the_outer_steps(order, estimator, num_inner):
    """After as many outer steps as a pass has batches, all counts are equal."""
    trace = run_counting(counting_problem(order), estimator, NUM_EXAMPLES // BATCH)
    np.testing.assert_allclose(trace.state.estimator_state.w, num_inner, rtol=1e-6)
    if getattr(estimator, "is_single_loop", False):
        np.testing.assert_allclose(trace.alpha, 1, rtol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "estimator",
    [hg.SOBA(optax.sgd(1.0)), hg.Unrolled(hg.Descent(optax.sgd(1.0), 5))],
    ids=["SOBA", "Unrolled"],
)
def test_batches_with_keys_are_in_passes_as_well(order, estimator):
    problem = counting_problem(order, with_key=True)
    trace = run_counting(problem, estimator, NUM_EXAMPLES // BATCH)
    counts = np.unique(np.asarray(trace.state.estimator_state.w))
    assert counts.size == 1
    assert counts[0] >= 1


@pytest.mark.parametrize("solver_steps", [4, 8])
def test_an_adaptive_inner_run_is_in_passes(solver_steps):
    """The run makes all of its steps, because its tolerance is out of reach."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: counting_loss(w, alpha, batch) + jnp.sum(w**2) * 1e-9,
        lambda w, alpha, batch: jnp.sum(w * alpha),
        batches("epoch"),
    )
    solver = hg.Descent(optax.sgd(1.0), solver_steps)
    estimator = hg.Implicit(solver, hg.CG(), rtol=1e-9)
    zeros = jnp.zeros(NUM_EXAMPLES)
    estimate = hg.hypergradient(problem, estimator)(zeros, zeros)
    num_steps = int(estimate.stats["num_inner_steps"])
    assert num_steps == solver_steps
    np.testing.assert_allclose(estimate.w, num_steps // 4, rtol=1e-3)


def test_particles_of_persistent_evolution_are_in_passes():
    solver = hg.Descent(optax.sgd(1.0), 8)
    estimator = hg.PersistentEvolution(solver, unroll_length=2, sigma=0.1, num_pairs=2)
    trace = run_counting(counting_problem("epoch"), estimator, 2)
    carries = trace.state.estimator_state.carries
    np.testing.assert_array_equal(carries[0], 1)


def test_a_diagnosis_follows_the_batches_of_the_run():
    problem, zeros = counting_problem("epoch"), jnp.zeros(NUM_EXAMPLES)
    solver = hg.Descent(optax.sgd(1.0), 7)
    data = EstimateData.sample(problem, KEY)
    loss = problem.inner_loss
    expected, _ = solver.solve(loss, zeros, zeros, data.inner_data, data.solver_key)
    actual, _ = _record_steps(solver, loss, zeros, zeros, data)
    np.testing.assert_array_equal(actual, expected)


def test_runs_with_other_keys_have_other_orders():
    problem = counting_problem("epoch")
    runs = [
        run_counting(problem, hg.SOBA(optax.sgd(1.0)), 2, key=jax.random.key(seed))
        for seed in range(4)
    ]
    assert len({tuple(run.state.estimator_state.w.tolist()) for run in runs}) >= 3
    assert len({tuple(run.alpha.tolist()) for run in runs}) >= 3
    assert any(np.any(run.alpha != run.state.estimator_state.w) for run in runs)


def test_without_a_run_the_draws_of_an_estimate_are_in_a_pass():
    """With ``data_fn`` each estimate has data of its own, and passes of its own."""
    make_data = jax.tree_util.Partial(lambda key: (batches("epoch"), batches("epoch")))
    problem = hg.Bilevel(counting_loss, outer_counting_loss, data_fn=make_data)
    method = hg.StocBiO(optax.sgd(1.0), NUM_EXAMPLES // BATCH, 2, step_size=0.1)
    trace = run_counting(problem, method, 3)
    np.testing.assert_array_equal(trace.state.estimator_state.w, 3)


def record_batches(
    order, estimator, num_steps, num_before=0, *, in_outer_loss=False
) -> list[tuple]:
    """Returns the examples of each evaluation of a loss in a run."""
    visited = []
    record = lambda x: visited.append(tuple(np.sort(x).tolist()))

    def inner_loss(w, alpha, batch):
        if not in_outer_loss:
            jax.debug.callback(record, batch)
        return 0.5 * jnp.sum((w[batch] - alpha[batch]) ** 2)

    def outer_loss(w, alpha, batch):
        if in_outer_loss:
            jax.debug.callback(record, batch)
        return outer_counting_loss(w, alpha, batch)

    problem = hg.Bilevel(inner_loss, outer_loss, batches(order), batches(order))
    loop = hg.OuterLoop(problem, estimator, optax.sgd(0.1))
    state = loop.init(jnp.zeros(NUM_EXAMPLES), jnp.ones(NUM_EXAMPLES))
    if num_before:
        state = loop.run(state, num_steps=num_before).state
    jax.effects_barrier()
    visited.clear()
    loop.run(state, num_steps=num_steps)
    jax.effects_barrier()
    return visited


def test_steps_of_the_adjoint_go_through_a_pass():
    """Four steps of ``w`` or ``v`` are a pass; the cross product is a batch."""
    estimator = hg.AmIGO(optax.sgd(0.1), 4, 4)
    visited = record_batches("epoch", estimator, 1)
    counts = np.bincount(np.concatenate(visited), minlength=NUM_EXAMPLES)
    assert sorted(counts) == [2] * (NUM_EXAMPLES - BATCH) + [3] * BATCH


def test_the_terms_of_a_series_have_passes_of_their_own():
    """Each product visits all examples in four outer steps, and in one any batch."""
    estimator = hg.StocBiO(optax.sgd(0.1), 1, 9, step_size=0.1)
    visited = record_batches("epoch", estimator, 4)
    num_evaluations = 1 + 8 + 1  # of w, of the series and of the cross product
    np.testing.assert_array_equal(np.bincount(np.concatenate(visited)), num_evaluations)
    visited_in_a_step = record_batches("epoch", estimator, 1)
    assert len(visited_in_a_step) == num_evaluations
    assert max(map(visited_in_a_step.count, visited_in_a_step)) < 8


def test_darts_sees_the_rest_of_a_pass_after_its_first_step():
    """In the first step ``w`` does not move."""
    trace = run_counting(
        counting_problem("epoch"), hg.DARTS(optax.sgd(1.0)), NUM_EXAMPLES // BATCH
    )
    counts = np.bincount(np.asarray(trace.state.estimator_state.w, int))
    assert counts.tolist() == [BATCH, NUM_EXAMPLES - BATCH]


@pytest.mark.parametrize("order", ORDERS)
def test_an_extended_run_continues_its_passes(order):
    loop = hg.OuterLoop(
        counting_problem(order), hg.SOBA(optax.sgd(1.0)), optax.sgd(0.1)
    )
    zeros = jnp.zeros(NUM_EXAMPLES)
    state = loop.init(zeros, zeros)
    for num_steps in (1, 2, 1):
        state = loop.run(state, num_steps=num_steps).state
    np.testing.assert_array_equal(state.estimator_state.w, 1)
    init_state = loop.init(zeros, zeros)
    at_once = loop.run(init_state, num_steps=7)
    without_records = loop.run(init_state, num_steps=7, record_every=7)
    continued = loop.run(state, num_steps=3)
    for trace in (without_records, continued):
        np.testing.assert_array_equal(
            trace.state.estimator_state.w, at_once.state.estimator_state.w
        )


@pytest.mark.parametrize("order", ORDERS)
def test_rows_of_the_tables_of_saba_are_all_new_after_a_pass(order):
    """The derivative of each example by ``alpha`` is its number; before a pass 0."""
    loss = lambda w, alpha, batch: alpha * jnp.mean(batch) + 0.0 * jnp.sum(w)
    data = hg.Batches(jnp.arange(1.0, 13.0), BATCH, order=order)
    loop = hg.OuterLoop(
        hg.Bilevel(loss, loss, data, data), hg.SABA(optax.sgd(0.1)), optax.sgd(0.1)
    )
    state = loop.run(loop.init(0.0, 1.0), num_steps=NUM_EXAMPLES // BATCH).state
    _, outer_table = state.estimator_state.memory
    rows = jnp.arange(1.0, 13.0)
    if order == "epoch_blocks":
        rows = jnp.mean(rows.reshape(-1, BATCH), axis=1)
    np.testing.assert_allclose(outer_table.updated_rows().direct, rows)
    np.testing.assert_allclose(outer_table.mean.direct, 6.5, rtol=1e-6)


def quadratic_loss(w, alpha, batch):
    return jnp.mean((w - alpha * batch) ** 2)


@pytest.mark.parametrize("order", ORDERS)
def test_an_inner_run_is_the_loop_over_its_batches(order):
    num_steps, rate, alpha = 10, 0.3, 1.5
    data = hg.Batches(jnp.linspace(-1.0, 2.0, 12), BATCH, order=order)
    w, _ = hg.Descent(optax.sgd(rate), num_steps).solve(
        quadratic_loss, jnp.asarray(0.5), alpha, data, KEY
    )
    _, steps_key = jax.random.split(KEY)
    expected = 0.5
    for k in range(num_steps):
        batch = np.asarray(
            at_draw(data, steps_key, k, num_steps, stream="w").sample(KEY)
        )
        expected -= rate * np.mean(2 * (expected - alpha * batch))
    np.testing.assert_allclose(w, expected, rtol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "estimator",
    [
        hg.Unrolled(hg.Descent(optax.sgd(0.3, 0.5), 10), checkpoint=False),
        hg.Unrolled(hg.Descent(optax.sgd(0.3, 0.5), 10), checkpoint=True),
        hg.Reversible(0.3, 0.5, 10),
    ],
    ids=["stored", "checkpoints", "reversible"],
)
def test_both_directions_of_a_run_see_the_same_batches(order, estimator):
    """The oracle is forward mode, which never visits a step again."""
    data = hg.Batches(jnp.linspace(-1.0, 2.0, 12), BATCH, order=order)
    problem = hg.Bilevel(quadratic_loss, lambda w, alpha, batch: w**2, data)
    problem = at_outer_step(problem, SEED, jnp.asarray(3))
    forward = hg.Forward(hg.Descent(optax.sgd(0.3, 0.5), 10))
    w, alpha = jnp.asarray(0.5), jnp.asarray(1.5)
    expected, actual = (
        jax.jit(each.estimate)(problem, each.init(problem, w, alpha), alpha, KEY)[0]
        for each in (forward, estimator)
    )
    # The integers of `Reversible` have 15 binary digits after the point in float32.
    np.testing.assert_allclose(actual.w, expected.w, rtol=1e-3)
    np.testing.assert_allclose(actual.hypergradient, expected.hypergradient, rtol=1e-3)


@pytest.mark.parametrize("order", ORDERS)
def test_samples_of_an_average_have_orders_of_their_own(order):
    problem = counting_problem(order)
    average = hg.Average(hg.Unrolled(hg.Descent(optax.sgd(1.0), 2)), num_samples=8)
    at_start = at_outer_step(problem, SEED, jnp.asarray(0))
    zeros = jnp.zeros(NUM_EXAMPLES)
    state = average.init(at_start, zeros, zeros, KEY)
    _, state = average.estimate(at_start, state, zeros, KEY)
    assert len({tuple(w) for w in np.asarray(state.w).tolist()}) >= 4
    outer_batches = [
        sample_in_pass(with_own_order(at_start, number).outer_data, KEY).tolist()
        for number in range(8)
    ]
    assert len({tuple(batch) for batch in outer_batches}) >= 3


def test_inner_and_outer_data_have_orders_of_their_own():
    problem = at_outer_step(counting_problem("epoch"), SEED, jnp.asarray(0))
    draw = lambda k, data: sample_in_pass(data, KEY, k, 4)
    inner, outer = (
        jax.jit(jax.vmap(draw, (0, None)))(jnp.arange(4), data).tolist()
        for data in (problem.inner_data, problem.outer_data)
    )
    assert sorted(itertools.chain(*inner)) == sorted(itertools.chain(*outer))
    assert inner != outer


@pytest.mark.parametrize("in_outer_loss", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_inner_steps_of_vrbo_go_through_a_pass(order, in_outer_loss):
    estimator = hg.VRBO(optax.sgd(0.1), 4, 1, period=100, step_size=0.1)
    # The first step makes a pass over all data, and none of these.
    visited = record_batches(
        order, estimator, 1, num_before=1, in_outer_loss=in_outer_loss
    )
    visited = {batch for batch in visited if len(batch) == BATCH}
    assert len(visited) == 4
    assert sorted(itertools.chain(*visited)) == list(range(NUM_EXAMPLES))
