"""Every estimator on every problem whose hypergradient is known, in two precisions.

Cells of kind "error" hold one estimate; cells of kind "rate" one of several settings
whose errors must lie on a line. See README.md for the protocol.
"""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np

import hypergrad as hg
from hypergrad.certificate import NEWTON
from hypergrad.estimators.protocol import STATS
from hypergrad.studies import record
from hypergrad.studies.record import Row
from hypergrad.studies.table import Table, cell_by_cell
from hypergrad.studies.verdict import Verdict, within

from . import plots
from .known import any_known, flat, quadratic, two_losses
from .setting import Setting, as_rows, count_to, describe, sgd

# Problems by family and structure; the names are those of `known.any_known`.
PROBLEMS = {
    ("ridge", "scalar"): "ridge scalar",
    ("ridge", "vector"): "ridge per-weight",
    ("ridge", "examples"): "ridge per-example",
    ("quadratic", "scalar"): "quadratic 0-d",
    ("quadratic", "vector"): "quadratic 30",
    ("quadratic", "pytree"): "quadratic nested",
    **{(f"SMD{i}", "pytree"): f"smd {i} tilted" for i in range(1, 6)},
    ("logistic", "scalar"): "logistic scalar",
    ("logistic", "vector"): "logistic per-weight",
    ("network", "scalar"): "mlp scalar",
    ("network", "pytree"): "mlp tree",
    ("two losses", "pytree"): "",
}
DTYPES = ("float64", "float32")
ASKED = 1e-4  # relative error
TERMS = 50  # of a series, or steps that a truncated reverse pass sees
STRENGTH = 1e3
SIGMA, PAIRS = 1e-2, 64
EXACT = 1e-9  # what an estimator that is declared exact reaches in float64
TRUSTED = 0.1  # no trusted estimate is further off


def second_loss(w, alpha, batch):
    return jnp.sum(jnp.sin(flat(w))) + jnp.sum(flat(alpha) ** 2)


@functools.lru_cache(maxsize=1)
def setting(family: str, structure: str) -> Setting:
    """The problem in float64 NumPy arrays, so that either precision can take it."""
    jax.clear_caches()  # thousands of live programs exhaust a process
    with jax.enable_x64(True):
        if family == "two losses":
            known = quadratic("nested")
            known = known._replace(problem=two_losses(known, second_loss))
            return describe(known, formula=False)
        formula = family in ("ridge", "quadratic") or family.startswith("SMD")
        return describe(any_known(PROBLEMS[family, structure]), formula)


# Methods.


@dataclass(frozen=True)
class Method:
    """A row of the table.

    promise: what its docstring says of its error, in short.
    make: ``(setting, dtype, value) -> estimator``; ``value`` is what its rate is
        measured over, None for the table's own.
    biased: ``setting -> hypergradient [K, N]`` that its docstring's bias predicts.
    random: whether a key decides.
    """

    promise: str
    make: Callable[[Setting, str, Any], Any]
    biased: Callable[[Setting], Any] | None = None
    random: bool = False


def implicit(linear: Callable[[Setting, str, Any], Any]) -> Callable:
    return lambda at, dtype, x: hg.Implicit(hg.Newton(), linear(at, dtype, x))


def tolerance(dtype: str) -> float:
    """The default of our own solvers, which lineax's must be told."""
    return float(np.finfo(dtype).eps) ** 0.75


def gmres(at: Setting, dtype: str, x: Any) -> lx.GMRES:
    return lx.GMRES(rtol=tolerance(dtype), atol=tolerance(dtype))


def early(correct: int) -> Callable:
    """From an inner loop that stopped with ``x`` of its distance left."""
    return lambda at, dtype, x: hg.Implicit(
        at.descent if x is None else hg.Descent(sgd(at.step), at.steps_to(x)),
        correct=correct,
    )


def damping(at: Setting, x: Any) -> float:
    return (1e-3 if x is None else x) * at.smallest


def nystrom(at: Setting, dtype: str, x: Any) -> hg.Nystrom:
    """Of full rank, which leaves only what the damping changes."""
    return hg.Nystrom(len(at.best["H"]), damping(at, x))


def instead_of_inverse(matrix: Callable[[Setting], np.ndarray]) -> Callable:
    """``direct - J'(P b)`` with a dense ``P`` in the place of ``H^-1``."""

    def biased(at: Setting) -> np.ndarray:
        best = at.best
        return best["direct"] - (matrix(at) @ best["b"].T).T @ best["J"]

    return biased


def penalty(symmetric: bool) -> Callable:
    return lambda at, dtype, x: hg.Penalty(
        hg.Newton(), STRENGTH if x is None else x, symmetric=symmetric
    )


