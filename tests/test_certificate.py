"""The certificate against dense truth, on random problems stopped anywhere."""

import functools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from benchmarks.known import any_known, error, quadratic, two_losses
from hypergrad.implicit_diff import implicit_hypergradient, zero_adjoint
from tests.loops import run_loop

NUM_TRAIN, NUM_VAL, FEATURES, CLASSES, HIDDEN = 40, 30, 6, 3, 4


def cross_entropy(scores, y):
    return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()


def margins(w, alpha, batch):
    return jnp.mean(jax.nn.softplus(-batch["y"] * (batch["x"] @ w)))


def squares(w, alpha, batch):
    return 0.5 * jnp.mean((batch["x"] @ w - batch["y"]) ** 2)


def softmax(w, alpha, batch):
    return cross_entropy(batch["x"] @ w, batch["y"])


def network(w, alpha, batch):
    hidden = jnp.tanh(batch["x"] @ w["in"] + w["bias"][None])
    return cross_entropy(hidden @ w["out"], batch["y"])


def penalised(fit):
    def loss(w, alpha, batch):
        squares = jnp.stack([jnp.sum(x**2) for x in jax.tree.leaves(w)])
        if squares.size == 1:  # one penalty a feature
            per_row = jnp.sum(jax.tree.leaves(w)[0].reshape(FEATURES, -1) ** 2, axis=1)
            squares = per_row
        return fit(w, alpha, batch) + 0.5 * jnp.sum(jnp.exp(alpha) * squares)

    return loss


FITS = {"logistic": margins, "ridge": squares, "softmax": softmax, "mlp": network}
LOSSES = {name: (penalised(fit), fit) for name, fit in FITS.items()}


def make(key, kind):
    """A random problem of badly scaled features: (problem, w, alpha)."""
    keys = jax.random.split(key, 8)
    spread = 1.5 * jax.random.uniform(keys[0])
    scale = jnp.exp(spread * jax.random.normal(keys[1], (FEATURES,)))
    x = jax.random.normal(keys[2], (NUM_TRAIN + NUM_VAL, FEATURES)) * scale[None]
    truth = jax.random.normal(keys[3], (FEATURES, CLASSES)) / scale[:, None]
    noise = 0.5 * jax.random.normal(keys[4], (NUM_TRAIN + NUM_VAL, CLASSES))
    scores = x @ truth + noise
    y = {
        "logistic": jnp.sign(scores[:, 0]),
        "ridge": scores[:, 0],
        "softmax": jnp.argmax(scores, axis=1),
        "mlp": jnp.argmax(scores, axis=1),
    }[kind]
    if kind == "mlp":
        w = {
            "in": jax.random.normal(keys[5], (FEATURES, HIDDEN)) / 2,
            "bias": jnp.zeros(HIDDEN),
            "out": jax.random.normal(keys[6], (HIDDEN, CLASSES)) / 2,
        }
        alpha = jax.random.uniform(keys[7], (3,), minval=-3.0, maxval=-1.0)
    else:
        shape = (FEATURES, CLASSES) if kind == "softmax" else (FEATURES,)
        w = jax.random.normal(keys[5], shape)
        alpha = jax.random.uniform(keys[7], (FEATURES,), minval=-6.0, maxval=-1.0)
    train, val = (
        {"x": x[:NUM_TRAIN], "y": y[:NUM_TRAIN]},
        {
            "x": x[NUM_TRAIN:],
            "y": y[NUM_TRAIN:],
        },
    )
    return hg.Bilevel(*LOSSES[kind], train, val), w, alpha


def truth(problem, w, alpha):
    """Newton from ``w`` to a stationary point, and the hypergradient there, densely.

    Returns (known, smallest eigenvalue, hypergradient); known is False where Newton
    does not arrive or ``H`` has a direction that is not curved upwards.
    """
    flat, unravel = ravel_pytree(w)
    inner = lambda w, alpha: problem.inner_loss(unravel(w), alpha, problem.inner_data)
    outer = lambda w, alpha: problem.outer_loss(unravel(w), alpha, problem.outer_data)
    gradient, hessian = jax.grad(inner), jax.hessian(inner)
    newton = lambda _, w: w - jnp.linalg.solve(hessian(w, alpha), gradient(w, alpha))
    best = jax.lax.fori_loop(0, 50, newton, flat)
    H = hessian(best, alpha)
    b, direct = jax.grad(outer, argnums=(0, 1))(best, alpha)
    J = jax.jacobian(gradient, argnums=1)(best, alpha)
    exact = direct - J.T @ jnp.linalg.solve(H, b)
    smallest = jnp.linalg.eigvalsh(H)[0]
    arrived = jnp.linalg.norm(gradient(best, alpha)) < 1e-12
    return arrived & (smallest > 0), exact


