"""Floating-point operations, by a walk of the traced program.

XLA's own cost analysis counts the body of a loop once, whatever its length; here the
body of a scan is multiplied by its length, and a loop of unknown length is kept apart.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.source_info_util import summarize
from jax.interpreters import partial_eval

# One operation for each number that comes out.
ELEMENTWISE = {
    *("abs", "add", "add_any", "ceil", "clamp", "div", "eq", "eq_to", "floor", "ge"),
    *("gt", "integer_pow", "is_finite", "le", "le_to", "lt", "lt_to", "max", "min"),
    *("mul", "ne", "neg", "nextafter", "one_minus_square", "pmax", "pmin", "psum"),
    *("psum_invariant", "rem", "round", "sign", "square", "sub"),
}
TRANSCENDENTAL = {
    *("acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e"),
    *("bessel_i1e", "cbrt", "cos", "cosh", "digamma", "erf", "erf_inv", "erfc", "exp"),
    *("exp2", "expm1", "lgamma", "log", "log1p", "log2", "logistic", "pow", "rsqrt"),
    *("sin", "sinh", "sqrt", "tan", "tanh"),
}
# One for each number that goes in.
REDUCTIONS = {
    *("argmax", "argmin", "cummax", "cummin", "cumprod", "cumsum"),
    *("reduce_max", "reduce_min", "reduce_prod", "reduce_sum"),
}
# One for each number that arrives.
SCATTERS = {
    f"scatter{dash}{what}" for dash in "-_" for what in ("add", "max", "min", "mul")
}
# Numbers that are moved, chosen or made anew.
FREE = {
    *("all_gather", "all_gather_invariant", "all_to_all", "axis_index"),
    *("bitcast_convert_type", "broadcast_in_dim", "complex", "concatenate", "conj"),
    *("convert_element_type", "copy", "copy_p", "device_put", "dynamic_slice"),
    *("dynamic_update_slice", "empty", "empty2", "gather", "imag", "iota", "mesh_cast"),
    *("name", "optimization_barrier", "pad", "pbroadcast", "ppermute", "pvary", "real"),
    *("reduce_precision", "reshape", "reshard", "rev", "scatter", "select_n"),
    *("sharding_constraint", "slice", "split", "squeeze", "stack", "stop_gradient"),
    *("transpose", "unstack"),
}


class Loop(NamedTuple):
    """A loop whose length only a run tells.

    Attributes:
      where: the file, line and function that wrote it.
      flops: of one iteration, the test of its condition included.
      transcendentals: how many of these are exponentials and the like.
    """

    where: str
    flops: int
    transcendentals: int


class Flops(NamedTuple):
    """Floating-point operations of a program.

    Attributes:
      fixed: those that run a number of times that the program states.
      transcendentals: how many of these are exponentials, roots and the like, each of
        them one operation.
      loops: loops of unknown length, in the order of the program; one that stands in
        another has an entry of its own and no part in the other's.
      unknown: names of the operations on floating-point numbers that have no price
        here, sorted; they count nothing.
    """

    fixed: int
    transcendentals: int
    loops: tuple[Loop, ...]
    unknown: tuple[str, ...]

    def total(self, *iterations: float) -> float:
        """All operations, where each of ``loops`` made so many iterations in all."""
        if len(iterations) != len(self.loops):
            places = "; ".join(loop.where for loop in self.loops) or "none"
            raise ValueError(
                f"total takes the iterations of each loop of unknown length, "
                f"{len(self.loops)} numbers, got {len(iterations)}; loops: {places}"
            )
        pairs = zip(self.loops, iterations, strict=True)
        return self.fixed + sum(loop.flops * n for loop, n in pairs)


NOTHING = Flops(0, 0, (), ())


def flops(function: Callable, *args: Any) -> Flops:
    """Floating-point operations of ``function(*args)``, which is traced and not run.

    What no output needs is not counted. A product of an ``[m, k]`` and a ``[k, n]``
    matrix counts ``2 m n k``; a convolution 2 for each pair of numbers that meet,
    padding left out; Cholesky, LU and triangular solves their leading terms.
    Elementwise operations count 1 for each number that comes out, exponentials and
    roots too; reductions 1 for each that goes in; sorting ``n log2 n``. Moving numbers
    counts nothing, nor does integer arithmetic. Of a conditional the dearest branch
    counts, what `jax.checkpoint` makes again counts again, and of `jax.shard_map` all
    devices count.

    Args:
      function: any that JAX can trace, such as a step, an estimate or a whole run.
      args: arrays, pytrees of them, or `jax.ShapeDtypeStruct`.

    Cost: one trace. Bias: what the compiler merges or makes twice is not seen.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> def power(A, x):
    ...     return jax.lax.scan(lambda x, _: (A @ x, None), x, length=10)[0]
    >>> hg.cost.flops(power, jnp.ones((3, 3)), jnp.ones(3)).total()
    180
    """
    return count_jaxpr_flops(jax.make_jaxpr(function)(*args))


def count_jaxpr_flops(jaxpr: Any) -> Flops:
    """Of what the outputs need; a loop's body is cleared here, not from outside."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    outputs = [True] * len(jaxpr.outvars)
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, outputs, instantiate=True)
    return functools.reduce(_plus, map(_of_equation, jaxpr.eqns), NOTHING)


def _plus(a: Flops, b: Flops) -> Flops:
    """One after the other; a loop that is in both needs one entry: iterations add."""
    return Flops(
        a.fixed + b.fixed,
        a.transcendentals + b.transcendentals,
        tuple(dict.fromkeys(a.loops + b.loops)),
        tuple(sorted({*a.unknown, *b.unknown})),
    )


