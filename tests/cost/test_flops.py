"""Tests of operation counts against counts made by hand and against XLA."""

import inspect
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg

A, B = jnp.ones((5, 7)), jnp.ones((7, 11))
SQUARE = 2.0 * jnp.eye(6)

# Single operations.

linalg = jax.lax.linalg
pool = lambda x: jax.lax.reduce_window(
    x, -jnp.inf, jax.lax.max, (2, 2), (2, 2), "VALID"
)
OPERATIONS = {
    "matrix product": (lambda: A @ B, 2 * 5 * 7 * 11),
    "batched matrix product": (
        lambda: jax.vmap(lambda s: (s * A) @ B)(jnp.ones(3)),
        3 * (5 * 7 + 2 * 5 * 7 * 11),
    ),
    "outer product": (lambda: jnp.outer(A[0], B[0]), 7 * 11),
    "inner product": (lambda: jnp.vdot(A, A), 2 * 35),
    "elementwise": (lambda: 2.0 * A + 1.0, 2 * 35),
    "comparison": (lambda: A > 0.5, 35),
    "exponential": (lambda: jnp.exp(A), 35),
    "root": (lambda: jnp.sqrt(A), 35),
    "sum": (lambda: jnp.sum(A), 35),
    "moves": (lambda: jnp.where(True, A.T[::2, 1:].reshape(-1), 0.0), 0),
    "gather and scatter": (lambda: A.at[jnp.array([1, 2])].set(A[:2]), 0),
    "scatter-add": (lambda: A.at[jnp.array([1, 1])].add(A[:2]), 2 * 7),
    "scatter-subtract": (lambda: A.at[jnp.array([1, 1])].subtract(A[:2]), 2 * 7),
    "tile": (lambda: jnp.tile(A, 3), 0),
    "integers": (lambda: jnp.arange(9) * 2 + 1, 0),
    "key": (lambda: jax.random.split(jax.random.key(0)), 0),
    "powers of two": (lambda: jnp.ldexp(*jnp.frexp(jnp.ones(3))), None),
    "Cholesky": (lambda: linalg.cholesky(SQUARE, symmetrize_input=False), 72),
    "LU": (lambda: linalg.lu(SQUARE)[0], 2 * 72),
    "triangular solve": (
        lambda: linalg.triangular_solve(SQUARE, jnp.ones((6, 2)), left_side=True), 72
    ),
    "sort": (lambda: jnp.sort(jnp.ones(8)), 8 * 3),
    "top k": (lambda: jax.lax.top_k(jnp.ones((3, 8)), 2)[0], 24 * 3),
    "pooling": (lambda: pool(jnp.ones((4, 4))), 16),
}  # fmt: skip


# Newer versions of JAX have a primitive for it.
polynomial = lambda: jnp.polyval(jnp.ones(5), A)
if "= polynomial" in str(jax.make_jaxpr(polynomial)()):
    OPERATIONS["polynomial"] = (polynomial, 2 * 35 * 4)

if "axis" in inspect.signature(jax.lax.top_k).parameters:
    top_k = lambda: jax.lax.top_k(jnp.ones((8, 3)), 2, axis=0)[0]
    OPERATIONS["top k, axis 0"] = (top_k, 24 * 3)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_counts_as_by_hand(name):
    function, expected = OPERATIONS[name]
    flops = hg.cost.flops(function)
    assert flops.unknown == ()
    assert expected is None or flops.total() == expected


@pytest.mark.parametrize("name", ["tanh", "arcsin", "arccos", "arctanh"])
def test_derivatives_of_elementary_functions_are_known(name):
    """Some of them have a primitive of their own, such as ``1 - x^2``."""
    function = lambda x: jnp.sum(getattr(jnp, name)(x))
    flops = hg.cost.flops(jax.grad(function), jnp.full(5, 0.5))
    assert flops.unknown == ()
    assert 2 * 5 <= flops.total() <= 8 * 5


