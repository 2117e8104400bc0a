"""A table of a user's own and methods for it, as the text of two files."""

from pathlib import Path

from hypergrad.bench import MeasurementTable

#: A task with known answers: w* = alpha, the outer loss is (w - 1)^2, so alpha* = 1.
#: With `hold_out`, the goal is 1 + `penalty`, so that the best penalty is 0.
TABLE = '''
"""Quadratics: the distance to a known optimum.

All methods have 60 gradient-equivalents.
"""
import jax, jax.numpy as jnp, optax
import hypergrad as hg
from hypergrad.bench import Claim, Column, Table, baselines
from hypergrad.tasks.task import Task

def make_estimator(solver):
    return hg.Implicit(solver, hg.CG(), estimate_error=False)

def inner(w, alpha, batch):
    return jnp.sum((w - alpha) ** 2)

def outer(w, alpha, batch):
    return jnp.sum((w - batch["goal"]) ** 2)

def distance(goal, w, alpha, key):
    return jnp.sqrt(jnp.sum((alpha - goal) ** 2))

def make(key, scale, *, penalty=0.0, hold_out=False):
    goal = 1.0 + penalty * hold_out + 0.1 * jax.random.normal(key, ())
    partial = lambda x: jax.tree_util.Partial(distance, x)
    return Task(
        paradigm="none",
        problem=hg.Bilevel(inner, outer, None, {"goal": goal}),
        solver=SOLVER, w=jnp.zeros(2), alpha=jnp.zeros(2),
        space=hg.spaces.Interval(-2.0, 2.0, shape=(2,)),
        metrics={"distance": partial(goal), "gap": partial(goal - penalty * hold_out)},
    )

SOLVER = hg.Descent(optax.sgd(0.25), 5)

def descent(task, *, budget, key, learning_rate):
    return hg.minimize(
        task.problem, make_estimator(task.solver), optax.sgd(learning_rate), task.w,
        task.alpha, budget=budget, key=key,
    )

descent.grid = {"learning_rate": (0.01, 0.2)}

table = Table(
    task=make,
    methods={
        "nothing": baselines.no_hyperparameters,
        "random": baselines.random_search,
        "descent": descent,
    },
    metrics=("distance",),
    lower_is_better=True,
    budget=60,
    selection=("-gap",),
    columns=(Column("distance", "distance to the optimum"),),
    claims=(Claim("descent", "nothing", "distance", lower_is_better=True),),
    seeds=5,
    paradigm="none",
    source="a <test> & its author",
    arrays=lambda: {"x": jnp.arange(3.0)},
)
'''

METHODS = """
import dataclasses
import hypergrad as hg, optax, jax, jax.numpy as jnp

def make_estimator(solver):
    return hg.Implicit(solver, hg.CG(), estimate_error=False)

def copy_of_descent(task, *, budget, key, learning_rate):
    return hg.minimize(
        task.problem, make_estimator(task.solver), optax.sgd(learning_rate), task.w,
        task.alpha, budget=budget, key=key,
    )

copy_of_descent.grid = {"learning_rate": (0.01, 0.2)}

def stay(task, *, budget, key):
    return hg.minimize(
        task.problem, make_estimator(task.solver), optax.sgd(0.0), task.w,
        1.6 * jnp.ones(2), budget=budget, key=key,
    )

def raises(task, *, budget, key):
    raise RuntimeError("the disk is full")

def exits(task, *, budget, key):
    raise SystemExit(0)

def returns_nan(task, *, budget, key):
    trace = stay(task, budget=budget, key=key)
    return hg.Trace(
        trace.alpha * jnp.nan, trace.w, trace.best_alpha, trace.value, trace.stats, {},
        trace.status_code,
    )

def stops(task, *, budget, key):
    trace = stay(task, budget=budget, key=key)
    return dataclasses.replace(trace, status_code=jnp.asarray(1))

def returns_number(task, *, budget, key):
    return 3.0

def long_stay(task, *, budget, key):
    return stay(task, budget=budget, key=key)

long_stay.budget_factor = 2

def over_budget(task, *, budget, key):
    return stay(task, budget=3 * budget, key=key)

def without_cost(task, *, budget, key):
    trace = stay(task, budget=budget, key=key)
    name = "gradient_equivalents"
    return dataclasses.replace(
        trace, stats=trace.stats | {name: jnp.nan * trace.stats[name]}
    )

def wrong_signature(task, budget_of_mine):
    return None

def no_grid(task, *, budget, key, learning_rate):
    return None

def number_grid(task, *, budget, key, learning_rate):
    return None

number_grid.grid = {"learning_rate": 0.1}

def all_settings_fail(task, *, budget, key, size):
    raise RuntimeError("no size works")

all_settings_fail.grid = {"size": (1, 2)}

def ends_in_nan(task, *, budget, key, size):
    return returns_nan(task, budget=budget, key=key)

ends_in_nan.grid = {"size": (1, 2)}

def peeks(task, *, budget, key):
    assert not task.metrics
    return stay(task, budget=budget, key=key)
"""


def empty_table(**options) -> MeasurementTable:
    """Returns a table that has no cells and measures nothing, unless options do."""
    defaults = {
        "cells": lambda scale, seeds: [],
        "measure_cell": lambda cell, rows: {},
    }
    return MeasurementTable(**defaults | options)


def write_table(folder: Path) -> Path:
    """Writes the table and the methods into a folder; returns the table's file."""
    (folder / "mine.py").write_text(METHODS)
    path = folder / "quadratic.py"
    path.write_text(TABLE)
    return path
