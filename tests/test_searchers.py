"""Searchers against known optima, their own libraries run by hand, and themselves."""

import functools
import io
import itertools
import json
import re
import subprocess
import sys
import warnings

import cmaes
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
import pytest
import scipy.stats
from evosax.algorithms import CMA_ES, PGPE, SNES, DifferentialEvolution, Sep_CMA_ES
from scipy.stats import qmc
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern

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
from hypergrad.searchers import cmaes as cmaes_searcher
from hypergrad.searchers.base import seed_from_key
from hypergrad.searchers.gaussian_process import _expected_improvement, _features
from hypergrad.spaces import Choice, Integer, Interval, Simplex, Unit

KEY = jax.random.key(0)
SPACE = {
    "rate": Interval(1e-4, 1.0, log=True),
    "weights": Interval(-1.0, 3.0, shape=(2,)),
}
CHOICES = {"depth": Integer(1, 8), "op": Choice((0, 5, 9))}
MIXED = SPACE | CHOICES
FEW = {"depth": Integer(4, 7), "op": Choice((0, 5, 9))}
PLANE = {"rate": Interval(1e-4, 1.0, log=True), "weight": Interval(-1.0, 3.0)}
BEST = {
    "rate": 10**-1.3, "weight": 0.9, "weights": np.array([0.5, 2.0]),
    "depth": 6, "op": 5,
}  # fmt: skip


def distance(alpha):
    """Squared, each axis in units of its range; a wrong choice is half a range off."""
    parts = []
    if "rate" in alpha:
        parts.append((jnp.log10(alpha["rate"] / BEST["rate"]) / 4) ** 2)
    for weight in alpha.keys() & {"weight", "weights"}:
        parts.append(jnp.sum((alpha[weight] - BEST[weight]) ** 2) / 16)
    if "depth" in alpha:
        parts.append(((alpha["depth"] - BEST["depth"]) / 7) ** 2)
        parts.append(0.25 * (alpha["op"] != BEST["op"]))
    return sum(parts)


PROBLEM = hg.Bilevel(
    lambda w, alpha, batch: (w - distance(alpha)) ** 2, lambda w, alpha, batch: w
)
FIT = hg.ClosedForm(lambda alpha, batch: distance(alpha))


def search(searcher, trials, space=SPACE, **changes):
    """On a problem whose value at its best response is the squared distance."""
    settings = {"space": space, "key": KEY, "budget": (trials + 0.5) * 4 / 3}
    return hg.search(PROBLEM, FIT, searcher, 0.0, **{**settings, **changes})


def run(searcher, space, trials, state=None, begin=0, seed=0):
    """Asks and tells by hand; proposals ``begin``, ..., and the state after them."""
    key = jax.random.key(seed)
    state = searcher.init(space, key) if state is None else state
    asked = []
    for i in range(begin, trials):
        alpha, state = searcher.ask(state, jax.random.fold_in(key, i))
        state = searcher.tell(state, alpha, distance(alpha))
        asked.append(alpha)
    return asked, state


def cubes(space, asked):
    return np.stack([hg.spaces.to_unit(space, alpha) for alpha in asked])


# Every searcher: name -> (searcher, space, trials, value of the best within), as the
# module docstring of hypergrad.searchers and their own state it. The first three follow
# from geometry, on a square with the optimum more than 0.1 from its edges. Of 300
# uniform points one is within 0.1 but for (1 - 0.01 pi)^300 < 1e-4; of 256 points of a
# Sobol sequence in two dimensions there is one in each cell of 1/16 by 1/16, and a disc
# of radius 0.1 holds a whole one; nine points an axis leave at most 2^(1/2) / 16. The
# others have twice the trials that the slower of seeds 100 and 101 needed, rounded up
# to tens.
EVERY = {
    "random": (Random(), PLANE, 300, 1e-2),
    "grid": (Grid(9), PLANE, 81, 1e-2),
    "sobol": (Sobol(), PLANE, 256, 1e-2),
    "tpe": (TPE(), PLANE, 40, 1e-2),
    "tpe-mixed": (TPE(), PLANE | CHOICES, 70, 1e-2),
    "gp": (GaussianProcess(), PLANE, 30, 1e-4),
    "gp-mixed": (GaussianProcess(), PLANE | CHOICES, 40, 1e-2),
    "nsga2": (NSGA2(20), PLANE, 50, 1e-2),
    "nsga2-mixed": (NSGA2(20), PLANE | CHOICES, 370, 1e-2),
    "cmaes": (CMAES(), PLANE, 110, 1e-4),
    "evolution-cma": (EvolutionStrategy(CMA_ES, 8), PLANE, 150, 1e-4),
    "evolution-snes": (EvolutionStrategy(SNES, 8), PLANE, 160, 1e-4),
    "evolution-de": (EvolutionStrategy(DifferentialEvolution, 8), PLANE, 250, 1e-4),
    "reinforce": (Reinforce(3.0), FEW, 20, 0.0),
}
every = pytest.mark.parametrize("name", EVERY)
DISCRETE = {"depth": Integer(1, 8), "op": Choice((0, 5, 9), shape=(2,))}


