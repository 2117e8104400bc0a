"""The commands ``hypergrad models``: list, show and load."""

import json
import math
import sys
from pathlib import Path

import tyro
from rich.console import Console

from .. import models
from ..models.store import FOLDER, Model
from ..runtime.console import exit_with_message, print_table
from .data import data_text, split_text


def list_models(folder: tyro.conf.Positional[Path] = Path(FOLDER)) -> None:
    """List the models in a folder with their versions, metrics and origins.

    Args:
      folder: Folder of all models.
    """
    saved_models, errors = models.find(folder)
    if not saved_models and not errors:
        sys.exit(
            f"hypergrad: no model in {folder}; save one with hg.models.save, or with "
            "hypergrad run NAME those of its first seed"
        )
    rows = [
        [
            model.reference,
            model.record["saved"],
            _metrics_text(model),
            _command_text(model),
            str(model.run.get("run", "-")),
        ]
        for model in saved_models
    ]
    if rows:
        print_table(("model", "saved", "metrics", "made by", "run"), rows, Console())
    if errors:
        sys.exit("\n".join(f"hypergrad: {error}" for error in errors))


def show_model(model: str, folder: Path = Path(FOLDER)) -> None:
    """Show the arrays, metrics and origin of a model after a check of its files.

    Args:
      model: NAME@VERSION, or NAME for the newest version.
      folder: Folder of all models.
    """
    with exit_with_message():
        saved_model = models.get(model, folder=folder)
    versions = dict(saved_model.run["versions"])
    packages = versions.pop("packages", {})
    metadata = {
        "model": saved_model.reference,
        "saved": saved_model.record["saved"],
        "metrics": _metrics_text(saved_model),
        **{name: _leaf_text(leaf) for name, leaf in saved_model.leaves.items()},
        "SHA-256": saved_model.sha256,
        **{
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in saved_model.run.items()
            if name != "versions"
        },
        **_data_texts(saved_model),
        **{name: str(version) for name, version in versions.items()},
        "packages": ", ".join(f"{name} {x}" for name, x in packages.items()),
    }
    print_table(("", ""), list(metadata.items()), Console())


def load_model(
    model: str, folder: Path = Path(FOLDER), out: Path | None = None
) -> None:
    """Check a model's files by SHA-256 and write its arrays as npz, for numpy.load.

    In Python, hg.models.load returns the trees.

    Args:
      model: NAME@VERSION, or NAME for the newest version.
      folder: Folder of all models.
      out: File to write, which must not exist. Defaults to NAME-VERSION.npz.
    """
    with exit_with_message():
        saved_model = models.get(model, folder=folder)
        default = Path(f"{saved_model.name}-{saved_model.version}.npz")
        out = default if out is None else out
        models.export(saved_model.reference, out, folder=folder)
    leaves = saved_model.leaves.values()
    num_values = sum(math.prod(leaf["shape"]) for leaf in leaves)
    print(
        f"{saved_model.reference} is unchanged since it was written: {len(leaves)} "
        f"arrays, {num_values:,} numbers, SHA-256 {saved_model.sha256}"
    )
    print(f"wrote {out}")


def _metrics_text(model: Model) -> str:
    to_text = lambda x: "not finite" if x is None else f"{x:.4g}"
    return ", ".join(f"{name} {to_text(x)}" for name, x in model.metrics.items()) or "-"


def _command_text(model: Model) -> str:
    seed = model.run.get("seed")
    return str(model.run.get("command")) + f", seed {seed}" * (seed is not None)


def _data_texts(model: Model) -> dict[str, str]:
    """Returns data and split as `hypergrad runs show` prints them, if known."""
    data = model.run.get("data")
    if not isinstance(data, dict) or "sha256" not in data:
        return {}
    texts = {"data": data_text(data)}
    if data.get("split"):
        texts["split"] = split_text(model.run.get("seed"), data["split"])
    return texts


def _leaf_text(leaf: dict) -> str:
    text = f"{leaf['dtype']}{leaf['shape']}"
    return text if leaf["was"] == "jax" else f"{text}, {leaf['was']}"


COMMANDS = {"list": list_models, "show": show_model, "load": load_model}
