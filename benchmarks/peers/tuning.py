"""What w1-whole leaves open to each contender, chosen by one rule for all.

`python -m benchmarks.peers.tuning`, with nothing else running, tries every setting of
`GRIDS` on the data of seeds 100 and 101 and writes `settings.json`.

    python -m benchmarks.peers.tuning CONTENDER DATA SETTINGS

is what it starts, in the contender's environment: an answer and seconds a setting.
"""

import importlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from .work import WORKS, logistic
from .worker import load, own_voice, save

WORK, SEEDS = "w1-whole", (100, 101)
SAFE = 0.5  # of the error allowed: what is chosen is to be right on other data as well
REPEATS = 3


def grid(**values: Any) -> list[dict[str, Any]]:
    """Every combination."""
    return [
        dict(zip(values, each, strict=True))
        for each in itertools.product(*values.values())
    ]


def paced(**values: Any) -> list[dict[str, Any]]:
    """The same at each of `PACES`."""
    return [
        {"rate": rate, "momentum": momentum} | rest
        for rate, momentum in PACES
        for rest in grid(**values)
    ]


TIGHT = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
SOLVE = (1e-2, 1e-3, 1e-4)
PRODUCTS = (5, 10, 15, 20)
# The run's own, and those for curvatures from 0.01 to 0.4 without and with momentum.
PACES = [(0.5, 0.9), (2.0, 0.9), (5.0, 0.0), (5.0, 0.3), (5.0, 0.6)]
DESCENT = paced(gradient=TIGHT[1:], adjoint=SOLVE)
LBFGS = grid(gradient=TIGHT, adjoint=SOLVE)
TORCH = grid(gradient=(1e-4, 1e-5, 1e-6, 1e-7), products=PRODUCTS)
GRIDS = {
    "plain": grid(steps=(3, 4, 5), products=(5, 10), adjoint=PRODUCTS),
    "ours": grid(solver=("Newton", "LBFGS"), gradient=TIGHT, adjoint=SOLVE),
    "defaults": grid(gradient=TIGHT, adjoint=SOLVE),
    "jaxopt": DESCENT,
    "optimistix": DESCENT,
    "jaxopt_lbfgs": LBFGS,
    "optimistix_lbfgs": LBFGS,
    "torch_by_hand": TORCH,
    "torchopt": TORCH,
    "hypertorch": TORCH,
    "boat": paced(steps=(20, 40, 80), products=PRODUCTS),
}


def tried(contender: str, path: str, settings: str) -> None:
    """Prints a line a setting: its answer and the least seconds of a call."""
    voice = own_voice()
    module = importlib.import_module(f"benchmarks.peers.contenders.{contender}")
    data = load(path)
    for setting in json.loads(settings):
        call = module.WORKS[WORK](data, **setting)
        answer = np.asarray(call(), float).ravel()
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        told = {"answer": answer.tolist(), "seconds": min(seconds)}
        print(json.dumps(told), file=voice, flush=True)


def best(tries: list[list[dict[str, float]]], most: float) -> int | None:
    """Of settings by seeds of errors and seconds: the fastest that is right on all."""
    right = [
        (sum(one["seconds"] for one in each), index)
        for index, each in enumerate(tries)
        if all(one["error"] <= most for one in each)
    ]
    return min(right)[1] if right else None


def tune(contender: str, python: Path, data: list[tuple[Path, list[float]]]) -> dict:
    """The setting, and what it did on each seed; ``data`` with their true answers."""
    from .harness import ROOT, distance, surroundings

    settings = GRIDS[contender]
    by_seed = []
    for path, truth in data:
        done = subprocess.run(
            [
                python,
                "-m",
                "benchmarks.peers.tuning",
                contender,
                path,
                json.dumps(settings),
            ],
            env=surroundings(),
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        if len(lines) < len(settings):
            raise RuntimeError(f"{contender}: {done.stderr.strip()[-300:]}")
        by_seed.append(
            [
                {"error": distance(one["answer"], truth), "seconds": one["seconds"]}
                for one in lines
            ]
        )
    tries = [list(each) for each in zip(*by_seed, strict=True)]
    index = best(tries, SAFE * WORKS[WORK].error)
    if index is None:
        raise RuntimeError(f"{contender}: no setting of {len(tries)} is right")
    return {"setting": settings[index], "tried": len(tries), "on": tries[index]}


def main() -> None:
    """All that are installed, and their settings kept."""
    from .environments import python
    from .harness import SETTINGS, truth_of

    chosen = json.loads(SETTINGS.read_text()) if SETTINGS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        data = []
        for seed in SEEDS:
            path = Path(folder) / f"{seed}.npz"
            save(path, logistic(seed=seed))
            data.append((path, truth_of(WORK, path)))
        for contender in GRIDS:
            if not python(contender).exists():
                print(f"{contender}: not installed", flush=True)
                continue
            found = tune(contender, python(contender), data)
            print(f"{contender}: {json.dumps(found)}", flush=True)
            chosen.setdefault(WORK, {})[contender] = found["setting"]
            SETTINGS.write_text(json.dumps(chosen, indent=2) + "\n")


if __name__ == "__main__":
    tried(*sys.argv[1:]) if sys.argv[1:] else main()
