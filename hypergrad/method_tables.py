"""Tables of the documentation: of all methods, and of the flags and their reasons.

``python -m hypergrad.method_tables docs/choose.md docs/trust.md`` replaces each table
between the comments that name it.
"""

import re
import sys
from pathlib import Path
from typing import Any

from .certificate import CERTIFICATE_REASONS
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
from .estimators.base import REASONS
from .linear import CG, MINRES, Identity, Neumann, Nystrom, NystromCG
from .method_summary import MethodSummary

#: Classes whose summaries describe an `Implicit` that uses them, in reading order.
IMPLICIT_COMPONENTS = (
    CG,
    MINRES,
    Neumann,
    Nystrom,
    NystromCG,
    Identity,
    CompositeLoss,
)
#: Estimators in reading order.
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

#: Columns of each table of methods.
TABLES = {
    "advice": ("estimator", "recommended for", "not recommended for", "reason"),
    "costs": (
        "estimator",
        "gradients",
        "HVPs",
        "memory",
        "bias",
        "target",
        "alpha in",
    ),
    "sources": ("estimator", "source"),
}
#: Sentences of each table of flags.
FLAG_TABLES = {"flags": REASONS, "certificate_flags": CERTIFICATE_REASONS}


def summaries() -> list[MethodSummary]:
    """Returns the summaries of all methods in reading order."""
    classes: tuple[Any, ...] = (*IMPLICIT_COMPONENTS, *ESTIMATORS)
    return [summary for method in classes for summary in method.summary]


def table_rows() -> list[dict[str, str]]:
    """Returns one row per summary, with all columns by name.

    >>> rows = table_rows()
    >>> [row["HVPs"] for row in rows if row["estimator"] == "Forward(solver)"]
    ['(N + 1) T']
    """
    rows = []
    for component in IMPLICIT_COMPONENTS:
        citations = (*Implicit.citations, *component.citations)
        rows += [_to_row(x, Implicit.target, citations) for x in component.summary]
    for estimator in ESTIMATORS:
        target, citations = estimator.target, estimator.citations
        rows += [_to_row(x, target, citations) for x in estimator.summary]
    return rows


def _to_row(
    summary: MethodSummary, target: str, citations: tuple[str, ...]
) -> dict[str, str]:
    return {
        "estimator": summary.call,
        "recommended for": summary.recommended_for,
        "not recommended for": summary.not_recommended_for,
        "reason": summary.reason,
        "gradients": summary.num_grads.replace(" * ", " "),
        "HVPs": summary.num_hvps.replace(" * ", " "),
        "memory": summary.memory,
        "bias": summary.bias,
        "target": target,
        "alpha in": ", ".join(summary.alpha_in),
        "source": ", ".join(map(_source_link, citations)) or "-",
    }


def _source_link(citation: str) -> str:
    """Returns 'pedregosa2016' as a link to the preprint if there is one."""
    name = f"{citation[:-4].capitalize()} {citation[-4:]}"
    preprint = re.search(r"eprint = {(.*?)}", REFERENCES[citation])
    return f"[{name}](https://arxiv.org/abs/{preprint[1]})" if preprint else name


def markdown_table(name: str) -> str:
    """Returns one of `TABLES` or `FLAG_TABLES` in Markdown.

    >>> print(markdown_table("certificate_flags").splitlines()[2])
    | `not_finite` | a hypergradient or a derivative is not finite | - |
    """
    columns: tuple[str, ...]
    if name in FLAG_TABLES:
        columns = "flag", "reason", "remedy"
        rows = [_to_flag_row(*item) for item in FLAG_TABLES[name].items()]
    else:
        columns, rows = TABLES[name], table_rows()
    to_line = lambda cells: f"| {' | '.join(cells)} |\n"
    lines = [
        to_line([f"`{row[columns[0]]}`", *(row[column] for column in columns[1:])])
        for row in rows
    ]
    return to_line(columns) + "|" + "---|" * len(columns) + "\n" + "".join(lines)


def _to_flag_row(flag: str, sentence: str) -> dict[str, str]:
    """Returns a row from a sentence, which has the remedy in parentheses if any."""
    reason, _, remedy = sentence.partition(" (")
    return {"flag": flag, "reason": reason, "remedy": remedy.removesuffix(")") or "-"}


def replace_tables(text: str) -> str:
    """Returns the text of a page with all of its tables up to date."""
    table = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.S)
    return table.sub(lambda match: match[1] + markdown_table(match[2]) + match[3], text)


if __name__ == "__main__":
    for page in map(Path, sys.argv[1:]):
        page.write_text(replace_tables(page.read_text()))
