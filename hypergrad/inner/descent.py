"""Descent by optax transformations, and the loop of all iterative solvers."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from ..batches import Data, at_draw, batch_fraction, is_in_passes, sample_batch
from ..number_checks import check_positive_int
from ..products import MIXED_MODE_GRAD, Loss, with_mixed_mode
from ..runtime.all_cores import loss_on_all_cores
from ..runtime.equal_optimizers import first_equal
from ..trees import cast_like, widen
from ..validation import check_hashable, check_not_optax_factory
from .base import InnerStats, inner_stats

Optimizer = optax.GradientTransformation | Callable[[PyTree], Any]

LINE_SEARCH_STATES = (
    optax.ScaleByZoomLinesearchState,
    optax.ScaleByBacktrackingLinesearchState,
)
NON_DIFFERENTIABLE_STATES = (*LINE_SEARCH_STATES, optax.ScaleByLBFGSState)


class Descent(eqx.Module):
    """``num_steps`` steps of an optax optimizer on the inner loss.

    If the data is `Batches` with a batch size, each step samples its own batch.

    Args:
      optimizer: Optax transformation, or a function ``alpha -> transformation``, so
        that learning rates and whole schedules can be hyperparameters.
      num_steps: T, the number of steps, a static integer.

    Cost:
      T gradients, where mini-batches count in proportion. The evaluations of an
      optimizer with a line search are not counted; `LBFGS` counts its own.
    Memory: ``w`` and the state of the optimizer.
    Bias: the error of the inner solution after T steps.

    Raises:
      TypeError: ``optimizer`` is neither a transformation nor a hashable function.
      ValueError: ``num_steps`` is not an integer of at least 0.

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> loss = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    >>> solver = hg.Descent(optax.sgd(0.5), num_steps=50)
    >>> w, _ = solver.solve(loss, jnp.zeros(2), jnp.ones(2), None, jax.random.key(0))
    >>> bool(jnp.allclose(w, 1.0))
    True
    """

    optimizer: Optimizer = eqx.field(static=True, converter=first_equal)
    num_steps: int = eqx.field(static=True)

    citations = ("deepmind2020jax",)

    def __check_init__(self):
        if not isinstance(self.optimizer, optax.GradientTransformation):
            self._check_optimizer_fn()
        check_positive_int("num_steps", self.num_steps, minimum=0)

    def _check_optimizer_fn(self) -> None:
        """Raises TypeError unless ``optimizer`` may be a function of ``alpha``."""
        check_not_optax_factory("optimizer", self.optimizer)
        if not callable(self.optimizer):
            remedy = ""
            if isinstance(self.num_steps, optax.GradientTransformation):
                remedy = " It comes before num_steps."
            raise TypeError(
                "optimizer must be an optax.GradientTransformation such as "
                "optax.sgd(0.1), or a function of alpha that returns one; got "
                f"{type(self.optimizer).__name__}.{remedy}"
            )
        check_hashable("optimizer", self.optimizer)

    @property
    def differentiable(self) -> bool:
        """False for optax transformations with a line search, and for L-BFGS."""
        if not isinstance(self.optimizer, optax.GradientTransformation):
            return True
        try:
            state = jax.eval_shape(self.optimizer.init, jnp.zeros(()))
        except Exception:  # The transformation has a mask that only fits the user's w.
            return True
        return not contains_state(state, NON_DIFFERENTIABLE_STATES)

    def _transformation(self, alpha: PyTree) -> optax.GradientTransformationExtraArgs:
        optimizer = self.optimizer
        if not isinstance(optimizer, optax.GradientTransformation):
            optimizer = optimizer(alpha)
            if not isinstance(optimizer, optax.GradientTransformation):
                raise TypeError(
                    "optimizer(alpha) must return an optax.GradientTransformation; got "
                    f"{type(optimizer).__name__}."
                )
        return optax.with_extra_args_support(optimizer)

    def init(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, PyTree]:
        """Returns ``w`` and the first state of the optimizer."""
        del inner_loss, data, key
        return w, self._transformation(alpha).init(w)

    def step(
        self,
        inner_loss: Loss,
        carry: tuple[PyTree, PyTree],
        alpha: PyTree,
        data: Data,
        key: Array,
    ) -> tuple[PyTree, PyTree]:
        """Returns the carry after one update on a batch sampled with ``key``."""
        w, state = carry
        batch = sample_batch(data, key)
        loss = loss_on_all_cores(inner_loss)
        value_fn = lambda w: loss(w, alpha, batch)
        value, grad = jax.value_and_grad(value_fn)(w)
        updates, state = self._transformation(alpha).update(
            grad, state, w, value=value, grad=grad, value_fn=value_fn
        )
        # A hyperparameter of a wider dtype than w widens the state that it mixes.
        return cast_like((optax.apply_updates(w, updates), state), carry)

    def solve(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, InnerStats]:
        """Returns ``w`` after all steps and its cost."""
        w, _ = run_inner_steps(self, inner_loss, w, alpha, data, key)
        num_grads = self.num_steps * batch_fraction(data)
        return w, inner_stats(self.num_steps, num_grads=num_grads)


def contains_state(state: PyTree, kinds: tuple[type, ...]) -> bool:
    """Returns True if an optax state, or a state within it, is one of ``kinds``."""
    is_match = lambda node: isinstance(node, kinds)
    return any(map(is_match, jax.tree.leaves(state, is_leaf=is_match)))


def run_inner_steps(
    solver: Any,
    inner_loss: Loss,
    w: PyTree,
    alpha: PyTree,
    data: Data,
    key: Array,
    *,
    truncation_length: int | None = None,
    halves: tuple[PyTree, PyTree] | None = None,
    checkpoint: bool = False,
    mixed_mode: bool = False,
    before_step: Callable[[PyTree, Array], PyTree] | None = None,
) -> tuple[PyTree, PyTree]:
    """Returns the carry after all steps of an iterative solver.

    Args:
      solver: An `IterativeSolver`.
      inner_loss, w, alpha, data, key: As for its ``solve``.
      truncation_length: K, the number of last steps that derivatives pass through.
        Defaults to all of them.
      halves: Two copies of ``alpha`` for the older and the newer half of the last K
        steps, so that the derivatives with respect to the halves can be told apart. If
        K is odd, the step between the halves uses ``alpha``.
      checkpoint: Whether the reverse pass stores two levels of ``sqrt(T)`` carries
        instead of the intermediate values of every step, and repeats the steps.
      mixed_mode: Whether the reverse pass goes through the gradients of the inner loss
        by `with_mixed_mode`, and stores of a step its carry and, if the optimizer is
        not linear in the gradient, the gradient.
      before_step: ``(w, key) -> w``, applied to ``w`` before each step with its key.
    """
    num_steps = solver.num_steps
    init_key, steps_key = jax.random.split(key)
    keys = jax.random.split(steps_key, num_steps)
    # Shuffled passes need the number of a step as well.
    numbers = jnp.arange(num_steps) if is_in_passes(data) else None
    carry = solver.init(inner_loss, w, alpha, data, init_key)

    def run(alpha, carry, num_before, stop, mixed_mode=mixed_mode):
        wide_alpha = widen(alpha)
        loss = with_mixed_mode(inner_loss) if mixed_mode else inner_loss

        def step(carry, key_and_number):
            key, number = key_and_number
            # The cast is a part of the step: the terms of all steps are summed wide.
            step_alpha = cast_like(wide_alpha, alpha)
            step_data = at_draw(data, steps_key, number, num_steps, stream="w")
            if before_step is not None:
                w, state = carry
                carry = before_step(w, key), state
            return solver.step(loss, carry, step_alpha, step_data, key), None

        if mixed_mode:
            step = store_carries(step)
        steps = jax.tree.map(lambda x: x[num_before:stop], (keys, numbers))
        return _scan(step, carry, steps, stop - num_before, checkpoint)

    if truncation_length is None or truncation_length >= num_steps:
        return run(alpha, carry, 0, num_steps)
    num_done = num_steps - truncation_length
    constant_alpha = jax.lax.stop_gradient(alpha)
    carry = run(constant_alpha, carry, 0, num_done, mixed_mode=False)
    carry = jax.lax.stop_gradient(carry)
    if halves is None:
        return run(alpha, carry, num_done, num_steps)
    older_alpha, newer_alpha = halves
    alphas = (older_alpha, alpha, newer_alpha)
    lengths = split_steps(truncation_length)
    for part_alpha, length in zip(alphas, lengths, strict=True):
        carry = run(part_alpha, carry, num_done, num_done + length)
        num_done += length
    return carry


def store_carries(step: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the step of a scan, of which the reverse pass stores only arguments.

    It also stores the gradients of `with_mixed_mode` where it needs them. Whatever else
    it needs, such as the batch, it computes anew.
    """
    policy = jax.checkpoint_policies.save_only_these_names(MIXED_MODE_GRAD)
    return jax.checkpoint(step, prevent_cse=False, policy=policy)


