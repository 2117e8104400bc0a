"""Spaces of real numbers, each for one leaf of ``alpha``."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float

from ..number_checks import boolean
from ..validation import is_traced
from .base import BoundedSpace, as_float, as_shape, identity, raise_unbounded


class Real(eqx.Module):
    """The real numbers: ``alpha = u``.

    >>> Real().forward(-3.0)
    -3.0
    """

    requirement = "finite"
    forward = inverse = project = identity
    sample = raise_unbounded
    unit_shape = property(raise_unbounded)

    def contains(self, alpha: ArrayLike) -> Array:
        """Returns True for finite values."""
        return jnp.isfinite(as_float(alpha))

    is_interior = contains


class Positive(eqx.Module):
    """Positive numbers: ``alpha = exp(u)``.

    >>> float(Positive().inverse(1.0))
    0.0
    """

    requirement = "finite and above 0"
    project = identity
    sample = raise_unbounded
    unit_shape = property(raise_unbounded)

    def forward(self, u: ArrayLike) -> Array:
        """Returns ``exp(u)``."""
        return jnp.exp(as_float(u))

    def inverse(self, alpha: ArrayLike) -> Array:
        """Returns ``log(alpha)``."""
        return jnp.where(self.contains(alpha), _finite_log(as_float(alpha)), jnp.nan)

    def contains(self, alpha: ArrayLike) -> Array:
        """Returns True for ``0 <= alpha < inf``, because ``exp`` may round to 0."""
        alpha = as_float(alpha)
        return (alpha >= 0) & jnp.isfinite(alpha)

    def is_interior(self, alpha: ArrayLike) -> Array:
        """Returns True for ``0 < alpha < inf``."""
        alpha = as_float(alpha)
        return (alpha > 0) & jnp.isfinite(alpha)


class Interval(BoundedSpace):
    """Numbers between two bounds: ``alpha = low + (high - low) sigmoid(u)``.

    Args:
      low, high: Finite bounds with ``low < high``: scalars or arrays that broadcast to
        the leaf. They are data, so that new bounds trace nothing; searchers that train
        populations trace again unless the bounds are arrays.
      log: Whether ``log(alpha)`` instead of ``alpha`` is interpolated, and sampled
        uniformly; needs ``low > 0``. Static. Defaults to False.
      shape: Shape of the leaf, for searches. Defaults to ``()``: a search then proposes
        one number, where `minimize` has as many as ``alpha``.

    Raises:
      TypeError: A bound is not a number or an array.
      ValueError: The bounds are out of order or infinite, or the dtype of a leaf cannot
        represent them.

    >>> round(float(Interval(1e-4, 1.0, log=True).forward(0.0)), 4)
    0.01
    """

    low: ArrayLike
    high: ArrayLike
    log: bool = eqx.field(static=True, default=False, converter=boolean("log"))
    shape: tuple[int, ...] = eqx.field(
        static=True, default=(), kw_only=True, converter=as_shape
    )

    requirement = "strictly between low and high"
    project = identity

    def __check_init__(self):
        if (bounds := _concrete_bounds(self)) is None:
            return
        low, high = bounds
        if not np.all(np.isfinite(low) & np.isfinite(high)):
            raise ValueError(
                f"low and high must be finite; got {self}. Use Positive(), Real(), or "
                "Box for a one-sided bound."
            )
        if not np.all(low < high):
            raise ValueError(f"low must be below high; got {self}.")
        if self.log and not np.all(low > 0):
            raise ValueError(f"low must be above 0 if log=True; got {self}.")

    def forward(self, u: ArrayLike) -> Array:
        """Returns ``low + (high - low) sigmoid(u)``, or the same for ``log(alpha)``."""
        u = as_float(u)
        low, high, width = self._bounds_and_width(u)
        # Each half is measured from its own bound, because 1 - sigmoid(u) cancels.
        from_low, to_high = width * jax.nn.sigmoid(u), width * jax.nn.sigmoid(-u)
        if self.log:
            return jnp.where(u < 0, low * jnp.exp(from_low), high * jnp.exp(-to_high))
        return jnp.where(u < 0, low + from_low, high - to_high)

    def inverse(self, alpha: ArrayLike) -> Array:
        """Returns ``log((alpha - low) / (high - alpha))``, of logarithms if ``log``."""
        alpha = as_float(alpha)
        low, high, _ = self._bounds_and_width(alpha)
        from_low, to_high = alpha - low, high - alpha
        if self.log:
            from_low, to_high = jnp.log(alpha / low), -jnp.log(alpha / high)
        u = _finite_log(from_low) - _finite_log(to_high)
        return jnp.where(self.contains(alpha), u, jnp.nan)

    def contains(self, alpha: ArrayLike) -> Array:
        """Returns True for ``low <= alpha <= high``, bounds rounded to the dtype."""
        alpha = as_float(alpha)
        low, high, _ = self._bounds_and_width(alpha)
        return (low <= alpha) & (alpha <= high)

    def is_interior(self, alpha: ArrayLike) -> Array:
        """Returns True for ``low < alpha < high``."""
        alpha = as_float(alpha)
        low, high, _ = self._bounds_and_width(alpha)
        return (low < alpha) & (alpha < high)

    def from_unit(self, t: ArrayLike) -> Array:
        """Returns ``low + t (high - low)``, or the same for ``log(alpha)``."""
        t = as_float(t)
        low, high, width = self._bounds_and_width(t)
        alpha = low * jnp.exp(t * width) if self.log else low + t * width
        return jnp.clip(alpha, low, high)

    def to_unit(self, alpha: ArrayLike) -> Array:
        """Returns ``(alpha - low) / (high - low)``, or the same of logarithms."""
        alpha = as_float(alpha)
        low, _, width = self._bounds_and_width(alpha)
        return (jnp.log(alpha / low) if self.log else alpha - low) / width

    def _bounds_and_width(self, x: Array) -> tuple[Any, Any, Any]:
        """Returns the bounds in the dtype of ``x``, and ``high - low`` or of logs."""
        low, high = _fit_bounds(self, x)
        _check_representable(self, low, high, x.dtype)
        if self.log and not is_traced((low, high)):
            tiny = jnp.finfo(x.dtype).tiny
            with np.errstate(all="ignore"):
                is_small_ratio = low / high < tiny
            if np.any(is_small_ratio):
                raise ValueError(
                    f"low and high of {self} must have a ratio of at least {tiny} in "
                    f"{x.dtype}. Change the bounds, or give the leaf a wider dtype."
                )
        return low, high, jnp.log(high) - jnp.log(low) if self.log else high - low


def Unit(shape: tuple[int, ...] = ()) -> Interval:
    """Returns the space of numbers in [0, 1], ``alpha = sigmoid(u)``.

    Args:
      shape: Shape of the leaf, for searches. Defaults to ``()``.

    >>> float(Unit().forward(0.0))
    0.5
    """
    return Interval(0.0, 1.0, shape=shape)


class Simplex(BoundedSpace):
    """Positive weights that sum to 1 over the last axis: ``alpha = softmax(u)``.

    Args:
      shape: Shape of the leaf, ``[..., n]``, for searches.

    Raises:
      ValueError: The leaf is a scalar.

    >>> Simplex().forward(jnp.zeros(4)).tolist()
    [0.25, 0.25, 0.25, 0.25]
    """

    shape: tuple[int, ...] = eqx.field(
        static=True, default=(), kw_only=True, converter=as_shape
    )

    requirement = "above 0 with sum 1 over the last axis"
    project = identity

    def forward(self, u: ArrayLike) -> Float[Array, "... n"]:
        """Returns ``exp(u) / sum(exp(u))``."""
        return jax.nn.softmax(_as_rows(u), axis=-1)

    def inverse(self, alpha: ArrayLike) -> Float[Array, "... n"]:
        """Returns ``log(alpha) - mean(log(alpha))``, whose rows sum to 0."""
        log_alpha = _finite_log(_as_rows(alpha))
        u = log_alpha - jnp.mean(log_alpha, axis=-1, keepdims=True)
        return jnp.where(self.contains(alpha), u, jnp.nan)

    def contains(self, alpha: ArrayLike) -> Array:
        """Returns True for rows of at least 0 that sum to 1 within ``sqrt(eps)``."""
        alpha = _as_rows(alpha)
        return jnp.all(alpha >= 0, axis=-1, keepdims=True) & _has_unit_sum(alpha)

    def is_interior(self, alpha: ArrayLike) -> Array:
        """Returns True for weights above 0 in rows that sum to 1."""
        alpha = _as_rows(alpha)
        return (alpha > 0) & _has_unit_sum(alpha)

    def sample(self, key: Array) -> Float[Array, "... n"]:
        """Returns rows of the distribution Dirichlet(1, ..., 1), which is uniform."""
        return jax.random.dirichlet(key, _as_rows(jnp.ones(self.shape)))

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``[..., n - 1]``: the other weights determine the last."""
        *rows, n = _as_rows(np.ones(self.shape)).shape
        return (*rows, n - 1)

    def from_unit(self, t: ArrayLike) -> Float[Array, "... n"]:
        """Returns weights by stick-breaking, ``alpha_k = v_k prod_{j<k} (1 - v_j)``.

        The fraction ``v_k = 1 - (1 - t_k)^{1/(n-k)}`` is the quantile of Beta(1, n - k)
        at ``t_k``, so that uniform coordinates give uniform weights.
        """
        t = _as_rows(t)
        *rows, m = t.shape
        exponents = jnp.arange(m, 0, -1, dtype=t.dtype).reshape((1,) * len(rows) + (m,))
        # The length of the stick after the pieces 1..k, prod_{j<=k} (1 - v_j).
        remaining = jnp.cumprod((1 - t) ** (1 / exponents), axis=-1)
        ones, zeros = jnp.ones((*rows, 1), t.dtype), jnp.zeros((*rows, 1), t.dtype)
        return -jnp.diff(jnp.concatenate([ones, remaining, zeros], -1), axis=-1)

    def to_unit(self, alpha: ArrayLike) -> Float[Array, "... m"]:
        """Returns ``t_k = 1 - (1 - v_k)^{n-k}``; 0 if nothing of the stick remains."""
        alpha = _as_rows(alpha)
        *rows, n = alpha.shape
        remaining = jnp.flip(jnp.cumsum(jnp.flip(alpha, -1), axis=-1), -1)
        length, next_length = remaining[..., :-1], remaining[..., 1:]
        # 1 - v_k is the ratio of the lengths after and before piece k.
        safe_length = jnp.where(length > 0, length, 1)
        ratio = jnp.where(length > 0, next_length / safe_length, 1)
        exponents = jnp.arange(n - 1, 0, -1, dtype=alpha.dtype)
        return 1 - ratio ** exponents.reshape((1,) * len(rows) + (n - 1,))