def test_results_that_no_output_depends_on_are_not_counted():
    """A gradient does not need the value of its loss, also in the body of a loop."""
    grad = jax.grad(lambda w: 0.5 * jnp.vdot(w, w))
    # Both factors contribute w / 2, which are added; 1 operation makes the 1/2.
    by_hand = 3 * 9 + 1
    assert hg.cost.flops(grad, jnp.ones(9)).total() == by_hand
    loop = lambda w: jax.lax.while_loop(lambda w: True, grad, w)
    assert hg.cost.flops(loop, jnp.ones(9)).total(10) == 10 * by_hand


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("eigh", lambda: jnp.linalg.eigh(SQUARE)[0]),
        ("fft", lambda: jnp.abs(jnp.fft.fft(jnp.ones(8)))),
        ("mul", lambda: jnp.real(jnp.full(3, 1j) * jnp.full(3, 1j))),
        ("pure_callback", lambda: jax.pure_callback(np.sin, A[0], A[0])),
    ],
)
def test_operations_that_cannot_be_counted_are_named(name, function):
    assert name in hg.cost.flops(function).unknown
    nested = jax.jit(lambda: jax.lax.map(lambda _: function(), jnp.arange(2)))
    assert name in hg.cost.flops(nested).unknown


# Calls.


@jax.custom_jvp
def square(x):
    return x * x


square.defjvp(lambda x, t: (square(x[0]), 2.0 * x[0] * t[0]))


@jax.custom_vjp
def cube(x):
    return x * x * x


cube.defvjp(lambda x: (cube(x), x), lambda x, t: (3.0 * x * x * t,))


def halve(x):
    return jax.lax.custom_linear_solve(
        lambda v: 2.0 * v, x, lambda _, b: b / 2.0, lambda _, b: b / 2.0
    )


