"""Federated learning: class-dependent losses for clients that do not share data.

Tarzanagh et al. 2022, FedNest (arXiv 2205.02215). The classes have different
frequencies, and each client has few classes. The inner problem is a softmax regression
with the vector-scaling loss (Kini et al. 2021, arXiv 2103.01550)

    L(w, alpha) = mean_c mean_i -omega_y log softmax(delta z_i + iota)_y + penalty |w|²

over clients c and their examples i, where z are the class scores; ``alpha`` contains
omega, delta and iota of each class. The outer loss is the cross-entropy of balanced
validation examples.

With H_c, J_c and b_c of client c, the *global* hypergradient is
``-(mean J_c)' (mean H_c)^-1 (mean b_c)``, in which every product is a round of
communication. The *local* hypergradient (LFedNest), ``-mean J_c' H_c^-1 b_c``, needs a
single round and differs from the global one if the clients differ.

Costs count clients as examples: an outer gradient, of the validation examples of all
clients, counts as one inner gradient, and ``num_examples`` is a number of clients.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from .. import spaces
from ..metrics import Metric
from ..problem import Bilevel
from ..validation import as_key, is_traced
from .classifier import load_data, random_order, weighted_mean
from .federated_averaging import FedAvg, LocalImplicit
from .task import (
    Task,
    check_booleans,
    check_choice,
    has_held_out,
    loss_metric,
    sizes_of,
)

__all__ = ["FedAvg", "LocalImplicit", "make"]

NUM_CLASSES = 10
PENALTY = 1e-3


def scores(w: PyTree, x: Float[Array, "*n d"]) -> Float[Array, "*n 10"]:
    """Returns the class scores of softmax regression."""
    return x @ w["W"] + jnp.broadcast_to(w["b"], (*x.shape[:-1], NUM_CLASSES))


def vector_scaling_losses(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Returns ``-omega_y log softmax(delta * z + iota)_y`` of each example."""
    z = scores(w, batch["x"])
    per_class = lambda parameter: jnp.broadcast_to(alpha[parameter], z.shape)
    log_probs = jax.nn.log_softmax(per_class("delta") * z + per_class("iota"))
    label = batch["y"][..., None]
    log_prob = jnp.take_along_axis(log_probs, label, axis=-1)[..., 0]
    return -alpha["omega"][batch["y"]] * log_prob


