"""One compiled program: trace counts, jit and vmap, constants, memory."""

import dataclasses
import functools
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks.known import (
    Known,
    any_known,
    error,
    logistic,
    logistic_inner,
    logistic_outer,
    quadratic,
    ridge,
)
from hypergrad.hypergradient import _Setting
from tests.loops import run_loop


class Counted:
    """A loss that counts how often Python runs it, which is when it is traced."""

    def __init__(self, loss):
        self.loss, self.count = loss, 0

    def __call__(self, w, alpha, batch):
        self.count += 1
        return self.loss(w, alpha, batch)


def counted(known: Known) -> tuple[Counted, Counted]:
    return Counted(known.problem.inner_loss), Counted(known.problem.outer_loss)


@functools.cache
def sgd(step: float) -> optax.GradientTransformation:
    return optax.sgd(step)


SOLVER = hg.Descent(sgd(0.3), 20)
ADAM = optax.adam(0.1)
SETTINGS = {
    "CG": lambda x: hg.Implicit(SOLVER, hg.CG(rtol=1e-6 * x), 0.1 * x),
    "LU": lambda x: hg.Implicit(SOLVER, lx.LU(), 0.1 * x),
    "GMRES": lambda x: hg.Implicit(SOLVER, lx.GMRES(rtol=1e-6 * x, atol=1e-6), 0.1 * x),
    "Neumann": lambda x: hg.Implicit(SOLVER, hg.Neumann(5, 0.3 * x), 0.1 * x),
    "NystromCG": lambda x: hg.Implicit(SOLVER, hg.NystromCG(2, damping=0.1 * x)),
    "Newton": lambda x: hg.Implicit(hg.Newton(tolerance=1e-8 * x)),
    "Unrolled": lambda x: hg.Unrolled(SOLVER),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_traces_each_loss_a_constant_number_of_times(name: str):
    """Ten steps and a hundred: the same count, which a re-trace a step would exceed."""
    counts = []
    for num_steps in (10, 100):
        known = logistic("per-weight")
        inner, outer = counted(known)
        problem = hg.Bilevel(
            inner, outer, known.problem.inner_data, known.problem.outer_data
        )
        estimator = SETTINGS[name](1.0)
        hg.minimize(problem, estimator, ADAM, known.w, known.alpha, num_steps=num_steps)
        counts.append((inner.count, outer.count))
    assert counts[0] == counts[1]
    assert max(counts[0]) < 60


@pytest.mark.parametrize("name", SETTINGS)
def test_other_numbers_trace_nothing(name: str):
    """New data, w, alpha, key and settings; and the results are those of the new."""
    first, second = logistic("per-weight", seed=1), logistic("per-weight", seed=2)
    inner, outer = counted(first)

    def problem(known):
        return hg.Bilevel(
            inner, outer, known.problem.inner_data, known.problem.outer_data
        )

    def run(known, size, seed):
        return hg.minimize(
            problem(known), SETTINGS[name](size), ADAM, known.w + size, known.alpha,
            num_steps=5, key=jax.random.key(seed),
        )  # fmt: skip

    def one(known, size, seed):
        gradient = hg.hypergradient(problem(known), SETTINGS[name](size))
        return gradient(known.w + size, known.alpha, jax.random.key(seed))

    run(first, 1.0, 0), one(first, 1.0, 0)
    before = inner.count, outer.count
    trace, estimate = run(second, 0.7, 1), one(second, 0.7, 1)
    assert (inner.count, outer.count) == before
    gradient = hg.hypergradient(second.problem, SETTINGS[name](0.7))
    afresh = gradient(second.w + 0.7, second.alpha, jax.random.key(1))
    assert error(estimate.hypergradient, afresh.hypergradient) < 1e-12
    np.testing.assert_allclose(trace.value[0], afresh.value, rtol=1e-12)


def test_kinds_of_numbers_trace_nothing_more():
    """w and alpha as Python floats, NumPy or jax arrays of one shape and dtype."""
    inner, outer = counted(quadratic("0-d"))
    known = quadratic("0-d")
    data = known.problem.inner_data
    gradient = hg.hypergradient(hg.Bilevel(inner, outer, data, data), SETTINGS["CG"](1))
    alpha = np.asarray(known.alpha)
    first = gradient(0.0, jnp.asarray(alpha))
    count = inner.count
    for w in (np.float64(0.0), jnp.zeros(()), jnp.asarray(0.0), np.zeros(())):
        again = gradient(w, alpha, jax.random.key(3))
        assert error(again.hypergradient, first.hypergradient) < 1e-12
    assert inner.count == count


def test_a_ready_hypergradient_is_rehearsed_once_a_shape(monkeypatch):
    """Later calls do no more in Python than look at their numbers."""
    known, seen = quadratic("0-d"), []
    monkeypatch.setattr(
        "hypergrad.gradient.rehearse", lambda *given: seen.append(given)
    )
    gradient = hg.hypergradient(known.problem, SETTINGS["CG"](1))
    for w in (0.0, 1.0, 2.0):
        gradient(w, known.alpha)
    assert len(seen) == 1
    with pytest.raises(ValueError, match="NaN"):
        gradient(jnp.nan, known.alpha)


def test_settings_of_other_losses_have_other_hashes():
    """Else a call would be compared to all that were ever made; equal ones share."""

    def hashed(loss, num_steps=5):
        estimator = hg.Unrolled(hg.Descent(sgd(0.3), num_steps))
        settings = estimator, hg.Bilevel(loss, wide_outer)
        return hash(_Setting(None, settings))

    losses = [lambda w, alpha, batch, i=i: i * (w - alpha) ** 2 for i in range(20)]
    assert len({hashed(loss) for loss in losses}) == 20
    assert hashed(losses[0]) == hashed(losses[0]) != hashed(losses[0], 6)


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A loss that is compared by value."""

    scale: float

    def __call__(self, w, alpha, batch):
        return 0.5 * (w - self.scale * alpha) ** 2


def test_losses_compared_by_value_run_their_own_program():
    """``w* = scale alpha``, ``M = w²/2``: scale², and no trace for an equal one."""
    estimator = hg.Implicit(hg.Newton())
    outer = Counted(lambda w, alpha, batch: 0.5 * w**2)
    for scale in (1.0, 3.0, 1.0):
        before = outer.count
        gradient = hg.hypergradient(hg.Bilevel(Scaled(scale), outer), estimator)
        found = gradient(0.0, 1.0).hypergradient
        assert found == pytest.approx(scale**2)
    assert outer.count == before


def test_spaces_and_batches_trace_nothing_more():
    """New bounds, new examples in Batches, a new metric's array."""
    inner, outer = counted(logistic("per-weight"))
    metric = lambda scale, w, alpha, key: scale * jnp.sum(w)

    def run(seed, high):
        known = logistic("per-weight", seed)
        train = hg.Batches(known.problem.inner_data, 8)
        val = hg.Batches(known.problem.outer_data)
        return hg.minimize(
            hg.Bilevel(inner, outer, train, val), hg.Implicit(SOLVER), ADAM,
            known.w, known.alpha, num_steps=5, key=jax.random.key(seed),
            space=hg.spaces.Interval(-9.0, high),
            metrics={"m": jax.tree_util.Partial(metric, jnp.array(high))},
        )  # fmt: skip

    run(1, 1.0)
    count = inner.count, outer.count
    trace = run(2, 2.0)
    assert (inner.count, outer.count) == count
    assert float(trace.metrics["m"][-1]) == pytest.approx(2.0 * float(jnp.sum(trace.w)))


def test_progress_traces_a_constant_number_of_times():
    """Chunks of one length and a rest: the count does not grow with the steps."""
    counts = []
    for num_steps in (41, 401):
        known = ridge("scalar")
        inner, outer = counted(known)
        data = known.problem.inner_data, known.problem.outer_data
        hg.minimize(
            hg.Bilevel(inner, outer, *data), hg.Implicit(hg.Descent(sgd(0.3), 3)),
            ADAM, known.w, known.alpha, num_steps=num_steps,
            progress=lambda done, value: None,
        )  # fmt: skip
        counts.append((inner.count, outer.count))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", [*SETTINGS, "last"])
def test_equal_with_and_without_jit(name: str):
    """The estimate op by op, compiled, and compiled within the caller's jit."""
    known = logistic("per-weight")
    estimator = (
        hg.Unrolled(SOLVER, truncation_length=6)
        if name == "last"
        else SETTINGS[name](1.0)
    )
    init_key, key = jax.random.split(jax.random.key(0))
    state = estimator.init(known.problem, known.w, known.alpha, init_key)
    estimate = functools.partial(estimator.estimate, known.problem, state)
    bare, _ = estimate(known.alpha, key)
    compiled, _ = jax.jit(estimate)(known.alpha, key)
    gradient = hg.hypergradient(known.problem, estimator)
    own = gradient(known.w, known.alpha, jax.random.key(0))
    nested = jax.jit(gradient)(known.w, known.alpha, jax.random.key(0))
    for other in (compiled, own, nested):
        assert error(other.hypergradient, bare.hypergradient) < 1e-10
        np.testing.assert_allclose(other.value, bare.value, rtol=1e-12)
        assert set(other.stats) == set(bare.stats)
        assert bool(other.stats["trusted"]) == bool(bare.stats["trusted"])


# vmap.


def noisy_problem(known: Known) -> hg.Bilevel:
    train = hg.Batches(known.problem.inner_data, 8)
    return hg.Bilevel(
        known.problem.inner_loss,
        known.problem.outer_loss,
        train,
        known.problem.outer_data,
    )


@pytest.mark.parametrize("name", ["CG", "LU", "Neumann", "NystromCG", "Unrolled"])
def test_vmap_over_seeds_and_alphas_is_a_loop(name: str):
    """Mini-batches: three keys at once, three alphas at once, and both."""
    known = logistic("per-weight")
    gradient = hg.hypergradient(noisy_problem(known), SETTINGS[name](1.0))
    one = lambda alpha, seed: gradient(known.w, alpha, jax.random.key(seed))
    alphas = jnp.stack([known.alpha, known.alpha - 1, 0.5 * known.alpha])
    seeds = jnp.arange(3)
    loop = [one(alpha, seed) for alpha, seed in zip(alphas, seeds, strict=True)]
    found = jax.vmap(one)(alphas, seeds)
    for i, single in enumerate(loop):
        assert error(found.hypergradient[i], single.hypergradient) < 1e-9
        for stat in ("num_hvps", "inner_grad_norm", "trusted"):
            np.testing.assert_allclose(
                found.stats[stat][i], single.stats[stat], rtol=1e-6
            )
    found = jax.vmap(lambda seed: one(known.alpha, seed))(seeds)
    assert error(found.hypergradient[0], loop[0].hypergradient) < 1e-9
    assert not np.allclose(found.hypergradient[0], found.hypergradient[1])


def test_vmap_over_settings_is_a_loop():
    """Dampings, step sizes of a series, tolerances: numbers in estimators are data."""
    known = logistic("per-weight")
    builders = {
        "damping": lambda x: hg.Implicit(SOLVER, damping=x),
        "step size": lambda x: hg.Implicit(SOLVER, hg.Neumann(7, x)),
        "rtol": lambda x: hg.Implicit(SOLVER, hg.CG(rtol=x)),
        "sketch": lambda x: hg.Implicit(SOLVER, hg.Nystrom(3, damping=x)),
        "tolerance": lambda x: hg.Implicit(hg.Newton(tolerance=1e-3 * x)),
    }
    values = jnp.array([0.5, 0.1, 0.01])
    for build in builders.values():
        one = lambda x, build=build: hg.hypergradient(known.problem, build(x))(
            known.w, known.alpha
        )
        found = jax.vmap(one)(values)
        for i, x in enumerate(values):
            single = one(x)
            assert error(found.hypergradient[i], single.hypergradient) < 1e-9
            assert found.stats["num_hvps"][i] == single.stats["num_hvps"]
        assert not np.allclose(found.hypergradient[0], found.hypergradient[2], 1e-12)


def test_vmap_over_problems_is_a_loop():
    """Three data sets as one batch of problems."""
    tasks = [ridge("per-weight", seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *[task.problem for task in tasks])
    alpha = tasks[0].alpha
    estimator = hg.Implicit(hg.Descent(sgd(0.5), 300))
    one = lambda problem: hg.hypergradient(problem, estimator)(jnp.zeros(6), alpha)
    found = jax.vmap(one)(stacked).hypergradient
    for i, task in enumerate(tasks):
        assert error(found[i], task.exact(alpha)) < 1e-9


@pytest.mark.parametrize("name", ["CG", "Unrolled"])
def test_minimize_under_jit_and_vmap_is_a_loop(name: str):
    """Seeds and starts; final alpha and w, every value, every stat and the cost."""
    known = logistic("per-weight")
    problem = noisy_problem(known)
    estimator = SETTINGS[name](1.0)

    def run(alpha, seed):
        return run_loop(
            problem, estimator, ADAM, known.w, alpha,
            num_steps=6, key=jax.random.key(seed),
            metrics={"norm": lambda w, alpha, key: jnp.sum(w**2)}, eval_every=4,
        )  # fmt: skip

    alphas = jnp.stack([known.alpha, known.alpha - 1])
    seeds = jnp.arange(2)
    found = jax.jit(jax.vmap(run))(alphas, seeds)
    assert found.value.shape == found.cost.shape == (2, 6)
    for i in range(2):
        single = run(alphas[i], i)
        nested = jax.jit(run)(alphas[i], i)
        for other in (jax.tree.map(lambda x, i=i: x[i], found), nested):
            assert error(other.alpha, single.alpha) < 1e-8
            assert error(other.w, single.w) < 1e-8
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-9),
                (other.value, other.stats["num_hvps"], other.metrics, other.cost),
                (single.value, single.stats["num_hvps"], single.metrics, single.cost),
            )
            assert other.status_code == 0


