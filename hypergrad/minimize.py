"""The outer loop: one compiled program."""

import contextlib
import time
from collections.abc import Callable
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from . import spaces
from .certificate import Claim, certificate
from .checkpoint import (
    Checkpoints,
    Folder,
    Identity,
    check_checkpoints,
    opened,
    place,
)
from .checks import (
    as_inputs,
    as_key,
    check_estimator_is,
    check_problem_is,
    check_same_structure,
    ever_trusted,
    is_traced,
    rehearse,
    traced,
)
from .cost.memory import resident
from .devices import largest
from .drawn import drawn
from .estimators.protocol import Estimate, Estimator
from .identity import digest, digest_program
from .inner.descent import LINE_SEARCHES, holds
from .metrics import Metric, Progress, at_step, check_metrics, check_progress
from .problem import Bilevel, draw, whole
from .settings import check_steps
from .trace import OUT_OF_MEMORY, OUT_OF_TIME, UNTRUSTED, UNWEIGHED, Trace
from .trees import all_finite, dot

LEDGER = ("gradient_equivalents", "num_")
OnUntrusted = Literal["record", "skip", "refine", "stop"]


def minimize(
    problem: Bilevel,
    estimator: Estimator,
    optimizer: optax.GradientTransformation,
    w: PyTree,
    alpha: PyTree,
    *,
    num_steps: int,
    key: Array | None = None,
    combine: Any = None,
    space: PyTree = None,
    project: Callable[[PyTree], PyTree] | None = None,
    anneal: Callable[[Array, PyTree], PyTree] | None = None,
    metrics: dict[str, Metric] | None = None,
    eval_every: int = 1,
    certify_every: int | None = None,
    on_untrusted: OnUntrusted = "record",
    progress: Progress | None = None,
    checkpoints: Checkpoints | None = None,
    time_limit: float | None = None,
    memory_limit: float | None = None,
) -> Trace:
    """``num_steps`` steps of ``optimizer`` on ``alpha`` along the hypergradient.

    Args:
      problem: the two losses and their data.
      estimator: of the hypergradient; its state carries the warm starts.
      optimizer: any optax transformation but a line search, for ``alpha``, such as
        ``optax.adam(0.1)`` or ``optax.lbfgs(1.0, linesearch=None)``; it is given the
        outer value too.
      w, alpha: where to begin.
      num_steps: outer steps, static.
      key: PRNG key; None means ``jax.random.key(0)``.
      combine: for K outer losses, what makes one direction of their hypergradients,
        from `hypergrad.objectives`. ``trace.value`` is then ``[steps, K]``, and
        ``trace.stats["weights"]`` holds the weight of each. The combiner's score tells
        the best ``alpha``; where it has none, ``best_alpha`` is the last good one, and
        the optimizer is given the weighted sum.
      space: what ``alpha`` may be, from `hypergrad.spaces`: the optimizer then moves
        the unconstrained variable, and every ``alpha`` lies in the space.
      project: applied to ``alpha`` after each step, instead of a space.
      anneal: ``(step, outer_data) -> outer_data``, what the outer loss sees at each
        step, such as data with a lower temperature in it; structure, shapes and dtypes
        stay. It gets `Batches` as they are: ``hg.Batches(data.data | {"T": T},
        data.batch_size)``. The values of different steps do not compare then, so that
        ``trace.best_alpha`` is the last good one.
      metrics: ``{name: fn(w, alpha, key) -> scalar}``, evaluated outside the ledger;
        arrays they read are data: ``jax.tree_util.Partial(fn, arrays)``. A metric may
        differ from step to step: an object with a method ``at_step(step)`` is asked for
        the function of each.
      eval_every: steps between evaluations; the last step is always evaluated.
      certify_every: steps between certificates (`hypergrad.certify`), from the first
        step on, counted in the ledger; the last step has one if it is its turn. They
        overwrite ``trusted`` and ``error_estimate`` of an estimator whose
        target is the argmin, and ``distance_to_implicit`` of one of the procedure;
        beside them its own stay.
      on_untrusted: what becomes of an estimate that is not ``trusted``. "record": it
        makes its step, and its row says so. "skip": it makes none, ``alpha`` and the
        optimizer stay; what the estimator carries goes on. "refine": it is made again,
        from where it ended and with more work, by an estimator that offers it
        (``refine``, as `Implicit` does); both costs are in the row, ``refined`` in its
        stats says where, and the second makes its step, trusted or not. "stop": the run
        ends before its step.
      progress: ``(steps_done, value)``, called on the host at most twenty times a run;
        the value is a float, or an array ``[K]``.
      checkpoints: where to keep what moves, `Checkpoints`; a run that was killed goes
        on from there, to the same bits.
      time_limit: seconds after which no further chunk of steps is begun, a chunk being
        the steps between checkpoints, else a twentieth of the run. With ``checkpoints``
        the same call goes on later.
      memory_limit: bytes; after a chunk of steps the run stops where this process has
        more than that in the host's memory. It is looked at between chunks alone, so
        that what one of them needs has to fit beside it, and on Linux alone; memory of
        accelerators does not count. Of several processes all stop where one passes a
        limit.

    A value, hypergradient or step that is not finite freezes the run: ``alpha`` and
    ``w`` stay at the last good ones, later rows are NaN at no cost, and
    ``trace.status`` says why.

    Without ``progress``, ``checkpoints``, ``time_limit`` and ``memory_limit`` the
    function is pure: it can be jitted and vmapped. Losses are traced a constant number
    of times, and a second run with the same objects and shapes traces nothing.

    Cost: ``num_steps`` estimates, in ``trace.cost``. Memory: one estimate's, and a row
    of scalars a step.

    Raises:
      TypeError, ValueError: bad input, before anything is traced.
      ValueError: checkpoints of another run, or of one that is running.

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: jnp.sum((w - 1.0) ** 2)
    >>> trace = hg.minimize(
    ...     hg.Bilevel(inner, outer), hg.Implicit(hg.Newton()), optax.sgd(0.25),
    ...     0.0, 3.0, num_steps=30, key=jax.random.key(0),
    ... )
    >>> round(float(trace.alpha), 4), trace.status
    (1.0, 'completed')
    """
    check_problem_is(problem)
    check_estimator_is(estimator)
    check_steps("num_steps", num_steps)
    check_steps("eval_every", eval_every)
    check_steps("certify_every", certify_every, optional=True)
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            "optimizer must be an optax.GradientTransformation such as "
            f"optax.adam(0.1); got {type(optimizer).__name__}"
        )
    if holds(eqx.filter_eval_shape(optimizer.init, alpha), LINE_SEARCHES):
        raise ValueError(
            "optimizer searches along a line, which would ask for the outer value at "
            "other alphas; use one that needs only the hypergradient, such as "
            "optax.adam(0.1)"
        )
    _check_combine(combine, problem)
    if space is not None and project is not None:
        raise ValueError("pass either space or project, not both")
    w, alpha = as_inputs(w, alpha)
    spaces.check(space, alpha)
    estimator, problem, space, combine = traced((estimator, problem, space, combine))
    rehearse(estimator, problem, w, alpha)
    if certify_every is not None:
        if problem.draw is not None and hasattr(estimator, "num_draws"):
            raise ValueError(
                "certify_every looks at one draw of the problem's data, an average is "
                "over several; certify within each, by the estimator that is averaged"
            )
        rehearse(Claim(), problem, w, alpha)
    _check_untrusted(on_untrusted, estimator, problem, w, alpha, certify_every)
    metrics = check_metrics(metrics, w, alpha)
    _check_project(project, alpha)
    _check_anneal(anneal, problem)
    check_progress(progress)
    check_checkpoints(checkpoints)
    _check_limit("time_limit", time_limit, "seconds")
    _check_limit("memory_limit", memory_limit, "bytes")
    if memory_limit is not None and resident() is None:
        raise ValueError(
            "memory_limit needs a system that tells how much memory this process has "
            "now, as Linux does in /proc/self/statm; leave it out here"
        )
    key = as_key(key)
    on_host = {
        "progress": progress, "checkpoints": checkpoints, "time_limit": time_limit,
        "memory_limit": memory_limit,
    }  # fmt: skip
    on_host = [name for name, given in on_host.items() if given is not None]
    if on_host and is_traced(problem, w, alpha, key):
        raise TypeError(
            f"{on_host[0]} is seen to on the host, so it does not work within jax.jit "
            "or jax.vmap; leave it out there"
        )
    loop = _Loop(
        problem,
        estimator,
        optimizer,
        combine,
        space,
        project,
        anneal,
        metrics,
        eval_every,
        certify_every,
        on_untrusted,
        num_steps,
    )
    began = time.monotonic()
    carry = _begin(loop, w, alpha, key)
    if not on_host:
        return _finish(loop, _run(loop, carry, jnp.asarray(num_steps)))
    with contextlib.ExitStack() as stack:
        folder = None
        if checkpoints is not None:
            run = _identity(loop, carry, w, alpha, key)
            folder = stack.enter_context(opened(checkpoints, run))
            carry = folder.load(carry)
        every = None if checkpoints is None else checkpoints.every

        def beyond() -> int:
            if time_limit is None and memory_limit is None:
                return 0
            late = time_limit is not None and time.monotonic() - began > time_limit
            large = memory_limit is not None and (resident() or 0) > memory_limit
            found = OUT_OF_TIME if late else OUT_OF_MEMORY if large else 0
            return largest(found)  # no process goes on without the others

        carry = _in_chunks(loop, carry, progress, folder, every, beyond)
    return _finish(loop, carry)


