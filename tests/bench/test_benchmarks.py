"""The tables' machinery: plans, resuming, strict rows, and checks that can fail."""

import json
import math
import sys

import jax
import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import conformance, conformance_cases, known, setting
from benchmarks.tables import TABLES
from hypergrad.studies import STUDIES, record
from hypergrad.studies.table import Request, Table, cell_by_cell, check
from hypergrad.studies.verdict import Verdict, geometric_mean, within

# A table of squares, measured cell by cell.


def small(measured: list, seeds: int = 3) -> Table:
    def measure(cell):
        measured.append(cell["seed"])
        return {"value": cell["seed"] ** 2}

    return Table(
        name="squares",
        source="arithmetic",
        minutes=0,
        seeds=seeds,
        plan=lambda scale, seeds: [
            {"method": "square", "seed": i} for i in range(seeds)
        ],
        run=cell_by_cell(
            measure,
            lambda table, rows, command: f"{len(rows)} rows by {command}",
            lambda rows, path: path.write_bytes(b"figure"),
        ),
        judge=lambda rows: [Verdict("squares", any(r["value"] is None for r in rows))],
    )


def ask(folder, seeds=3) -> Request:
    return Request("small", seeds, folder, "the command")


def failed(verdicts) -> bool:
    return any(verdict.failed for verdict in verdicts)


def test_a_run_that_was_killed_goes_on_where_it_stopped(tmp_path, capsys):
    """A last line cut in the middle is measured again; the others are not."""
    measured = []
    table = small(measured)
    table.run(table, ask(tmp_path))
    path = tmp_path / "squares.jsonl"
    whole = path.read_text()
    path.write_text(whole[: whole.rfind('"seed": 2') + 5])
    measured.clear()
    capsys.readouterr()
    table.run(table, ask(tmp_path))
    assert measured == [2]
    lines = ["1 of 3: square, kept", "2 of 3: square, kept", "3 of 3: square"]
    assert capsys.readouterr().err.splitlines() == lines
    assert [row["value"] for row in record.read(path)] == [0, 1, 4]
    assert (tmp_path / "squares.md").read_text() == "3 rows by the command\n"
    assert not failed(check(table, tmp_path))
    measured.clear()
    table.run(table, ask(tmp_path, seeds=4))
    assert measured == [3]


def test_two_runs_of_one_table_are_refused(tmp_path):
    """The second would measure, and write, what the first is at."""
    measured = []
    table = small(measured)

    class Watched(list):
        def append(self, seed):
            with pytest.raises(ValueError, match="another process"):
                table.run(table, ask(tmp_path))
            super().append(seed)

    watched = small(Watched())
    watched.run(watched, ask(tmp_path))
    assert not measured
    assert [row["value"] for row in record.read(tmp_path / "squares.jsonl")] == [
        0,
        1,
        4,
    ]


def test_a_table_is_of_the_rows_that_were_asked_for(tmp_path):
    """Though its file holds more, of an earlier run; that stays as it is."""
    measured = []
    table = small(measured)
    table.run(table, ask(tmp_path))
    measured.clear()
    table.run(table, ask(tmp_path, seeds=1))
    assert measured == []
    assert (tmp_path / "squares.md").read_text() == "1 rows by the command\n"
    assert len(record.read(tmp_path / "squares.jsonl")) == 3


def test_rows_made_otherwise_are_not_mixed(tmp_path):
    """Another version of a package: refused when resuming, failed when checked."""
    table = small([])
    table.run(table, ask(tmp_path))
    path = tmp_path / "squares.jsonl"
    rows = record.read(path)
    rows[0]["jax"] = "0.0.1"
    path.write_text("".join(map(record.line, rows)))
    with pytest.raises(ValueError, match=r"jax 0\.0\.1"):
        table.run(table, ask(tmp_path))
    assert failed(check(table, tmp_path))


def test_missing_repeated_and_unplanned_cells_fail(tmp_path):
    """As does a file that is not there, empty, or no strict JSON."""
    table = small([])
    assert failed(check(table, tmp_path))
    table.run(table, ask(tmp_path))
    path = tmp_path / "squares.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for doctored in (
        [lines[0], lines[2]],
        [*lines, lines[1]],
        [*lines, lines[0].replace("square", "cube")],
        [*lines[:2], lines[2].replace('"value": 4', '"value": NaN')],
        [],
    ):
        path.write_text("".join(doctored))
        assert failed(check(table, tmp_path))
    path.write_text("".join(lines))
    assert not failed(check(table, tmp_path))


