"""Tests that each method does what its `MethodSummary` declares.

Every estimate of a small problem is compared with central differences of a procedure
that is written here by hand, and its counted cost with the declared formulas.
"""

import functools
import inspect
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from hypergrad import method_tables
from tests.loops import run_loop

# A problem in which alpha enters through the inner loss, through the optimizer (step
# size, momentum, weight decay) and through the start. Its Hessian is
# H = I + 0.05 * ones - 0.1 diag(sin w), with eigenvalues in [0.9, 1.2].

EIG_MIN, EIG_MAX = 0.9, 1.2
EXACT = 1e-6  # relative error of methods without bias
W = jnp.array([0.3, -0.2])
LEAVES = {
    "losses": ["target"],
    "optimizer": ["step_size", "momentum", "decay"],
    "start": ["start"],
}
ALPHA = {
    "target": jnp.array([0.4, 1.1]),
    "step_size": jnp.asarray(0.15),
    "momentum": jnp.asarray(0.25),
    "decay": jnp.asarray(0.1),
    "start": jnp.array([0.1, 0.5]),
}
DEFAULTS = {"step_size": 0.15, "momentum": 0.25, "decay": 0.0}
SHORT, LONG = 4, 200  # one step contracts by about 0.8


def inner_loss(w, alpha, batch):
    distance = jnp.sum((w - jnp.sin(alpha["target"])) ** 2)
    return 0.5 * distance + 0.025 * jnp.sum(w) ** 2 + 0.1 * jnp.sum(jnp.sin(w))


def outer_loss(w, alpha, batch):
    return jnp.sum(jnp.cosh(w - 2)) + w[0] * w[1]


def init_fn(w, alpha):
    return w + jnp.tanh(alpha["start"])


def make_optimizer(alpha):
    settings = DEFAULTS | alpha
    return optax.chain(
        optax.add_decayed_weights(settings["decay"]),
        optax.sgd(settings["step_size"], momentum=settings["momentum"]),
    )


def make_problem(places, omitted=()):
    """Returns a problem and its alpha, which enters in the given places."""
    names = [name for place in places for name in LEAVES[place] if name not in omitted]
    uses_start = "start" in names
    problem = hg.Bilevel(
        inner_loss, outer_loss, init_fn=init_fn if uses_start else None
    )
    return problem, {name: ALPHA[name] for name in names}


# The procedure by hand.


def run_inner(alpha, num_steps, w=W):
    """Returns ``w`` after the steps of momentum."""
    settings = DEFAULTS | alpha

    def step(_, carry):
        w, velocity = carry
        grad = jax.grad(inner_loss)(w, alpha, None) + settings["decay"] * w
        velocity = settings["momentum"] * velocity + grad
        return w - settings["step_size"] * velocity, velocity

    w = init_fn(w, alpha) if "start" in alpha else w
    return jax.lax.fori_loop(0, num_steps, step, (w, jnp.zeros(2)))[0]


@jax.jit
def central_differences(alpha, step_counts, w):
    """Returns the derivative of the mean outer value after each number of steps."""
    flat_alpha, unravel = ravel_pytree(alpha)

    def value(flat_alpha):
        values = [
            outer_loss(run_inner(unravel(flat_alpha), n, w), None, None)
            for n in step_counts
        ]
        return sum(values) / len(values)

    def derivative(direction, step=1e-3):
        # Fourth order: (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12 h
        offsets = step * jnp.array([1.0, -1.0, 2.0, -2.0])
        points = flat_alpha[None] + offsets[:, None] * direction[None]
        plus, minus, plus_two, minus_two = jax.vmap(value)(points)
        return (8 * (plus - minus) - (plus_two - minus_two)) / (12 * step)

    return unravel(jax.vmap(derivative)(jnp.eye(flat_alpha.size)))


def relative_error(actual, expected):
    difference = optax.tree.sub(actual, expected)
    return float(optax.tree.norm(difference) / optax.tree.norm(expected))


# The methods.


class Method(NamedTuple):
    """An estimator as the summary's call writes it, and how it is tested.

    Attributes:
      estimator: The estimator.
      max_error: Admitted relative error; None for a random estimate, which states a
        standard error.
      numbers: Values of the symbols in the formulas of the summary.
    """

    estimator: Any
    max_error: float | None
    numbers: dict[str, int]


