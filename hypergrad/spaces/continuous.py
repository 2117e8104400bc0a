"""The spaces of one leaf."""

from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike


@runtime_checkable
class Space(Protocol):
    """Pure elementwise methods that keep shape and dtype (``Simplex``: row by row).

    >>> isinstance(Positive(), Space)
    True
    """

    allowed: str  #: the interior in words, for messages

    def forward(self, u: ArrayLike) -> Array:
        """``alpha``; in the closed set for every ``u``."""
        ...

    def inverse(self, alpha: ArrayLike) -> Array:
        """``u``; finite in the closed set, NaN outside (identities excepted)."""
        ...

    def project(self, u: ArrayLike) -> Array:
        """The nearest admissible ``u``, after each step."""
        ...

    def contains(self, alpha: ArrayLike) -> Array:
        """Boolean: in the closed set."""
        ...

    def interior(self, alpha: ArrayLike) -> Array:
        """Boolean: where a run may start, since the inverse is exact there."""
        ...

    def sample(
        self, key: Array, shape: tuple | None = None, dtype: Any = None
    ) -> Array:
        """A random ``alpha``, of the declared shape unless another is given."""
        ...


def _identity(self, x):
    """The identity."""
    return x


def _finite(self, alpha):
    """Finite values."""
    return jnp.isfinite(_float(alpha))


def _unbounded(self, key, shape=None, dtype=None):
    """Raises ValueError: an unbounded space has no uniform distribution."""
    raise ValueError(
        f"cannot sample from {self}, which is unbounded: to search, declare "
        "Interval(low, high), with log=True for scales"
    )


def _no_cube(self):
    """Raises ValueError: an unbounded space is no image of the unit cube."""
    _unbounded(self, None)


class Real(eqx.Module):
    """``alpha = u``.

    >>> Real().forward(-3.0)
    -3.0
    """

    allowed = "finite values"
    forward = inverse = project = _identity
    contains = interior = _finite
    sample = _unbounded
    unit_shape = property(_no_cube)


class Positive(eqx.Module):
    """``alpha = exp(u)``, ``u = log(alpha)``.

    >>> float(Positive().inverse(1.0))
    0.0
    """

    allowed = "finite values above 0"
    project = _identity
    sample = _unbounded
    unit_shape = property(_no_cube)

    def forward(self, u):
        """``exp(u)``."""
        return jnp.exp(_float(u))

    def inverse(self, alpha):
        """``log(alpha)``."""
        return jnp.where(self.contains(alpha), _log(_float(alpha)), jnp.nan)

    def contains(self, alpha):
        """``0 <= alpha < inf``, since ``exp`` may round to 0."""
        return (_float(alpha) >= 0) & _finite(self, alpha)

    def interior(self, alpha):
        """``0 < alpha < inf``."""
        return (_float(alpha) > 0) & _finite(self, alpha)


class Interval(eqx.Module):
    """``alpha = low + (high - low) sigmoid(u)``, or the same for ``log(alpha)``.

    Args:
      low, high: finite, low < high; scalars or arrays that broadcast to the leaf. Data.
      log: interpolate, and sample uniformly, ``log(alpha)``; needs low > 0. Static.
      shape: of the leaf, for `sample`: a search has no ``alpha`` to read it from.

    Raises:
      ValueError: bounds out of order, infinite, or too fine or wide for a leaf's dtype.

    >>> round(float(Interval(1e-4, 1.0, log=True).forward(0.0)), 4)
    0.01
    """

    low: ArrayLike
    high: ArrayLike
    log: bool = eqx.field(static=True, default=False)
    shape: tuple[int, ...] = eqx.field(static=True, default=(), kw_only=True)

    allowed = "values strictly between low and high"
    project = _identity

    def __check_init__(self):
        if (bounds := _numbers(self)) is None:
            return
        low, high = bounds
        if not np.all(np.isfinite(low) & np.isfinite(high)):
            raise ValueError(
                f"low and high must be finite, got {self}: use Positive(), Real(), or "
                "Box for a one-sided bound"
            )
        if not np.all(low < high):
            raise ValueError(f"low must be below high, got {self}")
        if self.log and not np.all(low > 0):
            raise ValueError(f"log=True needs low > 0, got {self}")

    def forward(self, u):
        """Each half measured from its own bound, for ``1 - sigmoid(u)`` cancels."""
        u = _float(u)
        low, high, width = self._bounds(u)
        up, down = width * jax.nn.sigmoid(u), width * jax.nn.sigmoid(-u)
        if self.log:
            return jnp.where(u < 0, low * jnp.exp(up), high * jnp.exp(-down))
        return jnp.where(u < 0, low + up, high - down)

    def inverse(self, alpha):
        """``log((alpha - low) / (high - alpha))``, of logarithms if ``log``."""
        alpha = _float(alpha)
        low, high, _ = self._bounds(alpha)
        up, down = alpha - low, high - alpha
        if self.log:
            up, down = jnp.log(alpha / low), -jnp.log(alpha / high)
        return jnp.where(self.contains(alpha), _log(up) - _log(down), jnp.nan)

    def contains(self, alpha):
        """``low <= alpha <= high``, the bounds rounded to the leaf's dtype."""
        alpha = _float(alpha)
        low, high, _ = self._bounds(alpha)
        return (low <= alpha) & (alpha <= high)

    def interior(self, alpha):
        """``low < alpha < high``."""
        alpha = _float(alpha)
        low, high, _ = self._bounds(alpha)
        return (low < alpha) & (alpha < high)

    def sample(self, key, shape=None, dtype=None):
        """Uniform, or log-uniform."""
        shape = self.shape if shape is None else shape
        dtype = dtype or jnp.result_type(float)
        return self.from_unit(jax.random.uniform(key, shape, dtype))

    @property
    def unit_shape(self):
        """As the leaf's."""
        return self.shape

    def from_unit(self, t):
        """``low + t (high - low)``, or the same for ``log(alpha)``."""
        t = _float(t)
        low, high, width = self._bounds(t)
        alpha = low * jnp.exp(t * width) if self.log else low + t * width
        return jnp.clip(alpha, low, high)

    def to_unit(self, alpha):
        """``(alpha - low) / (high - low)``, or the same of logarithms."""
        alpha = _float(alpha)
        low, _, width = self._bounds(alpha)
        return (jnp.log(alpha / low) if self.log else alpha - low) / width

    def _bounds(self, x):
        low, high = _fit(self, x)
        if not (isinstance(low, Tracer) or isinstance(high, Tracer)):
            with np.errstate(all="ignore"):
                fits = (low < high) & np.isfinite(high - low)
                if self.log:
                    fits &= low / high >= jnp.finfo(x.dtype).tiny
            if not np.all(fits):
                raise ValueError(
                    f"{self} does not fit {x.dtype}, where it is {low} to {high}: "
                    "change the bounds, or give the leaf a wider dtype"
                )
        return low, high, jnp.log(high) - jnp.log(low) if self.log else high - low


