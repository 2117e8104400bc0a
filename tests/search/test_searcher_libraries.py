"""Searchers that leave everything to a library against the library run by hand."""

import warnings

import chex
import cmaes
import jax
import jax.numpy as jnp
import numpy as np
import optuna
import pytest
import scipy.stats
from evosax.algorithms import SNES, DifferentialEvolution
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern

import hypergrad as hg
from hypergrad.runtime.compat import enable_x64
from hypergrad.searchers import (
    CMAES,
    NSGA2,
    TPE,
    EvolutionStrategy,
    GaussianProcess,
)
from hypergrad.searchers import (
    cmaes as cmaes_module,
)
from hypergrad.searchers import (
    gaussian_process as gaussian_process_module,
)
from hypergrad.searchers.base import seed_from_key
from hypergrad.searchers.gaussian_process import expected_improvement, to_features
from hypergrad.spaces import Choice, Integer, Interval, Unit

KEY = jax.random.key(0)
SPACE = {
    "rate": Interval(1e-4, 1.0, log=True),
    "weights": Interval(-1.0, 3.0, shape=(2,)),
}
MIXED = SPACE | {"depth": Integer(1, 8), "op": Choice((0, 5, 9))}


def value_of(alpha) -> float:
    """Returns a value that depends on every leaf of ``alpha``."""
    value = np.log10(float(alpha["rate"]) / 0.05) ** 2 / 16
    value += float(np.sum((np.asarray(alpha["weights"]) - [0.5, 2.0]) ** 2)) / 16
    if "depth" in alpha:
        value += ((int(alpha["depth"]) - 6) / 7) ** 2 + 0.25 * (int(alpha["op"]) != 5)
    return value


def make_keys(num_trials: int) -> list[jax.Array]:
    """Returns the key of each proposal."""
    return [jax.random.fold_in(KEY, index) for index in range(num_trials)]


def propose(searcher, space, num_trials: int, values_of=value_of):
    """Returns the proposals and the state after their values are told."""
    state, alphas = searcher.init(space, KEY), []
    for key in make_keys(num_trials):
        alpha, state = searcher.ask(state, key)
        state = searcher.tell(state, alpha, jnp.asarray(values_of(alpha)))
        alphas.append(alpha)
    return alphas, state


@pytest.fixture(autouse=True)
def _allow_rank_promotion_of_evosax(request):
    """evosax adds vectors to rows; nothing of this package does."""
    allowed = "allow" if "evolution" in request.node.name else "raise"
    with jax.numpy_rank_promotion(allowed):
        yield


# optuna.


def assert_optuna_proposes(alphas, study, make_sampler, values_of) -> None:
    """Compares proposals with one study on the library's own ranges.

    The sampler is seeded anew for each proposal, as by the searcher. optuna uses its
    random numbers in the order of the parameters' names.
    """
    kinds = optuna.distributions
    distributions = {
        "0 depth": kinds.IntDistribution(1, 8),
        "1 op": kinds.CategoricalDistribution((0, 5, 9)),
        "2 rate": kinds.FloatDistribution(1e-4, 1.0, log=True),
        "3 a": kinds.FloatDistribution(-1.0, 3.0),
        "4 b": kinds.FloatDistribution(-1.0, 3.0),
    }
    for alpha, key in zip(alphas, make_keys(len(alphas)), strict=True):
        study.sampler = make_sampler(seed_from_key(key))
        trial = study.ask(distributions)
        depth, op, rate, *weights = trial.params.values()
        expected = {"depth": depth, "op": op, "rate": rate, "weights": weights}
        actual = jax.tree.map(np.asarray, alpha)
        expected = {name: np.array(x) for name, x in expected.items()}
        chex.assert_trees_all_close(actual, expected, rtol=1e-6)
        study.tell(trial, values_of(alpha))


def test_tpe_proposes_what_optuna_does():
    alphas, _ = propose(TPE(5), MIXED, 25)
    make_sampler = lambda seed: optuna.samplers.TPESampler(
        n_startup_trials=5, seed=seed
    )
    assert_optuna_proposes(alphas, optuna.create_study(), make_sampler, value_of)


