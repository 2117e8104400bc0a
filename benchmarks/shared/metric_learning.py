"""Learning of hyperparameters for smooth metrics, with one rule of tuning for all rows.

A run learns with two thirds of the validation data at each rate. The rate with the best
value of the run's own objective on the last third is chosen, and the run learns once
more with all validation data.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, PyTree

import hypergrad as hg

from .metric_tasks import SYSTEMS, System, View
from .program import Program

METRICS = ("accuracy", "F1", "mAP")
#: The surrogate of each metric, and on which data the rows with one penalty train.
OWN_SURROGATE = {"accuracy": "smooth accuracy", "F1": "sigmoid F1", "mAP": "Smooth-AP"}
PENALTY_ROWS = {
    "baseline": "train",
    "validation-only": "val",
    "train + validation": "both",
}
RATES = (0.01, 0.03, 0.1)
NUM_STEPS = 20
NEWTON = hg.Newton()
TRIAL_NEWTON = hg.Newton(tolerance=1e-3)  # of a trial of random search
IMPLICIT = hg.Implicit(NEWTON, hg.CG(rtol=5e-3, max_steps=100, preconditioner=None))
COMMON_PENALTIES = range(-11, -1)
GAP = 0.05  # the default of `temperature_from_scores`
SOFT_RANK_FACTOR = 10  # see `Objective.temperature`


class Objective(NamedTuple):
    """An outer objective: cross-entropy where ``metric`` is "", else a surrogate."""

    metric: str
    form: str = ""

    def surrogate(self, system: System) -> Any:
        """Returns the surrogate of the metric on a system."""
        if self.metric != "mAP":
            return metrics_of(system)[self.metric]
        forms = {
            "fast": hg.surrogates.FastAP,
            "soft rank": hg.surrogates.SoftRankAP,
            "blackbox": hg.surrogates.BlackboxAP,
        }
        return forms.get(self.form, hg.surrogates.SmoothAP)(axis=system.axis)

    def temperature(self, system: System, w: PyTree, batch: PyTree) -> Array:
        """Returns a temperature from the scores: of pairs for AP, else of distances.

        As with a threshold, the gap is relative to the fraction of positives, because
        the tail of the negatives counts that much more. Soft ranks spread n items, so
        that their temperature is n times smaller; that of the blackbox is multiplied by
        the number of positives in a row.
        """
        if not self.metric:
            return jnp.ones(())
        scores, targets, where = system.views(w, batch)[self.metric]
        if self.metric != "mAP":
            return hg.surrogates.temperature_from_scores(
                scores, targets, threshold=system.threshold, gap=GAP, where=where
            )
        fraction = jnp.sum(targets * where) / jnp.sum(where)
        gap = GAP * jnp.minimum(2 * fraction, 1)
        temperature = hg.surrogates.temperature_from_scores(
            scores.ravel(), targets.ravel(), gap=gap, where=where.ravel()
        )
        if self.form == "soft rank":
            temperature = SOFT_RANK_FACTOR * temperature / jnp.sum(batch["use"])
        if self.form == "blackbox":
            positives = jnp.sum(targets * where, axis=system.axis)
            temperature = temperature * jnp.mean(positives.astype(float))
        return temperature

    def loss(self, system: System) -> Callable:
        """Returns the loss that is minimised: minus the surrogate."""
        if not self.metric:
            return system.cross_entropy
        surrogate = self.surrogate(system)

        def loss(w, alpha, batch):
            del alpha
            scores, targets, where = system.views(w, batch)[self.metric]
            t = batch["temperature"][0]
            return -surrogate(scores, targets, temperature=t, where=where)

        return loss


OBJECTIVES = {
    "cross-entropy": Objective(""),
    "smooth accuracy": Objective("accuracy"),
    "sigmoid F1": Objective("F1"),
    "Smooth-AP": Objective("mAP"),
    "FastAP": Objective("mAP", "fast"),
    "soft-rank AP": Objective("mAP", "soft rank"),
    "blackbox AP": Objective("mAP", "blackbox"),
}


def metrics_of(system: System) -> dict[str, Any]:
    """Returns the metrics, each with its surrogate."""
    return {
        "accuracy": hg.surrogates.Accuracy(),
        "F1": hg.surrogates.FBeta(),
        "mAP": hg.surrogates.SmoothAP(axis=system.axis),
    }


def exact_value(system: System, metric: str, view: View) -> Array:
    """Returns the exact metric of a view."""
    scores, targets, where = view
    return metrics_of(system)[metric].exact(scores, targets, where=where)


# Data of one seed.


@functools.lru_cache(maxsize=4)
def splits_of(task: str, seed: int) -> dict[str, PyTree]:
    """Returns training, validation and test data of a seed."""
    system = SYSTEMS[task]
    splits = system.split(system.load(), seed)
    return jax.tree.map(jnp.asarray, splits)


def at_temperature(batch: PyTree, temperature: ArrayLike) -> PyTree:
    """Returns a batch with the temperature of its objective, once per example."""
    shape = batch["use"].shape
    return batch | {"temperature": jnp.full(shape, temperature)}


def hold_out_third(batch: PyTree) -> tuple[PyTree, PyTree]:
    """Returns two thirds to learn with and one third to choose by, of equal shape."""
    is_held_out = jnp.arange(len(batch["use"])) % 3 == 0
    use = batch["use"]
    return batch | {"use": use & ~is_held_out}, batch | {"use": use & is_held_out}


def alpha_with_penalty(system: System, log_penalty: float) -> PyTree:
    """Returns hyperparameters without weights and margins, with one penalty."""
    penalties = jnp.full_like(system.alpha["penalties"], log_penalty)
    return system.alpha | {"penalties": penalties}


def common_penalties(system: System) -> list[float]:
    """Returns the values of one penalty for all that lie in the system's box."""
    low = system.space["penalties"].low
    return [float(x) for x in COMMON_PENALTIES if x > low]


