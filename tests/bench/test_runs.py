"""Saved runs: manifests, interruption, comparison, repetition, models and reports."""

import base64
import contextlib
import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import resource
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from hypergrad import cli, models, runs, studies
from hypergrad.models import store
from hypergrad.runs import commands, manifest, model_commands
from hypergrad.runs.data import split_sha256
from hypergrad.runtime import atomic_io, fingerprint
from hypergrad.runtime.provenance import source_commit
from hypergrad.studies.study import MODEL
from hypergrad.studies.table import Request
from tests.bench.toy_study import (
    COMMAND,
    X,
    Y,
    make_model,
    make_shifted_model,
    make_study,
    run_study,
    split_by_key,
    split_in_order,
)

ROOT = Path(__file__).parents[2]


def change_row(i: int) -> np.ndarray:
    """Returns the data with a changed row."""
    x = X.copy()
    x[i] += 1e-12
    return x


def edit_manifest(run: runs.Run, edit) -> None:
    """Applies a function to the first session of a manifest file."""
    content = json.loads(run.file(".run.json").read_text())
    edit(content["sessions"][0])
    run.file(".run.json").write_text(json.dumps(content))


# Manifests.


def test_manifest_contains_data_configuration_and_versions(tmp_path):
    run = run_study(tmp_path)
    saved = runs.load(tmp_path / "toy").manifest
    assert saved == run.manifest
    digest = hashlib.sha256(b"x" + X.tobytes() + b"y" + Y.tobytes()).hexdigest()
    assert saved["data"]["sha256"] == digest
    assert saved["data"]["arrays"] == {"x": ["float64", 10, 2], "y": ["int64", 10]}
    (session,) = saved["sessions"]
    expected = {"scale": "small", "seeds": 2, "methods": ["one", "two"]}
    assert session["configuration"] == expected
    assert session["command"] == COMMAND
    assert session["started"] <= session["ended"]
    assert run.packages["jax"] == jax.__version__
    assert run.packages["numpy"] == importlib.metadata.version("numpy")
    assert run.versions["float"] == "float64"
    assert [row["score"] for row in run.rows] == [1.0, 2.0, 2.0, 3.0]
    assert run.metadata["methods"] == "one, two"


def test_source_commit_is_marked_if_the_package_was_changed(tmp_path):
    """It is None outside of a checkout, or in a checkout of something else."""
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "inner" / "newton.py").write_text("steps = 1")
    assert source_commit(package) is None
    git = lambda *args: subprocess.run(
        ["git", "-C", str(tmp_path), *args], capture_output=True, text=True, check=True
    )
    git("init")
    assert source_commit(package) is None  # as a checkout around site-packages
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "Begin")
    head = git("rev-parse", "HEAD").stdout.strip()
    (tmp_path / "notes.txt").write_text("")
    assert source_commit(package) == head
    (package / "inner" / "newton.py").write_text("steps = 2")
    assert source_commit(package) == head + "+"


def test_versions_of_all_sessions_are_listed(tmp_path):
    """A call that measures no row is not a session."""

    def set_old_versions(session):
        session["versions"]["git"] = "before"
        session["versions"]["packages"]["numpy"] = "0.1"

    edit_manifest(run_study(tmp_path, seeds=1), set_old_versions)
    for _ in range(2):  # the second call finds all rows
        run = run_study(tmp_path, seeds=2)
        assert len(run.sessions) == 2
        new_commit = run.sessions[1]["versions"]["git"]
        assert run.versions["git"] == f"before, then {new_commit}"
        assert run.packages["numpy"] == f"0.1, then {np.__version__}"
    request = Request("small", 1, tmp_path, COMMAND, ("one",))
    run = runs.start_run(make_study(), request)
    expected = {"scale": "small", "seeds": 2, "methods": ["one", "two"]}
    assert run.configuration == expected
    assert run.metadata["ended"].endswith("in 2 sessions")
    assert runs.load(run.path).manifest == run.manifest


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"format": 1, ',
        "[]",
        '{"format": 2}',
        '{"format": 1, "task": "toy"}',
        '{"format": 1, "data": {}, "sessions": []}',
        '{"format": 1, "data": [], "sessions": [{"command": 0}]}',
    ],
)
def test_damaged_manifest_is_reported_and_other_runs_are_listed(
    content, tmp_path, capsys
):
    run = run_study(tmp_path, seeds=1)
    run.file(".run.json").write_text(content)
    with pytest.raises(ValueError, match=r"toy\.run\.json"):
        runs.load(run.path)
    run_study(tmp_path / "other", seeds=1)
    with pytest.raises(SystemExit, match=r"toy\.run\.json"):
        commands.list_runs(tmp_path)
    assert "other" in "".join(capsys.readouterr().out.split())


