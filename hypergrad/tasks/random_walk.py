"""State values of a random walk from few episodes, with one discount per state.

    L(V, alpha) = sum_s (r(s) + alpha(s) (P V)(s) - V(s))² / 2,

where P and r are the empirical transition matrix and rewards of the episodes, so that
V* = (I - diag(alpha) P)^-1 r. The outer loss compares V with the undiscounted returns
of other episodes.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from .. import spaces
from ..inner import Newton
from ..problem import Bilevel
from .semi_gradient import SemiGradient
from .task import Task

NUM_STATES = 19
NOISE = 0.3


def td_loss(w: Array, frozen: Array, alpha: Array, batch: PyTree) -> Array:
    """Returns ``|r + alpha P frozen - w|² / 2``.

    A gradient step of size 1 in ``w`` is a Bellman backup.
    """
    return 0.5 * jnp.sum((batch["r"] + alpha * (batch["P"] @ frozen) - w) ** 2)


def bellman_error(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Returns ``|r + alpha P w - w|² / 2``, whose argmin is the fixed point of TD."""
    return td_loss(w, w, alpha, batch)


TD = SemiGradient(td_loss, optax.sgd(1.0), num_steps=100)


def return_error(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Returns ``sum_s d(s) (w - G)(s)² / 2`` with the mean returns G of the states."""
    del alpha
    return 0.5 * jnp.sum(batch["d"] * (w - batch["G"]) ** 2)


def value_error(true_values: Array, w: Array, alpha: Array, key: Array) -> Array:
    """Returns the root mean square of ``w - V`` over the states."""
    del alpha, key
    return jnp.sqrt(jnp.mean((w - true_values) ** 2))


def exact_hypergradient(problem: Bilevel, alpha: Array) -> Array:
    """Returns ``dM/dalpha(s) = ((I - alpha P)^-T dM/dV)(s) (P V)(s)``.

    The derivative of ``V = (I - alpha P)^-1 r`` in the discount of state s is
    ``(I - alpha P)^-1 e_s (P V)(s)``. The derivative in a discount that all states
    share is the sum over the states.

    Args:
      problem: Problem of `make_mrp`.
      alpha: Discounts of shape ``[19]``, or one scalar.
    """
    inner, outer = problem.inner_data, problem.outer_data
    discounts = jnp.broadcast_to(alpha, inner["r"].shape)
    system = jnp.eye(len(discounts)) - discounts[:, None] * inner["P"]
    values = jnp.linalg.solve(system, inner["r"])
    adjoint = jnp.linalg.solve(system.T, outer["d"] * (values - outer["G"]))
    per_state = adjoint * (inner["P"] @ values)
    return jnp.sum(per_state) if jnp.ndim(alpha) == 0 else per_state


def true_model() -> tuple[Float[Array, "19 19"], Float[Array, " 19"]]:
    """Returns the transition matrix P and the rewards r of the walk.

    A step goes left or right with equal probability. The walk ends outside of the
    states; the end on the right pays 1. In Sutton & Barto, example
    7.1, the end on the left pays -1 besides.
    """
    P = 0.5 * (jnp.eye(NUM_STATES, k=1) + jnp.eye(NUM_STATES, k=-1))
    return P, jnp.zeros(NUM_STATES).at[-1].set(0.5)


def simulate_walks(key: Array, num_episodes: int, horizon: int) -> dict[str, Array]:
    """Simulates episodes that start in the middle state.

    A step from an even state adds noise to the reward and a step from an odd state does
    not: the signal and the noise of section 1.3 of Xu et al. 2018.

    Returns:
      Arrays of shape ``[num_episodes, horizon]``: ``state``; ``next_state``, in which
      -1 and NUM_STATES are outside; ``reward``; ``alive``, 1 until the walk ends.
    """
    step_key, noise_key = jax.random.split(key)
    steps = 2 * jax.random.bernoulli(step_key, 0.5, (num_episodes, horizon)) - 1
    next_state = NUM_STATES // 2 + jnp.cumsum(steps, axis=1)
    state = next_state - steps
    is_inside = (state >= 0) & (state < NUM_STATES)
    alive = jnp.cumprod(is_inside, axis=1)
    normals = jax.random.normal(noise_key, next_state.shape)
    noise = NOISE * (state % 2 == 0) * normals
    reward = alive * ((next_state == NUM_STATES) + noise)
    return {"state": state, "next_state": next_state, "reward": reward, "alive": alive}


def empirical_model(episodes: dict[str, Array]) -> dict[str, Array]:
    """Returns frequencies and means of episodes, per state.

    Returns:
      ``P``, transition frequencies ``[19, 19]``; ``r``, mean rewards; ``G``, mean
      undiscounted returns up to the horizon, which cuts off a walk that is still
      inside; ``d``, fractions of the visits.
    """
    one_hot = lambda state: jax.nn.one_hot(state, NUM_STATES)  # Zero outside.
    state = episodes["alive"][..., None] * one_hot(episodes["state"])
    next_state = one_hot(episodes["next_state"])
    returns = jnp.cumsum(episodes["reward"][:, ::-1], axis=1)[:, ::-1]
    visits = jnp.sum(state, axis=(0, 1))
    scale = 1 / jnp.maximum(visits, 1)
    mean = lambda x: scale * jnp.einsum("ets,et->s", state, x)
    return {
        "P": scale[:, None] * jnp.einsum("ets,etn->sn", state, next_state),
        "r": mean(episodes["reward"]),
        "G": mean(returns),
        "d": visits / jnp.sum(visits),
    }


def make_mrp(key: Array, num_train: int, num_val: int, horizon: int) -> Task:
    """Returns the Markov reward process with 19 states and one discount per state.

    Its solver is Newton's method on `bellman_error`.
    """
    train_key, val_key = jax.random.split(key)
    train = empirical_model(simulate_walks(train_key, num_train, horizon))
    val = empirical_model(simulate_walks(val_key, num_val, horizon))
    problem = Bilevel(
        bellman_error,
        return_error,
        {"P": train["P"], "r": train["r"]},
        {"G": val["G"], "d": val["d"]},
    )
    P, r = true_model()
    true_values = jnp.linalg.solve(jnp.eye(NUM_STATES) - P, r)
    return Task(
        paradigm="reinforcement",
        problem=problem,
        solver=Newton(),
        w=jnp.zeros(NUM_STATES),
        alpha=jnp.full(NUM_STATES, 0.9),
        space=spaces.Unit(shape=(NUM_STATES,)),
        metrics={"value_error": jax.tree_util.Partial(value_error, true_values)},
        exact=jax.tree_util.Partial(exact_hypergradient, problem),
    )
