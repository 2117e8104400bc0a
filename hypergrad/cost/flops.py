"""Floating-point operations, counted in the jaxpr of a function.

The cost analysis of XLA counts the body of a loop once, whatever its length. Here the
body of a scan is multiplied by its length, and loops of unknown length are listed.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.source_info_util import summarize
from jax.interpreters import partial_eval

# Primitives that make one operation per output element.
ELEMENTWISE = {
    *("abs", "add", "add_any", "ceil", "clamp", "div", "eq", "eq_to", "floor", "ge"),
    *("gt", "integer_pow", "is_finite", "le", "le_to", "lt", "lt_to", "max", "min"),
    *("mul", "ne", "neg", "nextafter", "one_minus_square", "pmax", "pmin", "psum"),
    *("psum_invariant", "rem", "round", "sign", "square", "sub"),
    *("acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e"),
    *("bessel_i1e", "cbrt", "cos", "cosh", "digamma", "erf", "erf_inv", "erfc", "exp"),
    *("exp2", "expm1", "lgamma", "log", "log1p", "log2", "logistic", "pow", "rsqrt"),
    *("sin", "sinh", "sqrt", "tan", "tanh"),
}
# One operation per input element.
REDUCTIONS = {
    *("argmax", "argmin", "cummax", "cummin", "cumprod", "cumsum"),
    *("reduce_max", "reduce_min", "reduce_prod", "reduce_sum"),
}
# One operation per element of the updates.
SCATTERS = {
    f"scatter{separator}{operation}"
    for separator in "-_"
    for operation in ("add", "max", "min", "mul", "sub")
}
# No operation: elements are moved, selected or created.
FREE = {
    *("all_gather", "all_gather_invariant", "all_to_all", "axis_index"),
    *("bitcast_convert_type", "broadcast_in_dim", "complex", "concatenate", "conj"),
    *("convert_element_type", "copy", "copy_p", "device_put", "dynamic_slice"),
    *("dynamic_update_slice", "empty", "empty2", "gather", "imag", "iota", "mesh_cast"),
    *("name", "optimization_barrier", "pad", "pbroadcast", "ppermute", "pvary", "real"),
    *("reduce_precision", "reshape", "reshard", "rev", "scatter", "select_n"),
    *("sharding_constraint", "slice", "split", "squeeze", "stack", "stop_gradient"),
    *("tile", "transpose", "unstack"),
}


class WhileLoop(NamedTuple):
    """A loop whose number of iterations is known only after a run.

    Attributes:
      location: File, line and function that contain the loop.
      flops: Operations of one iteration, including the test of its condition.
    """

    location: str
    flops: int


class Flops(NamedTuple):
    """Floating-point operations of a program.

    Attributes:
      fixed: Operations that are made a known number of times.
      loops: Loops of unknown length, in program order. A loop inside another has its
        own entry and is not part of the entry of the other.
      unknown: Sorted names of the floating-point primitives that cannot be counted.
    """

    fixed: int
    loops: tuple[WhileLoop, ...]
    unknown: tuple[str, ...]

    def total(self, *iterations: float) -> float:
        """Returns all operations for the total number of iterations of each loop.

        Raises:
          ValueError: The number of arguments is not that of ``loops``.
        """
        if len(iterations) != len(self.loops):
            locations = "; ".join(loop.location for loop in self.loops) or "none"
            raise ValueError(
                "iterations must be one number per loop of unknown length, "
                f"{len(self.loops)} numbers; got {len(iterations)}. The loops are: "
                f"{locations}."
            )
        pairs = zip(self.loops, iterations, strict=True)
        return self.fixed + sum(loop.flops * n for loop, n in pairs)


NO_FLOPS = Flops(fixed=0, loops=(), unknown=())


def flops(function: Callable, *args: Any) -> Flops:
    """Counts the operations of ``function(*args)``, which is traced and not run.

    - Results that no output depends on are not counted.
    - A product of an ``[m, k]`` and a ``[k, n]`` matrix counts ``2 m n k``.
    - A convolution counts 2 per pair of input and kernel elements that are multiplied;
      padding is left out.
    - Cholesky, LU and triangular solves count their leading terms.
    - Elementwise operations count 1 per output element, exponentials and roots too.
    - Reductions count 1 per input element, and sorting counts ``n log2 n``.
    - Moving elements and integer arithmetic count nothing.
    - A conditional counts its most expensive branch.
    - What `jax.checkpoint` recomputes counts again.
    - `jax.shard_map` counts all devices.

    Args:
      function: Any function that JAX can trace, such as a step, an estimate or a whole
        run.
      args: Arrays, pytrees of arrays, or `jax.ShapeDtypeStruct`.

    Cost: one trace.
    Bias: operations that the compiler merges or repeats are not known.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> def power(A, x):
    ...     return jax.lax.scan(lambda x, _: (A @ x, None), x, length=10)[0]
    >>> hg.cost.flops(power, jnp.ones((3, 3)), jnp.ones(3)).total()
    180
    """
    return count_jaxpr_flops(jax.make_jaxpr(function)(*args))


def count_jaxpr_flops(jaxpr: Any) -> Flops:
    """Returns the operations of a jaxpr, without those that no output depends on."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    # Of a loop only the body itself can be reduced to what its outputs need.
    all_outputs = [True] * len(jaxpr.outvars)
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, all_outputs, instantiate=True)
    return functools.reduce(_add, map(_count_equation, jaxpr.eqns), NO_FLOPS)


