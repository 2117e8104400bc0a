"""The page on choosing an estimator, README's table and the command's: as declared."""

from pathlib import Path

import pytest

from hypergrad import choose, cli

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
