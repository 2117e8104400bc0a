"""Pareto fronts against analytic fronts, and hypervolumes against hand and samples."""

import itertools
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

import hypergrad as hg
from hypergrad import objectives
from tests.objectives.quadratics import (
    ALPHA0,
    CENTERS,
    DISTANCES,
    IMPLICIT,
    QUARTER,
    TENTH,
    biquadratic,
    minimize,
)

FIRST_WEIGHTS = jnp.linspace(0.1, 0.9, 5)
PREFERENCES = jnp.stack([FIRST_WEIGHTS, 1 - FIRST_WEIGHTS], 1)
SEGMENT = CENTERS[1] - CENTERS[0]
LENGTH = float(jnp.linalg.norm(SEGMENT))


def smooth_tchebycheff(p):
    return objectives.SmoothTchebycheff(p, 0.05)


def pareto_front(problem, preferences, aggregator_fn, optimizer=QUARTER, **options):
    return objectives.pareto_front(
        problem, IMPLICIT, optimizer, jnp.zeros(3), ALPHA0, preferences,
        aggregator_fn=aggregator_fn, **options,
    )  # fmt: skip


def weighted_fraction(p):
    """Returns the fraction t along the segment with minimal p_1 t^2 + p_2 (1 - t)^2."""
    return p[1] / (p[0] + p[1])


def exact_fraction(p):
    """Returns the fraction t along the segment with p_1 t^2 = p_2 (1 - t)^2."""
    return 1 / (1 + (p[0] / p[1]) ** 0.5)


def smooth_fraction(p):
    """Returns the fraction along the segment with the minimal smooth maximum."""
    score = lambda t: logsumexp(LENGTH**2 * p * np.array([t**2, (1 - t) ** 2]) / 0.05)
    options = {"xatol": 1e-10}
    return minimize_scalar(score, bounds=(0, 1), method="bounded", options=options).x


@pytest.mark.parametrize(
    ("aggregator_fn", "fraction_fn", "optimizer", "num_steps"),
    [
        (objectives.WeightedSum, weighted_fraction, QUARTER, 100),
        (smooth_tchebycheff, smooth_fraction, optax.sgd(0.02), 1000),
        (lambda p: objectives.EPO(p, 1e-8), exact_fraction, TENTH, 200),
    ],
    ids=["WeightedSum", "SmoothTchebycheff", "EPO"],
)
def test_the_front_of_two_quadratics(aggregator_fn, fraction_fn, optimizer, num_steps):
    """sqrt(M_1) = t |c_1 - c_2| and sqrt(M_2) = (1 - t) |c_1 - c_2|."""
    trace = pareto_front(
        biquadratic(), PREFERENCES, aggregator_fn, optimizer, num_steps=num_steps
    )
    t = np.array(list(map(fraction_fn, np.asarray(PREFERENCES))))
    distances = np.sqrt(trace.value[:, -1])
    np.testing.assert_allclose(distances, LENGTH * np.stack([t, 1 - t], 1), rtol=1e-3)
    expected = CENTERS[:1] + t[:, None] * SEGMENT[None]
    np.testing.assert_allclose(trace.alpha, expected, atol=1e-3)


def counts_and_values(trace):
    """Returns the counts of Hessian products of a trace, and all else."""
    counts = {name: trace.stats[name] for name in ("num_hvps", "gradient_equivalents")}
    stats = {name: x for name, x in trace.stats.items() if name not in counts}
    return counts, (trace.value, trace.alpha, trace.best_alpha, stats)