identity = lambda at: np.eye(len(at.best["H"]))
damped = lambda at: np.linalg.inv(at.best["H"] + damping(at, None) * identity(at))
terms = lambda x: TERMS if x is None else x
pairs = lambda x: PAIRS if x is None else x

METHODS = {
    "Implicit, CG": Method("exact", implicit(lambda at, dtype, x: hg.CG())),
    "Implicit, NystromCG": Method(
        "exact", implicit(lambda at, dtype, x: hg.NystromCG(3))
    ),
    "Implicit, GMRES": Method("exact", implicit(gmres)),
    "Implicit, LU": Method("exact", implicit(lambda at, dtype, x: lx.LU())),
    "Implicit, correct=1": Method("exact", early(1)),
    "Implicit, rel_err": Method(
        "1e-4 asked",
        lambda at, dtype, x: hg.Implicit(at.descent, correct=1, rel_err=ASKED),
    ),
    "Average": Method(
        "exact", lambda at, dtype, x: hg.Average(hg.Implicit(hg.Newton()), 2)
    ),
    "SOBA": Method(
        "exact, settled",
        lambda at, dtype, x: hg.testing.Settled(hg.SOBA(sgd(at.step)), 2 * at.steps),
    ),
    "Unrolled": Method("exact", lambda at, dtype, x: hg.Unrolled(at.descent)),
    "Forward": Method("exact", lambda at, dtype, x: hg.Forward(at.descent)),
    "Reversible": Method(
        "resolution", lambda at, dtype, x: hg.Reversible(*at.momentum)
    ),
    "CentralDifference": Method(
        "epsilon²", lambda at, dtype, x: hg.CentralDifference(hg.Newton(), x)
    ),
    "Implicit, Neumann": Method(
        "q^50", implicit(lambda at, dtype, x: hg.Neumann(terms(x), at.step))
    ),
    "Unrolled, last": Method(
        "q^50", lambda at, dtype, x: hg.Unrolled(at.descent, last=terms(x))
    ),
    "FixedPoint": Method(
        "q^50", lambda at, dtype, x: hg.FixedPoint(at.descent, terms(x))
    ),
    "Implicit, Nystrom": Method(
        "damping", implicit(nystrom), instead_of_inverse(damped)
    ),
    "Implicit, Identity": Method(
        "H for I",
        implicit(lambda at, dtype, x: hg.Identity()),
        instead_of_inverse(identity),
    ),
    "FiniteDifference": Method(
        "H for I / step",
        lambda at, dtype, x: hg.FiniteDifference(hg.Newton(), step_size=at.step),
        instead_of_inverse(lambda at: at.step * identity(at)),
    ),
    "Penalty": Method("1 / 1000", penalty(symmetric=False)),
    "Penalty, symmetric": Method("1 / 1000²", penalty(symmetric=True)),
    "Evolution": Method(
        "64 pairs",
        lambda at, dtype, x: hg.Evolution(hg.Newton(), SIGMA, pairs(x)),
        random=True,
    ),
    "PersistentEvolution": Method(
        "64 pairs",
        lambda at, dtype, x: hg.PersistentEvolution(
            at.descent, SIGMA, pairs(x), window=at.steps
        ),
        random=True,
    ),
    "Implicit, stopped early": Method("", early(0)),
}
EARLY = "Implicit, stopped early"  # what correct=1 is measured against; a rate only
SHOWN = [method for method in METHODS if method != EARLY]
# What takes one outer loss; every other refusal ends the run.
REFUSED = {("Reversible", "two losses"), ("SOBA", "two losses")}
SERIES = ("Implicit, Neumann", "Unrolled, last", "FixedPoint")
NEVER_TRUSTED = (
    *("CentralDifference", "FiniteDifference", "Penalty", "Penalty, symmetric"),
    *("Evolution", "PersistentEvolution", "SOBA"),
)


