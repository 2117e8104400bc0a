"""Every estimator on every problem whose hypergradient is known, in two precisions.

Cells of kind "error" hold one estimate; cells of kind "rate" one of several settings
whose errors must lie on a line. What is asked is in `conformance_cases`, how it is
judged in `conformance_verdicts`. See README.md for the protocol.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hypergrad as hg
from hypergrad.estimators.base import STATS
from hypergrad.studies import record
from hypergrad.studies.record import Row
from hypergrad.studies.table import Table, cell_by_cell

from .shared import plots
from .shared.conformance_cases import (
    DTYPES,
    METHODS,
    NUM_KEYS,
    PROBLEMS,
    REFUSED,
    SERIES,
    SHOWN,
    plan,
    setting,
    terms,
)
from .shared.conformance_verdicts import judge, of
from .shared.setting import Setting, as_rows

# Measuring.


def measure(asked: Row) -> Row:
    """One estimate against the truth, with its stats and its seconds.

    x64 is switched by JAX's own context, so that the float32 half is what a user sees
    who never turned x64 on; casting under x64 would leave float64 in what estimators
    make themselves.
    """
    at = setting(asked["problem"], asked["structure"])
    method = METHODS[asked["method"]]
    row = {"metric": "relative error", "value": None, "reason": None}
    row |= {"truth": at.truth, "condition": at.condition}
    row |= {"amplification": at.amplification, "contraction": at.contraction}
    row["data_sha256"] = fingerprint(at)
    with jax.enable_x64(asked["dtype"] == "float64"):
        here = lambda tree: jax.tree.map(jnp.asarray, tree)
        problem, w, alpha = here((at.problem, at.w, at.alpha))
        estimator = method.make(at, asked["dtype"], value_of(asked, at))
        gradient = hg.hypergradient(problem, estimator)
        key = jax.random.key(asked["seed"])
        if (asked["method"], asked["problem"]) in REFUSED:
            return row | unmeasured() | {"reason": refusal(gradient, w, alpha)}
        several = asked["kind"] == "rate" and method.random
        if several:
            gradient = jax.vmap(gradient, (None, None, 0))
            key = jax.random.split(key, NUM_KEYS)
        _, compiling = timed(gradient, w, alpha, key)
        found, running = timed(gradient, w, alpha, key)
    made = {str(leaf.dtype) for leaf in jax.tree.leaves((found.hypergradient, found.w))}
    assert made == {asked["dtype"]}, f"{asked} came out in {made}"
    count = NUM_KEYS if several else len(at.exact)
    hypergradient = as_rows(found.hypergradient, count)
    row["declared"] = declared(asked, estimator, at)
    row["value"] = distance(hypergradient, at.exact)
    row["cosine"] = cosine(hypergradient, at.exact)
    row["to_formula"] = None
    if method.biased is not None:
        row["to_formula"] = distance(hypergradient, method.biased(at))
    stats = {name: float(np.mean(np.asarray(found.stats[name]))) for name in STATS}
    stats["trusted"] = bool(np.all(np.asarray(found.stats["trusted"])))
    seconds = {
        "compile_seconds": max(compiling - running, 0.0),
        "run_seconds": running,
    }
    return row | stats | seconds


def unmeasured() -> Row:
    names = ("declared", "cosine", "to_formula", *STATS, "trusted")
    return dict.fromkeys((*names, "compile_seconds", "run_seconds"))


def refusal(gradient: Callable, w: Any, alpha: Any) -> str:
    """What an estimator says that does not apply."""
    try:
        gradient(w, alpha)
    except (TypeError, ValueError) as refused:
        return str(refused)
    raise AssertionError("an estimator takes what the table says it refuses")


def timed(gradient: Callable, *arguments: Any) -> tuple[hg.Estimate, float]:
    started = time.perf_counter()
    found = jax.block_until_ready(gradient(*arguments))
    return found, time.perf_counter() - started


def value_of(asked: Row, at: Setting) -> Any:
    """The setting; a number of terms from factors of e."""
    value = asked["setting"]
    if asked["kind"] == "rate" and asked["method"] in SERIES:
        return at.steps_to(math.exp(-value))
    return value


def declared(asked: Row, estimator: Any, at: Setting) -> float:
    """The adjoint's relative error by ``error_bound``, or by a docstring's ``q^K``."""
    if asked["method"] in SERIES[1:]:
        value = value_of(asked, at)
        return at.contraction ** terms(value)
    return float(estimator.error_bound(at.smallest, at.largest))


def distance(found: np.ndarray, exact: np.ndarray) -> float:
    """Relative error; over several keys its root mean square."""
    exact = np.broadcast_to(exact, found.shape)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def cosine(found: np.ndarray, exact: np.ndarray) -> float:
    exact = np.broadcast_to(exact, found.shape)
    return float(np.sum(found * exact) / np.linalg.norm(found) / np.linalg.norm(exact))


def fingerprint(at: Setting) -> str:
    leaves = jax.tree.leaves((at.problem, at.w, at.alpha))
    return record.fingerprint({f"{i:03}": leaf for i, leaf in enumerate(leaves)})


# Showing.

GROUPS = {
    "ridge": ("ridge",),
    "quadratic": ("quadratic",),
    "SMD1-5": tuple(f"SMD{i}" for i in range(1, 6)),
    "logistic": ("logistic",),
    "network": ("network",),
    "two losses": ("two losses",),
}


def worst(rows: list[Row], method: str, dtype: str, problems: tuple) -> float | None:
    """Largest error over structures; None where the method does not apply."""
    mine = of(rows, kind="error", method=method, dtype=dtype)
    found = [row["value"] for row in mine if row["problem"] in problems]
    return None if None in found else max(found)


def markdown(table: Table, rows: list[Row], command: str) -> str:
    """One row an estimator: the worst error over structures, and what it cost."""
    header = ["estimator", "promise", *GROUPS, "grad-eq", "HVPs"]
    lines = [
        f"# {table.name}",
        "",
        "Largest relative error of the hypergradient over the structures of a problem, "
        "float64 / float32, against a closed form or a dense solve at Newton's point; "
        "- where an estimator does not apply. Promise: what the estimator says of its "
        "error, q being the contraction of gradient descent. Cost on the network with "
        "a penalty a layer, float64: gradient-equivalents (grad-eq) and "
        "Hessian-vector products, of an inner solve by Newton's method, or by descent "
        "down to rounding for num_newton_steps=1, those that differentiate steps and "
        f"PersistentEvolution. Source: {table.source}. Command: `{command}`",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
    ]
    show = lambda x: "-" if x is None else f"{x:.0e}"
    for method in SHOWN:
        cells = [method, METHODS[method].promise]
        for problems in GROUPS.values():
            pair = [worst(rows, method, dtype, problems) for dtype in DTYPES]
            cells.append("-" if None in pair else " / ".join(map(show, pair)))
        at = {"kind": "error", "problem": "network", "structure": "pytree"}
        (cost,) = of(rows, method=method, dtype="float64", **at)
        cells += [f"{cost['gradient_equivalents']:.0f}", f"{cost['num_hvps']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(v.line for v in judge(rows))]
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """Two heat maps of log10 error: estimators by problems, a precision each."""
    plots.errors(
        {
            dtype: [
                [worst(rows, method, dtype, (problem,)) for problem in FAMILIES]
                for method in SHOWN
            ]
            for dtype in DTYPES
        },
        [f"{method}  ({METHODS[method].promise})" for method in SHOWN],
        FAMILIES,
        path,
    )


FAMILIES = list(dict.fromkeys(family for family, _ in PROBLEMS))

TABLE = Table(
    name="conformance",
    source="closed forms; SMD1-5 of Sinha, Malo & Deb 2014; dense solves",
    minutes=14,
    seeds=10,
    plan=plan,
    run=cell_by_cell(measure, markdown, draw),
    judge=judge,
)
