"""Golden cases of the aggregators, of Pareto fronts, of model costs and of FLOPs."""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from hypergrad import objectives
from hypergrad.objectives import latency
from tests.golden import problems

NUM_LOSSES = 3
WEIGHTS = jnp.array([0.2, 3.0, 1.0])
AGGREGATORS: dict[str, Any] = {
    "WeightedSum": objectives.WeightedSum(WEIGHTS),
    "SmoothTchebycheff": objectives.SmoothTchebycheff(WEIGHTS, 0.3),
    "SmoothTchebycheff, ideal": objectives.SmoothTchebycheff(WEIGHTS, 0.3, -1.0),
    "MGDA": objectives.MGDA(),
    "UPGrad": objectives.UPGrad(),
    "EPO": objectives.EPO(WEIGHTS),
    "EPO, tolerance": objectives.EPO(WEIGHTS, 0.5),
    "EPO, ideal": objectives.EPO(WEIGHTS, ideal=jnp.array([0.0, -1.0, 0.1])),
    "AugmentedLagrangian": objectives.AugmentedLagrangian(jnp.array([0.2, 0.5])),
    "AugmentedLagrangian, period": objectives.AugmentedLagrangian(
        0.2, penalty=2.0, period=2
    ),
}


def run_aggregator(aggregator: Any, num_losses: int = NUM_LOSSES) -> dict[str, Any]:
    """Returns the weights of several steps whose gradients conflict or agree."""
    results = {}
    for dtype in ("float32", "float64"):
        rng = np.random.default_rng(47)
        compute_weights = eqx.filter_jit(aggregator.compute_weights)
        state, weights, scores = aggregator.init(num_losses), [], []
        for scale in (1.0, 0.1, 10.0, 1.0):
            gradients = scale * rng.normal(size=(num_losses, 4))
            value = jnp.asarray(rng.uniform(0.1, 1.0, num_losses), dtype)
            gram = jnp.asarray(gradients @ gradients.T, dtype)
            step_weights, state = compute_weights(value, gram, state)
            weights.append(step_weights)
            if hasattr(aggregator, "score"):
                scores.append(eqx.filter_jit(aggregator.score)(value))
        results[dtype] = {"weights": jnp.stack(weights)}
        if scores:
            results[dtype]["scores"] = jnp.stack(scores)
    return results


def run_pareto_set() -> dict[str, Any]:
    """Returns non-dominated points and their hypervolume, for two to four values."""
    results = {}
    for num_values in (2, 3, 4):
        rng = np.random.default_rng(num_values)
        points = jnp.asarray(rng.random((9, num_values)))
        points = jnp.concatenate([points, points[:1]])  # Equal points are kept.
        corner = jnp.full(num_values, 1.1)
        results[f"{num_values} values"] = {
            "non_dominated": jax.jit(objectives.non_dominated)(points),
            "hypervolume": jax.jit(objectives.hypervolume)(points, corner),
            "gradient": jax.jit(jax.grad(objectives.hypervolume))(points, corner),
        }
    return results


def run_model_costs() -> dict[str, Any]:
    """Returns costs of dense layers and of sampled operations, with derivatives."""
    widths = jnp.array([64.0, 31.5, 17.25, 10.0])
    logits = jnp.asarray(np.random.default_rng(53).normal(size=(3, 4)))
    costs = jnp.array([0.0, 1.0, 2.5, 9.0])
    functions = {
        "num_parameters": (objectives.num_parameters, widths),
        "num_flops": (objectives.num_flops, widths),
        "activation_bytes": (
            lambda widths: objectives.activation_bytes(widths, 8, 2), widths
        ),
        "expected_cost": (
            lambda logits: objectives.expected_cost(logits, costs), logits
        ),
    }  # fmt: skip
    return {
        name: jax.jit(jax.value_and_grad(function))(argument)
        for name, (function, argument) in functions.items()
    }


def run_latency() -> dict[str, Any]:
    """Returns latencies between and outside the knots of one and two axes."""
    knots = jnp.array([8.0, 16.0, 32.0])
    one_axis = objectives.LatencyTable((knots,), jnp.array([1.0, 2.0, 6.0]))
    seconds = jnp.array([[1.0, 2.0, 5.0], [1.5, 2.5, 7.0]])
    two_axes = objectives.LatencyTable((jnp.array([4.0, 6.0]), knots), seconds)
    widths = jnp.array([4.0, 8.0, 12.5, 16.0, 30.0, 40.0])
    value_and_grad = lambda table, **options: jax.jit(
        jax.vmap(jax.value_and_grad(table, **options))
    )
    clock = map(float, np.arange(1000.0) ** 1.5)
    with mock.patch.object(latency, "perf_counter", clock.__next__):
        measured = objectives.LatencyTable.measure(
            lambda width: lambda: jnp.ones(width), [8, 16], num_repeats=3
        )
    return {
        "one axis": value_and_grad(one_axis)(widths),
        "two axes": value_and_grad(two_axes, argnums=(0, 1))(widths / 4, widths),
        "measured": measured.seconds,
    }


def run_flops(estimator: Any) -> dict[str, Any]:
    """Returns the operations that the program of an estimate makes."""
    problem, w, alpha = problems.logistic()
    hypergradient_fn = hg.hypergradient(problem, estimator)
    flops = hg.cost.flops(hypergradient_fn, w, alpha)
    return {
        "fixed": flops.fixed,
        "loop flops": [loop.flops for loop in flops.loops],
        "total": flops.total(*range(1, 1 + len(flops.loops))),
        "unknown": " ".join(flops.unknown) or "none",
    }


def run_ledger() -> dict[str, Any]:
    """Returns the counts and gradient-equivalents of calls on data of several kinds."""
    counts = {
        "num_grads": 3.0,
        "num_hvps": 2.5,
        "num_values": 1.0,
        "num_outer_grads": 2.0,
        "num_outer_values": 4.0,
    }
    data = {
        "arrays": (jnp.ones((6, 2)), jnp.ones(4)),
        "batches": (hg.Batches(jnp.ones((6, 2)), 3), hg.Batches(jnp.ones(9), 3)),
        "none": (None, None),
        "keys": (hg.Batches(None, with_key=True), jnp.ones(5)),
    }
    return {name: hg.cost.cost_stats(*pair, **counts) for name, pair in data.items()}


DESCENT = hg.Descent(optax.sgd(0.3, momentum=0.5), 12)
ESTIMATORS = {
    "Implicit": hg.Implicit(DESCENT),
    "Implicit, Neumann": hg.Implicit(DESCENT, hg.Neumann(5)),
    "Unrolled": hg.Unrolled(DESCENT),
    "Forward": hg.Forward(DESCENT),
    "Penalty": hg.Penalty(DESCENT, 10.0),
}
CASES: dict[str, Callable[[], Any]] = {
    f"objectives/{name}": partial(run_aggregator, aggregator)
    for name, aggregator in AGGREGATORS.items()
}
CASES |= {
    "objectives/MGDA, two losses": partial(run_aggregator, objectives.MGDA(), 2),
    "objectives/UPGrad, two losses": partial(run_aggregator, objectives.UPGrad(), 2),
    "objectives/EPO, two losses": partial(
        run_aggregator, objectives.EPO(jnp.array([1.0, 2.0])), 2
    ),
    "objectives/Pareto set": run_pareto_set,
    "objectives/model costs": run_model_costs,
    "objectives/LatencyTable": run_latency,
    "cost/counts": run_ledger,
}
CASES |= {
    f"cost/flops, {name}": partial(run_flops, estimator)
    for name, estimator in ESTIMATORS.items()
}
