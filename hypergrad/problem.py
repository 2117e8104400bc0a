"""The problem: two losses with one signature, and their data.

min_alpha  M_val(w*(alpha), alpha)   subject to   w*(alpha) = argmin_w L(w, alpha)
"""

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .products import Loss
from .settings import refuse_changing


def _as_arrays(data: PyTree) -> PyTree:
    def convert(path, leaf):
        name = jax.tree_util.keystr(path) or "the data"
        try:
            array = jnp.asarray(leaf)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"data leaf {name} is a {type(leaf).__name__} of "
                f"{getattr(leaf, 'dtype', 'no numbers')}, which is no numeric array; "
                "pass numeric arrays (encode text and categories as integers)"
            ) from error
        if array.size == 0:
            raise ValueError(
                f"data leaf {name} is empty (shape {array.shape}); a loss over no "
                "examples has no gradient: pass at least one example"
            )
        return array

    return jax.tree.map_with_path(convert, data)


class Batches(eqx.Module):
    """Examples, and how many of them a loss sees at once.

    Args:
      data: pytree of arrays that share their leading axis ``[size, ...]``; scalars
        beside them, such as a temperature, are in every batch as they are. None with
        ``keyed=True``, when each batch is just a key (rollouts, collocation points).
      batch_size: examples a draw, i.i.d. with replacement; None means all of them.
      keyed: each batch becomes ``(batch, key)`` with a fresh PRNG key (augmentation,
        dropout); with ``data=None`` it is the key alone.

    Raises:
      ValueError: leaves of different length, no data, ``batch_size`` outside
        ``1..size``.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> batches = hg.Batches({"x": jnp.ones((6, 2)), "y": jnp.arange(6)}, batch_size=4)
    >>> batches.size
    6
    >>> batches.draw(jax.random.key(0))["x"].shape
    (4, 2)
    """

    data: PyTree
    batch_size: int | None = eqx.field(static=True, default=None)
    keyed: bool = eqx.field(static=True, default=False, kw_only=True)

    def __init__(
        self, data: PyTree, batch_size: int | None = None, *, keyed: bool = False
    ):
        self.data = _as_arrays(data)
        self.batch_size = batch_size
        self.keyed = keyed
        leaves = jax.tree.leaves(self.data)
        if not leaves:
            if keyed and batch_size is None:
                return
            raise ValueError(
                "Batches has no data; pass a pytree of arrays, or "
                "Batches(None, keyed=True) for batches that are just a key"
            )
        shapes = [leaf.shape for leaf in leaves]
        if len({shape[0] for shape in shapes if shape}) != 1:
            raise ValueError(
                "the leaves of Batches need one common leading axis, the examples, "
                f"or be scalars beside them; got shapes {shapes}"
            )
        if batch_size is not None and not (
            isinstance(batch_size, int)
            and not isinstance(batch_size, bool)
            and 1 <= batch_size <= self.size
        ):
            raise ValueError(
                f"batch_size must be an integer in 1..{self.size} (the number of "
                f"examples) or None for all of them; got {batch_size!r}"
            )

    @property
    def size(self) -> int:
        """Number of examples (1 where a batch is just a key)."""
        lengths = [leaf.shape[0] for leaf in jax.tree.leaves(self.data) if leaf.ndim]
        return lengths[0] if lengths else 1

    @property
    def all(self) -> PyTree:
        """Every example as one batch; a keyed one gets ``jax.random.key(0)``."""
        return self.whole(jax.random.key(0))

    def whole(self, key: Array) -> PyTree:
        """Every example as one batch, with ``key`` where keyed."""
        if not self.keyed:
            return self.data
        return key if self.data is None else (self.data, key)

    def take(self, indices: Array) -> PyTree:
        """The examples at ``indices`` (an integer array); without a key."""
        rows = lambda leaf: leaf[indices] if leaf.ndim else leaf
        return jax.tree.map(rows, self.data)

    def draw(self, key: Array) -> PyTree:
        """A batch drawn i.i.d. with replacement; same key, same batch to the bit."""
        if self.batch_size is None:
            return self.whole(key)
        index_key, batch_key = jax.random.split(key) if self.keyed else (key, None)
        indices = jax.random.randint(index_key, (self.batch_size,), 0, self.size)
        batch = self.take(indices)
        return (batch, batch_key) if self.keyed else batch


