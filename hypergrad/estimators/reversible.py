"""Momentum descent run backwards, bit for bit, from an information buffer."""

import math
import operator
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ..checks import check_problem, check_seen, reads, start_reads_alpha
from ..cost import ledger
from ..problem import Bilevel, draw, fraction, held, size, whole
from ..products import hvp_and_cross
from ..settings import check_steps
from ..trees import add_scaled, all_finite, dot, norm, scale
from .procedure import ProcedureState, drawn
from .protocol import Estimate, make_stats

Setting = float | Callable[[PyTree], Any]

DENOMINATORS = (4096, 256)  # of the momentum as a fraction: float64, float32
WORD = 256  # what is moved from a buffer to its stack at a time
FULL = 2**19  # when: a buffer times a denominator must fit 32 bits


class Reversible(eqx.Module):
    """``dM(w_T(alpha), alpha)/dalpha`` for ``v <- m v + g``, ``w <- w - r v``.

    ``w`` and ``v`` are fixed-point integers, and what a multiplication by ``m < 1``
    loses of ``v`` goes into a buffer of ``log2(1 / m)`` bits a step, so that each step
    can be undone exactly and no trajectory is stored. Both directions run through one
    gradient in one loop, so that it cannot round in two ways.

    Args:
      learning_rate: ``r``, or ``alpha -> r``, each a number or an optax schedule.
      momentum: ``m`` in [1/16, 1), likewise; it is rounded to 1/4096, in float32 to
        1/256.
      num_steps: T.
      least_momentum: smallest ``m`` that a function or a schedule takes, which decides
        the buffer's size; not needed where ``momentum`` is a number.
      warm_start: begin each run where the last ended; None means True unless rate or
        momentum are made from ``alpha``.
      outer_batch_size: examples for the outer gradient, drawn once an estimate; None
        means all.

    Cost: 2 T inner gradients and T Hessian-vector products with their cross term.
    Memory: six vectors like ``w`` and the buffer, ``log2(1 / m)`` bits a number and
    step: 0.15 at 0.9.

    Target: solver, up to a resolution: steps are rounded to 2^-46 and velocities to
    2^-34 in float64, to 2^-23 and 2^-15 in float32, which is coarse. ``trusted`` says
    that nothing left the range of the integers (131,072, or 256 in float32) and that
    the run came back to its start, every bit.

    Source: Maclaurin, Duvenaud & Adams 2015 (arXiv 1502.03492), algorithms 2 and 3.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - 3 * alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum(w**2)
    >>> estimator = hg.Reversible(learning_rate=0.1, momentum=0.5, num_steps=200)
    >>> estimate = hg.hypergradient(hg.Bilevel(inner, outer), estimator)(0.0, 1.0)
    >>> round(float(estimate.hypergradient), 3), bool(estimate.stats["trusted"])
    (9.0, True)
    """

    learning_rate: Setting = eqx.field(static=True)
    momentum: Setting = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    least_momentum: float | None = eqx.field(static=True, default=None)
    warm_start: bool | None = eqx.field(static=True, default=None, kw_only=True)
    outer_batch_size: int | None = eqx.field(static=True, default=None, kw_only=True)

    target = "solver"
    citations = ("maclaurin2015",)

    def __check_init__(self):
        check_steps("num_steps", self.num_steps)
        check_steps("outer_batch_size", self.outer_batch_size, optional=True)
        least = self.least_momentum
        if least is None:
            if callable(self.momentum):
                raise ValueError(
                    "momentum is a function, so least_momentum must say how small it "
                    "gets: the buffer holds log2(1 / least_momentum) bits a step"
                )
            least = self.momentum
        if not 1 / 16 <= least < 1:
            raise ValueError(
                f"momentum must lie in [1/16, 1), got {least!r}: less is no momentum "
                "to reverse; use hg.Unrolled"
            )

    def error_factor(self, smallest: float, largest: float) -> float:
        """The resolution's share, far below this."""
        return 1e-3

    @property
    def _least(self) -> float:
        least = self.least_momentum
        return float(self.momentum if least is None else least)  # type: ignore[arg-type]

    @property
    def num_words(self) -> int:
        """Bytes of buffer that each number of ``w`` needs beside its 32 bits."""
        rounded = (round(self._least * d) / d for d in DENOMINATORS)
        least = min(min(rounded), self._least)
        bits = self.num_steps * math.log2(1 / least)
        return math.ceil(1.01 * bits / math.log2(WORD)) + 2

    def _settings(self, alpha: PyTree, step: Array) -> tuple[Array, Array]:
        """Rate and momentum of a step."""

        def at(setting: Any) -> Array:
            value = setting(alpha) if callable(setting) else setting
            value = value(step) if callable(value) else value
            return jnp.asarray(value, dtype=float)

        return at(self.learning_rate), at(self.momentum)

    def _reads_alpha(self, alpha: PyTree) -> list[bool]:
        zero = jnp.asarray(0)
        return list(reads(lambda alpha: self._settings(alpha, zero), alpha))

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> ProcedureState:
        """Starts from ``w``."""
        del key
        if problem.num_objectives is not None:
            raise ValueError("Reversible needs one outer loss; combine them into one")
        check_problem(problem, w, alpha, None)
        beside = map(
            operator.or_,
            self._reads_alpha(alpha),
            start_reads_alpha(problem, w, alpha),
        )
        advice = "nor do the rate, the momentum or the start; take it out of alpha"
        check_seen(problem, w, alpha, list(beside), advice)
        return ProcedureState(w)

    def estimate(
        self, problem: Bilevel, state: ProcedureState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, ProcedureState]:
        """T steps forward and T back."""
        data = drawn(problem, key)
        inner_data, loss = data.inner_data, problem.inner_loss
        outer_batch = held(data.outer_data, self.outer_batch_size, data.outer_key)
        num_steps = self.num_steps
        keys = jax.random.split(data.solver_key, num_steps)
        begin, pull_start = jax.vjp(
            lambda alpha: problem.initial(state.w, alpha), alpha
        )
        settings = lambda alpha, t: self._settings(alpha, t)
        zeros = optax.tree.zeros_like

        def displacement(run, t):
            """What the step before ``t`` adds to ``w``; a product of two floats."""
            rate, _ = settings(alpha, t - 1)
            return jax.tree.map(lambda v: _round(rate * v.astype(rate.dtype), v), run.v)

        def turn(run):
            """At ``w_T``: the outer loss, and the adjoints for the way back."""
            w = jax.tree.map(_decode, run.w, begin)
            value, b, direct = problem.outer_gradients(w, alpha, outer_batch)
            return eqx.tree_at(
                lambda r: (r.value, r.w_bar, r.alpha_bar, r.best),
                run,
                (value, b, direct, w),
            )

        def enter(run, t):
            """``w <- w - r v`` with the velocity of the step before."""
            w = jax.tree.map(jnp.subtract, run.w, displacement(run, t))
            return eqx.tree_at(lambda r: r.w, run, w)

        def leave(run, t):
            """Undoes `enter`, and pulls the adjoints through it."""
            w = jax.tree.map(jnp.add, run.w, displacement(run, t))
            v = jax.tree.map(_decode, run.v, begin)
            (rate, _), pullback = jax.vjp(lambda alpha: settings(alpha, t - 1), alpha)
            v_bar = add_scaled(run.v_bar, -rate, run.w_bar)
            rate_bar = -dot(run.w_bar, v).astype(rate.dtype)
            (by_rate,) = pullback((rate_bar, jnp.zeros_like(rate)))
            alpha_bar = optax.tree.add(run.alpha_bar, by_rate)
            return eqx.tree_at(
                lambda r: (r.w, r.v_bar, r.alpha_bar), run, (w, v_bar, alpha_bar)
            )

        def gather(run, t, g, batch):
            """``v <- m v + g``, what is lost of ``v`` into the buffer."""
            _, momentum = settings(alpha, t)
            run = _multiply(run, momentum, t)
            v = jax.tree.map(lambda v, g: v + _encode(g, v), run.v, g)
            return eqx.tree_at(lambda r: r.v, run, v)

        def release(run, t, g, batch):
            """Undoes `gather`, and pulls the adjoints through it."""
            (_, momentum), pullback = jax.vjp(lambda alpha: settings(alpha, t), alpha)
            v = jax.tree.map(lambda v, g: v - _encode(g, v), run.v, g)
            run = _divide(eqx.tree_at(lambda r: r.v, run, v), momentum, t)
            before = jax.tree.map(_decode, run.v, begin)
            w = jax.tree.map(_decode, run.w, begin)
            _, Hv, cross = hvp_and_cross(loss, w, alpha, batch, run.v_bar)
            momentum_bar = dot(run.v_bar, before).astype(momentum.dtype)
            (by_momentum,) = pullback((jnp.zeros_like(momentum), momentum_bar))
            alpha_bar = optax.tree.add(
                run.alpha_bar, optax.tree.add(cross, by_momentum)
            )
            exact = _as_rounded(momentum, run.v)
            return eqx.tree_at(
                lambda r: (r.w_bar, r.v_bar, r.alpha_bar),
                run,
                (optax.tree.add(run.w_bar, Hv), scale(exact, run.v_bar), alpha_bar),
            )

        def body(index, run):
            """Step ``t`` forward where index < T, step ``t`` back where index >= T."""
            ahead = index < num_steps
            t = jnp.where(ahead, index, 2 * num_steps - 1 - index)
            last = lambda run: leave(turn(enter(run, num_steps)), num_steps)
            run = jax.lax.cond(index == num_steps, last, lambda run: run, run)
            run = jax.lax.cond(ahead, enter, lambda run, t: run, run, t)
            batch = draw(inner_data, keys[t])
            w = jax.tree.map(_decode, run.w, begin)
            g = jax.grad(loss)(w, alpha, batch)  # the one gradient of both directions
            fits = jnp.all(jnp.stack([_fit(x) for x in jax.tree.leaves((w, g))]))
            run = eqx.tree_at(lambda r: r.in_range, run, run.in_range & fits)
            run = jax.lax.cond(ahead, gather, release, run, t, g, batch)
            return jax.lax.cond(ahead, lambda run, t: run, leave, run, t)

        start = jax.tree.map(lambda x: _encode(x, _integers(x)), begin)
        nothing = lambda dtype: jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), begin)
        words = jax.tree.map(
            lambda x: jnp.zeros((self.num_words, *x.shape), jnp.uint8), begin
        )
        value = jax.eval_shape(lambda w: problem.outer(w, alpha, outer_batch), begin)
        run = _Run(
            w=start,
            v=optax.tree.zeros_like(start),
            buffer=nothing(jnp.uint32),
            words=words,
            top=jnp.asarray(0),
            bound=jnp.ones((), jnp.uint32),
            pushed=jnp.zeros(num_steps, bool),
            w_bar=zeros(begin),
            v_bar=zeros(begin),
            alpha_bar=zeros(alpha),
            in_range=jnp.asarray(True),
            value=jnp.zeros(value.shape, value.dtype),
            best=begin,
        )
        run = jax.lax.fori_loop(0, 2 * num_steps, body, run)
        (by_start,) = pull_start(run.w_bar)
        hypergradient = optax.tree.add(run.alpha_bar, by_start)

        same = lambda x, y: jnp.all(
            jnp.stack(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.all(a == b), x, y)))
        )
        returned = (
            same(run.w, start)
            & same(run.v, optax.tree.zeros_like(start))
            & same(run.buffer, nothing(jnp.uint32))
            & (run.top == 0)
            & run.in_range
        )
        part = fraction(inner_data)
        outer_part = fraction(data.outer_data, self.outer_batch_size)
        if self.outer_batch_size is None:
            outer_part = fraction(data.outer_data, size(data.outer_data))
        costs = ledger(
            inner_data,
            data.outer_data,
            num_grads=2 * num_steps * part + 1,
            num_hvps=num_steps * part,
            num_outer_grads=outer_part,
        )
        batch = whole(inner_data, data.residual_key)
        stats = make_stats(
            returned & all_finite(run.value, hypergradient, run.best),
            inner_residual=norm(jax.grad(loss)(run.best, alpha, batch)),
            inner_steps=num_steps,
            error_estimate=jnp.nan,
            **costs,
        )
        keep = self.warm_start
        if keep is None:
            keep = not any(self._reads_alpha(alpha))
        next_state = (
            ProcedureState(run.best) if keep and problem.start is None else state
        )
        return Estimate(run.value, hypergradient, run.best, stats), next_state


