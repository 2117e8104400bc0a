"""Latency as a differentiable function of widths, interpolated between measurements."""

import itertools
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..number_checks import check_positive_int
from ..validation import is_traced


class LatencyTable(eqx.Module):
    """Seconds at the knots of a grid, with multilinear interpolation between them.

    A table is called with one width per axis. It is exact at the knots. Outside the
    grid the outermost pieces are continued, which may lead below zero: keep the widths
    within the knots by a space. The derivative at a knot is that of the piece above it.
    A table is a pytree of numbers: other measurements trace nothing.

    Args:
      knots: An increasing array ``[n_i]`` of at least two widths for each axis.
      seconds: Finite measurements, ``[n_1, ...]``.

    Raises:
      TypeError, ValueError: An argument is invalid.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> table = hg.objectives.LatencyTable(
    ...     (jnp.array([8.0, 16.0, 32.0]),), jnp.array([1.0, 2.0, 6.0])
    ... )
    >>> float(table(12.0)), float(jax.grad(table)(24.0))
    (1.5, 0.25)
    """

    knots: tuple[Float[Array, " n"], ...]
    seconds: Float[Array, "..."]

    def __check_init__(self):
        _check_knots(self.knots)
        shape = tuple(map(len, self.knots))
        if jnp.shape(self.seconds) != shape:
            raise ValueError(
                f"seconds must have shape {shape}, one number per knot; got "
                f"{jnp.shape(self.seconds)}."
            )
        if not is_traced(self.seconds) and not np.all(np.isfinite(self.seconds)):
            raise ValueError(f"seconds must be finite; got {self.seconds}.")

    @classmethod
    def measure(
        cls,
        make_fn: Callable[..., Callable[[], Any]],
        *widths: Sequence[float],
        num_repeats: int = 10,
    ) -> "LatencyTable":
        """Returns a table of the times of ``make_fn(width_1, ...)()`` on this machine.

        Args:
          make_fn: Function that takes one width per axis and returns the function of no
            arguments to be timed, jitted if desired, whose results are awaited. The
            call of ``make_fn`` itself, which may prepare inputs, is not timed.
          *widths: The knots of each axis.
          num_repeats: Number of timed calls at each knot, of which the median counts. A
            first call, which may compile, is not timed. Defaults to 10.

        Raises:
          TypeError, ValueError: An argument is invalid.

        >>> import jax, jax.numpy as jnp, hypergrad as hg
        >>> def make_layer(width):
        ...     layer, x = jax.jit(lambda x: x @ x.T), jnp.ones((4, width))
        ...     return lambda: layer(x)
        >>> table = hg.objectives.LatencyTable.measure(make_layer, [8, 64])
        >>> bool(table(20.0) > 0)
        True
        """
        check_positive_int("num_repeats", num_repeats)
        if not callable(make_fn):
            raise TypeError(
                "make_fn must be a function of widths that returns a function to be "
                f"timed; got {make_fn!r}."
            )
        if not widths:
            raise TypeError(
                "widths must hold the knots of at least one axis; got none."
            )

        knots = tuple(jnp.asarray(axis, float) for axis in widths)
        _check_knots(knots)

        def median_seconds(*knot):
            run = make_fn(*knot)
            jax.block_until_ready(run())
            times = []
            for _ in range(num_repeats):
                start_time = perf_counter()
                jax.block_until_ready(run())
                times.append(perf_counter() - start_time)
            return np.median(times)

        seconds = [median_seconds(*knot) for knot in itertools.product(*widths)]
        return cls(knots, jnp.array(seconds).reshape(tuple(map(len, widths))))

    def __call__(self, *widths: float | Array) -> Float[Array, ""]:
        """Returns the seconds at one width per axis; differentiable in them.

        Raises:
          ValueError: There is not one number per axis. Use `jax.vmap` for several
            points.
        """
        shapes = [jnp.shape(x) for x in widths]
        if shapes != [()] * len(self.knots):
            raise ValueError(
                f"widths must be {len(self.knots)} numbers, one per axis; got arrays "
                f"of shapes {shapes}. Use jax.vmap for several points."
            )
        value = jnp.asarray(self.seconds)
        for x, knots in zip(widths, self.knots, strict=True):
            x, knots = jnp.asarray(x), jnp.asarray(knots)
            x = x.astype(jnp.promote_types(x.dtype, knots.dtype))
            num_below = jnp.searchsorted(knots, x, side="right")
            i = jnp.clip(num_below - 1, 0, len(knots) - 2)
            t = (x - knots[i]) / (knots[i + 1] - knots[i])
            value = (1 - t) * value[i] + t * value[i + 1]
        return value.astype(jnp.result_type(1.0, *widths))


def _check_knots(all_knots: Any) -> None:
    """Raises an error unless there are increasing widths for each axis."""
    if not isinstance(all_knots, tuple) or not all_knots:
        raise TypeError(
            "knots must be a tuple with an array of widths for each axis, such as "
            f"(jnp.array([8.0, 16.0]),); got {all_knots!r}."
        )
    for knots in all_knots:
        if jnp.ndim(knots) != 1 or len(knots) < 2:
            raise ValueError(
                "knots must hold at least two widths for each axis; got shape "
                f"{jnp.shape(knots)}."
            )
        if is_traced(knots):
            continue
        if not (np.all(np.isfinite(knots)) and np.all(np.diff(knots) > 0)):
            raise ValueError(f"knots must be finite and increase; got {knots}.")
