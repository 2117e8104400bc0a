"""The conformance check: honest estimators pass, sabotaged ones do not."""

import os
import subprocess
import sys
import textwrap
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks.known import central, dense, error
from hypergrad.testing import quadratic

SOLVER = hg.Descent(optax.sgd(0.5), 200)
HONEST = {
    "CG": hg.Implicit(SOLVER),
    "Neumann": hg.Implicit(SOLVER, hg.Neumann(20)),
    "Nystrom": hg.Implicit(SOLVER, hg.Nystrom(rank=9)),
    "NystromCG": hg.Implicit(SOLVER, hg.NystromCG(rank=4)),
    "Identity": hg.Implicit(SOLVER, hg.Identity()),
    "GMRES": hg.Implicit(SOLVER, lx.GMRES(rtol=1e-12, atol=1e-12)),
    "LU": hg.Implicit(SOLVER, lx.LU()),
    "Unrolled": hg.Unrolled(SOLVER),
    "Unrolled, last": hg.Unrolled(SOLVER, truncation_length=10),
    "Forward": hg.Forward(SOLVER),
    "Reversible": hg.Reversible(0.3, 0.5, 60),
    "FixedPoint": hg.FixedPoint(SOLVER, 60),
    "FiniteDifference": hg.FiniteDifference(SOLVER),
    "CentralDifference": hg.CentralDifference(SOLVER),
    "Penalty": hg.Penalty(SOLVER, 1e3),
    "Evolution": hg.Evolution(SOLVER, 0.01, 64),
    "certified": hg.Implicit(SOLVER, hg.Neumann(200), certify=True),
}


# Programs that take long to compile; their oracles are in files of their own.
LONG = {"certified", "CentralDifference", "Evolution", "FixedPoint", "Forward"}
LONG |= {"Penalty", "Reversible"}
MARKED = [
    pytest.param(name, marks=pytest.mark.slow if name in LONG else ())
    for name in HONEST
]


@pytest.mark.parametrize("name", MARKED)
def test_honest_estimators_pass(name: str):
    """In float64, each at its declared error."""
    hg.testing.check_estimator(HONEST[name])


@pytest.mark.slow
def test_honest_estimators_pass_in_float32():
    """In a process of its own without x64, GMRES at a tolerance float32 can reach."""
    code = """
        import jax, lineax as lx, optax, hypergrad as hg
        solver = hg.Descent(optax.sgd(0.5), 200)
        linear = [hg.CG(), hg.Neumann(20), hg.Nystrom(rank=9), hg.NystromCG(rank=4)]
        linear += [hg.Identity(), lx.GMRES(rtol=1e-6, atol=1e-6), lx.LU()]
        for one in linear:
            hg.testing.check_estimator(hg.Implicit(solver, one))
        hg.testing.check_estimator(hg.Unrolled(solver))
        hg.testing.check_estimator(hg.Unrolled(solver, truncation_length=10))
        assert jax.numpy.zeros(1).dtype == "float32"
        print("all passed")
    """
    environment = {k: v for k, v in os.environ.items() if k != "JAX_ENABLE_X64"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.stdout.strip() == "all passed", done.stderr[-3000:]


class Sabotaged(eqx.Module):
    """`Implicit` with one thing wrong; each subclass says what."""

    inner: Any = hg.Implicit(SOLVER)
    target = "argmin"

    def error_bound(self, smallest, largest):
        return 0.0

    def init(self, problem, w, alpha, key=None):
        return self.inner.init(problem, w, alpha, key)

    def estimate(self, problem, state, alpha, key):
        found, state = self.inner.estimate(problem, state, alpha, key)
        return self.spoil(found, problem, alpha), state

    def with_gradient(self, found, change):
        gradient = jax.tree.map(change, found.hypergradient)
        return eqx.tree_at(lambda e: e.hypergradient, found, gradient)


class SignFlipped(Sabotaged):
    def spoil(self, found, problem, alpha):
        return self.with_gradient(found, jnp.negative)


class WithoutAKey(Sabotaged):
    def spoil(self, found, problem, alpha):
        stats = {k: v for k, v in found.stats.items() if k != "adjoint_residual"}
        return hg.Estimate(found.value, found.hypergradient, found.w, stats)


class SumOfPartials(Sabotaged):
    """Perturbs a whole leaf at once, as gradhpo does."""

    def spoil(self, found, problem, alpha):
        return self.with_gradient(found, lambda g: jnp.full_like(g, jnp.sum(g)))


class AlwaysTrusted(Sabotaged):
    def spoil(self, found, problem, alpha):
        trusted = jnp.asarray(True)
        return eqx.tree_at(lambda e: e.stats["trusted"], found, trusted)


class WithoutTheDirectTerm(Sabotaged):
    def spoil(self, found, problem, alpha):
        direct = jax.grad(problem.outer, argnums=1)(found.w, alpha, problem.outer_data)
        gradient = jax.tree.map(jnp.subtract, found.hypergradient, direct)
        return eqx.tree_at(lambda e: e.hypergradient, found, gradient)


class WithoutTheIndirectTerm(Sabotaged):
    def spoil(self, found, problem, alpha):
        direct = jax.grad(problem.outer, argnums=1)(found.w, alpha, problem.outer_data)
        return eqx.tree_at(lambda e: e.hypergradient, found, direct)


class NeverTrusted(Sabotaged):
    def spoil(self, found, problem, alpha):
        trusted = jnp.asarray(False)
        return eqx.tree_at(lambda e: e.stats["trusted"], found, trusted)


class HidesNaN(Sabotaged):
    """The value looks finite although the data is not."""

    def spoil(self, found, problem, alpha):
        return eqx.tree_at(lambda e: e.value, found, jnp.nan_to_num(found.value))


class FlatStructure(Sabotaged):
    """One vector where ``alpha`` is a tree."""

    def spoil(self, found, problem, alpha):
        line = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(alpha)])
        if jax.tree.structure(alpha) == jax.tree.structure(line):
            return found
        return hg.Estimate(found.value, line, found.w, found.stats)