def test_a_front_equals_single_runs_and_is_traced_once():
    """The number of preferences does not change how often the losses are traced.

    Rounding, which differs between the programs, may decide whether a solve that is at
    its target makes one iteration more: one product, two gradient-equivalents.
    """
    num_traces = []

    def count_traces(preferences):
        num_traces.append(0)

        def counted(w, alpha, batch):
            num_traces[-1] += 1
            return DISTANCES[0](w, alpha, batch)

        problem = biquadratic((counted, DISTANCES[1]))
        return pareto_front(problem, preferences, objectives.WeightedSum, num_steps=20)

    front = count_traces(PREFERENCES)
    count_traces(jnp.tile(PREFERENCES, (2, 1)))
    assert num_traces[0] == num_traces[1]
    for i in (0, 3):
        single = minimize(objectives.WeightedSum(PREFERENCES[i]), num_steps=20)
        row = jax.tree.map(lambda leaf, i=i: leaf[i], front)
        counts, values = counts_and_values(row)
        expected_counts, expected_values = counts_and_values(single)
        chex.assert_trees_all_close(values, expected_values, rtol=1e-9, atol=1e-12)
        chex.assert_trees_all_close(counts, expected_counts, rtol=0, atol=2)


def solver_loops(function, *args):
    """Returns the loops of conjugate gradients in a program.

    The first one is that of the adjoint; later ones confirm the error estimate.
    """
    loops = hg.cost.flops(function, *args).loops
    return [loop for loop in loops if "scaled_cg" in loop.location]


def test_adjoints_of_all_losses_are_columns_of_one_loop(monkeypatch):
    """Eight losses evaluate as many tanh as one loss, and cost less than 8 loops."""
    x = jax.random.normal(jax.random.key(0), (20, 4))
    w = {"a": jnp.full((4, 5), 0.1), "b": jnp.full(5, 0.2)}
    output = lambda w: jnp.tanh(x @ w["a"]) @ w["b"]
    inner = lambda w, alpha, batch: (
        jnp.mean((output(w) - 1) ** 2) + jnp.exp(alpha) * jnp.sum(w["a"] ** 2)
        + jnp.sum(w["b"] ** 2)
    )  # fmt: skip
    estimator = hg.Implicit(hg.ClosedForm(lambda alpha, batch: w))
    loops, num_tanh = {}, {}
    module = sys.modules["hypergrad.cost.flops"]
    for num in (1, 8):
        outer = tuple(
            lambda w, alpha, batch, k=k: jnp.mean((output(w) - k) ** 2)
            for k in range(num)
        )
        hypergradient_fn = hg.hypergradient(hg.Bilevel(inner, outer), estimator)
        run = lambda alpha, fn=hypergradient_fn: fn(w, alpha)
        loops[num], *_ = solver_loops(run, 0.0)
        with monkeypatch.context() as patch:
            patch.setattr(module, "ELEMENTWISE", module.ELEMENTWISE - {"tanh"})
            other_operations, *_ = solver_loops(run, 0.0)
        num_tanh[num] = loops[num].flops - other_operations.flops
    assert num_tanh[8] == num_tanh[1] >= 100
    assert loops[1].flops < loops[8].flops < 8 * loops[1].flops
    # The statistics count each column: at least a step and the residual.
    assert hypergradient_fn(w, 0.0).stats["num_hvps"] >= 8 * 2


def test_a_front_has_one_adjoint_loop_for_all_preferences():
    run = lambda preferences: (
        pareto_front(
            biquadratic(), preferences, objectives.WeightedSum, num_steps=3
        ).value
    )
    loops = zip(
        solver_loops(run, PREFERENCES[:1]), solver_loops(run, PREFERENCES), strict=True
    )
    for single, several in loops:
        assert single.flops < several.flops <= len(PREFERENCES) * single.flops