# What is in the program.


def literals(text: str) -> list[int]:
    """Lengths of the constants in a program's text."""
    return [len(found) for found in re.findall(r"dense<([^>]*)>", text)]


@pytest.mark.parametrize("method", ["hypergradient", "minimize"])
def test_data_is_no_constant_of_the_program(method: str):
    """4,000 numbers of data are arguments; as a constant they would fill 64 kB."""
    known = ridge("per-weight", n=500, d=4)
    estimator = hg.Implicit(hg.Descent(sgd(0.3), 5))

    def f(problem, w, alpha):
        if method == "hypergradient":
            return hg.hypergradient(problem, estimator)(w, alpha).hypergradient
        return hg.minimize(problem, estimator, ADAM, w, alpha, num_steps=3).alpha

    text = jax.jit(f).lower(known.problem, known.w, known.alpha).as_text()
    assert max(literals(text), default=0) < 500
    closed = lambda w, alpha: f(known.problem, w, alpha)
    text = jax.jit(closed).lower(known.w, known.alpha).as_text()
    assert max(literals(text)) > 5_000  # the detector sees one where there is one


def copies_of_data(run, count: int, *args) -> list[str]:
    """Arrays of a program that are as large as so many copies of the data."""
    text = str(jax.make_jaxpr(run)(*args))
    shapes = {tuple(map(int, x.split(","))) for x in re.findall(r"\[([\d,]+)\]", text)}
    assert (17, 23) in shapes
    return sorted(str(x) for x in shapes if np.prod(x) >= count * 17 * 23)


