"""The description of a task, and checks of the arguments that describe one."""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from ..inner.base import InnerSolver
from ..metrics import Metric, check_metrics
from ..number_checks import check_positive_int, float_converter, non_negative
from ..problem import Bilevel
from ..products import Loss
from ..validation import is_traced


class Task(eqx.Module):
    """A bilevel problem with real data, starting points and exact metrics.

    Attributes:
      paradigm: Learning paradigm, such as 'supervised'.
      problem: The two losses and their data.
      solver: Inner solver.
      w: Inner starting point.
      alpha: Starting point of the hyperparameters.
      space: Set of admissible values of ``alpha``.
      metrics: Exact metrics ``{name: fn(w, alpha, key) -> scalar}``. No name is that of
        a column of a trace.
      splits: ``{name of a split: its examples}``, for tables and for methods that do
        not train on ``problem.inner_data``, such as training on the validation examples
        only; None if the task offers none.
      exact: ``alpha -> hypergradient`` in closed form, or None if none is known. It is
        a `jax.tree_util.Partial`, whose data are leaves of the task.
    """

    paradigm: str = eqx.field(static=True)
    problem: Bilevel
    solver: InnerSolver
    w: PyTree
    alpha: PyTree
    space: PyTree
    metrics: dict[str, Metric]
    splits: PyTree = None
    exact: Callable[[PyTree], PyTree] | None = None

    def __check_init__(self):
        check_metrics(self.metrics)

    def metric_values(self, w: PyTree, alpha: PyTree, key: Array) -> dict[str, Array]:
        """Returns the value of every metric at one point."""
        return {name: metric(w, alpha, key) for name, metric in self.metrics.items()}


def loss_metric(loss: Loss, batch: PyTree) -> Metric:
    """Returns the loss on a batch as a metric.

    Equal losses make one function, so that JAX traces it once. The batch is data.
    """
    return jax.tree_util.Partial(_bind_loss(loss), batch)


@functools.cache
def _bind_loss(loss: Loss) -> Callable[..., Array]:
    return functools.partial(_evaluate_loss, loss)


def _evaluate_loss(
    loss: Loss, batch: PyTree, w: PyTree, alpha: PyTree, key: Array
) -> Array:
    del key
    return loss(w, alpha, batch)


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Checks an argument that takes one of a few values.

    Raises:
      ValueError: ``value`` is not one of ``choices``.
    """
    try:
        is_choice = value in choices
    except (TypeError, ValueError):  # not hashable, or an array
        is_choice = False
    if not is_choice:
        allowed = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {allowed}; got {value!r}.")


def check_booleans(**values: Any) -> None:
    """Checks arguments that are True or False, which may be traced.

    Raises:
      TypeError: A value is neither a bool nor a boolean scalar.
    """
    for name, value in values.items():
        dtype = getattr(value, "dtype", None)
        is_boolean = isinstance(value, bool) or dtype == np.bool_
        if not is_boolean or np.shape(value) != ():
            raise TypeError(f"{name} must be True or False; got {value!r}.")


def check_counts(**counts: Any) -> None:
    """Checks numbers of examples, tasks or units, which determine shapes.

    Raises:
      ValueError: A number is not an integer of at least 1.
    """
    for name, count in counts.items():
        check_positive_int(name, count)


def check_sequences(**sequences: Any) -> None:
    """Checks sequences of counts, for example the sizes of layers.

    Raises:
      TypeError: A value is not a sequence.
      ValueError: A number in it is not an integer of at least 1.
    """
    for name, counts in sequences.items():
        if not isinstance(counts, Sequence):
            raise TypeError(
                f"{name} must be a sequence of integers, such as (20, 10); got "
                f"{counts!r}."
            )
        for count in counts:
            check_positive_int(name, count)


def check_finite(**values: Any) -> None:
    """Checks real numbers, unless they are traced.

    Raises:
      TypeError: A value is not a number.
      ValueError: A number is NaN or infinite, or an array is not a scalar.
    """
    for name, value in values.items():
        number = float_converter(name, optional=False)(value)
        is_finite = is_traced(number) or np.isfinite(number)
        if np.shape(number) != () or not is_finite:
            raise ValueError(f"{name} must be a finite number; got {value!r}.")


def check_at_least_zero(**values: Any) -> None:
    """Checks penalties, step sizes and deviations, unless they are traced.

    Raises:
      TypeError: A value is not a number.
      ValueError: A number is negative, NaN or infinite, or an array is not a scalar.
    """
    check_finite(**values)
    for name, value in values.items():
        non_negative(name)(value)


def as_coefficient(value: Any, dtype: Any) -> Array:
    """Returns a penalty or price in the dtype of the data, but at least in float32.

    A small coefficient would be 0 in float16.
    """
    return jnp.asarray(value, jnp.promote_types(dtype, jnp.float32))


def frozen_array(values: Any) -> np.ndarray:
    """Returns an array that cannot be written to, which callers may therefore share."""
    array = np.array(values)
    array.flags.writeable = False
    return array


def as_sizes(sizes: Sequence[int] | None, default: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the argument ``sizes`` of a task as a tuple; None stands for ``default``.

    Raises:
      TypeError: The sizes are not a sequence.
      ValueError: There are more or fewer sizes than in ``default``, or one of them is
        not an integer of at least 1.
    """
    if sizes is None:
        return default
    check_sequences(sizes=sizes)
    if len(sizes) != len(default):
        raise ValueError(
            f"sizes must have {len(default)} entries, such as {default}; got {sizes}."
        )
    return tuple(sizes)


def has_held_out(hold_out: Any, num_held_out: int, num_val: int) -> bool:
    """Returns False if ``hold_out`` is False, and True if it is True or traced.

    With a traced ``hold_out``, a task either has no metrics of held-out examples, or
    its docstring states their value if ``hold_out`` is False.

    Args:
      hold_out: Argument of ``make``.
      num_held_out: Number of validation examples that are held out if it is True.
      num_val: Number of validation examples.

    Raises:
      ValueError: Either all validation examples or none would be held out, so that the
        mean of the outer loss or of a metric would be NaN.
    """
    if not (is_traced(hold_out) or hold_out):
        return False
    if not 0 < num_held_out < num_val:
        raise ValueError(
            "hold_out needs validation examples in the outer loss and out of it; got "
            f"{num_held_out} held out of {num_val}. Pass larger sizes."
        )
    return True


def sizes_of(name: str, defaults: dict[str, Any], sizes: dict[str, Any]) -> dict:
    """Returns the default sizes of a task, updated with the sizes of the caller.

    Args:
      name: Name of the task.
      defaults: Default sizes: counts, tuples of counts, and floating-point numbers of
        at least 0.
      sizes: Sizes passed to ``make``.

    Raises:
      TypeError: A size has a name that is not in ``defaults``, or another type than the
        default.
      ValueError: A count is not an integer of at least 1, or another number is negative
        or not finite.
    """
    if unknown := set(sizes) - set(defaults):
        raise TypeError(
            f"sizes of {name}.make must be among {', '.join(defaults)}; got "
            f"{', '.join(sorted(unknown))}."
        )
    checks = {float: check_at_least_zero, tuple: check_sequences, int: check_counts}
    for size_name, size in sizes.items():
        checks[type(defaults[size_name])](**{size_name: size})
    to_number = lambda size: (
        float(size) if hasattr(size, "dtype") and not is_traced(size) else size
    )
    numbers = {
        name: to_number(size) if isinstance(defaults[name], float) else size
        for name, size in sizes.items()
    }
    return defaults | numbers
