"""The choice of what the reverse pass through an inner run stores."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jax.extend.core import Jaxpr, Literal  # pyright: ignore
from jaxtyping import Array, PyTree

from ..batches import Data
from ..products import Loss, with_mixed_mode
from ..trees import is_key
from ..validation import KEY_SHAPE
from .base import IterativeSolver
from .descent import has_segments, segment_length, store_carries


class Storage(NamedTuple):
    """The storage of the reverse pass through a run.

    Attributes:
      checkpoint: Whether carries are stored in two levels of ``sqrt(T)``, and the steps
        between them are repeated.
      mixed_mode: Whether a step stores its carry instead of all values that its reverse
        pass needs.
      num_bytes: Number of bytes, without the data and other values that all steps
        share.
    """

    checkpoint: bool
    mixed_mode: bool
    num_bytes: int


class StepSizes:
    """Bytes that the reverse pass stores of one step, each measured when it is used.

    The step is traced and not run.

    Args:
      solver, inner_loss, w, alpha, data: The solver and the arguments of its ``init``.
      before_step: ``(w, key, x) -> w``, applied before each step. Defaults to none.
      x: Its last argument, by which a run is differentiated besides ``alpha``.
    """

    def __init__(
        self,
        solver: IterativeSolver,
        inner_loss: Loss,
        w: PyTree,
        alpha: PyTree,
        data: Data,
        before_step: Callable[[PyTree, Array, PyTree], PyTree] | None = None,
        x: PyTree = (),
    ):
        self._solver, self._inner_loss = solver, inner_loss
        self._data, self._before_step = data, before_step
        self._inputs = alpha, x
        self._carry = jax.eval_shape(
            lambda w, alpha, key: solver.init(inner_loss, w, alpha, data, key),
            w,
            alpha,
            KEY_SHAPE,
        )

    @property
    def carry(self) -> int:
        """Bytes of the carry and the key."""
        return shapes_bytes((self._carry, KEY_SHAPE))

    @functools.cached_property
    def all_values(self) -> int:
        """Bytes of all values that reverse mode needs."""
        return stored_bytes(
            self._make_step(self._inner_loss), self._carry, self._inputs
        )

    @functools.cached_property
    def mixed_mode(self) -> int | None:
        """Bytes in mixed mode, or None if the solver does not allow it.

        Mixed mode needs a step that uses gradients of the inner loss and no forward
        derivatives of it.
        """
        loss_calls: list[bool] = []
        mixed_loss = with_mixed_mode(self._inner_loss)

        def recorded_loss(w: PyTree, alpha: PyTree, batch: PyTree) -> Any:
            loss_calls.append(True)
            return mixed_loss(w, alpha, batch)

        step = store_carries(self._make_step(recorded_loss))
        try:
            step_bytes = stored_bytes(step, self._carry, self._inputs)
        except TypeError:  # A forward derivative of the loss.
            return None
        return step_bytes if loss_calls else None

    def _make_step(self, loss: Loss) -> Callable[[PyTree, PyTree, Array], PyTree]:
        def step(carry: PyTree, inputs: PyTree, key: Array) -> PyTree:
            alpha, x = inputs
            if self._before_step is not None:
                w, state = carry
                carry = self._before_step(w, key, x), state
            return self._solver.step(loss, carry, alpha, self._data, key)

        return step


def choose_storage(
    sizes: StepSizes, num_steps: int, checkpoint: bool | None, max_bytes: float
) -> Storage:
    """Returns the storage with the fewest operations in at most ``max_bytes``.

    In a typical step the reverse pass costs one gradient with all values stored, and
    one and a half in mixed mode; checkpoints cost one more. If nothing else is small
    enough, checkpoints are chosen.

    Args:
      sizes: Bytes of one step.
      num_steps: Number of differentiated steps.
      checkpoint: True for checkpoints and False for all values, whatever their size.
        None for a choice.
      max_bytes: Largest number of bytes.
    """
    if not checkpoint:
        num_bytes = num_steps * sizes.all_values
        if checkpoint is False or num_bytes <= max_bytes:
            return Storage(False, False, num_bytes)
    is_mixed = sizes.mixed_mode is not None
    step_bytes = sizes.all_values if sizes.mixed_mode is None else sizes.mixed_mode
    all_carries = Storage(False, is_mixed, num_steps * step_bytes)
    segments = all_carries
    if has_segments(num_steps):
        length = segment_length(num_steps)
        num_segments = math.ceil(num_steps / length)
        num_bytes = num_segments * sizes.carry + length * step_bytes
        segments = Storage(True, is_mixed, num_bytes)
    if checkpoint or all_carries.num_bytes > max_bytes:
        return segments
    return all_carries


def stored_bytes(
    step: Callable[[PyTree, PyTree, Array], PyTree], carry: PyTree, inputs: PyTree
) -> int:
    """Returns the bytes that the reverse pass through a scan stores of each step.

    The step ``(carry, inputs, key) -> carry`` is differentiated by ``inputs`` as well.
    Values that depend neither on the carry nor on the key are the same in all steps. A
    scan stores them once, and they are not counted.
    """

    def stored_values(carry: PyTree, key: Array) -> list[Array]:
        floats, non_floats = eqx.partition(carry, eqx.is_inexact_array)

        def differentiable_step(floats: PyTree, inputs: PyTree) -> PyTree:
            new_carry = step(eqx.combine(floats, non_floats), inputs, key)
            return eqx.filter(new_carry, eqx.is_inexact_array)

        return jax.tree.leaves(jax.vjp(differentiable_step, floats, inputs)[1])

    jaxpr = jax.make_jaxpr(stored_values)(carry, KEY_SHAPE).jaxpr
    return shapes_bytes([x.aval for x in _varying_outputs(jaxpr)])


def _varying_outputs(jaxpr: Jaxpr) -> set[Any]:
    """Returns the outputs of a jaxpr that depend on an input."""
    varying = set(jaxpr.invars)
    is_varying = lambda x: not isinstance(x, Literal) and x in varying
    for equation in jaxpr.eqns:
        if any(map(is_varying, equation.invars)):
            varying.update(equation.outvars)
    return set(filter(is_varying, jaxpr.outvars))


def shapes_bytes(shapes: PyTree) -> int:
    """Returns the bytes of arrays with these shapes and dtypes.

    A PRNG key counts as its key data.
    """
    as_data = lambda x: jax.random.key_data(x) if is_key(x) else x
    to_struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    shapes = jax.tree.map(to_struct, jax.tree.leaves(shapes))
    data = jax.eval_shape(lambda leaves: list(map(as_data, leaves)), shapes)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in data)