def _add(a: Flops, b: Flops) -> Flops:
    """Returns the operations of both; equal loops share an entry for all iterations."""
    return Flops(
        a.fixed + b.fixed,
        tuple(dict.fromkeys(a.loops + b.loops)),
        tuple(sorted({*a.unknown, *b.unknown})),
    )


def _repeat(n: int, a: Flops) -> Flops:
    """Returns ``n`` times the fixed operations; loops count their own iterations."""
    return a._replace(fixed=n * a.fixed)


def _count_equation(equation: Any) -> Flops:
    name, params = equation.primitive.name, equation.params
    match name:
        case "scan":
            return _repeat(params["length"], count_jaxpr_flops(params["jaxpr"]))
        case "while":
            return _count_while(equation)
        case "cond":
            return _most_expensive(list(map(count_jaxpr_flops, params["branches"])))
        case "custom_linear_solve":
            return count_jaxpr_flops(params["jaxprs"].solve)
        case "shard_map":
            axes = params.get("newly_manual_axes", params.get("manual_axes", ()))
            num_devices = math.prod(params["mesh"].shape[axis] for axis in axes)
            device = _repeat(num_devices, count_jaxpr_flops(params["jaxpr"]))
            # An iteration of a loop is made by every device.
            loops = tuple(
                loop._replace(flops=num_devices * loop.flops) for loop in device.loops
            )
            return device._replace(loops=loops)
        case "call_hi_primitive":  # defined by other primitives, such as frexp
            inputs = [v.aval for v in equation.invars]
            return count_jaxpr_flops(jax.make_jaxpr(params["_prim"].expand)(*inputs))
    jaxpr = called_jaxpr(equation)
    return _count_primitive(equation) if jaxpr is None else count_jaxpr_flops(jaxpr)


def _count_while(equation: Any) -> Flops:
    """Returns a loop entry, and one test of the condition, which precedes the body."""
    test = count_jaxpr_flops(equation.params["cond_jaxpr"])
    iteration = _add(test, count_jaxpr_flops(equation.params["body_jaxpr"]))
    location = summarize(equation.source_info) or "inside jax"
    loop = WhileLoop(location, iteration.fixed)
    return test._replace(
        loops=((loop,) if loop.flops else ()) + iteration.loops,
        unknown=iteration.unknown,
    )


def _most_expensive(branches: list[Flops]) -> Flops:
    """Returns the branch with most operations, and the loops of all branches."""
    union = functools.reduce(_add, branches)
    branch = max(branches, key=lambda branch: branch.fixed)
    return branch._replace(loops=union.loops, unknown=union.unknown)


