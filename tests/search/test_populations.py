"""Searchers that train populations against runs that are written out by hand."""

import os

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.inner import inner_stats
from hypergrad.inner.descent import run_inner_steps
from hypergrad.searchers import (
    Hyperband,
    PopulationBasedTraining,
    SuccessiveHalving,
)
from hypergrad.searchers.halving import floor_log
from hypergrad.searchers.populations import Rung, Trainer
from hypergrad.trials.trial import TrialSetup
from tests.processes import run_python
from tests.search.populations import (
    MOMENTUM,
    PROBLEM,
    SPACE,
    outer_loss,
    search,
    train_by_hand,
)

POPULATIONS = {
    "pbt": PopulationBasedTraining(4),
    "halving": SuccessiveHalving(4, eta=2),
}


def make_trainer(num_steps: int) -> Trainer:
    """Returns a trainer for the problem of `tests.search.populations`."""
    setup = TrialSetup(PROBLEM, hg.Descent(MOMENTUM, num_steps), jnp.zeros(2), {})
    step_counts = {"num_grads": 1.0, "num_hvps": 0.0, "num_values": 0.0}
    return Trainer(setup, SPACE, step_counts, 1.0, 1 / 3)


def run_rounds(searcher, trainer: Trainer, num_rounds: int) -> list:
    """Returns the first rounds of a searcher."""
    rounds = []
    for index in range(num_rounds):
        previous = rounds[-1] if rounds else None
        rounds.append(searcher.round(trainer, index, previous, jax.random.key(0)))
    return rounds


def take(tree, index):
    """Returns the slice of every leaf at an index."""
    return jax.tree.map(lambda x: x[index], tree)


# Stated budgets: twice the median of what seeds 0 to 9 needed, in hundreds.
BUDGETS = {
    "pbt": (PopulationBasedTraining(16), 5, 200),
    "halving": (SuccessiveHalving(27), 27, 700),
    "hyperband": (Hyperband(), 27, 400),
}


@pytest.mark.parametrize(
    "name",
    [
        "pbt",
        pytest.param("halving", marks=pytest.mark.slow),
        pytest.param("hyperband", marks=pytest.mark.slow),
    ],
)
def test_optimum_is_found_within_the_stated_budget(name):
    """In the median of seeds 0 to 9, by a fully trained member, to a tenth of an axis.

    The best center is (1, -1), in a square with sides of 4.
    """
    searcher, num_steps, budget = BUDGETS[name]
    best = []
    for seed in range(10):
        key = jax.random.key(seed)
        trace = search(searcher, num_steps, budget=budget, key=key)
        assert trace.cost[-1] <= budget
        is_full = trace.metrics["steps"] >= num_steps
        best.append(min(trace.value[is_full], default=np.inf))
    assert np.median(best) <= 0.01 * 4**2


@pytest.mark.parametrize("name", BUDGETS)
def test_budget_is_stated_in_the_docstring(name):
    searcher, _, budget = BUDGETS[name]
    text = type(searcher).__doc__.split("Budget: ")[1]
    assert text.startswith(f"{budget} gradient-equivalents")


# Successive halving and Hyperband.


def test_members_that_are_kept_continue_with_their_momentum():
    """Their w is that of an unbroken run by hand; the best third is kept.

    The last rung is followed by new members.
    """
    rounds = run_rounds(SuccessiveHalving(9), make_trainer(27), 4)
    steps = [rung.records.stats["num_inner_steps"].tolist() for rung in rounds]
    assert steps == [[3] * 9, [6] * 3, [18], [3] * 9]
    for rung, num_steps in zip(rounds, (3, 9, 27, 3), strict=True):
        np.testing.assert_array_equal(rung.records.metrics["steps"], num_steps)
        for index in range(len(rung.records.value)):
            alpha, w = take((rung.members.alpha, rung.members.carry[0]), index)
            expected = train_by_hand(alpha, num_steps)
            np.testing.assert_allclose(w, expected, rtol=1e-12)
    best = np.argsort(rounds[0].records.value)[:3]
    alphas = [rung.members.alpha["center"] for rung in rounds]
    np.testing.assert_array_equal(alphas[1], alphas[0][best])
    assert not np.intersect1d(alphas[0], alphas[3]).size


