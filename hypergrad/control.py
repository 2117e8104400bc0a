"""Control flow that `jax.vmap` leaves cheap."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

Tree = TypeVar("Tree")


def unless(done: Array, change: Callable[[Tree], Tree], x: Tree) -> Tree:
    """``x`` where ``done``, else ``change(x)``, of its shapes and dtypes.

    Where the condition is batched, `jax.lax.cond` makes copies of all that its branches
    close over, data too, one for each, and runs both. A loop of at most one turn
    copies nothing, and turns only if it has to.

    >>> unless(jnp.asarray(False), lambda x: x + 1.0, jnp.asarray(1.0)).item()
    2.0
    """
    turn = lambda carry: (jnp.ones_like(done), change(carry[1]))
    return jax.lax.while_loop(lambda carry: ~carry[0], turn, (done, x))[1]