# Rates: which method, on what, over which settings. A series is asked for its error
# after so many factors of e.
FACTORS = (4, 6, 9, 12)
STRENGTHS = (30.0, 100.0, 300.0, 1000.0)
EPSILONS = (1e-3, 3e-3, 1e-2, 3e-2)
DAMPINGS = (1e-4, 3e-4, 1e-3, 3e-3)
LEFT = (1e-3, 1e-5)
COUNTS = (4, 16, 64, 256)
NUM_KEYS = 16  # a random method's error is the root mean square over these
VECTORS = (("quadratic", "vector"), ("logistic", "vector"))
CURVED = (("logistic", "vector"), ("network", "pytree"))
RATES = [
    *((method, at, FACTORS) for method in SERIES for at in VECTORS),
    *(("Penalty", at, STRENGTHS) for at in CURVED),
    *(("Penalty, symmetric", at, STRENGTHS) for at in CURVED),
    *(("CentralDifference", at, EPSILONS) for at in CURVED),
    *(("Implicit, Nystrom", at, DAMPINGS) for at in VECTORS),
    *((method, at, LEFT) for method in ("Implicit, correct=1", EARLY) for at in CURVED),
    ("Evolution", ("ridge", "vector"), COUNTS),
    ("PersistentEvolution", ("ridge", "vector"), COUNTS),
]


def cell(kind, method, at, dtype, value=None, seed=0) -> Row:
    names = ("kind", "method", "problem", "structure", "dtype", "setting", "seed")
    return dict(zip(names, (kind, method, *at, dtype, value, seed), strict=True))


def plan(scale: str, seeds: int) -> list[Row]:
    """Problem by problem, so that each is made once. Only random methods are seeded."""
    del scale
    cells = []
    for at in PROBLEMS:
        cells += [
            cell("error", method, at, dtype) for method in SHOWN for dtype in DTYPES
        ]
        # In float32 rounding leaves no room for a line.
        cells += [
            cell("rate", method, at, "float64", value, seed)
            for method, where, values in RATES
            if where == at
            for value in values
            for seed in range(seeds if METHODS[method].random else 1)
        ]
    return cells


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
    """The adjoint's relative error by ``error_factor``, or by a docstring's ``q^K``."""
    if asked["method"] in SERIES[1:]:
        value = value_of(asked, at)
        return at.contraction ** terms(value)
    return float(estimator.error_factor(at.smallest, at.largest))


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


# Judging. A bound is a statement about one cell, a rate one about several.

RATE_TOLERANCE = 0.05  # of a series' rate, relative
SLOPE_TOLERANCE = 0.1  # of a power
SLOPES = {
    "Penalty": -1,
    "Penalty, symmetric": -2,
    "CentralDifference": 2,
    "Implicit, Nystrom": 1,
}


def rounding(row: Row) -> float:
    """What solves to residuals of ``eps^(3/4)``, all solvers' default, may leave."""
    return row["condition"] * tolerance(row["dtype"])


def allowed(row: Row) -> float:
    """The relative error that an estimator admits of a cell; infinite if none."""
    exact = METHODS[row["method"]].promise == "exact"
    if METHODS[row["method"]].random:
        return 4 * row["standard_error"] + SIGMA
    if exact:
        return EXACT if row["dtype"] == "float64" else rounding(row)
    if row["declared"] is None:
        return math.inf
    return row["declared"] * row["amplification"] + rounding(row)


def allowed_of_formula(row: Row) -> float:
    """As exact as the formula is; a difference of gradients adds ``epsilon²``."""
    if row["method"] == "FiniteDifference":
        epsilon = float(np.finfo(row["dtype"]).eps) ** (1 / 3)
        return 10 * epsilon**2 * row["amplification"] + rounding(row)
    return EXACT if row["dtype"] == "float64" else rounding(row)


def bound(what: str, rows: list[Row], column: str, most: Callable) -> Verdict:
    """Whether all rows keep their bounds; the one that comes nearest is named."""
    worst = max(rows, key=lambda row: row[column] / most(row))
    value, limit = worst[column], most(worst)
    at = f"{worst['problem']} {worst['structure']}"
    kept = all(row[column] <= most(row) for row in rows)
    return Verdict(
        f"{what}: {value:.1e} on {at}, allowed {limit:.1e}: "
        f"{'kept' if kept else 'broken'}",
        failed=not kept,
    )


def judge(rows: list[Row]) -> list[Verdict]:
    """Bounds, formulas and trust cell by cell, then the rates."""
    lost = [row for row in rows if row["value"] is None and not expected_refusal(row)]
    if lost:
        name = lambda row: [row[field] for field in plan("small", 1)[0]]
        return [Verdict(f"no number: {name(row)}", failed=True) for row in lost]
    rows = [row for row in rows if row["value"] is not None]
    single = [row for row in rows if row["kind"] == "error"]
    return [*bounds(single), *trust(single), *rates(rows)]


def expected_refusal(row: Row) -> bool:
    return (row["method"], row["problem"]) in REFUSED and bool(row["reason"])