def _in_chunks(
    loop: "_Loop",
    carry: "_Carry",
    progress: Progress | None,
    folder: Folder | None,
    every: int | None,
    beyond: Callable[[], int],
) -> "_Carry":
    """The run with the host looking in; how it is cut changes no bit of it.

    ``beyond`` tells the status of a limit that was passed, 0 for none.
    """
    last, twentieth = loop.num_steps, -(-loop.num_steps // 20)
    tell = {*range(twentieth, last, twentieth), last}
    keep = {last} if every is None else {*range(every, last, every), last}
    looks = (tell if progress or every is None else set()) | keep
    for until in sorted(step for step in looks if step > int(carry.index)):
        if int(carry.status):
            break
        carry = _run(loop, carry, jnp.asarray(until))
        stopped = int(carry.status) > 0
        limit = beyond()
        if folder is not None and (until in keep or stopped or limit):
            folder.save(int(carry.index), carry)
        if progress is not None and until in tell:
            value = np.asarray(carry.rows.value[until - 1])
            progress(until, value if value.ndim else value.item())
        if limit and until < last and not stopped:
            return eqx.tree_at(lambda c: c.status, carry, jnp.asarray(limit))
    return carry


def _identity(
    loop: "_Loop", carry: "_Carry", w: PyTree, alpha: PyTree, key: Array
) -> Identity:
    """What makes a run this one, by name; see `Checkpoints`."""
    problem, optimizer = loop.problem, optax.with_extra_args_support(loop.optimizer)
    inner, outer = (
        jax.eval_shape(look, key)
        for look in (
            lambda key: draw(problem.data(key)[0], key),
            lambda key: whole(problem.data(key)[1], key),
        )
    )
    code = lambda f, *inputs: digest_program(jax.jit(f).lower(*inputs))
    step = lambda g, state, u: optimizer.update(g, state, u, value=jnp.zeros(()))
    program = _run.lower(loop, carry, jnp.asarray(0))  # pyright: ignore[reportFunctionMemberAccess]
    settings = ("num_steps", "eval_every", "certify_every", "on_untrusted")
    trees = ("estimator", "combine", "space", "project", "anneal", "metrics")
    return (
        {name: str(getattr(loop, name)) for name in settings}
        | {name: digest(getattr(loop, name)) for name in trees}
        | {
            "w": digest(w),
            "alpha": digest(alpha),
            "key": digest(key),
            "inner_data": digest(problem.inner_data),
            "outer_data": digest(problem.outer_data),
            "inner_loss": code(problem.inner_loss, w, alpha, inner),
            "outer_loss": code(lambda *inputs: problem.outer(*inputs), w, alpha, outer),
            "optimizer": code(step, carry.u, carry.optimizer_state, carry.u),
            "program": digest_program(program),
            "beginning": digest(carry),
        }
        | place()
    )


def _check_limit(name: str, limit: Any, unit: str) -> None:
    if limit is None:
        return
    number = isinstance(limit, int | float) and not isinstance(limit, bool)
    if not (number and limit > 0):
        raise ValueError(f"{name} must be a positive number of {unit}; got {limit!r}")


def _check_untrusted(
    on_untrusted: Any,
    estimator: Any,
    problem: Bilevel,
    w: PyTree,
    alpha: PyTree,
    certify_every: int | None,
) -> None:
    """Refuses what is no choice, and a guard that could never let a step through."""
    if on_untrusted not in get_args(OnUntrusted):
        raise ValueError(
            f"on_untrusted must be one of {', '.join(get_args(OnUntrusted))}; got "
            f"{on_untrusted!r}"
        )
    if on_untrusted == "record":
        return
    name = type(estimator).__name__
    if on_untrusted == "refine" and not hasattr(estimator, "refine"):
        raise ValueError(
            f'on_untrusted="refine" needs an estimator that can, such as hg.Implicit; '
            f'{name} has no method refine: choose "skip" or "stop"'
        )
    if estimator.target == "argmin" and certify_every == 1:
        return
    if not ever_trusted(estimator, problem, w, alpha):
        advice = (
            "; certify_every=1 judges each of them"
            if estimator.target == "argmin"
            else ""
        )
        raise ValueError(
            f"{name} never says of an estimate that it is trusted, so "
            f'on_untrusted="{on_untrusted}" would let no step through{advice}'
        )


def _check_combine(combine: Any, problem: Bilevel) -> None:
    count = problem.num_objectives
    if count is None:
        if combine is not None:
            raise ValueError(
                "combine is for several outer losses; the problem has one, as it is no "
                "tuple: leave combine out"
            )
        return
    if combine is None:
        raise ValueError(
            f"the problem has {count} outer losses; say what direction to make of "
            "them, such as combine=hg.objectives.UPGrad()"
        )
    if isinstance(combine, type):
        name = combine.__name__
        raise TypeError(f"combine is the class {name}; write {name}(...)")
    if not (hasattr(combine, "init") and hasattr(combine, "weigh")):
        raise TypeError(
            "combine must have init and weigh, such as hg.objectives.UPGrad(); got "
            f"{type(combine).__name__}"
        )
    combine.init(count)


def _check_project(project: Any, alpha: PyTree) -> None:
    if project is None:
        return
    if not callable(project):
        raise TypeError(f"project must be a function alpha -> alpha; got {project!r}")
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    found = eqx.filter_eval_shape(project, alpha)
    if jax.tree.structure(found) != jax.tree.structure(alpha) or shapes(
        found
    ) != shapes(alpha):
        raise ValueError(
            f"project returned {shapes(found)} where alpha is {shapes(alpha)}; it must "
            "keep alpha's structure and shapes"
        )


def _check_anneal(anneal: Any, problem: Bilevel) -> None:
    if anneal is None:
        return
    if not callable(anneal):
        raise TypeError(
            "anneal must be a function (step, outer_data) -> outer_data; got "
            f"{anneal!r}"
        )
    if problem.draw is not None:
        raise ValueError("anneal needs outer_data; a problem with draw has none")
    found = eqx.filter_eval_shape(anneal, jnp.asarray(0), problem.outer_data)
    check_same_structure("anneal", found, problem.outer_data, "outer_data")


class _Loop(eqx.Module):
    """What stays the same through a run."""

    problem: Bilevel
    estimator: Any
    optimizer: optax.GradientTransformation
    combine: Any
    space: PyTree
    project: Callable | None
    anneal: Callable | None
    metrics: dict[str, Metric]
    eval_every: int
    certify_every: int | None
    on_untrusted: OnUntrusted
    num_steps: int

    @property
    def compares(self) -> bool:
        """Whether a lower score is a better ``alpha``.

        Not where annealed, as then the values are of different losses.
        """
        scored = self.combine is None or hasattr(self.combine, "score")
        return scored and self.anneal is None

    def problem_at(self, index: Array) -> Bilevel:
        """The problem as the outer loss sees it at a step."""
        if self.anneal is None:
            return self.problem
        data = self.anneal(index, self.problem.outer_data)
        return eqx.tree_at(
            lambda p: p.outer_data, self.problem, data, is_leaf=lambda x: x is None
        )


class _Rows(eqx.Module):
    """What a step reports; in the carry each array has one entry a step."""

    value: Array
    stats: dict[str, Array]
    metrics: dict[str, Array]


class _Carry(eqx.Module):
    """What moves: ``u`` is ``alpha`` in the space's unconstrained coordinates.

    ``good_u`` is where the last good estimate was made, to go back to.
    """

    index: Array
    status: Array
    u: PyTree
    good_u: PyTree
    w: PyTree
    best_value: Array
    best_alpha: PyTree
    combine_state: PyTree
    optimizer_state: PyTree
    estimator_state: PyTree
    key: Array
    rows: _Rows


@eqx.filter_jit
def _begin(loop: _Loop, w: PyTree, alpha: PyTree, key: Array) -> _Carry:
    init_key, key = jax.random.split(key)
    u = spaces.inverse(loop.space, alpha)
    state = loop.estimator.init(loop.problem, w, alpha, init_key)
    rows = _blank(loop, state, alpha, key)
    return _Carry(
        index=jnp.asarray(0),
        status=jnp.asarray(0),
        u=u,
        good_u=u,
        w=w,
        best_value=jnp.asarray(jnp.inf, dtype=rows.value.dtype),
        best_alpha=alpha,
        combine_state=None
        if loop.combine is None
        else loop.combine.init(loop.problem.num_objectives),
        optimizer_state=loop.optimizer.init(u),
        estimator_state=state,
        key=key,
        rows=rows,
    )


def _blank(loop: _Loop, state: PyTree, alpha: PyTree, key: Array) -> _Rows:
    """The rows of a run that has not moved: NaN, at no cost."""
    estimate = lambda: loop.estimator.estimate(loop.problem, state, alpha, key)[0]
    seen = jax.eval_shape(estimate)

    def column(name, row):
        fill = 0 if name.startswith(LEDGER) or row.dtype == bool else jnp.nan
        return jnp.full((loop.num_steps, *row.shape), fill, row.dtype)

    stats = {name: column(name, row) for name, row in seen.stats.items()}
    if loop.combine is not None:
        stats["weights"] = jnp.full((loop.num_steps, *seen.value.shape), jnp.nan, float)
    if loop.on_untrusted == "refine":
        stats["refined"] = jnp.zeros(loop.num_steps, bool)
    return _Rows(
        column("value", seen.value),
        stats,
        {name: jnp.full(loop.num_steps, jnp.nan, float) for name in loop.metrics},
    )


@eqx.filter_jit
def _run(loop: _Loop, carry: _Carry, until: Array) -> _Carry:
    """Steps up to number ``until``, or until one fails.

    ``until`` is data, so that a run in pieces runs the program of a whole one.
    """
    going = lambda carry: (carry.index < until) & (carry.status == 0)
    return jax.lax.while_loop(going, lambda carry: _step(loop, carry), carry)


def _estimated(
    loop: _Loop, problem: Bilevel, carry: _Carry, alpha: PyTree, key: Array
) -> tuple[Estimate, PyTree]:
    """The step's estimate, certified where due and refined where not trusted."""

    def judged(found):
        estimate, state = found
        if loop.certify_every is not None:
            due = carry.index % loop.certify_every == 0
            estimate = _certified(loop, problem, due, estimate, alpha, key)
        return estimate, state

    inputs = problem, carry.estimator_state, alpha, key
    estimate, state = judged(loop.estimator.estimate(*inputs))
    if loop.on_untrusted != "refine":
        return estimate, state

    def again():
        finer, then = judged(loop.estimator.refine(problem, state, alpha, key))
        spent = {
            name: estimate.stats[name] + finer.stats[name]
            for name in finer.stats
            if name.startswith(LEDGER) or name == "inner_steps"
        }
        return _with_stats(finer, spent | {"refined": jnp.asarray(True)}), then

    as_it_is = lambda: (_with_stats(estimate, {"refined": jnp.asarray(False)}), state)
    return jax.lax.cond(estimate.stats["trusted"], as_it_is, again)


def _with_stats(estimate: Estimate, more: dict[str, Array]) -> Estimate:
    stats = estimate.stats | more
    return Estimate(estimate.value, estimate.hypergradient, estimate.w, stats)


def _certified(
    loop: _Loop,
    problem: Bilevel,
    due: Array,
    estimate: Estimate,
    alpha: PyTree,
    key: Array,
) -> Estimate:
    """The estimate with a certificate in its stats where one is due."""

    def look():
        data = drawn(problem, key)  # what the estimate saw
        found = certificate(problem, data, estimate.w, alpha, estimate.hypergradient)
        spent = {name: estimate.stats[name] + found.stats[name] for name in found.stats}
        said = {"distance_to_implicit": found.error_estimate}
        if loop.estimator.target == "argmin":
            said = {"error_estimate": found.error_estimate, "trusted": found.trusted}
        return estimate.stats | spent | said

    return _with_stats(estimate, jax.lax.cond(due, look, lambda: estimate.stats))


def _combined(
    combine: Any, value: Array, gradients: PyTree, state: PyTree
) -> tuple[PyTree, Array, Array, PyTree]:
    """``(sum_k weights_k g_k, weights, score, next state)`` of K gradients."""
    row = lambda x: jax.vmap(lambda y: dot(x, y))(gradients)
    weights, state = combine.weigh(value, jax.vmap(row)(gradients), state)
    total = lambda g: jnp.tensordot(jnp.asarray(weights, g.dtype), g, 1)
    score = getattr(combine, "score", lambda value: weights @ value)(value)
    gradient = jax.tree.map(total, gradients)
    return gradient, jnp.asarray(weights, float), score.astype(value.dtype), state


def _step(loop: _Loop, carry: _Carry) -> _Carry:
    key, estimate_key, metric_key = jax.random.split(carry.key, 3)
    to_alpha = lambda u: spaces.forward(loop.space, u)
    alpha, pullback = jax.vjp(to_alpha, carry.u)
    problem = loop.problem_at(carry.index)
    estimate, state = _estimated(loop, problem, carry, alpha, estimate_key)
    stats, score, combine_state = estimate.stats, estimate.value, carry.combine_state
    weighed = jnp.asarray(True)
    if loop.combine is None:
        (gradient,) = pullback(estimate.hypergradient)
    else:
        (gradients,) = jax.vmap(pullback)(estimate.hypergradient)
        gradient, weights, score, combine_state = _combined(
            loop.combine, estimate.value, gradients, combine_state
        )
        stats = stats | {"weights": weights}
        weighed = ~all_finite(gradients) | all_finite(weights)
    optimizer = optax.with_extra_args_support(loop.optimizer)
    updates, optimizer_state = optimizer.update(
        gradient, carry.optimizer_state, carry.u, value=score
    )
    u = spaces.project(loop.space, optax.apply_updates(carry.u, updates))
    if loop.project is not None:
        u = loop.project(u)

    untrusted = ~estimate.stats["trusted"]
    status = jnp.select(
        [
            ~all_finite(estimate.value),
            ~weighed,
            ~all_finite(gradient),
            untrusted & (loop.on_untrusted == "stop"),
            ~all_finite(u),
        ],
        [1, UNWEIGHED, 2, UNTRUSTED, 3],
        0,
    ).astype(carry.status.dtype)
    if loop.on_untrusted == "skip":
        u, optimizer_state, combine_state = optax.tree.where(
            untrusted,
            (carry.u, carry.optimizer_state, carry.combine_state),
            (u, optimizer_state, combine_state),
        )
    index = carry.index
    due = (index % loop.eval_every == 0) | (index == loop.num_steps - 1)
    metrics = {
        name: jax.lax.cond(
            due,
            lambda metric=metric: jnp.asarray(
                at_step(metric, index)(estimate.w, alpha, metric_key), dtype=float
            ),
            lambda: jnp.asarray(jnp.nan, dtype=float),
        )
        for name, metric in loop.metrics.items()
    }
    rows = jax.tree.map(
        lambda rows, row: rows.at[index].set(row),
        carry.rows,
        _Rows(estimate.value, stats, metrics),
    )
    better = (score < carry.best_value) | (not loop.compares)  # else the last is kept
    # A run whose estimate failed goes back to the last alpha that had a good one. It
    # ends there, so that what only a next step would read need not go back: a copy of
    # the estimator's state at every step would cost more than a step of SABA.
    failed = status > 0
    kept = lambda new, old: jax.tree.map(lambda x, y: jnp.where(failed, y, x), new, old)
    back = jax.tree.map(
        lambda u, good: jnp.where(status == 3, u, good), carry.u, carry.good_u
    )
    return _Carry(
        index=index + 1,
        status=status,
        u=kept(u, back),
        good_u=carry.u,
        w=kept(estimate.w, carry.w),
        best_value=jnp.where(better & ~failed, score, carry.best_value),
        best_alpha=optax.tree.where(better & ~failed, alpha, carry.best_alpha),
        combine_state=combine_state,
        optimizer_state=optimizer_state,
        estimator_state=state,
        key=key,
        rows=rows,
    )


@eqx.filter_jit
def _finish(loop: _Loop, carry: _Carry) -> Trace:
    rows, alpha = carry.rows, spaces.forward(loop.space, carry.u)
    return Trace(
        alpha,
        carry.w,
        carry.best_alpha,
        rows.value,
        rows.stats,
        rows.metrics,
        carry.status,
    )
