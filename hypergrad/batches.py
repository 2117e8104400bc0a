"""Data sets, and the batches of them that losses are evaluated on."""

from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt32

from .number_checks import boolean
from .passes import PassPosition
from .validation import to_arrays

Order = Literal["iid", "blocks", "epoch", "epoch_blocks"]


class Batches(eqx.Module):
    """A data set from which a loss sees mini-batches.

    Args:
      data: Pytree of arrays with a common leading axis ``[num_examples, ...]``. A
        scalar leaf, such as a temperature, is passed unchanged with every batch.
        ``None`` together with ``with_key=True`` makes batches that are only a key
        (rollouts, collocation points).
      batch_size: Number of examples per batch. Defaults to None, which means that
        every batch is the full data set.
      with_key: Whether a batch is a pair ``(batch, key)`` with a fresh PRNG key, as
        augmentation and dropout need. With ``data=None`` a batch is the key alone.
      order: How batches are sampled. "iid" (default): independent examples, with
        replacement. "blocks": one of ``num_blocks`` contiguous blocks of the data, each
        independent of the others and with the same probability. A slice costs less than
        single rows, which matters where a step is cheap, and the tables of SABA have
        one row per block; shuffle the data once beforehand. "epoch": examples in
        shuffled passes, as most training loops see them. "epoch_blocks": blocks in
        shuffled passes. Passes have less noise than independent batches.
      shared: Pytree of arrays that are not examples, such as the edges of a graph or
        class prototypes. It is passed unchanged with every batch, which is then the
        pair ``(examples, shared)``, or ``((examples, shared), key)`` with a key.

    With blocks, a batch size that does not divide the number of examples makes the last
    block overlap the one before it, whose last examples are then sampled twice as often
    as others. With "epoch", a pass leaves out the remainder, in each pass other
    examples.

    The steps of an inner run follow each other in the passes. In a run of `minimize`
    the passes go on from one outer step to the next, except with a ``data_fn``. Batches
    that an estimate uses throughout, such as those of ``outer_batch_size``, are drawn
    for each estimate anew.

    Raises:
      TypeError: A leaf is not a numeric array.
      ValueError: Leaves differ in their leading axis, there is no data,
        ``batch_size`` is not in ``1..num_examples``, or ``order`` is unknown.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> batches = hg.Batches({"x": jnp.ones((6, 2)), "y": jnp.arange(6)}, batch_size=4)
    >>> batches.num_examples
    6
    >>> batches.sample(jax.random.key(0))["x"].shape
    (4, 2)
    >>> edges = jnp.array([[0, 1], [1, 2]])
    >>> nodes, graph = hg.Batches(jnp.arange(6), 4, shared=edges).full_batch()
    >>> nodes.shape, graph.shape
    ((6,), (2, 2))
    """

    data: PyTree
    batch_size: int | None = eqx.field(static=True, default=None)
    with_key: bool = eqx.field(
        static=True, default=False, kw_only=True, converter=boolean("with_key")
    )
    order: Order = eqx.field(static=True, default="iid", kw_only=True)
    shared: PyTree = eqx.field(default=None, kw_only=True)
    # Set by `at_estimate` and `at_draw`; with None a batch depends on its key alone.
    position: PassPosition | None = eqx.field(default=None, init=False)
    # Set by `with_full_batch_key`.
    full_batch_key: Array | None = eqx.field(default=None, init=False)

    def __init__(
        self,
        data: PyTree,
        batch_size: int | None = None,
        *,
        with_key: bool = False,
        order: Order = "iid",
        shared: PyTree = None,
    ):
        if order not in get_args(Order):
            raise ValueError(f"order must be one of {get_args(Order)}; got {order!r}.")
        self.data = to_arrays(data)
        self.batch_size = batch_size
        self.with_key = with_key
        self.order = order
        self.shared = to_arrays(shared, "shared")
        self.position = None
        self.full_batch_key = None
        leaves = jax.tree.leaves(self.data)
        if not leaves:
            if with_key and batch_size is None and shared is None:
                return
            raise ValueError(
                "Batches has no data. Pass a pytree of arrays, or "
                "Batches(None, with_key=True) for batches that are only a key."
            )
        shapes = [leaf.shape for leaf in leaves]
        if len({shape[0] for shape in shapes if shape}) != 1:
            raise ValueError(
                "data must have leaves with one common leading axis, the examples; "
                f"got shapes {shapes}. Only scalars may lack it; pass other arrays "
                "that are not examples as Batches(..., shared=arrays)."
            )
        if batch_size is not None and not (
            isinstance(batch_size, int)
            and not isinstance(batch_size, bool)
            and 1 <= batch_size <= self.num_examples
        ):
            got, remedy = repr(batch_size), ""
            if isinstance(batch_size, np.integer):
                remedy = f" Write {batch_size}, a number of Python."
            if shape := getattr(batch_size, "shape", ()):
                got = f"an array of shape {shape}"
                remedy = " The data is one tuple: hg.Batches((x, y), batch_size)."
            raise ValueError(
                f"batch_size must be an integer in 1..{self.num_examples} (the number "
                f"of examples), or None for all of them; got {got}.{remedy}"
            )

    @property
    def num_examples(self) -> int:
        """Number of examples; 1 if a batch is only a key."""
        lengths = [leaf.shape[0] for leaf in jax.tree.leaves(self.data) if leaf.ndim]
        return lengths[0] if lengths else 1

    def full_batch(self, key: Array | None = None) -> PyTree:
        """Returns all examples as one batch.

        Args:
          key: PRNG key of the batch if ``with_key``. Defaults to
            ``jax.random.key(0)``. The data of an estimate (`with_full_batch_key`) has
            the key of the estimate, whatever key is given here.
        """
        if not self.with_key:
            return self._with_shared(self.data)
        if self.full_batch_key is not None:
            key = self.full_batch_key
        key = jax.random.key(0) if key is None else key
        return key if self.data is None else (self._with_shared(self.data), key)

    @property
    def num_blocks(self) -> int:
        """Number of blocks of ``batch_size`` examples, rounded up."""
        return -(-self.num_examples // (self.batch_size or self.num_examples))

    def take(self, indices: Array) -> PyTree:
        """Returns the examples at ``indices`` (integers), without a key."""
        rows = lambda leaf: leaf[indices] if leaf.ndim else leaf
        return self._with_shared(jax.tree.map(rows, self.data))

    def take_block(self, number: Array) -> PyTree:
        """Returns the block with a number below ``num_blocks``, without a key."""
        size = self.batch_size or self.num_examples
        row = jnp.minimum(number * size, self.num_examples - size)
        rows = lambda x: jax.lax.dynamic_slice_in_dim(x, row, size) if x.ndim else x
        return self._with_shared(jax.tree.map(rows, self.data))

    def _with_shared(self, examples: PyTree) -> PyTree:
        """Returns a batch of these examples, without a key."""
        return examples if self.shared is None else (examples, self.shared)

    @property
    def has_blocks(self) -> bool:
        """True if a batch is a block of contiguous examples."""
        return self.order in ("blocks", "epoch_blocks")

    @property
    def is_in_passes(self) -> bool:
        """True if batches are sampled in shuffled passes over the data."""
        is_pass = self.order in ("epoch", "epoch_blocks")
        return is_pass and self.batch_size is not None

    def draw_block(self, key: Array) -> Array:
        """Returns the number of a block; probabilities are equal within 2^-32."""
        if self.is_in_passes:
            return self._position_of_batch(key).items(self.num_blocks, 1)[0]
        bits = jax.random.bits(key, (), jnp.uint32)
        return (bits % jnp.uint32(self.num_blocks)).astype(int)

    def draw_indices(self, key: Array) -> Array:
        """Returns ``[batch_size]`` indices of examples, with replacement for "iid"."""
        size = self.batch_size or self.num_examples
        if self.is_in_passes:
            return self._position_of_batch(key).items(self.num_examples, size)
        return jax.random.randint(key, (size,), 0, self.num_examples)

    def _position_of_batch(self, key: Array) -> PassPosition:
        """Returns the position of a batch, by default in passes of this key alone."""
        if self.position is not None and self.position.is_batch:
            return self.position
        return PassPosition.from_key(key, is_batch=True)

    def sample(self, key: Array) -> PyTree:
        """Returns a batch; the same key gives the same batch to the bit.

        Data at a draw of shuffled passes (`at_draw`) returns the batch of this draw,
        whatever the key; that of ``with_key`` comes from ``key``.
        """
        if self.batch_size is None:  # a fresh key, also in the data of an estimate
            return with_full_batch_key(self, None).full_batch(key)
        index_key, batch_key = jax.random.split(key) if self.with_key else (key, None)
        if self.has_blocks:
            batch = self.take_block(self.draw_block(index_key))
        else:
            batch = self.take(self.draw_indices(index_key))
        return (batch, batch_key) if self.with_key else batch


#: Number folded into a key before examples are drawn. `jax.random.split` folds small
#: numbers into it, so that no key of a loss is that of the examples.
SAMPLE_STREAM = 2**31
Data = PyTree  # a pytree of arrays that is used whole, `Batches`, or None


def sample_batch(data: Data, key: Array) -> PyTree:
    """Returns the batch that one inner step sees."""
    return data.sample(key) if isinstance(data, Batches) else data


def at_estimate(data: Data, seed: UInt32[Array, "2"], number: Array) -> Data:
    """Returns the data at an estimate of a run, whose passes go on from the one before.

    Data that is not sampled in shuffled passes is returned as it is.

    Args:
      data: The data.
      seed: Two words that determine all passes of the run.
      number: Number of estimates before.
    """
    return _at_position(data, PassPosition(seed, number))


def in_own_order(data: Data, number: Array | int) -> Data:
    """Returns the data with passes that are independent of those of other numbers.

    Data that is not sampled in shuffled passes, or is in no run, is returned as it is.
    """
    if not is_in_passes(data) or data.position is None:
        return data
    return _at_position(data, data.position.in_own_order(number))


def at_draw(
    data: Data,
    key: Array,
    number: Array | int,
    num_draws: int,
    *,
    stream: str = "direction",
) -> Data:
    """Returns the data at one draw of an estimate.

    `sample_batch` then returns the batch of this draw, for whatever key. Data that is
    at a draw already is divided again. Data that is not sampled in shuffled passes is
    returned as it is.

    Args:
      data: The data.
      key: PRNG key of the passes of data that is in no run.
      number: Number of the draw among those that an estimate makes from the stream.
      num_draws: How many they are, the same in every estimate.
      stream: Name of a sequence of passes. Batches of an estimate that are to be
        independent of each other have streams of their own.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> key, data = jax.random.key(0), hg.Batches(jnp.arange(6), 2, order="epoch")
    >>> batches = [at_draw(data, key, k, 3).sample(key) for k in range(3)]
    >>> sorted(jnp.concatenate(batches).tolist())
    [0, 1, 2, 3, 4, 5]
    """
    if not is_in_passes(data):
        return data
    position = data.position or PassPosition.from_key(key)
    return _at_position(data, position.of_draw(number, num_draws, stream))


def sample_in_pass(
    data: Data,
    key: Array,
    number: Array | int = 0,
    num_draws: int = 1,
    *,
    stream: str = "direction",
) -> PyTree:
    """Returns a batch like `sample_batch`, or in shuffled passes the next one.

    Args:
      data, number, num_draws, stream: As in `at_draw`.
      key: PRNG key of the batch, another one for each draw.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> data = hg.Batches(jnp.arange(6), 2)
    >>> sample_in_pass(data, jax.random.key(0), stream="w").shape
    (2,)
    """
    return sample_batch(at_draw(data, key, number, num_draws, stream=stream), key)


def _at_position(data: Data, position: PassPosition) -> Data:
    """Returns the data at a position, if it is sampled in shuffled passes."""
    if not is_in_passes(data):
        return data
    is_none = lambda x: x is None
    return eqx.tree_at(lambda d: d.position, data, position, is_leaf=is_none)


def full_batch(data: Data, key: Array) -> PyTree:
    """Returns all of the data as one batch."""
    return data.full_batch(key) if isinstance(data, Batches) else data


def with_full_batch_key(data: Data, key: Array | None) -> Data:
    """Returns the data whose full batch always has this key, if batches have keys.

    A solver that uses all of the data then minimizes the loss for this key, whatever
    key it was called with. `sample` returns fresh keys, as for stochastic solvers. With
    None a full batch has the key that it is called with again.
    """
    if not is_keyed(data):
        return data
    is_none = lambda x: x is None
    return eqx.tree_at(lambda d: d.full_batch_key, data, key, is_leaf=is_none)


def _with_batch_size(data: Batches, batch_size: int | None) -> Batches:
    """Returns the data with another batch size, outside of any run and estimate.

    The constructor of a subclass is not called again, because it may change the data.
    """
    fields = Batches(
        data.data,
        batch_size,
        with_key=data.with_key,
        order=data.order,
        shared=data.shared,
    )
    batches = object.__new__(type(data))
    vars(batches).update(vars(data) | vars(fields))
    return batches


def sample_fixed_batch(data: Data, batch_size: int | None, key: Array) -> PyTree:
    """Returns the batch used throughout one estimate; all examples if size is None."""
    if batch_size is None:
        return full_batch(data, key)
    if not isinstance(data, Batches):
        raise ValueError(
            f"a batch size of {batch_size} needs the data as hg.Batches, because a "
            "plain pytree is used whole."
        )
    if data.with_key and not jax.tree.leaves(data.data):
        raise ValueError(
            f"a batch size of {batch_size} needs examples, and these batches are a key "
            "alone. Leave the batch size out."
        )
    batches = _with_batch_size(data, batch_size)
    if data.full_batch_key is None:
        return batches.sample(key)
    # The loss may split the key of the estimate, as `Batches.sample` does.
    batch, _ = batches.sample(jax.random.fold_in(key, SAMPLE_STREAM))
    return batch, data.full_batch_key


def without_sampling(data: Data) -> Data:
    """Returns the data with ``batch_size=None``: every batch is the full data set."""
    if not isinstance(data, Batches):
        return data
    return _with_batch_size(data, None)


def is_sampled(data: Data) -> bool:
    """Returns True if a batch holds only some of the examples."""
    return isinstance(data, Batches) and data.batch_size is not None


def is_in_passes(data: Data) -> bool:
    """Returns True if batches are sampled in shuffled passes over the data."""
    return isinstance(data, Batches) and data.is_in_passes


def is_keyed(data: Data) -> bool:
    """Returns True if each batch comes with a PRNG key."""
    return isinstance(data, Batches) and data.with_key


def num_examples(data: Data) -> int | None:
    """Returns the length of the common leading axis, or None if there is none.

    Scalar leaves, such as a penalty, are ignored.
    """
    data = data.data if isinstance(data, Batches) else data
    lengths = {leaf.shape[0] for leaf in jax.tree.leaves(data) if leaf.ndim}
    return lengths.pop() if len(lengths) == 1 else None


def batch_fraction(data: Data, batch_size: int | None = None) -> float:
    """Returns the size of a batch as a fraction of the data, the unit of cost.

    Args:
      data: The data.
      batch_size: Defaults to the batch size of ``data``, that is, of an inner step.
    """
    if not isinstance(data, Batches):
        return 1.0
    return (batch_size or data.batch_size or data.num_examples) / data.num_examples


def fixed_batch_fraction(data: Data, batch_size: int | None) -> float:
    """Returns the size of a `sample_fixed_batch` as a fraction of the data."""
    return batch_fraction(data, batch_size or num_examples(data))


def to_data(data: Any) -> Data:
    """Returns `Batches` as they are, and the leaves of anything else as arrays."""
    return data if isinstance(data, Batches) else to_arrays(data)
