"""Values of a random walk from few episodes, one discount a state.

    L(V, alpha) = sum_s (r(s) + alpha(s) (P V)(s) - V(s))² / 2,

with P and r as the episodes show them, so that V* = (I - diag(alpha) P)^-1 r. The outer
loss compares V with the undiscounted returns of other episodes.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from .. import spaces
from ..inner import Newton
from ..problem import Bilevel
from .semi_gradient import SOURCE, SemiGradient
from .task import Task

NUM_STATES = 19
NOISE = 0.3


def td_loss(w: Array, frozen: Array, alpha: Array, batch: PyTree) -> Array:
    """``|r + alpha P frozen - w|² / 2``: a step of 1 is a Bellman backup."""
    return 0.5 * jnp.sum((batch["r"] + alpha * (batch["P"] @ frozen) - w) ** 2)


def bellman_error(w: Array, alpha: Array, batch: PyTree) -> Array:
    """``|r + alpha P w - w|² / 2``, a loss, with the same argmin."""
    return td_loss(w, w, alpha, batch)


TD = SemiGradient(td_loss, optax.sgd(1.0), num_steps=100)


def return_error(w: Array, alpha: Array, batch: PyTree) -> Array:
    """``sum_s d(s) (w - G)(s)² / 2`` with the mean returns G of the states seen."""
    del alpha
    return 0.5 * jnp.sum(batch["d"] * (w - batch["G"]) ** 2)


def value_error(values: Array, w: Array, alpha: Array, key: Array) -> Array:
    """Root mean square of ``w - V`` over the states."""
    del alpha, key
    return jnp.sqrt(jnp.mean((w - values) ** 2))


def exact_mrp(problem: Bilevel, alpha: Array) -> Array:
    """``dM/dalpha(s) = ((I - alpha P)^-T dM/dV)(s) (P V)(s)``; a scalar's is the sum.

    For ``V = (I - alpha P)^-1 r`` has the derivative ``(I - alpha P)^-1 e_s (P V)(s)``.
    """
    inner, outer = problem.inner_data, problem.outer_data
    discounts = jnp.broadcast_to(alpha, inner["r"].shape)
    system = jnp.eye(len(discounts)) - discounts[:, None] * inner["P"]
    values = jnp.linalg.solve(system, inner["r"])
    adjoint = jnp.linalg.solve(system.T, outer["d"] * (values - outer["G"]))
    by_state = adjoint * (inner["P"] @ values)
    return jnp.sum(by_state) if jnp.ndim(alpha) == 0 else by_state


def random_walk() -> tuple[Array, Array]:
    """``(P, r)``: left or right with equal chance, and out at either end.

    Out at the right pays 1; Sutton & Barto, example 7.1.
    """
    P = 0.5 * (jnp.eye(NUM_STATES, k=1) + jnp.eye(NUM_STATES, k=-1))
    return P, jnp.zeros(NUM_STATES).at[-1].set(0.5)


def walks(key: Array, num_episodes: int, horizon: int) -> dict[str, Array]:
    """Episodes from the middle state; ``[num_episodes, horizon]`` each.

    ``state``, the ``next`` one (-1 and NUM_STATES are outside), ``reward``, and
    ``alive``, whether the walk still goes on. Leaving an even state adds noise to the
    reward, an odd one does not: the signal and the noise of section 1.3.
    """
    step_key, noise_key = jax.random.split(key)
    moves = 2 * jax.random.bernoulli(step_key, 0.5, (num_episodes, horizon)) - 1
    place = NUM_STATES // 2 + jnp.cumsum(moves, axis=1)
    before = place - moves
    inside = (before >= 0) & (before < NUM_STATES)
    alive = jnp.cumprod(inside, axis=1)
    noise = NOISE * (before % 2 == 0) * jax.random.normal(noise_key, place.shape)
    reward = alive * ((place == NUM_STATES) + noise)
    return {"state": before, "next": place, "reward": reward, "alive": alive}


def counted(episodes: dict[str, Array]) -> dict[str, Array]:
    """What episodes show: ``P``, mean reward ``r``, mean return ``G``, visits ``d``."""
    one_hot = lambda place: jax.nn.one_hot(place, NUM_STATES)  # zero outside
    at = episodes["alive"][..., None] * one_hot(episodes["state"])
    to = one_hot(episodes["next"])
    returns = jnp.cumsum(episodes["reward"][:, ::-1], axis=1)[:, ::-1]
    visits = jnp.sum(at, axis=(0, 1))
    share = 1 / jnp.maximum(visits, 1)
    mean = lambda x: share * jnp.einsum("ets,et->s", at, x)
    return {
        "P": share[:, None] * jnp.einsum("ets,etn->sn", at, to),
        "r": mean(episodes["reward"]),
        "G": mean(returns),
        "d": visits / jnp.sum(visits),
    }


def make_mrp(key: Array, num_train: int, num_val: int, horizon: int) -> Task:
    """19 states, one discount each; the first loss is solved by Newton's method."""
    train_key, val_key = jax.random.split(key)
    train = counted(walks(train_key, num_train, horizon))
    val = counted(walks(val_key, num_val, horizon))
    part = lambda data, *names: {name: data[name] for name in names}
    problem = Bilevel(
        bellman_error, return_error, part(train, "P", "r"), part(val, "G", "d")
    )
    P, r = random_walk()
    values = jnp.linalg.solve(jnp.eye(NUM_STATES) - P, r)
    return Task(
        name="reinforcement",
        paradigm="reinforcement",
        source=SOURCE,
        problem=problem,
        solver=Newton(),
        w=jnp.zeros(NUM_STATES),
        alpha=jnp.full(NUM_STATES, 0.9),
        space=spaces.Unit(shape=(NUM_STATES,)),
        metrics={"value_error": jax.tree_util.Partial(value_error, values)},
        exact=functools.partial(exact_mrp, problem),
    )
