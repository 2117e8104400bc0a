"""The table of open problems: counts of verdicts, and when it is out of date."""

import dataclasses

import pytest

from benchmarks import questions, tables
from benchmarks.__main__ import main
from hypergrad.studies import record
from hypergrad.studies.table import Request
from hypergrad.studies.verdict import Verdict


@pytest.fixture
def one_table(tmp_path, monkeypatch):
    """A table with rows of its own, judged to order, that one problem rests on."""
    (tmp_path / "fake.jsonl").write_text(record.line({"seed": 0, "method": "m"}))
    lines = ["a: reproduced", "b: kept", "c: not reproduced", "d ties with e"]
    fake = dataclasses.replace(
        questions.TABLE,
        name="fake",
        plan=lambda scale, seeds: [{"seed": 0, "method": "m"}],
        judge=lambda rows: [Verdict(line) for line in lines],
    )
    monkeypatch.setattr(questions, "RESULTS", tmp_path)
    monkeypatch.setitem(tables.TABLES, "fake", fake)
    problem = questions.Problem("this", ("fake",), "that")
    monkeypatch.setattr(questions, "PROBLEMS", {"What is open?": problem})
    return tmp_path


def rows_of() -> list[dict]:
    return [cell | questions.measure(cell) for cell in questions.plan("small", 1)]


def test_claims_are_counted_and_lines_without_one_are_not(one_table):
    (row,) = rows_of()
    assert (row["reproduced"], row["not reproduced"], row["failed"]) == (2, 1, 0)
    (verdict,) = questions.judge([row])
    assert verdict == Verdict("1 tables, claims reproduced 2, not reproduced 1")
    text = questions.markdown(questions.TABLE, [row], "command")
    assert "| What is open? | this | `fake`: 2, 1 | that |" in text


def test_an_outcome_that_is_not_at_the_end_of_its_line_is_refused():
    """It would not be counted."""
    assert questions.outcome("a: kept") == questions.outcome("b: reproduced")
    assert questions.outcome("a: not reproduced") == "not reproduced"
    assert questions.outcome("a ties with b") is None
    with pytest.raises(ValueError, match="does not end with its outcome"):
        questions.outcome("a: reproduced; and more")


def test_rows_that_were_made_anew_fail_it(one_table):
    rows = rows_of()
    path = one_table / "fake.jsonl"
    path.write_text(path.read_text() + "\n")
    failed, _ = questions.judge(rows)
    assert failed == Verdict("fake has other rows by now; run rq5 again", failed=True)


def test_a_table_that_fails_its_own_check_fails_it(one_table):
    (one_table / "fake.jsonl").write_text(record.line({"seed": 0, "method": "other"}))
    failed, _ = questions.judge(rows_of())
    assert failed == Verdict("fake fails its own check", failed=True)


def test_the_table_and_its_figure_are_made(one_table, tmp_path):
    out = tmp_path / "out"
    questions.TABLE.run(questions.TABLE, Request("small", 1, out, "command"))
    assert (out / "rq5.png").stat().st_size > 0
    assert "`fake`: 2, 1" in (out / "rq5.md").read_text()


def test_problems_rest_on_tables_that_are_there():
    for problem in questions.PROBLEMS.values():
        assert set(problem.tables) <= set(tables.TABLES)


def test_a_question_that_one_table_answers_is_another_name_of_it(capsys):
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    for alias, name in tables.ALIASES.items():
        assert name in tables.TABLES
        assert f"{alias:12}  is {name}" in listed
        assert main([alias, "--check"]) == 0
