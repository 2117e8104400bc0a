"""The surrogates with their exact metrics by other means, and data to test them on."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import sklearn.metrics as skm

from hypergrad import surrogates as sg
from hypergrad.validation import floats_to_arrays

N, K, NUM_CLASSES, NUM_TRUE = 24, 5, 5, 48
#: Shapes of scores by the kind of targets.
SHAPES = {
    "binary": (N,), "classes": (N, NUM_CLASSES), "labels": (N, 3), "masks": (3, N),
    "ranking": (N,), "gains": (N,),
}  # fmt: skip


class Case(NamedTuple):
    """A surrogate, the kind of its input, and its metric by other means."""

    surrogate: Any
    kind: str
    oracle: Callable[..., float]  # (scores, targets, weights), nothing masked out
    has_integer_weights: bool = False  # the oracle repeats items


# Oracles. Ties are as in scikit-learn: class 0 at the threshold, the first class else.


def predict(scores, targets):
    is_multiclass = scores.ndim == 2 and targets.ndim == 1
    return scores.argmax(1) if is_multiclass else (scores > 0).astype(int)


def sklearn_metric(metric, **kwargs):
    return lambda s, y, w: metric(y, predict(s, y), sample_weight=w, **kwargs)


def sklearn_ratio(metric, average="binary", num_columns=None, **kwargs):
    labels = {} if num_columns is None else {"labels": range(num_columns)}
    kwargs |= {"average": average, "zero_division": 0} | labels
    return sklearn_metric(metric, **kwargs)


def balanced_accuracy(s, y, w):
    options = {"labels": np.unique(y[w > 0]), "average": None}
    return sklearn_metric(skm.recall_score, **options)(s, y, w).mean()


def top_2_accuracy(s, y, w):
    options = {"sample_weight": w, "labels": range(NUM_CLASSES)}
    return skm.top_k_accuracy_score(y, s, k=2, **options)


def confidence(s):
    if s.ndim == 1:
        return np.abs(s)
    return np.diff(np.sort(s, axis=1)[:, -2:], axis=1)[:, 0]


def selective_risk(s, y, w):
    answered = w * (confidence(s) >= 1)
    errors = (answered * (predict(s, y) != y)).sum()
    return errors / answered.sum() if answered.sum() else 0.0


def coverage(s, y, w):
    return (w * (confidence(s) >= 1)).sum() / w.sum()


def per_image(metric):
    def oracle(s, y, w):
        images = [image for image in zip(y, s > 0, w, strict=True) if image[2].sum()]
        values = [metric(y, p, sample_weight=w, zero_division=0) for y, p, w in images]
        return np.mean(values)

    return oracle


def auc(s, y, w):
    return skm.roc_auc_score(y, s, sample_weight=w)


def partial_auc(s, y, w):
    standardized = skm.roc_auc_score(y, s, sample_weight=w, max_fpr=0.3)
    # McClish's standardization, inverted.
    return 0.045 + (2 * standardized - 1) * (0.3 - 0.045)


def calibration_error(s, y, w):
    if s.ndim == 1:
        p, correct = 1 / (1 + np.exp(-s)), y
    else:
        e = np.exp(s - s.max(1, keepdims=True))
        p, correct = (e / e.sum(1, keepdims=True)).max(1), s.argmax(1) == y
    bins = np.ceil(4 * p)
    gaps = [abs((w * (correct - p))[bins == b].sum()) for b in range(1, 5)]
    return sum(gaps) / w.sum()


def average_precision(s, y, w):
    return skm.average_precision_score(y, s, sample_weight=w) if w @ y > 0 else 0.0


def tied_groups(s, y):
    """Yields items before, size and gain of each group of ties, from the best down."""
    num_before = 0
    for score in np.unique(s)[::-1]:
        is_tied = s == score
        yield num_before, is_tied.sum(), y[is_tied].sum()
        num_before += is_tied.sum()


def top_gain(s, y):
    """Returns the gain among the top K, of a tie that K cuts in proportion."""
    groups = tied_groups(s, y)
    return sum(gain * np.clip((K - before) / n, 0, 1) for before, n, gain in groups)


def ndcg(s, y):
    if len(y) < 2:  # which scikit-learn refuses
        return float(y.sum() > 0)
    return skm.ndcg_score(y[None], s[None], k=K)


def reciprocal_rank(s, y):
    """The first of p in a random order of n ties is on average at (n + 1) / (p + 1)."""
    for num_before, size, gain in tied_groups(s, y):
        if gain:
            return 1 / (num_before + (size + 1) / (gain + 1))
    return 0.0


def detection(num_points):
    def oracle(s, y):
        pairs, num_matches = [], 0
        for num_before, size, gain in tied_groups(s, y):
            num_matches += gain
            pairs += [(num_matches / (num_before + size), num_matches)] * int(gain)
        best = lambda recall: max((p for p, r in pairs if r >= recall), default=0.0)
        if num_points is None:
            return sum(best(recall) for _, recall in pairs) / NUM_TRUE
        # In whole numbers of true boxes and points, rounded up.
        grid = [-(-i * NUM_TRUE // (num_points - 1)) for i in range(num_points)]
        return np.mean([best(recall) for recall in grid])

    return oracle


def item_case(surrogate, oracle, kind="ranking"):
    """Returns a case whose oracle has no weights, by repeating items."""

    def repeat_items(s, y, w):
        counts = w.astype(int)
        assert np.all(w == counts)
        return oracle(np.repeat(s, counts), np.repeat(y, counts))

    return Case(surrogate, kind, repeat_items, has_integer_weights=True)


accuracy = sklearn_metric(skm.accuracy_score)
f1, f2 = skm.f1_score, functools.partial(skm.fbeta_score, beta=2.0)
precision, recall = skm.precision_score, skm.recall_score
micro_f1 = sg.FBeta(average="micro")
CASES = {
    "accuracy": Case(sg.Accuracy(), "binary", accuracy),
    "accuracy-classes": Case(sg.Accuracy(), "classes", accuracy),
    "balanced": Case(sg.Accuracy(balanced=True), "binary", balanced_accuracy),
    "balanced-classes": Case(sg.Accuracy(balanced=True), "classes", balanced_accuracy),
    "expected": Case(sg.ExpectedAccuracy(), "classes", accuracy),
    "top-2": Case(sg.TopKAccuracy(2), "classes", top_2_accuracy),
    "risk": Case(sg.SelectiveRisk(1.0), "binary", selective_risk),
    "risk-classes": Case(sg.SelectiveRisk(1.0), "classes", selective_risk),
    "coverage": Case(sg.Coverage(1.0), "binary", coverage),
    "f2": Case(sg.FBeta(2.0), "binary", sklearn_ratio(f2)),
    "f1-macro": Case(sg.FBeta(), "classes", sklearn_ratio(f1, "macro", 5)),
    "f1-micro": Case(micro_f1, "classes", sklearn_ratio(f1, "micro", 5)),
    "f1-labels": Case(micro_f1, "labels", sklearn_ratio(f1, "micro", 3)),
    "precision": Case(sg.Precision(), "classes", sklearn_ratio(precision, "macro", 5)),
    "recall": Case(sg.Recall(), "labels", sklearn_ratio(recall, "macro", 3)),
    "dice": Case(sg.Dice(), "masks", per_image(f1)),
    "iou": Case(sg.IoU(), "masks", per_image(skm.jaccard_score)),
    "auc": Case(sg.AUC(), "binary", auc),
    "partial-auc": Case(sg.AUC(0.3), "binary", partial_auc),
    "hinge": Case(sg.SquaredHingeAUC(), "binary", auc),
    "calibration": Case(sg.CalibrationError(4), "binary", calibration_error),
    "calibration-classes": Case(sg.CalibrationError(4), "classes", calibration_error),
    "smooth-ap": Case(sg.SmoothAP(), "ranking", average_precision),
    "fast-ap": Case(sg.FastAP(8), "ranking", average_precision),
    "blackbox-ap": Case(sg.BlackboxAP(), "ranking", average_precision),
    "soft-rank-ap": Case(sg.SoftRankAP(), "ranking", average_precision),
    "recall-at-k": item_case(
        sg.RecallAtK(K), lambda s, y: top_gain(s, y) / y.sum() if y.any() else 0.0
    ),
    "precision-at-k": item_case(sg.PrecisionAtK(K), lambda s, y: top_gain(s, y) / K),
    "ndcg": item_case(sg.NDCG(K), ndcg, kind="gains"),
    "mrr": item_case(sg.MRR(), reciprocal_rank),
    "detection": item_case(sg.DetectionAP(NUM_TRUE), detection(None)),
    "detection-101": item_case(sg.DetectionAP(NUM_TRUE, 101), detection(101)),
}
RANKINGS = [name for name, case in CASES.items() if case.kind in ("ranking", "gains")]


class Result(NamedTuple):
    """The results of one compiled program of a surrogate."""

    value: Any
    gradients: Any  # by scores, temperature and weights
    exact: Any


@eqx.filter_jit
def _evaluate(surrogate, scores, targets, temperature, where, weights) -> Result:
    def smooth(scores, temperature, weights):
        options = {"temperature": temperature, "where": where, "weights": weights}
        return surrogate(scores, targets, **options)

    value_and_grad = jax.value_and_grad(smooth, (0, 1, 2))
    value, gradients = value_and_grad(scores, temperature, weights)
    exact = surrogate.exact(scores, targets, where=where, weights=weights)
    return Result(value, gradients, exact)


def evaluate(name, scores, targets, temperature=0.5, where=None, weights=None):
    """Returns a `Result`, by one program for scores of one shape and dtype."""
    case, scores = CASES[name], jnp.asarray(scores)
    is_elementwise = case.kind in ("masks", "ranking", "gains")
    shape = scores.shape if is_elementwise else scores.shape[:1]
    where = np.ones(shape, bool) if where is None else where
    weights = np.ones(shape) if weights is None else weights
    return _evaluate(
        floats_to_arrays(case.surrogate), scores, jnp.asarray(targets),
        jnp.asarray(temperature, scores.dtype),
        jnp.asarray(np.broadcast_to(where, shape)),
        jnp.asarray(np.broadcast_to(weights, shape), scores.dtype),
    )  # fmt: skip


def make_rng(key: jax.Array) -> np.random.Generator:
    return np.random.default_rng(int(jax.random.bits(key)))


def sample(kind, rng, ties=False):
    """Returns scores and targets; the first two examples have the classes 0 and 1."""
    scores = 2 * rng.normal(size=SHAPES[kind])
    shape = SHAPES[kind][:1] if kind == "classes" else SHAPES[kind]
    num_values = {"classes": NUM_CLASSES, "gains": 4}.get(kind, 2)
    targets = rng.integers(0, num_values, size=shape)
    if kind != "labels":
        targets[..., :2] = 0, 1
    return np.round(scores) if ties else scores, targets


#: No multiple of it, or of its half, is 1 or a temperature below.
SPACING = 3 / 32


def sample_spaced(kind, rng):
    """Returns the same with scores `SPACING` apart, and half of that from 0."""
    scores, targets = sample(kind, rng)
    order = scores.ravel().argsort().argsort().reshape(scores.shape)
    return SPACING * (order - scores.size / 2 + 0.5), targets


def sample_smooth(name, rng):
    """Returns scores and targets away from kinks, a temperature, and a step for it.

    Rankings are six clusters of four, each one block of soft ranks, which neither
    splits nor merges for weights in [1/2, 3/2].
    """
    kind = CASES[name].kind
    if name not in RANKINGS:
        return *sample_spaced(kind, rng), 0.7, 1e-3
    scores = np.add.outer(np.arange(6.0), 0.01 * np.arange(4)).ravel()
    return rng.permutation(scores), sample(kind, rng)[1], 0.1, 2e-4


def expand(mask, like):
    """Returns a mask of examples broadcast to an array with further axes."""
    mask = np.asarray(mask)
    return np.broadcast_to(
        mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim)), like.shape
    )
