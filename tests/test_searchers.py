"""Searchers against known optima, their own libraries run by hand, and themselves."""

import io
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from scipy.stats import qmc

import hypergrad as hg
from hypergrad.searchers import Grid, Random, Sobol
from hypergrad.searchers.trials import seed_of
from hypergrad.spaces import Choice, Integer, Interval, Simplex, Unit

KEY = jax.random.key(0)
SPACE = {
    "rate": Interval(1e-4, 1.0, log=True),
    "weights": Interval(-1.0, 3.0, shape=(2,)),
}
MIXED = SPACE | {"depth": Integer(1, 8), "op": Choice((0, 5, 9))}
BEST = {"rate": 0.01, "weights": np.array([0.5, 2.0]), "depth": 6, "op": 5}


def distance(alpha):
    """Squared, each axis in units of its range; a wrong choice is half a range off."""
    parts = [
        (jnp.log10(alpha["rate"] / BEST["rate"]) / 4) ** 2,
        jnp.sum((alpha["weights"] - BEST["weights"]) ** 2) / 16,
    ]
    if "depth" in alpha:
        parts.append(((alpha["depth"] - BEST["depth"]) / 7) ** 2)
        parts.append(0.25 * (alpha["op"] != BEST["op"]))
    return sum(parts)


def search(searcher, trials, space=SPACE, **changes):
    """On a problem whose value at its best response is the squared distance."""
    inner = lambda w, alpha, batch: (w - distance(alpha)) ** 2
    outer = lambda w, alpha, batch: w
    solver = hg.ClosedForm(lambda alpha, batch: distance(alpha))
    settings = {"space": space, "key": KEY, "budget": (trials + 0.5) * 4 / 3}
    problem = hg.Bilevel(inner, outer)
    return hg.search(problem, solver, searcher, 0.0, **{**settings, **changes})


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


# Every searcher: name -> (searcher, space, trials, distance of the best within).
# Of 200 uniform points one is within 1/4, a ball of volume 0.065, but for exp(-13); as
# many of Sobol's are spread no worse. A grid comes within half a spacing an axis.
EVERY = {
    "random": (Random(), SPACE, 200, 0.25),
    "grid": (Grid(5), SPACE, 125, 3**0.5 / 8),
    "grid-mixed": (Grid(3), MIXED, 27 * 24, 3**0.5 / 4),
    "sobol": (Sobol(), SPACE, 128, 0.2),
}
every = pytest.mark.parametrize("name", EVERY)


@every
def test_the_optimum_is_found_within_its_tolerance(name):
    searcher, space, trials, within = EVERY[name]
    trace = search(searcher, trials, space)
    assert len(trace.value) == trials
    assert float(jnp.sqrt(jnp.min(trace.value))) <= within
    np.testing.assert_allclose(distance(trace.best_alpha), trace.value.min())
    if "depth" in space:
        assert trace.best_alpha["depth"] == 6
        assert trace.best_alpha["op"] == 5


@every
def test_a_stored_state_asks_on_as_if_nothing_had_happened(name):
    """Stored after any number of trials as plain arrays: nothing repeated nor lost."""
    searcher, space, *_ = EVERY[name]
    whole, _ = run(searcher, space, 30)
    for k in (0, 1, 17):
        first, state = run(searcher, space, k)
        file = io.BytesIO()
        np.savez(file, *jax.tree.leaves(state))
        file.seek(0)
        with np.load(file, allow_pickle=False) as saved:
            leaves = [saved[f"arr_{i}"] for i in range(len(saved.files))]
        fresh = searcher.init(space, jax.random.key(0))
        state = jax.tree.unflatten(jax.tree.structure(fresh), leaves)
        then, _ = run(searcher, space, 30, state, k)
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
    assert hasattr(searcher, "citations") or isinstance(searcher, Grid)


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
    sequence = qmc.Sobol(5, seed=seed_of(jax.random.key(0))).random(16)
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
