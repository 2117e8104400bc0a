"""The time of one estimate and of its parts, measured on the user's own problem."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jax.lax import fori_loop
from jaxtyping import Array, PyTree

from .checks.problem import check_problem_type
from .cost import CompiledProgram, compile_program
from .display.tables import Row, render_html, render_text
from .estimators.base import Estimate, Estimator, normalize_estimate
from .keys_in_w import bind_keys
from .number_checks import check_positive_int
from .problem import Bilevel, EstimateData
from .validation import (
    as_input_arrays,
    as_key,
    check_estimator_type,
    floats_to_arrays,
    is_traced,
)

NUM_STEPS = 100  # of a single-loop method, whose single step takes little time
SECONDS_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Profile:
    """The time of one estimate and of its parts, made by `profile`.

    Attributes:
      estimator: Name of the class of the estimator.
      seconds: Wall-clock time of one estimate, or of one step of a single-loop method.
      solve_seconds: Time of one inner solve alone; NaN if the estimator has no
        ``solver``, or stops it by a tolerance of its own (``rtol``).
      error_seconds: Time that the estimate takes longer than without its error
        estimate or certificate; NaN if it has none.
      program: The compiled estimate, or 100 steps of a single-loop method, with its
        operations, its bytes, and the seconds that it took to trace and to compile.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> loss = lambda w, alpha, batch: jnp.sum((w - jnp.tanh(alpha)) ** 2)
    >>> problem, estimator = hg.Bilevel(loss, loss), hg.Implicit(hg.Newton())
    >>> measured = hg.profile(problem, estimator, jnp.zeros(3), jnp.ones(3))
    >>> [row.split("  ")[1] for row in repr(measured).splitlines()[1:4]]
    ['one estimate', 'one inner solve', 'error estimate']
    """

    estimator: str
    seconds: float
    solve_seconds: float
    error_seconds: float
    program: CompiledProgram

    def __repr__(self) -> str:
        """Returns a table as text."""
        return render_text(f"Profile of {self.estimator}", self._rows())

    def _repr_html_(self) -> str:
        """Returns a table as HTML."""
        return render_html(f"Profile of {self.estimator}", self._rows())

    def _rows(self) -> list[Row]:
        """Returns the whole, its parts with their percentages, and what is once."""
        parts = {
            "one inner solve": self.solve_seconds,
            "error estimate": self.error_seconds,
        }
        parts = {name: x for name, x in parts.items() if not math.isnan(x)}
        if parts:
            measured = sum(max(seconds, 0.0) for seconds in parts.values())
            parts["everything else"] = self.seconds - measured
        percent = lambda seconds: f"{seconds / self.seconds:.0%}"
        trace, compilation = self.program.trace_seconds, self.program.compile_seconds
        return [
            ("one estimate", format_seconds(self.seconds)),
            *[
                (name, f"{format_seconds(seconds)}, {percent(seconds)}")
                if seconds > 0  # it is a difference of two measured times
                else (name, "too short to measure")
                for name, seconds in parts.items()
            ],
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

    Compiles and runs three programs in turns: the first estimate from ``w``, the same
    without its error estimate or certificate, and its inner solve alone. The time of a
    part is a median, or the difference of two. Of a single-loop method 100 steps are
    run at this ``alpha``, and nothing else.

    Args:
      problem: The problem.
      estimator: The estimator.
      w, alpha: The point of the estimate.
      key: PRNG key of the estimate. Defaults to ``jax.random.key(0)``.
      num_calls: Number of calls of each program of which the median time is taken.

    Returns:
      The profile, which prints as a table.

    Raises:
      TypeError, ValueError: An argument is invalid, as in `hypergradient`, or a tracer.

    Cost:
      Three compilations, and ``num_calls + 1`` calls of the three programs.
    Bias:
      Other work on the machine counts. A difference of two medians is as uncertain as
      they are, and may be negative. An estimator that makes several inner runs, such as
      `Evolution`, has the others in what remains.

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, x: jnp.mean((x @ w - 1) ** 2) + jnp.sum(alpha * w**2)
    >>> outer = lambda w, alpha, x: jnp.mean((x @ w - 1) ** 2)
    >>> problem = hg.Bilevel(inner, outer, jnp.eye(5), jnp.ones((4, 5)))
    >>> estimator = hg.Unrolled(hg.Descent(optax.sgd(0.1), 20))
    >>> measured = hg.profile(problem, estimator, jnp.zeros(5), jnp.ones(5))
    >>> measured.seconds > 0 and measured.solve_seconds > 0
    True
    """
    check_problem_type(problem)
    check_estimator_type(estimator)
    check_positive_int("num_calls", num_calls)
    if is_traced(problem, estimator, w, alpha, key):
        raise ValueError("profile needs concrete arrays; call it outside of jax.jit.")
    w, alpha = as_input_arrays(w, alpha)
    problem, w = bind_keys(problem, w)
    init_key, estimate_key = jax.random.split(as_key(key))  # as in `hypergradient`
    estimator, problem = floats_to_arrays((estimator, problem))
    num_estimates = NUM_STEPS if getattr(estimator, "is_single_loop", False) else 1
    compile_estimate = lambda estimator: _compile(
        _repeat_estimate(num_estimates),
        *(estimator, problem, estimator.init(problem, w, alpha, init_key)),
        *(alpha, estimate_key),
    )
    program, run = compile_estimate(estimator)
    runs = {"whole": run}
    if (cheaper := _without_error_estimate(estimator)) is not None:
        _, runs["cheaper"] = compile_estimate(cheaper)
    if (solver := _inner_solver(estimator)) is not None:
        _, runs["solve"] = _compile(_solve, solver, problem, w, alpha, estimate_key)
    seconds = _median_seconds(runs, num_calls)
    return Profile(
        estimator=type(estimator).__name__,
        seconds=seconds["whole"] / num_estimates,
        solve_seconds=seconds.get("solve", math.nan),
        error_seconds=seconds["whole"] - seconds.get("cheaper", math.nan),
        program=program,
    )


