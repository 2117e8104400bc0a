"""Searches over cells that share one supernet's weights, or train each from scratch.

The candidates are the cells of `hypergrad.tasks.architecture`, each of which was
trained alone eight times. The rows belong to the table `warm_start`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.bench import Finding, Row, difference_interval, select
from hypergrad.bench.report import markdown_table
from hypergrad.runtime.compat import enable_x64
from hypergrad.tasks import architecture

from .architecture_cells import STEPS
from .row_columns import column

NUM_SAMPLES = 65  # one with the training of the supernet, and rounds of 1, 4 or 16
SPACE = hg.spaces.Choice(len(architecture.OPERATIONS), shape=(len(architecture.EDGES),))


class SearchConfig(NamedTuple):
    """The configuration of a search.

    Attributes:
      num_steps: Steps of a training.
      rate: Initial rate of a training.
      num_samples: Number of sampled cells.
      batch_size: Cells that are evaluated at once with shared weights; 0 if each cell
        is trained from scratch.
    """

    num_steps: int
    rate: float
    num_samples: int = NUM_SAMPLES
    batch_size: int = 0

    @property
    def solver(self) -> hg.Descent:
        """The training: momentum 0.9, the rate falls as a cosine."""
        rate = optax.cosine_decay_schedule(self.rate, self.num_steps)
        return hg.Descent(optax.sgd(rate, momentum=0.9), self.num_steps)

    @property
    def searcher(self) -> Any:
        """The searcher, which samples uniformly."""
        if self.batch_size:
            return hg.searchers.OneShot(self.batch_size)
        return hg.searchers.Random()

    @property
    def budget(self) -> float:
        """Gradient-equivalents of the trainings and of one value per sample."""
        num_train, num_val, _ = architecture.SIZES["small"]
        num_trainings = 1 if self.batch_size else self.num_samples
        steps = num_trainings * self.num_steps * architecture.BATCH_SIZE / num_train
        return 1e-3 + steps + self.num_samples * num_val / num_train / 3


LONG = 10 * STEPS
EACH, FEW = f"each of {NUM_SAMPLES} from scratch", "each of 10 from scratch"
SHORT, SHARED = (f"supernet, {steps:,} steps" for steps in (STEPS, LONG))
AT_ONCE = f"{SHARED}, 16 at once"
CONFIGS = {
    EACH: SearchConfig(STEPS, 0.2),
    FEW: SearchConfig(STEPS, 0.2, 10),
    SHORT: SearchConfig(STEPS, 0.05, batch_size=1),
    SHARED: SearchConfig(LONG, 0.05, batch_size=1),
    AT_ONCE: SearchConfig(LONG, 0.05, batch_size=16),
}


def cell_index(w: PyTree, alpha: Array, key: Array) -> Array:
    """Returns the index of a cell in `architecture.CELLS`."""
    del w, key
    num_operations, num_edges = len(architecture.OPERATIONS), len(architecture.EDGES)
    return alpha @ num_operations ** jnp.arange(num_edges)[::-1]


def run_search(method: str, seed: int) -> hg.Trace:
    """Returns the search, with the index of the cell of every trial."""
    config, task = CONFIGS[method], architecture.make(key=jax.random.key(seed))
    return hg.search(
        task.problem, config.solver, config.searcher, task.w,
        space=SPACE, budget=config.budget, key=jax.random.key(seed),
        metrics={"cell": cell_index},
    )  # fmt: skip


def training_step(
    solver: hg.Descent, problem: hg.Bilevel, carry: PyTree, alpha: Array, key: Array
) -> PyTree:
    """Makes one step of a training on a batch."""
    return solver.step(problem.inner_loss, carry, alpha, problem.inner_data, key)


def values(problem: hg.Bilevel, w: PyTree, alpha: Array) -> Array:
    """Returns the outer value of one cell, or of several that share ``w``, [n, 3]."""
    data = problem.outer_data.full_batch()
    outer_loss: Any = problem.outer_loss
    per_cell = lambda alpha: outer_loss(w, alpha, data)
    return jax.vmap(per_cell)(alpha) if alpha.ndim > 1 else per_cell(alpha)


@functools.cache
def measure_bytes(method: str) -> tuple[int, int]:
    """Returns the peak bytes of a step or of the values, and the carried bytes."""
    config, task = CONFIGS[method], architecture.make(key=jax.random.key(0))
    solver, key = config.solver, jax.random.key(0)
    cell = jnp.zeros(len(architecture.EDGES), int)
    loss, data = task.problem.inner_loss, task.problem.inner_data
    carry = solver.init(loss, task.w, cell, data, key)
    cells = jnp.tile(cell, (config.batch_size, 1)) if config.batch_size else cell
    step = functools.partial(training_step, solver)
    peak = max(
        hg.cost.memory(step, task.problem, carry, cell, key).peak,
        hg.cost.memory(values, task.problem, task.w, cells).peak,
    )
    carried = sum(leaf.nbytes for leaf in jax.tree.leaves(carry))
    return peak, carried if config.batch_size else 0


def measure_cell(method: str, seed: int) -> Row:
    """Returns the measurements of one search."""
    trace = run_search(method, seed)
    peak, carried = measure_bytes(method)
    samples = np.asarray(trace.metrics["cell"], int)
    return evaluate_choice(np.asarray(trace.value, float), samples) | {
        "cost": float(trace.cost[-1]),
        "bytes": peak,
        "carried_bytes": carried,
    }


def evaluate_choice(value: np.ndarray, samples: np.ndarray) -> Row:
    """Returns regret and rank of the cell of the lowest value, by its retrainings.

    The field "rank_correlation" is Spearman's correlation of the values and the true
    errors of the sampled cells.
    """
    accuracy = architecture.ranking()["test_accuracy"].mean(axis=1)
    choice = samples[np.nanargmin(value)]
    spearman: Any = scipy.stats.spearmanr(value, -accuracy[samples])
    cell = architecture.CELLS[choice]
    return {
        "cell": " ".join(architecture.OPERATIONS[o] for o in cell),
        "accuracy": float(accuracy[choice]),
        "regret": float(accuracy.max() - accuracy[choice]),
        "rank": 1 + int(np.sum(accuracy > accuracy[choice])),
        "rank_correlation": float(spearman.statistic),
        "draws": int(value.size),
    }


@functools.cache
def sampled_cells(num_samples: int, seed: int) -> frozenset[int]:
    """Returns the different cells among the samples of a search from scratch.

    They depend only on the seed. As in the rows they are sampled without x64, in which
    integers are sampled from other random bits.
    """
    problem = hg.Bilevel(
        lambda w, alpha, batch: w**2, lambda w, alpha, batch: w + jnp.sum(alpha)
    )
    solver = hg.ClosedForm(lambda alpha, batch: jnp.zeros(()))
    with enable_x64(False):
        trace = hg.search(
            problem, solver, hg.searchers.Random(), 0.0,
            space=SPACE, budget=2.0 * num_samples, key=jax.random.key(seed),
            metrics={"cell": cell_index},
        )  # fmt: skip
    indices = np.asarray(trace.metrics["cell"], int)[:num_samples]
    return frozenset(indices.tolist())


# Findings and the printed form.


def compare(rows: list[Row], first: str, second: str) -> Finding:
    """Returns the ratios of costs and bytes, and the added regret in points."""
    cost_ratio, bytes_ratio = (
        column(rows, name, method=second).mean()
        / column(rows, name, method=first).mean()
        for name in ("cost", "bytes")
    )
    note = "" if CONFIGS[second].batch_size else note_on_repeats(rows, first, second)
    regrets = (
        100 * column(rows, "regret", method=method) for method in (first, second)
    )
    added = difference_interval(*regrets)
    return Finding(
        f"{first} against {second}: {cost_ratio:.3g} times fewer gradient-equivalents"
        f"{note}, {1 / bytes_ratio:.3g} times the bytes, {added:+.1f} points of regret"
    )


def note_on_repeats(rows: list[Row], first: str, second: str) -> str:
    """Returns the ratio of costs if no cell were trained twice; "" if none was."""
    num_samples = CONFIGS[second].num_samples
    seeds = sorted(row["seed"] for row in select(rows, method=second))
    num_cells = np.array([len(sampled_cells(num_samples, seed)) for seed in seeds])
    cost = np.mean(column(rows, "cost", method=second) * num_cells / num_samples)
    if num_cells.min() == num_samples:
        return ""
    ratio = cost / column(rows, "cost", method=first).mean()
    return (
        f" ({ratio:.3g} if each of the {num_cells.min()} to {num_cells.max()} cells "
        f"among its {num_samples} samples were trained once)"
    )


def findings(rows: list[Row]) -> list[Finding]:
    """Returns what shared weights save, and whether fewer trainings are as good."""
    pairs = (SHORT, EACH), (SHARED, EACH), (SHARED, FEW), (AT_ONCE, SHARED)
    labels = {row["method"] for row in rows}
    return [compare(rows, *pair) for pair in pairs if {*pair} <= labels]


def body(rows: list[Row]) -> list[str]:
    """Returns the table of the searches."""
    accuracy = architecture.ranking()["test_accuracy"].mean(axis=1)
    mean_regret = 100 * (accuracy.max() - accuracy.mean())
    text = (
        "**Weights that candidates share.** The regret of a random cell is "
        f"{mean_regret:.1f} points. Means and ranges over the seeds; grad-eq is the "
        "same on every seed. Peak: bytes of a step of training or of the values at "
        "once, whichever is larger. Carried: bytes from one candidate to the next."
    )
    headings = (
        "method", "grad-eq", "regret", "range", "rank", "correlation", "peak kB",
        "carried kB",
    )  # fmt: skip
    lines = []
    labels = {row["method"] for row in rows}
    for method in CONFIGS:
        if method not in labels:
            continue
        get = lambda name, method=method: column(rows, name, method=method)
        regret = 100 * get("regret")
        cells = [
            method,
            f"{get('cost').mean():,.0f}",
            f"{regret.mean():.1f}",
            f"{regret.min():.1f} to {regret.max():.1f}",
            f"{get('rank').min():.0f} to {get('rank').max():.0f}",
            f"{get('rank_correlation').mean():.2f}",
            f"{get('bytes').mean() / 1e3:,.0f}",
            f"{get('carried_bytes').mean() / 1e3:.1f}",
        ]
        lines.append(cells)
    return [text, "", *markdown_table(headings, lines)]


def points(rows: list[Row]) -> dict[str, list[tuple[float, float, bool]]]:
    """Returns cost and kilobytes per method, labelled with its mean regret."""
    labels = {row["method"] for row in rows}
    names = {
        method: f"{method}: {100 * column(rows, 'regret', method=method).mean():.1f}"
        for method in CONFIGS
        if method in labels
    }
    return {
        name: [
            (row["cost"], row["bytes"] / 1e3, True)
            for row in rows
            if row["method"] == method
        ]
        for method, name in names.items()
    }
