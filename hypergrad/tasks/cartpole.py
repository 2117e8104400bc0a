"""Discount and entropy weight of an actor-critic on CartPole.

The outer loss is minus the mean return of fresh episodes, and its derivative in ``w``
is the policy gradient. As in Xu et al. 2018, meta-gradients treat the experience of
later updates as given: its dependence on earlier ``w`` is ignored.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from .. import spaces
from ..batches import Batches
from ..problem import Bilevel
from ..trees import without_derivative
from . import mlp
from .semi_gradient import SemiGradient
from .task import Task

# Physical constants of Gymnasium's CartPole-v1.
FORCE, GRAVITY, CART_MASS, POLE_MASS = 10.0, 9.8, 1.0, 0.1
HALF_LENGTH, TIME_STEP = 0.5, 0.02
X_LIMIT, THETA_LIMIT = 2.4, 12 * 2 * np.pi / 360
CRITIC_WEIGHT, HIDDEN_SIZE = 0.5, 32


def dynamics(state: Float[Array, "*n 4"], action: Int[Array, "*n"]) -> Array:
    """Returns the next state of Gymnasium's CartPole-v1.

    One Euler step of 0.02 s, as in Barto, Sutton & Anderson 1983.

    Args:
      state: Position and velocity of the cart, angle and angular velocity of the pole.
      action: 0 pushes the cart to the left, 1 to the right.
    """
    _, x_dot, theta, theta_dot = jnp.moveaxis(state, -1, 0)
    sin, cos = jnp.sin(theta), jnp.cos(theta)
    force = jnp.where(action == 1, FORCE, -FORCE)
    total_mass = CART_MASS + POLE_MASS
    push = (force + POLE_MASS * HALF_LENGTH * theta_dot**2 * sin) / total_mass
    theta_acc = (GRAVITY * sin - cos * push) / (
        HALF_LENGTH * (4 / 3 - POLE_MASS * cos**2 / total_mass)
    )
    x_acc = push - POLE_MASS * HALF_LENGTH * theta_acc * cos / total_mass
    derivatives = jnp.stack([x_dot, x_acc, theta_dot, theta_acc], axis=-1)
    return state + TIME_STEP * derivatives


def has_fallen(state: Float[Array, "*n 4"]) -> Array:
    """Returns True if the cart left the track or the pole leans over 12 degrees."""
    return (jnp.abs(state[..., 0]) > X_LIMIT) | (jnp.abs(state[..., 2]) > THETA_LIMIT)


def log_policy(w: PyTree, state: Float[Array, "*n 4"]) -> Float[Array, "*n 2"]:
    """Returns the logarithms of the probabilities of both actions."""
    return jax.nn.log_softmax(mlp.apply(w["actor"], state))


def rollout(w: PyTree, key: Array, num_episodes: int, horizon: int) -> dict[str, Array]:
    """Simulates episodes of a policy in one scan.

    Returns:
      ``state`` ``[horizon + 1, n, 4]``, which is constant after a fall; ``action``
      ``[horizon, n]``; ``alive`` ``[horizon + 1, n]``, 1 until the pole has fallen,
      which is also the reward.
    """
    reset_key, action_key = jax.random.split(key)
    init_state = jax.random.uniform(
        reset_key, (num_episodes, 4), minval=-0.05, maxval=0.05
    )
    uniforms = jax.random.uniform(action_key, (horizon, num_episodes))

    def step(carry, uniform):
        state, alive = carry
        action = (uniform < jnp.exp(log_policy(w, state)[:, 1])).astype(int)
        next_state = jnp.where(alive[:, None], dynamics(state, action), state)
        next_alive = alive & ~has_fallen(next_state)
        return (next_state, next_alive), (state, action, alive)

    init_carry = init_state, jnp.ones(num_episodes, bool)
    final, (state, action, alive) = jax.lax.scan(step, init_carry, uniforms)
    return {
        "state": jnp.concatenate([state, final[0][None]]),
        "action": action,
        "alive": jnp.concatenate([alive, final[1][None]]).astype(init_state.dtype),
    }


def discounted_returns(
    alive: Float[Array, "T n"],
    discount: Array | float,
    final_return: Float[Array, " n"],
) -> Float[Array, "T n"]:
    """Returns ``G_t = alive_t (1 + discount G_{t+1})`` with ``G_T = final_return``."""

    def step(next_return, alive):
        current_return = alive * (1 + discount * next_return)
        return current_return, current_return

    return jax.lax.scan(step, final_return, alive, reverse=True)[1]


def action_log_probs(w: PyTree, episodes: dict[str, Array]) -> tuple[Array, Array]:
    """Returns ``log pi(a_t|s_t)`` and the entropy of the policy, each ``[T, n]``."""
    log_probs = log_policy(w, episodes["state"][:-1])
    action = episodes["action"][..., None]
    action_log_prob = jnp.take_along_axis(log_probs, action, axis=-1)[..., 0]
    return action_log_prob, -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


@dataclass(frozen=True)
class Losses:
    """Actor-critic losses on episodes that a batch, which is a PRNG key, determines.

    ``alpha`` is ``{"discount": scalar, "entropy": scalar}``.

    Args:
      num_episodes: Number of episodes per batch.
      horizon: Maximum number of steps of an episode.
    """

    num_episodes: int
    horizon: int

    def update_loss(
        self, w: PyTree, frozen: PyTree, alpha: PyTree, key: Array
    ) -> Array:
        """Returns the actor-critic loss of ``w`` on episodes of the policy ``frozen``.

        ``mean(-log pi(a|s) A - entropy H(pi) + CRITIC_WEIGHT (V(s) - G)² / 2)``

        G is ``1 - discount`` times the discounted return, with the value of ``frozen``
        as the return after the horizon. A is ``G - V_frozen(s)``, standardized.
        """
        episodes = rollout(frozen, key, self.num_episodes, self.horizon)
        alive, final_alive = episodes["alive"][:-1], episodes["alive"][-1]
        mean = lambda x: jnp.sum(alive * x) / jnp.sum(alive)
        value_fn = lambda w: mlp.apply(w["critic"], episodes["state"])[..., 0]
        discount, frozen_values = alpha["discount"], value_fn(frozen)
        final_return = final_alive * frozen_values[-1] / (1 - discount)
        G = (1 - discount) * discounted_returns(alive, discount, final_return)
        advantage = G - frozen_values[:-1]
        advantage = advantage - mean(advantage)
        advantage = advantage / jnp.sqrt(mean(advantage**2) + 1e-8)
        log_prob, entropy = action_log_probs(w, episodes)
        actor_loss = -log_prob * advantage - alpha["entropy"] * entropy
        critic_loss = 0.5 * CRITIC_WEIGHT * (value_fn(w)[:-1] - G) ** 2
        return mean(actor_loss + critic_loss)

    def inner_loss(self, w: PyTree, alpha: PyTree, key: Array) -> Array:
        """Returns `update_loss` at ``frozen = w``; its gradient in ``w`` is a step."""
        return self.update_loss(w, jax.lax.stop_gradient(w), alpha, key)

    def expected_return(self, w: PyTree, behavior: PyTree, key: Array) -> Array:
        """Estimates the return of ``w`` on episodes of the policy ``behavior``.

        The return is a fraction of the horizon. The reward of a step has the ratio of
        the two policies up to this step as its weight. At ``behavior = w`` the value is
        the mean return and its derivative in ``w`` is the policy gradient. The baseline
        of a step is the mean remaining return of the other episodes that are still
        alive, which reduces the variance.
        """
        episodes = rollout(behavior, key, self.num_episodes, self.horizon)
        alive = episodes["alive"][:-1]
        log_ratio = (
            action_log_probs(w, episodes)[0] - action_log_probs(behavior, episodes)[0]
        )
        log_ratio = alive * log_ratio
        # The product of the ratios of all earlier steps.
        prev_ratio = jnp.exp(jnp.cumsum(log_ratio, axis=0) - log_ratio)
        remaining_return = (
            discounted_returns(alive, 1.0, jnp.zeros(self.num_episodes)) - alive
        )
        sum_over_others = lambda x: jnp.sum(x, axis=1, keepdims=True) - x
        baseline = sum_over_others(remaining_return) / jnp.maximum(
            sum_over_others(alive), 1
        )
        rewards = alive * (prev_ratio + baseline * (1 - jnp.exp(log_ratio)))
        return jnp.mean(jnp.sum(rewards, axis=0)) / self.horizon

    def outer_loss(self, w: PyTree, alpha: PyTree, key: Array) -> Array:
        """Returns minus the undiscounted mean return of fresh episodes."""
        del alpha
        return -self.expected_return(w, without_derivative(w), key)

    def mean_return(self, w: PyTree, alpha: PyTree, key: Array) -> Array:
        """Returns the mean return of fresh episodes, in steps."""
        del alpha
        episodes = rollout(w, key, self.num_episodes, self.horizon)
        return jnp.mean(jnp.sum(episodes["alive"][:-1], axis=0))


@functools.cache
def cartpole_losses_and_solver(
    num_episodes: int, horizon: int, num_steps: int, step_size: float
) -> tuple[Losses, SemiGradient]:
    """Returns the losses and the solver, the same objects for equal arguments.

    Equal objects are static arguments of one compiled program.
    """
    losses = Losses(num_episodes, horizon)
    return losses, SemiGradient(losses.update_loss, optax.sgd(step_size), num_steps)


def make_cartpole(
    key: Array, num_episodes: int, horizon: int, num_steps: int, step_size: float
) -> Task:
    """Returns the task with networks of ``HIDDEN_SIZE`` units that ``key`` determines.

    Its data are PRNG keys.
    """
    losses, solver = cartpole_losses_and_solver(
        num_episodes, horizon, num_steps, step_size
    )
    actor_key, critic_key = jax.random.split(key)
    keys = Batches(None, with_key=True)
    return Task(
        paradigm="reinforcement",
        problem=Bilevel(losses.inner_loss, losses.outer_loss, keys, keys),
        solver=solver,
        w={
            "actor": mlp.init(actor_key, (4, HIDDEN_SIZE, 2)),
            "critic": mlp.init(critic_key, (4, HIDDEN_SIZE, 1)),
        },
        alpha={"discount": jnp.asarray(0.9), "entropy": jnp.asarray(0.01)},
        space={
            "discount": spaces.Interval(0.5, 0.999),
            "entropy": spaces.Interval(1e-4, 1.0, log=True),
        },
        metrics={"return": jax.tree_util.Partial(losses.mean_return)},
    )