def test_best_member_is_one_that_was_fully_trained():
    """A step adds 1 to ``w`` and to the value, so every early stop is better."""
    count = lambda w, alpha, batch: -w
    outer = lambda w, alpha, batch: w + alpha
    trace = search(
        SuccessiveHalving(4, eta=2), problem=hg.Bilevel(count, outer), w=0.0,
        solver=hg.Descent(optax.sgd(1.0), 4), space=hg.spaces.Unit(), budget=20,
    )  # fmt: skip
    is_full = trace.metrics["steps"] == 4
    assert trace.value[~is_full].max() < trace.value[is_full].min()
    assert trace.w == 4
    assert trace.w + trace.best_alpha == trace.value[is_full].min()
    assert trace.value[trace.best_row] == trace.w + trace.best_alpha
    assert f"steps: 4 at the best trial, {trace.best_row}, lowest 1 " in str(trace)


def test_every_rung_makes_a_step():
    """A bracket has two rungs if the solver makes fewer than nine steps."""
    assert SuccessiveHalving(81).rungs(5) == [Rung(81, 0, 1), Rung(27, 1, 5)]
    for searcher in (SuccessiveHalving(27, 2), Hyperband(2)):
        for num_steps in range(1, 30):
            rungs = searcher.rungs(num_steps)
            assert all(rung.num_steps > 0 for rung in rungs)
            assert rungs[-1].stop_step == num_steps


def test_brackets_of_hyperband_are_those_of_its_paper():
    """R = 81, eta = 3 (Table 1 of Li et al. 2018)."""
    rungs = [Hyperband().rung(81, index) for index in range(15)]
    assert [(rung.num_members, rung.stop_step) for rung in rungs] == [
        *((81, 1), (27, 3), (9, 9), (3, 27), (1, 81)),
        *((34, 3), (11, 9), (3, 27), (1, 81)),
        *((15, 9), (5, 27), (1, 81)),
        *((8, 27), (2, 81)),
        (5, 81),
    ]
    assert Hyperband().rung(81, 15) == rungs[0]
    assert floor_log(243, 3) == 5  # math.log rounds it to 4.99...


@pytest.mark.parametrize(
    ("name", "failed"), [("pbt", np.nan), ("pbt", -np.inf), ("halving", np.inf)]
)
def test_failed_member_is_flagged_and_never_the_best(name, failed):
    """A step adds 1 to ``w``; after more than two steps the value is not finite."""
    count = lambda w, alpha, batch: -w
    late = lambda w, alpha, batch: jnp.where(w > 2, failed, alpha)
    trace = search(
        POPULATIONS[name], problem=hg.Bilevel(count, late), w=0.0,
        solver=hg.Descent(optax.sgd(1.0), 2 if name == "pbt" else 4),
        space=hg.spaces.Unit(), budget=20,
    )  # fmt: skip
    steps = trace.metrics["steps"]
    assert steps.max() == 4
    np.testing.assert_array_equal(trace.flags["not_finite"], steps > 2)
    np.testing.assert_array_equal(trace.stats["trusted"], steps <= 2)
    assert trace.w == 2
    assert trace.best_alpha == trace.value[steps == 2].min()


