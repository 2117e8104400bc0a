"""Methods that train networks of different cost, and the fronts of their networks."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.bench import Row
from hypergrad.searchers import optuna_study
from hypergrad.searchers.base import Trials, seed_from_key

from .pareto_network import (
    ALL,
    COSTS,
    HIDDEN,
    PIXELS,
    Gates,
    committed_latency,
    cost_fractions,
    cross_entropy,
    error,
    init_w,
    inner_loss,
    round_gates,
    split,
    widths,
)
from .program import program
from .task_runs import implicit_by_cg

BUDGET = 16_000  # gradient-equivalents per front
NUM_STEPS = 60  # of the training of a network that counts
STEP = optax.sgd(0.5, momentum=0.9, nesterov=True)
TRAINING = hg.Descent(STEP, NUM_STEPS)
#: Gradient-equivalents of a training with the two values at its end.
TRIAL_COST = NUM_STEPS + 2 * hg.cost.VALUE_COST
REFERENCE = 0.5, 0.5  # of the hypervolume: error, fraction of the cost
SMALL = 0.1  # fraction of the cost at which the table prints an error


def outer_data(val: PyTree, cost: str, latency: Any) -> PyTree:
    """Returns validation data with the inputs of the cost; it counts as one batch."""
    is_cost = np.array([cost == name for name in COSTS], np.float32)
    return val | {"is_cost": is_cost, "latency": latency}


def cost_fraction(w: PyTree, gates: Gates, batch: PyTree) -> Array:
    """Returns the fraction of the cost that the batch names; ``w`` is not used."""
    del w
    return batch["is_cost"] @ cost_fractions(gates, batch["latency"])


class Networks(NamedTuple):
    """The P networks that a method trained.

    Attributes:
      gates: Gates of 0 and 1; leaves lead with P.
      val, test: Errors, [P].
      cost: Gradient-equivalents of the method.
    """

    gates: Gates
    val: Array
    test: Array
    cost: float


@jax.jit
def train(w: PyTree, gates: Gates, splits: PyTree) -> tuple[Array, Array]:
    """Returns validation and test errors, [P], of networks trained from ``w``."""

    def per_network(gates: Gates) -> tuple[Array, Array]:
        final_w, _ = TRAINING.solve(
            inner_loss, w, gates, splits["train"], jax.random.key(0)
        )
        return error(final_w, gates, splits["val"]), error(
            final_w, gates, splits["test"]
        )

    return jax.vmap(per_network)(gates)


# With hypergradients.

NUM_PREFERENCES = 24
INIT_GATE = 0.9
ESTIMATOR = implicit_by_cg(hg.Descent(STEP, 10), max_steps=5, damping=0.01)
RATES = (0.2, 0.4, 0.8)


class FrontMethod(NamedTuple):
    """How losses are combined at a preference; the second counts r times the first.

    Attributes:
      combine: Preference -> aggregator.
      min_ratio, max_ratio: Range of r.
    """

    combine: Callable[[Array], Any]
    min_ratio: float
    max_ratio: float

    @property
    def preferences(self) -> np.ndarray:
        """The preferences (1, r), [P, 2], with geometric r."""
        r = np.geomspace(self.min_ratio, self.max_ratio, NUM_PREFERENCES)
        return np.stack([np.ones_like(r), r], axis=1).astype(np.float32)


FRONT_METHODS = {
    "weighted sums": FrontMethod(hg.objectives.WeightedSum, 0.1, 10.0),
    "EPO": FrontMethod(hg.objectives.EPO, 0.4, 100.0),
}


def trace_front(
    method: str, w: PyTree, data: PyTree, outer: PyTree, rate: Array
) -> Any:
    """Returns the rounded gates at the end of the run of each preference, and costs."""
    config = FRONT_METHODS[method]
    trace = hg.objectives.pareto_front(
        hg.Bilevel(inner_loss, (cross_entropy, cost_fraction), data, outer),
        ESTIMATOR, optax.adam(rate), w, jax.tree.map(lambda x: INIT_GATE * x, ALL),
        jnp.asarray(config.preferences),
        aggregator_fn=config.combine,
        num_steps=20,
        space=hg.spaces.Unit(),
    )  # fmt: skip
    return jax.vmap(round_gates)(trace.alpha), trace.cost[:, -1]


def descend(method: str, seed: int, cost: str, rate: float) -> Networks:
    """Returns the networks of all preferences."""
    splits, w = split(seed), init_w(seed)
    outer = outer_data(splits["val"], cost, committed_latency())
    run = program(trace_front, method)
    gates, run_cost = run(w, splits["train"], outer, jnp.float32(rate))
    val, test = train(w, gates, splits)
    total_cost = float(run_cost.sum()) + NUM_PREFERENCES * TRIAL_COST
    return Networks(gates, val, test, total_cost)


# Without hypergradients.


def proposed_gates(alpha: PyTree) -> Gates:
    """Returns the gates of a proposal: open if the order is below what is kept."""
    pixels, hidden = alpha["keep"]
    is_open = lambda order, keep: (order < keep).astype(order.dtype)
    return Gates(is_open(alpha["pixels"], pixels), is_open(alpha["hidden"], hidden))


def proposal_space(min_kept: float) -> PyTree:
    """Returns the space of proposals: kept fractions log-uniform, orders uniform."""
    return {
        "keep": hg.spaces.Interval(min_kept, 1.0, log=True, shape=(2,)),
        "pixels": hg.spaces.Unit((PIXELS,)),
        "hidden": hg.spaces.Unit((HIDDEN,)),
    }


class CachedNSGA2:
    """`hypergrad.searchers.NSGA2` that keeps optuna's study between trials.

    The searcher builds the study anew from all trials at each ask, which takes too long
    for hundreds of trials of a hundred axes.
    """

    is_multi_objective = True

    def __init__(self, population_size: int):
        self.population_size = population_size

    def init(self, space: PyTree, key: Array) -> Trials:
        """Returns no trials."""
        del key
        self.optuna = optuna_study.import_optuna("NSGA2")
        self.axes = hg.spaces.axes(space)
        self.study: Any = None
        return Trials.empty(space)

    def ask(self, state: Trials, key: Array) -> tuple[PyTree, Trials]:
        """Returns the next proposal."""
        with optuna_study.quiet(self.optuna):
            sampler = self.optuna.samplers.NSGAIISampler(
                population_size=self.population_size, seed=seed_from_key(key)
            )
            if self.study is None:
                self.study = self.optuna.create_study(directions=["minimize"] * 2)
            self.study.sampler = sampler
            kinds = optuna_study.distributions(self.optuna, self.axes)
            self.trial = self.study.ask(kinds)
        t = optuna_study.from_params(self.axes, self.trial.params)
        return hg.spaces.from_unit(state.space, t), state

    def tell(self, state: Trials, alpha: PyTree, value: Array) -> Trials:
        """Returns the trials with another one."""
        with optuna_study.quiet(self.optuna):
            self.study.tell(self.trial, np.asarray(value, float).tolist())
        return state.add(alpha, value)


class SearchMethod(NamedTuple):
    """A searcher, and the smallest fraction that a layer keeps, for a setting."""

    make: Callable[[Any], Any]
    min_kept: Callable[[Any], float]
    settings: tuple[Any, ...]


MIN_KEPT = (0.05, 0.1, 0.2)
SEARCH_METHODS = {
    "NSGA-II": SearchMethod(
        lambda setting: CachedNSGA2(setting[0]),
        lambda setting: setting[1],
        tuple(itertools.product((10, 20, 40), MIN_KEPT)),
    ),
    "random": SearchMethod(
        lambda _: hg.searchers.Random(), lambda min_kept: min_kept, MIN_KEPT
    ),
}


def with_proposed_gates(loss: Callable) -> Callable:
    """Returns the loss of a proposal's network."""
    return lambda w, alpha, batch: loss(w, proposed_gates(alpha), batch)


