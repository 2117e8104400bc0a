"""Invalid arguments: each raises an error that names the argument.

`ARGUMENTS` holds the arguments and `INVALID` the invalid values of each kind;
hypothesis samples further values of the same kinds. Nothing here is compiled.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hypergrad as hg
from hypergrad import objectives, searchers, spaces, surrogates
from tests.loops import TO_ZERO, run_loop

SGD = optax.sgd(0.1)
SOLVER = hg.Descent(SGD, 3)
ESTIMATOR = hg.Implicit(SOLVER)
UNIT = spaces.Unit()

INVALID: dict[str, dict[str, Any]] = {
    "count": {
        "zero": 0, "negative": -3, "fraction": 1.5, "whole float": 2.0, "bool": True,
        "text": "3", "list": [3], "NaN": float("nan"), "array": np.array(2),
    },
    "count or zero": {"negative": -3, "fraction": 1.5, "bool": True, "text": "3"},
    "number": {
        "text": "0.1", "list": [0.1], "tuple": (0.1,), "dict": {"a": 0.1},
        "object": object(), "bytes": b"1", "array of text": np.array("a"), "bool": True,
    },
    "several numbers": {
        "vector": np.array([0.1, 0.2]), "vector of one": jnp.array([0.1]),
        "matrix": jnp.full((2, 2), 0.1), "empty": np.zeros(0),
    },
    "optimizer": {
        "number": 0.1, "text": "sgd", "not called": optax.sgd, "none": None, "list": [],
        "state": SGD.init(1.0), "solver": hg.Newton(),
        "schedule": optax.cosine_decay_schedule(0.1, 10),
    },
    "shape": {"negative": -2, "fraction": 2.5, "whole float": (2.0,), "text": "ab"},
    "solver": {
        "class": hg.Newton, "text": "newton", "none": None, "number": 3,
        "optax": SGD, "function": abs, "estimator": hg.Implicit(hg.Newton()),
    },
    "linear solver": {
        "class": hg.CG, "text": "cg", "number": 3, "solver": hg.Newton(),
        "function": abs,
    },
    "estimator": {
        "class": hg.Implicit, "text": "implicit", "none": None, "number": 1,
        "solver": hg.Newton(), "function": abs,
    },
    "problem": {
        "class": hg.Bilevel, "none": None, "text": "problem", "function": abs,
        "tuple": (abs, abs), "solver": hg.Newton(),
    },
    "below zero": {
        "negative": -1e-3, "an integer": -1, "NaN": float("nan"),
        "array": jnp.array(-1e-3),
    },
    "function": {"number": 1.0, "text": "loss", "list": [], "array": np.ones(2)},
    "array": {
        "text": "w", "none": None, "empty": {}, "object": object(),
        "integers": np.arange(3), "bool": True, "text in a tree": {"a": "b"},
        "NaN": np.array([1.0, np.nan]), "function": abs, "complex": np.array(1j),
    },
    "key": {
        "number": 0, "text": "key", "float": 0.5, "list": [0, 1], "function": abs,
        "several": jax.random.split(jax.random.key(0)),
    },
    "data": {
        "text": "data", "object": object(), "empty": np.zeros((0, 3)),
        "text in a tree": {"x": np.array(["a", "b"])}, "function": abs,
    },
    "space": {
        "text": "unit", "number": 1.0, "class": spaces.Positive, "function": abs,
        "another structure": {"a": UNIT}, "list": [UNIT, UNIT],
    },
    "searcher": {
        "class": searchers.Random, "none": None, "text": "random",
        "estimator": ESTIMATOR, "number": 3,
    },
    "budget": {
        "zero": 0.0, "negative": -1.0, "infinite": float("inf"), "NaN": float("nan"),
        "text": "10", "none": None, "list": [10.0],
    },
    "limit": {
        "zero": 0, "negative": -1.0, "NaN": float("nan"), "text": "1", "bool": True,
        "list": [1.0], "vector": np.array([1.0, 2.0]),
    },
    "metrics": {
        "list": [abs], "function": abs, "not a function": {"a": 1.0},
        "text": "accuracy", "name that is a number": {1: abs},
    },
    "model's name": {
        "empty": "", "folder above": "../m", "path": "m/n", "hidden": ".m",
        "blank": "m n", "version": "m@1", "none": None, "number": 3, "bytes": b"m",
    },
    "leaf": {
        "text": "w", "none": None, "empty": {}, "object": object(), "function": abs,
        "text in a tree": {"a": "b"}, "array of text": np.array("a"), "class": dict,
        "dates": np.array(["2026-01-01"], "M8[D]"), "objects": np.array([None]),
        "above 64 bits": {"a": [2**64]}, "below 64 bits": {"a": [-(2**63) - 1]},
    },
    "model's metrics": {
        "list": [1.0], "number": 1.0, "text in it": {"a": "b"}, "array in it":
        {"a": np.ones(2)}, "none in it": {"a": None}, "name that is a number": {1: 1.0},
        "number as text": {"a": "0.5"}, "bytes in it": {"a": b"0.5"},
        "list in it": {"a": [0.5]},
    },
    "json": {
        "list": [1], "text": "seed", "number": 1, "zero": 0, "NaN in it": {"a": np.nan},
        "array in it": {"a": np.ones(2)}, "function in it": {"a": abs},
    },
    "saved problem": {
        "class": hg.Bilevel, "text": "problem", "function": abs, "solver": hg.Newton(),
    },
    "folder": {"none": None, "number": 1, "bytes": b"runs", "list": ["runs"]},
}  # fmt: skip


def minimize(**changes: Any) -> hg.Trace:
    defaults = {
        "problem": TO_ZERO, "estimator": ESTIMATOR, "optimizer": SGD, "w": 0.0,
        "alpha": 0.5, "num_steps": 2,
    }  # fmt: skip
    return run_loop(**defaults | changes)


def search(**changes: Any) -> hg.Trace:
    defaults = {
        "problem": TO_ZERO, "solver": SOLVER, "searcher": searchers.Random(), "w": 0.0,
        "space": UNIT, "budget": 10.0,
    }  # fmt: skip
    return hg.search(**defaults | changes)


def estimate(
    estimator: Any = ESTIMATOR, problem: Any = TO_ZERO, w=0.0, alpha=0.5, **options
):
    return hg.hypergradient(problem, estimator)(w, alpha, **options)


def certify(**changes: Any) -> hg.Certificate:
    return hg.certify(**{"problem": TO_ZERO, "w": 0.0, "alpha": 0.5} | changes)


def save(**changes: Any) -> hg.models.Model:
    defaults = {"name": "m", "w": 0.0, "alpha": 0.5, "folder": "/proc/hypergrad"}
    return hg.models.save(**defaults | changes)


# (argument, kind of its invalid values, function or class, call with the value)
Call = Callable[[Any], Any]
ARGUMENTS: list[tuple[str, str, str, Call]] = [
    # Counts.
    ("num_steps", "count or zero", "Descent", lambda x: hg.Descent(SGD, x)),
    ("max_steps", "count", "Newton", lambda x: hg.Newton(x)),
    ("max_steps", "count", "LBFGS", lambda x: hg.LBFGS(x)),
    ("memory_size", "count", "LBFGS", lambda x: hg.LBFGS(memory_size=x)),
    ("max_steps", "count", "CG", lambda x: hg.CG(max_steps=x)),
    ("max_steps", "count", "MINRES", lambda x: hg.MINRES(max_steps=x)),
    ("num_terms", "count", "Neumann", lambda x: hg.Neumann(x)),
    ("rank", "count", "Nystrom", lambda x: hg.Nystrom(x)),
    ("rank", "count", "NystromCG", lambda x: hg.NystromCG(x)),
    ("truncation_length", "count", "Unrolled", lambda x: hg.Unrolled(SOLVER, x)),
    ("shape", "shape", "Unit", lambda x: spaces.Unit(x)),
    ("shape", "shape", "Integer", lambda x: spaces.Integer(0, 3, shape=x)),
    ("max_stored_bytes", "count or zero", "Unrolled",
     lambda x: hg.Unrolled(SOLVER, max_stored_bytes=x)),
    ("num_samples", "count", "Average", lambda x: hg.Average(ESTIMATOR, x)),
    ("num_terms", "count", "FixedPoint", lambda x: hg.FixedPoint(SOLVER, x)),
    ("num_pairs", "count", "Evolution", lambda x: hg.Evolution(SOLVER, 0.1, x)),
    ("unroll_length", "count", "PersistentEvolution",
     lambda x: hg.PersistentEvolution(SOLVER, unroll_length=x)),
    ("num_steps", "count", "Reversible", lambda x: hg.Reversible(0.1, 0.9, x)),
    ("num_steps", "count", "F2SA", lambda x: hg.F2SA(SGD, x, penalty=1.0)),
    ("num_steps", "count", "BOME", lambda x: hg.BOME(SGD, x, step_size=0.1)),
    ("num_directions", "count", "PZOBO", lambda x: hg.PZOBO(SGD, 2, x)),
    ("period", "count", "SRBA", lambda x: hg.SRBA(SGD, x)),
    ("num_terms", "count", "TTSA", lambda x: hg.TTSA(SGD, x, step_size=0.1)),
    ("num_adjoint_steps", "count", "AmIGO", lambda x: hg.AmIGO(SGD, 2, x)),
    ("adjoint_batch_size", "count", "Implicit",
     lambda x: hg.Implicit(SOLVER, adjoint_batch_size=x)),
    ("outer_batch_size", "count", "Implicit",
     lambda x: hg.Implicit(SOLVER, outer_batch_size=x)),
    ("outer_batch_size", "count", "Unrolled",
     lambda x: hg.Unrolled(SOLVER, outer_batch_size=x)),
    ("num_newton_steps", "count or zero", "Implicit",
     lambda x: hg.Implicit(SOLVER, num_newton_steps=x)),
    ("num_newton_steps", "count", "certify", lambda x: certify(num_newton_steps=x)),
    ("batch_size", "count", "Batches", lambda x: hg.Batches(np.ones((4, 2)), x)),
    ("num_steps", "count", "minimize", lambda x: minimize(num_steps=x)),
    ("trials_per_batch", "count", "Parallel", lambda x: hg.Parallel(x)),
    ("eval_every", "count", "minimize", lambda x: minimize(eval_every=x)),
    ("certify_every", "count", "minimize", lambda x: minimize(certify_every=x)),
    ("num", "count", "Grid", lambda x: searchers.Grid(x)),
    ("population_size", "count", "PopulationBasedTraining",
     lambda x: searchers.PopulationBasedTraining(x)),
    ("num_candidates", "count", "SuccessiveHalving",
     lambda x: searchers.SuccessiveHalving(x)),
    ("eta", "count", "Hyperband", lambda x: searchers.Hyperband(x)),
    ("eval_batch_size", "count", "OneShot", lambda x: searchers.OneShot(x)),
    ("period", "count", "AugmentedLagrangian",
     lambda x: objectives.AugmentedLagrangian(1.0, period=x)),
    ("k", "count", "NDCG", lambda x: surrogates.NDCG(x)),
    ("k", "count", "TopKAccuracy", lambda x: surrogates.TopKAccuracy(x)),
    ("num_bins", "count", "CalibrationError", lambda x: surrogates.CalibrationError(x)),
    # Numbers.
    ("rtol", "number", "CG", lambda x: hg.CG(x)),
    ("step_size", "number", "Neumann", lambda x: hg.Neumann(3, x)),
    ("tolerance", "number", "Newton", lambda x: hg.Newton(tolerance=x)),
    ("rtol", "below zero", "CG", lambda x: hg.CG(x)),
    ("rtol", "below zero", "MINRES", lambda x: hg.MINRES(x)),
    ("rtol", "below zero", "NystromCG", lambda x: hg.NystromCG(2, x)),
    ("damping", "below zero", "NystromCG", lambda x: hg.NystromCG(2, damping=x)),
    ("damping", "below zero", "Nystrom", lambda x: hg.Nystrom(2, x)),
    ("damping", "below zero", "Implicit", lambda x: hg.Implicit(SOLVER, damping=x)),
    ("tolerance", "below zero", "Newton", lambda x: hg.Newton(tolerance=x)),
    ("tolerance", "below zero", "LBFGS", lambda x: hg.LBFGS(tolerance=x)),
    ("damping", "number", "Nystrom", lambda x: hg.Nystrom(2, x)),
    ("damping", "number", "Implicit", lambda x: hg.Implicit(SOLVER, damping=x)),
    ("rtol", "number", "Implicit", lambda x: hg.Implicit(SOLVER, rtol=x)),
    ("sigma", "number", "Evolution", lambda x: hg.Evolution(SOLVER, x)),
    ("epsilon", "number", "CentralDifference",
     lambda x: hg.CentralDifference(SOLVER, x)),
    ("strength", "number", "Penalty", lambda x: hg.Penalty(SOLVER, x)),
    ("step_size", "number", "StocBiO", lambda x: hg.StocBiO(SGD, 2, 2, step_size=x)),
    ("momentum", "number", "FSLA", lambda x: hg.FSLA(SGD, momentum=x)),
    ("penalty", "number", "F2SA", lambda x: hg.F2SA(SGD, 2, penalty=x)),
    ("perturbation", "number", "PopulationBasedTraining",
     lambda x: searchers.PopulationBasedTraining(4, perturbation=x)),
    ("step_size", "number", "Reinforce", lambda x: searchers.Reinforce(x)),
    ("rtol", "number", "certify", lambda x: certify(rtol=x)),
    ("strong_convexity", "number", "certify", lambda x: certify(strong_convexity=x)),
    ("rtol", "several numbers", "CG", lambda x: hg.CG(x)),
    ("tolerance", "several numbers", "Newton", lambda x: hg.Newton(tolerance=x)),
    ("damping", "several numbers", "Implicit",
     lambda x: hg.Implicit(SOLVER, damping=x)),
    ("sigma", "several numbers", "Evolution", lambda x: hg.Evolution(SOLVER, x)),
    ("sigma", "several numbers", "PersistentEvolution",
     lambda x: hg.PersistentEvolution(SOLVER, x)),
    ("epsilon", "several numbers", "CentralDifference",
     lambda x: hg.CentralDifference(SOLVER, x)),
    ("strength", "several numbers", "Penalty", lambda x: hg.Penalty(SOLVER, x)),
    ("step_size", "several numbers", "StocBiO",
     lambda x: hg.StocBiO(SGD, 2, 2, step_size=x)),
    ("momentum", "several numbers", "FSLA", lambda x: hg.FSLA(SGD, momentum=x)),
    ("eta", "several numbers", "BOME",
     lambda x: hg.BOME(SGD, 2, step_size=0.1, eta=x)),
    ("step_size", "several numbers", "Reinforce", lambda x: searchers.Reinforce(x)),
    ("perturbation", "several numbers", "PopulationBasedTraining",
     lambda x: searchers.PopulationBasedTraining(4, perturbation=x)),
    ("step_size", "several numbers", "FiniteDifference",
     lambda x: hg.FiniteDifference(SOLVER, step_size=x)),
    ("rtol", "several numbers", "certify", lambda x: certify(rtol=x)),
    # Objects that are combined.
    ("optimizer", "optimizer", "Descent", lambda x: hg.Descent(x, 3)),
    ("optimizer", "optimizer", "SOBA", lambda x: hg.SOBA(x)),
    ("optimizer", "optimizer", "StocBiO", lambda x: hg.StocBiO(x, 2, 2, step_size=0.1)),
    ("optimizer", "optimizer", "minimize", lambda x: minimize(optimizer=x)),
    ("solver", "solver", "Implicit", lambda x: estimate(hg.Implicit(x))),
    ("solver", "solver", "Penalty", lambda x: estimate(hg.Penalty(x, 1.0))),
    ("solver", "solver", "Unrolled", lambda x: hg.Unrolled(x)),
    ("solver", "solver", "Forward", lambda x: hg.Forward(x)),
    ("solver", "solver", "FixedPoint", lambda x: hg.FixedPoint(x, 3)),
    ("solver", "solver", "search", lambda x: search(solver=x)),
    ("solver", "solver", "argmin", lambda x: hg.argmin(TO_ZERO.inner_loss, x)),
    ("linear_solver", "linear solver", "Implicit",
     lambda x: estimate(hg.Implicit(SOLVER, x))),
    ("linear_solver", "linear solver", "argmin",
     lambda x: hg.argmin(TO_ZERO.inner_loss, SOLVER, x)),
    ("estimator", "estimator", "hypergradient", lambda x: estimate(x)),
    ("estimator", "estimator", "minimize", lambda x: minimize(estimator=x)),
    ("estimator", "estimator", "Average", lambda x: hg.Average(x)),
    ("searcher", "searcher", "search", lambda x: search(searcher=x)),
    # Problems and their data.
    ("problem", "problem", "hypergradient", lambda x: estimate(problem=x)),
    ("problem", "problem", "minimize", lambda x: minimize(problem=x)),
    ("problem", "problem", "search", lambda x: search(problem=x)),
    ("problem", "problem", "certify", lambda x: certify(problem=x)),
    ("inner_loss", "function", "Bilevel", lambda x: hg.Bilevel(x, abs)),
    ("outer_loss", "function", "Bilevel", lambda x: hg.Bilevel(abs, x)),
    ("init_fn", "function", "Bilevel", lambda x: hg.Bilevel(abs, abs, init_fn=x)),
    ("data_fn", "function", "Bilevel", lambda x: hg.Bilevel(abs, abs, data_fn=x)),
    ("inner_loss", "function", "argmin", lambda x: hg.argmin(x, SOLVER)),
    ("fn", "function", "ClosedForm", lambda x: hg.ClosedForm(x)),
    ("hvp_fn", "function", "Implicit", lambda x: hg.Implicit(SOLVER, hvp_fn=x)),
    ("model_fn", "function", "CompositeLoss", lambda x: hg.CompositeLoss(x, abs)),
    ("loss_fn", "function", "CompositeLoss", lambda x: hg.CompositeLoss(abs, x)),
    ("regularizer", "function", "CompositeLoss",
     lambda x: hg.CompositeLoss(abs, abs, x)),
    ("data", "data", "Batches", lambda x: hg.Batches(x)),
    ("data", "data", "Bilevel, inner", lambda x: hg.Bilevel(abs, abs, x)),
    ("data", "data", "Bilevel, outer", lambda x: hg.Bilevel(abs, abs, None, x)),
    # Points, spaces and keys.
    ("w", "array", "hypergradient", lambda x: estimate(w=x)),
    ("alpha", "array", "hypergradient", lambda x: estimate(alpha=x)),
    ("w", "array", "minimize", lambda x: minimize(w=x)),
    ("alpha", "array", "minimize", lambda x: minimize(alpha=x)),
    ("w", "array", "search", lambda x: search(w=x)),
    ("w", "array", "certify", lambda x: certify(w=x)),
    ("key", "key", "hypergradient", lambda x: estimate(key=x)),
    ("key", "key", "minimize", lambda x: minimize(key=x)),
    ("key", "key", "search", lambda x: search(key=x)),
    ("key", "key", "certify", lambda x: certify(key=x)),
    ("space", "space", "minimize", lambda x: minimize(space=x)),
    ("space", "space", "sample", lambda x: spaces.forward(x, 0.5)),
    ("budget", "budget", "search", lambda x: search(budget=x)),
    # Functions that a run calls.
    ("project", "function", "minimize", lambda x: minimize(project=x)),
    ("outer_data_fn", "function", "minimize", lambda x: minimize(outer_data_fn=x)),
    ("progress", "function", "minimize", lambda x: minimize(progress=x)),
    ("progress", "function", "search", lambda x: search(progress=x)),
    ("trial_callback", "function", "search", lambda x: search(trial_callback=x)),
    ("executor", "function", "Parallel", lambda x: hg.Parallel(2, x)),
    ("parallel", "function", "search", lambda x: search(parallel=x)),
    ("rtol", "limit", "certify", lambda x: certify(rtol=x)),
    ("strong_convexity", "limit", "certify", lambda x: certify(strong_convexity=x)),
    ("budget", "limit", "minimize", lambda x: minimize(budget=x)),
    ("time_limit", "limit", "minimize", lambda x: minimize(time_limit=x)),
    ("memory_limit", "limit", "minimize", lambda x: minimize(memory_limit=x)),
    ("metrics", "metrics", "minimize", lambda x: minimize(metrics=x)),
    ("metrics", "metrics", "search", lambda x: search(metrics=x)),
    # Saved models.
    ("name", "model's name", "save", lambda x: save(name=x)),
    ("w", "leaf", "save", lambda x: save(w=x)),
    ("alpha", "leaf", "save", lambda x: save(alpha=x)),
    ("metrics", "model's metrics", "save", lambda x: save(metrics=x)),
    ("run", "json", "save", lambda x: save(run=x)),
    ("problem", "saved problem", "save", lambda x: save(problem=x)),
    ("folder", "folder", "save", lambda x: save(folder=x)),
    ("folder", "folder", "load", lambda x: hg.models.load("m", folder=x)),
    ("folder", "folder", "find", lambda x: hg.models.find(x)),
]  # fmt: skip


def assert_raises_by_name(argument: str, call: Call, value: Any, label: str) -> None:
    """Raises AssertionError unless ``call`` raises an error that names the argument."""
    message = None
    try:
        call(value)
    except (TypeError, ValueError) as error:
        message = str(error)
    assert message is not None, f"{label}: {value!r} is accepted"
    assert re.search(rf"\b{argument}\b", message), f"{label}: {message}"


def test_the_arguments_are_many_and_different():
    labels = [(where, argument, kind) for argument, kind, where, _ in ARGUMENTS]
    assert len(set(labels)) == len(labels)
    assert sum(len(INVALID[kind]) for _, _, kind in labels) >= 600


# Equinox warns of an array in the place of a static field before the error is raised.
@pytest.mark.filterwarnings("ignore:A JAX array is being set as static")
@pytest.mark.parametrize("kind", INVALID)
def test_invalid_arguments_are_named(kind: str):
    for argument, argument_kind, where, call in ARGUMENTS:
        if argument_kind == kind:
            for description, value in INVALID[kind].items():
                label = f"{where}, {argument}, {description}"
                assert_raises_by_name(argument, call, value, label)


# Further invalid values of the same kinds.
SAMPLED = {
    "count": st.one_of(
        st.integers(max_value=0),
        st.floats(),
        st.text(),
        st.lists(st.integers(), max_size=2),
        st.booleans(),
    ),
    "count or zero": st.one_of(st.integers(max_value=-1), st.floats(), st.text()),
    "number": st.one_of(
        st.text(), st.binary(), st.lists(st.floats(), max_size=2), st.booleans()
    ),
    "optimizer": st.one_of(st.text(), st.floats(), st.lists(st.integers(), max_size=2)),
    "estimator": st.one_of(st.text(), st.integers(), st.none()),
    "problem": st.one_of(st.text(), st.integers(), st.none()),
    "function": st.one_of(st.text(), st.floats(), st.integers(), st.binary()),
    "key": st.one_of(st.integers(), st.floats(), st.text()),
    "space": st.one_of(st.text(), st.floats()),
    "searcher": st.one_of(st.text(), st.integers(), st.none()),
    "budget": st.one_of(
        st.floats(max_value=0), st.text(), st.just(np.inf), st.just(np.nan)
    ),
}


@settings(deadline=None, max_examples=10)
@given(data=st.data())
@pytest.mark.parametrize("kind", SAMPLED)
def test_sampled_invalid_arguments_are_named(kind: str, data):
    value = data.draw(SAMPLED[kind])
    for argument, argument_kind, where, call in ARGUMENTS:
        if argument_kind == kind:
            assert_raises_by_name(argument, call, value, f"{where}, {argument}")
