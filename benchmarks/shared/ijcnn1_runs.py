"""The log-penalties of ijcnn1 as in benchmark_bilevel: the runs of `bilevel_ijcnn1`."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jaxtyping import Array

import hypergrad as hg
from hypergrad.bench import Row
from hypergrad.estimators.single_loop.inner_loops import StochasticNeumann
from hypergrad.extend import Estimator
from hypergrad.runtime.compat import enable_x64

from . import benchmark_bilevel_2022
from .benchmark_bilevel import make_solver, make_steps, variables_of
from .doubled_series import DoubledStocBiO
from .step_problems import StepProblem, logistic

BATCH = 64
EVALUATION, FULL_BATCH_EVALUATION = 131_072, 4  # iterations
NUM_INNER = NUM_PRODUCTS = 10
CLIPPING = -12.0, 12.0  # of the log-penalties, in the stored runs
FULL_BATCH = "SOBA, full batch"
DOUBLED_STOCBIO = "StocBiO, doubled series"
AT = (1, 2, 5, 10, 20)
LOW, HIGH = -12.0, 2.0


class Setting(NamedTuple):
    """The step sizes of a method and the length of its run.

    Attributes:
      step_size: Step size of ``w`` and of the adjoint.
      ratio: ``step_size`` over that of ``lambda``.
      num_evaluations: Length of our run.
      powers: Step sizes fall as ``(t + 1)^-power``, for ``w`` and for ``lambda``.
    """

    step_size: float
    ratio: float
    num_evaluations: int
    powers: tuple[float, float] = (0.0, 0.0)


ROOT_TEN = 10**0.5
SETTINGS = {
    "SABA": Setting(0.25, 1.0, 40),
    "AmIGO": Setting(0.125, 1 / ROOT_TEN, 17),
    "StocBiO": Setting(0.5, 1 / ROOT_TEN, 10),
    DOUBLED_STOCBIO: Setting(0.5, 1 / ROOT_TEN, 10),
    "MRBO": Setting(1.0, 0.1 / ROOT_TEN, 20, (1 / 3, 1 / 3)),
    "BSA": Setting(1.0, 0.01, 20, (1 / 2, 1 / 2)),
    "SOBA": Setting(4.0, 1.0, 40, (1 / 2, 1 / 2)),
    "TTSA": Setting(1.0, 0.1 / ROOT_TEN, 20, (2 / 5, 3 / 5)),
    "FSLA": Setting(1.0, 1 / ROOT_TEN, 40, (1 / 2, 1 / 2)),
    FULL_BATCH: Setting(2.0, 0.1 / ROOT_TEN, 350, (1 / 2, 1 / 2)),
}
METHODS_OF_PEER = tuple(m for m in SETTINGS if m not in (DOUBLED_STOCBIO, FULL_BATCH))
NUM_PEER_EVALUATIONS, NUM_EVALUATIONS_OF_2022 = 5, 2


class Passes(hg.Batches):
    """Blocks in passes: the first in the order of the data, all later ones shuffled."""

    def draw_block(self, key: Array) -> Array:
        """Returns the number of the block."""
        shuffled = super().draw_block(key)
        if self.position is None or not self.position.is_batch:
            return shuffled
        number = self.position.number
        return jnp.where(number < self.num_blocks, number, shuffled)


class RandomLengthStocBiO(hg.StocBiO):
    """StocBiO with a series of random length, which is BSA."""

    @property
    def series(self) -> StochasticNeumann:
        """The series that approximates the adjoint."""
        return StochasticNeumann(self.step_size, self.num_terms, True)


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


def kept_within(low: float, high: float) -> optax.GradientTransformation:
    """Returns updates after which the parameters lie in ``[low, high]``."""

    def update(updates: Array, state: optax.EmptyState, params: Array | None = None):
        assert params is not None
        return jnp.clip(params + updates, low, high) - params, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def falling(size: float, power: float) -> optax.ScalarOrSchedule:
    """Returns the step sizes ``size (t + 1)^-power``."""
    return (lambda t: size * (t + 1.0) ** -power) if power else size


def make_estimator(method: str) -> Estimator:
    """Returns a method with the settings of the stored runs."""
    size, _, _, (power, _) = SETTINGS[method]
    optimizer = optax.sgd(falling(size, power))
    series = {"num_terms": NUM_PRODUCTS + 1, "step_size": size}
    random_series = {"num_terms": NUM_PRODUCTS, "step_size": size}
    one_minus = lambda momentum: lambda t: 1.0 - momentum(t)
    estimators = {
        "SABA": lambda: hg.SABA(optimizer),
        "AmIGO": lambda: hg.AmIGO(optimizer, NUM_INNER, NUM_PRODUCTS),
        "StocBiO": lambda: hg.StocBiO(optimizer, NUM_INNER, **series),
        DOUBLED_STOCBIO: lambda: DoubledStocBiO(optimizer, NUM_INNER, **series),
        "MRBO": lambda: hg.MRBO(
            optimizer, **series, momentum=one_minus(falling(0.5, 2 / 3))
        ),
        "BSA": lambda: RandomLengthStocBiO(optimizer, NUM_INNER, **random_series),
        "TTSA": lambda: hg.TTSA(optimizer, **random_series),
        "FSLA": lambda: hg.FSLA(optimizer, momentum=one_minus(falling(1.0, 1 / 2))),
    }
    return estimators.get(method, lambda: hg.SOBA(optimizer))()


def make_loop(method: str) -> hg.OuterLoop:
    """Returns the outer loop of a method."""
    size, ratio, _, (_, power) = SETTINGS[method]
    parts = problem()
    data = parts.inner_data, parts.outer_data
    if method != FULL_BATCH:
        data = tuple(Passes(x, BATCH, order="epoch_blocks") for x in data)
    outer_optimizer = optax.chain(
        optax.sgd(falling(size / ratio, power)), kept_within(*CLIPPING)
    )
    bilevel = hg.Bilevel(parts.inner_loss, parts.outer_loss, *data)
    return hg.OuterLoop(bilevel, make_estimator(method), outer_optimizer)


def points_of(method: str) -> tuple[int, ...]:
    """Returns the evaluations after which ``h`` is evaluated."""
    num = SETTINGS[method].num_evaluations
    more = range(30, num, 10) if method != FULL_BATCH else (50, 100, 200)
    return (*(k for k in (*AT, *more) if k < num), num)


def run_loop(method: str, seed: int) -> Row:
    """Returns ``h`` along a run, until a number is not finite."""
    loop, parts = make_loop(method), problem()
    narrow = lambda x: jnp.asarray(x, jnp.float32)
    state = loop.init(narrow(parts.w), narrow(parts.alpha), jax.random.key(seed))
    size = FULL_BATCH_EVALUATION if method == FULL_BATCH else EVALUATION
    points = points_of(method)
    values, cost = [], 0.0
    for k in np.diff(points, prepend=0):
        num_steps = int(k) * size
        trace = loop.run(state, num_steps=num_steps, record_every=size)
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
    """Returns ``h`` along a run of a solver of the checkout."""
    parts = problem()
    size, ratio, _, _ = SETTINGS[method]
    solver = make_solver(
        method, step_size=size, outer_ratio=ratio, random_state=seed + 1
    )
    narrow = lambda x: jnp.asarray(x, jnp.float32)
    solver.set_objective(
        *parts.sliced(), *parts.sizes, narrow(parts.w), narrow(parts.alpha)
    )
    points = [k for k in AT if k <= NUM_PEER_EVALUATIONS]
    carry, values = solver.init(), []
    for k in range(1, points[-1] + 1):
        carry = make_steps(solver, method, carry, EVALUATION, (k - 1) * EVALUATION)
        if k in points:
            values.append(h(variables_of(carry)["outer_var"]))
    return row_of(values, EVALUATION * np.array(points))


def run_code_of_2022(copies: bool) -> Row:
    """Returns ``h`` along a run of stocBiO of the code of 2022."""
    size, ratio, _, _ = SETTINGS["StocBiO"]
    alphas = benchmark_bilevel_2022.run_stocbio(
        problem(),
        {"step_size": size, "outer_ratio": ratio},
        NUM_EVALUATIONS_OF_2022,
        EVALUATION,
        copies=copies,
    )
    points = np.arange(1, NUM_EVALUATIONS_OF_2022 + 1)
    return row_of([h(alpha) for alpha in alphas], EVALUATION * points)


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
