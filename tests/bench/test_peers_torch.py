"""PyTorch contenders against float64 truths that share no code with them."""

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

# Answers that are wrong as released, with an error that theirs is never below.
# Betty and moskomule's hypergrad find the next direction of conjugate gradients from
# the residual before, not from the new one.
WRONG = {
    (library, work): 0.1
    for library in ("betty", "moskomule")
    for work in ("w1-solve", "w2-implicit", "overhead-solve")
}


@functools.cache
def small(work: str) -> dict[str, Any]:
    """What contenders are given here."""
    return WORKS[work].small()


def works(library: str) -> list[str]:
    """Keys of a contender's `WORKS`, read from its text: nothing is imported."""
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
def test_an_answer_is_right_or_known_to_be_wrong(
    library: str, work: str, tmp_path: Path
) -> None:
    found = answer(library, work, tmp_path)
    truth = TRUTHS[work](exactly(work))
    error = np.linalg.norm(found - truth)
    relative = error / np.linalg.norm(truth)
    least = WRONG.get((library, work))
    if least is None:
        assert relative <= WORKS[work].error
    else:
        assert not relative < least  # NaN as well


def test_every_work_is_done_by_a_user_of_pytorch_alone() -> None:
    """But what is asked of ours alone."""
    alone = {"w2-lowmem", "w2-indefinite", "dispatch", "eight", "compile"}
    assert {*works("torch_by_hand"), *works("torch_func")} == set(WORKS) - alone


def test_a_contender_without_an_environment_runs_where_we_do() -> None:
    assert environments.python("jaxopt") == Path(sys.executable)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_runs_in_its_environment(library: str) -> None:
    name = environments.SHARED.get(library, library)
    assert environments.python(library).parts[-4:-2] == (".venv-peers", name)
    installed = (
        environments.BUILD_REQUIREMENTS.get(name, []) + environments.REQUIREMENTS[name]
    )
    assert "torch==2.13.0" in installed


def answer(library: str, work: str, folder: Path) -> np.ndarray:
    """What a contender says at the small size, in a process of its own."""
    python = environments.python(library)
    if not python.exists():
        # PyTorch is no dependency, and its libraries need an environment each.
        pytest.skip(f"{library} is not installed: `make peers` does it")
    worker.save(folder / "data.npz", small(work))
    setting = json.dumps(tuning.GRIDS[library][-1] if work == tuning.WORK else {})
    command = [python, "-m", "benchmarks.peers.worker", library, work]
    done = subprocess.run(
        [*command, folder / "data.npz", setting],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        input="",
        capture_output=True,
        text=True,
        check=True,
    )
    said = json.loads(done.stdout.splitlines()[-1])
    assert "failed" not in said, said
    return np.array(said["answer"])


def exactly(work: str) -> dict[str, Any]:
    """The small data in float64."""
    return jax.tree.map(
        lambda x: np.asarray(x, float) if np.asarray(x).dtype.kind == "f" else x,
        small(work),
    )


Tree = Any
Loss = Callable[..., jax.Array]


def logistic(given: Tree) -> tuple[Loss, Loss]:
    """Losses of w, alpha and the step, and of w."""

    def inner(w: jax.Array, alpha: jax.Array, _: int) -> jax.Array:
        penalty = 0.5 * jnp.sum(jnp.exp(alpha) * w**2)
        return jnp.mean(jnp.logaddexp(0, -given["y"] * (given["x"] @ w))) + penalty

    margin = lambda w: -given["y_val"] * (given["x_val"] @ w)
    return inner, lambda w: jnp.mean(jnp.logaddexp(0, margin(w)))


def entropies(scores: jax.Array, y: jax.Array) -> jax.Array:
    """One an example."""
    scores -= jax.nn.logsumexp(scores, axis=1, keepdims=True)
    return -jnp.take_along_axis(scores, jnp.asarray(y)[:, None], axis=1)[:, 0]


