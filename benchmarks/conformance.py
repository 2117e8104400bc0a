"""Conformance: the error of every estimator on problems with exact hypergradients.

*Question.* Is every estimator as exact as it states, on every problem whose
hypergradient can be computed exactly, in float64 and in float32?

*Problems.* Ridge regression with one penalty, one per weight, or one weight per
example; quadratics with a scalar, a vector and a pytree ``w``; SMD1-5, whose outer loss
is tilted so that the adjoint matters; logistic regression with one penalty and one per
weight; a tanh network 3-4-1 with one penalty and one per layer, strong enough that the
solution is a strict minimum; a quadratic with two outer losses. The exact hypergradient
is a closed form; for logistic regression and the network it is a dense solve at the
stationary point to which Newton's method converges in float64. Inner loops run until
their error is one of rounding, so that the derivative of the finite procedure and the
one at the argmin agree.

*Estimators.* All have their default arguments, except: 50 terms of a Neumann series, of
`FixedPoint` and of a truncated reverse pass, with the step size
``2 / (eig_min + eig_max)`` that contracts fastest, by q; Nyström of full rank, damped
by a thousandth of the smallest eigenvalue; `Penalty` of strength 1000; evolution with
64 pairs of sigma 0.01; `Reversible` with heavy-ball momentum. `PersistentEvolution` has
one window as long as the run. In the row "Implicit, correct=1" the estimator has
``num_newton_steps=1``, in "Implicit, rel_err" also ``rtol=1e-4``.

*Precision.* float64 has x64 switched on, float32 has it off, which is JAX's default.

*Bounds per cell.* J, H, v and h are the cross derivative, the Hessian, the adjoint and
the hypergradient at the solution, eps is that of the dtype. *Amplification* is
``||J|| ||v|| / ||h||``, the relative error of h per relative error of v. *Condition* is
the amplification times ``kappa(H)`` plus
``||dh/dw|| max(1, ||g_0||) / (eig_min ||h||)``, where g_0 is the inner gradient at the
initial w: the relative error of h for solves with a relative residual of 1.

- Exact estimators: 1e-9 in float64; ``condition eps^(3/4)`` in float32, because
  ``eps^(3/4)`` is the residual at which all solvers stop.
- Estimators that declare an error of the adjoint, by ``error_bound`` or as q^K: that
  error times the amplification, plus rounding, ``condition eps^(3/4)``.
- `Identity`, `FiniteDifference` and Nyström, against the formula of their bias by dense
  matrices: 1e-9 or ``condition eps^(3/4)``; a difference of gradients may add
  ``10 eps^(2/3)`` times the amplification.
- Evolution: four of its own standard errors, plus sigma.
- Estimators that declare no error: the estimate must be an ascent direction.
- All exact estimates are trusted, those without an error estimate never are, and no
  trusted estimate is more than 0.02 off (0.1 until a review after the run).

*Rates in float64.* The slope of log error against K is log q within 5% for the three
series, at errors from e^-4 to e^-12. As powers, within 0.1: `Penalty` -1 and -2 in its
strength (30 to 1000), `CentralDifference` 2 in epsilon (1e-3 to 3e-2), Nyström 1 in its
damping. One Newton step leaves at most ``1e-3 kappa`` of the error of an inner loop
that stopped early. For evolution, the root mean square error over 16 keys falls as the
pairs (4 to 256) to the power -1/2: the 95% interval over seeds 0..9 lies within 0.1 of
it. Only this claim is statistical; everything else is a single instance, seed 0.

Hyperparameters and tolerances were chosen on the problems of seed 101.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hypergrad as hg
from hypergrad.bench import Cell, MeasurementTable, Row, select
from hypergrad.bench.report import markdown_table
from hypergrad.estimators.base import STATS
from hypergrad.runtime.compat import enable_x64

from .shared import plots
from .shared.conformance_cases import (
    DTYPES,
    METHODS,
    NUM_KEYS,
    PROBLEMS,
    REFUSED,
    SERIES,
    TABLE_METHODS,
    cells,
    setup_of,
    terms,
)
from .shared.conformance_findings import findings
from .shared.problem_setup import ProblemSetup, as_rows
from .shared.program import timed


def measure(cell: Cell, rows: list[Row]) -> Row:
    """Returns error, statistics and seconds of one estimate.

    JAX's own context switches x64, so that float32 is what a user gets who never turned
    x64 on; casting under x64 would leave float64 in arrays that estimators create.
    """
    del rows
    setup = setup_of(cell["problem"], cell["structure"])
    method = METHODS[cell["method"]]
    row = {"metric": "relative error", "value": None, "reason": None}
    row |= {"truth": setup.truth, "condition": setup.condition}
    row |= {"amplification": setup.amplification, "contraction": setup.contraction}
    with enable_x64(cell["dtype"] == "float64"):
        to_jax = lambda tree: jax.tree.map(jnp.asarray, tree)
        problem, w, alpha = to_jax((setup.problem, setup.w, setup.alpha))
        estimator = method.make(setup, cell["dtype"], value_of(cell, setup))
        gradient_fn = hg.hypergradient(problem, estimator)
        key = jax.random.key(cell["seed"])
        if (cell["method"], cell["problem"]) in REFUSED:
            return row | unmeasured() | {"reason": refusal(gradient_fn, w, alpha)}
        has_keys = cell["kind"] == "rate" and method.is_random
        if has_keys:
            gradient_fn = jax.vmap(gradient_fn, (None, None, 0))
            key = jax.random.split(key, NUM_KEYS)
        _, first_seconds = timed(gradient_fn, w, alpha, key)
        estimate, seconds = timed(gradient_fn, w, alpha, key)
    leaves = jax.tree.leaves((estimate.hypergradient, estimate.w))
    dtypes = {str(leaf.dtype) for leaf in leaves}
    assert dtypes == {cell["dtype"]}, f"{cell} was computed in {dtypes}"
    count = NUM_KEYS if has_keys else len(setup.exact)
    hypergradient = as_rows(estimate.hypergradient, count)
    row["declared"] = declared_error(cell, estimator, setup)
    row["value"] = distance(hypergradient, setup.exact)
    row["cosine"] = cosine(hypergradient, setup.exact)
    row["to_formula"] = None
    if method.biased is not None:
        row["to_formula"] = distance(hypergradient, method.biased(setup))
    stats = {name: float(np.mean(np.asarray(estimate.stats[name]))) for name in STATS}
    stats["trusted"] = bool(np.all(np.asarray(estimate.stats["trusted"])))
    compile_seconds = max(first_seconds - seconds, 0.0)
    return row | stats | {"compile_seconds": compile_seconds, "run_seconds": seconds}


def unmeasured() -> Row:
    """Returns the fields of an estimate that was refused."""
    names = ("declared", "cosine", "to_formula", *STATS, "trusted")
    return dict.fromkeys((*names, "compile_seconds", "run_seconds"))


def refusal(gradient_fn: Callable, w: Any, alpha: Any) -> str:
    """Returns the error message of an estimator that does not apply."""
    try:
        gradient_fn(w, alpha)
    except (TypeError, ValueError) as error:
        return str(error)
    raise AssertionError("an estimator accepts what the table expects it to refuse")


def value_of(cell: Cell, setup: ProblemSetup) -> Any:
    """Returns the hyperparameter; for a series the number of terms that it needs."""
    value = cell["setting"]
    if cell["kind"] == "rate" and cell["method"] in SERIES:
        return setup.steps_to(math.exp(-value))
    return value


def declared_error(cell: Cell, estimator: Any, setup: ProblemSetup) -> float:
    """Returns the relative error of the adjoint by ``error_bound``, or ``q^K``."""
    if cell["method"] in SERIES[1:]:
        return setup.contraction ** terms(value_of(cell, setup))
    return float(estimator.error_bound(setup.eig_min, setup.eig_max))


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    """Returns the relative error; over several keys its root mean square."""
    expected = np.broadcast_to(expected, actual.shape)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def cosine(actual: np.ndarray, expected: np.ndarray) -> float:
    """Returns the cosine of the angle between both."""
    expected = np.broadcast_to(expected, actual.shape)
    product = np.sum(actual * expected)
    return float(product / np.linalg.norm(actual) / np.linalg.norm(expected))


# The printed table.

GROUPS = {
    "ridge": ("ridge",),
    "quadratic": ("quadratic",),
    "SMD1-5": tuple(f"SMD{i}" for i in range(1, 6)),
    "logistic": ("logistic",),
    "network": ("network",),
    "two losses": ("two losses",),
}
FAMILIES = list(dict.fromkeys(family for family, _ in PROBLEMS))


def worst_error(
    rows: list[Row], method: str, dtype: str, problems: tuple
) -> float | None:
    """Returns the largest error over structures, None if the method does not apply."""
    method_rows = select(rows, kind="error", method=method, dtype=dtype)
    errors = [row["value"] for row in method_rows if row["problem"] in problems]
    return None if None in errors else max(errors)


def body(rows: list[Row]) -> list[str]:
    """Returns a line per estimator: its largest errors over structures and its cost."""
    text = (
        "Largest relative error of the hypergradient over the structures of a problem, "
        "float64 / float32; - where an estimator does not apply. Promise: the error "
        "that the estimator states, q being the contraction of gradient descent. The "
        "last two columns are the cost on the network with a penalty per layer in "
        "float64: gradient-equivalents (grad-eq) and Hessian-vector products. Its "
        "inner solve is Newton's method; it is descent down to rounding for "
        "num_newton_steps=1, for estimators that differentiate steps and for "
        "PersistentEvolution. The cost of SOBA is that of the last of its steps, twice "
        "as many as those that Unrolled makes."
    )
    cells = []
    for method in TABLE_METHODS:
        line = [method, METHODS[method].promise]
        for problems in GROUPS.values():
            pair = [worst_error(rows, method, dtype, problems) for dtype in DTYPES]
            texts = [f"{error:.0e}" for error in pair if error is not None]
            line.append(" / ".join(texts) if len(texts) == 2 else "-")
        place = {"kind": "error", "problem": "network", "structure": "pytree"}
        (cost,) = select(rows, method=method, dtype="float64", **place)
        line += [f"{cost['gradient_equivalents']:.0f}", f"{cost['num_hvps']:.0f}"]
        cells.append(line)
    headings = ["estimator", "promise", *GROUPS, "grad-eq", "HVPs"]
    return [text, "", *markdown_table(headings, cells)]


def plot(rows: list[Row], path: Path) -> None:
    """Plots a heat map of log10 error per precision: estimators by problems."""
    panels = {
        dtype: [
            [worst_error(rows, method, dtype, (problem,)) for problem in FAMILIES]
            for method in TABLE_METHODS
        ]
        for dtype in DTYPES
    }
    labels = [f"{method}  ({METHODS[method].promise})" for method in TABLE_METHODS]
    plots.errors(panels, labels, FAMILIES, path)


table = MeasurementTable(
    cells=cells,
    measure_cell=measure,
    findings=findings,
    body=body,
    plot=plot,
    source="SMD1-5 of Sinha, Malo & Deb 2014",
    data="generated problems with exact hypergradients",
    minutes=14,
    seeds=10,
)
