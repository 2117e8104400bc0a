"""The explanation of errors of mixed dtypes, for the adapters."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import PyTree


@contextlib.contextmanager
def explain_dtype_errors(library: str, w: PyTree) -> Iterator[None]:
    """Adds a note to an error that mixing ``w`` with the default dtype may cause."""
    try:
        yield
    except (TypeError, ValueError) as error:
        default = jnp.result_type(float)
        dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(w)})
        if dtypes != [str(default)]:
            error.add_note(
                f"w is {', '.join(dtypes)}, but JAX's default is {default}, and some "
                f"solvers of {library} cannot mix them. Cast w to {default}, set "
                "jax_enable_x64 to match w, or use another solver."
            )
        raise
