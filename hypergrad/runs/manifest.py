"""Runs of studies: the rows, and a manifest of everything that determined them.

A run is named by the path of its files without their endings: ``runs/cleaning`` stands
for ``runs/cleaning.run.json``, ``runs/cleaning.jsonl`` and so on.
"""

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import models
from ..checkpoint import lock_file
from ..models import Model
from ..runtime import atomic_io
from ..runtime.provenance import utc_now, versions
from ..studies import record
from ..studies.record import Row
from ..studies.study import Study, table
from ..studies.table import Request, make_folder
from .data import (
    data_text,
    describe_data,
    describe_row_differences,
    describe_split_differences,
    row_digests,
    split_text,
)

MANIFEST, DIGESTS, MODELS = ".run.json", ".data.json", "models"
FORMAT = 1

# Entries of a saved model that identify the cell of its run.
CELL = ("task", "started", "method", "seed")


@dataclass(frozen=True)
class Run:
    """A run that was saved.

    Attributes:
      path: Path of its files without their endings.
      manifest: Format, task, data, and a session for each call that measured rows. The
        manifest of rows that were saved alone has no format.
    """

    path: Path
    manifest: Row

    def file(self, ending: str) -> Path:
        """Returns the path of one of its files: ``run.file(".png")`` is its figure."""
        return self.path.with_name(self.path.name + ending)

    @property
    def rows(self) -> list[Row]:
        """A row per measured cell; an incomplete last line is ignored."""
        file = self.file(".jsonl")
        return record.read(file, whole=False) if file.exists() else []

    @property
    def sessions(self) -> list[Row]:
        """Command, configuration, times and versions of each session."""
        return self.manifest["sessions"]

    @property
    def configuration(self) -> Row:
        """Scale, number of seeds and methods of all sessions together."""
        configurations = [session["configuration"] for session in self.sessions]
        methods = dict.fromkeys(name for c in configurations for name in c["methods"])
        return {
            "scale": configurations[-1]["scale"],
            "seeds": max(c["seeds"] for c in configurations),
            "methods": list(methods),
        }

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the machine and the source, without the packages."""
        return self._merge_sessions(
            {k: v for k, v in session["versions"].items() if k != "packages"}
            for session in self.sessions
        )

    @property
    def packages(self) -> dict[str, str]:
        """Versions of the packages by name."""
        return self._merge_sessions(
            session["versions"]["packages"] for session in self.sessions
        )

    @staticmethod
    def _merge_sessions(session_fields: Iterable[Row]) -> dict[str, str]:
        """Returns a text per field; if sessions differ, it lists their values."""
        session_fields = list(session_fields)
        names = dict.fromkeys(name for fields in session_fields for name in fields)
        return {
            name: ", then ".join(
                dict.fromkeys(str(fields.get(name)) for fields in session_fields)
            )
            for name in names
        }

    @property
    def metadata(self) -> dict[str, str]:
        """Everything in the manifest except the packages, as texts."""
        data, last_session = self.manifest["data"], self.sessions[-1]
        num_sessions = len(self.sessions)
        suffix = f", in {num_sessions} sessions" if num_sessions > 1 else ""
        splits = data.get("splits") or {}
        metadata = {
            "command": f"`{last_session['command']}`",
            "started": self.sessions[0]["started"],
            "ended": (last_session["ended"] or "not yet") + suffix,
            **self.configuration,
            "data": data_text(data),
        }
        if splits:
            metadata["split"] = "; ".join(split_text(*x) for x in splits.items())
        metadata |= self.versions
        to_text = lambda x: ", ".join(x) if isinstance(x, list) else str(x)
        return {name: to_text(value) for name, value in metadata.items()}

    @property
    def model_folder(self) -> Path:
        """Folder of the models of all runs in the same folder."""
        return self.path.parent / MODELS

    @property
    def models(self) -> dict[tuple[str, int], Model]:
        """The newest saved model of each cell, by method and seed.

        Unreadable models are ignored; ``hypergrad models list`` reports them.
        """
        identity = {
            "task": self.manifest["task"],
            "started": self.sessions[0]["started"],
        }
        return {
            (model.run["method"], model.run["seed"]): model
            for model in models.find(self.model_folder)[0]
            if identity.items() <= model.run.items()
        }

    @property
    def digests(self) -> dict[str, list[str]]:
        """A digest per row of each data array; empty for rows without a manifest."""
        return _read_json(self.file(DIGESTS)) if "format" in self.manifest else {}


# Reading.


def find(root: Path) -> tuple[list[Run], list[str]]:
    """Returns all runs below a folder, oldest first, and errors of unreadable ones."""
    runs, errors = [], []
    for path in sorted(root.rglob(f"*{MANIFEST}")):
        try:
            runs.append(load(path))
        except ValueError as error:
            errors.append(str(error))
    return sorted(runs, key=lambda run: run.sessions[0]["started"]), errors


def load(path: Path) -> Run:
    """Returns the run of a path such as ``runs/cleaning`` or of one of its files.

    The manifest of rows without one is composed of what each row contains.

    Raises:
      ValueError: The run does not exist, or its manifest cannot be read.
    """
    if path.name:
        stem = path.with_name(path.name.removesuffix(MANIFEST))
        for candidate in (stem, stem.with_suffix("")):
            run = Run(candidate, {})
            if (file := run.file(MANIFEST)).exists():
                return _check_manifest(file, Run(candidate, _read_json(file)))
            if run.rows:
                return Run(candidate, _manifest_from_rows(run.rows))
    folder = path if path.is_dir() else path.parent
    names = sorted(x.name.removesuffix(MANIFEST) for x in folder.glob(f"*{MANIFEST}"))
    if names:
        hint = f"Existing runs: {', '.join(str(folder / name) for name in names)}."
    else:
        hint = "Make one with hypergrad run NAME."
    raise ValueError(f"path must be the path of a run; got {path}. {hint}")


def _check_manifest(file: Path, run: Run) -> Run:
    """Raises ValueError unless a manifest contains everything that a run returns."""
    if not isinstance(run.manifest, dict) or run.manifest.get("format") != FORMAT:
        raise ValueError(f"{file} is not a manifest of format {FORMAT}.")
    try:
        _ = run.metadata, run.packages, run.manifest["data"]["arrays"].items()
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error!r}).") from error
    return run


def _manifest_from_rows(rows: list[Row]) -> Row:
    """Returns the part of a manifest that the rows themselves contain."""
    last = rows[-1]
    packages = {name: last.get(name) for name in record.PACKAGES}
    session = {
        "command": last.get("command"),
        "configuration": {
            "scale": last.get("scale"),
            "seeds": 1 + max(row["seed"] for row in rows),
            "methods": list(dict.fromkeys(row["method"] for row in rows)),
        },
        "started": "not kept",
        "ended": "not kept",
        "versions": {
            "python": last.get("python"),
            "device": last.get("device"),
            "packages": packages,
        },
    }
    data = {"name": last.get("data"), "sha256": last.get("data_sha256"), "arrays": {}}
    return {"task": last.get("table"), "data": data, "sessions": [session]}


# Running.


def start_run(study: Study, request: Request) -> Run:
    """Runs a study, or continues it, and saves its manifest beside the rows.

    A call that measures no row does not change the manifest. For each method the model
    on which the row of the first seed was measured is saved in the folder ``models``,
    if the study returns one. It is saved before the row and only once, even if the run
    is killed.

    Raises:
      ValueError: The folder contains a run on other data or one that is running, or
        the study raises one.
      OSError: The disk is full or the folder read-only. Completed rows are kept, each
        with its model, and the same call continues from them.
    """
    make_folder(request.folder)
    _, arrays = study.data()
    run = Run(request.folder / study.name, {"format": FORMAT, "task": study.name})
    with run.file(".lock").open("a") as lock:
        lock_file(lock, run.path)
        run.manifest.update(data=describe_data(study, request.seeds), sessions=[])
        if run.file(MANIFEST).exists():
            saved = load(run.path)
            _check_data(saved, run.manifest["data"], arrays)
            saved_splits = saved.manifest["data"].get("splits", {})
            run.manifest["data"]["splits"] |= saved_splits
            run.sessions.extend(saved.sessions)
        num_saved = len(run.rows)
        run.sessions.append(_new_session(study, request))
        _write_json(run.file(DIGESTS), row_digests(arrays))
        _write_json(run.file(MANIFEST), run.manifest)
        runnable = table(study, functools.partial(_save_model, run, study))
        try:
            runnable.run(runnable, request)
            run.sessions[-1]["ended"] = utc_now()
        finally:
            if len(run.rows) == num_saved and len(run.sessions) > 1:
                run.sessions.pop()
            _write_json(run.file(MANIFEST), run.manifest)
    return run


def rerun(run: Run, study: Study, folder: Path) -> Run:
    """Repeats a run in another folder.

    Raises:
      ValueError: The data differ from those of the run, or the folder contains a run.
    """
    if (folder / (run.path.name + MANIFEST)).exists():
        raise ValueError(
            f"--out must be a folder without a run of this name; got {folder}, whose "
            "rows would be taken for those of the repetition."
        )
    configuration = run.configuration
    data = describe_data(study, configuration["seeds"])
    _check_data(run, data, study.data()[1])
    unknown = set(configuration["methods"]) - set(study.methods)
    if unknown:
        raise ValueError(
            f"{run.path} has methods that {study.name} no longer has: "
            f"{', '.join(sorted(unknown))}."
        )
    methods = tuple(m for m in study.methods if m in configuration["methods"])
    command = f"hypergrad runs rerun {run.path} --out {folder}"
    scale, num_seeds = configuration["scale"], configuration["seeds"]
    return start_run(study, Request(scale, num_seeds, folder, command, methods))


def model_name(study: Study, method: str) -> str:
    """Returns the name under which the models of a method are saved."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", f"{study.name}-{method}")


