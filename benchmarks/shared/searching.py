"""What hypergradients must beat: 2, 20 and 500 penalties, with and without gradients.

Softmax regression on 50 pixels of the digits, no bias, two fifths of the
training labels wrong,

    L(w, a) = mean CE(w) + 1/2 sum_jc exp(a_jc) w_jc²,   M(w) = mean CE on other digits

with one log-penalty a weight, or one a group of weights. Every method begins at the
same penalties and is charged until it comes within 1% of the best there are, which
L-BFGS finds on the exact hypergradient in float64. What is tuned is in searching_grid,
what came of it in searching_table. See README.md.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cmaes
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.searchers.base import Trials, seed_from_key
from hypergrad.studies.program import Program
from hypergrad.studies.record import Row
from hypergrad.studies.study import digits

SIZES = (2, 20, 500)
NUM_TRAIN, NUM_VAL = 200, 800
WRONG = 0.4  # of the training labels
PIXELS, CLASSES = 50, 10
LOW, HIGH, START = -6.0, 0.0, -3.0  # of a log-penalty
NEAR = 0.01  # of the way from the target back to the start
SOURCE = "Bergstra & Bengio 2012; Lorraine et al. 2020 (arXiv 1911.02590)"


def penalties(alpha: Array) -> Array:
    """[pixels, classes], of one log-penalty a weight, a half and class, or a half.

    The halves are the pixels that vary most on the training digits, and the rest.
    """
    rows = {2: (2, 1), 20: (2, CLASSES), 500: (PIXELS, CLASSES)}[alpha.size]
    alpha = jnp.repeat(alpha.reshape(rows), PIXELS // rows[0], axis=0)
    return jnp.exp(jnp.broadcast_to(alpha, (PIXELS, CLASSES)))


def cross_entropy(w: Array, batch: PyTree) -> Array:
    """Mean over the batch; ``w`` [pixels, classes]."""
    scores = batch["x"] @ w
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"]))


def inner_loss(w: Array, alpha: Array, batch: PyTree) -> Array:
    return cross_entropy(w, batch) + 0.5 * jnp.sum(penalties(alpha) * w**2)


def outer_loss(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Does not read the penalties."""
    del alpha
    return cross_entropy(w, batch)


def split(seed: int) -> dict[str, PyTree]:
    """Training, validation and test digits by a permutation drawn from the seed."""
    data, rng = digits(), np.random.default_rng(seed)
    order = rng.permutation(len(data["y"]))
    train, val, test = np.split(order, [NUM_TRAIN, NUM_TRAIN + NUM_VAL])
    x = np.asarray(data["x"], np.float32)
    most = np.argsort(-x[train].var(axis=0), kind="stable")[:PIXELS]
    x = x[:, most] - x[train][:, most].mean(axis=0)
    part = lambda rows: {"x": x[rows], "y": np.asarray(data["y"], np.int32)[rows]}
    parts = {"train": part(train), "val": part(val), "test": part(test)}
    wrong, other = rng.random(NUM_TRAIN) < WRONG, rng.integers(1, CLASSES, NUM_TRAIN)
    parts["train"]["y"] = (parts["train"]["y"] + wrong * other) % CLASSES
    return parts


def in_double(tree: PyTree) -> PyTree:
    """Under `jax.enable_x64`."""
    wide = lambda x: x.astype(np.float64) if x.dtype == np.float32 else x
    return jax.tree.map(lambda x: jnp.asarray(wide(np.asarray(x))), tree)


class Known(NamedTuple):
    """What is known of a seed: h at the start, the target, its ``alpha``."""

    start: float
    target: float
    alpha: np.ndarray

    @property
    def bound(self) -> float:
        """Where the target counts as reached."""
        return self.target + NEAR * (self.start - self.target)


def lowest(
    h: Callable[[np.ndarray], tuple[float, np.ndarray]],
    first: np.ndarray,
    ends: tuple[float, float],
    **options: float,
) -> tuple[float, np.ndarray]:
    """The least of ``h``, a value and its gradient, in a box by L-BFGS, and where."""
    bounds = [ends] * first.size
    end = scipy.optimize.minimize(h, first, jac=True, bounds=bounds, options=options)
    return float(end.fun), np.asarray(end.x)


@functools.cache
def known(seed: int, size: int) -> Known:
    """``min h`` over the box by L-BFGS from the start, in float64."""
    parts = split(seed)
    with jax.enable_x64(True):
        train, val = in_double(parts["train"]), in_double(parts["val"])
        problem = hg.Bilevel(inner_loss, outer_loss, train, val)
        exact = hg.Implicit(hg.Newton(tolerance=1e-7), hg.CG(rtol=1e-6))
        look = jax.jit(hg.hypergradient(problem, exact))
        w = [jnp.zeros((PIXELS, CLASSES))]

        def h(alpha: np.ndarray) -> tuple[float, np.ndarray]:
            found = look(w[0], jnp.asarray(alpha))
            w[0] = found.w  # the next one is near
            return float(found.value), np.asarray(found.hypergradient)

        first = np.full(size, START)
        start, _ = h(first)
        target, alpha = lowest(h, first, (LOW, HIGH), maxiter=100, ftol=1e-8)
    return Known(start, target, alpha)


