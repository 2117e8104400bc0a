"""A policy over choices that learns by the score function."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PyTree

from .. import spaces
from ..validation import float_converter


class Reinforce(eqx.Module):
    """One softmax an axis, moved up where a value is below a moving average.

    The value expected of the policy ``p(alpha) = prod_i softmax(logits_i)[alpha_i]``
    has the gradient ``E[(value - baseline) grad log p(alpha)]``, whatever the baseline;
    each trial takes one step against its term. The baseline is an exponential average
    of the values so far, which keeps the variance low. A trial that failed counts as
    the worst value so far.

    Args:
      step_size: of the logits, per unit of the value: scale it to the values' spread.
      decay: of the baseline, between 0 and 1.

    Raises:
      ValueError: at `init`, a continuous space, or an unbounded one.

    Budget: 20 trials with step size 3, until the best of 12 choices has been tried (see
    `hypergrad.searchers`); the policy takes longer to prefer it.

    Cost: a draw. Bias: none in the gradient; the policy may settle on a choice that is
    not the best. Source: Williams 1992; Zoph & Le 2017, arXiv:1611.01578, for
    architectures.

    >>> import jax, hypergrad as hg
    >>> searcher, key = hg.searchers.Reinforce(step_size=1.0), jax.random.key(0)
    >>> state = searcher.init({"op": hg.spaces.Choice(3)}, key)
    >>> for key in jax.random.split(key, 100):
    ...     alpha, state = searcher.ask(state, key)
    ...     state = searcher.tell(state, alpha, abs(alpha["op"] - 1.0))
    >>> (logits,) = state["logits"]
    >>> int(logits.argmax())
    1
    """

    step_size: ArrayLike = eqx.field(
        default=1.0, converter=float_converter("step_size")
    )
    decay: ArrayLike = eqx.field(default=0.9, converter=float_converter("decay"))

    citations = ("williams1992", "zoph2017")

    def init(self, space: PyTree, key: Array) -> dict[str, Any]:
        """The uniform policy, and no baseline yet."""
        del key
        axes = spaces.axes(space)
        if any(axis.num_values is None for axis in axes):
            raise ValueError(
                "Reinforce needs Choice or Integer spaces alone; use hg.searchers.TPE()"
            )
        logits = [jnp.zeros(axis.num_values) for axis in axes]
        nothing = jnp.array(jnp.nan)
        return {
            "space": space, "logits": logits, "baseline": nothing, "worst": nothing,
        }  # fmt: skip

    def ask(self, state: dict[str, Any], key: Array) -> tuple[PyTree, dict[str, Any]]:
        """A draw from the policy; the state is as it was."""
        logits = state["logits"]
        keys = jax.random.split(key, len(logits))
        cells = [
            (int(jax.random.categorical(key, x)) + 0.5) / len(x)
            for key, x in zip(keys, logits, strict=True)
        ]
        return spaces.from_unit(state["space"], np.array(cells)), state

    def tell(self, state: dict[str, Any], alpha: PyTree, value: Array) -> dict:
        """A step against the gradient's term, then the baseline."""
        value = jnp.where(jnp.isfinite(value), value, state["worst"])
        baseline = jnp.where(jnp.isnan(state["baseline"]), value, state["baseline"])
        excess = jnp.nan_to_num(value - baseline)  # 0 if all so far have failed
        t = spaces.to_unit(state["space"], alpha)
        logits = []
        for x, cell in zip(state["logits"], t, strict=True):
            chosen = jax.nn.one_hot((cell * len(x)).astype(int), len(x), dtype=x.dtype)
            score = chosen - jax.nn.softmax(x)  # grad log softmax(x)[chosen]
            logits.append(x - self.step_size * excess * score)
        return {
            "space": state["space"],
            "logits": logits,
            "baseline": self.decay * baseline + (1 - self.decay) * value,
            "worst": jnp.fmax(state["worst"], value),
        }