@pytest.mark.parametrize(
    "estimator",
    [
        hg.Implicit(SOLVER, hg.CG(rtol=1e-6)),
        hg.Implicit(hg.Newton(), hg.CG(rtol=1e-6)),
        hg.Implicit(SOLVER, hg.Neumann(5)),
        hg.Unrolled(SOLVER),
    ],
    ids=["CG", "Newton", "Neumann", "Unrolled"],
)
def test_neither_several_losses_nor_alphas_side_by_side_copy_data(estimator):
    """What `jax.lax.cond` does under vmap where its branches read data."""
    x = np.linspace(-1.0, 1.0, 17 * 23).reshape(17, 23) ** 3
    y = np.sign(x[:, 0])

    def outer(w, alpha, batch, power=2):
        return jnp.mean(jnp.abs(batch[0] @ w - batch[1]) ** power)

    def inner(w, alpha, batch):
        return jnp.mean(jnp.logaddexp(0.0, -batch[1] * (batch[0] @ w))) + alpha @ w**2

    losses = tuple(functools.partial(outer, power=power) for power in (2, 4, 6))
    several = hg.Bilevel(inner, losses, (x, y), (x, y))
    one = hg.Bilevel(inner, outer, (x, y), (x, y))
    w, alpha = jnp.zeros(23), jnp.ones(23)
    run = lambda problem, alpha: (
        hg.hypergradient(problem, estimator)(w, alpha).hypergradient
    )
    assert not copies_of_data(lambda alpha: run(several, alpha), 3, alpha)
    alphas = jnp.stack([alpha, 2 * alpha, 3 * alpha])
    side_by_side = jax.vmap(lambda alpha: run(one, alpha))
    assert not copies_of_data(side_by_side, 3, alphas)
    found = run(several, alpha)
    for i, loss in enumerate(losses):
        alone = run(hg.Bilevel(inner, loss, (x, y), (x, y)), alpha)
        np.testing.assert_allclose(found[i], alone, rtol=1e-10, atol=1e-14)


