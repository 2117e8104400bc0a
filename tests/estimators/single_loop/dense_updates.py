"""The published updates of the single-loop methods, written in dense matrices.

An update is a function of the state, ``alpha`` and the samples that a step uses. It
returns the direction of ``alpha``, the reported ``w`` and the next state, in which the
number of steps is still the old one.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import hypergrad as hg
from hypergrad.estimators.single_loop import SingleLoopState
from hypergrad.estimators.single_loop.variance_reduction import (
    InnerParts,
    OuterParts,
    Point,
)
from tests.estimators.single_loop.problems import (
    ALPHA,
    OTHER_ALPHA,
    OTHER_V,
    OTHER_W,
    TRAIN,
    VAL,
    V,
    W,
    inner_loss,
    outer_loss,
)

ETA = 0.2  # step size of series and of descent
# Rates fall from step to step, so that a stale optimizer state shows.
W_SGD = optax.sgd(lambda count: 0.5 / (1 + count))
V_SGD = optax.sgd(lambda count: 0.4 / (1 + 0.5 * count))
MOMENTUM = lambda step: 1 - 1 / (step + 2.0)
PENALTY = lambda step: 5.0 * (1 + step)


# Derivatives as dense matrices.


def inner_grad(w, alpha, batch):
    return jax.grad(inner_loss)(w, alpha, batch)


def alpha_grad(w, alpha, batch):
    return jax.grad(inner_loss, argnums=1)(w, alpha, batch)


def hessian(w, alpha, batch):
    return jax.hessian(inner_loss)(w, alpha, batch)


def cross(w, v, alpha, batch):
    """Returns ``J' v``."""
    return jax.jacfwd(jax.grad(inner_loss), argnums=1)(w, alpha, batch).T @ v


def outer_grads(w, alpha, batch):
    return jax.grad(outer_loss, argnums=(0, 1))(w, alpha, batch)


def move_w(state, direction):
    updates, opt_state = W_SGD.update(direction, state.w_opt_state)
    return replace(state, w=state.w + updates, w_opt_state=opt_state)


def move_v(state, direction):
    updates, opt_state = V_SGD.update(direction, state.v_opt_state)
    return replace(state, v=state.v + updates, v_opt_state=opt_state)


def descend(state, alpha, batches):
    for batch in batches:
        state = move_w(state, inner_grad(state.w, alpha, batch))
    return state


def series(w, alpha, b, batches):
    """Returns ``eta sum_k prod_{i <= k} (I - eta H_i) b``."""
    term = total = b
    for batch in batches:
        term = term - ETA * hessian(w, alpha, batch) @ term
        total = total + term
    return ETA * total


def random_term(w, alpha, b, batches, p):
    """Returns ``K eta prod_{i <= p} (I - eta H_i) b``."""
    term = b
    for k, batch in enumerate(batches):
        term = jnp.where(k < p, term - ETA * hessian(w, alpha, batch) @ term, term)
    return (len(batches) + 1) * ETA * term


# The updates.


def soba(state, alpha, batch, outer_batch):
    b, direct = outer_grads(state.w, alpha, outer_batch)
    direction = direct - cross(state.w, state.v, alpha, batch)
    v_direction = hessian(state.w, alpha, batch) @ state.v - b
    moved = move_w(state, inner_grad(state.w, alpha, batch))
    return direction, state.w, move_v(moved, v_direction)


def srba(state, alpha, batch, outer_batch):
    """Period 3."""

    def parts(point, batch, outer_batch):
        w, v, alpha = point.w, point.v, point.alpha
        Hv = hessian(w, alpha, batch) @ v
        inner = InnerParts(inner_grad(w, alpha, batch), Hv, cross(w, v, alpha, batch))
        return inner, OuterParts(*outer_grads(w, alpha, outer_batch))

    previous, previous_point = state.memory
    point = Point(state.w, state.v, alpha)
    new, old = (parts(p, batch, outer_batch) for p in (point, previous_point))
    recursive = jax.tree.map(lambda d, x, y: d + x - y, previous, new, old)
    is_full_pass = state.num_steps % 3 == 0
    estimate = optax.tree.where(is_full_pass, parts(point, TRAIN, VAL), recursive)
    inner, outer = estimate
    moved = move_v(move_w(state, inner.grad), inner.Hv - outer.b)
    moved = replace(moved, memory=(estimate, point))
    return outer.direct - inner.cross, state.w, moved


def fsla(state, alpha, w_batch, b_batch, v_batch, direct_batch, cross_batch):
    previous, previous_point = state.memory
    state = move_w(state, inner_grad(state.w, alpha, w_batch))
    b, _ = outer_grads(state.w, alpha, b_batch)
    state = move_v(state, hessian(state.w, alpha, v_batch) @ state.v - b)

    def evaluate(p):
        _, direct = outer_grads(p.w, p.alpha, direct_batch)
        return direct - cross(p.w, p.v, p.alpha, cross_batch)

    point = Point(state.w, state.v, alpha)
    momentum = jnp.where(state.num_steps == 0, 0, MOMENTUM(state.num_steps))
    direction = evaluate(point) + momentum * (previous - evaluate(previous_point))
    return direction, state.w, replace(state, memory=(direction, point))


