"""The compiled block of outer steps that a run repeats."""

import dataclasses
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..cost import COST_STATS
from ..trees import to_numpy
from ..validation import is_traced
from .step import (
    Budget,
    OuterState,
    StepRecord,
    compensated_sum,
    step,
    step_without_record,
)

if TYPE_CHECKING:
    from .loop import OuterLoop

BLOCK_SIZE = 256  # rows per compiled block
MAX_ALPHA_BYTES = 2**24  # of the alphas that a block records


def get_block_size(loop: "OuterLoop", state: OuterState) -> int:
    """Returns the number of rows of a block, fewer if it records large alphas."""
    if not loop.record_alphas:
        return BLOCK_SIZE
    leaves = jax.tree.leaves(state.best_alpha)
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return max(1, min(BLOCK_SIZE, MAX_ALPHA_BYTES // max(num_bytes, 1)))


class PackedRecord(eqx.Module):
    """A `StepRecord`, or rows of them, with few arrays.

    A compiled program writes each array of a record by a kernel of its own. Here about
    twenty statistics and flags become one array for each dtype.

    Attributes:
      numbers: The leaves without an axis, stacked along a last axis for each dtype.
      arrays: The other leaves.
      treedef: Structure of the record. Static.
      dtypes: For each leaf the name of its dtype in ``numbers``, or None. Static.
    """

    numbers: dict[str, Array]
    arrays: list[Array]
    treedef: Any = eqx.field(static=True)
    dtypes: tuple[str | None, ...] = eqx.field(static=True)

    @classmethod
    def pack(cls, record: StepRecord) -> "PackedRecord":
        """Returns the record of a single step, packed."""
        leaves, treedef = jax.tree.flatten(jax.tree.map(jnp.asarray, record))
        dtypes = tuple(None if leaf.shape else leaf.dtype.name for leaf in leaves)
        pairs = list(zip(leaves, dtypes, strict=True))
        numbers = {
            name: jnp.stack([leaf for leaf, dtype in pairs if dtype == name])
            for name in sorted({dtype for dtype in dtypes if dtype})
        }
        arrays = [leaf for leaf, dtype in pairs if dtype is None]
        return cls(numbers, arrays, treedef, dtypes)

    def unpack(self) -> StepRecord:
        """Returns the rows; concrete ones as NumPy arrays, without a program for it."""
        is_concrete = not is_traced(self.numbers, self.arrays)
        as_array = to_numpy if is_concrete else (lambda x: x)
        numbers = {name: as_array(x) for name, x in self.numbers.items()}
        columns = {
            name: iter([x[..., i] for i in range(x.shape[-1])])
            for name, x in numbers.items()
        }
        arrays = map(as_array, self.arrays)
        leaves = [next(columns[name] if name else arrays) for name in self.dtypes]
        return jax.tree.unflatten(self.treedef, leaves)


@eqx.filter_jit
def run_block(
    loop: "OuterLoop",
    state: OuterState,
    budget: Budget,
    num_rows: Array,
    stop: Array,
    block_size: int,
    record_every: int = 1,
) -> tuple[OuterState, Budget, PackedRecord, Array]:
    """Makes up to ``num_rows * record_every`` steps, and records the last of each row.

    Args:
      loop: The loop.
      state, budget: State and budget before the block.
      num_rows: Number of rows of ``record_every`` steps, at most ``block_size``.
      stop: Value of ``state.step`` after the last step of the run.
      block_size: Number of rows of the records, static.
      record_every: Number of steps per row, static. The costs in a row are those of all
        its steps.

    Returns:
      State and budget after the block, the records with a leading axis of size
      ``block_size``, and the number of rows written. No step is made after a failure
      or once the budget is spent; the rows of such steps are blank.
    """
    rows = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (block_size, *x.shape)),
        PackedRecord.pack(_blank_record(loop, state)),
    )

    def should_continue(carry):
        state, budget, _, num_rows_made = carry
        return (num_rows_made < num_rows) & (state.status == 0) & ~budget.is_spent

    def make_row(carry):
        state, budget, rows, num_rows_made = carry
        state, costs = _repeat_without_record(loop, state, record_every - 1)
        cost: Array | float = 0.0
        if costs is not None:
            cost = costs["gradient_equivalents"]
            budget = budget.spend(cost)
        state, record = step(loop, state, stop, budget, record_every, cost)
        budget = budget.spend(record.stats["gradient_equivalents"])
        if costs is not None:
            record = _add_costs(record, costs)
        # `column.at[i].set(x)` is a scatter, which takes longer to compile.
        set_row = lambda column, x: jax.lax.dynamic_update_index_in_dim(
            column, x, num_rows_made, 0
        )
        rows = jax.tree.map(set_row, rows, PackedRecord.pack(record))
        return state, budget, rows, num_rows_made + 1

    init_carry = (state, budget, rows, jnp.asarray(0))
    return jax.lax.while_loop(should_continue, make_row, init_carry)


def _repeat_without_record(
    loop: "OuterLoop", state: OuterState, num_steps: int
) -> tuple[OuterState, dict[str, Array] | None]:
    """Makes steps without a record; returns the state and the sum of their costs."""
    if num_steps == 0:
        return state, None

    def make_step(_, carry):
        state, costs, errors = carry
        state, costs_of_step = step_without_record(loop, state)
        sums = {
            name: compensated_sum(costs[name], errors[name], cost)
            for name, cost in costs_of_step.items()
        }
        costs, errors = ({name: x[i] for name, x in sums.items()} for i in (0, 1))
        return state, costs, errors

    costs = jax.eval_shape(lambda state: step_without_record(loop, state)[1], state)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), costs)
    state, costs, _ = jax.lax.fori_loop(0, num_steps, make_step, (state, zeros, zeros))
    return state, costs


def _add_costs(record: StepRecord, costs: dict[str, Array]) -> StepRecord:
    """Returns the record with the costs of earlier steps added to its own."""
    sums = {name: record.stats[name] + cost for name, cost in costs.items()}
    return dataclasses.replace(record, stats=record.stats | sums)


def _blank_record(loop: "OuterLoop", state: OuterState) -> StepRecord:
    """Returns the record of a step that was not made: NaN, at no cost."""
    record = jax.eval_shape(lambda state: step(loop, state)[1], state)

    def blank(path, x):
        is_stat = getattr(path[0], "name", None) == "stats"
        is_cost = is_stat and getattr(path[-1], "key", None) in COST_STATS
        fill = 0 if is_cost or not jnp.issubdtype(x.dtype, jnp.floating) else jnp.nan
        return jnp.full(x.shape, fill, x.dtype)

    return jax.tree.map_with_path(blank, record)
