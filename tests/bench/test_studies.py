"""The main job: its split, its scores, its verdicts, its budget, its command."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import hypergrad as hg
from hypergrad import datasets as datasets
from hypergrad.studies import cleaning as study
from hypergrad.studies.program import program
from hypergrad.studies.progress import progress
from hypergrad.studies.study import Column, markdown, tune_and_run
from hypergrad.studies.verdict import Claim, paired, within

DIGITS = jax.tree.map(jnp.asarray, datasets.load("digits"))


def test_the_paired_interval_is_students():
    """Against scipy's interval of the mean difference."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 10))
    mean, low, high = paired(first, second)
    difference = first - second
    expected = scipy.stats.ttest_1samp(difference, 0).confidence_interval(0.95)
    np.testing.assert_allclose((low, high), (expected.low, expected.high), rtol=1e-12)
    assert mean == pytest.approx(difference.mean())


def rows_of(**columns: list[float]) -> list[dict]:
    """Rows of methods by seeds, in no order."""
    rows = [
        {"method": method, "seed": seed, "x": x, "data": "none"}
        for method, values in columns.items()
        for seed, x in enumerate(values)
    ]
    return rows[::-1]


TWO_POINTS = Claim("new", "base", "x", least=2.0, scale=100, unit="points")
DOUBLE = Claim("new", "base", "x", least=2.0, ratio=True, lower=True)


@pytest.mark.parametrize(
    ("claim", "gains", "says", "fails"),
    [
        (TWO_POINTS, [2.5, 2.6, 2.4, 2.5, 2.5], "+2.5 points [+2.4, +2.6]", False),
        (TWO_POINTS, [2.5, 2.6, 2.4, 2.5, 2.5], "claimed: reproduced", False),
        (TWO_POINTS, [1.5, 1.6, 1.4, 1.5, 1.5], "not reproduced", False),
        (TWO_POINTS, [-9.0, 9.0, 9.0, -9.0, 9.0], "wider than the effect", True),
        (TWO_POINTS, [2.5, 2.6, 2.4], "too few seeds", True),
        (TWO_POINTS, [2.5, 2.6, 2.4, 2.5, np.nan], "no number", True),
        (TWO_POINTS._replace(least=0.0), [9, 9, 9, -9, -9], "not reproduced", False),
        (TWO_POINTS._replace(least=0.0), [1, 1.1, 1, 1, 1], ": reproduced", False),
        (TWO_POINTS._replace(least=None), [1, 1.1, 1, 1, 1], "new beats base", False),
        (TWO_POINTS._replace(least=None), [-1, -1.1, -1, -1, -1], "loses", False),
        (TWO_POINTS._replace(least=None), [1, -1, 1, -1, 0], "ties", False),
        (TWO_POINTS._replace(lower=True), [-3, -3, -3, -3, -3], "+3.0 points", False),
    ],
)
def test_a_claim_is_judged_pair_by_pair(claim, gains, says: str, fails: bool):
    """Above its least, surely above none, and never on too little."""
    base = np.linspace(0.2, 0.8, len(gains))
    rows = rows_of(base=base, new=base + np.asarray(gains) / 100)
    verdict = claim.judge(rows)
    assert says in verdict.text
    assert verdict.failed == fails


@pytest.mark.parametrize("least", [None, 2.0])
def test_one_seed_tells_the_difference_alone(least):
    """No interval, no winner."""
    claim = TWO_POINTS._replace(least=least)
    text = claim.judge(rows_of(base=[0.5], new=[0.53])).text
    assert text.startswith("new against base: +3.0 points")
    assert "inf" not in text
    assert "one seed" in text or "too few seeds" in text
    text = within("x", [0.5], 0.5, 0.1).text
    assert text.startswith("x: 0.5 over 1 seed, 0.5 ± 0.1 claimed: too few seeds")


@pytest.mark.parametrize(
    ("factor", "says"), [(2.5, ": reproduced"), (1.5, "not reproduced")]
)
def test_a_ratio_is_judged_by_its_logarithm(factor: float, says: str):
    """Geometric mean; the smaller value is the better one."""
    base = np.linspace(1.0, 9.0, 5)
    wobble = np.array([1.0, 1.1, 1 / 1.1, 1.05, 1 / 1.05])
    verdict = DOUBLE.judge(rows_of(base=base, new=base / factor * wobble))
    assert f"{factor:.3g} times [" in verdict.text
    assert verdict.text.endswith(says)


def test_the_rule_of_tuning():
    """Best selection, the first among its equals; NaN is worst; costs beside it."""
    seen = []

    def run(setting, hold_out):
        seen.append((setting, hold_out))
        second = {1: 0.0, 2: 0.5, 3: 0.5, 4: 9.0}[setting]
        first = np.nan if setting == 4 else min(setting, 2) / 2
        return {"selection": (first, second), "gradient_equivalents": 10.0 * setting}

    row = tune_and_run(run, (1, 2, 3, 4))
    assert seen == [(1, True), (2, True), (3, True), (4, True), (2, False)]
    assert row == {"setting": 2, "gradient_equivalents": 20.0, "tuning_cost": 100.0}
    seen.clear()
    assert "tuning_cost" not in tune_and_run(run, (3,))
    assert seen == [(3, False)]


