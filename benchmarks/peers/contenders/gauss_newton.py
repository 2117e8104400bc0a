"""hypergrad with Gauss-Newton products, whose matrix has no negative eigenvalue."""

import jax
import jax.numpy as jnp
import optax

import hypergrad as hg

from .. import problems
from ..work import Data
from .ours import ProgramWithStats, hypergradient_and_stats, implicit_at_w


def indefinite(data: Data) -> ProgramWithStats:
    """Returns the estimate with the loss of `problems.cleaning` as a composite loss."""

    def loss_fn(scores, alpha, batch):
        losses = problems.cross_entropy(scores, batch["y"])
        return jnp.mean(jax.nn.sigmoid(alpha) * losses)

    loss = hg.CompositeLoss(
        model_fn=lambda w, alpha, batch: problems.perceptron(
            jax.nn.relu, w, batch["x"]
        ),
        loss_fn=loss_fn,
        regularizer=lambda w, alpha: (
            0.5 * data["penalty"] * optax.tree.norm(w, squared=True)
        ),
    )
    problem = problems.cleaning(data)._replace(inner=loss)
    estimator = implicit_at_w(problem, hvp_fn=loss.gauss_newton)
    return hypergradient_and_stats(problem, estimator)


WORKS = {"w2-indefinite": indefinite}
