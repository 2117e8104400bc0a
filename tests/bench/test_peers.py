"""Tests of the contenders of `peer_speed` and of the harness that measures them."""

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
from benchmarks.peers import work as works
from benchmarks.peers.contenders import base, gauss_newton, ours, plain, reference
from benchmarks.peers.work import WORKS
from hypergrad.runtime.compat import enable_x64

JAX = ("plain", "ours", "defaults", *claims.JAX)
IMPORTABLE = {"inner", "base", "gauss_newton", *JAX}


def contender(name: str):
    return importlib.import_module(f"benchmarks.peers.contenders.{name}")


@functools.cache
def small(work: str):
    return WORKS[work].small()


@functools.cache
def expected_result(work: str) -> np.ndarray:
    return reference.WORKS[work](small(work))()


# The reference, by other methods than its own.


def difference(value, point: np.ndarray, direction: np.ndarray) -> float:
    """Returns a central difference along ``direction``, exact to about 1e-10."""
    h = 1e-5
    return (value(point + h * direction) - value(point - h * direction)) / (2 * h)


def check_derivative(work: str, value, point: np.ndarray) -> None:
    """Compares the reference with a difference of ``value``, to 1e-6."""
    direction = np.random.default_rng(100).standard_normal(point.shape)
    derivative = expected_result(work) @ direction
    assert abs(derivative) > 1e-6
    assert derivative == pytest.approx(difference(value, point, direction), rel=1e-6)


def logistic_value(data, alpha: np.ndarray) -> float:
    """Returns the outer loss after a run in NumPy."""
    x, x_val = data["x"].astype(float), data["x_val"].astype(float)
    w, v = np.zeros(x.shape[1]), 0.0
    for _ in range(data["steps"]):
        p = 1 / (1 + np.exp(data["y"] * (x @ w)))
        gradient = -x.T @ (data["y"] * p) / len(x) + np.exp(alpha) * w
        v = data["momentum"] * v + gradient
        w = w - data["rate"] * v
    return float(np.mean(np.logaddexp(0, -data["y_val"] * (x_val @ w))))


def test_the_reference_of_w1_is_the_difference_of_runs_in_numpy():
    """Reverse mode, and forward mode along ones."""
    data = small("w1-unrolled")
    alpha = data["alpha"].astype(float)
    check_derivative("w1-unrolled", functools.partial(logistic_value, data), alpha)
    value = lambda shift: logistic_value(data, alpha + shift)
    assert expected_result("w1-forward") == pytest.approx(
        difference(value, 0.0, 1.0), rel=1e-6
    )


def cleaning_value(data, alpha: np.ndarray) -> float:
    """Returns the outer loss after the run in NumPy of `work.py`."""
    weights, biases, last_weights, last_biases = works.final_parameters(
        data | {"alpha": alpha}
    )
    hidden = np.maximum(data["x_val"].astype(float) @ weights + biases, 0)
    scores = hidden @ last_weights + last_biases
    label_scores = scores[np.arange(len(scores)), data["y_val"]]
    return float(np.mean(np.log(np.exp(scores).sum(1)) - label_scores))


@pytest.mark.slow
def test_the_reference_of_w2_is_the_difference_of_runs_in_numpy():
    data = small("w2-unrolled")
    value = functools.partial(cleaning_value, data)
    check_derivative("w2-unrolled", value, data["alpha"].astype(float))


@pytest.mark.slow
def test_the_reference_of_w3_is_the_difference_of_runs_step_by_step():
    """Reverse and forward are the same derivative."""
    data = reference.as_float64(small("w3-1000"))
    problem = problems.schedule(data)
    gradient = jax.jit(jax.grad(problem.inner))

    def value(alpha):
        w, v = problem.w, [0.0] * 4
        for t in range(data["steps"]):
            batch = {"x": data["x"][t % len(data["x"])]}
            batch["y"] = data["y"][t % len(data["y"])]
            grads = gradient(w, alpha, batch)
            v = [data["momentum"] * a + g for a, g in zip(v, grads, strict=True)]
            w = [a - np.exp(alpha[0]) * b for a, b in zip(w, v, strict=True)]
        return float(problem.outer(w, alpha, problem.val))

    check_derivative("w3-1000", value, data["alpha"])
    np.testing.assert_allclose(
        expected_result("w3-forward"), expected_result("w3-1000"), rtol=1e-10
    )


