"""What the conformance table asks: problems, methods and their settings, rates."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np

import hypergrad as hg
from hypergrad.studies.record import Row

from .known import any_known, flat, quadratic, two_losses
from .setting import Setting, describe, sgd

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


def early(num_newton_steps: int) -> Callable:
    """From an inner loop that stopped with ``x`` of its distance left."""
    return lambda at, dtype, x: hg.Implicit(
        at.descent if x is None else hg.Descent(sgd(at.step), at.steps_to(x)),
        num_newton_steps=num_newton_steps,
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
        lambda at, dtype, x: hg.Implicit(at.descent, num_newton_steps=1, rtol=ASKED),
    ),
    "Average": Method(
        "exact", lambda at, dtype, x: hg.Average(hg.Implicit(hg.Newton()), 2)
    ),
    "SOBA": Method(
        "exact, settled",
        lambda at, dtype, x: hg.testing.RepeatedSteps(
            hg.SOBA(sgd(at.step)), 2 * at.steps
        ),
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
        "q^50", lambda at, dtype, x: hg.Unrolled(at.descent, truncation_length=terms(x))
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
            at.descent, SIGMA, pairs(x), unroll_length=at.steps
        ),
        random=True,
    ),
    "Implicit, stopped early": Method("", early(0)),
}
# The method with which num_newton_steps=1 is compared; it has a rate only.
EARLY = "Implicit, stopped early"
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
