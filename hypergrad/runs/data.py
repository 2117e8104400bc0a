"""Description and comparison of the data of runs."""

import hashlib
from typing import Any

import equinox as eqx
import jax
import numpy as np

from ..runtime.fingerprint import HASH, digest
from ..studies import record
from ..studies.record import Row
from ..studies.study import Study


def describe_data(study: Study, num_seeds: int) -> Row:
    """Returns name, SHA-256 and shapes of a study's data, and a SHA-256 per split."""
    name, arrays = study.data()
    splits = {str(seed): split_sha256(study, seed) for seed in range(num_seeds)}
    return {
        "name": name,
        "sha256": record.fingerprint(arrays),
        "arrays": {
            name: [str(np.asarray(array).dtype), *np.shape(array)]
            for name, array in sorted(arrays.items())
        },
        "splits": {seed: sha256 for seed, sha256 in splits.items() if sha256},
    }


def split_sha256(study: Study, seed: int) -> str:
    """Returns the SHA-256 of the split of a seed; empty if the study has none."""
    leaves = jax.tree.leaves(study.split(jax.random.key(seed)))
    arrays = [leaf for leaf in leaves if eqx.is_array(leaf)]
    return digest(arrays).removeprefix(HASH) if arrays else ""


def row_digests(arrays: dict[str, Any]) -> dict[str, list[str]]:
    """Returns eight bytes of SHA-256 of each row of each array, as hexadecimal digits.

    Shape and dtype of the row contribute to its digest.
    """

    def row_digest(row: np.ndarray) -> str:
        prefix = f"{row.dtype}{row.shape}".encode()
        return hashlib.sha256(prefix + row.tobytes()).hexdigest()[:16]

    return {
        name: [row_digest(row) for row in np.atleast_1d(np.asarray(array))]
        for name, array in arrays.items()
    }


def data_text(data: Row) -> str:
    """Returns the name, if the data have one, and the SHA-256 as text."""
    name = data.get("name")
    return f"{name}, " * bool(name) + f"SHA-256 {data['sha256']}"


def split_text(seed: Any, sha256: str) -> str:
    """Returns the seed and the SHA-256 of a split as text."""
    return f"seed {seed}: SHA-256 {sha256}"


def describe_split_differences(first: Row, second: Row) -> str:
    """Returns a text with the seeds whose splits differ; empty if none do.

    Only seeds of both runs are compared.
    """
    splits, others = first.get("splits", {}), second.get("splits", {})
    seeds = [x for x in splits if others.get(x, splits[x]) != splits[x]]
    return f"different splits for seed {', '.join(seeds)}" if seeds else ""


def describe_row_differences(
    first: dict[str, list[str]], second: dict[str, list[str]]
) -> list[str]:
    """Returns a text per array with the rows that differ.

    The list is empty if the digests of either run are unknown.
    """
    texts = []
    if not (first and second):
        return texts
    for name in sorted(first.keys() | second.keys()):
        if name not in first or name not in second:
            run = "first" if name in first else "second"
            texts.append(f"{name} is only in the {run}")
            continue
        rows, other_rows = first[name], second[name]
        if len(rows) != len(other_rows):
            texts.append(f"{name} has {len(rows):,} and {len(other_rows):,} rows")
        pairs = enumerate(zip(rows, other_rows, strict=False))
        differing = [i for i, (x, y) in pairs if x != y]
        if differing:
            preview = ", ".join(map(str, differing[:5]))
            preview += ", ..." * (len(differing) > 5)
            texts.append(f"{name} differs in {len(differing):,} rows: {preview}")
    return texts