@pytest.mark.parametrize("name", POPULATIONS)
def test_member_whose_w_is_not_finite_is_never_the_best(name):
    """Its outer loss, which does not depend on its NaN, would be the lowest."""
    nan_if_low = lambda alpha: jnp.where(alpha < 0.5, jnp.nan, 0.0)
    inner = lambda w, alpha, batch: w[0] + nan_if_low(alpha) * w[1]
    outer = lambda w, alpha, batch: alpha + 0 * w[0]
    trace = search(
        POPULATIONS[name], problem=hg.Bilevel(inner, outer), w=jnp.zeros(2),
        solver=hg.Descent(optax.sgd(1.0), 2 if name == "pbt" else 4),
        space=hg.spaces.Unit(), budget=20,
        metrics={"alpha": lambda w, alpha, key: alpha},
    )  # fmt: skip
    alpha, steps = trace.metrics["alpha"], trace.metrics["steps"]
    np.testing.assert_array_equal(trace.value, np.where(alpha < 0.5, np.nan, alpha))
    trusted = trace.stats["trusted"]
    np.testing.assert_array_equal(trusted, alpha >= 0.5)
    assert trusted[:4].sum() == 2
    assert trusted[4:6].all() or name == "pbt"  # the members that go on
    assert trace.best_alpha == alpha[trusted & (steps == 4)].min()
    assert np.isfinite(trace.w).all()
    assert trace.status == "completed"


# Population-based training.


def test_worst_members_copy_the_best_and_perturb_alpha():
    """Carries are copied to the bit, ``u`` moves by 0.3, and all others are kept."""
    searcher, trainer = PopulationBasedTraining(8, perturbation=0.3), make_trainer(3)
    members = trainer.init_members(8, jax.random.key(0))
    members, records = trainer.train(members, 3, jax.random.key(1))
    value = records.value.at[2].set(jnp.nan)
    new, parents = searcher.replace_worst(SPACE, members, value, jax.random.key(2))
    ranking = np.argsort(np.where(np.isnan(value), np.inf, value))
    best, worst = ranking[:2], ranking[-2:]
    assert worst[-1] == 2
    assert set(np.asarray(parents)[worst]) <= set(best.tolist())
    is_worst = np.isin(np.arange(8), worst)
    np.testing.assert_array_equal(
        np.asarray(parents)[~is_worst], np.flatnonzero(~is_worst)
    )
    chex.assert_trees_all_equal(new.carry, take(members.carry, parents))
    to_u = lambda alpha: jax.vmap(lambda a: hg.spaces.inverse(SPACE, a))(alpha)[
        "center"
    ]
    change = np.abs(to_u(new.alpha) - to_u(take(members.alpha, parents)))
    expected = np.where(is_worst, 0.3, 0.0)[:, None]
    np.testing.assert_allclose(change, expected + np.zeros((8, 2)), rtol=1e-9)


def test_the_replaced_fraction_is_not_rounded_down():
    """0.29 * 100 is 28.999999999999996."""
    searcher = PopulationBasedTraining(100, 0.29)
    members = make_trainer(1).init_members(100, jax.random.key(0))
    value = jnp.arange(100.0)
    _, parents = searcher.replace_worst(SPACE, members, value, jax.random.key(1))
    assert parents[:71].tolist() == list(range(71))
    assert np.all(np.asarray(parents[71:]) < 29)


def test_a_failed_member_is_no_parent():
    """Two of four members are replaced, and only one has a finite value."""
    searcher = PopulationBasedTraining(4, 0.5)
    members = make_trainer(1).init_members(4, jax.random.key(0))
    value = jnp.array([jnp.nan, 1.0, jnp.nan, jnp.nan])
    for key in jax.random.split(jax.random.key(1), 10):
        _, parents = searcher.replace_worst(SPACE, members, value, key)
        assert parents.tolist() == [0, 1, 1, 1]
    _, parents = searcher.replace_worst(SPACE, members, value.at[1].set(jnp.inf), key)
    assert set(parents[2:].tolist()) <= {0, 1}  # all have failed


