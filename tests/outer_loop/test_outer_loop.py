"""OuterLoop: runs that continue, blocks of steps, budgets, steps in a user's loop."""

import functools

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.bench.timing import measure_seconds
from hypergrad.outer_loop.block import BLOCK_SIZE, get_block_size
from tests.loops import TO_ONE, TO_ZERO, ExactEstimator, assert_same_bits, run_loop

CURVATURE = np.array([1.0, 3.0])


def inner_loss(w, alpha, batch):
    return 0.5 * jnp.sum((w - alpha) ** 2)


def outer_loss(w, alpha, batch):
    return 0.5 * jnp.sum(CURVATURE * (w - 1.0) ** 2)


PROBLEM = hg.Bilevel(inner_loss, outer_loss)
ADAM = optax.adam(0.05)
SGD = optax.sgd(0.1)
EXACT = ExactEstimator(noise=0.1)
START = (jnp.zeros(2), jnp.array([3.0, -2.0]))


def make_loop(estimator=EXACT, optimizer=ADAM, **options) -> hg.OuterLoop:
    return hg.OuterLoop(PROBLEM, estimator, optimizer, **options)


LOOP = make_loop()


def run(loop=LOOP, **options) -> hg.Trace:
    return loop.run(loop.init(*START), **options)


@functools.cache
def long_run() -> hg.Trace:
    return run(num_steps=600)


def rows_of(*traces: hg.Trace):
    """Returns what traces record per step, joined."""
    rows = [(t.value, t.stats, t.flags, t.metrics, t.alphas) for t in traces]
    return jax.tree.map(lambda *columns: np.concatenate(columns), *rows)


def ends_of(trace: hg.Trace):
    """Returns what a trace contains once."""
    return trace.alpha, trace.w, trace.best_alpha, trace.status_code, trace.state


# Runs that continue.

BATCHES = hg.Batches(jnp.linspace(0.0, 1.0, 12).reshape(6, 2), 2)
KEYED = hg.Batches(jnp.linspace(0.0, 1.0, 12).reshape(6, 2), 2, with_key=True)


def noisy_inner(w, alpha, batch):
    x, key = batch
    return 0.5 * jnp.sum((w - alpha - x.mean(0)) ** 2) * (1 + jax.random.uniform(key))


def mean_inner(w, alpha, batch):
    return 0.5 * jnp.mean(((w - alpha)[None] - batch) ** 2)


def data_outer(w, alpha, batch):
    return 0.5 * jnp.mean((w[None] - batch) ** 2)


DESCENT = hg.Descent(optax.sgd(0.3, momentum=0.5), 3)
CONTINUED = {
    "keyed batches, schedule, outer_data_fn": {
        "problem": hg.Bilevel(noisy_inner, data_outer, KEYED, jnp.ones((4, 2))),
        "estimator": hg.Unrolled(DESCENT),
        "optimizer": optax.adam(optax.exponential_decay(0.3, 2, 0.8)),
        "outer_data_fn": lambda step, data: data / (1 + step),
        "record_alphas": True,
    },
    "SABA": {
        "problem": hg.Bilevel(mean_inner, data_outer, BATCHES, BATCHES),
        "estimator": hg.SABA(optax.sgd(0.1)),
        "optimizer": optax.chain(
            optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.sgd(0.1)
        ),
        "space": hg.spaces.Interval(-4.0, 4.0),
    },
    "certificates, skip": {
        "problem": hg.Bilevel(inner_loss, outer_loss),
        "estimator": hg.Unrolled(DESCENT),
        "optimizer": SGD,
        "certify_every": 3,
        "on_untrusted": "skip",
    },
    "aggregator": {
        "problem": hg.Bilevel(inner_loss, (outer_loss, lambda w, a, b: jnp.sum(w**2))),
        "estimator": EXACT,
        "optimizer": optax.sgd(0.01),
        "aggregator": hg.objectives.AugmentedLagrangian(5.0, period=2),
    },
}