@pytest.mark.slow
def test_the_reference_of_w4_is_the_difference_of_adapted_tasks():
    """The tolerance is 1e-4, as the difference may cross a kink of ReLU or pooling."""
    data = reference.as_float64(small("w4"))
    problem = problems.few_shot(data)
    flat, unravel = ravel_pytree(problem.w)
    gradient = jax.jit(jax.grad(problem.inner))
    outer = jax.jit(problem.outer)

    def value(point):
        values = []
        for task in range(len(data["y"])):
            data_of_task = lambda a, t=task: a[t]
            train, val = jax.tree.map(data_of_task, (problem.train, problem.val))
            w = unravel(jnp.asarray(point))
            for _ in range(data["steps"]):
                grads = gradient(w, None, train)
                w = jax.tree.map(lambda w, g: w - data["rate"] * g, w, grads)
            values.append(float(outer(w, None, val)))
        return np.mean(values)

    point = np.asarray(flat)
    direction = np.random.default_rng(100).standard_normal(point.shape)
    direction /= np.linalg.norm(direction)
    derivative = expected_result("w4") @ direction
    assert derivative == pytest.approx(difference(value, point, direction), rel=1e-4)


def test_the_network_is_that_of_a_convolution_by_sums():
    """Kernel, statistics and pooling by loops in NumPy, on an odd side."""
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 5, 5, 3)), rng.standard_normal((3, 3, 3, 4))
    padded, out = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), np.zeros((2, 5, 5, 4))
    for i in range(5):
        for j in range(5):
            cell = padded[:, i : i + 3, j : j + 3]
            out[:, i, j] = np.einsum("nabc,abco->no", cell, kernel)
    np.testing.assert_allclose(problems.convolution(kernel, x), out, rtol=1e-12)
    mean, variance = out.mean((0, 1, 2)), out.var((0, 1, 2))
    scaled = (out - mean) / np.sqrt(variance + 1e-5)
    np.testing.assert_allclose(problems.batch_norm(out), scaled, rtol=1e-10)
    cells = [out[:, i : i + 4 : 2, j : j + 4 : 2] for i in (0, 1) for j in (0, 1)]
    np.testing.assert_array_equal(problems.max_pool(jnp.asarray(out)), np.max(cells, 0))


def dense_hypergradient(problem: problems.Problem, num_products: int) -> np.ndarray:
    """Returns the implicit hypergradient by products with a dense matrix, in NumPy."""
    train, val, w, alpha = problem.arrays
    flat, unravel = ravel_pytree(w)
    inner_grad = lambda v, alpha: ravel_pytree(
        jax.grad(problem.inner)(unravel(v), alpha, train)
    )[0]
    H = np.asarray(jax.jacrev(inner_grad)(flat, alpha))
    J = np.asarray(jax.jacrev(inner_grad, 1)(flat, alpha))
    r = np.asarray(ravel_pytree(jax.grad(problem.outer)(w, alpha, val))[0])
    x, p = np.zeros_like(r), r
    for _ in range(num_products):
        step_size = r @ r / (p @ H @ p)
        x, new_r = x + step_size * p, r - step_size * H @ p
        p, r = new_r + (new_r @ new_r) / (r @ r) * p, new_r
    return -x @ J


def test_the_reference_of_a_solve_is_that_of_a_dense_matrix():
    """As many products as parameters solve the system exactly."""
    data = reference.as_float64(small("w1-solve"))
    expected = dense_hypergradient(
        problems.logistic(data, at_solution=True), len(data["w"])
    )
    np.testing.assert_allclose(expected_result("w1-solve"), expected, rtol=1e-8)


@pytest.mark.slow
def test_the_references_of_other_solves_are_those_of_dense_matrices():
    """One of eight losses, and as many products as the method makes."""
    data = reference.as_float64(small("w1-solve"))
    single = data | {"y_val": reference.as_float64(small("eight"))["y_val"][3]}
    expected = dense_hypergradient(
        problems.logistic(single, at_solution=True), len(data["w"])
    )
    several = expected_result("eight").reshape(8, -1)
    np.testing.assert_allclose(several[3], expected, rtol=1e-8)
    data = reference.as_float64(small("w2-implicit"))
    weights, *biases_and_last = data["w"]
    data |= {"x": data["x"][:, 300:305], "x_val": data["x_val"][:, 300:305]}
    data["w"] = [weights[300:305], *biases_and_last]
    expected = dense_hypergradient(
        problems.cleaning(data, at_solution=True), data["products"]
    )
    answer = plain.cleaning_solve(data)()
    np.testing.assert_allclose(answer, expected, rtol=1e-6, atol=1e-9)


