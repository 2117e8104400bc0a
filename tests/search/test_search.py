"""Searches by trials against known optima, known costs and closed forms."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import validation
from hypergrad.inner import inner_stats
from hypergrad.runtime.compat import enable_x64
from hypergrad.spaces import Unit
from tests.search.problems import (
    BEST,
    FORMULA,
    PROBLEM,
    SPACE,
    TRIAL_COST,
    RecordingSearcher,
    inner_loss,
    outer_loss,
    record,
    search,
)

SGD = optax.sgd(0.1)


def test_searcher_is_told_the_value_of_each_proposal_and_the_lowest_is_the_best():
    """Of n uniform points one is within r of BEST, except for (1 - pi r^2)^n = 1e-4."""
    searcher = RecordingSearcher()
    trace = search(searcher=searcher, budget=100)
    alphas, values = map(np.array, zip(*searcher.told, strict=True))
    expected = np.sum((2 * alphas - 2 * BEST[None]) ** 2, axis=1)
    np.testing.assert_allclose(trace.value, expected, rtol=1e-12)
    np.testing.assert_array_equal(trace.value, values)
    np.testing.assert_array_equal(trace.best_alpha, alphas[expected.argmin()])
    assert np.linalg.norm(trace.best_alpha - BEST) < np.sqrt(
        -np.log(1e-4) / (np.pi * 75)
    )
    chex.assert_trees_all_equal(trace.alpha, trace.best_alpha)
    chex.assert_trees_all_close(trace.w, 2 * trace.best_alpha)
    assert trace.status == "completed"


@pytest.mark.parametrize(
    "space",
    [None, hg.spaces.Real(), hg.spaces.Interval(0.0, 10.0)],
    ids=["none", "unbounded", "scalar"],
)
def test_a_searcher_of_your_own_decides_what_alpha_is(space):
    """Only its proposals are checked; the space need not have samples."""

    class Normal:
        def init(self, space, key):
            return 0

        def ask(self, state, key):
            return jax.random.normal(key, (3,)), state + 1

        def tell(self, state, alpha, value):
            return state

    problem = hg.Bilevel(
        lambda w, alpha, batch: jnp.sum((w - alpha) ** 2),
        lambda w, alpha, batch: jnp.sum(w**2),
    )
    trace = hg.search(
        problem, hg.Newton(), Normal(), jnp.zeros(3), space=space, budget=20
    )
    assert trace.best_alpha.shape == (3,)
    with pytest.raises(TypeError, match="inner_loss"):
        hg.search(problem, hg.Newton(), Normal(), jnp.zeros(4), space=space, budget=20)


@pytest.mark.parametrize(
    ("budget", "num_trials"), [(1e-9, 1), (1.0, 1), (4.0, 3), (4.1, 3), (8.5, 6)]
)
def test_as_many_trials_are_made_as_fit_into_the_budget(budget, num_trials):
    """At least one trial is made."""
    trace = search(budget=budget)
    assert len(trace.value) == num_trials
    np.testing.assert_allclose(trace.cost[-1], num_trials * TRIAL_COST, rtol=1e-6)


@pytest.mark.parametrize("budget", [4.0, 7 * 4 / 3])
def test_a_budget_of_whole_trials_pays_for_all_of_them_in_float32(budget):
    """Three costs of 4/3 exceed 4 by rounding."""
    with enable_x64(False):
        trace = search(budget=budget)
    assert trace.stats["gradient_equivalents"].dtype == jnp.float32
    assert len(trace.value) == round(budget / TRIAL_COST)


def test_a_search_whose_cost_is_unknown_ends():
    """A cost that is NaN fits no budget."""

    class Unknown(eqx.Module):
        def solve(self, loss, w, alpha, batch, key):
            return alpha, inner_stats(0, jnp.nan, 0, 0)

    trace = search(solver=Unknown(), budget=10)
    assert len(trace.value) == 1


def test_w_is_checked_once_and_not_at_every_trial(monkeypatch):
    """Reading it would copy all parameters to the host."""
    shapes = []
    has_nan = validation._has_nan
    record = lambda x: shapes.append(jnp.shape(x)) or has_nan(x)
    monkeypatch.setattr(validation, "_has_nan", record)
    loss = lambda w, alpha, batch: jnp.sum((w - alpha) ** 2)
    trace = search(
        hg.Bilevel(loss, loss), hg.Descent(SGD, 1), w=jnp.zeros(5), space=Unit(),
        budget=20,
    )  # fmt: skip
    assert len(trace.value) > 5
    assert shapes.count((5,)) == 1


def test_trial_costs_its_inner_steps_and_one_value():
    """Ten steps on a third of the examples, and a value on half as many examples.

    The solver has no tolerance, and so no flag of one.
    """
    mean = lambda w, alpha, batch: jnp.mean((w - alpha) ** 2) + jnp.mean(batch)
    data = hg.Batches(jnp.zeros((6, 1)), 2), hg.Batches(jnp.zeros((3, 1)))
    problem, space = hg.Bilevel(mean, mean, *data), Unit(shape=(1,))
    trace = search(problem, hg.Descent(SGD, 10), w=jnp.zeros(1), space=space, budget=20)
    cost = 10 * 2 / 6 + 0.5 / 3
    assert len(trace.value) == 20 // cost
    np.testing.assert_allclose(trace.stats["gradient_equivalents"], cost, rtol=1e-6)
    np.testing.assert_array_equal(trace.stats["num_inner_steps"], 10)
    assert set(trace.flags) == {"not_finite"}


def test_every_trial_starts_at_the_given_w():
    """Half a step from 0 towards ``2 alpha`` ends at ``alpha``, in every trial."""
    problem = hg.Bilevel(inner_loss, lambda w, alpha, _: jnp.sum((w - alpha) ** 2))
    trace = search(problem, hg.Descent(optax.sgd(0.25), 1))
    np.testing.assert_allclose(trace.value, 0.0, atol=1e-30)
    np.testing.assert_allclose(trace.w, trace.alpha, rtol=1e-12)


def test_data_are_sampled_anew_in_each_trial():
    """A fair coin shows both sides in twenty trials."""
    coin = lambda key: (None, jax.random.bernoulli(key).astype(float))
    outer = lambda w, alpha, batch: batch + 0 * w[0] + 0 * alpha[0]
    trace = search(hg.Bilevel(inner_loss, outer, data_fn=coin), budget=27)
    assert set(trace.value.tolist()) == {0.0, 1.0}


def test_inner_and_outer_batches_have_different_keys():
    """The outer value is the distance of the noise of both, which is never zero."""
    noise = hg.Batches(None, with_key=True)
    draw = lambda alpha, key: alpha * jax.random.uniform(key)
    inner = lambda w, alpha, key: (w - draw(alpha, key)) ** 2
    outer = lambda w, alpha, key: jnp.abs(w - draw(alpha, key))
    problem, formula = hg.Bilevel(inner, outer, noise, noise), hg.ClosedForm(draw)
    trace = search(
        problem, formula, hg.searchers.Random(), 0.0, space=Unit(), budget=20
    )
    assert (trace.value > 1e-6).all()


# Trials that fail.


@pytest.mark.parametrize("failed", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("is_first", [True, False], ids=["first fails", "last fails"])
@pytest.mark.parametrize("num_losses", [1, 2])
def test_failed_trials_are_flagged_and_never_the_best(failed, is_first, num_losses):
    """A value that is not finite fails its trial; of two losses it is the second."""
    is_failed = lambda alpha: (alpha < 0.5) == is_first
    inner = lambda w, alpha, batch: (w - alpha) ** 2
    outer = lambda w, alpha, batch: jnp.where(is_failed(alpha), failed, alpha) + 0 * w
    constant = lambda w, alpha, batch: 1.0 + 0 * w
    problem = hg.Bilevel(inner, outer if num_losses == 1 else (constant, outer))
    formula, grid = hg.ClosedForm(lambda alpha, batch: alpha), hg.searchers.Grid(8)
    trace = search(problem, formula, grid, 0.0, space=Unit(), budget=40)
    points = np.linspace(0, 1, 8)
    assert trace.best_alpha == trace.w == points[~is_failed(points)].min()
    np.testing.assert_array_equal(trace.flags["not_finite"], is_failed(points))
    np.testing.assert_array_equal(trace.stats["trusted"], ~is_failed(points))
    (steps,) = trace.reasons().values()
    assert steps == np.flatnonzero(is_failed(points)).tolist()


@pytest.mark.parametrize("num_losses", [1, 2])
def test_trial_whose_w_is_not_finite_is_not_trusted(num_losses):
    """Its outer loss, which does not depend on that part of w, would be the lowest."""
    values = []

    class RecordingGrid(hg.searchers.Grid):
        def tell(self, state, alpha, value):
            values.append(np.ravel(value).tolist())
            return state

    formula = hg.ClosedForm(lambda alpha, batch: jnp.stack([alpha, 1 / alpha]))
    inner = lambda w, alpha, batch: (w[0] - alpha) ** 2
    outer = lambda w, alpha, batch: w[0] + 0 * alpha
    problem = hg.Bilevel(inner, outer if num_losses == 1 else (outer, outer))
    trace = search(problem, formula, RecordingGrid(3), space=Unit(), budget=40)
    assert trace.flags["not_finite"].tolist() == [True, False, False]
    assert trace.stats["trusted"].tolist() == [False, True, True]
    expected = np.tile([[np.nan], [0.5], [1.0]], num_losses)
    np.testing.assert_array_equal(trace.value.reshape(3, -1), expected)
    np.testing.assert_array_equal(values, expected)
    if num_losses == 1:
        assert "lowest 0.5 at trial 1" in str(trace)
    assert trace.best_alpha == trace.w[0] == 0.5
    assert trace.status == "completed"


@pytest.mark.parametrize(("max_steps", "is_enough"), [(1, False), (50, True)])
def test_a_trial_whose_solver_misses_its_tolerance_is_flagged(max_steps, is_enough):
    """One Newton step does not minimise cosh(w - alpha)."""
    problem = hg.Bilevel(lambda w, a, b: jnp.cosh(w - a), lambda w, a, b: (w - 1) ** 2)
    solver = hg.Newton(max_steps=max_steps)
    trace = hg.search(
        problem, solver, hg.searchers.Random(), 0.0,
        space=hg.spaces.Interval(1.0, 2.0), budget=100,
    )  # fmt: skip
    np.testing.assert_array_equal(trace.flags["not_converged"], not is_enough)
    assert any("tolerance" in reason for reason in trace.reasons()) is not is_enough
    assert trace.stats["trusted"].all()


@pytest.mark.parametrize("name", ["Random", "PopulationBasedTraining"])
def test_status_states_that_no_trial_has_a_finite_value(name):
    """The value, or a part of w that the outer loss does not read, is NaN."""
    searcher = getattr(hg.searchers, name)(*[4] * (name != "Random"))
    broken = hg.Bilevel(inner_loss, lambda w, alpha, batch: jnp.nan * jnp.sum(w))
    add_nan = lambda w, alpha, batch: inner_loss(w, alpha, batch) + jnp.nan * w[1]
    diverged = hg.Bilevel(add_nan, lambda w, alpha, batch: w[0] ** 2)
    run = lambda problem: search(problem, hg.Descent(SGD, 2), searcher, budget=20.0)
    for problem in (broken, diverged):
        assert run(problem).status == "failed: no trial has a finite value"
    assert run(PROBLEM).status == "completed"


# What a run records.


def test_metrics_and_progress_follow_the_trials():
    """Metrics see the ``w`` and ``alpha`` of their trial and cost nothing."""
    calls = []
    metrics = {"norm": lambda w, alpha, key: jnp.sum(w - 2 * alpha) + w[0]}
    trace = search(metrics=metrics, progress=lambda *call: calls.append(call))
    plain = search()
    chex.assert_trees_all_equal((trace.value, trace.cost), (plain.value, plain.cost))
    best = int(np.argmin(trace.value))
    np.testing.assert_allclose(trace.rows()[best]["norm"], trace.w[0], rtol=1e-12)
    num_trials, best_values = zip(*calls, strict=True)
    assert num_trials == tuple(range(1, len(trace.value) + 1))
    np.testing.assert_allclose(best_values, np.minimum.accumulate(trace.value))


@pytest.mark.parametrize("trial_callback", [None, lambda trial: None])
def test_trials_share_one_program(trial_callback):
    """More trials trace the loss no more often than one trial and its checks do."""
    calls = []
    inner = lambda *args: calls.append(None) or inner_loss(*args)
    problem, solver = hg.Bilevel(inner, outer_loss), hg.Descent(SGD, 2)
    search(problem, solver, budget=1)
    num_calls = len(calls)
    search(problem, solver, budget=24, trial_callback=trial_callback)
    assert len(calls) <= 2 * num_calls


# Several outer losses.

ENDS = np.array([[0.2, 0.3], [0.8, 0.7]])
DISTANCES = [
    lambda w, alpha, batch, end=end: jnp.sum((w / 2 - end) ** 2) for end in ENDS
]
TWO_LOSSES = hg.Bilevel(inner_loss, tuple(DISTANCES))


@pytest.mark.parametrize(
    ("name", "args"), [("Random", ()), ("Sobol", ()), ("Grid", (5,)), ("NSGA2", (6,))]
)
def test_search_of_two_losses_resumes_to_the_same_trace(name, args):
    """A trial costs a gradient and two values."""
    searcher = getattr(hg.searchers, name)(*args)
    options = {"problem": TWO_LOSSES, "searcher": searcher, "budget": 25.1}
    trials, trace = record(**options)
    assert trace.value.shape == (15, 2)
    np.testing.assert_allclose(trace.stats["gradient_equivalents"], 5 / 3, rtol=1e-6)
    alphas = np.array([trial["alpha"][0] for trial in trials])
    expected = np.sum((alphas[:, None] - ENDS[None]) ** 2, -1)
    np.testing.assert_allclose(trace.value, expected, rtol=1e-12)
    new_trials, resumed = record(**options, previous_trials=trials[:8])
    assert new_trials == trials[8:]
    chex.assert_trees_all_equal(resumed, trace)


def test_best_of_two_losses_is_lowest_in_the_first_then_in_the_second():
    """The values are discrete, so that the first has ties; a NaN fails its trial."""
    floor = lambda x: jnp.floor(4 * x) / 4
    first = lambda w, alpha, batch: floor(alpha[0])
    second = lambda w, alpha, batch: jnp.where(
        alpha[0] < 0.25, jnp.nan, floor(alpha[1])
    )
    problem, best_values = hg.Bilevel(inner_loss, (first, second)), []
    progress = lambda done, best: best_values.append(tuple(best.tolist()))
    sobol = hg.searchers.Sobol()
    trace = search(problem, FORMULA, sobol, budget=64 * 5 / 3 + 0.1, progress=progress)
    np.testing.assert_array_equal(floor(trace.best_alpha), [0.25, 0.0])
    assert best_values[-1] == (0.25, 0.0)
    assert len({value for value in best_values if value[0] == 0.25}) > 1  # ties
    front = hg.objectives.non_dominated(trace.value)
    assert np.unique(trace.value[front], axis=0).tolist() == [[0.25, 0.0]]


# Arguments that are refused.


@pytest.mark.parametrize(
    "searcher",
    [hg.searchers.TPE(), hg.searchers.PopulationBasedTraining(2), RecordingSearcher()],
)
def test_two_losses_need_a_searcher_that_accepts_them(searcher):
    with pytest.raises(ValueError, match=r"searcher.*NSGA2"):
        search(TWO_LOSSES, searcher=searcher)


class SearcherWithoutTell:
    init, ask = RecordingSearcher.init, RecordingSearcher.ask


@pytest.mark.parametrize("searcher", [SearcherWithoutTell(), RecordingSearcher])
def test_searcher_must_have_its_methods(searcher):
    with pytest.raises(TypeError, match="searcher"):
        search(searcher=searcher)


def test_searcher_must_propose_something():
    class EmptySearcher(hg.searchers.Random):
        def ask(self, state, key):
            raise StopIteration

    with pytest.raises(ValueError, match="searcher"):
        search(searcher=EmptySearcher())


@pytest.mark.parametrize("name", ["Random", "SuccessiveHalving"])
def test_every_leaf_of_alpha_must_be_used(name):
    """The losses, the solver or ``init_fn`` may use it."""
    searcher = getattr(hg.searchers, name)(*[4] * (name != "Random"))
    space = {"used": SPACE, "other": Unit(shape=(2,))}
    inner = lambda w, alpha, batch: jnp.sum((w - alpha["used"]) ** 2)
    outer = lambda w, alpha, batch: jnp.sum(w**2)
    outer_with_both = lambda w, alpha, batch: jnp.sum(w**2) + 0 * alpha["other"][1]
    init_fn = lambda w, alpha: w + alpha["other"][0]
    run = lambda problem, optimizer=SGD: search(
        problem, hg.Descent(optimizer, 4), searcher, space=space, budget=17
    )
    with pytest.raises(ValueError, match=r"alpha\['other'\]"):
        run(hg.Bilevel(inner, outer))
    run(hg.Bilevel(inner, outer), lambda alpha: optax.sgd(0.1 * alpha["other"][0]))
    run(hg.Bilevel(inner, outer, init_fn=init_fn))
    run(hg.Bilevel(inner, outer_with_both))
