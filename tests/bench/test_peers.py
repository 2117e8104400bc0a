"""Contenders of `benchmarks peers`, what measures them, and what is said of rows."""

import functools
import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from benchmarks.peers import claims, harness, problems, tuning, worker
from benchmarks.peers import work as stated
from benchmarks.peers.contenders import base, gauss_newton, ours, plain, reference
from benchmarks.peers.work import WORKS
from hypergrad.runtime.compat import enable_x64

ROOT = Path(__file__).parents[2]
JAX = ("plain", "ours", "defaults", *claims.JAX)
OWN = {"inner", "base", "gauss_newton", *JAX}


def contender(name: str):
    return importlib.import_module(f"benchmarks.peers.contenders.{name}")


@functools.cache
def small(work: str):
    return WORKS[work].small()


@functools.cache
def truth(work: str) -> np.ndarray:
    return reference.WORKS[work](small(work))()


# The reference itself, by other roads than its own.


def difference(value, point: np.ndarray, direction: np.ndarray) -> float:
    """Central, along ``direction``: exact to about 1e-10 in float64."""
    h = 1e-5
    return (value(point + h * direction) - value(point - h * direction)) / (2 * h)


def along(work: str, value, point: np.ndarray) -> None:
    """Of the reference's answer and of ``value``, to 1e-6."""
    direction = np.random.default_rng(100).standard_normal(point.shape)
    found = truth(work) @ direction
    assert abs(found) > 1e-6
    assert found == pytest.approx(difference(value, point, direction), rel=1e-6)


def logistic_value(data, alpha: np.ndarray) -> float:
    """Of a run in NumPy."""
    x, x_val = data["x"].astype(float), data["x_val"].astype(float)
    w, v = np.zeros(x.shape[1]), 0.0
    for _ in range(data["steps"]):
        off = 1 / (1 + np.exp(data["y"] * (x @ w)))
        gradient = -x.T @ (data["y"] * off) / len(x) + np.exp(alpha) * w
        v = data["momentum"] * v + gradient
        w = w - data["rate"] * v
    return float(np.mean(np.logaddexp(0, -data["y_val"] * (x_val @ w))))


def test_the_reference_of_w1_is_the_difference_of_runs_in_numpy():
    """Reverse, and forward along ones."""
    data = small("w1-unrolled")
    alpha = data["alpha"].astype(float)
    along("w1-unrolled", functools.partial(logistic_value, data), alpha)
    value = lambda shift: logistic_value(data, alpha + shift)
    assert truth("w1-forward") == pytest.approx(difference(value, 0.0, 1.0), rel=1e-6)


def cleaning_value(data, alpha: np.ndarray) -> float:
    """Of the run in NumPy of `work.py`."""
    first, bias, second, last = stated.descended(data | {"alpha": alpha})
    score = np.maximum(data["x_val"].astype(float) @ first + bias, 0) @ second + last
    total = np.log(np.exp(score).sum(1))
    return float(np.mean(total - score[np.arange(len(score)), data["y_val"]]))


@pytest.mark.slow
def test_the_reference_of_w2_is_the_difference_of_runs_in_numpy():
    data = small("w2-unrolled")
    value = functools.partial(cleaning_value, data)
    along("w2-unrolled", value, data["alpha"].astype(float))


@pytest.mark.slow
def test_the_reference_of_w3_is_the_difference_of_runs_step_by_step():
    """Reverse and forward are the same derivative."""
    data = reference.wide(small("w3-1000"))
    problem = problems.schedule(data)
    gradient = jax.jit(jax.grad(problem.inner))

    def value(alpha):
        w, v = problem.w, [0.0] * 4
        for t in range(data["steps"]):
            batch = {"x": data["x"][t % len(data["x"])]}
            batch["y"] = data["y"][t % len(data["y"])]
            slopes = gradient(w, alpha, batch)
            v = [data["momentum"] * a + g for a, g in zip(v, slopes, strict=True)]
            w = [a - np.exp(alpha[0]) * b for a, b in zip(w, v, strict=True)]
        return float(problem.outer(w, alpha, problem.val))

    along("w3-1000", value, data["alpha"])
    np.testing.assert_allclose(truth("w3-forward"), truth("w3-1000"), rtol=1e-10)


