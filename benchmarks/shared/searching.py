"""The problem and the methods of the table `search`: 2, 20 and 500 penalties.

Softmax regression without bias on 50 pixels of the digits, with two fifths of the
training labels wrong::

    L(w, a) = mean CE(w) + 1/2 sum_jc exp(a_jc) w_jc²,   M(w) = mean CE on other digits

with one log-penalty per weight, or one per group of weights. Every method starts at the
same penalties and is charged until its outer value is within 1% of the minimum, which
L-BFGS computes with the exact hypergradient in float64.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.bench import Cell, Row
from hypergrad.runtime.compat import enable_x64
from hypergrad.searchers.base import Trials, seed_from_key

from .program import Program
from .task_runs import implicit_by_cg
from .tuning import digits

SIZES = (2, 20, 500)
NUM_TRAIN, NUM_VAL = 200, 800
WRONG = 0.4  # of the training labels
PIXELS, CLASSES = 50, 10
LOW, HIGH, START = -6.0, 0.0, -3.0  # of a log-penalty
NEAR = 0.01  # of the way from the target back to the start
SOURCE = "Bergstra & Bengio 2012; Lorraine et al. 2020 (arXiv 1911.02590)"


def penalties(alpha: Array) -> Array:
    """Returns penalties, [pixels, classes], of 2, 20 or 500 log-penalties.

    There is one per half of the pixels, per half and class, or per weight. The halves
    are the pixels that vary most on the training digits, and the rest.
    """
    rows = {2: (2, 1), 20: (2, CLASSES), 500: (PIXELS, CLASSES)}[alpha.size]
    alpha = jnp.repeat(alpha.reshape(rows), PIXELS // rows[0], axis=0)
    return jnp.exp(jnp.broadcast_to(alpha, (PIXELS, CLASSES)))


def cross_entropy(w: Array, batch: PyTree) -> Array:
    """Returns the mean over the batch; ``w`` has shape [pixels, classes]."""
    scores = batch["x"] @ w
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"]))


def inner_loss(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Returns the training loss with the penalties."""
    return cross_entropy(w, batch) + 0.5 * jnp.sum(penalties(alpha) * w**2)


