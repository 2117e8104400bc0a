"""Cases of `device_cases` in which `jax.shard_map` runs a program on every device.

The losses of a device are those of its own part of the inputs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import hypergrad as hg

DESCENT = hg.Descent(optax.sgd(0.1), 10)


def to_floats(arrays) -> list[float]:
    return np.ravel(np.asarray(arrays)).tolist()


def ridge_loss(w, alpha, batch):
    return jnp.mean((w - batch) ** 2) + jnp.exp(alpha) * w**2


def shifted_loss(w, alpha, batch):
    return jnp.mean((w - batch - 0.1) ** 2)


def mean_over_devices(loss):
    """Returns the mean of a loss over all devices, each with its own examples."""
    return lambda w, alpha, batch: jax.lax.pmean(loss(w, alpha, batch), "data")


def numbers_of_run(losses, alpha, data) -> jax.Array:
    """Returns a hypergradient, its certificate's, and alpha and value of a run."""
    problem, estimator = hg.Bilevel(*losses, data, data), hg.Implicit(DESCENT)
    w, alpha = jnp.zeros(()), alpha[0]
    estimate = hg.hypergradient(problem, estimator)(w, alpha)
    certificate = hg.certify(problem, estimate.w, alpha, estimate)
    trace = hg.minimize(problem, estimator, optax.sgd(0.5), w, alpha, num_steps=2)
    numbers = estimate.hypergradient, certificate.corrected_hypergradient, trace.alpha
    return jnp.stack([*numbers, trace.value[1]])[None]


def shard_map(fn, *in_axes, out_axis="data", **options):
    """Returns the compiled program of ``fn`` on every device."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    specs = [PartitionSpec(axis) for axis in in_axes]
    return jax.jit(
        jax.shard_map(
            fn, mesh=mesh, in_specs=tuple(specs),
            out_specs=PartitionSpec(out_axis), **options,
        )
    )  # fmt: skip


def run_independent_problems(is_sharded: bool) -> list[float]:
    """Has one alpha per device, without the check of varying axes."""
    alphas, data = jnp.linspace(-1.0, 0.5, jax.device_count()), jnp.arange(8.0) / 8
    run = functools.partial(numbers_of_run, (ridge_loss, shifted_loss), data=data)
    if is_sharded:
        return to_floats(shard_map(run, "data", check_vma=False)(alphas))
    return to_floats([run(alpha[None]) for alpha in alphas])


def run_split_data(is_sharded: bool) -> list[float]:
    """Has a part of the data per device, and losses that are means over devices."""
    alpha, data = jnp.array([0.5]), jnp.arange(8.0) / 8
    losses = ridge_loss, shifted_loss
    if not is_sharded:
        return to_floats(numbers_of_run(losses, alpha, data))
    run = functools.partial(numbers_of_run, tuple(map(mean_over_devices, losses)))
    return to_floats(shard_map(run, None, "data", out_axis=None)(alpha, data))


def run_varying_losses(is_sharded: bool) -> list[float]:
    """Has losses, or a w, that vary between devices, which is an error."""
    problem = hg.Bilevel(ridge_loss, shifted_loss, 0.5, 0.5)
    estimator = hg.Implicit(DESCENT)
    gradient = hg.hypergradient(problem, estimator)
    gradient(0.0, 0.0)  # the checks of these shapes are done
    loop = hg.OuterLoop(problem, estimator, optax.sgd(0.5))
    alphas = jnp.linspace(-1.0, 0.5, jax.device_count())
    solution = hg.argmin(ridge_loss, DESCENT)
    only_inner = lambda x: hg.Bilevel(ridge_loss, mean_over_devices(shifted_loss), x, x)
    only_outer = lambda x: hg.Bilevel(mean_over_devices(ridge_loss), shifted_loss, x, x)
    calls = (
        (lambda x: gradient(0.0, x), "inner_loss"),
        (lambda x: gradient(x, 0.0), "w"),
        (lambda x: hg.hypergradient(only_inner(x), estimator)(0.0, 0.0), "inner_loss"),
        (lambda x: hg.hypergradient(only_outer(x), estimator)(0.0, 0.0), "outer_loss"),
        (lambda x: loop.init(0.0, x), "inner_loss"),
        (lambda x: hg.certify(problem, 0.0, x), "inner_loss"),
        (lambda x: solution(0.0, x, 0.5), "inner_loss"),
        (lambda x: solution(x, 0.0, 0.5), "w0"),
    )
    for call, argument in calls if is_sharded else ():
        program = shard_map(lambda x, call=call: (call(x[0]), x)[1], "data")
        with pytest.raises(TypeError, match=f"^{argument} must .*'data'"):
            program(alphas)
    return [1.0]


SHARD_MAP_CASES = {
    "independent problems": run_independent_problems,
    "split data": run_split_data,
    "varying losses": run_varying_losses,
}
