"""The estimate of an outer step, with its certificate and its refinement."""

import dataclasses
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..certificate import compute_certificate
from ..cost import COST_STATS
from ..estimators.base import Estimate, Estimator, get_target, normalize_estimate
from ..problem import Bilevel, EstimateData

if TYPE_CHECKING:
    from .loop import OuterLoop
    from .step import OuterState


#: The statistics that add up over the steps of a row of the trace, which stands for
#: ``record_every`` steps, and over an estimate and its refinement.
ADDITIVE_STATS = (*COST_STATS, "num_inner_steps")


def is_due(step: Array, every: int, record_every: int) -> Array:
    """Returns whether this recorded step is the first at or after a multiple.

    Multiples are those of ``every``, and recorded steps ``record_every`` steps apart.
    """
    return step % every < record_every


def estimate_step(
    loop: "OuterLoop",
    problem: Bilevel,
    state: "OuterState",
    alpha: PyTree,
    key: Array,
    record_every: int,
) -> tuple[Estimate, PyTree]:
    """Returns the estimate of a step, certified if due and refined if not trusted."""

    def finish(estimate: Estimate) -> Estimate:
        estimate = normalize_estimate(estimate)
        if loop.certify_every is None:
            return estimate
        should_certify = is_due(state.step, loop.certify_every, record_every)
        return _attach_certificate(loop, problem, should_certify, estimate, alpha, key)

    estimate, estimator_state = _estimate(
        loop.estimator, problem, state.estimator_state, alpha, key
    )
    estimate = finish(estimate)
    if loop.on_untrusted != "refine":
        return estimate, estimator_state

    estimator: Any = loop.estimator  # has the optional method `refine`

    def refine():
        refined, refined_state = estimator.refine(problem, estimator_state, alpha, key)
        refined = finish(refined)
        counts = {
            name: estimate.stats[name] + refined.stats[name] for name in ADDITIVE_STATS
        }
        stats = refined.stats | counts | {"refined": jnp.asarray(True)}
        return dataclasses.replace(refined, stats=stats), refined_state

    def skip_refinement():
        stats = estimate.stats | {"refined": jnp.asarray(False)}
        return dataclasses.replace(estimate, stats=stats), estimator_state

    # The branches of a conditional must return the same flags. Their order is fixed,
    # because checkpoints compare the text of the program.
    names = sorted({*estimate.flags, *jax.eval_shape(refine)[0].flags})

    def with_all_flags(branch):
        estimate, state = branch()
        flags = {name: estimate.flags.get(name, jnp.asarray(False)) for name in names}
        return dataclasses.replace(estimate, flags=flags), state

    return jax.lax.cond(
        estimate.stats["trusted"],
        lambda: with_all_flags(skip_refinement),
        lambda: with_all_flags(refine),
    )


@eqx.filter_jit
def _estimate(
    estimator: Estimator, problem: Bilevel, state: PyTree, alpha: PyTree, key: Array
) -> tuple[Estimate, PyTree]:
    """Returns ``estimator.estimate(...)``.

    It is compiled by itself, so that JAX keeps its trace when a step is traced again.
    """
    return estimator.estimate(problem, state, alpha, key)


def _attach_certificate(
    loop: "OuterLoop",
    problem: Bilevel,
    should_certify: Array,
    estimate: Estimate,
    alpha: PyTree,
    key: Array,
) -> Estimate:
    """Returns the estimate with a certificate in its statistics if one is due."""
    no_flags = {name: jnp.asarray(False) for name in (*estimate.flags, "certificate")}

    def certify():
        data = EstimateData.sample(problem, key)  # the data of the estimate
        certificate = compute_certificate(
            problem, data, estimate.w, alpha, estimate.hypergradient
        )
        stats = estimate.stats | {
            name: estimate.stats[name] + cost
            for name, cost in certificate.stats.items()
        }
        if get_target(loop.estimator) != "argmin":
            stats["distance_to_implicit"] = certificate.distance
            return stats, no_flags | estimate.flags
        stats["error_estimate"] = certificate.error_estimate
        # The certificate is about the hypergradient and not about the value.
        not_finite = estimate.flags["not_finite"]
        stats["trusted"] = certificate.trusted & ~not_finite
        flags = {"certificate": ~certificate.trusted, "not_finite": not_finite}
        return stats, no_flags | flags

    skip = lambda: (estimate.stats, no_flags | estimate.flags)
    stats, flags = jax.lax.cond(should_certify, certify, skip)
    return dataclasses.replace(estimate, stats=stats, flags=flags)