@pytest.fixture(autouse=True)
def _ranks_within_evosax(request):
    """evosax adds vectors to rows of them; nothing of ours does."""
    allowed = "allow" if "evolution" in request.node.name else "raise"
    with jax.numpy_rank_promotion(allowed):
        yield


class FoundError(Exception):
    """Near enough: the rest of the budget is not needed."""


def needed(searcher, space, trials, within, seed):
    """Trials until a value is near enough; infinite beyond the budget."""
    seen = []

    def progress(done, best):
        seen.append(done)
        if best <= within:
            raise FoundError

    try:
        search(searcher, trials, space, key=jax.random.key(seed), progress=progress)
    except FoundError:
        return seen[-1]
    assert seen[-1] == trials
    return np.inf


@every
def test_the_optimum_is_found_within_the_stated_budget(name):
    """On the median of seeds 0..9; below 0.02 both choices are right as well."""
    seeds = range(1 if name == "grid" else 10)
    assert np.median([needed(*EVERY[name], seed) for seed in seeds]) <= EVERY[name][2]


def test_the_best_of_a_trace_is_its_best_trial():
    trace = search(TPE(5), 20, MIXED)
    assert len(trace.value) == 20
    np.testing.assert_allclose(distance(trace.best_alpha), trace.value.min())


def test_every_budget_is_stated():
    """In each docstring the number of trials that is tested here, and how near."""
    words = {1e-2: "within 0.01", 1e-4: "within 1e-4", 0.0: "best of 12 choices"}
    for searcher, _, trials, within in EVERY.values():
        text = type(searcher).__doc__.split("Budget: ")[1].split("\n\n")[0]
        stated = " ".join(text.split())
        assert re.search(rf"(?<![\w.-]){trials}(?![\w.])", stated), stated
        assert re.search(rf"{words[within]}(?!\d)", stated), stated


@every
def test_a_stored_state_asks_on_as_if_nothing_had_happened(name):
    """Stored after any number of trials as plain arrays: nothing repeated nor lost."""
    searcher, space, *_ = EVERY[name]
    whole, _ = run(searcher, space, 20)
    for k in (1, 13):
        first, state = run(searcher, space, k)
        file = io.BytesIO()
        np.savez(file, *jax.tree.leaves(state))
        file.seek(0)
        with np.load(file, allow_pickle=False) as saved:
            leaves = [saved[f"arr_{i}"] for i in range(len(saved.files))]
        fresh = searcher.init(space, jax.random.key(0))
        state = jax.tree.unflatten(jax.tree.structure(fresh), leaves)
        then, _ = run(searcher, space, 20, state, k)
        for one, same in zip(whole, first + then, strict=True):
            jax.tree.map(np.testing.assert_array_equal, one, same)


@every
def test_proposals_lie_in_the_space_and_asking_changes_nothing(name):
    searcher, space, *_ = EVERY[name]
    asked, state = run(searcher, space, 25)
    for alpha in asked:
        assert jax.tree.structure(alpha) == jax.tree.structure(asked[0])
        assert all(x.all() for x in jax.tree.leaves(hg.spaces.contains(space, alpha)))
    before = [np.array(leaf) for leaf in jax.tree.leaves(state)]
    one, _ = searcher.ask(state, KEY)
    two, _ = searcher.ask(state, KEY)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.leaves(state))


@every
def test_what_each_searcher_rests_on_is_cited(name):
    searcher = EVERY[name][0]
    text = hg.citation(searcher)
    assert all(f"{{{key}," in text for key in getattr(searcher, "citations", ()))
    # What a strategy is of, its class says.
    given = "lange2022" in text if isinstance(searcher, EvolutionStrategy) else False
    assert given or hasattr(searcher, "citations") or isinstance(searcher, Grid)


# Grid and Sobol.


def test_a_grid_is_the_product_of_its_axes():
    asked, state = run(Grid(3), MIXED, 27 * 24)
    points = [
        (a["depth"].item(), a["op"].item(), a["rate"].item(), *a["weights"].tolist())
        for a in asked
    ]
    axes = range(1, 9), (0, 5, 9), (1e-4, 1e-2, 1.0), (-1.0, 1.0, 3.0), (-1.0, 1.0, 3.0)
    np.testing.assert_allclose(points, list(itertools.product(*axes)), rtol=1e-12)
    with pytest.raises(StopIteration):
        Grid(3).ask(state, KEY)


def test_a_search_ends_with_its_grid_or_its_budget():
    assert len(search(Grid(2), 1000).value) == 8
    assert len(search(Grid(2), 5).value) == 5
    assert search(Grid(1), 1000).best_alpha["weights"].tolist() == [1.0, 1.0]


