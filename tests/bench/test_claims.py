"""How hypotheses, checks and published numbers end."""

import dataclasses
import re

import numpy as np
import pytest

from hypergrad.bench import (
    Check,
    Claim,
    Column,
    Comparison,
    Published,
    Resplits,
    Stage,
    Table,
    pages,
    report,
)
from hypergrad.bench.claims import evaluate_claims
from tests.bench.toy_table import empty_table

NOISE = 0.01 * np.array([1.0, -1.0, 0.5, -0.5, 0.2])


def rows_with(gain: float, noise: float = 1.0, seeds: int = 5) -> list[dict]:
    """Returns rows in which `new` is better than `old` by ``gain`` plus noise."""
    return [
        {"method": method, "seed": seed, "accuracy": 0.8 + is_new * gain_of_seed}
        for method, is_new in (("old", 0), ("new", 1))
        for seed, gain_of_seed in enumerate(gain + noise * NOISE[:seeds])
    ]


@pytest.mark.parametrize(
    ("gain", "noise", "outcome"),
    [
        (0.05, 1.0, "supported"),
        (0.025, 1.0, "not supported"),  # a gain for sure, but the interval holds 0.02
        (0.015, 1.0, "not supported"),  # the interval holds 0.02
        (-0.05, 1.0, "contradicted"),
        (0.001, 1.0, "contradicted"),  # a gain, but surely below 0.02
        (0.03, 9.0, "not supported"),  # the interval holds 0
    ],
)
def test_a_claim_of_two_points_ends_by_its_interval(gain, noise, outcome):
    claim = Claim("new", "old", "accuracy", min_effect=0.02)
    (finding,) = evaluate_claims((claim,), rows_with(gain, noise))
    assert finding.outcome == outcome
    assert not finding.failed


def test_lower_values_and_ratios():
    rows = [row | {"seconds": 1 / row["accuracy"]} for row in rows_with(0.4)]
    options = {"lower_is_better": True, "as_ratio": True}
    for min_effect, outcome in ((2.0, "contradicted"), (1.4, "supported")):
        claim = Claim("new", "old", "seconds", min_effect=min_effect, **options)
        (finding,) = evaluate_claims((claim,), rows)
        assert finding.outcome == outcome


def test_too_few_seeds_and_missing_numbers_decide_nothing():
    claim = Claim("new", "old", "accuracy")
    (few,) = evaluate_claims((claim,), rows_with(0.05, seeds=4))
    rows = rows_with(0.05)
    rows[0]["accuracy"] = None
    (missing,) = evaluate_claims((claim,), rows)
    assert few.outcome == missing.outcome == "undecided"
    assert "5 seeds are needed for an interval; got 4 (mean +0.05)" in few.text
    assert claim.problem([]) == "5 seeds are needed for an interval; got 0"


def test_pairs_are_matched_by_seed_not_by_order():
    claim = Claim("new", "old", "accuracy")
    rows = rows_with(0.05)
    assert evaluate_claims((claim,), rows) == evaluate_claims((claim,), rows[::-1])


def test_claims_without_rows_have_no_line_and_still_count():
    rows, claim = rows_with(0.05), Claim("new", "old", "accuracy")
    others = tuple(Claim(f"none {i}", "old", "accuracy") for i in range(9))
    (finding,) = evaluate_claims((claim, *others), rows)
    assert "99.5% interval" in finding.text  # one of ten claims


def test_a_method_that_lacks_seeds_decides_nothing():
    rows = [
        row for row in rows_with(0.05) if (row["method"], row["seed"]) != ("new", 1)
    ]
    (finding,) = evaluate_claims((Claim("new", "old", "accuracy"),), rows)
    assert finding.outcome == "undecided"
    (line,) = Comparison("new", ("old",), "accuracy").evaluate(rows)
    assert "lacks seeds" in line.text


def test_several_rows_of_a_seed_are_an_error():
    rows = rows_with(0.05)
    with pytest.raises(ValueError, match="where"):
        evaluate_claims((Claim("new", "old", "accuracy"),), [*rows, rows[0]])


