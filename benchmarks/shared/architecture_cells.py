"""The true ranking of `hypergrad.tasks.architecture`: every cell, trained alone.

`python -m benchmarks.shared.architecture_cells` writes what the package reads it from.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad.studies import record
from hypergrad.studies.architecture import STEPS, digits, train
from hypergrad.studies.progress import progress
from hypergrad.tasks import architecture as task

PATH = Path(task.__file__).with_name(task.RANKING)
KEYS = range(1000, 1008)  # none of them a seed of the study


@jax.jit
def retrained(data, cell, keys):
    """Numbers of one cell, by key."""
    return jax.vmap(train, (None, None, 0))(data, cell, keys)


def main() -> None:
    """Trains 125 cells from each key; a line a cell."""
    keys = jax.vmap(jax.random.key)(jnp.array(KEYS))
    made = {"steps": STEPS, "data_sha256": record.fingerprint(digits())}
    made |= record.versions() | {"command": "python -m benchmarks.shared.architecture_cells"}
    lines = []
    with progress(len(task.CELLS)) as tick:
        for cell in task.CELLS:
            name = " ".join(task.OPERATIONS[o] for o in cell)
            found = retrained(digits(), jnp.array(cell), keys)
            found.pop("held_loss")
            row = {k: np.asarray(x, float).round(5).tolist() for k, x in found.items()}
            lines.append(record.line({"cell": name} | row | made))
            tick(name)
    PATH.write_text("".join(lines))


if __name__ == "__main__":
    main()
