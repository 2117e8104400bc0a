"""w*(alpha) as a function: derivatives of every kind and order against formulas."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks.known import any_known, cast, central, error, ridge_outer, ridge_penalty

KNOWN = any_known("ridge per-weight")
DATA, ALPHA = KNOWN.problem.inner_data, KNOWN.alpha
VAL = KNOWN.problem.outer_data
W0 = jnp.zeros(6)

SOLVERS = {
    "Newton": (hg.Newton(), None),
    "Newton, LU": (hg.Newton(), lx.LU()),
    "Newton, GMRES": (hg.Newton(), lx.GMRES(rtol=1e-12, atol=1e-12)),
    "Newton, NystromCG": (hg.Newton(), hg.NystromCG(rank=2)),
    "Descent": (hg.Descent(optax.sgd(KNOWN.step), 200), None),
    "LBFGS": (hg.LBFGS(), None),
}


def explicit(alpha, batch):
    """The ridge solution as a formula that jax differentiates."""
    x, y = batch["x"], batch["y"]
    H = x.T @ x / len(y) + jnp.diag(jnp.exp(alpha))
    return jnp.linalg.solve(H, x.T @ y / len(y))


# Solvers that read alpha and the batch themselves.
SOLVERS["formula"] = (hg.ClosedForm(explicit), None)
SOLVERS["rate from alpha"] = (
    hg.Descent(lambda alpha: optax.sgd(KNOWN.step / (1 + 1e-3 * alpha[0] ** 2)), 400),
    None,
)


def value(w):
    """Curved, so that second derivatives see more than the squares."""
    return ridge_outer(w, None, VAL) + jnp.sum(jnp.sin(w))


def through(solution):
    return lambda alpha, batch=DATA: value(solution(W0, alpha, batch))


TRUTH = lambda alpha, batch=DATA: value(explicit(alpha, batch))
NEWTON = hg.argmin(ridge_penalty, hg.Newton())

DERIVATIVES = {
    "grad": jax.grad,
    "jacfwd": jax.jacfwd,
    "jacrev": jax.jacrev,
    "hessian": jax.hessian,  # forward over reverse
    "reverse over reverse": lambda f: jax.jacrev(jax.jacrev(f)),
    "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(f)),
    "reverse over forward": lambda f: jax.jacrev(jax.jacfwd(f)),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "grad") for name in SOLVERS]
    + [(name, "hessian") for name in ("Newton, LU", "Newton, GMRES", "Descent")],
)
def test_every_solver_gives_the_derivatives_of_the_formula(name: str, kind: str):
    """Ridge: jax's derivatives of the explicit solution."""
    solution = hg.argmin(ridge_penalty, *SOLVERS[name])
    found = jax.jit(DERIVATIVES[kind](through(solution)))(ALPHA)
    assert error(found, DERIVATIVES[kind](TRUTH)(ALPHA)) < 1e-9


@pytest.mark.parametrize("kind", DERIVATIVES)
def test_every_kind_of_derivative(kind: str):
    """Of the outer value, and of the six-vector w* itself."""
    derivative = DERIVATIVES[kind]
    assert error(NEWTON(W0, ALPHA, DATA), explicit(ALPHA, DATA)) < 1e-11
    found = jax.jit(derivative(through(NEWTON)))(ALPHA)
    assert error(found, derivative(TRUTH)(ALPHA)) < 1e-9
    if kind != "grad":
        found = jax.jit(derivative(lambda a: NEWTON(W0, a, DATA)))(ALPHA)
        assert error(found, derivative(lambda a: explicit(a, DATA))(ALPHA)) < 1e-9


def test_jit_changes_nothing():
    """Bare calls and compiled ones."""
    f = jax.grad(through(NEWTON))
    assert error(f(ALPHA), jax.jit(f)(ALPHA)) < 1e-12


@pytest.mark.parametrize("kind", ["grad", "jacfwd", "hessian"])
def test_vmap_is_a_loop(kind: str):
    """Over alphas, and over batches."""
    alphas = jnp.stack([ALPHA, 0.5 * ALPHA, ALPHA - 1])
    derivative = jax.jit(DERIVATIVES[kind](through(NEWTON)))
    found = jax.jit(jax.vmap(derivative))(alphas)
    for i, alpha in enumerate(alphas):
        assert error(found[i], derivative(alpha)) < 1e-9
    batches = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), DATA)
    found = jax.vmap(derivative, in_axes=(None, 0))(ALPHA, batches)
    for i in range(2):
        batch = jax.tree.map(lambda x, i=i: x[i], batches)
        assert error(found[i], derivative(ALPHA, batch)) < 1e-9


