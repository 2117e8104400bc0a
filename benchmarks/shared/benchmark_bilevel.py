"""The solvers of a checkout of benchmark_bilevel, without the package benchopt."""

import contextlib
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any


def checkout() -> Path | None:
    """Returns the folder of benchmark_bilevel that the environment names."""
    folder = os.environ.get("BENCHMARK_BILEVEL")
    return Path(folder) if folder else None


def load_peer(method: str) -> Any:
    """Returns the class of a solver of the checkout."""
    folder = checkout()
    if folder is None:
        raise ValueError("BENCHMARK_BILEVEL must name a checkout of benchmark_bilevel.")
    substitute_modules()
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # for its package benchmark_utils
    name = method.lower()
    path = folder / "solvers" / f"{name}.py"
    return load_module(f"benchmark_bilevel_{name}", path).Solver


def load_module(name: str, path: Path) -> Any:
    """Returns the module of a file."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"{path} must be a file of Python.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def substitute_modules() -> None:
    """Gives the solvers what they import from benchopt, where it is not imported."""
    criterion: Any = types.ModuleType("benchopt.stopping_criterion")
    criterion.SufficientProgressCriterion = lambda **options: None
    utils: Any = types.ModuleType("benchopt.utils")
    utils.profile = lambda function: function
    for module in (_substitute_benchopt(), criterion, utils):
        sys.modules.setdefault(module.__name__, module)


def make_solver(method: str, **settings: Any) -> Any:
    """Returns a solver of the checkout, with its defaults for all other settings."""
    solver = load_peer(method)()
    defaults = {name: values[0] for name, values in solver.parameters.items()}
    for name, value in (defaults | settings).items():
        setattr(solver, name, value)
    return solver


def make_steps(
    solver: Any, method: str, carry: Any, num_steps: int, num_steps_made: int
) -> Any:
    """Returns the carry of a solver after further steps in one compiled loop."""
    if isinstance(carry, tuple):  # SABA has a memory beside its variables
        memory, variables = carry
        return solver.one_epoch(variables, memory, num_steps)
    if method == "SRBA":  # counts its steps from a given number
        return solver.one_epoch(carry, num_steps, num_steps_made)
    return solver.one_epoch(carry, num_steps)


def variables_of(carry: Any) -> dict[str, Any]:
    """Returns the variables of a carry, such as ``outer_var``."""
    return carry[1] if isinstance(carry, tuple) else carry


def _substitute_benchopt() -> types.ModuleType:
    """Returns the three names of benchopt that a solver imports."""
    module: Any = types.ModuleType("benchopt")
    module.BaseSolver = type("BaseSolver", (), {"run_once": lambda self, n: None})
    module.BaseDataset = type("BaseDataset", (), {})
    module.safe_import_context = contextlib.nullcontext
    return module
