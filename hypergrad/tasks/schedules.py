"""Learning rates and momenta of a whole training run, shared by windows of steps.

Maclaurin et al. 2015 (arXiv 1502.03492) learn a rate a step; Micaelli & Storkey 2021
(arXiv 2007.07869) one a window of thousands. The inner problem is a run of T mini-batch
steps of momentum descent on a network's cross-entropy,

    v <- m_t v + g_t,   w <- w - r_t v,

with rates ``r`` and momenta ``m`` in the windows of the run, and the outer loss is the
cross-entropy on a validation set at its end. Nothing converges: the derivative is that
of the procedure, in reverse, forward or reversible mode.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, PyTree

from .. import datasets as datasets
from .. import spaces
from ..estimators import Reversible
from ..inner import Descent, piecewise_constant_schedule
from ..problem import Batches, Bilevel
from ..validation import as_key
from .classifier import (
    accuracy,
    bound,
    check_data,
    held_out,
    loss_on,
    scorer,
    split,
    val_loss,
)
from .networks import MLP, parameters
from .task import Task

NUM_WINDOWS = 5
SMALL, PAPER = (600, 400, 797), (10_000, 10_000, 10_000)
RATES, MOMENTA = (1e-3, 1.0), (0.1, 0.99)
RATE, MOMENTUM = 0.05, 0.5  # where alpha starts


@functools.cache
def momentum_descent(
    num_steps: int,
) -> Callable[[PyTree], optax.GradientTransformation]:
    """``alpha -> optimizer``: the rates and momenta of ``alpha`` over the run."""

    def optimizer(alpha):
        momentum = optax.inject_hyperparams(optax.trace)(
            decay=piecewise_constant_schedule(alpha["momentum"], num_steps)
        )
        rate: Any = piecewise_constant_schedule(alpha["rate"], num_steps)
        return optax.chain(momentum, optax.scale_by_learning_rate(rate))

    return optimizer


@functools.cache
def reversible(num_steps: int) -> Reversible:
    """The estimator that runs the same steps back, bit for bit."""
    return Reversible(
        lambda alpha: piecewise_constant_schedule(alpha["rate"], num_steps),
        lambda alpha: piecewise_constant_schedule(alpha["momentum"], num_steps),
        num_steps,
        min_momentum=MOMENTA[0],
    )


class Greedy(NamedTuple):
    """State of `hypergradient_descent`."""

    rate: Array
    v: PyTree


def hypergradient_descent(
    rate: float | Array, momentum: float | Array, step_size: float | Array
) -> optax.GradientTransformation:
    """Momentum descent whose rate follows its one-step hypergradient, the greedy one.

    The loss after a step, ``f(w - r v)``, has the derivative ``-g'ᵀ v`` in the rate,
    where ``g'`` is the next gradient; so at the next step

        r <- r (1 + step_size  g'ᵀ v / (||g'|| ||v||)).

    Source: Baydin et al. 2018 (arXiv 1703.04782), the multiplicative rule.
    """

    def init(params: PyTree) -> Greedy:
        return Greedy(jnp.asarray(rate, float), optax.tree.zeros_like(params))

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> PyTree:
        del params
        norms = optax.tree.norm(updates) * optax.tree.norm(state.v)
        cosine = optax.tree.vdot(updates, state.v) / jnp.where(norms > 0, norms, 1)
        r = state.rate * (1 + step_size * cosine)
        v = jax.tree.map(lambda v, g: momentum * v + g, state.v, updates)
        return jax.tree.map(lambda v: -r * v, v), Greedy(r, v)

    return optax.GradientTransformation(init, update)


def make(
    *,
    key: Array,
    scale: str = "small",
    data_dir: str | None = None,
    num_steps: int = 1000,
    num_windows: int = NUM_WINDOWS,
    hold_out: Array | bool = False,
    data: PyTree = None,
) -> Task:
    """A schedule of rates and momenta for a network on digits.

    Args:
      key: of the split and the network's start; an estimate's key is the order of its
        batches.
      scale: 'small' for scikit-learn's digits and a network 64-32-10 in batches of 32,
        'paper' for MNIST and 784-50-50-50-10 in batches of 200.
      data_dir: where MNIST is, see `hypergrad.data.load`.
      num_steps: T of the run, static.
      num_windows: W; W of ``num_steps`` is one rate and one momentum a step.
      hold_out: keep a third of validation out of the outer loss, to choose by.
      data: ``{"x": [n, features], "y": [n]}`` in place of the digits, classes 0 to 9.

    Raises:
      TypeError: data of another kind.
      ValueError: another scale, more windows than steps, data of another shape, too
        few, or with other labels.
    """
    key = as_key(key)
    if scale not in ("small", "paper"):
        raise ValueError(f"schedules has scale 'small' and 'paper'; got {scale!r}")
    if not 1 <= num_windows <= num_steps:
        raise ValueError(
            f"num_windows must be in 1..num_steps, {num_steps}; got {num_windows}"
        )
    small = scale == "small"
    if data is None:
        data = datasets.load("digits" if small else "mnist", data_dir)
    sizes = SMALL if small else PAPER
    check_data(data, sizes[0] + sizes[1] + 1)
    data = jax.tree.map(jnp.asarray, data)
    split_key, start_key = jax.random.split(key)
    parts = split(data, split_key, sizes)
    hidden = (32,) if small else (50, 50, 50)
    module = MLP((data["x"].shape[1], *hidden, 10), nnx.Rngs(start_key))
    graph, w = parameters(module)
    score = scorer(graph)
    loss, measured = bound(val_loss, score), parts["test"]
    shape = (num_windows,)
    return Task(
        name="schedules",
        paradigm="supervised",
        source="Maclaurin et al. 2015 (arXiv 1502.03492); Micaelli & Storkey 2021",
        problem=Bilevel(
            loss,
            loss,
            Batches(parts["train"], 32 if small else 200),
            held_out(parts["val"], hold_out),
        ),
        solver=Descent(momentum_descent(num_steps), num_steps),
        w=w,
        alpha={"rate": jnp.full(shape, RATE), "momentum": jnp.full(shape, MOMENTUM)},
        space={
            "rate": spaces.Interval(*RATES, log=True, shape=shape),
            "momentum": spaces.Interval(*MOMENTA, shape=shape),
        },
        metrics={
            "test_accuracy": jax.tree_util.Partial(bound(accuracy, score), measured),
            "test_loss": jax.tree_util.Partial(bound(loss_on, score), measured),
        },
    )