def weighted(w, alpha, batch):
    """Integer groups in the batch choose the example weight and the penalty."""
    residual = batch["x"] @ w - batch["y"]
    weights = alpha["weights"][batch["group"]]
    penalty = jnp.sum(jnp.exp(alpha["penalty"]) * w**2)
    return 0.5 * jnp.mean(weights * residual**2) + 0.5 * penalty


def weighted_explicit(alpha, batch):
    x, y = batch["x"], batch["y"]
    weights = alpha["weights"][batch["group"]]
    H = (x.T * weights[None]) @ x / len(y) + jnp.diag(jnp.exp(alpha["penalty"]))
    return jnp.linalg.solve(H, x.T @ (weights * y) / len(y))


GROUPED = DATA | {"group": jnp.arange(40) % 3}
GROUP_ALPHA = {"weights": jnp.array([0.5, 1.0, 2.0]), "penalty": ALPHA}


@pytest.mark.parametrize("kind", ["grad", "jacfwd", "hessian"])
def test_derivatives_by_the_batch_beside_integer_labels(kind: str):
    """d/dx, d/dy of the explicit solution; the integers are not differentiated."""
    solution = hg.argmin(weighted, hg.Newton())

    def of(formula, floats):
        batch = floats | {"group": GROUPED["group"]}
        return value(formula(GROUP_ALPHA, batch))

    floats = {"x": DATA["x"][:, :], "y": DATA["y"]}
    derivative = DERIVATIVES[kind]
    if kind == "hessian":  # by y alone: x is 240 numbers
        of_y = lambda formula: lambda y: of(formula, floats | {"y": y})
        found = jax.jit(derivative(of_y(lambda a, b: solution(W0, a, b))))(floats["y"])
        exact = derivative(of_y(weighted_explicit))(floats["y"])
    else:
        found = jax.jit(derivative(lambda f: of(lambda a, b: solution(W0, a, b), f)))
        found = found(floats)
        exact = derivative(lambda f: of(weighted_explicit, f))(floats)
    assert error(found, exact) < 1e-9


def test_a_whole_batch_with_integers_is_differentiated_with_allow_int():
    """Float leaves as above; integer leaves get jax's float0."""
    solution = hg.argmin(weighted, hg.Newton())
    f = lambda batch: value(solution(W0, GROUP_ALPHA, batch))
    found = jax.grad(f, allow_int=True)(GROUPED)
    exact = jax.grad(
        lambda batch: value(weighted_explicit(GROUP_ALPHA, batch)), allow_int=True
    )(GROUPED)
    assert found["group"].dtype == jax.dtypes.float0
    for name in "xy":
        assert error(found[name], exact[name]) < 1e-9


def keyed_loss(w, alpha, batch):
    data, key = batch
    noise = jax.random.normal(key, data["y"].shape)
    return ridge_penalty(w, alpha, data | {"y": data["y"] + noise})


@pytest.mark.parametrize("kind", ["grad", "jacfwd", "hessian"])
def test_a_random_key_in_the_batch(kind: str):
    """The explicit solution for the targets that the key gives."""
    key = jax.random.key(7)
    noisy = DATA | {"y": DATA["y"] + jax.random.normal(key, DATA["y"].shape)}
    solution = hg.argmin(keyed_loss, hg.Newton())
    f = lambda alpha: value(solution(W0, alpha, (DATA, key)))
    found = jax.jit(DERIVATIVES[kind](f))(ALPHA)
    assert error(found, DERIVATIVES[kind](lambda a: TRUTH(a, noisy))(ALPHA)) < 1e-9


def test_where_the_search_began_has_no_derivative():
    """w* does not remember w0: exact zeros, forward and reverse, also with alpha."""
    f = lambda w0, alpha: value(NEWTON(w0, alpha, DATA))
    w0 = jnp.linspace(-1, 1, 6)
    assert not np.any(jax.grad(f)(w0, ALPHA))
    assert not np.any(jax.jacfwd(f)(w0, ALPHA))
    by_w0, by_alpha = jax.grad(f, argnums=(0, 1))(w0, ALPHA)
    assert not np.any(by_w0)
    assert error(by_alpha, jax.grad(TRUTH)(ALPHA)) < 1e-9
    both = lambda shared: f(shared, shared)
    assert error(jax.grad(both)(ALPHA), jax.grad(TRUTH)(ALPHA)) < 1e-9


