"""Plants errors in the library, one at a time, and runs the tests that must find them.

    python -m tests.planted_errors                  # all of them
    python -m tests.planted_errors --only 'CG*'     # those whose name matches

Each error replaces one line of a copy of the repository. An error is found if the tests
named beside it fail. The command exits with 1 if an error survives. Only the tests of
`make test` run.
"""

import argparse
import dataclasses
import fnmatch
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("hypergrad", "tests", "benchmarks", "pyproject.toml", "docs", "README.md")
TIMEOUT = 900  # seconds; a test that hangs has found its error

#: pytest's exit status if a test failed.
TESTS_FAILED = 1


@dataclasses.dataclass(frozen=True)
class PlantedError:
    """One wrong line.

    Attributes:
      name: What is wrong.
      path: File below ``hypergrad/``.
      old, new: The right text, which occurs once in the file, and the wrong one.
      tests: Files or folders below ``tests/``, one of whose fast tests must find it.
      guard: The test below ``tests/`` that is run in place of them, because none of
        them finds it within a second. It is never marked as heavy. Defaults to none.
    """

    name: str
    path: str
    old: str
    new: str
    tests: str
    guard: str = ""


IMPLICIT = "estimators/test_implicit.py"
CONTRACT = "estimators/test_contract.py"
UPDATES = "estimators/single_loop/test_single_loop_updates.py"
ZERO_ORDER = "estimators/test_zero_order.py"

