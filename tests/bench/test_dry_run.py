"""`hypergrad run NAME --dry-run`: what it prints is what a run then counts."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad import cli
from hypergrad.products import hvp, hvp_and_cross_vjp
from hypergrad.studies import STUDIES, cleaning, rehearsal
from hypergrad.studies import program as programs
from hypergrad.studies.program import Program
from hypergrad.studies.study import digits
from hypergrad.tasks.cleaning import SOLVER

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
pytestmark = pytest.mark.usefixtures("single_precision")


def committed(name: str) -> dict[str, dict]:
    """Rows of seed 0 that a run once wrote."""
    lines = (RESULTS / f"{name}.jsonl").read_text().splitlines()
    rows = map(json.loads, lines)
    return {row["method"]: row for row in rows if row["seed"] == 0}


def expected_costs(name: str, methods) -> int:
    """Compares those that are known without a run; how many there are.

    What a row computes, a program of its own does.
    """
    known, rows = 0, committed(name)
    for method in methods:
        found, plans = rehearsal.plan_row(STUDIES[name], method)
        assert plans, method
        for column in rehearsal.COSTS:
            value = found.get(column)
            if value is not None and np.isfinite(value):
                np.testing.assert_allclose(
                    value, rows[method][column], rtol=1e-6, err_msg=f"{name}, {method}"
                )
                known += 1
    return known


def test_gradient_equivalents_are_those_that_runs_counted():
    """Three methods of fixed length, each with its tuning; one stops by tolerance."""
    methods = ("neumann", "unrolled", "implicit", "random search")
    assert expected_costs("cleaning", methods) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "methods"),
    {  # of each method how many costs are known: of the run, and of tuning if it is
        "architecture": {"baseline": 2, "random search": 1, "DARTS, first order": 2},
        "augmentation": {"baseline": 2, "one magnitude": 2},
        "federated": {"global, neumann": 2, "global": 0, "validation-only": 0},
        "few_shot": {"maml": 2},
        "penalties": {"logistic, baseline": 2, "logistic, unrolled": 2},
        "physics": {"poisson, one weight": 2, "poisson, random search": 1},
        "reinforcement": {"mrp, one discount": 0, "mrp, unrolled": 1},
        "schedules": {"100 steps, baseline": 2, "100 steps, unrolled": 2},
        "self_supervised": {"baseline": 1, "random search": 1},
        "semi_supervised": {"one weight": 0, "neumann": 2},
        "unsupervised": {"kde, random search": 1, "kde, implicit": 0},
    }.items(),
)
def test_gradient_equivalents_of_other_studies(name: str, methods: dict[str, int]):
    """None contradicts what was committed; a tolerance leaves both unknown."""
    for method, known in methods.items():
        assert expected_costs(name, (method,)) == known, method


def test_a_rehearsal_leaves_no_zeros_behind():
    """What a process keeps once made is made anew in a rehearsal, and after it."""
    double = programs.program(lambda x: 2 * x)
    doubled = programs.CachedFunction(lambda x: float(double(x)))
    for _ in range(2):
        with rehearsal.rehearsal() as plans:
            assert doubled(3.0) == doubled(3.0) == 0.0
        assert [one.calls for one in plans.values()] == [1]
    assert doubled(3.0) == 6.0
    assert not rehearsal.is_rehearsed()


def test_what_has_no_price_is_said(capsys):
    """Eigenvalues are in no count, and no loop of theirs is."""
    cli.run("unsupervised", ("ppca, baseline",), dry_run=True)
    shown = " ".join(capsys.readouterr().out.split())
    for name in ("one_for_all", "evaluate"):
        assert f"- ppca, baseline: {name}: not among the FLOPs: eigh" in shown


def test_operations_are_those_that_the_run_counts():
    """Its calls times the operations of each, pieced together by hand: within 10%."""
    key = jax.random.key(0)
    run_config = key, jnp.float32(1e-3), jnp.asarray(False)
    task, _ = cleaning.make_task_and_splits(digits(), run_config)
    problem, w, alpha = task.problem, task.w, task.alpha
    inner, outer = problem.inner_data, problem.outer_data
    of = lambda function, *args: hg.cost.flops(function, *args).total()
    gradient = of(jax.grad(problem.inner_loss), w, alpha, inner)
    product = of(functools.partial(hvp, problem.inner_loss), w, alpha, inner, w)
    last = of(
        functools.partial(hvp_and_cross_vjp, problem.inner_loss), w, alpha, inner, w
    )
    outer_gradient = of(jax.grad(problem.outer_loss), w, alpha, outer)

    def step(w, alpha):
        carry = SOLVER.init(problem.inner_loss, w, alpha, inner, key)
        return SOLVER.step(problem.inner_loss, carry, alpha, inner, key)[0]

    def step_and_back(w, alpha):
        after, pullback = jax.vjp(step, w, alpha)
        return after, pullback(w)

    for method in ("neumann", "unrolled"):
        plan = rehearsal.plan(
            functools.partial(cleaning.learn, method), (digits(), run_config)
        )
        learn = Program(functools.partial(cleaning.learn, method))
        stats = learn(digits(), run_config)["trace"].stats
        made = {
            name: float(jnp.sum(stats[name]))
            for name in ("num_grads", "num_hvps", "num_outer_grads")
        }
        counted = made["num_outer_grads"] * outer_gradient
        if method == "neumann":  # of a solve's products the last has a cross term
            counted += made["num_grads"] * gradient + plan.steps * last
            counted += (made["num_hvps"] - plan.steps) * product
        else:  # each of T steps is made, made again, and pulled back
            twice = of(step, w, alpha) + of(step_and_back, w, alpha)
            counted += made["num_hvps"] * twice
        assert plan.total == pytest.approx(counted, rel=0.1), method


@pytest.mark.slow
def test_a_tolerance_is_said_with_the_cost_of_an_iteration(capsys):
    """An iteration of CG is a product; the outer loop's length is known."""
    cli.run("cleaning", ("implicit",), dry_run=True)
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("tolerance") == 3 + 1 + 2  # cells of either program, and notes
    assert "a tolerance decides how many FLOPs; an iteration of each of its" in shown
    steps = len(committed("cleaning")["implicit"]["curve_value"])
    assert re.search(rf"in outer_step.py\S* \(run_block\), {steps} times", shown)
    assert re.search(r"4e\+06 in cg.py", shown)  # 1,000 examples, 64 x 10 weights