class LastEstimate(NamedTuple):
    """The last of many estimates of a single-loop method at one ``alpha``."""

    estimator: Any
    num_steps: int = LONG

    def init(self, *args):
        return self.estimator.init(*args)

    def estimate(self, problem, state, alpha, key):
        step = lambda state, key: self.estimator.estimate(problem, state, alpha, key)[
            ::-1
        ]
        keys = jax.random.split(key, self.num_steps)
        state, estimates = jax.lax.scan(step, state, keys)
        return jax.tree.map(lambda x: x[-1], estimates), state


def method(estimator, max_error=EXACT, **numbers):
    return Method(estimator, max_error, numbers)


def implicit(linear_solver, max_error=EXACT, **numbers):
    return method(
        hg.Implicit(LONG_DESCENT, linear_solver, estimate_error=False),
        max_error,
        T=LONG,
        **numbers,
    )


def single_loop(estimator, max_error=EXACT, **numbers):
    return method(LastEstimate(estimator), max_error, **numbers)


SHORT_DESCENT, LONG_DESCENT = (hg.Descent(make_optimizer, n) for n in (SHORT, LONG))
# The formulas leave out the products for the scaling.
PLAIN_CG = hg.CG(preconditioner=None)
GAUSS_NEWTON = hg.CompositeLoss(lambda w, alpha, batch: w, inner_loss).gauss_newton
PAIRS, SIGMA = 50_000, 1e-3
REVERSIBLE = hg.Reversible(
    lambda alpha: alpha["step_size"], lambda alpha: alpha["momentum"], SHORT, 0.2
)
SGD, STEP = optax.sgd(0.15, momentum=0.25), 0.8
ONE_TERM = 1 - STEP * EIG_MIN  # error of a series of one term
BOME = hg.BOME(optax.sgd(0.1), 20, step_size=STEP)
FINITE_DIFFERENCE = hg.FiniteDifference(LONG_DESCENT)
METHODS = {
    "Implicit(solver)": implicit(PLAIN_CG, k=2),
    "Implicit(solver, hg.MINRES())": implicit(hg.MINRES(preconditioner=None), k=2),
    "Implicit(solver, hg.Neumann(K))": implicit(hg.Neumann(20), K=20),
    "Implicit(solver, hg.Nystrom(r))": implicit(
        hg.Nystrom(2), 0.01 / (EIG_MIN + 0.01), r=2
    ),
    "Implicit(solver, hg.NystromCG(r))": implicit(hg.NystromCG(1), r=1, k=2),
    "Implicit(solver, hg.Identity())": implicit(
        hg.Identity(), hg.Identity().error_bound(EIG_MIN, EIG_MAX)
    ),
    "Implicit(solver, lineax.LU())": implicit(lx.LU()),
    "Implicit(solver, hvp_fn=loss.gauss_newton)": method(
        hg.Implicit(LONG_DESCENT, PLAIN_CG, hvp_fn=GAUSS_NEWTON), T=LONG, k=2
    ),
    "Unrolled(solver)": method(hg.Unrolled(SHORT_DESCENT), T=SHORT),
    "Unrolled(solver, truncation_length=K)": method(
        hg.Unrolled(LONG_DESCENT, truncation_length=150), T=LONG, K=150
    ),
    "Forward(solver)": method(hg.Forward(SHORT_DESCENT), T=SHORT),
    "Reversible(rate, m, T)": method(REVERSIBLE, T=SHORT),
    "FixedPoint(solver, K)": method(hg.FixedPoint(LONG_DESCENT, 150), T=LONG, K=150),
    "FiniteDifference(solver)": method(
        FINITE_DIFFERENCE, FINITE_DIFFERENCE.error_bound(EIG_MIN, EIG_MAX), T=LONG
    ),
    "Penalty(solver, l)": method(hg.Penalty(LONG_DESCENT, 1e4), 10 / 1e4, T=LONG),
    "CentralDifference(solver)": method(hg.CentralDifference(SHORT_DESCENT), T=SHORT),
    "Evolution(solver, s, n)": method(
        hg.Evolution(SHORT_DESCENT, SIGMA, PAIRS), None, T=SHORT, n=PAIRS
    ),
    "PersistentEvolution(solver, s, n, K)": method(
        hg.PersistentEvolution(SHORT_DESCENT, SIGMA, PAIRS, 2), None,
        T=SHORT, n=PAIRS, K=2,
    ),
    "SOBA(optimizer)": single_loop(hg.SOBA(SGD)),
    "SABA(optimizer)": single_loop(hg.SABA(SGD)),
    "SRBA(optimizer, period)": single_loop(hg.SRBA(SGD, period=LONG)),
    "FSLA(optimizer)": single_loop(hg.FSLA(SGD)),
    "StocBiO(optimizer, m, K)": single_loop(
        hg.StocBiO(SGD, 2, 15, step_size=STEP), m=2, K=15
    ),
    "AmIGO(optimizer, m, n)": single_loop(hg.AmIGO(SGD, 2, 3), m=2, n=3),
    "TTSA(optimizer, K)": single_loop(hg.TTSA(SGD, 1, step_size=STEP), ONE_TERM, K=1),
    "MRBO(optimizer, K)": single_loop(hg.MRBO(SGD, 15, step_size=STEP), K=15),
    "SUSTAIN(optimizer, K)": single_loop(
        hg.SUSTAIN(SGD, 1, step_size=STEP), ONE_TERM, K=1
    ),
    "VRBO(optimizer, m, K, period)": single_loop(
        hg.VRBO(SGD, 2, 15, period=LONG, step_size=STEP), m=2, K=15
    ),
    "F2SA(optimizer, m, l)": single_loop(hg.F2SA(SGD, 3, penalty=1e4), 10 / 1e4, m=3),
    "BOME(optimizer, m)": single_loop(BOME, m=20),
    "PZOBO(optimizer, m, n)": method(
        LastEstimate(hg.PZOBO(SGD, 60, PAIRS // 100, sigma=SIGMA), 10), None,
        m=60, n=PAIRS // 100,
    ),
    "DARTS(optimizer, step_size)": single_loop(hg.DARTS(SGD, STEP), ONE_TERM),
}  # fmt: skip
OMITTED = {"Reversible(rate, m, T)": ("decay",)}  # leaves that a method does not have
NUM_ESTIMATES = {"PersistentEvolution(solver, s, n, K)": 2}  # whose mean is tested
SUMMARIES = {summary.call: summary for summary in method_tables.summaries()}
# The directions of BOME are no hypergradients at a fixed alpha.
HYPERGRADIENT_METHODS = sorted(METHODS.keys() - {"BOME(optimizer, m)"})


def test_every_summary_has_a_test_case():
    assert len(SUMMARIES) == len(method_tables.summaries())
    assert METHODS.keys() == SUMMARIES.keys()


def test_every_method_has_a_summary():
    """`Average` is not a method of its own."""
    classes = {
        value
        for name in hg.__all__
        if inspect.isclass(value := getattr(hg, name))
        and Protocol not in value.__mro__[1:]
        and {"estimate", "compute", "gauss_newton"} & set(dir(value))
    }
    listed = {*method_tables.ESTIMATORS, *method_tables.IMPLICIT_COMPONENTS}
    assert classes - {hg.Average} == listed


@functools.cache
def run_method(call):
    """Returns alpha, which enters wherever the method allows, and the estimates."""
    estimator = METHODS[call].estimator
    problem, alpha = make_problem(SUMMARIES[call].alpha_in, OMITTED.get(call, ()))
    keys = jax.random.split(jax.random.key(1), NUM_ESTIMATES.get(call, 1))

    @jax.jit
    def run(alpha):
        state = estimator.init(problem, W, alpha, jax.random.key(0))
        step = lambda state, key: estimator.estimate(problem, state, alpha, key)[::-1]
        return jax.lax.scan(step, state, keys)[1]

    return alpha, run(alpha)


@pytest.mark.parametrize("call", HYPERGRADIENT_METHODS)
def test_estimates_equal_central_differences(call):
    """Random estimates are within four standard errors in every leaf of alpha."""
    method = METHODS[call]
    alpha, estimates = run_method(call)
    num_steps, num_estimates = method.numbers.get("T", LONG), len(estimates.value)
    step_counts = [num_steps * (i + 1) // num_estimates for i in range(num_estimates)]
    expected = central_differences(alpha, step_counts, W)
    mean = jax.tree.map(lambda x: jnp.mean(x, 0), estimates.hypergradient)
    if method.max_error is None:
        standard_error = estimates.stats["standard_error"].mean()
        spread = float(standard_error * optax.tree.norm(mean))
        for name in alpha:
            error = jnp.linalg.norm(mean[name] - expected[name])
            assert error < 4 * spread < jnp.linalg.norm(expected[name]), name
    elif method.max_error == EXACT:
        chex.assert_trees_all_close(mean, expected, rtol=EXACT, atol=1e-9)
    else:
        assert relative_error(mean, expected) < method.max_error


def test_bome_ends_at_a_stationary_alpha():
    problem, alpha = make_problem(["losses"])
    trace = run_loop(problem, BOME, optax.sgd(0.1), W, alpha, num_steps=2000)
    init_grad, final_grad = (
        optax.tree.norm(central_differences(a, [LONG], W)) for a in (alpha, trace.alpha)
    )
    assert final_grad < 1e-2 * init_grad


@pytest.mark.parametrize("call", METHODS)
def test_counted_calls_equal_the_declared_formulas(call):
    alpha, estimates = run_method(call)
    num_entries = sum(leaf.size for leaf in jax.tree.leaves(alpha))
    symbols = {"N": num_entries, "d": W.size, **METHODS[call].numbers}
    for name in ("num_grads", "num_hvps"):
        declared = eval(getattr(SUMMARIES[call], name), {}, symbols)
        np.testing.assert_array_equal(estimates.stats[name], declared, name)


UNDECLARED = [
    pytest.param(call, place, id=f"{call}-{place}")
    for call, summary in SUMMARIES.items()
    for place in LEAVES
    if place not in summary.alpha_in
]


@pytest.mark.parametrize(("call", "place"), UNDECLARED)
def test_an_alpha_that_enters_elsewhere_is_an_error(call, place):
    """The error names every leaf, and is raised before anything is compiled."""
    problem, alpha = make_problem(("losses", place))
    with pytest.raises(ValueError, match="alpha") as error:
        METHODS[call].estimator.init(problem, W, alpha, None)
    for name in LEAVES[place]:
        assert f"alpha['{name}']" in str(error.value)


def test_the_noise_of_evolution_is_its_formula():
    """For a small sigma the value is linear: ``sqrt((N + 1) / n)``."""
    alpha, estimates = run_method("Evolution(solver, s, n)")
    num_entries = sum(leaf.size for leaf in jax.tree.leaves(alpha))
    expected = np.sqrt((num_entries + 1) / PAIRS)
    np.testing.assert_allclose(estimates.stats["standard_error"], expected, rtol=0.05)


SHORT_ESTIMATORS = {
    "Implicit": hg.Implicit(SHORT_DESCENT),
    "FixedPoint": hg.FixedPoint(SHORT_DESCENT, 150),
    "Unrolled": hg.Unrolled(SHORT_DESCENT),
    "Forward": hg.Forward(SHORT_DESCENT),
    "CentralDifference": hg.CentralDifference(SHORT_DESCENT),
}


@pytest.mark.parametrize("name", SHORT_ESTIMATORS)
def test_the_target_is_what_is_differentiated(name):
    """Four steps from the argmin stay there, but have a smaller derivative."""
    problem, alpha = make_problem(["losses"])
    w = jax.jit(run_inner, static_argnums=1)(alpha, LONG)
    expected = {
        "argmin": central_differences(alpha, [LONG], W),
        "solver": central_differences(alpha, [SHORT], w),
    }
    assert relative_error(expected["solver"], expected["argmin"]) > 0.1
    estimator = SHORT_ESTIMATORS[name]
    estimate = hg.hypergradient(problem, estimator)(w, alpha)
    assert relative_error(estimate.hypergradient, expected[estimator.target]) < EXACT


# Memory, as planned by the compiler.

SIZE = 20_000
MOMENTUM_CARRY = 2  # vectors in the carry of a step


def momentum(num_steps):
    return hg.Descent(optax.sgd(0.1, momentum=0.5), num_steps)


def num_vectors(estimator, num_entries):
    """Returns the temporaries in vectors like ``w``, for alpha of so many entries."""
    problem = hg.Bilevel(
        # Of a loss such as cosh XLA may hold several vectors more, for its parts.
        lambda w, alpha, batch: jnp.sum((w - alpha[0]) ** 4) * jnp.sum(alpha**2),
        lambda w, alpha, batch: jnp.sum((w - 1) ** 2),
    )
    w, alpha = jax.ShapeDtypeStruct((SIZE,), float), jnp.ones(num_entries)
    estimate_fn = lambda w, alpha: hg.hypergradient(problem, estimator)(w, alpha)
    memory = hg.cost.memory(
        lambda w, alpha: estimate_fn(w, alpha).hypergradient, w, alpha
    )
    return memory.temporaries / (8 * SIZE)


GROWING = {
    "Nystrom r": (lambda n: (hg.Implicit(momentum(8), hg.Nystrom(n)), 2), 2),
    "NystromCG r": (lambda n: (hg.Implicit(momentum(8), hg.NystromCG(n)), 2), 2),
    "Forward N": (lambda n: (hg.Forward(momentum(8)), n), MOMENTUM_CARRY),
    "Evolution n": (
        lambda n: (hg.Evolution(momentum(8), 0.1, n), 2),
        2 * MOMENTUM_CARRY,
    ),
    "PersistentEvolution n": (
        lambda n: (hg.PersistentEvolution(momentum(8), 0.1, n, 4), 2),
        2 * MOMENTUM_CARRY,
    ),
}


@pytest.mark.parametrize("name", GROWING)
def test_memory_grows_as_declared(name):
    """The compiler may hold every vector twice, and a mask of one byte per entry."""
    make, expected = GROWING[name]
    growth = (num_vectors(*make(20)) - num_vectors(*make(10))) / 10
    assert expected - 0.1 < growth < 2 * expected + 1 / 8 + 0.1


CONSTANT = {
    "FixedPoint T": lambda n: (hg.FixedPoint(momentum(n), 10), 2),
    "FiniteDifference T": lambda n: (hg.FiniteDifference(momentum(n)), 2),
    "Penalty T": lambda n: (hg.Penalty(momentum(n), 10.0), 2),
    "CentralDifference N": lambda n: (hg.CentralDifference(momentum(8)), n),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_memory_is_constant_as_declared(name):
    few, many = (num_vectors(*CONSTANT[name](n)) for n in (10, 100))
    assert many < few + 0.1
    assert many < 12


# A leaf of alpha that the losses and something else depend on.


def make_shared_problem(places):
    """Returns a problem, a solver and alpha, whose leaf also enters in the places."""
    offset = lambda alpha: alpha["target"] - ALPHA["target"]  # has the value 0
    scale = lambda alpha: jnp.exp(offset(alpha)[0]) if "optimizer" in places else 1.0
    shifted = (lambda w, alpha: w + offset(alpha)) if "start" in places else None
    problem = hg.Bilevel(inner_loss, outer_loss, init_fn=shifted)
    solver = hg.Descent(lambda alpha: optax.sgd(0.5 * scale(alpha)), 2)
    return problem, solver, {"target": ALPHA["target"]}


ARGMIN_ESTIMATORS = {
    "Implicit": (hg.Implicit, ["start", "optimizer"], []),
    "FiniteDifference": (hg.FiniteDifference, ["start", "optimizer"], []),
    "Penalty": (lambda solver: hg.Penalty(solver, 10.0), ["start", "optimizer"], []),
    "FixedPoint": (lambda solver: hg.FixedPoint(solver, 40), ["start"], ["optimizer"]),
}


@pytest.mark.parametrize("name", ARGMIN_ESTIMATORS)
def test_only_declared_places_contribute(name):
    """Two inner steps leave ``w`` far from the argmin, so that others could."""
    make, ignored, differentiated = ARGMIN_ESTIMATORS[name]
    assert set(differentiated) == set(getattr(hg, name).summary[0].alpha_in) - {
        "losses"
    }

    def run(places):
        problem, solver, alpha = make_shared_problem(places)
        return hg.hypergradient(problem, make(solver))(W, alpha).hypergradient

    losses_only = run([])
    assert relative_error(run(ignored), losses_only) < 1e-9
    if differentiated:
        assert relative_error(run(differentiated), losses_only) > 1e-2