def test_run_is_loaded_by_its_path_or_one_of_its_files(tmp_path):
    with pytest.raises(ValueError, match="path"):
        runs.load(tmp_path / "none" / "toy")
    run = run_study(tmp_path, seeds=1)
    for path in (tmp_path / "tow", tmp_path, Path()):
        with pytest.raises(ValueError, match="path"):
            runs.load(path)
    with pytest.raises(ValueError, match=str(run.path)):  # a hint
        runs.load(tmp_path / "tow")
    assert runs.load(run.file(".run.json")).path == run.path
    assert runs.load(run.file(".jsonl")).path == run.path


# Interruption, and changed data.


def test_second_process_is_refused(tmp_path):
    """The manifest of the first one does not change."""
    run = run_study(tmp_path, seeds=1)
    content = run.file(".run.json").read_bytes()
    with run.file(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process"):
            run_study(tmp_path)
    assert run.file(".run.json").read_bytes() == content


def test_interrupted_run_continues(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_study(tmp_path, interrupted_cell=(2.0, 1))
    interrupted = runs.load(tmp_path / "toy")
    assert interrupted.sessions[0]["ended"] is None
    assert len(interrupted.rows) == 3
    with interrupted.file(".jsonl").open("a") as file:
        file.write('{"method": "tw')  # as a killed process leaves it
    assert len(interrupted.rows) == 3
    with pytest.raises(ValueError, match="run"):
        runs.write_report(interrupted, tmp_path / "page.html")
    continued = run_study(tmp_path)
    assert continued.sessions[0] == interrupted.sessions[0]
    assert continued.sessions[1]["ended"] is not None
    assert runs.have_equal_numbers(continued, run_study(tmp_path / "uninterrupted"))


def test_changed_data_are_refused_by_row(tmp_path):
    """A run neither continues nor repeats with them, and its files do not change."""
    run = run_study(tmp_path, seeds=1)
    contents = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="x differs in 1 rows: 3"):
        run_study(tmp_path, x=change_row(3))
    with pytest.raises(ValueError, match="x has 10 and 4 rows"):
        runs.rerun(run, make_study(x=X[:4]), tmp_path / "rerun")
    with pytest.raises(ValueError, match="--out"):
        runs.rerun(run, make_study(), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == contents


def test_changed_splits_are_refused_by_seed(tmp_path):
    """The manifest contains a SHA-256 per seed; only seeds of both are compared."""
    run = run_study(tmp_path / "a", split=split_by_key)
    splits = run.manifest["data"]["splits"]
    arrays = [np.asarray(x) for x in split_by_key(jax.random.key(1))[:2]]
    assert splits["1"] == fingerprint.digest(arrays).removeprefix(fingerprint.HASH)
    assert len(set(splits.values())) == len(splits) == 2
    texts = [f"seed {seed}: SHA-256 {sha256}" for seed, sha256 in splits.items()]
    assert run.metadata["split"] == "; ".join(texts)
    other = run_study(tmp_path / "b", split=split_in_order)
    ((category, text),) = runs.compare(run, other)
    assert category == "data"
    assert text.endswith("seed 0")
    assert runs.compare(run, run_study(tmp_path / "c")) == []  # without splits
    longer = run_study(tmp_path / "a", seeds=3, split=split_by_key)
    assert longer.manifest["data"]["splits"].items() > splits.items()
    shorter = run_study(tmp_path / "a", seeds=1, split=split_by_key)
    assert shorter.manifest["data"]["splits"] == longer.manifest["data"]["splits"]
    with pytest.raises(ValueError, match=r"seed 0\.$"):
        run_study(tmp_path / "a", split=split_in_order)
    with pytest.raises(ValueError, match=r"seed 0, 2\.$"):
        runs.rerun(longer, make_study(split=split_in_order), tmp_path / "rerun")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name != "cleaning"))
        for name in studies.STUDIES
    ],
)
def test_split_of_every_study_depends_on_the_seed_alone(name):
    study = studies.STUDIES[name]
    first, repeated, other = (split_sha256(study, seed) for seed in (0, 0, 1))
    assert first == repeated
    has_fixed_split = name == "architecture"  # its ranking is of one split
    assert (first == other) == has_fixed_split


