"""What `test_scale.py` runs in processes of its own: hypergradients of sharded data.

``python -m tests.scale_cases DTYPES NAMES`` compares the devices of one process with
one of them; with ``alone`` behind it takes one only, with ``INDEX COUNT PORT`` it is
one of several processes. Each prints what it found as JSON, a list for each name and
dtype: spread, then on one device.
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
from hypergrad.runtime.devices import replicate, run_on_first_process
from hypergrad.tasks import few_shot
from hypergrad.tasks.federated import FedAvg

N, D, BATCH = 88, 7, 16  # 88 rows are a multiple of 8, and no other size here
TOLERANCE = 1e-4  # of the solves that stop by one
SGD = hg.Descent(optax.sgd(0.1), 10)
FIVE_STEPS = hg.CG(rtol=0.0, max_steps=5)


class Case(NamedTuple):
    """A program of a problem, and the shape that no device may hold of it."""

    run: Callable[..., Any]
    problem: hg.Bilevel
    w: Any
    alpha: Any
    whole: tuple[int, ...]


def outer_loss(w, alpha, batch):
    return jnp.mean((batch["x"] @ w - batch["y"]) ** 2)


def inner_loss(w, alpha, batch):
    """One weight per example, and a penalty."""
    weights = jax.nn.sigmoid(alpha["weights"][batch["index"]])
    error = batch["x"] @ w - batch["y"]
    return jnp.mean(weights * error**2) + jnp.exp(alpha["penalty"]) * jnp.sum(w**2)


def one_shot(estimator):
    """Its hypergradient."""
    return lambda problem, w, alpha, key: (
        hg.hypergradient(problem, estimator)(w, alpha, key).hypergradient
    )


def single_loop(problem, w, alpha, key):
    """Where twenty steps of SOBA lead: the sum of their hypergradients."""
    soba = hg.SOBA(optax.sgd(0.05))
    run = hg.minimize(problem, soba, optax.sgd(0.1), w, alpha, num_steps=20, key=key)
    return run.alpha


def sharding(*axes) -> NamedSharding:
    """Over all devices, of all processes; each axis is "data" or None."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(*axes))


def placed(x: np.ndarray) -> jax.Array:
    """Its rows over all devices; each of several processes brings its own."""
    count, apart = jax.process_count(), sharding("data")
    if count == 1:
        return jax.device_put(x, apart)
    mine = np.split(np.asarray(x, jnp.asarray(x).dtype), count)[jax.process_index()]
    return jax.make_array_from_process_local_data(apart, mine)


def cases(spread: bool) -> dict[str, Case]:
    """Each with its data over all devices, or on one."""
    put = lambda tree: jax.tree.map(placed if spread else jnp.asarray, tree)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(N, D)), rng.normal(size=N)
    train = put({"x": x, "y": y, "index": np.arange(N)})
    val = put({"x": x[:56] + 1, "y": y[:56]})
    w = jnp.zeros(D)
    apart = lambda x: jax.device_put(x, sharding("data")) if spread else jnp.asarray(x)
    alpha = {"weights": apart(np.zeros(N)), "penalty": jnp.zeros(())}
    plain = hg.Bilevel(inner_loss, outer_loss, train, val)
    batches = hg.Bilevel(
        inner_loss, outer_loss, hg.Batches(train, BATCH), hg.Batches(val, 8)
    )
    known = {
        "implicit": (hg.Implicit(SGD, FIVE_STEPS), plain),
        "neumann": (hg.Implicit(SGD, hg.Neumann(10, step_size=0.1)), plain),
        "unrolled": (hg.Unrolled(SGD), plain),
        "unrolled, batches": (hg.Unrolled(SGD), batches),
        "tolerance": (
            hg.Implicit(hg.Newton(tolerance=TOLERANCE), hg.CG(rtol=TOLERANCE)),
            plain,
        ),
    }
    found = {
        name: Case(one_shot(estimator), problem, w, alpha, (N, D))
        for name, (estimator, problem) in known.items()
    }
    found["single loop"] = Case(single_loop, plain, w, alpha, (N, D))
    found["single loop, batches"] = Case(single_loop, batches, w, alpha, (N, D))
    return found | {"federated": federated(put), "few-shot": tasks(put, spread)}


def federated(put) -> Case:
    """Eight clients, their examples on their own device."""
    from tests.test_task_federated import few  # begins computations on import

    problem, w, alpha = few(jax.random.key(0), clients=8)
    problem = hg.Bilevel(
        problem.inner_loss,
        problem.outer_loss,
        put(jax.device_get(problem.inner_data)),
        put(jax.device_get(problem.outer_data)),
    )
    solver = FedAvg(0.4, num_steps=5, local_steps=2)
    return Case(one_shot(hg.Implicit(solver, FIVE_STEPS)), problem, w, alpha, (8, 6, 3))


