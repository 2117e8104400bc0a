"""Runs that are kept: what they are made of, lined up, repeated, as a page."""

import base64
import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import itertools
import json
import resource
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

from hypergrad import cli, models, runs, studies
from hypergrad.models import store
from hypergrad.runs import commands, manifest, model_commands
from hypergrad.runtime import atomic_io, fingerprint
from hypergrad.runtime.provenance import source_commit
from hypergrad.studies.study import MODEL, Column, Study
from hypergrad.studies.table import Request


def no_model(number: float, seed: int) -> None:
    """What most tests keep."""


def study(
    x=None, shift: float = 0.0, stop=None, parts=lambda key: (), model=no_model
) -> Study:
    """Two methods whose numbers are known, on ten rows of data."""
    x = np.arange(20.0).reshape(10, 2) if x is None else x

    @functools.cache
    def row(number: float, seed: int) -> dict:
        if (number, seed) == stop:
            raise KeyboardInterrupt
        return {
            MODEL: model(number, seed),
            "score": number + seed + shift,
            "curve": [number, number + shift],
            "run_seconds": np.random.default_rng().random(),
        }

    def draw(rows, path):
        plt.figure(figsize=(2, 1))
        plt.plot([row["score"] for row in rows])
        plt.savefig(path)
        plt.close()

    return Study(
        name="toy",
        paradigm="none",
        source="a <test> & its author",
        about="Nothing is learned.",
        data=lambda: ("ten rows", {"x": x, "y": np.arange(10)}),
        methods={
            "one": lambda seed: row(1.0, seed),
            "two": lambda seed: row(2.0, seed),
        },
        columns=(Column("score", "score"),),
        claims=(),
        draw=draw,
        minutes=0.1,
        split=parts,
    )


def start(folder: Path, seeds: int = 2, **changes) -> runs.Run:
    request = Request("small", seeds, folder, "hypergrad run toy")
    return runs.start(study(**changes), request)


def test_a_run_says_what_it_was_made_of(tmp_path):
    run = start(tmp_path)
    made = runs.load(tmp_path / "toy").manifest
    assert made == run.manifest
    arrays = np.arange(10), np.arange(20.0).reshape(10, 2)
    digest = hashlib.sha256(b"x" + arrays[1].tobytes() + b"y" + arrays[0].tobytes())
    assert made["data"]["sha256"] == digest.hexdigest()
    assert made["data"]["arrays"] == {"x": ["float64", 10, 2], "y": ["int64", 10]}
    (session,) = made["sessions"]
    assert session["configuration"] == {
        **{"scale": "small", "seeds": 2, "methods": ["one", "two"]}
    }
    assert session["command"] == "hypergrad run toy"
    assert session["started"] <= session["ended"]
    assert run.packages["jax"] == jax.__version__
    assert run.packages["numpy"] == importlib.metadata.version("numpy")
    assert run.versions["float"] == "float64"
    assert [row["score"] for row in run.rows] == [1.0, 2.0, 2.0, 3.0]
    assert run.facts["methods"] == "one, two"


def test_the_commit_of_the_source_is_kept(tmp_path):
    """With a plus where any file of the package differs; none outside a checkout."""
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "inner" / "newton.py").write_text("steps = 1")
    assert source_commit(package) is None
    git = lambda *words: subprocess.run(
        ["git", "-C", str(tmp_path), *words], capture_output=True, text=True, check=True
    )
    git("init")
    assert (
        source_commit(package) is None
    )  # a checkout around it, as around site-packages
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "Begin")
    head = git("rev-parse", "HEAD").stdout.strip()
    (tmp_path / "notes.txt").write_text("")
    assert source_commit(package) == head
    (package / "inner" / "newton.py").write_text("steps = 2")
    assert source_commit(package) == head + "+"


def test_rows_of_several_sessions_are_told_apart(tmp_path):
    """Whatever differs between them is named; what measures nothing is none."""
    first = start(tmp_path, seeds=1)
    made = json.loads(first.file(".run.json").read_text())
    made["sessions"][0]["versions"]["git"] = "before"
    made["sessions"][0]["versions"]["packages"]["numpy"] = "0.1"
    first.file(".run.json").write_text(json.dumps(made))
    for _ in range(2):  # the second time all rows are there
        run = start(tmp_path, seeds=2)
        assert len(run.sessions) == 2
        assert (
            run.versions["git"] == f"before, then {run.sessions[1]['versions']['git']}"
        )
        assert run.packages["numpy"] == f"0.1, then {np.__version__}"
    request = Request("small", 1, tmp_path, "hypergrad run toy", ("one",))
    run = runs.start(study(), request)
    assert run.configuration == {
        **{"scale": "small", "seeds": 2, "methods": ["one", "two"]}
    }
    assert run.facts["ended"].endswith("in 2 sessions")
    assert runs.load(run.path).manifest == run.manifest


