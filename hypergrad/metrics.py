"""What is measured along a run, and who is told: functions of the user's."""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .checks import KEY, raise_with
from .estimators.protocol import STATS

Metric = Callable[[PyTree, PyTree, Array], Array]
Progress = Callable[[int, Any], None]

# By a trace's rows.
TAKEN = {"step", "value", "cost", "trusted", "refined", "weights", *STATS}


def check_metrics(
    metrics: Any, w: PyTree = None, alpha: PyTree = None
) -> dict[str, Metric]:
    """``{name: function}``; the functions return scalars where inputs are given."""
    if metrics is None:
        return {}
    if not isinstance(metrics, dict):
        raise TypeError(
            "metrics must be a dict {name: fn(w, alpha, key) -> scalar}; got "
            f"{type(metrics).__name__}"
        )
    for name, metric in metrics.items():
        if not isinstance(name, str):
            raise TypeError(f"metrics must have names that are text; got {name!r}")
        if name in TAKEN:
            raise ValueError(
                f"metrics cannot be called {name!r}: a trace's rows have that already"
            )
        if not callable(metric):
            raise TypeError(f"metrics[{name!r}] must be a function; got {metric!r}")
        _check_arguments(name, metric)
        if w is not None:
            try:
                shape = jnp.shape(eqx.filter_eval_shape(metric, w, alpha, KEY))
            except Exception as error:
                raise_with(
                    error,
                    f"metrics[{name!r}] failed; it is called as fn(w, alpha, key) -> "
                    "scalar, with a PRNG key and no batch; arrays that it reads are "
                    "passed by jax.tree_util.Partial(fn, arrays)",
                )
            if shape != ():
                raise ValueError(
                    f"metrics[{name!r}] must return a scalar, got shape {shape}"
                )
    return dict(metrics)


def _check_arguments(name: str, metric: Callable) -> None:
    """Refuses a function of other than three arguments, where it says so."""
    try:
        signature = inspect.signature(metric)
    except ValueError:  # of a builtin, which has none
        return
    try:
        signature.bind("w", "alpha", "key")
    except TypeError:
        raise TypeError(
            f"metrics[{name!r}] is called as fn(w, alpha, key), but takes {signature}"
        ) from None


def at_step(metric: Metric, step: Array) -> Metric:
    """A metric that changes along a run says by ``at_step(step)`` what it is then."""
    of_step = getattr(metric, "at_step", None)
    return metric if of_step is None else of_step(step)


def check_progress(progress: Any) -> None:
    """Refuses what cannot be called."""
    if not (progress is None or callable(progress)):
        raise TypeError(f"progress must be a function; got {type(progress).__name__}")
