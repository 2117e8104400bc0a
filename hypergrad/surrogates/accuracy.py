"""Accuracy, and the error rate among the examples that are answered at all."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from .base import (
    Examples,
    as_temperature,
    binary,
    check_count,
    check_not_negative,
    divide,
    flagged,
    mean,
    multiclass,
    rounding,
)


def judged(
    scores: ArrayLike,
    targets: ArrayLike,
    where: ArrayLike | None,
    weights: ArrayLike | None,
    threshold: ArrayLike,
) -> tuple[Examples, Array, Array, Array]:
    """``(examples, margins, correct, confidences)``.

    The margin is by how much an example is right: its side of the threshold, or its
    class's score less the best other. The confidence is the margin of the prediction.
    ``correct`` decides ties: at the threshold for class 0, else for the first class.
    """
    if jnp.ndim(scores) == 1:
        examples = binary(scores, targets, where, weights)
        scores, targets, *_ = examples
        above = scores - jnp.asarray(threshold, scores.dtype)
        correct = (above > 0) == (targets > 0)
        return examples, (2 * targets - 1) * above, correct, jnp.abs(above)
    examples = multiclass(scores, targets, where, weights)
    scores, targets, *_ = examples
    margins = own(scores, targets) - best_others(scores, targets, 1)
    best = jax.lax.top_k(scores, 2)[0]
    return (
        examples,
        margins,
        jnp.argmax(scores, axis=1) == targets,
        best[:, 0] - best[:, 1],
    )


def own(scores: Array, classes: Array) -> Array:
    """Each example's score of its class."""
    return jnp.take_along_axis(scores, classes[:, None], axis=1)[:, 0]


def best_others(scores: Array, classes: Array, k: int) -> Array:
    """Each example's k-th best score among the other classes."""
    is_own = jnp.arange(scores.shape[1])[None, :] == classes[:, None]
    return jax.lax.top_k(jnp.where(is_own, -jnp.inf, scores), k)[0][:, -1]


def _balance(examples: Examples, num_classes: int) -> Array:
    """Weights with which each class that occurs has a total of 1."""
    classes = examples.targets.astype(int)
    totals = jnp.zeros(num_classes, examples.weights.dtype)
    totals = totals.at[classes].add(examples.weights)
    return divide(examples.weights, totals[classes])


class Accuracy(eqx.Module):
    """Accuracy with a sigmoid of the margin for each example.

    ``mean_i sigmoid(m_i / temperature)``; ``m`` is the score less the threshold, with
    the sign of the class, or the score of the class less the best other.

    Args:
      threshold: scores [n] above it mean class 1. Data; not read for scores [n, C].
      balanced: average over the classes that occur, not over the examples. Static.

    Call with scores [n] and targets [n] in {0, 1}, or scores [n, C] and integer targets
    [n]; ``where`` and ``weights`` [n].

    Ties: half right; in `exact` the threshold itself means class 0, and the first of
    equally good classes is predicted. Masked out: as good as dropped; nothing left: 0.
    Cost: O(nC). Bias: an example is off by ``sigmoid(-|m| / temperature)``, which falls
    with the temperature, so the surrogate falls (rises) as the temperature rises where
    all are right (wrong). Source: Nguyen & Sanner 2013; exact:
    scikit-learn's ``accuracy_score``, ``balanced_accuracy_score``.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([2.0, -1.0, 3.0]), jnp.array([1, 1, 1])
    >>> accuracy = hg.surrogates.Accuracy()
    >>> round(float(accuracy(scores, targets, temperature=0.1)), 3)
    0.667
    >>> round(float(accuracy.exact(scores, targets)), 3)
    0.667
    """

    threshold: ArrayLike = 0.0
    balanced: bool = eqx.field(static=True, default=False, kw_only=True)

    citations = ("nguyen2013",)

    def __call__(self, scores, targets, *, temperature, where=None, weights=None):
        """The smooth accuracy, a scalar."""
        examples, margins, _, _ = judged(
            scores, targets, where, weights, self.threshold
        )
        temperature = as_temperature(temperature, margins.dtype)
        return self._mean(jax.nn.sigmoid(margins / temperature), examples)

    def exact(self, scores, targets, *, where=None, weights=None):
        """The accuracy, a scalar."""
        examples, margins, correct, _ = judged(
            scores, targets, where, weights, self.threshold
        )
        return self._mean(correct.astype(margins.dtype), examples)

    def _mean(self, correct, examples):
        if not self.balanced:
            return mean(correct, examples.weights)
        shape = examples.scores.shape
        return mean(correct, _balance(examples, 2 if len(shape) == 1 else shape[1]))


