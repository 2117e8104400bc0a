"""Names the place where the numbers of an estimate stop being finite."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .batches import Batches, sample_batch
from .estimators.base import Estimator
from .hypergradient import hypergradient
from .problem import Bilevel, EstimateData
from .problem_checks import check_problem_type
from .products import Loss
from .trees import is_key, safe_norm
from .validation import as_input_arrays, as_key, check_estimator_type

GROWTH = 10.0  # of the norm of w or of the gradient, in a run that is said to diverge

FIND_OPERATION = (
    "All of its inputs are finite: look for the logarithm or root of a number that "
    "reaches 0, a division by 0, or an overflow. `with jax.debug_nans(True):` around "
    "the loss names the operation."
)
FIND_DERIVATIVE = (
    "A root or a norm has no derivative at 0, and jnp.where(mask, f(x), 0) has a bad "
    "one wherever f(x) has: replace x inside of f."
)
LOWER_RATE = (
    "Lower the learning rate of the inner optimizer, or clip its gradients by "
    "optax.clip_by_global_norm."
)


def diagnose(
    problem: Bilevel,
    estimator: Estimator,
    w: PyTree,
    alpha: PyTree,
    key: Array | None = None,
) -> tuple[str, ...]:
    """Returns sentences that name where an estimate stops being finite.

    The places are visited in the order in which `hypergradient` computes with the same
    arguments, and the first bad one ends the search: the data and both losses at the
    start, the inner run, the outer loss at its end, the hypergradient. Bad data is
    named by leaf, first row and index, and only if it reaches a loss. A divergence of
    the inner run is named by its step and the norms of ``w`` and of ``dL/dw``.

    Args:
      problem: The problem.
      estimator: The estimator. Of one without an inner solver, such as a single-loop
        method, only the losses are looked at.
      w, alpha: The point of the estimate. For a run that was stopped they are
        ``trace.w`` and, with ``record_alphas=True``, the leaves of ``trace.alphas`` at
        `Trace.last_row`.
      key: PRNG key of the estimate. Defaults to ``jax.random.key(0)``.

    Returns:
      One or two sentences with a remedy each, or none if everything is finite and the
      inner run does not diverge.

    Cost:
      An estimate, an inner run with a value of the loss at each step, and compilation:
      for the moment after a failure, not for a loop.

    Raises:
      TypeError, ValueError: An argument is invalid, as in `hypergradient`.

    >>> import jax.numpy as jnp, numpy as np, hypergrad as hg
    >>> loss = lambda w, alpha, x: jnp.mean((x @ w) ** 2) + jnp.sum(alpha * w**2)
    >>> x = np.ones((5, 2))
    >>> x[3, 1] = np.nan
    >>> problem = hg.Bilevel(loss, loss, inner_data=x, outer_data=np.ones((5, 2)))
    >>> estimator = hg.Implicit(hg.Newton())
    >>> first, *_ = hg.diagnose(problem, estimator, jnp.zeros(2), jnp.ones(2))
    >>> print(first.partition("; ")[2].partition(".")[0])
    the first is nan, in row 3, at index (3, 1)
    """
    check_problem_type(problem)
    check_estimator_type(estimator)
    w, alpha = as_input_arrays(w, alpha)
    key = as_key(key)
    _, estimate_key = jax.random.split(key)  # as in `hypergradient`
    data = EstimateData.sample(problem, estimate_key)
    w0 = problem.init_inner(w, alpha)
    if sentences := tuple(_describe_start(problem, data, w0, alpha)):
        return sentences
    solver = _inner_solver(estimator)
    if solver is None:
        return ()
    final_w, sentences = _describe_run(solver, problem.inner_loss, w0, alpha, data)
    if sentences:
        return sentences
    where = "at the w where the inner run ends"
    if sentences := tuple(_describe_outer(problem, data, final_w, alpha, where)):
        return sentences
    estimate = hypergradient(problem, estimator)(w, alpha, key)
    return tuple(_describe_hypergradient(estimate.hypergradient))


def _inner_solver(estimator: Any) -> Any:
    """Returns the inner solver of an estimator, also within `Average`, or None."""
    inside = getattr(estimator, "estimator", estimator)
    return getattr(inside, "solver", None)


# The data and the losses.


def _describe_start(
    problem: Bilevel, data: EstimateData, w: PyTree, alpha: PyTree
) -> Iterator[str]:
    where = "at the start"
    inner_batch = data.inner_batch()
    inner = _describe_loss(
        "inner_loss", problem.inner_loss, w, alpha, inner_batch, where
    )
    for name, arrays, sentences in (
        ("inner_data", data.inner_data, list(inner)),
        (
            "outer_data",
            data.outer_data,
            [*_describe_outer(problem, data, w, alpha, where)],
        ),
    ):
        if sentences:
            yield from _describe_data(name, arrays)
            yield from sentences


def _describe_outer(
    problem: Bilevel, data: EstimateData, w: PyTree, alpha: PyTree, where: str
) -> Iterator[str]:
    batch = data.outer_batch()
    if not isinstance(problem.outer_loss, tuple):
        losses = {"outer_loss": problem.outer_loss}
    else:
        losses = {f"outer_loss[{k}]": f for k, f in enumerate(problem.outer_loss)}
    for name, loss in losses.items():
        yield from _describe_loss(name, loss, w, alpha, batch, where)


def _describe_loss(
    name: str, loss: Loss, w: PyTree, alpha: PyTree, batch: PyTree, where: str
) -> Iterator[str]:
    """Yields a sentence if the value or a gradient of a loss is not finite."""
    value, grads = _value_and_grads(loss, w, alpha, batch)
    if not np.isfinite(value):
        has_bad_data = any(True for _ in _nonfinite_leaves(batch))
        yield (
            f"{name} is therefore {value} {where}."
            if has_bad_data
            else f"{name} is {value} {where}. {FIND_OPERATION}"
        )
        return
    for variable, grad in zip(("w", "alpha"), grads, strict=True):
        for path, _ in _nonfinite_leaves(grad):
            yield (
                f"the gradient of {name} by {variable}{path} is not finite {where}, "
                f"although the loss is. {FIND_DERIVATIVE}"
            )
            return


@eqx.filter_jit
def _value_and_grads(loss, w, alpha, batch):
    return jax.value_and_grad(loss, argnums=(0, 1))(w, alpha, batch)


def _describe_data(name: str, data: PyTree) -> Iterator[str]:
    """Yields a sentence for each leaf that holds a number that is not finite."""
    arrays = data.data if isinstance(data, Batches) else data
    for path, leaf in _nonfinite_leaves(arrays):
        indices = np.argwhere(~np.isfinite(leaf))
        index = tuple(indices[0].tolist())
        numbers = "number that is" if len(indices) == 1 else "numbers that are"
        position = f", in row {index[0]}, at index {index}" if index else ""
        yield (
            f"{name}{path} has {len(indices)} {numbers} not finite; the first is "
            f"{leaf[index]}{position}. Drop such rows, fill them, or mask them before "
            "anything is computed with them."
        )


def _nonfinite_leaves(tree: PyTree) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the path and the numbers of each leaf that is not finite."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if is_key(leaf) or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        array = np.asarray(leaf, dtype=np.promote_types(leaf.dtype, np.float32))
        if not np.isfinite(array).all():
            yield jax.tree_util.keystr(path), array


# The inner run.


class RunRecord(NamedTuple):
    """Numbers of an inner run before each of its T steps and after the last one.

    Attributes:
      value: ``L`` on the batch of the next step, or on all data after the last one.
      w_norm: ``||w||``.
      grad_norm: ``||dL/dw||`` on the same batch.
    """

    value: Float[Array, " T+1"]
    w_norm: Float[Array, " T+1"]
    grad_norm: Float[Array, " T+1"]


def _describe_run(
    solver: Any, loss: Loss, w: PyTree, alpha: PyTree, data: EstimateData
) -> tuple[PyTree, tuple[str, ...]]:
    """Returns where an inner run ends, and a sentence if it went wrong."""
    if getattr(solver, "differentiable", False):
        final_w, record = _record_run(solver, loss, w, alpha, data)
        return final_w, tuple(_describe_record(jax.device_get(record)))
    final_w = _solve(solver, loss, w, alpha, data)
    for path, _ in _nonfinite_leaves(final_w):
        sentence = (
            f"{type(solver).__name__}.solve returns a w{path} that is not finite, "
            "although inner_loss and its gradient are finite at the start. Start "
            "nearer to the solution, lower the step size, or add a penalty on w if "
            "the loss has no minimum."
        )
        return final_w, (sentence,)
    return final_w, ()


@eqx.filter_jit
def _solve(solver, loss, w, alpha, data):
    return solver.solve(loss, w, alpha, data.inner_data, data.solver_key)[0]


@eqx.filter_jit
def _record_run(solver, loss, w, alpha, data):
    """Returns the last w and the record of a run with the keys of `run_inner_steps`."""
    init_key, steps_key = jax.random.split(data.solver_key)
    keys = jax.random.split(steps_key, solver.num_steps)
    carry = solver.init(loss, w, alpha, data.inner_data, init_key)

    def measure(w, batch):
        value, grad = jax.value_and_grad(loss)(w, alpha, batch)
        return RunRecord(value, safe_norm(w), safe_norm(grad))

    def step(carry, key):
        numbers = measure(carry[0], sample_batch(data.inner_data, key))
        return solver.step(loss, carry, alpha, data.inner_data, key), numbers

    (w, _), record = jax.lax.scan(step, carry, keys)
    final_numbers = measure(w, data.inner_batch())
    return w, jax.tree.map(jnp.append, record, final_numbers)


def _describe_record(record: RunRecord) -> Iterator[str]:
    """Yields a sentence if a run diverges or leaves the finite numbers."""
    is_finite = np.isfinite(np.stack(record)).all(axis=0)
    num_steps = len(is_finite) - 1
    stays_finite = bool(is_finite.all())
    stop = num_steps if stays_finite else int(np.argmin(is_finite))
    num_good = stop if stays_finite else max(stop - 1, 0)  # steps
    grad_norms, w_norms = record.grad_norm[[0, num_good]], record.w_norm[[0, num_good]]
    growth = (
        "||dL/dw|| goes from {:.3g} to {:.3g} and ||w|| from {:.3g} to {:.3g} in the "
        "first {} steps"
    ).format(*grad_norms, *w_norms, num_good)
    has_grown = grad_norms[1] > GROWTH * grad_norms[0]
    if stays_finite:
        if has_grown and record.value[-1] > record.value[0]:
            yield (
                f"the inner run diverges: {growth}, which are all of them, and "
                f"inner_loss from {record.value[0]:.3g} to {record.value[-1]:.3g}. "
                f"{LOWER_RATE}"
            )
    elif has_grown:
        yield (
            f"the inner run diverges: {growth}, and a number is not finite after step "
            f"{stop} of {num_steps}. {LOWER_RATE}"
        )
    else:
        yield (
            f"the inner run leaves the finite numbers after step {stop} of {num_steps} "
            f"without a divergence: inner_loss is {record.value[stop]:.3g} and ||w|| "
            f"is {record.w_norm[stop]:.3g} there, and {growth}. w reaches a point "
            "where the loss or its gradient is not defined, such as log(0) or sqrt(0); "
            "`with jax.debug_nans(True):` names the operation."
        )


# The hypergradient.


def _describe_hypergradient(hypergradient: PyTree) -> Iterator[str]:
    for path, _ in _nonfinite_leaves(hypergradient):
        yield (
            f"the hypergradient by alpha{path} is not finite, although the inner run, "
            "the losses and their gradients are: a second derivative is not. Adam has "
            "none where a gradient is always 0, unless eps_root is positive, as in "
            "optax.adam(0.1, eps_root=1e-8); roots and norms have none at 0."
        )