# Programs, each compiled once a task and objective.


@functools.cache
def train_program(task: str, size: int) -> Program:
    """Returns the program ``(w, alpha, batch) -> w*`` for a number of examples."""
    del size
    system = SYSTEMS[task]

    def train(w, alpha, batch):
        return NEWTON.solve(system.train_loss, w, alpha, batch, jax.random.key(0))[0]

    return Program(train)


@functools.cache
def metrics_program(task: str, size: int) -> Program:
    """Returns the program ``(w, batch) -> exact metrics and cross-entropy``."""
    del size
    system = SYSTEMS[task]

    def evaluate(w, batch):
        views = system.views(w, batch)
        values = {m: exact_value(system, m, views[m]) for m in METRICS}
        return values | {"cross-entropy": system.cross_entropy(w, system.alpha, batch)}

    return Program(evaluate)


def train(task: str, seed: int, alpha: PyTree, batch: PyTree) -> PyTree:
    """Returns ``w`` trained from the start of the seed to convergence."""
    return train_program(task, len(batch["use"]))(
        SYSTEMS[task].start(seed), alpha, batch
    )


def evaluate_w(task: str, w: PyTree, batch: PyTree) -> dict[str, float]:
    """Returns the exact metrics of a model, and its cross-entropy."""
    values = metrics_program(task, len(batch["use"]))(w, batch)
    return {name: float(value) for name, value in values.items()}


@functools.cache
def temperature(task: str, objective: Objective) -> Program:
    """Returns the program ``(w, val) -> temperature``."""
    system = SYSTEMS[task]
    return Program(lambda w, val: objective.temperature(system, w, val))


@functools.cache
def value_program(task: str, objective: Objective, size: int) -> Program:
    """Returns ``(w, batch) -> (objective, objective - metric)``; higher is better."""
    del size
    system = SYSTEMS[task]
    loss = objective.loss(system)

    def value(w, batch):
        smooth = -loss(w, system.alpha, batch)
        if not objective.metric:
            return smooth, jnp.nan
        view = system.views(w, batch)[objective.metric]
        return smooth, smooth - exact_value(system, objective.metric, view)

    return Program(value)


@functools.cache
def hypergradient_program(task: str, objective: Objective) -> Program:
    """Returns ``(w, alpha, train, val, rate) -> result``, from a trained ``w``."""
    system = SYSTEMS[task]
    loss = objective.loss(system)

    def learn(w, alpha, train, val, rate):
        trace = hg.minimize(
            hg.Bilevel(system.train_loss, loss, train, val),
            IMPLICIT,
            optax.adam(rate),
            w,
            alpha,
            num_steps=NUM_STEPS,
            key=jax.random.key(0),
            space=system.space,
        )
        return {
            "alpha": trace.best_alpha,
            "gradient_equivalents": trace.cost[-1],
            "num_hvps": jnp.sum(trace.stats["num_hvps"]),
            "trusted": jnp.mean(trace.stats["trusted"].astype(float)),
            "adjoint_residual": jnp.max(trace.stats["adjoint_residual"]),
        }

    return Program(learn)


def tune_rate(
    run: Callable[[PyTree, PyTree, float], dict[str, Any]],
    val: PyTree,
    rates: tuple[float, ...],
) -> dict[str, Any]:
    """Returns the run at the best rate; its costs are of all runs together.

    Args:
      run: ``(val, held_out, rate) -> result``.
      val: The validation data.
      rates: Rates to try.
    """
    trials = [run(*hold_out_third(val), rate) for rate in rates]
    scores = [float(x["selection"]) for x in trials]
    rate = rates[int(np.nanargmax(scores))]
    final = run(val, val, rate)
    total = lambda name: sum(float(x[name]) for x in (*trials, final))
    costs = {name: total(name) for name in ("gradient_equivalents", "num_hvps")}
    return final | costs | {"rate": rate, "last_cost": final["gradient_equivalents"]}


