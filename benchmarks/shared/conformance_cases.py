"""Cases of the conformance table: problems, methods with hyperparameters, rates."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax

import hypergrad as hg
from hypergrad.bench import Cell
from hypergrad.runtime.compat import enable_x64

from .problem_setup import ProblemSetup, make_setup
from .reference_problems import flat, get_reference, quadratic, two_losses

# Problems by family and structure; the names are those of `get_reference`.
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
RTOL = 1e-4  # relative error that `Implicit` is asked for
TERMS = 50  # of a series, or steps of a truncated reverse pass
STRENGTH = 1e3
SIGMA, PAIRS = 1e-2, 64
EXACT_RTOL = 1e-9  # largest error in float64 of an estimator that is declared exact
TRUSTED_RTOL = 2e-2  # largest error of a trusted estimate, as in the table `trust`


def second_loss(w, alpha, batch):
    return jnp.sum(jnp.sin(flat(w))) + jnp.sum(flat(alpha) ** 2)


@functools.lru_cache(maxsize=1)
def setup_of(family: str, structure: str) -> ProblemSetup:
    """Returns the problem in float64 NumPy arrays, for use in either precision."""
    jax.clear_caches()  # thousands of live programs exhaust a process
    with enable_x64(True):
        if family == "two losses":
            reference = quadratic("nested")
            problem = two_losses(reference, second_loss)
            return make_setup(reference._replace(problem=problem), formula=False)
        formula = family in ("ridge", "quadratic") or family.startswith("SMD")
        return make_setup(get_reference(PROBLEMS[family, structure]), formula)


# Methods.


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
      promise: Error that its docstring states, in short.
      make: ``(setup, dtype, value) -> estimator``; ``value`` is the hyperparameter over
        which its rate is measured, None for that of the table.
      biased: ``setup -> hypergradient [K, N]`` that the bias in its docstring predicts.
      is_random: Whether its estimate depends on the key.
    """

    promise: str
    make: Callable[[ProblemSetup, str, Any], Any]
    biased: Callable[[ProblemSetup], Any] | None = None
    is_random: bool = False


def implicit(linear: Callable[[ProblemSetup, str, Any], Any]) -> Callable:
    """Returns the function that makes `Implicit` with a linear solver."""
    return lambda setup, dtype, x: hg.Implicit(hg.Newton(), linear(setup, dtype, x))


def tolerance(dtype: str) -> float:
    """Returns the default tolerance of our solvers, for those of lineax."""
    return float(np.finfo(dtype).eps) ** 0.75


def gmres(setup: ProblemSetup, dtype: str, x: Any) -> lx.GMRES:
    """Returns the solver of lineax with the tolerance of ours."""
    return lx.GMRES(rtol=tolerance(dtype), atol=tolerance(dtype))


def early(num_newton_steps: int) -> Callable:
    """Returns the maker of `Implicit` whose inner loop leaves ``x`` of its distance."""
    return lambda setup, dtype, x: hg.Implicit(
        setup.descent
        if x is None
        else hg.Descent(optax.sgd(setup.step), setup.steps_to(x)),
        num_newton_steps=num_newton_steps,
    )


def damping(setup: ProblemSetup, x: Any) -> float:
    """Returns the damping, ``x`` times the smallest eigenvalue."""
    return (1e-3 if x is None else x) * setup.eig_min


def nystrom(setup: ProblemSetup, dtype: str, x: Any) -> hg.Nystrom:
    """Returns the solver with full rank, so that only its damping causes an error."""
    return hg.Nystrom(len(setup.matrices["H"]), damping(setup, x))


def instead_of_inverse(matrix: Callable[[ProblemSetup], np.ndarray]) -> Callable:
    """Returns ``direct - J'(P b)`` with a dense ``P`` in place of ``H^-1``."""

    def biased(setup: ProblemSetup) -> np.ndarray:
        matrices = setup.matrices
        return matrices["direct"] - (matrix(setup) @ matrices["b"].T).T @ matrices["J"]

    return biased


def penalty(symmetric: bool) -> Callable:
    """Returns the maker of `Penalty`."""
    return lambda setup, dtype, x: hg.Penalty(
        hg.Newton(), STRENGTH if x is None else x, symmetric=symmetric
    )


identity = lambda setup: np.eye(len(setup.matrices["H"]))
damped = lambda setup: np.linalg.inv(
    setup.matrices["H"] + damping(setup, None) * identity(setup)
)
terms = lambda x: TERMS if x is None else x
pairs = lambda x: PAIRS if x is None else x