def test_a_second_process_is_refused(tmp_path):
    """And the manifest of the first is left alone."""
    run = start(tmp_path, seeds=1)
    before = run.file(".run.json").read_bytes()
    with run.file(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is running in"):
            start(tmp_path)
    assert run.file(".run.json").read_bytes() == before


def test_an_interrupted_run_is_kept_and_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, stop=(2.0, 1))
    before = runs.load(tmp_path / "toy")
    assert before.sessions[0]["ended"] is None
    assert len(before.rows) == 3
    with before.file(".jsonl").open("a") as file:
        file.write('{"method": "tw')  # what a kill leaves
    assert len(before.rows) == 3
    with pytest.raises(ValueError, match="interrupted before its table"):
        runs.report(before, tmp_path / "page.html")
    after = start(tmp_path)
    assert after.sessions[0] == before.sessions[0]
    assert after.sessions[1]["ended"] is not None
    whole = start(tmp_path / "whole")
    assert runs.same_numbers(after, whole)


def changed(row: int) -> np.ndarray:
    x = np.arange(20.0).reshape(10, 2)
    x[row] += 1e-12
    return x


def test_other_data_are_refused_by_row(tmp_path):
    """In going on and in repeating; nothing of the run is lost."""
    first = start(tmp_path, seeds=1)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="x differs in 1 rows: 3"):
        start(tmp_path, x=changed(3))
    with pytest.raises(ValueError, match="x has 10 rows, and 4"):
        runs.again(first, study(x=np.arange(8.0).reshape(4, 2)), tmp_path / "again")
    with pytest.raises(ValueError, match="holds a run already"):
        runs.again(first, study(), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def by_key(key: jax.Array) -> list:
    """Two parts of ten rows; beside them what is no array."""
    order = jax.random.permutation(key, 10)
    return [order[:6], order[6:], len]


def by_order(key: jax.Array) -> list:
    """The same for every key but the last."""
    return by_key(key) if jax.random.key_data(key)[1] == 1 else [np.arange(10)]


def test_the_split_of_each_seed_is_kept(tmp_path):
    """As SHA-256; the same data in other parts are refused, by seed, and compared."""
    first = start(tmp_path / "a", parts=by_key)
    splits = first.manifest["data"]["splits"]
    parts = [np.asarray(part) for part in by_key(jax.random.key(1))[:2]]
    assert splits["1"] == fingerprint.digest(parts).removeprefix(fingerprint.HASH)
    assert len(set(splits.values())) == len(splits) == 2
    said = [f"seed {seed}: SHA-256 {sha256}" for seed, sha256 in splits.items()]
    assert first.facts["split"] == "; ".join(said)
    other = start(tmp_path / "b", parts=by_order)
    assert runs.compare(first, other) == [("data", "other parts for seed 0")]
    assert runs.compare(first, start(tmp_path / "c")) == []  # of before it was kept
    longer = start(tmp_path / "a", seeds=3, parts=by_key)
    assert longer.manifest["data"]["splits"].items() > splits.items()
    again = start(tmp_path / "a", seeds=1, parts=by_key)
    assert again.manifest["data"]["splits"] == longer.manifest["data"]["splits"]
    with pytest.raises(ValueError, match=r"not split as those of .*: other .* seed 0$"):
        start(tmp_path / "a", parts=by_order)
    with pytest.raises(ValueError, match=r"not split as those of .* for seed 0, 2"):
        runs.again(longer, study(parts=by_order), tmp_path / "again")


@pytest.mark.parametrize(
    "name",
    [
        name if name == "cleaning" else pytest.param(name, marks=pytest.mark.slow)
        for name in studies.STUDIES
    ],
)
def test_every_study_says_how_its_data_are_split(name: str):
    """Another seed, another split; the same seed, the same."""
    task = studies.STUDIES[name]
    made = [manifest._of_split(task, seed) for seed in (0, 0, 1)]
    assert made[0] == made[1]
    assert (made[0] == made[2]) == (name == "architecture")  # whose ranking is of one


def test_what_differs_is_named(tmp_path):
    first = start(tmp_path / "a")
    assert runs.compare(first, start(tmp_path / "b")) == []
    longer = start(tmp_path / "c", seeds=3)
    assert runs.compare(first, longer) == [
        ("configuration", "seeds: 2 | 3"),
        ("numbers", "in the second only: one, seed 2; two, seed 2"),
    ]
    other = start(tmp_path / "d", x=changed(7), shift=0.5)
    about = [about for about, _ in runs.compare(first, other)]
    texts = [text for _, text in runs.compare(first, other)]
    assert about == ["data", "data", "numbers", "numbers", "numbers"]
    assert texts[0].startswith("sha256: ")
    assert texts[1] == "x differs in 1 rows: 7"
    assert texts[2] == "score in 4 cells, most in 1.0 | 1.5 (one, seed 0)"
    assert texts[3] == "curve in 4 cells, by 0.5 at most (one, seed 0)"
    assert texts[4].startswith("data_sha256 in 4 cells")
    made = json.loads(first.file(".run.json").read_text())
    made["sessions"][0]["versions"]["packages"]["jax"] = "0.0.1"
    first.file(".run.json").write_text(json.dumps(made))
    found = runs.compare(runs.load(first.path), longer)
    assert ("versions", f"jax: 0.0.1 | {jax.__version__}") in found


def test_rows_without_a_manifest_are_lined_up(tmp_path, monkeypatch, capsys):
    """Such as committed ones: numbers, data and versions, as each row says."""
    whole, rows = start(tmp_path / "a"), start(tmp_path / "b")
    rows.file(".run.json").unlink()
    rows.file(".data.json").unlink()
    alone = runs.load(rows.path)
    assert alone.configuration == whole.configuration
    assert alone.packages["jax"] == jax.__version__
    assert runs.compare(whole, alone) == runs.compare(alone, whole) == []
    commands.compare_runs(whole.path, alone.path)
    assert f"{alone.path} is rows alone" in capsys.readouterr().out
    commands.compare_runs(whole.path, whole.path)
    assert "rows alone" not in capsys.readouterr().out
    other = start(tmp_path / "c", x=changed(7), shift=0.5)
    assert [about for about, _ in runs.compare(alone, other)] == [
        *("data", "data", "numbers", "numbers", "numbers")
    ]
    again = runs.again(alone, study(), tmp_path / "d")
    assert runs.same_numbers(alone, again)
    with pytest.raises(ValueError, match="another SHA-256"):
        runs.again(alone, study(x=changed(7)), tmp_path / "e")
    monkeypatch.chdir(Path(__file__).parents[2])
    committed = runs.load(Path("benchmarks/results/cleaning"))
    assert committed.manifest["task"] == "cleaning"
    assert committed.configuration["seeds"] == 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read"),
        ('{"format": 1, ', "cannot be read"),
        ("[]", "no manifest of format 1"),
        ('{"format": 2}', "no manifest of format 1"),
        ('{"format": 1, "task": "toy"}', "is damaged"),
        ('{"format": 1, "data": {}, "sessions": []}', "is damaged"),
        ('{"format": 1, "data": [], "sessions": [{"command": 0}]}', "is damaged"),
    ],
)
def test_a_damaged_manifest_is_no_traceback(content, message, tmp_path, capsys):
    run = start(tmp_path, seeds=1)
    run.file(".run.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        runs.load(run.path)
    start(tmp_path / "other", seeds=1)
    with pytest.raises(SystemExit, match=message):
        commands.list_runs(tmp_path)
    assert "other" in "".join(capsys.readouterr().out.split())


def test_a_run_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="hypergrad run NAME makes one"):
        runs.load(tmp_path / "none" / "toy")
    run = start(tmp_path, seeds=1)
    for path in (tmp_path / "tow", tmp_path, Path()):
        with pytest.raises(ValueError, match=f"no run {path}"):
            runs.load(path)
    with pytest.raises(ValueError, match=f"there is {run.path}"):
        runs.load(tmp_path / "tow")
    assert runs.load(run.file(".run.json")).path == run.path
    assert runs.load(run.file(".jsonl")).path == run.path


