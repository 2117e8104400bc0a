"""What methods declare of themselves, against what they do."""

import functools
import inspect
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks.known import central, error
from hypergrad import method_tables
from tests.loops import run_loop

# A problem into which alpha enters by the inner loss, by the optimizer (rate, momentum,
# weight decay) and by the start. H = I + 0.1 u u' - 0.1 diag(sin w), u of length one.

SMALLEST, LARGEST = 0.9, 1.2
EXACT = 1e-6
W = jnp.array([0.3, -0.2])
LEAVES = {
    "losses": ["target"],
    "optimizer": ["rate", "momentum", "decay"],
    "start": ["start"],
}
AT = {
    "target": jnp.array([0.4, 1.1]),
    "rate": jnp.asarray(0.15),
    "momentum": jnp.asarray(0.25),
    "decay": jnp.asarray(0.1),
    "start": jnp.array([0.1, 0.5]),
}
CONSTANT = {"rate": 0.15, "momentum": 0.25, "decay": 0.0}  # where alpha has none
SHORT, LONG = 4, 200  # a step contracts by about 0.8


def inner(w, alpha, batch):
    away = jnp.sum((w - jnp.sin(alpha["target"])) ** 2)
    return 0.5 * away + 0.025 * jnp.sum(w) ** 2 + 0.1 * jnp.sum(jnp.sin(w))


def outer(w, alpha, batch):
    return jnp.sum(jnp.cosh(w - 2)) + w[0] * w[1]


def start(w, alpha):
    return w + jnp.tanh(alpha["start"])


def optimizer(alpha):
    has = CONSTANT | alpha
    return optax.chain(
        optax.add_decayed_weights(has["decay"]),
        optax.sgd(has["rate"], momentum=has["momentum"]),
    )


def run_by_hand(alpha, num_steps, begin=W):
    """``w`` after the same steps, in a plain loop."""
    has = CONSTANT | alpha

    def step(_, carry):
        w, v = carry
        v = has["momentum"] * v + jax.grad(inner)(w, alpha, None) + has["decay"] * w
        return w - has["rate"] * v, v

    begin = start(begin, alpha) if "start" in alpha else begin
    return jax.lax.fori_loop(0, num_steps, step, (begin, jnp.zeros(2)))[0]


def by_hand(alpha, num_steps):
    """The outer loss there."""
    return outer(run_by_hand(alpha, num_steps), alpha, None)


def posed(places, without=()):
    """The problem whose alpha has the leaves of these places."""
    alpha = {name: AT[name] for place in places for name in LEAVES[place]}
    alpha = {name: leaf for name, leaf in alpha.items() if name not in without}
    return hg.Bilevel(inner, outer, init_fn=start if "start" in alpha else None), alpha


class Case(NamedTuple):
    """A method as its guide's call writes it, and the numbers in its formulas.

    ``factor`` is the relative error that is admitted: None where the method is random
    and states a standard error of its own.
    """

    estimator: Any
    numbers: dict[str, int]
    factor: float | None = EXACT
    windows: int = 1
    without: tuple[str, ...] = ()


def implicit(linear_solver, factor=EXACT, **numbers):
    solver = hg.Descent(optimizer, LONG)
    return Case(hg.Implicit(solver, linear_solver), {"T": LONG, **numbers}, factor)


