"""Ours with Gauss-Newton products, which are never negative."""

import jax
import jax.numpy as jnp
import optax

import hypergrad as hg

from .. import problems
from ..work import Data
from .ours import Flagged, at_w, flagged


def indefinite(data: Data) -> Flagged:
    """The loss of `problems.cleaning` as a composite loss."""

    def loss_fn(scores, alpha, batch):
        each = problems.cross_entropy(scores, batch["y"])
        return jnp.mean(jax.nn.sigmoid(alpha) * each)

    loss = hg.CompositeLoss(
        model_fn=lambda w, alpha, batch: problems.layered(jax.nn.relu, w, batch["x"]),
        loss_fn=loss_fn,
        regularizer=lambda w, alpha: (
            0.5 * data["penalty"] * optax.tree.norm(w, squared=True)
        ),
    )
    problem = problems.cleaning(data)._replace(inner=loss)
    return flagged(problem, at_w(problem, hvp_fn=loss.gauss_newton))


WORKS = {"w2-indefinite": indefinite}
