"""Properties of every searcher that is asked and told, and its stated budget."""

import functools
import io
import itertools
import re
import sys
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from evosax.algorithms import CMA_ES, SNES, DifferentialEvolution
from scipy.stats import qmc

import hypergrad as hg
from hypergrad.searchers import (
    CMAES,
    NSGA2,
    TPE,
    EvolutionStrategy,
    GaussianProcess,
    Grid,
    Random,
    Reinforce,
    Sobol,
)
from hypergrad.searchers.base import Trials, seed_from_key
from hypergrad.spaces import Choice, Integer, Interval, Simplex, Unit

KEY = jax.random.key(0)
PLANE = {"rate": Interval(1e-4, 1.0, log=True), "weight": Interval(-1.0, 3.0)}
CHOICES = {"depth": Integer(1, 8), "op": Choice((0, 5, 9))}
MIXED = PLANE | CHOICES
TWELVE = {"depth": Integer(4, 7), "op": Choice((0, 5, 9))}
BEST = {"rate": 10**-1.3, "weight": 0.9, "depth": 6, "op": 5}


@pytest.fixture(autouse=True)
def _allow_rank_promotion_of_evosax(request):
    """evosax adds vectors to rows; nothing of this package does."""
    allowed = "allow" if "evolution" in request.node.name else "raise"
    with jax.numpy_rank_promotion(allowed):
        yield


def distance(alpha) -> float:
    """Returns the squared distance to the optimum in units of the axes' lengths."""
    alpha = {name: np.asarray(leaf, float) for name, leaf in alpha.items()}
    terms = {
        "rate": lambda x: (np.log10(x / BEST["rate"]) / 4) ** 2,
        "weight": lambda x: (x - BEST["weight"]) ** 2 / 16,
        "depth": lambda x: ((x - BEST["depth"]) / 7) ** 2,
        "op": lambda x: 0.25 * (x != BEST["op"]),
    }
    return float(sum(terms[name](leaf) for name, leaf in alpha.items()))


def propose(searcher, state, indices, seed=0) -> tuple[list, Any]:
    """Asks and tells; returns the proposals and the state after them."""
    key, alphas = jax.random.key(seed), []
    for index in indices:
        alpha, state = searcher.ask(state, jax.random.fold_in(key, index))
        state = searcher.tell(state, alpha, distance(alpha))
        alphas.append(alpha)
    return alphas, state


# Stated budgets.


class Budget(NamedTuple):
    """The trials after which the best value is within a distance.

    They are twice the median of the trials that seeds 0 to 9 needed, rounded up to
    tens. Only that of Grid follows from geometry: nine points per axis leave at most
    2^(1/2) / 16.
    """

    searcher: Any
    space: Any
    num_trials: int
    distance: float


BUDGETS = {
    "random": Budget(Random(), PLANE, 70, 1e-2),
    "grid": Budget(Grid(9), PLANE, 81, 1e-2),
    "sobol": Budget(Sobol(), PLANE, 40, 1e-2),
    "tpe": Budget(TPE(), PLANE, 30, 1e-2),
    "tpe-mixed": Budget(TPE(), MIXED, 80, 1e-2),
    "gp": Budget(GaussianProcess(), PLANE, 30, 1e-4),
    "gp-mixed": Budget(GaussianProcess(), MIXED, 40, 1e-2),
    "nsga2": Budget(NSGA2(20), PLANE, 80, 1e-2),
    "nsga2-mixed": Budget(NSGA2(20), MIXED, 310, 1e-2),
    "cmaes": Budget(CMAES(), PLANE, 130, 1e-4),
    "evolution-cma": Budget(EvolutionStrategy(CMA_ES, 8), PLANE, 140, 1e-4),
    "evolution-snes": Budget(EvolutionStrategy(SNES, 8), PLANE, 200, 1e-4),
    "evolution-de": Budget(
        EvolutionStrategy(DifferentialEvolution, 8), PLANE, 250, 1e-4
    ),
    "reinforce": Budget(Reinforce(3.0), TWELVE, 10, 0.0),
}


def count_trials(budget: Budget, seed: int) -> float:
    """Returns the trials until a value is within the distance; infinity if none is."""
    searcher, space, num_trials, max_distance = budget
    key = jax.random.key(seed)
    state = searcher.init(space, key)
    for index in range(num_trials):
        alphas, state = propose(searcher, state, [index], seed)
        if distance(alphas[0]) <= max_distance:
            return index + 1
    return np.inf


# The proposals of the other searchers are tested against their libraries.
FAST_BUDGETS = ("random", "grid", "sobol", "tpe", "reinforce")