# Comparison and commands.


def test_compare_names_every_difference(tmp_path):
    run = run_study(tmp_path / "a")
    assert runs.compare(run, run_study(tmp_path / "b")) == []
    longer = run_study(tmp_path / "c", seeds=3)
    assert runs.compare(run, longer) == [
        ("configuration", "seeds: 2 | 3"),
        ("numbers", "only in the second: one, seed 2; two, seed 2"),
    ]
    other = run_study(tmp_path / "d", x=change_row(7), shift=0.5)
    categories, texts = zip(*runs.compare(run, other), strict=True)
    assert categories == ("data", "data", "numbers", "numbers", "numbers")
    assert texts[0].startswith("sha256: ")
    assert texts[1] == "x differs in 1 rows: 7"
    assert texts[2].startswith("score differs in 4 cells")
    assert texts[2].endswith("1.0 | 1.5 (one, seed 0)")
    assert texts[3].startswith("curve differs in 4 cells")
    assert texts[3].endswith("0.5 (one, seed 0)")
    assert texts[4].startswith("data_sha256 differs in 4 cells")

    def set_old_jax(session):
        session["versions"]["packages"]["jax"] = "0.0.1"

    edit_manifest(run, set_old_jax)
    differences = runs.compare(runs.load(run.path), longer)
    assert ("versions", f"jax: 0.0.1 | {jax.__version__}") in differences


def test_rows_without_a_manifest_can_be_compared_and_repeated(
    tmp_path, monkeypatch, capsys
):
    """Committed tables are such rows: they contain numbers, data and versions."""
    run, rows = run_study(tmp_path / "a"), run_study(tmp_path / "b")
    rows.file(".run.json").unlink()
    rows.file(".data.json").unlink()
    rows = runs.load(rows.path)
    assert rows.configuration == run.configuration
    assert rows.packages["jax"] == jax.__version__
    assert runs.compare(run, rows) == runs.compare(rows, run) == []
    commands.compare_runs(run.path, rows.path)
    assert f"{rows.path} has no manifest" in capsys.readouterr().out
    commands.compare_runs(run.path, run.path)
    assert "no manifest" not in capsys.readouterr().out
    other = run_study(tmp_path / "c", x=change_row(7), shift=0.5)
    categories = [category for category, _ in runs.compare(rows, other)]
    assert categories == ["data", "data", "numbers", "numbers", "numbers"]
    repetition = runs.rerun(rows, make_study(), tmp_path / "d")
    assert runs.have_equal_numbers(rows, repetition)
    with pytest.raises(ValueError, match="SHA-256"):
        runs.rerun(rows, make_study(x=change_row(7)), tmp_path / "e")
    monkeypatch.chdir(ROOT)
    committed = runs.load(Path("benchmarks/results/cleaning"))
    assert committed.manifest["task"] == "cleaning"
    assert committed.configuration["seeds"] == 10


def test_commands_list_show_report_and_repeat(tmp_path, monkeypatch, capsys):
    """A repetition with other numbers exits with code 1."""
    monkeypatch.setitem(studies.STUDIES, "toy", make_study())
    run = run_study(tmp_path)
    commands.repeat_run(run.path)
    assert "numbers are equal" in capsys.readouterr().out
    commands.list_runs(tmp_path)
    assert "toy" in capsys.readouterr().out
    commands.show_run(run.path)
    assert run.manifest["data"]["sha256"] in "".join(capsys.readouterr().out.split())
    commands.report_run(run.path)
    assert run.file(".html").exists()
    monkeypatch.setitem(studies.STUDIES, "toy", make_study(shift=2.0**-40))
    with pytest.raises(SystemExit, match="--out"):  # contains the first repetition
        commands.repeat_run(run.path)
    with pytest.raises(SystemExit) as exit_info:
        commands.repeat_run(run.path, tmp_path / "other")
    assert exit_info.value.code == 1
    assert "numbers: score differs in 4 cells" in capsys.readouterr().out
    monkeypatch.delitem(studies.STUDIES, "toy")
    with pytest.raises(SystemExit, match="task"):
        commands.repeat_run(run.path, tmp_path / "third")
    with pytest.raises(SystemExit, match="No such file"):
        commands.report_run(run.path, tmp_path / "no" / "page.html")


