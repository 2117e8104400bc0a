"""Inner solvers against hand-written loops, closed forms and scipy."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import hypergrad as hg
from hypergrad.inner.descent import run_inner_steps

KEY = jax.random.key(0)
RNG = np.random.default_rng(11)


@eqx.filter_jit
def solve(solver, loss, w, alpha, data=None, key=KEY):
    return solver.solve(loss, w, alpha, data, key)


# Gradient descent.

D = 6
BASIS = np.linalg.qr(RNG.normal(size=(D, D)))[0]
HESSIAN = (BASIS * np.linspace(0.5, 1.5, D)) @ BASIS.T
ALPHA = RNG.normal(size=D)


def quadratic(w, alpha, batch):
    return 0.5 * w @ (HESSIAN @ w) - alpha @ w


def by_hand(num_steps, rate, momentum=0.0, nesterov=False):
    """Heavy ball as Sutskever et al. 2013 write it, in NumPy."""
    w, velocity = np.zeros(D), np.zeros(D)
    for t in range(num_steps):
        gradient = HESSIAN @ w - ALPHA
        velocity = momentum * velocity + gradient
        step = momentum * velocity + gradient if nesterov else velocity
        w = w - (rate(t) if callable(rate) else rate) * step
    return w


DECAY = lambda t: 0.5 / (1 + t)
DESCENTS = {
    "gd": (optax.sgd(0.3), {"rate": 0.3}),
    "momentum": (optax.sgd(0.3, momentum=0.6), {"rate": 0.3, "momentum": 0.6}),
    "nesterov": (
        optax.sgd(0.2, momentum=0.5, nesterov=True),
        {"rate": 0.2, "momentum": 0.5, "nesterov": True},
    ),
    "schedule": (optax.sgd(DECAY), {"rate": DECAY}),
}


@pytest.mark.parametrize("num_steps", [0, 1, 13])
@pytest.mark.parametrize("name", DESCENTS)
def test_descent_is_the_loop_written_out(name, num_steps):
    """A NumPy loop; T steps cost T gradients."""
    optimizer, settings = DESCENTS[name]
    w, stats = solve(hg.Descent(optimizer, num_steps), quadratic, jnp.zeros(D), ALPHA)
    np.testing.assert_allclose(
        w, by_hand(num_steps, **settings), rtol=1e-12, atol=1e-15
    )
    assert stats["num_grads"] == stats["num_steps"] == num_steps


def test_a_learning_rate_may_be_a_hyperparameter():
    """The NumPy loop at the rate that ``alpha`` holds."""
    alpha = {"c": jnp.asarray(ALPHA), "rate": jnp.asarray(0.3)}
    solver = hg.Descent(lambda alpha: optax.sgd(alpha["rate"], momentum=0.6), 13)
    loss = lambda w, alpha, batch: quadratic(w, alpha["c"], batch)
    w, _ = solve(solver, loss, jnp.zeros(D), alpha)
    np.testing.assert_allclose(w, by_hand(13, 0.3, 0.6), rtol=1e-12)


@pytest.mark.parametrize(
    ("optimizer", "differentiable"),
    [
        (optax.sgd(0.1), True),
        (optax.adam(0.1), True),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)), True),
        (lambda alpha: optax.sgd(0.1), True),
        (optax.lbfgs(), False),
        (optax.lbfgs(linesearch=None), False),
        (optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(5)), False),
        (optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)), False),
        (optax.apply_if_finite(optax.lbfgs(), 3), False),
        (optax.masked(optax.lbfgs(), True), False),
    ],
)
def test_what_may_be_differentiated(optimizer, differentiable):
    """Line searches and L-BFGS may not, however deep they are wrapped."""
    assert hg.Descent(optimizer, 3).differentiable is differentiable


DRAWN = hg.Batches(jnp.arange(5), batch_size=3)
# With rate 1 and this loss, w counts how often each example was drawn.
COUNTING = lambda w, alpha, batch: -jnp.sum(w[batch])


def test_minibatches_are_drawn_at_every_step_uniformly_and_from_the_key_alone():
    """Multinomial counts; to the bit by key, eager or compiled, and unlike by others"""
    steps = 2000
    solver = hg.Descent(optax.sgd(1.0), steps)
    w, stats = solve(solver, COUNTING, jnp.zeros(5), 0.0, DRAWN, KEY)
    assert w.sum() == 3 * steps
    assert stats["num_grads"] == pytest.approx(steps * 3 / 5)
    expected = 3 * steps / 5
    assert np.sum((w - expected) ** 2 / expected) < 23.5  # chi2(4): p = 1e-4
    loss = lambda w, alpha, batch: jnp.sum(jnp.cosh(w - 0.1 * batch[:, None]))
    short = hg.Descent(optax.adam(0.1), 7)
    first, _ = solve(short, loss, jnp.zeros((1, 2)), 0.0, DRAWN, KEY)
    again, _ = solve(short, loss, jnp.zeros((1, 2)), 0.0, DRAWN, KEY)
    other, _ = solve(short, loss, jnp.zeros((1, 2)), 0.0, DRAWN, jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_step_is_not_drawn_twice():
    """With one example a step, two hundred steps see about as many draws as i.i.d."""
    data = hg.Batches(jnp.arange(1000), batch_size=1)
    w, _ = solve(hg.Descent(optax.sgd(1.0), 200), COUNTING, jnp.zeros(1000), 0.0, data)
    distinct = int(np.sum(w > 0))
    assert abs(distinct - 1000 * (1 - 0.999**200)) < 20  # 181 expected, sd 4


# The loop and its checkpoints.


class Wander(eqx.Module):
    """A step that depends on its key, on ``alpha`` and on a second carry."""

    num_steps: int = eqx.field(static=True)

    def init(self, inner_loss, w, alpha, data, key):
        return w, jnp.zeros_like(w)

    def step(self, inner_loss, carry, alpha, data, key):
        w, velocity = carry
        noise = jax.random.key_data(key)[0].astype(float) / 2**32
        velocity = 0.5 * velocity + noise * jnp.sin(w * alpha)
        return w - 0.3 * velocity, velocity


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 7, 10, 100, 101])
def test_checkpoints_change_nothing(num_steps):
    """The plain scan and its reverse pass, by ``alpha`` and by the start."""

    def final(alpha, w, checkpoint):
        carry = run_inner_steps(
            Wander(num_steps), None, w, alpha, None, KEY, checkpoint=checkpoint
        )
        return jnp.sum(carry[0] ** 2), carry

    @jax.jit
    def both(alpha, w):
        run = jax.grad(final, argnums=(0, 1), has_aux=True)
        return run(alpha, w, False), run(alpha, w, True)

    plain, checkpointed = both(jnp.asarray(ALPHA), jnp.ones(D))
    for one, other in zip(*map(jax.tree.leaves, (plain, checkpointed)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-14)
    keys = jax.random.split(jax.random.split(KEY)[1], num_steps)
    noise = np.asarray(jax.random.key_data(keys))[:, 0] / 2**32
    w, velocity = np.ones(D), np.zeros(D)
    for n in noise:
        velocity = 0.5 * velocity + n * np.sin(w * ALPHA)
        w = w - 0.3 * velocity
    np.testing.assert_allclose(plain[1][0], w, rtol=1e-9)


@pytest.mark.parametrize("last", [1, 4, 9, 10, 99])
def test_the_last_steps_only(last):
    """``dw_T/dalpha = s sum_{k<K} (I - s H)^k`` by matrix powers; ``w_T`` unmoved."""
    step, num_steps = 0.4, 10
    solver = hg.Descent(optax.sgd(step), num_steps)

    def final(alpha, w, checkpoint):
        options = {"last": last, "checkpoint": checkpoint}
        found = run_inner_steps(solver, quadratic, w, alpha, None, KEY, **options)[0]
        return found, found

    @jax.jit
    def both(alpha, w):
        run = jax.jacrev(final, argnums=(0, 1), has_aux=True)
        return run(alpha, w, False), run(alpha, w, True)

    seen = min(last, num_steps)
    contraction = np.eye(D) - step * HESSIAN
    powers = [np.linalg.matrix_power(contraction, k) for k in range(num_steps + 1)]
    for (by_alpha, by_start), w in both(ALPHA, jnp.zeros(D)):
        np.testing.assert_allclose(by_alpha, step * sum(powers[:seen]), rtol=1e-10)
        whole = powers[num_steps] if last >= num_steps else np.zeros((D, D))
        np.testing.assert_allclose(by_start, whole, rtol=1e-10)
        np.testing.assert_allclose(w, by_hand(num_steps, step), rtol=1e-12)


NOISY = hg.Batches(jnp.asarray(RNG.normal(size=(9, D))), batch_size=2)


def test_the_reverse_pass_sees_the_batches_of_the_forward_pass():
    """Central differences of the same run, batches, momentum and rate included."""
    solver = hg.Descent(lambda a: optax.sgd(0.3 + 0.1 * jnp.sin(a[0]), 0.5), 10)
    loss = lambda w, alpha, batch: jnp.mean(jnp.cosh(batch @ w - alpha[1]))

    @jax.jit
    @jax.value_and_grad
    def final(alpha):
        start = jnp.zeros(D)
        carry = run_inner_steps(solver, loss, start, alpha, NOISY, KEY, checkpoint=True)
        return jnp.sum(carry[0] ** 2)

    alpha, step = jnp.array([0.4, 0.3]), 1e-5
    found = final(alpha)[1]
    moved = lambda i, s: final(alpha.at[i].add(s))[0]
    expected = [(moved(i, step) - moved(i, -step)) / (2 * step) for i in range(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-7)
    w, _ = solve(solver, loss, jnp.zeros(D), alpha, NOISY)
    np.testing.assert_allclose(final(alpha)[0], jnp.sum(w**2), rtol=1e-12)


# Minimisers.

X, Y = RNG.normal(size=(40, D)), np.sign(RNG.normal(size=40))
ROSENBROCK_START = np.full(5, -1.2)


def ridge(w, alpha, batch):
    return 0.5 * jnp.mean((X @ w - Y) ** 2) + 0.5 * jnp.exp(alpha) * jnp.sum(w**2)


def logistic(w, alpha, batch):
    margin = Y * (X @ w["weights"] + w["bias"])
    penalty = 0.5 * jnp.exp(alpha) * jnp.sum(w["weights"] ** 2)
    return jnp.mean(jax.nn.softplus(-margin)) + penalty


def rosenbrock(w, alpha, batch):
    valley = 100 * (w[1:] - alpha * w[:-1] ** 2) ** 2
    return jnp.sum(valley + (1 - w[:-1]) ** 2)


def hyperbolic(w, alpha, batch):
    return jnp.cosh(w - alpha) + 0.1 * w


def by_scipy():
    """The logistic minimum by scipy on a loss written in NumPy."""

    def loss(w):
        margin = Y * (X @ w[:D] + w[D])
        return np.mean(np.logaddexp(0, -margin)) + 0.5 * np.exp(-2.0) * w[:D] @ w[:D]

    found = scipy.optimize.minimize(
        loss, np.zeros(D + 1), method="Nelder-Mead",
        options={"xatol": 1e-9, "fatol": 1e-14, "maxiter": 20000, "maxfev": 20000},
    )  # fmt: skip
    return {"weights": found.x[:D], "bias": found.x[D]}


RIDGE = np.linalg.solve(X.T @ X / 40 + np.exp(-2.0) * np.eye(D), X.T @ Y / 40)
PROBLEMS = {
    "ridge": (ridge, np.zeros(D), -2.0, lambda: RIDGE),
    "logistic": (logistic, {"weights": np.zeros(D), "bias": 0.0}, -2.0, by_scipy),
    "rosenbrock": (rosenbrock, ROSENBROCK_START, 1.0, lambda: np.ones(5)),
    "0-d": (hyperbolic, 4.0, 1.0, lambda: 1.0 - np.arcsinh(0.1)),
    "1-d": (lambda w, a, b: jnp.sum(hyperbolic(w, a, b)), np.array([4.0]), 1.0,
            lambda: np.array([1.0 - np.arcsinh(0.1)])),
}  # fmt: skip
SOLVERS = {"Newton": hg.Newton(), "LBFGS": hg.LBFGS()}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_minimisers_reach_the_minimum(name, solver, dtype):
    """numpy and scipy minima; the gradient as small as the tolerance promises."""
    loss, start, alpha, exact = PROBLEMS[name]
    w0 = jax.tree.map(lambda x: jnp.asarray(x, dtype), start)
    alpha = jnp.asarray(alpha, dtype)
    with jax.numpy_dtype_promotion("standard"):
        small = lambda w, alpha, batch: loss(w, alpha, batch).astype(dtype)
        w, stats = solve(SOLVERS[solver], small, w0, alpha)
        gradient = jax.jit(jax.grad(small))
        first = optax.tree.norm(gradient(w0, alpha, None))
        last = optax.tree.norm(gradient(w, alpha, None))
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(w))
    eps = float(jnp.finfo(dtype).eps)
    rounding = 1e3 * eps  # of a loss near 1
    assert last <= eps**0.75 * max(float(first), 1.0) + rounding
    tolerance = 1e-6 if dtype == jnp.float64 else 1e-2
    for found, expected in zip(
        jax.tree.leaves(w), jax.tree.leaves(exact()), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
    assert stats["num_steps"] < 100


def test_newton_is_newton():
    """``w - 1 + a exp(-w)`` for ``exp(w) - a w``: iterates, and digits that double."""
    loss = lambda w, alpha, batch: jnp.exp(w) - alpha * w
    exact, w, errors = np.log(3.0), 1.5, []
    for k in range(1, 5):
        w = w - 1 + 3.0 * np.exp(-w)
        found, stats = solve(hg.Newton(max_steps=k), loss, 1.5, 3.0)
        np.testing.assert_allclose(found, w, rtol=1e-14)
        assert stats["num_steps"] == k
        errors.append(abs(float(found) - exact))
    ratios = [later / earlier**2 for earlier, later in itertools.pairwise(errors)]
    np.testing.assert_allclose(ratios[:2], 0.5, rtol=0.2)  # f''' / (2 f'')


def test_newton_is_superlinear_in_many_dimensions():
    """Forcing terms ``sqrt(||g|| / ||g_0||)``: order 3/2 (Dembo et al. 1982)."""
    scales = jnp.asarray(np.geomspace(1.0, 100.0, 20))
    loss = lambda w, alpha, batch: jnp.sum(scales * (jnp.exp(w) - w))
    start = np.full(20, 0.8)
    norm = lambda w: np.linalg.norm(scales * np.expm1(w))
    norms = [
        norm(solve(hg.Newton(max_steps=k), loss, start, 0.0)[0]) / norm(start)
        for k in (5, 6, 7)
    ]
    assert norms[0] < 1e-3
    assert norms[1] <= 2 * norms[0] ** 1.5
    assert norms[2] <= 2 * norms[1] ** 1.5


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_minimisers_leave_negative_curvature_at_any_scale_of_the_loss(scale, solver):
    """Double wells, begun between them: every coordinate ends in one of the two."""
    well = lambda w, alpha, batch: scale * jnp.mean((w**2 - 1) ** 2)
    start = jnp.asarray(np.linspace(-0.32, 0.3, 8))
    assert np.linalg.eigvalsh(jax.hessian(well)(start, 0.0, None)).max() < 0
    w, _ = solve(SOLVERS[solver], well, start, 0.0)
    np.testing.assert_allclose(np.abs(w), 1.0, rtol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("start", [1e-3, 1e-6, 0.0])
def test_minimisers_leave_a_nearly_flat_start(start, solver):
    """``w^4 - w``: minimum ``4^(-1/3)``, where the first Newton step is 1/(12 w^2)."""
    quartic = lambda w, alpha, batch: w**4 - w
    w, _ = solve(SOLVERS[solver], quartic, jnp.asarray(start), 0.0)
    np.testing.assert_allclose(w, 4 ** (-1 / 3), rtol=1e-6)


def test_newton_passes_a_saddle():
    """``x^2 - y^2 + y^4``: from the saddle's stable side to a minimum at y^2 = 1/2."""
    saddle = lambda w, alpha, batch: w[0] ** 2 - w[1] ** 2 + w[1] ** 4
    w, _ = solve(hg.Newton(), saddle, jnp.array([1.0, 1e-3]), 0.0)
    np.testing.assert_allclose([w[0], w[1] ** 2], [0.0, 0.5], atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_start_at_the_minimum_stays_there(solver):
    """No step, no movement: what a warm start relies on."""
    w, stats = solve(SOLVERS[solver], ridge, jnp.asarray(RIDGE), -2.0)
    np.testing.assert_allclose(w, RIDGE, rtol=1e-13)
    assert stats["num_steps"] <= 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_tolerance_is_kept(solver):
    """``||g|| <= tolerance max(1, ||g_0||)``, and not much better than asked."""
    solver = eqx.tree_at(
        lambda s: s.tolerance, SOLVERS[solver], 1e-2, is_leaf=lambda x: x is None
    )
    w, stats = solve(solver, rosenbrock, jnp.asarray(ROSENBROCK_START), 1.0)
    norm = lambda w: jnp.linalg.norm(jax.grad(rosenbrock)(w, 1.0, None))
    assert norm(w) <= 1e-2 * norm(jnp.asarray(ROSENBROCK_START))
    fine = solve(SOLVERS["Newton"], rosenbrock, jnp.asarray(ROSENBROCK_START), 1.0)[1]
    assert stats["num_steps"] < fine["num_steps"]


@pytest.mark.parametrize("solver", [*SOLVERS, "Descent"])
@pytest.mark.parametrize(
    ("w_dtypes", "alpha_dtype"),
    [
        (("float32", "float32"), "float64"),
        (("float32", "float64"), "float64"),
        (("bfloat16", "bfloat16"), "float32"),
    ],
    ids=str,
)
def test_w_keeps_its_dtypes_beside_a_wider_alpha(solver, w_dtypes, alpha_dtype):
    """``w = alpha``, whatever the precision in which each is held."""
    w0 = {"a": jnp.zeros(2, w_dtypes[0]), "b": jnp.zeros((), w_dtypes[1])}
    alpha = jnp.asarray(0.5, alpha_dtype)
    loss = lambda w, alpha, batch: (
        jnp.sum((w["a"] - alpha) ** 2) + (w["b"] - alpha) ** 2
    )
    solver = {**SOLVERS, "Descent": hg.Descent(optax.sgd(0.3, momentum=0.2), 30)}[
        solver
    ]
    w, _ = solve(solver, loss, w0, alpha)
    assert [str(x.dtype) for x in jax.tree.leaves(w)] == list(w_dtypes)
    for leaf in jax.tree.leaves(w):
        np.testing.assert_allclose(leaf.astype(float), 0.5, rtol=2e-2)


# What a solve costs.


def counted(loss):
    """The loss, reporting to the host what of it is evaluated."""
    calls = {"values": 0, "gradients": 0, "products": 0}

    def report(name):
        calls[name] += 1

    @jax.custom_jvp
    def once_more(x):
        return x

    @once_more.defjvp
    def second_derivative(primals, tangents):
        jax.debug.callback(lambda: report("products"))
        return primals[0], tangents[0]

    @jax.custom_jvp
    def mark(x):
        jax.debug.callback(lambda: report("values"))
        return x

    @mark.defjvp
    def derivative(primals, tangents):
        jax.debug.callback(lambda: report("gradients"))
        return once_more(primals[0]), tangents[0]

    return lambda w, alpha, batch: mark(loss(w, alpha, batch)), calls


@pytest.mark.parametrize("solver", [*SOLVERS, "Descent"])
@pytest.mark.parametrize("name", ["logistic", "rosenbrock"])
def test_the_ledger_of_a_solve_is_what_was_evaluated(name, solver):
    """Derivative rules that report each evaluation of a value, gradient or product."""
    loss, start, alpha, _ = PROBLEMS[name]
    loss, calls = counted(loss)
    solver = {**SOLVERS, "Descent": hg.Descent(optax.adam(0.01), 9)}[solver]
    w0 = jax.tree.map(jnp.asarray, start)
    stats = jax.block_until_ready(solve(solver, loss, w0, alpha))[1]
    jax.effects_barrier()
    assert stats["num_hvps"] == calls["products"]
    # A product evaluates the gradient that it differentiates.
    assert stats["num_grads"] == calls["gradients"] - calls["products"]
    assert stats["num_values"] == calls["values"]


def test_a_newton_step_that_is_taken_whole_costs_one_gradient():
    """Convex, from a start where no step is too long: no value beside the gradient."""
    loss, start, alpha, _ = PROBLEMS["logistic"]
    stats = solve(hg.Newton(), loss, jax.tree.map(jnp.asarray, start), alpha)[1]
    assert stats["num_steps"] >= 3
    assert stats["num_grads"] == stats["num_steps"] + 1
    assert stats["num_values"] == 0


# Formulas and batches.


def test_closed_form_is_its_formula_on_all_of_the_data():
    """``fn(alpha, batch)`` on every example, for the cost of one gradient."""
    data = hg.Batches(jnp.array([1.0, 2.0, 4.0, 8.0]), batch_size=2)
    solver = hg.ClosedForm(lambda alpha, batch: alpha * jnp.sum(batch))
    w, stats = solve(solver, None, jnp.zeros(()), jnp.asarray(2.0), data)
    assert float(w) == 30.0
    assert stats["num_grads"] == 1
    assert solver.differentiable


@pytest.mark.parametrize("solver", SOLVERS)
def test_minimisers_batch(solver):
    """vmap over starts and penalties: numpy's ridge solution of each."""
    starts, alphas = RNG.normal(size=(3, D)), np.array([-2.0, 0.0, 2.0])
    one = lambda w, alpha: SOLVERS[solver].solve(ridge, w, alpha, None, KEY)[0]
    for w, alpha in zip(jax.jit(jax.vmap(one))(starts, alphas), alphas, strict=True):
        expected = np.linalg.solve(
            X.T @ X / 40 + np.exp(alpha) * np.eye(D), X.T @ Y / 40
        )
        np.testing.assert_allclose(w, expected, rtol=1e-7)