class Box(BoundedSpace):
    """Numbers from one bound to another: ``alpha = u``, clipped after each step.

    Unlike `Interval` a box reaches its bounds, and may be open at one side. A number
    with equal bounds is fixed, which `minimize` and `sample` allow; searchers of the
    unit cube (all but `Random` and those that train populations) refuse it.

    Args:
      low, high: Bounds with ``low <= high``, infinite for an open side: scalars or
        arrays that broadcast to the leaf. They are data, as in `Interval`.
      shape: Shape of the leaf, for searches. Defaults to ``()``.

    Raises:
      TypeError: A bound is not a real number or an array.
      ValueError: The bounds are out of order, or the dtype of a leaf that is sampled or
        searched cannot represent them.

    >>> float(Box(0.0, float("inf")).project(-2.0))
    0.0
    """

    low: ArrayLike
    high: ArrayLike
    shape: tuple[int, ...] = eqx.field(
        static=True, default=(), kw_only=True, converter=as_shape
    )

    requirement = "finite and from low to high"
    forward = inverse = identity

    def __check_init__(self):
        bounds = _concrete_bounds(self)
        if bounds is not None and not np.all(bounds[0] <= bounds[1]):
            raise ValueError(f"low must not be above high; got {self}.")

    def project(self, u: ArrayLike) -> Array:
        """Returns ``min(max(u, low), high)``."""
        return jnp.clip(as_float(u), *_fit_bounds(self, as_float(u)))

    def contains(self, alpha: ArrayLike) -> Array:
        """Returns True for finite values with ``low <= alpha <= high``."""
        alpha = as_float(alpha)
        low, high = _fit_bounds(self, alpha)
        return (low <= alpha) & (alpha <= high) & jnp.isfinite(alpha)

    is_interior = contains

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """Shape of the leaf; raises ValueError for infinite or equal bounds."""
        self._check_is_bounded()
        bounds = _concrete_bounds(self)
        if bounds is not None and not np.all(bounds[0] < bounds[1]):
            raise ValueError(
                f"low must be below high in a search; got {self}. Close over numbers "
                "that are fixed in the losses, and leave them out of alpha."
            )
        return self.shape

    def _check_is_bounded(self) -> None:
        concrete = [x for x in (self.low, self.high) if not isinstance(x, Tracer)]
        if not all(np.isfinite(x).all() for x in concrete):
            raise_unbounded(self)

    def from_unit(self, t: ArrayLike) -> Array:
        """Returns ``low + t (high - low)``; raises ValueError for an infinite bound."""
        self._check_is_bounded()
        t = as_float(t)
        low, high = _fit_bounds(self, t)
        _check_representable(self, low, high, t.dtype)
        return jnp.clip(low + t * (high - low), low, high)

    def to_unit(self, alpha: ArrayLike) -> Array:
        """Returns ``(alpha - low) / (high - low)``; 0 if the bounds are equal."""
        alpha = as_float(alpha)
        low, high = _fit_bounds(self, alpha)
        _check_representable(self, low, high, alpha.dtype)
        return (alpha - low) / jnp.where(high > low, high - low, 1)