def test_the_exact_answer_is_where_long_runs_go():
    """The error after 500 steps and 20 products is below that of a difference."""
    data = small("w1-whole")
    value = functools.partial(logistic_value, data | {"steps": 5000})
    check_derivative("w1-whole", value, data["alpha"].astype(float))


# Contenders.

CASES = [
    (name, work)
    for name in JAX
    for work in WORKS
    if work in harness.offered_works(name)
]
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
    """The error in float32 is at most the one that the table allows.

    Optimistix's L-BFGS stops where the loss falls by less than rounding, which in
    float32 is an error of 0.03% at this size.
    """
    options = tuning.GRIDS[name][-1] if work == tuning.WORK else {}
    needs_x64 = (name, work) == ("optimistix_lbfgs", "w1-whole")
    convert = reference.as_float64 if needs_x64 else lambda data: data
    with enable_x64(needs_x64):
        answer = contender(name).WORKS[work](convert(small(work)), **options)()
    if work == "w2-indefinite":
        assert np.isfinite(answer).all()
        return
    assert harness.relative_error(answer, expected_result(work)) <= WORKS[work].error


@pytest.mark.parametrize("name", sorted(IMPORTABLE))
def test_the_works_of_a_contender_are_read_from_its_source(name: str):
    """No library is imported, as it may not be installed."""
    assert harness.offered_works(name) == list(contender(name).WORKS)
    assert set(harness.offered_works(name)) <= set(WORKS)


def test_every_contender_has_its_turn():
    """The other modules are the reference and those that several contenders import."""
    names = [path.stem for path in harness.CONTENDERS.glob("*.py")]
    assert {name for name in names if harness.offered_works(name)} <= set(claims.ORDER)
    assert not (IMPORTABLE | {"reference"}) - set(names)
    assert all("ours" in claims.contenders_of(work) for work in WORKS)
    assert set(reference.WORKS) == {w for w in WORKS if np.isfinite(WORKS[w].error)}


@pytest.mark.slow
def test_an_indefinite_hessian_is_flagged():
    """The solve reports negative curvature, and that of Gauss-Newton reports none."""
    answers = []
    for module in (ours, gauss_newton):
        call = module.WORKS["w2-indefinite"](small("w2-indefinite"))
        answers.append(call())
        notes = call.notes()
        assert notes["finite"] == 1
        assert notes["trusted"] == 0
        assert module is gauss_newton or notes["ritz_min"] <= 0
    assert harness.relative_error(*answers) > 0.1  # it is another matrix


# Tuning.


def test_the_fastest_options_that_are_accurate_on_both_seeds_are_chosen():
    trials_of = lambda *pairs: [{"error": e, "seconds": s} for e, s in pairs]
    trials = [
        trials_of((1e-9, 3.0), (1e-9, 3.0)),
        trials_of((1e-3, 0.1), (1e-9, 0.1)),  # wrong on one
        trials_of((1e-5, 2.0), (5e-5, 1.0)),
        trials_of((1e-9, 1.0), (np.nan, 1.0)),
    ]
    assert tuning.fastest_valid(trials, 5e-5) == 2
    assert tuning.fastest_valid(trials[1:2], 5e-5) is None


def test_the_options_are_of_the_grids():
    """Every contender that offers the work has options, and all come from its grid."""
    chosen = json.loads(harness.OPTIONS_FILE.read_text())[tuning.WORK]
    contenders = set(claims.contenders_of(tuning.WORK)) - set(harness.UNCOMPARED)
    assert set(chosen) == set(tuning.GRIDS) == contenders
    for name, options in chosen.items():
        assert options in tuning.GRIDS[name]


@pytest.mark.slow
def test_the_base_of_each_extra_is_the_same_work():
    """One of the losses, and the core of the function; more steps are not compared."""
    single = base.WORKS["eight"](small("eight"))()
    np.testing.assert_allclose(
        single, expected_result("eight").reshape(8, -1)[0], rtol=1e-3
    )
    core, ready = (
        module.WORKS["dispatch"](small("dispatch"))() for module in (base, ours)
    )
    np.testing.assert_array_equal(core, ready)


# The worker and the harness.


def test_data_is_saved_and_loaded(tmp_path):
    data = small("w2-implicit")
    worker.save(tmp_path / "data.npz", data)
    loaded = worker.load(str(tmp_path / "data.npz"))
    assert loaded.keys() == data.keys()
    jax.tree.map(np.testing.assert_array_equal, loaded, data)
    assert isinstance(loaded["steps"], int)