def test_tpe_proposes_batches_as_optuna_does():
    """Proposals without a value are running trials of one study of optuna."""
    searcher, space = TPE(4), {"depth": Integer(0, 7), "op": Choice((0, 5, 9))}
    kinds = optuna.distributions
    distributions = {
        "000000": kinds.IntDistribution(0, 7),
        "000001": kinds.CategoricalDistribution(range(3)),
    }
    study, state, keys = optuna.create_study(), searcher.init(space, KEY), make_keys(40)
    for start in range(0, 40, 8):
        batch = []
        for key in keys[start : start + 8]:
            alpha, state = searcher.ask(state, key)
            study.sampler = optuna.samplers.TPESampler(
                n_startup_trials=4, seed=seed_from_key(key)
            )
            trial = study.ask(distributions)
            depth, op = trial.params.values()
            assert (int(alpha["depth"]), int(alpha["op"])) == (depth, (0, 5, 9)[op])
            batch.append((alpha, trial))
        for alpha, trial in batch:
            value = int(alpha["depth"]) / 7 + (int(alpha["op"]) != 5)
            state = searcher.tell(state, alpha, value)
            study.tell(trial, value)
    assert len(state.pending_t) == 0


@pytest.mark.parametrize("num_values", [1, 2])
def test_nsga2_proposes_what_optuna_does(num_values):
    """Five generations; later ones inherit coordinates of their parents."""
    values_of = lambda alpha: [value_of(alpha), float(alpha["rate"])][:num_values]
    told = lambda alpha: values_of(alpha) if num_values == 2 else values_of(alpha)[0]
    alphas, _ = propose(NSGA2(6), MIXED, 30, told)
    study = optuna.create_study(directions=["minimize"] * num_values)
    make_sampler = lambda seed: optuna.samplers.NSGAIISampler(
        population_size=6, seed=seed
    )
    assert_optuna_proposes(alphas, study, make_sampler, values_of)
    assert len({float(alpha["weights"][0]) for alpha in alphas}) < 30


def test_verbosity_of_optuna_is_restored():
    verbosity = optuna.logging.get_verbosity()
    propose(TPE(), SPACE, 2)
    propose(NSGA2(), SPACE, 2)
    assert optuna.logging.get_verbosity() == verbosity


# cmaes.


@pytest.mark.parametrize("population_size", [None, 4])
def test_cmaes_proposes_what_cmaes_does(population_size):
    """One optimizer through its generations, seeded anew for each proposal."""
    alphas, _ = propose(CMAES(0.3, population_size), SPACE, 30)
    size = 7 if population_size is None else population_size
    bounds = np.array([[0.0, 1.0]] * 3)
    optimizer = cmaes.CMA(np.full(3, 0.5), 0.3, bounds, population_size=size)
    generation = []
    for alpha, key in zip(alphas, make_keys(30), strict=True):
        optimizer.reseed_rng(seed_from_key(key))
        t = optimizer.ask()
        expected = {"rate": 1e-4 ** (1 - t[0]), "weights": 4 * t[1:] - 1}
        chex.assert_trees_all_close(alpha, expected, rtol=1e-6)
        generation.append((t, value_of(expected)))
        if len(generation) == size:
            optimizer.tell(generation)
            generation = []


def test_cmaes_tells_its_library_each_generation_once(monkeypatch):
    """A state without the cached optimizers leads to the same proposal.

    Only the rounding of BLAS may differ, with the alignment of arrays.
    """
    num_told, tell = [], cmaes.CMA.tell
    monkeypatch.setattr(
        cmaes.CMA, "tell", lambda *args: num_told.append(1) or tell(*args)
    )
    searcher = CMAES(0.31, 4)
    _, state = propose(searcher, SPACE, 40)
    assert len(num_told) == 9  # the tenth generation is told by the next proposal
    alpha, _ = searcher.ask(state, KEY)
    assert len(num_told) == 10
    for max_depth in (cmaes_module.MAX_DEPTH, 2):
        monkeypatch.setattr(cmaes_module, "MAX_DEPTH", max_depth)
        cmaes_module._optimizer_after.cache_clear()
        num_told.clear()
        again, _ = searcher.ask(state, KEY)
        chex.assert_trees_all_close(again, alpha, rtol=1e-12)
        assert len(num_told) == 10


@pytest.mark.parametrize("is_double", [True, False], ids=["float64", "float32"])
def test_cmaes_ends_when_it_has_converged(is_double):
    """Every further trial would be at the same point, within rounding."""
    with enable_x64(is_double):
        space = Unit(shape=(2,))
        searcher = CMAES(population_size=6)
        state, best = searcher.init(space, KEY), np.inf
        for index in range(700):
            try:
                alpha, state = searcher.ask(state, jax.random.fold_in(KEY, index))
            except StopIteration:
                break
            distance = float(jnp.sum((alpha - 0.3) ** 2))
            state = searcher.tell(state, alpha, distance)
            best = min(best, distance)
    assert index < 699
    assert best < 1e-10