def tasks(put, spread: bool) -> Case:
    """Eight tasks an estimate, drawn from eight classes, one of each on a device."""
    images = np.random.default_rng(0).uniform(size=(10, 20, 3, 3))
    task = few_shot.make(
        key=jax.random.key(0), images=images, num_turns=2,
        way=3, num_tasks=8, hidden=(2,),
    )  # fmt: skip
    pool = task.problem.data_fn.args[0]
    pool = few_shot.Pool(
        put(jax.device_get(pool.images)), pool.penalty, pool.way, pool.shots,
        pool.queries, pool.num_tasks,
    )  # fmt: skip

    def draw(pool, key):
        drawn = few_shot.episodes(pool, key)
        if not spread:
            return drawn
        apart = lambda x: jax.lax.with_sharding_constraint(
            x, sharding(*((None, "data") if x.ndim else ()))
        )
        return jax.tree.map(apart, drawn)

    problem = hg.Bilevel(
        task.problem.inner_loss, task.problem.outer_loss,
        init_fn=task.problem.init_fn, data_fn=jax.tree_util.Partial(draw, pool),
    )  # fmt: skip
    run = one_shot(hg.Unrolled(task.solver))
    return Case(run, problem, task.w, task.alpha, (8, 9, 2))  # every task's first layer