def test_a_true_effect_at_the_bound_is_rarely_called_supported():
    """Of 400 tables at most about 20 may be; 40 would be 4.6 standard deviations."""
    generator, claim = np.random.default_rng(0), Claim("a", "b", "x", min_effect=0.02)
    supported = 0
    for _ in range(400):
        gains = generator.normal(0.02, 0.01, size=8)
        rows = [{"method": "a", "seed": i, "x": x} for i, x in enumerate(gains)]
        rows += [{"method": "b", "seed": i, "x": 0.0} for i in range(8)]
        (finding,) = evaluate_claims((claim,), rows)
        supported += finding.outcome != "not supported"
    assert supported < 40


def test_a_comparison_says_which_is_better_and_claims_nothing():
    (finding,) = Comparison("old", ("new",), "accuracy").evaluate(rows_with(0.05))
    assert finding.outcome is None
    assert "worse" in finding.text
    (finding,) = Comparison("new", ("old",), "accuracy").evaluate(rows_with(0.0))
    assert "no difference" in finding.text


def test_a_check_fails_with_its_detail():
    check = Check("all are right", lambda rows: (False, "3 wrong"))
    finding = check.evaluate([])
    assert finding.failed
    assert "3 wrong" in finding.text


@pytest.mark.parametrize(
    ("mean", "scale", "tag", "expected"),
    [
        (0.93, "paper", "verified", True),
        (0.90, "paper", "verified", False),
        (0.93, "small", "verified", None),
        (0.93, "paper", "recalled", None),
        (float("nan"), "paper", "verified", None),
    ],
)
def test_reproduced_is_only_said_at_the_protocol_of_the_paper(
    mean, scale, tag, expected
):
    number = Published(0.94, tolerance=0.02, tag=tag)
    assert number.is_reproduced(mean, scale) is expected


@pytest.mark.parametrize(
    ("values", "measured", "verdict"),
    [
        ((0.93, 0.94, 0.95), "0.940 ± 0.010", "yes (within 0.02)"),
        ((0.90, 0.91, 0.92), "0.910 ± 0.010", "no (within 0.02)"),
        ((None, 0.94, None), "0.940 (1 of 3 seeds)", "no (within 0.02)"),
        ((None, 0.93, 0.95), "0.940 ± 0.014 (2 of 3 seeds)", "no (within 0.02)"),
        ((None, None, None), "not finite", "no"),
        ((), "not run", "-"),
    ],
)
def test_seeds_that_are_not_finite_reproduce_nothing(values, measured, verdict):
    """A published number beside the mean of the seeds that stayed finite."""
    table = empty_table(
        columns=(Column("accuracy", form=".3f"),),
        published={("new", "accuracy"): Published(0.94, 0.02, "verified")},
        seeds=3,
    )
    rows = [
        {"method": "new", "seed": i, "accuracy": value, "scale": "paper"}
        for i, value in enumerate(values)
    ]
    _, (cells,) = report.published_table(report.TableResult("toy", table, rows))
    assert cells[3] == measured
    assert cells[-1] == verdict


@pytest.mark.parametrize(
    ("seeds", "budget", "verdict"),
    [(3, 60, "yes (within 0.02)"), (2, 60, "not judged"), (3, 30, "not judged")],
)
def test_rows_of_fewer_seeds_or_another_budget_reproduce_nothing(
    seeds, budget, verdict
):
    table = Table(
        task=None,
        methods={"new": None},
        metrics=("accuracy",),
        budget=60,
        seeds=3,
        published={("new", "accuracy"): Published(0.94, 0.02, "verified")},
    )
    row = {"method": "new", "scale": "paper", "accuracy": 0.94, "budget": budget}
    rows = [row | {"seed": seed} for seed in range(seeds)]
    result = report.TableResult("toy", table, rows)
    _, (cells,) = report.published_table(result)
    assert cells[-1] == verdict
    diverged = [row | {"accuracy": None} for row in rows]
    _, (cells,) = report.published_table(report.TableResult("toy", table, diverged))
    assert cells[-1] == verdict.replace("yes (within 0.02)", "no")


