"""Reinforcement learning: discounts and an entropy weight by meta-gradients.

Xu, van Hasselt & Silver 2018 (arXiv 1805.09801). An update ``w + f(w, alpha, tau)``
(their equation 1) learns from experience tau; its settings alpha are moved along the
derivative of how well the updated w does on experience that follows (equation 3).

``mrp``: values of a random walk from few episodes, one discount a state,

    L(V, alpha) = sum_s (r(s) + alpha(s) (P V)(s) - V(s))² / 2,

with P and r as the episodes show them, so that V* = (I - diag(alpha) P)^-1 r. The outer
loss compares V with the undiscounted returns of other episodes.

``cartpole``: discount and entropy weight of an actor-critic. The outer loss is the mean
return of fresh episodes, and its derivative in w is the policy gradient. As in the
paper, meta-gradients take the experience of later updates for given; that it depends on
earlier w is left out.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from .. import spaces
from ..checks import as_key
from ..inner import Newton, inner_stats
from ..inner.descent import iterate
from ..inner.protocol import InnerStats
from ..problem import Batches, Bilevel, Data, draw, fraction
from ..products import Loss
from ..settings import check_steps
from . import mlp
from .task import Task, sizes_of

SOURCE = "Xu, van Hasselt & Silver 2018 (arXiv 1805.09801)"
DATA_NAME = "simulated"


class SemiGradient(eqx.Module):
    """Steps along ``d loss(w, frozen, alpha, batch)/dw`` at ``frozen = w``.

    Args:
      loss: ``(w, frozen, alpha, batch) -> scalar``; what it makes of ``frozen``, a
        target or an advantage, a step takes for constant.
      optimizer: an optax transformation.
      num_steps: T, static.

    Temporal differences and actor-critic are such updates, and the gradient of no loss.
    From step to step ``frozen`` moves with ``w`` and ``alpha``, and derivatives of the
    steps go through it, as they would not through ``jax.lax.stop_gradient``. Use
    `Unrolled`, `Forward` or `FixedPoint`: `Implicit` takes the update for a gradient.

    >>> import jax, jax.numpy as jnp, optax
    >>> loss = lambda w, frozen, alpha, batch: 0.5 * (alpha + 0.5 * frozen - w) ** 2
    >>> solver = SemiGradient(loss, optax.sgd(1.0), num_steps=30)
    >>> w, _ = solver.solve(None, jnp.array(0.0), 1.0, None, jax.random.key(0))
    >>> round(float(w), 3)
    2.0
    """

    loss: Callable[[PyTree, PyTree, PyTree, PyTree], Array] = eqx.field(static=True)
    optimizer: optax.GradientTransformation = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)

    differentiable = True

    def __check_init__(self):
        check_steps("num_steps", self.num_steps)

    def init(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, PyTree]:
        """``(w, optimizer state)``."""
        del inner_loss, alpha, data, key
        return w, self.optimizer.init(w)

    def step(
        self,
        inner_loss: Loss,
        carry: tuple[PyTree, PyTree],
        alpha: PyTree,
        data: Data,
        key: Array,
    ) -> tuple[PyTree, PyTree]:
        """One update from the batch drawn with ``key``."""
        del inner_loss
        w, state = carry
        gradient = jax.grad(self.loss)(w, w, alpha, draw(data, key))
        updates, state = self.optimizer.update(gradient, state, w)
        return optax.apply_updates(w, updates), state

    def solve(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, InnerStats]:
        """``(w_T, stats)``; same structure as ``w``."""
        w, _ = iterate(self, inner_loss, w, alpha, data, key)
        steps = self.num_steps
        return w, inner_stats(steps, num_grads=steps * fraction(data))


# The Markov reward process.

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


# CartPole.

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
    keys = Batches(None, keyed=True)
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


SCALES = {
    "mrp": {
        "small": {"num_train": 20, "num_val": 20, "horizon": 400},
        "paper": {"num_train": 200, "num_val": 200, "horizon": 1000},
    },
    "cartpole": {
        "small": {"num_episodes": 16, "horizon": 500, "num_steps": 5, "rate": 0.5},
        "paper": {"num_episodes": 256, "horizon": 500, "num_steps": 5, "rate": 0.5},
    },
}


def make(
    *,
    key: Array,
    scale: str = "small",
    data_dir: str | None = None,
    variant: str = "cartpole",
    **sizes: Any,
) -> Task:
    """A Markov reward process or CartPole; both make their own experience.

    CartPole asks for `Unrolled` or `Forward`: its update is the gradient of no loss,
    and what `Implicit` takes for the Hessian is indefinite. Its hypergradients are not
    trusted, and zero where `CG` stops at once, as at the start: ``adjoint_residual`` 1.

    Args:
      key: of the episodes (``mrp``), or of the networks (``cartpole``).
      scale: 'small', at which `hypergrad run reinforcement` makes its table, or
        'paper'.
      data_dir: not read.
      variant: 'mrp' or 'cartpole'.
      sizes: in place of the scale's, as `SCALES` names them.

    Raises:
      ValueError: another scale or variant.
      TypeError: a size that `SCALES` does not name.
    """
    del data_dir
    if variant not in SCALES:
        raise ValueError(f"variant must be one of {sorted(SCALES)}; got {variant!r}")
    if scale not in SCALES[variant]:
        raise ValueError(f"scale must be 'small' or 'paper'; got {scale!r}")
    build = {"mrp": make_mrp, "cartpole": make_cartpole}[variant]
    chosen = sizes_of("reinforcement", SCALES[variant][scale], sizes)
    return build(as_key(key), **chosen)