def test_perturbation_moves_every_row_of_a_simplex():
    """Each weight is exp(0.2) or exp(-0.2) times as large before the sum becomes 1."""
    space = {"a": hg.spaces.Simplex(shape=(2,)), "b": hg.spaces.Simplex(shape=(2, 3))}
    alpha = hg.spaces.sample(space, jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 100)
    perturb = lambda key: PopulationBasedTraining(4).perturb(space, alpha, key)
    new = jax.vmap(perturb)(keys)
    for name, leaf in alpha.items():
        change = np.log(np.asarray(new[name]) / np.asarray(leaf)[None])
        np.testing.assert_allclose(np.ptp(change, axis=-1), 0.4, rtol=1e-9)


def test_learning_rate_of_a_population_may_be_in_alpha():
    """A step costs one gradient per member; parents are recorded."""
    loss = lambda w, alpha, batch: 0.5 * jnp.sum(w**2)
    trace = search(
        PopulationBasedTraining(4), problem=hg.Bilevel(loss, loss), w=jnp.ones(2),
        solver=hg.Descent(lambda alpha: optax.sgd(alpha), 4),
        space=hg.spaces.Interval(1e-3, 1.0, log=True), budget=100,
        metrics={"rate": lambda w, alpha, key: alpha},
    )  # fmt: skip
    cost = 4 + 1 / 3
    np.testing.assert_allclose(trace.cost[-1], len(trace.value) * cost)
    assert len(trace.value) == 4 * int(100 / (4 * cost))
    parents = np.asarray(trace.metrics["parent"]).reshape(-1, 4)
    np.testing.assert_array_equal(parents[0], np.arange(4))
    np.testing.assert_array_equal(
        trace.metrics["steps"], 4 * np.repeat(np.arange(1, len(parents) + 1), 4)
    )
    rate = trace.metrics["rate"][:4]
    np.testing.assert_allclose(trace.value[:4], (1 - rate) ** 8, rtol=1e-9)


# What all populations share.


def test_data_fn_is_not_called_again_in_later_rounds():
    """The host traces it a constant number of times; batches count in proportion."""

    def run(budget):
        calls = []

        def data_fn(key):
            calls.append(None)
            batches = hg.Batches(jax.random.normal(key, (6, 1)), 2)
            return batches, jnp.ones((3, 1))

        mean = lambda w, alpha, batch: jnp.mean((w - alpha - batch) ** 2)
        problem = hg.Bilevel(mean, mean, data_fn=data_fn)
        trace = search(
            PopulationBasedTraining(4), 6, problem, 0.0, space=hg.spaces.Unit(),
            budget=budget,
        )  # fmt: skip
        cost = 6 * 2 / 6 + 0.5 / 3
        np.testing.assert_allclose(trace.cost[-1], len(trace.value) * cost)
        assert len(trace.value) == 4 * int(budget / (4 * cost))
        return len(calls)

    # Both budgets pay for a second round, which has a program of its own.
    assert run(20.0) == run(40.0)


class HeavyBall(eqx.Module):
    """A user's own solver without optax, which counts two gradients per step."""

    rate: float
    num_steps: int = eqx.field(static=True)
    differentiable = True

    def init(self, inner_loss, w, alpha, data, key):
        return w, jnp.zeros_like(w)

    def step(self, inner_loss, carry, alpha, data, key):
        w, v = carry
        v = 0.5 * v + jax.grad(inner_loss)(w, alpha, None)
        return w - self.rate * v, v

    def solve(self, inner_loss, w, alpha, data, key):
        w, _ = run_inner_steps(self, inner_loss, w, alpha, data, key)
        return w, inner_stats(self.num_steps, num_grads=2 * self.num_steps)


def test_own_solver_is_trained_step_by_step():
    """It makes the steps of optax's heavy ball, at the cost that its solve reports."""
    run = lambda solver: search(PopulationBasedTraining(4), solver=solver, budget=170)
    own, reference = run(HeavyBall(0.3, 4)), run(hg.Descent(MOMENTUM, 4))
    num_trials = len(own.value)
    assert 0 < num_trials < len(reference.value)
    np.testing.assert_allclose(own.value, reference.value[:num_trials], rtol=1e-9)
    steps = own.stats["num_inner_steps"]
    np.testing.assert_array_equal(own.stats["num_grads"], 2 * steps)
    np.testing.assert_allclose(own.cost, np.cumsum(2 * steps + 1 / 3), rtol=1e-12)


