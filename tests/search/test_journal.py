"""Searches by TPE that share the trials of a journal."""

import signal
from concurrent.futures import ThreadPoolExecutor

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optuna
import pytest

import hypergrad as hg
from hypergrad.searchers import TPE
from hypergrad.spaces import Choice, Interval
from tests.processes import start_python
from tests.search.problems import RecordingSearcher, record, search

KEY = jax.random.key(0)
SPACE = {"rate": Interval(1e-4, 1.0, log=True), "op": Choice((0, 5, 9))}


def value_of(alpha) -> float:
    """Returns a value that depends on both leaves."""
    return float(np.log10(alpha["rate"]) ** 2 + (alpha["op"] != 5))


def make_trial(file, seed: int, space=SPACE) -> None:
    """Makes a search of one trial."""
    searcher, key = TPE(5, file), jax.random.key(seed)
    alpha, state = searcher.ask(searcher.init(space, key), key)
    searcher.tell(state, alpha, value_of(alpha))


def read_studies(file) -> list[list[float]]:
    """Returns the values of the trials of each study in a journal."""
    backend = optuna.storages.journal.JournalFileBackend(str(file))
    storage = optuna.storages.JournalStorage(backend)
    studies = [
        optuna.load_study(study_name=summary.study_name, storage=storage)
        for summary in optuna.get_all_study_summaries(storage)
    ]
    return [[trial.value for trial in study.trials] for study in studies]


