"""The tables of *How to choose*, from what the methods declare.

``python -m hypergrad.choose docs/choose.md README.md`` writes each table anew between
the comments that name it.
"""

import re
import sys
from pathlib import Path

from .citation import REFERENCES
from .composite_loss import CompositeLoss
from .estimators import (
    BOME,
    DARTS,
    F2SA,
    FSLA,
    MRBO,
    PZOBO,
    SABA,
    SOBA,
    SRBA,
    SUSTAIN,
    TTSA,
    VRBO,
    AmIGO,
    CentralDifference,
    Evolution,
    FiniteDifference,
    FixedPoint,
    Forward,
    Implicit,
    Penalty,
    PersistentEvolution,
    Reversible,
    StocBiO,
    Unrolled,
)
from .linear import CG, Identity, Neumann, Nystrom, NystromCG
from .method_summary import MethodSummary

# In reading order.
OF_IMPLICIT = (CG, Neumann, Nystrom, NystromCG, Identity, CompositeLoss)
ESTIMATORS = (
    Implicit,
    Unrolled,
    Forward,
    Reversible,
    FixedPoint,
    FiniteDifference,
    Penalty,
    CentralDifference,
    Evolution,
    PersistentEvolution,
    SOBA,
    SABA,
    SRBA,
    FSLA,
    StocBiO,
    AmIGO,
    TTSA,
    MRBO,
    SUSTAIN,
    VRBO,
    F2SA,
    BOME,
    PZOBO,
    DARTS,
)

COSTS = ("estimator", "gradients", "HVPs", "memory", "bias", "target")
TABLES = {
    "advice": ("estimator", "recommended for", "not recommended for", "why"),
    "costs": (*COSTS, "sees alpha in"),
    "summary": (*COSTS, "source"),
}


def methods() -> list[tuple[MethodSummary, str, tuple[str, ...]]]:
    """Guide, target and citations of each row."""
    found: list[tuple[MethodSummary, str, tuple[str, ...]]] = []
    for part in OF_IMPLICIT:
        citations = (*Implicit.citations, *part.citations)
        found += [(guide, Implicit.target, citations) for guide in part.summary]
    for estimator in ESTIMATORS:
        target, citations = estimator.target, estimator.citations
        found += [(guide, target, citations) for guide in estimator.summary]
    return found


def rows() -> list[dict[str, str]]:
    """A row for each guide, by the names of the columns.

    >>> [row["HVPs"] for row in rows() if row["estimator"] == "Forward(solver)"]
    ['N T']
    """
    product = lambda formula: formula.replace(" * ", " ")
    return [
        {
            "estimator": guide.call,
            "recommended for": guide.recommended_for,
            "not recommended for": guide.not_recommended_for,
            "why": guide.reason,
            "gradients": product(guide.num_grads),
            "HVPs": product(guide.num_hvps),
            "memory": guide.memory,
            "bias": guide.bias,
            "target": target,
            "sees alpha in": ", ".join(guide.alpha_in),
            "source": ", ".join(map(_source, citations)) or "-",
        }
        for guide, target, citations in methods()
    ]


def _source(key: str) -> str:
    """``pedregosa2016`` as a link to its preprint, where there is one."""
    name = f"{key[:-4].capitalize()} {key[-4:]}"
    preprint = re.search(r"eprint = {(.*?)}", REFERENCES[key])
    return f"[{name}](https://arxiv.org/abs/{preprint[1]})" if preprint else name


def markdown(name: str) -> str:
    """One of `TABLES`."""
    columns = TABLES[name]
    line = lambda cells: f"| {' | '.join(cells)} |\n"
    body = [
        line([f"`{row['estimator']}`", *(row[column] for column in columns[1:])])
        for row in rows()
    ]
    return line(columns) + "|" + "---|" * len(columns) + "\n" + "".join(body)


def rewrite(text: str) -> str:
    """The page with every table anew."""
    between = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.S)
    return between.sub(lambda found: found[1] + markdown(found[2]) + found[3], text)


if __name__ == "__main__":
    for page in map(Path, sys.argv[1:]):
        page.write_text(rewrite(page.read_text()))