@pytest.mark.parametrize(
    ("kind", "wrap"),
    [
        ("grad", lambda f: f),
        ("grad", jax.jit),
        ("jacfwd", jax.jit),
        ("hessian", jax.jit),
    ],
    ids=["bare grad", "grad", "jacfwd", "hessian"],
)
def test_a_value_that_the_loss_closes_over(kind: str, wrap):
    """Derivatives by a closed-over scale of the penalty: those of the formula."""

    def f(solve):
        def of(scale):
            loss = lambda w, alpha, batch: ridge_penalty(w, alpha * scale[0], batch)
            w = (
                hg.argmin(loss, hg.Newton())(W0, ALPHA, DATA)
                if solve
                else explicit(ALPHA * scale[0], DATA)
            )
            return value(w) + scale[0] * scale[1]

        return of

    scale = jnp.array([0.8, 2.0])
    found = wrap(DERIVATIVES[kind](f(True)))(scale)
    assert error(found, DERIVATIVES[kind](f(False))(scale)) < 1e-9


def test_closed_over_values_under_vmap():
    """Closed-over floats and integers that a vmap batches: as in a loop."""

    def f(scale, group):
        batch = {"x": DATA["x"], "y": DATA["y"], "group": group}
        loss = lambda w, alpha, _: weighted(
            w, GROUP_ALPHA | {"penalty": alpha * scale}, batch
        )
        return value(hg.argmin(loss, hg.Newton())(W0, ALPHA))

    scales = jnp.array([0.5, 1.0, 1.5])
    groups = jnp.stack([(jnp.arange(40) + i) % 3 for i in range(3)])
    found = jax.vmap(jax.grad(f))(scales, groups)
    loop = jnp.array([jax.grad(f)(*pair) for pair in zip(scales, groups, strict=True)])
    assert error(found, loop) < 1e-9
    exact = lambda scale, group: value(
        weighted_explicit(
            GROUP_ALPHA | {"penalty": ALPHA * scale}, GROUPED | {"group": group}
        )
    )
    assert error(found, jax.vmap(jax.grad(exact))(scales, groups)) < 1e-9


@pytest.mark.parametrize("kind", ["grad", "jacfwd", "hessian"])
def test_a_leaf_of_w_that_alpha_does_not_move(kind: str):
    """Weights with a penalty, and an uncoupled bias without: the bias stays put.

    The cross derivative is zero for a whole leaf, as for every unpenalised bias whose
    gradient does not read ``alpha``.
    """
    loss = lambda w, alpha, batch: (
        jnp.sum((w["weights"] - jnp.exp(alpha)) ** 2)
        + jnp.sum((w["bias"] - 3) ** 2)
        + 0.5 * jnp.sum(w["bias"]) * jnp.sum(w["weights"])
    )
    w0 = {"weights": jnp.zeros(3), "bias": jnp.zeros(2)}

    def formula(alpha):
        H = jnp.block([[2 * jnp.eye(3), jnp.full((3, 2), 0.5)],
                       [jnp.full((2, 3), 0.5), 2 * jnp.eye(2)]])  # fmt: skip
        rhs = jnp.concatenate([2 * jnp.exp(alpha), jnp.full(2, 6.0)])
        return jnp.sum(jnp.sin(jnp.linalg.solve(H, rhs)))

    solution = hg.argmin(loss, hg.Newton())

    def f(alpha):
        w = solution(w0, alpha)
        return jnp.sum(jnp.sin(w["weights"])) + jnp.sum(jnp.sin(w["bias"]))

    alpha = jnp.array([0.1, -0.2, 0.3])
    found = jax.jit(DERIVATIVES[kind](f))(alpha)
    assert error(found, DERIVATIVES[kind](formula)(alpha)) < 1e-9


