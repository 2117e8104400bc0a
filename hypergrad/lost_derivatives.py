"""Derivatives that are lost on the way from an input to a result, read from a jaxpr.

JAX returns a zero derivative for `jax.lax.stop_gradient`, `sign`, `round`, comparisons,
``argmax`` and casts to integers. Where a float is computed from such a result, its
derivative lacks a term, and nothing in the numbers shows it. A predicate of ``where``
or an index of ``x[i]`` loses nothing: the derivative of the selected number is complete
almost everywhere. Functions with a derivative of their own (`jax.custom_jvp`,
`jax.custom_vjp`) are taken at their word, and so is `without_derivative`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src.source_info_util import summarize
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal  # pyright: ignore
from jax.interpreters import partial_eval
from jaxtyping import PyTree


class LostDerivative(NamedTuple):
    """A derivative that JAX takes for zero.

    Attributes:
      leaf: Index of the input leaf.
      operation: Name of the operation, such as "stop_gradient".
      location: File, line and function of the operation.
    """

    leaf: int
    operation: str
    location: str


class Dependence(NamedTuple):
    """The dependence of a value on the inputs.

    Attributes:
      leaves: Input leaves from which a derivative arrives.
      lost: Derivatives that were lost on the way. The value of an integer depends on
        the inputs through these only.
      is_shift: True if the value is a maximum over an axis. A stopped gradient of a
        maximum is the shift of a stable softmax, which cancels in the result.
    """

    leaves: frozenset[int] = frozenset()
    lost: frozenset[LostDerivative] = frozenset()
    is_shift: bool = False

    def __or__(self, other: "Dependence") -> "Dependence":
        return Dependence(self.leaves | other.leaves, self.lost | other.lost)


#: Operations on floats whose derivative is zero wherever it exists.
PIECEWISE_CONSTANT = {"sign", "round", "floor", "ceil", "stop_gradient"}

#: Operations that only move or convert a value, so that a shift stays a shift.
LAYOUT = {
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "max",
    "reshape",
    "select_n",
    "squeeze",
    "transpose",
    "stop_gradient",
}

#: Operations with a derivative rule of their own, whose jaxpr is not entered.
CUSTOM_RULES = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}


def find_lost_derivatives(
    f: Callable[..., Any], *args: PyTree
) -> tuple[frozenset[int], frozenset[LostDerivative]]:
    """Returns the leaves of ``args`` with a derivative of ``f``, and what it lacks.

    Args:
      f: Function of ``args`` with float results.
      args: Pytrees of arrays, of which only shapes and dtypes are used. Leaves that are
        not floats have no derivative.

    Returns:
      The indices of the leaves from which a derivative reaches a result, and the
      derivatives that are lost before they do.
    """
    closed_jaxpr = jax.make_jaxpr(f)(*args)
    all_outputs = [True] * len(closed_jaxpr.jaxpr.outvars)
    # What no result uses cannot lose a derivative.
    jaxpr, is_used = partial_eval.dce_jaxpr(closed_jaxpr.jaxpr, all_outputs)
    inputs = [
        Dependence(frozenset({i}) if _is_float(x) else frozenset())
        for i, x in enumerate(jax.tree.leaves(args))
    ]
    inputs = [x for x, used in zip(inputs, is_used, strict=True) if used]
    result = _merge(_trace_jaxpr(jaxpr, inputs))
    return result.leaves, result.lost


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _merge(dependences: Sequence[Dependence]) -> Dependence:
    total = Dependence()
    for dependence in dependences:
        total = total | dependence
    return total


def _trace_jaxpr(jaxpr: Jaxpr, inputs: Sequence[Dependence]) -> list[Dependence]:
    """Returns the dependence of each result of a jaxpr."""
    table = dict(zip(jaxpr.invars, inputs, strict=True))
    read = lambda x: Dependence() if isinstance(x, Literal) else table.get(x, NONE)
    for equation in jaxpr.eqns:
        operands = [read(x) for x in equation.invars]
        results = _trace_equation(equation, operands)
        table.update(zip(equation.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]


NONE = Dependence()


def _trace_equation(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    """Returns the dependence of each result of an equation."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        num_consts, num_carry = _scan_lengths(params, operands)
        return _trace_loop(params["jaxpr"], operands, num_consts, num_carry)
    if name == "while":
        operands = operands[params["cond_nconsts"] :]
        num_consts = params["body_nconsts"]
        num_carry = len(operands) - num_consts
        return _trace_loop(params["body_jaxpr"], operands, num_consts, num_carry)
    if name == "cond":
        branches = [_trace_jaxpr(b.jaxpr, operands[1:]) for b in params["branches"]]
        return [_merge(results) for results in zip(*branches, strict=True)]
    if name == "custom_linear_solve":
        # The solver's own constants, such as a factorization, are not differentiated.
        lengths = params["const_lengths"]
        operands = operands[: lengths.matvec] + operands[sum(lengths) :]
        return [_merge(operands)] * len(equation.outvars)
    if params.get("name") == "without_derivative":
        return [NONE] * len(equation.outvars)
    if name not in CUSTOM_RULES:
        for inner in _inner_jaxprs(params):
            if len(inner.invars) == len(operands):
                return _trace_jaxpr(inner, operands)
    return [_trace_operation(equation, operands, x.aval) for x in equation.outvars]


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value


