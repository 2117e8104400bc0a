"""True kills, by SIGKILL at random moments: what was run ends as if it had one life."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from hypergrad import models
from hypergrad.studies import record

# One process imports what takes long and has no device yet, which would not survive a
# fork; each life is a child of it, killed unless it ends first.
LIVES = """
    import json, os, random, signal, sys, time

    import hypergrad as hg

    folder, kills = sys.argv[1], int(sys.argv[2])

    def life(name, told):
        import jax

        jax.config.update("jax_compilation_cache_dir", folder + "/programs")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        live(name, told)

    def born(name):
        heard, told = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(heard)
            status = 1
            try:
                life(name, told)
                status = 0
            finally:
                os._exit(status)
        os.close(told)
        return child, heard

    def dies(child, heard):
        _, status = os.waitpid(child, 0)
        os.close(heard)
        assert os.WIFSIGNALED(status) or status == 0, status
        return os.WIFSIGNALED(status)

    random = random.Random(0)
    dies(*born("unbroken"))
    done, rounds = 0, 0
    while done < kills:
        child, heard = born(f"killed {rounds}")
        if random.random() < 0.8:
            os.read(heard, 1)  # it is under way
        time.sleep(random.uniform(0, SPAN))
        os.kill(child, signal.SIGKILL)
        if dies(child, heard):
            done += 1
        else:
            rounds += 1
    while dies(*born(f"killed {rounds}")):  # by its own hand
        pass
    print(json.dumps(rounds + 1))
"""

RUN = """
    def live(name, told):
        import jax, jax.numpy as jnp, numpy as np, optax

        jax.config.update("jax_enable_x64", True)
        x = jax.random.normal(jax.random.key(0), (20, 3))
        loss = lambda w, alpha, batch: jnp.mean((batch @ w - 1) ** 2)
        inner = lambda w, alpha, batch: loss(w, alpha, batch) + alpha @ w**2
        problem = hg.Bilevel(inner, loss, hg.Batches(x[:10], 2), x[10:])
        noise = optax.add_noise(0.1, 0.5, jax.random.key(3))
        trace = hg.minimize(
            problem, hg.SABA(optax.sgd(0.05)), optax.chain(noise, optax.adam(0.1)),
            jnp.zeros(3), jnp.ones(3), num_steps=20,
            progress=lambda *_: os.write(told, b"."),
            metrics={"m": lambda w, alpha, key: jax.random.normal(key)},
            checkpoints=hg.Checkpoints(folder + "/" + name, every=1),
        )
        leaves = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(trace))}
        np.savez(folder + "/" + name + "/trace.npz", **leaves)
"""

STUDY = """
    def live(name, told):
        sys.argv = ["hypergrad", "run", "cleaning", "--seeds", "3"]
        sys.argv += ["--methods", "baseline"]
        sys.argv += ["--out", folder + "/" + name]
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        from hypergrad import cli, durable

        def dies_once(file, text, append=durable.append):
            if name == "unbroken" or os.path.exists(folder + "/died"):
                return append(file, text)
            open(folder + "/died", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)

        durable.append = dies_once  # between a model and its row
        from hypergrad.studies.table import hold

        table = sys.modules["hypergrad.studies.table"]
        table.hold = lambda *of: (hold(*of), os.write(told, b"."))
        cli.main()
"""


def lives(live: str, folder: Path, kills: int, **settings) -> int:
    """Kills lives and returns how many runs they were of."""
    script = textwrap.dedent(live) + textwrap.dedent(LIVES)
    for name, value in settings.items():
        script = script.replace(name, repr(value))
    ran = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(kills)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_a_run_with_checkpoints(kills: int, tmp_path):
    """Trace, rows and ledger to the bit, dtypes and all."""
    runs = lives(RUN, tmp_path, kills, SPAN=0.3)
    names = ["unbroken", *(f"killed {i}" for i in range(runs))]
    once = None
    for name in names:
        with np.load(tmp_path / name / "trace.npz", allow_pickle=False) as trace:
            found = [(x.dtype, x.shape, x.tobytes()) for x in trace.values()]
        once = once or found
        assert found == once


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_a_study_of_the_command_line(kills: int, tmp_path):
    """No row is lost or doubled; all numbers but seconds are the same to the bit.

    The model of the first seed is there once, its arrays to the bit, also where the
    kill came after the model and before its row.
    """
    runs = lives(STUDY, tmp_path, kills, SPAN=3.0)

    def rows(name):
        found = record.read(tmp_path / name / "cleaning.jsonl")
        for row in found:
            for other in ("compile_seconds", "run_seconds", "command"):
                row.pop(other, None)
        return found

    def kept(name):
        found, flaws = models.find(tmp_path / name / "models")
        assert not flaws
        return [(model.reference, model.sha256) for model in found]

    assert (tmp_path / "died").exists()
    assert [name for name, _ in kept("unbroken")] == ["cleaning-baseline@1"]
    once = rows("unbroken")
    assert len({(row["method"], row["seed"]) for row in once}) == len(once) == 3
    for i in range(runs):
        assert rows(f"killed {i}") == once
        assert kept(f"killed {i}") == kept("unbroken")
        assert (tmp_path / f"killed {i}" / "cleaning.md").exists()
