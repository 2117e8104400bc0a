"""Names the place where an estimate stops being finite, or loses a derivative."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .batches import Batches, at_draw, sample_batch
from .checks.lost_derivatives import describe_lost_derivatives
from .checks.problem import check_problem_type
from .estimators.base import Estimate, Estimator, keys_of_samples
from .hypergradient import hypergradient
from .keys_in_w import bind_keys, remove_keys
from .problem import Bilevel, EstimateData
from .products import Loss
from .trees import is_key, safe_norm
from .validation import as_input_arrays, as_key, check_estimator_type, is_traced

GROWTH = 10.0  # of the norms of w and of the gradient in a run that diverges

FIND_OPERATION = (
    "Look for the logarithm or root of a number that reaches 0, a division by 0, or an "
    "overflow. `with jax.debug_nans(True):` around a call of the loss alone names the "
    "operation."
)
FIND_DERIVATIVE = (
    "A root or a norm has no derivative at 0, and jnp.where(mask, f(x), 0) has a bad "
    "one wherever f(x) has: replace x inside of f."
)
LOWER_RATE = (
    "Lower the step size of the inner solver, clip the gradients of an optimizer by "
    "optax.clip_by_global_norm, or add a penalty on w if the loss has no minimum."
)


def diagnose(
    problem: Bilevel,
    estimator: Estimator,
    w: PyTree,
    alpha: PyTree,
    key: Array | None = None,
) -> tuple[str, ...]:
    """Returns sentences that name where an estimate stops being finite.

    Where all is finite and the estimate has the flag ``lost_derivative``, or a loss of
    a single-loop method would set it, they name the operations that lose derivatives,
    with file and line.

    The places are visited in the order in which `hypergradient` computes with the same
    arguments, and the first bad one ends the search: ``w`` and ``alpha``, both losses
    on all data at the start, the inner run, the outer loss at its end, the estimate.
    Where a loss is not finite, numbers of its data that are not are named by leaf,
    first row and index. A divergence of the inner run is named by its step and the
    norms of ``w`` and of ``dL/dw``.

    Args:
      problem: The problem.
      estimator: The estimator. Of a single-loop method only the losses are looked at.
      w, alpha: The point of the estimate. For a run that was stopped, with
        ``record_alphas=True`` and a row per step, ``alpha`` has the leaves of
        ``trace.alphas`` at `Trace.last_row`, and ``w`` is ``trace.w``. It is the ``w``
        from which the run started if each estimate starts there: with
        ``warm_start=False``, which is the default of some estimators, and for
        `Unrolled` with an inner optimizer that depends on ``alpha``.
      key: PRNG key of the estimate. Defaults to ``jax.random.key(0)``. Where batches
        are sampled, another key may fail although this one does not.

    Returns:
      The sentences, or none if everything is finite, the inner run does not diverge,
      and the estimate does not have the flag ``lost_derivative``.

    Cost:
      An estimate, an inner run with a further gradient at each step, gradients of both
      losses on all data, and compilation: for the moment after a failure, not a loop.
      Of an average, a run and the gradients for each sample until a cause is known.

    Raises:
      TypeError, ValueError: An argument is invalid, as in `hypergradient`, or a tracer.

    >>> import jax.numpy as jnp, numpy as np, hypergrad as hg
    >>> loss = lambda w, alpha, x: jnp.mean((x @ w) ** 2) + jnp.sum(alpha * w**2)
    >>> x = np.ones((5, 2))
    >>> x[3, 1] = np.nan
    >>> problem = hg.Bilevel(loss, loss, inner_data=x, outer_data=np.ones((5, 2)))
    >>> estimator = hg.Implicit(hg.Newton())
    >>> first, second = hg.diagnose(problem, estimator, jnp.zeros(2), jnp.ones(2))
    >>> print(second.partition("; ")[2].partition(".")[0])
    the first is nan, in row 3, at index (3, 1)
    """
    check_problem_type(problem)
    check_estimator_type(estimator)
    if is_traced(problem, estimator, w, alpha, key):
        raise ValueError("diagnose needs concrete arrays; call it outside of jax.jit.")
    w, alpha = as_input_arrays(w, alpha)
    problem, w = bind_keys(problem, w)
    _, estimate_key = jax.random.split(as_key(key))  # as in `hypergradient`
    w0 = problem.init_inner(w, alpha)
    if sentences := tuple(_describe_point(problem, w0, alpha)):
        return sentences
    inside = getattr(estimator, "estimator", estimator)  # that of `Average`
    is_single_loop = getattr(estimator, "is_single_loop", False)
    solver = None if is_single_loop else getattr(inside, "solver", None)
    for sample_key in keys_of_samples(estimator, estimate_key):
        data = EstimateData.sample(problem, sample_key)
        if sentences := tuple(_describe_sample(problem, solver, data, w0, alpha)):
            return sentences
    if is_single_loop:
        return tuple(describe_lost_derivatives(problem, inside, w0, alpha))
    estimate = hypergradient(problem, estimator)(w, alpha, key)
    if sentences := tuple(_describe_estimate(estimate)):
        return sentences
    if not estimate.flags.get("lost_derivative", False):
        return ()
    w = remove_keys(estimate.w)
    return tuple(describe_lost_derivatives(problem, inside, w, alpha))


def _describe_sample(
    problem: Bilevel, solver: Any, data: EstimateData, w0: PyTree, alpha: PyTree
) -> Iterator[str]:
    """Yields what is not finite at the start, along the inner run, or at its end."""
    is_finite = True
    for sentence in _describe_start(problem, data, w0, alpha):
        is_finite = False
        yield sentence
    if solver is None or not is_finite:
        return
    final_w, sentences = _describe_run(solver, problem.inner_loss, w0, alpha, data)
    if sentences:
        yield from sentences
        return
    position = "at the w where the inner run ends"
    yield from _describe_outer(problem, data, final_w, alpha, position)


# The starting point, the losses and the data.


def _describe_point(problem: Bilevel, w: PyTree, alpha: PyTree) -> Iterator[str]:
    """Yields a sentence for each leaf of ``w`` and ``alpha`` that is not finite."""
    origin = "the starting point has" if problem.init_fn is None else "init_fn returns"
    for path, _ in _nonfinite_leaves(w):
        yield f"{origin} a w{path} that is not finite."
    for path, _ in _nonfinite_leaves(alpha):  # `as_input_arrays` refuses NaN
        yield f"alpha{path} is infinite."


def _describe_start(
    problem: Bilevel, data: EstimateData, w: PyTree, alpha: PyTree
) -> Iterator[str]:
    """Yields sentences on losses that are not finite, each before those on its data."""
    position, batch = "at the start", data.inner_batch()
    inner = _describe_loss("inner_loss", problem.inner_loss, w, alpha, batch, position)
    if sentences := tuple(inner):
        yield from sentences
        yield from _describe_data("inner_data", data.inner_data)
    if sentences := tuple(_describe_outer(problem, data, w, alpha, position)):
        yield from sentences
        yield from _describe_data("outer_data", data.outer_data)


def _describe_outer(
    problem: Bilevel, data: EstimateData, w: PyTree, alpha: PyTree, position: str
) -> Iterator[str]:
    batch = data.outer_batch()
    for k, loss in enumerate(problem.outer_losses):
        name = "outer_loss" if problem.num_objectives is None else f"outer_loss[{k}]"
        yield from _describe_loss(name, loss, w, alpha, batch, position)


def _describe_loss(
    name: str, loss: Loss, w: PyTree, alpha: PyTree, batch: PyTree, position: str
) -> Iterator[str]:
    """Yields a sentence if the value or a gradient of a loss is not finite."""
    value, grads = _value_and_grads(loss, w, alpha, batch)
    if not np.isfinite(value):
        if any(True for _ in _nonfinite_leaves(batch)):
            yield f"{name} is {value} {position}, and its data is not finite either."
        elif message := _error_of_known_values(loss, w, alpha, batch):
            yield f"{name} is {value} {position}, of inputs that it refuses: {message}"
        else:
            yield f"{name} is {value} {position}, of finite inputs. {FIND_OPERATION}"
        return
    for variable, grad in zip(("w", "alpha"), grads, strict=True):
        for path, _ in _nonfinite_leaves(grad):
            yield (
                f"the gradient of {name} by {variable}{path} is not finite {position}, "
                f"although the loss is. {FIND_DERIVATIVE}"
            )
            return


def _error_of_known_values(loss: Loss, w: PyTree, alpha: PyTree, batch: PyTree) -> str:
    """Returns the error of a loss that checks its inputs where they are not traced.

    Surrogates do: under `jax.jit` they return NaN of targets that are not valid.
    """
    try:
        loss(w, alpha, batch)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


@eqx.filter_jit
def _value_and_grads(loss, w, alpha, batch):
    return jax.value_and_grad(loss, argnums=(0, 1))(w, alpha, batch)


def _describe_data(name: str, data: PyTree) -> Iterator[str]:
    """Yields a sentence for each leaf that holds a number that is not finite."""
    trees = {name: data}
    if isinstance(data, Batches):
        trees = {name: data.data, f"{name}.shared": data.shared}
    for tree_name, tree in trees.items():
        for path, leaf in _nonfinite_leaves(tree):
            indices = np.argwhere(~np.isfinite(leaf))
            index = tuple(indices[0].tolist())
            numbers = "number that is" if len(indices) == 1 else "numbers that are"
            position = f", in row {index[0]}, at index {index}" if index else ""
            yield (
                f"{tree_name}{path} has {len(indices)} {numbers} not finite; the first "
                f"is {leaf[index]}{position}. Drop such rows, fill them, or mask them "
                "before anything is computed with them."
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
      value: ``L`` on the batch of the next step; the first and the last one are on all
        data.
      w_norm: ``||w||``.
      grad_norm: ``||dL/dw||`` on the same batch.
    """

    value: Float[Array, " T+1"]
    w_norm: Float[Array, " T+1"]
    grad_norm: Float[Array, " T+1"]

    def has_diverged(self) -> bool:
        """Returns whether a run whose numbers are all finite diverges.

        Both norms also grow on the way from a saddle to a minimum, where the loss falls
        until its gradient is small. A loss without a minimum falls far, and a further
        step as long as ``w`` would still change it by a part of its value.
        """
        init_value, final_value = self.value[0], self.value[-1]
        has_fallen_far = abs(final_value) > GROWTH * abs(init_value)
        next_change = self.w_norm[-1] * self.grad_norm[-1]
        is_falling = has_fallen_far and GROWTH * next_change > abs(final_value)
        return self.has_grown(-1) and bool(final_value > init_value or is_falling)

    def has_grown(self, num_steps: int) -> bool:
        """Returns whether both norms have grown by a large factor after some steps."""
        return all(
            bool(norm[num_steps] > GROWTH * norm[0])
            for norm in (self.w_norm, self.grad_norm)
        )

    def growth(self, num_steps: int) -> str:
        """Returns in words how the norms have changed after some steps."""
        return (
            f"||dL/dw|| goes from {self.grad_norm[0]:.3g} to "
            f"{self.grad_norm[num_steps]:.3g} and ||w|| from {self.w_norm[0]:.3g} to "
            f"{self.w_norm[num_steps]:.3g}"
        )


