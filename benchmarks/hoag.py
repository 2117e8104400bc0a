"""HOAG on 20 newsgroups: one log-penalty, beside searches that see only values.

*Question.* Does HOAG end at the log-penalty that the notebook of its author prints?
What does it cost, against an exact hypergradient, a search by golden sections, a grid
and random search?

*Problem*, of `doc/example_usage.ipynb` in fabianp/hoag. Counts of the words of 11,314
posts, with headers, each post scaled to norm 1; the task is whether a post is in one of
the first ten groups, by name. With y in {-1, 1} and no intercept,

    L(w, a) = sum_i log(1 + exp(-y_i x_i . w)) + exp(a) ||w||^2 / 2,
    M(w) = sum_j log(1 + exp(-y_j x_j . w)) over the 7,532 test posts,

in float64. The notebook takes the test posts as outer data, so that nothing untouched
is left on which a row could be tested. Its data has 130,107 words and ours 130,108; the
post with the further word is not known.

*HOAG*, as the author's code decides: ``w`` starts from normal numbers (seed 0), ``a``
at 0, and there are 49 outer steps. Step k solves the inner problem by L-BFGS from the
last ``w`` until ``||dL/dw|| < eps_k exp(a) g0``, with the norm ``g0`` at the start, and
the adjoint system by CG from the last adjoint to a relative residual ``eps_k``, with
``eps_k`` = 0.001 0.9^(k-1). Then ``a`` moves by ``-dM/da / l``, within [-6, 6], with
``l`` = ``|dM/da|`` of the first step. If M has fallen enough, ``l`` falls to 0.95 l; if
it has risen by 20%, ``a`` returns, ``l`` doubles and ``eps`` halves. The paper has
first tolerances of 0.1, a domain of [-12, 12] and three splits. Four details differ
from the code: the normal numbers are those of JAX; its residual of CG is relative to
``eps_k ||dM/dw||``, which is looser; its first CG starts from ``w``, ours from zero;
and our L-BFGS ignores entries of the gradient that are small beside the row of
``|H w|``. The published number is the optimum of the problem, which other rows reach
within its tolerance as well: it checks the problem more than HOAG.

*Added rows.* Each trains to a relative tolerance of 1e-5, from the last ``w`` (zero at
first), in [-6, 6]. *Implicit, L-BFGS*: scipy's L-BFGS-B from 0 on the hypergradient of
`hg.Implicit` by L-BFGS and CG to 1e-3, until a step changes M by less than 1e-7 of it;
*golden section* until the interval is shorter than 0.05; *grid of 10* and *random
search of 10* (seed 0), from the largest penalty to the smallest, the author's
baselines. *published* is M at the author's number.

*Measured.* ``alpha`` is where a row ends: HOAG after its last step, the others at their
least M. ``outer loss`` is M there, after a training to 1e-7 that is not counted. A
gradient of L counts 1, a product 2, a gradient of M 7,532 / 11,314, a value a third.

*Published.* The notebook prints alpha = -4.5625978805564; ours counts as equal within
0.05. The outer loss is flat there, and is printed at both.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.bench import (
    Cell,
    Column,
    Finding,
    MeasurementTable,
    Published,
    Row,
    select,
)
from hypergrad.runtime.compat import enable_x64

from .shared.plots import make_panels
from .shared.task_runs import implicit_by_cg
from .shared.tuning import cells_with_seeds

PUBLISHED = -4.5625978805564
NUM_TRAIN, NUM_TEST, NUM_WORDS = 11_314, 7_532, 130_108
LOW, HIGH, NUM_STEPS, NUM_TRIALS = -6.0, 6.0, 49, 10
MIN_GAP = 1e-2  # outer loss that a training to `TRIAL_TOL` resolves
INIT_TOL, MIN_TOL, TRIAL_TOL, FINAL_TOL = 1e-3, 1e-12, 1e-5, 1e-7


def logistic_loss(w: Array, batch: PyTree) -> Array:
    """Returns the sum of the logistic losses of sparse rows."""
    scores = jax.ops.segment_sum(
        batch["values"] * w[batch["columns"]],
        batch["rows"],
        num_segments=len(batch["y"]),
        indices_are_sorted=True,
    )
    return jnp.sum(jax.nn.softplus(-batch["y"] * scores))


def inner_loss(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Returns the training loss with its penalty."""
    return logistic_loss(w, batch) + 0.5 * jnp.exp(alpha) * jnp.vdot(w, w)


