"""A study of two methods with known numbers, and runs of it."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from hypergrad import runs
from hypergrad.studies.study import MODEL, Column, Study
from hypergrad.studies.table import Request

X = np.arange(20.0).reshape(10, 2)
Y = np.arange(10)
COMMAND = "hypergrad run toy"


def no_model(number: float, seed: int) -> None:
    """Returns no model, as most tests need."""


def make_model(number: float, seed: int) -> tuple:
    """Returns a model with known bits, 160 kB of them for number 2."""
    size = 20_000.0 if number == 2.0 else 3.0
    return {"W": jnp.arange(size) * number, "b": [seed]}, jnp.asarray(number + seed)


def make_shifted_model(number: float, seed: int) -> tuple:
    """Returns `make_model` with other bits."""
    return make_model(number + 2.0**-40, seed)


def split_by_key(key: jax.Array) -> list:
    """Returns a random split into six and four rows, and a leaf that is no array."""
    order = jax.random.permutation(key, 10)
    return [order[:6], order[6:], len]


def split_in_order(key: jax.Array) -> list:
    """Returns the same split for every seed but 1, for which it is `split_by_key`."""
    return split_by_key(key) if jax.random.key_data(key)[1] == 1 else [np.arange(10)]


def make_study(
    x=X, shift=0.0, interrupted_cell=None, split=lambda key: (), model=no_model
) -> Study:
    """Returns a study with methods "one" and "two", whose score is number + seed.

    Args:
      x: Data.
      shift: Number that is added to each score.
      interrupted_cell: ``(number, seed)`` at which the run is interrupted.
      split: ``key -> split`` of the data.
      model: ``(number, seed) -> model``.
    """

    @functools.cache
    def measure(number: float, seed: int) -> dict:
        if (number, seed) == interrupted_cell:
            raise KeyboardInterrupt
        return {
            MODEL: model(number, seed),
            "score": number + seed + shift,
            "curve": [number, number + shift],
            "run_seconds": np.random.default_rng().random(),
        }

    def plot(rows, path):
        plt.figure(figsize=(2, 1))
        plt.plot([row["score"] for row in rows])
        plt.savefig(path)
        plt.close()

    return Study(
        name="toy",
        paradigm="none",
        source="a <test> & its author",
        about="Nothing is learned.",
        data=lambda: ("ten rows", {"x": x, "y": Y}),
        methods={
            "one": lambda seed: measure(1.0, seed),
            "two": lambda seed: measure(2.0, seed),
        },
        columns=(Column("score", "score"),),
        claims=(),
        draw=plot,
        minutes=0.1,
        split=split,
    )


def run_study(folder: Path, seeds: int = 2, **changes) -> runs.Run:
    """Runs `make_study` with changes."""
    request = Request("small", seeds, folder, COMMAND)
    return runs.start_run(make_study(**changes), request)