def _describe_run(
    solver: Any, loss: Loss, w: PyTree, alpha: PyTree, data: EstimateData
) -> tuple[PyTree, tuple[str, ...]]:
    """Returns where an inner run ends, and a sentence if it went wrong."""
    if getattr(solver, "differentiable", False):  # it then has `init` and `step`
        final_w, record = _record_steps(solver, loss, w, alpha, data)
        return final_w, tuple(_describe_steps(jax.device_get(record)))
    final_w, record = _record_solve(solver, loss, w, alpha, data)
    return final_w, tuple(_describe_solve(solver, final_w, jax.device_get(record)))


def _measure(loss: Loss, w: PyTree, alpha: PyTree, batch: PyTree) -> RunRecord:
    value, grad = jax.value_and_grad(loss)(w, alpha, batch)
    return RunRecord(value, safe_norm(w), safe_norm(grad))


@eqx.filter_jit
def _record_solve(solver, loss, w, alpha, data):
    """Returns the solution, and the numbers before and after the solve."""
    final_w, _ = solver.solve(loss, w, alpha, data.inner_data, data.solver_key)
    numbers = (_measure(loss, x, alpha, data.inner_batch()) for x in (w, final_w))
    return final_w, jax.tree.map(lambda *x: jnp.stack(x), *numbers)


