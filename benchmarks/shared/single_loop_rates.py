"""The choice of the rates of single-loop methods from a grid of pairs.

Each method runs at every pair of rates on two seeds that are not reported, and the pair
whose worse run ends lowest is chosen.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import hypergrad as hg
from hypergrad.bench import Finding, Row
from hypergrad.bench.report import markdown_table

from .single_loop import DOUBLE_LOOP, RANDOM_LENGTH, paid_for

NUM_PROBE_STEPS = 128  # contain whole periods of SRBA and VRBO
NUM_LONG_PROBE_STEPS = 4096  # of methods whose series have random lengths


def count_affordable_steps(
    budget: float,
    method: str,
    make_run: Callable[[int], Callable[..., hg.Trace]],
    args: tuple,
    slowest_rates: tuple[float, float],
) -> int:
    """Returns how many steps of a method the budget pays for, at the slowest rates.

    The double loop, which solves until it is close enough, is counted by its dearest
    step. Other methods are counted by the mean cost of a step, and make no more steps
    than a run of that length is then measured to afford, because a period has dear and
    cheap steps.

    Args:
      budget: Gradient-equivalents of a run.
      method: Label of the method.
      make_run: ``num_steps -> run``, where ``run(*args, *rates)`` returns a trace.
      args: Arguments of the run.
      slowest_rates: The smallest rates of the grid.
    """

    def costs(num_steps: int) -> np.ndarray:
        probe = jax.jit(lambda *run_args: make_run(num_steps)(*run_args).cost)
        return np.asarray(probe(*args, *map(jnp.float32, slowest_rates)), float)

    num_probe_steps = (
        NUM_LONG_PROBE_STEPS if method in RANDOM_LENGTH else NUM_PROBE_STEPS
    )
    step_costs = np.diff(costs(num_probe_steps), prepend=0)
    if method == DOUBLE_LOOP:
        return max(1, int(budget / step_costs.max()))
    num_steps = max(1, int(budget / step_costs.mean()))
    if method in RANDOM_LENGTH:
        return num_steps
    return max(1, int(np.sum(paid_for(costs(num_steps), budget))))


def choose_pair(
    pairs: Sequence[tuple[float, float]], ends: Sequence[Sequence[float]], name: str
) -> Row:
    """Returns the pair whose worst run ends lowest, and where all pairs end.

    Args:
      pairs: Pairs of rates.
      ends: The final values of the runs of each pair; NaN is worse than any number.
      name: Label of the method, for the message.

    Raises:
      ValueError: No pair has only finite values.
    """
    worst = [float(np.max(np.nan_to_num(values, nan=np.inf))) for values in ends]
    best = int(np.argmin(worst))
    if not np.isfinite(worst[best]):
        raise ValueError(
            f"every pair of rates of {name} must have runs that end; none has. Try "
            "slower rates."
        )
    rates, ratios = (list(values) for values in zip(*pairs, strict=True))
    choice = {"rate": rates[best], "ratio": ratios[best]}
    return choice | {"rates": rates, "ratios": ratios, "ends": worst}


def is_at_edge(row: Row) -> bool:
    """Returns True if the best pair is at an edge and no inner pair is as good."""
    is_inner = lambda x, values: min(values) < x < max(values)
    inner_ends = [
        end
        for rate, ratio, end in zip(
            row["rates"], row["ratios"], row["ends"], strict=True
        )
        if end is not None
        and is_inner(rate, row["rates"])
        and is_inner(ratio, row["ratios"])
    ]
    best = min(end for end in row["ends"] if end is not None)
    return min(inner_ends, default=math.inf) > best


def edge_finding(rows: Sequence[Row]) -> Finding:
    """Returns the methods whose rates are at an edge of the grid."""
    labels = [row["method"] for row in rows if is_at_edge(row)]
    text = f"{len(labels)} of {len(rows)} methods chose a rate at an edge of the grid"
    return Finding(text + (f": {', '.join(labels)}" if labels else ""))


def rate_table(
    rows: Sequence[Row], headings: tuple[str, str, str], form: str
) -> list[str]:
    """Returns the Markdown table of the rates that each method uses, and their cost.

    Args:
      rows: Rows of the tuning stage.
      headings: Headings of both rates and of the best final value.
      form: Format of the best final value.
    """
    columns = "method", *headings, "steps", "tuning grad-eq"
    cells = [
        [
            row["method"],
            f"{row['rate']:g}",
            f"{row['ratio']:g}",
            format(min(x for x in row["ends"] if x is not None), form),
            f"{row['num_steps']}",
            f"{row['tuning_cost']:,.0f}",
        ]
        for row in rows
    ]
    return [*markdown_table(columns, cells), "", edge_finding(rows).markdown]