def test_grids_that_are_refused():
    with pytest.raises(ValueError, match=r"1000000 points \(6 axes\).*Sobol"):
        Grid(10).init(Unit(shape=(6,)), KEY)
    with pytest.raises(ValueError, match=r"Simplex.*Sobol"):
        Grid(10).init({"a": Simplex(shape=(3,))}, KEY)
    with pytest.raises(ValueError, match="Interval"):
        Grid(10).init({"a": None}, KEY)
    with pytest.raises(ValueError, match="num must be an integer"):
        Grid(0)


def test_sobol_is_the_sequence_of_scipy():
    """Through scipy's own quantiles, with the scramble of the state's seed."""
    asked, state = run(Sobol(), MIXED, 16)
    sequence = qmc.Sobol(5, seed=seed_from_key(jax.random.key(0))).random(16)
    quantiles = [
        scipy.stats.randint(1, 9).ppf,
        lambda t: np.array([0, 5, 9])[(3 * t).astype(int)],
        scipy.stats.loguniform(1e-4, 1.0).ppf,
        scipy.stats.uniform(-1.0, 4.0).ppf,
        scipy.stats.uniform(-1.0, 4.0).ppf,
    ]
    for i, (name, quantile) in enumerate(
        zip(["depth", "op", "rate", 0, 1], quantiles, strict=True)
    ):
        got = [a["weights"][name] if name in (0, 1) else a[name] for a in asked]
        np.testing.assert_allclose(got, quantile(sequence[:, i]), rtol=1e-10)
    assert json.loads(json.dumps([state["seed"], state["index"]]))[1] == 16
    other, _ = run(Sobol(), MIXED, 1, seed=1)
    assert other[0]["rate"] != asked[0]["rate"]


def test_sobol_fills_the_space_more_evenly_than_draws():
    """One point in each of 64 cells of an eighth by an eighth; draws leave a third."""
    space = Unit(shape=(2,))
    cells = lambda asked: {tuple(np.floor(8 * np.asarray(a)).tolist()) for a in asked}
    state, asked = Sobol().init(space, KEY), []
    for _ in range(64):
        alpha, state = Sobol().ask(state, KEY)
        asked.append(alpha)
    assert len(cells(asked)) == 64
    drawn = [Random().ask(space, jax.random.fold_in(KEY, i))[0] for i in range(64)]
    assert len(cells(drawn)) < 56


def test_a_searcher_that_proposes_nothing():
    class Nothing(Random):
        def ask(self, state, key):
            raise StopIteration

    with pytest.raises(ValueError, match="proposed nothing"):
        search(Nothing(), 3)


# The libraries, run by hand with the same seeds.


def keys_of(trials):
    return [jax.random.fold_in(jax.random.key(0), i) for i in range(trials)]


def test_tpe_proposes_what_optuna_does():
    """One study that goes on, on ranges of its own, reseeded at every ask."""
    asked, _ = run(TPE(5), MIXED, 40)
    kinds = optuna.distributions
    distributions = {
        # The order of the names is that in which optuna's random numbers are used.
        "0 depth": kinds.IntDistribution(1, 8),
        "1 op": kinds.CategoricalDistribution((0, 5, 9)),
        "2 rate": kinds.FloatDistribution(1e-4, 1.0, log=True),
        "3 a": kinds.FloatDistribution(-1.0, 3.0),
        "4 b": kinds.FloatDistribution(-1.0, 3.0),
    }
    study = optuna.create_study()
    for alpha, key in zip(asked, keys_of(40), strict=True):
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=5, seed=seed_from_key(key)
        )
        study.sampler = sampler
        trial = study.ask(distributions)
        hand = {name[2:]: value for name, value in trial.params.items()}
        assert (alpha["depth"], alpha["op"]) == (hand["depth"], hand["op"])
        np.testing.assert_allclose(alpha["rate"], hand["rate"], rtol=1e-6)
        weights = np.array([hand["a"], hand["b"]])
        np.testing.assert_allclose(alpha["weights"], weights, rtol=1e-6)
        names = ("depth", "op", "rate")
        told = {name: hand[name] for name in names} | {"weights": weights}
        study.tell(trial, float(distance(told)))