@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST_BUDGETS else pytest.param(name, marks=pytest.mark.slow)
        for name in BUDGETS
    ],
)
def test_optimum_is_found_within_the_stated_budget(name):
    """In the median of seeds 0 to 9; below 0.02 both choices are right as well."""
    seeds = range(1 if name == "grid" else 10)
    counts = [count_trials(BUDGETS[name], seed) for seed in seeds]
    assert np.median(counts) <= BUDGETS[name].num_trials


@pytest.mark.parametrize("name", BUDGETS)
def test_budget_is_stated_in_the_docstring(name):
    """The number of trials and the distance are those that are tested here."""
    searcher, space, num_trials, max_distance = BUDGETS[name]
    text = type(searcher).__doc__.split("Budget: ")[1].split("Cost:")[0]
    words = {1e-2: "within 0.01", 1e-4: "within 1e-4", 0.0: "best of 12 choices"}
    assert re.search(rf"(?<![\w.-]){num_trials}(?![\w.])", text)
    assert words[max_distance] in " ".join(text.split())
    assert ("with choices" in " ".join(text.split())) >= (space is MIXED)


# Properties of all searchers.

SEARCHERS = {
    "random": (Random(), MIXED),
    "grid": (Grid(3), MIXED),
    "sobol": (Sobol(), MIXED),
    "tpe": (TPE(5), MIXED),
    "gp": (GaussianProcess(5, 50), MIXED),
    "nsga2": (NSGA2(6), MIXED),
    "cmaes": (CMAES(population_size=4), PLANE),
    "evolution-snes": (EvolutionStrategy(SNES, 4), MIXED),
    "evolution-de": (EvolutionStrategy(DifferentialEvolution, 4), PLANE),
    "reinforce": (Reinforce(3.0), TWELVE),
}
every_searcher = pytest.mark.parametrize("name", SEARCHERS)
NUM_PROPOSALS, NUM_SAVED = 10, 7


@functools.cache
def proposals_of(name: str) -> tuple[list, Any]:
    """Returns proposals of a searcher, and its state after the first of them."""
    searcher, space = SEARCHERS[name]
    first, saved = propose(searcher, searcher.init(space, KEY), range(NUM_SAVED))
    last, _ = propose(searcher, saved, range(NUM_SAVED, NUM_PROPOSALS))
    return first + last, saved


@every_searcher
def test_restored_state_makes_the_same_proposals(name):
    """The leaves of a state are plain arrays, which NumPy saves without pickling."""
    searcher, space = SEARCHERS[name]
    alphas, state = proposals_of(name)
    file = io.BytesIO()
    np.savez(file, *jax.tree.leaves(state))
    file.seek(0)
    with np.load(file, allow_pickle=False) as saved:
        leaves = [saved[f"arr_{i}"] for i in range(len(saved.files))]
    structure = jax.tree.structure(searcher.init(space, KEY))
    restored = jax.tree.unflatten(structure, leaves)
    last, _ = propose(searcher, restored, range(NUM_SAVED, NUM_PROPOSALS))
    chex.assert_trees_all_equal(last, alphas[NUM_SAVED:])


@every_searcher
def test_proposals_lie_in_the_space(name):
    _, space = SEARCHERS[name]
    alphas, _ = proposals_of(name)
    structure = jax.tree.structure(hg.spaces.sample(space, KEY))
    for alpha in alphas:
        assert jax.tree.structure(alpha) == structure
        assert jax.tree.all(hg.spaces.contains(space, alpha))


@every_searcher
def test_asking_does_not_change_the_state(name):
    """Two proposals from one state with one key are equal."""
    searcher, _ = SEARCHERS[name]
    _, state = proposals_of(name)
    before = [np.array(leaf) for leaf in jax.tree.leaves(state)]
    first, _ = searcher.ask(state, KEY)
    second, _ = searcher.ask(state, KEY)
    chex.assert_trees_all_equal(first, second)
    chex.assert_trees_all_equal(before, jax.tree.leaves(state))


def test_trials_hold_coordinates_and_values():
    """If one value of a trial is not finite, all of its values are infinite."""
    alpha = {"rate": 0.1, "weight": jnp.array(0.0)}
    trials = Trials.empty(PLANE).add(alpha, 0.5).add(alpha, np.nan).add(alpha, -np.inf)
    np.testing.assert_allclose(trials.t, [[0.75, 0.25]] * 3)
    assert trials.values.tolist() == [0.5, np.inf, np.inf]
    trials = Trials.empty(PLANE).add(alpha, [0.5, 1.0]).add(alpha, [1.0, -np.inf])
    assert trials.values.tolist() == [[0.5, 1.0], [np.inf, np.inf]]


