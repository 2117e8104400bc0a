"""`hypergrad run NAME`, for every study there is: rows, table and figure."""

import io
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

import hypergrad as hg
from hypergrad import cli
from hypergrad.runtime.console import print_markdown
from hypergrad.studies import STUDIES, record

# The method that costs least, where it is not the baseline.
CHEAPEST = {
    "architecture": "random cell",
    "augmentation": "true pose",
    "penalties": "logistic, baseline",
    "physics": "poisson, equal weights",
    "reinforcement": "mrp, one discount",
    "schedules": "100 steps, baseline",
    "unsupervised": "kde, baseline",
}
# The other studies run only if slow tests do.
QUICK = ("few_shot", "unsupervised")
# Studies that keep what was measured: a column, and how the task of the method is made.
KEPT = {
    "augmentation": ("test_accuracy", {}),
    "cleaning": ("test_accuracy", {}),
    "federated": ("accuracy", {}),
    "penalties": ("test_loss", {"variant": "logistic"}),
    "physics": ("relative_error", {"variant": "poisson"}),
    "semi_supervised": ("test_accuracy", {}),
    "unsupervised": ("test_nll", {"variant": "kde"}),
}


@pytest.mark.usefixtures("single_precision")
@pytest.mark.filterwarnings("ignore:No artists with labels")  # a panel of other methods
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK))
        for name in STUDIES
    ],
)
def test_the_command_writes_rows_table_and_figure(name: str, tmp_path, capsys):
    """One seed of the cheapest method; the data it used is named everywhere."""
    method = CHEAPEST.get(name, "baseline")
    cli.run(name, (method,), seeds=1, out=tmp_path)
    rows = record.read(tmp_path / f"{name}.jsonl")
    assert [(row["method"], row["seed"]) for row in rows] == [(method, 0)]
    data = rows[0]["data"]
    text = (tmp_path / f"{name}.md").read_text()
    assert f"| {method} |" in text
    assert text.splitlines()[2].startswith(f"{data}; 1 seed. ")
    assert "±" not in text  # one seed has no spread
    shown = " ".join(capsys.readouterr().out.split())  # however wide the terminal
    assert f"{name}: {data}, 1 seed # {name}" in shown
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    found, flaws = hg.models.find(tmp_path / "models")
    assert not flaws
    assert len(found) == (name in KEPT)
    if found:
        assert f"models list {tmp_path / 'models'}" in shown
        (model,), (column, variant) = found, KEPT[name]
        assert model.metrics[column] == rows[0][column]
        w, alpha = hg.models.load(model.reference, folder=tmp_path / "models")
        key = jax.random.key(0)
        task = getattr(hg.tasks, name).make(key=key, **variant)
        measured = task.metrics[column](w, alpha, key)
        # By another program, in float32: 1,000 roundings of 6e-8.
        np.testing.assert_allclose(measured, rows[0][column], rtol=6e-5)


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("width", [20, 80])
@pytest.mark.parametrize("name", STUDIES)
def test_the_terminal_cuts_off_nothing(name: str, width: int):
    """Every verdict and paragraph is there but for line breaks; so is every cell."""
    text = (RESULTS / f"{name}.md").read_text()
    file = io.StringIO()
    print_markdown(text, Console(file=file, width=width))
    shown = file.getvalue()
    together = "".join(shown.split())
    drawn = [line for line in text.splitlines() if line.startswith("|")]
    for line in text.splitlines():
        if line not in drawn:
            assert "".join(line.split()) in together
    for line in drawn[2:]:
        method, *cells = (cell.strip() for cell in line[1:-1].split("|"))
        assert f"│ {method} " in shown
        assert all(word in shown for cell in cells for word in cell.split())
    prose = [line for line in shown.splitlines() if line[:1] not in "┏┃┡│└"]
    assert max(map(len, prose)) <= width


@pytest.mark.usefixtures("single_precision")
def test_what_cannot_be_written_is_said_in_words(tmp_path, monkeypatch):
    """The rows stay; no traceback."""
    cli.run("cleaning", ("baseline",), seeds=1, out=tmp_path)
    rows = (tmp_path / "cleaning.jsonl").read_text()
    opens = Path.open

    def full(path, mode="r", *rest, **more):
        if set(mode) & set("wa+"):
            raise OSError(28, "No space left on device", str(path))
        return opens(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(SystemExit, match="No space left"):
        cli.run("cleaning", ("baseline",), seeds=1, out=tmp_path)
    assert (tmp_path / "cleaning.jsonl").read_text() == rows