def test_searches_that_share_a_journal_ask_as_one(tmp_path):
    """What each asks is what one searcher would, told the trials of both in turn."""
    file = tmp_path / "tpe.log"
    both, one = [TPE(5, file), TPE(5, str(file))], TPE(5)
    states = [searcher.init(MIXED, KEY) for searcher in both]
    state = one.init(MIXED, KEY)
    for i, key in enumerate(keys_of(24)):
        who = (i // 3) % 2
        alpha, states[who] = both[who].ask(states[who], key)
        expected, state = one.ask(state, key)
        assert jax.tree.all(jax.tree.map(np.array_equal, alpha, expected))
        value = np.nan if i == 7 else distance(alpha)
        states[who] = both[who].tell(states[who], alpha, value)
        state = one.tell(state, expected, value)
    assert [len(own.values) for own in states] == [12, 12]
    # Trials in another space, which has the same axes, are not taken for these.
    wider = MIXED | {"rate": Interval(1e-5, 1.0, log=True)}
    state, key = both[0].init(wider, KEY), keys_of(1)[0]
    alpha, state = both[0].ask(state, key)
    both[0].tell(state, alpha, distance(alpha))
    backend = optuna.storages.journal.JournalFileBackend(str(file))
    storage = optuna.storages.JournalStorage(backend)
    studies = optuna.get_all_study_summaries(storage)
    assert sorted(study.n_trials for study in studies) == [1, 24]


def told_once(file, seed: int) -> None:
    """A search of one trial."""
    searcher, key = TPE(5, file), jax.random.key(seed)
    alpha, state = searcher.ask(searcher.init(MIXED, key), key)
    searcher.tell(state, alpha, distance(alpha))


def told_values(file) -> list[float]:
    """Of all trials in a journal with one study."""
    backend = optuna.storages.journal.JournalFileBackend(str(file))
    storage = optuna.storages.JournalStorage(backend)
    (study,) = optuna.get_all_study_summaries(storage)
    study = optuna.load_study(study_name=study.study_name, storage=storage)
    return [trial.value for trial in study.trials]


def test_a_search_that_dies_with_the_journal_in_hand_stops_no_other(tmp_path):
    """It is killed halfway through a line; others go on at once, and lose no trial."""
    file = tmp_path / "tpe.log"
    told_once(file, 0)
    code = """if True:
        import os, signal, sys
        from hypergrad.searchers.optuna_study import JournalLock
        JournalLock(sys.argv[1]).acquire()
        with open(sys.argv[1], "ab") as file:
            file.write(b'{"op_code":4,"worker')
        os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", code, str(file)], check=False)
    assert killed.returncode == -9
    before = told_values(file)
    for seed in (1, 2):
        told_once(file, seed)
    after = told_values(file)
    assert after[:1] == before
    assert len(after) == 3


def test_a_journal_that_is_none_is_named(tmp_path):
    """Where there is no folder, a line was damaged, or a file is another's."""
    nowhere, file = tmp_path / "no" / "tpe.log", tmp_path / "tpe.log"
    said = r"the journal \S* cannot be read or written .*give another file"
    with pytest.raises(ValueError, match=said):
        told_once(nowhere, 1)
    assert not nowhere.parent.exists()
    told_once(file, 0)
    damaged = file.read_bytes().replace(b"{", b"[", 1)
    for content in (damaged, b"PK\xff\x00\n\x00", b'{"rate": 0.1}', b'{"rate": 1}\n{"'):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            told_once(file, 1)
        assert file.read_bytes() == content


@pytest.mark.slow
def test_a_journal_loses_no_trial_of_processes_side_by_side(tmp_path):
    """Three that begin at once, of which one is killed under way and begun again."""
    file = tmp_path / "tpe.log"
    code = """if True:
        import sys, jax, hypergrad as hg
        inner = lambda w, alpha, batch: (w - alpha) ** 2
        problem = hg.Bilevel(inner, lambda w, alpha, batch: (w - 0.3) ** 2)
        trace = hg.search(
            problem, hg.Newton(), hg.searchers.TPE(3, sys.argv[1]), 0.0,
            space=hg.spaces.Unit(), budget=float(sys.argv[3]),
            key=jax.random.key(int(sys.argv[2])),
            progress=lambda done, best: print(done, flush=True),
        )
        print(*trace.value.tolist())
    """

    def start(seed, budget):
        command = [sys.executable, "-c", code, str(file), str(seed), str(budget)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    processes = [start(0, 60), start(1, 60), start(2, 1e9)]
    for _ in range(4):
        processes[2].stdout.readline()
    processes[2].kill()
    processes[2].communicate()
    processes[2] = start(3, 60)
    values = []
    for process in processes:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        values += map(float, out.splitlines()[-1].split())
    kept = told_values(file)
    assert len(values) > 30
    assert set(values) <= set(kept)
    assert len(kept) >= len(values) + 4  # and those of the one that was killed


@pytest.mark.parametrize("num_values", [1, 2])
def test_nsga2_proposes_what_optuna_does(num_values):
    """One study that goes on through its generations, reseeded at every ask."""
    searcher, kinds = NSGA2(6), optuna.distributions
    distributions = {
        "0 depth": kinds.IntDistribution(1, 8),
        "1 op": kinds.CategoricalDistribution((0, 5, 9)),
        "2 rate": kinds.FloatDistribution(1e-4, 1.0, log=True),
        "3 a": kinds.FloatDistribution(-1.0, 3.0),
        "4 b": kinds.FloatDistribution(-1.0, 3.0),
    }
    values = lambda alpha: [float(distance(alpha)), float(alpha["rate"])][:num_values]
    study = optuna.create_study(directions=["minimize"] * num_values)
    state, parents = searcher.init(MIXED, KEY), set()
    for key in keys_of(40):
        alpha, state = searcher.ask(state, key)
        study.sampler = optuna.samplers.NSGAIISampler(
            population_size=6, seed=seed_from_key(key)
        )
        trial = study.ask(distributions)
        hand = {name[2:]: value for name, value in trial.params.items()}
        assert (alpha["depth"], alpha["op"]) == (hand["depth"], hand["op"])
        np.testing.assert_allclose(alpha["rate"], hand["rate"], rtol=1e-6)
        weights = np.array([hand["a"], hand["b"]])
        np.testing.assert_allclose(alpha["weights"], weights, rtol=1e-6)
        told = values(alpha)
        state = searcher.tell(state, alpha, jnp.array(told))
        study.tell(trial, told)
        parents.add(float(alpha["weights"][0]))
    assert len(parents) < 40  # coordinates are inherited


@pytest.mark.parametrize("population", [None, 4])
def test_cmaes_proposes_what_cmaes_does(population):
    """One optimizer that goes on through its generations, reseeded at every ask."""
    asked, _ = run(CMAES(0.3, population), SPACE, 60)
    bounds = np.array([[0.0, 1.0]] * 3)
    size = 7 if population is None else population
    gaussian = cmaes.CMA(np.full(3, 0.5), 0.3, bounds, population_size=size)
    generation = []
    for alpha, key in zip(asked, keys_of(60), strict=True):
        gaussian.reseed_rng(seed_from_key(key))
        t = gaussian.ask()
        hand = {"rate": 1e-4 ** (1 - t[0]), "weights": 4 * t[1:] - 1}
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), alpha, hand
        )
        generation.append((t, float(distance(hand))))
        if len(generation) == size:
            gaussian.tell(generation)
            generation = []


