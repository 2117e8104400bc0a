"""Treatment of estimates that are not trusted: by hand, and on reference problems."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks.shared.reference_problems import error, get_reference, quadratic
from tests.estimator_cases import quadratic_solution
from tests.loops import TO_ZERO, ExactEstimator, run_loop

NUM_STEPS = 8
REFERENCE = quadratic("30", seed=9)
ADAM = optax.adam(0.1)
BAD = np.array([False, True, False, False, True, True, False, False])


def run(on_untrusted="record", bad=BAD, **changes) -> hg.Trace:
    """Runs an estimator that points uphill, and is not trusted, at the bad steps."""
    options = {
        "problem": REFERENCE.problem, "optimizer": ADAM, "w": REFERENCE.w,
        "alpha": REFERENCE.alpha, "num_steps": NUM_STEPS, "record_alphas": True,
        "estimator": ExactEstimator(quadratic_solution, trusted=~jnp.asarray(bad)),
        "on_untrusted": on_untrusted,
    }  # fmt: skip
    return run_loop(**options | changes)


def run_by_hand(factors):
    """Returns alphas of Adam on multiples of the hypergradient; 0 means no step."""
    alpha, state, alphas = REFERENCE.alpha, ADAM.init(REFERENCE.alpha), []
    for factor in factors:
        alphas.append(alpha)
        if factor:
            gradient = factor * REFERENCE.exact(alpha)
            updates, state = ADAM.update(gradient, state, alpha)
            alpha = optax.apply_updates(alpha, updates)
    return jnp.stack([*alphas, alpha])


@pytest.mark.parametrize(
    ("on_untrusted", "factors"),
    [
        ("record", np.where(BAD, -3.0, 1.0)),
        ("skip", np.where(BAD, 0.0, 1.0)),
        ("refine", np.ones(NUM_STEPS)),
    ],
    ids=["record", "skip", "refine"],
)
def test_a_run_equals_a_loop_by_hand(on_untrusted: str, factors):
    """A step, no step (nor a count of Adam's), or the step of the second estimate."""
    trace, alphas = run(on_untrusted), run_by_hand(factors)
    assert trace.status == "completed"
    assert error(trace.alphas, alphas[:-1]) < 1e-9
    assert error(trace.alpha, alphas[-1]) < 1e-9
    assert np.all(np.isfinite(trace.value))
    is_refined = on_untrusted == "refine"
    np.testing.assert_array_equal(trace.stats["trusted"], is_refined | ~BAD)
    assert ("refined" in trace.stats) == is_refined
    cost = 3.0 * np.ones(NUM_STEPS)
    if is_refined:
        np.testing.assert_array_equal(trace.stats["refined"], BAD)
        cost = np.where(BAD, 6.0, 3.0)  # both estimates are counted
    np.testing.assert_array_equal(trace.stats["gradient_equivalents"], cost)


def test_stop_ends_the_run_before_the_step():
    """At the last trusted alpha, with its w; later rows are blank."""
    trace = run("stop", np.arange(NUM_STEPS) == 3)
    alphas = run_by_hand(np.ones(3))
    assert trace.status == "stopped: the hypergradient is not trusted"
    assert error(trace.alpha, alphas[2]) < 1e-9
    assert error(trace.w, REFERENCE.solution(alphas[2])) < 1e-9
    assert error(trace.best_alpha, alphas[2]) < 1e-9
    assert np.isfinite(trace.value).tolist() == [True] * 4 + [False] * 4
    assert trace.stats["trusted"].tolist() == [True] * 3 + [False] * 5
    assert not np.any(trace.stats["gradient_equivalents"][4:])
    at_once = run("stop", np.ones(NUM_STEPS, bool))
    np.testing.assert_array_equal(at_once.alpha, REFERENCE.alpha)
    np.testing.assert_array_equal(at_once.w, REFERENCE.w)


def test_failures_come_before_trust():
    """A NaN ends the run as a NaN, whatever the guard."""
    outer = lambda w, alpha, batch: w**2 + 0 * jnp.log(alpha - 1)
    problem = hg.Bilevel(lambda w, alpha, batch: (w - alpha) ** 2, outer)
    estimator = ExactEstimator(trusted=~BAD)
    for on_untrusted in ("record", "skip", "refine", "stop"):
        trace = run(
            on_untrusted, problem=problem, w=0.0, alpha=1.05, estimator=estimator,
            optimizer=optax.sgd(0.1),
        )  # fmt: skip
        assert trace.status == "stopped: the outer value is not finite"
        assert trace.alpha > 1


def test_a_skipped_step_that_is_not_finite_does_not_end_the_run():
    """An estimate that is not trusted points uphill, where this optimizer fails."""
    optimizer = optax.stateless(
        lambda g, params: jax.tree.map(lambda g: jnp.where(g < 0, jnp.inf, -0.1 * g), g)
    )
    estimator = ExactEstimator(trusted=~BAD)
    arguments = {"problem": TO_ZERO, "w": 0.0, "alpha": 3.0, "estimator": estimator}
    assert run("skip", optimizer=optimizer, **arguments).status == "completed"
    assert run("record", optimizer=optimizer, **arguments).status != "completed"


def test_a_skipped_step_leaves_the_aggregator_unchanged():
    """The multiplier of a violated limit grows with each step that is made."""
    outer = REFERENCE.problem.outer_loss
    problem = hg.Bilevel(
        REFERENCE.problem.inner_loss, (outer, lambda *inputs: 1 + outer(*inputs)),
        REFERENCE.problem.inner_data, REFERENCE.problem.outer_data,
    )  # fmt: skip
    bad = np.arange(NUM_STEPS) > 0
    aggregator = hg.objectives.AugmentedLagrangian(limits=0.5)
    for on_untrusted, is_constant in (("skip", True), ("record", False)):
        trace = run(on_untrusted, bad, problem=problem, aggregator=aggregator)
        weights = np.asarray(trace.stats["objective_weights"])[1:]
        assert (np.ptp(weights, axis=0).max() == 0) == is_constant
        assert (np.ptp(trace.alphas[1:], axis=0).max() == 0) == is_constant


@pytest.mark.parametrize("on_untrusted", ["skip", "refine", "stop"])
def test_vmap_equals_a_loop(on_untrusted: str):
    """Over the steps that are bad."""
    masks = jnp.stack([jnp.asarray(BAD), ~jnp.asarray(BAD), jnp.asarray(BAD[::-1])])
    batch = jax.jit(jax.vmap(lambda bad: run(on_untrusted, bad)))(masks)
    for i, bad in enumerate(masks):
        alone = run(on_untrusted, bad)
        trace = jax.tree.map(lambda leaf, i=i: leaf[i], batch)
        assert trace.status == alone.status
        np.testing.assert_allclose(trace.alpha, alone.alpha, rtol=1e-9)
        for name, column in alone.stats.items():
            np.testing.assert_allclose(trace.stats[name], column, rtol=1e-9)


# Estimators and certificates of the library.


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("quadratic 30", {"linear_solver": hg.Neumann(1, step_size=0.1)}),
        ("ridge per-weight", {"linear_solver": hg.NystromCG(2, refresh_every=3)}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("ridge per-weight", {"linear_solver": hg.Identity(), "damping": 0.5}),
                ("quadratic nested", {"warm_start": False}),
                ("logistic per-weight", {"adjoint_batch_size": 4}),
            )
        ),
    ],
    ids=["Neumann", "NystromCG", "Identity, damping", "nested, cold", "batches"],
)
def test_a_refined_implicit_estimate_is_the_closed_form(name: str, options: dict):
    """It is not trusted after three inner steps, and then accurate.

    Two Newton steps leave a millionth of the distance, times 100 for the condition.
    """
    reference = get_reference(name)
    estimator = hg.Implicit(hg.Descent(optax.sgd(reference.step), 3), **options)
    problem = reference.problem
    if estimator.adjoint_batch_size is not None:
        data = hg.Batches(problem.inner_data), problem.outer_data
        problem = hg.Bilevel(problem.inner_loss, problem.outer_loss, *data)
    state = estimator.init(problem, reference.w, reference.alpha)
    inputs = reference.alpha, jax.random.key(0)
    first, state = eqx.filter_jit(estimator.estimate)(problem, state, *inputs)
    second, state = eqx.filter_jit(estimator.refine)(problem, state, *inputs)
    exact = reference.exact(reference.alpha)
    assert not first.trusted
    assert error(first.hypergradient, exact) > 1e-2
    assert second.trusted
    assert error(second.hypergradient, exact) < 1e-4
    assert state.num_estimates == 1  # schedules count estimates, not refinements