CALLS = {
    "jit": (jax.jit(lambda x: x * x), 10),
    "checkpoint": (jax.checkpoint(lambda x: x * x), 10),
    "custom_jvp": (square, 10),
    "grad of custom_jvp": (jax.grad(lambda x: jnp.sum(square(x))), 20),
    "custom_vjp": (cube, 20),
    "grad of custom_vjp": (jax.grad(lambda x: jnp.sum(cube(x))), 30),
    "custom_linear_solve": (halve, 10),
    "cond: most expensive branch": (
        lambda x: jax.lax.cond(x[0] > 0, lambda x: x * x * x, lambda x: x + 1.0, x),
        21,
    ),
    "vmap": (jax.vmap(jax.jit(lambda x: x * x)), 10),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_counts_its_body_once(name):
    function, expected = CALLS[name]
    flops = hg.cost.flops(function, jnp.ones(10))
    assert flops.total() == expected
    assert flops.unknown == ()


def shard(function):
    """Returns the function of rows, distributed over four devices."""
    mesh = jax.sharding.AbstractMesh(
        (4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    spec = jax.sharding.PartitionSpec("i")
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec)


def test_shard_map_counts_all_devices():
    function, x = lambda x: x @ jnp.ones((3, 3)), jnp.ones((8, 3))
    sharded = shard(function)
    assert hg.cost.flops(sharded, x).total() == hg.cost.flops(function, x).total()


def test_shard_map_counts_an_iteration_of_a_loop_on_all_devices():
    def function(x):
        step = lambda carry: (carry[0] + 1, jnp.exp(carry[1]) * 2.0)
        return jax.lax.while_loop(lambda carry: carry[0] < 5, step, (0, x))[1]

    both = shard(function), function
    (actual,), (expected,) = (hg.cost.flops(f, jnp.ones((8, 3))).loops for f in both)
    assert actual.flops == expected.flops == 48


# Loops.

N = 100
PRODUCT = 2 * N * N  # operations of a matrix-vector product
MATRIX, VECTOR = jnp.eye(N), jnp.ones(N)


def power(A, x, num_steps, step=lambda x, A: A @ x):
    return jax.lax.scan(lambda x, _: (step(x, A), None), x, length=num_steps)[0]


@pytest.mark.parametrize("num_steps", [1, 10, 1000])
@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpoint"])
def test_a_scan_counts_its_body_per_step(num_steps, checkpoint):
    """The forward pass does not depend on checkpoints."""
    step = lambda x, A: A @ x
    step = jax.checkpoint(step) if checkpoint else step
    run = lambda A, x: power(A, x, num_steps, step)
    assert hg.cost.flops(run, MATRIX, VECTOR).total() == num_steps * PRODUCT


@pytest.mark.parametrize("num_steps", [1, 1000])
@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpoint"])
def test_the_gradient_of_a_scan_counts_both_passes(num_steps, checkpoint):
    """``x <- tanh(A x)`` needs ``A x``, again if recomputed, ``A' u`` and ``u x'``."""
    step = lambda x, A: jnp.tanh(A @ x)
    step = jax.checkpoint(step) if checkpoint else step
    run = lambda A, x: jnp.sum(power(A, x, num_steps, step))
    flops = hg.cost.flops(jax.grad(run), MATRIX, VECTOR)
    # An outer product has N^2 multiplications, and N^2 sums with those of other steps.
    by_hand = num_steps * PRODUCT * (4 if checkpoint else 3)
    assert flops.total() == pytest.approx(by_hand, rel=0.05)


def xla_flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def test_a_while_loop_counts_by_its_iterations():
    """The condition is tested once more than the body runs."""

    def run(A, x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 10, lambda x: A @ x, x)

    flops = hg.cost.flops(run, MATRIX, VECTOR)
    (loop,) = flops.loops
    assert "test_flops.py" in loop.location
    assert loop.flops == PRODUCT + N + 1
    assert flops.total(7) == 7 * PRODUCT + 8 * (N + 1)
    batched = hg.cost.flops(jax.vmap(run, (None, 0)), MATRIX, jnp.ones((3, N)))
    assert batched.total(7) == pytest.approx(3 * flops.total(7), rel=0.05)


def test_nested_loops_count_all_of_their_iterations():
    """A scan of 5 steps contains a while loop, which contains another."""

    def inner_loop(state):
        return jax.lax.while_loop(
            lambda s: s[0] < 4, lambda s: (s[0] + 1, s[1] * s[1]), (0, state[1])
        )

    def step(x, _):
        body_fun = lambda state: (state[0] + 1, inner_loop(state)[1] + 1.0)
        return jax.lax.while_loop(lambda s: s[0] < 3, body_fun, (0, 2.0 * x))[1], None

    flops = hg.cost.flops(lambda x: jax.lax.scan(step, x, length=5)[0], VECTOR)
    assert [loop.flops for loop in flops.loops] == [N, N]
    assert flops.total(5 * 3, 5 * 3 * 4) == N * (5 + 5 * 3 + 5 * 3 * 4)


def test_equal_loops_share_one_entry():
    run = lambda x: jax.lax.while_loop(lambda x: True, lambda x: x * x, x)
    flops = hg.cost.flops(lambda x: run(run(x)), VECTOR)
    assert flops.total(2 + 3) == 5 * N


def test_total_requires_the_iterations_of_every_loop():
    run = lambda x: jax.lax.while_loop(lambda x: x < 3, lambda x: x * x, x)
    with pytest.raises(ValueError, match=r"iterations.*test_flops\.py"):
        hg.cost.flops(run, 1.0).total()
    with pytest.raises(ValueError, match="iterations"):
        hg.cost.flops(jnp.sin, 1.0).total(3)


# Estimates.

NUM_ROWS = 2 * N
GRADIENT = 2 * PRODUCT * NUM_ROWS // N  # of a least-squares loss: X w and X' r
W, ALPHA = jnp.zeros(N), jnp.zeros(())


@pytest.fixture(scope="module")
def ridge():
    """Returns least squares with one penalty, and data of equal sizes."""
    X, Z = jax.random.normal(jax.random.key(0), (2, NUM_ROWS, N))
    mse = lambda w, alpha, batch: 0.5 * jnp.mean(jnp.square(batch[0] @ w - batch[1]))
    penalized = lambda w, alpha, batch: (
        mse(w, alpha, batch) + 0.5 * jnp.exp(alpha) * jnp.vdot(w, w)
    )
    return hg.Bilevel(penalized, mse, (X, X[:, 0]), (Z, Z[:, 0]))


def test_conjugate_gradients_cost_a_product_per_reported_iteration(ridge):
    """A product has as many operations as a gradient."""
    num_steps = 30
    solver = hg.Descent(optax.sgd(0.1), num_steps)
    linear_solver = hg.CG(preconditioner=None)
    estimator = hg.Implicit(solver, linear_solver, estimate_error=False)
    estimate_fn = hg.hypergradient(ridge, estimator)
    flops, stats = hg.cost.flops(estimate_fn, W, ALPHA), estimate_fn(W, ALPHA).stats
    num_iterations = int(stats["num_hvps"]) - 1  # the last product follows the loop
    is_cg = ["run_recurrence" in loop.location for loop in flops.loops]
    assert is_cg.count(True) == 1
    assert num_iterations > 10
    # The others are dL/dw and H v at the end, and an outer gradient.
    by_hand = (num_steps + 3 + num_iterations) * GRADIENT
    total = flops.total(*(num_iterations * loop_is_cg for loop_is_cg in is_cg))
    assert total == pytest.approx(by_hand, rel=0.05)


# Programs without loops, against XLA.


def random_layers(sizes, key):
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = zip(keys, pairwise(sizes), strict=True)
    return [jax.random.normal(k, shape) / shape[0] ** 0.5 for k, shape in shapes]


def network(weights, x):
    for w in weights:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


def convolution(kernel, x):
    x = jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME")
    return jnp.mean(x**2)


@pytest.mark.parametrize("depth", [1, 3])
def test_the_gradient_of_a_network_costs_three_values(depth, key):
    """The product for the derivative by the input is not needed."""
    sizes, num_rows = (50,) + (60,) * depth, 64
    weights, x = random_layers(sizes, key), jnp.ones((num_rows, 50))
    products = [2 * num_rows * n * m for n, m in pairwise(sizes)]
    by_hand = 3 * sum(products) - products[0]
    grad = jax.grad(network)
    total = hg.cost.flops(grad, weights, x).total()
    assert total == pytest.approx(by_hand, rel=0.05)
    assert total == pytest.approx(xla_flops(grad, weights, x), rel=0.05)


@pytest.mark.parametrize("argnum", [0, 1], ids=["kernel", "input"])
def test_a_convolution_counts_pairs_of_elements(argnum, key):
    """Checks stride, padding and both gradients."""
    kernel = jax.random.normal(key, (8, 4, 3, 3))
    x = jnp.ones((2, 4, 16, 16))
    # Along an axis all 3 kernel elements are inside at 7 of 8 positions, 2 at the last.
    forward = 2 * 2 * 8 * 4 * (7 * 3 + 2) ** 2
    assert hg.cost.flops(convolution, kernel, x).total() == pytest.approx(
        forward + 2 * 2 * 8 * 8 * 8, rel=1e-2
    )
    grad = jax.grad(convolution, argnum)
    total = hg.cost.flops(grad, kernel, x).total()
    assert total == pytest.approx(2 * forward, rel=0.05)
    assert total == pytest.approx(xla_flops(grad, kernel, x), rel=0.05)


def test_a_print_counts_nothing():
    """Its primitive has no outputs."""

    def function(x):
        jax.debug.print("{}", x)
        jax.debug.callback(np.sin, x)
        return 2 * x

    flops = hg.cost.flops(function, 1.0)
    assert (flops.fixed, flops.unknown) == (1, ())
