"""Loops over large arrays are not compiled into a kernel of one core."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.extend import hvp
from hypergrad.outer_loop.block import run_block
from hypergrad.outer_loop.step import Budget
from hypergrad.runtime import all_cores
from hypergrad.runtime.all_cores import on_all_cores

NUM_EXAMPLES, DIM = 16_384, 80  # 5 MiB
LARGE = jnp.zeros((NUM_EXAMPLES, DIM))
SGD = optax.sgd(0.1)


def outer_loss(w, alpha, batch):
    x, y = batch
    return jnp.mean(jax.nn.softplus(-y * (x @ w)))


def inner_loss(w, alpha, batch):
    return outer_loss(w, alpha, batch) + jnp.exp(alpha) @ w**2 / 2


def problem_of(data):
    return hg.Bilevel(inner_loss, outer_loss, data, data)


def compile_estimate(estimator):
    """Returns the compiled program of one hypergradient, with data as an argument."""

    @jax.jit
    def estimate(data, w, alpha):
        return hg.hypergradient(problem_of(data), estimator)(w, alpha).hypergradient

    zeros = jnp.zeros(DIM)
    return estimate.lower((LARGE, jnp.ones(NUM_EXAMPLES)), zeros, zeros).compile()


def compile_steps(method):
    """Returns the compiled program of a block of steps of a single-loop method."""
    loop = hg.OuterLoop(problem_of((LARGE, jnp.ones(NUM_EXAMPLES))), method, SGD)
    state = loop.init(jnp.zeros(DIM), jnp.zeros(DIM))
    budget, two = Budget.create(None), jnp.asarray(2)
    lowered = run_block.lower(loop, state, budget, two, two, 4, 4)
    return lowered.compile().compiled


def num_kernels_with_data(compiled):
    """Returns how many loops that read the data are single kernels."""
    return sum(
        "xla_cpu_small_call" in line and f"[{NUM_EXAMPLES},{DIM}]" in line
        for line in compiled.as_text().splitlines()
    )


ESTIMATORS = {
    "Descent": hg.Implicit(hg.Descent(SGD, 10)),
    "LBFGS": hg.Implicit(hg.LBFGS(10)),
    "Newton": hg.Implicit(hg.Newton(5)),
    "MINRES": hg.Implicit(hg.Descent(SGD, 10), hg.MINRES()),
    "Neumann": hg.Implicit(hg.Descent(SGD, 10), hg.Neumann(10, 0.1)),
}
METHODS = {
    "SOBA": hg.SOBA(SGD),
    "SABA": hg.SABA(SGD),
    "SRBA": hg.SRBA(SGD, period=4),
    "AmIGO": hg.AmIGO(SGD, 5, 5),
    "DARTS": hg.DARTS(SGD, 0.1),
    "F2SA": hg.F2SA(SGD, 5, penalty=1.0),
    "BOME": hg.BOME(SGD, 5, step_size=0.1),
    "MRBO": hg.MRBO(SGD, 5, step_size=0.1, momentum=0.5),
}
CASES = [
    *[(compile_estimate, estimator) for estimator in ESTIMATORS.values()],
    *[(compile_steps, method) for method in METHODS.values()],
]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA does so on CPUs")
@pytest.mark.parametrize(
    ("compile_fn", "estimator"), CASES, ids=[*ESTIMATORS, *METHODS]
)
def test_no_loop_over_large_data_is_one_kernel(compile_fn, estimator):
    assert num_kernels_with_data(compile_fn(estimator)) == 0


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA does so on CPUs")
def test_a_rare_pass_over_large_data_leaves_small_steps_as_they_are(monkeypatch):
    """SRBA uses all data only now and then; its other steps are small."""
    if jax.version.__version_info__ < (0, 8):
        pytest.skip("earlier versions make a kernel only of loops without products")
    data = LARGE, jnp.ones(NUM_EXAMPLES)
    batches = hg.Batches(data, 8, order="blocks")
    problem = hg.Bilevel(inner_loss, outer_loss, batches, batches)

    def num_sorts(num_bytes):
        monkeypatch.setattr(all_cores, "MIN_NUM_BYTES", num_bytes)
        method = hg.SRBA(SGD, period=4)
        state = method.init(problem, jnp.zeros(DIM), jnp.zeros(DIM))
        estimate = lambda key: method.estimate(problem, state, jnp.zeros(DIM), key)
        return str(jax.make_jaxpr(estimate)(jax.random.key(0))).count(" sort[")

    assert num_sorts(0) > num_sorts(2**22) == 0


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA does so on CPUs")
def test_xla_makes_one_kernel_of_a_loop_over_large_data(monkeypatch):
    """The reason for the module; where XLA does not, the first test says nothing.

    Earlier versions make a kernel only of loops without products, and later ones of
    loops whose products are not reduced over rows.
    """
    monkeypatch.setattr(all_cores, "MIN_NUM_BYTES", 2**60)
    estimator = hg.Implicit(hg.Descent(optax.sgd(0.2), 10))
    has_kernel = num_kernels_with_data(compile_estimate(estimator)) > 0
    assert has_kernel == ((0, 8) <= jax.version.__version_info__ < (0, 12, 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_result_is_equal_to_the_bit(dtype):
    x = jnp.array([jnp.nan, -0.0, 3.0], dtype)
    for entries in (x, x[1:], x[2:], jnp.array([-jnp.inf, 1.0], dtype)):
        result = jax.jit(on_all_cores)({"a": entries, "b": jnp.zeros(9)}, LARGE)["a"]
        assert np.asarray(result).tobytes() == np.asarray(entries).tobytes()


def test_derivatives_are_those_of_the_identity():
    f = lambda x: jnp.sum(on_all_cores(x, LARGE) ** 3)
    x, v = jnp.array([1.0, -2.0]), jnp.array([0.5, 1.0])
    np.testing.assert_allclose(jax.grad(f)(x), 3 * x**2)
    np.testing.assert_allclose(jax.jvp(jax.grad(f), (x,), (v,))[1], 6 * x * v)
    np.testing.assert_allclose(jax.hessian(f)(x), jnp.diag(6 * x))
    rows = jnp.stack([x, v])
    np.testing.assert_allclose(jax.vmap(jax.grad(f))(rows), 3 * rows**2)


def test_small_data_and_integers_change_nothing():
    x = {"w": jnp.ones(3), "count": jnp.arange(2)}
    assert on_all_cores(x, jnp.ones(3)) is x
    assert on_all_cores(x, (jax.random.split(jax.random.key(0), 2), 1.0)) is x
    counts = {"count": jnp.arange(2), "empty": jnp.zeros(0)}
    result = on_all_cores(counts, LARGE)
    assert result["count"] is counts["count"]
    assert result["empty"] is counts["empty"]


def test_hypergradient_equals_that_of_a_single_kernel(monkeypatch):
    x = jax.random.normal(jax.random.key(0), (200, 8))
    data = x, jnp.sign(x[:, 0] + jax.random.normal(jax.random.key(1), 200))
    args = jnp.zeros(8), jnp.full(8, -3.0)
    results = []
    for num_bytes in (0, 2**60):
        monkeypatch.setattr(all_cores, "MIN_NUM_BYTES", num_bytes)
        loss = lambda w, alpha, batch: inner_loss(w, alpha, batch)
        problem = hg.Bilevel(loss, outer_loss, data, data)
        results.append(hg.hypergradient(problem, hg.Implicit(hg.Newton()))(*args))
    assert results[0].trusted
    assert results[1].trusted
    np.testing.assert_allclose(
        results[0].hypergradient, results[1].hypergradient, rtol=1e-3, atol=1e-8
    )


def test_products_accept_python_numbers_with_large_data():
    """As `jax.jvp` does."""
    loss = lambda w, alpha, batch: jnp.mean(batch) * alpha * w**2
    assert hvp(loss, 1.0, 2.0, LARGE + 1, 1.0) == 4.0


def test_an_empty_tree_stays_empty():
    assert on_all_cores({}, LARGE) == {}
