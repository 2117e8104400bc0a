"""The training of one cell, and the ranking of `hypergrad.tasks.architecture`.

`python -m benchmarks.shared.architecture_cells` trains every cell several times and
writes the file from which the package reads the ranking.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.bench import provenance
from hypergrad.runtime.progress_bar import progress_bar
from hypergrad.tasks import architecture
from hypergrad.tasks.classifier import held_out_examples, mask_held_out

from .tuning import digits

PATH = Path(architecture.__file__).with_name(architecture.RANKING)
COMMAND = "python -m benchmarks.shared.architecture_cells"
KEYS = range(1000, 1008)  # disjoint from the seeds of the tables
RATE = 0.2  # initial rate of the weights
STEPS = 300
FINAL = hg.Descent(
    optax.sgd(optax.cosine_decay_schedule(RATE, STEPS), momentum=0.9), STEPS
)


def train(data: PyTree, cell: Array, key: Array) -> dict[str, Array]:
    """Trains a cell from a random start and returns accuracies and losses."""
    task = architecture.make(key=key, data=data)
    inner, val = task.problem.inner_data, task.problem.outer_data.data
    test: Any = task.metrics["test_accuracy"]
    key = jax.random.fold_in(key, 1)
    w, _ = FINAL.solve(architecture.train_loss, task.w, cell, inner, key)
    held_out = held_out_examples(mask_held_out(val, True))
    cross_entropy = architecture.cross_entropy
    return task.metric_values(w, cell, key) | {
        "test_loss": cross_entropy(w, cell, test.args[0]),
        "val_loss": cross_entropy(w, cell, val),
        "held_loss": cross_entropy(w, cell, held_out),
    }


@jax.jit
def train_with_keys(data: PyTree, cell: Array, keys: Array) -> dict[str, Array]:
    """Returns the results of `train` for each key."""
    return jax.vmap(train, (None, None, 0))(data, cell, keys)


def digest_of_digits() -> str:
    """Returns the SHA-256 of the digits, as in the rows of tables that use them."""
    sha256 = hashlib.sha256()
    for name, array in sorted(digits().items()):
        sha256.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return sha256.hexdigest()


def main() -> None:
    """Trains 125 cells with each key and writes one line per cell."""
    keys = jax.vmap(jax.random.key)(jnp.array(KEYS))
    metadata = {"steps": STEPS, "data_sha256": digest_of_digits()}
    metadata |= provenance.collect({}, COMMAND)
    lines = []
    with progress_bar() as progress:
        for i, cell in enumerate(architecture.CELLS, start=1):
            name = " ".join(architecture.OPERATIONS[o] for o in cell)
            results = train_with_keys(digits(), jnp.array(cell), keys)
            results.pop("held_loss")
            row = {
                k: np.asarray(x, float).round(5).tolist() for k, x in results.items()
            }
            lines.append(json.dumps({"cell": name} | row | metadata) + "\n")
            progress(i, len(architecture.CELLS), name)
    PATH.write_text("".join(lines))


if __name__ == "__main__":
    main()