# Rows: the trained w of the learned alpha, and columns.


@functools.lru_cache(maxsize=64)
def best_penalty(task: str, seed: int) -> float:
    """Returns the penalty with the least cross-entropy on validation."""
    splits, system = splits_of(task, seed), SYSTEMS[task]

    def loss(log_penalty):
        w = train(task, seed, alpha_with_penalty(system, log_penalty), splits["train"])
        return evaluate_w(task, w, splits["val"])["cross-entropy"]

    return min(common_penalties(system), key=loss)


@functools.lru_cache(maxsize=64)
def first_model(task: str, seed: int) -> tuple[PyTree, PyTree]:
    """Returns ``(alpha, w)`` at which every run starts."""
    alpha = alpha_with_penalty(SYSTEMS[task], best_penalty(task, seed))
    return alpha, train(task, seed, alpha, splits_of(task, seed)["train"])


@functools.lru_cache(maxsize=64)
def learn_by_hypergradient(
    task: str, objective: Objective, seed: int
) -> dict[str, Any]:
    """Returns what is learned by hypergradients of an objective."""
    splits, program = splits_of(task, seed), hypergradient_program(task, objective)
    alpha, first = first_model(task, seed)
    value = value_program(task, objective, len(splits["val"]["use"]))
    seconds_before = program.run_seconds

    def run(val, held_out, rate):
        t = temperature(task, objective)(first, val)
        val, held_out = at_temperature(val, t), at_temperature(held_out, t)
        learned = program(first, alpha, splits["train"], val, rate)
        w = train(task, seed, learned["alpha"], splits["train"])
        _, gap = value(w, val)
        selection, _ = value(w, held_out)
        return learned | {"w": w, "selection": selection, "gap": gap, "temperature": t}

    learned = tune_rate(run, splits["val"], RATES)
    return learned | {
        "compile_seconds": program.compile_seconds,
        "run_seconds": program.run_seconds - seconds_before,
    }


def random_search(task: str, metric: str, seed: int) -> dict[str, Any]:
    """Returns the best trial for the exact metric, at the cost of its surrogate."""
    splits, system = splits_of(task, seed), SYSTEMS[task]
    rival = next(x for x in OBJECTIVES.values() if x.metric == metric)
    budget = float(learn_by_hypergradient(task, rival, seed)["gradient_equivalents"])
    start_time = time.perf_counter()
    trace = hg.search(
        hg.Bilevel(
            system.train_loss, minus_exact(task, metric), splits["train"], splits["val"]
        ),
        TRIAL_NEWTON,
        hg.searchers.Random(),
        system.start(seed),
        space=system.space,
        budget=budget,
        key=jax.random.key(seed),
    )
    return {
        "w": train(task, seed, trace.best_alpha, splits["train"]),
        "gap": 0.0,
        "gradient_equivalents": float(trace.cost[-1]),
        "num_hvps": float(jnp.sum(trace.stats["num_hvps"])),
        "trials": len(trace.value),
        "run_seconds": time.perf_counter() - start_time,
    }


@functools.cache
def minus_exact(task: str, metric: str) -> Callable:
    """Returns one function per task and metric; losses are compared by identity."""
    system = SYSTEMS[task]

    def loss(w, alpha, batch):
        del alpha
        return -exact_value(system, metric, system.views(w, batch)[metric])

    return loss


def concatenate(first: PyTree, second: PyTree) -> PyTree:
    """Returns the examples of both batches."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)


def tune_penalty(task: str, data: str, seed: int) -> dict[str, Any]:
    """Returns a model with one tuned penalty, trained on "train", "val" or "both"."""
    splits, system = splits_of(task, seed), SYSTEMS[task]
    alpha = lambda x: alpha_with_penalty(system, x)
    if data == "train":
        penalty = best_penalty(task, seed)
        return {
            "w": train(task, seed, alpha(penalty), splits["train"]),
            "penalty": penalty,
        }
    training_data = {
        "val": lambda val: val,
        "both": lambda val: concatenate(splits["train"], val),
    }[data]
    some, held_out = hold_out_third(splits["val"])

    def loss(x):
        w = train(task, seed, alpha(x), training_data(some))
        return evaluate_w(task, w, held_out)["cross-entropy"]

    penalty = min(common_penalties(system), key=loss)
    w = train(task, seed, alpha(penalty), training_data(splits["val"]))
    return {"w": w, "penalty": penalty}