def _save_model(run: Run, study: Study, cell: Row, row: Row, model: tuple) -> None:
    """Saves the model of a cell of the first seed, unless it is saved already.

    A run that is killed between model and row measures the row again.
    """
    if cell["seed"] != 0:
        return
    session, data = run.sessions[-1], run.manifest["data"]
    split = data["splits"].get(str(cell["seed"]))
    models.save(
        model_name(study, cell["method"]),
        *model,
        folder=run.model_folder,
        metrics={
            column.name: row[column.name]
            for column in study.columns
            if row.get(column.name) is not None
        },
        run={
            "command": session["command"],
            "run": str(run.path),
            "task": study.name,
            "started": run.sessions[0]["started"],
            **cell,
            "setting": row.get("setting"),
            "configuration": session["configuration"],
            "data": {"name": data["name"], "sha256": data["sha256"], "split": split},
            "versions": session["versions"],
        },
        deduplicate_by=CELL,
    )


def _check_data(run: Run, data: Row, arrays: dict[str, Any]) -> None:
    """Raises ValueError with arrays and rows if the data differ from those of a run."""
    if data["sha256"] != run.manifest["data"]["sha256"]:
        differences = describe_row_differences(run.digests, row_digests(arrays))
        raise ValueError(
            f"the data differ from those of {run.path}: "
            f"{'; '.join(differences) or 'another SHA-256'}."
        )
    if difference := describe_split_differences(run.manifest["data"], data):
        raise ValueError(
            f"the data are split differently from those of {run.path}: {difference}."
        )


def _new_session(study: Study, request: Request) -> Row:
    return {
        "command": request.command,
        "configuration": {
            "scale": request.scale,
            "seeds": request.seeds,
            "methods": list(request.methods or study.methods),
        },
        "started": utc_now(),
        "ended": None,
        "versions": versions(),
    }


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error


def _write_json(path: Path, content: Any) -> None:
    atomic_io.atomic_write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
