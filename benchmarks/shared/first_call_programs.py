"""The programs of the table `first_call`, run one at a time in a fresh process.

    python -m benchmarks.shared.first_call_programs PROGRAM VARIANT

prints the CPU-seconds of the first call and the last outer value as JSON. The problem
is the example of the README: logistic regression with a penalty per feature. Each
program in plain JAX makes the steps of the library's program and records the outer
value and the norms of both gradients.
"""

import functools
import json
import resource
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg

NUM_STEPS, NUM_INNER_STEPS = 50, 500
RATE = 0.1
CG_RTOL = 6e-6  # the default of hg.Implicit in float32
INNER = optax.sgd(RATE, momentum=0.9)
OUTER = optax.adam(RATE)
SOLVER = hg.Descent(INNER, NUM_INNER_STEPS)

#: Program -> its variants of the library.
ESTIMATORS: dict[str, dict[str, Any]] = {
    "Implicit": {
        "trust off": hg.Implicit(SOLVER, estimate_error=False),
        "default": hg.Implicit(SOLVER),
    },
    "Unrolled": {"default": hg.Unrolled(SOLVER)},
    "SOBA": {"default": hg.SOBA(optax.sgd(RATE))},
}
OPTIONS = ("progress", "checkpoints", "limits")
PLAIN = "plain JAX"


def variants_of(program: str) -> tuple[str, ...]:
    """Returns the variants of a program: plain JAX, the library, and its options."""
    return PLAIN, *ESTIMATORS[program], *OPTIONS


