"""The time of one estimate and of its parts, measured on the user's own problem."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.lax import fori_loop
from jaxtyping import Array, PyTree

from .batches import batch_fraction, fixed_batch_fraction, sample_batch
from .cost import CompiledProgram, compile_program
from .display import COUNT_NOUNS, Row, format_count, render_html, render_text
from .estimators.base import Estimate, Estimator, normalize_estimate
from .problem import Bilevel, EstimateData
from .problem_checks import check_problem_type
from .products import hvp
from .trees import add_scale, random_like
from .validation import (
    as_input_arrays,
    as_key,
    check_estimator_type,
    check_positive_int,
    floats_to_arrays,
    is_traced,
)

NUM_STEPS = 100  # of a single-loop method, whose single step takes little time
LOOP_SECONDS = 0.05  # that a loop over one kind of call should take
NUM_LOOPS = 3  # of which the median is taken
MAX_CALLS = 10_000  # in such a loop
SECONDS_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


@dataclasses.dataclass(frozen=True)
class CallTime:
    """The calls of one kind within an estimate, and the time of each.

    Attributes:
      stat: Name of their number in ``stats`` of an estimate, such as ``num_hvps``.
      num_calls: Number of calls in the estimate. A call on a mini-batch counts as one.
      seconds_per_call: Wall-clock time of one call in a compiled loop of such calls.
    """

    stat: str
    num_calls: float
    seconds_per_call: float

    @property
    def seconds(self) -> float:
        """Wall-clock time of all calls together."""
        return self.num_calls * self.seconds_per_call


@dataclasses.dataclass(frozen=True, repr=False)
class Profile:
    """The time of one estimate and of its parts, made by `profile`.

    Attributes:
      estimator: Name of the class of the estimator.
      num_estimates: Number of estimates in the program: 1, or 100 steps of a
        single-loop method.
      seconds: Wall-clock time of the program, the median of several calls.
      call_times: Gradients, Hessian-vector products and values of the inner loss, and
        gradients and values of the outer loss, as far as the estimate makes them.
      program: The compiled estimate with its operations, its bytes and the seconds that
        it took to trace and to compile.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> loss = lambda w, alpha, batch: jnp.sum((w - jnp.tanh(alpha)) ** 2)
    >>> problem, estimator = hg.Bilevel(loss, loss), hg.Implicit(hg.Newton())
    >>> measured = hg.profile(problem, estimator, jnp.zeros(3), jnp.ones(3))
    >>> [row.split("  ")[1] for row in repr(measured).splitlines()[1:4]]
    ['gradients', 'HVPs', 'outer gradients']
    """

    estimator: str
    num_estimates: int
    seconds: float
    call_times: tuple[CallTime, ...]
    program: CompiledProgram

    @property
    def other_seconds(self) -> float:
        """Time that is in no call of a loss: optimizer, solvers and checks.

        It is below zero where calls are faster in the estimate than in a loop of their
        own.
        """
        return self.seconds - sum(call_time.seconds for call_time in self.call_times)

    def __repr__(self) -> str:
        """Returns a table as text."""
        return render_text(self._title, self._rows())

    def _repr_html_(self) -> str:
        """Returns a table as HTML."""
        return render_html(self._title, self._rows())

    @property
    def _title(self) -> str:
        if self.num_estimates == 1:
            return f"Profile of {self.estimator}"
        return f"Profile of {self.num_estimates} steps of {self.estimator}"

    def _rows(self) -> list[Row]:
        """Returns a row per kind of call, one for the rest, and the first call."""
        percent = lambda seconds: f"{seconds / self.seconds:.0%}"
        rows = []
        for call_time in self.call_times:
            calls = format_count(call_time.num_calls, ("call", "calls"))
            duration = format_seconds(call_time.seconds_per_call)
            text = f"{percent(call_time.seconds)}: {calls} of {duration}"
            rows.append((COUNT_NOUNS[call_time.stat][1], text))
        trace, compilation = self.program.trace_seconds, self.program.compile_seconds
        return [
            *rows,
            ("everything else", percent(self.other_seconds)),
            ("all", format_seconds(self.seconds)),
            (
                "before the first",
                f"traced in {format_seconds(trace)}, compiled in "
                f"{format_seconds(compilation)}",
            ),
            ("memory", f"{self.program.memory.peak:,} bytes"),
        ]


def profile(
    problem: Bilevel,
    estimator: Estimator,
    w: PyTree,
    alpha: PyTree,
    key: Array | None = None,
    *,
    num_calls: int = 5,
) -> Profile:
    """Measures where the time of an estimate goes.

    The first estimate from ``w``, or 100 steps of a single-loop method at this
    ``alpha``, are compiled and run several times. Each kind of call that its ``stats``
    count is then timed alone, in compiled loops of about a twentieth of a second: an
    inner gradient or value on a batch as an inner step samples it, a Hessian-vector
    product without the cross term at a fixed ``w``, and an outer value, or gradient in
    ``w`` and ``alpha``, for all outer losses.

    Args:
      problem: The problem.
      estimator: The estimator.
      w, alpha: The point of the estimate.
      key: PRNG key of the estimate. Defaults to ``jax.random.key(0)``.
      num_calls: Number of calls of the program of which the median time is taken.

    Returns:
      The profile, which prints as a table.

    Raises:
      TypeError, ValueError: An argument is invalid, as in `hypergradient`, or a tracer.

    Cost:
      ``num_calls + 1`` calls of the estimate, a quarter of a second per kind of call,
      and the compilation of a program for the estimate and for each kind.
    Bias:
      Other work on the machine counts. A call alone and the same call within an
      estimate may be compiled to different code, so that the shares are approximate and
      need not add up to less than one.

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, x: jnp.mean((x @ w - 1) ** 2) + jnp.sum(alpha * w**2)
    >>> outer = lambda w, alpha, x: jnp.mean((x @ w - 1) ** 2)
    >>> problem = hg.Bilevel(inner, outer, jnp.eye(5), jnp.ones((4, 5)))
    >>> estimator = hg.Unrolled(hg.Descent(optax.sgd(0.1), 20))
    >>> measured = hg.profile(problem, estimator, jnp.zeros(5), jnp.ones(5))
    >>> [(call.stat, call.num_calls) for call in measured.call_times]
    [('num_grads', 21.0), ('num_hvps', 20.0), ('num_outer_grads', 1.0)]
    """
    check_problem_type(problem)
    check_estimator_type(estimator)
    check_positive_int("num_calls", num_calls)
    if is_traced(problem, estimator, w, alpha, key):
        raise ValueError("profile needs concrete arrays; call it outside of jax.jit.")
    w, alpha = as_input_arrays(w, alpha)
    init_key, estimate_key = jax.random.split(as_key(key))  # as in `hypergradient`
    estimator, problem = floats_to_arrays((estimator, problem))
    state = estimator.init(problem, w, alpha, init_key)
    num_estimates = NUM_STEPS if getattr(estimator, "is_single_loop", False) else 1
    args = estimator, problem, state, alpha, estimate_key
    program = compile_program(_repeat_estimate(num_estimates), *args)
    arrays = eqx.filter(args, eqx.is_array)
    seconds, (result, _) = _time_calls(lambda: program.executable(arrays), num_calls)
    data = EstimateData.sample(problem, estimate_key)
    point = _Point(problem.init_inner(w, alpha), alpha, random_like(init_key, w))
    return Profile(
        estimator=type(estimator).__name__,
        num_estimates=num_estimates,
        seconds=seconds,
        call_times=tuple(
            CallTime(
                kind.stat,
                num_estimates
                * round(float(result.stats[kind.stat]) / kind.fraction, 3),
                _seconds_per_call(kind, data, point),
            )
            for kind in _kinds(problem, estimator, data)
            if result.stats[kind.stat] > 0
        ),
        program=program,
    )


def _repeat_estimate(num_estimates: int) -> Callable[..., tuple[Estimate, Any]]:
    """Returns a function that makes so many estimates, and returns the last one."""

    def estimate(estimator, problem, state, alpha, key):
        result, next_state = estimator.estimate(problem, state, alpha, key)
        return normalize_estimate(result), next_state

    def run(estimator, problem, state, alpha, key):
        def body(i, carry):
            next_key = jax.random.fold_in(key, i)
            return estimate(estimator, problem, carry[1], alpha, next_key)

        carry = estimate(estimator, problem, state, alpha, key)
        return carry if num_estimates == 1 else fori_loop(1, num_estimates, body, carry)

    return run


def format_seconds(seconds: float) -> str:
    """Returns a time with two digits and a unit.

    >>> format_seconds(1.24e-5), format_seconds(0.13), format_seconds(2.0)
    ('12 us', '130 ms', '2 s')
    """
    size, unit = next(
        (pair for pair in SECONDS_UNITS if seconds >= pair[0]), SECONDS_UNITS[-1]
    )
    return f"{float(f'{seconds / size:.2g}'):g} {unit}"


class _Point(NamedTuple):
    """The arguments of a call, or a change of them, in which None is no change.

    Attributes:
      w, alpha: Arguments of the losses.
      v: A vector like ``w``.
    """

    w: PyTree = None
    alpha: PyTree = None
    v: PyTree = None


class _Kind(NamedTuple):
    """A kind of call.

    Attributes:
      stat: Name of its count among the statistics of an estimate.
      fraction: What a call adds to this count.
      call: Function ``(point, data, key) -> change``, which has the results of the call
        in place of a part of the point.
    """

    stat: str
    fraction: float
    call: Callable[[_Point, EstimateData, Array], _Point]


def _kinds(problem: Bilevel, estimator: Any, data: EstimateData) -> tuple[_Kind, ...]:
    """Returns all kinds of calls, on the batches on which the estimator makes them."""
    inside = getattr(estimator, "estimator", estimator)  # that of `Average`
    inner_loss, num_losses = problem.inner_loss, problem.num_objectives or 1
    step_batch = lambda data, key: sample_batch(data.inner_data, key)
    step_fraction = batch_fraction(data.inner_data)
    product_batch, product_fraction = step_batch, step_fraction
    if hasattr(inside, "adjoint_batch_size"):
        size = inside.adjoint_batch_size
        product_batch = lambda data, _: data.inner_batch(size)
        product_fraction = fixed_batch_fraction(data.inner_data, size)
    outer_batch = lambda data, key: sample_batch(data.outer_data, key)
    outer_fraction = num_losses * batch_fraction(data.outer_data)
    if hasattr(inside, "outer_batch_size"):
        outer_size = inside.outer_batch_size
        outer_batch = lambda data, _: data.outer_batch(outer_size)
        outer_fraction = num_losses * fixed_batch_fraction(data.outer_data, outer_size)

    def inner_grad(point, data, key):
        batch = step_batch(data, key)
        return _Point(w=jax.grad(inner_loss)(point.w, point.alpha, batch))

    def product(point, data, key):
        batch = product_batch(data, key)
        return _Point(v=hvp(inner_loss, point.w, point.alpha, batch, point.v))

    def inner_value(point, data, key):
        value = inner_loss(point.w, point.alpha, step_batch(data, key))
        return _Point(w=jax.tree.map(lambda _: value, point.w))

    def outer_grad(point, data, key):
        batch = outer_batch(data, key)
        _, *grads = problem.outer_value_and_grads(point.w, point.alpha, batch)
        sum_losses = lambda x: x if problem.num_objectives is None else jnp.sum(x, 0)
        return _Point(*jax.tree.map(sum_losses, grads))

    def outer_value(point, data, key):
        batch = outer_batch(data, key)
        value = jnp.sum(problem.outer_value(point.w, point.alpha, batch))
        return _Point(w=jax.tree.map(lambda _: value, point.w))

    return (
        _Kind("num_grads", step_fraction, inner_grad),
        _Kind("num_hvps", product_fraction, product),
        _Kind("num_values", step_fraction, inner_value),
        _Kind("num_outer_grads", outer_fraction, outer_grad),
        _Kind("num_outer_values", outer_fraction, outer_value),
    )


def _seconds_per_call(kind: _Kind, data: EstimateData, point: _Point) -> float:
    """Returns the time of a call in a compiled loop, each at a new point."""
    loop, zero = eqx.filter_jit(_repeat_call), jnp.zeros(())
    run = lambda n: lambda: loop(kind, data, point, zero, jnp.asarray(n))
    seconds, _ = _time_calls(run(1), 1)
    num_calls = int(min(max(LOOP_SECONDS / seconds, 1), MAX_CALLS))
    seconds, _ = _time_calls(run(num_calls), NUM_LOOPS)
    return seconds / num_calls


def _repeat_call(
    kind: _Kind, data: EstimateData, point: _Point, zero: Array, num_calls: Array
) -> _Point:
    """Returns the point after calls whose results, times ``zero``, are added to it.

    The compiler does not know that nothing is added, so that it leaves out no call.
    """
    add = lambda x, dx: x if dx is None else add_scale(x, zero, dx)

    def body(i, point):
        change = kind.call(point, data, jax.random.fold_in(data.solver_key, i))
        return _Point(*map(add, point, change))

    return fori_loop(0, num_calls, body, point)


def _time_calls(function: Callable[[], Any], num_calls: int) -> tuple[float, Any]:
    """Returns the median time of calls after a first one, and the last result."""
    result, times = jax.block_until_ready(function()), []
    for _ in range(num_calls):
        start_time = time.perf_counter()
        result = jax.block_until_ready(function())
        times.append(time.perf_counter() - start_time)
    return statistics.median(times), result