def test_the_load_by_others_leaves_out_this_process(monkeypatch):
    """Three busy seconds in two, one of them of this process, are one core."""
    clocks = {"busy": [10.0, 13.0], "process_time": [5.0, 6.0], "wall": [0.0, 2.0]}
    take = lambda name: lambda: clocks[name].pop(0)
    monkeypatch.setattr(worker, "busy_seconds", take("busy"))
    monkeypatch.setattr(worker.time, "process_time", take("process_time"))
    monkeypatch.setattr(worker.time, "perf_counter", take("wall"))
    calls = []
    timing = worker.time_calls(lambda: calls.append(1), 4)
    assert timing == {"seconds": 0.5, "others": 1.0}
    assert len(calls) == 4


def test_busy_time_and_memory_are_read():
    assert worker.busy_seconds() > 0
    assert 1e6 < worker.peak_memory() < 1e12


FAKE = """#!{python}
import json, sys, time
name, log = sys.argv[3], {log!r}
write_line = lambda **line: print(json.dumps(line), flush=True)
notes, versions = dict(scratch=3, more=1), dict(a="1")
first_line = dict(first=1.5, peak=7, notes=notes, versions=versions)
if name == "failing":
    write_line(failed="ImportError: no such library")
    sys.exit()
if name == "dead":
    print("first\\nout of memory", file=sys.stderr)
    sys.exit(3)
write_line(**first_line, answer=[1.0, 2.0 if name != "wrong" else 2.5])
turn = 0
for line in sys.stdin:
    with open(log, "a") as file:
        file.write(name + line)
    turn += 1
    if name == "dying" and turn == 3:
        sys.exit("enough")
    others = 0.5 if name == "busy" and turn % 2 else 0.01
    write_line(seconds=0.2 if turn == 1 else 0.1 * turn, others=others)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Path:
    """A program in place of Python, which writes lines and logs its turns."""
    path, log = tmp_path / "python", tmp_path / "log"
    path.write_text(FAKE.format(python=sys.executable, log=str(log)))
    path.chmod(0o755)
    monkeypatch.setattr(harness, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(harness, "reference_result", lambda work, data: [1.0, 2.0])
    return path


def measure(fake: Path, names: str, **options) -> list[dict]:
    contenders = dict.fromkeys(names.split(), fake)
    return harness.measure("w1-unrolled", contenders, small=True, **options)


def test_repetitions_go_in_turns(fake):
    """After one call of each come as many calls as take half a second, in order."""
    rows = measure(fake, "a b", num_clean=2, max_rounds=9)
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


def test_a_repetition_while_others_are_busy_is_discarded_and_counted(fake):
    """All continue until each has enough, up to the maximum of rounds."""
    calm, busy = measure(fake, "calm busy", num_clean=2, max_rounds=9)
    assert (len(busy["seconds"]), busy["discarded"]) == (2, 1)
    assert (len(calm["seconds"]), calm["discarded"]) == (3, 0)
    calm, busy = measure(fake, "calm busy", num_clean=2, max_rounds=2)
    assert (len(busy["seconds"]), busy["discarded"]) == (1, 1)


def test_a_contender_that_fails_or_is_wrong_keeps_its_row(fake, tmp_path):
    """The row states the reason, the others continue; inner runs are not compared."""
    names = ["failing", "dead", "wrong", "dying", "a"]
    contenders = dict.fromkeys(names, fake) | {"absent": tmp_path / "none"}
    rows = harness.measure(
        "w1-unrolled", contenders, small=True, num_clean=3, max_rounds=9
    )
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
    (row,) = measure(fake, "inner", num_clean=1)
    assert row["error"] is None


def test_a_result_of_another_length_is_wrong():
    assert np.isnan(harness.relative_error([1.0], [1.0, 2.0]))
    assert harness.relative_error([3.0, 4.0], [3.0, 5.0]) == pytest.approx(1 / 34**0.5)


@pytest.mark.slow
def test_real_contenders_are_measured():
    """Tests the worker, the process of the reference, scratch memory and versions."""
    python = dict.fromkeys(("plain", "ours", "betty"), Path(sys.executable))
    rows = harness.measure("w1-solve", python, small=True, num_clean=1, max_rounds=3)
    *installed, missing = rows
    for row in installed:
        assert row["reason"] is None
        assert row["error"] < 1e-3
        assert row["scratch"] > 0
        assert row["peak"] > 1e8
        assert row["library_versions"]["jax"] == jax.__version__
    assert "No module named" in missing["reason"]
