"""What the adapters share: dtypes, and why a constraint is refused."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

BOUND = (
    "keeps w in a set, and where the set's boundary holds w, dL/dw is not 0; drop the "
    "constraint, or write it into the inner loss by a bijection such as softplus"
)


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """``tree`` in the dtypes of ``like``, never weak."""
    cast = lambda new, old: jnp.asarray(new, dtype=jnp.asarray(old).dtype)
    return jax.tree.map(cast, tree, like)


@contextlib.contextmanager
def explained(library: str, w: PyTree) -> Iterator[None]:
    """Some solvers mix in the default dtype; says so where that may be the cause."""
    try:
        yield
    except (TypeError, ValueError) as error:
        default = jnp.result_type(float)
        dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(w)})
        if dtypes != [str(default)]:
            error.add_note(
                f"w is {', '.join(dtypes)} where JAX's default is {default}; some "
                f"{library} solvers cannot mix them: cast w to {default}, set "
                "jax_enable_x64 to match w, or take another solver"
            )
        raise
