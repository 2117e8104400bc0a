"""Golden cases of the options of `hypergrad.minimize`, and of Pareto fronts."""

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import hypergrad as hg
from hypergrad import objectives, spaces, surrogates
from tests.golden import problems
from tests.golden.problems import Setup
from tests.golden.results import batched_trace_to_dict, trace_to_dict
from tests.golden.runs import BATCHES, DESCENT, LONG_DESCENT, TWO_LOSSES
from tests.loops import run_loop

NUM_STEPS = 12
SGD, ADAM = optax.sgd(0.2), optax.adam(0.1)
IMPLICIT = hg.Implicit(LONG_DESCENT)
SHORT_IMPLICIT = hg.Implicit(hg.Descent(optax.sgd(0.5), 10))
UNROLLED = hg.Unrolled(DESCENT)
SOBA = hg.SOBA(optax.sgd(0.2))


def minimize(
    make_setup: Callable[[], Setup] = problems.logistic,
    estimator: Any = IMPLICIT,
    optimizer: optax.GradientTransformation = ADAM,
    **options: Any,
) -> hg.Trace:
    """Returns the trace of a run of 12 steps, unless ``options`` say otherwise."""
    options = {"num_steps": NUM_STEPS, "key": jax.random.key(13)} | options
    problem, w, alpha = make_setup()
    return run_loop(problem, estimator, optimizer, w, alpha, **options)


def run(*arguments: Any, **options: Any) -> dict[str, Any]:
    """Returns the trace of one run as a dict."""
    return trace_to_dict(minimize(*arguments, **options))


# Constraints on alpha.

SPACE = {
    "weights": spaces.Interval(-4.0, 1.0),
    "bias": spaces.Box(-1.2, 0.5),
}


PENALTY_SPACE = {
    "weights": spaces.Positive(),
    "bias": spaces.Interval(1e-3, 1e2, log=True),
}


def project(alpha):
    """Clips every hyperparameter to [-2.5, -0.9]."""
    return jax.tree.map(lambda leaf: jnp.clip(leaf, -2.5, -0.9), alpha)


# Annealed outer losses.


def anneal(step, data):
    """Returns the outer data with the temperature of a step."""
    temperature = {"temperature": 1.0 / (1.0 + step)}
    if isinstance(data, hg.Batches):
        return hg.Batches(data.data | temperature, data.batch_size)
    return data | temperature


# Metrics.


def predict(w, alpha, batch):
    """Returns the logits."""
    return batch["x"] @ w["weights"] + w["bias"]


def error_rate(data, w, alpha, key):
    """Returns the fraction of wrong signs."""
    return jnp.mean(jnp.sign(predict(w, alpha, data)) != data["y"])


def make_metrics() -> dict[str, Any]:
    """Returns metrics of w, of alpha, of the key, and of a surrogate's gap."""
    data = jax.tree.map(jnp.asarray, problems.classification_data(2))
    gap_metrics = surrogates.gap_metrics(
        "accuracy",
        surrogates.Accuracy(),
        predict,
        data,
        (data["y"] > 0).astype(int),
        temperature=0.5,
        schedule=lambda step: 1.0 / (1.0 + step),
    )
    return gap_metrics | {
        "error_rate": jax.tree_util.Partial(error_rate, data),
        "alpha": lambda w, alpha, key: jnp.sum(alpha["weights"]),
        "random": lambda w, alpha, key: jax.random.uniform(key),
    }


# Runs that stop, that resume, and several runs in one program.