def test_a_refined_step_counts_both_estimates_of_implicit():
    """The counts of a step are the sums; its other statistics are of the second."""
    reference = get_reference("ridge per-weight")
    estimator = hg.Implicit(hg.Descent(optax.sgd(reference.step), 3))
    trace = run_loop(
        reference.problem, estimator, optax.sgd(0.0), reference.w, reference.alpha,
        num_steps=1, on_untrusted="refine",
    )  # fmt: skip
    state = estimator.init(reference.problem, reference.w, reference.alpha)
    inputs = reference.alpha, jax.random.key(0)
    first, state = estimator.estimate(reference.problem, state, *inputs)
    second, _ = estimator.refine(reference.problem, state, *inputs)
    assert trace.stats["trusted"].all()
    assert trace.stats["refined"].all()
    for name in ("gradient_equivalents", "num_hvps", "num_grads", "num_inner_steps"):
        expected = first.stats[name] + second.stats[name]
        np.testing.assert_allclose(trace.stats[name][0], expected)
    actual, expected = (
        trace.stats["inner_grad_norm"][0],
        second.stats["inner_grad_norm"],
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-14)


def test_a_tolerance_that_inner_steps_do_not_reach_is_refined():
    """Two inner steps do not reach 1e-3; with a Newton step per round they do."""
    reference = get_reference("ridge per-weight")
    solver = hg.Descent(optax.sgd(reference.step), 2)
    estimator = hg.Implicit(solver, rtol=jnp.array([1e-3, 1e-2]))
    run = functools.partial(
        run_loop, reference.problem, estimator, optax.sgd(0.5), reference.w,
        reference.alpha, num_steps=1,
    )  # fmt: skip
    assert not run().stats["trusted"].any()
    trace = run(on_untrusted="refine")
    assert trace.stats["trusted"].all()
    assert trace.stats["error_estimate"][0] <= 1e-3
    hypergradient = (reference.alpha - trace.alpha) / 0.5
    # An estimate is within twice its tolerance.
    assert error(hypergradient, reference.exact(reference.alpha)) < 2e-3


