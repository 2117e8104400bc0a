"""One compiled program: traces, jit and vmap, constants, and planned memory."""

import dataclasses
import functools
import logging
import re
import sys

import chex
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks.shared.reference_problems import (
    ReferenceProblem,
    error,
    logistic,
    quadratic,
    ridge,
)
from tests.loops import run_loop
from tests.parameters import slow_except
from tests.processes import run_python

hypergradient_module = sys.modules["hypergrad.hypergradient"]
SGD = optax.sgd(0.3)
ADAM = optax.adam(0.1)
SOLVER = hg.Descent(SGD, 20)
SETTINGS = {
    "CG": lambda x: hg.Implicit(SOLVER, hg.CG(rtol=1e-6 * x), 0.1 * x),
    "LU": lambda x: hg.Implicit(SOLVER, lx.LU(), 0.1 * x),
    "GMRES": lambda x: hg.Implicit(SOLVER, lx.GMRES(rtol=1e-6 * x, atol=1e-6), 0.1 * x),
    "Neumann": lambda x: hg.Implicit(SOLVER, hg.Neumann(5, 0.3 * x), 0.1 * x),
    "NystromCG": lambda x: hg.Implicit(SOLVER, hg.NystromCG(2, damping=0.1 * x)),
    "Newton": lambda x: hg.Implicit(hg.Newton(tolerance=1e-8 * x)),
    "Unrolled": lambda x: hg.Unrolled(SOLVER),
    "Reversible": lambda x: hg.Reversible(0.3 * x, 0.5, 9),
}


class TraceCounter:
    """A loss that counts how often Python runs it, which is when it is traced."""

    def __init__(self, loss):
        self.loss, self.count = loss, 0

    def __call__(self, w, alpha, batch):
        self.count += 1
        return self.loss(w, alpha, batch)


def count_traces(reference: ReferenceProblem) -> tuple[TraceCounter, TraceCounter]:
    problem = reference.problem
    return TraceCounter(problem.inner_loss), TraceCounter(problem.outer_loss)


def with_losses(losses, reference: ReferenceProblem) -> hg.Bilevel:
    return hg.Bilevel(
        *losses, reference.problem.inner_data, reference.problem.outer_data
    )


@functools.cache
def reference(seed: int = 0) -> ReferenceProblem:
    return logistic("per-weight", seed)


# Traces.


@pytest.mark.parametrize(
    "name", slow_except(SETTINGS, ["CG", "LU", "Unrolled", "Reversible"])
)
def test_new_numbers_trace_nothing(name: str):
    """New data, w, alpha, key and settings; the results are those of the new ones."""
    first, second = reference(1), reference(2)
    losses = count_traces(first)

    def estimate(reference, size, seed):
        gradient = hg.hypergradient(
            with_losses(losses, reference), SETTINGS[name](size)
        )
        return gradient(reference.w + size, reference.alpha, jax.random.key(seed))

    estimate(first, 1.0, 0)
    counts = [loss.count for loss in losses]
    assert max(counts) < 60
    actual = estimate(second, 0.7, 1)
    assert [loss.count for loss in losses] == counts
    gradient = hg.hypergradient(second.problem, SETTINGS[name](0.7))
    expected = gradient(second.w + 0.7, second.alpha, jax.random.key(1))
    assert error(actual.hypergradient, expected.hypergradient) < 1e-12


def test_new_numbers_of_a_run_trace_nothing():
    """New examples, bounds, arrays of a metric, keys and numbers of steps."""
    losses = count_traces(reference())
    metric = lambda scale, w, alpha, key: scale * jnp.sum(w)

    def run(seed, high, num_steps):
        problem = with_losses(losses, reference(seed))
        problem = hg.Bilevel(
            *losses, hg.Batches(problem.inner_data, 8), hg.Batches(problem.outer_data)
        )
        return hg.minimize(
            problem, hg.Implicit(SOLVER), ADAM, reference(seed).w,
            reference(seed).alpha, num_steps=num_steps, key=jax.random.key(seed),
            space=hg.spaces.Interval(-9.0, high),
            metrics={"m": jax.tree_util.Partial(metric, jnp.array(high))},
        )  # fmt: skip

    run(1, 1.0, 5)
    counts = [loss.count for loss in losses]
    trace = run(2, 2.0, 50)
    assert [loss.count for loss in losses] == counts
    np.testing.assert_allclose(trace.metrics["m"][-1], 2 * jnp.sum(trace.w), rtol=1e-9)


