"""Tests of the PyTorch contenders against float64 results of separate code."""

import ast
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from benchmarks.peers import environments, tuning, worker
from benchmarks.peers.work import WORKS, newton

ROOT = Path(__file__).parents[2]
CONTENDERS = ROOT / "benchmarks" / "peers" / "contenders"
LIBRARIES = [*environments.SHARED, *list(environments.REQUIREMENTS)[1:]]

# Results that are wrong as released, with a lower bound of their error. Betty and
# moskomule's hypergrad compute the next direction of conjugate gradients from the
# previous residual, not from the new one.
MIN_ERRORS = {
    (library, work): 0.1
    for library in ("betty", "moskomule")
    for work in ("w1-solve", "w2-implicit", "overhead-solve")
}


@functools.cache
def small(work: str) -> dict[str, Any]:
    """Returns the data of a work at the size of tests."""
    return WORKS[work].small()


def works(library: str) -> list[str]:
    """Returns the keys of a contender's `WORKS` from its source, without an import."""
    for node in ast.parse((CONTENDERS / f"{library}.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "WORKS":
            assert isinstance(node.value, ast.Dict)
            return [ast.literal_eval(key) for key in node.value.keys if key]
    raise AssertionError(f"{library} has no WORKS")


CASES = [
    pytest.param(library, work, marks=[pytest.mark.slow] * (library != "torch_by_hand"))
    for library in LIBRARIES
    for work in works(library)
]


@pytest.mark.parametrize(("library", "work"), CASES)
def test_a_result_is_right_or_recorded_as_wrong(
    library: str, work: str, tmp_path: Path
) -> None:
    actual = run_contender(library, work, tmp_path)
    expected = EXPECTED[work](as_float64(work))
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    min_error = MIN_ERRORS.get((library, work))
    if min_error is None:
        assert error <= WORKS[work].error
    else:
        assert not error < min_error  # or NaN


def test_plain_pytorch_offers_every_work_with_a_peer() -> None:
    without_peer = {"w2-lowmem", "w2-indefinite", "dispatch", "eight", "compile"}
    assert {*works("torch_by_hand"), *works("torch_func")} == set(WORKS) - without_peer


def test_a_contender_without_an_environment_runs_in_this_one() -> None:
    assert environments.interpreter("jaxopt") == Path(sys.executable)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_runs_in_its_environment(library: str) -> None:
    name = environments.SHARED.get(library, library)
    assert environments.interpreter(library).parts[-4:-2] == (".venv-peers", name)
    installed = (
        environments.BUILD_REQUIREMENTS.get(name, []) + environments.REQUIREMENTS[name]
    )
    assert "torch==2.13.0" in installed


def run_contender(library: str, work: str, folder: Path) -> np.ndarray:
    """Returns the result of a contender in its process, at the size of tests."""
    python = environments.interpreter(library)
    if not python.exists():
        # PyTorch is no dependency, and each of its libraries needs an environment.
        pytest.skip(f"{library} is not installed: `make peers` does it")
    worker.save(folder / "data.npz", small(work))
    options = json.dumps(tuning.GRIDS[library][-1] if work == tuning.WORK else {})
    command = [python, "-m", "benchmarks.peers.worker", library, work]
    process = subprocess.run(
        [*command, folder / "data.npz", options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        input="",
        capture_output=True,
        text=True,
        check=True,
    )
    first_line = json.loads(process.stdout.splitlines()[-1])
    assert "failed" not in first_line, first_line
    return np.array(first_line["answer"])


def as_float64(work: str) -> dict[str, Any]:
    """Returns the data of a work in float64."""
    return jax.tree.map(
        lambda x: np.asarray(x, float) if np.asarray(x).dtype.kind == "f" else x,
        small(work),
    )


Tree = Any
Loss = Callable[..., jax.Array]


def logistic(data: Tree) -> tuple[Loss, Loss]:
    """Returns the inner loss of ``(w, alpha, step)`` and the outer loss of ``w``."""

    def inner(w: jax.Array, alpha: jax.Array, _: int) -> jax.Array:
        penalty = 0.5 * jnp.sum(jnp.exp(alpha) * w**2)
        return jnp.mean(jnp.logaddexp(0, -data["y"] * (data["x"] @ w))) + penalty

    margin = lambda w: -data["y_val"] * (data["x_val"] @ w)
    return inner, lambda w: jnp.mean(jnp.logaddexp(0, margin(w)))


def entropies(scores: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the cross-entropy of each example."""
    scores -= jax.nn.logsumexp(scores, axis=1, keepdims=True)
    return -jnp.take_along_axis(scores, jnp.asarray(y)[:, None], axis=1)[:, 0]


def perceptron(w: Tree, x: jax.Array, activation: Callable) -> jax.Array:
    """Returns the scores of a network with one hidden layer."""
    return activation(x @ w[0] + w[1][None]) @ w[2] + w[3][None]


def cleaning(data: Tree) -> tuple[Loss, Loss]:
    """Returns the losses, with the arguments of those of `logistic`."""
    scores = functools.partial(perceptron, activation=jax.nn.relu)

    def inner(w: Tree, alpha: jax.Array, _: int) -> jax.Array:
        losses = entropies(scores(w, data["x"]), data["y"])
        squares = sum(jnp.sum(leaf**2) for leaf in w)
        weighted = jnp.mean(jax.nn.sigmoid(alpha) * losses)
        return weighted + 0.5 * data["penalty"] * squares

    return inner, lambda w: entropies(scores(w, data["x_val"]), data["y_val"]).mean()


def schedule(data: Tree) -> tuple[Loss, Loss]:
    """Returns the losses, with the arguments of those of `logistic`."""
    scores = functools.partial(perceptron, activation=jnp.tanh)
    x, y = jnp.asarray(data["x"]), jnp.asarray(data["y"])

    def inner(w: Tree, alpha: jax.Array, step: jax.Array) -> jax.Array:
        loss = entropies(scores(w, x[step % len(x)]), y[step % len(x)]).mean()
        squares = jnp.array([jnp.sum(w[0] ** 2), jnp.sum(w[2] ** 2)])
        return loss + 0.5 * jnp.vdot(jnp.exp(alpha[1:]), squares)

    return inner, lambda w: entropies(scores(w, data["x_val"]), data["y_val"]).mean()


def final_w(inner: Loss, init_w: Tree, alpha: jax.Array, rate: Any, data: Tree) -> Tree:
    """Returns ``w`` after heavy-ball descent."""

    def step(state: Tree, number: jax.Array) -> tuple[Tree, None]:
        w, v = state
        grads = jax.grad(inner)(w, alpha, number)
        v = jax.tree.map(lambda v, g: data["momentum"] * v + g, v, grads)
        return (jax.tree.map(lambda w, v: w - rate * v, w, v), v), None

    state = (init_w, jax.tree.map(jnp.zeros_like, init_w))
    return jax.lax.scan(step, state, jnp.arange(data["steps"]))[0][0]


def final_logistic_w(data: Tree, alpha: jax.Array) -> jax.Array:
    """Returns ``w`` after the inner run of logistic regression."""
    init_w = jnp.zeros_like(data["alpha"])
    return final_w(logistic(data)[0], init_w, alpha, data["rate"], data)


def unrolled_logistic(data: Tree) -> np.ndarray:
    """Returns the hypergradient by reverse mode."""
    value = lambda alpha: logistic(data)[1](final_logistic_w(data, alpha))
    return np.asarray(jax.jit(jax.grad(value))(data["alpha"]))


def unrolled_cleaning(data: Tree) -> np.ndarray:
    """Returns the hypergradient by reverse mode."""
    inner, outer = cleaning(data)
    init_w = jax.tree.map(jnp.asarray, data["init"])
    value = lambda alpha: outer(final_w(inner, init_w, alpha, data["rate"], data))
    return np.asarray(jax.jit(jax.grad(value))(data["alpha"]))


def unrolled_schedule(data: Tree) -> np.ndarray:
    """Returns the hypergradient by forward mode, whatever the contenders use."""
    inner, outer = schedule(data)
    init_w = jax.tree.map(jnp.asarray, data["init"])
    value = lambda alpha: outer(final_w(inner, init_w, alpha, jnp.exp(alpha[0]), data))
    return np.asarray(jax.jit(jax.jacfwd(value))(data["alpha"]))


def dense_hypergradient(data: Tree, w: np.ndarray) -> np.ndarray:
    """Returns the implicit hypergradient of logistic regression by a dense solve."""
    inner, outer = logistic(data)
    hessian = jax.hessian(inner)(w, data["alpha"], 0)
    mixed = jax.jacobian(jax.grad(inner), argnums=1)(w, data["alpha"], 0)
    return np.asarray(-mixed.T @ jnp.linalg.solve(hessian, jax.grad(outer)(w)))


def krylov_hypergradient(data: Tree) -> np.ndarray:
    """Returns the hypergradient of CG's last iterate, without its recurrences.

    The iterate is the Galerkin solution in span(b, H b, ...), whose basis is made
    orthogonal twice.
    """
    inner, outer = cleaning(data)
    w, unravel = ravel_pytree(data["w"])
    alpha = jnp.asarray(data["alpha"])
    inner_grad = lambda w, alpha: jax.grad(lambda w: inner(unravel(w), alpha, 0))(w)
    hvp = jax.jit(lambda v: jax.jvp(lambda w: inner_grad(w, alpha), (w,), (v,))[1])
    b = jax.grad(lambda w: outer(unravel(w)))(w)
    basis, images = np.zeros((0, w.size)), []
    direction = np.asarray(b)
    for _ in range(data["products"]):
        for _ in range(2):
            direction = direction - basis.T @ (basis @ direction)
        basis = np.vstack([basis, direction / np.linalg.norm(direction)])
        direction = np.asarray(hvp(basis[-1]))
        images.append(direction)
    projected = basis @ np.stack(images, axis=1)
    adjoint = basis.T @ np.linalg.solve(projected, basis @ np.asarray(b))
    _, vjp_fn = jax.vjp(lambda alpha: inner_grad(w, alpha), alpha)
    return -np.asarray(vjp_fn(jnp.asarray(adjoint))[0])


def few_shot(data: Tree) -> np.ndarray:
    """Returns the hypergradient by reverse mode, one task at a time."""

    def scores(w: Tree, x: jax.Array) -> jax.Array:
        for kernel, scale, shift in zip(w[:-2:3], w[1:-2:3], w[2:-2:3], strict=True):
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            mean, variance = (
                f(x, (0, 1, 2), keepdims=True) for f in (jnp.mean, jnp.var)
            )
            per_channel = lambda leaf: leaf[None, None, None]
            x = (x - mean) / jnp.sqrt(variance + 1e-5)
            x = x * per_channel(scale) + per_channel(shift)
            # The gradient of `jnp.max` may be 0 / 0.
            size = (1, 2, 2, 1)
            x = jax.lax.reduce_window(
                jax.nn.relu(x), -jnp.inf, jax.lax.max, size, size, "VALID"
            )
        return x.reshape(len(x), -1) @ w[-2] + w[-1][None]

    def loss(init: Tree, x: Tree, y: Tree, x_val: Tree, y_val: Tree) -> jax.Array:
        def step(w: Tree, _: None) -> tuple[Tree, None]:
            grads = jax.grad(lambda w: entropies(scores(w, x), y).mean())(w)
            return jax.tree.map(lambda w, g: w - data["rate"] * g, w, grads), None

        w, _ = jax.lax.scan(step, init, length=data["steps"])
        return entropies(scores(w, x_val), y_val).mean()

    init = jax.tree.map(jnp.asarray, data["init"])
    gradient_fn = jax.jit(jax.grad(loss))
    names = ("x", "y", "x_val", "y_val")
    gradients = [
        ravel_pytree(gradient_fn(init, *map(jnp.asarray, task)))[0]
        for task in zip(*(data[name] for name in names), strict=True)
    ]
    return np.mean(gradients, axis=0)


EXPECTED = {
    "w1-unrolled": unrolled_logistic,
    "w1-forward": lambda data: unrolled_logistic(data).sum(keepdims=True),
    "w1-solve": lambda data: dense_hypergradient(data, data["w"]),
    "w1-whole": lambda data: dense_hypergradient(
        data, newton(data["x"], data["y"], data["alpha"])
    ),
    "w2-unrolled": unrolled_cleaning,
    "w2-implicit": krylov_hypergradient,
    "w3-1000": unrolled_schedule,
    "w3-10000": unrolled_schedule,
    "w3-forward": unrolled_schedule,
    "w4": few_shot,
    "w6": lambda data: dense_hypergradient(
        data, np.asarray(final_logistic_w(data, data["alpha"]))
    ),
    "overhead": unrolled_logistic,
    "overhead-solve": lambda data: dense_hypergradient(data, data["w"]),
}