def stopped(problem, w, alpha, num_steps):
    """``w`` after some steps of gradient descent, of the size 1 / largest curvature."""
    flat, unravel = ravel_pytree(w)
    inner = lambda w: problem.inner_loss(unravel(w), alpha, problem.inner_data)
    rate = 1 / jnp.linalg.eigvalsh(jax.hessian(inner)(0 * flat))[-1]
    step = lambda _, w: w - rate * jax.grad(inner)(w)
    return unravel(jax.lax.fori_loop(0, num_steps, step, flat))


off = lambda h, exact: jnp.linalg.norm(h - exact) / jnp.linalg.norm(exact)


@functools.partial(jax.jit, static_argnums=(1, 2))
@functools.partial(jax.vmap, in_axes=(0, None, None))
def certified(key, kind, num_newton_steps):
    """(known, true error, estimate, trusted, error of the corrected) of one problem."""
    make_key, steps_key, probe_key = jax.random.split(key, 3)
    problem, w, alpha = make(make_key, kind)
    log_steps = jax.random.uniform(steps_key, maxval=np.log(3000.0))
    w = stopped(problem, w, alpha, jnp.exp(log_steps).astype(int))
    known, exact = truth(problem, w, alpha)
    given = at(problem, w, alpha).hypergradient
    certificate = hg.certify(
        problem, w, alpha, given, num_newton_steps=num_newton_steps, key=probe_key
    )
    return (
        known,
        off(given, exact),
        certificate.error_estimate,
        certificate.trusted,
        off(certificate.hypergradient, exact),
    )


def at(problem, w, alpha, linear_solver=None):
    """Implicit differentiation at a given ``w``."""
    return implicit_hypergradient(
        problem,
        linear_solver or hg.CG(),
        w,
        alpha,
        problem.inner_data,
        problem.outer_data,
        zero_adjoint(problem, w),
    )


