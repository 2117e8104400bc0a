"""Federated: clients alike are one client, and one machine is as many."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import datasets as datasets
from hypergrad.studies import federated as study
from hypergrad.tasks import federated
from hypergrad.tasks.federated import FedAvg, LocalImplicit

CG = hg.CG(rtol=1e-10, max_steps=200)


def few(key, clients=4, n=6, features=3):
    """A small problem with every class somewhere, and an alpha that is not neutral."""
    keys = jax.random.split(key, 5)
    part = lambda key, n: {
        "x": jax.random.normal(key, (clients, n, features)),
        "y": jnp.arange(clients * n).reshape(clients, n) % 10,
        "use": jnp.ones((clients, n)),
    }
    problem = hg.Bilevel(
        federated.train_loss, federated.val_loss, part(keys[0], n), part(keys[1], n)
    )
    w = {"W": jnp.zeros((features, 10)), "b": jnp.zeros(10)}
    alpha = {
        "omega": jax.random.uniform(keys[2], (10,), minval=0.5, maxval=2.0),
        "delta": jax.random.uniform(keys[3], (10,), minval=0.5, maxval=2.0),
        "iota": jax.random.normal(keys[4], (10,)),
    }
    return problem, w, alpha


def penalised(w, alpha, batch):
    """The loss with a penalty that makes few rounds converge."""
    return federated.train_loss(w, alpha, batch) + 0.25 * optax.tree.norm(
        w, squared=True
    )


def close(found, expected, tolerance):
    """Leaves equal relative to the largest number of each."""
    for name in expected:
        scale = jnp.max(jnp.abs(expected[name]))
        np.testing.assert_allclose(
            found[name] / scale, expected[name] / scale, atol=tolerance
        )


def test_clients_that_are_alike_are_one_machine(key):
    """Global and local hypergradients equal the centralised one, to 1e-6."""
    problem, w, alpha = few(key, clients=1, n=12)
    same = jax.tree.map(lambda leaf: jnp.repeat(leaf, 3, axis=0), problem)
    alone = hg.Bilevel(
        penalised, federated.val_loss, problem.inner_data, problem.outer_data
    )
    same = hg.Bilevel(penalised, federated.val_loss, same.inner_data, same.outer_data)
    solver = FedAvg(0.4, num_steps=40, local_steps=4)
    expected = hg.hypergradient(alone, hg.Implicit(hg.Newton(), CG))(w, alpha)
    for estimator in (hg.Implicit(solver, CG), LocalImplicit(solver, CG)):
        found = hg.hypergradient(same, estimator)(w, alpha)
        close(found.hypergradient, expected.hypergradient, 1e-6)


def test_only_the_global_hypergradient_is_right_where_clients_differ(key):
    """It equals central differences of training to convergence; the local does not.

    On the problem that `make` builds, of every sixth pixel and fewer examples. Rounds
    of FedAvg stay where Newton's method ended.
    """
    digits = datasets.load("digits")
    data = {"x": digits["x"][:, 2::6].astype(float), "y": digits["y"]}
    sizes = {"num_clients": 4, "most": 8, "ratio": 2, "val_per_class": 4}
    task = federated.make(key=key, data=data, **sizes)
    _, _, alpha = few(key)
    oracle = hg.CentralDifference(hg.Newton(tolerance=1e-13))
    at_newton = hg.hypergradient(task.problem, oracle)(task.w, alpha)
    expected = at_newton.hypergradient
    estimate = lambda estimator: hg.hypergradient(task.problem, estimator)(
        at_newton.w, alpha
    )
    close(estimate(hg.Implicit(task.solver, CG)).hypergradient, expected, 1e-6)
    local = estimate(LocalImplicit(task.solver, CG))
    assert not local.stats["trusted"]
    error = optax.tree.norm(optax.tree.sub(local.hypergradient, expected))
    assert error > 0.1 * optax.tree.norm(expected)


def test_random_search_draws_from_the_space_about_the_neutral_alpha():
    """Its whole width is the space of the task; less lies within."""
    task = federated.make(key=jax.random.key(0))
    whole = study.around_neutral(1.0)
    assert jax.tree.structure(whole) == jax.tree.structure(task.space)
    for found, expected in zip(
        jax.tree.leaves(whole), jax.tree.leaves(task.space), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    narrow = study.around_neutral(0.1)
    assert narrow["omega"].low * narrow["omega"].high == pytest.approx(1)
    assert narrow["omega"].high == pytest.approx(10**0.1)
    assert narrow["iota"].high == pytest.approx(0.3)


@pytest.mark.slow
def test_the_local_hypergradient_is_the_mean_of_every_clients_own(key):
    """Against dense algebra, client by client."""
    problem, w, alpha = few(key, clients=3, n=4, features=2)
    problem = hg.Bilevel(
        penalised, federated.val_loss, problem.inner_data, problem.outer_data
    )
    solver = FedAvg(0.4, num_steps=1, local_steps=1)
    found = hg.hypergradient(problem, LocalImplicit(solver, CG))(w, alpha)
    flat, unravel = jax.flatten_util.ravel_pytree(found.w)
    vector, unravel_alpha = jax.flatten_util.ravel_pytree(alpha)

    @jax.jit
    @jax.vmap
    def own(client, outer_client):
        loss = lambda w, a: penalised(unravel(w), unravel_alpha(a), client)
        hessian = jax.hessian(loss)(flat, vector)
        cross = jax.jacobian(jax.grad(loss), argnums=1)(flat, vector)
        outer = lambda w: federated.val_loss(unravel(w), alpha, outer_client)
        return -cross.T @ jnp.linalg.solve(hessian, jax.grad(outer)(flat))

    alone = lambda data: jax.tree.map(lambda leaf: leaf[:, None], data)
    each = own(alone(problem.inner_data), alone(problem.outer_data))
    expected = unravel_alpha(jnp.mean(each, axis=0))
    close(found.hypergradient, expected, 1e-8)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import hypergrad as hg
from tests.test_task_federated import CG, few
from hypergrad.tasks.federated import FedAvg

assert jax.device_count() == 4
problem, w, alpha = few(jax.random.key(0))
mesh = Mesh(np.array(jax.devices()), ("clients",))
spread = jax.device_put(problem, NamedSharding(mesh, PartitionSpec("clients")))
assert len(spread.inner_data["x"].sharding.device_set) == 4
solver = FedAvg(0.4, num_steps=5, local_steps=2)
h = hg.hypergradient(problem, hg.Implicit(solver, CG))(w, alpha).hypergradient
many = hg.hypergradient(spread, hg.Implicit(solver, CG))(w, alpha).hypergradient
for name in alpha:
    np.testing.assert_allclose(many[name], h[name], rtol=1e-6, atol=1e-9)
print("same numbers")
"""


