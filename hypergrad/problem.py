"""The bilevel problem, and the data that one estimate sees.

min_alpha  M(w*(alpha), alpha)   subject to   w*(alpha) = argmin_w L(w, alpha)
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .batches import BatchesOfEstimate, Data, is_keyed, sample_fixed_batch, to_data
from .display import describe_leaves
from .jaxpr import constant_bytes
from .products import Loss
from .validation import check_hashable

MAX_CONSTANT_BYTES = 1024  # a `data_fn` may close over this much, and no more


class Bilevel(eqx.Module):
    """The problem ``min_alpha M(w*(alpha), alpha)`` with ``w*(alpha) = argmin_w L``.

    A registered pytree: the functions are static and compared by ``==``, which is
    identity for plain functions; the data is traced.

    Args:
      inner_loss: The training loss ``L``, ``(w, alpha, batch) -> scalar``.
      outer_loss: The validation loss ``M``, ``(w, alpha, batch) -> scalar``, or a tuple
        of K losses. With a tuple, values have shape ``[K]`` and each leaf of a
        hypergradient has a leading axis of size K.
      inner_data, outer_data: None, a pytree of arrays that is used whole, or `Batches`.
      init_fn: ``(w, alpha) -> w0``, an inner starting point that depends on ``alpha``,
        as in MAML. Defaults to starting from ``w``.
      data_fn: ``key -> (inner_data, outer_data)`` for problems whose data is random
        (episodes, rollouts, federated rounds). It is called once per estimate and its
        result is held fixed for that estimate. Pass the large arrays that it reads as
        data: ``data_fn=jax.tree_util.Partial(sample, arrays)``.

    Raises:
      TypeError: A function cannot be called or is not hashable.
      ValueError: The data is empty, ``data_fn`` is given together with data, or
        ``data_fn`` closes over more than 1 kB of arrays.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> inner = lambda w, alpha, batch: jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: jnp.sum(w ** 2)
    >>> hg.Bilevel(inner, outer).num_objectives is None
    True
    """

    inner_loss: Loss = eqx.field(static=True)
    outer_loss: Loss | tuple[Loss, ...] = eqx.field(static=True)
    inner_data: Data
    outer_data: Data
    init_fn: Callable[[PyTree, PyTree], PyTree] | None = eqx.field(static=True)
    data_fn: Callable[[Array], tuple[Data, Data]] | None

    def __init__(
        self,
        inner_loss: Loss,
        outer_loss: Loss | tuple[Loss, ...],
        inner_data: Data = None,
        outer_data: Data = None,
        *,
        init_fn: Callable[[PyTree, PyTree], PyTree] | None = None,
        data_fn: Callable[[Array], tuple[Data, Data]] | None = None,
    ):
        if isinstance(outer_loss, list):
            outer_loss = tuple(outer_loss)
        losses = outer_loss if isinstance(outer_loss, tuple) else (outer_loss,)
        if not losses:
            raise ValueError("outer_loss must hold at least one loss; got ().")
        for function in (inner_loss, *losses):
            name = "inner_loss" if function is inner_loss else "outer_loss"
            _check_function(name, function)
        if init_fn is not None:
            _check_function("init_fn", init_fn)
        if data_fn is not None:
            _check_function("data_fn", data_fn)
            if inner_data is not None or outer_data is not None:
                raise ValueError(
                    "data_fn must not be given together with inner_data or "
                    "outer_data, because it returns the data of each estimate."
                )
            if not isinstance(data_fn, jax.tree_util.Partial):
                data_fn = jax.tree_util.Partial(data_fn)
            _check_closed_over_arrays(data_fn)
        self.inner_loss = inner_loss
        self.outer_loss = outer_loss
        self.inner_data = to_data(inner_data)
        self.outer_data = to_data(outer_data)
        self.init_fn = init_fn
        self.data_fn = data_fn

    @property
    def num_objectives(self) -> int | None:
        """K if ``outer_loss`` is a tuple of K losses, else None."""
        return len(self.outer_loss) if isinstance(self.outer_loss, tuple) else None

    @property
    def outer_losses(self) -> tuple[Loss, ...]:
        """The outer losses as a tuple, even if there is only one."""
        return (
            self.outer_loss
            if isinstance(self.outer_loss, tuple)
            else (self.outer_loss,)
        )

    @property
    def value_shape(self) -> tuple[int, ...]:
        """Shape of the outer value: ``(K,)`` with K outer losses, else ``()``."""
        return () if self.num_objectives is None else (self.num_objectives,)

    def for_each_loss(self, fn: Callable) -> Callable:
        """Returns ``fn`` mapped over the leading axis of K outer losses.

        A single outer loss has no such axis, so that ``fn`` itself is returned.
        """
        return fn if self.num_objectives is None else jax.vmap(fn)

    def sample_data(self, key: Array) -> tuple[Data, Data]:
        """Returns ``(inner_data, outer_data)`` of one estimate."""
        if self.data_fn is None:
            return self.inner_data, self.outer_data
        data = self.data_fn(key)
        if not (isinstance(data, tuple) and len(data) == 2):
            raise TypeError(
                "data_fn must return the pair (inner_data, outer_data); got "
                f"{type(data).__name__}."
            )
        inner_data, outer_data = map(to_data, data)
        return inner_data, outer_data

    def init_inner(self, w: PyTree, alpha: PyTree) -> PyTree:
        """Returns the point from which the inner solver starts."""
        return w if self.init_fn is None else self.init_fn(w, alpha)

    def outer_value(self, w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
        """Returns ``M(w, alpha)``: a scalar, or ``[K]`` for K outer losses."""
        if not isinstance(self.outer_loss, tuple):
            return self.outer_loss(w, alpha, batch)
        return jnp.stack([loss(w, alpha, batch) for loss in self.outer_loss])

    def outer_value_and_grads(
        self, w: PyTree, alpha: PyTree, batch: PyTree
    ) -> tuple[Array, PyTree, PyTree]:
        """Returns ``M``, ``dM/dw`` and the direct term ``dM/dalpha``.

        With K outer losses each leaf of the three has a leading axis of size K.
        """

        def value_and_grads(loss):
            value, pullback = jax.vjp(lambda w, a: loss(w, a, batch), w, alpha)
            return value, *pullback(jnp.ones_like(value))

        if not isinstance(self.outer_loss, tuple):
            return value_and_grads(self.outer_loss)
        per_loss = [value_and_grads(loss) for loss in self.outer_loss]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *per_loss)


class EstimateData(eqx.Module):
    """The data of one estimate, and the keys of its parts.

    Solver, adjoint, cross term and certificate of one estimate share it, so that all
    of them see the same sample. Of batches with a key, `full_batch` has one key in the
    whole estimate; a mini-batch of ``inner_batch`` has the same key. Solvers that call
    `sample_batch` in each step see a new key in each step.
    """

    inner_data: Data
    outer_data: Data
    solver_key: Array
    inner_key: Array
    outer_key: Array

    @classmethod
    def sample(cls, problem: Bilevel, key: Array) -> "EstimateData":
        """Samples the data of an estimate; the same key gives the same data."""
        data_key, solver_key, inner_key, outer_key = jax.random.split(key, 4)
        inner_data, outer_data = problem.sample_data(data_key)
        if is_keyed(inner_data):
            inner_data = BatchesOfEstimate(inner_data, inner_key)
        return cls(inner_data, outer_data, solver_key, inner_key, outer_key)

    def inner_batch(self, batch_size: int | None = None) -> PyTree:
        """Returns the batch for everything that follows the inner solver."""
        return sample_fixed_batch(self.inner_data, batch_size, self.inner_key)

    def outer_batch(self, batch_size: int | None = None) -> PyTree:
        """Returns the batch of the outer loss."""
        return sample_fixed_batch(self.outer_data, batch_size, self.outer_key)


def _check_function(name: str, function: Any) -> None:
    if not callable(function):
        got, remedy = repr(function), ""
        if any(map(np.ndim, jax.tree.leaves(function))):
            is_array = hasattr(function, "dtype")
            kind = "an array" if is_array else f"a {type(function).__name__} of arrays"
            got = f"{kind} ({describe_leaves(name, function)})"
            remedy = " The losses come before the data." if "loss" in name else ""
        raise TypeError(f"{name} must be a function; got {got}.{remedy}")
    check_hashable(name, function)


def _check_closed_over_arrays(data_fn: jax.tree_util.Partial) -> None:
    """Raises ValueError if arrays would be compiled into the program as constants."""
    num_bytes = constant_bytes(
        data_fn.func, *data_fn.args, jax.random.key(0), **data_fn.keywords
    )
    if num_bytes > MAX_CONSTANT_BYTES:
        raise ValueError(
            f"data_fn closes over {num_bytes:,} bytes of arrays, which would be "
            "compiled into the program as constants. Pass them as data: "
            "data_fn=jax.tree_util.Partial(sample, arrays) with sample(arrays, key)."
        )