def test_cmaes_tells_its_library_each_generation_once(monkeypatch):
    """Not all of them at every ask; a state alone asks for the same, however long.

    But for the rounding of BLAS, which may differ with where an array lies.
    """
    same = functools.partial(np.testing.assert_allclose, rtol=1e-12)
    count, tell = [], cmaes.CMA.tell
    monkeypatch.setattr(
        cmaes.CMA, "tell", lambda *given: count.append(1) or tell(*given)
    )
    _, state = run(CMAES(0.31, 4), SPACE, 60)
    assert len(count) == 14  # the last one's is not asked for
    alpha, _ = CMAES(0.31, 4).ask(state, KEY)
    assert len(count) == 15
    cmaes_searcher._gaussian.cache_clear()
    again, _ = CMAES(0.31, 4).ask(state, KEY)
    jax.tree.map(same, again, alpha)
    assert len(count) == 30
    monkeypatch.setattr(cmaes_searcher, "DEPTH", 2)
    cmaes_searcher._gaussian.cache_clear()
    again, _ = CMAES(0.31, 4).ask(state, KEY)
    jax.tree.map(same, again, alpha)
    assert len(count) == 45


# PGPE's own optimizer calls what optax has deprecated.
ASCENT = functools.partial(PGPE, optimizer=optax.adam(0.05))


@pytest.mark.parametrize(
    "strategy",
    [CMA_ES, Sep_CMA_ES, SNES, ASCENT, DifferentialEvolution],
    ids=["CMA_ES", "Sep_CMA_ES", "SNES", "PGPE", "DifferentialEvolution"],
)
def test_evolution_proposes_what_evosax_does(strategy):
    """Ten generations of six, by the library's own ask and tell."""
    asked, state = run(EvolutionStrategy(strategy, 6), SPACE, 60)
    library = strategy(population_size=6, solution=jnp.zeros(3))
    params, begun = library.default_params, None
    if strategy is not DifferentialEvolution:
        begun = library.init(jax.random.key(0), jnp.zeros(3), params)
    for i, first in enumerate(keys_of(60)[::6]):
        ask_key, tell_key = jax.random.split(jax.random.key(seed_from_key(first)))
        if begun is None:
            x = jax.random.logistic(ask_key, (6, 3))
        else:
            x, begun = library.ask(ask_key, begun, params)
        t = np.asarray(1 / (1 + jnp.exp(-x)))
        hand = [{"rate": 1e-4 ** (1 - u[0]), "weights": 4 * u[1:] - 1} for u in t]
        for alpha, same in zip(asked[6 * i : 6 * i + 6], hand, strict=True):
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9), alpha, same
            )
        fitness = jnp.stack([distance(alpha) for alpha in hand])
        if begun is None:
            begun = library.init(tell_key, x, fitness, params)
        else:
            begun, _ = library.tell(tell_key, x, fitness, begun, params)
    assert (state.index, len(state.asked), len(state.values)) == (10, 0, 0)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), state.state, begun
    )


def generation(strategy, values, elsewhere=None):
    """A strategy's state after one generation of four; one alpha not as asked."""
    searcher = EvolutionStrategy(strategy, 4)
    state = searcher.init(SPACE, KEY)
    for i, value in enumerate(values):
        alpha, state = searcher.ask(state, KEY)
        alpha = elsewhere if i == 1 and elsewhere else alpha
        state = searcher.tell(state, alpha, value)
    assert hg.spaces.contains(SPACE, searcher.ask(state, KEY)[0])["rate"]
    return state