class _Run(eqx.Module):
    """The state of the loop: integers, the buffer and its stack, adjoints, ``w_T``."""

    w: PyTree
    v: PyTree
    buffer: PyTree
    words: PyTree
    top: Array
    bound: Array
    pushed: Array
    w_bar: PyTree
    v_bar: PyTree
    alpha_bar: PyTree
    in_range: Array
    value: Array
    best: PyTree


def _fit(x: Array) -> Array:
    """Whether numbers lie well within what the integers hold."""
    integers = 63 if x.dtype == jnp.float64 else 31
    return jnp.all(jnp.abs(x) < 2.0 ** (integers - 1 - _bits(_integers(x))))


def _integers(x: Array) -> Array:
    wide = x.dtype == jnp.float64
    return jnp.zeros(x.shape, jnp.int64 if wide else jnp.int32)


def _bits(integers: Array) -> int:
    return 46 if integers.dtype == jnp.int64 else 23


def _encode(x: Array, like: Array) -> Array:
    """The nearest fixed-point number; scaling by a power of two is exact."""
    return _round(x * 2.0 ** _bits(like), like)


def _round(x: Array, like: Array) -> Array:
    return jnp.round(x).astype(like.dtype)


def _decode(x: Array, like: Array) -> Array:
    wide = jnp.float64 if x.dtype == jnp.int64 else jnp.float32
    return (x.astype(wide) * 2.0 ** -_bits(x)).astype(like.dtype)