def perceptron(w: Tree, x: jax.Array, activation: Callable) -> jax.Array:
    """One hidden layer."""
    return activation(x @ w[0] + w[1][None]) @ w[2] + w[3][None]


def cleaning(given: Tree) -> tuple[Loss, Loss]:
    """As `logistic`."""
    scores = functools.partial(perceptron, activation=jax.nn.relu)

    def inner(w: Tree, alpha: jax.Array, _: int) -> jax.Array:
        losses = entropies(scores(w, given["x"]), given["y"])
        squares = sum(jnp.sum(part**2) for part in w)
        weighted = jnp.mean(jax.nn.sigmoid(alpha) * losses)
        return weighted + 0.5 * given["penalty"] * squares

    return inner, lambda w: entropies(scores(w, given["x_val"]), given["y_val"]).mean()


def schedule(given: Tree) -> tuple[Loss, Loss]:
    """As `logistic`."""
    scores = functools.partial(perceptron, activation=jnp.tanh)
    x, y = jnp.asarray(given["x"]), jnp.asarray(given["y"])

    def inner(w: Tree, alpha: jax.Array, step: jax.Array) -> jax.Array:
        loss = entropies(scores(w, x[step % len(x)]), y[step % len(x)]).mean()
        first, second = jnp.exp(alpha[1]), jnp.exp(alpha[2])
        return loss + 0.5 * (first * jnp.sum(w[0] ** 2) + second * jnp.sum(w[2] ** 2))

    return inner, lambda w: entropies(scores(w, given["x_val"]), given["y_val"]).mean()


def end(inner: Loss, start: Tree, alpha: jax.Array, rate: Any, given: Tree) -> Tree:
    """Of heavy-ball descent."""

    def step(state: Tree, number: jax.Array) -> tuple[Tree, None]:
        w, v = state
        slope = jax.grad(inner)(w, alpha, number)
        v = jax.tree.map(lambda v, g: given["momentum"] * v + g, v, slope)
        return (jax.tree.map(lambda w, v: w - rate * v, w, v), v), None

    state = (start, jax.tree.map(jnp.zeros_like, start))
    return jax.lax.scan(step, state, jnp.arange(given["steps"]))[0][0]


def trained(given: Tree, alpha: jax.Array) -> jax.Array:
    """Where logistic regression's inner run ends."""
    start = jnp.zeros_like(given["alpha"])
    return end(logistic(given)[0], start, alpha, given["rate"], given)


def unrolled_logistic(given: Tree) -> np.ndarray:
    """By reverse mode."""
    value = lambda alpha: logistic(given)[1](trained(given, alpha))
    return np.asarray(jax.jit(jax.grad(value))(given["alpha"]))


def unrolled_cleaning(given: Tree) -> np.ndarray:
    """By reverse mode."""
    inner, outer = cleaning(given)
    start = jax.tree.map(jnp.asarray, given["init"])
    value = lambda alpha: outer(end(inner, start, alpha, given["rate"], given))
    return np.asarray(jax.jit(jax.grad(value))(given["alpha"]))


def unrolled_schedule(given: Tree) -> np.ndarray:
    """By forward mode, whichever the contenders take."""
    inner, outer = schedule(given)
    start = jax.tree.map(jnp.asarray, given["init"])
    value = lambda alpha: outer(end(inner, start, alpha, jnp.exp(alpha[0]), given))
    return np.asarray(jax.jit(jax.jacfwd(value))(given["alpha"]))


def dense(given: Tree, w: np.ndarray) -> np.ndarray:
    """The implicit answer for logistic regression at w, by a dense solve."""
    inner, outer = logistic(given)
    hessian = jax.hessian(inner)(w, given["alpha"], 0)
    mixed = jax.jacobian(jax.grad(inner), argnums=1)(w, given["alpha"], 0)
    return np.asarray(-mixed.T @ jnp.linalg.solve(hessian, jax.grad(outer)(w)))