@pytest.mark.parametrize("strategy", [SNES, ASCENT, DifferentialEvolution])
def test_a_generation_of_evolution_with_failures(strategy):
    """They count as its worst; of nothing but failures all are alike."""
    same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12)
    failed = generation(strategy, [jnp.nan, 0.2, jnp.inf, 0.7])
    worst = generation(strategy, [0.7, 0.2, 0.7, 0.7])
    jax.tree.map(same, failed.state, worst.state)
    lost = generation(strategy, [jnp.nan] * 4)
    alike = generation(strategy, [0.0] * 4)
    jax.tree.map(same, lost.state, alike.state)


def test_evolution_learns_from_trials_from_elsewhere():
    """One in the place of one that was asked for: the mean of the best two, told so."""
    told = {"rate": 0.1, "weights": jnp.array([0.0, 1.0])}
    values = [0.9, 0.1, 0.8, 0.7]
    moved, plain = generation(SNES, values, told), generation(SNES, values)
    assert not np.allclose(moved.state.mean, plain.state.mean)
    library = SNES(population_size=4, solution=jnp.zeros(3))
    begun = library.init(KEY, jnp.zeros(3), library.default_params)
    ask_key, tell_key = jax.random.split(jax.random.key(seed_from_key(KEY)))
    x, begun = library.ask(ask_key, begun, library.default_params)
    t = jnp.array([0.75, 0.25, 0.5])
    x = x.at[1].set(jnp.log(t / (1 - t)))
    begun, _ = library.tell(
        tell_key, x, jnp.array(values), begun, library.default_params
    )
    np.testing.assert_allclose(moved.state.mean, begun.mean, rtol=1e-12)
    at_the_edge = {"rate": 1.0, "weights": jnp.array([-1.0, 3.0])}
    edge = generation(SNES, values, at_the_edge)
    assert np.isfinite(edge.state.mean).all()


def test_a_killed_evolution_goes_on_to_the_same_trace():
    """To the bit, from lines of a file, within a generation and between two."""
    lines = []
    run = lambda **changes: hg.search(
        PROBLEM,
        FIT,
        EvolutionStrategy(SNES, 5),
        0.0,
        space=SPACE,
        key=KEY,
        budget=19,
        **changes,
    )
    trace = run(trial_callback=lambda row: lines.append(json.dumps(row)))
    assert len(lines) == 14
    for k in (1, 5, 7, 14):
        resumed = run(previous_trials=[json.loads(line) for line in lines[:k]])
        jax.tree.map(np.testing.assert_array_equal, trace, resumed)


def test_evolution_of_one_kind_is_compiled_once():
    """Its methods are compiled by instance; another size or space has its own."""
    made = lambda size, space: EvolutionStrategy(SNES, size).init(space, KEY).strategy
    assert made(4, SPACE) is made(4, {"three": Unit(shape=(3,))})
    assert len({id(made(4, SPACE)), id(made(5, SPACE)), id(made(4, PLANE))}) == 3


def test_evolution_takes_no_name_and_no_instance():
    made = SNES(population_size=4, solution=jnp.zeros(3))
    for strategy in ("SNES", made):
        with pytest.raises(TypeError, match=r"evosax\.algorithms\.CMA_ES"):
            EvolutionStrategy(strategy, 4)


def test_the_gaussian_process_has_the_likelihood_of_scikit_learn():
    """Fitted by its own call instead, the process expects as much of the proposal."""
    searcher = GaussianProcess(num_initial=8, num_candidates=500)
    asked, state = run(searcher, SPACE, 20)
    t = cubes(SPACE, asked)
    np.testing.assert_allclose(state.t, t, rtol=1e-12)
    alpha, _ = searcher.ask(state, KEY)
    kernel = ConstantKernel(1.0, (1e-2, 1e2)) * Matern(
        np.full(3, 0.5), (1e-2, 1e2), 2.5
    )
    process = GaussianProcessRegressor(kernel, alpha=1e-6, normalize_y=True)
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        process.fit(t, state.values)
    best = state.values.min()

    def expected(t):
        """The integral of max(best - y, 0) p(y)."""
        mean, deviation = process.predict(t, return_std=True)
        y = mean[:, None] + deviation[:, None] * np.linspace(-12, 12, 20_001)
        density = scipy.stats.norm.pdf(y, mean[:, None], deviation[:, None])
        return np.trapezoid(np.maximum(best - y, 0) * density, y, axis=1)

    others = np.random.default_rng(1).uniform(size=(500, 3))
    chosen = expected(cubes(SPACE, [alpha]))
    assert chosen > 0
    assert chosen >= expected(others).max()


def test_the_expected_improvement_is_its_integral():
    mean, deviation = np.array([0.0, 1.0, -2.0]), np.array([1.0, 0.5, 0.1])
    y = mean[:, None] + deviation[:, None] * np.linspace(-15, 15, 200_001)
    density = scipy.stats.norm.pdf(y, mean[:, None], deviation[:, None])
    integral = np.trapezoid(np.maximum(0.3 - y, 0) * density, y, axis=1)
    np.testing.assert_allclose(
        _expected_improvement(0.3, mean, deviation), integral, rtol=1e-7
    )
    sure = _expected_improvement(0.3, np.array([0.1, 0.5]), np.zeros(2))
    np.testing.assert_allclose(sure, [0.2, 0.0], atol=1e-300)