def _scan_lengths(
    params: dict[str, Any], operands: list[Dependence]
) -> tuple[int, int]:
    """Returns the numbers of constants and of carried values of a scan."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].update(operands).unpack()  # newer versions
    return len(list(consts)), len(list(carry))


def _trace_loop(
    body: ClosedJaxpr, operands: list[Dependence], num_consts: int, num_carry: int
) -> list[Dependence]:
    """Returns the dependence of the results of a loop, which repeats its body."""
    carried = slice(num_consts, num_consts + num_carry)
    carry = operands[carried]
    while True:
        operands = [*operands[:num_consts], *carry, *operands[carried.stop :]]
        results = _trace_jaxpr(body.jaxpr, operands)
        new_carry = [
            _merge(pair) for pair in zip(carry, results[:num_carry], strict=True)
        ]
        if [x[:2] for x in new_carry] == [x[:2] for x in carry]:
            return results
        carry = new_carry


def _trace_operation(
    equation: Any, operands: list[Dependence], result: Any
) -> Dependence:
    """Returns the dependence of one result of an operation without inner jaxprs."""
    name = equation.primitive.name
    is_float = lambda x: jnp.issubdtype(x.aval.dtype, jnp.inexact)
    floats = [
        operand
        for x, operand in zip(equation.invars, operands, strict=True)
        if is_float(x)
    ]
    discrete = [
        operand
        for x, operand in zip(equation.invars, operands, strict=True)
        if not is_float(x)
    ]
    if jnp.issubdtype(result.dtype, jnp.inexact):
        # Predicates and indices choose among floats, and lose nothing.
        total = _merge(floats) if floats else _merge(discrete)
        is_shift = name == "reduce_max" or (
            name in LAYOUT and all(x.is_shift for x in floats if x != NONE)
        )
        is_shift = is_shift and bool(total.leaves)
        if name == "stop_gradient" and is_shift:
            return Dependence(frozenset(), total.lost, is_shift)
        if name not in PIECEWISE_CONSTANT:
            return Dependence(total.leaves, total.lost, is_shift)
    elif name == "is_finite" or (
        name in ("eq", "ne") and equation.invars[0] is equation.invars[1]
    ):
        return NONE  # a test for NaN, which is constant where a derivative exists
    else:
        total = _merge(operands)
    location = summarize(equation.source_info)
    lost = {LostDerivative(leaf, name, location) for leaf in total.leaves}
    return Dependence(frozenset(), total.lost | lost)
