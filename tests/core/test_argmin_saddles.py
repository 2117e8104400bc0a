"""Derivatives of `hg.argmin` at saddles and singular minima: right, or NaN."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.extend import inner_stats
from tests.parameters import slow_except

SIZE, NUM_ALPHAS, NUM_PROBLEMS = 6, 3, 50
TOLERANCES = {"float64": 1e-6, "float32": 1e-2}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCES)


class Fixed:
    """Returns the starting point, which is a stationary point already."""

    differentiable = False

    def solve(self, inner_loss, w, alpha, data, key):
        return w, inner_stats(num_steps=0)


def stationary_loss(w, alpha, batch):
    """Has the Hessian ``H`` and the cross derivative ``J`` at ``w = 0``."""
    quadratic = 0.5 * w @ (batch["H"] @ w) + w @ (batch["J"] @ alpha)
    return quadratic + jnp.sum(jnp.sin(w) ** 4)


def outer_loss(w, batch):
    return batch["b"] @ w + jnp.sum(w**3)


solution_fn = hg.argmin(stationary_loss, Fixed())


def gradients(batch):
    """Returns the outer gradient in reverse and in forward mode, and the Jacobian."""
    w0 = jnp.zeros_like(batch["b"])
    alpha = jnp.zeros(NUM_ALPHAS, w0.dtype)
    value = lambda alpha: outer_loss(solution_fn(w0, alpha, batch), batch)
    jacobian = jax.jacfwd(lambda alpha: solution_fn(w0, alpha, batch))(alpha)
    return jax.grad(value)(alpha), jax.jacfwd(value)(alpha), jacobian


batched_gradients = jax.jit(jax.vmap(gradients))


def random_problems(num_null, is_definite, is_consistent, dtype):
    """Returns problems whose Hessian has ``num_null`` zero eigenvalues, in arrays.

    In consistent problems neither ``J`` nor ``b`` has a part in the null space.
    """
    problems = []
    for seed in range(NUM_PROBLEMS):
        rng = np.random.default_rng(seed)
        q = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
        eigenvalues = np.geomspace(1.0, 10 ** rng.uniform(0, 2), SIZE)
        signs = np.append(-1.0, rng.choice([-1.0, 1.0], SIZE - 1))
        eigenvalues *= 1 if is_definite else signs
        eigenvalues[SIZE - num_null :] = 0
        J, b = rng.normal(size=(SIZE, NUM_ALPHAS)), rng.normal(size=SIZE)
        in_range = q[:, : SIZE - num_null] @ q[:, : SIZE - num_null].T
        if is_consistent:
            J, b = in_range @ J, in_range @ b
        problems.append({"H": (q * eigenvalues[None]) @ q.T, "J": J, "b": b})
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *problems)
    return stacked, jax.tree.map(lambda x: jnp.asarray(x, dtype), stacked)


def relative_errors(actual, expected):
    axes = tuple(range(1, expected.ndim))
    size = np.sqrt(np.sum(expected**2, axis=axes))
    error = np.sqrt(np.sum((np.asarray(actual, float) - expected) ** 2, axis=axes))
    return error / size


@every_dtype
@pytest.mark.parametrize(
    ("num_null", "is_definite"),
    [(0, True), (0, False), (1, True), (2, False)],
    ids=["minima", "saddles", "singular minima", "singular saddles"],
)
def test_the_derivative_of_a_stationary_point(num_null, is_definite, dtype):
    """``dw = -H^+ J`` against dense solves, in both modes; nothing is refused.

    The part of ``dw`` in the null space of ``H`` is not determined, and left out.
    """
    exact, problems = random_problems(num_null, is_definite, True, dtype)
    reverse, forward, jacobian = batched_gradients(problems)
    pinv = np.linalg.pinv(exact["H"], rtol=1e-10)
    expected = -pinv @ exact["J"]
    gradient = np.einsum("ni,nij->nj", exact["b"], expected)
    tolerance = TOLERANCES[dtype]
    in_range = np.einsum("nij,njk->nik", pinv, exact["H"])
    jacobian = np.einsum("nij,njk->nik", in_range, np.asarray(jacobian, float))
    assert np.max(relative_errors(jacobian, expected)) < tolerance
    size = np.linalg.norm(exact["b"], axis=1) * np.linalg.norm(expected, axis=(1, 2))
    for actual in (reverse, forward):
        error = np.linalg.norm(np.asarray(actual, float) - gradient, axis=1)
        assert np.max(error / size) < tolerance


@every_dtype
@pytest.mark.parametrize("is_definite", [True, False], ids=["minima", "saddles"])
def test_an_inconsistent_singular_system_has_no_derivative(is_definite, dtype):
    """A direction without curvature, along which the gradient depends on alpha."""
    _, problems = random_problems(1, is_definite, False, dtype)
    for actual in batched_gradients(problems):
        assert np.isnan(actual).all()


def test_a_direction_that_the_outer_loss_does_not_see():
    """Reverse mode needs only the other ones; forward mode needs them all."""
    loss = lambda w, alpha, batch: 0.5 * (w[0] - alpha) ** 2 + (alpha - 0.7) * w[1]
    w0, alpha = jnp.array([0.7, 2.0]), jnp.asarray(0.7)
    solution_fn = hg.argmin(loss, Fixed())
    gradient = jax.grad(lambda alpha: jnp.sin(solution_fn(w0, alpha)[0]))(alpha)
    np.testing.assert_allclose(gradient, np.cos(0.7), rtol=1e-9)
    assert np.isnan(jax.jacfwd(lambda alpha: solution_fn(w0, alpha))(alpha)).all()


@pytest.mark.parametrize("dtype", slow_except(TOLERANCES, ["float64"]))
@pytest.mark.parametrize("solver", [hg.Newton(), hg.LBFGS()], ids=["Newton", "LBFGS"])
def test_double_wells_from_many_starting_points(solver, dtype):
    """``1 / (3 w^2 - 1)`` wherever the solver stops; at ``w = a = 0`` this is -1."""
    loss = lambda w, alpha, batch: 0.25 * (w**2 - 1) ** 2 - alpha * w
    solution_fn = hg.argmin(loss, solver)
    starts = jnp.asarray(np.linspace(-2, 2, 17), dtype)
    alphas = jnp.asarray([-0.3, 0.0, 0.2], dtype)
    run = lambda derivative: jax.jit(
        jax.vmap(
            jax.vmap(derivative(solution_fn, argnums=1), (None, 0)), in_axes=(0, None)
        )
    )(starts, alphas)
    reverse, forward = run(jax.grad), run(jax.jacfwd)
    w = jax.vmap(jax.vmap(solution_fn, (None, 0)), (0, None))(starts, alphas)
    w = np.asarray(w, float)
    expected = 1 / (3 * w**2 - 1)
    np.testing.assert_allclose(reverse, expected, rtol=TOLERANCES[dtype])
    np.testing.assert_allclose(forward, expected, rtol=TOLERANCES[dtype])
    np.testing.assert_allclose(reverse[8, 1], -1.0, rtol=1e-6)  # w = a = 0


@pytest.mark.parametrize(
    "linear_solver",
    [
        hg.CG(),
        hg.MINRES(max_steps=2, preconditioner=None),
        lx.GMRES(rtol=1e-9, atol=1e-9, max_steps=1),
    ],
    ids=["CG", "MINRES", "GMRES"],
)
def test_a_truncated_iterate_is_not_a_derivative(linear_solver):
    """A solver that does not reach its tolerance gives NaN in both modes."""
    H = jnp.diag(jnp.array([-1.0, 2.0, 3.0, 4.0]))
    loss = lambda w, alpha, batch: 0.5 * w @ (H @ w) - alpha @ w
    solution_fn = hg.argmin(loss, Fixed(), linear_solver)
    w0 = alpha = jnp.array([1.0, 1.0, 1.0, 1.0]) * 0
    value = lambda alpha: jnp.sum(jnp.sin(solution_fn(w0, alpha)))
    assert np.isnan(jax.grad(value)(alpha)).all()
    along_ones = jax.jvp(value, (alpha,), (jnp.ones(4),))[1]
    assert np.isnan(along_ones)
