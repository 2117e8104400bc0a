"""The notebook on logistic regression of Grazzi et al. 2020, to its printed digits.

*Question.* Does the package print the sixteen numbers of the notebook
`examples/logistic_regression.ipynb` of prolearner/hypertorch, the code of the paper,
and is its truncated reverse mode a good way to solve this problem?

*Problem.* ``numpy.random.seed(1)``; 1,000 points in 20 dimensions; in this order: true
weights ``w`` and inputs ``X`` from a standard normal distribution, labels ``X w + 0.1 e
> 0`` with standard normal ``e``; half of the points, by ``train_test_split``, are the
validation set (the first half of ``numpy.random.permutation(1000)``). Inner loss: mean
binary cross-entropy on the training half plus ``w' diag(alpha) w / 2``; no intercept.
Outer loss: mean binary cross-entropy on the validation half. ``alpha`` starts at ones.

*Protocol of the notebook.* 100 steps of gradient descent with rate 0.1, from zero at
every outer step; reverse mode through the last 10 of them; outer descent with rate 1
and momentum 0.9, after which ``alpha`` is at least 1e-8; 1,000 outer steps. It prints
the inner loss at ``alpha`` of ones after 0, 10, 20, 30 and 99 steps, and the outer loss
before some outer steps. We print the step before which the loss is evaluated.
Deviations: float64, where the notebook has float32.

*Rows.* *last 10 steps* is the notebook. *all steps* differentiates all 100 of them.
*implicit* has the same outer optimizer and start, with `Newton`'s inner solution and
conjugate gradients, both to 2e-12; its cost includes the error estimate that decides
whether an estimate is trusted. *L-BFGS* is SciPy's L-BFGS-B with the same bound, on
that exact hypergradient, until it stops by itself. *random search* samples the 20
penalties log-uniformly in [1e-4, 10] until it has spent as much as *last 10 steps*,
training each by `Newton`, on five seeds; *grid* tries 100 values of one common penalty
in the same interval; *grid, trained on both* then trains with its penalty on both
halves, so that its outer loss is not comparable and is left out.

*Columns.* `final` is the outer loss of the last step after the row's own training, 100
steps or to convergence; of a search and of L-BFGS, the lowest one. `h` is the outer
loss with the same ``alpha`` after training to convergence, which differs from `final`
where 100 steps do not converge, and `test` the loss of that model on 10,000 further
points. *cost* is what is spent until a row's own outer loss is within 1e-4 of the last
one that the notebook prints.

*Tolerance.* 1e-5, relative: six digits are printed.
"""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

import hypergrad as hg
from hypergrad.bench import Cell, Column, Finding, MeasurementTable, Row, select
from hypergrad.runtime.compat import enable_x64

from .shared import reference_problems
from .shared.published_traces import (
    COUNT_COLUMNS,
    curve,
    first_cost_below,
    method_lines,
    plot_traces,
    published_steps,
    step_columns,
    trace_row,
)
from .shared.tuning import cells_with_seeds, with_seconds

SOURCE = "hypertorch, examples/logistic_regression.ipynb"
NOTEBOOK = "last 10 steps"
INNER = {0: 0.693147, 10: 0.628559, 20: 0.624391, 30: 0.624111, 99: 0.624090}
OUTER = {
    **{0: 0.574399, 10: 0.533768, 20: 0.361522, 30: 0.322504},
    **{40: 0.298765, 50: 0.294467, 60: 0.290573, 70: 0.288586},
    **{870: 0.280509, 960: 0.280507, 990: 0.280506},
}
NUM_STEPS, LOWEST = 1000, 1e-8
BOUND = OUTER[990] + 1e-4
DESCENT = hg.Descent(optax.sgd(0.1), 100)
EXACT = hg.Implicit(hg.Newton())
ESTIMATORS = {
    NOTEBOOK: hg.Unrolled(DESCENT, truncation_length=10, warm_start=False),
    "all steps": hg.Unrolled(DESCENT, warm_start=False),
    "implicit": EXACT,
}
METHODS = (*ESTIMATORS, "L-BFGS", "random search", "grid", "grid, trained on both")
PENALTIES = {"low": 1e-4, "high": 10.0, "log": True}