def test_kinds_of_numbers_trace_nothing_more():
    """w and alpha as Python floats, NumPy or JAX arrays of one shape and dtype."""
    scalar = quadratic("0-d")
    losses = count_traces(scalar)
    gradient = hg.hypergradient(with_losses(losses, scalar), SETTINGS["CG"](1))
    alpha = np.asarray(scalar.alpha)
    first = gradient(0.0, jnp.asarray(alpha))
    count = losses[0].count
    for w in (np.float64(0.0), jnp.zeros(()), jnp.asarray(0.0), np.zeros(())):
        other = gradient(w, alpha, jax.random.key(3))
        assert error(other.hypergradient, first.hypergradient) < 1e-12
    assert losses[0].count == count


def test_a_hypergradient_function_checks_its_problem_once_per_shape(monkeypatch):
    """Later calls only check that their numbers are not NaN."""
    scalar, calls = quadratic("0-d"), []
    monkeypatch.setattr(
        hypergradient_module, "check_init", lambda *args: calls.append(args)
    )
    gradient = hg.hypergradient(scalar.problem, SETTINGS["CG"](1))
    for w in (0.0, 1.0, 2.0):
        gradient(w, scalar.alpha)
    assert len(calls) == 1
    with pytest.raises(ValueError, match="w must"):
        gradient(jnp.nan, scalar.alpha)


def test_repeated_calls_convert_no_arrays_and_still_check_others(monkeypatch):
    """Only numbers, other shapes and other dtypes are converted and checked again."""
    conversions = []
    as_input_arrays = hypergradient_module.as_input_arrays

    def convert(w, alpha):
        conversions.append((w, alpha))
        return as_input_arrays(w, alpha)

    monkeypatch.setattr(hypergradient_module, "as_input_arrays", convert)
    gradient = hg.hypergradient(WIDE, hg.Implicit(hg.Newton()))
    alpha = jnp.zeros(2)
    for size in range(3):
        gradient(jnp.full(2, float(size), float), alpha)
    assert len(conversions) == 1
    gradient(jnp.zeros(3), jnp.zeros(3))
    assert len(conversions) == 2
    with pytest.raises(TypeError, match="w must be floating-point"):
        gradient(jnp.zeros(2, int), alpha)
    with pytest.raises(ValueError, match="alpha must not contain NaN"):
        gradient(jnp.zeros(2), alpha.at[1].set(jnp.nan))
    with pytest.raises(TypeError, match="inner_loss"):
        gradient(jnp.zeros(2), jnp.zeros(3))


@dataclasses.dataclass(frozen=True)
class ScaledLoss:
    """A loss that is compared by value."""

    scale: float

    def __call__(self, w, alpha, batch):
        return 0.5 * (w - self.scale * alpha) ** 2


def test_losses_that_are_compared_by_value_run_their_own_program():
    """w* = scale alpha and M = w^2 / 2 give scale^2; an equal loss traces nothing."""
    outer = TraceCounter(lambda w, alpha, batch: 0.5 * w**2)
    for scale in (1.0, 3.0, 1.0):
        count = outer.count
        problem = hg.Bilevel(ScaledLoss(scale), outer)
        gradient = hg.hypergradient(problem, hg.Implicit(hg.Newton()))
        assert gradient(0.0, 1.0).hypergradient == pytest.approx(scale**2)
    assert outer.count == count


def count_programs(caplog, name: str, run) -> tuple[int, int]:
    """Returns how many programs of a name JAX lowers and compiles in ``run()``."""
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        run()
    count = lambda verb: sum(
        bool(re.match(rf"{verb} (jit\()?{name}\b", x)) for x in caplog.messages
    )
    return count("Compiling"), count("Finished XLA compilation of")


