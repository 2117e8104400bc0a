"""Checks of values that differ between the devices of `jax.shard_map`.

With ``check_vma=True``, its default, JAX knows over which axes of the mesh a value may
vary. It sums the gradient by an input that does not vary over these axes. If ``w`` is
such an input and the inner loss varies, the inner solver minimizes the sum of the
losses of all devices, while all else is computed on each device by itself.
"""

from collections.abc import Callable

import jax
from jax.core import Tracer
from jaxtyping import Array, PyTree

from ..batches import full_batch, sample_batch
from ..problem import Bilevel


def check_problem_on_devices(
    problem: Bilevel, w: PyTree, alpha: PyTree, key: Array
) -> None:
    """Raises TypeError if the starting point or a loss varies over mesh axes."""

    def evaluate() -> dict[str, PyTree]:
        inner_data, outer_data = problem.sample_data(key)
        init = problem.init_inner(w, alpha)
        batch, outer_batch = sample_batch(inner_data, key), full_batch(outer_data, key)
        return {
            "w": init,
            "inner_loss": problem.inner_loss(init, alpha, batch),
            "outer_loss": problem.outer_value(init, alpha, outer_batch),
        }

    check_same_on_devices((problem, w, alpha, key), evaluate)


def check_same_on_devices(
    inputs: PyTree, evaluate: Callable[[], dict[str, PyTree]]
) -> None:
    """Raises TypeError if a value varies over mesh axes.

    Args:
      inputs: What the values depend on. If none of it varies, nothing is traced.
      evaluate: Returns the values by name.
    """
    if not _varying_axes(inputs):
        return
    axes_by_name = {}

    def trace_values() -> None:
        for name, value in evaluate().items():
            axes_by_name[name] = _varying_axes(value)

    jax.eval_shape(trace_values)
    for name, axes in axes_by_name.items():
        if axes:
            raise TypeError(
                f"{name} must be the same on all devices of jax.shard_map; got one "
                f"that varies over the mesh axes {axes}, over which JAX sums "
                "gradients. Pass check_vma=False to jax.shard_map for independent "
                "problems, or take the mean of both losses over these axes "
                "(jax.lax.pmean)."
            )


def _varying_axes(tree: PyTree) -> list[str]:
    """Returns the names of the mesh axes over which a leaf of the tree varies."""
    axes = set()
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, Tracer):  # no other array varies
            shape = jax.typeof(leaf)
            is_new = hasattr(shape, "manual_axis_type")  # after jax 0.10
            axes |= shape.manual_axis_type.varying if is_new else shape.vma
    return sorted(axes, key=str)
