"""Facts about a function that are read from its jaxpr: what it uses and holds."""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.extend.core import Jaxpr, Literal  # pyright: ignore
from jax.extend.source_info_util import summarize
from jax.interpreters import partial_eval
from jaxtyping import PyTree

from ..products import Loss
from ..validation import is_traced
from .stopped_shifts import Stopped

#: Operations whose result is a maximum, and those that compare.
MAXIMA = {"reduce_max", "reduce_min", "max", "min"}
COMPARISONS = {"eq", "ge", "gt", "le", "lt", "ne"}

#: Operations on floats whose derivative is zero wherever it exists.
PIECEWISE_CONSTANT = {
    "sign", "round", "floor", "ceil", "stop_gradient", "bitcast_convert_type",
}  # fmt: skip

#: Operations that add two terms.
SUMS = {"add", "add_any", "sub"}

#: Operations that only move or convert a value, so that a maximum stays one.
LAYOUT = {
    "broadcast_in_dim", "convert_element_type", "copy", "max", "reshape", "select_n",
    "squeeze", "transpose", "stop_gradient",
}  # fmt: skip

#: Calls of a jaxpr, whose values are those of the operands and results.
CALLS = {"jit", "remat2", "closed_call"}

#: Operations in which an integer operand is a value and not an index. The second is
#: `jnp.ldexp`.
WITH_INTEGERS = {"pow", "call_hi_primitive"}

#: Operations with a derivative rule of their own, whose jaxpr is not entered.
CUSTOM_RULES = {"custom_jvp_call", "custom_vjp_call"}

#: Functions by the names of their jaxprs whose results count as constants. The sign of
#: the gamma function changes only at its poles.
CONSTANTS = {"without_derivative", "gammasgn"}

#: Functions of JAX by the names of their jaxprs. Each is continuous, and made of pieces
#: with complete derivatives that a rounding, a comparison or an index chooses.
PIECEWISE_SMOOTH = {
    "_interp", "_map_coordinates", "expm", "sinc", "quantile", "percentile",
    "nanquantile", "nanpercentile", "_truncated_normal", "_betaln",
}  # fmt: skip


def used_inputs(f: Callable[..., Any], *args: PyTree) -> Sequence[bool]:
    """Returns, for each leaf of ``args``, whether ``f`` uses it."""
    closed_jaxpr = jax.make_jaxpr(f)(*args)
    all_outputs = [True] * len(closed_jaxpr.jaxpr.outvars)
    return partial_eval.dce_jaxpr(closed_jaxpr.jaxpr, all_outputs)[1]


def constant_outputs(f: Callable[..., Any], *args: PyTree) -> list[np.ndarray | None]:
    """Returns the value of each output of ``f`` that no input reaches, or else None.

    Args:
      f: Function of pytrees of arrays.
      args: Its arguments, or their shapes.
    """
    closed_jaxpr = jax.make_jaxpr(f)(*args)
    jaxpr, consts = closed_jaxpr.jaxpr, closed_jaxpr.consts
    num_outputs, values = len(jaxpr.outvars), []
    for i in range(num_outputs):
        only_i = [i == j for j in range(num_outputs)]
        pruned_jaxpr, is_used = partial_eval.dce_jaxpr(jaxpr, only_i)
        if any(is_used) or any(map(is_traced, consts)):
            values.append(None)
            continue
        with jax.ensure_compile_time_eval():
            (value,) = core.jaxpr_as_fun(core.ClosedJaxpr(pruned_jaxpr, consts))()  # pyright: ignore
        values.append(np.asarray(value))
    return values


def unused_leaves(f: Callable[[PyTree], Any], alpha: PyTree) -> str:
    """Returns the names of the leaves of ``alpha`` that ``f(alpha)`` does not use."""
    return leaf_names("alpha", alpha, map(operator.not_, used_inputs(f, alpha)))


def leaf_names(name: str, tree: PyTree, is_named: Iterable[bool]) -> str:
    """Returns the names of leaves, such as "alpha['rate'], alpha['decay']"."""
    paths = [path for path, _ in jax.tree.leaves_with_path(tree)]
    pairs = zip(paths, is_named, strict=True)
    return ", ".join(f"{name}{jax.tree_util.keystr(p)}" for p, named in pairs if named)


def uses_w(loss: Loss, w: PyTree, alpha: PyTree, batch: PyTree) -> bool:
    """Returns True if the loss uses any leaf of ``w``."""
    return any(used_inputs(loss, w, alpha, batch)[: len(jax.tree.leaves(w))])


