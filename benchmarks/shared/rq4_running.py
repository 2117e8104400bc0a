"""Choice of augmentation magnitudes, and the final training, for the table `rq4`."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.bench import Cell, Row
from hypergrad.certificate import TRUST_RTOL
from hypergrad.cost import outer_grad_cost
from hypergrad.runtime.compat import enable_x64
from hypergrad.trees import relative_error

from .program import program
from .rq4_tasks import (
    ARCHITECTURES,
    FIXED,
    SPACE,
    accuracy,
    data_of,
    init_w,
    problem_of,
)
from .tuning import TUNING_SEEDS

NONE, HAND, LEARNED, RANDOM, VALIDATION = AUGMENTATIONS = (
    "none", "fixed", "learned", "random search", "validation-only"
)  # fmt: skip
BUDGET = 3000.0  # gradient-equivalents of choosing magnitudes
#: Inner steps of an estimate, of a trial, and of the final training.
NUM_STEPS, NUM_TRIAL_STEPS, NUM_TRAINING_STEPS = 20, 100, 1000
OUTER_RATE = 0.1  # of Adam, on magnitudes
RATES, PENALTIES = (0.01, 0.03, 0.1, 0.3), (1e-3, 3e-3, 1e-2, 3e-2)
PAIRS = list(itertools.product(RATES, PENALTIES))


def solver_of(rate: float, num_steps: int) -> hg.Descent:
    """Returns the inner solver."""
    return hg.Descent(optax.sgd(rate, momentum=0.9), num_steps)


def estimator_of(rate: float) -> hg.Unrolled:
    """Returns the estimator through all steps, with warm starts."""
    return hg.Unrolled(solver_of(rate, NUM_STEPS), checkpoint=True, warm_start=True)


def num_outer_steps(problem: hg.Bilevel) -> int:
    """Returns the number of outer steps within the budget.

    An estimate makes its steps twice, a product per step, an outer gradient, and the
    gradient whose norm it reports.
    """
    weight = outer_grad_cost(problem.inner_data, problem.outer_data)
    return int(BUDGET / (4 * NUM_STEPS + 1 + weight))


def learn(
    architecture: str,
    objective: str,
    rate: float,
    data: PyTree,
    w: PyTree,
    alpha: Array,
) -> hg.Trace:
    """Returns a run of Adam along hypergradients."""
    problem = problem_of(architecture, objective, *data)
    return hg.minimize(
        problem,
        estimator_of(rate),
        optax.adam(OUTER_RATE),
        w,
        alpha,
        num_steps=num_outer_steps(problem),
        space=SPACE,
    )


def search(
    architecture: str, objective: str, rate: float, data: PyTree, w: PyTree, seed: int
) -> hg.Trace:
    """Returns trials of uniform magnitudes, each with a training from the start."""
    return hg.search(
        problem_of(architecture, objective, *data),
        solver_of(rate, NUM_TRIAL_STEPS),
        hg.searchers.Random(),
        w,
        space=SPACE,
        budget=BUDGET,
        key=jax.random.key(seed),
    )


def finish(
    architecture: str,
    objective: str,
    rate: float,
    data: PyTree,
    test: PyTree,
    w: PyTree,
    alpha: Array,
) -> dict[str, Any]:
    """Returns the final training of every row, and its losses and accuracy."""
    problem, key = problem_of(architecture, objective, *data), jax.random.key(0)
    solver, train = solver_of(rate, NUM_TRAINING_STEPS), problem.inner_data
    w, _ = solver.solve(problem.inner_loss, w, alpha, train, key)
    return {
        "w": w,
        "train_loss": problem.inner_loss(w, alpha, train),
        "val_loss": problem.outer_value(w, alpha, problem.outer_data),
        "accuracy": accuracy(architecture, objective, w, test),
    }


def estimate(
    architecture: str,
    objective: str,
    rate: float,
    data: PyTree,
    w: PyTree,
    alpha: Array,
) -> tuple[PyTree, Array]:
    """Returns ``w`` and hypergradient of one more estimate like those of learning."""
    problem = problem_of(architecture, objective, *data)
    result = hg.hypergradient(problem, estimator_of(rate))(w, alpha)
    return result.w, result.hypergradient


def certificate_row(
    problem: hg.Bilevel, w: PyTree, alpha: Array, hypergradient: Array
) -> Row:
    """Returns the error as a derivative at the argmin, or why there is none.

    A first certificate corrects ``w`` and the hypergradient there. A second certificate
    at the corrected point states whether that can be trusted to a hundredth; then it is
    the reference for both.
    """
    first = hg.certify(problem, w, alpha)
    second = hg.certify(problem, first.corrected_w, alpha)
    if not bool(second.trusted):
        return {"certified": False, "reason": reason(second)}
    return {
        "certified": True,
        "reason": None,
        "error": float(relative_error(hypergradient, second.corrected_hypergradient)),
        "implicit_error": float(first.error_estimate),
    }


def reason(certificate: hg.Certificate) -> str:
    """Returns the first reason why a certificate is not trusted."""
    if not np.isfinite(float(certificate.error_estimate)):
        return "corrections diverge"
    if bool(certificate.negative_curvature):
        return "negative curvature"
    if not float(certificate.adjoint_residual) <= TRUST_RTOL / 10:
        return "adjoint not solved"
    return "corrections do not settle"


def choose_magnitudes(
    architecture: str,
    objective: str,
    augmentation: str,
    seed: int,
    rate: float,
    penalty: float,
) -> Row:
    """Returns the magnitudes of a row, and their cost.

    ``best`` is the number of the outer step or trial with the lowest value, from 1.
    """
    *data, _ = data_of(penalty, seed)
    w = init_w(architecture, objective, seed)
    if augmentation == LEARNED:
        run = program(learn, architecture, objective, rate)
        trace = run(data, w, jnp.asarray(FIXED))
    elif augmentation == RANDOM:
        trace = search(architecture, objective, rate, data, w, seed)
    else:
        alpha = FIXED if augmentation == HAND else np.zeros_like(FIXED)
        row: Row = {"gradient_equivalents": 0.0, "steps": 0, "best": 0}
        return {"alpha": alpha.tolist()} | row
    value = np.asarray(trace.value)
    return {
        "alpha": np.asarray(trace.best_alpha).tolist(),
        "gradient_equivalents": float(trace.cost[-1]),
        "steps": len(value),
        "best": 1 + int(np.nanargmin(value)),
    }


# Tuning.


def final_loss(
    architecture: str, objective: str, data: PyTree, w: PyTree, pair: Array
) -> Array:
    """Returns the validation loss after the final training with a rate and penalty."""
    rate, penalty = pair
    train, val = data
    problem = problem_of(architecture, objective, train | {"penalty": penalty}, val)
    solver = hg.Descent(optax.sgd(rate, momentum=0.9), NUM_TRAINING_STEPS)
    alpha = jnp.asarray(FIXED)
    w, _ = solver.solve(
        problem.inner_loss, w, alpha, problem.inner_data, jax.random.key(0)
    )
    return problem.outer_value(w, alpha, problem.outer_data)


def tune(cell: Cell, rows: list[Row]) -> Row:
    """Returns the losses of an objective at every pair; a diverged loss is infinite."""
    del rows
    objective = cell["objective"]
    with enable_x64(True):
        losses = [
            [
                float(
                    program(final_loss, architecture, objective)(
                        data_of(0.0, seed)[:2],
                        init_w(architecture, objective, seed),
                        jnp.asarray(pair),
                    )
                )
                for architecture in ARCHITECTURES
                for seed in TUNING_SEEDS
            ]
            for pair in PAIRS
        ]
    means = np.nan_to_num(np.mean(losses, axis=1), nan=np.inf)
    rate, penalty = PAIRS[int(np.argmin(means))]
    ends = [float(mean) if np.isfinite(mean) else None for mean in means]
    return {"rate": rate, "penalty": penalty, "ends": ends}
