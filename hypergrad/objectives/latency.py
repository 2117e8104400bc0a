"""Latency: measured at a few widths, a differentiable function between them."""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..validation import check_positive_int, is_traced


class LatencyTable(eqx.Module):
    """Seconds at the knots of a grid, linear in one width, bilinear in two, between.

    Called with as many widths as there are axes. Exact at the knots; beyond the first
    and the last the outermost pieces go on, which may lead below zero: keep the widths
    within them, by a space. At a knot the slope is that of the piece above it.

    Args:
      knots: one rising array ``[n_i]`` of widths an axis, at least two each; one axis
        or several.
      seconds: ``[n_1, ...]``, finite.

    A pytree of numbers: it can be stored, and other measurements trace nothing.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> table = hg.objectives.LatencyTable(
    ...     (jnp.array([8.0, 16.0, 32.0]),), jnp.array([1.0, 2.0, 6.0])
    ... )
    >>> float(table(12.0)), float(jax.grad(table)(24.0))
    (1.5, 0.25)
    """

    knots: tuple[Array, ...]
    seconds: Array

    def __check_init__(self):
        if not isinstance(self.knots, tuple) or not self.knots:
            raise TypeError(
                "knots must be a tuple with an array of widths for each axis, such as "
                f"(jnp.array([8.0, 16.0]),); got {self.knots!r}"
            )
        for knots in self.knots:
            if jnp.ndim(knots) != 1 or len(knots) < 2:
                raise ValueError(
                    "knots of an axis must be at least two widths; got shape "
                    f"{jnp.shape(knots)}"
                )
            if not is_traced(knots) and not np.all(np.diff(knots) > 0):
                raise ValueError(f"knots must rise; got {knots}")
        shape = tuple(map(len, self.knots))
        if jnp.shape(self.seconds) != shape:
            raise ValueError(
                f"seconds must have shape {shape}, one number a knot; got "
                f"{jnp.shape(self.seconds)}"
            )
        if not is_traced(self.seconds) and not np.all(np.isfinite(self.seconds)):
            raise ValueError(f"seconds must be finite; got {self.seconds}")

    @classmethod
    def measure(
        cls,
        make: Callable[..., Callable[[], Any]],
        *widths: Sequence[float],
        num_repeats: int = 10,
        clock: Callable[[], float] = time.perf_counter,
    ) -> "LatencyTable":
        """Times ``make(width_1, ...)()`` on this machine at every knot.

        Args:
          make: one width an axis to a function of no arguments, jitted if it is to be;
            its results are waited for. What ``make`` itself does, such as to make the
            inputs, is not timed.
          *widths: the knots of each axis.
          num_repeats: calls at each knot, after a first one that may compile; their
            median is taken.
          clock: seconds, as ``time.perf_counter``.

        >>> import jax, jax.numpy as jnp, hypergrad as hg
        >>> def make(width):
        ...     layer, x = jax.jit(lambda x: x @ x.T), jnp.ones((4, width))
        ...     return lambda: layer(x)
        >>> table = hg.objectives.LatencyTable.measure(make, [8, 64], num_repeats=3)
        >>> bool(table(20.0) > 0)
        True
        """
        check_positive_int("num_repeats", num_repeats)
        if not (callable(make) and widths):
            raise TypeError(
                "measure needs make, which takes a width and returns a function to be "
                f"timed, and the widths; got {make!r} and {len(widths)} axes"
            )

        def median(*knot):
            run = make(*knot)
            jax.block_until_ready(run())
            times = []
            for _ in range(num_repeats):
                begin = clock()
                jax.block_until_ready(run())
                times.append(clock() - begin)
            return np.median(times)

        seconds = [median(*knot) for knot in itertools.product(*widths)]
        knots = tuple(jnp.asarray(axis, float) for axis in widths)
        return cls(knots, jnp.array(seconds).reshape(tuple(map(len, widths))))

    def __call__(self, *widths: float | Array) -> Array:
        """Seconds at one width an axis, each a number; differentiable in them."""
        if len(widths) != len(self.knots):
            raise ValueError(
                f"the table has {len(self.knots)} axes; got {len(widths)} widths"
            )
        value = jnp.asarray(self.seconds)
        for x, knots in zip(widths, self.knots, strict=True):
            x, knots = jnp.asarray(x), jnp.asarray(knots)
            x = x.astype(jnp.promote_types(x.dtype, knots.dtype))
            above = jnp.searchsorted(knots, x, side="right")
            i = jnp.clip(above - 1, 0, len(knots) - 2)
            t = (x - knots[i]) / (knots[i + 1] - knots[i])
            value = (1 - t) * value[i] + t * value[i + 1]
        return value.astype(jnp.result_type(1.0, *widths))