def test_rows_are_strict_json():
    """NaN and infinity are null; what is no number elsewhere is an error."""
    row = {"a": math.nan, "b": math.inf, "c": 1.5, "d": True, "e": None}
    assert json.loads(record.line(row)) == row | {"a": None, "b": None}
    assert json.loads(record.line({"a": [1.0, math.nan]})) == {"a": [1.0, None]}
    with pytest.raises(ValueError, match="JSON"):
        record.line({"a": {"b": math.nan}})


@pytest.mark.parametrize(
    ("values", "says", "fails"),
    [
        ([0.95, 1.0, 1.05, 1.0, 1.0], ": reproduced", False),
        ([1.35, 1.4, 1.45, 1.4, 1.4], "not reproduced", False),  # honest
        ([0.0, 2.0, 1.0, 0.5, 1.5], "wider", True),
        ([1.0, 1.0, 1.01], "too few seeds", True),
        ([1.0, 1.0, 1.0, 1.0, math.nan], "no number", True),
    ],
)
def test_a_claim_over_seeds(values, says: str, fails: bool):
    """Reproduced, honestly not, too uncertain, too few seeds, no number."""
    verdict = within("slope", values, 1.0, 0.2)
    assert says in verdict.text
    assert verdict.failed == fails


def test_the_geometric_mean_is_that_of_logarithms():
    assert geometric_mean([1.0, 4.0, 16.0]) == pytest.approx(4.0)


# Conformance.


def perfect() -> list[dict]:
    """Rows as they would be if every estimator kept its promise to the letter."""
    rows = []
    for cell in conformance_cases.plan("small", 5):
        method, value = cell["method"], cell["setting"]
        law = {
            "Penalty": lambda x: 1 / x,
            "Penalty, symmetric": lambda x: 1 / x**2,
            "CentralDifference": lambda x: x**2,
            "Implicit, Nystrom": lambda x: x,
            "Implicit, correct=1": lambda x: 1e-3 * x,
            conformance_cases.EARLY: lambda x: x,
            "Evolution": lambda x: x**-0.5,
            "PersistentEvolution": lambda x: x**-0.5,
        }.get(method, lambda x: 0.5 ** setting.count_to(0.5, math.exp(-x)))
        refused = (method, cell["problem"]) in conformance_cases.REFUSED
        row = cell | {
            "value": 1e-12 if value is None else law(value),
            "reason": "one loss only" if refused else None,
            "condition": 1.0,
            "amplification": 1.0,
            "contraction": 0.5,
            "declared": 0.1,
            "cosine": 1.0,
            "to_formula": 1e-12,
            "standard_error": 0.1,
            "trusted": method not in conformance_cases.NEVER_TRUSTED,
            "gradient_equivalents": 10.0,
            "num_hvps": 1.0,
        }
        if refused:
            row["value"] = None
        rows.append(row)
    return rows


def test_perfect_rows_pass():
    """Every line: bounds, formulas, trust, rates."""
    verdicts = conformance.judge(perfect())
    assert [verdict.text for verdict in verdicts if verdict.failed] == []
    assert sum("reproduced" in verdict.text for verdict in verdicts) == 2


DOCTORED = {
    "an exact method off by 1e-8": ("Implicit, CG", "float64", {"value": 1e-8}),
    "float32 above eps^(3/4) condition": ("Forward", "float32", {"value": 1e-4}),
    "a series above q^K": ("FixedPoint", "float64", {"value": 0.2}),
    "away from its formula": ("Implicit, Identity", "float64", {"to_formula": 1e-6}),
    "four standard errors off": ("Evolution", "float32", {"value": 0.5}),
    "an exact one untrusted": ("Implicit, LU", "float64", {"trusted": False}),
    "a blind one trusted": ("Penalty", "float64", {"trusted": True}),
    "trusted and far off": ("Reversible", "float32", {"value": 0.11}),
    "no number": ("Implicit, GMRES", "float64", {"value": None}),
    "no number but a reason": (
        *("Unrolled", "float64", {"value": None, "reason": "tired"}),
    ),
}