def test_a_sampler_over_arrays_is_refused():
    """data_fn=lambda key: big[...] would bake 8 kB into the program."""
    big = jnp.zeros(1000)
    with pytest.raises(ValueError, match="closes over 8,000 bytes"):
        hg.Bilevel(logistic_inner, logistic_outer, data_fn=lambda key: (big, big[:10]))


# Memory, as the compiler plans it.


def temporary(f, *args) -> int:
    """Bytes of temporaries of the compiled program; nothing is run."""
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes


MILLION = 1_000_000


def wide_inner(w, alpha, batch):
    return jnp.sum(jnp.cosh(w - alpha) + 0.1 * w**2)


def wide_outer(w, alpha, batch):
    return jnp.sum((w - 1) ** 2)


@pytest.mark.parametrize(
    "linear",
    [hg.CG(), hg.Neumann(20), hg.Neumann(20, 0.5), hg.Identity()],
    ids=["CG", "Neumann", "Neumann step", "Identity"],
)
def test_implicit_needs_a_dozen_vectors(linear):
    """A million parameters: beyond the inner solver's, at most 12 vectors of 4 MB."""
    problem = hg.Bilevel(wide_inner, wide_outer)
    w = alpha = jax.ShapeDtypeStruct((MILLION,), jnp.float32)
    solver = hg.Descent(optax.sgd(0.3, momentum=0.9), 50)
    estimator = hg.Implicit(solver, linear)
    key = jax.random.key(0)

    def whole(w, alpha):
        state = estimator.init(problem, w, alpha)
        found, state = estimator.estimate(problem, state, alpha, key)
        return found, state

    def inner(w, alpha):
        return solver.solve(wide_inner, w, alpha, None, key)[0]

    beyond = temporary(whole, w, alpha) - temporary(inner, w, alpha)
    assert beyond <= 12 * 4 * MILLION