def alpha_has_gradient(
    loss: Loss, w: PyTree, alpha: PyTree, batch: PyTree
) -> Sequence[bool]:
    """Returns, for each leaf of ``alpha``, whether a derivative of the loss reaches it.

    The derivative by a leaf that only `jax.lax.stop_gradient` or a comparison sees does
    not depend on the cotangent of the loss.
    """

    def transposed(w, alpha, batch, cotangent):
        return jax.vjp(lambda alpha: loss(w, alpha, batch), alpha)[1](cotangent)

    cotangent = jax.eval_shape(loss, w, alpha, batch)
    jaxpr = jax.make_jaxpr(transposed)(w, alpha, batch, cotangent).jaxpr
    num_outputs = len(jaxpr.outvars)
    only = lambda i: [i == j for j in range(num_outputs)]
    return [partial_eval.dce_jaxpr(jaxpr, only(i))[1][-1] for i in range(num_outputs)]


def constant_bytes(f: Callable[..., Any], *args: PyTree, **kwargs: PyTree) -> int:
    """Returns the bytes of the arrays that ``f`` closes over."""
    constants = _constants(jax.make_jaxpr(f)(*args, **kwargs))
    # A literal array has an entry for each of its uses.
    arrays = {id(x): x for x in constants if hasattr(x, "dtype")}
    return sum(np.size(x) * x.dtype.itemsize for x in arrays.values())


def _constants(jaxpr: Any) -> Iterator[Any]:
    """Yields constants and literal arrays of a jaxpr, and of the jaxprs within it."""
    yield from getattr(jaxpr, "consts", ())
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    variables = [x for equation in jaxpr.eqns for x in equation.invars]
    for x in (*variables, *jaxpr.outvars):
        if isinstance(x, Literal) and np.ndim(x.val):
            yield x.val
    for equation in jaxpr.eqns:
        for inner in inner_jaxprs(equation):
            yield from _constants(inner)


def inner_jaxprs(equation: Any) -> list[Any]:
    """Returns the jaxprs in the parameters of an equation, at any depth."""
    is_jaxpr = lambda x: hasattr(x, "eqns")
    params = jax.tree.leaves(equation.params, is_leaf=is_jaxpr)
    return list(filter(is_jaxpr, params))


def locations_of_ties(jaxpr: Any) -> set[str]:
    """Returns the locations of maxima whose derivative the function itself computes.

    The derivative of a maximum compares its operands, at the location of the maximum,
    and that of ``abs`` compares its operand with 0.
    """
    maxima, comparisons = set(), set()
    jaxprs = [(jaxpr, "", False)]
    while jaxprs:
        jaxpr, location_of_call, is_derivative_call = jaxprs.pop()
        for equation in jaxpr.eqns:
            name, source = equation.primitive.name, equation.source_info
            location = location_of_call or summarize(source)
            is_derivative = is_derivative_call or "jvp" in str(source.name_stack)
            if name in MAXIMA or name == "abs":
                maxima.add(location)
            elif name in COMPARISONS and is_derivative:
                comparisons.add(location)
            for inner in inner_jaxprs(equation):
                # A function of JAX has no place in the code of the user.
                is_jitted = name == "jit" and is_of_jax(inner)
                jaxprs.append((inner, location if is_jitted else "", is_derivative))
    return maxima & comparisons - {""}


def scan_lengths(params: dict[str, Any], operands: Sequence[Any]) -> tuple[int, int]:
    """Returns the numbers of constants and of carried values of a scan."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].update(operands).unpack()  # newer versions
    return len(list(consts)), len(list(carry))


def is_of_jax(jaxpr: Jaxpr) -> bool:
    """Returns True if the function of a jaxpr is defined in JAX."""
    return _is_file_of_jax(jaxpr.debug_info.func_src_info or "")


def _is_file_of_jax(source: str) -> bool:
    return "/jax/_src/" in source.replace("\\", "/")


def is_operand_of_branch(equation: Any, identities: Sequence[Any]) -> bool:
    """Returns True for a selection that stands for the operand of a batched `cond`.

    JAX computes all branches of a batched `cond` or `switch`. It passes
    ``select(p, x, stop_gradient(x))`` to a branch instead of ``x``, or
    ``select(p, x, x)`` for integers, and takes the result of the branch only where
    ``p`` holds. The selection is then ``x``.

    Args:
      equation: The equation of the jaxpr.
      identities: Those of its operands, by `identity_of_result`.
    """
    if equation.primitive.name != "select_n" or len(identities) != 3:
        return False
    _, on_false, on_true = identities
    return on_false in (on_true, Stopped(on_true)) and _is_made_by_cond(equation)


def _is_made_by_cond(equation: Any) -> bool:
    """Returns True if a rule of `jax.lax.cond` or `switch` has made an equation.

    Only functions of JAX are then called between the rule and the equation. Between a
    rule and an equation of a branch stands the function of the user.
    """
    traceback = equation.source_info.traceback
    for frame in traceback.frames if traceback else ():
        if not _is_file_of_jax(frame.file_name):
            return False
        if frame.file_name.endswith("conditionals.py"):
            return True
    return False