def test_certificates_decide_for_a_single_loop_method():
    """SOBA moves alpha where the certificate trusts it, and only there."""
    trace = run_loop(
        REFERENCE.problem, hg.SOBA(optax.sgd(REFERENCE.step)), optax.sgd(1e-3),
        REFERENCE.w, REFERENCE.alpha, num_steps=300, certify_every=1,
        on_untrusted="skip", record_alphas=True,
    )  # fmt: skip
    trusted = np.asarray(trace.stats["trusted"])
    has_moved = np.any(np.diff(trace.alphas, axis=0) != 0, axis=1)
    assert 0 < trusted.sum() < len(trusted)
    np.testing.assert_array_equal(has_moved, trusted[:-1])
    np.testing.assert_array_equal(trace.flags["certificate"], ~trusted)


# Invalid guards.


@pytest.mark.parametrize(
    "options",
    [
        {"on_untrusted": "ignore"},
        {"on_untrusted": None},
        {"on_untrusted": ["skip"]},
        {"on_untrusted": "refine", "estimator": hg.Unrolled(hg.Descent(ADAM, 3))},
        {"on_untrusted": "skip", "estimator": hg.SOBA(ADAM)},
        {"on_untrusted": "stop", "estimator": hg.SOBA(ADAM), "certify_every": 5},
        {
            "on_untrusted": "skip",
            "certify_every": 1,
            "estimator": hg.Unrolled(hg.Descent(ADAM, 9), truncation_length=3),
        },
    ],
    ids=["name", "None", "list", "no refine", "SOBA", "certify_every", "truncated"],
)
def test_guards_that_cannot_work_are_refused(options: dict):
    """An unknown one, one that is unsupported, or one that never allows a step."""
    with pytest.raises(ValueError, match="on_untrusted"):
        run(**options)