ERRORS = (
    PlantedError(
        "equal optimizers: numbers in closures are not compared",
        "runtime/equal_optimizers.py",
        "    return cells, function.__defaults__, keyword_defaults, attributes",
        "    return (), function.__defaults__, keyword_defaults, attributes",
        "core/test_equal_optimizers.py",
    ),
    # Second derivatives and implicit differentiation.
    PlantedError(
        "implicit: the indirect term has the wrong sign",
        "implicit/differentiation.py",
        "hypergradient=optax.tree.sub(direct, cross)",
        "hypergradient=optax.tree.add(direct, cross)",
        IMPLICIT,
        guard="estimators/test_implicit.py::test_one_eigenvalue_needs_one_product[1]",
    ),
    PlantedError(
        "implicit: damping is dropped",
        "implicit/differentiation.py",
        "return lambda v: add_scale(matvec(v), damping, v)",
        "return matvec",
        IMPLICIT,
        guard="estimators/test_implicit.py::test_damping_is_added_to_the_hessian",
    ),
    PlantedError(
        "implicit: the product of the cross term is not counted",
        "implicit/differentiation.py",
        'linear_stats["num_products"] += 1',
        'linear_stats["num_products"] += 0',
        IMPLICIT,
        guard="estimators/test_implicit.py::test_cost_of_an_estimate[full]",
    ),
    PlantedError(
        "implicit: negative curvature is not flagged",
        "estimators/implicit_solve.py",
        'is_negative = solution.linear_stats["negative_curvature"]',
        "is_negative = jnp.asarray(False)",
        IMPLICIT,
        guard="estimators/test_implicit.py::"
        "test_saddle_is_not_trusted[LU-target0-False]",
    ),
    PlantedError(
        "implicit: the error estimate leaves out the residual of the adjoint",
        "implicit/error.py",
        "scaling.divide(y), new_residual, unit",
        "scaling.divide(y), optax.tree.zeros_like(new_residual), unit",
        "testing/test_trust.py",
        guard="testing/test_trust.py::"
        "test_a_large_parameter_without_influence_hides_nothing",
    ),
    PlantedError(
        "implicit: any negative curvature vanishes near the argmin",
        "implicit/minimum.py",
        "(remaining > MAX_REMAINING_CURVATURE * curvature)",
        "(remaining > 4 * curvature)",
        "implicit/test_degenerate_minima.py",
        guard="implicit/test_degenerate_minima.py::test_a_saddle_is_not_trusted[1e-06-1]",
    ),
    PlantedError(
        "implicit: the duals have no part along the rest of dL/dw",
        "implicit/error.py",
        "duals=row(slice(1, 1 + NUM_DIRECTIONS), solutions)",
        "duals=row(slice(1, 1 + NUM_DIRECTIONS), solution.target_solutions)",
        "implicit/test_hidden_errors.py",
        guard="implicit/test_hidden_errors.py::"
        "test_an_error_in_a_direction_that_dM_dw_does_not_contain_is_seen[1.0]",
    ),
    PlantedError(
        "implicit: the error along two directions is taken for its bound",
        "implicit/error.py",
        "correction_bound=_correction_factor(alpha) * correction",
        "correction_bound=correction",
        "implicit/test_error.py",
    ),
    PlantedError(
        "implicit: an ill-conditioned Hessian is not flagged",
        "implicit/error.py",
        '"ill_conditioned": self.ill_conditioned',
        '"ill_conditioned": jnp.asarray(False)',
        "implicit/test_hidden_errors.py",
        guard="implicit/test_hidden_errors.py::"
        "test_features_far_from_zero_in_float32_are_not_trusted[1000.0]",
    ),
    PlantedError(
        "implicit: a step that the Hessian does not predict counts as one",
        "implicit/error.py",
        "jnp.where(is_wrong, jnp.inf, errors.relative_change)",
        "errors.relative_change",
        "implicit/test_hidden_errors.py",
        guard="implicit/test_hidden_errors.py::"
        "test_a_point_that_oscillates_around_a_kink_is_not_trusted[float64-alone]",
    ),
    PlantedError(
        "scaled CG: no further changes follow the last one",
        "linear/scaled_cg.py",
        "num_changes = jnp.maximum(num_pairs, 1.0)",
        "num_changes = 1.0 + 0.0 * num_pairs",
        "implicit/test_hidden_errors.py",
        guard="implicit/test_hidden_errors.py::"
        "test_an_adjoint_that_still_grows_is_seen[float64-limit]",
    ),
    PlantedError(
        "implicit: a Newton step may leave all of the gradient",
        "implicit/confirmation.py",
        "MAX_REMAINING_PART = 0.2",
        "MAX_REMAINING_PART = 1.0",
        "implicit/test_hidden_errors.py",
        guard="implicit/test_hidden_errors.py::"
        "test_a_newton_step_that_converges_linearly_is_not_trusted[4-1.029]",
    ),
    PlantedError(
        "implicit: only the digits of alpha decide whether parts cancel",
        "implicit/minimum.py",
        "(4 * machine_eps(h, adjoint))",
        "(4 * machine_eps(h))",
        "estimators/test_mixed_dtypes.py",
        guard="estimators/test_mixed_dtypes.py::"
        "test_parts_that_cancel_in_the_digits_of_w_are_not_trusted",
    ),
    PlantedError(
        "certificate: Newton steps may increase the gradient",
        "certificate.py",
        '"larger_gradient": checks.is_far',
        '"larger_gradient": jnp.asarray(False)',
        "implicit/test_hidden_errors.py",
        guard="implicit/test_hidden_errors.py::"
        "test_a_point_that_oscillates_around_a_kink_is_not_trusted[float64-alone]",
    ),
    PlantedError(
        "certificate: Newton steps that converge linearly count as converged",
        "certificate.py",
        "else LAST_CHANGE_RATIO * rtol",
        "else rtol",
        "implicit/test_newton_correction.py",
        guard="implicit/test_newton_correction.py::"
        "test_linear_convergence_of_newton_steps_is_not_trusted[slow alone]",
    ),
    PlantedError(
        "scaled CG: projections on the Krylov space lose their sign",
        "linear/scaled_cg.py",
        "add_scale(y, coefficient, p)",
        "add_scale(y, -coefficient, p)",
        "solvers/test_scaled_cg.py",
        guard="solvers/test_scaled_cg.py::"
        "test_solutions_and_projections_equal_dense_ones[0]",
    ),
    PlantedError(
        "scaling: a probe removes a quarter of the exponents of units",
        "linear/equilibration.py",
        "return log_s - 0.5 * jnp.log",
        "return log_s - 0.25 * jnp.log",
        "solvers/test_scaled_cg.py",
    ),
    PlantedError(
        "implicit: the adjoint of the previous estimate is kept for ever",
        "estimators/implicit.py",
        "result.adjoint if self.warm_start else state.adjoint",
        "state.adjoint",
        f"{IMPLICIT} estimators/test_identities.py",
        guard="estimators/test_implicit.py::"
        "test_a_warm_started_adjoint_costs_fewer_products",
    ),
    PlantedError(
        "implicit: the tolerance of the next estimate is used",
        "estimators/implicit.py",
        "jnp.minimum(state.num_estimates, rtol.size - 1)",
        "jnp.minimum(state.num_estimates + 1, rtol.size - 1)",
        "estimators/test_adaptive.py",
        guard="estimators/test_adaptive.py::"
        "test_each_estimate_has_the_tolerance_of_its_number",
    ),
    PlantedError(
        "estimate: the adjoint sees another sample than the solver",
        "problem.py",
        "inner_data = with_full_batch_key(inner_data, inner_key)",
        "pass",
        f"{IMPLICIT} {CONTRACT} core/test_batches.py",
        guard="core/test_batches.py::"
        "test_w_is_solved_on_the_sample_of_the_adjoint[data-unrolled formula]",
    ),
    PlantedError(
        "fixed point: the tail of the geometric series is left out",
        "estimators/error_estimates.py",
        "path * R / (1 - R)",
        "0 * path * R / (1 - R)",
        "estimators/test_fixed_point.py",
    ),
    PlantedError(
        "standard error: n in place of n - 1",
        "estimators/error_estimates.py",
        "(num_samples * (num_samples - 1)) ** 0.5",
        "(num_samples * num_samples) ** 0.5",
        "estimators/test_average.py",
    ),
    PlantedError(
        "printing: numbers of donated arrays are read",
        "trees.py",
        "return is_local and not leaf.is_deleted()",
        "return is_local",
        "display/test_display.py",
    ),
    PlantedError(
        "plots: trusted steps are marked",
        "plots.py",
        'is_untrusted = np.asarray(trace.stats["trusted"])[: len(x)] != 1',
        'is_untrusted = np.asarray(trace.stats["trusted"])[: len(x)] == 1',
        "display/test_plots.py",
        guard="display/test_plots.py::test_untrusted_steps_are_marked",
    ),
    PlantedError(
        "progress: the slower one of steps and budget counts",
        "outer_loop/run.py",
        "fraction = max(",
        "fraction = min(",
        "core/test_progress.py",
    ),
    PlantedError(
        "certificate: the last change is not checked",
        "certificate.py",
        '"last_change": is_finite & ~has_converged',
        '"last_change": jnp.zeros_like(is_negative)',
        "core/test_certificate.py",
        guard="core/test_certificate.py::"
        "test_a_certificate_that_has_not_converged_is_not_trusted",
    ),
    PlantedError(
        "certificate: Newton steps start at the same gradient",
        "implicit/newton_correction.py",
        "        inner_grad = result.inner_grad\n    assert",
        "    assert",
        "core/test_certificate.py",
        guard="core/test_certificate.py::"
        "test_fields_equal_their_formulas_on_a_quadratic",
    ),
    PlantedError(
        "argmin: the derivative has the wrong sign",
        "argmin.py",
        "return w, scale(-1, unravel(x))",
        "return w, unravel(x)",
        "core/test_argmin.py",
    ),
    PlantedError(
        "lost derivatives: an integer loses nothing",
        "jaxprs/lost_derivatives.py",
        "lost = {LostDerivative(leaf, name, location) for leaf in dependence.leaves}",
        "lost = set()",
        "jaxprs/test_lost_derivatives.py",
    ),
    # Linear solvers.
    PlantedError(
        "CG: the ratio is inverted",
        "linear/cg.py",
        "ratio = new_rz / rz",
        "ratio = rz / new_rz",
        "solvers/test_cg.py",
    ),
    PlantedError(
        "Neumann: one term too many",
        "linear/neumann.py",
        "add_term, (vector, vector), length=self.num_terms - 1",
        "add_term, (vector, vector), length=self.num_terms",
        "solvers/test_linear.py",
    ),
    PlantedError(
        "Nystrom: the complement of the sketch is dropped",
        "linear/nystrom.py",
        "v = v + (b - u @ c) / damping",
        "v = v + 0 * (b - u @ c) / damping",
        "solvers/test_nystrom.py solvers/test_linear.py",
    ),
    # Inner solvers.
    PlantedError(
        "schedule: windows end one step late",
        "inner/descent.py",
        "window = jnp.minimum(count, num_steps) * num_windows // num_steps",
        "window = (jnp.minimum(count, num_steps) - 1) * num_windows // num_steps",
        "solvers",
    ),
    PlantedError(
        "L-BFGS: the first gradient is not counted",
        "inner/lbfgs.py",
        "num_grads + grad_tol.num_grads + 1",
        "num_grads + grad_tol.num_grads",
        "solvers/test_minimizers.py solvers/test_inner.py",
    ),
    # Derivatives of runs.
    PlantedError(
        "unrolled: one step too few is differentiated",
        "inner/descent.py",
        "num_done = num_steps - truncation_length",
        "num_done = num_steps - truncation_length + 1",
        "estimators/test_unrolled.py estimators/test_identities.py",
        guard="estimators/test_identities.py::"
        "test_truncation_equals_the_neumann_series",
    ),
    PlantedError(
        "unrolled: a truncated estimate is trusted",
        "estimators/unrolled.py",
        'flags = {"truncated": True, **lost}',
        'flags = {"truncated": False, **lost}',
        f"estimators/test_unrolled.py {CONTRACT}",
        guard="estimators/test_unrolled.py::test_only_the_full_derivative_is_trusted",
    ),
    PlantedError(
        "reversible: the adjoint of the rate has the wrong sign",
        "estimators/reversible_steps.py",
        "rate_bar = -vdot(carry.w_bar, self.to_floats(carry.v))",
        "rate_bar = vdot(carry.w_bar, self.to_floats(carry.v))",
        "estimators/test_reversible.py",
        guard="estimators/test_reversible.py::"
        "test_rates_momenta_and_initial_points_are_differentiated",
    ),
    PlantedError(
        "fixed point: one term too few",
        "estimators/fixed_point.py",
        "iterate, init_carry, length=self.num_terms",
        "iterate, init_carry, length=self.num_terms - 1",
        "estimators/test_fixed_point.py",
        guard="estimators/test_fixed_point.py::"
        "test_k_terms_are_the_last_k_steps[1-None]",
    ),
    PlantedError(
        "fixed point: an oscillation around a kink is not seen",
        "estimators/fixed_point.py",
        "jnp.moveaxis(changes, 0, -1), jnp.any(leaves_model)",
        "jnp.moveaxis(changes, 0, -1), jnp.asarray(False)",
        "estimators/test_hidden_run_errors.py",
    ),
    PlantedError(
        "unrolled: parts that cancel are not seen",
        "estimators/unrolled.py",
        "jnp.any(is_amplified | is_lost)",
        "jnp.any(is_amplified)",
        "estimators/test_hidden_run_errors.py",
    ),
    PlantedError(
        "rounding: short floats lose their steps in random directions",
        "estimators/rounding.py",
        "    if is_coarse(w):",
        "    if False:",
        "estimators/test_hidden_run_errors.py",
    ),
    PlantedError(
        "average: few samples are trusted by chance",
        "estimators/error_estimates.py",
        "return MAX_ERROR_OF_FEW",
        "return TRUST_RTOL",
        "estimators/test_hidden_run_errors.py",
    ),
    PlantedError(
        "outer loop: a state of another space is continued",
        "outer_loop/checks.py",
        "    if not is_same:",
        "    if False:",
        "outer_loop/test_outer_loop.py",
    ),
    PlantedError(
        "finite difference: a factor of two is missing",
        "estimators/finite_difference.py",
        "(x - y) / (2 * e)",
        "(x - y) / e",
        ZERO_ORDER,
    ),
    PlantedError(
        "evolution: sigma in place of its square",
        "estimators/evolution.py",
        "weights = differences / (2 * sigma**2)",
        "weights = differences / (2 * sigma)",
        ZERO_ORDER,
    ),
    PlantedError(
        "penalty: the two nudges have the same sign",
        "estimators/penalty.py",
        "minus = solve(state.minus_w, -1.0)",
        "minus = solve(state.minus_w, 1.0)",
        ZERO_ORDER,
        guard="estimators/test_zero_order.py::"
        "test_warm_started_penalties_of_several_losses_converge",
    ),
    # Single-loop methods.
    PlantedError(
        "SOBA: the step of v has the wrong sign",
        "estimators/single_loop/soba.py",
        "v_direction = optax.tree.sub(inner.Hv, outer.b)",
        "v_direction = optax.tree.sub(outer.b, inner.Hv)",
        UPDATES,
        guard="estimators/single_loop/test_single_loop_updates.py::"
        "test_run_on_all_data_follows_the_update[SOBA]",
    ),
    PlantedError(
        "SAGA: rows of the last step are never written",
        "estimators/single_loop/variance_reduction.py",
        "rows = table.updated_rows()\n    # The batch",
        "rows = table.rows\n    # The batch",
        f"{UPDATES} estimators/single_loop/test_saba.py",
        guard="estimators/single_loop/test_saba.py::"
        "test_blocks_of_one_example_are_batches_of_one_example",
    ),
    PlantedError(
        "STORM: the old direction is added",
        "estimators/single_loop/variance_reduction.py",
        "return add_scale(new, momentum, optax.tree.sub(previous, old))",
        "return add_scale(new, momentum, optax.tree.add(previous, old))",
        UPDATES,
        guard="estimators/single_loop/test_single_loop_updates.py::"
        "test_mean_over_all_batches_is_the_mean_of_the_update[MRBO]",
    ),
    PlantedError(
        "F2SA: the arguments of the difference are swapped",
        "estimators/single_loop/f2sa.py",
        "indirect = scale(penalty, optax.tree.sub(y_cross, z_cross))",
        "indirect = scale(penalty, optax.tree.sub(z_cross, y_cross))",
        UPDATES,
        guard="estimators/single_loop/test_single_loop_updates.py::"
        "test_run_on_all_data_follows_the_update[F2SA, two steps]",
    ),
    PlantedError(
        "AmIGO: the adjoint sees w before the inner steps",
        "estimators/single_loop/amigo.py",
        "state, inner_grad = run_w_steps(",
        "_, inner_grad = run_w_steps(",
        UPDATES,
        guard="estimators/single_loop/test_single_loop_updates.py::"
        "test_run_on_all_data_follows_the_update[AmIGO]",
    ),
    # The outer loop.
    PlantedError(
        "outer loop: the best alpha is the worst one",
        "outer_loop/step.py",
        "direction.score < state.best_value",
        "direction.score > state.best_value",
        "outer_loop/test_minimize.py outer_loop/test_outer_loop.py",
        guard="outer_loop/test_minimize.py::test_best_alpha_has_the_lowest_value",
    ),
    PlantedError(
        "outer loop: every step has the same key",
        "outer_loop/step.py",
        "        key=key,\n    )\n    return next_state, record",
        "        key=state.key,\n    )\n    return next_state, record",
        "outer_loop/test_minimize.py outer_loop/test_outer_loop.py",
    ),
    PlantedError(
        "passes: all passes have the same order",
        "passes.py",
        "hash_bits(self.seed[1] + pass_number)",
        "self.seed[1]",
        "core/test_passes.py",
    ),
    PlantedError(
        "passes: every outer step sees the same batches",
        "outer_loop/step.py",
        "at_outer_step(problem, state.pass_seed, state.step)",
        "at_outer_step(problem, state.pass_seed, 0 * state.step)",
        "core/test_passes.py",
    ),
    PlantedError(
        "outer loop: the cost of a step is not spent",
        "outer_loop/block.py",
        'budget = budget.spend(record.stats["gradient_equivalents"])',
        "budget = budget.spend(jnp.zeros(()))",
        "outer_loop/test_outer_loop.py",
    ),
    PlantedError(
        "outer loop: a skipped step moves the optimizer",
        "outer_loop/step.py",
        "(state.u, state.optimizer_state, state.aggregator_state)",
        "(state.u, optimizer_state, state.aggregator_state)",
        "outer_loop/test_untrusted.py outer_loop/test_outer_loop.py",
        guard="outer_loop/test_untrusted.py::test_a_run_equals_a_loop_by_hand[skip]",
    ),
    PlantedError(
        "outer loop: a row has the costs of its last step alone",
        "outer_loop/block.py",
        "record.stats[name] + cost for",
        "record.stats[name] for",
        "outer_loop/test_record_every.py",
        guard="outer_loop/test_record_every.py::"
        "test_a_budget_ends_a_run_after_a_whole_row[25.0-3]",
    ),
    # Costs.
    PlantedError(
        "cost: a product counts once",
        "cost/counts.py",
        "HVP_COST = 2.0",
        "HVP_COST = 1.0",
        "cost/test_cost.py",
    ),
    # Spaces.
    PlantedError(
        "interval: to_unit forgets the logarithm",
        "spaces/continuous.py",
        "(jnp.log(alpha / low) if self.log else alpha - low) / width",
        "(alpha - low) / width",
        "spaces/test_unit_cube.py",
        guard="spaces/test_unit_cube.py::test_to_unit_undoes_from_unit[float32]",
    ),
    PlantedError(
        "box: projection ignores the upper bound",
        "spaces/continuous.py",
        "return jnp.clip(as_float(u), *_fit_bounds(self, as_float(u)))",
        "return jnp.maximum(as_float(u), _fit_bounds(self, as_float(u))[0])",
        "spaces/test_continuous.py",
    ),
    # Several objectives.
    PlantedError(
        "augmented Lagrangian: multipliers are never updated",
        "objectives/constraints.py",
        "state = jnp.where(should_update, updated, multipliers), step + 1",
        "state = multipliers, step + 1",
        "objectives",
    ),
    # Surrogates.
    PlantedError(
        "F score: the temperature is not used",
        "surrogates/f_score.py",
        "predicted = sigmoid_at(shifted_scores, temperature)",
        "predicted = sigmoid_at(shifted_scores, 1.0)",
        "surrogates/test_surrogates.py surrogates/test_classification_surrogates.py",
    ),
    PlantedError(
        "FastAP: the item itself counts partly",
        "surrogates/average_precision.py",
        "self_weight = weight * right_fraction * (1 - right_fraction)",
        "self_weight = 0 * weight",
        "surrogates/test_ranking_surrogates.py surrogates/test_surrogates.py",
        guard="surrogates/test_ranking_surrogates.py::"
        "test_fast_ap_is_exact_if_scores_are_two_bins_apart",
    ),
    # Searches.
    PlantedError(
        "population: the worst members go on",
        "searchers/populations.py",
        "return jnp.argsort(jnp.where(jnp.isfinite(value), value, jnp.inf))",
        "return jnp.argsort(-jnp.where(jnp.isfinite(value), value, -jnp.inf))",
        "search/test_populations.py",
        guard="search/test_populations.py::"
        "test_failed_member_is_flagged_and_never_the_best[pbt--inf]",
    ),
    PlantedError(
        "evolution strategy: values are told in reverse",
        "searchers/evolution.py",
        "values = np.append(self.values, value)",
        "values = np.append(value, self.values)",
        "search/test_searchers.py search/test_searcher_libraries.py",
        guard="search/test_searcher_libraries.py::"
        "test_evolution_learns_from_trials_that_it_did_not_propose",
    ),
    PlantedError(
        "trial: the outer batch has the key of the solver",
        "trials/trial.py",
        "data, keys = (inner_data, outer_data), (outer_key, metric_key)",
        "data, keys = (inner_data, outer_data), (solver_key, metric_key)",
        "search/test_search.py",
    ),
)


