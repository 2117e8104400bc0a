"""Costs of a model as outer losses: parameters, operations, bytes and seconds."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypergrad import objectives
from hypergrad.objectives import latency

WIDTHS = [7, 5, 3, 2]


def apply_layers(parameters, x):
    for weights, bias in parameters:
        x = x @ weights + bias[None]
    return x


def test_costs_of_dense_layers_are_those_of_a_network():
    """The leaves, XLA's count of operations, and the bytes of the layers' inputs."""
    parameters = [
        (jnp.ones((n, m), jnp.float32), jnp.ones(m, jnp.float32))
        for n, m in itertools.pairwise(WIDTHS)
    ]
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    assert float(objectives.num_parameters(WIDTHS)) == num_parameters
    x = jnp.ones((8, WIDTHS[0]), jnp.float32)
    compiled = jax.jit(apply_layers).lower(parameters, x).compile()
    # XLA counts n additions per sum of n terms, and the additions of the bias.
    flops = compiled.cost_analysis()["flops"] - 8 * sum(WIDTHS[1:])
    assert 8 * float(objectives.num_flops(WIDTHS)) == flops
    num_bytes = sum(
        apply_layers(parameters[:i], x).nbytes for i in range(len(parameters))
    )
    assert float(objectives.activation_bytes(WIDTHS, batch_size=8)) == num_bytes


@pytest.mark.parametrize(
    "cost",
    [objectives.num_parameters, objectives.num_flops, objectives.activation_bytes],
)
def test_costs_are_differentiable_in_widths(cost):
    """They are linear in each width, so a difference of one is the derivative.

    Widths are an array or a list of numbers, of which some may be traced.
    """
    widths = jnp.array(WIDTHS, jnp.float32)
    gradient = jax.grad(cost)(widths)
    first = jax.grad(lambda width: cost([width, *WIDTHS[1:-1], 2.0]))(widths[0])
    np.testing.assert_allclose(first, gradient[0])
    assert gradient.dtype == jnp.float32
    differences = [cost(widths.at[i].add(1)) - cost(widths) for i in range(len(WIDTHS))]
    np.testing.assert_allclose(gradient, differences, rtol=1e-6)


def test_an_expected_cost_is_the_mean_over_all_networks(key: jax.Array):
    """Two edges with three operations make nine networks."""
    keys = jax.random.split(key)
    logits = jax.random.normal(keys[0], (2, 3))
    costs = jax.random.uniform(keys[1], (2, 3))
    p = np.asarray(jax.nn.softmax(logits))
    mean = sum(p[0, i] * p[1, j] * (costs[0, i] + costs[1, j])
               for i in range(3) for j in range(3))  # fmt: skip
    np.testing.assert_allclose(objectives.expected_cost(logits, costs), mean)
    same_costs = objectives.expected_cost(logits, costs[0])
    np.testing.assert_allclose(same_costs, np.sum(p @ np.asarray(costs[0])), rtol=1e-12)


WIDE, DEEP = np.array([4.0, 8.0, 20.0]), np.array([1.0, 3.0])
SECONDS = np.array([[1.0, 3.0], [2.0, 7.0], [5.0, 9.0]])


def make_stub(seconds_fn, monkeypatch):
    """Returns ``(make_fn, calls)`` of runs that take ``seconds_fn(*widths)``."""
    time, calls = [0.0], []
    monkeypatch.setattr(latency, "perf_counter", lambda: time[0])

    def make_fn(*widths):
        def run():
            calls.append(widths)
            time[0] += seconds_fn(*widths)
            return jnp.zeros(2)

        return run

    return make_fn, calls


def test_a_table_of_one_width_interpolates_and_extrapolates_linearly():
    table = objectives.LatencyTable((jnp.array(WIDE),), jnp.array(SECONDS[:, 0]))
    assert [float(table(x)) for x in WIDE] == SECONDS[:, 0].tolist()
    x = np.linspace(4, 20, 33)
    np.testing.assert_allclose(jax.vmap(table)(x), np.interp(x, WIDE, SECONDS[:, 0]))
    np.testing.assert_allclose(table(24.0), 6.0)  # extrapolates the last piece
    other = objectives.LatencyTable((jnp.array(WIDE),), jnp.array(SECONDS[:, 1]))
    derivatives = jax.vmap(jax.grad(other))(
        jnp.array([1.0, 4.0, 6.0, 8.0, 19.0, 20.0, 50.0])
    )
    np.testing.assert_allclose(derivatives, [1.0] * 3 + [1 / 6] * 4)


def test_a_table_keeps_the_dtype_of_the_width():
    """The two knots are one number in bfloat16."""
    table = objectives.LatencyTable((jnp.array(WIDE),), jnp.array(SECONDS[:, 0]))
    assert table(jnp.float32(6.0)).dtype == jnp.float32
    knots = jnp.array([256.0, 257.0])
    seconds = objectives.LatencyTable((knots,), knots)(jnp.bfloat16(256.0))
    assert (seconds, seconds.dtype) == (256.0, jnp.bfloat16)


def test_a_table_of_two_widths_is_bilinear():
    """Inside a cell the corners are weighted by the areas opposite to them."""
    table = objectives.LatencyTable((jnp.array(WIDE), jnp.array(DEEP)), SECONDS)
    for i, j in np.ndindex(3, 2):
        assert float(table(WIDE[i], DEEP[j])) == SECONDS[i, j]
    u, v = 0.25, 0.5  # at (5, 2), in the cell from (4, 1) to (8, 3)
    corners = np.array([(1 - u) * (1 - v), (1 - u) * v, u * (1 - v), u * v])
    np.testing.assert_allclose(table(5.0, 2.0), corners @ SECONDS[:2].ravel())
    gradient = jax.grad(table, argnums=(0, 1))(5.0, 2.0)
    expected = (
        (SECONDS[1] - SECONDS[0]).mean() / 4,
        (1 - u) * (3 - 1) / 2 + u * (7 - 2) / 2,
    )
    np.testing.assert_allclose(gradient, expected)


def test_a_measured_table_holds_medians_without_the_first_run(monkeypatch):
    # The first run compiles, and one of the others is held up.
    delays = iter([9.0, 0.1, 0.1, 5.0] * 6)
    make_fn, calls = make_stub(lambda n, m: next(delays) + n * m, monkeypatch)
    table = objectives.LatencyTable.measure(make_fn, [2, 4, 8], [1, 3], num_repeats=3)
    pairs = list(itertools.product((2, 4, 8), (1, 3)))
    assert calls == [pair for pair in pairs for _ in range(4)]
    expected = 0.1 + np.outer([2, 4, 8], [1, 3])
    np.testing.assert_allclose(table.seconds, expected, rtol=1e-12)
    np.testing.assert_allclose(table(3.0, 2.0), 0.1 + 6.0)  # a product is bilinear


def test_a_table_of_two_axes_refuses_arrays_of_widths():
    """Their entries would be combined with each other; `jax.vmap` takes pairs."""
    table = objectives.LatencyTable((jnp.array(WIDE), jnp.array(DEEP)), SECONDS)
    wide, deep = jnp.array([2.0, 3.0]), jnp.array([1.0, 2.0])
    with pytest.raises(ValueError, match="widths"):
        table(wide, deep)
    expected = [table(x, y) for x, y in zip(wide, deep, strict=True)]
    np.testing.assert_allclose(jax.vmap(table)(wide, deep), expected)


def test_a_table_of_increasing_seconds_increases_everywhere(monkeypatch):
    make_fn, _ = make_stub(lambda n: n**1.5, monkeypatch)
    table = objectives.LatencyTable.measure(make_fn, range(1, 9))
    x = jnp.linspace(0, 12, 200)
    assert np.all(np.diff(jax.vmap(table)(x)) > 0)
    assert np.all(jax.vmap(jax.grad(table))(x) > 0)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("knots", lambda: objectives.LatencyTable(WIDE, WIDE)),
        (
            "knots.*finite",
            lambda: objectives.LatencyTable((jnp.array([8.0, np.inf]),), jnp.ones(2)),
        ),
        ("knots", lambda: objectives.LatencyTable((WIDE[:1],), WIDE[:1])),
        ("knots", lambda: objectives.LatencyTable((WIDE[::-1],), WIDE)),
        ("seconds", lambda: objectives.LatencyTable((WIDE, DEEP), WIDE)),
        ("seconds", lambda: objectives.LatencyTable((WIDE,), WIDE * np.nan)),
        ("widths", lambda: objectives.LatencyTable((WIDE,), WIDE)(1.0, 2.0)),
        ("widths", lambda: objectives.LatencyTable.measure(lambda n: n)),
        ("make_fn", lambda: objectives.LatencyTable.measure(3, [1, 2])),
        ("widths", lambda: objectives.num_flops([3.0])),
    ],
    ids=[
        *(
            "no tuple",
            "infinite",
            "one knot",
            "decreasing",
            "shape",
            "NaN",
            "two widths",
        ),
        *("no axis", "no function", "one layer"),
    ],
)
def test_invalid_tables_and_widths_are_named(name, call):
    with pytest.raises((TypeError, ValueError), match=name):
        call()


@pytest.mark.parametrize("widths", [[64, 8], [64]])
def test_knots_are_checked_before_anything_is_timed(widths):
    timed = []
    with pytest.raises(ValueError, match="knots must"):
        objectives.LatencyTable.measure(timed.append, widths)
    assert timed == []