def check(total: int, num_newton_steps: int = 2) -> None:
    """The promises of the certificate, over ``total`` problems of four kinds."""
    keys = jax.random.split(jax.random.key(0), total // len(LOSSES))
    columns = [certified(keys, kind, num_newton_steps) for kind in LOSSES]
    columns = [np.concatenate(column) for column in zip(*columns, strict=True)]
    known = columns[0]
    _, true, estimate, trusted, corrected = (column[known] for column in columns)
    excluded = int(np.sum(~known))
    close = (true < 0.3) & (true > 1e-11)  # below, both are rounding
    factor = estimate[close] / true[close]
    within = np.mean((factor < 2) & (factor > 0.5))
    said = (
        f"{total} problems, {excluded} excluded, {int(trusted.sum())} trusted, "
        f"within a factor 2 {within:.1%} of {close.sum()}"
    )
    assert excluded < 0.4 * total, said
    assert np.mean(true[trusted] < 2e-2) >= 0.99, said
    assert np.mean(trusted[true < 2e-3]) >= 0.9, said
    assert within >= 0.95, said
    # the corrected hypergradient of what is within 30% is better, by far
    assert np.median(corrected[close] / true[close]) < 1e-2


def test_the_certificate_on_a_hundred_problems():
    """Of four kinds, the inner loop stopped anywhere."""
    check(100)


@pytest.mark.slow
def test_the_certificate_on_a_thousand_problems():
    """Trusted, then right; right, then trusted; the estimate within a factor 2."""
    check(1000)


# Sabotage: whatever is off by more than 2% must not be trusted.


def judged(problem, w, alpha, given, exact):
    certificate = jax.jit(hg.certify)(problem, w, alpha, given)
    return bool(certificate.trusted), float(off(given, exact))


@pytest.mark.parametrize("how", ["inner", "CG", "Neumann", "NaN", "indefinite"])
def test_sabotage_is_not_trusted(how: str):
    """40 problems each: loop or solve cut, series diverging, NaN, lambda_min < 0."""
    verdicts = []
    for key in jax.random.split(jax.random.key(1), 40):
        verdicts.append(sabotaged(key, how))
    trusted, true = map(np.asarray, zip(*verdicts, strict=True))
    assert np.mean(~(true <= 2e-2)) > 0.5  # it is sabotage
    assert not np.any(trusted & ~(true <= 2e-2))


@functools.partial(jax.jit, static_argnums=1)
def sabotaged(key, how):
    """(trusted, true error)."""
    key, probe_key = jax.random.split(key)
    if how == "indefinite":
        problem, w, alpha, exact = saddle(key)
        given = at(problem, w, alpha, lx.LU()).hypergradient
        given = given + 0.05 * exact[::-1]
    else:
        problem, w, alpha = make(key, "logistic")
        _, exact = truth(problem, stopped(problem, w, alpha, 2000), alpha)
        steps = 3 if how == "inner" else 3000
        w = stopped(problem, w, alpha, steps)
        linear = {"CG": hg.CG(max_steps=1), "Neumann": hg.Neumann(20, 50.0)}
        if how == "NaN":
            poison = lambda x: x.at[0].set(jnp.nan)
            problem = jax.tree.map(
                lambda x: poison(x) if x.dtype == jnp.float64 else x, problem
            )
        given = at(problem, w, alpha, linear.get(how)).hypergradient
    certificate = hg.certify(problem, w, alpha, given, key=probe_key)
    return certificate.trusted, off(given, exact)


def saddle(key):
    """A quadratic at its saddle: one eigenvalue of -0.05 to -1 times the largest."""
    size = 12
    keys = jax.random.split(key, 4)
    basis, _ = jnp.linalg.qr(jax.random.normal(keys[0], (size, size)))
    low = -jax.random.uniform(keys[1], minval=0.05)
    spectrum = jnp.linspace(0.1, 1.0, size).at[0].set(low)
    data = {
        "H": basis @ jnp.diag(spectrum) @ basis.T,
        "t": jax.random.normal(keys[2], (size,)),
    }
    alpha = jax.random.normal(keys[3], (size,))
    inner = lambda w, alpha, batch: 0.5 * w @ (batch["H"] @ w) - w @ alpha
    outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - batch["t"]) ** 2)
    w = jnp.linalg.solve(data["H"], alpha)
    exact = jnp.linalg.solve(data["H"], w - data["t"])
    return hg.Bilevel(inner, outer, data, data), w, alpha, exact


# What is reported.


def test_everything_is_reported_at_a_known_point():
    """A quadratic, one Newton step from its minimum: all fields by formulas."""
    known = quadratic("30", seed=2)
    w = known.best(known.alpha) + 0.1
    certificate = hg.certify(known.problem, w, known.alpha, strong_convexity=1.0)
    exact = known.exact(known.alpha)
    # two num_newton_steps, each leaving at most a thousandth
    assert error(certificate.hypergradient, exact) < 1e-6
    assert error(certificate.w, known.best(known.alpha)) < 1e-6
    given = at(known.problem, w, known.alpha).hypergradient
    np.testing.assert_allclose(certificate.error_estimate, off(given, exact), rtol=1e-6)
    gradient = known.hessian @ np.full(30, 0.1)
    np.testing.assert_allclose(certificate.inner_grad_norm, np.linalg.norm(gradient))
    assert certificate.corrected_grad_norm < 1e-6 * np.linalg.norm(gradient)
    ends = np.linalg.eigvalsh(known.hessian)[[0, -1]]
    assert ends[0] * (1 - 1e-9) <= certificate.ritz_min <= 1.05 * ends[0]
    assert 0.95 * ends[1] <= certificate.ritz_max <= ends[1] * (1 + 1e-9)
    assert not certificate.negative_curvature
    np.testing.assert_allclose(
        certificate.distance_estimate,
        certificate.inner_grad_norm / certificate.ritz_min,
    )
    np.testing.assert_allclose(certificate.distance_bound, certificate.inner_grad_norm)
    np.testing.assert_allclose(
        certificate.adjoint_error_bound, certificate.adjoint_residual
    )


def test_without_strong_convexity_nothing_is_called_a_bound():
    """NaN."""
    known = any_known("ridge scalar")
    certificate = hg.certify(known.problem, known.w, known.alpha)
    assert np.isnan(certificate.distance_bound)
    assert np.isnan(certificate.adjoint_error_bound)