@eqx.filter_jit
def _record_steps(solver, loss, w, alpha, data):
    """Returns the last w and the record of a run with the keys of `run_inner_steps`."""
    init_key, steps_key = jax.random.split(data.solver_key)
    keys = jax.random.split(steps_key, solver.num_steps)
    init_carry = solver.init(loss, w, alpha, data.inner_data, init_key)

    def step(carry, key_and_number):
        key, k = key_and_number
        step_data = at_draw(data.inner_data, steps_key, k, solver.num_steps, stream="w")
        numbers = _measure(loss, carry[0], alpha, sample_batch(step_data, key))
        return solver.step(loss, carry, alpha, step_data, key), numbers

    steps = keys, jnp.arange(solver.num_steps)
    (final_w, _), record = jax.lax.scan(step, init_carry, steps)
    init_numbers = _measure(loss, w, alpha, data.inner_batch())
    final_numbers = _measure(loss, final_w, alpha, data.inner_batch())
    join = lambda x, init_x, final_x: jnp.append(x, final_x).at[0].set(init_x)
    return final_w, jax.tree.map(join, record, init_numbers, final_numbers)


def _describe_solve(solver: Any, w: PyTree, record: RunRecord) -> Iterator[str]:
    """Yields a sentence if a solver without steps diverged."""
    name = f"{type(solver).__name__}.solve"
    for path, _ in _nonfinite_leaves(w):
        yield (
            f"{name} returns a w{path} that is not finite, although inner_loss and its "
            f"gradient are finite at the start. {LOWER_RATE}"
        )
        return
    if record.has_diverged():
        yield f"{name} diverges: {record.growth(1)}. {LOWER_RATE}"