@pytest.mark.parametrize(
    "option", ["none", "progress", "checkpoints", "limits", "budget"]
)
def test_the_options_of_a_run_compile_one_program_of_steps(option, caplog, tmp_path):
    """Whatever the host does between the blocks, and however long these are."""
    options = {
        "none": {},
        "progress": {"progress": lambda num_steps, value: None},
        "checkpoints": {"checkpoints": hg.Checkpoints(tmp_path / "run", every=4)},
        "limits": {"time_limit": 1e6, "memory_limit": 1e15},
        "budget": {"budget": 1e3},
    }[option]
    losses = count_traces(reference())  # nothing of an earlier run is reused
    problem = with_losses(losses, reference())
    loop = hg.OuterLoop(problem, hg.Implicit(SOLVER), ADAM)
    state = loop.init(reference().w, reference().alpha)
    run = lambda: loop.run(state, num_steps=21, **options)
    assert count_programs(caplog, "run_block", run) == (1, 1)
    continued = lambda: loop.run(state, num_steps=7, time_limit=1e6)
    assert count_programs(caplog, "run_block", continued) == (0, 0)


@pytest.mark.parametrize(
    "make_estimator",
    [
        lambda rate: hg.Implicit(hg.Descent(optax.sgd(rate), 5)),
        lambda rate: hg.Unrolled(hg.Descent(optax.adam(rate), 5)),
        lambda rate: hg.SOBA(optax.sgd(rate), adjoint_optimizer=optax.sgd(rate)),
    ],
    ids=["Implicit", "Unrolled", "SOBA"],
)
def test_optimizers_that_are_written_in_a_call_compile_nothing_again(
    make_estimator, caplog
):
    """Every call of ``optax.adam(0.1)`` returns other functions, but an equal rule."""
    x = reference()
    run = lambda rate, outer_rate: hg.minimize(
        x.problem,
        make_estimator(rate),
        optax.adam(outer_rate),
        x.w,
        x.alpha,
        num_steps=2,
    )
    run(0.1, 0.25)
    assert count_programs(caplog, "run_block", lambda: run(0.1, 0.25)) == (0, 0)
    assert count_programs(caplog, "init_state", lambda: run(0.1, 0.25)) == (0, 0)
    assert count_programs(caplog, "run_block", lambda: run(0.1, 0.5)) == (1, 1)
    assert count_programs(caplog, "run_block", lambda: run(0.2, 0.5)) == (1, 1)


def test_a_run_traces_each_loss_a_few_times():
    """The checks and one estimate, which the blocks of steps do not trace again."""
    losses = count_traces(reference())
    problem = with_losses(losses, reference())
    loop = hg.OuterLoop(problem, hg.Implicit(SOLVER), ADAM)
    state = loop.init(reference().w, reference().alpha)
    counts = [loss.count for loss in losses]
    assert max(counts) <= 8
    loop.run(state, num_steps=3)
    assert [loss.count for loss in losses] == counts


@pytest.mark.parametrize("options", [{}, {"estimate_error": False}], ids=str)
def test_an_estimate_without_batches_contains_no_random_generator(options):
    """Its loop of twenty kernels would take longer to compile than a product."""
    large = ridge("per-weight", n=20, d=12)  # too many parameters for a dense H
    estimator = hg.Implicit(SOLVER, **options)
    key = jax.random.key(0)

    def estimate(problem, w, alpha):
        state = estimator.init(problem, w, alpha)
        return estimator.estimate(problem, state, alpha, key)[0].hypergradient

    text = str(jax.make_jaxpr(estimate)(large.problem, large.w, large.alpha))
    assert "threefry" not in text
    assert "random_bits" not in text
    assert ("eigh" in text) == (not options)  # of more than one earlier solution


