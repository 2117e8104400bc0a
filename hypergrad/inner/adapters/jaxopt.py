"""Inner solvers from jaxopt."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ...problem import Data, batch_fraction, full_batch, sample_batch
from ...products import Loss
from ...validation import check_positive_int
from ..base import InnerStats, inner_stats
from ..descent import Descent, run_inner_steps
from .shared import BOUND, cast_like, explained

_PROX = (
    "minimises the inner loss plus a term that the loss does not contain, so dL/dw is "
    "not 0 at its solution; put a smooth term into the inner loss instead"
)
_ROOT = "solves an equation, and a root need not be a minimiser of the inner loss"
_SQUARES = (
    "needs the vector of residuals, and the inner loss is a scalar; "
    "use a minimiser on the sum of squares"
)
_SCIPY = "runs on the host, outside jit and vmap"

# By the class's name, so that nothing of jaxopt needs importing; None: accepted.
JAXOPT: dict[str, str | None] = {
    "GradientDescent": None,
    "LBFGS": None,
    "BFGS": None,
    "NonlinearCG": None,
    "OptaxSolver": None,
    "PolyakSGD": None,
    "ArmijoSGD": None,
    "ProjectedGradient": BOUND,
    "MirrorDescent": BOUND,
    "LBFGSB": BOUND,
    "ScipyBoundedMinimize": BOUND,
    "BoxCDQP": BOUND,
    "BoxOSQP": BOUND,
    "OSQP": BOUND,
    "CvxpyQP": BOUND,
    "EqualityConstrainedQP": BOUND,
    "ProximalGradient": _PROX,
    "BlockCoordinateDescent": _PROX,
    "GaussNewton": _SQUARES,
    "LevenbergMarquardt": _SQUARES,
    "ScipyLeastSquares": _SQUARES,
    "ScipyBoundedLeastSquares": _SQUARES,
    "Bisection": _ROOT,
    "Broyden": _ROOT,
    "ScipyRootFinding": _ROOT,
    "FixedPointIteration": _ROOT,
    "AndersonAcceleration": _ROOT,
    "AndersonWrapper": "hides the solver whose fun is to be replaced; pass that one",
    "ScipyMinimize": _SCIPY,
}


def from_jaxopt(solver: Any) -> Any:
    """An inner solver from a jaxopt one for unconstrained minimisation.

    Args:
      solver: an instance of jaxopt's ``GradientDescent``, ``LBFGS``, ``BFGS``,
        ``NonlinearCG``, ``OptaxSolver``, ``PolyakSGD`` or ``ArmijoSGD``. Its ``fun`` is
        not called: the problem's inner loss takes its place. ``implicit_diff``,
        ``jit`` and ``unroll`` are not read either. Compared by identity under ``jit``:
        reuse the object.

    Returns:
      `JaxoptLoop`, ``differentiable``, for ``GradientDescent`` with a step size above 0
      or a schedule and for ``OptaxSolver`` over a transformation that neither searches
      along a line nor keeps L-BFGS; it runs ``maxiter`` steps. `JaxoptRun`, which stops
      at ``tol``, for all else, jaxopt's default ``stepsize=0.0`` (a line search)
      included.

    Raises:
      TypeError: a constrained or proximal solver, a ``GradientDescent`` with a ``prox``
        or a solver with ``pre_update`` (it may project ``w``), where the condition
        ``dL/dw = 0`` that is differentiated would not hold; a least-squares,
        root-finding or scipy solver; ``has_aux`` or ``value_and_grad``, which the inner
        loss does not have; an optax line search, to which jaxopt passes no value; what
        is no jaxopt solver.
      ValueError: ``maxiter`` is no plain integer of at least 0.

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
    if name == "GradientDescent":
        stepsize = solver.stepsize
        loop = callable(stepsize) or stepsize > 0
    elif name == "OptaxSolver":
        loop = Descent(solver.opt, 1).differentiable
    else:
        loop = False
    return JaxoptLoop(solver) if loop else JaxoptRun(solver)


def _check_jaxopt(solver: Any) -> str:
    """The accepted jaxopt class that ``solver`` is, or the reason why it is none."""
    if isinstance(solver, type):
        raise TypeError(
            f"solver is the class {solver.__name__}; pass an instance, "
            f"jaxopt.{solver.__name__}(fun=loss)"
        )
    known = [
        kind.__name__
        for kind in type(solver).__mro__
        if kind.__module__.startswith("jaxopt.") and kind.__name__ in JAXOPT
    ]
    if not known:
        raise TypeError(
            "solver must be one of jaxopt's minimisers "
            f"{', '.join(name for name, why in JAXOPT.items() if why is None)}; "
            f"got {type(solver).__name__}"
        )
    name = known[0]
    refuse = lambda why: TypeError(
        f"jaxopt.{name} {why}: hypergradients here differentiate the stationarity "
        "condition dL/dw = 0 of an unconstrained inner problem, and would be wrong. "
        "jaxopt.LBFGS solves such a problem"
    )
    why = JAXOPT[name]
    if why in (_SQUARES, _SCIPY):
        raise TypeError(f"jaxopt.{name} {why}; jaxopt.LBFGS or jaxopt.BFGS will do")
    if why is not None:
        raise refuse(why)
    if solver.has_aux or solver.value_and_grad:
        raise TypeError(
            f"jaxopt.{name} has has_aux or value_and_grad set, but its fun is replaced "
            "by the inner loss, which returns a scalar alone; leave both at False"
        )
    if name == "GradientDescent":
        from jaxopt.prox import prox_none

        if solver.prox is not prox_none:
            raise refuse(f"with a prox {_PROX}")
    if getattr(solver, "pre_update", None) is not None:
        raise refuse("with pre_update may move w, onto a constraint for one")
    if name == "OptaxSolver" and not Descent(solver.opt, 1).differentiable:
        update = lambda w: solver.opt.update(w, solver.opt.init(w), w)
        try:
            jax.eval_shape(update, jnp.zeros(()))
        except TypeError as error:
            raise TypeError(
                "jaxopt.OptaxSolver does not pass the loss value that the line search "
                "of this optax transformation needs; use hg.Descent or hg.LBFGS"
            ) from error
    check_positive_int("maxiter", solver.maxiter, minimum=0)
    return name


