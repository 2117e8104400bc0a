"""Inner solvers from jaxopt."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ...batches import Data, batch_fraction, full_batch, sample_batch
from ...number_checks import check_positive_int
from ...products import Loss
from ...trees import all_finite, cast_like, without_derivative
from ..base import InnerStats, inner_stats
from ..descent import Descent, run_inner_steps
from .shared import explain_dtype_errors

ACCEPTED = (
    "GradientDescent",
    "LBFGS",
    "BFGS",
    "NonlinearCG",
    "OptaxSolver",
    "PolyakSGD",
    "ArmijoSGD",
)


def from_jaxopt(solver: Any) -> "JaxoptLoop | JaxoptRun":
    """Returns an inner solver from a jaxopt solver for unconstrained minimization.

    Args:
      solver: Instance of jaxopt's ``GradientDescent``, ``LBFGS``, ``BFGS``,
        ``NonlinearCG``, ``OptaxSolver``, ``PolyakSGD`` or ``ArmijoSGD``. The inner loss
        of the problem replaces its ``fun``, and its ``implicit_diff``, ``jit`` and
        ``unroll`` have no effect. ``jit`` compares it by identity: reuse the object.

    Returns:
      `JaxoptLoop`, whose ``maxiter`` steps are differentiable, for ``GradientDescent``
      with a positive step size or a schedule, and for ``OptaxSolver`` with a
      transformation without line search and L-BFGS. `JaxoptRun`, which stops at
      ``tol``, for all other solvers, including ``GradientDescent`` with jaxopt's
      default ``stepsize=0.0``, a line search.

    Raises:
      TypeError: The solver is not one of these instances. It has a ``prox`` or a
        ``pre_update``, which may project ``w``, so that ``dL/dw = 0`` would not hold.
        It has ``has_aux`` or ``value_and_grad``, which the inner loss does not have. It
        is an ``OptaxSolver`` with a line search, to which jaxopt passes no value.
      ValueError: ``maxiter`` is not an integer of at least 0.

    Cost, memory and bias: see `JaxoptLoop` and `JaxoptRun`.

    Source: Blondel et al. 2022, arXiv:2105.15183. jaxopt is no longer maintained.

    >>> import warnings, jax, jax.numpy as jnp, hypergrad as hg
    >>> with warnings.catch_warnings(action="ignore"):
    ...     import jaxopt
    >>> loss = lambda w, alpha, batch: jnp.sum(jnp.cosh(w - alpha))
    >>> solver = hg.from_jaxopt(jaxopt.LBFGS(loss, tol=1e-6))
    >>> w, _ = solver.solve(loss, jnp.zeros(2), jnp.ones(2), None, jax.random.key(0))
    >>> bool(jnp.allclose(w, 1.0, atol=1e-4))
    True
    """
    name = _check_jaxopt(solver)
    is_loop = False
    if name == "GradientDescent":
        is_loop = callable(solver.stepsize) or solver.stepsize > 0
    elif name == "OptaxSolver":
        is_loop = Descent(solver.opt, 1).differentiable
    return JaxoptLoop(solver) if is_loop else JaxoptRun(solver)


class JaxoptLoop(eqx.Module):
    """``maxiter`` steps of a jaxopt solver without a line search; see `from_jaxopt`.

    If the data is `Batches` with a batch size, each step samples its own batch.

    Args:
      solver: The jaxopt solver. Its ``tol`` has no effect: the steps may be
        differentiated, so their number is fixed. (jaxopt's own ``run`` stops early.)

    Raises:
      ValueError: The leaves of ``w`` have several dtypes; raised by `solve`.

    Cost: ``maxiter`` gradients, where mini-batches count in proportion.
    Memory: ``w`` and the state of the solver.
    Bias: the error of the inner solution after ``maxiter`` steps.

    Source: Blondel et al. 2022, arXiv:2105.15183.

    >>> import warnings, jax, jax.numpy as jnp, hypergrad as hg
    >>> with warnings.catch_warnings(action="ignore"):
    ...     import jaxopt
    >>> loss = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    >>> solver = hg.from_jaxopt(jaxopt.GradientDescent(loss, stepsize=0.5, maxiter=50))
    >>> w, _ = solver.solve(loss, jnp.zeros(2), jnp.ones(2), None, jax.random.key(0))
    >>> solver.differentiable, bool(jnp.allclose(w, 1.0))
    (True, True)
    """

    solver: Any = eqx.field(static=True)

    citations = ("blondel2022",)
    differentiable = True

    @property
    def num_steps(self) -> int:
        """The ``maxiter`` of the jaxopt solver."""
        return self.solver.maxiter

    def init(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, PyTree]:
        """Returns ``w`` and the first state of the jaxopt solver."""
        w = _to_one_dtype(w)
        solver = _replace_fun(self.solver, inner_loss, jit=False)
        return w, solver.init_state(w, alpha, sample_batch(data, key))

    def step(
        self,
        inner_loss: Loss,
        carry: tuple[PyTree, PyTree],
        alpha: PyTree,
        data: Data,
        key: Array,
    ) -> tuple[PyTree, PyTree]:
        """Returns the carry after one update on a batch sampled with ``key``."""
        solver = _replace_fun(self.solver, inner_loss, jit=False)
        w, state = solver.update(*carry, alpha, sample_batch(data, key))
        # The stopping criterion of jaxopt is a norm, whose derivative at 0 is NaN. No
        # step depends on it.
        state = state._replace(error=without_derivative(state.error))
        return cast_like((w, state), carry)

    def solve(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, InnerStats]:
        """Returns ``w`` after ``maxiter`` steps, in its dtypes, and its cost."""
        w, _ = run_inner_steps(self, inner_loss, w, alpha, data, key)
        num_grads = self.num_steps * batch_fraction(data)
        return w, inner_stats(self.num_steps, num_grads=num_grads)


class JaxoptRun(eqx.Module):
    """jaxopt's ``run`` up to its ``tol`` or ``maxiter``; see `from_jaxopt`.

    The iterations cannot be differentiated, because reverse mode does not work through
    their `jax.lax.while_loop`. Stochastic solvers, too, use all of the data.

    Args:
      solver: The jaxopt solver. Its ``tol`` is absolute. The default of 1e-3 is coarse
        for a hypergradient: set a smaller one.

    Raises:
      ValueError: The leaves of ``w`` have several dtypes; raised by `solve`.

    Cost:
      For LBFGS, BFGS, NonlinearCG and PolyakSGD ``num_grads`` is jaxopt's
      ``num_grad_eval``, and ``num_values`` the excess of its ``num_fun_eval``. For the
      others it is one gradient per step, plus one value per step with a line search
      (GradientDescent, ArmijoSGD), which is a lower bound.
    Memory: ``w`` and the state of the solver.
    Bias:
      None at a small enough ``tol``. The statistic ``converged`` is 0 if the solver
      stopped before it met it.

    Source: Blondel et al. 2022, arXiv:2105.15183.

    >>> import warnings, jax, jax.numpy as jnp, hypergrad as hg
    >>> with warnings.catch_warnings(action="ignore"):
    ...     import jaxopt
    >>> loss = lambda w, alpha, batch: jnp.sum(jnp.cosh(w - alpha))
    >>> solver = hg.from_jaxopt(jaxopt.BFGS(loss, tol=1e-6))
    >>> w, _ = solver.solve(loss, jnp.zeros(2), jnp.ones(2), None, jax.random.key(0))
    >>> solver.differentiable, bool(jnp.allclose(w, 1.0, atol=1e-4))
    (False, True)
    """

    solver: Any = eqx.field(static=True)

    citations = ("blondel2022",)
    differentiable = False

    def solve(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, InnerStats]:
        """Returns the minimum, in the dtypes of ``w``, and the cost of finding it."""
        w = _to_one_dtype(w)
        # unroll=False runs a while loop; "auto" would scan over all of maxiter.
        solver = _replace_fun(self.solver, inner_loss, jit=True, unroll=False)
        with explain_dtype_errors("jaxopt", w):
            new_w, state = solver.run(w, alpha, full_batch(data, key))
        # The error may be that of the last w at which the gradient was finite.
        converged = (state.error <= solver.tol) & all_finite(new_w)
        return cast_like(new_w, w), _run_stats(state, converged)


def _check_jaxopt(solver: Any) -> str:
    """Returns the name of the jaxopt class; raises TypeError if it is not accepted."""
    if isinstance(solver, type):
        raise TypeError(
            f"solver must be an instance; got the class {solver.__name__}. Write "
            f"jaxopt.{solver.__name__}(fun=loss)."
        )
    names = [
        kind.__name__
        for kind in type(solver).__mro__
        if kind.__module__.startswith("jaxopt.") and kind.__name__ in ACCEPTED
    ]
    if not names:
        raise TypeError(
            f"solver must be one of jaxopt's minimizers {', '.join(ACCEPTED)}; got "
            f"{type(solver).__name__}. dL/dw must be 0 at its solution, so that "
            "solvers of constraints, equations and residuals do not fit."
        )
    name = names[0]
    if reason := _reason_to_reject(solver, name):
        raise TypeError(
            "solver must find a minimum of the inner loss, at which dL/dw = 0; got "
            f"jaxopt.{name}, which {reason}."
        )
    check_positive_int("maxiter", solver.maxiter, minimum=0)
    return name


def _reason_to_reject(solver: Any, name: str) -> str | None:
    """Returns why the settings of a solver are not accepted, or None."""
    if solver.has_aux or solver.value_and_grad:
        return (
            "has has_aux or value_and_grad set, but the inner loss that replaces its "
            "fun returns only a scalar. Leave both at False"
        )
    if name == "GradientDescent":
        from jaxopt.prox import prox_none

        if solver.prox is not prox_none:
            return (
                "has a prox and minimizes the inner loss plus a term that the loss "
                "does not contain, so that dL/dw is not 0 at its solution. Add a "
                "smooth term to the inner loss instead"
            )
    if getattr(solver, "pre_update", None) is not None:
        return "has a pre_update, which may move w, such as onto a constraint"
    if name == "OptaxSolver" and not Descent(solver.opt, 1).differentiable:
        update = lambda w: solver.opt.update(w, solver.opt.init(w), w)
        try:
            jax.eval_shape(update, jnp.zeros(()))
        except TypeError:
            return (
                "does not pass the value of the loss to the line search of its optax "
                "transformation. Use hg.Descent or hg.LBFGS"
            )
    return None


def _replace_fun(solver: Any, inner_loss: Loss, **settings: Any) -> Any:
    """Returns the jaxopt solver with the inner loss as ``fun``."""
    # jaxopt inspects the signature, which only a plain function has.
    fun = lambda w, alpha, batch: inner_loss(w, alpha, batch)
    return dataclasses.replace(solver, fun=fun, implicit_diff=False, **settings)


def _run_stats(state: Any, converged: Array) -> InnerStats:
    """Returns the cost of a run, counted as `JaxoptRun` describes."""
    num_steps = state.iter_num
    if hasattr(state, "num_grad_eval"):
        num_grads = state.num_grad_eval
        num_values = jnp.maximum(state.num_fun_eval - num_grads, 0)
    else:
        num_grads = num_steps
        num_values = num_steps if hasattr(state, "stepsize") else 0
    return inner_stats(
        num_steps,
        num_grads=num_grads,
        num_values=num_values,
        converged=converged,
    )


def _to_one_dtype(w: PyTree) -> PyTree:
    """Returns ``w`` as arrays; raises ValueError unless they share one dtype."""
    w = jax.tree.map(jnp.asarray, w)
    dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(w)})
    if len(dtypes) > 1:
        raise ValueError(
            "w must have leaves of a single dtype for jaxopt; got "
            f"{', '.join(dtypes)}. Cast w, or use hg.Descent, hg.Newton or hg.LBFGS."
        )
    return w