@pytest.mark.parametrize(
    "linear",
    [hg.CG(), lx.GMRES(rtol=1e-12, atol=1e-12), lx.LU(), hg.NystromCG(3)],
)
def test_certify_sees_a_saddle_that_the_solver_does_not(linear):
    """Spectrum (3, 1, -1) at the stationary point, b orthogonal to -1 or not."""
    for target in ([1.0, 1.0, 1.0], [1.0, 1.0, 0.0]):
        inner = lambda w, alpha, batch: 0.5 * w @ (batch["h"] * w) - w @ alpha
        outer = lambda w, alpha, batch: -w @ batch["t"]
        problem = hg.Bilevel(
            inner, outer, {"h": jnp.array([3.0, 1.0, -1.0])},
            {"t": jnp.array(target)},
        )  # fmt: skip
        estimator = hg.Implicit(
            hg.ClosedForm(lambda alpha, batch: alpha / batch["h"]), linear, certify=True
        )
        found = hg.hypergradient(problem, estimator)(jnp.zeros(3), jnp.ones(3))
        assert not found.stats["trusted"]


def test_a_flat_direction_is_seen():
    """Curvatures 300 and 1, b along the first: w off along the second is 100% off."""
    inner = lambda w, alpha, batch: (
        0.5 * jnp.sum((batch["h"] + alpha) * w**2) - jnp.sum(w)
    )
    outer = lambda w, alpha, batch: w @ batch["c"]
    problem = hg.Bilevel(
        inner, outer, {"h": jnp.array([300.0, 1.0])}, {"c": jnp.array([1.0, 0.01])}
    )
    w = jnp.array([1 / 300, 2.0])
    given = at(problem, w, jnp.zeros(2), lx.LU()).hypergradient
    certificate = hg.certify(problem, w, jnp.zeros(2), given)
    exact = -jnp.array([1 / 300, 1.0]) * jnp.array([1 / 300, 0.01])
    np.testing.assert_allclose(certificate.error_estimate, off(given, exact), rtol=1e-2)
    assert not certificate.trusted


def test_what_a_certificate_costs_is_counted():
    """Evaluations of the inner loss on the host, against the ledger."""
    calls = []
    known = any_known("ridge per-weight")

    def loss(w, alpha, batch):
        jax.debug.callback(lambda: calls.append(1))
        return known.problem.inner_loss(w, alpha, batch)

    problem = hg.Bilevel(
        loss,
        known.problem.outer_loss,
        known.problem.inner_data,
        known.problem.outer_data,
    )
    jax.block_until_ready(hg.certify(problem, known.w, known.alpha))
    calls.clear()
    certificate = jax.block_until_ready(hg.certify(problem, known.w, known.alpha))
    jax.effects_barrier()
    assert len(calls) == certificate.stats["num_grads"] + certificate.stats["num_hvps"]


def test_correct_is_newton_on_the_solution():
    """A logistic loop cut at 20%: each correction squares the error, or nearly."""
    known = any_known("logistic per-weight")
    solver = hg.Descent(optax.sgd(known.step), 8)
    errors = []
    for num_newton_steps in (0, 1, 2):
        estimator = hg.Implicit(solver, num_newton_steps=num_newton_steps)
        found = hg.hypergradient(known.problem, estimator)(known.w, known.alpha)
        errors.append(error(found.hypergradient, known.exact(known.alpha)))
    assert errors[1] < 0.1 * errors[0]
    assert errors[2] < 0.1 * errors[1]


def test_a_correction_that_does_not_help_is_not_taken():
    """Newton on log cosh from w = 3 flies off; w stays where the loop left it."""
    inner = lambda w, alpha, batch: jnp.log(jnp.cosh(w - alpha))
    problem = hg.Bilevel(inner, lambda w, alpha, batch: w**2)
    given = hg.ClosedForm(lambda alpha, batch: alpha + 3.0)
    found = hg.hypergradient(problem, hg.Implicit(given, num_newton_steps=1))(0.0, 0.0)
    assert found.w == 3.0
    near = hg.ClosedForm(lambda alpha, batch: alpha + 0.5)
    found = hg.hypergradient(problem, hg.Implicit(near, num_newton_steps=1))(0.0, 0.0)
    assert abs(found.w) < 0.1