class JaxoptLoop(eqx.Module):
    """``maxiter`` steps of a jaxopt solver without a line search; see `from_jaxopt`.

    Args:
      solver: the jaxopt solver. Its ``tol`` is not read: the steps may be
        differentiated, so their number is fixed (jaxopt's own ``run`` stops early).

    Each step draws its own batch where the data is `Batches` with a batch size, from
    a key split off the given one.

    Errors: ValueError for leaves of ``w`` of several dtypes.

    Cost: ``maxiter`` gradients, mini-batches in proportion. Memory: ``w`` and the
    solver's state. Bias: what ``maxiter`` steps leave of the inner problem.

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
        """The ``maxiter`` of jaxopt."""
        return self.solver.maxiter

    def init(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, PyTree]:
        """``(w, jaxopt's state)``."""
        w = _one_dtype(w)
        solver = _with_loss(self.solver, inner_loss, jit=False)
        return w, solver.init_state(w, alpha, sample_batch(data, key))

    def step(
        self,
        inner_loss: Loss,
        carry: tuple[PyTree, PyTree],
        alpha: PyTree,
        data: Data,
        key: Array,
    ) -> tuple[PyTree, PyTree]:
        """One jaxopt update on a batch drawn with ``key``."""
        solver = _with_loss(self.solver, inner_loss, jit=False)
        w, state = solver.update(*carry, alpha, sample_batch(data, key))
        # jaxopt's stopping criterion is a norm, whose derivative at 0 is NaN.
        state = state._replace(error=jax.lax.stop_gradient(state.error))
        return cast_like((w, state), carry)

    def solve(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, InnerStats]:
        """``(w after maxiter steps, stats)``; same structure and dtypes as ``w``."""
        w, _ = run_inner_steps(self, inner_loss, w, alpha, data, key)
        steps = self.num_steps
        return w, inner_stats(steps, num_grads=steps * batch_fraction(data))


class JaxoptRun(eqx.Module):
    """jaxopt's ``run`` to its ``tol`` or ``maxiter``; see `from_jaxopt`.

    Args:
      solver: the jaxopt solver. Its ``tol`` is absolute, and jaxopt's default of 1e-3
        is coarse for a hypergradient: set it.

    Not differentiable step by step: a `lax.while_loop`, so reverse mode refuses it.
    Uses all of the data, never a mini-batch, also for jaxopt's stochastic solvers.

    Errors: ValueError for leaves of ``w`` of several dtypes.

    Cost: counted by jaxopt where it counts: ``num_grads`` is its ``num_grad_eval`` and
    ``num_values`` the excess of its ``num_fun_eval`` (LBFGS, BFGS, NonlinearCG,
    PolyakSGD). Else one gradient a step, plus one value a step where it searches along
    a line (GradientDescent, ArmijoSGD), a lower bound. Memory: ``w`` and the solver's
    state. Bias: none at a small enough ``tol``.

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
        """``(w*, stats)``; same structure and dtypes as ``w``."""
        w = _one_dtype(w)
        # unroll=False is the while loop; "auto" would scan over all of maxiter.
        solver = _with_loss(self.solver, inner_loss, jit=True, unroll=False)
        with explained("jaxopt", w):
            found, state = solver.run(w, alpha, full_batch(data, key))
        return cast_like(found, w), _spent(state)


def _with_loss(solver: Any, inner_loss: Loss, **settings: Any) -> Any:
    """The same jaxopt solver on the inner loss, without its own differentiation."""
    # A plain function, since jaxopt inspects the signature.
    fun = lambda w, alpha, batch: inner_loss(w, alpha, batch)
    return dataclasses.replace(solver, fun=fun, implicit_diff=False, **settings)


def _spent(state: Any) -> InnerStats:
    """The cost of a jaxopt run, as `JaxoptRun` says it is counted."""
    steps = state.iter_num
    if hasattr(state, "num_grad_eval"):
        grads = state.num_grad_eval
        values = jnp.maximum(state.num_fun_eval - grads, 0)
    else:
        grads = steps
        values = steps if hasattr(state, "stepsize") else 0
    return inner_stats(steps, num_grads=grads, num_values=values)


def _one_dtype(w: PyTree) -> PyTree:
    """``w`` as arrays; jaxopt wants them all of one dtype."""
    w = jax.tree.map(jnp.asarray, w)
    dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(w)})
    if len(dtypes) > 1:
        raise ValueError(
            f"w has leaves of dtypes {', '.join(dtypes)}, and jaxopt needs one; "
            "cast w, or use hg.Descent, hg.Newton or hg.LBFGS"
        )
    return w
