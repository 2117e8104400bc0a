"""Derivatives that are lost on the way from an input to a result, read from a jaxpr.

JAX returns a zero derivative for `jax.lax.stop_gradient`, `sign`, `round`, comparisons,
``argmax`` and casts to integers. Where a float is computed from such a result, its
derivative lacks a term, and nothing in the numbers shows it. The predicate of ``where``
and the index of ``x[i]`` select a number whose derivative is complete almost
everywhere, as in ReLU and in sorting; they lose the derivative of an input only if it
enters the result in no other way, or if they select among constants, as a count does.
Functions with a derivative of their own (`jax.custom_jvp`, `jax.custom_vjp`) are taken
at their word, and so is `without_derivative`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal  # pyright: ignore
from jax.extend.source_info_util import summarize
from jax.interpreters import partial_eval
from jaxtyping import PyTree

from .dependence import NONE, Dependence, LostDerivative
from .inspection import (
    CALLS,
    COMPARISONS,
    CONSTANTS,
    CUSTOM_RULES,
    LAYOUT,
    MAXIMA,
    PIECEWISE_CONSTANT,
    PIECEWISE_SMOOTH,
    SUMS,
    WITH_INTEGERS,
    inner_jaxprs,
    is_of_jax,
    is_operand_of_branch,
    locations_of_ties,
    scan_lengths,
)
from .stopped_shifts import (
    NO_SHIFT,
    SAME_ELEMENTS,
    Shift,
    StoppedValue,
    add_shifts,
    common_shift,
    identity_of,
    identity_of_result,
    repeated_axes,
    shift_of_result,
    varying_axes,
)

#: Numbers of values of which nothing is known.
NEW_IDENTITIES = itertools.count()


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
    results = [x.with_stopped() for x in _trace_jaxpr(jaxpr, inputs)]
    leaves, lost, selectors, *_ = _merge(results)
    ties = locations_of_ties(closed_jaxpr.jaxpr)
    is_tie = lambda x: x.operation in COMPARISONS and x.location in ties
    lost = frozenset(x for x in lost if not (is_tie(x) and x.leaf in leaves))
    return leaves, lost | {x for x in selectors if x.leaf not in leaves}


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _merge(dependences: Sequence[Dependence]) -> Dependence:
    """Returns the dependence of a value that is any of several."""
    shift = common_shift(dependences)
    if shift is None:
        dependences, shift = [x.with_stopped() for x in dependences], NO_SHIFT
    union = lambda sets: frozenset(itertools.chain.from_iterable(sets))
    leaves = union(x.leaves for x in dependences)
    lost = union(x.lost for x in dependences)
    return Dependence(
        leaves, lost, union(x.selectors for x in dependences), shift=shift
    )


def _trace_jaxpr(jaxpr: Jaxpr, inputs: Sequence[Dependence]) -> list[Dependence]:
    """Returns the dependence of each result of a jaxpr."""
    table = dict(zip(jaxpr.invars, map(_with_identity, inputs), strict=True))

    def read(x: Any) -> Dependence:
        if isinstance(x, Literal):
            return _literal(x)
        # The same constant of a cached jaxpr always has the same value.
        return table.get(x) or NONE._replace(identity=identity_of("constant", id(x)))

    for equation in jaxpr.eqns:
        operands = [read(x) for x in equation.invars]
        results = _with_identities(
            _trace_equation(equation, operands), equation, operands
        )
        results = [_with_location(x, equation, operands) for x in results]
        table.update(zip(equation.outvars, results, strict=True))
        table.update(_stored(equation, operands))
    return [read(x) for x in jaxpr.outvars]


def _stored(equation: Any, operands: list[Dependence]) -> dict[Any, Dependence]:
    """Returns the dependence of each mutable array, if an equation may change it.

    What an inner jaxpr stores is not followed; its derivative counts as lost.
    """
    refs = [x for x in equation.invars if type(x.aval).__name__ == "AbstractRef"]
    if not refs or equation.primitive.name == "get":
        return {}
    stored = _merge([x.with_stopped() for x in operands])
    if equation.primitive.name not in ("swap", "addupdate"):
        stored = _lose(equation, stored)
    return dict.fromkeys(refs, stored)


def _with_identity(dependence: Dependence) -> Dependence:
    """Returns the dependence with a new identity if it has none."""
    is_new = dependence.identity is None
    return dependence._replace(identity=next(NEW_IDENTITIES)) if is_new else dependence


def _literal(x: Any) -> Dependence:
    if np.ndim(x.val):
        return NONE._replace(identity=identity_of("literal", id(x.val)))
    identity = identity_of("literal", str(x.aval.dtype), x.val)
    constant = float(x.val) if np.isrealobj(x.val) else None
    return NONE._replace(identity=identity, constant=constant)


def _with_identities(
    results: list[Dependence], equation: Any, operands: list[Dependence]
) -> list[Dependence]:
    """Returns the results of an equation with their identities.

    Equal operations on equal operands have equal results. A value that a call returns
    keeps its identity, and a result of another jaxpr, such as a loop, has a new one.
    """
    name = equation.primitive.name
    if equation.effects or inner_jaxprs(equation):
        return list(map(_with_identity, results))
    identities = [x.identity for x in operands]
    results = [
        x._replace(identity=identity_of_result(equation, identities, i))
        for i, x in enumerate(results)
    ]
    if name in SAME_ELEMENTS and len(operands) == 1:
        constant = operands[0].constant
        repeated = repeated_axes(equation, operands[0].repeated)
        results = [x._replace(constant=constant, repeated=repeated) for x in results]
    return results


def _with_location(
    dependence: Dependence, equation: Any, operands: list[Dependence]
) -> Dependence:
    """Returns the dependence, with places for losses inside a function of JAX.

    An operation of a jitted function of JAX, such as `jax.numpy.round`, has no place in
    the code of the user, or that of an earlier call. It has that of its call, which is
    the equation.
    """
    lost_before = frozenset().union(*map(_all_losses, operands))
    is_call = equation.primitive.name == "jit"
    is_call_of_jax = is_call and any(map(is_of_jax, inner_jaxprs(equation)))
    has_place = lambda x: bool(x.location) and (x in lost_before or not is_call_of_jax)
    if all(map(has_place, _all_losses(dependence))):
        return dependence
    location = summarize(equation.source_info)
    locate = lambda lost: frozenset(
        x if has_place(x) else x._replace(location=location) for x in lost
    )
    relocate = lambda value: dataclasses.replace(value, lost=locate(value.lost))
    return dependence._replace(
        lost=locate(dependence.lost),
        selectors=locate(dependence.selectors),
        shift=dependence.shift.apply(relocate),
    )


def _all_losses(dependence: Dependence) -> frozenset[LostDerivative]:
    """Returns lost derivatives, those of selectors, and those of stopped maxima."""
    stopped = (value.lost for value, _ in dependence.shift.terms)
    return dependence.lost.union(dependence.selectors, *stopped)


def _trace_equation(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    """Returns the dependence of each result of an equation."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        num_consts, num_carry = scan_lengths(params, operands)
        _, results = _trace_loop(params["jaxpr"], operands, num_consts, num_carry)
        return list(map(_as_new_value, results))
    if name == "while":
        return _trace_while(params, operands)
    if name == "sort":
        num_keys = params["num_keys"]
        operands = list(map(_as_new_value, operands))
        keys, values = _merge(operands[:num_keys]), operands[num_keys:]
        order = _lose(equation, keys if keys.leaves else keys.as_ranks())
        return [keys] * num_keys + [x.selected_by(order) for x in values]
    if name == "cond":
        branches = [_trace_jaxpr(b.jaxpr, operands[1:]) for b in params["branches"]]
        results = map(_merge, zip(*branches, strict=True))
        return [result.selected_by(operands[0]) for result in results]
    if name == "optimization_barrier":
        return operands
    if is_operand_of_branch(equation, [x.identity for x in operands]):
        return [operands[-1]]
    if name == "custom_linear_solve":
        # The solver's own constants, such as a factorization, are not differentiated.
        lengths = params["const_lengths"]
        operands = list(map(_as_new_value, operands))
        operands = operands[: lengths.matvec] + operands[sum(lengths) :]
        products = _trace_jaxpr(params["jaxprs"].matvec.jaxpr, operands)
        total = _merge(operands + [x.with_stopped() for x in products])
        return [total] * len(equation.outvars)
    if name == "linear_solve":
        # Lineax stops the state of its solver, of which its rule needs no derivative.
        operands = list(map(_without_stops_of_lineax, operands))
    checkpointed = getattr(params.get("_prim"), "jaxpr", None)  # with jax_remat3
    if checkpointed is not None:
        return _trace_jaxpr(getattr(checkpointed, "jaxpr", checkpointed), operands)
    if params.get("name") in CONSTANTS:
        return [NONE] * len(equation.outvars)
    if name not in CUSTOM_RULES:
        for inner in inner_jaxprs(equation):
            inner = getattr(inner, "jaxpr", inner)
            if len(inner.invars) == len(operands):
                is_call = name in CALLS
                if not is_call:  # of elements or shards of the operands
                    operands = list(map(_as_new_value, operands))
                results = _trace_jaxpr(inner, operands)
                if not is_call:
                    results = list(map(_as_new_value, results))
                if _is_piecewise_smooth(params.get("name"), inner):
                    prev_lost = _merge(operands).lost
                    results = [_without_new_losses(x, prev_lost) for x in results]
                return results
    return [_trace_operation(equation, operands, x.aval) for x in equation.outvars]


