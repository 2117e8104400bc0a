"""Rows of tuning that are missing, or that do not belong to the reported rows."""

import pytest

from hypergrad.bench import loading
from hypergrad.bench.check import check_result
from hypergrad.bench.loading import TableRef, parse_method
from hypergrad.bench.rows import Row, to_line
from hypergrad.bench.runner import RunOptions, run_table

ADDED = "copy_of_descent"


@pytest.fixture(scope="module")
def rows_of_run(shared_file, tmp_path_factory) -> list[Row]:
    """Returns the rows of a table of which one own and one added method are tuned."""
    methods = (parse_method(f"{shared_file.parent}/mine.py:{ADDED}"),)
    options = RunOptions("small", 2, tmp_path_factory.mktemp("runs"), "hypergrad run")
    result = run_table(TableRef(shared_file, methods), options)
    assert not result.failures
    return result.rows


@pytest.fixture
def problems_of(shared_file, tmp_path):
    """Returns a function that returns the texts of failed findings about rows."""

    def problems(rows: list[Row]) -> list[str]:
        (tmp_path / "quadratic.jsonl").write_text("".join(map(to_line, rows)))
        table = loading.load_table(shared_file)
        findings = check_result("quadratic", table, tmp_path)
        return [finding.text for finding in findings if finding.failed]

    return problems


def is_tuning(row: Row, label: str = ADDED) -> bool:
    return row.get("stage") == "tuning" and row["method"] == label


def test_the_rows_of_a_run_belong_together(rows_of_run, problems_of):
    assert problems_of(rows_of_run) == []
    assert sum(is_tuning(row) for row in rows_of_run) == 4


def test_a_deleted_tuning_row_of_an_added_method_is_missing(rows_of_run, problems_of):
    for seed in range(2):
        for index in range(2):
            key = {"stage": "tuning", "seed": seed, "setting_index": index}
            rows = [
                row
                for row in rows_of_run
                if not (is_tuning(row) and row.items() >= key.items())
            ]
            assert problems_of(rows)[0] == f"missing: tuning, {ADDED}, {index}, {seed}"


def test_all_tuning_rows_of_an_added_method_are_missing(rows_of_run, problems_of):
    """Its reported rows state a cost of tuning, so that there were some."""
    rows = [row for row in rows_of_run if not is_tuning(row)]
    assert problems_of(rows) == [f"missing: tuning, {ADDED}, 0, {i}" for i in range(2)]


def test_a_setting_without_rows_is_seen_by_the_cost_of_tuning(rows_of_run, problems_of):
    is_deleted = lambda row: is_tuning(row) and row["setting_index"] == 1
    rows = [row for row in rows_of_run if not is_deleted(row)]
    texts = problems_of(rows)
    assert len(texts) == 4  # of two seeds: the chosen setting was the deleted one
    assert all(text.startswith(f"{ADDED}, seed ") for text in texts)
    costs = [
        row["gradient_equivalents"]
        for row in rows_of_run
        if is_tuning(row) and row["seed"] == 0
    ]
    assert f"its tuning cost {sum(costs):g} " in texts[1]
    assert texts[1].endswith(f"the rows of tuning cost {costs[0]:g}")


@pytest.mark.parametrize("label", ["descent", ADDED])
def test_a_reported_setting_is_the_one_that_tuning_chose(
    rows_of_run, problems_of, label
):
    rows = [
        row | {"settings": {"learning_rate": 0.01}}
        if row["method"] == label and "stage" not in row and row["seed"] == 1
        else row
        for row in rows_of_run
    ]
    (text,) = problems_of(rows)
    assert text == (
        f"{label}, seed 1: reported with {{'learning_rate': 0.01}}, but the rows of "
        "tuning choose {'learning_rate': 0.2}"
    )


def test_a_reported_row_without_a_finite_tuning_run_is_named(rows_of_run, problems_of):
    rows = [
        row | {"selection": None} if is_tuning(row) and row["seed"] == 0 else row
        for row in rows_of_run
    ]
    (text,) = problems_of(rows)
    assert text.startswith(f"{ADDED}, seed 0: no setting of its grid ended with")