def _times(n: int, a: Flops) -> Flops:
    """``n`` times over; the iterations of loops are counted over all of them."""
    return a._replace(fixed=n * a.fixed, transcendentals=n * a.transcendentals)


def _of_equation(equation: Any) -> Flops:
    name, params = equation.primitive.name, equation.params
    match name:
        case "scan":
            return _times(params["length"], count_jaxpr_flops(params["jaxpr"]))
        case "while":
            return _of_while(equation)
        case "cond":
            return _dearest(
                [count_jaxpr_flops(branch) for branch in params["branches"]]
            )
        case "custom_linear_solve":
            return count_jaxpr_flops(params["jaxprs"].solve)
        case "shard_map":
            axes = params.get("newly_manual_axes", params.get("manual_axes", ()))
            devices = math.prod(params["mesh"].shape[axis] for axis in axes)
            return _times(devices, count_jaxpr_flops(params["jaxpr"]))
        case "call_hi_primitive":  # one that says by others what it is, such as frexp
            inputs = [v.aval for v in equation.invars]
            return count_jaxpr_flops(jax.make_jaxpr(params["_prim"].expand)(*inputs))
    inner = called(equation)
    return _of_primitive(equation) if inner is None else count_jaxpr_flops(inner)


def _of_while(equation: Any) -> Flops:
    """The condition is tested once more than the body runs."""
    test = count_jaxpr_flops(equation.params["cond_jaxpr"])
    once = _plus(test, count_jaxpr_flops(equation.params["body_jaxpr"]))
    where = summarize(equation.source_info) or "inside jax"
    loop = Loop(where, once.fixed, once.transcendentals)
    return test._replace(
        loops=((loop,) if loop.flops else ()) + once.loops, unknown=once.unknown
    )


def _dearest(branches: list[Flops]) -> Flops:
    """The branch with most; the loops of all, of which those not taken make none."""
    all_of_them = functools.reduce(_plus, branches)
    dearest = max(branches, key=lambda branch: branch.fixed)
    return dearest._replace(loops=all_of_them.loops, unknown=all_of_them.unknown)


def called(equation: Any) -> Any:
    """The jaxpr that a call runs once: it takes and returns what the equation does.

    By structure, since names (jit, remat2, custom_vjp_call, ...) differ by version.
    """
    shapes = lambda variables: [getattr(v.aval, "shape", None) for v in variables]
    for value in equation.params.values():
        jaxpr = getattr(value, "jaxpr", value)
        if (
            hasattr(jaxpr, "eqns")
            and shapes(jaxpr.invars) == shapes(equation.invars)
            and shapes(jaxpr.outvars) == shapes(equation.outvars)
        ):
            return jaxpr
    return None


def _of_primitive(equation: Any) -> Flops:
    name = equation.primitive.name
    operands = [v.aval for v in (*equation.invars, *equation.outvars)]
    is_a = lambda kind: any(
        jnp.issubdtype(aval.dtype, kind) for aval in operands if hasattr(aval, "dtype")
    )
    if name in FREE or not is_a(jnp.inexact):
        return NOTHING
    n = None if is_a(jnp.complexfloating) else _price(equation)
    if n is None:
        return Flops(0, 0, (), (name,))
    return Flops(n, n if name in TRANSCENDENTAL else 0, (), ())


def _price(equation: Any) -> int | None:
    """Operations of one equation on real numbers; None where not known."""
    name, params = equation.primitive.name, equation.params
    inputs, out = [v.aval for v in equation.invars], equation.outvars[0].aval
    if name in ELEMENTWISE | TRANSCENDENTAL:
        return sum(v.aval.size for v in equation.outvars)
    if name in REDUCTIONS:
        return inputs[0].size
    if name in SCATTERS:
        return inputs[2].size
    match name:
        case "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            if not contracted:  # an outer product adds nothing up
                return out.size
            return 2 * out.size * math.prod(inputs[0].shape[i] for i in contracted)
        case "conv_general_dilated":
            return _of_convolution(params, inputs[0].shape, inputs[1].shape, out.shape)
        case "reduce_window_max" | "reduce_window_min" | "reduce_window_sum":
            return out.size * math.prod(params["window_dimensions"])
        case "select_and_scatter_add":
            return inputs[0].size * math.prod(params["window_dimensions"])
        case "sort" | "top_k":
            n = inputs[0].shape[params.get("dimension", -1)]
            return inputs[0].size * math.ceil(math.log2(max(n, 1)))
        case "cholesky":
            return inputs[0].size * inputs[0].shape[-1] // 3
        case "lu":
            k, l = sorted(inputs[0].shape[-2:])
            return math.prod(inputs[0].shape[:-2]) * k**2 * (3 * l - k) // 3
        case "triangular_solve":
            return inputs[1].size * inputs[0].shape[-1]
    return None


def _of_convolution(params: Any, inputs: Any, kernel: Any, outputs: Any) -> int:
    """2 for each input that meets a kernel entry, neither padding nor a hole."""
    dims = params["dimension_numbers"]
    along = lambda shape, spec: [shape[i] for i in spec[2:]]
    pairs = map(
        _meetings,
        along(inputs, dims.lhs_spec),
        along(kernel, dims.rhs_spec),
        along(outputs, dims.out_spec),
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
    )
    batch, features = (outputs[i] for i in dims.out_spec[:2])
    return 2 * batch * features * kernel[dims.rhs_spec[1]] * math.prod(pairs)


def _meetings(
    n: int, kernel: int, out: int, stride: int, padding: Any, hole: int, spread: int
) -> int:
    """Along one axis: how often an output's kernel entry lies on an input."""
    start = stride * np.arange(out)[:, None] - padding[0]
    at = start + spread * np.arange(kernel)
    return int(np.sum((at >= 0) & (at <= hole * (n - 1)) & (at % hole == 0)))
