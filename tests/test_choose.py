"""The page on choosing an estimator, README's table and the command's: as declared."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from hypergrad import cli, method_tables, objectives, searchers

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["docs/choose.md", "README.md"])
def test_tables_are_as_declared(page: str):
    """Else run python -m hypergrad.choose docs/choose.md README.md."""
    text = (ROOT / page).read_text()
    assert "<!-- table: " in text
    assert method_tables.rewrite(text) == text


def test_a_stale_table_is_written_anew():
    """Between its comments, and nothing else."""
    page = "# A page\n\n<!-- table: costs -->\n{}<!-- end of table -->\n\nThe end.\n"
    stale = page.format("| estimator |\n|---|\n| `Gone(solver)` |\n")
    assert method_tables.rewrite(stale) == page.format(method_tables.markdown("costs"))


def test_the_command_prints_every_row(capsys: pytest.CaptureFixture):
    """By name, whatever the width of the terminal."""
    cli.estimators()
    shown = capsys.readouterr().out
    assert all(shown.count(guide.call) == 2 for guide, _, _ in method_tables.methods())


def test_the_blocks_of_the_page_run_in_order(capsys: pytest.CaptureFixture):
    """The checks agree; a search goes on; the limit is kept; the front is one.

    The loss is ``sum (sin(alpha) - 2)^2``, least where each width is exp(pi/2), whose
    latency of 1.9 is above the limit of 1.6, so that it binds: within 1%.
    """
    page = (ROOT / "docs/choose.md").read_text()
    names: dict = {}
    for part in page.split("```python\n")[1:]:
        exec(compile(part.split("```")[0], "docs/choose.md", "exec"), names)
    error_estimate, trusted, difference = capsys.readouterr().out.split()[:3]
    assert trusted == "True"
    assert float(error_estimate) < 1e-2
    assert float(difference) < 1e-2
    found = names["found"]
    assert len(found.value) == len(found.metrics["size"]) == 2000 // (100 + 1 / 3)
    value, weights = (
        names["limited"].value[-1],
        names["limited"].stats["objective_weights"][-1],
    )
    assert abs(value[1] / 1.6 - 1) < 0.01
    assert weights[1] > 0
    values = [[names[of](jnp.sin(a), a, None) for of in ("outer", "latency")]
              for a in names["points"]]  # fmt: skip
    best = names["tried"].value[names["best"]]
    np.testing.assert_allclose(values, best, rtol=1e-5)
    assert objectives.non_dominated(best).all()


def test_every_combiner_has_its_line_in_the_guide():
    """Of those that `hg.minimize` takes."""
    page = (ROOT / "docs/choose.md").read_text().split("## Which combiner?")[1]
    first = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    takes = {name for name in objectives.__all__ if hasattr(
        getattr(objectives, name), "compute_weights")}  # fmt: skip
    assert sorted(cell.strip(" `") for cell in first) == sorted(takes - {"Combiner"})


def test_every_searcher_has_its_line_in_the_guide():
    """`Searcher` is the protocol."""
    page = (ROOT / "docs/choose.md").read_text().split("## Which searcher?")[1]
    page = page.split("\n## ")[0]
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


def test_what_sharing_saves_is_told_as_if_no_cell_were_trained_twice():
    """The smaller ratio of the committed table."""
    table = (ROOT / "benchmarks/results/warmstart.md").read_text()
    line = table.split("- supernet, 300 steps against each of 65 from scratch")[1]
    once, cells = line.split(" (")[1].split(" cells")[0].split(" were each of the ")
    for page in ("docs/choose.md", "README.md"):
        text = (ROOT / page).read_text()
        assert f"{float(once):.0f} times" in text
        assert cells in text


def test_the_line_on_nsga2_is_that_of_the_fronts():
    """Its place beside random search, and the three ratios of the committed table."""
    page = (ROOT / "docs/choose.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("| `NSGA2`"))
    fronts = (ROOT / "benchmarks/results/pareto.md").read_text()
    ratios = [part.split(" ")[0] for part in fronts.split("EPO against NSGA-II: ")[1:]]
    said = f"`EPO` has {ratios[0]}, {ratios[1]} and {ratios[2]} times its hypervolume"
    assert said in line
    volume = lambda part, name: float(part.split(f"| {name} | ")[1].split(" ")[0])
    tables = fronts.split("**Error against")[1:]
    ahead = all(volume(part, "NSGA-II") > volume(part, "random") for part in tables)
    assert ahead == ("ahead of `Random`" in line)
