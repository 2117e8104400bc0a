"""The penalty method of Mehra & Hamm for the importances of training examples.

The steps are those of `optimizers/penalty/bilevel_penalty_aug_lag.py` and of
`applications/data_denoising/mnist_experiments/small_scale` in hammlab/bilevel-penalty.
An importance is ``(tanh(u) + 1) / 2``. With the weighted mean ``g`` of the training
losses and the mean ``f`` of the validation losses,

    h(w, u) = f(w) + nu . g_w + rho ||g_w||^2 / 2,    g_w = dg/dw,

the model ``w`` descends ``h + lam g`` and ``u`` descends ``h``, on batches. Where both
gradients are small, `update_penalty` makes the penalty stronger.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from hypergrad.extend import cost_stats
from hypergrad.tasks import classifier
from hypergrad.tasks.networks import softmax_regression

from .noisy_mnist import BATCH, Data, mean_loss, predict, train_model
from .poisoning_methods import DECAY, GROWTH

NUM_EPOCHS, NUM_STEPS, NUM_PRETRAINING_EPOCHS = 100, 20, 100
W_OPTIMIZER, U_OPTIMIZER = optax.adam(1e-4), optax.adam(3.0)
RHO, LAM, EPS, NU = 1e-2, 1e-2, 1e-2, 1e-4
AGREEING, DISAGREEING = 0.6, 0.4  # first importances
MEAN, SMALLEST = 0.5, 1e-5  # of the importances after an epoch


class PenaltyState(NamedTuple):
    """Model, optimizer states and numbers of the penalty.

    Attributes:
      w: The model.
      w_opt_state, u_opt_state: States of the two optimizers. As in the authors' code
        that of ``u`` belongs to the places of a batch, not to its examples.
      nu: Multipliers of ``dg/dw = 0``, shaped like ``w``.
      rho, lam, eps: Strength of the penalty, weight of ``g``, tolerance.
      rate: Factor of both rates.
    """

    w: PyTree
    w_opt_state: PyTree
    u_opt_state: PyTree
    nu: PyTree
    rho: Array
    lam: Array
    eps: Array
    rate: Array


def init_state(w: PyTree, batch_size: int = BATCH) -> PenaltyState:
    """Returns the state before the first step."""
    numbers = (jnp.float32(x) for x in (RHO, LAM, EPS, 1.0))
    nu = jax.tree.map(lambda x: jnp.full_like(x, NU), w)
    u_opt_state = U_OPTIMIZER.init(jnp.zeros(batch_size))
    return PenaltyState(w, W_OPTIMIZER.init(w), u_opt_state, nu, *numbers)


def importances_of(u: Array) -> Array:
    """Returns the importances, between 0 and 1."""
    return 0.5 * (jnp.tanh(u) + 1)


def weighted_loss(w: PyTree, u: Array, batch: Data) -> Array:
    """Returns g, the mean of the losses weighted by importances."""
    losses = classifier.losses(softmax_regression, w, batch)
    return classifier.weighted_mean(losses, importances_of(u))


def penalized_losses(
    w: PyTree, u: Array, state: PenaltyState, batch: Data, val_batch: Data
) -> tuple[Array, Array]:
    """Returns ``h``, which ``u`` descends, and ``h + lam g``, which ``w`` descends."""
    g, g_w = jax.value_and_grad(weighted_loss)(w, u, batch)
    h = mean_loss(w, val_batch) + optax.tree.vdot(state.nu, g_w)
    h += state.rho / 2 * optax.tree.norm(g_w, squared=True)
    return h, h + state.lam * g


def step(
    state: PenaltyState, u: Float[Array, " batch"], batch: Data, val_batch: Data
) -> tuple[PenaltyState, Float[Array, " batch"]]:
    """Makes 20 steps of the model and one of ``u``, and updates the penalty."""

    def upper(u: Array, w: PyTree) -> Array:
        return penalized_losses(w, u, state, batch, val_batch)[0]

    def lower(w: PyTree, u: Array) -> Array:
        return penalized_losses(w, u, state, batch, val_batch)[1]

    def move(optimizer, opt_state, x, grads):
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.tree.add_scale(x, state.rate, updates), opt_state

    def descend(_: int, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        w, opt_state = carry
        return move(W_OPTIMIZER, opt_state, w, jax.grad(lower)(w, u))

    w, w_opt_state = jax.lax.fori_loop(
        0, NUM_STEPS, descend, (state.w, state.w_opt_state)
    )
    u, u_opt_state = move(U_OPTIMIZER, state.u_opt_state, u, jax.grad(upper)(u, w))
    state = state._replace(w=w, w_opt_state=w_opt_state, u_opt_state=u_opt_state)
    norms = (
        optax.tree.norm(jax.grad(upper)(u, w), squared=True),
        optax.tree.norm(jax.grad(lower)(w, u), squared=True),
    )
    has_converged = norms[0] ** 2 + norms[1] ** 2 < state.eps**2
    g_w = jax.grad(weighted_loss)(w, u, batch)
    return update_penalty(state, has_converged, g_w), u


def update_penalty(
    state: PenaltyState, has_converged: Array, g_w: PyTree
) -> PenaltyState:
    """Returns the state with new numbers if both gradients are small."""
    growth = jnp.where(has_converged, GROWTH, 1.0)
    decay = jnp.where(has_converged, DECAY, 1.0)
    rho = growth * state.rho
    # The authors' program has the new rho before it moves nu.
    nu = optax.tree.add_scale(state.nu, jnp.where(has_converged, rho, 0.0), g_w)
    return state._replace(
        nu=nu,
        rho=rho,
        lam=decay * state.lam,
        eps=decay * state.eps,
        rate=decay * state.rate,
    )


def normalize(u: Array) -> Array:
    """Returns ``u`` of importances with mean 1/2, clipped away from 0 and 1."""
    importances = importances_of(u)
    importances = MEAN * importances / jnp.mean(importances)
    importances = jnp.clip(importances, SMALLEST, 1 - SMALLEST)
    return jnp.arctanh(2 * importances - 1)


@jax.jit
def learn_importances(
    train: Data, val: Data, key: Array
) -> tuple[PyTree, Float[Array, " n"]]:
    """Returns the model and the importances after 100 epochs of the method.

    The model is trained on the validation examples first, and the importances start
    higher where its class is the label.
    """
    pretraining_key, key = jax.random.split(key)
    everything = jnp.ones(len(val["y"]), bool)
    w = train_model(val, everything, pretraining_key, NUM_PRETRAINING_EPOCHS)
    agrees = predict(w, train["x"]) == train["y"]
    u = jnp.arctanh(2 * jnp.where(agrees, AGREEING, DISAGREEING) - 1)
    num_train, num_val = len(train["y"]), len(val["y"])
    rows = lambda data, index: {name: data[name][index] for name in ("x", "y")}

    def run_batch(carry: PyTree, inputs: PyTree) -> tuple[PyTree, None]:
        state, u = carry
        index, key = inputs
        val_index = jax.random.choice(key, num_val, (BATCH,), replace=False)
        batches = rows(train, index), rows(val, val_index)
        state, new = step(state, u[index], *batches)
        return (state, u.at[index].set(new)), None

    def run_epoch(carry: PyTree, key: Array) -> tuple[PyTree, None]:
        order_key, key = jax.random.split(key)
        order = jax.random.permutation(order_key, num_train)
        num_batches = num_train // BATCH
        batches = order[: num_batches * BATCH].reshape(num_batches, BATCH)
        keys = jax.random.split(key, num_batches)
        (state, u), _ = jax.lax.scan(run_batch, carry, (batches, keys))
        return (state, normalize(u)), None

    keys = jax.random.split(key, NUM_EPOCHS)
    (state, u), _ = jax.lax.scan(run_epoch, (init_state(w), u), keys)
    return state.w, importances_of(u)


def count_calls(train: Data, val: Data) -> dict[str, Array]:
    """Returns the calls of a run in passes over the data, and their cost.

    In a step, ``h + lam g`` is differentiated 21 times (20 steps of the model and once
    for the tolerance), each time by a gradient and a product of ``g`` and a gradient of
    ``f``; ``h`` twice in ``u``, without ``f``; and ``g`` once for the multipliers.
    """
    num_train, num_val = len(train["y"]), len(val["y"])
    num_lower, num_upper = NUM_STEPS + 1, 2
    num_steps = NUM_EPOCHS * (num_train // BATCH)
    passes, val_passes = (num_steps * BATCH / n for n in (num_train, num_val))
    return cost_stats(
        train,
        val,
        num_grads=passes * (num_lower + num_upper + 1),
        num_hvps=passes * (num_lower + num_upper),
        num_outer_grads=val_passes * num_lower + NUM_PRETRAINING_EPOCHS,
    )
