"""BiLO, scalar Poisson problem: a local operator that learns beside its coefficient.

*Question.* Does the coefficient follow the trace that the authors' notebook prints, and
how far from the least-squares solution does it end? What do exact hypergradients of a
discretized equation give, and a network with one loss?

*Problem*, of `tutorial_scalar.ipynb` in Rayzhangzirui/BILO (commit 70955827). Of
``D u'' = -pi^2 sin(pi x)`` with ``u(0) = u(1) = 0``, solved by ``sin(pi x) / D``, the
values for D = 2 at 11 points of [0, 1] are known with noise of variance 0.01, which is
torch's after ``manual_seed(0)``. The outer loss is the mean squared error there.

*BiLO.* A network ``u(x, D)`` with three hidden layers of 64 units and tanh, to whose
first a linear layer adds D; its output is multiplied by ``x (1 - x)``. The inner loss
at the 11 points is the mean of ``r^2 + 0.1 (dr/dD)^2`` with the residual ``r`` of the
equation. 1,001 steps of Adam with rate 1e-3 at D = 1; then 3,001 steps in which the
network moves by the same rule on the inner loss and at the same time D, by Adam with
rate 2e-3 along ``dM/dD`` of the network, without an indirect term. The printed "step k"
is after k + 1 steps. The starting weights are torch's, by the same generator.

*Added rows.* *BiLO, other starts* has five starting points of the same distribution.
*BiLO by DARTS* is `hg.DARTS` of first order, the same rule with the steps of network
and D in turns. *Implicit, Adam* moves D by the same Adam, along exact hypergradients:
the inner problem is the energy ``mean(D u'^2 / 2 + f u)`` on 100 intervals, solved by
Newton's method. *Implicit, L-BFGS* uses scipy's L-BFGS-B instead. *PINN, one loss* has
a network without D as an input, 1,001 steps on ``mean r^2`` at D = 1 and 3,001 on
``mean r^2`` plus the data loss for network and D together, at the rates of BiLO. *least
squares* is ``1 / D = sum s y / sum s^2``, ``s = sin(pi x)``, the best fit of the exact
solution. No search is added: with one coefficient a closed form exists.

*Measured.* D after the steps that the notebook prints, the data loss before the last
step, and costs. A gradient of the inner or the outer loss counts 1; for *Implicit* it
is that of the discretized energy, whose operations are far fewer than those of a
network.

*Published.* D at nine steps, within 0.03, and the best fit, within 0.005. The notebook
prints a final data loss of 0.009981.
"""

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.bench import Cell, Column, MeasurementTable, Published, Row, select

from .shared.plots import make_panels
from .shared.torch_random import TorchGenerator
from .shared.tuning import cells_with_seeds

WIDTH, NUM_POINTS, NUM_INTERVALS = 64, 11, 100
PRETRAINING, NUM_STEPS = 1001, 3001
INNER_OPTIMIZER, OUTER_OPTIMIZER = optax.adam(1e-3), optax.adam(2e-3)
DERIVATIVE_WEIGHT, TRUE_D, INIT_D = 0.1, 2.0, 1.0
STRIDE = 50  # steps between the points of the figure
PUBLISHED = {
    0: 1.0020, 100: 1.1785, 300: 1.4167, 500: 1.5820, 1000: 1.8525,
    1500: 2.0185, 2000: 2.1250, 2500: 2.1909, 3000: 2.2282,
}  # fmt: skip
BEST_FIT = 2.25493


class KeyGenerator:
    """Numbers of the same distribution from a key of JAX."""

    def __init__(self, seed: int):
        self.key = jax.random.key(seed)

    def uniform(self, *shape: int, low: float, high: float) -> Array:
        """Returns numbers that are uniform in ``[low, high)``."""
        self.key, key = jax.random.split(self.key)
        return jax.random.uniform(key, shape, minval=low, maxval=high)


