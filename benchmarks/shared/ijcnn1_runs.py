"""The log-penalties of ijcnn1 as in benchmark_bilevel: the runs of `bilevel_ijcnn1`."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jaxtyping import Array

import hypergrad as hg
from hypergrad.bench import Row
from hypergrad.runtime.compat import enable_x64

from .benchmark_bilevel import make_solver, make_steps, variables_of
from .step_problems import StepProblem, logistic

BATCH, EVALUATION = 64, 131_072
FULL_BATCH = "SOBA, full batch"
#: Step size, ratio, number of evaluations.
SETTINGS = {
    "SABA": (0.25, 1.0, 5),
    "SOBA": (4.0, 1.0, 5),
    "AmIGO": (0.125, 0.316, 2),
    "StocBiO": (0.5, 0.316, 2),
}
AT = (1, 2, 5, 10, 20)
LOW, HIGH = -12.0, 2.0


@functools.cache
def problem() -> StepProblem:
    """Returns the problem with the authors' starting point."""
    rng = np.random.RandomState(2442)
    w, alpha = rng.randn(22), np.log(rng.rand(22))
    return logistic()._replace(w=jnp.asarray(w), alpha=jnp.asarray(alpha))


@functools.cache
def exact() -> tuple[hg.Bilevel, Callable]:
    """Returns the problem in float64, and its exact hypergradient."""
    parts = problem()
    wide = lambda data: {k: jnp.asarray(x, jnp.float64) for k, x in data.items()}
    inner_loss = lambda w, alpha, batch: parts.inner_loss(
        w, jnp.broadcast_to(alpha, (22,)), batch
    )
    data = wide(parts.inner_data), wide(parts.outer_data)
    full = hg.Bilevel(inner_loss, parts.outer_loss, *data)
    implicit = hg.Implicit(hg.Newton(), estimate_error=False)
    return full, jax.jit(hg.hypergradient(full, implicit))


def estimate(alpha: Array | np.ndarray) -> hg.Estimate:
    """Returns ``h`` and its gradient in float64."""
    with enable_x64(True):
        _, hypergradient = exact()
        return hypergradient(jnp.zeros(22), jnp.asarray(alpha, jnp.float64))


def h(alpha: Array) -> float:
    """Returns the value function; NaN where a run is not finite."""
    return float(estimate(alpha).value) if np.all(np.isfinite(alpha)) else np.nan


def make_loop(method: str) -> hg.OuterLoop:
    """Returns the outer loop of a method."""
    step_size, ratio, _ = SETTINGS.get(method, (2.0, 0.0316, 0))
    is_falling = method.startswith("SOBA")
    rate = lambda size: (lambda t: size / jnp.sqrt(t + 1.0)) if is_falling else size
    optimizer = optax.sgd(rate(step_size))
    estimator = {
        "SABA": lambda: hg.SABA(optimizer),
        "AmIGO": lambda: hg.AmIGO(optimizer, 10, 10),
        "StocBiO": lambda: hg.StocBiO(optimizer, 10, 11, step_size=step_size),
    }.get(method, lambda: hg.SOBA(optimizer))()
    parts = problem()
    full = hg.Bilevel(
        parts.inner_loss, parts.outer_loss, parts.inner_data, parts.outer_data
    )
    bilevel = full if method == FULL_BATCH else parts.sampled(BATCH)
    return hg.OuterLoop(bilevel, estimator, optax.sgd(rate(step_size / ratio)))


def run_loop(method: str, seed: int) -> Row:
    """Returns ``h`` along a run, until a number is not finite."""
    loop, parts = make_loop(method), problem()
    narrow = lambda x: jnp.asarray(x, jnp.float32)
    state = loop.init(narrow(parts.w), narrow(parts.alpha), jax.random.key(seed))
    is_full = method == FULL_BATCH
    size, num = (4, AT[-1]) if is_full else (EVALUATION, SETTINGS[method][2])
    points = AT if is_full else tuple(range(1, num + 1))
    values, cost = [], 0.0
    for k in np.diff(points, prepend=0):
        every = 1 if is_full else size
        trace = loop.run(state, num_steps=int(k) * size, record_every=every)
        if trace.status != "completed":
            values += [np.nan] * (len(points) - len(values))
            break
        cost += float(trace.cost[-1])
        values.append(h(trace.alpha))
        state = trace.state
    return row_of(values, size * np.array(points), cost)


def row_of(values: list[float], steps: np.ndarray, cost: float = np.nan) -> Row:
    """Returns ``h`` by iteration, and its curve."""
    return {
        **{f"step_{k}": value for k, value in zip(steps, values, strict=True)},
        "last": values[-1],
        "gradient_equivalents": cost,
        "curve_step": steps.tolist(),
        "curve_value": values,
        "curve_cost": (cost * steps / steps[-1]).tolist(),
    }


def run_peer(method: str, seed: int) -> Row:
    """Returns ``h`` after two evaluations of a solver of the checkout."""
    parts = problem()
    step_size, ratio, _ = SETTINGS[method]
    solver = make_solver(
        method, step_size=step_size, outer_ratio=ratio, random_state=seed + 1
    )
    narrow = lambda x: jnp.asarray(x, jnp.float32)
    solver.set_objective(
        *parts.sliced(), *parts.sizes, narrow(parts.w), narrow(parts.alpha)
    )
    carry, results = solver.init(), []
    for k in range(2):
        carry = make_steps(solver, method, carry, EVALUATION, k * EVALUATION)
        results.append(h(variables_of(carry)["outer_var"]))
    return row_of(results, EVALUATION * np.array([1, 2]))


def search(method: str, seed: int) -> hg.Trace:
    """Returns a search for one common log-penalty, or for all of them."""
    is_grid = method == "grid"
    cost_of_saba = EVALUATION * 3.84e-3  # as a trial of it spent
    with enable_x64(True):
        return hg.search(
            exact()[0],
            hg.Newton(),
            hg.searchers.Grid(30) if is_grid else hg.searchers.Random(),
            jnp.zeros(22),
            space=hg.spaces.Interval(LOW, HIGH, shape=() if is_grid else (22,)),
            budget=1e9 if is_grid else cost_of_saba,
            key=jax.random.key(seed),
        )


def search_row(values: np.ndarray, costs: np.ndarray) -> Row:
    """Returns the lowest value, and the lowest ones so far by cost."""
    return {
        "last": float(values[-1]),
        "gradient_equivalents": float(costs[-1]),
        "is_search": True,
        "curve_step": list(range(len(values))),
        "curve_value": values.tolist(),
        "curve_cost": costs.tolist(),
    }


def run_lbfgs(alpha: np.ndarray) -> Row:
    """Returns where L-BFGS-B ends, and the numbers of its start."""
    estimates = []

    def value_and_grad(alpha: np.ndarray) -> tuple[float, np.ndarray]:
        estimates.append(estimate(alpha))
        return float(estimates[-1].value), np.asarray(estimates[-1].hypergradient)

    options = {"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-7}
    scipy.optimize.minimize(
        value_and_grad,
        np.asarray(alpha, float),
        jac=True,
        method="L-BFGS-B",
        bounds=[(LOW, 0.0)] * 22,
        options=options,
    )
    values = np.minimum.accumulate([float(x.value) for x in estimates])
    costs = np.cumsum([float(x.stats["gradient_equivalents"]) for x in estimates])
    start = np.asarray(estimates[0].hypergradient)
    return search_row(values, costs) | {
        "start": float(estimates[0].value),
        "start_grad": float(np.sum(start**2)),
    }