def stocbio(state, alpha, batches, outer_batch, product_batches, cross_batch):
    state = descend(state, alpha, batches)
    b, direct = outer_grads(state.w, alpha, outer_batch)
    v = series(state.w, alpha, b, product_batches)
    return direct - cross(state.w, v, alpha, cross_batch), state.w, state


def ttsa(state, alpha, batch, outer_batch, product_batches, cross_batch, p):
    state = descend(state, alpha, [batch])
    b, direct = outer_grads(state.w, alpha, outer_batch)
    v = random_term(state.w, alpha, b, product_batches, p)
    return direct - cross(state.w, v, alpha, cross_batch), state.w, state


def amigo(state, alpha, batches, outer_batch, product_batches, cross_batch):
    state = descend(state, alpha, batches)
    b, direct = outer_grads(state.w, alpha, outer_batch)
    for batch in product_batches:
        state = move_v(state, hessian(state.w, alpha, batch) @ state.v - b)
    return direct - cross(state.w, state.v, alpha, cross_batch), state.w, state


def storm(state, alpha, batch, outer_batch, momentum, adjoint_fn):
    """Returns the next directions of ``w`` and ``alpha``, and the next memory."""

    def directions(w, alpha):
        b, direct = outer_grads(w, alpha, outer_batch)
        v = adjoint_fn(w, alpha, b)
        return inner_grad(w, alpha, batch), direct - cross(w, v, alpha, batch)

    (previous, previous_point), point = state.memory, (state.w, alpha)
    new, old = directions(*point), directions(*previous_point)
    estimate = jax.tree.map(lambda x, y, d: x + momentum * (d - y), new, old, previous)
    return estimate, (estimate, point)


def storm_step(state, alpha, batch, outer_batch, momentum, adjoint_fn):
    momentum = jnp.where(state.num_steps == 0, 0, momentum)
    estimate, memory = storm(state, alpha, batch, outer_batch, momentum, adjoint_fn)
    next_state = replace(move_w(state, estimate[0]), memory=memory)
    return estimate[1], state.w, next_state


def mrbo(state, alpha, batch, outer_batch, product_batches):
    adjoint_fn = functools.partial(series, batches=product_batches)
    momentum = MOMENTUM(state.num_steps)
    return storm_step(state, alpha, batch, outer_batch, momentum, adjoint_fn)


def sustain(state, alpha, batch, outer_batch, product_batches, p):
    adjoint_fn = functools.partial(random_term, batches=product_batches, p=p)
    return storm_step(state, alpha, batch, outer_batch, 0.9, adjoint_fn)


def vrbo(state, alpha, samples):
    """Period 2; a sample of an inner step is an inner, an outer and a product batch."""
    moved = state
    for batch, outer_batch, product_batch in samples:
        adjoint_fn = functools.partial(series, batches=[product_batch])
        estimate, memory = storm(moved, alpha, batch, outer_batch, 1.0, adjoint_fn)
        moved = replace(move_w(moved, estimate[0]), memory=memory)
    state = optax.tree.where(state.num_steps > 0, moved, state)

    adjoint_fn = functools.partial(series, batches=[TRAIN])
    _, all_data = storm(state, alpha, TRAIN, VAL, 0.0, adjoint_fn)
    memory = optax.tree.where(state.num_steps % 2 == 0, all_data, state.memory)
    (_, direction), _ = memory
    return direction, state.w, replace(state, memory=memory)


def f2sa(state, alpha, samples, y_batch, z_batch, outer_batch):
    penalty = PENALTY(state.num_steps)
    y, z = state, state.memory
    for y_step_batch, z_step_batch, b_batch in samples:
        b, _ = outer_grads(y.w, alpha, b_batch)
        y = move_w(y, inner_grad(y.w, alpha, y_step_batch) + b / penalty)
        z = move_w(z, inner_grad(z.w, alpha, z_step_batch))
    _, direct = outer_grads(y.w, alpha, outer_batch)
    difference = alpha_grad(y.w, alpha, y_batch) - alpha_grad(z.w, alpha, z_batch)
    return direct + penalty * difference, y.w, replace(y, memory=z)


def bome(state, alpha, batch, outer_batch):
    """Two steps of descent and ``eta = 1/2``."""
    w = w_m = state.w
    for _ in range(2):
        w_m = w_m - ETA * inner_grad(w_m, alpha, batch)
    alpha_part = alpha_grad(w, alpha, batch) - alpha_grad(w_m, alpha, batch)
    q = jnp.concatenate([inner_grad(w, alpha, batch), alpha_part])
    M = jnp.concatenate(outer_grads(w, alpha, outer_batch))
    direction = M + jnp.maximum(0.5 - M @ q / (q @ q), 0) * q
    return direction[3:], w, move_w(state, direction[:3])


