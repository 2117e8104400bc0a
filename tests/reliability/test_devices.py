"""Several devices, and several processes, give the numbers of one device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from tests.reliability.device_cases import TOLERANCE, read_doc_blocks

RTOL = {"float32": 1e-5, "float64": 1e-12}  # relative to the largest number
FAST = ("implicit", "unrolled", "single loop", "federated", "few-shot")
SLOW = (
    *("neumann", "unrolled, batches", "single loop, batches", "tolerance"),
    "sharded batches",
)
# In single precision a search may rank two trials in the other order.
DOUBLE_ONLY = {"float32": (), "float64": ("public functions", "interrupted")}
ROOT = Path(__file__).parents[2]


def start(num_devices: int, *arguments: str) -> subprocess.Popen:
    """Starts `device_cases` with its own number of devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    flags += f" --xla_force_host_platform_device_count={num_devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "tests.reliability.device_cases", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def read_results(process: subprocess.Popen) -> dict[str, list[list[float]]]:
    """Returns the last line that a process printed."""
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return json.loads(out.splitlines()[-1])


def check_close(name: str, actual: list[float], expected: list[float]) -> None:
    """Compares numbers; solves that stop by a tolerance agree to ten times that."""
    case, dtype = name.rsplit(", ", 1)
    rtol = 10 * TOLERANCE if case == "tolerance" else RTOL[dtype]
    scale = np.abs(expected).max()
    assert scale > 1e-3, name
    np.testing.assert_allclose(
        actual, expected, rtol=0, atol=rtol * scale, err_msg=name
    )


@pytest.mark.page
def test_eight_devices_give_the_hypergradients_of_one():
    """The data is sharded and an all-reduce sums the parts; so in the documentation."""
    names = ";".join((*FAST, "documentation"))
    for name, results in read_results(start(8, "float64", names)).items():
        check_close(name, *results)


def test_programs_per_device_give_the_numbers_of_one_or_an_error():
    """Under shard_map: independent problems, split data, and losses that vary."""
    names = "independent problems;split data;varying losses"
    for name, results in read_results(start(2, "float64", names)).items():
        check_close(name, *results)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", RTOL)
def test_eight_devices_give_all_numbers_of_one(dtype: str):
    """Also with mini-batches, tolerances and the public functions."""
    names = ";".join((*FAST, *SLOW, *DOUBLE_ONLY[dtype]))
    for name, results in read_results(start(8, dtype, names)).items():
        check_close(name, *results)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", RTOL)
def test_two_processes_give_the_numbers_of_one(dtype: str):
    """With two devices each; the public functions in double precision."""
    names = ";".join((*FAST, "tolerance", *DOUBLE_ONLY[dtype]))
    expected = read_results(start(1, dtype, names, "unsharded"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    second = start(2, dtype, names, "1", "2", port)
    try:
        actual = read_results(start(2, dtype, names, "0", "2", port))
    finally:
        second.kill()  # if the first process failed, the second waits forever
        second.communicate()
    assert actual.keys() == expected.keys()
    for name, (numbers,) in expected.items():
        check_close(name, *actual[name], numbers)


@pytest.mark.page
@pytest.mark.slow
def test_the_certificate_estimates_the_error_of_bfloat16():
    """To a factor of 2 for a rounded inner loop; one Newton step removes that error.

    Of rounded losses it has the accuracy of bfloat16 and does not confirm the estimate.
    """
    first, _, rounded = read_doc_blocks()
    names = {}
    exec(compile(first, "docs/scale.md", "exec"), names)
    exec(compile(rounded, "docs/scale.md", "exec"), names)
    problem, w, alpha = (names[name] for name in ("problem", "w", "alpha"))
    solve = lambda problem, estimator: hg.hypergradient(problem, estimator)(w, alpha)
    exact = solve(problem, hg.Implicit(hg.Newton())).hypergradient
    error = lambda estimate: (
        jnp.linalg.norm(estimate.hypergradient - exact) / jnp.linalg.norm(exact)
    )
    rough = solve(problem, names["rough"])
    assert error(rough) > 1e-5  # 1e-12 in float64
    assert 0.5 < rough.stats["error_estimate"] / error(rough) < 2
    assert rough.trusted
    solver = names["InBfloat16"](names["descent"])
    corrected = solve(problem, hg.Implicit(solver, num_newton_steps=1))
    assert error(corrected) < 0.01 * error(rough)

    def in_bfloat16(loss):
        half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
        return lambda *arguments: loss(*half(arguments)).astype(float)

    rounded_problem = hg.Bilevel(
        in_bfloat16(problem.inner_loss), in_bfloat16(problem.outer_loss),
        problem.inner_data, problem.outer_data,
    )  # fmt: skip
    estimate = solve(rounded_problem, hg.Implicit(names["descent"]))
    assert error(estimate) > error(rough)
    assert not estimate.trusted
    certified = solve(rounded_problem, hg.Implicit(names["descent"], certify=True))
    assert not certified.trusted
    difference = jnp.abs(certified.stats["error_estimate"] - error(certified))
    assert difference < jnp.finfo(jnp.bfloat16).eps
