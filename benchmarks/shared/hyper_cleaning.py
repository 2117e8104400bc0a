"""Hyper-cleaning of MNIST as in benchmark_bilevel: data, runs with the stored settings.

The data are those of ``datasets/mnist.py`` at ``random_state=32``, number by number.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad import datasets
from hypergrad.bench import Row

from .step_problems import NUM_TRAIN, NUM_VAL, mean_loss, weighted_loss
from .task_runs import implicit_by_cg

BATCH, NUM_INNER, EVAL_EVERY = 64, 10, 512
BUDGET, FULL_BATCH = 1500.0, "SOBA, full batch"
NUM_STEPS = {"SABA": 159_744, "SOBA": 139_776, "AmIGO": 28_160, FULL_BATCH: 1000}
#: Step size and ratio by method and p.
RATES = {
    ("SABA", 0.5): (0.1, 3.16e-4),
    ("SABA", 0.7): (0.01, 3.16e-5),
    ("SABA", 0.9): (0.1, 3.16e-4),
    ("SOBA", 0.5): (3.16, 1e-3),
    ("SOBA", 0.7): (0.316, 1e-4),
    ("SOBA", 0.9): (1.0, 3.16e-4),
    ("AmIGO", 0.5): (0.01, 3.16e-5),
    (FULL_BATCH, 0.5): (1.0, 1e-5),
}

Data = dict[str, Array]


@functools.cache
def load_data(share: float) -> dict[str, Data]:
    """Returns the inner images with noisy and right labels, outer and test images."""
    arrays = datasets.load("mnist")
    is_test = arrays["test"]
    pixels = np.round(255.0 * arrays["x"].astype(np.float64))
    rng = np.random.RandomState(32)
    order = rng.permutation(np.flatnonzero(~is_test))
    outer, inner = order[:NUM_VAL], order[NUM_VAL : NUM_VAL + NUM_TRAIN]
    noisy = arrays["y"][inner]
    is_redrawn = rng.rand(NUM_TRAIN) < share
    noisy[is_redrawn] = rng.randint(0, 10, np.sum(is_redrawn))
    mean, scale = pixels[inner].mean(0), pixels[inner].std(0)
    scale[scale == 0] = 1

    def data_set(rows: np.ndarray, labels: np.ndarray) -> Data:
        x = ((pixels[rows] - mean) / scale).astype(np.float32)
        return {"x": jnp.asarray(x), "y": jax.nn.one_hot(labels, 10)}

    return {
        "inner": data_set(inner, noisy) | {"index": jnp.arange(NUM_TRAIN)},
        "right labels": data_set(inner, arrays["y"][inner]),
        "outer": data_set(outer, arrays["y"][outer]),
        "test": data_set(np.flatnonzero(is_test), arrays["y"][is_test]),
    }


def error(test: Data, w: Array, alpha: Array, key: Array) -> Array:
    """Returns the test error."""
    prediction = jnp.argmax(test["x"] @ w.reshape(784, 10), -1)
    return jnp.mean(prediction != jnp.argmax(test["y"], -1))


def penalized_loss(w: Array, penalty: Array, batch: PyTree) -> Array:
    """Returns the mean cross-entropy with a penalty."""
    return mean_loss(w, penalty, batch) + penalty * jnp.sum(w**2)


def make_loop(method: str, share: float) -> hg.OuterLoop:
    """Returns the outer loop of a bilevel method."""
    sets = load_data(share)
    test_error = jax.tree_util.Partial(error, sets["test"])
    batches = lambda data: hg.Batches(data, BATCH, order="epoch_blocks")
    if method in ("implicit", FULL_BATCH):
        batches = lambda data: data
    problem = hg.Bilevel(
        weighted_loss, mean_loss, batches(sets["inner"]), batches(sets["outer"])
    )
    if method == "implicit":
        estimator = implicit_by_cg(hg.LBFGS(tolerance=1e-3), rtol=1e-3)
        return hg.OuterLoop(
            problem, estimator, optax.adam(1.0), metrics={"error": test_error}
        )
    step_size, ratio = RATES[method, share]
    is_falling = method.startswith("SOBA")
    rate = lambda size: (lambda t: size / jnp.sqrt(t + 1.0)) if is_falling else size
    optimizer = optax.sgd(rate(step_size))
    estimators = {
        "SABA": lambda: hg.SABA(optimizer),
        "AmIGO": lambda: hg.AmIGO(optimizer, NUM_INNER, NUM_INNER),
    }
    estimator = estimators.get(method, lambda: hg.SOBA(optimizer))()
    return hg.OuterLoop(
        problem,
        estimator,
        optax.sgd(rate(step_size / ratio)),
        metrics={"error": test_error},
    )


def run_loop(method: str, share: float, key: Array) -> hg.Trace:
    """Returns the run of a bilevel method with its test errors."""
    loop = make_loop(method, share)
    state = loop.init(jnp.zeros(7840), jnp.full(NUM_TRAIN, -2.0), key)
    if method == "implicit":
        return loop.run(state, budget=BUDGET)
    record_every = 1 if method == FULL_BATCH else EVAL_EVERY
    return loop.run(state, num_steps=NUM_STEPS[method], record_every=record_every)


def run_search(share: float, key: Array) -> hg.Trace:
    """Returns random search over the penalty of training on noisy labels."""
    sets = load_data(share)
    return hg.search(
        hg.Bilevel(penalized_loss, mean_loss, sets["inner"], sets["outer"]),
        hg.LBFGS(tolerance=1e-3),
        hg.searchers.Random(),
        jnp.zeros(7840),
        space=hg.spaces.Interval(1e-3, 10.0, log=True),
        budget=BUDGET,
        key=key,
        metrics={"error": jax.tree_util.Partial(error, sets["test"])},
    )


def train(data: Data, penalty: float, test: Data) -> Row:
    """Returns test error and cost of a model without a bilevel problem."""
    w, stats = hg.LBFGS(tolerance=1e-3).solve(
        penalized_loss, jnp.zeros(7840), jnp.asarray(penalty), data, jax.random.key(0)
    )
    cost = float(stats["num_grads"]) * len(data["x"]) / NUM_TRAIN
    test_error = float(error(test, w, jnp.asarray(penalty), jax.random.key(0)))
    return {"error": test_error, "gradient_equivalents": cost}