def train_loss(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Returns the mean of the clients' losses; ``x`` is ``[clients, n, d]``.

    The penalty includes the biases. Otherwise the Hessian would be singular, because
    adding ``1 / delta`` to all scores does not change the loss.
    """
    penalty = PENALTY * optax.tree.norm(w, squared=True)
    return jnp.mean(vector_scaling_losses(w, alpha, batch)) + penalty


def val_loss(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Returns the mean cross-entropy of the examples whose ``use`` is 1.

    The number of these examples is the same for each client.
    """
    del alpha
    losses = optax.softmax_cross_entropy_with_integer_labels(
        scores(w, batch["x"]), batch["y"]
    )
    return weighted_mean(losses, batch["use"])


def accuracy(batch: PyTree, w: PyTree, alpha: PyTree, key: Array) -> Array:
    """Returns the balanced accuracy: the mean of the accuracies of the classes."""
    del alpha, key
    is_correct = jnp.argmax(scores(w, batch["x"]), axis=-1) == batch["y"]
    labels = jax.nn.one_hot(batch["y"], NUM_CLASSES)
    return jnp.mean(is_correct.astype(labels.dtype) @ labels / jnp.sum(labels, axis=0))


def split(
    data: dict[str, Any], key: Array, sizes: dict[str, Any], iid: bool, hold_out: bool
) -> dict[str, PyTree]:
    """Returns long-tailed training, balanced validation and remaining test examples.

    Class k of a random order has ``max_per_class / imbalance^(k / 9)`` training
    examples. The training and validation examples are divided among the clients by
    `split_among_clients`.

    Args:
      data: ``{"x": [n, features], "y": [n]}``.
      key: PRNG key of the split.
      sizes: Entries of `SCALES`.
      iid: Whether the clients have the same distribution of classes.
      hold_out: Whether every fourth validation example of a client is removed from the
        part "val" by its weight ``use``. These examples are then the part "held_out".

    Raises:
      ValueError: ``imbalance`` is below 1, so that training examples would be test
        examples, or leaves a class no training example.
    """
    if not sizes["imbalance"] >= 1:
        raise ValueError(f"imbalance must be at least 1; got {sizes['imbalance']}.")
    keys = jax.random.split(key, 4)
    order = np.asarray(random_order(data, keys[0]))
    rank = np.asarray(jax.random.permutation(keys[1], NUM_CLASSES))
    num_val, max_train = sizes["val_per_class"], sizes["max_per_class"]
    labels = np.asarray(data["y"])[order]
    train, val, test = [], [], []
    for k in range(NUM_CLASSES):
        indices = order[labels == k]
        decay = sizes["imbalance"] ** (rank[k] / (NUM_CLASSES - 1))
        val.append(indices[:num_val])
        train.append(indices[num_val : num_val + round(max_train / decay)])
        test.append(indices[num_val + max_train :])

    def select(groups: list[np.ndarray], key: Array) -> dict[str, Array]:
        indices = split_among_clients(
            np.concatenate(groups), key, keys[3], sizes["num_clients"], iid
        )
        return {name: jnp.asarray(data[name][indices]) for name in ("x", "y")}

    val_examples = select(val, jax.random.fold_in(keys[2], 1))
    is_fourth = jnp.arange(val_examples["y"].shape[1]) % 4 == 3
    is_held_out = jnp.broadcast_to(is_fourth, val_examples["y"].shape) & hold_out
    with_use = lambda use: val_examples | {"use": use.astype(val_examples["x"].dtype)}
    test_indices = np.concatenate(test)
    train_examples = select(train, keys[2])
    check_training_classes(train_examples["y"], sizes)
    return {
        "train": train_examples,
        "val": with_use(~is_held_out),
        "held_out": with_use(is_held_out),
        "test": {name: jnp.asarray(data[name][test_indices]) for name in ("x", "y")},
    }


def check_concrete(*arguments: Any) -> None:
    """Checks that no argument is traced.

    Raises:
      TypeError: One of them is, but the numbers of examples depend on the labels.
    """
    if is_traced(arguments):
        raise TypeError(
            "key, data and booleans must be concrete, because the numbers of examples "
            "depend on them; got a tracer. Call federated.make outside of jax.jit."
        )


def check_classes(data: PyTree, num_needed: int) -> None:
    """Checks that enough examples of each class are left for testing.

    Raises:
      ValueError: A class has no example more than ``num_needed``, or fewer without the
        mark ``test``.
    """
    may_learn = ~np.asarray(data["test"]) if "test" in data else slice(None)
    count = lambda labels: int(np.bincount(labels, minlength=NUM_CLASSES).min())
    labels = np.asarray(data["y"])
    for num_rarest, minimum, kind in (
        (count(labels), num_needed + 1, "examples"),
        (count(labels[may_learn]), num_needed, "examples without the mark 'test'"),
    ):
        if num_rarest < minimum:
            raise ValueError(
                f"data must have at least {minimum} {kind} of each of the "
                f"{NUM_CLASSES} classes; got {num_rarest} of the rarest. Pass more "
                "data or smaller sizes."
            )


def check_training_classes(labels: Array, sizes: dict[str, Any]) -> None:
    """Checks that all classes have training examples.

    Raises:
      ValueError: A class has none, because ``imbalance`` is too large.
    """
    counts = np.bincount(np.ravel(labels), minlength=NUM_CLASSES)
    if not counts.min():
        raise ValueError(
            "imbalance must leave each class a training example; got "
            f"{sizes['imbalance']:g} for max_per_class={sizes['max_per_class']}, which "
            f"leaves the classes {np.flatnonzero(counts == 0).tolist()} none."
        )


def split_among_clients(
    indices: np.ndarray, key: Array, client_key: Array, num_clients: int, iid: bool
) -> np.ndarray:
    """Returns the indices of the examples of each client, ``[clients, n]``.

    The examples are cut into two shards per client, which are assigned at random. For
    equal ``client_key``, a client has the shards of the same numbers of training and of
    validation examples. Their classes differ where the numbers of examples per class
    do, so that a client may validate on classes that it does not train.

    Args:
      indices: Indices of examples, sorted by class.
      key: PRNG key of the permutation for ``iid``.
      client_key: PRNG key of the assignment of shards to clients.
      num_clients: Number of clients.
      iid: Whether the examples are permuted, so that shards have all classes.

    Raises:
      ValueError: There are fewer than two examples for each client.
    """
    num_shards = 2 * num_clients
    num_used = len(indices) - len(indices) % num_shards
    if not num_used:
        raise ValueError(
            f"num_clients must be at most half of the {len(indices)} examples, because "
            f"each client has two shards; got {num_clients}. Pass fewer clients, or "
            "larger max_per_class and val_per_class."
        )
    if iid:
        indices = np.asarray(jax.random.permutation(key, indices))
    else:
        # Drop the surplus evenly, so that all classes lose examples alike.
        positions = np.linspace(0, len(indices) - 1, num_used).astype(int)
        indices = indices[positions]
    shards = indices[:num_used].reshape(num_shards, -1)
    order = np.asarray(jax.random.permutation(client_key, num_shards))
    return shards[order].reshape(num_clients, -1)


SCALES: dict[str, dict[str, Any]] = {
    "small": {
        "num_clients": 10, "max_per_class": 100, "val_per_class": 20,
        "imbalance": 20.0, "num_rounds": 5, "num_local_steps": 5, "step_size": 0.2,
    },
    "paper": {
        "num_clients": 100, "max_per_class": 4000, "val_per_class": 500,
        "imbalance": 100.0, "num_rounds": 20, "num_local_steps": 5, "step_size": 0.1,
    },
}  # fmt: skip


def make(
    *,
    key: Array,
    scale: str = "small",
    data_dir: str | None = None,
    iid: bool = False,
    drift_correction: bool = True,
    hold_out: bool = False,
    data: dict[str, Any] | None = None,
    **sizes: Any,
) -> Task:
    """Returns the vector-scaling task on digits ('small') or MNIST ('paper').

    The numbers of examples depend on the labels, so `jax.jit` and `jax.vmap` cannot
    transform this function.

    Args:
      key: PRNG key of the split and of the clients' examples.
      scale: 'small' or 'paper'.
      data_dir: Folder of MNIST; see `hypergrad.datasets.load`.
      iid: Whether examples are assigned at random, so that all clients have the same
        distribution. Defaults to False.
      drift_correction: As in `FedAvg`.
      hold_out: Whether a quarter of the validation examples is not in the outer loss
        but in the metric ``held_loss``, for model selection. Defaults to False.
      data: ``{"x": [n, features], "y": [n]}`` with all of the classes 0 to 9. Defaults
        to the data of the scale.
      sizes: Replacements of the entries of `SCALES`, by their names.

    Raises:
      TypeError: A size is not in `SCALES`, a size, a boolean or data has a wrong type,
        or an argument is traced.
      ValueError: The scale is unknown, a number of ``sizes`` is out of range,
        ``imbalance`` is below 1 or leaves a class no training example, or data has a
        wrong shape, a wrong label, or too few examples for the sizes or ``hold_out``.
    """
    key = as_key(key)
    check_choice("scale", scale, SCALES)
    check_booleans(iid=iid, drift_correction=drift_correction, hold_out=hold_out)
    chosen = sizes_of("federated", SCALES[scale], sizes)
    data_name = "digits" if scale == "small" else "mnist"
    data = load_data(data, data_name, 1, NUM_CLASSES, data_dir)
    check_concrete(key, data, iid, drift_correction, hold_out)
    check_classes(data, chosen["val_per_class"] + chosen["max_per_class"])
    splits = split(data, key, chosen, iid, hold_out)
    num_val = splits["val"]["y"].shape[1]
    num_features = data["x"].shape[1]
    interval = lambda low, high, log=False: spaces.Interval(
        low, high, log=log, shape=(NUM_CLASSES,)
    )
    metrics: dict[str, Metric] = {
        "accuracy": jax.tree_util.Partial(accuracy, splits["test"])
    }
    if has_held_out(hold_out, num_val // 4, num_val):
        metrics["held_loss"] = loss_metric(val_loss, splits["held_out"])
    return Task(
        paradigm="federated",
        problem=Bilevel(train_loss, val_loss, splits["train"], splits["val"]),
        solver=FedAvg(
            chosen["step_size"],
            chosen["num_rounds"],
            chosen["num_local_steps"],
            bool(drift_correction),
        ),
        w={"W": jnp.zeros((num_features, NUM_CLASSES)), "b": jnp.zeros(NUM_CLASSES)},
        alpha={
            "omega": jnp.ones(NUM_CLASSES),
            "delta": jnp.ones(NUM_CLASSES),
            "iota": jnp.zeros(NUM_CLASSES),
        },
        space={
            "omega": interval(0.1, 10.0, log=True),
            "delta": interval(0.1, 10.0, log=True),
            "iota": interval(-3.0, 3.0),
        },
        metrics=metrics,
    )