def Unit(shape: tuple[int, ...] = ()) -> Interval:
    """``alpha = sigmoid(u)``: ``Interval(0.0, 1.0)``.

    >>> float(Unit().forward(0.0))
    0.5
    """
    return Interval(0.0, 1.0, shape=shape)


class Simplex(eqx.Module):
    """``alpha = softmax(u)`` over the last axis of a leaf [..., n].

    Args:
      shape: of the leaf, for `sample`.

    Raises:
      ValueError: the leaf is a scalar.

    >>> Simplex().forward(jnp.zeros(4)).tolist()
    [0.25, 0.25, 0.25, 0.25]
    """

    shape: tuple[int, ...] = eqx.field(static=True, default=(), kw_only=True)

    allowed = "values above 0 that sum to 1 over the last axis"
    project = _identity

    def forward(self, u):
        """``exp(u) / sum(exp(u))``."""
        return jax.nn.softmax(_rows(u), axis=-1)

    def inverse(self, alpha):
        """``log(alpha) - mean(log(alpha))``: ``u`` sums to 0."""
        u = _log(_rows(alpha))
        centred = u - jnp.mean(u, axis=-1, keepdims=True)
        return jnp.where(self.contains(alpha), centred, jnp.nan)

    def contains(self, alpha):
        """Whether the entry's row is at least 0 and sums to 1 within ``sqrt(eps)``."""
        alpha = _rows(alpha)
        return jnp.all(alpha >= 0, axis=-1, keepdims=True) & self._normal(alpha)

    def interior(self, alpha):
        """Whether the entry is above 0, in a row that sums to 1."""
        alpha = _rows(alpha)
        return (alpha > 0) & self._normal(alpha)

    def sample(self, key, shape=None, dtype=None):
        """Dirichlet(1, ..., 1), which is uniform."""
        shape = self.shape if shape is None else shape
        ones = _rows(jnp.ones(shape, dtype))
        return jax.random.dirichlet(key, ones, dtype=ones.dtype)

    @property
    def unit_shape(self):
        """[..., n - 1]: the last weight is what the others leave."""
        *rows, n = _rows(np.ones(self.shape)).shape
        return (*rows, n - 1)

    def from_unit(self, t):
        """Stick-breaking, ``alpha_k = v_k prod_{j<k} (1 - v_j)``.

        ``v_k = 1 - (1 - t_k)^{1/(n-k)}``, the quantiles of Beta(1, n - k).
        """
        t = _rows(t)
        *rows, m = t.shape
        powers = jnp.arange(m, 0, -1, dtype=t.dtype).reshape((1,) * len(rows) + (m,))
        left = jnp.cumprod((1 - t) ** (1 / powers), axis=-1)
        ends = jnp.ones((*rows, 1), t.dtype), jnp.zeros((*rows, 1), t.dtype)
        return -jnp.diff(jnp.concatenate([ends[0], left, ends[1]], -1), axis=-1)

    def to_unit(self, alpha):
        """``t_k = 1 - (1 - v_k)^{n-k}``; 0 where nothing is left to break."""
        alpha = _rows(alpha)
        *rows, n = alpha.shape
        left = jnp.flip(jnp.cumsum(jnp.flip(alpha, -1), axis=-1), -1)
        before, after = left[..., :-1], left[..., 1:]
        kept = jnp.where(before > 0, after / jnp.where(before > 0, before, 1), 1)
        powers = jnp.arange(n - 1, 0, -1, dtype=alpha.dtype)
        return 1 - kept ** powers.reshape((1,) * len(rows) + (n - 1,))

    def _normal(self, alpha):
        error = jnp.abs(jnp.sum(alpha, axis=-1, keepdims=True) - 1)
        normal = error <= float(jnp.finfo(alpha.dtype).eps) ** 0.5
        return jnp.broadcast_to(normal, alpha.shape)


