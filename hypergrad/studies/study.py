"""Runs a table: methods by seeds, each tuned by one rule, its costs beside it."""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from . import record

Tick = Callable[[str], None]


@dataclass(frozen=True)
class Study:
    """A table to run.

    Attributes:
      name, source, data_name: what it is.
      methods: the rows, in order; ``methods[0]`` is the baseline.
      on_host: methods whose loop runs on the host; the others run all seeds under
        ``vmap``.
      learned: the methods that the criterion speaks of.
      grid: values of the one tuned setting; each row picks its best on held-out data.
      budget: gradient-equivalents a run may spend.
      load: the data, ``{name: array}``.
      learn: ``(method, data, lane) -> learned``, a lane being (key, setting, hold_out).
      evaluate: ``(data, lane, learned) -> measured``; measured["selection"] is the pair
        that decides, higher is better.
      draw: ``(results, path)`` draws the figure.
    """

    name: str
    source: str
    data_name: str
    methods: tuple[str, ...]
    on_host: tuple[str, ...]
    learned: tuple[str, ...]
    grid: tuple[float, ...]
    budget: float
    load: Callable[[], dict[str, np.ndarray]]
    learn: Callable
    evaluate: Callable
    draw: Callable[[dict[str, PyTree], Path], None]


def run(
    study: Study, methods: Sequence[str], seeds: Sequence[int], tick: Tick
) -> dict[str, PyTree]:
    """``{method: results}``, leaves lead with the seeds.

    Each method learns once for every value of the grid with some examples held out,
    picks the value by them, and learns once more with all examples.
    """
    data = jax.tree.map(jnp.asarray, study.load())
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    evaluate = jax.jit(jax.vmap(study.evaluate, in_axes=(None, 0, 0)))
    return {
        method: _run_method(study, method, evaluate, data, keys, tick)
        for method in methods
    }


def _run_method(
    study: Study, method: str, evaluate: Callable, data: PyTree, keys: Any, tick: Tick
) -> dict[str, np.ndarray]:
    def lanes(settings, hold_out):
        settings = jnp.asarray(settings, jnp.float32)
        return keys, settings, jnp.full(len(keys), hold_out)

    num_seeds = len(keys)
    example = lanes(np.full(num_seeds, study.grid[0]), True)
    learn = functools.partial(study.learn, method)
    compile_ = _one_by_one if method in study.on_host else _all_at_once
    learn, compile_seconds = compile_(learn, data, example)
    run_seconds = 0.0

    def program(lanes: Any) -> dict[str, np.ndarray]:
        nonlocal run_seconds
        started = time.perf_counter()
        learned = jax.block_until_ready(learn(data, lanes))
        run_seconds += time.perf_counter() - started
        results = evaluate(data, lanes, learned)
        results |= {name: x for name, x in learned.items() if name != "batch"}
        tick(method)
        return jax.tree.map(np.asarray, results)

    held = [
        program(lanes(np.full(num_seeds, setting), True))["selection"]
        for setting in study.grid
    ]
    # The best accuracy on held-out data; among equals the lowest loss.
    scores = np.stack(held)
    order = np.lexsort((scores[..., 1], scores[..., 0]), axis=0)
    chosen = np.asarray(study.grid)[order[-1]]
    results = program(lanes(chosen, False))
    return results | {
        "setting": chosen,
        "compile_seconds": np.full(num_seeds, compile_seconds),
        "run_seconds": np.full(num_seeds, run_seconds),
    }


def _all_at_once(learn: Callable, data: PyTree, lanes: Any) -> tuple[Callable, float]:
    """All lanes as one program, and the seconds its compilation took."""
    started = time.perf_counter()
    program = jax.jit(jax.vmap(learn, in_axes=(None, 0))).lower(data, lanes).compile()
    return program, time.perf_counter() - started


def _one_by_one(learn: Callable, data: PyTree, lanes: Any) -> tuple[Callable, float]:
    """A host loop over lanes; compile seconds are the first lane's above the second."""

    def program(data: PyTree, lanes: Any) -> Any:
        count = len(jax.tree.leaves(lanes)[0])
        each = [
            learn(data, jax.tree.map(lambda leaf, i=i: leaf[i], lanes))
            for i in range(count)
        ]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    def seconds(i: int) -> float:
        started = time.perf_counter()
        one = jax.tree.map(lambda leaf: leaf[i : i + 1], lanes)
        jax.block_until_ready(program(data, one))
        return time.perf_counter() - started

    cold = seconds(0)
    return program, max(cold - seconds(0), 0.0)


def rows(
    study: Study, results: dict[str, PyTree], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """One flat record a method and seed, as written to ``NAME.jsonl``."""
    shared = {
        "study": study.name,
        "data": study.data_name,
        "data_sha256": record.fingerprint(study.load()),
        "budget": study.budget,
    }
    shared |= record.versions()
    records = []
    for method, result in results.items():
        scalars = {name: x for name, x in result.items() if x.ndim == 1}
        for i, seed in enumerate(seeds):
            row = {"method": method, "seed": int(seed)}
            row |= {name: x[i].item() for name, x in scalars.items()}
            if "curve_cost" in result:
                row["gradient_equivalents"] = result["curve_cost"][i, -1].item()
            records.append(row | shared)
    return records


def write(
    study: Study,
    results: dict[str, PyTree],
    seeds: Sequence[int],
    report: str,
    folder: Path,
) -> list[Path]:
    """Writes ``NAME.jsonl``, ``NAME.md`` and ``NAME.png`` into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{study.name}.{ending}" for ending in ("jsonl", "md", "png")]
    paths[0].write_text("".join(map(record.line, rows(study, results, seeds))))
    paths[1].write_text(report + "\n")
    study.draw(results, paths[2])
    return paths
