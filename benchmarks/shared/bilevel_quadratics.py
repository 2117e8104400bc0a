"""The quadratics of benchmark_bilevel, and runs of both programs: `bilevel_curves`."""

import functools
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import hypergrad as hg

from .benchmark_bilevel import make_solver, make_steps, variables_of
from .step_problems import StepProblem, quadratic_loss

DIM_W, DIM_ALPHA = 100, 10
MIN_EIG, CROSS = 0.1, 0.1  # smallest eigenvalue, size of the cross terms
NUM_INNER_SAMPLES, NUM_OUTER_SAMPLES = 4096, 1024
START = -2.0
BATCH, NUM_INNER, NUM_EVALUATIONS = 64, 10, 32


class Settings(NamedTuple):
    """Step size of ``w``, its ratio to that of ``alpha``, and the number of steps."""

    step_size: float
    ratio: float
    num_steps: int


SETTINGS = {
    "SOBA": Settings(0.1, 1.0, 16_384),
    "SABA": Settings(0.1, 1.0, 4096),
    "SRBA": Settings(0.1, 1.0, 4096),
    "StocBiO": Settings(0.1, 1.0, 2048),
    "AmIGO": Settings(0.01, 0.1, 2048),
    "MRBO": Settings(0.1, 0.1, 2048),
}


def orthogonal(rng: np.random.Generator, dim: int) -> np.ndarray:
    """Returns a random orthogonal matrix."""
    return np.linalg.qr(rng.normal(size=(dim, dim)))[0]


def covariance_root(rng: np.random.Generator, eigs: np.ndarray) -> np.ndarray:
    """Returns the root of a matrix with these eigenvalues in a random basis."""
    basis = orthogonal(rng, eigs.size)
    return basis * np.sqrt(eigs) @ basis.T


def sample_quadratics(rng: np.random.Generator, num: int) -> dict[str, np.ndarray]:
    """Returns quadratics of rank one each, whose mean has the given spectra."""
    eigs_w = np.geomspace(MIN_EIG, 1, DIM_W)
    eigs_alpha = np.append(0, np.geomspace(MIN_EIG, 1, DIM_ALPHA - 1))
    x = rng.normal(size=(num, DIM_W)) @ covariance_root(rng, eigs_w)
    z = rng.normal(size=(num, DIM_ALPHA)) @ covariance_root(rng, eigs_alpha)
    # The mean of left right' is U D V', because that of u u' is the identity.
    u = rng.normal(size=(num, DIM_W))
    singular_values = np.geomspace(MIN_EIG, CROSS, DIM_ALPHA)
    left = u[:, :DIM_ALPHA] * singular_values @ orthogonal(rng, DIM_ALPHA).T
    right = u @ orthogonal(rng, DIM_W).T
    return {
        "hess_w": x[:, :, None] * x[:, None],
        "hess_alpha": z[:, :, None] * z[:, None],
        "cross": left[:, :, None] * right[:, None],
        "linear_w": rng.normal(size=(num, DIM_W)),
        "linear_alpha": rng.normal(size=(num, DIM_ALPHA)),
    }


class ValueFunction(NamedTuple):
    """``h(alpha) = M(w*(alpha), alpha)``, a quadratic, by its derivatives."""

    hessian: np.ndarray
    gradient_at_0: np.ndarray

    def excess(self, alpha: Any) -> float:
        """Returns ``h(alpha) - min h``; infinite where ``alpha`` is not finite."""
        if not np.all(np.isfinite(alpha)):
            return np.inf
        best = np.linalg.solve(self.hessian, -self.gradient_at_0)
        change = np.asarray(alpha, float) - best
        return float(change @ self.hessian @ change / 2)


def value_function(inner: dict, outer: dict) -> ValueFunction:
    """Returns the value function of the means of the quadratics."""
    inner, outer = (
        {name: np.mean(x, axis=0, dtype=float) for name, x in data.items()}
        for data in (inner, outer)
    )
    # w*(alpha) = w_0 + Z alpha, from H w + C' alpha + c = 0
    solve = lambda b: np.linalg.solve(inner["hess_w"], b)
    w_0, Z = -solve(inner["linear_w"]), -solve(inner["cross"].T)
    cross = outer["cross"] @ Z
    hessian = Z.T @ outer["hess_w"] @ Z + outer["hess_alpha"] + cross + cross.T
    gradient = Z.T @ (outer["hess_w"] @ w_0 + outer["linear_w"])
    gradient += outer["cross"] @ w_0 + outer["linear_alpha"]
    return ValueFunction(hessian, gradient)


