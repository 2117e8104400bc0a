"""What a run was made of: NAME.run.json beside its rows, and a digest a data row.

A run is named by the path of its files without their endings: ``runs/cleaning`` is
``runs/cleaning.run.json``, ``runs/cleaning.jsonl`` and so on.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .. import models
from ..checkpoint import lock_file
from ..models import Model
from ..runtime import atomic_io
from ..runtime.fingerprint import HASH, digest
from ..runtime.provenance import utc_now, versions
from ..studies import record
from ..studies.record import Row
from ..studies.study import Study, table
from ..studies.table import Request, make_folder

MANIFEST, DIGESTS, MODELS = ".run.json", ".data.json", "models"
FORMAT = 1


@dataclass(frozen=True)
class Run:
    """A run that was kept.

    Attributes:
      path: of its files, without their endings.
      manifest: format, task, data, and a session for each time that rows were measured;
        of rows alone there is no format.
    """

    path: Path
    manifest: Row

    def file(self, ending: str) -> Path:
        """``run.file(".png")`` is its figure."""
        return self.path.with_name(self.path.name + ending)

    @property
    def rows(self) -> list[Row]:
        """One a measured cell; a last line that was cut off is left out."""
        file = self.file(".jsonl")
        return record.read(file, whole=False) if file.exists() else []

    @property
    def sessions(self) -> list[Row]:
        """Command, configuration, times and versions of each."""
        return self.manifest["sessions"]

    @property
    def configuration(self) -> Row:
        """Of all sessions together."""
        all_of = lambda name: [one["configuration"][name] for one in self.sessions]
        methods = dict.fromkeys(m for several in all_of("methods") for m in several)
        scale, seeds = all_of("scale")[-1], max(all_of("seeds"))
        return {"scale": scale, "seeds": seeds, "methods": list(methods)}

    @property
    def versions(self) -> dict[str, str]:
        """Of the machine and the source, not the packages, over the sessions."""
        return self._over_sessions(
            {k: v for k, v in one["versions"].items() if k != "packages"}
            for one in self.sessions
        )

    @property
    def packages(self) -> dict[str, str]:
        """Names and versions, over the sessions."""
        return self._over_sessions(one["versions"]["packages"] for one in self.sessions)

    @staticmethod
    def _over_sessions(fields: Iterable[Row]) -> dict[str, str]:
        """One text a field; where sessions differ, each value in turn."""
        fields = list(fields)
        names = dict.fromkeys(name for one in fields for name in one)
        values = lambda name: dict.fromkeys(str(one.get(name)) for one in fields)
        return {name: ", then ".join(values(name)) for name in names}

    @property
    def facts(self) -> dict[str, str]:
        """What it was made of, but for the packages, in words."""
        data, last = self.manifest["data"], self.sessions[-1]
        times = f", in {len(self.sessions)} sessions" * (len(self.sessions) > 1)
        facts = {
            "command": f"`{last['command']}`",
            "started": self.sessions[0]["started"],
            "ended": (last["ended"] or "not yet") + times,
            **self.configuration,
            "data": data_in_words(data),
            **_splits_in_words(data.get("splits")),
            **self.versions,
        }
        text = lambda x: ", ".join(x) if isinstance(x, list) else str(x)
        return {name: text(value) for name, value in facts.items()}

    @property
    def folder(self) -> Path:
        """Of the models of all runs beside it."""
        return self.path.parent / MODELS

    @property
    def models(self) -> dict[tuple[str, int], Model]:
        """Those that were kept of it, by method and seed; of several the newest.

        One that cannot be read is left out; ``hypergrad models list`` names it.
        """
        mine = {"task": self.manifest["task"], "started": self.sessions[0]["started"]}
        return {
            (model.run["method"], model.run["seed"]): model
            for model in models.find(self.folder)[0]
            if mine.items() <= model.run.items()
        }

    @property
    def digests(self) -> dict[str, list[str]]:
        """Of each array of its data, one a row; none of rows without a manifest."""
        return _read(self.file(DIGESTS)) if "format" in self.manifest else {}


def find(root: Path) -> tuple[list[Run], list[str]]:
    """All runs under a folder, the oldest in front, and what cannot be read."""
    runs, flaws = [], []
    for path in sorted(root.rglob(f"*{MANIFEST}")):
        try:
            runs.append(load(path))
        except ValueError as error:
            flaws.append(str(error))
    return sorted(runs, key=lambda run: run.sessions[0]["started"]), flaws


def load(path: Path) -> Run:
    """The run ``runs/cleaning``, also by the name of one of its files.

    Of rows without a manifest it holds what each row says.

    Raises:
      ValueError: there is none, or what it was made of cannot be read.
    """
    if path.name:
        stem = path.with_name(path.name.removesuffix(MANIFEST))
        for candidate in (stem, stem.with_suffix("")):
            run = Run(candidate, {})
            if (file := run.file(MANIFEST)).exists():
                return _checked(file, Run(candidate, _read(file)))
            if run.rows:
                return Run(candidate, _of_rows(run.rows))
    folder = path if path.is_dir() else path.parent
    there = sorted(x.name.removesuffix(MANIFEST) for x in folder.glob(f"*{MANIFEST}"))
    names = ", ".join(str(folder / name) for name in there)
    hint = f"there is {names}" if there else "hypergrad run NAME makes one"
    raise ValueError(f"no run {path}; {hint}")


def start(study: Study, request: Request) -> Run:
    """Runs a study, or goes on with it, and keeps what it is made of beside the rows.

    What measures no row leaves the manifest as it was. Of each method's first seed the
    model that its row was measured on is kept in the folder ``models``, where the study
    has one: before the row, and once, however often the run is killed.

    Raises:
      ValueError: a run is there already, of other data, or is running; or the study
        refuses.
      OSError: the disk is full, or the folder read-only. No row is there without its
        model; what was written is kept, and the run goes on from there.
    """
    make_folder(request.folder)
    _, arrays = study.data()
    run = Run(request.folder / study.name, {"format": FORMAT, "task": study.name})
    with run.file(".lock").open("a") as lock:
        lock_file(lock, run.path)
        run.manifest.update(data=_of_data(study, request.seeds), sessions=[])
        if run.file(MANIFEST).exists():
            before = load(run.path)
            _check_data(before, run.manifest["data"], arrays)
            known = before.manifest["data"].get("splits", {})
            run.manifest["data"]["splits"] |= known
            run.sessions.extend(before.sessions)
        known = len(run.rows)
        run.sessions.append(_session(study, request))
        _write(run.file(DIGESTS), digests(arrays))
        _write(run.file(MANIFEST), run.manifest)
        steps = table(study, functools.partial(_keep, run, study))
        try:
            steps.run(steps, request)
            run.sessions[-1]["ended"] = utc_now()
        finally:
            if len(run.rows) == known and len(run.sessions) > 1:
                run.sessions.pop()
            _write(run.file(MANIFEST), run.manifest)
    return run


def model_name(study: Study, method: str) -> str:
    """What the model of a method is called."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", f"{study.name}-{method}")