LOSSES = (
    with_proposed_gates(inner_loss),
    (with_proposed_gates(error), with_proposed_gates(cost_fraction)),
)


def error_on(part: PyTree, w: PyTree, alpha: PyTree, key: Array) -> Array:
    """Returns the error on a split; as a metric it is not counted."""
    del key
    return error(w, proposed_gates(alpha), part)


def search(method: str, seed: int, cost: str, setting: Any) -> Networks:
    """Returns the networks of all trials, trained like those of other methods."""
    config, splits, trials = SEARCH_METHODS[method], split(seed), []
    outer = outer_data(splits["val"], cost, committed_latency())
    trace = hg.search(
        hg.Bilevel(*LOSSES, splits["train"], outer),
        TRAINING, config.make(setting), init_w(seed),
        space=proposal_space(config.min_kept(setting)),
        budget=BUDGET,
        key=jax.random.key(seed),
        metrics={"test": jax.tree_util.Partial(error_on, splits["test"])},
        trial_callback=trials.append,
    )  # fmt: skip
    columns = zip(*(trial["alpha"] for trial in trials), strict=True)
    leaves = (jnp.array(column, jnp.float32) for column in columns)
    alpha = dict(zip(("hidden", "keep", "pixels"), leaves, strict=True))
    errors = trace.value[:, 0], trace.metrics["test"]
    return Networks(jax.vmap(proposed_gates)(alpha), *errors, float(trace.cost[-1]))