@pytest.mark.parametrize("what", DOCTORED)
def test_one_bad_cell_fails(what: str):
    """Each promise is judged in every cell."""
    method, dtype, change = DOCTORED[what]
    rows = perfect()
    mine = [
        row
        for row in rows
        if (row["method"], row["dtype"], row["kind"]) == (method, dtype, "error")
    ]
    mine[7].update(change)
    assert failed(conformance.judge(rows))


def test_against_the_truth_is_no_descent():
    """Where no error is declared the sign still is."""
    rows = perfect()
    for row in rows:
        if row["method"] == "Penalty":
            row["declared"] = None
    assert not failed(conformance.judge(rows))
    next(row for row in rows if row["method"] == "Penalty")["cosine"] = -0.1
    assert failed(conformance.judge(rows))


@pytest.mark.parametrize(
    "method",
    sorted(
        {method for method, *_ in conformance_cases.RATES} - {conformance_cases.EARLY}
    ),
)
def test_a_wrong_rate_fails(method: str):
    """The last setting's error a hundredfold; for random ones it is not reproduced."""
    rows = perfect()
    for row in rows:
        values = {m: v for m, _, v in conformance_cases.RATES}[method]
        if row["method"] == method and row["setting"] == values[-1]:
            row["value"] *= 100
    verdicts = conformance.judge(rows)
    random = conformance_cases.METHODS[method].random
    honest = any(": not reproduced" in verdict.text for verdict in verdicts)
    assert failed(verdicts) != random
    assert honest == random


def test_the_report_marks_what_failed():
    """Cells are float64 / float32, the worst structure; - where none applies."""
    rows = perfect()
    rows[0]["value"] = 0.5
    text = conformance.markdown(conformance.TABLE, rows, "the command")
    first, *_ = (line for line in text.splitlines() if line.startswith("| Implicit, "))
    assert "| 5e-01 / 1e-12 |" in first
    (reversible,) = (x for x in text.splitlines() if x.startswith("| Reversible"))
    assert reversible.count("| - |") == 1
    assert "- **FAILED** Implicit, CG, float64" in text


@pytest.mark.parametrize("dtype", conformance_cases.DTYPES)
def test_a_cell_is_measured_in_its_precision(dtype: str):
    """Identity on scalar ridge: its own closed-form bias, and not the truth."""
    at = ("ridge", "scalar")
    row = conformance.measure(
        conformance_cases.cell("error", "Implicit, Identity", at, dtype)
    )
    known_ = known.any_known("ridge scalar")
    data, alpha = known_.problem.outer_data, known_.alpha
    w = np.asarray(known_.best(alpha))
    b = np.asarray(data["x"].T @ (data["x"] @ w - data["y"])) / len(data["y"])
    biased, exact = -np.exp(alpha) * w @ b, known_.exact(alpha)
    expected = float(abs(biased / exact - 1))
    rounding = row["condition"] * float(np.finfo(dtype).eps) ** 0.75
    assert row["value"] == pytest.approx(expected, abs=rounding)
    assert 0 <= row["to_formula"] < rounding < 1e-3
    assert not row["trusted"]
    assert row["num_hvps"] >= 1
    assert row["truth"] == "closed form"


def test_the_sensitivity_of_the_quadratic():
    """By NumPy: h = k a + C'H^-1 (w - t), so that dh/dw = C'H^-1."""
    with jax.enable_x64(True):
        known_ = known.quadratic("30", seed=3)
        at = known.dense(known_.problem, known_.w, known_.alpha)
        amplification, condition = setting.sensitivity(known_, at)
    data = jax.tree.map(np.asarray, known_.problem.inner_data)
    H, C, alpha = data["H"], data["C"], np.asarray(known_.alpha)
    v = np.linalg.solve(H, np.linalg.solve(H, C @ alpha) - data["t"])
    h = np.linalg.norm(data["k"] * alpha + C.T @ v)
    amplified = np.linalg.norm(C, 2) * np.linalg.norm(v) / h
    assert amplification == pytest.approx(amplified, rel=1e-9)
    moved = np.linalg.norm(C.T @ np.linalg.inv(H), 2) * np.linalg.norm(C @ alpha) / h
    assert condition == pytest.approx(10 * amplified + moved, rel=1e-9)


