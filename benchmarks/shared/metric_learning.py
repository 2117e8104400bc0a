"""How table `surrogates` learns hyperparameters: one rule of tuning for every row.

A run sees two thirds of validation at each rate; the rate with the best value of the
run's own objective on the last third is chosen; it then sees all of validation.
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
from hypergrad.studies.program import Program

from .metric_tasks import SYSTEMS, System, View

METRICS = ("accuracy", "F1", "mAP")
RATES = (0.01, 0.03, 0.1)
NUM_STEPS = 20
NEWTON = hg.Newton()
ROUGHLY = hg.Newton(tolerance=1e-3)  # all that a trial of random search needs
IMPLICIT = hg.Implicit(NEWTON, hg.CG(rtol=5e-3, max_steps=100))
COMMON_PENALTIES = range(-11, -1)
GAP = 0.05  # the default of `temperature_of`
SOFT_RANKS = 10  # see `Objective.temperature`


class Objective(NamedTuple):
    """An outer objective: cross-entropy where ``metric`` is "", else a surrogate."""

    metric: str
    form: str = ""

    def surrogate(self, system: System) -> Any:
        if self.metric != "mAP":
            return exact(system)[self.metric]
        forms = {
            "fast": hg.surrogates.FastAP,
            "soft rank": hg.surrogates.SoftRankAP,
            "blackbox": hg.surrogates.BlackboxAP,
        }
        return forms.get(self.form, hg.surrogates.SmoothAP)(axis=system.axis)

    def temperature(self, system: System, w: PyTree, batch: PyTree) -> Array:
        """`temperature_of` the scores: of pairs for AP, else of distances.

        As with a threshold, the gap is relative to the share of positives, whose
        tail of negatives counts that much more. Soft ranks spread n items, so theirs
        is as many times smaller; the blackbox's lambda reaches over as many as there
        are positives in a row.
        """
        if not self.metric:
            return jnp.ones(())
        scores, targets, where = system.views(w, batch)[self.metric]
        if self.metric != "mAP":
            return hg.surrogates.temperature_from_scores(
                scores, targets, threshold=system.threshold, gap=GAP, where=where
            )
        share = jnp.sum(targets * where) / jnp.sum(where)
        gap = GAP * jnp.minimum(2 * share, 1)
        temperature = hg.surrogates.temperature_from_scores(
            scores.ravel(), targets.ravel(), gap=gap, where=where.ravel()
        )
        if self.form == "soft rank":
            temperature = SOFT_RANKS * temperature / jnp.sum(batch["use"])
        if self.form == "blackbox":
            positives = jnp.sum(targets * where, axis=system.axis)
            temperature = temperature * jnp.mean(positives.astype(float))
        return temperature

    def loss(self, system: System) -> Callable:
        """What is minimised: minus the surrogate."""
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


def exact(system: System) -> dict[str, Any]:
    """The metrics; their surrogates are what the objectives use."""
    return {
        "accuracy": hg.surrogates.Accuracy(),
        "F1": hg.surrogates.FBeta(),
        "mAP": hg.surrogates.SmoothAP(axis=system.axis),
    }


def exact_value(system: System, metric: str, view: View) -> Array:
    scores, targets, where = view
    return exact(system)[metric].exact(scores, targets, where=where)


# Data of one seed.


@functools.lru_cache(maxsize=4)
def parts_of(task: str, seed: int) -> dict[str, PyTree]:
    system = SYSTEMS[task]
    parts = system.draw(system.load(), seed)
    return jax.tree.map(jnp.asarray, parts)


def at_temperature(batch: PyTree, temperature: ArrayLike) -> PyTree:
    """A batch that says at which temperature it is judged, example by example."""
    shape = batch["use"].shape
    return batch | {"temperature": jnp.full(shape, temperature)}


def thirds(batch: PyTree) -> tuple[PyTree, PyTree]:
    """Two thirds to learn with and one to choose by, of the same shape."""
    held = jnp.arange(len(batch["use"])) % 3 == 0
    use = batch["use"]
    return batch | {"use": use & ~held}, batch | {"use": use & held}


def common(system: System, log_penalty: float) -> PyTree:
    """No weights, no margins, one penalty."""
    penalties = jnp.full_like(system.alpha["penalties"], log_penalty)
    return system.alpha | {"penalties": penalties}


def common_penalties(system: System) -> list[float]:
    """The values of one penalty for all that lie in the system's box."""
    low = system.space["penalties"].low
    return [float(x) for x in COMMON_PENALTIES if x > low]


# Programs, each compiled once a task and objective.


@functools.cache
def trained(task: str, size: int) -> Program:
    """``(w, alpha, batch) -> w*``; a program a number of examples."""
    del size
    system = SYSTEMS[task]

    def train(w, alpha, batch):
        return NEWTON.solve(system.train_loss, w, alpha, batch, jax.random.key(0))[0]

    return Program(train)


@functools.cache
def judged(task: str, size: int) -> Program:
    """``(w, batch) -> {metric: exact value}`` and the cross-entropy."""
    del size
    system = SYSTEMS[task]

    def judge(w, batch):
        views = system.views(w, batch)
        values = {m: exact_value(system, m, views[m]) for m in METRICS}
        return values | {"cross-entropy": system.cross_entropy(w, system.alpha, batch)}

    return Program(judge)


def train(task: str, seed: int, alpha: PyTree, batch: PyTree) -> PyTree:
    """From the seed's start to convergence."""
    return trained(task, len(batch["use"]))(SYSTEMS[task].start(seed), alpha, batch)


