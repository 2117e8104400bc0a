"""What a run was made of: NAME.run.json beside its rows, and a digest a data row.

A run is named by the path of its files without their endings: ``runs/cleaning`` is
``runs/cleaning.run.json``, ``runs/cleaning.jsonl`` and so on.
"""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..studies import record
from ..studies.record import Row
from ..studies.study import Study, table
from ..studies.table import Request, make_folder

MANIFEST, DIGESTS = ".run.json", ".data.json"
FORMAT = 1
MADE_OF = {
    *("task", "configuration", "command", "started", "ended", "data", "versions"),
}


@dataclass(frozen=True)
class Run:
    """A run that was kept.

    Attributes:
      path: of its files, without their endings.
      manifest: configuration, command, times, versions, device, git, data.
    """

    path: Path
    manifest: Row

    def file(self, ending: str) -> Path:
        """``run.file(".png")`` is its figure."""
        return self.path.with_name(self.path.name + ending)

    @property
    def rows(self) -> list[Row]:
        """One a measured cell; a last line that was cut off is left out."""
        return record.read(self.file(".jsonl"), whole=False)

    @property
    def facts(self) -> dict[str, str]:
        """What it was made of, but for the packages, in words."""
        made, data = self.manifest, self.manifest["data"]
        facts = {
            "command": f"`{made['command']}`",
            "started": made["started"],
            "ended": made["ended"] or "not yet",
            **made["configuration"],
            "data": f"{data['name']}, SHA-256 {data['sha256']}",
            **{k: v for k, v in made["versions"].items() if k != "packages"},
        }
        text = lambda x: ", ".join(x) if isinstance(x, list) else str(x)
        return {name: text(value) for name, value in facts.items()}

    @property
    def digests(self) -> dict[str, list[str]]:
        """Of each array of its data, one a row."""
        return _read(self.file(DIGESTS))


def find(root: Path) -> list[Run]:
    """All runs under a folder, the one that started first in front."""
    runs = [load(path) for path in sorted(root.rglob(f"*{MANIFEST}"))]
    return sorted(runs, key=lambda run: run.manifest["started"])


def load(path: Path) -> Run:
    """The run ``runs/cleaning``, also by the name of one of its files.

    Raises:
      ValueError: there is none, or what it was made of cannot be read.
    """
    name = path.name.removesuffix(MANIFEST)
    stem = path.with_name(name)
    for candidate in (stem, stem.with_suffix("")):
        file = candidate.with_name(candidate.name + MANIFEST)
        if file.exists():
            return Run(candidate, _checked(file, _read(file)))
    there = [str(run.path) for run in find(path.parent)] if path.parent.exists() else []
    hint = f"there are {', '.join(there)}" if there else "hypergrad run NAME makes one"
    raise ValueError(f"no run {path}; {hint}")


def start(study: Study, request: Request) -> Run:
    """Runs a study, or goes on with it, and keeps what it is made of beside the rows.

    Raises:
      ValueError: a run is there already, of other data; or the study refuses.
    """
    make_folder(request.folder)
    name, arrays = study.data()
    run = Run(request.folder / study.name, _made_of(study, request, name, arrays))
    if run.file(MANIFEST).exists():
        before = load(run.path)
        _check_data(before, arrays)
        run.manifest["started"] = before.manifest["started"]
    _write(run.file(DIGESTS), digests(arrays))
    _write(run.file(MANIFEST), run.manifest)
    steps = table(study)
    steps.run(steps, request)
    run.manifest["ended"] = _now()
    _write(run.file(MANIFEST), run.manifest)
    return run


def again(run: Run, study: Study, folder: Path) -> Run:
    """The run once more, into a folder.

    Raises:
      ValueError: the data are no longer those of the run, or the folder is the run's.
    """
    if folder.resolve() == run.path.parent.resolve():
        raise ValueError(f"{folder} holds the run itself; give another --out")
    _check_data(run, study.data()[1])
    asked = run.manifest["configuration"]
    methods = tuple(m for m in asked["methods"] if m in study.methods)
    unknown = set(asked["methods"]) - set(methods)
    if unknown:
        raise ValueError(
            f"{run.path} has methods that {study.name} no longer has: "
            f"{', '.join(sorted(unknown))}"
        )
    command = f"hypergrad runs rerun {run.path} --out {folder}"
    request = Request(asked["scale"], asked["seeds"], folder, command, methods)
    return start(study, request)


def _check_data(run: Run, arrays: dict[str, Any]) -> None:
    """ValueError that names arrays and rows, where data are not those of the run."""
    if record.fingerprint(arrays) == run.manifest["data"]["sha256"]:
        return
    raise ValueError(
        f"the data are not those of {run.path}: "
        + "; ".join(differing(run.digests, digests(arrays)))
    )


def differing(a: dict[str, list[str]], b: dict[str, list[str]]) -> list[str]:
    """In words, which rows of which arrays are not the same."""
    found = []
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


def _made_of(study: Study, request: Request, data: str, arrays: Row) -> Row:
    shape = lambda array: [str(np.asarray(array).dtype), *np.shape(array)]
    return {
        "format": FORMAT,
        "task": study.name,
        "configuration": {
            "scale": request.scale,
            "seeds": request.seeds,
            "methods": list(request.methods or study.methods),
        },
        "command": request.command,
        "started": _now(),
        "ended": None,
        "data": {
            "name": data,
            "sha256": record.fingerprint(arrays),
            "arrays": {name: shape(array) for name, array in sorted(arrays.items())},
        },
        "versions": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": jax.devices()[0].device_kind,
            "devices": len(jax.devices()),
            "float": str(np.dtype(jax.dtypes.canonicalize_dtype(float))),
            "git": _git(Path(__file__).parent),
            "packages": _packages(),
        },
    }


def _checked(file: Path, manifest: Any) -> Row:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{file} is no manifest of format {FORMAT}")
    missing = MADE_OF - manifest.keys()
    if missing:
        raise ValueError(f"{file} is damaged: it lacks {', '.join(sorted(missing))}")
    return manifest


def _packages() -> dict[str, str]:
    """All that is installed."""
    there = importlib.metadata.distributions(path=sys.path)
    return dict(sorted((one.name.lower(), one.version) for one in there))


def _git(folder: Path) -> str | None:
    """The commit of the package's source, "+" where files differ from it."""
    git = lambda *words: subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        git("ls-files", "--error-unmatch", __file__)  # not one around site-packages
        changed = "+" if git("status", "--porcelain", "--", ".") else ""
        return git("rev-parse", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _write(path: Path, content: Any) -> None:
    """Whole or not at all."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    os.replace(draft, path)