def test_a_column_shows_mean_and_deviation():
    """A dash where no row has a number; the largest where asked for."""
    rows = [{"x": 1.0}, {"x": 3.0}, {"x": 5.0}]
    assert Column("x", "x").cell(rows) == "3.0 ± 2.0"
    assert Column("x", "x", "{:.0f}", scale=10, largest=True).cell(rows) == "50"
    assert Column("y", "y").cell(rows) == "-"
    assert Column("x", "x").cell(rows[:1]) == "1.0"
    assert Column("x", "x", "{:.0f}").cell(rows[:1]) == "1"


def test_a_table_of_some_methods_shows_their_lines_only():
    """Those of claims whose two methods are there."""
    rows = [
        {"method": method, "seed": 0, "test_accuracy": 0.9, "data": "digits"}
        for method in ("baseline", "implicit")
    ]
    text = markdown(study.STUDY, rows, "the command")
    assert "| implicit | 90.0 |" in text
    assert "±" not in text
    assert "implicit against baseline" in text
    assert "neumann" not in text
    assert "the command" in text


@pytest.mark.slow
def test_every_row_keeps_the_budget_and_the_best_penalty_is_chosen():
    """The curve of a hypergradient row ends below 3,000 but would not fit one more."""
    implicit = study.row("implicit", 0)
    assert 2000 < implicit["gradient_equivalents"] <= study.BUDGET
    assert implicit["curve_cost"][-1] == implicit["gradient_equivalents"]
    assert sum(implicit["wrong_weights"]) + sum(implicit["clean_weights"]) == 1000
    scores = {}
    measure = program(study.evaluate, "baseline")
    for penalty in study.PENALTIES:
        lane = (jax.random.key(0), jnp.float32(penalty), jnp.asarray(True))
        learned = study.learn("baseline", DIGITS, lane)
        measured = measure(DIGITS, lane, learned["batch"], learned["alpha"])
        scores[penalty] = tuple(measured["selection"].tolist())
    chosen = study.row("baseline", 0)["setting"]
    assert chosen == max(scores, key=scores.__getitem__)


@pytest.mark.slow
def test_the_planned_cost_of_a_step_is_an_upper_bound():
    """Compares `gradient_method` with the counted cost of one step."""
    lane = (jax.random.key(0), jnp.asarray(1e-3), jnp.asarray(False))
    for method, most in (("neumann", 111), ("unrolled", 202)):
        cost = jax.jit(functools.partial(study.learn, method))(DIGITS, lane)[
            "trace"
        ].cost
        assert np.diff(cost, prepend=0.0).max() <= most
        assert cost[-1] <= study.BUDGET
    assert np.diff(study.row("implicit", 0)["curve_cost"], prepend=0.0).max() <= 93


def run_command(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hypergrad.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_command_writes_rows_table_and_figure(tmp_path):
    """One seed, two methods: the others are left out; run again, it resumes."""
    out = tmp_path / "out"
    asked = ("run", "cleaning", "--seeds", "1", "--out", str(out), "--methods")
    done = run_command(*asked, "baseline", "implicit")
    assert done.returncode == 0, done.stderr
    first = (out / "cleaning.jsonl").read_text()
    methods = [json.loads(line)["method"] for line in first.splitlines()]
    assert methods == ["baseline", "implicit"]
    assert f"--out {out}" in (out / "cleaning.md").read_text()
    assert (out / "cleaning.png").read_bytes().startswith(b"\x89PNG")
    assert run_command(*asked, "baseline", "oracle").returncode == 0
    both = (out / "cleaning.jsonl").read_text()
    assert both.startswith(first)
    assert len(both.splitlines()) == 3


@pytest.mark.parametrize(("total", "said"), [(25, 10), (10, 10), (3, 3), (1, 1)])
def test_a_log_has_a_line_at_each_tenth(total, said, capsys):
    """Where no terminal draws a bar; the last says that all is done."""
    with progress(total) as tick:
        for i in range(total):
            tick(f"row [{i}]")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == said
    assert lines[-1] == f"{total} of {total}: row [{total - 1}]"


def test_the_command_tells_its_version():
    """That of the package."""
    assert run_command("--version").stdout == f"hypergrad {hg.__version__}\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--seeds", "0"), "--seeds"),
        (("--methods", "magic"), "--methods"),
        (("--out", __file__), "--out"),
    ],
)
def test_the_command_refuses_what_it_cannot_run(arguments, says: str):
    """With a message, not a traceback."""
    done = run_command("run", "cleaning", *arguments)
    assert done.returncode != 0
    assert says in done.stderr
    assert "Traceback" not in done.stderr
