"""Validation of user-supplied metrics."""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .estimators.base import STATS
from .validation import KEY_SHAPE, raise_with_context

Metric = Callable[[PyTree, PyTree, Array], Array]

#: Columns of a trace's rows, which a metric may not replace.
RESERVED_NAMES = {
    "step",
    "value",
    "cost",
    "trusted",
    "refined",
    "objective_weights",
    *STATS,
}


def check_metrics(
    metrics: Any, w: PyTree = None, alpha: PyTree = None
) -> dict[str, Metric]:
    """Returns the metrics as a dictionary; None becomes an empty one.

    Args:
      metrics: ``{name: fn(w, alpha, key) -> scalar}``, or None.
      w, alpha: If given, each metric is evaluated on their shapes.

    Raises:
      TypeError: ``metrics`` is not a dictionary of functions of three arguments.
      ValueError: A name is reserved, or a metric does not return a scalar.
    """
    if metrics is None:
        return {}
    if not isinstance(metrics, dict):
        raise TypeError(
            "metrics must be a dict {name: fn(w, alpha, key) -> scalar}; got "
            f"{type(metrics).__name__}."
        )
    for name, metric in metrics.items():
        if not isinstance(name, str):
            raise TypeError(f"metrics must have strings as names; got {name!r}.")
        if name in RESERVED_NAMES:
            raise ValueError(
                f"metrics must not use the name {name!r}, which is a column of the "
                "trace. Choose another name."
            )
        if not callable(metric):
            raise TypeError(f"metrics[{name!r}] must be a function; got {metric!r}.")
        _check_signature(name, metric)
        if w is not None:
            _check_returns_scalar(name, metric, w, alpha)
    return dict(metrics)


def _check_signature(name: str, metric: Callable) -> None:
    """Raises TypeError unless the function accepts three positional arguments."""
    try:
        signature = inspect.signature(metric)
    except ValueError:  # a builtin may have no signature
        return
    try:
        signature.bind("w", "alpha", "key")
    except TypeError:
        raise TypeError(
            f"metrics[{name!r}] must take the arguments (w, alpha, key); got "
            f"{signature}."
        ) from None


def _check_returns_scalar(name: str, metric: Any, w: PyTree, alpha: PyTree) -> None:
    """Raises ValueError unless the metric returns a scalar for these shapes."""
    try:
        result = eqx.filter_eval_shape(metric, w, alpha, KEY_SHAPE)
    except Exception as error:
        raise_with_context(
            error,
            f"metrics[{name!r}] failed. It is called as fn(w, alpha, key) -> scalar "
            "with a PRNG key and without a batch; pass arrays that it reads with "
            "jax.tree_util.Partial(fn, arrays).",
        )
    is_number = eqx.is_array_like(result) or isinstance(result, jax.ShapeDtypeStruct)
    if not is_number or jnp.shape(result) != ():
        got = f"shape {jnp.shape(result)}" if is_number else type(result).__name__
        raise ValueError(f"metrics[{name!r}] must return a scalar; got {got}.")
    if jnp.issubdtype(jnp.result_type(result), jnp.complexfloating):
        raise ValueError(
            f"metrics[{name!r}] must return a real number; got "
            f"{jnp.result_type(result)}. Return its absolute value or real part."
        )


def metric_at_step(metric: Metric, step: Array) -> Metric:
    """Returns the metric of a step: ``metric.at_step(step)`` if it has that method."""
    at_step = getattr(metric, "at_step", None)
    return metric if at_step is None else at_step(step)
