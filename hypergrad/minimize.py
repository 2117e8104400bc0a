"""`minimize`, the outer loop by gradients in one call."""

import optax
from jaxtyping import Array, PyTree

from .checkpoint import Checkpoints
from .estimators.base import Estimator
from .metrics import Metric
from .outer_loop.checks import check_run_options, check_state_fits
from .outer_loop.loop import OuterLoop
from .outer_loop.step import OuterState
from .problem import Bilevel
from .progress import Progress
from .trace import Trace


def minimize(  # noqa: PLR0913 - the first five have a fixed order
    problem: Bilevel,
    estimator: Estimator,
    optimizer: optax.GradientTransformation,
    w: PyTree,
    alpha: PyTree,
    *,
    num_steps: int | None = None,
    budget: float | None = None,
    key: Array | None = None,
    state: OuterState | None = None,
    space: PyTree = None,
    metrics: dict[str, Metric] | None = None,
    progress: Progress | None = None,
    checkpoints: Checkpoints | None = None,
    record_every: int = 1,
) -> Trace:
    """Moves ``alpha`` along hypergradients and returns the record of the run.

    The function makes an `OuterLoop` and calls `OuterLoop.run`. Use `OuterLoop` itself
    for several outer losses, certificates, untrusted estimates, and limits.

    With ``num_steps``, and without ``progress`` and ``checkpoints``, the function can
    be jitted and vmapped. Losses are traced a constant number of times, and a second
    run with the same functions, settings and shapes compiles nothing, for any number
    of steps. Leave `jax.debug_nans` off: rows and statistics that do not apply are NaN.

    Args:
      problem, estimator, optimizer, space, metrics: As in `OuterLoop`.
      w, alpha: Starting point; pytrees of floating-point arrays. Keys and counters in
        ``w`` are constants.
      num_steps, budget, progress, checkpoints, record_every: As in `OuterLoop.run`.
      key: PRNG key. Defaults to ``jax.random.key(0)``.
      state: ``trace.state`` of an earlier run with the same arguments, which this run
        continues: both runs together make the steps of one longer run, to the bit.
        ``w`` and ``alpha`` must be structured like the earlier ones and are not used.

    Returns:
      A `Trace` with a row per step, or per ``record_every`` steps.

    Cost: one estimate per step, in ``trace.cost``.
    Memory: that of one estimate, and a row of scalars per step.

    Raises:
      TypeError, ValueError: An argument is invalid; raised before anything is compiled,
        except for a folder of checkpoints that belongs to another or a longer run.
      ImportError: ``progress`` is True and rich is not installed.

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: jnp.sum((w - 1.0) ** 2)
    >>> run = lambda **settings: hg.minimize(
    ...     hg.Bilevel(inner, outer), hg.Implicit(hg.Newton()), optax.sgd(0.25),
    ...     0.0, 3.0, **settings,
    ... )
    >>> trace = run(num_steps=30)
    >>> round(float(trace.alpha), 4), trace.status
    (1.0, 'completed')
    >>> first = run(num_steps=10)
    >>> bool(run(num_steps=20, state=first.state).alpha == trace.alpha)
    True
    """
    loop = OuterLoop(problem, estimator, optimizer, space=space, metrics=metrics)
    check_run_options(loop, num_steps, budget, progress, checkpoints, record_every)
    if state is None:
        state = loop.init(w, alpha, key)
    else:
        if key is not None:
            raise ValueError(
                "key must not be given together with state, which has one."
            )
        check_state_fits(state, w, alpha)
    return loop.run(
        state,
        num_steps=num_steps,
        budget=budget,
        progress=progress,
        checkpoints=checkpoints,
        record_every=record_every,
    )
