"""`OuterLoop`: the outer problem together with the rule that moves ``alpha``."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import optax
from jaxtyping import Array, PyTree

from .. import spaces
from ..certificate import check_certifiable
from ..checkpoint import Checkpoints
from ..checks.lost_derivatives import (
    check_losses_for_certificates,
    describe_flagged_losses,
)
from ..checks.problem import (
    can_be_trusted,
    check_init,
    check_on_shapes,
    check_problem_type,
)
from ..checks.shard_map import check_problem_on_devices
from ..estimators.base import Estimator, get_target
from ..inner.descent import LINE_SEARCH_STATES, contains_state
from ..keys_in_w import bind_keys
from ..metrics import Metric, check_metrics
from ..number_checks import boolean, check_positive_int
from ..problem import Bilevel
from ..progress import Progress
from ..runtime.equal_optimizers import first_equal
from ..trace import Trace
from ..validation import (
    as_input_arrays,
    as_key,
    check_estimator_type,
    check_optimizer,
    check_same_structure,
    floats_to_arrays,
)
from .checks import (
    OnUntrusted,
    check_aggregator,
    check_on_untrusted,
    check_one_sample,
    check_outer_data_fn,
    check_space_of_state,
)
from .run import run_steps
from .step import OuterState, StepRecord, init_state, jitted_step


class OuterLoop(eqx.Module):
    """The outer problem together with the rule that moves ``alpha``.

    `minimize` repeats `step`. The class is for loops of your own and for options that
    `minimize` does not have:

        loop = hg.OuterLoop(problem, estimator, optimizer, certify_every=10)
        trace = loop.run(loop.init(w, alpha), num_steps=100)

    Args:
      problem: The problem.
      estimator: Estimator of the hypergradient; its state carries the warm starts.
      optimizer: Optax transformation for ``alpha`` without a line search, such as
        ``optax.adam(0.1)`` or ``optax.lbfgs(1.0, linesearch=None)``. It also receives
        the outer value.
      space: Admissible values of ``alpha``, from `hypergrad.spaces`. The optimizer
        moves the unconstrained variable, so every ``alpha`` lies in the space.
      project: Function ``alpha -> alpha`` applied after each step, instead of a space.
      aggregator: Rule that combines the hypergradients of K outer losses into one
        direction, from `hypergrad.objectives`; required for K outer losses.
        ``trace.value`` then has shape ``[steps, K]``, and
        ``trace.stats["objective_weights"]`` contains the weights. The score of the
        aggregator determines ``best_alpha``; the optimizer receives the score, or the
        weighted sum of the values if the aggregator has no score.
      outer_data_fn: ``(step, outer_data) -> outer_data``, the data of the outer loss at
        each step, such as data with a falling temperature. Structure, shapes and dtypes
        must not change. For data in `Batches` the function takes and returns
        `Batches`, of the same order:
        ``hg.Batches(data.data | {"T": T}, data.batch_size, order=data.order)``.
      metrics: ``{name: fn(w, alpha, key) -> scalar}``, not counted as cost. Pass arrays
        that a metric reads as data: ``jax.tree_util.Partial(fn, arrays)``. If a metric
        has a method ``at_step(step)``, it must return the function of that step.
      eval_every: Number of steps between evaluations of the metrics, each at the
        ``alpha`` before the step. The step that ends a run by its ``num_steps`` or
        budget is always evaluated.
      certify_every: Number of steps between certificates (`hypergrad.certify`),
        starting with the first step; their cost is counted. A certificate replaces
        ``trusted`` and ``error_estimate`` of an estimator that targets the argmin, and
        ``distance_to_implicit`` of any other.
      on_untrusted: Treatment of an estimate that is not trusted. "record": it is used
        like any other. "skip": ``alpha`` and the optimizer do not change, while ``w``
        and the warm starts advance. "refine": the estimator, which must have a method
        ``refine`` as `Implicit` does, repeats it with more work; both costs are counted
        and the second estimate is used. "stop": the run ends before the step, at the
        ``alpha`` of the last trusted estimate.
      record_alphas: Whether ``trace.alphas`` contains the ``alpha`` of every step.

    Raises:
      TypeError, ValueError: An argument is invalid.

    >>> import optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: (w - alpha) ** 2
    >>> outer = lambda w, alpha, batch: (w - 1.0) ** 2
    >>> problem, estimator = hg.Bilevel(inner, outer), hg.Implicit(hg.Newton())
    >>> loop = hg.OuterLoop(problem, estimator, optax.sgd(0.25))
    >>> state = loop.init(0.0, 3.0)
    >>> state, record = loop.step(state)
    >>> float(record.value), float(loop.alpha(state))
    (4.0, 2.0)
    """

    problem: Bilevel
    estimator: Estimator
    optimizer: optax.GradientTransformation
    space: PyTree
    project: Callable[[PyTree], PyTree] | None
    aggregator: Any
    outer_data_fn: Callable[[Array, PyTree], PyTree] | None
    metrics: dict[str, Metric]
    eval_every: int
    certify_every: int | None
    on_untrusted: OnUntrusted
    record_alphas: bool

    def __init__(
        self,
        problem: Bilevel,
        estimator: Estimator,
        optimizer: optax.GradientTransformation,
        *,
        space: PyTree = None,
        project: Callable[[PyTree], PyTree] | None = None,
        aggregator: Any = None,
        outer_data_fn: Callable[[Array, PyTree], PyTree] | None = None,
        metrics: dict[str, Metric] | None = None,
        eval_every: int = 1,
        certify_every: int | None = None,
        on_untrusted: OnUntrusted = "record",
        record_alphas: bool = False,
    ):
        check_problem_type(problem)
        check_estimator_type(estimator)
        check_optimizer("optimizer", optimizer)
        check_positive_int("eval_every", eval_every)
        check_positive_int("certify_every", certify_every, optional=True)
        if space is not None and project is not None:
            raise ValueError("project must not be given together with space.")
        if not (project is None or callable(project)):
            raise TypeError(
                f"project must be a function alpha -> alpha; got {project!r}."
            )
        check_aggregator(aggregator, problem)
        check_outer_data_fn(outer_data_fn, problem, estimator)
        check_on_untrusted(on_untrusted, estimator)
        check_one_sample(certify_every, problem, estimator)
        self.problem, self.estimator, self.space, self.aggregator = floats_to_arrays(
            (problem, estimator, space, aggregator)
        )
        self.optimizer = first_equal(optimizer)
        self.project = project
        self.outer_data_fn = outer_data_fn
        self.metrics = check_metrics(metrics)
        self.eval_every = eval_every
        self.certify_every = certify_every
        self.on_untrusted = on_untrusted
        self.record_alphas = boolean("record_alphas")(record_alphas)

    def init(self, w: PyTree, alpha: PyTree, key: Array | None = None) -> OuterState:
        """Returns the state before the first step.

        Args:
          w, alpha: Starting point; pytrees of floating-point arrays. Keys and counters
            in ``w`` are constants.
          key: PRNG key. Defaults to ``jax.random.key(0)``.

        Raises:
          TypeError, ValueError: The loop does not fit ``w`` and ``alpha``; raised
            before anything is compiled.
        """
        w, alpha = as_input_arrays(w, alpha)
        self._check_inputs(w, alpha)
        key = as_key(key)
        check_problem_on_devices(*bind_keys(self.problem, w), alpha, key)
        return init_state(self, w, alpha, key)

    def step(self, state: OuterState) -> tuple[OuterState, StepRecord]:
        """Makes one step; pure, and usable inside ``jit``, ``scan`` and ``vmap``.

        The step is compiled by itself. To compile it together with code of your own,
        call it inside a function: ``jax.jit(lambda s: loop.step(s))``.

        Returns:
          The next state and the record of the step. If ``state.status`` is not 0 after
          a step, the step failed and the state contains the last good ``alpha`` and
          ``w``, which later steps do not change.
        """
        check_space_of_state(self, state)
        next_state, record = jitted_step(self, state)
        # The same arrays, so that the next check waits for no computation.
        return dataclasses.replace(next_state, space=state.space), record

    def alpha(self, state: OuterState) -> PyTree:
        """Returns the ``alpha`` of a state."""
        check_space_of_state(self, state)
        return spaces.forward(self.space, state.u)

    def run(
        self,
        state: OuterState,
        *,
        num_steps: int | None = None,
        budget: float | None = None,
        progress: Progress | None = None,
        checkpoints: Checkpoints | None = None,
        time_limit: float | None = None,
        memory_limit: float | None = None,
        record_every: int = 1,
    ) -> Trace:
        """Repeats `step` and returns the record of the run.

        A value, hypergradient or step that is not finite ends the run: ``alpha`` and
        ``w`` stay at the last good ones, later rows are NaN at no cost, and
        ``trace.status`` names the failure.

        Args:
          state: State from `init`, or ``trace.state`` of a run to continue.
          num_steps: Number of steps to make. The trace has a row per step, or per
            ``record_every`` steps.
          budget: Limit of the cost in gradient-equivalents. Steps are made until their
            cost reaches it, which the last row may exceed by its own cost at most.
            At least one of ``num_steps`` and ``budget`` must be given; with both, the
            run ends at whichever comes first. With a budget the trace has a row per
            step that was made.
            Inside ``jit`` or ``vmap`` a budget needs ``num_steps``, and the rows of
            steps that were not made are blank.
          progress: True shows a bar with the value, the trusted steps and the time
            left; it needs rich. A function ``(steps_done, value)`` is called on the
            host about twenty times per run; the value is a float, or an array ``[K]``.
          checkpoints: Folder of the run and interval at which it is saved. A run that
            was killed continues from there, to the same bits.
          time_limit: Seconds after which no further chunk of steps is started. A chunk
            is the steps between checkpoints, or a twentieth of the run. The trace then
            has the rows of the steps that were made. With ``checkpoints`` the same call
            continues later.
          memory_limit: Bytes of host memory of this process above which no further
            chunk is started, with the same result; on Linux only. Memory of
            accelerators does not count. With several processes all of them stop if one
            exceeds a limit.
          record_every: Number of steps per row of the trace, of which ``num_steps``
            must be a multiple. The last step of a row is recorded, checked and compared
            with ``best_alpha``; the others compute no value, statistic or metric, which
            matters where a step takes microseconds. ``alpha`` moves as with 1. The
            costs in a row are those of all its steps, and a failure returns to the last
            good ``alpha`` of a record. ``eval_every`` and ``certify_every`` must be
            multiples, or smaller.

        Raises:
          TypeError, ValueError: An argument is invalid.
          ValueError: The state has another structure than the states of this loop or
            is of a failed run; checkpoints belong to another or to a running run.
          ImportError: ``progress`` is True and rich is not installed.
        """
        return run_steps(
            self,
            state,
            num_steps=num_steps,
            budget=budget,
            progress=progress,
            checkpoints=checkpoints,
            time_limit=time_limit,
            memory_limit=memory_limit,
            record_every=record_every,
        )

    @property
    def has_comparable_values(self) -> bool:
        """True if a lower value means a better ``alpha``."""
        has_score = self.aggregator is None or hasattr(self.aggregator, "score")
        # With outer_data_fn the values of different steps are of different losses.
        return has_score and self.outer_data_fn is None

    def problem_at(self, step: Array) -> Bilevel:
        """Returns the problem with the outer data of a step."""
        if self.outer_data_fn is None:
            return self.problem
        data = self.outer_data_fn(step, self.problem.outer_data)
        return eqx.tree_at(
            lambda p: p.outer_data, self.problem, data, is_leaf=lambda x: x is None
        )

    def _check_inputs(self, w: PyTree, alpha: PyTree) -> None:
        """Checks everything that depends on the shapes of ``w`` and ``alpha``."""
        # Line searches are recognized by their states, since optax.chain hides them.
        optimizer_state = eqx.filter_eval_shape(self.optimizer.init, alpha)
        if contains_state(optimizer_state, LINE_SEARCH_STATES):
            raise ValueError(
                "optimizer must not use a line search, because the outer loss is "
                "evaluated only at the current alpha. Use e.g. optax.adam(0.1)."
            )
        spaces.check(self.space, alpha)
        problem, parameters = bind_keys(self.problem, w)
        check_init(self.estimator, problem, parameters, alpha)
        if self.certify_every is not None:
            check_on_shapes(check_certifiable, problem, parameters, alpha)
        self._check_on_untrusted_can_pass(problem, parameters, alpha)
        check_metrics(self.metrics, w, alpha)
        if self.project is not None:
            projected = eqx.filter_eval_shape(self.project, alpha)
            check_same_structure("project", projected, alpha, "alpha")

    def _check_on_untrusted_can_pass(
        self, problem: Bilevel, w: PyTree, alpha: PyTree
    ) -> None:
        """Raises ValueError if estimates can never be trusted.

        ``on_untrusted`` then needs a certificate at every step, and losses whose
        derivatives are complete.
        """
        if self.on_untrusted == "record":
            return
        message = (
            f'on_untrusted must be "record" for {type(self.estimator).__name__}, whose '
            f'estimates are never trusted; got "{self.on_untrusted}".'
        )
        # A certificate replaces the trust only of estimators that target the argmin.
        targets_argmin = get_target(self.estimator) == "argmin"
        if targets_argmin and self.certify_every == 1:
            check = check_losses_for_certificates
            check_on_shapes(check, problem, w, alpha, message)
            return
        # An average adds checks of its own, which trust nothing that is not trusted.
        estimator = getattr(self.estimator, "estimator", self.estimator)
        if can_be_trusted(estimator, problem, w, alpha):
            return
        remedies = list(describe_flagged_losses(problem, estimator, w, alpha))
        if targets_argmin and not remedies:
            remedies = ["Use certify_every=1."]
        raise ValueError(" ".join([message, *remedies]))