CELL = ("task", "started", "method", "seed")  # by which a model is known again


def _keep(run: Run, study: Study, cell: Row, row: Row, model: tuple) -> None:
    """The first seed's, unless it is there: killed after this, a run measures anew."""
    if cell["seed"] != 0:
        return
    session, data = run.sessions[-1], run.manifest["data"]
    split = data["splits"].get(str(cell["seed"]))
    models.save(
        model_name(study, cell["method"]),
        *model,
        folder=run.folder,
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
        once=CELL,
    )


def again(run: Run, study: Study, folder: Path) -> Run:
    """The run once more, into a folder.

    Raises:
      ValueError: the data are no longer those of the run, or a run is in the folder.
    """
    if (folder / (run.path.name + MANIFEST)).exists():
        raise ValueError(
            f"{folder} holds a run already, whose rows would be taken for the "
            "repetition's; give another --out"
        )
    asked = run.configuration
    _check_data(run, _of_data(study, asked["seeds"]), study.data()[1])
    unknown = set(asked["methods"]) - set(study.methods)
    if unknown:
        raise ValueError(
            f"{run.path} has methods that {study.name} no longer has: "
            f"{', '.join(sorted(unknown))}"
        )
    methods = tuple(m for m in study.methods if m in asked["methods"])
    command = f"hypergrad runs rerun {run.path} --out {folder}"
    request = Request(asked["scale"], asked["seeds"], folder, command, methods)
    return start(study, request)


def _check_data(run: Run, data: Row, arrays: dict[str, Any]) -> None:
    """ValueError that names arrays and rows, where data are not those of the run."""
    if data["sha256"] != run.manifest["data"]["sha256"]:
        raise ValueError(
            f"the data are not those of {run.path}: "
            + ("; ".join(differing(run.digests, digests(arrays))) or "another SHA-256")
        )
    if found := split_otherwise(run.manifest["data"], data):
        raise ValueError(f"the data are not split as those of {run.path}: {found}")