def test_a_second_process_takes_its_programs_from_the_persistent_cache(tmp_path):
    """Programs contain nothing that differs between processes, such as addresses."""
    script = """
        import jax, jax.numpy as jnp, optax
        import hypergrad as hg
        misses = []
        listen = lambda event, **kwargs: event.endswith("misses") and misses.append(1)
        jax.monitoring.register_event_listener(listen)
        inner = lambda w, alpha, batch: jnp.sum(jnp.cosh(w - alpha))
        outer = lambda w, alpha, batch: jnp.sum((w - 1) ** 2)
        problem = hg.Bilevel(inner, outer)
        estimator = hg.Implicit(hg.Descent(optax.sgd(0.1), 5))
        w, alpha = jnp.zeros(3), jnp.ones(3)
        hg.hypergradient(problem, estimator)(w, alpha)
        hg.minimize(problem, estimator, optax.adam(0.1), w, alpha, num_steps=3)
        print(len(misses))
    """
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    counts = [int(run_python(script, env=environment).stdout) for _ in range(2)]
    assert counts[0] > 2
    assert counts[1] == 0


# jit and vmap.


@pytest.mark.parametrize("name", ["CG", "Unrolled", "truncated"])
def test_jit_changes_no_estimate(name: str):
    """Op by op, compiled, and compiled within the caller's jit."""
    problem, w, alpha, *_ = reference()
    if name == "truncated":
        estimator = hg.Unrolled(SOLVER, truncation_length=6)
    else:
        estimator = SETTINGS[name](1.0)
    init_key, key = jax.random.split(jax.random.key(0))
    state = estimator.init(problem, w, alpha, init_key)
    estimate = functools.partial(estimator.estimate, problem, state)
    expected, _ = estimate(alpha, key)
    gradient = hg.hypergradient(problem, estimator)
    for actual in (
        gradient(w, alpha, jax.random.key(0)),
        jax.jit(gradient)(w, alpha, jax.random.key(0)),
    ):
        assert error(actual.hypergradient, expected.hypergradient) < 1e-10
        np.testing.assert_allclose(actual.value, expected.value, rtol=1e-12)
        assert set(actual.stats) == set(expected.stats)
        assert bool(actual.trusted) == bool(expected.trusted)


def with_batches(reference: ReferenceProblem) -> hg.Bilevel:
    problem = reference.problem
    return hg.Bilevel(
        problem.inner_loss, problem.outer_loss,
        hg.Batches(problem.inner_data, 8), problem.outer_data,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["LU", "NystromCG", "Unrolled"])
def test_vmap_over_keys_and_alphas_equals_a_loop(name: str):
    """Three keys with three alphas on mini-batches."""
    problem, w, alpha = with_batches(reference()), reference().w, reference().alpha
    gradient = hg.hypergradient(problem, SETTINGS[name](1.0))
    keys = jax.random.split(jax.random.key(0), 3)
    alphas = jnp.stack([alpha, alpha - 1, 0.5 * alpha])
    batch = jax.vmap(lambda alpha, key: gradient(w, alpha, key))(alphas, keys)
    for i, (alpha, key) in enumerate(zip(alphas, keys, strict=True)):
        expected = gradient(w, alpha, key)
        assert error(batch.hypergradient[i], expected.hypergradient) < 1e-9
        for name in ("num_hvps", "inner_grad_norm", "trusted"):
            actual = batch.stats[name][i]
            np.testing.assert_allclose(actual, expected.stats[name], rtol=1e-6)


@pytest.mark.slow
def test_vmap_over_settings_equals_a_loop():
    """Numbers in estimators, linear solvers and solvers are data."""
    problem, w, alpha, *_ = reference()
    make_estimators = {
        "damping": lambda x: hg.Implicit(SOLVER, damping=x),
        "step size": lambda x: hg.Implicit(SOLVER, hg.Neumann(7, x)),
        "rtol": lambda x: hg.Implicit(SOLVER, hg.CG(rtol=x)),
        "sketch": lambda x: hg.Implicit(SOLVER, hg.Nystrom(3, damping=x)),
        "tolerance": lambda x: hg.Implicit(hg.Newton(tolerance=1e-3 * x)),
        "rate": lambda x: hg.Reversible(0.3 * x, 0.5, 9),
    }
    values = jnp.array([0.5, 0.01])
    for name, make_estimator in make_estimators.items():
        estimate = lambda x, make_estimator=make_estimator: hg.hypergradient(
            problem, make_estimator(x)
        )(w, alpha)
        batch = jax.vmap(estimate)(values)
        for i, x in enumerate(values):
            expected = estimate(x)
            assert error(batch.hypergradient[i], expected.hypergradient) < 1e-9, name
            assert batch.stats["num_hvps"][i] == expected.stats["num_hvps"], name
        assert not np.allclose(*batch.hypergradient, rtol=1e-12), name


