"""Golden cases of the searchers, each in `hypergrad.search` with a small budget."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from evosax.algorithms import CMA_ES, SNES, DifferentialEvolution

import hypergrad as hg
from hypergrad import searchers, spaces
from tests.golden import problems
from tests.golden.results import trace_to_dict

KEY = jax.random.key(3)

# A problem whose outer value is the squared distance of alpha from an optimum.

CONTINUOUS = {
    "rate": spaces.Interval(1e-4, 1.0, log=True),
    "weights": spaces.Interval(-1.0, 3.0, shape=(2,)),
}
DISCRETE = {"depth": spaces.Integer(1, 8), "operation": spaces.Choice((0, 5, 9))}
MIXED = CONTINUOUS | DISCRETE
SIMPLEX = {"mixture": spaces.Simplex(shape=(3,)), "scale": spaces.Box(-1.0, 2.0)}


def distance(alpha):
    """Returns the squared distance from an optimum, over the leaves that alpha has."""
    terms = {
        "rate": lambda leaf: (jnp.log10(leaf / 0.05) / 4) ** 2,
        "weights": lambda leaf: jnp.sum((leaf - jnp.array([0.5, 2.0])) ** 2) / 16,
        "depth": lambda leaf: ((leaf - 6) / 7) ** 2,
        "operation": lambda leaf: 0.25 * (leaf != 5),
        "mixture": lambda leaf: jnp.sum((leaf - jnp.array([0.2, 0.5, 0.3])) ** 2),
        "scale": lambda leaf: (leaf - 0.4) ** 2,
    }
    return sum(terms[name](leaf) for name, leaf in alpha.items())


def height(alpha):
    """Returns a second value of alpha, which is in conflict with the distance."""
    return jnp.mean(jnp.square(alpha["weights"])) + alpha["rate"]


DISTANCE = hg.Bilevel(
    lambda w, alpha, batch: (w - distance(alpha)) ** 2, lambda w, alpha, batch: w
)
TWO_VALUES = hg.Bilevel(
    lambda w, alpha, batch: (w - distance(alpha)) ** 2,
    (lambda w, alpha, batch: w, lambda w, alpha, batch: height(alpha)),
)
FORMULA = hg.ClosedForm(lambda alpha, batch: distance(alpha))
TRIAL_COST = 4 / 3  # gradient-equivalents of a formula and one outer value


def record_alpha(space: Any) -> dict[str, Callable]:
    """Returns metrics that record every number of alpha in each trial."""
    alpha = spaces.sample(space, KEY)
    metrics = {}
    for index, (path, leaf) in enumerate(jax.tree.leaves_with_path(alpha)):
        for position in range(leaf.size):
            name = f"{jax.tree_util.keystr(path, simple=True)} {position}"
            metrics[name] = lambda w, alpha, key, index=index, position=position: (
                jnp.ravel(jax.tree.leaves(alpha)[index])[position]
            )
    return metrics


def search(
    searcher: Any, space: Any = CONTINUOUS, num_trials: int = 16, **options: Any
) -> hg.Trace:
    """Returns the trace of so many trials on the distance, or on two values."""
    problem = options.pop("problem", DISTANCE)
    num_values = problem.num_objectives or 1
    options = {"key": KEY, "metrics": record_alpha(space)} | options
    budget = (num_trials + 0.5) * (1 + num_values / 3)
    return hg.search(
        problem, FORMULA, searcher, jnp.zeros(()), space=space, budget=budget, **options
    )


def run(*arguments: Any, **options: Any) -> dict[str, Any]:
    """Returns the trace of a search as a dict."""
    return trace_to_dict(search(*arguments, **options))


def run_strategy(strategy: Any, **options: Any) -> dict[str, Any]:
    """Returns the trace of a strategy of evosax, which promotes ranks."""
    with jax.numpy_rank_promotion("allow"):
        return run(searchers.EvolutionStrategy(strategy, 6), **options)


def run_resumed(searcher: Any) -> dict[str, Any]:
    """Returns a search that starts from the trials of a shorter one."""
    trials: list[dict] = []
    search(searcher, num_trials=7, trial_callback=trials.append)
    return run(searcher, previous_trials=trials)


def run_failing(searcher: Any) -> dict[str, Any]:
    """Returns a search of which some trials have no finite value."""

    def outer_loss(w, alpha, batch):
        return jnp.where(alpha["weights"][0] > 1.0, jnp.nan, w)

    return run(searcher, problem=hg.Bilevel(DISTANCE.inner_loss, outer_loss))


def run_training(searcher: Any, **options: Any) -> dict[str, Any]:
    """Returns a search over the penalties of least squares on mini-batches."""
    problem, w, _ = problems.ridge(batch_size=6)
    trace = hg.search(
        problem,
        hg.Descent(optax.sgd(0.2, momentum=0.5), 20),
        searcher,
        w,
        space=spaces.Interval(-4.0, 1.0, shape=(4,)),
        budget=40,
        key=KEY,
        **options,
    )
    return trace_to_dict(trace)


# Searchers that train populations.

CENTER = {"center": spaces.Interval(-2.0, 2.0, shape=(2,))}
CURVATURE = jnp.array([[0.75, 0.25], [0.25, 0.5]])


def center_loss(w, alpha, batch):
    """Returns a quadratic with its minimum at the center."""
    deviation = w - alpha["center"]
    return 0.5 * deviation @ CURVATURE @ deviation


def center_objective(w, alpha, batch):
    """Returns the squared distance from (1, -1)."""
    return jnp.sum((w - jnp.array([1.0, -1.0])) ** 2)


def run_population(
    searcher: Any, num_steps: int, budget: float, **options: Any
) -> dict[str, Any]:
    """Returns the trace of a population that is trained step by step."""
    trace = hg.search(
        hg.Bilevel(center_loss, center_objective),
        hg.Descent(optax.sgd(0.3, momentum=0.5), num_steps),
        searcher,
        jnp.zeros(2),
        space=CENTER,
        budget=budget,
        key=KEY,
        metrics=record_alpha(CENTER),
        **options,
    )
    return trace_to_dict(trace)


def run_tuned_population() -> dict[str, Any]:
    """Returns the trace of a population whose learning rate is in alpha."""
    problem, w, _ = problems.tuned()
    space = {
        "penalty": spaces.Interval(-4.0, 0.0),
        "rate": spaces.Interval(1e-2, 0.4, log=True),
        "momentum": spaces.Interval(0.0, 0.9),
    }
    optimizer = lambda alpha: optax.sgd(alpha["rate"], momentum=alpha["momentum"])
    trace = hg.search(
        problem, hg.Descent(optimizer, 4),
        searchers.PopulationBasedTraining(8, 0.25), w,
        space=space, budget=180, key=KEY, metrics=record_alpha(space),
    )  # fmt: skip
    return trace_to_dict(trace)


NODES = {"a": spaces.Choice(3), "b": spaces.Choice((5, 7, 8, 9))}
TABLES = jnp.array([0.5, -1.0, 2.0]), jnp.array([1.0, 0.2, -0.3, 0.7])


def entries(tables, alpha):
    """Returns the entries of two tables that alpha selects."""
    position = jnp.argmax(jnp.array([5, 7, 8, 9]) == alpha["b"])
    return jnp.stack([tables[0][alpha["a"]], tables[1][position]])


def run_one_shot() -> dict[str, Any]:
    """Returns the trace of shared weights, and of evaluations of sampled choices."""
    supernet = hg.Bilevel(
        lambda w, alpha, batch: (
            0.5 * jnp.sum((entries(w, alpha) - entries(TABLES, alpha)) ** 2)
        ),
        lambda w, alpha, batch: jnp.sum(jnp.array([1.0, 3.0]) * entries(w, alpha) ** 2),
    )
    trace = hg.search(
        supernet, hg.Descent(optax.sgd(0.8), 30), searchers.OneShot(8),
        (jnp.zeros(3), jnp.zeros(4)), space=NODES, budget=42, key=KEY,
        metrics=record_alpha(NODES),
    )  # fmt: skip
    return trace_to_dict(trace)


SEARCHES: dict[str, Callable[[], Any]] = {
    "Random": partial(run, searchers.Random()),
    "Random, mixed": partial(run, searchers.Random(), MIXED),
    "Random, simplex": partial(run, searchers.Random(), SIMPLEX),
    "Random, two values": partial(run, searchers.Random(), problem=TWO_VALUES),
    "Random, vmap": partial(
        run, searchers.Random(), parallel=hg.Parallel(4, "vmap")
    ),
    "Random, training": partial(run_training, searchers.Random()),
    "Grid": partial(run, searchers.Grid(2), num_trials=100),
    "Grid, discrete": partial(run, searchers.Grid(2), DISCRETE, num_trials=15),
    "Sobol": partial(run, searchers.Sobol()),
    "Sobol, mixed": partial(run, searchers.Sobol(), MIXED, parallel=hg.Parallel(5)),
    "TPE": partial(run, searchers.TPE(5)),
    "TPE, mixed": partial(run, searchers.TPE(5), MIXED),
    "TPE, resumed": partial(run_resumed, searchers.TPE(5)),
    "TPE, failing": partial(run_failing, searchers.TPE(5)),
    "GaussianProcess": partial(run, searchers.GaussianProcess(6, 100), num_trials=10),
    "GaussianProcess, mixed": partial(
        run, searchers.GaussianProcess(6, 100), MIXED, num_trials=10
    ),
    "CMAES": partial(run, searchers.CMAES(0.3, 4)),
    "CMAES, defaults": partial(run, searchers.CMAES()),
    "CMAES, failing": partial(run_failing, searchers.CMAES(0.3, 4)),
    "NSGA2": partial(run, searchers.NSGA2(5), MIXED),
    "NSGA2, two values": partial(run, searchers.NSGA2(5), problem=TWO_VALUES),
    "Evolution, CMA_ES": partial(run_strategy, CMA_ES),
    "Evolution, SNES": partial(run_strategy, SNES, parallel=hg.Parallel(6)),
    "Evolution, DifferentialEvolution": partial(run_strategy, DifferentialEvolution),
    "Reinforce": partial(run, searchers.Reinforce(), DISCRETE),
    "Reinforce, step_size": partial(run, searchers.Reinforce(3.0, 0.5), DISCRETE),
    "PopulationBased": partial(
        run_population, searchers.PopulationBasedTraining(6), 3, 80.0
    ),
    "PopulationBased, perturbation": partial(
        run_population,
        searchers.PopulationBasedTraining(6, 0.4, perturbation=0.5), 3, 80.0
    ),
    "PopulationBased, tuned optimizer": run_tuned_population,
    "SuccessiveHalving": partial(
        run_population, searchers.SuccessiveHalving(9), 9, 100.0
    ),
    "SuccessiveHalving, eta": partial(
        run_population, searchers.SuccessiveHalving(8, 2), 8, 60.0
    ),
    "Hyperband": partial(run_population, searchers.Hyperband(), 9, 100.0),
    "OneShot": run_one_shot,
}  # fmt: skip
CASES: dict[str, Callable[[], Any]] = {
    f"searchers/{name}": case for name, case in SEARCHES.items()
}
