"""Momentum descent run backwards, bit for bit, from an information buffer."""

import operator
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ..jaxpr import used_inputs
from ..method_summary import MethodSummary
from ..problem import Bilevel, EstimateData, sample_batch
from ..problem_checks import check_alpha_has_gradient, check_problem, init_uses_alpha
from ..products import hvp_and_cross_vjp
from ..trees import add_scale, scale, vdot
from ..validation import check_not_optax_factory, check_positive_int, float_converter
from . import reversible_arithmetic
from .base import Estimate
from .inner_run import InnerRunState, make_run_estimate

Setting = float | Array | Callable[[PyTree], Any]


class Reversible(eqx.Module):
    """``dM(w_T(alpha), alpha)/dalpha`` for ``v <- m v + g``, ``w <- w - r v``.

    ``w`` and ``v`` are fixed-point integers, and what a multiplication by ``m < 1``
    loses of ``v`` goes into a buffer of ``log2(1 / m)`` bits a step, so that each step
    can be undone exactly and no trajectory is stored. Both directions run through one
    gradient in one loop, so that it cannot round in two ways.

    Args:
      learning_rate: a number, or ``alpha -> r`` where ``r`` is a number or an optax
        schedule.
      momentum: a static number in [1/16, 1), or ``alpha -> m`` likewise; it is rounded
        to 1/4096, in float32 to 1/256.
      num_steps: T.
      min_momentum: smallest ``m`` that a function takes, which decides the buffer's
        size; not needed where ``momentum`` is a number.
      warm_start: begin each run where the last ended; None means True unless rate or
        momentum are made from ``alpha``.
      certify: measure ``distance_to_implicit``, as in `Unrolled`.
      outer_batch_size: examples for the outer gradient, drawn once an estimate; None
        means all.

    Cost: 2 T inner gradients and T Hessian-vector products with their cross term.
    Memory: six vectors like ``w`` and the buffer, ``log2(1 / m)`` bits a number and
    step: 0.15 at 0.9.

    Target: solver. Bias: a resolution: steps are rounded to 2^-46 and velocities to
    2^-34 in float64, to 2^-23 and 2^-15 in float32, which is coarse. ``trusted`` says
    that nothing left the range of the integers (65,536, or 128 in float32), nor the
    momentum its own, and that the run came back to its start, every bit. Under ``vmap``
    both directions are computed at every step, at twice the cost.

    Source: Maclaurin, Duvenaud & Adams 2015 (arXiv 1502.03492), algorithms 2 and 3.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - 3 * alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum(w**2)
    >>> estimator = hg.Reversible(learning_rate=0.1, momentum=0.5, num_steps=200)
    >>> estimate = hg.hypergradient(hg.Bilevel(inner, outer), estimator)(0.0, 1.0)
    >>> round(float(estimate.hypergradient), 3), bool(estimate.stats["trusted"])
    (9.0, True)
    """

    learning_rate: Setting
    momentum: float | Callable[[PyTree], Any] = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    min_momentum: float = eqx.field(static=True)
    warm_start: bool | None = eqx.field(static=True)
    certify: bool = eqx.field(static=True)
    outer_batch_size: int | None = eqx.field(static=True)

    target = "solver"
    citations = ("maclaurin2015",)
    summary = (
        MethodSummary(
            "Reversible(rate, m, T)",
            num_grads="2 * T + 1",
            num_hvps="T",
            memory="6 w, log2(1/m) bits a number and step",
            bias="rounding to 2^-34, in float64",
            alpha_in=("losses", "optimizer", "start"),
            recommended_for="thousands of steps of momentum descent, all of them seen",
            not_recommended_for="other optimizers, float32, several outer losses",
            reason="steps are undone bit by bit instead of being stored",
        ),
    )

    def __init__(
        self,
        learning_rate: Setting,
        momentum: float | Callable[[PyTree], Any],
        num_steps: int,
        min_momentum: float | None = None,
        *,
        warm_start: bool | None = None,
        certify: bool = False,
        outer_batch_size: int | None = None,
    ):
        check_positive_int("num_steps", num_steps)
        check_positive_int("outer_batch_size", outer_batch_size, optional=True)
        for name, setting in (("learning_rate", learning_rate), ("momentum", momentum)):
            check_not_optax_factory(name, setting)
        if not callable(learning_rate):
            learning_rate = float_converter("learning_rate", optional=False)(
                learning_rate
            )
        if min_momentum is None:
            if callable(momentum):
                raise ValueError(
                    "momentum is a function, so min_momentum must say how small it "
                    "gets: the buffer holds log2(1 / min_momentum) bits a step"
                )
            min_momentum = float(momentum)
        if not 1 / reversible_arithmetic.LEAST <= min_momentum < 1:
            raise ValueError(
                f"momentum must lie in [1/16, 1), got {min_momentum!r}: less is no "
                "momentum to reverse; use hg.Unrolled"
            )
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.num_steps = num_steps
        self.min_momentum = min_momentum
        self.warm_start = warm_start
        self.certify = certify
        self.outer_batch_size = outer_batch_size

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """The resolution's share, far below this."""
        return 1e-3

    @property
    def num_words(self) -> int:
        """Bytes of buffer that each number of ``w`` needs beside its 32 bits."""
        return reversible_arithmetic.num_words(self.num_steps, self.min_momentum)

    def _settings(self, alpha: PyTree, step: Array) -> tuple[Array, Array]:
        """Rate and momentum of a step."""

        def at(setting: Any) -> Array:
            value = setting(alpha) if callable(setting) else setting
            value = value(step) if callable(value) else value
            return jnp.asarray(value, dtype=float)

        return at(self.learning_rate), at(self.momentum)

    def _reads_alpha(self, alpha: PyTree) -> list[bool]:
        first = jnp.asarray(0)
        return list(used_inputs(lambda alpha: self._settings(alpha, first), alpha))

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> InnerRunState:
        """Starts from ``w``."""
        del key
        if problem.num_objectives is not None:
            raise ValueError("Reversible needs one outer loss; combine them into one")
        if (
            len(
                {
                    reversible_arithmetic.integer_dtype(leaf)
                    for leaf in jax.tree.leaves(w)
                }
            )
            > 1
        ):
            raise ValueError(
                "w mixes float64 with shorter leaves, which have other integers; cast "
                "w to one dtype, or use hg.Unrolled"
            )
        check_problem(problem, w, alpha)
        start = init_uses_alpha(problem, w, alpha)
        beside = list(map(operator.or_, self._reads_alpha(alpha), start))
        advice = "nor do the rate, the momentum or the start; take it out of alpha"
        check_alpha_has_gradient(problem, w, alpha, beside, advice)
        return InnerRunState(w)

    def estimate(
        self, problem: Bilevel, state: InnerRunState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, InnerRunState]:
        """T steps forward and T back."""
        data, loss, num_steps = (
            EstimateData.sample(problem, key),
            problem.inner_loss,
            self.num_steps,
        )
        outer_batch = data.outer_batch(self.outer_batch_size)
        keys = jax.random.split(data.solver_key, num_steps)
        begin, pull_start = jax.vjp(
            lambda alpha: problem.init_inner(state.w, alpha), alpha
        )
        integers = reversible_arithmetic.integer_dtype(jax.tree.leaves(begin)[0])
        decoded = lambda tree: jax.tree.map(reversible_arithmetic.decode, tree, begin)

        def displacement(run, t):
            """What the step before ``t`` adds to ``w``; a product of two floats."""
            rate, _ = self._settings(alpha, t - 1)
            one = lambda v: jnp.round(rate * v.astype(rate.dtype)).astype(integers)
            return jax.tree.map(one, run.v)

        def turn(run):
            """At ``w_T``: the outer loss, and the adjoints for the way back."""
            w = decoded(run.w)
            value, b, direct = problem.outer_value_and_grads(w, alpha, outer_batch)
            return eqx.tree_at(
                lambda r: (r.value, r.w_bar, r.alpha_bar, r.reached),
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
            (rate, _), pullback = jax.vjp(lambda a: self._settings(a, t - 1), alpha)
            v_bar = add_scale(run.v_bar, -rate, run.w_bar)
            rate_bar = -vdot(run.w_bar, decoded(run.v)).astype(rate.dtype)
            (by_rate,) = pullback((rate_bar, jnp.zeros_like(rate)))
            alpha_bar = optax.tree.add(run.alpha_bar, by_rate)
            return eqx.tree_at(
                lambda r: (r.w, r.v_bar, r.alpha_bar), run, (w, v_bar, alpha_bar)
            )

        def gather(run, t, g, batch):
            """``v <- m v + g``, what is lost of ``v`` into the buffer."""
            _, momentum = self._settings(alpha, t)
            buffer, v = reversible_arithmetic.multiply(run.buffer, run.v, momentum, t)
            v = jax.tree.map(lambda v, g: v + reversible_arithmetic.encode(g), v, g)
            sound = reversible_arithmetic.fits((decoded(run.w), g))
            sound &= reversible_arithmetic.is_taken(momentum, integers)
            return eqx.tree_at(
                lambda r: (r.v, r.buffer, r.sound), run, (v, buffer, run.sound & sound)
            )

        def release(run, t, g, batch):
            """Undoes `gather`, and pulls the adjoints through it."""
            (_, momentum), pullback = jax.vjp(lambda a: self._settings(a, t), alpha)
            v = jax.tree.map(lambda v, g: v - reversible_arithmetic.encode(g), run.v, g)
            buffer, v = reversible_arithmetic.divide(run.buffer, v, momentum, t)
            _, Hv, cross = hvp_and_cross_vjp(
                loss, decoded(run.w), alpha, batch, run.v_bar
            )
            momentum_bar = vdot(run.v_bar, decoded(v)).astype(momentum.dtype)
            (by_momentum,) = pullback((jnp.zeros_like(momentum), momentum_bar))
            direct = optax.tree.add(cross, by_momentum)
            n, d = (
                reversible_arithmetic.numerator(momentum, integers),
                reversible_arithmetic.denominator(integers),
            )
            return eqx.tree_at(
                lambda r: (r.v, r.buffer, r.w_bar, r.v_bar, r.alpha_bar),
                run,
                (
                    v,
                    buffer,
                    optax.tree.add(run.w_bar, Hv),
                    scale(n.astype(momentum.dtype) / d, run.v_bar),
                    optax.tree.add(run.alpha_bar, direct),
                ),
            )

        def body(index, run):
            """Step ``t`` forward where index < T, step ``t`` back where index >= T."""
            ahead = index < num_steps
            t = jnp.where(ahead, index, 2 * num_steps - 1 - index)
            last = lambda run: leave(turn(enter(run, num_steps)), num_steps)
            run = jax.lax.cond(index == num_steps, last, lambda run: run, run)
            run = jax.lax.cond(ahead, enter, lambda run, t: run, run, t)
            batch = sample_batch(data.inner_data, keys[t])
            # the one gradient of both directions
            g = jax.grad(loss)(decoded(run.w), alpha, batch)
            run = jax.lax.cond(ahead, gather, release, run, t, g, batch)
            return jax.lax.cond(ahead, lambda run, t: run, leave, run, t)

        start = jax.tree.map(reversible_arithmetic.encode, begin)
        still = optax.tree.zeros_like(start)
        value = jax.eval_shape(
            lambda w: problem.outer_value(w, alpha, outer_batch), begin
        )
        run = _Run(
            w=start,
            v=still,
            buffer=reversible_arithmetic.empty(begin, self.num_words, num_steps),
            w_bar=optax.tree.zeros_like(begin),
            v_bar=optax.tree.zeros_like(begin),
            alpha_bar=optax.tree.zeros_like(alpha),
            sound=jnp.asarray(True),
            value=jnp.zeros(value.shape, value.dtype),
            reached=begin,
        )
        run = jax.lax.fori_loop(0, 2 * num_steps, body, run)
        (by_start,) = pull_start(run.w_bar)
        same = jax.tree.map(jnp.array_equal, (run.w, run.v), (start, still))
        returned = jnp.all(jnp.stack(jax.tree.leaves(same)))
        return make_run_estimate(
            problem,
            data,
            state,
            alpha,
            run.value,
            optax.tree.add(run.alpha_bar, by_start),
            run.reached,
            num_steps=num_steps,
            num_grads=2 * num_steps,
            num_hvps=num_steps,
            reads_alpha=any(self._reads_alpha(alpha)),
            error_estimate=jnp.nan,
            trusted=returned & reversible_arithmetic.is_empty(run.buffer) & run.sound,
            outer_batch_size=self.outer_batch_size,
            warm_start=self.warm_start,
            certify=self.certify,
        )


class _Run(eqx.Module):
    """The state of the loop: integers, buffer, adjoints, and what was found at T."""

    w: PyTree
    v: PyTree
    buffer: reversible_arithmetic.Buffer
    w_bar: PyTree
    v_bar: PyTree
    alpha_bar: PyTree
    sound: Array
    value: Array
    reached: PyTree