def test_the_commands(tmp_path, monkeypatch, capsys):
    """List, show, compare, rerun and report; a rerun that differs exits with 1."""
    monkeypatch.setitem(studies.STUDIES, "toy", study())
    run = start(tmp_path)
    commands.repeat_run(run.path)
    assert "the numbers are the same to the bit" in capsys.readouterr().out
    commands.list_runs(tmp_path)
    assert "toy" in capsys.readouterr().out
    commands.show_run(run.path)
    assert run.manifest["data"]["sha256"] in "".join(capsys.readouterr().out.split())
    commands.report_run(run.path)
    assert run.file(".html").exists()
    monkeypatch.setitem(studies.STUDIES, "toy", study(shift=2.0**-40))
    with pytest.raises(SystemExit, match="holds a run already"):  # of what was before
        commands.repeat_run(run.path)
    with pytest.raises(SystemExit) as stop:
        commands.repeat_run(run.path, tmp_path / "other")
    assert stop.value.code == 1
    assert "numbers: score in 4 cells" in capsys.readouterr().out
    monkeypatch.delitem(studies.STUDIES, "toy")
    with pytest.raises(SystemExit, match="there is no task 'toy'"):
        commands.repeat_run(run.path, tmp_path / "third")
    with pytest.raises(SystemExit, match="No such file"):
        commands.report_run(run.path, tmp_path / "no" / "page.html")