@pytest.mark.parametrize("name", ["tpe", "cmaes", "gp", "nsga2", "evolution-snes"])
def test_searcher_survives_failures_only(name):
    """They may also be trials that it did not propose."""
    searcher, space = SEARCHERS[name]
    state, alpha = searcher.init(space, KEY), hg.spaces.sample(space, KEY)
    for index in range(8):
        _, state = searcher.ask(state, jax.random.fold_in(KEY, index))
        state = searcher.tell(state, alpha, -jnp.inf)
    alpha, _ = searcher.ask(state, KEY)
    assert jax.tree.all(hg.spaces.contains(space, alpha))


# Random, Grid and Sobol.


def test_random_proposes_samples_of_the_space():
    alpha, _ = Random().ask(Random().init(MIXED, KEY), jax.random.key(1))
    chex.assert_trees_all_equal(alpha, hg.spaces.sample(MIXED, jax.random.key(1)))


def test_grid_is_the_product_of_its_axes():
    """The last axis varies fastest, and the grid ends."""
    space = {"op": Choice((0, 5, 9)), "rate": Interval(1e-4, 1.0, log=True),
             "weight": Interval(-1.0, 3.0)}  # fmt: skip
    alphas, state = propose(Grid(3), Grid(3).init(space, KEY), range(27))
    points = [[alpha[name].item() for name in space] for alpha in alphas]
    expected = itertools.product((0, 5, 9), (1e-4, 1e-2, 1.0), (-1.0, 1.0, 3.0))
    np.testing.assert_allclose(points, list(expected), rtol=1e-12)
    with pytest.raises(StopIteration):
        Grid(3).ask(state, KEY)
    middle, _ = Grid(1).ask(Grid(1).init(space, KEY), KEY)
    np.testing.assert_allclose((middle["rate"], middle["weight"]), (1e-2, 1.0))


def test_sobol_is_the_sequence_of_scipy():
    """By the quantile functions of SciPy, with the scramble of the state's seed."""
    alphas, state = propose(Sobol(), Sobol().init(MIXED, KEY), range(16))
    sequence = qmc.Sobol(4, seed=seed_from_key(KEY)).random(16)
    quantiles = {
        "depth": scipy.stats.randint(1, 9).ppf,
        "op": lambda t: np.array([0, 5, 9])[(3 * t).astype(int)],
        "rate": scipy.stats.loguniform(1e-4, 1.0).ppf,
        "weight": scipy.stats.uniform(-1.0, 4.0).ppf,
    }
    for column, (name, quantile) in zip(sequence.T, quantiles.items(), strict=True):
        actual = [alpha[name] for alpha in alphas]
        np.testing.assert_allclose(actual, quantile(column), rtol=1e-10)
    assert state["index"] == 16
    assert Sobol().init(MIXED, jax.random.key(1))["seed"] != state["seed"]


# Reinforce.


def test_expected_step_of_reinforce_is_the_gradient_of_the_expected_value():
    """The mean over all alphas, weighted by the policy; the baseline cancels."""
    searcher, rng = Reinforce(step_size=0.3), np.random.default_rng(0)
    space = {"depth": Integer(1, 4), "op": Choice((0, 5, 9))}
    state = searcher.init(space, KEY)
    logits = [jnp.asarray(rng.normal(size=x.shape)) for x in state.logits]
    indices = list(itertools.product(range(4), range(3)))
    values = rng.normal(size=len(indices))

    def probabilities(logits):
        depth, op = map(jax.nn.softmax, logits)
        return jnp.stack([depth[i] * op[j] for i, j in indices])

    gradient = jax.grad(lambda logits: probabilities(logits) @ values)(logits)
    for baseline in (0.0, 2.0):
        state = state._replace(logits=logits, baseline=jnp.array(baseline))
        mean_step = [jnp.zeros_like(x) for x in logits]
        for (i, j), p, value in zip(
            indices, probabilities(logits), values, strict=True
        ):
            alpha = {"depth": 1 + i, "op": (0, 5, 9)[j]}
            new_logits = searcher.tell(state, alpha, value).logits
            mean_step = [
                mean + p * (new - old)
                for mean, new, old in zip(mean_step, new_logits, logits, strict=True)
            ]
        expected = [-0.3 * x for x in gradient]
        chex.assert_trees_all_close(mean_step, expected, rtol=1e-9, atol=1e-14)


def test_reinforce_samples_from_its_policy():
    searcher = Reinforce()
    state = searcher.init({"op": Choice((4, 7, 9))}, KEY)
    state = state._replace(logits=[jnp.log(jnp.array([0.5, 0.3, 0.2]))])
    samples = [
        int(searcher.ask(state, jax.random.fold_in(KEY, i))[0]["op"])
        for i in range(200)
    ]
    counts = [samples.count(op) for op in (4, 7, 9)]
    assert scipy.stats.chisquare(counts, [100, 60, 40]).pvalue > 1e-4