Data = PyTree  # a pytree of arrays, `Batches`, or None


def _as_data(data: Any) -> Data:
    return data if isinstance(data, Batches) else _as_arrays(data)


def draw(data: Data, key: Array) -> PyTree:
    """The batch that one inner step sees."""
    return data.draw(key) if isinstance(data, Batches) else data


def whole(data: Data, key: Array) -> PyTree:
    """All of the data as one batch."""
    return data.whole(key) if isinstance(data, Batches) else data


def is_sampled(data: Data) -> bool:
    """Whether a batch is some of the examples, not all."""
    return isinstance(data, Batches) and data.batch_size is not None


def is_keyed(data: Data) -> bool:
    """Whether each batch comes with a key."""
    return isinstance(data, Batches) and data.keyed


def undrawn(data: Data) -> Data:
    """The same data, of which every batch is all."""
    return Batches(data.data, keyed=data.keyed) if isinstance(data, Batches) else data


def held(data: Data, batch_size: int | None, key: Array) -> PyTree:
    """The batch that a whole estimate sees: all, or ``batch_size`` examples."""
    if batch_size is None:
        return whole(data, key)
    if not isinstance(data, Batches):
        raise ValueError(
            f"a batch size of {batch_size} needs the data as hg.Batches; a plain "
            "pytree is used whole"
        )
    return Batches(data.data, batch_size, keyed=data.keyed).draw(key)


def size(data: Data) -> int | None:
    """Number of examples: the common leading axis, or None where there is none.

    Scalars beside the examples, such as a penalty, count for nothing.
    """
    data = data.data if isinstance(data, Batches) else data
    lengths = {leaf.shape[0] for leaf in jax.tree.leaves(data) if leaf.ndim}
    return lengths.pop() if len(lengths) == 1 else None


def fraction(data: Data, batch_size: int | None = None) -> float:
    """The part of the data that one batch is, the unit in which costs count.

    ``batch_size=None`` asks for the data's own, the batch of an inner step.
    """
    if not isinstance(data, Batches):
        return 1.0
    return (batch_size or data.batch_size or data.size) / data.size


def held_fraction(data: Data, batch_size: int | None) -> float:
    """The part of the data that a `held` batch is."""
    return fraction(data, batch_size or size(data))