def test_comparisons_of_several_added_methods_are_one_family():
    """Two added methods and one of the table make three pairs, corrected by Holm."""
    table = Table(task=None, methods={}, metrics=("accuracy",), budget=1.0)
    noises = {"base": 0.0 * NOISE, "first": NOISE, "second": 0.7 * NOISE[::-1]}
    rows = [
        {"method": method, "seed": seed, "accuracy": 0.8 + gain + noise}
        | ({} if method == "base" else {"method_source": "a digest"})
        for (method, noises), gain in zip(noises.items(), (0, 0.1, 0.2), strict=True)
        for seed, noise in enumerate(noises)
    ]
    texts = [finding.text for finding in table.evaluate(rows)]
    levels = re.findall(r"\(([\d.]+)% interval", " ".join(texts))
    assert sorted(map(float, levels)) == [95.0, 97.5, 98.33]
    assert [text.partition(" in ")[0] for text in texts] == [
        "first against base",
        "first against second",
        "second against base",
    ]


def test_a_method_that_lacks_a_seed_reproduces_nothing():
    """The run of its third seed failed; a table that plans two seeds for it agrees."""
    cells = {"old": 3, "new": 3}
    table = empty_table(
        cells=lambda scale, seeds: [
            {"method": method, "seed": seed}
            for method, num_seeds in cells.items()
            for seed in range(min(seeds, num_seeds))
        ],
        columns=(Column("accuracy", form=".3f"),),
        published={("new", "accuracy"): Published(0.94, 0.02, "verified")},
        seeds=3,
    )
    rows = [
        {"method": method, "seed": seed, "accuracy": 0.94, "scale": "paper"}
        for method, num_rows in (("old", 3), ("new", 2))
        for seed in range(num_rows)
    ]
    result = report.TableResult("toy", table, rows)
    _, (published,) = report.published_table(result)
    assert published[3:] == ["0.940 ± 0.000 (2 of 3 seeds)", "+0", "no (within 0.02)"]
    assert result.cell(table.columns[0], "new") == "0.940 ± 0.000 (2 of 3)"
    cells["new"] = 2
    _, (published,) = report.published_table(result)
    assert published[3:] == ["0.940 ± 0.000", "+0", "yes (within 0.02)"]


def test_a_method_that_diverged_on_a_seed_is_last_of_the_leaderboard():
    """`Table` ranks by its first metric, also where that is no column."""
    table = empty_table(columns=(Column("accuracy"),), ranked_by="-error")
    errors = {
        "broke off": (0.1, None),
        "lacks a seed": (0.1,),
        "second": (0.3, 0.5),
        "first": (0.2, 0.4),
    }
    rows = [
        {"method": method, "seed": seed, "error": error, "scale": "small"}
        for method, values in errors.items()
        for seed, error in enumerate(values)
    ]
    page = pages.to_leaderboard([report.TableResult("toy", table, rows)])
    ranked = re.findall("<tr><td>([^<]*)</td><td>([^<]*)</td>", page)
    assert ranked == [
        ("first", "0.3 ± 0.141"),
        ("second", "0.4 ± 0.141"),
        ("broke off", "0.1 (1 of 2)"),
        ("lacks a seed", "0.1 (1 of 2)"),
    ]


@pytest.mark.parametrize("resplits", [None, Resplits(0.5)], ids=["seeds", "resplits"])
def test_the_printed_form_says_what_intervals_and_trust_mean(resplits):
    """What a table does not have is not explained."""
    table = empty_table(
        columns=(Column("accuracy"),),
        claims=(Claim("new", "old", "accuracy"),),
        resplits=resplits,
    )
    common = {"scale": "small", "device": "cpu"}
    rows = [row | common | {"num_untrusted": 3} for row in rows_with(0.05)]
    text = report.to_markdown(report.TableResult("toy", table, rows))
    assert "Holm" in text
    assert ("re-splits" in text) == (resplits is not None)
    assert "`untrusted` counts" in text
    plain = dataclasses.replace(table, claims=(), resplits=None)
    rows = [row | common for row in rows_with(0.05)]
    text = report.to_markdown(report.TableResult("toy", plain, rows))
    assert "Holm" not in text
    assert "untrusted" not in text


