"""Processes killed at random moments: a resumed run equals an unbroken run."""

import json
import signal
import textwrap
from pathlib import Path

import numpy as np
import pytest

from hypergrad.bench.rows import read_rows
from tests.bench.toy_table import write_table
from tests.processes import run_in_terminal, run_python

# One process imports the slow modules without starting a device, which would not
# survive a fork. Each child runs the program and is killed, unless it ends first.
SUPERVISOR = """
    import json, os, random, signal, sys, time

    import hypergrad as hg

    folder, num_kills = sys.argv[1], int(sys.argv[2])

    def run_child(name, pipe):
        import jax

        jax.config.update("jax_compilation_cache_dir", folder + "/programs")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        program(name, pipe)

    def start_child(name):
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read_end)
            status = 1
            try:
                run_child(name, write_end)
                status = 0
            finally:
                os._exit(status)
        os.close(write_end)
        return child, read_end

    def was_killed(child, read_end):
        _, status = os.waitpid(child, 0)
        os.close(read_end)
        assert os.WIFSIGNALED(status) or status == 0, status
        return os.WIFSIGNALED(status)

    random = random.Random(0)
    was_killed(*start_child("unbroken"))
    kills, runs = 0, 0
    while kills < num_kills:
        child, read_end = start_child(f"killed {runs}")
        if random.random() < 0.8:
            os.read(read_end, 1)  # waits for the first step
        time.sleep(random.uniform(0, MAX_DELAY))
        os.kill(child, signal.SIGKILL)
        if was_killed(child, read_end):
            kills += 1
        else:
            runs += 1
    while was_killed(*start_child(f"killed {runs}")):  # it may kill itself
        pass
    print(json.dumps(runs + 1))
"""

OUTER_LOOP = """
    def program(name, pipe):
        import jax, jax.numpy as jnp, numpy as np, optax

        jax.config.update("jax_enable_x64", True)
        x = jax.random.normal(jax.random.key(0), (20, 3))
        loss = lambda w, alpha, batch: jnp.mean((batch @ w - 1) ** 2)
        inner = lambda w, alpha, batch: loss(w, alpha, batch) + alpha @ w**2
        problem = hg.Bilevel(inner, loss, hg.Batches(x[:10], 2), x[10:])
        noise = optax.add_noise(0.1, 0.5, jax.random.key(3))
        loop = hg.OuterLoop(
            problem, hg.SABA(optax.sgd(0.05)), optax.chain(noise, optax.adam(0.1)),
            metrics={"m": lambda w, alpha, key: jax.random.normal(key)},
        )
        trace = loop.run(
            loop.init(jnp.zeros(3), jnp.ones(3)), num_steps=20,
            progress=lambda *_: os.write(pipe, b"."),
            checkpoints=hg.Checkpoints(folder + "/" + name),
        )
        is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        plain = lambda x: jax.random.key_data(x) if is_key(x) else x
        leaves = enumerate(map(plain, jax.tree.leaves(trace)))
        leaves = {str(i): np.asarray(leaf) for i, leaf in leaves}
        np.savez(folder + "/" + name + "/trace.npz", **leaves)
"""

COMMAND = """
    def program(name, pipe):
        sys.argv = ["hypergrad", "run", folder + "/quadratic.py", "--seeds", "2"]
        sys.argv += ["--out", folder + "/" + name]
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        from hypergrad import cli
        from hypergrad.bench import runner

        def append_row(path, row, append=runner.append_row):
            append(path, row)
            os.write(pipe, b".")

        runner.append_row = append_row
        try:
            cli.main()
        except SystemExit as error:
            assert not error.code
"""


def kill_repeatedly(
    program: str, folder: Path, num_kills: int, max_delay: float
) -> int:
    """Kills processes of a program and returns the number of runs that they made."""
    script = textwrap.dedent(program) + textwrap.dedent(SUPERVISOR)
    script = script.replace("MAX_DELAY", repr(max_delay))
    return json.loads(run_python(script, folder, num_kills).stdout)


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("num_kills", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_a_killed_run_with_checkpoints_ends_with_the_same_bits(
    num_kills: int, tmp_path
):
    """Trace, rows and state, with their dtypes."""
    num_runs = kill_repeatedly(OUTER_LOOP, tmp_path, num_kills, max_delay=0.3)
    traces = []
    for name in ["unbroken", *(f"killed {i}" for i in range(num_runs))]:
        with np.load(tmp_path / name / "trace.npz", allow_pickle=False) as trace:
            traces.append([(x.dtype, x.shape, x.tobytes()) for x in trace.values()])
    assert all(trace == traces[0] for trace in traces)


@pytest.mark.timeout(3000)
@pytest.mark.slow
@pytest.mark.parametrize("num_kills", [3, 60])
def test_a_killed_command_loses_and_doubles_no_row(num_kills: int, tmp_path):
    """All numbers except times are equal to the bit."""
    write_table(tmp_path)
    num_runs = kill_repeatedly(COMMAND, tmp_path, num_kills, max_delay=1.0)

    def read_numbers(name):
        rows = read_rows(tmp_path / name / "quadratic.jsonl")
        ignored = {"compile_seconds", "run_seconds", "time", "command"}
        return [{k: x for k, x in row.items() if k not in ignored} for row in rows]

    rows = read_numbers("unbroken")
    cells = [
        (row.get("stage"), row["method"], row.get("setting_index"), row["seed"])
        for row in rows
    ]
    assert len(set(cells)) == len(cells) == 10  # four tuning runs and six reported
    for i in range(num_runs):
        assert read_numbers(f"killed {i}") == rows
        assert (tmp_path / f"killed {i}" / "quadratic.md").exists()


PROGRESS_BAR = """
    import os, signal, sys
    from hypergrad.runtime.progress_bar import progress_bar

    number = int(sys.argv[1])
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)  # a parent may ignore it, as nohup does
    with progress_bar() as update:
        update(1, 2, "first")
        os.kill(os.getpid(), number)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGKILL"])
def test_a_killed_command_leaves_the_cursor_visible(name: str):
    number = signal.Signals[name]
    text, status = run_in_terminal(PROGRESS_BAR, int(number))
    assert status == -number
    assert "━" in text  # the bar
    assert text.rfind("\x1b[?25l") <= text.rfind("\x1b[?25h")  # hidden, shown
