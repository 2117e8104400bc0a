"""Live references: the implicit gradients of jaxopt and of optimistix."""

import functools
import warnings

import jax
import jax.numpy as jnp
import lineax as lx
import optax
import optimistix as optx
import pytest

import hypergrad as hg
from benchmarks.known import Known, any_known, error

with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
    import jaxopt
    from jaxopt.implicit_diff import custom_root, root_vjp

NAMES = ["ridge scalar", "ridge per-weight", "ridge per-example", "logistic per-weight"]


def outer(known: Known, w, alpha):
    return known.problem.outer_value(w, alpha, known.problem.outer_data)


def inner(known: Known):
    loss, data = known.problem.inner_loss, known.problem.inner_data
    return lambda w, alpha: loss(w, alpha, data)


@functools.cache
def ours(name: str) -> jax.Array:
    known = any_known(name)
    gradient = hg.hypergradient(known.problem, hg.Implicit(hg.Newton()))
    return gradient(known.w, known.alpha).hypergradient


@functools.cache
def through_argmin(name: str) -> jax.Array:
    known = any_known(name)
    solution = hg.argmin(known.problem.inner_loss, hg.LBFGS())
    f = lambda a: outer(known, solution(known.w, a, known.problem.inner_data), a)
    return jax.jit(jax.grad(f))(known.alpha)


@pytest.mark.parametrize("name", NAMES)
def test_jaxopt_lbfgs_with_implicit_diff(name: str):
    """jax.grad through jaxopt.LBFGS.run, implicit_diff=True."""
    known = any_known(name)
    solver = jaxopt.LBFGS(inner(known), tol=1e-12, maxiter=500, implicit_diff=True)
    f = lambda alpha: outer(known, solver.run(known.w, alpha).params, alpha)
    reference = jax.grad(f)(known.alpha)
    assert error(ours(name), reference) < 1e-8
    assert error(through_argmin(name), reference) < 1e-8


@pytest.mark.parametrize("name", NAMES)
def test_jaxopt_root_vjp(name: str):
    """root_vjp of the stationarity condition at the known optimum."""
    known = any_known(name)
    w = known.best(known.alpha)
    b, direct = jax.grad(functools.partial(outer, known), argnums=(0, 1))(
        w, known.alpha
    )
    solve = functools.partial(jaxopt.linear_solve.solve_cg, tol=1e-13)
    (indirect,) = root_vjp(jax.grad(inner(known)), w, (known.alpha,), b, solve=solve)
    assert error(ours(name), direct + indirect) < 1e-9


@pytest.mark.parametrize("name", ["ridge per-weight", "logistic per-weight"])
def test_jaxopt_custom_root_around_our_solver(name: str):
    """custom_root decorating Newton's method of this package."""
    known = any_known(name)
    data = known.problem.inner_data

    @custom_root(jax.grad(inner(known)))
    def solve(w, alpha):
        newton = hg.Newton()
        return newton.solve(known.problem.inner_loss, w, alpha, data, None)[0]

    f = lambda alpha: outer(known, solve(known.w, alpha), alpha)
    assert error(ours(name), jax.grad(f)(known.alpha)) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_optimistix_with_its_implicit_adjoint(name: str):
    """jax.grad through optimistix.minimise, ImplicitAdjoint with a dense solve."""
    known = any_known(name)
    loss = inner(known)

    @jax.grad
    def reference(alpha):
        solution = optx.minimise(
            loss,
            optx.BFGS(rtol=1e-13, atol=1e-13),
            known.w,
            alpha,
            adjoint=optx.ImplicitAdjoint(linear_solver=lx.AutoLinearSolver(None)),
            max_steps=500,
        )
        return outer(known, solution.value, alpha)

    assert error(ours(name), reference(known.alpha)) < 1e-7
    assert error(through_argmin(name), reference(known.alpha)) < 1e-7


@pytest.mark.parametrize("name", ["ridge per-weight", "logistic per-weight"])
def test_jaxopt_unrolled_by_hand(name: str):
    """Twenty steps of jaxopt.GradientDescent without acceleration, unrolled."""
    known = any_known(name)
    solver = jaxopt.GradientDescent(
        inner(known), stepsize=0.3, acceleration=False, maxiter=20, tol=0.0,
        implicit_diff=False, unroll=True,
    )  # fmt: skip
    f = lambda alpha: outer(known, solver.run(known.w, alpha).params, alpha)
    estimator = hg.Unrolled(hg.Descent(optax.sgd(0.3), 20))
    found = hg.hypergradient(known.problem, estimator)(known.w, known.alpha)
    assert error(found.hypergradient, jax.grad(f)(known.alpha)) < 1e-11


def test_jaxopt_after_five_steps_is_wrong_and_ours_says_so():
    """The same early-stopped point: the same number, 10% off and more, but flagged."""
    known = any_known("ridge scalar")
    settings = {"stepsize": 0.05, "acceleration": False, "maxiter": 5, "tol": 0.0}
    solver = jaxopt.GradientDescent(inner(known), **settings)
    f = lambda alpha: outer(known, solver.run(known.w, alpha).params, alpha)
    reference = jax.grad(f)(known.alpha)
    adapted = hg.from_jaxopt(solver)
    found = hg.hypergradient(known.problem, hg.Implicit(adapted))(known.w, known.alpha)
    assert error(found.hypergradient, reference) < 1e-4
    assert error(reference, known.exact(known.alpha)) > 0.1
    assert not found.stats["trusted"]


@pytest.mark.parametrize("name", ["ridge per-weight", "logistic per-weight"])
def test_second_derivatives_against_jaxopt(name: str):
    """Reverse over reverse through jaxopt; ours also forward, where jaxopt refuses."""
    known = any_known(name)
    data = known.problem.inner_data
    solver = jaxopt.LBFGS(inner(known), tol=1e-13, maxiter=500)
    theirs = lambda alpha: outer(known, solver.run(known.w, alpha).params, alpha)
    solution = hg.argmin(known.problem.inner_loss, hg.Newton())
    mine = lambda alpha: outer(known, solution(known.w, alpha, data), alpha)
    reference = jax.jacrev(jax.grad(theirs))(known.alpha)
    assert error(jax.jit(jax.hessian(mine))(known.alpha), reference) < 1e-5
    with pytest.raises(TypeError):
        jax.jacfwd(theirs)(known.alpha)
    assert jnp.all(jnp.isfinite(jax.jacfwd(mine)(known.alpha)))