@pytest.mark.slow
def test_the_reference_of_w4_is_the_difference_of_adapted_tasks():
    """Of 1e-4: a step of the difference may cross a kink of ReLU or pooling."""
    data = reference.wide(small("w4"))
    problem = problems.few_shot(data)
    flat, unravel = ravel_pytree(problem.w)
    gradient = jax.jit(jax.grad(problem.inner))
    outer = jax.jit(problem.outer)

    def value(point):
        values = []
        for task in range(len(data["y"])):
            one = functools.partial(jax.tree.map, lambda a, t=task: a[t])
            train, val = one((problem.train, problem.val))
            w = unravel(jnp.asarray(point))
            for _ in range(data["steps"]):
                slopes = gradient(w, None, train)
                w = jax.tree.map(lambda w, g: w - data["rate"] * g, w, slopes)
            values.append(float(outer(w, None, val)))
        return np.mean(values)

    point = np.asarray(flat)
    direction = np.random.default_rng(100).standard_normal(point.shape)
    direction /= np.linalg.norm(direction)
    found = truth("w4") @ direction
    assert found == pytest.approx(difference(value, point, direction), rel=1e-4)


def test_the_network_is_that_of_a_convolution_by_sums():
    """Kernel, statistics and pooling by loops in NumPy, on an odd side."""
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 5, 5, 3)), rng.standard_normal((3, 3, 3, 4))
    padded, out = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), np.zeros((2, 5, 5, 4))
    for i in range(5):
        for j in range(5):
            cell = padded[:, i : i + 3, j : j + 3]
            out[:, i, j] = np.einsum("nabc,abco->no", cell, kernel)
    np.testing.assert_allclose(problems.convolved(kernel, x), out, rtol=1e-12)
    mean, variance = out.mean((0, 1, 2)), out.var((0, 1, 2))
    scaled = (out - mean) / np.sqrt(variance + 1e-5)
    np.testing.assert_allclose(problems.normalised(out), scaled, rtol=1e-10)
    cells = [out[:, i : i + 4 : 2, j : j + 4 : 2] for i in (0, 1) for j in (0, 1)]
    np.testing.assert_array_equal(problems.pooled(jnp.asarray(out)), np.max(cells, 0))


def solved(problem: problems.Problem, products: int) -> np.ndarray:
    """The implicit hypergradient by so many products with a dense matrix, in NumPy."""
    train, val, w, alpha = problem.arrays
    flat, unravel = ravel_pytree(w)
    slope = lambda v, alpha: ravel_pytree(
        jax.grad(problem.inner)(unravel(v), alpha, train)
    )[0]
    H = np.asarray(jax.jacrev(slope)(flat, alpha))
    J = np.asarray(jax.jacrev(slope, 1)(flat, alpha))
    r = np.asarray(ravel_pytree(jax.grad(problem.outer)(w, alpha, val))[0])
    x, p = np.zeros_like(r), r
    for _ in range(products):
        length = r @ r / (p @ H @ p)
        x, after = x + length * p, r - length * H @ p
        p, r = after + (after @ after) / (r @ r) * p, after
    return -x @ J


def test_the_reference_of_a_solve_is_that_of_a_dense_matrix():
    """As many products as numbers solve exactly."""
    data = reference.wide(small("w1-solve"))
    found = solved(problems.logistic(data, solved=True), len(data["w"]))
    np.testing.assert_allclose(truth("w1-solve"), found, rtol=1e-8)


@pytest.mark.slow
def test_the_references_of_other_solves_are_those_of_dense_matrices():
    """Of one of eight losses; fewer products than numbers are those of the method."""
    data = reference.wide(small("w1-solve"))
    one = data | {"y_val": reference.wide(small("eight"))["y_val"][3]}
    found = solved(problems.logistic(one, solved=True), len(data["w"]))
    several = truth("eight").reshape(8, -1)
    np.testing.assert_allclose(several[3], found, rtol=1e-8)
    data = reference.wide(small("w2-implicit"))
    first, *others = data["w"]
    data |= {"x": data["x"][:, 300:305], "x_val": data["x_val"][:, 300:305]}
    data["w"] = [first[300:305], *others]
    found = solved(problems.cleaning(data, solved=True), data["products"])
    answer = plain.cleaning_solve(data)()
    np.testing.assert_allclose(answer, found, rtol=1e-6, atol=1e-9)


def test_the_exact_answer_is_where_long_runs_go():
    """500 steps and 20 products of 6 numbers leave nothing that differences see."""
    data = small("w1-whole")
    value = functools.partial(logistic_value, data | {"steps": 5000})
    along("w1-whole", value, data["alpha"].astype(float))


# Contenders beside it.

CASES = [(name, work) for name in JAX for work in WORKS if work in harness.offers(name)]
QUICK = {
    ("plain", "w1-solve"),
    ("ours", "w1-unrolled"),
    ("ours", "w1-whole"),
}


