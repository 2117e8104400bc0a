"""Names are standard terms, and docstrings begin with a subject or a verb."""

import ast

from tests.house.source import FILES, ROOT, bindings, definitions, parse

#: Each forbidden identifier with the names to use instead.
REPLACEMENTS = {
    ("found",): "estimate, certificate, w, state, actual or result",
    ("known", "Known"): "reference, recorded, is_concrete or a more specific noun",
    ("spent",): "total_cost, solver_stats or counts",
    ("seen", "solved", "Seen"): "total_linear_stats, linear_stats or num_items",
    ("together", "more", "usable"): "merge_*, add_*, extra_* or finite_or_zero",
    ("at", "At"): "result, point, x or the noun of the contents",
    ("goal", "first_goal"): "tol or grad_tol",
    ("due",): "should_* or is_*",
    ("look",): "evaluate_*, certify_* or probe_*",
    ("judge", "judged"): "evaluate, check_* or is_trusted",
    ("said", "told", "tells"): "message, values, lines or updates",
    ("shown", "Shown"): "preview, rendered or Pretty*",
    ("draw", "drawn", "undrawn", "Drawn"): "sample, batch, samples or plot",
    ("whole", "held"): "full_batch, sample_fixed_batch or held_out",
    ("worth", "off", "far", "away"): "relative_change, error or deviations",
    ("place", "beyond"): "index, position, exceeded_limit or later_*",
    ("start",): "w0, init_w, y0, start_time or start_*",
    ("begin", "begun", "began"): "init_*, start_time or incomplete",
    ("again", "once", "Once"): "refine_*, num_recomputed_*, rerun or second_*",
    ("unfinished", "some", "turn"): "cond_fun, body_fun or a verb phrase",
    ("then", "first", "last", "before"): "next_*, init_*, prev_* or final_*",
    ("one", "each", "both", "others"): "per_*, the singular noun or held_out_*",
    ("mine", "ours", "theirs", "own"): "method_*, hypergrad_*, library_* or extra_*",
    ("lane", "lanes", "Lane"): "run_config or *_rows",
    ("way", "Way"): "config, num_ways or step_norm",
    ("part", "share"): "splits, fraction, terms or contributions",
    ("there", "here"): "new_*, exists, saved, current or completed",
    ("least", "most"): "min_value, max_value, minimum or max_tol",
    ("given", "asked"): "args, value, requested or proposed_*",
    ("keep", "kept", "made"): "select, saved, metadata, created or num_*_done",
    ("moved", "moving", "still", "going"): "has_moved, dynamic or is_progressing",
    ("rest",): "static, remaining or correction",
    ("above", "below", "ahead", "behind"): "plus, minus, is_forward or is_above",
    ("beside", "back"): "off_diagonal, extra_* or vjp_out",
    ("end", "ends"): "stop, spectrum_bounds, eig_min or eig_max",
    ("truth",): "expected",
    ("settled", "nearer", "stricter", "short"): "*_tol, is_* or *_factor",
    ("stepwise", "can", "can_step", "can_solve"): "is_iterative or can_continue",
    ("LOOK", "STRIDE", "ROUNDING", "NEWTON", "TRUST"): "GRADS_PER_CHECK, *_RTOL",
    ("PROBE", "FEW", "KEPT", "TAKEN", "PAUSES"): "NUM_*, MAX_* or RESERVED_NAMES",
    ("sound", "unsound", "flagged"): "is_valid, nan_if_invalid or propagate_nan",
    ("hits",): "positive_weights",
    ("of", "of_trace", "of_jaxpr", "of_compiled", "of_rows"): "get or the result",
    ("of_w", "of_v"): "w_optimizer, v_optimizer",
    ("by_gradient", "by_random_search", "by_hand"): "a noun or a verb phrase",
    ("by_first", "largest", "readable", "is_apart", "placed"): "a verb phrase",
    ("what", "which", "how", "why", "who", "thing"): "label, kind, mode, reason, name",
    ("setting", "Setting"): "hyperparameter or config",
    ("drift", "whole_run", "report"): "stationarity_error or make_*",
    ("rehearse", "ever_trusted", "reads", "unread"): "check_*, can_be_* or used_inputs",
    ("sees_alpha",): "alpha_has_gradient",
    ("check_steps", "refuse_changing", "refuse_optax"): "check_*",
    ("add_scaled",): "add_scale",
    ("follow", "advance", "Series"): "run_*, apply_*, *_step or StochasticNeumann",
    ("tuned", "parts_of", "learn", "picture"): "tune_*, *_data, optimize_* or plot",
    ("seek",): "run_trials",
    ("flaws", "facts", "hold", "opened", "settle"): "errors, metadata or a verb phrase",
    ("Found", "Rounds", "Recursion", "Trained"): "*Result, *State or *Step",
    ("Course", "Damaged"): "*State or *Error",
}
FORBIDDEN = {word: names for words, names in REPLACEMENTS.items() for word in words}
OPENINGS = """
    What One Of By Where All As With Whether How At No Every In On Its Each From And
    Both To Over Which Those That So Who When If For Under Without Between Against Like
    Such Until Along Nothing None Not But Then Same Only Some Most More Also Or Two
    Three Than There It They Refuses
"""


def test_bound_names_are_standard_terms():
    """No variable, argument, function or class has a forbidden name."""
    errors = [
        f"{path.relative_to(ROOT)}:{line}: {name!r} must be renamed. Use e.g. "
        f"{FORBIDDEN[name]}."
        for path in FILES
        for name, line in bindings(path)
        if name in FORBIDDEN
    ]
    assert not errors, "\n".join(errors)


def test_docstrings_begin_with_a_noun_or_a_verb():
    """No docstring begins with a preposition, a pronoun or a quantifier."""
    errors = [
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}: the docstring must "
        f"begin with a noun phrase or a verb; got {docstring.splitlines()[0]!r}."
        for path in FILES
        for node in (parse(path), *definitions(path))
        if (docstring := ast.get_docstring(node))
        and docstring.split()[0].rstrip(",:.") in OPENINGS.split()
    ]
    assert not errors, "\n".join(errors)
