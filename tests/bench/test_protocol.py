"""Rows that do not follow their table's protocol, or whose runs ended in failure."""

import dataclasses

import numpy as np
import pytest

from hypergrad.bench import (
    Claim,
    Comparison,
    Finding,
    MethodError,
    Published,
    Table,
    check,
    pages,
    report,
)
from hypergrad.bench.claims import evaluate_claims
from hypergrad.bench.rows import append_row, select
from hypergrad.bench.tuning import choose_setting, tuning_fields
from hypergrad.trace import STATUS_MESSAGES
from tests.bench.toy_table import empty_table

NOISE = (0.01, -0.01, 0.005, -0.005, 0.002)
FAILED_CODES = (1, 2, 3, 4, 7)
COMMON = {
    "scale": "small", "device": "cpu", "command": "", "commit": "", "budget": 60.0,
}  # fmt: skip


def make_rows(seeds: int = 5, **fields) -> list[dict]:
    """Returns rows in which `new` is better than `old` by about 0.1."""
    return [
        COMMON
        | {"method": method, "seed": seed, "x": 0.5 + is_new * (0.1 + NOISE[seed % 5])}
        | fields
        for method, is_new in (("old", 0), ("new", 1))
        for seed in range(seeds)
    ]


def make_table(**options) -> Table:
    method = lambda task, *, budget, key: None
    options = {
        "claims": (Claim("new", "old", "x"),),
        "scales": ("small", "paper"),
        "published": {("new", "x"): Published(0.6, 0.1, "verified")},
    } | options
    return Table(
        task=None,
        methods={"old": method, "new": method},
        metrics=("x",),
        budget=60.0,
        **options,
    )


def with_status(rows: list[dict], code: int, seed: int = 0) -> list[dict]:
    """Returns rows of which that of `new` of a seed was not completed."""
    status = {"stopped": STATUS_MESSAGES[code]}
    changed = select(rows, method="new", seed=seed)
    return [row | status if row in changed else row for row in rows]


@pytest.mark.parametrize("code", range(1, len(STATUS_MESSAGES)))
def test_a_run_that_ended_in_failure_decides_nothing(code):
    """Its `alpha` is the last good one. A run that was stopped has a result."""
    rows = with_status(make_rows(), code)
    (claim,) = evaluate_claims((Claim("new", "old", "x"),), rows)
    (comparison,) = Comparison("new", ("old",), "x").evaluate(rows)
    has_failed = code in FAILED_CODES
    assert claim.outcome == ("undecided" if has_failed else "supported")
    assert ("1 run was not completed" in claim.text) == has_failed
    assert ("better" in comparison.text) != has_failed


@pytest.mark.parametrize("code", [1, 6], ids=["not finite", "out of time"])
def test_a_run_that_ended_in_failure_reproduces_nothing_and_is_ranked_last(code):
    rows = with_status(make_rows(scale="paper"), code)
    result = report.TableResult("toy", make_table(), rows)
    _, (cells,) = report.published_table(result)
    page = pages.to_leaderboard([result])
    if code == 1:
        assert cells[-1].startswith("no")
        assert "(4 of 5 seeds)" in cells[3]
        assert page.index("<td>old") < page.index("<td>new")
        assert "(4 of 5)" in page
    else:
        assert cells[-1].startswith("yes")
        assert page.index("<td>new") < page.index("<td>old")


def tuning_row(index: int, **fields) -> dict:
    row = {"stage": "tuning", "method": "new", "setting_index": index, "seed": 0}
    return row | {"selection": [float(index)], "gradient_equivalents": 7.0} | fields


def test_a_setting_whose_run_ended_in_failure_is_not_chosen():
    rows = [tuning_row(0), tuning_row(1, stopped=STATUS_MESSAGES[1])]
    assert choose_setting("new", 0, 2, rows) == 0
    assert choose_setting("new", 0, 2, [rows[0], tuning_row(1, stopped="x")]) == 1
    with pytest.raises(MethodError, match="outer value is not finite"):
        choose_setting(
            "new", 0, 2, [row | {"stopped": STATUS_MESSAGES[1]} for row in rows]
        )


