"""SOBA: ``w``, the adjoint and ``alpha`` move together, a stochastic step each."""

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ...certificate import UNSEEN
from ...checks import check_problem, check_seen
from ...cost import ledger
from ...drawn import drawn
from ...guide import Guide
from ...problem import Bilevel, draw, fraction
from ...trees import norm
from ..protocol import Estimate, make_stats
from .directions import directions


class SOBAState(eqx.Module):
    """``w`` and the adjoint ``v`` like it, and their optimizers' states."""

    w: PyTree
    v: PyTree
    w_optimizer: PyTree
    v_optimizer: PyTree


class SOBA(eqx.Module):
    """``w <- w - rho dL/dw``, ``v <- v - rho (H v - dM/dw)``; ``dM/dalpha - Jᵀ v``.

    The three directions are taken at the same ``(w, v, alpha)``, on one inner and one
    outer batch, which the problem's `Batches` draw; `minimize`'s optimizer takes the
    third. With plain data it is the deterministic method.

    Args:
      optimizer: optax transformation that moves ``w``; ``optax.sgd(rho)`` is the
        paper's, with a number or a schedule.
      adjoint_optimizer: that moves ``v``; None means the same kind as ``optimizer``.

    Cost: one Hessian-vector product, which yields the inner gradient and the cross term
    too, and one outer gradient, on a batch each. Memory: two vectors like ``w`` and
    the optimizers' states.

    Target: argmin. Bias: what ``w`` and ``v`` lag behind ``alpha``; it vanishes where
    the run settles. Never trusted of itself: `minimize`'s ``certify_every`` judges.
    ``adjoint_residual`` is ``||H v - b|| / ||b||`` on the batches. ``value`` and ``w``
    are those before the step.

    Raises:
      TypeError: from `hypergradient`: one step says nothing; use `minimize`.

    Source: Dagréou, Ablin, Vaiter & Moreau 2022 (arXiv 2201.13409), algorithm 1 with
    the directions of SOBA.

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1.0) ** 2)
    >>> trace = hg.minimize(
    ...     hg.Bilevel(inner, outer), hg.SOBA(optax.sgd(0.5)), optax.sgd(0.2),
    ...     0.0, 3.0, num_steps=100,
    ... )
    >>> round(float(trace.alpha), 3), round(float(trace.w), 3)
    (1.0, 1.0)
    """

    optimizer: optax.GradientTransformation = eqx.field(static=True)
    adjoint_optimizer: optax.GradientTransformation | None = eqx.field(
        static=True, default=None
    )

    target = "argmin"
    single_loop = True
    citations = ("dagreou2022",)
    guide = (
        Guide(
            "SOBA(optimizer)",
            gradients="0",
            hvps="1",
            memory="2 w and the optimizers'",
            bias="what w and v lag behind",
            sees=("losses",),
            use="large problems under hg.minimize, mini-batches, w and alpha jointly",
            avoid="one accurate hypergradient, rates that are hard to choose",
            why="nothing is solved: w, the adjoint and alpha make one step each",
        ),
    )

    def __check_init__(self):
        for name in ("optimizer", "adjoint_optimizer"):
            given = getattr(self, name)
            optional = name == "adjoint_optimizer" and given is None
            if not (optional or isinstance(given, optax.GradientTransformation)):
                raise TypeError(
                    f"{name} must be an optax.GradientTransformation such as "
                    f"optax.sgd(0.1); got {type(given).__name__}"
                )

    def error_factor(self, smallest: float, largest: float) -> float:
        """0: exact where a run at one ``alpha`` settles."""
        return 0.0

    @property
    def _optimizers(self):
        return self.optimizer, self.adjoint_optimizer or self.optimizer

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> SOBAState:
        """From ``w``, or the start made of it, and a zero adjoint."""
        del key
        if problem.num_objectives is not None:
            raise ValueError(
                f"SOBA takes one outer loss, the problem has {problem.num_objectives}; "
                "combine them into one function, such as a weighted sum"
            )
        check_problem(problem, w, alpha, None)
        check_seen(problem, w, alpha, None, UNSEEN)
        w = problem.initial(w, alpha)
        v = optax.tree.zeros_like(w)
        of_w, of_v = self._optimizers
        return SOBAState(w, v, of_w.init(w), of_v.init(v))

    def estimate(
        self, problem: Bilevel, state: SOBAState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, SOBAState]:
        """The three directions, and a step along the first two."""
        data = drawn(problem, key)
        batch = draw(data.inner_data, data.inner_key)
        outer_batch = draw(data.outer_data, data.outer_key)
        at = directions(problem, state.w, state.v, alpha, batch, outer_batch)

        of_w, of_v = self._optimizers
        step_w, w_optimizer = of_w.update(at.w, state.w_optimizer, state.w)
        step_v, v_optimizer = of_v.update(at.v, state.v_optimizer, state.v)
        w = optax.apply_updates(state.w, step_w)
        v = optax.apply_updates(state.v, step_v)

        residual = norm(at.v)
        costs = ledger(
            data.inner_data,
            data.outer_data,
            num_hvps=fraction(data.inner_data),
            num_outer_grads=fraction(data.outer_data),
        )
        stats = make_stats(
            jnp.asarray(False),
            inner_residual=norm(at.w),
            inner_steps=1,
            adjoint_residual=jnp.where(residual == 0, 0.0, residual / norm(at.b)),
            **costs,
        )
        estimate = Estimate(at.value, at.alpha, state.w, stats)
        return estimate, SOBAState(w, v, w_optimizer, v_optimizer)