class Bilevel(eqx.Module):
    """``min_alpha outer_loss(w*(alpha), alpha)``, ``w*(alpha) = argmin_w inner_loss``.

    Args:
      inner_loss: ``(w, alpha, batch) -> scalar``, the training loss.
      outer_loss: ``(w, alpha, batch) -> scalar``, the validation loss; or a tuple of
        K such losses: then values are ``[K]`` and hypergradient leaves ``[K, ...]``.
      inner_data, outer_data: None, a pytree of arrays used whole, or `Batches`.
      start: ``(w, alpha) -> w0``, an inner starting point that depends on ``alpha``.
      draw: ``key -> (inner_data, outer_data)``, called once per estimate and held
        fixed for it (episodes, rollouts, federated rounds). Large arrays that it
        reads are data: ``draw=jax.tree_util.Partial(sample, arrays)``.

    A registered pytree: losses are static (compared by identity), data is traced.

    Raises:
      TypeError: a loss, ``start`` or ``draw`` that cannot be called, or has no hash.
      ValueError: empty data, data together with ``draw``, or a ``draw`` that closes
        over arrays above 1 kB.

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
    start: Callable[[PyTree, PyTree], PyTree] | None = eqx.field(static=True)
    draw: Callable[[Array], tuple[Data, Data]] | None

    def __init__(
        self,
        inner_loss: Loss,
        outer_loss: Loss | tuple[Loss, ...],
        inner_data: Data = None,
        outer_data: Data = None,
        *,
        start: Callable[[PyTree, PyTree], PyTree] | None = None,
        draw: Callable[[Array], tuple[Data, Data]] | None = None,
    ):
        if isinstance(outer_loss, list):
            outer_loss = tuple(outer_loss)
        losses = outer_loss if isinstance(outer_loss, tuple) else (outer_loss,)
        if not losses:
            raise ValueError("outer_loss is an empty tuple; pass at least one loss")
        named = [("inner_loss", inner_loss), ("start", start), ("draw", draw)]
        named += [("outer_loss", loss) for loss in losses]
        for name, function in named:
            optional = name in ("start", "draw") and function is None
            if not (optional or callable(function)):
                raise TypeError(f"{name} must be a function; got {function!r}")
            refuse_changing(name, function)
        if draw is not None:
            if inner_data is not None or outer_data is not None:
                raise ValueError(
                    "pass either data or draw, not both: draw returns the data of "
                    "each estimate"
                )
            if not isinstance(draw, jax.tree_util.Partial):
                draw = jax.tree_util.Partial(draw)
            _refuse_large_constants(draw)
        self.inner_loss = inner_loss
        self.outer_loss = outer_loss
        self.inner_data = _as_data(inner_data)
        self.outer_data = _as_data(outer_data)
        self.start = start
        self.draw = draw

    @property
    def num_objectives(self) -> int | None:
        """K where ``outer_loss`` is a tuple of K losses, else None."""
        return len(self.outer_loss) if isinstance(self.outer_loss, tuple) else None

    def data(self, key: Array) -> tuple[Data, Data]:
        """``(inner_data, outer_data)`` of one estimate."""
        if self.draw is None:
            return self.inner_data, self.outer_data
        drawn = self.draw(key)
        if not (isinstance(drawn, tuple) and len(drawn) == 2):
            raise TypeError(
                "draw must return the pair (inner_data, outer_data); got "
                f"{type(drawn).__name__}"
            )
        inner_data, outer_data = map(_as_data, drawn)
        return inner_data, outer_data

    def initial(self, w: PyTree, alpha: PyTree) -> PyTree:
        """Where the inner solver begins."""
        return w if self.start is None else self.start(w, alpha)

    def outer(self, w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
        """The outer value: a scalar, or ``[K]`` for K outer losses."""
        if not isinstance(self.outer_loss, tuple):
            return self.outer_loss(w, alpha, batch)
        return jnp.stack([loss(w, alpha, batch) for loss in self.outer_loss])

    def outer_gradients(
        self, w: PyTree, alpha: PyTree, batch: PyTree
    ) -> tuple[Array, PyTree, PyTree]:
        """Value, ``dM/dw`` and the direct term ``dM/dalpha``; leaves lead with K."""

        def gradients(loss):
            value, pullback = jax.vjp(lambda w, a: loss(w, a, batch), w, alpha)
            return value, *pullback(jnp.ones_like(value))

        if not isinstance(self.outer_loss, tuple):
            return gradients(self.outer_loss)
        found = [gradients(loss) for loss in self.outer_loss]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


def _refuse_large_constants(sample: jax.tree_util.Partial) -> None:
    """A sampler's closed-over arrays would be baked into the program."""
    closed = jax.make_jaxpr(sample.func)(
        *sample.args, jax.random.key(0), **sample.keywords
    )
    num_bytes = sum(
        np.size(constant) * constant.dtype.itemsize
        for constant in _constants(closed)
        if hasattr(constant, "dtype")
    )
    if num_bytes > 1024:
        raise ValueError(
            f"draw closes over {num_bytes:,} bytes of arrays, which would be compiled "
            "into the program as constants; pass it as data: "
            "draw=jax.tree_util.Partial(sample, arrays) with sample(arrays, key)"
        )


def _constants(closed: Any) -> Iterator[Any]:
    """Constants of a closed jaxpr and of those within it."""
    yield from closed.consts
    for equation in closed.jaxpr.eqns:
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "consts")
        ):
            if hasattr(inner, "consts"):
                yield from _constants(inner)