class ExpectedAccuracy(eqx.Module):
    """Accuracy of a class drawn from ``softmax(scores / temperature)``.

    ``mean_i softmax(s_i / temperature)[y_i]``: every class pulls at the score, not the
    best other alone. At most `Accuracy`, and equal to it for two classes.

    Call with scores [n, C] and integer targets [n]; ``where`` and ``weights`` [n].

    Ties: shared equally; in `exact` the first of equally good classes is predicted.
    Masked out: as good as dropped; nothing left: 0. Cost: O(nC). Bias: an example is
    off by at most ``(C - 1) exp(-c / temperature)``, c the best score less the second.
    Source: Ghosh et al. 2017 (arXiv 1712.09482), whose mean absolute error is
    ``2 (1 - softmax(s)[y])``; exact: scikit-learn's ``accuracy_score``.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores = jnp.array([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]])
    >>> targets = jnp.array([0, 1])
    >>> accuracy = hg.surrogates.ExpectedAccuracy()
    >>> round(float(accuracy(scores, targets, temperature=0.1)), 3)
    0.5
    >>> float(accuracy.exact(scores, targets))
    0.5
    """

    citations = ("ghosh2017",)

    def __call__(self, scores, targets, *, temperature, where=None, weights=None):
        """The expected accuracy, a scalar."""
        scores, targets, weights, _ = multiclass(scores, targets, where, weights)
        temperature = as_temperature(temperature, scores.dtype)
        chances = jax.nn.softmax(scores / temperature, axis=1)
        return mean(own(chances, targets), weights)

    def exact(self, scores, targets, *, where=None, weights=None):
        """The accuracy, a scalar."""
        scores, targets, weights, _ = multiclass(scores, targets, where, weights)
        correct = jnp.argmax(scores, axis=1) == targets
        return mean(correct.astype(scores.dtype), weights)


class TopKAccuracy(eqx.Module):
    """How often the class is among the ``k`` best scores.

    ``mean_i sigmoid((s_i[y_i] - the k-th best score among the others) / temperature)``.

    Args:
      k: below the number of classes. Static.

    Call with scores [n, C] and integer targets [n]; ``where`` and ``weights`` [n].

    Ties: half right; `exact` orders equal scores by class, the last first, as
    scikit-learn's ``top_k_accuracy_score`` does (and unlike `Accuracy`, as
    ``argmax`` does). Masked out: as good as dropped; nothing left: 0. Cost: O(nC).
    Bias: as `Accuracy`, of this margin. Source: Lapin et al. 2016 (arXiv 1512.00486),
    for the margin.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores = jnp.array([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]])
    >>> targets = jnp.array([2, 0])
    >>> top2 = hg.surrogates.TopKAccuracy(2)
    >>> round(float(top2(scores, targets, temperature=0.1)), 3)
    0.5
    >>> float(top2.exact(scores, targets))
    0.5
    """

    k: int = eqx.field(static=True)

    citations = ("lapin2016",)

    def __check_init__(self):
        check_count("k", self.k)

    def __call__(self, scores, targets, *, temperature, where=None, weights=None):
        """The smooth top-k accuracy, a scalar."""
        scores, targets, weights, _ = self._checked(scores, targets, where, weights)
        temperature = as_temperature(temperature, scores.dtype)
        margins = own(scores, targets) - best_others(scores, targets, self.k)
        return mean(jax.nn.sigmoid(margins / temperature), weights)

    def exact(self, scores, targets, *, where=None, weights=None):
        """The top-k accuracy, a scalar."""
        scores, targets, weights, _ = self._checked(scores, targets, where, weights)
        reference = own(scores, targets)[:, None]
        later = jnp.arange(scores.shape[1])[None, :] > targets[:, None]
        ahead = (scores > reference) | ((scores == reference) & later)
        correct = jnp.sum(ahead, axis=1) < self.k
        return mean(correct.astype(scores.dtype), weights)

    def _checked(self, scores, targets, where, weights):
        examples = multiclass(scores, targets, where, weights)
        if self.k >= examples.scores.shape[1]:
            raise ValueError(
                f"k must be below the number of classes, {examples.scores.shape[1]}, "
                f"or every example is right; got {self.k}"
            )
        return examples