def called_jaxpr(equation: Any) -> Any:
    """Returns the jaxpr that an equation calls once, or None if it is not a call.

    A call is recognized by equal inputs and outputs, because the names of primitives
    (jit, remat2, custom_vjp_call, ...) differ between versions of JAX.
    """
    shapes = lambda variables: [getattr(v.aval, "shape", None) for v in variables]
    for param in equation.params.values():
        jaxpr = getattr(param, "jaxpr", param)
        if (
            hasattr(jaxpr, "eqns")
            and shapes(jaxpr.invars) == shapes(equation.invars)
            and shapes(jaxpr.outvars) == shapes(equation.outvars)
        ):
            return jaxpr
    return None


def _count_primitive(equation: Any) -> Flops:
    name = equation.primitive.name
    avals = [v.aval for v in (*equation.invars, *equation.outvars)]
    has_dtype = lambda kind: any(
        jnp.issubdtype(aval.dtype, kind) for aval in avals if hasattr(aval, "dtype")
    )
    # A print without outputs computes nothing.
    if name in FREE or not equation.outvars or not has_dtype(jnp.inexact):
        return NO_FLOPS
    n = None if has_dtype(jnp.complexfloating) else _num_operations(equation)
    if n is None:
        return NO_FLOPS._replace(unknown=(name,))
    return NO_FLOPS._replace(fixed=n)


def _num_operations(equation: Any) -> int | None:
    """Returns the operations of a primitive on real numbers; None if unknown."""
    name, params = equation.primitive.name, equation.params
    inputs, output = [v.aval for v in equation.invars], equation.outvars[0].aval
    if name in ELEMENTWISE:
        return sum(v.aval.size for v in equation.outvars)
    if name in REDUCTIONS:
        return inputs[0].size
    if name in SCATTERS:
        return inputs[2].size
    match name:
        case "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            if not contracted:  # An outer product makes no additions.
                return output.size
            return 2 * output.size * math.prod(inputs[0].shape[i] for i in contracted)
        case "conv_general_dilated":
            return _num_convolution_operations(
                params, inputs[0].shape, inputs[1].shape, output.shape
            )
        case "reduce_window_max" | "reduce_window_min" | "reduce_window_sum":
            return output.size * math.prod(params["window_dimensions"])
        case "select_and_scatter_add":
            return inputs[0].size * math.prod(params["window_dimensions"])
        case "sort" | "top_k":
            n = inputs[0].shape[params.get("dimension", params.get("axis", -1))]
            return inputs[0].size * math.ceil(math.log2(max(n, 1)))
        case "polynomial":  # by Horner's rule
            return 2 * output.size * (len(inputs) - 2)
        case "cholesky":
            return inputs[0].size * inputs[0].shape[-1] // 3
        case "lu":
            k, l = sorted(inputs[0].shape[-2:])
            return math.prod(inputs[0].shape[:-2]) * k**2 * (3 * l - k) // 3
        case "triangular_solve":
            return inputs[1].size * inputs[0].shape[-1]
    return None


def _num_convolution_operations(
    params: Any,
    input_shape: Sequence[int],
    kernel_shape: Sequence[int],
    output_shape: Sequence[int],
) -> int:
    """Returns 2 per pair of an input and a kernel element that are multiplied."""
    dimensions = params["dimension_numbers"]
    spatial = lambda shape, spec: [shape[i] for i in spec[2:]]
    num_pairs = map(
        _num_axis_pairs,
        spatial(input_shape, dimensions.lhs_spec),
        spatial(kernel_shape, dimensions.rhs_spec),
        spatial(output_shape, dimensions.out_spec),
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
    )
    num_channels = kernel_shape[dimensions.rhs_spec[1]]
    batch_size, num_features = (output_shape[i] for i in dimensions.out_spec[:2])
    return 2 * batch_size * num_features * num_channels * math.prod(num_pairs)


def _num_axis_pairs(
    input_size: int,
    kernel_size: int,
    output_size: int,
    stride: int,
    padding: tuple[int, int],
    input_dilation: int,
    kernel_dilation: int,
) -> int:
    """Returns the number of pairs along one axis without padding and dilation holes."""
    offsets = stride * np.arange(output_size)[:, None] - padding[0]
    positions = offsets + kernel_dilation * np.arange(kernel_size)
    is_inside = (positions >= 0) & (positions <= input_dilation * (input_size - 1))
    return int(np.sum(is_inside & (positions % input_dilation == 0)))