def init_network(generator: Any) -> PyTree:
    """Returns torch's initial layers: weight ``[out, in]`` and bias, in its order."""
    sizes = {
        "input": (WIDTH, 1), "hidden1": (WIDTH, WIDTH), "hidden2": (WIDTH, WIDTH),
        "output": (1, WIDTH), "embedding": (WIDTH, 1),
    }  # fmt: skip

    def uniform(size, *shape):
        bound = 1 / math.sqrt(size)
        return generator.uniform(*shape, low=-bound, high=bound)

    return {
        name: (uniform(size, out, size), uniform(size, out))
        for name, (out, size) in sizes.items()
    }


@functools.cache
def observations() -> tuple[np.ndarray, np.ndarray, TorchGenerator]:
    """Returns points, noisy values, and the generator after these were sampled."""
    generator = TorchGenerator(0)
    x = np.linspace(0, 1, NUM_POINTS)
    y = np.sin(np.pi * x) / TRUE_D + 0.1 * generator.randn(NUM_POINTS)
    return x.astype(np.float32), y.astype(np.float32), generator


@functools.cache
def torch_start() -> PyTree:
    """Returns the starting weights of the notebook."""
    return jax.tree.map(jnp.asarray, init_network(observations()[2]))


def network(w: PyTree, x: Array, D: Array | float | None) -> Array:
    """Returns ``u(x, D)``; without ``D`` the embedding is left out."""
    apply = lambda name, inputs: w[name][0] @ inputs + w[name][1]
    hidden = apply("input", x[None])
    if D is not None:
        hidden = hidden + apply("embedding", jnp.asarray(D)[None])
    hidden = jnp.tanh(apply("hidden1", jnp.tanh(hidden)))
    hidden = jnp.tanh(apply("hidden2", hidden))
    return apply("output", hidden)[0] * x * (1 - x)


def force(x: Array) -> Array:
    """Returns the right-hand side of the equation."""
    return -(jnp.pi**2) * jnp.sin(jnp.pi * x)


def residuals(w: PyTree, D: Array) -> tuple[Array, Array]:
    """Returns the residual at all points, and its derivative by ``D``."""

    def residual(D, x):
        u_xx = jax.grad(jax.grad(network, argnums=1), argnums=1)(w, x, D)
        return D * u_xx - force(x)

    x = jnp.asarray(observations()[0])
    return jax.vmap(jax.value_and_grad(residual), (None, 0))(D, x)


def operator_loss(w: PyTree, D: Array, batch: PyTree) -> Array:
    """Returns the inner loss of BiLO."""
    del batch
    residual, derivative = residuals(w, D)
    return jnp.mean(residual**2) + DERIVATIVE_WEIGHT * jnp.mean(derivative**2)


def data_loss(w: PyTree, D: Array | None, batch: PyTree) -> Array:
    """Returns the mean squared error of the network at the observations."""
    del batch
    x, y, _ = observations()
    u = jax.vmap(lambda x: network(w, x, D))(jnp.asarray(x))
    return jnp.mean((u - y) ** 2)


def pinn_loss(w: PyTree, D: Array, batch: PyTree) -> Array:
    """Returns the mean squared residual of a network without ``D`` as an input."""
    del batch
    residual = lambda x: D * u_xx(w, x, None) - force(x)
    u_xx = jax.grad(jax.grad(network, argnums=1), argnums=1)
    return jnp.mean(jax.vmap(residual)(jnp.asarray(observations()[0])) ** 2)


def energy(u: Array, D: Array, batch: PyTree) -> Array:
    """Returns the energy of the inner nodes, whose minimum solves the equation."""
    del batch
    slopes = jnp.diff(jnp.pad(u, 1)) * NUM_INTERVALS
    x = jnp.arange(1, NUM_INTERVALS) / NUM_INTERVALS
    work = jnp.vdot(force(x), u)
    return (D * jnp.vdot(slopes, slopes) / 2 + work) / NUM_INTERVALS


def grid_data_loss(u: Array, D: Array, batch: PyTree) -> Array:
    """Returns the mean squared error of the nodes at the observations."""
    del D, batch
    stride = NUM_INTERVALS // (NUM_POINTS - 1)
    return jnp.mean((jnp.pad(u, 1)[::stride] - observations()[1]) ** 2)


# Methods: each returns the trace of D, the last data loss, and the cost.