def test_reinforce_by_hand():
    """Two failures and two trials of a fair coin, with step 1 and decay 1/2."""
    searcher = Reinforce(1.0, 0.5)
    state = searcher.init(Choice(2), KEY)
    state = searcher.tell(state, jnp.array(0), jnp.nan)
    np.testing.assert_array_equal(state.logits[0], [0.0, 0.0])
    state = searcher.tell(state, jnp.array(0), 3.0)  # is its own baseline
    np.testing.assert_array_equal(state.logits[0], [0.0, 0.0])
    state = searcher.tell(state, jnp.array(1), 1.0)  # 2 below the baseline
    np.testing.assert_allclose(state.logits[0], [-1.0, 1.0])
    np.testing.assert_allclose(state.baseline, 2.0)
    state = searcher.tell(state, jnp.array(1), jnp.inf)  # the worst, 1 above it
    p = 1 / (1 + np.exp(-2))
    np.testing.assert_allclose(state.logits[0], [-1 + (1 - p), 1 - (1 - p)])
    np.testing.assert_allclose(state.baseline, 2.5)


def test_reinforce_uses_the_policy_that_proposed_a_trial():
    """Two proposals of a fair coin, told one after the other, with step 1.

    A third trial, which was not proposed, has the policy after both.
    """
    searcher = Reinforce(1.0, 0.5)
    state = searcher.init(Choice(2), KEY)._replace(baseline=jnp.array(0.0))
    for _ in range(2):
        _, state = searcher.ask(state, KEY)
    state = searcher.tell(state, jnp.array(0), 1.0)  # 1 above the baseline
    np.testing.assert_array_equal(state.logits[0], [-0.5, 0.5])
    state = searcher.tell(state, jnp.array(0), 0.0)  # 1/2 below the baseline
    np.testing.assert_array_equal(state.logits[0], [-0.25, 0.25])
    state = searcher.tell(state, jnp.array(0), 1.25)  # 1 above the baseline
    p = 1 / (1 + np.exp(0.5))
    np.testing.assert_allclose(state.logits[0], [-0.25 - (1 - p), 0.25 + (1 - p)])


# Arguments that are refused.

UNBOUNDED = {"a": None}


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Grid(10).init(Unit(shape=(6,)), KEY), "num"),
        (lambda: Grid(10).init({"a": Simplex(shape=(3,))}, KEY), "space"),
        (lambda: TPE(0), "num_initial"),
        (lambda: CMAES(0.2, 3), "population_size"),
        (lambda: CMAES(0.0), "step_size"),
        (lambda: CMAES().init(MIXED, KEY), "space"),
        (lambda: CMAES().init(Unit(), KEY), "space"),
        (lambda: NSGA2(1), "population_size"),
        (lambda: GaussianProcess(1), "num_initial"),
        (lambda: GaussianProcess(5, 1), "num_candidates"),
        (lambda: GaussianProcess(noise=0.0), "noise"),
        (lambda: EvolutionStrategy(SNES, 1), "population_size"),
        (lambda: Reinforce().init(MIXED, KEY), "space"),
        (lambda: Reinforce(step_size=-1.0), "step_size"),
        (lambda: Reinforce(decay=3.0), "decay"),
        *(
            (lambda searcher=searcher: searcher.init(UNBOUNDED, KEY), "Interval")
            for searcher in (
                Grid(2), TPE(), Sobol(), NSGA2(), GaussianProcess(),
                EvolutionStrategy(SNES, 4),
            )
        ),
    ],
)  # fmt: skip
def test_arguments_and_spaces_that_are_refused(make, name):
    with pytest.raises(ValueError, match=name):
        make()


@pytest.mark.parametrize(
    "strategy", ["SNES", SNES(population_size=4, solution=jnp.zeros(3))],
    ids=["name", "instance"],
)  # fmt: skip
def test_strategy_must_be_a_class_or_function(strategy):
    with pytest.raises(TypeError, match="strategy"):
        EvolutionStrategy(strategy, 4)


@pytest.mark.parametrize(
    ("searcher", "package"),
    [
        (TPE(), "optuna"),
        (NSGA2(), "optuna"),
        (CMAES(), "cmaes"),
        (GaussianProcess(), "scikit-learn"),
    ],
    ids=["TPE", "NSGA2", "CMAES", "GaussianProcess"],
)
def test_missing_package_is_named_with_its_extra(searcher, package, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setitem(sys.modules, "cmaes", None)
    monkeypatch.setitem(sys.modules, "sklearn.gaussian_process", None)
    with pytest.raises(ImportError, match=rf"{package}.*hypergrad-jax\[search\]"):
        searcher.init(PLANE, KEY)