class SelectiveRisk(eqx.Module):
    """Error rate among the examples that are answered: lower is better.

    ``sum_i g_i e_i / sum_i g_i``: e is the error, ``sigmoid(-m / temperature)`` with
    the margin m of `Accuracy`, and g says whether the example is answered,
    ``sigmoid((c - min_confidence) / temperature)``. The confidence c is the best score
    less the second (two classes: the distance to the threshold), in the units of the
    scores. Its other half is `Coverage`.

    Args:
      min_confidence: what is below it is not answered; at least 0. Data.
      threshold: scores [n] above it mean class 1. Data; not read for scores [n, C].

    Shapes as `Accuracy`.

    Ties: as `Accuracy`; a confidence of exactly ``min_confidence`` is answered, and
    half so in the surrogate. Masked out: as good as dropped; nothing answered: 0. Cost:
    O(nC). Bias: e and g are each off by the sigmoid's tail. Source: El-Yaniv & Wiener
    2010; Geifman & El-Yaniv 2017 (arXiv 1705.08500), of deep networks.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([2.0, -0.5, 3.0, -4.0]), jnp.array([1, 1, 1, 1])
    >>> risk = hg.surrogates.SelectiveRisk(1.0)
    >>> round(float(risk(scores, targets, temperature=0.05)), 3)
    0.333
    >>> round(float(risk.exact(scores, targets)), 3)
    0.333
    """

    min_confidence: ArrayLike
    threshold: ArrayLike = 0.0

    citations = ("elyaniv2010", "geifman2017")

    def __check_init__(self):
        check_not_negative("min_confidence", self.min_confidence)

    def __call__(self, scores, targets, *, temperature, where=None, weights=None):
        """The smooth selective risk, a scalar."""
        examples, margins, _, confidences = judged(
            scores, targets, where, weights, self.threshold
        )
        temperature = as_temperature(temperature, margins.dtype)
        errors = jax.nn.sigmoid(-margins / temperature)
        return self._risk(
            errors, _answered(self, confidences, temperature), examples.weights
        )

    def exact(self, scores, targets, *, where=None, weights=None):
        """The selective risk, a scalar."""
        examples, margins, correct, confidences = judged(
            scores, targets, where, weights, self.threshold
        )
        errors = (~correct).astype(margins.dtype)
        return self._risk(errors, _answered(self, confidences), examples.weights)

    def _risk(self, errors, answered, weights):
        weighed = weights * answered
        wrong, answered = jnp.sum(weighed * errors), jnp.sum(weighed)
        return flagged(divide(wrong, answered, rounding(weights)), weights)


class Coverage(eqx.Module):
    """Share of the examples that are answered: higher is better.

    ``mean_i sigmoid((c_i - min_confidence) / temperature)``, with the confidence c of
    `SelectiveRisk`. Targets are checked and do not count.

    Args:
      min_confidence: what is below it is not answered; at least 0. Data.
      threshold: scores [n] above it mean class 1. Data; not read for scores [n, C].

    Shapes as `Accuracy`. Ties: ``min_confidence`` itself is answered, half in the
    surrogate. Masked out: as good as dropped; nothing left: 0. Cost: O(nC). Bias: the
    sigmoid's tail. Source: El-Yaniv & Wiener 2010; Geifman & El-Yaniv 2017 (arXiv
    1705.08500).

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([2.0, -0.5, 3.0, -4.0]), jnp.array([1, 1, 1, 1])
    >>> float(hg.surrogates.Coverage(1.0).exact(scores, targets))
    0.75
    """

    min_confidence: ArrayLike
    threshold: ArrayLike = 0.0

    citations = ("elyaniv2010", "geifman2017")

    def __check_init__(self):
        check_not_negative("min_confidence", self.min_confidence)

    def __call__(self, scores, targets, *, temperature, where=None, weights=None):
        """The smooth coverage, a scalar."""
        examples, _, _, confidences = judged(
            scores, targets, where, weights, self.threshold
        )
        temperature = as_temperature(temperature, confidences.dtype)
        return mean(_answered(self, confidences, temperature), examples.weights)

    def exact(self, scores, targets, *, where=None, weights=None):
        """The coverage, a scalar."""
        examples, _, _, confidences = judged(
            scores, targets, where, weights, self.threshold
        )
        return mean(_answered(self, confidences), examples.weights)


def _answered(self, confidences: Array, temperature: Array | None = None) -> Array:
    spare = confidences - jnp.asarray(self.min_confidence, confidences.dtype)
    if temperature is None:
        return (spare >= 0).astype(confidences.dtype)
    return jax.nn.sigmoid(spare / temperature)