# Models of runs.


class Killed(BaseException):
    """Stands for a kill: no code catches it."""


def saved_models(folder: Path) -> list[tuple[str, str]]:
    """Returns the references of saved models and the SHA-256 of their arrays."""
    found, errors = models.find(folder / "models")
    assert not errors
    return [(model.reference, model.sha256) for model in found]


def test_models_of_the_first_seed_are_saved(tmp_path, capsys):
    """They are equal to the bit, with the numbers of their rows and their run."""
    study = make_study(model=make_model, split=split_by_key)
    for name in ("a", "b"):  # the second run finds cached rows
        request = Request("small", 2, tmp_path / name, COMMAND)
        run = runs.start_run(study, request)
        assert not any(MODEL in row for row in run.rows)
        folder = tmp_path / name / "models"
        found, errors = models.find(folder)
        assert [model.reference for model in found] == ["toy-one@1", "toy-two@1"]
        assert not errors
        for model, number in zip(found, (1.0, 2.0), strict=True):
            loaded = models.load(model.reference, folder=folder)
            expected = make_model(number, 0)
            assert fingerprint.digest(loaded) == fingerprint.digest(expected)
            assert model.metrics == {"score": number}
            assert model.run["versions"] == run.sessions[0]["versions"]
            data = model.run["data"]
            assert data["sha256"] == run.rows[0]["data_sha256"]
            assert data["split"] == run.manifest["data"]["splits"]["0"]
        assert list(run.models) == [("one", 0), ("two", 0)]
    runs.start_run(study, request)  # measures nothing
    assert saved_models(tmp_path / "b") == saved_models(tmp_path / "a")
    model_commands.list_models(folder)
    output = "".join(capsys.readouterr().out.split())
    assert "toy-two@1" in output
    assert str(run.path) in output
    commands.show_run(run.path)
    model_commands.show_model("toy-one", folder)
    remove_spaces = lambda text: "".join(text.replace("│", " ").split())
    output = remove_spaces(capsys.readouterr().out)
    assert remove_spaces(f"toy-one@1, toy-two@1 in {folder}") in output
    for text in (run.metadata["data"], run.metadata["split"].split("; ")[0]):
        assert output.count(remove_spaces(text)) == 2  # in the run and in the model


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (atomic_io, "append_durably", 0),
        (atomic_io, "append_durably", 1),
        (models, "save", 1),
    ],
    ids=["first row", "second row", "second model"],
)
def test_killed_runs_save_each_model_once(owner, name, call, tmp_path, monkeypatch):
    """A model is saved before its row, so that no row is without its model."""
    expected = run_study(tmp_path / "unbroken", model=make_model)
    for _ in range(2):
        calls, function = itertools.count(), getattr(owner, name)

        def die(*args, calls=calls, function=function, **kwargs):
            if next(calls) == call:
                raise Killed
            return function(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, die)
            with contextlib.suppress(Killed):
                run_study(tmp_path / "killed", model=make_model)
        run = runs.load(tmp_path / "killed" / "toy")
        cells = {(row["method"], 0) for row in run.rows if row["seed"] == 0}
        assert cells <= run.models.keys()
    run = run_study(tmp_path / "killed", model=make_model)
    assert runs.have_equal_numbers(run, expected)
    assert saved_models(tmp_path / "killed") == saved_models(tmp_path / "unbroken")
    assert run.models.keys() == expected.models.keys() == {("one", 0), ("two", 0)}