def bounds(rows: list[Row]) -> list[Verdict]:
    verdicts = []
    for method in SHOWN:
        for dtype in DTYPES:
            mine = of(rows, method=method, dtype=dtype)
            what = f"{method}, {dtype}"
            if METHODS[method].random:
                standard = "error, allowed four standard errors"
                verdicts.append(bound(f"{what}, {standard}", mine, "value", allowed))
            elif math.isfinite(max(map(allowed, mine))):
                verdicts.append(bound(f"{what}, error", mine, "value", allowed))
            if METHODS[method].biased:
                to = f"{what}, distance to its formula"
                verdicts.append(bound(to, mine, "to_formula", allowed_of_formula))
            low = min(row["cosine"] for row in mine)
            if mine[0]["declared"] is None:
                verdicts.append(
                    Verdict(
                        f"{what}, least cosine with the truth: {low:.2f}, more than 0 "
                        f"needed: {'kept' if low > 0 else 'broken'}",
                        failed=not low > 0,
                    )
                )
    return verdicts


def trust(rows: list[Row]) -> list[Verdict]:
    exact = [row for row in rows if METHODS[row["method"]].promise == "exact"]
    never = [row for row in rows if row["method"] in NEVER_TRUSTED]
    trusted = [row for row in rows if row["trusted"]]
    far = max(row["value"] for row in trusted)
    lines = [
        ("exact estimates that are trusted", sum(r["trusted"] for r in exact), exact),
        ("never trusted of themselves", sum(not r["trusted"] for r in never), never),
    ]
    return [
        *[
            Verdict(f"{what}: {count} of {len(of_all)}", failed=count != len(of_all))
            for what, count, of_all in lines
        ],
        Verdict(
            f"largest error of {len(trusted)} trusted estimates: {far:.1e}, allowed "
            f"{TRUSTED}",
            failed=not far <= TRUSTED,
        ),
    ]


def of(rows: list[Row], **fields: Any) -> list[Row]:
    return [row for row in rows if all(row[k] == v for k, v in fields.items())]


def rates(rows: list[Row]) -> list[Verdict]:
    """Slopes of log error; those of random methods seed by seed."""
    verdicts = []
    rows = of(rows, kind="rate")
    for method, (problem, structure), values in RATES:
        mine = of(rows, method=method, problem=problem, structure=structure)
        what = f"{method} on {problem} {structure}"
        if method == EARLY:
            continue
        if METHODS[method].random:
            seeds = sorted({row["seed"] for row in mine})
            slopes = [power(values, errors(mine, values, seed)) for seed in seeds]
            what += ", error as a power of the pairs"
            verdicts.append(within(what, slopes, -0.5, SLOPE_TOLERANCE))
            continue
        found = errors(mine, values, 0)
        if method == "Implicit, correct=1":
            before = errors(
                of(rows, method=EARLY, problem=problem, structure=structure), values, 0
            )
            verdicts.append(correction(what, found, before, mine[0]["contraction"]))
        elif method in SERIES:
            q = mine[0]["contraction"]
            counts = [count_to(q, math.exp(-value)) for value in values]
            slope = float(np.polyfit(counts, np.log(found), 1)[0] / math.log(q))
            what += ", error as a power of q^K"
            verdicts.append(near(what, slope, 1, RATE_TOLERANCE))
        else:
            slope = power(values, found)
            what += ", error as a power of its setting"
            verdicts.append(near(what, slope, SLOPES[method], SLOPE_TOLERANCE))
    return verdicts


def errors(rows: list[Row], values: tuple, seed: int) -> list[float]:
    by_value = {row["setting"]: row["value"] for row in of(rows, seed=seed)}
    return [by_value[value] for value in values]


def power(x: tuple, y: list[float]) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def near(what: str, found: float, expected: float, tolerance: float) -> Verdict:
    kept = abs(found - expected) <= tolerance
    return Verdict(
        f"{what}: {found:.3f}, {expected} ± {tolerance} needed: "
        f"{'kept' if kept else 'broken'}",
        failed=not kept,
    )


def correction(what: str, after: list, before: list, q: float) -> Verdict:
    """A Newton step solved to 1e-3 leaves at most ``1e-3 kappa`` of the distance."""
    most = NEWTON * (1 + q) / (1 - q)
    ratio = max(a / b for a, b in zip(after, before, strict=True))
    return Verdict(
        f"{what}, error after over before: {ratio:.1e}, allowed {most:.1e}: "
        f"{'kept' if ratio <= most else 'broken'}",
        failed=not ratio <= most,
    )


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
        "down to rounding for correct=1, those that differentiate steps and "
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
    mark = lambda verdict: "**FAILED** " if verdict.failed else ""
    lines += ["", *(f"- {mark(v)}{v.text}" for v in judge(rows))]
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
