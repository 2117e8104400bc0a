"""Golden cases of the surrogates: values, derivatives and exact metrics."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from hypergrad import surrogates

NUM_EXAMPLES, NUM_CLASSES = 8, 3
#: Shapes of scores by the kind of targets.
SHAPES = {
    "binary": (NUM_EXAMPLES,),
    "classes": (NUM_EXAMPLES, NUM_CLASSES),
    "labels": (NUM_EXAMPLES, 2),
    "masks": (2, NUM_EXAMPLES),
    "ranking": (NUM_EXAMPLES,),
    "rankings": (2, NUM_EXAMPLES),
    "gains": (NUM_EXAMPLES,),
}
PER_ELEMENT = ("masks", "rankings")  # where and weights have the shape of the scores
TEMPERATURE = 0.7

SURROGATES: dict[str, tuple[Any, str]] = {
    "Accuracy": (surrogates.Accuracy(), "binary"),
    "Accuracy, threshold": (surrogates.Accuracy(0.4), "binary"),
    "Accuracy, classes": (surrogates.Accuracy(), "classes"),
    "Accuracy, balanced": (surrogates.Accuracy(balanced=True), "binary"),
    "Accuracy, balanced classes": (surrogates.Accuracy(balanced=True), "classes"),
    "ExpectedAccuracy": (surrogates.ExpectedAccuracy(), "classes"),
    "TopKAccuracy": (surrogates.TopKAccuracy(2), "classes"),
    "SelectiveRisk": (surrogates.SelectiveRisk(1.0), "binary"),
    "SelectiveRisk, classes": (surrogates.SelectiveRisk(1.0), "classes"),
    "Coverage": (surrogates.Coverage(1.0), "binary"),
    "Coverage, classes": (surrogates.Coverage(1.0), "classes"),
    "FBeta": (surrogates.FBeta(2.0, threshold=0.1), "binary"),
    "FBeta, macro": (surrogates.FBeta(), "classes"),
    "FBeta, micro": (surrogates.FBeta(average="micro"), "classes"),
    "FBeta, macro labels": (surrogates.FBeta(), "labels"),
    "FBeta, micro labels": (surrogates.FBeta(2.0, average="micro"), "labels"),
    "Precision": (surrogates.Precision(), "classes"),
    "Precision, labels": (surrogates.Precision(average="micro"), "labels"),
    "Recall": (surrogates.Recall(), "labels"),
    "Recall, binary": (surrogates.Recall(threshold=-0.2), "binary"),
    "Dice": (surrogates.Dice(), "masks"),
    "Dice, one mask": (surrogates.Dice(0.2), "binary"),
    "IoU": (surrogates.IoU(), "masks"),
    "IoU, one mask": (surrogates.IoU(0.2), "binary"),
    "AUC": (surrogates.AUC(), "binary"),
    "AUC, blocks": (surrogates.AUC(block_size=3), "binary"),
    "AUC, partial": (surrogates.AUC(0.3), "binary"),
    "SquaredHingeAUC": (surrogates.SquaredHingeAUC(), "binary"),
    "CalibrationError": (surrogates.CalibrationError(4), "binary"),
    "CalibrationError, classes": (surrogates.CalibrationError(4), "classes"),
    "SmoothAP": (surrogates.SmoothAP(), "ranking"),
    "SmoothAP, rows": (surrogates.SmoothAP(), "rankings"),
    "SmoothAP, columns": (surrogates.SmoothAP(axis=0), "labels"),
    "FastAP": (surrogates.FastAP(8), "ranking"),
    "FastAP, range": (surrogates.FastAP(8, low=-1.0, high=1.0), "ranking"),
    "FastAP, rows": (surrogates.FastAP(8), "rankings"),
    "BlackboxAP": (surrogates.BlackboxAP(), "ranking"),
    "BlackboxAP, rows": (surrogates.BlackboxAP(), "rankings"),
    "SoftRankAP": (surrogates.SoftRankAP(), "ranking"),
    "SoftRankAP, rows": (surrogates.SoftRankAP(), "rankings"),
    "RecallAtK": (surrogates.RecallAtK(3), "ranking"),
    "PrecisionAtK": (surrogates.PrecisionAtK(3), "ranking"),
    "PrecisionAtK, rows": (surrogates.PrecisionAtK(3), "rankings"),
    "NDCG": (surrogates.NDCG(3), "gains"),
    "MRR": (surrogates.MRR(), "ranking"),
    "MRR, rows": (surrogates.MRR(), "rankings"),
    "DetectionAP": (surrogates.DetectionAP(30.0), "ranking"),
    "DetectionAP, points": (surrogates.DetectionAP(30.0, 11), "ranking"),
    "DetectionAP, rows": (surrogates.DetectionAP(30.0), "rankings"),
}


def examples(kind: str, dtype: Any) -> tuple[np.ndarray, ...]:
    """Returns scores, targets, a mask of two thirds of them, and weights."""
    rng = np.random.default_rng(19)
    shape = SHAPES[kind]
    scores = (1.5 * rng.normal(size=shape)).astype(dtype)
    high = {"classes": NUM_CLASSES, "gains": 4}.get(kind, 2)
    targets = rng.integers(0, high, size=shape[:1] if kind == "classes" else shape)
    shape = shape if kind in PER_ELEMENT or len(shape) == 1 else shape[:1]
    where = rng.permutation(np.arange(np.prod(shape)) % 3 > 0).reshape(shape)
    return scores, targets, where, (0.5 + rng.random(shape)).astype(dtype)


@eqx.filter_jit
def evaluate(surrogate, scores, targets, temperature, where, weights) -> dict[str, Any]:
    """Returns the value, its first and second derivatives, and the exact metric."""

    def smooth(scores, temperature, weights):
        return surrogate(
            scores, targets, temperature=temperature, where=where, weights=weights
        )

    value_and_grad = jax.value_and_grad(smooth, argnums=(0, 1, 2))
    value, gradients = value_and_grad(scores, temperature, weights)
    results = {
        "value": value,
        "scores_grad": gradients[0],
        "temperature_grad": gradients[1],
        "weights_grad": gradients[2],
        "exact": surrogate.exact(scores, targets, where=where, weights=weights),
    }
    if scores.dtype == jnp.float64:
        gradient_fn = lambda scores: jax.grad(smooth)(scores, temperature, weights)
        direction = jnp.cos(jnp.arange(scores.size, dtype=float)).reshape(scores.shape)
        results["hvp"] = jax.jvp(gradient_fn, (scores,), (direction,))[1]
    return results


def run_surrogate(surrogate: Any, kind: str) -> dict[str, Any]:
    """Returns the results in float32 and float64, with and without mask and weights."""
    results = {}
    for dtype in ("float32", "float64"):
        scores, targets, where, weights = examples(kind, dtype)
        masks = {
            "unmasked": (np.ones_like(where), np.ones_like(weights)),
            "masked": (where, weights),
        }
        if kind in ("ranking", "rankings", "gains", "labels"):
            targets = targets.astype(dtype)
        for name, mask in masks.items():
            results[f"{dtype}, {name}"] = evaluate(
                surrogate, jnp.asarray(scores), targets,
                jnp.asarray(TEMPERATURE, dtype), *map(jnp.asarray, mask),
            )  # fmt: skip
    return results


def run_defaults(surrogate: Any, kind: str) -> dict[str, Any]:
    """Returns value and exact metric where mask and weights are left out."""
    scores, targets, _, _ = examples(kind, "float64")
    value = jax.jit(lambda scores: surrogate(scores, targets, temperature=0.2))
    return {"value": value(scores), "exact": surrogate.exact(scores, targets)}


def run_temperatures() -> dict[str, Any]:
    """Returns the temperatures that are proposed for scores of all kinds."""
    results = {}
    for dtype in ("float32", "float64"):
        scores, targets, where, weights = examples("binary", dtype)
        masked = {"where": where, "weights": weights}
        classes, indices, _, _ = examples("classes", dtype)
        propose = jax.jit(surrogates.temperature_from_scores)
        results[dtype] = {
            "pairs": propose(scores),
            "opposite pairs": propose(scores, targets),
            "threshold": propose(scores, threshold=0.1),
            "threshold and targets": propose(scores, targets, threshold=0.1),
            "masked pairs": propose(scores, targets, **masked),
            "masked threshold": propose(scores, targets, threshold=0.1, **masked),
            "classes": propose(classes),
            "classes and targets": propose(classes, indices),
            "masked classes": propose(classes, indices, **masked),
            "gap": surrogates.temperature_from_scores(scores, targets, gap=0.02),
        }
    return results


def cubic_rank_sum(values, temperature):
    """Returns the sum of the cubed soft ranks of all rows."""
    return jnp.sum(surrogates.soft_rank(values, temperature=temperature) ** 3)


def run_soft_ranks() -> dict[str, Any]:
    """Returns soft ranks of rows at several temperatures, and their derivatives."""
    results = {}
    for dtype in ("float32", "float64"):
        values, _, _, weights = examples("rankings", dtype)
        for temperature in (0.1, 1.0):
            soft_rank = partial(surrogates.soft_rank, temperature=temperature)
            results[f"{dtype}, {temperature}"] = {
                "ranks": jax.jit(soft_rank)(values),
                "weighted ranks": jax.jit(soft_rank)(values, weights=weights),
                "jacfwd": jax.jit(jax.jacfwd(soft_rank))(values[0]),
                "grad": jax.jit(jax.grad(cubic_rank_sum))(values, temperature),
            }
    return results


def run_match_boxes() -> dict[str, Any]:
    """Returns which of random boxes are matched, with and without masks."""
    rng = np.random.default_rng(23)
    corners = rng.uniform(0, 3, size=(2, 10, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(1, 2, (2, 10, 2))], axis=-1)
    true_boxes = boxes[:, ::2] + rng.uniform(-0.3, 0.3, size=(2, 5, 4))
    scores, where = rng.normal(size=(2, 10)), rng.random((2, 10)) < 0.8
    match = jax.jit(surrogates.match_boxes)
    true_where = rng.random((2, 5)) < 0.8
    return {
        "default": match(boxes, scores, true_boxes),
        "low threshold": match(boxes, scores, true_boxes, threshold=0.2),
        "masked": match(boxes, scores, true_boxes, where=where, where_true=true_where),
    }


def run_gap_metrics() -> dict[str, Any]:
    """Returns surrogate, exact metric and gap, at a temperature and along a run."""
    scores, targets, where, weights = examples("binary", "float64")
    x = np.stack([scores, np.cos(scores)], axis=1)
    make_metrics = partial(
        surrogates.gap_metrics, "auc", surrogates.AUC(),
        lambda w, alpha, batch: batch @ w, x, targets, where=where, weights=weights,
    )  # fmt: skip
    constant = make_metrics(temperature=0.3)
    proposed = make_metrics(temperature=surrogates.temperature_from_scores)
    w = jnp.array([1.0, 0.3])
    compute = lambda metrics: {
        name: eqx.filter_jit(metric)(w, None, jax.random.key(0))
        for name, metric in metrics.items()
    }
    trace = hg.minimize(
        hg.Bilevel(
            lambda w, alpha, batch: jnp.sum((w - alpha) ** 2),
            lambda w, alpha, batch: jnp.sum((w - 1) ** 2),
        ),
        hg.Implicit(hg.Newton()),
        optax.sgd(0.2),
        w,
        jnp.zeros(2),
        num_steps=4,
        metrics=make_metrics(temperature=0.3, schedule=lambda step: 1 / (1 + step)),
    )
    return {
        "constant": compute(constant),
        "proposed": compute(proposed),
        "scheduled": trace.metrics,
    }


CASES: dict[str, Callable[[], Any]] = {
    f"surrogates/{name}": partial(run_surrogate, *arguments)
    for name, arguments in SURROGATES.items()
}
CASES |= {
    f"surrogates/{name}, defaults": partial(run_defaults, *arguments)
    for name, arguments in SURROGATES.items()
    if "," not in name
}
CASES |= {
    "surrogates/temperatures": run_temperatures,
    "surrogates/soft_rank": run_soft_ranks,
    "surrogates/match_boxes": run_match_boxes,
    "surrogates/gap_metrics": run_gap_metrics,
}
