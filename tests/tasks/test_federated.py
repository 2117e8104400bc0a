"""Tests of federated averaging, of the local hypergradient, and of the clients' data.

`tests/reliability/test_devices.py` runs the problem with clients on several devices.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from hypergrad import datasets
from hypergrad.tasks import federated
from hypergrad.tasks.federated import FedAvg, LocalImplicit
from tests.tasks.task_cases import assert_close

CG = hg.CG(rtol=1e-10, max_steps=200)
KEY = jax.random.key(0)


def random_problem(key, num_clients=4, n=6, num_features=3):
    """Returns a problem with all classes, its ``w``, and a random ``alpha``.

    A larger penalty makes the rounds converge quickly.
    """
    keys = jax.random.split(key, 5)
    make_split = lambda key: {
        "x": jax.random.normal(key, (num_clients, n, num_features)),
        "y": jnp.arange(num_clients * n).reshape(num_clients, n) % 10,
        "use": jnp.ones((num_clients, n)),
    }
    problem = hg.Bilevel(
        penalized_loss, federated.val_loss, make_split(keys[0]), make_split(keys[1])
    )
    w = {"W": jnp.zeros((num_features, 10)), "b": jnp.zeros(10)}
    alpha = {
        "omega": jax.random.uniform(keys[2], (10,), minval=0.5, maxval=2.0),
        "delta": jax.random.uniform(keys[3], (10,), minval=0.5, maxval=2.0),
        "iota": jax.random.normal(keys[4], (10,)),
    }
    return problem, w, alpha


def penalized_loss(w, alpha, batch):
    penalty = 0.25 * optax.tree.norm(w, squared=True)
    return federated.train_loss(w, alpha, batch) + penalty


@pytest.mark.parametrize("estimator", [hg.Implicit, LocalImplicit])
def test_identical_clients_are_equivalent_to_one_machine(estimator, key):
    """Global and local hypergradients equal the one of centralized training."""
    problem, w, alpha = random_problem(KEY, num_clients=1, n=12)
    repeat = lambda leaf: jnp.repeat(leaf, 3, axis=0)
    clients = jax.tree.map(repeat, problem)
    centralized = hg.Implicit(hg.Newton(), CG)
    expected = hg.hypergradient(problem, centralized)(w, alpha).hypergradient
    solver = FedAvg(0.4, num_steps=40, num_local_steps=4)
    estimate = hg.hypergradient(clients, estimator(solver, CG))(w, alpha)
    assert_close(estimate.hypergradient, expected, 1e-6)


def test_clients_take_as_many_products_as_the_slowest():
    """They solve in lockstep; a client with equal curvatures needs two steps."""
    curvatures = jnp.stack([jnp.ones(20), jnp.linspace(1.0, 50.0, 20)])[:, None]
    targets = jnp.broadcast_to(jnp.arange(20.0), curvatures.shape)
    inner = lambda w, alpha, batch: (
        0.5 * jnp.mean(jnp.sum(batch * (w - alpha)[None, None] ** 2, axis=-1))
    )
    outer = lambda w, alpha, batch: jnp.mean(
        jnp.sum((w[None, None] - batch) ** 2, axis=-1)
    )
    linear_solver = hg.CG(rtol=1e-5, max_steps=40, preconditioner=None)
    estimator = LocalImplicit(FedAvg(0.01, 1, 1), linear_solver)

    def num_products(clients):
        problem = hg.Bilevel(inner, outer, curvatures[clients], targets[clients])
        estimate = hg.hypergradient(problem, estimator)(jnp.zeros(20), jnp.ones(20))
        return int(estimate.stats["num_hvps"])

    fast, slow = num_products(jnp.array([0])), num_products(jnp.array([1]))
    assert fast < slow
    assert num_products(jnp.array([0, 1])) == slow


def test_hypergradients_of_different_clients_equal_dense_algebra(key):
    """The local one is the mean of ``-J_c' H_c^-1 b_c``, the global one that of means.

    Only the local one is flagged as biased.
    """
    problem, w, alpha = random_problem(key, num_clients=3, n=4, num_features=2)
    solver = FedAvg(0.4, num_steps=1, num_local_steps=1)
    run_estimator = lambda estimator: hg.hypergradient(problem, estimator)(w, alpha)
    global_estimate = run_estimator(hg.Implicit(solver, CG))
    local_estimate = run_estimator(LocalImplicit(solver, CG))
    w_vector, unravel = ravel_pytree(local_estimate.w)
    alpha_vector, unravel_alpha = ravel_pytree(alpha)

    @jax.jit
    @jax.vmap
    def client_matrices(client, outer_client):
        loss = lambda w, a: penalized_loss(unravel(w), unravel_alpha(a), client)
        H = jax.hessian(loss)(w_vector, alpha_vector)
        J = jax.jacobian(jax.grad(loss), argnums=1)(w_vector, alpha_vector)
        outer_loss = lambda w: federated.val_loss(unravel(w), alpha, outer_client)
        return H, J, jax.grad(outer_loss)(w_vector)

    as_federations = lambda data: jax.tree.map(lambda leaf: leaf[:, None], data)
    H, J, b = client_matrices(
        as_federations(problem.inner_data), as_federations(problem.outer_data)
    )
    solve = lambda H, J, b: -J.T @ jnp.linalg.solve(H, b)
    expected = solve(H.mean(0), J.mean(0), b.mean(0))
    assert_close(global_estimate.hypergradient, unravel_alpha(expected), 1e-8)
    expected = jnp.mean(jax.vmap(solve)(H, J, b), axis=0)
    assert_close(local_estimate.hypergradient, unravel_alpha(expected), 1e-8)
    assert [name for name, flag in local_estimate.flags.items() if flag] == ["biased"]


@pytest.mark.parametrize("drift_correction", [True, False])
def test_rounds_converge_to_the_argmin_with_drift_correction(drift_correction):
    """Without the correction, clients that differ move the fixed point."""
    problem, w, alpha = random_problem(KEY)
    solver = FedAvg(0.4, 60, num_local_steps=4, drift_correction=drift_correction)
    w, stats = jax.jit(solver.solve, static_argnums=0)(
        problem.inner_loss, w, alpha, problem.inner_data, KEY
    )
    grad = jax.grad(problem.inner_loss)(w, alpha, problem.inner_data)
    assert (optax.tree.norm(grad) < 1e-8) == drift_correction
    assert float(stats["num_grads"]) == 60 * (4 + drift_correction)


@pytest.mark.parametrize("iid", [False, True])
def test_clients_have_few_classes_unless_iid(iid):
    """The parts are disjoint, training is long-tailed and validation is balanced."""
    task = federated.make(key=KEY, iid=iid)
    train, val = task.problem.inner_data, task.problem.outer_data
    test = task.metrics["accuracy"].args[0]
    assert train["y"].shape[0] == val["y"].shape[0] == 10
    parts = [np.asarray(part["x"]).reshape(-1, 64) for part in (train, val, test)]
    examples = np.concatenate(parts)
    assert len(np.unique(examples, axis=0)) == len(examples)
    num_train = np.sort(np.bincount(np.ravel(train["y"]), minlength=10))
    assert 3 <= num_train[0] <= 5
    assert 90 <= num_train[-1] <= 100
    np.testing.assert_array_equal(np.bincount(np.ravel(val["y"])), 20)
    num_classes = [len(np.unique(labels)) for labels in np.asarray(train["y"])]
    assert (np.mean(num_classes) > 6) == iid
    assert set(task.metrics) == {"accuracy"}


@pytest.mark.parametrize("imbalance", [1, 1.5, 20])
def test_no_test_example_is_used_for_training(imbalance):
    """Every example has its own feature; 1 means that all classes are equally large."""
    digits = datasets.load("digits")
    data = {"x": np.arange(1797.0)[:, None], "y": digits["y"]}
    task = federated.make(key=KEY, data=data, imbalance=imbalance)
    train, val = task.problem.inner_data, task.problem.outer_data
    test = task.metrics["accuracy"].args[0]
    parts = [np.ravel(part["x"]) for part in (train, val, test)]
    assert len(np.unique(np.concatenate(parts))) == sum(map(len, parts))
    counts = np.bincount(np.ravel(train["y"]), minlength=10)
    np.testing.assert_allclose(counts.max() / counts.min(), imbalance, rtol=0.2)


def test_traced_arguments_are_errors():
    """The numbers of examples, and so the shapes, depend on the labels."""
    make_w = lambda key: federated.make(key=key).w
    with pytest.raises(TypeError, match="key"):
        jax.eval_shape(make_w, KEY)
    make_w = lambda data: federated.make(key=KEY, data=data).w
    with pytest.raises(TypeError, match="data"):
        jax.eval_shape(make_w, datasets.load("digits"))
    make_w = lambda iid: federated.make(key=KEY, iid=iid).w
    with pytest.raises(TypeError, match="booleans must be concrete"):
        jax.eval_shape(make_w, True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-0.1, 3, 2), ValueError, "step_size"),
        (("small", 3, 2), TypeError, "step_size"),
        ((0.1, 0, 2), ValueError, "num_steps"),
        ((0.1, 3, 2, 1), TypeError, "drift_correction"),
    ],
)
def test_arguments_of_federated_averaging_are_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        FedAvg(*arguments)


def test_local_hypergradients_need_solvers():
    with pytest.raises(TypeError, match="solver"):
        LocalImplicit(0.1, hg.CG())
    with pytest.raises(TypeError, match="linear_solver"):
        LocalImplicit(FedAvg(0.1, 3, 2), 5)


def test_paper_scale_has_scalar_losses():
    """The task of the paper's scale is consistent for examples of MNIST's shape."""
    data = {"x": np.zeros((2000, 784), np.float32), "y": np.arange(2000) % 10}
    sizes = {"num_clients": 100, "max_per_class": 100, "val_per_class": 20}
    task = federated.make(key=KEY, scale="paper", data=data, **sizes)
    problem = task.problem
    evaluate_losses = lambda: (
        problem.inner_loss(task.w, task.alpha, problem.inner_data),
        problem.outer_loss(task.w, task.alpha, problem.outer_data),
    )
    values = jax.eval_shape(evaluate_losses)
    assert [value.shape for value in values] == [(), ()]


def test_estimators_count_the_gradients_of_each_round():
    """A round of four local steps and its correction costs five gradients."""
    problem, w, alpha = random_problem(KEY)
    solver = FedAvg(0.4, num_steps=3, num_local_steps=4)
    unrolled = hg.Unrolled(solver, checkpoint=False)
    truncated = hg.Unrolled(solver, truncation_length=2, checkpoint=False)
    for estimator, num_grads, num_hvps in (
        (unrolled, 3 * 5, 3 * 5),
        (truncated, 3 * 5, 2 * 5),
        (hg.Forward(solver), 3 * 5, 31 * 3 * 5),  # alpha has 30 entries.
        (hg.FixedPoint(solver, num_terms=7), (4 + 7) * 5, (8 + 7) * 5),
    ):
        stats = hg.hypergradient(problem, estimator)(w, alpha).stats
        assert float(stats["num_grads"]) == num_grads + 1  # One for inner_grad_norm.
        assert float(stats["num_hvps"]) == num_hvps


def test_local_hypergradients_need_a_single_outer_loss(key):
    task = hg.tasks.federated.make(key=key)
    problem = task.problem
    losses = (problem.outer_loss, problem.outer_loss)
    problem = hg.Bilevel(
        problem.inner_loss, losses, problem.inner_data, problem.outer_data
    )
    estimator = hg.tasks.federated.LocalImplicit(task.solver, hg.CG())
    with pytest.raises(ValueError, match="single loss"):
        hg.hypergradient(problem, estimator)(task.w, task.alpha)