def clip(alpha):
    """Returns the penalties, at least 1e-8."""
    return jnp.maximum(alpha, LOWEST)


def descend(method: str, num_steps: int = NUM_STEPS) -> hg.Trace:
    """Returns the run of the notebook's outer optimizer with an estimator."""
    reference = reference_problems.hypertorch()
    loop = hg.OuterLoop(
        reference.problem,
        ESTIMATORS[method],
        optax.sgd(1.0, momentum=0.9),
        project=clip,
    )
    return loop.run(loop.init(reference.w, reference.alpha), num_steps=num_steps)


def inner_losses() -> Row:
    """Returns the inner loss at the first penalties after the printed steps."""
    reference = reference_problems.hypertorch()
    data, losses = reference.problem.inner_data, {}
    for step in INNER:
        solver = hg.Descent(optax.sgd(0.1), step)
        w, _ = solver.solve(
            reference.problem.inner_loss,
            reference.w,
            reference.alpha,
            data,
            jax.random.key(0),
        )
        loss = reference.problem.inner_loss(w, reference.alpha, data)
        losses[f"inner_{step}"] = float(loss)
    return losses


def run_lbfgs() -> tuple[np.ndarray, Row]:
    """Returns the penalties that L-BFGS-B reaches, and the row of its evaluations."""
    reference = reference_problems.hypertorch()
    hypergradient = jax.jit(hg.hypergradient(reference.problem, EXACT))
    estimates = []

    def h(alpha: np.ndarray) -> tuple[float, np.ndarray]:
        estimates.append(hypergradient(reference.w, jnp.asarray(alpha)))
        estimate = estimates[-1]
        return float(estimate.value), np.asarray(estimate.hypergradient)

    result = scipy.optimize.minimize(
        h,
        np.asarray(reference.alpha),
        jac=True,
        method="L-BFGS-B",
        bounds=[(LOWEST, None)] * reference.alpha.size,
        options={"maxiter": 1000, "ftol": 1e-13, "gtol": 1e-10},
    )
    series = lambda name: np.array([float(x.stats[name]) for x in estimates])
    values = np.minimum.accumulate([float(x.value) for x in estimates])
    costs = np.cumsum(series("gradient_equivalents"))
    row = {
        "final": values[-1],
        "gradient_equivalents": costs[-1],
        "num_grads": series("num_grads").sum(),
        "num_hvps": series("num_hvps").sum(),
        "num_untrusted": float(np.sum(series("trusted") == 0)),
        "cost": first_cost_below(values, costs, BOUND),
        **curve(values, costs),
    }
    return result.x, row


def run_search(method: str, seed: int) -> tuple[np.ndarray, Row]:
    """Returns the best penalties of a search, and its row."""
    reference = reference_problems.hypertorch()
    is_random = method == "random search"
    budget = NUM_STEPS * float(descend(NOTEBOOK, 1).cost[-1]) if is_random else 1e9
    trace = hg.search(
        reference.problem,
        hg.Newton(),
        hg.searchers.Random() if is_random else hg.searchers.Grid(100),
        reference.w,
        space=hg.spaces.Interval(**PENALTIES, shape=(20,) if is_random else ()),
        budget=budget,
        key=jax.random.key(seed),
    )
    values = np.minimum.accumulate(np.asarray(trace.value))
    costs = np.asarray(trace.cost)
    row = trace_row(trace, ()) | curve(values, costs) | {"is_search": True}
    row |= {"final": values[-1], "cost": first_cost_below(values, costs, BOUND)}
    return np.broadcast_to(np.asarray(trace.best_alpha), 20), row


def sample_test_data() -> dict[str, np.ndarray]:
    """Returns 10,000 further points with the labels of the same weights."""
    true_w, rng = np.random.RandomState(1).randn(20), np.random.default_rng(0)
    x = rng.normal(size=(10_000, 20))
    return {"x": x, "y": (x @ true_w + 0.1 * rng.normal(size=10_000) > 0).astype(float)}


