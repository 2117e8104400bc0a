"""Bad input: refused by type and in words, before any compiled program runs."""

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
from tests.loops import run_loop

EXECUTED = []


def watched(loss):
    """The loss, telling the host whenever it is evaluated on numbers."""

    @functools.wraps(loss)
    def watched_loss(w, alpha, batch):
        jax.debug.callback(lambda: EXECUTED.append(loss))
        return loss(w, alpha, batch)

    return watched_loss


@watched
def inner(w, alpha, batch):
    return jnp.sum((w - alpha) ** 2)


@watched
def outer(w, alpha, batch):
    return jnp.sum((w - 0.5) ** 2)


@watched
def inner_of_rate(w, alpha, batch):
    return jnp.sum((w - alpha["target"]) ** 2)


GD = hg.Descent(optax.sgd(0.1), 3)
SGD = optax.sgd(0.1)
DEFAULTS = {
    "problem": hg.Bilevel(inner, outer),
    "estimator": hg.Implicit(GD),
    "w": jnp.zeros(2),
    "alpha": jnp.ones(2),
}
RATED = {
    "problem": hg.Bilevel(inner_of_rate, outer),
    "alpha": {"target": jnp.ones(2), "rate": jnp.asarray(0.1)},
}


def ask(problem, estimator, w, alpha, key=None):
    return hg.hypergradient(problem, estimator)(w, alpha, key)


def minimize(problem, estimator, w, alpha, **changes):
    changes = {"optimizer": SGD, "num_steps": 2, **changes}
    return run_loop(problem, estimator, w=w, alpha=alpha, **changes)


def search(**changes):
    defaults = {
        "problem": DEFAULTS["problem"], "solver": GD, "w": jnp.zeros(()),
        "searcher": hg.searchers.Random(), "space": Unit(), "budget": 10,
    }  # fmt: skip
    return hg.search(**{**defaults, **changes})


def closed(fn):
    return hg.Implicit(hg.ClosedForm(fn))


def bilevel(inner_loss=inner, outer_loss=outer, *data, **options):
    """Built within the test, since that may be what fails."""
    return lambda: hg.Bilevel(watched(inner_loss), outer_loss, *data, **options)


def refused(call, error, *fragments):
    """``call`` raises ``error``, says all ``fragments``, and evaluates no loss."""
    EXECUTED.clear()
    with pytest.raises(error) as caught:
        jax.block_until_ready(call())
    jax.effects_barrier()
    message = str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    for fragment in fragments:
        assert re.search(fragment, message), f"{fragment!r} is not in: {message}"
    assert not EXECUTED, "a loss was evaluated on numbers first"


def test_losses_do_tell_when_they_are_evaluated():
    """The control: a good call evaluates both losses, and they say so."""
    EXECUTED.clear()
    jax.block_until_ready(ask(**DEFAULTS))
    jax.effects_barrier()
    assert {loss.__name__ for loss in EXECUTED} == {"inner", "outer"}


NAN = jnp.array([1.0, jnp.nan])
ARRAYS = jnp.ones(1000)
ROWS = hg.Batches(jnp.ones(5), 2)