def _as_new_value(dependence: Dependence) -> Dependence:
    """Returns a dependence without what identifies the value, such as its shift."""
    return _merge([dependence.with_stopped()])


def _without_stops_of_lineax(dependence: Dependence) -> Dependence:
    is_of_lineax = lambda x: "/lineax/_" in x.location.replace("\\", "/")
    lost = {x for x in dependence.lost if not is_of_lineax(x)}
    return dependence._replace(lost=frozenset(lost))


def _is_piecewise_smooth(name: str | None, jaxpr: Jaxpr) -> bool:
    return name in PIECEWISE_SMOOTH and is_of_jax(jaxpr)


def _without_new_losses(
    dependence: Dependence, prev_lost: frozenset[LostDerivative]
) -> Dependence:
    """Returns a dependence that loses only what was lost before, or all of a leaf."""
    is_complete = lambda x: x.leaf in dependence.leaves and x not in prev_lost
    lost = {x for x in dependence.lost if not is_complete(x)}
    return dependence._replace(lost=frozenset(lost))


def _trace_loop(
    body: ClosedJaxpr, operands: list[Dependence], num_consts: int, num_carry: int
) -> tuple[list[Dependence], list[Dependence]]:
    """Returns the dependence of the carry of a loop, and of the results of its body.

    The carry is any of the initial one and of those that the body returns.
    """
    carried = slice(num_consts, num_consts + num_carry)
    consts, carry = operands[:num_consts], [_merge([x]) for x in operands[carried]]
    rows = list(map(_as_new_value, operands[carried.stop :]))
    while True:
        results = _trace_jaxpr(body.jaxpr, [*consts, *carry, *rows])
        pairs = zip(carry, results[:num_carry], strict=True)
        new_carry = list(map(_merge, pairs))
        if new_carry == carry:
            return carry, results
        carry = new_carry


