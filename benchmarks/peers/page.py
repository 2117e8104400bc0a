"""The comparison in docs/other_libraries.md, from the committed rows.

``python -m benchmarks.peers.page docs/other_libraries.md`` replaces the section.
"""

import re
import sys
from pathlib import Path

from hypergrad.bench import Row
from hypergrad.bench.report import markdown_table
from hypergrad.bench.rows import read_rows

from .claims import CLAIMS, MissingNumberError, by_work, hardware_text

ROWS = Path(__file__).parents[1] / "results" / "peer_speed.jsonl"
COMMAND = "hypergrad run peer_speed"


def section(rows: list[Row]) -> str:
    """Returns a row per claim, how many are met, and how they were measured."""
    if not rows:
        return "Not measured yet.\n"
    verdicts = []
    works, text = by_work(rows), lambda x: "" if x is None else f"{x:.3g}"
    headings = "work", "quantity", "measured", "claimed, at most", "", "aimed at", ""
    cells = []
    for claim in CLAIMS:
        met = reached = ""
        try:
            value, details = claim.measured(works.get(claim.work, {}))
            number = f"**{value:.3g}**" + (f" ({details})" if details else "")
            met, reached = claim.verdicts(value)
        except MissingNumberError as error:
            number = f"not measured: {error}"
        verdicts.append(met)
        bound, aim = text(claim.max_value), text(claim.aim)
        cells.append([claim.work, claim.quantity, number, bound, met, aim, reached])
    met, bounded = verdicts.count("met"), sum(map(bool, verdicts))
    count = f"Of {bounded} lines that claim a bound {met} are met."
    lines = [*markdown_table(headings, cells), ""]
    return "\n".join([*lines, f"{count} {hardware_text(rows)} By `{COMMAND}`.", ""])


def rewrite(text: str, rows: list[Row]) -> str:
    """Returns the page with a new section."""
    section_pattern = re.compile(
        r"(<!-- results: peers -->\n).*?(<!-- end of results -->)", re.S
    )
    return section_pattern.sub(lambda match: match[1] + section(rows) + match[2], text)


def committed_rows() -> list[Row]:
    """Returns the committed rows of single contenders, or none."""
    rows = read_rows(ROWS) if ROWS.exists() else []
    return [row for row in rows if "contenders" not in row]


if __name__ == "__main__":
    for page in map(Path, sys.argv[1:]):
        page.write_text(rewrite(page.read_text(), committed_rows()))
