"""What holds for every test: float64, no silent rank promotion, fixed keys."""

import zlib
from collections.abc import Iterator
from fnmatch import fnmatch

import jax
import pytest

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
    "test_testing",
}

# Tests with long programs for each case. `make test` runs the cases named here (by
# pattern), those that are most unlike each other; `make full` runs all.
REPRESENTATIVES = {
    "test_argmin": {
        "test_a_leaf_of_w_that_alpha_does_not_move": {"jacfwd"},
        "test_a_random_key_in_the_batch": {"grad"},
        "test_a_third_level_nests": {"hessian"},
        "test_a_third_derivative_on_ridge": set(),
        "test_a_value_that_the_loss_closes_over": {"bare grad"},
        "test_closed_over_values_under_vmap": set(),
        "test_derivatives_by_the_batch_beside_integer_labels": {"grad"},
        "test_every_kind_of_derivative": {"grad", "jacfwd", "jacrev", "hessian"},
        "test_every_solver_gives_the_derivatives_of_the_formula": {
            *("formula-grad", "rate from alpha-grad", "LBFGS-grad"),
            *("Newton, LU-grad", "Newton, NystromCG-grad", "Descent-hessian"),
        },
        "test_float32": {"grad"},
        "test_implicit_is_the_gradient_through_argmin": {
            *("ridge per-example", "quadratic nested", "smd 4 tilted"),
        },
        "test_vmap_is_a_loop": {"grad"},
    },
    "test_accuracy": {
        "test_a_relative_error_costs_less_than_steps_alone": {
            "logistic_of_hypertorch*"
        },
    },
    "test_adapters": {
        "test_finds_the_minimiser": {"logistic-*"},
        "test_float32_stays_float32": {
            *("jaxopt-gd", "jaxopt-optax-lbfgs", "jaxopt-polyak"),
            *("optx-best-so-far", "optx-gd", "optx-ncg"),
        },
        "test_jit_and_vmap_equal_a_loop": {
            *("jaxopt-gd", "jaxopt-optax-lbfgs", "jaxopt-polyak"),
            *("optx-best-so-far", "optx-gd", "optx-ncg"),
        },
    },
    "test_average": {"test_more_draws_scatter_less": set()},
    "test_certificate": {"test_the_certificate_on_a_hundred_problems": set()},
    "test_compilation": {
        "test_a_run_traces_each_loss_a_constant_number_of_times": {
            *("CG", "Neumann", "LU", "Unrolled"),
        },
        "test_equal_with_and_without_jit": {"CG", "Neumann", "Unrolled", "last"},
        "test_other_numbers_trace_nothing": {"CG", "Neumann", "Newton", "Unrolled"},
        "test_vmap_over_seeds_and_alphas_is_a_loop": {"Neumann", "Unrolled"},
        "test_minimize_under_jit_and_vmap_is_a_loop": {"CG"},
    },
    "test_estimators": {
        "test_an_inner_loop_stopped_early_is_flagged": {
            *("ridge scalar-LU", "ridge per-weight-CG", "ridge per-weight-Neumann"),
            *("logistic scalar-GMRES", "logistic scalar-BiCGStab"),
            *("logistic scalar-NystromCG",),
        },
        "test_equals_the_closed_form": {"ridge*", "smd 1-*", "quadratic 30-*"},
        "test_float32_to_1e_4": {
            *(
                "quadratic nested-LU",
                "ridge per-weight-CG",
                "quadratic nested-Unrolled",
            ),
        },
        "test_nan_in_the_data_is_not_trusted": {
            *("CG-inner", "Neumann-inner", "last-inner"),
            *("LU-outer", "NystromCG-outer", "Unrolled-outer"),
        },
        "test_one_bad_step_is_not_held_against_the_next": {
            *("CG--1.0", "GMRES-nan", "LU-0.0", "Neumann-1e-09"),
            *("Neumann-nan", "NystromCG-nan"),
        },
        "test_settings_of_double_precision_serve_a_problem_of_single": {
            *("step_size", "Nystrom", "NystromCG", "tolerance"),
        },
        "test_the_logistic_problem_of_grazzi_2020": {"CG-5", "Neumann-25", "last-25"},
        "test_the_ledger_of_unrolled": {
            *("3-None-True-0", "16-None-True-16", "16-5-False-0", "16-9-True-8"),
            *("16-99-True-16",),
        },
        "test_the_ledger_counts_what_runs": {
            *("CG", "Newton", "Neumann step", "Identity", "BiCGStab"),
        },
    },
    "test_identities": {
        "test_a_series_is_the_truncated_unroll": {
            *("quadratic 30-1", "quadratic 30-5", "quadratic nested-2"),
            *("logistic per-weight-17",),
        },
        "test_all_roads_lead_to_the_closed_form": {
            *("ridge per-weight", "quadratic nested"),
        },
        "test_checkpoints_change_nothing": {"None-1", "None-50", "7-16", "7-3"},
    },
    "test_inner": {"test_minimisers_reach_the_minimum": {"*-float64"}},
    "test_metric_tables": {"test_retrieval_ranks_all_others_by_cosine": set()},
    "test_minimize": {
        "test_a_space_is_a_reparametrisation": {"Simplex", "log Interval"},
        "test_progress_changes_nothing": {"1", "41"},
        "test_projections_of_optax": {"simplex"},
    },
    "test_references": {
        "test_jaxopt_lbfgs_with_implicit_diff": {"ridge per-weight"},
        "test_second_derivatives_against_jaxopt": {"ridge per-weight"},
    },
    "test_reversible": {
        "test_equals_reverse_mode": {"quadratic nested-2", "logistic per-weight-1000"},
    },
    "test_single_loop": {"test_conformance": set()},
    "test_testing": {
        "test_honest_estimators_pass": {"Neumann", "Unrolled", "Identity"}
    },
    "test_zero_order": {
        "test_the_error_of_evolution_falls_as_the_root_of_the_pairs": set(),
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
