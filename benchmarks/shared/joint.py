"""The joint part of table `surrogates`: what it costs to reach the double loop's end.

Smooth-AP on the thinned digits, with `Implicit` to convergence, `Unrolled` truncated,
and `SOBA` on mini-batches and on all data. After each evaluation the model is retrained
to convergence, outside the ledger, and its exact mAP on validation is what must be
reached.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from hypergrad.studies.program import Program

from .metric_learning import (
    IMPLICIT,
    NEWTON,
    OBJECTIVES,
    at_temperature,
    exact_value,
    first_model,
    parts_of,
    temperature,
    train,
    tuned,
    valued,
)
from .metric_tasks import SYSTEMS

TASK, OBJECTIVE = "digits", OBJECTIVES["Smooth-AP"]
DESCENT = hg.Descent(optax.sgd(0.3, momentum=0.9), num_steps=50)
LAST = 10
BATCH, OUTER_BATCH = 60, 125


class Loop(NamedTuple):
    """An estimator with its steps, the rates it is tuned over, and its batches."""

    estimator: Any
    num_steps: int
    eval_every: int
    rates: tuple[float, ...]
    batches: bool = False


LOOPS = {
    "double loop": Loop(IMPLICIT, 20, 1, (0.01, 0.03, 0.1)),
    "truncated": Loop(
        hg.Unrolled(DESCENT, truncation_length=LAST, warm_start=True),
        20,
        1,
        (0.01, 0.03, 0.1),
    ),
    "SOBA": Loop(hg.SOBA(optax.sgd(0.1)), 9000, 450, (0.003, 0.01, 0.03), batches=True),
    "SOBA, full batch": Loop(hg.SOBA(optax.sgd(0.1)), 1300, 65, (0.01, 0.03, 0.1)),
}


def loss(w, alpha, batch):
    """Minus Smooth-AP over the classes that a batch has; the others rank nothing."""
    del alpha
    system = SYSTEMS[TASK]
    scores, targets, where = system.views(w, batch)["mAP"]
    there = jnp.any(where & (targets > 0), axis=system.axis, keepdims=True)
    t, smooth = batch["temperature"][0], OBJECTIVE.surrogate(system)
    return -smooth(scores, targets, temperature=t, where=where & there)


@functools.cache
def program(method: str) -> Program:
    """``(w0, first, alpha, train, val, rate, key) -> learned`` with its curve."""
    loop, system = LOOPS[method], SYSTEMS[TASK]

    def learn(w0, first, alpha, train, val, rate, key):
        data = train, val
        if loop.batches:
            data = hg.Batches(train, BATCH), hg.Batches(val, OUTER_BATCH)

        def reached(w, alpha, key):
            w, _ = NEWTON.solve(system.train_loss, w0, alpha, train, key)
            return exact_value(system, "mAP", system.views(w, val)["mAP"])

        outer_loop = hg.OuterLoop(
            hg.Bilevel(system.train_loss, loss, *data),
            loop.estimator,
            optax.adam(rate),
            space=system.space,
            metrics={"mAP": reached},
            eval_every=loop.eval_every,
        )
        state = outer_loop.init(first, alpha, key)
        trace = outer_loop.run(state, num_steps=loop.num_steps)
        return {
            "alpha": trace.alpha,
            "gradient_equivalents": trace.cost[-1],
            "num_hvps": jnp.sum(trace.stats["num_hvps"]),
            "curve_cost": trace.cost,
            "curve": trace.metrics["mAP"],
        }

    return Program(learn)


@functools.lru_cache(maxsize=64)
def learned(method: str, seed: int) -> dict[str, Any]:
    parts, system, run = parts_of(TASK, seed), SYSTEMS[TASK], program(method)
    alpha, first = first_model(TASK, seed)
    value = valued(TASK, OBJECTIVE, len(parts["val"]["use"]))
    before = run.run_seconds

    def one(val, held, rate):
        w0, key = system.start(seed), jax.random.key(seed)
        t = temperature(TASK, OBJECTIVE)(first, val)
        val, held = at_temperature(val, t), at_temperature(held, t)
        found = run(w0, first, alpha, parts["train"], val, rate, key)
        w = train(TASK, seed, found["alpha"], parts["train"])
        selection, _ = value(w, held)
        return found | {"w": w, "selection": selection, "gap": value(w, val)[1]}

    found = tuned(one, parts["val"], LOOPS[method].rates)
    seen = np.isfinite(found["curve"])
    return found | {
        "curve": [float(x) for x in found["curve"][seen]],
        "curve_cost": [float(x) for x in found["curve_cost"][seen]],
        "compile_seconds": run.compile_seconds,
        "run_seconds": run.run_seconds - before,
    }


def cost_to_reach(curve: list[float], cost: list[float], target: float) -> float | None:
    """Of the first evaluation that is as good; None where none is."""
    good = [c for value, c in zip(curve, cost, strict=True) if value >= target]
    return good[0] if good else None


def measured(method: str, seed: int) -> dict[str, Any]:
    """The columns of a joint row, beside the metrics of its last model."""
    target = learned("double loop", seed)["curve"][-1]
    found = learned(method, seed)
    curve, cost = found["curve"], found["curve_cost"]
    return found | {
        "target": target,
        "end": curve[-1],
        "cost_to_reach": cost_to_reach(curve, cost, target),
        "last_cost": cost[-1],
    }
