"""Hyper-cleaning of 5,000 training images of MNIST, half of which have wrong labels.

Data, model and final training are those of the small-scale experiment of Mehra & Hamm
2021 (`applications/data_denoising/mnist_experiments/small_scale` of
hammlab/bilevel-penalty).
"""

import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

import hypergrad as hg
from hypergrad import datasets
from hypergrad.tasks import classifier, cleaning
from hypergrad.tasks.networks import softmax_regression
from hypergrad.tasks.task import Task

NUM_TRAIN, NUM_VAL, NUM_WRONG, NUM_HELD_OUT = 5000, 5000, 2500, 1000
NUM_FEATURES, NUM_CLASSES = 784, 10
BATCH, NUM_EPOCHS = 200, 500
OPTIMIZER = optax.adam(1e-4)
L2_FACTOR = 1e-3
REVERSE_SOLVER = hg.Descent(optax.sgd(0.1, momentum=0.9), num_steps=60)

Data = dict[str, Array]


@functools.cache
def load_data() -> dict[str, Data]:
    """Returns the first 10,000 training images in two halves, and the test images."""
    arrays = datasets.load("mnist")
    images = lambda rows: {
        "x": jnp.asarray(arrays["x"][rows]), "y": jnp.asarray(arrays["y"][rows])
    }  # fmt: skip
    return {
        "train": images(slice(NUM_TRAIN)),
        "val": images(slice(NUM_TRAIN, NUM_TRAIN + NUM_VAL)),
        "test": images(slice(60_000, None)),
    }


def split(
    data: dict[str, Data], key: Array, hold_out: Bool[Array, ""] | bool
) -> dict[str, Data]:
    """Returns training images with wrong labels, validation, held-out and test images.

    The first 2,500 training images get the label of another class, by chance. With
    ``hold_out`` the first 1,000 validation images have ``use`` 0.
    """
    train = data["train"]
    shift = jax.random.randint(key, (NUM_WRONG,), 1, NUM_CLASSES)
    noisy = (train["y"][:NUM_WRONG] + shift) % NUM_CLASSES
    with_use = lambda examples: examples | {"use": jnp.ones(len(examples["y"]))}
    val = classifier.mask_held_out(with_use(data["val"]), hold_out, slice(NUM_HELD_OUT))
    return {
        "train": {
            "x": train["x"],
            "y": train["y"].at[:NUM_WRONG].set(noisy),
            "wrong": jnp.arange(NUM_TRAIN) < NUM_WRONG,
        },
        "val": val,
        "held_out": classifier.held_out_examples(val),
        "test": with_use(data["test"]),
    }


def make_task(key: Array, scale: str = "paper", *, hold_out: bool = False) -> Task:
    """Returns the task with the wrong labels of a key."""
    del scale
    splits = split(load_data(), jax.random.fold_in(key, 0), hold_out)
    train = {name: splits["train"][name] for name in ("x", "y")}
    train |= {"penalty": jnp.asarray(L2_FACTOR)}
    accuracy = lambda name: jax.tree_util.Partial(cleaning.accuracy, splits[name])
    wrong = splits["train"]["wrong"]
    return Task(
        paradigm="supervised",
        problem=hg.Bilevel(
            cleaning.train_loss, cleaning.val_loss, train, splits["val"]
        ),
        solver=REVERSE_SOLVER,
        w={"W": jnp.zeros((NUM_FEATURES, NUM_CLASSES)), "b": jnp.zeros(NUM_CLASSES)},
        alpha=jnp.full(NUM_TRAIN, 0.5),
        space=hg.spaces.Unit(shape=(NUM_TRAIN,)),
        metrics={
            "test_accuracy": accuracy("test"),
            "held_out_accuracy": accuracy("held_out"),
            "f1": jax.tree_util.Partial(cleaning.f1_of_wrong_labels, wrong),
        },
        splits=splits,
    )


def minibatch_problem(task: Task) -> hg.Bilevel:
    """Returns the problem with 200 examples of each loss in a step."""
    train = task.problem.inner_data | {"index": jnp.arange(NUM_TRAIN)}
    val = task.problem.outer_data
    val = val | {"use": val["use"] / jnp.mean(val["use"])}
    return hg.Bilevel(
        cleaning.minibatch_train_loss,
        cleaning.minibatch_val_loss,
        *(hg.Batches(examples, BATCH) for examples in (train, val)),
    )


def mean_loss(w: PyTree, batch: Data) -> Array:
    """Returns the mean cross-entropy."""
    return jnp.mean(classifier.losses(softmax_regression, w, batch))


def predict(w: PyTree, x: Array) -> Array:
    """Returns the class with the highest score."""
    return jnp.argmax(softmax_regression(w, x), axis=1)


@functools.partial(jax.jit, static_argnames="num_epochs")
def train_model(
    data: Data, is_kept: Bool[Array, " n"], key: Array, num_epochs: int = NUM_EPOCHS
) -> PyTree:
    """Returns a model that Adam trains on the examples that are kept.

    Every epoch has as many whole batches of 200 as the kept examples fill, in a new
    random order. The model starts at uniform weights as in Keras.
    """
    init_key, key = jax.random.split(key)
    init = jax.nn.initializers.glorot_uniform()
    w = {
        "W": init(init_key, (data["x"].shape[1], NUM_CLASSES), data["x"].dtype),
        "b": jnp.zeros(NUM_CLASSES, data["x"].dtype),
    }
    num_batches = jnp.sum(is_kept) // BATCH

    def run_epoch(carry: PyTree, key: Array) -> tuple[PyTree, None]:
        numbers = jax.random.uniform(key, is_kept.shape)
        order = jnp.argsort(jnp.where(is_kept, numbers, 2.0))  # those kept come first

        def step(i: Array, carry: PyTree) -> PyTree:
            w, opt_state = carry
            index = jax.lax.dynamic_slice(order, (BATCH * i,), (BATCH,))
            batch = {name: data[name][index] for name in ("x", "y")}
            grads = jax.grad(mean_loss)(w, batch)
            updates, opt_state = OPTIMIZER.update(grads, opt_state)
            return optax.apply_updates(w, updates), opt_state

        return jax.lax.fori_loop(0, num_batches, step, carry), None

    keys = jax.random.split(key, num_epochs)
    (w, _), _ = jax.lax.scan(run_epoch, (w, OPTIMIZER.init(w)), keys)
    return w


def train_on_kept(task: Task, alpha: Array, key: Array) -> PyTree:
    """Returns the final model.

    It is trained on the training examples with weights of at least 1/2, and on all
    validation examples that are not held out.
    """
    train, val = task.splits["train"], task.splits["val"]
    data = {name: jnp.concatenate([train[name], val[name]]) for name in ("x", "y")}
    is_kept = jnp.concatenate([alpha >= 0.5, val["use"] > 0])
    return train_model(data, is_kept, jax.random.fold_in(key, 2))