def occurrences(error: PlantedError, root: Path = ROOT) -> int:
    """Returns how often the right text occurs in its file."""
    return (root / "hypergrad" / error.path).read_text().count(error.old)


def is_found(error: PlantedError, root: Path) -> bool:
    """Plants an error in the copy at ``root``, runs its tests, and undoes it."""
    path = root / "hypergrad" / error.path
    right = path.read_text()
    path.write_text(right.replace(error.old, error.new))
    options = ["-x", "-q", "-m", "not slow and not heavy", "-p", "no:cacheprovider"]
    names = [error.guard] if error.guard else error.tests.split()
    tests = [f"tests/{name}" for name in names]
    try:
        status = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=root,
            env=os.environ | {"PYTHONPATH": str(root)},
            stdout=subprocess.DEVNULL,
            timeout=TIMEOUT,
            check=False,
        ).returncode
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_text(right)
    if status not in (0, TESTS_FAILED):
        raise RuntimeError(f"{error.name}: pytest ended with status {status}")
    return status == TESTS_FAILED


def main() -> int:
    """Plants all errors and returns 1 if one is not found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", help="pattern of the names")
    errors = [
        error
        for error in ERRORS
        if fnmatch.fnmatch(error.name, parser.parse_args().only)
    ]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in COPIED:
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, root / name)
        for index, error in enumerate(errors, 1):
            start = time.monotonic()
            found = is_found(error, root)
            survivors += [] if found else [error.name]
            print(
                f"[{index}/{len(errors)}] {time.monotonic() - start:5.0f} s  "
                f"{'found   ' if found else 'SURVIVED'}  {error.name}",
                flush=True,
            )
    print(f"{len(errors) - len(survivors)} of {len(errors)} errors found")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
