"""Options of each contender for w1-whole, chosen by one rule for all.

`python -m benchmarks.peers.tuning`, with nothing else running, tries all options of
`GRIDS` on the data of seeds 100 and 101 and writes `settings.json`. It runs

    python -m benchmarks.peers.tuning CONTENDER DATA GRID

in the environment of each contender, which prints the result and the seconds of each.
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
from .worker import load, redirect_stdout, save

WORK, SEEDS = "w1-whole", (100, 101)
ERROR_FRACTION = 0.5  # of the maximum error, as a margin for other data
NUM_REPEATS = 3


def grid(**values: Any) -> list[dict[str, Any]]:
    """Returns every combination."""
    combinations = itertools.product(*values.values())
    return [dict(zip(values, combination, strict=True)) for combination in combinations]


def descent_grid(**values: Any) -> list[dict[str, Any]]:
    """Returns every combination with each of `RATES_AND_MOMENTA`."""
    return [
        {"rate": rate, "momentum": momentum} | combination
        for rate, momentum in RATES_AND_MOMENTA
        for combination in grid(**values)
    ]


GRADIENT_TOLS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
ADJOINT_TOLS = (1e-2, 1e-3, 1e-4)
NUM_PRODUCTS = (5, 10, 15, 20)
# Those of the work, and those for curvatures from 0.01 to 0.4.
RATES_AND_MOMENTA = [(0.5, 0.9), (2.0, 0.9), (5.0, 0.0), (5.0, 0.3), (5.0, 0.6)]
DESCENT = descent_grid(gradient=GRADIENT_TOLS[1:], adjoint=ADJOINT_TOLS)
LBFGS = grid(gradient=GRADIENT_TOLS, adjoint=ADJOINT_TOLS)
TORCH = grid(gradient=(1e-4, 1e-5, 1e-6, 1e-7), products=NUM_PRODUCTS)
GRIDS = {
    "plain": grid(steps=(3, 4, 5), products=(5, 10), adjoint=NUM_PRODUCTS),
    "ours": grid(
        solver=("Newton", "LBFGS"), gradient=GRADIENT_TOLS, adjoint=ADJOINT_TOLS
    ),
    "defaults": LBFGS,
    "jaxopt": DESCENT,
    "optimistix": DESCENT,
    "jaxopt_lbfgs": LBFGS,
    "optimistix_lbfgs": LBFGS,
    "torch_by_hand": TORCH,
    "torchopt": TORCH,
    "hypertorch": TORCH,
    "boat": descent_grid(steps=(20, 40, 80), products=NUM_PRODUCTS),
}


def run_grid(contender: str, path: str, grid: str) -> None:
    """Prints a line per combination: its result and the minimum seconds of a call."""
    output = redirect_stdout()
    module = importlib.import_module(f"benchmarks.peers.contenders.{contender}")
    data = load(path)
    for options in json.loads(grid):
        call = module.WORKS[WORK](data, **options)
        result = np.asarray(call(), float).ravel()
        seconds = []
        for _ in range(NUM_REPEATS):
            start_time = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start_time)
        line = {"answer": result.tolist(), "seconds": min(seconds)}
        print(json.dumps(line), file=output, flush=True)


def fastest_valid(trials: list[list[dict[str, float]]], max_error: float) -> int | None:
    """Returns the index of the fastest combination that is accurate on all seeds.

    Args:
      trials: ``error`` and ``seconds`` by combination and seed.
      max_error: Maximum error of each.
    """
    total_seconds = [
        (sum(trial["seconds"] for trial in trials_by_seed), index)
        for index, trials_by_seed in enumerate(trials)
        if all(trial["error"] <= max_error for trial in trials_by_seed)
    ]
    return min(total_seconds)[1] if total_seconds else None


def tune(contender: str, python: Path, data: list[tuple[Path, list[float]]]) -> dict:
    """Returns the chosen options and their trials; ``data`` with reference results."""
    # The environments of PyTorch's libraries lack what the harness imports.
    from .harness import ROOT, contender_environment, relative_error

    module = "benchmarks.peers.tuning"
    trials_by_seed = []
    for path, expected in data:
        process = subprocess.run(
            [python, "-m", module, contender, path, json.dumps(GRIDS[contender])],
            env=contender_environment(),
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        lines = [json.loads(line) for line in process.stdout.splitlines()]
        if len(lines) < len(GRIDS[contender]):
            raise RuntimeError(f"{contender}: {process.stderr.strip()[-300:]}")
        trials_by_seed.append(
            [
                {
                    "error": relative_error(line["answer"], expected),
                    "seconds": line["seconds"],
                }
                for line in lines
            ]
        )
    trials = [list(trial) for trial in zip(*trials_by_seed, strict=True)]
    index = fastest_valid(trials, ERROR_FRACTION * WORKS[WORK].error)
    if index is None:
        raise RuntimeError(f"{contender}: none of {len(trials)} options is accurate")
    return {
        "options": GRIDS[contender][index],
        "num_tried": len(trials),
        "trials": trials[index],
    }


def main() -> None:
    """Tunes all contenders that are installed and writes their options."""
    from .environments import interpreter
    from .harness import OPTIONS_FILE, reference_result

    chosen = json.loads(OPTIONS_FILE.read_text()) if OPTIONS_FILE.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        data = []
        for seed in SEEDS:
            path = Path(folder) / f"{seed}.npz"
            save(path, logistic(seed=seed))
            data.append((path, reference_result(WORK, path)))
        for contender in GRIDS:
            if not interpreter(contender).exists():
                print(f"{contender}: not installed", flush=True)
                continue
            result = tune(contender, interpreter(contender), data)
            print(f"{contender}: {json.dumps(result)}", flush=True)
            chosen.setdefault(WORK, {})[contender] = result["options"]
            OPTIONS_FILE.write_text(json.dumps(chosen, indent=2) + "\n")


if __name__ == "__main__":
    run_grid(*sys.argv[1:]) if sys.argv[1:] else main()