def test_implicit_is_flat_in_the_inner_steps():
    """Ten steps and ten thousand: the same temporaries, up to the keys of the steps."""
    problem = hg.Bilevel(wide_inner, wide_outer)
    w = alpha = jax.ShapeDtypeStruct((MILLION,), jnp.float32)

    def planned(num_steps):
        estimator = hg.Implicit(hg.Descent(sgd(0.3), num_steps))
        gradient = hg.hypergradient(problem, estimator)
        return temporary(lambda w, alpha: gradient(w, alpha).hypergradient, w, alpha)

    assert planned(10_000) <= planned(10) + 1_000_000


@functools.cache
def unrolled_bytes(num_steps: int, checkpoint: bool, last: int | None = None) -> int:
    size = 10_000
    problem = hg.Bilevel(wide_inner, wide_outer)
    w = alpha = jax.ShapeDtypeStruct((size,), jnp.float32)
    solver = hg.Descent(sgd(0.1), num_steps)
    estimator = hg.Unrolled(solver, truncation_length=last, checkpoint=checkpoint)
    gradient = hg.hypergradient(problem, estimator)
    return temporary(lambda w, alpha: gradient(w, alpha).hypergradient, w, alpha)


def test_checkpoints_make_memory_grow_like_the_root():
    """16 times the steps: 4 times the bytes with checkpoints, 16 times without."""
    growth = {
        checkpoint: unrolled_bytes(1600, checkpoint) / unrolled_bytes(100, checkpoint)
        for checkpoint in (True, False)
    }
    assert growth[True] < 6
    assert 12 < growth[False] < 20
    assert unrolled_bytes(1600, True) < 0.15 * unrolled_bytes(1600, False)