@functools.lru_cache(maxsize=1)
def make_problem() -> tuple[StepProblem, ValueFunction]:
    """Returns the first sample whose value function is convex."""
    for seed in range(20):
        rng = np.random.default_rng([2442, seed])
        data = [
            sample_quadratics(rng, num)
            for num in (NUM_INNER_SAMPLES, NUM_OUTER_SAMPLES)
        ]
        h = value_function(*data)
        if np.linalg.eigvalsh(h.hessian)[0] >= 1e-12:
            break
    else:
        raise ValueError("The value function must be convex in one of 20 samples.")
    narrow = lambda data: {k: jnp.asarray(x, jnp.float32) for k, x in data.items()}
    zeros, start = jnp.zeros(DIM_W), jnp.full(DIM_ALPHA, START)
    return StepProblem(
        quadratic_loss, quadratic_loss, *map(narrow, data), zeros, start
    ), h


def make_estimator(method: str, problem: StepProblem) -> tuple[Any, Any]:
    """Returns our method with the peer's settings, and the optimizer of ``alpha``."""
    size, ratio, _ = SETTINGS[method]
    falling = lambda value, power: lambda t: value * (t + 1.0) ** -power
    power = {"SOBA": 1 / 2, "MRBO": 1 / 3}.get(method, 0.0)
    w_rate = optax.sgd(falling(size, power))
    estimator = {
        "SOBA": lambda: hg.SOBA(w_rate),
        "SABA": lambda: hg.SABA(w_rate),
        "SRBA": lambda: hg.SRBA(w_rate, period=sum(problem.sizes) // (2 * BATCH)),
        "StocBiO": lambda: hg.StocBiO(w_rate, NUM_INNER, NUM_INNER + 1, step_size=size),
        "AmIGO": lambda: hg.AmIGO(w_rate, NUM_INNER, NUM_INNER),
        "MRBO": lambda: hg.MRBO(
            w_rate,
            NUM_INNER + 1,
            step_size=size,
            momentum=lambda t: 1 - 0.5 * (t + 1.0) ** (-2 / 3),
        ),
    }[method]()
    return estimator, optax.sgd(falling(size / ratio, power))


def our_alphas(method: str, seed: int, order: str = "blocks") -> list[Array]:
    """Returns ``alpha`` at the start and at each evaluation of our run."""
    problem, _ = make_problem()
    loop = _make_loop(method, order)
    state = loop.init(problem.w, problem.alpha, jax.random.key(seed))
    alphas, every = [problem.alpha], SETTINGS[method].num_steps // NUM_EVALUATIONS
    for _ in range(NUM_EVALUATIONS):
        trace = loop.run(state, num_steps=every, record_every=every)
        alphas.append(trace.alpha)
        if trace.status != "completed":
            return alphas[:-1] + [jnp.inf] * (NUM_EVALUATIONS + 2 - len(alphas))
        state = trace.state
    return alphas


@functools.lru_cache(maxsize=1)
def _make_loop(method: str, order: str) -> hg.OuterLoop:
    """Returns the loop of a method, which all seeds share."""
    problem, _ = make_problem()
    estimator, optimizer = make_estimator(method, problem)
    return hg.OuterLoop(problem.sampled(BATCH, order), estimator, optimizer)


def peer_alphas(method: str, seed: int, independent_blocks: bool) -> list[Array]:
    """Returns ``alpha`` at the start and at each evaluation of the peer's run."""
    solver = _make_solver(method, independent_blocks)
    for name, key in zip(
        ("state_inner_sampler", "state_outer_sampler"),
        jax.random.split(jax.random.PRNGKey(seed + 1)),
        strict=True,
    ):
        setattr(solver, name, getattr(solver, name) | {"key": key})
    every = SETTINGS[method].num_steps // NUM_EVALUATIONS
    carry, alphas = solver.init(), [solver.outer_var0]
    for k in range(NUM_EVALUATIONS):
        carry = make_steps(solver, method, carry, every, k * every)
        alphas.append(variables_of(carry)["outer_var"])
    return alphas


@functools.lru_cache(maxsize=1)
def _make_solver(method: str, independent_blocks: bool) -> Any:
    """Returns the peer's solver of a method, which all seeds share."""
    problem, _ = make_problem()
    step_size, ratio, _ = SETTINGS[method]
    solver = make_solver(method, step_size=step_size, outer_ratio=ratio)
    module = sys.modules["benchmark_utils.stochastic_jax_solver"]
    original = module.init_sampler
    if independent_blocks:
        module.init_sampler = independent_sampler
    try:
        solver.set_objective(
            *problem.sliced(), *problem.sizes, problem.w, problem.alpha
        )
    finally:
        module.init_sampler = original
    return solver


def independent_sampler(n_samples: int, batch_size: int, key: Array) -> tuple:
    """Returns a sampler in the peer's form that draws each block independently.

    Both numbers of samples are multiples of the batch size, so that all blocks weigh
    the same.
    """
    num_blocks = n_samples // batch_size

    def sample(state):
        key, draw_key = jax.random.split(state["key"])
        number = jax.random.randint(draw_key, (), 0, num_blocks)
        return batch_size * number, number, 1 / num_blocks, state | {"key": key}

    # SABA reads the number of blocks off the order.
    return sample, {"batch_order": jnp.arange(num_blocks), "key": key}
