"""Area under the ROC curve, over all false-positive rates or the lowest."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from .base import (
    Examples,
    as_temperature,
    binary,
    check_count,
    check_setting,
    divide,
    flagged,
)


class AUC(eqx.Module):
    """Area under the ROC curve, with a sigmoid for each pair of opposite classes.

    ``mean_i sum_j v_j sigmoid((s_i - s_j) / temperature)`` over positives i, negatives
    j. ``v_j`` is the negative's share of the false-positive rates 0 to ``max_fpr``:
    1 / negatives for the highest of them, 0 for the others. Which they are is found by
    sorting, and no derivative goes through that: none is missing, since where two
    negatives change places their terms are equal.

    Args:
      max_fpr: in (0, 1]; the partial area, not standardised, is at most this. Data.
      block_size: pairs are taken in square blocks of this side. Static.

    Call with scores [n] and targets [n] in {0, 1}; ``where`` and ``weights`` [n].

    Ties: a tied pair counts half, in `exact` as well, where a group of ties that
    ``max_fpr`` cuts counts by the straight line through it, as in scikit-learn. Masked
    out: as good as dropped; no pair: 0. Cost: a sigmoid a pair, which the gradient
    computes again instead of keeping it; memory O(n + block_size²). `exact`:
    O(n log n). Bias: a pair is off by ``sigmoid(-|s_i - s_j| / temperature)``, so the
    surrogate falls as the temperature rises where the classes are separated. Source:
    Herschtal & Raskutti 2004; partial: Narasimhan & Agarwal 2013. Exact: scikit-learn's
    ``roc_auc_score`` before McClish's (1989) standardisation.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([2.0, -1.0, 3.0, 1.0]), jnp.array([1, 1, 1, 0])
    >>> auc = hg.surrogates.AUC()
    >>> round(float(auc(scores, targets, temperature=0.1)), 3)
    0.667
    >>> round(float(auc.exact(scores, targets)), 3)
    0.667
    """

    max_fpr: ArrayLike = 1.0
    block_size: int = eqx.field(static=True, default=512, kw_only=True)

    citations = ("herschtal2004", "narasimhan2013")

    def __check_init__(self):
        check_setting("max_fpr", self.max_fpr, 0, 1)
        check_count("block_size", self.block_size)

    def __call__(self, scores, targets, *, temperature, where=None, weights=None):
        """The smooth area, a scalar."""
        examples = binary(scores, targets, where, weights)
        temperature = as_temperature(temperature, examples.scores.dtype)
        # Positives, then negatives from the highest, then what is masked out.
        group = jnp.where(examples.mask, 1 - examples.targets, 2)
        order = jnp.lexsort((-jax.lax.stop_gradient(examples.scores), group))
        examples = jax.tree.map(lambda leaf: leaf[order], examples)
        positives, negatives = _shares(examples)
        before = jnp.cumsum(negatives) - negatives
        max_fpr = jnp.asarray(self.max_fpr, before.dtype)
        negatives = jnp.clip(max_fpr - before, 0, negatives)
        side = min(self.block_size, len(order))
        u = examples.scores / temperature
        area = _pairs(u, positives, negatives, group[order], side)
        return flagged(area, examples.scores)

    def exact(self, scores, targets, *, where=None, weights=None):
        """The area, a scalar."""
        examples = binary(scores, targets, where, weights)
        scores = jnp.where(examples.mask, examples.scores, -jnp.inf)
        order = jnp.argsort(-scores)
        ends = jnp.append(scores[order][1:] != scores[order][:-1], True)
        # Both rates at each threshold; within a group of ties, those before it.
        rates = jnp.stack([share[order] for share in _shares(examples)])
        rates = jax.lax.cummax(jnp.where(ends, jnp.cumsum(rates, axis=1), 0), axis=1)
        tpr, fpr = rates
        tpr_before, fpr_before = jnp.pad(rates, ((0, 0), (1, 0)))[:, :-1]
        step = fpr - fpr_before
        max_fpr = jnp.asarray(self.max_fpr, fpr.dtype)
        width = jnp.clip(max_fpr - fpr_before, 0, step)
        slope = (tpr - tpr_before) / jnp.where(step > 0, step, 1)
        area = jnp.sum(width * (tpr_before + 0.5 * slope * width))
        return flagged(area, examples.weights)


class SquaredHingeAUC(eqx.Module):
    """A lower bound on the area under the ROC curve: squared hinges of pairs.

    ``1 - mean_ij max(0, 1 - (s_i - s_j) / temperature)²`` over positives i, negatives
    j: higher is better, and at any temperature the AUC is at least this. Concave in the
    scores. The temperature is the margin that a pair should keep; as it falls the bound
    loosens and does not tend to the metric: a wrong pair counts by its distance.

    Call with scores [n] and targets [n] in {0, 1}; ``where`` and ``weights`` [n].

    Ties: a tied pair counts 1 in the mean, half in `exact`. Masked out: as good as
    dropped; no pair: 0. Cost: O(n log n), memory O(n), gradient included. Source: Rust
    & Hocking 2023 (arXiv 2302.11062): their sorted sums, here about a moving centre, so
    that all terms are positive and none cancel.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([2.0, -1.0, 3.0, 1.0]), jnp.array([1, 1, 1, 0])
    >>> bound = hg.surrogates.SquaredHingeAUC()
    >>> round(float(bound(scores, targets, temperature=1.0)), 3)
    -2.0
    >>> round(float(bound.exact(scores, targets)), 3)
    0.667
    """

    citations = ("rust2023",)

    def __call__(self, scores, targets, *, temperature, where=None, weights=None):
        """The lower bound, a scalar."""
        examples = binary(scores, targets, where, weights)
        positives, negatives = _shares(examples)
        temperature = as_temperature(temperature, positives.dtype)
        # The hinge of a pair is max(0, u_j - u_i): sums over the negatives above i.
        u = examples.scores / temperature - examples.targets
        order = jnp.argsort(-u)
        u, above = u[order], negatives[order]
        # Moments 0 to 2 of the negatives from the highest, about each u in turn.
        step = u[:-1] - u[1:]
        grown = lambda growth: jnp.cumsum(jnp.pad(growth, (1, 0)))
        mass = jnp.cumsum(above)[:-1]
        first = grown(step * mass)[:-1]
        second = grown(step * (2 * first + step * mass))
        pairs = jnp.sum(positives) * jnp.sum(negatives)  # 1, or 0 where there is none
        return flagged(pairs - jnp.sum(positives[order] * second), examples.scores)

    def exact(self, scores, targets, *, where=None, weights=None):
        """The area, a scalar."""
        return AUC().exact(scores, targets, where=where, weights=weights)


def _shares(examples: Examples) -> tuple[Array, Array]:
    """Weights of the positives and of the negatives, each with a sum of 1 (or 0)."""
    _, targets, weights, _ = examples
    share = lambda part: divide(part, jnp.sum(part))
    return share(weights * targets), share(weights * (1 - targets))


def _pairs(u: Array, rows: Array, columns: Array, group: Array, side: int) -> Array:
    """``sum_ij rows_i columns_j sigmoid(u_i - u_j)``, block by block, O(n) memory.

    A block is skipped unless its rows hold positives (group 0) and its columns
    negatives (1).
    """
    blocks = -(-len(u) // side)

    def padded(x, fill=0):
        x = jnp.pad(x, (0, blocks * side - len(x)), constant_values=fill)
        return x.reshape(blocks, side)

    u, group = padded(u), padded(group, 2)
    of_rows = u, padded(rows), jnp.any(group == 0, axis=1)
    of_columns = u, padded(columns), jnp.any(group == 1, axis=1)

    def one_block(row, column):
        (u, mass, positive), (v, mass_, negative) = row, column

        def won():
            wins = jax.nn.sigmoid(u[:, None] - v[None, :])
            return jnp.sum(mass[:, None] * mass_[None, :] * wins)

        nothing = jnp.zeros((), u.dtype)
        return jax.lax.cond(positive & negative, won, lambda: nothing)

    kept_small = functools.partial(jax.checkpoint, prevent_cse=False)
    one_block = kept_small(one_block)

    def one_row(row):
        add = lambda total, column: (total + one_block(row, column), None)
        return jax.lax.scan(add, jnp.zeros((), u.dtype), of_columns)[0]

    return jnp.sum(jax.lax.map(kept_small(one_row), of_rows))