class Killed(BaseException):
    """No error that anything catches."""


def trained(number: float, seed: int) -> tuple:
    """A pair of known bits, 160 kB of them where the number is 2."""
    w = {"W": jnp.arange(20_000.0 if number == 2.0 else 3.0) * number, "b": [seed]}
    return w, jnp.asarray(number + seed)


def kept(folder: Path) -> list[tuple[str, str]]:
    """Versions and their arrays' SHA-256."""
    found, flaws = models.find(folder / "models")
    assert not flaws
    return [(model.reference, model.sha256) for model in found]


def test_the_models_of_the_first_seed_are_kept(tmp_path, capsys):
    """To the bit, with the numbers of their rows and all of their run; in no row."""
    toy = study(model=trained, parts=by_key)
    for name in ("a", "b"):  # whose rows are cached
        request = Request("small", 2, tmp_path / name, "hypergrad run toy")
        run = runs.start(toy, request)
        assert not any(MODEL in row for row in run.rows)
        folder = tmp_path / name / "models"
        found, flaws = models.find(folder)
        assert [model.reference for model in found] == ["toy-one@1", "toy-two@1"]
        assert not flaws
        for model, number in zip(found, (1.0, 2.0), strict=True):
            pair = models.load(model.reference, folder=folder)
            assert fingerprint.digest(pair) == fingerprint.digest(trained(number, 0))
            assert model.metrics == {"score": number}
            assert model.run["versions"] == run.sessions[0]["versions"]
            data = model.run["data"]
            assert data["sha256"] == run.rows[0]["data_sha256"]
            assert data["split"] == run.manifest["data"]["splits"]["0"]
        assert list(run.models) == [("one", 0), ("two", 0)]
    runs.start(toy, request)  # measures nothing
    assert kept(tmp_path / "b") == kept(tmp_path / "a")
    model_commands.list_models(folder)
    assert "toy-two@1" in (shown := "".join(capsys.readouterr().out.split()))
    assert str(run.path) in shown
    commands.show_run(run.path)
    model_commands.show_model("toy-one", folder)
    whole = lambda text: "".join(text.replace("│", " ").split())
    shown = whole(capsys.readouterr().out)
    assert whole(f"toy-one@1, toy-two@1 in {folder}") in shown
    for said in (run.facts["data"], run.facts["split"].split("; ")[0]):
        assert shown.count(whole(said)) == 2  # the run and the model say the same


@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [
        (atomic_io, "append_durably", 0),
        (atomic_io, "append_durably", 1),
        (models, "save", 1),
    ],
)
def test_a_model_is_kept_once_however_often_it_is_killed(
    owner, name: str, at: int, tmp_path, monkeypatch
):
    """Between model and row, and before the model: no row is ever without its own."""
    whole = start(tmp_path / "whole", model=trained)
    for _ in range(2):
        calls, real = itertools.count(), getattr(owner, name)

        def dies(*given, calls=calls, real=real, **named):
            if next(calls) == at:
                raise Killed
            return real(*given, **named)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dies)
            with contextlib.suppress(Killed):
                start(tmp_path / "killed", model=trained)
        run = runs.load(tmp_path / "killed" / "toy")
        first = {row["method"] for row in run.rows if row["seed"] == 0}
        assert {(method, 0) for method in first} <= run.models.keys()
    after = start(tmp_path / "killed", model=trained)
    assert runs.same_numbers(after, whole)
    assert kept(tmp_path / "killed") == kept(tmp_path / "whole")
    assert after.models.keys() == whole.models.keys() == {("one", 0), ("two", 0)}


