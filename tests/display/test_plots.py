"""Figures: the numbers, the marked steps and the labels that they draw."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.plots import MAX_CROSSES, MAX_LINES_PER_LEAF
from hypergrad.runtime.compat import enable_x64
from tests.loops import TO_ONE, ExactEstimator, run_loop
from tests.processes import run_python

TRUSTED = np.array([True, False, True, False, True, True])


def run(alpha=3.0, num_steps=6, **options) -> hg.Trace:
    estimator = ExactEstimator(trusted=TRUSTED)
    alpha = jnp.asarray(alpha)
    return run_loop(
        TO_ONE, estimator, optax.sgd(0.1), jnp.zeros_like(alpha), alpha,
        num_steps=num_steps, **options,
    )  # fmt: skip


def random_search() -> hg.Trace:
    return hg.search(
        TO_ONE, hg.Newton(), hg.searchers.Random(), 0.0,
        space=hg.spaces.Interval(0.0, 2.0), budget=20,
    )  # fmt: skip


def find_line(axes, label):
    (line,) = (x for x in axes.lines if x.get_label() == label)
    return line


def points(line):
    return np.stack(line.get_data(), axis=1)


def test_a_run_is_drawn_over_steps_and_over_cost():
    trace = run()
    by_step, by_cost = trace.plot().axes
    assert np.array_equal(by_step.lines[0].get_xdata(), np.arange(6))
    assert np.array_equal(by_step.lines[0].get_ydata(), trace.value)
    assert np.array_equal(by_cost.lines[0].get_xdata(), trace.cost)
    assert np.array_equal(by_cost.lines[0].get_ydata(), trace.value)
    assert by_step.get_xlabel() == "outer step"
    assert by_cost.get_xlabel() == "cost (gradient-equivalents)"
    assert by_step.get_ylabel() == by_cost.get_ylabel() == "outer value"


def test_untrusted_steps_are_marked():
    trace = run()
    by_step, by_cost = trace.plot().axes
    for axes, x in ((by_step, trace.steps), (by_cost, trace.cost)):
        crosses = find_line(axes, "not trusted (2 of 6)")
        assert crosses.get_marker() == "x"
        expected = np.stack([x, trace.value], axis=1)[~TRUSTED]
        assert np.array_equal(points(crosses), expected)
    axes = run(num_steps=1).plot().axes[0]
    assert [line.get_label() for line in axes.lines if line.get_marker() == "x"] == []


def test_many_untrusted_steps_have_few_marks_and_their_number_in_the_legend():
    estimator = ExactEstimator(trusted=np.zeros(100, bool))
    trace = run_loop(TO_ONE, estimator, optax.sgd(0.1), 0.0, 3.0, num_steps=100)
    crosses = find_line(trace.plot().axes[0], "not trusted (100 of 100)")
    assert len(crosses.get_xdata()) == 100
    num_marked = 100 / crosses.get_markevery()
    assert MAX_CROSSES / 2 <= num_marked <= MAX_CROSSES


def test_values_that_are_not_finite_are_marked_at_the_lower_edge():
    """Such as failed trials: all of them lie within the axes."""
    outer = lambda w, a, b: jnp.where(w > 0.6, jnp.nan, (w - 0.5) ** 2)
    problem = hg.Bilevel(TO_ONE.inner_loss, outer)
    trace = hg.search(
        problem, hg.Newton(), hg.searchers.Sobol(), 0.0,
        space=hg.spaces.Unit(), budget=60,
    )  # fmt: skip
    has_failed = np.isnan(trace.value)
    for axes, x in zip(trace.plot().axes, (trace.steps, trace.cost), strict=True):
        label = f"not finite ({has_failed.sum()} of {len(x)})"
        crosses = find_line(axes, label)
        assert np.array_equal(crosses.get_xdata(), np.asarray(x)[has_failed])
        pixels = crosses.get_transform().transform(points(crosses))
        heights = axes.transAxes.inverted().transform(pixels)[:, 1]
        assert ((heights > 0) & (heights < 0.1)).all()


def test_few_values_that_are_not_finite_among_many_untrusted_are_all_marked():
    estimator = ExactEstimator(trusted=np.zeros(400, bool))
    trace = run_loop(TO_ONE, estimator, optax.sgd(0.1), 0.0, 3.0, num_steps=400)
    value = np.array(trace.value)
    value[::50] = np.nan
    lines = dataclasses.replace(trace, value=value).plot().axes[0].lines
    crosses = {len(x.get_xdata()): x.get_markevery() for x in lines if is_cross(x)}
    assert crosses == {392: 10, 8: 1}


def is_cross(line) -> bool:
    """Returns whether the points of a line are crosses."""
    return line.get_marker() == "x"


def dots(line) -> list[int]:
    """Returns at which points of a line there is a dot."""
    return line.get_markevery() if line.get_marker() == "o" else []


def test_a_number_without_a_neighbor_is_a_dot():
    """No line would show it."""
    figure = run(num_steps=1, record_alphas=True).plot()
    assert [dots(axes.lines[0]) for axes in figure.axes] == [[0]] * 3
    assert all(dots(axes.lines[0]) == [] for axes in run().plot().axes)
    value = np.array([np.nan, 1.0, np.nan, 2.0, 3.0, np.inf])
    trace = dataclasses.replace(run(), value=value)
    assert dots(trace.plot().axes[0].lines[0]) == [1]


def test_a_failed_and_sparse_run_is_drawn_up_to_its_failure():
    """Steps count from the beginning of the first run."""
    estimator = ExactEstimator()
    loop = hg.OuterLoop(TO_ONE, estimator, optax.sgd(0.1))
    earlier = loop.run(loop.init(0.0, 3.0), num_steps=3)
    trace = loop.run(earlier.state, num_steps=6, record_every=2)
    assert trace.plot().axes[0].lines[0].get_xdata().tolist() == [4, 6, 8]
    failed = run_loop(TO_ONE, estimator, optax.sgd(1e200), 0.0, 3.0, num_steps=9)
    num_made = int((failed.stats["gradient_equivalents"] > 0).sum())
    assert len(failed.plot().axes[0].lines[0].get_xdata()) == num_made < 9


def test_estimated_errors_are_drawn_on_a_logarithmic_axis():
    inner = lambda w, a, b: jnp.sum(jnp.cosh(w - jnp.sin(a)))
    problem = hg.Bilevel(inner, TO_ONE.outer_loss)
    estimator = hg.Implicit(hg.Descent(optax.sgd(0.3), 10))
    trace = hg.minimize(problem, estimator, optax.sgd(0.1), 0.0, 0.5, num_steps=4)
    *_, axes = trace.plot().axes
    assert axes.get_yscale() == "log"
    assert axes.get_ylabel() == "estimated relative error"
    expected = trace.stats["error_estimate"]
    assert (expected > 0).all()
    assert np.array_equal(axes.lines[0].get_ydata(), expected)
    is_trusted = trace.stats["trusted"]
    assert not is_trusted.all()
    label = f"not trusted ({sum(~is_trusted)} of 4)"
    assert points(find_line(axes, label))[:, 0].tolist() == [
        step for step in range(4) if not is_trusted[step]
    ]


def test_metrics_are_drawn_where_they_were_evaluated():
    metrics = {"double": lambda w, a, key: 2 * a, "square": lambda w, a, key: a**2}
    trace = run(metrics=metrics, eval_every=2)
    *_, axes = trace.plot().axes
    for name in metrics:
        line = points(find_line(axes, name))
        assert line[:, 0].tolist() == [0, 2, 4, 5]
        assert np.array_equal(line[:, 1], trace.metrics[name][jnp.array([0, 2, 4, 5])])


def test_alpha_is_drawn_entry_by_entry_or_as_a_range():
    trace = run(jnp.array([3.0, 2.0]), record_alphas=True)
    *_, axes = trace.plot().axes
    assert axes.get_ylabel() == "alpha"
    heights = np.stack([line.get_ydata() for line in axes.lines], axis=1)
    assert np.array_equal(heights, trace.alphas)
    assert axes.lines[0].get_color() != axes.lines[1].get_color()
    assert [line.get_label() for line in axes.lines] == ["alpha[0]", "alpha[1]"]
    lines = run(jnp.ones((2, 2)), record_alphas=True).plot().axes[-1].lines
    names = ["alpha[0, 0]", "alpha[0, 1]", "alpha[1, 0]", "alpha[1, 1]"]
    assert [line.get_label() for line in lines] == names
    alpha = jnp.linspace(0.0, 2.0, MAX_LINES_PER_LEAF + 1)
    trace = run(alpha, record_alphas=True)
    *_, axes = trace.plot().axes
    (median,) = axes.lines
    assert np.array_equal(median.get_ydata(), jnp.median(trace.alphas, axis=1))
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (trace.alphas.min(), trace.alphas.max())


def test_several_outer_losses_have_a_line_each():
    outer = (TO_ONE.outer_loss, lambda w, a, b: jnp.sum(w**2))
    trace = run_loop(
        hg.Bilevel(TO_ONE.inner_loss, outer), hg.Implicit(hg.Newton()),
        optax.sgd(0.1), 0.0, 3.0, num_steps=3,
        aggregator=hg.objectives.WeightedSum(jnp.array([0.5, 0.5])),
    )  # fmt: skip
    axes = trace.plot().axes[0]
    for i in range(2):
        heights = find_line(axes, f"loss {i}").get_ydata()
        assert np.array_equal(heights, trace.value[:, i])


def test_a_batch_of_runs_needs_an_index():
    batch = jax.vmap(run)(jnp.array([1.0, 2.0]))
    with pytest.raises(ValueError, match="single run"):
        batch.plot()
    with pytest.raises(ValueError, match="single run"):
        hg.plots.plot_trace(batch)


def test_the_trials_of_a_search_are_points_above_the_best_so_far():
    trace = random_search()
    axes = trace.plot().axes[0]
    assert axes.get_xlabel() == "outer trial"
    trials, lowest, best = (
        points(find_line(axes, name)) for name in ("trial", "lowest", "best")
    )
    assert np.array_equal(trials[:, 1], trace.value)
    assert np.array_equal(lowest[:, 1], np.minimum.accumulate(trace.value))
    np.testing.assert_array_equal(best, trials[[trace.best_row]])


def test_the_trials_of_a_search_with_two_losses_are_points():
    outer = (TO_ONE.outer_loss, lambda w, a, b: (w - 0.2) ** 2)
    trace = hg.search(
        hg.Bilevel(TO_ONE.inner_loss, outer), hg.Newton(), hg.searchers.Sobol(), 0.0,
        space=hg.spaces.Unit(), budget=60,
    )  # fmt: skip
    axes = trace.plot().axes[0]
    for i in range(2):
        line = find_line(axes, f"loss {i}")
        assert (line.get_linestyle(), line.get_marker()) == ("None", "o")
        assert np.array_equal(line.get_ydata(), trace.value[:, i])


def test_a_front_joins_the_points_that_are_not_dominated():
    """Sorted by the first loss; other points are grey, and NaN is left out."""
    values = jnp.array([[2, 1], [1, 3], [2, 3], [3, 0.5], [jnp.nan, 0], [3, 3]])
    (axes,) = hg.plots.plot_front(values, ("error", "FLOPs")).axes
    front = find_line(axes, "not dominated")
    assert points(front).tolist() == [[1, 3], [2, 1], [3, 0.5]]
    assert front.get_drawstyle() == "steps-post"
    dominated = find_line(axes, "dominated")
    assert points(dominated).tolist() == [[2, 3], [3, 3]]
    assert dominated.get_color() == hg.plots.GREY
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("error", "FLOPs")
    with pytest.raises(ValueError, match="values"):
        hg.plots.plot_front(jnp.ones((3, 3)))


def test_reliability_draws_estimates_over_errors_and_the_diagonal():
    estimates = [1e-3, 0.2, 0.0, np.nan, 0.5]
    errors = [2e-3, 0.1, 0.1, 0.1, 0.25]
    trusted = [True, False, True, True, False]
    (axes,) = hg.plots.plot_reliability(estimates, errors, trusted).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    expected = [[2e-3, 1e-3], [0.1, 1e-3]]  # an estimate of zero, at the edge
    assert points(find_line(axes, "trusted")).tolist() == expected
    assert axes.get_title(loc="left").startswith("1 with NaN")
    expected = [[0.1, 0.2], [0.25, 0.5]]
    assert points(find_line(axes, "not trusted")).tolist() == expected
    assert points(find_line(axes, "equal")).tolist() == [[1e-3] * 2, [0.5] * 2]
    (axes,) = hg.plots.plot_reliability(estimates, errors).axes
    assert len(points(find_line(axes, "trusted"))) == 4
    (axes,) = hg.plots.plot_reliability([0.0, 0.0], [0.0, np.inf]).axes
    heights = points(find_line(axes, "trusted"))
    assert np.all(np.isfinite(heights) & (heights > 0)), "else nothing is visible"
    with pytest.raises(ValueError, match="error_estimates"):
        hg.plots.plot_reliability(estimates, errors[:2])


def test_a_hypergradient_is_a_heat_map_per_leaf():
    """Zero is in the middle of the scale; axes beyond the second are joined."""
    tree = {"a": jnp.array([1.0, -3.0]), "b": jnp.arange(12.0).reshape(2, 3, 2)}
    estimate = hg.Estimate(jnp.asarray(0.0), tree, jnp.zeros(3))
    for hypergradient in (estimate, tree):
        figure = hg.plots.plot_hypergradient(hypergradient)
        (a,), (b,) = (axes.images for axes in figure.axes[:2])
        assert np.array_equal(a.get_array(), [[1.0, -3.0]])
        assert np.array_equal(b.get_array(), np.arange(12.0).reshape(2, 6))
        assert (a.get_clim(), b.get_clim()) == ((-3.0, 3.0), (-11.0, 11.0))
        titles = [axes.get_title() for axes in figure.axes[:2]]
        assert titles == ["alpha.a", "alpha.b"]
    (image,) = hg.plots.plot_hypergradient(jnp.asarray(0.0)).axes[0].images
    assert image.get_array().shape == (1, 1)
    zero, missing = image.get_cmap()([0.5, np.nan])
    assert np.max(np.abs(zero - missing)) > 0.2
    with pytest.raises(ValueError, match="hypergradient"):
        hg.plots.plot_hypergradient({})


def test_figures_do_not_touch_pyplot_and_are_images_in_a_notebook():
    """The process is a fresh one, because other tests may import pyplot."""
    code = """
        import sys, hypergrad as hg
        assert "matplotlib" not in sys.modules
        figure = hg.plots.plot_front([[1.0, 2.0], [2.0, 1.0]])
        assert figure._repr_png_().startswith(b"\\x89PNG")
        assert "matplotlib.pyplot" not in sys.modules
    """
    run_python(code)


def test_a_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"hypergrad-jax\[display\]"):
        hg.plots.plot_front(jnp.ones((1, 2)))


def test_a_front_is_that_of_all_pairs():
    """Integers, of which many are equal."""
    values = np.random.default_rng(0).integers(0, 8, size=(60, 2)).astype(float)
    (axes,) = hg.plots.plot_front(values).axes
    front = values[np.asarray(hg.objectives.non_dominated(values))]
    expected = sorted(map(tuple, front))
    assert list(map(tuple, points(find_line(axes, "not dominated")))) == expected


def test_a_front_tells_points_apart_that_are_equal_in_float32():
    with enable_x64(False):
        (axes,) = hg.plots.plot_front(np.array([[1, 2], [1 + 1e-9, 1]])).axes
    assert len(points(find_line(axes, "not dominated"))) == 2


def test_an_infinite_trial_is_not_the_lowest():
    trace = random_search()
    value = np.array(trace.value)
    value[1] = -np.inf
    trace = dataclasses.replace(trace, value=value)
    lowest = points(find_line(trace.plot().axes[0], "lowest"))[:, 1]
    finite = np.where(np.isfinite(value), value, np.inf)
    np.testing.assert_array_equal(lowest, np.minimum.accumulate(finite))


def test_a_long_legend_is_cut_and_an_empty_leaf_is_left_out():
    alpha = {f"rate_{i}": jnp.ones(()) for i in range(40)} | {"none": jnp.ones(0)}
    total = lambda alpha: sum(jnp.sum(x) for x in alpha.values())
    problem = hg.Bilevel(
        lambda w, alpha, batch: (w - total(alpha)) ** 2,
        lambda w, alpha, batch: (w - 1.0) ** 2,
    )
    loop = hg.OuterLoop(
        problem, hg.Implicit(hg.Newton()), optax.sgd(1e-3), record_alphas=True
    )
    figure = loop.run(loop.init(0.0, alpha), num_steps=2).plot()
    (labels,) = (
        [text.get_text() for text in axes.get_legend().get_texts()]
        for axes in figure.axes
        if axes.get_ylabel() == "alpha"
    )
    assert labels[:2] == ["alpha.rate_0", "alpha.rate_1"]
    assert labels[-1] == f"and {40 - (len(labels) - 1)} more"
    assert len(labels) == 12


def test_an_empty_leaf_has_no_panel():
    figure = hg.plots.plot_hypergradient({"a": np.zeros((0, 3)), "b": np.ones(2)})
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["alpha.b"]
