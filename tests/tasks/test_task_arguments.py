"""Tests of the arguments of all tasks: wrong data, keys and sizes are errors."""

import io
import types
from dataclasses import fields as fields_of

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.tasks import TASKS, classifier
from hypergrad.tasks.task import check_choice

DIGITS = hg.datasets.load("digits")
IRIS = hg.datasets.load("iris")
#: Tasks that take labeled examples, and the number of examples that they need.
MIN_EXAMPLES = {
    "architecture": 1001,
    "augmentation": 301,
    "cleaning": 1151,
    "penalties": 601,
    "schedules": 1001,
    "self_supervised": 1201,
    "semi_supervised": 1151,
}


def make(name: str, data, **arguments) -> hg.tasks.Task:
    return TASKS[name].make(key=jax.random.key(0), data=data, **arguments)


def first_digits(num: int, **arrays) -> dict:
    return {name: leaf[:num] for name, leaf in DIGITS.items()} | arrays


X, Y = DIGITS["x"], DIGITS["y"]
WRONG_DATA = {
    "a tuple": (TypeError, (X, Y)),
    "another name": (ValueError, {"X": X, "y": Y}),
    "a list": (TypeError, {"x": X.tolist(), "y": Y}),
    "lengths that differ": (ValueError, {"x": X, "y": Y[:-1]}),
    "images that are not flat": (ValueError, {"x": X.reshape(-1, 8, 8), "y": Y}),
    "integer features": (TypeError, {"x": (16 * X).astype(int), "y": Y}),
    "NaN": (ValueError, {"x": np.where(X == 0, np.nan, X), "y": Y}),
    "floating-point labels": (TypeError, {"x": X, "y": Y.astype(float)}),
    "a label above the last": (ValueError, {"x": X, "y": Y + 1}),
    "a negative label": (ValueError, {"x": X, "y": Y - 1}),
}


@pytest.mark.parametrize("name", [*MIN_EXAMPLES, "federated", "unsupervised"])
def test_data_must_be_a_dict_of_features_and_labels(name: str):
    arguments = {"variant": "kmeans"} if name == "unsupervised" else {}
    for error, data in WRONG_DATA.values():
        with pytest.raises(error, match="data"):
            make(name, data, **arguments)


def test_marks_are_booleans_that_leave_enough_examples():
    marks = np.arange(1797) < 1200
    data = DIGITS | {"test": marks}
    with pytest.raises(ValueError, match="must leave 600 examples"):
        make("penalties", data)
    for wrong in (marks[:-1], marks.astype(int)):
        with pytest.raises(ValueError, match=r"'test'.*boolean"):
            make("penalties", DIGITS | {"test": wrong})


#: Numbers of marked examples of 1,797 that leave as many as the task needs.
NUM_MARKED = {name: 1797 - num + 1 for name, num in MIN_EXAMPLES.items()}


@pytest.mark.parametrize("name", [*MIN_EXAMPLES, "federated"])
def test_no_task_trains_or_validates_on_marked_examples(name: str):
    marks = np.arange(1797) < NUM_MARKED.get(name, 300)
    x = np.where(marks[:, None], np.float32(7), DIGITS["x"])
    problem = make(name, DIGITS | {"x": x, "test": marks}).problem
    leaves = jax.tree.leaves((problem.inner_data, problem.outer_data))
    is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    images = [leaf for leaf in leaves if leaf.ndim > 1 and is_float(leaf)]
    assert images
    assert all(np.max(leaf) <= 1 for leaf in images)


def test_marked_examples_of_a_density_model_are_for_testing():
    wine = hg.datasets.load("wine")
    marks = np.arange(178) >= 134
    data = {"x": np.where(marks[:, None], 1e6, wine["x"]), "test": marks}
    problem = make("unsupervised", data).problem
    for batch in (problem.inner_data, problem.outer_data):
        assert np.max(batch["x"]) < 100
    with pytest.raises(ValueError, match="must leave 133 examples"):
        make("unsupervised", data | {"test": np.arange(178) >= 132})


def test_marked_examples_must_leave_enough_of_each_class():
    is_three = DIGITS["y"] == 3
    with pytest.raises(ValueError, match="without the mark 'test'"):
        make("federated", DIGITS | {"test": is_three})