def outer_loss(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Returns the logistic loss."""
    del alpha
    return jnp.mean(jax.nn.softplus(-batch[1] * (batch[0] @ w)))


def inner_loss(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Returns the logistic loss with one log-penalty per feature."""
    return outer_loss(w, alpha, batch) + 0.5 * jnp.sum(jnp.exp(alpha) * w**2)


def make_data() -> tuple[PyTree, PyTree, Array, Array]:
    """Returns the training data, the validation data, ``w`` and ``alpha``."""
    x = jax.random.normal(jax.random.key(0), (200, 20))
    noise = 0.5 * jax.random.normal(jax.random.key(1), (200,))
    y = jnp.sign(x[:, 0] + x[:, 1] + noise)
    train, val = (x[:100], y[:100]), (x[100:], y[100:])
    return train, val, jnp.zeros(20), jnp.full(20, -2.0)


# The programs in plain JAX.


def descend(w: Array, alpha: Array, train: PyTree) -> Array:
    """Returns ``w`` after all inner steps."""

    def step(carry, _):
        w, state = carry
        updates, state = INNER.update(jax.grad(inner_loss)(w, alpha, train), state, w)
        return (optax.apply_updates(w, updates), state), None

    (w, _), _ = jax.lax.scan(step, (w, INNER.init(w)), None, NUM_INNER_STEPS)
    return w


def differentiate_implicitly(
    carry: tuple[Array, Array], alpha: Array, train: PyTree, val: PyTree
) -> tuple[tuple[Array, Array], Array, Array, Array]:
    """Returns ``(w, v)``, the value, the hypergradient and the inner gradient."""
    w, v = carry
    w = descend(w, alpha, train)
    value, (b, direct) = jax.value_and_grad(outer_loss, (0, 1))(w, alpha, val)
    grads = lambda w: jax.grad(inner_loss, (0, 1))(w, alpha, train)
    hvp = lambda v: jax.jvp(grads, (w,), (v,))[1][0]
    # H v = dM/dw, from the previous solution
    v, _ = jax.scipy.sparse.linalg.cg(hvp, b, x0=v, tol=CG_RTOL, maxiter=200)
    (inner_grad, _), (_, cross) = jax.jvp(grads, (w,), (v,))
    return (w, v), value, direct - cross, inner_grad


def differentiate_run(
    w: Array, alpha: Array, train: PyTree, val: PyTree
) -> tuple[Array, Array, Array, Array]:
    """Returns ``w``, the value, the hypergradient through the run, ``dL/dw``."""

    def value_after_run(alpha):
        new_w = descend(w, alpha, train)
        return outer_loss(new_w, alpha, val), new_w

    grad_fn = jax.value_and_grad(value_after_run, has_aux=True)
    (value, w), hypergradient = grad_fn(alpha)
    return w, value, hypergradient, jax.grad(inner_loss)(w, alpha, train)


def make_joint_step(
    carry: tuple[Array, Array], alpha: Array, train: PyTree, val: PyTree
) -> tuple[tuple[Array, Array], Array, Array, Array]:
    """Returns ``(w, v)`` after a step of SOBA, the value and both gradients."""
    w, v = carry
    inner_grad_fn = lambda w, alpha: jax.grad(inner_loss)(w, alpha, train)
    inner_grad, pull_back = jax.vjp(inner_grad_fn, w, alpha)
    product, cross = pull_back(v)
    value, (b, direct) = jax.value_and_grad(outer_loss, (0, 1))(w, alpha, val)
    new_carry = w - RATE * inner_grad, v - RATE * (product - b)
    return new_carry, value, direct - cross, inner_grad


PLAIN_STEPS: dict[str, Callable[..., Any]] = {
    "Implicit": differentiate_implicitly,
    "Unrolled": differentiate_run,
    "SOBA": make_joint_step,
}


@functools.partial(jax.jit, static_argnums=0)
def run_plain(
    program: str, w: Array, alpha: Array, train: PyTree, val: PyTree
) -> tuple[Array, tuple[Array, ...]]:
    """Returns ``alpha`` after all outer steps, and a record per step."""
    differentiate = PLAIN_STEPS[program]
    init_carry = w if program == "Unrolled" else (w, jnp.zeros_like(w))

    def step(state, _):
        carry, alpha, opt_state = state
        carry, value, hypergradient, inner_grad = differentiate(
            carry, alpha, train, val
        )
        updates, opt_state = OUTER.update(hypergradient, opt_state, alpha)
        alpha = optax.apply_updates(alpha, updates)
        norms = jnp.linalg.norm(hypergradient), jnp.linalg.norm(inner_grad)
        return (carry, alpha, opt_state), (value, *norms)

    init_state = init_carry, alpha, OUTER.init(alpha)
    (_, alpha, _), records = jax.lax.scan(step, init_state, None, NUM_STEPS)
    return alpha, records


# The first call.


def run_library(
    estimator: Any, options: dict[str, Any], *data: PyTree
) -> tuple[Array, tuple[Array, ...]]:
    """Returns ``alpha`` after all outer steps, and the recorded values."""
    train, val, w, alpha = data
    problem = hg.Bilevel(inner_loss, outer_loss, train, val)
    loop = hg.OuterLoop(problem, estimator, OUTER)
    trace = loop.run(loop.init(w, alpha), num_steps=NUM_STEPS, **options)
    return trace.alpha, (trace.value,)


def measure(program: str, variant: str) -> dict[str, float]:
    """Returns the CPU-seconds of the first call, and the last outer value."""
    train, val, w, alpha = jax.block_until_ready(make_data())
    estimators = ESTIMATORS[program]
    estimator = estimators.get(variant, estimators["default"])
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "progress": {"progress": lambda num_steps, value: None},
            "checkpoints": {"checkpoints": hg.Checkpoints(f"{folder}/run", every=10)},
            "limits": {"time_limit": 1e6, "memory_limit": 1e15},
        }.get(variant, {})
        start = cpu_seconds()
        if variant == PLAIN:
            result = run_plain(program, w, alpha, train, val)
        else:
            result = run_library(estimator, options, train, val, w, alpha)
        jax.block_until_ready(result)
        seconds = cpu_seconds() - start
    return {"seconds": seconds, "value": float(result[1][0][-1])}


def cpu_seconds() -> float:
    """Returns the CPU-seconds of all threads of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