short, long = hg.Descent(optimizer, SHORT), hg.Descent(optimizer, LONG)
PAIRS, SIGMA = 100_000, 1e-3
CASES = {
    "Implicit(solver)": implicit(hg.CG(), k=2),
    "Implicit(solver, hg.Neumann(K))": implicit(hg.Neumann(20), K=20),
    "Implicit(solver, hg.Nystrom(r))": implicit(
        hg.Nystrom(2), 0.01 / (SMALLEST + 0.01), r=2
    ),
    "Implicit(solver, hg.NystromCG(r))": implicit(hg.NystromCG(1), r=1, k=2),
    "Implicit(solver, hg.Identity())": implicit(
        hg.Identity(), hg.Identity().error_bound(SMALLEST, LARGEST)
    ),
    "Implicit(solver, lineax.LU())": implicit(lx.LU()),
    "Implicit(solver, hvp_fn=loss.gauss_newton)": Case(
        hg.Implicit(
            hg.Descent(optimizer, LONG),
            hvp_fn=hg.CompositeLoss(  # of outputs that are linear in w
                lambda w, alpha, batch: w, inner
            ).gauss_newton,
        ),
        {"T": LONG, "k": 2},
    ),
    "Unrolled(solver)": Case(hg.Unrolled(short), {"T": SHORT}),
    "Unrolled(solver, truncation_length=K)": Case(
        hg.Unrolled(long, truncation_length=150), {"T": LONG, "K": 150}
    ),
    "Forward(solver)": Case(hg.Forward(short), {"T": SHORT}),
    "Reversible(rate, m, T)": Case(
        hg.Reversible(
            lambda alpha: alpha["rate"], lambda alpha: alpha["momentum"], SHORT, 0.2
        ),
        {"T": SHORT},
        without=("decay",),  # it has none
    ),
    "FixedPoint(solver, K)": Case(hg.FixedPoint(long, 150), {"T": LONG, "K": 150}),
    "FiniteDifference(solver)": Case(
        hg.FiniteDifference(long),
        {"T": LONG},
        hg.FiniteDifference(long).error_bound(SMALLEST, LARGEST),
    ),
    "Penalty(solver, l)": Case(hg.Penalty(long, 1e4), {"T": LONG}, 10 / 1e4),
    "CentralDifference(solver)": Case(hg.CentralDifference(short), {"T": SHORT}),
    "Evolution(solver, s, n)": Case(
        hg.Evolution(short, SIGMA, PAIRS), {"T": SHORT, "n": PAIRS}, None
    ),
    "PersistentEvolution(solver, s, n, K)": Case(
        hg.PersistentEvolution(short, SIGMA, PAIRS, SHORT // 2),
        {"T": SHORT, "n": PAIRS, "K": SHORT // 2},
        None,
        windows=2,
    ),
}
RHO = optax.sgd(0.15, momentum=0.25)
JOINT = math.inf  # no estimate at a fixed alpha, see below
RATE = 0.8  # of series: a term leaves at most 0.28
ONE_TERM = 1 - RATE * SMALLEST


def settled(estimator, factor=EXACT, **numbers):
    return Case(hg.testing.Settled(estimator, LONG), numbers, factor)


CASES |= {
    "SOBA(optimizer)": settled(hg.SOBA(RHO)),
    "SABA(optimizer)": settled(hg.SABA(RHO)),
    "SRBA(optimizer, period)": settled(hg.SRBA(RHO, period=LONG)),
    "FSLA(optimizer)": settled(hg.FSLA(RHO)),
    "StocBiO(optimizer, m, K)": settled(
        hg.StocBiO(RHO, 2, 15, step_size=RATE), m=2, K=15
    ),
    "AmIGO(optimizer, m, n)": settled(hg.AmIGO(RHO, 2, 3), m=2, n=3),
    "TTSA(optimizer, K)": settled(hg.TTSA(RHO, 1, step_size=RATE), ONE_TERM, K=1),
    "MRBO(optimizer, K)": settled(hg.MRBO(RHO, 15, step_size=RATE), K=15),
    "SUSTAIN(optimizer, K)": settled(hg.SUSTAIN(RHO, 1, step_size=RATE), ONE_TERM, K=1),
    "VRBO(optimizer, m, K, period)": settled(
        hg.VRBO(RHO, 2, 15, period=LONG, step_size=RATE), m=2, K=15
    ),
    "F2SA(optimizer, m, l)": settled(hg.F2SA(RHO, 3, penalty=1e4), 10 / 1e4, m=3),
    "BOME(optimizer, m)": settled(
        hg.BOME(optax.sgd(0.1), 20, step_size=RATE), JOINT, m=20
    ),
    "PZOBO(optimizer, m, n)": Case(
        hg.testing.Settled(hg.PZOBO(RHO, 60, PAIRS // 100, sigma=SIGMA), 10),
        {"m": 60, "n": PAIRS // 100},
        None,
    ),
    "DARTS(optimizer, step_size)": settled(hg.DARTS(RHO, RATE), ONE_TERM),
}
GUIDES = {guide.call: guide for guide, _, _ in method_tables.methods()}


def test_every_row_is_tested_below():
    """No guide without a case, no case without a guide."""
    assert len(GUIDES) == len(method_tables.methods())
    assert set(CASES) == set(GUIDES)


def test_every_method_has_a_row():
    """All that estimates, solves or stands for a linear system; no `Average`."""
    named = {name: getattr(hg, name) for name in hg.__all__}
    methods = {
        kind
        for kind in named.values()
        if inspect.isclass(kind)
        and Protocol not in kind.__mro__[1:]
        and any(hasattr(kind, does) for does in ("estimate", "compute", "gauss_newton"))
    }
    assert methods - {hg.Average} == {
        *method_tables.ESTIMATORS,
        *method_tables.OF_IMPLICIT,
    }


@functools.cache
def asked(call):
    """The estimates of one run, a window each, where alpha enters as declared."""
    case, guide = CASES[call], GUIDES[call]
    problem, alpha = posed(guide.sees, case.without)
    state = case.estimator.init(problem, W, alpha, jax.random.key(0))
    estimate = jax.jit(functools.partial(case.estimator.estimate, problem))
    found = []
    for key in jax.random.split(jax.random.key(1), case.windows):
        one, state = estimate(state, alpha, key)
        found.append(one)
    return alpha, found


@pytest.mark.parametrize("call", CASES)
def test_what_is_declared_as_seen_equals_central_differences(call: str):
    """Of the whole procedure by hand, leaf by leaf; random ones to four errors."""
    case = CASES[call]
    if case.factor == JOINT:
        check_joint(case.estimator.estimator)
        return
    alpha, found = asked(call)
    steps = case.numbers.get("T", LONG)
    ends = [steps * (i + 1) // case.windows for i in range(case.windows)]
    mean = lambda *parts: sum(parts) / len(parts)
    value = jax.jit(lambda alpha: mean(*(by_hand(alpha, end) for end in ends)))
    exact = central(value, alpha)
    hypergradient = jax.tree.map(mean, *(one.hypergradient for one in found))
    if case.factor is None:
        length = lambda tree: float(optax.tree.norm(tree))
        spread = mean(
            *(one.stats["standard_error"] * length(one.hypergradient) for one in found)
        )
        for name in alpha:
            off = length(hypergradient[name] - exact[name])
            assert off < 4 * spread < length(exact[name]), name
    elif case.factor == EXACT:
        for name in alpha:
            np.testing.assert_allclose(
                hypergradient[name], exact[name], EXACT, 1e-9, err_msg=name
            )
    else:
        assert error(hypergradient, exact) < case.factor


def check_joint(estimator):
    """Its run ends where that of exact hypergradients does."""
    problem, alpha = posed(["losses"])
    run = functools.partial(run_loop, problem, w=W, alpha=alpha, num_steps=2000)
    ends = [
        run(estimator=which, optimizer=optax.sgd(0.1)).alpha
        for which in (estimator, hg.Implicit(hg.Newton()))
    ]
    assert error(ends[0], ends[1]) < 1e-2
    assert error(ends[1], alpha) > 0.1


UNSEEN = [
    (call, place)
    for call, guide in GUIDES.items()
    for place in LEAVES
    if place not in guide.sees
]


@pytest.mark.parametrize(("call", "place"), UNSEEN)
def test_what_is_not_declared_as_seen_is_refused(call: str, place: str):
    """Each leaf by its name, before anything runs."""
    problem, alpha = posed(("losses", place))
    with pytest.raises(ValueError, match="neither loss reads") as refused:
        hg.hypergradient(problem, CASES[call].estimator)(W, alpha)
    for name in LEAVES[place]:
        assert f"alpha['{name}']" in str(refused.value)


@pytest.mark.parametrize("call", CASES)
def test_the_declared_cost_is_the_ledgers(call: str):
    """The formulas of gradients and products, evaluated."""
    alpha, found = asked(call)
    count = sum(leaf.size for leaf in jax.tree.leaves(alpha))
    numbers = {"N": count, "d": W.size, **CASES[call].numbers}
    formula = lambda text: eval(text, {}, numbers)
    for one in found:
        assert one.stats["num_grads"] == formula(GUIDES[call].gradients)
        assert one.stats["num_hvps"] == formula(GUIDES[call].hvps)


def test_the_noise_of_evolution():
    """Where sigma is so small that the value is linear: sqrt((N + 1) / n)."""
    alpha, (found,) = asked("Evolution(solver, s, n)")
    count = sum(leaf.size for leaf in jax.tree.leaves(alpha))
    expected = np.sqrt((count + 1) / PAIRS)
    np.testing.assert_allclose(found.stats["standard_error"], expected, rtol=0.05)


TARGETS = {
    "Implicit": hg.Implicit,
    "FixedPoint": lambda solver: hg.FixedPoint(solver, 150),
    "Unrolled": hg.Unrolled,
    "Forward": hg.Forward,
    "CentralDifference": hg.CentralDifference,
}


@pytest.mark.parametrize("name", TARGETS)
def test_the_declared_target(name: str):
    """Four steps from the argmin go nowhere, and their own derivative falls short."""
    problem, alpha = posed(["losses"])
    best = jax.jit(lambda alpha: run_by_hand(alpha, LONG))(alpha)
    there = jax.jit(lambda alpha: by_hand(alpha, LONG))
    steps = jax.jit(lambda alpha: outer(run_by_hand(alpha, SHORT, best), alpha, None))
    exact = {"argmin": central(there, alpha), "solver": central(steps, alpha)}
    assert error(exact["solver"], exact["argmin"]) > 0.1
    gradient = hg.hypergradient(problem, TARGETS[name](hg.Descent(optimizer, SHORT)))
    found = gradient(best, alpha).hypergradient
    assert error(found, exact[getattr(hg, name).target]) < EXACT


# Memory, as planned and not run.

WIDE = 20_000


def vectors(estimator, count):
    """Temporaries in vectors like ``w``; ``alpha`` of so many numbers."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: jnp.sum(jnp.cosh(w - alpha[0])) * jnp.sum(alpha**2),
        lambda w, alpha, batch: jnp.sum((w - 1) ** 2),
    )
    w, alpha = jax.ShapeDtypeStruct((WIDE,), float), jnp.ones(count)
    ask = lambda w, alpha: hg.hypergradient(problem, estimator)(w, alpha).hypergradient
    compiled = jax.jit(ask).lower(w, alpha).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (8 * WIDE)


HEAVY_BALL = optax.sgd(0.1, momentum=0.5)  # a carry of two vectors
heavy = lambda num_steps: hg.Descent(HEAVY_BALL, num_steps)


@pytest.mark.parametrize(
    ("make", "of_one"),
    [
        (lambda n: (hg.Implicit(heavy(8), hg.Nystrom(n)), 2), 2),
        (lambda n: (hg.Implicit(heavy(8), hg.NystromCG(n)), 2), 2),
        (lambda n: (hg.Forward(heavy(8)), n), 2),
        (lambda n: (hg.Evolution(heavy(8), 0.1, n), 2), 2 * 2),
        (lambda n: (hg.PersistentEvolution(heavy(8), 0.1, n, 4), 2), 2 * 2),
    ],
    ids=["Nystrom r", "NystromCG r", "Forward N", "Evolution n", "Persistent n"],
)
def test_memory_grows_as_declared(make, of_one: int):
    """By vectors for each of r, N or n; the compiler may hold them twice."""
    growth = (vectors(*make(20)) - vectors(*make(10))) / 10
    assert of_one - 0.1 < growth < 2 * of_one + 0.1


@pytest.mark.parametrize(
    "make",
    [
        lambda n: (hg.FixedPoint(heavy(n), 10), 2),
        lambda n: (hg.FiniteDifference(heavy(n)), 2),
        lambda n: (hg.Penalty(heavy(n), 10.0), 2),
        lambda n: (hg.CentralDifference(heavy(8)), n),
    ],
    ids=["FixedPoint T", "FiniteDifference T", "Penalty T", "CentralDifference N"],
)
def test_memory_is_flat_as_declared(make):
    """In the steps, or in the numbers of alpha; a dozen vectors at most."""
    few, many = vectors(*make(10)), vectors(*make(100))
    assert many < few + 0.1
    assert many < 12


# What the losses read as well as the optimizer or the start is not refused.


def both(read):
    """One leaf in the inner loss, and in the rate or in the start if it is read."""
    rate = lambda alpha: 0.5 * jnp.exp(alpha["target"][0] - AT["target"][0])
    begin = lambda w, alpha: w + alpha["target"] - AT["target"]
    problem = hg.Bilevel(inner, outer, init_fn=begin if read == "start" else None)
    made = lambda alpha: optax.sgd(rate(alpha) if read == "optimizer" else 0.5)
    return problem, hg.Descent(made, 2)


ARGMIN = {
    "Implicit": hg.Implicit,
    "FiniteDifference": hg.FiniteDifference,
    "Penalty": lambda solver: hg.Penalty(solver, 10.0),
    "FixedPoint": lambda solver: hg.FixedPoint(solver, 40),
}


@pytest.mark.parametrize("name", ARGMIN)
def test_a_leaf_of_the_losses_that_is_read_beside_them(name: str):
    """At an unfinished ``w`` the rest is ignored, but for what FixedPoint sees."""

    def ask(read):
        problem, solver = both(read)
        gradient = hg.hypergradient(problem, ARGMIN[name](solver))
        return gradient(W, {"target": AT["target"]}).hypergradient

    alone = ask(None)
    difference = {read: error(ask(read), alone) for read in ("start", "optimizer")}
    assert difference["start"] < 1e-9
    if "optimizer" in getattr(hg, name).summary[0].sees:
        assert difference["optimizer"] > 1e-2
    else:
        assert difference["optimizer"] < 1e-9
