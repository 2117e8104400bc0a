"""The cost of single loops to reach the end of a double loop, for table `surrogates`.

All loops follow Smooth-AP on the thinned digits: `Implicit` to convergence, `Unrolled`
truncated, and `SOBA` on mini-batches and on all data. At each evaluation the model is
retrained to convergence, which is not counted, and its exact mAP on validation is
compared with the target.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg

from .metric_learning import (
    IMPLICIT,
    NEWTON,
    OBJECTIVES,
    at_temperature,
    exact_value,
    first_model,
    splits_of,
    temperature,
    train,
    tune_rate,
    value_program,
)
from .metric_tasks import SYSTEMS
from .program import Program

TASK, OBJECTIVE = "digits", OBJECTIVES["Smooth-AP"]
DESCENT = hg.Descent(optax.sgd(0.3, momentum=0.9), num_steps=50)
TRUNCATION = 10
BATCH, OUTER_BATCH = 60, 125


class Loop(NamedTuple):
    """An estimator with its steps, rates to try, and whether it uses mini-batches."""

    estimator: Any
    num_steps: int
    eval_every: int
    rates: tuple[float, ...]
    has_batches: bool = False


LOOPS = {
    "double loop": Loop(IMPLICIT, 20, 1, (0.01, 0.03, 0.1)),
    "truncated": Loop(
        hg.Unrolled(DESCENT, truncation_length=TRUNCATION, warm_start=True),
        20,
        1,
        (0.01, 0.03, 0.1),
    ),
    "SOBA": Loop(
        hg.SOBA(optax.sgd(0.1)), 9000, 450, (0.003, 0.01, 0.03), has_batches=True
    ),
    "SOBA, full batch": Loop(hg.SOBA(optax.sgd(0.1)), 1300, 65, (0.01, 0.03, 0.1)),
}


def loss(w, alpha, batch):
    """Returns minus Smooth-AP over the classes that a batch has."""
    del alpha
    system = SYSTEMS[TASK]
    scores, targets, where = system.views(w, batch)["mAP"]
    is_present = jnp.any(where & (targets > 0), axis=system.axis, keepdims=True)
    t, smooth = batch["temperature"][0], OBJECTIVE.surrogate(system)
    return -smooth(scores, targets, temperature=t, where=where & is_present)


@functools.cache
def program(method: str) -> Program:
    """Returns ``(w0, first, alpha, train, val, rate, key) -> result`` with a curve."""
    loop, system = LOOPS[method], SYSTEMS[TASK]

    def learn(w0, first, alpha, train, val, rate, key):
        data = train, val
        if loop.has_batches:
            data = hg.Batches(train, BATCH), hg.Batches(val, OUTER_BATCH)

        def retrained_map(w, alpha, key):
            w, _ = NEWTON.solve(system.train_loss, w0, alpha, train, key)
            return exact_value(system, "mAP", system.views(w, val)["mAP"])

        outer_loop = hg.OuterLoop(
            hg.Bilevel(system.train_loss, loss, *data),
            loop.estimator,
            optax.adam(rate),
            space=system.space,
            metrics={"mAP": retrained_map},
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
def run_loop(method: str, seed: int) -> dict[str, Any]:
    """Returns the run of a loop at its best rate."""
    splits, system, run = splits_of(TASK, seed), SYSTEMS[TASK], program(method)
    alpha, first = first_model(TASK, seed)
    value = value_program(TASK, OBJECTIVE, len(splits["val"]["use"]))
    seconds_before = run.run_seconds

    def run_once(val, held_out, rate):
        w0, key = system.start(seed), jax.random.key(seed)
        t = temperature(TASK, OBJECTIVE)(first, val)
        val, held_out = at_temperature(val, t), at_temperature(held_out, t)
        result = run(w0, first, alpha, splits["train"], val, rate, key)
        w = train(TASK, seed, result["alpha"], splits["train"])
        selection, _ = value(w, held_out)
        return result | {"w": w, "selection": selection, "gap": value(w, val)[1]}

    result = tune_rate(run_once, splits["val"], LOOPS[method].rates)
    is_evaluated = np.isfinite(result["curve"])
    return result | {
        "curve": [float(x) for x in result["curve"][is_evaluated]],
        "curve_cost": [float(x) for x in result["curve_cost"][is_evaluated]],
        "compile_seconds": run.compile_seconds,
        "run_seconds": run.run_seconds - seconds_before,
    }


def cost_to_reach(curve: list[float], cost: list[float], target: float) -> float | None:
    """Returns the cost of the first evaluation at the target; None if there is none."""
    costs = [c for value, c in zip(curve, cost, strict=True) if value >= target]
    return costs[0] if costs else None


def measure(method: str, seed: int) -> dict[str, Any]:
    """Returns the columns of a joint row, without the metrics of its last model."""
    target = run_loop("double loop", seed)["curve"][-1]
    result = run_loop(method, seed)
    curve, cost = result["curve"], result["curve_cost"]
    return result | {
        "target": target,
        "end": curve[-1],
        "cost_to_reach": cost_to_reach(curve, cost, target),
        "last_cost": cost[-1],
    }