def in_a_krylov_space(given: Tree) -> np.ndarray:
    """What CG's iterate is after `products` products, without its recurrences.

    The Galerkin solution in span(b, H b, ...), whose basis is made orthogonal twice.
    """
    inner, outer = cleaning(given)
    w, back = ravel_pytree(given["w"])
    alpha = jnp.asarray(given["alpha"])
    slope = lambda w, alpha: jax.grad(lambda w: inner(back(w), alpha, 0))(w)
    product = jax.jit(lambda v: jax.jvp(lambda w: slope(w, alpha), (w,), (v,))[1])
    target = jax.grad(lambda w: outer(back(w)))(w)
    basis, images = np.zeros((0, w.size)), []
    direction = np.asarray(target)
    for _ in range(given["products"]):
        for _ in range(2):
            direction = direction - basis.T @ (basis @ direction)
        basis = np.vstack([basis, direction / np.linalg.norm(direction)])
        direction = np.asarray(product(basis[-1]))
        images.append(direction)
    inside = basis @ np.stack(images, axis=1)
    found = basis.T @ np.linalg.solve(inside, basis @ np.asarray(target))
    _, pull = jax.vjp(lambda alpha: slope(w, alpha), alpha)
    return -np.asarray(pull(jnp.asarray(found))[0])


def few_shot(given: Tree) -> np.ndarray:
    """By reverse mode, one task at a time."""

    def scores(w: Tree, x: jax.Array) -> jax.Array:
        for kernel, scale, shift in zip(w[:-2:3], w[1:-2:3], w[2:-2:3], strict=True):
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            mean, variance = (
                f(x, (0, 1, 2), keepdims=True) for f in (jnp.mean, jnp.var)
            )
            spread = lambda part: part[None, None, None]
            x = (x - mean) / jnp.sqrt(variance + 1e-5) * spread(scale) + spread(shift)
            # A maximum by `max` may be no entry of what is compared to it: 0 / 0.
            size = (1, 2, 2, 1)
            x = jax.lax.reduce_window(
                jax.nn.relu(x), -jnp.inf, jax.lax.max, size, size, "VALID"
            )
        return x.reshape(len(x), -1) @ w[-2] + w[-1][None]

    def loss(init: Tree, x: Tree, y: Tree, x_val: Tree, y_val: Tree) -> jax.Array:
        def step(w: Tree, _: None) -> tuple[Tree, None]:
            slope = jax.grad(lambda w: entropies(scores(w, x), y).mean())(w)
            return jax.tree.map(lambda w, g: w - given["rate"] * g, w, slope), None

        w, _ = jax.lax.scan(step, init, length=given["steps"])
        return entropies(scores(w, x_val), y_val).mean()

    init = jax.tree.map(jnp.asarray, given["init"])
    slope = jax.jit(jax.grad(loss))
    sets = zip(*(given[part] for part in ("x", "y", "x_val", "y_val")), strict=True)
    each = [ravel_pytree(slope(init, *map(jnp.asarray, one)))[0] for one in sets]
    return np.mean(each, axis=0)


TRUTHS = {
    "w1-unrolled": unrolled_logistic,
    "w1-forward": lambda given: unrolled_logistic(given).sum(keepdims=True),
    "w1-solve": lambda given: dense(given, given["w"]),
    "w1-whole": lambda given: dense(
        given, newton(given["x"], given["y"], given["alpha"])
    ),
    "w2-unrolled": unrolled_cleaning,
    "w2-implicit": in_a_krylov_space,
    "w3-1000": unrolled_schedule,
    "w3-10000": unrolled_schedule,
    "w3-forward": unrolled_schedule,
    "w4": few_shot,
    "w6": lambda given: dense(given, np.asarray(trained(given, given["alpha"]))),
    "overhead": unrolled_logistic,
    "overhead-solve": lambda given: dense(given, given["w"]),
}
