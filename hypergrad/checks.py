"""Bad input, refused before anything is traced for good.

Structure is judged abstractly, by shapes and jaxprs; numbers only where they are
concrete, at the public entry points.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.interpreters import partial_eval
from jaxtyping import Array, PyTree

from .devices import is_apart
from .problem import Bilevel, draw, whole

KEY = jax.eval_shape(lambda: jax.random.key(0))


def as_inputs(w: PyTree, alpha: PyTree, *, differentiable: bool = True) -> tuple:
    """``w`` and ``alpha`` as arrays; refuses integers and NaN, naming the leaf."""
    w = _floating("w", w)
    alpha = _floating("alpha", alpha) if differentiable else _arrays("alpha", alpha)
    for name, tree in (("w", w), ("alpha", alpha)):
        for path, leaf in jax.tree.leaves_with_path(tree):
            concrete = not isinstance(leaf, Tracer)
            concrete = concrete and jnp.issubdtype(leaf.dtype, jnp.floating)
            if concrete and _has_nan(leaf):
                raise ValueError(
                    f"{name}{jax.tree_util.keystr(path)} contains NaN; give it finite "
                    "starting values"
                )
    return w, alpha


def as_key(key: Any) -> Array:
    """A typed PRNG key; None means ``jax.random.key(0)``."""
    if key is None:
        return jax.random.key(0)
    if isinstance(key, int | np.integer):
        raise TypeError(f"key must be a PRNG key; write jax.random.key({key})")
    if not hasattr(key, "dtype"):
        raise TypeError(f"key must be a PRNG key, got {type(key).__name__}")
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    one = key if typed else jax.random.wrap_key_data(key)
    if one.shape != ():
        raise ValueError(
            f"key must be one PRNG key, got an array of shape {one.shape}; for several "
            "runs use jax.vmap over the key"
        )
    return one


def _has_nan(leaf: Array) -> bool:
    found = jnp.isnan(leaf) if is_apart(leaf) else np.isnan(np.asarray(leaf))
    return bool(found.any())


def _arrays(name: str, tree: PyTree) -> PyTree:
    if not jax.tree.leaves(tree):
        raise ValueError(f"{name} has no leaves; pass at least one array")

    def strong(leaf):
        if isinstance(leaf, jax.Array) and not leaf.weak_type:
            return leaf
        return jnp.asarray(leaf, dtype=jnp.asarray(leaf).dtype)

    try:
        return jax.tree.map(strong, tree)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a pytree of arrays: {error}") from error


def traced(settings: PyTree) -> PyTree:
    """Numbers among the settings as arrays, so that other numbers trace nothing."""
    number = lambda x: isinstance(x, float | np.ndarray | np.generic)
    return jax.tree.map(lambda x: jnp.asarray(x) if number(x) else x, settings)


def is_traced(*trees: PyTree) -> bool:
    """Whether any array is a tracer of an enclosing ``jit``, ``vmap`` or ``grad``."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))


def _floating(name: str, tree: PyTree) -> PyTree:
    tree = _arrays(name, tree)
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} is {leaf.dtype}, which has no "
                "derivative; pass floating-point values, or search integers and "
                "choices with hg.search"
            )
    return tree


def check_problem_is(problem: Any) -> None:
    """Refuses what is no problem."""
    if not isinstance(problem, Bilevel):
        raise TypeError(
            "problem must be hg.Bilevel(inner_loss, outer_loss, inner_data, "
            f"outer_data); got {type(problem).__name__}"
        )


def check_estimator_is(estimator: Any) -> None:
    """Refuses what is no estimator, and says what it might have been meant to be."""
    if isinstance(estimator, type):
        raise TypeError(
            f"estimator is the class {estimator.__name__}; write "
            f"{estimator.__name__}(...)"
        )
    if not (hasattr(estimator, "init") and hasattr(estimator, "estimate")):
        name = type(estimator).__name__
        hint = f"; hg.Implicit({name}(...))" if hasattr(estimator, "solve") else ""
        raise TypeError(
            "estimator must have init and estimate, such as hg.Implicit(solver) or "
            f"hg.Unrolled(solver); got {name}{hint}"
        )


def rehearse(estimator: Any, problem: Bilevel, w: PyTree, alpha: PyTree) -> None:
    """Runs ``estimator.init`` on shapes, once for each structure of its inputs."""
    _on_shapes(_rehearse, estimator, problem, w, alpha)


def ever_trusted(estimator: Any, problem: Bilevel, w: PyTree, alpha: PyTree) -> bool:
    """Whether ``trusted`` depends on anything, by the jaxpr of an estimate."""
    return _on_shapes(_ever_trusted, estimator, problem, w, alpha)


def _on_shapes(ask: Any, *inputs: PyTree) -> Any:
    """What a cached function says of inputs by their structure and shapes."""
    arrays, static = eqx.partition(inputs, eqx.is_array)
    leaves, structure = jax.tree.flatten(arrays)
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
    static_leaves, static_structure = jax.tree.flatten(static)
    arguments = (structure, shapes, static_structure, tuple(static_leaves))
    try:
        hash(arguments)
    except TypeError:
        return ask.__wrapped__(*arguments)
    return ask(*arguments)


