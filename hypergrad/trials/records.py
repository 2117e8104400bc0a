"""Trials as JSON with a checksum, and the checks that a search would run them again."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from ..runtime.array_folder import digest_json
from ..runtime.fingerprint import digest, digest_function, fingerprint
from ..runtime.machine import (
    describe_machine,
    runtime_environment,
    warn_of_other_machines,
)
from .trial import Parallel, Trial, TrialRecord, TrialSetup, run_trial


def trial_fingerprint(
    setup: TrialSetup, alpha: PyTree, key: Array, parallel: Parallel
) -> str:
    """Returns a digest of everything but ``alpha`` that decides a trial.

    The key is that of the search. It decides the keys of all trials.
    """
    environment = runtime_environment()
    name = fingerprint(
        _digest_setup(setup, alpha),
        digest(key),
        environment["jax"],
        environment["device"],
    )
    if parallel.executor == "vmap":  # rounds in another way than single trials
        name = fingerprint(name, f"vmap of {parallel.trials_per_batch}")
    return name


def problem_fingerprint(setup: TrialSetup, alpha: PyTree) -> str:
    """Returns a digest of everything that decides the value of a trial at an alpha.

    Metrics and batches of trials do not matter. The platform does, such as cpu or cuda,
    because the program of a trial is lowered for it.
    """
    return fingerprint(_digest_setup(dataclasses.replace(setup, metrics={}), alpha))


def _digest_setup(setup: TrialSetup, alpha: PyTree) -> str:
    return digest(setup) + digest_function(run_trial, setup, alpha, jax.random.key(0))


def trial_to_dict(search: str, trial: Trial, record: TrialRecord) -> dict:
    """Returns a trial as a dictionary of numbers and lists, which is strict JSON.

    Its SHA-256 is the value of ``sha256``, so that any later change is noticed.

    Args:
      search: The fingerprint of the search.
      trial, record: The trial and what it reported.
    """
    metadata = {"search": search, "machine": describe_machine(), "trial": trial.number}
    columns = jax.tree.map(_to_json, record._asdict())
    return add_checksum(metadata | {"alpha": alpha_to_json(trial.alpha), **columns})


def add_checksum(trial: dict) -> dict:
    """Returns the dictionary of a trial with the SHA-256 of its other entries."""
    content = {name: x for name, x in trial.items() if name != "sha256"}
    return content | {"sha256": digest_json(content)}


def _is_unchanged(trial: Mapping) -> bool:
    """Returns True if the checksum of a recorded trial matches its content."""
    try:
        return trial["sha256"] == add_checksum(dict(trial))["sha256"]
    except (KeyError, TypeError, ValueError):  # no checksum, or no JSON
        return False


def alpha_to_json(alpha: PyTree) -> list:
    """Returns the leaves of ``alpha`` as nested lists."""
    return [_to_json(leaf) for leaf in jax.tree.leaves(alpha)]


def _to_json(x: Any) -> Any:
    """Returns an array as nested lists; NaN becomes None, and an infinity its name."""
    to_strict = lambda x: x if math.isfinite(x) else None if math.isnan(x) else str(x)
    return jax.tree.map(to_strict, np.asarray(x).tolist())


def _from_json(x: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns the array of `_to_json` in the dtype of ``like``."""
    to_float = lambda x: (
        math.nan if x is None else float(x) if isinstance(x, str) else x
    )
    numbers = jax.tree.map(to_float, x, is_leaf=lambda x: x is None)
    return jnp.asarray(numbers, like.dtype).reshape(like.shape)


def _is_close(recorded: jax.Array, proposed: jax.Array) -> bool:
    """Returns True if two leaves differ by rounding only, which changes no integer."""
    if not jnp.issubdtype(proposed.dtype, jnp.inexact):
        return np.array_equal(recorded, proposed)
    return np.allclose(recorded, proposed, 1e-5, 1e-12)


def check_previous_trials(trials: Any) -> None:
    """Raises TypeError unless the argument is a list of dictionaries."""
    if not isinstance(trials, Sequence) or isinstance(trials, str):
        raise TypeError(
            "previous_trials must be the list of dictionaries that trial_callback "
            f"received; got {type(trials).__name__}."
        )
    for i, trial in enumerate(trials):
        if not isinstance(trial, Mapping):
            raise TypeError(
                f"previous_trials[{i}] must be a dictionary that trial_callback "
                f"received; got {trial!r}."
            )


