"""Of tests with long programs, the cases that `make test` runs.

Those that are most unlike each other, by pattern, or none; `make full` runs all.
"""

REPRESENTATIVES = {
    "test_accuracy": {
        "test_a_relative_error_costs_less_than_steps_alone": {
            *("logistic_of_hypertorch*",),
        },
        "test_a_second_call_traces_nothing": set(),
        "test_a_warm_chain_of_adam_is_right_where_trusted": set(),
        "test_an_exact_landing_leaves_a_goal_to_go_on_with": set(),
        "test_an_ill_conditioned_adjoint_is_not_overlooked": {"linear_solver0"},
        "test_an_outer_loss_that_reads_no_w_is_trusted": set(),
        "test_hoags_schedules_spend_less": set(),
        "test_parts_that_lag_behind_are_not_overlooked": {"0.01"},
        "test_several_losses_trees_and_solvers_that_run_once": set(),
        "test_steps_are_those_of_a_whole_run": set(),
        "test_the_certificate_is_asked_for_the_same_error": set(),
        "test_what_is_asked_for_is_met": set(),
    },
    "test_adapters": {
        "test_a_loop_is_jaxopt_run_without_tolerance": {"float32-optax", "float64-gd"},
        "test_argmin_differentiates_around_the_solver": {"optx-bfgs"},
        "test_finds_the_minimiser": {"logistic-optx-lbfgs"},
        "test_float32_stays_float32": {"jaxopt-polyak", "optx-gd"},
        "test_implicit_hypergradient": {"optx-bfgs"},
        "test_jit_and_vmap_equal_a_loop": {"jaxopt-polyak", "optx-gd"},
        "test_no_warning_escapes": set(),
        "test_ridge_is_the_normal_equations": set(),
        "test_scalar_w_given_as_a_number": {
            *(
                "jaxopt-optax-lbfgs",
                "jaxopt-polyak",
                "optx-lbfgs",
            ),
        },
    },
    "test_adjoint_table": {
        "test_the_adjoint_is_autodiffs": set(),
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
        "test_every_kind_of_derivative": {"grad"},
        "test_every_solver_gives_the_derivatives_of_the_formula": {
            *(
                "LBFGS-grad",
                "Newton, LU-grad",
                "formula-grad",
            ),
            *("rate from alpha-grad",),
        },
        "test_float32": {"grad"},
        "test_implicit_is_the_gradient_through_argmin": {"quadratic nested"},
        "test_vmap_is_a_loop": set(),
    },
    "test_average": {
        "test_equal_draws_are_one_estimate": set(),
        "test_more_draws_scatter_less": set(),
        "test_the_mean_and_its_standard_error_are_those_of_its_draws": set(),
        "test_the_standard_error_is_what_means_scatter_by": set(),
    },
    "test_benchmarks": {
        "test_the_network_has_a_strict_minimum": {"scalar"},
    },
    "test_certificate": {
        "test_certify_sees_a_saddle_that_the_solver_does_not": {"linear0"},
        "test_minimize_certifies_every_so_many_steps": set(),
        "test_sabotage_is_not_trusted": set(),
        "test_several_losses_and_trees_are_certified": set(),
        "test_the_certificate_on_a_hundred_problems": set(),
    },
    "test_checkpoint": {
        "test_a_full_disk_is_reported_and_nothing_is_lost": set(),
        "test_a_time_limit_alone": set(),
        "test_killed_after_any_step_it_ends_with_the_same_bits": {"implicit"},
        "test_the_folder_of_another_run_is_refused": {"num_steps"},
    },
    "test_command": {
        "test_the_command_writes_rows_table_and_figure": {"few_shot", "unsupervised"},
    },
    "test_compilation": {
        "test_a_run_traces_each_loss_a_constant_number_of_times": {"Unrolled"},
        "test_equal_with_and_without_jit": {"Unrolled"},
        "test_minimize_under_jit_and_vmap_is_a_loop": set(),
        "test_other_numbers_trace_nothing": {"Unrolled"},
        "test_progress_traces_a_constant_number_of_times": set(),
        "test_vmap_over_seeds_and_alphas_is_a_loop": {"Unrolled"},
        "test_vmap_over_settings_is_a_loop": set(),
    },
    "test_cost_ledger": {
        "test_implicit_sees_the_batch_that_it_holds": {"3-13", "None-None"},
        "test_unrolling_sees_a_batch_a_step_each_way": {
            *(
                "1-float32",
                "5-float64",
                "None-float32",
            ),
        },
    },
    "test_dry_run": {
        "test_a_tolerance_is_said_with_the_cost_of_an_iteration": set(),
        "test_nothing_is_run_and_nothing_written": set(),
        "test_temporary_bytes_are_what_a_run_takes": set(),
    },
    "test_estimators": {
        "test_a_formula_leaves_only_the_adjoint_to_solve": {"0-d", "30", "cI"},
        "test_a_tuple_of_losses_is_that_many_runs": set(),
        "test_a_tuple_of_losses_on_a_tree": set(),
        "test_an_error_along_a_flat_direction_is_seen": {
            *(
                "linear0-False",
                "linear2-True",
                "linear4-True",
            ),
        },
        "test_an_indefinite_hessian_is_not_trusted": {
            *(
                "linear0*",
                "linear3*",
                "linear9*",
            ),
        },
        "test_an_inner_loop_stopped_early_is_flagged": {
            *(
                "logistic scalar-NystromCG",
                "ridge per-weight-CG",
            ),
            *("ridge scalar-LU",),
        },
        "test_an_outer_loss_that_ignores_w_has_only_the_direct_term": {
            *(
                "CG",
                "Unrolled",
            ),
        },
        "test_damping_is_added_to_the_hessian": {"CG"},
        "test_equals_the_closed_form": {
            *(
                "quadratic 30-CG",
                "quadratic 30-NystromCG",
            ),
            *(
                "ridge per-example-GMRES",
                "ridge per-weight-LU",
            ),
            *(
                "ridge scalar-Unrolled",
                "smd 1-CG",
                "smd 1-Unrolled",
            ),
        },
        "test_every_inner_solver_reaches_the_closed_form": {"LBFGS", "Newton"},
        "test_every_product_of_a_solve_sees_one_batch_and_one_key": set(),
        "test_float32_to_1e_4": {
            *(
                "quadratic nested-LU",
                "quadratic nested-Unrolled",
            ),
            *("ridge per-weight-CG",),
        },
        "test_held_batches_are_unbiased_over_all_draws": {"both"},
        "test_learning_rates_are_hyperparameters": {"adam"},
        "test_nan_in_the_data_is_not_trusted": {
            *(
                "CG-inner",
                "Neumann-inner",
                "Unrolled-outer",
            ),
        },
        "test_no_trusted_estimate_is_far_off": {
            *(
                "logistic scalar-CG",
                "logistic scalar-LU",
            ),
            *("ridge per-weight-CG",),
        },
        "test_one_bad_step_is_not_held_against_the_next": {
            *(
                "CG--1.0",
                "GMRES-nan",
                "LU-0.0",
                "Neumann-1e-09",
            ),
            *(
                "Neumann-nan",
                "NystromCG-nan",
            ),
        },
        "test_same_key_same_estimate_to_the_bit": set(),
        "test_settings_of_double_precision_serve_a_problem_of_single": {
            *(
                "NystromCG",
                "step_size",
            ),
        },
        "test_the_ledger_counts_what_runs": {"Identity", "Neumann step", "Newton"},
        "test_the_ledger_of_implicit": {"5-8-10", "None-8-None", "None-None-10"},
        "test_the_ledger_of_unrolled": {"16-5-False-0"},
        "test_the_logistic_problem_of_grazzi_2020": {"CG-5"},
        "test_what_several_losses_share_counts_once": {"linear0-25"},
    },
    "test_executors": {
        "test_a_batch_is_asked_for_before_it_is_told": {"tpe"},
        "test_an_executor_makes_the_trace_of_one_process": {"descent", "metrics"},
    },
    "test_fixed_point": {
        "test_equals_the_closed_form": {
            *(
                "0.3-quadratic nested",
                "None-logistic scalar",
            ),
            *("None-ridge per-weight",),
        },
        "test_k_terms_are_the_last_k_steps": {"1", "7"},
    },
    "test_forward": {
        "test_the_distance_to_implicit": {"Forward"},
    },
    "test_guards": {
        "test_an_error_that_steps_do_not_reach_is_refined": set(),
        "test_implicit_refined_is_the_closed_form": {"ridge per-weight-*"},
        "test_under_jit_and_vmap_it_is_a_loop": {"refine"},
    },
    "test_guide": {
        "test_a_leaf_of_the_losses_that_is_read_beside_them": {
            *(
                "FixedPoint",
                "Implicit",
            ),
        },
        "test_memory_grows_as_declared": {"Forward*", "NystromCG*"},
        "test_what_is_declared_as_seen_equals_central_differences": {
            *(
                "DARTS*",
                "FixedPoint(solver, K)",
                "Forward(solver)",
            ),
            *(
                "Implicit(solver)",
                "Penalty(solver, l)",
            ),
            *(
                "SOBA(optimizer)",
                "Unrolled(solver, truncation_length=K)",
            ),
        },
    },
    "test_identities": {
        "test_a_series_is_the_truncated_unroll": {"quadratic 30-5"},
        "test_a_warm_start_of_w_continues_the_inner_run": set(),
        "test_a_warm_start_takes_fewer_products_than_a_cold_one": set(),
        "test_all_roads_lead_to_the_closed_form": set(),
        "test_checkpoints_change_nothing": {"7-3", "None-50"},
        "test_conjugate_gradients_keep_their_bound": {"6"},
        "test_float32_and_float64_agree": set(),
        "test_the_arrangement_of_the_pytree_does_not_matter": set(),
        "test_the_truncation_estimate_falls_as_the_error": set(),
    },
    "test_inner": {
        "test_minimisers_reach_the_minimum": {
            *(
                "1-d-LBFGS-float64",
                "logistic-Newton-float64",
            ),
            *(
                "ridge-Newton-float64",
                "rosenbrock-LBFGS-float64",
            ),
        },
        "test_the_ledger_of_a_solve_is_what_was_evaluated": {
            *(
                "logistic-Descent",
                "logistic-LBFGS",
            ),
            *("rosenbrock-Newton",),
        },
        "test_w_keeps_its_dtypes_beside_a_wider_alpha": {
            *(
                "*float64-LBFGS",
                "*float64-Newton",
            ),
        },
    },
    "test_kills": {
        "test_a_run_with_checkpoints": set(),
        "test_a_study_of_the_command_line": set(),
    },
    "test_linear": {
        "test_a_sketch_of_half_precision": {"solver0-bfloat16"},
        "test_linear_solve_its_batches_and_its_derivatives": {"Neumann", "NystromCG"},
        "test_nystrom_where_the_hessian_is_singular": {"12", "3"},
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
        "test_spaces_leaf_by_leaf": set(),
        "test_w_is_carried_from_step_to_step": {"implicit"},
    },
    "test_objectives": {
        "test_a_front_is_a_loop_of_runs_in_one_program": set(),
        "test_a_limit_holds_and_the_multiplier_is_that_of_the_kkt_point": {
            *(
                "float32-options2",
                "float64-options0",
            ),
        },
        "test_a_weighted_sum_is_the_run_of_one_loss": {"space1"},
        "test_epo_is_the_closed_form_for_two_that_conflict": {"float64"},
        "test_epo_of_three_ends_at_the_point_of_equal_distances": set(),
        "test_epo_solves_the_linear_programs_of_its_authors": {"2"},
        "test_more_than_two_gradients": {"3-2-combine1*", "5-8-combine0*"},
        "test_only_tchebycheff_reaches_a_concave_front": set(),
        "test_rows_progress_and_certificates_of_several_losses": set(),
        "test_the_adjoints_of_all_losses_are_columns_of_one_loop": set(),
        "test_the_front_of_two_quadratics": {"<lambda>-exact*"},
        "test_the_gradients_are_those_in_the_space": {"combine1"},
        "test_weights_of_objectives_are_learned_at_a_third_level": set(),
        "test_weights_of_objectives_by_nested_argmin": set(),
    },
    "test_populations": {
        "test_a_search_killed_after_any_round_goes_on_to_the_same_trace": {
            *(
                "one shot",
                "pbt",
            ),
        },
        "test_brackets_of_hyperband_are_those_of_its_table": set(),
        "test_each_finds_the_optimum_within_its_budget": {"pbt"},
        "test_eight_devices_train_what_one_does": set(),
        "test_the_best_is_one_that_was_trained_in_full": set(),
        "test_the_table_times_three_ways_to_the_same_trainings": set(),
    },
    "test_problem": {
        "test_several_outer_losses": {"Unrolled"},
    },
    "test_references": {
        "test_jaxopt_lbfgs_with_implicit_diff": set(),
        "test_jaxopt_root_vjp": {"ridge per-example"},
        "test_optimistix_with_its_implicit_adjoint": {"ridge per-example"},
        "test_second_derivatives_against_jaxopt": set(),
    },
    "test_reused_sketch": {
        "test_a_sketch_that_is_not_finite_is_made_anew": set(),
        "test_where_h_stands_still_a_sketch_is_saved_to_the_product": set(),
    },
    "test_reversible": {
        "test_equals_reverse_mode": {"logistic per-weight-1000", "quadratic nested-2"},
    },
    "test_search": {
        "test_nsga2_finds_the_front": set(),
    },
    "test_searchers": {
        "test_a_generation_of_evolution_with_failures": {"SNES"},
        "test_a_grid_is_the_product_of_its_axes": set(),
        "test_a_stored_state_asks_on_as_if_nothing_had_happened": {
            *(
                "evolution-snes",
                "gp",
                "nsga2-mixed",
                "random*",
            ),
            *("tpe-mixed",),
        },
        "test_evolution_proposes_what_evosax_does": {"SNES"},
        "test_proposals_lie_in_the_space_and_asking_changes_nothing": {
            *(
                "evolution-cma",
                "gp-mixed",
                "nsga2-mixed",
                "random*",
            ),
            *("sobol*",),
        },
        "test_the_optimum_is_found_within_the_stated_budget": {
            *(
                "grid",
                "random",
                "reinforce",
            ),
        },
    },
    "test_searching_tables": {
        "test_a_search_costs_its_trainings_and_a_value_a_draw": set(),
        "test_values_at_once_hold_more": set(),
        "test_what_is_carried_is_what_implicit_carries": set(),
    },
    "test_single_loop": {
        "test_conformance": set(),
    },
    "test_single_loop_family": {
        "test_a_series_has_the_mean_of_its_terms": {"SUSTAIN", "StocBiO"},
        "test_a_step_has_its_own_expectation": {"BOME"},
        "test_each_leaf_keeps_its_dtype": set(),
        "test_each_step_is_that_of_the_dense_matrices": {"BOME", "F2SA", "SABA"},
        "test_the_step_that_is_timed_is_the_one_written_out": set(),
    },
    "test_single_loop_tables": {
        "test_a_grid_chooses_and_its_table_goes_with_the_choice": set(),
        "test_a_series_of_random_length_ends_within_the_budget": set(),
        "test_batches_of_cleaning_are_its_losses_on_average": set(),
        "test_weights_rest_where_the_budget_ends": set(),
    },
    "test_spaces": {
        "test_far_out_stays_in_the_set_with_finite_gradients": {
            *(
                "50.0-f32-interval",
                "50.0-f32-real",
                "50.0-f32-simplex",
            ),
            *("50.0-f64-positive",),
        },
    },
    "test_spaces_relax": {
        "test_minimize_learns_a_choice_by_any_of_them": set(),
        "test_the_score_function_has_every_derivative_of_the_expectation": set(),
    },
    "test_studies": {
        "test_every_row_keeps_the_budget_and_the_best_penalty_is_chosen": set(),
        "test_the_command_refuses_what_it_cannot_run": set(),
        "test_the_planned_cost_of_a_step_is_an_upper_bound": set(),
    },
    "test_study_costs": {
        "test_a_step_of_the_weights_costs_at_most_what_is_planned": {"implicit"},
    },
    "test_task_architecture": {
        "test_first_order_darts_is_the_direct_term": set(),
        "test_the_unrolled_hypergradient_is_that_of_the_whole_pipeline": set(),
    },
    "test_task_data": {
        "test_every_part_has_an_example": {"cleaning", "penalties"},
    },
    "test_task_federated": {
        "test_clients_on_four_devices_give_the_same_numbers": set(),
        "test_clients_that_are_alike_are_one_machine": set(),
        "test_only_the_global_hypergradient_is_right_where_clients_differ": set(),
    },
    "test_task_few_shot": {
        "test_hypergradients_equal_central_differences": set(),
    },
    "test_task_penalties": {
        "test_the_hypergradient_is_that_of_the_whole_pipeline": {"logistic-argmin"},
    },
    "test_task_physics": {
        "test_descent_from_one_and_one_ends_at_the_best_control": set(),
        "test_held_out_sensors_are_no_training_data_and_no_test_points": set(),
    },
    "test_task_reinforcement": {
        "test_the_hypergradient_of_a_discount_is_the_closed_form": {
            *(
                "estimator0-shape1",
                "estimator1-shape0",
            ),
        },
        "test_the_meta_gradient_is_the_central_difference_on_fixed_keys": set(),
    },
    "test_task_schedules": {
        "test_ten_thousand_steps_are_planned_in_a_gibibyte": {"forward"},
        "test_the_hypergradient_is_that_of_the_whole_pipeline": {"unrolled-1e-06"},
    },
    "test_task_self_supervised": {
        "test_hypergradients_equal_central_differences": set(),
    },
    "test_task_semi_supervised": {
        "test_the_implicit_hypergradient_is_that_of_the_whole_pipeline": set(),
    },
    "test_testing": {
        "test_an_untouched_wrapper_passes": set(),
        "test_honest_estimators_pass": set(),
        "test_its_problems_have_the_hypergradient_they_state": {"vector"},
        "test_sabotaged_estimators_fail": {"SumOfPartials"},
    },
    "test_zero_order": {
        "test_central_differences_of_whole_runs": {
            *(
                "quadratic 0-d",
                "ridge per-weight",
            ),
        },
        "test_differences_of_several_losses": set(),
        "test_evolution_needs_no_derivative_of_the_metric": set(),
        "test_the_bias_of_the_penalty": {
            *("logistic per-weight-True--2",),
            *("ridge per-weight-False--1",),
        },
        "test_the_error_of_evolution_falls_as_the_root_of_the_pairs": set(),
        "test_the_penalty_of_several_losses": set(),
    },
}
