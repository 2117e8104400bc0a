"""The page on choosing an estimator, README's table and the command's: as declared."""

from pathlib import Path

import pytest

from hypergrad import choose, cli, searchers

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["docs/choose.md", "README.md"])
def test_tables_are_as_declared(page: str):
    """Else run python -m hypergrad.choose docs/choose.md README.md."""
    text = (ROOT / page).read_text()
    assert "<!-- table: " in text
    assert choose.rewrite(text) == text


def test_a_stale_table_is_written_anew():
    """Between its comments, and nothing else."""
    page = "# A page\n\n<!-- table: costs -->\n{}<!-- end of table -->\n\nThe end.\n"
    stale = page.format("| estimator |\n|---|\n| `Gone(solver)` |\n")
    assert choose.rewrite(stale) == page.format(choose.markdown("costs"))


def test_the_command_prints_every_row(capsys: pytest.CaptureFixture):
    """By name, whatever the width of the terminal."""
    cli.estimators()
    shown = capsys.readouterr().out
    assert all(shown.count(guide.call) == 2 for guide, _, _ in choose.methods())


def test_the_example_on_the_page_runs_as_printed(capsys: pytest.CaptureFixture):
    """Its two checks agree with each other."""
    page = (ROOT / "docs/choose.md").read_text()
    block = page.split("```python\n")[1].split("```")[0]
    exec(compile(block, "docs/choose.md", "exec"), {})
    error_estimate, trusted, difference = capsys.readouterr().out.split()
    assert trusted == "True"
    assert float(error_estimate) < 1e-2
    assert float(difference) < 1e-2


def test_every_searcher_has_its_line_in_the_guide():
    """`Searcher` is the protocol."""
    page = (ROOT / "docs/choose.md").read_text().split("## Which searcher?")[1]
    first = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = [name.strip(" `") for cell in first for name in cell.split(",")]
    assert sorted(named) == sorted(set(searchers.__all__) - {"Searcher"})


def test_the_guide_to_searchers_says_what_the_tables_do():
    """Costs and evaluations as printed in the committed tables."""
    page = (ROOT / "docs/choose.md").read_text().split("## Which searcher?")[1]
    table = (ROOT / "benchmarks/results/search.md").read_text()
    two, twenty, _ = table.split(" hyperparameters**")[1:]
    cells = lambda part, name: part.split(f"| {name} | ")[1].split(" | ")
    costs = [cells(two, name)[1] for name in ("GaussianProcess", "TPE", "Grid")]
    costs += [cells(two, "implicit")[1]]
    assert all(f"{cost}" in page.split("| searcher")[0] for cost in costs)
    for name in ("Grid", "Sobol", "TPE", "GaussianProcess"):
        assert f"2: there after {cells(two, name)[6]} trials" in page
    assert (
        f"{float(cells(twenty, 'CMAES')[3][:-1]):.0f}% of the way left, after " in page
    )
    assert f"after {cells(twenty, 'CMAES')[6]} trials" in page
