"""The digests by which a run recognizes its checkpoints."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..batches import full_batch, sample_batch
from ..checkpoint import NUM_DEVICES
from ..runtime.fingerprint import digest, digest_program
from ..runtime.machine import RunFingerprint, runtime_environment
from .block import get_block_size, run_block
from .step import Budget, OuterState

if TYPE_CHECKING:
    from .loop import OuterLoop


def run_fingerprint(
    loop: "OuterLoop", state: OuterState, record_every: int
) -> RunFingerprint:
    """Returns digests of everything that determines a run, by name.

    The number of steps and the budget are left out, so that a run can be extended.
    """
    problem, optimizer = loop.problem, optax.with_extra_args_support(loop.optimizer)
    key = jax.random.key(0)
    inner_batch = jax.eval_shape(
        lambda key: sample_batch(problem.sample_data(key)[0], key), key
    )
    outer_batch = jax.eval_shape(
        lambda key: full_batch(problem.sample_data(key)[1], key), key
    )
    # The text of a program contains the constants that its functions close over. Parts
    # of the program are compared as well, because their names make a better message.
    digest_code = lambda f, *args: digest_program(jax.jit(f).lower(*args))
    w, alpha = state.w, state.best_alpha
    outer_value = lambda *args: problem.outer_value(*args)
    update = lambda g, opt_state, u: optimizer.update(
        g, opt_state, u, value=jnp.zeros(())
    )
    program = run_block.lower(  # pyright: ignore[reportFunctionMemberAccess] - filter_jit
        loop,
        state,
        Budget.create(None),
        jnp.asarray(np.asarray(0)),  # of the type in a run, which is lowered only once
        state.step,
        get_block_size(loop, state),
        record_every,
    )
    settings = ("eval_every", "certify_every", "on_untrusted", "record_alphas")
    trees = ("estimator", "aggregator", "space", "project", "outer_data_fn", "metrics")
    return (
        {name: str(getattr(loop, name)) for name in settings}
        | {"record_every": str(record_every)}
        | {name: digest(getattr(loop, name)) for name in trees}
        | {
            "w": digest(w),
            "alpha": digest(alpha),
            "key": digest(state.key),
            "inner_data": digest(problem.inner_data),
            "outer_data": digest(problem.outer_data),
            "data_fn": digest(problem.data_fn),
            "inner_loss": digest_code(problem.inner_loss, w, alpha, inner_batch),
            "outer_loss": digest_code(outer_value, w, alpha, outer_batch),
            "optimizer": digest_code(update, state.u, state.optimizer_state, state.u),
            "program": digest_program(program),
            "initial state": digest(state),
            NUM_DEVICES: str(_number_of_devices(loop, state)),
        }
        | runtime_environment()
    )


def _number_of_devices(loop: "OuterLoop", state: OuterState) -> int:
    """Returns the number of devices on which a run computes."""
    leaves = jax.tree.leaves((loop, state))
    arrays = [x for x in leaves if isinstance(x, jax.Array)]
    return max((len(x.sharding.device_set) for x in arrays), default=1)