# With hypergradients.

BUDGET = 8000  # gradient-equivalents of such a run, and of every run that tunes
POINTS = 125  # at which it is evaluated, about
STEP = optax.sgd(0.5, momentum=0.9)
ADAM, SLOW = (0.1, 0.3, 1.0), (0.01, 0.03, 0.1)


class Descending(NamedTuple):
    """A method with hypergradients; the rates of Adam on the penalties are tuned."""

    estimator: Any
    settings: tuple[float, ...]
    num_steps: int


DESCENDING = {
    "implicit": Descending(
        hg.Implicit(hg.Newton(tolerance=1e-3), hg.CG(rtol=0.1)), ADAM, 250
    ),
    "implicit, 10 steps": Descending(
        hg.Implicit(hg.Descent(STEP, 10), hg.CG(max_steps=5)), ADAM, 250
    ),
    "unrolled": Descending(
        hg.Unrolled(hg.Descent(STEP, 20), warm_start=True), ADAM, 95
    ),
    "SOBA": Descending(hg.SOBA(optax.sgd(0.5)), SLOW, 1330),
}


def exact_value(
    train: PyTree, val: PyTree, w: Array, alpha: Array, key: Array
) -> Array:
    """``h(alpha)``, trained from zero; NaN where that does not converge."""
    return scored(train, val, jnp.zeros_like(w), alpha, key)[0]


def scored(train: PyTree, other: PyTree, w: Array, alpha: Array, key: Array) -> Any:
    """Cross-entropy and share of errors on other digits, of the trained model."""
    size = lambda w: jnp.linalg.norm(jax.grad(inner_loss)(w, alpha, train))
    first = size(w)
    w, _ = hg.Newton(tolerance=1e-5).solve(inner_loss, w, alpha, train, key)
    wrong = jnp.mean(jnp.argmax(other["x"] @ w, axis=1) != other["y"])
    loss = jnp.where(size(w) < 1e-3 * first, cross_entropy(w, other), jnp.nan)
    return loss, wrong


SCORED = jax.jit(scored)


def first_w(train: PyTree, alpha: Array) -> tuple[Array, Array]:
    """Where every method begins, and the gradient-equivalents that this costs."""
    w = jnp.zeros((PIXELS, CLASSES))
    w, spent = hg.Newton(tolerance=1e-3).solve(
        inner_loss, w, alpha, train, jax.random.key(0)
    )
    counts = {name: spent[name] for name in ("num_grads", "num_hvps", "num_values")}
    return w, hg.cost.cost_stats(train, train, **counts)["gradient_equivalents"]