def test_vmap_over_problems_equals_a_loop():
    """Three data sets as one batch of problems."""
    references = [ridge("per-weight", seed) for seed in range(3)]
    problems = jax.tree.map(lambda *x: jnp.stack(x), *[x.problem for x in references])
    alpha = references[0].alpha
    estimator = hg.Implicit(hg.Descent(optax.sgd(0.5), 300))
    estimate = lambda problem: hg.hypergradient(problem, estimator)(jnp.zeros(6), alpha)
    batch = jax.vmap(estimate)(problems).hypergradient
    for actual, reference in zip(batch, references, strict=True):
        assert error(actual, reference.exact(alpha)) < 1e-9


def test_a_run_under_jit_and_vmap_equals_a_loop():
    """Over keys and starts: alpha, w, values, statistics, metrics and costs."""
    problem, w, alpha = with_batches(reference()), reference().w, reference().alpha

    def run(alpha, seed):
        return run_loop(
            problem, hg.Unrolled(SOLVER), ADAM, w, alpha, num_steps=6,
            key=jax.random.key(seed), eval_every=4,
            metrics={"norm": lambda w, alpha, key: jnp.sum(w**2)},
        )  # fmt: skip

    alphas, seeds = jnp.stack([alpha, alpha - 1]), jnp.arange(2)
    batch = jax.jit(jax.vmap(run))(alphas, seeds)
    for i in range(2):
        expected = run(alphas[i], i)
        for trace in (
            jax.tree.map(lambda x, i=i: x[i], batch),
            jax.jit(run)(alphas[i], i),
        ):
            results = lambda t: (t.alpha, t.w, t.best_alpha, t.value, t.metrics, t.cost)
            chex.assert_trees_all_close(results(trace), results(expected), rtol=1e-8)
            chex.assert_trees_all_close(trace.stats, expected.stats, rtol=1e-5)
            assert trace.status == "completed"


# Constants and copies in programs.


def constant_lengths(function, *args) -> list[int]:
    """Returns the lengths of the constants of a program, each in hexadecimal digits.

    JAX writes them into its text, or passes large ones as arguments beside it.
    """
    lowered = jax.jit(function).lower(*args)
    in_text = re.findall(r"dense<([^>]*)>", lowered.as_text())
    return [len(x) for x in in_text] + [
        2 * x.nbytes for x in lowered._lowering.const_args
    ]


@pytest.mark.parametrize("entry_point", ["hypergradient", "minimize"])
def test_data_is_not_a_constant_of_the_program(entry_point: str):
    """4,000 numbers of data are arguments; as a constant they would fill 64 kB."""
    large = ridge("per-weight", n=500, d=4)
    estimator = hg.Implicit(hg.Descent(SGD, 5))

    def run(problem, w, alpha):
        if entry_point == "hypergradient":
            return hg.hypergradient(problem, estimator)(w, alpha).hypergradient
        return hg.minimize(problem, estimator, ADAM, w, alpha, num_steps=3).alpha

    arguments = (large.problem, large.w, large.alpha)
    assert max(constant_lengths(run, *arguments), default=0) < 500
    closed_over = lambda w, alpha: run(large.problem, w, alpha)
    lengths = constant_lengths(closed_over, large.w, large.alpha)
    assert max(lengths) > 5_000  # so that the check detects constants


def data_copies(run, num_copies: int, *args) -> list[str]:
    """Returns the arrays of a program that are as large as several copies of data."""
    text = str(jax.make_jaxpr(run)(*args))
    shapes = {tuple(map(int, x.split(","))) for x in re.findall(r"\[([\d,]+)\]", text)}
    assert (17, 23) in shapes
    return [str(shape) for shape in shapes if np.prod(shape) >= num_copies * 17 * 23]