def test_features_of_a_choice_are_its_indicators():
    axes = hg.spaces.axes([Choice(3), Unit(), Integer(1, 4)])
    t = np.array([[0.5, 0.2, 0.125], [5 / 6, 0.7, 0.875]])
    expected = [[0, 1, 0, 0.2, 0.125], [0, 0, 1, 0.7, 0.875]]
    np.testing.assert_array_equal(_features(axes, t), expected)


# Trials, their failures, and what is refused.

LEARNING = {"tpe": TPE(5), "cmaes": CMAES(), "gp": GaussianProcess(5, 100)}
learning = pytest.mark.parametrize("name", LEARNING)


@learning
def test_failed_trials_repel(name):
    """NaN where the first weight is above 1: its half is left for the other."""
    searcher = LEARNING[name]
    space = Unit(shape=(2,))
    state, key, asked = searcher.init(space, KEY), KEY, []
    for _ in range(40):
        key, ask_key = jax.random.split(key)
        alpha, state = searcher.ask(state, ask_key)
        value = jnp.where(alpha[0] > 0.5, jnp.nan, jnp.sum(alpha))
        state = searcher.tell(state, alpha, value)
        asked.append(np.asarray(alpha))
    failed = np.array(asked)[:, 0] > 0.5
    np.testing.assert_array_equal(np.isinf(state.values), failed)
    assert failed[:10].any()
    assert failed[20:].mean() < 0.25
    # Nor do failures alone bring a searcher down.
    state = searcher.init(space, KEY)
    for i in range(10):
        alpha, state = searcher.ask(state, jax.random.fold_in(KEY, i))
        state = searcher.tell(state, alpha, jnp.nan)
    assert hg.spaces.contains(space, searcher.ask(state, KEY)[0]).all()


@learning
def test_trials_from_elsewhere_may_be_told(name):
    """An alpha that was never asked for counts like any other."""
    searcher = LEARNING[name]
    state = searcher.init(SPACE, KEY)
    told = {"rate": 0.1, "weights": jnp.array([0.0, 1.0])}
    state = searcher.tell(state, told, 0.5)
    np.testing.assert_allclose(state.t, [[0.75, 0.25, 0.5]])
    assert state.values.tolist() == [0.5]
    assert jax.tree.structure(searcher.ask(state, KEY)[0]) == jax.tree.structure(told)


def test_a_trial_fails_if_any_of_its_values_does():
    """Of several it is the worst in all; a parent did not, once enough others did not.

    So the coordinate at which a child fails is drawn, not inherited.
    """
    space, searcher = Unit(shape=(2,)), NSGA2(5)
    state = searcher.init(space, KEY)
    for i in range(40):
        alpha, state = searcher.ask(state, jax.random.fold_in(KEY, i))
        second = jnp.where(alpha[0] > 0.5, jnp.nan, alpha[1])
        state = searcher.tell(state, alpha, jnp.stack([alpha[0], second]))
    failed = state.t[:, 0] > 0.5
    assert state.values.shape == (40, 2)
    assert np.array_equal(np.isinf(state.values), np.stack([failed, failed], 1))
    assert np.sum(~failed[:20]) >= 5
    drawn = [x not in state.t[:i, 0] for i, x in enumerate(state.t[:, 0])]
    assert np.array(drawn)[20:][failed[20:]].all()
    assert not np.all(drawn)


@pytest.mark.parametrize("failed", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_infinite_to_evolution_and_all(failed):
    """No searcher takes minus infinity for the best that there is."""
    for searcher in (TPE(), NSGA2(), CMAES(), GaussianProcess()):
        state = searcher.init(SPACE, KEY)
        alpha, state = searcher.ask(state, KEY)
        assert searcher.tell(state, alpha, failed).values.tolist() == [np.inf]
        if isinstance(searcher, NSGA2):
            told = searcher.tell(state, alpha, np.array([1.0, failed]))
            assert told.values.tolist() == [[np.inf, np.inf]]
    searcher = EvolutionStrategy(SNES, 4)
    alpha, state = searcher.ask(searcher.init(SPACE, KEY), KEY)
    assert searcher.tell(state, alpha, failed).values.tolist() == [np.inf]


def test_optuna_is_left_as_loud_as_it_was():
    before = optuna.logging.get_verbosity()
    run(TPE(), SPACE, 3)
    run(NSGA2(), SPACE, 3)
    assert optuna.logging.get_verbosity() == before


@pytest.mark.parametrize(
    ("searcher", "package"),
    [(TPE(), "optuna"), (NSGA2(), "optuna"), (CMAES(), "cmaes")],
    ids=repr,
)
def test_a_missing_library_is_named_with_its_extra(searcher, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*hypergrad-jax\[search\]"):
        searcher.init(SPACE, KEY)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: TPE(0), "num_initial"),
        (lambda: CMAES(0.2, 1), "population"),
        (lambda: NSGA2(1), "population_size"),
        (lambda: NSGA2().init({"a": None}, KEY), "Interval"),
        (lambda: GaussianProcess(1), "num_initial"),
        (lambda: GaussianProcess(5, 1), "num_candidates"),
        (lambda: CMAES().init(MIXED, KEY), r"Integer and Choice.*TPE"),
        (lambda: CMAES().init(Unit(), KEY), r"two axes.*TPE"),
        (lambda: EvolutionStrategy(SNES, 1), "size"),
        (lambda: EvolutionStrategy(SNES, 4).init({"a": None}, KEY), "Interval"),
        (lambda: TPE().init({"a": None}, KEY), "Interval"),
        (lambda: Sobol().init({"a": None}, KEY), "Interval"),
        (lambda: GaussianProcess().init({"a": None}, KEY), "Interval"),
    ],
)
def test_settings_and_spaces_that_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_a_journal_is_a_path():
    with pytest.raises(TypeError, match="journal must be a path"):
        TPE(5, 3)