@pytest.mark.slow
def test_nothing_is_run_and_nothing_written(monkeypatch, tmp_path, capsys):
    """No compiled program of a study is called, and no trial of a search."""
    refuse = lambda *_, **__: pytest.fail("a program was run")
    monkeypatch.setattr(jax.stages.Compiled, "__call__", refuse)
    monkeypatch.setattr(programs, "search_by_trials", refuse)
    methods = ("neumann", "random search")
    cli.run("cleaning", methods, out=tmp_path / "none", dry_run=True)
    shown = " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())
    # As many trials as a run made, for each of three settings and at the end.
    trials = 4 * len(committed("cleaning")["random search"]["curve_value"])
    assert re.search(rf"random search \W* trial \W* {trials} ", shown)
    assert not rehearsal.is_rehearsed()


def test_what_depends_on_numbers_has_no_expected_cost():
    """A column that is filled from data is NaN; one from the step's number is not."""

    def run(x):
        def body(carry):
            i, row, other = carry
            return i + 1, row.at[i].set(3.0 * i), other.at[i].set(x)

        start = jnp.asarray(0), jnp.zeros(4), jnp.zeros(4)
        return jax.lax.while_loop(lambda carry: carry[0] < 4, body, start)

    jaxpr = jax.make_jaxpr(jax.jit(run))(1.0)
    assert rehearsal.predict_cost(jaxpr, 1).tolist() == [0.0, 3.0, 6.0, 9.0]
    assert jnp.all(jnp.isnan(rehearsal.predict_cost(jaxpr, 2)))
    passed = jax.make_jaxpr(lambda x: x)(jnp.zeros(4))
    assert jnp.all(jnp.isnan(rehearsal.predict_cost(passed, 0)))


MEMORY = """
import re
import jax, jax.numpy as jnp, optax, hypergrad as hg
from hypergrad.studies import rehearsal

x = jax.random.normal(jax.random.key(0), (64, 4000))
loss = lambda w, alpha, batch: jnp.mean((batch @ w) ** 2) + alpha * jnp.mean(w**2)
problem = hg.Bilevel(loss, lambda w, alpha, batch: jnp.mean(w**2), x)
estimator = hg.Unrolled(hg.Descent(optax.adam(1e-3), 100), checkpoint=False)

def run(problem, w, alpha):
    return hg.hypergradient(problem, estimator)(w, alpha).hypergradient

arguments = problem, jnp.ones((4000, 100)), jnp.ones(())
plan = rehearsal.plan(run, arguments)
program = jax.jit(run).lower(*arguments).compile()
now = lambda name: 1024 * int(
    re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]
)
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = now("VmRSS")
jax.block_until_ready(program(*arguments))
print(plan.memory.temporaries, now("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_temporary_bytes_are_what_a_run_takes():
    """The rise of the peak in a process of its own, of some hundreds of megabytes."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    planned, measured = map(int, done.stdout.split())
    assert planned > 2**27
    assert planned == pytest.approx(measured, rel=0.25)