# Arguments that are refused.


@pytest.mark.parametrize(
    "solver", [hg.Newton(), hg.LBFGS(), hg.Descent, hg.Descent(MOMENTUM, 0)],
    ids=["Newton", "LBFGS", "class", "no steps"],
)  # fmt: skip
def test_population_needs_a_solver_with_steps(solver):
    with pytest.raises((TypeError, ValueError), match=r"solver|num_steps"):
        search(PopulationBasedTraining(4), solver=solver)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: PopulationBasedTraining(4, 0.7), "quantile_fraction"),
        (lambda: PopulationBasedTraining(1), "population_size"),
        (lambda: SuccessiveHalving(8, eta=1), "eta"),
        (lambda: Hyperband(eta=1), "eta"),
    ],
)
def test_arguments_out_of_range_are_refused(make, name):
    with pytest.raises(ValueError, match=name):
        make()


@pytest.mark.parametrize("kind", [hg.spaces.Integer(1, 4), hg.spaces.Choice(3)])
def test_population_based_training_needs_a_continuous_space(kind):
    """The error is raised before the first round."""
    outer = lambda w, alpha, batch: outer_loss(w, alpha, batch) + 0 * alpha["kind"]
    problem, calls = hg.Bilevel(PROBLEM.inner_loss, outer), []
    options = {"space": SPACE | {"kind": kind}, "progress": calls.append}
    with pytest.raises(ValueError, match="space"):
        search(PopulationBasedTraining(4), problem=problem, **options)
    assert not calls


@pytest.mark.parametrize("name", ["steps", "parent"])
def test_names_of_a_populations_own_metrics_are_reserved(name):
    with pytest.raises(ValueError, match=f"metrics.*'{name}'"):
        search(PopulationBasedTraining(2), metrics={name: lambda w, alpha, key: 7.0})


SHARDED_SEARCH = """
import jax, jax.numpy as jnp, optax, hypergrad as hg
jax.config.update("jax_enable_x64", True)
commit = lambda x: jax.device_put(x, jax.devices()[0])


class CheckedTraining(hg.searchers.PopulationBasedTraining):
    def round(self, trainer, index, previous, key):
        new_round = super().round(trainer, index, previous, key)
        assert len(new_round.members.carry[0].devices()) == jax.device_count()
        return new_round


loss = lambda w, alpha, batch: jnp.sum((w - alpha) ** 2) * batch.sum()
problem = hg.Bilevel(loss, loss, commit(jnp.ones((3, 1))), commit(jnp.ones((2, 1))))
for searcher in (CheckedTraining(8), hg.searchers.OneShot(8)):
    trace = hg.search(
        problem, hg.Descent(optax.sgd(0.1), 4), searcher, commit(jnp.zeros(2)),
        space=hg.spaces.Unit(), budget=100, key=commit(jax.random.key(0)),
    )
    print(*trace.value.tolist())
print(jax.device_count())
"""


@pytest.mark.slow
def test_eight_devices_train_what_one_does():
    """Members are distributed over devices; data is committed to the first one."""

    def run(num_devices):
        flags = os.environ.get("XLA_FLAGS", "")
        flags += f" --xla_force_host_platform_device_count={num_devices}"
        env = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        *values, count = run_python(SHARDED_SEARCH, env=env).stdout.split()
        assert int(count) == num_devices
        return np.array(values, float)

    np.testing.assert_allclose(run(8), run(1), rtol=1e-12)


# An alpha that members do not read anew in each step.


def stored_rate(alpha):
    """Returns an optimizer whose state holds the learning rate."""
    return optax.inject_hyperparams(optax.sgd)(learning_rate=alpha["rate"])