def test_recorded_trials_are_not_told_to_a_journal_again(tmp_path):
    searcher, rows = TPE(5, tmp_path / "tpe.log"), []
    search(searcher, 2, trial_callback=rows.append)
    before = (tmp_path / "tpe.log").read_text()
    with pytest.raises(ValueError, match="trials are told by the searcher's journal"):
        hg.search(
            PROBLEM,
            FIT,
            searcher,
            0.0,
            space=SPACE,
            budget=4,
            key=KEY,
            previous_trials=rows,
        )
    assert (tmp_path / "tpe.log").read_text() == before


# Reinforce.


def test_the_expected_step_of_reinforce_is_the_gradient_of_the_expected_value():
    """Over all 72 alphas, weighted by the policy; the baseline changes nothing."""
    searcher = Reinforce(step_size=0.3)
    rng = np.random.default_rng(0)
    state = searcher.init(DISCRETE, KEY)
    logits = [jnp.asarray(rng.normal(size=x.shape)) for x in state["logits"]]
    every = list(itertools.product(range(8), range(3), range(3)))
    values = rng.normal(size=len(every))

    def probabilities(logits):
        depth, first, second = map(jax.nn.softmax, logits)
        return jnp.stack([depth[i] * first[j] * second[k] for i, j, k in every])

    slope = jax.grad(lambda logits: probabilities(logits) @ values)(logits)
    for baseline in (0.0, 2.0):
        given = state | {"logits": logits, "baseline": jnp.array(baseline)}
        step = [jnp.zeros_like(x) for x in logits]
        for (i, j, k), p, value in zip(
            every, probabilities(logits), values, strict=True
        ):
            ops = jnp.array([0, 5, 9])
            alpha = {"depth": jnp.array(1 + i), "op": jnp.stack([ops[j], ops[k]])}
            moved = searcher.tell(given, alpha, value)["logits"]
            triples = zip(step, moved, logits, strict=True)
            step = [mean + p * (new - old) for mean, new, old in triples]
        for one, gradient in zip(step, slope, strict=True):
            np.testing.assert_allclose(one, -0.3 * gradient, rtol=1e-9, atol=1e-14)


def test_reinforce_draws_from_its_policy():
    searcher = Reinforce()
    state = searcher.init({"op": Choice((4, 7, 9))}, KEY)
    state = state | {"logits": [jnp.log(jnp.array([0.5, 0.3, 0.2]))]}
    drawn = [searcher.ask(state, jax.random.fold_in(KEY, i))[0] for i in range(500)]
    counts = [sum(int(a["op"]) == op for a in drawn) for op in (4, 7, 9)]
    assert scipy.stats.chisquare(counts, [250, 150, 100]).pvalue > 1e-4


def test_reinforce_by_hand():
    """Two trials and two failures of a fair coin, step 1, decay 1/2."""
    searcher = Reinforce(1.0, 0.5)
    state = searcher.init(Choice(2), KEY)
    state = searcher.tell(state, jnp.array(0), jnp.nan)
    np.testing.assert_array_equal(state["logits"][0], [0.0, 0.0])
    state = searcher.tell(state, jnp.array(0), 3.0)  # its own baseline
    np.testing.assert_array_equal(state["logits"][0], [0.0, 0.0])
    state = searcher.tell(state, jnp.array(1), 1.0)  # 2 below 3
    np.testing.assert_allclose(state["logits"][0], [-1.0, 1.0])
    np.testing.assert_allclose(state["baseline"], 2.0)
    state = searcher.tell(state, jnp.array(1), jnp.inf)  # the worst, 1 above 2
    p = 1 / (1 + np.exp(-2))
    np.testing.assert_allclose(state["logits"][0], [-1 + (1 - p), 1 - (1 - p)])
    np.testing.assert_allclose(state["baseline"], 2.5)


def test_reinforce_needs_choices():
    with pytest.raises(ValueError, match=r"Choice or Integer.*TPE"):
        Reinforce().init(MIXED, KEY)
