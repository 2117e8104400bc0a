"""`diagnose` names the place where each planted number stops being finite."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from tests.loops import Stateless

W, ALPHA = jnp.zeros(3), jnp.full(3, -2.0)
X = np.random.default_rng(0).normal(size=(40, 3))
TRAIN, VAL = {"x": X[:20], "y": np.sign(X[:20, 0])}, {"x": X[20:], "y": X[20:, 0]}
SOLVER = hg.Descent(optax.sgd(0.1), 50)


def outer_loss(w, alpha, batch):
    return jnp.mean((batch["x"] @ w - batch["y"]) ** 2)


def inner_loss(w, alpha, batch):
    return outer_loss(w, alpha, batch) + jnp.sum(jnp.exp(alpha) * w**2)


def diagnose(
    inner_loss=inner_loss,
    outer_loss=outer_loss,
    train=TRAIN,
    val=VAL,
    estimator=None,
    **settings,
):
    problem = hg.Bilevel(inner_loss, outer_loss, train, val, **settings)
    return hg.diagnose(problem, estimator or hg.Implicit(SOLVER), W, ALPHA)


def with_entry(data, name, index, value):
    array = data[name].copy()
    array[index] = value
    return data | {name: array}


def numbers(sentence):
    """Returns the numbers of a sentence, which may have an exponent."""
    return [float(x) for x in re.findall(r"\d+\.?\d*(?:e[+-]?\d+)?", sentence)]


@pytest.mark.parametrize(
    "estimator",
    [
        hg.Implicit(SOLVER),
        hg.Unrolled(SOLVER),
        hg.Implicit(hg.Newton()),
        hg.Average(hg.Implicit(SOLVER, outer_batch_size=5), 2),
        hg.SOBA(optax.sgd(0.1)),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_nothing_is_said_of_a_finite_problem(estimator):
    problem = hg.Bilevel(inner_loss, outer_loss, hg.Batches(TRAIN, 5), hg.Batches(VAL))
    assert hg.diagnose(problem, estimator, W, ALPHA) == ()


@pytest.mark.parametrize("as_batches", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_data_is_named_by_leaf_row_and_number(as_batches, value):
    train = with_entry(with_entry(TRAIN, "x", (17, 0), value), "x", (4, 2), value)
    wrapped = hg.Batches(train, 5) if as_batches else train
    loss, data = diagnose(train=wrapped)
    assert loss.startswith("inner_loss is nan at the start")
    assert "inner_data['x'] has 2" in data
    assert f"first is {value}, in row 4, at index (4, 2)" in data


def test_bad_outer_data_is_told_from_inner_data():
    _, data = diagnose(val=with_entry(VAL, "y", 7, np.nan))
    assert "outer_data['y'] has 1" in data
    assert "row 7" in data


def test_bad_numbers_that_all_batches_share_are_named():
    scaled = lambda w, alpha, batch: inner_loss(w * batch[1][0], alpha, batch[0])
    batches = hg.Batches(TRAIN, 5, shared=jnp.array([1.0, jnp.nan]))
    assert diagnose(scaled, train=batches) == ()
    _, data = diagnose(scaled, train=hg.Batches(TRAIN, 5, shared=jnp.array([jnp.inf])))
    assert "inner_data.shared has 1" in data


def test_data_of_a_function_is_named():
    bad = with_entry(TRAIN, "x", (3, 1), np.nan)
    sample = lambda bad, val, key: (bad, val)
    data_fn = jax.tree_util.Partial(sample, bad, VAL)
    _, data = diagnose(train=None, val=None, data_fn=data_fn)
    assert "inner_data['x']" in data
    assert "(3, 1)" in data


def test_a_start_that_is_not_finite_is_told_from_a_loss():
    (only,) = diagnose(init_fn=lambda w, alpha: w / jnp.sum(w * 0.0))
    assert only == "init_fn returns a w that is not finite."


def test_masked_bad_data_is_no_finding():
    def masked(w, alpha, batch):
        x = jnp.where(jnp.isfinite(batch["x"]), batch["x"], 0.0)
        return inner_loss(w, alpha, {"x": x, "y": batch["y"]})

    assert diagnose(masked, train=with_entry(TRAIN, "x", (3, 1), np.nan)) == ()


def test_a_mask_outside_of_the_function_has_a_bad_gradient():
    """The value is finite, the gradient is not: the trap of `jnp.where`."""

    def trapped(w, alpha, batch):
        root = jnp.sqrt(jnp.sum(w**2))
        return inner_loss(w, alpha, batch) + jnp.where(root > 0, root, 0.0)

    (only,) = diagnose(trapped)
    assert "gradient of inner_loss" in only
    assert "by w" in only


def test_a_loss_that_is_not_finite_at_the_start_is_named():
    (only,) = diagnose(lambda w, alpha, batch: jnp.log(jnp.sum(w**2)))
    assert "inner_loss is -inf" in only


def test_a_loss_that_refuses_its_targets_is_quoted():
    """Surrogates return NaN of targets that are not valid where these are traced."""
    f_score = hg.surrogates.FBeta()
    loss = lambda w, _, batch: (
        -f_score(batch["x"] @ w, batch["y"], temperature=jnp.ones(()))
    )
    (finding,) = diagnose(outer_loss=loss, val=VAL | {"y": np.sign(VAL["y"])})
    assert finding.startswith(
        "outer_loss is nan at the start, of inputs that it refuses:"
    )
    assert "targets must be 0 or 1; got -1" in finding
    assert "of finite inputs" not in finding
    valid = VAL | {"y": (VAL["y"] > 0).astype(float)}
    assert not any(
        "refuses" in finding for finding in diagnose(outer_loss=loss, val=valid)
    )


def test_one_of_several_outer_losses_is_named():
    bad = lambda w, alpha, batch: jnp.log(jnp.sum(w) - jnp.sum(w))
    (only,) = diagnose(outer_loss=(outer_loss, bad))
    assert "outer_loss[1] is -inf" in only


def first_bad_step(rate, dtype):
    """Counts by hand the steps of gradient descent until w or its loss overflows."""
    x, y = TRAIN["x"].astype(dtype), TRAIN["y"].astype(dtype)
    w, penalty = W.astype(dtype), np.exp(ALPHA.astype(dtype))
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(1000):
            residual = x @ w - y
            value = np.mean(residual**2) + np.sum(penalty * w**2)
            grad = 2 * x.T @ residual / dtype(len(y)) + 2 * penalty * w
            if not np.isfinite([value, *grad, *w]).all():
                return step
            w = w - dtype(rate) * grad
    raise AssertionError("the run stays finite")


@pytest.mark.parametrize("make", [hg.Implicit, hg.Unrolled])
def test_a_divergence_names_the_step_and_the_norms(make):
    to_float32 = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    problem = hg.Bilevel(inner_loss, outer_loss, *to_float32((TRAIN, VAL)))
    estimator = make(hg.Descent(optax.sgd(50.0), 80))
    (only,) = hg.diagnose(problem, estimator, *to_float32((W, ALPHA)))
    step = first_bad_step(50.0, np.float32)
    assert "diverges" in only
    assert f"step {step} of 80" in only
    assert "step size" in only
    norms = numbers(only)
    assert max(norms) > 1e15  # of w or of its gradient, one step earlier


def test_a_divergence_that_stays_finite_is_named():
    solver = hg.Descent(optax.sgd(5.0), 10)
    (only,) = diagnose(estimator=hg.Implicit(solver))
    assert "diverges" in only
    assert "in its 10 steps" in only


def test_a_sudden_end_is_told_from_a_divergence():
    """The loss ends where ``w`` leaves the domain of a logarithm."""
    loss = lambda w, alpha, batch: jnp.sum(w - jnp.log(1.0 - w) * 0.0 - 3.0 * w)
    (only,) = diagnose(loss, estimator=hg.Implicit(hg.Descent(optax.sgd(0.25), 50)))
    assert "diverges" not in only
    assert "after step 2 of the 50" in only  # w = 0, 0.5, 1: log(0) * 0 is NaN


def test_a_step_that_returns_a_bad_w_is_told_from_a_bad_loss():
    """The closed form divides by zero; nothing is wrong with the quadratic."""
    divide = lambda alpha, batch: alpha / jnp.sum(0.0 * alpha)
    solver = hg.ClosedForm(divide)
    (only,) = diagnose(estimator=hg.Unrolled(solver))
    assert only.startswith("step 1 of the 1 inner steps returns a w that is not finite")


def test_a_drift_from_the_minimum_is_no_divergence():
    """The gradient at a minimum is rounding noise, which Adam makes larger."""
    newton = hg.hypergradient(
        hg.Bilevel(inner_loss, outer_loss, TRAIN, VAL), hg.Implicit(hg.Newton())
    )
    adam = hg.Implicit(hg.Descent(optax.adam(0.01), 50))
    problem = hg.Bilevel(inner_loss, outer_loss, TRAIN, VAL)
    assert hg.diagnose(problem, adam, newton(W, ALPHA).w, ALPHA) == ()


def test_a_solver_without_steps_is_named():
    class Broken(eqx.Module):
        def solve(self, inner_loss, w, alpha, data, key):
            return w / 0.0, hg.inner.inner_stats(1)

    (only,) = diagnose(estimator=hg.Implicit(Broken()))
    assert "Broken.solve" in only
    assert "w" in only


def test_a_solver_without_steps_that_diverges_is_named():
    unbounded = lambda w, alpha, batch: jnp.sum(jnp.exp(alpha) * (w**3 + w))
    (only,) = diagnose(unbounded, estimator=hg.Implicit(hg.LBFGS(max_steps=30)))
    assert "LBFGS.solve" in only


@pytest.mark.parametrize("offset", [1.0, 0.0], ids=["positive", "zero at the saddle"])
@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_the_way_from_a_saddle_to_a_minimum_is_no_divergence(unit, offset):
    """Both ``w`` and its gradient are larger at the end, and the loss is lower."""
    wells = lambda w, alpha, batch: (
        unit * (100 * jnp.sum(w**4 - 2 * w**2 + offset) + 1e-6 * jnp.sum(w))
    )
    penalty = lambda w, alpha: unit * jnp.sum(alpha * w**2)
    inner = lambda w, alpha, batch: wells(w, alpha, batch) + penalty(w, alpha)
    problem = hg.Bilevel(inner, lambda w, alpha, batch: jnp.sum(w**2))
    estimator = hg.Implicit(hg.LBFGS())
    arguments = jnp.zeros(2), jnp.full(2, 1e-4)
    assert hg.hypergradient(problem, estimator)(*arguments).trusted
    assert hg.diagnose(problem, estimator, *arguments) == ()


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_steps_below_all_bounds_that_stay_finite_are_named(unit):
    solver = hg.Descent(optax.sgd(0.1 / unit), 50)
    unbounded = lambda w, alpha, batch: (
        -10 * unit * jnp.sum(jnp.exp(alpha) * (w**2 + w))
    )
    (only,) = diagnose(unbounded, estimator=hg.Implicit(solver))
    assert "diverges" in only


def test_an_estimator_without_an_inner_solver_is_run():
    broken = Stateless(
        lambda w, alpha, key: hg.Estimate(jnp.zeros(()), alpha * jnp.nan, w)
    )
    (only,) = diagnose(estimator=broken)
    assert "hypergradient by alpha" in only


def test_a_bad_batch_of_the_outer_loss_is_told_from_the_derivative():
    """The loss divides by a sum of flags, which is zero in some batches."""
    flags = np.zeros(20)
    flags[0] = 1.0

    def flagged(w, alpha, batch):
        return jnp.sum(batch["flags"] * w[0]) / jnp.sum(batch["flags"])

    batches = hg.Batches(VAL | {"flags": flags})
    estimator = hg.Unrolled(SOLVER, outer_batch_size=2)
    (only,) = diagnose(outer_loss=flagged, val=batches, estimator=estimator)
    assert "outer value of the estimate is nan" in only


def test_tracers_are_refused():
    problem = hg.Bilevel(inner_loss, outer_loss, TRAIN, VAL)
    with pytest.raises(ValueError, match="concrete"):
        jax.jit(lambda w: hg.diagnose(problem, hg.Implicit(SOLVER), w, ALPHA) and w)(W)


def test_an_outer_loss_that_is_bad_only_at_the_solution_is_named():
    """w moves to alpha = -2, where the root of 1 + w does not exist."""
    (only,) = diagnose(
        lambda w, alpha, batch: jnp.sum((w - alpha) ** 2),
        lambda w, alpha, batch: jnp.sum(jnp.sqrt(1.0 + w)),
    )
    assert "outer_loss is nan" in only
    assert "inner run" in only


def test_a_second_derivative_that_is_not_finite_is_named():
    """Adam is not differentiable where a gradient is always zero."""
    empty = TRAIN | {"x": TRAIN["x"] * np.array([1.0, 1.0, 0.0])}
    adam = hg.Unrolled(hg.Descent(optax.adam(0.1), 20))
    (only,) = diagnose(train=empty, estimator=adam)
    assert "hypergradient by alpha" in only
    assert "eps_root" in only


def lossy_loss(w, alpha, batch):
    return inner_loss(w, alpha, batch) + 0.1 * jnp.sum(jnp.round(alpha) * w**2)


def line_of(function):
    """Returns the place of the line below the head of a function."""
    code = function.__code__
    return f"test_diagnosis.py:{code.co_firstlineno + 1}"


def lossy_init(w, alpha):
    return w + jnp.round(alpha)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("inner_loss", lossy_loss),
        ("outer_loss", lossy_loss),
        ("init_fn", lossy_init),
    ],
)
def test_a_lost_derivative_is_named_by_its_line(name, function):
    """The flag alone does not say where the derivative is lost."""
    (sentence,) = diagnose(estimator=hg.Unrolled(SOLVER), **{name: function})
    assert sentence.startswith(f"{name} loses derivatives in round (")
    assert line_of(function) in sentence


def test_a_lost_derivative_of_an_optimizer_is_named():
    """Lion moves w by the sign of its momentum."""
    (sentence,) = diagnose(estimator=hg.Unrolled(hg.Descent(optax.lion(0.1), 20)))
    assert sentence.startswith("a step of Descent loses derivatives in sign (")
    assert "optax" in sentence


def test_all_places_of_a_lost_derivative_are_named():
    """Mending one of them would leave the flag."""
    estimator = hg.Unrolled(hg.Descent(optax.lion(0.1), 20))
    sentences = diagnose(lossy_loss, estimator=estimator, init_fn=lossy_init)
    names = [sentence.partition(" loses")[0] for sentence in sentences]
    assert names == ["inner_loss", "init_fn", "a step of Descent"]


def test_only_what_an_estimator_differentiates_is_named():
    """`Implicit` uses neither the starting point nor the steps."""
    estimator = hg.Implicit(hg.Descent(optax.lion(0.01), 20))
    sentences = diagnose(lossy_loss, estimator=estimator, init_fn=lossy_init)
    assert [x.partition(" loses")[0] for x in sentences] == ["inner_loss"]
    estimator = hg.FixedPoint(hg.Descent(optax.lion(0.01), 20), 5)
    sentences = diagnose(estimator=estimator, init_fn=lossy_init)
    assert [x.partition(" loses")[0] for x in sentences] == ["a step of Descent"]


def test_a_lost_derivative_of_a_single_loop_method_is_named():
    """Its estimates are never trusted, so that no flag says it."""
    (sentence,) = diagnose(lossy_loss, estimator=hg.SOBA(optax.sgd(0.1)))
    assert sentence.startswith("inner_loss loses derivatives in round (")


def test_the_reason_of_a_lost_derivative_names_diagnose():
    problem = hg.Bilevel(lossy_loss, outer_loss, TRAIN, VAL)
    estimate = hg.hypergradient(problem, hg.Implicit(SOLVER))(W, ALPHA)
    assert any("stop_gradient" in x and "hg.diagnose" in x for x in estimate.reasons)


def test_a_stopped_run_is_diagnosed_at_its_last_row():
    """The penalty grows until the fixed learning rate is too large for it."""
    steep = lambda w, alpha, batch: jnp.sum(jnp.exp(alpha) * (w - 1.0) ** 2)
    estimator = hg.Unrolled(hg.Descent(optax.sgd(0.3), 5000))
    problem = hg.Bilevel(
        steep,
        lambda w, alpha, batch: jnp.sum(1e-6 * w**2 - alpha),
        init_fn=lambda w, alpha: jnp.zeros_like(w),
    )
    loop = hg.OuterLoop(
        problem,
        estimator,
        optax.sgd(0.1),
        record_alphas=True,
    )
    trace = loop.run(loop.init(W, jnp.zeros(3)), num_steps=30)
    assert trace.status_code > 0
    assert 5 < trace.last_row < 29
    assert not np.isfinite(trace.value[trace.last_row])
    assert np.isfinite(trace.value[: trace.last_row]).all()
    alpha = trace.alphas[trace.last_row]
    (only,) = hg.diagnose(problem, estimator, trace.w, alpha)
    assert "the inner run diverges" in only
    assert "last" in repr(trace)
    assert "then not finite" in repr(trace)


def test_the_last_row_is_that_of_the_failure_without_costs():
    """An estimator that states no cost fails at once: a row was made all the same."""
    costless = Stateless(
        lambda w, alpha, key: hg.Estimate(jnp.asarray(jnp.nan), alpha, w)
    )
    problem = hg.Bilevel(inner_loss, outer_loss, TRAIN, VAL)
    trace = hg.minimize(problem, costless, optax.sgd(0.1), W, ALPHA, num_steps=3)
    assert trace.last_row == 0


def test_the_bad_sample_of_an_average_is_named():
    """One in eight samples has a NaN, which the key of the estimate itself has not."""
    key = jax.random.key(0)
    _, estimate_key = jax.random.split(key)
    bad_key = jax.random.split(jax.random.split(estimate_key, 8)[5], 4)[0]

    def sample(arrays, key):
        bad_bits, bad, good, val = arrays
        is_bad = jnp.all(jax.random.key_data(key) == bad_bits)
        return jax.tree.map(lambda x, y: jnp.where(is_bad, x, y), bad, good), val

    bad = with_entry(TRAIN, "x", (3, 1), np.nan)
    arrays = jax.random.key_data(bad_key), bad, TRAIN, VAL
    data_fn = jax.tree_util.Partial(sample, arrays)
    problem = hg.Bilevel(inner_loss, outer_loss, data_fn=data_fn)
    estimator = hg.Average(hg.Implicit(hg.Newton()), 8)
    sentences = hg.diagnose(problem, estimator, W, ALPHA, key)
    assert any("inner_data['x']" in sentence for sentence in sentences)