@pytest.mark.parametrize(
    "kind", ["scalar", pytest.param("tree", marks=pytest.mark.slow)]
)
def test_the_network_has_a_strict_minimum(kind: str):
    """Positive curvature; hypergradient against central differences of the value."""
    known_ = known.mlp(kind)
    assert np.linalg.eigvalsh(known_.hessian)[0] > 0
    value = lambda alpha: known.mlp_outer(
        known_.best(alpha), None, known_.problem.outer_data
    )
    found = known_.exact(known_.alpha)
    assert known.error(found, known.central(value, known_.alpha, 1e-2)) < 1e-6


# The command.


def test_the_list_names_every_table(capsys):
    """Name, minutes and source."""
    assert command.main(["list"]) == 0
    printed = capsys.readouterr().out
    for name, table in TABLES.items():
        assert name == table.name
        assert any(
            line.startswith(name) and f"{table.minutes} min" in line
            for line in printed.splitlines()
        )
        assert table.source in printed


@pytest.mark.parametrize("name", TABLES)
def test_the_committed_rows_pass_their_check(name: str, capsys):
    """And the committed report says what the check says."""
    assert command.main([name, "--check"]) == 0
    assert "FAILED" not in capsys.readouterr().out
    report = (command.RESULTS / f"{name}.md").read_text()
    for verdict in check(TABLES[name], command.RESULTS):
        assert f"- {verdict.text}\n" in report


@pytest.mark.parametrize("name", STUDIES)
def test_the_minutes_of_a_study_are_those_of_its_rows(name: str):
    """Tuning, of which rows hold no seconds, and idle machines have some room."""
    rows = record.read(command.RESULTS / f"{name}.jsonl")
    compiled = {row["method"]: row.get("compile_seconds") or 0 for row in rows}
    seconds = sum(row.get("run_seconds") or 0 for row in rows) + sum(compiled.values())
    own = seconds / 60
    assert own / 3 <= STUDIES[name].minutes <= 2 * own + 1.5


def test_a_check_of_nothing_fails(tmp_path, capsys):
    """With the command that would write what is missing."""
    assert command.main(["conformance", "--check", str(tmp_path)]) == 1
    assert "python -m benchmarks conformance" in capsys.readouterr().out


@pytest.mark.parametrize("row", ["baseline", "implicit"])
def test_a_study_with_a_missing_row_fails(row: str, tmp_path, capsys):
    """Hyper-cleaning, from its committed rows."""
    kept = [
        line
        for line in (command.RESULTS / "cleaning.jsonl").read_text().splitlines()
        if not (f'"method": "{row}"' in line and '"seed": 3,' in line)
    ]
    (tmp_path / "cleaning.jsonl").write_text("\n".join(kept) + "\n")
    assert command.main(["cleaning", "--check", str(tmp_path)]) == 1
    assert f"missing: ('{row}', 3)" in capsys.readouterr().out


def test_a_study_of_few_seeds_fails(tmp_path, capsys):
    """Four of ten."""
    kept = [
        row
        for row in record.read(command.RESULTS / "cleaning.jsonl")
        if row["seed"] < 4
    ]
    (tmp_path / "cleaning.jsonl").write_text("".join(map(record.line, kept)))
    assert command.main(["cleaning", "--check", str(tmp_path)]) == 1
    assert "too few seeds" in capsys.readouterr().out


def test_bad_arguments_are_refused(capsys):
    """By name, without a traceback."""
    for arguments in (["nothing"], ["cleaning", "--seeds", "0"]):
        with pytest.raises(SystemExit):
            command.main(arguments)
    with pytest.raises(SystemExit):
        command.main(["conformance", "--scale", "paper"])
    assert "has no scale 'paper'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rich", "cmaes"])
def test_a_missing_extra_is_named(name, monkeypatch, capsys):
    """With the command that installs it."""
    monkeypatch.setitem(sys.modules, name, None)
    assert command.main(["list"]) == 1
    said = capsys.readouterr().err
    assert f"no {name}; " in said
    assert "pip install '.[benchmarks]'" in said
