"""Federated learning: a loss per class, tuned across clients that share no data.

Tarzanagh et al. 2022, FedNest (arXiv 2205.02215). Classes are rare to
different degrees, and clients hold few classes each. The inner problem is a softmax
regression with the vector-scaling loss (Kini et al. 2021, arXiv 2103.01550)

    L(w, alpha) = mean_c mean_i -omega_y log softmax(delta z_i + iota)_y + penalty |w|²

over clients c and their examples i, z being the scores; ``alpha`` is one omega, delta
and iota a class. The outer loss is the cross-entropy of balanced validation examples.

With H_c, J_c and b_c of client c, the *global* hypergradient is
``-(mean J_c)' (mean H_c)^-1 (mean b_c)``, in which every product is a round of
communication; the *local* one, ``-mean J_c' H_c^-1 b_c``, needs a single round and is
another number wherever clients differ (LFedNest).
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
from jaxtyping import Array, PyTree

from .. import datasets as datasets
from .. import spaces
from ..cost import cost_stats
from ..estimators import Estimate, Implicit
from ..estimators.base import make_stats
from ..implicit_diff import implicit_hypergradient
from ..inner import inner_stats
from ..inner.base import InnerSolver, InnerStats
from ..inner.descent import run_inner_steps
from ..problem import Bilevel, Data, EstimateData, full_batch
from ..products import Loss
from ..trees import norm
from ..validation import as_key, check_positive_int
from .classifier import check_data
from .task import Task, sizes_of

NUM_CLASSES = 10
PENALTY = 1e-3


# The loss, on clients as a leading axis.


def scores(w: PyTree, x: Array) -> Array:
    """Softmax regression's class scores, ``[..., 10]``."""
    return x @ w["W"] + jnp.broadcast_to(w["b"], (*x.shape[:-1], NUM_CLASSES))


