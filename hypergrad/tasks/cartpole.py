"""Discount and entropy weight of an actor-critic on CartPole.

The outer loss is the mean return of fresh episodes, and its derivative in w is the
policy gradient. As in Xu et al. 2018, meta-gradients take the experience of later
updates for given; that it depends on earlier w is left out.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from .. import spaces
from ..problem import Batches, Bilevel
from . import mlp
from .semi_gradient import SOURCE, SemiGradient
from .task import Task

FORCE, GRAVITY, CART, POLE, HALF_LENGTH, TAU = 10.0, 9.8, 1.0, 0.1, 0.5, 0.02
X_LIMIT, THETA_LIMIT = 2.4, 12 * 2 * np.pi / 360
CRITIC_WEIGHT, HIDDEN = 0.5, 32


def dynamics(state: Array, action: Array) -> Array:
    """Gymnasium's CartPole-v1: an Euler step of 0.02 s; ``state`` is ``[..., 4]``.

    Barto, Sutton & Anderson 1983: place and speed of the cart, angle and angular speed
    of the pole; ``action`` is 0 (push left) or 1 (push right).
    """
    _, x_dot, theta, theta_dot = jnp.moveaxis(state, -1, 0)
    sin, cos = jnp.sin(theta), jnp.cos(theta)
    force = jnp.where(action == 1, FORCE, -FORCE)
    total = CART + POLE
    push = (force + POLE * HALF_LENGTH * theta_dot**2 * sin) / total
    theta_acc = (GRAVITY * sin - cos * push) / (
        HALF_LENGTH * (4 / 3 - POLE * cos**2 / total)
    )
    x_acc = push - POLE * HALF_LENGTH * theta_acc * cos / total
    speeds = jnp.stack([x_dot, x_acc, theta_dot, theta_acc], axis=-1)
    return state + TAU * speeds


def fallen(state: Array) -> Array:
    """Off the track, or the pole beyond 12 degrees."""
    return (jnp.abs(state[..., 0]) > X_LIMIT) | (jnp.abs(state[..., 2]) > THETA_LIMIT)


def log_policy(w: PyTree, state: Array) -> Array:
    """Logarithms of both actions' probabilities, ``[..., 2]``."""
    return jax.nn.log_softmax(mlp.apply(w["actor"], state))


def rollout(w: PyTree, key: Array, num_episodes: int, horizon: int) -> dict[str, Array]:
    """Episodes of a policy as one scan.

    ``state`` ``[horizon + 1, n, 4]``; ``action`` ``[horizon, n]``; ``alive``
    ``[horizon + 1, n]``, 1 until the pole has fallen, which is also the reward. A
    fallen pole stays where it is.
    """
    reset_key, action_key = jax.random.split(key)
    first = jax.random.uniform(reset_key, (num_episodes, 4), minval=-0.05, maxval=0.05)
    chance = jax.random.uniform(action_key, (horizon, num_episodes))

    def step(carry, chance):
        state, alive = carry
        action = (chance < jnp.exp(log_policy(w, state)[:, 1])).astype(int)
        after = jnp.where(alive[:, None], dynamics(state, action), state)
        return (after, alive & ~fallen(after)), (state, action, alive)

    begin = first, jnp.ones(num_episodes, bool)
    last, (state, action, alive) = jax.lax.scan(step, begin, chance)
    return {
        "state": jnp.concatenate([state, last[0][None]]),
        "action": action,
        "alive": jnp.concatenate([alive, last[1][None]]).astype(first.dtype),
    }


def returns(alive: Array, discount: Array | float, last: Array) -> Array:
    """``G_t = alive_t (1 + discount G_{t+1})`` from ``G_T = last``; ``[T, n]``."""

    def step(after, alive):
        here = alive * (1 + discount * after)
        return here, here

    return jax.lax.scan(step, last, alive, reverse=True)[1]


def log_taken(w: PyTree, episodes: dict[str, Array]) -> tuple[Array, Array]:
    """Log-probability of the actions taken, and the policy's entropy; ``[T, n]``."""
    log = log_policy(w, episodes["state"][:-1])
    taken = jnp.take_along_axis(log, episodes["action"][..., None], axis=-1)[..., 0]
    return taken, -jnp.sum(jnp.exp(log) * log, axis=-1)


