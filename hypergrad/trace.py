"""What a run leaves: one type for `minimize` and `search`."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .shown import Shown

STATUS = (
    "completed",
    "stopped: the outer value is not finite",
    "stopped: the hypergradient is not finite",
    "stopped: the step left alpha not finite",
    "failed: no trial has a finite value",
    "stopped: the hypergradient is not trusted",
    "stopped: time limit",
    "stopped: combine's weights of the losses are not finite",
    "stopped: memory limit",
)
FAILED, UNTRUSTED, OUT_OF_TIME, UNWEIGHED, OUT_OF_MEMORY = 4, 5, 6, 7, 8


class Trace(Shown):
    """The course of a run.

    Attributes:
      alpha, w: where the run ended: the last good ``alpha``, and the inner solution of
        the last good estimate.
      best_alpha: the ``alpha`` with the lowest recorded value; of an annealed run, or
        one of several losses without a score, the last one with a good value; of a
        search of several, see `hypergrad.search`. Where outer batches are drawn
        the lowest value is the luckiest batch's: take ``alpha``.
      value: ``[steps]``, the outer value at each step's ``alpha``, before the step;
        ``[steps, K]`` of K outer losses.
      stats: ``{name: [steps]}``, the estimates' stats; of K outer losses also
        ``weights``, ``[steps, K]``.
      metrics: ``{name: [steps]}``, NaN where not evaluated.
      status_code: 0 if all steps were made, and of a search one has a finite value; see
        ``status``.

    With a warm-started estimator ``value`` also falls because ``w`` is trained further,
    and a later one is better than an earlier one by that too.

    After a completed run ``w`` belongs to the ``alpha`` before the last step; train
    once more at ``alpha`` for the pair.

    Under ``vmap`` every leaf has the batch axes in front.

    >>> import optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: (w - alpha) ** 2
    >>> outer = lambda w, alpha, batch: (w - 1.0) ** 2
    >>> trace = hg.minimize(
    ...     hg.Bilevel(inner, outer), hg.Implicit(hg.Newton()), optax.sgd(0.25),
    ...     0.0, 3.0, num_steps=2,
    ... )
    >>> len(trace.rows()), trace.status
    (2, 'completed')
    """

    alpha: PyTree
    w: PyTree
    best_alpha: PyTree
    value: Array
    stats: dict[str, Array]
    metrics: dict[str, Array]
    status_code: Array

    @property
    def status(self) -> str:
        """Why the run ended, in words; for one run, not a batch of them."""
        if jnp.ndim(self.status_code):
            raise ValueError(
                f"status is for one run; this trace holds a batch {self.value.shape}: "
                "index it first, jax.tree.map(lambda x: x[i], trace)"
            )
        return STATUS[int(self.status_code)]

    @property
    def cost(self) -> Array:
        """``[steps]``: gradient-equivalents spent up to and including each step."""
        return jnp.cumsum(self.stats["gradient_equivalents"], axis=-1)

    def rows(self) -> list[dict[str, Any]]:
        """One dict a step: step, value, cost so far, stats, metrics where evaluated."""
        if jnp.ndim(self.status_code):
            raise ValueError(
                f"rows() is for one run; this trace holds a batch {self.value.shape}: "
                "index it first, jax.tree.map(lambda x: x[i], trace)"
            )
        columns = {"value": self.value, "cost": self.cost} | self.stats
        columns = {name: np.asarray(column) for name, column in columns.items()}
        metrics = {name: np.asarray(column) for name, column in self.metrics.items()}
        rows = []
        for step in range(len(self.value)):
            row = {"step": step}
            row |= {name: column[step].tolist() for name, column in columns.items()}
            row |= {
                name: column[step].item()
                for name, column in metrics.items()
                if not np.isnan(column[step])
            }
            rows.append(row)
        return rows