def _fraction(momentum: Array, v: Array) -> tuple[Array, int]:
    """Numerator and denominator for velocities like ``v``."""
    denominator = DENOMINATORS[0 if v.dtype == jnp.int64 else 1]
    numerator = jnp.round(momentum * denominator).astype(jnp.int32)
    return jnp.clip(numerator, denominator // 16, denominator - 1), denominator


def _as_rounded(momentum: Array, v: PyTree) -> Array:
    """The momentum that is applied (one for all leaves)."""
    numerator, denominator = _fraction(momentum, jax.tree.leaves(v)[0])
    return numerator.astype(momentum.dtype) / denominator


def _multiply(run: _Run, momentum: Array, t: Array) -> _Run:
    """``v <- v n / d``: the remainder by d enters the buffer, that by n leaves it."""

    def one(v, buffer):
        n, d = _fraction(momentum, v)
        buffer = buffer * d + (v % d).astype(jnp.uint32)
        small = n.astype(jnp.uint32)
        v = (v // d) * n.astype(v.dtype) + (buffer % small).astype(v.dtype)
        return v, buffer // small

    v, buffer = _pairs(one, run.v, run.buffer)
    n, d = _fraction(momentum, jax.tree.leaves(run.v)[0])
    n = n.astype(jnp.uint32)
    bound = (run.bound * d + n - 1) // n  # all buffers are below it
    full = bound > FULL

    def push(words, buffer):
        word = (buffer % WORD).astype(jnp.uint8)
        top = jnp.where(full, run.top, words.shape[0])  # beyond the end: not written
        return words.at[top].set(word, mode="drop"), jnp.where(
            full, buffer // WORD, buffer
        )

    words, buffer = _pairs(push, run.words, buffer)
    return eqx.tree_at(
        lambda r: (r.v, r.buffer, r.words, r.top, r.bound, r.pushed),
        run,
        (
            v,
            buffer,
            words,
            run.top + full,
            jnp.where(full, (bound + WORD - 1) // WORD, bound),
            run.pushed.at[t].set(full),
        ),
    )


def _divide(run: _Run, momentum: Array, t: Array) -> _Run:
    """Undoes `_multiply`."""
    full = run.pushed[t]
    top = run.top - full

    def one(v, buffer):
        n, d = _fraction(momentum, v)
        buffer = buffer * n.astype(jnp.uint32) + (v % n).astype(jnp.uint32)
        v = (v // n) * d + (buffer % d).astype(v.dtype)
        return v, buffer // d

    pop = lambda words, buffer: jnp.where(
        full, buffer * WORD + words[top].astype(jnp.uint32), buffer
    )
    buffer = jax.tree.map(pop, run.words, run.buffer)
    v, buffer = _pairs(one, run.v, buffer)
    return eqx.tree_at(lambda r: (r.v, r.buffer, r.top), run, (v, buffer, top))


def _pairs(f: Callable, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
    """``f`` on leaves, its two results as two trees."""
    leaves, structure = jax.tree.flatten(x)
    results = [f(a, b) for a, b in zip(leaves, jax.tree.leaves(y), strict=True)]
    first, second = zip(*results, strict=True)
    return jax.tree.unflatten(structure, first), jax.tree.unflatten(structure, second)
