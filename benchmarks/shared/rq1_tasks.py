"""A system of every paradigm with two hyperparameters, for the table `rq1`.

Data, losses and inner solver are those of `hypergrad.tasks`. Whatever is random is
drawn once, so that the result of a training is a function of ``alpha``.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.batches import batch_fraction
from hypergrad.inner import inner_stats
from hypergrad.inner.descent import run_inner_steps
from hypergrad.tasks import (
    federated,
    few_shot,
    penalties,
    physics,
    random_walk,
    self_supervised,
    semi_supervised,
    unsupervised,
)
from hypergrad.tasks.semi_gradient import SemiGradient

Problem = tuple[hg.Bilevel, PyTree]  # with the start of every training

IMPLICIT, UNROLLED, JOINT = "implicit", "unrolled", "single loop"
WARM_IMPLICIT, WARM_UNROLLED = (f"{name}, warm start" for name in (IMPLICIT, UNROLLED))
SHARING = "sharing"


class System(NamedTuple):
    """Two hyperparameters of a task.

    Attributes:
      paradigm, data: Names for the table.
      make: ``seed -> (problem, initial w of every training)``.
      solver: ``number of steps -> inner solver``.
      num_steps: Number of steps of a training.
      alpha, space: Initial hyperparameters, and their box.
      joint: Optimizer of ``w`` in a single loop.
      gradients: Number of gradients per step of the solver.
      absent: ``{method: reason}`` of methods that do not apply.
    """

    paradigm: str
    data: str
    make: Callable[[int], Problem]
    solver: Callable[[int], Any]
    num_steps: int
    alpha: PyTree
    space: PyTree
    joint: optax.GradientTransformation
    gradients: float = 1.0
    absent: dict[str, str] = {}  # noqa: RUF012 - a NamedTuple has no factories


def descent(optimizer: Any) -> Callable[[int], hg.Descent]:
    """Returns ``number of steps -> solver``."""
    return lambda num_steps: hg.Descent(optimizer, num_steps)


def box(low: float, high: float) -> hg.spaces.Interval:
    """Returns a logarithmic interval."""
    return hg.spaces.Interval(low, high, log=True)


# Supervised: a penalty a layer.

NOISE = 0.4  # fraction of the training labels


def supervised(seed: int) -> Problem:
    """Returns the network of `penalties` with two fifths of the labels wrong."""
    task = penalties.make(key=jax.random.key(seed), variant="mlp")
    problem, rng = task.problem, np.random.default_rng(seed)
    y = problem.inner_data["y"]
    wrong = (rng.random(len(y)) < NOISE) * rng.integers(1, 10, len(y))
    train = problem.inner_data | {"y": (y + jnp.asarray(wrong, y.dtype)) % 10}
    losses = problem.inner_loss, problem.outer_loss
    return hg.Bilevel(*losses, train, problem.outer_data), task.w


LAYER = hg.spaces.Interval(-8.0, 0.0)
layers = lambda leaf: {"layers": {0: leaf, 1: leaf}}


# Semi-supervised: what all pseudo-labels weigh, and the penalty.


def pseudo_loss(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Returns the task's loss with one weight for all and a learned penalty."""
    batch = batch | {"penalty": alpha["penalty"]}
    return semi_supervised.train_loss(w, alpha["weight"], batch)


def semi(seed: int) -> Problem:
    """Returns the problem of pseudo-labels."""
    task = semi_supervised.make(key=jax.random.key(seed), sizes=(50, 100, 400))
    train, val = task.problem.inner_data, task.problem.outer_data
    train = {name: train[name] for name in ("labeled", "unlabeled")}
    return hg.Bilevel(pseudo_loss, semi_supervised.val_loss, train, val), task.w


# Self-supervised: temperature and noise.

NUM_IMAGES = 64
FIXED = {name: self_supervised.DEFAULT[name] for name in ("crop", "shift")}


class SameDraws(eqx.Module):
    """A solver whose step k draws with ``fold_in(key(0), k)`` in every run."""

    solver: hg.Descent
    differentiable = True

    @property
    def num_steps(self) -> int:
        """The number of steps of the solver."""
        return self.solver.num_steps

    def init(
        self, inner_loss: Any, w: PyTree, alpha: PyTree, data: Any, key: Array
    ) -> tuple[PyTree, PyTree]:
        """Returns ``w`` and the state, with a count of the steps."""
        w, state = self.solver.init(inner_loss, w, alpha, data, key)
        return w, (state, jnp.zeros((), jnp.int32))

    def step(
        self, inner_loss: Any, carry: PyTree, alpha: PyTree, data: Any, key: Array
    ) -> tuple[PyTree, PyTree]:
        """Returns the carry after one step."""
        w, (state, count) = carry
        key = jax.random.fold_in(jax.random.key(0), count)
        w, state = self.solver.step(inner_loss, (w, state), alpha, data, key)
        return w, (state, count + 1)

    def solve(
        self, inner_loss: Any, w: PyTree, alpha: PyTree, data: Any, key: Array
    ) -> tuple[PyTree, Any]:
        """Returns ``w`` after all steps, and the statistics."""
        w, _ = run_inner_steps(self, inner_loss, w, alpha, data, key)
        return w, inner_stats(self.num_steps, self.num_steps * batch_fraction(data))


