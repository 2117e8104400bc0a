"""The table `bilevel_curves`: its problem, its runs, and what it judges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from benchmarks import bilevel_curves
from benchmarks.shared import bilevel_quadratics
from benchmarks.shared.benchmark_bilevel import checkout
from benchmarks.shared.bilevel_quadratics import (
    SETTINGS,
    Settings,
    independent_sampler,
    make_problem,
    our_alphas,
    peer_alphas,
    sample_quadratics,
    value_function,
)
from benchmarks.shared.step_problems import quadratic_loss
from hypergrad.runtime.compat import enable_x64


def test_value_function_is_that_of_the_exact_solution():
    rng = np.random.default_rng(0)
    data = sample_quadratics(rng, 300), sample_quadratics(rng, 200)
    h = value_function(*data)
    with enable_x64(True):
        inner, outer = ({k: jnp.asarray(x) for k, x in part.items()} for part in data)
        loss = quadratic_loss
        estimator = hg.Implicit(hg.Newton(), hg.CG(rtol=1e-10))
        gradient = hg.hypergradient(hg.Bilevel(loss, loss, inner, outer), estimator)
        alpha = jnp.asarray(rng.normal(size=10))
        at_alpha, at_zero = (gradient(jnp.zeros(100), x) for x in (alpha, 0 * alpha))
        expected = h.hessian @ alpha + h.gradient_at_0
        np.testing.assert_allclose(at_alpha.hypergradient, expected, rtol=1e-6)
        change = float(at_alpha.value - at_zero.value)
    assert h.excess(alpha) - h.excess(np.zeros(10)) == pytest.approx(change, rel=1e-6)
    assert h.excess(np.full(10, np.nan)) == np.inf


def test_means_of_the_quadratics_have_the_spectra_of_the_recipe():
    data = sample_quadratics(np.random.default_rng(1), 40_000)
    eigs = np.linalg.eigvalsh(np.mean(data["hess_w"], 0))
    np.testing.assert_allclose(eigs, np.geomspace(0.1, 1, 100), rtol=0.1)
    eigs = np.linalg.eigvalsh(np.mean(data["hess_alpha"], 0))
    expected = [0, *np.geomspace(0.1, 1, 9)]
    np.testing.assert_allclose(eigs, expected, rtol=0.05, atol=1e-5)
    singular_values = np.linalg.svd(np.mean(data["cross"], 0))[1]
    assert singular_values[0] < 0.15
    assert singular_values[-1] > 0.05


@pytest.fixture
def short(monkeypatch):
    """Makes the sample small, and the runs short."""
    monkeypatch.setattr(bilevel_quadratics, "NUM_INNER_SAMPLES", 256)
    monkeypatch.setattr(bilevel_quadratics, "NUM_OUTER_SAMPLES", 128)
    runs = {name: Settings(x.step_size, x.ratio, 64) for name, x in SETTINGS.items()}
    monkeypatch.setattr(bilevel_quadratics, "SETTINGS", runs)
    for cached in (make_problem, bilevel_quadratics._make_loop):
        cached.cache_clear()
    yield
    for cached in (make_problem, bilevel_quadratics._make_loop):
        cached.cache_clear()


@pytest.mark.parametrize("order", ["blocks", "epoch_blocks"])
@pytest.mark.parametrize("method", SETTINGS)
def test_our_runs_approach_the_minimum(short, method, order):
    alphas = our_alphas(method, seed=0, order=order)
    _, h = make_problem()
    assert len(alphas) == 33
    assert h.excess(alphas[-1]) < 0.7 * h.excess(alphas[0])


def test_a_run_that_is_not_finite_is_infinite_from_there_on(short, monkeypatch):
    runs = {"SOBA": Settings(1e6, 1.0, 64)}
    monkeypatch.setattr(bilevel_quadratics, "SETTINGS", runs)
    alphas = our_alphas("SOBA", seed=0)
    _, h = make_problem()
    assert len(alphas) == 33
    assert h.excess(alphas[-1]) == np.inf


def test_independent_blocks_are_uniform():
    sample, state = independent_sampler(64 * 8, 64, jax.random.PRNGKey(0))

    def step(state, _):
        first_row, number, weight, state = sample(state)
        return state, (first_row, number, weight)

    _, (rows, numbers, weights) = jax.lax.scan(step, state, length=8000)
    np.testing.assert_array_equal(rows, 64 * numbers)
    np.testing.assert_allclose(weights, 1 / 8)
    np.testing.assert_allclose(np.bincount(numbers), 1000, rtol=0.15)


def make_rows(factor):
    """Returns rows in which SABA ends ``factor`` times higher than the peer's."""
    return [
        {
            "method": method,
            "program": program,
            "seed": seed,
            "end": (1 + 0.01 * seed)
            * (factor if method == "SABA" and "hypergrad" in program else 1.0),
            "curve": [1.0, 0.5],
        }
        for method in SETTINGS
        for program in bilevel_curves.PROGRAMS
        for seed in range(3)
    ]


@pytest.mark.parametrize(
    ("factor", "outcome"),
    [(1.0, "supported"), (1.6, "not supported"), (0.6, "not supported")],
)
def test_findings_judge_ratios_in_both_directions(factor, outcome):
    assert {x.outcome for x in bilevel_curves.findings(make_rows(factor))} == {outcome}


def test_without_a_checkout_only_our_curves_are_measured(monkeypatch):
    monkeypatch.setattr(bilevel_curves, "checkout", lambda: None)
    cells = bilevel_curves.table.cells("small", 3)
    peers = [cell for cell in cells if "peer" in cell["program"]]
    assert len(peers) == 2 * 3 * len(SETTINGS)
    assert bilevel_curves.measure(peers[0], []) == {}
    rows = [row for row in make_rows(1.0) if "peer" not in row["program"]] + peers
    assert bilevel_curves.findings(rows) == []
    lines = bilevel_curves.body(rows)
    assert len(lines) == 4 + len(SETTINGS)
    assert "peer |" not in lines[2]


def test_lines_have_the_ratios_of_all_pairs():
    lines = bilevel_curves.body(make_rows(1.5))
    (line,) = (line for line in lines if line.startswith("| SABA"))
    assert line.count("1.50 [1.50, 1.50]") == 3


@pytest.mark.skipif(checkout() is None, reason="needs a checkout of benchmark_bilevel")
@pytest.mark.parametrize("independent_blocks", [False, True])
@pytest.mark.parametrize("method", [name for name in SETTINGS if name != "MRBO"])
def test_with_a_single_block_both_programs_make_the_same_steps(
    short, monkeypatch, method, independent_blocks
):
    monkeypatch.setattr(bilevel_quadratics, "NUM_INNER_SAMPLES", 64)
    monkeypatch.setattr(bilevel_quadratics, "NUM_OUTER_SAMPLES", 64)
    bilevel_quadratics._make_solver.cache_clear()
    order = "blocks" if independent_blocks else "epoch_blocks"
    ours = np.array(our_alphas(method, seed=0, order=order))
    peers = peer_alphas(method, seed=0, independent_blocks=independent_blocks)
    bilevel_quadratics._make_solver.cache_clear()
    assert np.max(np.abs(ours - ours[0])) > 0.1
    np.testing.assert_allclose(ours, peers, rtol=1e-4, atol=1e-4)