@pytest.mark.parametrize(
    "estimator",
    [
        hg.Implicit(SOLVER, hg.CG(rtol=1e-6)),
        hg.Implicit(hg.Newton(), hg.CG(rtol=1e-6)),
        hg.Implicit(SOLVER, hg.Neumann(5)),
        hg.Unrolled(SOLVER, checkpoint=True),  # 20 stored w exceed the data
    ],
    ids=["CG", "Newton", "Neumann", "Unrolled"],
)
def test_neither_several_losses_nor_a_batch_of_alphas_copies_the_data(estimator):
    """As `jax.lax.cond` would under vmap, if its branches read data."""
    x = np.linspace(-1.0, 1.0, 17 * 23).reshape(17, 23) ** 3
    data = x, np.sign(x[:, 0])

    def outer(w, alpha, batch, power=2):
        return jnp.mean(jnp.abs(batch[0] @ w - batch[1]) ** power)

    def inner(w, alpha, batch):
        return jnp.mean(jnp.logaddexp(0.0, -batch[1] * (batch[0] @ w))) + alpha @ w**2

    losses = tuple(functools.partial(outer, power=power) for power in (2, 4, 6))
    w, alpha = jnp.zeros(23), jnp.ones(23)
    run = lambda problem, alpha: (
        hg.hypergradient(problem, estimator)(w, alpha).hypergradient
    )
    several = hg.Bilevel(inner, losses, data, data)
    assert not data_copies(lambda alpha: run(several, alpha), 3, alpha)
    single = hg.Bilevel(inner, outer, data, data)
    alphas = jnp.stack([alpha, 2 * alpha, 3 * alpha])
    assert not data_copies(jax.vmap(lambda alpha: run(single, alpha)), 3, alphas)


# Memory, as the compiler plans it; nothing is run.

MILLION = 1_000_000


def temporary_bytes(f, *args) -> int:
    return hg.cost.memory(f, *args).temporaries


def wide_inner(w, alpha, batch):
    return jnp.sum(jnp.cosh(w - alpha) + 0.1 * w**2)


def wide_outer(w, alpha, batch):
    return jnp.sum((w - 1) ** 2)


WIDE = hg.Bilevel(wide_inner, wide_outer)


def hypergradient_bytes(estimator, size: int) -> int:
    w = jax.ShapeDtypeStruct((size,), jnp.float32)
    gradient = hg.hypergradient(WIDE, estimator)
    return temporary_bytes(lambda w, alpha: gradient(w, alpha).hypergradient, w, w)


@pytest.mark.parametrize(
    ("options", "num_vectors"),
    [
        ({"linear_solver": hg.CG()}, 12),
        ({"linear_solver": hg.Neumann(20)}, 12),
        ({"linear_solver": hg.Neumann(20, 0.5)}, 12),
        ({"linear_solver": hg.Identity()}, 12),
        ({"estimate_error": True}, 30),
    ],
    ids=["CG", "Neumann", "Neumann, step size", "Identity", "error estimate"],
)
def test_implicit_needs_few_vectors(options, num_vectors):
    """In addition to the inner solver's memory and to scalars."""
    w = jax.ShapeDtypeStruct((MILLION,), jnp.float32)
    solver = hg.Descent(optax.sgd(0.3, momentum=0.9), 50)
    estimator = hg.Implicit(solver, **({"estimate_error": False} | options))
    key = jax.random.key(0)

    def estimate(w, alpha):
        return estimator.estimate(WIDE, estimator.init(WIDE, w, alpha), alpha, key)

    def solve(w, alpha):
        return solver.solve(wide_inner, w, alpha, None, key)[0]

    extra = temporary_bytes(estimate, w, w) - temporary_bytes(solve, w, w)
    assert extra / (4 * MILLION) < num_vectors + 0.1


def test_the_memory_of_implicit_does_not_grow_with_the_inner_steps():
    """Except for the keys of the steps."""
    few, many = (
        hypergradient_bytes(hg.Implicit(hg.Descent(SGD, num_steps)), MILLION)
        for num_steps in (10, 10_000)
    )
    assert many <= few + 1_000_000


