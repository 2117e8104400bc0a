"""Colors of methods in figures."""

import itertools
from collections.abc import Iterable

COLORS = {
    "baseline": "#7f7f7f",
    "random search": "#8c564b",
    "random search, total": "#c49c94",
    "implicit": "#1f77b4",
    "neumann": "#2ca02c",
    "unrolled": "#ff7f0e",
    "DADA": "#9467bd",
    "truncated": "#17becf",
    "forward": "#2ca02c",
    "reversible": "#9467bd",
}


def colors_of(names: Iterable[str]) -> dict[str, str]:
    """Returns a color per method; one without a color of its own gets a free one."""
    from matplotlib.colors import TABLEAU_COLORS

    names = list(names)
    used = {COLORS.get(name) for name in names}
    free = itertools.cycle(x for x in TABLEAU_COLORS.values() if x not in used)
    return {name: COLORS.get(name) or next(free) for name in names}
