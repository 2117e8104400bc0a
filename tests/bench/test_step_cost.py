"""The table `step_cost`: its problems, and the solvers it loads from a checkout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import step_cost
from benchmarks.shared import step_problems

PEER = '''
from benchopt import BaseSolver, safe_import_context
from benchopt.stopping_criterion import SufficientProgressCriterion

with safe_import_context() as import_ctx:
    import jax


class Solver(BaseSolver):
    """Makes the gradient steps of its name, and counts them."""

    stopping_criterion = SufficientProgressCriterion(patience=3)
    parameters = {"step_size": [0.5]}

    def set_objective(self, f_inner, f_outer, n_inner, n_outer, w, alpha):
        self.f, self.w, self.alpha = f_inner, w, alpha
        self.run_once(2)

    def init(self):
        return {"outer_var": self.alpha, "count": 0}

    def one_epoch(self, carry, num_steps):
        grad = jax.grad(self.f, argnums=1)(self.w, carry["outer_var"], 0, 64)
        alpha = carry["outer_var"] - self.step_size * grad
        return {"outer_var": alpha, "count": carry["count"] + num_steps}
'''


@pytest.fixture
def small(monkeypatch):
    """Makes the quadratics small, and their runs short."""
    monkeypatch.setattr(step_problems, "NUM_MATRICES", 128)
    monkeypatch.setattr(step_problems, "DIM", 3)
    monkeypatch.setattr(step_cost, "NUM_STEPS", {"quadratics": 64})
    monkeypatch.setattr(step_cost, "REPEATS", 1)
    step_cost.make_problem.cache_clear()
    step_cost.make_runs.cache_clear()
    yield
    step_cost.make_problem.cache_clear()
    step_cost.make_runs.cache_clear()


def test_a_sliced_loss_is_that_of_the_block(small):
    problem = step_problems.quadratics()
    inner, _ = problem.sliced()
    block = problem.sampled(64).inner_data.take_block(jnp.asarray(1))
    w, alpha = jnp.ones(3), jnp.full(3, 2.0)
    expected = problem.inner_loss(w, alpha, block)
    np.testing.assert_allclose(inner(w, alpha, 64, batch_size=64), expected, rtol=1e-6)


def test_a_solver_of_a_checkout_is_timed_beside_ours(small, tmp_path, monkeypatch):
    (tmp_path / "solvers").mkdir()
    (tmp_path / "solvers/soba.py").write_text(PEER)
    monkeypatch.setenv("BENCHMARK_BILEVEL", str(tmp_path))
    cell = {"problem": "quadratics", "method": "SOBA", "seed": 0}
    row = step_cost.measure(cell, [])
    assert row["hypergrad"] > 0
    assert row["peer"] > 0
    assert row["ratio"] > 0
    problem = step_cost.make_problem("quadratics")
    alpha = step_cost.make_runs("quadratics", "SOBA")["peer"]()
    inner, _ = problem.sliced()
    grad = jax.grad(inner, argnums=1)(problem.w, problem.alpha, 0, 64)
    np.testing.assert_allclose(alpha, problem.alpha - 1e-3 * grad, rtol=1e-6)


@pytest.mark.parametrize("method", step_cost.METHODS)
def test_all_methods_make_their_steps(small, method: str):
    problem = step_cost.make_problem("quadratics")
    alpha = step_cost.our_run(problem, method, 1e-3, 64)()
    assert np.all(np.isfinite(alpha))
    assert np.any(alpha != problem.alpha)


def test_findings_count_fast_methods_and_name_the_slowest():
    def ratios(problem):
        last = 1.1 if problem == "ijcnn1" else 1.3
        return zip(step_cost.METHODS, [0.5] * 6 + [last], strict=True)

    rows = [
        {"problem": problem, "method": method, "seed": 0, "ratio": ratio}
        for problem in step_problems.PROBLEMS
        for method, ratio in ratios(problem)
    ]
    outcomes = [finding.outcome for finding in step_cost.findings(rows)]
    assert outcomes == ["supported", "not supported", "not supported"]
    assert "F2SA" in step_cost.findings(rows)[1].text
    assert step_cost.findings([{"problem": "ijcnn1", "hypergrad": 3.0}]) == []
