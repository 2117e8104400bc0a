"""Implicit gradients of this library against those of JAXopt and Optimistix."""

import functools
import warnings

import jax
import jax.numpy as jnp
import lineax as lx
import optax
import optimistix as optx
import pytest

import hypergrad as hg
from benchmarks.shared.reference_problems import error, get_reference

with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
    import jaxopt
    from jaxopt.implicit_diff import custom_root, root_vjp

NAMES = ["ridge per-example", "logistic per-weight"]


def inner_loss_fn(reference):
    """Returns ``(w, alpha) -> L``."""
    loss, data = reference.problem.inner_loss, reference.problem.inner_data
    return lambda w, alpha: loss(w, alpha, data)


def outer_loss_fn(reference):
    """Returns ``(w, alpha) -> M``."""
    loss, data = reference.problem.outer_value, reference.problem.outer_data
    return lambda w, alpha: loss(w, alpha, data)


def check_references(name, expected, rtol):
    """Compares `hg.Implicit` and the gradient through `hg.argmin` with ``expected``."""
    assert error(implicit_gradient(name), expected) < rtol
    assert error(argmin_gradient(name), expected) < rtol


@functools.cache
def implicit_gradient(name):
    reference = get_reference(name)
    gradient_fn = hg.hypergradient(reference.problem, hg.Implicit(hg.Newton()))
    return gradient_fn(reference.w, reference.alpha).hypergradient


@functools.cache
def argmin_gradient(name):
    reference = get_reference(name)
    solution_fn = hg.argmin(reference.problem.inner_loss, hg.LBFGS())
    outer = outer_loss_fn(reference)
    solve = lambda alpha: solution_fn(reference.w, alpha, reference.problem.inner_data)
    return jax.jit(jax.grad(lambda alpha: outer(solve(alpha), alpha)))(reference.alpha)


@pytest.mark.parametrize("name", NAMES)
def test_jaxopt_lbfgs_with_implicit_differentiation(name):
    """`jax.grad` through `jaxopt.LBFGS.run` with ``implicit_diff=True``."""
    reference = get_reference(name)
    inner, outer = inner_loss_fn(reference), outer_loss_fn(reference)
    solver = jaxopt.LBFGS(inner, tol=1e-12, maxiter=500, implicit_diff=True)
    value = lambda alpha: outer(solver.run(reference.w, alpha).params, alpha)
    check_references(name, jax.grad(value)(reference.alpha), 1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_jaxopt_root_vjp(name):
    """`root_vjp` of the stationarity condition at the exact solution."""
    reference = get_reference(name)
    w = reference.solution(reference.alpha)
    b, direct = jax.grad(outer_loss_fn(reference), argnums=(0, 1))(w, reference.alpha)
    solve = functools.partial(jaxopt.linear_solve.solve_cg, tol=1e-13)
    grad_fn = jax.grad(inner_loss_fn(reference))
    (indirect,) = root_vjp(grad_fn, w, (reference.alpha,), b, solve=solve)
    check_references(name, direct + indirect, 1e-9)


def test_jaxopt_custom_root_around_newton():
    """`custom_root` as a decorator of the solver of this library."""
    reference = get_reference("logistic per-weight")
    loss, data = reference.problem.inner_loss, reference.problem.inner_data

    @custom_root(jax.grad(inner_loss_fn(reference)))
    def solve(w, alpha):
        return hg.Newton().solve(loss, w, alpha, data, None)[0]

    outer = outer_loss_fn(reference)
    value = lambda alpha: outer(solve(reference.w, alpha), alpha)
    check_references("logistic per-weight", jax.grad(value)(reference.alpha), 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_optimistix_with_its_implicit_adjoint(name):
    """`jax.grad` through `optimistix.minimise` with a dense adjoint solve."""
    reference = get_reference(name)
    inner, outer = inner_loss_fn(reference), outer_loss_fn(reference)

    def value(alpha):
        solution = optx.minimise(
            inner,
            optx.BFGS(rtol=1e-13, atol=1e-13),
            reference.w,
            alpha,
            adjoint=optx.ImplicitAdjoint(linear_solver=lx.AutoLinearSolver(None)),
            max_steps=500,
        )
        return outer(solution.value, alpha)

    check_references(name, jax.grad(value)(reference.alpha), 1e-7)


def test_unrolled_jaxopt_gradient_descent():
    """Twenty steps of `jaxopt.GradientDescent` without acceleration."""
    reference = get_reference("logistic per-weight")
    solver = jaxopt.GradientDescent(
        inner_loss_fn(reference), stepsize=0.3, acceleration=False, maxiter=20, tol=0.0,
        implicit_diff=False, unroll=True,
    )  # fmt: skip
    outer = outer_loss_fn(reference)
    value = lambda alpha: outer(solver.run(reference.w, alpha).params, alpha)
    estimator = hg.Unrolled(hg.Descent(optax.sgd(0.3), 20))
    estimate = hg.hypergradient(reference.problem, estimator)(
        reference.w, reference.alpha
    )
    assert error(estimate.hypergradient, jax.grad(value)(reference.alpha)) < 1e-11


def test_early_stop_is_wrong_in_jaxopt_and_untrusted_here():
    """After five steps both return the same number, off by more than 10%."""
    reference = get_reference("ridge scalar")
    settings = {"stepsize": 0.05, "acceleration": False, "maxiter": 5, "tol": 0.0}
    solver = jaxopt.GradientDescent(inner_loss_fn(reference), **settings)
    outer = outer_loss_fn(reference)
    value = lambda alpha: outer(solver.run(reference.w, alpha).params, alpha)
    jaxopt_gradient = jax.grad(value)(reference.alpha)
    gradient_fn = hg.hypergradient(
        reference.problem, hg.Implicit(hg.from_jaxopt(solver))
    )
    estimate = gradient_fn(reference.w, reference.alpha)
    assert error(estimate.hypergradient, jaxopt_gradient) < 1e-4
    assert error(jaxopt_gradient, reference.exact(reference.alpha)) > 0.1
    assert not estimate.trusted


def test_second_derivatives_of_jaxopt():
    """Reverse over reverse in JAXopt; `hg.argmin` also works in forward mode."""
    reference = get_reference("ridge per-weight")
    data, outer = reference.problem.inner_data, outer_loss_fn(reference)
    solver = jaxopt.LBFGS(inner_loss_fn(reference), tol=1e-13, maxiter=500)
    jaxopt_value = lambda alpha: outer(solver.run(reference.w, alpha).params, alpha)
    solution_fn = hg.argmin(reference.problem.inner_loss, hg.Newton())
    value = lambda alpha: outer(solution_fn(reference.w, alpha, data), alpha)
    expected = jax.jacrev(jax.grad(jaxopt_value))(reference.alpha)
    assert error(jax.jit(jax.hessian(value))(reference.alpha), expected) < 1e-5
    with pytest.raises(TypeError):
        jax.jacfwd(jaxopt_value)(reference.alpha)
    assert jnp.all(jnp.isfinite(jax.jacfwd(value)(reference.alpha)))
