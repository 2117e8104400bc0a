"""The loop of a search that trains a population, round by round."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from ..progress import ProgressUpdate, ShowProgress
from ..runtime.console import printable
from ..runtime.devices import replicate, shard
from ..runtime.fingerprint import digest, digest_function, fingerprint
from ..runtime.machine import (
    describe_machine,
    runtime_environment,
    warn_of_other_machines,
)
from ..searchers.populations import PopulationSearcher, Round, Trainer, rank_by_value
from ..trace import FAILED, Trace
from ..trees import is_key, to_numpy
from ..validation import floats_to_arrays
from .trial import TrialRecord, fits_budget

RoundCallback = Callable[[dict], None]


class BestMember(NamedTuple):
    """The best member so far: the lowest value among the longest trained ones.

    Attributes:
      row: Its row in the records of all rounds.
      num_steps, value, w, alpha: Its number of steps, value, ``w`` and ``alpha``.
    """

    row: Array
    num_steps: Array
    value: Array
    w: PyTree
    alpha: PyTree

    def rank(self) -> tuple[bool, float, float]:
        """Returns what is largest for the best member; a failed member ranks last."""
        value = float(self.value)
        return math.isfinite(value), float(self.num_steps), -value


class PopulationState(NamedTuple):
    """A search so far: everything that it returns, or needs to continue.

    Attributes:
      num_rounds: Number of rounds made.
      total_cost: Their gradient-equivalents.
      best: The best member of all rounds.
      last_round: The last round.
      records: Records of the members of all rounds, one after another.
    """

    num_rounds: int
    total_cost: float
    best: BestMember
    last_round: Round
    records: TrialRecord


def search_rounds(
    searcher: PopulationSearcher,
    trainer: Trainer,
    key: Array,
    *,
    budget: float,
    show_progress: ShowProgress | None,
    round_callback: RoundCallback | None,
    previous_rounds: Sequence[dict],
) -> Trace:
    """Returns the trace of a search by rounds; see `hypergrad.search`."""
    description, state = "", None
    if round_callback is not None or previous_rounds:
        description = describe_search(searcher, trainer, key)
    # Python numbers in the space are not made arrays: as inputs of the programs they
    # would change the last bits of earlier runs.
    shared = floats_to_arrays(searcher), trainer, key
    searcher, trainer, key = _copy_to_all_devices(shared)
    if previous_rounds:
        state = restore_state(previous_rounds[-1], searcher, trainer, key, description)
    while True:
        index, total_cost, last_round = 0, 0.0, None
        if state is not None:
            index, total_cost = state.num_rounds, state.total_cost
            last_round = state.last_round
        cost = searcher.cost(trainer, index)
        if state is not None and not fits_budget(total_cost + cost, budget):
            break
        new_round = searcher.round(trainer, index, last_round, key)
        new_round = new_round._replace(records=replicate(new_round.records))
        state = _add_round(state, new_round, cost)
        if round_callback is not None:
            round_callback(state_to_dict(state, description))
        if show_progress is not None:
            value, fraction = float(state.best.value), state.total_cost / budget
            show_progress(ProgressUpdate(state.num_rounds, value, fraction))
    best, records = state.best, jax.tree.map(jnp.asarray, state.records)
    return Trace(
        alpha=best.alpha,
        w=trainer.setup.restore_w(best.w),
        best_alpha=best.alpha,
        status_code=jnp.where(jnp.isfinite(best.value), 0, FAILED),
        row_kind="trial",
        best_row=jnp.asarray(best.row),
        **records._asdict(),
    )


def _add_round(
    state: PopulationState | None, new_round: Round, cost: float
) -> PopulationState:
    """Returns the state after one more round; ``state`` is None before the first."""
    best = _best_member(new_round, 0 if state is None else len(state.records.value))
    if state is None:
        return PopulationState(1, cost, best, new_round, new_round.records)
    if not best.rank() > state.best.rank():
        best = state.best
    concatenate = lambda *columns: np.concatenate(columns)
    records = jax.tree.map(concatenate, state.records, new_round.records)
    num_rounds, total_cost = state.num_rounds + 1, state.total_cost + cost
    return PopulationState(num_rounds, total_cost, best, new_round, records)


def _best_member(new_round: Round, first_row: int) -> BestMember:
    """Returns the best member of a round; its value is infinite if it failed."""
    members, records = new_round
    index = rank_by_value(records.value)[0]
    member, value = members.take(index), records.value[index]
    value = jnp.where(jnp.isfinite(value), value, jnp.inf)
    num_steps = records.metrics["steps"][index]
    row = first_row + index
    return BestMember(row, num_steps, value, member.carry[0], member.alpha)


def _copy_to_all_devices(shared: PyTree) -> PyTree:
    """Copies arrays to all devices, except those that are on all devices already."""
    arrays, static = eqx.partition(shared, eqx.is_array)
    arrays = jax.tree.map(jnp.asarray, arrays)  # numbers of NumPy are on no device
    num_devices = jax.device_count()
    is_done = lambda x: len(x.devices()) == num_devices
    arrays = jax.tree.map(lambda x: x if is_done(x) else shard(x), arrays)
    return eqx.combine(arrays, static)


# The state as a dictionary of arrays.


def describe_search(searcher: PopulationSearcher, trainer: Trainer, key: Array) -> str:
    """Returns a description of a search that differs if any of its numbers would."""
    setup = trainer.setup
    train_one = lambda trainer, key: trainer.train(trainer.init_members(1, key), 1, key)
    program = digest_function(train_one, trainer, key)
    environment = runtime_environment()
    space = eqx.tree_pformat(trainer.space, width=10**6)
    return (
        f"{searcher} of {trainer.num_steps} steps in {space}, key "
        f"{to_numpy(key).tolist()}, metrics {sorted(setup.metrics)}, data and numbers "
        f"{fingerprint(digest((searcher, setup, trainer.space)))}, program "
        f"{fingerprint(program)}, jax {environment['jax']}, device "
        f"{environment['device']}"
    )


def state_to_dict(state: PopulationState, description: str) -> dict:
    """Returns a state as a dictionary of arrays, with the description of its search."""
    leaves = jax.tree.leaves_with_path(state)
    arrays = {_path_to_name(path): to_numpy(leaf) for path, leaf in leaves}
    machine = np.asarray(json.dumps(describe_machine()))
    return add_checksum(
        {"search": np.asarray(description), "machine": machine} | arrays
    )


def add_checksum(state: dict) -> dict:
    """Returns the dictionary of a state with the SHA-256 of its other arrays."""
    content = {name: x for name, x in state.items() if name != "sha256"}
    sha256 = hashlib.sha256()
    for name in sorted(content):
        array = np.asarray(content[name])
        # np.load returns another dtype of the same size for a bfloat16 array.
        kind = f"{array.dtype.kind}{array.dtype.itemsize}"
        sha256.update(f"{name} {kind} {array.shape}".encode())
        sha256.update(array.tobytes())
    return content | {"sha256": np.asarray(sha256.hexdigest())}


def restore_state(
    saved: dict,
    searcher: PopulationSearcher,
    trainer: Trainer,
    key: Array,
    description: str,
) -> PopulationState:
    """Returns the state of `state_to_dict` in the dtypes of a new one.

    Raises:
      ValueError: The state is damaged or belongs to another search.
    """
    if str(saved.get("search")) != description:
        raise ValueError(
            f"previous_trials[-1] must be recorded by this search, {description}; got "
            f"{printable(saved.get('search'))}."
        )
    if str(saved.get("sha256")) != str(add_checksum(saved)["sha256"]):
        raise ValueError(
            "previous_trials[-1] must be the arrays that trial_callback received; "
            "their checksum is missing or does not match, so that they were changed or "
            "damaged. Pass an earlier round, or none."
        )
    first_state = lambda: _add_round(None, searcher.round(trainer, 0, None, key), 0.0)
    like = eqx.filter_eval_shape(first_state)
    machine = json.loads(str(saved["machine"]))
    warn_of_other_machines("previous_trials[-1] was recorded", [machine])
    # Names and dtypes are those of this search, because its description is equal.
    return jax.tree.map_with_path(
        lambda path, leaf: _restore_leaf(np.asarray(saved[_path_to_name(path)]), leaf),
        like,
    )


def _path_to_name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _restore_leaf(saved: np.ndarray, like: Any) -> Any:
    """Returns a leaf in the dtype of ``like``; the number of members may differ."""
    if isinstance(like, int | float):
        return type(like)(saved)
    if is_key(like):
        impl = jax.random.key_impl(jnp.empty((), like.dtype))
        return jax.random.wrap_key_data(jnp.asarray(saved), impl=impl)
    # np.load returns the bytes of a bfloat16 array, which NumPy does not know.
    saved = saved.view(like.dtype) if saved.dtype.kind == "V" else saved
    return jnp.asarray(saved, like.dtype)
