"""What computations cost, against counts made by hand."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg

# FLOPs: single operations.

A, B = jnp.ones((5, 7)), jnp.ones((7, 11))
SQUARE = 2.0 * jnp.eye(6)
OPERATIONS = {
    "a matrix product": (lambda: A @ B, 2 * 5 * 7 * 11),
    "a batch of them": (
        lambda: jax.vmap(lambda s: (s * A) @ B)(jnp.ones(3)),
        3 * (5 * 7 + 2 * 5 * 7 * 11),
    ),
    "an outer product": (lambda: jnp.outer(A[0], B[0]), 7 * 11),
    "an inner product": (lambda: jnp.vdot(A, A), 2 * 35),
    "elementwise": (lambda: 2.0 * A + 1.0, 2 * 35),
    "a comparison": (lambda: A > 0.5, 35),
    "an exponential": (lambda: jnp.exp(A), 35),
    "a sum": (lambda: jnp.sum(A), 35),
    "numbers that move": (lambda: jnp.where(True, A.T[::2, 1:].reshape(-1), 0.0), 0),
    "a gather and a scatter": (lambda: A.at[jnp.array([1, 2])].set(A[:2]), 0),
    "a scatter that adds": (lambda: A.at[jnp.array([1, 1])].add(A[:2]), 2 * 7),
    "integers": (lambda: jnp.arange(9) * 2 + 1, 0),
    "a key": (lambda: jax.random.split(jax.random.key(0)), 0),
    "Cholesky": (lambda: jax.lax.linalg.cholesky(SQUARE, symmetrize_input=False), 72),
    "LU": (lambda: jax.lax.linalg.lu(SQUARE)[0], 2 * 72),
    "a triangular solve": (
        lambda: jax.lax.linalg.triangular_solve(
            SQUARE, jnp.ones((6, 2)), left_side=True
        ),
        2 * 36,
    ),
    "a sort": (lambda: jnp.sort(jnp.ones(8)), 8 * 3),
    "pooling": (
        lambda: jax.lax.reduce_window(
            jnp.ones((4, 4)), -jnp.inf, jax.lax.max, (2, 2), (2, 2), "VALID"
        ),
        16,
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_has_its_price(name: str):
    """Each beside its count by hand."""
    function, expected = OPERATIONS[name]
    found = hg.cost.flops(function)
    assert found.total() == expected
    assert found.unknown == ()


def test_exponentials_and_roots_are_told_apart():
    """As one operation each, and counted once more by themselves."""
    found = hg.cost.flops(lambda x: jnp.exp(x) + jnp.sqrt(x) * x, jnp.ones(5))
    assert (found.fixed, found.transcendentals) == (20, 10)


@pytest.mark.parametrize("name", ["tanh", "arcsin", "arccos", "arctanh"])
def test_derivatives_of_elementary_functions_have_prices(name: str):
    """Some by an operation of their own, ``1 - x^2``."""
    function = lambda x: jnp.sum(getattr(jnp, name)(x))
    found = hg.cost.flops(jax.grad(function), jnp.full(5, 0.5))
    assert found.unknown == ()
    assert 2 * 5 <= found.total() <= 8 * 5


def test_what_no_output_needs_is_not_counted():
    """The value of a loss under its gradient, say; nor in the body of a loop."""
    loss = lambda w: 0.5 * jnp.vdot(w, w)
    # Two factors of a product, w / 2 each, their sum, and 1 for 1/2: no w'w, 2 * 9.
    gradient = jax.grad(loss)
    assert hg.cost.flops(gradient, jnp.ones(9)).total() == 3 * 9 + 1
    loop = lambda w: jax.lax.while_loop(lambda w: True, gradient, w)
    assert hg.cost.flops(loop, jnp.ones(9)).total(10) == 10 * (3 * 9 + 1)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("eigh", lambda: jnp.linalg.eigh(SQUARE)[0]),
        ("fft", lambda: jnp.abs(jnp.fft.fft(jnp.ones(8)))),
        ("mul", lambda: jnp.real(1j * jnp.ones(3))),
        ("pure_callback", lambda: jax.pure_callback(np.sin, A[0], A[0])),
    ],
)
def test_what_has_no_price_is_named(name: str, function):
    """Rather than silently free, wherever it stands."""
    assert name in hg.cost.flops(function).unknown
    nested = jax.jit(lambda: jax.lax.map(lambda _: function(), jnp.arange(2)))
    assert name in hg.cost.flops(nested).unknown


def test_powers_of_two_are_free():
    """They move bits; newer versions of jax keep them as primitives of their own."""
    split = lambda x: jnp.ldexp(*jnp.frexp(x))
    assert hg.cost.flops(split, jnp.ones(3)).unknown == ()


# Calls are walked into.


@jax.custom_jvp
def squared(x):
    return x * x


squared.defjvp(lambda x, t: (squared(x[0]), 2.0 * x[0] * t[0]))


@jax.custom_vjp
def cubed(x):
    return x * x * x


cubed.defvjp(lambda x: (cubed(x), x), lambda x, t: (3.0 * x * x * t,))


def halved(x):
    return jax.lax.custom_linear_solve(
        lambda v: 2.0 * v, x, lambda _, b: b / 2.0, lambda _, b: b / 2.0
    )


ONE = jnp.ones(10)
CALLS = {
    "jit": (jax.jit(lambda x: x * x), 10),
    "checkpoint": (jax.checkpoint(lambda x: x * x), 10),
    "custom_jvp": (squared, 10),
    "custom_jvp, differentiated": (jax.grad(lambda x: jnp.sum(squared(x))), 20),
    "custom_vjp": (cubed, 20),
    "custom_vjp, differentiated": (jax.grad(lambda x: jnp.sum(cubed(x))), 30),
    "custom_linear_solve": (halved, 10),
    "cond: the dearest": (
        lambda x: jax.lax.cond(x[0] > 0, lambda x: x * x * x, lambda x: x + 1.0, x),
        21,
    ),
    "vmap": (jax.vmap(jax.jit(lambda x: x * x)), 10),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_costs_what_it_runs(name: str):
    """Once, whatever form it has."""
    function, expected = CALLS[name]
    found = hg.cost.flops(function, ONE)
    assert found.total() == expected
    assert found.unknown == ()


def test_all_devices_count():
    """On a mesh that is a shape alone, of four devices."""
    mesh = jax.sharding.AbstractMesh(
        (4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    parts = jax.sharding.PartitionSpec("i")
    function = lambda x: x @ jnp.ones((3, 3))
    sharded = jax.shard_map(function, mesh=mesh, in_specs=parts, out_specs=parts)
    x = jnp.ones((8, 3))
    assert hg.cost.flops(sharded, x).total() == hg.cost.flops(function, x).total()


# Loops.

N = 100
PRODUCT = 2 * N * N


def power(A, x, num_steps, step=lambda x, A: A @ x):
    return jax.lax.scan(lambda x, _: (step(x, A), None), x, length=num_steps)[0]


@pytest.mark.parametrize("num_steps", [1, 10, 1000])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_scan_counts_its_body_at_each_step(num_steps: int, checkpoint: bool):
    """Forward, where checkpoints change nothing."""
    step = lambda x, A: A @ x
    step = jax.checkpoint(step) if checkpoint else step
    run = lambda A, x: power(A, x, num_steps, step)
    assert hg.cost.flops(run, jnp.eye(N), jnp.ones(N)).total() == num_steps * PRODUCT


@pytest.mark.parametrize("num_steps", [1, 10, 1000])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_gradient_through_a_scan_counts_both_passes(num_steps: int, checkpoint: bool):
    """Of x <- tanh(A x): A x forward, and again if recomputed; A' u and u x' back."""
    step = lambda x, A: jnp.tanh(A @ x)
    step = jax.checkpoint(step) if checkpoint else step
    run = lambda A, x: jnp.sum(power(A, x, num_steps, step))
    found = hg.cost.flops(jax.grad(run), jnp.eye(N), jnp.ones(N))
    # An outer product is N^2 products, and N^2 sums as it joins those of other steps.
    by_hand = num_steps * PRODUCT * (4 if checkpoint else 3)
    assert found.total() == pytest.approx(by_hand, rel=0.05)


def test_xlas_own_analysis_counts_a_loop_once():
    """Why the program is walked; should XLA learn to count, this tells."""
    of = lambda n: cost_analysis(lambda A, x: power(A, x, n), jnp.eye(N), jnp.ones(N))
    assert of(100) == pytest.approx(of(10), rel=0.01)


def test_a_loop_of_unknown_length_counts_by_its_iterations():
    """The test of its condition once more than its body."""

    def run(A, x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 10, lambda x: A @ x, x)

    found = hg.cost.flops(run, jnp.eye(N), jnp.ones(N))
    (loop,) = found.loops
    assert "test_cost.py" in loop.where
    assert loop.flops == PRODUCT + N + 1
    assert found.total(7) == 7 * PRODUCT + 8 * (N + 1)
    many = hg.cost.flops(jax.vmap(run, (None, 0)), jnp.eye(N), jnp.ones((3, N)))
    assert many.total(7) == pytest.approx(3 * found.total(7), rel=0.05)


def test_loops_in_loops_count_all_of_their_iterations():
    """5 steps of a scan, each with a loop, within it another."""

    def inside(state):
        return jax.lax.while_loop(
            lambda s: s[0] < 4, lambda s: (s[0] + 1, s[1] * s[1]), (0, state[1])
        )

    def step(x, _):
        beyond = lambda state: (state[0] + 1, inside(state)[1] + 1.0)
        return jax.lax.while_loop(lambda s: s[0] < 3, beyond, (0, 2.0 * x))[1], None

    found = hg.cost.flops(lambda x: jax.lax.scan(step, x, length=5)[0], jnp.ones(N))
    assert [loop.flops for loop in found.loops] == [N, N]
    assert found.total(5 * 3, 5 * 3 * 4) == N * (5 + 5 * 3 + 5 * 3 * 4)


def test_a_loop_that_runs_twice_has_one_entry():
    """Iterations add."""
    run = lambda x: jax.lax.while_loop(lambda x: True, lambda x: x * x, x)
    assert hg.cost.flops(lambda x: run(run(x)), jnp.ones(N)).total(2 + 3) == 5 * N


def test_a_total_needs_the_iterations_of_every_loop():
    """And says which loops there are."""
    run = lambda x: jax.lax.while_loop(lambda x: x < 3, lambda x: x * x, x)
    with pytest.raises(ValueError, match=r"1 numbers, got 0; loops: .*test_cost.py"):
        hg.cost.flops(run, 1.0).total()
    with pytest.raises(ValueError, match=r"0 numbers, got 1; loops: none"):
        hg.cost.flops(jnp.sin, 1.0).total(3)


# Estimates.

ROWS = 2 * N
GRADIENT = 2 * PRODUCT * ROWS // N  # of a least-squares loss: X w, and X' r


@pytest.fixture
def ridge(key):
    """Least squares with one penalty; inner and outer data of one size."""
    X, Z = jax.random.normal(key, (2, ROWS, N))
    loss = lambda w, alpha, batch: 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)
    penalised = lambda w, alpha, batch: (
        loss(w, alpha, batch) + 0.5 * jnp.exp(alpha) * jnp.vdot(w, w)
    )
    return hg.Bilevel(penalised, loss, (X, X[:, 0]), (Z, Z[:, 0]))


@pytest.mark.parametrize("num_steps", [1, 10, 1000])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_unrolling_costs_a_gradient_and_a_product_a_step(
    ridge, num_steps: int, checkpoint: bool
):
    """As many operations each; with two levels of checkpoints every step twice."""
    solver = hg.Descent(optax.sgd(0.1), num_steps)
    estimator = hg.Unrolled(solver, checkpoint=checkpoint)
    estimate = hg.hypergradient(ridge, estimator)
    found = hg.cost.flops(estimate, jnp.zeros(N), jnp.zeros(()))
    again = num_steps if checkpoint and num_steps >= 4 else 0
    # And the outer gradient, and the inner one whose norm is reported.
    by_hand = (2 * num_steps + again + 2) * GRADIENT
    assert found.total() == pytest.approx(by_hand, rel=0.05)
    assert found.unknown == ()


def test_conjugate_gradients_cost_what_their_counted_iterations_do(ridge):
    """A product an iteration, as many operations as a gradient."""
    num_steps = 30
    solver = hg.Descent(optax.sgd(0.1), num_steps)
    function = hg.hypergradient(ridge, hg.Implicit(solver))
    arguments = jnp.zeros(N), jnp.zeros(())
    found, stats = hg.cost.flops(function, *arguments), function(*arguments).stats
    iterations = int(stats["num_hvps"]) - 1  # the last is beyond the loop
    of_cg = ["conjugate_gradients" in loop.where for loop in found.loops]
    assert of_cg.count(True) == 1
    assert iterations > 10
    # Beyond the loop: the inner steps, dL/dw and H v at the end, two outer gradients.
    by_hand = (num_steps + 4 + iterations) * GRADIENT
    counted = found.total(*(iterations * here for here in of_cg))
    assert counted == pytest.approx(by_hand, rel=0.05)


# Against XLA, where there is no loop.


def cost_analysis(function, *args) -> float:
    found = jax.jit(function).lower(*args).compile().cost_analysis()
    return found["flops"]


def layers(sizes, key):
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = zip(keys, pairwise(sizes), strict=True)
    return [jax.random.normal(k, shape) / shape[0] ** 0.5 for k, shape in shapes]


def network(ws, x):
    for w in ws:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


def convolved(kernel, x):
    x = jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME")
    return jnp.mean(x**2)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_gradient_of_a_network_costs_three_times_its_value(depth: int, key):
    """Less the product that would lead to the input; XLA agrees."""
    sizes, rows = (50,) + (60,) * depth, 64
    ws, x = layers(sizes, key), jnp.ones((rows, 50))
    products = [2 * rows * n * m for n, m in pairwise(sizes)]
    by_hand = 3 * sum(products) - products[0]
    found = hg.cost.flops(jax.grad(network), ws, x).total()
    assert found == pytest.approx(by_hand, rel=0.05)
    assert found == pytest.approx(cost_analysis(jax.grad(network), ws, x), rel=0.05)


def test_a_hessian_vector_product_agrees_with_xla(key):
    """Forward over reverse."""
    ws, vs = (layers((50, 60, 60), k) for k in jax.random.split(key))
    args = ws, vs, jnp.ones((64, 50))
    hvp = lambda ws, vs, x: jax.jvp(lambda w: jax.grad(network)(w, x), (ws,), (vs,))[1]
    found = hg.cost.flops(hvp, *args).total()
    assert found == pytest.approx(cost_analysis(hvp, *args), rel=0.05)


@pytest.mark.parametrize("wrt", [0, 1])
def test_a_convolution_counts_what_meets(wrt: int, key):
    """A stride of 2 and padding, and both gradients, as a loop over all pairs does."""
    kernel = jax.random.normal(key, (8, 4, 3, 3))
    x = jnp.ones((2, 4, 16, 16))
    # Of 3 entries all lie inside at 7 of 8 places along an axis, 2 at the last.
    forward = 2 * 2 * 8 * 4 * (7 * 3 + 2) ** 2
    assert hg.cost.flops(convolved, kernel, x).total() == pytest.approx(
        forward + 2 * 2 * 8 * 8 * 8, rel=1e-2
    )
    gradient = jax.grad(convolved, wrt)
    found = hg.cost.flops(gradient, kernel, x).total()
    assert found == pytest.approx(2 * forward, rel=0.05)
    assert found == pytest.approx(cost_analysis(gradient, kernel, x), rel=0.05)
