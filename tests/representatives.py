"""Of tests with long programs, the cases that `make test` runs.

Those that are most unlike each other, by pattern, or none; `make full` runs all.
"""

REPRESENTATIVES = {
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
    "test_average": {
        "test_equal_draws_are_one_estimate": set(),
        "test_more_draws_scatter_less": set(),
        "test_the_mean_and_its_standard_error_are_those_of_its_draws": set(),
        "test_the_standard_error_is_what_means_scatter_by": set(),
    },
    "test_checkpoint": {
        "test_a_full_disk_is_reported_and_nothing_is_lost": set(),
        "test_a_time_limit_alone": set(),
        "test_killed_after_any_step_it_ends_with_the_same_bits": {"implicit"},
        "test_the_folder_of_another_run_is_refused": {"num_steps"},
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
    "test_executors": {
        "test_a_batch_is_asked_for_before_it_is_told": {"tpe"},
        "test_an_executor_makes_the_trace_of_one_process": {"descent", "metrics"},
    },
    "test_guards": {
        "test_an_error_that_steps_do_not_reach_is_refined": set(),
        "test_implicit_refined_is_the_closed_form": {"ridge per-weight-*"},
        "test_under_jit_and_vmap_it_is_a_loop": {"refine"},
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
    "test_kills": {
        "test_a_run_with_checkpoints": set(),
        "test_a_study_of_the_command_line": set(),
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
    "test_problem": {
        "test_several_outer_losses": {"Unrolled"},
    },
    "test_reused_sketch": {
        "test_a_sketch_that_is_not_finite_is_made_anew": set(),
        "test_where_h_stands_still_a_sketch_is_saved_to_the_product": set(),
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
}