def test_clients_on_four_devices_give_the_same_numbers():
    """Their axis is sharded over forced host devices, in a process of its own."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.strip() == "same numbers", done.stderr


def test_clients_hold_few_classes_unless_dealt_at_random():
    """Examples are parted, classes rarer by the ratio, validation balanced."""
    for iid in (False, True):
        task = federated.make(key=jax.random.key(0), iid=iid)
        train, val = task.problem.inner_data, task.problem.outer_data
        test = task.metrics["accuracy"].args[0]
        assert train["y"].shape[0] == val["y"].shape[0] == 10
        rows = [
            tuple(row)
            for part in (train, val, test)
            for row in np.asarray(part["x"]).reshape(-1, 64)
        ]
        assert len(set(rows)) == len(rows)
        counts = np.sort(np.bincount(np.ravel(train["y"]), minlength=10))
        assert 3 <= counts[0] <= 5
        assert 90 <= counts[-1] <= 100
        balance = np.bincount(np.ravel(val["y"]), minlength=10)
        assert np.all(balance == 20)
        kinds = [len(np.unique(client)) for client in np.asarray(train["y"])]
        assert (np.mean(kinds) > 6) == iid
        assert set(task.metrics) == {"accuracy"}  # nothing is held out
    held = federated.make(key=jax.random.key(0), hold_out=True)
    out = held.metrics["held_loss"].args[0]["use"]
    np.testing.assert_array_equal(out + held.problem.outer_data["use"], 1)
    np.testing.assert_array_equal(jnp.sum(out, axis=1), 5)
    with pytest.raises(ValueError, match="scale must be"):
        federated.make(key=jax.random.key(0), scale="huge")


def test_the_papers_scale_builds():
    """On synthetic examples in MNIST's shape, fewer of them."""
    data = {"x": np.zeros((2000, 784), np.float32), "y": np.arange(2000) % 10}
    sizes = {"num_clients": 100, "most": 100, "val_per_class": 20}
    task = federated.make(key=jax.random.key(0), scale="paper", data=data, **sizes)
    problem = task.problem
    losses = lambda: (
        problem.inner_loss(task.w, task.alpha, problem.inner_data),
        problem.outer_loss(task.w, task.alpha, problem.outer_data),
    )
    assert [value.shape for value in jax.eval_shape(losses)] == [(), ()]


@pytest.mark.parametrize("corrected", [True, False])
def test_the_ledger_counts_the_gradients_of_each_round(corrected: bool):
    """By each estimator that differentiates rounds, as many as `solve` says."""
    problem, w, alpha = few(jax.random.key(0))
    solver = FedAvg(0.4, num_steps=3, local_steps=4, corrected=corrected)
    _, spent = solver.solve(
        problem.inner_loss, w, alpha, problem.inner_data, jax.random.key(0)
    )
    a_round = 5 if corrected else 4
    assert float(spent["num_grads"]) == 3 * a_round
    size = sum(leaf.size for leaf in jax.tree.leaves(alpha))
    for estimator, grads, products in (
        (hg.Unrolled(solver, checkpoint=False), 3 * a_round, 3 * a_round),
        (
            hg.Unrolled(solver, truncation_length=2, checkpoint=False),
            3 * a_round,
            2 * a_round,
        ),
        (hg.Forward(solver), 3 * a_round, size * 3 * a_round),
        (hg.FixedPoint(solver, num_terms=7), 4 * a_round, 8 * a_round),
    ):
        stats = hg.hypergradient(problem, estimator)(w, alpha).stats
        assert float(stats["num_grads"]) == grads + 1  # and one for the residual
        assert float(stats["num_hvps"]) == products