def _finite_log(x: Array) -> Array:
    """Returns ``log(x)``, with the smallest number that is not flushed in place of 0.

    Processors flush numbers of float32 that are not normal, but not those of float16.
    """
    limits = jnp.finfo(x.dtype)
    is_half = x.dtype == jnp.float16
    smallest = limits.smallest_subnormal if is_half else limits.tiny
    return jnp.log(jnp.maximum(x, jnp.asarray(smallest, x.dtype)))


def _as_rows(x: ArrayLike) -> Array:
    if np.ndim(x) == 0:
        raise ValueError(
            "alpha must be an array with a last axis for Simplex; got a scalar. For a "
            "search write Simplex(shape=(n,))."
        )
    return as_float(x)


def _has_unit_sum(alpha: Array) -> Array:
    error = jnp.abs(jnp.sum(alpha, axis=-1, keepdims=True) - 1)
    is_normalized = error <= float(jnp.finfo(alpha.dtype).eps) ** 0.5
    return jnp.broadcast_to(is_normalized, alpha.shape)


def _concrete_bounds(space: Any) -> tuple[np.ndarray, ...] | None:
    """Returns both bounds as NumPy arrays, or None if one is traced."""
    for name, bound in (("low", space.low), ("high", space.high)):
        is_array = hasattr(bound, "dtype") and not jnp.iscomplexobj(bound)
        if not (isinstance(bound, int | float) or is_array):
            raise TypeError(f"{name} must be a real number or an array; got {bound!r}.")
    if isinstance(space.low, Tracer) or isinstance(space.high, Tracer):
        return None
    low, high = np.asarray(space.low), np.asarray(space.high)
    try:
        return tuple(np.broadcast_arrays(low, high))
    except ValueError:
        raise ValueError(
            "low and high must broadcast to one shape; got shapes "
            f"{low.shape} and {high.shape}."
        ) from None