def measure_losses(alpha: np.ndarray, *, on_both: bool = False) -> Row:
    """Returns outer and test loss of the model that is trained to convergence."""
    reference = reference_problems.hypertorch()
    problem, data = reference.problem, reference.problem.inner_data
    if on_both:
        join = lambda *halves: jnp.concatenate(halves)
        data = jax.tree.map(join, data, problem.outer_data)
    w, _ = hg.Newton().solve(
        problem.inner_loss, reference.w, jnp.asarray(alpha), data, jax.random.key(0)
    )
    loss = lambda batch: float(problem.outer_value(w, jnp.asarray(alpha), batch))
    row = {"test": loss(sample_test_data())}
    return row if on_both else row | {"h": loss(problem.outer_data)}


def run(method: str, seed: int) -> Row:
    """Returns the numbers of a method."""
    if method in ESTIMATORS:
        trace = descend(method)
        values, costs = np.asarray(trace.value), np.asarray(trace.cost)
        row = trace_row(trace, OUTER) | measure_losses(np.asarray(trace.alpha))
        row["cost"] = first_cost_below(values, costs, BOUND)
        return row | (inner_losses() if method == NOTEBOOK else {})
    if method == "L-BFGS":
        alpha, row = run_lbfgs()
    else:
        alpha, row = run_search(method, seed)
    if method != "grid, trained on both":
        return row | measure_losses(alpha)
    row = {name: row[name] for name in ("gradient_equivalents", "num_grads")}
    return row | measure_losses(alpha, on_both=True)


def run_cell(cell: Cell) -> Row:
    """Returns the numbers of a cell."""
    with enable_x64(True):
        return run(cell["method"], cell["seed"])


BODY_COLUMNS = (
    Column("final", form=".6f"),
    Column("h", form=".6f"),
    Column("test", form=".6f"),
    Column("cost", "cost to 0.2806", ".0f"),
    *COUNT_COLUMNS,
    Column("num_untrusted", "untrusted", ".0f", has_deviation=False),
)


def findings(rows: list[Row]) -> list[Finding]:
    """Returns what 100 steps leave to train, and where the converged rows end."""
    row = select(rows, method=NOTEBOOK)[0]
    value = lambda method: min(row["h"] for row in select(rows, method=method))
    ends = ", ".join(f"{method} {value(method):.4f}" for method in METHODS[:-1])
    return [
        Finding(
            f"With the last penalties of the notebook the outer loss is "
            f"{row['final']:.4f} after its 100 steps and {row['h']:.4f} at the minimum "
            "of the inner loss."
        ),
        Finding(f"`h`, of the best seed: {ends}"),
    ]


PUBLISHED = published_steps(NOTEBOOK, OUTER, 1e-5, "executed", SOURCE)
PUBLISHED |= {
    (label, name.replace("step", "inner")): number
    for (label, name), number in published_steps(
        NOTEBOOK, INNER, 1e-5, "executed", SOURCE
    ).items()
}


def plot(rows: list[Row], path: Path) -> None:
    """Plots the outer loss by step, with the printed one, and by cost."""
    plot_traces(rows, PUBLISHED, path)


table = MeasurementTable(
    cells=cells_with_seeds(dict.fromkeys(METHODS, 1) | {"random search": math.inf}),
    measure_cell=with_seconds(run_cell),
    columns=(
        *(Column(f"inner_{step}", f"inner step {step}", ".6f") for step in INNER),
        *step_columns(OUTER),
        *BODY_COLUMNS,
    ),
    published=PUBLISHED,
    findings=findings,
    body=lambda rows: method_lines(rows, BODY_COLUMNS),
    plot=plot,
    paradigm="supervised",
    source="Grazzi et al. 2020 (arXiv 2006.16218), notebook of their code",
    data="simulated, as in the notebook",
    minutes=2,
    scales=("paper",),
)
