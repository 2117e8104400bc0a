"""The tables of this project: their files, their committed rows, their imports."""

import ast
import re
from pathlib import Path

import pytest

from hypergrad.bench import MeasurementTable, Table, check, loading, report
from hypergrad.bench.rows import Row, read_rows
from hypergrad.bench.source import local_imports

FOLDER = Path(__file__).parents[2] / "benchmarks"
FILES = loading.table_files(FOLDER)
NAMES = [file.stem for file in FILES]


def test_every_file_of_the_folder_is_a_table():
    assert len(FILES) >= 30
    assert {*FILES, FOLDER / "__init__.py"} == set(FOLDER.glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_the_committed_rows_are_whole_and_their_checks_hold(file: Path):
    table = loading.load_table(file)
    findings = check.check_result(file.stem, table, FOLDER / "results")
    assert not [finding.text for finding in findings if finding.failed]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("augmentation", "implicit"),
        ("augmentation", "unrolled"),
        ("few_shot", "maml"),
        ("semi_supervised", "neumann"),
        ("semi_supervised", "unrolled"),
        ("federated", "global, neumann"),
    ],
)
def test_steps_of_a_fixed_cost_spend_the_budget_up_to_one_step(name: str, method: str):
    """A cost that is planned too high would leave a part of the budget unused."""
    table = loading.load_table(FOLDER / f"{name}.py")
    rows = read_rows(FOLDER / "results" / f"{name}.jsonl")
    for row in rows:
        if row["method"] == method and row.get("stage") is None:
            cost = row["gradient_equivalents"]
            step_cost = cost / len(row["curve_cost"])
            assert table.budget - step_cost < cost <= table.budget


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_the_printed_form_is_that_of_the_rows(file: Path):
    result = check.load_result(file.stem, loading.load_table(file), FOLDER / "results")
    text = (FOLDER / "results" / f"{file.stem}.md").read_text()
    assert report.to_markdown(result) == text


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_a_table_says_what_a_reader_needs(file: Path):
    table = loading.load_table(file)
    assert len(table.protocol.split()) >= 60
    assert table.source
    assert table.minutes > 0
    assert (FOLDER / "results" / f"{file.stem}.png").stat().st_size > 5_000
    if isinstance(table, MeasurementTable | Table):
        assert table.stages(table.scales[0], 1)[-1]


RESPLIT_DATA = ("scikit-learn", "Omniglot")  # re-split by the seeds of most tables


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_seeds_that_re_split_one_data_set_are_corrected_or_the_protocol_says_why_not(
    file: Path,
):
    """The splits of the seeds overlap, so that they are not independent."""
    table = loading.load_table(file)
    if table.seeds > 1 and any(name in table.data for name in RESPLIT_DATA):
        assert table.resplits is not None or "Nadeau" in table.protocol


def published_counts(file: Path) -> tuple[int, int]:
    """Returns how many published numbers are within their tolerance, of how many."""
    table = loading.load_table(file)
    if not table.published:
        return 0, 0
    result = check.load_result(file.stem, table, FOLDER / "results")
    _, cells = report.published_table(result)
    verdicts = [row[-1].split(" (")[0] for row in cells]
    return verdicts.count("yes"), verdicts.count("yes") + verdicts.count("no")


def test_readme_and_report_count_the_published_numbers_that_are_within():
    """The README their sum, and the report those of each table."""
    counts = {file.stem: published_counts(file) for file in FILES}
    counts = {name: count for name, count in counts.items() if count[1]}
    num_within, num_judged = map(sum, zip(*counts.values(), strict=True))
    readme = " ".join((FOLDER.parent / "README.md").read_text().split())
    assert f"{num_within} of {num_judged} lie within" in readme
    text = (FOLDER.parent / "docs/report/report.typ").read_text()
    rows = re.findall(r'^  \("(\w+)", "[^"]*", (\d+), (\d+), ', text, re.MULTILINE)
    assert {name: (int(n), int(of)) for name, n, of in rows} == counts


