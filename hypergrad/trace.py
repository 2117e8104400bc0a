"""The result of a run, of one type for `minimize` and `search`."""

import dataclasses
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .display.tables import ResultModule, Row, render_text
from .display.trace import count_rows_made, is_evaluated, trace_rows
from .estimators.base import REASONS
from .plots import plot_trace
from .trees import PrettyModule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATUS_MESSAGES = (
    "completed",
    "stopped: the outer value is not finite",
    "stopped: the hypergradient is not finite",
    "stopped: the step left alpha not finite",
    "failed: no trial has a finite value",
    "stopped: the hypergradient is not trusted",
    "stopped: time limit",
    "stopped: the weights of the outer losses are not finite",
    "stopped: memory limit",
    "stopped: the cost of a step is not positive, so that the budget cannot be spent",
)
BAD_VALUE, BAD_HYPERGRADIENT, BAD_STEP, FAILED, UNTRUSTED = 1, 2, 3, 4, 5
OUT_OF_TIME, NONFINITE_WEIGHTS, OUT_OF_MEMORY, BAD_COST = 6, 7, 8, 9


class Trace(ResultModule):
    """The record of a run.

    Under `jax.vmap` every leaf has the batch axes in front.

    Attributes:
      alpha: The last good ``alpha``.
      w: The inner solution of the last good estimate. After a completed run it belongs
        to the ``alpha`` before the last step; train once more at ``alpha`` for a pair.
      best_alpha: The ``alpha`` with the lowest recorded value. It is the last one with
        a good value if values cannot be compared: with ``outer_data_fn``, or with an
        aggregator that has no score. In a search it is that of ``best_row``. If batches
        are sampled, inner or outer ones, the lowest value is that of the luckiest; take
        ``alpha``.
      value: ``[steps]``, the outer value at the ``alpha`` of each step, before the
        step; ``[steps, K]`` for K outer losses. A warm-started estimator also lowers it
        by training ``w`` further. Rows after a failure are NaN.
      stats: ``{name: [steps]}``, the statistics of the estimates. With K outer losses
        also ``objective_weights``, ``[steps, K]``.
      metrics: ``{name: [steps]}``, NaN where a metric was not evaluated.
      status_code: 0 if all steps were made or the budget was used up, and in a search
        if a trial has a finite value; see `status`. `hypergrad.diagnose` names the
        place where numbers stopped being finite.
      flags: ``{name: [steps]}`` of booleans, the failed checks of the estimates.
      alphas: The ``alpha`` of each step with a leading axis ``[steps]`` if
        ``record_alphas`` was set, else None.
      first_step: Number of steps made before this run, if it continued another.
      record_every: Number of steps per row. Where ``[steps]`` stands above, there is a
        row for the last of each ``record_every`` steps; its costs are those of all.
      row_kind: What a row is: ``"step"`` in `minimize`, and in `search` ``"trial"``,
        for which "step" above stands as well.
      best_row: Index of the row of the best trial of a search, which ``alpha``,
        ``best_alpha`` and ``w`` belong to; None in `minimize`.
      state: State from which `minimize` continues, or None after a search. It shares
        arrays with ``w`` and ``best_alpha``: a program to which it is donated
        (``donate_argnums`` of `jax.jit`) deletes these.

    >>> import optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: (w - alpha) ** 2
    >>> outer = lambda w, alpha, batch: (w - 1.0) ** 2
    >>> trace = hg.minimize(
    ...     hg.Bilevel(inner, outer), hg.Implicit(hg.Newton()), optax.sgd(0.25),
    ...     0.0, 3.0, num_steps=2,
    ... )
    >>> len(trace.rows()), trace.status, trace.reasons()
    (2, 'completed', {})
    """

    alpha: PyTree
    w: PyTree
    best_alpha: PyTree
    value: Array
    stats: dict[str, Array]
    metrics: dict[str, Array]
    status_code: Array
    flags: dict[str, Array] = eqx.field(default_factory=dict)
    alphas: PyTree = None
    first_step: Array | int = 0
    record_every: int = eqx.field(static=True, default=1)
    row_kind: str = eqx.field(static=True, default="step")
    best_row: Array | int | None = None
    state: Any = None

    def __repr__(self) -> str:
        """Returns a table of the run, or runs, or else the fields without the state."""
        if (rows := self._readable_rows()) is not None:
            return render_text(type(self).__name__, rows)
        return PrettyModule.__repr__(dataclasses.replace(self, state=None))

    def _rows(self) -> list[Row] | None:
        return trace_rows(self)

    @property
    def status(self) -> str:
        """Reason why the run ended, in words; for a single run, not for a batch."""
        self._check_single("status")
        return STATUS_MESSAGES[int(self.status_code)]

    @property
    def steps(self) -> np.ndarray:
        """Number of the step of each row, counted from the start of the first run."""
        self._check_single("steps")
        num_steps = self.record_every * np.arange(1, len(self.value) + 1)
        return int(self.first_step) + num_steps - 1

    @property
    def last_row(self) -> int:
        """Index of the last row that was made; later ones, after a failure, are NaN."""
        self._check_single("last_row")
        return count_rows_made(self) - 1

    @property
    def cost(self) -> Array:
        """Gradient-equivalents spent up to and including each step, ``[steps]``."""
        return jnp.cumsum(self.stats["gradient_equivalents"], axis=-1)

    def reasons(self) -> dict[str, list[int]]:
        """Returns the reasons not to trust estimates: ``{sentence: steps}``.

        Numbers that are not finite come first, and at their steps alone, because they
        explain other reasons. In a search, also the trials whose solver stopped before
        its tolerance, whose values count all the same.
        """
        self._check_single("reasons()")
        # Blank rows have no flags.
        flags = {name: np.asarray(x) for name, x in self.flags.items()}
        not_finite = flags.pop("not_finite", np.zeros(len(self.steps), bool))
        flags = {name: flag & ~not_finite for name, flag in flags.items()}
        flags = {"not_finite": not_finite} | flags
        return {
            REASONS.get(name, name): self.steps[flag].tolist()
            for name, flag in flags.items()
            if flag.any()
        }

    def rows(self) -> list[dict[str, Any]]:
        """Returns a dictionary per step: step, value, cost so far, stats, metrics.

        The row of a step does not contain metrics that are not known to have been
        evaluated in it.
        """
        self._check_single("rows()")
        fixed_columns = {"value": self.value, "cost": self.cost}
        # They come first and are kept, whatever the names of the statistics are.
        stats = {name: x for name, x in self.stats.items() if name != "step"}
        columns = fixed_columns | stats | fixed_columns
        columns = {name: np.asarray(column) for name, column in columns.items()}
        metrics = {
            name: (np.asarray(column), is_evaluated(self, name))
            for name, column in self.metrics.items()
        }
        rows = []
        for i, step in enumerate(self.steps.tolist()):
            row = {"step": step}
            row |= {name: column[i].tolist() for name, column in columns.items()}
            row |= {
                name: column[i].item()
                for name, (column, is_known) in metrics.items()
                if is_known[i]
            }
            rows.append(row)
        return rows

    def plot(self) -> "Figure":
        """Returns a matplotlib figure of the run; see `hypergrad.plots.plot_trace`."""
        self._check_single("plot()")
        return plot_trace(self)

    def _check_single(self, name: str) -> None:
        if jnp.ndim(self.status_code):
            raise ValueError(
                f"{name} needs a single run; got a batch {self.value.shape}. Index it "
                "first: jax.tree.map(lambda x: x[i], trace)."
            )
