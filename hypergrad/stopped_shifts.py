"""Stopped maxima that cancel, such as the shift of a stable softmax, read from a jaxpr.

A value is followed as ``v + s`` or as ``v exp(s)``, where ``s`` is a sum of stopped
maxima with integer coefficients. Where the coefficients of a result are zero, a stopped
maximum has cancelled, and no derivative is lost. Weights and divisors without a
derivative, such as labels, are taken for a mean, which leaves a shift unchanged; so
are sums over an axis.
"""

import math
from collections import Counter
from typing import Any, NamedTuple

from jax.extend.core import Literal  # pyright: ignore

#: A guard such as ``+ 1e-9`` in a divisor hides nothing of a derivative, because the
#: exponentials of shifted values add up to 1 at least.
MAX_GUARD = 1e-6

#: Operations that leave a shift as it is.
UNCHANGED = {
    "abs",
    "broadcast_in_dim",
    "concatenate",
    "convert_element_type",
    "copy",
    "cumsum",
    "dynamic_slice",
    "dynamic_update_slice",
    "expand_dims",
    "gather",
    "pad",
    "reduce_max",
    "reduce_min",
    "reduce_precision",
    "reduce_sum",
    "reshape",
    "rev",
    "scatter",
    "scatter-add",
    "select_n",
    "slice",
    "squeeze",
    "stop_gradient",
    "transpose",
}


class Shift(NamedTuple):
    """A sum of stopped values that is added, or whose exponential is a factor.

    Attributes:
      terms: Pairs of a stopped value and its coefficient, which is not zero. A stopped
        value is a pair of its variable, None for the maximum itself, and the
        derivatives that it has lost.
      is_factor: Whether the value is ``v exp(s)`` instead of ``v + s``.
    """

    terms: frozenset[tuple[Any, int]] = frozenset()
    is_factor: bool = False


NO_SHIFT = Shift()


def add_shifts(x: Shift, y: Shift, factor: int = 1, is_factor: bool = False) -> Shift:
    """Returns ``x + factor * y``."""
    total = Counter(dict(x.terms))
    for stopped, coefficient in y.terms:
        total[stopped] += factor * coefficient
    terms = frozenset((key, n) for key, n in total.items() if n)
    return Shift(terms, is_factor and bool(terms))


def shift_of_result(
    equation: Any, operands: list[tuple[Any, Shift, bool]]
) -> Shift | None:
    """Returns the shift of the result of an operation, or None without a rule.

    Args:
      equation: The equation of the jaxpr.
      operands: For each float operand, its variable, its shift, and whether it is a
        constant.
    """
    name = equation.primitive.name
    shifts = [shift for _, shift, _ in operands]
    x, is_factor = shifts[0], any(shift.is_factor for shift in shifts)
    if name in ("add", "add_any", "sub", "max", "min"):
        return _shift_of_sum(name, operands)
    if name in ("mul", "div", "dot_general"):
        return _shift_of_product(equation, operands)
    if name == "neg":
        return x if is_factor else add_shifts(NO_SHIFT, x, -1)
    if name in ("exp", "exp2"):
        return None if is_factor else Shift(x.terms, True)
    if name == "log" and is_factor:
        return Shift(x.terms)
    if name == "integer_pow" and is_factor:
        return add_shifts(NO_SHIFT, x, equation.params["y"], True)
    if name == "abs" and not is_factor:
        return None
    if name in UNCHANGED:
        different = {shift for _, shift, is_constant in operands if not is_constant}
        return different.pop() if len(different) == 1 else None
    return None


def _shift_of_sum(name: str, operands: list[tuple[Any, Shift, bool]]) -> Shift | None:
    (a, x, _), (b, y, _) = operands
    if _is_guard(a) or _is_guard(b):
        return y if _is_guard(a) else x
    if x.is_factor or y.is_factor or name in ("max", "min"):
        return x if x == y else None
    return add_shifts(x, y, -1 if name == "sub" else 1)


def _is_guard(x: Any) -> bool:
    return isinstance(x, Literal) and bool(
        abs(float(x.val)) <= MAX_GUARD or math.isinf(float(x.val))
    )


def _shift_of_product(
    equation: Any, operands: list[tuple[Any, Shift, bool]]
) -> Shift | None:
    if len(operands) != 2:
        return None
    (a, x, a_is_constant), (b, y, b_is_constant) = operands
    is_quotient = equation.primitive.name == "div"
    if all(shift.is_factor or not shift.terms for shift in (x, y)):
        return add_shifts(x, y, -1 if is_quotient else 1, True)
    if (x.terms and y.terms) or (is_quotient and y.terms):
        return None
    if y.terms:
        b, x, b_is_constant = a, y, a_is_constant
    if not b_is_constant:
        # A shift by another stopped value, which loses the same derivatives.
        lost = frozenset().union(*(stopped[1] for stopped, _ in x.terms))
        return Shift(frozenset({((equation.outvars[0], lost), 1)}))
    is_negative = isinstance(b, Literal) and float(b.val) < 0
    return add_shifts(NO_SHIFT, x, -1 if is_negative else 1)