@pytest.mark.parametrize("kind", ["grad", "jacfwd", "hessian"])
def test_a_third_level_nests(kind: str):
    """z*(w) = tanh(w) within w*(alpha), against the argmin of the substituted loss."""
    inmost = lambda z, w, batch: 0.5 * jnp.sum((z - jnp.tanh(w)) ** 2)
    z_best = hg.argmin(inmost, hg.Newton())

    def middle(w, alpha, batch):
        z = z_best(jnp.zeros(2), w)
        coupling = 0.3 * jnp.sum(z) ** 2 + 0.2 * jnp.sum(z * jnp.flip(w))
        return 0.5 * jnp.sum((w - alpha) ** 2) + coupling

    def substituted(w, alpha, batch):
        z = jnp.tanh(w)
        coupling = 0.3 * jnp.sum(z) ** 2 + 0.2 * jnp.sum(z * jnp.flip(w))
        return 0.5 * jnp.sum((w - alpha) ** 2) + coupling

    derivative = DERIVATIVES[kind]
    alpha = jnp.array([0.4, -0.7])
    results = []
    for loss in (middle, substituted):
        best = hg.argmin(loss, hg.Newton())
        f = lambda alpha, best=best: jnp.sum(jnp.sin(best(jnp.zeros(2), alpha)))
        results.append(jax.jit(derivative(f))(alpha))
    assert error(*results) < 1e-8


def test_a_third_level_has_the_derivative_of_its_formula():
    """All quadratic: z* = Aw, w* = (I + A'A)^-1 alpha, and Implicit sees it too."""
    A = jnp.array([[1.0, 0.5], [-0.3, 2.0]])
    z_best = hg.argmin(lambda z, w, batch: 0.5 * jnp.sum((z - A @ w) ** 2), hg.Newton())
    inner = lambda w, alpha, batch: (
        0.5 * jnp.sum((w - alpha) ** 2) + 0.5 * jnp.sum(z_best(jnp.zeros(2), w) ** 2)
    )
    outer = lambda w, alpha, batch: jnp.sum(jnp.sin(z_best(jnp.zeros(2), w)))
    formula = lambda alpha: jnp.sum(
        jnp.sin(A @ jnp.linalg.solve(jnp.eye(2) + A.T @ A, alpha))
    )
    alpha = jnp.array([0.7, -1.2])
    exact = jax.grad(formula)(alpha)
    problem = hg.Bilevel(inner, outer)
    found = hg.hypergradient(problem, hg.Implicit(hg.Newton()))(jnp.zeros(2), alpha)
    assert error(found.hypergradient, exact) < 1e-9
    assert found.stats["trusted"]
    solution = hg.argmin(inner, hg.Newton())
    f = lambda alpha: outer(solution(jnp.zeros(2), alpha), alpha, None)
    assert error(jax.jit(jax.grad(f))(alpha), exact) < 1e-9


@pytest.mark.parametrize(
    "name",
    ["ridge per-example", "logistic per-weight", "quadratic nested"]
    + [f"smd {number} tilted" for number in (2, 4, 5)],
)
def test_implicit_is_the_gradient_through_argmin(name: str):
    """Two roads to one number, and to the closed form."""
    known = any_known(name)
    problem = known.problem
    solution = hg.argmin(problem.inner_loss, hg.Newton())

    def f(alpha):
        w = solution(known.w, alpha, problem.inner_data)
        return problem.outer_value(w, alpha, problem.outer_data)

    found = hg.hypergradient(problem, hg.Implicit(hg.Newton()))(known.w, known.alpha)
    gradient = jax.jit(jax.grad(f))(known.alpha)
    assert error(gradient, found.hypergradient) < 1e-10
    assert error(gradient, known.exact(known.alpha)) < 1e-9


def test_derivatives_of_any_order():
    """cosh(w) - alpha w has w* = arcsinh(alpha): four derivatives of the formula."""
    solution = hg.argmin(lambda w, a, batch: jnp.cosh(w) - a * w, hg.Newton())
    f, exact = lambda alpha: solution(0.0, alpha), jnp.arcsinh
    alpha = jnp.array(0.7)
    for order in range(5):
        found, true = jax.jit(f)(alpha), exact(alpha)
        np.testing.assert_allclose(found, true, rtol=1e-9, err_msg=f"order {order}")
        f, exact = jax.jacfwd(f) if order % 2 else jax.grad(f), jax.grad(exact)


