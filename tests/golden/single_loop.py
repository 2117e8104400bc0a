"""Golden cases of the single-loop methods, each in `hypergrad.minimize`."""

import functools
import itertools
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax

import hypergrad as hg
from tests.golden import problems
from tests.golden.problems import Setup
from tests.golden.results import trace_to_dict

NUM_STEPS = 20
SGD = optax.sgd(0.2)
ADAM = optax.adam(0.05)
DECAY = optax.sgd(optax.exponential_decay(0.3, 5, 0.7))
MOMENTUM = optax.sgd(0.1, momentum=0.5)
ETA = 0.4  # step size of the Neumann series


def momentum_schedule(step):
    """Returns a momentum that rises towards 1."""
    return 1 - 1 / (step + 2.0)


def penalty_schedule(step):
    """Returns a penalty that grows linearly."""
    return 10.0 * (1 + step)


# Name -> method of an optimizer for w. Some methods take an optimizer of the adjoint.
METHODS: dict[str, Callable[..., Any]] = {
    "SOBA": hg.SOBA,
    "SABA": hg.SABA,
    "SRBA": partial(hg.SRBA, period=3),
    "FSLA": hg.FSLA,
    "AmIGO": partial(hg.AmIGO, num_steps=3, num_adjoint_steps=2),
    "StocBiO": partial(hg.StocBiO, num_steps=3, num_terms=4, step_size=ETA),
    "TTSA": partial(hg.TTSA, num_terms=3, step_size=ETA),
    "MRBO": partial(hg.MRBO, num_terms=4, step_size=ETA),
    "SUSTAIN": partial(hg.SUSTAIN, num_terms=3, step_size=ETA),
    "VRBO": partial(hg.VRBO, num_steps=3, num_terms=4, period=2, step_size=ETA),
    "F2SA": partial(hg.F2SA, num_steps=3, penalty=20.0),
    "BOME": partial(hg.BOME, num_steps=3, step_size=ETA),
    "PZOBO": partial(hg.PZOBO, num_steps=3, num_directions=2),
    "DARTS": partial(hg.DARTS, step_size=ETA),
    "DARTS, first order": hg.DARTS,
}
WITH_ADJOINT_OPTIMIZER = ("SOBA", "SABA", "SRBA", "FSLA", "AmIGO")
# Variants with other values of the remaining arguments.
OPTIONS: dict[str, Any] = {
    "FSLA, momentum schedule": hg.FSLA(SGD, momentum=momentum_schedule),
    "MRBO, momentum schedule": hg.MRBO(
        SGD, 4, step_size=ETA, momentum=momentum_schedule
    ),
    "SUSTAIN, momentum schedule": hg.SUSTAIN(
        SGD, 3, step_size=ETA, momentum=momentum_schedule
    ),
    "SUSTAIN, momentum": hg.SUSTAIN(SGD, 3, step_size=ETA, momentum=0.5),
    "F2SA, penalty schedule": hg.F2SA(SGD, 3, penalty=penalty_schedule),
    "BOME, eta": hg.BOME(SGD, 3, step_size=ETA, eta=0.1),
    "PZOBO, sigma": hg.PZOBO(SGD, 3, 2, sigma=0.1),
    "Average of SOBA": hg.Average(hg.SOBA(SGD), 3),
}
# Methods on problems of other kinds. Variance reduction needs fixed data.
KINDS: dict[str, Callable[[], Setup]] = {
    "keyed batches": problems.keyed_batches,
    "init_fn": partial(problems.ridge, batch_size=6, init_fn=problems.shifted_init),
    "data_fn": problems.episodes,
    "float32": partial(problems.ridge, batch_size=6, dtype="float32"),
}
WITH_FIXED_DATA = ("SABA", "SRBA", "VRBO")


def run_method(
    estimator: Any,
    make_setup: Callable[[], Setup],
    optimizer: optax.GradientTransformation = MOMENTUM,
) -> dict[str, Any]:
    """Returns the trace of 20 outer steps."""
    problem, w, alpha = make_setup()
    key = jax.random.key(11)
    trace = hg.minimize(
        problem, estimator, optimizer, w, alpha, num_steps=NUM_STEPS, key=key
    )
    return trace_to_dict(trace)


def method_cases(name: str, method: Callable[..., Any]) -> dict[str, Callable]:
    """Returns the cases of one method, by data and by optimizer."""
    # The outer loss of logistic regression does not depend on alpha.
    make_setup = problems.ridge if name == "DARTS, first order" else problems.logistic
    batches = partial(make_setup, batch_size=6)
    adjoint = {"adjoint_optimizer": MOMENTUM} if name in WITH_ADJOINT_OPTIMIZER else {}
    cases = {
        "batches": partial(run_method, method(SGD), batches),
        "full data": partial(run_method, method(SGD), make_setup),
        "adam": partial(run_method, method(ADAM, **adjoint), batches, ADAM),
        "schedule": partial(
            run_method, method(DECAY), partial(problems.ridge, batch_size=6), DECAY
        ),
    }
    return {f"single loop/{name}, {variant}": case for variant, case in cases.items()}


CASES: dict[str, Callable[[], Any]] = functools.reduce(
    operator.or_, itertools.starmap(method_cases, METHODS.items())
)
CASES |= {
    f"single loop/{name}": partial(run_method, estimator, partial(problems.logistic, 6))
    for name, estimator in OPTIONS.items()
}
CASES |= {
    f"single loop/{name}, problem with {kind}": partial(run_method, method(SGD), setup)
    for name, method in METHODS.items()
    for kind, setup in KINDS.items()
    if not (name in WITH_FIXED_DATA and kind in ("keyed batches", "data_fn"))
}
