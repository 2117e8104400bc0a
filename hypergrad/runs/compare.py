"""Two runs lined up: what differs in what they were made of, and in their numbers."""

import math
from typing import Any, NamedTuple

from .. import models
from ..studies.record import Row
from ..studies.table import VERSIONS
from .manifest import Run, differing, split_otherwise

# Of a row, beside seconds, what tells of the machine and the call, not of the result.
MADE = {*VERSIONS, "command"}


class Difference(NamedTuple):
    """One thing that is not the same in two runs, in words.

    ``about`` is configuration, data, versions, models or numbers.
    """

    about: str
    text: str


def compare(a: Run, b: Run) -> list[Difference]:
    """What differs, in the order in which to look for a cause; seconds are left out."""
    parts = [("configuration", _fields(a.configuration, b.configuration))]
    one, two = a.manifest["data"], b.manifest["data"]
    if one["sha256"] != two["sha256"]:
        whole = [
            {k: x for k, x in each.items() if k != "splits"} for each in (one, two)
        ]
        parts += [("data", _fields(*whole) + differing(a.digests, b.digests))]
    elif found := split_otherwise(one, two):
        parts += [("data", [found])]
    both = [(a.versions, b.versions), (a.packages, b.packages)]
    if not ("format" in a.manifest and "format" in b.manifest):
        both = [_common(*pair) for pair in both]  # rows alone say little
    parts += [("versions", _fields(*pair)) for pair in both]
    found = [Difference(about, text) for about, texts in parts for text in texts]
    found += [Difference("models", text) for text in _models(a, b)]
    return found + [Difference("numbers", text) for text in _numbers(a, b)]


def same_numbers(a: Run, b: Run) -> bool:
    """Whether both hold the same cells with the same numbers, to the bit."""
    return not _numbers(a, b)


def _common(one: Row, two: Row) -> tuple[Row, Row]:
    names = one.keys() & two.keys()
    only = lambda fields: {k: v for k, v in fields.items() if k in names}
    return only(one), only(two)


def _fields(one: Row, two: Row) -> list[str]:
    show = lambda value: "none" if value is None else str(value)
    return [
        f"{field}: {show(one.get(field))} | {show(two.get(field))}"
        for field in dict.fromkeys([*one, *two])
        if one.get(field) != two.get(field)
    ]


def _models(a: Run, b: Run) -> list[str]:
    """Which models of cells that both kept are not the same to the bit, or damaged."""
    kept, others = a.models, b.models
    pairs = [(kept[cell], others[cell]) for cell in kept if cell in others]
    found = [
        f"{one.reference} | {two.reference}: other arrays"
        for one, two in pairs
        if one.sha256 != two.sha256
    ]
    for model in (model for pair in pairs for model in pair):
        try:
            models.get(model.reference, folder=model.path.parent.parent)
        except ValueError as flaw:
            found.append(str(flaw))
    return found


def _numbers(a: Run, b: Run) -> list[str]:
    one, two = ({(r["method"], r["seed"]): r for r in run.rows} for run in (a, b))
    texts = []
    for cells, others, which in ((one, two, "first"), (two, one, "second")):
        alone = [f"{method}, seed {seed}" for method, seed in cells.keys() - others]
        if alone:
            texts.append(f"in the {which} only: {'; '.join(sorted(alone))}")
    both = [cell for cell in one if cell in two]
    names = dict.fromkeys(n for cell in both for n in [*one[cell], *two[cell]])
    for name in names:
        if name in MADE or name.endswith("seconds"):
            continue
        apart = [c for c in both if one[c].get(name) != two[c].get(name)]
        if apart:
            texts.append(_largest(name, apart, one, two))
    return texts


def _largest(name: str, apart: list, one: dict, two: dict) -> str:
    """How far apart a column is at most, and where."""

    def distance(cell: tuple) -> float:
        x, y = one[cell].get(name), two[cell].get(name)
        try:
            return max(abs(p - q) for p, q in zip(_list(x), _list(y), strict=True))
        except (TypeError, ValueError):
            return math.inf  # no number in one of them, or lists of other lengths

    worst = max(apart, key=distance)
    method, seed = worst
    x, y = one[worst].get(name), two[worst].get(name)
    count = f"{len(apart)} cell{'s' * (len(apart) > 1)}"
    if isinstance(x, list) or isinstance(y, list):
        what = f"by {distance(worst):.3g} at most"
    else:
        what = f"most in {x} | {y}"
    return f"{name} in {count}, {what} ({method}, seed {seed})"


def _list(x: Any) -> list:
    return x if isinstance(x, list) else [x]