@functools.cache
def unrolled_bytes(num_steps: int, checkpoint: bool, truncation_length=None) -> int:
    estimator = hg.Unrolled(
        hg.Descent(SGD, num_steps),
        truncation_length=truncation_length,
        checkpoint=checkpoint,
    )
    return hypergradient_bytes(estimator, 10_000)


def test_the_memory_of_unrolling_grows_like_the_square_root():
    """16 times the steps need 4 times the bytes with checkpoints, 16 times without."""
    growth = {
        checkpoint: unrolled_bytes(1600, checkpoint) / unrolled_bytes(100, checkpoint)
        for checkpoint in (True, False)
    }
    assert growth[True] < 6
    assert 12 < growth[False] < 20
    assert unrolled_bytes(1600, True) < 0.15 * unrolled_bytes(1600, False)


def test_the_memory_of_truncated_unrolling_does_not_grow():
    """Ten of 100 or of 1,600 steps are stored."""
    few, many = unrolled_bytes(100, False, 10), unrolled_bytes(1600, False, 10)
    assert many < 1.1 * few + 100_000
    assert many < 0.05 * unrolled_bytes(1600, False)


def test_a_run_stores_only_scalars_per_step():
    """A thousand outer steps instead of ten add a row of at most 40 numbers each."""
    w = jax.ShapeDtypeStruct((10_000,), jnp.float32)
    estimator = hg.Implicit(hg.Descent(SGD, 5))

    def run_bytes(num_steps):
        minimize = lambda w, alpha: hg.minimize(
            WIDE, estimator, ADAM, w, alpha, num_steps=num_steps
        )
        return temporary_bytes(minimize, w, w)

    assert run_bytes(1000) - run_bytes(10) < 990 * 8 * 40


# A network with 784 inputs, 128 hidden units and 10 classes, and 10,000 inner steps.


def mlp_loss(w, alpha, batch):
    hidden = jax.nn.relu(batch["x"] @ w["W1"] + w["b1"][None])
    logits = hidden @ w["W2"] + w["b2"][None]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]))


def mlp_inner(w, alpha, batch):
    penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(w))
    return mlp_loss(w, alpha, batch) + jnp.exp(alpha) * penalty


def unroll_network(num_examples: int, batch_size: int):
    """Returns a function ``(problem, w, alpha) -> hypergradient`` and its arguments."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    w = {
        "W1": normal(784, 128) / 28, "b1": jnp.zeros(128, jnp.float32),
        "W2": normal(128, 10) / 11, "b2": jnp.zeros(10, jnp.float32),
    }  # fmt: skip
    y = jnp.asarray(rng.integers(10, size=num_examples), jnp.int32)
    data = {"x": normal(num_examples, 784), "y": y}
    problem = hg.Bilevel(mlp_inner, mlp_loss, hg.Batches(data, batch_size), data)
    estimator = hg.Unrolled(hg.Descent(optax.sgd(0.02, momentum=0.9), 10_000))
    run = lambda problem, w, alpha: (
        hg.hypergradient(problem, estimator)(w, alpha).hypergradient
    )
    return run, (problem, w, jnp.asarray(-8.0, jnp.float32))


def test_ten_thousand_steps_of_a_network_are_planned_in_half_a_gigabyte():
    """With momentum and batches of 128, in float32."""
    run, arguments = unroll_network(num_examples=2000, batch_size=128)
    assert temporary_bytes(run, *arguments) < 500e6


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_thousand_steps_of_a_network_run_in_a_gibibyte():
    """The peak resident memory of a process of its own."""
    script = """
        import re
        import jax, jax.numpy as jnp
        from tests.reliability.test_compilation import unroll_network
        run, arguments = unroll_network(num_examples=1000, batch_size=32)
        assert jnp.isfinite(jax.jit(run)(*arguments))
        # The peak of getrusage would include the process that started this one.
        peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())
        assert int(peak[1]) < 2**20, peak
    """
    run_python(script)