def test_any_constant_feature_becomes_zero():
    """The float32 mean of 200 equal numbers differs from some of them; one is 0."""
    constants = np.float32(np.linspace(0, 2, 100))
    x = jnp.asarray(np.tile(constants, (200, 1)))
    assert np.any(np.mean(np.asarray(x), 0) != constants)  # else nothing is tested
    splits = {"train": {"x": x}, "val": {"x": x + 1}}
    result = hg.tasks.penalties.standardize(splits)
    np.testing.assert_array_equal(result["train"]["x"], 0)
    np.testing.assert_allclose(result["val"]["x"], 1, rtol=1e-6)


#: The metric that is the outer loss of the held-out examples, for all tasks with some.
HELD_OUT = dict.fromkeys(
    ("architecture", "augmentation", "cleaning", "penalties", "physics", "schedules"),
    "held_out_loss",
) | {
    "federated": "held_loss",
    "self_supervised": "held_out_error",
    "semi_supervised": "held_out_loss",
}


def num_used(task: hg.tasks.Task) -> float:
    """Returns the number of validation examples in the outer loss."""
    data = task.problem.outer_data
    data = data.data if isinstance(data, hg.Batches) else data
    used = data["evaluate" if "evaluate" in data else "use"]
    return float(jnp.count_nonzero(used))


@pytest.mark.parametrize("name", HELD_OUT)
def test_losses_of_used_and_held_out_examples_average_to_that_of_all(name: str):
    """The weights are the numbers of examples, and the network is a random one."""
    make_task = lambda hold_out: TASKS[name].make(
        key=jax.random.key(0), hold_out=hold_out
    )
    full, reduced = make_task(False), make_task(True)
    assert not any(metric.startswith("held") for metric in full.metrics)
    add_noise = lambda leaf: (
        leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)
    )
    w = jax.tree.map(add_noise, full.w)

    def outer_value(task):
        data = task.problem.outer_data
        is_batched = isinstance(data, hg.Batches)
        return task.problem.outer_value(
            w, task.alpha, data.full_batch(jax.random.key(0)) if is_batched else data
        )

    values = reduced.metric_values(w, reduced.alpha, jax.random.key(0))
    assert all(np.isfinite(value) for value in values.values())
    n, num_reduced = num_used(full), num_used(reduced)
    assert 0.6 < num_reduced / n < 0.8  # a third or a quarter is held out
    actual = values[HELD_OUT[name]] * (n - num_reduced) / n
    actual += outer_value(reduced) * num_reduced / n
    np.testing.assert_allclose(actual, outer_value(full), rtol=1e-6)


@pytest.mark.parametrize("name", sorted(HELD_OUT.keys() - {"federated"}))
def test_a_traced_hold_out_gives_the_metrics_that_its_task_states(name: str):
    """Other metrics than those of held-out examples are always finite."""

    def evaluate(hold_out):
        key = jax.random.key(0)
        task = TASKS[name].make(key=key, hold_out=hold_out)
        return task.metric_values(task.w, task.alpha, key)

    evaluate_traced = jax.jit(evaluate)
    without, with_some = map(evaluate_traced, (jnp.array(False), jnp.array(True)))
    held_out = {metric for metric in without if metric.startswith("held")}
    assert all(np.isfinite(without[metric]) for metric in without.keys() - held_out)
    if name in ("penalties", "physics", "schedules"):
        assert not held_out
        return
    assert HELD_OUT[name] in held_out
    is_finite = name == "architecture"
    assert all(np.isfinite(without[metric]) == is_finite for metric in held_out)
    chex.assert_trees_all_close(with_some, evaluate(True), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("architecture", {"sizes": (50, 2, 3)}),
        ("augmentation", {"sizes": (50, 3, 3)}),
        ("federated", {"val_per_class": 2}),
        ("physics", {"num_held_out": 1}),
        ("semi_supervised", {"sizes": (50, 2, 60)}),
    ],
)
def test_held_out_examples_must_leave_and_be_some(name: str, arguments: dict):
    """Otherwise a loss would be that of no examples, which is NaN."""
    make_task = lambda hold_out: TASKS[name].make(
        key=jax.random.key(0), hold_out=hold_out, **arguments
    )
    with pytest.raises(ValueError, match="hold_out"):
        make_task(True)
    task = make_task(False)
    assert not any(metric.startswith("held") for metric in task.metrics)