def outer_loss(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Returns the loss of the test posts."""
    del alpha
    return logistic_loss(w, batch)


@functools.cache
def make_problem() -> hg.Bilevel:
    """Returns the problem; needs float64."""
    data = hg.datasets.load("newsgroups")
    rows = np.repeat(np.arange(len(data["y"])), np.diff(data["starts"]))
    norms = np.sqrt(np.bincount(rows, data["values"].astype(float) ** 2))

    def split(first: int, last: int) -> PyTree:
        part = slice(data["starts"][first], data["starts"][last])
        return {
            "values": data["values"][part] / norms[rows[part]],
            "columns": data["columns"][part],
            "rows": (rows[part] - first).astype(np.int32),
            "y": np.where(data["y"][first:last] < 10, -1.0, 1.0),
        }

    train, test = split(0, NUM_TRAIN), split(NUM_TRAIN, NUM_TRAIN + NUM_TEST)
    return hg.Bilevel(inner_loss, outer_loss, train, test)


@eqx.filter_jit
def train(
    problem: hg.Bilevel, w: Array, alpha: Array, tolerance: Array
) -> tuple[Array, Array, Array]:
    """Returns the trained ``w``, the outer loss, and the number of gradients."""
    solver = hg.LBFGS(max_steps=5000, tolerance=tolerance)
    w, stats = solver.solve(
        problem.inner_loss, w, alpha, problem.inner_data, jax.random.key(0)
    )
    return w, problem.outer_loss(w, alpha, problem.outer_data), stats["num_grads"]


@eqx.filter_jit
def differentiate(
    problem: hg.Bilevel, w: Array, state: Any, alpha: Array, tols: tuple[Array, Array]
) -> tuple[hg.Estimate, Any]:
    """Returns the estimate of `hg.Implicit` and its next state.

    The tolerances are those of the inner solver and of CG. A state that is None stands
    for a first estimate from ``w``.
    """
    tolerance, rtol = tols
    estimator = implicit_by_cg(hg.LBFGS(max_steps=5000, tolerance=tolerance), rtol=rtol)
    if state is None:
        state = estimator.init(problem, w, alpha)
    return estimator.estimate(problem, state, alpha, jax.random.key(0))


class Evaluation(NamedTuple):
    """An evaluated ``alpha``, its outer loss, and the cost so far."""

    alpha: float
    value: float
    cost: float


class Trainer:
    """Evaluates outer losses and hypergradients, each from the last ``w``."""

    def __init__(self):
        self.problem = make_problem()
        self.w = jnp.zeros(NUM_WORDS)
        self.state: Any = None
        self.cost, self.num_hvps = 0.0, 0.0
        self.evaluations: list[Evaluation] = []

    def record(self, alpha: float, value: Array) -> float:
        """Adds an evaluation and returns its value."""
        self.evaluations.append(Evaluation(float(alpha), float(value), self.cost))
        return float(value)

    def value(self, alpha: float) -> float:
        """Returns the outer loss after a training."""
        self.w, value, num_grads = train(
            self.problem, self.w, jnp.asarray(alpha), jnp.asarray(TRIAL_TOL)
        )
        self.cost += float(num_grads) + NUM_TEST / NUM_TRAIN / 3
        return self.record(alpha, value)

    def value_and_grad(
        self, alpha: float, tolerance: float = TRIAL_TOL, rtol: float = 1e-3
    ) -> tuple[float, float]:
        """Returns the outer loss and its hypergradient."""
        tols = jnp.asarray(tolerance), jnp.asarray(rtol)
        estimate, self.state = differentiate(
            self.problem, self.w, self.state, jnp.asarray(alpha), tols
        )
        self.w, stats = estimate.w, estimate.stats
        fraction = NUM_TEST / NUM_TRAIN
        self.num_hvps += float(stats["num_hvps"])
        self.cost += float(stats["num_grads"] + 2 * stats["num_hvps"])
        self.cost += float(stats["num_outer_grads"]) * fraction
        value = self.record(alpha, estimate.value)
        return value, float(estimate.hypergradient)


# Methods: each runs with a trainer and returns where it ends.


def hoag(trainer: Trainer) -> float:
    """Returns the last ``alpha`` of HOAG with the author's rules."""
    trainer.w = jax.random.normal(jax.random.key(0), (NUM_WORDS,))
    inner_grad = jax.jit(lambda w, a, d: jnp.linalg.norm(jax.grad(inner_loss)(w, a, d)))
    norm = lambda a: float(inner_grad(trainer.w, a, trainer.problem.inner_data))
    alpha, tol, prev_value, inverse_rate = 0.0, INIT_TOL, np.inf, 0.0
    init_norm = norm(alpha)
    for _ in range(NUM_STEPS):
        # The author's tolerance is absolute, ours relative to the present gradient.
        tolerance = min(tol * np.exp(alpha) * init_norm / norm(alpha), 1.0)
        trainer.cost += 1
        value, grad = trainer.value_and_grad(alpha, tolerance, tol)
        prev_tol, tol = tol, max(0.9 * tol, MIN_TOL)
        inverse_rate = inverse_rate or (abs(grad) if abs(grad) > 1e-3 else 1.0)
        new_alpha = float(np.clip(alpha - grad / inverse_rate, LOW, HIGH))
        change = abs(new_alpha - alpha)
        max_value = prev_value + 0.25 * tol + 1.25 * prev_tol * change
        if value <= max_value - inverse_rate * change**2:
            inverse_rate *= 0.95
        elif value >= 1.2 * prev_value:
            inverse_rate, new_alpha, tol = 2 * inverse_rate, alpha, 0.5 * tol
        alpha, prev_value = new_alpha, value
    return alpha


def least(trainer: Trainer) -> float:
    """Returns the evaluated ``alpha`` with the least outer loss."""
    return min(trainer.evaluations, key=lambda x: x.value).alpha


def implicit(trainer: Trainer) -> float:
    """Returns where scipy's L-BFGS-B ends."""
    from scipy.optimize import minimize

    minimize(
        lambda x: trainer.value_and_grad(x[0]),
        np.zeros(1),
        jac=True,
        method="L-BFGS-B",
        bounds=[(LOW, HIGH)],
        options={"ftol": 1e-7},
    )
    return least(trainer)


def golden_section(trainer: Trainer, length: float = 0.05) -> float:
    """Returns the best point of a search by golden sections."""
    ratio = (np.sqrt(5) - 1) / 2
    low, high = LOW, HIGH
    x, y = high - ratio * (high - low), low + ratio * (high - low)
    fy, fx = trainer.value(y), trainer.value(x)  # the larger penalty is cheaper
    while high - low > length:
        if fx < fy:
            high, y, fy = y, x, fx
            x = high - ratio * (high - low)
            fx = trainer.value(x)
        else:
            low, x, fx = x, y, fy
            y = low + ratio * (high - low)
            fy = trainer.value(y)
    return least(trainer)


def trials(trainer: Trainer, alphas: np.ndarray) -> float:
    """Returns the best of some ``alpha``, from the largest penalty on."""
    for alpha in np.sort(alphas)[::-1]:
        trainer.value(alpha)
    return least(trainer)


METHODS: dict[str, Callable[[Trainer], float]] = {
    "HOAG": hoag,
    "Implicit, L-BFGS": implicit,
    "golden section": golden_section,
    "grid of 10": lambda trainer: trials(trainer, np.linspace(LOW, HIGH, NUM_TRIALS)),
    "random search of 10": lambda trainer: trials(
        trainer, np.random.default_rng(0).uniform(LOW, HIGH, NUM_TRIALS)
    ),
    "published": lambda trainer: PUBLISHED,
}


def measure(cell: Cell, rows: list[Row]) -> Row:
    """Returns where a method ends, the outer loss there, and all evaluations."""
    del rows
    with enable_x64(True):
        trainer = Trainer()
        alpha = METHODS[cell["method"]](trainer)
        args = jnp.asarray(alpha), jnp.asarray(FINAL_TOL)
        _, value, _ = train(trainer.problem, trainer.w, *args)
        return {
            "alpha": alpha,
            "outer_loss": float(value),
            "evaluations": len(trainer.evaluations) or None,
            "gradient_equivalents": trainer.cost or None,
            "num_hvps": trainer.num_hvps or None,
            "curve": [list(x) for x in trainer.evaluations],
        }


def findings(rows: list[Row]) -> list[Finding]:
    """Returns by how much the outer loss of each row is above the least of them."""
    losses = {row["method"]: row["outer_loss"] for row in rows}
    least = min(losses.values())
    excess = ", ".join(f"{name} {loss - least:.2g}" for name, loss in losses.items())
    return [Finding(f"outer loss above the least of all rows, {least:.4f}: {excess}")]


def plot(rows: list[Row], path: Path) -> None:
    """Plots the outer loss over ``alpha``, and the best so far against the cost."""
    figure, (left, right) = make_panels(1, 2, (13, 5.5))
    min_loss = min(row["outer_loss"] for row in rows)
    for i, row in enumerate(row for row in rows if row["curve"]):
        alpha, value, cost = np.array(row["curve"]).T
        order = np.argsort(alpha)
        style = {"color": f"C{i}", "label": row["method"]}
        left.plot(alpha[order], value[order], "o", markersize=4, **style)
        left.plot(row["alpha"], row["outer_loss"], "*", markersize=12, color=f"C{i}")
        gap = np.maximum(np.minimum.accumulate(value) - min_loss, MIN_GAP)
        right.step(cost, gap, where="post", **style)
    (row,) = select(rows, method="published")
    left.plot(row["alpha"], row["outer_loss"], "kD", label="published", zorder=0)
    left.axvline(row["alpha"], color="black", linewidth=0.7)
    left.set(xlabel="log-penalty alpha", ylabel="outer loss M", yscale="log")
    left.set_title("Evaluations (points) and ends (stars)")
    right.set(xscale="log", yscale="log", xlabel="gradient-equivalents")
    right.set_ylabel("best outer loss so far - least of all rows")
    right.set_title("Cost; below 0.01 lies the error of a training")
    for axis in (left, right):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


table = MeasurementTable(
    cells=cells_with_seeds(dict.fromkeys(METHODS, 1)),
    measure_cell=measure,
    columns=(
        Column("alpha", form=".4f"),
        Column("outer_loss", "outer loss", ".3f"),
        Column("evaluations", form=".0f"),
    ),
    findings=findings,
    published={
        ("HOAG", "alpha"): Published(
            PUBLISHED, 0.05, "verified", source="doc/example_usage.ipynb"
        )
    },
    plot=plot,
    seeds=1,
    scales=("paper",),
    minutes=15,
    paradigm="supervised",
    source="Pedregosa 2016 (arXiv 1602.02355), and the notebook of fabianp/hoag",
    data="20 newsgroups, 18,846 posts",
    arrays=lambda: hg.datasets.load("newsgroups"),
)