def _check_representable(space: Any, low: Any, high: Any, dtype: Any) -> None:
    """Raises ValueError if bounds overflow in a dtype, or only there are equal."""
    bounds = _concrete_bounds(space)
    if bounds is None:
        return
    with np.errstate(all="ignore"):
        is_distinct = (low < high) | np.equal(*bounds)
        is_representable = is_distinct & np.isfinite(high - low)
    if not np.all(is_representable):
        raise ValueError(
            f"low and high of {space} must be distinct and within the range of "
            f"{dtype}; got {low} and {high}. Change the bounds, or give the leaf a "
            "wider dtype."
        )


def _fit_bounds(space: Any, x: Array) -> list[Any]:
    """Returns both bounds in the dtype and rank of ``x``; scalars stay scalars."""
    bounds = []
    for name, bound in (("low", space.low), ("high", space.high)):
        shape = np.shape(bound)
        try:
            is_broadcastable = np.broadcast_shapes(shape, x.shape) == x.shape
        except ValueError:
            is_broadcastable = False
        if not is_broadcastable:
            raise ValueError(
                f"{name} must broadcast to the shape {x.shape} of the leaf; got shape "
                f"{shape}. For a search give the space the shape of the leaf, shape=."
            )
        with np.errstate(over="ignore"):
            xp = jnp if isinstance(bound, Tracer) else np
            bound = xp.asarray(bound).astype(x.dtype)
        rank = x.ndim - len(shape) if shape else 0
        bounds.append(bound.reshape((1,) * rank + shape))
    return bounds
