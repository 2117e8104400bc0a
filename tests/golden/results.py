"""Results of the library as dicts, under the names with which they were recorded."""

from typing import Any

import jax

import hypergrad as hg

#: Current name of a statistic -> recorded name, for statistics that were renamed.
RECORDED_NAMES = {
    "inner_grad_norm": "inner_residual",
    "num_inner_steps": "inner_steps",
    "objective_weights": "weights",
}


def stats_to_dict(stats: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the statistics under their recorded names."""
    return {RECORDED_NAMES.get(name, name): value for name, value in stats.items()}


def estimate_to_dict(estimate: hg.Estimate) -> dict[str, Any]:
    """Returns everything that an estimate contains."""
    return {
        "value": estimate.value,
        "hypergradient": estimate.hypergradient,
        "w": estimate.w,
        "stats": stats_to_dict(estimate.stats),
    }


def trace_to_dict(trace: hg.Trace) -> dict[str, Any]:
    """Returns everything that the trace of one run contains, and its status."""
    return batched_trace_to_dict(trace) | {"status": trace.status}


def batched_trace_to_dict(trace: hg.Trace) -> dict[str, Any]:
    """Returns everything that a trace contains, whatever its leading axes."""
    return {
        "alpha": trace.alpha,
        "best_alpha": trace.best_alpha,
        "w": trace.w,
        "value": trace.value,
        "stats": stats_to_dict(trace.stats),
        "metrics": trace.metrics,
        "total_cost": trace.cost[..., -1],
        "status_code": trace.status_code,
    }


def certificate_to_dict(certificate: hg.Certificate) -> dict[str, Any]:
    """Returns everything that a certificate contains."""
    return {
        "error_estimate": certificate.error_estimate,
        "trusted": certificate.trusted,
        "corrected_w": certificate.corrected_w,
        "corrected_hypergradient": certificate.corrected_hypergradient,
        "inner_grad_norm": certificate.inner_grad_norm,
        "corrected_grad_norm": certificate.corrected_grad_norm,
        "adjoint_residual": certificate.adjoint_residual,
        "ritz_min": certificate.ritz_min,
        "ritz_max": certificate.ritz_max,
        "negative_curvature": certificate.negative_curvature,
        "curvature_resolution": certificate.curvature_resolution,
        "distance_bound": certificate.distance_bound,
        "adjoint_error_bound": certificate.adjoint_error_bound,
        "stats": stats_to_dict(certificate.stats),
    }
