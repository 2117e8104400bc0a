"""Golden cases of implicit differentiation, and of one-shot hypergradients."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx

import hypergrad as hg
from tests.golden import problems
from tests.golden.problems import Setup
from tests.golden.results import estimate_to_dict
from tests.golden.runs import (
    BATCHES,
    DESCENT,
    LONG_DESCENT,
    PROBLEMS,
    RIDGE,
    TWO_LOSSES,
    TWO_LOSSES_BATCHES,
    run_estimates,
    run_refined,
)

COMPOSITE = hg.CompositeLoss(
    lambda w, alpha, batch: jnp.tanh(batch["x"] @ w),
    lambda z, alpha, batch: 0.5 * jnp.mean((z - batch["y"]) ** 2),
    lambda w, alpha: 0.5 * jnp.sum(jnp.exp(alpha) * w**2),
)


def composite() -> Setup:
    """A one-layer tanh network as a composite loss."""
    data = problems.regression_data(0), problems.regression_data(1)
    problem = hg.Bilevel(COMPOSITE, problems.ridge_objective, *data)
    return Setup(problem, *problems.ridge()[1:])


LINEAR_SOLVERS = {
    "CG": hg.CG(preconditioner=None),
    "CG with rtol": hg.CG(rtol=1e-2, preconditioner=None),
    "CG with max_steps": hg.CG(max_steps=2, preconditioner=None),
    "Neumann": hg.Neumann(10),
    "Neumann with step_size": hg.Neumann(10, step_size=0.4),
    "Nystrom": hg.Nystrom(3),
    "Nystrom with key": hg.Nystrom(2, damping=0.1, key=jax.random.key(5)),
    "NystromCG": hg.NystromCG(2),
    "NystromCG with damping": hg.NystromCG(2, damping=0.1, key=jax.random.key(5)),
    "Identity": hg.Identity(),
    "lineax LU": lx.LU(),
    "lineax Cholesky": lx.Cholesky(),
    "lineax CG": lx.CG(rtol=1e-8, atol=1e-8),
    "lineax GMRES": lx.GMRES(rtol=1e-8, atol=1e-8),
    "lineax BiCGStab": lx.BiCGStab(rtol=1e-8, atol=1e-8),
}
implicit = partial(hg.Implicit, LONG_DESCENT)
RTOLS = jnp.array([1e-1, 1e-3, 1e-5])
IMPLICIT = {
    "damping": (implicit(damping=0.1), RIDGE),
    "traced damping": (implicit(damping=jnp.asarray(0.1)), RIDGE),
    "hvp_fn": (implicit(hvp_fn=COMPOSITE.gauss_newton), composite),
    "hvp_fn with damping": (
        implicit(damping=0.1, hvp_fn=COMPOSITE.gauss_newton), composite
    ),
    "hvp_fn, certified": (
        implicit(hvp_fn=COMPOSITE.gauss_newton, certify=True), composite
    ),
    "one Newton step": (hg.Implicit(DESCENT, num_newton_steps=1), problems.logistic),
    "two Newton steps": (hg.Implicit(DESCENT, num_newton_steps=2), problems.logistic),
    "two Newton steps, two losses": (
        hg.Implicit(DESCENT, num_newton_steps=2), TWO_LOSSES
    ),
    "rtol": (implicit(rtol=1e-3), problems.logistic),
    "rtol with Newton steps": (
        hg.Implicit(DESCENT, rtol=1e-4, num_newton_steps=1), problems.logistic
    ),
    "rtol with NystromCG": (implicit(hg.NystromCG(2), rtol=1e-3), RIDGE),
    "rtol, two losses": (implicit(rtol=1e-3), TWO_LOSSES),
    "rtol, certified": (implicit(rtol=1e-2, certify=True), problems.logistic),
    "rtol, batches": (implicit(rtol=1e-1), BATCHES),
    "rtol, Newton": (hg.Implicit(hg.Newton(), rtol=1e-3, num_newton_steps=1), RIDGE),
    "certified": (implicit(certify=True), RIDGE),
    "certified, short": (hg.Implicit(DESCENT, certify=True), problems.logistic),
    "certified, two losses": (implicit(certify=True), TWO_LOSSES),
    "cold": (hg.Implicit(DESCENT, warm_start=False), RIDGE),
    "adjoint batches": (implicit(adjoint_batch_size=6), BATCHES),
    "adjoint and outer batches": (
        implicit(adjoint_batch_size=6, outer_batch_size=8), BATCHES
    ),
    "adjoint and outer batches, two losses": (
        implicit(adjoint_batch_size=6, outer_batch_size=8), TWO_LOSSES_BATCHES
    ),
    "Newton": (hg.Implicit(hg.Newton()), problems.logistic),
    "LBFGS": (hg.Implicit(hg.LBFGS()), problems.logistic),
    "two losses": (implicit(), TWO_LOSSES),
    "two losses, Neumann": (implicit(hg.Neumann(10)), TWO_LOSSES),
    "two losses, Nystrom": (implicit(hg.Nystrom(2)), TWO_LOSSES),
    "two losses, NystromCG": (implicit(hg.NystromCG(2)), TWO_LOSSES),
    "two losses, lineax LU": (implicit(lx.LU()), TWO_LOSSES),
}  # fmt: skip
THREE_ESTIMATES = {
    "rtol schedule": (implicit(rtol=RTOLS), problems.logistic),
    "refreshed sketch": (implicit(hg.NystromCG(2, refresh_every=2)), RIDGE),
    "refreshed sketch, two losses": (
        implicit(hg.NystromCG(2, refresh_every=2)), TWO_LOSSES
    ),
}  # fmt: skip
REFINED = {
    "short": (hg.Implicit(DESCENT, hg.Neumann(3), damping=0.1), problems.logistic),
    "rtol": (hg.Implicit(DESCENT, rtol=1e-6), problems.logistic),
    "batches": (hg.Implicit(DESCENT, adjoint_batch_size=6), BATCHES),
}


def run_vmapped() -> dict[str, Any]:
    """Returns one-shot hypergradients of several alphas under ``vmap``."""
    problem, w, alpha = problems.ridge()
    hypergradient_fn = hg.hypergradient(problem, hg.Implicit(LONG_DESCENT))
    alphas = jnp.stack([alpha, 0.5 * alpha, alpha - 0.5])
    batched = jax.jit(jax.vmap(hypergradient_fn, in_axes=(None, 0)))(w, alphas)
    single = hypergradient_fn(w, alpha, jax.random.key(3))
    return {"batched": estimate_to_dict(batched), "single": estimate_to_dict(single)}


CASES: dict[str, Callable[[], Any]] = {
    f"estimators/Implicit, {name}": partial(run_estimates, implicit(solver), RIDGE)
    for name, solver in LINEAR_SOLVERS.items()
}
CASES |= {
    f"estimators/Implicit, {name}": partial(run_estimates, *arguments)
    for name, arguments in IMPLICIT.items()
}
CASES |= {
    f"estimators/Implicit, {name}": partial(run_estimates, *arguments, num_estimates=3)
    for name, arguments in THREE_ESTIMATES.items()
}
CASES |= {
    f"estimators/Implicit, problem with {name}": partial(
        run_estimates, implicit(), setup
    )
    for name, setup in PROBLEMS.items()
}
CASES |= {
    f"estimators/Implicit, refined, {name}": partial(run_refined, *arguments)
    for name, arguments in REFINED.items()
}
CASES |= {"estimators/hypergradient, vmapped": run_vmapped}
