"""Runs that record every n-th step: the same steps, with fewer rows."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.outer_loop.block import PackedRecord, run_block
from hypergrad.outer_loop.estimate import ADDITIVE_STATS
from hypergrad.outer_loop.step import Budget, StepRecord
from hypergrad.runtime.compat import enable_x64
from hypergrad.trees import to_numpy
from tests.estimators.single_loop.problems import ALPHA, W, with_batches
from tests.loops import TO_ZERO, ExactEstimator, run_loop
from tests.outer_loop.test_outer_loop import LOOP, PROBLEM, SGD, START, make_loop, run
from tests.parameters import slow_except

NUM_STEPS = 24


def first_entry(w, alpha, key):
    return alpha[0]


def single_loop() -> hg.OuterLoop:
    sgd = optax.sgd(0.05)
    return hg.OuterLoop(with_batches(1, 1), hg.SRBA(sgd, period=3), sgd)


CASES = {
    "noisy": (LOOP, START),
    "all alphas": (make_loop(record_alphas=True), START),
    "SRBA": (single_loop(), (W, ALPHA)),
}


@pytest.mark.parametrize("every", slow_except([2, 8, 24], [8]))
@pytest.mark.parametrize("case", CASES)
def test_a_row_is_that_of_its_last_step_with_the_costs_of_all(case: str, every: int):
    """The costs of SRBA differ from step to step.

    The best of the recorded values has a test of its own.
    """
    loop, start = CASES[case]
    full = loop.run(loop.init(*start), num_steps=NUM_STEPS)
    trace = loop.run(loop.init(*start), num_steps=NUM_STEPS, record_every=every)
    unranked = lambda s: dataclasses.replace(s, best_alpha=None, best_value=None)
    numbers = lambda t: jax.tree.map(to_numpy, (unranked(t.state), t.alpha, t.w))
    chex.assert_trees_all_close(numbers(trace), numbers(full), rtol=1e-12)
    last = lambda column: column[every - 1 :: every]
    others = lambda stats: {k: x for k, x in stats.items() if k not in ADDITIVE_STATS}
    rows = lambda t: (t.value, others(t.stats), t.flags, t.alphas)
    expected = jax.tree.map(last, rows(full))
    chex.assert_trees_all_close(rows(trace), expected, rtol=1e-12)
    for name in ADDITIVE_STATS:
        total = np.asarray(full.stats[name]).reshape(-1, every).sum(1)
        np.testing.assert_allclose(trace.stats[name], total, rtol=1e-12)
    steps = [row["step"] for row in trace.rows()]
    assert steps == list(range(every - 1, NUM_STEPS, every))


def test_best_alpha_is_the_best_of_the_recorded_ones():
    trace = run(make_loop(record_alphas=True), num_steps=NUM_STEPS, record_every=3)
    best = np.asarray(trace.alphas)[np.argmin(trace.value)]
    np.testing.assert_array_equal(trace.best_alpha, best)


def test_metrics_are_evaluated_at_the_first_record_after_each_multiple():
    loop = make_loop(metrics={"first": first_entry}, eval_every=6)
    trace = run(loop, num_steps=NUM_STEPS, record_every=3)
    is_evaluated = ~np.isnan(trace.metrics["first"])
    np.testing.assert_array_equal(is_evaluated, [1, 0, 1, 0, 1, 0, 1, 1])
    trace = run(make_loop(metrics={"first": first_entry}), num_steps=6, record_every=3)
    assert not np.isnan(trace.metrics["first"]).any()


@pytest.mark.parametrize(("budget", "num_rows"), [(12.0, 1), (13.0, 2), (25.0, 3)])
def test_a_budget_ends_a_run_after_a_whole_row(budget: float, num_rows: int):
    """Each step of this estimator costs three gradient-equivalents."""
    trace = run(budget=budget, record_every=4)
    assert len(trace.value) == num_rows
    assert trace.state.step == 4 * num_rows
    assert trace.cost[-1] == 3 * trace.state.step


def test_a_run_of_rows_is_continued_and_reported_in_steps(tmp_path):
    """The interval of checkpoints is rounded up to whole rows."""
    reports = []
    checkpoints = hg.Checkpoints(tmp_path, every=5)
    trace = run(
        num_steps=NUM_STEPS,
        record_every=3,
        checkpoints=checkpoints,
        progress=lambda step, value: reports.append(step),
    )
    assert reports == list(range(3, NUM_STEPS + 1, 3))
    steps = sorted(int(file.stem[5:]) for file in tmp_path.glob("step-*.json"))
    assert steps[-1] == NUM_STEPS
    assert all(step % 6 == 0 for step in steps[:-1])
    whole = run(num_steps=48, record_every=3)
    resumed = run(num_steps=48, record_every=3, checkpoints=checkpoints)
    chex.assert_trees_all_equal(resumed.state, whole.state)
    chex.assert_trees_all_equal(resumed.value, whole.value)
    continued = LOOP.run(trace.state, num_steps=NUM_STEPS, record_every=3)
    chex.assert_trees_all_equal(continued.state, whole.state)
    assert continued.rows()[0]["step"] == NUM_STEPS + 2
    with pytest.raises(ValueError, match="record_every"):
        run(num_steps=48, record_every=1, checkpoints=checkpoints)


def test_a_failure_between_records_returns_to_the_last_good_record():
    """The value is NaN once alpha has moved below 2, in the fourth step."""
    outer = lambda w, alpha, batch: jnp.sum(jnp.where(alpha > 2.0, w, jnp.nan))
    problem = hg.Bilevel(PROBLEM.inner_loss, outer)
    implicit = hg.Implicit(hg.ClosedForm(lambda alpha, batch: alpha))
    loop = hg.OuterLoop(problem, implicit, optax.sgd(0.3))
    full = loop.run(loop.init(0.0, 3.0), num_steps=8)
    assert np.isfinite(full.value).sum() == 4
    trace = loop.run(loop.init(0.0, 3.0), num_steps=8, record_every=2)
    assert trace.status == full.status == "stopped: the outer value is not finite"
    np.testing.assert_allclose(trace.alpha, 3.0 - 3 * 0.3)
    np.testing.assert_array_equal(np.isfinite(trace.value), [1, 1, 0, 0])
    trace = loop.run(loop.init(0.0, 3.0), num_steps=9, record_every=3)
    np.testing.assert_allclose(trace.alpha, 3.0 - 2 * 0.3)


@pytest.mark.parametrize("every", [1, 2, 4])
def test_an_infinite_alpha_between_records_is_not_the_last_good_one(every: int):
    """The first step leads to infinity, where value and hypergradient are finite.

    The start is the only good alpha, and is recorded only with a row per step.
    """
    problem = hg.Bilevel(
        lambda w, alpha, batch: (w - jax.nn.sigmoid(alpha)) ** 2,
        lambda w, alpha, batch: (w - 0.9) ** 2,
    )
    estimator = ExactEstimator(lambda alpha, data: jax.nn.sigmoid(alpha))
    huge = optax.chain(optax.scale(1e200), optax.scale(-1e200))
    trace = run_loop(
        problem, estimator, huge, 0.0, 0.0, num_steps=4, record_every=every
    )
    # On the way to the next record infinity may become NaN.
    bad = ("the step left alpha", "the outer value is")
    assert trace.status in [f"stopped: {x} not finite" for x in bad]
    assert (trace.alpha, trace.best_alpha) == (0.0, 0.0)
    assert trace.w == (0.5 if every == 1 else 0.0)
    assert np.isfinite(trace.state.best_value) == (every == 1)


def test_a_run_with_fewer_records_works_inside_jit_and_vmap():
    state = LOOP.init(*START)
    one_run = lambda key: (
        LOOP.run(dataclasses.replace(state, key=key), num_steps=6, record_every=3).alpha
    )
    keys = jax.random.split(jax.random.key(1), 3)
    chex.assert_trees_all_close(
        jax.jit(jax.vmap(one_run))(keys), jnp.stack([one_run(key) for key in keys])
    )


@pytest.mark.parametrize(
    ("loop", "options", "name"),
    [
        (LOOP, {"num_steps": 10, "record_every": 3}, "num_steps"),
        (LOOP, {"num_steps": 10, "record_every": 0}, "record_every"),
        (LOOP, {"num_steps": 10, "record_every": 2.0}, "record_every"),
        (make_loop(eval_every=3), {"num_steps": 4, "record_every": 2}, "eval_every"),
        (
            hg.OuterLoop(PROBLEM, hg.Implicit(hg.Newton()), SGD, on_untrusted="stop"),
            {"num_steps": 4, "record_every": 2},
            "record_every",
        ),
    ],
    ids=["remainder", "zero", "float", "eval_every", "guard"],
)
def test_intervals_that_do_not_fit_are_refused(loop, options: dict, name: str):
    with pytest.raises((TypeError, ValueError), match=name):
        loop.run(loop.init(*START), **options)


def test_costs_of_many_steps_do_not_drift_in_float32():
    """A plain sum of 20,000 costs of 0.1 is off by 1e-4 of it, or more."""
    num_steps = 20_000
    with enable_x64(False):
        estimator = ExactEstimator(cost=0.1)
        trace = run_loop(
            TO_ZERO, estimator, optax.sgd(1e-4), 0.0, 1.0, num_steps=num_steps,
            record_every=num_steps,
        )  # fmt: skip
    (cost,) = trace.stats["gradient_equivalents"]
    assert cost.dtype == jnp.float32
    exact = num_steps * float(np.float32(0.1))
    np.testing.assert_allclose(cost, exact, rtol=3e-7)
    plain = np.cumsum(np.full(num_steps, 0.1, np.float32), dtype=np.float32)[-1]
    assert abs(plain - exact) > 1e-5 * exact


@pytest.mark.parametrize("every", [1, 3])
def test_a_run_with_a_budget_accepts_its_own_checkpoints(every: int, tmp_path):
    """The sum of six rounded costs of 7/3 is below 14, or is 14."""
    with enable_x64(False):
        estimator = ExactEstimator(cost=7 / 3)
        call = lambda budget=14.0: run_loop(
            TO_ZERO, estimator, optax.sgd(1e-4), 0.0, 1.0, budget=budget,
            record_every=every, checkpoints=hg.Checkpoints(tmp_path),
        )  # fmt: skip
        trace = call()
        chex.assert_trees_all_equal(call().alpha, trace.alpha)
        assert len(call(40.0).value) > len(trace.value)
        with pytest.raises(ValueError, match="budget"):
            call()
    row_cost = every * np.float32(7 / 3)
    assert trace.cost[-1] <= (14 + row_cost) * (1 + 1e-6)


@pytest.mark.parametrize("cost", [1.0, np.nan])
def test_the_cost_of_a_row_is_that_of_its_steps_for_the_budget(cost: float):
    """A step that costs nothing ends no run whose rows cost something."""
    costs = np.tile([cost, 0.0], 50)
    loop = make_loop(ExactEstimator(LOOP.estimator.solution_fn, cost=costs))
    trace = loop.run(loop.init(*START), budget=10.0, record_every=2)
    if np.isnan(cost):
        assert "budget" in trace.status
        assert len(trace.value) == 1
    else:
        assert trace.status == "completed"
        assert len(trace.value) == 10


def make_record() -> StepRecord:
    """Returns a record with two dtypes of floats, a flag, and leaves with axes."""
    return StepRecord(
        value=jnp.asarray(1.5),
        stats={"a": jnp.float32(2.5), "trusted": jnp.asarray(True)},
        flags={"b": jnp.asarray(False)},
        metrics={"c": jnp.arange(3), "d": jnp.asarray(7)},
        alpha={"x": jnp.ones((2, 1)), "y": None},
    )


@pytest.mark.parametrize("is_traced", [False, True])
def test_a_packed_record_is_unpacked_to_the_same_leaves(is_traced: bool):
    """Each row of a block, also inside `jax.jit`."""
    record = make_record()

    def pack_rows(record):
        packed = PackedRecord.pack(record)
        return jax.tree.map(lambda x: jnp.stack([x, 2 * x]), packed)

    if is_traced:
        rows = jax.jit(lambda record: pack_rows(record).unpack())(record)
    else:
        rows = pack_rows(record).unpack()
        assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(rows))
    expected = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), record)
    chex.assert_trees_all_equal(rows, expected)
    chex.assert_trees_all_equal_dtypes(rows, expected)


def test_a_block_writes_one_array_of_numbers_for_each_dtype():
    """Twenty statistics and flags would be twenty kernels in each step."""
    state, two = LOOP.init(*START), jnp.asarray(2)
    args = LOOP, state, Budget.create(None), two, two, 4
    text = run_block.lower(*args).as_text()
    num_writes = text.count("stablehlo.dynamic_update_slice")
    rows = run_block(*args)[2]
    assert num_writes == len(jax.tree.leaves(rows)) <= 3
    assert len(jax.tree.leaves(rows.unpack())) > 15
