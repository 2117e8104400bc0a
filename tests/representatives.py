"""The cases of long tests of tasks and tables that `make test` runs, by pattern.

`make full` runs all cases. Other tests are marked with `pytest.mark.slow` themselves.
"""

REPRESENTATIVES = {
    "test_adjoint_table": {"test_the_adjoint_is_autodiffs": set()},
    "test_benchmarks": {"test_the_network_has_a_strict_minimum": {"scalar"}},
    "test_command": {
        "test_the_command_writes_rows_table_and_figure": {"few_shot", "unsupervised"}
    },
    "test_dry_run": {
        "test_a_tolerance_is_said_with_the_cost_of_an_iteration": set(),
        "test_nothing_is_run_and_nothing_written": set(),
        "test_temporary_bytes_are_what_a_run_takes": set(),
    },
    "test_metric_tables": {"test_retrieval_ranks_all_others_by_cosine": set()},
    "test_searching_tables": {
        "test_a_search_costs_its_trainings_and_a_value_a_draw": set(),
        "test_values_at_once_hold_more": set(),
        "test_what_is_carried_is_what_implicit_carries": set(),
    },
    "test_single_loop_tables": {
        "test_a_grid_chooses_and_its_table_goes_with_the_choice": set(),
        "test_a_series_of_random_length_ends_within_the_budget": set(),
        "test_batches_of_cleaning_are_its_losses_on_average": set(),
        "test_weights_rest_where_the_budget_ends": set(),
    },
    "test_studies": {
        "test_every_row_keeps_the_budget_and_the_best_penalty_is_chosen": set(),
        "test_the_command_refuses_what_it_cannot_run": set(),
        "test_the_planned_cost_of_a_step_is_an_upper_bound": set(),
    },
    "test_study_costs": {
        "test_a_step_of_the_weights_costs_at_most_what_is_planned": {"implicit"}
    },
}
