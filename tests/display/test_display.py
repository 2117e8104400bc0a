"""Results print as tables: what stands in them, and that printing never fails."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.estimators.base import REASONS, make_estimate
from tests.display.printed_tables import read_html, read_text
from tests.loops import TO_ONE, ExactEstimator, Stateless, run_loop

IMPLICIT = hg.hypergradient(TO_ONE, hg.Implicit(hg.Newton()))
TRUSTED = np.array([True, False, True, False, False])


def run(alpha=3.0, num_steps=5, **options) -> hg.Trace:
    estimator = ExactEstimator(trusted=TRUSTED)
    return run_loop(
        TO_ONE, estimator, optax.sgd(0.1), 0.0, alpha, num_steps=num_steps, **options
    )


def make_result(value=0.5, alpha=(3.0, 4.0), **flags) -> hg.Estimate:
    return make_estimate(
        jnp.asarray(value), jnp.asarray(alpha), jnp.zeros((3, 2)),
        {"not_finite": False} | flags,
        error_estimate=1.25e-8, num_grads=500, num_hvps=25, num_outer_grads=1,
        gradient_equivalents=551,
    )  # fmt: skip


def certify(w=1.5, alpha=1.0) -> hg.Certificate:
    return hg.certify(TO_ONE, w, alpha)


RESULT_FNS = {
    "estimate": lambda alpha=3.0: IMPLICIT(0.0, alpha),
    "certificate": certify,
    "trace": lambda alpha=3.0: run(alpha),
}


def test_an_estimate_prints_its_numbers_and_its_cost_in_one_line():
    calls = "500 gradients, 25 HVPs, 1 outer gradient"
    assert read_text(make_result()) == {
        "value": "0.5",
        "hypergradient": "[3, 4]",
        "w": f"{jnp.zeros(()).dtype}[3,2]",
        "trusted": "True",
        "error_estimate": "1.2e-08",
        "cost": f"551 gradient-equivalents: {calls}",
    }


def test_a_large_hypergradient_prints_its_size_and_norm():
    """Of one leaf the shape, of several the numbers of leaves and of entries."""
    result = make_result(alpha=np.full(100, 0.3))
    dtype = result.hypergradient.dtype
    assert read_text(result)["hypergradient"] == f"{dtype}[100], norm 3"
    tree = {"a": jnp.full((2, 8), 3.0), "b": jnp.full(9, 4.0)}
    result = dataclasses.replace(result, hypergradient=tree)
    expected = "2 leaves, 25 numbers, norm 16.97"
    assert read_text(result)["hypergradient"] == expected


def test_an_estimate_that_is_not_trusted_prints_the_reasons():
    table = read_text(make_result(truncated=True, inner_error=True, not_finite=False))
    assert table["trusted"] == "False"
    assert table["reasons"] == f"{REASONS['inner_error']} {REASONS['truncated']}"


def test_numbers_that_are_not_finite_explain_all_other_reasons():
    """The remedies of the others would send a reader the wrong way."""
    table = read_text(make_result(inner_error=True, not_finite=True))
    assert table["reasons"] == REASONS["not_finite"]


@pytest.mark.parametrize("number", [1.0, np.nan], ids=["finite", "NaN"])
def test_an_estimate_that_is_never_trusted_says_if_it_is_not_finite(number):
    """It sets no flag for it, because its one flag is set in any case."""
    problem = hg.Bilevel(
        lambda w, a, b: (w - a * b) ** 2, lambda w, a, b: w**2, jnp.asarray(number)
    )
    hvp_fn = lambda w, alpha, batch, v: 2 * v
    estimator = hg.Implicit(hg.Newton(), hvp_fn=hvp_fn)
    estimate = hg.hypergradient(problem, estimator)(0.0, 1.0)
    name = "not_finite" if np.isnan(number) else "other_curvature"
    assert estimate.reasons == (REASONS[name],)


def test_errors_that_do_not_apply_are_left_out():
    """The estimated error is always named, also if there is none."""
    result = make_result()
    stats = result.stats | {"standard_error": 0.125, "error_estimate": jnp.nan}
    table = read_text(dataclasses.replace(result, stats=stats))
    assert table["standard_error"] == "0.12"
    assert table["error_estimate"] == "not available"


def test_an_exact_derivative_of_a_run_does_not_look_like_a_measured_error():
    """Of a run that diverged nothing is known."""
    expected = {0.1: "0: the exact derivative of this run", 1e3: "not available"}
    for step_size, text in expected.items():
        solver = hg.Descent(optax.sgd(step_size), num_steps=200)
        estimate = hg.hypergradient(TO_ONE, hg.Unrolled(solver))(0.0, 3.0)
        assert read_text(estimate)["error_estimate"] == text


def test_a_trace_prints_values_trust_cost_and_metrics():
    trace = run(metrics={"m": lambda w, alpha, key: 2 * alpha}, eval_every=3)
    table = read_text(trace)
    values = [f"{x:.6g}" for x in trace.value.tolist()]
    row = int(trace.value.argmin())
    assert table["status"] == "completed"
    assert table["steps"] == "5"
    lowest = f"lowest {values[row]} at step {row}"
    assert table["value"] == f"first {values[0]}, last {values[-1]}, {lowest}"
    assert row not in (0, 4)
    assert table["alpha"] == f"{float(trace.alpha):.6g}"
    assert table["trusted"] == "2 of 5"
    assert table["reasons"] == f"steps 1, 3 to 4: {REASONS['not_stated']}"
    assert table["cost"] == "15 gradient-equivalents"
    m = np.asarray(trace.metrics["m"])[[0, 3, 4]]
    lowest, highest = [0, 3, 4][m.argmin()], [0, 3, 4][m.argmax()]
    expected = (
        f"m: {m[-1]:.6g} at step 4, lowest {m.min():.6g} at {lowest}, "
        f"highest {m.max():.6g} at {highest}"
    )
    assert table["metrics"] == expected
    assert "OuterState" not in str(trace)


def test_a_failed_run_prints_the_steps_that_were_made():
    estimator = ExactEstimator()
    trace = run_loop(TO_ONE, estimator, optax.sgd(1e200), 0.0, 3.0, num_steps=9)
    table = read_text(trace)
    assert table["status"].startswith("stopped: ")
    assert "hg.diagnose" in table["status"]
    num_made = int((trace.stats["gradient_equivalents"] > 0).sum())
    assert 1 <= num_made < 9
    assert table["steps"] == f"{num_made} of 9"
    assert table["trusted"] == f"0 of {num_made}"
    lowest = "lowest 4 at step 0"
    assert table["value"] == f"first 4, last 4 at step 0, then not finite, {lowest}"
    assert trace.last_row == num_made - 1


@pytest.mark.parametrize("curvature", [1.0, -1.0], ids=["convex", "concave"])
def test_an_adjoint_that_diverges_is_named(curvature):
    """With a negative curvature each step moves the adjoint away from its equation."""
    problem = hg.Bilevel(
        lambda w, a, b: 0.5 * curvature * jnp.sum((w - a) ** 2),
        lambda w, a, b: jnp.sum((w - 1.0) ** 2),
    )
    soba = hg.SOBA(optax.sgd(0.0), optax.sgd(0.1))
    trace = hg.minimize(problem, soba, optax.sgd(0.0), 0.0, 3.0, num_steps=50)
    text = read_text(trace)["adjoint_residual"]
    assert ("far from its equation" in text) == (curvature < 0)
    last = np.median(trace.stats["adjoint_residual"][-10:])
    assert text.startswith(f"{last:.2g} ")
    assert (last > 10) == (curvature < 0)


@pytest.mark.parametrize("error", [0.5, 1e6], ids=["small", "wild"])
def test_a_wild_estimate_is_named(error):
    """The estimate of the row before the last has the error."""
    trace = run()
    errors = np.full(5, 0.1)
    errors[3] = error
    stats = trace.stats | {"error_estimate": jnp.asarray(errors)}
    table = read_text(dataclasses.replace(trace, stats=stats))
    expected = "largest 1e+06 at step 3, above 10 at 1 step" if error > 10 else None
    assert table.get("error_estimate") == expected


def test_the_rows_of_a_search_are_trials():
    trace = hg.search(
        TO_ONE, hg.Newton(), hg.searchers.Random(), 0.0,
        space=hg.spaces.Interval(0.0, 2.0), budget=20,
    )  # fmt: skip
    table = read_text(trace)
    assert trace.row_kind == "trial"
    assert int(table["trials"]) == len(trace.value) > 1
    assert table["finite"] == f"{table['trials']} of {table['trials']}"
    assert "trusted" not in table
    assert "steps" not in table
    assert re.search(r"lowest \S+ at trial \d+$", table["value"])


@pytest.mark.parametrize("best", [1234567, -(2**31) + 1])
def test_an_integer_is_printed_with_all_its_digits(best):
    """With six of them it would be another one, which the space may not contain."""
    problem = hg.Bilevel(TO_ONE.inner_loss, lambda w, a, b: (w - best) ** 2)
    trace = hg.search(
        problem, hg.Newton(), hg.searchers.Grid(1), 0.0,
        space=hg.spaces.Choice([best, best + 1]), budget=30,
    )  # fmt: skip
    assert read_text(trace)["alpha"] == str(best)


def test_a_continued_and_sparse_run_prints_the_numbers_of_its_steps():
    estimator = ExactEstimator()
    loop = hg.OuterLoop(TO_ONE, estimator, optax.sgd(0.1))
    earlier = loop.run(loop.init(0.0, 3.0), num_steps=3)
    trace = loop.run(earlier.state, num_steps=20, record_every=2)
    table = read_text(trace)
    assert table["steps"] == "20, one row per 2, after 3 of an earlier run"
    assert table["value"].endswith("at step 22")
    assert table["reasons"] == f"steps 4 to 22: {REASONS['unchecked']}"


def test_several_outer_losses_print_a_list():
    """No value is the lowest of several losses."""
    outer = (lambda w, a, b: w**2, lambda w, a, b: (w - 1.0) ** 2)
    problem = hg.Bilevel(TO_ONE.inner_loss, outer)
    estimate = hg.hypergradient(problem, hg.Implicit(hg.Newton()))(0.0, 3.0)
    assert read_text(estimate)["value"] == "[9, 4]"
    assert read_text(estimate)["hypergradient"] == "[6, 4]"
    trace = run_loop(
        problem, hg.Implicit(hg.Newton()), optax.sgd(0.0), 0.0, 3.0, num_steps=2,
        aggregator=hg.objectives.WeightedSum(jnp.array([0.5, 0.5])),
    )  # fmt: skip
    assert read_text(trace)["value"] == "first [9, 4], last [9, 4]"


def test_a_certificate_prints_the_conditions_that_failed():
    table = read_text(certify(3.0, 3.0))
    assert table["trusted"] == "True"
    assert "reasons" not in table
    certificate = hg.certify(TO_ONE, 1.0, 1.5, 3.0)
    table = read_text(certificate)
    assert table["trusted"] == "False"
    assert table["reasons"] == " ".join(certificate.reasons)
    assert certificate.reasons[0].startswith("error_estimate exceeds rtol")
    assert table["error_estimate"] == "2"
    assert table["corrected_hypergradient"] == "1"
    assert table["cost"].startswith(
        f"{float(certificate.stats['gradient_equivalents']):g} gradient-equivalents: "
    )


def test_a_certificate_is_trusted_if_no_flag_is_set():
    """Negative curvature and a lost derivative are reasons of their own."""
    saddle = hg.Bilevel(
        lambda w, a, b: w[0] ** 2 - w[1] ** 2 + a * jnp.sum(w), lambda w, a, b: w @ w
    )
    lost = hg.Bilevel(
        lambda w, a, b: (w - a) ** 2 + 0.0 * jnp.sign(w), lambda w, a, b: w**2
    )
    points = {"saddle": (saddle, jnp.ones(2)), "lost": (lost, 1.0)}
    results = {
        name: hg.certify(problem, w, 1.0) for name, (problem, w) in points.items()
    }
    assert results["saddle"].flags["negative_curvature"]
    assert any("negative curvature" in x for x in results["saddle"].reasons)
    assert [name for name, x in results["lost"].flags.items() if x] == [
        "lost_derivative"
    ]
    assert not any(x.trusted for x in results.values())


@pytest.mark.parametrize("name", RESULT_FNS)
def test_a_notebook_shows_the_same_table(name):
    result = RESULT_FNS[name]()
    text = {name: "".join(x.split()) for name, x in read_text(result).items()}
    markup = {name: "".join(x.split()) for name, x in read_html(result).items()}
    assert text == markup


def test_markup_in_names_is_escaped():
    trace = run(metrics={"<img src=x>": lambda w, alpha, key: alpha})
    assert "<img" not in trace._repr_html_()
    assert "&lt;img src=x&gt;" in trace._repr_html_()
    assert "<img src=x>: " in read_html(trace)["metrics"]


@pytest.mark.parametrize("name", RESULT_FNS)
def test_a_traced_or_batched_result_prints_its_shapes(name):
    """Inside jit and vmap, as a batch, and as shapes; runs as a batch of batches."""
    fn = RESULT_FNS[name]
    alphas = jnp.array([1.0, 2.0, 3.0])
    texts = []
    with_text = lambda alpha: (texts.append(repr(x := fn(alpha=alpha))), x)[1]
    batch = jax.vmap(with_text)(alphas)
    if name == "trace":
        batch = jax.tree.map(lambda x: x[None], batch)  # a batch of batches
    results = [
        batch,
        jax.eval_shape(fn, alpha=alphas[0]),
        jax.jit(with_text)(alphas[0]) and jax.eval_shape(jax.vmap(fn), alphas),
    ]
    texts += map(repr, results)
    title = type(fn()).__name__
    for text in texts:
        assert text.startswith(f"{title}(")
        assert "value" in text or "trusted" in text
    assert [result._repr_html_() for result in results] == [None] * 3


@pytest.mark.parametrize("name", [*RESULT_FNS, "estimate without flags"])
def test_a_concrete_result_prints_its_table_inside_jit(name):
    if name in RESULT_FNS:
        result = RESULT_FNS[name]()
    else:
        stats = {"trusted": jnp.asarray(False)}
        result = hg.Estimate(jnp.asarray(1.0), jnp.ones(2), jnp.ones(2), stats)
    texts = []
    jax.jit(lambda x: (texts.append(repr(result)), x)[1])(1.0)
    jax.vmap(lambda x: (texts.append(repr(result)), x)[1])(jnp.ones(2))
    assert texts == [repr(result)] * 2


@pytest.mark.parametrize("name", RESULT_FNS)
def test_a_donated_result_still_prints(name):
    result = jax.tree.map(jnp.array, RESULT_FNS[name]())
    assert read_text(result)
    for leaf in jax.tree.leaves(result):
        leaf.delete()
    assert repr(result).startswith(f"{type(result).__name__}(")
    assert result._repr_html_() is None


def test_donated_parts_of_an_estimate_print_their_shapes():
    result = dataclasses.replace(make_result(), key=jax.random.key(0))
    for leaf in (result.w, result.hypergradient, result.key):
        leaf.delete()
    table = read_text(result)
    assert table["value"] == "0.5"
    assert table["w"] == f"{result.w.dtype}[3,2]"
    assert table["hypergradient"] == f"{result.w.dtype}[2]"


@pytest.mark.parametrize("value", [None, "text", object(), jnp.bfloat16(1.5), 1, True])
def test_an_estimate_of_a_third_party_prints(value):
    """Estimates may lack statistics, and hold what arrays are made from."""
    texts = [
        repr(hg.Estimate(value, value, value)),
        repr(hg.Estimate(1.0, value, value)),
        repr(hg.Estimate(1.0, 1.0, 1.0, {"a": value}, {"b": value})),
    ]
    assert all(text.startswith("Estimate") for text in texts)


def test_an_estimate_without_checks_says_so():
    table = read_text(hg.Estimate(2.0, 1.0, 0.0))
    assert table["value"] == "2"
    assert table["trusted"] == "False"
    assert table["reasons"] == REASONS["unchecked"]


def test_the_fields_of_an_empty_trace_print():
    trace = run()
    empty = jax.tree.map(lambda x: x[:0] if jnp.ndim(x) else x, trace)
    assert read_text(empty)["steps"] == "0"
    assert read_text(empty)["value"] == "none is finite"


def test_an_unknown_cost_is_not_zero():
    """An estimator of another author may count nothing."""
    uncounted = Stateless(
        lambda w, alpha, key: hg.Estimate((alpha - 1.0) ** 2, 2 * (alpha - 1.0), alpha)
    )
    trace = hg.minimize(TO_ONE, uncounted, optax.sgd(0.1), 0.0, 3.0, num_steps=3)
    assert "gradient-equivalents" not in read_text(trace).get("cost", "")


def test_a_certificate_of_a_hypergradient_that_is_not_finite_has_one_reason():
    certificate = hg.certify(TO_ONE, 1.5, 1.5, jnp.nan)
    assert [name for name, failed in certificate.flags.items() if failed] == [
        "not_finite"
    ]
