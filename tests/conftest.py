"""What holds for every test: float64, no silent rank promotion, fixed keys."""

import os
import zlib
from collections.abc import Iterator
from fnmatch import fnmatch

import jax
import pytest

# The threads for the parts of a program, read when JAX makes its first array. With two,
# as on two cores, two batched decompositions in one program (a solve and eigh, say) may
# take one each, and both wait for the other's to do their own parts, for ever.
os.environ.setdefault("NPROC", "8")
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key(request: pytest.FixtureRequest) -> jax.Array:
    """A random key fixed by the test's name, parameters included."""
    return jax.random.key(zlib.crc32(request.node.name.encode()) % 2**31)


@pytest.fixture(autouse=True, scope="module")
def _free_compiled_programs() -> Iterator[None]:
    """Thousands of live programs exhaust the memory maps of one process."""
    yield
    jax.clear_caches()


# The modules that take most of the time; the fast half of CI leaves them out.
HEAVY = {
    "test_adapters",
    "test_argmin",
    "test_compilation",
    "test_estimators",
    "test_kills",
    "test_testing",
}

# Tests with long programs. `make test` runs of each the cases named here (by pattern),
# those that are most unlike each other, or none; `make full` runs all.
REPRESENTATIVES = {
    "test_accuracy": {
        "test_a_relative_error_costs_less_than_steps_alone": {
            *("logistic_of_hypertorch*",),
        },
        "test_a_warm_chain_of_adam_is_right_where_trusted": set(),
        "test_an_exact_landing_leaves_a_goal_to_go_on_with": set(),
        "test_an_ill_conditioned_adjoint_is_not_overlooked": {"linear_solver0"},
        "test_an_outer_loss_that_reads_no_w_is_trusted": {"True"},
        "test_hoags_schedules_spend_less": set(),
        "test_several_losses_trees_and_solvers_that_run_once": set(),
        "test_the_certificate_is_asked_for_the_same_error": set(),
    },
    "test_adapters": {
        "test_finds_the_minimiser": {"logistic-*"},
        "test_float32_stays_float32": {
            *("jaxopt-gd", "jaxopt-optax-lbfgs", "jaxopt-polyak", "optx-best-so-far"),
            *("optx-gd", "optx-ncg"),
        },
        "test_jit_and_vmap_equal_a_loop": {
            *("jaxopt-gd", "jaxopt-optax-lbfgs", "jaxopt-polyak", "optx-best-so-far"),
            *("optx-gd", "optx-ncg"),
        },
        "test_ridge_is_the_normal_equations": set(),
    },
    "test_argmin": {
        "test_a_leaf_of_w_that_alpha_does_not_move": {"jacfwd"},
        "test_a_random_key_in_the_batch": {"grad"},
        "test_a_third_derivative_on_ridge": set(),
        "test_a_third_level_has_the_derivative_of_its_formula": set(),
        "test_a_third_level_nests": set(),
        "test_a_value_that_the_loss_closes_over": {"bare grad"},
        "test_closed_over_values_under_vmap": set(),
        "test_derivatives_by_the_batch_beside_integer_labels": {"grad"},
        "test_every_kind_of_derivative": {"grad", "jacrev"},
        "test_every_solver_gives_the_derivatives_of_the_formula": {
            *("LBFGS-grad", "Newton, LU-grad", "formula-grad", "rate from alpha-grad"),
        },
        "test_float32": {"grad"},
        "test_implicit_is_the_gradient_through_argmin": {"quadratic nested"},
        "test_vmap_is_a_loop": {"grad"},
    },
    "test_average": {
        "test_equal_draws_are_one_estimate": set(),
        "test_more_draws_scatter_less": set(),
        "test_the_standard_error_is_what_means_scatter_by": set(),
    },
    "test_certificate": {
        "test_sabotage_is_not_trusted": {"CG", "NaN"},
        "test_several_losses_and_trees_are_certified": set(),
        "test_the_certificate_on_a_hundred_problems": set(),
    },
    "test_checkpoint": {
        "test_killed_after_any_step_it_ends_with_the_same_bits": {"implicit"},
        "test_the_folder_of_another_run_is_refused": {
            *("code of a metric", "constant in a loss", "dtype of w", "inner data"),
            *("key", "num_steps", "rate"),
        },
    },
    "test_compilation": {
        "test_a_run_traces_each_loss_a_constant_number_of_times": {"CG", "Unrolled"},
        "test_equal_with_and_without_jit": {"CG", "Unrolled"},
        "test_minimize_under_jit_and_vmap_is_a_loop": set(),
        "test_other_numbers_trace_nothing": {"CG", "Unrolled"},
        "test_vmap_over_seeds_and_alphas_is_a_loop": {"Unrolled"},
        "test_vmap_over_settings_is_a_loop": set(),
    },
    "test_estimators": {
        "test_a_tuple_of_losses_is_that_many_runs": {"implicit"},
        "test_an_inner_loop_stopped_early_is_flagged": {
            *("logistic scalar-BiCGStab", "logistic scalar-GMRES"),
            *("logistic scalar-NystromCG", "ridge per-weight-CG"),
            *("ridge per-weight-Neumann", "ridge scalar-LU"),
        },
        "test_equals_the_closed_form": {"quadratic 30-*", "ridge*", "smd 1-*"},
        "test_float32_to_1e_4": {
            *("quadratic nested-LU", "quadratic nested-Unrolled"),
            *("ridge per-weight-CG",),
        },
        "test_nan_in_the_data_is_not_trusted": {
            *("CG-inner", "LU-outer", "Neumann-inner", "NystromCG-outer"),
            *("Unrolled-outer", "last-inner"),
        },
        "test_one_bad_step_is_not_held_against_the_next": {
            *("CG--1.0", "GMRES-nan", "LU-0.0", "Neumann-1e-09", "Neumann-nan"),
            *("NystromCG-nan",),
        },
        "test_settings_of_double_precision_serve_a_problem_of_single": {
            *("Nystrom", "NystromCG", "step_size", "tolerance"),
        },
        "test_the_ledger_counts_what_runs": {
            *("BiCGStab", "CG", "Identity", "Neumann step", "Newton"),
        },
        "test_the_ledger_of_unrolled": {
            *("16-5-False-0", "16-9-True-8", "16-99-True-16", "16-None-True-16"),
            *("3-None-True-0",),
        },
        "test_the_logistic_problem_of_grazzi_2020": {"CG-5", "Neumann-25", "last-25"},
    },
    "test_guards": {
        "test_implicit_refined_is_the_closed_form": {"ridge per-weight-*"},
        "test_under_jit_and_vmap_it_is_a_loop": {"refine"},
    },
    "test_identities": {
        "test_a_series_is_the_truncated_unroll": {
            *("logistic per-weight-17", "quadratic 30-5"),
        },
        "test_a_warm_start_of_w_continues_the_inner_run": set(),
        "test_all_roads_lead_to_the_closed_form": {"ridge per-weight"},
        "test_checkpoints_change_nothing": {"7-16", "7-3", "None-1", "None-50"},
        "test_the_arrangement_of_the_pytree_does_not_matter": set(),
    },
    "test_inner": {
        "test_minimisers_reach_the_minimum": {"*-float64"},
    },
    "test_metric_tables": {
        "test_retrieval_ranks_all_others_by_cosine": set(),
    },
    "test_minimize": {
        "test_a_box_is_projected_gradient_descent": set(),
        "test_a_space_is_a_reparametrisation": {"log Interval"},
        "test_equals_a_loop_by_hand": {"momentum"},
        "test_float32_stays_float32": set(),
        "test_progress_changes_nothing": {"41"},
        "test_projections_of_optax": {"simplex"},
        "test_rows_of_a_batch_need_an_index": set(),
        "test_w_is_carried_from_step_to_step": {"implicit"},
    },
    "test_objectives": {
        "test_epo_of_three_ends_at_the_point_of_equal_distances": set(),
        "test_epo_solves_the_linear_programs_of_its_authors": {"2", "4"},
        "test_a_front_is_a_loop_of_runs_in_one_program": set(),
        "test_only_tchebycheff_reaches_a_concave_front": set(),
        "test_the_adjoints_of_all_losses_are_columns_of_one_loop": set(),
        "test_weights_of_objectives_are_learned_at_a_third_level": set(),
        "test_rows_progress_and_certificates_of_several_losses": set(),
    },
    "test_populations": {
        "test_a_search_killed_after_any_round_goes_on_to_the_same_trace": {
            *("one shot", "pbt"),
        },
        "test_brackets_of_hyperband_are_those_of_its_table": set(),
        "test_each_finds_the_optimum_within_its_budget": {"pbt"},
        "test_eight_devices_train_what_one_does": set(),
        "test_the_table_times_three_ways_to_the_same_trainings": set(),
    },
    "test_references": {
        "test_jaxopt_lbfgs_with_implicit_diff": set(),
        "test_second_derivatives_against_jaxopt": set(),
    },
    "test_reversible": {
        "test_equals_reverse_mode": {"logistic per-weight-1000", "quadratic nested-2"},
    },
    "test_single_loop": {
        "test_conformance": set(),
    },
    "test_searchers": {
        "test_a_grid_is_the_product_of_its_axes": set(),
        "test_a_generation_of_evolution_with_failures": {"SNES"},
        "test_evolution_proposes_what_evosax_does": {"SNES"},
        "test_the_optimum_is_found_within_the_stated_budget": {
            *("cmaes", "grid", "random", "reinforce"),
        },
    },
    "test_search": {
        "test_nsga2_finds_the_front_and_more_of_it_than_random_search": set(),
    },
    "test_single_loop_family": {
        "test_a_step_has_its_own_expectation": {"BOME", "F2SA"},
        "test_each_leaf_keeps_its_dtype": {"MRBO", "PZOBO"},
        "test_the_step_that_is_timed_is_the_one_written_out": set(),
        "test_a_series_has_the_mean_of_its_terms": {"SUSTAIN", "StocBiO"},
        "test_each_step_is_that_of_the_dense_matrices": {
            *("BOME", "DARTS", "F2SA", "FSLA", "MRBO", "SABA", "SRBA", "StocBiO"),
        },
    },
    "test_single_loop_tables": {
        "test_a_series_of_random_length_ends_within_the_budget": set(),
        "test_batches_of_cleaning_are_its_losses_on_average": set(),
        "test_weights_rest_where_the_budget_ends": set(),
    },
    "test_spaces_relax": {
        "test_minimize_learns_a_choice_by_any_of_them": set(),
        "test_the_score_function_has_every_derivative_of_the_expectation": {
            *("interacting-1.5",),
        },
    },
    "test_studies": {
        "test_every_row_keeps_the_budget_and_the_best_penalty_is_chosen": set(),
        "test_the_planned_cost_of_a_step_is_an_upper_bound": set(),
    },
    "test_task_architecture": {
        "test_first_order_darts_is_the_direct_term": set(),
    },
    "test_task_data": {
        "test_every_part_has_an_example": {"cleaning", "penalties"},
    },
    "test_task_federated": {
        "test_clients_on_four_devices_give_the_same_numbers": set(),
        "test_only_the_global_hypergradient_is_right_where_clients_differ": set(),
    },
    "test_task_few_shot": {
        "test_hypergradients_equal_central_differences": {"ridge"},
    },
    "test_task_penalties": {
        "test_the_hypergradient_is_that_of_the_whole_pipeline": {"logistic-argmin"},
    },
    "test_task_physics": {
        "test_descent_from_one_and_one_ends_at_the_best_control": set(),
        "test_held_out_sensors_are_no_training_data_and_no_test_points": set(),
    },
    "test_task_reinforcement": {
        "test_the_meta_gradient_is_the_central_difference_on_fixed_keys": set(),
    },
    "test_task_schedules": {
        "test_ten_thousand_steps_are_planned_in_a_gibibyte": {"forward"},
        "test_the_hypergradient_is_that_of_the_whole_pipeline": {"unrolled-1e-06"},
    },
    "test_task_self_supervised": {
        "test_hypergradients_equal_central_differences": set(),
    },
    "test_testing": {
        "test_an_untouched_wrapper_passes": set(),
        "test_honest_estimators_pass": {"Identity", "Unrolled"},
        "test_sabotaged_estimators_fail": {"HidesNaN", "SumOfPartials"},
    },
    "test_zero_order": {
        "test_differences_of_several_losses": set(),
        "test_evolution_needs_no_derivative_of_the_metric": set(),
        "test_the_error_of_evolution_falls_as_the_root_of_the_pairs": set(),
        "test_the_penalty_of_several_losses": set(),
    },
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of heavy modules, and the cases that only `make full` runs."""
    for item in items:
        module = item.path.stem
        if module in HEAVY:
            item.add_marker(pytest.mark.heavy)
        name, _, case = item.name.partition("[")
        kept = REPRESENTATIVES.get(module, {}).get(name)
        if kept is not None and not any(fnmatch(case[:-1], one) for one in kept):
            item.add_marker(pytest.mark.slow)