def _describe_steps(record: RunRecord) -> Iterator[str]:
    """Yields a sentence if a run diverges or leaves the finite numbers."""
    is_finite = np.isfinite(np.stack(record)).all(axis=0)
    num_steps = len(is_finite) - 1
    if is_finite.all():
        if record.has_diverged():
            yield (
                f"the inner run diverges: in its {num_steps} steps "
                f"{record.growth(num_steps)}, and inner_loss from "
                f"{record.value[0]:.3g} to {record.value[-1]:.3g}. {LOWER_RATE}"
            )
        return
    bad_step = int(np.argmin(is_finite))
    good_step = max(bad_step - 1, 0)
    if record.has_grown(good_step):
        yield (
            f"the inner run diverges: up to step {good_step} "
            f"{record.growth(good_step)}, and a number is not finite after step "
            f"{bad_step} of {num_steps}. {LOWER_RATE}"
        )
    elif not np.isfinite(record.w_norm[bad_step]):
        yield (
            f"step {bad_step} of the {num_steps} inner steps returns a w that is not "
            "finite, from a finite w, loss and gradient."
        )
    else:
        yield (
            f"after step {bad_step} of the {num_steps} inner steps inner_loss is "
            f"{record.value[bad_step]:.3g}, ||dL/dw|| {record.grad_norm[bad_step]:.3g} "
            f"and ||w|| {record.w_norm[bad_step]:.3g}. "
            f"{FIND_OPERATION}"
        )


# The estimate.


def _describe_estimate(estimate: Estimate) -> Iterator[str]:
    """Yields a sentence if an estimate is not finite, although all before it is."""
    if not np.isfinite(np.asarray(estimate.value)).all():
        yield (
            f"the outer value of the estimate is {estimate.value}, although outer_loss "
            "is finite on all outer data: on the batch of this estimate, or at the "
            "points that the estimator tries, it is not."
        )
        return
    for path, _ in _nonfinite_leaves(estimate.hypergradient):
        yield (
            f"the hypergradient by alpha{path} is not finite, although the losses, "
            "their gradients and the inner run are. One of these is not: a second "
            "derivative (Adam has none where a gradient is always 0, unless eps_root "
            "is positive, as in optax.adam(0.1, eps_root=1e-8); roots and norms have "
            "none at 0), a product of the derivatives of many steps, or the "
            "adjoint, such as that of a Neumann series whose step size is too large."
        )