def data_in_words(data: Row) -> str:
    """The same of a run and of its models."""
    name = data.get("name")  # none where a problem's own data are meant
    return f"{name}, " * bool(name) + f"SHA-256 {data['sha256']}"


def split_in_words(seed: Any, sha256: str) -> str:
    """The same of a run and of its models."""
    return f"seed {seed}: SHA-256 {sha256}"


def _splits_in_words(splits: Row | None) -> dict[str, str]:
    if not splits:
        return {}
    return {"split": "; ".join(split_in_words(*of_seed) for of_seed in splits.items())}


def split_otherwise(a: Row, b: Row) -> str:
    """In words, for which seeds the same data are split otherwise, of those in both."""
    one, two = a.get("splits", {}), b.get("splits", {})
    seeds = [seed for seed in one if two.get(seed, one[seed]) != one[seed]]
    return f"other parts for seed {', '.join(seeds)}" if seeds else ""


def differing(a: dict[str, list[str]], b: dict[str, list[str]]) -> list[str]:
    """In words, which rows of which arrays are not the same, where both are known."""
    found = []
    if not (a and b):
        return found
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            found.append(f"{name} is in the {'first' if name in a else 'second'} only")
            continue
        one, two = a[name], b[name]
        if len(one) != len(two):
            found.append(f"{name} has {len(one):,} rows, and {len(two):,}")
        rows = [i for i, (x, y) in enumerate(zip(one, two, strict=False)) if x != y]
        if rows:
            shown = ", ".join(map(str, rows[:5])) + ", ..." * (len(rows) > 5)
            found.append(f"{name} differs in {len(rows):,} rows: {shown}")
    return found


def digests(arrays: dict[str, Any]) -> dict[str, list[str]]:
    """Eight bytes of SHA-256 of each array's rows, shape and dtype counted."""

    def digest(row: np.ndarray) -> str:
        kind = f"{row.dtype}{row.shape}".encode()
        return hashlib.sha256(kind + row.tobytes()).hexdigest()[:16]

    rows = lambda array: [digest(row) for row in np.atleast_1d(np.asarray(array))]
    return {name: rows(array) for name, array in arrays.items()}


def _of_data(study: Study, seeds: int) -> Row:
    """Of all data, and of each seed's parts of them."""
    name, arrays = study.data()
    shape = lambda array: [str(np.asarray(array).dtype), *np.shape(array)]
    splits = {str(seed): _of_split(study, seed) for seed in range(seeds)}
    return {
        "name": name,
        "sha256": record.fingerprint(arrays),
        "arrays": {name: shape(array) for name, array in sorted(arrays.items())},
        "splits": {seed: sha256 for seed, sha256 in splits.items() if sha256},
    }


def _of_split(study: Study, seed: int) -> str:
    """SHA-256 over shapes, dtypes and bytes; nothing where there are none."""
    leaves = jax.tree.leaves(study.split(jax.random.key(seed)))
    parts = [leaf for leaf in leaves if eqx.is_array(leaf)]
    return digest(parts).removeprefix(HASH) if parts else ""


def _of_rows(rows: list[Row]) -> Row:
    """What rows say of themselves."""
    last = rows[-1]
    configuration = {
        "scale": last.get("scale"),
        "seeds": 1 + max(row["seed"] for row in rows),
        "methods": list(dict.fromkeys(row["method"] for row in rows)),
    }
    versions = {name: last.get(name) for name in ("python", "device")}
    packages = {name: last.get(name) for name in record.PACKAGES}
    session = {
        "command": last.get("command"),
        "configuration": configuration,
        "started": "not kept",
        "ended": "not kept",
        "versions": versions | {"packages": packages},
    }
    data = {"name": last.get("data"), "sha256": last.get("data_sha256"), "arrays": {}}
    return {"task": last.get("table"), "data": data, "sessions": [session]}


def _session(study: Study, request: Request) -> Row:
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


def _checked(file: Path, run: Run) -> Run:
    """Refuses a manifest in which anything is not there that is asked of a run."""
    if not isinstance(run.manifest, dict) or run.manifest.get("format") != FORMAT:
        raise ValueError(f"{file} is no manifest of format {FORMAT}")
    try:
        ask = run.facts, run.packages, run.manifest["data"]["arrays"].items()
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error!r})") from error
    del ask
    return run


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _write(path: Path, content: Any) -> None:
    """Whole or not at all."""
    atomic_io.atomic_write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
