"""Cases of `test_devices.py`, run in processes of their own on sharded data.

``python -m tests.reliability.device_cases DTYPES NAMES`` computes each case on all
devices and on one. With ``unsharded`` as a further argument it uses one device only,
with ``INDEX COUNT PORT`` it is one of several processes. It prints JSON: for each name
and dtype a list of results, the sharded one first.
"""

import contextlib
import functools
import io
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hypergrad as hg
from hypergrad.runtime.compat import enable_x64
from hypergrad.runtime.devices import replicate, run_on_first_process
from hypergrad.tasks import federated as federated_task
from hypergrad.tasks import few_shot
from tests.loops import run_loop, to_bytes
from tests.reliability.shard_map_cases import SHARD_MAP_CASES

N, D, BATCH = 88, 7, 16  # 88 rows are a multiple of 8, and no other size here is 88
TOLERANCE = 1e-4  # of the solves that stop by one
DESCENT = hg.Descent(optax.sgd(0.1), 10)
FIVE_STEPS = hg.CG(rtol=0.0, max_steps=5, preconditioner=None)
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "scale.md"


class Case(NamedTuple):
    """A program of a problem, and the shape that no device may hold when sharded."""

    run: Callable[..., Any]
    problem: hg.Bilevel
    w: Any
    alpha: Any
    full_shape: tuple[int, ...]


def outer_loss(w, alpha, batch):
    return jnp.mean((batch["x"] @ w - batch["y"]) ** 2)


def inner_loss(w, alpha, batch):
    """Has one weight per example, and a penalty."""
    weights = jax.nn.sigmoid(alpha["weights"][batch["index"]])
    error = batch["x"] @ w - batch["y"]
    return jnp.mean(weights * error**2) + jnp.exp(alpha["penalty"]) * jnp.sum(w**2)


def make_hypergradient_fn(estimator):
    return lambda problem, w, alpha, key: (
        hg.hypergradient(problem, estimator)(w, alpha, key).hypergradient
    )


def run_single_loop(problem, w, alpha, key):
    """Returns alpha after twenty steps of SOBA."""
    soba = hg.SOBA(optax.sgd(0.05))
    trace = hg.minimize(problem, soba, optax.sgd(0.1), w, alpha, num_steps=20, key=key)
    return trace.alpha