@pytest.mark.parametrize("value", [1, 0.2, "yes", None, np.array([True])])
@pytest.mark.parametrize(
    ("name", "argument"),
    [
        *((name, "hold_out") for name in HELD_OUT),
        ("federated", "iid"),
        ("federated", "drift_correction"),
    ],
)
def test_a_boolean_argument_takes_no_other_value(name: str, argument: str, value):
    """The bits of 1 would put held-out examples into the outer loss."""
    with pytest.raises(TypeError, match=f"{argument} must be True or False; got"):
        TASKS[name].make(key=jax.random.key(0), **{argument: value})


def test_a_boolean_argument_may_be_an_array():
    """The clients' held-out examples are those of the Python value."""
    make_task = lambda value: TASKS["federated"].make(
        key=jax.random.key(0), hold_out=value, drift_correction=value
    )
    task = make_task(True)
    for value in (np.bool_(True), np.array(True), jnp.array(True)):
        chex.assert_trees_all_equal(make_task(value), task)
    assert 0 < jnp.mean(task.problem.outer_data["use"]) < 1


@pytest.mark.parametrize("name", [*MIN_EXAMPLES, "federated", "unsupervised"])
def test_data_may_be_any_mapping_with_further_entries(name: str):
    file = io.BytesIO()
    np.savez(file, **IRIS if name == "unsupervised" else DIGITS, names=np.array(["a"]))
    file.seek(0)
    data = np.load(file)
    expected = make(name, {"x": data["x"], "y": data["y"]})
    for mapping in (data, types.MappingProxyType(dict(data))):
        task = make(name, mapping)
        chex.assert_trees_all_equal(task.problem, expected.problem)


def test_means_over_half_precision_weights_are_sums_in_single_precision():
    """The sum of 70,000 ones overflows in float16 and is inexact in bfloat16."""
    is_correct = jnp.arange(70_000) % 4 != 0
    for dtype in (jnp.float16, jnp.bfloat16):
        actual = classifier.weighted_mean(is_correct, jnp.ones(70_000, dtype))
        np.testing.assert_allclose(actual, 0.75, rtol=1e-6)


@pytest.mark.parametrize("name", ["cleaning", "federated", "semi_supervised"])
def test_half_precision_features_have_the_accuracy_of_single_precision(name: str):
    """3,000 test examples of equal features, so that all of a class are correct."""
    y = np.arange(5000) % 10
    x = np.zeros((5000, 10), np.float16)
    x[np.arange(5000), y] = 1
    task = make(name, {"x": x, "y": y})
    w = {"W": jnp.eye(10).at[3].set(0), "b": jnp.zeros(10).at[0].set(0.5)}
    metric = "accuracy" if name == "federated" else "test_accuracy"
    accuracy = task.metrics[metric](w, task.alpha, None)
    np.testing.assert_allclose(accuracy, 0.9, atol=0.01)


@pytest.mark.parametrize("value", [1e-35, 1e-25, 1.0, 1e20, 1e37])
def test_deviations_neither_overflow_nor_underflow(value: float):
    """The standard deviation of c, 2c and 3c is c times the root of 2/3."""
    x = jnp.float32(value) * jnp.array([[1, 1], [2, 1], [3, -5]], jnp.float32)
    mean, deviation = classifier.mean_and_deviation(x)
    expected = np.asarray(x, float)
    np.testing.assert_allclose(mean[0], expected.mean(0), rtol=1e-6)
    np.testing.assert_allclose(deviation[0], expected.std(0), rtol=1e-6)


def test_scaling_does_not_change_a_bit_of_a_mean_or_a_deviation():
    x = jnp.asarray(hg.datasets.load("breast_cancer")["x"])
    for leaf in (x, x.astype(float)):
        mean, deviation = classifier.mean_and_deviation(leaf)
        np.testing.assert_array_equal(mean[0], jnp.mean(leaf, axis=0))
        np.testing.assert_array_equal(deviation[0], jnp.std(leaf, axis=0))


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("physics", "control"),
        ("reinforcement", "mrp"),
        ("unsupervised", "kde"),
        ("unsupervised", "ppca"),
    ],
)
def test_closed_forms_leave_a_compiled_program(name: str, variant: str):
    make_task = lambda key: TASKS[name].make(key=key, variant=variant)
    key = jax.random.key(0)
    task, compiled = make_task(key), jax.jit(make_task)(key)
    actual = compiled.exact(compiled.alpha)
    np.testing.assert_allclose(actual, task.exact(task.alpha), rtol=1e-6)