def test_cmaes_learns_nothing_from_a_generation_of_failures_only():
    """The next generation is sampled from the same Gaussian."""
    searcher, state = CMAES(population_size=4), None
    state = searcher.init(SPACE, KEY)
    for key in make_keys(4):
        alpha, state = searcher.ask(state, key)
        state = searcher.tell(state, alpha, np.nan)
    for key in make_keys(4):
        actual, _ = searcher.ask(state, key)
        expected, _ = searcher.ask(searcher.init(SPACE, KEY), key)
        chex.assert_trees_all_equal(actual, expected)


# evosax.

STRATEGIES = {"SNES": SNES, "DifferentialEvolution": DifferentialEvolution}


@pytest.mark.parametrize("name", STRATEGIES)
def test_evolution_proposes_what_evosax_does(name):
    """Three generations of six, by the library's own ``ask`` and ``tell``."""
    strategy = STRATEGIES[name]
    alphas, state = propose(EvolutionStrategy(strategy, 6), SPACE, 18)
    library = strategy(population_size=6, solution=jnp.zeros(3))
    params, expected_state = library.default_params, None
    if name != "DifferentialEvolution":
        expected_state = library.init(KEY, jnp.zeros(3), params)
    for start, first_key in zip(range(0, 18, 6), make_keys(18)[::6], strict=True):
        seed = seed_from_key(first_key)
        ask_key, tell_key = jax.random.split(jax.random.key(seed))
        if expected_state is None:
            x = jax.random.logistic(ask_key, (6, 3))
        else:
            x, expected_state = library.ask(ask_key, expected_state, params)
        t = np.asarray(1 / (1 + jnp.exp(-x)))
        expected = [{"rate": 1e-4 ** (1 - u[0]), "weights": 4 * u[1:] - 1} for u in t]
        chex.assert_trees_all_close(alphas[start : start + 6], expected, rtol=1e-9)
        fitness = jnp.stack([jnp.asarray(value_of(alpha)) for alpha in expected])
        if expected_state is None:
            expected_state = library.init(tell_key, x, fitness, params)
        else:
            expected_state, _ = library.tell(
                tell_key, x, fitness, expected_state, params
            )
    assert (state.index, len(state.proposals), len(state.values)) == (3, 0, 0)
    chex.assert_trees_all_close(state.state, expected_state, rtol=1e-6)


def state_after_generation(values, second_alpha=None):
    """Returns the state of SNES after one generation of four trials."""
    searcher = EvolutionStrategy(SNES, 4)
    state = searcher.init(SPACE, KEY)
    for index, value in enumerate(values):
        alpha, state = searcher.ask(state, KEY)
        if index == 1 and second_alpha is not None:
            alpha = second_alpha
        state = searcher.tell(state, alpha, value)
    return state.state


def test_failures_count_as_the_worst_of_an_evolution_generation():
    """They are worse than the worst value; SNES uses ranks only."""
    failed = state_after_generation([np.nan, 0.2, np.inf, 0.7])
    expected = state_after_generation([0.8, 0.2, 0.8, 0.7])
    chex.assert_trees_all_close(failed, expected, rtol=1e-12)


# Values of the parents and of their children, and those of the members that stay.
GENERATIONS = {
    "low child": ([4, 5, 6, 7], [np.nan, np.nan, np.nan, 3.9], [4, 5, 6, 3.9]),
    "high parent": ([4, 5, 6, 7], [3, 3.5, 6.5, np.nan], [3, 3.5, 6, 7]),
    "zeros": ([0, 0, 0, 0], [np.nan, np.nan, np.nan, -1], [0, 0, 0, -1]),
}