def sharding(*axes) -> NamedSharding:
    """Returns a sharding over all devices; each axis is "data" or None."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(*axes))


def shard_rows(x: np.ndarray) -> jax.Array:
    """Returns an array sharded by rows; each process contributes its own rows."""
    num_processes = jax.process_count()
    if num_processes == 1:
        return jax.device_put(x, sharding("data"))
    parts = np.split(np.asarray(x, jnp.asarray(x).dtype), num_processes)
    local = parts[jax.process_index()]
    return jax.make_array_from_process_local_data(sharding("data"), local)


def make_cases(is_sharded: bool) -> dict[str, Case]:
    """Returns all cases with their data on all devices, or on one."""
    place = lambda tree: jax.tree.map(shard_rows if is_sharded else jnp.asarray, tree)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(N, D)), rng.normal(size=N)
    train = place({"x": x, "y": y, "index": np.arange(N)})
    val = place({"x": x[:56] + 1, "y": y[:56]})
    w, weights = jnp.zeros(D), jnp.zeros(N)
    if is_sharded:
        weights = jax.device_put(np.zeros(N), sharding("data"))
    alpha = {"weights": weights, "penalty": jnp.zeros(())}
    plain = hg.Bilevel(inner_loss, outer_loss, train, val)
    batches = hg.Bilevel(
        inner_loss, outer_loss, hg.Batches(train, BATCH), hg.Batches(val, 8)
    )
    estimators = {
        "implicit": (hg.Implicit(DESCENT, FIVE_STEPS), plain),
        "neumann": (hg.Implicit(DESCENT, hg.Neumann(10, step_size=0.1)), plain),
        "unrolled": (hg.Unrolled(DESCENT), plain),
        "unrolled, batches": (hg.Unrolled(DESCENT), batches),
        "tolerance": (
            hg.Implicit(hg.Newton(tolerance=TOLERANCE), hg.CG(rtol=TOLERANCE)),
            plain,
        ),
    }
    cases = {
        name: Case(make_hypergradient_fn(estimator), problem, w, alpha, (N, D))
        for name, (estimator, problem) in estimators.items()
    }
    cases["single loop"] = Case(run_single_loop, plain, w, alpha, (N, D))
    cases["single loop, batches"] = Case(run_single_loop, batches, w, alpha, (N, D))
    cases["federated"] = make_federated(place)
    cases["few-shot"] = make_few_shot(place, is_sharded)
    return cases


def make_federated(place) -> Case:
    """Returns a case of eight clients, whose examples are on their own device."""
    rng = np.random.default_rng(1)

    def make_split():
        return {
            "x": rng.normal(size=(8, 6, 3)),
            "y": np.arange(48).reshape(8, 6) % 10,
            "use": np.ones((8, 6)),
        }

    problem = hg.Bilevel(
        federated_task.train_loss, federated_task.val_loss,
        place(make_split()), place(make_split()),
    )  # fmt: skip
    alpha = {
        "omega": jnp.asarray(rng.uniform(0.5, 2.0, 10)),
        "delta": jnp.asarray(rng.uniform(0.5, 2.0, 10)),
        "iota": jnp.asarray(rng.normal(size=10)),
    }
    w = {"W": jnp.zeros((3, 10)), "b": jnp.zeros(10)}
    solver = federated_task.FedAvg(0.4, num_steps=5, num_local_steps=2)
    run = make_hypergradient_fn(hg.Implicit(solver, FIVE_STEPS))
    return Case(run, problem, w, alpha, (8, 6, 3))


def make_few_shot(place, is_sharded: bool) -> Case:
    """Returns a case of eight tasks per estimate, one on each device."""
    images = np.random.default_rng(0).uniform(size=(10, 20, 3, 3))
    task = few_shot.make(
        key=jax.random.key(0), images=images, num_turns=2,
        num_ways=3, num_tasks=8, hidden=(2,),
    )  # fmt: skip
    pool = task.problem.data_fn.args[0]
    pool = few_shot.ClassPool(
        place(jax.device_get(pool.images)), pool.penalty, pool.num_ways, pool.num_shots,
        pool.num_queries, pool.num_tasks,
    )  # fmt: skip

    def sample(pool, key):
        episodes = few_shot.sample_tasks(pool, key)
        if not is_sharded:
            return episodes
        constrain = lambda x: jax.lax.with_sharding_constraint(
            x, sharding(*((None, "data") if x.ndim else ()))
        )
        return jax.tree.map(constrain, episodes)

    problem = hg.Bilevel(
        task.problem.inner_loss, task.problem.outer_loss,
        init_fn=task.problem.init_fn, data_fn=jax.tree_util.Partial(sample, pool),
    )  # fmt: skip
    run = make_hypergradient_fn(hg.Unrolled(task.solver))
    # The shape is that of the first layer of all tasks.
    return Case(run, problem, task.w, task.alpha, (8, 9, 2))


def run_case(name: str, is_sharded: bool) -> list[float]:
    """Returns the numbers of one program, after a check of how it is sharded."""
    run, problem, w, alpha, full_shape = make_cases(is_sharded)[name]
    key = jax.random.key(1)
    program = jax.jit(run).lower(problem, w, alpha, key).compile()
    text, num_devices = program.as_text(), jax.device_count() if is_sharded else 1
    data = [leaf for leaf in jax.tree.leaves(problem) if leaf.ndim]
    assert data, name
    for leaf in data:
        assert len(leaf.sharding.device_set) == num_devices, (name, leaf.sharding)
        for part in leaf.addressable_shards:
            expected = (len(leaf) // num_devices, *leaf.shape[1:])
            assert part.data.shape == expected, name
    has_all_reduce = re.search(r" all-reduce(-start)?\(", text) is not None
    has_full_array = f"[{','.join(map(str, full_shape))}]" in text
    assert has_all_reduce == is_sharded, name
    assert has_full_array != is_sharded, (name, full_shape)
    return to_floats(program(problem, w, alpha, key))


def to_floats(tree) -> list[float]:
    """Returns all numbers of a tree, also those that other processes hold."""
    flat = jax.jit(lambda tree: ravel_pytree(tree)[0])(tree)
    return np.asarray(replicate(flat), float).tolist()


def run_public_functions(is_sharded: bool) -> list[float]:
    """Calls the public functions as a user does, also with invalid input."""
    _, problem, w, alpha, _ = make_cases(is_sharded)["unrolled, batches"]
    space = {
        "weights": hg.spaces.Interval(-9.0, 9.0, shape=(N,)),
        "penalty": hg.spaces.Interval(-3.0, 0.5),
    }
    estimator = hg.Unrolled(DESCENT)
    estimate = hg.hypergradient(problem, estimator)(w, alpha, jax.random.key(1))
    results, calls = [estimate.hypergradient], []
    minimize = functools.partial(
        hg.minimize, problem, estimator, optax.sgd(0.1), w, num_steps=2, space=space
    )
    trace = minimize(alpha, progress=lambda *call: calls.append(call))
    assert trace.status == "completed"
    assert len(trace.rows()) == len(calls) == 2
    results += [trace.alpha, trace.value]
    for value, message in ((jnp.nan, "NaN"), (9.0, "alpha['weights'][80]")):
        invalid = alpha | {"weights": alpha["weights"].at[80].set(value)}
        with pytest.raises(ValueError, match=re.escape(message)):
            minimize(invalid)
    for searcher in (
        hg.searchers.Random(),
        hg.searchers.PopulationBasedTraining(8),
        hg.searchers.OneShot(8),
    ):
        rows = []
        search = lambda trials, searcher=searcher, rows=rows: hg.search(
            problem, DESCENT, searcher, w, space=space, budget=40,
            key=jax.random.key(2), trial_callback=rows.append, previous_trials=trials,
        )  # fmt: skip
        trace = search(())
        resumed = search(rows[: len(rows) // 2])
        assert trace.value.tolist() == resumed.value.tolist()
        results += [trace.value, trace.best_alpha, trace.w]
    return to_floats(results)


def run_interrupted(is_sharded: bool) -> list[float]:
    """Runs with checkpoints, is interrupted in all processes, and resumes in all.

    Each process has a folder of its own, so that only the first process can read it.
    """
    _, problem, w, alpha, _ = make_cases(is_sharded)["single loop, batches"]
    is_first = jax.process_index() == 0
    run = lambda key=1, **options: run_loop(
        problem, hg.SABA(optax.sgd(0.05)), optax.adam(0.1), w, alpha,
        key=jax.random.key(key), **{"num_steps": 6} | options,
    )  # fmt: skip
    all_bytes = lambda trace: [to_bytes(replicate(x)) for x in jax.tree.leaves(trace)]
    unbroken = run()

    def interrupt(num_made, value):
        if num_made == 4:
            raise KeyboardInterrupt

    with tempfile.TemporaryDirectory() as folder:
        checkpoints = hg.Checkpoints(folder)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoints=checkpoints, progress=interrupt)
        steps = sorted(file.name for file in Path(folder).glob("step-*.json"))
        expected = ["step-000000003.json", "step-000000004.json"] if is_first else []
        assert steps == expected
        error, message = (
            (ValueError, "key differs")
            if is_first
            else (RuntimeError, "the first process")
        )
        with pytest.raises(error, match=message):
            run(key=2, checkpoints=checkpoints)
        calls = []
        resumed = run(
            checkpoints=checkpoints, progress=lambda *call: calls.append(call)
        )
        assert [num_made for num_made, _ in calls] == [5, 6]
        assert all_bytes(resumed) == all_bytes(unbroken)
        assert resumed.alpha["weights"].sharding == unbroken.alpha["weights"].sharding
    sent = {"x": np.array([-0.0, np.nan, -np.inf])}  # a sum with 0 changes the first
    received = run_on_first_process(lambda: sent, {"x": np.empty(3)})
    assert received["x"].tobytes() == sent["x"].tobytes()
    # Only one process exceeds its limit: all of them stop.
    stopped = run(time_limit=1e-9 if is_first else 1e9)
    assert stopped.status == "stopped: time limit"
    budget = float(unbroken.cost[2])
    spent = run(num_steps=None, budget=budget)
    assert len(spent.value) == 3
    return to_floats([unbroken.alpha, unbroken.value, stopped.alpha, spent.alpha])


def run_sharded_batches(is_sharded: bool) -> list[float]:
    """Lets the loss shard a batch, so that every device computes its part."""
    _, problem, w, alpha, _ = make_cases(is_sharded)["unrolled, batches"]

    def sharded_loss(w, alpha, batch):
        if is_sharded:
            constrain = lambda x: jax.lax.with_sharding_constraint(x, sharding("data"))
            batch = jax.tree.map(constrain, batch)
        return inner_loss(w, alpha, batch)

    problem = hg.Bilevel(
        sharded_loss, outer_loss, problem.inner_data, problem.outer_data
    )
    key, run = jax.random.key(1), make_hypergradient_fn(hg.Unrolled(DESCENT))
    program = jax.jit(run).lower(problem, w, alpha, key).compile()
    part = BATCH // jax.device_count()
    assert (f"[{part},{D}]" in program.as_text()) == is_sharded
    return to_floats(program(problem, w, alpha, key))


def read_doc_blocks() -> list[str]:
    """Returns the Python blocks of docs/scale.md, except those that are scripts."""
    return re.findall(r"```python\n(.*?)```", DOCUMENTATION.read_text(), re.DOTALL)


def run_documentation(is_sharded: bool) -> list[float]:
    """Runs the first blocks of docs/scale.md, which need no second process."""
    blocks = read_doc_blocks()[:2]
    if not is_sharded:
        blocks = [block.replace("(jax.device_count(),)", "(1,)") for block in blocks]
    names, results = {}, []
    for block in blocks:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block, "docs/scale.md", "exec"), names)
        results += [names["estimate"].hypergradient, names["trace"].value]
    assert len(results) == 4
    num_devices = jax.device_count() if is_sharded else 1
    assert len(names["train"][0].sharding.device_set) == num_devices
    return to_floats(results)


OTHER_CASES = {
    "public functions": run_public_functions,
    "interrupted": run_interrupted,
    "sharded batches": run_sharded_batches,
    "documentation": run_documentation,
    **SHARD_MAP_CASES,
}


def main(dtypes: str, names: str, *process: str) -> None:
    variants = (True, False)
    if process == ("unsharded",):
        variants = (False,)
    elif process:
        variants = (True,)
        index, num_processes, port = map(int, process)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", num_processes, index)
        assert jax.process_count() == num_processes
        assert jax.device_count() == num_processes * jax.local_device_count()
    results = {}
    for dtype in dtypes.split(";"):
        with enable_x64(dtype == "float64"):
            for name in names.split(";"):
                run = OTHER_CASES.get(name, functools.partial(run_case, name))
                results[f"{name}, {dtype}"] = [run(variant) for variant in variants]
    if jax.process_index() == 0:
        sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