@pytest.mark.parametrize(
    ("name", "work"),
    [pytest.param(*c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES],
)
def test_a_contender_is_right(name: str, work: str):
    """In float32, to the error above which the table calls it wrong.

    Optimistix's L-BFGS ends where the loss falls by less than rounding, in float32
    0.03% away at this size.
    """
    setting = tuning.GRIDS[name][-1] if work == tuning.WORK else {}
    wide = (name, work) == ("optimistix_lbfgs", "w1-whole")
    given = reference.wide if wide else lambda data: data
    with enable_x64(wide):
        answer = contender(name).WORKS[work](given(small(work)), **setting)()
    if work == "w2-indefinite":
        assert np.isfinite(answer).all()
        return
    assert harness.distance(answer, truth(work)) <= WORKS[work].error


@pytest.mark.parametrize("name", sorted(OWN))
def test_what_is_offered_is_read_off_the_source(name: str):
    """Without importing a library that may not be there."""
    assert harness.offers(name) == list(contender(name).WORKS)
    assert set(harness.offers(name)) <= set(WORKS)


def test_every_contender_has_its_turn():
    """Those that are no table's are the reference and what others share."""
    names = [path.stem for path in harness.CONTENDERS.glob("*.py")]
    assert {name for name in names if harness.offers(name)} <= set(claims.ORDER)
    assert not (OWN | {"reference"}) - set(names)
    assert all("ours" in claims.contenders_of(work) for work in WORKS)
    assert set(reference.WORKS) == {w for w in WORKS if np.isfinite(WORKS[w].error)}


@pytest.mark.slow
def test_an_indefinite_hessian_is_flagged():
    """The solve meets negative curvature, and says so; Gauss-Newton's has none."""
    answers = []
    for module in (ours, gauss_newton):
        call = module.WORKS["w2-indefinite"](small("w2-indefinite"))
        answers.append(call())
        told = call.notes()
        assert told["finite"] == 1
        assert told["trusted"] == 0
        assert module is gauss_newton or told["ritz_min"] <= 0
    assert harness.distance(*answers) > 0.1  # it is another matrix


# What is left open to each.


def test_the_fastest_setting_that_is_right_on_both_seeds_is_chosen():
    of = lambda *pairs: [{"error": e, "seconds": s} for e, s in pairs]
    tries = [
        of((1e-9, 3.0), (1e-9, 3.0)),
        of((1e-3, 0.1), (1e-9, 0.1)),  # wrong on one
        of((1e-5, 2.0), (5e-5, 1.0)),
        of((1e-9, 1.0), (np.nan, 1.0)),
    ]
    assert tuning.best(tries, 5e-5) == 2
    assert tuning.best(tries[1:2], 5e-5) is None


def test_settings_are_of_the_grids():
    """Of every contender that does the work; none has more than another by hand."""
    chosen = json.loads(harness.SETTINGS.read_text())[tuning.WORK]
    free = [n for n in claims.contenders_of(tuning.WORK) if n not in harness.FREE]
    assert set(chosen) == set(tuning.GRIDS) == set(free)
    for name, setting in chosen.items():
        assert setting in tuning.GRIDS[name]


@pytest.mark.slow
def test_the_base_of_each_extra_is_the_same_work():
    """One of the losses, the core of the function; more steps are another answer."""
    one = base.WORKS["eight"](small("eight"))()
    np.testing.assert_allclose(one, truth("eight").reshape(8, -1)[0], rtol=1e-3)
    core, ready = (
        module.WORKS["dispatch"](small("dispatch"))() for module in (base, ours)
    )
    np.testing.assert_array_equal(core, ready)


# What measures them.


def test_data_come_back_as_they_were(tmp_path):
    data = small("w2-implicit")
    worker.save(tmp_path / "data.npz", data)
    there = worker.load(str(tmp_path / "data.npz"))
    assert there.keys() == data.keys()
    jax.tree.map(np.testing.assert_array_equal, there, data)
    assert isinstance(there["steps"], int)


def test_others_are_what_this_process_did_not_do(monkeypatch):
    """Three seconds of the machine's in two, one of them its own: one core."""
    clocks = {"busy": [10.0, 13.0], "process_time": [5.0, 6.0], "wall": [0.0, 2.0]}
    take = lambda name: lambda: clocks[name].pop(0)
    monkeypatch.setattr(worker, "busy", take("busy"))
    monkeypatch.setattr(worker.time, "process_time", take("process_time"))
    monkeypatch.setattr(worker.time, "perf_counter", take("wall"))
    calls = []
    took = worker.timed(lambda: calls.append(1), 4)
    assert took == {"seconds": 0.5, "others": 1.0}
    assert len(calls) == 4


def test_the_machine_is_read_and_memory_is_this_programs():
    assert worker.busy() > 0
    assert 1e6 < worker.peak() < 1e12


FAKE = """#!{python}
import json, sys, time
name, log = sys.argv[3], {log!r}
say = lambda **line: print(json.dumps(line), flush=True)
told = dict(first=1.5, peak=7, notes=dict(scratch=3, more=1), versions=dict(a="1"))
if name == "failing":
    say(failed="ImportError: no such library")
    sys.exit()
if name == "dead":
    print("first\\nout of memory", file=sys.stderr)
    sys.exit(3)
say(**told, answer=[1.0, 2.0 if name != "wrong" else 2.5])
turn = 0
for line in sys.stdin:
    with open(log, "a") as file:
        file.write(name + line)
    turn += 1
    if name == "dying" and turn == 3:
        sys.exit("enough")
    others = 0.5 if name == "busy" and turn % 2 else 0.01
    say(seconds=0.2 if turn == 1 else 0.1 * turn, others=others)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Path:
    """In place of Python: says lines by the contender's name, and logs its turns."""
    path, log = tmp_path / "python", tmp_path / "log"
    path.write_text(FAKE.format(python=sys.executable, log=str(log)))
    path.chmod(0o755)
    monkeypatch.setattr(harness, "PAUSE", 0.0)
    monkeypatch.setattr(harness, "truth_of", lambda work, data: [1.0, 2.0])
    return path


def measured(fake: Path, names: str, **options) -> list[dict]:
    contenders = dict.fromkeys(names.split(), fake)
    return harness.measure("w1-unrolled", contenders, small=True, **options)


def test_repetitions_go_in_turns(fake):
    """After one call each, as many calls as make up half a second, in the order."""
    rows = measured(fake, "a b", clean=2, rounds=9)
    turns = (fake.parent / "log").read_text().split()
    assert turns == ["a1", "b1", "a3", "b3", "a3", "b3"]
    assert [row["seconds"] for row in rows] == [pytest.approx([0.2, 0.3])] * 2
    (row, _) = rows
    assert (row["work"], row["method"]) == ("w1-unrolled", "a")
    assert (row["first"], row["peak"], row["scratch"]) == (1.5, 7, 3)
    assert row["notes"] == {"more": 1}
    assert row["library_versions"] == {"a": "1"}
    assert row["error"] == 0
    assert row["reason"] is None
    assert row["cores"] > 0


def test_a_busy_repetition_is_thrown_away_and_counted(fake):
    """All go on until each has enough; a most of rounds ends it."""
    calm, busy = measured(fake, "calm busy", clean=2, rounds=9)
    assert (len(busy["seconds"]), busy["discarded"]) == (2, 1)
    assert (len(calm["seconds"]), calm["discarded"]) == (3, 0)
    calm, busy = measured(fake, "calm busy", clean=2, rounds=2)
    assert (len(busy["seconds"]), busy["discarded"]) == (1, 1)


def test_what_fails_or_is_wrong_keeps_its_row(fake, tmp_path):
    """With the reason, untimed; the others go on. An inner run is not compared."""
    names = ["failing", "dead", "wrong", "dying", "a"]
    contenders = dict.fromkeys(names, fake) | {"absent": tmp_path / "none"}
    rows = harness.measure("w1-unrolled", contenders, small=True, clean=3, rounds=9)
    reasons = {row["method"]: row["reason"] for row in rows}
    assert reasons["failing"] == "ImportError: no such library"
    assert reasons["dead"] == "ended by exit 3: out of memory"
    assert reasons["wrong"].startswith("wrong: its error is 0.22")
    assert reasons["dying"] == "ended by exit 1: enough"
    assert reasons["absent"] == "not installed"
    assert reasons["a"] is None
    clean = {row["method"]: len(row["seconds"]) for row in rows}
    assert clean == dict.fromkeys(names, 0) | {"dying": 1, "a": 3, "absent": 0}
    assert "wrong3" not in (tmp_path / "log").read_text()
    (row,) = measured(fake, "inner", clean=1)
    assert row["error"] is None


def test_an_answer_of_another_length_is_wrong():
    assert np.isnan(harness.distance([1.0], [1.0, 2.0]))
    assert harness.distance([3.0, 4.0], [3.0, 5.0]) == pytest.approx(1 / 34**0.5)


@pytest.mark.slow
def test_real_contenders_are_measured():
    """The worker, the reference in a process of its own, scratch and versions."""
    python = dict.fromkeys(("plain", "ours", "betty"), Path(sys.executable))
    rows = harness.measure("w1-solve", python, small=True, clean=1, rounds=3)
    first, second, third = rows
    for row in (first, second):
        assert row["reason"] is None
        assert row["error"] < 1e-3
        assert row["scratch"] > 0
        assert row["peak"] > 1e8
        assert row["library_versions"]["jax"] == jax.__version__
    assert "No module named" in third["reason"]
