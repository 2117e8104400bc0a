"""``hypergrad models``: list, show, load."""

import json
import math
import sys
from pathlib import Path

import tyro
from rich.console import Console

from .. import models
from ..models.store import FOLDER, Model
from ..runtime.console import exit_with_message, print_table
from .manifest import data_in_words, split_in_words


def list_models(folder: tyro.conf.Positional[Path] = Path(FOLDER)) -> None:
    """List the models in a folder: versions, metrics, and what made each.

    Args:
      folder: of all models.
    """
    found, flaws = models.find(folder)
    if not found and not flaws:
        sys.exit(
            f"hypergrad: no model in {folder}; hg.models.save keeps one, hypergrad run "
            "NAME those of its first seed"
        )
    rows = [
        [
            *(model.reference, model.record["saved"], _metrics(model)),
            *(_command(model), str(model.run.get("run", "-"))),
        ]
        for model in found
    ]
    if rows:
        print_table(("model", "saved", "metrics", "made by", "run"), rows, Console())
    if flaws:
        sys.exit("\n".join(f"hypergrad: {flaw}" for flaw in flaws))


def show_model(model: str, folder: Path = Path(FOLDER)) -> None:
    """Show a model: its arrays, its metrics, and what made it. Its files are checked.

    Args:
      model: NAME@VERSION, or NAME for the newest.
      folder: of all models.
    """
    with exit_with_message():
        found = models.get(model, folder=folder)
    run = {name: _text(x) for name, x in found.run.items() if name != "versions"}
    run |= _data(found)
    known = dict(found.run["versions"])
    packages = known.pop("packages", {})
    facts = {
        "model": found.reference,
        "saved": found.record["saved"],
        "metrics": _metrics(found),
        **{name: _array(about) for name, about in found.leaves.items()},
        "SHA-256": found.sha256,
        **run,
        **{name: str(x) for name, x in known.items()},
        "packages": ", ".join(f"{name} {x}" for name, x in packages.items()),
    }
    print_table(("", ""), list(facts.items()), Console())


def load_model(
    model: str, folder: Path = Path(FOLDER), out: Path | None = None
) -> None:
    """Check a model's files by SHA-256, and write its arrays as npz, for numpy.load.

    In Python, hg.models.load gives back the trees.

    Args:
      model: NAME@VERSION, or NAME for the newest.
      folder: of all models.
      out: the file; NAME-VERSION.npz, unless told. It must not be there yet.
    """
    with exit_with_message():
        found = models.get(model, folder=folder)
        out = Path(f"{found.name}-{found.version}.npz") if out is None else out
        models.export(found.reference, out, folder=folder)
    numbers = sum(math.prod(about["shape"]) for about in found.leaves.values())
    print(
        f"{found.reference} is as it was written: {len(found.leaves)} arrays, "
        f"{numbers:,} numbers, SHA-256 {found.sha256}"
    )
    print(f"wrote {out}")


def _metrics(model: Model) -> str:
    shown = lambda x: "not finite" if x is None else f"{x:.4g}"
    return ", ".join(f"{name} {shown(x)}" for name, x in model.metrics.items()) or "-"


def _command(model: Model) -> str:
    seed = model.run.get("seed")
    return str(model.run.get("command")) + f", seed {seed}" * (seed is not None)


def _data(model: Model) -> dict[str, str]:
    """In the words of `hypergrad runs show`, where they are known by their SHA-256."""
    data = model.run.get("data")
    if not isinstance(data, dict) or "sha256" not in data:
        return {}
    facts = {"data": data_in_words(data)}
    if data.get("split"):
        facts["split"] = split_in_words(model.run.get("seed"), data["split"])
    return facts


def _array(about: dict) -> str:
    text = f"{about['dtype']}{about['shape']}"
    return text if about["was"] == "jax" else f"{text}, {about['was']}"


def _text(x: object) -> str:
    return x if isinstance(x, str) else json.dumps(x)


COMMANDS = {"list": list_models, "show": show_model, "load": load_model}
