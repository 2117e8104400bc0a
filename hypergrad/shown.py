"""How results print."""

import equinox as eqx
import jax
from jax.core import Tracer


class Shown(eqx.Module):
    """A result that prints its scalars as numbers, and arrays by dtype and shape."""

    def __repr__(self) -> str:
        """With six digits a scalar."""
        return eqx.tree_pformat(jax.tree.map(_number, self))


def _number(leaf):
    known = eqx.is_array(leaf) and not isinstance(leaf, Tracer)
    if not (known and leaf.ndim == 0 and leaf.dtype.kind in "biuf"):
        return leaf
    return float(f"{leaf:.6g}") if leaf.dtype.kind == "f" else leaf.item()