def test_a_model_of_other_bits_or_of_another_run_is_a_new_version(
    tmp_path, monkeypatch
):
    """So that of a row the newest is its own."""
    with monkeypatch.context() as patch:
        patch.setattr(
            atomic_io, "append_durably", lambda *_: (_ for _ in ()).throw(Killed)
        )
        with pytest.raises(Killed):
            start(tmp_path, seeds=1, model=trained)
    shifted = lambda number, seed: trained(number + 2.0**-40, seed)
    run = start(tmp_path, seeds=1, model=shifted)
    assert [name for name, _ in kept(tmp_path)] == [
        "toy-one@1",
        "toy-one@2",
        "toy-two@1",
    ]
    assert run.models["one", 0].version == 2
    for path in tmp_path.glob("toy.*"):
        path.unlink()
    monkeypatch.setattr(manifest, "utc_now", lambda: "2000-01-01T00:00:00+00:00")
    other = start(tmp_path, seeds=1, model=shifted)  # its bits are those of the first
    assert other.models["one", 0].version == 3
    assert other.models["two", 0].version == 2


def test_a_model_that_cannot_be_saved_stops_the_run_in_words(tmp_path, monkeypatch):
    """On a disk that is full, and where no folder can be; it goes on from there."""
    monkeypatch.setitem(studies.STUDIES, "toy", study(model=trained))
    whole = start(tmp_path / "whole", model=trained)
    run = lambda folder: cli.run("toy", seeds=2, out=tmp_path / folder)
    size = resource.RLIMIT_FSIZE
    limits = resource.getrlimit(size)
    try:
        resource.setrlimit(size, (100_000, limits[1]))
        with pytest.raises(
            SystemExit,
            match=r"toy-two could not be saved in \S*models \(File too large\).*"
            "the same command",
        ):
            run("full")
    finally:
        resource.setrlimit(size, limits)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "models").write_text("")
    with pytest.raises(SystemExit, match=r"hypergrad: .*toy-one could not be saved in"):
        run("none")
    (tmp_path / "none" / "models").unlink()
    for folder, rows in (("full", 2), ("none", 0)):
        assert len(runs.load(tmp_path / folder / "toy").rows) == rows
        run(folder)
        assert runs.same_numbers(runs.load(tmp_path / folder / "toy"), whole)
        assert kept(tmp_path / folder) == kept(tmp_path / "whole")


def test_models_of_two_runs_are_lined_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(studies.STUDIES, "toy", study(model=trained))
    run = start(tmp_path / "a", model=trained)
    commands.repeat_run(run.path)
    shown = capsys.readouterr().out
    assert "the numbers are the same to the bit" in shown
    assert "the models that both kept are the same to the bit" in shown
    shifted = lambda number, seed: trained(number + 2.0**-40 * (number == 1.0), seed)
    other = start(tmp_path / "b", model=shifted)
    said = ("models", "toy-one@1 | toy-one@1: other arrays")
    assert runs.compare(run, other) == [said]
    commands.compare_runs(run.path, other.path)
    assert "both kept are" not in capsys.readouterr().out
    file = tmp_path / "a" / "rerun" / "models" / "toy-two" / "1" / "arrays.npz"
    file.write_bytes(file.read_bytes()[:-1])  # its SHA-256 is still written beside it
    commands.compare_runs(run.path, tmp_path / "a" / "rerun" / "toy")
    shown = capsys.readouterr().out
    assert f"models: the model {file.parent} is damaged" in shown
    assert "both kept are" not in shown


def test_every_method_names_a_model_of_its_own():
    names = [
        manifest.model_name(task, method)
        for task in studies.STUDIES.values()
        for method in task.methods
    ]
    assert len(set(names)) == len(names)
    assert all(store.NAME.fullmatch(name) for name in names)


def test_the_page_needs_nothing_beside_it(tmp_path):
    run = start(tmp_path)
    page = tmp_path / "elsewhere" / "page.html"
    page.parent.mkdir()
    runs.report(run, page)
    text = page.read_text()
    assert "a &lt;test&gt; &amp; its author" in text
    for row in run.file(".md").read_text().splitlines():
        if row.startswith("| one"):
            cells = [cell.strip() for cell in row[1:-1].split("|")]
            assert "".join(f"<td>{cell}</td>" for cell in cells) in text
    assert base64.b64encode(run.file(".png").read_bytes()).decode() in text
    assert "href=" not in text
    assert text.count("src=") == 1


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_shows_the_page(tmp_path):
    """Its own count of tables, rows, pictures that it could draw, and errors."""
    run = start(tmp_path)
    page = tmp_path / "page.html"
    runs.report(run, page)
    ask = """<script>onload = () => { document.title = [
        document.querySelectorAll('table').length,
        document.querySelectorAll('tbody')[0].rows.length,
        [...document.images].map(x => x.complete && x.naturalWidth),
        getComputedStyle(document.body).maxWidth].join(' ') }</script></body>"""
    page.write_text(page.read_text().replace("</body>", ask))
    found = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "<title>1 2 200 992px</title>" in found.stdout
