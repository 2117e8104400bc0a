"""The bilevel problem, and the data that one estimate sees.

min_alpha  M(w*(alpha), alpha)   subject to   w*(alpha) = argmin_w L(w, alpha)
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt32

from .batches import (
    Data,
    at_estimate,
    in_own_order,
    is_in_passes,
    is_keyed,
    sample_fixed_batch,
    to_data,
    with_full_batch_key,
)
from .display.tables import describe_leaves
from .jaxprs.inspection import constant_bytes
from .keys_in_w import bind_keys_to_function, remove_keys
from .passes import PassPosition
from .products import Loss
from .trees import hash_bits
from .validation import check_hashable

InitFn = Callable[[PyTree, PyTree], PyTree]
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
        Do not write to an array of NumPy afterwards: JAX may use its memory on a CPU.
        Estimates at the end of an inner run use all outer data, also of `Batches`,
        unless their ``outer_batch_size`` is set.
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

    _inner_loss: Loss = eqx.field(static=True)
    _outer_loss: Loss | tuple[Loss, ...] = eqx.field(static=True)
    inner_data: Data
    outer_data: Data
    _init_fn: InitFn | None = eqx.field(static=True)
    data_fn: Callable[[Array], tuple[Data, Data]] | None
    #: Keys and counters of ``w``, which `bind_keys` gives to the losses; None if none.
    keys_of_w: PyTree

    def __init__(
        self,
        inner_loss: Loss,
        outer_loss: Loss | tuple[Loss, ...],
        inner_data: Data = None,
        outer_data: Data = None,
        *,
        init_fn: InitFn | None = None,
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
        self._inner_loss = inner_loss
        self._outer_loss = outer_loss
        self.inner_data = to_data(inner_data)
        self.outer_data = to_data(outer_data)
        self._init_fn = init_fn
        self.data_fn = data_fn
        self.keys_of_w = None

    @property
    def inner_loss(self) -> Loss:
        """The training loss."""
        return bind_keys_to_function(self._inner_loss, self.keys_of_w)

    @property
    def outer_losses(self) -> tuple[Loss, ...]:
        """The outer losses as a tuple, even if there is only one."""
        keys = self.keys_of_w
        return tuple(bind_keys_to_function(loss, keys) for loss in self._losses)

    @property
    def _losses(self) -> tuple[Loss, ...]:
        """The outer losses of a ``w`` with its keys."""
        losses = self._outer_loss
        return losses if isinstance(losses, tuple) else (losses,)

    @property
    def outer_loss(self) -> Loss | tuple[Loss, ...]:
        """The validation loss, or a tuple of K losses."""
        losses = self.outer_losses
        return losses[0] if self.num_objectives is None else losses

    @property
    def init_fn(self) -> InitFn | None:
        """The function that returns the inner starting point, or None."""
        if self._init_fn is None or self.keys_of_w is None:
            return self._init_fn
        init_fn = bind_keys_to_function(self._init_fn, self.keys_of_w)
        return lambda w, alpha: remove_keys(init_fn(w, alpha))

    @property
    def num_objectives(self) -> int | None:
        """K if ``outer_loss`` is a tuple of K losses, else None."""
        losses = self._outer_loss
        return len(losses) if isinstance(losses, tuple) else None

    @property
    def value_shape(self) -> tuple[int, ...]:
        """Shape of the outer value: ``(K,)`` with K outer losses, else ``()``."""
        return () if self.num_objectives is None else (self.num_objectives,)

    def with_losses(self, indices: Sequence[int]) -> "Bilevel":
        """Returns the problem with some of its K outer losses, and without data.

        Its derivatives are therefore those at a given batch.
        """
        losses = tuple(self._losses[i] for i in indices)
        problem = Bilevel(self._inner_loss, losses)
        keys_of = lambda problem: problem.keys_of_w
        return eqx.tree_at(
            keys_of, problem, self.keys_of_w, is_leaf=lambda x: x is None
        )

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

    @property
    def is_sampled(self) -> bool:
        """True if data of an estimate depend on its key, other than by a batch size."""
        data = self.inner_data, self.outer_data
        return self.data_fn is not None or any(map(is_keyed, data))

    def init_inner(self, w: PyTree, alpha: PyTree) -> PyTree:
        """Returns the point from which the inner solver starts."""
        return w if self.init_fn is None else self.init_fn(w, alpha)

    def outer_value(self, w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
        """Returns ``M(w, alpha)``: a scalar, or ``[K]`` for K outer losses."""
        values = [loss(w, alpha, batch) for loss in self.outer_losses]
        return values[0] if self.num_objectives is None else jnp.stack(values)

    def outer_value_and_grads(
        self, w: PyTree, alpha: PyTree, batch: PyTree
    ) -> tuple[Array, PyTree, PyTree]:
        """Returns ``M``, ``dM/dw`` and the direct term ``dM/dalpha``.

        With K outer losses each leaf of the three has a leading axis of size K.
        """

        def value_and_grads(loss):
            value, pullback = jax.vjp(lambda w, a: loss(w, a, batch), w, alpha)
            return value, *pullback(jnp.ones_like(value))

        per_loss = [value_and_grads(loss) for loss in self.outer_losses]
        if self.num_objectives is None:
            return per_loss[0]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *per_loss)


class EstimateData(eqx.Module):
    """The data of one estimate, and the keys of its parts.

    Solver, adjoint, cross term and certificate of one estimate share it, so that all
    of them see the same sample. Of batches with a key, `full_batch` has one key in the
    whole estimate; a mini-batch of ``inner_batch`` has the same key. Solvers that call
    `sample_batch` in each step see a new key in each step. Data in shuffled passes has
    the position of the estimate in its run, or else in passes of its own.
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
        inner_data, outer_data = _in_passes_of_key(inner_data, outer_data, key)
        inner_data = with_full_batch_key(inner_data, inner_key)
        return cls(inner_data, outer_data, solver_key, inner_key, outer_key)

    def inner_batch(self, batch_size: int | None = None) -> PyTree:
        """Returns the batch for everything that follows the inner solver."""
        return sample_fixed_batch(self.inner_data, batch_size, self.inner_key)

    def outer_batch(self, batch_size: int | None = None) -> PyTree:
        """Returns the batch of the outer loss."""
        return sample_fixed_batch(self.outer_data, batch_size, self.outer_key)