def test_examples_that_own_sizes_need_are_named():
    with pytest.raises(ValueError, match=r"data must be given.*least 1,001 examples"):
        make("architecture", None, scale="paper", sizes=(600, 400, 4))
    with pytest.raises(ValueError, match="at least 31 examples"):
        make("augmentation", None, scale="paper", sizes=(20, 10, 4))
    with pytest.raises(ValueError, match="at least 61 examples"):
        make("semi_supervised", None, scale="paper", sizes=(10, 20, 30))


def test_metrics_of_a_task_can_be_recorded():
    """No metric has the name of a column of a trace, which would be an error later."""
    control = hg.tasks.physics.make(key=jax.random.key(0), variant="control")
    hg.OuterLoop(
        control.problem,
        hg.Implicit(control.solver),
        optax.sgd(0.1),
        metrics=control.metrics,
    )
    fields = {field.name: getattr(control, field.name) for field in fields_of(control)}
    with pytest.raises(ValueError, match=r"metrics.*'cost'"):
        hg.tasks.Task(**fields | {"metrics": {"cost": lambda w, alpha, key: 0.0}})


@pytest.mark.parametrize("name", TASKS)
def test_an_integer_is_not_a_key(name: str):
    with pytest.raises(TypeError, match="key"):
        TASKS[name].make(key=3)


@pytest.mark.parametrize("name", TASKS)
def test_an_unknown_scale_is_an_error(name: str):
    with pytest.raises(ValueError, match="scale"):
        TASKS[name].make(key=jax.random.key(0), scale="large")


@pytest.mark.parametrize(
    ("name", "arguments", "argument"),
    [
        ("penalties", {"variant": "forest"}, "variant"),
        ("penalties", {"granularity": "layer"}, "granularity"),
        ("schedules", {"num_steps": 50, "num_windows": 0}, "num_windows"),
        ("schedules", {"num_steps": 50, "num_windows": 51}, "num_windows"),
        ("penalties", {"init_log_penalty": 5.0}, "init_log_penalty"),
        ("penalties", {"init_log_penalty": np.nan}, "init_log_penalty"),
        ("penalties", {"init_log_penalty": np.zeros(3)}, "init_log_penalty"),
        ("cleaning", {"corruption": 2.0}, "corruption"),
        ("federated", {"num_clients": 500}, "num_clients"),
        ("federated", {"num_clients": 0}, "num_clients"),
        ("federated", {"imbalance": 0}, "imbalance"),
        ("federated", {"imbalance": 0.5}, "imbalance"),
        ("federated", {"imbalance": 1000}, "imbalance"),
        ("few_shot", {"num_tasks": 0}, "num_tasks"),
        ("few_shot", {"num_shots": 0}, "num_shots"),
        ("few_shot", {"num_ways": 0}, "num_ways"),
        ("few_shot", {"num_ways": 1}, "num_ways"),
        ("few_shot", {"images": np.full((9, 20, 4, 4), np.nan)}, "images"),
        ("few_shot", {"hidden": (0,)}, "hidden"),
        ("few_shot", {"num_turns": "unknown"}, "num_turns"),
        ("few_shot", {"variant": "unknown"}, "variant"),
        ("physics", {"num_held_out": 0}, "num_held_out"),
        ("physics", {"hidden": (4, 2.5)}, "hidden"),
        ("physics", {"variant": "unknown"}, "variant"),
        ("reinforcement", {"variant": "mrp", "num_val": 0}, "num_val"),
        ("reinforcement", {"num_episodes": 1.5}, "num_episodes"),
        ("reinforcement", {"variant": "unknown"}, "variant"),
        ("self_supervised", {"width": 0}, "width"),
        ("semi_supervised", {"sizes": (50, 0, 100)}, "sizes"),
        ("semi_supervised", {"sizes": (50, 100)}, "sizes"),
        ("semi_supervised", {"sizes": (50, 100, 1700)}, "data"),
        ("architecture", {"sizes": (600, 400, 0)}, "sizes"),
        ("augmentation", {"sizes": (-1, 100, 10)}, "sizes"),
        ("architecture", {"sizes": (1000, 797, 3)}, "data"),
        ("augmentation", {"sizes": (1000, 797, 3)}, "data"),
        ("architecture", {"price": np.nan}, "price"),
        ("architecture", {"price": np.ones(3)}, "price"),
        ("augmentation", {"penalty": -1.0}, "penalty"),
        ("cleaning", {"penalty": -1.0}, "penalty"),
        ("cleaning", {"corruption": np.full(1000, 0.3)}, "corruption"),
        ("federated", {"step_size": -1.0}, "step_size"),
        ("few_shot", {"variant": "imaml", "penalty": -5}, "penalty"),
        ("physics", {"noise": np.nan}, "noise"),
        ("physics", {"num_sensors": (3, 4)}, "num_sensors"),
        ("physics", {"variant": "burgers", "num_sensors": 30_000}, "num_sensors"),
        ("penalties", {"variant": ["svm"]}, "variant"),
        ("reinforcement", {"step_size": -1.0}, "step_size"),
        ("schedules", {"num_windows": 2.5}, "num_windows"),
        ("schedules", {"num_steps": 50.0}, "num_steps"),
        ("self_supervised", {"penalty": np.inf}, "penalty"),
        ("self_supervised", {"penalty": 0.0}, "penalty"),
        ("semi_supervised", {"penalty": np.nan}, "penalty"),
        ("unsupervised", {"variant": "unknown"}, "variant"),
    ],
)
def test_a_value_that_does_not_fit_is_an_error(name: str, arguments, argument: str):
    with pytest.raises(ValueError, match=argument):
        TASKS[name].make(key=jax.random.key(0), **arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("cleaning", {"penalty": "small"}),
        ("federated", {"imbalance": "a"}),
        ("few_shot", {"hidden": 64}),
        ("few_shot", {"images": np.zeros((9, 20, 4, 4), np.uint8)}),
        ("few_shot", {"images": np.zeros((9, 20, 4, 4), complex)}),
        ("penalties", {"init_log_penalty": "small"}),
        ("physics", {"hidden": 20}),
        ("semi_supervised", {"sizes": 5}),
    ],
)
def test_a_value_of_a_wrong_type_is_an_error(name: str, arguments: dict):
    (argument,) = arguments
    with pytest.raises(TypeError, match=f"^{argument} must be"):
        TASKS[name].make(key=jax.random.key(0), **arguments)