@functools.lru_cache(maxsize=256)
def _rehearse(structure, shapes, static_structure, static_leaves) -> None:
    static = jax.tree.unflatten(static_structure, static_leaves)

    def init(leaves, key):
        arrays = jax.tree.unflatten(structure, leaves)
        estimator, problem, w, alpha = eqx.combine(arrays, static)
        estimator.init(problem, w, alpha, key)

    jax.eval_shape(init, shapes, KEY)


@functools.lru_cache(maxsize=256)
def _ever_trusted(structure, shapes, static_structure, static_leaves) -> bool:
    static = jax.tree.unflatten(static_structure, static_leaves)

    def trusted(leaves, key):
        arrays = jax.tree.unflatten(structure, leaves)
        estimator, problem, w, alpha = eqx.combine(arrays, static)
        state = estimator.init(problem, w, alpha, key)
        return estimator.estimate(problem, state, alpha, key)[0].stats["trusted"]

    return any(reads(trusted, shapes, KEY))


def check_problem(problem: Bilevel, w: PyTree, alpha: PyTree, *solvers: Any) -> None:
    """Losses are scalar, solvers keep ``w``'s structure.

    Args:
      problem, w, alpha: as given to an estimator; only shapes are read.
      solvers: the inner solver, if there is one.
    """
    key = jax.random.key(0)
    inner_data, outer_data = problem.data(key)
    # Functions of their own: jax compares bound methods by value, data included.
    start = jax.eval_shape(lambda w, alpha: problem.initial(w, alpha), w, alpha)
    check_same_structure("start", start, w)
    inner_batch = jax.eval_shape(lambda: draw(inner_data, key))
    outer_batch = jax.eval_shape(lambda: whole(outer_data, key))
    check_scalar("inner_loss", problem.inner_loss, w, alpha, inner_batch)
    losses = problem.outer_loss
    for loss in losses if isinstance(losses, tuple) else (losses,):
        check_scalar("outer_loss", loss, w, alpha, outer_batch)
    for solver in solvers:
        _check_solve(problem, start, w, alpha, solver, inner_data, key)


def _check_solve(problem, start, w, alpha, solver, inner_data, key) -> None:
    check_solver(solver)
    solve = lambda w, alpha, data: solver.solve(problem.inner_loss, w, alpha, data, key)
    name = f"{type(solver).__name__}.solve"
    solved = eqx.filter_eval_shape(solve, start, alpha, inner_data)
    if not (isinstance(solved, tuple) and len(solved) == 2):
        raise TypeError(
            f"{name} must return (w, stats), stats from hypergrad.inner.inner_stats"
            f"(num_steps, num_grads, num_hvps, num_values); got {solved}"
        )
    found, stats = solved
    check_same_structure(name, found, w)
    lacking = {"num_steps", "num_grads", "num_hvps", "num_values"} - set(stats)
    if lacking:
        raise ValueError(
            f"the stats of {name} lack {sorted(lacking)}; make them with "
            "hypergrad.inner.inner_stats(num_steps, num_grads, num_hvps, num_values)"
        )


def check_seen(
    problem: Bilevel,
    w: PyTree,
    alpha: PyTree,
    beside: Sequence[bool] | None,
    advice: str,
) -> None:
    """Refuses a leaf of ``alpha`` to which no derivative can flow: it is not zero.

    Args:
      problem, w, alpha: as given to an estimator; only shapes are read.
      beside: which leaves the estimator sees without the losses; None for none.
      advice: what to do.
    """
    key = jax.random.key(0)
    inner_data, outer_data = problem.data(key)
    outer = lambda w, alpha, batch: problem.outer(w, alpha, batch)
    seen = list(beside or [False] * len(jax.tree.leaves(alpha)))
    for loss, batch in (
        (problem.inner_loss, draw(inner_data, key)),
        (outer, whole(outer_data, key)),
    ):
        seen = list(map(operator.or_, seen, sees_alpha(loss, w, alpha, batch)))
    unseen = [
        f"alpha{jax.tree_util.keystr(path)}"
        for (path, _), sees in zip(jax.tree.leaves_with_path(alpha), seen, strict=True)
        if not sees
    ]
    if unseen:
        raise ValueError(
            f"neither loss reads {', '.join(unseen)} (or only behind stop_gradient), "
            f"{advice}"
        )


def check_solver(solver: Any) -> None:
    """Refuses what is no inner solver."""
    if isinstance(solver, type):
        raise TypeError(
            f"solver is the class {solver.__name__}; write {solver.__name__}(...)"
        )
    if not (callable(getattr(solver, "solve", None))):
        raise TypeError(
            "solver must be an inner solver such as hg.Descent(optax.sgd(0.1), 100), "
            f"hg.Newton() or hg.LBFGS(); got {type(solver).__name__}"
        )


