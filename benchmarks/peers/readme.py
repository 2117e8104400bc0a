"""The comparison with other libraries in docs/results.md, from the committed rows.

``python -m benchmarks.peers.readme docs/results.md`` replaces it between its comments.
"""

import re
import sys
from pathlib import Path

from hypergrad.studies import record
from hypergrad.studies.record import Row

from .claims import CLAIMS, Missing, by_work
from .table import made_on

ROWS = Path(__file__).parents[1] / "results" / "peers.jsonl"
COMMAND = "python -m benchmarks peers"


def section(rows: list[Row]) -> str:
    """A line a claim, how many are met, then how it was measured."""
    if not rows:
        return "Not measured yet.\n"
    words = []
    found, asked = by_work(rows), lambda x: "" if x is None else f"{x:.3g}"
    titles = "work", "of ours", "measured", "claimed, at most", "", "aimed at", ""
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for claim in CLAIMS:
        met = reached = ""
        try:
            value, parts = claim.measured(found.get(claim.work, {}))
            told = f"**{value:.3g}**" + (f" ({parts})" if parts else "")
            met, reached = claim.words(value)
        except Missing as missing:
            told = f"not measured: {missing}"
        words.append(met)
        columns = [claim.work, claim.what, told, asked(claim.most), met]
        columns += [asked(claim.reach), reached]
        lines.append(f"| {' | '.join(columns)} |")
    met, bounded = words.count("met"), sum(map(bool, words))
    count = f"Of {bounded} lines that claim a bound {met} are met."
    return "\n".join([*lines, "", f"{count} {made_on(rows)} By `{COMMAND}`.", ""])


def rewrite(text: str, rows: list[Row]) -> str:
    """The page with the section anew."""
    between = re.compile(
        r"(<!-- results: peers -->\n).*?(<!-- end of results -->)", re.S
    )
    return between.sub(lambda found: found[1] + section(rows) + found[2], text)


def committed() -> list[Row]:
    """None where nothing was measured."""
    return record.read(ROWS) if ROWS.exists() else []


if __name__ == "__main__":
    for page in map(Path, sys.argv[1:]):
        page.write_text(rewrite(page.read_text(), committed()))
