"""A solver and an estimator for losses that are means over clients (FedNest).

All inner data have the clients as their leading axis.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jaxtyping import Array, PyTree

from ..batches import Data, full_batch
from ..cost import cost_stats
from ..estimators import Estimate, Implicit
from ..estimators.base import make_estimate
from ..implicit.differentiation import Point, implicit_hypergradient
from ..inner import inner_stats
from ..inner.base import InnerSolver, InnerStats
from ..inner.descent import run_inner_steps
from ..linear.base import check_linear_solver
from ..number_checks import boolean, check_positive_int, non_negative
from ..problem import Bilevel, EstimateData
from ..products import Loss
from ..trees import norm
from ..validation import check_solver


def split_clients(data: PyTree) -> PyTree:
    """Returns the data with shape ``[clients, 1, n, ...]``.

    Under ``vmap`` over the first axis, each client is a federation of one client.
    """
    return jax.tree.map(lambda leaf: leaf[:, None], data)


def mean_over_clients(tree: PyTree) -> PyTree:
    """Returns the mean of each leaf over its first axis."""
    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), tree)


class FedAvg(eqx.Module):
    """Federated averaging: local gradient steps, whose results are averaged per round.

    The loss must be a mean over clients, the leading axis of all inner data. The
    clients run under ``vmap``, on the devices on which their data lie.

    Args:
      step_size: Step size of the local steps.
      num_steps: Number of rounds, a static integer.
      num_local_steps: Number of steps of each client per round, a static integer.
      drift_correction: Whether the gradients of client c are corrected by
        ``mean_c g_c - g_c``, evaluated at the start of the round (FedSVRG). Without the
        correction, rounds of clients that differ do not converge to the argmin of the
        mean loss. Defaults to True.

    Cost: ``num_local_steps`` gradients per round, and one more for the correction.
    Memory: ``w`` and a correction for each client.
    Bias: none with the correction, after convergence.

    Raises:
      TypeError: ``step_size`` is not a number, or ``drift_correction`` is not boolean.
      ValueError: A number of steps is not a positive integer, or ``step_size`` is
        negative or not finite.

    Source: McMahan et al. 2017 (arXiv 1602.05629); Tarzanagh et al. 2022 (arXiv
    2205.02215) for the correction.

    >>> import jax, jax.numpy as jnp
    >>> loss = lambda w, alpha, batch: jnp.mean(batch["h"] * (w - batch["t"]) ** 2) / 2
    >>> data = {"h": jnp.array([[1.0], [3.0]]), "t": jnp.array([[0.0], [4.0]])}
    >>> for correction in (True, False):
    ...     solver = FedAvg(0.2, 200, num_local_steps=5, drift_correction=correction)
    ...     w, _ = solver.solve(loss, jnp.array(0.0), None, data, jax.random.key(0))
    ...     print(round(float(w), 2))
    3.0
    2.38
    """

    step_size: float | Array = eqx.field(converter=non_negative("step_size"))
    num_steps: int = eqx.field(static=True)
    num_local_steps: int = eqx.field(static=True)
    drift_correction: bool = eqx.field(
        static=True, default=True, converter=boolean("drift_correction")
    )

    differentiable = True
    uses_all_data = True

    def __check_init__(self):
        check_positive_int("num_steps", self.num_steps)
        check_positive_int("num_local_steps", self.num_local_steps)

    @property
    def grads_per_step(self) -> int:
        """Number of gradients per round."""
        return self.num_local_steps + self.drift_correction

    def init(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, PyTree]:
        """Returns ``(w, ())``, because rounds have no state."""
        del inner_loss, alpha, data, key
        return w, ()

    def step(
        self,
        inner_loss: Loss,
        carry: tuple[PyTree, PyTree],
        alpha: PyTree,
        data: Data,
        key: Array,
    ) -> tuple[PyTree, PyTree]:
        """Returns the carry after one round."""
        w, _ = carry
        clients = split_clients(full_batch(data, key))
        grad_fn = lambda w, client: jax.grad(inner_loss)(w, alpha, client)
        grads = jax.vmap(grad_fn, in_axes=(None, 0))(w, clients)
        # mean_c g_c - g_c, per client.
        corrections = jax.tree.map(
            lambda mean, grad: mean[None] - grad, mean_over_clients(grads), grads
        )
        if not self.drift_correction:
            corrections = optax.tree.zeros_like(corrections)

        def run_local_steps(client, correction):
            def local_step(w, _):
                grad = optax.tree.add(grad_fn(w, client), correction)
                return optax.tree.add_scale(w, -self.step_size, grad), None

            return jax.lax.scan(local_step, w, length=self.num_local_steps)[0]

        return mean_over_clients(jax.vmap(run_local_steps)(clients, corrections)), ()

    def solve(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, InnerStats]:
        """Returns ``w`` after all rounds and its cost."""
        w, _ = run_inner_steps(self, inner_loss, w, alpha, data, key)
        return w, inner_stats(self.num_steps, self.num_steps * self.grads_per_step)


class LocalImplicit(eqx.Module):
    """The mean of the clients' own implicit hypergradients.

    ``dM/dalpha - mean_c J_c' H_c^-1 b_c``, all at the ``w`` that the clients share.

    Args:
      solver: Inner solver of the mean loss over clients.
      linear_solver: Linear solver for the adjoint of each client, with its own Hessian.

    Cost: the inner solve, the products of the slowest client, because the clients solve
      in lockstep, and one outer gradient.
    Memory: an adjoint for each client.
    Bias: none if all clients are alike; otherwise it does not vanish, so no estimate is
    trusted.

    Source: Tarzanagh et al. 2022 (arXiv 2205.02215), LFedNest.
    """

    solver: InnerSolver
    linear_solver: lx.AbstractLinearSolver

    target = "argmin"

    def __check_init__(self):
        check_solver(self.solver)
        check_linear_solver(self.linear_solver)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """Returns NaN, because the error of the adjoint is not bounded."""
        del eig_min, eig_max
        return float("nan")

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> PyTree:
        """Returns ``w``, which is the warm start of the inner solver."""
        if problem.num_objectives is not None:
            raise ValueError(
                "outer_loss must be a single loss for LocalImplicit; got "
                f"{problem.num_objectives}. Combine them into one, or use hg.Implicit."
            )
        Implicit(self.solver, self.linear_solver).init(problem, w, alpha, key)
        return w

    def estimate(
        self, problem: Bilevel, state: PyTree, alpha: PyTree, key: Array
    ) -> tuple[Estimate, PyTree]:
        """Returns an estimate and the inner solution, the next warm start."""
        data = EstimateData.sample(problem, key)
        init_w = problem.init_inner(state, alpha)
        w, solver_stats = self.solver.solve(
            problem.inner_loss, init_w, alpha, data.inner_data, data.solver_key
        )

        def client_hypergradient(inner_batch, outer_batch):
            point = Point(problem, w, alpha, inner_batch, outer_batch)
            v0 = optax.tree.zeros_like(w)
            return implicit_hypergradient(point, self.linear_solver, v0)

        results = jax.vmap(client_hypergradient)(
            split_clients(data.inner_batch()), split_clients(data.outer_batch())
        )
        num_products = jnp.max(results.linear_stats["num_products"])
        estimate = make_estimate(
            jnp.mean(results.value),
            mean_over_clients(results.hypergradient),
            w,
            {"biased": True},
            inner_grad_norm=norm(mean_over_clients(results.inner_grad)),
            num_inner_steps=solver_stats["num_steps"],
            adjoint_residual=jnp.max(results.adjoint_residual),
            **cost_stats(
                data.inner_data,
                data.outer_data,
                num_grads=solver_stats["num_grads"],
                num_hvps=solver_stats["num_hvps"] + num_products,
                num_values=solver_stats["num_values"],
                num_outer_grads=1,
            ),
        )
        return estimate, w