def test_a_third_derivative_on_ridge():
    """jacfwd of hessian, a 6 x 6 x 6 array, against that of the formula."""
    found = jax.jit(jax.jacfwd(jax.hessian(through(NEWTON))))(ALPHA)
    assert error(found, jax.jacfwd(jax.hessian(TRUTH))(ALPHA)) < 1e-8


def test_against_central_differences():
    """The solver's own answers, differenced: no formula at all."""
    f = jax.jit(through(NEWTON))
    assert error(jax.grad(f)(ALPHA), central(f, ALPHA, 1e-2)) < 1e-7


def test_inside_scan_and_checkpoint():
    """Ten outer steps by hand, differentiated by their start: as with the formula."""

    def run(solve, start):
        def step(alpha, _):
            w = solve(alpha)
            return alpha - 0.3 * w * jnp.sum(w), value(w)

        return jnp.sum(jax.lax.scan(jax.checkpoint(step), start, length=10)[1])

    mine = lambda alpha: run(lambda a: NEWTON(W0, a, DATA), alpha)
    formula = lambda alpha: run(lambda a: explicit(a, DATA), alpha)
    found = jax.jit(jax.grad(mine))(ALPHA)
    assert error(found, jax.grad(formula)(ALPHA)) < 1e-9


@pytest.mark.parametrize("kind", ["grad", "hessian"])
def test_float32(kind: str):
    """Single precision with x64 on: the formula's derivatives to 1e-4, in float32."""
    batch, alpha, w0 = (cast(x, jnp.float32) for x in (DATA, ALPHA, W0))
    f = lambda alpha: value_in(NEWTON(w0, alpha, batch))
    value_in = lambda w: (
        ridge_outer(w, None, cast(VAL, jnp.float32)) + jnp.sum(jnp.sin(w))
    )
    found = jax.jit(DERIVATIVES[kind](f))(alpha)
    assert found.dtype == jnp.float32
    assert error(found, DERIVATIVES[kind](TRUTH)(ALPHA)) < 1e-4


def test_alpha_with_integer_leaves():
    """A group index in alpha is a constant; its float neighbours have derivatives."""
    loss = lambda w, alpha, batch: jnp.sum((w - alpha["table"][alpha["index"]]) ** 2)
    solution = hg.argmin(loss, hg.Newton())
    f = lambda table: jnp.sum(
        solution(jnp.zeros(2), {"table": table, "index": jnp.array([2, 0])})
        * jnp.array([1.0, 10.0])
    )
    found = jax.grad(f)(jnp.arange(3.0))
    np.testing.assert_allclose(found, [10.0, 0.0, 1.0], rtol=1e-9)


def test_the_linear_solver_is_the_one_that_was_asked_for():
    """Identity takes H for 1: dw* = -J, which is -diag(exp(alpha) w*) for ridge."""
    solution = hg.argmin(ridge_penalty, hg.Newton(), hg.Identity())
    found = jax.jacrev(lambda alpha: solution(W0, alpha, DATA))(ALPHA)
    w = explicit(ALPHA, DATA)
    np.testing.assert_allclose(found, -jnp.diag(jnp.exp(ALPHA) * w), atol=1e-10)


class Noisy:
    """Returns a random w, by its key."""

    differentiable = False

    def solve(self, inner_loss, w, alpha, data, key):
        return jax.random.normal(key, w.shape, w.dtype), {}


def test_the_key_reaches_the_solver():
    """Same key, same w; another key, another w."""
    solution = hg.argmin(ridge_penalty, Noisy())
    draw = lambda seed: solution(W0, ALPHA, DATA, jax.random.key(seed))
    assert jnp.array_equal(draw(1), draw(1))
    assert not jnp.any(draw(1) == draw(2))
    assert jnp.array_equal(draw(0), solution(W0, ALPHA, DATA))


def test_what_the_solver_returns_must_be_like_w():
    """A formula of another structure is refused, not passed on."""
    solution = hg.argmin(ridge_penalty, hg.ClosedForm(lambda alpha, batch: (alpha, 0)))
    with pytest.raises(ValueError, match="must keep w's structure"):
        solution(W0, ALPHA, DATA)


def test_batches_are_refused_by_name():
    """The whole batch is wanted."""
    with pytest.raises(TypeError, match="pass its"):
        NEWTON(W0, ALPHA, hg.Batches(DATA))
