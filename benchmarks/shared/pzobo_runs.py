"""The estimators of the notebooks of PZOBO's authors, and rows that these lack."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.bench import Cell, Finding, Row, select

from .random_directions import AlongDirections, RestartedPZOBO, sample_directions
from .torch_random import TorchGenerator
from .tuning import cells_with_seeds

RATE = 0.001  # of the inner steps


class Setup(NamedTuple):
    """A problem with its starting point, and the generator after its data."""

    problem: hg.Bilevel
    w: Array
    alpha: PyTree
    generator: TorchGenerator


class Run(NamedTuple):
    """How a row differs from the others.

    Attributes:
      kind: The estimator.
      num_inner_steps: T.
      rate: Rate of Adam.
      size: The problem.
      offset: Number of directions that were drawn before.
      num_seeds: Number of seeds of other directions; 0 for those of the notebook.
    """

    kind: str
    num_inner_steps: int = 20
    rate: float = 0.05
    size: str = "first"
    offset: int = 0
    num_seeds: int = 0


def run_cells(
    runs: Mapping[str, Run], fitted_once: Iterable[str]
) -> Callable[[str, int], list[Cell]]:
    """Returns one cell per row, or one per seed where directions are sampled anew."""
    num_seeds = {method: run.num_seeds or 1 for method, run in runs.items()}
    return cells_with_seeds(num_seeds | dict.fromkeys(fitted_once, 1))


def difference_finding(rows: list[Row]) -> Finding:
    """Returns where PZOBO ends with and without its difference."""
    ends = [select(rows, method=x)[0]["final"] for x in ("PZOBO", "direct term")]
    return Finding(
        f"PZOBO with its difference ends at {ends[0]:.4g}, without it, in "
        f"*direct term*, at {ends[1]:.4g}."
    )


def make_estimator(
    run: Run, setup: Setup, exact: hg.Estimator, mu: float, num_steps: int, seed: int
) -> Any:
    """Returns the estimator of a run.

    The series of AID-FP has T terms, and AID-CG makes T steps.

    Args:
      run: The run.
      setup: The problem.
      exact: Estimator of a run of the kind "implicit".
      mu: Size of the differences.
      num_steps: Number of outer steps, each of which has a direction.
      seed: Seed of a run with other directions.
    """
    descent = hg.Descent(optax.sgd(RATE), run.num_inner_steps)
    options = {"warm_start": False, "estimate_error": False}
    if run.kind in ("direct", "PZOBO", "HOZOG"):
        generator = TorchGenerator(seed + 1) if run.num_seeds else setup.generator
        directions = sample_directions(generator, setup.alpha, run.offset, num_steps)
        return AlongDirections(descent, directions, mu, run.kind)
    T = run.num_inner_steps
    return {
        "AID-FP": hg.Implicit(descent, hg.Neumann(T, RATE), **options),
        "AID-CG": hg.Implicit(
            descent, hg.CG(rtol=0.0, max_steps=T, preconditioner=None), **options
        ),
        "reverse mode": hg.Unrolled(descent, warm_start=False),
        "implicit": exact,
        "text": RestartedPZOBO(optax.sgd(RATE), T, 1, sigma=mu),
    }[run.kind]
