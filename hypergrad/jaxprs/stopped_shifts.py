"""Stopped maxima that cancel, such as the shift of a stable softmax, read from a jaxpr.

A value is followed as ``v + s`` or as ``v exp(s)``, where ``s`` is a sum of stopped
values with coefficients. Where all coefficients of a result are zero, the stopped
maxima have cancelled, and no derivative is lost. Stopped values are told apart by the
identities of what was stopped, and by the axes along which they vary. Weights without a
derivative that are summed over one axis, such as labels, are taken for a mean, which
leaves a shift unchanged; all other rules are exact up to guards and masks. An operation
without a rule makes the stopped maxima count as lost.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

#: A guard such as ``+ 1e-9`` in a divisor hides nothing of a derivative where the
#: exponentials of shifted values add up to 1 at least.
MAX_GUARD = 1e-6

#: The exponential of a constant below this, such as that of a mask, is zero.
MASKED = -1e4

#: A smaller coefficient is zero, up to the rounding of literals in float32.
COEFFICIENT_TOL = 1e-6

#: Operations that move elements, of which some may come from other operands.
MOVES = {
    *("broadcast_in_dim", "concatenate", "convert_element_type", "copy"),
    *("dynamic_slice", "dynamic_update_slice", "gather", "pad", "reduce_max"),
    *("reduce_min", "reduce_precision", "reshape", "rev", "scatter", "select_n"),
    *("slice", "squeeze", "stop_gradient", "transpose"),
}

#: Operations that keep the elements of their operand, and those that keep its shape.
SAME_SHAPE = {"convert_element_type", "copy", "reduce_precision", "stop_gradient"}
SAME_ELEMENTS = {"broadcast_in_dim", "reshape", "squeeze", "transpose", *SAME_SHAPE}


@dataclasses.dataclass(frozen=True)
class StoppedValue:
    """A stopped maximum, or a product or sum that is made of one.

    Attributes:
      identity: Its identity, which equal values share.
      axes: For each of its axes that is longer than 1, the axis of the value that has
        it as a shift.
      lost: The derivatives that it has lost.
    """

    identity: Any
    axes: tuple[int, ...]
    lost: frozenset[Any] = dataclasses.field(compare=False)


Terms = frozenset[tuple[StoppedValue, float]]


@dataclasses.dataclass(frozen=True)
class Shift:
    """A sum of stopped values that is added, or whose exponential is a factor.

    Two shifts are equal if their terms are.

    Attributes:
      terms: Pairs of a stopped value and its coefficient, which is not zero.
      is_factor: Whether the value is ``v exp(s)`` instead of ``v + s``.
      unweighted: The terms before a product with a constant, if the value is one.
      has_mask: Whether elements may be masks, which only an exponential treats as if
        they had the shift.
      is_shifted: Whether the value is ``v - max(v)`` as far as is known, or a positive
        multiple or the exponential of one.
      is_total: Whether it is the sum of such exponentials, which is at least 1.
    """

    terms: Terms = frozenset()
    is_factor: bool = False
    unweighted: Terms = frozenset()
    has_mask: bool = dataclasses.field(default=False, compare=False)
    is_shifted: bool = dataclasses.field(default=False, compare=False)
    is_total: bool = dataclasses.field(default=False, compare=False)

    @property
    def axes(self) -> set[int]:
        """The axes of the value along which the shift varies."""
        return _axes_of(self.terms)

    def apply(self, f: Callable[[StoppedValue], StoppedValue]) -> "Shift":
        """Returns the shift with ``f`` applied to each stopped value."""
        terms, unweighted = (
            frozenset((f(value), n) for value, n in terms)
            for terms in (self.terms, self.unweighted)
        )
        return dataclasses.replace(self, terms=terms, unweighted=unweighted)


NO_SHIFT = Shift()


def identity_of(*parts: Any) -> bytes:
    """Returns an identity for a value that is computed from ``parts``.

    Equal parts have equal identities, and different parts different ones.
    """
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


class Stopped(NamedTuple):
    """The identity of a value that `jax.lax.stop_gradient` returns.

    Attributes:
      identity: The identity of the same value with its derivative.
    """

    identity: Any


def identity_of_result(equation: Any, identities: list[Any], index: int) -> Any:
    """Returns the identity of a result, from those of the operands.

    An operation that keeps the elements of a stopped value has a stopped result.
    """
    name, params = equation.primitive.name, equation.params
    if name == "stop_gradient":
        return Stopped(identities[0])
    if name in SAME_ELEMENTS and isinstance(identities[0], Stopped):
        return Stopped((identity_of(name, params, [identities[0].identity]), 0))
    return identity_of(name, params, identities), index


def varying_axes(shape: Sequence[int], repeated: Collection[int]) -> tuple[int, ...]:
    """Returns the axes of a shape that are longer than 1 and not ``repeated``."""
    return tuple(i for i, n in enumerate(shape) if n > 1 and i not in repeated)


def repeated_axes(equation: Any, repeated: frozenset[int]) -> frozenset[int]:
    """Returns the axes along which the result of `SAME_ELEMENTS` repeats a value."""
    name, new_shape = equation.primitive.name, equation.outvars[0].aval.shape
    if name != "broadcast_in_dim":
        return repeated if name in SAME_SHAPE else frozenset()
    shape = equation.invars[0].aval.shape
    pairs = enumerate(equation.params["broadcast_dimensions"])
    varying = {j for i, j in pairs if shape[i] == new_shape[j] and i not in repeated}
    return frozenset(range(len(new_shape))) - varying


def add_shifts(x: Shift, y: Shift, factor: float = 1, is_factor: bool = False) -> Shift:
    """Returns ``x + factor * y``."""
    terms = _collect([*x.terms, *((value, factor * n) for value, n in y.terms)])
    has_mask = (x.has_mask or y.has_mask) and not is_factor
    return Shift(terms, is_factor and bool(terms), has_mask=has_mask)


def _collect(terms: Iterable[tuple[StoppedValue, float]]) -> Terms:
    """Returns the terms with one coefficient per value, and without zeros."""
    total: dict[StoppedValue, float] = {}
    for value, n in terms:
        total[value] = total.get(value, 0.0) + n
    return frozenset((x, n) for x, n in total.items() if abs(n) > COEFFICIENT_TOL)


def _axes_of(terms: Terms) -> set[int]:
    return {axis for value, _ in terms for axis in value.axes}


def common_shift(operands: Sequence[Any]) -> Shift | None:
    """Returns the shift that all operands have, or None.

    A constant has any factor if it is 0, and any other shift if it is a mask.

    Args:
      operands: Objects with ``shift``, ``is_constant`` and ``constant``.
    """
    if not any(x.shift.terms for x in operands):
        return NO_SHIFT
    is_factor = any(x.shift.is_factor for x in operands)
    is_neutral = lambda c: c == 0 if is_factor else c <= MASKED
    shifts = [
        x.shift
        for x in operands
        if not (x.is_constant and x.constant is not None and is_neutral(x.constant))
    ]
    common = _merge(shifts)
    if common is None or is_factor or len(shifts) == len(operands):
        return common
    return dataclasses.replace(common, has_mask=True)


def _merge(shifts: Sequence[Shift]) -> Shift | None:
    """Returns the shift that several values have, or None if they differ."""
    if len(set(shifts)) != 1:
        return None
    return dataclasses.replace(
        shifts[0],
        has_mask=any(x.has_mask for x in shifts),
        is_shifted=all(x.is_shifted for x in shifts),
        is_total=all(x.is_total for x in shifts),
    )


def shift_of_result(equation: Any, operands: list[Any]) -> Shift | None:
    """Returns the shift of the result of an operation, or None without a rule.

    Args:
      equation: The equation of the jaxpr.
      operands: The `Dependence` of each float operand.
    """
    name, x = equation.primitive.name, operands[0].shift
    is_factor = any(operand.shift.is_factor for operand in operands)
    match name:
        case "add" | "add_any" | "sub":
            return _shift_of_sum(name, operands, is_factor)
        case "max" | "min":
            return _shift_of_extremum(name, operands, is_factor)
        case "mul" | "div":
            return _shift_of_product(equation, operands)
        case "dot_general" if len(operands) == 2:
            return _shift_of_dot(equation, operands)
        case "reduce_sum" if x.terms and x.has_mask:
            return None
        case "reduce_sum" if not is_factor:
            return _sum_shift(x, equation.invars[0].aval.shape, equation.params["axes"])
        case "neg":
            return x if is_factor else add_shifts(NO_SHIFT, x, -1)
        case "exp" if not is_factor:
            return Shift(x.terms, True, is_shifted=x.is_shifted)
        case "exp2" if not is_factor:
            return add_shifts(NO_SHIFT, x, math.log(2), True)
        case "log" if is_factor:
            return Shift(x.terms)
        case "integer_pow" if is_factor:
            return add_shifts(NO_SHIFT, x, equation.params["y"], True)
    is_real = not jnp.issubdtype(equation.invars[0].aval.dtype, jnp.complexfloating)
    keeps_factor = name in ("reduce_sum", "cumsum") or (name == "abs" and is_real)
    if name in MOVES or (is_factor and keeps_factor):
        common = common_shift(operands)
        result = common and _move(common, _new_axes(equation))
        if result is None:
            return None
        return dataclasses.replace(
            result,
            is_shifted=result.is_shifted and name in SAME_ELEMENTS,
            is_total=result.is_total or (name == "reduce_sum" and result.is_shifted),
        )
    return None


def _shift_of_sum(name: str, operands: list[Any], is_factor: bool) -> Shift | None:
    a, b = operands
    x, y = a.shift, b.shift
    if not is_factor:
        total = add_shifts(x, y, -1 if name == "sub" else 1)
        is_shifted = name == "sub" and isinstance(b.identity, Stopped) and not x.terms
        return dataclasses.replace(total, is_shifted=is_shifted)
    for operand, other in ((a, b), (b, a)):
        if _is_guard(other.constant, operand.shift):
            return operand.shift
    return _merge([x, y])


def _is_guard(c: float | None, total: Shift) -> bool:
    """Returns True if a constant hides nothing of the derivative of a total."""
    return c is not None and (c == 0 or (abs(c) <= MAX_GUARD and total.is_total))


def _shift_of_extremum(name: str, operands: list[Any], is_factor: bool) -> Shift | None:
    is_bound = lambda c: c <= MASKED if name == "max" else c == math.inf
    for operand, other in (operands, operands[::-1]):
        c = other.constant
        is_guard = is_factor and name == "max" and _is_guard(c, operand.shift)
        if c is not None and (is_bound(c) or is_guard):
            return operand.shift
    merged = _merge([operand.shift for operand in operands])
    # The largest entry of a minimum need not be that of an operand.
    return merged and dataclasses.replace(merged, is_shifted=False, is_total=False)


def _shift_of_product(equation: Any, operands: list[Any]) -> Shift | None:
    name, (a, b) = equation.primitive.name, operands
    x, y = a.shift, b.shift
    is_quotient = name == "div"
    if all(shift.is_factor or not shift.terms for shift in (x, y)):
        return add_shifts(x, y, -1 if is_quotient else 1, True)
    if (x.terms and y.terms) or (is_quotient and y.terms):
        return None
    left, right = equation.invars
    x, b, weights = (y, a, left) if y.terms else (x, b, right)
    if b.constant is not None and math.isfinite(b.constant):
        if is_quotient and b.constant == 0:
            return None
        product = add_shifts(NO_SHIFT, x, b.constant ** (-1 if is_quotient else 1))
        is_shifted = x.is_shifted and b.constant > 0
        return dataclasses.replace(product, is_shifted=is_shifted)

    weight_axes = varying_axes(weights.aval.shape, b.repeated)

    def weighted(value: StoppedValue) -> StoppedValue:
        identity = identity_of(
            name, value.identity, value.axes, b.identity, weight_axes
        )
        axes = tuple(sorted({*value.axes, *weight_axes}))
        return StoppedValue(identity, axes, value.lost)

    unweighted = x.terms if b.is_constant else Terms()
    return Shift(x.apply(weighted).terms, False, unweighted, has_mask=x.has_mask)


def _shift_of_dot(equation: Any, operands: list[Any]) -> Shift | None:
    a, b = operands
    contracted, batch = equation.params["dimension_numbers"]
    num_batch = len(batch[0])
    shifts, num_free = [], 0
    for i, variable in enumerate(equation.invars):
        is_free = lambda axis, i=i: axis not in (*contracted[i], *batch[i])
        free = list(filter(is_free, range(variable.aval.ndim)))
        new_axes = {axis: k for k, axis in enumerate(batch[i])}
        new_axes |= {axis: num_batch + num_free + k for k, axis in enumerate(free)}
        num_free += len(free)
        shifts.append(_move(operands[i].shift, new_axes))
    x, y = shifts
    if x is None or y is None:
        return None
    if all(shift.is_factor or not shift.terms for shift in (x, y)):
        return add_shifts(x, y, 1, True)
    weights = a if y.terms else b
    is_mean = weights.is_constant and weights.constant is None
    if (x.terms and y.terms) or not is_mean or len(contracted[0]) != 1:
        return None
    x = x if x.terms else y
    return None if x.has_mask else Shift(x.terms)


def _sum_shift(x: Shift, shape: Sequence[int], axes: Collection[int]) -> Shift:
    """Returns the sum of a shift over axes, exact but for the mean over weights."""
    terms, mean_axes = x.terms, set()
    if x.unweighted:
        mean_axes = (x.axes - _axes_of(x.unweighted)) & set(axes)
        terms = x.unweighted if len(mean_axes) == 1 else terms
    remaining = [i for i in range(len(shape)) if i not in axes]

    def summed(value: StoppedValue) -> StoppedValue:
        positions = [k for k, axis in enumerate(value.axes) if axis in axes]
        identity = (
            identity_of("sum", value.identity, positions)
            if positions
            else value.identity
        )
        new_axes = tuple(remaining.index(i) for i in value.axes if i not in axes)
        return StoppedValue(identity, new_axes, value.lost)

    def num_summed(value: StoppedValue) -> int:
        is_mean = terms is x.unweighted
        counted = set(axes) - set(value.axes) - (mean_axes if is_mean else set())
        return math.prod(shape[i] for i in counted)

    return Shift(_collect((summed(v), num_summed(v) * n) for v, n in terms))


def _move(x: Shift, new_axes: dict[int, int]) -> Shift | None:
    """Returns a shift whose axes have moved, or None if it varies along a lost one."""
    if not x.axes <= new_axes.keys():
        return None
    axes = lambda value: tuple(new_axes[i] for i in value.axes)
    return x.apply(lambda value: dataclasses.replace(value, axes=axes(value)))


def _new_axes(equation: Any) -> dict[int, int]:
    """Returns the new place of each axis that an operation of `MOVES` leaves whole."""
    name, params = equation.primitive.name, equation.params
    shape, new_shape = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    same = lambda axes: {i: i for i in axes}
    axes = range(len(shape))
    match name:
        case "broadcast_in_dim":
            pairs = enumerate(params["broadcast_dimensions"])
            return {i: j for i, j in pairs if shape[i] == new_shape[j]}
        case "transpose":
            return {i: j for j, i in enumerate(params["permutation"])}
        case "squeeze" | "reduce_max" | "reduce_min" | "reduce_sum":
            removed = params["dimensions" if name == "squeeze" else "axes"]
            return {i: j for j, i in enumerate(i for i in axes if i not in removed)}
        case "reshape":
            return _reshaped_axes(shape, new_shape)
        case "gather":
            return _gathered_axes(params, shape, new_shape)
        case "slice" | "dynamic_slice":
            return same(i for i in axes if shape[i] == new_shape[i])
        case "dynamic_update_slice":
            updated = equation.invars[1].aval.shape
            return same(i for i in axes if shape[i] == updated[i])
        case "pad":
            return same(i for i in axes if not any(params["padding_config"][i]))
        case "concatenate":
            return same(i for i in axes if i != params["dimension"])
        case "cumsum":
            return same(i for i in axes if i != params["axis"])
        case "rev":
            return same(i for i in axes if i not in params["dimensions"])
        case "scatter":
            return {}
    return same(axes)


def _reshaped_axes(shape: Sequence[int], new_shape: Sequence[int]) -> dict[int, int]:
    """Returns the axes that a reshape neither merges nor splits."""
    size_before = lambda shape, i: math.prod(shape[:i])
    return {
        i: j
        for i, n in enumerate(shape)
        for j, m in enumerate(new_shape)
        if n == m > 1 and size_before(shape, i) == size_before(new_shape, j)
    }


def _gathered_axes(
    params: Any, shape: Sequence[int], new_shape: Sequence[int]
) -> dict[int, int]:
    """Returns the axes that a gather takes whole or as a batch."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    batched = numbers.operand_batching_dims
    removed = (*numbers.collapsed_slice_dims, *batched)
    remaining = [i for i in range(len(shape)) if i not in removed]
    offsets = dict(zip(remaining, numbers.offset_dims, strict=True))
    new_axes = {i: j for i, j in offsets.items() if sizes[i] == shape[i]}
    batch = [j for j in range(len(new_shape)) if j not in numbers.offset_dims]
    pairs = zip(batched, numbers.start_indices_batching_dims, strict=True)
    return new_axes | {i: batch[k] for i, k in pairs}
