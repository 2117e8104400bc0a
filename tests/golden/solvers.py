"""Golden cases of inner solvers, linear solvers, `argmin` and certificates."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import optimistix as optx

import hypergrad as hg
from tests.golden import problems
from tests.golden.problems import Setup
from tests.golden.results import certificate_to_dict

with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
    import jaxopt

KEY = jax.random.key(29)
NUM_STEPS = 15


# Inner solvers.


@eqx.filter_jit
def solve(solver, inner_loss, w, alpha, data, key):
    """Calls the solver in one compiled program."""
    return solver.solve(inner_loss, w, alpha, data, key)


def run_solver(
    solver: Any, make_setup: Callable[[], Setup] = problems.logistic
) -> dict[str, Any]:
    """Returns the inner solution and the counts of a solve."""
    problem, w, alpha = make_setup()
    w, stats = solve(solver, problem.inner_loss, w, alpha, problem.inner_data, KEY)
    return {"w": w, "stats": stats}


def run_rosenbrock(solver: Any) -> dict[str, Any]:
    """Returns the minimum of a nonconvex function and the counts of a solve."""

    def inner_loss(w, alpha, batch):
        valley = 100 * (w[1:] - alpha * w[:-1] ** 2) ** 2
        return jnp.sum(valley + (1 - w[:-1]) ** 2)

    w, stats = solve(solver, inner_loss, jnp.full(3, -1.2), jnp.asarray(1.0), None, KEY)
    return {"w": w, "stats": stats}


def closed_form(alpha, batch):
    """Returns the ridge solution."""
    x, y = batch["x"], batch["y"]
    H = x.T @ x / len(y) + jnp.diag(jnp.exp(alpha))
    return jnp.linalg.solve(H, x.T @ y / len(y))


def unused_loss(w, alpha, batch):
    """Stands for the loss that an adapter replaces by that of the problem."""
    raise NotImplementedError  # an adapter that calls it ignores the problem's loss


RATES = hg.piecewise_constant_schedule(jnp.array([0.4, 0.2, 0.1]), NUM_STEPS)
CLIPPED_ADAMW = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1))
OPTIMIZERS: dict[str, Any] = {
    "sgd": optax.sgd(0.3),
    "momentum": optax.sgd(0.2, momentum=0.8),
    "nesterov": optax.sgd(0.2, momentum=0.8, nesterov=True),
    "adam": optax.adam(0.1),
    "clipped adamw": CLIPPED_ADAMW,
    "exponential decay": optax.sgd(optax.exponential_decay(0.5, 5, 0.5)),
    "piecewise constant": optax.sgd(RATES),
    "lbfgs": optax.lbfgs(0.5, linesearch=None),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, KEY), optax.sgd(0.1)),
}
JAXOPT: dict[str, Any] = {
    "GradientDescent": jaxopt.GradientDescent(unused_loss, stepsize=0.5, maxiter=20),
    "GradientDescent, plain": jaxopt.GradientDescent(
        unused_loss, stepsize=0.5, maxiter=20, acceleration=False
    ),
    "GradientDescent, search": jaxopt.GradientDescent(unused_loss, maxiter=20),
    "LBFGS": jaxopt.LBFGS(unused_loss, maxiter=10, tol=1e-3),
    "BFGS": jaxopt.BFGS(
        unused_loss, maxiter=10, tol=1e-3, linesearch="backtracking"
    ),
    "NonlinearCG": jaxopt.NonlinearCG(unused_loss, maxiter=10, tol=1e-3),
    "OptaxSolver": jaxopt.OptaxSolver(unused_loss, optax.adam(0.1), maxiter=20),
    "PolyakSGD": jaxopt.PolyakSGD(unused_loss, max_stepsize=0.5, maxiter=20),
    "ArmijoSGD": jaxopt.ArmijoSGD(unused_loss, max_stepsize=0.5, maxiter=20),
}  # fmt: skip
OPTIMISTIX: dict[str, Any] = {
    "BFGS": optx.BFGS(1e-4, 1e-4),
    "LBFGS": optx.LBFGS(1e-4, 1e-4),
    "NonlinearCG": optx.NonlinearCG(1e-3, 1e-3),
    "GradientDescent": optx.GradientDescent(0.3, 1e-3, 1e-3),
    "OptaxMinimiser": optx.OptaxMinimiser(optax.adam(0.1), 1e-2, 1e-2),
}
INNER_SOLVERS: dict[str, Callable[[], Any]] = {
    f"Descent, {name}": partial(run_solver, hg.Descent(optimizer, NUM_STEPS))
    for name, optimizer in OPTIMIZERS.items()
}
INNER_SOLVERS |= {
    "Descent, batches": partial(
        run_solver,
        hg.Descent(optax.adam(0.1), NUM_STEPS),
        partial(problems.logistic, 6),
    ),
    "Descent, keyed batches": partial(
        run_solver, hg.Descent(optax.sgd(0.2), NUM_STEPS), problems.keyed_batches
    ),
    "Descent, tuned": partial(
        run_solver,
        hg.Descent(
            lambda alpha: optax.sgd(alpha["rate"], alpha["momentum"]), NUM_STEPS
        ),
        problems.tuned,
    ),
    "Descent, no step": partial(run_solver, hg.Descent(optax.sgd(0.3), 0)),
    "Descent, float32": partial(
        run_solver,
        hg.Descent(CLIPPED_ADAMW, NUM_STEPS),
        partial(problems.ridge, dtype="float32"),
    ),
    "Newton": partial(run_solver, hg.Newton()),
    "Newton, tolerance": partial(run_solver, hg.Newton(tolerance=1e-2)),
    "Newton, two steps": partial(run_solver, hg.Newton(max_steps=2)),
    "Newton, float32": partial(
        run_solver, hg.Newton(), partial(problems.ridge, dtype="float32")
    ),
    "Newton, Rosenbrock": partial(run_rosenbrock, hg.Newton()),
    "LBFGS": partial(run_solver, hg.LBFGS()),
    "LBFGS, tolerance": partial(run_solver, hg.LBFGS(tolerance=1e-2)),
    "LBFGS, memory": partial(run_solver, hg.LBFGS(max_steps=8, memory_size=2)),
    "LBFGS, Rosenbrock": partial(run_rosenbrock, hg.LBFGS(tolerance=1e-3)),
    "ClosedForm": partial(
        run_solver, hg.ClosedForm(closed_form), partial(problems.ridge, batch_size=6)
    ),
}
INNER_SOLVERS |= {
    f"jaxopt {name}": partial(run_solver, hg.from_jaxopt(solver))
    for name, solver in JAXOPT.items()
}
INNER_SOLVERS |= {
    f"optimistix {name}": partial(run_solver, hg.from_optimistix(solver, 100))
    for name, solver in OPTIMISTIX.items()
}


# Linear solvers, by the public interface of lineax.

SIZE = 6


def dense_system(condition: float, dtype: Any = float) -> tuple[jax.Array, jax.Array]:
    """Returns a positive definite matrix of the condition number, and a vector."""
    rng = np.random.default_rng(31)
    basis, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
    matrix = (basis * np.geomspace(1.0, condition, SIZE)) @ basis.T
    return jnp.asarray(matrix, dtype), jnp.asarray(rng.normal(size=SIZE), dtype)


def linear_solution(solver, matrix, b):
    """Returns the solution of ``matrix v = b`` by products with the matrix."""
    structure = jax.ShapeDtypeStruct(b.shape, b.dtype)
    operator = lx.FunctionLinearOperator(
        lambda v: matrix @ v, structure, lx.symmetric_tag
    )
    return lx.linear_solve(operator, b, solver, throw=False).value


def run_linear_solver(solver: Any) -> dict[str, Any]:
    """Returns solutions of dense systems, and derivatives unless steps are limited.

    A derivative is another solve, which lineax does not accept if it stops early.
    """
    results = {}
    systems = {
        "well-conditioned": dense_system(3.0),
        "ill-conditioned": dense_system(100.0),
        "float32": dense_system(3.0, jnp.float32),
    }
    for name, (matrix, b) in systems.items():
        results[name] = jax.jit(partial(linear_solution, solver))(matrix, b)
    if getattr(solver, "max_steps", None) is not None:
        return results
    matrix, b = dense_system(3.0)
    loss = lambda matrix, b: jnp.sum(jnp.sin(linear_solution(solver, matrix, b)))
    results["grad"] = jax.jit(jax.grad(loss, argnums=(0, 1)))(matrix, b)
    batched = jax.vmap(partial(linear_solution, solver, matrix))
    results["batched"] = jax.jit(batched)(jnp.stack([b, 2 * b, jnp.cos(b)]))
    return results


LINEAR_SOLVERS: dict[str, Any] = {
    "CG": hg.CG(preconditioner=None),
    "CG, rtol": hg.CG(rtol=1e-2, preconditioner=None),
    "CG, max_steps": hg.CG(max_steps=3, preconditioner=None),
    "Neumann": hg.Neumann(12),
    "Neumann, step_size": hg.Neumann(12, step_size=0.3),
    "Nystrom": hg.Nystrom(3),
    "Nystrom, full rank": hg.Nystrom(SIZE, damping=0.0),
    "NystromCG": hg.NystromCG(3),
    "NystromCG, options": hg.NystromCG(2, rtol=1e-3, max_steps=4, damping=0.1, key=KEY),
    "Identity": hg.Identity(),
}


# Derivatives of the inner solution, and certificates.

DERIVATIVES: dict[str, Callable] = {
    "grad": jax.grad,
    "jacfwd": jax.jacfwd,
    "jacrev": jax.jacrev,
    "hessian": jax.hessian,
    "jacrev of jacrev": lambda fn: jax.jacrev(jax.jacrev(fn)),
    "jacfwd of jacfwd": lambda fn: jax.jacfwd(jax.jacfwd(fn)),
}
ARGMINS: dict[str, tuple] = {
    "Newton": (hg.Newton(),),
    "Newton, LU": (hg.Newton(), lx.LU()),
    "Newton, NystromCG": (hg.Newton(), hg.NystromCG(2)),
    "Descent": (hg.Descent(optax.sgd(0.4), 80),),
    "ClosedForm": (hg.ClosedForm(closed_form),),
}


def run_argmin(*solvers: Any) -> dict[str, Any]:
    """Returns a solution and the derivatives of a curved function of it by alpha."""
    problem, w, alpha = problems.ridge()
    solution = hg.argmin(problems.ridge_loss, *solvers)
    data = problem.inner_data
    value = lambda alpha, data: jnp.sum(jnp.sin(solution(w, alpha, data)))
    results = {
        name: jax.jit(derivative(value))(alpha, data)
        for name, derivative in DERIVATIVES.items()
    }
    by_data = jax.jit(jax.grad(lambda y: value(alpha, data | {"y": y})))
    jacobian = jax.jit(jax.jacrev(lambda alpha: solution(w, alpha, data)))
    return results | {
        "solution": jax.jit(solution)(w, alpha, data),
        "data grad": by_data(data["y"]),
        "jacobian": jacobian(alpha),
    }


def run_certificate(
    make_setup: Callable[[], Setup], num_steps: int = 10, **options: Any
) -> dict[str, Any]:
    """Returns the certificate of the hypergradient after few inner steps."""
    problem, w, alpha = make_setup()
    solver = hg.Descent(optax.sgd(0.3), num_steps)
    if options.pop("is_unrolled", False):
        estimate = hg.hypergradient(problem, hg.Unrolled(solver))(w, alpha)
        w, options["hypergradient"] = estimate.w, estimate.hypergradient
    return certificate_to_dict(hg.certify(problem, w, alpha, **options))


two_losses = partial(problems.ridge, num_losses=2)
CERTIFICATES: dict[str, Callable[[], Any]] = {
    "defaults": partial(run_certificate, problems.logistic),
    "unrolled": partial(run_certificate, problems.logistic, is_unrolled=True),
    "one Newton step": partial(run_certificate, problems.logistic, num_newton_steps=1),
    "rtol": partial(
        run_certificate, problems.ridge, num_steps=30, is_unrolled=True, rtol=0.1
    ),
    "strong convexity": partial(
        run_certificate, problems.ridge, strong_convexity=0.1, is_unrolled=True
    ),
    "two losses": partial(run_certificate, two_losses),
    "two losses, unrolled": partial(run_certificate, two_losses, is_unrolled=True),
    "keyed batches": partial(run_certificate, problems.keyed_batches, key=KEY),
    "data_fn": partial(run_certificate, problems.episodes, key=KEY),
    "float32": partial(run_certificate, partial(problems.ridge, dtype="float32")),
}

CASES: dict[str, Callable[[], Any]] = {
    f"inner solvers/{name}": case for name, case in INNER_SOLVERS.items()
}
CASES |= {
    f"linear solvers/{name}": partial(run_linear_solver, solver)
    for name, solver in LINEAR_SOLVERS.items()
}
CASES |= {
    f"argmin/{name}": partial(run_argmin, *arguments)
    for name, arguments in ARGMINS.items()
}
CASES |= {f"certify/{name}": case for name, case in CERTIFICATES.items()}