def darts(state, alpha, w_batch, outer_batch, batch):
    _, w, state = first_order_darts(state, alpha, w_batch, outer_batch)
    b, direct = outer_grads(w - ETA * inner_grad(w, alpha, batch), alpha, outer_batch)
    shift = 0.01 * b / jnp.linalg.norm(b)
    plus, minus = (alpha_grad(w + x, alpha, batch) for x in (shift, -shift))
    difference = jnp.linalg.norm(b) * (plus - minus) / 0.02
    return direct - ETA * difference, w, state


def first_order_darts(state, alpha, w_batch, outer_batch):
    moved = descend(state, alpha, [w_batch])
    state = optax.tree.where(state.num_steps > 0, moved, state)
    _, direct = outer_grads(state.w, alpha, outer_batch)
    return direct, state.w, state


def pzobo_update(state, alpha, batches, outer_batch, vectors):
    moved = descend(state, alpha, batches)
    b, direction = outer_grads(moved.w, alpha, outer_batch)
    for u in vectors:
        shifted = descend(state, alpha + 0.5 * u, batches)
        indirect = (shifted.w - moved.w) @ b / 0.5 * u
        direction = direction + indirect / len(vectors)
    return direction, moved.w, moved


# The cases.


class Case(NamedTuple):
    """A method, its update, the kinds of samples, and a memory after a step."""

    method: Any
    update: Callable
    samples: tuple
    memory: Any = None


#: Kinds of samples: an inner and an outer example, a random vector of alpha, and the
#: random length of a series of three terms.
CORNERS = jnp.array(list(itertools.product([-1.0, 1.0], repeat=3)))
POOLS = {"i": TRAIN, "o": VAL, "u": CORNERS, "p": jnp.arange(3)}
OTHER_POINT = Point(OTHER_W, OTHER_V, OTHER_ALPHA)
STORM = (V, OTHER_V), (OTHER_W, OTHER_ALPHA)
SPIDER = (InnerParts(OTHER_V, W, OTHER_ALPHA), OuterParts(V, 2 * ALPHA)), OTHER_POINT
Z = SingleLoopState(OTHER_W, W_SGD.init(OTHER_W))
CASES = {
    "SOBA": Case(hg.SOBA(W_SGD, V_SGD), soba, ("i", "o")),
    "SRBA": Case(hg.SRBA(W_SGD, 3, V_SGD), srba, ("i", "o"), SPIDER),
    "FSLA": Case(
        hg.FSLA(W_SGD, V_SGD, momentum=MOMENTUM),
        fsla,
        ("i", "o", "i", "o", "i"),
        (V, OTHER_POINT),
    ),
    "StocBiO": Case(
        hg.StocBiO(W_SGD, 2, 3, step_size=ETA), stocbio, ([*"ii"], "o", [*"ii"], "i")
    ),
    "AmIGO": Case(hg.AmIGO(W_SGD, 2, 2, V_SGD), amigo, ([*"ii"], "o", [*"ii"], "i")),
    "TTSA": Case(hg.TTSA(W_SGD, 3, step_size=ETA), ttsa, ("i", "o", [*"ii"], "i", "p")),
    "MRBO": Case(
        hg.MRBO(W_SGD, 3, step_size=ETA, momentum=MOMENTUM),
        mrbo,
        ("i", "o", [*"ii"]),
        STORM,
    ),
    "SUSTAIN": Case(
        hg.SUSTAIN(W_SGD, 3, step_size=ETA), sustain, ("i", "o", [*"ii"], "p"), STORM
    ),
    "VRBO": Case(
        hg.VRBO(W_SGD, 2, 2, period=2, step_size=ETA),
        vrbo,
        ([[*"ioi"], [*"ioi"]],),
        STORM,
    ),
    "F2SA": Case(
        hg.F2SA(W_SGD, 1, penalty=PENALTY),
        f2sa,
        ([[*"iio"]], "i", "i", "o"),
        Z,
    ),
    "BOME": Case(hg.BOME(W_SGD, 2, step_size=ETA), bome, ("i", "o")),
    "DARTS": Case(hg.DARTS(W_SGD, step_size=ETA), darts, ("i", "o", "i")),
    "DARTS, first order": Case(hg.DARTS(W_SGD), first_order_darts, ("i", "o")),
    "PZOBO": Case(
        hg.PZOBO(W_SGD, 2, 1, sigma=0.5), pzobo_update, ([*"ii"], "o", ["u"])
    ),
}
#: Cases with too many combinations of samples for an enumeration.
LONG_CASES = {
    "F2SA, two steps": Case(
        hg.F2SA(W_SGD, 2, penalty=PENALTY),
        f2sa,
        ([[*"iio"], [*"iio"]], "i", "i", "o"),
    ),
    "PZOBO, two vectors": Case(
        hg.PZOBO(W_SGD, 2, 2, sigma=0.5), pzobo_update, ([*"ii"], "o", [*"uu"])
    ),
}