def run_resumed(estimator: Any, make_setup: Callable[[], Setup]) -> dict[str, Any]:
    """Returns a run that a time limit stops, and the same run after it resumed."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"checkpoints": hg.Checkpoints(folder, every=5)}
        stopped = minimize(make_setup, estimator, time_limit=1e-9, **options)
        resumed = minimize(make_setup, estimator, **options)
    return {"stopped": trace_to_dict(stopped), "resumed": trace_to_dict(resumed)}


def run_vmapped(estimator: Any) -> dict[str, Any]:
    """Returns the traces of three keys under ``vmap``."""
    run_key = lambda key: minimize(BATCHES, estimator, num_steps=6, key=key)
    keys = jax.random.split(jax.random.key(17), 3)
    return batched_trace_to_dict(jax.jit(jax.vmap(run_key))(keys))


def run_front(aggregator: Callable, **options: Any) -> dict[str, Any]:
    """Returns the traces of a Pareto front of three preferences."""
    problem, w, alpha = TWO_LOSSES()
    preferences = jnp.array([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]])
    trace = objectives.pareto_front(
        problem, IMPLICIT, SGD, w, alpha, preferences,
        aggregator_fn=aggregator, num_steps=6, **options,
    )  # fmt: skip
    return batched_trace_to_dict(trace)


AGGREGATORS = {
    "WeightedSum": objectives.WeightedSum(jnp.array([0.3, 1.2])),
    "SmoothTchebycheff": objectives.SmoothTchebycheff(jnp.array([1.0, 2.0]), 0.1),
    "SmoothTchebycheff with ideal": objectives.SmoothTchebycheff(
        jnp.array([1.0, 2.0]), 0.1, jnp.array([-0.1, -0.2])
    ),
    "MGDA": objectives.MGDA(),
    "UPGrad": objectives.UPGrad(),
    "EPO": objectives.EPO(jnp.array([1.0, 2.0])),
    "EPO with tolerance": objectives.EPO(jnp.array([1.0, 0.2]), 0.5, ideal=-0.1),
    "AugmentedLagrangian": objectives.AugmentedLagrangian(0.3),
    "AugmentedLagrangian with period": objectives.AugmentedLagrangian(
        0.3, penalty=2.0, period=3
    ),
}
OPTIONS: dict[str, Callable[[], Any]] = {
    "plain": run,
    "batches": partial(run, BATCHES),
    "sgd with momentum": partial(run, optimizer=optax.sgd(0.3, momentum=0.9)),
    "adamw": partial(run, optimizer=optax.adamw(0.1, weight_decay=0.3)),
    "lbfgs": partial(
        run,
        problems.positive_penalties,
        optimizer=optax.lbfgs(0.1, linesearch=None),
        space=PENALTY_SPACE,
    ),
    "schedule": partial(run, optimizer=optax.sgd(optax.cosine_decay_schedule(0.5, 12))),
    "reduce on plateau": partial(
        run, optimizer=optax.chain(ADAM, optax.contrib.reduce_on_plateau(patience=1))
    ),
    "space": partial(run, space=SPACE),
    "space of penalties": partial(
        run, problems.positive_penalties, space=PENALTY_SPACE
    ),
    "space, one for all": partial(
        run, problems.positive_penalties, space=spaces.Positive()
    ),
    "space, Simplex": partial(run, problems.feature_mixture, space=spaces.Simplex()),
    "space, Unrolled": partial(
        run, problems.feature_mixture, UNROLLED, space=spaces.Unit()
    ),
    "project": partial(run, project=project),
    "anneal": partial(run, problems.smooth_error, outer_data_fn=anneal),
    "anneal, batches": partial(
        run, partial(problems.smooth_error, 6), SOBA, outer_data_fn=anneal
    ),
    "metrics": lambda: run(metrics=make_metrics()),
    "metrics, eval_every": lambda: run(metrics=make_metrics(), eval_every=5),
    "certify_every": partial(run, certify_every=4),
    "certify_every, short": partial(run, estimator=SHORT_IMPLICIT, certify_every=1),
    "certify_every, Unrolled": partial(run, estimator=UNROLLED, certify_every=5),
    "certify_every, SOBA": partial(
        run, partial(problems.logistic, 6), SOBA, certify_every=5
    ),
    "certify_every, FiniteDifference": partial(
        run, estimator=hg.FiniteDifference(DESCENT), certify_every=3
    ),
    "record untrusted": partial(run, estimator=SHORT_IMPLICIT),
    "skip untrusted": partial(run, estimator=SHORT_IMPLICIT, on_untrusted="skip"),
    "refine untrusted": partial(run, estimator=SHORT_IMPLICIT, on_untrusted="refine"),
    "refine untrusted, certified": partial(
        run, estimator=SHORT_IMPLICIT, on_untrusted="refine", certify_every=2
    ),
    "refine untrusted, some": partial(
        run,
        estimator=hg.Implicit(hg.Descent(optax.sgd(0.5), 20)),
        on_untrusted="refine",
    ),
    "refine untrusted, rtol": partial(
        run, estimator=hg.Implicit(DESCENT, rtol=1e-3), on_untrusted="refine"
    ),
    "stop untrusted": partial(run, estimator=SHORT_IMPLICIT, on_untrusted="stop"),
    "skip untrusted, SOBA": partial(
        run, estimator=SOBA, on_untrusted="skip", certify_every=1
    ),
    "diverging": partial(
        run, problems.diverging, hg.Implicit(hg.Newton()), optax.sgd(0.05), num_steps=30
    ),
    "NaN hypergradient": partial(
        run, problems.nan_gradient, hg.Implicit(hg.Newton()), SGD
    ),
    "NaN step": partial(run, optimizer=optax.sgd(jnp.inf)),
    "NaN weights": partial(
        run, TWO_LOSSES, aggregator=objectives.EPO(jnp.ones(2), ideal=10.0)
    ),
    "checkpoints": partial(run_resumed, SHORT_IMPLICIT, problems.logistic),
    "checkpoints, SABA": partial(run_resumed, hg.SABA(optax.sgd(0.2)), BATCHES),
    "vmap, Implicit": partial(run_vmapped, IMPLICIT),
    "vmap, SOBA": partial(run_vmapped, SOBA),
    "front, WeightedSum": partial(run_front, objectives.WeightedSum),
    "front, SmoothTchebycheff": partial(
        run_front, lambda preference: objectives.SmoothTchebycheff(preference, 0.1)
    ),
    "front, EPO": partial(run_front, objectives.EPO, certify_every=3),
}
CASES: dict[str, Callable[[], Any]] = {
    f"minimize/{name}": case for name, case in OPTIONS.items()
}
CASES |= {
    f"minimize/aggregator, {name}": partial(
        run, TWO_LOSSES, optimizer=SGD, aggregator=aggregator
    )
    for name, aggregator in AGGREGATORS.items()
}
CASES |= {
    "minimize/aggregator in a space": partial(
        run, TWO_LOSSES, optimizer=SGD, aggregator=objectives.UPGrad(),
        space=spaces.Interval(-3.0, 0.0), certify_every=5,
    ),
    "minimize/aggregator, Unrolled": partial(
        run, TWO_LOSSES, UNROLLED, SGD, aggregator=objectives.MGDA()
    ),
}  # fmt: skip