class WrongWhenWarm(Sabotaged):
    """Right at first, three times too long from the second estimate on."""

    def init(self, problem, w, alpha, key=None):
        return self.inner.init(problem, w, alpha, key), jnp.asarray(1.0)

    def estimate(self, problem, state, alpha, key):
        state, factor = state
        found, state = self.inner.estimate(problem, state, alpha, key)
        longer = lambda g: g * factor.astype(g.dtype)
        return self.with_gradient(found, longer), (state, jnp.asarray(3.0))


class ClaimsExactness(Sabotaged):
    """A series of twenty terms that declares no error."""

    inner: Any = hg.Implicit(SOLVER, hg.Neumann(20))

    def spoil(self, found, problem, alpha):
        return eqx.tree_at(lambda e: e.stats["trusted"], found, jnp.asarray(True))


@pytest.mark.parametrize(
    "kind",
    [
        SignFlipped,
        WithoutAKey,
        SumOfPartials,
        AlwaysTrusted,
        WithoutTheDirectTerm,
        WithoutTheIndirectTerm,
        NeverTrusted,
        HidesNaN,
        FlatStructure,
        WrongWhenWarm,
        ClaimsExactness,
    ],
)
def test_sabotaged_estimators_fail(kind):
    """Each breaks one promise; the same estimator unspoilt passes above."""
    with pytest.raises(AssertionError):
        hg.testing.check_estimator(kind())


def test_an_untouched_wrapper_passes():
    """So that what fails above is the sabotage, not the wrapper."""

    class Honest(Sabotaged):
        def spoil(self, found, problem, alpha):
            return found

    hg.testing.check_estimator(Honest())


def test_what_is_no_estimator_fails():
    """No init, or a target that does not exist."""
    with pytest.raises(AssertionError, match="needs init"):
        hg.testing.check_estimator(object())

    class Elsewhere(Sabotaged):
        target = "somewhere"

    with pytest.raises(AssertionError, match="target is 'somewhere'"):
        hg.testing.check_estimator(Elsewhere())


@pytest.mark.parametrize("structure", ["scalar", "vector", "tree"])
def test_its_problems_have_the_hypergradient_they_state(structure: str):
    """Central differences of the value at a dense solution; spectrum in [1/2, 3/2]."""
    problem, w, alpha, exact = quadratic(jax.random.key(1), structure)
    value = lambda a: dense(problem, w, a)["value"]
    assert error(exact, central(value, alpha, 1e-2)) < 1e-8
    ends = np.linalg.eigvalsh(dense(problem, w, alpha)["H"])[[0, -1]]
    assert ends[0] >= 0.5 - 1e-12
    assert ends[1] <= 1.5 + 1e-12


def test_an_unknown_structure_is_refused():
    """The message names those that there are."""
    with pytest.raises(ValueError, match="'scalar', 'tree', 'vector'"):
        quadratic(jax.random.key(0), "matrix")