def test_searches_that_share_a_journal_propose_as_one(tmp_path):
    """Each proposes what a single searcher would that is told the trials of both.

    The number of trials of the other search is part of the seed.
    """
    file = tmp_path / "tpe.log"
    searchers, single = [TPE(5, file), TPE(5, str(file))], TPE(5)
    states = [searcher.init(SPACE, KEY) for searcher in searchers]
    single_state = single.init(SPACE, KEY)
    for index in range(16):
        key, turn = jax.random.fold_in(KEY, index), (index // 3) % 2
        alpha, states[turn] = searchers[turn].ask(states[turn], key)
        if num_others := len(single_state.values) - len(states[turn].values):
            key = jax.random.fold_in(key, num_others)
        expected, single_state = single.ask(single_state, key)
        chex.assert_trees_all_equal(alpha, expected)
        value = np.nan if index == 7 else value_of(alpha)
        states[turn] = searchers[turn].tell(states[turn], alpha, value)
        single_state = single.tell(single_state, expected, value)
    assert [len(state.values) for state in states] == [9, 7]


def test_a_journal_may_be_in_the_home_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    make_trial("~/tpe.log", seed=0)
    assert list(map(len, read_studies(tmp_path / "tpe.log"))) == [1]


def test_a_restarted_search_repeats_no_trial(tmp_path):
    """With the same key it finds other random trials, and other ones at a restart."""
    file, points = tmp_path / "tpe.log", []
    for _ in range(3):
        searcher = TPE(20, file)
        state = searcher.init(SPACE, KEY)
        for index in range(4):
            alpha, state = searcher.ask(state, jax.random.fold_in(KEY, index))
            state = searcher.tell(state, alpha, value_of(alpha))
            points.append(float(alpha["rate"]))
    assert len(set(points)) == 12


def test_trials_of_another_space_are_kept_apart(tmp_path):
    """Even if it has the same axes."""
    file = tmp_path / "tpe.log"
    make_trial(file, 0)
    make_trial(file, 1, SPACE | {"rate": Interval(1e-5, 1.0, log=True)})
    assert sorted(map(len, read_studies(file))) == [1, 1]


class Scaled:
    """A user's own space from 0 to a number, which is no pytree."""

    requirement = "from 0 to high"
    unit_shape = ()

    def __init__(self, high):
        self.high = high

    def from_unit(self, t):
        return jnp.asarray(self.high * t)

    def to_unit(self, alpha):
        return alpha / self.high

    def sample(self, key):
        return self.from_unit(jax.random.uniform(key))

    def contains(self, alpha):
        return (alpha >= 0) & (alpha <= self.high)

    forward = inverse = project = is_interior = contains


def test_trials_of_another_space_of_an_own_class_are_kept_apart(tmp_path):
    """Its structure and its text are the same for all instances."""
    file = tmp_path / "tpe.log"
    for seed, high in enumerate((2.0, 3.0, 2.0)):
        make_trial(file, seed, SPACE | {"rate": Scaled(high)})
    assert sorted(map(len, read_studies(file))) == [1, 2]


def test_a_search_ignores_trials_of_another_problem(tmp_path):
    """It makes the trace that it would make with a journal of its own.

    Data, numbers that losses close over, ``w`` and the solver are part of the problem.
    Metrics are not, so that a search with others shares its trials.
    """
    inner = lambda w, alpha, batch: jnp.sum((w - alpha) ** 2)
    outer = lambda scale: lambda w, alpha, target: scale * jnp.sum((w - target) ** 2)
    search_options = lambda target=0.5, scale=1.0, **options: (
        {
            "problem": hg.Bilevel(inner, outer(scale), None, jnp.full(2, target)),
            "solver": hg.Newton(),
            "budget": 30.0,
        }
        | options
    )
    problems = {
        "first": search_options(),
        "data": search_options(target=0.1),
        "closed over": search_options(scale=-1.0),
        "w": search_options(w=jnp.ones(2)),
        "solver": search_options(solver=hg.Newton(tolerance=0.5)),
    }
    shared = TPE(3, tmp_path / "shared.log")
    for name, options in problems.items():
        alone = search(searcher=TPE(3, tmp_path / f"{name}.log"), **options)
        trace = search(searcher=shared, **options)
        np.testing.assert_array_equal(trace.value, alone.value, err_msg=name)
    num_trials = list(map(len, read_studies(shared.journal)))
    assert len(num_trials) == len(problems)
    search(
        searcher=shared, **search_options(metrics={"norm": lambda w, alpha, key: w[0]})
    )
    longer = list(map(len, read_studies(shared.journal)))
    assert sum(longer) > sum(num_trials)
    assert len(longer) == len(problems)


def test_names_of_problems_keep_trials_apart(tmp_path):
    """For those who call ``ask`` and ``tell`` themselves."""
    file, key = tmp_path / "tpe.log", jax.random.key(0)
    for problem in ("a", "b", "a"):
        searcher = TPE(5, file, problem)
        alpha, state = searcher.ask(searcher.init(SPACE, key), key)
        searcher.tell(state, alpha, value_of(alpha))
    assert sorted(map(len, read_studies(file))) == [1, 2]
    with pytest.raises(TypeError, match="problem"):
        TPE(5, file, 3)


def test_a_journal_that_cannot_be_bound_to_a_problem_is_refused():
    searcher = RecordingSearcher()
    searcher.journal = "trials.log"
    with pytest.raises(TypeError, match=r"searcher.*for_problem"):
        search(searcher=searcher)


def test_search_that_dies_while_it_writes_stops_no_other(tmp_path):
    """It is killed halfway through a line; the others continue and lose no trial."""
    file = tmp_path / "tpe.log"
    make_trial(file, 0)
    code = """
        import os, signal, sys
        from hypergrad.searchers.optuna_study import JournalLock
        JournalLock(sys.argv[1]).acquire()
        with open(sys.argv[1], "ab") as file:
            file.write(b'{"op_code":4,"worker')
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert start_python(code, file).wait() == -signal.SIGKILL
    (before,) = read_studies(file)
    make_trial(file, 1)
    make_trial(file, 2)
    (after,) = read_studies(file)
    assert after[:1] == before
    assert len(after) == 3


def test_journal_in_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="journal"):
        make_trial(tmp_path / "missing" / "tpe.log", 1)
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize(
    "content",
    [None, b"PK\xff\x00\n\x00", b'{"rate": 0.1}', b'{"rate": 1}\n{"'],
    ids=["damaged line", "binary", "no complete line", "other JSON"],
)
def test_file_that_is_no_journal_is_refused_and_kept(tmp_path, content):
    file = tmp_path / "tpe.log"
    if content is None:
        make_trial(file, 0)
        content = file.read_bytes().replace(b"{", b"[", 1)
    file.write_bytes(content)
    with pytest.raises(ValueError, match="journal"):
        make_trial(file, 1)
    assert file.read_bytes() == content


def test_journal_must_be_a_path():
    with pytest.raises(TypeError, match="journal"):
        TPE(5, 3)


def test_previous_trials_are_not_told_to_a_journal_again(tmp_path):
    file = tmp_path / "tpe.log"
    searcher = TPE(5, file)
    trials, _ = record(searcher=searcher, budget=2.0)
    content = file.read_bytes()
    with pytest.raises(ValueError, match="previous_trials"):
        search(searcher=searcher, previous_trials=trials)
    assert file.read_bytes() == content


def test_journal_loses_no_trial_of_simultaneous_searches(tmp_path):
    """Each of three threads opens the file for each of its trials."""
    file = tmp_path / "tpe.log"
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda seed: make_trial(file, seed), range(12)))
    (values,) = read_studies(file)
    assert len(values) == 12