@dataclass(frozen=True)
class Losses:
    """Actor-critic on ``num_episodes`` of at most ``horizon`` steps; a batch is a key.

    ``alpha`` is ``{"discount", "entropy"}``.
    """

    num_episodes: int
    horizon: int

    def update(self, w: PyTree, frozen: PyTree, alpha: PyTree, key: Array) -> Array:
        """What a step of learning descends, on episodes under ``frozen``.

        ``mean(-log pi(a|s) A - entropy H(pi) + CRITIC_WEIGHT (V(s) - G)² / 2)``

        G is the discounted return times ``1 - discount``, beyond the horizon as V says;
        A is ``G - V_frozen(s)`` with mean 0 and standard deviation 1.
        """
        episodes = rollout(frozen, key, self.num_episodes, self.horizon)
        alive, last = episodes["alive"][:-1], episodes["alive"][-1]
        mean = lambda x: jnp.sum(alive * x) / jnp.sum(alive)
        values = lambda w: mlp.apply(w["critic"], episodes["state"])[..., 0]
        discount, seen = alpha["discount"], values(frozen)
        G = (1 - discount) * returns(alive, discount, last * seen[-1] / (1 - discount))
        advantage = G - seen[:-1]
        advantage = advantage - mean(advantage)
        advantage = advantage / jnp.sqrt(mean(advantage**2) + 1e-8)
        taken, entropy = log_taken(w, episodes)
        policy = -taken * advantage - alpha["entropy"] * entropy
        return mean(policy + 0.5 * CRITIC_WEIGHT * (values(w)[:-1] - G) ** 2)

    def inner(self, w: PyTree, alpha: PyTree, key: Array) -> Array:
        """`update` at ``frozen = w``; its gradient is the step's."""
        return self.update(w, jax.lax.stop_gradient(w), alpha, key)

    def expected_return(self, w: PyTree, behaviour: PyTree, key: Array) -> Array:
        """The return of ``w`` as a share of the horizon, from ``behaviour``'s episodes.

        A step's reward counts by the ratio of both policies up to it. At ``behaviour =
        w`` the value is the mean return and the derivative in ``w`` the policy
        gradient, less noisy by what the other episodes that still run are paid after
        that step, on average.
        """
        episodes = rollout(behaviour, key, self.num_episodes, self.horizon)
        alive = episodes["alive"][:-1]
        log_ratio = log_taken(w, episodes)[0] - log_taken(behaviour, episodes)[0]
        log_ratio = alive * log_ratio
        before = jnp.exp(jnp.cumsum(log_ratio, axis=0) - log_ratio)
        after = returns(alive, 1.0, jnp.zeros(self.num_episodes)) - alive
        others = lambda x: jnp.sum(x, axis=1, keepdims=True) - x
        baseline = others(after) / jnp.maximum(others(alive), 1)
        paid = alive * (before + baseline * (1 - jnp.exp(log_ratio)))
        return jnp.mean(jnp.sum(paid, axis=0)) / self.horizon

    def outer(self, w: PyTree, alpha: PyTree, key: Array) -> Array:
        """Minus the mean return of fresh episodes, undiscounted."""
        del alpha
        return -self.expected_return(w, jax.lax.stop_gradient(w), key)

    def mean_return(self, w: PyTree, alpha: PyTree, key: Array) -> Array:
        """Mean return of fresh episodes, in steps."""
        del alpha
        episodes = rollout(w, key, self.num_episodes, self.horizon)
        return jnp.mean(jnp.sum(episodes["alive"][:-1], axis=0))


@functools.cache
def cartpole_parts(
    num_episodes: int, horizon: int, num_steps: int, rate: float
) -> tuple[Losses, SemiGradient]:
    """Losses and solver of these sizes, the same objects each time: one program."""
    losses = Losses(num_episodes, horizon)
    return losses, SemiGradient(losses.update, optax.sgd(rate), num_steps)


def make_cartpole(
    key: Array, num_episodes: int, horizon: int, num_steps: int, rate: float
) -> Task:
    """Networks of ``HIDDEN`` units; a key is all the data that a batch needs."""
    losses, solver = cartpole_parts(num_episodes, horizon, num_steps, rate)
    actor_key, critic_key = jax.random.split(key)
    keys = Batches(None, with_key=True)
    return Task(
        name="reinforcement",
        paradigm="reinforcement",
        source=SOURCE,
        problem=Bilevel(losses.inner, losses.outer, keys, keys),
        solver=solver,
        w={
            "actor": mlp.init(actor_key, (4, HIDDEN, 2)),
            "critic": mlp.init(critic_key, (4, HIDDEN, 1)),
        },
        alpha={"discount": jnp.asarray(0.9), "entropy": jnp.asarray(0.01)},
        space={
            "discount": spaces.Interval(0.5, 0.999),
            "entropy": spaces.Interval(1e-4, 1.0, log=True),
        },
        metrics={"return": losses.mean_return},
    )