@pytest.mark.parametrize(
    "page", ["README.md", "docs/results.md", "docs/report/report.typ"]
)
def test_a_page_counts_the_trusted_estimates_of_the_table(page: str):
    """Each number of trusted estimates is that of a method in the table `trust`."""
    rows = read_rows(FOLDER / "results/trust.jsonl")
    totals = {
        method: sum(row["num_trusted"] for row in rows if row["method"] == method)
        for method in ("default", "certificate")
    }
    text = " ".join((FOLDER.parent / page).read_text().split())
    statements = re.findall(
        r"`Implicit` trust(?:ed|s) ([\d,]+) and a certificate ([\d,]+),"
        r"|Of ([\d,]+) estimates that `Implicit` trusts and ([\d,]+) that a certif",
        text,
    )
    to_number = lambda text: int(text.replace(",", ""))
    numbers = [tuple(map(to_number, filter(None, groups))) for groups in statements]
    assert numbers == [(totals["default"], totals["certificate"])]
    for number in re.findall(r"of ([\d,]+) trusted implicit", text):
        assert to_number(number) == totals["default"]


def test_the_page_of_results_claims_what_the_tables_support():
    """A task without a supported claim or a check that holds has an empty column."""
    page = (FOLDER.parent / "docs/results.md").read_text()
    section = page.split("## Twelve tasks")[1].split("\n## ")[0]
    tasks = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|") and line.count("|") == 5
    ][2:]
    assert len(tasks) == 12
    for name, _, supported, _ in tasks:
        text = (FOLDER / "results" / f"{name}.md").read_text()
        has_any = "- **supported**" in text or "- **holds**" in text
        assert (supported != "-") == has_any, name


INTERVAL = re.compile(r"\[([+-]?[\d.]+), ([+-]?[\d.]+)\]")


@pytest.mark.parametrize(
    "name",
    [
        "results.md",
        "other_libraries.md",
        "published.md",
        "choose.md",
        "report/report.typ",
    ],
)
def test_each_interval_of_a_page_is_in_a_table(name: str):
    """The page may print percentage points, and a gain of the other side."""
    texts = [path.read_text() for path in (FOLDER / "results").glob("*.md")]
    printed = [
        sorted((factor * float(low), factor * float(high)))
        for text in texts
        for low, high in INTERVAL.findall(text)
        for factor in (1, -1, 100, -100)
    ]
    page = (FOLDER.parent / "docs" / name).read_text()
    absent = []
    for low, high in INTERVAL.findall(page):
        # Both are rounded: the page to its last digit, the table to three digits.
        last_digit = 10.0 ** -len(low.partition(".")[2])
        is_near = lambda x, text, unit=last_digit: abs(x - float(text)) <= 0.6 * unit
        if not any(is_near(x, low) and is_near(y, high) for x, y in printed):
            absent.append(f"[{low}, {high}]")
    assert not absent


def test_no_table_imports_another():
    tables = set(FILES)
    errors = [
        f"{file.name} imports {', '.join(sorted(x.name for x in other))}"
        for file in FILES
        if (other := (local_imports(file) & tables) - {file})
    ]
    assert not errors, "\n".join(errors)


def test_modules_that_tables_share_have_no_circle():
    modules = sorted((FOLDER / "shared").glob("*.py"))
    reachable = {module: local_imports(module) - {module} for module in modules}
    for module, others in reachable.items():
        assert not [x for x in others if module in reachable.get(x, set())], module


def test_files_are_few_and_short():
    files = [*FILES, *(FOLDER / "shared").glob("*.py")]
    lengths = {file: len(file.read_text().splitlines()) for file in files}
    assert not {file.name: n for file, n in lengths.items() if n > 450}


def origin(row: Row) -> str:
    """Returns the digests of the source of a row, or of an older row its commit."""
    return str(row.get("source") or row.get("commit") or row.get("converted_from"))


def test_rows_of_one_file_have_one_origin():
    """Commits may differ where the package and the table are the same."""
    for name in NAMES:
        rows = read_rows(FOLDER / "results" / f"{name}.jsonl")
        assert all(row.get("commit") or row.get("converted_from") for row in rows), name
        for stage in {row.get("stage") for row in rows}:
            origins = {origin(row) for row in rows if row.get("stage") == stage}
            assert len(origins) == 1, (name, stage, origins)


def test_the_word_reproduced_is_kept_for_numbers_of_papers():
    for file in [*FILES, *(FOLDER / "shared").glob("*.py")]:
        strings = [
            node.value
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        words = " ".join(strings).split()
        assert "reproduced" not in words or "Published" in file.read_text(), file.name