AREAS = {
    "one point": ([[1, 1]], [3, 4], 6),
    "staircase": ([[1, 3], [2, 2], [3, 1]], [4, 4], 6),
    "dominated": ([[1, 3], [2, 2], [3, 1], [3, 3], [2, 2]], [4, 4], 6),
    "outside": ([[1, 3], [2, 2], [3, 1], [0, 5], [5, 0]], [4, 4], 6),
    "outside, to minus infinity": ([[5, -np.inf], [2, 3], [4, -np.inf]], [4, 4], 2),
    "two at minus infinity": ([[1, -np.inf], [2, -np.inf]], [4, 4], np.inf),
    "ties": ([[1, 2], [1, 3]], [2, 4], 2),
    "nothing": ([[5, 5], [4, 1]], [4, 4], 0),
    "box": ([[1, 2, 3]], [2, 4, 6], 6),
    "two boxes": ([[0, 0, 1], [1, 1, 0]], [2, 2, 2], 5),
    "one loss": ([[3], [1]], [4], 3),
}


@pytest.mark.parametrize("name", AREAS)
def test_hypervolumes_are_those_found_by_hand(name: str):
    """The order of the points does not matter."""
    points, reference, exact = AREAS[name]
    points, reference = jnp.array(points, float), jnp.array(reference, float)
    hypervolume = jax.jit(objectives.hypervolume)
    for order in itertools.islice(itertools.permutations(range(len(points))), 24):
        assert float(hypervolume(points[jnp.array(order)], reference)) == exact


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint8"])
def test_hypervolume_of_integers_does_not_wrap_around(dtype):
    """FLOPs and parameters are counts; 100 times 100 is no number of 8 bits."""
    points, reference = jnp.zeros((1, 2), dtype), jnp.full(2, 100, dtype)
    volume = objectives.hypervolume(points, reference)
    assert volume.dtype == float
    assert volume == 10_000


@pytest.mark.parametrize("num", [2, 4])
def test_hypervolume_is_the_dominated_fraction_of_the_unit_box(num: int, key):
    """200,000 random points agree within four standard errors."""
    keys = jax.random.split(key)
    points = jax.random.uniform(keys[0], (12, num), maxval=1.2)
    samples = jax.random.uniform(keys[1], (200_000, num))
    is_dominated = jnp.any(jnp.all(points[:, None] <= samples[None], -1), 0)
    fraction = float(jnp.mean(is_dominated))
    exact = float(objectives.hypervolume(points, jnp.ones(num)))
    assert 0.01 < fraction < 0.99
    assert abs(exact - fraction) < 4 * (fraction * (1 - fraction) / 200_000) ** 0.5


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([[1, 3], [2, 2], [3, 1], [3, 3], [2, 3]], [1, 1, 1, 0, 0]),
        ([[1, 1], [1, 1], [1, 2]], [1, 1, 0]),
        ([[jnp.nan, 0], [1, 1], [0, jnp.nan]], [0, 1, 0]),
        ([[jnp.inf, 0], [1, 1], [jnp.inf, 1]], [1, 1, 0]),
        ([[1, 2, 3], [1, 2, 4], [3, 2, 1]], [1, 0, 1]),
        ([[3], [1], [2]], [0, 1, 0]),
    ],
    ids=["two losses", "equal points", "NaN", "infinite", "three losses", "one loss"],
)
def test_non_dominated_points(points, expected):
    actual = jax.jit(objectives.non_dominated)(jnp.array(points, float))
    assert actual.tolist() == [bool(x) for x in expected]


def test_invalid_preferences_and_points_are_named():
    problem, eye = biquadratic(), jnp.eye(2)
    front = lambda preferences, aggregator_fn: pareto_front(
        problem, preferences, aggregator_fn, num_steps=1
    )
    for name, call in (
        ("preferences", lambda: front(1.0, objectives.WeightedSum)),
        ("preferences", lambda: front(jnp.ones(2), objectives.EPO)),
        ("weights", lambda: front(eye, objectives.EPO)),
        ("aggregator_fn", lambda: front(PREFERENCES, objectives.EPO(jnp.ones(2)))),
        ("points", lambda: objectives.hypervolume(jnp.ones((2, 3)), jnp.ones(2))),
        ("points", lambda: objectives.non_dominated(jnp.ones(2))),
    ):
        with pytest.raises((TypeError, ValueError), match=name):
            call()