def at_outer_step(problem: Bilevel, seed: UInt32[Array, "2"], step: Array) -> Bilevel:
    """Returns the problem at an outer step, where shuffled passes go on.

    Args:
      problem: The problem.
      seed: Two words that determine all passes of the run.
      step: Number of outer steps before.
    """
    # Inner and outer data may have the same size, but not the same order.
    return _replace_data(
        problem,
        at_estimate(problem.inner_data, seed, step),
        at_estimate(problem.outer_data, hash_bits(seed), step),
    )


def with_own_order(problem: Bilevel, number: Array | int) -> Bilevel:
    """Returns the problem with shuffled passes of its own for each number."""
    return _replace_data(
        problem,
        in_own_order(problem.inner_data, number),
        in_own_order(problem.outer_data, number),
    )


def _replace_data(problem: Bilevel, inner_data: Data, outer_data: Data) -> Bilevel:
    return eqx.tree_at(
        lambda p: (p.inner_data, p.outer_data),
        problem,
        (inner_data, outer_data),
        is_leaf=lambda x: x is None,
    )


def _in_passes_of_key(
    inner_data: Data, outer_data: Data, key: Array
) -> tuple[Data, Data]:
    """Returns the data of an estimate outside of a run, in passes of its key."""
    pass_key = jax.random.fold_in(key, 4)  # `EstimateData.sample` splits it in four

    def in_passes(data, index):
        if not is_in_passes(data) or data.position is not None:
            return data
        position = PassPosition.from_key(jax.random.fold_in(pass_key, index))
        return at_estimate(data, position.seed, position.number)

    return in_passes(inner_data, 0), in_passes(outer_data, 1)


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