def test_several_losses_and_trees_are_certified():
    """The worst of K decides; structure is kept."""
    known = quadratic("nested", seed=1)
    problem = two_losses(known, lambda w, alpha, batch: jnp.sum(w["b"]["c"]))
    estimator = hg.Implicit(hg.Newton(), certify=True)
    found = hg.hypergradient(problem, estimator)(known.w, known.alpha)
    assert found.stats["trusted"]
    assert found.stats["error_estimate"] < 1e-6
    cut = hg.Implicit(hg.Descent(optax.sgd(known.step), 1), certify=True)
    found = hg.hypergradient(problem, cut)(known.w, known.alpha)
    assert not found.stats["trusted"]


def test_alpha_that_neither_loss_reads_is_refused():
    """As `Implicit` does."""
    known = any_known("ridge scalar")
    inner = lambda w, alpha, batch: known.problem.inner_loss(w, alpha["a"], batch)
    problem = hg.Bilevel(
        inner,
        known.problem.outer_loss,
        known.problem.inner_data,
        known.problem.outer_data,
    )
    with pytest.raises(ValueError, match=r"alpha\['rate'\]"):
        hg.certify(problem, known.w, {"a": known.alpha, "rate": 0.1})


def test_minimize_certifies_every_so_many_steps():
    """A penalty method is never trusted of itself; every third step is looked at."""
    known = any_known("ridge per-weight")
    run = functools.partial(
        run_loop, known.problem, hg.Penalty(hg.Newton(), 1e5), optax.sgd(0.01),
        known.w, known.alpha, num_steps=7,
    )  # fmt: skip
    plain, seen = run(), run(certify_every=3)
    assert not plain.stats["trusted"].any()
    assert seen.stats["trusted"].tolist() == [True, False, False] * 2 + [True]
    estimated = seen.stats["error_estimate"]
    assert np.all(np.isnan(estimated[1:3]))
    assert np.all(estimated[::3] < 1e-3)
    np.testing.assert_allclose(seen.value, plain.value, rtol=1e-12)
    assert seen.stats["num_hvps"][0] > plain.stats["num_hvps"][0]
    assert seen.stats["num_hvps"][1] == plain.stats["num_hvps"][1]
    exact = known.exact(known.alpha)
    found = hg.hypergradient(known.problem, hg.Penalty(hg.Newton(), 1e5))(
        known.w, known.alpha
    )
    np.testing.assert_allclose(
        estimated[0], error(found.hypergradient, exact), rtol=1e-2
    )


def test_minimize_measures_the_distance_of_a_procedure():
    """Unrolled stays trusted for its own target."""
    known = any_known("ridge per-weight")
    estimator = hg.Unrolled(hg.Descent(optax.sgd(known.step), 5), warm_start=False)
    trace = run_loop(
        known.problem, estimator, optax.sgd(0.01), known.w, known.alpha, num_steps=2,
        certify_every=1,
    )  # fmt: skip
    assert trace.stats["trusted"].all()
    assert np.all(trace.stats["distance_to_implicit"] > 1e-3)
    assert np.all(trace.stats["error_estimate"] == 0)


def test_a_hypergradient_of_another_structure_is_refused():
    """Before anything is traced."""
    known = any_known("ridge per-weight")
    with pytest.raises(ValueError, match="must keep alpha's structure"):
        hg.certify(known.problem, known.w, known.alpha, jnp.ones(2))


def test_a_tiny_outer_loss_hides_no_error():
    """``dM/dalpha = 1e-22 alpha``: its square is zero in float32, and so is 0's."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: 0.5 * (w - alpha) ** 2,
        lambda w, alpha, batch: 0.5 * batch * w**2,
        None,
        jnp.float32(1e-22),
    )
    one = jnp.float32(1.0)
    found = hg.certify(problem, one, one, jnp.float32(0.0))
    assert found.error_estimate == pytest.approx(1.0)
    assert not found.trusted
    right = hg.certify(problem, one, one, jnp.float32(1e-22))
    assert right.hypergradient == pytest.approx(1e-22)
    assert right.trusted


def test_a_number_is_certified_as_an_array_is():
    """``w = alpha``, ``M = w²/2``: 1 at alpha = 1, of which 1.5 is off by a half."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: 0.5 * (w - alpha) ** 2,
        lambda w, alpha, batch: 0.5 * w**2,
    )
    for number in (1.5, np.float64(1.5), jnp.asarray(1.5)):
        found = hg.certify(problem, 1.0, 1.0, number)
        assert found.error_estimate == pytest.approx(0.5)
