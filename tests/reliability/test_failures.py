"""Invalid input raises an error before any compiled program runs."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.spaces import Interval, Real, Unit
from tests.loops import TO_ZERO, run_loop

EVALUATED = []


def watch(loss):
    """Returns the loss, which reports each evaluation on numbers to ``EVALUATED``."""

    @functools.wraps(loss)
    def watched_loss(w, alpha, batch):
        jax.debug.callback(lambda: EVALUATED.append(loss))
        return loss(w, alpha, batch)

    return watched_loss


@watch
def inner(w, alpha, batch):
    return jnp.sum((w - alpha) ** 2)


@watch
def outer(w, alpha, batch):
    return jnp.sum((w - 0.5) ** 2)


@watch
def inner_of_target(w, alpha, batch):
    return jnp.sum((w - alpha["target"]) ** 2)


SGD = optax.sgd(0.1)
SOLVER = hg.Descent(SGD, 3)
DEFAULTS = {
    "problem": hg.Bilevel(inner, outer),
    "estimator": hg.Implicit(SOLVER),
    "w": jnp.zeros(2),
    "alpha": jnp.ones(2),
}
ALPHA_WITH_RATE = {"target": jnp.ones(2), "rate": jnp.asarray(0.1)}


def hypergradient(problem, estimator, w, alpha, key=None):
    return hg.hypergradient(problem, estimator)(w, alpha, key)


def minimize(problem, estimator, w, alpha, **options):
    options = {"optimizer": SGD, "num_steps": 2} | options
    return run_loop(problem, estimator, w=w, alpha=alpha, **options)


def search(**changes):
    defaults = {
        "problem": DEFAULTS["problem"], "solver": SOLVER, "w": jnp.zeros(()),
        "searcher": hg.searchers.Random(), "space": Unit(), "budget": 10,
    }  # fmt: skip
    return hg.search(**defaults | changes)


def bilevel(inner_loss=inner, outer_loss=outer, *data, **options):
    return hg.Bilevel(watch(inner_loss), outer_loss, *data, **options)


def closed_form(fn):
    return hg.Implicit(hg.ClosedForm(fn))


def assert_raises(call, error, name):
    """Checks the type and the argument of an error, and that no loss was evaluated."""
    EVALUATED.clear()
    with pytest.raises(error) as raised:
        jax.block_until_ready(call())
    jax.effects_barrier()
    message = str(raised.value) + "".join(getattr(raised.value, "__notes__", []))
    assert re.search(name, message), f"{name!r} is not in: {message}"
    assert not EVALUATED


def test_watched_losses_report_their_evaluations():
    EVALUATED.clear()
    jax.block_until_ready(hypergradient(**DEFAULTS))
    jax.effects_barrier()
    assert {loss.__name__ for loss in EVALUATED} == {"inner", "outer"}


NAN = jnp.array([1.0, jnp.nan])
ROWS = hg.Batches(jnp.ones(5), 2)
ERRORS = (TypeError, ValueError)

# Input of both entry points. id: (error, argument, function that returns the changes)
INPUTS = {
    # alpha and w
    "integer alpha": (TypeError, "alpha.*hg.search", lambda: {"alpha": 1}),
    "integer leaf": (
        TypeError, r"alpha\['depth'\]", lambda: {"alpha": {"depth": jnp.arange(2)}},
    ),
    "NaN in w": (ValueError, r"w\['b'\]", lambda: {"w": {"b": NAN}}),
    # losses
    "vector loss": (
        ValueError, "inner_loss", lambda: {"problem": bilevel(lambda w, a, b: w - a)},
    ),
    "integer loss": (
        TypeError, "inner_loss",
        lambda: {"problem": bilevel(lambda w, a, b: jnp.sum(w > a))},
    ),
    "pair as loss": (
        ValueError, "inner_loss",
        lambda: {"problem": bilevel(lambda w, a, b: (jnp.sum(w - a), w))},
    ),
    "None as loss": (
        ValueError, "inner_loss.*return statement is missing",
        lambda: {"problem": bilevel(lambda w, a, b: None)},
    ),
    "vector outer loss": (
        ValueError, "outer_loss",
        lambda: {"problem": bilevel(inner, lambda w, a, b: w)},
    ),
    "counted accuracy": (
        TypeError, "outer_loss.*surrogate",
        lambda: {"problem": bilevel(inner, lambda w, a, b: jnp.sum(w == a))},
    ),
    "loss of two arguments": (
        TypeError, r"inner_loss\(w, alpha, batch\)",
        lambda: {"problem": hg.Bilevel(lambda w, a: jnp.sum(w), outer)},
    ),
    "loss of other shapes": (
        ERRORS, r"inner_loss\(w, alpha, batch\)",
        lambda: {"problem": bilevel(lambda w, a, b: jnp.ones((1, 3)) @ w)},
    ),
    "key of a constant dictionary": (
        ValueError, "outer_loss.*'temp'",
        lambda: {"problem": bilevel(inner, lambda w, a, b: w * {"rate": 2.0}["temp"])},
    ),
    # results of the solver and of init_fn
    "w of another shape": (
        ValueError, "ClosedForm.solve",
        lambda: {"estimator": closed_form(lambda alpha, batch: jnp.zeros(3))},
    ),
    "w of another dtype": (
        ValueError, "ClosedForm.solve",
        lambda: {"estimator": closed_form(lambda a, b: a.astype(jnp.float32))},
    ),
    "w of another structure": (
        ValueError, "ClosedForm.solve",
        lambda: {"estimator": closed_form(lambda alpha, batch: {"w": alpha})},
    ),
    "init_fn of another shape": (
        ValueError, "init_fn",
        lambda: {"problem": bilevel(init_fn=lambda w, alpha: jnp.zeros(3))},
    ),
    # leaves of alpha on which the hypergradient does not depend
    "rate of the optimizer": (
        ValueError, r"alpha\['rate'\].*hg.Unrolled",
        lambda: {
            "problem": bilevel(inner_of_target), "alpha": ALPHA_WITH_RATE,
            "estimator": hg.Implicit(
                hg.Descent(lambda alpha: optax.sgd(alpha["rate"]), 3)
            ),
        },
    ),
    "rate of init_fn": (
        ValueError, r"alpha\['rate'\]",
        lambda: {
            "problem": bilevel(inner_of_target, init_fn=lambda w, a: a["rate"] * w),
            "alpha": ALPHA_WITH_RATE,
        },
    ),
    "rate in dead code": (
        ValueError, r"alpha\['rate'\]",
        lambda: {
            "problem": bilevel(
                lambda w, a, b: (jnp.exp(a["rate"]), inner_of_target(w, a, b))[1]
            ),
            "alpha": ALPHA_WITH_RATE,
        },
    ),
    "rate unused under jit": (
        ValueError, r"alpha\['rate'\]",
        lambda: {
            "problem": bilevel(lambda w, a, b: jax.jit(inner_of_target)(w, a, b)),
            "alpha": ALPHA_WITH_RATE,
        },
    ),
    # batches
    "adjoint batch above the data": (
        ValueError, r"1\.\.5",
        lambda: {
            "problem": bilevel(inner, outer, ROWS, ROWS),
            "estimator": hg.Implicit(SOLVER, adjoint_batch_size=6),
        },
    ),
    "outer batch of a plain pytree": (
        ValueError, "hg.Batches",
        lambda: {
            "problem": bilevel(inner, outer, ROWS, jnp.ones(5)),
            "estimator": hg.Implicit(SOLVER, outer_batch_size=2),
        },
    ),
    "data_fn returns an array": (
        ERRORS, "data_fn",
        lambda: {"problem": bilevel(data_fn=lambda key: jax.random.normal(key, (3,)))},
    ),
    # objects of another kind
    "optimizer as solver": (
        TypeError, r"hg\.Descent", lambda: {"estimator": hg.Implicit(SGD)},
    ),
    "number as optimizer": (
        TypeError, "optimizer",
        lambda: {"estimator": hg.Implicit(hg.Descent(lambda alpha: 0.1, 3))},
    ),
    "solver as estimator": (
        TypeError, r"estimator.*hg\.Implicit", lambda: {"estimator": hg.Newton()},
    ),
    "several keys": (
        ERRORS, "key.*vmap", lambda: {"key": jax.random.split(jax.random.key(0), 3)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("entry", [hypergradient, minimize])
@pytest.mark.parametrize("case", INPUTS)
def test_invalid_input_is_named_before_it_is_used(case, entry):
    error, name, make_changes = INPUTS[case]
    assert_raises(lambda: entry(**DEFAULTS | make_changes()), error, name)


SCALARS = {"w": 0.0, "alpha": 0.5}
FAILING_METRICS = {
    "missing argument": lambda w, alpha: w,
    "vector": lambda w, alpha, key: jnp.stack([w, w]),
    "complex number": lambda w, alpha, key: 1j * w,
    "TypeError": lambda w, alpha, key: w + "text",
    "IndexError": lambda w, alpha, batch: (w - batch[1]) ** 2,
}
# Options of an entry point. id: (entry, error, argument, changes)
OPTIONS = {
    "two losses": (
        minimize, ValueError, "aggregator", {"problem": bilevel(inner, (outer, outer))},
    ),
    "two losses in search": (
        search, ValueError, "searcher",
        {"problem": bilevel(inner, (outer, outer)), "searcher": hg.searchers.CMAES()},
    ),
    "space and project": (
        minimize, ValueError, "project",
        SCALARS | {"space": Unit(), "project": lambda alpha: alpha},
    ),
    "alpha outside of the space": (
        minimize, ValueError, "alpha", SCALARS | {"alpha": 2.0, "space": Unit()},
    ),
    "space of another structure": (
        minimize, ValueError, "space", SCALARS | {"space": {"a": Unit()}},
    ),
    "space narrower than float32": (
        minimize, ValueError, "float32",
        {
            "w": jnp.zeros((), jnp.float32), "alpha": jnp.ones((), jnp.float32),
            "space": Interval(1.0, 1.0 + 1e-12),
        },
    ),
    "project to another structure": (
        minimize, ERRORS, "project", {"project": lambda alpha: (alpha, alpha)},
    ),
    "project to another shape": (
        minimize, ERRORS, "project", {"project": lambda alpha: jnp.sum(alpha)},
    ),
    "integer w in search": (search, TypeError, "w", {"w": 1}),
    "unbounded space": (search, ValueError, "space", {"space": Real()}),
    "missing leaf in the space": (
        search, ValueError, "inner_loss.*'rate'",
        {
            "problem": bilevel(lambda w, a, b: w * a["rate"]),
            "space": {"penalty": Unit()},
        },
    ),
    "empty space": (search, ValueError, "space must have", {"space": {}}),
    "two budgets": (search, ValueError, "budget", {"budget": np.array([20.0, 30.0])}),
    "vector loss in search": (
        search, ValueError, "inner_loss",
        {"problem": bilevel(lambda w, a, b: jnp.ones(2) * w)},
    ),
    "branch on a tracer in search": (
        search, jax.errors.TracerBoolConversionError, r"inner_loss\(w, alpha, batch\)",
        {"problem": bilevel(lambda w, a, b: w * a if w > 0 else w)},
    ),
    "w of another length than the data": (
        search, TypeError, r"inner_loss.*float64\[4\].*float64\[5,3\]",
        {
            "problem": bilevel(
                lambda w, a, x: jnp.sum((x @ w - a) ** 2), outer, jnp.ones((5, 3))
            ),
            "w": jnp.zeros(4),
        },
    ),
    **{
        f"metric with {case}{label}": (
            entry, (TypeError, ValueError, IndexError), r"metrics\['accuracy'\]",
            changes | {"metrics": {"accuracy": metric}},
        )
        for case, metric in FAILING_METRICS.items()
        for entry, label, changes in ((minimize, "", SCALARS), (search, ", search", {}))
    },
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_invalid_options_are_named_before_they_are_used(case):
    entry, error, name, changes = OPTIONS[case]
    defaults = DEFAULTS if entry is minimize else {}
    assert_raises(lambda: entry(**defaults | changes), error, name)


@dataclasses.dataclass
class Mutable:
    """A function that is compared by value and has no hash."""

    scale: float

    def __call__(self, w, alpha, batch):
        return self.scale * jnp.sum((w - alpha) ** 2)


# It has a hash, but not one with an array.
Frozen = dataclasses.make_dataclass(
    "Frozen", ["scale"], frozen=True, namespace={"__call__": Mutable.__call__}
)
MUTABLE, ARRAYS = Mutable(1.0), jnp.ones(1000)
# id: (error, argument, call)
CONSTRUCTORS = {
    "scalars only": (ValueError, "data", lambda: hg.Batches({"scale": 1.0})),
    "empty leaf": (
        ValueError, r"data leaf \['x'\]",
        lambda: hg.Bilevel(inner, outer, {"x": jnp.ones((0, 3))}),
    ),
    "no data": (ValueError, "with_key", lambda: hg.Batches(None)),
    "batch of keys": (
        ValueError, "with_key", lambda: hg.Batches(None, 4, with_key=True),
    ),
    "mutable inner loss": (
        TypeError, "inner_loss", lambda: hg.Bilevel(MUTABLE, outer),
    ),
    "inner loss with an array": (
        TypeError, "inner_loss must be hashable",
        lambda: hg.Bilevel(Frozen(ARRAYS), Frozen(1.0)),
    ),
    "mutable outer loss": (
        TypeError, "outer_loss", lambda: hg.Bilevel(inner, (outer, MUTABLE)),
    ),
    "mutable closed form": (TypeError, "fn", lambda: hg.ClosedForm(MUTABLE)),
    "mutable optimizer": (TypeError, "optimizer", lambda: hg.Descent(MUTABLE, 3)),
    "mutable products": (
        TypeError, "hvp_fn", lambda: hg.Implicit(hg.Newton(), hvp_fn=MUTABLE),
    ),
    "mutable composite loss": (
        TypeError, "loss_fn", lambda: hg.CompositeLoss(inner, MUTABLE),
    ),
    "mutable loss of argmin": (
        TypeError, "inner_loss", lambda: hg.argmin(MUTABLE, hg.Newton()),
    ),
    "no outer loss": (ValueError, "outer_loss", lambda: hg.Bilevel(inner, ())),
    "one outer loss is None": (
        TypeError, "outer_loss", lambda: hg.Bilevel(inner, (outer, None)),
    ),
    "vector loss of argmin": (
        ValueError, "inner_loss",
        lambda: hg.argmin(lambda w, a, b: w - a, SOLVER)(jnp.zeros(2), jnp.ones(2)),
    ),
    "NaN in w0 of argmin": (
        ValueError, "w", lambda: hg.argmin(inner, SOLVER)(NAN, 1.0),
    ),
    "integer w0 of argmin": (TypeError, "w", lambda: hg.argmin(inner, SOLVER)(1, 1.0)),
    "integer key of argmin": (
        TypeError, "key", lambda: hg.argmin(inner, SOLVER)(0.0, 1.0, None, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONSTRUCTORS)
def test_invalid_settings_are_named(case):
    error, name, call = CONSTRUCTORS[case]
    assert_raises(call, error, name)


@pytest.mark.parametrize("solver", [hg.LBFGS(), hg.Newton()], ids=["LBFGS", "Newton"])
def test_unrolled_needs_differentiable_iterations(solver):
    """Reverse mode through these solvers is NaN, wrong or impossible."""
    assert not solver.differentiable
    assert_raises(lambda: hg.Unrolled(solver), ValueError, "solver.*(\n.*)*hg.Implicit")


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda alpha: optax.lbfgs(),
        optax.masked(optax.lbfgs(), {"a": True, "b": False}),
    ],
    ids=["function of alpha", "masked"],
)
def test_unrolled_detects_lbfgs_when_it_receives_w_and_alpha(optimizer):
    w = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    loss = watch(lambda w, alpha, batch: jnp.sum((w["a"] - alpha) ** 2 + w["b"] ** 2))
    estimator = hg.Unrolled(hg.Descent(optimizer, 3))
    call = lambda: hypergradient(hg.Bilevel(loss, loss), estimator, w, jnp.ones(2))
    assert_raises(call, ValueError, "hg.Implicit")


@pytest.mark.parametrize(
    "data_fn",
    [
        lambda key: (ARRAYS, None),
        lambda key: (None, hg.Batches(np.ones(1000), 10)),
        functools.partial(lambda arrays, key: (arrays, None), ARRAYS),
        lambda key: (jax.lax.map(lambda x: x * ARRAYS[:200], jnp.ones(3)), None),
        jax.jit(lambda key: (ARRAYS + jax.random.normal(key), None)),
        jax.tree_util.Partial(lambda key: (ARRAYS, None)),
    ],
    ids=["jax", "numpy", "functools", "loop", "jit", "Partial"],
)
def test_data_fn_must_not_close_over_data(data_fn):
    make_problem = lambda: hg.Bilevel(inner, outer, data_fn=data_fn)
    assert_raises(make_problem, ValueError, r"data_fn.*jax\.tree_util\.Partial")


def test_data_fn_may_hold_data_in_a_partial_and_small_constants():
    partial = jax.tree_util.Partial(lambda arrays, key: (arrays, None), ARRAYS)
    assert len(jax.tree.leaves(hg.Bilevel(inner, outer, data_fn=partial))) == 1
    small = jnp.ones(100)
    hg.Bilevel(inner, outer, data_fn=lambda key: (small, None))


def test_data_of_data_fn_is_converted_and_checked():
    """Numbers become arrays; an array without examples raises an error."""
    inner = lambda w, alpha, batch: 0.5 * (w - alpha * batch) ** 2
    outer = lambda w, alpha, batch: 0.5 * (w - batch) ** 2
    problem = hg.Bilevel(inner, outer, data_fn=lambda key: (2.0, 1.0))
    estimate = hg.hypergradient(problem, hg.Implicit(hg.Newton()))(0.0, 1.0)
    np.testing.assert_allclose(estimate.hypergradient, 2.0)
    empty = hg.Bilevel(inner, outer, data_fn=lambda key: (jnp.zeros((0, 2)), 1.0))
    with pytest.raises(ValueError, match="data"):
        hg.hypergradient(empty, hg.Implicit(hg.Newton()))(0.0, 1.0)


READERS = {
    "directly": lambda rate: 3 * rate,
    "jit": jax.jit(lambda rate: 3 * rate),
    "scan": lambda rate: jax.lax.scan(
        lambda carry, _: (carry + rate, None), jnp.zeros(()), None, length=3
    )[0],
    "cond": lambda rate: jax.lax.cond(
        rate > 0, lambda r: 3 * r, jnp.zeros_like, rate
    ),
    "custom rule": lambda rate: 3 * jax.nn.relu(rate),
}  # fmt: skip


@pytest.mark.parametrize("case", READERS)
def test_a_leaf_of_the_outer_loss_only_has_the_direct_term(case):
    """dM/drate = 3, however deep in the outer loss the leaf is used."""
    outer_loss = lambda w, alpha, batch: (
        outer(w, alpha, batch) + READERS[case](alpha["rate"])
    )
    problem = hg.Bilevel(inner_of_target, outer_loss)
    estimate = hypergradient(
        problem, DEFAULTS["estimator"], jnp.zeros(2), ALPHA_WITH_RATE
    )
    np.testing.assert_allclose(estimate.hypergradient["rate"], 3.0, rtol=1e-12)


def test_nan_in_a_traced_alpha_is_not_trusted():
    """Numbers raise no error under ``jit``."""
    hypergradient_fn = jax.jit(
        lambda alpha: hypergradient(**DEFAULTS | {"alpha": alpha})
    )
    assert hypergradient_fn(jnp.ones(2)).stats["trusted"].dtype == bool
    estimate = hypergradient_fn(NAN)
    assert not estimate.stats["trusted"]
    assert np.isnan(estimate.value)


@pytest.mark.parametrize("truncation_length", [None, 5])
@pytest.mark.parametrize("factor", [0.0, 1.0], ids=["unused", "stop_gradient"])
def test_unrolled_names_a_leaf_without_a_derivative(truncation_length, factor):
    inner = lambda w, alpha, batch: (
        0.5 * (w - alpha["used"]) ** 2
        + (jax.lax.stop_gradient(alpha["lost"]) * w if factor else 0.0)
    )
    problem = hg.Bilevel(inner, lambda w, alpha, batch: w**2)
    solver = hg.Descent(optax.sgd(0.5), 10)
    estimator = hg.Unrolled(solver, truncation_length=truncation_length)
    with pytest.raises(ValueError, match=r"alpha\['lost'\]"):
        hg.hypergradient(problem, estimator)(0.0, {"used": 1.0, "lost": 1.0})


class IncompleteSolver:
    """A solver that returns only a part of ``(w, stats)``."""

    differentiable = False

    def __init__(self, result_fn):
        self.result_fn = result_fn

    def solve(self, inner_loss, w, alpha, data, key):
        return self.result_fn(w)


@pytest.mark.parametrize(
    "result_fn",
    [lambda w: w, lambda w: (w, {}), lambda w: (w, None), lambda w: (w, (1, 2))],
    ids=["no pair", "no counts", "None as counts", "tuple as counts"],
)
def test_an_incomplete_result_of_a_solver_is_named(result_fn):
    estimator = hg.Implicit(IncompleteSolver(result_fn))
    with pytest.raises(ERRORS, match=r"IncompleteSolver\.solve"):
        hg.hypergradient(TO_ZERO, estimator)(1.0, 1.0)


def test_a_search_raises_under_transformations():
    run_search = lambda key: search(problem=TO_ZERO, key=key)
    with pytest.raises(TypeError, match="search"):
        jax.jit(run_search)(jax.random.key(0))
