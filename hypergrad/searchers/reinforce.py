"""A policy over choices that learns by the score function."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PyTree

from .. import spaces
from ..number_checks import in_unit_interval, positive


class ReinforceState(NamedTuple):
    """The state of `Reinforce`.

    Attributes:
      space: The space that is searched.
      logits: Logits of the policy, an array per axis.
      baseline: Moving average of the values; NaN before the first.
      worst: Largest value so far; NaN before the first.
      pending_logits: Logits with which the proposals that have no value yet were
        sampled, an array ``[proposals, num_values]`` per axis.
    """

    space: PyTree
    logits: list[Array]
    baseline: ArrayLike
    worst: Array
    pending_logits: list[np.ndarray]


class Reinforce(eqx.Module):
    """Learns a softmax policy per axis by stochastic gradient descent.

    The expected value of the policy ``p(alpha) = prod_i softmax(logits_i)[alpha_i]``
    has the gradient ``E[(value - baseline) grad log p(alpha)]`` for any baseline, and
    each trial makes one step along its sample of the negative gradient, at the policy
    that proposed it. The baseline is an exponential moving average of the values, which
    reduces the variance. A failed trial counts as the worst value so far.

    Args:
      step_size: Step size of the logits per unit of the value; scale it to the spread
        of the values.
      decay: Decay of the baseline, between 0 and 1.

    Raises:
      ValueError: ``step_size`` is not above 0, or ``decay`` is not in [0, 1]. In
        `init`: the space is continuous or unbounded.

    Budget: 10 trials with step size 3 to try the best of 12 choices (see
      `hypergrad.searchers`); the policy takes longer to prefer it.
    Cost: one sample per proposal.
    Bias: none in the gradient, which in a batch of trials is that of the policy before
      the batch. The policy may converge to a choice that is not the best.

    Source: Williams 1992; Zoph & Le 2017, arXiv:1611.01578, for architectures.

    >>> import jax, hypergrad as hg
    >>> searcher, key = hg.searchers.Reinforce(step_size=1.0), jax.random.key(0)
    >>> state = searcher.init({"op": hg.spaces.Choice(3)}, key)
    >>> for key in jax.random.split(key, 100):
    ...     alpha, state = searcher.ask(state, key)
    ...     state = searcher.tell(state, alpha, abs(alpha["op"] - 1.0))
    >>> (logits,) = state.logits
    >>> int(logits.argmax())
    1
    """

    step_size: ArrayLike = eqx.field(default=1.0, converter=positive("step_size"))
    decay: ArrayLike = eqx.field(default=0.9, converter=in_unit_interval("decay"))

    citations = ("williams1992", "zoph2017")

    def init(self, space: PyTree, key: Array) -> ReinforceState:
        """Returns the uniform policy, without a baseline."""
        del key
        axes = spaces.axes(space)
        if any(axis.num_values is None for axis in axes):
            raise ValueError(
                "space must consist of Choice and Integer for Reinforce; got a "
                "continuous axis. Use hg.searchers.TPE()."
            )
        logits = [jnp.zeros(axis.num_values) for axis in axes]
        pending_logits = [np.zeros((0, leaf.size), leaf.dtype) for leaf in logits]
        unknown = jnp.array(jnp.nan)
        return ReinforceState(space, logits, unknown, unknown, pending_logits)

    def ask(self, state: ReinforceState, key: Array) -> tuple[PyTree, ReinforceState]:
        """Returns a sample of the policy, and the state with its logits as pending."""
        keys = jax.random.split(key, len(state.logits))
        t = [
            (int(jax.random.categorical(key, logits)) + 0.5) / len(logits)
            for key, logits in zip(keys, state.logits, strict=True)
        ]
        pending_logits = [
            np.concatenate([pending, np.asarray(logits)[None]])
            for pending, logits in zip(state.pending_logits, state.logits, strict=True)
        ]
        alpha = spaces.from_unit(state.space, np.array(t))
        return alpha, state._replace(pending_logits=pending_logits)

    def tell(
        self, state: ReinforceState, alpha: PyTree, value: Array
    ) -> ReinforceState:
        """Returns the state after a gradient step and an update of the baseline.

        Values are told in the order of the proposals. If none is pending, ``alpha``
        counts as a sample of the present policy.
        """
        value = jnp.where(jnp.isfinite(value), value, state.worst)
        baseline = jnp.where(jnp.isnan(state.baseline), value, state.baseline)
        advantage = jnp.nan_to_num(value - baseline)  # 0 if all trials have failed
        t = spaces.to_unit(state.space, alpha)
        new_logits = []
        for logits, pending, position in zip(
            state.logits, state.pending_logits, t, strict=True
        ):
            n = len(logits)
            chosen = jax.nn.one_hot((position * n).astype(int), n, dtype=logits.dtype)
            sampled_logits = jnp.asarray(pending[0]) if len(pending) else logits
            # grad log softmax(logits)[chosen] = chosen - softmax(logits)
            score = chosen - jax.nn.softmax(sampled_logits)
            new_logits.append(logits - self.step_size * advantage * score)
        return ReinforceState(
            space=state.space,
            logits=new_logits,
            baseline=self.decay * baseline + (1 - self.decay) * value,
            worst=jnp.fmax(state.worst, value),
            pending_logits=[pending[1:] for pending in state.pending_logits],
        )