@pytest.mark.parametrize("is_double", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("name", GENERATIONS)
def test_a_failed_child_of_evolution_displaces_no_parent(name, is_double):
    """A member is its child if this is as good; the fitness is that of its point."""
    parents, children, expected = GENERATIONS[name]
    with enable_x64(is_double):
        searcher = EvolutionStrategy(DifferentialEvolution, 4)
        state, points = searcher.init(Unit(shape=(2,)), KEY), []
        for values in (parents, children):
            for value in values:
                alpha, state = searcher.ask(state, KEY)
                points.append(state.proposals[state.num_proposed - 1])
                state = searcher.tell(state, alpha, value)
    np.testing.assert_allclose(state.state.fitness, expected, rtol=1e-6)
    is_child = np.isclose(children, expected)
    members = np.where(is_child[:, None], points[4:], points[:4])
    np.testing.assert_array_equal(state.state.population, members)
    np.testing.assert_allclose(state.state.best_fitness, min(expected), rtol=1e-6)


def test_a_failed_parent_of_evolution_is_not_the_elite():
    """All others have the same value, and the lowest index would win a tie."""
    searcher = EvolutionStrategy(DifferentialEvolution, 4)
    state = searcher.init(Unit(shape=(2,)), KEY)
    for value in (np.nan, 5, 5, 5):
        alpha, state = searcher.ask(state, KEY)
        state = searcher.tell(state, alpha, value)
    assert np.argmin(state.state.fitness) == 1


@pytest.mark.parametrize("num_good", [0, 8], ids=["the first", "a later one"])
def test_a_generation_of_failures_only_is_sampled_again(num_good):
    """Differential evolution keeps what is better, and no failure is."""
    searcher = EvolutionStrategy(DifferentialEvolution, 4)
    state, values = searcher.init(Unit(shape=(2,)), KEY), []
    keys = iter(jax.random.split(KEY, 60))

    def run(num_trials, value_of):
        nonlocal state
        for _ in range(num_trials):
            alpha, state = searcher.ask(state, next(keys))
            value = float(value_of(alpha))
            state = searcher.tell(state, alpha, value)
            values.append(value)

    distance = lambda alpha: 1 + jnp.sum((alpha - 0.3) ** 2)
    run(num_good, distance)
    before = state.state
    run(4, lambda alpha: np.nan)
    assert state.index == num_good // 4
    if num_good:
        np.testing.assert_array_equal(state.state.fitness, before.fitness)
    run(40, distance)
    assert np.all(state.state.fitness > 1)  # none of a failed trial
    best = np.nanmin(np.asarray(values))
    np.testing.assert_allclose(np.min(state.state.fitness), best, rtol=1e-12)


def test_evolution_learns_from_trials_that_it_did_not_propose():
    """A trial in the place of the second proposal, also on the edge of the space."""
    told, values = {"rate": 0.1, "weights": jnp.array([0.0, 1.0])}, [0.9, 0.1, 0.8, 0.7]
    state = state_after_generation(values, told)
    assert not np.allclose(state.mean, state_after_generation(values).mean)
    library = SNES(population_size=4, solution=jnp.zeros(3))
    params = library.default_params
    expected = library.init(KEY, jnp.zeros(3), params)
    ask_key, tell_key = jax.random.split(jax.random.key(seed_from_key(KEY)))
    x, expected = library.ask(ask_key, expected, params)
    t = jnp.array([0.75, 0.25, 0.5])
    x = x.at[1].set(jnp.log(t / (1 - t)))
    expected, _ = library.tell(tell_key, x, jnp.array(values), expected, params)
    np.testing.assert_allclose(state.mean, expected.mean, rtol=1e-12)
    edge = {"rate": 1.0, "weights": jnp.array([-1.0, 3.0])}
    assert np.isfinite(state_after_generation(values, edge).mean).all()


def test_evolution_strategies_of_one_size_share_an_instance():
    """An instance compiles its own methods."""
    make = lambda size, space: EvolutionStrategy(SNES, size).init(space, KEY).strategy
    plane = Unit(shape=(2,))
    assert make(4, SPACE) is make(4, {"three": Unit(shape=(3,))})
    assert len({id(make(4, SPACE)), id(make(5, SPACE)), id(make(4, plane))}) == 3


# scikit-learn.


def test_gaussian_process_proposes_the_largest_expected_improvement():
    """The improvement is predicted by a process that scikit-learn fits by itself."""
    alphas, state = propose(GaussianProcess(8, 200), SPACE, 12)
    t = np.stack([hg.spaces.to_unit(SPACE, alpha) for alpha in alphas])
    np.testing.assert_allclose(state.t, t, rtol=1e-12)
    alpha, _ = GaussianProcess(8, 200).ask(state, KEY)
    bounds = 1e-2, 1e2
    kernel = ConstantKernel(1.0, bounds) * Matern(np.full(3, 0.5), bounds, 2.5)
    process = GaussianProcessRegressor(kernel, alpha=1e-6, normalize_y=True)
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        process.fit(t, state.values)
    improvement = lambda t: expected_improvement(
        state.values.min(), *process.predict(t, return_std=True)
    )
    others = np.random.default_rng(1).uniform(size=(200, 3))
    proposed = hg.spaces.to_unit(SPACE, alpha)[None]
    assert improvement(proposed) >= improvement(others).max() > 0


def test_a_proposal_without_a_value_has_the_predicted_one():
    """The next proposal is that after a trial with this value, at the same kernel."""
    searcher = GaussianProcess(3, 50)
    _, state = propose(searcher, Unit(), 3, lambda alpha: (alpha - 0.4) ** 2)
    first, pending = searcher.ask(state, KEY)
    second, _ = searcher.ask(pending, KEY)
    kernel = gaussian_process_module.fit_process(state.t, state.values, 1e-6).kernel
    process = GaussianProcessRegressor(
        kernel, alpha=1e-6, normalize_y=True, optimizer=None
    )
    mean = process.fit(state.t, state.values).predict([[first]])
    values = np.append(state.values, mean)
    process.fit(np.append(state.t, [[first]], axis=0), values)
    best_t = state.t[np.argmin(state.values)]
    axes, seed = hg.spaces.axes(Unit()), seed_from_key(jax.random.split(KEY)[1])
    t = gaussian_process_module.sample_candidates(axes, best_t, 50, seed)
    improvement = expected_improvement(
        values.min(), *process.predict(t, return_std=True)
    )
    np.testing.assert_allclose(second, t[np.argmax(improvement), 0], rtol=1e-6)
    assert abs(first - second) > 1e-3


def test_a_batch_of_the_gaussian_process_has_different_combinations():
    searcher, space = GaussianProcess(4), {"depth": Integer(1, 8), "op": Choice(3)}
    value = lambda alpha: (alpha["depth"] - 6.0) ** 2 + (alpha["op"] - 1.0) ** 2
    _, state = propose(searcher, space, 4, value)
    tried = set(map(tuple, state.t.tolist()))
    for key in make_keys(8):
        _, state = searcher.ask(state, key)
    proposed = set(map(tuple, state.pending_t.tolist()))
    assert len(proposed) == 8
    assert not proposed & tried


def test_gaussian_process_searches_around_the_best_trial(monkeypatch):
    """A failure is never the best trial, also beside a single finite value."""
    searcher, best = GaussianProcess(3, 20), []
    sample = gaussian_process_module.sample_candidates
    monkeypatch.setattr(
        gaussian_process_module,
        "sample_candidates",
        lambda axes, best_t, *args: best.append(best_t) or sample(axes, best_t, *args),
    )
    state = searcher.init(Unit(), KEY)
    for t, value in ((0.1, np.nan), (0.3, np.inf), (0.8, 0.5)):
        state = searcher.tell(state, t, value)
    searcher.ask(state, KEY)
    np.testing.assert_allclose(best, [[0.8]], rtol=1e-12)


def test_gaussian_process_tries_each_combination_once():
    """Until none is left; with noise it measures the best one again."""
    space = {"depth": Integer(1, 4), "op": Choice((0, 5))}
    value = lambda alpha: ((int(alpha["depth"]) - 3) / 3) ** 2 + (int(alpha["op"]) != 5)
    num_distinct = {}
    for noise in (1e-6, 1e-2):
        alphas, _ = propose(GaussianProcess(3, 50, noise), space, 12, value)
        points = [(int(alpha["depth"]), int(alpha["op"])) for alpha in alphas]
        num_distinct[noise] = len(set(points))
    assert num_distinct[1e-6] == 8 > num_distinct[1e-2]


def test_expected_improvement_is_its_integral():
    mean, std = np.array([0.0, 1.0, -2.0]), np.array([1.0, 0.5, 0.1])
    y = mean[:, None] + std[:, None] * np.linspace(-15, 15, 50_001)
    density = scipy.stats.norm.pdf(y, mean[:, None], std[:, None])
    expected = np.trapezoid(np.maximum(0.3 - y, 0) * density, y, axis=1)
    actual = expected_improvement(0.3, mean, std)
    np.testing.assert_allclose(actual, expected, rtol=1e-7)
    without_noise = expected_improvement(0.3, np.array([0.1, 0.5]), np.zeros(2))
    np.testing.assert_allclose(without_noise, [0.2, 0.0], atol=1e-300)


def test_features_of_a_choice_are_its_indicators():
    axes = hg.spaces.axes([Choice(3), Unit(), Integer(1, 4)])
    t = np.array([[0.5, 0.2, 0.125], [5 / 6, 0.7, 0.875]])
    expected = [[0, 1, 0, 0.2, 0.125], [0, 0, 1, 0.7, 0.875]]
    np.testing.assert_array_equal(to_features(axes, t), expected)


@pytest.mark.parametrize("seed", range(3))
def test_gaussian_process_keeps_away_from_failures_beside_a_single_value(seed):
    searcher = GaussianProcess(4, 200)
    state = searcher.init(Unit(), KEY)
    for alpha, value in zip([0.05, 0.3, 0.6, 0.95], [5.0] + 3 * [np.nan], strict=True):
        state = searcher.tell(state, jnp.asarray(alpha), jnp.asarray(value))
    alpha, _ = searcher.ask(state, jax.random.key(seed))
    assert alpha < 0.15