def test_a_body_that_needs_missing_rows_is_left_out():
    """As where cells failed, of which the printed form says why."""
    stage = Stage(
        "tuning", lambda *_: [], lambda *_: {}, body=lambda rows: [rows[0]["loss"]]
    )
    table = empty_table(
        earlier_stages=(stage,),
        body=lambda rows: [rows[9]["accuracy"]],
    )
    row = {"method": "new", "seed": 0, "scale": "small", "device": "cpu"}
    result = report.TableResult("toy", table, [row | {"stage": "tuning"}, row])
    text = report.to_markdown(result, {"old": "the disk is full"})
    assert "others are missing (IndexError(" in text
    assert "others are missing (KeyError('loss'))" in text
    assert "- old: the disk is full" in text


@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["percent", "fraction"])
def test_seeds_with_one_difference_up_to_rounding_do_not_vary(scale):
    rows = [
        {"method": method, "seed": seed, "a": (81 + 2 * seed + gain) / scale}
        for method, gain in (("old", 0), ("new", 2))
        for seed in range(5)
    ]
    (finding,) = evaluate_claims((Claim("new", "old", "a"),), rows)
    assert finding.outcome == "undecided"
    assert "do not vary" in finding.text


@pytest.mark.parametrize(
    ("dtype", "outcome"), [("f4", "undecided"), ("f8", "supported")]
)
def test_seeds_with_one_difference_up_to_rounding_in_float32_do_not_vary(
    dtype, outcome
):
    """Differences of 3e-8 are rounding of such values in float32, not in float64."""
    rows = [
        {"method": method, "seed": seed, "a": float(np.array(x, dtype))}
        for method, gain in (("old", 0.0), ("new", 0.1))
        for seed, x in enumerate(0.7 + gain + 3e-8 * np.arange(5) * (gain > 0))
    ]
    (finding,) = evaluate_claims((Claim("new", "old", "a", min_effect=0.05),), rows)
    assert finding.outcome == outcome


def test_counts_have_no_rounding():
    """They are exact in float32; and numbers too large for it are those of float64."""
    for large, gain in ((16_000_000, 1), (1e39, 1e30)):
        rows = [
            {"method": method, "seed": seed, "a": float(large + is_new * seed * gain)}
            for method, is_new in (("old", False), ("new", True))
            for seed in range(1, 6)
        ]
        (finding,) = evaluate_claims((Claim("new", "old", "a"),), rows)
        assert finding.outcome == "supported", finding.text


def test_a_text_is_no_number():
    rows = [row | {"accuracy": str(row["accuracy"])} for row in rows_with(0.05)]
    (finding,) = evaluate_claims((Claim("new", "old", "accuracy"),), rows)
    assert finding.outcome == "undecided"
    assert "a row has no number" in finding.text


def test_a_mean_at_the_end_of_the_tolerance_is_reproduced():
    """The difference of 1.1 and 1.0 is larger than 0.1 by rounding alone."""
    for value, mean in ((1.0, 1.1), (1.1, 1.0), (0.3, 0.2), (-1.0, -1.1)):
        number = Published(value, tolerance=0.1, tag="verified")
        assert number.is_reproduced(mean, "paper") is True
        assert number.is_reproduced(mean + np.sign(mean - value) * 1e-9, "paper") is (
            False
        )


@pytest.mark.parametrize("tolerance", [-0.1, float("nan"), float("inf")])
def test_a_tolerance_is_a_finite_number_that_is_not_negative(tolerance):
    with pytest.raises(ValueError, match="tolerance"):
        Published(1.0, tolerance=tolerance, tag="verified")


def test_a_check_that_cannot_be_evaluated_fails_and_says_why():
    check = Check("it is small", lambda rows: max(row["a"] for row in rows) < 1)
    assert check.evaluate([{"a": 0.5}]).outcome == "holds"
    for rows in ([], [{"b": 1.0}], [{"a": None}]):
        finding = check.evaluate(rows)
        assert finding.failed
        assert "rows are missing" in finding.text


def test_the_index_names_every_commit_and_whether_files_differ():
    commits = f"{'a' * 40}+ and {'b' * 40}"
    card = pages.IndexEntry("toy", "", commit=commits).card()
    assert f"commit {'a' * 12}+ and {'b' * 12}" in card