def reads_w(loss: Any, w: PyTree, alpha: PyTree, batch: PyTree) -> bool:
    """Whether the loss reads any leaf of ``w``, by its jaxpr."""
    return any(reads(loss, w, alpha, batch)[: len(jax.tree.leaves(w))])


def sees_alpha(loss: Any, w: PyTree, alpha: PyTree, batch: PyTree) -> Sequence[bool]:
    """To which leaves of ``alpha`` a derivative of the loss flows, by its jaxpr."""

    def transposed(w, alpha, batch, ct):
        return jax.vjp(lambda alpha: loss(w, alpha, batch), alpha)[1](ct)

    ct = jax.eval_shape(loss, w, alpha, batch)
    jaxpr = jax.make_jaxpr(transposed)(w, alpha, batch, ct).jaxpr
    outputs = range(len(jaxpr.outvars))
    alone = lambda i: [i == j for j in outputs]
    return [partial_eval.dce_jaxpr(jaxpr, alone(i))[1][-1] for i in outputs]


def solver_reads_alpha(
    solver: Any, problem: Bilevel, w: PyTree, alpha: PyTree, data: PyTree
) -> Sequence[bool]:
    """Which leaves an iterative solver reads beside the loss: rates, schedules."""
    constant = jax.tree.map(jnp.zeros_like, alpha)
    loss = lambda w, _, batch: problem.inner_loss(w, constant, batch)
    keys = jax.random.split(jax.random.key(0))

    def step(alpha):
        carry = solver.init(loss, w, alpha, data, keys[0])
        return solver.step(loss, carry, alpha, data, keys[1])

    return reads(step, alpha)


def start_reads_alpha(problem: Bilevel, w: PyTree, alpha: PyTree) -> Sequence[bool]:
    """Which leaves the problem's start is made from."""
    return reads(lambda alpha: problem.initial(w, alpha), alpha)


def check_searched(value: Any, alpha: PyTree) -> None:
    """Refuses a leaf of ``alpha`` that ``value(alpha)`` does not read."""
    if names := unread(value, alpha):
        raise ValueError(
            f"nothing reads {', '.join(names)}: neither losses nor solver nor start, "
            "so that all its values would be worth the same; take it out of the space, "
            "or read it"
        )


def unread(f: Any, alpha: PyTree) -> list[str]:
    """Names of the leaves of ``alpha`` that ``f(alpha)`` does not read."""
    pairs = zip(jax.tree.leaves_with_path(alpha), reads(f, alpha), strict=True)
    key_of = jax.tree_util.keystr
    return [f"alpha{key_of(path)}" for (path, _), is_read in pairs if not is_read]


def reads(f: Any, *arguments: PyTree) -> Sequence[bool]:
    """Which leaves of its arguments a function reads, by its jaxpr."""
    closed = jax.make_jaxpr(f)(*arguments)
    outputs = [True] * len(closed.jaxpr.outvars)
    return partial_eval.dce_jaxpr(closed.jaxpr, outputs)[1]


def check_scalar(name: str, loss: Any, w: PyTree, alpha: PyTree, batch: PyTree) -> None:
    """Refuses a loss that does not return one float."""
    try:
        out = jax.eval_shape(loss, w, alpha, batch)
    except Exception as error:
        shapes = jax.tree.map(
            lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", (w, alpha, batch)
        )
        where = f"while evaluating {name}(w, alpha, batch) on shapes {shapes}"
        if isinstance(error, KeyError):
            raise ValueError(
                f"a dict that {name} reads has no {error}, {where}; put it there, or "
                "read what there is"
            ) from error
        if batch is None:
            where += "; it was given no data, which hg.Bilevel takes after the losses"
        raise_with(error, f"{where}, which must fit each other")
    if not (hasattr(out, "shape") and out.shape == ()):
        got = jax.tree.map(lambda x: tuple(x.shape), out)
        hint = "; for several outer losses pass a tuple of functions"
        raise ValueError(
            f"{name} must return a scalar, got shape {got}: take a mean or sum"
            f"{hint if name == 'outer_loss' else ''}"
        )
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(
            f"{name} returned {out.dtype}, which has no derivative; return a float "
            "(an accuracy counted with == is flat: use a smooth surrogate)"
        )


def raise_with(error: Exception, words: str) -> NoReturn:
    """The error of a user's function again, after words that say which one it was.

    One of a kind that takes other arguments than a text is left, with a note.
    """
    if type(error) in (TypeError, ValueError, IndexError):
        raise type(error)(f"{words}: {error}") from error
    error.add_note(words)
    raise error


def check_same_structure(
    name: str, found: PyTree, like: PyTree, what: str = "w"
) -> None:
    """Refuses what is not shaped like another tree, such as ``w``."""
    describe = lambda tree: jax.tree.map(
        lambda x: f"{getattr(x, 'dtype', type(x).__name__)}{list(jnp.shape(x))}", tree
    )
    same = jax.tree.structure(found) == jax.tree.structure(like)
    if not same or describe(found) != describe(like):
        raise ValueError(
            f"{name} returned {describe(found)} where {what} is {describe(like)}; it "
            f"must keep {what}'s structure, shapes and dtypes"
        )
