"""PZOBO and HOZOG as in the code of PZOBO's authors, along given directions."""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.extend import cost_stats, make_estimate

from .torch_random import TorchGenerator

Kind = Literal["direct", "PZOBO", "HOZOG"]


def sample_directions(
    generator: TorchGenerator, alpha: PyTree, offset: int, number: int
) -> PyTree:
    """Returns directions like ``alpha``, after leaving out the first ``offset``.

    Each leaf has a leading axis of size ``number`` and length 1 on the others.
    """
    leaves, structure = jax.tree.flatten(alpha)
    kept = [[] for _ in leaves]
    for index in range(offset + number):
        for samples, leaf in zip(kept, leaves, strict=True):
            sample = generator.randn(*leaf.shape).astype(float)
            if index >= offset:
                samples.append(sample / np.linalg.norm(sample))
    return structure.unflatten([jnp.asarray(np.array(samples)) for samples in kept])


class AlongDirections(eqx.Module):
    """Hypergradients from one difference along a given direction ``u``.

    "PZOBO" is ``dM/dalpha + <(w_T(alpha + mu u) - w_T(alpha)) / mu, dM/dw> u``, and
    "HOZOG" ``(F(alpha + mu u) - F(alpha)) / mu u`` with ``F`` the outer loss after T
    inner steps. "direct" is ``dM/dalpha`` alone.

    Args:
      solver: Inner solver, which starts from the same ``w`` each time.
      directions: The direction of each estimate, with a leading axis.
      mu: Size of the differences.
      kind: The method.
    """

    solver: hg.Descent
    directions: PyTree
    mu: float
    kind: Kind = eqx.field(static=True)

    def init(
        self, problem: hg.Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> tuple[PyTree, Array]:
        """Returns the inner starting point and the number of estimates made."""
        return w, jnp.asarray(0)

    def estimate(
        self,
        problem: hg.Bilevel,
        state: tuple[PyTree, Array],
        alpha: PyTree,
        key: Array,
    ) -> tuple[hg.Estimate, tuple[PyTree, Array]]:
        """Trains at ``alpha`` and, for a difference, at the point along ``u``."""
        init_w, index = state
        u = jax.tree.map(lambda leaf: leaf[index], self.directions)
        train = lambda alpha: self.solver.solve(
            problem.inner_loss, init_w, alpha, problem.inner_data, key
        )[0]
        w = train(alpha)
        value, b, direct = problem.outer_value_and_grads(w, alpha, problem.outer_data)
        shifted_alpha = optax.tree.add_scale(alpha, self.mu, u)
        num_runs, num_grads, num_values = 2, 1, 0
        if self.kind == "direct":
            hypergradient, num_runs = direct, 1
        elif self.kind == "PZOBO":
            change = optax.tree.sub(train(shifted_alpha), w)
            slope = optax.tree.vdot(change, b) / self.mu
            hypergradient = optax.tree.add_scale(direct, slope, u)
        else:
            shifted_w = train(shifted_alpha)
            shifted = problem.outer_value(shifted_w, shifted_alpha, problem.outer_data)
            hypergradient = optax.tree.scale((shifted - value) / self.mu, u)
            num_grads, num_values = 0, 2
        costs = cost_stats(
            problem.inner_data,
            problem.outer_data,
            num_grads=num_runs * self.solver.num_steps,
            num_outer_grads=num_grads,
            num_outer_values=num_values,
        )
        flags = {"random": True}
        estimate = make_estimate(value, hypergradient, w, flags, **costs)
        return estimate, (init_w, index + 1)


class RestartedPZOBO(hg.PZOBO):
    """The package's PZOBO, with inner steps from the first ``w`` each time."""

    def step(self, problem: Any, state: Any, alpha: PyTree, data: Any) -> Any:
        """Makes a step and forgets where its inner steps ended."""
        step, _ = super().step(problem, state, alpha, data)
        return step, state