@jax.jit
def signal_sizes(w: PyTree, data: PyTree) -> Gates:
    """Returns the signal through each pixel and unit of the full, trained network."""
    w, _ = TRAINING.solve(inner_loss, w, ALL, data, jax.random.key(0))
    rms = lambda x, axis: jnp.sqrt(jnp.mean(x**2, axis=axis))
    x = data["x"]
    hidden = jnp.tanh(x @ w["first"])
    return Gates(rms(x, 0) * rms(w["first"], 1), rms(hidden, 0) * rms(w["second"], 1))


def prune(seed: int, min_kept: float, side: int) -> Networks:
    """Returns the networks of a grid of numbers of pixels and units that are kept."""
    splits, w = split(seed), init_w(seed)
    counts = [np.round(np.geomspace(min_kept * n, n, side)) for n in (PIXELS, HIDDEN)]
    pairs = np.stack([x.ravel() for x in np.meshgrid(*counts)])
    gates = Gates(*map(keep_largest, signal_sizes(w, splits["train"]), pairs))
    val, test = train(w, gates, splits)
    # `signal_sizes` is one training and one forward pass.
    first_cost = NUM_STEPS + hg.cost.VALUE_COST
    return Networks(gates, val, test, first_cost + side**2 * TRIAL_COST)


def keep_largest(size: Array, counts: np.ndarray) -> Array:
    """Returns gates, [P, n], that are 1 for the largest sizes, ``counts`` of them."""
    position = np.argsort(np.argsort(-np.asarray(size)))
    return jnp.asarray(position < counts[:, None], jnp.float32)


# All methods.

PRUNING, PRUNING_64 = "pruning", "pruning, 64 networks"
SIDES = {PRUNING: 16, PRUNING_64: 8}  # of the grid
TUNED = (*FRONT_METHODS, *SEARCH_METHODS, PRUNING)
METHODS = (*TUNED, PRUNING_64)  # the last uses the setting of pruning


def settings_of(method: str) -> tuple[Any, ...]:
    """Returns the settings that are tried."""
    if method in FRONT_METHODS:
        return RATES
    return SEARCH_METHODS[method].settings if method in SEARCH_METHODS else MIN_KEPT


@functools.lru_cache(maxsize=16)
def networks_for_all_costs(method: str, seed: int, setting: float) -> Networks:
    """Returns the networks of a method that uses no cost; they serve all three."""
    if method in SIDES:
        return prune(seed, setting, SIDES[method])
    return search(method, seed, COSTS[0], setting)


def networks_of(method: str, seed: int, cost: str, setting: Any) -> Networks:
    """Returns the networks that a method trains within the budget."""
    if method in (*SIDES, "random"):
        return networks_for_all_costs(method, seed, setting)
    run = descend if method in FRONT_METHODS else search
    return run(method, seed, cost, setting)


# Fronts.

BLOCK = 64  # fronts are filled up to a multiple of it, so that few shapes compile
hypervolume = jax.jit(hg.objectives.hypervolume)


def volume(error: Any, fraction: Any, reference: tuple = REFERENCE) -> float:
    """Returns the hypervolume below a reference; padding there adds nothing."""
    points = np.column_stack([error, fraction])
    padding = np.tile(reference, (-len(points) % BLOCK, 1))
    return float(hypervolume(np.concatenate([points, padding]), np.array(reference)))


def front_row(networks: Networks, cost: str, latency: Any) -> Row:
    """Returns the networks that no other dominates on validation, by rising cost."""
    fractions = jax.vmap(lambda gates: cost_fractions(gates, latency))(networks.gates)
    sizes = np.stack(jax.vmap(widths)(networks.gates), axis=1)
    rows = np.column_stack(
        [networks.val, fractions[:, COSTS.index(cost)], networks.test, sizes]
    )
    rows = rows[np.asarray(hg.objectives.non_dominated(jnp.asarray(rows[:, :2])))]
    rows = np.unique(rows.astype(float), axis=0)
    val, fraction, test, pixels, hidden = rows[np.argsort(rows[:, 1])].T
    small = np.flatnonzero(fraction <= SMALL)
    return {
        "val_volume": volume(val, fraction), "test_volume": volume(test, fraction),
        "small_error": float(test[small[-1]]) if small.size else None,
        "val": val.tolist(), "test": test.tolist(), "fraction": fraction.tolist(),
        "pixels": pixels.tolist(), "hidden": hidden.tolist(),
        "networks": len(networks.val), "gradient_equivalents": networks.cost,
    }  # fmt: skip