def test_a_setting_that_diverged_counts_in_the_cost_of_tuning():
    failed = tuning_row(1, selection=None, error="not finite")
    unknown = tuning_row(2, selection=None, gradient_equivalents=None)
    rows = [tuning_row(0), failed, unknown]
    assert tuning_fields("new", 0, rows, 0.0)["tuning_cost"] == 14.0


@pytest.mark.parametrize(
    ("rows", "deviation"),
    [
        (make_rows(), ""),
        (make_rows(6), "6 seeds; the table has 5"),
        (make_rows(scale="paper"), "scale paper"),
        (make_rows(budget=30.0), "budget 30"),
    ],
    ids=["protocol", "more seeds", "scale", "budget"],
)
def test_rows_of_another_protocol_are_printed_and_decide_no_claim(rows, deviation):
    table = make_table(
        comparisons=(Comparison("new", ("old",), "x"),),
        findings=lambda rows: [Finding("own", "supported"), Finding("own", "holds")],
    )
    result = report.TableResult("toy", table, rows)
    text = report.to_markdown(result)
    outcomes = [finding.outcome for finding in result.findings]
    claims = "undecided" if deviation else "supported"
    assert outcomes == [claims, None, claims, "holds"]
    assert ("Not the protocol" in text) == bool(deviation)
    assert deviation in text
    assert "better, gain" in text


def test_seeds_are_counted_that_the_cells_of_a_table_have():
    """A table whose cells do not depend on the number of seeds has no `seeds`."""
    table = empty_table(cells=lambda scale, seeds: [{"method": "a", "seed": 0}])
    assert not table.deviations([{"method": "a", "seed": 0}])
    assert table.deviations([{"method": "a", "seed": x} for x in range(2)])


def test_findings_that_cannot_be_evaluated_fail_unless_rows_are_missing(tmp_path):
    """As where a column was renamed: a check among them would be lost."""
    table = make_table(
        findings=lambda rows: [Finding("right", "FAILED" if rows[0]["y"] else "holds")],
        published={},
    )
    rows = make_rows()
    assert table.evaluate(rows)[-1].outcome == "FAILED"
    assert table.evaluate(rows[1:])[-1].outcome == "undecided"
    assert table.evaluate(make_rows(2))[-1].outcome == "undecided"
    for row in rows:
        append_row(tmp_path / "toy.jsonl", row | {"table": "toy"})
    findings = check.check_result("toy", table, tmp_path)
    assert [finding.failed for finding in findings if "evaluated" in finding.text] == [
        True
    ]


def test_a_multiple_of_the_budget_is_stated():
    rows = [
        row
        | (
            {"method_source": "a", "budget_factor": 50}
            if row["method"] == "new"
            else {}
        )
        for row in make_rows()
    ]
    table = dataclasses.replace(make_table(published={}), methods={"old": None})
    table = dataclasses.replace(table, claims=())
    text = report.to_markdown(report.TableResult("toy", table, rows))
    assert "| new * (50 times the budget) |" in text
    assert "new (with 50 times the budget) against old in x: better" in text


@pytest.mark.parametrize("min_effect", [0.0, -1.0, np.nan, np.inf])
def test_a_ratio_that_is_not_positive_is_not_claimed(min_effect):
    with pytest.raises(ValueError, match="min_effect must be a positive ratio"):
        Claim("new", "old", "x", as_ratio=True, min_effect=min_effect)


def test_a_tuple_selects_the_list_of_a_row():
    """A row that was read has lists where its cell has tuples."""
    rows = make_rows(size=[1, 2])
    (finding,) = evaluate_claims(
        (Claim("new", "old", "x", where=(("size", (1, 2)),)),), rows
    )
    assert finding.outcome == "supported"
    assert len(select(rows, size=(1, 2))) == len(rows)