# What hypergradient and minimize refuse alike. id: (error, fragments, changes)
INPUTS = {
    # alpha and w
    "integer alpha": (TypeError, ["alpha is int", "hg.search"], {"alpha": 1}),
    "integer leaf": (
        TypeError, [r"alpha\['depth'\] is int"], {"alpha": {"depth": jnp.arange(2)}},
    ),
    "boolean alpha": (TypeError, ["alpha is bool"], {"alpha": True}),
    "complex alpha": (TypeError, ["alpha is complex"], {"alpha": 1j}),
    "integer w": (TypeError, ["w is int"], {"w": np.arange(2)}),
    "no alpha": (ValueError, ["alpha has no leaves"], {"alpha": None}),
    "no w": (ValueError, ["w has no leaves"], {"w": {}}),
    "text in w": (TypeError, ["w must be a pytree of arrays"], {"w": {"a": "relu"}}),
    "nan in alpha": (ValueError, ["alpha contains NaN"], {"alpha": NAN}),
    "nan in w": (ValueError, [r"w\['b'\] contains NaN"], {"w": {"b": NAN}}),
    # losses
    "vector loss": (
        ValueError, ["inner_loss must return a scalar", r"\(2,\)", "mean or sum"],
        {"problem": bilevel(lambda w, alpha, batch: w - alpha)},
    ),
    "integer loss": (
        TypeError, ["inner_loss returned int", "return a float"],
        {"problem": bilevel(lambda w, alpha, batch: jnp.sum(w > alpha))},
    ),
    "tuple loss": (
        ValueError, ["inner_loss must return a scalar"],
        {"problem": bilevel(lambda w, alpha, batch: (jnp.sum(w - alpha), w))},
    ),
    "no loss": (
        ValueError, ["inner_loss must return a scalar", "None"],
        {"problem": bilevel(lambda w, alpha, batch: None)},
    ),
    "vector outer loss": (
        ValueError, ["outer_loss must return a scalar", "tuple of functions"],
        {"problem": bilevel(inner, lambda w, alpha, batch: w)},
    ),
    "counted accuracy": (
        TypeError, ["outer_loss returned int", "surrogate"],
        {"problem": bilevel(inner, lambda w, alpha, batch: jnp.sum(w == alpha))},
    ),
    "loss of two arguments": (
        TypeError, [r"inner_loss\(w, alpha, batch\)"],
        {"problem": lambda: hg.Bilevel(lambda w, alpha: jnp.sum(w), outer)},
    ),
    "loss on other shapes": (
        (TypeError, ValueError), [r"inner_loss\(w, alpha, batch\)", r"float64\[2\]"],
        {"problem": bilevel(lambda w, alpha, batch: jnp.ones((1, 3)) @ w)},
    ),
    # what the solver or the start returns
    "other shape": (
        ValueError, [r"ClosedForm.solve returned float64\[3\]", r"w is float64\[2\]"],
        {"estimator": closed(lambda alpha, batch: jnp.zeros(3))},
    ),
    "other dtype": (
        ValueError, ["float32", "float64"],
        {"estimator": closed(lambda alpha, batch: alpha.astype(jnp.float32))},
    ),
    "other structure": (
        ValueError, ["ClosedForm.solve returned", "structure"],
        {"estimator": closed(lambda alpha, batch: {"w": alpha})},
    ),
    "python number": (
        ValueError, ["ClosedForm.solve returned", "w is float64"],
        {"estimator": closed(lambda alpha, batch: 1.0), "w": 0.0, "alpha": 1.0},
    ),
    "other start": (
        ValueError, ["start returned", "w is"],
        {"problem": bilevel(init_fn=lambda w, alpha: jnp.zeros(3))},
    ),
    # alpha that is not seen
    "rate under Implicit": (
        ValueError, [r"neither loss reads alpha\['rate'\]", "hg.Unrolled"],
        {**RATED, "estimator": hg.Implicit(
            hg.Descent(lambda alpha: optax.sgd(alpha["rate"]), 3))},
    ),
    "start under Implicit": (
        ValueError, [r"neither loss reads alpha\['rate'\]"],
        {**RATED, "problem": bilevel(
            inner_of_rate, init_fn=lambda w, alpha: alpha["rate"] * w)},
    ),
    "dead code": (
        ValueError, [r"neither loss reads alpha\['rate'\]"],
        {**RATED, "problem": bilevel(lambda w, alpha, batch: (
            jnp.exp(alpha["rate"]), inner_of_rate(w, alpha, batch))[1])},
    ),
    "handed on and ignored": (
        ValueError, [r"neither loss reads alpha\['rate'\]"],
        {**RATED, "problem": bilevel(
            lambda w, alpha, batch: jax.jit(inner_of_rate)(w, alpha, batch))},
    ),
    # batches
    "adjoint batch above the data": (
        ValueError, ["batch", "1..5", "got 6"],
        {"problem": bilevel(inner, outer, ROWS, ROWS),
         "estimator": hg.Implicit(GD, adjoint_batch_size=6)},
    ),
    "outer batch of a plain pytree": (
        ValueError, ["hg.Batches"],
        {"problem": bilevel(inner, outer, ROWS, jnp.ones(5)),
         "estimator": hg.Implicit(GD, outer_batch_size=2)},
    ),
    "draw of one": (
        (TypeError, ValueError), ["draw", "inner_data, outer_data"],
        {"problem": bilevel(data_fn=lambda key: jax.random.normal(key, (3,)))},
    ),
    # objects of another kind
    "solver class": (
        TypeError, [r"write Newton\(\.\.\.\)"],
        {"estimator": lambda: hg.Implicit(hg.Newton)},
    ),
    "optimizer as solver": (
        TypeError, ["inner solver", r"hg\.Descent"],
        {"estimator": lambda: hg.Implicit(SGD)},
    ),
    "no optimizer from alpha": (
        TypeError, ["optimizer", "optax.GradientTransformation", "float"],
        {"estimator": lambda: hg.Implicit(hg.Descent(lambda alpha: 0.1, 3))},
    ),
    "estimator class": (
        TypeError, ["estimator", r"Implicit\("], {"estimator": lambda: hg.Implicit},
    ),
    "solver as estimator": (
        TypeError, ["estimator", r"hg\.Implicit"], {"estimator": lambda: hg.Newton()},
    ),
    "loss as problem": (
        TypeError, ["problem", r"hg\.Bilevel"], {"problem": lambda: inner},
    ),
    # numbers
    "text as damping": (
        TypeError, ["damping"], {"estimator": lambda: hg.Implicit(GD, damping="small")},
    ),
    "no damping": (
        TypeError, ["damping"], {"estimator": lambda: hg.Implicit(GD, damping=None)},
    ),
    "text as rtol": (
        TypeError, ["rtol"],
        {"estimator": lambda: hg.Implicit(GD, hg.CG(rtol="small"))},
    ),
    "text as tolerance": (
        TypeError, ["tolerance"],
        {"estimator": lambda: hg.Implicit(hg.Newton(tolerance="small"))},
    ),
    "text as step size": (
        TypeError, ["step_size"],
        {"estimator": lambda: hg.Implicit(GD, hg.Neumann(3, "small"))},
    ),
    # keys
    "integer key": (TypeError, [r"jax.random.key\(3\)"], {"key": 3}),
    "numpy integer key": (TypeError, [r"jax.random.key"], {"key": np.int64(3)}),
    "text as key": (TypeError, ["key must be"], {"key": "seed"}),
    "several keys": (
        (TypeError, ValueError), ["key must be", "vmap"],
        {"key": jax.random.split(jax.random.key(0), 3)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("entry", [ask, minimize])
@pytest.mark.parametrize("name", INPUTS)
def test_inputs(name, entry):
    """Rule 6: the type, and words that name what was got and what to do."""
    error, fragments, changes = INPUTS[name]

    def call():
        arguments = {**DEFAULTS, **changes}
        for kind in ("problem", "estimator"):
            value = arguments[kind]
            if getattr(value, "__name__", "") in ("<lambda>", "build"):
                arguments[kind] = value()
        return entry(**arguments)

    refused(call, error, *fragments)


ONE = {"problem": DEFAULTS["problem"], "w": 0.0, "alpha": 0.5}
LOOPS = {
    "tuple of losses": (
        minimize, ValueError, ["has 2 outer losses", "aggregator="],
        {"problem": hg.Bilevel(inner, (outer, outer))},
    ),
    "optimizer function": (
        minimize, TypeError, ["optimizer must be an optax.GradientTransformation"],
        {"optimizer": optax.sgd},
    ),
    "inner solver as optimizer": (
        minimize, TypeError, ["optimizer must be", "Descent"], {"optimizer": GD},
    ),
    "space and project": (
        minimize, ValueError, ["space or project"],
        {**ONE, "space": Unit(), "project": lambda alpha: alpha},
    ),
    "alpha outside": (
        minimize, ValueError, ["alpha", "2.0", "Interval"],
        {**ONE, "alpha": 2.0, "space": Unit()},
    ),
    "space class": (
        minimize, TypeError, ["space", r"write Real\(\)"], {**ONE, "space": Real},
    ),
    "space of another structure": (
        minimize, ValueError, ["structure of alpha"], {**ONE, "space": {"a": Unit()}},
    ),
    "project is no function": (minimize, TypeError, ["project"], {"project": 3}),
    "project changes the structure": (
        minimize, (TypeError, ValueError), ["project"],
        {"project": lambda alpha: (alpha, alpha)},
    ),
    "project changes the shape": (
        minimize, (TypeError, ValueError), ["project"],
        {"project": lambda alpha: jnp.sum(alpha)},
    ),
    "metric is no function": (
        minimize, TypeError, ["metrics", "accuracy"], {"metrics": {"accuracy": 3}},
    ),
    "vector metric": (
        minimize, (TypeError, ValueError), ["accuracy", "scalar"],
        {"metrics": {"accuracy": lambda w, alpha, key: w}},
    ),
    "metric of two arguments": (
        minimize, TypeError, ["metrics", "accuracy", r"called as fn\(w, alpha, key\)"],
        {"metrics": {"accuracy": lambda w, alpha: w}},
    ),
    "metric of two arguments in search": (
        search, TypeError, ["metrics", "accuracy", r"but takes \(w, alpha\)"],
        {"metrics": {"accuracy": lambda w, alpha: w}},
    ),
    "a leaf that the space lacks": (
        search, ValueError, ["a dict that inner_loss reads has no 'rate'", "penalty"],
        {
            "problem": hg.Bilevel(lambda w, alpha, batch: w * alpha["rate"], outer),
            "space": {"penalty": Unit()},
        },
    ),
    "an entry that a dict of the user's own lacks": (
        minimize, ValueError,
        [r"a dict that outer_loss reads has no 'temp', while[^;]*; put it there, or"],
        {
            "problem": hg.Bilevel(
                inner, lambda w, alpha, batch: w * {"temperature": 2.0}["temp"]
            ),
        },
    ),
    "metrics are no dict": (
        minimize, TypeError, ["metrics"], {"metrics": lambda w, alpha, key: 0.0},
    ),
    "progress is no function": (minimize, TypeError, ["progress"], {"progress": 3}),
    "tuple of losses in search": (
        search, ValueError, ["searcher", "2 outer losses", "NSGA2"],
        {
            "problem": hg.Bilevel(inner, (outer, outer)),
            "searcher": hg.searchers.CMAES(),
        },
    ),
    "no budget": (search, ValueError, ["budget"], {"budget": 0}),
    "negative budget": (search, ValueError, ["budget"], {"budget": -1.0}),
    "nan as budget": (search, ValueError, ["budget"], {"budget": float("nan")}),
    "endless budget": (search, ValueError, ["budget"], {"budget": float("inf")}),
    "text as budget": (search, TypeError, ["budget"], {"budget": "5"}),
    "None as budget": (search, TypeError, ["budget"], {"budget": None}),
    "progress in search is no function": (
        search, TypeError, ["progress"], {"progress": 3},
    ),
    "vector metric in search": (
        search, (TypeError, ValueError), ["double", "scalar"],
        {"metrics": {"double": lambda w, alpha, key: jnp.stack([w, alpha])}},
    ),
    "integer key in search": (search, TypeError, [r"jax.random.key\(1\)"], {"key": 1}),
    "searcher class": (
        search, TypeError, ["searcher", r"Random\("],
        {"searcher": hg.searchers.Random},
    ),
    "solver class in search": (
        search, TypeError, ["solver", r"Newton\(\.\.\.\)"], {"solver": hg.Newton},
    ),
    "integer w in search": (search, TypeError, ["w must be float"], {"w": 1}),
    "unbounded space": (
        search, ValueError, ["unbounded", "Interval"], {"space": Real()},
    ),
    "vector loss in search": (
        search, ValueError, ["inner_loss must return a scalar"],
        {"problem": hg.Bilevel(watched(lambda w, a, b: jnp.ones(2) * w), outer)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_loops(name):
    """What `minimize` and `search` refuse of their own arguments."""
    entry, error, fragments, changes = LOOPS[name]
    arguments = changes if entry is search else {**DEFAULTS, **changes}
    call = functools.partial(entry, **arguments)
    if changes.get("budget") == float("inf"):  # or it would never return
        arguments = {**arguments, "progress": give_up}
        call = functools.partial(entry, **arguments)
    refused(call, error, *fragments)


def give_up(*_):
    raise RuntimeError("the search has begun")


def counts(value):
    """Every static count of the library, set to ``value``."""
    import optimistix

    bfgs = optimistix.BFGS(rtol=1.0, atol=1.0)
    return {
        "Descent.num_steps": lambda: hg.Descent(SGD, value),
        "Newton.max_steps": lambda: hg.Newton(max_steps=value),
        "LBFGS.max_steps": lambda: hg.LBFGS(max_steps=value),
        "LBFGS.memory_size": lambda: hg.LBFGS(memory_size=value),
        "Neumann.num_terms": lambda: hg.Neumann(value),
        "Nystrom.rank": lambda: hg.Nystrom(value),
        "NystromCG.rank": lambda: hg.NystromCG(value),
        "minimize.num_steps": lambda: minimize(**DEFAULTS, num_steps=value),
        "minimize.eval_every": lambda: minimize(**DEFAULTS, eval_every=value),
        # None means something in the rest.
        "CG.max_steps": lambda: hg.CG(max_steps=value),
        "NystromCG.max_steps": lambda: hg.NystromCG(3, max_steps=value),
        "from_optimistix.max_steps": lambda: hg.from_optimistix(bfgs, value),
        "Unrolled.truncation_length": lambda: hg.Unrolled(GD, truncation_length=value),
        "Implicit.adjoint_batch_size": lambda: hg.Implicit(
            GD, adjoint_batch_size=value
        ),
        "Implicit.outer_batch_size": lambda: hg.Implicit(GD, outer_batch_size=value),
        "Unrolled.outer_batch_size": lambda: hg.Unrolled(GD, outer_batch_size=value),
        "Batches.batch_size": lambda: hg.Batches(jnp.ones(5), value),
    }


COUNTS = list(counts(1))
NO_COUNTS = [(name, value) for name in COUNTS for value in (-1, 2.0, "3", True)]
NO_COUNTS += [(name, None) for name in COUNTS[:9]]
NO_COUNTS += [(name, 0) for name in COUNTS[1:]]  # `Descent` may take no step


@pytest.mark.parametrize(("name", "value"), NO_COUNTS)
def test_counts(name, value):
    """A count is a plain integer in range; None only where None means something."""
    argument = name.split(".")[1]
    refused(counts(value)[name], (TypeError, ValueError), argument, repr(value))


def test_no_step_is_a_step_count():
    """Implicit differentiation at a given ``w``."""
    assert hg.Descent(SGD, 0).num_steps == 0


@dataclasses.dataclass
class Changing:
    """A loss compared by value: changed, it is another one in the same place."""

    scale: float

    def __call__(self, w, alpha, batch):
        return self.scale * jnp.sum((w - alpha) ** 2)


CONSTRUCTORS = {
    "unequal rows": (
        ValueError, ["common leading axis", r"\(3, 2\)", r"\(4,\)"],
        lambda: hg.Batches({"x": jnp.ones((3, 2)), "y": jnp.ones(4)}),
    ),
    "no leaf with rows": (
        ValueError, ["common leading axis", "scalars beside them"],
        lambda: hg.Batches({"scale": 1.0}),
    ),
    "batch above the data": (
        ValueError, ["batch_size", r"1\.\.5", "got 6"],
        lambda: hg.Batches(jnp.ones(5), 6),
    ),
    "empty data": (ValueError, ["empty"], lambda: hg.Batches(jnp.ones((0, 3)))),
    "empty leaf": (
        ValueError, [r"\['x'\] is empty"],
        lambda: hg.Bilevel(inner, outer, {"x": jnp.ones((0, 3))}),
    ),
    "no data": (ValueError, ["no data", "with_key=True"], lambda: hg.Batches(None)),
    "no leaves": (ValueError, ["no data"], lambda: hg.Batches({})),
    "a batch of keys": (
        ValueError, ["no data"], lambda: hg.Batches(None, 4, with_key=True),
    ),
    "text": (
        TypeError, [r"\['x'\]", "encode text"],
        lambda: hg.Batches({"x": np.array(["a", "b"])}),
    ),
    "inner loss is no function": (
        TypeError, ["inner_loss must be a function"], lambda: hg.Bilevel(3, outer),
    ),
    "inner loss may change": (
        TypeError, ["inner_loss", "Changing", "frozen dataclass"],
        lambda: hg.Bilevel(Changing(1.0), outer),
    ),
    "one of the outer losses may change": (
        TypeError, ["outer_loss", "Changing", "frozen dataclass"],
        lambda: hg.Bilevel(inner, (outer, Changing(1.0))),
    ),
    "a formula may change": (
        TypeError, ["fn", "Changing", "frozen dataclass"],
        lambda: hg.ClosedForm(Changing(1.0)),
    ),
    "an optimizer of alpha may change": (
        TypeError, ["optimizer", "Changing", "frozen dataclass"],
        lambda: hg.Descent(Changing(1.0), 3),
    ),
    "products may change": (
        TypeError, ["curvature", "Changing", "frozen dataclass"],
        lambda: hg.Implicit(hg.Newton(), hvp_fn=Changing(1.0)),
    ),
    "a part of a composite loss may change": (
        TypeError, ["loss_fn", "Changing", "frozen dataclass"],
        lambda: hg.CompositeLoss(inner, Changing(1.0)),
    ),
    "the inner loss of argmin may change": (
        TypeError, ["inner_loss", "Changing", "frozen dataclass"],
        lambda: hg.argmin(Changing(1.0), hg.Newton()),
    ),
    "outer loss is no function": (
        TypeError, ["outer_loss must be a function"],
        lambda: hg.Bilevel(inner, (outer, None)),
    ),
    "no outer loss": (
        ValueError, ["outer_loss", "empty tuple"], lambda: hg.Bilevel(inner, ()),
    ),
    "start is no function": (
        TypeError, ["start must be a function"],
        lambda: hg.Bilevel(inner, outer, init_fn=jnp.ones(2)),
    ),
    "data and draw": (
        ValueError, ["either data or draw"],
        lambda: hg.Bilevel(inner, outer, jnp.ones(3), data_fn=lambda key: (None, None)),
    ),
    "formula is no function": (TypeError, ["fn"], lambda: hg.ClosedForm(3)),
    "optimizer is none": (
        TypeError, ["optimizer", "optax.sgd", "float"], lambda: hg.Descent(0.1, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_constructors(name):
    """Data and functions are judged where they are handed over."""
    error, fragments, call = CONSTRUCTORS[name]
    refused(call, error, *fragments)


LINEAR = {
    "class": (lambda: hg.CG, r"write CG\(\.\.\.\)"),
    "function": (lambda: lambda matvec, b: b, "function"),
    "optimizer": (lambda: SGD, "GradientTransformation"),
    "inner solver": (lambda: hg.Newton(), "Newton"),
    "text": (lambda: "cg", "str"),
    "number": (lambda: 10, "int"),
}


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("maker", ["Implicit", "argmin"])
def test_linear_solvers_of_another_kind(name, maker):
    """The message lists what would do."""
    make, fragment = LINEAR[name]
    call = {
        "Implicit": lambda: hg.Implicit(GD, make()),
        "argmin": lambda: hg.argmin(inner, GD, make()),
    }[maker]
    refused(call, TypeError, "linear_solver must be", r"hg\.CG\(\)", fragment)


def undifferentiable():
    import jaxopt
    import optimistix

    search = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5))
    return {
        "LBFGS": hg.LBFGS(),
        "Newton": hg.Newton(),
        "optax.lbfgs": hg.Descent(optax.lbfgs(), 3),
        "optax line search": hg.Descent(search, 3),
        "jaxopt.LBFGS": hg.from_jaxopt(jaxopt.LBFGS(inner)),
        "jaxopt line search": hg.from_jaxopt(jaxopt.GradientDescent(inner)),
        "optimistix": hg.from_optimistix(optimistix.BFGS(1e-6, 1e-6)),
    }


@pytest.mark.parametrize("name", undifferentiable())
def test_unrolled_refuses_what_cannot_be_differentiated(name):
    """Reverse mode through these is NaN, wrong or impossible; Implicit is offered."""
    solver = undifferentiable()[name]
    assert not solver.differentiable
    refused(lambda: hg.Unrolled(solver), ValueError, "hg.Implicit", "differentiated")


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda alpha: optax.lbfgs(),
        optax.masked(optax.lbfgs(), {"a": True, "b": False}),
    ],
    ids=["made from alpha", "masked"],
)
def test_unrolled_refuses_lbfgs_that_only_shows_with_w_and_alpha(optimizer):
    """The same transformation as above, known only where ``init`` has its inputs."""
    w = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    loss = watched(lambda w, alpha, batch: jnp.sum((w["a"] - alpha) ** 2 + w["b"] ** 2))
    estimator = hg.Unrolled(hg.Descent(optimizer, 3))
    refused(
        lambda: ask(hg.Bilevel(loss, loss), estimator, w, jnp.ones(2)),
        ValueError,
        "hg.Implicit",
    )


@pytest.mark.parametrize(
    "draw",
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
def test_a_draw_that_closes_over_data(draw):
    """More than 1 kB of constants in the program; the message shows the way."""
    refused(
        lambda: hg.Bilevel(inner, outer, data_fn=draw),
        ValueError, "closes over", "pass it as data", r"jax\.tree_util\.Partial",
    )  # fmt: skip


def test_a_draw_with_its_data_in_a_partial():
    """The same arrays as data; and small constants are nobody's business."""
    partial = jax.tree_util.Partial(lambda arrays, key: (arrays, None), ARRAYS)
    assert len(jax.tree.leaves(hg.Bilevel(inner, outer, draw=partial))) == 1
    small = jnp.ones(100)
    hg.Bilevel(inner, outer, data_fn=lambda key: (small, None))


@pytest.mark.parametrize("reader", ["optimizer", "start"])
def test_unrolled_sees_what_the_losses_do_not(reader):
    """One step from ``w0``: ``w = w0 - 2 rate (w0 - t)``, differentiated by hand."""
    optimizer = (
        (lambda alpha: optax.sgd(alpha["rate"])) if reader == "optimizer" else SGD
    )
    start = (lambda w, alpha: w + alpha["rate"]) if reader == "start" else None
    problem = hg.Bilevel(inner_of_rate, outer, init_fn=start)
    estimator = hg.Unrolled(hg.Descent(optimizer, 1))
    found = ask(problem, estimator, jnp.zeros(2), RATED["alpha"]).hypergradient
    if reader == "optimizer":
        w, slope = 0.2, 2.0
    else:
        w, slope = 0.1 + 0.2 * 0.9, 0.8
    np.testing.assert_allclose(found["rate"], 2 * 2 * (w - 0.5) * slope, rtol=1e-12)


@pytest.mark.parametrize("how", ["plainly", "jit", "scan", "cond", "custom rule"])
def test_what_only_the_outer_loss_reads_is_the_direct_term(how):
    """``dM/drate = 3``, however deep in the outer loss the leaf is read."""
    read = {
        "plainly": lambda rate: 3 * rate,
        "jit": jax.jit(lambda rate: 3 * rate),
        "scan": lambda rate: jax.lax.scan(
            lambda c, _: (c + rate, None), jnp.zeros(()), None, length=3
        )[0],
        "cond": lambda rate: jax.lax.cond(
            rate > 0, lambda r: 3 * r, jnp.zeros_like, rate
        ),
        "custom rule": lambda rate: 3 * jax.nn.relu(rate),
    }[how]
    direct = lambda w, alpha, batch: outer(w, alpha, batch) + read(alpha["rate"])
    problem = hg.Bilevel(inner_of_rate, direct)
    found = ask(problem, DEFAULTS["estimator"], jnp.zeros(2), RATED["alpha"])
    np.testing.assert_allclose(found.hypergradient["rate"], 3.0, rtol=1e-12)


def test_bad_numbers_do_not_raise_under_jit():
    """NaN in a traced ``alpha``: no error, no trust."""
    ask_again = jax.jit(lambda alpha: ask(**{**DEFAULTS, "alpha": alpha}))
    assert ask_again(jnp.ones(2)).stats["trusted"].dtype == bool
    estimate = ask_again(NAN)
    assert not estimate.stats["trusted"]
    assert np.isnan(estimate.value)


def test_argmin_names_what_is_wrong():
    """The same words as the estimators'."""
    vector = watched(lambda w, alpha, batch: w - alpha)
    refused(
        lambda: hg.argmin(vector, GD)(jnp.zeros(2), jnp.ones(2)),
        ValueError,
        "inner_loss must return a scalar",
    )
    refused(lambda: hg.argmin(inner, GD)(NAN, 1.0), ValueError, "w contains NaN")
    refused(lambda: hg.argmin(inner, GD)(1, 1.0), TypeError, "w is int")
    refused(lambda: hg.argmin(inner, hg.Newton), TypeError, r"write Newton\(\.\.\.\)")
    refused(
        lambda: hg.argmin(inner, GD)(0.0, 1.0, None, 3), TypeError, "jax.random.key"
    )


def test_a_space_too_narrow_for_its_leaf():
    """Bounds that float32 cannot tell apart."""
    narrow = Interval(1.0, 1.0 + 1e-12)
    refused(
        lambda: minimize(
            DEFAULTS["problem"],
            DEFAULTS["estimator"],
            jnp.zeros((), jnp.float32),
            jnp.asarray(1.0, jnp.float32),
            space=narrow,
        ),
        ValueError,
        "does not fit float32",
    )


# What a newcomer tries.


@pytest.mark.parametrize("last", [None, 5])
@pytest.mark.parametrize("forgotten", ["nothing reads it", "stopped"])
def test_unrolled_refuses_alpha_that_it_cannot_see(last, forgotten: str):
    """A misspelt leaf, or one behind stop_gradient: no silent zero."""
    stopped = jax.lax.stop_gradient
    inner = lambda w, alpha, batch: (
        0.5 * (w - alpha["seen"]) ** 2
        + (stopped(alpha["unseen"]) * w if forgotten == "stopped" else 0.0)
    )
    problem = hg.Bilevel(inner, lambda w, alpha, batch: w**2)
    estimator = hg.Unrolled(hg.Descent(optax.sgd(0.5), 10), truncation_length=last)
    with pytest.raises(ValueError, match=r"neither loss reads alpha\['unseen'\]"):
        hg.hypergradient(problem, estimator)(0.0, {"seen": 1.0, "unseen": 1.0})


def test_a_start_beyond_the_last_steps_is_refused():
    """alpha is read by the start alone: all steps see it, the last five do not."""
    inner = lambda w, alpha, batch: 0.5 * w**2
    problem = hg.Bilevel(
        inner, lambda w, alpha, batch: w**2, init_fn=lambda w, alpha: alpha
    )
    solver = hg.Descent(optax.sgd(0.5), 10)
    found = hg.hypergradient(problem, hg.Unrolled(solver))(0.0, 1.0)
    np.testing.assert_allclose(found.hypergradient, 2 * 0.5**20, rtol=1e-9)
    with pytest.raises(ValueError, match="nor does the optimizer"):
        hg.hypergradient(problem, hg.Unrolled(solver, truncation_length=5))(0.0, 1.0)


def test_an_optimizer_factory_is_not_an_optimizer():
    """optax.sgd would take alpha for its rate."""
    with pytest.raises(TypeError, match=r"as in optax.sgd\(0.1\)"):
        hg.Descent(optax.sgd, 10)


class Half:
    """A solver that forgets part of what it should return."""

    differentiable = False

    def __init__(self, returned):
        self.returned = returned

    def solve(self, inner_loss, w, alpha, data, key):
        return self.returned(w)


@pytest.mark.parametrize(
    ("returned", "message"),
    [(lambda w: w, "must return"), (lambda w: (w, {}), "lack")],
)
def test_what_a_solver_returns_is_named(returned, message: str):
    """The pair, and the four counts."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: (w - alpha) ** 2, lambda w, alpha, batch: w**2
    )
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        hg.hypergradient(problem, hg.Implicit(Half(returned)))(1.0, 1.0)
    assert "inner_stats" in str(raised.value)


def test_the_host_is_not_called_from_a_compiled_program():
    """progress and search, under jit and vmap, say so."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: (w - alpha) ** 2, lambda w, alpha, batch: w**2
    )
    run = lambda alpha: hg.minimize(
        problem, hg.Implicit(hg.Newton()), optax.sgd(0.1), 0.0, alpha, num_steps=2,
        progress=lambda done, value: None,
    )  # fmt: skip
    with pytest.raises(TypeError, match="leave it out"):
        jax.vmap(run)(jnp.ones(2))
    look = lambda key: hg.search(
        problem, hg.Newton(), hg.searchers.Random(), 0.0, space=hg.spaces.Unit(),
        budget=30.0, key=key,
    )  # fmt: skip
    with pytest.raises(TypeError, match="runs on the host"):
        jax.jit(look)(jax.random.key(0))


def test_the_status_of_a_batch_needs_an_index():
    """As rows() does."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: (w - alpha) ** 2, lambda w, alpha, batch: w**2
    )
    run = lambda alpha: hg.minimize(
        problem, hg.Implicit(hg.Newton()), optax.sgd(0.1), 0.0, alpha, num_steps=2
    )
    with pytest.raises(ValueError, match="index it first"):
        _ = jax.vmap(run)(jnp.ones(2)).status


@pytest.mark.parametrize(
    ("metric", "error"),
    [
        (lambda w, alpha, key: w + "text", TypeError),
        (lambda w, alpha, batch: (w - batch[1]) ** 2, IndexError),  # a loss
        (lambda w, alpha, batch: sum(w - row for row in batch), TypeError),
    ],
)
def test_a_metric_that_fails_is_named(metric, error):
    """In the message itself, which is what tools show, with how it is called."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: (w - alpha) ** 2, lambda w, alpha, batch: w**2
    )
    with pytest.raises(error, match=r"metrics\['m'\] failed.* fn\(w, alpha, key\)"):
        hg.minimize(
            problem, hg.Implicit(hg.Newton()), optax.sgd(0.1), 0.0, 1.0, num_steps=2,
            metrics={"m": metric},
        )  # fmt: skip


def test_a_w_that_does_not_fit_the_data_is_named():
    """w has 4 numbers, the data 3 columns; both are in the message, with the loss."""
    fit = lambda w, alpha, x: jnp.sum((x @ w - alpha) ** 2)
    problem = hg.Bilevel(fit, fit, jnp.ones((5, 3)), jnp.ones((5, 3)))
    words = r"inner_loss\(w, alpha, batch\) .*float64\[4\].*float64\[5, 3\]"
    with pytest.raises(TypeError, match=words):
        search(problem=problem, w=jnp.zeros(4))
    with pytest.raises(TypeError, match=words):
        hg.hypergradient(problem, hg.Implicit(GD))(jnp.zeros(4), 0.5)


def test_a_failure_of_another_kind_keeps_its_own_words():
    """Such as an error of jax, which takes other arguments; a note says where."""
    branch = lambda w, alpha, batch: w * alpha if w > 0 else w
    with pytest.raises(jax.errors.TracerBoolConversionError) as raised:
        search(problem=hg.Bilevel(branch, branch))
    assert any("inner_loss(w, alpha, batch)" in x for x in raised.value.__notes__)


def test_drawn_data_are_checked_like_given_ones():
    """Numbers become arrays; nothing is refused."""
    inner = lambda w, alpha, batch: 0.5 * (w - alpha * batch) ** 2
    outer = lambda w, alpha, batch: 0.5 * (w - batch) ** 2
    problem = hg.Bilevel(inner, outer, data_fn=lambda key: (2.0, 1.0))
    found = hg.hypergradient(problem, hg.Implicit(hg.Newton()))(0.0, 1.0)
    np.testing.assert_allclose(found.hypergradient, 2.0)
    empty = hg.Bilevel(inner, outer, data_fn=lambda key: (jnp.zeros((0, 2)), 1.0))
    with pytest.raises(ValueError, match="is empty"):
        hg.hypergradient(empty, hg.Implicit(hg.Newton()))(0.0, 1.0)


@pytest.mark.parametrize(("from_alpha", "kept"), [(False, True), (True, False)])
def test_rates_are_judged_from_one_start(from_alpha: bool, kept: bool):
    """Unrolled begins where it ended, unless alpha sets the rate."""
    inner = lambda w, alpha, batch: 0.5 * (w - alpha) ** 2
    problem = hg.Bilevel(inner, lambda w, alpha, batch: (w - 3) ** 2)
    rate = lambda alpha: optax.sgd(0.1 * alpha)
    estimator = hg.Unrolled(hg.Descent(rate if from_alpha else optax.sgd(0.1), 3))
    state = estimator.init(problem, jnp.zeros(()), jnp.ones(()))
    found, state = estimator.estimate(problem, state, jnp.ones(()), jax.random.key(0))
    assert state.w == (found.w if kept else 0.0)