def descend(method: str, train: PyTree, val: PyTree, alpha: Array, rate: Array) -> dict:
    """A run of Adam along the hypergradient of a method, evaluated as it goes."""
    own = DESCENDING[method]
    w, first = first_w(train, alpha)
    loop = hg.OuterLoop(
        hg.Bilevel(inner_loss, outer_loss, train, val),
        own.estimator,
        optax.adam(rate),
        space=hg.spaces.Interval(LOW, HIGH),
        metrics={"h": jax.tree_util.Partial(exact_value, train, val)},
        eval_every=max(1, own.num_steps // POINTS),
    )
    trace = loop.run(loop.init(w, alpha), num_steps=own.num_steps)
    return {"h": trace.metrics["h"], "cost": first + trace.cost, "alpha": trace.alpha}


# Without.


class Searching(NamedTuple):
    """A searcher for a setting; ``most`` trials at each size, None for the budget's.

    widths: settings are half-widths of its box about the start, else of its own.
    """

    make: Callable[[float], Any]
    settings: tuple[float, ...]
    most: dict[int, float]
    widths: bool = True


class Gaussian:
    """`hypergrad.searchers.CMAES`, but with 500 axes hardly a draw is within the box.

    Draws outside are repeated a few times there, and then clipped.
    """

    def __init__(self, step_size: float):
        self.step_size = step_size

    def init(self, space: PyTree, key: Array) -> Trials:
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
        self.cma.reseed_rng(seed_from_key(key))
        return hg.spaces.from_unit(state.space, self.cma.ask()), state

    def tell(self, state: Trials, alpha: PyTree, value: Array) -> Trials:
        state = state.add(alpha, value)
        size = self.cma.population_size
        if len(state.values) % size == 0:
            last = zip(state.t[-size:], state.values[-size:], strict=True)
            self.cma.tell(list(last))
        return state


class Until:
    """A searcher that proposes nothing more once a value is at the bound."""

    def __init__(self, searcher: Any, bound: float, most: float):
        self.searcher, self.bound, self.left, self.there = searcher, bound, most, False

    def init(self, space: PyTree, key: Array) -> Any:
        return self.searcher.init(space, key)

    def ask(self, state: Any, key: Array) -> tuple[PyTree, Any]:
        if self.there or self.left < 1:
            raise StopIteration
        self.left -= 1
        return self.searcher.ask(state, key)

    def tell(self, state: Any, alpha: PyTree, value: Array) -> Any:
        self.there = self.there or bool(value <= self.bound)
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


def seek(
    method: str, parts: PyTree, setting: float, size: int, bound: float,
    budget: float, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Trials from the ``w`` at the start, until there or the budget is spent."""
    own = SEARCHING[method]
    train, val = parts["train"], parts["val"]
    w, first = beginning(size)(train)
    half = setting if own.widths else (HIGH - LOW) / 2
    trace = hg.search(
        hg.Bilevel(inner_loss, outer_loss, train, val),
        TRAINING,
        Until(own.make(setting), bound, own.most[size]),
        w,
        space=hg.spaces.Interval(START - half, START + half, shape=(size,)),
        budget=budget - float(first),
        key=jax.random.key(seed),
    )
    return {
        "h": np.asarray(trace.value),
        "cost": float(first) + np.asarray(trace.cost),
        "alpha": trace.best_alpha,
    }


@functools.cache
def descent_of(method: str, size: int) -> Program:
    """`descend`, compiled once a size."""
    del size  # a program is of one shape
    return Program(functools.partial(descend, method))


@functools.cache
def beginning(size: int) -> Callable:
    """`first_w` at the start, compiled."""
    return jax.jit(lambda train: first_w(train, jnp.full(size, START)))


# A run, and how good it was.


METHODS = (*DESCENDING, *SEARCHING)
ENDS = ("start", "L-BFGS")  # what there is to gain: rows that cost nothing


def settings_of(method: str) -> tuple[float, ...]:
    """What is tuned."""
    return (DESCENDING | SEARCHING)[method].settings


@functools.cache
def arrays(seed: int) -> PyTree:
    return jax.tree.map(jnp.asarray, split(seed))


@functools.lru_cache(maxsize=256)
def run(method: str, seed: int, size: int, setting: float, budget: float) -> Row:
    """Where a run was, what it had cost, and what its last ``alpha`` is worth.

    cost: until there; None for a run that never was, whose ``spent`` is a lower bound.
    left: of the way from the target to the start, at the best evaluation.
    """
    parts, of = arrays(seed), known(seed, size)
    if method in DESCENDING:
        descent = descent_of(method, size)
        given = (
            parts["train"],
            parts["val"],
            jnp.full(size, START),
            jnp.float32(setting),
        )
        found = jax.tree.map(np.asarray, descent(*given))
    else:
        found = seek(method, parts, setting, size, of.bound, budget, seed)
    return judged(found["h"], found["cost"], of, budget) | {
        "alpha": np.asarray(found["alpha"], float).tolist()
    }


def course(left: np.ndarray, cost: np.ndarray) -> Row:
    """What the best so far leaves of the way: at the end, and 60 times at the most."""
    best = np.minimum.accumulate(left)
    keep = np.unique(np.geomspace(1, best.size, 60).astype(int)) - 1
    return {
        "spent": float(cost[-1]),
        "left": float(best[-1]),
        "curve": best[keep].tolist(),
        "curve_cost": cost[keep].tolist(),
    }


def judged(h: Any, cost: Any, of: Known, budget: float) -> Row:
    """What of a run is within the budget."""
    h, cost = np.asarray(h, float), np.asarray(cost, float)
    paid = np.isfinite(h) & (cost <= budget)
    h, cost = h[paid], cost[paid]
    there = np.flatnonzero(h <= of.bound)
    row = {
        "cost": float(cost[there[0]]) if there.size else None,
        "evaluations": int(h.size),
    }
    if not h.size:  # it is where it began
        h, cost = np.array([of.start]), np.zeros(1)
    return row | course((h - of.target) / (of.start - of.target), cost)


def score(row: Row) -> float:
    """What tuning makes small: log cost, beyond the budget by what is left."""
    if row["cost"] is not None:
        return math.log(row["cost"])
    return math.log(BUDGET) + math.log(max(row["left"], NEAR) / NEAR)


def cells(seeds: Sequence[int], ends: bool = False) -> list[Row]:
    """Every method at the sizes that it can do."""
    extra = ENDS if ends else ()
    return [
        {"method": method, "size": size, "seed": seed}
        for size in SIZES
        for method in (*extra, *METHODS)
        for seed in seeds
        if method not in SEARCHING or size in SEARCHING[method].most
    ]