def split_steps(num_steps: int) -> tuple[int, int, int]:
    """Returns the numbers of steps in the older half, between, in the newer half."""
    return num_steps // 2, num_steps % 2, num_steps // 2


def has_segments(num_steps: int) -> bool:
    """Returns True if a run has enough steps for segments; fewer are all stored."""
    return num_steps >= 4


def segment_length(num_steps: int) -> int:
    """Returns the number of steps of a segment, the integer part of ``sqrt(T)``."""
    return math.isqrt(num_steps)


def _scan(
    step: Callable[[PyTree, PyTree], tuple[PyTree, None]],
    carry: PyTree,
    xs: PyTree,
    num_steps: int,
    checkpoint: bool,
) -> PyTree:
    """Returns the last carry of ``lax.scan`` over ``xs``, run in segments if asked."""
    scan = lambda carry, xs: jax.lax.scan(step, carry, xs)[0]
    if not (checkpoint and has_segments(num_steps)):
        return scan(carry, xs)
    # The reverse pass keeps a carry per segment, and one per step of one segment.
    length = segment_length(num_steps)
    num_in_segments = num_steps - num_steps % length
    run_segment = jax.checkpoint(scan)
    segments = jax.tree.map(lambda x: x[:num_in_segments].reshape(-1, length), xs)
    body_fun = lambda carry, xs: (run_segment(carry, xs), None)
    carry, _ = jax.lax.scan(body_fun, carry, segments)
    remaining = jax.tree.map(lambda x: x[num_in_segments:], xs)
    return run_segment(carry, remaining) if num_in_segments < num_steps else carry