def run_loop(problem: hg.Bilevel, estimator: Any, w: PyTree) -> Row:
    """Returns the fields of a run of `hypergrad.OuterLoop`."""
    loop = hg.OuterLoop(problem, estimator, OUTER_OPTIMIZER, record_alphas=True)
    trace = loop.run(loop.init(w, jnp.asarray(INIT_D)), num_steps=NUM_STEPS)
    D = np.append(trace.alphas[1:], trace.alpha)  # after each step
    return make_row(D, trace.value[-1], np.sum(trace.stats["gradient_equivalents"]))


def make_row(D: np.ndarray, loss: Any, cost: Any) -> Row:
    """Returns the fields of a row with ``D`` after each step."""
    return {f"D_{k}": float(D[k]) for k in PUBLISHED} | {
        "D": float(D[-1]),
        "data_loss": float(loss),
        "gradient_equivalents": float(cost),
        "curve": [round(float(x), 4) for x in D[::STRIDE]],
    }


def pretrain(loss: Any, start: PyTree) -> PyTree:
    """Returns the network after the steps at the initial D."""
    solver = hg.Descent(INNER_OPTIMIZER, PRETRAINING)
    args = jnp.asarray(INIT_D), None, jax.random.key(0)
    return jax.jit(lambda w: solver.solve(loss, w, *args)[0])(start)


def run_jointly(grads_fn: Any, w: PyTree, *, has_input: bool) -> Row:
    """Returns the fields of a run that moves network and D at the same time.

    ``grads_fn(w, D)`` returns the directions of both; ``has_input`` states that D is an
    input of the network.
    """
    labels = jax.tree.map(lambda _: "w", w), "D"
    optimizer = optax.partition({"w": INNER_OPTIMIZER, "D": OUTER_OPTIMIZER}, labels)

    def step(carry, _):
        x, state = carry
        loss = data_loss(x[0], x[1] if has_input else None, None)
        updates, state = optimizer.update(grads_fn(*x), state)
        x = optax.apply_updates(x, updates)
        return (x, state), (x[1], loss)

    @jax.jit
    def run(x):
        return jax.lax.scan(step, (x, optimizer.init(x)), length=NUM_STEPS)[1]

    D, losses = run((w, jnp.asarray(INIT_D)))
    return make_row(np.asarray(D), losses[-1], PRETRAINING + 2 * NUM_STEPS)


def bilo_grads(w: PyTree, D: Array) -> tuple[PyTree, Array]:
    """Returns the gradients of the inner loss by ``w`` and the outer loss by ``D``."""
    inner_grad = jax.grad(operator_loss)(w, D, None)
    return inner_grad, jax.grad(data_loss, argnums=1)(w, D, None)


def pinn_grads(w: PyTree, D: Array) -> tuple[PyTree, Array]:
    """Returns the gradient of the residual plus the data loss."""
    loss = lambda w, D: pinn_loss(w, D, None) + data_loss(w, None, None)
    return jax.grad(loss, argnums=(0, 1))(w, D)


def bilo(start: PyTree) -> Row:
    """Returns the row of BiLO from some weights."""
    return run_jointly(bilo_grads, pretrain(operator_loss, start), has_input=True)


def bilo_by_darts() -> Row:
    """Returns the row of BiLO by the estimator of this package."""
    problem = hg.Bilevel(operator_loss, data_loss)
    w = pretrain(operator_loss, torch_start())
    row = run_loop(problem, hg.DARTS(INNER_OPTIMIZER), w)
    row["gradient_equivalents"] += PRETRAINING
    return row


def implicit() -> Row:
    """Returns the row of exact hypergradients with Adam."""
    problem = hg.Bilevel(energy, grid_data_loss)
    u = jnp.zeros(NUM_INTERVALS - 1)
    return run_loop(problem, hg.Implicit(hg.Newton()), u)