def outer_loss(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Returns the validation loss, which does not depend on the penalties."""
    del alpha
    return cross_entropy(w, batch)


def split(seed: int) -> dict[str, PyTree]:
    """Returns training, validation and test digits by a permutation of the seed."""
    data, rng = digits(), np.random.default_rng(seed)
    order = rng.permutation(len(data["y"]))
    train, val, test = np.split(order, [NUM_TRAIN, NUM_TRAIN + NUM_VAL])
    x = np.asarray(data["x"], np.float32)
    most_varying = np.argsort(-x[train].var(axis=0), kind="stable")[:PIXELS]
    x = x[:, most_varying] - x[train][:, most_varying].mean(axis=0)
    subset = lambda rows: {"x": x[rows], "y": np.asarray(data["y"], np.int32)[rows]}
    parts = {"train": subset(train), "val": subset(val), "test": subset(test)}
    wrong, other = rng.random(NUM_TRAIN) < WRONG, rng.integers(1, CLASSES, NUM_TRAIN)
    parts["train"]["y"] = (parts["train"]["y"] + wrong * other) % CLASSES
    return parts


def in_double(tree: PyTree) -> PyTree:
    """Returns float64 arrays; needs `jax.enable_x64`."""
    wide = lambda x: x.astype(np.float64) if x.dtype == np.float32 else x
    return jax.tree.map(lambda x: jnp.asarray(wide(np.asarray(x))), tree)


class Target(NamedTuple):
    """The outer value at the start, the target, and the ``alpha`` of the target."""

    start: float
    target: float
    alpha: np.ndarray

    @property
    def bound(self) -> float:
        """The value at which the target counts as reached."""
        return self.target + NEAR * (self.start - self.target)


def lowest(
    h: Callable[[np.ndarray], tuple[float, np.ndarray]],
    first: np.ndarray,
    ends: tuple[float, float],
    **options: float,
) -> tuple[float, np.ndarray]:
    """Returns minimum and minimizer of ``h`` in a box by L-BFGS."""
    bounds = [ends] * first.size
    result = scipy.optimize.minimize(h, first, jac=True, bounds=bounds, options=options)
    return float(result.fun), np.asarray(result.x)


@functools.cache
def known(seed: int, size: int) -> Target:
    """Returns ``min h`` over the box by L-BFGS from the start, in float64."""
    parts = split(seed)
    with enable_x64(True):
        train, val = in_double(parts["train"]), in_double(parts["val"])
        problem = hg.Bilevel(inner_loss, outer_loss, train, val)
        exact = hg.Implicit(
            hg.Newton(tolerance=1e-7), hg.CG(rtol=1e-6, preconditioner=None)
        )
        hypergradient = jax.jit(hg.hypergradient(problem, exact))
        w = [jnp.zeros((PIXELS, CLASSES))]

        def h(alpha: np.ndarray) -> tuple[float, np.ndarray]:
            estimate = hypergradient(w[0], jnp.asarray(alpha))
            w[0] = estimate.w  # the next solution is near
            return float(estimate.value), np.asarray(estimate.hypergradient)

        first = np.full(size, START)
        start, _ = h(first)
        target, alpha = lowest(h, first, (LOW, HIGH), maxiter=100, ftol=1e-8)
    return Target(start, target, alpha)


# With hypergradients.

BUDGET = 8000  # gradient-equivalents of such a run, and of every tuning run
NUM_EVALUATIONS = 125  # of such a run, about
STEP = optax.sgd(0.5, momentum=0.9)
RATES, SLOW_RATES = (0.1, 0.3, 1.0), (0.01, 0.03, 0.1)


class Descent(NamedTuple):
    """A method with hypergradients; the rates of Adam on the penalties are tuned."""

    estimator: Any
    settings: tuple[float, ...]
    num_steps: int


DESCENTS = {
    "implicit": Descent(
        implicit_by_cg(hg.Newton(tolerance=1e-3), rtol=0.1),
        RATES,
        250,
    ),
    "implicit, 10 steps": Descent(
        implicit_by_cg(hg.Descent(STEP, 10), max_steps=5),
        RATES,
        250,
    ),
    "unrolled": Descent(
        hg.Unrolled(hg.Descent(STEP, 20), checkpoint=True, warm_start=True), RATES, 95
    ),
    "SOBA": Descent(hg.SOBA(optax.sgd(0.5)), SLOW_RATES, 1330),
}


def exact_value(
    train: PyTree, val: PyTree, w: Array, alpha: Array, key: Array
) -> Array:
    """Returns ``h(alpha)``, trained from zero; NaN if training does not converge."""
    return scored(train, val, jnp.zeros_like(w), alpha, key)[0]


def scored(train: PyTree, other: PyTree, w: Array, alpha: Array, key: Array) -> Any:
    """Returns cross-entropy and error on other digits, of the trained model."""
    size = lambda w: jnp.linalg.norm(jax.grad(inner_loss)(w, alpha, train))
    first = size(w)
    w, _ = hg.Newton(tolerance=1e-5).solve(inner_loss, w, alpha, train, key)
    wrong = jnp.mean(jnp.argmax(other["x"] @ w, axis=1) != other["y"])
    loss = jnp.where(size(w) < 1e-3 * first, cross_entropy(w, other), jnp.nan)
    return loss, wrong


SCORED = jax.jit(scored)


def first_w(train: PyTree, alpha: Array) -> tuple[Array, Array]:
    """Returns ``w`` at which every method starts, and its gradient-equivalents."""
    w = jnp.zeros((PIXELS, CLASSES))
    w, stats = hg.Newton(tolerance=1e-3).solve(
        inner_loss, w, alpha, train, jax.random.key(0)
    )
    counts = {name: stats[name] for name in ("num_grads", "num_hvps", "num_values")}
    return w, hg.cost.cost_stats(train, train, **counts)["gradient_equivalents"]


def descend(method: str, train: PyTree, val: PyTree, alpha: Array, rate: Array) -> dict:
    """Returns evaluations along a run of Adam with the hypergradients of a method."""
    config = DESCENTS[method]
    w, first = first_w(train, alpha)
    loop = hg.OuterLoop(
        hg.Bilevel(inner_loss, outer_loss, train, val),
        config.estimator,
        optax.adam(rate),
        space=hg.spaces.Interval(LOW, HIGH),
        metrics={"h": jax.tree_util.Partial(exact_value, train, val)},
        eval_every=max(1, config.num_steps // NUM_EVALUATIONS),
    )
    trace = loop.run(loop.init(w, alpha), num_steps=config.num_steps)
    return {"h": trace.metrics["h"], "cost": first + trace.cost, "alpha": trace.alpha}


# Without.


class Searching(NamedTuple):
    """A searcher with its settings.

    Attributes:
      make: ``setting -> searcher``.
      settings: Settings to try.
      most: ``{size: maximum number of trials}``; other sizes are left out.
      widths: Whether settings are half-widths of the box around the start.
    """

    make: Callable[[float], Any]
    settings: tuple[float, ...]
    most: dict[int, float]
    widths: bool = True


class Gaussian:
    """`hypergrad.searchers.CMAES` with fewer draws per proposal.

    With 500 axes hardly a draw is within the box. Draws outside of it are repeated a
    few times and then clipped.
    """

    def __init__(self, step_size: float):
        self.step_size = step_size

    def init(self, space: PyTree, key: Array) -> Trials:
        """Returns no trials."""
        import cmaes  # which the table can be judged and printed without

        del key
        trials = Trials.empty(space)
        axes = trials.t.shape[1]
        self.cma = cmaes.CMA(
            mean=np.full(axes, 0.5), sigma=self.step_size,
            bounds=np.tile([0.0, 1.0], (axes, 1)),
            n_max_resampling=min(100, 2000 // axes),
        )  # fmt: skip
        return trials

    def ask(self, state: Trials, key: Array) -> tuple[PyTree, Trials]:
        """Returns the next proposal."""
        self.cma.reseed_rng(seed_from_key(key))
        return hg.spaces.from_unit(state.space, self.cma.ask()), state

    def tell(self, state: Trials, alpha: PyTree, value: Array) -> Trials:
        """Returns the trials with another one."""
        state = state.add(alpha, value)
        size = self.cma.population_size
        if len(state.values) % size == 0:
            last = zip(state.t[-size:], state.values[-size:], strict=True)
            self.cma.tell(list(last))
        return state


class Until:
    """A searcher that stops once a value is at the bound, or after ``most`` trials."""

    def __init__(self, searcher: Any, bound: float, most: float):
        self.searcher, self.bound = searcher, bound
        self.num_left, self.is_reached = most, False

    def init(self, space: PyTree, key: Array) -> Any:
        """Returns the state of the searcher."""
        return self.searcher.init(space, key)

    def ask(self, state: Any, key: Array) -> tuple[PyTree, Any]:
        """Returns the next proposal, or stops."""
        if self.is_reached or self.num_left < 1:
            raise StopIteration
        self.num_left -= 1
        return self.searcher.ask(state, key)

    def tell(self, state: Any, alpha: PyTree, value: Array) -> Any:
        """Returns the state with another trial."""
        self.is_reached = self.is_reached or bool(value <= self.bound)
        return self.searcher.tell(state, alpha, value)


WIDTHS = (1.0, 2.0, 3.0)
ALL, SMALL = (dict.fromkeys(sizes, math.inf) for sizes in (SIZES, (2, 20)))
SEARCHING = {
    "Grid": Searching(
        lambda num: hg.searchers.Grid(int(num)), (5, 9, 13), {2: math.inf}, False
    ),
    "Random": Searching(lambda _: hg.searchers.Random(), WIDTHS, ALL),
    "Sobol": Searching(lambda _: hg.searchers.Sobol(), WIDTHS, SMALL),
    "TPE": Searching(lambda _: hg.searchers.TPE(), WIDTHS, {2: 100, 20: 100}),
    "GaussianProcess": Searching(
        lambda _: hg.searchers.GaussianProcess(), WIDTHS, {2: 40}
    ),
    "CMAES": Searching(Gaussian, (0.02, 0.05, 0.1), ALL, False),
}
TRAINING = hg.Newton(tolerance=1e-4)  # of a trial


def search(
    method: str, parts: PyTree, setting: float, size: int, bound: float,
    budget: float, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Returns trials from the initial ``w`` until bound or budget are reached."""
    config = SEARCHING[method]
    train, val = parts["train"], parts["val"]
    w, init_cost = init_w_fn(size)(train)
    half_width = setting if config.widths else (HIGH - LOW) / 2
    trace = hg.search(
        hg.Bilevel(inner_loss, outer_loss, train, val),
        TRAINING,
        Until(config.make(setting), bound, config.most[size]),
        w,
        space=hg.spaces.Interval(START - half_width, START + half_width, shape=(size,)),
        budget=budget - float(init_cost),
        key=jax.random.key(seed),
    )
    return {
        "h": np.asarray(trace.value),
        "cost": float(init_cost) + np.asarray(trace.cost),
        "alpha": trace.best_alpha,
    }


@functools.cache
def descent_of(method: str, size: int) -> Program:
    """Returns `descend`, compiled once per size."""
    del size  # a program is of one shape
    return Program(functools.partial(descend, method))


@functools.cache
def init_w_fn(size: int) -> Callable:
    """Returns `first_w` at the initial penalties, compiled."""
    return jax.jit(lambda train: first_w(train, jnp.full(size, START)))


# A run and its quality.

METHODS = (*DESCENTS, *SEARCHING)
REFERENCES = ("start", "L-BFGS")  # rows that cost nothing


def settings_of(method: str) -> tuple[float, ...]:
    """Returns the settings that are tried."""
    return (DESCENTS | SEARCHING)[method].settings


@functools.cache
def arrays(seed: int) -> PyTree:
    """Returns the splits of a seed as arrays of JAX."""
    return jax.tree.map(jnp.asarray, split(seed))


@functools.lru_cache(maxsize=256)
def run(method: str, seed: int, size: int, setting: float, budget: float) -> Row:
    """Returns the evaluations of a run within its budget, and its last ``alpha``.

    In the row ``cost`` is that of reaching the target, or None if it is not reached;
    then ``spent``, the whole cost, is a lower bound. ``left`` is the remaining fraction
    of the way from the start to the target at the best evaluation.
    """
    parts, target = arrays(seed), known(seed, size)
    if method in DESCENTS:
        descent = descent_of(method, size)
        args = (
            parts["train"],
            parts["val"],
            jnp.full(size, START),
            jnp.float32(setting),
        )
        result = jax.tree.map(np.asarray, descent(*args))
    else:
        result = search(method, parts, setting, size, target.bound, budget, seed)
    return evaluate_run(result["h"], result["cost"], target, budget) | {
        "alpha": np.asarray(result["alpha"], float).tolist()
    }


def course(left: np.ndarray, cost: np.ndarray) -> Row:
    """Returns the remaining fraction at the end, and a curve of at most 60 points."""
    best = np.minimum.accumulate(left)
    indices = np.unique(np.geomspace(1, best.size, 60).astype(int)) - 1
    return {
        "spent": float(cost[-1]),
        "left": float(best[-1]),
        "curve": best[indices].tolist(),
        "curve_cost": cost[indices].tolist(),
    }


def evaluate_run(h: Any, cost: Any, target: Target, budget: float) -> Row:
    """Returns the part of a run that is within the budget."""
    h, cost = np.asarray(h, float), np.asarray(cost, float)
    is_counted = np.isfinite(h) & (cost <= budget)
    h, cost = h[is_counted], cost[is_counted]
    reached = np.flatnonzero(h <= target.bound)
    row = {
        "cost": float(cost[reached[0]]) if reached.size else None,
        "evaluations": int(h.size),
    }
    if not h.size:  # the run is at its start
        h, cost = np.array([target.start]), np.zeros(1)
    return row | course((h - target.target) / (target.start - target.target), cost)


def score(row: Row) -> float:
    """Returns the log cost, beyond the budget by what is left; lower is better."""
    if row["cost"] is not None:
        return math.log(row["cost"])
    return math.log(BUDGET) + math.log(max(row["left"], NEAR) / NEAR)


def cells_at(seeds: Sequence[int], with_references: bool = False) -> list[Cell]:
    """Returns a cell for every method at the sizes that it can do."""
    extra = REFERENCES if with_references else ()
    return [
        {"method": method, "size": size, "seed": seed}
        for size in SIZES
        for method in (*extra, *METHODS)
        for seed in seeds
        if method not in SEARCHING or size in SEARCHING[method].most
    ]