def test_traced_penalties_and_prices_are_accepted():
    for name in ("architecture", "augmentation", "cleaning", "semi_supervised"):
        argument = "price" if name == "architecture" else "penalty"
        make_w = lambda x, name=name, argument=argument: (
            make(name, DIGITS, **{argument: x}).w
        )
        assert jax.eval_shape(jax.vmap(make_w), jnp.array([0.1, 0.2]))


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("architecture", "price"),
        ("augmentation", "penalty"),
        ("cleaning", "penalty"),
        ("semi_supervised", "penalty"),
    ],
)
def test_a_small_coefficient_is_not_rounded_to_half_precision(name, argument):
    """1e-9 is 0 in float16."""
    data = DIGITS | {"x": np.asarray(DIGITS["x"], np.float16)}
    problem = make(name, data, **{argument: 1e-9}).problem
    batches = problem.outer_data if argument == "price" else problem.inner_data
    batch = getattr(batches, "data", batches)
    np.testing.assert_array_equal(batch[argument], np.float32(1e-9))


@pytest.mark.parametrize(
    "function", [hg.tasks.architecture.ranking, hg.tasks.physics.cole_hopf_grid]
)
def test_an_array_that_callers_share_cannot_be_changed(function):
    for array in function().values():
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0.0


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("federated", {"num_client": 4}),
        ("physics", {"senors": 5, "Noise": 0.5}),
        ("reinforcement", {"num_episode": 2}),
    ],
)
def test_a_misspelt_size_is_an_error(name: str, sizes: dict):
    with pytest.raises(TypeError, match=", ".join(sorted(sizes))):
        TASKS[name].make(key=jax.random.key(0), **sizes)


