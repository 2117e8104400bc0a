"""What one shared `w` saves over a training of each candidate, and what it holds.

The cells of `hypergrad.tasks.architecture`, of which the truth is known: every one
trained alone, eight times. They are compared by the weights of one supernet, or each
trained from scratch; rows of the table `warmstart`. See README.md.
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
from hypergrad.studies.architecture import STEPS
from hypergrad.studies.record import Row, fingerprint
from hypergrad.studies.study import DIGITS, digits
from hypergrad.studies.verdict import Verdict, paired
from hypergrad.tasks import architecture as task

DRAWS = 65  # one with the supernet's training, and rounds of 1, 4 or 16
SPACE = hg.spaces.Choice(len(task.OPERATIONS), shape=(len(task.EDGES),))


class Way(NamedTuple):
    """Steps of a training, their first rate, candidates, and how many at once.

    at_once: 0 for a training of each.
    """

    num_steps: int
    rate: float
    draws: int = DRAWS
    at_once: int = 0

    @property
    def solver(self) -> hg.Descent:
        """As the study trains a cell: momentum 0.9, the rate falls as a cosine."""
        rate = optax.cosine_decay_schedule(self.rate, self.num_steps)
        return hg.Descent(optax.sgd(rate, momentum=0.9), self.num_steps)

    @property
    def searcher(self) -> Any:
        """Uniform draws, either way."""
        shared = self.at_once
        return hg.searchers.OneShot(shared) if shared else hg.searchers.Random()

    @property
    def budget(self) -> float:
        """Gradient-equivalents of its trainings and of a value a draw."""
        num_train, num_val, _ = task.SIZES["small"]
        trainings = 1 if self.at_once else self.draws
        steps = trainings * self.num_steps * task.BATCH_SIZE / num_train
        return 1e-3 + steps + self.draws * num_val / num_train / 3


LONG = 10 * STEPS
EACH, FEW = f"each of {DRAWS} from scratch", "each of 10 from scratch"
SHORT, SHARED = (f"supernet, {steps:,} steps" for steps in (STEPS, LONG))
BESIDE = f"{SHARED}, 16 at once"
WAYS = {
    EACH: Way(STEPS, 0.2),
    FEW: Way(STEPS, 0.2, 10),
    SHORT: Way(STEPS, 0.05, at_once=1),
    SHARED: Way(LONG, 0.05, at_once=1),
    BESIDE: Way(LONG, 0.05, at_once=16),
}


def number(w: PyTree, alpha: Array, key: Array) -> Array:
    """Of a cell among `CELLS`."""
    del w, key
    return alpha @ len(task.OPERATIONS) ** jnp.arange(len(task.EDGES))[::-1]


def seek(method: str, seed: int) -> hg.Trace:
    """The search, with the number of the cell of every trial."""
    way, own = WAYS[method], task.make(key=jax.random.key(seed))
    return hg.search(
        own.problem, way.solver, way.searcher, own.w,
        space=SPACE, budget=way.budget, key=jax.random.key(seed),
        metrics={"cell": number},
    )  # fmt: skip


def step(
    solver: hg.Descent, problem: hg.Bilevel, carry: PyTree, alpha: Array, key: Array
) -> PyTree:
    """One of a training, by a batch."""
    return solver.step(problem.inner_loss, carry, alpha, problem.inner_data, key)


def value(problem: hg.Bilevel, w: PyTree, alpha: Array) -> Array:
    """Of one candidate, or of some that share ``w``: ``alpha`` [..., 3]."""
    outer = lambda alpha: problem.outer_loss(w, alpha, problem.outer_data.full_batch())
    return jax.vmap(outer)(alpha) if alpha.ndim > 1 else outer(alpha)


@functools.cache
def bytes_of(method: str) -> tuple[int, int]:
    """Peak of a step or of the values at once, and what is carried between trials."""
    way, own = WAYS[method], task.make(key=jax.random.key(0))
    solver, key = way.solver, jax.random.key(0)
    cell = jnp.zeros(len(task.EDGES), int)
    loss, data = own.problem.inner_loss, own.problem.inner_data
    carry = solver.init(loss, own.w, cell, data, key)
    cells = jnp.tile(cell, (way.at_once, 1)) if way.at_once else cell
    programs = (
        (functools.partial(step, solver), own.problem, carry, cell, key),
        (value, own.problem, own.w, cells),
    )
    peak = max(hg.cost.memory(*program).peak for program in programs)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(carry))
    return peak, held if way.at_once else 0


def measure(cell: Row) -> Row:
    """One search; regret and rank of what it found by the mean over retrainings."""
    trace = seek(cell["method"], cell["seed"])
    peak, carried = bytes_of(cell["method"])
    tried = np.asarray(trace.metrics["cell"], int)
    return judged(np.asarray(trace.value, float), tried) | {
        "cost": float(trace.cost[-1]),
        "bytes": peak,
        "carried_bytes": carried,
        "data": DIGITS,
        "data_sha256": fingerprint(digits()),
    }


def judged(value: np.ndarray, tried: np.ndarray) -> Row:
    """What the lowest value found, and how the values rank what was tried.

    rank_correlation: Spearman's, of the values and the true errors of the cells.
    """
    accuracy = task.ranking()["test_accuracy"].mean(axis=1)
    found = tried[np.nanargmin(value)]
    agree = scipy.stats.spearmanr(value, -accuracy[tried]).statistic
    return {
        "cell": " ".join(task.OPERATIONS[o] for o in task.CELLS[found]),
        "accuracy": float(accuracy[found]),
        "regret": float(accuracy.max() - accuracy[found]),
        "rank": 1 + int(np.sum(accuracy > accuracy[found])),
        "rank_correlation": float(agree),
        "draws": int(value.size),
    }


@functools.cache
def drawn(draws: int, seed: int) -> frozenset[int]:
    """The cells among so many draws of a search from scratch, by its key alone.

    As in the rows, without x64, in which integers are drawn by other bits.
    """
    problem = hg.Bilevel(
        lambda w, alpha, batch: w**2, lambda w, alpha, batch: w + jnp.sum(alpha)
    )
    solver = hg.ClosedForm(lambda alpha, batch: jnp.zeros(()))
    with jax.enable_x64(False):
        trace = hg.search(
            problem, solver, hg.searchers.Random(), 0.0,
            space=SPACE, budget=2.0 * draws, key=jax.random.key(seed),
            metrics={"cell": number},
        )  # fmt: skip
    return frozenset(np.asarray(trace.metrics["cell"], int)[:draws].tolist())


# Judging and showing.


def lane(rows: list[Row], method: str, name: str) -> np.ndarray:
    """A column by seed."""
    mine = [row for row in rows if row["method"] == method]
    return np.array([row[name] for row in sorted(mine, key=lambda row: row["seed"])])


def against(rows: list[Row], first: str, second: str) -> Verdict:
    """Times the cost and the bytes; the regret that is added, in points."""
    cost, bytes_ = (
        lane(rows, second, name).mean() / lane(rows, first, name).mean()
        for name in ("cost", "bytes")
    )
    once = "" if WAYS[second].at_once else trained_once(rows, first, second)
    regrets = (100 * lane(rows, method, "regret") for method in (first, second))
    more, low, high = paired(*regrets)
    return Verdict(
        f"{first} against {second}: {cost:.3g} times fewer gradient-equivalents{once}, "
        f"{1 / bytes_:.3g} times the bytes, {more:+.1f} [{low:+.1f}, {high:+.1f}] "
        "points of regret"
    )


def trained_once(rows: list[Row], first: str, second: str) -> str:
    """Times the cost were no cell trained twice; nothing where none was."""
    draws = WAYS[second].draws
    cells = np.array([len(drawn(draws, seed)) for seed in lane(rows, second, "seed")])
    cost = np.mean(lane(rows, second, "cost") * cells / draws)
    if cells.min() == draws:
        return ""
    return (
        f" ({cost / lane(rows, first, 'cost').mean():.3g} were each of the "
        f"{cells.min()} to {cells.max()} cells among its {draws} draws trained once)"
    )


def judge(rows: list[Row]) -> list[Verdict]:
    """What sharing saves, what it loses, and whether fewer trainings do as well."""
    pairs = (SHORT, EACH), (SHARED, EACH), (SHARED, FEW), (BESIDE, SHARED)
    return [against(rows, *pair) for pair in pairs]


def markdown(rows: list[Row]) -> list[str]:
    """The lines of its part of the table."""
    accuracy = task.ranking()["test_accuracy"].mean(axis=1)
    regret = 100 * (accuracy.max() - accuracy.mean())
    lines = [
        f"**Weights that candidates share.** {DIGITS}: cells of [architecture]"
        f"(architecture.md), {len({row['seed'] for row in rows})} seeds. The draw of "
        "the lowest validation loss is found. Regret: points of test accuracy that the "
        "best of 125 cells has more, means over eight trainings of their own; that of "
        f"a cell drawn at random is {regret:.1f}. Correlation: Spearman's, of the "
        "values and the true errors of the cells that were drawn. Means and ranges; "
        "grad-eq is the same on every seed. Peak: bytes of a step of training or of "
        "the values at once, the larger; carried: from one candidate to the next.",
        "",
        "| method | grad-eq | regret | range | rank | correlation | peak kB "
        "| carried kB |",
        "|" + "---|" * 8,
    ]
    for method in WAYS:
        column = functools.partial(lane, rows, method)
        regret = 100 * column("regret")
        cells = [
            method,
            f"{column('cost').mean():,.0f}",
            f"{regret.mean():.1f}",
            f"{regret.min():.1f} to {regret.max():.1f}",
            f"{column('rank').min()} to {column('rank').max()}",
            f"{column('rank_correlation').mean():.2f}",
            f"{column('bytes').mean() / 1e3:,.0f}",
            f"{column('carried_bytes').mean() / 1e3:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def points(rows: list[Row]) -> dict[str, list[tuple[float, float, bool]]]:
    """For `plots.trade_off`, a method's mean regret beside its name."""
    named = {
        method: f"{method}: {100 * lane(rows, method, 'regret').mean():.1f}"
        for method in WAYS
    }
    return {
        name: [
            (row["cost"], row["bytes"] / 1e3, True)
            for row in rows
            if row["method"] == method
        ]
        for method, name in named.items()
    }