def _trace_while(
    params: dict[str, Any], operands: list[Dependence]
) -> list[Dependence]:
    """Returns the dependence of the results of a loop with a predicate."""
    cond_consts = operands[: params["cond_nconsts"]]
    operands = operands[params["cond_nconsts"] :]
    body, num_consts = params["body_jaxpr"], params["body_nconsts"]
    carry, _ = _trace_loop(body, operands, num_consts, len(operands) - num_consts)
    (predicate,) = _trace_jaxpr(params["cond_jaxpr"].jaxpr, cond_consts + carry)
    # The number of steps selects among the values that the steps change.
    pairs = zip(body.jaxpr.invars[num_consts:], body.jaxpr.outvars, strict=True)
    has_changed = [old is not new for old, new in pairs]
    return [
        x.selected_by(predicate) if changed else x
        for x, changed in zip(carry, has_changed, strict=True)
    ]


def _trace_operation(
    equation: Any, operands: list[Dependence], result: Any
) -> Dependence:
    """Returns the dependence of one result of an operation without inner jaxprs."""
    name = equation.primitive.name
    if name.startswith("scatter") and not any(x.leaves for x in operands):
        operands = [x.as_ranks() for x in operands]
    dtypes = [x.aval.dtype for x in equation.invars]
    is_float = [jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes]
    floats = list(itertools.compress(operands, is_float))
    selectors = [x for x, b in zip(operands, is_float, strict=True) if not b]
    if jnp.issubdtype(result.dtype, jnp.inexact):
        shift = NO_SHIFT
        if any(x.shift.terms for x in floats):
            rule = shift_of_result(equation, floats)
            if rule is None:
                floats = [x.with_stopped() for x in floats]
            else:
                shift = rule
        total = _merge([x._replace(shift=NO_SHIFT) for x in floats])
        if name in SUMS and result.size == 1 and total.leaves:
            # A term of a loss that is made of an order alone, such as a metric.
            choices = [x.selectors for x in floats if not x.leaves]
            orders = {x for x in itertools.chain(*choices) if x.operation == "sort"}
            total = total._replace(lost=total.lost | orders)
        choice = _merge(selectors)
        total = total._replace(shift=shift).selected_by(choice)
        if name in WITH_INTEGERS:
            total = total._replace(lost=total.lost | choice.lost)
        if not floats:  # a cast from integers
            total = choice.as_number()
        is_maximum = name in MAXIMA or (
            name in LAYOUT and all(x.is_maximum for x in floats if x[:3] != NONE[:3])
        )
        is_maximum = is_maximum and bool(total.leaves)
        if name == "stop_gradient" and is_maximum:
            lost = _lose(equation, total).lost - total.lost
            axes = varying_axes(result.shape, operands[0].repeated)
            value = StoppedValue(operands[0].identity, axes, lost)
            shift = add_shifts(total.shift, Shift(frozenset({(value, 1.0)})))
            return total._replace(leaves=frozenset(), is_maximum=True, shift=shift)
        if name not in PIECEWISE_CONSTANT:
            return total._replace(is_maximum=is_maximum)
    elif name in ("is_finite", "lu") or (
        name in ("eq", "ne") and equation.invars[0] is equation.invars[1]
    ):
        return NONE  # a test for NaN or a pivot, constant where a derivative exists
    else:
        total = _merge([x.with_stopped() for x in operands])
    return _lose(equation, total)


def _lose(equation: Any, dependence: Dependence) -> Dependence:
    """Returns the dependence of a result that has no derivative by the operands."""
    name, location = equation.primitive.name, summarize(equation.source_info)
    if name == "call_hi_primitive":
        name = type(equation.params["_prim"]).__name__.lower()
    lost = {LostDerivative(leaf, name, location) for leaf in dependence.leaves}
    return dependence._replace(leaves=frozenset(), lost=dependence.lost | lost)