def vector_scaling(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """``-omega_y log softmax(delta * z + iota)_y`` of each example."""
    z = scores(w, batch["x"])
    over = lambda row: jnp.broadcast_to(row, z.shape)
    log = jax.nn.log_softmax(over(alpha["delta"]) * z + over(alpha["iota"]))
    taken = jnp.take_along_axis(log, batch["y"][..., None], axis=-1)[..., 0]
    return -alpha["omega"][batch["y"]] * taken


def train_loss(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """The mean over clients of their mean losses; ``x`` is ``[clients, n, d]``.

    The biases are penalised too: scores shifted by ``1 / delta`` change nothing else.
    """
    penalty = PENALTY * optax.tree.norm(w, squared=True)
    return jnp.mean(vector_scaling(w, alpha, batch)) + penalty


def val_loss(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Cross-entropy over the examples in use; each client has equally many."""
    del alpha
    each = optax.softmax_cross_entropy_with_integer_labels(
        scores(w, batch["x"]), batch["y"]
    )
    return jnp.sum(batch["use"] * each) / jnp.sum(batch["use"])


def accuracy(batch: PyTree, w: PyTree, alpha: PyTree, key: Array) -> Array:
    """Share of the examples whose highest score is their class, mean over classes."""
    del alpha, key
    hit = jnp.argmax(scores(w, batch["x"]), axis=-1) == batch["y"]
    member = jax.nn.one_hot(batch["y"], NUM_CLASSES)
    return jnp.mean(hit.astype(member.dtype) @ member / jnp.sum(member, axis=0))


def held_loss(batch: PyTree, w: PyTree, alpha: PyTree, key: Array) -> Array:
    """Cross-entropy on the held-out examples."""
    del key
    return val_loss(w, alpha, batch)


def each_client(data: PyTree) -> PyTree:
    """``[clients, n, ...] -> [clients, 1, n, ...]``: every client alone, to vmap."""
    return jax.tree.map(lambda leaf: leaf[:, None], data)


# Learning in rounds.


class FedAvg(eqx.Module):
    """Rounds of local gradient steps on every client, and the mean of where they end.

    Args:
      rate: of the local steps.
      num_steps: rounds, static.
      local_steps: of each client in a round, static.
      corrected: add ``mean_c g_c - g_c``, at the round's start, to a client's gradients
        (FedSVRG): the rounds then end at the argmin of the mean loss, from
        which clients that differ drift away otherwise.

    For a loss that is a mean over clients, the leading axis of all inner data; they run
    under ``vmap``, on as many devices as their data lies on.

    Cost: ``local_steps`` gradients a round, one more if corrected. Bias: none where
    corrected and converged.

    Source: McMahan et al. 2017 (arXiv 1602.05629); the correction, Tarzanagh et al.
    2022 (arXiv 2205.02215).

    >>> import jax, jax.numpy as jnp
    >>> loss = lambda w, alpha, batch: jnp.mean(batch["h"] * (w - batch["t"]) ** 2) / 2
    >>> data = {"h": jnp.array([[1.0], [3.0]]), "t": jnp.array([[0.0], [4.0]])}
    >>> for corrected in (True, False):
    ...     solver = FedAvg(0.2, num_steps=200, local_steps=5, corrected=corrected)
    ...     w, _ = solver.solve(loss, jnp.array(0.0), None, data, jax.random.key(0))
    ...     print(round(float(w), 2))
    3.0
    2.38
    """

    rate: float | Array
    num_steps: int = eqx.field(static=True)
    local_steps: int = eqx.field(static=True)
    corrected: bool = eqx.field(static=True, default=True)

    differentiable = True

    def __check_init__(self):
        check_positive_int("num_steps", self.num_steps)
        check_positive_int("local_steps", self.local_steps)

    @property
    def grads_per_step(self) -> int:
        """Gradients of a round."""
        return self.local_steps + self.corrected

    def init(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, PyTree]:
        """``(w, ())``: nothing is remembered between rounds."""
        del inner_loss, alpha, data, key
        return w, ()

    def step(
        self,
        inner_loss: Loss,
        carry: tuple[PyTree, PyTree],
        alpha: PyTree,
        data: Data,
        key: Array,
    ) -> tuple[PyTree, PyTree]:
        """One round."""
        w, _ = carry
        clients = each_client(full_batch(data, key))
        gradient = lambda w, client: jax.grad(inner_loss)(w, alpha, client)
        mean = lambda tree: jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), tree)
        first = jax.vmap(gradient, in_axes=(None, 0))(w, clients)
        shift = jax.tree.map(lambda mean, own: mean[None] - own, mean(first), first)
        if not self.corrected:
            shift = optax.tree.zeros_like(shift)

        def local(client, shift):
            def descend(w, _):
                slope = optax.tree.add(gradient(w, client), shift)
                return optax.tree.add_scale(w, -self.rate, slope), None

            return jax.lax.scan(descend, w, length=self.local_steps)[0]

        return mean(jax.vmap(local)(clients, shift)), ()

    def solve(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, InnerStats]:
        """``(w, stats)``; same structure as ``w``."""
        w, _ = run_inner_steps(self, inner_loss, w, alpha, data, key)
        return w, inner_stats(self.num_steps, self.num_steps * self.grads_per_step)


class LocalImplicit(eqx.Module):
    """The mean over clients of each one's own implicit hypergradient.

    ``dM/dalpha - mean_c J_c' H_c^-1 b_c``, all at the ``w`` that they found together.

    Args:
      solver: the inner solver, of all clients.
      linear_solver: of each client's adjoint, on its own Hessian.

    Cost: the inner solve, the mean of the clients' products, one outer gradient.
    Target: argmin. Bias: none where all clients are alike; where they differ it stays,
    so no estimate is trusted.

    Source: Tarzanagh et al. 2022 (arXiv 2205.02215), LFedNest.
    """

    solver: InnerSolver
    linear_solver: lx.AbstractLinearSolver

    target = "argmin"

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """NaN: no promise."""
        del eig_min, eig_max
        return float("nan")

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> PyTree:
        """``w``, the warm start."""
        Implicit(self.solver, self.linear_solver).init(problem, w, alpha, key)
        return w

    def estimate(
        self, problem: Bilevel, state: PyTree, alpha: PyTree, key: Array
    ) -> tuple[Estimate, PyTree]:
        """One inner solve and an adjoint for each client."""
        data = EstimateData.sample(problem, key)
        w, spent = self.solver.solve(
            problem.inner_loss,
            problem.init_inner(state, alpha),
            alpha,
            data.inner_data,
            data.solver_key,
        )
        at = jax.vmap(
            lambda client, outer_client: implicit_hypergradient(
                problem,
                self.linear_solver,
                w,
                alpha,
                client,
                outer_client,
                optax.tree.zeros_like(w),
            )
        )(each_client(data.inner_batch()), each_client(data.outer_batch()))
        mean = lambda tree: jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), tree)
        costs = cost_stats(
            data.inner_data,
            data.outer_data,
            num_grads=spent["num_grads"],
            num_hvps=spent["num_hvps"] + jnp.mean(at.linear_stats["num_products"]),
            num_values=spent["num_values"],
            num_outer_grads=1,
        )
        stats = make_stats(
            jnp.asarray(False),
            inner_grad_norm=norm(mean(at.inner_grad)),
            num_inner_steps=spent["num_steps"],
            adjoint_residual=jnp.max(at.adjoint_residual),
            **costs,
        )
        return Estimate(jnp.mean(at.value), mean(at.hypergradient), w, stats), w


# The data.


def split(
    data: dict[str, Any], key: Array, sizes: dict[str, Any], iid: bool, hold_out: bool
) -> dict[str, PyTree]:
    """Long-tailed training, balanced validation and test examples; by clients.

    Class k of a random order keeps ``most / ratio^(k / 9)`` training examples. Where
    clients differ, examples in the order of their classes are cut into two shards a
    client, drawn at random; a client's validation shards are of the same places. With
    ``hold_out`` every fourth validation example of a client is out of use for learning
    and makes the held-out set.
    """
    keys = jax.random.split(key, 4)
    order = np.asarray(jax.random.permutation(keys[0], len(data["y"])))
    rank = np.asarray(jax.random.permutation(keys[1], NUM_CLASSES))
    clients, num_val = sizes["num_clients"], sizes["val_per_class"]
    train, val, test = [], [], []
    for k in range(NUM_CLASSES):
        mine = order[data["y"][order] == k]
        keep = round(sizes["most"] / sizes["ratio"] ** (rank[k] / (NUM_CLASSES - 1)))
        val.append(mine[:num_val])
        train.append(mine[num_val : num_val + keep])
        test.append(mine[num_val + sizes["most"] :])

    at = lambda places: {name: jnp.asarray(data[name][places]) for name in ("x", "y")}

    def dealt(groups: list[np.ndarray], key: Array) -> dict[str, Array]:
        chosen = np.concatenate(groups)
        whole = len(chosen) - len(chosen) % (2 * clients)
        if not whole:
            raise ValueError(
                f"{len(chosen)} examples do not make two shards for each of {clients} "
                "clients: pass smaller num_clients, or larger most and val_per_class"
            )
        if iid:
            chosen = np.asarray(jax.random.permutation(key, chosen))
        else:  # what is left over goes from all classes alike
            chosen = chosen[np.linspace(0, len(chosen) - 1, whole).astype(int)]
        shards = chosen[:whole].reshape(2 * clients, -1)
        hands = np.asarray(jax.random.permutation(keys[3], 2 * clients))
        places = shards[hands].reshape(clients, -1)
        return at(places)

    val_data = dealt(val, jax.random.fold_in(keys[2], 1))
    fourth = jnp.broadcast_to(
        jnp.arange(val_data["y"].shape[1]) % 4 == 3, val_data["y"].shape
    )
    used = lambda use: {"use": use.astype(val_data["x"].dtype)}
    return {
        "train": dealt(train, keys[2]),
        "val": val_data | used(~(fourth & hold_out)),
        "held": val_data | used(fourth & hold_out),
        "test": at(np.concatenate(test)),
    }


SCALES: dict[str, dict[str, Any]] = {
    "small": {
        **{"num_clients": 10, "most": 100, "ratio": 20, "val_per_class": 20},
        **{"num_rounds": 5, "local_steps": 5, "rate": 0.2},
    },
    "paper": {
        **{"num_clients": 100, "most": 4000, "ratio": 100, "val_per_class": 500},
        **{"num_rounds": 20, "local_steps": 5, "rate": 0.1},
    },
}


def make(
    *,
    key: Array,
    scale: str = "small",
    data_dir: str | None = None,
    iid: bool = False,
    corrected: bool = True,
    hold_out: bool = False,
    data: dict[str, Any] | None = None,
    **sizes: Any,
) -> Task:
    """Vector scaling on scikit-learn's digits ('small') or MNIST ('paper').

    Args:
      key: of the split and of what each client holds.
      scale: 'small' or 'paper'.
      data_dir: where MNIST lies; see `hypergrad.data.load`.
      iid: deal the examples at random, so that clients are alike but for chance.
      corrected: whether `FedAvg` corrects for the clients' drift.
      hold_out: keep a quarter of validation out of the outer loss, to choose by: the
        metric ``held_loss``.
      data: ``{"x": [n, features], "y": [n]}`` in place of the digits, all of classes 0
        to 9 among them.
      sizes: in place of the scale's, as `SCALES` names them.

    Raises:
      TypeError: a size that `SCALES` does not name, data of another kind.
      ValueError: another scale, data of another shape, with other labels, or too few
        for the sizes.
    """
    key = as_key(key)
    if scale not in SCALES:
        raise ValueError(f"scale must be 'small' or 'paper'; got {scale!r}")
    chosen = sizes_of("federated", SCALES[scale], sizes)
    if data is None:
        data = datasets.load("digits" if scale == "small" else "mnist", data_dir)
    check_data(data, 1, NUM_CLASSES)
    least = chosen["val_per_class"] + chosen["most"] + 1
    rarest = int(np.bincount(data["y"], minlength=NUM_CLASSES).min())
    if rarest < least:
        raise ValueError(
            f"data must have {least} examples of each of {NUM_CLASSES} classes, one to "
            f"test by; of the rarest it has {rarest}: pass more data or smaller sizes"
        )
    parts = split(data, key, chosen, iid, hold_out)
    num_features = data["x"].shape[1]
    each = lambda low, high, log=False: spaces.Interval(
        low, high, log=log, shape=(NUM_CLASSES,)
    )
    metrics = {"accuracy": jax.tree_util.Partial(accuracy, parts["test"])}
    if hold_out:
        metrics["held_loss"] = jax.tree_util.Partial(held_loss, parts["held"])
    return Task(
        name="federated",
        paradigm="federated",
        source="Tarzanagh et al. 2022 (arXiv 2205.02215)",
        problem=Bilevel(train_loss, val_loss, parts["train"], parts["val"]),
        solver=FedAvg(
            chosen["rate"], chosen["num_rounds"], chosen["local_steps"], corrected
        ),
        w={"W": jnp.zeros((num_features, NUM_CLASSES)), "b": jnp.zeros(NUM_CLASSES)},
        alpha={
            "omega": jnp.ones(NUM_CLASSES),
            "delta": jnp.ones(NUM_CLASSES),
            "iota": jnp.zeros(NUM_CLASSES),
        },
        space={
            "omega": each(0.1, 10.0, log=True),
            "delta": each(0.1, 10.0, log=True),
            "iota": each(-3.0, 3.0),
        },
        metrics=metrics,
    )