class Box(eqx.Module):
    """``alpha = u``, clipped to [low, high] after each step.

    Args:
      low, high: low <= high, infinite where one-sided; scalars or arrays that broadcast
        to the leaf. Data.
      shape: of the leaf, for `sample`.

    Raises:
      ValueError: bounds out of order.

    >>> float(Box(0.0, float("inf")).project(-2.0))
    0.0
    """

    low: ArrayLike
    high: ArrayLike
    shape: tuple[int, ...] = eqx.field(static=True, default=(), kw_only=True)

    allowed = "finite values from low to high"
    forward = inverse = _identity

    def __check_init__(self):
        bounds = _numbers(self)
        if bounds is not None and not np.all(bounds[0] <= bounds[1]):
            raise ValueError(f"low must not be above high, got {self}")

    def project(self, u):
        """``min(max(u, low), high)``."""
        return jnp.clip(_float(u), *_fit(self, _float(u)))

    def contains(self, alpha):
        """``low <= alpha <= high``, finite."""
        alpha = _float(alpha)
        low, high = _fit(self, alpha)
        return (low <= alpha) & (alpha <= high) & jnp.isfinite(alpha)

    interior = contains

    def sample(self, key, shape=None, dtype=None):
        """Uniform; ValueError if a bound is infinite."""
        shape = self.shape if shape is None else shape
        dtype = dtype or jnp.result_type(float)
        return self.from_unit(jax.random.uniform(key, shape, dtype))

    @property
    def unit_shape(self):
        """As the leaf's; ValueError if a bound is infinite."""
        concrete = [x for x in (self.low, self.high) if not isinstance(x, Tracer)]
        if not all(np.isfinite(x).all() for x in concrete):
            _unbounded(self, None)
        return self.shape

    def from_unit(self, t):
        """``low + t (high - low)``; ValueError if a bound is infinite."""
        _ = self.unit_shape
        t = _float(t)
        low, high = _fit(self, t)
        return jnp.clip(low + t * (high - low), low, high)

    def to_unit(self, alpha):
        """``(alpha - low) / (high - low)``; 0 where the bounds are equal."""
        alpha = _float(alpha)
        low, high = _fit(self, alpha)
        return (alpha - low) / jnp.where(high > low, high - low, 1)


def _float(x):
    return jnp.asarray(x, jnp.result_type(x, float))


def _rows(x):
    if np.ndim(x) == 0:
        raise ValueError("Simplex needs a leaf with a last axis, got a scalar")
    return _float(x)


def _log(x):
    """``log``, with the smallest normal number for 0."""
    return jnp.log(jnp.maximum(x, jnp.finfo(x.dtype).tiny))


def _numbers(space):
    """Both bounds as NumPy arrays; None while one is traced and has no value yet."""
    for name, bound in (("low", space.low), ("high", space.high)):
        if not (isinstance(bound, int | float) or hasattr(bound, "dtype")):
            raise TypeError(f"{name} must be a number or an array, got {bound!r}")
    if isinstance(space.low, Tracer) or isinstance(space.high, Tracer):
        return None
    low, high = np.asarray(space.low), np.asarray(space.high)
    try:
        return np.broadcast_arrays(low, high)
    except ValueError:
        raise ValueError(
            f"low has shape {low.shape} and high {high.shape}; they must broadcast"
        ) from None


def _fit(space, x):
    """Both bounds in the dtype and rank of ``x``; scalars stay scalars."""
    fitted = []
    for name, bound in (("low", space.low), ("high", space.high)):
        shape = np.shape(bound)
        try:
            fits = np.broadcast_shapes(shape, x.shape) == x.shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"{name} has shape {shape}, which does not broadcast to the leaf's "
                f"{x.shape}"
            )
        with np.errstate(over="ignore"):
            numpy = jnp if isinstance(bound, Tracer) else np
            bound = numpy.asarray(bound).astype(x.dtype)
        rank = x.ndim - len(shape) if shape else 0
        fitted.append(bound.reshape((1,) * rank + shape))
    return fitted