def test_truncation_makes_memory_flat():
    """truncation_length=10 stores ten steps, whether 100 or 1,600 are run."""
    few, many = unrolled_bytes(100, False, 10), unrolled_bytes(1600, False, 10)
    assert many < 1.1 * few + 100_000
    assert many < 0.05 * unrolled_bytes(1600, False)


def mlp_loss(w, alpha, batch):
    hidden = jax.nn.relu(batch["x"] @ w["W1"] + w["b1"][None])
    logits = hidden @ w["W2"] + w["b2"][None]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]))


def mlp_inner(w, alpha, batch):
    penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(w))
    return mlp_loss(w, alpha, batch) + jnp.exp(alpha) * penalty


def test_ten_thousand_steps_of_a_network_unroll_in_half_a_gigabyte():
    """784-128-10 with momentum, batch 128, float32: as planned, not run."""
    sizes = {"W1": (784, 128), "b1": (128,), "W2": (128, 10), "b2": (10,)}
    w = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in sizes.items()}
    x, y = np.zeros((2000, 784), np.float32), np.zeros(2000, np.int32)
    problem = hg.Bilevel(
        mlp_inner, mlp_loss, hg.Batches({"x": x, "y": y}, 128), {"x": x, "y": y}
    )
    solver = hg.Descent(optax.sgd(0.1, momentum=0.9), 10_000)
    estimator = hg.Unrolled(solver)

    def f(problem, w, alpha):
        return hg.hypergradient(problem, estimator)(w, alpha).hypergradient

    alpha = jax.ShapeDtypeStruct((), jnp.float32)
    assert temporary(f, problem, w, alpha) < 500e6


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_thousand_steps_of_a_network_stay_under_a_gibibyte():
    """The same network, run: peak resident memory of a whole process of its own."""
    code = """
        import re
        import jax, jax.numpy as jnp, optax, hypergrad as hg
        k = jax.random.split(jax.random.key(0), 4)
        x = jax.random.normal(k[0], (1000, 784))
        y = jax.random.randint(k[1], (1000,), 0, 10)
        w = {
            "W1": jax.random.normal(k[2], (784, 128)) / 28, "b1": jnp.zeros(128),
            "W2": jax.random.normal(k[3], (128, 10)) / 11, "b2": jnp.zeros(10),
        }
        def outer(w, alpha, batch):
            hidden = jax.nn.relu(batch[0] @ w["W1"] + w["b1"])
            logits = hidden @ w["W2"] + w["b2"]
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
            return jnp.mean(loss)
        def inner(w, alpha, batch):
            penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(w))
            return outer(w, alpha, batch) + jnp.exp(alpha) * penalty
        problem = hg.Bilevel(inner, outer, hg.Batches((x, y), 32), (x[:100], y[:100]))
        solver = hg.Descent(optax.sgd(0.02, momentum=0.9), 10_000)
        found = hg.hypergradient(problem, hg.Unrolled(solver))(w, jnp.asarray(-8.0))
        assert jnp.isfinite(found.hypergradient)
        # getrusage's peak would begin at the size of the process that started this one.
        peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())
        assert int(peak[1]) < 2**20, peak
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_minimize_keeps_only_scalars_a_step():
    """Ten outer steps and a thousand: a row of scalars more for each, no vectors."""
    problem = hg.Bilevel(wide_inner, wide_outer)
    w = alpha = jax.ShapeDtypeStruct((10_000,), jnp.float32)
    estimator = hg.Implicit(hg.Descent(sgd(0.1), 5))

    def planned(num_steps):
        run = lambda w, alpha: hg.minimize(
            problem, estimator, ADAM, w, alpha, num_steps=num_steps
        )
        return temporary(run, w, alpha)

    assert planned(1000) - planned(10) < 990 * 8 * 40


def test_any_known_is_cached():
    """Shared problems are built once, so that tests share compiled programs."""
    assert any_known("ridge scalar") is any_known("ridge scalar")