@pytest.mark.parametrize("name", ["architecture", "augmentation", "semi_supervised"])
def test_sizes_may_be_a_list(name: str):
    sizes = 30, 40, 50
    task, expected = (make(name, None, sizes=x) for x in (list(sizes), sizes))
    shapes = lambda task: jax.tree.map(jnp.shape, (task.w, task.problem.inner_data))
    assert shapes(task) == shapes(expected)


@pytest.mark.parametrize("name", MIN_EXAMPLES)
def test_every_split_has_an_example(name: str):
    """One example fewer than the minimum would leave none for testing."""
    num = MIN_EXAMPLES[name]
    with pytest.raises(ValueError, match=str(num - 1)):
        make(name, first_digits(num - 1))
    for metric in make(name, first_digits(num)).metrics.values():
        assert all(leaf.size for leaf in jax.tree.leaves(metric.args))


@pytest.mark.parametrize(
    ("name", "arguments", "num_features"),
    [
        ("architecture", {}, 60),
        ("architecture", {}, 49),
        ("augmentation", {}, 60),
        ("penalties", {"variant": "cnn"}, 60),
        ("penalties", {"variant": "cnn"}, 9),
        ("penalties", {"variant": "cnn"}, 1),
        ("self_supervised", {}, 49),
    ],
)
def test_images_need_a_number_of_pixels(name: str, arguments, num_features: int):
    """Images must be square, and pooling needs an even side."""
    with pytest.raises(ValueError, match="data"):
        make(name, DIGITS | {"x": X[:, :num_features]}, **arguments)


@pytest.mark.parametrize(
    ("name", "data", "arguments"),
    [
        pytest.param("penalties", DIGITS, {"variant": "logistic"}, id="ten classes"),
        pytest.param("cleaning", IRIS, {}, id="too few examples"),
        pytest.param("federated", IRIS, {}, id="missing classes"),
        pytest.param(
            "unsupervised", {"x": X[:90, :3]}, {"variant": "ppca"}, id="few features"
        ),
    ],
)
def test_data_that_would_give_nan_is_an_error(name: str, data, arguments):
    with pytest.raises(ValueError, match=r"data|features"):
        make(name, data, **arguments)


def test_the_test_split_of_small_data_is_the_rest():
    rows = np.arange(700.0)[:, None] + np.zeros((1, 64))
    task = make("penalties", first_digits(700, x=rows))
    splits = (
        task.problem.inner_data,
        task.problem.outer_data,
        task.metrics["test_loss"].args[0],
    )
    numbers = [np.asarray(split["x"])[:, 0] for split in splits]
    assert [len(x) for x in numbers] == [200, 400, 100]
    assert sorted(np.concatenate(numbers)) == list(range(700))


def test_clusters_need_no_labels():
    """Without labels the agreement with the classes is not a metric."""
    task = make("unsupervised", {"x": IRIS["x"]}, variant="kmeans")
    assert set(task.metrics) == {"test_nll"}


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((10, 20, 64), id="flat images"),
        pytest.param((10, 20, 8, 6), id="images that are not square"),
        pytest.param((10, 15, 8, 8), id="too few drawings"),
        pytest.param((3, 20, 8, 8), id="too few classes"),
    ],
)
def test_few_shot_images_need_a_shape(shape):
    with pytest.raises(ValueError, match=r"images|classes"):
        hg.tasks.few_shot.make(key=jax.random.key(0), images=jnp.zeros(shape))


@pytest.mark.parametrize(
    ("name", "size"), [("reinforcement", "step_size"), ("federated", "imbalance")]
)
def test_a_size_may_be_a_scalar_of_jax(name: str, size: str):
    number, expected = (
        jnp.float32(5.0),
        TASKS[name].make(key=jax.random.key(0), **{size: 5.0}),
    )
    task = TASKS[name].make(key=jax.random.key(0), **{size: number})
    chex.assert_trees_all_equal(task.problem.outer_data, expected.problem.outer_data)


@pytest.mark.parametrize(
    "value", [["a"], ("a", ["b"]), np.arange(2)], ids=["list", "nested list", "array"]
)
def test_a_choice_that_cannot_be_looked_up_is_none_of_the_choices(value):
    with pytest.raises(ValueError, match="variant must be one of 'a', 'b'"):
        check_choice("variant", value, {"a": 1, "b": 2})
    with pytest.raises(ValueError, match="variant must be one of 'a', 'b'"):
        check_choice("variant", value, ("a", "b"))
