"""StocBiO of a checkout of benchmark_bilevel at 58c75ee, in NumPy alone.

The commit is of 22 November 2022, three days before the authors stored the runs that
`bilevel_ijcnn1` compares with. The packages benchopt and numba are not needed.
"""

import contextlib
import importlib
import os
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .benchmark_bilevel import load_module, substitute_modules
from .step_problems import StepProblem

PACKAGES = "benchmark_utils", "benchopt", "numba"


def checkout() -> Path | None:
    """Returns the folder that the environment names."""
    folder = os.environ.get("BENCHMARK_BILEVEL_2022")
    return Path(folder) if folder else None


def run_stocbio(
    problem: StepProblem,
    settings: dict[str, float],
    num_evaluations: int,
    num_steps: int,
    *,
    copies: bool,
) -> list[np.ndarray]:
    """Returns ``lambda`` after each evaluation of a run.

    Args:
      problem: The problem, whose losses are the code's own.
      settings: Attributes of the solver.
      num_evaluations: Number of evaluations.
      num_steps: Number of iterations from one evaluation to the next.
      copies: Whether the series is summed into an array of its own.
    """
    alphas = []

    def record(variables: tuple[np.ndarray, np.ndarray]) -> bool:
        alphas.append(variables[1].copy())
        return len(alphas) <= num_evaluations

    with _modules_of(checkout()) as folder:
        module = load_module("stocbio_2022", folder / "solvers" / "stocbio.py")
        if copies:
            module.shia = summed_series
        oracles = importlib.import_module("benchmark_utils.oracles.logreg")
        make = oracles.LogisticRegressionOracle
        wide = lambda x: np.ascontiguousarray(x, np.float64)
        inner, outer = (
            make(wide(data["x"]), wide(data["y"]), reg=reg)
            for data, reg in ((problem.inner_data, "exp"), (problem.outer_data, "none"))
        )
        solver = module.Solver()
        for name, values in solver.parameters.items():
            setattr(solver, name, values[0])
        for name, value in (settings | {"eval_freq": num_steps}).items():
            setattr(solver, name, value)
        solver.set_objective(
            inner, outer, wide(problem.w), wide(problem.alpha), numba=False
        )
        solver.run(record)
    return alphas[1:]


def summed_series(
    oracle: Any,
    w: np.ndarray,
    alpha: np.ndarray,
    b: np.ndarray,
    sampler: Any,
    num_products: int,
    step_size: float,
) -> np.ndarray:
    """Returns ``eta sum_k prod_{i <= k} (I - eta H_i) b``."""
    term, total = b, b
    for _ in range(num_products):
        rows, _ = sampler.get_batch()
        term = term - step_size * oracle.hvp(w, alpha, term, rows)
        total = total + term
    return step_size * total


@contextlib.contextmanager
def _modules_of(folder: Path | None) -> Iterator[Path]:
    """Makes the checkout's package importable, and no other one of its name."""
    if folder is None:
        raise ValueError(
            "BENCHMARK_BILEVEL_2022 must name a checkout of benchmark_bilevel at "
            "58c75ee."
        )
    is_own = lambda name: name.partition(".")[0] in PACKAGES
    other_modules = {name: x for name, x in sys.modules.items() if is_own(name)}
    path = list(sys.path)
    for name in other_modules:
        del sys.modules[name]
    substitute_modules()
    sys.modules |= _substitute_numba()
    sys.path.insert(0, str(folder))
    try:
        with warnings.catch_warnings():  # its import turns warnings into errors
            yield folder
    finally:
        for name in [name for name in sys.modules if is_own(name)]:
            del sys.modules[name]
        sys.modules.update(other_modules)
        sys.path[:] = path


def _substitute_numba() -> dict[str, types.ModuleType]:
    """Returns modules in which nothing is compiled, as with ``numba=False``."""
    package: Any = types.ModuleType("numba")
    experimental: Any = types.ModuleType("numba.experimental")
    kind = _ArrayType()
    package.njit = lambda function: function
    package.float64 = package.int64 = kind
    package.types = types.SimpleNamespace(unicode_type=kind)
    experimental.jitclass = lambda *fields: lambda cls: cls
    return {"numba": package, "numba.experimental": experimental}


class _ArrayType:
    """Stands for a type of numba and for arrays of it."""

    def __getitem__(self, index: Any) -> "_ArrayType":
        return self
