"""Tests of the solvers that are written for benchopt.

benchopt itself is replaced by the few names that a solver imports, so that it need not
be installed. The problem is a mean of quadratics whose solution is known:
``L = mean_i |w - alpha - c_i|² / 2`` and ``M = mean_j |w - d_j|² / 2``, so that
``w* = alpha + mean c`` and ``alpha* = mean d - mean c``.
"""

import contextlib
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from hypergrad.bench.benchopt import METHODS, write_solvers

NUM_INNER, NUM_OUTER, DIM = 64, 48, 3


def substitute_modules():
    benchopt = types.ModuleType("benchopt")
    benchopt.BaseSolver = object
    benchopt.safe_import_context = contextlib.nullcontext
    stopping = types.ModuleType("benchopt.stopping_criterion")
    stopping.SufficientProgressCriterion = lambda **_: None
    return {"benchopt": benchopt, "benchopt.stopping_criterion": stopping}


@pytest.fixture
def solvers(tmp_path, monkeypatch):
    """The classes of the written files, by the name of the method."""
    for name, module in substitute_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    classes = {}
    for method, path in zip(METHODS, write_solvers(tmp_path), strict=True):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        classes[method] = module.Solver
    return classes


def slice_of(points, start, batch_size):
    return jax.lax.dynamic_slice_in_dim(points, start, batch_size)


@pytest.mark.parametrize("method", METHODS)
def test_a_written_solver_finds_the_known_solution(solvers, method, key):
    inner_key, outer_key = jax.random.split(key)
    # Little noise, as a mean over batches of 16 must come close.
    inner = 1.0 + 0.01 * jax.random.normal(inner_key, (NUM_INNER, DIM))
    outer = 3.0 + 0.01 * jax.random.normal(outer_key, (NUM_OUTER, DIM))

    def f_inner(w, alpha, start=0, batch_size=1):
        rows = slice_of(inner, start, batch_size)
        return jnp.mean(jnp.sum(((w - alpha)[None] - rows) ** 2, 1)) / 2

    def f_outer(w, alpha, start=0, batch_size=1):
        rows = slice_of(outer, start, batch_size)
        return jnp.mean(jnp.sum((w[None] - rows) ** 2, 1)) / 2

    solver = solvers[method]()
    for name, values in solver.parameters.items():
        setattr(solver, name, values[0])
    solver.batch_size, solver.eval_freq = 16, 1000
    solver.step_size = 0.4 if method == "SOBA" else 0.2  # that of SOBA falls
    solver.set_objective(
        f_inner, f_outer, NUM_INNER, NUM_OUTER, jnp.zeros(DIM), jnp.zeros(DIM)
    )
    values = []

    def callback():
        values.append(solver.get_result())
        return len(values) < 6

    solver.run(callback)
    assert values[0]["outer_var"].tolist() == [0.0] * DIM
    distance = jnp.abs(values[-1]["outer_var"] - (outer.mean(0) - inner.mean(0)))
    assert float(distance.max()) < 0.02
    assert float(jnp.abs(values[-1]["inner_var"] - outer.mean(0)).max()) < 0.02
