"""The conformance check accepts correct estimators and rejects sabotaged ones."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks.shared.reference_problems import central, dense, error
from hypergrad.testing import quadratic
from tests.parameters import slow_except
from tests.processes import run_python

SOLVER = hg.Descent(optax.sgd(0.5), 200)
ESTIMATORS = {
    "CG": hg.Implicit(SOLVER),
    "Neumann": hg.Implicit(SOLVER, hg.Neumann(20)),
    "Identity": hg.Implicit(SOLVER, hg.Identity()),
    "Nystrom": hg.Implicit(SOLVER, hg.Nystrom(rank=9)),
    "NystromCG": hg.Implicit(SOLVER, hg.NystromCG(rank=4)),
    "GMRES": hg.Implicit(SOLVER, lx.GMRES(rtol=1e-12, atol=1e-12)),
    "LU": hg.Implicit(SOLVER, lx.LU()),
    "Unrolled": hg.Unrolled(SOLVER),
    "Unrolled, truncated": hg.Unrolled(SOLVER, truncation_length=10),
    "Forward": hg.Forward(SOLVER),
    "Reversible": hg.Reversible(0.3, 0.5, 60),
    "FixedPoint": hg.FixedPoint(SOLVER, 60),
    "FiniteDifference": hg.FiniteDifference(SOLVER),
    "CentralDifference": hg.CentralDifference(SOLVER),
    "Penalty": hg.Penalty(SOLVER, 1e3),
    "Evolution": hg.Evolution(SOLVER, 0.01, 64),
    "certified": hg.Implicit(SOLVER, hg.Neumann(200), certify=True),
    "tolerance": hg.Implicit(SOLVER, rtol=1e-4),
    "Average": hg.Average(hg.Implicit(SOLVER), 2),
}


@pytest.mark.parametrize("name", slow_except(ESTIMATORS, ["CG"]))
def test_correct_estimators_pass(name: str):
    hg.testing.check_estimator(ESTIMATORS[name])


@pytest.mark.slow
def test_correct_estimators_pass_in_float32():
    """The process has no x64; GMRES has a tolerance that float32 can reach."""
    code = """
        import jax, lineax as lx, optax, hypergrad as hg
        solver = hg.Descent(optax.sgd(0.5), 200)
        linear_solvers = [
            hg.CG(), hg.Neumann(20), hg.Nystrom(rank=9), hg.NystromCG(rank=4),
            hg.Identity(), lx.GMRES(rtol=1e-6, atol=1e-6), lx.LU(),
        ]
        for linear_solver in linear_solvers:
            hg.testing.check_estimator(hg.Implicit(solver, linear_solver))
        hg.testing.check_estimator(hg.Unrolled(solver))
        hg.testing.check_estimator(hg.Unrolled(solver, truncation_length=10))
        assert jax.numpy.zeros(1).dtype == "float32"
    """
    run_python(code, env={"JAX_ENABLE_X64": "0", "PYTHONWARNINGS": "error"})


class Modified(eqx.Module):
    """An exact estimator whose estimates are changed by ``modify``."""

    modify: Callable = eqx.field(static=True)
    estimator: Any = hg.Implicit(SOLVER)
    target: str = eqx.field(static=True, default="argmin")

    def error_bound(self, eig_min, eig_max):
        return 0.0

    def init(self, problem, w, alpha, key=None):
        return self.estimator.init(problem, w, alpha, key), jnp.asarray(0)

    def estimate(self, problem, state, alpha, key):
        state, index = state
        estimate, state = self.estimator.estimate(problem, state, alpha, key)
        changes = self.modify(estimate, problem, alpha, index)
        return dataclasses.replace(estimate, **changes), (state, index + 1)


def map_hypergradient(fn):
    return lambda estimate, problem, alpha, index: {
        "hypergradient": jax.tree.map(fn, estimate.hypergradient)
    }


def direct_term(estimate, problem, alpha):
    outer_grad = jax.grad(problem.outer_value, argnums=1)
    return outer_grad(estimate.w, alpha, problem.outer_data)


def without_direct_term(estimate, problem, alpha, index):
    direct = direct_term(estimate, problem, alpha)
    return {"hypergradient": jax.tree.map(jnp.subtract, estimate.hypergradient, direct)}


def without_indirect_term(estimate, problem, alpha, index):
    return {"hypergradient": direct_term(estimate, problem, alpha)}


def flat_structure(estimate, problem, alpha, index):
    leaves = jax.tree.leaves(estimate.hypergradient)
    flat = jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])
    is_tree = jax.tree.structure(alpha) != jax.tree.structure(flat)
    return {"hypergradient": flat} if is_tree else {}


def wrong_when_warm(estimate, problem, alpha, index):
    factor = jnp.where(index > 0, 3.0, 1.0)
    scale = lambda g: g * factor.astype(g.dtype)
    return {"hypergradient": jax.tree.map(scale, estimate.hypergradient)}


def vector_statistic(estimate, problem, alpha, index):
    return {"stats": estimate.stats | {"adjoint_residual": jnp.zeros(2)}}


def with_flag(value):
    return lambda *args: {"flags": {"flag": jnp.asarray(value)}}


SABOTAGES = {
    "sign": map_hypergradient(jnp.negative),
    "whole leaf perturbed": map_hypergradient(lambda g: jnp.full_like(g, jnp.sum(g))),
    "no direct term": without_direct_term,
    "no indirect term": without_indirect_term,
    "flat structure": flat_structure,
    "wrong when warm": wrong_when_warm,
    "vector statistic": vector_statistic,
    "never trusted": with_flag(True),
    "always trusted": with_flag(False),
    "hidden NaN": lambda e, *args: {"value": jnp.nan_to_num(e.value)},
}


#: They fail in the first of the checks, the others after most of them have passed.
QUICKLY_FOUND = [
    *("sign", "no direct term", "no indirect term", "wrong when warm"),
    *("vector statistic", "never trusted"),
]


@pytest.mark.parametrize("case", slow_except(SABOTAGES, QUICKLY_FOUND))
def test_sabotaged_estimators_fail(case):
    with pytest.raises(AssertionError):
        hg.testing.check_estimator(Modified(SABOTAGES[case]))


@pytest.mark.slow
def test_the_unmodified_wrapper_passes():
    """The sabotages, not the wrapper, cause the failures."""
    hg.testing.check_estimator(Modified(lambda *args: {}))


def test_an_estimator_must_keep_its_declared_error():
    """A series of twenty terms declares no error."""
    series = hg.Implicit(SOLVER, hg.Neumann(20))
    with pytest.raises(AssertionError, match="error_bound"):
        hg.testing.check_estimator(Modified(with_flag(False), series))


def test_objects_that_are_no_estimators_fail():
    with pytest.raises(AssertionError, match="init"):
        hg.testing.check_estimator(object())
    with pytest.raises(AssertionError, match="target"):
        hg.testing.check_estimator(Modified(lambda *args: {}, target="somewhere"))


@pytest.mark.parametrize("structure", ["scalar", "vector", "tree"])
def test_the_hypergradient_of_the_quadratic_is_exact(structure: str):
    """It equals central differences; the eigenvalues of H are in [1/2, 3/2]."""
    problem, w, alpha, exact = quadratic(jax.random.key(1), structure)
    value_fn = lambda alpha: dense(problem, w, alpha)["value"]
    assert error(exact, central(value_fn, alpha, 1e-2)) < 1e-8
    eigenvalues = np.linalg.eigvalsh(dense(problem, w, alpha)["H"])
    assert eigenvalues[0] >= 0.5 - 1e-12
    assert eigenvalues[-1] <= 1.5 + 1e-12


def test_an_unknown_structure_is_an_error():
    with pytest.raises(ValueError, match="structure"):
        quadratic(jax.random.key(0), "matrix")