def _without_error_estimate(estimator: Any) -> Any:
    """Returns the estimator without its error estimate, or None if it has none."""
    if (inside := getattr(estimator, "estimator", None)) is not None:  # of an `Average`
        if (cheaper := _without_error_estimate(inside)) is None:
            return None
        return dataclasses.replace(estimator, estimator=cheaper)
    is_adaptive = getattr(estimator, "rtol", None) is not None
    names = [x for x in ("estimate_error", "certify") if getattr(estimator, x, False)]
    if getattr(estimator, "hvp_fn", None) is not None and "certify" not in names:
        return None  # the error is not estimated with products of the user
    if is_adaptive or not names:
        return None
    return dataclasses.replace(estimator, **dict.fromkeys(names, False))


def _inner_solver(estimator: Any) -> Any:
    """Returns the solver that the estimator runs to its end, or None."""
    is_adaptive = getattr(estimator, "rtol", None) is not None
    is_cut = hasattr(estimator, "unroll_length")  # an estimate makes some of the steps
    return None if is_adaptive or is_cut else getattr(estimator, "solver", None)


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


def _solve(solver: Any, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array) -> Any:
    """Returns the result of one inner solve on the sample of the estimate."""
    data = EstimateData.sample(problem, key)
    init_w = problem.init_inner(w, alpha)
    return solver.solve(
        problem.inner_loss, init_w, alpha, data.inner_data, data.solver_key
    )


def _compile(
    function: Callable[..., Any], *args: Any
) -> tuple[CompiledProgram, Callable[[], Any]]:
    """Returns ``function(*args)`` as a program, and a function that runs it."""
    program, arrays = compile_program(function, *args), eqx.filter(args, eqx.is_array)
    return program, lambda: program.executable(arrays)


def _median_seconds(
    functions: dict[str, Callable[[], Any]], num_calls: int
) -> dict[str, float]:
    """Returns the median time of each function, which are called in turns.

    The first call of each is not counted.
    """
    times = {name: [] for name in functions}
    for _ in range(num_calls + 1):
        for name, function in functions.items():
            start_time = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start_time)
    return {name: statistics.median(x[1:]) for name, x in times.items()}


def format_seconds(seconds: float) -> str:
    """Returns a time with two digits and a unit.

    >>> format_seconds(1.24e-5), format_seconds(0.13), format_seconds(2.0)
    ('12 us', '130 ms', '2 s')
    """
    size, unit = next(
        (pair for pair in SECONDS_UNITS if abs(seconds) >= pair[0]), SECONDS_UNITS[-1]
    )
    return f"{float(f'{seconds / size:.2g}'):g} {unit}"