def test_model_with_other_bits_or_of_another_run_is_a_new_version(
    tmp_path, monkeypatch
):
    """The newest version is therefore the model of the row."""

    def die(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(atomic_io, "append_durably", die)
        with pytest.raises(Killed):
            run_study(tmp_path, seeds=1, model=make_model)
    run = run_study(tmp_path, seeds=1, model=make_shifted_model)
    references = [reference for reference, _ in saved_models(tmp_path)]
    assert references == ["toy-one@1", "toy-one@2", "toy-two@1"]
    assert run.models["one", 0].version == 2
    for path in tmp_path.glob("toy.*"):
        path.unlink()
    monkeypatch.setattr(manifest, "utc_now", lambda: "2000-01-01T00:00:00+00:00")
    other = run_study(tmp_path, seeds=1, model=make_shifted_model)  # equal bits
    assert other.models["one", 0].version == 3
    assert other.models["two", 0].version == 2


def test_run_stops_if_a_model_cannot_be_saved_and_continues_later(
    tmp_path, monkeypatch
):
    """The disk is full, or the folder of models is a file."""
    monkeypatch.setitem(studies.STUDIES, "toy", make_study(model=make_model))
    expected = run_study(tmp_path / "unbroken", model=make_model)
    run = lambda folder: cli.run("toy", seeds=2, out=tmp_path / folder)
    size = resource.RLIMIT_FSIZE
    limits = resource.getrlimit(size)
    try:
        resource.setrlimit(size, (100_000, limits[1]))
        with pytest.raises(SystemExit, match=r"toy-two.*File too large"):
            run("full")
    finally:
        resource.setrlimit(size, limits)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "models").write_text("")
    with pytest.raises(SystemExit, match="toy-one"):
        run("none")
    (tmp_path / "none" / "models").unlink()
    for folder, num_rows in (("full", 2), ("none", 0)):
        path = tmp_path / folder
        assert len(runs.load(path / "toy").rows) == num_rows
        run(folder)
        assert runs.have_equal_numbers(runs.load(path / "toy"), expected)
        assert saved_models(path) == saved_models(tmp_path / "unbroken")


def test_models_of_two_runs_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(studies.STUDIES, "toy", make_study(model=make_model))
    run = run_study(tmp_path / "a", model=make_model)
    commands.repeat_run(run.path)
    output = capsys.readouterr().out
    assert "numbers are equal" in output
    assert "models that both runs saved are equal" in output
    shift_first = lambda number, seed: (
        make_shifted_model(number, seed) if number == 1.0 else make_model(number, seed)
    )
    other = run_study(tmp_path / "b", model=shift_first)
    ((category, text),) = runs.compare(run, other)
    assert category == "models"
    assert text.startswith("toy-one@1 | toy-one@1")
    commands.compare_runs(run.path, other.path)
    assert "both runs saved are equal" not in capsys.readouterr().out
    file = tmp_path / "a" / "rerun" / "models" / "toy-two" / "1" / "arrays.npz"
    file.write_bytes(file.read_bytes()[:-1])  # the saved SHA-256 does not change
    commands.compare_runs(run.path, tmp_path / "a" / "rerun" / "toy")
    output = capsys.readouterr().out
    assert f"models: the model {file.parent} is damaged" in output
    assert "both runs saved are equal" not in output


def test_model_names_are_valid_and_distinct():
    names = [
        manifest.model_name(study, method)
        for study in studies.STUDIES.values()
        for method in study.methods
    ]
    assert len(set(names)) == len(names)
    assert all(store.NAME.fullmatch(name) for name in names)


# Reports.


def test_report_is_self_contained(tmp_path):
    run = run_study(tmp_path)
    page = tmp_path / "elsewhere" / "page.html"
    page.parent.mkdir()
    runs.write_report(run, page)
    text = page.read_text()
    assert "a &lt;test&gt; &amp; its author" in text
    for line in run.file(".md").read_text().splitlines():
        if line.startswith("| one"):
            cells = [cell.strip() for cell in line[1:-1].split("|")]
            assert "".join(f"<td>{cell}</td>" for cell in cells) in text
    assert base64.b64encode(run.file(".png").read_bytes()).decode() in text
    assert "href=" not in text
    assert text.count("src=") == 1


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_browser_renders_the_report(tmp_path):
    """The browser counts tables, rows and images, and applies the style."""
    run = run_study(tmp_path)
    page = tmp_path / "page.html"
    runs.write_report(run, page)
    script = """<script>onload = () => { document.title = [
        document.querySelectorAll('table').length,
        document.querySelectorAll('tbody')[0].rows.length,
        [...document.images].map(x => x.complete && x.naturalWidth),
        getComputedStyle(document.body).maxWidth].join(' ') }</script></body>"""
    page.write_text(page.read_text().replace("</body>", script))
    result = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "<title>1 2 200 992px</title>" in result.stdout