class RecordedTrials:
    """The trials of an earlier search, by their number.

    Args:
      trials: Dictionaries of `trial_to_dict`.
      search: Fingerprint of the search that continues from them.

    Raises:
      ValueError: A trial is not as it was recorded, belongs to another search, or
        occurs twice.
    """

    def __init__(self, trials: Sequence[dict], search: str):
        self.trials = trials
        self.positions: dict[int, int] = {}
        for position, trial in enumerate(trials):
            if not _is_unchanged(trial):
                raise ValueError(
                    f"previous_trials[{position}] must be a dictionary as "
                    "trial_callback received it; its checksum is missing or does not "
                    "match, so that its numbers were changed or damaged. Leave it and "
                    "all later trials out, which run again."
                )
        machines = [trial["machine"] for trial in trials]
        warn_of_other_machines("previous_trials were recorded", machines)
        for position, trial in enumerate(trials):
            if trial["search"] != search:
                raise ValueError(
                    f"previous_trials[{position}] must be of the same problem, solver, "
                    "w, metrics, key and parallel, including data and numbers that "
                    "functions close over, and of the same version of jax and kind of "
                    f"device; it has the metrics {sorted(trial['metrics'])}. This "
                    f"search has the fingerprint {search}; got {trial['search']!r}."
                )
            number = trial["trial"]
            if number in self.positions:
                raise ValueError(
                    "previous_trials must hold each trial once; got trial "
                    f"{number} at positions {self.positions[number]} and {position}."
                )
            self.positions[number] = position

    def restore(
        self, batch: list[Trial], setup: TrialSetup
    ) -> tuple[list[Trial], dict[int, TrialRecord]]:
        """Returns the batch with the recorded alphas, and its records by number.

        Arrays have the dtypes of a new trial.

        Raises:
          ValueError: A recorded trial has an alpha that this search does not propose.
        """
        if not any(trial.number in self.positions for trial in batch):
            return batch, {}
        _, alpha, key = batch[0]
        _, like = eqx.filter_eval_shape(run_trial, setup, alpha, key)
        is_first_batch = batch[0].number == 0
        restored_batch, records = [], {}
        for trial in batch:
            if trial.number in self.positions:
                alpha, record = self._restore(trial, like, is_first_batch)
                records[trial.number] = record
                trial = trial._replace(alpha=alpha)
            restored_batch.append(trial)
        return restored_batch, records

    def _restore(
        self, trial: Trial, like: TrialRecord, is_first_batch: bool
    ) -> tuple[PyTree, TrialRecord]:
        position = self.positions[trial.number]
        recorded = self.trials[position]
        proposed, structure = jax.tree.flatten(trial.alpha)
        # Shapes and names are those of this search, because its fingerprint is equal.
        alpha = list(map(_from_json, recorded["alpha"], proposed))
        columns = {field: recorded[field] for field in TrialRecord._fields}
        to_array = lambda like, x: _from_json(x, like)
        record = TrialRecord(**jax.tree.map(to_array, like._asdict(), columns))
        # Another machine may round a decomposition of earlier trials to another one.
        is_other_machine = recorded["machine"] != describe_machine()
        may_differ = is_other_machine and not is_first_batch
        if not (may_differ or all(map(_is_close, alpha, proposed))):
            raise ValueError(
                f"previous_trials[{position}] must have the alpha that this search "
                f"proposes, {alpha_to_json(proposed)}; got {recorded['alpha']}. Pass "
                "the searcher and space that it was recorded with, and all trials."
            )
        return structure.unflatten(alpha), record

    def check_is_last_batch(self, batch: list[Trial]) -> None:
        """Raises ValueError if a trial of a later batch is recorded.

        A search starts no batch before the previous one is complete, so a batch that is
        not must be the last one.
        """
        later = [number for number in self.positions if number > batch[-1].number]
        if later:
            missing = next(t.number for t in batch if t.number not in self.positions)
            raise ValueError(
                f"previous_trials must contain trial {missing}, because it contains "
                f"trial {min(later)} of a later batch. Pass all trials, and the "
                "searcher, parallel and key that they were recorded with."
            )

    def check_all_were_used(self, num_trials: int, budget: float, cost: float) -> None:
        """Raises ValueError if a search ended before its recorded trials did."""
        if num_trials < len(self.trials):
            raise ValueError(
                f"previous_trials must hold at most {num_trials} trials, which cost "
                f"{cost:g} of the budget {budget:g}; got {len(self.trials)}. Pass the "
                "searcher and budget that they were recorded with, or "
                f"previous_trials[:{num_trials}]."
            )