def implicit_lbfgs() -> Row:
    """Returns the row of exact hypergradients with scipy's L-BFGS-B."""
    from scipy.optimize import minimize

    problem = hg.Bilevel(energy, grid_data_loss)
    gradient = hg.hypergradient(problem, hg.Implicit(hg.Newton()))
    estimates = []

    def evaluate(D):
        u = jnp.zeros(NUM_INTERVALS - 1)
        estimate = gradient(u, jnp.asarray(D[0], jnp.float32))
        estimates.append(estimate)
        return float(estimate.value), np.array([estimate.hypergradient], float)

    result: Any = minimize(
        evaluate, [INIT_D], jac=True, method="L-BFGS-B", bounds=[(0.1, 10)]
    )
    costs = [float(x.stats["gradient_equivalents"]) for x in estimates]
    return {
        "D": float(result.x[0]),
        "data_loss": float(result.fun),
        "gradient_equivalents": sum(costs),
    }


def pinn() -> Row:
    """Returns the row of a network and D that move along one loss."""
    return run_jointly(pinn_grads, pretrain(pinn_loss, torch_start()), has_input=False)


def least_squares() -> Row:
    """Returns the best fit of the exact solution."""
    x, y, _ = observations()
    s = np.sin(np.pi * x.astype(float))
    D = np.vdot(s, s) / np.vdot(s, y)
    return {"D": float(D), "data_loss": float(np.mean((s / D - y) ** 2))}


METHODS = {
    "BiLO": lambda seed: bilo(torch_start()),
    "BiLO, other starts": lambda seed: bilo(init_network(KeyGenerator(seed))),
    "BiLO by DARTS": lambda seed: bilo_by_darts(),
    "Implicit, Adam": lambda seed: implicit(),
    "Implicit, L-BFGS": lambda seed: implicit_lbfgs(),
    "PINN, one loss": lambda seed: pinn(),
    "least squares": lambda seed: least_squares(),
}


def measure(cell: Cell, rows: list[Row]) -> Row:
    """Returns the trace of D of a method."""
    del rows
    return METHODS[cell["method"]](cell["seed"])


def plot(rows: list[Row], path: Path) -> None:
    """Plots D against the steps, and its difference from the row *BiLO*."""
    figure, (left, right) = make_panels(1, 2, (13, 5))
    (reference,) = select(rows, method="BiLO")
    (best_fit,) = select(rows, method="least squares")
    for i, method in enumerate(METHODS):
        for row in select(rows, method=method):
            curve = np.array(row.get("curve") or [])
            label = method if curve.size and row["seed"] == 0 else None
            steps = STRIDE * np.arange(len(curve))
            left.plot(steps, curve, color=f"C{i}", label=label)
            if curve.size and method != "PINN, one loss":
                right.plot(
                    steps, curve - reference["curve"], color=f"C{i}", label=label
                )
    steps, published = list(PUBLISHED), np.array(list(PUBLISHED.values()))
    left.plot(steps, published, "kD", label="published")
    differences = published - [reference[f"D_{k}"] for k in steps]
    right.plot(steps, differences, "kD", label="published")
    left.axhline(best_fit["D"], color="gray", linestyle="--", label="least squares")
    left.axhline(TRUE_D, color="gray", linestyle=":", label="without noise")
    left.set(xlabel="step", ylabel="coefficient D")
    right.set(xlabel="step", ylabel="D - D of the row BiLO")
    for axis in (left, right):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


NOTEBOOK = "tutorial_scalar.ipynb"
table = MeasurementTable(
    cells=cells_with_seeds(
        dict.fromkeys(METHODS, 1) | {"BiLO, other starts": math.inf}
    ),
    measure_cell=measure,
    columns=(
        *(Column(f"D_{k}", f"D at {k}", ".4f") for k in PUBLISHED),
        Column("D", "last D", ".4f"),
        Column("data_loss", "data loss", ".6f"),
    ),
    published={
        ("BiLO", f"D_{k}"): Published(D, 0.03, "verified", source=NOTEBOOK)
        for k, D in PUBLISHED.items()
    }
    | {("least squares", "D"): Published(BEST_FIT, 0.005, "executed", source=NOTEBOOK)},
    plot=plot,
    seeds=5,
    scales=("paper",),
    minutes=4,
    paradigm="physics-informed",
    source="Zhang et al. 2024 (arXiv 2404.17789), the scalar notebook",
    data="simulated observations of a Poisson problem",
)