def judge(task: str, w: PyTree, batch: PyTree) -> dict[str, float]:
    found = judged(task, len(batch["use"]))(w, batch)
    return {name: float(value) for name, value in found.items()}


@functools.cache
def temperature(task: str, objective: Objective) -> Program:
    """``(w, val) -> temperature``."""
    system = SYSTEMS[task]
    return Program(lambda w, val: objective.temperature(system, w, val))


@functools.cache
def valued(task: str, objective: Objective, size: int) -> Program:
    """``(w, batch) -> (objective, less the exact metric)``; the larger the better."""
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
def by_hypergradient(task: str, objective: Objective) -> Program:
    """``(w, alpha, train, val, rate) -> learned``, from a trained ``w``."""
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


def tuned(
    run: Callable[[PyTree, PyTree, float], dict[str, Any]],
    val: PyTree,
    rates: tuple[float, ...],
) -> dict[str, Any]:
    """``run(val, held, rate)`` by the rule; costs are of all runs together."""
    tries = [run(*thirds(val), rate) for rate in rates]
    scores = [float(x["selection"]) for x in tries]
    rate = rates[int(np.nanargmax(scores))]
    final = run(val, val, rate)
    total = lambda name: sum(float(x[name]) for x in (*tries, final))
    costs = {name: total(name) for name in ("gradient_equivalents", "num_hvps")}
    return final | costs | {"rate": rate, "last_cost": final["gradient_equivalents"]}


# Rows. Each returns alpha's trained w and the row's columns.


@functools.lru_cache(maxsize=64)
def best_penalty(task: str, seed: int) -> float:
    """One penalty by the cross-entropy on validation: where every run begins."""
    parts, system = parts_of(task, seed), SYSTEMS[task]

    def loss(log_penalty):
        w = train(task, seed, common(system, log_penalty), parts["train"])
        return judge(task, w, parts["val"])["cross-entropy"]

    return min(common_penalties(system), key=loss)


@functools.lru_cache(maxsize=64)
def first_model(task: str, seed: int) -> tuple[PyTree, PyTree]:
    """``(alpha, w)`` where every run begins."""
    alpha = common(SYSTEMS[task], best_penalty(task, seed))
    return alpha, train(task, seed, alpha, parts_of(task, seed)["train"])


@functools.lru_cache(maxsize=64)
def hypergradient(task: str, objective: Objective, seed: int) -> dict[str, Any]:
    parts, program = parts_of(task, seed), by_hypergradient(task, objective)
    alpha, first = first_model(task, seed)
    value = valued(task, objective, len(parts["val"]["use"]))
    before = program.run_seconds

    def run(val, held, rate):
        t = temperature(task, objective)(first, val)
        val, held = at_temperature(val, t), at_temperature(held, t)
        learned = program(first, alpha, parts["train"], val, rate)
        w = train(task, seed, learned["alpha"], parts["train"])
        _, gap = value(w, val)
        selection, _ = value(w, held)
        return learned | {"w": w, "selection": selection, "gap": gap, "temperature": t}

    learned = tuned(run, parts["val"], RATES)
    return learned | {
        "compile_seconds": program.compile_seconds,
        "run_seconds": program.run_seconds - before,
    }


def by_random_search(task: str, metric: str, seed: int) -> dict[str, Any]:
    """On the exact metric, for what the row of its surrogate cost in all."""
    parts, system = parts_of(task, seed), SYSTEMS[task]
    rival = next(x for x in OBJECTIVES.values() if x.metric == metric)
    budget = float(hypergradient(task, rival, seed)["gradient_equivalents"])
    started = time.perf_counter()
    trace = hg.search(
        hg.Bilevel(
            system.train_loss, minus_exact(task, metric), parts["train"], parts["val"]
        ),
        ROUGHLY,
        hg.searchers.Random(),
        system.start(seed),
        space=system.space,
        budget=budget,
        key=jax.random.key(seed),
    )
    return {
        "w": train(task, seed, trace.best_alpha, parts["train"]),
        "gap": 0.0,
        "gradient_equivalents": float(trace.cost[-1]),
        "num_hvps": float(jnp.sum(trace.stats["num_hvps"])),
        "trials": len(trace.value),
        "run_seconds": time.perf_counter() - started,
    }


@functools.cache
def minus_exact(task: str, metric: str) -> Callable:
    """One function a task and metric, since a problem's losses compare by identity."""
    system = SYSTEMS[task]

    def loss(w, alpha, batch):
        del alpha
        return -exact_value(system, metric, system.views(w, batch)[metric])

    return loss


def join(first: PyTree, second: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)


def by_penalty_alone(task: str, data: str, seed: int) -> dict[str, Any]:
    """One penalty, tuned; trained on the training part, on validation, or on both."""
    parts, system = parts_of(task, seed), SYSTEMS[task]
    alpha = lambda x: common(system, x)
    if data == "train":
        penalty = best_penalty(task, seed)
        return {
            "w": train(task, seed, alpha(penalty), parts["train"]),
            "penalty": penalty,
        }
    using = {
        "val": lambda val: val,
        "both": lambda val: join(parts["train"], val),
    }[data]
    some, held = thirds(parts["val"])

    def loss(x):
        w = train(task, seed, alpha(x), using(some))
        return judge(task, w, held)["cross-entropy"]

    penalty = min(common_penalties(system), key=loss)
    w = train(task, seed, alpha(penalty), using(parts["val"]))
    return {"w": w, "penalty": penalty}