def piecewise_constant_schedule(
    values: Float[Array, " windows"], num_steps: int
) -> Callable[[Array], Array]:
    """Returns the optax schedule ``values[count * len(values) // num_steps]``.

    `Forward` then carries one derivative per window instead of one per step, and a
    derivative that is summed over a window has less variance than that of one step.

    Args:
      values: One value for each of W windows of equal length, shape ``[W]``.
      num_steps: T, the number of steps of the run; later steps use the last value.

    Raises:
      ValueError: ``values`` is not a vector, or ``num_steps`` not a positive integer.

    Source: Micaelli & Storkey 2021, arXiv:2007.07869.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> values = jnp.array([0.1, 0.2])
    >>> schedule = hg.piecewise_constant_schedule(values, num_steps=6)
    >>> tuple(round(float(schedule(count)), 2) for count in (0, 2, 3, 5, 9))
    (0.1, 0.1, 0.2, 0.2, 0.2)
    """
    values = jnp.asarray(values)
    if values.ndim != 1:
        raise ValueError(
            "values must be a vector with one value per window; got shape "
            f"{values.shape}."
        )
    check_positive_int("num_steps", num_steps)
    num_windows = values.size

    # The steps at which the windows after the first one start: ceil(i T / W).
    starts = -(-np.arange(1, num_windows, dtype=np.int64) * num_steps // num_windows)
    overflows = num_windows * num_steps >= 2**31  # counts of optax are 32-bit integers

    def schedule(count: Array) -> Array:
        if overflows:
            window = jnp.searchsorted(jnp.asarray(starts), count, side="right")
        else:
            # Counts above T, whose product would overflow, have the last value.
            window = jnp.minimum(count, num_steps) * num_windows // num_steps
        return values[jnp.minimum(window, num_windows - 1)]

    return schedule