METHODS = {
    "Implicit, CG": Method(
        "exact", implicit(lambda setup, dtype, x: hg.CG(preconditioner=None))
    ),
    "Implicit, NystromCG": Method(
        "exact", implicit(lambda setup, dtype, x: hg.NystromCG(3))
    ),
    "Implicit, GMRES": Method("exact", implicit(gmres)),
    "Implicit, LU": Method("exact", implicit(lambda setup, dtype, x: lx.LU())),
    "Implicit, correct=1": Method("exact", early(1)),
    "Implicit, rel_err": Method(
        "rtol 1e-4",
        lambda setup, dtype, x: hg.Implicit(
            setup.descent, num_newton_steps=1, rtol=RTOL
        ),
    ),
    "Average": Method(
        "exact", lambda setup, dtype, x: hg.Average(hg.Implicit(hg.Newton()), 2)
    ),
    "SOBA": Method(
        "exact, settled",
        lambda setup, dtype, x: hg.testing.RepeatedSteps(
            hg.SOBA(optax.sgd(setup.step)), 2 * setup.steps
        ),
    ),
    "Unrolled": Method("exact", lambda setup, dtype, x: hg.Unrolled(setup.descent)),
    "Forward": Method("exact", lambda setup, dtype, x: hg.Forward(setup.descent)),
    "Reversible": Method(
        "resolution", lambda setup, dtype, x: hg.Reversible(*setup.momentum)
    ),
    "CentralDifference": Method(
        "epsilon²", lambda setup, dtype, x: hg.CentralDifference(hg.Newton(), x)
    ),
    "Implicit, Neumann": Method(
        "q^50", implicit(lambda setup, dtype, x: hg.Neumann(terms(x), setup.step))
    ),
    "Unrolled, last": Method(
        "q^50",
        lambda setup, dtype, x: hg.Unrolled(setup.descent, truncation_length=terms(x)),
    ),
    "FixedPoint": Method(
        "q^50", lambda setup, dtype, x: hg.FixedPoint(setup.descent, terms(x))
    ),
    "Implicit, Nystrom": Method(
        "damping", implicit(nystrom), instead_of_inverse(damped)
    ),
    "Implicit, Identity": Method(
        "H for I",
        implicit(lambda setup, dtype, x: hg.Identity()),
        instead_of_inverse(identity),
    ),
    "FiniteDifference": Method(
        "H for I / step",
        lambda setup, dtype, x: hg.FiniteDifference(hg.Newton(), step_size=setup.step),
        instead_of_inverse(lambda setup: setup.step * identity(setup)),
    ),
    "Penalty": Method("1 / 1000", penalty(symmetric=False)),
    "Penalty, symmetric": Method("1 / 1000²", penalty(symmetric=True)),
    "Evolution": Method(
        "64 pairs",
        lambda setup, dtype, x: hg.Evolution(hg.Newton(), SIGMA, pairs(x)),
        is_random=True,
    ),
    "PersistentEvolution": Method(
        "64 pairs",
        lambda setup, dtype, x: hg.PersistentEvolution(
            setup.descent, SIGMA, pairs(x), unroll_length=setup.steps
        ),
        is_random=True,
    ),
    "Implicit, stopped early": Method("", early(0)),
}
# The method with which num_newton_steps=1 is compared; it has a rate only.
EARLY = "Implicit, stopped early"
TABLE_METHODS = [method for method in METHODS if method != EARLY]
# Estimators that take one outer loss; any other refusal ends the run.
REFUSED = {("Reversible", "two losses"), ("SOBA", "two losses")}
SERIES = ("Implicit, Neumann", "Unrolled, last", "FixedPoint")
NEVER_TRUSTED = (
    *("CentralDifference", "FiniteDifference", "Penalty", "Penalty, symmetric"),
    *("Evolution", "PersistentEvolution", "SOBA"),
)


# Rates: method, problem and hyperparameters. Those of a series are errors: this many
# factors of 1/e.
FACTORS = (4, 6, 9, 12)
STRENGTHS = (30.0, 100.0, 300.0, 1000.0)
EPSILONS = (1e-3, 3e-3, 1e-2, 3e-2)
DAMPINGS = (1e-4, 3e-4, 1e-3, 3e-3)
FRACTIONS = (1e-3, 1e-5)  # of the distance that an inner loop leaves
COUNTS = (4, 16, 64, 256)
NUM_KEYS = 16  # a random method's error is the root mean square over these
VECTORS = (("quadratic", "vector"), ("logistic", "vector"))
CURVED = (("logistic", "vector"), ("network", "pytree"))
RATES = [
    *((method, problem, FACTORS) for method in SERIES for problem in VECTORS),
    *(("Penalty", problem, STRENGTHS) for problem in CURVED),
    *(("Penalty, symmetric", problem, STRENGTHS) for problem in CURVED),
    *(("CentralDifference", problem, EPSILONS) for problem in CURVED),
    *(("Implicit, Nystrom", problem, DAMPINGS) for problem in VECTORS),
    *(
        (method, problem, FRACTIONS)
        for method in ("Implicit, correct=1", EARLY)
        for problem in CURVED
    ),
    ("Evolution", ("ridge", "vector"), COUNTS),
    ("PersistentEvolution", ("ridge", "vector"), COUNTS),
]


def cell(kind, method, problem, dtype, value=None, seed=0) -> Cell:
    """Returns a cell of kind "error" or "rate"; ``problem`` is family and structure."""
    names = ("kind", "method", "problem", "structure", "dtype", "setting", "seed")
    return dict(zip(names, (kind, method, *problem, dtype, value, seed), strict=True))


def cells(scale: str, seeds: int) -> list[Cell]:
    """Returns the cells by problem, so that each problem is made only once.

    Random methods alone have several seeds.
    """
    del scale
    result = []
    for problem in PROBLEMS:
        result += [
            cell("error", method, problem, dtype)
            for method in TABLE_METHODS
            for dtype in DTYPES
        ]
        # In float32 rounding leaves no room for a line.
        result += [
            cell("rate", method, problem, "float64", value, seed)
            for method, rate_problem, values in RATES
            if rate_problem == problem
            for value in values
            for seed in range(seeds if METHODS[method].is_random else 1)
        ]
    return result