def plain_rate(alpha):
    """Returns an optimizer that has the learning rate in each step."""
    return optax.sgd(alpha["rate"])


def search_rates(searcher, optimizer, **problem_options):
    """Returns the search of the learning rate of a quadratic."""
    loss = lambda w, alpha, batch: 0.5 * (w - 1) ** 2
    problem = hg.Bilevel(loss, loss, **problem_options)
    space = {"rate": hg.spaces.Interval(0.01, 0.5)}
    return hg.search(
        problem, hg.Descent(optimizer, 3), searcher, 0.0, space=space, budget=50
    )


@pytest.mark.parametrize(
    "searcher",
    [PopulationBasedTraining(4), hg.searchers.OneShot(4)],
    ids=["pbt", "one-shot"],
)
def test_a_rate_in_the_state_of_the_optimizer_is_refused(searcher):
    """A changed ``alpha`` would be recorded, and the old one used."""
    assert np.isfinite(search_rates(searcher, plain_rate).value).all()
    with pytest.raises(ValueError, match=r"alpha\['rate'\] in each step"):
        search_rates(searcher, stored_rate)


def test_members_that_never_change_alpha_may_store_it():
    stored, plain = (
        search_rates(SuccessiveHalving(4), optimizer)
        for optimizer in (stored_rate, plain_rate)
    )
    chex.assert_trees_all_close(stored.value, plain.value)


def test_an_alpha_that_only_sets_the_starting_point_is_refused_by_pbt():
    init_fn = lambda w, alpha: w + alpha["rate"]
    with pytest.raises(ValueError, match=r"alpha\['rate'\] sets only where"):
        search_rates(
            PopulationBasedTraining(4), lambda alpha: optax.sgd(0.1), init_fn=init_fn
        )


@pytest.mark.parametrize("name", ["pbt", "halving", "hyperband", "one shot"])
def test_numpy_numbers_give_the_trace_of_jax_arrays(name: str):
    """In the space, the perturbation of the searcher and the arrays of a metric."""
    metric = lambda scale, w, alpha, key: scale @ w

    def run(xp):
        searchers = {
            "pbt": PopulationBasedTraining(2, perturbation=xp.float32(0.1)),
            "halving": SuccessiveHalving(2, eta=2),
            "hyperband": Hyperband(eta=2),
            "one shot": hg.searchers.OneShot(2),
        }
        bounds = xp.asarray(-0.7), xp.asarray([0.7, 1.1])
        space = {"center": hg.spaces.Interval(*bounds, shape=(2,))}
        return search(
            searchers[name], 2, space=space,
            metrics={"m": jax.tree_util.Partial(metric, xp.ones(2))}, budget=12,
        )  # fmt: skip

    chex.assert_trees_all_equal(run(np), run(jnp))


@pytest.mark.parametrize("name", ["pbt", "halving", "one shot"])
def test_new_numbers_of_a_population_compile_nothing(name: str):
    """New arrays as bounds, and new numbers of the searcher and of the solver."""
    counts = []

    def counted_loss(w, alpha, batch):
        counts.append(1)
        return outer_loss(w, alpha, batch)

    problem = hg.Bilevel(PROBLEM.inner_loss, counted_loss)

    def run(number):
        bounds = jnp.array([-number, number])
        searchers = {
            "pbt": PopulationBasedTraining(2, perturbation=number),
            "halving": SuccessiveHalving(2, eta=2),
            "one shot": hg.searchers.OneShot(2),
        }
        space = {"center": hg.spaces.Interval(*bounds, shape=(2,))}
        solver = HeavyBall(number, 2)
        options = {"solver": solver, "problem": problem, "space": space, "budget": 12}
        return search(searchers[name], **options)

    run(0.5)
    num_traces = len(counts)
    trace = run(0.25)
    assert len(counts) == num_traces
    assert jnp.all(jnp.abs(trace.best_alpha["center"]) <= 0.25)