@pytest.mark.parametrize("name", CONTINUED)
def test_two_runs_are_one_longer_run_to_the_bit(name: str):
    """Everything that changes is in the state: 5 and 7 steps equal 12."""
    loop = hg.OuterLoop(**CONTINUED[name])
    whole = run(loop, num_steps=12)
    first = run(loop, num_steps=5)
    second = loop.run(first.state, num_steps=7)
    assert whole.status == "completed"
    assert int(second.first_step) == 5
    assert_same_bits(ends_of(second), ends_of(whole))
    assert_same_bits(rows_of(first, second), rows_of(whole))


@pytest.mark.parametrize("num_steps", [1, 50, 255, BLOCK_SIZE, 257, 300])
def test_minimize_continues_from_a_state(num_steps: int):
    """A shorter run is a prefix, whose length need not be a multiple of the block."""
    minimize = functools.partial(hg.minimize, PROBLEM, EXACT, ADAM, *START)
    first = minimize(num_steps=num_steps)
    second = minimize(num_steps=600 - num_steps, state=first.state)
    assert_same_bits(ends_of(second), ends_of(long_run()))
    assert_same_bits(rows_of(first, second), rows_of(long_run()))
    assert second.rows()[0]["step"] == num_steps


@jax.tree_util.register_pytree_node_class
class Wrapped:
    """A container that is compared by identity, as most classes are."""

    def __init__(self, x):
        self.x = x

    def tree_flatten(self):
        return (self.x,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_a_run_of_other_containers_can_be_continued():
    problem = hg.Bilevel(
        lambda w, alpha, batch: jnp.sum((w.x - alpha.x) ** 2),
        lambda w, alpha, batch: jnp.sum(w.x**2),
    )
    start = Wrapped(jnp.zeros(2)), Wrapped(jnp.ones(2))
    minimize = functools.partial(
        hg.minimize, problem, hg.Implicit(hg.Newton()), SGD, *start
    )
    trace = minimize(num_steps=2, state=minimize(num_steps=3).state)
    assert_same_bits(trace.alpha.x, minimize(num_steps=5).alpha.x)


def test_a_block_records_a_bounded_number_of_alphas():
    for size, expected in ((10, BLOCK_SIZE), (200_000, 10), (10**8, 1)):  # of 8 bytes
        loop = hg.OuterLoop(PROBLEM, EXACT, ADAM, record_alphas=True)
        shapes = jax.ShapeDtypeStruct((size,), jnp.float64)
        state = eqx.tree_at(lambda s: s.best_alpha, run(num_steps=1).state, shapes)
        assert get_block_size(loop, state) == expected


def test_an_infinite_budget_is_no_budget():
    """Also for a run that fails, whose blank rows remain."""
    outer = lambda w, alpha, batch: jnp.sum(w**2) + 0 * jnp.log(alpha - 1)
    problem = hg.Bilevel(lambda w, alpha, batch: (w - alpha) ** 2, outer)
    loop = hg.OuterLoop(problem, hg.Implicit(hg.Newton()), SGD)
    run_with = lambda budget: loop.run(loop.init(0.0, 1.2), num_steps=9, budget=budget)
    assert run_with(None).status != "completed"
    assert_same_bits(rows_of(run_with(np.inf)), rows_of(run_with(None)))


def test_a_concrete_state_can_be_continued_inside_jit():
    """Only the state is known outside; no argument is traced."""
    first = run(num_steps=3)
    inside = jax.jit(lambda: LOOP.run(first.state, num_steps=4))()
    chex.assert_trees_all_close(inside.alpha, run(num_steps=7).alpha, rtol=1e-12)


def test_states_that_cannot_be_continued_are_refused():
    """Another loop, a batch of runs, a trace, a second key."""
    state = run(num_steps=2).state
    minimize = functools.partial(hg.minimize, PROBLEM, EXACT, ADAM, *START, num_steps=2)
    with pytest.raises(TypeError, match="state"):
        minimize(state=run(num_steps=2))
    with pytest.raises(TypeError, match="state"):
        LOOP.run(run(num_steps=2), num_steps=2)
    with pytest.raises(ValueError, match="key"):
        minimize(state=state, key=jax.random.key(0))
    with pytest.raises(ValueError, match="state"):
        make_loop(optimizer=SGD).run(state, num_steps=2)
    with pytest.raises(ValueError, match="state"):
        LOOP.run(jax.tree.map(lambda x: x[None], state), num_steps=2)
    with pytest.raises(ValueError, match="alpha"):
        hg.minimize(
            PROBLEM, EXACT, ADAM, START[0], jnp.zeros(3), num_steps=2, state=state
        )


@pytest.mark.parametrize(
    "space",
    [
        pytest.param(hg.spaces.Interval(0.0, 100.0), id="other bounds"),
        pytest.param(hg.spaces.Positive(), id="other kind"),
        pytest.param(hg.spaces.Interval(jnp.zeros(3), jnp.ones(3)), id="other size"),
        pytest.param(None, id="none"),
    ],
)
def test_a_state_of_another_space_is_refused(space):
    """Its coordinates would stand for another ``alpha``."""
    estimator, alpha = hg.Implicit(hg.Newton()), jnp.array([0.4, 0.6])
    make_loop = lambda space: hg.OuterLoop(
        TO_ZERO, estimator, optax.sgd(0.1), space=space
    )
    unit = hg.spaces.Interval(0.0, 1.0)
    state = make_loop(unit).init(jnp.zeros(2), alpha)
    other = make_loop(space)
    for call in (other.alpha, other.step, lambda s: other.run(s, num_steps=1)):
        with pytest.raises(ValueError, match="same space"):
            call(state)
        with pytest.raises(TypeError, match="OuterState"):
            call(alpha)
    same = make_loop(hg.spaces.Interval(0.0, 1.0))
    np.testing.assert_allclose(same.alpha(state), alpha, rtol=1e-12)
    in_jit = jax.jit(lambda state: same.alpha(state))(state)
    np.testing.assert_allclose(in_jit, alpha, rtol=1e-12)


def test_the_state_of_a_failed_run_is_refused():
    """Its optimizer has seen the NaN."""
    blow_up = optax.scale_by_schedule(lambda count: jnp.where(count == 2, jnp.nan, 0.1))
    loop = make_loop(optimizer=blow_up)
    trace = run(loop, num_steps=4)
    assert int(trace.state.status) > 0
    with pytest.raises(ValueError, match="state"):
        loop.run(trace.state, num_steps=2)


# Blocks of steps.


def test_one_compiled_program_serves_all_runs():
    """Other numbers of steps, progress, limits and continued runs compile nothing.

    The counter in the state of the estimator is weakly typed at the beginning.
    """
    chex.clear_trace_counter()
    loss = chex.assert_max_traces(lambda *args: outer_loss(*args), n=8)
    loop = hg.OuterLoop(hg.Bilevel(inner_loss, loss), EXACT, ADAM)
    assert loop.estimator.init(PROBLEM, *START).weak_type
    first = run(loop, num_steps=3, budget=50.0)
    run(loop, num_steps=3, progress=lambda *_: None)
    with measure_seconds() as seconds:
        run(loop, num_steps=600)
        run(loop, num_steps=300, progress=lambda *_: None)
        run(loop, num_steps=40, time_limit=1e6)
        run(loop, budget=50.0)
        run(loop, num_steps=9, budget=50.0)
        loop.run(first.state, num_steps=300)
    assert seconds.compilation == 0.0
    with measure_seconds() as seconds:
        run(make_loop(optimizer=optax.adam(0.051)), num_steps=2)
    assert seconds.compilation > 0.0  # another program is compiled


def test_rows_after_a_failure_are_blank_in_every_block():
    """Also in blocks that begin after it."""
    blow_up = optax.scale_by_schedule(
        lambda count: jnp.where(count < 260, 0.0, jnp.nan)
    )
    trace = run(make_loop(optimizer=blow_up), num_steps=600)
    assert trace.status == "stopped: the step left alpha not finite"
    assert np.isfinite(trace.value).tolist() == [True] * 261 + [False] * 339
    assert not np.any(trace.stats["gradient_equivalents"][261:])
    assert not np.any(trace.flags["not_finite"])


def test_blank_rows_of_alpha_are_nan_whatever_its_names_are():
    """A leaf may have the name of a cost, which is 0 where no step was made."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: (w - alpha["num_values"]) ** 2,
        lambda w, alpha, batch: w**2 + jnp.nan * (w < 2.5),
    )
    loop = hg.OuterLoop(
        problem,
        ExactEstimator(lambda alpha, data: alpha["num_values"]),
        optax.sgd(0.1),
        record_alphas=True,
    )
    trace = loop.run(loop.init(0.0, {"num_values": 3.0}), num_steps=5)
    np.testing.assert_allclose(trace.alphas["num_values"][:2], [3.0, 2.4])
    # The value at 2.4 is NaN, and its row the last one that was made.
    assert np.isnan(trace.alphas["num_values"][2:]).all()
    assert not np.any(trace.stats["gradient_equivalents"][2:])


# Progress.


@pytest.mark.parametrize("num_steps", [1, 7, 20, 41, 600])
def test_progress_changes_nothing_and_is_called_about_twenty_times(num_steps: int):
    """With the value of the last step, and at the end of the run."""
    calls = []
    trace = run(num_steps=num_steps, progress=lambda *call: calls.append(call))
    plain = run(num_steps=num_steps)
    assert_same_bits(ends_of(trace), ends_of(plain))
    assert_same_bits(rows_of(trace), rows_of(plain))
    steps = [step for step, _ in calls]
    assert steps == sorted(set(steps))
    assert steps[-1] == num_steps
    assert len(calls) == num_steps or 10 < len(calls) <= 20
    for step, value in calls:
        assert value == float(plain.value[step - 1])


# Budgets.

COSTS = np.tile([1.0, 2.5, 0.25], 200)


@pytest.mark.parametrize("budget", [1e-3, 1.0, 1.5, 3.5, 3.75, 700.0])
def test_a_budget_is_exceeded_by_less_than_the_last_step(budget: float):
    """At least one step is made, and none once the budget is spent."""
    loop = make_loop(ExactEstimator(cost=jnp.asarray(COSTS)))
    trace = run(loop, budget=budget)
    spent = np.cumsum(COSTS)
    expected = int(np.argmax(spent >= budget)) + 1
    assert len(trace.value) == len(trace.rows()) == expected
    assert trace.status == "completed"
    assert float(trace.cost[-1]) == spent[expected - 1]
    whole = run(loop, num_steps=expected)
    assert_same_bits(ends_of(trace), ends_of(whole))
    assert_same_bits(rows_of(trace), rows_of(whole))


def test_the_first_of_budget_and_num_steps_ends_a_run():
    """Three gradient-equivalents per step."""
    assert len(run(num_steps=5, budget=30.0).value) == 5
    assert len(run(num_steps=50, budget=30.0).value) == 10
    assert len(run(num_steps=600, budget=3 * 300.0).value) == 300


def test_many_small_costs_do_not_drift():
    """A plain sum of 1,000 times 0.1 is below 100: it would make another step."""
    loop = make_loop(ExactEstimator(cost=0.1))
    assert np.cumsum([0.1] * 1000)[-1] < 100.0
    calls = []
    progress = lambda step, value: calls.append(step)
    assert len(run(loop, num_steps=2000, budget=100.0).value) == 1000
    assert len(run(loop, budget=100.0, progress=progress).value) == 1000
    assert 10 < len(calls) <= 40


@pytest.mark.parametrize("cost", [0.0, -1.0, np.nan])
def test_a_cost_that_never_spends_the_budget_ends_the_run(cost: float):
    """Without a budget the same estimates are used."""
    loop = make_loop(ExactEstimator(cost=cost))
    trace = run(loop, budget=10.0)
    assert "budget" in trace.status
    assert len(trace.value) == 1
    np.testing.assert_array_equal(trace.alpha, START[1])
    free = run(loop, num_steps=3)
    assert free.status == "completed"
    assert np.all(np.isfinite(free.value))


def test_budgets_work_inside_jit_and_vmap():
    """The rows of steps that were not made are blank; budgets may be traced."""
    budgets = jnp.array([1.0, 9.0, 10.0, 1e6])
    run_budget = lambda budget: run(num_steps=6, budget=budget)
    for traces in (
        jax.vmap(run_budget)(budgets),
        jax.jit(jax.vmap(run_budget))(budgets),
    ):
        assert traces.value.shape == (4, 6)
        num_made = np.isfinite(traces.value).sum(1)
        assert num_made.tolist() == [1, 3, 4, 6]
        assert not traces.status_code.any()
        for i, n in enumerate(num_made):
            alone = run(num_steps=int(n))
            np.testing.assert_allclose(traces.alpha[i], alone.alpha, rtol=1e-12)
            np.testing.assert_allclose(traces.value[i, :n], alone.value, rtol=1e-12)
    inside = jax.jit(lambda: run(num_steps=6, budget=9.0))()
    assert np.isfinite(inside.value).tolist() == [True] * 3 + [False] * 3


def test_the_last_step_within_a_budget_is_evaluated():
    """Whether the host or the program ends the run."""
    loop = make_loop(metrics={"m": lambda w, alpha, key: alpha[0]}, eval_every=100)
    for trace in (
        run(loop, budget=10.0),
        run(loop, num_steps=9, budget=10.0),
        run(loop, num_steps=4),
    ):
        assert np.isfinite(trace.metrics["m"]).tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "num_steps"),
        ({"budget": np.inf}, "num_steps"),
        ({"num_steps": 2, "checkpoints": "folder"}, "checkpoints"),
    ],
)
def test_invalid_options_of_a_run_are_refused(options: dict, name: str):
    with pytest.raises((TypeError, ValueError), match=name):
        run(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 9.0},
        {"num_steps": 2, "progress": print},
        {"num_steps": 2, "time_limit": 9.0},
        {"num_steps": 2, "memory_limit": 1e12},
        {"num_steps": 2, "checkpoints": hg.Checkpoints("folder")},
    ],
    ids=lambda options: [*options][-1],
)
def test_options_of_the_host_are_refused_inside_jit(options: dict):
    with pytest.raises(TypeError, match=[*options][-1]):
        jax.jit(lambda w: hg.OuterLoop(PROBLEM, EXACT, ADAM).run(
            LOOP.init(w, START[1]), **options
        ).alpha)(START[0])  # fmt: skip


# Steps in a user's own loop.


def test_steps_by_hand_are_the_run():
    """A Python loop, a scan inside jit, and both under vmap."""
    loop = make_loop(record_alphas=True, metrics={"m": lambda w, a, key: a[0]})
    trace = run(loop, num_steps=6)
    state, records = loop.init(*START), []
    for _ in range(6):
        state, record = loop.step(state)
        records.append(record)
    records = jax.tree.map(lambda *rows: jnp.stack(rows), *records)

    def scan(alpha):
        step = lambda state, _: loop.step(state)
        return jax.lax.scan(step, loop.init(START[0], alpha), length=6)

    scanned = jax.jit(scan)(START[1])
    batch = jax.vmap(scan)(jnp.stack([START[1], START[1] + 1]))
    first_of_batch = jax.tree.map(lambda x: x[0], batch)
    expected = (trace.value, trace.stats, trace.flags, trace.metrics, trace.alphas)
    for end, rows in ((state, records), scanned, first_of_batch):
        rows = (rows.value, rows.stats, rows.flags, rows.metrics, rows.alpha)
        chex.assert_trees_all_close(rows, expected, rtol=1e-12)
        chex.assert_trees_all_close(end.optimizer_state, trace.state.optimizer_state)
        assert_same_bits(end.key, trace.state.key)
        np.testing.assert_allclose(loop.alpha(end), trace.alpha, rtol=1e-12)


def test_a_failed_state_stays_failed():
    """In a loop without an end of its own, later steps change neither alpha nor w."""
    blow_up = optax.scale_by_schedule(
        lambda count: jnp.where(count == 2, jnp.nan, -0.1)
    )
    loop = make_loop(ExactEstimator(), blow_up)
    trace = run(loop, num_steps=6)
    step = lambda state, _: loop.step(state)
    state, rows = jax.jit(lambda: jax.lax.scan(step, loop.init(*START), length=6))()
    assert int(state.status) == int(trace.status_code) > 0
    np.testing.assert_allclose(loop.alpha(state), trace.alpha, rtol=1e-12)
    np.testing.assert_allclose(state.w, trace.w, rtol=1e-12)
    np.testing.assert_allclose(state.best_alpha, trace.best_alpha, rtol=1e-12)
    np.testing.assert_allclose(rows.value[:3], trace.value[:3], rtol=1e-12)


# Functions that hide tracers.


@pytest.mark.parametrize(
    "options",
    [{"num_steps": 4}, {"num_steps": 300}, {"num_steps": 8, "budget": 10.0}],
    ids=["one block", "two blocks", "budget"],
)
def test_vmap_over_a_rate_that_the_optimizer_closes_over(options: dict):
    """No argument of minimize is traced, only a number inside a function."""
    minimize = lambda rate: hg.minimize(
        PROBLEM, ExactEstimator(), optax.sgd(rate), *START, **options
    )
    rates = jnp.array([0.01, 0.3])
    traces = jax.vmap(minimize)(rates)
    for i, rate in enumerate(rates):
        alone = minimize(float(rate))
        num_rows = len(alone.value)
        np.testing.assert_allclose(traces.alpha[i], alone.alpha, rtol=1e-12)
        np.testing.assert_allclose(traces.value[i, :num_rows], alone.value, rtol=1e-12)
        assert not np.isfinite(traces.value[i, num_rows:]).any()
    assert not np.allclose(traces.alpha[0], traces.alpha[1])


def test_vmap_over_a_number_that_the_estimator_closes_over():
    """And over one that is a field of the estimator."""
    start = jnp.array([0.5, 2.0])

    def closed_over(scale):
        estimator = ExactEstimator(lambda alpha, data: scale * alpha)
        return hg.minimize(PROBLEM, estimator, SGD, *START, num_steps=3).alpha

    def field(cost):
        estimator = ExactEstimator(cost=cost)
        return hg.minimize(PROBLEM, estimator, SGD, *START, num_steps=3).cost[-1]

    alone = [closed_over(float(scale)) for scale in start]
    np.testing.assert_allclose(jax.vmap(closed_over)(start), alone, rtol=1e-12)
    assert jax.vmap(field)(start).tolist() == [1.5, 6.0]


# Recorded alphas.


def test_recorded_alphas_are_those_before_each_step():
    """Structured like alpha, in the space, NaN after a failure; None by default."""
    assert long_run().alphas is None
    alpha = {"a": jnp.array(0.5), "b": [jnp.array([2.0, 3.0])]}
    flat = lambda alpha: jnp.concatenate([alpha["a"][None], *alpha["b"]])
    blow_up = optax.scale_by_schedule(lambda count: jnp.where(count < 3, -0.1, jnp.nan))
    problem = hg.Bilevel(
        lambda w, alpha, batch: jnp.sum((w - flat(alpha)) ** 2),
        lambda w, alpha, batch: jnp.sum((w - 1.0) ** 2),
    )
    trace = run_loop(
        problem, ExactEstimator(lambda alpha, data: flat(alpha)), blow_up, jnp.zeros(3),
        alpha, num_steps=6, record_alphas=True, space=hg.spaces.Positive(),
        metrics={"a": lambda w, alpha, key: alpha["a"],
                 "b": lambda w, alpha, key: alpha["b"][0][1]},
    )  # fmt: skip
    chex.assert_trees_all_equal_structs(trace.alphas, alpha)
    np.testing.assert_array_equal(trace.alphas["a"], trace.metrics["a"])
    np.testing.assert_array_equal(trace.alphas["b"][0][:, 1], trace.metrics["b"])
    assert trace.alphas["b"][0].shape == (6, 2)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], trace.alphas), alpha)
    assert np.isfinite(trace.alphas["a"]).tolist() == [True] * 4 + [False] * 2
    assert len(set(trace.alphas["a"][:4].tolist())) == 4


# Estimators of others.


class MinimalEstimator:
    """Returns only the three values without which an estimate is none."""

    def init(self, problem, w, alpha, key=None):
        return None

    def estimate(self, problem, state, alpha, key):
        value, gradient = jax.value_and_grad(outer_loss)(alpha, alpha, None)
        return hg.Estimate(value, gradient, alpha, {}), state


class RefiningEstimator(MinimalEstimator):
    """It can also repeat an estimate."""

    def refine(self, problem, state, alpha, key):
        return self.estimate(problem, state, alpha, key)


def test_a_minimal_estimator_gives_a_hypergradient():
    """Missing statistics are NaN, and the estimate states that nothing is checked."""
    estimate = hg.hypergradient(PROBLEM, MinimalEstimator())(*START)
    expected = CURVATURE * (START[1] - 1)
    np.testing.assert_allclose(estimate.hypergradient, expected, rtol=1e-12)
    reference = hg.hypergradient(PROBLEM, hg.Unrolled(DESCENT))(*START)
    assert estimate.stats.keys() == reference.stats.keys()
    assert np.isnan(estimate.stats["gradient_equivalents"])
    assert not estimate.trusted
    assert len(estimate.reasons) == 1


@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        (MinimalEstimator(), {}),
        (MinimalEstimator(), {"on_untrusted": "skip", "certify_every": 1}),
        (MinimalEstimator(), {"on_untrusted": "stop", "certify_every": 1}),
        (RefiningEstimator(), {"on_untrusted": "refine", "certify_every": 1}),
    ],
    ids=["record", "skip", "stop", "refine"],
)
def test_a_minimal_estimator_can_be_minimized(estimator, options: dict):
    """With certificates it is trusted; the path is that of exact gradients."""
    trace = run(make_loop(estimator, SGD, **options), num_steps=4)
    expected = 1 + (START[1] - 1) * (1 - 0.1 * CURVATURE) ** 4
    assert trace.status == "completed"
    np.testing.assert_allclose(trace.alpha, expected, rtol=1e-12)
    assert np.all(trace.stats["trusted"] == ("certify_every" in options))
    assert ("refined" in trace.stats) == (options.get("on_untrusted") == "refine")
    assert np.all(np.isnan(trace.stats["gradient_equivalents"]))
    assert bool(trace.reasons()) == (not options)


def test_a_guard_that_lets_no_step_of_a_minimal_estimator_through_is_refused():
    for on_untrusted in ("skip", "stop"):
        with pytest.raises(ValueError, match="on_untrusted"):
            run(make_loop(MinimalEstimator(), on_untrusted=on_untrusted), num_steps=1)
    with pytest.raises(ValueError, match="on_untrusted"):
        make_loop(MinimalEstimator(), on_untrusted="refine")


def test_a_minimal_estimator_has_no_cost_to_budget():
    trace = run(make_loop(MinimalEstimator()), budget=3.0)
    assert "budget" in trace.status
    assert len(trace.value) == 1


class Flagged(eqx.Module):
    """Has statistics and flags of its own."""

    def init(self, problem, w, alpha, key=None):
        return {"index": 0}  # a Python number

    def estimate(self, problem, state, alpha, key):
        value, gradient = jax.value_and_grad(outer_loss)(alpha, alpha, None)
        index = state["index"]
        flags = {"too hot": index % 2 == 1, "inner_error": jnp.asarray(False)}
        stats = {"heat": 1.5 * index, "num_grads": 2}
        return hg.Estimate(value, gradient, alpha, stats, flags), {"index": index + 1}


def test_own_flags_and_statistics_are_recorded():
    """A flag that the library does not know is its own sentence."""
    loop = make_loop(Flagged(), SGD)
    trace = run(loop, num_steps=4)
    assert trace.stats["heat"].tolist() == [0.0, 1.5, 3.0, 4.5]
    assert trace.stats["num_grads"].tolist() == [2.0] * 4
    assert trace.flags["too hot"].tolist() == [False, True, False, True]
    assert trace.stats["trusted"].tolist() == [True, False, True, False]
    assert trace.reasons() == {"too hot": [1, 3]}
    assert loop.run(trace.state, num_steps=4).reasons() == {"too hot": [5, 7]}


@pytest.mark.parametrize(
    "method",
    [
        hg.SRBA(optax.sgd(0.1), period=4),
        hg.VRBO(optax.sgd(0.1), 2, 3, period=4, step_size=0.1),
        hg.Average(hg.SRBA(optax.sgd(0.1), period=4), 2),
    ],
    ids=["SRBA", "VRBO", "Average of SRBA"],
)
def test_methods_that_add_differences_refuse_other_outer_data_at_each_step(method):
    problem = hg.Bilevel(
        lambda w, alpha, batch: jnp.sum((w - alpha) ** 2),
        lambda w, alpha, batch: jnp.sum(batch * w**2),
        None,
        jnp.ones(()),
    )
    with pytest.raises(ValueError, match="outer_data_fn must be None"):
        hg.OuterLoop(
            problem, method, optax.sgd(0.1), outer_data_fn=lambda step, data: data
        )


def test_an_average_of_estimates_that_are_never_trusted_is_never_trusted():
    evolution = hg.Evolution(hg.Newton(), 0.1, 8)
    for estimator in (evolution, hg.Average(evolution, 2)):
        loop = hg.OuterLoop(TO_ONE, estimator, optax.sgd(0.1), on_untrusted="skip")
        with pytest.raises(ValueError, match="never trusted"):
            loop.init(0.0, 3.0)


def lossy_loss(w, alpha, batch):
    return (w - alpha - jnp.round(alpha)) ** 2


@pytest.mark.parametrize(
    ("estimator", "certify_every"),
    [
        (hg.Implicit(hg.Newton()), None),
        (hg.Implicit(hg.Newton()), 1),
        (hg.Average(hg.Implicit(hg.Newton()), 2), None),
        (hg.SOBA(SGD, SGD), 1),
        (hg.Unrolled(hg.Descent(SGD, 3)), None),
        (hg.Unrolled(hg.Descent(SGD, 3)), 1),
    ],
    ids=["Implicit", "certified", "Average", "SOBA", "Unrolled", "certified Unrolled"],
)
def test_a_loss_that_rounds_is_never_trusted(estimator, certify_every):
    """The error names the line, and no certificate, which would not be trusted."""
    problem = hg.Bilevel(lossy_loss, lambda w, alpha, batch: (w - 1) ** 2)
    loop = hg.OuterLoop(
        problem, estimator, SGD, certify_every=certify_every, on_untrusted="skip"
    )
    with pytest.raises(ValueError, match="never trusted") as error:
        loop.init(0.0, 3.0)
    assert __file__ in str(error.value)
    assert "certify_every" not in str(error.value)


def test_a_certificate_is_trusted_where_only_a_step_loses_a_derivative():
    estimator = hg.FixedPoint(hg.Descent(optax.sign_sgd(0.01), 400), 5)
    make = lambda **settings: hg.OuterLoop(
        TO_ONE, estimator, SGD, on_untrusted="skip", **settings
    ).init(0.9, 1.0)
    with pytest.raises(ValueError, match="Use another optimizer"):
        make()
    make(certify_every=1)


def test_no_certificate_stands_for_an_average_over_keys():
    problem = hg.Bilevel(
        lambda w, alpha, key: (w - alpha - jax.random.normal(key)) ** 2,
        lambda w, alpha, batch: w**3,
        hg.Batches(None, with_key=True),
    )
    average = hg.Average(hg.Implicit(hg.Newton()), 4)
    with pytest.raises(ValueError, match="average over samples of the data"):
        hg.OuterLoop(problem, average, optax.sgd(0.1), certify_every=1)