def contrast_loss(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Returns the task's loss at its default crop and shift."""
    return self_supervised.contrastive_loss(w, alpha | FIXED, batch)


def contrast(seed: int) -> Problem:
    """Returns the problem of contrastive learning."""
    task = self_supervised.make(key=jax.random.key(seed))
    images = {"x": task.problem.inner_data.data["x"][:NUM_IMAGES]}
    views = hg.Batches(images, with_key=True)
    probe = task.problem.outer_data
    return hg.Bilevel(contrast_loss, self_supervised.probe_error, views, probe), task.w


CONTRAST = descent(optax.sgd(0.5, momentum=0.9))


# Unsupervised: two precisions.


def metric(alpha: PyTree) -> Array:
    """Returns a precision per measurement, [13]."""
    precisions = jnp.stack([alpha["first"], alpha["rest"]])
    return jnp.repeat(precisions, np.array([7, 6]), total_repeat_length=13)


def mixture_loss(w: Array, alpha: PyTree, batch: PyTree) -> Array:
    """Returns ``-log p`` of soft k-means, for training and for held-out wines."""
    return unsupervised.kmeans_nll(w, metric(alpha), batch)


def mixture(seed: int) -> Problem:
    """Returns the problem of clustering."""
    task = unsupervised.make(key=jax.random.key(seed), variant="kmeans")
    train, val = task.problem.inner_data, task.problem.outer_data
    return hg.Bilevel(mixture_loss, mixture_loss, train, val), task.w


# Few-shot: how fast a shared start is adapted.

NUM_TASKS = 16


def adaptation(alpha: PyTree) -> optax.GradientTransformation:
    """Returns gradient descent with one rate for the body and one for the head."""
    return optax.partition(
        {name: optax.sgd(alpha[name]) for name in ("body", "head")},
        {"body": "body", "head": "head"},
    )


def characters(seed: int) -> Problem:
    """Returns sixteen tasks of the training digits, from a random network."""
    _, images, num_turns = few_shot.characters("small", "")
    task = few_shot.make(
        key=jax.random.key(seed), images=jnp.asarray(images), num_turns=num_turns,
        num_tasks=NUM_TASKS,
    )  # fmt: skip
    support, query = task.problem.sample_data(jax.random.key(seed))
    support = {name: support[name] for name in ("x", "y")}
    w = few_shot.broadcast_alpha(task.w, task.alpha)
    return hg.Bilevel(few_shot.adaptation_loss, few_shot.query_loss, support, query), w


IN_OPTIMIZER = "its rates stand in the optimizer, which {} does not see"
SHARED_START = "a task is adapted to from the shared start by definition: no w is {}"


# Federated: what a class's frequency makes of its loss.


def scaled_loss(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Returns the loss with ``omega = f^-weight`` and ``iota = shift log f``.

    ``f`` is a class's frequency over the mean one, [clients, classes], all rows alike.
    """
    log_f = jnp.log(batch["frequency"][0])
    scaling = {
        "omega": jnp.exp(-alpha["weight"] * log_f),
        "delta": jnp.ones_like(log_f),
        "iota": alpha["shift"] * log_f,
    }
    return federated.train_loss(w, scaling, batch)


def clients(seed: int) -> Problem:
    """Returns the federated problem."""
    task = federated.make(key=jax.random.key(seed))
    train, val = task.problem.inner_data, task.problem.outer_data
    count = np.bincount(np.ravel(train["y"]), minlength=federated.NUM_CLASSES)
    frequency = jnp.asarray(np.maximum(count, 1) / np.mean(count), float)
    rows = jnp.broadcast_to(frequency, (len(train["y"]), frequency.size))
    train = train | {"frequency": rows}
    return hg.Bilevel(scaled_loss, federated.val_loss, train, val), task.w


LOCAL_STEPS = 5
ROUNDS = lambda num_rounds: federated.FedAvg(0.2, num_rounds, LOCAL_STEPS)


# Reinforcement: a discount for noisy states, and one for the others.


def by_state(alpha: PyTree) -> Array:
    """Returns a discount per state, [19], from its distance to 1."""
    is_even = jnp.arange(random_walk.NUM_STATES) % 2 == 0
    return 1 - jnp.where(is_even, alpha["even"], alpha["odd"])


def backup_loss(w: Array, frozen: Array, alpha: PyTree, batch: PyTree) -> Array:
    """Returns the loss of which a step of 1 is a Bellman backup."""
    return random_walk.td_loss(w, frozen, by_state(alpha), batch)


def bellman_error(w: Array, alpha: PyTree, batch: PyTree) -> Array:
    """Returns a loss with the same minimizer."""
    return backup_loss(w, w, alpha, batch)


def walk(seed: int) -> Problem:
    """Returns the problem of the random walk."""
    task = random_walk.make_mrp(jax.random.key(seed), 5, 20, 400)
    train, val = task.problem.inner_data, task.problem.outer_data
    return hg.Bilevel(bellman_error, random_walk.return_error, train, val), task.w


BACKUP = optax.sgd(1.0)
BACKUPS = lambda num: SemiGradient(backup_loss, BACKUP, num)


# Physics: weights of boundary and sensors.


def poisson_loss(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Returns the loss with weight 1 of the residual."""
    weights = alpha | {"residual": jnp.ones(())}
    return physics.poisson_loss(w, weights, batch)


def log_misfit(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Returns the log misfit of held-out sensors, which spans orders of magnitude."""
    return jnp.log(physics.misfit(w, alpha, batch))


def poisson(seed: int) -> Problem:
    """Returns the problem of Poisson's equation."""
    task = physics.make(key=jax.random.key(seed), variant="poisson")
    train, val = task.problem.inner_data, task.problem.outer_data
    return hg.Bilevel(poisson_loss, log_misfit, train, val), task.w


DIGITS, SGD = "digits", optax.sgd
SYSTEMS = {
    "supervised": System(
        "supervised", DIGITS, supervised, descent(SGD(0.3, momentum=0.9)), 50,
        layers(-2.0), layers(LAYER), SGD(0.3),
    ),
    "semi_supervised": System(
        "semi-supervised", DIGITS, semi, descent(SGD(0.5, momentum=0.9)), 50,
        {"weight": 1.0, "penalty": 1e-2},
        {"weight": box(0.01, 10.0), "penalty": box(1e-4, 1.0)}, SGD(0.5),
    ),
    "self_supervised": System(
        "self-supervised", DIGITS, contrast,
        lambda num_steps: SameDraws(CONTRAST(num_steps)), 20,
        {"temperature": 0.1, "noise": 0.1},
        {"temperature": box(0.05, 20.0), "noise": box(0.01, 1.0)}, SGD(0.5),
    ),
    "unsupervised": System(
        "unsupervised", "wine", mixture, descent(SGD(1.0, momentum=0.5)), 10,
        {"first": 0.5, "rest": 0.5},
        {"first": box(0.1, 5.0), "rest": box(0.1, 5.0)}, SGD(1.0),
    ),
    "few_shot": System(
        "few-shot", DIGITS, characters, descent(adaptation), 5,
        {"body": 0.05, "head": 0.05},
        {"body": box(0.02, 20.0), "head": box(0.01, 2.0)}, SGD(0.4),
        absent={
            IMPLICIT: IN_OPTIMIZER.format("Implicit"),
            JOINT: IN_OPTIMIZER.format("SOBA"),
            WARM_IMPLICIT: IN_OPTIMIZER.format("Implicit"),
            WARM_UNROLLED: SHARED_START.format("carried"),
            SHARING: SHARED_START.format("shared"),
        },
    ),
    "federated": System(
        "federated", DIGITS, clients, ROUNDS, 20,
        {"weight": 0.0, "shift": 0.0},
        {"weight": hg.spaces.Interval(-0.5, 3.0),
         "shift": hg.spaces.Interval(-1.5, 1.0)},
        SGD(0.2), gradients=LOCAL_STEPS + 1.0,
    ),
    "reinforcement": System(
        "reinforcement", "simulated", walk, BACKUPS, 100,
        {"even": 0.1, "odd": 0.1},
        {"even": box(1e-3, 0.5), "odd": box(1e-3, 0.5)}, SGD(0.25),
    ),
    "physics": System(
        "physics-informed", "simulated", poisson, descent(optax.adam(1e-2)), 200,
        {"boundary": 1.0, "data": 1.0},
        {"boundary": box(0.01, 1000.0), "data": box(0.01, 1000.0)}, optax.adam(1e-2),
    ),
}  # fmt: skip


@functools.cache
def problem_of(task: str, seed: int) -> Problem:
    """Returns the problem of a seed, made once per process."""
    return SYSTEMS[task].make(seed)


def named_arrays(problem: Problem) -> dict[str, np.ndarray]:
    """Returns the arrays of a problem and of its initial ``w`` by name."""
    leaves, _ = jax.tree.flatten_with_path(problem)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
