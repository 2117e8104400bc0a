"""What the tests of checkpoints share."""

from pathlib import Path

import jax
import jax.numpy as jnp


class Killed(BaseException):
    """An interruption that no code catches."""


def make_state(step: int) -> dict[str, jax.Array]:
    """Returns the state of a run, which differs from step to step."""
    return {
        "alpha": jnp.full((3, 2), step / 7),
        "step": jnp.asarray(step),
        "w": jnp.arange(40.0) * step,
    }


def blank_state(step: int) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.zeros_like, make_state(step))


def steps_in(folder: Path) -> list[int]:
    return sorted(int(file.stem[-9:]) for file in folder.glob("step-*.json"))


def read_files(folder: Path) -> dict[Path, bytes]:
    return {x: x.read_bytes() for x in sorted(folder.rglob("*")) if x.is_file()}
