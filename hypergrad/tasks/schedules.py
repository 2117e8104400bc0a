"""Learning rates and momenta of a whole training run, shared by windows of steps.

Maclaurin et al. 2015 (arXiv 1502.03492) learn one rate per step; Micaelli & Storkey
2021 (arXiv 2007.07869) one rate per window of thousands of steps. The inner problem is
a run of T mini-batch steps of momentum descent on the cross-entropy of a network,

    v <- m_t v + g_t,   w <- w - r_t v,

with piecewise constant rates ``r`` and momenta ``m``. The outer loss is the
cross-entropy on a validation set at the end of the run. The run need not converge: the
hypergradient is the derivative of the procedure, in reverse, forward or reversible
mode.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, PyTree

from .. import spaces
from ..batches import Batches
from ..estimators import Reversible
from ..inner import Descent, piecewise_constant_schedule
from ..problem import Bilevel
from ..validation import as_key
from .classifier import (
    bind_score_fn,
    load_data,
    make_metrics,
    make_score_fn,
    mask_held_out,
    split,
    val_loss,
)
from .networks import MLP, split_module
from .task import Task, check_booleans, check_choice, check_counts

NUM_WINDOWS = 5
SMALL, PAPER = (600, 400, 797), (10_000, 10_000, 10_000)
RATES, MOMENTA = (1e-3, 1.0), (0.1, 0.99)  # bounds of the hyperparameters
INIT_RATE, INIT_MOMENTUM = 0.05, 0.5


@functools.cache
def momentum_descent(
    num_steps: int,
) -> Callable[[PyTree], optax.GradientTransformation]:
    """Returns ``alpha -> optimizer``, momentum descent with the schedule ``alpha``."""

    def make_optimizer(alpha: PyTree) -> optax.GradientTransformation:
        momentum = optax.inject_hyperparams(optax.trace)(
            decay=piecewise_constant_schedule(alpha["momentum"], num_steps)
        )
        rate: Any = piecewise_constant_schedule(alpha["rate"], num_steps)
        return optax.chain(momentum, optax.scale_by_learning_rate(rate))

    return make_optimizer


@functools.cache
def reversible_estimator(num_steps: int) -> Reversible:
    """Returns the estimator that reverses the steps of `momentum_descent` exactly."""
    return Reversible(
        lambda alpha: piecewise_constant_schedule(alpha["rate"], num_steps),
        lambda alpha: piecewise_constant_schedule(alpha["momentum"], num_steps),
        num_steps,
        min_momentum=MOMENTA[0],
    )


class HypergradientDescentState(NamedTuple):
    """State of `hypergradient_descent`.

    Attributes:
      rate: Learning rate of the previous step.
      v: Velocity, structured like the parameters.
    """

    rate: Float[Array, ""]
    v: PyTree


def hypergradient_descent(
    rate: float | Array, momentum: float | Array, step_size: float | Array
) -> optax.GradientTransformation:
    """Returns momentum descent whose rate follows its one-step hypergradient.

    The loss after a step, ``f(w - r v)``, has the derivative ``-g' v`` with respect to
    the rate, where ``g`` is the next gradient. The next step therefore uses

        r <- r (1 + step_size g' v / (||g|| ||v||)).

    Args:
      rate: Initial learning rate.
      momentum: Momentum of the descent.
      step_size: Step size of the rate.

    Source: Baydin et al. 2018 (arXiv 1703.04782), the multiplicative rule.
    """

    def init(params: PyTree) -> HypergradientDescentState:
        zero_velocity = optax.tree.zeros_like(params)
        return HypergradientDescentState(jnp.asarray(rate, float), zero_velocity)

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> PyTree:
        del params
        norms = optax.tree.norm(updates) * optax.tree.norm(state.v)
        cosine = optax.tree.vdot(updates, state.v) / jnp.where(norms > 0, norms, 1)
        # r <- r (1 + step_size g' v / (||g|| ||v||)); v = 0 before the first step.
        new_rate = state.rate * (1 + step_size * cosine)
        new_v = jax.tree.map(lambda v, g: momentum * v + g, state.v, updates)
        new_state = HypergradientDescentState(new_rate, new_v)
        return jax.tree.map(lambda v: -new_rate * v, new_v), new_state

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
    """Returns a network on digits whose learning rates and momenta are learned.

    Args:
      key: PRNG key of the split and of the initial network. The key of an estimate
        determines the order of its batches.
      scale: 'small' for scikit-learn's digits and a network 64-32-10 in batches of 32,
        or 'paper' for MNIST and a network 784-50-50-50-10 in batches of 200.
      data_dir: Folder that contains MNIST, see `hypergrad.datasets.load`.
      num_steps: Number T of inner steps, a static value.
      num_windows: Number of windows of equal length, each with one rate and one
        momentum. ``num_windows=num_steps`` learns a rate and a momentum per step.
      hold_out: Whether the last third of the validation examples is excluded from the
        outer loss, for choosing settings. Unless it is traced, their metrics are
        ``held_out_accuracy`` and ``held_out_loss``.
      data: ``{"x": [n, features], "y": [n]}`` with classes 0 to 9. Defaults to the
        digits or MNIST.

    Raises:
      TypeError: ``hold_out`` or an array of ``data`` has another type.
      ValueError: ``scale`` is unknown, ``num_steps`` or ``num_windows`` is not a
        positive integer, ``num_windows`` exceeds ``num_steps``, or ``data`` has another
        shape, too few examples or other labels.
    """
    key = as_key(key)
    check_choice("scale", scale, ("small", "paper"))
    check_booleans(hold_out=hold_out)
    check_counts(num_steps=num_steps, num_windows=num_windows)
    if num_windows > num_steps:
        raise ValueError(
            f"num_windows must be in 1..num_steps = {num_steps}; got {num_windows}. "
            "Each window needs at least one step."
        )
    is_small = scale == "small"
    data_name, sizes = ("digits", SMALL) if is_small else ("mnist", PAPER)
    num_needed = sizes[0] + sizes[1] + 1
    data = load_data(data, data_name, num_needed, data_dir=data_dir)
    split_key, init_key = jax.random.split(key)
    splits = split(data, split_key, sizes)
    val = mask_held_out(splits["val"], hold_out)
    hidden_sizes = (32,) if is_small else (50, 50, 50)
    module = MLP((data["x"].shape[1], *hidden_sizes, 10), nnx.Rngs(init_key))
    graph, w = split_module(module)
    score_fn = make_score_fn(graph)
    loss = bind_score_fn(val_loss, score_fn)
    shape = (num_windows,)
    return Task(
        paradigm="supervised",
        problem=Bilevel(
            loss,
            loss,
            Batches(splits["train"], 32 if is_small else 200),
            val,
        ),
        solver=Descent(momentum_descent(num_steps), num_steps),
        w=w,
        alpha={
            "rate": jnp.full(shape, INIT_RATE),
            "momentum": jnp.full(shape, INIT_MOMENTUM),
        },
        space={
            "rate": spaces.Interval(*RATES, log=True, shape=shape),
            "momentum": spaces.Interval(*MOMENTA, shape=shape),
        },
        metrics=make_metrics(score_fn, splits["test"], val, hold_out),
    )