def answer(name: str, spread: bool) -> list[float]:
    """The hypergradient of one compiled program, which is what it claims to be."""
    run, problem, w, alpha, whole = cases(spread)[name]
    key = jax.random.key(1)
    program = jax.jit(run).lower(problem, w, alpha, key).compile()
    text, count = program.as_text(), jax.device_count() if spread else 1
    held = f"[{','.join(map(str, whole))}]"
    data = [leaf for leaf in jax.tree.leaves(problem) if leaf.ndim]
    assert data, name
    for leaf in data:
        assert len(leaf.sharding.device_set) == count, (name, leaf.sharding)
        for shard in leaf.addressable_shards:
            assert shard.data.shape == (len(leaf) // count, *leaf.shape[1:]), name
    if spread:
        assert re.search(r" all-reduce(-start)?\(", text), f"{name} adds nothing up"
        assert held not in text, f"{name}: a device holds all of {held}"
    else:
        assert "all-reduce" not in text, name
        assert held in text, f"{name}: {held} is not what to look for"
    return flat(program(problem, w, alpha, key))


def flat(tree) -> list[float]:
    """All numbers, also those that other processes hold."""
    found = jax.jit(lambda tree: ravel_pytree(tree)[0])(tree)
    return np.asarray(replicate(found), float).tolist()


def from_outside(spread: bool) -> list[float]:
    """The public functions, called as a user does: input is looked at, and refused."""
    _, problem, w, alpha, _ = cases(spread)["unrolled, batches"]
    space = {
        "weights": hg.spaces.Interval(-9.0, 9.0, shape=(N,)),
        "penalty": hg.spaces.Interval(-3.0, 0.5),
    }
    gradient = hg.hypergradient(problem, hg.Unrolled(SGD))
    found = [gradient(w, alpha, jax.random.key(1)).hypergradient]
    seen = []
    trace = hg.minimize(
        problem, hg.Unrolled(SGD), optax.sgd(0.1), w, alpha, num_steps=2, space=space,
        progress=lambda *news: seen.append(news),
    )  # fmt: skip
    assert trace.status == "completed"
    assert len(trace.rows()) == len(seen) == 2
    found += [trace.alpha, trace.value]
    for wrong, said in (
        (jnp.nan, "contains NaN"),
        (9.0, "alpha['weights'][80] is 9.0"),
    ):
        spoilt = alpha | {"weights": alpha["weights"].at[80].set(wrong)}
        with pytest.raises(ValueError, match=re.escape(said)):
            hg.minimize(
                problem, hg.Unrolled(SGD), optax.sgd(0.1), w, spoilt, num_steps=2,
                space=space,
            )  # fmt: skip
    for searcher in (
        hg.searchers.Random(),
        hg.searchers.PopulationBasedTraining(8),
        hg.searchers.OneShot(8),
    ):
        rows = []
        run = lambda trials, searcher=searcher, rows=rows: hg.search(
            problem, SGD, searcher, w, space=space, budget=40, key=jax.random.key(2),
            trial_callback=rows.append, previous_trials=trials,
        )  # fmt: skip
        trace = run(())
        count = len(rows)
        again = run(rows[: count // 2])
        assert trace.value.tolist() == again.value.tolist()
        found += [trace.value, trace.best_alpha, trace.w]
    return flat(found)


def interrupted(spread: bool) -> list[float]:
    """A run with checkpoints that dies in all processes, and goes on in all.

    Each process has a folder of its own, so that only the first one's can be read.
    """
    _, problem, w, alpha, _ = cases(spread)["single loop, batches"]
    first = jax.process_index() == 0
    run = lambda key=1, **changes: hg.minimize(
        problem, hg.SABA(optax.sgd(0.05)), optax.adam(0.1), w, alpha,
        num_steps=6, key=jax.random.key(key), **changes,
    )  # fmt: skip
    bits = lambda trace: [
        np.asarray(replicate(x)).tobytes() for x in jax.tree.leaves(trace)
    ]
    unbroken = run()

    def die(done, value):
        if done == 4:
            raise KeyboardInterrupt

    with tempfile.TemporaryDirectory() as folder:
        keep = hg.Checkpoints(folder, every=1)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoints=keep, progress=die)
        steps = sorted(file.name for file in Path(folder).glob("step-*.json"))
        expected = ["step-000000003.json", "step-000000004.json"] if first else []
        assert steps == expected
        error, said = (
            (ValueError, "checkpoints of another run: key differs")
            if first
            else (RuntimeError, "the first process could not go on")
        )
        with pytest.raises(error, match=said):
            run(key=2, checkpoints=keep)
        later = []
        again = run(checkpoints=keep, progress=lambda *news: later.append(news))
        assert [done for done, _ in later] == [5, 6]
        assert bits(again) == bits(unbroken)
    given = {"x": np.array([-0.0, np.nan, -np.inf])}  # a sum with 0 loses the first
    sent = run_on_first_process(lambda: given, {"x": np.empty(3)})
    assert sent["x"].tobytes() == given["x"].tobytes()
    # One process alone is out of time: all stop, and none waits for another for ever.
    stopped = run(time_limit=1e-9 if first else 1e9)
    assert stopped.status == "stopped: time limit"
    return flat([unbroken.alpha, unbroken.value, stopped.alpha])


def divided_batches(spread: bool) -> list[float]:
    """A batch that the loss puts apart: every device computes its share."""
    _, problem, w, alpha, _ = cases(spread)["unrolled, batches"]

    def divided(w, alpha, batch):
        apart = lambda x: jax.lax.with_sharding_constraint(x, sharding("data"))
        return inner_loss(w, alpha, jax.tree.map(apart, batch) if spread else batch)

    problem = hg.Bilevel(divided, outer_loss, problem.inner_data, problem.outer_data)
    key, run = jax.random.key(1), one_shot(hg.Unrolled(SGD))
    program = jax.jit(run).lower(problem, w, alpha, key).compile()
    share = BATCH // jax.device_count()
    assert (f"[{share},{D}]" in program.as_text()) == spread
    return flat(program(problem, w, alpha, key))


def blocks_of_the_page() -> list[str]:
    """Those of docs/scale.md, but for the one that begins a script."""
    text = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def page(spread: bool) -> list[float]:
    """The first blocks of docs/scale.md, which need no second process."""
    blocks = blocks_of_the_page()[:2]
    if not spread:
        blocks = [block.replace("(jax.device_count(),)", "(1,)") for block in blocks]
    known, found = {}, []
    for block in blocks:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block, "docs/scale.md", "exec"), known)
        found += [known["estimate"].hypergradient, known["trace"].value]
    assert len(found) == 4
    count = jax.device_count() if spread else 1
    assert len(known["train"][0].sharding.device_set) == count
    return flat(found)


OTHERS = {
    "from outside": from_outside,
    "interrupted": interrupted,
    "divided batches": divided_batches,
    "page": page,
}


def main(dtypes: str, names: str, *where: str) -> None:
    ways = (True, False) if not where else (False,) if where == ("alone",) else (True,)
    if len(where) == 3:
        index, count, port = map(int, where)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", count, index)
        assert jax.process_count() == count
        assert jax.device_count() == count * jax.local_device_count()
    found = {}
    for dtype in dtypes.split(";"):
        with jax.enable_x64(dtype == "float64"):
            for name in names.split(";"):
                run = OTHERS.get(name, functools.partial(answer, name))
                found[f"{name}, {dtype}"] = [run(way) for way in ways]
    if jax.process_index() == 0:
        sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
